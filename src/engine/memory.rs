//! Memory of machines, kept in the store beside their disks.
//!
//! What is kept is a disk of the store: the guest's memory at its own addresses, then what the VMM says of the devices, then
//! the runs of memory that are not zero (offset and length in bytes, two numbers of 8 bytes each, little-endian). Blocks of
//! it are blocks like others: packed, found to be there already, collected. What a machine must be to go on from it is in
//! the record that names it, [`MemoryRecord`].
//!
//! Memory is of use only with the disk of the same moment. So it is given up, durably, before a guest runs on that disk
//! again: whether it goes on from it or not. Order of a pause with memory, and what a failure leaves: (1) the guest writes
//! back what it holds, so that its files are there whatever happens; (2) the machine is held; (3) memory and devices are
//! written to a new disk; (4) one durable transaction: the record says `paused` and names it; (5) the machine is killed.
//! Until (4) a failure lets the machine go on, and the next daemon finds a machine that is held and lets it go on. From (4)
//! on the machine is an orphan. Order of a resume: (1) the state is read and given to a new process, whose guest does not run
//! yet; (2) one durable transaction gives the memory up; (3) the guest goes on. Until (2) a failure leaves the memory, and
//! the next daemon kills such a machine; one that dies after it leaves a machine that is held, which the next one lets go on.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use storage::{DiskId, Source, Store, Transaction};
use tokio::time::Instant;
use vmm::{BootPath, GuestMemory, Machine, MachineState};

use super::error::{Error, Kind, Result};
use super::lifecycle::{Request, State};
use super::records::{MemoryRecord, Record, SandboxRecord, new_id, put_all};
use super::sandbox::{OwnerGuard, Sandbox};
use super::session::{Session, within};
use super::{Shared, in_domain};

/// Bytes of a run, at the end of what is kept.
const RUN_BYTES: u64 = 16;
/// Bytes read at a time.
const PIECE: u64 = 1 << 20;
/// What a disk's size is counted in.
const BLOCK: u64 = 4096;

/// What is to be kept of a session that ends, besides its files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: the guest shuts down.
    #[default]
    Files,
    /// Its memory, where that can be had.
    MemoryIfPossible,
    /// Its memory; where it cannot be had the session goes on, and the call fails.
    Memory,
}

/// Memory that was read or taken lately and that somebody still has.
#[derive(Default)]
pub(super) struct Memories(tokio::sync::Mutex<HashMap<String, (Weak<GuestMemory>, Bytes)>>);

impl Memories {
    /// What a record names: as somebody has it, or read from the store.
    pub(super) async fn get(&self, shared: &Shared, of: &MemoryRecord) -> Result<MachineState> {
        // One at a time: several that want the same are served by one reading.
        let mut known = self.0.lock().await;
        if let Some((memory, devices)) = known.get(&of.content)
            && let Some(memory) = memory.upgrade()
        {
            return Ok(MachineState { memory, devices: devices.clone() });
        }
        let state = read_alone(shared, of).await?;
        remember(&mut known, of, &state);
        Ok(state)
    }

    /// Whether somebody has what a record names.
    pub(super) async fn are_known(&self, of: &MemoryRecord) -> bool {
        self.0.lock().await.get(&of.content).is_some_and(|(memory, _)| memory.strong_count() > 0)
    }

    async fn put(&self, of: &MemoryRecord, state: &MachineState) {
        remember(&mut *self.0.lock().await, of, state);
    }
}

fn remember(known: &mut HashMap<String, (Weak<GuestMemory>, Bytes)>, of: &MemoryRecord, state: &MachineState) {
    known.retain(|_, (memory, _)| memory.strong_count() > 0);
    known.insert(of.content.clone(), (Arc::downgrade(&state.memory), state.devices.clone()));
}

