//! Memory: an idle fork with an open handle, a paused one without, and what grows with the data stored.
//!
//! `cargo bench --bench memory [-- --json FILE]`. Each figure is of a process of its own, which this program starts;
//! memory is what the process has for itself (`RssAnon`). The figure a TiB is a straight line through two sizes: an
//! extrapolation. All their blocks are different but compress to little, so that sizes far apart fit this machine: what
//! the store keeps in memory depends on the number of blocks, and of what it keeps decoded, on `cache_bytes`.

mod harness;

use harness::Report;
use harness::load::{GIB, MIB, new_disk, quiet_store};
use std::path::Path;
use storage::medium::sim::Random;
use storage::{DiskId, Options, Source, Store};

const FORKS: u64 = 10_000;
/// Unique data, in GiB.
const UNIQUE: [u64; 2] = [32, 128];

fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the process has a status");
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).expect("the kernel tells");
    line.split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok()).expect("a number") * 1024.0
}

fn fragments(store: &Store, id: DiskId, count: u64) {
    let disk = store.disk(id).expect("it is there");
    let mut random = Random(1);
    for _ in 0..count {
        let bytes: Vec<u8> = (0..512).flat_map(|_| random.bits().to_le_bytes()).collect();
        disk.write(random.below(10 * GIB / 8192) * 8192, &bytes).expect("a write");
    }
}

/// What a case's processes do.
struct Case {
    name: &'static str,
    sealed: bool,
    /// Blocks each fork writes.
    writes: u64,
}

const CASES: [Case; 3] = [
    Case { name: "forks of sealed", sealed: true, writes: 0 },
    Case { name: "forks of unsealed", sealed: false, writes: 0 },
    Case { name: "forks that wrote 16 blocks", sealed: true, writes: 16 },
];

/// A store with a disk in 25 000 fragments.
fn prepare_forks(case: &Case) -> tempfile::TempDir {
    let (store, dir) = quiet_store();
    let (id, _) = new_disk(&store, "base", 10 * GIB);
    fragments(&store, id, 25_000);
    if case.sealed {
        store.seal().expect("sealing");
    }
    store.flush().expect("a flush");
    dir
}

fn open(dir: &str) -> (Store, DiskId) {
    let options = Options { background: false, ..Options::default() };
    let store = Store::open(Path::new(dir), options).expect("it opens");
    let id = store.disks()[0].id;
    (store, id)
}

/// Bytes an idle fork with an open handle takes.
fn idle_forks(case: &Case, dir: &str) -> f64 {
    let (store, id) = open(dir);
    let mut handles = Vec::with_capacity(FORKS as usize);
    let mut before = 0.0;
    // The first ones fill what is made once.
    for i in 0..FORKS + 100 {
        if i == 100 {
            before = resident();
        }
        let mut tx = store.begin();
        let fork = tx.fork(Source::Disk(id), &format!("fork-{i}"));
        drop(tx.commit().expect("a fork"));
        let disk = store.disk(fork).expect("it is there");
        for block in 0..case.writes {
            disk.write(block * MIB, &[i as u8; 4096]).expect("a write");
        }
        // No more than this is ever buffered.
        disk.flush().expect("a flush");
        handles.push(disk);
    }
    (resident() - before) / FORKS as f64
}

/// A store with this much unique data, sealed.
fn prepare_unique(gib: u64) -> tempfile::TempDir {
    let (store, dir) = quiet_store();
    let (_, disk) = new_disk(&store, "disk", 256 * GIB);
    let mut chunk = vec![0; MIB as usize];
    for i in 0..gib * GIB / MIB {
        for (j, block) in chunk.chunks_mut(4096).enumerate() {
            block[..8].copy_from_slice(&(i * 256 + j as u64 + 1).to_le_bytes());
        }
        disk.write(i * MIB, &chunk).expect("a write");
        if i % 512 == 511 {
            store.seal().expect("sealing");
        }
    }
    dir
}

/// A store with this many forks that wrote something and were sealed.
fn prepare_paused(count: u64) -> tempfile::TempDir {
    let (store, dir) = quiet_store();
    let (id, disk) = new_disk(&store, "base", 10 * GIB);
    (0..64).for_each(|i| disk.write(i * MIB, &[i as u8 + 1; 65536]).expect("a write"));
    for i in 0..count {
        let mut tx = store.begin();
        let fork = tx.fork(Source::Disk(id), &format!("fork-{i}"));
        drop(tx.commit().expect("a fork"));
        let disk = store.disk(fork).expect("it is there");
        (0..16u64).for_each(|block| disk.write(block * MIB, &[i as u8 ^ block as u8; 4096]).expect("a write"));
    }
    store.seal().expect("sealing");
    dir
}

/// Bytes of a process that has read all of it.
fn read_unique(gib: u64, dir: &str) -> f64 {
    let (store, id) = open(dir);
    let disk = store.disk(id).expect("it is there");
    let mut chunk = vec![0; MIB as usize];
    (0..gib * GIB / MIB).for_each(|i| disk.read(i * MIB, &mut chunk).expect("a read"));
    resident()
}

/// Runs this program for one figure of a store.
fn child(what: &str, dir: &tempfile::TempDir) -> f64 {
    let me = std::env::current_exe().expect("this program has a path");
    let out = harness::tools::run(&me.to_string_lossy(), &[&"--child", &what, &dir.path()]).expect("the child works");
    out.trim().parse().expect("the child prints a number")
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|a| a == "--child") {
        let (what, dir) = (&args[at + 1], &args[at + 2]);
        let figure = match CASES.iter().find(|case| case.name == what) {
            Some(case) => idle_forks(case, dir),
            None if what == "paused" => {
                let _open = open(dir);
                resident()
            }
            None => read_unique(what.parse().expect("a number of GiB"), dir),
        };
        println!("{figure}");
        return;
    }
    let mut report = Report::new("memory");
    for case in &CASES {
        report.row("miosa", case.name, "an open fork", child(case.name, &prepare_forks(case)) / 1024.0, "KiB");
    }
    let [few, many] = [1, FORKS].map(|count| child("paused", &prepare_paused(count)));
    report.row("miosa", "paused forks that wrote 16 blocks", "each", (many - few) / (FORKS - 1) as f64 / 1024.0, "KiB");
    let [small, large] = UNIQUE.map(|gib| child(&gib.to_string(), &prepare_unique(gib)));
    for (gib, bytes) in UNIQUE.into_iter().zip([small, large]) {
        report.row("miosa", &format!("{gib} GiB unique, all read"), "process", bytes / 1e6, "MB");
    }
    let slope = (large - small) / (UNIQUE[1] - UNIQUE[0]) as f64;
    report.row("miosa", "unique data", "a TiB, extrapolated", (small + slope * (1024 - UNIQUE[0]) as f64) / 1e6, "MB");
}
