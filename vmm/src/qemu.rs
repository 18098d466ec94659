//! Machines as QEMU processes.
//!
//! Each machine has three tasks: one keeps the console, one QEMU's complaints, and one, the *watcher*, owns the process,
//! kills it when told, and says how it ended. Everybody else only holds the means to tell it.

mod command;
mod console;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::machine::{Exit, deadline_at};
use crate::process::{ProcessId, RECORD, RUN_DIR_VARIABLE};
use crate::qmp::{Qmp, QmpEvent};
use crate::{Agent, BootTiming, Error, ErrorKind, ExitReason, Machine, MachineSpec, Reaped, Result, Vmm};
use command::Paths;
use console::Tail;

/// Bytes of console shown when a boot fails.
const SHOWN: usize = 1500;
/// How long a guest that has flushed its disk may take to power off.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(3);
/// How long to wait, when a machine's sockets fail, whether its process is dying.
const DEATH_PATIENCE: Duration = Duration::from_secs(2);
/// How long a killed process may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(15);

/// Starts machines as QEMU processes.
#[derive(Clone, Debug)]
pub struct QemuVmm {
    program: PathBuf,
    machine: String,
}

impl Default for QemuVmm {
    fn default() -> QemuVmm {
        QemuVmm::new()
    }
}

impl QemuVmm {
    /// The `qemu-system-x86_64` in `PATH`, with machine type `q35`: under TCG its guests answer about 15 % sooner than
    /// those of `pc` (2.46 s against 2.93 s, means of four boots in turns, by `examples/boot.rs`).
    pub fn new() -> QemuVmm {
        QemuVmm { program: "qemu-system-x86_64".into(), machine: "q35".into() }
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

    fn spawn(&self, spec: &MachineSpec) -> Result<Process> {
        command::check(spec)?;
        let paths = Paths::of(&spec.run_dir);
        make_private(&spec.run_dir)?;
        for stale in [&paths.qmp, &paths.agent] {
            let _ = std::fs::remove_file(stale);
        }
        let mut command = Command::new(&self.program);
        command.args(command::arguments(spec, &self.machine)).env(RUN_DIR_VARIABLE, &spec.run_dir);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        // A signal for the daemon's terminal is not for its machines.
        command.process_group(0);
        let mut child = command.spawn().map_err(|e| self.missing(&e))?;
        let (console, complaints) = (Tail::default(), Tail::default());
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(console::record(stdout, console.clone(), Some(paths.console.clone())));
        }
        let stderr = child.stderr.take();
        let recorded = complaints.clone();
        let heard = tokio::spawn(async move {
            if let Some(stderr) = stderr {
                console::record(stderr, recorded, None).await;
            }
        });
        let id = child.id().and_then(|pid| ProcessId::of(pid as i32));
        if let Some(id) = id {
            id.write(&spec.run_dir)?;
        }
        let control = Arc::new(Control {
            id,
            kill: tokio::sync::Notify::new(),
            killed: AtomicBool::new(false),
            flushed: AtomicBool::new(false),
            exit: Exit::new(),
            console,
            complaints,
        });
        let (events, event_receiver) = tokio::sync::oneshot::channel();
        tokio::spawn(watch(child, control.clone(), event_receiver, heard, spec.run_dir.clone()));
        Ok(Process { control, paths, events: Some(events) })
    }
}

fn make_private(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)))
        .map_err(|e| Error::io(dir.display(), e))
}

#[async_trait]
impl Vmm for QemuVmm {
    async fn start(&self, spec: MachineSpec, deadline: Duration) -> Result<Arc<dyn Machine>> {
        let (started, at) = (Instant::now(), deadline_at(deadline));
        let mut process = self.spawn(&spec)?;
        let control = process.control.clone();
        let up = async {
            let (qmp, events) = Qmp::connect(&process.paths.qmp, at.saturating_duration_since(Instant::now())).await?;
            if let Some(sender) = process.events.take() {
                let _ = sender.send(events);
            }
            let process_ms = millis(started);
            let agent = Agent::connect(&process.paths.agent, at.saturating_duration_since(Instant::now())).await?;
            Ok((qmp, agent, BootTiming { process_ms, agent_ms: millis(started) }))
        };
        let result = tokio::select! {
            reason = control.exit.wait() => Err(control.start_failed(&reason)),
            up = up => up,
        };
        match result {
            Ok((qmp, agent, timing)) => {
                tracing::info!(machine = spec.id, pid = ?process.control.id, ms = timing.agent_ms, "machine is up");
                let shutting_down = tokio::sync::Mutex::new(());
                Ok(Arc::new(QemuMachine { process, qmp, agent, timing, shutting_down }))
            }
            Err(error) => {
                // The watcher need not wait for events that cannot come any more.
                drop(process.events.take());
                let error = control.boot_failed(error, at).await;
                control.request_kill();
                let _ = tokio::time::timeout(KILL_PATIENCE, control.exit.wait()).await;
                Err(error)
            }
        }
    }

