//! Reading the log again when a store is opened: its segments, its end, and what is damage.
//!
//! Several threads read and verify segments; the caller's thread applies their records, in the log's order.

use super::{DIR, Log, Segment, State, file_name};
use crate::block::{BLOCK_SIZE, LogPos};
use crate::error::{Error, Result};
use crate::format::{RecordHeader, RecordKind, SegmentHeader, StoreUuid};
use crate::medium::{File, Medium, Mode};
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc;

/// Bytes read at a time: little enough to be verified while they are in the processor's cache.
const CHUNK_BYTES: usize = 1 << 20;
/// Bytes announced to the medium ahead of what is read.
const AHEAD_BYTES: u64 = 8 << 20;
/// A record's header and checksum table are not longer.
const HEAD_BYTES_MAX: usize = RecordHeader::BYTES + 4 * (RecordHeader::PAYLOAD_MAX / BLOCK_SIZE);
/// Threads that read. Two keep a disk busy also where there is one core.
const READERS: std::ops::RangeInclusive<usize> = 2..=8;
/// Segments each of them is ahead of what is applied.
const SEGMENTS_AHEAD: usize = 2;

/// A whole record, verified.
pub(crate) struct Replayed {
    pub header: RecordHeader,
    pub checksums: Arc<[u32]>,
    /// Where its payload begins.
    pub payload: LogPos,
    /// The payload, if it is a transaction.
    pub transaction: Vec<u8>,
}

/// Takes a recovered record.
pub(crate) type Apply<'a> = dyn FnMut(Replayed) -> Result<()> + 'a;

/// A segment's records up to the first that is not whole, and where they end.
type Whole = (Vec<Replayed>, LogPos);

impl Log {
    /// Reads the log from `start` on, calls `apply` with each whole record, and returns the log, ready for more.
    /// `next_number` is above every segment that was ever released.
    ///
    /// The end is the first record that is not whole. It is an unfinished write, unless something says that the log had
    /// been durable beyond it: a later record by its `durable` field, or a later segment by being there, since a segment
    /// is begun only when the one before is durable. Then it is damage, and an error, since acknowledged writes are lost;
    /// with `salvage` it is the end all the same.
    pub fn recover(
        medium: Arc<dyn Medium>,
        store: StoreUuid,
        start: LogPos,
        next_number: u64,
        salvage: bool,
        apply: &mut Apply<'_>,
    ) -> Result<Self> {
        let (found, next_number) = list_segments(&*medium, &store, start, next_number)?;
        let mut end = start;
        let mut kept = BTreeMap::new();
        let mut unneeded = Vec::new();
        let note = |e: Error| {
            if !salvage {
                return Err(e);
            }
            tracing::error!("going on all the same: {e}");
            Ok(())
        };
        in_order(&store, &found, &mut |segment, whole| {
            let Some(base) = segment.base.filter(|base| *base == end) else {
                // Either begins behind the end, or has lost its header.
                let testimony = latest_durable(&store, &read_all(segment)?, 0).max(segment.base).unwrap_or(start);
                if testimony > end {
                    note(damaged(end, segment.number, testimony))?;
                }
                unneeded.push(segment.number);
                return Ok(());
            };
            let (records, upto) = whole;
            records.into_iter().try_for_each(&mut *apply)?;
            end = upto;
            kept.insert(base, segment);
            Ok(())
        })?;
        let last = kept.last_key_value().map(|(base, segment)| (*base, *segment));
        if let Some((base, segment)) = last {
            let data = read_all(segment)?;
            let valid = (end.0 - base.0) as usize;
            if let Some(testimony) = latest_durable(&store, &data, valid)
                && testimony > end
            {
                note(damaged(end, segment.number, testimony))?;
            }
            // What the page cache has need not be on disk, not even when a sync says so, if an earlier sync failed.
            // Writing it again makes the sync mean something. Segments before the last were durable when it was begun.
            let cannot = |e| Error::io("cannot make the recovered log durable", e);
            segment.file.write_at(&data[..valid], 0).map_err(cannot)?;
            // Records from now on go to a new segment: what is reserved in this one would only take space.
            segment.file.truncate(valid as u64).map_err(cannot)?;
            segment.file.sync().map_err(cannot)?;
        }
        for number in &unneeded {
            medium.remove(&file_name(*number)).map_err(|e| Error::io("cannot remove a log segment", e))?;
        }
        if !unneeded.is_empty() || last.is_some() {
            medium.sync_dir(DIR).map_err(|e| Error::io("cannot sync the log's directory", e))?;
        }
        let kept = kept.into_iter().map(|(base, s)| (base, Arc::new(Segment::new(s.number, base, s.file.clone(), 0))));
        let segments = RwLock::new(kept.collect());
        let state = Mutex::new(State::new(end, next_number));
        Ok(Self { medium, store, state, led: Default::default(), segments, syncs: AtomicU64::new(0) })
    }
}

