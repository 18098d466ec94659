//! Reads of sealed data: random hits and misses at depth 1 and 10 000, the same with 32 at once beside a raw file and qcow2,
//! and sequential ones against zstd.
//!
//! `cargo bench --bench read_path [-- --json FILE]`. The two depths are read in turn, round by round. Both disks had the
//! same writes; one got them all itself, the other's ancestors one each. *hit*: decoded blocks are cached; *miss*: they
//! are not, but the kernel has the packs; *cold*: it has not. *A core* is data by processor time of the whole process: on
//! a machine with other work that says more than the clock does. Unsealed data is in `write_path`.

mod harness;

use harness::load::{Aligned, GIB, MIB, forget_files, new_disk, open_direct, quiet_store, text};
use harness::{Report, Samples, cpu_seconds, median, tools};
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;
use storage::medium::sim::Random;
use storage::{Disk, Options, Source, Store};

const BLOCK: usize = 4096;
const ROUNDS: usize = 9;
const DEPTH: u64 = 10_000;
/// What is read at random; it fits the cache.
const DATA: u64 = 192 * MIB;
const READS: usize = 4000;
/// Reads under way at once, and how many each thread does of them.
const DEPTH_OF_QUEUE: usize = 32;
const READS_A_THREAD: usize = 500;
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

/// Random reads of 4 KiB a second, with this many threads that each wait for theirs.
fn queue(round: usize, read: impl Fn(u64, &mut [u8]) + Sync) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..DEPTH_OF_QUEUE {
            let read = &read;
            scope.spawn(move || {
                let mut random = Random((round * DEPTH_OF_QUEUE + thread) as u64 + 1);
                let mut block = Aligned::zeroed();
                for _ in 0..READS_A_THREAD {
                    read(random.below(DATA / BLOCK as u64) * BLOCK as u64, &mut block.0[..BLOCK]);
                }
            });
        }
    });
    (DEPTH_OF_QUEUE * READS_A_THREAD) as f64 / start.elapsed().as_secs_f64()
}

/// Reads a second of `qemu-img bench`, which goes through the image in steps that are no neighbours.
fn qcow2(image: &Path, cache: &str) -> Result<f64, String> {
    let count = (DEPTH_OF_QUEUE * READS_A_THREAD).to_string();
    let depth = DEPTH_OF_QUEUE.to_string();
    let args: [&dyn AsRef<std::ffi::OsStr>; 14] = [
        &"bench", &"-f", &"qcow2", &"-t", &cache, &"-c", &count, &"-d", &depth, &"-s", &"4096", &"-S", &"1576960",
        &image,
    ];
    let start = Instant::now();
    tools::run("qemu-img", &args)?;
    Ok((DEPTH_OF_QUEUE * READS_A_THREAD) as f64 / start.elapsed().as_secs_f64())
}

/// Many reads at once, beside a raw file past the page cache and qcow2.
fn queued(report: &mut Report) {
    let (store, dir) = quiet_store();
    let (_, disk) = new_disk(&store, "disk", DATA);
    fill(&disk, DATA, &mut Random(1));
    store.seal().expect("sealing");
    let raw = dir.path().join("raw");
    let file = File::create(&raw).expect("a file");
    let mut random = Random(1);
    (0..DATA / MIB).for_each(|i| file.write_all_at(&text(&mut random, MIB as usize), i * MIB).expect("a write"));
    file.sync_all().expect("a sync");
    let direct = open_direct(&raw);
    let image = dir.path().join("image.qcow2");
    let made = tools::run("qemu-img", &[&"convert", &"-O", &"qcow2", &raw, &image]);
    let made = made.and_then(|_| File::open(&image).and_then(|f| f.sync_all()).map_err(|e| e.to_string()));
    if let Err(e) = &made {
        report.missing("qcow2", e);
    }
    let ours = |at: u64, block: &mut [u8]| disk.read(at, block).expect("a read");
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        read_all(&disk);
        let hit = queue(round, ours);
        store.drop_caches();
        let miss = queue(round, ours);
        store.drop_caches();
        forget_files(dir.path());
        let cold = queue(round, ours);
        let direct = queue(round, |at, block| direct.read_exact_at(block, at).expect("a read"));
        let qcow2 = |cache| if made.is_ok() { qcow2(&image, cache).unwrap_or(f64::NAN) } else { f64::NAN };
        let _warm = qcow2("writeback");
        rounds.push([hit, miss, cold, direct, qcow2("writeback"), qcow2("none")]);
    }
    let column = |i: usize| median(rounds.iter().map(|r| r[i]).collect());
    let ratio = |a: usize, b: usize| median(rounds.iter().map(|r| r[a] / r[b]).collect());
    let case = |what: &str| format!("4 KiB random, {DEPTH_OF_QUEUE} at once, {what}");
    for (i, what) in ["hit", "miss", "cold"].into_iter().enumerate() {
        report.row("miosa", &case(what), "median", column(i), "reads/s");
        report.row("miosa", &case(what), "ratio to raw direct", ratio(i, 3), "x");
    }
    report.row("raw direct", &case("cold"), "median", column(3), "reads/s");
    if made.is_ok() {
        report.row("qcow2", &case("page cache"), "median", column(4), "reads/s");
        report.row("qcow2", &case("direct"), "median", column(5), "reads/s");
        report.row("miosa", &case("hit"), "ratio to qcow2, page cache", ratio(0, 4), "x");
        report.row("miosa", &case("cold"), "ratio to qcow2, direct", ratio(2, 5), "x");
    }
}

