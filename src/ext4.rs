//! The ext4 file system on a disk or snapshot of the store, read without mounting it or booting anything.
//!
//! The format itself is the library's (`rust-fs-ext4`); here is what is needed around it: the journal laid over
//! (`journal`), a bounded walk of extents, paths, differences ([`diff`]) and archives ([`archive`]). An image that a
//! guest made up gives errors: what is read into memory is bounded, and every loop goes through something that the image
//! has only so much of. [`contained`] turns a defect in the library into an error, too.

pub mod archive;
mod device;
pub mod diff;
mod journal;

use std::collections::HashSet;
use std::sync::Arc;

use fs_ext4::extent::{Extent, ExtentHeader, ExtentIdx};
use fs_ext4::fs::Filesystem;
use fs_ext4::inode::{Inode, InodeFlags};
use serde::{Deserialize, Serialize};
use storage::Disk;

use device::Device;

/// The root directory.
const ROOT: u32 = 2;
/// Symbolic links followed on the way to a file, as in Linux.
const MAX_LINKS: u32 = 40;
/// Bytes of a path.
const MAX_PATH: usize = 4096;
/// A larger directory is not one that Linux made.
const MAX_DIRECTORY: u64 = 1 << 30;
/// Pieces of one file.
const MAX_RUNS: usize = 4 << 20;
/// Holes of a file that are noted as such: in all, and each. Smaller ones are written as zeroes, which everybody can read.
const MIN_HOLES: u64 = 64 << 20;
const MIN_HOLE: u64 = 1 << 20;
/// Most pieces of data between noted holes: lists of them are bounded where they are read.
const MAX_PIECES: usize = 16_000;
/// Bytes of one file: 2^32 blocks of 4 KiB.
const MAX_FILE: u64 = 1 << 44;

/// Why a file system, or a file of it, cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such file.
    #[error("{0}: no such file or directory")]
    NotFound(String),
    /// It is no directory, or one where a file is wanted, or the links lead in a circle.
    #[error("{0}")]
    WrongKind(String),
    /// The file system is damaged, is none, or is of a kind that is not read.
    #[error("{0}")]
    Unreadable(String),
    /// The store.
    #[error(transparent)]
    Store(storage::Error),
}

/// Result of reading.
pub type Result<T> = std::result::Result<T, Error>;

impl From<fs_ext4::error::Error> for Error {
    fn from(error: fs_ext4::error::Error) -> Self {
        use fs_ext4::error::Error as E;
        match error {
            E::Io(error) => {
                let text = error.to_string();
                match error.into_inner().map(|e| e.downcast::<storage::Error>()) {
                    Some(Ok(error)) => Error::Store(*error),
                    _ => Error::Unreadable(text),
                }
            }
            E::BadMagic { .. } => Error::Unreadable("it has no ext4 file system".to_owned()),
            E::UnsupportedIncompat(_) | E::UnsupportedRoCompat(_) | E::Unsupported(_) => {
                Error::Unreadable(format!("its file system has something that is not read here: {error}"))
            }
            error => Error::Unreadable(format!("its file system is damaged: {error}")),
        }
    }
}

/// Runs what reads an image; a panic, which would be a defect of the library, is an error.
pub fn contained<T>(read: impl FnOnce() -> Result<T>) -> Result<T> {
    caught(read).unwrap_or_else(Err)
}

/// [`contained`], for what also writes elsewhere; that can fail by itself.
pub fn contained_copy<T>(copy: impl FnOnce() -> std::io::Result<Result<T>>) -> std::io::Result<Result<T>> {
    caught(copy).unwrap_or_else(|damaged| Ok(Err(damaged)))
}

fn caught<T>(work: impl FnOnce() -> T) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
        .map_err(|_| Error::Unreadable("its file system is damaged in a way that reading it fails".into()))
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = FileKind)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl Kind {
    /// As `ls -l` shows it.
    pub fn letter(self) -> char {
        match self {
            Kind::File => '-',
            Kind::Directory => 'd',
            Kind::Symlink => 'l',
            Kind::CharDevice => 'c',
            Kind::BlockDevice => 'b',
            Kind::Fifo => 'p',
            Kind::Socket => 's',
        }
    }

    fn of_mode(mode: u16) -> Option<Self> {
        Some(match mode >> 12 {
            0x8 => Kind::File,
            0x4 => Kind::Directory,
            0xA => Kind::Symlink,
            0x2 => Kind::CharDevice,
            0x6 => Kind::BlockDevice,
            0x1 => Kind::Fifo,
            0xC => Kind::Socket,
            _ => return None,
        })
    }
}

