//! Whole directories, as tar archives, as they come and go: nothing is held but the piece under way.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::{Stream, System, files};
use crate::wire::{AgentError, ErrorKind, Kind, TreeSummary};

/// Sends a directory. What is neither file, directory nor link is left out; a file that changes while it is read has the
/// length it had when its turn came.
pub(super) fn read(system: &dyn System, stream: &Stream, path: &str) -> Result<(), AgentError> {
    let root = system.path(path)?;
    let failed = |at: &Path, e: &io::Error| AgentError::io(at.display(), e);
    if !fs::metadata(&root).map_err(|e| AgentError::io(path, &e))?.is_dir() {
        return Err(AgentError::new(ErrorKind::NotDirectory, format!("{path}: is not a directory")));
    }
    let mut builder = tar::Builder::new(io::BufWriter::with_capacity(64 * 1024, Outgoing(stream)));
    // Relative to the root. Last in, first out, and a directory comes before what is in it.
    let mut open = vec![PathBuf::new()];
    while let Some(inside) = open.pop() {
        let at = root.join(&inside);
        let name = if inside.as_os_str().is_empty() { Path::new(".") } else { &inside };
        // The root may be a link to a directory; below it links stay links.
        let meta = if inside.as_os_str().is_empty() { fs::metadata(&at) } else { fs::symlink_metadata(&at) };
        let meta = match meta {
            // Gone since its directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            meta => meta.map_err(|e| failed(&at, &e))?,
        };
        let mut header = tar::Header::new_gnu();
        header.set_metadata(&meta);
        let sent = if meta.is_dir() {
            let below = fs::read_dir(&at).and_then(|entries| {
                entries.map(|entry| Ok(inside.join(entry?.file_name()))).collect::<io::Result<Vec<_>>>()
            });
            open.extend(below.map_err(|e| failed(&at, &e))?);
            builder.append_data(&mut header, name, io::empty())
        } else if meta.is_symlink() {
            header.set_size(0);
            fs::read_link(&at).and_then(|target| builder.append_link(&mut header, name, target))
        } else if meta.is_file() {
            File::open(&at).and_then(|file| builder.append_data(&mut header, name, Exactly { file, left: meta.len() }))
        } else {
            continue;
        };
        sent.map_err(|e| failed(&at, &e))?;
    }
    let finished = builder.into_inner().and_then(|mut out| out.flush());
    finished.map_err(|e| AgentError::io(path, &e))
}

/// Unpacks into a directory; what is unpacked belongs to the directory's owner. With `delete`, what the archive does not
/// have goes, once all of it has come. It is on the disk when this returns.
pub(super) fn write(system: &dyn System, stream: &Stream, path: &str, delete: bool) -> Result<TreeSummary, AgentError> {
    let root = system.path(path)?;
    let failed = |e: io::Error| AgentError::io(path, &e);
    if fs::symlink_metadata(&root).is_ok() && !root.is_dir() {
        return Err(AgentError::new(ErrorKind::NotDirectory, format!("{path}: is not a directory")));
    }
    files::make_parents(&root).map_err(failed)?;
    let owner = fs::metadata(&root).map(|meta| (meta.uid(), meta.gid())).map_err(failed)?;
    let mut archive = tar::Archive::new(Incoming { stream, rest: Bytes::new() });
    archive.set_preserve_permissions(true);
    let mut summary = TreeSummary::default();
    let mut seen = BTreeSet::new();
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let inside = entry.path().map_err(failed)?.components().as_path().to_path_buf();
        let told = |e: io::Error| AgentError::io(format_args!("{path}/{}", inside.display()), &e);
        if !entry.unpack_in(&root).map_err(told)? {
            let message = format!("{}: an archive's paths must stay inside it", inside.display());
            return Err(AgentError::new(ErrorKind::Invalid, message));
        }
        let at = root.join(&inside);
        std::os::unix::fs::lchown(&at, Some(owner.0), Some(owner.1)).map_err(told)?;
        if entry.header().entry_type().is_file() {
            summary.files += 1;
            summary.bytes += entry.size();
        }
        if delete {
            seen.extend(inside.ancestors().map(Path::to_path_buf));
        }
    }
    if delete {
        summary.removed = remove_others(&root, &seen).map_err(failed)?;
    }
    File::open(&root).and_then(|dir| Ok(nix::unistd::syncfs(&dir)?)).map_err(failed)?;
    Ok(summary)
}

/// Removes what is not in `seen`, whose paths are relative to the root.
fn remove_others(root: &Path, seen: &BTreeSet<PathBuf>) -> io::Result<u64> {
    let mut removed = 0;
    let mut open = vec![PathBuf::new()];
    while let Some(inside) = open.pop() {
        for entry in fs::read_dir(root.join(&inside))? {
            let entry = entry?;
            let below = inside.join(entry.file_name());
            // An archive may say `./a` or `a`.
            let kept = seen.contains(&below) || seen.contains(&Path::new(".").join(&below));
            match (kept, entry.file_type()?.is_dir()) {
                (true, true) => open.push(below),
                (true, false) => {}
                (false, is_dir) => {
                    if is_dir {
                        fs::remove_dir_all(entry.path())?
                    } else {
                        fs::remove_file(entry.path())?
                    }
                    removed += 1;
                }
            }
        }
    }
    Ok(removed)
}

/// What is written goes to the host.
struct Outgoing<'a>(&'a Stream);

impl Write for Outgoing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let cancelled = |_| io::Error::other("cancelled by the host");
        self.0.send(Kind::Data, bytes).map_err(cancelled)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the host sends.
struct Incoming<'a> {
    stream: &'a Stream,
    rest: Bytes,
}

impl Read for Incoming<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.stream.receive_next() {
                Ok(Some(bytes)) => self.rest = bytes,
                Ok(None) => return Ok(0),
                Err(_) => return Err(io::Error::other("cancelled by the host")),
            }
        }
        let len = buffer.len().min(self.rest.len());
        buffer[..len].copy_from_slice(&self.rest.split_to(len));
        Ok(len)
    }
}

/// As many bytes as were promised: zeroes behind the end of a file that has become shorter.
struct Exactly {
    file: File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let len = match self.file.read(&mut buffer[..want])? {
            0 => {
                buffer[..want].fill(0);
                want
            }
            len => len,
        };
        self.left -= len as u64;
        Ok(len)
    }
}
