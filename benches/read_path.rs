//! Reads of sealed data: random hits and misses at depth 1 and 10 000, and sequential ones against zstd.
//!
//! `cargo bench --bench read_path [-- --json FILE]`. The two depths are read in turn, round by round. Both disks had the
//! same writes; one got them all itself, the other's ancestors one each. *hit*: decoded blocks are cached; *miss*: they
//! are not, but the kernel has the packs. Unsealed data is in `write_path`.

mod harness;

use harness::load::{GIB, MIB, forget_files, new_disk, quiet_store, text};
use harness::{Report, Samples, median};
use std::hint::black_box;
use std::time::Instant;
use storage::medium::sim::Random;
use storage::{Disk, Options, Source, Store};

const BLOCK: usize = 4096;
const ROUNDS: usize = 9;
const DEPTH: u64 = 10_000;
/// What is read at random; it fits the cache.
const DATA: u64 = 192 * MIB;
const READS: usize = 4000;
/// What is read in sequence.
const SEQUENTIAL: u64 = 512 * MIB;

fn fill(disk: &Disk, bytes: u64, random: &mut Random) {
    (0..bytes / MIB).for_each(|i| disk.write(i * MIB, &text(random, MIB as usize)).expect("a write"));
}

/// Two disks with the same content, one at depth 1, one at depth `DEPTH`.
fn two_depths(store: &Store) -> [Disk; 2] {
    let (_, flat) = new_disk(store, "flat", 10 * GIB);
    let (mut id, mut deep) = new_disk(store, "deep", 10 * GIB);
    fill(&flat, DATA, &mut Random(1));
    fill(&deep, DATA, &mut Random(1));
    let mut random = Random(2);
    for level in 1..DEPTH {
        let block = text(&mut random, BLOCK);
        let at = random.below(DATA / BLOCK as u64) * BLOCK as u64;
        flat.write(at, &block).expect("a write");
        let mut tx = store.begin();
        id = tx.fork(Source::Disk(id), &format!("deep-{level}"));
        drop(tx.commit().expect("a fork"));
        deep = store.disk(id).expect("it is there");
        deep.write(at, &block).expect("a write");
    }
    store.flush().expect("a flush");
    [flat, deep]
}

fn random_reads(disk: &Disk, round: usize, samples: &mut Samples) -> f64 {
    let mut random = Random(round as u64 + 1);
    let mut block = [0; BLOCK];
    let start = Instant::now();
    for _ in 0..READS {
        let at = random.below(DATA / BLOCK as u64) * BLOCK as u64;
        samples.time(|| disk.read(at, &mut block).expect("a read"));
        black_box(&block);
    }
    start.elapsed().as_secs_f64() * 1e6 / READS as f64
}

/// Reads both disks at random, in turn. `prepare` runs before each.
fn depths(report: &mut Report, case: &str, disks: &[Disk; 2], prepare: impl Fn(&Disk)) {
    let mut means = [Vec::new(), Vec::new()];
    let mut samples = [Samples::default(), Samples::default()];
    for round in 0..ROUNDS {
        // Neither is always first.
        for i in [round % 2, 1 - round % 2] {
            prepare(&disks[i]);
            means[i].push(random_reads(&disks[i], round, &mut samples[i]));
        }
    }
    for (i, depth) in [1, DEPTH].into_iter().enumerate() {
        let case = format!("4 KiB random, {case}, depth {depth}");
        report.row("miosa", &case, "mean, median of rounds", median(means[i].clone()), "us");
        report.row("miosa", &case, "median", samples[i].quantile_us(0.5), "us");
        report.row("miosa", &case, "p99", samples[i].quantile_us(0.99), "us");
    }
    let ratios = means[0].iter().zip(&means[1]).map(|(flat, deep)| deep / flat).collect();
    report.row("miosa", &format!("4 KiB random, {case}"), "depth 10000 / depth 1", median(ratios), "x");
}

fn read_all(disk: &Disk) {
    let mut chunk = vec![0; MIB as usize];
    (0..DATA / MIB).for_each(|i| disk.read(i * MIB, &mut chunk).expect("a read"));
}