/// A file of any kind.
#[derive(Debug, Clone)]
pub struct Node {
    /// Number of its inode: the same for all names of one file.
    pub ino: u32,
    /// What it is.
    pub kind: Kind,
    inode: Inode,
    raw: Vec<u8>,
}

impl Node {
    /// Permissions with set-user-id, set-group-id and sticky.
    pub fn mode(&self) -> u32 {
        u32::from(self.inode.mode & 0o7777)
    }

    /// Owner.
    pub fn uid(&self) -> u32 {
        self.inode.uid
    }

    /// Group.
    pub fn gid(&self) -> u32 {
        self.inode.gid
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.inode.size
    }

    /// Names that it has.
    pub fn links(&self) -> u32 {
        u32::from(self.inode.links_count)
    }

    /// When its content was changed: seconds since 1970, and nanoseconds.
    pub fn modified(&self) -> (i64, u32) {
        (self.inode.mtime, self.inode.mtime_nsec)
    }

    /// Major and minor number of a device.
    pub fn device(&self) -> Option<(u32, u32)> {
        if !matches!(self.kind, Kind::CharDevice | Kind::BlockDevice) {
            return None;
        }
        let word = |at: usize| self.inode.block[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        // The old encoding where it fits, the new one behind it.
        Some(match (word(0), word(4)) {
            (0, new) => ((new >> 8) & 0xFFF, (new & 0xFF) | ((new >> 12) & 0xF_FF00)),
            (old, _) => ((old >> 8) & 0xFF, old & 0xFF),
        })
    }

    fn has_extents(&self) -> bool {
        self.inode.has_extents() && !self.inode.has_inline_data()
    }
}

/// A name in a directory.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Any bytes but `/` and NUL.
    pub name: Vec<u8>,
    /// Number of the inode.
    pub ino: u32,
    /// Whether the directory says that it is a directory, too.
    is_directory: bool,
}

/// A run of a file's bytes that the disk has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// Where it is in the file, in bytes.
    logical: u64,
    /// Where it is on the disk, in bytes.
    physical: u64,
    len: u64,
}

/// An open file system.
pub struct FileSystem {
    device: Arc<Device>,
    fs: Filesystem,
}

impl FileSystem {
    /// Opens the file system that fills a disk.
    pub fn open(disk: Disk) -> Result<Self> {
        let (device, fs) = journal::open(disk)?;
        Ok(Self { device, fs })
    }

    fn block_bytes(&self) -> u64 {
        u64::from(self.fs.sb.block_size())
    }

    /// The file of an inode.
    pub fn node(&self, ino: u32) -> Result<Node> {
        let (inode, raw) = self.fs.read_inode_verified(ino)?;
        let kind = Kind::of_mode(inode.mode);
        let kind = kind.ok_or_else(|| Error::Unreadable(format!("its file system is damaged: inode {ino}")))?;
        Ok(Node { ino, kind, inode, raw })
    }

    /// The root directory.
    pub fn root(&self) -> Result<Node> {
        self.node(ROOT)
    }

