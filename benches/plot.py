#!/usr/bin/env python3
"""Draws what the benches measured: `benches/plot.py DIR_OF_JSON DIR_OF_SVG`. Only Python's own library.

Each file of JSON lines is what a bench wrote with `-- --json FILE`. A plot whose figures are not there is left out, and said.
"""

import json
import math
import pathlib
import re
import sys

COLOURS = {"miosa": "#1b6ca8", "xfs": "#d1495b", "btrfs": "#edae49", "qemu-img": "#66a182", "qcow2": "#66a182",
           "restic": "#8d6a9f", "borg": "#7a7a7a", "raw": "#444444", "limit": "#222222", "miosa, durable": "#7fb3d5"}
OTHERS = ["#8d6a9f", "#d1495b", "#edae49", "#66a182", "#7a7a7a", "#b08968"]
FONT = 'font-family="system-ui, sans-serif"'


def escape(text):
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def colour(system, nth):
    return COLOURS.get(system, OTHERS[nth % len(OTHERS)])


def short(value):
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def frame(title, what, width, height, body):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f'<rect width="100%" height="100%" fill="#ffffff"/>'
            f'<text x="16" y="26" {FONT} font-size="16" font-weight="600" fill="#222">{escape(title)}</text>'
            f'<text x="16" y="45" {FONT} font-size="12" fill="#666">{escape(what)}</text>{body}</svg>\n')


def lines(title, what, axis, series):
    """Lines over what was told, in order; values are logarithmic. `series`: name -> [(x, y)]."""
    left, top, bottom, right = 90, 66, 46, 40 + 7 * max(len(name) for name in series)
    width, height = 650 + right, 400
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points if y > 0]
    low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))
    high = max(high, low * 10)
    at_x = lambda x: left + (width - left - right) * (xs.index(x) / max(len(xs) - 1, 1))
    at_y = lambda y: top + (height - top - bottom) * (1 - math.log10(max(y, low) / low) / math.log10(high / low))
    out, step = [], low
    while step <= high * 1.001:
        y = at_y(step)
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e5e5"/>'
                   f'<text x="{left - 8}" y="{y + 4:.1f}" {FONT} font-size="11" fill="#666" text-anchor="end">{short(step)}</text>')
        step *= 10
    for x in xs:
        out.append(f'<text x="{at_x(x):.1f}" y="{height - bottom + 18}" {FONT} font-size="11" fill="#666" '
                   f'text-anchor="middle">{short(x)}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" {FONT} font-size="12" fill="#444" '
               f'text-anchor="middle">{escape(axis)}</text>')
    ends = []
    for nth, (name, points) in enumerate(series.items()):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in sorted(points))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour(name, nth)}" stroke-width="2.5"/>')
        out += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5" fill="{colour(name, nth)}"/>' for x, y in points]
        ends.append([at_y(sorted(points)[-1][1]), name, colour(name, nth)])
    ends.sort()
    for before, after in zip(ends, ends[1:]):
        after[0] = max(after[0], before[0] + 15)
    out += [f'<text x="{width - right + 10}" y="{y + 4:.1f}" {FONT} font-size="12" font-weight="600" fill="{fill}">'
            f'{escape(name)}</text>' for y, name, fill in ends]
    return frame(title, what, width, height, "".join(out))


def bars(title, what, groups, mark=None):
    """Horizontal bars, one scale. `groups`: label -> [(system, value)]. `mark`: a line at this value, and its words."""
    left, row, gap, top = 24 + max(7 * len(label) for label in groups), 17, 12, 66
    beside = 60 + 7 * max(len(system) for group in groups.values() for system, _ in group)
    width = left + 420 + beside
    values = [value for group in groups.values() for _, value in group] + ([mark[0]] if mark else [])
    scale = 420 / max(values)
    out, y = [], top
    for label, group in groups.items():
        out.append(f'<text x="{left - 12}" y="{y + row * len(group) / 2 + 4:.1f}" {FONT} font-size="12" fill="#222" '
                   f'text-anchor="end">{escape(label)}</text>')
        for nth, (system, value) in enumerate(group):
            out.append(f'<rect x="{left}" y="{y}" width="{max(value * scale, 1):.1f}" height="{row - 3}" rx="2" '
                       f'fill="{colour(system, nth)}"/>'
                       f'<text x="{left + value * scale + 6:.1f}" y="{y + row - 6}" {FONT} font-size="11" fill="#444">'
                       f'{short(value)} <tspan fill="#888">{escape(system)}</tspan></text>')
            y += row
        y += gap
    if mark:
        x = left + mark[0] * scale
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{y}" stroke="#222" stroke-dasharray="4 3"/>'
                   f'<text x="{x + 4:.1f}" y="{top - 10}" {FONT} font-size="11" fill="#222">{escape(mark[1])}</text>')
    return frame(title, what, width, y + 12, "".join(out))


def grouped(rows, metric, case=r"(.*)"):
    """Figures of a metric by what the case's pattern takes out of it."""
    found = {}
    for row in rows:
        match = re.fullmatch(case, row["case"])
        if match and row["metric"] == metric:
            found.setdefault(match[1], []).append((row["system"], row["value"]))
    return found


