//! What a machine is, and the two traits everything above works with.

mod exit;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::memory::GuestMemory;
use crate::{Agent, Result};
pub(crate) use exit::Exit;

/// Everything needed to start a machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Name of the machine; for logs and process names. Letters, digits, `-`, `_`, `.`; at most 64.
    pub id: String,
    /// A directory for this machine alone: sockets, console log, process record. Made if missing, mode 0700. Its
    /// path plus 12 bytes (22 where volumes have sockets in it) must fit a Unix socket address (107 bytes).
    pub run_dir: PathBuf,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Kernel image (bzImage).
    pub kernel: PathBuf,
    /// Initramfs made by [`crate::image::build_initramfs`].
    pub initramfs: PathBuf,
    /// The root disk: a whole ext4 file system without partitions. With volumes beside it, its serial number is `disk`.
    pub disk: DiskAttachment,
    /// Further disks, of the same kind each as the root disk's.
    pub volumes: Vec<VolumeDevice>,
    /// What runs the guest's instructions.
    pub accel: Accel,
    /// Host name in the guest.
    pub hostname: String,
    /// What the guest's network reaches.
    pub network: Network,
    /// Hardware address of its network device.
    pub mac: [u8; 6],
    /// Further words for the kernel's command line.
    pub kernel_args: Vec<String>,
    /// A directory with a state that [`Vmm::warm`] has kept of a machine of the same [`Vmm::warm_key`]: the machine starts
    /// from it instead of booting.
    pub warm: Option<PathBuf>,
}

/// A disk besides the root. The guest is told to mount it: [`Agent::mount`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDevice {
    /// The device's serial number: 1-20 letters, digits and `-`, unique in the machine. Of a vhost-user back end it is the
    /// back end that says it.
    pub serial: String,
    /// Where it comes from.
    pub disk: DiskAttachment,
    /// The device refuses writes.
    pub read_only: bool,
}

/// Where a machine's disk comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskAttachment {
    /// A vhost-user-blk back end that listens on this socket and serves at least 8 queues. The guest survives a restart
    /// of the back end.
    VhostUserBlk {
        /// The socket's path.
        socket: PathBuf,
    },
    /// A file with the disk's bytes; it is never probed for another format.
    RawFile {
        /// The file's path.
        path: PathBuf,
    },
}

impl DiskAttachment {
    /// Whether a guest can wait for its disk while whoever serves it is replaced. A file that goes away, as those of a
    /// FUSE mount do with their server, is an I/O error to the guest.
    pub fn outlives_its_server(&self) -> bool {
        matches!(self, DiskAttachment::VhostUserBlk { .. })
    }
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// QEMU's translator: works everywhere, several times slower.
    Tcg,
    /// The host kernel's KVM. Whether it works is only known by booting a guest.
    Kvm,
}

impl Accel {
    /// The name people know it by.
    pub fn name(self) -> &'static str {
        match self {
            Accel::Tcg => "tcg",
            Accel::Kvm => "kvm",
        }
    }
}

/// What machines are to run with, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acceleration {
    /// What was found or told.
    pub accel: Accel,
    /// Why, in a sentence for people.
    pub reason: String,
}

/// What a guest's network reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// Outgoing connections with the host's own address; `eth0` is 10.0.2.15/24. The guest also reaches what listens
    /// on the host's loopback, as 10.0.2.2: QEMU cannot forbid it, so services there must not trust their callers.
    User,
    /// No network device.
    None,
}

/// How a machine ended. The first reason seen is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off, or the orderly shutdown was asked for and went through: its disk is flushed.
    Shutdown,
    /// It was killed by us: nothing was flushed.
    Killed,
    /// The guest reset or panicked; it is not started again.
    GuestReset,
    /// The process ended by itself.
    Failed {
        /// What its process said last.
        message: String,
    },
}

/// Which way a machine came up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootPath {
    /// Its kernel booted.
    Cold,
    /// It went on from the kept state of one that had booted.
    Warm,
    /// It went on from its own state, or that of the one it is a fork of, with its programs.
    Memory,
}

impl BootPath {
    /// The name people know it by.
    pub fn name(self) -> &'static str {
        match self {
            BootPath::Cold => "cold",
            BootPath::Warm => "warm",
            BootPath::Memory => "memory",
        }
    }
}

/// What a kept state depends on: machines with the same key can start from the same one. Each half is a word of 16
/// hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WarmKey {
    /// What is the same for all machines of one installation: kernel, initramfs, VMM, host. States of another are of no use
    /// any more.
    pub base: String,
    /// What differs between machines: processors, memory, accelerator, kernel arguments. Not disks, network or names.
    pub shape: String,
}

