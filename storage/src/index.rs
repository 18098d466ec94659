//! Finding a block that is stored already, by its digest, without an index entry a block.
//!
//! Only one digest in 64 is in the index on disk. Duplicates come in runs, since files do: a hit brings in the digests
//! of the whole pack, verified, and those find the rest of the run in memory. (Sparse indexing, Lillibridge et al., FAST
//! 2009.) What is missed is stored twice, never lost.

use crate::block::BlockId;
use crate::blocks::Blocks;
use crate::catalogue::{Catalogue, Table};
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{GroupKind, StoreUuid};
use crate::live::Live;
use crate::pack::{Digest, GroupPlace};
use parking_lot::RwLock;
use quick_cache::sync::Cache;
use std::sync::Arc;

/// One digest in this many is in the index on disk.
const SAMPLE: u8 = 64;
/// What the keys of domains are derived for. Rows of the index depend on it.
const KEY_CONTEXT: &str = "miosa 2026-11-28 deduplication domain";

/// See the module.
pub(crate) struct Index {
    catalogue: Arc<dyn Catalogue>,
    blocks: Arc<Blocks>,
    store: StoreUuid,
    neighbours: Cache<IndexKey, BlockId>,
    /// While garbage is collected: what may still be found.
    keep: RwLock<Option<Arc<Live>>>,
}

/// What a block is known by in the index.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct IndexKey([u8; 32]);

impl IndexKey {
    /// Is it one that the index on disk keeps?
    pub fn is_sampled(&self) -> bool {
        self.0[0].is_multiple_of(SAMPLE)
    }

    /// Its key there.
    pub fn row(&self) -> &[u8] {
        &self.0[..16]
    }
}

/// Makes the index's keys of blocks of one domain: in the shared one the digest itself, in others a keyed hash of it, so
/// that blocks of different domains never meet.
pub(crate) struct Keys(Option<[u8; 32]>);

impl Keys {
    pub fn new(store: &StoreUuid, domain: Domain) -> Self {
        let material = || [&store[..], &domain.0.to_le_bytes()].concat();
        Self((domain != Domain::SHARED).then(|| blake3::derive_key(KEY_CONTEXT, &material())))
    }

    pub fn of(&self, digest: &Digest) -> IndexKey {
        IndexKey(self.0.map_or(*digest, |key| *blake3::keyed_hash(&key, digest).as_bytes()))
    }

    /// By what a block is looked for: what the domain has, and then what the shared one has.
    fn searched(&self, digest: &Digest) -> impl Iterator<Item = IndexKey> {
        std::iter::once(self.of(digest)).chain(self.0.map(|_| IndexKey(*digest)))
    }
}

impl Index {
    /// `digests` bounds the digests kept in memory, at some 70 bytes each.
    pub fn new(catalogue: Arc<dyn Catalogue>, blocks: Arc<Blocks>, store: StoreUuid, digests: usize) -> Self {
        Self { catalogue, blocks, store, neighbours: Cache::new(digests), keep: RwLock::default() }
    }

    /// Brings in what the sampled ones among these digests lead to, in the domain of `keys` and in the shared one.
    pub fn warm(&self, keys: &Keys, digests: &[Digest]) -> Result<()> {
        for key in digests.iter().flat_map(|digest| keys.searched(digest)).filter(IndexKey::is_sampled) {
            if self.neighbours.contains_key(&key) {
                continue;
            }
            if let Some(value) = self.catalogue.get(Table::Index, key.row())? {
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
        let facts = self.blocks.facts(pack)?;
        let keys = self.keys(facts.origin.domain);
        let (contents, digests) = self.blocks.contents(self.store, pack, &facts)?;
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
                self.neighbours.insert(keys.of(&digest), id);
            }
        }
        Ok(())
    }

    /// The keys of a domain's blocks.
    pub fn keys(&self, domain: Domain) -> Keys {
        Keys::new(&self.store, domain)
    }

    /// A stored block with this digest, if one is known in the domain of `keys` or in the shared one.
    pub fn find(&self, keys: &Keys, digest: &Digest) -> Option<BlockId> {
        let kept = |id: &BlockId| self.keep.read().as_ref().is_none_or(|live| live.keeps(*id));
        keys.searched(digest).find_map(|key| self.neighbours.get(&key).filter(kept))
    }

    /// Remembers a block that is being stored in the domain of `keys`.
    pub fn insert(&self, keys: &Keys, digest: &Digest, id: BlockId) {
        self.neighbours.insert(keys.of(digest), id);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_by_store_and_domain_and_do_not_change() {
        let digest = [5; 32];
        let shared = Keys::new(&[1; 16], Domain::SHARED);
        assert_eq!(shared.of(&digest).row(), &digest[..16]);
        assert_eq!(shared.searched(&digest).count(), 1);
        let keys = Keys::new(&[1; 16], Domain(7));
        // What catalogues have.
        assert_eq!(keys.of(&digest).row()[..4], [37, 37, 253, 28]);
        let others = [([1; 16], 8), ([2; 16], 7), ([1; 16], u64::MAX)].map(|(store, d)| Keys::new(&store, Domain(d)));
        assert!(others.iter().all(|other| other.of(&digest).row() != keys.of(&digest).row()));
        let searched: Vec<_> = keys.searched(&digest).map(|key| key.row().to_vec()).collect();
        assert_eq!(searched, [keys.of(&digest).row(), &digest[..16]], "the own domain first");
    }
}
