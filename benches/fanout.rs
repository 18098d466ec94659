//! Many forks of one snapshot, all of which read the same data and then write some of their own: how long that takes, what is
//! read from the device and kept in memory for it, and what it costs on disk.
//!
//! `cargo bench --bench fanout [-- --json FILE] [--forks 1,10,100,300] [--shared MB] [--own MB] [--only SYSTEM]`.
//! Eight workers each take the next fork that nobody has, read all of the shared data in pieces of 1 MiB, and when all have,
//! write. Peers: reflinks on XFS and btrfs (loop file systems, as root; the image is a file
//! like ours), read and written through the page cache, and qcow2 overlays on a raw file, by `qemu-img bench`, a process each.
//! Before each part the caches are cold: what the kernel has of the files is dropped, and the store is opened anew.

mod harness;

use std::fs::File;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use harness::load::{GIB, MIB, forget_files, text};
use harness::tools::{Mount, allocated, clone, has, run};
use harness::{Report, argument};
use storage::medium::sim::Random;
use storage::{DiskId, Options, SnapshotId, Source, Store};

const WORKERS: usize = 8;
const DISK: u64 = 4 * GIB;

/// How much of what.
struct Load {
    shared: u64,
    own: u64,
    /// What everybody writes, but for a mark in each block.
    text: Vec<u8>,
}

impl Load {
    /// A piece that no other fork has: each block has a number of its own.
    fn piece(&self, fork: usize, at: u64) -> Vec<u8> {
        let mut piece = self.text[(at % self.text.len() as u64) as usize..][..MIB as usize].to_vec();
        for (i, block) in piece.chunks_mut(4096).enumerate() {
            let mark = (fork as u64 + 1) << 40 | at << 8 | i as u64;
            block[..8].copy_from_slice(&mark.to_le_bytes());
        }
        piece
    }
}

/// Something that forks.
trait System: Sync {
    fn name(&self) -> &'static str;
    /// Makes so many forks, durably.
    fn fork(&mut self, count: usize);
    /// Drops what is cached.
    fn cool(&mut self);
    fn read(&self, fork: usize, load: &Load);
    /// Durably.
    fn write(&self, fork: usize, load: &Load);
    /// Bytes that all of it takes on disk.
    fn stored(&mut self) -> u64;
}

struct Ours {
    dir: tempfile::TempDir,
    store: Option<Store>,
    snapshot: SnapshotId,
    forks: Vec<DiskId>,
}

impl Ours {
    fn new(load: &Load) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path(), Options::default()).expect("a store");
        let mut tx = store.begin();
        let disk = tx.create_disk("base", DISK);
        tx.commit_durable().expect("a commit");
        let base = store.disk(disk).expect("it is there");
        (0..load.shared / MIB).for_each(|i| base.write(i * MIB, &load.piece(0, i * MIB)).expect("a write"));
        let mut tx = store.begin();
        let snapshot = tx.snapshot(disk, "prepared");
        tx.commit_durable().expect("a commit");
        store.seal().expect("sealing");
        Self { dir, store: Some(store), snapshot, forks: Vec::new() }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().expect("it is open")
    }
}

impl System for Ours {
    fn name(&self) -> &'static str {
        "miosa"
    }

    fn fork(&mut self, count: usize) {
        let mut forks = Vec::with_capacity(count);
        let mut tx = self.store().begin();
        for i in 0..count {
            forks.push(tx.fork(Source::Snapshot(self.snapshot), &format!("fork-{i}")));
        }
        tx.commit_durable().expect("forks");
        self.forks = forks;
    }

    fn cool(&mut self) {
        if let Some(store) = self.store.take() {
            store.close().expect("it closes");
        }
        forget_files(self.dir.path());
        self.store = Some(Store::open(self.dir.path(), Options::default()).expect("a store"));
    }

    fn read(&self, fork: usize, load: &Load) {
        let disk = self.store().disk(self.forks[fork]).expect("it is there");
        let mut piece = vec![0; MIB as usize];
        (0..load.shared / MIB).for_each(|i| disk.read(i * MIB, &mut piece).expect("a read"));
    }

    fn write(&self, fork: usize, load: &Load) {
        let disk = self.store().disk(self.forks[fork]).expect("it is there");
        (0..load.own / MIB).for_each(|i| {
            disk.write(load.shared + i * MIB, &load.piece(fork + 1, i * MIB)).expect("a write");
        });
        disk.flush().expect("a flush");
    }

    fn stored(&mut self) -> u64 {
        self.store().seal().expect("sealing");
        allocated(self.dir.path())
    }
}

