//! What a corpus of Debian disks costs to store: bytes after each step, in each system.
//!
//! `cargo bench --bench storage_cost [-- --json FILE]`, as root (the corpus is made through loop mounts, once, see
//! `harness/corpus.rs`). Every system is given the same images; those that are live disks are given only the blocks that
//! differ from the parent's. Bytes are what the system's files occupy, metadata and index included. *limit* is each
//! distinct block once in one zstd stream, which takes a quarter of an hour. *packed again* is what an idle store comes to;
//! `--only packings` compares levels and frame sizes for that, on the first two steps.

mod harness;

use harness::corpus::{self, SIZE, Step};
use harness::tools::{self, Mount, allocated, run};
use harness::{Report, cache_dir};
use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;
use storage::medium::sim::Random;
use storage::{DiskId, Options, Source, Store};

const MB: f64 = 1e6;

/// A system that stores disks: bytes in use after it took in a step.
trait System {
    fn add(&mut self, step: &Step, parent: Option<&Step>) -> Result<u64, String>;

    /// Lets it do what it does in idle time; bytes in use after that.
    fn idle(&mut self) -> Option<u64> {
        None
    }

    /// What its bytes are made of.
    fn parts(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// A system, or why there is none.
type Made = Result<Box<dyn System>, String>;

struct Miosa {
    store: Store,
    disks: HashMap<&'static str, DiskId>,
    dir: tempfile::TempDir,
}

impl Miosa {
    fn new(scratch: &Path, level: i32) -> Self {
        let dir = tempfile::tempdir_in(scratch).expect("a directory");
        let options = Options { background: false, level, ..Options::default() };
        let store = Store::open(dir.path(), options).expect("a store");
        Self { store, disks: HashMap::new(), dir }
    }
}

impl System for Miosa {
    fn add(&mut self, step: &Step, parent: Option<&Step>) -> Result<u64, String> {
        let mut tx = self.store.begin();
        let id = match parent {
            Some(parent) => tx.fork(Source::Disk(self.disks[parent.name]), step.name),
            None => tx.create_disk(step.name, SIZE),
        };
        tx.commit_durable().map_err(|e| e.to_string())?;
        let disk = self.store.disk(id).map_err(|e| e.to_string())?;
        corpus::changes(&step.image, parent.map(|p| p.image.as_path()), |at, bytes| {
            disk.write(at, bytes).expect("a write");
        });
        self.store.seal().map_err(|e| e.to_string())?;
        self.disks.insert(step.name, id);
        Ok(allocated(self.dir.path()))
    }

    fn idle(&mut self) -> Option<u64> {
        self.store.repack().expect("packing again");
        Some(allocated(self.dir.path()))
    }

    fn parts(&self) -> Vec<(&'static str, u64)> {
        let stats = self.store.stats().expect("figures");
        vec![
            ("unique, raw", stats.unique_bytes),
            ("packs, data", stats.pack_bytes),
            ("packs, maps", stats.map_bytes),
            ("catalogue", stats.index_bytes),
            ("log", stats.log_bytes),
        ]
    }
}

/// No system: every distinct block once, compressed as hard and with as much behind it as zstd can. Who stores blocks, each of
/// them to be had by itself, cannot take less.
struct Limit {
    seen: HashSet<blake3::Hash>,
    stream: zstd::stream::write::Encoder<'static, Counted>,
}

/// Counts what is written to it.
#[derive(Default)]
struct Counted(u64);

impl std::io::Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Limit {
    fn new() -> Result<Self, String> {
        let made = || {
            let mut stream = zstd::stream::write::Encoder::new(Counted::default(), 19)?;
            stream.long_distance_matching(true)?;
            stream.window_log(27)?;
            Ok::<_, std::io::Error>(stream)
        };
        Ok(Self { seen: HashSet::new(), stream: made().map_err(|e| e.to_string())? })
    }
}

impl System for Limit {
    fn add(&mut self, step: &Step, parent: Option<&Step>) -> Result<u64, String> {
        corpus::changes(&step.image, parent.map(|p| p.image.as_path()), |_, bytes| {
            for block in bytes.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0)) {
                if self.seen.insert(blake3::hash(block)) {
                    self.stream.write_all(block).expect("it only counts");
                }
            }
        });
        self.stream.flush().map_err(|e| e.to_string())?;
        Ok(self.stream.get_ref().0)
    }
}

