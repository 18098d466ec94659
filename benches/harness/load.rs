//! Data to write, files to write it to beside ours, and cold caches.

use std::fs::File;
use std::path::Path;
use storage::medium::sim::Random;
use storage::{Disk, DiskId, Options, Store};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// A store in a directory of its own that does only what it is told to.
pub fn quiet_store() -> (Store, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { background: false, ..Options::default() };
    (Store::open(dir.path(), options).expect("a store"), dir)
}

/// A new disk.
pub fn new_disk(store: &Store, name: &str, size: u64) -> (DiskId, Disk) {
    let mut tx = store.begin();
    let id = tx.create_disk(name, size);
    tx.commit_durable().expect("a commit");
    (id, store.disk(id).expect("it is there"))
}

/// Text of made-up words: no two blocks alike, and about as compressible as the files of a root file system.
pub fn text(random: &mut Random, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        // A quarter of the words is new, the others come from 4096 known ones.
        let bits = random.bits();
        let mut word = if bits & 3 == 0 { bits >> 8 } else { Random(bits >> 2 & 0xfff).bits() };
        for _ in 0..3 + word % 7 {
            out.push(b'a' + (word % 26) as u8);
            word /= 26;
        }
        out.push(b' ');
    }
    out.truncate(len);
    out
}

/// Drops what the kernel has cached of all files below a directory. They have to be synced.
pub fn forget_files(dir: &Path) {
    for entry in std::fs::read_dir(dir).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            forget_files(&path);
        } else if path.is_file() {
            forget_file(&File::open(path).expect("a file"));
        }
    }
}

/// Drops what the kernel has cached of a file.
pub fn forget_file(file: &File) {
    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    nix::fcntl::posix_fadvise(file, 0, 0, advice).expect("advice is taken");
}

/// Opens a file past the page cache.
pub fn open_direct(path: &Path) -> File {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = nix::fcntl::OFlag::O_DIRECT.bits();
    File::options().read(true).write(true).create(true).truncate(false).custom_flags(flags).open(path).expect("a file")
}

/// Memory that O_DIRECT takes.
#[repr(C, align(4096))]
pub struct Aligned(pub [u8; MIB as usize]);

impl Aligned {
    pub fn zeroed() -> Box<Self> {
        // SAFETY: all-zero bytes are a valid array.
        unsafe { Box::new_zeroed().assume_init() }
    }
}
