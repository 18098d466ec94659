//! Garbage collection: plan → check → apply, while disks are in use and snapshots exist.
//!
//! 1. *Mark*, with sealing held back: every root that a disk, a snapshot or a fork point stands on is walked; each node
//!    and block it reaches is live. Groups with numbers from here on belong to later sealings and are left alone.
//! 2. *Plan*: the group table says how much of each pack is dead. From here on deduplication finds no dead block again,
//!    so that nothing dead comes back to life.
//! 3. *Apply*, a few packs at a time: what is live is written to a new pack under its old addresses, so that no map
//!    changes; one durable batch moves the group table over; then the old packs go.
//!
//! A crash at any point leaves either the old packs or the new ones in the catalogue; the others are removed at the next
//! start. Before the first pack goes, a checkpoint writes the whole catalogue into the newest pack's manifest, since an
//! old pack may carry a manifest that a repair would need.

use crate::block::{BLOCK_SIZE, BlockId, GroupId, PackId};
use crate::blocks::Blocks;
use crate::catalogue::{Batch, Table};
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{GroupEntry, NodeRef, Origin};
use crate::index::IndexKey;
use crate::inner::Inner;
use crate::live::{Live, mark};
use crate::pack::{self, Digest, GroupPlace, PackFacts, PackWriters};
use crate::priority::Background;
use crate::rows::parse_id;
use crate::seal;
use roaring::RoaringTreemap;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A pack is rewritten when at least this share of its blocks is dead.
const DEAD_SHARE: f64 = 0.04;
/// Packs below this size are small; when a domain has this many of them they are merged.
const SMALL_BYTES: u64 = 4 << 20;
const SMALL_PACKS: usize = 16;
/// Live bytes rewritten before the old packs go: what a collection needs as free space at a time.
const BATCH_BYTES: u64 = 64 << 20;

/// What a collection found and did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Nothing was changed.
    pub dry_run: bool,
    /// Packs looked at.
    pub packs: u64,
    /// Blocks and map nodes that something refers to, and that nothing refers to.
    pub live_blocks: u64,
    /// See `live_blocks`.
    pub dead_blocks: u64,
    /// Packs with nothing live, which go.
    pub packs_removed: u64,
    /// Packs whose live part is written anew.
    pub packs_rewritten: u64,
    /// Packs left alone because something live in them is damaged.
    pub packs_damaged: u64,
    /// Bytes of packs given back, or with `dry_run` about what would be.
    pub bytes_freed: u64,
}

/// All roots that something stands on. Called with sealing held back, so that none changes.
fn roots(inner: &Inner) -> Vec<NodeRef> {
    let registry = inner.registry.lock();
    let mut roots = Vec::new();
    for device in registry.devices.values() {
        let state = device.state();
        roots.push(state.root);
        let (open, sealed) = state.chain();
        for layer in open.iter().chain(&sealed) {
            roots.push(layer.frozen.read().root);
            roots.extend(layer.sealed.get());
        }
    }
    roots
}

/// A pack in the plan.
struct Candidate {
    pack: PackId,
    facts: PackFacts,
    live: u64,
    dead: u64,
    live_bytes: u64,
}

/// Collects; with `dry_run` only says what would go.
pub(crate) fn collect(inner: &Inner, dry_run: bool) -> Result<GcReport> {
    let _one = inner.collecting.lock();
    inner.log.healthy()?;
    let live = {
        let _no_sealing = inner.sealer.running.lock();
        let upto = GroupId(inner.counters.group.load(Ordering::Relaxed));
        let mut ids = RoaringTreemap::new();
        let roots = roots(inner);
        let _background = Background::begin(inner);
        for root in roots {
            mark(&inner.blocks, root, &mut ids)?;
        }
        let live = Arc::new(Live { ids, upto });
        if !dry_run {
            inner.index.keep_only(Some(live.clone()));
        }
        live
    };
    let outcome = plan(inner, &live, dry_run).and_then(|(mut report, candidates)| {
        if !dry_run && !candidates.is_empty() {
            report.bytes_freed = 0;
            // What needs no space goes first: on a full file system it makes room for the rest.
            let free = |p: &Candidate| p.live == 0 && !p.facts.has_manifest();
            let (free, rest): (Vec<_>, Vec<_>) = candidates.into_iter().partition(free);
            apply(inner, &live, &free, &mut report)?;
            if !rest.is_empty() {
                seal::checkpoint_all(inner)?;
                apply(inner, &live, &rest, &mut report)?;
            }
        }
        Ok(report)
    });
    if !dry_run {
        let _no_sealing = inner.sealer.running.lock();
        inner.index.keep_only(None);
    }
    outcome
}

