//! Single failures of the medium: an answer, a poisoned store or a refusal to open, never wrong data.

use crate::ops::{BLOCKS, Run, contents, expand, from_env, open, read_all};
use storage::catalogue::MemCatalogue;
use storage::medium::sim::{Event, SimMedium};
use storage::medium::{Medium, Mode};
use storage::{BLOCK_SIZE, DiskId, ErrorKind, Store};

fn store_with_disk(medium: &SimMedium) -> (Store, MemCatalogue, DiskId) {
    let catalogue = MemCatalogue::new(medium.clone());
    let store = open(medium, &catalogue).unwrap();
    let mut tx = store.begin();
    let id = tx.create_disk("d", BLOCKS * BLOCK_SIZE as u64);
    tx.commit_durable().unwrap();
    (store, catalogue, id)
}

#[test]
fn a_failed_sync_poisons_until_reopened_and_reads_go_on() {
    let medium = SimMedium::new();
    let (store, catalogue, id) = store_with_disk(&medium);
    let disk = store.disk(id).unwrap();
    disk.write(0, &expand(7)).unwrap();
    medium.set_faults(Box::new(|_, event| (event == Event::Sync).then_some(5)));
    assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Poisoned);
    medium.set_faults(Box::new(|_, _| None));
    assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Poisoned, "a sync is never tried again");
    assert_eq!(disk.write(0, &expand(8)).unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(store.seal().unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(read_all(&disk).unwrap()[0], 7);
    drop((disk, store));
    let store = open(&medium, &catalogue).unwrap();
    let disk = store.disk(id).unwrap();
    disk.write(0, &expand(9)).unwrap();
    disk.flush().unwrap();
}

#[test]
fn a_failed_sync_is_told_to_everyone_who_waits_for_it() {
    let medium = SimMedium::new();
    let (store, _, id) = store_with_disk(&medium);
    let (told, tells) = std::sync::mpsc::channel();
    let first = medium.syncs();
    let mut syncs = 0;
    medium.set_faults(Box::new(move |_, event| {
        syncs += u64::from(event == Event::Sync);
        // Long enough for others to queue up behind this round.
        std::thread::sleep(std::time::Duration::from_millis(1));
        (syncs > 5).then_some(5)
    }));
    for thread in 0..16 {
        let (disk, told) = (store.disk(id).unwrap(), told.clone());
        std::thread::spawn(move || {
            let failed = loop {
                if let Err(e) = disk.write(thread % BLOCKS * BLOCK_SIZE as u64, &expand(7)).and_then(|()| disk.flush())
                {
                    break e;
                }
            };
            told.send(failed).unwrap();
        });
    }
    for _ in 0..16 {
        let failed = tells.recv_timeout(std::time::Duration::from_secs(60)).expect("a writer was never told");
        assert!(matches!(failed.kind(), ErrorKind::Poisoned | ErrorKind::Io), "{failed:?}");
    }
    assert!(medium.syncs() > first + 5);
}

#[test]
fn a_full_medium_refuses_new_writes_and_keeps_old_ones() {
    let medium = SimMedium::new();
    let (store, _, id) = store_with_disk(&medium);
    let disk = store.disk(id).unwrap();
    disk.write(0, &expand(7)).unwrap();
    disk.flush().unwrap();
    let full = |_, event| matches!(event, Event::Allocate | Event::Create | Event::Write).then_some(28);
    medium.set_faults(Box::new(full));
    let mut accepted = 1;
    let refused = loop {
        match disk.write(accepted * BLOCK_SIZE as u64, &expand(accepted as u16)) {
            Ok(()) => accepted += 1,
            Err(e) => break e,
        }
        // What fits into reserved space is accepted; more than that is not there.
        if accepted == BLOCKS {
            break disk.write(0, &vec![1; 16 << 20]).unwrap_err();
        }
    };
    assert!(matches!(refused.kind(), ErrorKind::NoSpace | ErrorKind::InvalidInput), "{refused:?}");
    assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(store.seal().unwrap_err().kind(), ErrorKind::NoSpace);
    medium.set_faults(Box::new(|_, _| None));
    disk.flush().unwrap();
    store.seal().unwrap();
    let tags = read_all(&disk).unwrap();
    assert_eq!(tags[0], 7);
    assert!((1..accepted).all(|i| tags[i as usize] == i as u16));
}

/// Every event of a run fails once, with each errno: the run goes on or ends with an error, and a reopened store holds a
/// prefix with everything that was acknowledged. `MIOSA_FAULT_SEEDS` runs are made (3).
#[test]
fn every_call_fails_once_and_nothing_acknowledged_is_lost() {
    let mut failures = 0;
    for seed in 100..100 + from_env("MIOSA_FAULT_SEEDS", 3) {
        let medium = SimMedium::new();
        let mut run = Run::start(seed, medium.clone()).unwrap();
        let first = medium.events();
        (0..40).for_each(|_| run.step().unwrap());
        for at in first..medium.events() {
            for errno in [5, 28] {
                let medium = SimMedium::new();
                let mut run = Run::start(seed, medium.clone()).unwrap();
                medium.set_faults(Box::new(move |n, _| (n == at).then_some(errno)));
                for _ in 0..40 {
                    // A refused operation has changed nothing, or is in the log and uncertain: stop at the first.
                    if run.step().is_err() {
                        break;
                    }
                }
                let after = medium.after_power_loss(at);
                let catalogue = run.catalogue.after_power_loss(after.clone());
                let store =
                    open(&after, &catalogue).unwrap_or_else(|e| panic!("seed {seed}, errno {errno} at {at}: {e:?}"));
                let found = contents(&store).unwrap();
                assert!(run.history[run.durable..].contains(&found), "seed {seed}, errno {errno} at event {at}");
                failures += 1;
            }
        }
    }
    println!("{failures} calls failed");
    assert!(failures > 100, "the runs have fewer events than this test is meant for");
}

/// After a close, nothing that was acknowledged can be taken for an unfinished write, the last record and the header of the
/// only segment included.
#[test]
fn damage_anywhere_in_a_closed_log_is_told() {
    let medium = SimMedium::new();
    let (store, catalogue, id) = store_with_disk(&medium);
    let disk = store.disk(id).unwrap();
    disk.write(0, &expand(7)).unwrap();
    disk.flush().unwrap();
    disk.write(BLOCK_SIZE as u64, &expand(8)).unwrap();
    disk.flush().unwrap();
    store.close().unwrap();
    drop((disk, store));
    let logs = medium.list("log").unwrap();
    assert_eq!(logs.len(), 1);
    let name = format!("log/{}", logs[0].0);
    let mut bytes = vec![0; logs[0].1 as usize];
    medium.open(&name, Mode::Read).unwrap().read_at(&mut bytes, 0).unwrap();
    // The last record only testifies.
    let acknowledged = bytes.windows(4).rposition(|w| w == b"LORG").unwrap() as u64;
    assert!(acknowledged > 2 * BLOCK_SIZE as u64);
    for byte in (0..acknowledged).step_by(29) {
        let copy = medium.after_power_loss(0);
        assert!(copy.flip_bit(&name, byte, (byte % 8) as u8));
        let opened = open(&copy, &catalogue.after_power_loss(copy.clone()));
        let error = opened.err().unwrap_or_else(|| panic!("damage at byte {byte} of the log was not noticed"));
        assert!(matches!(error.kind(), ErrorKind::Damaged | ErrorKind::UnsupportedVersion), "{error:?}");
    }
}

#[test]
fn opening_and_closing_leaves_no_more_segments_behind() {
    let medium = SimMedium::new();
    let (store, catalogue, _) = store_with_disk(&medium);
    store.close().unwrap();
    drop(store);
    for _ in 0..3 {
        open(&medium, &catalogue).unwrap().close().unwrap();
    }
    assert_eq!(medium.list("log").unwrap().len(), 1);
}

/// A flipped bit in any file is either harmless or an error.
#[test]
fn flipped_bits_are_never_served() {
    let mut detected = 0;
    for seed in 200..203 {
        let medium = SimMedium::new();
        let mut run = Run::start(seed, medium.clone()).unwrap();
        (0..40).for_each(|_| run.step().unwrap());
        run.store.flush().unwrap();
        let truth = contents(&run.store).unwrap();
        for dir in ["log", "packs", ""] {
            for (name, bytes) in medium.list(dir).unwrap() {
                let name = if dir.is_empty() { name } else { format!("{dir}/{name}") };
                for part in 0..60 {
                    let copy = medium.after_power_loss(0);
                    assert!(copy.flip_bit(&name, bytes * part / 60, part as u8));
                    let catalogue = run.catalogue.after_power_loss(copy.clone());
                    let opened = open(&copy, &catalogue);
                    if dir == "packs" {
                        let report = opened.as_ref().unwrap().check().unwrap();
                        assert!(!report.damage.is_empty(), "seed {seed}: the check missed bit {part} of {name}");
                    }
                    match opened.and_then(|store| contents(&store)) {
                        Ok(found) => {
                            // Damage to the last, synced, records looks like an unfinished write: nothing behind them
                            // says that they were durable.
                            assert!(found == truth || dir == "log", "seed {seed}: wrong data from {name}");
                            assert!(run.history.contains(&found), "seed {seed}: wrong data from {name}");
                        }
                        Err(e) => {
                            assert!(matches!(e.kind(), ErrorKind::Damaged | ErrorKind::UnsupportedVersion), "{e:?}");
                            detected += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(detected > 50, "only {detected} flips were noticed");
}
