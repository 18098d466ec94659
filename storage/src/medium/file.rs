//! A directory of the host as a [`Medium`].
//!
//! io_uring carries reads of several places at once. A single read, a write and a sync are plain calls: measured, a linked
//! write and fsync on a ring is 1.2 to 2.9 times slower than `pwrite` and `fdatasync` (decision 0011).

use super::{Entry, File, Medium, Mode};
use io_uring::{IoUring, opcode, squeue, types};
use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Entries of a thread's ring, and so the reads one system call can carry.
const RING_ENTRIES: u32 = 32;

thread_local! {
    /// This thread's ring, made at first use. `None` inside: the kernel refused one.
    static RING: RefCell<Option<Option<IoUring>>> = const { RefCell::new(None) };
}

/// Which system calls carry the I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// io_uring for reads of several places; plain calls where the kernel refuses it.
    #[default]
    Auto,
    /// `pread`, `pwrite` and `fdatasync` only: for hosts that forbid io_uring and for fault injection by strace.
    Plain,
}

/// See the module.
pub struct FileMedium {
    root: PathBuf,
    backend: Backend,
}

impl FileMedium {
    /// A medium on an existing directory.
    pub fn new(root: &Path, backend: Backend) -> Self {
        let backend = match backend {
            Backend::Auto if IoUring::new(2).is_err() => {
                tracing::warn!("io_uring is refused here; using plain reads and writes");
                Backend::Plain
            }
            other => other,
        };
        Self { root: root.to_owned(), backend }
    }

    /// Renames a file, so that nothing takes it for what it was and a person can still look at it.
    pub fn set_aside(&self, name: &str) -> io::Result<()> {
        let path = self.root.join(name);
        fs::rename(&path, path.with_extension("damaged"))
    }

    /// Which calls are in use.
    pub fn backend(&self) -> Backend {
        self.backend
    }
}

impl Medium for FileMedium {
    fn open(&self, name: &str, mode: Mode) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true).mode(0o600);
        options.write(mode != Mode::Read).create_new(mode == Mode::Create);
        let file = options.open(self.root.join(name))?;
        Ok(Arc::new(HostFile { file, backend: self.backend }))
    }

    fn create_dir(&self, name: &str) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(self.root.join(name))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(self.root.join(dir))? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_file() {
                entries.push((entry.file_name().to_string_lossy().into_owned(), meta.len()));
            }
        }
        Ok(entries)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.root.join(name))
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        fs::File::open(self.root.join(dir))?.sync_all()
    }

    fn allocated_bytes(&self, dir: &str) -> io::Result<u64> {
        fn walk(dir: &Path) -> io::Result<u64> {
            let mut total = 0;
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                // A file may go away between the listing and the look: RocksDB and the log delete theirs at any time.
                let Ok(meta) = entry.metadata() else { continue };
                total += if meta.is_dir() { walk(&entry.path())? } else { meta.blocks() * 512 };
            }
            Ok(total)
        }
        walk(&self.root.join(dir))
    }
}

struct HostFile {
    file: fs::File,
    backend: Backend,
}

impl HostFile {
    fn fd(&self) -> types::Fd {
        types::Fd(self.file.as_raw_fd())
    }

    /// Runs `use_ring` on this thread's ring, or `plain` where there is none.
    fn with_ring<T>(&self, use_ring: impl FnOnce(&mut IoUring) -> T, plain: impl FnOnce() -> T) -> T {
        if self.backend == Backend::Plain {
            return plain();
        }
        RING.with(|cell| match cell.borrow_mut().get_or_insert_with(|| IoUring::new(RING_ENTRIES).ok()) {
            Some(ring) => use_ring(ring),
            None => plain(),
        })
    }
}

/// Submits `entries` (at most [`RING_ENTRIES`]; their user data are the indices `0..n`) and waits for all of them.
/// Returns each one's result as the kernel gave it: bytes, or a negative errno.
///
/// # Safety
/// The buffers the entries point to must stay valid, and unaliased where written, until this returns.
unsafe fn run(ring: &mut IoUring, entries: &[squeue::Entry]) -> Vec<i32> {
    // SAFETY: the caller keeps the buffers alive until we return, and we return only after every entry has completed.
    unsafe { ring.submission().push_multiple(entries) }.unwrap_or_else(|_| unreachable!("the ring is empty"));
    let mut results = vec![0; entries.len()];
    let mut done = 0;
    while done < entries.len() {
        match ring.submit_and_wait(entries.len() - done) {
            Ok(_) => {}
            Err(e) if matches!(e.raw_os_error(), Some(nix::libc::EINTR | nix::libc::EAGAIN | nix::libc::EBUSY)) => {}
            // The buffers are still the kernel's: returning or unwinding would free them under it.
            Err(e) => {
                tracing::error!("io_uring_enter cannot wait for requests under way: {e}");
                std::process::abort();
            }
        }
        for completion in ring.completion() {
            results[completion.user_data() as usize] = completion.result();
            done += 1;
        }
    }
    results
}

impl File for HostFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn read_many(&self, reads: &mut [(&mut [u8], u64)]) -> io::Result<()> {
        if reads.len() < 2 {
            return reads.iter_mut().try_for_each(|(buf, offset)| self.read_at(buf, *offset));
        }
        for chunk in reads.chunks_mut(RING_ENTRIES as usize) {
            let entries: Vec<_> = chunk
                .iter_mut()
                .enumerate()
                .map(|(i, (buf, offset))| {
                    opcode::Read::new(self.fd(), buf.as_mut_ptr(), buf.len() as u32)
                        .offset(*offset)
                        .build()
                        .user_data(i as u64)
                })
                .collect();
            let results = self.with_ring(
                // SAFETY: the buffers are exclusively borrowed by `chunk` for the whole call.
                |ring| unsafe { run(ring, &entries) },
                || vec![0; entries.len()],
            );
            for ((buf, offset), result) in chunk.iter_mut().zip(results) {
                // A short or refused read goes the plain way, which either completes it or names the error.
                let got = result.max(0) as usize;
                if got < buf.len() {
                    self.file.read_exact_at(&mut buf[got..], *offset + got as u64)?;
                }
            }
        }
        Ok(())
    }

    fn will_read(&self, offset: u64, len: u64) {
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        // It is advice: without it the read itself waits for the disk.
        let _ = nix::fcntl::posix_fadvise(&self.file, offset as i64, len as i64, advice);
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn start_writeback(&self, offset: u64, len: u64) {
        // SAFETY: a plain system call on our own descriptor. What it may say of an error, the next sync says as well.
        let _ = unsafe {
            nix::libc::sync_file_range(
                self.file.as_raw_fd(),
                offset as i64,
                len as i64,
                nix::libc::SYNC_FILE_RANGE_WRITE,
            )
        };
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let range = (offset as i64, len as i64);
        match nix::fcntl::fallocate(&self.file, nix::fcntl::FallocateFlags::empty(), range.0, range.1) {
            Ok(()) => Ok(()),
            // File systems without fallocate: grow the file; running out of space then shows at the write.
            Err(nix::errno::Errno::EOPNOTSUPP) => {
                let end = offset + len;
                if self.file_bytes()? < end { self.file.set_len(end) } else { Ok(()) }
            }
            Err(e) => Err(e.into()),
        }
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}
