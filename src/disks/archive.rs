//! States out to and in from archives: single streams that carry deduplication and compression to another store.

use std::io::{Read, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use storage::{ArchiveReader, ArchiveReport, ArchiveState, Disk, DiskId, Source};

use super::files::Still;
use super::{DiskView, Disks, IMPORTING, TEMPORARY, check_disk_name, create, name_taken};
use crate::engine::error::{Error, Kind, Result};
use crate::engine::records::{Consistency, Record, SnapshotRecord, check_comment, load_all, new_id};

/// What an archive says of a state besides its name and size.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Note {
    /// Of a sandbox's snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    snapshot: Option<SnapshotNote>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct SnapshotNote {
    sandbox_id: String,
    comment: Option<String>,
    consistency: Consistency,
    template: Option<String>,
    created_at: jiff::Timestamp,
    /// How its programs want to be run.
    #[serde(default)]
    image: vmm::image::ImageConfig,
}

/// An archive that is ready to be written.
pub struct ArchiveExport {
    disks: Arc<Disks>,
    still: Still,
    state: ArchiveState,
}

impl ArchiveExport {
    /// Writes all of it. The store's failures and the reader's going away are told alike.
    pub fn write(self, to: &mut dyn Write) -> Result<ArchiveReport> {
        Ok(self.disks.store.write_archive(&[(self.still.source(), self.state)], to)?)
    }
}

impl Disks {
    /// Begins to archive what `key` names, as it is now.
    pub fn archive(self: &Arc<Self>, key: &str) -> Result<ArchiveExport> {
        let still = self.still(key)?;
        let disk = self.store.open_source(still.source())?;
        let records = load_all::<SnapshotRecord>(&self.store)?;
        let record = records.into_iter().find(|r| Source::Snapshot(r.snapshot) == still.source());
        let note = Note {
            snapshot: record.map(|r| SnapshotNote {
                sandbox_id: r.sandbox_id,
                comment: r.comment,
                consistency: r.consistency,
                template: r.template,
                image: r.image,
                created_at: r.created_at,
            }),
        };
        let note = serde_json::to_vec(&note).map_err(|e| Error::new(Kind::Internal, e.to_string()))?;
        let state = ArchiveState { name: key.to_owned(), size_bytes: disk.size_bytes(), note };
        Ok(ArchiveExport { disks: self.clone(), still, state })
    }

    /// Would an archive be taken in under this name, in this domain or none?
    pub fn check_import(&self, name: &str, domain: Option<&str>) -> Result<()> {
        check_disk_name(name)?;
        domain.map_or(Ok(()), storage::check_domain)?;
        if self.store.disk_by_name(name).is_some() { Err(name_taken(name)) } else { Ok(()) }
    }

    /// Makes disks of an archive: one of this name, of several states `NAME-1`, `NAME-2` and so on. All or none.
    /// They are in this domain or none, whatever they were in.
    pub fn import_archive(
        self: &Arc<Self>,
        name: &str,
        domain: Option<&str>,
        from: impl Read,
    ) -> Result<Vec<DiskView>> {
        self.check_import(name, domain)?;
        let (arrival, _) = Arrival::read(self, Some(name), domain, from)?;
        let ids = arrival.disks.clone();
        arrival.finish(|_| Ok(()))?;
        let facts = self.facts()?;
        ids.into_iter().map(|id| self.view(Source::Disk(id), &facts)).collect()
    }

