//! A stand-in for tests of what is built on machines: no virtual machine, but the real agent protocol and server, run
//! in this process against a directory that plays the guest's root file system.
//!
//! Programs are the host's own, started with a working directory inside that directory. The directory is
//! `root/<machine id>`: it outlives the machine, as a disk would. A volume is the directory `root/volumes/<serial>`, to which
//! a mount is a link. What should go wrong is scripted with [`Script`].

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use miosa_agent::server::{Children, Server, System};
use miosa_agent::wire::{AgentError, ErrorKind as GuestErrorKind, GuestInfo, Mount, Root};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::console;
use crate::machine::{Exit, Loaded, MachineState};
use crate::{
    Accel, Acceleration, Agent, BootPath, BootTiming, Error, ErrorKind, ExitReason, GuestMemory, Machine, MachineSpec,
    Reaped, Result, Vmm, WarmKey,
};

/// What one start of a fake machine does.
#[derive(Clone, Debug, Default)]
pub struct Script {
    /// The start fails with this.
    pub fail_start: Option<Error>,
    /// The guest never answers: the start ends with `BootTimeout`.
    pub hang_at_boot: bool,
    /// The boot takes so long.
    pub boot_delay: Duration,
    /// The machine dies so long after its start.
    pub die_after: Option<Duration>,
    /// Freezing fails with this message.
    pub fail_freeze: Option<String>,
    /// The machine's state cannot be had, because of this.
    pub fail_devices: Option<Error>,
    /// Mounting a volume fails with this message.
    pub fail_mount: Option<String>,
    /// The agent does not go through with a shutdown: only killing helps.
    pub hang_at_shutdown: bool,
}

/// A [`Vmm`] whose machines are threads of this process. An engine that is opened with the `FakeVmm` of another, after that
/// one left its machines or as if it had been killed, can adopt them.
pub struct FakeVmm {
    root: PathBuf,
    state: Arc<Mutex<State>>,
}

