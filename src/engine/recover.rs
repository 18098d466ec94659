//! What the engine does before it serves: finish what a previous daemon left.
//!
//! 1. Machines of before are killed: nobody serves their disks. What they flushed is in the store.
//! 2. Records are read; each sandbox asks the table about [`Request::DaemonRestarted`]: a session that was going becomes
//!    `paused`, a non-persistent sandbox is destroyed.
//! 3. Disks and snapshots of the engine's own naming that no record names are deleted: an import that was cut off.
//!    Those that users of the store made are theirs.
//!
//! Each step can be cut off and done again.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;

use super::Shared;
use super::error::{Error, Result};
use super::lifecycle::{Decision, Request, State, decide};
use super::records::{Record, SandboxRecord, SnapshotRecord, StepRecord, TemplateRecord, is_own_name, load_all};
use super::sandbox::Sandbox;

pub(super) async fn run(shared: &Arc<Shared>) -> Result<()> {
    let run_root = shared.settings.run_root.clone();
    for reaped in shared.vmm.reap_orphans(&run_root).await? {
        tracing::info!(pid = reaped.pid, killed = reaped.killed, "a machine of an earlier daemon");
    }
    let records = shared.with_store(move |store| {
        empty_directory(&run_root)
            .map_err(|e| Error::internal(format!("could not empty the directory {}: {e}", run_root.display())))?;
        let mut sandboxes: Vec<SandboxRecord> = load_all(store)?;
        let snapshots: Vec<SnapshotRecord> = load_all(store)?;
        let templates: Vec<TemplateRecord> = load_all(store)?;
        let steps: Vec<StepRecord> = load_all(store)?;
        let mut tx = store.begin();
        let mut changed = false;
        for record in &mut sandboxes {
            if let Decision::Next(next) = decide(record.state, Request::DaemonRestarted, record.persistent) {
                tracing::info!(sandbox = %record.id, from = record.state.name(), to = next.name(), "left by an earlier daemon");
                record.last_error = Some("the daemon ended while the sandbox had a session; what it had flushed is kept".into());
                record.unclean |= record.state != State::Paused;
                record.state = next;
                if next == State::Destroyed {
                    record.destroyed_at = Some(Timestamp::now());
                    record.last_error = None;
                }
                tx.put_record(SandboxRecord::KIND, &record.id, record.encode()?);
                changed = true;
            }
        }
        let disks: BTreeSet<_> = sandboxes.iter().filter(|r| r.state != State::Destroyed).map(|r| r.disk).collect();
        for disk in store.disks().into_iter().filter(|d| is_own_name(&d.name) && !disks.contains(&d.id)) {
            tracing::info!(disk = %disk.name, "deleting a disk that no sandbox has");
            tx.delete_disk(disk.id);
            changed = true;
        }
        let states: BTreeSet<_> = snapshots
            .iter()
            .map(|r| r.snapshot)
            .chain(templates.iter().map(|r| r.snapshot))
            .chain(steps.iter().map(|r| r.snapshot))
            .collect();
        for state in store.snapshots().into_iter().filter(|s| is_own_name(&s.name) && !states.contains(&s.id)) {
            tracing::info!(snapshot = %state.name, "deleting a state that no snapshot or template has");
            tx.delete_snapshot(state.id);
            changed = true;
        }
        if changed {
            tx.commit_durable()?;
        }
        Ok((sandboxes, snapshots, templates))
    });
    let (sandboxes, snapshots, templates) = records.await?;
    for record in sandboxes {
        let live = record.state != State::Destroyed;
        shared.registry.restore(Sandbox::new(shared.clone(), record), live);
    }
    for record in snapshots {
        shared.registry.insert_snapshot(record);
    }
    for record in templates {
        shared.registry.insert_template(record);
    }
    Ok(())
}

/// Sockets and logs of sessions that are over. Only what is inside is removed, and links are not followed.
fn empty_directory(dir: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
