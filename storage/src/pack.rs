//! Writing packs: immutable files of frames that say themselves what they hold.
//!
//! A pack is header, frames, digests, contents, manifest, footer (`docs/format.md`). Nothing refers to it before it is
//! synced and its name is durable; a pack without a footer is the remainder of a crash.

use crate::block::{BLOCK_SIZE, BlockId, GROUP_BLOCKS, GroupId, PackId};
use crate::catalogue::{Batch, Table};
use crate::domain::Domain;
use crate::error::{Error, Result};
use crate::format::{
    Codec, FrameEntry, FrameHeader, GroupEntry, GroupKind, Origin, PackContents, PackFooter, PackHeader, StoreUuid,
};
use crate::medium::{File, Medium, Mode};
use crate::rows::encode;
use crate::workers::Workers;
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// The packs' directory on the medium.
pub(crate) const DIR: &str = "packs";
/// A pack that has grown to this many bytes is finished and the next one begun.
const PACK_BYTES: u64 = 64 << 20;
/// Blocks of the largest frame, which has at most 256 groups: they may have a block each.
const FRAME_BLOCKS_MAX: u64 = 256;
/// Full frames that wait for being compressed, or for their place, for each thread that compresses.
const FRAMES_AHEAD: usize = 4;
/// Bytes handed to the file at a time.
const WRITE_BYTES: usize = 128 << 10;
/// Packs that [`PackWriters`] write at the same time: each is an open file, with frames in memory.
const OPEN_PACKS: usize = 16;

/// A block's BLAKE3 hash.
pub(crate) type Digest = [u8; 32];

/// Where a group's bytes are: the value of the group table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroupPlace {
    pub pack: PackId,
    /// The frame: offset in the pack and bytes with its header.
    pub offset: u64,
    pub bytes: u32,
    /// Of these bytes, the part that is this group's.
    pub share: u32,
    pub slots: u16,
    pub kind: GroupKind,
    /// Index of the first block's digest among the pack's.
    pub digest: u32,
}

/// What the catalogue knows of a pack.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PackFacts {
    pub bytes: u64,
    pub digests_at: u64,
    pub contents_at: u64,
    pub manifest_at: u64,
    pub data_blocks: u64,
    pub node_blocks: u64,
    /// Bytes of the frames with map nodes.
    pub node_bytes: u64,
    /// Behind the others in the row: rows from before it was noted end without it.
    #[serde(skip)]
    pub origin: Origin,
}

impl PackFacts {
    pub fn has_manifest(&self) -> bool {
        self.manifest_at + PackFooter::BYTES < self.bytes
    }

    /// The value of the table of packs.
    pub fn to_row(self) -> Result<Vec<u8>> {
        Ok([encode(&self)?, encode(&self.origin)?, encode(&self.origin.domain)?].concat())
    }

    /// See [`PackFacts::to_row`].
    pub fn from_row(row: &[u8]) -> Result<Self> {
        let damaged = |e| Error::damaged(format!("a pack in the catalogue cannot be read: {e}"));
        let (mut facts, rest) = postcard::take_from_bytes::<Self>(row).map_err(damaged)?;
        if rest.is_empty() {
            return Ok(facts);
        }
        let (origin, rest) = postcard::take_from_bytes(rest).map_err(damaged)?;
        facts.origin = origin;
        if !rest.is_empty() {
            facts.origin.domain = postcard::from_bytes(rest).map_err(damaged)?;
        }
        Ok(facts)
    }
}

/// A finished pack and what the catalogue has to learn of it.
pub(crate) struct Finished {
    pub pack: PackId,
    pub facts: PackFacts,
    pub groups: Vec<(GroupId, GroupPlace)>,
    /// Digest and address of each data block.
    pub data: Vec<(Digest, BlockId)>,
}

impl Finished {
    /// Adds the rows of the pack and its groups to a batch.
    pub fn add_to(&self, batch: &mut Batch) -> Result<()> {
        batch.put(Table::Packs, self.pack.0.to_be_bytes(), self.facts.to_row()?);
        for (group, place) in &self.groups {
            batch.put(Table::Groups, group.0.to_be_bytes(), encode(place)?);
        }
        Ok(())
    }
}

