//! What a snapshot and a fork cost, over disk size, fragmentation, unsealed bytes, depth and siblings.
//!
//! `cargo bench --bench fork [-- --json FILE]`. Each case measures the two calls 200 times as they return (not yet
//! synced), and how many syncs a durable one takes. Within an axis the cases are measured in turn, round by round, so
//! that a noisy machine disturbs all alike.
//!
//! Peers, over fragments: `FICLONE` of a file on XFS and btrfs (loop file systems, as root) and `qemu-img create -b`
//! (the start of its process included). They are measured in turn with a fork of ours of the same shape.

mod harness;
#[path = "fork/peers.rs"]
mod peers;

use harness::{Report, Samples};
use storage::medium::sim::Random;
use storage::{DiskId, Options, Source, Store};

const ROUNDS: usize = 200;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

struct Case {
    name: String,
    store: Store,
    disk: DiskId,
    snapshot: Samples,
    fork: Samples,
    _dir: tempfile::TempDir,
}

/// How a case's disk is made.
struct Shape {
    size: u64,
    /// Random 4 KiB pieces, every other block, that are sealed and that are not.
    sealed_fragments: u64,
    unsealed_fragments: u64,
    /// Sequential unsealed bytes.
    unsealed_bytes: u64,
    depth: u64,
    siblings: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { size: 10 * GIB, sealed_fragments: 0, unsealed_fragments: 0, unsealed_bytes: 0, depth: 1, siblings: 0 }
    }
}

fn fragments(store: &Store, disk: DiskId, count: u64, random: &mut Random) {
    let disk = store.disk(disk).expect("the disk is there");
    let mut block = [0; 4096];
    for i in 0..count {
        block[..8].copy_from_slice(&random.bits().to_le_bytes());
        block[8..16].copy_from_slice(&i.to_le_bytes());
        let slots = disk.size_bytes() / 8192;
        disk.write(random.below(slots) * 8192, &block).expect("a write");
    }
}

fn make(name: &str, shape: &Shape) -> Case {
    let dir = tempfile::tempdir().expect("a directory");
    // Sealing would move what a case is about; it runs only when asked for.
    let options = Options { background: false, ..Options::default() };
    let store = Store::open(dir.path(), options).expect("a store");
    let mut random = Random(1);
    let mut tx = store.begin();
    let mut disk = tx.create_disk("disk", shape.size);
    tx.commit_durable().expect("a commit");
    fragments(&store, disk, shape.sealed_fragments, &mut random);
    store.seal().expect("sealing");
    fragments(&store, disk, shape.unsealed_fragments, &mut random);
    let chunk = vec![7; MIB as usize];
    for i in 0..shape.unsealed_bytes / MIB {
        store.disk(disk).expect("there").write(i * MIB, &chunk).expect("a write");
    }
    for level in 1..shape.depth {
        let mut tx = store.begin();
        let child = tx.fork(Source::Disk(disk), &format!("depth-{level}"));
        drop(tx.commit().expect("a fork"));
        disk = child;
        // Each level has something of its own.
        store.disk(disk).expect("there").write((level % 1000) * 4096, &[1; 4096]).expect("a write");
    }
    for i in 0..shape.siblings {
        let mut tx = store.begin();
        let _ = tx.fork(Source::Disk(disk), &format!("sibling-{i}"));
        drop(tx.commit().expect("a fork"));
    }
    store.flush().expect("a flush");
    Case { name: name.into(), store, disk, snapshot: Samples::default(), fork: Samples::default(), _dir: dir }
}

