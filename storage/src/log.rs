//! The shared write-ahead log: segment files that take every disk's writes and every transaction, in one order.
//!
//! # Durability
//! [`Log::append`] puts a record into a buffer in memory and gives it a position; readers see it from then on.
//! [`Log::flush`] makes everything before a position durable. Whoever flushes first leads: it writes all that is
//! buffered with one append and one sync, for all who wait (group commit); who comes meanwhile shares the next round.
//!
//! The order on disk is the order of positions: a segment is synced before anything is written to the next, so that
//! what recovery finds is always a prefix. Crash cases, by the last step that was done:
//! 1. appended: the record is lost; nobody was told that it is durable;
//! 2. written, not synced: any part of it may be there; a record counts only whole, so it is there or not;
//! 3. synced: it is there. `flush` answers only now.
//!
//! A write that fails (no space, I/O error) leaves the buffer as it was and is tried again at the next flush. A *sync*
//! that fails poisons the log: what the kernel dropped cannot be known, so nothing is accepted until it is reopened.
//!
//! Space is reserved before a record is accepted, so a full file system refuses new writes rather than lose old ones.

mod replay;

use crate::block::LogPos;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{RecordHeader, RecordKind, SegmentHeader, StoreUuid};
use crate::medium::{File, Medium, Mode, WriteSyncError};
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) use replay::Replayed;

/// The log's directory on the medium.
pub(crate) const DIR: &str = "log";
/// Bytes after which a new segment begins. A segment can be longer by one record.
const SEGMENT_BYTES: u64 = 64 << 20;
/// Space is reserved in steps of this many bytes.
const ALLOCATE_BYTES: u64 = 4 << 20;
/// A sync of at most this many bytes has blocks to write to that were written before: see [`Segment::write_ahead`].
const SMALL_BYTES: u64 = 256 << 10;
/// Zeroes written ahead of small syncs at a time.
const AHEAD_BYTES: u64 = 1 << 20;
/// Buffered bytes at which a writer hands the buffer to the file without waiting for a flush.
const WRITE_BYTES: usize = 1 << 20;
/// Buffered bytes at which a writer waits for the file.
const BUFFER_BYTES: usize = 16 << 20;
/// Emptied buffers that are kept: fresh memory costs a page fault every 4 KiB.
const SPARE_BUFFERS: usize = 2;
/// Buffers of more than this are not kept.
const SPARE_BYTES: usize = 2 * WRITE_BYTES + RecordHeader::BYTES;

struct Segment {
    number: u64,
    base: LogPos,
    file: Arc<dyn File>,
    /// Bytes of the file that are reserved.
    allocated: AtomicU64,
    /// Bytes of the file that were written, if only with zeroes. Changed by leaders only.
    written: AtomicU64,
    /// Bytes of the file that the kernel has been told to put on disk. Changed by leaders only.
    behind: AtomicU64,
}

impl Segment {
    fn new(number: u64, base: LogPos, file: Arc<dyn File>, allocated: u64) -> Self {
        let [allocated, written, behind] = [allocated, 0, 0].map(AtomicU64::new);
        Self { number, base, file, allocated, written, behind }
    }

    /// Has the kernel begin to put on disk what was written up to `end`, once that is worth a request of its own: small
    /// records that are handed over one by one would be as many writes of the same blocks.
    fn write_behind(&self, end: u64) {
        let from = self.behind.load(Ordering::Relaxed);
        if end.saturating_sub(from) >= WRITE_BYTES as u64 {
            self.file.start_writeback(from, end - from);
            self.behind.store(end, Ordering::Relaxed);
        }
    }

    /// Prepares a small sync of `len` bytes at `offset`: when it reaches blocks that were only reserved so far, zeroes are
    /// written to these and some more behind. The first write to a reserved block makes the file system commit its
    /// journal at the sync; now one sync in many pays for that. A reader of the log finds zeroes behind the last record
    /// either way.
    fn write_ahead(&self, offset: u64, len: u64) {
        let end = offset + len;
        let written = self.written.load(Ordering::Relaxed).max(offset);
        let ahead = (end + AHEAD_BYTES).min(self.allocated.load(Ordering::Relaxed));
        if len > SMALL_BYTES || end <= written || ahead <= end {
            return;
        }
        // A failure matters only if the write of the records fails as well.
        if self.file.write_at(&ZEROES[..(ahead - end) as usize], end).is_ok() {
            self.written.store(ahead, Ordering::Relaxed);
        }
    }
}

