//! Which reads of a disk are sequential, and what to read ahead for them.
//!
//! A disk remembers where its last few streams of reads ended. A read that goes on there belongs to that stream; once a
//! stream has read enough without a gap, what follows is read ahead, in a window that doubles up to a bound. Reads that
//! belong to no stream begin one in place of the least recently read, and cost a look at a few numbers.

use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks of a part that is read ahead by one thread: 512 KiB. Parts begin at multiples of it.
const PART: u64 = 128;
/// Streams of one disk that are told apart.
const STREAMS: usize = 8;
/// Blocks by which small reads of a stream may come out of order, or be missed: a queue of several threads does that.
const SLACK: u64 = 32;
/// Reads, and blocks, without a gap that make a stream.
const READS: u32 = 2;
const BLOCKS: u64 = 16;

/// The streams of reads of one disk.
#[derive(Default)]
pub(crate) struct Streams {
    /// The last read comes last. Empty until the first read, so that an idle disk costs nothing.
    recent: Mutex<Vec<Stream>>,
}

struct Stream {
    /// The block behind the last read.
    next: u64,
    reads: u32,
    blocks: u64,
    /// Everything before this was read ahead or read.
    ahead: u64,
    /// Blocks to be ahead.
    window: u64,
    reached: Reached,
}

/// The block up to which a stream was read, shared with those who read ahead.
#[derive(Clone, Default)]
struct Reached(Arc<AtomicU64>);

/// A part to read ahead.
pub(crate) struct Part {
    /// Its blocks.
    pub blocks: Range<u64>,
    reached: Reached,
}

impl Part {
    /// Whether its reader has got beyond it, or has given up: then it need not be read any more.
    pub fn is_stale(&self) -> bool {
        self.reached.0.load(Ordering::Relaxed) >= self.blocks.end
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reached.0.store(u64::MAX, Ordering::Relaxed);
    }
}

impl Streams {
    /// Takes note of a read of `len` blocks from `first` on. Returns what is to be read ahead now of a disk of
    /// `size_blocks`, at most `window_max` blocks ahead.
    pub fn note(&self, first: u64, len: u64, size_blocks: u64, window_max: u64) -> Vec<Part> {
        if window_max < PART {
            return Vec::new();
        }
        // A read that meets another one here is not noted: the slack makes up for it.
        let Some(mut recent) = self.recent.try_lock() else { return Vec::new() };
        let end = first + len;
        let slack = len.max(SLACK);
        let belongs = |s: &Stream| first <= s.next + slack && first + slack >= s.next;
        let Some(at) = recent.iter().rposition(belongs) else {
            if recent.len() == STREAMS {
                recent.remove(0);
            }
            let reached = Reached::default();
            recent.push(Stream { next: end, reads: 1, blocks: len, ahead: end, window: PART, reached });
            return Vec::new();
        };
        recent[at..].rotate_left(1);
        let last = recent.len() - 1;
        recent[last].go_on(first..end, size_blocks, window_max)
    }
}

