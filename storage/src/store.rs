//! The store: opening, transactions, and what holds everything together.

use crate::block::{BLOCK_BYTES, DiskId, LogPos, SnapshotId, Source};
use crate::blocks::Blocks;
use crate::catalogue::{Catalogue, RocksCatalogue};
use crate::disk::{Device, Disk};
use crate::domain;
use crate::error::{Error, ErrorKind, Result};
use crate::format::RecordKind;
use crate::index::Index;
use crate::inner::{Inner, Options, lock};
use crate::log::Record;
use crate::medium::Medium;
use crate::medium::file::FileMedium;
use crate::registry::Op;
use crate::seal::{SealReport, Sealer};
use crate::workers::Workers;
use bytes::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// A disk, as a list shows it.
#[derive(Debug, Clone, Serialize)]
pub struct DiskInfo {
    /// The id.
    pub id: DiskId,
    /// Unique among disks.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What it was forked from; that may be gone by now.
    pub parent: Option<String>,
    /// When it was made, in milliseconds since 1970.
    pub created_unix_ms: u64,
}

/// A snapshot, as a list shows it.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotInfo {
    /// The id.
    pub id: SnapshotId,
    /// A label; not unique.
    pub name: String,
    /// The disk it was taken of; that may be gone by now.
    pub disk: Option<DiskId>,
    /// Size in bytes.
    pub size_bytes: u64,
    /// When it was taken, in milliseconds since 1970.
    pub created_unix_ms: u64,
}

/// A block store in a directory. Cheap to clone; every call blocks and may be made from any thread.
///
/// The last clone to go stops the background work; what was not flushed is then lost, as at a power cut.
#[derive(Clone)]
pub struct Store {
    handle: Arc<Handle>,
}

/// Stops the threads when the last clone goes.
struct Handle {
    inner: Arc<Inner>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inner.sealer.stop();
        self.inner.workers.stop();
    }
}

