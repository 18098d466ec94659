//! Damage to packs and to the catalogue: found, attributed, healed where a copy exists, repaired from the packs.

use crate::ops::options;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use storage::medium::sim::Random;
use storage::{BLOCK_SIZE, DiskId, ErrorKind, Source, Store};

const BLOCKS: usize = 256;

fn open(dir: &Path) -> Store {
    Store::open(dir, options()).unwrap()
}

fn create(store: &Store, name: &str, bytes: &[u8]) -> DiskId {
    let mut tx = store.begin();
    let id = tx.create_disk(name, (BLOCKS * BLOCK_SIZE) as u64);
    tx.commit_durable().unwrap();
    store.disk(id).unwrap().write(0, bytes).unwrap();
    id
}

fn read(store: &Store, source: Source) -> storage::Result<Vec<u8>> {
    let mut bytes = vec![0; BLOCKS * BLOCK_SIZE];
    store.open_source(source)?.read(0, &mut bytes).map(|()| bytes)
}

fn noise(seed: u64) -> Vec<u8> {
    let mut random = Random(seed << 32);
    (0..BLOCKS * BLOCK_SIZE / 8).flat_map(|_| random.bits().to_le_bytes()).collect()
}

fn packs(dir: &Path) -> Vec<PathBuf> {
    let mut packs: Vec<_> = fs::read_dir(dir.join("packs")).unwrap().map(|e| e.unwrap().path()).collect();
    packs.retain(|p| p.extension().is_some_and(|e| e == "pack"));
    packs.sort();
    packs
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn a_damaged_block_is_an_error_and_the_report_names_who_is_hurt() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let hurt = create(&store, "hurt", &noise(1));
    store.seal().unwrap();
    let well = create(&store, "well", &noise(2));
    store.seal().unwrap();
    // In the first frame of the first disk's pack.
    flip(&packs(dir.path())[0], 1000);
    store.drop_caches();
    assert_eq!(read(&store, Source::Disk(hurt)).unwrap_err().kind(), ErrorKind::Damaged);
    assert!(read(&store, Source::Disk(well)).unwrap() == noise(2));
    let report = store.scrub(true).unwrap();
    assert_eq!(report.healed, 0);
    assert!(report.damage.iter().any(|d| d.contains("pack 0000000000000001")), "{:?}", report.damage);
    assert!(report.damage.iter().any(|d| d.contains("disk-1 (hurt): the block at byte 0 ")), "{:?}", report.damage);
    assert!(report.damage.iter().all(|d| !d.contains("well")), "{:?}", report.damage);
    // The other blocks of the disk are still there, and a write makes the disk whole again.
    let disk = store.disk(hurt).unwrap();
    let mut last = vec![0; BLOCK_SIZE];
    disk.read(((BLOCKS - 1) * BLOCK_SIZE) as u64, &mut last).unwrap();
    assert!(last == noise(1)[(BLOCKS - 1) * BLOCK_SIZE..]);
    disk.write(0, &noise(3)[..16 * BLOCK_SIZE]).unwrap();
    store.seal().unwrap();
    store.gc(false).unwrap();
    assert_eq!(store.check().unwrap().damage, [""; 0]);
}

#[test]
fn scrub_heals_from_memory_and_from_a_second_copy() {
    let dir = tempfile::tempdir().unwrap();
    let roomy = storage::Options { cache_bytes: 64 << 20, ..options() };
    let store = Store::open(dir.path(), roomy).unwrap();
    let id = create(&store, "d", &noise(1));
    store.seal().unwrap();
    let pack = packs(dir.path())[0].clone();
    // From memory: the cache has what was read.
    assert!(read(&store, Source::Disk(id)).unwrap() == noise(1));
    flip(&pack, 5000);
    assert!(!store.check().unwrap().damage.is_empty());
    let report = store.scrub(true).unwrap();
    assert!(report.healed > 0 && report.damage.is_empty(), "{report:?}");
    store.drop_caches();
    assert!(read(&store, Source::Disk(id)).unwrap() == noise(1));

    // From a copy: a store that was opened again without its index stores the same content a second time.
    store.gc(false).unwrap();
    drop(store);
    let small = storage::Options { index_digests: 1, ..options() };
    let store = Store::open(dir.path(), small).unwrap();
    let other = create(&store, "copy", &noise(1));
    store.seal().unwrap();
    let first = packs(dir.path()).into_iter().find(|p| fs::metadata(p).unwrap().len() > 500_000).unwrap();
    for at in [3000, 200_000, 400_000] {
        flip(&first, at);
    }
    store.drop_caches();
    let report = store.scrub(true).unwrap();
    assert!(report.healed > 0 && report.damage.is_empty(), "{report:?}");
    store.drop_caches();
    for disk in [id, other] {
        assert!(read(&store, Source::Disk(disk)).unwrap() == noise(1));
    }
    assert_eq!(store.check().unwrap().damage, [""; 0]);
}

