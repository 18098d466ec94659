//! The table of requests in flight, which the VMM keeps for us while we are dead.
//!
//! It is memory that we make and the VMM holds (GET_INFLIGHT_FD), and gives back after a reconnection (SET_INFLIGHT_FD).
//! Its layout for split rings is vhost-user's; one part a queue, little-endian:
//!
//! | bytes | what |
//! | --- | --- |
//! | 0..8 | features |
//! | 8..10 | version: 1, or 0 of a part that was never used |
//! | 10..12 | entries |
//! | 12..14 | head of the last batch of answered requests |
//! | 14..16 | used index up to which entries are right |
//! | 16 + 16 h | entry of the request with head h: in flight (1 byte), then at 6 next of its batch (2), at 8 counter (8) |
//!
//! Order around one request, so that a death anywhere leaves what [`QueueTable::unfinished`] can tell: the entry says in
//! flight; the request is carried out; its head is the last batch; the used index moves; the entry is cleared; the used
//! index is noted. Only this module's ring threads write it while we live, but a VMM may hand in anything: all that is
//! read is bounded, and what is wrong harms its own device alone.

use super::memory::SharedRegion;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Of each queue's part; what other back ends use too.
const ALIGNMENT: usize = 64;
const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const VERSION: u16 = 1;
/// Bytes of the longest table: every queue with the longest ring.
const TABLE_BYTES_MAX: u64 = 1 << 20;

/// The table of all queues of a device.
#[derive(Clone)]
pub(super) struct Inflight {
    region: Arc<SharedRegion>,
    queues: u16,
    entries: u16,
}

impl Inflight {
    /// Makes a new one, and what the VMM holds it by.
    pub(super) fn create(queues: u16, entries: u16) -> io::Result<(u64, File)> {
        let bytes = bytes_of(queues, entries)?;
        let file = File::from(memfd_create("vblk-inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        file.set_len(bytes)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
        Ok((bytes, file))
    }

    /// Maps one that the VMM gives back.
    pub(super) fn map(file: File, offset: u64, bytes: u64, queues: u16, entries: u16) -> io::Result<Self> {
        let needed = bytes_of(queues, entries)?;
        let end = offset.checked_add(needed);
        if bytes < needed || end.is_none_or(|end| file.metadata().is_ok_and(|m| m.len() < end)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the table of requests in flight is too short"));
        }
        Ok(Self { region: Arc::new(SharedRegion::map(file, offset, needed as usize)?), queues, entries })
    }

    /// The part of one queue.
    pub(super) fn queue(&self, index: usize) -> Option<QueueTable> {
        let at = index * queue_bytes(self.entries);
        (index < usize::from(self.queues)).then(|| QueueTable {
            region: self.region.clone(),
            at,
            entries: self.entries,
            counter: 0,
        })
    }
}

fn queue_bytes(entries: u16) -> usize {
    (HEADER_BYTES + usize::from(entries) * ENTRY_BYTES).next_multiple_of(ALIGNMENT)
}

fn bytes_of(queues: u16, entries: u16) -> io::Result<u64> {
    let bytes = usize::from(queues) as u64 * queue_bytes(entries) as u64;
    match bytes {
        1..=TABLE_BYTES_MAX if entries > 0 => Ok(bytes),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "so many requests in flight are not possible")),
    }
}

/// One queue's part of the table; of its ring's thread alone.
pub(super) struct QueueTable {
    region: Arc<SharedRegion>,
    at: usize,
    entries: u16,
    counter: u64,
}

impl QueueTable {
    /// Puts the table right after a death, and returns the heads of requests that were not answered, oldest first.
    /// `used` is the ring's used index.
    pub(super) fn unfinished(&mut self, features: u64, used: u16) -> Vec<u16> {
        let answered = used.wrapping_sub(self.load16(14));
        if self.load16(8) != VERSION || self.load16(10) != self.entries || answered > self.entries {
            // Never used, or of another ring.
            (0..self.entries).for_each(|head| self.set_in_flight(head, false));
            self.store16(10, self.entries);
            self.store16(8, VERSION);
        } else {
            // Answered, and not yet noted.
            let mut head = self.load16(12);
            for _ in 0..answered {
                self.set_in_flight(head, false);
                head = self.entry(head).map_or(u16::MAX, |entry| self.load16(entry + 6));
            }
        }
        self.region.store(self.at, features.to_le());
        self.store16(14, used);
        let in_flight = |head: &u16| self.entry(*head).is_some_and(|entry| self.load8(entry) == 1);
        let counter =
            |head: u16| self.entry(head).map_or(0, |entry| u64::from_le(self.region.load(self.at + entry + 8)));
        let mut heads: Vec<(u64, u16)> =
            (0..self.entries).filter(in_flight).map(|head| (counter(head), head)).collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        heads.into_iter().map(|(_, head)| head).collect()
    }

