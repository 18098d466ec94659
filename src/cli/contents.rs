//! The files of disks and snapshots: `miosa disk ls|cat|extract|diff --files`, `miosa sandbox snapshots ls|cat|extract|diff`.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;

use serde_json::json;

use super::args::{CatArgs, ExtractArgs, FileDiffArgs, LsArgs};
use super::output::{Failure, Out, Result};
use crate::api::client::{Client, Download, escape};
use crate::api::contents::TreeBody;
use crate::disks::FileView;
use crate::ext4::Kind;
use crate::ext4::diff::{FileChange, FileDiff, How, Part};
use crate::units::show_bytes;

/// The route of a state's files.
fn route(key: &str, rest: &str) -> String {
    format!("/snapshots/{}{rest}", escape(key))
}

/// Lists a directory of the state `key`.
pub(super) async fn ls(client: &Client, out: Out, key: &str, args: &LsArgs) -> Result<()> {
    let query = format!("/tree?path={}&recursive={}", escape(&args.path), args.recursive);
    let tree: TreeBody = client.get(&route(key, &query)).await?;
    let name = |file: &FileView| match (args.recursive || !tree.is_directory, file.kind) {
        (true, _) => file.path.clone(),
        (false, Kind::Directory) => format!("{}/", file.name),
        (false, _) => file.name.clone(),
    };
    let names: Vec<_> = tree.entries.iter().map(name).collect();
    out.answer(&tree.entries, &names.join("\n"), |out| match args.long {
        false => names.join("\n"),
        true => long(out, &tree.entries, &names),
    })
}

fn long(out: &Out, files: &[FileView], names: &[String]) -> String {
    let rows: Vec<_> = files
        .iter()
        .zip(names)
        .map(|(file, name)| {
            let target = file.target.as_ref().map(|t| format!(" -> {t}")).unwrap_or_default();
            vec![
                permissions(file),
                file.links.to_string(),
                format!("{}:{}", file.uid, file.gid),
                file.size_bytes.to_string(),
                file.modified_at.strftime("%Y-%m-%d %H:%M:%S").to_string(),
                format!("{name}{target}"),
            ]
        })
        .collect();
    out.table(&["MODE", "LINKS", "OWNER", "SIZE", "MODIFIED", "NAME"], &rows)
}

/// `-rwxr-xr-x`
fn permissions(file: &FileView) -> String {
    let mode = u32::from_str_radix(&file.mode, 8).unwrap_or(0);
    let mut text = String::from(file.kind.letter());
    for (shift, special, set, unset) in [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => set,
            (false, true) => unset,
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

pub(super) async fn cat(client: &Client, out: Out, args: CatArgs) -> Result<()> {
    if out.json {
        return Err(
            Failure::user("usage", "stdout cannot have both the file and a JSON document").hint("leave out --json")
        );
    }
    let mut download = client.download(&route(&args.key, &format!("/files?path={}", escape(&args.path)))).await?;
    if download.is_archive() {
        return Err(Failure::user("file_error", format!("{} is a directory", args.path))
            .hint(format!("list it (ls {}), or extract it: extract {} {} -o FILE", args.key, args.key, args.path)));
    }
    copy(&mut download, &mut std::io::stdout().lock(), Path::new("-")).await.map(drop)
}

pub(super) async fn extract(client: &Client, out: Out, args: ExtractArgs) -> Result<()> {
    let to_stdout = args.output == Path::new("-");
    if to_stdout && (out.json || std::io::stdout().is_terminal()) {
        return Err(Failure::user("usage", "stdout is wanted for the archive").hint("name a file, or pipe it on"));
    }
    let query = format!("/files?archive=true&path={}", escape(&args.path));
    let mut download = client.download(&route(&args.key, &query)).await?;
    if to_stdout {
        return copy(&mut download, &mut std::io::stdout().lock(), &args.output).await.map(drop);
    }
    let bytes =
        super::save::beside(&args.output, async |file: &mut File| copy(&mut download, file, &args.output).await)
            .await?;
    let answer = json!({ "path": args.path, "file": args.output, "size_bytes": bytes });
    out.answer(&answer, &args.output.display().to_string(), |_| {
        format!("wrote {} to {}", show_bytes(bytes), args.output.display())
    })
}

pub(super) async fn copy(download: &mut Download, to: &mut impl Write, name: &Path) -> Result<u64> {
    let mut bytes = 0;
    while let Some(piece) = download.next_piece().await? {
        to.write_all(&piece).map_err(|e| super::save::unwritable(name, e))?;
        bytes += piece.len() as u64;
    }
    to.flush().map_err(|e| super::save::unwritable(name, e))?;
    Ok(bytes)
}

pub(super) async fn diff(client: &Client, out: Out, args: FileDiffArgs) -> Result<()> {
    let query = format!("/diff?with={}", escape(&args.b));
    let diff: FileDiff = client.get(&route(&args.a, &query)).await?;
    let paths: Vec<_> = diff.changes.iter().map(|c| c.path.as_str()).collect();
    out.answer(&diff, &paths.join("\n"), |out| differences(out, &diff))
}

fn differences(out: &Out, diff: &FileDiff) -> String {
    if diff.changes.is_empty() {
        return "no file differs".to_owned();
    }
    let rows: Vec<_> = diff.changes.iter().map(row).collect();
    let count = |how| diff.changes.iter().filter(|c| c.how == how).count();
    let more = if diff.truncated { "; there are more than are shown" } else { "" };
    format!(
        "{}\n{} added, {} removed, {} changed, {} renamed{more}",
        out.table(&["", "PATH", "SIZE", "WHAT"], &rows),
        count(How::Added),
        count(How::Removed),
        count(How::Changed),
        count(How::Renamed)
    )
}

fn row(change: &FileChange) -> Vec<String> {
    let sign = match change.how {
        How::Added => "+",
        How::Removed => "-",
        How::Changed => "~",
        How::Renamed => ">",
    };
    let slash = if change.kind == Kind::Directory && change.path != "/" { "/" } else { "" };
    let from = change.from.as_ref().map(|from| format!(" (was {from}{slash})")).unwrap_or_default();
    let size = match (change.size_before, change.size_after) {
        (Some(a), Some(b)) if a != b => format!("{} → {}", show_bytes(a), show_bytes(b)),
        (Some(size), _) | (None, Some(size)) => show_bytes(size),
        (None, None) => String::new(),
    };
    let parts = change.parts.iter().map(|part| match part {
        Part::Content => "content",
        Part::Mode => "mode",
        Part::Owner => "owner",
        Part::Xattrs => "xattrs",
        Part::Modified => "time",
    });
    vec![sign.to_owned(), format!("{}{slash}{from}", change.path), size, parts.collect::<Vec<_>>().join(", ")]
}
