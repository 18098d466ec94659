//! Machines as QEMU processes.
//!
//! A process outlives the daemon that started it: it has its own session, writes its console and its complaints to files
//! by itself, and goes on listening when a connection ends. What finds it again is its record in the run directory.
//! Each machine has one task, the *watcher*, which holds a pidfd, keeps the files short and says how the process ended;
//! everybody else only sends it signals.

mod boot_files;
mod command;
mod probe;
mod state;
mod warm;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nix::sys::signal::{SigHandler, Signal};
use serde_json::json;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::cgroup::{self, Cgroups};
use crate::console;
use crate::jail::{self, Cell, Limit, Needs, Use};
use crate::machine::{Exit, Loaded, MachineState, deadline_at};
use crate::memory::GuestMemory;
use crate::process::{ProcessId, RECORD, RUN_DIR_VARIABLE};
use crate::qmp::{Qmp, QmpEvent};
use crate::{
    Accel, Acceleration, Agent, BootPath, BootTiming, DiskAttachment, Error, ErrorKind, ExitReason, Machine,
    MachineSpec, Network, Reaped, Result, Root, Vmm, WarmKey,
};
use command::{Course, DiskFile, Handed, Paths, Ram};
pub use probe::{KvmAnswer, kept_kvm_answer};

/// Bytes of console shown when a boot fails.
const SHOWN: usize = 1500;
/// How long a guest that has flushed its disk may take to power off.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(3);
/// How long to wait, when a machine's sockets fail, whether its process is dying.
const DEATH_PATIENCE: Duration = Duration::from_secs(2);
/// How long a killed process may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(15);
/// How often the lengths of a machine's files are looked at.
const CAP_EVERY: Duration = Duration::from_secs(2);
/// What a machine's process can write to one file, or the size of its disk if that is a file: its console while no daemon
/// keeps that short.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Threads of a machine's process beside its virtual CPUs; as in its control group.
const THREADS_MAX: u64 = 256;

/// Starts machines as QEMU processes.
#[derive(Clone, Debug)]
pub struct QemuVmm {
    program: PathBuf,
    machine: String,
    cgroups: Arc<std::sync::OnceLock<Cgroups>>,
    records: Records,
    known: Arc<warm::Known>,
    boot_files: Arc<boot_files::BootFiles>,
}

/// Held while a run directory's records of process and groups are written, and while they are looked at and removed: the
/// end of a machine and the start of the next one in its directory do not cross.
type Records = Arc<parking_lot::Mutex<()>>;

impl Default for QemuVmm {
    fn default() -> QemuVmm {
        QemuVmm::new()
    }
}

impl QemuVmm {
    /// The `qemu-system-x86_64` in `PATH`, with machine type `q35`: under TCG its guests answer about 15 % sooner than
    /// those of `pc` (2.46 s against 2.93 s, means of four boots in turns, by `examples/boot.rs`).
    pub fn new() -> QemuVmm {
        QemuVmm {
            program: "qemu-system-x86_64".into(),
            machine: "q35".into(),
            cgroups: Arc::default(),
            records: Arc::default(),
            known: Arc::default(),
            boot_files: Arc::default(),
        }
    }

    /// Another program.
    #[must_use]
    pub fn program(mut self, program: impl Into<PathBuf>) -> QemuVmm {
        self.program = program.into();
        self
    }

    /// Another of QEMU's machine types, such as `pc`.
    #[must_use]
    pub fn machine_type(mut self, machine: impl Into<String>) -> QemuVmm {
        self.machine = machine.into();
        self
    }

    fn missing(&self, error: &std::io::Error) -> Error {
        let message = format!("cannot run {}: {error}", self.program.display());
        Error::new(ErrorKind::QemuMissing, message).hint("apt-get install qemu-system-x86")
    }

