//! Power cuts beneath a real file system under the real daemon.
//!
//! The state directory is on a file system on a loop device, on nbdfuse, on qemu-nbd with `blklogwrites`, which notes
//! every write, flush and discard in the order in which they came. Then, for points of that record, the medium is made as
//! a power cut there may have left it, mounted, and opened by the store, and compared with what had been answered until
//! then. Device-mapper is not needed.
//!
//! `MIOSA_POWER_POINTS` points of each file system and kind of cut are tried.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use storage::{Options, Store};

use crate::lab::{Chance, Daemon, MIB, Mounted, Start, amount, run, seed, text, work_dir};
use crate::ledger::{Ledger, Load};

/// Bytes of a sector in the record.
const SECTOR: u64 = 512;
/// What is written whole or not at all: file systems do not expect less of a disk. (Of what the store itself writes, the
/// simulated medium tears every 512 bytes.)
const TORN: u64 = 4096;
const MAGIC: u64 = 0x6a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// A disk whose every write and flush is noted.
struct Recorder {
    dir: PathBuf,
    mounted: Option<Mounted>,
    server: Child,
    shown: Child,
}

impl Recorder {
    fn new(dir: &Path, kind: &str, bytes: u64) -> Recorder {
        File::create(dir.join("raw")).unwrap().set_len(bytes).unwrap();
        File::create(dir.join("record")).unwrap().set_len(16 << 30).unwrap();
        File::create(dir.join("disk")).unwrap();
        let options = format!(
            "driver=blklogwrites,log-sector-size=512,log-super-update-interval=1,file.driver=file,file.filename={0}/raw,\
             log.driver=file,log.filename={0}/record",
            text(dir)
        );
        let socket = dir.join("nbd");
        let mut server = Command::new("qemu-nbd");
        server.args([
            "--socket",
            text(&socket),
            "--persistent",
            "--shared=4",
            "--discard=unmap",
            "--image-opts",
            &options,
        ]);
        let server = server.spawn().unwrap_or_else(|e| panic!("this test needs qemu-nbd: {e}"));
        until("qemu-nbd", || socket.exists());
        let pid = dir.join("shown");
        let uri = format!("nbd+unix:///?socket={}", text(&socket));
        let mut shown = Command::new("nbdfuse");
        shown.args(["-P", text(&pid), text(&dir.join("disk")), &uri]).stdin(Stdio::null());
        let shown = shown.spawn().unwrap_or_else(|e| panic!("this test needs nbdfuse: {e}"));
        let mut recorder = Recorder { dir: dir.to_owned(), mounted: None, server, shown };
        until("nbdfuse", || pid.exists());
        let mounted = Mounted::made(kind, &dir.join("disk"), &dir.join("mnt"), "");
        recorder.mounted = Some(mounted);
        recorder
    }

    /// What has been noted so far.
    fn count(dir: &Path) -> impl Fn() -> u64 + Send + use<> {
        let record = File::open(dir.join("record")).unwrap();
        move || {
            let mut count = [0; 8];
            record.read_exact_at(&mut count, 16).unwrap();
            u64::from_le_bytes(count)
        }
    }

    /// Takes it down; the record stays.
    fn end(mut self) {
        drop(self.mounted.take().unwrap().unmount());
        self.take_down();
    }

    fn take_down(&mut self) {
        drop(self.mounted.take());
        // A loop device lets go of its file a moment after it was told to.
        let began = Instant::now();
        while !Command::new("fusermount3").arg("-u").arg(self.dir.join("disk")).output().unwrap().status.success() {
            if began.elapsed() > Duration::from_secs(20) {
                let _ = self.shown.kill();
                let _ = Command::new("umount").arg("-l").arg(self.dir.join("disk")).output();
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.shown.wait();
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.server.id() as i32), nix::sys::signal::SIGTERM);
        let _ = self.server.wait();
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if matches!(self.server.try_wait(), Ok(None)) {
            self.take_down();
        }
    }
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} is not there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One thing that reached the medium.
#[derive(Clone, Copy)]
struct Event {
    offset: u64,
    bytes: u64,
    flags: u64,
    /// Where its data is in the record.
    data_at: u64,
}

