//! Files of the guest.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Stream, System};
use crate::wire::{self, AgentError, DirEntry, ErrorKind, FileKind, FileStat, Kind};

pub(super) fn stat(system: &dyn System, path: &str) -> Result<FileStat, AgentError> {
    fs::metadata(system.path(path)?).map(|meta| stat_of(&meta)).map_err(|e| AgentError::io(path, &e))
}

fn stat_of(meta: &fs::Metadata) -> FileStat {
    let kind = match meta.file_type() {
        kind if kind.is_file() => FileKind::File,
        kind if kind.is_dir() => FileKind::Directory,
        kind if kind.is_symlink() => FileKind::Symlink,
        _ => FileKind::Other,
    };
    FileStat {
        kind,
        size: meta.len(),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime_nanos: meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()),
    }
}

/// Sends the entries of a directory, sorted. Those that go away meanwhile are left out.
pub(super) fn list(system: &dyn System, stream: &Stream, path: &str) -> Result<(), AgentError> {
    let failed = |e: std::io::Error| AgentError::io(path, &e);
    let mut entries: Vec<_> =
        fs::read_dir(system.path(path)?).and_then(|entries| entries.collect::<Result<_, _>>()).map_err(failed)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut batch = Vec::new();
    for entry in entries {
        let Ok(meta) = entry.metadata() else { continue };
        let entry = DirEntry { name: entry.file_name().to_string_lossy().into_owned(), stat: stat_of(&meta) };
        let bytes = postcard::to_stdvec(&entry).map_err(|e| AgentError::new(ErrorKind::Io, e.to_string()))?;
        batch.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        batch.extend_from_slice(&bytes);
        if batch.len() >= wire::MAX_PAYLOAD / 2 {
            stream.send(Kind::Data, &batch)?;
            batch.clear();
        }
    }
    Ok(stream.send(Kind::Data, &batch)?)
}

pub(super) fn make_dir(system: &dyn System, path: &str, mode: Option<u32>) -> Result<(), AgentError> {
    let failed = |e: std::io::Error| AgentError::io(path, &e);
    let dir = system.path(path)?;
    if dir.is_dir() {
        return Ok(());
    }
    make_parents(&dir).map_err(failed)?;
    let mode = fs::Permissions::from_mode(mode.unwrap_or(0o755) & 0o7777);
    fs::set_permissions(&dir, mode).map_err(failed)
}

pub(super) fn remove(system: &dyn System, path: &str, recursive: bool) -> Result<(), AgentError> {
    let target = system.path(path)?;
    let removed = fs::symlink_metadata(&target).and_then(|meta| match (meta.is_dir(), recursive) {
        (false, _) => fs::remove_file(&target),
        (true, false) => fs::remove_dir(&target),
        (true, true) => fs::remove_dir_all(&target),
    });
    removed.map_err(|e| AgentError::io(path, &e))
}

pub(super) fn rename(system: &dyn System, from: &str, to: &str) -> Result<(), AgentError> {
    let (source, target) = (system.path(from)?, system.path(to)?);
    // Which of the two an error is about, the kernel does not say.
    fs::symlink_metadata(&source).map_err(|e| AgentError::io(from, &e))?;
    let failed = |e: std::io::Error| AgentError::io(format_args!("{from} to {to}"), &e);
    if let Some(parent) = target.parent() {
        make_parents(parent).map_err(failed)?;
    }
    fs::rename(&source, &target).map_err(failed)
}

