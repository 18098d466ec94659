//! What is asked of a device, and how its answers are timed and looked at.
//!
//! Every 4 KiB block that this bench writes begins with its own number, so that each read is checked for being of the
//! right place while it is timed. [`check`] compares whole blocks.

use crate::harness::load::{MIB, text};
use std::io;
use std::sync::Barrier;
use std::time::{Duration, Instant};
use storage::medium::sim::Random;

pub const BLOCK: usize = 4096;

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read { at: u64, len: usize },
    Write { at: u64, len: usize },
    Flush,
}

impl Op {
    pub fn bytes(self) -> u64 {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } => len as u64,
            Self::Flush => 0,
        }
    }
}

/// One queue of a device: requests in slots, each with its own memory.
pub trait Lane: Send {
    /// Requests at a time.
    fn depth(&self) -> usize;
    /// Memory of the slot that the next request gets.
    fn fill(&mut self, at: usize, bytes: &[u8]);
    /// Bytes of that slot that were ever filled.
    fn filled(&mut self) -> &mut usize;
    /// Puts a request into a slot. There must be a free one.
    fn start(&mut self, op: Op) -> usize;
    /// Sends what was started and waits for at least one request; puts the slots of all that are done into `done`.
    fn wait(&mut self, done: &mut Vec<usize>) -> io::Result<()>;
    /// Reads the memory of a slot that is done.
    fn look(&self, slot: usize, at: usize, into: &mut [u8]);
}

/// Which requests a job makes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    RandomRead,
    RandomWrite,
    SequentialRead,
    SequentialWrite,
    /// 4 KiB written and flushed: one operation.
    WriteFlush,
    /// As a file system makes them; see [`Trace`].
    Trace,
}

/// A load.
#[derive(Clone, Copy)]
pub struct Job {
    pub name: &'static str,
    pub kind: Kind,
    pub bytes: usize,
    pub queues: usize,
    pub depth: usize,
}

const fn job(name: &'static str, kind: Kind, bytes: usize, queues: usize, depth: usize) -> Job {
    Job { name, kind, bytes, queues, depth }
}

/// All of them.
pub const JOBS: [Job; 13] = [
    job("4 KiB random read, QD 1", Kind::RandomRead, 4096, 1, 1),
    job("4 KiB random read, QD 32", Kind::RandomRead, 4096, 1, 32),
    job("4 KiB random read, 4 x QD 32", Kind::RandomRead, 4096, 4, 32),
    job("128 KiB sequential read, QD 8", Kind::SequentialRead, 128 << 10, 1, 8),
    job("1 MiB sequential read, QD 8", Kind::SequentialRead, 1 << 20, 1, 8),
    job("4 KiB random write, QD 1", Kind::RandomWrite, 4096, 1, 1),
    job("4 KiB random write, QD 32", Kind::RandomWrite, 4096, 1, 32),
    job("4 KiB random write, 4 x QD 32", Kind::RandomWrite, 4096, 4, 32),
    job("128 KiB sequential write, QD 8", Kind::SequentialWrite, 128 << 10, 1, 8),
    job("1 MiB sequential write, QD 8", Kind::SequentialWrite, 1 << 20, 1, 8),
    job("4 KiB write + flush, QD 1", Kind::WriteFlush, 4096, 1, 1),
    job("4 KiB write + flush, 4 x QD 1", Kind::WriteFlush, 4096, 4, 1),
    job("trace, QD 16", Kind::Trace, 0, 1, 16),
];

impl Job {
    pub fn only_reads(&self) -> bool {
        matches!(self.kind, Kind::RandomRead | Kind::SequentialRead)
    }

    pub fn is_sequential(&self) -> bool {
        matches!(self.kind, Kind::SequentialRead | Kind::SequentialWrite)
    }
}

/// When a job ends.
#[derive(Clone, Copy)]
pub struct Limit {
    pub time: Duration,
    /// Of all queues.
    pub bytes: u64,
}

/// The requests of one queue.
struct Requests {
    job: Job,
    queue: u64,
    blocks: u64,
    random: Random,
    position: u64,
    trace: Trace,
}

impl Requests {
    fn next(&mut self) -> Op {
        let len = self.job.bytes;
        let anywhere = |random: &mut Random| random.below(self.blocks) * BLOCK as u64;
        match self.job.kind {
            Kind::RandomRead => Op::Read { at: anywhere(&mut self.random), len },
            Kind::RandomWrite | Kind::WriteFlush => Op::Write { at: anywhere(&mut self.random), len },
            Kind::SequentialRead | Kind::SequentialWrite => {
                let pieces = self.blocks * BLOCK as u64 / len as u64;
                let at = (self.queue * pieces / self.job.queues as u64 + self.position) % pieces * len as u64;
                self.position += 1;
                if self.job.kind == Kind::SequentialRead { Op::Read { at, len } } else { Op::Write { at, len } }
            }
            Kind::Trace => self.trace.next(&mut self.random, self.blocks),
        }
    }
}

