//! A file system as a guest may leave it on its disk, read without mounting it: every file of it is read, packed into an archive
//! and compared with what it was, or refused, in bounded time and memory. The input says which bytes of a whole one are others now.
//! What the library that reads the format fails at is an error to callers; here only what fails outside of it counts.

#![no_main]

mod panics;
mod store;

use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::{LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use miosa::ext4::{self, FileSystem, Kind, Node};
use storage::{Disk, DiskId, Source, Store};

const SECTOR: usize = 512;
/// Files that are read of one file system; one of which all lead to each other has no end.
const VISITS: usize = 500;

/// A disk with a file system, and which sectors of it have something.
struct Golden {
    disk: DiskId,
    sectors: Vec<u64>,
}

struct Disks {
    store: Store,
    /// With blocks of 4 KiB and of 1 KiB with a journal.
    golden: [Golden; 2],
    runs: u64,
}

static DISKS: LazyLock<Mutex<Disks>> = LazyLock::new(|| {
    panics::allow_in(&["/rust-fs-ext4-", "/library/"]);
    let (store, small) = store::with_disk(2 << 20);
    let mut tx = store.begin();
    let large = tx.create_disk("large", 12 << 20);
    tx.commit().unwrap().wait().unwrap();
    let options: [&[&str]; 2] = [
        &["-b", "4096", "-O", "^has_journal,^metadata_csum,^resize_inode"],
        &["-b", "1024", "-O", "^metadata_csum,^resize_inode", "-J", "size=4"],
    ];
    let golden = [(small.id().unwrap(), options[0]), (large, options[1])].map(|(disk, options)| {
        let handle = store.disk(disk).unwrap();
        let sectors = fill(&handle, options);
        Golden { disk, sectors }
    });
    store.seal().unwrap();
    Mutex::new(Disks { store, golden, runs: 0 })
});

/// Makes a file system on a disk; says which sectors are not zero.
fn fill(disk: &Disk, options: &[&str]) -> Vec<u64> {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("a/b/c")).unwrap();
    let text: Vec<u8> = (0..20_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(tree.join("a/file"), &text).unwrap();
    std::fs::write(tree.join("a/b/small"), b"small").unwrap();
    let sparse = std::fs::File::create(tree.join("sparse")).unwrap();
    for at in [0, 100_000, 300_000] {
        sparse.write_all_at(b"piece", at).unwrap();
    }
    std::fs::hard_link(tree.join("a/file"), tree.join("a/b/again")).unwrap();
    std::os::unix::fs::symlink("a/b", tree.join("short")).unwrap();
    std::os::unix::fs::symlink("x/".repeat(100), tree.join("long")).unwrap();
    for n in 0..60 {
        std::fs::write(tree.join(format!("a/b/c/a-name-that-takes-some-room-{n}")), [n]).unwrap();
    }
    let image = dir.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(disk.size_bytes()).unwrap();
    let mut command = Command::new("mkfs.ext4");
    command.args(["-q", "-F", "-N", "128", "-U", "6d696f73-6100-4000-8000-000000000001", "-E", "nodiscard"]);
    assert!(command.args(options).arg("-d").arg(&tree).arg(&image).status().unwrap().success());
    let bytes = std::fs::read(&image).unwrap();
    for (n, piece) in bytes.chunks(1 << 20).enumerate() {
        disk.write((n << 20) as u64, piece).unwrap();
    }
    let sectors = bytes.chunks(SECTOR).enumerate().filter(|(_, sector)| sector.iter().any(|byte| *byte != 0));
    sectors.map(|(n, _)| n as u64).collect()
}

fuzz_target!(|data: &[u8]| {
    let Some((&which, changes)) = data.split_first() else { return };
    let mut disks = DISKS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let disks = &mut *disks;
    let golden = &disks.golden[usize::from(which & 1)];
    let mut tx = disks.store.begin();
    let fork = tx.fork(Source::Disk(golden.disk), "fork");
    tx.commit().unwrap().wait().unwrap();
    let disk = disks.store.disk(fork).unwrap();
    // Seven bytes a change: which sector, where in it, and what.
    for change in changes.chunks_exact(7) {
        let number = |at: usize| usize::from(u16::from_le_bytes([change[at], change[at + 1]]));
        let at = golden.sectors[number(0) % golden.sectors.len()] * SECTOR as u64 + (number(2) % SECTOR) as u64;
        let len = [1, 2, 4, 8][usize::from(change[4] & 3)];
        let mut bytes = [0; 8];
        disk.read(at.min(disk.size_bytes() - 8), &mut bytes).unwrap();
        match change[4] >> 6 {
            0 => bytes[0] ^= change[5],
            1 => bytes[..len].fill(change[5]),
            2 => bytes[..2].copy_from_slice(&change[5..7]),
            _ => bytes = (u64::from_le_bytes(bytes).wrapping_add(u64::from(change[5]))).to_le_bytes(),
        }
        disk.write(at.min(disk.size_bytes() - 8), &bytes[..len]).unwrap();
    }
    let was = disks.store.disk(golden.disk).unwrap();
    look(disk.clone(), was);
    drop(disk);
    let mut tx = disks.store.begin();
    tx.delete_disk(fork);
    tx.commit().unwrap().wait().unwrap();
    disks.runs += 1;
    if disks.runs.is_multiple_of(256) {
        disks.store.seal().unwrap();
        disks.store.gc(false).unwrap();
    }
});

fn look(disk: Disk, was: Disk) {
    let size = disk.size_bytes();
    let Ok(fs) = ext4::contained(|| FileSystem::open(disk)) else { return };
    let mut left = VISITS;
    let mut waiting: Vec<Node> = ext4::contained(|| fs.root()).into_iter().collect();
    while let Some(node) = waiting.pop() {
        let Some(fewer) = left.checked_sub(1) else { break };
        left = fewer;
        let _ = ext4::contained(|| fs.xattrs(&node));
        let _ = ext4::contained(|| fs.read_link(&node));
        if let Ok(entries) = ext4::contained(|| fs.read_dir(&node)) {
            waiting.extend(entries.iter().filter_map(|entry| ext4::contained(|| fs.node(entry.ino)).ok()));
        }
        if node.kind != Kind::File {
            continue;
        }
        let Ok(file) = ext4::contained(|| fs.open_file(node)) else { continue };
        let mut buffer = vec![0; 64 << 10];
        for offset in [0, 4096, file.node().size().saturating_sub(10), u64::MAX - 1] {
            let _ = ext4::contained(|| fs.read(&file, offset, &mut buffer));
        }
    }
    if let Ok(top) = ext4::contained(|| fs.root()) {
        let _ = ext4::contained_copy(|| ext4::archive::write(&fs, top, "", Bounded(64 << 20)));
    }
    let before = ext4::contained(|| FileSystem::open(was)).unwrap();
    let _ = ext4::contained(|| ext4::diff::diff(&before, &fs, std::iter::once((0, size))));
}

/// Somebody who reads an archive, and not for ever: a file may say that it is very long.
struct Bounded(usize);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 = self.0.checked_sub(bytes.len()).ok_or_else(|| std::io::Error::other("enough"))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