/// Where the next ids come from; shared by everything that writes packs.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub group: AtomicU64,
    pub pack: AtomicU64,
}

/// A frame that is being filled: of each group its blocks, lowest slot first.
#[derive(Default)]
struct Filling {
    groups: Vec<GroupEntry>,
    bytes: Vec<u8>,
    digests: Vec<Digest>,
}

/// A full frame whose compression may be somebody else's.
struct Closed {
    kind: GroupKind,
    groups: Vec<GroupEntry>,
    digests: Vec<Digest>,
    job: Arc<Job>,
}

/// The compression of a frame: done by whoever begins first, and once.
struct Job {
    level: i32,
    /// See [`PackWriter::or_at_level`].
    lower_level: Option<i32>,
    state: Mutex<JobState>,
    done: Condvar,
}

enum JobState {
    Waiting(Vec<u8>),
    Running,
    Done(Result<(Codec, Vec<u8>)>),
}

impl Job {
    /// Does it, unless it was begun.
    fn run(&self) {
        let mut state = self.state.lock();
        let JobState::Waiting(bytes) = &mut *state else { return };
        let bytes = std::mem::take(bytes);
        *state = JobState::Running;
        drop(state);
        let done = self.compress(bytes);
        *self.state.lock() = JobState::Done(done);
        self.done.notify_all();
    }

    fn compress(&self, bytes: Vec<u8>) -> Result<(Codec, Vec<u8>)> {
        let at = |level| zstd::bulk::compress(&bytes, level).map_err(|e| Error::io("cannot compress a frame", e));
        let mut compressed = at(self.level)?;
        if let Some(level) = self.lower_level {
            let lower = at(level)?;
            if lower.len() < compressed.len() {
                compressed = lower;
            }
        }
        Ok(if compressed.len() < bytes.len() { (Codec::Zstd, compressed) } else { (Codec::Raw, bytes) })
    }

    /// What came of it; it is done here if nobody has begun.
    fn finish(&self) -> Result<(Codec, Vec<u8>)> {
        self.run();
        let mut state = self.state.lock();
        loop {
            match std::mem::replace(&mut *state, JobState::Running) {
                JobState::Done(done) => return done,
                _ => self.done.wait(&mut state),
            }
        }
    }
}

/// One pack file that is being written.
struct Writing {
    pack: PackId,
    file: Arc<dyn File>,
    /// Bytes handed to the file.
    written: u64,
    buffer: Vec<u8>,
    contents: PackContents,
    digests: Vec<u8>,
    finished: Finished,
}

/// Writes as many packs as it takes, all of one domain. Dropped before [`PackWriters::finish`] is done, it removes what it
/// wrote.
pub(crate) struct PackWriter {
    medium: Arc<dyn Medium>,
    store: StoreUuid,
    counters: Arc<Counters>,
    level: i32,
    domain: Domain,
    /// A level that is tried as well, for contents that a higher one makes larger.
    lower_level: Option<i32>,
    /// Blocks of data at which a frame is full.
    frame_blocks: u64,
    filling: [Filling; 2],
    /// Who else compresses.
    helpers: Option<Arc<Workers>>,
    /// Full frames that are not in a pack yet, the oldest first.
    closed: VecDeque<Closed>,
    current: Option<Writing>,
    done: Vec<Finished>,
    /// Files made so far; they go when the writer is dropped before it has finished.
    made: Vec<PackId>,
}

impl PackWriter {
    /// `level` is zstd's.
    pub fn new(medium: Arc<dyn Medium>, store: StoreUuid, counters: Arc<Counters>, level: i32, domain: Domain) -> Self {
        Self {
            medium,
            store,
            counters,
            level,
            domain,
            lower_level: None,
            frame_blocks: GROUP_BLOCKS,
            filling: Default::default(),
            helpers: None,
            closed: VecDeque::new(),
            current: None,
            done: Vec::new(),
            made: Vec::new(),
        }
    }