    async fn reap_orphans(&self, run_root: &Path) -> Result<Vec<Reaped>> {
        let run_root = run_root.to_owned();
        tokio::task::spawn_blocking(move || crate::process::reap_orphans(&run_root))
            .await
            .map_err(|e| Error::io("reap orphans", e))?
    }

    async fn version(&self) -> Result<String> {
        let output = Command::new(&self.program).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
        match tokio::time::timeout(Duration::from_secs(10), output).await {
            Ok(Ok(output)) => Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned()),
            Ok(Err(error)) => Err(self.missing(&error)),
            Err(_) => Err(Error::new(ErrorKind::QemuMissing, format!("{} does not answer", self.program.display()))),
        }
    }
}

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

/// What the watcher and the machine's handles share.
#[derive(Debug)]
struct Control {
    id: Option<ProcessId>,
    kill: tokio::sync::Notify,
    /// We asked for its death.
    killed: AtomicBool,
    /// The guest said that its disk is flushed and clean.
    flushed: AtomicBool,
    exit: Exit,
    console: Tail,
    complaints: Tail,
}

impl Control {
    /// Kills the process now; the watcher reaps it. What has ended by itself keeps its own reason.
    fn request_kill(&self) {
        if self.exit.told().is_some() {
            return;
        }
        self.killed.store(true, Ordering::SeqCst);
        // At once, and not when the watcher gets to run: this is also what happens when handles are dropped.
        if let Some(id) = self.id {
            let _ = id.send_kill();
        }
        self.kill.notify_one();
    }

    fn start_failed(&self, reason: &ExitReason) -> Error {
        let said = self.complaints.text(SHOWN);
        let message = match (reason, said.is_empty()) {
            (_, false) => format!("QEMU ended during the start: {said}"),
            (ExitReason::Failed { message }, true) => format!("QEMU ended during the start: {message}"),
            (reason, true) => format!("the machine ended during its start ({reason:?}){}", self.console_end()),
        };
        Error::new(ErrorKind::StartFailed, message)
    }

    async fn boot_failed(&self, error: Error, at: Instant) -> Error {
        if error.kind == ErrorKind::StartFailed {
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
        match self.console.text(SHOWN) {
            text if text.is_empty() => "; its console is empty".into(),
            text => format!("; its console ends with:\n{text}"),
        }
    }
}

/// Owns the process until its end.
async fn watch(
    mut child: Child,
    control: Arc<Control>,
    events: tokio::sync::oneshot::Receiver<mpsc::UnboundedReceiver<QmpEvent>>,
    heard: tokio::task::JoinHandle<()>,
    run_dir: PathBuf,
) {
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            () = control.kill.notified() => {
                let _ = child.start_kill();
            }
        }
    };
    // The directory may already belong to the machine's next process: only its own record goes, and sockets stay until
    // the next start removes them.
    if ProcessId::read(&run_dir).is_ok_and(|record| record.is_some() && record == control.id) {
        let _ = std::fs::remove_file(run_dir.join(RECORD));
    }
    // The process is gone, so both of these end by themselves, unless somebody else holds its pipes.
    let said = async {
        let _ = heard.await;
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
        let status = status.map_or_else(|e| e.to_string(), |status| status.to_string());
        ExitReason::Failed { message: format!("{status} {}", control.complaints.text(SHOWN)).trim().to_owned() }
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

/// A started process; dropping it kills it.
struct Process {
    control: Arc<Control>,
    paths: Paths,
    /// Hands QEMU's events to the watcher.
    events: Option<tokio::sync::oneshot::Sender<mpsc::UnboundedReceiver<QmpEvent>>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.control.request_kill();
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

    async fn wait(&self) -> ExitReason {
        self.process.control.exit.wait().await
    }

    fn pid(&self) -> Option<i32> {
        self.process.control.id.map(|id| id.pid)
    }

    fn boot_timing(&self) -> BootTiming {
        self.timing
    }

    fn console_tail(&self, max_bytes: usize) -> String {
        self.process.control.console.text(max_bytes)
    }
}