    /// What a directory has but `.` and `..`, by name.
    pub fn read_dir(&self, node: &Node) -> Result<Vec<Entry>> {
        if node.kind != Kind::Directory {
            return Err(Error::WrongKind("it is not a directory".to_owned()));
        }
        if node.size() > MAX_DIRECTORY {
            return Err(Error::Unreadable(format!("its file system is damaged: directory {} is too large", node.ino)));
        }
        let entries = self.fs.read_dir_ino(node.ino)?.into_iter().filter(|e| e.name != b"." && e.name != b"..");
        let mut entries: Vec<_> = entries.map(entry).collect();
        if entries.iter().any(|e| e.name.is_empty() || e.name.iter().any(|b| matches!(b, 0 | b'/'))) {
            return Err(Error::Unreadable(format!("its file system is damaged: a name in directory {}", node.ino)));
        }
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Where a symbolic link points.
    pub fn read_link(&self, node: &Node) -> Result<Vec<u8>> {
        Ok(self.fs.read_link(node.ino)?)
    }

    /// Extended attributes, by name.
    pub fn xattrs(&self, node: &Node) -> Result<Vec<(String, Vec<u8>)>> {
        let all = fs_ext4::xattr::read_all_resolved(&self.fs, &node.inode, &node.raw)?;
        // Where a file without blocks keeps its content is no attribute.
        let all = all.into_iter().filter(|e| e.name != "system.data");
        let shown = all.map(|e| {
            Ok(match e.name.starts_with("system.posix_acl_") {
                true => (e.name, access_list(&e.value)?),
                false => (e.name, e.value),
            })
        });
        let mut all = shown.collect::<Result<Vec<_>>>()?;
        all.sort();
        Ok(all)
    }

    /// The file at a path. Links on the way are followed, the last one only if told so; `/` is where `..` ends.
    pub fn lookup(&self, path: &str, follow: bool) -> Result<Node> {
        let not_found = || Error::NotFound(path.to_owned());
        if path.len() > MAX_PATH {
            return Err(Error::WrongKind("the path is longer than 4096 bytes".to_owned()));
        }
        // Directories from the root down, and what of the path is ahead, last first.
        let mut at = vec![self.root()?];
        let mut ahead = names(path.as_bytes());
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            let here = at.last().ok_or_else(not_found)?;
            if here.kind != Kind::Directory {
                return Err(Error::WrongKind(format!("{path}: a part of it is not a directory")));
            }
            if name == b".." {
                if at.len() > 1 {
                    at.pop();
                }
                continue;
            }
            let entry = self.read_dir(here)?.into_iter().find(|e| e.name == name).ok_or_else(not_found)?;
            let node = self.node(entry.ino)?;
            if node.kind == Kind::Symlink && (follow || !ahead.is_empty()) {
                links += 1;
                let target = self.read_link(&node)?;
                if links > MAX_LINKS || ahead.len() > MAX_PATH {
                    return Err(Error::WrongKind(format!("{path}: its symbolic links lead in a circle")));
                }
                if target.starts_with(b"/") {
                    at.truncate(1);
                }
                ahead.extend(names(&target));
                continue;
            }
            at.push(node);
        }
        at.pop().ok_or_else(not_found)
    }

    /// Fills `buf` with the file's bytes from `offset` on, as far as it has any; says how many.
    pub fn read(&self, file: &File, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let node = &file.node;
        let len = buf.len().min(node.size().saturating_sub(offset).try_into().unwrap_or(usize::MAX));
        let buf = &mut buf[..len];
        let Some(runs) = &file.runs else {
            let read = fs_ext4::file_io::read_with_raw_verified(
                &self.fs,
                &node.inode,
                &node.raw,
                node.ino,
                offset,
                len as u64,
                buf,
            )?;
            return Ok(read as usize);
        };
        buf.fill(0);
        let end = offset + len as u64;
        let first = runs.partition_point(|r| r.logical + r.len <= offset);
        for run in runs[first..].iter().take_while(|r| r.logical < end) {
            let (from, upto) = (run.logical.max(offset), (run.logical + run.len).min(end));
            let piece = &mut buf[(from - offset) as usize..(upto - offset) as usize];
            self.device.read(run.physical + (from - run.logical), piece).map_err(fs_ext4::error::Error::Io)?;
        }
        Ok(len)
    }

    /// Opens a regular file for reading.
    pub fn open_file(&self, node: Node) -> Result<File> {
        if node.kind != Kind::File {
            return Err(Error::WrongKind("it is not a file".to_owned()));
        }
        if node.size() > MAX_FILE {
            return Err(Error::Unreadable(format!("its file system is damaged: file {} is too large", node.ino)));
        }
        let runs = if node.has_extents() { Some(self.extents(&node)?.0) } else { None };
        Ok(File { node, runs })
    }

    /// Where the bytes of a file or directory with extents are, in order; and where the tree that says so is.
    fn extents(&self, node: &Node) -> Result<(Vec<Run>, Vec<Run>)> {
        if node.inode.flags & InodeFlags::ENCRYPT.bits() != 0 {
            return Err(Error::Unreadable("it is encrypted".to_owned()));
        }
        let mut walk = Walk { fs: self, next: 0, runs: Vec::new(), nodes: Vec::new() };
        let depth = ExtentHeader::parse(&node.inode.block)?.depth;
        walk.tree(&node.inode.block, depth)?;
        Ok((walk.runs, walk.nodes))
    }
}

/// A walk through a tree of extents. They are in order and do not overlap, so that no part of the disk can stand for
/// endlessly many of them.
struct Walk<'a> {
    fs: &'a FileSystem,
    /// The block of the file that the next extent is not before.
    next: u64,
    runs: Vec<Run>,
    nodes: Vec<Run>,
}

