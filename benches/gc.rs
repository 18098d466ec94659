//! What deletion and collection give back, and what sealing and collection cost who uses disks meanwhile.
//!
//! `cargo bench --bench gc [-- --json FILE]`.

mod harness;

use harness::load::{GIB, MIB, new_disk, quiet_store, text};
use harness::{Report, Samples, median, tools};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use storage::medium::sim::Random;
use storage::{Disk, Source, Store};

const BLOCK: u64 = 4096;
const FORKS: u64 = 8;
/// What each disk has whose number grows.
const GROWTH: u64 = 256 * MIB;
/// What each fork has for itself.
const OWN: u64 = 48 * MIB;

fn forks(store: &Store) -> Vec<storage::DiskId> {
    let (base, disk) = new_disk(store, "base", 10 * GIB);
    let mut random = Random(1);
    (0..128).for_each(|i| disk.write(i * MIB, &text(&mut random, MIB as usize)).expect("a write"));
    store.seal().expect("sealing");
    let mut tx = store.begin();
    let ids = (0..FORKS).map(|i| tx.fork(Source::Disk(base), &format!("fork-{i}"))).collect();
    tx.commit_durable().expect("forks");
    ids
}

/// Deletes one fork of eight, and then three more, and collects.
fn reclaim(report: &mut Report, case: &str, write: impl Fn(&[Disk])) {
    let (store, dir) = quiet_store();
    let ids = forks(&store);
    let disks: Vec<_> = ids.iter().map(|id| store.disk(*id).expect("it is there")).collect();
    write(&disks);
    store.seal().expect("sealing");
    for (case, gone) in [(format!("{case}, 1 of 8"), &ids[..1]), (format!("{case}, 3 of 7"), &ids[1..4])] {
        // Others of those that go do not share with them, so that sums are right.
        let exclusive: u64 =
            gone.iter().map(|id| store.usage_of(Source::Disk(*id)).expect("usage").exclusive_bytes).sum();
        let packs = || tools::allocated(&dir.path().join("packs")) as f64;
        let (before, all_before) = (packs(), tools::allocated(dir.path()) as f64);
        let mut tx = store.begin();
        gone.iter().for_each(|id| tx.delete_disk(*id));
        tx.commit_durable().expect("a deletion");
        let start = Instant::now();
        store.gc(false).expect("a collection");
        let seconds = start.elapsed().as_secs_f64();
        let exclusive = exclusive as f64;
        report.row("miosa", &case, "exclusive", exclusive / 1e6, "MB");
        report.row("miosa", &case, "packs give back", (before - packs()) / exclusive, "of it");
        let all = all_before - tools::allocated(dir.path()) as f64;
        report.row("miosa", &case, "whole store gives back", all / exclusive, "of it");
        report.row("miosa", &case, "collection takes", seconds, "s");
    }
}

/// Latencies of a guest that writes and flushes, and one that reads, while `work` runs, or for a second.
fn foreground(disk: &Disk, work: Option<&(dyn Fn() + Sync)>) -> [Samples; 2] {
    let stop = AtomicBool::new(false);
    let run = |write: bool| {
        let mut samples = Samples::default();
        let mut random = Random(7);
        let mut block = vec![3; BLOCK as usize];
        while !stop.load(Ordering::Relaxed) {
            let at = random.below(64 * MIB / BLOCK) * BLOCK;
            if write {
                block[..8].copy_from_slice(&random.bits().to_le_bytes());
                samples.time(|| {
                    disk.write(9 * GIB + at, &block).expect("a write");
                    disk.flush().expect("a flush");
                });
            } else {
                samples.time(|| disk.read(at, &mut block).expect("a read"));
            }
            // A guest thinks, too: both cores are not taken by the load alone.
            std::thread::sleep(Duration::from_micros(200));
        }
        samples
    };
    std::thread::scope(|scope| {
        let (writer, reader) = (scope.spawn(|| run(true)), scope.spawn(|| run(false)));
        match work {
            Some(work) => work(),
            None => std::thread::sleep(Duration::from_secs(1)),
        }
        stop.store(true, Ordering::Relaxed);
        [writer.join().expect("the writer ends"), reader.join().expect("the reader ends")]
    })
}

