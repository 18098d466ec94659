//! Finding a block that is stored already, by its digest, without an index entry a block.
//!
//! Only one digest in 64 is in the index on disk. Duplicates come in runs, since files do: a hit brings in the digests
//! of its neighbourhood in the pack, and those find the rest of the run in memory. (Sparse indexing, Lillibridge et al.,
//! FAST 2009.) What is missed is stored twice, never lost.

use crate::block::{BlockId, GroupId};
use crate::blocks::Blocks;
use crate::catalogue::{Catalogue, Table};
use crate::error::{Error, Result};
use crate::format::GroupKind;
use crate::gc::Live;
use crate::pack::Digest;
use parking_lot::RwLock;
use quick_cache::sync::Cache;
use std::sync::Arc;

/// One digest in this many is in the index on disk.
const SAMPLE: u8 = 64;
/// Groups whose digests a hit brings in: those with the same number divided by this.
const WINDOW_GROUPS: u64 = 64;

/// See the module.
pub(crate) struct Index {
    catalogue: Arc<dyn Catalogue>,
    blocks: Arc<Blocks>,
    neighbours: Cache<Digest, BlockId>,
    /// Windows whose digests were brought in.
    windows: Cache<u64, ()>,
    /// While garbage is collected: what may still be found.
    keep: RwLock<Option<Arc<Live>>>,
}

/// Is this digest one that the index on disk keeps?
pub(crate) fn sampled(digest: &Digest) -> bool {
    digest[0].is_multiple_of(SAMPLE)
}

/// The index's key of a digest.
pub(crate) fn key(digest: &Digest) -> &[u8] {
    &digest[..16]
}

impl Index {
    /// `digests` bounds the digests kept in memory, at some 70 bytes each.
    pub fn new(catalogue: Arc<dyn Catalogue>, blocks: Arc<Blocks>, digests: usize) -> Self {
        let windows = (digests / 1024).max(16);
        Self {
            catalogue,
            blocks,
            neighbours: Cache::new(digests),
            windows: Cache::new(windows),
            keep: RwLock::default(),
        }
    }

    /// Brings in what the sampled ones among these digests lead to.
    pub fn warm(&self, digests: &[Digest]) -> Result<()> {
        for digest in digests.iter().filter(|d| sampled(d)) {
            if self.neighbours.contains_key(digest) {
                continue;
            }
            if let Some(value) = self.catalogue.get(Table::Index, key(digest))? {
                let id = value.try_into().map_err(|_| Error::damaged("an index entry has the wrong length"))?;
                self.load_window(BlockId(u64::from_be_bytes(id)))?;
            }
        }
        Ok(())
    }

    fn load_window(&self, hit: BlockId) -> Result<()> {
        let window = hit.group().0 / WINDOW_GROUPS;
        if self.windows.get(&window).is_some() {
            return Ok(());
        }
        // Group numbers grow as packs are written, so neighbours in number are neighbours in the pack.
        for group in window * WINDOW_GROUPS..(window + 1) * WINDOW_GROUPS {
            let group = GroupId(group);
            let Some(value) = self.catalogue.get(Table::Groups, &group.0.to_be_bytes())? else { continue };
            let place = self.blocks.parse_place(group, &value)?;
            if place.kind != GroupKind::Data {
                continue;
            }
            let digests = self.blocks.digests(place.pack, place.digest, place.slots.count_ones())?;
            let slots = (0..16).filter(|slot| place.slots >> slot & 1 == 1);
            for (slot, digest) in slots.zip(digests) {
                self.neighbours.insert(digest, BlockId::new(group, slot));
            }
        }
        self.windows.insert(window, ());
        Ok(())
    }

    /// A stored block with this digest, if one is known.
    pub fn find(&self, digest: &Digest) -> Option<BlockId> {
        let found = self.neighbours.get(digest)?;
        self.keep.read().as_ref().is_none_or(|live| live.keeps(found)).then_some(found)
    }

    /// Remembers a block that is being stored.
    pub fn insert(&self, digest: Digest, id: BlockId) {
        self.neighbours.insert(digest, id);
    }

    /// From now on only what `live` keeps is found; with `None`, everything again that is found afresh.
    pub fn keep_only(&self, live: Option<Arc<Live>>) {
        *self.keep.write() = live;
        self.clear();
    }

    /// Forgets everything in memory: what was remembered may not have become durable.
    pub fn clear(&self) {
        self.neighbours.clear();
        self.windows.clear();
    }
}