/// Writes a machine's state to a new disk, which is deleted again if that fails; a process that dies leaves it without a
/// record, and it is deleted at the next start. The shape is processors and memory in MiB; what is in it is found in the
/// deduplication domain only. Blocks.
pub(super) fn write(
    store: &Store,
    state: &MachineState,
    key: String,
    shape: (u32, u64),
    domain: Option<&str>,
) -> Result<MemoryRecord> {
    let bytes = state.memory.bytes();
    let devices_bytes = state.devices.len() as u64;
    // At worst every other page is a run.
    let runs_at = bytes + devices_bytes.next_multiple_of(BLOCK);
    let size = runs_at + (bytes / BLOCK * RUN_BYTES / 2 + RUN_BYTES).next_multiple_of(BLOCK);
    let content = new_id("mem");
    let mut tx = store.begin();
    let disk = tx.create_disk(&content, size);
    in_domain(&mut tx, disk, domain);
    tx.commit().map(drop)?;
    let fill = || {
        let to = store.disk(disk)?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let copied = state.memory.for_each_run(|at, run| {
            let len = run.len() as u64;
            match runs.last_mut() {
                Some((start, before)) if *start + *before == at => *before += len,
                _ => runs.push((at, len)),
            }
            to.write(at, run).map_err(|e| Visit::Store(e.into()))
        });
        copied.map_err(|why| match why {
            Visit::Memory(error) => out_of_memory(error),
            Visit::Store(error) => error,
        })?;
        to.write(bytes, &state.devices)?;
        let table: Vec<u8> = runs.iter().flat_map(|(at, len)| [at.to_le_bytes(), len.to_le_bytes()].concat()).collect();
        to.write(runs_at, &table)?;
        Ok((runs.len() as u64, runs.iter().map(|(_, len)| len).sum()))
    };
    let filled: Result<(u64, u64)> = fill();
    let (runs, data_bytes) = filled.inspect_err(|_| discard(store, disk))?;
    Ok(MemoryRecord {
        disk,
        content,
        key,
        cpus: shape.0,
        memory_mib: shape.1,
        memory_bytes: bytes,
        data_bytes,
        devices_bytes,
        runs,
        of_template: false,
        kept_at: Timestamp::now(),
    })
}

/// What a record names, for nobody else.
pub(super) async fn read_alone(shared: &Shared, of: &MemoryRecord) -> Result<MachineState> {
    let of = of.clone();
    shared.with_store(move |store| read(store, &of)).await
}

/// Reads a machine's state. Blocks.
fn read(store: &Store, of: &MemoryRecord) -> Result<MachineState> {
    let from = store.disk(of.disk)?;
    let runs_at = of.memory_bytes + of.devices_bytes.next_multiple_of(BLOCK);
    let table_bytes = of.runs.saturating_mul(RUN_BYTES);
    if runs_at.checked_add(table_bytes).is_none_or(|end| end > from.size_bytes()) {
        return Err(Error::new(Kind::StorageDamaged, format!("the memory {} is not what its record says", of.content)));
    }
    let mut devices = vec![0; of.devices_bytes as usize];
    from.read(of.memory_bytes, &mut devices)?;
    let mut table = vec![0; table_bytes as usize];
    from.read(runs_at, &mut table)?;
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    let runs: Vec<(u64, u64)> =
        table.chunks_exact(RUN_BYTES as usize).map(|run| (number(&run[..8]), number(&run[8..]))).collect();
    let memory = GuestMemory::new(of.memory_bytes).map_err(out_of_memory)?;
    let copy = |runs: &[(u64, u64)]| -> Result<()> {
        let mut buffer = vec![0; PIECE as usize];
        for &(start, len) in runs {
            let end = start.checked_add(len).filter(|end| *end <= of.memory_bytes);
            let end = end.ok_or_else(|| Error::new(Kind::StorageDamaged, "a run of memory is beyond its end"))?;
            for at in (start..end).step_by(PIECE as usize) {
                let piece = &mut buffer[..PIECE.min(end - at) as usize];
                from.read(at, piece)?;
                memory.write(at, piece).map_err(out_of_memory)?;
            }
        }
        Ok(())
    };
    // Most of the time goes into unpacking.
    let half = runs.partition_point(|(start, _)| *start < of.memory_bytes / 2);
    let (first, second) = runs.split_at(half);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| copy(second));
        let this = copy(first);
        other.join().unwrap_or_else(|_| Err(Error::internal("reading memory was cut off"))).and(this)
    })?;
    Ok(MachineState { memory: Arc::new(memory), devices: devices.into() })
}

/// The same memory, for another.
pub(super) fn fork(tx: &mut Transaction<'_>, of: &MemoryRecord) -> MemoryRecord {
    MemoryRecord { disk: tx.fork(Source::Disk(of.disk), &new_id("mem")), ..of.clone() }
}

/// Gives memory up, if there is any.
pub(super) fn delete(tx: &mut Transaction<'_>, of: Option<&MemoryRecord>) {
    if let Some(of) = of {
        tx.delete_disk(of.disk);
    }
}

/// What a machine must be to go on from a state of one of this key and with such a disk.
pub(super) fn key(machine: &str, disk_bytes: u64) -> String {
    format!("{machine}-{disk_bytes}")
}

