//! The requests of the kernel: decode, check bounds, call the disk, map the error.

use crate::frontend::{Device, errno, log_storage_error};
use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use nix::libc;
use parking_lot::{Mutex, RwLock};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The kernel's own limit is 256 pages.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Asynchronous direct requests that the kernel lets wait for us at a time.
const BACKGROUND_REQUESTS: u16 = 512;
const BLOCK_BYTES: u32 = 4096;
const SECTOR_BYTES: u64 = 512;
/// A name may be given to another disk at any time, so the kernel has to ask each time it opens one.
const NAME_TTL: Duration = Duration::ZERO;
/// Size and mode of an inode never change.
const ATTRIBUTE_TTL: Duration = Duration::from_secs(3600);
/// 1 is the directory; below 16 are the positions of "." and ".." in a listing.
const FIRST_INODE: u64 = 16;

thread_local! {
    /// Where a read lands before it is sent to the kernel; one a thread of the session.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The disks of a mount, shared by the session's threads and whoever adds and removes.
#[derive(Default)]
pub(super) struct Exports(RwLock<Table>);

#[derive(Default)]
struct Table {
    by_name: BTreeMap<String, Arc<Export>>,
    by_inode: BTreeMap<u64, Arc<Export>>,
    /// Inodes are never used twice, so an old one can only mean a disk that was removed.
    used_inodes: u64,
}

/// A disk under a name.
struct Export {
    inode: u64,
    name: String,
    size: u64,
    read_only: bool,
    added: SystemTime,
    times: Mutex<Times>,
    /// Held for reading over every request; taken for writing, and emptied, by removal.
    disk: RwLock<Option<Device>>,
}

struct Times {
    accessed: SystemTime,
    modified: SystemTime,
}

impl Exports {
    /// False if the name is taken.
    pub(super) fn add(&self, name: &str, disk: Device) -> bool {
        let mut table = self.0.write();
        if table.by_name.contains_key(name) {
            return false;
        }
        table.used_inodes += 1;
        let now = SystemTime::now();
        let export = Arc::new(Export {
            inode: FIRST_INODE + table.used_inodes,
            name: name.into(),
            size: disk.size_bytes(),
            read_only: disk.is_read_only(),
            added: now,
            times: Mutex::new(Times { accessed: now, modified: now }),
            disk: RwLock::new(Some(disk)),
        });
        table.by_inode.insert(export.inode, export.clone());
        table.by_name.insert(name.into(), export);
        true
    }

    /// False if there is no such name.
    pub(super) fn remove(&self, name: &str) -> bool {
        let export = {
            let mut table = self.0.write();
            let Some(export) = table.by_name.remove(name) else { return false };
            table.by_inode.remove(&export.inode);
            export
        };
        // Not under the table's lock: this waits for requests on this disk.
        *export.disk.write() = None;
        true
    }

    fn find(&self, inode: INodeNo) -> Result<Arc<Export>, Errno> {
        self.0.read().by_inode.get(&inode.0).cloned().ok_or(Errno::ENODEV)
    }
}

impl Export {
    fn attributes(&self) -> FileAttr {
        let times = self.times.lock();
        FileAttr {
            ino: INodeNo(self.inode),
            size: self.size,
            blocks: self.size.div_ceil(SECTOR_BYTES),
            atime: times.accessed,
            mtime: times.modified,
            ctime: times.modified,
            crtime: self.added,
            kind: FileType::RegularFile,
            perm: if self.read_only { 0o400 } else { 0o600 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_BYTES,
            flags: 0,
        }
    }

    /// Calls `operation` with the disk, unless it was removed; the error is logged and mapped here.
    fn with_disk<T>(
        &self,
        name: &'static str,
        operation: impl FnOnce(&Device) -> storage::Result<T>,
    ) -> Result<T, Errno> {
        let disk = self.disk.read();
        let disk = disk.as_ref().ok_or(Errno::ENODEV)?;
        operation(disk).map_err(|error| {
            log_storage_error("fuse", name, &error);
            Errno::from_i32(errno(error.kind()) as i32)
        })
    }

    fn check_writable(&self) -> Result<(), Errno> {
        if self.read_only { Err(Errno::EROFS) } else { Ok(()) }
    }

    fn modified(&self) {
        self.times.lock().modified = SystemTime::now();
    }

    /// How much of `len` bytes at `offset` the disk has.
    fn within(&self, offset: u64, len: u64) -> u64 {
        len.min(self.size.saturating_sub(offset))
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> Result<u32, Errno> {
        self.check_writable()?;
        if data.is_empty() {
            return Ok(0);
        }
        // As a block device: a write over the end is short, one behind it has no space.
        let len = self.within(offset, data.len() as u64) as usize;
        if len == 0 {
            return Err(Errno::ENOSPC);
        }
        self.with_disk("write", |disk| {
            disk.write(offset, &data[..len])?;
            if durable { disk.flush() } else { Ok(()) }
        })?;
        self.modified();
        // At most one request, which is below 4 GiB.
        Ok(len as u32)
    }

    fn fsync(&self) -> Result<(), Errno> {
        if self.read_only {
            return Ok(());
        }
        self.with_disk("flush", Device::flush)
    }

    fn allocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        self.check_writable()?;
        let end = offset.checked_add(len).ok_or(Errno::EFBIG)?;
        let keeps_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let kind = mode & !libc::FALLOC_FL_KEEP_SIZE;
        let within = self.within(offset, len);
        match kind {
            // A hole reads as zeroes to its last byte, and a discard may leave parts of blocks as they were. For whole
            // blocks the two are the same to the store. The kernel passes this on only together with KEEP_SIZE.
            libc::FALLOC_FL_PUNCH_HOLE if within == 0 => Ok(()),
            libc::FALLOC_FL_PUNCH_HOLE => self.with_disk("punch hole", |disk| disk.write_zeroes(offset, within)),
            libc::FALLOC_FL_ZERO_RANGE if !keeps_size && end > self.size => Err(Errno::EOPNOTSUPP),
            libc::FALLOC_FL_ZERO_RANGE if within == 0 => Ok(()),
            libc::FALLOC_FL_ZERO_RANGE => self.with_disk("write zeroes", |disk| disk.write_zeroes(offset, within)),
            _ => Err(Errno::EOPNOTSUPP),
        }?;
        self.modified();
        Ok(())
    }

    /// The store does not say where its holes are, so all of a disk counts as data, which is always a right answer.
    fn seek(&self, offset: i64, whence: i32) -> Result<i64, Errno> {
        let size = i64::try_from(self.size).map_err(|_| Errno::EOVERFLOW)?;
        match whence {
            _ if !(0..size).contains(&offset) => Err(Errno::ENXIO),
            libc::SEEK_DATA => Ok(offset),
            libc::SEEK_HOLE => Ok(size),
            _ => Err(Errno::EINVAL),
        }
    }
}

/// The directory as the kernel sees it.
pub(super) struct DiskDirectory {
    exports: Arc<Exports>,
    mounted: SystemTime,
}

impl DiskDirectory {
    pub(super) fn new(exports: Arc<Exports>) -> Self {
        Self { exports, mounted: SystemTime::now() }
    }

    fn root(&self) -> FileAttr {
        FileAttr {
            ino: INodeNo::ROOT,
            size: 0,
            blocks: 0,
            atime: self.mounted,
            mtime: self.mounted,
            ctime: self.mounted,
            crtime: self.mounted,
            kind: FileType::Directory,
            perm: 0o700,
            nlink: 2,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_BYTES,
            flags: 0,
        }
    }

    fn attributes(&self, inode: INodeNo) -> Result<FileAttr, Errno> {
        if inode == INodeNo::ROOT { Ok(self.root()) } else { Ok(self.exports.find(inode)?.attributes()) }
    }

    fn set_attributes(&self, inode: INodeNo, change: &Change) -> Result<FileAttr, Errno> {
        if inode == INodeNo::ROOT {
            return Err(Errno::EPERM);
        }
        let export = self.exports.find(inode)?;
        if let Some(size) = change.size {
            export.check_writable()?;
            // A disk has the size it was made with.
            if size != export.size {
                return Err(Errno::EPERM);
            }
        }
        let attributes = export.attributes();
        let other_owner =
            change.uid.is_some_and(|uid| uid != attributes.uid) || change.gid.is_some_and(|gid| gid != attributes.gid);
        let other_mode = change.mode.is_some_and(|mode| mode & 0o7777 != u32::from(attributes.perm));
        if other_owner || other_mode {
            return Err(Errno::EPERM);
        }
        let mut times = export.times.lock();
        if let Some(accessed) = change.accessed {
            times.accessed = point(accessed);
        }
        if let Some(modified) = change.modified {
            times.modified = point(modified);
        }
        drop(times);
        Ok(export.attributes())
    }

    fn open_flags(&self, inode: INodeNo, flags: OpenFlags) -> Result<FopenFlags, Errno> {
        let export = self.exports.find(inode)?;
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            export.check_writable()?;
        }
        Ok(FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES | FopenFlags::FOPEN_NOFLUSH)
    }
}

/// What a setattr may ask for.
struct Change {
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    size: Option<u64>,
    accessed: Option<TimeOrNow>,
    modified: Option<TimeOrNow>,
}

fn point(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

fn answer(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for DiskDirectory {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is the nearest that the kernel accepts; the defaults work too, only slower.
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        if let Err(nearest) = config.set_max_readahead(REQUEST_BYTES_MAX) {
            let _ = config.set_max_readahead(nearest);
        }
        let _ = config.set_max_background(BACKGROUND_REQUESTS);
        for wanted in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP, InitFlags::FUSE_PARALLEL_DIROPS]
        {
            if config.add_capabilities(wanted).is_err() {
                tracing::info!(?wanted, "this kernel's FUSE does not have it");
            }
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = match (parent, name.to_str()) {
            (INodeNo::ROOT, Some(name)) => self.exports.0.read().by_name.get(name).cloned(),
            _ => None,
        };
        match found {
            Some(export) => reply.entry_with_ttls(&ATTRIBUTE_TTL, &NAME_TTL, &export.attributes(), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, inode: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Ok(attributes) => reply.attr(&ATTRIBUTE_TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.set_attributes(inode, &Change { mode, uid, gid, size, accessed, modified }) {
            Ok(attributes) => reply.attr(&ATTRIBUTE_TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _req: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.open_flags(inode, flags) {
            Ok(flags) => reply.opened(FileHandle(0), flags),
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _req: &Request,
        inode: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let export = match self.exports.find(inode) {
            Ok(export) => export,
            Err(error) => return reply.error(error),
        };
        let len = export.within(offset, u64::from(size)) as usize;
        READ_BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < len {
                buffer.resize(len, 0);
            }
            let buffer = &mut buffer[..len];
            if len == 0 {
                return reply.data(buffer);
            }
            match export.with_disk("read", |disk| disk.read(offset, buffer)) {
                Ok(()) => reply.data(buffer),
                Err(error) => reply.error(error),
            }
        });
    }

    fn write(
        &self,
        _req: &Request,
        inode: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // O_SYNC includes the bit of O_DSYNC.
        let durable = flags.0 & libc::O_DSYNC != 0;
        match self.exports.find(inode).and_then(|export| export.write(offset, data, durable)) {
            Ok(len) => reply.written(len),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _req: &Request, _inode: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        // Sent when a descriptor is closed. The kernel stops asking.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _req: &Request, inode: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        answer(reply, self.exports.find(inode).and_then(|export| export.fsync()));
    }

    fn fallocate(
        &self,
        _req: &Request,
        inode: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        answer(reply, self.exports.find(inode).and_then(|export| export.allocate(offset, length, mode)));
    }

    fn lseek(&self, _req: &Request, inode: INodeNo, _fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        match self.exports.find(inode).and_then(|export| export.seek(offset, whence)) {
            Ok(offset) => reply.offset(offset),
            Err(error) => reply.error(error),
        }
    }

    fn readdir(&self, _req: &Request, inode: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if inode != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        for (position, name) in [(1, "."), (2, "..")] {
            if position > offset && reply.add(INodeNo::ROOT, position, FileType::Directory, name) {
                return reply.ok();
            }
        }
        // A position is an inode, so that adding and removing meanwhile neither repeats nor skips others.
        let table = self.exports.0.read();
        for (inode, export) in table.by_inode.range((Bound::Excluded(offset), Bound::Unbounded)) {
            if reply.add(INodeNo(*inode), *inode, FileType::RegularFile, &export.name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let table = self.exports.0.read();
        let blocks = table
            .by_inode
            .values()
            .fold(0_u64, |sum, export| sum.saturating_add(export.size.div_ceil(u64::from(BLOCK_BYTES))));
        // Nothing is free: files cannot be made or grow here.
        reply.statfs(blocks, 0, 0, table.by_inode.len() as u64, 0, BLOCK_BYTES, 255, BLOCK_BYTES);
    }

    // What the directory does not let users do. Without these the crate answers "not implemented" and logs a warning.

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn getxattr(&self, _req: &Request, _inode: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        // Asked before every write; with this answer once only.
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _inode: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _inode: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }
}
