//! Skeleton of the API while the engine is being written; replaced by the real modules.
#![allow(missing_docs, unused_variables, clippy::unimplemented)]
use crate::Result;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A writable disk. Shown and parsed as `disk-<n>`. Serialises as that string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DiskId(pub u64);
/// An immutable state. Shown and parsed as `snap-<n>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SnapshotId(pub u64);
impl std::fmt::Display for DiskId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "disk-{}", self.0)
    }
}
impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "snap-{}", self.0)
    }
}
/// What a fork starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Disk(DiskId),
    Snapshot(SnapshotId),
}
#[derive(Debug, Clone, Serialize)]
pub struct DiskInfo {
    pub id: DiskId,
    pub name: String,
    pub size_bytes: u64,
    pub parent: Option<SourceName>,
    pub created_unix_ms: u64,
}
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotInfo {
    pub id: SnapshotId,
    pub name: String,
    pub disk: DiskId,
    pub size_bytes: u64,
    pub created_unix_ms: u64,
}
pub type SourceName = String;
/// Bytes, unless a name says otherwise.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stats {
    pub disks: u64,
    pub snapshots: u64,
    /// Bytes of all live disks and snapshots that map to data, each counted in full.
    pub logical_bytes: u64,
    /// Distinct data blocks x 4096.
    pub unique_bytes: u64,
    pub pack_bytes: u64,
    pub map_bytes: u64,
    pub index_bytes: u64,
    pub log_bytes: u64,
    /// All that the state directory's store holds on disk.
    pub stored_bytes: u64,
    pub dedup_ratio: f64,
    pub compression_ratio: f64,
}
#[derive(Debug, Clone, Default, Serialize)]
pub struct SealReport {
    pub blocks: u64,
    pub new_blocks: u64,
    pub pack_bytes: u64,
}
#[derive(Debug, Clone, Default)]
pub struct Options {}
/// The store: open once per directory. Cheap to clone. All calls block and are safe from any thread
/// (wrap in `spawn_blocking` in async code).
#[derive(Clone)]
pub struct Store {}
impl Store {
    /// Opens the store in `dir`, creating it when the directory is absent or empty.
    pub fn open(dir: &Path, options: Options) -> Result<Store> {
        unimplemented!()
    }
    pub fn begin(&self) -> Transaction<'_> {
        unimplemented!()
    }
    /// Handle on a live disk.
    pub fn disk(&self, id: DiskId) -> Result<Disk> {
        unimplemented!()
    }
    /// Read-only handle on a snapshot.
    pub fn snapshot(&self, id: SnapshotId) -> Result<Disk> {
        unimplemented!()
    }
    pub fn disks(&self) -> Vec<DiskInfo> {
        unimplemented!()
    }
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        unimplemented!()
    }
    pub fn disk_by_name(&self, name: &str) -> Option<DiskInfo> {
        unimplemented!()
    }
    /// Small opaque records of the embedding program, durable and transactional with disks.
    pub fn record(&self, kind: &str, key: &str) -> Option<Bytes> {
        unimplemented!()
    }
    pub fn records(&self, kind: &str) -> Vec<(String, Bytes)> {
        unimplemented!()
    }
    /// Seals everything written so far and waits for it.
    pub fn seal(&self) -> Result<SealReport> {
        unimplemented!()
    }
    pub fn stats(&self) -> Result<Stats> {
        unimplemented!()
    }
    /// Flushes, stops the background threads and releases the lock.
    pub fn close(&self) -> Result<()> {
        unimplemented!()
    }
}
/// All operations of one transaction take effect together, in memory at `commit`, on disk when the returned
/// `Commit` has been waited for; after a crash all or none are there.
pub struct Transaction<'a> {
    store: &'a Store,
}
impl Transaction<'_> {
    pub fn create_disk(&mut self, name: &str, size_bytes: u64) -> DiskId {
        unimplemented!()
    }
    pub fn fork(&mut self, source: Source, name: &str) -> DiskId {
        unimplemented!()
    }
    pub fn snapshot(&mut self, disk: DiskId, name: &str) -> SnapshotId {
        unimplemented!()
    }
    pub fn delete_disk(&mut self, id: DiskId) {
        unimplemented!()
    }
    pub fn delete_snapshot(&mut self, id: SnapshotId) {
        unimplemented!()
    }
    pub fn put_record(&mut self, kind: &str, key: &str, value: impl Into<Bytes>) {
        unimplemented!()
    }
    pub fn delete_record(&mut self, kind: &str, key: &str) {
        unimplemented!()
    }
    /// Applies in memory and appends to the log; errors (name taken, unknown source) leave nothing changed.
    pub fn commit(self) -> Result<Commit> {
        unimplemented!()
    }
    /// `commit` and wait until durable.
    pub fn commit_durable(self) -> Result<()> {
        unimplemented!()
    }
}
#[must_use]
pub struct Commit {}
impl Commit {
    pub fn wait(self) -> Result<()> {
        unimplemented!()
    }
}
/// A block device with a volatile write cache. Any byte offset and length within the size is accepted; 4 KiB-aligned
/// access is fast. `Clone + Send + Sync`, all methods take `&self` and may run concurrently.
#[derive(Clone)]
pub struct Disk {}
impl Disk {
    pub fn size_bytes(&self) -> u64 {
        unimplemented!()
    }
    pub fn is_read_only(&self) -> bool {
        unimplemented!()
    }
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        unimplemented!()
    }
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        unimplemented!()
    }
    /// Every write completed before this call survives a crash once it returns.
    pub fn flush(&self) -> Result<()> {
        unimplemented!()
    }
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        unimplemented!()
    }
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        unimplemented!()
    }
}
