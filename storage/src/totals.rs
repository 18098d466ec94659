//! What sealing, collection and repacking have done since the store was opened.

use serde::Serialize;

use crate::{GcReport, RepackReport, Result, SealReport};

/// Sums over what was done, by whoever asked for it, since the store was opened. Each only grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Checkpoints that ended well; those that had nothing to do, too.
    pub checkpoints: u64,
    /// Checkpoints that failed.
    pub checkpoints_failed: u64,
    /// Blocks of data taken from the log.
    pub sealed_blocks: u64,
    /// Of them, blocks that were not stored yet.
    pub new_blocks: u64,
    /// Bytes of packs that checkpoints wrote.
    pub packed_bytes: u64,
    /// Collections that ended well.
    pub collections: u64,
    /// Collections that failed.
    pub collections_failed: u64,
    /// Bytes of packs that collections gave back.
    pub collected_bytes: u64,
    /// Packs that were packed again.
    pub repacked_packs: u64,
    /// Bytes that packing again gave back.
    pub repacked_bytes: u64,
}

impl Totals {
    pub(crate) fn checkpoint(&mut self, outcome: &Result<SealReport>) {
        let Ok(report) = outcome else {
            self.checkpoints_failed += 1;
            return;
        };
        self.checkpoints += 1;
        self.sealed_blocks += report.blocks;
        self.new_blocks += report.new_blocks;
        self.packed_bytes += report.pack_bytes;
    }

    pub(crate) fn collection(&mut self, outcome: &Result<GcReport>) {
        let Ok(report) = outcome else {
            self.collections_failed += 1;
            return;
        };
        self.collections += 1;
        self.collected_bytes += report.bytes_freed;
    }

    pub(crate) fn repacking(&mut self, report: &RepackReport) {
        self.repacked_packs += report.packs_rewritten;
        self.repacked_bytes += report.before_bytes.saturating_sub(report.after_bytes);
    }
}