#[test]
fn damaged_tables_of_a_pack_are_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let id = create(&store, "d", &noise(1));
    store.seal().unwrap();
    let pack = packs(dir.path())[0].clone();
    let len = fs::metadata(&pack).unwrap().len();
    flip(&pack, len - 200);
    flip(&pack, len - 2000);
    let report = store.scrub(true).unwrap();
    assert!(report.damage.is_empty(), "{report:?}");
    store.drop_caches();
    assert!(read(&store, Source::Disk(id)).unwrap() == noise(1));
    assert_eq!(store.check().unwrap().damage, [""; 0]);
}

#[test]
fn a_lost_catalogue_is_made_again_from_packs_and_log() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let first = create(&store, "first", &noise(1));
    store.seal().unwrap();
    let mut tx = store.begin();
    let snapshot = tx.snapshot(first, "snapshot");
    let fork = tx.fork(Source::Disk(first), "fork");
    tx.put_record("kind", "key", "value");
    tx.commit_durable().unwrap();
    store.disk(fork).unwrap().write(0, &noise(2)[..40 * BLOCK_SIZE]).unwrap();
    store.seal().unwrap();
    let gone = create(&store, "gone", &noise(3));
    store.seal().unwrap();
    let mut tx = store.begin();
    tx.delete_disk(gone);
    tx.commit_durable().unwrap();
    store.gc(false).unwrap();
    // In the log only.
    store.disk(first).unwrap().write(0, &noise(4)[..9 * BLOCK_SIZE]).unwrap();
    store.flush().unwrap();
    let sources = [Source::Disk(first), Source::Disk(fork), Source::Snapshot(snapshot)];
    let before: Vec<_> = sources.iter().map(|s| read(&store, *s).unwrap()).collect();
    drop(store);

    fs::remove_dir_all(dir.path().join("catalogue")).unwrap();
    let refused = Store::open(dir.path(), options()).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Damaged);
    assert!(refused.to_string().contains("miosa store repair"), "{refused}");
    let report = Store::repair(dir.path()).unwrap();
    assert_eq!((report.disks, report.snapshots, report.records), (2, 1, 1), "{report:?}");
    assert_eq!(report.damage, [""; 0]);
    let store = open(dir.path());
    let after: Vec<_> = sources.iter().map(|s| read(&store, *s).unwrap()).collect();
    assert!(before == after);
    assert_eq!(store.record("kind", "key").unwrap(), "value");
    assert_eq!(store.disk_by_name("fork").unwrap().id, fork);
    // New things do not collide with old ones.
    let new = create(&store, "new", &noise(5));
    store.seal().unwrap();
    assert!(read(&store, Source::Disk(new)).unwrap() == noise(5));
    assert_eq!(store.check().unwrap().damage, [""; 0]);
}

