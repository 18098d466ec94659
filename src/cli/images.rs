//! Images in and out of files and pipes: what is zero is neither sent nor written, and nothing is held whole.

use std::fs::File;
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::args::{ImageFormat, ImportArgs};
use super::disk;
use super::output::{Failure, Out, Result};
use crate::api::client::{Client, Download, escape};
use crate::api::types::ErrorBody;
use crate::disks::DiskView;
use crate::disks::frames::{self, Decoder, Part};
use crate::sparse::{BLOCK, data_runs, next_data};
use crate::units::show_bytes;

/// Bytes read at a time.
const PIECE: usize = 1 << 20;

/// An image that can be read, of known size.
pub(super) struct Image {
    file: File,
    shown: String,
    size: u64,
}

impl Image {
    /// Opens what is to be imported; a pipe and a qcow2 image become a raw file first.
    pub(super) async fn open(args: &ImportArgs, out: Out) -> Result<Image> {
        let (args, path) = (args.format, args.file.clone());
        let done = tokio::task::spawn_blocking(move || Self::open_blocking(args, &path, out)).await;
        done.map_err(|e| Failure::new(4, "internal_error", format!("reading the image did not end: {e}")))?
    }

    /// The file, if it is to be read as an archive: one that begins like an archive, or that is said to be one.
    pub(super) fn archive(&self, format: ImageFormat) -> Result<Option<File>> {
        let mut begin = [0; 8];
        let is_archive = match format {
            ImageFormat::Archive => true,
            ImageFormat::Raw => self.file.read_exact_at(&mut begin, 0).is_ok() && &begin == storage::ARCHIVE_MAGIC,
            ImageFormat::Qcow2 => false,
        };
        let failed = |e: std::io::Error| unreadable(&self.shown, &e);
        if !is_archive {
            return Ok(None);
        }
        let mut file = self.file.try_clone().map_err(failed)?;
        if format == ImageFormat::Raw {
            file.rewind().map_err(failed)?;
        }
        Ok(Some(file))
    }

    fn open_blocking(format: ImageFormat, path: &Path, out: Out) -> Result<Image> {
        let shown = if path == Path::new("-") { "stdin".to_owned() } else { path.display().to_string() };
        let failed = |e: std::io::Error| unreadable(&shown, &e);
        let mut file = match (format, path == Path::new("-")) {
            (ImageFormat::Raw | ImageFormat::Archive, false) => File::open(path).map_err(failed)?,
            (ImageFormat::Raw | ImageFormat::Archive, true) => {
                // Not through the buffer of `stdin`.
                let stdin = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned().map_err(failed)?;
                File::from(stdin)
            }
            (ImageFormat::Qcow2, true) => {
                return Err(Failure::user("invalid_input", "a qcow2 image cannot be read from a pipe")
                    .hint("save it to a file first"));
            }
            (ImageFormat::Qcow2, false) => {
                // For the same words about a file that is not there, or not ours.
                File::open(path).map_err(failed)?;
                convert(path, out)?
            }
        };
        let kind = file.metadata().map_err(failed)?.file_type();
        if format == ImageFormat::Archive {
            return Ok(Image { file, shown, size: 0 });
        }
        if kind.is_fifo() || kind.is_socket() || (kind.is_char_device() && path == Path::new("-")) {
            out.progress("the image's size is not known: keeping it in a temporary file first …");
            file = spool(file).map_err(failed)?;
        } else if !kind.is_file() && !kind.is_block_device() {
            return Err(Failure::user("local_file", format!("{shown} is neither a file nor a block device"))
                .hint("name a raw image, or - for stdin"));
        }
        // A device's size is where it ends.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 {
            return Err(Failure::user("invalid_input", format!("{shown} is empty: a disk has at least 4096 bytes"))
                .hint("for an empty disk: miosa disk create NAME --size SIZE"));
        }
        Ok(Image { file, shown, size })
    }
}

fn unreadable(what: &str, error: &std::io::Error) -> Failure {
    Failure::user("local_file", format!("{what} cannot be read: {error}")).hint("name a raw image that you can read")
}

