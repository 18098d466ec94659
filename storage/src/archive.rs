//! States as one stream, for moving them to another store: each block once, compressed as it is stored here, and maps.
//!
//! `docs/format.md` has the bytes. A frame goes into the stream as it lies in its pack if all of its blocks are wanted;
//! what is wanted of other frames is compressed again, so that no block goes along that the states do not have. Blocks are
//! numbered in the order of the stream; a map says which numbers stand where. Everything is verified twice: each record by
//! a checksum, each block by its digest, and the whole by a digest at its end.

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, BlockId, GroupId, Source};
use crate::blocks::{Blocks, decode_frame};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Codec, FrameHeader, MAX_DISK_BLOCKS, Node, NodeRef};
use crate::inner::Inner;
use crate::map::{self, NodeSource};
use crate::pack::{Digest, GroupPlace, digest};
use crate::store::Store;
use roaring::RoaringTreemap;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};

/// What an archive begins with.
pub const ARCHIVE_MAGIC: &[u8; 8] = b"MIOSAARC";
const VERSION: u32 = 1;
const HEADER: usize = 64;
/// Kind, length, checksum, nothing.
const RECORD: usize = 16;
/// Most bytes of a record: a frame of 16 MiB that did not get smaller, with its digests.
const MAX_RECORD: usize = 17 << 20;
/// Most blocks of a frame.
const MAX_FRAME_BLOCKS: usize = FrameHeader::GROUPS_MAX * 16;
/// Blocks that are compressed together where a frame does not go as it is.
const REPACKED: usize = 16;
/// Bytes of a piece of a map.
const RUN: usize = 20;
/// Pieces of a map in a record.
const RUNS: usize = 32 << 10;
/// Most pieces of all maps of an archive; they are in memory while it is read.
const MAX_RUNS: usize = 16 << 20;
/// Most states of an archive, and bytes of what the program says about each.
const MAX_STATES: usize = 4096;
/// Bytes before a frame's digests.
const FRAME_HEAD: usize = 16;

/// A state in an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveState {
    /// What it is called.
    pub name: String,
    /// Size of the disk; a multiple of 4096.
    pub size_bytes: u64,
    /// What the embedding program says about it.
    pub note: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    states: Vec<ArchiveState>,
    /// Different blocks.
    blocks: u64,
}

/// What an archive took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ArchiveReport {
    /// States.
    pub states: u64,
    /// Different blocks of data, in bytes.
    pub unique_bytes: u64,
    /// All that was written.
    pub archive_bytes: u64,
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("the archive is damaged or was cut off: {what}"))
}

// ---- writing

impl Store {
    /// Writes snapshots as an archive. Seals first, so that all of them is in packs. They must stay until it is done.
    pub fn write_archive(&self, states: &[(Source, ArchiveState)], to: &mut dyn Write) -> Result<ArchiveReport> {
        let inner = self.inner();
        let roots = sealed_roots(self, states)?;
        let mut seen = (RoaringTreemap::new(), RoaringTreemap::new());
        for (root, _, _) in &roots {
            mark_data(&inner.blocks, *root, &mut seen.0, &mut seen.1)?;
        }
        let ids = seen.1;
        let mut out = Output { to, hasher: blake3::Hasher::new(), bytes: 0 };
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(ARCHIVE_MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let crc = crc32c::crc32c(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
        out.write(&header)?;
        let head = Head { states: states.iter().map(|(_, state)| state.clone()).collect(), blocks: ids.len() };
        let head = postcard::to_stdvec(&head).map_err(|e| Error::new(ErrorKind::InvalidInput, e.to_string()))?;
        out.record(*b"HEAD", &[&head])?;
        for (i, (root, level, blocks)) in roots.iter().enumerate() {
            write_map(&inner.blocks, *root, *level, *blocks, i as u32, &ids, &mut out)?;
        }
        Frames { inner, ids: &ids, next: 0, repack: Repack::default(), frame: None, out: &mut out }.write()?;
        let mut end = out.hasher.finalize().as_bytes().to_vec();
        end.extend_from_slice(&ids.len().to_le_bytes());
        out.record(*b"END ", &[&end])?;
        out.to.flush().map_err(|e| Error::io("cannot write the archive", e))?;
        let states = states.len() as u64;
        Ok(ArchiveReport { states, unique_bytes: ids.len() * BLOCK_BYTES, archive_bytes: out.bytes })
    }
}

/// Root, its level and the size in blocks of snapshots that have nothing in the log.
fn sealed_roots(store: &Store, states: &[(Source, ArchiveState)]) -> Result<Vec<(NodeRef, u32, u64)>> {
    store.seal()?;
    let roots = states.iter().map(|(source, state)| {
        let device = store.inner().registry.lock().device(*source)?.clone();
        let now = device.state();
        if !matches!(source, Source::Snapshot(_)) || !now.overlay.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{source} cannot be archived: take a snapshot of it"),
            ));
        }
        if state.size_bytes != device.size_blocks * BLOCK_BYTES {
            return Err(Error::new(ErrorKind::InvalidInput, format!("{source} has another size")));
        }
        Ok((now.root, device.level(), device.size_blocks))
    });
    roots.collect()
}