/// Is told of each step of each machine before it happens. It may block: then the step does not happen, as if whoever
/// wanted it had died.
pub type StepHook = Arc<dyn Fn(&'static str) + Send + Sync>;

type SharedHook = Arc<Mutex<Option<StepHook>>>;

#[derive(Default)]
struct State {
    hook: SharedHook,
    scripts: VecDeque<Script>,
    machines: HashMap<String, Weak<FakeMachine>>,
    /// Those that run, or did.
    guests: HashMap<String, Arc<FakeGuest>>,
    starts: u64,
    kept: u64,
    fail_warm: Option<Error>,
    installation: u32,
}

/// The one file of a kept state.
const STATE: &str = "fake-state";

impl FakeVmm {
    /// Machines whose root file systems are directories under `root`.
    pub fn new(root: impl Into<PathBuf>) -> FakeVmm {
        FakeVmm { root: root.into(), state: Arc::default() }
    }

    /// What the next start without a script of its own does; scripts are used up in order.
    pub fn script(&self, script: Script) {
        self.state.lock().scripts.push_back(script);
    }

    /// Has the steps of all machines told from now on: `start`, `greet`, `clock`, `mount`, `freeze`, `thaw`, `shutdown`,
    /// `hold`, `devices`, `load`, `go on`, and `warm` when a state is to be kept.
    pub fn on_step(&self, hook: StepHook) {
        *self.state.lock().hook.lock() = Some(hook);
    }

    /// The directory that is the root file system of the machine with this id.
    pub fn root_of(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// How often a start was tried.
    pub fn starts(&self) -> u64 {
        self.state.lock().starts
    }

    /// How often a state was kept.
    pub fn kept(&self) -> u64 {
        self.state.lock().kept
    }

    /// Keeping a state fails with this from now on.
    pub fn fail_warm(&self, error: Option<Error>) {
        self.state.lock().fail_warm = error;
    }

    /// States that were kept before are of no use any more, as with another kernel.
    pub fn install_anew(&self) {
        self.state.lock().installation += 1;
    }

    /// The running machine with this id.
    pub fn machine(&self, id: &str) -> Option<Arc<FakeMachine>> {
        self.state.lock().machines.get(id).and_then(Weak::upgrade).filter(|machine| machine.guest.exit.told().is_none())
    }
}

#[async_trait]
impl Vmm for FakeVmm {
    async fn start(&self, spec: MachineSpec, deadline: Duration) -> Result<Arc<dyn Machine>> {
        let started = Instant::now();
        let (script, hook) = self.next_start();
        step(&hook, "start").await;
        if let Some(error) = script.fail_start {
            return Err(error);
        }
        if script.hang_at_boot || script.boot_delay > deadline {
            tokio::time::sleep(deadline).await;
            return Err(boot_timeout());
        }
        tokio::time::sleep(script.boot_delay).await;
        let path = match &spec.warm {
            Some(dir) => {
                let key = self.warm_key(&spec).await?;
                let state = std::fs::read_to_string(dir.join(STATE)).map_err(|e| Error::io(dir.display(), e))?;
                if state != format!("{}-{}", key.base, key.shape) {
                    return Err(Error::new(ErrorKind::Invalid, "the kept state is of another fake machine"));
                }
                BootPath::Warm
            }
            None => BootPath::Cold,
        };

        let memory = GuestMemory::new(u64::from(spec.memory_mib) << 20).map_err(|e| Error::io("fake memory", e))?;
        let seen = match path {
            BootPath::Warm => Seen::default(),
            _ => Seen { has_root: true, hostname: spec.hostname.clone(), ..Seen::default() },
        };
        let guest = self.guest(&spec, &script, path, memory, seen)?;
        step(&hook, "greet").await;
        let machine = FakeMachine::take(&guest, started, deadline).await?;
        if path == BootPath::Warm {
            let hostname = spec.hostname.clone();
            let root = Root { disk: "disk".into(), hostname, network: false, entropy: vec![1; 64], unix_nanos: 1 };
            machine.agent.mount_root(root).await?;
        }
        if let Some(after) = script.die_after {
            let guest = guest.clone();
            tokio::spawn(async move {
                tokio::time::sleep(after).await;
                guest.end(ExitReason::Failed { message: "scripted".into() });
            });
        }
        remember(&self.state, spec.id, &machine);
        Ok(machine)
    }

    async fn state_key(&self, spec: &MachineSpec) -> Result<String> {
        if !spec.volumes.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "a fake machine with volumes has no state of its own"));
        }
        let WarmKey { base, shape } = self.warm_key(spec).await?;
        Ok(blake3::hash(format!("{base} {shape} {:?}", spec.network).as_bytes()).to_hex().chars().take(16).collect())
    }

    async fn load(&self, spec: MachineSpec, state: MachineState, deadline: Duration) -> Result<Box<dyn Loaded>> {
        let started = Instant::now();
        let (script, hook) = self.next_start();
        step(&hook, "load").await;
        if let Some(error) = script.fail_start {
            return Err(error);
        }
        let seen: Seen = serde_json::from_slice(&state.devices)
            .map_err(|e| Error::new(ErrorKind::StartFailed, format!("no fake machine's state: {e}")))?;
        if state.memory.bytes() != u64::from(spec.memory_mib) << 20 {
            return Err(Error::new(ErrorKind::Invalid, "the state is of another size"));
        }
        let memory = GuestMemory::new(state.memory.bytes())
            .and_then(|memory| state.memory.copy_to(&memory, true).map(|()| memory))
            .map_err(|e| Error::io("fake memory", e))?;
        let guest = self.guest(&spec, &script, BootPath::Memory, memory, seen)?;
        Ok(Box::new(FakeLoaded { guest: Some(guest), id: spec.id, state: self.state.clone(), hook, started, deadline }))
    }

    async fn warm_key(&self, spec: &MachineSpec) -> Result<WarmKey> {
        let base = format!("{:016x}", self.state.lock().installation);
        let made_of = format!("{} {} {:?}", spec.cpus, spec.memory_mib, spec.kernel_args);
        Ok(WarmKey { base, shape: blake3::hash(made_of.as_bytes()).to_hex().chars().take(16).collect() })
    }

    async fn warm(&self, spec: &MachineSpec, to: &Path, _: Duration) -> Result<()> {
        let hook = self.state.lock().hook.clone();
        step(&hook, "warm").await;
        if let Some(error) = self.state.lock().fail_warm.clone() {
            return Err(error);
        }
        let WarmKey { base, shape } = self.warm_key(spec).await?;
        let io = |e| Error::io(to.display(), e);
        std::fs::create_dir_all(to).map_err(io)?;
        std::fs::write(to.join(STATE), format!("{base}-{shape}")).map_err(io)?;
        self.state.lock().kept += 1;
        Ok(())
    }

    async fn survivors(&self, run_root: &Path) -> Result<Vec<PathBuf>> {
        let state = self.state.lock();
        let live = state.guests.iter().filter(|(_, guest)| guest.exit.told().is_none());
        Ok(live.map(|(id, _)| run_root.join(id)).collect())
    }

    async fn adopt(&self, run_dir: &Path, deadline: Duration) -> Result<Option<Arc<dyn Machine>>> {
        let id = run_dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let hook = self.state.lock().hook.clone();
        step(&hook, "adopt").await;
        let guest = self.state.lock().guests.get(&id).cloned().filter(|guest| guest.exit.told().is_none());
        let Some(guest) = guest else { return Ok(None) };
        // A real guest's one server does this when it is greeted.
        {
            let mut seen = guest.seen.lock();
            (seen.frozen, seen.held) = (false, false);
        }
        let machine = FakeMachine::take(&guest, Instant::now(), deadline).await?;
        self.state.lock().machines.insert(id, Arc::downgrade(&machine));
        Ok(Some(machine))
    }

    async fn reap_orphans(&self, run_root: &Path, keep: &[PathBuf]) -> Result<Vec<Reaped>> {
        let guests: Vec<_> = self.state.lock().guests.iter().map(|(id, guest)| (id.clone(), guest.clone())).collect();
        for (id, guest) in guests {
            if !keep.contains(&run_root.join(id)) {
                guest.end(ExitReason::Failed { message: "reaped".into() });
            }
        }
        crate::process::reap_orphans(run_root, keep)
    }

    async fn probe_kvm(&self, _: &Path, _: &Path, _: &Path, _: &Path) -> Acceleration {
        Acceleration { accel: Accel::Tcg, reason: "machines are fake".into() }
    }

    async fn version(&self) -> Result<String> {
        Ok("fake".into())
    }
}

