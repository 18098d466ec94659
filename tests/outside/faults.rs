//! The daemon dies at its n-th system call of a kind, and each kind of call fails, is short or slow once: nothing that was
//! answered is lost, nothing hangs.
//!
//! strace counts calls thread by thread. It does not see io_uring, so that is refused to the daemon, which then does with
//! plain calls.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::Duration;

use storage::{Options, Store};

use crate::lab::{Daemon, Start, Watchdog, amount, done, run, seed, text, work_dir};
use crate::ledger::{Ledger, Load, Stop};

/// Things done by the load of one run.
const STEPS: u64 = 40;

/// A state directory with something in it, in packs and in the log, whose daemon was killed; and its ledger.
pub struct Prepared {
    pub dir: tempfile::TempDir,
    pub load: Load<'static>,
}

impl Prepared {
    pub fn new(seed: u64, steps: u64) -> Prepared {
        let dir = work_dir();
        let mut daemon = Daemon::start(&dir.path().join("s"), Start::busy());
        let mut load = Load::new("d", 7, seed, || 0);
        (0..steps).for_each(|_| load.step(&daemon).unwrap());
        daemon.ok("POST", "/store/seal", serde_json::Value::Null);
        (0..steps / 4).for_each(|_| load.step(&daemon).unwrap());
        daemon.kill();
        drop(daemon);
        load.mourn();
        Prepared { dir, load }
    }

    /// A copy of it.
    pub fn copy(&self, to: &Path) -> PathBuf {
        let _ = std::fs::remove_dir_all(to);
        run("cp", &["-a", "--sparse=always", text(&self.dir.path().join("s")), text(to)]);
        to.to_owned()
    }
}

/// Opens the store of a state directory that nobody has: everything that was answered is there, and nothing is damaged.
pub fn check_store(state: &Path, ledger: &Ledger) -> Result<u64, String> {
    let options = Options { background: false, ..Options::default() };
    let store = Store::open(&state.join("store"), options).map_err(|e| format!("does not open: {e:?}"))?;
    let right = ledger.check_store(u64::MAX, &store)?;
    let report = store.check().map_err(|e| format!("cannot be checked: {e:?}"))?;
    match report.damage.is_empty() {
        true => Ok(right),
        false => Err(format!("damage: {:?}", report.damage)),
    }
}

/// How one run ended.
struct Outcome {
    /// Faults that took place.
    fired: u64,
    blocks: u64,
}

/// One run of a load under strace.
fn run_under(prepared: &Prepared, at: &Path, seed: u64, call: &str, fault: &str) -> Result<Outcome, String> {
    let state = prepared.copy(&at.join("s"));
    let trace = at.join("trace");
    let _ = std::fs::remove_file(&trace);
    let mut start = Start::busy();
    let inject = format!("inject={call}:{fault}");
    let traced = format!("trace={call},io_uring_setup");
    // As a child of the daemon, so that a signal to the daemon is one to the daemon.
    start.before = [
        "strace",
        "-D",
        "-f",
        "-qq",
        "--seccomp-bpf",
        "-o",
        text(&trace),
        "-e",
        &traced,
        "-e",
        "signal=none",
        "-e",
        "inject=io_uring_setup:error=ENOSYS",
        "-e",
        &inject,
    ]
    .map(str::to_owned)
    .to_vec();
    let mut load = prepared.load.branch(seed);
    let mut hung = false;
    let mut died = false;
    match Daemon::try_start(&state, start) {
        Err(log) => {
            died = true;
            // It says why, unless it was killed.
            if !fault.starts_with("signal") && !log.contains("error") && !log.contains("could not") {
                return Err(format!("the daemon did not start and does not say why: {log}"));
            }
        }
        Ok(mut daemon) => {
            let dog = Watchdog::new(daemon.pid(), Duration::from_secs(90));
            let mut failures = 0;
            let _ = load.resume(&daemon);
            for _ in 0..STEPS {
                match load.step(&daemon) {
                    Ok(()) => {}
                    Err(Stop::Refused(e)) if e.status == 0 => break,
                    Err(_) => failures += 1,
                }
                // Poisoned, most likely: the rest would be refused, too.
                if failures > 8 {
                    break;
                }
            }
            hung |= dog.bit.load(Ordering::SeqCst);
            died |= daemon.has_ended();
            hung |= !died && !daemon.stop();
            daemon.kill();
        }
    }
    load.mourn();
    if hung {
        return Err("the daemon hangs".to_owned());
    }
    let blocks = check_store(&state, &load.ledger)?;
    let injected = std::fs::read_to_string(&trace).unwrap_or_default().matches("(INJECTED)").count() as u64;
    // A daemon that is killed leaves no line of the call that it was killed at.
    let fired = if fault.starts_with("signal") { u64::from(died) } else { injected };
    Ok(Outcome { fired, blocks })
}

