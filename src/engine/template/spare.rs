//! Spare machines: started before anybody asks, for the next sandbox of a template.
//!
//! When a sandbox has begun where its template has booted, another machine is started in the background in the same way, on a
//! disk of its own. Its guest takes a name that nobody has and runs a program, so that what a sandbox does first has been
//! done once; then the machine is held, and takes no processor time. The next sandbox of this kind has it: its record names
//! that disk from then on, durably, the machine goes on, and the guest is told who it is. Nobody's work is in a spare: what
//! goes wrong with one is nothing to the sandbox. A spare that nobody wants goes after [`PATIENCE`], and when the last sandbox comes
//! to rest: a host on which nothing is to run runs nothing.
//!
//! No record tells of a spare. A daemon that dies leaves a machine and a disk that no record names, and both go at the next
//! start.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use storage::{DiskId, SnapshotId, Source};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use vmm::{Accel, Agent, ExecRequest, MachineSpec};

use super::{BootFiles, booted};
use crate::engine::error::{Error, Result};
use crate::engine::memory;
use crate::engine::records::{
    BootedRecord, MemoryRecord, NetworkPolicy, SandboxRecord, new_id, new_machine_id, put_all,
};
use crate::engine::sandbox::Sandbox;
use crate::engine::session::{Session, hide, identity, load, show, spec_of, state_key, within};
use crate::engine::survivor::write_state_key;
use crate::engine::{Shared, in_domain};

/// How long a spare waits for a sandbox.
const PATIENCE: Duration = Duration::from_secs(600);

/// Sandboxes of one kind are alike but for what their guest is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::engine) struct KindOf {
    template: SnapshotId,
    cpus: u32,
    memory_mib: u64,
    disk_bytes: u64,
    network_policy: NetworkPolicy,
}

impl KindOf {
    pub(in crate::engine) fn new(template: SnapshotId, record: &SandboxRecord) -> Self {
        Self {
            template,
            cpus: record.cpus,
            memory_mib: record.memory_mib,
            disk_bytes: record.disk_size_bytes,
            network_policy: record.network_policy,
        }
    }
}

/// A machine for a sandbox that is still to come.
pub(in crate::engine) struct Spare {
    kind: KindOf,
    /// Kernel and agent are these.
    spec: MachineSpec,
    /// Where its template has booted.
    booted: String,
    made: Instant,
    /// What the sandbox is to have of it.
    id: String,
    machine_id: String,
    disk: DiskId,
    session: Session,
}

/// One that is a sandbox's by now, and is still held.
pub(in crate::engine) struct Given {
    template: SnapshotId,
    session: Session,
}

impl Given {
    /// Lets it go on as the sandbox's session, and has another one made.
    pub(in crate::engine) async fn begin(self, sandbox: &Arc<Sandbox>, number: u64) -> Result<Session> {
        let session = self.session.take(sandbox, number).await?;
        if let Some(key) = session.state_key() {
            want(&sandbox.shared, self.template, &sandbox.record(), &key);
        }
        Ok(session)
    }
}

/// Those that wait, the oldest first.
#[derive(Default)]
pub(in crate::engine) struct Spares(Mutex<State>);

#[derive(Default)]
struct State {
    waiting: Vec<Spare>,
    /// One at a time.
    making: Option<AbortHandle>,
    closed: bool,
}

impl Spares {
    /// How many wait.
    pub(in crate::engine) fn waiting(&self) -> usize {
        self.0.lock().waiting.len()
    }
}

