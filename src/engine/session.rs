//! One run of a sandbox's machine: show it its disks, start, watch, end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use storage::{SnapshotId, Store};
use tokio::sync::watch;
use tokio::time::Instant;
use vmm::{Accel, Agent, BootPath, ExecRequest, ExitReason, GuestMemory, Identity, Loaded, Machine, MachineSpec};

use super::Shared;
use super::devices::Devices;
use super::error::{Error, Kind, Result};
use super::memory;
use super::records::{MemoryRecord, NetworkPolicy, SandboxRecord, slug};
use super::sandbox::Sandbox;
use super::survivor::{SessionRecord, read_state_key, write_deadline, write_state_key};
use super::template::{BootFiles, booted, spare};
use super::warm;

/// Between two attempts to end a session whose time is up.
const EXPIRY_PAUSE: Duration = Duration::from_millis(100);

/// How a session is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// The guest shuts down; killed if it does not in time.
    Orderly,
    /// At once.
    Kill,
    /// At once, its memory being kept.
    Kept,
    /// The machine is gone already.
    AlreadyGone,
}

/// A running machine and the disks it has.
pub(super) struct Session {
    /// Counts the sandbox's sessions, so that a late event is known to be late.
    pub(super) number: u64,
    pub(super) machine: Arc<dyn Machine>,
    devices: Devices,
    run_dir: PathBuf,
    deadline: watch::Sender<Option<Instant>>,
    pub(super) began: Instant,
    /// From the call to the agent's answer.
    pub(super) boot: Duration,
    /// Which way it came up.
    pub(super) way: BootPath,
    /// What runs the guest's instructions.
    pub(super) accel: Accel,
    /// What a machine must be to go on from this one's state; none if it has none for others.
    state_key: Option<String>,
    /// Memory that it shares with others that went on from the same.
    _shares: Option<Arc<GuestMemory>>,
}

/// How a session's machine came to run.
struct Started {
    machine: Arc<dyn Machine>,
    shares: Option<Arc<GuestMemory>>,
    /// It goes on from memory of an earlier moment.
    woken: bool,
    way: BootPath,
    /// What it could not go on from, and why.
    note: Option<String>,
}

impl Session {
    /// Starts a machine on the sandbox's disk: from its memory if that was kept. On failure nothing is left of it. What is
    /// told beside it is what it could not go on from.
    pub(super) async fn begin(
        sandbox: &Arc<Sandbox>,
        number: u64,
        pristine: Option<SnapshotId>,
    ) -> Result<(Session, Option<String>)> {
        let (shared, record) = (&sandbox.shared, &sandbox.record());
        let boot_files = shared.templates.boot_files().await?;
        let accel = shared.acceleration(&boot_files).await.accel;
        let _slot = shared.boots.acquire().await.map_err(|_| Error::internal("no machine can be started any more"))?;
        // The deadline of the session counts from here, not from when it waited for others.
        let began = Instant::now();

        let run_dir = shared.settings.run_root.join(&record.id);
        let timeout = record.timeout_ms.map(|ms| began + Duration::from_millis(ms));
        let mut devices = show(shared, record, (began, timeout), accel).await?;
        let spec = spec_of(shared, record, boot_files, &devices, accel);
        let state_key = state_key(shared, &spec, record.disk_size_bytes).await;
        if let (Some(template), Some(key)) = (pristine, &state_key)
            && booted::become_one(sandbox, template, key).await
        {
            // On another disk.
            hide(devices, &run_dir).await;
            devices = show(shared, &sandbox.record(), (began, timeout), accel).await?;
        }
        let wanted = pristine.map(|template| (template, spec.clone()));
        let started = async {
            write_state_key(&run_dir, state_key.as_deref())?;
            Session::start(sandbox, spec, state_key.as_deref()).await
        };
        let started = match started.await {
            Ok(started) => started,
            Err(error) => {
                hide(devices, &run_dir).await;
                return Err(error);
            }
        };
        let boot = began.elapsed();
        let mut session = Session::of(number, started.machine, devices, run_dir, (began, timeout), boot, accel);
        if let (Some((template, spec)), Some(key)) = (wanted, &state_key) {
            booted::want(shared, template, spec, key);
            spare::want(shared, template, record, key);
        }
        (session.state_key, session._shares) = (state_key, started.shares);
        session.way = started.way;
        if let Err(error) = session.settle(shared, record, started.woken).await {
            // The machine is up but not usable.
            session.discard(shared).await;
            return Err(error);
        }
        Ok((session, started.note))
    }

