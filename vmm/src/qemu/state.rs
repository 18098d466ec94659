//! The state of a machine at one moment, taken from one QEMU and given to another.
//!
//! A machine is *held*: QEMU stops its processors and brings what its devices were doing to an end, so that disk and memory
//! stand still together. QEMU's migration then tells what the devices are; the guest's memory is not in that stream
//! (`x-ignore-shared`), it is read where it is. The machine goes on, or is killed.
//!
//! Another process is given both, with `-incoming defer`. Memory that nobody else has becomes the machine's own. What others
//! have, too, is copied; but where QEMU itself reads and writes the disk, all map the one file privately and share each page
//! until they write to it. Such a machine has no state for others: QEMU would put all of its memory into the stream.
//! Having read the devices' state QEMU waits: a held machine is held there, too, and its disk is not touched before it goes
//! on.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use miosa_agent::wire;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;
use tokio::time::Instant;

use super::command::{self, Course, Handed, Ram};
use super::{Launch, Process, QemuMachine, QemuVmm, blocking, probe, warm};
use crate::machine::{Loaded, MachineState, deadline_at};
use crate::memory::GuestMemory;
use crate::qmp::Qmp;
use crate::{Accel, Agent, BootPath, BootTiming, DiskAttachment, Error, ErrorKind, Machine, MachineSpec, Result};

/// Version of what a state's key is made of.
const VERSION: u32 = 1;
/// Over which QEMU tells the devices' state.
const SOCKET: &str = "state.sock";
/// In a run directory: what QEMU told last, for a daemon that finds the machine held.
const DEVICES: &str = "devices";
/// In a run directory: what the machine is.
const NOTED: &str = "machine.json";
/// Most bytes of it that are believed; it has about 400 KB.
const DEVICES_MAX: u64 = 64 << 20;
/// How long QEMU may take to tell a machine's state; it takes some 20 ms.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often QEMU is asked whether it is done.
const ASK_EVERY: Duration = Duration::from_millis(2);

/// See [`crate::Vmm::state_key`].
pub(super) async fn key(vmm: &QemuVmm, spec: &MachineSpec) -> Result<String> {
    if !spec.volumes.is_empty() {
        let message = "a machine with volumes has no state of its own: what is on them is others' too";
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let (vmm, spec) = (vmm.clone(), spec.clone());
    blocking(move || {
        let disk = match spec.disk {
            DiskAttachment::RawFile { .. } => DiskAttachment::RawFile { path: PathBuf::new() },
            DiskAttachment::VhostUserBlk { .. } => DiskAttachment::VhostUserBlk { socket: PathBuf::new() },
        };
        // Its kernel and agent are in its memory; how one talks with that must be the same.
        let mut parts = vec![VERSION.to_string(), wire::VERSION.to_string(), warm::qemu_version(&vmm)?];
        if spec.accel == Accel::Kvm {
            let (host, processor) = probe::this_host().map_err(|e| Error::io("uname", e))?;
            parts.extend([host, processor]);
        }
        let anywhere = MachineSpec {
            id: "machine".into(),
            run_dir: PathBuf::new(),
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            disk,
            mac: [0; 6],
            ..spec
        };
        let arguments = command::arguments(&anywhere, &vmm.machine, Course::Load, &Handed::nothing(Ram::Shared));
        parts.extend(arguments.iter().map(|a| a.to_string_lossy().into_owned()));
        Ok(warm::short(&parts))
    })
    .await
}

/// What the devices of a machine are, whose processors this stops if they run. It is not to be used until it is told to go
/// on.
pub(super) async fn devices_of(qmp: &Qmp, run_dir: &Path) -> Result<Vec<u8>> {
    let socket = run_dir.join(SOCKET);
    crate::process::check_socket_path(&socket)?;
    let io = |e| Error::io(socket.display(), e);
    let _ = fs::remove_file(&socket);
    let kept = run_dir.join(DEVICES);
    let _ = fs::remove_file(&kept);
    let listener = UnixListener::bind(&socket).map_err(io)?;
    // QEMU is another user, in this directory; nobody else gets into that.
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).map_err(io)?;
    ignore_shared(qmp).await?;
    qmp.execute("migrate", json!({ "uri": format!("unix:{SOCKET}") })).await?;
    let told = async {
        let mut devices = Vec::new();
        let (stream, _) = listener.accept().await.map_err(io)?;
        stream.take(DEVICES_MAX).read_to_end(&mut devices).await.map_err(io)?;
        fs::write(&kept, &devices).map_err(|e| Error::io(kept.display(), e))?;
        migrated(qmp).await?;
        Ok(devices)
    };
    // Should it fail before it connects.
    let failed = async {
        match migrated(qmp).await {
            Ok(()) => std::future::pending().await,
            Err(error) => error,
        }
    };
    let outcome = tokio::select! {
        told = told => told,
        error = failed => Err(error),
        () = tokio::time::sleep(PATIENCE) => Err(Error::new(ErrorKind::Qmp, "QEMU did not tell a machine's state in time")),
    };
    let _ = fs::remove_file(&socket);
    if outcome.is_err() {
        // Else it could not go on.
        let _ = qmp.execute("migrate_cancel", json!({})).await;
    }
    outcome
}