    fn spawn(&self, spec: &MachineSpec, launch: Launch) -> Result<Process> {
        command::check(spec, launch.course)?;
        let paths = Paths::of(&spec.run_dir);
        make_private(&spec.run_dir)?;
        for stale in [&paths.qmp, &paths.agent] {
            let _ = std::fs::remove_file(stale);
        }
        state::note(spec, launch.course)?;
        let file = |path: &Path| console::create(path).map_err(|e| Error::io(path.display(), e));
        let output = file(&paths.output)?;
        let opened = Opened::open(self, spec, launch.course, &paths)?;
        let handed = opened.handed(launch.ram);
        let program = jail::find(&self.program);
        let mut command = Command::new(&program);
        command.args(command::arguments(spec, &self.machine, launch.course, &handed));
        command.env_clear().env(RUN_DIR_VARIABLE, &spec.run_dir).current_dir(&spec.run_dir);
        command.stdin(Stdio::null()).stderr(output.try_clone().map_err(|e| Error::io("qemu.log", e))?).stdout(output);
        let inherited = handed.numbers().into_iter().chain(launch.state).collect();
        let (cell, turn) = Cell::new(needs(spec, program, inherited, opened.file_bytes))?;
        let _recording = self.records.lock();
        if let Some(user) = cell.user() {
            admit(&spec.run_dir, user)?;
        }
        let mut group = self.cgroups.get_or_init(Cgroups::find).make(spec);
        let doors = group.doors();
        let yields = launch.yields;
        // SAFETY: between fork and exec only system calls are made, on what was allocated before.
        unsafe { command.pre_exec(move || prepare(&doors, yields, &cell)) };
        let spawned = command.spawn();
        drop(turn);
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => {
                group.remove();
                return Err(self.missing(&error));
            }
        };
        let known = ProcessId::of_child(&child).and_then(|(id, handle)| id.write(&spec.run_dir).map(|()| (id, handle)));
        let (id, handle) = match known {
            Ok(known) => known,
            Err(error) => {
                let _ = child.kill().and_then(|()| child.wait());
                group.remove();
                return Err(error);
            }
        };
        Process::watched(id, handle, Some(child), spec.run_dir.clone(), self.records.clone())
    }
}

/// How a machine's process is started.
#[derive(Debug)]
struct Launch {
    course: Course,
    /// An open file, until it is started.
    ram: Ram,
    /// An open file that it has under the number that that has here, until it is started: the state that it goes on from.
    state: Option<RawFd>,
    /// Others' work goes before its own.
    yields: bool,
}

/// What a machine's process is handed open.
struct Opened {
    kernel: Arc<OwnedFd>,
    initramfs: Arc<OwnedFd>,
    qmp: UnixListener,
    agent: UnixListener,
    console: File,
    disks: Vec<(String, File, bool)>,
    /// The longest of its files.
    file_bytes: u64,
}

impl Opened {
    fn open(vmm: &QemuVmm, spec: &MachineSpec, course: Course, paths: &Paths) -> Result<Opened> {
        let io = |path: &Path, e| Error::io(path.display(), e);
        let listen = |path: &Path| UnixListener::bind(path).map_err(|e| io(path, e));
        let mut opened = Opened {
            kernel: vmm.boot_files.get(&spec.kernel)?,
            initramfs: vmm.boot_files.get(&spec.initramfs)?,
            qmp: listen(&paths.qmp)?,
            agent: listen(&paths.agent)?,
            console: console::create(&paths.console).map_err(|e| io(&paths.console, e))?,
            disks: Vec::new(),
            file_bytes: FILE_BYTES_MAX,
        };
        for (serial, disk, read_only) in command::disks(spec).filter(|_| course != Course::Keep) {
            let DiskAttachment::RawFile { path } = disk else { continue };
            let open = |flags| File::options().read(true).write(!read_only).custom_flags(flags).open(path);
            // Not every file system knows O_DIRECT.
            let direct = open(libc::O_DIRECT);
            let is_direct = direct.is_ok();
            let file = direct.or_else(|_| open(0));
            let file = file.map_err(|e| Error::new(ErrorKind::StartFailed, format!("{}: {e}", path.display())))?;
            opened.file_bytes = opened.file_bytes.max(file.metadata().map_err(|e| io(path, e))?.len());
            opened.disks.push((serial.to_owned(), file, is_direct));
        }
        Ok(opened)
    }

