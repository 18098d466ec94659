//! A driver of our own on a vhost-user disk, 32 requests deep, while the background churns and the daemon is killed: every
//! read is of what was written last.

use std::collections::HashMap;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::churn::Churn;
use crate::driver::{Driver, Settings};
use crate::lab::{Chance, Daemon, MIB, Start, amount, seed, work_dir};
use crate::ledger::block;

const BLOCK: usize = 4096;
const BLOCKS: u64 = 24 * MIB / BLOCK as u64;
/// Blocks of the largest request.
const MOST: u64 = 16;

struct InFlight {
    kind: u32,
    first: u64,
    blocks: u64,
    /// What a read has to find.
    wanted: Vec<u64>,
}

#[test]
fn every_read_is_of_the_last_write_through_kills_of_the_daemon() {
    let seed = seed();
    let requests = amount("MIOSA_RING_REQUESTS", 24_000, 3_000_000);
    let every = amount("MIOSA_RING_KILL_EVERY", 4_000, 15_000);
    let dir = work_dir();
    let mut daemon = Daemon::start(&dir.path().join("s"), Start::busy());
    daemon.create("ring", BLOCKS * BLOCK as u64);
    let socket = daemon.attach("ring", "vhost-user");
    let settings =
        Settings { ring_size: 128, slot_bytes: MOST as usize * BLOCK, inflight: true, ..Settings::default() };
    let mut driver = Driver::connect(&socket, settings).unwrap();
    let churn = Churn::start(&daemon, "ring", seed, true);
    let mut chance = Chance::new(seed);
    let mut model = vec![0_u64; BLOCKS as usize];
    let mut in_flight: HashMap<u16, InFlight> = HashMap::new();
    let (mut submitted, mut completed, mut kills, mut next_kill) = (0, 0, 0, every);
    while completed < requests {
        while submitted < requests && in_flight.len() < 32 {
            let blocks = 1 + chance.below(MOST);
            let first = chance.below(BLOCKS - blocks);
            let kind = match chance.below(100) {
                0..=47 => VIRTIO_BLK_T_OUT,
                48..=91 => VIRTIO_BLK_T_IN,
                92..=94 => VIRTIO_BLK_T_DISCARD,
                95..=97 => VIRTIO_BLK_T_WRITE_ZEROES,
                _ => VIRTIO_BLK_T_FLUSH,
            };
            let over =
                |f: &InFlight| f.kind != VIRTIO_BLK_T_FLUSH && f.first < first + blocks && first < f.first + f.blocks;
            if kind != VIRTIO_BLK_T_FLUSH && in_flight.values().any(over) {
                continue;
            }
            submitted += 1;
            let range = first as usize..(first + blocks) as usize;
            let mut output = Vec::new();
            let (mut sector, mut input) = (0, 0);
            match kind {
                VIRTIO_BLK_T_OUT => {
                    sector = first * 8;
                    model[range.clone()].fill(submitted);
                    output = range.clone().flat_map(|n| block(0, n as u64, submitted)).collect();
                }
                VIRTIO_BLK_T_IN => (sector, input) = (first * 8, blocks as usize * BLOCK),
                VIRTIO_BLK_T_FLUSH => {}
                _ => {
                    model[range.clone()].fill(0);
                    output.extend((first * 8).to_le_bytes());
                    output.extend((blocks as u32 * 8).to_le_bytes());
                    output.extend([0; 4]);
                }
            }
            let slot = driver.queues[0].submit(kind, sector, &output, input).expect("a free slot");
            in_flight.insert(slot, InFlight { kind, first, blocks, wanted: model[range].to_vec() });
        }
        if completed >= next_kill {
            next_kill += every;
            kills += 1;
            daemon.again();
            assert_eq!(daemon.attach("ring", "vhost-user"), socket);
            driver.reconnect(&socket).unwrap();
        }
        let done = driver.queues[0].complete().unwrap();
        let request = in_flight.remove(&done.slot).unwrap();
        assert_eq!(done.status, 0, "a request of kind {} failed: {}", request.kind, daemon.log());
        completed += 1;
        if request.kind == VIRTIO_BLK_T_IN {
            let mut found = vec![0; request.blocks as usize * BLOCK];
            driver.queues[0].take(done.slot, &mut found);
            check(request.first, &request.wanted, &found, completed);
        }
    }
    let background = churn.end();
    // As a fork and as a file, all of it.
    daemon.cli(&["disk", "fork", "ring", "--name", "after"]);
    let copy = std::fs::read(daemon.attach("after", "fuse")).unwrap();
    check(0, &model, &copy, completed);
    drop(driver);
    assert!(daemon.stop());
    println!("vhost-user: {completed} requests at depth 32, {kills} kills, {background} things in the background");
}

fn check(first: u64, wanted: &[u64], found: &[u8], completed: u64) {
    for (i, (wanted, found)) in wanted.iter().zip(found.chunks(BLOCK)).enumerate() {
        let number = first + i as u64;
        let right = if *wanted == 0 { vec![0; BLOCK] } else { block(0, number, *wanted) };
        assert!(found == right, "after {completed} requests: block {number} is not as of request {wanted}");
    }
}