/// Waits until QEMU has told, or been told, a machine's state.
async fn migrated(qmp: &Qmp) -> Result<()> {
    loop {
        let told = qmp.execute("query-migrate", json!({})).await?;
        match told.get("status").and_then(|status| status.as_str()) {
            Some("completed") => return Ok(()),
            Some("none" | "setup" | "active" | "device" | "wait-unplug") | None => tokio::time::sleep(ASK_EVERY).await,
            _ => {
                let why = told.get("error-desc").and_then(|why| why.as_str()).unwrap_or("no reason given");
                return Err(Error::new(ErrorKind::Qmp, format!("QEMU did not pass a machine's state on: {why}")));
            }
        }
    }
}

/// The guest's memory is not in the stream, for either side.
pub(super) async fn ignore_shared(qmp: &Qmp) -> Result<()> {
    let capabilities = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
    qmp.execute("migrate-set-capabilities", capabilities).await.map(drop)
}

/// The memory of a machine's guest.
pub(super) async fn memory_of(qmp: &Qmp, pid: i32) -> Result<GuestMemory> {
    let told = qmp.execute("query-memory-size-summary", json!({})).await?;
    let bytes = told.get("base-memory").and_then(|bytes| bytes.as_u64()).unwrap_or_default();
    blocking(move || GuestMemory::of_process(pid, bytes).map_err(|e| Error::io("look at a guest's memory", e))).await
}

/// What the next daemon has to know of a machine.
#[derive(Serialize, Deserialize)]
struct Noted {
    spec: MachineSpec,
    /// Its guest had booted without a root, and is told which.
    takes_root: bool,
}

/// Notes in a machine's run directory what it is.
pub(super) fn note(spec: &MachineSpec, course: Course) -> Result<()> {
    let path = spec.run_dir.join(NOTED);
    let noted = Noted { spec: spec.clone(), takes_root: course == Course::Restore };
    let written = serde_json::to_vec(&noted).map_err(std::io::Error::from).and_then(|bytes| fs::write(&path, bytes));
    written.map_err(|e| Error::io(path.display(), e))
}

/// The machine of this run directory, as it was noted; none if nothing was.
fn noted(run_dir: &Path) -> Result<Option<Noted>> {
    let path = run_dir.join(NOTED);
    match fs::read(&path) {
        Ok(bytes) => {
            let noted = serde_json::from_slice(&bytes);
            noted.map(Some).map_err(|e| Error::new(ErrorKind::Invalid, format!("{}: {e}", path.display())))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path.display(), error)),
    }
}

/// See [`crate::Vmm::adopt`]. A machine that an earlier daemon has left held goes on. Where its disk is served by another
/// process, QEMU does not come back to that while it is held (7.2 takes no notice of the connection's end then, and talks to
/// the new server as to the old one): so it is given its own state in a process of its own. If this fails, its process is
/// gone.
pub(super) async fn take_over(
    vmm: &QemuVmm,
    process: Process,
    run_dir: &Path,
    (started, at): (Instant, Instant),
) -> Result<Arc<dyn Machine>> {
    let noted = noted(run_dir)?;
    let root = noted.as_ref().filter(|noted| noted.takes_root).map(|noted| warm::root_of(&noted.spec));
    let spec = noted.map(|noted| noted.spec).filter(|spec| spec.disk.outlives_its_server());
    let (control, dir, moves) = (process.control.clone(), run_dir.to_owned(), spec.is_some());
    let (process, (qmp, process_ms, state)) = process
        .unless_it_ends(at, |events| async move {
            let qmp = super::control(&control, events, at).await?;
            let state = match held(&qmp).await? {
                None => None,
                Some(held) if moves => Some(state_of(&qmp, &dir, held, control.id.pid).await?),
                Some(_) => qmp.execute("cont", json!({})).await.map(|_| None)?,
            };
            Ok((qmp, super::millis(started), state))
        })
        .await?;
    let (Some(state), Some(spec)) = (state, spec) else {
        return Ok(Arc::new(process.greet(qmp, root, (started, at), process_ms).await?));
    };
    tracing::info!(machine = spec.id, "a machine that was held goes on in a new process");
    process.control.request_kill();
    process.control.exit.wait().await;
    let left = at.saturating_duration_since(Instant::now());
    Box::new(load(vmm, &spec, state, left).await?).go_on().await
}

/// How a machine is held.
enum Held {
    /// Its devices have not been told.
    Untold,
    /// They have been, and are not told again before it has run.
    Told,
}

