//! Every byte the store writes outside of RocksDB: `docs/format.md` in code. Integers are little-endian.
//!
//! Decoding verifies a checksum first, then a magic number, then bounds, and returns `None` or an error: nothing here
//! panics on what a disk can hold.

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, BlockId, GroupId, LogPos, PackId};
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The version in every file's header. A store of another version is refused, never guessed at.
pub const VERSION: u32 = 1;

const STORE_MAGIC: [u8; 8] = *b"MIOSASTO";
const CHECKPOINT_MAGIC: [u8; 8] = *b"MIOSACHK";
const SEGMENT_MAGIC: [u8; 8] = *b"MIOSALOG";
const PACK_MAGIC: [u8; 8] = *b"MIOSAPAK";
const FOOTER_MAGIC: [u8; 8] = *b"MIOSAEND";
const RECORD_MAGIC: u32 = 0x4752_4f4c; // "LORG"
const FRAME_MAGIC: u32 = 0x4d41_5246; // "FRAM"

/// Random at the making of a store; in every file of it, so that a file of another store is not taken for one of ours.
pub type StoreUuid = [u8; 16];

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// A fixed 64-byte header or footer: 8 bytes of magic, then `body`, then at 60 the crc32c of bytes 0..60.
fn sealed_64(magic: [u8; 8], body: &[&[u8]]) -> [u8; 64] {
    let mut out = [0; 64];
    out[..8].copy_from_slice(&magic);
    let mut at = 8;
    for part in body {
        out[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    debug_assert!(at <= 60);
    let crc = crc32c::crc32c(&out[..60]);
    out[60..].copy_from_slice(&crc.to_le_bytes());
    out
}

fn open_64(magic: [u8; 8], bytes: &[u8; 64]) -> Option<&[u8; 64]> {
    (crc32c::crc32c(&bytes[..60]) == u32_at(bytes, 60) && bytes[..8] == magic).then_some(bytes)
}

fn refuse_other_version(what: &str, version: u32) -> Result<()> {
    if version == VERSION {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::UnsupportedVersion,
        format!(
            "{what} has format version {version}, this program reads version {VERSION}: use the miosa that wrote it"
        ),
    ))
}

/// The file `STORE`: what makes a directory a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreHeader {
    /// See [`StoreUuid`].
    pub uuid: StoreUuid,
}

impl StoreHeader {
    pub fn encode(&self) -> [u8; 64] {
        sealed_64(STORE_MAGIC, &[&VERSION.to_le_bytes(), &self.uuid])
    }

    pub fn decode(bytes: &[u8; 64]) -> Result<Self> {
        let bytes = open_64(STORE_MAGIC, bytes).ok_or_else(|| {
            Error::damaged("the file STORE is damaged or not a miosa store's: restore it from a backup")
        })?;
        refuse_other_version("the store", u32_at(bytes, 8))?;
        Ok(Self { uuid: std::array::from_fn(|i| bytes[12 + i]) })
    }
}

/// The file `CHECKPOINT`: which checkpoint the catalogue has had at least, so that an older catalogue is known for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointNote {
    pub store: StoreUuid,
    /// Number of the next pack, as the checkpoint has it: it grows with each.
    pub next_pack: u64,
}

impl CheckpointNote {
    pub fn encode(&self) -> [u8; 64] {
        sealed_64(CHECKPOINT_MAGIC, &[&VERSION.to_le_bytes(), &self.store, &self.next_pack.to_le_bytes()])
    }

    /// None if there is no such note, as a crash may leave behind.
    pub fn decode(bytes: &[u8; 64]) -> Option<Self> {
        let bytes = open_64(CHECKPOINT_MAGIC, bytes).filter(|bytes| u32_at(*bytes, 8) == VERSION)?;
        Some(Self { store: std::array::from_fn(|i| bytes[12 + i]), next_pack: u64_at(bytes, 28) })
    }
}

