//! A block device on a state of the store: what front ends see.

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, BlockId, DiskId, LogPos, SnapshotId, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::format::RecordKind;
use crate::inner::Inner;
use crate::log::Record;
use crate::map;
use crate::overlay::{Content, Extent};
use crate::readahead::Streams;
use crate::state::{Layer, State};
use parking_lot::{Mutex, MutexGuard, RwLock};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Blocks of the largest record. A longer write is several records.
const RECORD_BLOCKS: usize = 256;

/// A disk or snapshot that is open in memory, as long as it exists.
pub(crate) struct Device {
    pub source: Source,
    pub name: String,
    pub size_blocks: u64,
    pub parent: Option<Source>,
    pub created_unix_ms: u64,
    /// Held from the append of a record to its entry in the overlay: both have one order.
    writer: Mutex<()>,
    state: RwLock<State>,
    streams: Streams,
    deleted: AtomicBool,
}

impl Device {
    pub fn new(
        source: Source,
        name: String,
        size_blocks: u64,
        parent: Option<Source>,
        made: u64,
        state: State,
    ) -> Self {
        Self {
            source,
            name,
            size_blocks,
            parent,
            created_unix_ms: made,
            writer: Mutex::new(()),
            state: RwLock::new(state),
            streams: Streams::default(),
            deleted: AtomicBool::new(false),
        }
    }

    /// Keeps writers out: while the guard lives, no record of this device is appended and the state stands still.
    pub fn stop_writes(&self) -> MutexGuard<'_, ()> {
        self.writer.lock()
    }

    /// The present state.
    pub fn state(&self) -> State {
        self.state.read().clone()
    }

    /// Changes the state. Call with writers stopped.
    pub fn with_state<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.write())
    }

    /// Makes the present contents a fork point; see [`State::freeze`]. Call with writers stopped.
    pub fn freeze(&self, end: LogPos) -> Option<Arc<Layer>> {
        self.with_state(|state| state.freeze(end, self.level()))
    }

    /// Level of the map's root.
    pub fn level(&self) -> u32 {
        map::levels(self.size_blocks)
    }

    /// From now on every call on a handle fails. Call with writers stopped.
    pub fn delete(&self) {
        self.deleted.store(true, Ordering::Release);
    }

    fn check_alive(&self) -> Result<()> {
        if self.deleted.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::NotFound, format!("{} has been deleted", self.source)));
        }
        Ok(())
    }

    /// Puts what a log record says into the overlay.
    pub fn apply(&self, block: u64, extent: Extent) {
        self.state.write().overlay.insert(block, extent);
    }
}

/// A handle on a disk or, read-only, on a snapshot: a block device with a volatile write cache.
///
/// Any offset and length within the size is accepted; what is aligned to 4 KiB is fast. Calls may run concurrently from
/// any thread; overlapping writes that run at the same time leave each 4 KiB block as one of them wrote it. A write that
/// has returned is seen by every later read, snapshot and fork, and survives a crash once a later [`Disk::flush`] has
/// returned; a block that was not flushed reads as it was before or as it was written, never torn.
///
/// Errors: `InvalidInput` beyond the end, `ReadOnly`, `NotFound` after deletion, `NoSpace` (of a write of more than
/// 1 MiB, or of parts of blocks, a part may have been accepted; nothing accepted before is lost),
/// `Damaged` rather than wrong data, `Poisoned` after a failed sync.
#[derive(Clone)]
pub struct Disk {
    pub(crate) store: Arc<Inner>,
    pub(crate) device: Arc<Device>,
    pub(crate) read_only: bool,
}

impl Disk {
    /// The disk's id; `None` for a snapshot.
    pub fn id(&self) -> Option<DiskId> {
        match self.device.source {
            Source::Disk(id) => Some(id),
            Source::Snapshot(_) => None,
        }
    }

