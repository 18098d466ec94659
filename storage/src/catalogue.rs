//! The catalogue: small facts by key in a few tables, changed in durable, atomic batches.
//!
//! RocksDB is the real one; [`MemCatalogue`] is its twin for simulated media. Nothing on the path of a guest's write or
//! flush asks it; a read asks it where a group is when the group is not in the cache.

use crate::error::{Error, ErrorKind, Result};
use crate::medium::sim::SimMedium;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The real catalogue's directory in a store's.
pub(crate) const DIR: &str = "catalogue";

/// The tables; each has its own keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Single facts by name: the checkpoint's position and the counters.
    Meta,
    /// Disk id (8 bytes, big-endian) → disk.
    Disks,
    /// Snapshot id → snapshot.
    Snapshots,
    /// Kind, 0, key → a record of the embedding program.
    Records,
    /// Pack id → pack.
    Packs,
    /// Group id → where its bytes are.
    Groups,
    /// First 16 bytes of a sampled digest → block id.
    Index,
}

impl Table {
    const ALL: [Table; 7] =
        [Self::Meta, Self::Disks, Self::Snapshots, Self::Records, Self::Packs, Self::Groups, Self::Index];

    fn name(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Disks => "disks",
            Self::Snapshots => "snapshots",
            Self::Records => "records",
            Self::Packs => "packs",
            Self::Groups => "groups",
            Self::Index => "index",
        }
    }
}

/// Changes that take effect together.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    changes: Vec<(Table, Vec<u8>, Option<Vec<u8>>)>,
}

impl Batch {
    /// Sets a key.
    pub fn put(&mut self, table: Table, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.changes.push((table, key.into(), Some(value.into())));
    }

    /// Removes a key; fine when it is not there.
    pub fn delete(&mut self, table: Table, key: impl Into<Vec<u8>>) {
        self.changes.push((table, key.into(), None));
    }
}

/// Takes a row's key and value.
pub type RowVisitor<'a> = dyn FnMut(&[u8], &[u8]) -> Result<()> + 'a;

/// See the module.
pub trait Catalogue: Send + Sync {
    /// The value of a key.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>>;
    /// The values of some keys, in their order.
    fn get_many(&self, table: Table, keys: &[[u8; 8]]) -> Result<Vec<Option<Vec<u8>>>> {
        keys.iter().map(|key| self.get(table, key)).collect()
    }
    /// Calls `f` with every key and value of a table, in order of the keys.
    fn scan(&self, table: Table, f: &mut RowVisitor<'_>) -> Result<()>;
    /// Applies a batch: durable and whole when this returns `Ok`, whole or not at all after a crash.
    fn commit(&self, batch: Batch) -> Result<()>;
    /// Makes a copy of the whole in `dir`, which must not be there. It need not be durable yet.
    fn copy_to(&self, dir: &Path) -> Result<()>;
}

/// What a table collects in memory before it is written out.
const WRITE_BUFFER_BYTES: usize = 2 << 20;

/// The real one.
pub struct RocksCatalogue {
    db: rocksdb::DB,
}

fn rocks_error(what: &str, e: rocksdb::Error) -> Error {
    let kind = match e.kind() {
        rocksdb::ErrorKind::Corruption => ErrorKind::Damaged,
        // RocksDB reports a full disk as an I/O error whose text carries the system's message.
        _ if e.as_ref().contains("No space left") => ErrorKind::NoSpace,
        _ => ErrorKind::Io,
    };
    Error::caused(kind, format!("the catalogue cannot {what}"), e)
}

impl RocksCatalogue {
    /// Opens the database in `dir`; `create` makes it if it is not there.
    pub fn open(dir: &Path, create: bool) -> Result<Self> {
        let mut options = rocksdb::Options::default();
        options.create_if_missing(create);
        options.create_missing_column_families(create);
        options.set_paranoid_checks(true);
        options.set_keep_log_file_num(2);
        options.set_max_log_file_size(1 << 20);
        options.set_manifest_preallocation_size(64 << 10);
        // RocksDB reserves as much for its log as its write buffers hold, the unused default family's too.
        options.set_write_buffer_size(WRITE_BUFFER_BYTES);
        options.set_max_total_wal_size(4 * WRITE_BUFFER_BYTES as u64);
        options.set_max_open_files(256);
        let cache = rocksdb::Cache::new_lru_cache(32 << 20).map_err(|e| rocks_error("make its cache", e))?;
        let families = Table::ALL.map(|table| {
            let mut blocks = rocksdb::BlockBasedOptions::default();
            blocks.set_block_cache(&cache);
            blocks.set_bloom_filter(10.0, false);
            blocks.set_cache_index_and_filter_blocks(true);
            let mut options = rocksdb::Options::default();
            options.set_block_based_table_factory(&blocks);
            options.set_compression_type(rocksdb::DBCompressionType::Zstd);
            options.set_write_buffer_size(WRITE_BUFFER_BYTES);
            rocksdb::ColumnFamilyDescriptor::new(table.name(), options)
        });
        let db = rocksdb::DB::open_cf_descriptors(&options, dir, families).map_err(|e| rocks_error("open", e))?;
        Ok(Self { db })
    }