fn plan(inner: &Inner, live: &Live, dry_run: bool) -> Result<(GcReport, Vec<Candidate>)> {
    let candidate = |(pack, facts)| (pack, Candidate { pack, facts, live: 0, dead: 0, live_bytes: 0 });
    let mut packs: BTreeMap<PackId, Candidate> = inner.blocks.packs()?.into_iter().map(candidate).collect();
    // A pack of a later sealing may be in the table already: its groups are all kept.
    inner.catalogue.scan(Table::Groups, &mut |key, row| {
        let group = GroupId(parse_id(key)?);
        let place = inner.blocks.parse_place(group, row)?;
        let all = u64::from(place.slots.count_ones());
        let kept = u64::from(live.slots(group, place.slots).count_ones());
        if let Some(pack) = packs.get_mut(&place.pack) {
            pack.live += kept;
            pack.dead += all - kept;
            pack.live_bytes += u64::from(place.share) * kept / all.max(1);
        }
        Ok(())
    })?;
    let mut report = GcReport { dry_run, packs: packs.len() as u64, ..GcReport::default() };
    let newest = packs.values().rfind(|p| p.facts.has_manifest()).map(|p| p.pack);
    let mut small: BTreeMap<Domain, usize> = BTreeMap::new();
    for pack in packs.values().filter(|p| p.facts.bytes < SMALL_BYTES) {
        *small.entry(pack.facts.origin.domain).or_default() += 1;
    }
    let mut candidates = Vec::new();
    for pack in packs.into_values() {
        report.live_blocks += pack.live;
        report.dead_blocks += pack.dead;
        let dead_share = pack.dead as f64 / (pack.live + pack.dead).max(1) as f64;
        let small = small.get(&pack.facts.origin.domain).is_some_and(|packs| *packs >= SMALL_PACKS);
        let merge = small && pack.facts.bytes < SMALL_BYTES;
        // A pack may hold nothing but the newest manifest.
        let empty = pack.live == 0 && (pack.dead > 0 || Some(pack.pack) != newest);
        if empty || dead_share >= DEAD_SHARE || merge {
            let goes = if pack.live == 0 { &mut report.packs_removed } else { &mut report.packs_rewritten };
            *goes += 1;
            report.bytes_freed += pack.facts.bytes.saturating_sub(pack.live_bytes);
            candidates.push(pack);
        }
    }
    // What gives back most for the least work goes first; packs with nothing live need no space at all.
    candidates.sort_by_key(|p| p.live_bytes);
    Ok((report, candidates))
}

fn apply(inner: &Inner, live: &Live, candidates: &[Candidate], report: &mut GcReport) -> Result<()> {
    let mut rest = candidates;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = rest.iter().take_while(|p| {
            bytes += p.live_bytes;
            bytes <= BATCH_BYTES
        });
        let (now, later) = rest.split_at(fits.count().max(1));
        match move_packs(inner, live, now, report) {
            Err(e) if e.kind() == ErrorKind::Damaged && now.len() == 1 => {
                tracing::error!("not collected, since scrub has to heal it first: {e}");
                report.packs_damaged += 1;
            }
            // One of them is damaged: the others can still be collected.
            Err(e) if e.kind() == ErrorKind::Damaged => {
                now.chunks(1).try_for_each(|one| apply(inner, live, one, report))?;
            }
            done => done?,
        }
        rest = later;
        // Writers must not wait for a long collection.
        if inner.options.background && inner.log.live_bytes() >= inner.options.log_bytes {
            seal::checkpoint(inner)?;
        }
    }
    Ok(())
}

