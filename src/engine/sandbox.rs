//! One sandbox: its record, its session, and the one owner that changes them.
//!
//! Readers see [`Face`], a copy behind a short lock that is never held across a wait. Whoever wants to change anything
//! takes the owner's lock, asks the table, does the work and publishes the outcome; callers queue on that lock, so two
//! resumes start one session and a stop that meets an exec waits until the exec has been handed to the guest. Calls that
//! last (exec, files) hold the lock only until they have begun; a stop ends them.
//!
//! Order at the end of a session, and what a crash leaves: (1) the guest shuts down: all it wrote is at the disk's front
//! end; (2) the front end is detached: all of it is in the store; (3) the disk is flushed: all of it is durable; (4) the
//! record says `paused`. A crash after (3) and before (4) leaves a record that says `running`, which [`super::recover`]
//! reads as `paused`.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::RwLock;
use storage::SnapshotId;
use tokio::sync::{Mutex, OwnedMutexGuard, Semaphore};
use tokio::time::Instant;
use vmm::BootPath;

use super::activity::{Activity, InUse};
use super::error::{Error, Kind, Result};
use super::lifecycle::{Decision, Refusal, Request, State, decide};
use super::memory::{self, Keep};
use super::ports::CONNECTIONS;
use super::records::{Record, SandboxRecord, put_all};
use super::session::{Ending, Session};
use super::template::spare::{self, Given};
use super::{Compute, SandboxView, Shared};

/// Destroyed sandboxes are remembered, so that a late caller is told what happened, but not without bound.
const REMEMBERED_DESTROYED: usize = 1_000;

/// Bytes of console kept of the last session.
const CONSOLE_KEPT: usize = 16 * 1024;

/// A sandbox. Always in an `Arc`.
pub(crate) struct Sandbox {
    id: String,
    pub(super) shared: Arc<Shared>,
    face: RwLock<Face>,
    owner: Arc<Mutex<Owner>>,
    activity: Arc<Activity>,
    /// Room for connections to its ports.
    pub(super) connections: Arc<Semaphore>,
}

/// What readers see.
struct Face {
    record: SandboxRecord,
    deadline: Option<Instant>,
    running: Option<Running>,
}

/// What the present session has; the record says what the next one will have.
#[derive(Clone, Copy)]
struct Running {
    began: Instant,
    cpus: u32,
    memory_mib: u64,
}

impl Face {
    fn compute(&self, now: Instant) -> Compute {
        let r = &self.record;
        let (ms, cpus, memory) = self.running.map_or((0, 0, 0), |s| {
            (now.saturating_duration_since(s.began).as_millis() as u64, u64::from(s.cpus), s.memory_mib)
        });
        Compute {
            runtime_ms: r.total_runtime_ms + ms,
            vcpu_ms: r.vcpu_ms + ms * cpus,
            memory_mib_ms: r.memory_mib_ms + ms * memory,
        }
    }
}

/// What the owner alone touches.
#[derive(Default)]
pub(super) struct Owner {
    pub(super) session: Option<Session>,
    sessions_begun: u64,
    /// The end of the last session's console.
    pub(super) last_console: String,
}

/// The owner's lock, held.
pub(super) type OwnerGuard = OwnedMutexGuard<Owner>;