impl Walk<'_> {
    fn tree(&mut self, bytes: &[u8], depth: u16) -> Result<()> {
        const ENTRY: usize = 12;
        let damaged = |what: &str| Error::Unreadable(format!("its file system is damaged: {what}"));
        let header = ExtentHeader::parse(bytes)?;
        if header.depth != depth || depth > fs_ext4::extent::EXT4_EXT_MAX_DEPTH {
            return Err(damaged("an extent tree's depth"));
        }
        let size = self.fs.block_bytes();
        let blocks = self.fs.fs.sb.blocks_count;
        for entry in bytes.chunks_exact(ENTRY).skip(1).take(usize::from(header.entries)) {
            if depth > 0 {
                let block = ExtentIdx::parse(entry)?.leaf_block;
                if block >= blocks || self.nodes.len() >= MAX_RUNS {
                    return Err(damaged("an extent tree's node"));
                }
                let mut node = vec![0; size as usize];
                self.fs.device.read(block * size, &mut node).map_err(fs_ext4::error::Error::Io)?;
                self.nodes.push(Run { logical: 0, physical: block * size, len: size });
                let before = self.next;
                self.tree(&node, depth - 1)?;
                if self.next == before {
                    return Err(damaged("an extent tree's node that says nothing"));
                }
                continue;
            }
            let extent: Extent = Extent::parse(entry)?;
            let (first, count) = (u64::from(extent.logical_block), u64::from(extent.length));
            let end = extent.physical_block.checked_add(count);
            if first < self.next || count == 0 || end.is_none_or(|end| end > blocks) || self.runs.len() >= MAX_RUNS {
                return Err(damaged("an extent"));
            }
            self.next = first + count;
            if !extent.uninitialized {
                let (logical, physical) = (first * size, extent.physical_block * size);
                self.runs.push(Run { logical, physical, len: count * size });
            }
        }
        Ok(())
    }
}

/// A regular file that is being read.
pub struct File {
    node: Node,
    /// None: the library knows where its content is.
    runs: Option<Vec<Run>>,
}

impl File {
    /// What it is.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Offset and length of what is between its holes, in order, with the end as the last if a hole is there; none if its
    /// holes are not worth the trouble, or too many.
    fn pieces(&self) -> Option<Vec<(u64, u64)>> {
        let size = self.node.size();
        let mut pieces: Vec<(u64, u64)> = Vec::new();
        for run in self.runs.as_ref()?.iter().take_while(|run| run.logical < size) {
            let end = (run.logical + run.len).min(size);
            match pieces.last_mut() {
                Some((at, len)) if run.logical - (*at + *len) < MIN_HOLE => *len = end - *at,
                _ => pieces.push((run.logical, end - run.logical)),
            }
        }
        let data: u64 = pieces.iter().map(|(_, len)| len).sum();
        if size - data < MIN_HOLES || pieces.len() > MAX_PIECES {
            return None;
        }
        if pieces.last().is_none_or(|(at, len)| at + len < size) {
            pieces.push((size, 0));
        }
        Some(pieces)
    }
}

/// Directories have one place. A tree in which one comes up again has no end.
#[derive(Debug, Default)]
struct Visited(HashSet<u32>);

impl Visited {
    fn enter(&mut self, ino: u32) -> Result<()> {
        if self.0.insert(ino) {
            return Ok(());
        }
        Err(Error::Unreadable(format!("its file system is damaged: directory {ino} is in two places")))
    }
}

/// An access control list as system calls show it; on the disk it has a form of its own.
fn access_list(stored: &[u8]) -> Result<Vec<u8>> {
    let mut shown = 2_u32.to_le_bytes().to_vec();
    for entry in fs_ext4::acl::decode(stored)? {
        shown.extend((entry.tag as u16).to_le_bytes());
        shown.extend(entry.perm.to_le_bytes());
        shown.extend(entry.id.unwrap_or(u32::MAX).to_le_bytes());
    }
    Ok(shown)
}

fn entry(entry: fs_ext4::dir::DirEntry) -> Entry {
    use fs_ext4::dir::DirEntryType;
    // A file system without types in its directories does not say.
    let is_directory = matches!(entry.file_type, DirEntryType::Directory | DirEntryType::Unknown);
    Entry { name: entry.name, ino: entry.inode, is_directory }
}

/// The names of a path, last first.
fn names(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path.split(|b| *b == b'/').filter(|name| !name.is_empty() && *name != b".");
    let mut names: Vec<_> = names.map(<[u8]>::to_vec).collect();
    names.reverse();
    names
}
