//! Sudden deaths of the daemon: nothing that was answered is lost, and nothing is left over.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::lab::{Chance, Daemon, MIB, Start, amount, noise, seed, work_dir};
use crate::ledger::{Load, Stop};

#[test]
fn what_was_answered_survives_kill_9_of_the_daemon() {
    let seed = seed();
    let kills = amount("MIOSA_KILLS", 25, 2_000);
    let dir = work_dir();
    let state = dir.path().join("s");
    let mut chance = Chance::new(seed);
    let mut load = Load::new("d", 7, seed, || 0);
    let (mut blocks, mut slowest) = (0, Duration::ZERO);
    for kill in 0..=kills {
        let mut daemon = Daemon::start(&state, Start::busy());
        slowest = slowest.max(daemon.took);
        blocks += load.ledger.check_daemon(&daemon).unwrap_or_else(|e| panic!("after kill {kill}: {e}"));
        load.ledger.settle();
        if kill == kills {
            nothing_is_left(daemon, dir.path());
            break;
        }
        load.resume(&daemon).unwrap_or_else(|e| panic!("after kill {kill}: {e:?}"));
        let (pid, after) = (daemon.pid(), chance.below(150));
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(after));
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::SIGKILL);
            });
            let stop = loop {
                if let Err(stop) = load.step(&daemon) {
                    break stop;
                }
            };
            assert!(!matches!(&stop, Stop::Refused(e) if e.status != 0), "before kill {kill}: {stop:?}");
        });
        daemon.kill();
        load.mourn();
    }
    println!(
        "kill -9: {kills} times, {} answers, {blocks} flushed blocks read back, 0 lost; slowest start {} ms",
        load.ledger.acknowledged(),
        slowest.as_millis()
    );
}

/// Deletes everything and ends the daemon in order: no process, mount, socket or byte is left of it.
pub fn nothing_is_left(mut daemon: Daemon, dir: &Path) {
    let names = |route: &str| -> Vec<String> {
        let all = daemon.ok("GET", route, Value::Null);
        all.as_array().unwrap().iter().map(|d| d["id"].as_str().unwrap().to_owned()).collect()
    };
    for disk in names("/disks?limit=500") {
        for snapshot in names(&format!("/disks/{disk}/snapshots?limit=500")) {
            daemon.ok("DELETE", &format!("/disks/{snapshot}"), Value::Null);
        }
        let _ = daemon.call("POST", &format!("/disks/{disk}/detach"), Value::Null);
        daemon.ok("DELETE", &format!("/disks/{disk}"), Value::Null);
    }
    // Snapshots whose disks went first.
    for left in names("/store/usage?limit=500") {
        daemon.ok("DELETE", &format!("/disks/{left}"), Value::Null);
    }
    daemon.ok("POST", "/store/seal", Value::Null);
    daemon.ok("POST", "/store/gc", Value::Null);
    let stats = daemon.ok("GET", "/store/stats", Value::Null);
    assert_eq!(
        (&stats["disks"], &stats["snapshots"], &stats["logical_bytes"]),
        (&json!(0), &json!(0), &json!(0)),
        "{stats}"
    );
    assert!(daemon.stop(), "the daemon does not end");
    let packs: u64 = files(&daemon.state.join("store/packs")).iter().map(|(_, bytes)| bytes).sum();
    assert!(packs < MIB / 2, "{packs} bytes of packs are left of nothing: {stats}");
    assert!(files(&daemon.state.join("store/log")).len() <= 2, "log segments are left: {stats}");
    for gone in ["run", "attached"] {
        assert_eq!(files(&daemon.state.join(gone)).len(), 0, "{gone} is not empty");
    }
    assert!(!daemon.state.join("miosa.sock").exists());
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(daemon.state.to_str().unwrap()), "{mounts}");
    let processes = std::fs::read_dir("/proc").unwrap().flatten().filter(|p| {
        let line = std::fs::read(p.path().join("cmdline")).unwrap_or_default();
        line.windows(dir.as_os_str().len()).any(|w| w == dir.as_os_str().as_encoded_bytes())
    });
    assert_eq!(processes.count(), 0, "processes are left");
}

/// All files below a directory, with their sizes.
pub fn files(dir: &Path) -> Vec<(std::path::PathBuf, u64)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(facts) = entry.metadata() else { continue };
        match facts.is_dir() {
            true => all.extend(files(&entry.path())),
            false => all.push((entry.path(), facts.len())),
        }
    }
    all.sort();
    all
}

#[test]
fn a_killed_daemon_with_many_snapshots_is_back_with_all_of_them() {
    let dir = work_dir();
    let count = amount("MIOSA_SNAPSHOTS", 1_000, 1_000);
    let kills = amount("MIOSA_SNAPSHOT_KILLS", 3, 40);
    let mut daemon = Daemon::start(&dir.path().join("s"), Start::default());
    daemon.create("disk", 64 * MIB);
    let file = std::fs::File::options().write(true).open(daemon.attach("disk", "fuse")).unwrap();
    for i in 0..count {
        std::os::unix::fs::FileExt::write_all_at(&file, &noise(i, 8192), i % 1000 * 8192).unwrap();
        daemon.ok("POST", "/disks/disk/snapshots", json!({ "name": format!("s{i}") }));
    }
    drop(file);
    let mut times = Vec::new();
    for kill in 0..kills {
        daemon.again();
        times.push(daemon.took);
        let stats = daemon.ok("GET", "/store/stats", Value::Null);
        assert_eq!(stats["snapshots"], json!(count));
        let which = kill * 97 % count;
        let bytes = std::fs::read(daemon.attach(&format!("s{which}"), "fuse")).unwrap();
        for i in which.saturating_sub(999)..=which {
            let at = (i % 1000 * 8192) as usize;
            assert!(bytes[at..at + 8192] == noise(i, 8192), "kill {kill}: write {i} is not in s{which}");
        }
    }
    times.sort();
    println!(
        "{kills} kills with {count} snapshots: from the start of the process to the first answer {} ms (median), {} ms (most)",
        times[times.len() / 2].as_millis(),
        times.last().unwrap().as_millis()
    );
}