/// The first 64 bytes of a log segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    pub store: StoreUuid,
    /// Counts up by one; also the file's name.
    pub number: u64,
    /// Position of the header's own first byte.
    pub base: LogPos,
}

impl SegmentHeader {
    pub const BYTES: u64 = 64;

    pub fn encode(&self) -> [u8; 64] {
        let parts: [&[u8]; 4] =
            [&VERSION.to_le_bytes(), &self.store, &self.number.to_le_bytes(), &self.base.0.to_le_bytes()];
        sealed_64(SEGMENT_MAGIC, &parts)
    }

    /// `Ok(None)`: no such header, as a crash may leave behind.
    pub fn decode(bytes: &[u8; 64]) -> Result<Option<Self>> {
        let Some(bytes) = open_64(SEGMENT_MAGIC, bytes) else { return Ok(None) };
        refuse_other_version("a log segment", u32_at(bytes, 8))?;
        Ok(Some(Self {
            store: std::array::from_fn(|i| bytes[12 + i]),
            number: u64_at(bytes, 28),
            base: LogPos(u64_at(bytes, 36)),
        }))
    }
}

/// What a log record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordKind {
    /// `count` blocks of data for `disk` from `block` on.
    Write = 1,
    /// `count` blocks of `disk` from `block` on read as zeroes.
    Zero = 2,
    /// A transaction: the payload is a postcard-encoded list of operations.
    Transaction = 3,
}

/// The head of a log record. After it come, for `Write`, one crc32c per block and then the blocks; for `Transaction`
/// the crc32c of the payload and then the payload; for `Zero` nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    pub kind: RecordKind,
    /// Where this record begins: a record of an earlier life of the same sectors does not match.
    pub pos: LogPos,
    /// Up to where the log was durable when this record was made. A reader that finds damage *before* this position
    /// knows that it is damage, not an unfinished write.
    pub durable: LogPos,
    pub disk: u64,
    pub block: u64,
    pub count: u64,
    /// Bytes of payload.
    pub payload: u32,
}

impl RecordHeader {
    pub const BYTES: usize = 64;
    /// No record carries more payload than this.
    pub const PAYLOAD_MAX: usize = 16 << 20;

    /// The first four bytes of every record.
    pub fn magic() -> [u8; 4] {
        RECORD_MAGIC.to_le_bytes()
    }

    /// Checksums in the table behind the header.
    pub fn checksums(&self) -> usize {
        match self.kind {
            RecordKind::Write => self.payload as usize / BLOCK_SIZE,
            RecordKind::Transaction => 1,
            RecordKind::Zero => 0,
        }
    }

    /// Bytes from the record's start to its payload.
    pub fn payload_offset(&self) -> usize {
        Self::BYTES + 4 * self.checksums()
    }

    /// Bytes of the whole record.
    pub fn record_bytes(&self) -> u64 {
        (self.payload_offset() + self.payload as usize) as u64
    }

    /// Appends header and checksum table; the payload follows by the caller. The header's own checksum covers both, and
    /// the store: a guest, which does not know that, cannot write data that looks like a record.
    pub fn encode(&self, store: &StoreUuid, checksums: &[u32], out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&RECORD_MAGIC.to_le_bytes());
        out.extend_from_slice(&[self.kind as u8, 0, 0, 0]);
        for field in [self.pos.0, self.durable.0, self.disk, self.block, self.count] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.payload.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        let crc_at = out.len();
        out.extend_from_slice(&[0; 4]);
        debug_assert_eq!(out.len() - start, Self::BYTES);
        for crc in checksums {
            out.extend_from_slice(&crc.to_le_bytes());
        }
        let crc = Self::checksum(store, &out[start..]);
        out[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    }

    fn checksum(store: &StoreUuid, header_and_table: &[u8]) -> u32 {
        let crc = crc32c::crc32c_append(crc32c::crc32c(store), &header_and_table[..Self::BYTES - 4]);
        crc32c::crc32c_append(crc, &header_and_table[Self::BYTES..])
    }

