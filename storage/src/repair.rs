//! Making the catalogue again from what packs say of themselves, when it is lost or damaged.
//!
//! Packs are read in the order of their numbers; a later one has the last word on a group and on a disk, snapshot or
//! record. What a damaged pack still holds is copied to a new one. The old catalogue is kept beside the new one. Then the
//! store is opened, which replays the log; damage in it ends the log there, and is reported.

use crate::block::{BLOCK_SIZE, BlockId, GroupId, PackId};
use crate::blocks::decode_frame;
use crate::catalogue::{Batch, Catalogue, RocksCatalogue, Table};
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{FrameHeader, GroupEntry, GroupKind, PackContents, PackFooter, PackHeader, StoreHeader, StoreUuid};
use crate::index::Keys;
use crate::inner::{Options, lock};
use crate::medium::file::{Backend, FileMedium};
use crate::medium::{File, Medium, Mode};
use crate::note;
use crate::pack::{self, Counters, Digest, GroupPlace, PackFacts, PackWriter, PackWriters};
use crate::rows::{Checkpoint, Manifest, encode};
use crate::store::Store;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// What a repair found and made.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RepairReport {
    /// Packs that are in the new catalogue.
    pub packs: u64,
    /// Groups of blocks that are.
    pub groups: u64,
    /// Disks, snapshots and records found.
    pub disks: u64,
    /// See `disks`.
    pub snapshots: u64,
    /// See `disks`.
    pub records: u64,
    /// Where the old catalogue is kept.
    pub old_catalogue: Option<PathBuf>,
    /// Where the old log is kept, if it was damaged.
    pub old_log: Option<PathBuf>,
    /// One sentence for each thing that is damaged.
    pub damage: Vec<String>,
}

struct Repair {
    medium: Arc<FileMedium>,
    uuid: StoreUuid,
    catalogue: RocksCatalogue,
    /// Groups that an intact pack has.
    groups: BTreeSet<GroupId>,
    checkpoint: Checkpoint,
    report: RepairReport,
}

/// Makes the catalogue of the store in `dir` again. No other process may have it open.
pub(crate) fn repair(dir: &Path) -> Result<RepairReport> {
    if !dir.join(pack::DIR).is_dir() {
        let what = format!("{} is not a store: it has no directory {}", dir.display(), pack::DIR);
        return Err(Error::new(ErrorKind::NotFound, what));
    }
    let held = lock(dir)?;
    let medium = Arc::new(FileMedium::new(dir, Backend::Plain));
    let mut report = RepairReport::default();
    let packs = list_packs(&*medium)?;
    let uuid = find_uuid(&medium, &packs, &mut report)?;
    let place = dir.join(crate::catalogue::DIR);
    if place.exists() {
        let aside = dir.join(format!("catalogue.old-{}", unix_ms()));
        std::fs::rename(&place, &aside).map_err(|e| Error::io("cannot move the old catalogue aside", e))?;
        report.old_catalogue = Some(aside);
    }
    note::remove(&*medium)?;
    let catalogue = RocksCatalogue::open(&place, true)?;
    let checkpoint = Checkpoint::default();
    let mut repair = Repair { medium, uuid, catalogue, groups: BTreeSet::new(), checkpoint, report };
    let next_pack = packs.last().map_or(1, |pack| pack.0 + 1);
    let mut broken = Vec::new();
    for pack in packs {
        match repair.take_pack(pack) {
            Err(e) if e.kind() == ErrorKind::Damaged => {
                repair.report.damage.push(format!("{pack}: {e}"));
                broken.push(pack);
            }
            done => done?,
        }
    }
    repair.salvage(&broken, next_pack)?;
    let report = repair.finish()?;
    drop(held);
    replay(dir, report)
}

