//! A store that version 1 wrote, kept in the repository: every later program has to read it.
//!
//! `golden/` has the files whose bytes `docs/format.md` defines: STORE, a pack of each kind and the log. The catalogue is
//! made from them by repair. To add a store of a later version: `cargo test -p storage -- --ignored golden::write`.

use crate::ops::{expand, options};
use std::fs;
use std::path::{Path, PathBuf};
use storage::{BLOCK_SIZE, Source, Store};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

const SIZE: u64 = 8 << 20;

#[test]
#[ignore = "writes the golden store; run by hand when the format's version changes"]
fn write() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), options()).unwrap();
    let mut tx = store.begin();
    let first = tx.create_disk("first", SIZE);
    tx.put_record("kind", "key", "a record");
    tx.commit_durable().unwrap();
    let disk = store.disk(first).unwrap();
    let run: Vec<u8> = (1..700).flat_map(expand).collect();
    disk.write(0, &run).unwrap();
    // Every other block: more extents than a leaf of extents holds.
    for i in 0..400 {
        disk.write((1000 + 2 * i) * BLOCK_SIZE as u64, &expand(5 + i as u16 % 3)).unwrap();
    }
    store.seal().unwrap();
    let mut tx = store.begin();
    let _ = tx.snapshot(first, "snapshot");
    let fork = tx.fork(Source::Disk(first), "fork");
    tx.commit_durable().unwrap();
    store.disk(fork).unwrap().discard(0, 300 * BLOCK_SIZE as u64).unwrap();
    store.disk(fork).unwrap().write(40 * BLOCK_SIZE as u64, &expand(9)).unwrap();
    store.seal().unwrap();
    store.disk(fork).unwrap().write(7 * BLOCK_SIZE as u64, &expand(77)).unwrap();
    store.disk(fork).unwrap().write_zeroes(400 * BLOCK_SIZE as u64, 4096 * 5).unwrap();
    store.flush().unwrap();
    drop((disk, store));
    let to = golden();
    drop(fs::remove_dir_all(&to));
    for part in ["STORE", "log", "packs"] {
        let from = dir.path().join(part);
        let files =
            if from.is_dir() { fs::read_dir(&from).unwrap().map(|e| e.unwrap().path()).collect() } else { vec![from] };
        for file in files {
            let mut bytes = fs::read(&file).unwrap();
            // Space that was only reserved is not kept.
            let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
            if part == "log" {
                bytes.truncate(used + 8);
            }
            let target = to.join(file.strip_prefix(dir.path()).unwrap());
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            fs::write(target, bytes).unwrap();
        }
    }
}

#[test]
fn a_store_of_version_1_opens_and_reads() {
    let dir = tempfile::tempdir().unwrap();
    for part in ["packs", "log"] {
        fs::create_dir(dir.path().join(part)).unwrap();
        for file in fs::read_dir(golden().join(part)).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), dir.path().join(part).join(file.file_name())).unwrap();
        }
    }
    fs::copy(golden().join("STORE"), dir.path().join("STORE")).unwrap();
    let report = Store::repair(dir.path()).unwrap();
    assert_eq!((report.disks, report.snapshots, report.records), (2, 1, 1), "{report:?}");
    assert_eq!(report.damage, [""; 0]);
    let store = Store::open(dir.path(), options()).unwrap();

    let mut first = vec![0; SIZE as usize];
    for (i, block) in first.chunks_mut(BLOCK_SIZE).enumerate() {
        match i {
            0..699 => block.copy_from_slice(&expand(i as u16 + 1)),
            1000..1800 if i % 2 == 0 => block.copy_from_slice(&expand(5 + (i as u16 - 1000) / 2 % 3)),
            _ => {}
        }
    }
    let mut fork = first.clone();
    fork[..300 * BLOCK_SIZE].fill(0);
    fork[40 * BLOCK_SIZE..41 * BLOCK_SIZE].copy_from_slice(&expand(9));
    fork[7 * BLOCK_SIZE..8 * BLOCK_SIZE].copy_from_slice(&expand(77));
    fork[400 * BLOCK_SIZE..405 * BLOCK_SIZE].fill(0);
    let mut got = vec![0; SIZE as usize];
    store.seal().unwrap();
    for round in 0..2 {
        for (name, want) in [("first", &first), ("fork", &fork)] {
            store.disk(store.disk_by_name(name).unwrap().id).unwrap().read(0, &mut got).unwrap();
            assert!(got == *want, "{name}");
        }
        store.snapshot(store.snapshots()[0].id).unwrap().read(0, &mut got).unwrap();
        assert!(got == first, "the snapshot");
        // Its packs do not say at which level they were written.
        assert_eq!(store.repack().unwrap().packs_rewritten > 0, round == 0);
        store.drop_caches();
    }
    assert_eq!(store.record("kind", "key").unwrap(), "a record");
}

#[test]
fn a_store_of_a_later_version_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path(), options()).unwrap());
    let path = dir.path().join("STORE");
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 2;
    let crc = crc32c::crc32c(&bytes[..60]).to_le_bytes();
    bytes[60..].copy_from_slice(&crc);
    fs::write(&path, bytes).unwrap();
    let refused = Store::open(dir.path(), options()).err().unwrap();
    assert_eq!(refused.kind(), storage::ErrorKind::UnsupportedVersion);
    assert!(refused.to_string().contains("version 2"), "{refused}");
}
