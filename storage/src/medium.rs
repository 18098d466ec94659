//! Everything the store reads or writes, except RocksDB's own files, goes through a [`Medium`].
//!
//! Two kinds exist: [`file::FileMedium`], a directory of the host (io_uring where the kernel allows it, plain
//! `pread`/`pwrite` elsewhere), and [`sim::SimMedium`], a seeded twin in memory that loses, tears and reorders what was
//! not synced, and fails any call it is told to.
//!
//! What the store assumes of a medium: after [`File::sync`] has returned `Ok`, everything written to that file before
//! the call survives a crash; before that, any subset of 512-byte sectors of it may. A file's name survives once
//! [`Medium::sync_dir`] has returned. A failed sync says nothing about what is on disk, and asking again does not help.

pub mod file;
pub mod sim;

use std::io;
use std::sync::Arc;

/// One open file. All calls block until done; none moves a cursor, so any thread may call at any time.
pub trait File: Send + Sync {
    /// Fills `buf` from `offset`; `UnexpectedEof` when the file ends before that.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Fills each buffer from its offset, in one round trip where the medium can.
    fn read_many(&self, reads: &mut [(&mut [u8], u64)]) -> io::Result<()> {
        reads.iter_mut().try_for_each(|(buf, offset)| self.read_at(buf, *offset))
    }

    /// Tells that these bytes will be read soon, where the medium can make use of that.
    fn will_read(&self, _offset: u64, _len: u64) {}

    /// Writes all of `data` at `offset`. Not durable before [`File::sync`].
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Lets the medium begin to put these bytes on disk, so that a later [`File::sync`] finds little left to do. Says
    /// nothing about what is durable, and returns without waiting for the disk where it can.
    fn start_writeback(&self, _offset: u64, _len: u64) {}

    /// Makes everything written so far durable (`fdatasync`).
    fn sync(&self) -> io::Result<()>;

    /// Writes and then syncs. `Err(WriteSyncError::Write)` means that the sync was not attempted.
    fn write_sync(&self, data: &[u8], offset: u64) -> Result<(), WriteSyncError> {
        self.write_at(data, offset).map_err(WriteSyncError::Write)?;
        self.sync().map_err(WriteSyncError::Sync)
    }

    /// Reserves space for `offset..offset + len`, so that a later write there does not fail for lack of it. Grows the
    /// file; the new bytes read as zero.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Cuts the file off at `len` bytes, giving back what was reserved behind.
    fn truncate(&self, len: u64) -> io::Result<()>;

    /// Length in bytes.
    fn file_bytes(&self) -> io::Result<u64>;
}

/// Which half of [`File::write_sync`] failed.
#[derive(Debug)]
pub enum WriteSyncError {
    /// The write; it may be tried again.
    Write(io::Error),
    /// The sync; nothing is known about what is durable.
    Sync(io::Error),
}

/// How [`Medium::open`] opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    Modify,
    /// A new file; `AlreadyExists` if there is one.
    Create,
}

/// A name and its size in bytes.
pub type Entry = (String, u64);

/// A directory tree. Names are relative, `/`-separated, at most one level deep.
pub trait Medium: Send + Sync {
    /// Opens `name`.
    fn open(&self, name: &str, mode: Mode) -> io::Result<Arc<dyn File>>;
    /// Makes a directory; fine when it is there.
    fn create_dir(&self, name: &str) -> io::Result<()>;
    /// The files of a directory, in no particular order.
    fn list(&self, dir: &str) -> io::Result<Vec<Entry>>;
    /// Removes a file's name. Open handles go on reading.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes the names in `dir` durable; `""` is the top.
    fn sync_dir(&self, dir: &str) -> io::Result<()>;
    /// Bytes the tree occupies below `dir`.
    fn allocated_bytes(&self, dir: &str) -> io::Result<u64>;
}
