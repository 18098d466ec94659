//! Archives: `miosa disk export --format archive`, `miosa disk import`, `miosa sandbox snapshots export|import`.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::Path;

use bytes::Bytes;
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::args::{ImportArgs, SnapshotExportArgs, SnapshotImportArgs};
use super::output::{Failure, Out, Result};
use super::{contents, disk, images, save};
use crate::api::client::{Client, MIOSA_ARCHIVE, escape};
use crate::api::types::SnapshotBody;
use crate::disks::DiskView;
use crate::units::show_bytes;

/// Bytes read at a time.
const PIECE: usize = 1 << 20;

pub(super) async fn export_disk(client: &Client, out: Out, key: &str, file: &Path) -> Result<()> {
    export(client, out, key, &disk::path(key, "/archive"), file).await
}

pub(super) async fn export_snapshot(client: &Client, out: Out, args: SnapshotExportArgs) -> Result<()> {
    let route = format!("/snapshots/{}/archive", escape(&args.snapshot));
    export(client, out, &args.snapshot, &route, &args.file).await
}

async fn export(client: &Client, out: Out, key: &str, route: &str, file: &Path) -> Result<()> {
    let to_stdout = file == Path::new("-");
    if to_stdout && (out.json || std::io::stdout().is_terminal()) {
        return Err(Failure::user("usage", "stdout is wanted for the archive").hint("name a file, or pipe it on"));
    }
    out.progress("packing, and writing …");
    let mut download = client.download(route).await?;
    if to_stdout {
        return contents::copy(&mut download, &mut std::io::stdout().lock(), file).await.map(drop);
    }
    let bytes = save::beside(file, async |to: &mut File| contents::copy(&mut download, to, file).await).await?;
    let answer = json!({ "state": key, "file": file, "archive_bytes": bytes });
    out.answer(&answer, &file.display().to_string(), |out| {
        let next = out.next_step(&format!("elsewhere: miosa disk import {} --name NAME", file.display()));
        format!("wrote {} to {}\n{next}", show_bytes(bytes), file.display())
    })
}

/// Makes disks of an archive.
pub(super) async fn import_disks(
    client: &Client,
    out: Out,
    args: &ImportArgs,
    archive: impl Read + Send + 'static,
) -> Result<()> {
    let route = format!("/disk-archives?{}", images::query_of(args));
    // What is wrong with the name is said before anything is read.
    let _: Value = client.post(&format!("{route}&dry_run=true"), &json!({})).await?;
    let mut made: Vec<DiskView> = client.upload(&route, MIOSA_ARCHIVE, pieces(archive)).await?;
    if made.len() == 1
        && let Some(one) = made.pop()
    {
        return disk::made(out, &one, &format!("miosa disk fork {} --name NAME", one.id));
    }
    let ids: Vec<_> = made.iter().map(|d| d.id.as_str()).collect();
    out.answer(&made, &ids.join("\n"), |_| ids.join("\n"))
}

pub(super) async fn import_snapshot(client: &Client, out: Out, args: SnapshotImportArgs) -> Result<()> {
    let name = args.name.map(|name| format!("?name={}", escape(&name))).unwrap_or_default();
    let archive: Box<dyn Read + Send> = match args.file == Path::new("-") {
        true => Box::new(std::io::stdin()),
        false => {
            let failed =
                |e: std::io::Error| Failure::user("local_file", format!("{} cannot be read: {e}", args.file.display()));
            Box::new(File::open(&args.file).map_err(failed)?)
        }
    };
    out.progress("reading the archive …");
    let made: SnapshotBody =
        client.upload(&format!("/snapshot-archives{name}"), MIOSA_ARCHIVE, pieces(archive)).await?;
    out.answer(&made, &made.id, |out| {
        format!(
            "{} {}\n{}",
            made.id,
            out.strong(made.comment.as_deref().unwrap_or("(unnamed)")),
            out.next_step(&format!("miosa sandbox create --snapshot {} --name NAME --wait", made.id))
        )
    })
}

/// A file as a body, read by a thread of its own.
fn pieces(
    mut file: impl Read + Send + 'static,
) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    let (send, receive) = mpsc::channel::<std::io::Result<Bytes>>(4);
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            let piece = match file.read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => Ok(Bytes::copy_from_slice(&buffer[..read])),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => Err(std::io::Error::new(e.kind(), format!("the archive cannot be read: {e}"))),
            };
            let failed = piece.is_err();
            if send.blocking_send(piece).is_err() || failed {
                return;
            }
        }
    });
    stream::unfold(receive, |mut receive| async move { Some((receive.recv().await?, receive)) })
}