/// Has one made for the next sandbox of this kind, unless it is there or being made.
pub(in crate::engine) fn want(shared: &Arc<Shared>, template: SnapshotId, like: &SandboxRecord, key: &str) {
    let Some(booted) = booted::of(shared, template, key) else { return };
    let kind = KindOf::new(template, like);
    let mut state = shared.spares.0.lock();
    let is_there = state.waiting.iter().any(|spare| spare.kind == kind);
    if is_there || state.closed || state.making.is_some() || shared.settings.spare_machines == 0 {
        return;
    }
    let (shared, like, name) = (shared.clone(), like.clone(), like.template.clone());
    // It cannot be over before it is noted: the lock is held.
    let task = tokio::spawn(async move {
        let began = Instant::now();
        let made = make(&shared, (kind, like), booted).await;
        let mut gone = Vec::new();
        {
            let mut state = shared.spares.0.lock();
            state.making = None;
            match made {
                Ok(spare) if state.closed || at_rest(&shared) || booted::is_replaced(&shared, spare.kind.template) => {
                    gone.push(spare);
                }
                Ok(spare) => {
                    state.waiting.push(spare);
                    let beyond = state.waiting.len().saturating_sub(shared.settings.spare_machines);
                    gone.extend(state.waiting.drain(..beyond));
                    let ms = began.elapsed().as_millis() as u64;
                    tracing::debug!(template = name, ms, "a machine waits for the next sandbox");
                }
                Err(error) => tracing::warn!(template = name, %error, "no machine waits for the next sandbox"),
            }
        }
        for spare in gone {
            discard(&shared, spare).await;
        }
        // An engine that is gone by then is not kept for this.
        let shared = Arc::downgrade(&{ shared });
        tokio::time::sleep(PATIENCE).await;
        if let Some(shared) = shared.upgrade() {
            discard_those(&shared, |spare| spare.made.elapsed() >= PATIENCE).await;
        }
    });
    state.making = Some(task.abort_handle());
}

/// The one for such a sandbox, if it waits. It is the caller's from now on.
pub(in crate::engine) async fn take(shared: &Arc<Shared>, kind: &KindOf) -> Option<Spare> {
    let spare = {
        let mut state = shared.spares.0.lock();
        let at = state.waiting.iter().position(|spare| spare.kind == *kind)?;
        state.waiting.remove(at)
    };
    // A kernel or an agent that was replaced meanwhile; a machine that has ended.
    let files = shared.templates.boot_files().await.ok();
    let is_fresh = files.is_some_and(|f| f.kernel == spare.spec.kernel && f.initramfs == spare.spec.initramfs);
    if is_fresh && spare.session.is_connected() {
        return Some(spare);
    }
    discard(shared, spare).await;
    None
}

/// Ends those of a template's state that is gone.
pub(super) async fn forget_of(shared: &Arc<Shared>, template: SnapshotId) {
    discard_those(shared, |spare| spare.kind.template == template).await;
}

/// Ends all if no sandbox runs.
pub(in crate::engine) async fn rest(shared: &Arc<Shared>) {
    if shared.spares.waiting() > 0 && at_rest(shared) {
        discard_those(shared, |_| true).await;
    }
}

fn at_rest(shared: &Shared) -> bool {
    !shared.registry.sandboxes().iter().any(|sandbox| sandbox.is_running())
}

/// None is made any more, what is being made is given up, and those that wait end.
pub(in crate::engine) async fn end(shared: &Arc<Shared>) {
    {
        let mut state = shared.spares.0.lock();
        state.closed = true;
        if let Some(making) = state.making.take() {
            making.abort();
        }
    }
    discard_those(shared, |_| true).await;
}

async fn discard_those(shared: &Arc<Shared>, which: impl Fn(&Spare) -> bool) {
    let gone: Vec<Spare> = shared.spares.0.lock().waiting.extract_if(.., |spare| which(spare)).collect();
    for spare in gone {
        discard(shared, spare).await;
    }
}

/// Ends one that no record names.
pub(in crate::engine) async fn discard(shared: &Arc<Shared>, spare: Spare) {
    spare.session.discard(shared).await;
    memory::give_back(shared, spare.disk).await;
}

