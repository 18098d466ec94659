//! What everything costs: the store's figures, and the logical, referenced and exclusive bytes of each disk and snapshot.

use crate::block::{BLOCK_BYTES, BlockId, GroupId, Source};
use crate::blocks::Blocks;
use crate::disk::Device;
use crate::error::{Error, Result};
use crate::format::NodeRef;
use crate::inner::Inner;
use crate::live::mark;
use crate::pack::Digest;
use crate::state::State;
use roaring::RoaringTreemap;
use serde::Serialize;
use std::collections::BTreeSet;

/// What a disk or snapshot costs.
#[derive(Debug, Clone, Serialize)]
pub struct Usage {
    /// Which.
    pub id: String,
    /// Non-zero blocks, each counted once for every place it stands at, in bytes.
    pub logical_bytes: u64,
    /// Bytes in packs of everything it refers to, maps included, shared or not.
    pub referenced_bytes: u64,
    /// Bytes in packs that nothing else refers to: about what deleting it gives back.
    pub exclusive_bytes: u64,
    /// Bytes it has in the log, not yet sealed; not part of the others.
    pub unsealed_bytes: u64,
}

/// Logical, referenced and exclusive bytes of everything, or of `only` one. Walks all maps.
pub(crate) fn usage(inner: &Inner, only: Option<Source>) -> Result<Vec<Usage>> {
    // Sealing and collection would take nodes away under the walk.
    let _still = inner.collecting.lock();
    let _no_sealing = inner.sealer.running.lock();
    let devices: Vec<_> = inner.registry.lock().devices.values().cloned().collect();
    let reach = |root: NodeRef| -> Result<RoaringTreemap> {
        let mut ids = RoaringTreemap::new();
        mark(&inner.blocks, root, &mut ids)?;
        Ok(ids)
    };
    let (mut once, mut shared) = (RoaringTreemap::new(), RoaringTreemap::new());
    for device in &devices {
        let ids = reach(device.state().root)?;
        shared |= &once & &ids;
        once |= ids;
    }
    let mut out = Vec::new();
    for device in devices.iter().filter(|d| only.is_none_or(|only| only == d.source)) {
        let state = device.state();
        let ids = reach(state.root)?;
        let referenced_bytes = stored_bytes(&inner.blocks, &ids)?;
        let exclusive_bytes = stored_bytes(&inner.blocks, &(ids - &shared))?;
        let own = state.overlay.iter().filter(|(_, e)| state.base.as_ref().is_none_or(|b| e.record >= b.upto));
        let unsealed =
            own.filter(|(_, e)| matches!(e.content, crate::overlay::Content::Data { .. })).map(|(_, e)| e.len);
        out.push(Usage {
            id: device.source.to_string(),
            logical_bytes: logical_blocks(inner, device)? * BLOCK_BYTES,
            referenced_bytes,
            exclusive_bytes,
            unsealed_bytes: unsealed.sum::<u64>() * BLOCK_BYTES,
        });
    }
    Ok(out)
}

/// What several disks and snapshots cost together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct GroupUsage {
    /// Bytes in packs of everything that any of them refers to, each counted once.
    pub referenced_bytes: u64,
    /// Of these, bytes that nothing outside of the group refers to: about what deleting all of it gives back.
    pub exclusive_bytes: u64,
}

/// What each group costs; whatever is in none of them is one more. Walks all maps, twice.
pub(crate) fn usage_of_groups(inner: &Inner, groups: &[Vec<Source>]) -> Result<Vec<GroupUsage>> {
    let _still = inner.collecting.lock();
    let _no_sealing = inner.sealer.running.lock();
    let devices = inner.registry.lock().devices.clone();
    let grouped: BTreeSet<&Source> = groups.iter().flatten().collect();
    let rest: Vec<Source> = devices.keys().filter(|source| !grouped.contains(source)).copied().collect();
    // Roots are sets of addresses; what a group reaches is marked in one set, so that shared maps are walked once.
    let reach = |group: &[Source]| -> Result<RoaringTreemap> {
        let mut ids = RoaringTreemap::new();
        for device in group.iter().filter_map(|source| devices.get(source)) {
            mark(&inner.blocks, device.state().root, &mut ids)?;
        }
        Ok(ids)
    };
    let (mut once, mut shared) = (RoaringTreemap::new(), RoaringTreemap::new());
    for group in groups.iter().chain([&rest]) {
        let ids = reach(group)?;
        shared |= &once & &ids;
        once |= ids;
    }
    let mut out = Vec::with_capacity(groups.len());
    for group in groups {
        let ids = reach(group)?;
        let referenced_bytes = stored_bytes(&inner.blocks, &ids)?;
        out.push(GroupUsage { referenced_bytes, exclusive_bytes: stored_bytes(&inner.blocks, &(ids - &shared))? });
    }
    Ok(out)
}

