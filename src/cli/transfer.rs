//! `miosa sandbox cp`, `upload`, `upload-dir` and `download`: files and directories both ways, of any size.
//!
//! A directory travels as a tar archive that is made and unpacked as it goes; nothing is held whole.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::stream;
use tokio::sync::mpsc;

use super::args::{CpArgs, DownloadArgs, ReadFileArgs, Target, UploadArgs, UploadDirArgs, WriteFileArgs};
use super::files;
use super::output::{Failure, Out, Result};
use super::sandbox::path;
use crate::api::client::{BYTES, Client, Download, escape};
use crate::api::types::{FileBody, TreeBody};
use crate::units::show_bytes;

/// Where files go unless said otherwise.
const WORKSPACE: &str = "/workspace";
/// Bytes between two reports of progress.
const REPORT: u64 = 64 << 20;

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Local(PathBuf),
    Guest { sandbox: String, path: String },
}

impl Place {
    /// `SANDBOX:/path` is in a sandbox, all else is here; `./a:/b` is a way to name a local file like that.
    fn parse(text: &str) -> Place {
        match text.split_once(":/") {
            Some((sandbox, path)) if !sandbox.is_empty() && !sandbox.contains('/') => {
                Place::Guest { sandbox: sandbox.to_owned(), path: format!("/{path}") }
            }
            _ => Place::Local(PathBuf::from(text)),
        }
    }
}

pub(super) async fn cp(client: &Client, out: Out, args: CpArgs) -> Result<()> {
    match (Place::parse(&args.from), Place::parse(&args.to)) {
        (Place::Local(from), Place::Guest { sandbox, path: to }) => {
            let to = inside_if_directory(client, &sandbox, &to, &from).await?;
            put(client, out, &sandbox, &from, &to, args.recursive, false).await
        }
        (Place::Guest { sandbox, path: from }, Place::Local(to)) => {
            let to = if to.is_dir() { to.join(last_part(&from)) } else { to };
            fetch(client, out, &sandbox, &from, &to, args.recursive).await
        }
        (Place::Local(_), Place::Local(_)) => Err(Failure::user("invalid_input", "neither side is in a sandbox")
            .hint("name one side SANDBOX:/path, for example: miosa sandbox cp file.txt my-sandbox:/workspace/")),
        (Place::Guest { .. }, Place::Guest { .. }) => {
            Err(Failure::user("invalid_input", "both sides are in sandboxes").hint("copy to a local file in between"))
        }
    }
}

pub(super) async fn upload(client: &Client, out: Out, args: UploadArgs) -> Result<()> {
    let sandbox = &args.target.sandbox;
    let to = args.path.unwrap_or_else(|| format!("{WORKSPACE}/"));
    let to = inside_if_directory(client, sandbox, &to, &args.file).await?;
    put(client, out, sandbox, &args.file, &to, false, false).await
}

pub(super) async fn upload_dir(client: &Client, out: Out, args: UploadDirArgs) -> Result<()> {
    let to = args.path.as_deref().unwrap_or(WORKSPACE);
    if !args.dir.is_dir() {
        return Err(Failure::user("local_file", format!("{} is not a directory", args.dir.display()))
            .hint("for one file: miosa sandbox upload SANDBOX FILE"));
    }
    put(client, out, &args.target.sandbox, &args.dir, to, true, args.delete).await
}

pub(super) async fn download(client: &Client, out: Out, args: DownloadArgs) -> Result<()> {
    let to = args.output.unwrap_or_else(|| PathBuf::from(last_part(&args.path)));
    let to = if to.is_dir() { to.join(last_part(&args.path)) } else { to };
    fetch(client, out, &args.target.sandbox, &args.path, &to, true).await
}

fn last_part(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().filter(|part| !part.is_empty()).unwrap_or("root")
}

