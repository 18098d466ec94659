//! Templates that have booted: disk and memory of a machine whose agent is ready, for new sandboxes to go on from.
//!
//! There is one for each template and kind of machine that a sandbox was made with, at most [`KEPT_MAX`] in all. It is made in
//! the background, after the first sandbox of its kind has started: a machine of its own comes up on a copy of the
//! template's disk, takes a name, runs a program and is held; disk and memory of that moment are kept in the store, where they
//! share blocks with the template's and with what sandboxes keep of their memory later. A sandbox whose disk is the
//! template's and that no machine has had becomes such a one when it is first started, in one transaction. It is a fork of
//! it then, and is told who it is. What goes wrong with one is nothing to the sandbox: it starts from its files.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use parking_lot::Mutex;
use storage::{DiskId, SnapshotId, Source, Store, Transaction};
use tokio::time::Instant;
use vmm::{MachineSpec, MachineState};

use super::spare::rehearse;
use crate::engine::devices::Devices;
use crate::engine::error::{Error, Result};
use crate::engine::memory::{self, own_memory};
use crate::engine::records::{BootedRecord, MemoryRecord, Record, SandboxRecord, new_id, put_all};
use crate::engine::sandbox::Sandbox;
use crate::engine::session::private_dir;
use crate::engine::{Shared, in_domain, warm};

/// Most that are kept; the one that was not used for longest goes first.
const KEPT_MAX: usize = 8;
/// Name of the run directory of the machine that is kept. No sandbox has it.
const RUN_DIR: &str = "booted";

fn id_of(template: SnapshotId, key: &str) -> String {
    format!("{template}-{key}")
}

/// Those that there are.
#[derive(Default)]
pub(in crate::engine) struct Booted {
    all: Mutex<HashMap<String, BootedRecord>>,
    making: Mutex<Making>,
}

#[derive(Default)]
struct Making {
    /// One at a time.
    task: Option<tokio::task::AbortHandle>,
    /// Of these none could be made, or none was of use; not tried again by this daemon.
    hopeless: Vec<String>,
    closed: bool,
}

impl Booted {
    /// What an earlier daemon has left.
    pub(in crate::engine) fn restore(&self, records: Vec<BootedRecord>) {
        *self.all.lock() = records.into_iter().map(|r| (r.id.clone(), r)).collect();
    }

    /// How many there are.
    pub(in crate::engine) fn there(&self) -> usize {
        self.all.lock().len()
    }

    /// None is made any more; what is being made is given up.
    pub(in crate::engine) fn end(&self) {
        let mut making = self.making.lock();
        making.closed = true;
        if let Some(task) = making.task.take() {
            task.abort();
        }
    }
}

/// Deletes those of a template's state that is gone. What is cut off is done at the next start.
pub(super) async fn forget_of(shared: &Arc<Shared>, template: SnapshotId) {
    let of: Vec<BootedRecord> = shared.booted.all.lock().values().filter(|r| r.template == template).cloned().collect();
    for booted in of {
        forget(shared, booted).await;
    }
}

fn put_delete(tx: &mut Transaction<'_>, record: &BootedRecord) {
    tx.delete_snapshot(record.disk);
    memory::delete(tx, Some(&record.memory));
    tx.delete_record(BootedRecord::KIND, &record.id);
}

/// The one of a template's state and a machine's key.
pub(super) fn of(shared: &Shared, template: SnapshotId, key: &str) -> Option<BootedRecord> {
    shared.booted.all.lock().get(&id_of(template, key)).cloned()
}

/// Notes that a sandbox began from one; its record as it is then.
pub(super) fn used(shared: &Shared, id: &str, now: Timestamp) -> Option<BootedRecord> {
    let mut all = shared.booted.all.lock();
    let known = all.get_mut(id)?;
    known.used_at = now;
    Some(known.clone())
}

/// Makes a sandbox that no machine has had what its template is when it has booted, if there is such a one. Whether it did.
pub(in crate::engine) async fn become_one(sandbox: &Arc<Sandbox>, template: SnapshotId, key: &str) -> bool {
    let shared = sandbox.shared.clone();
    let Some(booted) = of(&shared, template, key) else { return false };
    let record = sandbox.record();
    let (from, now) = (booted.clone(), Timestamp::now());
    let became = move |tx: &mut Transaction<'_>| {
        tx.delete_disk(record.disk);
        let disk = tx.fork(Source::Snapshot(from.disk), &record.id);
        let memory = Some(memory::fork(tx, &from.memory));
        let record = SandboxRecord { disk, memory, unclean: true, ..record };
        in_domain(tx, record.disk, record.dedup_domain.as_deref());
        put_all(tx, std::slice::from_ref(&record))?;
        put_all(tx, &[BootedRecord { used_at: now, ..from }])?;
        Ok(record)
    };
    match shared.transact(became).await {
        Ok(record) => {
            sandbox.publish(|r| (r.disk, r.memory, r.unclean) = (record.disk, record.memory, record.unclean));
            used(&shared, &booted.id, now);
            true
        }
        Err(error) => {
            tracing::warn!(sandbox = %sandbox.id(), %error, "it starts from its template's files");
            false
        }
    }
}

/// One that a machine did not go on from is made no more.
pub(in crate::engine) async fn is_of_no_use(shared: &Arc<Shared>, content: &str) {
    let found = shared.booted.all.lock().values().find(|r| r.memory.content == content).cloned();
    let Some(booted) = found else { return };
    shared.booted.making.lock().hopeless.push(booted.id.clone());
    forget(shared, booted).await;
}