    /// Starts the machine: from the sandbox's memory, or, if there is none or it is of another machine, from its files.
    async fn start(sandbox: &Arc<Sandbox>, spec: MachineSpec, key: Option<&str>) -> Result<Started> {
        let shared = &sandbox.shared;
        let mut note = None;
        if let Some(memory) = sandbox.record().memory {
            if Some(memory.key.as_str()) == key {
                match Session::go_on(sandbox, spec.clone(), &memory).await {
                    // Nobody's work is in it.
                    Err(error) if memory.of_template && sandbox.record().memory.is_some() => {
                        tracing::warn!(sandbox = %sandbox.id(), %error, "it starts from its template's files");
                        booted::is_of_no_use(shared, &memory.content).await;
                        sandbox.forget_memory(false).await?;
                    }
                    done => return done,
                }
            } else {
                tracing::warn!(sandbox = %sandbox.id(), kept = memory.key, ?key, "the kept memory is of another machine");
                sandbox.forget_memory(false).await?;
                let told = "its memory was kept by another machine (its size, its network, its volumes, QEMU or miosa \
                            are others now), so what ran has ended; it started from its files";
                note = Some(told.to_owned());
            }
        }
        let machine = warm::start(shared, spec).await?;
        Ok(Started { way: machine.boot_timing().path, machine, shares: None, woken: false, note })
    }

    /// Starts the machine from the sandbox's memory, which is given up in between.
    async fn go_on(sandbox: &Arc<Sandbox>, spec: MachineSpec, memory: &MemoryRecord) -> Result<Started> {
        let (shared, id) = (&sandbox.shared, sandbox.id());
        let (loaded, shares) = load(shared, spec, memory).await.map_err(|error| {
            let hint =
                format!("without its memory it starts from its files: miosa sandbox resume {id} --without-memory");
            error.hint(hint)
        })?;
        sandbox.forget_memory(true).await?;
        let lost = |e: vmm::Error| Error::from(e).context("its memory is lost; its files are as it had flushed them");
        let machine = loaded.go_on().await.map_err(lost)?;
        let way = if memory.of_template { BootPath::Warm } else { BootPath::Memory };
        Ok(Started { machine, shares, way, woken: true, note: None })
    }

    /// Lets a machine that was started for nobody in particular go on as a sandbox's. On failure nothing is left of it.
    pub(super) async fn take(mut self, sandbox: &Arc<Sandbox>, number: u64) -> Result<Session> {
        let (shared, record) = (&sandbox.shared, &sandbox.record());
        let began = Instant::now();
        (self.number, self.began, self.way) = (number, began, BootPath::Warm);
        let taken = async {
            let timeout = record.timeout_ms.map(|ms| began + Duration::from_millis(ms));
            SessionRecord::new(began, &self.devices, self.accel)?.write(&self.run_dir, timeout)?;
            self.deadline.send_replace(timeout);
            self.machine.go_on().await?;
            self.boot = began.elapsed();
            self.settle(shared, record, true).await
        };
        if let Err(error) = taken.await {
            self.discard(shared).await;
            return Err(error);
        }
        Ok(self)
    }

    /// Ends a session that nobody has used.
    pub(super) async fn discard(self, shared: &Shared) {
        let run_dir = self.run_dir.clone();
        if let Err(error) = self.end(shared, Ending::Kill).await {
            tracing::error!(run_dir = %run_dir.display(), %error, "ending a session that could not be set up");
        }
    }

    pub(super) fn of(
        number: u64,
        machine: Arc<dyn Machine>,
        devices: Devices,
        run_dir: PathBuf,
        (began, deadline): (Instant, Option<Instant>),
        boot: Duration,
        accel: Accel,
    ) -> Session {
        let deadline = watch::Sender::new(deadline);
        let (state_key, way) = (read_state_key(&run_dir), machine.boot_timing().path);
        Session { number, machine, devices, run_dir, deadline, began, boot, way, accel, state_key, _shares: None }
    }

    /// What a machine must be to go on from this one's state; none if it has none for others.
    pub(super) fn state_key(&self) -> Option<String> {
        self.state_key.clone()
    }

