//! Disks as raw files under one FUSE mount.
//!
//! The mount is a flat directory. [`FuseMount::add`] puts a disk there as a file of fixed size, [`FuseMount::remove`]
//! takes it away: after it returns no request is being carried out on that disk and open descriptors get ENODEV. A
//! snapshot is a file of mode 0400 that refuses writes with EROFS.
//!
//! Choices, each visible to users:
//! - **No page cache** (`FOPEN_DIRECT_IO`): a disk has one copy of its data, the store's, so what is read through the
//!   file, through vhost-user and after a snapshot is the same, and memory is not used twice. `mmap` is still possible
//!   (`FUSE_DIRECT_IO_ALLOW_MMAP`, Linux 6.6); pages mapped so are cached by the kernel until written back.
//! - **Parallel writes** (`FOPEN_PARALLEL_DIRECT_WRITES`): else the kernel holds the inode's lock over each write and a
//!   queue depth above one is worth nothing. Sizes never change, so nothing needs that lock.
//! - **Durability is fsync**, or O_SYNC/O_DSYNC on the descriptor or the write, which the kernel leaves to us for direct
//!   I/O. Closing a file is not a flush.
//! - **Many threads, each with its own cloned /dev/fuse**: a request blocks its thread while the store works.

mod filesystem;

use super::{Device, Error, Result};
use filesystem::{DiskDirectory, Exports};
use fuser::{Config, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::statfs;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Requests that can be carried out at the same time. A waiting fsync occupies one for milliseconds.
const THREADS: usize = 16;
/// Longest name of a file on Linux.
const NAME_BYTES_MAX: usize = 255;

/// A mounted directory of disks. Unmounts when dropped.
pub struct FuseMount {
    dir: PathBuf,
    exports: Arc<Exports>,
    session: Option<JoinHandle<io::Result<()>>>,
}

impl FuseMount {
    /// Mounts on `dir`, which is created if it is not there. What a daemon that died left mounted is cleared away.
    pub fn mount(dir: &Path) -> Result<Self> {
        let failed = |source| Error::Mount { dir: dir.to_path_buf(), source };
        clear_away(dir).map_err(failed)?;
        std::fs::create_dir_all(dir).map_err(failed)?;
        let dir = dir.canonicalize().map_err(failed)?;

        let device = File::options().read(true).write(true).open("/dev/fuse").map_err(failed)?;
        attach(&device, &dir).map_err(failed)?;
        let exports = Arc::new(Exports::default());
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let served = serve(device.into(), exports.clone(), config).and_then(|session| {
            // Answered by the threads, or an error because they could not be had.
            match statfs(&dir) {
                Ok(_) => Ok(session),
                Err(errno) => Err(end_of(session).err().unwrap_or_else(|| errno.into())),
            }
        });
        match served {
            Ok(session) => Ok(Self { dir, exports, session: Some(session) }),
            Err(source) => {
                let _ = umount2(&dir, MntFlags::MNT_DETACH);
                Err(Error::Mount { dir, source })
            }
        }
    }

    /// The mounted directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the disk added as `name` is, or would be.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes `disk` a file and returns its path.
    pub fn add(&self, name: &str, disk: impl Into<Device>) -> Result<PathBuf> {
        let reserved = name.is_empty() || name == "." || name == "..";
        if reserved || name.len() > NAME_BYTES_MAX || name.contains(['/', '\0']) {
            return Err(Error::InvalidName(name.into()));
        }
        if !self.exports.add(name, disk.into()) {
            return Err(Error::NameTaken(name.into()));
        }
        Ok(self.path(name))
    }

    /// Takes the file away, waits for requests that are being carried out and lets go of the disk. Returns whether
    /// there was one.
    pub fn remove(&self, name: &str) -> bool {
        self.exports.remove(name)
    }

    /// Unmounts and waits for the threads. Does not wait for users of the files: if there are any, their requests fail
    /// from here on.
    pub fn unmount(mut self) -> Result<()> {
        self.tear_down().map_err(|source| Error::Unmount { dir: self.dir.clone(), source })
    }

    fn tear_down(&mut self) -> io::Result<()> {
        let Some(session) = self.session.take() else { return Ok(()) };
        match umount2(&self.dir, MntFlags::empty()) {
            // EINVAL: somebody has unmounted it already.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(Errno::EBUSY) => {
                tracing::warn!(dir = %self.dir.display(), "unmounting while files are in use");
                // Forcing aborts the connection, which is what ends our threads while files are open; being busy, it
                // leaves the mount in place, which detaching then removes.
                let _ = umount2(&self.dir, MntFlags::MNT_FORCE);
                match umount2(&self.dir, MntFlags::MNT_DETACH) {
                    Ok(()) | Err(Errno::EINVAL) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        }
        end_of(session)
    }
}

/// Takes away what daemons that died left mounted. Its attributes may still be cached, and it looks like any directory
/// until it is opened.
fn clear_away(dir: &Path) -> io::Result<()> {
    while let Err(error) = std::fs::read_dir(dir) {
        match error.raw_os_error() {
            // One of several, or all there was.
            Some(code) if code == Errno::ENOTCONN as i32 => umount2(dir, MntFlags::MNT_DETACH)?,
            // Making the directory and mounting on it will say what is wrong with it.
            _ => break,
        }
    }
    Ok(())
}

/// Mounts. Done here and not by the crate, which unmounts a second time when its threads end: by then the directory may be
/// somebody else's mount.
fn attach(device: &File, dir: &Path) -> io::Result<()> {
    // With `default_permissions` and the modes of the files the kernel lets in root only, and with `allow_other` whoever
    // root hands a descriptor to, as a VMM that runs as a user of its own.
    let options =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", device.as_raw_fd());
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    Ok(mount(Some("miosa"), dir, Some("fuse.miosa"), flags, Some(options.as_str()))?)
}

/// Starts the threads. In one of ours, because the crate's way keeps the device open, and who waits for an answer waiting,
/// also when no thread serves it.
fn serve(device: OwnedFd, exports: Arc<Exports>, config: Config) -> io::Result<JoinHandle<io::Result<()>>> {
    let session = Session::from_fd(DiskDirectory::new(exports), device, SessionACL::All, config)?;
    std::thread::Builder::new().name("fuse".into()).spawn(move || session.run())
}

/// Serves disks by name to whoever is at the other end of `connection`, in one thread until that goes. The first message there
/// is a kernel's greeting. For those who are no kernel.
#[cfg(fuzzing)]
pub fn serve_connection(connection: OwnedFd, disks: Vec<(String, Device)>) -> io::Result<JoinHandle<io::Result<()>>> {
    let exports = Arc::new(Exports::default());
    disks.into_iter().for_each(|(name, disk)| assert!(exports.add(&name, disk)));
    serve(connection, exports, Config::default())
}

/// What the threads end with, when they have.
fn end_of(session: JoinHandle<io::Result<()>>) -> io::Result<()> {
    session.join().unwrap_or_else(|_| Err(io::Error::other("a thread that served files panicked")))
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        if let Err(error) = self.tear_down() {
            tracing::error!(dir = %self.dir.display(), %error, "cannot unmount");
        }
    }
}
