//! Days in miniature: many sandboxes are created, written to, snapshot, forked, stopped, resumed, restored and destroyed, again
//! and again, and each file of each of them is what was written there. At the end of each lap nothing is left, and neither
//! memory nor descriptors nor stored bytes of the daemon grow from lap to lap.
//!
//! `MIOSA_E2E_SOAK_SECONDS` says for how long laps begin, `MIOSA_E2E_SOAK_SANDBOXES` how many sandboxes there are at a time.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{Lab, cache_dir, until};

/// Steps in the life of a sandbox.
const STEPS: usize = 8;
/// Calls that are under way at a time: more would wait for this machine's processors and not for the daemon.
const CALLS: usize = 4;

/// xorshift.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// What the daemon has when nothing is there.
#[derive(Debug, Clone, Copy)]
struct Sample {
    memory_kib: u64,
    descriptors: u64,
    stored: u64,
}

/// A sandbox and what is in its files, by name: a number that the content is made of, and its length.
#[derive(Clone)]
struct Life {
    name: String,
    files: BTreeMap<u64, (u64, usize)>,
}

struct Soak<'a> {
    lab: &'a Lab,
    turns: &'a Turns,
    chance: Chance,
    /// Its files on the host, for those of the guests.
    dir: tempfile::TempDir,
    checked: u64,
}

/// Who may call.
struct Turns {
    free: Mutex<usize>,
    freed: Condvar,
}

impl Turns {
    fn take<T>(&self, call: impl FnOnce() -> T) -> T {
        let waits = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        *self.freed.wait_while(waits, |free| *free == 0).unwrap_or_else(PoisonError::into_inner) -= 1;
        let _turn = Turn(self);
        call()
    }
}

/// Somebody's turn; over when dropped, also by a failure.
struct Turn<'a>(&'a Turns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

/// Lines that differ from each other and compress as text does.
fn content(of: u64, len: usize) -> Vec<u8> {
    let line = |line: u64| format!("{:016x} {line}\n", (of ^ line).wrapping_mul(0x9E37_79B9_7F4A_7C15)).into_bytes();
    (0..).flat_map(line).take(len).collect()
}

impl Soak<'_> {
    fn call(&self, words: &[&str]) -> serde_json::Value {
        self.turns.take(|| self.lab.json(words))
    }

    fn write(&mut self, to: &mut Life) {
        let (file, of, len) =
            (self.chance.below(4), self.chance.below(1 << 40), 1 + self.chance.below(600_000) as usize);
        let here = self.dir.path().join("file");
        std::fs::write(&here, content(of, len)).unwrap();
        let there = format!("/workspace/file-{file}");
        self.call(&["sandbox", "write-file", &to.name, &there, here.to_str().unwrap()]);
        to.files.insert(file, (of, len));
    }

    fn check(&mut self, of: &Life) {
        for (file, (made_of, len)) in &of.files {
            let here = self.dir.path().join("read");
            let there = format!("/workspace/file-{file}");
            self.call(&["sandbox", "read-file", &of.name, &there, "--output", here.to_str().unwrap()]);
            let found = std::fs::read(&here).unwrap();
            assert!(found == content(*made_of, *len), "{} has another file {file}: {} bytes", of.name, found.len());
            self.checked += 1;
        }
        let there = self.turns.take(|| self.lab.sh(&of.name, "ls /workspace | grep -c ^file- || true"));
        assert_eq!(there.trim(), of.files.len().to_string(), "{}: as many files as were written", of.name);
    }

    fn live(&mut self, name: String) {
        let mut this = Life { name: name.clone(), files: BTreeMap::new() };
        self.call(&["sandbox", "create", "--name", &name, "--memory", "192mb", "--wait"]);
        let mut snapshots: Vec<(String, Life)> = Vec::new();
        for step in 0..STEPS {
            match self.chance.below(7) {
                0 | 1 => self.write(&mut this),
                2 => {
                    let kept = format!("{name}-{step}");
                    self.call(&["sandbox", "snapshot", &name, "--name", &kept]);
                    snapshots.push((kept, this.clone()));
                }
                3 => {
                    let mut child = Life { name: format!("{name}-child"), ..this.clone() };
                    let mut words = vec!["sandbox", "fork", &name, "--name", &child.name];
                    if self.chance.below(2) == 0 {
                        words.extend(["--memory", "--wait"]);
                    }
                    self.call(&words);
                    self.check(&child);
                    self.write(&mut child);
                    self.check(&child);
                    self.call(&["sandbox", "destroy", &child.name]);
                }
                4 => drop(self.call(&["sandbox", "stop", &name])),
                5 => drop(self.call(&["sandbox", "stop", &name, "--memory"])),
                _ => {
                    if let Some((kept, was)) = snapshots.last() {
                        self.call(&["sandbox", "restore", &name, kept]);
                        this = was.clone();
                    }
                    self.check(&this);
                }
            }
        }
        self.check(&this);
        for (kept, _) in snapshots {
            self.call(&["sandbox", "snapshots", "delete", &kept]);
        }
        self.call(&["sandbox", "destroy", &name]);
    }
}