/// Files on a file system that clones them.
struct Reflink {
    name: &'static str,
    mount: Mount,
    forks: usize,
}

impl Reflink {
    fn new(name: &'static str, mkfs: &[&str], load: &Load, most: u64) -> Result<Self, String> {
        let size = DISK + load.shared + (most + 1) * (load.own + 64 * MIB);
        let mount = Mount::fresh(name, mkfs, "noatime", size)?;
        let base = File::create(mount.path().join("base")).map_err(|e| e.to_string())?;
        base.set_len(DISK).map_err(|e| e.to_string())?;
        for i in 0..load.shared / MIB {
            base.write_all_at(&load.piece(0, i * MIB), i * MIB).map_err(|e| e.to_string())?;
        }
        base.sync_all().map_err(|e| e.to_string())?;
        Ok(Self { name, mount, forks: 0 })
    }

    fn path(&self, fork: usize) -> PathBuf {
        self.mount.path().join(format!("fork-{fork}"))
    }
}

impl System for Reflink {
    fn name(&self) -> &'static str {
        self.name
    }

    fn fork(&mut self, count: usize) {
        let base = self.mount.path().join("base");
        (0..count).for_each(|i| drop(clone(&base, &self.path(i))));
        self.forks = count;
        run("sync", &[&"-f", &self.mount.path()]).expect("sync works");
    }

    fn cool(&mut self) {
        run("sync", &[&"-f", &self.mount.path()]).expect("sync works");
        forget_files(self.mount.path());
    }

    fn read(&self, fork: usize, load: &Load) {
        let file = File::open(self.path(fork)).expect("the fork");
        let mut piece = vec![0; MIB as usize];
        (0..load.shared / MIB).for_each(|i| file.read_exact_at(&mut piece, i * MIB).expect("a read"));
    }

    fn write(&self, fork: usize, load: &Load) {
        let file = File::options().write(true).open(self.path(fork)).expect("the fork");
        (0..load.own / MIB).for_each(|i| {
            file.write_all_at(&load.piece(fork + 1, i * MIB), load.shared + i * MIB).expect("a write");
        });
        file.sync_data().expect("a sync");
    }

    fn stored(&mut self) -> u64 {
        self.mount.used()
    }
}

/// Overlays on one raw file.
struct Qcow2 {
    dir: tempfile::TempDir,
}

impl Qcow2 {
    fn new(load: &Load) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let base = File::create(dir.path().join("base")).expect("a file");
        base.set_len(DISK).expect("a size");
        (0..load.shared / MIB).for_each(|i| base.write_all_at(&load.piece(0, i * MIB), i * MIB).expect("a write"));
        base.sync_all().expect("a sync");
        Self { dir }
    }

    fn path(&self, fork: usize) -> PathBuf {
        self.dir.path().join(format!("fork-{fork}"))
    }

    fn bench(&self, fork: usize, bytes: u64, more: &[&str]) {
        let count = (bytes / MIB).to_string();
        let mut args: Vec<&str> = vec!["bench", "-f", "qcow2", "-t", "writeback", "-d", "1", "-s", "1M", "-c", &count];
        args.extend(more);
        let path = self.path(fork);
        let args: Vec<&dyn AsRef<std::ffi::OsStr>> = args.iter().map(|a| a as _).chain([&path as _]).collect();
        run("qemu-img", &args).expect("qemu-img bench");
    }
}

impl System for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn fork(&mut self, count: usize) {
        let base = self.dir.path().join("base");
        for i in 0..count {
            run("qemu-img", &[&"create", &"-f", &"qcow2", &"-b", &base, &"-F", &"raw", &self.path(i)])
                .expect("an overlay");
        }
        run("sync", &[&"-f", &self.dir.path()]).expect("sync works");
    }

    fn cool(&mut self) {
        run("sync", &[&"-f", &self.dir.path()]).expect("sync works");
        forget_files(self.dir.path());
    }

    fn read(&self, fork: usize, load: &Load) {
        self.bench(fork, load.shared, &[]);
    }

    fn write(&self, fork: usize, load: &Load) {
        let offset = load.shared.to_string();
        let (count, pattern) = ((load.own / MIB).max(1).to_string(), (fork % 255 + 1).to_string());
        self.bench(fork, load.own, &["-w", "-o", &offset, "--pattern", &pattern, "--flush-interval", &count]);
    }

    fn stored(&mut self) -> u64 {
        allocated(self.dir.path())
    }
}