    /// Decodes the record that starts at `bytes[0]`; returns it with its checksum table. `None`: there is no whole, intact
    /// header and table of this store here. Whether it is at the right position is for the caller to see.
    pub fn decode(store: &StoreUuid, bytes: &[u8]) -> Option<(Self, Arc<[u32]>)> {
        if bytes.len() < Self::BYTES || u32_at(bytes, 0) != RECORD_MAGIC {
            return None;
        }
        let kind = match bytes[4] {
            1 => RecordKind::Write,
            2 => RecordKind::Zero,
            3 => RecordKind::Transaction,
            _ => return None,
        };
        let header = Self {
            kind,
            pos: LogPos(u64_at(bytes, 8)),
            durable: LogPos(u64_at(bytes, 16)),
            disk: u64_at(bytes, 24),
            block: u64_at(bytes, 32),
            count: u64_at(bytes, 40),
            payload: u32_at(bytes, 48),
        };
        let payload = header.payload as usize;
        let sane = match kind {
            RecordKind::Write => payload > 0 && header.count.checked_mul(BLOCK_BYTES) == Some(payload as u64),
            RecordKind::Zero => payload == 0 && header.count > 0,
            RecordKind::Transaction => true,
        };
        let in_range = header.block.checked_add(header.count).is_some_and(|end| end <= MAX_DISK_BLOCKS);
        if payload > Self::PAYLOAD_MAX || !sane || !in_range {
            return None;
        }
        let table = bytes.get(..header.payload_offset())?;
        if Self::checksum(store, table) != u32_at(bytes, Self::BYTES - 4) {
            return None;
        }
        let checksums = table[Self::BYTES..].as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c)).collect();
        Some((header, checksums))
    }
}

/// No disk has more blocks than this (64 TiB).
pub const MAX_DISK_BLOCKS: u64 = 64 << 28;

/// The first 64 bytes of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackHeader {
    pub store: StoreUuid,
    pub pack: PackId,
    pub origin: Origin,
}

/// How, when and for whom a pack was written; all zero in packs from before this was noted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// zstd's level.
    pub level: i8,
    /// Milliseconds since 1970.
    pub made_unix_ms: u64,
    /// Of all its blocks. Behind the others in a row: rows from before it was noted end without it.
    #[serde(skip)]
    pub domain: Domain,
}

impl PackHeader {
    pub const BYTES: u64 = 64;

    pub fn encode(&self) -> [u8; 64] {
        let Origin { level, made_unix_ms, domain } = self.origin;
        let [pack, level, made, domain] =
            [self.pack.0, u64::from(level as u8), made_unix_ms, domain.0].map(u64::to_le_bytes);
        sealed_64(PACK_MAGIC, &[&VERSION.to_le_bytes(), &self.store, &pack, &level, &made, &domain])
    }

    pub fn decode(bytes: &[u8; 64]) -> Result<Option<Self>> {
        let Some(bytes) = open_64(PACK_MAGIC, bytes) else { return Ok(None) };
        refuse_other_version("a pack", u32_at(bytes, 8))?;
        let domain = Domain(u64_at(bytes, 52));
        let origin = Origin { level: bytes[36] as i8, made_unix_ms: u64_at(bytes, 44), domain };
        Ok(Some(Self { store: std::array::from_fn(|i| bytes[12 + i]), pack: PackId(u64_at(bytes, 28)), origin }))
    }
}

/// How a frame's payload is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Codec {
    /// As it is: compression did not pay.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

/// What a group's blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum GroupKind {
    /// Disk contents, found by digest.
    Data = 0,
    /// Map nodes.
    Node = 1,
}

/// One group within a frame: its blocks that are present lie one behind the other, lowest slot first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupEntry {
    pub group: GroupId,
    /// Bit `s`: the block in slot `s` is there.
    pub slots: u16,
    pub kind: GroupKind,
}