/// Calls `take` with each segment in turn and its records, which some threads read ahead of it.
fn in_order<'a>(
    store: &StoreUuid,
    segments: &'a [Found],
    take: &mut dyn FnMut(&'a Found, Whole) -> Result<()>,
) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let readers = cores.clamp(*READERS.start(), *READERS.end()).min(segments.len());
    std::thread::scope(|scope| {
        let mut results = Vec::new();
        for reader in 0..readers {
            let (send, receive) = mpsc::sync_channel(SEGMENTS_AHEAD);
            results.push(receive);
            let read = move || {
                let mut chunk = Vec::new();
                // A failed send: the caller has met an error.
                _ = segments
                    .iter()
                    .skip(reader)
                    .step_by(readers)
                    .try_for_each(|segment| send.send(read_segment(store, segment, &mut chunk)));
            };
            std::thread::Builder::new()
                .name("recover".into())
                .spawn_scoped(scope, read)
                .map_err(|e| Error::io("cannot start a thread that reads the log", e))?;
        }
        for (i, segment) in segments.iter().enumerate() {
            let whole = results[i % readers].recv();
            take(segment, whole.unwrap_or_else(|_| Err(Error::damaged("a thread that reads the log has failed")))?)?;
        }
        Ok(())
    })
}

/// Reads and verifies a segment. `chunk` is memory to use.
fn read_segment(store: &StoreUuid, segment: &Found, chunk: &mut Vec<u8>) -> Result<Whole> {
    let mut records = Vec::new();
    let Some(base) = segment.base else { return Ok((records, LogPos(0))) };
    let file_bytes = segment.file.file_bytes().map_err(|e| cannot_read(segment, e))?;
    let mut window = Window { segment, file_bytes, chunk, start: 0, filled: 0 };
    let mut at = SegmentHeader::BYTES;
    while let Some(record) = window.record(store, base, at)? {
        at += record.header.record_bytes();
        records.push(record);
    }
    Ok((records, base.plus(at)))
}

/// A part of a segment's file in memory.
struct Window<'a> {
    segment: &'a Found,
    file_bytes: u64,
    chunk: &'a mut Vec<u8>,
    /// Offset of the chunk in the file.
    start: u64,
    /// Bytes of the chunk that were read.
    filled: usize,
}

impl Window<'_> {
    /// The `len` bytes at `offset`, which only ever goes up; `None` where the file ends before that.
    fn bytes(&mut self, offset: u64, len: usize) -> Result<Option<&[u8]>> {
        if offset + len as u64 > self.file_bytes {
            return Ok(None);
        }
        if offset + len as u64 > self.start + self.filled as u64 {
            self.move_to(offset, len)?;
        }
        let at = (offset - self.start) as usize;
        Ok(Some(&self.chunk[at..at + len]))
    }

    fn move_to(&mut self, offset: u64, need: usize) -> Result<()> {
        // What is left of the chunk moves to its beginning.
        let skip = ((offset - self.start) as usize).min(self.filled);
        self.chunk.copy_within(skip..self.filled, 0);
        let left = self.filled - skip;
        let want = (need.max(CHUNK_BYTES) as u64).min(self.file_bytes - offset) as usize;
        if self.chunk.len() < want {
            self.chunk.resize(want, 0);
        }
        let (file, from) = (&self.segment.file, offset + left as u64);
        let read = file.read_at(&mut self.chunk[left..want], from);
        read.map_err(|e| cannot_read(self.segment, e))?;
        (self.start, self.filled) = (offset, want);
        file.will_read(offset + want as u64 + AHEAD_BYTES - CHUNK_BYTES as u64, CHUNK_BYTES as u64);
        Ok(())
    }

    /// The record at `at`, if there is a whole one that belongs there.
    fn record(&mut self, store: &StoreUuid, base: LogPos, at: u64) -> Result<Option<Replayed>> {
        let head_bytes = (self.file_bytes.saturating_sub(at)).min(HEAD_BYTES_MAX as u64) as usize;
        let decoded = self.bytes(at, head_bytes)?.and_then(|bytes| RecordHeader::decode(store, bytes));
        let Some((header, checksums)) = decoded.filter(|(header, _)| header.pos == base.plus(at)) else {
            return Ok(None);
        };
        let payload_at = at + header.payload_offset() as u64;
        let mut transaction = Vec::new();
        match header.kind {
            RecordKind::Zero => {}
            RecordKind::Write => {
                for (i, crc) in checksums.iter().enumerate() {
                    let block = self.bytes(payload_at + (i * BLOCK_SIZE) as u64, BLOCK_SIZE)?;
                    if block.is_none_or(|block| crc32c::crc32c(block) != *crc) {
                        return Ok(None);
                    }
                }
            }
            RecordKind::Transaction => match self.bytes(payload_at, header.payload as usize)? {
                Some(payload) if intact(&header, &checksums, payload) => transaction.extend_from_slice(payload),
                _ => return Ok(None),
            },
        }
        Ok(Some(Replayed { header, checksums, payload: base.plus(payload_at), transaction }))
    }
}