/// An overlay a step; with `compressed`, each then written anew by `convert -c`, which is what that offers.
struct Qcow2 {
    dir: tempfile::TempDir,
    compressed: Option<tempfile::TempDir>,
}

impl Qcow2 {
    fn new(scratch: &Path, compress: bool) -> Result<Self, String> {
        if !tools::has("qemu-img") || !tools::has("qemu-io") {
            return Err("qemu-utils is not installed".into());
        }
        let dir = || tempfile::tempdir_in(scratch).map_err(|e| e.to_string());
        Ok(Self { dir: dir()?, compressed: if compress { Some(dir()?) } else { None } })
    }
}

impl System for Qcow2 {
    fn add(&mut self, step: &Step, parent: Option<&Step>) -> Result<u64, String> {
        let name = format!("{}.qcow2", step.name);
        let backing = parent.map(|p| format!("{}.qcow2", p.name));
        match &backing {
            None => run("qemu-img", &[&"convert", &"-O", &"qcow2", &step.image, &self.dir.path().join(&name)])?,
            Some(backing) => {
                let args: [&dyn AsRef<std::ffi::OsStr>; 8] =
                    [&"create", &"-f", &"qcow2", &"-b", backing, &"-F", &"qcow2", &name];
                tools::run_in(self.dir.path(), "qemu-img", &args)?;
                write_with_qemu_io(&self.dir.path().join(&name), step, parent)?
            }
        };
        let Some(compressed) = &self.compressed else { return Ok(allocated(self.dir.path())) };
        let out = compressed.path().join(&name);
        let mut convert = std::process::Command::new("qemu-img");
        convert.args(["convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd"]);
        if let Some(backing) = &backing {
            convert.arg("-B").arg(compressed.path().join(backing)).args(["-F", "qcow2"]);
        }
        tools::finish(convert.arg(self.dir.path().join(&name)).arg(out))?;
        Ok(allocated(compressed.path()))
    }
}

fn write_with_qemu_io(image: &Path, step: &Step, parent: Option<&Step>) -> Result<String, String> {
    let pieces = tempfile::tempdir().map_err(|e| e.to_string())?;
    let (mut script, mut n) = (String::new(), 0);
    corpus::changes(&step.image, parent.map(|p| p.image.as_path()), |at, bytes| {
        let piece = pieces.path().join(n.to_string());
        std::fs::write(&piece, bytes).expect("a temporary file");
        writeln!(script, "write -q -s {} {at} {}", piece.display(), bytes.len()).expect("a string takes it");
        n += 1;
    });
    let commands = pieces.path().join("commands");
    std::fs::write(&commands, script).map_err(|e| e.to_string())?;
    let input = File::open(&commands).map_err(|e| e.to_string())?;
    let mut command = std::process::Command::new("qemu-io");
    command.args(["-f", "qcow2", "-t", "unsafe"]).arg(image).stdin(input);
    tools::finish(&mut command)
}

/// A file a step, reflinked from its parent's.
struct Btrfs {
    mount: Mount,
    empty: u64,
}

impl Btrfs {
    fn new() -> Result<Self, String> {
        let mount = Mount::fresh("btrfs", &["-q", "-m", "single", "-d", "single"], "compress=zstd,noatime", 16 << 30)?;
        let empty = mount.used();
        Ok(Self { mount, empty })
    }
}

impl System for Btrfs {
    fn add(&mut self, step: &Step, parent: Option<&Step>) -> Result<u64, String> {
        let path = self.mount.path().join(step.name);
        if let Some(parent) = parent {
            run("cp", &[&"--reflink=always", &self.mount.path().join(parent.name), &path])?;
        }
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(|e| e.to_string())?;
        file.set_len(SIZE).map_err(|e| e.to_string())?;
        corpus::changes(&step.image, parent.map(|p| p.image.as_path()), |at, bytes| {
            file.write_all_at(bytes, at).expect("a write");
        });
        file.sync_all().map_err(|e| e.to_string())?;
        Ok(self.mount.used() - self.empty)
    }
}

