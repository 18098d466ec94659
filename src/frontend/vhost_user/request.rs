//! One virtio-blk request: from a descriptor chain to a call on the disk and a status byte.
//!
//! The guest writes all of this and may rewrite it while we look. So each descriptor and the header are copied once and
//! judged on the copy; a chain is bounded in descriptors and must end; sector and length are added up with checks
//! before anything is touched; and whatever is wrong, the answer goes into the status byte of this request and the
//! device lives on. Framing carries no meaning (VIRTIO_F_VERSION_1): readable bytes are one stream, writable bytes
//! another, and the status is the last writable byte.

use super::memory::GuestRam;
use crate::frontend::{Device, log_storage_error, virtio_status};
use std::ops::Deref;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// The unit of every sector number in virtio-blk, whatever the block size.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Ranges in one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 64;
/// Length of the answer to GET_ID.
pub(super) const SERIAL_BYTES: usize = 20;
/// Descriptors of one chain. The longest ring is as long; an indirect table may not be longer than the ring.
const MAX_DESCRIPTORS: usize = 1024;
/// Data moves through a buffer of this size, so that a request's memory is bounded whatever its length.
const BUFFER_BYTES: usize = 1 << 20;
const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

/// Why a request was not carried out.
enum Failure {
    /// The status says it all; the guest's mistake.
    Status(u32),
    /// The guest's memory is not where the request says, or is gone.
    Memory,
    /// The store refused, and this call said so.
    Storage(&'static str, storage::Error),
}

impl From<vm_memory::GuestMemoryError> for Failure {
    fn from(_: vm_memory::GuestMemoryError) -> Self {
        Self::Memory
    }
}

const MALFORMED: Failure = Failure::Status(VIRTIO_BLK_S_IOERR);
const UNSUPPORTED: Failure = Failure::Status(VIRTIO_BLK_S_UNSUPP);

/// A piece of guest memory that one descriptor names. Not yet checked to exist.
#[derive(Clone, Copy)]
struct Segment {
    address: GuestAddress,
    len: usize,
}

/// What a chain names, in order, and whether it was well-formed.
#[derive(Default)]
struct Segments {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Segments {
    /// Takes the chain apart. On a malformed one returns false and keeps what came before the fault, so that a status
    /// can be written if there is a place for it.
    fn gather<M>(&mut self, chain: DescriptorChain<M>) -> bool
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        self.readable.clear();
        self.writable.clear();
        let mut unfinished = true;
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return false;
            }
            // The iterator ends silently on a bad index, a loop or a bad indirect table: then the last descriptor it
            // gave still names a next one.
            unfinished = descriptor.has_next();
            let segment = Segment { address: descriptor.addr(), len: descriptor.len() as usize };
            if segment.len == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                self.writable.push(segment);
            } else if self.writable.is_empty() {
                self.readable.push(segment);
            } else {
                return false;
            }
        }
        !unfinished
    }
}

/// A position in a stream of segments.
struct Cursor<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that are used up.
    used: usize,
    remaining: u64,
}

impl<'a> Cursor<'a> {
    fn new(segments: &'a [Segment]) -> Self {
        Self { segments, used: 0, remaining: segments.iter().map(|s| s.len as u64).sum() }
    }

    /// Calls `copy` with guest addresses and the parts of `0..len` that belong there. `len` is at most `remaining`.
    fn advance(
        &mut self,
        len: usize,
        mut copy: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut done = 0;
        while done < len {
            let [segment, rest @ ..] = self.segments else { return Err(MALFORMED) };
            let part = (segment.len - self.used).min(len - done);
            let address = segment.address.checked_add(self.used as u64).ok_or(Failure::Memory)?;
            copy(address, done..done + part)?;
            done += part;
            self.used += part;
            if self.used == segment.len {
                self.segments = rest;
                self.used = 0;
            }
        }
        self.remaining -= len as u64;
        Ok(())
    }

    fn read(&mut self, memory: &GuestMemoryMmap<()>, into: &mut [u8]) -> Result<(), Failure> {
        self.advance(into.len(), |address, part| Ok(memory.read_slice(&mut into[part], address)?))
    }

    fn write(&mut self, memory: &GuestMemoryMmap<()>, from: &[u8]) -> Result<(), Failure> {
        self.advance(from.len(), |address, part| Ok(memory.write_slice(&from[part], address)?))
    }
}

