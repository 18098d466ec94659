//! Finding a block that is stored already, by its digest, without an index entry a block.
//!
//! Only one digest in 64 is in the index on disk. Duplicates come in runs, since files do: a hit brings in the digests
//! of the whole pack, verified, and those find the rest of the run in memory. (Sparse indexing, Lillibridge et al., FAST
//! 2009.) What is missed is stored twice, never lost.

use crate::block::BlockId;
use crate::blocks::Blocks;
use crate::catalogue::{Catalogue, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{GroupKind, StoreUuid};
use crate::live::Live;
use crate::pack::{Digest, GroupPlace};
use parking_lot::RwLock;
use quick_cache::sync::Cache;
use std::sync::Arc;

/// One digest in this many is in the index on disk.
const SAMPLE: u8 = 64;

/// See the module.
pub(crate) struct Index {
    catalogue: Arc<dyn Catalogue>,
    blocks: Arc<Blocks>,
    store: StoreUuid,
    neighbours: Cache<Digest, BlockId>,
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
    pub fn new(catalogue: Arc<dyn Catalogue>, blocks: Arc<Blocks>, store: StoreUuid, digests: usize) -> Self {
        Self { catalogue, blocks, store, neighbours: Cache::new(digests), keep: RwLock::default() }
    }

    /// Brings in what the sampled ones among these digests lead to.
    pub fn warm(&self, digests: &[Digest]) -> Result<()> {
        for digest in digests.iter().filter(|d| sampled(d)) {
            if self.neighbours.contains_key(digest) {
                continue;
            }
            if let Some(value) = self.catalogue.get(Table::Index, key(digest))? {
                let id = value.try_into().map_err(|_| Error::damaged("an index entry has the wrong length"))?;
                match self.load_pack_of(BlockId(u64::from_be_bytes(id))) {
                    // Storing the block once more is right, and keeps damage from spreading.
                    Err(e) if e.kind() == ErrorKind::Damaged => tracing::warn!("not deduplicating: {e}"),
                    done => done?,
                }
            }
        }
        Ok(())
    }

    /// Brings in the digests of all data blocks of the pack that a block is in.
    fn load_pack_of(&self, hit: BlockId) -> Result<()> {
        let pack = self.blocks.place(hit.group())?.pack;
        let (contents, digests) = self.blocks.contents(self.store, pack, &self.blocks.facts(pack)?)?;
        let entries = contents.frames.iter().flat_map(|frame| &frame.groups);
        let blocks = entries.flat_map(|entry| entry.slots().map(|slot| (entry.kind, BlockId::new(entry.group, slot))));
        let mut place = None;
        for ((_, id), digest) in blocks.zip(digests).filter(|((kind, _), _)| *kind == GroupKind::Data) {
            // Healing moves groups out of a pack that still lists them: only what is here counts.
            if place.is_none_or(|(group, _)| group != id.group()) {
                place = Some((id.group(), self.blocks.find_place(id.group())?));
            }
            if let Some((_, Some(GroupPlace { pack: of, slots, .. }))) = place
                && of == pack
                && slots >> id.slot() & 1 == 1
            {
                self.neighbours.insert(digest, id);
            }
        }
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
    }
}