/// Adds the addresses of all data below `at`; nodes that are in `nodes` have been walked.
fn mark_data(blocks: &Blocks, at: NodeRef, nodes: &mut RoaringTreemap, ids: &mut RoaringTreemap) -> Result<()> {
    if at.node.is_none() || !nodes.insert(at.node.0) {
        return Ok(());
    }
    match &*blocks.node(at.node)? {
        Node::Leaf(extents) => {
            for extent in extents {
                ids.insert_range(extent.block.0..extent.block.0 + u64::from(extent.len));
            }
            Ok(())
        }
        Node::Inner { children, .. } => children.iter().try_for_each(|child| mark_data(blocks, *child, nodes, ids)),
    }
}

struct Output<'a> {
    to: &'a mut dyn Write,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.to.write_all(bytes).map_err(|e| Error::io("cannot write the archive", e))
    }

    fn record(&mut self, kind: [u8; 4], parts: &[&[u8]]) -> Result<()> {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        if len > MAX_RECORD {
            return Err(Error::new(ErrorKind::InvalidInput, "what is said about the states is too long"));
        }
        let mut head = [0; RECORD];
        head[..4].copy_from_slice(&kind);
        head[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        let crc = parts.iter().fold(crc32c::crc32c(&head[..8]), |crc, part| crc32c::crc32c_append(crc, part));
        head[8..12].copy_from_slice(&crc.to_le_bytes());
        self.write(&head)?;
        parts.iter().try_for_each(|part| self.write(part))
    }
}

fn write_map(
    blocks: &Blocks,
    root: NodeRef,
    level: u32,
    size: u64,
    state: u32,
    ids: &RoaringTreemap,
    out: &mut Output<'_>,
) -> Result<()> {
    let mut runs: Vec<u8> = Vec::with_capacity(RUNS * RUN);
    map::pieces::<Error>(blocks, root, level, 0, size, &mut |start, len, block| {
        if block.is_none() {
            return Ok(());
        }
        let number = ids.rank(block.0) - 1;
        runs.extend_from_slice(&start.to_le_bytes());
        runs.extend_from_slice(&(len as u32).to_le_bytes());
        runs.extend_from_slice(&number.to_le_bytes());
        if runs.len() >= RUNS * RUN {
            out.record(*b"RUNS", &[&state.to_le_bytes(), &runs])?;
            runs.clear();
        }
        Ok(())
    })?;
    if runs.is_empty() { Ok(()) } else { out.record(*b"RUNS", &[&state.to_le_bytes(), &runs]) }
}

/// Blocks that are to be compressed again.
#[derive(Default)]
struct Repack {
    bytes: Vec<u8>,
    digests: Vec<Digest>,
}

/// A frame as it was read.
struct Stored {
    pack: crate::block::PackId,
    offset: u64,
    header: FrameHeader,
    raw: Vec<u8>,
    /// As it is stored, header included.
    bytes: Vec<u8>,
}

struct Frames<'a, 'b> {
    inner: &'a Inner,
    ids: &'a RoaringTreemap,
    /// Number of the next block of the stream.
    next: u64,
    repack: Repack,
    frame: Option<Stored>,
    out: &'a mut Output<'b>,
}