    /// The snapshot's id; `None` for a disk.
    pub fn snapshot_id(&self) -> Option<SnapshotId> {
        match self.device.source {
            Source::Disk(_) => None,
            Source::Snapshot(id) => Some(id),
        }
    }

    /// Size in bytes, a multiple of 4 KiB.
    pub fn size_bytes(&self) -> u64 {
        self.device.size_blocks * BLOCK_BYTES
    }

    /// Whether writes are refused: this is a snapshot, or a handle for reading.
    pub fn is_read_only(&self) -> bool {
        self.read_only || matches!(self.device.source, Source::Snapshot(_))
    }

    /// The same disk by a handle that refuses writes.
    pub fn into_read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// Fills `buf` from `offset`, both in bytes.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        if offset.is_multiple_of(BLOCK_BYTES) && buf.len().is_multiple_of(BLOCK_SIZE) {
            return self.read_blocks(offset / BLOCK_BYTES, buf);
        }
        // The aligned middle goes straight into the caller's buffer, the edges through a block of our own.
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let skip = (at % BLOCK_BYTES) as usize;
            let here = if skip == 0 && rest.len() >= BLOCK_SIZE {
                let here = rest.len() - rest.len() % BLOCK_SIZE;
                self.read_blocks(at / BLOCK_BYTES, &mut rest[..here])?;
                here
            } else {
                let here = (BLOCK_SIZE - skip).min(rest.len());
                let mut block = [0; BLOCK_SIZE];
                self.read_blocks(at / BLOCK_BYTES, &mut block)?;
                rest[..here].copy_from_slice(&block[skip..skip + here]);
                here
            };
            at += here as u64;
            rest = &mut rest[here..];
        }
        Ok(())
    }

    /// Writes `data` at `offset` bytes. Not durable before [`Disk::flush`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, data.len() as u64)?;
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let skip = (at % BLOCK_BYTES) as usize;
            let here = if skip == 0 && rest.len() >= BLOCK_SIZE {
                let here = (rest.len() - rest.len() % BLOCK_SIZE).min(RECORD_BLOCKS * BLOCK_SIZE);
                self.write_blocks(at / BLOCK_BYTES, &rest[..here])?;
                here
            } else {
                let here = (BLOCK_SIZE - skip).min(rest.len());
                self.patch(at / BLOCK_BYTES, skip, &rest[..here])?;
                here
            };
            at += here as u64;
            rest = &rest[here..];
        }
        self.store.log.write_behind();
        Ok(())
    }

    /// Makes every write that completed before this call durable. Shares one sync with everybody who flushes meanwhile.
    pub fn flush(&self) -> Result<()> {
        self.store.log.flush(self.store.log.end())
    }

    /// Sees that every write that completed before this call survives the death of this process, though not of the host:
    /// for users that go on without it, and whose flushes are their own affair.
    pub fn hand_over(&self) -> Result<()> {
        self.store.log.hand_over(self.store.log.end())
    }

    /// Tells that `len` bytes from `offset` on are not needed: whole blocks read as zeroes, parts of blocks stay.
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        let first = offset.div_ceil(BLOCK_BYTES);
        let end = (offset + len) / BLOCK_BYTES;
        if first < end { self.zero_blocks(first, end - first) } else { Ok(()) }
    }

    /// Makes `len` bytes from `offset` on read as zeroes; whole blocks then take no space.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let end = offset + len;
        let (first, last) = (offset.div_ceil(BLOCK_BYTES), end / BLOCK_BYTES);
        const ZEROES: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
        if first > last {
            // Within one block.
            return self.patch(last, (offset % BLOCK_BYTES) as usize, &ZEROES[..len as usize]);
        }
        let (head, tail) = (first * BLOCK_BYTES - offset, end - last * BLOCK_BYTES);
        if head > 0 {
            self.patch(first - 1, BLOCK_SIZE - head as usize, &ZEROES[..head as usize])?;
        }
        if last > first {
            self.zero_blocks(first, last - first)?;
        }
        if tail > 0 {
            self.patch(last, 0, &ZEROES[..tail as usize])?;
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        self.device.check_alive()?;
        if offset.checked_add(len).is_none_or(|end| end > self.size_bytes()) {
            let size = self.size_bytes();
            let what = format!("{len} bytes at {offset} reach beyond the end of {} ({size} bytes)", self.device.source);
            return Err(Error::new(ErrorKind::InvalidInput, what));
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_read_only() {
            let what = match self.device.source {
                Source::Snapshot(id) => format!("{id} is a snapshot and cannot be written; fork it"),
                Source::Disk(id) => format!("{id} is open for reading only"),
            };
            return Err(Error::new(ErrorKind::ReadOnly, what));
        }
        self.store.throttle()
    }

    fn read_blocks(&self, first: u64, buf: &mut [u8]) -> Result<()> {
        let mut state = self.device.state();
        self.read_ahead(&state, first, (buf.len() / BLOCK_SIZE) as u64);
        loop {
            match read_state(&self.store, &state, self.device.level(), first, buf) {
                Ok(()) => return Ok(()),
                Err(Miss::Error(e)) => {
                    self.device.check_alive()?;
                    // Moved onto a sealed root meanwhile: the old root's nodes may have been collected.
                    let now = self.device.state();
                    if now.root == state.root {
                        return Err(e);
                    }
                    state = now;
                }
                Err(Miss::Released) => {
                    self.device.check_alive()?;
                    // Sealed meanwhile: the present state says where it is now.
                    let now = self.device.state();
                    if now.overlay.same(&state.overlay) {
                        let what = format!("{} refers to a part of the log that is gone", self.device.source);
                        return Err(Error::damaged(what));
                    }
                    state = now;
                }
            }
        }
    }

    /// Has what follows a sequential read loaded before it is asked for.
    fn read_ahead(&self, state: &State, first: u64, len: u64) {
        let options = &self.store.options;
        let window = options.read_ahead_bytes.min(options.cache_bytes / 16) / BLOCK_BYTES;
        for part in self.device.streams.note(first, len, self.device.size_blocks, window) {
            let (store, state, level) = (self.store.clone(), state.clone(), self.device.level());
            self.store.workers.offer(move || {
                if !part.is_stale() {
                    read_ahead(&store, &state, level, part.blocks);
                }
            });
        }
    }

    /// One record of whole blocks.
    fn write_blocks(&self, block: u64, data: &[u8]) -> Result<()> {
        let crcs: Arc<[u32]> = data.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect();
        let _order = self.device.stop_writes();
        self.append_data(block, data, crcs)
    }

    /// Part of one block: read, change, write, with other writers kept out.
    fn patch(&self, block: u64, skip: usize, data: &[u8]) -> Result<()> {
        let _order = self.device.stop_writes();
        let mut bytes = [0; BLOCK_SIZE];
        self.read_blocks(block, &mut bytes)?;
        bytes[skip..skip + data.len()].copy_from_slice(data);
        self.append_data(block, &bytes, [crc32c::crc32c(&bytes)].into())
    }

    fn append_data(&self, block: u64, data: &[u8], crcs: Arc<[u32]>) -> Result<()> {
        let count = crcs.len() as u64;
        let appended = self.append(RecordKind::Write, block, count, &crcs, data)?;
        let content = Content::Data { payload: appended.payload, crcs, first: 0 };
        self.device.apply(block, Extent { len: count, record: appended.record, content });
        Ok(())
    }

    fn zero_blocks(&self, block: u64, count: u64) -> Result<()> {
        let _order = self.device.stop_writes();
        let appended = self.append(RecordKind::Zero, block, count, &[], &[])?;
        self.device.apply(block, Extent { len: count, record: appended.record, content: Content::Zero });
        Ok(())
    }

    fn append(
        &self,
        kind: RecordKind,
        block: u64,
        count: u64,
        checksums: &[u32],
        payload: &[u8],
    ) -> Result<crate::log::Appended> {
        self.device.check_alive()?;
        let Source::Disk(DiskId(disk)) = self.device.source else {
            return Err(Error::new(ErrorKind::ReadOnly, "a snapshot takes no writes"));
        };
        self.store.log.append(&Record { kind, disk, block, count, checksums, payload })
    }
}