/// Whether a machine is held, and how. Refuses one whose daemon died before it had its state: nobody can give it that any
/// more.
async fn held(qmp: &Qmp) -> Result<Option<Held>> {
    loop {
        let status = qmp.execute("query-status", json!({})).await?;
        match status.get("status").and_then(|status| status.as_str()) {
            Some("inmigrate") => {
                return Err(Error::new(ErrorKind::StartFailed, "its daemon ended before it had its state"));
            }
            Some("finish-migrate") => tokio::time::sleep(ASK_EVERY).await,
            Some("paused") => return Ok(Some(Held::Untold)),
            Some("postmigrate") => return Ok(Some(Held::Told)),
            _ => return Ok(None),
        }
    }
}

/// The state of a machine that is held.
async fn state_of(qmp: &Qmp, run_dir: &Path, held: Held, pid: i32) -> Result<MachineState> {
    let memory = Arc::new(memory_of(qmp, pid).await?);
    let path = run_dir.join(DEVICES);
    let devices = match held {
        Held::Untold => devices_of(qmp, run_dir).await?,
        Held::Told => fs::read(&path).map_err(|e| Error::io(path.display(), e))?,
    };
    Ok(MachineState { memory, devices: devices.into() })
}

/// See [`crate::Vmm::load`].
pub(super) async fn load(
    vmm: &QemuVmm,
    spec: &MachineSpec,
    MachineState { memory, devices }: MachineState,
    deadline: Duration,
) -> Result<LoadedMachine> {
    let (started, at) = (Instant::now(), deadline_at(deadline));
    let io = |e| Error::io("a guest's memory", e);
    if memory.bytes() != u64::from(spec.memory_mib) << 20 {
        return Err(Error::new(ErrorKind::Invalid, "the state is of a machine with another size of memory"));
    }
    let told = file_of(&devices).map_err(|e| Error::io("a machine's state", e))?;
    // What nobody else has is this machine's, or copied if others had it. What is shared is mapped, or copied where somebody
    // writes to it.
    let (memory, from, is_own) = match Arc::try_unwrap(memory) {
        Ok(own) if own.is_frozen().map_err(io)? => {
            (Arc::new(GuestMemory::new(own.bytes()).map_err(io)?), Some(Arc::new(own)), true)
        }
        Ok(own) => (Arc::new(own), None, true),
        Err(shared) if !spec.disk.outlives_its_server() => (shared, None, false),
        Err(shared) => (Arc::new(GuestMemory::new(shared.bytes()).map_err(io)?), Some(shared), true),
    };
    let fd = memory.file().as_raw_fd();
    let ram = if is_own { Ram::Shared(fd) } else { Ram::Copied(fd) };
    if !is_own {
        // The others' as well, though they go meanwhile.
        memory.freeze().map_err(io)?;
    }
    let launch = Launch { course: Course::Load, ram, state: Some(told.as_raw_fd()), yields: false };
    let process = vmm.spawn(spec, launch)?;
    let filled = tokio::spawn(blocking(move || match from {
        Some(from) => from.copy_to(&memory, false).map_err(|e| Error::io("fill a guest's memory", e)),
        None => Ok(()),
    }));
    let control = process.control.clone();
    let (process, (qmp, process_ms)) = process
        .unless_it_ends(at, |events| async move {
            let qmp = super::control(&control, events, at).await?;
            let process_ms = super::millis(started);
            ignore_shared(&qmp).await?;
            filled.await.map_err(|e| Error::io("fill a guest's memory", e))??;
            qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{}", told.as_raw_fd()) })).await?;
            let late = |_| Error::new(ErrorKind::BootTimeout, "QEMU did not take the machine's state in time");
            tokio::time::timeout_at(at, migrated(&qmp)).await.map_err(late)??;
            Ok((qmp, process_ms))
        })
        .await?;
    Ok(LoadedMachine { process, qmp, process_ms, started, at })
}

/// A file with these bytes, to be read from its beginning.
fn file_of(bytes: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(memfd_create(c"devices", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    std::io::Seek::rewind(&mut file)?;
    Ok(file)
}

/// A machine that has its state and is held.
pub(super) struct LoadedMachine {
    process: Process,
    qmp: Qmp,
    process_ms: u64,
    started: Instant,
    at: Instant,
}

#[async_trait]
impl Loaded for LoadedMachine {
    async fn go_on(self: Box<Self>) -> Result<Arc<dyn Machine>> {
        let LoadedMachine { process, qmp, process_ms, started, at } = *self;
        let control = process.control.clone();
        let (process, (qmp, agent)) = process
            .unless_it_ends(at, |_| async move {
                qmp.execute("cont", json!({})).await?;
                let left = at.saturating_duration_since(Instant::now());
                let agent = Agent::connect(&control.paths.agent, left).await?;
                Ok((qmp, agent))
            })
            .await?;
        let timing = BootTiming { path: BootPath::Memory, process_ms, agent_ms: super::millis(started) };
        tracing::info!(pid = process.control.id.pid, ms = timing.agent_ms, "machine goes on");
        Ok(Arc::new(QemuMachine { process, qmp, agent, timing, shutting_down: tokio::sync::Mutex::new(()) }))
    }
}