impl FakeVmm {
    /// What the next start does, and who is told.
    fn next_start(&self) -> (Script, SharedHook) {
        let mut state = self.state.lock();
        state.starts += 1;
        (state.scripts.pop_front().unwrap_or_default(), state.hook.clone())
    }

    /// A guest that runs.
    fn guest(
        &self,
        spec: &MachineSpec,
        script: &Script,
        path: BootPath,
        memory: GuestMemory,
        seen: Seen,
    ) -> Result<Arc<FakeGuest>> {
        let root = self.root_of(&spec.id);
        std::fs::create_dir_all(root.join("workspace")).map_err(|e| Error::io(root.display(), e))?;
        let console = spec.run_dir.join("console.log");
        // As firmware begins, and then lines. Where there is no such directory there is no console.
        if let Ok(mut file) = console::create(&console) {
            let _ = file.write_all(b"\x1bc\x1b[?7l\x1b[2J\x1b[0mfake firmware\r\nfake guest\r\n");
        }
        let guest = Arc::new(FakeGuest {
            root,
            console,
            children: Children::of_process(),
            pipe: Mutex::default(),
            exit: Exit::new(),
            owner: AtomicU64::new(0),
            hook: self.state.lock().hook.clone(),
            fail_freeze: script.fail_freeze.clone(),
            fail_mount: script.fail_mount.clone(),
            fail_devices: script.fail_devices.clone(),
            volumes: self.root.join("volumes"),
            serials: spec.volumes.iter().map(|v| v.serial.clone()).collect(),
            hang_at_shutdown: script.hang_at_shutdown,
            path,
            memory,
            seen: Mutex::new(seen),
        });
        // Where a daemon that dies leaves a machine that it has not heard of.
        self.state.lock().guests.insert(spec.id.clone(), guest.clone());
        Ok(guest)
    }
}