    /// Gives the guest what makes it this sandbox and no other. One that was `woken` takes itself for what it was.
    pub(super) async fn settle(&self, shared: &Shared, record: &SandboxRecord, woken: bool) -> Result<()> {
        let agent = self.machine.agent();
        let identity = identity(&record.machine_id, slug(&record.name), Some(mac_of(&record.machine_id)), woken);
        let found = within(shared.settings.agent_deadline, "giving the guest its identity", async {
            Ok(agent.identify(identity).await?)
        })
        .await?;
        for mount in self.devices.mounts() {
            let what = format!("mounting volume {} at {}", mount.serial, mount.path);
            within(shared.settings.agent_deadline, &what, async { Ok(agent.mount(mount).await?) })
                .await
                .map_err(|e| e.context(&what).hint(format!("detach it: miosa volume detach VOLUME {}", record.id)))?;
        }
        within(shared.settings.agent_deadline, "giving the guest its files", shared.settings.guest.apply(&agent))
            .await?;
        if found.host_keys_missing {
            // It takes a guest seconds; nobody is to wait for it. Cut off, it is done in the next session.
            tokio::spawn(make_host_keys(agent, record.id.clone()));
        }
        Ok(())
    }

    /// When the session's time is up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        *self.deadline.borrow()
    }

    /// Moves that.
    pub(super) fn set_deadline(&self, deadline: Option<Instant>) {
        if let Err(error) = write_deadline(&self.run_dir, deadline) {
            tracing::warn!(%error, "the next daemon would not know of a session's new end");
        }
        self.deadline.send_replace(deadline);
    }

    /// Whether the machine goes on if the daemon ends.
    pub(super) fn outlives_the_daemon(&self) -> bool {
        self.devices.outlive_their_server()
    }

    /// Whether the machine has its disks open.
    pub(super) fn is_connected(&self) -> bool {
        self.devices.are_connected()
    }

    /// Lets go of the machine, which waits for its disks until the next daemon shows them again. What it was told is
    /// written is made durable.
    pub(super) async fn leave(self) -> Result<()> {
        self.machine.leave().await;
        self.devices.withdraw().await
    }

    /// A client of the guest's agent.
    pub(super) fn agent(&self) -> Agent {
        self.machine.agent()
    }

    /// Watches over the session until it ends: its timeouts, and a machine that ends by itself.
    pub(super) fn supervise(&self, sandbox: Arc<Sandbox>) {
        let (number, machine, mut deadline) = (self.number, self.machine.clone(), self.deadline.subscribe());
        tokio::spawn(async move {
            // `wait` alone keeps the machine's handle; it resolves however the machine ends, so this task ends too.
            loop {
                let limits = [*deadline.borrow_and_update(), sandbox.idle_at()];
                let due = limits.into_iter().flatten().min();
                tokio::select! {
                    how = machine.wait() => {
                        sandbox.machine_lost(number, how).await;
                        return;
                    }
                    () = sleep_until(due) => {
                        sandbox.expired(number).await;
                        // It has ended, then the sender is gone; or was extended or used meanwhile. Should ending it have
                        // failed, it is tried again.
                        if deadline.has_changed().is_err() {
                            return;
                        }
                        tokio::time::sleep(EXPIRY_PAUSE).await;
                    }
                    () = sandbox.use_ended() => {}
                    changed = deadline.changed() => {
                        if changed.is_err() {
                            return;
                        }
                    }
                }
            }
        });
    }

    /// Ends the machine, then makes all that it wrote durable. `Ok(Some)` says what went wrong in the guest; an error,
    /// that the disk may not have everything.
    pub(super) async fn end(self, shared: &Shared, how: Ending) -> Result<Option<String>> {
        let reason = match how {
            Ending::Orderly => self.machine.shutdown(shared.settings.stop_deadline).await,
            Ending::Kill | Ending::Kept => self.machine.kill().await,
            Ending::AlreadyGone => Ok(self.machine.wait().await),
        };
        let trouble = match (how, reason) {
            (_, Err(error)) => Some(format!("the machine did not end: {error}")),
            (Ending::Kill | Ending::Kept, Ok(_)) | (_, Ok(ExitReason::Shutdown)) => None,
            (Ending::Orderly, Ok(ExitReason::Killed)) => Some(format!(
                "the guest did not shut down within {} s and was killed; what it had not flushed is lost",
                shared.settings.stop_deadline.as_secs()
            )),
            (_, Ok(other)) => describe_loss(&other),
        };
        self.devices.withdraw().await?;
        let _ = tokio::task::spawn_blocking(move || remove_run_dir(&self.run_dir)).await;
        Ok(trouble)
    }
}