fn sample(lab: &Lab) -> Sample {
    lab.json(&["store", "seal"]);
    lab.json(&["store", "gc"]);
    let proc = format!("/proc/{}", lab.daemon.id());
    let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
    let memory = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    let report = lab.json(&["store", "report"]);
    Sample {
        memory_kib: memory.split_whitespace().nth(1).unwrap().parse().unwrap(),
        descriptors: std::fs::read_dir(format!("{proc}/fd")).unwrap().count() as u64,
        stored: report["stored_bytes"].as_u64().unwrap(),
    }
}

#[test]
fn sandboxes_come_and_go_and_leave_nothing() {
    let number = |name: &str, or: u64| std::env::var(name).map_or(or, |n| n.parse().unwrap());
    let (seconds, sandboxes) = (number("MIOSA_E2E_SOAK_SECONDS", 20), number("MIOSA_E2E_SOAK_SANDBOXES", 6));
    let seed = number("MIOSA_E2E_SEED", u64::from(std::process::id()));
    eprintln!("MIOSA_E2E_SEED={seed}, images in {}", cache_dir().display());
    let mut lab = Lab::new(&[]);
    lab.json(&["sandbox", "create", "--name", "first", "--memory", "192mb", "--wait"]);
    let began = Instant::now();
    let mut samples = Vec::new();
    let mut checked = 0;
    let mut lap = 0;
    while samples.len() < 3 || began.elapsed() < Duration::from_secs(seconds) {
        lap += 1;
        let turns = Turns { free: Mutex::new(CALLS), freed: Condvar::new() };
        let live = |n: u64| {
            let chance = Chance(seed.wrapping_add(lap << 20 | n).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
            let dir = tempfile::tempdir().unwrap();
            let mut soak = Soak { lab: &lab, turns: &turns, chance, dir, checked: 0 };
            soak.live(format!("box-{lap}-{n}"));
            soak.checked
        };
        let live = &live;
        checked += std::thread::scope(|scope| {
            let all: Vec<_> = (0..sandboxes).map(|n| scope.spawn(move || live(n))).collect();
            all.into_iter().map(|one| one.join().unwrap()).sum::<u64>()
        });
        // Its own machine, and one that waits.
        until("the machines to be gone", || lab.machines().len() <= 2);
        samples.push(sample(&lab));
        eprintln!("lap {lap}, {:?}: {checked} files checked, {:?}", began.elapsed(), samples.last().unwrap());
    }
    let (early, last) = (samples[samples.len() / 3], samples[samples.len() - 1]);
    let flat = |what: &str, early: u64, last: u64, more: u64| {
        assert!(last <= early + early / 4 + more, "{what}: {early}, and {last} at the end: {samples:?}");
    };
    flat("memory in KiB", early.memory_kib, last.memory_kib, 48 << 10);
    flat("descriptors", early.descriptors, last.descriptors, 8);
    flat("stored bytes", early.stored, last.stored, 24 << 20);
    assert_eq!(lab.end_daemon(), Some(0));
}
