//! Disks in and out, piece by piece.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use storage::{Disk, DiskId, Source};

use super::{DiskView, Disks, EXPORTING, IMPORTING, TEMPORARY, create};
use crate::engine::error::{Error, Kind, Result};
use crate::sparse::data_runs;

/// Bytes read at a time.
const PIECE: u64 = 1 << 20;

/// A disk being filled. Nothing of it is left if it is dropped before [`Import::finish`], or if the process ends.
pub struct Import {
    disks: Arc<Disks>,
    id: DiskId,
    disk: Disk,
    finished: bool,
}

impl Import {
    /// Makes the disk; it cannot be used until the import is finished.
    pub fn begin(disks: Arc<Disks>, name: &str, size_bytes: u64, domain: Option<&str>) -> Result<Self> {
        let changing = disks.changing.lock();
        disks.check_new(name, size_bytes, domain)?;
        let mut tx = disks.store.begin();
        let id = create(&mut tx, name, size_bytes, domain);
        tx.put_record(TEMPORARY, &id.to_string(), IMPORTING);
        tx.commit_durable()?;
        let disk = disks.store.disk(id)?;
        drop(changing);
        Ok(Self { disks, id, disk, finished: false })
    }

    /// Writes what is not zero of `bytes`.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > self.disk.size_bytes()) {
            let message = format!("{} bytes at {offset} are beyond the end of the disk", bytes.len());
            return Err(Error::new(Kind::InvalidInput, message));
        }
        for run in data_runs(bytes) {
            self.disk.write(offset + run.start as u64, &bytes[run.clone()])?;
        }
        Ok(())
    }

    /// Makes it durable, and a disk like any other.
    pub fn finish(mut self) -> Result<DiskView> {
        self.disk.flush()?;
        let mut tx = self.disks.store.begin();
        tx.delete_record(TEMPORARY, &self.id.to_string());
        tx.commit_durable()?;
        self.finished = true;
        self.disks.view(Source::Disk(self.id), &self.disks.facts()?)
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let mut tx = self.disks.store.begin();
        tx.delete_disk(self.id);
        tx.delete_record(TEMPORARY, &self.id.to_string());
        if let Err(error) = tx.commit_durable() {
            tracing::warn!(disk = %self.id, %error, "a half-imported disk stays until the store is opened again");
        }
    }
}

/// A disk being read: as it was when this was made, whatever is written to it meanwhile.
pub struct Export {
    disks: Arc<Disks>,
    disk: Disk,
    /// Where there may be data.
    todo: VecDeque<(u64, u64)>,
    /// Read and not yet given away.
    ready: VecDeque<(u64, Bytes)>,
    temporary: Vec<Source>,
}

impl Export {
    /// Begins to read a disk or snapshot.
    pub fn begin(disks: Arc<Disks>, key: &str) -> Result<Self> {
        let changing = disks.changing.lock();
        let source = disks.find(key)?;
        disks.check_ready(source)?;
        let size = disks.store.open_source(source)?.size_bytes();
        let logical = disks.store.logical_bytes(source)?;
        let mut tx = disks.store.begin();
        let mut temporary = Vec::new();
        let frozen = match source {
            Source::Snapshot(_) => source,
            Source::Disk(id) => {
                let state = Source::Snapshot(tx.snapshot(id, "export"));
                temporary.push(state);
                state
            }
        };
        // Where little is stored, what differs from nothing is found faster than by reading all of it.
        let nothing = (logical < size / 4).then(|| {
            let name = crate::engine::records::new_id("export");
            let nothing = Source::Disk(tx.create_disk(&name, 4_096));
            temporary.push(nothing);
            nothing
        });
        temporary.iter().for_each(|t| tx.put_record(TEMPORARY, &t.to_string(), EXPORTING));
        // They need not survive anything, so nobody waits for a sync.
        let made = if temporary.is_empty() { Ok(()) } else { tx.commit().map(drop) };
        let (disk, nothing) = match made {
            Ok(()) => (disks.store.open_source(frozen)?, nothing),
            Err(error) => {
                // A store that is full or takes no more writes can still be read.
                tracing::warn!(%error, "exporting the disk as it is at each moment");
                temporary.clear();
                (disks.store.open_source(source)?, None)
            }
        };
        drop(changing);
        let mut export = Self { disks, disk, todo: VecDeque::new(), ready: VecDeque::new(), temporary };
        let ranges = nothing.and_then(|nothing| export.disks.store.diff(frozen, nothing).ok());
        export.todo = match ranges {
            Some(ranges) => ranges.into_iter().map(|r| (r.offset, r.bytes)).collect(),
            None => VecDeque::from([(0, size)]),
        };
        Ok(export)
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    /// The next bytes that are not zero, and where they are; none at the end.
    pub fn next_piece(&mut self) -> Result<Option<(u64, Bytes)>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Ok(Some(piece));
            }
            let Some((offset, bytes)) = self.todo.pop_front() else { return Ok(None) };
            let len = bytes.min(PIECE);
            if bytes > len {
                self.todo.push_front((offset + len, bytes - len));
            }
            let mut buffer = vec![0; len as usize];
            self.disk.read(offset, &mut buffer)?;
            let buffer = Bytes::from(buffer);
            let runs = data_runs(&buffer).into_iter();
            self.ready.extend(runs.map(|run| (offset + run.start as u64, buffer.slice(run))));
        }
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if self.temporary.is_empty() {
            return;
        }
        let mut tx = self.disks.store.begin();
        for source in &self.temporary {
            match source {
                Source::Disk(id) => tx.delete_disk(*id),
                Source::Snapshot(id) => tx.delete_snapshot(*id),
            }
            tx.delete_record(TEMPORARY, &source.to_string());
        }
        if let Err(error) = tx.commit().map(drop) {
            tracing::warn!(%error, "what an export read from stays until the store is opened again");
        }
    }
}
