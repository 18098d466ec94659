//! Too little of everything: space, descriptors, time to seal; and too much: disks, snapshots, a clock that jumps.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::death::nothing_is_left;
use crate::driver::{Driver, Settings};
use crate::faults::{Prepared, check_store, preload};
use crate::lab::{Chance, Daemon, MIB, Mounted, Start, amount, is_long, noise, run, seed, text, work_dir};
use crate::ledger::{Load, Stop};

/// A small file system with a file that takes what space is wanted taken.
struct Small {
    mounted: Mounted,
}

impl Small {
    fn new(dir: &Path, bytes: u64) -> Small {
        let image = dir.join("small");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        Small { mounted: Mounted::made("ext4", &image, &dir.join("small-mnt"), "") }
    }

    fn state(&self) -> PathBuf {
        self.mounted.at.join("s")
    }

    /// Takes space until so much is left.
    fn leave(&self, bytes: u64) {
        let facts = nix::sys::statvfs::statvfs(&self.mounted.at).unwrap();
        let free = facts.blocks_available() * facts.fragment_size();
        let taken = free.saturating_sub(bytes);
        let file = File::options().create(true).append(true).open(self.mounted.at.join("ballast")).unwrap();
        if taken > 0 {
            nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, taken as i64).unwrap();
        }
    }

    fn free(&self) {
        std::fs::remove_file(self.mounted.at.join("ballast")).unwrap();
    }
}