fn remember(state: &Mutex<State>, id: String, machine: &Arc<FakeMachine>) {
    let mut state = state.lock();
    state.guests.retain(|_, guest| guest.exit.told().is_none());
    state.machines.insert(id, Arc::downgrade(machine));
}

/// A fake machine that has its state.
struct FakeLoaded {
    guest: Option<Arc<FakeGuest>>,
    id: String,
    state: Arc<Mutex<State>>,
    hook: SharedHook,
    started: Instant,
    deadline: Duration,
}

#[async_trait]
impl Loaded for FakeLoaded {
    async fn go_on(mut self: Box<Self>) -> Result<Arc<dyn Machine>> {
        step(&self.hook, "go on").await;
        let Some(guest) = self.guest.take() else { return Err(boot_timeout()) };
        guest.seen.lock().held = false;
        let machine = FakeMachine::take(&guest, self.started, self.deadline).await?;
        remember(&self.state, self.id.clone(), &machine);
        Ok(machine)
    }
}

impl Drop for FakeLoaded {
    fn drop(&mut self) {
        if let Some(guest) = self.guest.take() {
            guest.end(ExitReason::Killed);
        }
    }
}

/// Tells of a step, where that may block.
async fn step(hook: &SharedHook, name: &'static str) {
    let hook = hook.lock().clone();
    if let Some(hook) = hook {
        let _ = tokio::task::spawn_blocking(move || hook(name)).await;
    }
}

fn boot_timeout() -> Error {
    Error::new(ErrorKind::BootTimeout, "the fake guest did not answer in time")
}

/// A fake machine; tests may make it die and look at what its guest was told.
pub struct FakeMachine {
    agent: Agent,
    guest: Arc<FakeGuest>,
    /// Which of the guest's owners this is: only the last one's word counts.
    owner: u64,
    timing: BootTiming,
}

impl FakeMachine {
    /// Takes the guest over from whoever had it.
    async fn take(guest: &Arc<FakeGuest>, started: Instant, deadline: Duration) -> Result<Arc<FakeMachine>> {
        let failed = |e: std::io::Error| Error::new(ErrorKind::StartFailed, format!("fake machine: {e}"));
        let owner = guest.owner.fetch_add(1, Ordering::SeqCst) + 1;
        let (host, pipe) = UnixStream::pair().map_err(failed)?;
        let pipe = Arc::new(pipe);
        if let Some(before) = guest.pipe.lock().replace(pipe.clone()) {
            let _ = before.shutdown(std::net::Shutdown::Both);
        }
        let server = Server::new(guest.clone(), pipe.try_clone().map_err(failed)?).map_err(failed)?;
        let serve = move || server.serve(&*pipe, || true);
        std::thread::Builder::new().name("fake-guest".into()).spawn(serve).map_err(failed)?;

        host.set_nonblocking(true).map_err(failed)?;
        let host = tokio::net::UnixStream::from_std(host).map_err(failed)?;
        let agent = Agent::over(host, deadline).await.map_err(|_| boot_timeout())?;
        let agent_ms = started.elapsed().as_millis() as u64;
        let timing = BootTiming { path: guest.path, process_ms: 0, agent_ms };
        Ok(Arc::new(FakeMachine { agent, guest: guest.clone(), owner, timing }))
    }

    fn is_owner(&self) -> bool {
        self.guest.owner.load(Ordering::SeqCst) == self.owner
    }

    /// The machine's process ends by itself.
    pub fn die(&self, why: &str) {
        self.guest.end(ExitReason::Failed { message: why.into() });
    }

    /// Whether the file system is frozen now.
    pub fn is_frozen(&self) -> bool {
        self.guest.seen.lock().frozen
    }

    /// Whether its processors stand still.
    pub fn is_held(&self) -> bool {
        self.guest.seen.lock().held
    }

    /// What is in its guest's memory, which a guest of its own would use: what is written here is what goes on.
    pub fn guest_memory(&self) -> &GuestMemory {
        &self.guest.memory
    }

    /// How often it was frozen.
    pub fn freezes(&self) -> u64 {
        self.guest.seen.lock().freezes
    }

    /// The host name it was given last.
    pub fn hostname(&self) -> String {
        self.guest.seen.lock().hostname.clone()
    }

