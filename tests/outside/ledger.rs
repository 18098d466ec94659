//! A load that writes down what it was told, and what a store has to hold because of it.
//!
//! A block names its disk, its number and its version, so that a torn, foreign or old one shows. Each entry of the ledger
//! has a stamp: how far the medium was when it was written down. What holds after a power cut at a point is what the
//! entries up to there say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};
use storage::{Source, Store};

use crate::lab::{Chance, Daemon, Refused};

pub const BLOCK: usize = 4096;
/// Blocks of each disk of a load.
pub const BLOCKS: u64 = 256;
/// Forks of a load at a time, and snapshots.
const FORKS: usize = 3;
const SNAPSHOTS: usize = 4;

/// A block that names its place and its version. Half of it compresses.
pub fn block(disk: u64, number: u64, version: u64) -> Vec<u8> {
    let words = [disk, number, version].map(u64::to_le_bytes).concat();
    let mut bytes: Vec<u8> = words.iter().copied().cycle().take(BLOCK).collect();
    let mut chance = Chance::new(version ^ number << 40);
    for eight in bytes[24..BLOCK / 2].chunks_exact_mut(8) {
        eight.copy_from_slice(&chance.bits().to_le_bytes());
    }
    bytes
}

/// The version in a block, 0 when it was never written; or what is wrong with it.
fn version(disk: u64, number: u64, bytes: &[u8]) -> Result<u64, String> {
    if bytes.iter().all(|b| *b == 0) {
        return Ok(0);
    }
    let version = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
    match bytes == block(disk, number, version) {
        true => Ok(version),
        false => Err("is torn or foreign".to_owned()),
    }
}

/// What happened, in order.
#[derive(Debug, Clone)]
enum Entry {
    /// Asked for: from here on it may be there.
    Creating {
        name: String,
        content: u64,
    },
    Created {
        name: String,
    },
    /// Asked for: from here on it may be there.
    Writing {
        name: String,
        first: u64,
        blocks: u64,
        version: u64,
    },
    /// Answered.
    Wrote {
        name: String,
        first: u64,
        blocks: u64,
        version: u64,
    },
    /// Answered: all that had been answered before is there.
    Flushed {
        name: String,
    },
    /// A copy of `of` as it was.
    Copied {
        of: String,
        name: String,
    },
    Deleting {
        name: String,
    },
    Deleted {
        name: String,
    },
    /// The daemon died: what was answered and not flushed may be gone.
    Died,
}

/// What one load was told.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// What came before the entries.
    settled: BTreeMap<String, Wanted>,
    entries: Vec<(u64, Entry)>,
    acknowledged: u64,
}

/// The versions a block may have, by its number. Those that are not there are zeroes.
type Versions = BTreeMap<u64, BTreeSet<u64>>;

/// What a disk or snapshot has to hold.
#[derive(Debug, Clone, Default)]
struct Wanted {
    content: u64,
    /// As long as the daemon lives.
    now: Versions,
    /// After its death or a power cut.
    after: Versions,
    /// It has to be there.
    certain: bool,
    /// It may be gone.
    going: bool,
    is_gone: bool,
}

impl Ledger {
    fn add(&mut self, stamp: u64, entry: Entry) {
        let is_answer = matches!(
            entry,
            Entry::Flushed { .. } | Entry::Copied { .. } | Entry::Created { .. } | Entry::Deleted { .. }
        );
        self.acknowledged += u64::from(is_answer);
        self.entries.push((stamp, entry));
    }

    /// How many flushes, creates, snapshots, forks and deletes were answered.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Makes one state of all entries, where stamps do not matter. What is gone is looked for once more.
    pub fn settle(&mut self) {
        self.settled.retain(|_, wanted| !wanted.is_gone);
        self.settled = self.wanted(u64::MAX);
        self.entries.clear();
    }

    /// What has to be there when the medium stopped at `stamp`. An answer written down later does not count.
    fn wanted(&self, stamp: u64) -> BTreeMap<String, Wanted> {
        let mut all = self.settled.clone();
        for (at, entry) in &self.entries {
            let was_told = *at <= stamp;
            match entry {
                Entry::Creating { name, content } => {
                    all.insert(name.clone(), Wanted { content: *content, ..Wanted::default() });
                }
                Entry::Created { name } => all.get_mut(name).unwrap().certain |= was_told,
                Entry::Writing { name, first, blocks, version } => {
                    let wanted = all.get_mut(name).unwrap();
                    for versions in [&mut wanted.now, &mut wanted.after] {
                        for number in *first..first + blocks {
                            versions.entry(number).or_insert_with(|| [0].into()).insert(*version);
                        }
                    }
                }
                Entry::Wrote { name, first, blocks, version } => {
                    let now = &mut all.get_mut(name).unwrap().now;
                    now.extend((*first..first + blocks).map(|number| (number, [*version].into())));
                }
                Entry::Flushed { name } if was_told => {
                    let wanted = all.get_mut(name).unwrap();
                    wanted.after = wanted.now.clone();
                }
                Entry::Flushed { .. } => {}
                // What had been answered is in the copy, flushed or not; nothing else was in flight.
                Entry::Copied { of, name } => {
                    let Wanted { content, now, .. } = all[of].clone();
                    let copy = Wanted { content, after: now.clone(), now, certain: was_told, ..Wanted::default() };
                    all.insert(name.clone(), copy);
                }
                // What was asked for after that point has not reached the medium.
                Entry::Deleting { name } => all.get_mut(name).unwrap().going |= *at < stamp,
                Entry::Deleted { name } => all.get_mut(name).unwrap().is_gone |= was_told,
                Entry::Died => all.values_mut().for_each(|wanted| wanted.now = wanted.after.clone()),
            }
        }
        all
    }

