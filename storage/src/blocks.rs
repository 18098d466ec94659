//! Reading stored blocks: group table, pack files, and the caches of decoded groups and map nodes.
//!
//! Caches are keyed by address, not by disk, so that a hundred forks share one copy.

use crate::block::{BLOCK_SIZE, BlockId, GROUP_BLOCKS, GroupId, PackId};
use crate::catalogue::{Catalogue, Table};
use crate::error::{Error, Result};
use crate::format::{Codec, FrameHeader, GroupEntry, GroupKind, Node, PackContents, PackFooter, PackHeader, StoreUuid};
use crate::map::NodeSource;
use crate::medium::{File, Medium, Mode};
use crate::pack::{self, Digest, GroupPlace, PackFacts};
use crate::rows;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::sync::Arc;

/// A group's blocks, decoded and verified.
pub(crate) struct Group {
    kind: GroupKind,
    slots: u16,
    bytes: Vec<u8>,
}

impl Group {
    /// The block in `slot`, if the group has it.
    fn block(&self, slot: u32) -> Option<&[u8]> {
        if self.slots >> slot & 1 == 0 {
            return None;
        }
        let before = (self.slots & ((1 << slot) - 1)).count_ones() as usize;
        self.bytes.get(before * BLOCK_SIZE..(before + 1) * BLOCK_SIZE)
    }
}

#[derive(Clone)]
struct Weigh;

impl Weighter<GroupId, Arc<Group>> for Weigh {
    fn weight(&self, _: &GroupId, group: &Arc<Group>) -> u64 {
        group.bytes.len() as u64 + 100
    }
}

impl Weighter<BlockId, Arc<Node>> for Weigh {
    fn weight(&self, _: &BlockId, node: &Arc<Node>) -> u64 {
        100 + match &**node {
            Node::Leaf(extents) => 16 * extents.len() as u64,
            Node::Inner { children, .. } => 16 * children.len() as u64,
        }
    }
}

/// See the module.
pub(crate) struct Blocks {
    medium: Arc<dyn Medium>,
    catalogue: Arc<dyn Catalogue>,
    groups: Cache<GroupId, Arc<Group>, Weigh>,
    nodes: Cache<BlockId, Arc<Node>, Weigh>,
    files: Cache<PackId, Arc<dyn File>>,
}

impl Blocks {
    /// `group_bytes` and `node_bytes` bound the two caches.
    pub fn new(medium: Arc<dyn Medium>, catalogue: Arc<dyn Catalogue>, group_bytes: u64, node_bytes: u64) -> Self {
        Self {
            medium,
            catalogue,
            groups: Cache::with_weighter((group_bytes >> 16) as usize, group_bytes, Weigh),
            nodes: Cache::with_weighter((node_bytes >> 10) as usize, node_bytes, Weigh),
            files: Cache::new(512),
        }
    }

    /// Fills `out` (whole blocks) from the stored blocks that follow `first`.
    pub fn read(&self, first: BlockId, out: &mut [u8]) -> Result<()> {
        let mut id = first;
        let mut group = self.group(id.group())?;
        for block in out.chunks_mut(BLOCK_SIZE) {
            if id.slot() == 0 && id != first {
                group = self.group(id.group())?;
            }
            let found = group.block(id.slot()).ok_or_else(|| missing(id))?;
            block.copy_from_slice(found);
            id = id.plus(1);
        }
        Ok(())
    }

    /// Brings the groups of `runs` (address, blocks) into the cache, reading what is missing in as few round trips as
    /// the medium allows. Pays when several groups are missing. A failure shows again, or not, at [`Blocks::read`].
    pub fn prefetch(&self, runs: &[(BlockId, u64)]) {
        drop(self.try_prefetch(runs));
    }

    fn try_prefetch(&self, runs: &[(BlockId, u64)]) -> Result<()> {
        let mut wanted = Vec::new();
        for (first, blocks) in runs {
            for group in first.group().0..=first.plus(blocks - 1).group().0 {
                if wanted.last() != Some(&GroupId(group)) && !self.groups.contains_key(&GroupId(group)) {
                    wanted.push(GroupId(group));
                }
            }
        }
        if wanted.len() < 2 {
            return Ok(());
        }
        let mut places = Vec::with_capacity(wanted.len());
        for group in wanted {
            places.push((group, self.place(group)?));
        }
        places.sort_by_key(|(_, place)| (place.pack, place.offset));
        for run in places.chunk_by(|a, b| a.1.pack == b.1.pack) {
            let file = self.file(run[0].1.pack)?;
            let mut buffers: Vec<Vec<u8>> = run.iter().map(|(_, p)| vec![0; p.bytes as usize]).collect();
            let mut reads: Vec<_> = buffers.iter_mut().zip(run).map(|(b, (_, p))| (&mut b[..], p.offset)).collect();
            file.read_many(&mut reads).map_err(|e| unreadable(run[0].1.pack, e))?;
            for (bytes, (group, place)) in buffers.iter().zip(run) {
                self.groups.insert(*group, Arc::new(decode(*group, place, bytes)?));
            }
        }
        Ok(())
    }