/// Why a state could not be read.
enum Miss {
    /// It refers to a log segment that is gone: the state is out of date.
    Released,
    Error(Error),
}

impl From<Error> for Miss {
    fn from(e: Error) -> Self {
        Self::Error(e)
    }
}

/// Reads whole blocks of a state: overlay first, then the map.
fn read_state(store: &Inner, state: &State, level: u32, first: u64, buf: &mut [u8]) -> std::result::Result<(), Miss> {
    let place = |block: u64, len: u64| {
        let at = (block - first) as usize * BLOCK_SIZE;
        at..at + len as usize * BLOCK_SIZE
    };
    // What the map has to give: block, blocks, address.
    let mut stored: Vec<(u64, u64, BlockId)> = Vec::new();
    state.overlay.pieces(first, (buf.len() / BLOCK_SIZE) as u64, |start, len, extent| {
        let Some(extent) = extent else {
            return map::pieces(&*store.blocks, state.root, level, start, len, &mut |start, len, block| {
                if block.is_none() {
                    buf[place(start, len)].fill(0);
                } else {
                    stored.push((start, len, block));
                }
                Ok::<_, Miss>(())
            });
        };
        match extent.content {
            Content::Zero => buf[place(start, len)].fill(0),
            Content::Data { payload, crcs, first } => {
                read_log(store, payload, &crcs[first as usize..], &mut buf[place(start, len)])?;
            }
        }
        Ok(())
    })?;
    if stored.len() > 1 || stored.first().is_some_and(|(_, len, _)| *len > 1) {
        let runs: Vec<_> = stored.iter().map(|(_, len, block)| (*block, *len)).collect();
        store.blocks.prefetch(&store.workers, &runs);
    }
    for (start, len, block) in stored {
        store.blocks.read(block, &mut buf[place(start, len)])?;
    }
    Ok(())
}