/// MiB a second, and by processor time.
fn timed(bytes: u64, work: impl FnOnce()) -> [f64; 2] {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    work();
    [start.elapsed().as_secs_f64(), cpu_seconds() - cpu].map(|seconds| bytes as f64 / MIB as f64 / seconds)
}

/// This many threads decode 64 KiB frames.
fn zstd(threads: usize, frames: &[Vec<u8>]) -> [f64; 2] {
    let decode = || {
        let mut decoder = zstd::bulk::Decompressor::new().expect("a decoder");
        let mut out = vec![0; 64 << 10];
        for frame in frames {
            black_box(decoder.decompress_to_buffer(frame, &mut out).expect("a frame"));
        }
    };
    timed((threads * frames.len() * 64) as u64 * 1024, || {
        std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(decode))));
    })
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
    let read = |size: u64| {
        let mut chunk = vec![0; size as usize];
        timed(SEQUENTIAL, || {
            (0..SEQUENTIAL / size).for_each(|i| disk.read(i * size, &mut chunk).expect("a read"));
        })
    };
    let sizes = [("1 MiB", MIB), ("128 KiB", 128 << 10), ("4 KiB", 4 << 10)];
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let mut row = vec![zstd(1, &frames), zstd(cores, &frames)];
        for (_, size) in sizes {
            store.drop_caches();
            forget_files(dir.path());
            row.push(read(size));
            store.drop_caches();
            row.push(read(size));
        }
        rounds.push(row);
    }
    let column = |i: usize, by: usize| median(rounds.iter().map(|r| r[i][by]).collect());
    let ratio = |a: usize, b: usize, by: usize| median(rounds.iter().map(|r| r[a][by] / r[b][by]).collect());
    report.row("zstd", "decoding, 1 core", "median", column(0, 0), "MiB/s");
    report.row("zstd", &format!("decoding, {cores} cores"), "median", column(1, 0), "MiB/s");
    report.row("zstd", "decoding", "a core", column(1, 1), "MiB/s");
    for (i, (size, _)) in sizes.iter().enumerate() {
        for (j, what) in ["cold", "packs warm"].into_iter().enumerate() {
            let (case, at) = (format!("sequential read, {size}, sealed, {what}"), 2 + 2 * i + j);
            report.row("miosa", &case, "median", column(at, 0), "MiB/s");
            report.row("miosa", &case, "a core", column(at, 1), "MiB/s");
            report.row("miosa", &case, "ratio to zstd, 1 core", ratio(at, 0, 0), "x");
            report.row("miosa", &case, "ratio to zstd, all cores", ratio(at, 1, 0), "x");
            report.row("miosa", &case, "a core, ratio to zstd", ratio(at, 1, 1), "x");
        }
    }
}

fn main() {
    let mut report = Report::new("read_path");
    if report.wants("random") {
        random(&mut report);
    }
    if report.wants("queue") {
        queued(&mut report);
    }
    if report.wants("sequential") {
        sequential(&mut report);
    }
}
