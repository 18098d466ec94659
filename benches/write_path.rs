//! Writes: flush-heavy small ones on many disks at once, and large sequential ones.
//!
//! `cargo bench --bench write_path [-- --json FILE]`. All systems of a case run in turn, round by round. A ratio is the
//! median of the rounds' ratios: a round's systems ran within seconds of each other.
//!
//! *append + fdatasync* is what no log can beat: one thread appends a block for each writer and syncs once;
//! *overwrite* is that into a file whose blocks have been written before, so that a sync has no metadata to write. *shared
//! loop* is the same with the writers as threads of their own, who hand their blocks to whoever leads and wait.

mod harness;

use harness::load::{Aligned, MIB, forget_file, forget_files, new_disk, open_direct, quiet_store};
use harness::{Report, median, tools};
use parking_lot::{Condvar, Mutex};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use storage::medium::sim::Random;
use storage::{Backend, Options, Store};

const BLOCK: usize = 4096;
const ROUNDS: usize = 7;
const WINDOW: Duration = Duration::from_millis(700);
/// Of each disk or file.
const SIZE: u64 = 16 * MIB;
const SEQUENTIAL: u64 = 512 * MIB;

/// A system and what measures it once.
type Timed<'a> = (&'a str, Box<dyn Fn() -> f64>);