async fn stat(client: &Client, sandbox: &str, at: &str) -> Result<Option<FileBody>> {
    files::check_guest_path(at)?;
    let answer: std::result::Result<FileBody, Failure> =
        client.get(&path(sandbox, &format!("/fs/stat?path={}", escape(at)))).await.map_err(Failure::from);
    match answer {
        Ok(file) => Ok(Some(file)),
        Err(failure) if failure.code() == "file_not_found" => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// As `cp` has it: into a directory that is there, else by the name given.
async fn inside_if_directory(client: &Client, sandbox: &str, to: &str, from: &Path) -> Result<String> {
    let is_dir = to.ends_with('/') || stat(client, sandbox, to).await?.is_some_and(|file| file.kind == "directory");
    if !is_dir {
        return Ok(to.to_owned());
    }
    let from = from.canonicalize().unwrap_or_else(|_| from.to_owned());
    let name = from.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(format!("{}/{name}", to.trim_end_matches('/')))
}

async fn put(
    client: &Client,
    out: Out,
    sandbox: &str,
    from: &Path,
    to: &str,
    recursive: bool,
    delete: bool,
) -> Result<()> {
    files::check_guest_path(to)?;
    if !from.is_dir() {
        let target = Target { sandbox: sandbox.to_owned() };
        let args = WriteFileArgs { target, path: to.to_owned(), file: from.to_owned(), mode: files::mode_of(from) };
        return files::write(client, out, args).await;
    }
    if !recursive {
        return Err(Failure::user("local_file", format!("{} is a directory", from.display())).hint("add -r"));
    }
    let route = path(sandbox, &format!("/fs/archive?path={}&delete={delete}", escape(to)));
    let done: TreeBody = client.upload(&route, BYTES, archive(from.to_owned(), out)).await?;
    out.answer(&done, &done.path, |out| {
        let removed = if delete { format!(", removed {}", done.removed) } else { String::new() };
        format!(
            "wrote {} files, {} to {}{removed}\n{}",
            done.files,
            show_bytes(done.size_bytes),
            done.path,
            out.next_step(&format!("miosa sandbox exec {sandbox} -- COMMAND"))
        )
    })
}

async fn fetch(client: &Client, out: Out, sandbox: &str, from: &str, to: &Path, recursive: bool) -> Result<()> {
    files::check_guest_path(from)?;
    let is_dir = stat(client, sandbox, from).await?.is_some_and(|file| file.kind == "directory");
    if !is_dir {
        let target = Target { sandbox: sandbox.to_owned() };
        let args = ReadFileArgs { target, path: from.to_owned(), output: Some(to.to_owned()) };
        return files::read(client, out, args).await;
    }
    if !recursive {
        return Err(Failure::user("file_error", format!("{from} is a directory in the sandbox")).hint("add -r"));
    }
    let content = client.download(&path(sandbox, &format!("/fs/archive?path={}", escape(from)))).await?;
    let (files, size) = unpack(content, to, out).await?;
    let answer = serde_json::json!({ "path": from, "output": to, "files": files, "size_bytes": size });
    out.answer(&answer, &to.display().to_string(), |_| {
        format!("read {files} files, {} into {}", show_bytes(size), to.display())
    })
}

/// A pipe's end that a thread writes to, and what it says of its progress.
struct Pipe {
    send: mpsc::Sender<std::io::Result<Bytes>>,
    out: Out,
    sent: u64,
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let gone = |_| std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        self.send.blocking_send(Ok(Bytes::copy_from_slice(bytes))).map_err(gone)?;
        let before = self.sent / REPORT;
        self.sent += bytes.len() as u64;
        if self.sent / REPORT > before {
            self.out.progress(&format!("sent {}", show_bytes(self.sent)));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A local directory as an archive, made by a thread as it is sent.
fn archive(dir: PathBuf, out: Out) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    let (send, receive) = mpsc::channel(4);
    std::thread::spawn(move || {
        let failed = send.clone();
        let pipe = std::io::BufWriter::with_capacity(256 * 1024, Pipe { send, out, sent: 0 });
        let mut builder = tar::Builder::new(pipe);
        builder.follow_symlinks(false);
        let made = builder.append_dir_all(".", &dir).and_then(|()| builder.into_inner()).and_then(|mut p| p.flush());
        if let Err(error) = made {
            let error = std::io::Error::new(error.kind(), format!("{}: {error}", dir.display()));
            // Nobody to tell it when the other side has gone.
            let _ = failed.blocking_send(Err(error));
        }
    });
    stream::unfold(receive, |mut receive| async move { Some((receive.recv().await?, receive)) })
}

/// What comes, as a thread reads it.
struct Incoming {
    receive: mpsc::Receiver<Bytes>,
    rest: Bytes,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.rest.is_empty() {
            match self.receive.blocking_recv() {
                Some(bytes) => self.rest = bytes,
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.rest.len());
        buffer[..len].copy_from_slice(&self.rest.split_to(len));
        Ok(len)
    }
}

/// Unpacks an archive that a guest made; says how many files and bytes. Nothing is written outside of `target`.
fn lay_down(archive: impl Read, target: &Path) -> std::io::Result<(u64, u64)> {
    std::fs::create_dir_all(target)?;
    let mut archive = tar::Archive::new(archive);
    let (mut files, mut size) = (0, 0);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if !entry.unpack_in(target)? {
            return Err(std::io::Error::other("the sandbox sent a path that leaves the directory"));
        }
        if entry.header().entry_type().is_file() {
            files += 1;
            size += entry.size();
        }
    }
    Ok((files, size))
}

/// Unpacks an archive as it comes; says how many files and bytes. Nothing is written outside of `to`.
async fn unpack(mut content: Download, to: &Path, out: Out) -> Result<(u64, u64)> {
    let (send, receive) = mpsc::channel::<Bytes>(4);
    let target = to.to_owned();
    let unpacking = tokio::task::spawn_blocking(move || lay_down(Incoming { receive, rest: Bytes::new() }, &target));
    let mut received = 0;
    while let Some(piece) = content.next_piece().await? {
        let before = received / REPORT;
        received += piece.len() as u64;
        if received / REPORT > before {
            out.progress(&format!("received {}", show_bytes(received)));
        }
        if send.send(piece).await.is_err() {
            break;
        }
    }
    drop(send);
    let unpacked = unpacking.await.map_err(|e| Failure::new(4, "internal_error", e.to_string()))?;
    unpacked.map_err(|e| Failure::user("local_file", format!("{} cannot be written: {e}", to.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of entries as a guest that lies would write them: kind, name, link or content.
    fn archive_of(entries: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (kind, name, with) in entries {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            header.set_mtime(1);
            let content = if kind.is_file() { with.as_bytes() } else { b"" };
            if !kind.is_file() {
                header.as_old_mut().linkname[..with.len()].copy_from_slice(with.as_bytes());
            }
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn a_guest_writes_nothing_outside_of_the_directory_that_was_asked_for() {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt};
        use tar::EntryType::{Block, Char, Directory, Fifo, Link, Regular, Symlink};
        let ground = tempfile::tempdir().unwrap();
        let outside = ground.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("canary"), "untouched").unwrap();
        let canary = outside.join("canary").to_str().unwrap().to_owned();
        let dir = outside.to_str().unwrap().to_owned();
        let mut payloads: Vec<Vec<(tar::EntryType, &str, &str)>> = Vec::new();
        let names = [
            &*canary,
            "..",
            "../escaped",
            "../outside/canary",
            "a/../../escaped",
            "a/../../outside/canary",
            "./../escaped",
            "../../escaped",
            "//escaped",
            "/",
            ".",
            "a/..",
            "../outside",
            "../outside/new",
        ];
        for name in names {
            for kind in [Regular, Directory, Symlink, Link, Char, Block, Fifo] {
                payloads.push(vec![(kind, name, "x")]);
            }
            payloads.push(vec![(Link, "x", name), (Regular, "x", "changed")]);
            payloads.push(vec![(Symlink, "x", name), (Regular, "x", "changed")]);
            payloads.push(vec![(Symlink, "x", name), (Link, "y", "x"), (Regular, "y", "changed")]);
        }
        for target in [&*dir, "..", "../outside", "../..", "/", "/tmp", "."] {
            payloads.push(vec![(Symlink, "a", target), (Regular, "a/escaped", "x")]);
            payloads.push(vec![(Symlink, "a", target), (Regular, "a/canary", "changed")]);
            payloads.push(vec![(Symlink, "a", target), (Directory, "a/escaped", "")]);
            payloads.push(vec![(Symlink, "a", target), (Link, "b", "a/canary"), (Regular, "b", "changed")]);
            payloads.push(vec![(Symlink, "a", target), (Symlink, "b", "a/.."), (Regular, "b/escaped", "x")]);
            payloads.push(vec![(Directory, "a", ""), (Symlink, "a", target), (Regular, "a/escaped", "x")]);
        }
        for (number, payload) in payloads.iter().enumerate() {
            let target = ground.path().join(format!("target-{number}"));
            let _ = lay_down(&*archive_of(payload), &target);
            let list = |dir: &Path| std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
            assert_eq!(list(&outside), ["canary"], "{payload:?}");
            assert_eq!(std::fs::read(outside.join("canary")).unwrap(), b"untouched", "{payload:?}");
            assert_eq!(list(ground.path()).len(), 2, "{payload:?}: {:?}", list(ground.path()));
            assert!(!Path::new("/tmp/escaped").exists() && !Path::new("/escaped").exists(), "{payload:?}");
            for entry in std::fs::read_dir(&target).unwrap().flatten() {
                let meta = std::fs::symlink_metadata(entry.path()).unwrap();
                let kind = meta.file_type();
                assert!(!kind.is_char_device() && !kind.is_block_device(), "{payload:?} made a device");
                assert!(
                    kind.is_symlink() || meta.permissions().mode() & 0o6000 == 0,
                    "{payload:?} made a program of root's"
                );
            }
            std::fs::remove_dir_all(&target).unwrap();
        }
        assert!(payloads.len() > 150, "{}", payloads.len());
    }

    #[test]
    fn places_are_told_apart() {
        let guest = |sandbox: &str, path: &str| Place::Guest { sandbox: sandbox.into(), path: path.into() };
        assert_eq!(Place::parse("sb-1:/workspace/a:/b"), guest("sb-1", "/workspace/a:/b"));
        assert_eq!(Place::parse("my box:/"), guest("my box", "/"));
        for local in ["file", "./a:/b", "/a:/b", "a:b", ":/x", "-"] {
            assert_eq!(Place::parse(local), Place::Local(local.into()));
        }
        assert_eq!((last_part("/a/b/"), last_part("/")), ("b", "root"));
    }
}