    /// Makes a snapshot of an archive of one, as it was where it came from but for its id; with `name` under that name.
    /// Whoever keeps the list of snapshots has to be told.
    pub fn import_snapshot(self: &Arc<Self>, name: Option<&str>, from: impl Read) -> Result<SnapshotRecord> {
        let (arrival, states) = Arrival::read(self, None, None, from)?;
        let ([disk], [state]) = (arrival.disks.as_slice(), states.as_slice()) else {
            return Err(Error::new(Kind::InvalidInput, format!("the archive has {} states", states.len()))
                .hint("import it as disks: miosa disk import FILE --name NAME"));
        };
        let (disk, size) = (*disk, state.size_bytes);
        let note: Note = serde_json::from_slice(&state.note).unwrap_or_default();
        let mut record = None;
        arrival.finish(|tx| {
            let id = new_id("snap");
            let note = note.snapshot;
            let made = SnapshotRecord {
                memory: None,
                snapshot: tx.snapshot(disk, &id),
                id,
                sandbox_id: note.as_ref().map(|n| n.sandbox_id.clone()).unwrap_or_default(),
                comment: name.map(str::to_owned).or_else(|| note.as_ref().and_then(|n| n.comment.clone())),
                disk_size_bytes: size,
                // Of a disk nobody says that it was at rest.
                consistency: note.as_ref().map_or(Consistency::Crash, |n| n.consistency),
                template: note.as_ref().and_then(|n| n.template.clone()),
                image: note.as_ref().map(|n| n.image.clone()).unwrap_or_default(),
                created_at: note.as_ref().map_or_else(jiff::Timestamp::now, |n| n.created_at),
                expires_at: None,
                ttl_ms: None,
            };
            check_comment(made.comment.as_deref())?;
            tx.put_record(SnapshotRecord::KIND, &made.id, made.encode()?);
            tx.delete_disk(disk);
            record = Some(made);
            Ok(())
        })?;
        record.ok_or_else(|| Error::new(Kind::Internal, "an import made no snapshot"))
    }
}

/// Disks that an archive is read into. Nothing of them is left if this is dropped before it is finished, or if the process
/// ends.
struct Arrival {
    owner: Arc<Disks>,
    disks: Vec<DiskId>,
    finished: bool,
}

impl Arrival {
    fn read(
        owner: &Arc<Disks>,
        name: Option<&str>,
        domain: Option<&str>,
        from: impl Read,
    ) -> Result<(Self, Vec<ArchiveState>)> {
        let archive = ArchiveReader::open(from)?;
        let states = archive.states().to_vec();
        let own = new_id("import");
        let base = name.unwrap_or(&own);
        let names: Vec<String> = match states.len() {
            1 => vec![base.to_owned()],
            several => (1..=several).map(|n| format!("{base}-{n}")).collect(),
        };
        let changing = owner.changing.lock();
        let mut tx = owner.store.begin();
        let mut ids = Vec::new();
        for (name, state) in names.iter().zip(&states) {
            if owner.store.disk_by_name(name).is_some() {
                return Err(name_taken(name));
            }
            let id = create(&mut tx, name, state.size_bytes, domain);
            tx.put_record(TEMPORARY, &id.to_string(), IMPORTING);
            ids.push(id);
        }
        tx.commit_durable()?;
        drop(changing);
        let arrival = Self { owner: owner.clone(), disks: ids, finished: false };
        let disks: storage::Result<Vec<Disk>> = arrival.disks.iter().map(|id| owner.store.disk(*id)).collect();
        archive.fill(&disks?)?;
        Ok((arrival, states))
    }

    /// Makes them durable and like any others, with what else is to happen at the same time.
    fn finish(mut self, also: impl FnOnce(&mut storage::Transaction<'_>) -> Result<()>) -> Result<()> {
        self.owner.store.flush()?;
        let mut tx = self.owner.store.begin();
        self.disks.iter().for_each(|id| tx.delete_record(TEMPORARY, &id.to_string()));
        also(&mut tx)?;
        tx.commit_durable()?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let mut tx = self.owner.store.begin();
        for id in &self.disks {
            tx.delete_disk(*id);
            tx.delete_record(TEMPORARY, &id.to_string());
        }
        if let Err(error) = tx.commit_durable() {
            tracing::warn!(%error, "half-imported disks stay until the store is opened again");
        }
    }
}