    fn handed(&self, ram: Ram) -> Handed {
        let disk = |(serial, file, direct): &(String, File, bool)| {
            (serial.clone(), DiskFile { fd: file.as_raw_fd(), direct: *direct })
        };
        Handed {
            ram,
            kernel: self.kernel.as_raw_fd(),
            initramfs: self.initramfs.as_raw_fd(),
            qmp: self.qmp.as_raw_fd(),
            agent: self.agent.as_raw_fd(),
            console: self.console.as_raw_fd(),
            disks: self.disks.iter().map(disk).collect(),
        }
    }
}

/// Where QEMU's user network looks for the host's name servers.
const NAME_SERVERS: &str = "/etc/resolv.conf";
const KVM: &str = "/dev/kvm";

/// What a machine's process needs of the host, beside what it is handed: its program, and very little.
fn needs(spec: &MachineSpec, program: PathBuf, inherited: Vec<RawFd>, file_bytes: u64) -> Needs {
    use std::os::unix::fs::MetadataExt;
    let (mut files, mut groups) = (Vec::new(), Vec::new());
    let network = spec.network == Network::User;
    if network {
        files.push((NAME_SERVERS.into(), Use::Read));
        // Some hosts have a link there, to a file that is replaced by another when it changes.
        if let Ok(to) = Path::new(NAME_SERVERS).canonicalize()
            && to != Path::new(NAME_SERVERS)
        {
            files.extend(to.parent().map(|dir| (dir.to_owned(), Use::Read)));
        }
    }
    if spec.accel == Accel::Kvm {
        files.push((KVM.into(), Use::Write));
        groups.extend(std::fs::metadata(KVM).map(|meta| meta.gid()).ok().filter(|gid| *gid != 0));
    }
    let limits = vec![(Limit::FileBytes, file_bytes), (Limit::Threads, u64::from(spec.cpus) + THREADS_MAX)];
    Needs { program, files, network, groups, reads_of_any_user: false, inherited, limits }
}

/// Lets a user reach what it knows by name in a run directory, which stays the daemon's: it can neither list nor change it.
fn admit(run_dir: &Path, user: u32) -> Result<()> {
    let io = |e| Error::io(run_dir.display(), e);
    std::os::unix::fs::chown(run_dir, None, Some(user)).map_err(io)?;
    std::fs::set_permissions(run_dir, std::fs::Permissions::from_mode(0o710)).map_err(io)
}

/// What one that makes way is nicer by.
const NICER: libc::c_int = 10;

/// What a machine's process does to itself before it becomes QEMU.
fn prepare(doors: &[File], yields: bool, cell: &Cell) -> std::io::Result<()> {
    // A signal for the daemon's terminal is not for its machines.
    nix::unistd::setsid()?;
    // A console that is too long is cut off and not the machine's end.
    // SAFETY: ignoring a signal installs no handler.
    unsafe { nix::sys::signal::signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
    doors.iter().for_each(|door| cgroup::enter(door.as_fd()));
    if yields {
        // SAFETY: a plain system call without memory. What it says is of no interest: it goes on as it is.
        unsafe { libc::nice(NICER) };
    }
    cell.enter()
}

fn make_private(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)))
        .map_err(|e| Error::io(dir.display(), e))
}

#[async_trait]
impl Vmm for QemuVmm {
    async fn start(&self, spec: MachineSpec, deadline: Duration) -> Result<Arc<dyn Machine>> {
        let (started, at) = (Instant::now(), deadline_at(deadline));
        let machine = match &spec.warm {
            Some(dir) => warm::restore(self, &spec, dir, (started, at)).await?,
            None => {
                let memory = warm::new_ram(spec.memory_mib)?;
                let ram = Ram::Shared(memory.file().as_raw_fd());
                let launch = Launch { course: Course::Boot, ram, state: None, yields: false };
                self.spawn(&spec, launch)?.into_machine(started, at, Coming::Boot).await?
            }
        };
        let (way, ms) = (machine.timing.path.name(), machine.timing.agent_ms);
        tracing::info!(machine = spec.id, pid = machine.pid(), way, ms, "machine is up");
        Ok(Arc::new(machine))
    }