/// Tries a fault at calls 1, 2, 3, … of each kind, until there is no such call, or `most` were tried, evenly.
fn sweep(what: &str, calls: &[&str], faults: &[&str], most: u64, every: u64) {
    let seed = seed();
    let prepared = Prepared::new(seed, 60);
    let at = work_dir();
    let (mut runs, mut fired, mut blocks, mut bad) = (0, 0, 0, Vec::new());
    for call in calls {
        for fault in faults {
            let mut misses = 0;
            for when in (1..=most * every).step_by(every as usize) {
                let fault = fault.replace("{n}", &when.to_string());
                match run_under(&prepared, at.path(), seed ^ when << 8, call, &fault) {
                    Ok(outcome) => {
                        runs += 1;
                        fired += u64::from(outcome.fired > 0);
                        blocks += outcome.blocks;
                        misses = if outcome.fired > 0 { 0 } else { misses + 1 };
                    }
                    Err(e) => bad.push(format!("MIOSA_OUTSIDE_SEED={seed} {call}:{fault}: {e}")),
                }
                if misses == 2 {
                    break;
                }
            }
        }
    }
    println!("{what}: {runs} runs, a fault in {fired}, {blocks} flushed blocks read back");
    assert!(bad.is_empty(), "{} of {runs} bad: {:#?}", bad.len(), &bad[..bad.len().min(6)]);
    assert!(fired > 0, "no fault took place");
}

const WRITES: [&str; 9] =
    ["pwrite64", "write", "fdatasync", "fsync", "rename", "ftruncate", "fallocate", "unlink", "unlinkat"];

#[test]
fn a_daemon_that_dies_at_any_system_call_loses_nothing_that_was_answered() {
    let (most, every) = (amount("MIOSA_SWEEP", 1, 60), amount("MIOSA_SWEEP_EVERY", 5, 1));
    sweep("killed at a system call", &WRITES, &["signal=SIGKILL:when={n}"], most, every);
}

#[test]
fn a_call_that_fails_or_is_slow_loses_nothing_that_was_answered_and_nothing_hangs() {
    let (most, every) = (amount("MIOSA_SWEEP", 1, 25), amount("MIOSA_SWEEP_EVERY", 4, 1));
    let mut calls = vec!["pwrite64", "fdatasync", "fsync", "rename", "fallocate", "pread64"];
    if crate::lab::is_long() {
        calls.extend(["write", "ftruncate", "unlink", "openat", "mkdir"]);
    }
    sweep("a call failed", &calls, &["error=EIO:when={n}", "error=ENOSPC:when={n}"], most, every);
    let delays = ["delay_exit=20000:when={n}+3"];
    sweep("calls were slow", &["fdatasync", "pwrite64", "pread64"], &delays, amount("MIOSA_SWEEP", 1, 2), 1);
    let lasting = ["error=ENOSPC:when={n}+", "error=EIO:when={n}+"];
    sweep("calls failed from one on", &["pwrite64", "fdatasync", "fallocate"], &lasting, most.min(8), 7);
}

/// The library that shortens calls and moves the clock.
pub fn preload() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/outside/fault.c");
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fault.so");
        done("cc", Command::new("cc").args(["-O1", "-Wall", "-shared", "-fPIC", "-o"]).args([&library, &source]));
        library
    })
}

#[test]
fn short_reads_and_writes_change_nothing() {
    let seed = seed();
    let prepared = Prepared::new(seed, 60);
    let at = work_dir();
    let (mut shortened, mut blocks) = (0, 0);
    let runs = amount("MIOSA_SHORT_RUNS", 2, 60);
    for round in 0..runs {
        let state = prepared.copy(&at.path().join("s"));
        let report = at.path().join("report");
        let mut start = Start::busy();
        let words = [
            ("LD_PRELOAD", text(preload())),
            ("FAULT_SHORT", ["2", "3", "7"][round as usize % 3]),
            ("FAULT_REPORT", text(&report)),
        ];
        start.env = words.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec();
        let mut load = prepared.load.branch(seed ^ round << 16);
        let mut daemon = Daemon::start(&state, start);
        load.resume(&daemon).unwrap();
        for step in 0..STEPS * 2 {
            load.step(&daemon).unwrap_or_else(|e| panic!("round {round}, step {step}: {e:?}"));
        }
        if round % 2 == 0 {
            daemon.kill();
        }
        assert!(daemon.stop());
        drop(daemon);
        load.mourn();
        blocks += check_store(&state, &load.ledger).unwrap_or_else(|e| panic!("round {round}: {e}"));
        shortened += std::fs::metadata(&report).unwrap().len();
    }
    println!("short calls: {shortened} in {runs} runs, {blocks} flushed blocks read back");
    assert!(shortened > 50);
}