/// A machine at one moment: what its guest has in memory, and what its devices are. It is of use only together with its
/// disk as that was at the same moment.
#[derive(Clone, Debug)]
pub struct MachineState {
    /// The guest's memory. Who alone has it gives it away; what is shared is not written to.
    pub memory: Arc<GuestMemory>,
    /// For the VMM to understand.
    pub devices: Bytes,
}

/// A machine that has its state, and whose guest does not run yet. Dropped, its process has been sent SIGKILL.
#[async_trait]
pub trait Loaded: Send {
    /// Has the guest run, and greets its agent, which ends what it did for the host it knew.
    ///
    /// # Errors
    /// As of [`Vmm::start`]; the machine's process is gone then.
    async fn go_on(self: Box<Self>) -> Result<Arc<dyn Machine>>;
}

/// What a start took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootTiming {
    /// Which way it came up.
    pub path: BootPath,
    /// From the call to the process being under control, in milliseconds.
    pub process_ms: u64,
    /// From the call to the agent's first answer with a root file system, in milliseconds.
    pub agent_ms: u64,
}

/// A machine that a dead daemon left behind and that was dealt with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reaped {
    /// The machine's run directory.
    pub run_dir: PathBuf,
    /// The process it had.
    pub pid: i32,
    /// True when a live process was killed; false when only its record was left.
    pub killed: bool,
}

/// A kind of virtual machine monitor.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Starts a machine and waits until its agent answers, from a kept state if the specification has one. When it fails,
    /// that of a kept state included, the machine's process is gone; a cold start is the caller's affair. When the
    /// future is dropped, the process has been sent SIGKILL; it is gone, and with it its hold on the disk, when its
    /// record in the run directory is.
    ///
    /// # Errors
    /// `QemuMissing`, `Invalid`, `StartFailed` (with what the process wrote last), `BootTimeout` (with the console's
    /// end) once `deadline` is over; from a kept state also `Io` and `Invalid` when it cannot be read or is not whole, and
    /// `Guest` with what the guest says of its disk.
    async fn start(&self, spec: MachineSpec, deadline: Duration) -> Result<Arc<dyn Machine>>;

    /// What a state that a machine of this specification can start from depends on. Quick when asked again.
    ///
    /// # Errors
    /// `Invalid` for a machine that can only boot; `QemuMissing`; `Io`.
    async fn warm_key(&self, spec: &MachineSpec) -> Result<WarmKey>;

    /// Boots a machine with this specification's key, without disks or network, up to the moment before it becomes one
    /// sandbox, keeps its memory and its devices' state in the directory `to`, which is there whole or not at all, and kills
    /// it. Meanwhile there is a directory beside `to` whose name begins with a dot and on which an exclusive `flock` is held.
    /// Of the specification, disks, network, names and `warm` are of no matter. It yields the processor to other machines.
    ///
    /// # Errors
    /// As [`Vmm::start`]; nothing is left then, nor of a future that is dropped but for its run directory.
    async fn warm(&self, spec: &MachineSpec, to: &Path, deadline: Duration) -> Result<()>;

    /// What a machine of this specification has in common with those that can go on from its state, beside the size of its
    /// disk: 16 hexadecimal digits. Quick when asked again.
    ///
    /// # Errors
    /// `Invalid` for a machine whose state cannot be had; `QemuMissing`; `Io`.
    async fn state_key(&self, spec: &MachineSpec) -> Result<String>;

    /// Starts a machine's process and gives it a state of one with the same [`Vmm::state_key`]. Its disk is not touched
    /// before it goes on, so whoever called can decide until then.
    ///
    /// # Errors
    /// As of [`Vmm::start`]; nothing is left then.
    async fn load(&self, spec: MachineSpec, state: MachineState, deadline: Duration) -> Result<Box<dyn Loaded>>;

    /// The run directories under `run_root` whose machines are alive: those that [`Vmm::adopt`] can take over.
    ///
    /// # Errors
    /// `Io` when `run_root` exists but cannot be listed.
    async fn survivors(&self, run_root: &Path) -> Result<Vec<PathBuf>>;

    /// Takes over the machine that an earlier daemon started in `run_dir` and that outlived it; `None` when there is
    /// none. The guest goes on as it was: what it served to the earlier daemon's agent connection is ended, a frozen
    /// file system is thawed, a boot that was going on is waited for until `deadline`, one that was held goes on. The
    /// machine's disk must be served again by then. A held machine may go on in a new process, from its own state: it came
    /// up by [`BootPath::Memory`] then, and its guest has to be told. Unless a machine is returned, its process is gone.
    ///
    /// # Errors
    /// As [`Vmm::start`], when there is a machine and it cannot be taken over; `Io` when it cannot be killed either.
    async fn adopt(&self, run_dir: &Path, deadline: Duration) -> Result<Option<Arc<dyn Machine>>>;

    /// Kills every machine that an earlier daemon left under `run_root` (one directory each, see
    /// [`MachineSpec::run_dir`]), but for those whose run directories are in `keep`, and removes its record. A process
    /// is only killed if it was started for that directory. Must not be called while machines of this daemon run there.
    ///
    /// # Errors
    /// `Io` when `run_root` exists but cannot be listed.
    async fn reap_orphans(&self, run_root: &Path, keep: &[PathBuf]) -> Result<Vec<Reaped>>;

    /// Whether machines can run with KVM here, which is only known by booting one with this kernel and initramfs, in a
    /// run directory of its own under `run_root`. The answer is kept in `cache_dir` for as long as kernel, host and VMM
    /// stay the same.
    async fn probe_kvm(&self, kernel: &Path, initramfs: &Path, run_root: &Path, cache_dir: &Path) -> Acceleration;

    /// Name and version of what runs machines, for `doctor`.
    ///
    /// # Errors
    /// `QemuMissing` when it cannot be run.
    async fn version(&self) -> Result<String>;
}