#[test]
fn a_file_system_that_gets_full_anywhere_refuses_clearly_loses_nothing_and_goes_on() {
    let seed = seed();
    let rounds = amount("MIOSA_FULL_ROUNDS", 3, 100);
    let dir = work_dir();
    let prepared = Prepared::new(seed, 60);
    let (mut blocks, mut refusals, mut full, mut deleted) = (0, 0, 0, 0);
    for round in 0..rounds {
        let small = Small::new(dir.path(), 96 * MIB);
        let state = prepared.copy(&small.state());
        let mut load = prepared.load.branch(seed ^ round << 16);
        let start = Start { log: Some(dir.path().join("log")), ..Start::busy() };
        let mut daemon = Daemon::start(&state, start);
        load.resume(&daemon).unwrap();
        // Full after a while, at another place of what is being done each time.
        let room = Chance::new(seed ^ round).below(6 * MIB);
        small.leave(room);
        let mut refused = 0;
        for step in 0..120 {
            match load.step(&daemon) {
                Ok(()) => {}
                Err(Stop::Refused(e)) => {
                    assert_eq!(e.code, "storage_full", "round {round}, step {step}: {e:?}\n{}", daemon.log());
                    refused += 1;
                }
                Err(Stop::Io(e)) => {
                    // A write that finds no room says so.
                    assert_eq!(e.raw_os_error(), Some(28), "round {round}, step {step}: {e}\n{}", daemon.log());
                    refused += 1;
                }
            }
            if refused > 12 {
                break;
            }
        }
        refusals += refused;
        // And certainly full.
        let filler = (|| {
            daemon.call("POST", "/disks", json!({ "name": "filler", "size_bytes": 128 * MIB }))?;
            let file = File::options().write(true).open(daemon.try_attach("filler", "fuse")?)?;
            for i in 0..128 {
                file.write_all_at(&noise(seed ^ i << 32, MIB as usize), i * MIB)?;
                file.sync_data()?;
            }
            Ok::<(), Stop>(())
        })();
        match filler {
            Err(Stop::Io(e)) => assert_eq!(e.raw_os_error(), Some(28), "round {round}: {e}\n{}", daemon.log()),
            Err(Stop::Refused(e)) => assert_eq!(e.code, "storage_full", "round {round}: {e:?}"),
            Ok(()) => panic!("round {round}: 128 MiB of noise are in {room} bytes"),
        }
        full += 1;
        // Still full: what is there can be deleted, and collected. The reserve is for that, and is there again after a
        // collection that found room; a load that has used it up itself is told so.
        match load.delete_oldest(&daemon) {
            Ok(()) => deleted += 1,
            Err(Stop::Refused(e)) if e.code == "storage_full" && daemon.log().contains("reserve is given up") => {}
            Err(e) => panic!("round {round}: no delete on a full disk: {e:?}\n{}", daemon.log()),
        }
        let collected = daemon.call("POST", "/store/gc", Value::Null);
        assert!(collected.as_ref().map_or_else(|e| e.code == "storage_full", |_| true), "round {round}: {collected:?}");
        // There is room again, and the same daemon goes on.
        small.free();
        let began = Instant::now();
        while let Err(e) = load.step(&daemon) {
            assert!(began.elapsed() < Duration::from_secs(20), "round {round}: it does not recover: {e:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
        for step in 0..20 {
            load.step(&daemon).unwrap_or_else(|e| panic!("round {round}, step {step} after: {e:?}\n{}", daemon.log()));
        }
        daemon.ok("POST", "/store/gc", Value::Null);
        daemon.kill();
        drop(daemon);
        load.mourn();
        blocks += check_store(&state, &load.ledger).unwrap_or_else(|e| panic!("round {round}: {e}"));
    }
    println!(
        "full: {full} file systems, {refusals} steps of loads refused, {deleted} deletes while full, {blocks} flushed blocks read back"
    );
}

#[test]
fn a_daemon_whose_log_cannot_be_written_goes_on() {
    let dir = work_dir();
    let start = Start { log: Some("/dev/full".into()), ..Start::busy() };
    let mut daemon = Daemon::start(&dir.path().join("s"), start);
    let mut load = Load::new("d", 7, seed(), || 0);
    for step in 0..150 {
        load.step(&daemon).unwrap_or_else(|e| panic!("step {step}: {e:?}"));
    }
    daemon.kill();
    drop(daemon);
    load.mourn();
    check_store(&dir.path().join("s"), &load.ledger).unwrap();
}

#[test]
fn few_descriptors_are_an_error_and_lose_nothing() {
    let seed = seed();
    let prepared = Prepared::new(seed, 60);
    let at = work_dir();
    let step = if is_long() { 2 } else { 6 };
    let limits: Vec<u64> = (8..100).step_by(step).chain([128]).collect();
    let (mut started, mut failures) = (0, 0);
    for &limit in &limits {
        let state = prepared.copy(&at.path().join("s"));
        let mut start = Start::busy();
        start.before = vec!["prlimit".to_owned(), format!("--nofile={limit}:{limit}")];
        let mut load = prepared.load.branch(seed ^ limit);
        match Daemon::try_start(&state, start) {
            Err(log) => {
                assert!(log.contains("Too many open files") || log.contains("os error 24"), "limit {limit}: {log}");
            }
            Ok(mut daemon) => {
                started += 1;
                let _ = load.resume(&daemon);
                for _ in 0..150 {
                    failures += u64::from(load.step(&daemon).is_err());
                }
                daemon.kill();
            }
        }
        load.mourn();
        check_store(&state, &load.ledger).unwrap_or_else(|e| panic!("limit {limit}: {e}"));
    }
    println!("descriptors: limits {limits:?}, {started} daemons started, {failures} steps refused, nothing lost");
}

#[test]
fn a_mount_for_which_there_are_too_few_descriptors_is_refused_and_nobody_waits_for_it() {
    // By another process, which ends also when nobody answers it.
    let is_zero = |path: &Path| {
        run("timeout", &["--signal=KILL", "60", "cmp", "--bytes=1048576", text(path), "/dev/zero"]);
    };
    let dir = work_dir();
    let (mut refused, mut served) = (0, 0);
    for more in 0.. {
        let state = dir.path().join(format!("s{more}"));
        let mut daemon = Daemon::start(&state, Start::default());
        daemon.create("d", MIB);
        let held = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count() as u64;
        run("prlimit", &["--pid", &daemon.pid().to_string(), &format!("--nofile={}:", held + more)]);
        match daemon.try_attach("d", "fuse") {
            Err(why) => {
                assert!(why.code == "too_many_open_files" || why.message.contains("Too many open files"), "{why:?}");
                refused += 1;
            }
            Ok(path) => {
                is_zero(&path);
                daemon.detach("d");
                served += 1;
            }
        }
        run("prlimit", &["--pid", &daemon.pid().to_string(), "--nofile=1000:"]);
        let path = daemon.attach("d", "fuse");
        is_zero(&path);
        daemon.kill();
        if served > 2 {
            break;
        }
    }
    assert!(refused > 10, "{refused} refused, {served} served");
}

#[test]
fn a_thousand_disks_are_open_at_once() {
    let dir = work_dir();
    let count = amount("MIOSA_OPEN_DISKS", 200, 1_000);
    let mut daemon = Daemon::start(&dir.path().join("s"), Start::default());
    daemon.create("golden", MIB);
    daemon.ok("POST", "/disks/golden/fork", json!({ "name": "f", "count": count }));
    let files: Vec<File> = (1..=count)
        .map(|i| File::options().read(true).write(true).open(daemon.attach(&format!("f-{i}"), "fuse")).unwrap())
        .collect();
    for (i, file) in files.iter().enumerate() {
        file.write_all_at(&noise(i as u64, 4096), 4096).unwrap();
    }
    files.iter().for_each(|file| file.sync_data().unwrap());
    drop(files);
    daemon.again();
    let sockets: Vec<PathBuf> = (1..=count).map(|i| daemon.attach(&format!("f-{i}"), "vhost-user")).collect();
    let memory = daemon.memory_kib();
    let mut drivers: Vec<Driver> = Vec::new();
    for (i, socket) in sockets.iter().enumerate() {
        let mut driver =
            Driver::connect(socket, Settings { ring_size: 16, slot_bytes: 4096, ..Settings::default() }).unwrap();
        assert_eq!(driver.queues[0].read(8, 4096).unwrap(), (0, noise(i as u64, 4096)), "disk {i}");
        // As many as this process has descriptors for.
        if drivers.len() < 100 {
            drivers.push(driver);
        }
    }
    drop(drivers);
    println!("{count} disks open at once as files, then as sockets; {} MiB of memory", memory / 1024);
    nothing_is_left(daemon, dir.path());
}

#[test]
fn ten_thousand_snapshots_are_there_after_a_kill_and_can_be_deleted() {
    let dir = work_dir();
    let count = amount("MIOSA_MANY_SNAPSHOTS", 1_500, 10_000);
    let mut daemon = Daemon::start(&dir.path().join("s"), Start::default());
    daemon.create("disk", 16 * MIB);
    let file = File::options().write(true).open(daemon.attach("disk", "fuse")).unwrap();
    let began = Instant::now();
    for i in 0..count {
        file.write_all_at(&noise(i, 4096), i % 4096 * 4096).unwrap();
        daemon.ok("POST", "/disks/disk/snapshots", json!({ "name": format!("s{i}") }));
    }
    let made = began.elapsed();
    drop(file);
    daemon.again();
    let took = daemon.took;
    for which in [0, count / 3, count / 2, count - 1] {
        let bytes = std::fs::read(daemon.attach(&format!("s{which}"), "fuse")).unwrap();
        for i in which.saturating_sub(4095)..=which {
            let at = (i % 4096 * 4096) as usize;
            assert!(bytes[at..at + 4096] == noise(i, 4096), "write {i} is not in s{which}");
        }
        daemon.detach(&format!("s{which}"));
    }
    let began = Instant::now();
    for i in 0..count {
        daemon.ok("DELETE", &format!("/disks/s{i}"), Value::Null);
    }
    println!(
        "{count} snapshots made in {:.1} s, {} ms until the killed daemon served again, deleted in {:.1} s, {} MiB of memory",
        made.as_secs_f64(),
        took.as_millis(),
        began.elapsed().as_secs_f64(),
        daemon.memory_kib() / 1024
    );
    nothing_is_left(daemon, dir.path());
}

#[test]
fn writers_that_outrun_sealing_wait_and_none_fails() {
    let seed = seed();
    let dir = work_dir();
    let mib = amount("MIOSA_FLOOD_MIB", 128, 4_096);
    let mut daemon = Daemon::start(&dir.path().join("s"), Start::busy());
    let idle = daemon.memory_kib();
    let mut most_memory = 0;
    let mut most_log = 0;
    daemon.create("a", 64 * MIB);
    daemon.create("b", 64 * MIB);
    let files =
        ["a", "b"].map(|name| File::options().read(true).write(true).open(daemon.attach(name, "fuse")).unwrap());
    std::thread::scope(|scope| {
        let writers: Vec<_> = files
            .iter()
            .enumerate()
            .map(|(which, file)| {
                scope.spawn(move || {
                    for i in 0..mib / 2 {
                        file.write_all_at(&noise(seed ^ i << 8 ^ which as u64, MIB as usize), i % 64 * MIB).unwrap();
                    }
                })
            })
            .collect();
        while !writers.iter().all(|w| w.is_finished()) {
            most_memory = most_memory.max(daemon.memory_kib());
            let log: u64 = crate::death::files(&daemon.state.join("store/log")).iter().map(|f| f.1).sum();
            most_log = most_log.max(log);
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    for (which, file) in files.iter().enumerate() {
        file.sync_data().unwrap();
        for i in (mib / 2).saturating_sub(64)..mib / 2 {
            let mut bytes = vec![0; MIB as usize];
            file.read_exact_at(&mut bytes, i % 64 * MIB).unwrap();
            assert!(bytes == noise(seed ^ i << 8 ^ which as u64, MIB as usize), "MiB {i} of disk {which}");
        }
    }
    drop(files);
    println!(
        "flood: {mib} MiB with a log of at most 8 MiB: {} MiB of log at most, memory from {} to {} MiB",
        most_log / MIB,
        idle / 1024,
        most_memory / 1024
    );
    assert!(daemon.stop());
}

#[test]
fn a_clock_that_jumps_changes_nothing() {
    let seed = seed();
    let dir = work_dir();
    let offset = dir.path().join("offset");
    std::fs::write(&offset, 0_i64.to_ne_bytes()).unwrap();
    let clock = File::options().write(true).open(&offset).unwrap();
    let mut start = Start::busy();
    start.env =
        [("LD_PRELOAD", text(preload())), ("FAULT_CLOCK", text(&offset))].map(|(k, v)| (k.into(), v.into())).to_vec();
    let mut daemon = Daemon::start(&dir.path().join("s"), start);
    let mut load = Load::new("d", 7, seed, || 0);
    let mut chance = Chance::new(seed);
    let jumps = amount("MIOSA_CLOCK_JUMPS", 25, 1_000);
    for jump in 0..jumps {
        // Up to ten years to either side, and now and then back to before 1970.
        let years = 10 * 365 * 86_400;
        let by = if chance.below(10) == 0 { -60 * 365 * 86_400 } else { chance.below(2 * years) as i64 - years as i64 };
        clock.write_all_at(&by.to_ne_bytes(), 0).unwrap();
        for _ in 0..8 {
            load.step(&daemon).unwrap_or_else(|e| panic!("jump {jump} to {by} s: {e:?}\n{}", daemon.log()));
        }
        if chance.below(8) == 0 {
            daemon.again();
            load.mourn();
            load.ledger.check_daemon(&daemon).unwrap_or_else(|e| panic!("jump {jump} to {by} s: {e}"));
            load.resume(&daemon).unwrap();
        }
    }
    daemon.kill();
    drop(daemon);
    load.mourn();
    let blocks = check_store(&dir.path().join("s"), &load.ledger).unwrap();
    println!("clock: {jumps} jumps of up to ten years and to before 1970, {blocks} flushed blocks read back");
}