async fn forget(shared: &Arc<Shared>, booted: BootedRecord) {
    shared.booted.all.lock().remove(&booted.id);
    let deleted = shared.transact(move |tx| {
        put_delete(tx, &booted);
        Ok(())
    });
    if let Err(error) = deleted.await {
        tracing::warn!(%error, "a booted template stays until the next start");
    }
}

/// Has one made for machines as this one, on the state of a template, unless it is there or being made. Of the
/// specification, disk and names are of no matter.
pub(in crate::engine) fn want(shared: &Arc<Shared>, template: SnapshotId, spec: MachineSpec, key: &str) {
    let id = id_of(template, key);
    let mut making = shared.booted.making.lock();
    let is_there = shared.booted.all.lock().contains_key(&id);
    if is_there
        || is_replaced(shared, template)
        || making.closed
        || making.task.is_some()
        || making.hopeless.contains(&id)
        || !shared.warm.is_on()
    {
        return;
    }
    let (shared, key) = (shared.clone(), key.to_owned());
    // It cannot be over before it is noted: the lock is held.
    let task = tokio::spawn(async move {
        let began = Instant::now();
        let made = make(&shared, template, spec, key).await;
        match made {
            // Who deleted it found nothing of this.
            Ok(record) if is_replaced(&shared, template) => forget(&shared, record).await,
            Ok(record) => {
                let (ms, data_bytes) = (began.elapsed().as_millis() as u64, record.memory.data_bytes);
                tracing::info!(%template, ms, data_bytes, "sandboxes of this template begin where it has booted");
                trim(&shared).await;
                shared.want_seal();
            }
            Err(error) => {
                tracing::warn!(%template, %error, "a template could not be kept as it is when it has booted");
                shared.booted.making.lock().hopeless.push(id);
            }
        }
        shared.booted.making.lock().task = None;
    });
    making.task = Some(task.abort_handle());
}

/// Whether no template is this state any more.
pub(super) fn is_replaced(shared: &Shared, template: SnapshotId) -> bool {
    !shared.registry.templates().iter().any(|t| t.snapshot == template)
}

/// Those beyond the most go.
async fn trim(shared: &Arc<Shared>) {
    let mut all: Vec<BootedRecord> = shared.booted.all.lock().values().cloned().collect();
    all.sort_by_key(|r| std::cmp::Reverse(r.used_at));
    for old in all.drain(KEPT_MAX.min(all.len())..) {
        forget(shared, old).await;
    }
}

async fn make(shared: &Arc<Shared>, template: SnapshotId, spec: MachineSpec, key: String) -> Result<BootedRecord> {
    let _slot = shared.boots.acquire().await.map_err(|_| Error::internal("no machine can be started any more"))?;
    let run_dir = shared.settings.run_root.join(RUN_DIR);
    let (dir, front) = (run_dir.clone(), shared.disks.clone());
    let shown = shared.with_store(move |store| {
        private_dir(&dir).map_err(|e| Error::internal(format!("{}: {e}", dir.display())))?;
        let mut tx = store.begin();
        let disk = tx.fork(Source::Snapshot(template), &new_id("mem"));
        tx.commit().map(drop)?;
        let devices = Devices::show(store, &*front, (RUN_DIR, &dir), disk, Vec::new());
        devices.map(|devices| (disk, devices)).inspect_err(|_| memory::discard(store, disk))
    });
    let (disk, devices) = shown.await?;
    let id = format!("booted-{:08x}", rand::random::<u32>());
    let hostname = "sandbox".to_owned();
    let spec = MachineSpec { id, run_dir: run_dir.clone(), disk: devices.root(), hostname, warm: None, ..spec };
    let shape = (spec.cpus, u64::from(spec.memory_mib));
    let state = state_of(shared, spec).await;
    // The machine is gone, or held and killed: whatever it wrote is there.
    let withdrawn = devices.withdraw().await;
    let _ = tokio::fs::remove_dir_all(&run_dir).await;
    let kept = match withdrawn.and(state) {
        Ok(state) => shared.with_store(move |store| keep(store, (template, disk), shape, &state, key)).await,
        Err(error) => Err(error),
    };
    memory::give_back(shared, disk).await;
    let record = kept?;
    shared.booted.all.lock().insert(record.id.clone(), record.clone());
    Ok(record)
}

/// Starts the machine, lets its guest do what every sandbox's does first, and takes its state.
async fn state_of(shared: &Arc<Shared>, spec: MachineSpec) -> Result<MachineState> {
    let machine = warm::start(shared, spec).await?;
    let agent = machine.agent();
    let taken = async {
        rehearse(&agent).await?;
        agent.sync().await?;
        let memory = own_memory(&*machine).await?;
        memory::hold(&*machine, memory).await
    };
    let taken = tokio::time::timeout(shared.settings.agent_deadline, taken).await;
    machine.kill().await?;
    taken.unwrap_or_else(|_| Err(Error::internal("the guest did not answer in time")))
}

fn keep(
    store: &Store,
    (template, disk): (SnapshotId, DiskId),
    shape: (u32, u64),
    state: &MachineState,
    key: String,
) -> Result<BootedRecord> {
    let id = id_of(template, &key);
    let memory = memory::write(store, state, key, shape, None)?;
    memory::named(store, &memory.clone(), |tx| {
        let disk = tx.snapshot(disk, &new_id("mem"));
        let memory = MemoryRecord { of_template: true, ..memory };
        let record = BootedRecord { id, template, disk, memory, used_at: Timestamp::now() };
        put_all(tx, std::slice::from_ref(&record))?;
        Ok(record)
    })
}
