//! `miosa store report`: a table with bars, or a picture.

use std::fmt::Write;
use std::io::Write as _;
use std::path::Path;

use super::output::{Out, Result};
use super::save;
use crate::api::client::Client;
use crate::disks::{Family, Member, Report};
use crate::units::show_bytes;

/// Characters of a bar.
const BAR: u64 = 24;

pub(super) async fn run(client: &Client, out: Out, svg: Option<&Path>) -> Result<()> {
    let report: Report = client.get("/store/report").await?;
    if let Some(file) = svg {
        let picture = picture(&report);
        save::beside(file, async |to| to.write_all(picture.as_bytes()).map_err(|e| save::unwritable(file, e))).await?;
    }
    let ids: Vec<_> = report.families.iter().flat_map(|f| &f.members).map(|m| m.id.as_str()).collect();
    out.answer(&report, &ids.join("\n"), |out| match svg {
        Some(file) => format!("{}\nwrote {}", table(out, &report), file.display()),
        None => table(out, &report),
    })
}

/// What one costs, as part of the dearest.
fn bar(exclusive: u64, referenced: u64, most: u64) -> String {
    let scaled = |bytes: u64| (u128::from(bytes) * u128::from(BAR)).div_ceil(u128::from(most.max(1))) as usize;
    let all = scaled(referenced);
    let own = scaled(exclusive).min(all);
    format!("{}{}", "█".repeat(own), "░".repeat(all - own))
}

fn label(member: &Member) -> String {
    let state = member.state.as_ref().map(|s| format!(" ({s})")).unwrap_or_default();
    format!("{} {}{state}", member.what, member.name)
}

fn table(out: &Out, report: &Report) -> String {
    if report.families.is_empty() {
        return format!("nothing is kept\n{}", out.next_step("miosa disk create NAME --size 10gb"));
    }
    let members = || report.families.iter().flat_map(|f| &f.members);
    let most = members().map(|m| m.referenced_bytes).max().unwrap_or(0);
    let mut rows = Vec::new();
    for family in &report.families {
        let count = family.members.len();
        let name = format!("{} and family: {count}", family.name);
        rows.push(vec![
            out.strong(&name),
            show_bytes(family.logical_bytes),
            show_bytes(family.referenced_bytes),
            show_bytes(family.exclusive_bytes),
            String::new(),
        ]);
        for m in &family.members {
            rows.push(vec![
                format!("  {}", label(m)),
                show_bytes(m.logical_bytes),
                show_bytes(m.referenced_bytes),
                show_bytes(m.exclusive_bytes),
                bar(m.exclusive_bytes, m.referenced_bytes, most),
            ]);
        }
    }
    let head = ["", "DATA", "STORED", "DELETING GIVES BACK", "█ ITS OWN ░ SHARED"];
    format!("{}\n\n{}", out.table(&head, &rows), totals(out, report))
}

fn totals(out: &Out, r: &Report) -> String {
    let saved = if r.referenced_bytes > 0 { r.logical_bytes as f64 / r.referenced_bytes as f64 } else { 0.0 };
    out.fields(&[
        ("data", format!("{} in all, {saved:.1} times what is stored for it", show_bytes(r.logical_bytes))),
        ("stored for it", show_bytes(r.referenced_bytes)),
        ("  held by one", format!("{}: the sum of what deleting each alone gives back", show_bytes(r.exclusive_bytes))),
        ("  shared", format!("{}: goes only with the last that has it", show_bytes(r.shared_bytes))),
        ("nobody's", format!("{}: miosa store gc gives back what it can", show_bytes(r.unreferenced_bytes))),
        ("log", format!("{}: not sealed, or reserved", show_bytes(r.log_bytes))),
        ("index", show_bytes(r.index_bytes)),
        ("on the host", show_bytes(r.stored_bytes)),
    ])
}

// ---- the picture

const WIDTH: u64 = 960;
const LEFT: u64 = 330;
const RIGHT: u64 = 190;
/// Members of one family that are drawn.
const DRAWN: usize = 40;