    async fn warm_key(&self, spec: &MachineSpec) -> Result<WarmKey> {
        warm::key(self, spec).await
    }

    async fn warm(&self, spec: &MachineSpec, to: &Path, deadline: Duration) -> Result<()> {
        warm::keep(self, spec, to, deadline).await
    }

    async fn state_key(&self, spec: &MachineSpec) -> Result<String> {
        state::key(self, spec).await
    }

    async fn load(&self, spec: MachineSpec, state: MachineState, deadline: Duration) -> Result<Box<dyn Loaded>> {
        Ok(Box::new(state::load(self, &spec, state, deadline).await?))
    }

    async fn survivors(&self, run_root: &Path) -> Result<Vec<PathBuf>> {
        let run_root = run_root.to_owned();
        blocking(move || crate::process::recorded_alive(&run_root)).await
    }

    async fn adopt(&self, run_dir: &Path, deadline: Duration) -> Result<Option<Arc<dyn Machine>>> {
        let (started, at) = (Instant::now(), deadline_at(deadline));
        let adopted = match Process::recorded(run_dir, self.records.clone()) {
            Ok(Some(process)) => state::take_over(self, process, run_dir, (started, at)).await.map(Some),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        if let Ok(Some(machine)) = adopted {
            let ms = machine.boot_timing().agent_ms;
            tracing::info!(run_dir = %run_dir.display(), pid = machine.pid(), ms, "machine taken over");
            return Ok(Some(machine));
        }
        // Whatever there is of it.
        let left = run_dir.to_owned();
        blocking(move || crate::process::reap(&left)).await?;
        adopted.map(|_| None)
    }

    async fn reap_orphans(&self, run_root: &Path, keep: &[PathBuf]) -> Result<Vec<Reaped>> {
        let (run_root, keep) = (run_root.to_owned(), keep.to_owned());
        blocking(move || crate::process::reap_orphans(&run_root, &keep)).await
    }

    async fn probe_kvm(&self, kernel: &Path, initramfs: &Path, run_root: &Path, cache_dir: &Path) -> Acceleration {
        probe::kvm(self, kernel, initramfs, run_root, cache_dir).await
    }

    async fn version(&self) -> Result<String> {
        let mut command = tokio::process::Command::new(&self.program);
        let output = command.arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
        match tokio::time::timeout(Duration::from_secs(10), output).await {
            Ok(Ok(output)) => Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned()),
            Ok(Err(error)) => Err(self.missing(&error)),
            Err(_) => Err(Error::new(ErrorKind::QemuMissing, format!("{} does not answer", self.program.display()))),
        }
    }
}

async fn blocking<T: Send + 'static>(call: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(call).await.map_err(|e| Error::io("reap machines", e))?
}

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

/// What the watcher and the machine's handles share.
#[derive(Debug)]
struct Control {
    id: ProcessId,
    paths: Paths,
    /// We asked for its death.
    killed: AtomicBool,
    /// The guest said that its disk is flushed and clean.
    flushed: AtomicBool,
    /// The next daemon's.
    left: AtomicBool,
    exit: Exit,
}

impl Control {
    /// Kills the process now. What has ended by itself keeps its own reason.
    fn request_kill(&self) {
        if self.exit.told().is_some() {
            return;
        }
        self.killed.store(true, Ordering::SeqCst);
        // At once, and not when the watcher gets to run: this is also what happens when handles are dropped.
        if let Err(error) = self.id.send_kill() {
            tracing::error!(pid = self.id.pid, %error, "a machine cannot be killed");
        }
    }