impl GroupEntry {
    pub fn blocks(&self) -> u32 {
        self.slots.count_ones()
    }

    /// The slots that are there, lowest first.
    pub fn slots(&self) -> impl Iterator<Item = u64> + use<> {
        let slots = self.slots;
        (0..16).filter(move |slot| slots >> slot & 1 == 1)
    }
}

/// The head of a frame: groups compressed together. 32 bytes, then 12 for each group, then the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameHeader {
    pub codec: Codec,
    /// Bytes of the payload as stored.
    pub stored: u32,
    pub groups: Vec<GroupEntry>,
}

impl FrameHeader {
    const FIXED: usize = 32;
    /// More groups than this (16 MiB of blocks) are not put in one frame.
    pub const GROUPS_MAX: usize = 256;

    pub fn bytes(&self) -> usize {
        Self::FIXED + 12 * self.groups.len()
    }

    /// Bytes of the payload when decoded.
    pub fn raw_bytes(&self) -> usize {
        self.groups.iter().map(|g| g.blocks() as usize * BLOCK_SIZE).sum()
    }

    /// Appends header and payload. The checksum covers both.
    pub fn encode(&self, payload: &[u8], out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
        out.extend_from_slice(&[self.codec as u8, 0]);
        out.extend_from_slice(&(self.groups.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.stored.to_le_bytes());
        out.extend_from_slice(&[0; 16]);
        let crc_at = out.len();
        out.extend_from_slice(&[0; 4]);
        for entry in &self.groups {
            out.extend_from_slice(&entry.group.0.to_le_bytes());
            out.extend_from_slice(&entry.slots.to_le_bytes());
            out.extend_from_slice(&[entry.kind as u8, 0]);
        }
        out.extend_from_slice(payload);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out[start..crc_at]), &out[crc_at + 4..]);
        out[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// The bytes of the frame that begins here, as far as its header can be believed before it is verified.
    pub fn whole(bytes: &[u8]) -> Option<&[u8]> {
        let head = bytes.get(..Self::FIXED).filter(|head| u32_at(head, 0) == FRAME_MAGIC)?;
        let groups = u16::from_le_bytes([head[6], head[7]]) as usize;
        bytes.get(..Self::FIXED + 12 * groups + u32_at(head, 8) as usize)
    }

    /// Verifies and decodes a whole frame; returns the header and the stored payload.
    pub fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        if bytes.len() < Self::FIXED || u32_at(bytes, 0) != FRAME_MAGIC {
            return None;
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..28]), &bytes[Self::FIXED..]);
        if crc != u32_at(bytes, 28) {
            return None;
        }
        let codec = match bytes[4] {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            _ => return None,
        };
        let count = u16::from_le_bytes([bytes[6], bytes[7]]) as usize;
        let stored = u32_at(bytes, 8);
        if count == 0 || count > Self::GROUPS_MAX || bytes.len() != Self::FIXED + 12 * count + stored as usize {
            return None;
        }
        let (entries, payload) = bytes[Self::FIXED..].split_at(12 * count);
        let groups = entries.as_chunks::<12>().0.iter().map(|e| {
            let kind = match e[10] {
                0 => GroupKind::Data,
                1 => GroupKind::Node,
                _ => return None,
            };
            Some(GroupEntry { group: GroupId(u64_at(e, 0)), slots: u16::from_le_bytes([e[8], e[9]]), kind })
        });
        let groups = groups.collect::<Option<Vec<_>>>()?;
        Some((Self { codec, stored, groups }, payload))
    }
}

/// The last 64 bytes of a pack: where its three sections are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackFooter {
    pub pack: PackId,
    /// The digests of all blocks, 32 bytes each, in the order of the frames.
    pub digests_at: u64,
    /// The table of contents: zstd of postcard of [`PackContents`]. It ends where the manifest begins.
    pub contents_at: u64,
    /// The manifest: zstd of postcard of the catalogue's changes. It ends where the footer begins.
    pub manifest_at: u64,
    /// crc32c of everything from `digests_at` to the footer.
    pub sections_crc: u32,
}