/// Loads what the map has of these blocks into the cache, and tells the medium of what is in the log. Failures show when
/// the blocks are read.
fn read_ahead(store: &Inner, state: &State, level: u32, blocks: Range<u64>) {
    let mut stored: Vec<(BlockId, u64)> = Vec::new();
    let found = state.overlay.pieces(blocks.start, blocks.end - blocks.start, |start, len, extent| {
        match extent.map(|e| e.content) {
            None => map::pieces(&*store.blocks, state.root, level, start, len, &mut |_, len, block| {
                if !block.is_none() {
                    stored.push((block, len));
                }
                Ok::<_, Error>(())
            })?,
            Some(Content::Data { payload, .. }) => store.log.will_read(payload, len * BLOCK_BYTES),
            Some(Content::Zero) => {}
        }
        Ok::<_, Error>(())
    });
    if found.is_ok() {
        store.blocks.read_ahead(&stored);
    }
}

/// Reads and verifies blocks in the log.
fn read_log(store: &Inner, payload: LogPos, crcs: &[u32], buf: &mut [u8]) -> std::result::Result<(), Miss> {
    if !store.log.read(payload, buf)? {
        return Err(Miss::Released);
    }
    verify(payload, crcs, buf)?;
    Ok(())
}

/// Are the blocks what they were when they were written?
pub(crate) fn verify(payload: LogPos, crcs: &[u32], blocks: &[u8]) -> Result<()> {
    for (i, (block, crc)) in blocks.chunks(BLOCK_SIZE).zip(crcs).enumerate() {
        if crc32c::crc32c(block) != *crc {
            let at = payload.0 + i as u64 * BLOCK_BYTES;
            return Err(Error::damaged(format!("the log is damaged: the block at position {at} fails its checksum")));
        }
    }
    Ok(())
}
