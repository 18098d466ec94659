//! Opening a store: the catalogue's checkpoint, and the log from there on.

use crate::block::{DiskId, PackId, SnapshotId, Source};
use crate::catalogue::{Batch, Catalogue, Table};
use crate::disk::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{RecordKind, StoreHeader, StoreUuid};
use crate::log::{self, Log, Replayed};
use crate::medium::{Medium, Mode};
use crate::note;
use crate::overlay::{Content, Extent};
use crate::pack::{self, Counters};
use crate::registry::{Op, Registry};
use crate::rows::{self, Checkpoint, DeviceRow, parse_id};
use crate::state::State;
use bytes::Bytes;
use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

pub(crate) const STORE: &str = "STORE";

/// What opening found.
pub(crate) struct Recovered {
    pub uuid: StoreUuid,
    pub catalogue: Arc<dyn Catalogue>,
    pub registry: Registry,
    pub log: Log,
    pub counters: Counters,
    pub next_id: u64,
}

/// Opens what is on the medium, or makes a store where there is none.
pub(crate) fn recover(
    medium: Arc<dyn Medium>,
    open_catalogue: &dyn Fn(bool) -> Result<Arc<dyn Catalogue>>,
    salvage_log: bool,
) -> Result<Recovered> {
    for dir in [log::DIR, pack::DIR] {
        medium.create_dir(dir).map_err(|e| Error::io(format!("cannot make the directory {dir}"), e))?;
    }
    let (uuid, catalogue) = match read_header(&*medium)? {
        Some(header) => (header.uuid, open_catalogue(false)?),
        None => create(&*medium, open_catalogue)?,
    };
    if catalogue.get(Table::Meta, b"store")?.as_deref() != Some(&uuid) {
        return Err(Error::damaged(
            "the catalogue belongs to another store, or is empty: `miosa store repair` makes it again",
        ));
    }
    load(medium, uuid, catalogue, salvage_log)
}

fn read_header(medium: &dyn Medium) -> Result<Option<StoreHeader>> {
    let file = match medium.open(STORE, Mode::Read) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("cannot open the file STORE", e)),
    };
    let mut bytes = [0; 64];
    let header = file.read_at(&mut bytes, 0).map_err(|e| Error::io("cannot read the file STORE", e));
    match header.and_then(|()| StoreHeader::decode(&bytes)) {
        Ok(header) => Ok(Some(header)),
        // A crash while the store was being made: nothing else has been written yet.
        Err(e) if e.kind() != ErrorKind::UnsupportedVersion && is_empty(medium)? => Ok(None),
        Err(e) => Err(e),
    }
}

/// Does the medium hold neither log nor packs?
fn is_empty(medium: &dyn Medium) -> Result<bool> {
    for dir in [log::DIR, pack::DIR] {
        if !medium.list(dir).map_err(|e| Error::io(format!("cannot list {dir}"), e))?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes a store: the catalogue first, then the file that says that this is one.
fn create(
    medium: &dyn Medium,
    open_catalogue: &dyn Fn(bool) -> Result<Arc<dyn Catalogue>>,
) -> Result<(StoreUuid, Arc<dyn Catalogue>)> {
    if !is_empty(medium)? {
        return Err(Error::damaged(
            "there are packs or log segments here but no file STORE: restore it from a backup, or use another directory",
        ));
    }
    let cannot = |e| Error::io("cannot make the store", e);
    let mut uuid = StoreUuid::default();
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut uuid)).map_err(cannot)?;
    let catalogue = open_catalogue(true)?;
    let mut batch = Batch::default();
    batch.put(Table::Meta, "store", uuid);
    catalogue.commit(batch)?;
    match medium.remove(STORE) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(cannot(e)),
        _ => {}
    }
    let file = medium.open(STORE, Mode::Create).map_err(cannot)?;
    file.write_at(&StoreHeader { uuid }.encode(), 0).map_err(cannot)?;
    file.sync().map_err(cannot)?;
    medium.sync_dir("").map_err(cannot)?;
    Ok((uuid, catalogue))
}