impl Frames<'_, '_> {
    fn write(mut self) -> Result<()> {
        let mut at = 0;
        for first in self.ids {
            if first < at {
                continue;
            }
            let group = BlockId(first).group();
            self.load(group)?;
            at = match &self.frame {
                Some(frame) => match self.whole(frame, group) {
                    Some(end) => {
                        self.pass_on()?;
                        end
                    }
                    None => {
                        self.take(group)?;
                        BlockId::new(GroupId(group.0 + 1), 0).0
                    }
                },
                None => return Err(Error::damaged(format!("group {} could not be read", group.0))),
            };
        }
        self.flush()
    }

    /// Reads the frame that has a group.
    fn load(&mut self, group: GroupId) -> Result<()> {
        let mut place = self.inner.blocks.place(group)?;
        if self.frame.as_ref().is_some_and(|f| (f.pack, f.offset) == (place.pack, place.offset)) {
            return Ok(());
        }
        let mut read = self.read(&place);
        if read.is_err() {
            // Garbage collection may have moved it since we asked where it is.
            let now = self.inner.blocks.place(group)?;
            if now != place {
                place = now;
                read = self.read(&place);
            }
        }
        self.frame = Some(read?);
        Ok(())
    }

    fn read(&self, place: &GroupPlace) -> Result<Stored> {
        let bytes = self.inner.blocks.stored_frame(place)?;
        let (header, raw) = decode_frame(&bytes)
            .map_err(|what| Error::damaged(format!("{} is damaged at byte {}: {what}", place.pack, place.offset)))?;
        Ok(Stored { pack: place.pack, offset: place.offset, header, raw, bytes })
    }

    /// If the frame begins with this group, and all of it is wanted and nothing in between: the address behind it.
    fn whole(&self, frame: &Stored, group: GroupId) -> Option<u64> {
        let groups = &frame.header.groups;
        let last = groups.last()?;
        let end = BlockId::new(GroupId(last.group.0 + 1), 0).0;
        let ascending = groups.first()?.group == group && groups.windows(2).all(|w| w[0].group < w[1].group);
        let all = groups.iter().all(|e| e.slots().all(|slot| self.ids.contains(BlockId::new(e.group, slot).0)));
        let blocks: u64 = groups.iter().map(|e| u64::from(e.blocks())).sum();
        let from = BlockId::new(group, 0).0;
        (ascending && all && self.ids.range_cardinality(from..end) == blocks).then_some(end)
    }

    fn pass_on(&mut self) -> Result<()> {
        self.flush()?;
        let Some(frame) = &self.frame else { return Ok(()) };
        let digests: Vec<Digest> = frame.raw.chunks(BLOCK_SIZE).map(digest).collect();
        let payload = &frame.bytes[frame.header.bytes()..];
        write_frame(self.out, self.next, frame.header.codec, &digests, payload)?;
        self.next += digests.len() as u64;
        Ok(())
    }

