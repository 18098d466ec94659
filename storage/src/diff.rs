//! What differs between two states, found by walking only what they do not share.

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, BlockId, Source};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::map::{self, NodeSource};
use crate::store::Store;
use serde::Serialize;

/// A run of bytes, whole blocks, that reads differently in two states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DiffRange {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub bytes: u64,
}

/// Blocks that may differ: start and length, in order, joined where they touch.
type Runs = Vec<(u64, u64)>;

fn push_run(runs: &mut Runs, start: u64, len: u64) {
    if len == 0 {
        return;
    }
    match runs.last_mut() {
        Some((last, have)) if *last + *have >= start => *have = (*have).max(start + len - *last),
        _ => runs.push((start, len)),
    }
}

/// Exactly the blocks that differ. Where one is larger, what it has beyond the other's end differs unless it is zero.
pub(crate) fn diff(store: &Store, a: Source, b: Source) -> Result<Vec<DiffRange>> {
    let inner = store.inner();
    let (disk_a, disk_b) = (store.open_source(a)?, store.open_source(b)?);
    let candidates = {
        // Roots must not be collected under the walk.
        let _no_collection = inner.collecting.lock();
        candidates(&*inner.blocks, &disk_a, &disk_b)?
    };
    let mut out: Vec<DiffRange> = Vec::new();
    let mut bytes = [vec![0; 256 * BLOCK_SIZE], vec![0; 256 * BLOCK_SIZE]];
    for (start, len) in candidates {
        for at in (start..start + len).step_by(256) {
            let blocks = (start + len - at).min(256);
            for (disk, bytes) in [&disk_a, &disk_b].into_iter().zip(&mut bytes) {
                read_padded(disk, at, &mut bytes[..blocks as usize * BLOCK_SIZE])?;
            }
            let pairs = bytes[0].chunks(BLOCK_SIZE).zip(bytes[1].chunks(BLOCK_SIZE)).take(blocks as usize);
            for (i, _) in pairs.enumerate().filter(|(_, (x, y))| x != y) {
                let offset = (at + i as u64) * BLOCK_BYTES;
                match out.last_mut() {
                    Some(last) if last.offset + last.bytes == offset => last.bytes += BLOCK_BYTES,
                    _ => out.push(DiffRange { offset, bytes: BLOCK_BYTES }),
                }
            }
        }
    }
    Ok(out)
}

/// Blocks beyond the end read as zeroes.
fn read_padded(disk: &Disk, block: u64, buf: &mut [u8]) -> Result<()> {
    let offset = block * BLOCK_BYTES;
    let have = (disk.size_bytes().saturating_sub(offset) as usize).min(buf.len());
    buf[have..].fill(0);
    if have == 0 { Ok(()) } else { disk.read(offset, &mut buf[..have]) }
}

/// Where the maps differ, and what either overlay has that the other has not.
fn candidates(nodes: &dyn NodeSource, a: &Disk, b: &Disk) -> Result<Runs> {
    let states = [a.device.state(), b.device.state()];
    let mut runs = Runs::new();
    if a.device.size_blocks == b.device.size_blocks {
        map::differences(nodes, states[0].root, states[1].root, a.device.level(), 0, &mut |start, len| {
            push_run(&mut runs, start, len);
        })?;
    } else {
        mapped_runs(nodes, a, &mut runs)?;
        mapped_runs(nodes, b, &mut runs)?;
    }
    for (mine, other) in [(0, 1), (1, 0)] {
        let own = states[mine].overlay.since(&states[other].overlay, crate::block::LogPos(0));
        runs.extend(own.into_iter().map(|(start, extent)| (start, extent.len)));
    }
    runs.sort_unstable();
    let mut joined = Runs::new();
    runs.into_iter().for_each(|(start, len)| push_run(&mut joined, start, len));
    Ok(joined)
}

/// All that is mapped: for disks of different sizes, whose trees cannot be compared node by node.
fn mapped_runs(nodes: &dyn NodeSource, disk: &Disk, runs: &mut Runs) -> Result<()> {
    let device = &disk.device;
    let root = device.state().root;
    map::pieces::<Error>(nodes, root, device.level(), 0, device.size_blocks, &mut |start, len, block: BlockId| {
        if !block.is_none() {
            runs.push((start, len));
        }
        Ok(())
    })
}

impl Store {
    /// The ranges in which two disks or snapshots read differently, in order. Costs what they do not share.
    pub fn diff(&self, a: Source, b: Source) -> Result<Vec<DiffRange>> {
        // A checkpoint and a collection during the walk take the old roots away; the new ones tell the same.
        for _ in 0..3 {
            match diff(self, a, b) {
                Err(e) if e.kind() == ErrorKind::Damaged => tracing::debug!("walking again: {e}"),
                done => return done,
            }
        }
        diff(self, a, b)
    }
}