fn list_packs(medium: &dyn Medium) -> Result<Vec<PackId>> {
    let names = medium.list(pack::DIR).map_err(|e| Error::io("cannot list the packs", e))?;
    let mut packs: Vec<PackId> = names.iter().filter_map(|(name, _)| pack::parse_name(name)).collect();
    packs.sort();
    Ok(packs)
}

/// The store's identity, from the file STORE or, where that is lost, from the packs; then STORE is written again.
fn find_uuid(medium: &FileMedium, packs: &[PackId], report: &mut RepairReport) -> Result<StoreUuid> {
    let mut bytes = [0; 64];
    let header = medium.open("STORE", Mode::Read).and_then(|f| f.read_at(&mut bytes, 0));
    match header.map_err(|e| Error::io("the file STORE", e)).and_then(|()| StoreHeader::decode(&bytes)) {
        Ok(header) => return Ok(header.uuid),
        Err(e) if e.kind() == ErrorKind::UnsupportedVersion => return Err(e),
        Err(e) => report.damage.push(format!("the file STORE, which is written again: {e}")),
    }
    let uuid = packs.iter().find_map(|pack| {
        let file = medium.open(&pack::file_name(*pack), Mode::Read).ok()?;
        file.read_at(&mut bytes, 0).ok()?;
        PackHeader::decode(&bytes).ok()?.map(|h| h.store)
    });
    let uuid = uuid.ok_or_else(|| Error::damaged("neither STORE nor any pack tells which store this is"))?;
    drop(medium.remove("STORE"));
    let cannot = |e| Error::io("cannot write the file STORE", e);
    let file = medium.open("STORE", Mode::Create).map_err(cannot)?;
    file.write_at(&StoreHeader { uuid }.encode(), 0).map_err(cannot)?;
    file.sync().map_err(cannot)?;
    medium.sync_dir("").map_err(cannot)?;
    Ok(uuid)
}

fn read(file: &dyn File, at: u64, bytes: u64) -> Result<Vec<u8>> {
    let mut buf = vec![0; bytes as usize];
    file.read_at(&mut buf, at).map_err(|e| Error::io(format!("cannot read {bytes} bytes at {at}"), e))?;
    Ok(buf)
}

impl Repair {
    /// Puts what a pack says into the catalogue.
    fn take_pack(&mut self, pack: PackId) -> Result<()> {
        let file =
            self.medium.open(&pack::file_name(pack), Mode::Read).map_err(|e| Error::io("cannot be opened", e))?;
        let bytes = file.file_bytes().map_err(|e| Error::io("has no length", e))?;
        let unfinished = || Error::damaged("the footer is missing or damaged");
        let head = self.header(pack, &read(&*file, 0, PackHeader::BYTES.min(bytes))?)?;
        let origin = head.ok_or_else(|| Error::damaged("the header is damaged, or another store's"))?.origin;
        let foot_at = bytes.checked_sub(PackFooter::BYTES).ok_or_else(unfinished)?;
        let foot = read(&*file, foot_at, PackFooter::BYTES)?;
        let foot = foot.as_array().and_then(|foot| PackFooter::decode(foot, bytes));
        let footer = foot.filter(|f| f.pack == pack).ok_or_else(unfinished)?;
        let sections = read(&*file, footer.digests_at, foot_at - footer.digests_at)?;
        if crc32c::crc32c(&sections) != footer.sections_crc {
            return Err(Error::damaged("the digests, contents or manifest are damaged"));
        }
        let part =
            |from: u64, upto: u64| &sections[(from - footer.digests_at) as usize..(upto - footer.digests_at) as usize];
        let unpack = |bytes: &[u8]| {
            zstd::stream::decode_all(bytes).map_err(|e| Error::damaged(format!("a section does not decompress: {e}")))
        };
        let unreadable = |e: postcard::Error| Error::damaged(format!("cannot be read: {e}"));
        let contents: PackContents =
            postcard::from_bytes(&unpack(part(footer.contents_at, footer.manifest_at))?).map_err(unreadable)?;
        let digests = part(footer.digests_at, footer.contents_at).as_chunks::<32>().0;
        let manifest: Option<Manifest> = match footer.manifest_at < foot_at {
            true => Some(postcard::from_bytes(&unpack(part(footer.manifest_at, foot_at))?).map_err(unreadable)?),
            false => None,
        };
        let facts = PackFacts {
            bytes,
            digests_at: footer.digests_at,
            contents_at: footer.contents_at,
            manifest_at: footer.manifest_at,
            origin,
            ..PackFacts::default()
        };
        self.take_contents(pack, facts, &contents, digests)?;
        if let Some(manifest) = manifest {
            self.take_manifest(manifest)?;
        }
        self.report.packs += 1;
        Ok(())
    }