    /// What was last mixed into its random numbers.
    pub fn entropy(&self) -> Vec<u8> {
        self.guest.seen.lock().entropy.clone()
    }

    /// The hardware address it was given last.
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.guest.seen.lock().mac
    }

    /// How often it was told that it was woken, and so ended its connections.
    pub fn woken(&self) -> u64 {
        self.guest.seen.lock().woken
    }

    /// What it has mounted besides its root.
    pub fn mounts(&self) -> Vec<Mount> {
        self.guest.seen.lock().mounts.clone()
    }

    /// The time its clock was set to last, nanoseconds since the Unix epoch.
    pub fn clock(&self) -> Option<u64> {
        self.guest.seen.lock().clock
    }
}

#[async_trait]
impl Machine for FakeMachine {
    fn agent(&self) -> Agent {
        self.agent.clone()
    }

    async fn shutdown(&self, deadline: Duration) -> Result<ExitReason> {
        let asked = async {
            let _ = self.agent.shutdown(deadline / 2).await;
            self.guest.exit.wait().await
        };
        match tokio::time::timeout(deadline, asked).await {
            Ok(reason) => Ok(reason),
            Err(_) => self.kill().await,
        }
    }

    async fn kill(&self) -> Result<ExitReason> {
        if self.is_owner() {
            self.guest.end(ExitReason::Killed);
        }
        Ok(self.guest.exit.wait().await)
    }

    async fn hold(&self) -> Result<()> {
        step(&self.guest.hook, "hold").await;
        self.guest.seen.lock().held = true;
        Ok(())
    }

    async fn devices(&self) -> Result<Bytes> {
        step(&self.guest.hook, "devices").await;
        if let Some(error) = &self.guest.fail_devices {
            return Err(error.clone());
        }
        let seen = self.guest.seen.lock();
        let told = serde_json::to_vec(&*seen).map_err(|e| Error::io("a fake machine's state", e))?;
        if seen.held { Ok(told.into()) } else { Err(Error::new(ErrorKind::Qmp, "a machine that runs has no state")) }
    }

    async fn memory(&self) -> Result<GuestMemory> {
        let shared = self.guest.memory.file().try_clone().and_then(GuestMemory::of_file);
        shared.map_err(|e| Error::io("fake memory", e))
    }

    async fn go_on(&self) -> Result<()> {
        step(&self.guest.hook, "go on").await;
        self.guest.seen.lock().held = false;
        Ok(())
    }

    async fn wait(&self) -> ExitReason {
        let reason = self.guest.exit.wait().await;
        if !self.is_owner() {
            // Whoever asks is taken for dead, and the dead hear nothing.
            std::future::pending::<()>().await;
        }
        reason
    }

    async fn leave(&self) {
        let _ = self.guest.owner.compare_exchange(self.owner, self.owner + 1, Ordering::SeqCst, Ordering::SeqCst);
        self.agent.disconnect();
    }

    fn pid(&self) -> Option<i32> {
        None
    }

    fn boot_timing(&self) -> BootTiming {
        self.timing
    }

    fn console(&self) -> &Path {
        &self.guest.console
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        if self.is_owner() {
            self.guest.end(ExitReason::Killed);
        }
    }
}

struct FakeGuest {
    root: PathBuf,
    console: PathBuf,
    children: Children,
    pipe: Mutex<Option<Arc<UnixStream>>>,
    exit: Exit,
    owner: AtomicU64,
    hook: SharedHook,
    fail_freeze: Option<String>,
    fail_mount: Option<String>,
    fail_devices: Option<Error>,
    hang_at_shutdown: bool,
    path: BootPath,
    memory: GuestMemory,
    /// Where the volumes of all guests are.
    volumes: PathBuf,
    /// Those of this one.
    serials: Vec<String>,
    seen: Mutex<Seen>,
}

#[derive(Default, Serialize, Deserialize)]
struct Seen {
    has_root: bool,
    frozen: bool,
    held: bool,
    freezes: u64,
    hostname: String,
    clock: Option<u64>,
    entropy: Vec<u8>,
    mac: Option<[u8; 6]>,
    woken: u64,
    mounts: Vec<Mount>,
}

impl FakeGuest {
    fn step(&self, name: &'static str) {
        let hook = self.hook.lock().clone();
        if let Some(hook) = hook {
            hook(name);
        }
    }