    fn start_failed(&self, reason: &ExitReason) -> Error {
        let said = console::tail(&self.paths.output, SHOWN);
        let message = match (reason, said.is_empty()) {
            (_, false) => format!("QEMU ended during the start: {said}"),
            (ExitReason::Failed { message }, true) => format!("QEMU ended during the start: {message}"),
            (reason, true) => format!("the machine ended during its start ({reason:?}){}", self.console_end()),
        };
        Error::new(ErrorKind::StartFailed, message)
    }

    async fn boot_failed(&self, error: Error, at: Instant) -> Error {
        // What says enough by itself.
        if matches!(error.kind, ErrorKind::StartFailed | ErrorKind::Guest(_) | ErrorKind::Io) {
            return error;
        }
        // A process that dies closes its sockets first: wait a moment for the better reason.
        if let Ok(reason) = tokio::time::timeout(DEATH_PATIENCE, self.exit.wait()).await {
            return self.start_failed(&reason);
        }
        if Instant::now() < at && error.kind != ErrorKind::AgentTimeout {
            return Error::new(ErrorKind::StartFailed, format!("{error}{}", self.console_end()));
        }
        Error::new(ErrorKind::BootTimeout, format!("the guest did not answer in time{}", self.console_end()))
            .hint("give it more time, or see the console log in the machine's run directory")
    }

    fn console_end(&self) -> String {
        match console::tail(&self.paths.console, SHOWN) {
            text if text.is_empty() => "; its console is empty".into(),
            text => format!("; its console ends with:\n{text}"),
        }
    }
}

/// Watches the process until its end.
async fn watch(
    process: AsyncFd<OwnedFd>,
    child: Option<Child>,
    control: Arc<Control>,
    events: tokio::sync::oneshot::Receiver<mpsc::UnboundedReceiver<QmpEvent>>,
    run_dir: PathBuf,
    records: Records,
) {
    let mut cap = tokio::time::interval(CAP_EVERY);
    loop {
        tokio::select! {
            _ = process.readable() => break,
            _ = cap.tick() => for path in [&control.paths.console, &control.paths.output] {
                if let Err(error) = console::cap(path) {
                    tracing::debug!(path = %path.display(), %error, "a machine's log could not be kept short");
                }
            },
        }
    }
    // Does not wait: it has ended. Only a parent learns how.
    let status = child.and_then(|mut child| child.wait().ok());
    // The directory may already belong to the machine's next process: only its own record goes, and sockets stay until
    // the next start removes them.
    {
        let _recording = records.lock();
        if ProcessId::read(&run_dir).is_ok_and(|record| record == Some(control.id)) {
            cgroup::remove_recorded(&run_dir);
            let _ = std::fs::remove_file(run_dir.join(RECORD));
        }
    }
    // The process is gone, so this ends by itself.
    let said = async {
        let mut last = None;
        if let Ok(mut events) = events.await {
            while let Some(QmpEvent::Shutdown { reason }) = events.recv().await {
                last = Some(reason);
            }
        }
        last
    };
    let said = tokio::time::timeout(Duration::from_secs(1), said).await.ok().flatten();
    let failed = || {
        let status = status.map_or_else(|| "its process is gone".to_owned(), |status| status.to_string());
        let complaints = console::tail(&control.paths.output, SHOWN);
        ExitReason::Failed { message: format!("{status} {complaints}").trim().to_owned() }
    };
    let reason = match said.as_deref() {
        _ if control.flushed.load(Ordering::SeqCst) => ExitReason::Shutdown,
        Some("guest-shutdown") => ExitReason::Shutdown,
        Some("guest-reset" | "guest-panic") => ExitReason::GuestReset,
        _ if control.killed.load(Ordering::SeqCst) => ExitReason::Killed,
        _ => failed(),
    };
    tracing::info!(run_dir = %run_dir.display(), ?reason, "machine ended");
    control.exit.tell(reason);
}

/// How a process's guest comes to answer.
enum Coming {
    /// It boots.
    Boot,
    /// It is given a state, and then a root.
    Restored(warm::Restoring),
}