    /// The header with which a pack begins; `None` if it is damaged or another's.
    fn header(&self, pack: PackId, head: &[u8]) -> Result<Option<PackHeader>> {
        let head = head.as_array().map(PackHeader::decode).transpose()?.flatten();
        Ok(head.filter(|head| (head.store, head.pack) == (self.uuid, pack)))
    }

    fn take_contents(
        &mut self,
        pack: PackId,
        mut facts: PackFacts,
        contents: &PackContents,
        digests: &[Digest],
    ) -> Result<()> {
        let mut batch = Batch::default();
        let keys = Keys::new(&self.uuid, facts.origin.domain);
        let mut digest = 0;
        for frame in &contents.frames {
            let all: u32 = frame.groups.iter().map(GroupEntry::blocks).sum();
            for entry in &frame.groups {
                let share = (u64::from(frame.bytes) * u64::from(entry.blocks()) / u64::from(all.max(1))) as u32;
                let GroupEntry { group, slots, kind } = *entry;
                let place = GroupPlace { pack, offset: frame.offset, bytes: frame.bytes, share, slots, kind, digest };
                batch.put(Table::Groups, group.0.to_be_bytes(), encode(&place)?);
                self.groups.insert(group);
                match kind {
                    GroupKind::Node => facts.node_blocks += u64::from(entry.blocks()),
                    GroupKind::Data => {
                        facts.data_blocks += u64::from(entry.blocks());
                        let own = digests.get(digest as usize..).unwrap_or_default();
                        let own = own.iter().map(|digest| keys.of(digest));
                        for (slot, key) in entry.slots().zip(own).filter(|(_, key)| key.is_sampled()) {
                            batch.put(Table::Index, key.row(), BlockId::new(group, slot).0.to_be_bytes());
                        }
                    }
                }
                digest += entry.blocks();
            }
            if frame.groups.iter().any(|g| g.kind == GroupKind::Node) {
                facts.node_bytes += u64::from(frame.bytes);
            }
        }
        batch.put(Table::Packs, pack.0.to_be_bytes(), facts.to_row()?);
        self.catalogue.commit(batch)
    }

    fn take_manifest(&mut self, manifest: Manifest) -> Result<()> {
        let mut batch = Batch::default();
        if manifest.whole {
            for table in [Table::Disks, Table::Snapshots, Table::Records] {
                self.catalogue.scan(table, &mut |key, _| {
                    batch.delete(table, key);
                    Ok(())
                })?;
            }
        }
        manifest.add_to(&mut batch)?;
        if manifest.checkpoint.log_start >= self.checkpoint.log_start {
            self.checkpoint = manifest.checkpoint;
        }
        self.catalogue.commit(batch)
    }

