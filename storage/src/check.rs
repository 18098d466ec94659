//! The whole-store check, and healing: every frame decoded, every digest recomputed, every map walked; what is damaged is
//! named by pack, disk and block, and made whole again where an undamaged copy exists.

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, BlockId, GroupId, PackId};
use crate::catalogue::{Batch, Table};
use crate::disk::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::GroupEntry;
use crate::inner::Inner;
use crate::map;
use crate::pack::{self, Digest, GroupPlace, PackFacts};
use crate::rows::{Checked, decode, encode, parse_id};
use crate::seal;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap, HashSet};

/// The row of the last check.
const CHECKED: &str = "checked";
/// Sentences about single blocks that a report has at most; beyond that it counts.
const SENTENCES: usize = 200;

/// What a check looked at, what is wrong, and what was healed.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CheckReport {
    /// Packs read.
    pub packs: u64,
    /// Blocks decoded and hashed again.
    pub blocks: u64,
    /// Disks and snapshots whose maps were walked.
    pub maps: u64,
    /// Blocks made whole again from a copy.
    pub healed: u64,
    /// One sentence for each thing that is damaged and was not healed, naming pack or disk, and byte or block. Empty: all
    /// is well.
    pub damage: Vec<String>,
}

/// A group that cannot be read or is not what its digests say.
struct Bad {
    place: GroupPlace,
    /// `None` when the pack's digests are damaged themselves.
    digests: Option<Vec<Digest>>,
    why: String,
}

/// What reading all packs found.
#[derive(Default)]
struct Found {
    groups: BTreeMap<GroupId, Bad>,
    /// Packs whose table of contents or digests are damaged, with what is whole in them.
    packs: BTreeMap<PackId, (Error, Vec<(GroupId, GroupPlace)>)>,
}

/// Checks the store. Damage goes into the report, other failures are errors. With `heal`, damaged blocks of which a copy
/// is stored elsewhere or in memory are written anew under their old addresses.
pub(crate) fn check(inner: &Inner, heal: bool) -> Result<CheckReport> {
    let _no_collection = inner.collecting.lock();
    let mut report = CheckReport::default();
    let mut found = read_packs(inner, &mut report)?;
    let mut lost: HashSet<BlockId> = HashSet::new();
    if heal && !(found.groups.is_empty() && found.packs.is_empty()) {
        // An old pack may carry a manifest that a repair would need; from here on it does not.
        seal::checkpoint_all(inner)?;
        heal_all(inner, &mut found, &mut report)?;
    }
    for (pack, (e, _)) in &found.packs {
        report.damage.push(format!("{pack}: {e}"));
    }
    for (group, bad) in &found.groups {
        report.damage.push(bad.why.clone());
        let entry = GroupEntry { group: *group, slots: bad.place.slots, kind: bad.place.kind };
        lost.extend(entry.slots().map(|slot| BlockId::new(*group, slot)));
    }
    walk_maps(inner, &lost, &mut report);
    let checked = Checked { unix_seconds: pack::unix_ms() / 1_000, damage: report.damage.len() as u64 };
    let mut batch = Batch::default();
    batch.put(Table::Meta, CHECKED, encode(&checked)?);
    if let Err(e) = inner.catalogue.commit(batch) {
        tracing::warn!("the time of a check is not noted: {e}");
    }
    Ok(report)
}

/// When everything was last checked; all 0 if it never was.
pub(crate) fn last_check(inner: &Inner) -> Result<Checked> {
    let row = inner.catalogue.get(Table::Meta, CHECKED.as_bytes())?;
    row.map_or(Ok(Checked::default()), |row| decode("the time of the last check", &row))
}

