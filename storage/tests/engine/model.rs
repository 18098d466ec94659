//! Random operations against the model, on a simulated medium and on a real directory.

use crate::ops::{Held, Run, source};
use std::collections::BTreeMap;
use storage::medium::sim::{Random, SimMedium};
use storage::{BLOCK_SIZE, DiskId, Options, Source, Store};

#[test]
fn the_store_agrees_with_the_model() {
    for seed in 0..60 {
        let mut run = Run::start(seed, SimMedium::new()).expect("a fresh store");
        for step in 0..120 {
            run.step().unwrap_or_else(|e| panic!("seed {seed} step {step}: {e:?}"));
            if step % 20 == 19 {
                run.check();
            }
            if step % 30 == 29 {
                run.reopen().unwrap_or_else(|e| panic!("seed {seed} step {step}: {e:?}"));
                run.check();
            }
        }
    }
}

/// What differs between any two states is exactly what the model says.
#[test]
fn diff_finds_exactly_what_differs() {
    let mut compared = 0;
    for seed in 300..320 {
        let mut run = Run::start(seed, SimMedium::new()).expect("a fresh store");
        for _ in 0..80 {
            run.step().unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
        }
        let now = run.history.last().expect("never empty").clone();
        for (a, Held { tags: x, .. }) in &now {
            for (b, Held { tags: y, .. }) in &now {
                let found = run.store.diff(source(*a), source(*b)).expect("a diff");
                let blocks: Vec<u64> = found
                    .iter()
                    .flat_map(|r| r.offset / BLOCK_SIZE as u64..(r.offset + r.bytes) / BLOCK_SIZE as u64)
                    .collect();
                let want: Vec<u64> = (0..x.len() as u64).filter(|i| x[*i as usize] != y[*i as usize]).collect();
                assert_eq!(blocks, want, "seed {seed}: {a:?} against {b:?}");
                compared += usize::from(!want.is_empty());
            }
        }
    }
    assert!(compared > 50, "too few states differed");
}

#[test]
fn a_fork_cannot_be_smaller_or_of_an_odd_size() {
    let run = Run::start(1, SimMedium::new()).expect("a fresh store");
    let mut tx = run.store.begin();
    let disk = tx.create_disk("disk", 8 << 20);
    tx.commit_durable().unwrap();
    for size in [4 << 20, (8 << 20) + 1, 1 << 60] {
        let mut tx = run.store.begin();
        tx.fork_larger(Source::Disk(disk), "fork", size);
        assert_eq!(tx.commit_durable().unwrap_err().kind(), storage::ErrorKind::InvalidInput, "{size}");
    }
    assert_eq!(run.store.disks().len(), 1);
}

/// Unaligned reads and writes, on a real directory with RocksDB, io_uring or plain calls, and sealing in the background.
#[test]
fn unaligned_access_on_a_real_directory_agrees_with_a_byte_array() {
    for (seed, backend) in [(1, storage::Backend::Auto), (2, storage::Backend::Plain)] {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { backend, log_bytes: 1 << 20, idle: std::time::Duration::ZERO, ..Options::default() };
        let mut store = Store::open(dir.path(), options.clone()).unwrap();
        // One leaf; larger forks have a tree.
        let size = 3 << 19;
        let mut random = Random(seed);
        let mut tx = store.begin();
        let first = tx.create_disk("first", size as u64);
        tx.commit_durable().unwrap();
        let mut model: BTreeMap<Source, Vec<u8>> = [(Source::Disk(first), vec![0; size])].into();
        let mut disks: Vec<DiskId> = vec![first];
        for step in 0..600 {
            let id = disks[random.below(disks.len() as u64) as usize];
            let disk = store.disk(id).unwrap();
            let bytes = model.get_mut(&Source::Disk(id)).unwrap();
            let size = bytes.len();
            let at = random.below(size as u64) as usize;
            let reach = [100, 5000, 300_000][random.below(3) as usize];
            let len = (random.below(reach) as usize).min(size - at);
            match random.below(20) {
                0..9 => {
                    let data: Vec<u8> = (0..len).map(|i| (i / 700) as u8 ^ random.0 as u8).collect();
                    disk.write(at as u64, &data).unwrap();
                    bytes[at..at + len].copy_from_slice(&data);
                }
                9..11 => {
                    disk.write_zeroes(at as u64, len as u64).unwrap();
                    bytes[at..at + len].fill(0);
                }
                11 => {
                    disk.discard(at as u64, len as u64).unwrap();
                    let from = at.next_multiple_of(BLOCK_SIZE);
                    let upto = (at + len) / BLOCK_SIZE * BLOCK_SIZE;
                    if from < upto {
                        bytes[from..upto].fill(0);
                    }
                }
                12 => disk.flush().unwrap(),
                13 if disks.len() < 6 => {
                    let mut tx = store.begin();
                    let larger = size + random.below(3) as usize * (1 << 20);
                    let fork = match larger > size {
                        true => tx.fork_larger(Source::Disk(id), &format!("fork-{step}"), larger as u64),
                        false => tx.fork(Source::Disk(id), &format!("fork-{step}")),
                    };
                    let snapshot = tx.snapshot(id, "snapshot");
                    drop(tx.commit().unwrap());
                    let mut bytes = bytes.clone();
                    model.insert(Source::Snapshot(snapshot), bytes.clone());
                    bytes.resize(larger, 0);
                    model.insert(Source::Disk(fork), bytes);
                    disks.push(fork);
                }
                14 if step % 7 == 0 => drop(store.seal().unwrap()),
                15 if step % 5 == 0 => {
                    store.close().unwrap();
                    drop(disk);
                    drop(store);
                    store = Store::open(dir.path(), options.clone()).unwrap();
                }
                _ => {
                    let mut got = vec![0xee; len];
                    disk.read(at as u64, &mut got).unwrap();
                    assert!(got == bytes[at..at + len], "seed {seed} step {step}: {len} bytes at {at} of {id}");
                }
            }
        }
        for (source, bytes) in &model {
            let mut got = vec![0; bytes.len()];
            store.open_source(*source).unwrap().read(0, &mut got).unwrap();
            assert!(got == *bytes, "seed {seed}: {source}");
        }
    }
}
