//! How long a store takes to open with a long log.
//!
//! `cargo bench --bench recovery [-- --json FILE]`. Needs 5 GiB of disk space. *cold*: the kernel has none of the log in
//! memory, as after a reboot; *warm*: all of it, as after a crash of the daemon. The limit is reading the log's files.

mod harness;

use harness::load::{GIB, MIB, forget_files, new_disk, quiet_store};
use harness::{Report, median};
use std::io::Read;
use std::path::Path;
use std::time::Instant;
use storage::medium::sim::Random;
use storage::{Options, Store};

const LOG: u64 = 4 * GIB;
const ROUNDS: usize = 3;

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn read_files(dir: &Path) {
    let mut buffer = vec![0; MIB as usize];
    for entry in std::fs::read_dir(dir).expect("the log").flatten() {
        let mut file = std::fs::File::open(entry.path()).expect("a segment");
        while file.read(&mut buffer).expect("it can be read") > 0 {}
    }
}

fn main() {
    let mut report = Report::new("recovery");
    for (name, record) in [("1 MiB", MIB), ("4 KiB", 4096)] {
        let (store, dir) = quiet_store();
        let (_, disk) = new_disk(&store, "disk", 16 * GIB);
        let mut random = Random(1);
        let mut data = vec![0; record as usize];
        // A 4 KiB record takes more than its data, so the figures of the log are looked at.
        while store.stats().expect("figures").log_bytes < LOG {
            for _ in 0..(64 * MIB / record) {
                data[..8].copy_from_slice(&random.bits().to_le_bytes());
                disk.write(random.below(16 * GIB / record) * record, &data).expect("a write");
            }
            disk.flush().expect("a flush");
        }
        let log = store.stats().expect("figures").log_bytes;
        let case = format!("{name} records");
        report.row("miosa", &case, "log", log as f64 / GIB as f64, "GiB");
        drop(disk);
        drop(store);
        let open = || {
            let options = Options { background: false, ..Options::default() };
            let mut opened = None;
            let took = seconds(|| opened = Some(Store::open(dir.path(), options).expect("it opens")));
            drop(opened);
            took
        };
        let mut figures = Vec::new();
        for _ in 0..ROUNDS {
            forget_files(dir.path());
            let read_cold = seconds(|| read_files(&dir.path().join("log")));
            forget_files(dir.path());
            let cold = open();
            figures.push([cold, open(), read_cold, seconds(|| read_files(&dir.path().join("log")))]);
        }
        let column = |i: usize| median(figures.iter().map(|r| r[i]).collect());
        report.row("miosa", &case, "open, cold", column(0), "s");
        report.row("miosa", &case, "open, warm", column(1), "s");
        report.row("limit", &case, "reading, cold", column(2), "s");
        report.row("limit", &case, "reading, warm", column(3), "s");
    }
}
