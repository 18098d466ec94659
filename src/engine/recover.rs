//! What the engine does before it serves: finish what a previous daemon left.
//!
//! 1. Records are read. Sandboxes with a session whose machine lives, and whose disk can be shown to it again, are
//!    survivors: see [`super::survivor`]. Those in which a template was built are not: their builds are over. Nor are those
//!    that were to go on from memory that is still kept: they have not begun to.
//! 2. All other machines are killed: nobody serves their disks. What they flushed is in the store.
//! 3. Each other sandbox asks the table about [`Request::DaemonRestarted`]: a session that was going becomes `paused`, a
//!    non-persistent sandbox is destroyed.
//!    Volumes are detached from what is destroyed.
//! 4. Disks and snapshots of the engine's own naming that no record names are deleted: an import that was cut off.
//!    Those that users of the store made are theirs.
//! 5. Survivors are taken over, each by its owner, while the engine already serves; who uses one waits for that.
//!
//! Each step can be cut off and done again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use storage::{DiskId, SnapshotId, Store};

use super::Shared;
use super::error::{Error, Result};
use super::lifecycle::{Decision, Request, State, decide};
use super::records::{
    BootedRecord, NamedSnapshotRecord, Record, SandboxRecord, SnapshotRecord, StepRecord, TemplateRecord, VolumeRecord,
    VolumeSnapshotRecord, is_own_name, load_all, put_all,
};
use super::sandbox::Sandbox;
use super::session::private_dir;
use super::survivor::{LOST, NOT_STARTED, Survivor};
use super::template::is_bench;
use super::usage::{Compute, Ledgers};

pub(super) async fn run(shared: &Arc<Shared>) -> Result<()> {
    let run_root = shared.settings.run_root.clone();
    let mut sandboxes: Vec<SandboxRecord> = shared.with_store(load_all).await?;
    let (mut volumes, volume_snapshots): (Vec<VolumeRecord>, Vec<VolumeSnapshotRecord>) =
        shared.with_store(|store| Ok((load_all(store)?, load_all(store)?))).await?;
    shared.volumes.restore(volumes.clone(), Vec::new());
    let mut survivors = find_survivors(shared, &sandboxes).await?;
    let keep: Vec<PathBuf> = survivors.keys().map(|id| run_root.join(id)).collect();
    for reaped in shared.vmm.reap_orphans(&run_root, &keep).await? {
        tracing::info!(pid = reaped.pid, killed = reaped.killed, "a machine of an earlier daemon");
    }
    let going_on: BTreeSet<String> = survivors.keys().cloned().collect();
    let put_right = shared.with_store(move |store| {
        empty_directory(&run_root, &keep)
            .map_err(|e| Error::internal(format!("could not empty the directory {}: {e}", run_root.display())))?;
        let snapshots: Vec<SnapshotRecord> = load_all(store)?;
        let templates: Vec<TemplateRecord> = load_all(store)?;
        let steps: Vec<StepRecord> = load_all(store)?;
        let states = snapshots.iter().map(|r| r.snapshot).chain(templates.iter().map(|r| r.snapshot));
        let states = states.chain(steps.iter().map(|r| r.snapshot));
        let booted = booted_of(store, &templates)?;
        let states = states.chain(booted.iter().map(|r| r.disk));
        let states = states.chain(volume_snapshots.iter().map(|r| r.snapshot)).collect();
        let (ledgers, lost) = Ledgers::load(store, |id| going_on.contains(id))?;
        let memories = snapshots.iter().filter_map(|r| r.memory.as_ref()).chain(booted.iter().map(|r| &r.memory));
        let memories = memories.map(|m| m.disk).collect();
        put_right(store, &mut sandboxes, &mut volumes, &going_on, (&states, &memories), &lost)?;
        Ok(((sandboxes, snapshots, templates), (volumes, volume_snapshots), (booted, ledgers)))
    });
    let ((sandboxes, snapshots, templates), (volumes, volume_snapshots), (booted, ledgers)) = put_right.await?;
    shared.booted.restore(booted);
    shared.volumes.restore(volumes, volume_snapshots);
    shared.usage.restore(ledgers);
    for record in sandboxes {
        let live = record.state != State::Destroyed;
        let sandbox = Sandbox::new(shared.clone(), record);
        if let Some(survivor) = survivors.remove(sandbox.id()) {
            // Locked before anybody can find it.
            let (sandbox, owner) = (sandbox.clone(), sandbox.own().await);
            tokio::spawn(async move { sandbox.adopt(owner, survivor).await });
        }
        shared.registry.restore(sandbox, live);
    }
    for record in snapshots {
        shared.registry.insert_snapshot(record);
    }
    for record in shared.with_store(load_all::<NamedSnapshotRecord>).await? {
        shared.registry.insert_named(record);
    }
    for record in templates {
        shared.registry.insert_template(record);
    }
    Ok(())
}

