//! From a call to the first program that has run, with a real daemon, real QEMU and a real Debian guest, by machines that
//! boot and by machines that go on from a kept state; the store's part of it, measured alone; how long a snapshot stalls a
//! running guest's writes; and the same of pauses, forks and snapshots with memory, and what kept memory costs.
//!
//! `cargo bench --bench lifecycle [-- --json FILE] [--rounds N]`. Needs what `tests/e2e.rs` needs, and the guest's agent
//! as `MIOSA_AGENT` or beside `miosa`. Times are of the command line, its own start included.

mod harness;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::{Report, Samples};
use storage::{Options, Source, Store};

/// Writes 4 KiB again and again for ten seconds; prints the longest time between two writes, in microseconds.
const WRITER: &str = "
import os, time
f = os.open('/workspace/writes', os.O_CREAT | os.O_WRONLY)
longest, last, end = 0, time.monotonic(), time.monotonic() + 10
while last < end:
    os.pwrite(f, b'x' * 4096, 0)
    now = time.monotonic()
    longest, last = max(longest, now - last), now
print(int(longest * 1e6))
";

/// Counts for eight seconds; prints the longest time between two counts, in microseconds of the guest's clock, which stands
/// still while the machine is held: what it notices is the work around that.
const COUNTER: &str = "
import time
longest, last, end = 0, time.monotonic(), time.monotonic() + 8
while last < end:
    now = time.monotonic()
    longest, last = max(longest, now - last), now
print(int(longest * 1e6))
";

/// Of a freeze, as the daemon counts them.
const PHASES: [&str; 3] = ["freeze", "commit", "thaw"];

struct Daemon {
    dir: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    fn start(extra: &[&str]) -> Daemon {
        let dir = tempfile::tempdir().expect("a directory");
        let log = std::fs::File::create(dir.path().join("log")).expect("a log");
        let child = Command::new(env!("CARGO_BIN_EXE_miosa"))
            .args(["daemon", "--default-memory", "256mb", "--boot-timeout", "4m"])
            .args(extra)
            .env("MIOSA_STATE_DIR", dir.path())
            .env("MIOSA_CACHE_DIR", harness::cache_dir())
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the daemon");
        let daemon = Daemon { dir, child };
        let began = Instant::now();
        while daemon.try_run(&["sandbox", "list"]).is_none() {
            assert!(began.elapsed() < Duration::from_secs(60), "the daemon is not ready");
            std::thread::sleep(Duration::from_millis(50));
        }
        daemon
    }

    fn command(dir: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_miosa"));
        command.args(args).env("MIOSA_STATE_DIR", dir).stdin(Stdio::null());
        command
    }