static ZEROES: [u8; AHEAD_BYTES as usize] = [0; AHEAD_BYTES as usize];

/// Bytes of one segment that are not known to be in its file.
struct Tail {
    segment: Arc<Segment>,
    base: LogPos,
    bytes: Vec<u8>,
}

impl Tail {
    fn end(&self) -> LogPos {
        self.base.plus(self.bytes.len() as u64)
    }
}

struct State {
    /// Where the next record goes.
    end: LogPos,
    /// Everything before is durable.
    durable: LogPos,
    /// The segment that takes records; `None` after a rotation, until the next record.
    open: Option<Arc<Segment>>,
    next_number: u64,
    /// Appended, not yet taken by a leader. Only the last one grows.
    tails: Vec<Tail>,
    /// Taken by a leader; stays here until it is in the file, also when the write fails.
    writing: Vec<Arc<Tail>>,
    /// Emptied buffers.
    spare: Vec<Vec<u8>>,
    /// A segment with writes that were not synced.
    unsynced: Option<Arc<Segment>>,
    /// Segments made since the log was opened, and how many of their names are durable.
    made: u64,
    names_durable: u64,
    leader: bool,
    /// Rounds begun so far.
    round: u64,
    /// What the round under way makes durable; nothing when it only writes.
    goal: LogPos,
    poison: Option<Error>,
}

/// See the module.
pub(crate) struct Log {
    medium: Arc<dyn Medium>,
    store: StoreUuid,
    state: Mutex<State>,
    /// Those who wait for the end of a round, by its number's parity: who shares the round under way is woken when it is
    /// done, and of those who wait for the next one only its leader.
    led: [Condvar; 2],
    segments: RwLock<BTreeMap<LogPos, Arc<Segment>>>,
    syncs: AtomicU64,
}

/// Where a record and its payload are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Appended {
    pub record: LogPos,
    pub payload: LogPos,
}

/// A record to append. Its checksum table is computed by the caller, outside of the log's lock.
pub(crate) struct Record<'a> {
    pub kind: RecordKind,
    pub disk: u64,
    pub block: u64,
    pub count: u64,
    pub checksums: &'a [u32],
    pub payload: &'a [u8],
}

impl Log {
    /// Position just behind the last record.
    pub fn end(&self) -> LogPos {
        self.state.lock().end
    }

    /// Bytes between the oldest segment and the end.
    pub fn live_bytes(&self) -> u64 {
        let oldest = self.segments.read().keys().next().copied();
        oldest.map_or(0, |oldest| self.end().0 - oldest.0)
    }

    /// Has something been appended since the log was opened that is not released?
    pub fn holds_new_records(&self) -> bool {
        let made = self.state.lock().made;
        made > 0 && self.live_bytes() > 0
    }

    /// Syncs done so far: what a group commit costs.
    pub fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    /// Fails when the log is poisoned.
    pub fn healthy(&self) -> Result<()> {
        self.state.lock().poison.clone().map_or(Ok(()), Err)
    }

    /// Appends a record: visible to readers at once, durable after a [`Log::flush`] beyond it.
    pub fn append(&self, record: &Record<'_>) -> Result<Appended> {
        let mut state = self.state.lock();
        loop {
            if let Some(poison) = &state.poison {
                return Err(poison.clone());
            }
            if state.buffered() < BUFFER_BYTES {
                break;
            }
            state = if state.leader { self.wait(state, LogPos(0)) } else { self.lead(state, false)? };
        }
        let mut header = RecordHeader {
            kind: record.kind,
            pos: state.end,
            durable: state.durable,
            disk: record.disk,
            block: record.block,
            count: record.count,
            payload: record.payload.len() as u32,
        };
        self.make_room(&mut state, header.record_bytes())?;
        header.pos = state.end;
        let tail = state.tail()?;
        header.encode(&self.store, record.checksums, &mut tail.bytes);
        tail.bytes.extend_from_slice(record.payload);
        state.end = header.pos.plus(header.record_bytes());
        Ok(Appended { record: header.pos, payload: header.pos.plus(header.payload_offset() as u64) })
    }