    /// Copies the frames of broken packs that are whole, and that nothing intact has, to new packs; the broken files stay
    /// under another name. What was in a pack without a header is in no known domain from then on.
    fn salvage(&mut self, broken: &[PackId], next_pack: u64) -> Result<()> {
        let counters = Arc::new(Counters { group: AtomicU64::new(0), pack: AtomicU64::new(next_pack) });
        let (medium, uuid) = (self.medium.clone(), self.uuid);
        let new = |level, domain| PackWriter::new(medium.clone(), uuid, counters.clone(), level, domain);
        let mut writers = PackWriters::new(new);
        for pack in broken {
            let name = pack::file_name(*pack);
            let Ok(file) = self.medium.open(&name, Mode::Read) else { continue };
            let data = read(&*file, 0, file.file_bytes().unwrap_or(0)).unwrap_or_default();
            let head = self.header(*pack, data.get(..PackHeader::BYTES as usize).unwrap_or_default())?;
            let domain = head.map_or(Domain::UNKNOWN, |head| head.origin.domain);
            let mut at = PackHeader::BYTES as usize;
            while let Some(frame) = data.get(at..).and_then(FrameHeader::whole) {
                at += frame.len();
                let Ok((header, raw)) = decode_frame(frame) else { continue };
                let mut from = 0;
                for entry in header.groups {
                    let bytes = &raw[from..from + entry.blocks() as usize * BLOCK_SIZE];
                    from += bytes.len();
                    if self.groups.insert(entry.group) {
                        let digests: Vec<Digest> = bytes.chunks(BLOCK_SIZE).map(pack::digest).collect();
                        writers.at(1, domain)?.put_group(entry, bytes, &digests)?;
                    }
                }
            }
        }
        let new: Vec<PackId> = writers.finish(&[])?.iter().map(|finished| finished.pack).collect();
        for pack in new {
            self.take_pack(pack)?;
        }
        for pack in broken {
            self.medium
                .set_aside(&pack::file_name(*pack))
                .map_err(|e| Error::io(format!("cannot rename {pack}"), e))?;
        }
        self.checkpoint.next_pack = self.checkpoint.next_pack.max(counters.pack.load(Ordering::Relaxed));
        Ok(())
    }

    fn finish(mut self) -> Result<RepairReport> {
        let after_last = self.groups.last().map_or(1, |group| group.0 + 1);
        self.checkpoint.next_group = self.checkpoint.next_group.max(after_last);
        self.report.groups = self.groups.len() as u64;
        let mut batch = Batch::default();
        batch.put(Table::Meta, "store", self.uuid);
        batch.put(Table::Meta, "checkpoint", encode(&self.checkpoint)?);
        self.catalogue.commit(batch)?;
        self.medium
            .sync_dir("")
            .and_then(|()| self.medium.sync_dir(pack::DIR))
            .map_err(|e| Error::io("cannot sync", e))?;
        Ok(self.report)
    }
}

/// Opens the store, if need be only as far as its log is whole, and counts what is there. A log that is not whole is kept
/// beside the new one.
fn replay(dir: &Path, mut report: RepairReport) -> Result<RepairReport> {
    let options = Options { background: false, ..Options::default() };
    let store = match Store::open(dir, options.clone()) {
        Err(e) if e.kind() == ErrorKind::Damaged => {
            report.damage.push(e.to_string());
            report.old_log = Some(keep_log(dir)?);
            let store = Store::open(dir, Options { salvage_log: true, ..options })?;
            // From here on the store no longer stands on the damaged log.
            store.seal()?;
            store
        }
        done => done?,
    };
    report.disks = store.disks().len() as u64;
    report.snapshots = store.snapshots().len() as u64;
    report.records = store.inner().registry.lock().records.len() as u64;
    report.damage.extend(store.check()?.damage);
    store.close()?;
    Ok(report)
}

/// Gives the log's files second names in a directory beside it.
fn keep_log(dir: &Path) -> Result<PathBuf> {
    let cannot = |e| Error::io("cannot keep the damaged log", e);
    let aside = dir.join(format!("log.old-{}", unix_ms()));
    std::fs::create_dir(&aside).map_err(cannot)?;
    for entry in std::fs::read_dir(dir.join(crate::log::DIR)).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        std::fs::hard_link(entry.path(), aside.join(entry.file_name())).map_err(cannot)?;
    }
    Ok(aside)
}

fn unix_ms() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis())
}