/// A process that runs; dropping it kills it, unless it was left.
struct Process {
    control: Arc<Control>,
    /// Hands QEMU's events to the watcher.
    events: Option<EventsFor>,
}

impl Process {
    fn watched(
        id: ProcessId,
        handle: OwnedFd,
        child: Option<Child>,
        run_dir: PathBuf,
        records: Records,
    ) -> Result<Process> {
        let control = Arc::new(Control {
            id,
            paths: Paths::of(&run_dir),
            killed: AtomicBool::new(false),
            flushed: AtomicBool::new(false),
            left: AtomicBool::new(false),
            exit: Exit::new(),
        });
        let (events, receiver) = tokio::sync::oneshot::channel();
        let process = Process { control: control.clone(), events: Some(events) };
        // SAFETY: an `OwnedFd` names one open descriptor for as long as it lives, which is in the `AsyncFd` from here on.
        let handle = unsafe { AsyncFd::register_with_interest(handle, tokio::io::Interest::READABLE) }
            .map_err(|e| Error::io(format!("watch process {}", id.pid), e))?;
        tokio::spawn(watch(handle, child, control, receiver, run_dir, records));
        Ok(process)
    }

    /// The live process of an earlier daemon's machine.
    fn recorded(run_dir: &Path, records: Records) -> Result<Option<Process>> {
        let Some(id) = ProcessId::read(run_dir)? else { return Ok(None) };
        let Some(handle) = id.open()? else { return Ok(None) };
        Process::watched(id, handle, None, run_dir.to_owned(), records).map(Some)
    }

    /// Takes control of the process and waits for its guest. If that fails, the process is gone.
    async fn into_machine(self, started: Instant, at: Instant, coming: Coming) -> Result<QemuMachine> {
        let control = self.control.clone();
        let up = |events| async move {
            let qmp = self::control(&control, events, at).await?;
            let process_ms = millis(started);
            let root = match coming {
                Coming::Boot => None,
                Coming::Restored(restoring) => Some(restoring.load(&qmp).await?),
            };
            Ok((qmp, root, process_ms))
        };
        let (process, (qmp, root, process_ms)) = self.unless_it_ends(at, up).await?;
        process.greet(qmp, root, (started, at), process_ms).await
    }

    /// Waits for the guest's agent, which is told the root that it waits for, if it does. If that fails, the process is gone.
    async fn greet(
        self,
        qmp: Qmp,
        root: Option<Root>,
        (started, at): (Instant, Instant),
        process_ms: u64,
    ) -> Result<QemuMachine> {
        let control = self.control.clone();
        let left = move || at.saturating_duration_since(Instant::now());
        let path = if root.is_some() { BootPath::Warm } else { BootPath::Cold };
        let up = |_| async move {
            let agent = Agent::connect(&control.paths.agent, left()).await?;
            if let Some(root) = root {
                agent.clone().with_timeout(left()).mount_root(warm::told_now(root)).await?;
            }
            Ok((agent, millis(started)))
        };
        let (process, (agent, agent_ms)) = self.unless_it_ends(at, up).await?;
        let timing = BootTiming { path, process_ms, agent_ms };
        Ok(QemuMachine { process, qmp, agent, timing, shutting_down: tokio::sync::Mutex::new(()) })
    }

    /// Does `up` unless the process ends first. If that fails, the process is gone.
    async fn unless_it_ends<T, F: Future<Output = Result<T>>>(
        mut self,
        at: Instant,
        up: impl FnOnce(Option<EventsFor>) -> F,
    ) -> Result<(Process, T)> {
        let control = self.control.clone();
        let up = up(self.events.take());
        let result = tokio::select! {
            reason = control.exit.wait() => Err(control.start_failed(&reason)),
            up = up => up,
        };
        match result {
            Ok(up) => Ok((self, up)),
            Err(error) => {
                let error = control.boot_failed(error, at).await;
                control.request_kill();
                let _ = tokio::time::timeout(KILL_PATIENCE, control.exit.wait()).await;
                Err(error)
            }
        }
    }
}