/// Backup programs: no live disk, but what they store for the same images.
struct Restic(tempfile::TempDir);

impl Restic {
    fn new(scratch: &Path) -> Result<Self, String> {
        if !tools::has("restic") {
            return Err("restic is not installed".into());
        }
        let this = Self(tempfile::tempdir_in(scratch).map_err(|e| e.to_string())?);
        this.call().arg("init").output().map_err(|e| e.to_string())?;
        Ok(this)
    }

    fn call(&self) -> std::process::Command {
        let mut command = std::process::Command::new("restic");
        command.env("RESTIC_PASSWORD", "bench").args(["--no-cache", "-q", "-r"]).arg(self.0.path());
        command
    }
}

impl System for Restic {
    fn add(&mut self, step: &Step, _: Option<&Step>) -> Result<u64, String> {
        tools::finish(self.call().arg("backup").arg(&step.image))?;
        Ok(allocated(self.0.path()))
    }
}

struct Borg {
    dir: tempfile::TempDir,
}

impl Borg {
    fn new(scratch: &Path) -> Result<Self, String> {
        if !tools::has("borg") {
            return Err("borgbackup is not installed".into());
        }
        let this = Self { dir: tempfile::tempdir_in(scratch).map_err(|e| e.to_string())? };
        tools::finish(this.call().args(["init", "-e", "none"]).arg(this.dir.path().join("repo")))?;
        Ok(this)
    }

    fn call(&self) -> std::process::Command {
        let mut command = std::process::Command::new("borg");
        // Its cache is not part of the repository and is not counted.
        command.env("BORG_BASE_DIR", self.dir.path().join("home"));
        command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        command
    }
}

impl System for Borg {
    fn add(&mut self, step: &Step, _: Option<&Step>) -> Result<u64, String> {
        let repo = self.dir.path().join("repo");
        let archive = format!("{}::{}", repo.display(), step.name);
        let args = ["create", "--sparse", "--chunker-params", "fixed,4096", "--compression", "zstd", &archive];
        tools::finish(self.call().args(args).arg(&step.image))?;
        Ok(allocated(&repo))
    }
}

/// Levels and frame sizes for packing again: what they save, what that takes, and what random reads cost then.
const PACKINGS: [(i32, u32); 6] = [(3, 128), (9, 64), (9, 128), (9, 256), (12, 128), (12, 256)];
const READ_ROUNDS: usize = 5;

fn packings(report: &mut Report, scratch: &Path, steps: &[&Step]) {
    let mut sealed = Miosa::new(scratch, Options::default().level);
    let mut blocks = Vec::new();
    for step in steps {
        sealed.add(step, None).expect("a step");
        blocks.clear();
        corpus::changes(&step.image, None, |at, bytes| blocks.extend((at..at + bytes.len() as u64).step_by(4096)));
    }
    let last = steps[steps.len() - 1].name;
    let read = |store: &Store, round: usize| {
        let disk = store.disk(store.disk_by_name(last).expect("it was added").id).expect("it is there");
        let mut random = Random(round as u64 + 1);
        let mut block = [0; 4096];
        store.drop_caches();
        let start = Instant::now();
        for _ in 0..3000 {
            disk.read(blocks[random.below(blocks.len() as u64) as usize], &mut block).expect("a read");
        }
        let miss = start.elapsed().as_secs_f64() / 3000.0;
        store.drop_caches();
        let (start, mut chunk) = (Instant::now(), vec![0; 1 << 20]);
        (0..SIZE / (4 << 20)).for_each(|i| disk.read(i << 20, &mut chunk).expect("a read"));
        [miss * 1e6, start.elapsed().as_secs_f64()]
    };
    for (level, kib) in PACKINGS {
        let copy = tempfile::tempdir_in(scratch).expect("a directory");
        sealed.store.flush().expect("a flush");
        run("cp", &[&"-a", &sealed.dir.path().join("."), &copy.path()]).expect("a copy");
        let options =
            Options { background: false, repack_level: level, repack_frame_bytes: kib << 10, ..Options::default() };
        let store = Store::open(copy.path(), options).expect("a store");
        let cpu = harness::cpu_seconds();
        let done = store.repack().expect("packing again");
        let rate = done.before_bytes as f64 / MB / (harness::cpu_seconds() - cpu);
        let rounds: Vec<_> = (0..READ_ROUNDS).map(|round| (read(&sealed.store, round), read(&store, round))).collect();
        let ratio = |i: usize| harness::median(rounds.iter().map(|(old, new)| new[i] / old[i]).collect());
        let case = format!("zstd {level}, {kib} KiB");
        report.row("miosa", &case, "packs", done.after_bytes as f64 / MB, "MB");
        report.row("miosa", &case, "to sealed", done.after_bytes as f64 / done.before_bytes as f64, "x");
        report.row("miosa", &case, "of sealed bytes, a core", rate, "MB/s");
        report.row("miosa", &case, "4 KiB miss", harness::median(rounds.iter().map(|r| r.1[0]).collect()), "us");
        report.row("miosa", &case, "4 KiB miss, to sealed", ratio(0), "x");
        report.row("miosa", &case, "sequential time, to sealed", ratio(1), "x");
    }
}