pub(super) fn read(
    system: &dyn System,
    stream: &Stream,
    path: &str,
    offset: u64,
    len: Option<u64>,
) -> Result<(), AgentError> {
    let failed = |e: std::io::Error| AgentError::io(path, &e);
    // Without O_NONBLOCK opening a pipe would wait for its other end.
    let mut options = OpenOptions::new();
    let mut file = options.read(true).custom_flags(libc::O_NONBLOCK).open(system.path(path)?).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if kind.is_dir() {
        return Err(AgentError::new(ErrorKind::IsDirectory, format!("{path}: is a directory")));
    }
    if !kind.is_file() {
        return Err(AgentError::new(ErrorKind::Invalid, format!("{path}: is not a regular file")));
    }
    if offset > 0 {
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    }
    let mut file = file.take(len.unwrap_or(u64::MAX));
    let mut bytes = vec![0; wire::MAX_PAYLOAD];
    loop {
        match file.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(len) => stream.send(Kind::Data, &bytes[..len])?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Writes the stream's data beside `path` and then puts it in its place:
/// 1. a new file in the same directory gets the data, mode and owner, and is synced: a crash leaves the old file, and
///    the new one under another name;
/// 2. the rename puts it in place: a crash leaves the old file or the new one, whole;
/// 3. the directory is synced: the new file stays.
pub(super) fn write(
    system: &dyn System,
    stream: &Stream,
    path: &str,
    mode: Option<u32>,
    owner: Option<(u32, u32)>,
) -> Result<(), AgentError> {
    let failed = |e: std::io::Error| AgentError::io(path, &e);
    let mut target = system.path(path)?;
    // A link's target is replaced, not the link.
    if target.is_symlink()
        && let Ok(real) = fs::canonicalize(&target)
    {
        target = real;
    }
    let old = match fs::metadata(&target) {
        Ok(meta) if meta.is_dir() => {
            return Err(AgentError::new(ErrorKind::IsDirectory, format!("{path}: is a directory")));
        }
        Ok(meta) if !meta.is_file() => {
            return Err(AgentError::new(ErrorKind::Invalid, format!("{path}: is not a regular file")));
        }
        Ok(meta) => Some(meta),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(error)),
    };
    if path.ends_with('/') {
        return Err(AgentError::new(ErrorKind::Invalid, format!("{path}: a file's path cannot end with a slash")));
    }
    let Some(parent) = target.parent().map(Path::to_path_buf) else {
        return Err(AgentError::new(ErrorKind::Invalid, format!("{path}: is not a file's path")));
    };
    make_parents(&parent).map_err(failed)?;
    let owner = match (owner, &old) {
        (Some(owner), _) => owner,
        (None, Some(meta)) => (meta.uid(), meta.gid()),
        (None, None) => fs::metadata(&parent).map(|meta| (meta.uid(), meta.gid())).map_err(failed)?,
    };
    let mode = mode.or(old.map(|meta| meta.mode())).unwrap_or(0o644) & 0o7777;

    let temporary = Temporary::beside(&target).map_err(failed)?;
    let mut file = &temporary.file;
    while let Some(bytes) = stream.receive_next()? {
        file.write_all(&bytes).map_err(failed)?;
    }
    // The owner first: a change of owner clears the set-user-id bit.
    std::os::unix::fs::fchown(file, Some(owner.0), Some(owner.1)).map_err(failed)?;
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    temporary.put_at(&target).map_err(failed)?;
    File::open(&parent).and_then(|dir| dir.sync_all()).map_err(failed)
}

/// Makes missing directories; each belongs to the owner of the one above.
pub(super) fn make_parents(dir: &Path) -> std::io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let Some(parent) = dir.parent() else { return Ok(()) };
    make_parents(parent)?;
    match fs::create_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => return Ok(()),
        // A file in the way.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(std::io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        result => result?,
    }
    let above = fs::metadata(parent)?;
    std::os::unix::fs::chown(dir, Some(above.uid()), Some(above.gid()))
}

/// A file that goes away unless it was put somewhere.
pub(super) struct Temporary {
    pub(super) file: File,
    path: PathBuf,
    placed: bool,
}

impl Temporary {
    pub(super) fn beside(target: &Path) -> std::io::Result<Temporary> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = target.with_file_name(format!(".miosa-{}-{number}.tmp", std::process::id()));
            let mut options = OpenOptions::new();
            match options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&path) {
                Ok(file) => return Ok(Temporary { file, path, placed: false }),
                // One that a crash left behind.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) fn put_at(mut self, target: &Path) -> std::io::Result<()> {
        fs::rename(&self.path, target)?;
        self.placed = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.placed {
            let _ = fs::remove_file(&self.path);
        }
    }
}