fn interference(report: &mut Report) {
    const ROUNDS: u64 = 5;
    let whats = ["write + flush", "read"];
    // By operation: p99 in quiet, while sealing, while collecting.
    let mut p99 = [[(); 3].map(|()| Vec::new()), [(); 3].map(|()| Vec::new())];
    for round in 0..ROUNDS {
        let (store, _dir) = quiet_store();
        let ids = forks(&store);
        let disk = store.disk(ids[0]).expect("it is there");
        let fill = |ids: &[storage::DiskId], seed: u64| {
            let mut random = Random(seed);
            for id in ids {
                let disk = store.disk(*id).expect("it is there");
                (0..OWN / MIB)
                    .for_each(|i| disk.write(GIB + i * MIB, &text(&mut random, MIB as usize)).expect("a write"));
            }
            store.flush().expect("a flush");
        };
        fill(&ids[1..], round + 10);
        // What is read is cached in all phases.
        let mut chunk = vec![0; MIB as usize];
        (0..64).for_each(|i| disk.read(i * MIB, &mut chunk).expect("a read"));
        let quiet = foreground(&disk, None);
        let sealing = foreground(&disk, Some(&|| _ = store.seal().expect("sealing")));
        let mut tx = store.begin();
        // Every other one, so that packs have to be rewritten.
        ids[1..].iter().step_by(2).for_each(|id| tx.delete_disk(*id));
        tx.commit_durable().expect("a deletion");
        let collecting = foreground(&disk, Some(&|| _ = store.gc(false).expect("a collection")));
        for (when, samples) in [quiet, sealing, collecting].into_iter().enumerate() {
            for (what, mut samples) in samples.into_iter().enumerate() {
                p99[what][when].push(samples.quantile_us(0.99));
            }
        }
    }
    for (what, figures) in whats.iter().zip(p99) {
        for (i, when) in ["quiet", "sealing", "collecting"].into_iter().enumerate() {
            report.row("miosa", &format!("{what}, {when}"), "p99", median(figures[i].clone()), "us");
            if i > 0 {
                let ratios = figures[i].iter().zip(&figures[0]).map(|(a, b)| a / b).collect();
                report.row("miosa", &format!("{what}, {when}"), "p99, ratio to quiet", median(ratios), "x");
            }
        }
    }
}

fn reclaims(report: &mut Report) {
    reclaim(report, "each in a run", |disks| {
        for (i, disk) in disks.iter().enumerate() {
            let mut random = Random(i as u64 + 2);
            (0..OWN / MIB).for_each(|i| disk.write(GIB + i * MIB, &text(&mut random, MIB as usize)).expect("a write"));
        }
    });
    reclaim(report, "sealed in turns", |disks| {
        let mut random = Random(99);
        for i in 0..OWN / MIB {
            for disk in disks {
                disk.write(GIB + i * MIB, &text(&mut random, MIB as usize)).expect("a write");
            }
            if i % 8 == 7 {
                disks[0].flush().expect("a flush");
            }
        }
    });
}

/// How long finding out what is dead takes, by how many blocks live: disks of their own, which share nothing.
fn growth(report: &mut Report) {
    let (store, _dir) = quiet_store();
    let mut random = Random(1);
    let mut first = None;
    for disks in 1..=8u64 {
        let (_, disk) = new_disk(&store, &format!("disk-{disks}"), GROWTH);
        let mut piece = vec![0; MIB as usize];
        for i in 0..GROWTH / MIB {
            piece.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.bits().to_le_bytes()));
            disk.write(i * MIB, &piece).expect("a write");
        }
        store.seal().expect("sealing");
        if !disks.is_power_of_two() {
            continue;
        }
        let mut takes = Samples::default();
        for _ in 0..9 {
            takes.time(|| store.gc(true).expect("a look"));
        }
        let ms = takes.quantile_us(0.5) / 1e3;
        let case = format!("growth, {} live blocks", disks * GROWTH / BLOCK);
        report.row("miosa", &case, "looking for what is dead takes", ms, "ms");
        let of_first = *first.get_or_insert(ms);
        report.row("miosa", &case, "a block, to the smallest", ms / of_first / disks as f64, "times");
    }
}

fn main() {
    let mut report = Report::new("gc");
    if report.wants("growth") {
        growth(&mut report);
    }
    if report.wants("reclaim") {
        reclaims(&mut report);
    }
    if report.wants("interference") {
        interference(&mut report);
    }
}