/// RocksDB takes a damaged end of its own log for one that was not written, so the catalogue may be as it was earlier.
#[test]
fn an_older_catalogue_is_refused_and_what_a_repair_needs_is_left() {
    for (collected, sealed) in [(false, false), (true, false), (false, true), (true, true)] {
        let dir = tempfile::tempdir().unwrap();
        let (catalogue, older) = (dir.path().join("catalogue"), dir.path().join("older"));
        let store = open(dir.path());
        let first = create(&store, "first", &noise(1));
        let gone = create(&store, "gone", &noise(2));
        store.seal().unwrap();
        drop(store);
        fs::create_dir(&older).unwrap();
        for entry in fs::read_dir(&catalogue).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), older.join(entry.file_name())).unwrap();
        }
        let store = open(dir.path());
        let second = create(&store, "second", &noise(3));
        store.seal().unwrap();
        if collected {
            let mut tx = store.begin();
            tx.delete_disk(gone);
            tx.commit_durable().unwrap();
            store.gc(false).unwrap();
        }
        // The log goes on behind what was sealed, and that is what tells; or there is no log, and the file CHECKPOINT does.
        store.disk(first).unwrap().write(0, &noise(4)[..9 * BLOCK_SIZE]).unwrap();
        if sealed {
            store.seal().unwrap();
        }
        store.close().unwrap();
        let sources = [first, second].map(Source::Disk);
        let before = sources.map(|s| read(&store, s).unwrap());
        drop(store);

        fs::remove_dir_all(&catalogue).unwrap();
        fs::rename(&older, &catalogue).unwrap();
        let refused = Store::open(dir.path(), options()).err().expect("an older catalogue was taken");
        assert_eq!(refused.kind(), ErrorKind::Damaged, "{refused}");
        let report = Store::repair(dir.path()).unwrap();
        assert_eq!(report.damage, [""; 0]);
        let store = open(dir.path());
        assert!(before == sources.map(|s| read(&store, s).unwrap()), "collected: {collected}, sealed: {sealed}");
    }
}

#[test]
fn a_damaged_note_of_the_checkpoint_says_nothing_and_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let note = dir.path().join("CHECKPOINT");
    let store = open(dir.path());
    let disk = create(&store, "disk", &noise(1));
    store.seal().unwrap();
    drop(store);
    for damage in [Vec::new(), vec![0; 64], vec![7; 64], fs::read(&note).unwrap()[..40].to_vec()] {
        fs::write(&note, damage).unwrap();
        let store = open(dir.path());
        assert!(read(&store, Source::Disk(disk)).unwrap() == noise(1));
        store.disk(disk).unwrap().write(0, &noise(1)).unwrap();
        store.seal().unwrap();
    }
    assert!(fs::read(&note).unwrap().starts_with(b"MIOSACHK"));
}

#[test]
fn repair_takes_over_what_a_broken_pack_still_holds() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let first = create(&store, "first", &noise(1));
    store.seal().unwrap();
    let second = create(&store, "second", &noise(2));
    store.seal().unwrap();
    drop(store);
    let pack = packs(dir.path())[0].clone();
    let len = fs::metadata(&pack).unwrap().len();
    // The footer goes, and with it the first pack's manifest: its disk is lost, the later one's is not.
    flip(&pack, len - 10);
    let report = Store::repair(dir.path()).unwrap();
    assert!(report.damage.iter().any(|d| d.contains("footer")), "{report:?}");
    assert!(pack.with_extension("damaged").exists() && report.old_catalogue.unwrap().exists());
    let store = open(dir.path());
    assert!(read(&store, Source::Disk(second)).unwrap() == noise(2));
    assert!(store.disk(first).is_err());
    assert_eq!(store.check().unwrap().damage, [""; 0]);
}

#[test]
fn repair_does_not_bring_back_what_was_deleted_and_collected() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let kept = create(&store, "kept", &noise(1));
    let gone = create(&store, "gone", &noise(2));
    let mut tx = store.begin();
    tx.put_record("kind", "gone", "value");
    tx.commit_durable().unwrap();
    store.seal().unwrap();
    let mut tx = store.begin();
    tx.delete_disk(gone);
    tx.delete_record("kind", "gone");
    tx.commit_durable().unwrap();
    store.seal().unwrap();
    // The pack that says that they are gone is itself collected.
    for _ in 0..3 {
        store.gc(false).unwrap();
    }
    drop(store);
    fs::remove_dir_all(dir.path().join("catalogue")).unwrap();
    let report = Store::repair(dir.path()).unwrap();
    assert_eq!((report.disks, report.records), (1, 0), "{report:?}");
    assert_eq!(report.damage, [""; 0]);
    assert!(read(&open(dir.path()), Source::Disk(kept)).unwrap() == noise(1));
}