impl Sandbox {
    pub(super) fn new(shared: Arc<Shared>, record: SandboxRecord) -> Arc<Self> {
        shared.changes.tell(&record);
        Arc::new(Self {
            id: record.id.clone(),
            shared,
            face: RwLock::new(Face { record, deadline: None, running: None }),
            owner: Arc::default(),
            activity: Arc::default(),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
        })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn name(&self) -> String {
        self.face.read().record.name.clone()
    }

    /// Whether it has this memory.
    pub(super) fn has_memory(&self, content: &str) -> bool {
        self.face.read().record.memory.as_ref().is_some_and(|m| m.content == content)
    }

    pub(super) fn record(&self) -> SandboxRecord {
        self.face.read().record.clone()
    }

    pub(super) fn view(&self) -> SandboxView {
        let face = self.face.read();
        let now = Instant::now();
        SandboxView {
            record: face.record.clone(),
            timeout_remaining: face.deadline.map(|d| d.saturating_duration_since(now)),
            compute: face.compute(now),
            preview_url: self.preview_url(&face.record),
        }
    }

    /// It is used now.
    pub(super) fn touch(&self) {
        self.activity.touch();
    }

    /// It is used until the answer is dropped.
    pub(super) fn begin_use(&self) -> InUse {
        self.activity.begin()
    }

    /// Waits for the end of a use.
    pub(super) async fn use_ended(&self) {
        self.activity.use_ended().await;
    }

    /// When it will have been idle for too long; never while it is in use, or without such a limit.
    pub(super) fn idle_at(&self) -> Option<Instant> {
        let limit = self.face.read().record.idle_timeout_ms?;
        self.activity.idle_at(Duration::from_millis(limit))
    }

    /// Waits for its turn.
    pub(super) async fn own(&self) -> OwnerGuard {
        self.owner.clone().lock_owned().await
    }

    /// Asks the table. With the owner's lock held no transition is in progress, so nobody is told to wait but by a
    /// defect; that is refused rather than guessed at.
    pub(super) fn decide(&self, request: Request) -> Result<Option<State>> {
        let (state, persistent) = {
            let face = self.face.read();
            (face.record.state, face.record.persistent)
        };
        let name = self.name();
        match decide(state, request, persistent) {
            Decision::Next(next) => Ok(Some(next)),
            Decision::Stay => Ok(None),
            Decision::Wait => {
                Err(Error::new(Kind::Busy, format!("sandbox {name} is {}", state.name())).hint("try again in a moment"))
            }
            Decision::Refuse(Refusal::Destroyed) => {
                Err(Error::new(Kind::SandboxDestroyed, format!("sandbox {} has been destroyed", self.id))
                    .hint("its state is gone; create a new one: miosa sandbox create --template NAME"))
            }
            Decision::Refuse(Refusal::NotRunning) => {
                Err(Error::new(Kind::NotRunning, format!("sandbox {name} is {}, not running", state.name()))
                    .hint(format!("start a session: miosa sandbox resume {}", self.id)))
            }
            Decision::Refuse(Refusal::Running) => {
                Err(Error::new(Kind::Running, format!("sandbox {name} is running with the disks it has"))
                    .hint(format!("stop it first: miosa sandbox stop {}", self.id)))
            }
            Decision::Refuse(Refusal::Stale) => {
                Err(Error::internal(format!("{request:?} does not fit sandbox {name}, which is {}", state.name())))
            }
        }
    }

    /// Changes what readers see.
    pub(super) fn publish(&self, change: impl FnOnce(&mut SandboxRecord)) {
        let mut face = self.face.write();
        let before = face.record.state;
        change(&mut face.record);
        if face.record.state != before {
            self.shared.changes.tell(&face.record);
        }
    }

    pub(super) fn publish_deadline(&self, deadline: Option<Instant>) {
        self.face.write().deadline = deadline;
    }

    /// Whether it has a session.
    pub(super) fn is_running(&self) -> bool {
        self.face.read().running.is_some()
    }

    /// How long the present session has lasted.
    pub(super) fn session_age(&self) -> Option<Duration> {
        self.face.read().running.map(|running| running.began.elapsed())
    }

    /// Makes the record durable as it is now.
    pub(super) async fn save(&self) -> Result<()> {
        self.save_as(self.record()).await
    }

    /// Makes the record durable as it is to be.
    pub(super) async fn save_as(&self, record: SandboxRecord) -> Result<()> {
        let usage = self.shared.clone();
        self.shared
            .transact(move |tx| {
                tx.put_record(SandboxRecord::KIND, &record.id, record.encode()?);
                usage.usage.put(tx, &record.id)?;
                Ok(())
            })
            .await
    }

    /// Changes the record: durable first, then seen. If it cannot be made durable it is seen all the same, where the
    /// change is what has happened; after a crash the record is corrected by recovery.
    async fn record_fact(&self, change: impl Fn(&mut SandboxRecord)) -> Result<()> {
        let mut record = self.record();
        change(&mut record);
        let saved = self.save_as(record).await;
        self.publish(change);
        saved.inspect_err(|error| {
            tracing::warn!(sandbox = %self.id, %error, "the record could not be saved; it is corrected at the next start");
        })
    }

    /// The first session, with the lock taken before the sandbox could be found.
    /// A machine that was started for it already is taken, if there is one.
    pub(super) async fn start_first(self: &Arc<Self>, mut owner: OwnerGuard, spare: Option<Given>) -> Result<()> {
        self.begin_session(&mut owner, spare).await
    }

    pub(super) async fn resume(self: &Arc<Self>, without_memory: bool) -> Result<SandboxView> {
        let mut owner = self.own().await;
        if without_memory && owner.session.is_none() && self.decide(Request::Resume)?.is_some() {
            self.forget_memory(false).await?;
        }
        self.ensure_session(&mut owner, Request::Resume).await?;
        self.touch();
        Ok(self.view())
    }

    /// Sees that there is a session, starting one if the table says so.
    pub(super) async fn ensure_session(self: &Arc<Self>, owner: &mut OwnerGuard, request: Request) -> Result<()> {
        if self.decide(request)?.is_none() {
            return Ok(());
        }
        self.publish(|r| r.state = State::Creating);
        self.begin_session(owner, None).await
    }

    /// Starts a session; the state is `creating`.
    async fn begin_session(self: &Arc<Self>, owner: &mut OwnerGuard, spare: Option<Given>) -> Result<()> {
        self.shared.check_open().inspect_err(|_| self.publish(|r| r.state = State::Paused))?;
        let number = self.next_session(owner);
        // From here on a machine may write to its disk.
        let pristine = self.record().pristine;
        self.publish(|r| {
            r.pristine = None;
            r.last_error = None;
            r.started_at = Some(Timestamp::now());
            r.ready_at = None;
            // A daemon that finds such a machine knows by this that its guest takes itself for another.
            (r.boot_ms, r.boot_path) = (None, spare.as_ref().map(|_| BootPath::Memory));
        });
        self.shared.usage.session_began(&self.record());
        let begun = match self.save().await {
            Ok(()) => self.session(number, pristine, spare).await,
            Err(error) => Err(error),
        };
        match begun {
            Ok((session, note)) => {
                self.shared.metrics.booted(session.boot);
                self.decide(Request::Started)?;
                self.publish(|r| r.last_error = note);
                self.begun(owner, session).await;
                Ok(())
            }
            Err(error) => {
                self.shared.metrics.boot_failed();
                self.shared.usage.session_ended(&self.record(), None);
                self.decide(Request::StartFailed)?;
                let recorded = self.record_fact(|r| {
                    r.state = State::Error;
                    r.last_error = Some(error.to_string());
                });
                // What is told is why it did not start.
                let _ = recorded.await;
                Err(error)
            }
        }
    }

    /// The session, and what it could not go on from.
    async fn session(
        self: &Arc<Self>,
        number: u64,
        pristine: Option<SnapshotId>,
        spare: Option<Given>,
    ) -> Result<(Session, Option<String>)> {
        if let Some(spare) = spare {
            match spare.begin(self, number).await {
                Ok(session) => return Ok((session, None)),
                Err(error) => tracing::warn!(sandbox = %self.id, %error, "a spare machine was of no use"),
            }
        }
        Session::begin(self, number, pristine).await
    }

    /// The number of a session that is to begin.
    pub(super) fn next_session(&self, owner: &mut OwnerGuard) -> u64 {
        owner.sessions_begun += 1;
        owner.sessions_begun
    }

    /// There is a session from now on.
    pub(super) async fn begun(self: &Arc<Self>, owner: &mut OwnerGuard, session: Session) {
        let now = Timestamp::now();
        let recorded = self.record_fact(|r| {
            r.state = State::Running;
            // Until an orderly end says otherwise.
            r.unclean = true;
            r.ready_at.get_or_insert(now);
            r.boot_ms = Some(session.boot.as_millis() as u64);
            r.boot_path = Some(session.way);
            r.accel = Some(session.accel);
        });
        // It runs, whatever is known of that after a crash.
        let _ = recorded.await;
        {
            let mut face = self.face.write();
            let (cpus, memory_mib) = (face.record.cpus, face.record.memory_mib);
            face.running = Some(Running { began: session.began, cpus, memory_mib });
            face.deadline = session.deadline();
        }
        self.touch();
        session.supervise(self.clone());
        owner.session = Some(session);
    }

    pub(super) async fn stop(self: &Arc<Self>, keep: Keep) -> Result<SandboxView> {
        let mut owner = self.own().await;
        if let Some(next) = self.decide(Request::Stop)? {
            let how = match keep {
                Keep::Memory | Keep::MemoryIfPossible if owner.session.is_some() && next == State::Paused => {
                    match self.keep_memory(&owner).await {
                        Ok(()) => Ending::Kept,
                        Err(error) if keep == Keep::MemoryIfPossible && error.kind() == Kind::MemoryUnavailable => {
                            Ending::Orderly
                        }
                        Err(error) => return Err(error),
                    }
                }
                _ => Ending::Orderly,
            };
            self.rest(&mut owner, next, how, None).await?;
        }
        Ok(self.view())
    }

    /// The session's time is up, or nobody uses it; unless it was extended or used while this waited for its turn.
    pub(super) async fn expired(self: &Arc<Self>, session: u64) {
        let mut owner = self.own().await;
        let past = |at: Option<Instant>| at.is_some_and(|at| at <= Instant::now());
        match &owner.session {
            Some(s) if s.number == session && (past(s.deadline()) || past(self.idle_at())) => {}
            _ => return,
        }
        let ended = match self.decide(Request::Expired) {
            Ok(Some(next)) => self.rest(&mut owner, next, Ending::Orderly, None).await,
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::error!(sandbox = %self.id, %error, "a timeout could not be carried out in full");
        }
    }

    /// The machine ended by itself.
    pub(super) async fn machine_lost(self: &Arc<Self>, session: u64, how: vmm::ExitReason) {
        let mut owner = self.own().await;
        if owner.session.as_ref().is_none_or(|s| s.number != session) {
            return;
        }
        let note = super::session::describe_loss(&how);
        if let Some(note) = &note {
            tracing::warn!(sandbox = %self.id, %note, "machine lost");
        }
        let ended = match self.decide(Request::MachineLost) {
            Ok(Some(next)) => self.rest(&mut owner, next, Ending::AlreadyGone, note).await,
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::error!(sandbox = %self.id, %error, "the loss of a machine could not be recorded in full");
        }
    }

    /// Ends the session, if there is one, and brings the sandbox to rest in `next`.
    pub(super) async fn rest(
        self: &Arc<Self>,
        owner: &mut OwnerGuard,
        next: State,
        how: Ending,
        note: Option<String>,
    ) -> Result<()> {
        if next == State::Destroyed {
            return self.remove(owner, how).await;
        }
        let ended = self.end_session(owner, how).await;
        // One that could not be taken over was not ended here.
        self.shared.usage.session_ended(&self.record(), None);
        let problem = match &ended {
            Ok(trouble) => trouble.clone().or(note.clone()),
            Err(error) => Some(error.to_string()),
        };
        let saved = self
            .record_fact(|r| {
                r.state = next;
                r.last_error = problem.clone();
                if matches!(ended, Ok(None)) && note.is_none() && how != Ending::Kept {
                    r.unclean = false;
                }
            })
            .await;
        self.shared.want_seal();
        ended?;
        saved
    }

    /// Ends the session. What went wrong in the guest is told as `Ok(Some)`: the file system is then as after a power
    /// cut. An error means that what was written may not be durable.
    pub(super) async fn end_session(&self, owner: &mut OwnerGuard, how: Ending) -> Result<Option<String>> {
        let Some(session) = owner.session.take() else { return Ok(None) };
        owner.last_console = session.machine.console_tail(CONSOLE_KEPT);
        let now = Instant::now();
        let ended = session.end(&self.shared, how).await;
        {
            let mut face = self.face.write();
            face.deadline = None;
            let compute = face.compute(now);
            let ran = face.running.take().map(|running| now.saturating_duration_since(running.began));
            self.shared.usage.session_ended(&face.record, ran);
            face.record.total_runtime_ms = compute.runtime_ms;
            face.record.vcpu_ms = compute.vcpu_ms;
            face.record.memory_mib_ms = compute.memory_mib_ms;
        }
        spare::rest(&self.shared).await;
        ended
    }

    pub(super) async fn destroy(self: &Arc<Self>) -> Result<SandboxView> {
        let mut owner = self.own().await;
        if self.decide(Request::Destroy)?.is_some() {
            self.remove(&mut owner, Ending::Kill).await?;
        }
        Ok(self.view())
    }

    /// The same, if its record is still such a one when its turn comes. Whether it was.
    pub(super) async fn destroy_if(self: &Arc<Self>, wanted: impl Fn(&SandboxRecord) -> bool) -> Result<bool> {
        let mut owner = self.own().await;
        if !wanted(&self.record()) || self.decide(Request::Destroy)?.is_none() {
            return Ok(false);
        }
        self.remove(&mut owner, Ending::Kill).await.map(|()| true)
    }

    /// Deletes the disk, and leaves a record that says so.
    async fn remove(self: &Arc<Self>, owner: &mut OwnerGuard, how: Ending) -> Result<()> {
        // Nobody will read this disk again: no need to wait for the guest, or for durability.
        let how = if matches!(how, Ending::Orderly) { Ending::Kill } else { how };
        if let Err(error) = self.end_session(owner, how).await {
            tracing::warn!(sandbox = %self.id, %error, "the last session of a sandbox to be destroyed");
        }
        let mut record = self.record();
        record.state = State::Destroyed;
        record.destroyed_at = Some(Timestamp::now());
        record.last_error = None;
        let kept = record.memory.take();
        let (to_save, usage) = (record.clone(), self.shared.clone());
        let volumes = match self.shared.volumes.of(&self.id).is_empty() {
            true => None,
            false => Some(self.shared.volumes.detached_from(&self.id).await),
        };
        let changed = volumes.as_ref().map(|change| change.records()).unwrap_or_default();
        let removed = self
            .shared
            .transact(move |tx| {
                put_all(tx, &changed)?;
                tx.delete_disk(to_save.disk);
                memory::delete(tx, kept.as_ref());
                tx.put_record(SandboxRecord::KIND, &to_save.id, to_save.encode()?);
                usage.usage.put(tx, &to_save.id)?;
                Ok(())
            })
            .await;
        if let Err(error) = removed {
            // It is still there, without a session.
            self.publish(|r| {
                r.state = State::Paused;
                r.last_error = Some(format!("could not be destroyed: {error}"));
            });
            return Err(error);
        }
        if let Some(change) = volumes {
            change.publish();
        }
        let name = record.name.clone();
        self.publish(|r| *r = record);
        self.shared.registry.release_name(&name, &self.id);
        self.shared.usage.look_soon();
        forget_long_destroyed(&self.shared).await;
        Ok(())
    }

    pub(super) async fn extend(self: &Arc<Self>, timeout: Option<Duration>) -> Result<SandboxView> {
        let owner = self.own().await;
        self.decide(Request::Extend)?;
        let own_timeout = self.record().timeout_ms.map(Duration::from_millis);
        let Some(timeout) = timeout.or(own_timeout) else {
            return Err(Error::invalid("the sandbox has no timeout to extend").hint("name one: --timeout 2h"));
        };
        if let Some(session) = &owner.session {
            let deadline = Instant::now() + timeout;
            session.set_deadline(Some(deadline));
            self.publish_deadline(Some(deadline));
        }
        self.touch();
        self.publish(|r| r.timeout_ms = Some(timeout.as_millis() as u64));
        self.save().await?;
        Ok(self.view())
    }

    /// The daemon ends: as `stop`, and nothing is refused.
    pub(super) async fn shut_down(self: &Arc<Self>) {
        let mut owner = self.own().await;
        if owner.session.is_none() {
            return;
        }
        let ended = match self.decide(Request::Stop) {
            Ok(Some(next)) => self.rest(&mut owner, next, Ending::Orderly, None).await,
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::error!(sandbox = %self.id, %error, "could not be stopped in full");
        }
    }

    /// The daemon ends and has no more time: kills the machine if the owner is free, and flushes the disk.
    pub(super) async fn kill_machine(&self) {
        let Ok(mut owner) = self.owner.clone().try_lock_owned() else { return };
        if let Err(error) = self.end_session(&mut owner, Ending::Kill).await {
            tracing::error!(sandbox = %self.id, %error, "the disk of a killed machine");
        }
    }
}

/// Drops the oldest records of destroyed sandboxes beyond a bound.
async fn forget_long_destroyed(shared: &Arc<Shared>) {
    let mut gone: Vec<_> = shared
        .registry
        .sandboxes()
        .iter()
        .map(|s| s.record())
        .filter(|r| r.state == State::Destroyed)
        .map(|r| (r.destroyed_at, r.id))
        .collect();
    if gone.len() <= REMEMBERED_DESTROYED {
        return;
    }
    gone.sort();
    let ids: Vec<_> = gone.drain(..gone.len() - REMEMBERED_DESTROYED).map(|(_, id)| id).collect();
    let keys = ids.clone();
    let deleted = shared
        .transact(move |tx| {
            for key in &keys {
                tx.delete_record(SandboxRecord::KIND, key);
            }
            Ok(())
        })
        .await;
    match deleted {
        Ok(()) => shared.registry.forget(&ids),
        Err(error) => tracing::warn!(%error, "old records could not be dropped; tried again later"),
    }
}
