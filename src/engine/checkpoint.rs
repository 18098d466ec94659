//! One consistent point in time of a sandbox: what snapshot and fork are made of.
//!
//! Running: freeze the file system through the agent (the guest writes back what it holds and stops writing), commit one
//! transaction, thaw. Nothing in between depends on the size of the disk. Paused: the transaction alone. If the guest
//! does not freeze in time, or thawed by itself before the transaction was over, the state is still exact at the level
//! of the disk, as after a power cut, and the answer says so.

use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use storage::{DiskId, SnapshotId, Source, Store, Transaction};
use tracing::Instrument;

use super::error::{Error, Result};
use super::lifecycle::{Request, State};
use super::memory::{self, Captured};
use super::metrics::Freeze;
use super::records::{
    Consistency, MemoryRecord, NamedSnapshotRecord, Record, SandboxRecord, SnapshotRecord, new_id, new_machine_id,
    put_all,
};
use super::sandbox::{OwnerGuard, Sandbox};
use super::session::{Ending, Session, within};
use super::snapshots::used;
use super::{SandboxView, Shared, in_domain};

/// Most children of one call.
const MAX_FORKS: u32 = 1_000;

/// A named state to be taken.
#[derive(Debug, Clone, Default)]
pub struct SnapshotRequest {
    /// What the user calls it; need not be unique.
    pub comment: Option<String>,
    /// With what runs, if anything does.
    pub memory: bool,
    /// End the session afterwards, as a stop does.
    pub stop: bool,
    /// Delete it by itself so long after it was last used.
    pub expires_in: Option<std::time::Duration>,
    /// Then delete the oldest snapshots of the sandbox, so that so many are left.
    pub keep_last: Option<u32>,
}

/// New sandboxes on the state of another.
#[derive(Debug, Clone)]
pub struct ForkRequest {
    /// Name of the child; with a count above one, `NAME-1`, `NAME-2` and so on. Without one, the child's id.
    pub name: Option<String>,
    /// How many children.
    pub count: u32,
    /// From this snapshot of the sandbox and not from its present state.
    pub snapshot: Option<String>,
    /// With what runs, or ran when its memory was kept. Without, the children have the files.
    pub memory: bool,
    /// Timeout of the children's sessions, if not the parent's.
    pub timeout: Option<std::time::Duration>,
    /// Notes of the children, if not the parent's.
    pub metadata: Option<serde_json::Map<String, serde_json::Value>>,
    /// Start a session in each child and answer when their agents do; without, children are paused until used. A child
    /// that could not be started says so in its state and last error.
    pub wait: bool,
}

