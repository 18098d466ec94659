//! The block store: content-addressed, deduplicated, compressed, and at the same time a live block device.
//!
//! A [`Store`] is a directory. It holds disks and snapshots; a [`Disk`] handle reads, writes, flushes and discards.
//! Snapshots and forks are O(1): a [`Transaction`] clones a map root and a persistent overlay and writes one record.
//!
//! Layers, none of which knows one above it: `store` → `recover`, `repair`, `check`, `gc`, `repack`, `usage`, `diff`, `archive` → `seal` →
//! `disk`, `registry`, `priority` → `inner` (what is open) → `index`, `live`, `blocks`, `workers`, `readahead`, `state`, `overlay`, `map`, `pack`, `log`, `note`, `rows`,
//! `catalogue` → `domain`, `format`, `block` → `medium`. `docs/ARCHITECTURE.md` follows a write and a fork through them;
//! `docs/format.md` has every byte on disk.

mod archive;
mod backup;
mod block;
mod blocks;
pub mod catalogue;
mod check;
mod diff;
mod disk;
mod domain;
mod error;
mod format;
mod gc;
mod index;
mod inner;
mod live;
mod log;
mod map;
pub mod medium;
mod note;
mod overlay;
mod pack;
mod priority;
mod readahead;
mod recover;
mod registry;
mod repack;
mod repair;
mod rows;
mod seal;
mod state;
mod store;
mod totals;
mod usage;
mod workers;

pub use archive::{ARCHIVE_MAGIC, ArchiveReader, ArchiveReport, ArchiveState};
pub use backup::BackupReport;
pub use block::{BLOCK_SIZE, DiskId, SnapshotId, Source};
pub use check::CheckReport;
pub use diff::DiffRange;
pub use disk::Disk;
pub use domain::check_domain;
pub use error::{Error, ErrorKind, Result};
pub use gc::GcReport;
pub use inner::Options;
pub use medium::file::Backend;
pub use repack::RepackReport;
pub use repair::RepairReport;
pub use seal::SealReport;
pub use store::{Commit, DiskInfo, SnapshotInfo, Store, Transaction};
pub use totals::Totals;
pub use usage::{GroupUsage, Stats, Usage};
