//! `miosa usage`, `miosa sandbox usage`: what sandboxes used over time, and when that moved from compute to saved state.

use std::time::Duration;

use super::args::PeriodArgs;
use super::output::{Out, Result};
use crate::api::client::{Client, escape};
use crate::api::types::{FiguresBody, SandboxUsageBody, SessionBody, UsageReport};
use crate::units::{show_bytes, show_duration};

/// Marks of a line of time.
const MARKS: u32 = 24;
const HOUR: f64 = 3_600.0;

pub(super) async fn run(client: &Client, out: Out, sandbox: Option<&str>, args: &PeriodArgs) -> Result<()> {
    let mut query = match &args.start {
        Some(start) => format!("?start={}", escape(start)),
        None => format!("?period={}", escape(&args.period)),
    };
    for (name, value) in [("end", args.end.as_deref()), ("sandbox_id", sandbox)] {
        query.extend(value.map(|value| format!("&{name}={}", escape(value))));
    }
    if args.sessions {
        let sessions: Vec<SessionBody> = client.get(&format!("/usage/sessions{query}")).await?;
        let ids: Vec<_> = sessions.iter().map(|s| s.id.as_str()).collect();
        return out.answer(&sessions, &ids.join("\n"), |out| show_sessions(out, &sessions));
    }
    if args.measure {
        query.push_str("&measure=true");
    }
    let report: UsageReport = client.get(&format!("/usage{query}&parts={MARKS}")).await?;
    let ids: Vec<_> = report.results.iter().map(|r| r.sandbox_id.as_str()).collect();
    out.answer(&report, &ids.join("\n"), |out| show(out, &report))
}

fn show(out: &Out, report: &UsageReport) -> String {
    let length = Duration::try_from(report.period_end.duration_since(report.period_start)).unwrap_or_default();
    if report.results.is_empty() {
        return format!(
            "nothing was used\n{}",
            out.next_step("miosa sandbox create --template base --name NAME --wait")
        );
    }
    let each = length / MARKS;
    let mut all: Vec<&SandboxUsageBody> = report.results.iter().collect();
    all.sort_by(|a, b| b.used.vcpu_sec.total_cmp(&a.used.vcpu_sec).then(cost(b).total_cmp(&cost(a))));
    let line = |name: &str, state: &str, used: &FiguresBody, now: String, time: String| {
        vec![
            name.to_owned(),
            state.to_owned(),
            used.sessions.to_string(),
            computed(used.runtime_sec),
            format!("{:.2}", used.vcpu_sec / HOUR),
            format!("{:.2}", used.memory_mb_sec / HOUR / 1024.0),
            gib_hours(used.logical_byte_hours),
            gib_hours(used.referenced_byte_hours),
            gib_hours(used.exclusive_byte_hours),
            now,
            time,
        ]
    };
    let mut rows: Vec<_> = all
        .iter()
        .map(|usage| {
            let now = usage.saved.map(|saved| show_bytes(saved.exclusive_bytes)).unwrap_or_default();
            let time = usage.parts.iter().map(|part| mark(part, each.as_secs_f64())).collect();
            line(&usage.name, usage.state.map_or("gone", |s| s.name()), &usage.used, now, time)
        })
        .collect();
    if all.len() > 1 {
        rows.push(line("all", "", &report.total, String::new(), String::new()));
    }
    let head = [
        "SANDBOX",
        "STATE",
        "SESSIONS",
        "COMPUTE",
        "CPU",
        "MEMORY",
        "LOGICAL",
        "REFERENCED",
        "EXCLUSIVE",
        "NOW",
        "OVER TIME",
    ];
    format!(
        "{}\nCPU in hours, MEMORY and what was saved in GiB hours; NOW is what is saved for it alone\n\
         {} to {}; a mark is {}: █ computing  ▄ for a part of it  ░ saved only",
        out.table(&head, &rows),
        report.period_start.strftime("%Y-%m-%d %H:%M"),
        report.period_end.strftime("%Y-%m-%d %H:%M UTC"),
        show_duration(Duration::from_secs(each.as_secs().max(1))),
    )
}

fn cost(usage: &SandboxUsageBody) -> f64 {
    usage.used.exclusive_byte_hours
}

/// What a part of the period was like, which is so many seconds long.
fn mark(part: &FiguresBody, seconds: f64) -> char {
    match part {
        part if part.runtime_sec >= 0.9 * seconds => '█',
        part if part.sessions > 0 => '▄',
        part if part.logical_byte_hours > 0.0 => '░',
        _ => ' ',
    }
}

fn computed(seconds: f64) -> String {
    // People do not want the milliseconds of minutes.
    let time = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    show_duration(if time.as_secs() > 0 { Duration::from_secs(time.as_secs()) } else { time })
}

fn gib_hours(byte_hours: f64) -> String {
    let value = byte_hours / f64::from(1 << 30);
    match value {
        value if value > 0.0 && value < 0.01 => "<0.01".to_owned(),
        value => format!("{value:.2}"),
    }
}

fn show_sessions(out: &Out, sessions: &[SessionBody]) -> String {
    if sessions.is_empty() {
        return "no sessions".to_owned();
    }
    let time = |at: jiff::Timestamp| at.strftime("%Y-%m-%d %H:%M:%S").to_string();
    let rows: Vec<_> = sessions
        .iter()
        .map(|s| {
            vec![
                s.id.clone(),
                s.name.clone(),
                time(s.started_at),
                s.ended_at.map_or_else(|| s.status.clone(), time),
                computed(s.runtime_sec),
                format!("{} cpu, {} MiB", s.cpu_count, s.memory_mb),
            ]
        })
        .collect();
    out.table(&["SESSION", "SANDBOX", "BEGAN", "ENDED", "COMPUTE", "SIZE"], &rows)
}