fn parse_name(name: &str) -> Option<u64> {
    u64::from_str_radix(name.strip_suffix(".log")?, 16).ok()
}

/// A segment's file, as found when opening; `base` is `None` when the header cannot be read.
struct Found {
    number: u64,
    base: Option<LogPos>,
    file: Arc<dyn File>,
}

/// The segments from `start` on, in order; those before it were released and are removed. Also the next free number.
fn list_segments(
    medium: &dyn Medium,
    store: &StoreUuid,
    start: LogPos,
    mut next_number: u64,
) -> Result<(Vec<Found>, u64)> {
    let mut found = Vec::new();
    for (name, _) in medium.list(DIR).map_err(|e| Error::io("cannot list the log", e))? {
        let Some(number) = parse_name(&name) else { continue };
        next_number = next_number.max(number + 1);
        let cannot = |e| Error::io(format!("cannot open log segment {number:016x}"), e);
        let file = medium.open(&file_name(number), Mode::Modify).map_err(cannot)?;
        let mut head = [0; SegmentHeader::BYTES as usize];
        let header = match file.read_at(&mut head, 0) {
            Ok(()) => SegmentHeader::decode(&head)?,
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => None,
            Err(e) => return Err(cannot(e)),
        };
        match header {
            Some(h) if h.store != *store || h.number != number => {
                return Err(Error::damaged(format!("log segment {number:016x} belongs to another store or place")));
            }
            Some(h) if h.base < start => {
                medium.remove(&file_name(number)).map_err(|e| Error::io("cannot remove an old log segment", e))?;
            }
            header => found.push(Found { number, base: header.map(|h| h.base), file }),
        }
    }
    found.sort_by_key(|f| f.number);
    Ok((found, next_number))
}

fn damaged(end: LogPos, segment: u64, testimony: LogPos) -> Error {
    Error::damaged(format!(
        "the log is damaged at position {}, as segment {segment:016x} shows: writes up to {} had been made durable; \
         restore the state directory from a backup, or go on without them by `miosa store repair`",
        end.0, testimony.0
    ))
}

fn cannot_read(segment: &Found, e: std::io::Error) -> Error {
    Error::io(format!("cannot read log segment {:016x}", segment.number), e)
}

fn read_all(segment: &Found) -> Result<Vec<u8>> {
    let bytes = segment.file.file_bytes().map_err(|e| cannot_read(segment, e))?;
    let mut data = vec![0; bytes as usize];
    segment.file.read_at(&mut data, 0).map_err(|e| cannot_read(segment, e))?;
    Ok(data)
}

/// Is the payload what the checksum table says?
fn intact(header: &RecordHeader, checksums: &[u32], payload: &[u8]) -> bool {
    match header.kind {
        RecordKind::Zero => true,
        RecordKind::Transaction => checksums == [crc32c::crc32c(payload)],
        RecordKind::Write => {
            let blocks = payload.chunks(BLOCK_SIZE).map(crc32c::crc32c);
            blocks.eq(checksums.iter().copied())
        }
    }
}

/// The whole, intact record at `at`, if there is one.
fn record_at(store: &StoreUuid, data: &[u8], at: usize) -> Option<RecordHeader> {
    let (header, checksums) = RecordHeader::decode(store, data.get(at..)?)?;
    let payload_at = at + header.payload_offset();
    let payload = data.get(payload_at..payload_at + header.payload as usize)?;
    intact(&header, &checksums, payload).then_some(header)
}

/// The furthest durable position that any intact record from `from` bytes on testifies to.
fn latest_durable(store: &StoreUuid, data: &[u8], from: usize) -> Option<LogPos> {
    let magic = RecordHeader::magic();
    let mut found = None;
    let mut at = from;
    while let Some(skip) = data.get(at..).and_then(|rest| rest.windows(4).position(|w| w == magic)) {
        at += skip;
        match record_at(store, data, at) {
            Some(header) => {
                found = found.max(Some(header.durable));
                at += header.record_bytes() as usize;
            }
            None => at += 1,
        }
    }
    found
}