/// Disk and memory of a running machine at one moment.
pub(super) struct Captured<T> {
    /// What was made of the disk.
    pub(super) made: T,
    pub(super) state: MachineState,
    pub(super) key: String,
}

impl Sandbox {
    /// Has the guest write back what it holds, so that its files are there should its memory not be of use.
    async fn write_back(&self, session: &Session) {
        let agent = session.agent();
        let synced = within(self.shared.settings.agent_deadline, "writing back", async { Ok(agent.sync().await?) });
        if let Err(error) = synced.await {
            tracing::warn!(sandbox = %self.id(), %error, "without its memory its files would be as after a power cut");
        }
    }

    /// The session's key, or why its memory cannot be had.
    fn memory_key(&self, session: &Session) -> Result<String> {
        session.state_key().ok_or_else(|| {
            Error::new(Kind::MemoryUnavailable, format!("the memory of sandbox {} cannot be kept", self.name()))
                .hint("a sandbox with volumes has its files kept only; leave out --memory, or detach its volumes first")
        })
    }

    /// Keeps the session's memory with its disk, durably: the record says `paused` from then on. The machine is held when
    /// this returns, and to be killed. If it fails, the machine goes on.
    pub(super) async fn keep_memory(self: &Arc<Self>, owner: &OwnerGuard) -> Result<()> {
        let Some(session) = &owner.session else { return Err(Error::internal("there is no session to be kept")) };
        let key = self.memory_key(session)?;
        let memory = own_memory(&*session.machine).await?;
        self.write_back(session).await;
        let began = Instant::now();
        let kept = async {
            let state = hold(&*session.machine, memory).await?;
            let of = self.record();
            let record = SandboxRecord { state: State::Paused, unclean: true, last_error: None, ..of };
            let write_and_commit = move |store: &Store| {
                let shape = (record.cpus, record.memory_mib);
                let memory = write(store, &state, key, shape, record.dedup_domain.as_deref())?;
                let record = SandboxRecord { memory: Some(memory.clone()), ..record };
                named(store, &memory, |tx| put_all(tx, std::slice::from_ref(&record)))?;
                Ok(record)
            };
            self.shared.with_store(write_and_commit).await
        };
        match kept.await {
            Ok(record) => {
                let (took, bytes) = (began.elapsed(), record.memory.as_ref().map(|m| m.data_bytes));
                tracing::info!(sandbox = %self.id(), ?took, bytes, "its memory is kept");
                self.publish(|r| r.memory = record.memory);
                Ok(())
            }
            Err(error) => {
                let went_on = session.machine.go_on().await;
                went_on.inspect_err(|e| tracing::error!(sandbox = %self.id(), %e, "a held machine does not go on"))?;
                Err(error)
            }
        }
    }

    /// Gives the kept memory up, durably. To be done before a guest runs on the disk that it belongs to: one that is to
    /// `go_on` from it, as the record says then, or another.
    pub(super) async fn forget_memory(&self, go_on: bool) -> Result<()> {
        let record = self.record();
        if record.memory.is_none() {
            return Ok(());
        }
        let boot_path = if go_on { Some(BootPath::Memory) } else { record.boot_path };
        let forgotten = move |tx: &mut Transaction<'_>| {
            delete(tx, record.memory.as_ref());
            let record = SandboxRecord { memory: None, boot_path, ..record };
            tx.put_record(SandboxRecord::KIND, &record.id, record.encode()?);
            Ok(())
        };
        self.shared.transact(forgotten).await?;
        self.publish(|r| (r.memory, r.boot_path) = (None, boot_path));
        Ok(())
    }

    /// Takes the machine's state, and has `commit` take the disk's at the same moment. Most of the memory is copied before
    /// the guest has to wait.
    pub(super) async fn capture<T: Send + 'static>(
        self: &Arc<Self>,
        owner: &OwnerGuard,
        request: Request,
        commit: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> Result<Captured<T>> {
        let Some(session) = &owner.session else { return Err(Error::internal("there is no session to be copied")) };
        let key = self.memory_key(session)?;
        let memory = Arc::new(own_memory(&*session.machine).await?);
        self.write_back(session).await;
        let copy = GuestMemory::new(memory.bytes()).map_err(out_of_memory)?;
        let (copy, memory) = blocking(move || memory.copy_to(&copy, true).map(|()| (copy, memory))).await?;
        if let Ok(Some(next)) = self.decide(request) {
            self.publish(|r| r.state = next);
        }
        let began = Instant::now();
        let held = session.machine.hold().await;
        let taken = async {
            held.map_err(not_told)?;
            let update = blocking(move || memory.update(&copy).map(|()| copy));
            let devices = async { session.machine.devices().await.map_err(not_told) };
            tokio::try_join!(update, devices, self.shared.with_store(commit))
        };
        let taken = taken.await;
        let went_on = session.machine.go_on().await;
        let held: Duration = began.elapsed();
        self.shared.metrics.held(held);
        tracing::info!(sandbox = %self.id(), ?held, "the machine was held");
        if let Ok(Some(after)) = self.decide(Request::CheckpointDone) {
            self.publish(|r| r.state = after);
        }
        went_on?;
        let (copy, devices, made) = taken?;
        Ok(Captured { made, state: MachineState { memory: Arc::new(copy), devices }, key })
    }

    /// Writes what was captured to the store, and has `put` name it, durably; if that fails nothing of it is kept. For as long
    /// as somebody has the state, whoever goes on from it need not read it.
    pub(super) async fn store_captured<T: Send + 'static>(
        &self,
        state: MachineState,
        key: String,
        put: impl FnOnce(&mut Transaction<'_>, MemoryRecord) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (of, writing) = (self.record(), state.clone());
        let shape = (of.cpus, of.memory_mib);
        let stored = self.shared.with_store(move |store| {
            let record = write(store, &writing, key, shape, of.dedup_domain.as_deref())?;
            Ok((named(store, &record, |tx| put(tx, record.clone()))?, record))
        });
        let (made, record) = stored.await?;
        self.shared.memories.put(&record, &state).await;
        Ok(made)
    }
}