/// What to tell about a machine that ended by itself; nothing if the guest powered off in order.
pub(super) fn describe_loss(how: &ExitReason) -> Option<String> {
    match how {
        ExitReason::Shutdown => None,
        ExitReason::Killed => Some("the machine was killed; what the guest had flushed is kept".to_owned()),
        ExitReason::GuestReset => Some("the guest crashed or rebooted; what it had flushed is kept".to_owned()),
        ExitReason::Failed { message } => {
            Some(format!("the machine ended by itself ({message}); what the guest had flushed is kept"))
        }
    }
}

/// Shows a sandbox's disks to the machine of a session, which is noted in its run directory.
pub(super) async fn show(
    shared: &Arc<Shared>,
    record: &SandboxRecord,
    (began, timeout): (Instant, Option<Instant>),
    accel: Accel,
) -> Result<Devices> {
    let (id, dir, front) = (record.id.clone(), shared.settings.run_root.join(&record.id), shared.disks.clone());
    let (root, volumes) = (record.disk, shared.volumes.of(&record.id));
    let show = move |store: &Store| {
        private_dir(&dir)
            .map_err(|e| Error::internal(format!("could not make the directory {}: {e}", dir.display())))?;
        let shown = Devices::show(store, &*front, (&id, &dir), root, volumes).and_then(|devices| {
            match SessionRecord::new(began, &devices, accel).and_then(|r| r.write(&dir, timeout)) {
                Ok(()) => Ok(devices),
                Err(error) => {
                    devices.detach();
                    Err(error)
                }
            }
        });
        shown.inspect_err(|_| remove_run_dir(&dir))
    };
    shared.with_store(show).await
}

/// What a sandbox's machine is.
pub(super) fn spec_of(
    shared: &Shared,
    record: &SandboxRecord,
    boot_files: BootFiles,
    devices: &Devices,
    accel: Accel,
) -> MachineSpec {
    MachineSpec {
        id: record.id.clone(),
        run_dir: shared.settings.run_root.join(&record.id),
        cpus: record.cpus,
        memory_mib: u32::try_from(record.memory_mib).unwrap_or(u32::MAX),
        kernel: boot_files.kernel,
        initramfs: boot_files.initramfs,
        disk: devices.root(),
        volumes: devices.volumes(),
        accel,
        hostname: slug(&record.name),
        network: match record.network_policy {
            NetworkPolicy::Allow => shared.settings.network,
            NetworkPolicy::DenyAll => vmm::Network::None,
        },
        mac: mac_of(&record.machine_id),
        kernel_args: shared.settings.kernel_args.clone(),
        warm: None,
    }
}

/// What a machine must be to go on from the state of such a one; none if its memory cannot be kept.
pub(super) async fn state_key(shared: &Shared, spec: &MachineSpec, disk_bytes: u64) -> Option<String> {
    match shared.vmm.state_key(spec).await {
        Ok(key) => Some(memory::key(&key, disk_bytes)),
        Err(error) => {
            tracing::debug!(sandbox = %spec.id, %error, "the machine's memory cannot be kept");
            None
        }
    }
}

/// A machine with this memory, whose guest does not run yet, and the memory if it shares it with others.
pub(super) async fn load(
    shared: &Arc<Shared>,
    spec: MachineSpec,
    memory: &MemoryRecord,
) -> Result<(Box<dyn Loaded>, Option<Arc<GuestMemory>>)> {
    // Who shares it cannot be kept with memory; of a template that would be every new sandbox.
    let maps = !spec.disk.outlives_its_server();
    let shares = maps
        && !memory.of_template
        && (shared.registry.have_memory(&memory.content) > 1 || shared.memories.are_known(memory).await);
    let state = match maps && !shares {
        true => memory::read_alone(shared, memory).await?,
        false => shared.memories.get(shared, memory).await?,
    };
    let shares = shares.then(|| state.memory.clone());
    Ok((shared.vmm.load(spec, state, shared.settings.boot_deadline).await?, shares))
}

