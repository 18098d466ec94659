//! What sealing takes in: new data, data that is stored already, data that does not compress.
//!
//! `cargo bench --bench seal [-- --json FILE]`. *per core* is data by processor time of the whole process. The limit is
//! BLAKE3 and zstd on the same data in one thread, which is the least that new data costs.

mod harness;

use harness::load::{MIB, new_disk, quiet_store, text};
use harness::{Report, cpu_seconds, median};
use std::hint::black_box;
use std::time::Instant;
use storage::medium::sim::Random;
use storage::{Disk, Options, Store};

const DATA: u64 = 256 * MIB;
const ROUNDS: u64 = 3;

/// MB/s by the clock and by processor time.
fn timed(f: impl FnOnce()) -> [f64; 2] {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    f();
    [start.elapsed().as_secs_f64(), cpu_seconds() - cpu].map(|seconds| DATA as f64 / 1e6 / seconds)
}

fn noise(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len / 8).flat_map(|_| random.bits().to_le_bytes()).collect()
}

type Make = fn(&mut Random, usize) -> Vec<u8>;

fn fill(disk: &Disk, make: Make, seed: u64) {
    let mut random = Random(seed);
    (0..DATA / MIB).for_each(|i| disk.write(i * MIB, &make(&mut random, MIB as usize)).expect("a write"));
    disk.flush().expect("a flush");
}

fn seal(store: &Store, share_new: f64) -> [f64; 2] {
    timed(|| {
        let report = store.seal().expect("sealing");
        let new = report.new_blocks as f64 / report.blocks as f64;
        assert!((new - share_new).abs() < 0.05, "{new} of the blocks were new");
    })
}

fn limit(make: Make) -> [f64; 2] {
    let data = make(&mut Random(1), (DATA / 8) as usize);
    let mut codec = zstd::bulk::Compressor::new(Options::default().level).expect("a compressor");
    let start = Instant::now();
    for group in data.chunks(64 << 10) {
        group.chunks(4096).for_each(|block| _ = black_box(blake3::hash(block)));
        black_box(codec.compress(group).expect("it compresses"));
    }
    [data.len() as f64 / 1e6 / start.elapsed().as_secs_f64(); 2]
}

fn main() {
    let mut report = Report::new("seal");
    for (what, make) in [("text", text as Make), ("noise", noise)] {
        let mut rounds = Vec::new();
        for round in 0..ROUNDS {
            let (store, _dir) = quiet_store();
            fill(&new_disk(&store, "first", DATA).1, make, round + 1);
            let new = seal(&store, 1.0);
            fill(&new_disk(&store, "second", DATA).1, make, round + 1);
            rounds.push([new, seal(&store, 0.0), limit(make)]);
        }
        for (i, case) in ["new", "stored already"].into_iter().enumerate() {
            let case = format!("{what}, {case}");
            report.row("miosa", &case, "median", median(rounds.iter().map(|r| r[i][0]).collect()), "MB/s");
            report.row("miosa", &case, "per core", median(rounds.iter().map(|r| r[i][1]).collect()), "MB/s");
        }
        let case = format!("{what}, new");
        report.row("limit", &case, "blake3 + zstd, a core", median(rounds.iter().map(|r| r[2][0]).collect()), "MB/s");
        let ratio = rounds.iter().map(|r| r[0][1] / r[2][1]).collect();
        report.row("miosa", &case, "per core, ratio to limit", median(ratio), "x");
    }
}