fn main() {
    tools::own_mounts();
    let mut report = Report::new("storage_cost");
    if !tools::can_mount() {
        report.missing("corpus", "it needs root and loop devices");
        return;
    }
    let steps = match corpus::corpus() {
        Ok(steps) => steps,
        Err(e) => {
            report.missing("corpus", &e);
            return;
        }
    };
    let parent = |step: &Step| steps.iter().find(|s| Some(s.name) == step.parent);
    for step in &steps {
        let mut changed = 0;
        corpus::changes(&step.image, parent(step).map(|p| p.image.as_path()), |_, bytes| changed += bytes.len());
        report.row("changed", &format!("{} {}", step.name, step.what), "raw bytes", changed as f64 / MB, "MB");
    }
    let scratch = cache_dir();
    if report.wants("packings") {
        packings(&mut report, &scratch, &steps.iter().take(2).collect::<Vec<_>>());
    }
    let systems: [(&str, Made); 8] = [
        ("miosa", Ok(Box::new(Miosa::new(&scratch, Options::default().level)))),
        ("miosa zstd3", Ok(Box::new(Miosa::new(&scratch, 3)))),
        ("qcow2", Qcow2::new(&scratch, false).map(|s| Box::new(s) as _)),
        ("qcow2 -c", Qcow2::new(&scratch, true).map(|s| Box::new(s) as _)),
        ("btrfs zstd", Btrfs::new().map(|s| Box::new(s) as _)),
        ("restic", Restic::new(&scratch).map(|s| Box::new(s) as _)),
        ("borg 4k", Borg::new(&scratch).map(|s| Box::new(s) as _)),
        ("limit", Limit::new().map(|s| Box::new(s) as _)),
    ];
    // Ours, by case; nothing to compare with when only a peer was asked for.
    let mut ours: HashMap<String, f64> = HashMap::new();
    for (name, system) in systems {
        if !report.wants(name) {
            continue;
        }
        let mut system = match system {
            Ok(system) => system,
            Err(e) => {
                report.missing(name, &e);
                continue;
            }
        };
        let mut before = 0;
        let mut figures = Vec::new();
        for step in &steps {
            let total = match system.add(step, parent(step)) {
                Ok(total) => total,
                Err(e) => {
                    report.missing(name, &e);
                    break;
                }
            };
            figures.push((format!("{} {}", step.name, step.what), (total as f64 - before as f64) / MB));
            before = total;
        }
        if figures.len() == steps.len() {
            figures.push(("total".to_owned(), before as f64 / MB));
            if let Some(after) = system.idle() {
                figures.push(("total, packed again".to_owned(), after as f64 / MB));
            }
        }
        for (part, bytes) in system.parts() {
            report.row(name, "total", part, bytes as f64 / MB, "MB");
        }
        for (case, value) in figures {
            report.row(name, &case, "stored bytes", value, "MB");
            if name == "miosa" {
                ours.insert(case, value);
            } else if let Some(ours) = ours.get(&case) {
                report.row(name, &case, "ratio to miosa", value / ours, "x");
            }
        }
    }
}