    /// Compares with what is there. `read` gives the content of a disk or snapshot, by name. Says how many blocks were
    /// certain and right.
    pub fn check(&self, stamp: u64, read: impl Fn(&str) -> Option<Result<Vec<u8>, String>>) -> Result<u64, String> {
        let mut right = 0;
        for (name, wanted) in self.wanted(stamp) {
            let found = match read(&name) {
                None if wanted.certain && !wanted.going => return Err(format!("{name} is lost")),
                None => continue,
                Some(_) if wanted.is_gone => return Err(format!("{name} was deleted and is there")),
                Some(found) => found.map_err(|e| format!("{name} cannot be read: {e}"))?,
            };
            for (number, bytes) in found.chunks(BLOCK).enumerate() {
                let number = number as u64;
                let v = version(wanted.content, number, bytes).map_err(|e| format!("block {number} of {name} {e}"))?;
                let possible = wanted.after.get(&number);
                if !possible.map_or(v == 0, |p| p.contains(&v)) {
                    return Err(format!("block {number} of {name} is of version {v}, and possible are {possible:?}"));
                }
                right += u64::from(possible.is_some_and(|p| !p.contains(&0)));
            }
        }
        Ok(right)
    }

    /// Compares with a store that nobody else has.
    pub fn check_store(&self, stamp: u64, store: &Store) -> Result<u64, String> {
        self.check(stamp, |name| {
            let disk = store.disk_by_name(name).map(|d| Source::Disk(d.id));
            let snapshot = || store.snapshots().into_iter().find(|s| s.name == name).map(|s| Source::Snapshot(s.id));
            let source = disk.or_else(snapshot)?;
            Some(read(store, source).map_err(|e| format!("{e:?}")))
        })
    }

    /// Compares with what a daemon shows, as files. What the load has open is read through `open`.
    pub fn check_daemon(&self, daemon: &Daemon) -> Result<u64, String> {
        self.check(u64::MAX, |name| match daemon.try_attach(name, "fuse") {
            Ok(path) => {
                let bytes = std::fs::read(&path).map_err(|e| e.to_string());
                daemon.detach(name);
                Some(bytes)
            }
            Err(e) if e.code == "disk_not_found" => None,
            Err(e) => Some(Err(format!("{e:?}"))),
        })
    }
}

/// All of a disk or snapshot.
pub fn read(store: &Store, source: Source) -> storage::Result<Vec<u8>> {
    let disk = store.open_source(source)?;
    let mut bytes = vec![0; disk.size_bytes() as usize];
    disk.read(0, &mut bytes)?;
    Ok(bytes)
}

/// What stopped a load.
#[derive(Debug)]
pub enum Stop {
    Io(io::Error),
    Refused(Refused),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Stop::Io(error)
    }
}

impl From<Refused> for Stop {
    fn from(error: Refused) -> Self {
        Stop::Refused(error)
    }
}

/// Writes, flushes, snapshots, forks, deletes, seals and collects, through files of a FUSE mount and the API. The
/// ledger outlives the daemon: after its death, [`Load::mourn`] and [`Load::resume`].
pub struct Load<'a> {
    pub ledger: Ledger,
    chance: Chance,
    stamp: Box<dyn Fn() -> u64 + Send + 'a>,
    prefix: String,
    content: u64,
    version: u64,
    serial: u64,
    /// Its disks, with their files while there is a daemon.
    files: BTreeMap<String, Option<File>>,
    snapshots: Vec<String>,
}

impl<'a> Load<'a> {
    /// Its disks have names that begin with `prefix`; `content` is in all of its blocks.
    pub fn new(prefix: &str, content: u64, seed: u64, stamp: impl Fn() -> u64 + Send + 'a) -> Load<'a> {
        Load {
            ledger: Ledger::default(),
            chance: Chance::new(seed ^ content << 32),
            stamp: Box::new(stamp),
            prefix: prefix.to_owned(),
            content,
            version: 0,
            serial: 0,
            files: BTreeMap::new(),
            snapshots: Vec::new(),
        }
    }

    /// Another that goes on from here, on a copy of the store. Stamps do not matter to it.
    pub fn branch(&self, seed: u64) -> Load<'static> {
        let mut ledger = self.ledger.clone();
        ledger.settle();
        Load {
            ledger,
            chance: Chance::new(seed),
            stamp: Box::new(|| 0),
            prefix: self.prefix.clone(),
            content: self.content,
            version: self.version,
            serial: self.serial,
            files: self.files.keys().map(|name| (name.clone(), None)).collect(),
            snapshots: self.snapshots.clone(),
        }
    }