/// Made-up requests in the proportions of a file system at work: three fifths are reads; most are small; most fall on a
/// twentieth of the disk; and every 64 a transaction is put at the end of a journal and flushed.
#[derive(Default)]
struct Trace {
    count: u64,
    journal: u64,
}

const JOURNAL_BLOCKS: u64 = 2048;

impl Trace {
    fn next(&mut self, random: &mut Random, blocks: u64) -> Op {
        self.count += 1;
        match self.count % 64 {
            0 => return Op::Flush,
            63 => {
                let at = self.journal % (JOURNAL_BLOCKS / 8) * 8 * BLOCK as u64;
                self.journal += 1;
                return Op::Write { at, len: 8 * BLOCK };
            }
            _ => {}
        }
        let len = [1, 1, 1, 1, 2, 4, 8, 32][random.below(8) as usize];
        let files = blocks - JOURNAL_BLOCKS - 32;
        let place = if random.below(10) < 8 { random.below(files / 20) * 20 / 19 } else { random.below(files) };
        let (at, len) = ((JOURNAL_BLOCKS + place % files) * BLOCK as u64, len * BLOCK);
        if random.below(5) < 3 { Op::Read { at, len } } else { Op::Write { at, len } }
    }
}

/// What a job came to.
#[derive(Default)]
pub struct Outcome {
    pub operations: u64,
    pub bytes: u64,
    pub seconds: f64,
    /// A flush after the last request; not in `seconds`.
    pub flush_seconds: f64,
    pub latencies: Vec<Duration>,
    /// Blocks that began with another block's number.
    pub wrong: u64,
}

