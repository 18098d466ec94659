//! Sequential reads, which are read ahead: what they return is what random reads return, whatever goes on meanwhile.

use crate::ops::expand;
use std::sync::atomic::{AtomicBool, Ordering};
use storage::medium::sim::Random;
use storage::{BLOCK_SIZE, Disk, Options, Source, Store};

const BLOCKS: u64 = 8192;

/// The tag of a block, and so its content: runs that repeat, and runs that do not.
fn tag(block: u64) -> u16 {
    (if block % 1000 < 300 { block % 100 } else { block }) as u16
}

fn check_reader(disk: &Disk, seed: u64) {
    let mut random = Random(seed);
    for chunk in [1, 5, 32, 256] {
        // Begins and ends anywhere, and now and then skips something.
        let mut at = random.below(BLOCKS / 8);
        while at < BLOCKS {
            let len = chunk.min(BLOCKS - at);
            let mut bytes = vec![0; len as usize * BLOCK_SIZE];
            disk.read(at * BLOCK_SIZE as u64, &mut bytes).unwrap();
            for (i, block) in bytes.chunks(BLOCK_SIZE).enumerate() {
                let number = at + i as u64;
                assert!(block == expand(tag(number)), "seed {seed}: block {number}, read {chunk} at a time");
            }
            at += len + if random.below(50) == 0 { random.below(400) } else { 0 };
        }
    }
}

#[test]
fn interleaved_sequential_reads_agree_with_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    // Room for less than the disk, so that what is read ahead is also evicted.
    let options = Options { background: false, cache_bytes: 16 << 20, node_cache_bytes: 1 << 18, ..Options::default() };
    for round in 0..3 {
        let store = Store::open(dir.path(), options.clone()).unwrap();
        let mut tx = store.begin();
        let id = tx.create_disk(&format!("d{round}"), BLOCKS * BLOCK_SIZE as u64);
        tx.commit_durable().unwrap();
        let disk = store.disk(id).unwrap();
        for block in 0..BLOCKS {
            disk.write(block * BLOCK_SIZE as u64, &expand(tag(block))).unwrap();
            if block == BLOCKS / 2 {
                store.seal().unwrap();
            }
        }
        let mut tx = store.begin();
        let fork = tx.fork(Source::Disk(id), &format!("f{round}"));
        tx.commit_durable().unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..4)
                .map(|seed| {
                    let disk = store.disk(if seed % 2 == 0 { id } else { fork }).unwrap();
                    scope.spawn(move || check_reader(&disk, seed))
                })
                .collect();
            let janitor = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    store.seal().unwrap();
                    store.gc(false).unwrap();
                    store.repack().unwrap();
                    store.drop_caches();
                }
            });
            let outcomes: Vec<_> = readers.into_iter().map(|reader| reader.join()).collect();
            done.store(true, Ordering::Relaxed);
            janitor.join().unwrap();
            assert!(outcomes.iter().all(Result::is_ok));
        });
        // Reading ahead may be under way: it must not keep the store from being opened again.
        check_reader(&disk, 9);
        drop((disk, store));
    }
}