/// Templates that have booted; the records of those whose template is gone go.
fn booted_of(store: &Store, templates: &[TemplateRecord]) -> Result<Vec<BootedRecord>> {
    let all: Vec<BootedRecord> = load_all(store)?;
    let (booted, gone): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|r| templates.iter().any(|t| t.snapshot == r.template));
    if !gone.is_empty() {
        let mut tx = store.begin();
        gone.iter().for_each(|r| tx.delete_record(BootedRecord::KIND, &r.id));
        tx.commit_durable()?;
    }
    Ok(booted)
}

/// By the ids of their sandboxes.
async fn find_survivors(shared: &Arc<Shared>, sandboxes: &[SandboxRecord]) -> Result<BTreeMap<String, Survivor>> {
    let run_root = &shared.settings.run_root;
    let live: BTreeSet<PathBuf> = shared.vmm.survivors(run_root).await?.into_iter().collect();
    let goes_on = |r: &&SandboxRecord| {
        let in_session = matches!(r.state, State::Creating | State::Running | State::Snapshotting);
        // With its memory still kept, its guest has not run on its disk since: it is started from that again.
        in_session && r.memory.is_none() && !is_bench(r) && live.contains(&run_root.join(&r.id))
    };
    let wanted: Vec<SandboxRecord> = sandboxes.iter().filter(goes_on).cloned().collect();
    let finding = shared.clone();
    let find = move || {
        let found = wanted.iter().filter_map(|record| {
            Some((record.id.clone(), Survivor::find(&finding, record, finding.volumes.of(&record.id))?))
        });
        found.collect()
    };
    tokio::task::spawn_blocking(find).await.map_err(|e| Error::internal(format!("looking for survivors: {e}")))
}

/// Brings records and the store to what is there now, in one transaction. `states` and `memories` are those of which a
/// snapshot's or template's record tells, and `lost` is what sessions had, as far as it is known, that nobody ended.
fn put_right(
    store: &Store,
    sandboxes: &mut [SandboxRecord],
    volumes: &mut [VolumeRecord],
    going_on: &BTreeSet<String>,
    (states, memories): (&BTreeSet<SnapshotId>, &BTreeSet<DiskId>),
    lost: &BTreeMap<String, Compute>,
) -> Result<()> {
    let mut tx = store.begin();
    let mut changed = false;
    for record in sandboxes.iter_mut().filter(|record| !going_on.contains(&record.id)) {
        if let Decision::Next(next) = decide(record.state, Request::DaemonRestarted, record.persistent) {
            tracing::info!(sandbox = %record.id, from = record.state.name(), to = next.name(), "left by an earlier daemon");
            record.last_error = Some(if record.memory.is_some() { NOT_STARTED } else { LOST }.into());
            record.unclean |= record.state != State::Paused;
            record.state = next;
            let had = lost.get(&record.id).copied().unwrap_or_default();
            record.total_runtime_ms += had.runtime_ms;
            record.vcpu_ms += had.vcpu_ms;
            record.memory_mib_ms += had.memory_mib_ms;
            if next == State::Destroyed {
                record.memory = None;
                record.destroyed_at = Some(Timestamp::now());
                record.last_error = None;
            }
            tx.put_record(SandboxRecord::KIND, &record.id, record.encode()?);
            changed = true;
        }
    }
    let live = || sandboxes.iter().filter(|r| r.state != State::Destroyed);
    let holders: BTreeSet<&str> = live().map(|r| r.id.as_str()).collect();
    for volume in volumes.iter_mut() {
        let attached = volume.attachments.len();
        volume.attachments.retain(|at| holders.contains(at.sandbox_id.as_str()));
        if volume.attachments.len() < attached {
            put_all(&mut tx, std::slice::from_ref(volume))?;
            changed = true;
        }
    }
    let disks: BTreeSet<_> = live().map(|r| r.disk).chain(volumes.iter().map(|v| v.disk)).collect();
    let kept: BTreeSet<_> = live().filter_map(|r| r.memory.as_ref()).map(|m| m.disk).collect();
    let is_known = |id: &DiskId| disks.contains(id) || kept.contains(id) || memories.contains(id);
    for disk in store.disks().into_iter().filter(|d| is_own_name(&d.name) && !is_known(&d.id)) {
        tracing::info!(disk = %disk.name, "deleting a disk that no record names");
        tx.delete_disk(disk.id);
        changed = true;
    }
    for state in store.snapshots().into_iter().filter(|s| is_own_name(&s.name) && !states.contains(&s.id)) {
        tracing::info!(snapshot = %state.name, "deleting a state that no record names");
        tx.delete_snapshot(state.id);
        changed = true;
    }
    if changed {
        tx.commit_durable()?;
    }
    Ok(())
}

/// Sockets and logs of sessions that are over. Only what is inside is removed, and links are not followed.
fn empty_directory(dir: &std::path::Path, keep: &[PathBuf]) -> std::io::Result<()> {
    private_dir(dir)?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if keep.contains(&entry.path()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
