//! Memory: an idle fork with an open handle, and what grows with the data stored.
//!
//! `cargo bench --bench memory [-- --json FILE]`. Each figure is of a process of its own, which this program starts;
//! memory is what the process has for itself (`RssAnon`). The figure a TiB is a straight line through two sizes that
//! fit this machine: an extrapolation.

mod harness;

use harness::Report;
use harness::load::{GIB, MIB, new_disk, quiet_store};
use storage::medium::sim::Random;
use storage::{DiskId, Source, Store};

const FORKS: u64 = 10_000;

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

/// Bytes an idle fork with an open handle.
fn idle_forks(case: &str) -> f64 {
    let (store, _dir) = quiet_store();
    let (id, _) = new_disk(&store, "base", 10 * GIB);
    fragments(&store, id, 25_000);
    if case != "forks of unsealed" {
        store.seal().expect("sealing");
    }
    let before = resident();
    let mut handles = Vec::new();
    for i in 0..FORKS {
        let mut tx = store.begin();
        let fork = tx.fork(Source::Disk(id), &format!("fork-{i}"));
        drop(tx.commit().expect("a fork"));
        let disk = store.disk(fork).expect("it is there");
        if case == "forks that wrote 16 blocks" {
            for block in 0..16 {
                disk.write(block * MIB, &[i as u8 + 1; 4096]).expect("a write");
            }
        }
        handles.push(disk);
    }
    store.flush().expect("a flush");
    let each = (resident() - before) / FORKS as f64;
    drop(handles);
    each
}

/// Bytes of the process after sealing and then reading this much unique data.
fn unique(gib: u64) -> f64 {
    let (store, _dir) = quiet_store();
    let (_, disk) = new_disk(&store, "disk", 64 * GIB);
    let mut random = Random(1);
    let mut chunk = vec![0; MIB as usize];
    for i in 0..gib * GIB / MIB {
        chunk.chunks_mut(8).for_each(|c| c.copy_from_slice(&random.bits().to_le_bytes()));
        disk.write(i * MIB, &chunk).expect("a write");
        if i % 512 == 511 {
            store.seal().expect("sealing");
        }
    }
    for i in 0..gib * GIB / MIB {
        disk.read(i * MIB, &mut chunk).expect("a read");
    }
    resident()
}

/// Runs this program for one figure.
fn child(what: &str) -> f64 {
    let me = std::env::current_exe().expect("this program has a path");
    let out = harness::tools::run(&me.to_string_lossy(), &[&"--child", &what]).expect("the child works");
    out.trim().parse().expect("the child prints a number")
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(what) = args.iter().position(|a| a == "--child").map(|at| &args[at + 1]) {
        let figure = match what.parse() {
            Ok(gib) => unique(gib),
            Err(_) => idle_forks(what),
        };
        println!("{figure}");
        return;
    }
    let mut report = Report::new("memory");
    for case in ["forks of sealed", "forks of unsealed", "forks that wrote 16 blocks"] {
        report.row("miosa", case, "an open fork", child(case) / 1024.0, "KiB");
    }
    let (small, large) = (child("1"), child("4"));
    report.row("miosa", "1 GiB unique, sealed and read", "process", small / 1e6, "MB");
    report.row("miosa", "4 GiB unique, sealed and read", "process", large / 1e6, "MB");
    let slope = (large - small) / 3.0;
    report.row("miosa", "unique data", "a TiB, extrapolated", (small + slope * 1023.0) / 1e6, "MB");
}