/// Takes back what [`show`] did, for disks that no machine writes to any more.
pub(super) async fn hide(devices: Devices, run_dir: &Path) {
    let dir = run_dir.to_owned();
    let hidden = tokio::task::spawn_blocking(move || {
        devices.detach();
        remove_run_dir(&dir);
    });
    if let Err(error) = hidden.await {
        tracing::error!(%error, "detaching disks did not end");
    }
}

fn remove_run_dir(dir: &Path) {
    if let Err(error) = std::fs::remove_dir_all(dir)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::debug!(dir = %dir.display(), %error, "the session's directory stays until the next start");
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Runs a call to the guest that should be quick.
pub(super) async fn within<T>(deadline: Duration, what: &str, call: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(deadline, call).await {
        Ok(done) => done,
        Err(_) => Err(Error::new(Kind::AgentTimeout, format!("{what} took longer than {} s", deadline.as_secs()))
            .hint("the guest is overloaded or stuck; try again, or stop and resume the sandbox")),
    }
}

/// What makes a guest one sandbox, now.
pub(super) fn identity(machine_id: &str, hostname: String, mac: Option<[u8; 6]>, woken: bool) -> Identity {
    Identity {
        machine_id: machine_id.to_owned(),
        hostname,
        entropy: rand::random::<[u8; 32]>().to_vec(),
        unix_nanos: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64,
        mac,
        woken,
    }
}

/// A hardware address of a sandbox's own, the same in each of its sessions: locally administered, of one machine.
fn mac_of(machine_id: &str) -> [u8; 6] {
    let id = u128::from_str_radix(machine_id, 16).unwrap_or_default().to_be_bytes();
    [0x02, id[0], id[1], id[2], id[3], id[4]]
}

/// Has the guest make ssh host keys of its own.
async fn make_host_keys(agent: Agent, id: String) {
    let request = ExecRequest { argv: vec!["ssh-keygen".into(), "-A".into()], ..ExecRequest::default() };
    match agent.run(request, 4_096).await {
        Ok(done) if done.status.code == Some(0) => tracing::debug!(sandbox = %id, "new ssh host keys"),
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            tracing::warn!(sandbox = %id, %said, "ssh host keys could not be made");
        }
        Err(error) => tracing::debug!(sandbox = %id, %error, "making ssh host keys was cut off"),
    }
}

/// Makes a directory that nobody else can look into.
pub(crate) fn private_dir(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

impl From<vmm::Error> for Error {
    fn from(error: vmm::Error) -> Self {
        use vmm::{ErrorKind, GuestErrorKind};
        let kind = match error.kind {
            ErrorKind::QemuMissing | ErrorKind::ToolMissing => Kind::MachineUnavailable,
            ErrorKind::Invalid => Kind::InvalidInput,
            ErrorKind::StartFailed | ErrorKind::BootTimeout | ErrorKind::Qmp => Kind::BootFailed,
            ErrorKind::AgentTimeout | ErrorKind::Guest(GuestErrorKind::Timeout) => Kind::AgentTimeout,
            ErrorKind::Guest(GuestErrorKind::Refused | GuestErrorKind::Reset) => Kind::PortClosed,
            ErrorKind::AgentLost | ErrorKind::Guest(GuestErrorKind::Cancelled) => Kind::SessionEnded,
            ErrorKind::Guest(GuestErrorKind::Busy) => Kind::Busy,
            ErrorKind::Guest(GuestErrorKind::NotFound) => Kind::FileNotFound,
            ErrorKind::Guest(GuestErrorKind::NoSpace) => Kind::GuestDiskFull,
            ErrorKind::Guest(_) => Kind::GuestFile,
            ErrorKind::Image => Kind::ImageMissing,
            ErrorKind::Io => Kind::Internal,
        };
        let converted = Error::new(kind, error.message);
        match error.hint {
            Some(hint) => converted.hint(hint),
            None if kind == Kind::GuestDiskFull => {
                converted.hint("free space in the guest, or make a sandbox with a larger disk: --disk SIZE")
            }
            None if kind == Kind::SessionEnded => {
                converted.hint("the sandbox was stopped, or its machine ended; the next call starts a new session")
            }
            None => converted,
        }
    }
}
