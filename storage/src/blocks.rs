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
use crate::workers::Workers;
use quick_cache::sync::{Cache, DefaultLifecycle, GuardResult, PlaceholderGuard};
use quick_cache::{DefaultHashBuilder, Weighter};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Groups of a large read that one thread loads at a time.
const PART_GROUPS: usize = 4;
/// Frames of a pack with at most so many bytes between them are read as one piece.
const GAP_BYTES: u64 = 16 << 10;

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

type Guard<'a> =
    PlaceholderGuard<'a, GroupId, Arc<Group>, Weigh, DefaultHashBuilder, DefaultLifecycle<GroupId, Arc<Group>>>;

/// A group that is being loaded: others who want it wait for the guard.
struct Load<'a> {
    id: GroupId,
    place: GroupPlace,
    guard: Guard<'a>,
}

/// See the module.
pub(crate) struct Blocks {
    medium: Arc<dyn Medium>,
    catalogue: Arc<dyn Catalogue>,
    groups: Cache<GroupId, Arc<Group>, Weigh>,
    nodes: Cache<BlockId, Arc<Node>, Weigh>,
    files: Cache<PackId, Arc<dyn File>>,
    loads: AtomicU64,
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
            loads: AtomicU64::new(0),
        }
    }

    /// How often something was loaded into the cache.
    pub fn loads(&self) -> u64 {
        self.loads.load(Ordering::Relaxed)
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

    /// Brings the groups of `runs` (address, blocks) into the cache, in parts that `workers` help with. What they have
    /// begun, and others load anyway, may still be under way at the end: [`Blocks::read`] waits for it. So a failure
    /// shows there, or not at all.
    pub fn prefetch(self: &Arc<Self>, workers: &Workers, runs: &[(BlockId, u64)]) {
        let wanted = self.missing(runs);
        let parts = wanted.len().div_ceil(PART_GROUPS);
        if parts < 2 {
            // A single group is loaded by whoever reads it.
            if wanted.len() > 1 {
                self.load_many(&wanted);
            }
            return;
        }
        let blocks = self.clone();
        let next = AtomicUsize::new(0);
        let load_parts = Arc::new(move || {
            while let Some(part) = wanted.chunks(PART_GROUPS).nth(next.fetch_add(1, Ordering::Relaxed)) {
                blocks.load_many(part);
            }
        });
        for _ in 1..parts.min(workers.count()) {
            let load_parts = load_parts.clone();
            workers.offer(move || load_parts());
        }
        load_parts();
    }

    /// Brings the groups of `runs` (address, blocks) into the cache.
    pub fn read_ahead(&self, runs: &[(BlockId, u64)]) {
        let wanted = self.missing(runs);
        self.load_many(&wanted);
    }

    /// The groups of `runs` that are not in the cache.
    fn missing(&self, runs: &[(BlockId, u64)]) -> Vec<GroupId> {
        let groups = runs.iter().flat_map(|(first, len)| first.group().0..=first.plus(len - 1).group().0);
        let mut wanted: Vec<_> = groups.map(GroupId).filter(|group| !self.groups.contains_key(group)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted
    }

    /// Loads groups, in ascending order, that nobody else is loading. Never waits for another loader, since it holds
    /// back those who wait for its own.
    fn load_many(&self, wanted: &[GroupId]) {
        let mut claimed = Vec::with_capacity(wanted.len());
        for group in wanted {
            if let GuardResult::Guard(guard) = self.groups.get_value_or_guard(group, Some(Duration::ZERO)) {
                claimed.push((*group, guard));
            }
        }
        // Whoever needs what failed here tries again, and finds out.
        if let Err(e) = self.try_load_many(claimed) {
            tracing::debug!("not read ahead: {e}");
        }
    }

    fn try_load_many(&self, claimed: Vec<(GroupId, Guard<'_>)>) -> Result<()> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        let keys: Vec<_> = claimed.iter().map(|(group, _)| group.0.to_be_bytes()).collect();
        let rows = self.catalogue.get_many(Table::Groups, &keys)?;
        let mut loads = Vec::with_capacity(claimed.len());
        for ((id, guard), row) in claimed.into_iter().zip(rows) {
            let place = self.parse_place(id, &row.ok_or_else(|| missing(BlockId::new(id, 0)))?)?;
            loads.push(Load { id, place, guard });
        }
        loads.sort_by_key(|load| (load.place.pack, load.place.offset));
        while let Some(first) = loads.first() {
            let pack = first.place.pack;
            let rest = loads.split_off(loads.partition_point(|load| load.place.pack == pack));
            self.load_from_pack(pack, std::mem::replace(&mut loads, rest))?;
        }
        Ok(())
    }

    /// Loads groups of one pack, in the order of their frames, with one call to the medium.
    fn load_from_pack(&self, pack: PackId, loads: Vec<Load<'_>>) -> Result<()> {
        let mut spans: Vec<Range<u64>> = Vec::new();
        for Load { place, .. } in &loads {
            let end = place.offset + u64::from(place.bytes);
            match spans.last_mut() {
                Some(last) if place.offset <= last.end + GAP_BYTES => last.end = end.max(last.end),
                _ => spans.push(place.offset..end),
            }
        }
        let mut buffers: Vec<Vec<u8>> = spans.iter().map(|span| vec![0; (span.end - span.start) as usize]).collect();
        let mut reads: Vec<_> = buffers.iter_mut().zip(&spans).map(|(b, span)| (&mut b[..], span.start)).collect();
        self.file(pack)?.read_many(&mut reads).map_err(|e| unreadable(pack, e))?;
        let mut span = 0;
        let mut frame: Option<(u64, Frame)> = None;
        for Load { id, place, guard } in loads {
            while place.offset >= spans[span].end {
                span += 1;
            }
            let frame = match &mut frame {
                Some((offset, frame)) if *offset == place.offset => frame,
                other => {
                    let from = (place.offset - spans[span].start) as usize;
                    let bytes = &buffers[span][from..from + place.bytes as usize];
                    let frame = Frame::decode(&place, bytes)?;
                    self.keep_others(&frame, &place);
                    &mut other.insert((place.offset, frame)).1
                }
            };
            // Refused only if it is larger than a part of the cache: then it is loaded again by who reads it.
            drop(guard.insert(Arc::new(frame.take(id, &place)?)));
        }
        Ok(())
    }

    fn group(&self, id: GroupId) -> Result<Arc<Group>> {
        self.groups.get_or_insert_with(&id, || {
            self.loads.fetch_add(1, Ordering::Relaxed);
            let place = self.place(id)?;
            let load = |place: &GroupPlace| {
                let mut frame = self.load_frame(place)?;
                self.keep_others(&frame, place);
                frame.take(id, place)
            };
            let loaded = load(&place).or_else(|e| {
                // Garbage collection may have moved it since we asked where it is.
                let now = self.place(id)?;
                if now == place { Err(e) } else { load(&now) }
            });
            Ok(Arc::new(loaded?))
        })
    }

    /// Puts the groups of a frame that nobody has or is loading into the cache: decoding is what they cost.
    fn keep_others(&self, frame: &Frame, place: &GroupPlace) {
        let groups = &frame.header.groups;
        if groups.len() == 1 {
            return;
        }
        let others: Vec<_> = groups.iter().map(|g| g.group).filter(|group| !self.groups.contains_key(group)).collect();
        let keys: Vec<_> = others.iter().map(|group| group.0.to_be_bytes()).collect();
        let rows = self.catalogue.get_many(Table::Groups, &keys).unwrap_or_default();
        for (id, row) in others.into_iter().zip(rows) {
            // A frame may hold a group that has been moved or healed since: only what is still here counts.
            let now = row.and_then(|row| self.parse_place(id, &row).ok());
            let Some(now) = now.filter(|now| (now.pack, now.offset) == (place.pack, place.offset)) else { continue };
            if let GuardResult::Guard(guard) = self.groups.get_value_or_guard(&id, Some(Duration::ZERO))
                && let Ok(group) = frame.part(id, &now)
            {
                drop(guard.insert(Arc::new(group)));
            }
        }
    }

    fn load_frame(&self, place: &GroupPlace) -> Result<Frame> {
        Frame::decode(place, &self.stored_frame(place)?)
    }

    /// A whole frame as it is stored, not verified.
    pub fn stored_frame(&self, place: &GroupPlace) -> Result<Vec<u8>> {
        let mut bytes = vec![0; place.bytes as usize];
        self.file(place.pack)?.read_at(&mut bytes, place.offset).map_err(|e| unreadable(place.pack, e))?;
        Ok(bytes)
    }

    /// A block, if the cache has it.
    pub fn cached_block(&self, id: BlockId) -> Option<Vec<u8>> {
        self.groups.peek(&id.group())?.block(id.slot()).map(<[_]>::to_vec)
    }

    /// A group's blocks from the medium, whatever the cache has.
    pub fn read_group_uncached(&self, id: GroupId, place: &GroupPlace) -> Result<Vec<u8>> {
        Ok(self.load_frame(place)?.take(id, place)?.bytes)
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
            packs.push((PackId(rows::parse_id(key)?), PackFacts::from_row(row)?));
            Ok(())
        })?;
        Ok(packs)
    }

    /// What the catalogue knows of a pack.
    pub fn facts(&self, pack: PackId) -> Result<PackFacts> {
        let value = self.catalogue.get(Table::Packs, &pack.0.to_be_bytes())?;
        let value = value.ok_or_else(|| Error::damaged(format!("{pack} is referred to but not in the catalogue")))?;
        PackFacts::from_row(&value)
    }

    /// A pack's table of contents, and the digests of all its blocks in that order; verifies header, footer and all
    /// sections.
    pub fn contents(&self, store: StoreUuid, pack: PackId, facts: &PackFacts) -> Result<(PackContents, Vec<Digest>)> {
        let damaged = |what: &str| Error::damaged(format!("{pack}: {what}"));
        let file = self.file(pack)?;
        let read = |at: u64, buf: &mut [u8]| file.read_at(buf, at).map_err(|e| unreadable(pack, e));
        let mut head = [0; PackHeader::BYTES as usize];
        read(0, &mut head)?;
        if PackHeader::decode(&head)?.is_none_or(|head| (head.store, head.pack) != (store, pack)) {
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

    /// Decoded groups in the cache.
    #[cfg(test)]
    pub fn cached_groups(&self) -> usize {
        self.groups.len()
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

/// A frame that was decoded, to take groups out of.
struct Frame {
    header: FrameHeader,
    raw: Vec<u8>,
}

impl Frame {
    fn decode(place: &GroupPlace, bytes: &[u8]) -> Result<Self> {
        let (header, raw) = decode_frame(bytes).map_err(|what| damaged_frame(place, what))?;
        Ok(Self { header, raw })
    }

    /// A copy of one group, which `place` tells of.
    fn part(&self, id: GroupId, place: &GroupPlace) -> Result<Group> {
        let (entry, bytes) = self.find(id, place)?;
        Ok(Group { kind: entry.kind, slots: entry.slots, bytes: self.raw[bytes].to_vec() })
    }

    /// The same, without a copy where the frame has only this group.
    fn take(&mut self, id: GroupId, place: &GroupPlace) -> Result<Group> {
        if self.header.groups.len() > 1 {
            return self.part(id, place);
        }
        let (entry, _) = self.find(id, place)?;
        Ok(Group { kind: entry.kind, slots: entry.slots, bytes: std::mem::take(&mut self.raw) })
    }

    /// A group's entry, and where its blocks are in the decoded frame.
    fn find(&self, id: GroupId, place: &GroupPlace) -> Result<(GroupEntry, Range<usize>)> {
        let groups = &self.header.groups;
        let at = groups.iter().position(|g| g.group == id);
        let at = at.ok_or_else(|| damaged_frame(place, "the frame has other groups"))?;
        let entry = groups[at];
        if entry.slots != place.slots || entry.kind != place.kind {
            return Err(damaged_frame(place, "the frame and the catalogue tell of different blocks"));
        }
        let before: u32 = groups[..at].iter().map(GroupEntry::blocks).sum();
        let from = before as usize * BLOCK_SIZE;
        Ok((entry, from..from + entry.blocks() as usize * BLOCK_SIZE))
    }
}

fn damaged_frame(place: &GroupPlace, what: &str) -> Error {
    Error::damaged(format!("{} is damaged at byte {}: {what}", place.pack, place.offset))
}

thread_local! {
    /// Making a decoder costs as much as decoding a few blocks.
    static DECODER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decompresses to at most `capacity` bytes.
fn decompress(payload: &[u8], capacity: usize) -> std::io::Result<Vec<u8>> {
    DECODER.with_borrow_mut(|decoder| match decoder {
        Some(decoder) => decoder.decompress(payload, capacity),
        none => none.insert(zstd::bulk::Decompressor::new()?).decompress(payload, capacity),
    })
}

/// Verifies and decodes a whole frame: its header and its groups' blocks. The error says what is wrong.
pub(crate) fn decode_frame(bytes: &[u8]) -> std::result::Result<(FrameHeader, Vec<u8>), &'static str> {
    let (header, payload) = FrameHeader::decode(bytes).ok_or("the frame's checksum is wrong")?;
    let raw_bytes = header.raw_bytes();
    let raw = match header.codec {
        Codec::Raw => payload.to_vec(),
        Codec::Zstd => decompress(payload, raw_bytes).map_err(|_| "the frame does not decompress")?,
    };
    if raw.len() == raw_bytes { Ok((header, raw)) } else { Err("the frame decodes to another length") }
}