impl Store {
    /// Opens the store in `dir`, making it when the directory is absent or empty.
    ///
    /// Errors: `InUse` when another process has it open, `UnsupportedVersion`, `Damaged`, `NoSpace`, `Io`.
    pub fn open(dir: &Path, options: Options) -> Result<Self> {
        let at = |what: &str| format!("cannot {what} {}", dir.display());
        std::fs::create_dir_all(dir).map_err(|e| Error::io(at("make the directory"), e))?;
        if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::File::open(parent).and_then(|p| p.sync_all()).map_err(|e| Error::io(at("make durable"), e))?;
        }
        let lock = lock(dir)?;
        let medium = Arc::new(FileMedium::new(dir, options.backend));
        let place = dir.join(crate::catalogue::DIR);
        let catalogue = move |create: bool| {
            if !create && !place.join("CURRENT").exists() {
                let what =
                    format!("the catalogue in {} is missing: `miosa store repair` makes it again", place.display());
                return Err(Error::new(ErrorKind::Damaged, what));
            }
            RocksCatalogue::open(&place, create).map(|c| Arc::new(c) as Arc<dyn Catalogue>)
        };
        Self::open_on(medium, &catalogue, options, Some((dir.to_owned(), lock)))
    }

    /// Opens a store on any medium and catalogue: for tests with simulated ones.
    pub fn open_with(medium: Arc<dyn Medium>, catalogue: Arc<dyn Catalogue>, options: Options) -> Result<Self> {
        Self::open_on(medium, &move |_| Ok(catalogue.clone()), options, None)
    }

    fn open_on(
        medium: Arc<dyn Medium>,
        open_catalogue: &dyn Fn(bool) -> Result<Arc<dyn Catalogue>>,
        options: Options,
        place: Option<(PathBuf, nix::fcntl::Flock<std::fs::File>)>,
    ) -> Result<Self> {
        let recovered = crate::recover::recover(medium.clone(), open_catalogue, options.salvage_log)?;
        let catalogue = recovered.catalogue;
        let blocks =
            Arc::new(Blocks::new(medium.clone(), catalogue.clone(), options.cache_bytes, options.node_cache_bytes));
        let index = Index::new(catalogue.clone(), blocks.clone(), recovered.uuid, options.index_digests);
        let (dir, lock) = place.unzip();
        let inner = Arc::new(Inner {
            uuid: recovered.uuid,
            medium,
            catalogue,
            blocks,
            index,
            workers: Arc::new(Workers::default()),
            log: recovered.log,
            registry: Mutex::new(recovered.registry),
            counters: Arc::new(recovered.counters),
            next_id: AtomicU64::new(recovered.next_id),
            sealer: Sealer::default(),
            collecting: Mutex::new(()),
            deleted: AtomicU64::new(0),
            totals: Mutex::default(),
            options,
            dir,
            _lock: lock,
        });
        inner.set_reserve();
        if inner.options.background {
            crate::seal::start(&inner)?;
        }
        Ok(Self { handle: Arc::new(Handle { inner }) })
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.handle.inner
    }

    /// Begins a transaction.
    pub fn begin(&self) -> Transaction<'_> {
        Transaction { store: self, ops: Vec::new() }
    }

    /// A handle on a disk.
    pub fn disk(&self, id: DiskId) -> Result<Disk> {
        self.open_source(Source::Disk(id))
    }

    /// A read-only handle on a snapshot.
    pub fn snapshot(&self, id: SnapshotId) -> Result<Disk> {
        self.open_source(Source::Snapshot(id))
    }

    /// A handle on either.
    pub fn open_source(&self, source: Source) -> Result<Disk> {
        let device = self.inner().registry.lock().device(source)?.clone();
        Ok(Disk { store: self.inner().clone(), device, read_only: false })
    }

    /// All disks, by id.
    pub fn disks(&self) -> Vec<DiskInfo> {
        self.inner().registry.lock().devices.values().filter_map(|d| disk_info(d)).collect()
    }

    /// All snapshots, by id.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.inner().registry.lock().devices.values().filter_map(|d| snapshot_info(d)).collect()
    }

    /// The disk of this name.
    pub fn disk_by_name(&self, name: &str) -> Option<DiskInfo> {
        self.inner().registry.lock().disk_named(name).and_then(|d| disk_info(d))
    }

    /// The deduplication domain of a disk or snapshot; `None` is the shared one. See [`Transaction::set_domain`].
    pub fn domain(&self, source: Source) -> Result<Option<String>> {
        let registry = self.inner().registry.lock();
        registry.device(source)?;
        Ok(registry.records.get(&domain::record(source)).map(|name| String::from_utf8_lossy(name).into_owned()))
    }

    /// A record of the embedding program.
    pub fn record(&self, kind: &str, key: &str) -> Option<Bytes> {
        self.inner().registry.lock().records.get(&(kind.to_owned(), key.to_owned())).cloned()
    }

    /// All records of a kind, by key.
    pub fn records(&self, kind: &str) -> Vec<(String, Bytes)> {
        let registry = self.inner().registry.lock();
        let from = (kind.to_owned(), String::new());
        let of_kind = registry.records.range(from..).take_while(|((k, _), _)| k == kind);
        of_kind.map(|((_, key), value)| (key.clone(), value.clone())).collect()
    }

    /// Seals all that was written before the call and returns when it is done and durable.
    pub fn seal(&self) -> Result<SealReport> {
        crate::seal::checkpoint(self.inner())
    }

    /// Reads everything that is sealed and compares it with its checksums and digests. Slow: it reads the whole store.
    pub fn check(&self) -> Result<crate::CheckReport> {
        crate::check::check(self.inner(), false)
    }

    /// Checks everything, and writes anew what is damaged and of which an undamaged copy is stored or in memory.
    pub fn scrub(&self, heal: bool) -> Result<crate::CheckReport> {
        crate::check::check(self.inner(), heal)
    }

    /// Makes the catalogue of the store in `dir` again from its packs and log, and keeps the old one beside it. No
    /// process may have the store open.
    pub fn repair(dir: &Path) -> Result<crate::RepairReport> {
        crate::repair::repair(dir)
    }

    /// Gives back the space of what nothing refers to; with `dry_run` only says what it would give back. Disks are in use
    /// meanwhile. Needs free space for one pack at a time.
    pub fn gc(&self, dry_run: bool) -> Result<crate::GcReport> {
        if dry_run { crate::gc::collect(self.inner(), true) } else { self.inner().collect() }
    }

    /// Packs everything again at `repack_level` that is not packed so yet, whatever its age. Disks are in use meanwhile.
    /// Needs free space for 64 MiB at a time.
    pub fn repack(&self) -> Result<crate::RepackReport> {
        crate::repack::repack(self.inner(), None, &mut |_| true)
    }

    /// Copies the store to `to`, a directory that is not there, as of one moment after the call, while disks are in use; see
    /// [`crate::BackupReport`] for what it shares with the store. Collections wait meanwhile, sealing for a part of it. The
    /// copy is a store of its own: what happens to either is nothing to the other, but that damage to a shared file is
    /// damage to both.
    ///
    /// Errors: `InvalidInput` if `to` is there; `NoSpace`, `Io`. Then nothing of it is left.
    pub fn backup(&self, to: &Path) -> Result<crate::BackupReport> {
        crate::backup::backup(self.inner(), to)
    }

    /// The store's figures. Walks the rows of all packs and the overlays of all disks.
    pub fn stats(&self) -> Result<crate::Stats> {
        crate::usage::stats(self.inner())
    }

    /// What was done since the store was opened.
    pub fn totals(&self) -> crate::Totals {
        *self.inner().totals.lock()
    }

    /// Bytes of the non-zero blocks of a disk or snapshot.
    pub fn logical_bytes(&self, source: Source) -> Result<u64> {
        let device = self.inner().registry.lock().device(source)?.clone();
        Ok(crate::usage::logical_blocks(self.inner(), &device)? * BLOCK_BYTES)
    }

    /// What every disk and snapshot costs. Walks all maps; sealing waits meanwhile.
    pub fn usage(&self) -> Result<Vec<crate::Usage>> {
        crate::usage::usage(self.inner(), None)
    }

    /// What one of them costs. Walks all maps too, since others may share.
    pub fn usage_of(&self, source: Source) -> Result<crate::Usage> {
        self.inner().registry.lock().device(source)?;
        let gone = || Error::new(ErrorKind::NotFound, format!("{source} has been deleted"));
        crate::usage::usage(self.inner(), Some(source))?.pop().ok_or_else(gone)
    }

    /// What groups of them cost, each group as a whole. What is in no group counts as one more group.
    pub fn usage_of_groups(&self, groups: &[Vec<Source>]) -> Result<Vec<crate::GroupUsage>> {
        crate::usage::usage_of_groups(self.inner(), groups)
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> Result<()> {
        self.inner().log.flush(self.inner().log.end())
    }

    /// Syncs of the log so far, for tests and benches that count what a group commit costs.
    pub fn log_syncs(&self) -> u64 {
        self.inner().log.syncs()
    }

    /// Empties the caches of decoded blocks and map nodes: what benches call cold.
    pub fn drop_caches(&self) {
        self.inner().blocks.drop_caches();
    }

    /// Stops the background work and makes everything written durable. Handles stay usable for reading.
    pub fn close(&self) -> Result<()> {
        self.inner().sealer.stop();
        self.flush()?;
        // A record behind all others says that they were durable: if they are damaged later, the next start can tell.
        if self.inner().log.holds_new_records()
            && let Err(e) = self.begin().commit_durable()
        {
            tracing::warn!("the log is closed without a last record: {e}");
        }
        Ok(())
    }
}