    /// Makes frames of data larger: to be used with [`PackWriter::put_group`].
    pub fn with_frames_of(mut self, blocks: u64) -> Self {
        self.frame_blocks = blocks.clamp(GROUP_BLOCKS, FRAME_BLOCKS_MAX);
        self
    }

    /// Compresses each frame at this level too, and keeps what is smaller: at a higher level, a few contents (numbers in
    /// decimal, for one) come out larger.
    pub fn or_at_level(mut self, level: i32) -> Self {
        self.lower_level = Some(level);
        self
    }

    /// Has other threads compress, too, from here on; or no longer.
    pub fn have_help(&mut self, helpers: Option<Arc<Workers>>) {
        self.helpers = helpers;
    }

    /// Takes a new block and gives it its address.
    pub fn put(&mut self, kind: GroupKind, block: &[u8], digest: Digest) -> Result<BlockId> {
        let filling = &mut self.filling[kind as usize];
        if filling.groups.is_empty() {
            let group = GroupId(self.counters.group.fetch_add(1, Ordering::Relaxed));
            filling.groups.push(GroupEntry { group, slots: 0, kind });
        }
        let entry = &mut filling.groups[0];
        let slot = entry.blocks();
        entry.slots |= 1 << slot;
        let id = BlockId::new(entry.group, u64::from(slot));
        filling.bytes.extend_from_slice(block);
        filling.digests.push(digest);
        self.close_if_full(kind, GROUP_BLOCKS)?;
        Ok(id)
    }

    /// Takes what is left of a group under its old addresses. Such groups share a frame until it is full. Not to be mixed
    /// with [`PackWriter::put`] in one writer.
    pub fn put_group(&mut self, entry: GroupEntry, blocks: &[u8], digests: &[Digest]) -> Result<()> {
        let filling = &mut self.filling[entry.kind as usize];
        filling.groups.push(entry);
        filling.bytes.extend_from_slice(blocks);
        filling.digests.extend_from_slice(digests);
        // Map nodes are read one at a time: larger frames would gain little and cost each of those reads.
        let full = if entry.kind == GroupKind::Data { self.frame_blocks } else { GROUP_BLOCKS };
        self.close_if_full(entry.kind, full)
    }

    fn close_if_full(&mut self, kind: GroupKind, full: u64) -> Result<()> {
        if self.filling[kind as usize].digests.len() as u64 >= full {
            self.close_frame(kind)?;
        }
        Ok(())
    }

    /// Has what has been collected compressed and appended to the pack.
    fn close_frame(&mut self, kind: GroupKind) -> Result<()> {
        let Filling { groups, bytes, digests } = std::mem::take(&mut self.filling[kind as usize]);
        if groups.is_empty() {
            return Ok(());
        }
        let (state, done) = (Mutex::new(JobState::Waiting(bytes)), Condvar::new());
        let job = Arc::new(Job { level: self.level, lower_level: self.lower_level, state, done });
        self.closed.push_back(Closed { kind, groups, digests, job: job.clone() });
        let ahead = self.helpers.as_ref().map_or(0, |helpers| {
            helpers.offer(move || job.run());
            FRAMES_AHEAD * helpers.count()
        });
        self.append_closed(ahead)
    }

    /// Appends frames to the pack until so many are left.
    fn append_closed(&mut self, left: usize) -> Result<()> {
        while self.closed.len() > left {
            let Some(closed) = self.closed.pop_front() else { break };
            self.append_frame(closed)?;
        }
        Ok(())
    }

