//! Named snapshots: a name keeps a snapshot until it is taken away, whatever becomes of the sandbox and of retention.
//!
//! The name is a record of its own that points at the snapshot's. A snapshot that is taken for a name is durable together
//! with it, and goes with it.

use jiff::Timestamp;

use super::Engine;
use super::checkpoint::SnapshotRequest;
use super::error::Result;
use super::records::{NamedSnapshotRecord, Record, SandboxRecord, SnapshotRecord, put_all};
use super::registry::no_name;

/// A name, and the snapshot that it keeps.
#[derive(Debug, Clone)]
pub struct NamedSnapshot {
    /// The name.
    pub record: NamedSnapshotRecord,
    /// The snapshot.
    pub snapshot: SnapshotRecord,
}

/// What gets a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamedSource {
    /// A snapshot that is there, by id or unique name.
    Snapshot(String),
    /// The present state of a sandbox.
    Sandbox(String),
}

/// What became of a snapshot whose name was taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unnamed {
    /// It is one of its sandbox's snapshots again.
    Released,
    /// It had been taken for the name, and is gone.
    Deleted,
    /// Another name keeps it.
    Kept,
}

impl Engine {
    /// Names, newest first.
    pub fn named_snapshots(&self) -> Vec<NamedSnapshot> {
        let mut all: Vec<_> = self
            .shared
            .registry
            .named()
            .into_iter()
            .map(|(record, snapshot)| NamedSnapshot { record, snapshot })
            .collect();
        all.sort_by(|a, b| (b.record.created_at, &b.record.name).cmp(&(a.record.created_at, &a.record.name)));
        all
    }

    /// One, by its name.
    pub fn named_snapshot(&self, name: &str) -> Result<NamedSnapshot> {
        self.named_snapshots().into_iter().find(|named| named.record.name == name).ok_or_else(|| no_name(name))
    }

    /// Whether a name keeps this snapshot.
    pub fn is_named(&self, snapshot_id: &str) -> bool {
        self.shared.registry.is_named(snapshot_id)
    }

    /// Sandboxes that are there and were made from a snapshot.
    pub fn sandboxes_from_snapshot(&self, snapshot_id: &str) -> Vec<SandboxRecord> {
        let all = self.list(None).into_iter().map(|view| view.record);
        all.filter(|record| record.from_snapshot.as_deref() == Some(snapshot_id)).collect()
    }

    /// Gives a snapshot a name, which nobody has; or takes one for it.
    pub async fn name_snapshot(&self, name: &str, source: NamedSource) -> Result<NamedSnapshot> {
        let naming = self.shared.registry.name_snapshot(name)?;
        let (shared, name) = (self.shared.clone(), name.to_owned());
        match source {
            NamedSource::Snapshot(key) => {
                let snapshot = shared.registry.snapshot(&key, None)?;
                self.detached(async move {
                    let (snapshot_id, created_at) = (snapshot.id.clone(), Timestamp::now());
                    let record = NamedSnapshotRecord { name, snapshot_id, taken: false, created_at };
                    shared.registry.pin_snapshot(&naming, &record)?;
                    let kept = record.clone();
                    if let Err(error) = shared.transact(move |tx| put_all(tx, &[kept])).await {
                        let _ = shared.registry.take_named(&record.name);
                        return Err(error);
                    }
                    Ok(NamedSnapshot { record, snapshot })
                })
                .await
            }
            NamedSource::Sandbox(key) => {
                let sandbox = self.find(&key)?;
                self.detached(async move {
                    let request = SnapshotRequest { comment: Some(name.clone()), ..SnapshotRequest::default() };
                    let snapshot = sandbox.snapshot(request, Some(name.clone())).await?;
                    let (snapshot_id, created_at) = (snapshot.id.clone(), snapshot.created_at);
                    let record = NamedSnapshotRecord { name, snapshot_id, taken: true, created_at };
                    naming.give(record.clone());
                    Ok(NamedSnapshot { record, snapshot })
                })
                .await
            }
        }
    }

    /// Takes a name away. A snapshot that was taken for it goes too, unless another name keeps it.
    pub async fn unname_snapshot(&self, name: &str) -> Result<(NamedSnapshot, Unnamed)> {
        let named = self.named_snapshot(name)?;
        let shared = self.shared.clone();
        self.detached(async move {
            let (record, goes) = shared.registry.take_named(&named.record.name)?;
            let (key, deleted) = (record.name.clone(), goes.clone());
            let gone = shared.transact(move |tx| {
                tx.delete_record(NamedSnapshotRecord::KIND, &key);
                if let Some(snapshot) = deleted {
                    tx.delete_snapshot(snapshot.snapshot);
                    tx.delete_record(SnapshotRecord::KIND, &snapshot.id);
                }
                Ok(())
            });
            if let Err(error) = gone.await {
                goes.into_iter().for_each(|snapshot| shared.registry.insert_snapshot(snapshot));
                shared.registry.insert_named(record);
                return Err(error);
            }
            let outcome = match (goes.is_some(), record.taken) {
                (true, _) => Unnamed::Deleted,
                (false, true) => Unnamed::Kept,
                (false, false) if shared.registry.is_named(&record.snapshot_id) => Unnamed::Kept,
                (false, false) => Unnamed::Released,
            };
            Ok((named, outcome))
        })
        .await
    }
}