    /// Hands the buffer to the file if it has grown large, so that a long run of writes without a flush neither fills
    /// memory nor makes the next flush slow. Called without any lock held. Its errors come up again at the next flush.
    pub fn write_behind(&self) {
        let state = self.state.lock();
        if state.buffered() >= WRITE_BYTES && !state.leader && state.poison.is_none() {
            drop(self.lead(state, false));
        }
    }

    /// Sees that everything before `upto` is in the files, where it survives this process. Not a sync: it does not survive
    /// the host.
    pub fn hand_over(&self, upto: LogPos) -> Result<()> {
        let mut state = self.state.lock();
        loop {
            let kept = state.writing.first().map(|tail| tail.base).or(state.tails.first().map(|tail| tail.base));
            if kept.is_none_or(|kept| kept >= upto) {
                return Ok(());
            }
            if let Some(poison) = &state.poison {
                return Err(poison.clone());
            }
            // Any round's end will do, so nobody who waits for the next round to be led is woken in its place.
            state = if state.leader { self.wait(state, LogPos(0)) } else { self.lead(state, false)? };
        }
    }

    /// Makes everything before `upto` durable; see the module.
    pub fn flush(&self, upto: LogPos) -> Result<()> {
        let mut state = self.state.lock();
        loop {
            if state.durable >= upto {
                return Ok(());
            }
            if let Some(poison) = &state.poison {
                return Err(poison.clone());
            }
            state = if state.leader { self.wait(state, upto) } else { self.lead(state, true)? };
        }
    }

