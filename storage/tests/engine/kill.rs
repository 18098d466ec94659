//! `kill -9` of a real process under load, on a real directory with RocksDB: what was acknowledged is there, and the store
//! opens every time.
//!
//! The process is this test binary again, running the ignored test [`load`]. It writes, flushes, and only then tells on
//! its standard output what is durable; it forks, seals and collects meanwhile. `MIOSA_KILLS` times (25).

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use storage::medium::sim::Random;
use storage::{BLOCK_SIZE, Options, Source, Store};

const DIR: &str = "MIOSA_KILL_TEST_DIR";
const SEED: &str = "MIOSA_KILL_TEST_SEED";
const BLOCKS: u64 = 600;
const DISKS: u64 = 4;

fn options() -> Options {
    Options { log_bytes: 512 << 10, log_bytes_max: 4 << 20, idle: Duration::from_millis(20), ..Options::default() }
}

/// A block that names its place and its version.
fn block(disk: u64, number: u64, version: u64) -> Vec<u8> {
    let words = [disk, number, version].map(u64::to_le_bytes).concat();
    // Repeats, so that it compresses, but for the version.
    words.iter().copied().cycle().take(BLOCK_SIZE).collect()
}

/// The version in a block; 0 when it was never written. Panics on a torn or foreign block.
fn version(disk: u64, number: u64, bytes: &[u8]) -> u64 {
    if bytes.iter().all(|b| *b == 0) {
        return 0;
    }
    let version = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
    assert!(bytes == block(disk, number, version), "a torn or foreign block at {number} of disk {disk}");
    version
}

#[test]
#[ignore = "this is the process that the kill test starts and kills"]
fn load() {
    let dir = PathBuf::from(std::env::var_os(DIR).expect("only the kill test runs this"));
    let seed = std::env::var(SEED).unwrap().parse().unwrap();
    let store = Store::open(&dir, options()).unwrap();
    let mut out = std::io::stdout();
    let mut random = Random(seed);
    for disk in 0..DISKS {
        if store.disk_by_name(&format!("d{disk}")).is_none() {
            let mut tx = store.begin();
            let _ = tx.create_disk(&format!("d{disk}"), BLOCKS * BLOCK_SIZE as u64);
            tx.commit_durable().unwrap();
        }
    }
    for round in 0.. {
        let disk = random.below(DISKS);
        let id = store.disk_by_name(&format!("d{disk}")).unwrap().id;
        let handle = store.disk(id).unwrap();
        let mut written = Vec::new();
        for _ in 0..1 + random.below(30) {
            let number = random.below(BLOCKS);
            let version = (seed << 32) + round * 100 + written.len() as u64 + 1;
            handle.write(number * BLOCK_SIZE as u64, &block(disk, number, version)).unwrap();
            written.push((number, version));
        }
        match random.below(12) {
            0 => drop(store.seal().unwrap()),
            1 => drop(store.gc(false).unwrap()),
            2 => {
                let name = format!("fork-{seed}-{round}");
                let mut tx = store.begin();
                let fork = tx.fork(Source::Disk(id), &name);
                let old: Vec<_> = store.disks().into_iter().filter(|d| d.name.starts_with("fork")).collect();
                if old.len() > 5 {
                    tx.delete_disk(old[0].id);
                    writeln!(out, "deleting {}", old[0].name).unwrap();
                }
                tx.commit_durable().unwrap();
                writeln!(out, "fork {name} {disk}").unwrap();
                let number = random.below(BLOCKS);
                store.disk(fork).unwrap().write(number * BLOCK_SIZE as u64, &block(disk, number, u64::MAX)).unwrap();
            }
            _ => handle.flush().unwrap(),
        }
        if random.below(3) > 0 {
            handle.flush().unwrap();
            for (number, version) in written {
                writeln!(out, "write {disk} {number} {version}").unwrap();
            }
        }
    }
}

/// Runs the load until it has acknowledged `lines` things, kills it and returns them.
fn run_and_kill(dir: &Path, seed: u64, lines: usize) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kill::load", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .env(SEED, seed.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut told: Vec<String> = output.by_ref().take(lines).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    // What it said before it died counts too, but for a line it did not finish.
    told.extend(output);
    assert!(told.len() >= lines, "the load ended by itself: {:?}", told.last());
    told
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: HashMap<(u64, u64), u64> = HashMap::new();
    let mut forks: HashMap<String, u64> = HashMap::new();
    let mut random = Random(42);
    let kills = crate::ops::from_env("MIOSA_KILLS", 25);
    for kill in 1..=kills {
        for line in run_and_kill(dir.path(), kill, 20 + random.below(2000) as usize) {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["write", disk, number, version] => {
                    let Ok(version) = version.parse() else { continue };
                    acknowledged.insert((disk.parse().unwrap(), number.parse().unwrap()), version);
                }
                ["fork", name, disk] => drop(forks.insert(name.into(), disk.parse().unwrap_or(0))),
                ["deleting", name] => drop(forks.remove(name)),
                _ => {}
            }
        }
        let store = Store::open(dir.path(), options()).unwrap_or_else(|e| panic!("kill {kill}: does not open: {e:?}"));
        let mut bytes = vec![0; BLOCKS as usize * BLOCK_SIZE];
        for disk in 0..DISKS {
            let Some(info) = store.disk_by_name(&format!("d{disk}")) else { continue };
            store.disk(info.id).unwrap().read(0, &mut bytes).unwrap();
            for (number, bytes) in bytes.chunks(BLOCK_SIZE).enumerate() {
                let found = version(disk, number as u64, bytes);
                let want = acknowledged.get(&(disk, number as u64)).copied().unwrap_or(0);
                assert!(
                    found >= want,
                    "kill {kill}: block {number} of disk {disk} is {found}, {want} was acknowledged"
                );
            }
        }
        for (name, disk) in &forks {
            let info = store.disk_by_name(name).unwrap_or_else(|| panic!("kill {kill}: the fork {name} is gone"));
            store.disk(info.id).unwrap().read(0, &mut bytes).unwrap();
            bytes.chunks(BLOCK_SIZE).enumerate().for_each(|(n, b)| {
                let _ = version(*disk, n as u64, b);
            });
        }
        assert_eq!(store.check().unwrap().damage, [""; 0], "kill {kill}");
    }
    println!("{kills} kills, {} blocks acknowledged", acknowledged.len());
    assert!(acknowledged.len() > 500 && !forks.is_empty(), "the load did too little");
}
