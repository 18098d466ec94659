//! Garbage collection: what is deleted comes back, what is kept stays, and the figures agree with what happens.

use crate::ops::{expand, options};
use std::path::Path;
use storage::{BLOCK_SIZE, Disk, DiskId, Source, Store};

fn open(dir: &Path) -> Store {
    Store::open(dir, options()).unwrap()
}

fn create(store: &Store, name: &str) -> (DiskId, Disk) {
    let mut tx = store.begin();
    let id = tx.create_disk(name, 64 << 20);
    tx.commit_durable().unwrap();
    (id, store.disk(id).unwrap())
}

/// Blocks that do not compress and that no other seed has.
fn noise(seed: u64, blocks: usize) -> Vec<u8> {
    let mut random = storage::medium::sim::Random(seed << 32);
    (0..blocks * BLOCK_SIZE / 8).flat_map(|_| random.bits().to_le_bytes()).collect()
}

#[test]
fn deleting_gives_back_the_exclusive_bytes_and_nothing_else_changes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (a, disk_a) = create(&store, "a");
    disk_a.write(0, &noise(1, 2000)).unwrap();
    let mut tx = store.begin();
    let b = tx.fork(Source::Disk(a), "b");
    tx.commit_durable().unwrap();
    let disk_b = store.disk(b).unwrap();
    // Every other block of a part of what they share becomes the fork's own, and more behind it.
    let own = noise(2, 2000);
    for i in 0..500 {
        disk_b.write(2 * i * BLOCK_SIZE as u64, &own[i as usize * BLOCK_SIZE..][..BLOCK_SIZE]).unwrap();
    }
    disk_b.write(8192 * BLOCK_SIZE as u64, &own[500 * BLOCK_SIZE..]).unwrap();
    store.seal().unwrap();

    let usage = store.usage_of(Source::Disk(b)).unwrap();
    assert_eq!(usage.logical_bytes, (2000 + 1500) * BLOCK_SIZE as u64);
    assert!(usage.exclusive_bytes > 2000 * BLOCK_SIZE as u64 && usage.exclusive_bytes < 2100 * BLOCK_SIZE as u64);
    assert!(usage.referenced_bytes > usage.exclusive_bytes + 1400 * BLOCK_SIZE as u64);
    let nothing = store.gc(true).unwrap();
    assert_eq!((nothing.dead_blocks, nothing.bytes_freed), (0, 0));

    let mut before = vec![0; 64 << 20];
    disk_a.read(0, &mut before).unwrap();
    let packs = store.stats().unwrap().pack_bytes;
    let mut tx = store.begin();
    tx.delete_disk(b);
    tx.commit_durable().unwrap();
    let dry = store.gc(true).unwrap();
    assert!(dry.dry_run && dry.dead_blocks >= 2000);
    assert_eq!(store.stats().unwrap().pack_bytes, packs, "a dry run changes nothing");
    store.gc(false).unwrap();
    let freed = packs - store.stats().unwrap().pack_bytes;
    assert!(freed as f64 >= 0.95 * usage.exclusive_bytes as f64, "{freed} of {} came back", usage.exclusive_bytes);
    assert_eq!(store.check().unwrap().damage, [""; 0]);
    store.drop_caches();
    let mut after = vec![0; 64 << 20];
    disk_a.read(0, &mut after).unwrap();
    assert!(before == after);
    assert_eq!(store.gc(false).unwrap().bytes_freed, 0, "nothing is left to collect");
    drop((disk_a, disk_b, store));
    let store = open(dir.path());
    store.disk(a).unwrap().read(0, &mut after).unwrap();
    assert!(before == after, "after reopening");
}

/// The canary of a destroyed disk is nowhere in the store's files after a collection.
#[test]
fn what_was_deleted_is_gone_from_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (kept, keep) = create(&store, "kept");
    keep.write(0, &noise(3, 100)).unwrap();
    let (gone, disk) = create(&store, "gone");
    let canary = noise(4, 100);
    disk.write(0, &canary).unwrap();
    store.seal().unwrap();
    let needle = &canary[5000..5032];
    let hits = || {
        let files = ["packs", "log", "catalogue"].map(|d| std::fs::read_dir(dir.path().join(d)).unwrap());
        let files = files.into_iter().flatten().map(|f| std::fs::read(f.unwrap().path()).unwrap());
        files.filter(|bytes| bytes.windows(needle.len()).any(|w| w == needle)).count()
    };
    assert_eq!(hits(), 1, "the canary is there to be found");
    let mut tx = store.begin();
    tx.delete_disk(gone);
    tx.commit_durable().unwrap();
    store.gc(false).unwrap();
    assert_eq!(hits(), 0);
    assert_eq!(store.logical_bytes(Source::Disk(kept)).unwrap(), 100 * BLOCK_SIZE as u64);
}

/// A block that was dead at the mark and is written again is stored again, not found in a pack that is about to go.
#[test]
fn content_that_comes_back_after_its_deletion_is_intact() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for round in 0..10u16 {
        let (id, disk) = create(&store, &format!("round-{round}"));
        // Half is the same every round.
        let tags: Vec<u8> = (0..600).flat_map(|i| expand(if i % 2 == 0 { i } else { round * 1000 + i })).collect();
        disk.write(0, &tags).unwrap();
        store.seal().unwrap();
        let mut got = vec![0; tags.len()];
        store.drop_caches();
        disk.read(0, &mut got).unwrap();
        assert!(got == tags, "round {round}");
        let mut tx = store.begin();
        tx.delete_disk(id);
        tx.commit_durable().unwrap();
        store.gc(false).unwrap();
        assert_eq!(store.check().unwrap().damage, [""; 0]);
    }
}

/// Deleting is enough: the space comes back in the background.
#[test]
fn the_background_gives_back_what_was_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let options = storage::Options { idle: std::time::Duration::from_millis(1), ..storage::Options::default() };
    let store = Store::open(dir.path(), options).unwrap();
    let (id, disk) = create(&store, "d");
    disk.write(0, &noise(1, 2000)).unwrap();
    store.seal().unwrap();
    let before = store.stats().unwrap().pack_bytes;
    assert!(before > 8_000_000);
    let mut tx = store.begin();
    tx.delete_disk(id);
    tx.commit_durable().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while store.stats().unwrap().pack_bytes > before / 100 {
        assert!(std::time::Instant::now() < deadline, "nothing came back");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}