    /// Takes what is wanted of one group out of the frame.
    fn take(&mut self, group: GroupId) -> Result<()> {
        let Some(frame) = &self.frame else { return Ok(()) };
        let mut at = 0;
        for entry in &frame.header.groups {
            for slot in entry.slots() {
                let block = &frame.raw[at..at + BLOCK_SIZE];
                at += BLOCK_SIZE;
                if entry.group == group && self.ids.contains(BlockId::new(group, slot).0) {
                    self.repack.bytes.extend_from_slice(block);
                    self.repack.digests.push(digest(block));
                }
            }
        }
        if self.repack.digests.len() >= REPACKED { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let Repack { bytes, digests } = std::mem::take(&mut self.repack);
        if digests.is_empty() {
            return Ok(());
        }
        let compressed = zstd::bulk::compress(&bytes, self.inner.options.level)
            .map_err(|e| Error::io("cannot compress a frame", e))?;
        let (codec, payload) =
            if compressed.len() < bytes.len() { (Codec::Zstd, &compressed) } else { (Codec::Raw, &bytes) };
        write_frame(self.out, self.next, codec, &digests, payload)?;
        self.next += digests.len() as u64;
        Ok(())
    }
}

fn write_frame(out: &mut Output<'_>, first: u64, codec: Codec, digests: &[Digest], payload: &[u8]) -> Result<()> {
    let mut head = [0; FRAME_HEAD];
    head[..8].copy_from_slice(&first.to_le_bytes());
    head[8..12].copy_from_slice(&(digests.len() as u32).to_le_bytes());
    head[12] = codec as u8;
    out.record(*b"FRAM", &[&head, digests.as_flattened(), payload])
}

// ---- reading

/// A piece of a state's map.
#[derive(Debug, Clone, Copy)]
struct Run {
    number: u64,
    start: u64,
    len: u32,
    state: u32,
}

/// An archive that is being read.
pub struct ArchiveReader<R> {
    from: R,
    hasher: blake3::Hasher,
    head: Head,
}

impl<R: Read> ArchiveReader<R> {
    /// Reads what the archive says about itself. `InvalidInput`: it is none, or of a version that is not known here.
    pub fn open(mut from: R) -> Result<Self> {
        let mut header = [0; HEADER];
        read_exact(&mut from, &mut header)?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if &header[..8] != ARCHIVE_MAGIC {
            return Err(Error::new(ErrorKind::InvalidInput, "this is not an archive of miosa"));
        }
        if word(60) != crc32c::crc32c(&header[..60]) {
            return Err(bad("its header fails its checksum"));
        }
        if word(8) != VERSION {
            let what = format!("the archive has version {}, and this program reads version {VERSION}", word(8));
            return Err(Error::new(ErrorKind::InvalidInput, what));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&header);
        let mut reader = Self { from, hasher, head: Head { states: Vec::new(), blocks: 0 } };
        let (kind, head) = reader.record()?;
        if &kind != b"HEAD" {
            return Err(bad("it does not say what it has"));
        }
        reader.head = postcard::from_bytes(&head).map_err(|e| bad(format!("what it says of itself: {e}")))?;
        let most = MAX_DISK_BLOCKS * BLOCK_BYTES;
        let sizes = reader.head.states.iter().map(|s| s.size_bytes);
        let is_size = |size: u64| size > 0 && size <= most && size.is_multiple_of(BLOCK_BYTES);
        if reader.head.states.is_empty() || reader.head.states.len() > MAX_STATES || !sizes.clone().all(is_size) {
            return Err(bad("the number or size of its states"));
        }
        Ok(reader)
    }

    /// The states it has.
    pub fn states(&self) -> &[ArchiveState] {
        &self.head.states
    }

    /// Writes the states to `disks`, new ones of their sizes, one a state. After an error they hold a part of it.
    pub fn fill(mut self, disks: &[Disk]) -> Result<()> {
        if disks.len() != self.head.states.len()
            || disks.iter().zip(&self.head.states).any(|(disk, state)| disk.size_bytes() != state.size_bytes)
        {
            return Err(Error::new(ErrorKind::InvalidInput, "an archive needs one disk of its size for each state"));
        }
        let mut runs: Vec<Run> = Vec::new();
        let mut filling: Option<Filling> = None;
        let mut last = None;
        loop {
            let so_far = *self.hasher.clone().finalize().as_bytes();
            let (kind, bytes) = self.record()?;
            match &kind {
                b"RUNS" if filling.is_none() => self.take_runs(&bytes, &mut runs, &mut last)?,
                b"FRAM" => {
                    let filling = filling.get_or_insert_with(|| Filling::new(std::mem::take(&mut runs)));
                    filling.frame(&bytes, self.head.blocks, disks)?;
                }
                b"END " => {
                    let told = bytes.split_first_chunk::<32>().filter(|(told, _)| **told == so_far);
                    let next = filling.map_or(0, |f| f.next);
                    if told.is_none_or(|(_, blocks)| blocks != next.to_le_bytes()) || next != self.head.blocks {
                        return Err(bad("it is not as it was written"));
                    }
                    let mut more = [0];
                    return match self.from.read(&mut more) {
                        Ok(0) => Ok(()),
                        Ok(_) => Err(bad("there is something behind its end")),
                        Err(e) => Err(cannot_read(e)),
                    };
                }
                _ => return Err(bad("a part of it is not known here")),
            }
        }
    }