/// Reads every group of every pack.
fn read_packs(inner: &Inner, report: &mut CheckReport) -> Result<Found> {
    // The two tables have to be of one moment.
    let no_sealing = inner.sealer.running.lock();
    let mut packs: BTreeMap<PackId, (PackFacts, Vec<(GroupId, GroupPlace)>)> = BTreeMap::new();
    packs.extend(inner.blocks.packs()?.into_iter().map(|(pack, facts)| (pack, (facts, Vec::new()))));
    inner.catalogue.scan(Table::Groups, &mut |key, row| {
        let group = GroupId(parse_id(key)?);
        let place = inner.blocks.parse_place(group, row)?;
        match packs.get_mut(&place.pack) {
            Some((_, groups)) => groups.push((group, place)),
            None => {
                report.damage.push(format!("group {} is in {}, which is not in the catalogue", group.0, place.pack))
            }
        }
        Ok(())
    })?;
    drop(no_sealing);
    let mut found = Found::default();
    for (pack, (facts, mut groups)) in packs {
        report.packs += 1;
        let digests = match inner.blocks.contents(inner.uuid, pack, &facts) {
            Ok((_, digests)) => Some(digests),
            Err(e) if e.kind() == ErrorKind::Damaged => {
                found.packs.insert(pack, (e, groups.clone()));
                None
            }
            Err(e) => return Err(e),
        };
        groups.sort_by_key(|(_, place)| place.offset);
        for (group, place) in groups {
            let first = place.digest as usize;
            let count = place.slots.count_ones() as usize;
            let own = digests.as_ref().and_then(|all| all.get(first..first + count)).map(<[_]>::to_vec);
            match check_group(inner, group, &place, own.as_deref()) {
                Ok(()) => report.blocks += count as u64,
                Err(e) if e.kind() == ErrorKind::Damaged => {
                    found.groups.insert(group, Bad { place, digests: own, why: e.to_string() });
                }
                Err(e) => return Err(e),
            }
        }
    }
    Ok(found)
}

/// Decodes a group afresh and compares every block with its digest, if that is known.
fn check_group(inner: &Inner, group: GroupId, place: &GroupPlace, digests: Option<&[Digest]>) -> Result<()> {
    let bytes = inner.blocks.read_group_uncached(group, place)?;
    for (i, (block, digest)) in bytes.chunks(BLOCK_SIZE).zip(digests.unwrap_or_default()).enumerate() {
        if pack::digest(block) != *digest {
            let what = format!("{}: block {i} of group {} does not match its digest", place.pack, group.0);
            return Err(Error::damaged(what));
        }
    }
    Ok(())
}

/// Writes anew what copies are found of, and what is whole in packs whose tables are damaged.
fn heal_all(inner: &Inner, found: &mut Found, report: &mut CheckReport) -> Result<()> {
    let copies = find_copies(inner, found)?;
    let _no_sealing = inner.sealer.running.lock();
    let level = inner.options.level;
    let mut writers = inner.pack_writers();
    let mut batch = Batch::default();
    let mut healed = Vec::new();
    for (group, bad) in &found.groups {
        let entry = GroupEntry { group: *group, slots: bad.place.slots, kind: bad.place.kind };
        let digests = bad.digests.clone().unwrap_or_default();
        // If only one block does not match its digest, the others of the frame are still good.
        let own = inner.blocks.read_group_uncached(*group, &bad.place).unwrap_or_default();
        let mut kept = (0u16, Vec::new(), Vec::new());
        let mut whole = 0;
        for (i, (slot, digest)) in entry.slots().zip(&digests).enumerate() {
            let good = |block: &Vec<u8>| pack::digest(block) == *digest;
            let own = own.chunks(BLOCK_SIZE).nth(i).map(<[_]>::to_vec).filter(good);
            whole += u64::from(own.is_some());
            let cached = || inner.blocks.cached_block(BlockId::new(*group, slot)).filter(good);
            if let Some(block) = own.or_else(cached).or_else(|| copies.get(digest).cloned()) {
                kept.0 |= 1 << slot;
                kept.1.extend_from_slice(&block);
                kept.2.push(*digest);
            }
        }
        let made_whole = kept.2.len() as u64 - whole;
        if made_whole > 0 {
            let domain = inner.blocks.facts(bad.place.pack)?.origin.domain;
            writers.at(level, domain)?.put_group(GroupEntry { slots: kept.0, ..entry }, &kept.1, &kept.2)?;
            report.healed += made_whole;
            healed.push((*group, kept.0));
        }
    }
    let lost = |found: &Found, pack| {
        found.groups.iter().any(|(group, bad)| {
            let kept = healed.iter().find(|(healed, _)| healed == group).map_or(0, |(_, slots)| *slots);
            bad.place.pack == pack && bad.place.slots & !kept != 0
        })
    };
    // A pack goes only when nothing in it is lost: somebody may yet get something out of it.
    let mut goes = Vec::new();
    for (pack, (_, groups)) in found.packs.iter().filter(|(pack, _)| !lost(found, **pack)) {
        goes.push(*pack);
        let domain = inner.blocks.facts(*pack)?.origin.domain;
        for (group, place) in groups.iter().filter(|(group, _)| !found.groups.contains_key(group)) {
            // Its frame's checksum holds, so the digests can be made again.
            let bytes = inner.blocks.read_group_uncached(*group, place)?;
            let digests: Vec<Digest> = bytes.chunks(BLOCK_SIZE).map(pack::digest).collect();
            let entry = GroupEntry { group: *group, slots: place.slots, kind: place.kind };
            writers.at(level, domain)?.put_group(entry, &bytes, &digests)?;
        }
        batch.delete(Table::Packs, pack.0.to_be_bytes());
    }
    for new in writers.finish(&[])? {
        new.add_to(&mut batch)?;
    }
    inner.catalogue.commit(batch)?;
    inner.index.clear();
    for pack in goes {
        found.packs.remove(&pack);
        pack::remove(&*inner.medium, pack)?;
        inner.blocks.forget_pack(pack);
    }
    for (group, slots) in healed {
        inner.blocks.forget_group(group);
        if let Some(bad) = found.groups.get_mut(&group) {
            bad.place.slots &= !slots;
        }
    }
    found.groups.retain(|_, bad| bad.place.slots != 0);
    Ok(())
}