impl Stream {
    fn go_on(&mut self, Range { start, end }: Range<u64>, size_blocks: u64, window_max: u64) -> Vec<Part> {
        if end <= self.next {
            return Vec::new();
        }
        // What was skipped has not been read.
        self.blocks += end - start.max(self.next);
        self.next = end;
        self.reads = self.reads.saturating_add(1);
        self.reached.0.store(end, Ordering::Relaxed);
        if self.reads < READS || self.blocks < BLOCKS {
            return Vec::new();
        }
        let from = self.ahead.max(end);
        let upto = (end + self.window) / PART * PART;
        let upto = if end + self.window >= size_blocks { size_blocks } else { upto };
        if upto <= from {
            return Vec::new();
        }
        self.ahead = upto;
        self.window = (self.window * 2).min(window_max);
        let mut parts = Vec::new();
        let mut start = from;
        while start < upto {
            let part_end = (start / PART * PART + PART).min(upto);
            parts.push(Part { blocks: start..part_end, reached: self.reached.clone() });
            start = part_end;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;
    const MAX: u64 = 1024;

    fn blocks(parts: &[Part]) -> Vec<Range<u64>> {
        parts.iter().map(|p| p.blocks.clone()).collect()
    }

    #[test]
    fn small_sequential_reads_are_read_ahead_in_whole_parts_without_gaps() {
        let streams = Streams::default();
        let mut ahead = None;
        for block in 1000..20_000 {
            for part in streams.note(block, 1, SIZE, MAX) {
                assert!(ahead.is_none_or(|end| part.blocks.start == end), "a gap, or read ahead twice");
                assert!(part.blocks.end.is_multiple_of(PART) && part.blocks.end <= block + 1 + MAX);
                assert!(part.blocks.start > block);
                ahead = Some(part.blocks.end);
            }
            if block > 1000 + BLOCKS + PART {
                assert!(ahead.is_some_and(|end| end > block + 1), "block {block} was not read ahead");
            }
        }
        assert!(ahead.is_some_and(|end| end >= 20_000 + MAX - PART), "the window grows");
    }

    #[test]
    fn interleaved_streams_are_told_apart() {
        let streams = Streams::default();
        let mut parts = 0;
        for i in 0..200 {
            for stream in 0..STREAMS as u64 {
                parts += streams.note(stream * 100_000 + i * 32, 32, SIZE, MAX).len();
            }
        }
        assert!(parts as u64 >= STREAMS as u64 * 200 * 32 / PART, "{parts} parts");
    }

    #[test]
    fn random_reads_are_not_read_ahead() {
        let streams = Streams::default();
        let mut random = crate::medium::sim::Random(1);
        let parts: usize = (0..100_000).map(|_| streams.note(random.below(50_000), 1, SIZE, MAX).len()).sum();
        assert!(parts < 10, "{parts} parts");
    }

    #[test]
    fn reads_out_of_order_belong_together() {
        let streams = Streams::default();
        let mut parts = Vec::new();
        for pair in 0..100 {
            parts.extend(streams.note(pair * 32 + 16, 16, SIZE, MAX));
            parts.extend(streams.note(pair * 32, 16, SIZE, MAX));
        }
        let found = blocks(&parts);
        assert!(found.windows(2).all(|w| w[0].end == w[1].start), "{found:?}");
        assert!(found.last().is_some_and(|last| last.end >= 3200));
    }

    #[test]
    fn a_stream_that_is_given_up_is_not_read_ahead_any_more() {
        let streams = Streams::default();
        let parts: Vec<_> = (0..4).flat_map(|i| streams.note(i * 256, 256, SIZE, MAX)).collect();
        assert!(parts.last().is_some_and(|part| !part.is_stale()));
        (0..STREAMS as u64).for_each(|i| drop(streams.note(100_000 + i * 1000, 1, SIZE, MAX)));
        assert!(parts.iter().all(Part::is_stale));
    }

    #[test]
    fn nothing_is_read_beyond_the_end() {
        let streams = Streams::default();
        let parts: Vec<_> = (0..10).flat_map(|i| streams.note(i * 100, 100, 1000, MAX)).collect();
        assert_eq!(blocks(&parts).last().map(|last| last.end), Some(1000));
    }

    /// What follows a sequential read gets into the cache without being asked for; after a random one nothing does.
    #[test]
    fn what_follows_is_loaded() {
        use crate::catalogue::MemCatalogue;
        use crate::medium::sim::SimMedium;
        let medium = SimMedium::new();
        let catalogue = Arc::new(MemCatalogue::new(medium.clone()));
        let options = crate::Options { background: false, reserve_bytes: 0, ..crate::Options::default() };
        let store = crate::Store::open_with(Arc::new(medium), catalogue, options).expect("a store");
        let mut tx = store.begin();
        let id = tx.create_disk("d", 16 << 20);
        tx.commit_durable().expect("a disk");
        let disk = store.disk(id).expect("it is there");
        let content: Vec<u8> = (0..16u32 << 18).flat_map(u32::to_le_bytes).collect();
        disk.write(0, &content).expect("a write");
        store.seal().expect("sealing");
        store.drop_caches();
        let cached = || store.inner().blocks.cached_groups();
        let mut buf = vec![0; 64 << 10];
        for at in [9, 3, 12, 1, 14, 6] {
            disk.read(at << 20, &mut buf).expect("a read");
        }
        // The groups that were read, and that of the map's node.
        assert_eq!(cached(), 7);
        (0..8).for_each(|i| disk.read(i << 16, &mut buf).expect("a read"));
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while cached() < 7 + 8 + 8 {
            assert!(std::time::Instant::now() < deadline, "nothing is read ahead: {} groups", cached());
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        disk.read(8 << 16, &mut buf).expect("a read");
        assert!(buf == content[8 << 16..9 << 16]);
    }
}