fn measure(report: &mut Report, axis: &str, mut cases: Vec<Case>) {
    for round in 0..ROUNDS {
        for case in &mut cases {
            // A guest writes between two snapshots; without it they would share everything.
            let handle = case.store.disk(case.disk).expect("there");
            handle.write(0, &[round as u8; 4096]).expect("a write");
            let commit = case.snapshot.time(|| {
                let mut tx = case.store.begin();
                let _ = tx.snapshot(case.disk, "s");
                tx.commit().expect("a snapshot")
            });
            drop(commit);
            handle.write(0, &[round as u8 ^ 0xff; 4096]).expect("a write");
            let commit = case.fork.time(|| {
                let mut tx = case.store.begin();
                let _ = tx.fork(Source::Disk(case.disk), &format!("f{round}"));
                tx.commit().expect("a fork")
            });
            drop(commit);
            case.store.flush().expect("a flush");
        }
    }
    let mut medians = [Vec::new(), Vec::new()];
    for case in &mut cases {
        let before = case.store.log_syncs();
        let mut tx = case.store.begin();
        let _ = tx.fork(Source::Disk(case.disk), "durable");
        tx.commit_durable().expect("a durable fork");
        let syncs = (case.store.log_syncs() - before) as f64;
        for (i, (what, samples)) in [("snapshot", &mut case.snapshot), ("fork", &mut case.fork)].into_iter().enumerate()
        {
            let median = samples.quantile_us(0.5);
            medians[i].push(median);
            report.row("miosa", &case.name, &format!("{what} median"), median, "us");
            report.row("miosa", &case.name, &format!("{what} p99"), samples.quantile_us(0.99), "us");
        }
        report.row("miosa", &case.name, "syncs, durable fork", syncs, "syncs");
    }
    for (what, medians) in ["snapshot", "fork"].iter().zip(medians) {
        let largest = medians.iter().copied().fold(0.0, f64::max);
        let smallest = medians.iter().copied().fold(f64::MAX, f64::min);
        report.row("miosa", axis, &format!("{what} largest/smallest"), largest / smallest, "x");
    }
}

fn many_forks(report: &mut Report) {
    let case = make("", &Shape { sealed_fragments: 25_000, ..Shape::default() });
    let mut all = Samples::default();
    all.time(|| {
        let mut last = None;
        for i in 0..1000 {
            let mut tx = case.store.begin();
            let _ = tx.fork(Source::Disk(case.disk), &format!("many-{i}"));
            last = Some(tx.commit().expect("a fork"));
        }
        last.expect("one at least").wait().expect("durable");
    });
    report.row("miosa", "25k fragments", "1000 forks, durable", all.quantile_us(0.5) / 1e3, "ms");
}

fn axes(report: &mut Report) {
    let axis = |name: &str, shapes: Vec<(String, Shape)>| -> Vec<Case> {
        shapes.iter().map(|(value, shape)| make(&format!("{name} {value}"), shape)).collect()
    };
    let sizes = [("1 GiB", GIB), ("32 GiB", 32 * GIB), ("1 TiB", 1024 * GIB)];
    let sizes = sizes.map(|(name, size)| (name.to_owned(), Shape { size, ..Shape::default() })).into();
    measure(report, "disk size", axis("disk size", sizes));
    let counts = [0, 1_000, 25_000, 100_000];
    let sealed = counts.map(|n| (n.to_string(), Shape { sealed_fragments: n, ..Shape::default() })).into();
    measure(report, "fragments, sealed", axis("fragments, sealed", sealed));
    let unsealed = counts.map(|n| (n.to_string(), Shape { unsealed_fragments: n, ..Shape::default() })).into();
    measure(report, "fragments, unsealed", axis("fragments, unsealed", unsealed));
    let bytes = [0, 256, 1024, 4096];
    let bytes = bytes.map(|n| (format!("{n} MiB"), Shape { unsealed_bytes: n * MIB, ..Shape::default() })).into();
    measure(report, "unsealed", axis("unsealed", bytes));
    let depths = [1, 100, 10_000].map(|n| (n.to_string(), Shape { depth: n, ..Shape::default() })).into();
    measure(report, "depth", axis("depth", depths));
    let siblings = [0, 100, 10_000].map(|n| (n.to_string(), Shape { siblings: n, ..Shape::default() })).into();
    measure(report, "siblings", axis("siblings", siblings));
}

fn main() {
    harness::tools::own_mounts();
    let mut report = Report::new("fork");
    if report.wants("axes") {
        axes(&mut report);
        many_forks(&mut report);
    }
    if report.wants("peers") {
        peers::measure(&mut report);
    }
}