    fn append_frame(&mut self, Closed { kind, groups, digests, job }: Closed) -> Result<()> {
        let (codec, payload) = job.finish()?;
        let header = FrameHeader { codec, stored: payload.len() as u32, groups };

        let out = self.writing()?;
        let offset = out.written + out.buffer.len() as u64;
        header.encode(&payload, &mut out.buffer);
        let frame_bytes = (header.bytes() + payload.len()) as u32;
        let mut digest = (out.digests.len() / size_of::<Digest>()) as u32;
        let mut first = 0;
        for entry in &header.groups {
            let GroupEntry { group, slots, .. } = *entry;
            let share = (u64::from(frame_bytes) * u64::from(entry.blocks()) / digests.len() as u64) as u32;
            let place = GroupPlace { pack: out.pack, offset, bytes: frame_bytes, share, slots, kind, digest };
            out.finished.groups.push((group, place));
            if kind == GroupKind::Data {
                let here = digests[first..].iter().zip(entry.slots());
                out.finished.data.extend(here.map(|(digest, slot)| (*digest, BlockId::new(group, slot))));
            }
            digest += entry.blocks();
            first += entry.blocks() as usize;
        }
        out.digests.extend(digests.iter().flatten());
        match kind {
            GroupKind::Data => out.finished.facts.data_blocks += digests.len() as u64,
            GroupKind::Node => {
                out.finished.facts.node_blocks += digests.len() as u64;
                out.finished.facts.node_bytes += u64::from(frame_bytes);
            }
        }
        out.contents.frames.push(FrameEntry { offset, bytes: frame_bytes, groups: header.groups });
        if out.buffer.len() >= WRITE_BYTES {
            out.write_buffer()?;
        }
        if out.written + out.buffer.len() as u64 + out.digests.len() as u64 >= PACK_BYTES {
            self.finish_current(&[])?;
        }
        Ok(())
    }

    fn writing(&mut self) -> Result<&mut Writing> {
        match &mut self.current {
            Some(writing) => Ok(writing),
            empty => {
                let pack = PackId(self.counters.pack.fetch_add(1, Ordering::Relaxed));
                let file = self.medium.open(&file_name(pack), Mode::Create).map_err(|e| cannot_write(pack, e))?;
                self.made.push(pack);
                let origin = Origin { level: self.level as i8, made_unix_ms: unix_ms(), domain: self.domain };
                let header = PackHeader { store: self.store, pack, origin }.encode();
                let facts = PackFacts { origin, ..PackFacts::default() };
                Ok(empty.insert(Writing {
                    pack,
                    file,
                    written: 0,
                    buffer: header.to_vec(),
                    contents: PackContents::default(),
                    digests: Vec::new(),
                    finished: Finished { pack, facts, groups: Vec::new(), data: Vec::new() },
                }))
            }
        }
    }

    fn finish_current(&mut self, manifest: &[u8]) -> Result<()> {
        let Some(mut out) = self.current.take() else { return Ok(()) };
        let squeeze = |bytes: &[u8]| zstd::bulk::compress(bytes, 3).map_err(|e| Error::io("cannot compress a pack", e));
        let contents = postcard::to_stdvec(&out.contents).map_err(|e| Error::damaged(format!("pack contents: {e}")))?;
        let mut sections = std::mem::take(&mut out.digests);
        let digests_at = out.written + out.buffer.len() as u64;
        let contents_at = digests_at + sections.len() as u64;
        sections.extend_from_slice(&squeeze(&contents)?);
        let manifest_at = digests_at + sections.len() as u64;
        if !manifest.is_empty() {
            sections.extend_from_slice(&squeeze(manifest)?);
        }
        let sections_crc = crc32c::crc32c(&sections);
        let footer = PackFooter { pack: out.pack, digests_at, contents_at, manifest_at, sections_crc };
        out.buffer.extend_from_slice(&sections);
        out.buffer.extend_from_slice(&footer.encode());
        out.write_buffer()?;
        out.file.sync().map_err(|e| cannot_write(out.pack, e))?;
        out.finished.facts.bytes = out.written;
        out.finished.facts.digests_at = digests_at;
        out.finished.facts.contents_at = contents_at;
        out.finished.facts.manifest_at = manifest_at;
        self.done.push(out.finished);
        Ok(())
    }

    /// Ends the frames that are being filled: from here on no more ids are taken.
    pub fn end_frames(&mut self) -> Result<()> {
        self.close_frame(GroupKind::Data)?;
        self.close_frame(GroupKind::Node)?;
        self.append_closed(0)
    }

    /// Ends the pack that is being written, with `manifest`. Without a manifest there may be none.
    fn end_pack(&mut self, manifest: &[u8]) -> Result<()> {
        self.end_frames()?;
        if !manifest.is_empty() {
            self.writing()?;
        }
        self.finish_current(manifest)
    }

