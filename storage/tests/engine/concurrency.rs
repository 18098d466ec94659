//! Many threads on one store, with sealing and garbage collection going on: nobody sees anybody else's writes, nothing is
//! lost, nothing waits for ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use storage::medium::sim::Random;
use storage::{BLOCK_SIZE, Options, Source, Store};

const BLOCKS: u64 = 512;
const WORKERS: u64 = 4;
const ROUNDS: u64 = 60;

/// A block that says who wrote it and when, so that a foreign or stale one shows.
fn block(worker: u64, round: u64, number: u64) -> Vec<u8> {
    let mut bytes = vec![(round % 7) as u8; BLOCK_SIZE];
    bytes[..8].copy_from_slice(&worker.to_le_bytes());
    bytes[8..16].copy_from_slice(&round.to_le_bytes());
    // Only some blocks differ by number: the others are duplicates.
    bytes[16..24].copy_from_slice(&(number % 5).to_le_bytes());
    bytes
}

fn work(store: &Store, worker: u64) {
    let mut random = Random(worker);
    let mut tx = store.begin();
    let mut id = tx.create_disk(&format!("worker-{worker}"), BLOCKS * BLOCK_SIZE as u64);
    tx.commit_durable().expect("a disk");
    let mut model = vec![vec![0; BLOCK_SIZE]; BLOCKS as usize];
    for round in 0..ROUNDS {
        let disk = store.disk(id).expect("the disk is there");
        for _ in 0..40 {
            let number = random.below(BLOCKS);
            let bytes = block(worker, round, number);
            disk.write(number * BLOCK_SIZE as u64, &bytes).expect("a write");
            model[number as usize] = bytes;
        }
        if random.below(3) == 0 {
            disk.flush().expect("a flush");
        }
        // Go on in a fork and delete the parent, with a snapshot between.
        if random.below(4) == 0 {
            let mut tx = store.begin();
            let snapshot = tx.snapshot(id, "s");
            let fork = tx.fork(Source::Disk(id), &format!("worker-{worker}-{round}"));
            tx.delete_disk(id);
            tx.commit_durable().expect("a transaction");
            assert!(disk.write(0, &[0; BLOCK_SIZE]).is_err(), "a deleted disk takes no writes");
            let mut bytes = vec![0; BLOCK_SIZE];
            let number = random.below(BLOCKS);
            let snap = store.snapshot(snapshot).expect("the snapshot is there");
            snap.read(number * BLOCK_SIZE as u64, &mut bytes).expect("a read");
            assert!(bytes == model[number as usize]);
            let mut tx = store.begin();
            tx.delete_snapshot(snapshot);
            drop(tx.commit().expect("a deletion"));
            id = fork;
        }
        let disk = store.disk(id).expect("the disk is there");
        let mut all = vec![0; BLOCKS as usize * BLOCK_SIZE];
        disk.read(0, &mut all).expect("a read");
        for (number, (got, want)) in all.chunks(BLOCK_SIZE).zip(&model).enumerate() {
            assert!(got == want, "worker {worker}, round {round}: block {number}");
        }
    }
}

#[test]
fn workers_sealing_and_collection_do_not_disturb_each_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options {
        log_bytes: 256 << 10,
        log_bytes_max: 1 << 20,
        idle: Duration::ZERO,
        cache_bytes: 4 << 20,
        ..Options::default()
    };
    let store = Store::open(dir.path(), options.clone()).expect("a store");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|w| {
                scope.spawn({
                    let store = &store;
                    move || work(store, w)
                })
            })
            .collect();
        let janitor = scope.spawn(|| {
            let mut collected = 0;
            while !done.load(Ordering::Relaxed) {
                store.seal().expect("sealing");
                collected += store.gc(false).expect("a collection").bytes_freed;
                store.repack().expect("packing again");
                store.drop_caches();
                store.usage().expect("usage");
            }
            collected
        });
        let outcomes: Vec<_> = workers.into_iter().map(|w| w.join()).collect();
        done.store(true, Ordering::Relaxed);
        assert!(janitor.join().expect("the janitor") > 0, "nothing was collected");
        assert!(outcomes.iter().all(Result::is_ok));
    });
    assert_eq!(store.check().expect("a check").damage, [""; 0]);
    store.close().expect("closing");
}