/// A running machine. Dropping the last handle sends it SIGKILL without waiting, unless it was left; [`Machine::kill`]
/// waits.
#[async_trait]
pub trait Machine: Send + Sync {
    /// A client of the guest's agent; clones share one connection.
    fn agent(&self) -> Agent;

    /// Ends the machine in order: the agent ends processes and flushes the disk, then the VMM is told to quit, and
    /// when `deadline` is over it is killed. Returns when the process is gone. A second call waits for the first.
    ///
    /// # Errors
    /// `Io` when even the killed process does not go away.
    async fn shutdown(&self, deadline: Duration) -> Result<ExitReason>;

    /// Kills the machine at once and returns when its process is gone. What the guest had not flushed is lost.
    ///
    /// # Errors
    /// `Io` when the process does not go away.
    async fn kill(&self) -> Result<ExitReason>;

    /// Stops the guest's processors, and brings what its devices do to an end: its disk and its memory stand still until
    /// [`Machine::go_on`]. Its agent does not answer meanwhile.
    ///
    /// # Errors
    /// When the VMM does not do so, or does not answer. The guest may be held or not; let it go on.
    async fn hold(&self) -> Result<()>;

    /// What the devices of a held machine are.
    ///
    /// # Errors
    /// As of [`Machine::hold`].
    async fn devices(&self) -> Result<Bytes>;

    /// The guest's memory as it is at each moment, and as it was when the machine has ended.
    ///
    /// # Errors
    /// `Io` when it cannot be looked at, as of a machine that shares it with others that have the same state.
    async fn memory(&self) -> Result<GuestMemory>;

    /// Has the guest of a held machine go on as if nothing had been.
    ///
    /// # Errors
    /// As of [`Machine::hold`].
    async fn go_on(&self) -> Result<()>;

    /// Waits for the machine's end; any number of waiters, at once or later, get the same reason.
    async fn wait(&self) -> ExitReason;

    /// Lets go of the machine for the next daemon to adopt: connections to it are closed, and dropping its handles does
    /// not end it any more.
    async fn leave(&self);

    /// The process, if the machine is one.
    fn pid(&self) -> Option<i32>;

    /// What the start took, or taking it over.
    fn boot_timing(&self) -> BootTiming;

    /// The file that the guest's console is written to. It is kept short: a reader has to see when it is started over, as
    /// [`crate::ConsoleReader`] does. It stays after the machine's end, until the next one in the same directory.
    fn console(&self) -> &Path;

    /// The last `max_bytes` of the guest's console, control characters and sequences removed.
    fn console_tail(&self, max_bytes: usize) -> String {
        crate::console::tail(self.console(), max_bytes)
    }
}

/// A point in time to be done by.
pub(crate) fn deadline_at(deadline: Duration) -> Instant {
    // A century is as good as for ever, and cannot overflow.
    Instant::now() + deadline.min(Duration::from_secs(100 * 365 * 24 * 3600))
}