    /// Is there anything that has to be ended?
    fn is_open(&self) -> bool {
        let filling = self.filling.iter().any(|filling| !filling.groups.is_empty());
        self.current.is_some() || !self.closed.is_empty() || filling
    }

    fn sync_names(&self) -> Result<()> {
        self.medium.sync_dir(DIR).map_err(|e| Error::io("cannot make a pack's name durable", e))
    }

    /// What it wrote, which stays.
    fn keep(mut self) -> Vec<Finished> {
        self.made.clear();
        std::mem::take(&mut self.done)
    }
}

/// A writer for each level and domain, made when it is needed.
pub(crate) struct PackWriters<'a> {
    make: Box<dyn Fn(i32, Domain) -> PackWriter + 'a>,
    writers: BTreeMap<(i32, Domain), PackWriter>,
}

impl<'a> PackWriters<'a> {
    pub fn new(make: impl Fn(i32, Domain) -> PackWriter + 'a) -> Self {
        Self { make: Box::new(make), writers: BTreeMap::new() }
    }

    /// The writer of a level, which is zstd's, and a domain.
    pub fn at(&mut self, level: i32, domain: Domain) -> Result<&mut PackWriter> {
        let key = (level, domain);
        if !self.writers.get(&key).is_some_and(PackWriter::is_open)
            && self.writers.values().filter(|writer| writer.is_open()).count() >= OPEN_PACKS
        {
            self.writers.values_mut().try_for_each(|writer| writer.end_pack(&[]))?;
        }
        Ok(self.writers.entry(key).or_insert_with(|| (self.make)(level, domain)))
    }

    /// See [`PackWriter::end_frames`].
    pub fn end_frames(&mut self) -> Result<()> {
        self.writers.values_mut().try_for_each(PackWriter::end_frames)
    }

    /// Ends all packs and makes them and their names durable. `manifest`, if it is not empty, is in the one that is durable
    /// last; there has to be a writer then.
    pub fn finish(self, manifest: &[u8]) -> Result<Vec<Finished>> {
        let mut writers: Vec<_> = self.writers.into_values().collect();
        if let Some((last, others)) = writers.split_last_mut() {
            others.iter_mut().try_for_each(|writer| writer.end_pack(&[]))?;
            if others.iter().any(|writer| !writer.made.is_empty()) {
                last.sync_names()?;
            }
            last.end_pack(manifest)?;
            last.sync_names()?;
        }
        Ok(writers.into_iter().flat_map(PackWriter::keep).collect())
    }
}

impl Drop for PackWriter {
    fn drop(&mut self) {
        for pack in &self.made {
            // Nothing refers to it; what cannot be removed now is removed at the next start.
            drop(self.medium.remove(&file_name(*pack)));
        }
    }
}

impl Writing {
    fn write_buffer(&mut self) -> Result<()> {
        self.file.write_at(&self.buffer, self.written).map_err(|e| cannot_write(self.pack, e))?;
        // Bit by bit: a whole pack that goes to disk at its sync holds up the log's syncs.
        self.file.start_writeback(self.written, self.buffer.len() as u64);
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

pub(crate) fn file_name(pack: PackId) -> String {
    format!("{DIR}/{:016x}.pack", pack.0)
}

pub(crate) fn parse_name(name: &str) -> Option<PackId> {
    u64::from_str_radix(name.strip_suffix(".pack")?, 16).ok().map(PackId)
}

/// Removes a pack's file; fine when it is gone already.
pub(crate) fn remove(medium: &dyn Medium, pack: PackId) -> Result<()> {
    match medium.remove(&file_name(pack)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("cannot remove {pack}"), e)),
        _ => Ok(()),
    }
}

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

fn cannot_write(pack: PackId, e: std::io::Error) -> Error {
    Error::io(format!("cannot write {pack}"), e)
}

