//! What the log holds of one disk: a persistent ordered map of extents.
//!
//! The map is a B-tree whose nodes are shared between clones (`imbl::OrdMap`), so that cloning an overlay, which is what
//! a snapshot and a fork do, costs one reference count whatever it holds, and finding what two overlays do not share
//! visits only nodes that they do not share.

use crate::block::{BLOCK_BYTES, LogPos};
use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use std::sync::Arc;

/// What an extent reads as.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    /// Blocks in the log, one behind the other from `payload` on. `crcs[first + i]` is the crc32c of block `i`.
    Data { payload: LogPos, crcs: Arc<[u32]>, first: u32 },
    /// Zeroes.
    Zero,
}

/// A run of blocks with consecutive content.
#[derive(Debug, Clone)]
pub(crate) struct Extent {
    /// Blocks.
    pub len: u64,
    /// The record that wrote it. Orders extents in time.
    pub record: LogPos,
    pub content: Content,
}

impl PartialEq for Extent {
    /// Equal extents at equal places come from the same part of the same record.
    fn eq(&self, other: &Self) -> bool {
        let first = |e: &Self| match e.content {
            Content::Data { payload, .. } => payload.0,
            Content::Zero => 0,
        };
        self.len == other.len && self.record == other.record && first(self) == first(other)
    }
}

impl Extent {
    /// The part from `skip` blocks on, `len` blocks long.
    fn part(&self, skip: u64, len: u64) -> Self {
        let content = match &self.content {
            Content::Data { payload, crcs, first } => Content::Data {
                payload: payload.plus(skip * BLOCK_BYTES),
                crcs: crcs.clone(),
                first: first + skip as u32,
            },
            Content::Zero => Content::Zero,
        };
        Self { len, record: self.record, content }
    }
}

/// See the module. Keys are block numbers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overlay {
    extents: OrdMap<u64, Extent>,
}

impl Overlay {
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Whether both are the same by construction; `false` says nothing.
    pub fn same(&self, other: &Self) -> bool {
        self.extents.ptr_eq(&other.extents)
    }

    /// Extents.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Puts `extent` at `start`, over what is there.
    pub fn insert(&mut self, start: u64, extent: Extent) {
        let end = start + extent.len;
        // What begins before and reaches in is cut; it may also reach beyond.
        if let Some((&at, old)) = self.extents.get_prev(&start)
            && at < start
            && at + old.len > start
        {
            let old = old.clone();
            self.extents.insert(at, old.part(0, start - at));
            if at + old.len > end {
                self.extents.insert(end, old.part(end - at, at + old.len - end));
            }
        }
        // What begins inside goes, but for its part beyond the end.
        while let Some((&at, old)) = self.extents.get_next(&start) {
            if at >= end {
                break;
            }
            let old = old.clone();
            self.extents.remove(&at);
            if at + old.len > end {
                self.extents.insert(end, old.part(end - at, at + old.len - end));
            }
        }
        self.extents.insert(start, extent);
    }

    /// Calls `f(start, len, extent)` for consecutive pieces that cover `start..start + len`; `None` where the overlay
    /// holds nothing.
    pub fn pieces<E>(
        &self,
        start: u64,
        len: u64,
        mut f: impl FnMut(u64, u64, Option<Extent>) -> Result<(), E>,
    ) -> Result<(), E> {
        let end = start + len;
        let mut at = start;
        if let Some((&first, extent)) = self.extents.get_prev(&start)
            && first + extent.len > start
        {
            let upto = (first + extent.len).min(end);
            f(start, upto - start, Some(extent.part(start - first, upto - start)))?;
            at = upto;
        }
        if at < end {
            for (&first, extent) in self.extents.range(at..end) {
                if first > at {
                    f(at, first - at, None)?;
                }
                let upto = (first + extent.len).min(end);
                f(first, upto - first, Some(extent.part(0, upto - first)))?;
                at = upto;
            }
        }
        if at < end { f(at, end - at, None) } else { Ok(()) }
    }

    /// All extents in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Extent)> {
        self.extents.iter().map(|(start, extent)| (*start, extent))
    }

    /// The extents of records at or after `from`, in order, of an overlay that grew out of `base`. Costs what the two
    /// do not share.
    pub fn since(&self, base: &Self, from: LogPos) -> Vec<(u64, Extent)> {
        let changed = base.extents.diff(&self.extents).filter_map(|item| match item {
            DiffItem::Add(start, extent) | DiffItem::Update { new: (start, extent), .. } => Some((*start, extent)),
            DiffItem::Remove(..) => None,
        });
        changed.filter(|(_, e)| e.record >= from).map(|(start, e)| (start, e.clone())).collect()
    }

    /// An overlay of exactly these extents, which must not overlap.
    pub fn from_extents(extents: Vec<(u64, Extent)>) -> Self {
        Self { extents: extents.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn extent(record: u64, len: u64) -> Extent {
        let content = Content::Data {
            payload: LogPos(record * 1_000_000),
            crcs: vec![record as u32; len as usize].into(),
            first: 0,
        };
        Extent { len, record: LogPos(record), content }
    }

    /// Which record each block of `0..n` was last written by, and which of its blocks it shows.
    fn show(overlay: &Overlay, n: u64) -> Vec<Option<(u64, u64)>> {
        let mut out = Vec::new();
        let done: Result<(), Infallible> = overlay.pieces(0, n, |start, len, extent| {
            assert_eq!(start, out.len() as u64);
            for i in 0..len {
                out.push(extent.as_ref().map(|e| match &e.content {
                    Content::Data { payload, .. } => (e.record.0, (payload.0 - e.record.0 * 1_000_000) / 4096 + i),
                    Content::Zero => (e.record.0, 0),
                }));
            }
            Ok(())
        });
        done.unwrap();
        assert_eq!(out.len() as u64, n);
        out
    }

    #[test]
    fn agrees_with_an_array_under_random_inserts() {
        let mut random = crate::medium::sim::Random(7);
        for _ in 0..200 {
            let mut overlay = Overlay::default();
            let mut model = vec![None; 64];
            for record in 1..40 {
                let start = random.below(64);
                let len = 1 + random.below(64 - start);
                overlay.insert(start, extent(record, len));
                for i in 0..len {
                    model[(start + i) as usize] = Some((record, i));
                }
                assert_eq!(show(&overlay, 64), model);
            }
        }
    }

    #[test]
    fn a_clone_does_not_see_later_inserts_and_since_finds_exactly_them() {
        let mut base = Overlay::default();
        for i in 0..100 {
            base.insert(i * 10, extent(1 + i, 5));
        }
        let mut later = base.clone();
        later.insert(12, extent(500, 2));
        later.insert(2000, extent(501, 1));
        assert!(show(&base, 1000).iter().flatten().all(|(record, _)| *record < 500));
        let found: Vec<_> = later.since(&base, LogPos(500)).iter().map(|(s, e)| (*s, e.record.0)).collect();
        assert_eq!(found, [(12, 500), (2000, 501)]);
        assert!(base.same(&base.clone()) && later.len() > base.len());
    }
}
