//! Kernel and initramfs, as machines are handed them: each a file in memory that nobody can change, one for all machines.
//!
//! A machine's user may not be able to read the files, nor to come to where they are.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::Mutex;

use crate::{Error, Result};

/// Largest file that is believed to be one of these, in bytes.
const BYTES_MAX: u64 = 512 << 20;

/// The files in memory, each as long as the file that it was read from stays as it is.
#[derive(Debug, Default)]
pub(super) struct BootFiles(Mutex<HashMap<PathBuf, (Identity, Arc<OwnedFd>)>>);

type Identity = (u64, u64, u64, i64, i64);

impl BootFiles {
    /// What is in a file.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn get(&self, path: &Path) -> Result<Arc<OwnedFd>> {
        let failed = |e| Error::io(path.display(), e);
        let meta = fs::metadata(path).map_err(failed)?;
        let identity = (meta.dev(), meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec());
        let mut files = self.0.lock();
        if let Some((known, file)) = files.get(path)
            && *known == identity
        {
            return Ok(file.clone());
        }
        let file = Arc::new(read(path).map_err(failed)?);
        files.insert(path.to_owned(), (identity, file.clone()));
        Ok(file)
    }
}

fn read(path: &Path) -> io::Result<OwnedFd> {
    let mut bytes = Vec::new();
    File::open(path)?.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > BYTES_MAX {
        return Err(io::Error::other("it is too large to boot from"));
    }
    let mut file = File::from(memfd_create(c"boot", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.write_all(&bytes)?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_file_is_read_once_and_again_when_it_is_another_and_nobody_can_change_it() {
        let dir = tempfile::tempdir().unwrap();
        let (files, path) = (BootFiles::default(), dir.path().join("kernel"));
        assert!(files.get(&path).is_err());
        fs::write(&path, "one").unwrap();
        let one = files.get(&path).unwrap();
        assert!(Arc::ptr_eq(&one, &files.get(&path).unwrap()));
        let seen = |file: &OwnedFd| format!("/proc/self/fd/{}", file.as_raw_fd());
        assert_eq!(fs::read(seen(&one)).unwrap(), b"one");
        let mut again = File::options().write(true).open(seen(&one)).unwrap();
        assert_eq!(again.write_all(b"two").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        fs::write(&path, "three").unwrap();
        assert_eq!(fs::read(seen(&files.get(&path).unwrap())).unwrap(), b"three");
        assert_eq!(fs::read(seen(&one)).unwrap(), b"one");
    }
}
