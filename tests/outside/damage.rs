//! Rot in the real files of a state directory: whatever is damaged is told or harmless, never served; what is not damaged
//! is served; a lost catalogue is made again.
//!
//! `MIOSA_DAMAGES` of each kind are tried on each kind of file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use storage::{Options, Source, Store};

use crate::death::files;
use crate::lab::{Chance, amount, noise, run, seed, text, work_dir};
use crate::ledger::{BLOCK, block, read};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Damage {
    Flipped,
    Zeroed,
    Swapped,
    Truncated,
    /// A part is as it was in another file of the kind, or in an older state of this one.
    Stale,
}

const ALL: [Damage; 5] = [Damage::Flipped, Damage::Zeroed, Damage::Swapped, Damage::Truncated, Damage::Stale];

fn options() -> Options {
    Options { background: false, reserve_bytes: 0, idle: Duration::from_secs(3600), ..Options::default() }
}

/// A store of several packs and a log, closed, in which each disk holds what no other does; and an older state of it.
fn build(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let store = Store::open(dir, options()).unwrap();
    let mut truth = BTreeMap::new();
    for i in 0..6_u64 {
        let mut tx = store.begin();
        let id = tx.create_disk(&format!("d{i}"), 64 * BLOCK as u64);
        tx.commit_durable().unwrap();
        let disk = store.disk(id).unwrap();
        let half: Vec<u8> = (0..24).flat_map(|n| block(i, n, 1)).collect();
        disk.write(0, &half).unwrap();
        disk.write(32 * BLOCK as u64, &noise(i, 8 * BLOCK)).unwrap();
        if i == 4 {
            run("cp", &["-a", text(dir), &format!("{}.old", text(dir))]);
        }
        let mut tx = store.begin();
        let snapshot = tx.snapshot(id, &format!("s{i}"));
        tx.commit_durable().unwrap();
        truth.insert(format!("s{i}"), read(&store, Source::Snapshot(snapshot)).unwrap());
        disk.write(0, &block(i, 0, 2)).unwrap();
        disk.flush().unwrap();
        // The last one stays in the log.
        if i < 5 {
            store.seal().unwrap();
        }
        truth.insert(format!("d{i}"), read(&store, Source::Disk(id)).unwrap());
    }
    store.close().unwrap();
    truth
}

/// Damages a file. False when it has no effect on its bytes.
fn damage(kind: Damage, path: &Path, others: &[PathBuf], chance: &mut Chance) -> bool {
    let before = std::fs::read(path).unwrap();
    if before.is_empty() {
        return false;
    }
    let file = File::options().write(true).open(path).unwrap();
    // What is reserved behind the end of the log is nobody's.
    let len = before.iter().rposition(|b| *b != 0).map_or(before.len(), |last| last + 1) as u64;
    let part = 512.min(len);
    let place = |chance: &mut Chance| chance.below(len.div_ceil(part)) * part;
    let piece = |at: u64| before[at as usize..(at + part).min(len) as usize].to_vec();
    match kind {
        Damage::Flipped => {
            let at = chance.below(len);
            file.write_all_at(&[before[at as usize] ^ 1 << chance.below(8)], at).unwrap();
        }
        Damage::Zeroed => {
            let at = place(chance);
            file.write_all_at(&vec![0; piece(at).len()], at).unwrap();
        }
        Damage::Swapped => {
            let (a, b) = (place(chance), place(chance));
            let (x, y) = (piece(a), piece(b));
            let both = x.len().min(y.len());
            file.write_all_at(&y[..both], a).unwrap();
            file.write_all_at(&x[..both], b).unwrap();
        }
        Damage::Truncated => file.set_len(chance.below(len)).unwrap(),
        Damage::Stale => {
            let other = std::fs::read(&others[chance.below(others.len() as u64) as usize]).unwrap();
            match chance.below(2) {
                0 => std::fs::write(path, other).unwrap(),
                _ => {
                    let at = place(chance).min(other.len() as u64);
                    let end = (at + part).min(other.len() as u64).min(len);
                    if end > at {
                        file.write_all_at(&other[at as usize..end as usize], at).unwrap();
                    }
                }
            }
        }
    }
    std::fs::read(path).unwrap() != before
}

/// How a damage showed.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shown {
    Refused,
    Told,
    Unread,
    /// The last of what the log had is missing.
    Earlier,
    /// All is as it was: what was damaged is not needed, or was taken for the end of an unfinished write.
    Harmless,
}