/// What a request came to; the guest is not told yet.
pub(super) struct Outcome {
    /// Bytes of guest memory written, the status included.
    written: u32,
    status: u8,
    /// Where the status goes; none if the request has no room for one.
    status_at: Option<GuestAddress>,
    /// What it wrote to the disk is in this process alone: see [`BlockDevice::hand_over`].
    held: bool,
}

impl Outcome {
    /// Whether it has to be handed over before it is answered.
    pub(super) fn is_held(&self) -> bool {
        self.held
    }
}

/// The device as one queue sees it.
pub(super) struct BlockDevice {
    disk: Device,
    serial: [u8; SERIAL_BYTES],
    /// The driver did not take VIRTIO_BLK_F_FLUSH, so it cannot ask: a completed write has to be durable.
    write_through: bool,
    segments: Segments,
    buffer: Vec<u8>,
    /// Of the request being carried out.
    held: bool,
}

impl BlockDevice {
    pub(super) fn new(disk: Device, serial: [u8; SERIAL_BYTES], write_through: bool) -> Self {
        Self { disk, serial, write_through, segments: Segments::default(), buffer: Vec::new(), held: false }
    }

    /// Carries one request out. Its outcome is not in guest memory before [`BlockDevice::answer`].
    pub(super) fn execute<M>(&mut self, ram: &GuestRam, chain: DescriptorChain<M>) -> Outcome
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        // Taken out for the borrow checker, put back for its allocation.
        let mut segments = std::mem::take(&mut self.segments);
        let whole = segments.gather(chain);
        let outcome = match segments.writable.last().copied() {
            Some(last) => {
                self.held = false;
                let done = if whole { self.request(ram, &mut segments) } else { Err(MALFORMED) };
                let (status, data) = match done {
                    Ok(data) => (VIRTIO_BLK_S_OK as u8, data),
                    Err(failure) => (status_of(failure), 0),
                };
                let status_at = last.address.checked_add(last.len as u64 - 1);
                Outcome { written: data.saturating_add(1), status, status_at, held: self.held }
            }
            None => {
                tracing::debug!("vhost-user-blk request without room for a status");
                Outcome { written: 0, status: 0, status_at: None, held: false }
            }
        };
        self.segments = segments;
        outcome
    }

    /// Sees that what these requests wrote survives this process, all at once. The guest goes on when this process dies,
    /// and never knows: what it was told is written must not be in this process alone.
    pub(super) fn hand_over<'a>(&self, outcomes: impl Iterator<Item = &'a mut Outcome>) {
        let mut held = outcomes.filter(|outcome| outcome.held).peekable();
        if held.peek().is_none() {
            return;
        }
        let failed = self.disk.hand_over().err().map(|e| status_of(Failure::Storage("write", e)));
        for outcome in held {
            outcome.held = false;
            if let Some(status) = failed {
                outcome.status = status;
            }
        }
    }

    /// Puts an outcome that is not held into guest memory, and returns how many bytes of that were written in all, which is
    /// what the used ring says.
    pub(super) fn answer(&self, ram: &GuestRam, outcome: &Outcome) -> u32 {
        match outcome.status_at.map(|at| ram.memory().write_slice(&[outcome.status], at)) {
            Some(Ok(())) => outcome.written,
            _ => 0,
        }
    }

    /// Decodes and carries out; `Ok` is the number of data bytes written to the guest.
    fn request(&mut self, ram: &GuestRam, segments: &mut Segments) -> Result<u32, Failure> {
        // The last writable byte is the status.
        if let Some(last) = segments.writable.last_mut() {
            last.len -= 1;
        }
        let mut input = Cursor::new(&segments.readable);
        let mut output = Cursor::new(&segments.writable);
        let mut header = [0; HEADER_BYTES];
        if input.remaining < HEADER_BYTES as u64 {
            return Err(MALFORMED);
        }
        input.read(ram.memory(), &mut header)?;
        let request_type = u32_at(&header, 0);
        let sector = u64_at(&header, 8);
        match request_type {
            VIRTIO_BLK_T_IN => self.read(ram, sector, &mut output),
            VIRTIO_BLK_T_OUT => self.write(ram, sector, &mut input),
            VIRTIO_BLK_T_FLUSH => self.flush(),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => self.clear(ram, request_type, &mut input),
            VIRTIO_BLK_T_GET_ID => {
                let len = SERIAL_BYTES.min(usize::try_from(output.remaining).unwrap_or(SERIAL_BYTES));
                output.write(ram.memory(), &self.serial[..len])?;
                Ok(len as u32)
            }
            _ => Err(UNSUPPORTED),
        }
    }

    /// The byte range of `len` bytes at `sector`, if the disk has it.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let capacity = self.disk.size_bytes() / SECTOR_BYTES * SECTOR_BYTES;
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(MALFORMED)?;
        let end = offset.checked_add(len).ok_or(MALFORMED)?;
        if end > capacity || !len.is_multiple_of(SECTOR_BYTES) {
            return Err(MALFORMED);
        }
        Ok(offset)
    }

    fn read(&mut self, ram: &GuestRam, sector: u64, output: &mut Cursor<'_>) -> Result<u32, Failure> {
        let total = output.remaining;
        let mut offset = self.range(sector, total)?;
        while output.remaining > 0 {
            let len = chunk(output.remaining);
            let buffer = room(&mut self.buffer, len);
            self.disk.read(offset, buffer).map_err(|e| Failure::Storage("read", e))?;
            output.write(ram.memory(), buffer)?;
            offset += len as u64;
        }
        Ok(u32::try_from(total).unwrap_or(u32::MAX))
    }

    fn write(&mut self, ram: &GuestRam, sector: u64, input: &mut Cursor<'_>) -> Result<u32, Failure> {
        self.check_writable()?;
        let mut offset = self.range(sector, input.remaining)?;
        while input.remaining > 0 {
            let len = chunk(input.remaining);
            let buffer = room(&mut self.buffer, len);
            input.read(ram.memory(), buffer)?;
            // Zero pages in place of the guest's data must not reach its disk.
            if ram.is_lost() {
                return Err(Failure::Memory);
            }
            self.disk.write(offset, buffer).map_err(|e| Failure::Storage("write", e))?;
            offset += len as u64;
        }
        self.written()
    }

    /// Discard and write-zeroes: every range is checked before the first is touched.
    fn clear(&mut self, ram: &GuestRam, request_type: u32, input: &mut Cursor<'_>) -> Result<u32, Failure> {
        self.check_writable()?;
        let len = usize::try_from(input.remaining).map_err(|_| MALFORMED)?;
        if len == 0 || len % RANGE_BYTES != 0 || len / RANGE_BYTES > MAX_RANGES as usize {
            return Err(MALFORMED);
        }
        let mut list = [0; RANGE_BYTES * MAX_RANGES as usize];
        input.read(ram.memory(), &mut list[..len])?;
        if ram.is_lost() {
            return Err(Failure::Memory);
        }
        let discard = request_type == VIRTIO_BLK_T_DISCARD;
        let known_flags = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        let mut ranges = Vec::with_capacity(len / RANGE_BYTES);
        for range in list[..len].chunks_exact(RANGE_BYTES) {
            if u32_at(range, 12) & !known_flags != 0 {
                return Err(UNSUPPORTED);
            }
            let len = u64::from(u32_at(range, 8)) * SECTOR_BYTES;
            ranges.push((self.range(u64_at(range, 0), len)?, len));
        }
        for (offset, len) in ranges.into_iter().filter(|(_, len)| *len > 0) {
            if discard {
                self.disk.discard(offset, len).map_err(|e| Failure::Storage("discard", e))?;
            } else {
                self.disk.write_zeroes(offset, len).map_err(|e| Failure::Storage("write zeroes", e))?;
            }
        }
        self.written()
    }

    fn flush(&self) -> Result<u32, Failure> {
        if !self.disk.is_read_only() {
            self.disk.flush().map_err(|e| Failure::Storage("flush", e))?;
        }
        Ok(0)
    }

    /// Ends a request that changed the disk.
    fn written(&mut self) -> Result<u32, Failure> {
        if self.write_through {
            return self.flush();
        }
        self.held = true;
        Ok(0)
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.is_read_only() { Err(MALFORMED) } else { Ok(()) }
    }
}

fn status_of(failure: Failure) -> u8 {
    match failure {
        Failure::Status(status) => {
            tracing::debug!(status, "vhost-user-blk request refused");
            status as u8
        }
        Failure::Memory => {
            tracing::debug!("vhost-user-blk request names memory that the guest does not have");
            VIRTIO_BLK_S_IOERR as u8
        }
        Failure::Storage(operation, error) => {
            log_storage_error("vhost-user-blk", operation, &error);
            virtio_status(error.kind())
        }
    }
}

fn chunk(remaining: u64) -> usize {
    usize::try_from(remaining).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES)
}

/// The first `len` bytes of the queue's buffer, which grows to the largest request seen and stays.
fn room(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}