/// The digest of a block's content.
pub(crate) fn digest(block: &[u8]) -> Digest {
    debug_assert_eq!(block.len(), BLOCK_SIZE);
    *blake3::hash(block).as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::medium::sim::{Random, SimMedium};

    /// What a writer makes of the same blocks: the addresses, and the packs from behind their headers, which have the time.
    fn packed(helpers: Option<&Arc<Workers>>) -> (Vec<BlockId>, Vec<Vec<u8>>) {
        let medium = SimMedium::new();
        medium.create_dir(DIR).unwrap();
        let (shared, counters) = (Arc::new(medium.clone()), Arc::new(Counters::default()));
        let make = |level, domain| PackWriter::new(shared.clone(), [7; 16], counters.clone(), level, domain);
        let mut writers = PackWriters::new(make);
        let writer = writers.at(1, Domain::SHARED).unwrap();
        let mut random = Random(1);
        let mut ids = Vec::new();
        for i in 0..3_000 {
            // Now with help, now without.
            writer.have_help(helpers.filter(|_| i % 1_000 < 900).cloned());
            let mut block = vec![i as u8; BLOCK_SIZE];
            if i % 3 > 0 {
                block.iter_mut().step_by(2).for_each(|byte| *byte = random.bits() as u8);
            }
            let kind = if i % 50 == 0 { GroupKind::Node } else { GroupKind::Data };
            ids.push(writer.put(kind, &block, [i as u8; 32]).unwrap());
        }
        let finished = writers.finish(b"manifest").unwrap();
        let read = |pack: &Finished| {
            let mut bytes = vec![0; pack.facts.bytes as usize];
            medium.open(&file_name(pack.pack), Mode::Read).unwrap().read_at(&mut bytes, 0).unwrap();
            bytes.split_off(64)
        };
        (ids, finished.iter().map(read).collect())
    }

    /// Rows and headers as programs wrote them before a pack's level and time, and before its domain, were noted.
    #[test]
    fn packs_of_earlier_programs_are_read() {
        let facts = PackFacts { bytes: 9_000, digests_at: 5_000, data_blocks: 16, ..PackFacts::default() };
        let (first, with_origin) = (encode(&facts).unwrap(), [9, 0xac, 0x02]);
        assert_eq!(PackFacts::from_row(&first).unwrap(), facts);
        let mut want = PackFacts { origin: Origin { level: 9, made_unix_ms: 300, domain: Domain::SHARED }, ..facts };
        assert_eq!(PackFacts::from_row(&[&first[..], &with_origin].concat()).unwrap(), want);
        for domain in [Domain::SHARED, Domain(300), Domain::UNKNOWN] {
            want.origin.domain = domain;
            assert_eq!(PackFacts::from_row(&want.to_row().unwrap()).unwrap(), want);
        }
        assert!(want.to_row().unwrap().starts_with(&[&first[..], &with_origin].concat()));

        let header = |level: u8, made: u64, domain: u64| {
            let mut bytes = [0; 64];
            bytes[..8].copy_from_slice(b"MIOSAPAK");
            bytes[8] = 1;
            bytes[12..28].fill(7);
            bytes[28] = 3;
            bytes[36] = level;
            bytes[44..52].copy_from_slice(&made.to_le_bytes());
            bytes[52..60].copy_from_slice(&domain.to_le_bytes());
            let crc = crc32c::crc32c(&bytes[..60]);
            bytes[60..].copy_from_slice(&crc.to_le_bytes());
            bytes
        };
        for (level, made, domain) in [(0, 0, 0), (9, 300, 0), (9, 300, 1 << 60)] {
            let bytes = header(level, made, domain);
            let origin = Origin { level: level as i8, made_unix_ms: made, domain: Domain(domain) };
            let want = PackHeader { store: [7; 16], pack: PackId(3), origin };
            assert_eq!(PackHeader::decode(&bytes).unwrap(), Some(want));
            assert_eq!(want.encode(), bytes);
        }
    }

    #[test]
    fn packs_are_the_same_whoever_compresses() {
        let alone = packed(None);
        assert!(alone.1.iter().map(Vec::len).sum::<usize>() > 1 << 20);
        let workers = Arc::new(Workers::default());
        assert!(packed(Some(&workers)) == alone);
        // From here on they refuse.
        workers.stop();
        assert!(packed(Some(&workers)) == alone);
    }
}