/// Keeps a pipe's content in a file without a name.
fn spool(mut pipe: File) -> std::io::Result<File> {
    let mut file = nameless()?;
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    loop {
        // Pipes give little at a time; whole blocks are needed to see which are zero.
        let mut have = 0;
        while have < buffer.len() {
            match pipe.read(&mut buffer[have..]) {
                Ok(0) => break,
                Ok(n) => have += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if have == 0 {
            file.set_len(at)?;
            file.rewind()?;
            return Ok(file);
        }
        for run in data_runs(&buffer[..have]) {
            file.write_all_at(&buffer[run.clone()], at + run.start as u64)?;
        }
        at += have as u64;
    }
}

/// A file that goes with its last handle.
fn nameless() -> std::io::Result<File> {
    let path = std::env::temp_dir().join(format!("miosa-import-{}", std::process::id()));
    let file = private_file(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

fn private_file(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Makes a raw file of a qcow2 image.
fn convert(path: &Path, out: Out) -> Result<File> {
    out.progress("converting …");
    // Nobody else can look into it, or put something else in its place.
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    let dir = tempfile::Builder::new().prefix("miosa-convert-").permissions(private).tempdir();
    let dir = dir.map_err(|e| unreadable("a directory for temporary files", &e))?;
    let raw = dir.path().join("raw");
    let converted = vmm::image::convert_qcow2(path, &raw).map_err(|e| {
        let code = if e.kind == vmm::ErrorKind::ToolMissing { "qemu_img_missing" } else { "invalid_image" };
        let failure = Failure::user(code, e.message);
        match e.hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    });
    converted.and_then(|()| File::open(&raw).map_err(|e| unreadable(&raw.display().to_string(), &e)))
}

/// Sends an image, and prints the disk it became.
pub(super) async fn import(client: &Client, out: Out, args: &ImportArgs, image: Image) -> Result<()> {
    let size = image.size.next_multiple_of(BLOCK as u64);
    let padded = size - image.size;
    let route = format!("/disk-imports?{}&size_bytes={size}", query_of(args));
    // What is wrong with the name or the size is said before anything is read.
    let _: Value = client.post(&format!("{route}&dry_run=true"), &json!({})).await?;
    if padded > 0 {
        out.progress(&format!(
            "note: {} bytes are no multiple of 4096; the disk has {size}, the last {padded} of them zero",
            image.size
        ));
    }
    let done = Arc::new(AtomicU64::new(0));
    let progress = Progress::start(out, "imported", image.size, done.clone());
    let made = client.upload::<DiskView>(&route, frames::CONTENT_TYPE, pieces(image, size, done)).await;
    progress.end();
    let view = made?;
    let mut document = serde_json::to_value(&view)
        .map_err(|e| Failure::new(4, "internal_error", format!("the answer cannot be shown: {e}")))?;
    document["padded_bytes"] = padded.into();
    out.answer(&document, &view.id, |out| {
        let next = out.next_step(&format!("miosa disk fork {} --name NAME", view.id));
        let (data, size) = (show_bytes(view.logical_bytes), show_bytes(view.size_bytes));
        format!("{} {} has {size}, of which {data} are not zero\n{next}", view.id, out.strong(&view.name))
    })
}

/// What an import is asked for with.
pub(super) fn query_of(args: &ImportArgs) -> String {
    let domain = args.dedup_domain.as_deref().map(|domain| format!("&dedup_domain={}", escape(domain)));
    format!("name={}{}", escape(&args.name), domain.unwrap_or_default())
}

/// The image as a sparse stream, read by a thread of its own.
fn pieces(
    image: Image,
    size: u64,
    done: Arc<AtomicU64>,
) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    let (send, receive) = mpsc::channel::<std::io::Result<Bytes>>(8);
    std::thread::spawn(move || {
        let sent = read_image(&image, size, &done, &mut |piece| send.blocking_send(Ok(piece)).is_ok());
        if let Err(e) = sent {
            let _ =
                send.blocking_send(Err(std::io::Error::new(e.kind(), format!("{} cannot be read: {e}", image.shown))));
        }
    });
    stream::unfold(receive, |mut receive| async move { Some((receive.recv().await?, receive)) })
}

fn read_image(image: &Image, size: u64, done: &AtomicU64, send: &mut dyn FnMut(Bytes) -> bool) -> std::io::Result<()> {
    if !send(frames::begin(size)) {
        return Ok(());
    }
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < image.size {
        at = next_data(&image.file, at, image.size);
        let len = PIECE.min((image.size - at) as usize);
        image.file.read_exact_at(&mut buffer[..len], at)?;
        for run in data_runs(&buffer[..len]) {
            if !send(frames::data(at + run.start as u64, &buffer[run])) {
                // Nobody wants it any more; the answer says why.
                return Ok(());
            }
        }
        at += len as u64;
        done.store(at, Ordering::Relaxed);
    }
    send(frames::end(size));
    Ok(())
}

/// Writes a disk or snapshot to a file, a device or stdout.
pub(super) async fn export(client: &Client, out: Out, key: &str, file: &Path) -> Result<()> {
    let to_stdout = file == Path::new("-");
    if to_stdout && out.json {
        return Err(Failure::user("usage", "stdout cannot have both the image and a JSON document")
            .hint("leave out --json, or name a file"));
    }
    if to_stdout && std::io::stdout().is_terminal() {
        return Err(Failure::user("usage", "an image is nothing for a terminal").hint("name a file, or pipe it on"));
    }
    if file.is_dir() {
        return Err(Failure::user("local_file", format!("{} is a directory", file.display())).hint("name a file"));
    }
    let mut download = client.download(&disk::path(key, "/export")).await?;
    let (size, data) = if to_stdout {
        receive(&mut download, out, &mut InOrder { to: std::io::stdout().lock(), at: 0 }).await?
    } else {
        save(&mut download, out, file).await?
    };
    if to_stdout {
        return Ok(());
    }
    let answer = json!({ "disk": key, "file": file, "size_bytes": size, "data_bytes": data });
    out.answer(&answer, &file.display().to_string(), |_| {
        format!("wrote {} to {}, of which {} are not zero", show_bytes(size), file.display(), show_bytes(data))
    })
}

/// Where an image goes.
trait Sink {
    /// What is not written is zero, up to `size` bytes.
    fn begin(&mut self, _size: u64) -> std::io::Result<()> {
        Ok(())
    }
    fn data(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()>;
    fn end(&mut self, size: u64) -> std::io::Result<()>;
}

/// A new file, which gets holes.
struct Sparse(File);

impl Sink for Sparse {
    fn begin(&mut self, size: u64) -> std::io::Result<()> {
        self.0.set_len(size)
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn end(&mut self, _: u64) -> std::io::Result<()> {
        self.0.sync_all()
    }
}

/// A pipe or a device, which gets every byte.
struct InOrder<W> {
    to: W,
    at: u64,
}

impl<W: Write> InOrder<W> {
    fn zeroes(&mut self, upto: u64) -> std::io::Result<()> {
        static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
        while self.at < upto {
            let len = (upto - self.at).min(ZEROES.len() as u64);
            self.to.write_all(&ZEROES[..len as usize])?;
            self.at += len;
        }
        Ok(())
    }
}

impl<W: Write> Sink for InOrder<W> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.zeroes(offset)?;
        self.to.write_all(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn end(&mut self, size: u64) -> std::io::Result<()> {
        self.zeroes(size)?;
        self.to.flush()
    }
}

/// Writes beside the file and then in its place, so that what breaks off leaves what was there.
async fn save(download: &mut Download, out: Out, file: &Path) -> Result<(u64, u64)> {
    let failed = |e: std::io::Error| unwritable(file, &e);
    if std::fs::metadata(file).is_ok_and(|m| !m.is_file()) {
        let to = File::options().write(true).open(file).map_err(failed)?;
        return receive(download, out, &mut InOrder { to, at: 0 }).await.map_err(|e| e.about(file));
    }
    let name =
        file.file_name().ok_or_else(|| Failure::user("local_file", format!("{} names no file", file.display())))?;
    let partial: PathBuf = file.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()));
    let made = File::options().write(true).create(true).truncate(true).open(&partial).map_err(failed)?;
    let received = receive(download, out, &mut Sparse(made)).await.map_err(|e| e.about(file));
    let saved = received.and_then(|sizes| {
        std::fs::rename(&partial, file).map_err(failed)?;
        Ok(sizes)
    });
    if saved.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    saved
}

fn unwritable(file: &Path, error: &std::io::Error) -> Failure {
    Failure::user("local_file", format!("{} cannot be written: {error}", file.display()))
}

/// Why nothing was received: the other side's reason, or ours.
enum Trouble {
    Told(Failure),
    Write(std::io::Error),
}

impl Trouble {
    fn about(self, file: &Path) -> Failure {
        match self {
            Trouble::Told(failure) => failure,
            Trouble::Write(error) => unwritable(file, &error),
        }
    }
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Told(failure) => failure,
            Trouble::Write(error) => error.into(),
        }
    }
}

/// Takes a sparse stream; the size of the image, and of what is not zero in it.
async fn receive(download: &mut Download, out: Out, sink: &mut dyn Sink) -> std::result::Result<(u64, u64), Trouble> {
    let broken =
        |why: String| Trouble::Told(Failure::new(2, "connection_broken", format!("the export broke off: {why}")));
    let mut decoder = Decoder::default();
    let (mut size, mut data) = (0, 0);
    let done = Arc::new(AtomicU64::new(0));
    let mut progress = None;
    while let Some(piece) = download.next_piece().await.map_err(|e| Trouble::Told(e.into()))? {
        decoder.push(&piece);
        while let Some(part) = decoder.next_part().map_err(broken)? {
            match part {
                Part::Size(told) => {
                    size = told;
                    sink.begin(size).map_err(Trouble::Write)?;
                    progress = Some(Progress::start(out, "exported", size, done.clone()));
                }
                Part::Data(offset, bytes) => {
                    sink.data(offset, &bytes).map_err(Trouble::Write)?;
                    data += bytes.len() as u64;
                    done.store(offset + bytes.len() as u64, Ordering::Relaxed);
                }
                Part::Error(why) => {
                    let why: Value = serde_json::from_slice(&why).unwrap_or_default();
                    let status = why["status"].as_u64().and_then(|s| u16::try_from(s).ok()).unwrap_or(500);
                    let body: ErrorBody = serde_json::from_value(why["error"].clone()).unwrap_or_default();
                    return Err(Trouble::Told(Failure::refused(status, body)));
                }
                Part::End => sink.end(size).map_err(Trouble::Write)?,
            }
        }
    }
    if let Some(progress) = progress {
        progress.end();
    }
    if decoder.ended() { Ok((size, data)) } else { Err(broken("its end is missing".to_owned())) }
}

/// Tells how far it is, on stderr: a line that changes on a terminal, elsewhere now and then a line.
struct Progress(Option<tokio::task::JoinHandle<()>>, bool);

impl Progress {
    fn start(out: Out, verb: &'static str, size: u64, done: Arc<AtomicU64>) -> Self {
        let terminal = std::io::stderr().is_terminal();
        if out.json || out.quiet {
            return Self(None, false);
        }
        let (every, began) = (Duration::from_millis(if terminal { 200 } else { 5_000 }), Instant::now());
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                let at = done.load(Ordering::Relaxed);
                let percent = at as f64 * 100.0 / size.max(1) as f64;
                let rate = show_bytes((at as f64 / began.elapsed().as_secs_f64()) as u64);
                let (before, after) = if terminal { ("\r", "\x1b[K") } else { ("", "\n") };
                // Nobody there to read it is no reason to stop.
                let _ = write!(
                    std::io::stderr(),
                    "{before}{verb} {} of {} ({percent:.0} %, {rate}/s){after}",
                    show_bytes(at),
                    show_bytes(size)
                );
            }
        });
        Self(Some(task), terminal)
    }

    fn end(self) {}
}

impl Drop for Progress {
    fn drop(&mut self) {
        let Some(task) = self.0.take() else { return };
        task.abort();
        if self.1 {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