/// Runs `write` in this many threads until the time is up; writes a second.
fn threads(count: usize, write: impl Fn(usize, u64, &[u8]) + Sync) -> f64 {
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..count {
            let (stop, done, write) = (&stop, &done, &write);
            scope.spawn(move || {
                let mut random = Random(thread as u64 + 1);
                let mut block = [0; BLOCK];
                while !stop.load(Ordering::Relaxed) {
                    block[..8].copy_from_slice(&random.bits().to_le_bytes());
                    write(thread, random.below(SIZE / BLOCK as u64) * BLOCK as u64, &block);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        std::thread::sleep(WINDOW);
        stop.store(true, Ordering::Relaxed);
    });
    done.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64()
}

/// Writes a second, and writes for each sync of the log.
fn miosa(count: usize, backend: Backend) -> (f64, f64) {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { background: false, backend, ..Options::default() };
    let store = Store::open(dir.path(), options).expect("a store");
    let disks: Vec<_> = (0..count).map(|i| new_disk(&store, &i.to_string(), SIZE).1).collect();
    let (syncs, written) = (store.log_syncs(), AtomicU64::new(0));
    let rate = threads(count, |i, at, block| {
        disks[i].write(at, block).expect("a write");
        disks[i].flush().expect("a flush");
        written.fetch_add(1, Ordering::Relaxed);
    });
    (rate, written.into_inner() as f64 / (store.log_syncs() - syncs) as f64)
}

fn append_loop(count: usize, prewritten: bool) -> f64 {
    let dir = tempfile::tempdir().expect("a directory");
    let file = File::create(dir.path().join("log")).expect("a file");
    if prewritten {
        (0..256).for_each(|i| file.write_all_at(&[0; MIB as usize], i * MIB).expect("a write"));
        file.sync_all().expect("a sync");
    }
    let blocks = vec![7; count * BLOCK];
    let start = Instant::now();
    let mut rounds = 0;
    while start.elapsed() < WINDOW {
        // A prewritten file that is full is begun again.
        let at = rounds * blocks.len() as u64;
        let at = if prewritten { at % (256 * MIB) } else { at };
        file.write_all_at(&blocks, at).expect("a write");
        file.sync_data().expect("a sync");
        rounds += 1;
    }
    (rounds * count as u64) as f64 / start.elapsed().as_secs_f64()
}

#[derive(Default)]
struct Shared {
    buffer: Vec<u8>,
    appended: u64,
    durable: u64,
    leader: bool,
}

fn shared_loop(count: usize) -> f64 {
    let dir = tempfile::tempdir().expect("a directory");
    let file = File::create(dir.path().join("log")).expect("a file");
    let (state, led) = (Mutex::new(Shared::default()), Condvar::new());
    threads(count, |_, _, block| {
        let mut shared = state.lock();
        shared.buffer.extend_from_slice(block);
        shared.appended += BLOCK as u64;
        let upto = shared.appended;
        while shared.durable < upto {
            if shared.leader {
                led.wait(&mut shared);
                continue;
            }
            shared.leader = true;
            let (buffer, from) = (std::mem::take(&mut shared.buffer), shared.durable);
            drop(shared);
            file.write_all_at(&buffer, from).expect("a write");
            file.sync_data().expect("a sync");
            shared = state.lock();
            shared.durable = from + buffer.len() as u64;
            shared.leader = false;
            led.notify_all();
        }
    })
}

fn written_file(path: &Path) -> File {
    let file = File::create(path).expect("a file");
    (0..SIZE / MIB).for_each(|i| file.write_all_at(&[1; MIB as usize], i * MIB).expect("a write"));
    file.sync_all().expect("a sync");
    file
}

fn raw_files(files: &[File]) -> f64 {
    threads(files.len(), |i, at, block| {
        files[i].write_all_at(block, at).expect("a write");
        files[i].sync_data().expect("a sync");
    })
}

/// One `qemu-img bench` a disk, all at once; each write is followed by a flush.
fn qcow2(count: usize, dir: &Path) -> Result<f64, String> {
    const WRITES: usize = 300;
    let children: Vec<_> = (0..count)
        .map(|i| {
            let path = dir.join(format!("{i}.qcow2"));
            tools::run("qemu-img", &[&"create", &"-f", &"qcow2", &path, &SIZE.to_string()]).expect("an image");
            let mut command = std::process::Command::new("qemu-img");
            command.args(["bench", "-f", "qcow2", "-w", "-s", "4096", "-S", "69632", "-d", "1", "--flush-interval=1"]);
            command.args(["-t", "writeback", "-c", &WRITES.to_string()]).arg(path);
            command.stdout(std::process::Stdio::piped()).spawn().expect("qemu-img starts")
        })
        .collect();
    let mut slowest: f64 = 0.0;
    for child in children {
        let out = child.wait_with_output().map_err(|e| e.to_string())?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let seconds = text.split("completed in ").nth(1).and_then(|t| t.split(' ').next()?.parse().ok());
        slowest = slowest.max(seconds.ok_or_else(|| format!("qemu-img bench said: {text}"))?);
    }
    Ok((count * WRITES) as f64 / slowest)
}

fn flush_heavy(report: &mut Report) {
    for count in [1, 16, 64] {
        if !report.wants(&format!("{count} disks")) {
            continue;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let files: Vec<_> = (0..count).map(|i| written_file(&dir.path().join(i.to_string()))).collect();
        let mut systems: Vec<Timed> = vec![
            ("miosa", Box::new(move || miosa(count, Backend::Auto).0)),
            ("no uring", Box::new(move || miosa(count, Backend::Plain).0)),
            ("append", Box::new(move || append_loop(count, false))),
            ("overwrite", Box::new(move || append_loop(count, true))),
            ("shared", Box::new(move || shared_loop(count))),
            ("raw files", Box::new(move || raw_files(&files))),
        ];
        if tools::has("qemu-img") {
            let dir = dir.path().to_owned();
            systems.push(("qcow2", Box::new(move || qcow2(count, &dir).expect("qemu-img bench works"))));
        } else {
            report.missing("qcow2", "qemu-utils is not installed");
        }
        let case = format!("4 KiB write + flush, {count} disks");
        compare(report, &case, "writes/s", &systems);
        report.row("miosa", &case, "a sync", miosa(count, Backend::Auto).1, "writes");
    }
}

/// Runs the systems in turn; the first is ours.
fn compare(report: &mut Report, case: &str, unit: &str, systems: &[Timed]) {
    let rounds: Vec<Vec<f64>> = (0..ROUNDS).map(|_| systems.iter().map(|(_, run)| run()).collect()).collect();
    for (i, (name, _)) in systems.iter().enumerate() {
        report.row(name, case, "median", median(rounds.iter().map(|r| r[i]).collect()), unit);
        if i > 0 {
            report.row(
                "miosa",
                case,
                &format!("ratio to {name}"),
                median(rounds.iter().map(|r| r[0] / r[i]).collect()),
                "x",
            );
        }
    }
}

fn mib_per_second(bytes: u64, start: Instant) -> f64 {
    bytes as f64 / MIB as f64 / start.elapsed().as_secs_f64()
}

/// All begin with nothing, write 1 MiB at a time and sync once; then read it back cold. *raw buffered* writes through the
/// page cache, as our log does.
fn sequential(report: &mut Report) {
    let (mut writes, mut reads) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let mut buffer = Aligned::zeroed();
        let mut random = Random(round as u64 + 1);
        buffer.0.chunks_mut(8).for_each(|c| c.copy_from_slice(&random.bits().to_le_bytes()));
        let (store, dir) = quiet_store();
        let disk = new_disk(&store, "disk", SEQUENTIAL).1;
        let start = Instant::now();
        (0..SEQUENTIAL / MIB).for_each(|i| disk.write(i * MIB, &buffer.0).expect("a write"));
        disk.flush().expect("a flush");
        let ours = mib_per_second(SEQUENTIAL, start);

        let direct = open_direct(&dir.path().join("direct"));
        let buffered = File::create(dir.path().join("buffered")).expect("a file");
        let [written, through_cache] = [&direct, &buffered].map(|file| {
            let start = Instant::now();
            (0..SEQUENTIAL / MIB).for_each(|i| file.write_all_at(&buffer.0, i * MIB).expect("a write"));
            file.sync_data().expect("a sync");
            mib_per_second(SEQUENTIAL, start)
        });
        writes.push([ours, written, through_cache]);

        forget_files(dir.path());
        let start = Instant::now();
        (0..SEQUENTIAL / MIB).for_each(|i| disk.read(i * MIB, &mut buffer.0).expect("a read"));
        let ours = mib_per_second(SEQUENTIAL, start);
        let start = Instant::now();
        (0..SEQUENTIAL / MIB).for_each(|i| direct.read_exact_at(&mut buffer.0, i * MIB).expect("a read"));
        let read = mib_per_second(SEQUENTIAL, start);
        let buffered = File::open(dir.path().join("buffered")).expect("a file");
        forget_file(&buffered);
        let start = Instant::now();
        (0..SEQUENTIAL / MIB).for_each(|i| buffered.read_exact_at(&mut buffer.0, i * MIB).expect("a read"));
        reads.push([ours, read, mib_per_second(SEQUENTIAL, start)]);
    }
    for (case, rounds) in [("sequential write, 1 MiB", writes), ("sequential read, unsealed, cold", reads)] {
        for (i, name) in ["miosa", "raw direct", "raw buffered"].into_iter().enumerate() {
            report.row(name, case, "median", median(rounds.iter().map(|r| r[i]).collect()), "MiB/s");
            if i > 0 {
                let ratio = median(rounds.iter().map(|r| r[0] / r[i]).collect());
                report.row("miosa", case, &format!("ratio to {name}"), ratio, "x");
            }
        }
    }
}

fn main() {
    let mut report = Report::new("write_path");
    flush_heavy(&mut report);
    if report.wants("sequential") {
        sequential(&mut report);
    }
}