    fn try_run(&self, args: &[&str]) -> Option<String> {
        let done = Self::command(self.dir.path(), args).output().expect("miosa runs");
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).into_owned())
    }

    fn run(&self, args: &[&str]) -> String {
        self.try_run(args).unwrap_or_else(|| panic!("{args:?} failed"))
    }

    /// A daemon with a template and a running sandbox `parent`.
    fn with_parent(extra: &[&str]) -> Daemon {
        let daemon = Daemon::start(extra);
        daemon.run(&["template", "build", "base", "--disk", "2gb"]);
        daemon.run(&["sandbox", "create", "--name", "parent", "--wait"]);
        daemon
    }

    /// Which way the sandbox's session came up.
    fn boot_path(&self, name: &str) -> String {
        let told: serde_json::Value =
            serde_json::from_str(&self.run(&["--json", "sandbox", "show", name])).expect("a sandbox");
        told["boot_path"].as_str().unwrap_or_default().to_owned()
    }

    /// Starts the parent again until that is without a boot.
    fn until_warm(&self) {
        let began = Instant::now();
        while self.boot_path("parent") != "warm" {
            assert!(began.elapsed() < Duration::from_secs(120), "no state is kept");
            std::thread::sleep(Duration::from_secs(1));
            self.run(&["sandbox", "stop", "parent"]);
            self.run(&["sandbox", "exec", "parent", "--", "true"]);
        }
    }

    /// Creates, resumes and forks once each, up to the first program that has run; the sandbox is destroyed.
    fn round(&self, round: usize, way: &str, times: &mut [Samples; 3]) {
        let (new, child) = (format!("new-{round}"), format!("child-{round}"));
        let expect = |name: &str| assert_eq!(self.boot_path(name), way);
        let [create, resume, fork] = times;
        create.time(|| {
            self.run(&["sandbox", "create", "--name", &new, "--wait"]);
            self.run(&["sandbox", "exec", &new, "--", "true"])
        });
        expect(&new);
        self.run(&["sandbox", "stop", &new]);
        resume.time(|| self.run(&["sandbox", "exec", &new, "--", "true"]));
        expect(&new);
        fork.time(|| {
            self.run(&["sandbox", "fork", "parent", "--name", &child]);
            self.run(&["sandbox", "exec", &child, "--", "true"])
        });
        expect(&child);
        for name in [&new, &child] {
            self.run(&["sandbox", "destroy", name]);
        }
    }

    /// Waits until a machine waits for the next sandbox.
    fn until_spare(&self) {
        let began = Instant::now();
        while self.counted("miosa_spare_machines ") < 1.0 {
            assert!(began.elapsed() < Duration::from_secs(60), "no machine waits");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Creates a sandbox for which no machine waits, up to the first program that has run; it is destroyed.
    fn create_without_spare(&self, times: &mut Samples) {
        times.time(|| {
            self.run(&["sandbox", "create", "--name", "unawaited", "--no-start"]);
            self.run(&["sandbox", "exec", "unawaited", "--", "true"])
        });
        self.run(&["sandbox", "destroy", "unawaited"]);
    }

    /// Pauses, resumes and forks once each, with memory or without, up to the first program that has run.
    fn memory_round(&self, with: bool, times: &mut [Samples; 3]) {
        let option: &[&str] = if with { &["--memory"] } else { &[] };
        let [pause, resume, fork] = times;
        self.run(&["sandbox", "exec", "parent", "--", "true"]);
        pause.time(|| self.run(&[&["sandbox", "stop", "parent"], option].concat()));
        resume.time(|| self.run(&["sandbox", "exec", "parent", "--", "true"]));
        assert_eq!(self.boot_path("parent") == "memory", with);
        fork.time(|| {
            self.run(&[&["sandbox", "fork", "parent", "--name", "child", "--wait"], option].concat());
            self.run(&["sandbox", "exec", "child", "--", "true"])
        });
        assert_eq!(self.boot_path("child") == "memory", with);
        self.run(&["sandbox", "destroy", "child"]);
    }

    /// Bytes that the store takes, all of it sealed and nothing in it that nobody refers to.
    fn stored(&self) -> f64 {
        self.run(&["store", "seal"]);
        self.run(&["store", "gc"]);
        let told: serde_json::Value = serde_json::from_str(&self.run(&["--json", "store", "stats"])).expect("figures");
        told["pack_bytes"].as_f64().expect("bytes") + told["map_bytes"].as_f64().expect("bytes")
    }

    /// Seconds that guests' file systems have been freezing, kept frozen and thawing so far.
    fn frozen(&self) -> [f64; 3] {
        PHASES.map(|phase| self.counted(&format!("miosa_freeze_duration_seconds_sum{{phase=\"{phase}\"}} ")))
    }

    /// A figure of the daemon's.
    fn counted(&self, name: &str) -> f64 {
        let mut stream = UnixStream::connect(self.dir.path().join("miosa.sock")).expect("the daemon's socket");
        stream.write_all(b"GET /metrics HTTP/1.0\r\nhost: x\r\n\r\n").expect("a request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("figures");
        text.lines().find_map(|line| line.strip_prefix(name)).map_or(0.0, |sum| sum.parse().expect("a number"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // In order, so that no machine is left.
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

fn main() {
    let mut report = Report::new("lifecycle");
    let rounds = harness::argument("--rounds").and_then(|rounds| rounds.parse().ok()).unwrap_or(5);
    store_alone(&mut report);
    // In turns, so that whatever else the host does meets them alike.
    let (cold, daemon) = (Daemon::with_parent(&["--no-warm-machines"]), Daemon::with_parent(&[]));
    daemon.until_warm();
    let (mut booted, mut kept): ([Samples; 3], [Samples; 3]) = Default::default();
    let mut unawaited = Samples::default();
    for round in 0..rounds {
        cold.round(round, "cold", &mut booted);
        daemon.create_without_spare(&mut unawaited);
        daemon.until_spare();
        daemon.round(round, "warm", &mut kept);
    }
    drop(cold);
    let (booted_create, unawaited) = (booted[0].quantile_us(0.5) / 1e3, unawaited.quantile_us(0.5) / 1e3);
    report.row("miosa", "create to first exec, no machine waits", "median", unawaited, "ms");
    report.row("miosa", "create to first exec, boot over that", "ratio", booted_create / unawaited, "times");
    for (case, (booted, kept)) in ["create", "resume", "fork"].iter().zip(booted.iter_mut().zip(&mut kept)) {
        let case = format!("{case} to first exec");
        let (cold, warm) = (booted.quantile_us(0.5) / 1e3, kept.quantile_us(0.5) / 1e3);
        report.row("miosa", &format!("{case}, by a boot"), "median", cold, "ms");
        report.row("miosa", &format!("{case}, from a kept state"), "median", warm, "ms");
        report.row("miosa", &format!("{case}, boot over kept state"), "ratio", cold / warm, "times");
    }
    let stalls = |snapshots: bool| {
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| daemon.run(&["sandbox", "exec", "parent", "--", "python3", "-c", WRITER]));
            std::thread::sleep(Duration::from_secs(3));
            let mut taken = Samples::default();
            if snapshots {
                taken.time(|| daemon.run(&["sandbox", "snapshot", "parent", "--name", "bench"]));
            }
            let longest: f64 = writer.join().expect("the writer").trim().parse().expect("a number");
            (longest / 1e3, taken)
        })
    };
    let (mut without, mut with, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    let (mut phases, mut whole) = ([const { Vec::new() }; 3], Vec::new());
    for _ in 0..rounds {
        without.push(stalls(false).0);
        let before = daemon.frozen();
        let (longest, mut taken) = stalls(true);
        with.push(longest);
        calls.push(taken.quantile_us(0.5) / 1e3);
        let after = daemon.frozen();
        let took: [f64; 3] = std::array::from_fn(|phase| (after[phase] - before[phase]) * 1e3);
        phases.iter_mut().zip(took).for_each(|(all, ms)| all.push(ms));
        whole.push(took.iter().sum());
    }
    for (phase, all) in PHASES.iter().zip(phases) {
        report.row("miosa", &format!("freeze of a running guest: {phase}"), "median", harness::median(all), "ms");
    }
    report.row("miosa", "freeze of a running guest, asked until thawed", "median", harness::median(whole), "ms");
    report.row("miosa", "writes of a running guest", "longest gap, alone", harness::median(without), "ms");
    report.row("miosa", "writes of a running guest", "longest gap, snapshot", harness::median(with), "ms");
    report.row("miosa", "snapshot of a running guest", "median", harness::median(calls), "ms");
    with_memory(&mut report, &daemon, rounds);
}

/// What is kept is what runs, too.
fn with_memory(report: &mut Report, daemon: &Daemon, rounds: usize) {
    let (mut files, mut memory): ([Samples; 3], [Samples; 3]) = Default::default();
    for _ in 0..rounds {
        daemon.memory_round(false, &mut files);
        daemon.memory_round(true, &mut memory);
    }
    let cases = ["pause", "resume to first exec", "fork to first exec"];
    for (case, (files, memory)) in cases.iter().zip(files.iter_mut().zip(&mut memory)) {
        report.row("miosa", &format!("{case}, files"), "median", files.quantile_us(0.5) / 1e3, "ms");
        report.row("miosa", &format!("{case}, with memory"), "median", memory.quantile_us(0.5) / 1e3, "ms");
    }

    let large = ["sandbox", "create", "--name", "large", "--memory", "512mb", "--wait"];
    daemon.run(&large);
    let exec = |script: &str| daemon.run(&["sandbox", "exec", "large", "--", "python3", "-c", script]);
    let (mut held, mut gaps, mut calls, mut alone) = (Vec::new(), Vec::new(), Samples::default(), Vec::new());
    let number = |text: String| text.trim().parse::<f64>().expect("a number") / 1e3;
    for _ in 0..rounds {
        alone.push(number(exec(COUNTER)));
        let before = daemon.counted("miosa_hold_duration_seconds_sum ");
        let gap = std::thread::scope(|scope| {
            let counter = scope.spawn(|| exec(COUNTER));
            std::thread::sleep(Duration::from_secs(3));
            calls.time(|| daemon.run(&["sandbox", "snapshot", "large", "--memory", "--name", "bench-memory"]));
            counter.join().expect("the counter")
        });
        gaps.push(number(gap));
        held.push((daemon.counted("miosa_hold_duration_seconds_sum ") - before) * 1e3);
    }
    let case = "snapshot with memory of 512 MiB";
    report.row("miosa", case, "machine held, median", harness::median(held), "ms");
    report.row("miosa", case, "longest gap in the guest, alone", harness::median(alone), "ms");
    report.row("miosa", case, "longest gap in the guest", harness::median(gaps), "ms");
    report.row("miosa", case, "call, median", calls.quantile_us(0.5) / 1e3, "ms");
    daemon.run(&["sandbox", "destroy", "large"]);

    // A sandbox that has just started and does nothing.
    let (mut shares, mut bytes) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        daemon.run(&["sandbox", "create", "--name", "idle", "--wait"]);
        let used = "awk '/MemTotal/ { t = $2 } /MemAvailable/ { a = $2 } END { print t - a }' /proc/meminfo";
        let used: f64 = daemon.run(&["sandbox", "exec", "idle", "--", "sh", "-c", used]).trim().parse().expect("KiB");
        let before = daemon.stored();
        daemon.run(&["sandbox", "stop", "idle", "--memory"]);
        let cost = daemon.stored() - before;
        bytes.push(cost / 1e6);
        shares.push(cost / (used * 1024.0) * 100.0);
        daemon.run(&["sandbox", "destroy", "idle"]);
    }
    report.row("miosa", "an idle sandbox paused with memory", "stored, median", harness::median(bytes), "MB");
    report.row("miosa", "an idle sandbox paused with memory", "of memory in use", harness::median(shares), "%");
}

/// The transactions that create, resume and fork wait for.
fn store_alone(report: &mut Report) {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::open(dir.path(), Options::default()).expect("a store");
    let mut tx = store.begin();
    let disk = tx.create_disk("parent", 2 << 30);
    tx.commit_durable().expect("a commit");
    store.disk(disk).expect("there").write(0, &vec![7; 64 << 20]).expect("a write");
    store.seal().expect("sealing");
    let (mut fork, mut record, mut open) = (Samples::default(), Samples::default(), Samples::default());
    let mut snapshot = Samples::default();
    for round in 0..100 {
        let child = fork.time(|| {
            let mut tx = store.begin();
            let child = tx.fork(Source::Disk(disk), &format!("child-{round}"));
            tx.put_record("sandbox", &format!("sb-{round}"), vec![b'x'; 1_000]);
            tx.commit_durable().expect("a commit");
            child
        });
        snapshot.time(|| {
            let mut tx = store.begin();
            tx.snapshot(disk, &format!("state-{round}"));
            tx.put_record("snapshot", &format!("snap-{round}"), vec![b'x'; 1_000]);
            tx.commit_durable().expect("a commit");
        });
        open.time(|| store.disk(child).expect("there"));
        record.time(|| {
            let mut tx = store.begin();
            tx.put_record("sandbox", &format!("sb-{round}"), vec![b'y'; 1_000]);
            tx.commit_durable().expect("a commit");
        });
    }
    let cases = [
        ("create or fork, durable", &mut fork),
        ("snapshot, durable", &mut snapshot),
        ("a record, durable", &mut record),
    ];
    for (case, samples) in cases {
        report.row("store", case, "median", samples.quantile_us(0.5) / 1e3, "ms");
    }
    report.row("store", "open a disk", "median", open.quantile_us(0.5) / 1e3, "ms");
}