/// Bytes that these blocks take in packs: their share of their frames, and their digests.
fn stored_bytes(blocks: &Blocks, ids: &RoaringTreemap) -> Result<u64> {
    let mut bytes = 0;
    let mut group: Option<(GroupId, u64)> = None;
    let mut add = |group: Option<(GroupId, u64)>| -> Result<()> {
        if let Some((id, count)) = group {
            let place = blocks.place(id)?;
            let all = u64::from(place.slots.count_ones()).max(1);
            bytes += u64::from(place.share) * count / all + count * size_of::<Digest>() as u64;
        }
        Ok(())
    };
    for id in ids {
        let of = BlockId(id).group();
        match &mut group {
            Some((current, count)) if *current == of => *count += 1,
            _ => {
                add(group.take())?;
                group = Some((of, 1));
            }
        }
    }
    add(group)?;
    Ok(bytes)
}

/// Figures of the whole store. Bytes, unless a name says otherwise.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stats {
    /// Disks.
    pub disks: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// What all disks and snapshots hold, each counted in full: their non-zero blocks.
    pub logical_bytes: u64,
    /// Different blocks among them that are stored in packs, uncompressed.
    pub unique_bytes: u64,
    /// Packs, as far as they hold data.
    pub pack_bytes: u64,
    /// Packs, as far as they hold map nodes.
    pub map_bytes: u64,
    /// The catalogue and index.
    pub index_bytes: u64,
    /// The log: what is not sealed.
    pub log_bytes: u64,
    /// All that the store's directory occupies on the host.
    pub stored_bytes: u64,
    /// `logical_bytes / unique_bytes`; 0 when nothing is sealed.
    pub dedup_ratio: f64,
    /// `unique_bytes / pack_bytes`; 0 when nothing is sealed.
    pub compression_ratio: f64,
    /// When everything was last checked, in seconds since 1970; 0 if it never was.
    pub checked_unix_seconds: u64,
    /// What that check found damaged and not healed.
    pub damage: u64,
}

/// See [`crate::Store::stats`].
pub(crate) fn stats(inner: &Inner) -> Result<Stats> {
    let devices: Vec<_> = inner.registry.lock().devices.values().cloned().collect();
    let mut stats = Stats::default();
    for device in &devices {
        match device.source {
            Source::Disk(_) => stats.disks += 1,
            Source::Snapshot(_) => stats.snapshots += 1,
        }
        stats.logical_bytes += logical_blocks(inner, device)? * BLOCK_BYTES;
    }
    let (mut data_blocks, mut packs) = (0, 0);
    for (_, facts) in inner.blocks.packs()? {
        stats.map_bytes += facts.node_bytes;
        data_blocks += facts.data_blocks;
        packs += facts.bytes;
    }
    let allocated = |dir| inner.medium.allocated_bytes(dir).map_err(|e| Error::io("cannot measure the store", e));
    stats.unique_bytes = data_blocks * BLOCK_BYTES;
    stats.pack_bytes = packs - stats.map_bytes;
    stats.log_bytes = allocated(crate::log::DIR)?;
    stats.index_bytes = if inner.dir.is_some() { allocated(crate::catalogue::DIR)? } else { 0 };
    stats.stored_bytes = allocated("")?;
    let ratio = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 / b as f64 };
    stats.dedup_ratio = ratio(stats.logical_bytes, stats.unique_bytes);
    stats.compression_ratio = ratio(stats.unique_bytes, stats.pack_bytes);
    let checked = crate::check::last_check(inner)?;
    (stats.checked_unix_seconds, stats.damage) = (checked.unix_seconds, checked.damage);
    Ok(stats)
}

/// Mapped blocks plus what the overlay adds or takes. A zero block in the log counts until it is sealed.
pub(crate) fn logical_blocks(inner: &Inner, device: &Device) -> Result<u64> {
    let mut state = device.state();
    loop {
        match count_blocks(inner, device, &state) {
            Err(e) => {
                // Moved onto a sealed root meanwhile: the old root's nodes may have been collected.
                let now = device.state();
                if now.root == state.root {
                    return Err(e);
                }
                state = now;
            }
            done => return done,
        }
    }
}

fn count_blocks(inner: &Inner, device: &Device, state: &State) -> Result<u64> {
    let mut blocks = state.root.mapped;
    for (start, extent) in state.overlay.iter() {
        let covered = crate::map::mapped(&*inner.blocks, state.root, device.level(), start, start + extent.len)?;
        blocks -= covered;
        if matches!(extent.content, crate::overlay::Content::Data { .. }) {
            blocks += extent.len;
        }
    }
    Ok(blocks)
}
