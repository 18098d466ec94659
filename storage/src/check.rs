//! The whole-store check: every frame decoded, every digest recomputed, every map walked.

use crate::block::{BLOCK_SIZE, BlockId, PackId, Source};
use crate::blocks::Blocks;
use crate::catalogue::Table;
use crate::disk::Device;
use crate::error::{Error, Result};
use crate::map;
use crate::pack::{self, PackFacts};
use crate::seal::parse_id;
use crate::store::Inner;
use serde::Serialize;
use std::collections::BTreeSet;

/// What a check looked at and what is wrong.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CheckReport {
    /// Packs read.
    pub packs: u64,
    /// Blocks decoded and hashed again.
    pub blocks: u64,
    /// Disks and snapshots whose maps were walked.
    pub maps: u64,
    /// One sentence for each thing that is damaged, naming pack or disk, and byte or block. Empty: all is well.
    pub damage: Vec<String>,
}

/// Checks the store; damage goes into the report, other failures are errors.
pub(crate) fn check(inner: &Inner) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let mut packs = Vec::new();
    inner.catalogue.scan(Table::Packs, &mut |key, row| {
        let facts: PackFacts =
            postcard::from_bytes(row).map_err(|e| Error::damaged(format!("a row of the packs: {e}")))?;
        packs.push((PackId(parse_id(key)?), facts));
        Ok(())
    })?;
    for (pack, facts) in packs {
        report.packs += 1;
        if let Err(e) = check_pack(inner, pack, &facts, &mut report) {
            report.damage.push(e.to_string());
        }
    }
    let devices: Vec<_> = inner.registry.lock().devices.values().cloned().collect();
    let mut whole = BTreeSet::new();
    for device in devices {
        report.maps += 1;
        check_map(&inner.blocks, &device, &mut whole, &mut report);
    }
    Ok(report)
}

fn check_pack(inner: &Inner, pack: PackId, facts: &PackFacts, report: &mut CheckReport) -> Result<()> {
    let contents = inner.blocks.contents(inner.uuid, pack, facts)?;
    let mut digest_index = 0;
    for frame in &contents.frames {
        for entry in &frame.groups {
            let place = inner.blocks.place(entry.group)?;
            let count = entry.blocks();
            if (place.pack, place.offset, place.slots, place.digest) == (pack, frame.offset, entry.slots, digest_index)
            {
                match check_group(&inner.blocks, entry.group.0, count, &place) {
                    Ok(()) => report.blocks += u64::from(count),
                    Err(e) => report.damage.push(e.to_string()),
                }
            } else {
                report.damage.push(format!("{pack}: the catalogue has group {} elsewhere", entry.group.0));
            }
            digest_index += count;
        }
    }
    Ok(())
}

/// Decodes a group afresh and compares every block with its digest.
fn check_group(blocks: &Blocks, group: u64, count: u32, place: &pack::GroupPlace) -> Result<()> {
    let digests = blocks.digests(place.pack, place.digest, count)?;
    let bytes = blocks.read_group_uncached(crate::block::GroupId(group), place)?;
    for (i, (block, digest)) in bytes.chunks(BLOCK_SIZE).zip(&digests).enumerate() {
        if pack::digest(block) != *digest {
            let what = format!("{}: block {i} of group {group} does not match its digest", place.pack);
            return Err(Error::damaged(what));
        }
    }
    Ok(())
}

/// Walks a map; every block it names has to be in a group. `whole` remembers groups that are known to have all blocks.
fn check_map(blocks: &Blocks, device: &Device, whole: &mut BTreeSet<u64>, report: &mut CheckReport) {
    let state = device.state();
    let mut damage = Vec::new();
    let walked =
        map::pieces::<Error>(blocks, state.root, device.level(), 0, device.size_blocks, &mut |start, len, first| {
            if first.is_none() {
                return Ok(());
            }
            for i in 0..len {
                let id: BlockId = first.plus(i);
                if !whole.contains(&id.group().0) {
                    match blocks.place(id.group()) {
                        Ok(place) if place.slots == u16::MAX => drop(whole.insert(id.group().0)),
                        Ok(place) if place.slots >> id.slot() & 1 == 1 => {}
                        _ => damage.push(format!("{}: block {} is stored nowhere", device.source, start + i)),
                    }
                }
            }
            Ok(())
        });
    if let Err(e) = walked {
        let what = if matches!(device.source, Source::Disk(_)) { "disk" } else { "snapshot" };
        damage.push(format!("the map of {what} {}: {e}", device.source));
    }
    report.damage.append(&mut damage);
}
