//! Packing cold data again: in larger frames and at a higher level of zstd, under the same addresses.
//!
//! A pack remembers the level it was written at, so that none is packed again twice. A few packs at a time are read,
//! compared with their digests and written to new packs; then, with collection and sealing held back for an instant, one
//! durable batch moves the group table over, as a collection does, if everything is still where it was read; then the old
//! packs go. Blocks that nothing refers to move along: finding those is the collection's work.
//!
//! A crash leaves either the old packs or the new ones in the catalogue; the others are removed at the next start. Before
//! the first pack with a manifest goes, a checkpoint writes the whole catalogue into a later one.

use crate::block::{GROUP_BLOCKS, GroupId, PackId};
use crate::catalogue::{Batch, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::format::GroupEntry;
use crate::gc::pick;
use crate::inner::Inner;
use crate::pack::{self, GroupPlace, PackFacts, PackWriters};
use crate::priority::Background;
use crate::seal;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Bytes of packs that are packed again at a time: what it needs as free space, and what an interruption undoes.
const BATCH_BYTES: u64 = 64 << 20;

/// What packing again did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RepackReport {
    /// Packs that were packed again.
    pub packs_rewritten: u64,
    /// Packs left alone because something in them is damaged.
    pub packs_damaged: u64,
    /// Bytes of these packs before.
    pub before_bytes: u64,
    /// Bytes of the packs in their place.
    pub after_bytes: u64,
}

/// Told how long a piece of work took; rests as it sees fit, and says whether to go on.
pub(crate) type Rest<'a> = dyn FnMut(Duration) -> bool + 'a;

type Pack = (PackId, PackFacts);

/// Packs again what is cold, at half of a core's time, as long as nothing is written and nobody asks for a checkpoint.
pub(crate) fn repack_cold(inner: &Inner) -> Result<RepackReport> {
    let age = u64::try_from(inner.options.repack_after.as_millis()).unwrap_or(u64::MAX);
    let end = inner.log.end();
    let mut loads = inner.blocks.loads();
    repack(inner, Some(pack::unix_ms().saturating_sub(age)), &mut |worked| {
        // Disks are read, and their readers need the cores.
        let busy = loads != inner.blocks.loads();
        loads = inner.blocks.loads();
        !inner.sealer.rest(if busy { worked * 8 } else { worked }) && inner.log.end() == end
    })
}

/// Packs again what was packed before `made_before` (in milliseconds since 1970), or all there is, until `rest` says no.
pub(crate) fn repack(inner: &Inner, made_before: Option<u64>, rest: &mut Rest<'_>) -> Result<RepackReport> {
    let mut report = RepackReport::default();
    inner.log.healthy()?;
    let cold = candidates(inner, made_before)?;
    if cold.iter().any(|(_, facts)| facts.has_manifest()) {
        seal::checkpoint_all(inner)?;
    }
    let mut later = &cold[..];
    while !later.is_empty() {
        let mut bytes = 0;
        let fits = later.iter().take_while(|(_, facts)| {
            bytes += facts.bytes;
            bytes <= BATCH_BYTES
        });
        let (now, after) = later.split_at(fits.count().max(1));
        if !repack_some(inner, now, rest, &mut report)? {
            break;
        }
        later = after;
    }
    inner.totals.lock().repacking(&report);
    Ok(report)
}

/// Packs below the level that have data.
fn candidates(inner: &Inner, made_before: Option<u64>) -> Result<Vec<Pack>> {
    let level = inner.options.repack_level;
    let is_cold = |facts: &PackFacts| {
        i32::from(facts.origin.level) < level
            && level > inner.options.level
            && facts.data_blocks > 0
            && made_before.is_none_or(|before| facts.origin.made_unix_ms <= before)
    };
    Ok(inner.blocks.packs()?.into_iter().filter(|(_, facts)| is_cold(facts)).collect())
}