/// Step 3 for some packs.
fn move_packs(inner: &Inner, live: &Live, packs: &[Candidate], report: &mut GcReport) -> Result<()> {
    let _no_sealing = inner.sealer.running.lock();
    let background = Background::begin(inner);
    let mut writers = inner.pack_writers();
    let mut batch = Batch::default();
    for candidate in packs {
        move_pack(inner, live, candidate, &mut writers, &mut batch)?;
        background.pace();
        batch.delete(Table::Packs, candidate.pack.0.to_be_bytes());
    }
    let new = writers.finish(&[])?;
    new.iter().try_for_each(|finished| finished.add_to(&mut batch))?;
    inner.catalogue.commit(batch)?;
    let freed: u64 = packs.iter().map(|p| p.facts.bytes).sum();
    let written: u64 = new.iter().map(|p| p.facts.bytes).sum();
    report.bytes_freed += freed.saturating_sub(written);
    for Candidate { pack, .. } in packs {
        pack::remove(&*inner.medium, *pack)?;
        inner.blocks.forget_pack(*pack);
    }
    Ok(())
}

/// Copies what is live in a pack to one of `writers`, and takes what is dead out of the tables.
fn move_pack(
    inner: &Inner,
    live: &Live,
    candidate: &Candidate,
    writers: &mut PackWriters<'_>,
    batch: &mut Batch,
) -> Result<()> {
    // What was packed again keeps its level.
    let Origin { level, domain, .. } = candidate.facts.origin;
    let keys = inner.index.keys(domain);
    let (contents, all_digests) = inner.blocks.contents(inner.uuid, candidate.pack, &candidate.facts)?;
    for frame in &contents.frames {
        for entry in &frame.groups {
            let group = entry.group;
            let Some(place) = inner.blocks.find_place(group)?.filter(|place| place.pack == candidate.pack) else {
                continue;
            };
            let first = place.digest as usize;
            let digests = all_digests.get(first..first + entry.blocks() as usize);
            let digests = digests.ok_or_else(|| Error::damaged(format!("{} has too few digests", place.pack)))?;
            let kept = live.slots(group, entry.slots);
            for (slot, digest) in entry.slots().zip(digests).filter(|(slot, _)| kept >> slot & 1 == 0) {
                forget_block(inner, BlockId::new(group, slot), &keys.of(digest), batch)?;
            }
            if kept == 0 {
                batch.delete(Table::Groups, group.0.to_be_bytes());
                continue;
            }
            let (blocks, digests) = pick(&inner.blocks, group, &place, kept, digests)?;
            let entry = GroupEntry { group, slots: kept, kind: entry.kind };
            writers.at(level.into(), domain)?.put_group(entry, &blocks, &digests)?;
        }
    }
    Ok(())
}

/// Reads a group, verified against its digests, and keeps some of its slots.
pub(crate) fn pick(
    blocks: &Blocks,
    group: GroupId,
    place: &GroupPlace,
    kept: u16,
    digests: &[Digest],
) -> Result<(Vec<u8>, Vec<Digest>)> {
    let bytes = blocks.read_group_uncached(group, place)?;
    let entry = GroupEntry { group, slots: place.slots, kind: place.kind };
    let mut out = (Vec::new(), Vec::new());
    for ((slot, block), digest) in entry.slots().zip(bytes.chunks(BLOCK_SIZE)).zip(digests) {
        if kept >> slot & 1 == 1 {
            // A copy must not launder damage under a fresh checksum.
            if pack::digest(block) != *digest {
                let what = format!("{}: slot {slot} of group {} does not match its digest", place.pack, group.0);
                return Err(Error::damaged(what));
            }
            out.0.extend_from_slice(block);
            out.1.push(*digest);
        }
    }
    Ok(out)
}

/// Takes a dead block out of the index, unless the entry has gone over to another block with the same content.
fn forget_block(inner: &Inner, id: BlockId, key: &IndexKey, batch: &mut Batch) -> Result<()> {
    if key.is_sampled() && inner.catalogue.get(Table::Index, key.row())?.as_deref() == Some(&id.0.to_be_bytes()[..]) {
        batch.delete(Table::Index, key.row());
    }
    Ok(())
}