impl PackFooter {
    pub const BYTES: u64 = 64;

    pub fn encode(&self) -> [u8; 64] {
        let parts: [&[u8]; 6] = [
            &VERSION.to_le_bytes(),
            &self.pack.0.to_le_bytes(),
            &self.digests_at.to_le_bytes(),
            &self.contents_at.to_le_bytes(),
            &self.manifest_at.to_le_bytes(),
            &self.sections_crc.to_le_bytes(),
        ];
        sealed_64(FOOTER_MAGIC, &parts)
    }

    /// Decodes a footer that ends at `file_bytes`, with its offsets in order and within the file.
    pub fn decode(bytes: &[u8; 64], file_bytes: u64) -> Option<Self> {
        let bytes = open_64(FOOTER_MAGIC, bytes)?;
        let footer = Self {
            pack: PackId(u64_at(bytes, 12)),
            digests_at: u64_at(bytes, 20),
            contents_at: u64_at(bytes, 28),
            manifest_at: u64_at(bytes, 36),
            sections_crc: u32_at(bytes, 44),
        };
        let order = [PackHeader::BYTES, footer.digests_at, footer.contents_at, footer.manifest_at];
        let ends = file_bytes.checked_sub(Self::BYTES)?;
        (u32_at(bytes, 8) == VERSION && order.is_sorted() && footer.manifest_at <= ends).then_some(footer)
    }
}

/// One frame of a pack, as its table of contents tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameEntry {
    /// Offset in the pack, in bytes.
    pub offset: u64,
    /// Bytes of header and payload.
    pub bytes: u32,
    pub groups: Vec<GroupEntry>,
}

/// A pack's table of contents.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PackContents {
    pub frames: Vec<FrameEntry>,
}

/// Bytes of a map node's block before its entries.
const NODE_HEAD: usize = 8;
/// Blocks that a leaf covers, as a power of two.
pub const LEAF_BITS: u32 = 9;
/// Children of an inner node, as a power of two.
pub const INNER_BITS: u32 = 8;

/// A run of blocks in a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeafExtent {
    /// First block, from the leaf's start.
    pub offset: u16,
    /// Blocks.
    pub len: u16,
    /// Where the first is stored; the others follow it.
    pub block: BlockId,
}

/// A reference to a subtree: its node and how many blocks are mapped below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeRef {
    pub node: BlockId,
    pub mapped: u64,
}

/// A map node. Encoded in one block: kind, level, two unused bytes, a count, then entries; the rest is zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// Extents by offset, neither overlapping nor joinable.
    Leaf(Vec<LeafExtent>),
    /// One entry for each of the 256 children, `node` 0 where nothing is mapped.
    Inner { level: u8, children: Vec<NodeRef> },
}

impl Node {
    /// 0 for a leaf.
    pub fn level(&self) -> u32 {
        match self {
            Self::Leaf(_) => 0,
            Self::Inner { level, .. } => u32::from(*level),
        }
    }