/// Bytes read so far from the device that a directory is on; none if the kernel does not tell.
fn device_read(dir: &Path) -> Option<u64> {
    let device = std::fs::metadata(dir).ok()?.st_dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let text = std::fs::read_to_string("/proc/diskstats").ok()?;
    let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = words.into_iter().find(|w| w.len() > 5 && w[0] == major.to_string() && w[1] == minor.to_string())?;
    Some(line[5].parse::<u64>().ok()? * 512)
}

/// Bytes of memory that are not free for others, and those that hold files.
fn memory() -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("the kernel tells");
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).expect("a field");
        line.split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok()).expect("a number") * 1024.0
    };
    field("MemTotal:") - field("MemFree:")
}

/// Has workers do something with each fork; seconds.
fn all(forks: usize, work: impl Fn(usize) + Sync) -> f64 {
    let (next, began) = (AtomicUsize::new(0), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS.min(forks) {
            scope.spawn(|| {
                loop {
                    let fork = next.fetch_add(1, Ordering::Relaxed);
                    if fork >= forks {
                        return;
                    }
                    work(fork);
                }
            });
        }
    });
    began.elapsed().as_secs_f64()
}

/// Forks, reads and writes; the seconds that all of it took.
fn measure(report: &mut Report, system: &mut dyn System, forks: usize, load: &Load) -> f64 {
    let case = format!("{forks} forks");
    let name = system.name();
    let before = system.stored();
    let began = Instant::now();
    system.fork(forks);
    let forking = began.elapsed().as_secs_f64();
    system.cool();
    let tmp = std::env::temp_dir();
    let (device, held) = (device_read(&tmp), memory());
    let reading = all(forks, |fork| system.read(fork, load));
    let (read, holds) = (device.zip(device_read(&tmp)).map(|(a, b)| b - a), memory() - held);
    let writing = all(forks, |fork| system.write(fork, load));
    report.row(name, &case, "forking, durable", forking * 1e3, "ms");
    report.row(name, &case, "reading", reading, "s");
    if let Some(read) = read {
        report.row(name, &case, "read from the device", read as f64 / 1e6, "MB");
    }
    report.row(name, &case, "memory, file caches too", holds / 1e6, "MB");
    report.row(name, &case, "writing, durable", writing, "s");
    report.row(name, &case, "stored", system.stored().saturating_sub(before) as f64 / 1e6, "MB");
    forking + reading + writing
}

fn main() {
    harness::tools::own_mounts();
    let number = |name: &str, usual: u64| argument(name).map_or(usual, |n| n.parse().expect("a number"));
    let counts = argument("--forks").unwrap_or_else(|| "1,10,100,300".into());
    let counts: Vec<usize> = counts.split(',').map(|n| n.parse().expect("a number")).collect();
    let load = Load {
        shared: number("--shared", 500) * MIB,
        own: number("--own", 50) * MIB,
        text: text(&mut Random(7), 64 * MIB as usize),
    };
    let mut report = Report::new("fanout");
    let most = counts.iter().copied().max().unwrap_or(1) as u64;
    for forks in counts {
        let mut ours = None;
        let mut peers: Vec<(&str, f64)> = Vec::new();
        for name in ["miosa", "xfs", "btrfs", "qcow2"] {
            if !report.wants(name) {
                continue;
            }
            // One after the other, and each gone before the next: the disk may not hold all of them.
            let system: Result<Box<dyn System>, String> = match name {
                "miosa" => Ok(Box::new(Ours::new(&load))),
                "xfs" => Reflink::new("xfs", &["-q", "-m", "reflink=1"], &load, most).map(|s| Box::new(s) as _),
                "btrfs" => Reflink::new("btrfs", &["-q", "-m", "single"], &load, most).map(|s| Box::new(s) as _),
                _ if has("qemu-img") => Ok(Box::new(Qcow2::new(&load))),
                _ => Err("qemu-utils is not installed".into()),
            };
            match system {
                Err(why) => report.missing(name, &why),
                Ok(mut system) => {
                    let took = measure(&mut report, &mut *system, forks, &load);
                    report.row(name, &format!("{forks} forks"), "all of it", took, "s");
                    if name == "miosa" { ours = Some(took) } else { peers.push((name, took)) }
                }
            }
        }
        let best = peers.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((ours, (name, took))) = ours.zip(best) {
            report.row("miosa", &format!("{forks} forks"), &format!("time, to {name}'s"), ours / took, "x");
        }
    }
}