fn events(record: &File) -> Vec<Event> {
    let word = |at: u64| {
        let mut bytes = [0; 8];
        record.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    };
    assert_eq!(word(0), MAGIC, "no record of blklogwrites");
    assert_eq!(word(24) as u32 as u64, SECTOR);
    let mut at = SECTOR;
    let mut all = Vec::new();
    for _ in 0..word(16) {
        let event = Event {
            offset: word(at) * SECTOR,
            bytes: word(at + 8) * SECTOR,
            flags: word(at + 16),
            data_at: at + SECTOR,
        };
        at = event.data_at + if event.flags & DISCARD == 0 { event.bytes } else { 0 };
        all.push(event);
    }
    all
}

/// Carries an event out, or its first `limit` bytes.
fn apply(record: &File, event: Event, image: &File, limit: Option<u64>) {
    if event.flags & MARK != 0 || event.bytes == 0 {
        return;
    }
    let bytes = limit.map_or(event.bytes, |l| l.min(event.bytes));
    if event.flags & DISCARD != 0 {
        use nix::fcntl::{FallocateFlags, fallocate};
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(image, punch, event.offset as i64, bytes as i64).unwrap();
        return;
    }
    let mut data = vec![0; bytes as usize];
    record.read_exact_at(&mut data, event.data_at).unwrap();
    image.write_all_at(&data, event.offset).unwrap();
}

/// What a power cut leaves of what came since the last flush.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cut {
    /// All of it.
    Prefix,
    /// Any part of it.
    Reordered,
    /// Any part of it, and of the last write its beginning only.
    Torn,
}

/// A load on the real daemon on a recorded file system: its ledgers, and where the record of the load begins.
fn record(dir: &Path, kind: &str, seed: u64, steps: u64) -> (Vec<Ledger>, u64) {
    let recorder = Recorder::new(dir, kind, bytes_of(kind));
    let count = Recorder::count(dir);
    let first = count();
    let mut daemon = Daemon::start(&dir.join("mnt/state"), Start::busy());
    let ledgers = std::thread::scope(|scope| {
        let daemon = &daemon;
        let loads: Vec<_> = (0..2)
            .map(|i| {
                let count = Recorder::count(dir);
                scope.spawn(move || {
                    let mut load = Load::new(&format!("d{i}"), i + 1, seed, count);
                    for _ in 0..steps {
                        load.step(daemon).unwrap_or_else(|e| panic!("{e:?}: {}", daemon.log()));
                    }
                    load.ledger
                })
            })
            .collect();
        loads.into_iter().map(|load| load.join().unwrap()).collect::<Vec<_>>()
    });
    // Dead, since an orderly end would flush.
    daemon.kill();
    drop(daemon);
    recorder.end();
    (ledgers, first)
}

fn bytes_of(kind: &str) -> u64 {
    if kind == "ext4" { 160 * MIB } else { 400 * MIB }
}

/// Points are the numbers of events after which the power goes.
fn replay(dir: &Path, kind: &str, cut: Cut, points: &[u64], seed: u64, ledgers: &[Ledger]) -> (u64, Vec<String>) {
    let record = File::open(dir.join("record")).unwrap();
    let events = events(&record);
    let base_path = dir.join("base");
    let base = File::options().read(true).write(true).create(true).truncate(true).open(&base_path).unwrap();
    base.set_len(bytes_of(kind)).unwrap();
    let mut since_flush: Vec<Event> = Vec::new();
    let (mut right, mut bad) = (0, Vec::new());
    let mut points = points.iter().copied().peekable();
    for (k, event) in events.iter().enumerate() {
        let k = k as u64 + 1;
        since_flush.push(*event);
        if event.flags & FLUSH != 0 {
            since_flush.drain(..).for_each(|event| apply(&record, event, &base, None));
        }
        while points.peek() == Some(&k) {
            points.next();
            let image = dir.join("image");
            run("cp", &["--sparse=always", text(&base_path), text(&image)]);
            let file = File::options().write(true).open(&image).unwrap();
            let mut chance = Chance::new(seed ^ k << 20);
            let kept = since_flush.iter().filter(|_| cut == Cut::Prefix || chance.below(2) == 0).collect::<Vec<_>>();
            for (i, event) in kept.iter().enumerate() {
                let is_torn = cut == Cut::Torn && i + 1 == kept.len() && event.bytes >= 2 * TORN;
                let limit = is_torn.then(|| TORN * (1 + Chance::new(seed ^ k).below(event.bytes / TORN - 1)));
                apply(&record, **event, &file, limit);
            }
            drop(file);
            match examine(dir, kind, k, ledgers) {
                Ok(blocks) => right += blocks,
                Err(e) => {
                    bad.push(format!("MIOSA_OUTSIDE_SEED={seed}: {kind}, {cut:?}, power cut after event {k}: {e}"))
                }
            }
        }
    }
    (right, bad)
}