    const LEAF: u8 = 1;
    const LEAF_DENSE: u8 = 2;
    const INNER: u8 = 3;
    const EXTENT: usize = 10;
    const CHILD: usize = 12;
    /// A leaf with more extents than fit is written as one id for each of its 512 blocks.
    const EXTENTS_MAX: usize = (BLOCK_SIZE - NODE_HEAD) / Self::EXTENT;

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BLOCK_SIZE);
        let head = |kind: u8, level: u8, count: usize| -> [u8; NODE_HEAD] {
            let c = (count as u32).to_le_bytes();
            [kind, level, 0, 0, c[0], c[1], c[2], c[3]]
        };
        let six = |id: BlockId| -> [u8; 6] { std::array::from_fn(|i| id.0.to_le_bytes()[i]) };
        match self {
            Self::Leaf(extents) if extents.len() <= Self::EXTENTS_MAX => {
                out.extend_from_slice(&head(Self::LEAF, 0, extents.len()));
                for e in extents {
                    out.extend_from_slice(&e.offset.to_le_bytes());
                    out.extend_from_slice(&e.len.to_le_bytes());
                    out.extend_from_slice(&six(e.block));
                }
            }
            Self::Leaf(extents) => {
                out.extend_from_slice(&head(Self::LEAF_DENSE, 0, 1 << LEAF_BITS));
                out.resize(NODE_HEAD + (6 << LEAF_BITS), 0);
                for e in extents {
                    for i in 0..e.len {
                        let at = NODE_HEAD + 6 * (e.offset + i) as usize;
                        out[at..at + 6].copy_from_slice(&six(e.block.plus(u64::from(i))));
                    }
                }
            }
            Self::Inner { level, children } => {
                out.extend_from_slice(&head(Self::INNER, *level, children.len()));
                for c in children {
                    out.extend_from_slice(&six(c.node));
                    out.extend_from_slice(&c.mapped.to_le_bytes()[..6]);
                }
            }
        }
        out.resize(BLOCK_SIZE, 0);
        out
    }

    /// `None`: not a node this version writes.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != BLOCK_SIZE {
            return None;
        }
        let (kind, level, count) = (bytes[0], bytes[1], u32_at(bytes, 4) as usize);
        let six = |at: usize| u64_at(bytes, at) & 0xffff_ffff_ffff;
        match kind {
            Self::LEAF if count <= Self::EXTENTS_MAX => {
                let mut extents = Vec::with_capacity(count);
                let mut end = 0;
                for i in 0..count {
                    let at = NODE_HEAD + i * Self::EXTENT;
                    let offset = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                    let len = u16::from_le_bytes([bytes[at + 2], bytes[at + 3]]);
                    // Six bytes from at + 4 are read as the upper part of eight, so that the last one stays in bounds.
                    let block = BlockId(u64_at(bytes, at + 2) >> 16);
                    let sane = len > 0 && offset >= end && u32::from(offset) + u32::from(len) <= 1 << LEAF_BITS;
                    if !sane || block.is_none() {
                        return None;
                    }
                    end = offset + len;
                    extents.push(LeafExtent { offset, len, block });
                }
                Some(Self::Leaf(extents))
            }
            Self::LEAF_DENSE if count == 1 << LEAF_BITS => {
                let mut extents = Vec::new();
                for i in 0..count {
                    push_extent(&mut extents, i as u16, 1, BlockId(six(NODE_HEAD + 6 * i)));
                }
                Some(Self::Leaf(extents))
            }
            Self::INNER if count == 1 << INNER_BITS && level > 0 => {
                let child = |i| {
                    let at = NODE_HEAD + i * Self::CHILD;
                    NodeRef { node: BlockId(six(at)), mapped: six(at + 6) }
                };
                Some(Self::Inner { level, children: (0..count).map(child).collect() })
            }
            _ => None,
        }
    }
}

/// Appends a run to a leaf's extents, joining it to the last where it continues it. Unmapped runs are left out.
pub fn push_extent(extents: &mut Vec<LeafExtent>, offset: u16, len: u16, block: BlockId) {
    if block.is_none() || len == 0 {
        return;
    }
    if let Some(last) = extents.last_mut()
        && last.offset + last.len == offset
        && last.block.plus(u64::from(last.len)) == block
    {
        last.len += len;
        return;
    }
    extents.push(LeafExtent { offset, len, block });
}

const _: () = assert!(NODE_HEAD + (6 << LEAF_BITS) <= BLOCK_SIZE);
const _: () = assert!(NODE_HEAD + (Node::CHILD << INNER_BITS) <= BLOCK_SIZE);