    fn add(&mut self, entry: Entry) {
        self.ledger.add((self.stamp)(), entry);
    }

    fn fresh_name(&mut self) -> String {
        self.serial += 1;
        format!("{}-{}", self.prefix, self.serial)
    }

    fn open(&mut self, daemon: &Daemon, name: &str) -> Result<(), Stop> {
        let path = daemon.try_attach(name, "fuse")?;
        let file = File::options().read(true).write(true).open(path)?;
        self.files.insert(name.to_owned(), Some(file));
        Ok(())
    }

    /// Notes that the daemon died.
    pub fn mourn(&mut self) {
        self.add(Entry::Died);
        self.files.values_mut().for_each(|file| *file = None);
    }

    /// Opens what is not open.
    pub fn resume(&mut self, daemon: &Daemon) -> Result<(), Stop> {
        let closed: Vec<_> =
            self.files.iter().filter(|(_, file)| file.is_none()).map(|(name, _)| name.clone()).collect();
        closed.iter().try_for_each(|name| self.open(daemon, name))
    }

    fn file(&self, name: &str) -> Result<&File, Stop> {
        self.files[name].as_ref().ok_or_else(|| io::Error::other("the disk is not attached").into())
    }

    /// Does one thing.
    pub fn step(&mut self, daemon: &Daemon) -> Result<(), Stop> {
        if self.files.is_empty() {
            let name = self.fresh_name();
            self.add(Entry::Creating { name: name.clone(), content: self.content });
            let body = json!({ "name": name, "size_bytes": BLOCKS * BLOCK as u64 });
            daemon.call("POST", "/disks", body)?;
            self.add(Entry::Created { name: name.clone() });
            return self.open(daemon, &name);
        }
        let names: Vec<String> = self.files.keys().cloned().collect();
        let name = names[self.chance.below(names.len() as u64) as usize].clone();
        match self.chance.below(30) {
            0 => drop(daemon.call("POST", "/store/seal", Value::Null)?),
            1 => drop(daemon.call("POST", "/store/gc", Value::Null)?),
            2 => drop(daemon.call("POST", "/store/scrub?heal=true", Value::Null)?),
            3 => drop(daemon.call("POST", "/store/repack", Value::Null)?),
            4..=6 => {
                if self.snapshots.len() >= SNAPSHOTS {
                    self.delete_oldest(daemon)?;
                }
                let copy = self.copy(daemon, &name, "snapshots")?;
                self.snapshots.push(copy);
            }
            7 | 8 => {
                if names.len() > FORKS {
                    let gone = names[self.chance.below(names.len() as u64) as usize].clone();
                    self.files.remove(&gone);
                    daemon.call("POST", &format!("/disks/{gone}/detach"), Value::Null)?;
                    self.delete(daemon, gone)?;
                }
                let of = match self.snapshots.is_empty() || self.chance.below(2) == 0 {
                    true => self.files.keys().next().unwrap().clone(),
                    false => self.snapshots[self.chance.below(self.snapshots.len() as u64) as usize].clone(),
                };
                let copy = self.copy(daemon, &of, "fork")?;
                self.open(daemon, &copy)?;
            }
            9..=16 => {
                self.file(&name)?.sync_data()?;
                self.add(Entry::Flushed { name });
            }
            _ => {
                let first = self.chance.below(BLOCKS);
                let blocks = (1 + self.chance.below(24)).min(BLOCKS - first);
                self.version += 1;
                let version = self.version;
                self.add(Entry::Writing { name: name.clone(), first, blocks, version });
                let bytes: Vec<u8> = (first..first + blocks).flat_map(|n| block(self.content, n, version)).collect();
                self.file(&name)?.write_all_at(&bytes, first * BLOCK as u64)?;
                self.add(Entry::Wrote { name, first, blocks, version });
            }
        }
        Ok(())
    }

    fn copy(&mut self, daemon: &Daemon, of: &str, what: &str) -> Result<String, Stop> {
        let name = self.fresh_name();
        // Without an answer it may be there, under a name that nothing else gets.
        daemon.call("POST", &format!("/disks/{of}/{what}"), json!({ "name": name }))?;
        self.add(Entry::Copied { of: of.to_owned(), name: name.clone() });
        Ok(name)
    }

    /// Deletes its oldest snapshot, if it has one.
    pub fn delete_oldest(&mut self, daemon: &Daemon) -> Result<(), Stop> {
        match self.snapshots.is_empty() {
            true => Ok(()),
            false => {
                let oldest = self.snapshots.remove(0);
                self.delete(daemon, oldest)
            }
        }
    }

    fn delete(&mut self, daemon: &Daemon, name: String) -> Result<(), Stop> {
        self.add(Entry::Deleting { name: name.clone() });
        daemon.call("DELETE", &format!("/disks/{name}"), Value::Null)?;
        self.add(Entry::Deleted { name });
        Ok(())
    }
}