#[test]
fn a_damaged_log_is_refused_and_repair_goes_on_without_what_is_behind_the_damage() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let id = create(&store, "d", &noise(1));
    store.seal().unwrap();
    let disk = store.disk(id).unwrap();
    // Each flush testifies that the one before was durable.
    for part in 0..8 {
        let at = part * 16 * BLOCK_SIZE;
        disk.write(at as u64, &noise(2)[at..at + 16 * BLOCK_SIZE]).unwrap();
        disk.flush().unwrap();
    }
    drop((disk, store));
    let log = fs::read_dir(dir.path().join("log")).unwrap().next().unwrap().unwrap().path();
    flip(&log, 250_000);
    let refused = Store::open(dir.path(), options()).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Damaged);
    assert!(refused.to_string().contains("miosa store repair"), "{refused}");
    let report = Store::repair(dir.path()).unwrap();
    assert!(report.damage.iter().any(|d| d.contains("the log is damaged")), "{report:?}");
    assert!(report.old_log.unwrap().read_dir().unwrap().count() > 0);
    // Twice: a repaired store opens like any other.
    for _ in 0..2 {
        let store = open(dir.path());
        let found = read(&store, Source::Disk(id)).unwrap();
        let new = (0..8).take_while(|part| {
            let at = part * 16 * BLOCK_SIZE;
            found[at..at + 16 * BLOCK_SIZE] == noise(2)[at..at + 16 * BLOCK_SIZE]
        });
        let new = new.count() * 16 * BLOCK_SIZE;
        assert!(new > 0 && new < 8 * 16 * BLOCK_SIZE, "{new} bytes from before the damage");
        assert!(found[new..] == noise(1)[new..]);
    }
}

#[test]
fn healed_blocks_survive_collections_and_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let roomy = storage::Options { cache_bytes: 64 << 20, ..options() };
    let store = Store::open(dir.path(), roomy).unwrap();
    let first = create(&store, "first", &noise(1));
    store.seal().unwrap();
    assert!(read(&store, Source::Disk(first)).unwrap() == noise(1));
    flip(&packs(dir.path())[0], 5000);
    // With something in the log, which the scrub's checkpoint seals.
    let second = create(&store, "second", &noise(2));
    let report = store.scrub(true).unwrap();
    assert!(report.healed > 0 && report.damage.is_empty(), "{report:?}");
    let mut tx = store.begin();
    tx.delete_disk(first);
    tx.commit_durable().unwrap();
    store.gc(false).unwrap();
    // The same content again, after its blocks were healed elsewhere, died and were collected.
    let third = create(&store, "third", &noise(1));
    store.seal().unwrap();
    store.drop_caches();
    assert!(read(&store, Source::Disk(second)).unwrap() == noise(2));
    assert!(read(&store, Source::Disk(third)).unwrap() == noise(1));
    assert_eq!(store.check().unwrap().damage, [""; 0]);
}

#[test]
fn diff_of_different_sizes_takes_what_is_not_there_for_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let small = create(&store, "small", &noise(1)[..4 * BLOCK_SIZE]);
    let mut tx = store.begin();
    let large = tx.create_disk("large", 4 << 20);
    tx.commit_durable().unwrap();
    let disk = store.disk(large).unwrap();
    disk.write(0, &noise(1)[..4 * BLOCK_SIZE]).unwrap();
    disk.write(3 << 20, &noise(2)[..BLOCK_SIZE]).unwrap();
    for _ in 0..2 {
        let found = store.diff(Source::Disk(small), Source::Disk(large)).unwrap();
        let want = storage::DiffRange { offset: 3 << 20, bytes: BLOCK_SIZE as u64 };
        assert_eq!(found, [want]);
        assert_eq!(store.diff(Source::Disk(large), Source::Disk(small)).unwrap(), [want]);
        store.seal().unwrap();
    }
}
