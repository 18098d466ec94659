//! The catalogue's rows and keys, and the manifest that carries them in packs.

use crate::block::{LogPos, Source};
use crate::catalogue::{Batch, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::format::NodeRef;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Key of a record: kind and key.
pub(crate) type RecordKey = (String, String);

/// A disk or snapshot in the catalogue.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DeviceRow {
    pub name: String,
    pub size_blocks: u64,
    pub parent: Option<Source>,
    pub unix_ms: u64,
    pub root: NodeRef,
}

/// Where the log begins and which numbers come next: the catalogue's row `checkpoint`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Checkpoint {
    pub log_start: LogPos,
    pub next_segment: u64,
    pub next_id: u64,
    pub next_group: u64,
    pub next_pack: u64,
}

/// The last check of everything: the catalogue's row `checked`.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Checked {
    pub unix_seconds: u64,
    /// Things that were damaged and not healed.
    pub damage: u64,
}

impl Default for Checkpoint {
    /// A store in which nothing was sealed yet. Number 0 is left out: block 0 is no block.
    fn default() -> Self {
        Self { log_start: LogPos(0), next_segment: 0, next_id: 1, next_group: 1, next_pack: 1 }
    }
}

/// What a checkpoint changes in the catalogue, as the last pack's manifest has it too, so that the catalogue can be made
/// again from the packs: rows to set, or to remove where there is no value.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// The rows are all there are: what is not among them is gone.
    pub whole: bool,
    pub checkpoint: Checkpoint,
    pub devices: Vec<(Source, Option<DeviceRow>)>,
    pub records: Vec<(RecordKey, Option<Bytes>)>,
}

impl Manifest {
    /// Adds the changes of disks, snapshots and records to a batch.
    pub fn add_to(&self, batch: &mut Batch) -> Result<()> {
        for (source, row) in &self.devices {
            let (table, key) = device_key(*source);
            match row {
                Some(row) => batch.put(table, key, encode(row)?),
                None => batch.delete(table, key),
            }
        }
        for (key, value) in &self.records {
            match value {
                Some(value) => batch.put(Table::Records, record_key(key), value.to_vec()),
                None => batch.delete(Table::Records, record_key(key)),
            }
        }
        Ok(())
    }
}

/// The catalogue's key of a disk or snapshot, and its table.
fn device_key(source: Source) -> (Table, [u8; 8]) {
    match source {
        Source::Disk(id) => (Table::Disks, id.0.to_be_bytes()),
        Source::Snapshot(id) => (Table::Snapshots, id.0.to_be_bytes()),
    }
}

/// The catalogue's key of a record.
fn record_key((kind, key): &RecordKey) -> Vec<u8> {
    [kind.as_bytes(), &[0], key.as_bytes()].concat()
}

/// Encodes a row.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(|e| Error::new(ErrorKind::InvalidInput, format!("cannot encode: {e}")))
}

/// Decodes a row; `what` names it in the error.
pub(crate) fn decode<T: for<'a> Deserialize<'a>>(what: &str, row: &[u8]) -> Result<T> {
    postcard::from_bytes(row).map_err(|e| Error::damaged(format!("{what} in the catalogue cannot be read: {e}")))
}

/// The id in a row's key.
pub(crate) fn parse_id(key: &[u8]) -> Result<u64> {
    let bytes = key.try_into().map_err(|_| Error::damaged("a catalogue key has the wrong length"))?;
    Ok(u64::from_be_bytes(bytes))
}