fn disk_info(device: &Device) -> Option<DiskInfo> {
    let Source::Disk(id) = device.source else { return None };
    Some(DiskInfo {
        id,
        name: device.name.clone(),
        size_bytes: device.size_blocks * BLOCK_BYTES,
        parent: device.parent.map(|p| p.to_string()),
        created_unix_ms: device.created_unix_ms,
    })
}

fn snapshot_info(device: &Device) -> Option<SnapshotInfo> {
    let Source::Snapshot(id) = device.source else { return None };
    let disk = match device.parent {
        Some(Source::Disk(id)) => Some(id),
        _ => None,
    };
    Some(SnapshotInfo {
        id,
        name: device.name.clone(),
        disk,
        size_bytes: device.size_blocks * BLOCK_BYTES,
        created_unix_ms: device.created_unix_ms,
    })
}

/// Steps that take effect together: in memory when [`Transaction::commit`] returns, on disk when the [`Commit`] has been
/// waited for. After a crash all of them are there or none is. Dropping it does nothing.
#[must_use]
pub struct Transaction<'a> {
    store: &'a Store,
    ops: Vec<Op>,
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// A size that is no multiple is refused at the commit, like every other bad argument.
fn whole_blocks(size_bytes: u64) -> u64 {
    if size_bytes.is_multiple_of(BLOCK_BYTES) { size_bytes / BLOCK_BYTES } else { 0 }
}