fn random(report: &mut Report) {
    let (store, _dir) = quiet_store();
    let disks = two_depths(&store);
    depths(report, "unsealed", &disks, |_| {});
    store.seal().expect("sealing");
    depths(report, "hit", &disks, read_all);
    depths(report, "miss", &disks, |_| store.drop_caches());
    let memory = vec![1; DATA as usize];
    let mut random = Random(1);
    let mut block = [0; BLOCK];
    let start = Instant::now();
    for _ in 0..100 * READS {
        let at = random.below(DATA / BLOCK as u64) as usize * BLOCK;
        block.copy_from_slice(&memory[at..at + BLOCK]);
        black_box(&block);
    }
    report.row("memcpy", "4 KiB random", "mean", start.elapsed().as_secs_f64() * 1e6 / (100 * READS) as f64, "us");
}

/// What this many threads decode of 64 KiB frames, MiB of data a second.
fn zstd(threads: usize, frames: &[Vec<u8>]) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut decoder = zstd::bulk::Decompressor::new().expect("a decoder");
                let mut out = vec![0; 64 << 10];
                for frame in frames {
                    black_box(decoder.decompress_to_buffer(frame, &mut out).expect("a frame"));
                }
            });
        }
    });
    (threads * frames.len() * 64) as f64 / 1024.0 / start.elapsed().as_secs_f64()
}

fn sequential(report: &mut Report) {
    let (store, dir) = quiet_store();
    let (_, disk) = new_disk(&store, "disk", SEQUENTIAL);
    let mut random = Random(1);
    fill(&disk, SEQUENTIAL, &mut random);
    store.seal().expect("sealing");
    let stats = store.stats().expect("figures");
    report.row("miosa", "sequential read, sealed", "compression", stats.compression_ratio, "x");
    let frames: Vec<_> = (0..2048)
        .map(|_| zstd::bulk::compress(&text(&mut random, 64 << 10), Options::default().level).expect("a frame"))
        .collect();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut rounds = Vec::new();
    let mut chunk = vec![0; MIB as usize];
    for _ in 0..ROUNDS {
        store.drop_caches();
        forget_files(dir.path());
        let start = Instant::now();
        (0..SEQUENTIAL / MIB).for_each(|i| disk.read(i * MIB, &mut chunk).expect("a read"));
        let cold = (SEQUENTIAL / MIB) as f64 / start.elapsed().as_secs_f64();
        store.drop_caches();
        let start = Instant::now();
        (0..SEQUENTIAL / MIB).for_each(|i| disk.read(i * MIB, &mut chunk).expect("a read"));
        let warm = (SEQUENTIAL / MIB) as f64 / start.elapsed().as_secs_f64();
        rounds.push([cold, warm, zstd(1, &frames), zstd(cores, &frames)]);
    }
    let column = |i: usize| median(rounds.iter().map(|r| r[i]).collect());
    let ratio = |a: usize, b: usize| median(rounds.iter().map(|r| r[a] / r[b]).collect());
    let case = "sequential read, sealed, cold";
    report.row("miosa", case, "median", column(0), "MiB/s");
    report.row("miosa", "sequential read, sealed, packs warm", "median", column(1), "MiB/s");
    report.row("zstd", "decoding, 1 core", "median", column(2), "MiB/s");
    report.row("zstd", &format!("decoding, {cores} cores"), "median", column(3), "MiB/s");
    report.row("miosa", case, "ratio to zstd, 1 core", ratio(0, 2), "x");
    report.row("miosa", case, "ratio to zstd, all cores", ratio(0, 3), "x");
    report.row("miosa", "sequential read, sealed, packs warm", "ratio to zstd, 1 core", ratio(1, 2), "x");
    report.row("miosa", "sequential read, sealed, packs warm", "ratio to zstd, all cores", ratio(1, 3), "x");
}

fn main() {
    let mut report = Report::new("read_path");
    if report.wants("random") {
        random(&mut report);
    }
    if report.wants("sequential") {
        sequential(&mut report);
    }
}
