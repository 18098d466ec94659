//! Packing cold data again: it takes less space, once, and everything reads as before.

use crate::ops::{expand, options};
use std::path::Path;
use std::time::{Duration, Instant};
use storage::medium::sim::Random;
use storage::{BLOCK_SIZE, Options, RepackReport, Source, Store};

const BLOCKS: usize = 4000;

/// Blocks that differ and compress.
fn content(seed: u64) -> Vec<u8> {
    let mut random = Random(seed << 32 | 1);
    let words: Vec<u64> = (0..500).map(|_| random.bits()).collect();
    (0..BLOCKS * BLOCK_SIZE / 8).flat_map(|_| words[random.below(500) as usize].to_le_bytes()).collect()
}

fn open(dir: &Path) -> Store {
    Store::open(dir, options()).unwrap()
}

fn write(store: &Store, name: &str, bytes: &[u8]) -> Source {
    let mut tx = store.begin();
    let id = tx.create_disk(name, bytes.len() as u64);
    tx.commit_durable().unwrap();
    store.disk(id).unwrap().write(0, bytes).unwrap();
    Source::Disk(id)
}

fn check(store: &Store, source: Source, bytes: &[u8]) {
    store.drop_caches();
    let disk = store.open_source(source).unwrap();
    let mut random = Random(7);
    let mut block = [0; BLOCK_SIZE];
    for _ in 0..200 {
        let at = random.below(BLOCKS as u64) as usize * BLOCK_SIZE;
        disk.read(at as u64, &mut block).unwrap();
        assert!(block == bytes[at..at + BLOCK_SIZE]);
    }
    store.drop_caches();
    let mut all = vec![0; bytes.len()];
    disk.read(0, &mut all).unwrap();
    assert!(all == bytes);
}

#[test]
fn it_takes_less_space_once_and_reads_as_before() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let contents = [content(1), content(2)];
    let disks = ["a", "b"].map(|name| write(&store, name, &contents[usize::from(name == "b")]));
    store.seal().unwrap();
    let before = store.stats().unwrap();
    let report = store.repack().unwrap();
    let after = store.stats().unwrap();
    assert!(report.packs_rewritten > 0 && report.after_bytes * 100 < report.before_bytes * 95, "{report:?}");
    assert!(after.pack_bytes * 100 < before.pack_bytes * 95, "{before:?}, {after:?}");
    disks.iter().zip(&contents).for_each(|(disk, bytes)| check(&store, *disk, bytes));
    assert_eq!(store.repack().unwrap(), RepackReport::default(), "never twice");
    assert_eq!(store.check().unwrap().damage, [""; 0]);

    // What a collection leaves of it stays as tight, and what is stored again is found.
    let Source::Disk(gone) = disks[0] else { unreachable!() };
    let mut tx = store.begin();
    tx.delete_disk(gone);
    tx.commit_durable().unwrap();
    assert!(store.gc(false).unwrap().packs_rewritten > 0);
    assert_eq!(store.repack().unwrap(), RepackReport::default(), "never twice, a collection between");
    write(&store, "c", &contents[1]);
    assert_eq!(store.seal().unwrap().new_blocks, 0);
    check(&store, disks[1], &contents[1]);
    drop(store);

    // The packs themselves say how they were packed.
    std::fs::remove_dir_all(dir.path().join("catalogue")).unwrap();
    assert_eq!(Store::repair(dir.path()).unwrap().damage, [""; 0]);
    let store = open(dir.path());
    check(&store, disks[1], &contents[1]);
    assert_eq!(store.repack().unwrap(), RepackReport::default(), "never twice, a repair between");
}

/// zstd makes numbers in decimal a quarter larger at level 9 than at level 1.
#[test]
fn what_a_higher_level_makes_larger_stays_at_the_lower() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let bytes: Vec<u8> = (0..1u32 << 19).flat_map(|i| format!("{:16}", i.wrapping_mul(i)).into_bytes()).collect();
    let disk = write(&store, "numbers", &bytes);
    store.seal().unwrap();
    let report = store.repack().unwrap();
    assert!(report.packs_rewritten > 0 && report.after_bytes * 100 < report.before_bytes * 105, "{report:?}");
    let mut all = vec![0; bytes.len()];
    store.open_source(disk).unwrap().read(0, &mut all).unwrap();
    assert!(all == bytes);
}

#[test]
fn a_level_of_zero_or_no_higher_one_means_never() {
    for repack_level in [0, 1] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Options { repack_level, ..options() }).unwrap();
        write(&store, "a", &content(1));
        store.seal().unwrap();
        assert_eq!(store.repack().unwrap(), RepackReport::default());
    }
}

#[test]
fn a_damaged_pack_is_left_alone_and_the_others_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let disks = [1, 2, 3].map(|seed| {
        let disk = write(&store, &seed.to_string(), &content(seed));
        store.seal().unwrap();
        (disk, seed)
    });
    let mut packs: Vec<_> = std::fs::read_dir(dir.path().join("packs")).unwrap().map(|e| e.unwrap().path()).collect();
    packs.sort();
    let mut bytes = std::fs::read(&packs[1]).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle] ^= 1;
    std::fs::write(&packs[1], bytes).unwrap();
    store.drop_caches();
    let report = store.repack().unwrap();
    assert_eq!((report.packs_rewritten, report.packs_damaged), (2, 1));
    assert!(packs[1].exists(), "somebody may yet get something out of it");
    for (disk, seed) in [&disks[0], &disks[2]] {
        check(&store, *disk, &content(*seed));
    }
    assert!(!store.check().unwrap().damage.is_empty());
}

#[test]
fn an_idle_store_does_it_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let now = Duration::from_millis(1);
    let store = Store::open(dir.path(), Options { idle: now, repack_after: now, ..Options::default() }).unwrap();
    let disk = write(&store, "a", &content(1));
    store.flush().unwrap();
    let packs = || {
        let files = std::fs::read_dir(dir.path().join("packs")).unwrap();
        files.filter_map(|e| std::fs::read(e.unwrap().path()).ok()).collect::<Vec<_>>()
    };
    let deadline = Instant::now() + Duration::from_secs(120);
    // The header's level.
    while !packs().iter().any(|pack| pack.get(36) == Some(&9)) {
        assert!(Instant::now() < deadline, "nothing was packed again");
        std::thread::sleep(Duration::from_millis(50));
    }
    check(&store, disk, &content(1));
    let mut other = content(1);
    other[..BLOCK_SIZE].copy_from_slice(&expand(1));
    let again = write(&store, "b", &other);
    store.seal().unwrap();
    check(&store, again, &other);
}
