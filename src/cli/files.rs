//! `miosa sandbox write-file` and `read-file`. Files of any size: nothing is held whole, but for `read-file --json`.

use std::io::Write;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::json;
use tokio::io::AsyncReadExt;

use super::args::{ReadFileArgs, WriteFileArgs};
use super::exec::stdin_pieces;
use super::output::{Failure, Out, Result};
use super::sandbox::path;
use crate::api::client::{BYTES, Client, Download, escape};
use crate::api::types::WrittenBody;
use crate::units::show_bytes;

/// Largest file that one document holds.
const MAX_DOCUMENT: usize = 64 << 20;

pub(super) async fn write(client: &Client, out: Out, args: WriteFileArgs) -> Result<()> {
    check_guest_path(&args.path)?;
    let mode = args.mode.map(|m| format!("&mode={m:o}")).unwrap_or_default();
    let route = path(&args.target.sandbox, &format!("/fs/write?path={}{mode}", escape(&args.path)));
    let content =
        if args.file == Path::new("-") { stdin_pieces().boxed() } else { file_pieces(&args.file).await?.boxed() };
    let written: WrittenBody = client.upload(&route, BYTES, content).await?;
    out.answer(&written, &written.path, |out| {
        let next = format!("miosa sandbox exec {} -- COMMAND", args.target.sandbox);
        format!("wrote {} to {}\n{}", show_bytes(written.size_bytes), written.path, out.next_step(&next))
    })
}

pub(super) async fn read(client: &Client, out: Out, args: ReadFileArgs) -> Result<()> {
    check_guest_path(&args.path)?;
    let mut download =
        client.download(&path(&args.target.sandbox, &format!("/fs/download?path={}", escape(&args.path)))).await?;
    match args.output {
        Some(output) => {
            let size = save(&mut download, &output).await?;
            let answer = json!({ "path": args.path, "size_bytes": size, "output": output });
            out.answer(&answer, &output.display().to_string(), |_| {
                format!("read {} into {}", show_bytes(size), output.display())
            })
        }
        None if out.json => {
            let mut bytes = Vec::new();
            while let Some(piece) = download.next_piece().await? {
                if bytes.len() + piece.len() > MAX_DOCUMENT {
                    return Err(Failure::user("file_too_large", "the file is too large for one JSON document")
                        .hint("write it to a file: --output FILE"));
                }
                bytes.extend_from_slice(&piece);
            }
            let size = bytes.len();
            let answer = match String::from_utf8(bytes) {
                Ok(text) => json!({ "path": args.path, "size_bytes": size, "content": text }),
                Err(e) => {
                    json!({ "path": args.path, "size_bytes": size, "content_base64": BASE64.encode(e.as_bytes()) })
                }
            };
            out.answer(&answer, "", |_| String::new())
        }
        None => {
            let mut stdout = std::io::stdout().lock();
            while let Some(piece) = download.next_piece().await? {
                stdout.write_all(&piece)?;
            }
            Ok(stdout.flush()?)
        }
    }
}

/// Seen here, before anything is read or sent.
pub(super) fn check_guest_path(path: &str) -> Result<()> {
    if path.starts_with('/') {
        return Ok(());
    }
    Err(Failure::user("invalid_input", format!("the guest path {path:?} is not absolute"))
        .hint("start it with /, for example /workspace/app/page.jsx"))
}

/// Permissions of a local file, for the sandbox's; none of what is no file.
pub(super) fn mode_of(path: &Path) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|m| m.permissions().mode() & 0o777)
}

async fn file_pieces(path: &Path) -> Result<impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static> {
    let unreadable = |e: std::io::Error| {
        Failure::user("local_file", format!("the local file {} cannot be read: {e}", path.display()))
    };
    let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
    if file.metadata().await.map_err(unreadable)?.is_dir() {
        return Err(Failure::user("local_file", format!("{} is a directory", path.display())).hint("name one file"));
    }
    Ok(stream::unfold(Some(file), |file| async move {
        let mut file = file?;
        let mut buffer = vec![0; 256 * 1024];
        match file.read(&mut buffer).await {
            Ok(0) => None,
            Ok(n) => {
                buffer.truncate(n);
                Some((Ok(Bytes::from(buffer)), Some(file)))
            }
            Err(error) => Some((Err(error), None)),
        }
    }))
}

/// Writes beside the file and then in its place, so that what breaks off leaves what was there. A device or a pipe is
/// written to directly.
async fn save(download: &mut Download, output: &Path) -> Result<u64> {
    let failed =
        |e: std::io::Error| Failure::user("local_file", format!("{} cannot be written: {e}", output.display()));
    let special = std::fs::metadata(output).is_ok_and(|m| !m.is_file());
    let partial: PathBuf = if special {
        output.to_owned()
    } else {
        let name = output
            .file_name()
            .ok_or_else(|| Failure::user("local_file", format!("{} names no file", output.display())))?;
        output.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()))
    };
    let mut file =
        std::fs::OpenOptions::new().write(true).create(!special).truncate(!special).open(&partial).map_err(failed)?;
    let mut size = 0;
    let copied = async {
        while let Some(piece) = download.next_piece().await? {
            file.write_all(&piece).map_err(failed)?;
            size += piece.len() as u64;
        }
        if !special {
            std::fs::rename(&partial, output).map_err(failed)?;
        }
        Ok(size)
    }
    .await;
    if copied.is_err() && !special {
        let _ = std::fs::remove_file(&partial);
    }
    copied
}