/// Some packs; those that are damaged are left alone. `false`: no more.
fn repack_some(inner: &Inner, packs: &[Pack], rest: &mut Rest<'_>, report: &mut RepackReport) -> Result<bool> {
    match try_repack(inner, packs, rest, report) {
        Err(e) if e.kind() == ErrorKind::Damaged && packs.len() == 1 => {
            if inner.catalogue.get(Table::Packs, &packs[0].0.0.to_be_bytes())?.is_none() {
                // Not damaged: collected meanwhile.
                return Ok(true);
            }
            tracing::error!("not packed again, since scrub has to heal it first: {e}");
            report.packs_damaged += 1;
            Ok(true)
        }
        // One of them: the others can still be packed.
        Err(e) if e.kind() == ErrorKind::Damaged => {
            for one in packs.chunks(1) {
                if !repack_some(inner, one, rest, report)? {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        done => done,
    }
}

fn try_repack(inner: &Inner, packs: &[Pack], rest: &mut Rest<'_>, report: &mut RepackReport) -> Result<bool> {
    let _background = Background::begin(inner);
    let mut writers = inner.pack_writers();
    let mut moved = Vec::new();
    for (pack, facts) in packs {
        if !copy_pack(inner, *pack, facts, &mut writers, &mut moved, rest)? {
            return Ok(false);
        }
    }
    let new = writers.finish(&[])?;
    let mut batch = Batch::default();
    new.iter().try_for_each(|finished| finished.add_to(&mut batch))?;
    packs.iter().for_each(|(pack, _)| batch.delete(Table::Packs, pack.0.to_be_bytes()));

    let _no_collection = inner.collecting.lock();
    let _no_sealing = inner.sealer.running.lock();
    for (group, place) in &moved {
        if inner.blocks.find_place(*group)? != Some(*place) {
            // Collected or healed meanwhile. What was written is of no use; the packs have their turn another time.
            new.iter().try_for_each(|finished| pack::remove(&*inner.medium, finished.pack))?;
            return Ok(true);
        }
    }
    inner.catalogue.commit(batch)?;
    for (pack, facts) in packs {
        report.packs_rewritten += 1;
        report.before_bytes += facts.bytes;
        pack::remove(&*inner.medium, *pack)?;
        inner.blocks.forget_pack(*pack);
    }
    report.after_bytes += new.iter().map(|finished| finished.facts.bytes).sum::<u64>();
    Ok(true)
}

/// Copies what a pack holds to one of `writers`, and notes what it copied. `false`: interrupted.
fn copy_pack(
    inner: &Inner,
    pack: PackId,
    facts: &PackFacts,
    writers: &mut PackWriters<'_>,
    moved: &mut Vec<(GroupId, GroupPlace)>,
    rest: &mut Rest<'_>,
) -> Result<bool> {
    let (contents, all_digests) = inner.blocks.contents(inner.uuid, pack, facts)?;
    let mut begun = Instant::now();
    for (i, entry) in contents.frames.iter().flat_map(|frame| &frame.groups).enumerate() {
        // A pack may list groups that were moved since.
        let Some(place) = inner.blocks.find_place(entry.group)?.filter(|place| place.pack == pack) else { continue };
        let first = place.digest as usize;
        let digests = all_digests.get(first..first + place.slots.count_ones() as usize);
        let digests = digests.ok_or_else(|| Error::damaged(format!("{pack} has too few digests")))?;
        let (blocks, digests) = pick(&inner.blocks, entry.group, &place, place.slots, digests)?;
        let writer = writers.at(inner.options.repack_level, facts.origin.domain)?;
        writer.put_group(GroupEntry { slots: place.slots, ..*entry }, &blocks, &digests)?;
        moved.push((entry.group, place));
        if i as u64 % GROUP_BLOCKS == GROUP_BLOCKS - 1 {
            if !rest(begun.elapsed()) {
                return Ok(false);
            }
            begun = Instant::now();
        }
    }
    Ok(true)
}