fn load(
    medium: Arc<dyn Medium>,
    uuid: StoreUuid,
    catalogue: Arc<dyn Catalogue>,
    salvage_log: bool,
) -> Result<Recovered> {
    let checkpoint = match catalogue.get(Table::Meta, b"checkpoint")? {
        Some(row) => rows::decode("the checkpoint", &row)?,
        None => Checkpoint::default(),
    };
    if note::read(&*medium, uuid)?.is_some_and(|next_pack| checkpoint.next_pack < next_pack) {
        return Err(Error::damaged(
            "the catalogue is older than the store's last checkpoint: `miosa store repair` makes it again",
        ));
    }
    let mut registry = Registry::default();
    catalogue.scan(Table::Records, &mut |key, value| {
        let split = key.iter().position(|b| *b == 0).map(|at| (&key[..at], &key[at + 1..]));
        let (kind, key) = split.ok_or_else(|| Error::damaged("a record's key in the catalogue has no kind"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        registry.records.insert((text(kind), text(key)), Bytes::copy_from_slice(value));
        Ok(())
    })?;
    for table in [Table::Disks, Table::Snapshots] {
        catalogue.scan(table, &mut |key, row| {
            let id = parse_id(key)?;
            let source =
                if table == Table::Disks { Source::Disk(DiskId(id)) } else { Source::Snapshot(SnapshotId(id)) };
            let row: DeviceRow = rows::decode("a disk or snapshot", row)?;
            let state = State { root: row.root, domain: registry.domain(source), ..State::default() };
            registry.load(Device::new(source, row.name, row.size_blocks, row.parent, row.unix_ms, state));
            Ok(())
        })?;
    }
    let packs = Packs::list(&*medium, &*catalogue)?;
    let mut next_id = checkpoint.next_id;
    let start = (checkpoint.log_start, checkpoint.next_segment);
    let log = Log::recover(medium.clone(), uuid, start.0, start.1, salvage_log, &mut |record| {
        apply(&mut registry, &mut next_id, record)
    })?;
    // Only now: a catalogue that is older than the log has been refused, and its newer packs are what a repair needs.
    packs.remove_unfinished(&*medium)?;
    let next_pack = packs.next.max(checkpoint.next_pack);
    let counters = Counters { group: AtomicU64::new(checkpoint.next_group), pack: AtomicU64::new(next_pack) };
    Ok(Recovered { uuid, catalogue, registry, log, counters, next_id })
}

/// One record of the log.
fn apply(registry: &mut Registry, next_id: &mut u64, record: Replayed) -> Result<()> {
    let Replayed { header, checksums, payload, transaction } = record;
    let content = match header.kind {
        RecordKind::Transaction => {
            let ops: Vec<Op> = postcard::from_bytes(&transaction)
                .map_err(|e| Error::damaged(format!("the transaction at log position {}: {e}", header.pos.0)))?;
            for op in &ops {
                *next_id = (*next_id).max(match op {
                    Op::CreateDisk { id, .. } | Op::Fork { id, .. } | Op::ForkLarger { id, .. } => id.0 + 1,
                    Op::Snapshot { id, .. } => id.0 + 1,
                    _ => 0,
                });
            }
            return registry.apply(ops, header.pos.plus(header.record_bytes()));
        }
        RecordKind::Zero => Content::Zero,
        RecordKind::Write => Content::Data { payload, crcs: checksums, first: 0 },
    };
    let device = registry.device(Source::Disk(DiskId(header.disk))).map_err(|_| {
        Error::damaged(format!(
            "the log writes to disk-{} at position {}, which is not there",
            header.disk, header.pos.0
        ))
    })?;
    if header.block + header.count > device.size_blocks {
        return Err(Error::damaged(format!("the log writes beyond the end of {}", device.source)));
    }
    device.apply(header.block, Extent { len: header.count, record: header.pos, content });
    Ok(())
}

/// The packs on the medium beside those of the catalogue.
struct Packs {
    /// A crash came before their checkpoint was done.
    unfinished: Vec<PackId>,
    /// Above all numbers.
    next: u64,
}

impl Packs {
    /// Fails when packs are missing and others unknown: that is a catalogue from before they were moved, and no crash.
    fn list(medium: &dyn Medium, catalogue: &dyn Catalogue) -> Result<Self> {
        let mut missing = BTreeSet::new();
        catalogue.scan(Table::Packs, &mut |key, _| {
            missing.insert(parse_id(key)?);
            Ok(())
        })?;
        let mut packs = Self { unfinished: Vec::new(), next: missing.last().map_or(1, |last| last + 1) };
        for (name, _) in medium.list(pack::DIR).map_err(|e| Error::io("cannot list the packs", e))? {
            let Some(pack) = pack::parse_name(&name) else { continue };
            packs.next = packs.next.max(pack.0 + 1);
            if !missing.remove(&pack.0) {
                packs.unfinished.push(pack);
            }
        }
        match (missing.first(), packs.unfinished.first()) {
            (Some(missing), Some(unknown)) => Err(Error::damaged(format!(
                "the catalogue names pack {missing}, which is missing, and not {unknown}, which is there: it is older than \
                 they are; `miosa store repair` makes it again"
            ))),
            _ => Ok(packs),
        }
    }

    fn remove_unfinished(&self, medium: &dyn Medium) -> Result<()> {
        for pack in &self.unfinished {
            medium.remove(&pack::file_name(*pack)).map_err(|e| Error::io(format!("cannot remove {pack}"), e))?;
        }
        if self.unfinished.is_empty() {
            return Ok(());
        }
        // The numbers of its groups are given out again: it must not come back beside them.
        medium.sync_dir(pack::DIR).map_err(|e| Error::io("cannot sync the packs' directory", e))
    }
}