    fn group(&self, id: GroupId) -> Result<Arc<Group>> {
        self.groups.get_or_insert_with(&id, || {
            let place = self.place(id)?;
            let loaded = self.load(id, &place).or_else(|e| {
                // Garbage collection may have moved it since we asked where it is.
                let now = self.place(id)?;
                if now == place { Err(e) } else { self.load(id, &now) }
            });
            Ok(Arc::new(loaded?))
        })
    }

    fn load(&self, id: GroupId, place: &GroupPlace) -> Result<Group> {
        let mut bytes = vec![0; place.bytes as usize];
        self.file(place.pack)?.read_at(&mut bytes, place.offset).map_err(|e| unreadable(place.pack, e))?;
        decode(id, place, &bytes)
    }

    /// A block, if the cache has it.
    pub fn cached_block(&self, id: BlockId) -> Option<Vec<u8>> {
        self.groups.peek(&id.group())?.block(id.slot()).map(<[_]>::to_vec)
    }

    /// A group's blocks from the medium, whatever the cache has.
    pub fn read_group_uncached(&self, id: GroupId, place: &GroupPlace) -> Result<Vec<u8>> {
        Ok(self.load(id, place)?.bytes)
    }

    /// Where a group is, if anywhere.
    pub fn find_place(&self, id: GroupId) -> Result<Option<GroupPlace>> {
        let row = self.catalogue.get(Table::Groups, &id.0.to_be_bytes())?;
        row.map(|row| self.parse_place(id, &row)).transpose()
    }

    /// Where a group is.
    pub fn place(&self, id: GroupId) -> Result<GroupPlace> {
        self.find_place(id)?.ok_or_else(|| missing(BlockId::new(id, 0)))
    }

    /// Decodes a row of the group table.
    pub fn parse_place(&self, id: GroupId, row: &[u8]) -> Result<GroupPlace> {
        postcard::from_bytes(row).map_err(|e| Error::damaged(format!("the place of group {}: {e}", id.0)))
    }

    /// All packs and what the catalogue knows of them, by number.
    pub fn packs(&self) -> Result<Vec<(PackId, PackFacts)>> {
        let mut packs = Vec::new();
        self.catalogue.scan(Table::Packs, &mut |key, row| {
            packs.push((PackId(rows::parse_id(key)?), rows::decode("a pack", row)?));
            Ok(())
        })?;
        Ok(packs)
    }

    /// What the catalogue knows of a pack.
    pub fn facts(&self, pack: PackId) -> Result<PackFacts> {
        let value = self.catalogue.get(Table::Packs, &pack.0.to_be_bytes())?;
        let value = value.ok_or_else(|| Error::damaged(format!("{pack} is referred to but not in the catalogue")))?;
        postcard::from_bytes(&value).map_err(|e| Error::damaged(format!("the catalogue's row of {pack}: {e}")))
    }