    fn family(&self, table: Table) -> Result<&rocksdb::ColumnFamily> {
        let missing = || Error::damaged(format!("the catalogue has no table {:?}", table.name()));
        self.db.cf_handle(table.name()).ok_or_else(missing)
    }
}

impl Catalogue for RocksCatalogue {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.db.get_cf(self.family(table)?, key).map_err(|e| rocks_error("read", e))
    }

    fn get_many(&self, table: Table, keys: &[[u8; 8]]) -> Result<Vec<Option<Vec<u8>>>> {
        let rows = self.db.batched_multi_get_cf(self.family(table)?, keys, keys.is_sorted());
        let copy = |row: Option<rocksdb::DBPinnableSlice<'_>>| row.map(|row| row.to_vec());
        rows.into_iter().map(|row| row.map(copy).map_err(|e| rocks_error("read", e))).collect()
    }

    fn scan(&self, table: Table, f: &mut RowVisitor<'_>) -> Result<()> {
        for item in self.db.iterator_cf(self.family(table)?, rocksdb::IteratorMode::Start) {
            let (key, value) = item.map_err(|e| rocks_error("read", e))?;
            f(&key, &value)?;
        }
        Ok(())
    }

    fn commit(&self, batch: Batch) -> Result<()> {
        let mut write = rocksdb::WriteBatch::default();
        for (table, key, value) in batch.changes {
            match value {
                Some(value) => write.put_cf(self.family(table)?, key, value),
                None => write.delete_cf(self.family(table)?, key),
            }
        }
        let mut options = rocksdb::WriteOptions::default();
        options.set_sync(true);
        self.db.write_opt(write, &options).map_err(|e| rocks_error("commit", e))
    }

    fn copy_to(&self, dir: &Path) -> Result<()> {
        let made = rocksdb::checkpoint::Checkpoint::new(&self.db).and_then(|copy| copy.create_checkpoint(dir));
        made.map_err(|e| rocks_error("be copied", e))
    }
}

type Rows = BTreeMap<(Table, Vec<u8>), Vec<u8>>;

/// A catalogue in memory whose commits are events of a simulated medium. Clones share the rows, so that a test can open
/// a store again on the catalogue that a power cut left behind.
#[derive(Clone)]
pub struct MemCatalogue {
    rows: Arc<Mutex<Rows>>,
    medium: SimMedium,
}

impl MemCatalogue {
    /// An empty catalogue that announces its commits to `medium`.
    pub fn new(medium: SimMedium) -> Self {
        Self { rows: Arc::default(), medium }
    }

    /// The same rows beside another medium: what a reboot finds.
    pub fn after_power_loss(&self, medium: SimMedium) -> Self {
        Self { rows: Arc::new(Mutex::new(self.rows.lock().clone())), medium }
    }
}

impl Catalogue for MemCatalogue {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.rows.lock().get(&(table, key.to_vec())).cloned())
    }

    fn scan(&self, table: Table, f: &mut RowVisitor<'_>) -> Result<()> {
        let rows: Vec<_> = self.rows.lock().range((table, Vec::new())..).map(|(k, v)| (k.clone(), v.clone())).collect();
        rows.iter().take_while(|((t, _), _)| *t == table).try_for_each(|((_, key), value)| f(key, value))
    }

    fn copy_to(&self, _: &Path) -> Result<()> {
        Err(Error::new(ErrorKind::InvalidInput, "a catalogue in memory is not copied to a directory"))
    }

    fn commit(&self, batch: Batch) -> Result<()> {
        self.medium.external().map_err(|e| Error::io("the catalogue cannot commit", e))?;
        let mut rows = self.rows.lock();
        for (table, key, value) in batch.changes {
            match value {
                Some(value) => drop(rows.insert((table, key), value)),
                None => drop(rows.remove(&(table, key))),
            }
        }
        Ok(())
    }
}