async fn make(shared: &Arc<Shared>, (kind, like): (KindOf, SandboxRecord), booted: BootedRecord) -> Result<Spare> {
    let boot_files = shared.templates.boot_files().await?;
    let accel = shared.acceleration(&boot_files).await.accel;
    let _slot = shared.boots.acquire().await.map_err(|_| Error::internal("no machine can be started any more"))?;
    let (id, machine_id) = (new_id("sb"), new_machine_id());
    let (from, name) = (booted.disk, id.clone());
    let forked = shared.with_store(move |store| {
        let mut tx = store.begin();
        let disk = tx.fork(Source::Snapshot(from), &name);
        tx.commit().map(drop)?;
        Ok(disk)
    });
    let disk = forked.await?;
    // Of the one that it is like, a machine depends on the kind alone.
    let record = SandboxRecord { id: id.clone(), name: id.clone(), machine_id: machine_id.clone(), disk, ..like };
    match start(shared, &record, boot_files, accel, &booted.memory).await {
        Ok((session, spec)) => {
            let (booted, made) = (booted.id, Instant::now());
            Ok(Spare { kind, spec, booted, made, id, machine_id, disk, session })
        }
        Err(error) => {
            memory::give_back(shared, disk).await;
            Err(error)
        }
    }
}

/// Starts the machine, and holds it once its guest is ready. On failure nothing is left of it.
async fn start(
    shared: &Arc<Shared>,
    record: &SandboxRecord,
    boot_files: BootFiles,
    accel: Accel,
    memory: &MemoryRecord,
) -> Result<(Session, MachineSpec)> {
    let began = Instant::now();
    let devices = show(shared, record, (began, None), accel).await?;
    let spec = spec_of(shared, record, boot_files, &devices, accel);
    let run_dir = spec.run_dir.clone();
    let started = async {
        let key = state_key(shared, &spec, record.disk_size_bytes).await;
        if key.as_ref() != Some(&memory.key) {
            return Err(Error::internal("its template has booted on another kind of machine"));
        }
        write_state_key(&run_dir, key.as_deref())?;
        let (loaded, _) = load(shared, spec.clone(), memory).await?;
        Ok(loaded.go_on().await?)
    };
    let machine = match started.await {
        Ok(machine) => machine,
        Err(error) => {
            hide(devices, &run_dir).await;
            return Err(error);
        }
    };
    let session = Session::of(0, machine, devices, run_dir, (began, None), began.elapsed(), accel);
    let ready = async {
        within(shared.settings.agent_deadline, "a first program", rehearse(&session.agent())).await?;
        Ok(session.machine.hold().await?)
    };
    match ready.await {
        Ok(()) => Ok((session, spec)),
        Err(error) => {
            session.discard(shared).await;
            Err(error)
        }
    }
}

/// Has a guest do what every sandbox's does first.
pub(super) async fn rehearse(agent: &Agent) -> Result<()> {
    agent.identify(identity(&new_machine_id(), "sandbox".into(), None, true)).await?;
    let first = ExecRequest { argv: vec!["sh".into(), "-c".into(), "true".into()], ..ExecRequest::default() };
    if let Err(error) = agent.run(first, 4_096).await {
        tracing::debug!(%error, "a template without a shell");
    }
    Ok(())
}

/// Makes one a new sandbox's, durably: the record, which has its disk, and the machine, which is still held. If that fails,
/// nothing is left of it.
pub(in crate::engine) async fn give(
    shared: &Arc<Shared>,
    spare: Spare,
    record: SandboxRecord,
) -> Result<(SandboxRecord, Given)> {
    let (id, machine_id, disk) = (spare.id.clone(), spare.machine_id.clone(), spare.disk);
    let name = if record.name == record.id { id.clone() } else { record.name };
    let record = SandboxRecord { id, name, machine_id, disk, pristine: None, unclean: true, ..record };
    let (saved, booted) = (record.clone(), booted::used(shared, &spare.booted, Timestamp::now()));
    let given = shared.transact(move |tx| {
        in_domain(tx, saved.disk, saved.dedup_domain.as_deref());
        put_all(tx, &[saved])?;
        put_all(tx, booted.as_slice())
    });
    match given.await {
        Ok(()) => Ok((record, Given { template: spare.kind.template, session: spare.session })),
        Err(error) => {
            discard(shared, spare).await;
            Err(error)
        }
    }
}