    /// Fills `buf` with log bytes from `pos` on, all of them within one record. `false`: that segment has been released,
    /// so what the caller knows of the disk is out of date.
    pub fn read(&self, pos: LogPos, buf: &mut [u8]) -> Result<bool> {
        {
            let state = self.state.lock();
            let writing = state.writing.iter().map(|t| &**t);
            if let Some(tail) = writing.chain(&state.tails).find(|t| t.base <= pos && pos < t.end()) {
                let at = (pos.0 - tail.base.0) as usize;
                buf.copy_from_slice(&tail.bytes[at..at + buf.len()]);
                return Ok(true);
            }
        }
        let Some(segment) = self.segments.read().range(..=pos).next_back().map(|(_, s)| s.clone()) else {
            return Ok(false);
        };
        match segment.file.read_at(buf, pos.0 - segment.base.0) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(Error::damaged(format!("log segment {:016x} is shorter than what it holds", segment.number)))
            }
            Err(e) => Err(Error::io(format!("cannot read log segment {:016x}", segment.number), e)),
        }
    }

    /// Tells the medium that `len` bytes from `pos` on, all of them within one record, will be read soon.
    pub fn will_read(&self, pos: LogPos, len: u64) {
        if let Some((_, segment)) = self.segments.read().range(..=pos).next_back() {
            segment.file.will_read(pos.0 - segment.base.0, len);
        }
    }

    /// Makes the log durable up to here; its files, the oldest first, and how many bytes of each are. None of them may be
    /// released meanwhile.
    pub fn durable_files(&self) -> Result<Vec<(String, u64)>> {
        self.flush(self.end())?;
        let durable = self.state.lock().durable;
        let segments = self.segments.read();
        let ends = segments.keys().skip(1).copied().chain([durable]);
        let files = segments.values().zip(ends).filter(|(segment, _)| segment.base < durable);
        Ok(files.map(|(segment, end)| (file_name(segment.number), end.min(durable).0 - segment.base.0)).collect())
    }

    /// Ends the current segment: records from now on go to a new one. Returns where that begins.
    pub fn rotate(&self) -> LogPos {
        let mut state = self.state.lock();
        state.open = None;
        state.end
    }

    /// Forgets everything before `upto`, a position that [`Log::rotate`] returned and up to which all is kept elsewhere,
    /// durably. Returns the bytes given back.
    pub fn release(&self, upto: LogPos) -> u64 {
        {
            let mut state = self.state.lock();
            state.durable = state.durable.max(upto);
            // Who was to lead the next round may have nothing left to lead it for.
            self.wake_all();
        }
        let released: Vec<_> = {
            let mut segments = self.segments.write();
            let kept = segments.split_off(&upto);
            std::mem::replace(&mut *segments, kept).into_values().collect()
        };
        let mut bytes = 0;
        for segment in released {
            bytes += segment.file.file_bytes().unwrap_or(0);
            if let Err(e) = self.medium.remove(&file_name(segment.number)) {
                // It is from before the log's beginning: the next start removes it.
                tracing::warn!("cannot remove log segment {:016x}: {e}", segment.number);
            }
        }
        bytes
    }

    /// Waits until the round under way is over or, when that does not make `upto` durable, until the next is to be led or
    /// is over.
    fn wait<'a>(&self, mut state: MutexGuard<'a, State>, upto: LogPos) -> MutexGuard<'a, State> {
        let round = state.round + u64::from(upto > state.goal);
        self.led[round as usize % 2].wait(&mut state);
        state
    }

    fn wake_all(&self) {
        for condvar in &self.led {
            condvar.notify_all();
        }
    }

    /// Makes the open segment take `bytes` more, reserving space and starting a segment as needed.
    fn make_room(&self, state: &mut State, bytes: u64) -> Result<()> {
        if let Some(segment) = &state.open
            && state.end.0 - segment.base.0 + bytes > SEGMENT_BYTES
        {
            state.open = None;
        }
        let no_room = |e| Error::io("the log cannot grow; free some space and try again", e);
        if state.open.is_none() {
            let number = state.next_number;
            let file = self.medium.open(&file_name(number), Mode::Create).map_err(no_room)?;
            // From here on the number is taken, also when the next step fails.
            state.next_number += 1;
            state.made += 1;
            let first = match allocate(&*file, 0, SegmentHeader::BYTES + bytes) {
                Ok(first) => first,
                Err(e) => {
                    drop(self.medium.remove(&file_name(number)));
                    return Err(no_room(e));
                }
            };
            let segment = Arc::new(Segment::new(number, state.end, file, first));
            self.segments.write().insert(segment.base, segment.clone());
            let header = SegmentHeader { store: self.store, number, base: state.end };
            state.tails.push(Tail { segment: segment.clone(), base: state.end, bytes: header.encode().to_vec() });
            state.end = state.end.plus(SegmentHeader::BYTES);
            state.open = Some(segment);
        }
        if let Some(segment) = &state.open {
            let need = state.end.0 - segment.base.0 + bytes;
            let allocated = segment.allocated.load(Ordering::Relaxed);
            if need > allocated {
                let more = allocate(&*segment.file, allocated, need - allocated).map_err(no_room)?;
                segment.allocated.store(allocated + more, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Writes everything buffered, and syncs it if asked to. The caller has seen that there is no leader.
    fn lead<'a>(&'a self, mut state: MutexGuard<'a, State>, sync: bool) -> Result<MutexGuard<'a, State>> {
        state.leader = true;
        state.round += 1;
        state.goal = if sync { state.end } else { LogPos(0) };
        let taken = std::mem::take(&mut state.tails);
        state.writing.extend(taken.into_iter().map(Arc::new));
        let tails = state.writing.clone();
        let goal = state.end;
        let durable = state.durable;
        let unsynced = state.unsynced.clone();
        let made = state.made;
        let sync_names = state.made > state.names_durable;
        drop(state);

        let outcome = self.write_out(&tails, unsynced, durable..goal, sync, sync_names);

        let mut state = self.state.lock();
        state.leader = false;
        let [shared, next] = [0, 1].map(|i| &self.led[(state.round + i) as usize % 2]);
        shared.notify_all();
        next.notify_one();
        match outcome {
            Ok(()) => {
                if let Some(last) = tails.last() {
                    state.unsynced = Some(last.segment.clone());
                }
                state.writing.clear();
                state.keep_buffers(tails);
                if sync {
                    state.unsynced = None;
                    state.durable = state.durable.max(goal);
                    state.names_durable = made;
                }
                Ok(state)
            }
            Err(WriteSyncError::Write(e)) => Err(Error::io("cannot write the log", e)),
            Err(WriteSyncError::Sync(e)) => {
                let poison = Error::caused(
                    ErrorKind::Poisoned,
                    "a sync of the log failed: the store takes no writes until it is opened again",
                    e,
                );
                state.poison = Some(poison.clone());
                self.wake_all();
                Err(poison)
            }
        }
    }

    fn write_out(
        &self,
        tails: &[Arc<Tail>],
        mut unsynced: Option<Arc<Segment>>,
        not_durable: Range<LogPos>,
        sync: bool,
        sync_names: bool,
    ) -> std::result::Result<(), WriteSyncError> {
        for (i, tail) in tails.iter().enumerate() {
            if let Some(previous) = unsynced.take_if(|s| s.number != tail.segment.number) {
                self.sync_file(&previous)?;
            }
            let offset = tail.base.0 - tail.segment.base.0;
            if sync && i + 1 == tails.len() {
                self.syncs.fetch_add(1, Ordering::Relaxed);
                tail.segment.write_ahead(offset, tail.bytes.len() as u64);
                tail.segment.file.write_sync(&tail.bytes, offset)?;
                tail.segment.behind.store(offset + tail.bytes.len() as u64, Ordering::Relaxed);
                unsynced = None;
            } else {
                tail.segment.file.write_at(&tail.bytes, offset).map_err(WriteSyncError::Write)?;
                tail.segment.write_behind(offset + tail.bytes.len() as u64);
                unsynced = Some(tail.segment.clone());
            }
        }
        if sync {
            if let Some(segment) = unsynced {
                // All of it has been handed over: what is new is what the last sync had not.
                let from = not_durable.start.0.max(segment.base.0);
                let len = not_durable.end.0 - from;
                segment.write_ahead(from - segment.base.0, len);
                self.sync_file(&segment)?;
                segment.behind.store(from - segment.base.0 + len, Ordering::Relaxed);
            }
            if sync_names {
                self.medium.sync_dir(DIR).map_err(WriteSyncError::Sync)?;
            }
        }
        Ok(())
    }

    fn sync_file(&self, segment: &Segment) -> std::result::Result<(), WriteSyncError> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        segment.file.sync().map_err(WriteSyncError::Sync)
    }

    /// The number the next segment will have.
    pub fn next_number(&self) -> u64 {
        self.state.lock().next_number
    }
}

impl State {
    /// A log whose records end here, all of them durable.
    fn new(end: LogPos, next_number: u64) -> Self {
        Self {
            end,
            durable: end,
            open: None,
            next_number,
            tails: Vec::new(),
            writing: Vec::new(),
            spare: Vec::new(),
            unsynced: None,
            made: 0,
            names_durable: 0,
            leader: false,
            round: 0,
            goal: LogPos(0),
            poison: None,
        }
    }

    fn buffered(&self) -> usize {
        self.tails.iter().map(|t| t.bytes.len()).sum::<usize>()
            + self.writing.iter().map(|t| t.bytes.len()).sum::<usize>()
    }

    /// Keeps the memory of buffers that have been written.
    fn keep_buffers(&mut self, written: Vec<Arc<Tail>>) {
        for Tail { mut bytes, .. } in written.into_iter().filter_map(Arc::into_inner) {
            if self.spare.len() < SPARE_BUFFERS && bytes.capacity() <= SPARE_BYTES {
                bytes.clear();
                self.spare.push(bytes);
            }
        }
    }

    /// The tail that takes the next record.
    fn tail(&mut self) -> Result<&mut Tail> {
        let Some(segment) = &self.open else {
            return Err(Error::new(ErrorKind::Closed, "the log has no open segment"));
        };
        let fits = self.tails.last().is_some_and(|t| t.segment.number == segment.number && t.end() == self.end);
        if !fits {
            let bytes = self.spare.pop().unwrap_or_default();
            self.tails.push(Tail { segment: segment.clone(), base: self.end, bytes });
        }
        self.tails.last_mut().ok_or_else(|| Error::new(ErrorKind::Closed, "the log has no tail"))
    }
}

/// Reserves a whole step from `offset` on or, when there is no room for that, as much as is needed. Returns the bytes.
fn allocate(file: &dyn File, offset: u64, need: u64) -> std::io::Result<u64> {
    let step = need.max(ALLOCATE_BYTES);
    match file.allocate(offset, step) {
        Ok(()) => Ok(step),
        Err(e) if e.kind() == std::io::ErrorKind::StorageFull => file.allocate(offset, need).map(|()| need),
        Err(e) => Err(e),
    }
}

fn file_name(number: u64) -> String {
    format!("{DIR}/{number:016x}.log")
}