impl Sandbox {
    /// Commits at one consistent point.
    ///
    /// Of a running sandbox `commit` is told `crash`, which is certain; `upgrade` makes that `filesystem` once the guest
    /// says that it was frozen all the while. A crash in between leaves the weaker word.
    pub(super) async fn at_one_point<T: Clone + Send + 'static>(
        self: &Arc<Self>,
        owner: &mut OwnerGuard,
        request: Request,
        commit: impl FnOnce(&Store, Consistency) -> Result<T> + Send + 'static,
        upgrade: impl FnOnce(&Store, &T) -> Result<()> + Send + 'static,
    ) -> Result<(T, Consistency)> {
        let Some(next) = self.decide(request)? else {
            // At rest: the disk is all there is.
            let consistency = if self.record().unclean { Consistency::Crash } else { Consistency::Filesystem };
            let done = self.shared.with_store(move |store| commit(store, consistency)).await?;
            return Ok((done, consistency));
        };
        let Some(session) = &owner.session else {
            return Err(Error::internal(format!("sandbox {} is running without a session", self.name())));
        };
        self.publish(|r| r.state = next);
        let asked = Instant::now();
        let frozen = freeze(&self.shared, session).await;
        let freezing = asked.elapsed();
        let committed = self.shared.with_store(move |store| commit(store, Consistency::Crash)).await;
        let committing = asked.elapsed() - freezing;
        // Also after a failed freeze: it may have taken effect late.
        let stayed_frozen = thaw(&self.shared, session).await;
        let thawing = asked.elapsed() - freezing - committing;
        if frozen && stayed_frozen {
            self.shared.metrics.froze(Freeze { freezing, committing, thawing });
            tracing::info!(sandbox = %self.id(), ?freezing, ?committing, ?thawing, "the file system was frozen");
        } else {
            self.shared.metrics.freeze_failed();
        }
        if let Ok(Some(after)) = self.decide(Request::CheckpointDone) {
            self.publish(|r| r.state = after);
        }
        let done = committed?;
        if !(frozen && stayed_frozen) {
            return Ok((done, Consistency::Crash));
        }
        let told = done.clone();
        match self.shared.with_store(move |store| upgrade(store, &told)).await {
            Ok(()) => Ok((done, Consistency::Filesystem)),
            Err(error) => {
                tracing::warn!(sandbox = %self.id(), %error, "a consistent state is labelled as after a power cut");
                Ok((done, Consistency::Crash))
            }
        }
    }

    /// Runs `take` while the guest is frozen, if it runs and freezes: what it held back is on its disk then.
    pub(super) async fn settled<T: Clone + Send + 'static>(
        self: &Arc<Self>,
        take: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mut owner = self.own().await;
        let (taken, _) = self.at_one_point(&mut owner, Request::Snapshot, |_, _| take(), |_, _| Ok(())).await?;
        Ok(taken)
    }

    /// `named` is a name that keeps it, reserved by the caller, and durable together with the snapshot.
    pub(super) async fn snapshot(
        self: &Arc<Self>,
        request: SnapshotRequest,
        named: Option<String>,
    ) -> Result<SnapshotRecord> {
        let mut owner = self.own().await;
        let of = self.record();
        let SnapshotRequest { comment, memory, stop, expires_in, keep_last: _ } = request;
        let created_at = Timestamp::now();
        let ttl_ms = expires_in.map(|after| after.as_millis() as u64);
        let expires_at = expires_in.and_then(|after| created_at.checked_add(after).ok());
        let id = new_id("snap");
        let name = id.clone();
        // What is there of it at rest. Of one that runs, what is there is of before.
        let kept = of.memory.clone().filter(|_| memory && owner.session.is_none());
        let put = move |tx: &mut Transaction<'_>, snapshot, consistency, memory| {
            let record = SnapshotRecord {
                snapshot,
                id,
                sandbox_id: of.id,
                comment,
                disk_size_bytes: of.disk_size_bytes,
                consistency,
                template: of.template,
                image: of.image,
                memory,
                created_at,
                expires_at,
                ttl_ms,
            };
            tx.put_record(SnapshotRecord::KIND, &record.id, record.encode()?);
            if let Some(name) = named {
                let snapshot_id = record.id.clone();
                put_all(tx, &[NamedSnapshotRecord { name, snapshot_id, taken: true, created_at }])?;
            }
            Ok::<_, Error>(record)
        };
        let disk = of.disk;
        let record = if memory && owner.session.is_some() {
            let state = move |store: &Store| take_state(store, disk, &name);
            let Captured { made, state, key } = self.capture(&owner, Request::Snapshot, state).await?;
            let put = move |tx: &mut Transaction<'_>, kept| put(tx, made, Consistency::Crash, Some(kept));
            match self.store_captured(state, key, put).await {
                Ok(record) => record,
                Err(error) => {
                    self.forget_state(made).await;
                    return Err(error);
                }
            }
        } else {
            let take = move |store: &Store, consistency| {
                let mut tx = store.begin();
                let (snapshot, memory) = (tx.snapshot(disk, &name), kept.as_ref().map(|m| memory::fork(&mut tx, m)));
                let record = put(&mut tx, snapshot, consistency, memory)?;
                tx.commit_durable()?;
                Ok(record)
            };
            let upgrade = |store: &Store, record: &SnapshotRecord| {
                let record = SnapshotRecord { consistency: Consistency::Filesystem, ..record.clone() };
                let mut tx = store.begin();
                tx.put_record(SnapshotRecord::KIND, &record.id, record.encode()?);
                Ok(tx.commit_durable()?)
            };
            let (mut record, consistency) = self.at_one_point(&mut owner, Request::Snapshot, take, upgrade).await?;
            record.consistency = consistency;
            record
        };
        self.shared.registry.insert_snapshot(record.clone());
        if stop && let Some(next) = self.decide(Request::Stop)? {
            self.rest(&mut owner, next, Ending::Orderly, None).await?;
        }
        Ok(record)
    }

    /// Puts the file system back to a snapshot of it. A running session ends, and a new one begins on the restored state.
    /// The commit point is one transaction: a crash leaves the old disk or the restored one.
    pub(super) async fn restore(self: &Arc<Self>, snapshot: SnapshotRecord) -> Result<SandboxView> {
        let mut owner = self.own().await;
        let was_running = owner.session.is_some();
        self.decide(Request::Restore)?;
        // What it wrote since is given up: nothing of it has to be durable.
        if let Err(error) = self.end_session(&mut owner, Ending::Kill).await {
            tracing::warn!(sandbox = %self.id(), %error, "the session that a restore ended");
        }
        let mut record = SandboxRecord {
            state: State::Paused,
            disk_size_bytes: snapshot.disk_size_bytes,
            unclean: snapshot.consistency == Consistency::Crash,
            last_error: None,
            pristine: None,
            ..self.record()
        };
        let from = snapshot.id.clone();
        let restored = self.shared.transact(move |tx| {
            tx.delete_disk(record.disk);
            memory::delete(tx, record.memory.as_ref());
            record.memory = snapshot.memory.as_ref().map(|m| memory::fork(tx, m));
            record.disk = tx.fork(Source::Snapshot(snapshot.snapshot), &record.id);
            in_domain(tx, record.disk, record.dedup_domain.as_deref());
            tx.put_record(SandboxRecord::KIND, &record.id, record.encode()?);
            Ok(record)
        });
        match restored.await {
            Ok(record) => {
                self.publish(|r| *r = record);
                used(&self.shared, &from).await;
            }
            Err(error) => {
                self.publish(|r| {
                    r.state = State::Paused;
                    r.unclean |= was_running;
                    r.last_error = Some(format!("could not be restored: {error}"));
                });
                return Err(error);
            }
        }
        self.shared.want_seal();
        if was_running {
            self.ensure_session(&mut owner, Request::Resume).await?;
        }
        Ok(self.view())
    }

    pub(super) async fn fork(self: &Arc<Self>, request: ForkRequest) -> Result<Vec<SandboxView>> {
        if !(1..=MAX_FORKS).contains(&request.count) {
            return Err(Error::invalid(format!("a fork makes 1 to {MAX_FORKS} children, not {}", request.count)));
        }
        let mut owner = self.own().await;
        let shared = self.shared.clone();
        let parent = self.record();
        let from =
            request.snapshot.as_deref().map(|key| shared.registry.snapshot(key, Some(&parent.id))).transpose()?;

        let ids: Vec<String> = (0..request.count).map(|_| new_id("sb")).collect();
        let names: Vec<String> = match (&request.name, request.count) {
            (None, _) => ids.clone(),
            (Some(name), 1) => vec![name.clone()],
            (Some(name), count) => (1..=count).map(|n| format!("{name}-{n}")).collect(),
        };
        let reservation = shared.registry.reserve_names(&names)?;

        let mut children = Vec::new();
        for (id, name) in ids.into_iter().zip(names) {
            children.push(SandboxRecord {
                id,
                name,
                state: State::Paused,
                forked_from: Some(parent.id.clone()),
                from_snapshot: from.as_ref().map(|s| s.id.clone()),
                timeout_ms: request.timeout.map(|t| t.as_millis() as u64).or(parent.timeout_ms),
                metadata: request.metadata.clone().unwrap_or_else(|| parent.metadata.clone()),
                last_error: None,
                machine_id: new_machine_id(),
                memory: None,
                pristine: None,
                previews: super::previews::inherited(&parent.previews),
                created_at: Timestamp::now(),
                started_at: None,
                ready_at: None,
                boot_ms: None,
                boot_path: None,
                accel: None,
                destroyed_at: None,
                total_runtime_ms: 0,
                vcpu_ms: 0,
                memory_mib_ms: 0,
                ..parent.clone()
            });
        }
        let source = from.as_ref().map_or(Source::Disk(parent.disk), |s| Source::Snapshot(s.snapshot));
        let kept =
            from.as_ref().map_or(parent.memory.as_ref(), |s| s.memory.as_ref()).filter(|_| request.memory).cloned();
        let upgrade = |store: &Store, children: &Vec<SandboxRecord>| {
            let mut tx = store.begin();
            for child in children {
                let child = SandboxRecord { unclean: false, ..child.clone() };
                tx.put_record(SandboxRecord::KIND, &child.id, child.encode()?);
            }
            Ok(tx.commit_durable()?)
        };
        // Held until the children have started: they need not read it from the store.
        let mut at_hand = None;
        let children = match from {
            Some(snapshot) => {
                self.decide(Request::Fork)?;
                let children = shared
                    .transact(move |tx| put_children(tx, children, source, kept.as_ref(), snapshot.consistency))
                    .await?;
                used(&shared, &snapshot.id).await;
                children
            }
            None if request.memory && owner.session.is_some() => {
                let (disk, name) = (parent.disk, new_id("snap"));
                let state = move |store: &Store| take_state(store, disk, &name);
                let Captured { made, state, key } = self.capture(&owner, Request::Fork, state).await?;
                at_hand = Some(state.clone());
                let put = move |tx: &mut Transaction<'_>, kept| {
                    let source = Source::Snapshot(made);
                    let children = put_children(tx, children, source, Some(&kept), Consistency::Crash)?;
                    memory::delete(tx, Some(&kept));
                    Ok(children)
                };
                let children = self.store_captured(state, key, put).await;
                self.forget_state(made).await;
                children?
            }
            None => {
                let commit = move |store: &Store, consistency| {
                    let mut tx = store.begin();
                    let children = put_children(&mut tx, children, source, kept.as_ref(), consistency)?;
                    tx.commit_durable()?;
                    Ok(children)
                };
                let (mut children, consistency) = self.at_one_point(&mut owner, Request::Fork, commit, upgrade).await?;
                children.iter_mut().for_each(|c| c.unclean = consistency == Consistency::Crash);
                children
            }
        };
        drop(owner);

        let children: Vec<_> = children.into_iter().map(|record| Sandbox::new(shared.clone(), record)).collect();
        shared.registry.insert_all(children.clone(), reservation);
        // A child that would not outlive its session has one from the start.
        if request.wait || !parent.persistent {
            let starts: Vec<_> = children
                .iter()
                .cloned()
                .map(|child| tokio::spawn(async move { child.resume(false).await }.in_current_span()))
                .collect();
            if request.wait {
                // A child that does not start is there all the same: it says why, and the others are not lost with it.
                for (start, child) in starts.into_iter().zip(&children) {
                    let started = start.await;
                    let started =
                        started.unwrap_or_else(|e| Err(Error::internal(format!("its start did not end: {e}"))));
                    if let Err(error) = started {
                        child.publish(|r| {
                            r.last_error.get_or_insert_with(|| error.to_string());
                        });
                    }
                }
            }
        }
        drop(at_hand);
        Ok(children.iter().map(|child| child.view()).collect())
    }

    /// Deletes a state that nobody has been told of.
    async fn forget_state(&self, state: SnapshotId) {
        let deleted = self.shared.with_store(move |store| {
            let mut tx = store.begin();
            tx.delete_snapshot(state);
            tx.commit().map(drop)?;
            Ok(())
        });
        if let Err(error) = deleted.await {
            tracing::warn!(%state, %error, "a state that no record names stays until the store is opened again");
        }
    }
}