    fn take_runs(&self, bytes: &[u8], runs: &mut Vec<Run>, last: &mut Option<(u32, u64)>) -> Result<()> {
        let Some((state, bytes)) = bytes.split_first_chunk::<4>() else { return Err(bad("a map")) };
        let state = u32::from_le_bytes(*state);
        let blocks = self.head.states.get(state as usize).map(|s| s.size_bytes / BLOCK_BYTES);
        let Some(blocks) = blocks.filter(|_| bytes.len().is_multiple_of(RUN)) else { return Err(bad("a map")) };
        for run in bytes.as_chunks::<RUN>().0 {
            let (start, number) = (u64_at(run, 0), u64_at(run, 12));
            let len = u32::from_le_bytes([run[8], run[9], run[10], run[11]]);
            let end = start.checked_add(u64::from(len)).filter(|end| *end <= blocks);
            let known = number.checked_add(u64::from(len)).is_some_and(|end| end <= self.head.blocks);
            // In order, without overlap: so a state is written once at most.
            let (Some(end), true, true) = (end, known && len > 0, last.is_none_or(|last| last <= (state, start)))
            else {
                return Err(bad("a piece of a map does not fit"));
            };
            *last = Some((state, end));
            if runs.len() >= MAX_RUNS {
                let what = format!("the archive's maps have more than {MAX_RUNS} pieces: it is too fragmented");
                return Err(Error::new(ErrorKind::InvalidInput, what));
            }
            runs.push(Run { number, start, len, state });
        }
        Ok(())
    }

    fn record(&mut self) -> Result<([u8; 4], Vec<u8>)> {
        let mut head = [0; RECORD];
        read_exact(&mut self.from, &mut head)?;
        let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if len > MAX_RECORD || head[12..] != [0; 4] {
            return Err(bad("a record's head"));
        }
        let mut bytes = vec![0; len];
        read_exact(&mut self.from, &mut bytes)?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..8]), &bytes);
        if crc.to_le_bytes() != head[8..12] {
            return Err(bad("a record fails its checksum"));
        }
        self.hasher.update(&head).update(&bytes);
        Ok(([head[0], head[1], head[2], head[3]], bytes))
    }
}

/// Puts blocks where the maps want them, as they come.
struct Filling {
    /// By number.
    runs: Vec<Run>,
    /// Runs before this one have been begun.
    begun: usize,
    /// Of those, the ones that want more.
    open: Vec<Run>,
    next: u64,
}

impl Filling {
    fn new(mut runs: Vec<Run>) -> Self {
        runs.sort_unstable_by_key(|run| run.number);
        Self { runs, begun: 0, open: Vec::new(), next: 0 }
    }

    fn frame(&mut self, bytes: &[u8], blocks: u64, disks: &[Disk]) -> Result<()> {
        let Some((head, rest)) = bytes.split_first_chunk::<FRAME_HEAD>() else { return Err(bad("a frame")) };
        let (first, count) = (u64_at(head, 0), u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize);
        let fits =
            first == self.next && count > 0 && count <= MAX_FRAME_BLOCKS && count as u64 <= blocks - first.min(blocks);
        let Some((digests, payload)) = rest.split_at_checked(count * size_of::<Digest>()).filter(|_| fits) else {
            return Err(bad("a frame does not fit"));
        };
        let raw = match head[12] {
            0 => payload.to_vec(),
            1 => zstd::bulk::decompress(payload, count * BLOCK_SIZE).map_err(|_| bad("a frame does not decompress"))?,
            _ => return Err(bad("a frame's encoding is not known here")),
        };
        if raw.len() != count * BLOCK_SIZE {
            return Err(bad("a frame decodes to another length"));
        }
        if raw.chunks(BLOCK_SIZE).zip(digests.as_chunks::<32>().0).any(|(block, told)| digest(block) != *told) {
            return Err(bad("a block does not have the digest that is told"));
        }
        let end = first + count as u64;
        let upto = self.begun + self.runs[self.begun..].partition_point(|run| run.number < end);
        self.open.extend_from_slice(&self.runs[self.begun..upto]);
        self.begun = upto;
        for run in &self.open {
            let (from, upto) = (run.number.max(first), (run.number + u64::from(run.len)).min(end));
            let Some(disk) = disks.get(run.state as usize).filter(|_| from < upto) else { continue };
            let content = &raw[(from - first) as usize * BLOCK_SIZE..(upto - first) as usize * BLOCK_SIZE];
            disk.write((run.start + (from - run.number)) * BLOCK_BYTES, content)?;
        }
        self.open.retain(|run| run.number + u64::from(run.len) > end);
        self.next = end;
        Ok(())
    }
}

fn read_exact(from: &mut impl Read, bytes: &mut [u8]) -> Result<()> {
    from.read_exact(bytes).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => bad("its end is missing"),
        _ => cannot_read(e),
    })
}

fn cannot_read(error: std::io::Error) -> Error {
    Error::io("cannot read the archive", error)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}