/// Blocks elsewhere in the packs with the digests that are wanted, read and verified.
fn find_copies(inner: &Inner, found: &Found) -> Result<HashMap<Digest, Vec<u8>>> {
    let wanted: HashSet<Digest> =
        found.groups.values().filter_map(|bad| bad.digests.as_ref()).flatten().copied().collect();
    let mut copies = HashMap::new();
    for (pack, facts) in inner.blocks.packs()?.into_iter().filter(|(pack, _)| !found.packs.contains_key(pack)) {
        let (contents, digests) = inner.blocks.contents(inner.uuid, pack, &facts)?;
        let blocks = contents.frames.iter().flat_map(|f| &f.groups).flat_map(|e| e.slots().map(|s| (e.group, s)));
        for ((group, slot), digest) in blocks.zip(digests) {
            if !wanted.contains(&digest) || copies.contains_key(&digest) || found.groups.contains_key(&group) {
                continue;
            }
            let mut block = vec![0; BLOCK_SIZE];
            if inner.blocks.read(BlockId::new(group, slot), &mut block).is_ok() && pack::digest(&block) == digest {
                copies.insert(digest, block);
            }
        }
    }
    Ok(copies)
}

/// Walks all maps: who refers to what is lost, or to what is nowhere.
fn walk_maps(inner: &Inner, lost: &HashSet<BlockId>, report: &mut CheckReport) {
    let devices: Vec<_> = inner.registry.lock().devices.values().cloned().collect();
    let mut whole = HashSet::new();
    let mut more = 0;
    for device in devices {
        report.maps += 1;
        let mut say = |sentence: String| match report.damage.len() < SENTENCES {
            true => report.damage.push(sentence),
            false => more += 1,
        };
        if let Err(e) = walk_map(inner, &device, lost, &mut whole, &mut say) {
            say(format!("the map of {} ({}) is damaged: {e}", device.source, device.name));
        }
    }
    if more > 0 {
        report.damage.push(format!("and {more} more blocks"));
    }
}

/// `whole` remembers groups that are known to have all blocks.
fn walk_map(
    inner: &Inner,
    device: &Device,
    lost: &HashSet<BlockId>,
    whole: &mut HashSet<GroupId>,
    say: &mut dyn FnMut(String),
) -> Result<()> {
    let state = device.state();
    map::pieces::<Error>(&*inner.blocks, state.root, device.level(), 0, device.size_blocks, &mut |start, len, first| {
        for i in (0..len).filter(|_| !first.is_none()) {
            let id = first.plus(i);
            let offset = (start + i) * BLOCK_BYTES;
            if lost.contains(&id) {
                say(format!("{} ({}): the block at byte {offset} is damaged", device.source, device.name));
            } else if !whole.contains(&id.group()) {
                match inner.blocks.place(id.group()) {
                    Ok(place) if place.slots == u16::MAX => drop(whole.insert(id.group())),
                    Ok(place) if place.slots >> id.slot() & 1 == 1 => {}
                    _ => say(format!(
                        "{} ({}): the block at byte {offset} is stored nowhere",
                        device.source, device.name
                    )),
                }
            }
        }
        Ok(())
    })
}
