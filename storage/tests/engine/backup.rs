//! Copies of a whole store that is in use.

use crate::ops::options;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use storage::{DiskId, ErrorKind, Options, Source, Store};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 512;

fn open(dir: &Path) -> Store {
    Store::open(dir, options()).unwrap()
}

/// A block that says which one it is and which of its versions.
fn block(at: u64, version: u64) -> Vec<u8> {
    let mut random = storage::medium::sim::Random(at << 32 | version);
    let mut bytes: Vec<u8> = (0..BLOCK / 8).flat_map(|_| random.bits().to_le_bytes()).collect();
    bytes[..8].copy_from_slice(&version.to_le_bytes());
    bytes
}

fn version(store: &Store, disk: DiskId, at: u64) -> u64 {
    let mut bytes = vec![0; BLOCK as usize];
    store.disk(disk).unwrap().read(at * BLOCK, &mut bytes).unwrap();
    let version = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(version == 0 || bytes == block(at, version), "block {at} is neither of its versions");
    version
}

#[test]
fn a_copy_has_all_that_was_flushed_before_it_while_everything_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (place, copies) = (dir.path().join("store"), dir.path().join("copies"));
    let store = Store::open(&place, Options { background: true, ..options() }).unwrap();
    let mut tx = store.begin();
    let disk = tx.create_disk("disk", BLOCKS * BLOCK);
    tx.commit_durable().unwrap();
    let flushed: Vec<AtomicU64> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let handle = store.disk(disk).unwrap();
            let mut random = storage::medium::sim::Random(1);
            let mut round = 0;
            while !over.load(Ordering::Relaxed) {
                round += 1;
                let at: Vec<u64> = (0..16).map(|_| random.below(BLOCKS)).collect();
                at.iter().for_each(|at| handle.write(at * BLOCK, &block(*at, round)).unwrap());
                handle.flush().unwrap();
                at.iter().for_each(|at| flushed[*at as usize].store(round, Ordering::SeqCst));
            }
        });
        scope.spawn(|| {
            for round in 0.. {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let mut tx = store.begin();
                let fork = tx.fork(Source::Disk(disk), &format!("fork-{round}"));
                tx.commit_durable().unwrap();
                store.seal().unwrap();
                let mut tx = store.begin();
                tx.delete_disk(fork);
                tx.commit_durable().unwrap();
                store.gc(false).unwrap();
            }
        });
        for number in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(200));
            let before: Vec<u64> = flushed.iter().map(|version| version.load(Ordering::SeqCst)).collect();
            let to = copies.join(format!("copy-{number}"));
            let report = store.backup(&to).unwrap();
            assert_eq!(report.copied_bytes, 0, "packs are shared on one file system");
            let copy = open(&to);
            assert_eq!(copy.check().unwrap().damage, [""; 0]);
            for (at, before) in before.iter().enumerate() {
                assert!(version(&copy, disk, at as u64) >= *before, "copy {number} lacks what block {at} had");
            }
            // It lives on by itself.
            copy.disk(disk).unwrap().write(0, &block(0, u64::MAX)).unwrap();
            copy.seal().unwrap();
            copy.gc(false).unwrap();
            assert_eq!(version(&copy, disk, 0), u64::MAX);
        }
        over.store(true, Ordering::Relaxed);
    });
    let last: Vec<u64> = (0..BLOCKS).map(|at| version(&store, disk, at)).collect();
    assert!(last.iter().all(|version| *version < u64::MAX) && last.iter().any(|version| *version > 0));

    // The store's end is nothing to its copies.
    let mut tx = store.begin();
    tx.delete_disk(disk);
    tx.commit_durable().unwrap();
    store.gc(false).unwrap();
    drop(store);
    std::fs::remove_dir_all(&place).unwrap();
    let copy = open(&copies.join("copy-4"));
    assert_eq!((version(&copy, disk, 0), copy.check().unwrap().damage.len()), (u64::MAX, 0));
}

#[test]
fn a_copy_takes_no_place_that_is_taken_and_leaves_nothing_when_it_fails() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store"));
    let to = dir.path().join("copy");
    std::fs::create_dir(&to).unwrap();
    assert_eq!(store.backup(&to).unwrap_err().kind(), ErrorKind::InvalidInput);
    std::fs::remove_dir(&to).unwrap();
    // What was cut off before does not get in the way.
    std::fs::create_dir(dir.path().join(".copy.partial")).unwrap();
    std::fs::write(dir.path().join(".copy.partial/STORE"), "half").unwrap();
    store.backup(&to).unwrap();
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    // A place that cannot be.
    std::fs::write(dir.path().join("file"), "").unwrap();
    assert_eq!(store.backup(&dir.path().join("file/copy")).unwrap_err().kind(), ErrorKind::Io);
}