/// Who QEMU's events go to.
type EventsFor = tokio::sync::oneshot::Sender<mpsc::UnboundedReceiver<QmpEvent>>;

/// Takes control of a process.
async fn control(control: &Control, events: Option<EventsFor>, at: Instant) -> Result<Qmp> {
    let (qmp, received) = Qmp::connect(&control.paths.qmp, at.saturating_duration_since(Instant::now())).await?;
    if let Some(sender) = events {
        let _ = sender.send(received);
    }
    Ok(qmp)
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.control.left.load(Ordering::SeqCst) {
            self.control.request_kill();
        }
    }
}

struct QemuMachine {
    process: Process,
    qmp: Qmp,
    agent: Agent,
    timing: BootTiming,
    shutting_down: tokio::sync::Mutex<()>,
}

impl QemuMachine {
    async fn ended(&self, within: Duration) -> Option<ExitReason> {
        tokio::time::timeout(within, self.process.control.exit.wait()).await.ok()
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn agent(&self) -> Agent {
        self.agent.clone()
    }

    /// 1. The agent ends the guest's processes and leaves the disk clean: from here on nothing is lost.
    /// 2. The guest powers off by itself.
    /// 3. If not, QEMU is told to quit; the guest's disk is closed in order.
    /// 4. If not, it is killed.
    async fn shutdown(&self, deadline: Duration) -> Result<ExitReason> {
        let at = deadline_at(deadline);
        let left = || at.saturating_duration_since(Instant::now());
        let Ok(_turn) = tokio::time::timeout_at(at, self.shutting_down.lock()).await else {
            return self.kill().await;
        };
        if let Some(reason) = self.process.control.exit.told() {
            return Ok(reason);
        }
        let grace = (deadline / 4).min(Duration::from_secs(5));
        match tokio::time::timeout_at(at, self.agent.shutdown(grace)).await {
            Ok(Ok(())) => {
                self.process.control.flushed.store(true, Ordering::SeqCst);
                if let Some(reason) = self.ended(left().min(POWER_OFF_PATIENCE)).await {
                    return Ok(reason);
                }
            }
            Ok(Err(error)) => tracing::warn!(%error, "the guest does not shut down in order"),
            Err(_) => tracing::warn!("the guest does not shut down in time"),
        }
        if !left().is_zero() {
            if !self.process.control.flushed.load(Ordering::SeqCst) {
                self.process.control.killed.store(true, Ordering::SeqCst);
            }
            let _ = tokio::time::timeout_at(at, self.qmp.execute("quit", json!({}))).await;
            if let Some(reason) = self.ended(left().min(POWER_OFF_PATIENCE)).await {
                return Ok(reason);
            }
        }
        self.kill().await
    }

    async fn kill(&self) -> Result<ExitReason> {
        self.process.control.request_kill();
        self.ended(KILL_PATIENCE).await.ok_or_else(|| Error::io("kill QEMU", "the process does not go away"))
    }

    async fn hold(&self) -> Result<()> {
        self.qmp.execute("stop", json!({})).await.map(drop)
    }

    async fn devices(&self) -> Result<Bytes> {
        let run_dir = self.process.control.paths.qmp.parent().unwrap_or(Path::new("."));
        Ok(state::devices_of(&self.qmp, run_dir).await?.into())
    }

    async fn memory(&self) -> Result<GuestMemory> {
        state::memory_of(&self.qmp, self.process.control.id.pid).await
    }

    async fn go_on(&self) -> Result<()> {
        self.qmp.execute("cont", json!({})).await.map(drop)
    }

    async fn wait(&self) -> ExitReason {
        self.process.control.exit.wait().await
    }

    async fn leave(&self) {
        self.process.control.left.store(true, Ordering::SeqCst);
        self.agent.disconnect();
        self.qmp.close().await;
    }

    fn pid(&self) -> Option<i32> {
        Some(self.process.control.id.pid)
    }

    fn boot_timing(&self) -> BootTiming {
        self.timing
    }

    fn console(&self) -> &Path {
        &self.process.control.paths.console
    }
}