/// The disks and records of new children. Before the commit there is no child, after it there are all of them, paused.
fn put_children(
    tx: &mut Transaction<'_>,
    mut children: Vec<SandboxRecord>,
    source: Source,
    kept: Option<&MemoryRecord>,
    consistency: Consistency,
) -> Result<Vec<SandboxRecord>> {
    for child in &mut children {
        child.disk = tx.fork(source, &child.id);
        in_domain(tx, child.disk, child.dedup_domain.as_deref());
        child.memory = kept.map(|m| memory::fork(tx, m));
        child.unclean = consistency == Consistency::Crash;
    }
    put_all(tx, &children)?;
    Ok(children)
}

/// A state of a disk that nobody is told of yet. It need not survive anything.
fn take_state(store: &Store, disk: DiskId, name: &str) -> Result<SnapshotId> {
    let mut tx = store.begin();
    let state = tx.snapshot(disk, name);
    tx.commit().map(drop)?;
    Ok(state)
}

/// Whether the file system is frozen now.
async fn freeze(shared: &Shared, session: &Session) -> bool {
    let agent = session.agent();
    // The guest thaws by itself should we not be able to tell it to.
    let auto_thaw = shared.settings.freeze_deadline + shared.settings.agent_deadline;
    let call = async { Ok(agent.freeze(auto_thaw).await?) };
    match within(shared.settings.freeze_deadline, "freezing the file system", call).await {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "the guest's file system could not be frozen; the state is as after a power cut");
            false
        }
    }
}

/// Whether it had been frozen until now.
async fn thaw(shared: &Shared, session: &Session) -> bool {
    let agent = session.agent();
    let call = async { Ok(agent.thaw().await?) };
    match within(shared.settings.agent_deadline, "thawing the file system", call).await {
        Ok(was_frozen) => was_frozen,
        Err(error) => {
            tracing::error!(%error, "the guest did not answer a thaw; it thaws by itself");
            false
        }
    }
}