def fork(rows):
    series = {}
    for metric in ["fork median", "create -b median"]:
        for count, figures in grouped(rows, metric, r"peers, fragments (\d+)").items():
            for system, value in figures:
                series.setdefault(system, []).append((int(count), value))
    for metric, name in [("durable fork median", "miosa, durable"), ("one synced write median", "limit: a synced write")]:
        for count, figures in grouped(rows, metric, r"peers, fragments (\d+)").items():
            series.setdefault(name, []).extend((int(count), value) for _, value in figures)
    return series and lines("A fork of a 10 GiB disk", "microseconds until it can be used, not synced but for one line; median of 9, logarithmic",
                            "pieces that the disk is in", series)


def storage_cost(rows):
    groups = grouped(rows, "stored bytes")
    return groups and bars("What each step adds to the disk", "MB stored; Debian packages installed into live ext4 images", groups)


def lifecycle(rows):
    groups = {}
    for way in ["by a boot", "from a kept state"]:
        for what, figures in grouped(rows, "median", rf"(.*) to first exec, {way}").items():
            groups.setdefault(what, []).extend((way, value) for _, value in figures)
    return groups and bars("From the call to the end of the first program", "milliseconds, median; QEMU without KVM", groups)


def fanout(rows):
    series = {}
    for count, figures in grouped(rows, "all of it", r"(\d+) forks").items():
        for system, value in figures:
            series.setdefault(system, []).append((int(count), value))
    return series and lines("Forks of one snapshot: all read it, then write", "seconds for all of them, logarithmic",
                            "forks", series)


def frontend(rows):
    groups = {}
    for part in ["vhost-user, fresh", "fuse, fresh", "vhost-user, sealed, warm", "fuse, sealed, warm"]:
        for job, figures in grouped(rows, "operations", rf"{part}, (.*)").items():
            if "4 KiB" in job and "flush" not in job:
                groups[f"{part}: {job}"] = [(system, value / 1000) for system, value in figures]
    return groups and bars("4 KiB requests through the front ends", "thousands a second; median of the rounds", groups)


def latency(rows):
    names = {"null FUSE": "a FUSE read that does nothing"}
    groups = {}
    for case, job in [("sealed, warm", "4 KiB random read, QD 1"), ("fresh", "4 KiB write + flush, QD 1")]:
        for export in ["vhost-user", "fuse"]:
            for metric, share in [("p50", "half"), ("p99", "99 of 100")]:
                for _, figures in grouped(rows, metric, rf"({export}, {case}, {re.escape(job)})").items():
                    groups[f"{export}, {case}: {job.split(',')[0]}, {share}"] = [
                        (names.get(system, system), value) for system, value in figures]
    return groups and bars("One request at a time", "microseconds within which this share of them is answered; all rounds", groups)


def write_path(rows):
    names = {"append": "one append for all: the limit of a log", "shared": "a thread a disk, one append", "no uring": "miosa, no io_uring"}
    groups = {f"{count} disks" if count != "1" else "1 disk": [(names.get(system, system), value) for system, value in figures]
              for count, figures in grouped(rows, "median", r"4 KiB write \+ flush, (\d+) disks").items()}
    return groups and bars("4 KiB writes, each of them flushed", "a second, all disks; median of the rounds", groups)


def read_path(rows):
    sequential = {f"1 MiB, {what}": figures for what, figures in
                  grouped(rows, "median", r"sequential read, 1 MiB, sealed, (.*)").items()}
    limits = grouped(rows, "median", r"decoding, (.*)")
    groups = {**sequential, **{f"decoding alone, {what}: the limit": figures for what, figures in limits.items()}}
    return sequential and bars("Reading a sealed disk from end to end", "MiB/s, median of the rounds", groups)


def seal(rows):
    groups = {}
    for what, figures in grouped(rows, "per core").items():
        groups[what] = figures + [("the limit: BLAKE3 + zstd alone", value)
                                  for _, value in grouped(rows, "blake3 + zstd, a core").get(what, [])]
    return groups and bars("Sealing, and ingest with sealing", "MB/s of data for each second of processor time", groups)


def main():
    source, target = map(pathlib.Path, sys.argv[1:3])
    target.mkdir(parents=True, exist_ok=True)
    for name, bench, draw in [("fork", "fork", fork), ("storage_cost", "storage_cost", storage_cost),
                              ("lifecycle", "lifecycle", lifecycle), ("fanout", "fanout", fanout),
                              ("frontend", "frontend", frontend), ("latency", "frontend", latency),
                              ("write_path", "write_path", write_path), ("read_path", "read_path", read_path),
                              ("seal", "seal", seal)]:
        path = source / f"{bench}.json"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        drawn = draw(rows)
        if drawn:
            (target / f"{name}.svg").write_text(drawn)
            print(f"{target / name}.svg")
        else:
            print(f"no plot of {name}: {path} has none of its figures", file=sys.stderr)


if __name__ == "__main__":
    main()