impl Transaction<'_> {
    fn next_id(&self) -> u64 {
        self.store.inner().next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// A new disk that reads as zeroes. The size is a multiple of 4096 bytes, at most 64 TiB; the name is unique.
    pub fn create_disk(&mut self, name: &str, size_bytes: u64) -> DiskId {
        let id = DiskId(self.next_id());
        let size_blocks = whole_blocks(size_bytes);
        self.ops.push(Op::CreateDisk { id, name: name.to_owned(), size_blocks, unix_ms: unix_ms() });
        id
    }

    /// A new disk with what `source` holds at the commit. O(1).
    pub fn fork(&mut self, source: Source, name: &str) -> DiskId {
        let id = DiskId(self.next_id());
        self.ops.push(Op::Fork { id, name: name.to_owned(), source, unix_ms: unix_ms() });
        id
    }

    /// As [`Transaction::fork`], with more room: what lies beyond the source's end reads as zeroes. The size is a multiple
    /// of 4096 bytes and not smaller than the source's.
    pub fn fork_larger(&mut self, source: Source, name: &str, size_bytes: u64) -> DiskId {
        let id = DiskId(self.next_id());
        let size_blocks = whole_blocks(size_bytes);
        self.ops.push(Op::ForkLarger { id, name: name.to_owned(), source, size_blocks, unix_ms: unix_ms() });
        id
    }

    /// A snapshot of what `disk` holds at the commit. O(1).
    pub fn snapshot(&mut self, disk: DiskId, name: &str) -> SnapshotId {
        let id = SnapshotId(self.next_id());
        self.ops.push(Op::Snapshot { id, name: name.to_owned(), disk, unix_ms: unix_ms() });
        id
    }

    /// Puts a disk, which may be one of this transaction, into a deduplication domain, or with `None` into the shared one:
    /// what is written to it from now on is stored once among the disks of this domain and found in the shared one, and
    /// nobody outside finds it. Forks and snapshots are in the domain of what they are made of, until this says otherwise.
    /// A name has 1 to 64 letters, digits, `-`, `_` and `.`.
    pub fn set_domain(&mut self, disk: DiskId, domain: Option<&str>) {
        let (kind, key) = domain::record(Source::Disk(disk));
        self.ops.push(match domain {
            Some(name) => Op::PutRecord { kind, key, value: Bytes::copy_from_slice(name.as_bytes()) },
            None => Op::DeleteRecord { kind, key },
        });
    }

    /// Deletes a disk; handles on it fail from then on. Snapshots and forks of it stay.
    pub fn delete_disk(&mut self, id: DiskId) {
        self.ops.push(Op::DeleteDisk { id });
    }

    /// Deletes a snapshot. Forks of it stay.
    pub fn delete_snapshot(&mut self, id: SnapshotId) {
        self.ops.push(Op::DeleteSnapshot { id });
    }

    /// Sets a record of the embedding program. Meant for some kilobytes each. The kind `dedup-domain` is the store's own.
    pub fn put_record(&mut self, kind: &str, key: &str, value: impl Into<Bytes>) {
        self.ops.push(Op::PutRecord { kind: kind.to_owned(), key: key.to_owned(), value: value.into() });
    }

    /// Removes a record; fine when it is not there.
    pub fn delete_record(&mut self, kind: &str, key: &str) {
        self.ops.push(Op::DeleteRecord { kind: kind.to_owned(), key: key.to_owned() });
    }

    /// Checks all steps, appends them to the log as one record and makes them happen. On an error nothing has happened.
    pub fn commit(self) -> Result<Commit> {
        let inner = self.store.inner();
        let encoded = postcard::to_stdvec(&self.ops)
            .map_err(|e| Error::new(ErrorKind::InvalidInput, format!("the transaction cannot be encoded: {e}")))?;
        if encoded.len() > crate::format::RecordHeader::PAYLOAD_MAX {
            return Err(Error::new(ErrorKind::InvalidInput, "the transaction is larger than 16 MiB: split it"));
        }
        let mut registry = inner.registry.lock();
        registry.check(&self.ops)?;
        let involved = registry.involved(&self.ops);
        // Sorted by id, so that two transactions cannot wait for each other.
        let stopped: Vec<_> = involved.iter().map(|d| d.stop_writes()).collect();
        let checksums = [crc32c::crc32c(&encoded)];
        let record = Record {
            kind: RecordKind::Transaction,
            disk: 0,
            block: 0,
            count: 0,
            checksums: &checksums,
            payload: &encoded,
        };
        let gives_back = |op: &Op| {
            !matches!(op, Op::CreateDisk { .. } | Op::Fork { .. } | Op::ForkLarger { .. } | Op::Snapshot { .. })
        };
        if self.ops.iter().all(gives_back) {
            inner.with_reserve(|| inner.log.append(&record))?;
        } else {
            inner.log.append(&record)?;
        }
        let upto = inner.log.end();
        let deleted = self.ops.iter().filter(|op| matches!(op, Op::DeleteDisk { .. } | Op::DeleteSnapshot { .. }));
        inner.deleted.fetch_add(deleted.count() as u64, Ordering::Relaxed);
        registry.apply(self.ops, upto)?;
        drop(stopped);
        Ok(Commit { inner: inner.clone(), upto })
    }

    /// [`Transaction::commit`], then [`Commit::wait`].
    pub fn commit_durable(self) -> Result<()> {
        self.commit()?.wait()
    }
}

/// A transaction that has happened and may not be durable yet.
#[must_use = "a commit is durable only once it has been waited for"]
pub struct Commit {
    inner: Arc<Inner>,
    upto: LogPos,
}

impl Commit {
    /// Returns when the transaction, and everything written before it, is durable. Commits that wait at the same time
    /// share one sync.
    pub fn wait(self) -> Result<()> {
        self.inner.log.flush(self.upto)
    }
}