/// Has `put` name what was written, durably; if that fails it is deleted. Blocks.
pub(super) fn named<T>(
    store: &Store,
    written: &MemoryRecord,
    put: impl FnOnce(&mut Transaction<'_>) -> Result<T>,
) -> Result<T> {
    let mut tx = store.begin();
    let done = put(&mut tx).and_then(|made| {
        tx.commit_durable()?;
        Ok(made)
    });
    done.inspect_err(|_| discard(store, written.disk))
}

/// Deletes what no record names. Blocks.
pub(super) fn discard(store: &Store, disk: DiskId) {
    let mut tx = store.begin();
    tx.delete_disk(disk);
    if let Err(error) = tx.commit() {
        tracing::warn!(%disk, %error, "a machine's memory stays until the store is opened again");
    }
}

/// The same, from where nothing may block.
pub(super) async fn give_back(shared: &Shared, disk: DiskId) {
    let discarded = shared.with_store(move |store| {
        discard(store, disk);
        Ok(())
    });
    if let Err(error) = discarded.await {
        tracing::warn!(%disk, %error, "a disk that no record names stays until the store is opened again");
    }
}

/// A machine's memory, if it is its own.
pub(super) async fn own_memory(machine: &dyn Machine) -> Result<GuestMemory> {
    machine.memory().await.map_err(|error| {
        Error::new(Kind::MemoryUnavailable, format!("the machine's memory cannot be kept: {}", error.message)).hint(
            "on the FUSE front end forks share memory and keep files only; leave out --memory, or stop and resume it first",
        )
    })
}

/// Holds a machine: its memory and its devices from then on, until it goes on.
pub(super) async fn hold(machine: &dyn Machine, memory: GuestMemory) -> Result<MachineState> {
    machine.hold().await.map_err(not_told)?;
    Ok(MachineState { devices: machine.devices().await.map_err(not_told)?, memory: Arc::new(memory) })
}

/// The VMM does not part with a machine's state.
fn not_told(error: vmm::Error) -> Error {
    match error.kind {
        vmm::ErrorKind::Qmp => {
            Error::new(Kind::MemoryUnavailable, format!("the machine's state cannot be had: {}", error.message))
                .hint("it goes on as it was; leave out --memory to keep its files only")
        }
        _ => error.into(),
    }
}

async fn blocking<T: Send + 'static>(call: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(call).await;
    done.map_err(|e| Error::internal(format!("copying memory did not end: {e}")))?.map_err(out_of_memory)
}

/// Of a guest's memory on this host.
fn out_of_memory(error: std::io::Error) -> Error {
    Error::new(Kind::MachineUnavailable, format!("a guest's memory could not be copied: {error}"))
        .hint("the host may be out of memory: stop sandboxes that are not used, or do without --memory")
}

/// Why a visit of memory ended.
enum Visit {
    Memory(std::io::Error),
    Store(Error),
}

impl From<std::io::Error> for Visit {
    fn from(error: std::io::Error) -> Self {
        Visit::Memory(error)
    }
}