    fn end(&self, reason: ExitReason) {
        // Once: the sandbox's next guest may be there already.
        for mount in std::mem::take(&mut self.seen.lock().mounts).iter().rev() {
            let _ = self.path(&mount.path).map(std::fs::remove_file);
        }
        self.exit.tell(reason);
        if let Some(pipe) = self.pipe.lock().as_ref() {
            let _ = pipe.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl System for FakeGuest {
    fn path(&self, path: &str) -> Result<PathBuf, AgentError> {
        let invalid = || AgentError::new(GuestErrorKind::Invalid, format!("{path:?}: paths must be absolute"));
        let inside = Path::new(path).strip_prefix("/").map_err(|_| invalid())?;
        let plain = inside.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if plain && !path.contains('\0') { Ok(self.root.join(inside)) } else { Err(invalid()) }
    }

    fn children(&self) -> &Children {
        &self.children
    }

    fn info(&self) -> GuestInfo {
        GuestInfo { agent_version: env!("CARGO_PKG_VERSION").into(), kernel: "fake".into(), uptime_ms: 0 }
    }

    fn has_root(&self) -> bool {
        self.seen.lock().has_root
    }

    fn mount_root(&self, root: &Root) -> Result<(), AgentError> {
        let mut seen = self.seen.lock();
        (seen.has_root, seen.hostname) = (true, root.hostname.clone());
        Ok(())
    }

    fn mount(&self, wanted: &Mount) -> Result<(), AgentError> {
        if let Some(message) = &self.fail_mount {
            return Err(AgentError::new(GuestErrorKind::Io, message.clone()));
        }
        self.step("mount");
        if !self.serials.contains(&wanted.serial) {
            return Err(AgentError::new(GuestErrorKind::NotFound, format!("no disk {}", wanted.serial)));
        }
        let mut seen = self.seen.lock();
        if seen.mounts.contains(wanted) {
            return Ok(());
        }
        let (volume, path) = (self.volumes.join(&wanted.serial), self.path(&wanted.path)?);
        let linked = std::fs::create_dir_all(&volume).and_then(|()| {
            std::fs::create_dir_all(path.parent().unwrap_or(&self.root))?;
            // An empty directory is hidden by what is mounted there.
            let _ = std::fs::remove_dir(&path);
            std::os::unix::fs::symlink(&volume, &path)
        });
        linked.map_err(|e| AgentError::io(path.display(), &e))?;
        seen.mounts.push(wanted.clone());
        Ok(())
    }

    fn freeze(&self) -> Result<(), AgentError> {
        if let Some(message) = &self.fail_freeze {
            return Err(AgentError::new(GuestErrorKind::Io, message.clone()));
        }
        self.step("freeze");
        let mut seen = self.seen.lock();
        seen.frozen = true;
        seen.freezes += 1;
        Ok(())
    }

    fn thaw(&self) -> Result<(), AgentError> {
        self.step("thaw");
        self.seen.lock().frozen = false;
        Ok(())
    }

    fn set_clock(&self, unix_nanos: u64) -> Result<(), AgentError> {
        self.step("clock");
        self.seen.lock().clock = Some(unix_nanos);
        Ok(())
    }

    fn set_hostname(&self, name: &str) -> Result<(), AgentError> {
        self.seen.lock().hostname = name.to_owned();
        Ok(())
    }

    fn set_mac(&self, mac: [u8; 6]) -> Result<(), AgentError> {
        self.seen.lock().mac = Some(mac);
        Ok(())
    }

    fn end_connections(&self) {
        self.seen.lock().woken += 1;
    }

    fn add_entropy(&self, bytes: &[u8]) -> Result<(), AgentError> {
        self.seen.lock().entropy = bytes.to_vec();
        Ok(())
    }

    fn sync(&self) {}

    fn shutdown(&self, _grace: Duration) -> Result<(), AgentError> {
        self.step("shutdown");
        while self.hang_at_shutdown && self.exit.told().is_none() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn power_off(&self) {
        self.end(ExitReason::Shutdown);
    }

    fn log(&self, message: &str) {
        tracing::debug!(message, "fake guest");
    }
}
