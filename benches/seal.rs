//! What sealing takes in: new data, data that is stored already, data that does not compress.
//!
//! `cargo bench --bench seal [-- --json FILE]`. *per core* is data by processor time of the whole process. The limit is
//! BLAKE3 and zstd on the same data in one thread, which is the least that new data costs.
//!
//! *ingest* is a guest that writes more than the log may hold, with sealing in the background; it ends when all is sealed.
//! *written* is what this process gave the kernel to write, by what the guest wrote.

mod harness;

use harness::load::{GIB, MIB, new_disk, quiet_store, text};
use harness::{Report, cpu_seconds, median};
use std::hint::black_box;
use std::time::Instant;
use storage::medium::sim::Random;
use storage::{Disk, Options, Store};

const DATA: u64 = 256 * MIB;
const ROUNDS: u64 = 3;
/// What a guest writes in the ingest cases.
const INGEST: u64 = GIB;

/// MB/s by the clock and by processor time.
fn timed(bytes: u64, f: impl FnOnce()) -> [f64; 2] {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    f();
    [start.elapsed().as_secs_f64(), cpu_seconds() - cpu].map(|seconds| bytes as f64 / 1e6 / seconds)
}

/// Bytes that this process has made the kernel write.
fn bytes_written() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").expect("the kernel counts I/O");
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).expect("the count of bytes written")
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
    timed(DATA, || {
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

/// MB/s by the clock and by processor time, and bytes written by bytes taken in.
fn ingest_round(unique: bool) -> [f64; 3] {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { log_bytes: 128 * MIB, log_bytes_max: 512 * MIB, ..Options::default() };
    let store = Store::open(dir.path(), options).expect("a store");
    let mut random = Random(1);
    let mut data = text(&mut random, DATA as usize);
    if !unique {
        let first = new_disk(&store, "first", DATA).1;
        data.chunks(MIB as usize).enumerate().for_each(|(i, c)| first.write(i as u64 * MIB, c).expect("a write"));
        store.seal().expect("sealing");
    }
    let disk = new_disk(&store, "disk", INGEST).1;
    let before = bytes_written();
    let [clock, cpu] = timed(INGEST, || {
        for i in 0..INGEST / MIB {
            let at = (i % (DATA / MIB) * MIB) as usize;
            let chunk = &mut data[at..at + MIB as usize];
            if unique {
                chunk.chunks_mut(4096).for_each(|b| b[..8].copy_from_slice(&random.bits().to_le_bytes()));
            }
            disk.write(i * MIB, chunk).expect("a write");
        }
        store.seal().expect("sealing");
    });
    [clock, cpu, (bytes_written() - before) as f64 / INGEST as f64]
}

fn ingest(report: &mut Report) {
    for (case, unique) in [("ingest, unique text", true), ("ingest, stored already", false)] {
        let rounds: Vec<_> = (0..ROUNDS).map(|_| ingest_round(unique)).collect();
        for (i, (metric, unit)) in [("median", "MB/s"), ("per core", "MB/s"), ("written", "of it")].iter().enumerate() {
            report.row("miosa", case, metric, median(rounds.iter().map(|r| r[i]).collect()), unit);
        }
    }
}

fn main() {
    let mut report = Report::new("seal");
    if report.wants("ingest") {
        ingest(&mut report);
    }
    if report.wants("seal") {
        seals(&mut report);
    }
}

fn seals(report: &mut Report) {
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