/// Runs a job on as many lanes as it has queues. `seed` makes it another one.
///
/// # Errors
/// What the device or the connection to it said.
pub fn run(lanes: &mut [Box<dyn Lane>], job: Job, size: u64, limit: Limit, seed: u64) -> io::Result<Outcome> {
    // What others left unflushed is not this job's.
    flush(&mut *lanes[0])?;
    let begin = Barrier::new(job.queues);
    let outcomes = std::thread::scope(|scope| {
        let threads: Vec<_> = lanes[..job.queues]
            .iter_mut()
            .enumerate()
            .map(|(queue, lane)| {
                let random = Random((seed << 8) + queue as u64 + 1);
                let (blocks, queue) = (size / BLOCK as u64, queue as u64);
                let requests = Requests { job, queue, blocks, random, position: 0, trace: Trace::default() };
                let limit = Limit { bytes: limit.bytes / job.queues as u64, ..limit };
                let begin = &begin;
                scope.spawn(move || {
                    begin.wait();
                    let start = Instant::now();
                    let outcome = drive(&mut **lane, requests, limit, seed);
                    outcome.map(|outcome| (start, Instant::now(), outcome))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a lane's thread")).collect::<io::Result<Vec<_>>>()
    })?;
    let start = outcomes.iter().map(|(start, ..)| *start).min().expect("a lane");
    let end = outcomes.iter().map(|(_, end, _)| *end).max().expect("a lane");
    let mut all = Outcome { seconds: (end - start).as_secs_f64(), ..Outcome::default() };
    for (_, _, outcome) in outcomes {
        all.operations += outcome.operations;
        all.bytes += outcome.bytes;
        all.wrong += outcome.wrong;
        all.latencies.extend(outcome.latencies);
    }
    let start = Instant::now();
    flush(&mut *lanes[0])?;
    all.flush_seconds = start.elapsed().as_secs_f64();
    Ok(all)
}

fn flush(lane: &mut dyn Lane) -> io::Result<()> {
    lane.start(Op::Flush);
    lane.wait(&mut Vec::new())
}

fn drive(lane: &mut dyn Lane, mut requests: Requests, limit: Limit, version: u64) -> io::Result<Outcome> {
    let depth = requests.job.depth.min(lane.depth());
    let mut outcome = Outcome::default();
    let mut under_way = vec![(Op::Flush, Instant::now()); lane.depth()];
    let (mut count, mut asked) = (0, 0);
    let mut done = Vec::with_capacity(depth);
    // Writes that are done and are to be flushed, and when they began.
    let mut unflushed = Vec::new();
    let end = Instant::now() + limit.time;
    loop {
        for began in unflushed.drain(..) {
            under_way[lane.start(Op::Flush)] = (Op::Flush, began);
            count += 1;
        }
        while count < depth && asked < limit.bytes && Instant::now() < end {
            let op = requests.next();
            if let Op::Write { at, len } = op {
                stamp(lane, at, len, version);
            }
            let began = Instant::now();
            under_way[lane.start(op)] = (op, began);
            asked += op.bytes();
            count += 1;
        }
        if count == 0 {
            return Ok(outcome);
        }
        done.clear();
        lane.wait(&mut done)?;
        let now = Instant::now();
        for &slot in &done {
            count -= 1;
            let (op, began) = under_way[slot];
            outcome.bytes += op.bytes();
            if requests.job.kind == Kind::WriteFlush && op != Op::Flush {
                unflushed.push(began);
                continue;
            }
            outcome.operations += 1;
            outcome.latencies.push(now - began);
            if let Op::Read { at, len } = op {
                outcome.wrong += misplaced(lane, slot, at, len);
            }
        }
    }
}

/// Makes the next slot's memory what is to be written there.
fn stamp(lane: &mut dyn Lane, at: u64, len: usize, version: u64) {
    let filled = *lane.filled();
    if filled < len {
        let bytes = text(&mut Random(len as u64), len - filled);
        lane.fill(filled, &bytes);
        *lane.filled() = len;
    }
    for i in 0..len / BLOCK {
        lane.fill(i * BLOCK, &header(at / BLOCK as u64 + i as u64, version));
    }
}

/// Blocks that are not those that were asked for.
fn misplaced(lane: &dyn Lane, slot: usize, at: u64, len: usize) -> u64 {
    let mut number = [0; 8];
    let wrong = |i: usize| {
        lane.look(slot, i * BLOCK, &mut number);
        u64::from_le_bytes(number) != at / BLOCK as u64 + i as u64
    };
    (0..len / BLOCK).map(wrong).filter(|wrong| *wrong).count() as u64
}

fn header(block: u64, version: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..8].copy_from_slice(&block.to_le_bytes());
    header[8..].copy_from_slice(&version.to_le_bytes());
    header
}

/// What a block holds that was written whole: its number, a version, and text that compresses.
pub fn content(block: u64, version: u64) -> Vec<u8> {
    let mut bytes = text(&mut Random((block << 20) + (version << 8) + 1), BLOCK);
    bytes[..16].copy_from_slice(&header(block, version));
    bytes
}

/// Writes whole blocks of a version, as many at a time as the lane has slots.
///
/// # Errors
/// As [`run`].
pub fn write_all(lane: &mut dyn Lane, blocks: &[u64], version: u64) -> io::Result<()> {
    let ops: Vec<_> = blocks.iter().map(|block| Step { block: *block, version, write: true }).collect();
    steps(lane, &ops).map(drop)
}

struct Step {
    block: u64,
    version: u64,
    write: bool,
}

/// Carries these out, many at a time; how many reads were not what was to be read.
fn steps(lane: &mut dyn Lane, steps: &[Step]) -> io::Result<u64> {
    let mut of_slot = vec![0; lane.depth()];
    let (mut next, mut count, mut wrong) = (0, 0, 0);
    let mut done = Vec::new();
    let mut found = vec![0; BLOCK];
    while next < steps.len() || count > 0 {
        while next < steps.len() && count < lane.depth() {
            let (step, at) = (&steps[next], steps[next].block * BLOCK as u64);
            let op = if step.write {
                lane.fill(0, &content(step.block, step.version));
                Op::Write { at, len: BLOCK }
            } else {
                // What is not written there cannot be taken for an answer.
                lane.fill(0, &[0; BLOCK]);
                Op::Read { at, len: BLOCK }
            };
            of_slot[lane.start(op)] = next;
            (next, count) = (next + 1, count + 1);
        }
        done.clear();
        lane.wait(&mut done)?;
        count -= done.len();
        for &slot in &done {
            let step = &steps[of_slot[slot]];
            if !step.write {
                lane.look(slot, 0, &mut found);
                wrong += u64::from(found != content(step.block, step.version));
            }
        }
    }
    Ok(wrong)
}

/// Blocks looked at by [`check`].
pub const CHECKED: usize = 2048;

/// Reads blocks at random at full depth and compares them whole with what was prepared, `version` says which. If
/// `writes`, as many others are written among these reads, and read back at the end. Returns how many were wrong, of how
/// many.
///
/// # Errors
/// As [`run`].
pub fn check(
    lane: &mut dyn Lane,
    size: u64,
    version: impl Fn(u64) -> u64,
    writes: bool,
    seed: u64,
) -> io::Result<(u64, u64)> {
    let mut random = Random(seed);
    let mut blocks: Vec<u64> = (0..size / BLOCK as u64).collect();
    // The first so many of a random order.
    let chosen = (2 * CHECKED).min(blocks.len() / 2);
    for i in 0..chosen {
        let other = i as u64 + random.below((blocks.len() - i) as u64);
        blocks.swap(i, other as usize);
    }
    let (read, written) = blocks[..chosen].split_at(chosen / 2);
    let mut all = Vec::new();
    for (read, write) in read.iter().zip(written) {
        all.push(Step { block: *read, version: version(*read), write: false });
        if writes {
            all.push(Step { block: *write, version: 1 << 40, write: true });
        }
    }
    let mut wrong = steps(lane, &all)?;
    let mut looked_at = read.len() as u64;
    if writes {
        let back: Vec<_> = written.iter().map(|block| Step { block: *block, version: 1 << 40, write: false }).collect();
        wrong += steps(lane, &back)?;
        looked_at += back.len() as u64;
    }
    Ok((wrong, looked_at))
}

/// Bytes of the largest request.
pub const REQUEST_BYTES_MAX: usize = MIB as usize;
