//! What exists: disks, snapshots and the embedding program's records, in memory; and how a transaction changes it.
//!
//! The log has every transaction since the last checkpoint, the catalogue everything before. Applying the log's
//! transactions to the catalogue's contents, which is what recovery does, gives the same registry again.

use crate::block::{BLOCK_BYTES, DiskId, LogPos, SnapshotId, Source};
use crate::disk::Device;
use crate::domain::{self, Domain};
use crate::error::{Error, ErrorKind, Result};
use crate::format::MAX_DISK_BLOCKS;
use crate::rows::RecordKey;
use crate::state::State;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// One step of a transaction: what the log's transaction records hold, postcard-encoded.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Op {
    CreateDisk {
        id: DiskId,
        name: String,
        size_blocks: u64,
        unix_ms: u64,
    },
    Fork {
        id: DiskId,
        name: String,
        source: Source,
        unix_ms: u64,
    },
    Snapshot {
        id: SnapshotId,
        name: String,
        disk: DiskId,
        unix_ms: u64,
    },
    DeleteDisk {
        id: DiskId,
    },
    DeleteSnapshot {
        id: SnapshotId,
    },
    PutRecord {
        kind: String,
        key: String,
        value: Bytes,
    },
    DeleteRecord {
        kind: String,
        key: String,
    },
    /// A fork with more blocks than its source: those read as zeroes.
    ForkLarger {
        id: DiskId,
        name: String,
        source: Source,
        size_blocks: u64,
        unix_ms: u64,
    },
}

/// See the module.
#[derive(Default)]
pub(crate) struct Registry {
    pub devices: BTreeMap<Source, Arc<Device>>,
    names: HashMap<String, DiskId>,
    pub records: BTreeMap<RecordKey, Bytes>,
    /// Made, deleted or put since the last checkpoint: what the next has to tell the catalogue besides new roots.
    pub touched: BTreeSet<Source>,
    pub touched_records: BTreeSet<RecordKey>,
}

impl Registry {
    /// The disk or snapshot.
    pub fn device(&self, source: Source) -> Result<&Arc<Device>> {
        self.devices.get(&source).ok_or_else(|| {
            let what = if matches!(source, Source::Disk(_)) { "disk" } else { "snapshot" };
            Error::new(ErrorKind::NotFound, format!("there is no {what} {source}"))
        })
    }

    /// The disk of this name.
    pub fn disk_named(&self, name: &str) -> Option<&Arc<Device>> {
        self.devices.get(&Source::Disk(*self.names.get(name)?))
    }

    /// The domain of a disk or snapshot, as its record has it.
    pub fn domain(&self, source: Source) -> Domain {
        Domain::of(self.records.get(&domain::record(source)).map(|name| &name[..]))
    }

    /// Puts a disk or snapshot in that the catalogue tells of.
    pub fn load(&mut self, device: Device) {
        if let Source::Disk(id) = device.source {
            self.names.insert(device.name.clone(), id);
        }
        self.devices.insert(device.source, Arc::new(device));
    }