const STYLE: &str = "
  svg { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --ground: #ffffff; --line: #e4e7ec;
        --own: #2563eb; --shared: #a5c4fb; --dead: #f59e0b; --log: #98a2b3; }
  @media (prefers-color-scheme: dark) { svg { --ink: #e7ebf3; --soft: #98a2b3; --ground: #10151f; --line: #273043;
        --own: #60a5fa; --shared: #29487f; --dead: #f5b041; --log: #4b5568; } }
  text { font: 13px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: var(--ink); }
  .title { font-size: 22px; font-weight: 650; } .family { font-size: 15px; font-weight: 600; }
  .soft { fill: var(--soft); } .number { font-variant-numeric: tabular-nums; text-anchor: end; }
  .ground { fill: var(--ground); } .line { stroke: var(--line); } .track { fill: var(--line); opacity: .45; }
  .own { fill: var(--own); } .shared { fill: var(--shared); } .dead { fill: var(--dead); } .log { fill: var(--log); }";

struct Picture {
    svg: String,
    y: u64,
}

impl Picture {
    fn text(&mut self, x: u64, class: &str, text: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.svg, r#"<text x="{x}" y="{}" class="{class}">{}</text>"#, self.y, escape(text));
    }

    /// Parts of a bar, each as long as its share of `most`.
    fn bar(&mut self, x: u64, width: u64, height: u64, most: u64, parts: &[(&str, u64, &str)]) {
        let y = self.y - height;
        let _ = writeln!(self.svg, r#"<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" class="track"/>"#);
        let mut at = x as f64;
        for (class, bytes, what) in parts.iter().filter(|(_, bytes, _)| *bytes > 0) {
            let long = *bytes as f64 * width as f64 / most.max(1) as f64;
            let _ = writeln!(
                self.svg,
                r#"<rect x="{at:.1}" y="{y}" width="{long:.1}" height="{height}" rx="2" class="{class}"><title>{}: {}</title></rect>"#,
                escape(what),
                show_bytes(*bytes)
            );
            at += long;
        }
    }

    fn family(&mut self, family: &Family, most: u64) {
        self.y += 44;
        let _ = writeln!(
            self.svg,
            r#"<line x1="32" x2="{}" y1="{y}" y2="{y}" class="line"/>"#,
            WIDTH - 32,
            y = self.y - 24
        );
        self.text(32, "family", &shorten(&family.name, 42));
        self.text(
            WIDTH - 32,
            "soft number",
            &format!(
                "{} stored for {} of data · all of it gone gives back {}",
                show_bytes(family.referenced_bytes),
                show_bytes(family.logical_bytes),
                show_bytes(family.exclusive_bytes)
            ),
        );
        for member in family.members.iter().take(DRAWN) {
            self.y += 24;
            self.text(44, "", &shorten(&label(member), 42));
            let parts = [("own", member.exclusive_bytes, "its own"), ("shared", member.shared_bytes, "shared")];
            self.bar(LEFT, WIDTH - LEFT - RIGHT, 13, most, &parts);
            self.text(WIDTH - 116, "number", &show_bytes(member.exclusive_bytes));
            self.text(WIDTH - 32, "soft number", &show_bytes(member.referenced_bytes));
        }
        if let Some(more) = family.members.len().checked_sub(DRAWN).filter(|more| *more > 0) {
            self.y += 24;
            self.text(44, "soft", &format!("and {more} that would give back less"));
        }
    }
}

/// A picture of its own, for light and dark.
fn picture(r: &Report) -> String {
    let most = r.families.iter().flat_map(|f| &f.members).map(|m| m.referenced_bytes).max().unwrap_or(0);
    let mut p = Picture { svg: String::new(), y: 52 };
    p.text(32, "title", "What is kept, and what it costs");
    p.y += 26;
    let summary = format!(
        "{} of data in {} disks and snapshots, stored in {}",
        show_bytes(r.logical_bytes),
        r.families.iter().map(|f| f.members.len()).sum::<usize>(),
        show_bytes(r.referenced_bytes)
    );
    p.text(32, "soft", &summary);
    let parts = [
        ("own", r.exclusive_bytes, "held by one"),
        ("shared", r.shared_bytes, "shared by several"),
        ("dead", r.unreferenced_bytes, "nobody's"),
        ("log", r.log_bytes + r.index_bytes, "log and index"),
    ];
    p.y += 42;
    p.bar(32, WIDTH - 64, 24, parts.iter().map(|part| part.1).sum(), &parts);
    p.y += 24;
    for (i, (class, bytes, what)) in parts.iter().enumerate() {
        let x = 32 + i as u64 * 224;
        let _ = writeln!(p.svg, r#"<rect x="{x}" y="{}" width="11" height="11" rx="2" class="{class}"/>"#, p.y - 10);
        p.text(x + 18, "soft", &format!("{what} {}", show_bytes(*bytes)));
    }
    p.y += 34;
    p.text(WIDTH - 116, "soft number", "gives back");
    p.text(WIDTH - 32, "soft number", "stored");
    p.y -= 20;
    r.families.iter().for_each(|family| p.family(family, most));
    let height = p.y + 36;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" aria-label=\"What the store keeps and what it costs\">\n<style>{STYLE}\n</style>\n\
         <rect width=\"100%\" height=\"100%\" class=\"ground\"/>\n{}</svg>\n",
        p.svg
    )
}

fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let kept: String = text.chars().take(most - 1).collect();
    format!("{kept}…")
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // What XML has no place for.
            c if c.is_control() => escaped.push('\u{FFFD}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_what_it_shows() {
        assert_eq!(bar(0, 100, 100), "░".repeat(24));
        assert_eq!(bar(50, 100, 100), format!("{}{}", "█".repeat(12), "░".repeat(12)));
        assert_eq!(bar(1, 1, 1 << 40), "█");
        assert_eq!(bar(0, 0, 0), "");
    }

    #[test]
    fn names_cannot_break_the_picture() {
        let member = Member {
            id: "disk-1".into(),
            name: "</text><script>&\"\u{1}".into(),
            what: "disk".into(),
            state: None,
            logical_bytes: 1,
            referenced_bytes: 1,
            exclusive_bytes: 1,
            shared_bytes: 0,
            unsealed_bytes: 0,
        };
        let family = Family {
            name: member.name.clone(),
            logical_bytes: 1,
            referenced_bytes: 1,
            exclusive_bytes: 1,
            members: vec![member],
        };
        let picture = picture(&Report { families: vec![family], ..Report::default() });
        assert!(!picture.contains("<script") && picture.contains("&lt;script&gt;&amp;&quot;\u{FFFD}"), "{picture}");
    }
}