    /// A pack's table of contents, and the digests of all its blocks in that order; verifies header, footer and all
    /// sections.
    pub fn contents(&self, store: StoreUuid, pack: PackId, facts: &PackFacts) -> Result<(PackContents, Vec<Digest>)> {
        let damaged = |what: &str| Error::damaged(format!("{pack}: {what}"));
        let file = self.file(pack)?;
        let read = |at: u64, buf: &mut [u8]| file.read_at(buf, at).map_err(|e| unreadable(pack, e));
        let mut head = [0; PackHeader::BYTES as usize];
        read(0, &mut head)?;
        if PackHeader::decode(&head)? != Some(PackHeader { store, pack }) {
            return Err(damaged("the header is damaged or another pack's"));
        }
        let mut foot = [0; PackFooter::BYTES as usize];
        let sections_end = facts.bytes.checked_sub(PackFooter::BYTES).ok_or_else(|| damaged("too short"))?;
        read(sections_end, &mut foot)?;
        let footer = PackFooter::decode(&foot, facts.bytes).ok_or_else(|| damaged("the footer is damaged"))?;
        if (footer.pack, footer.digests_at, footer.contents_at) != (pack, facts.digests_at, facts.contents_at) {
            return Err(damaged("the footer and the catalogue disagree"));
        }
        let mut sections = vec![0; (sections_end - footer.digests_at) as usize];
        read(footer.digests_at, &mut sections)?;
        if crc32c::crc32c(&sections) != footer.sections_crc {
            return Err(damaged("the digests, contents or manifest are damaged"));
        }
        let from = (footer.contents_at - footer.digests_at) as usize;
        let upto = (footer.manifest_at - footer.digests_at) as usize;
        let contents =
            zstd::stream::decode_all(&sections[from..upto]).map_err(|_| damaged("the contents do not decompress"))?;
        let contents = postcard::from_bytes(&contents).map_err(|_| damaged("the contents cannot be read"))?;
        Ok((contents, sections[..from].as_chunks::<32>().0.to_vec()))
    }

    /// Drops a group from the cache.
    pub fn forget_group(&self, id: GroupId) {
        self.groups.remove(&id);
    }

    /// Closes a pack that is gone.
    pub fn forget_pack(&self, pack: PackId) {
        self.files.remove(&pack);
    }

    fn file(&self, pack: PackId) -> Result<Arc<dyn File>> {
        let open = || self.medium.open(&pack::file_name(pack), Mode::Read).map_err(|e| unreadable(pack, e));
        self.files.get_or_insert_with(&pack, open)
    }

    /// Empties the caches, so that reads come from the medium again.
    pub fn drop_caches(&self) {
        self.groups.clear();
        self.nodes.clear();
    }
}

impl NodeSource for Blocks {
    fn node(&self, id: BlockId) -> Result<Arc<Node>> {
        self.nodes.get_or_insert_with(&id, || {
            let group = self.group(id.group())?;
            let block = group.block(id.slot()).ok_or_else(|| missing(id))?;
            let node = Some(block).filter(|_| group.kind == GroupKind::Node).and_then(Node::decode);
            let node = node.ok_or_else(|| Error::damaged(format!("block {} is not a map node", id.0)))?;
            Ok(Arc::new(node))
        })
    }
}

fn missing(id: BlockId) -> Error {
    Error::damaged(format!("block {} (group {}) is referred to but stored nowhere", id.0, id.0 / GROUP_BLOCKS))
}

fn unreadable(pack: PackId, e: std::io::Error) -> Error {
    if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::UnexpectedEof) {
        return Error::caused(crate::ErrorKind::Damaged, format!("{pack} is missing or too short"), e);
    }
    Error::io(format!("cannot read {pack}"), e)
}

/// Verifies a frame and takes one group out of it.
fn decode(id: GroupId, place: &GroupPlace, bytes: &[u8]) -> Result<Group> {
    let damaged = |what: &str| Error::damaged(format!("{} is damaged at byte {}: {what}", place.pack, place.offset));
    let (header, mut raw) = decode_frame(bytes).map_err(damaged)?;
    let at = header.groups.iter().position(|g| g.group == id).ok_or_else(|| damaged("the frame has other groups"))?;
    let entry = header.groups[at];
    if entry.slots != place.slots || entry.kind != place.kind {
        return Err(damaged("the frame and the catalogue tell of different blocks"));
    }
    if header.groups.len() > 1 {
        let before: u32 = header.groups[..at].iter().map(GroupEntry::blocks).sum();
        let from = before as usize * BLOCK_SIZE;
        raw = raw[from..from + entry.blocks() as usize * BLOCK_SIZE].to_vec();
    }
    Ok(Group { kind: entry.kind, slots: entry.slots, bytes: raw })
}

/// Verifies and decodes a whole frame: its header and its groups' blocks. The error says what is wrong.
pub(crate) fn decode_frame(bytes: &[u8]) -> std::result::Result<(FrameHeader, Vec<u8>), &'static str> {
    let (header, payload) = FrameHeader::decode(bytes).ok_or("the frame's checksum is wrong")?;
    let raw_bytes = header.raw_bytes();
    let raw = match header.codec {
        Codec::Raw => payload.to_vec(),
        Codec::Zstd => zstd::bulk::decompress(payload, raw_bytes).map_err(|_| "the frame does not decompress")?,
    };
    if raw.len() == raw_bytes { Ok((header, raw)) } else { Err("the frame decodes to another length") }
}