    /// Would these steps, one after the other, succeed? Errors say what to do instead.
    pub fn check(&self, ops: &[Op]) -> Result<()> {
        // With their sizes.
        let mut made: BTreeMap<Source, u64> = BTreeMap::new();
        let mut gone: BTreeSet<Source> = BTreeSet::new();
        let mut names: HashMap<&str, bool> = HashMap::new();
        for op in ops {
            // The size of what exists by then.
            let size_of = |source: &Source| {
                let size = made.get(source).copied().or_else(|| self.devices.get(source).map(|d| d.size_blocks));
                size.filter(|_| !gone.contains(source)).ok_or_else(|| {
                    self.device(*source).err().unwrap_or_else(|| {
                        Error::new(ErrorKind::NotFound, format!("{source} is deleted in the same transaction"))
                    })
                })
            };
            let mut new_name = |name| -> Result<()> {
                check_name(name)?;
                let taken = names.get(name).copied().unwrap_or_else(|| self.names.contains_key(name));
                if taken {
                    let what = format!("a disk named {name:?} exists already: choose another name");
                    return Err(Error::new(ErrorKind::NameTaken, what));
                }
                names.insert(name, true);
                Ok(())
            };
            match op {
                Op::CreateDisk { id, name, size_blocks, .. } => {
                    new_name(name)?;
                    check_size(*size_blocks)?;
                    made.insert(Source::Disk(*id), *size_blocks);
                }
                Op::Fork { id, name, source, .. } => {
                    let size = size_of(source)?;
                    new_name(name)?;
                    made.insert(Source::Disk(*id), size);
                }
                Op::ForkLarger { id, name, source, size_blocks, .. } => {
                    let size = size_of(source)?;
                    check_size(*size_blocks)?;
                    if *size_blocks < size {
                        let what = format!("{source} has {} bytes: a fork cannot be smaller", size * BLOCK_BYTES);
                        return Err(Error::new(ErrorKind::InvalidInput, what));
                    }
                    new_name(name)?;
                    made.insert(Source::Disk(*id), *size_blocks);
                }
                Op::Snapshot { id, name, disk, .. } => {
                    let size = size_of(&Source::Disk(*disk))?;
                    check_name(name)?;
                    made.insert(Source::Snapshot(*id), size);
                }
                Op::DeleteDisk { id } => {
                    let source = Source::Disk(*id);
                    size_of(&source)?;
                    if let Some(device) = self.devices.get(&source) {
                        names.insert(&device.name, false);
                    }
                    gone.insert(source);
                }
                Op::DeleteSnapshot { id } => {
                    size_of(&Source::Snapshot(*id))?;
                    gone.insert(Source::Snapshot(*id));
                }
                Op::PutRecord { kind, key, .. } | Op::DeleteRecord { kind, key } => {
                    if kind.contains('\0') {
                        return Err(Error::new(ErrorKind::InvalidInput, "a record's kind must not contain NUL"));
                    }
                    if kind == domain::KIND {
                        let no_source = || format!("{key:?} is neither a disk's id nor a snapshot's");
                        let source = domain::source(kind, key);
                        size_of(&source.ok_or_else(|| Error::new(ErrorKind::InvalidInput, no_source()))?)?;
                        if let Op::PutRecord { value, .. } = op {
                            domain::check_name(value)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The existing devices whose state the steps read, change or end. Their writers have to be stopped from before the record
    /// is appended until [`Registry::apply`] is done.
    pub fn involved(&self, ops: &[Op]) -> Vec<Arc<Device>> {
        let sources: BTreeSet<Source> = ops
            .iter()
            .filter_map(|op| match op {
                Op::Fork { source, .. } | Op::ForkLarger { source, .. } => Some(*source),
                Op::Snapshot { disk, .. } => Some(Source::Disk(*disk)),
                Op::DeleteDisk { id } => Some(Source::Disk(*id)),
                Op::DeleteSnapshot { id } => Some(Source::Snapshot(*id)),
                Op::PutRecord { kind, key, .. } | Op::DeleteRecord { kind, key } => domain::source(kind, key),
                Op::CreateDisk { .. } => None,
            })
            .collect();
        sources.iter().filter_map(|s| self.devices.get(s).cloned()).collect()
    }

    /// Makes the steps happen. `end` is the log's end behind their record. Fails only on a log that no checked
    /// transaction can have written.
    pub fn apply(&mut self, ops: Vec<Op>, end: LogPos) -> Result<()> {
        for op in ops {
            match op {
                Op::CreateDisk { id, name, size_blocks, unix_ms } => {
                    self.add(Device::new(Source::Disk(id), name, size_blocks, None, unix_ms, State::default()));
                }
                Op::Fork { id, name, source, unix_ms } => {
                    self.grow(source, Source::Disk(id), name, None, unix_ms, end)?;
                }
                Op::ForkLarger { id, name, source, size_blocks, unix_ms } => {
                    self.grow(source, Source::Disk(id), name, Some(size_blocks), unix_ms, end)?;
                }
                Op::Snapshot { id, name, disk, unix_ms } => {
                    self.grow(Source::Disk(disk), Source::Snapshot(id), name, None, unix_ms, end)?;
                }
                Op::DeleteDisk { id } => self.remove(Source::Disk(id))?,
                Op::DeleteSnapshot { id } => self.remove(Source::Snapshot(id))?,
                Op::PutRecord { kind, key, value } => self.set_record((kind, key), Some(value), end),
                Op::DeleteRecord { kind, key } => self.set_record((kind, key), None, end),
            }
        }
        Ok(())
    }

    /// Sets a record, or removes it. One that tells a domain tells it of what is written from now on.
    fn set_record(&mut self, record: RecordKey, value: Option<Bytes>, end: LogPos) {
        let source = domain::source(&record.0, &record.1);
        if let Some(device) = source.and_then(|source| self.devices.get(&source)) {
            device.freeze(end);
            device.with_state(|state| state.domain = Domain::of(value.as_deref()));
        }
        match value {
            Some(value) => self.records.insert(record.clone(), value),
            None => self.records.remove(&record),
        };
        self.touched_records.insert(record);
    }

    /// Adds a device that starts with what another holds now, in its domain: the O(1) heart of snapshot and fork.
    fn grow(
        &mut self,
        from: Source,
        to: Source,
        name: String,
        larger: Option<u64>,
        unix_ms: u64,
        end: LogPos,
    ) -> Result<()> {
        let parent = self.device(from)?;
        parent.freeze(end);
        let (size_blocks, state) = (larger.unwrap_or(parent.size_blocks), parent.state());
        self.add(Device::new(to, name, size_blocks, Some(from), unix_ms, state));
        if let Some(domain) = self.records.get(&domain::record(from)).cloned() {
            self.set_record(domain::record(to), Some(domain), end);
        }
        Ok(())
    }

    fn add(&mut self, device: Device) {
        self.touched.insert(device.source);
        self.load(device);
    }

    fn remove(&mut self, source: Source) -> Result<()> {
        let device = self.device(source)?.clone();
        device.delete();
        self.devices.remove(&source);
        if let Source::Disk(id) = source
            && self.names.get(&device.name) == Some(&id)
        {
            self.names.remove(&device.name);
        }
        self.touched.insert(source);
        let domain = domain::record(source);
        if self.records.remove(&domain).is_some() {
            self.touched_records.insert(domain);
        }
        Ok(())
    }
}

fn check_size(blocks: u64) -> Result<()> {
    if blocks == 0 || blocks > MAX_DISK_BLOCKS {
        let what = format!("a disk has between 4096 and {} bytes, a multiple of 4096", MAX_DISK_BLOCKS * BLOCK_BYTES);
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    Ok(())
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > 255 || name.chars().any(char::is_control) {
        let what = format!("{name:?} cannot be a name: use 1 to 255 bytes without control characters");
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    Ok(())
}