/// Opens a damaged store and reads all of it.
fn examine(dir: &Path, truth: &BTreeMap<String, Vec<u8>>, is_log: bool) -> Result<(Shown, usize), String> {
    let store = match Store::open(dir, options()) {
        Ok(store) => store,
        Err(_) => return Ok((Shown::Refused, 0)),
    };
    let mut hurt = BTreeSet::new();
    let mut intact = 0;
    let disks = store.disks().into_iter().map(|d| (d.name, Source::Disk(d.id)));
    let all: BTreeMap<String, Source> =
        disks.chain(store.snapshots().into_iter().map(|s| (s.name, Source::Snapshot(s.id)))).collect();
    for (name, right) in truth {
        let Some(source) = all.get(name) else {
            // The log's last records, if anything.
            match is_log {
                true => drop(hurt.insert(name.clone())),
                false => return Err(format!("{name} is gone, and nothing was told")),
            }
            continue;
        };
        let disk = store.open_source(*source).map_err(|e| format!("{name}: {e:?}"))?;
        for (number, right) in right.chunks(BLOCK).enumerate() {
            let mut found = vec![0; BLOCK];
            match disk.read((number * BLOCK) as u64, &mut found) {
                Err(_) => drop(hurt.insert(name.clone())),
                Ok(()) if found == right => intact += 1,
                // The end of the log that is cut off, and with it what would tell of it, is an unfinished write.
                Ok(()) if is_log && is_earlier(name, number as u64, &found) => drop(hurt.insert(name.clone())),
                Ok(()) => return Err(format!("block {number} of {name} is served wrong")),
            }
        }
    }
    let report = store.check();
    Ok(match report {
        Err(_) => (Shown::Told, intact),
        Ok(report) if !report.damage.is_empty() => (Shown::Told, intact),
        Ok(_) if !hurt.is_empty() => (if is_log { Shown::Earlier } else { Shown::Unread }, intact),
        Ok(_) => (Shown::Harmless, intact),
    })
}

/// Whether a block is as it was before it was written last.
fn is_earlier(name: &str, number: u64, found: &[u8]) -> bool {
    let disk = name[1..].parse().unwrap();
    found.iter().all(|b| *b == 0) || found == block(disk, number, 1)
}

#[test]
fn damage_anywhere_is_told_or_harmless_and_neighbours_are_served() {
    let seed = seed();
    let count = amount("MIOSA_DAMAGES", 12, 1_000);
    let at = work_dir();
    let pristine = at.path().join("pristine");
    let truth = build(&pristine);
    let total: usize = truth.values().map(|bytes| bytes.len() / BLOCK).sum();
    let mut bad = Vec::new();
    let mut chance = Chance::new(seed);
    for part in ["packs", "log", "catalogue", "STORE"] {
        let found = |dir: &Path| match part {
            "STORE" => vec![dir.join("STORE")],
            part => files(&dir.join(part)).into_iter().filter(|f| f.1 > 0 && counts(&f.0)).map(|f| f.0).collect(),
        };
        let here = found(&pristine);
        let old = found(&at.path().join("pristine.old"));
        assert!(!here.is_empty(), "no files of {part}");
        for kind in ALL {
            let mut shown: BTreeMap<Shown, u64> = BTreeMap::new();
            let mut least = total;
            let mut repaired = 0;
            // What has no effect is not counted.
            let mut n = 0;
            for _ in 0..count * 4 {
                if n == count {
                    break;
                }
                let copy = at.path().join("copy");
                let _ = std::fs::remove_dir_all(&copy);
                run("cp", &["-a", text(&pristine), text(&copy)]);
                let which = &here[chance.below(here.len() as u64) as usize];
                let others: Vec<PathBuf> = here.iter().chain(&old).filter(|p| *p != which).cloned().collect();
                let path = copy.join(which.strip_prefix(&pristine).unwrap());
                if (kind == Damage::Stale && others.is_empty()) || !damage(kind, &path, &others, &mut chance) {
                    continue;
                }
                n += 1;
                let what = format!("MIOSA_OUTSIDE_SEED={seed}: {kind:?} {n} of {}", path.display());
                match examine(&copy, &truth, part == "log") {
                    Err(e) => bad.push(format!("{what}: {e}")),
                    Ok((how, intact)) => {
                        if part == "packs" && matches!(how, Shown::Harmless | Shown::Unread) {
                            bad.push(format!("{what}: the check finds nothing"));
                        }
                        if part == "packs" && how == Shown::Told {
                            least = least.min(intact);
                        }
                        // What the catalogue said can be had from packs and log.
                        if part == "catalogue" && how != Shown::Harmless {
                            repaired += 1;
                            if let Err(e) = repair(&copy, &truth) {
                                bad.push(format!("{what}: repair: {e}"));
                            }
                        }
                        *shown.entry(how).or_default() += 1;
                    }
                }
            }
            println!(
                "{part}, {kind:?}: {shown:?}{}{}",
                if part == "packs" { format!(", of {total} blocks at least {least} served") } else { String::new() },
                if repaired > 0 { format!(", {repaired} repaired") } else { String::new() },
            );
        }
    }
    assert!(bad.is_empty(), "{} bad: {:#?}", bad.len(), &bad[..bad.len().min(8)]);
}

/// RocksDB's own logs are for people.
fn counts(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_string_lossy();
    !name.starts_with("LOG") && name != "LOCK" && name != "IDENTITY"
}

fn repair(dir: &Path, truth: &BTreeMap<String, Vec<u8>>) -> Result<(), String> {
    let report = Store::repair(dir).map_err(|e| format!("{e:?}"))?;
    match examine(dir, truth, false)? {
        (Shown::Harmless, _) => Ok(()),
        (how, _) => Err(format!("{how:?} after {report:?}")),
    }
}