/// Mounts the image and looks whether everything is there that was told up to event `k`.
fn examine(dir: &Path, kind: &str, k: u64, ledgers: &[Ledger]) -> Result<u64, String> {
    let options = if kind == "xfs" { "nouuid" } else { "" };
    let device = crate::lab::Loop::new(&dir.join("image"));
    let mounted = Mounted::attempt(device, &dir.join("mnt2"), options).map_err(|e| format!("does not mount: {e}"))?;
    let state = mounted.at.join("state/store");
    let examined = (|| {
        if !state.is_dir() {
            // Before the first answer there may be no store.
            let there = ledgers.iter().map(|l| l.check(k, |_| None)).sum::<Result<u64, String>>();
            return there.map_err(|e| format!("{e}: there is no store"));
        }
        let options = Options { background: false, reserve_bytes: 0, ..Options::default() };
        let store = Store::open(&state, options).map_err(|e| format!("does not open: {e:?}"))?;
        let mut right = 0;
        for ledger in ledgers {
            right += ledger.check_store(k, &store)?;
        }
        let report = store.check().map_err(|e| format!("cannot be checked: {e:?}"))?;
        match report.damage.is_empty() {
            true => Ok(right),
            false => Err(format!("damage: {:?}", report.damage)),
        }
    })();
    drop(mounted.unmount());
    examined
}

/// One at a time: two mounts of copies of one btrfs are more than it can tell apart, and the disk is one.
static ONE: Mutex<()> = Mutex::new(());

fn power_goes(kind: &str, short: u64, long: u64) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let seed = seed();
    let wanted = amount("MIOSA_POWER_POINTS", short, long);
    let dir = work_dir();
    let began = Instant::now();
    let (ledgers, first) = record(dir.path(), kind, seed, amount("MIOSA_POWER_STEPS", 150, 600));
    let last = Recorder::count(dir.path())();
    let recorded = began.elapsed();
    let acknowledged: u64 = ledgers.iter().map(Ledger::acknowledged).sum();
    assert!(acknowledged > 15 && last > first + 100, "the load did too little: {acknowledged} answers");
    let mut figures: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    let mut bad = Vec::new();
    for (cut, name) in [(Cut::Prefix, "prefix"), (Cut::Reordered, "reordered"), (Cut::Torn, "torn")] {
        let mut chance = Chance::new(seed ^ cut as u64);
        let span = (last - first) as f64 / wanted as f64;
        let mut point =
            |i: u64| first + 1 + ((i as f64 + chance.below(1 << 20) as f64 / (1 << 20) as f64) * span) as u64;
        let mut points: Vec<u64> = (0..wanted).map(&mut point).filter(|k| *k <= last).collect();
        points.sort_unstable();
        let (right, failures) = replay(dir.path(), kind, cut, &points, seed, &ledgers);
        figures.insert(name, (points.len(), right));
        bad.extend(failures);
    }
    println!(
        "power cuts on {kind}: {figures:?} (points, flushed blocks read back) of {} events and {acknowledged} answers, \
         recorded in {:.0} s, replayed in {:.0} s",
        last - first,
        recorded.as_secs_f64(),
        (began.elapsed() - recorded).as_secs_f64()
    );
    assert!(bad.is_empty(), "{} bad: {:#?}", bad.len(), &bad[..bad.len().min(5)]);
}

#[test]
fn what_was_answered_survives_power_cuts_on_ext4() {
    power_goes("ext4", 20, 700);
}

#[test]
fn what_was_answered_survives_power_cuts_on_xfs() {
    power_goes("xfs", 10, 500);
}

#[test]
fn what_was_answered_survives_power_cuts_on_btrfs() {
    power_goes("btrfs", 5, 300);
}