    /// The request is about to be carried out.
    pub(super) fn begin(&mut self, head: u16) {
        let Some(entry) = self.entry(head) else { return };
        self.region.store(self.at + entry + 8, self.counter.to_le());
        self.counter = self.counter.wrapping_add(1);
        self.set_in_flight(head, true);
    }

    /// It was carried out, and the used index is about to move.
    pub(super) fn answering(&self, head: u16) {
        let Some(entry) = self.entry(head) else { return };
        self.store16(entry + 6, self.load16(12));
        self.store16(12, head);
    }

    /// The used index has moved to `used`.
    pub(super) fn answered(&self, head: u16, used: u16) {
        self.set_in_flight(head, false);
        self.store16(14, used);
    }

    /// It cannot be answered.
    pub(super) fn give_up(&self, head: u16) {
        self.set_in_flight(head, false);
    }

    /// Where the entry of a head is in this part; none for a head that no ring of this length has.
    fn entry(&self, head: u16) -> Option<usize> {
        (head < self.entries).then(|| HEADER_BYTES + usize::from(head) * ENTRY_BYTES)
    }

    fn set_in_flight(&self, head: u16, in_flight: bool) {
        if let Some(entry) = self.entry(head) {
            self.region.store(self.at + entry, u8::from(in_flight));
        }
    }

    fn load8(&self, offset: usize) -> u8 {
        self.region.load(self.at + offset)
    }

    fn load16(&self, offset: usize) -> u16 {
        u16::from_le(self.region.load(self.at + offset))
    }

    fn store16(&self, offset: usize, value: u16) {
        self.region.store(self.at + offset, value.to_le());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: u16) -> (Inflight, QueueTable) {
        let (bytes, file) = Inflight::create(3, entries).unwrap();
        let table = Inflight::map(file, 0, bytes, 3, entries).unwrap();
        let queue = table.queue(1).unwrap();
        (table, queue)
    }

    #[test]
    fn a_death_at_each_step_leaves_exactly_what_was_not_answered() {
        let (shared, mut table) = table(8);
        assert_eq!(table.unfinished(0, 40), [] as [u16; 0]);
        let after_death = |used| shared.queue(1).unwrap().unfinished(0, used);
        table.begin(5);
        assert_eq!(after_death(40), [5]);
        table.answering(5);
        assert_eq!(after_death(40), [5]);
        // The used index moves here.
        assert_eq!(after_death(41), [] as [u16; 0]);
        table.answered(5, 41);
        assert_eq!(after_death(41), [] as [u16; 0]);
        assert!(shared.queue(3).is_none());
    }

    #[test]
    fn what_was_in_flight_is_told_oldest_first_and_counting_goes_on() {
        let (shared, mut table) = table(8);
        table.unfinished(0, 65_534);
        for head in [3, 1, 7, 0] {
            table.begin(head);
        }
        // Two are answered out of order, with an index that goes round; the second is not yet noted.
        table.answering(1);
        table.answered(1, 65_535);
        table.answering(0);
        let mut again = shared.queue(1).unwrap();
        assert_eq!(again.unfinished(0, 0), [3, 7]);
        again.begin(2);
        assert_eq!(shared.queue(1).unwrap().unfinished(0, 0), [3, 7, 2]);
    }

    #[test]
    fn nonsense_is_bounded() {
        let (_, mut table) = table(8);
        table.unfinished(0, 0);
        for head in [8, 1024, u16::MAX] {
            table.begin(head);
            table.answering(head);
            table.answered(head, 0);
        }
        for head in 0..8 {
            table.begin(head);
        }
        // Another ring's: its used index is nowhere near.
        assert_eq!(table.unfinished(0, 1000), [] as [u16; 0]);
        table.begin(1);
        table.store16(12, 9999);
        assert_eq!(table.unfinished(0, 1003), [1], "a batch that leads out of the table");
        assert!(Inflight::create(0, 8).is_err() && Inflight::create(u16::MAX, u16::MAX).is_err());
        let (bytes, file) = Inflight::create(1, 8).unwrap();
        assert!(Inflight::map(file.try_clone().unwrap(), 8, bytes, 1, 8).is_err());
        assert!(Inflight::map(file, u64::MAX - 3, bytes, 1, 8).is_err());
    }
}
