//! The real guest as the server sees it.

use std::fs::{self, File};
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use miosa_agent::server::{Children, System};
use miosa_agent::wire::{AgentError, ErrorKind, GuestInfo, Mount, Root};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::Pid;
use parking_lot::Mutex;

use crate::volumes::Volumes;
use crate::{boot, connections, log, network, read_line};

nix::ioctl_readwrite!(
    /// Freezes the file system of an open file.
    fifreeze, b'X', 119, libc::c_int
);
nix::ioctl_readwrite!(
    /// Thaws the file system of an open file.
    fithaw, b'X', 120, libc::c_int
);
nix::ioctl_write_ptr!(
    /// Adds to the kernel's random numbers and counts it.
    rnd_add_entropy, b'R', 3, [libc::c_int; 2]
);
nix::ioctl_none!(
    /// Has the kernel's generator take what was added at once.
    rnd_reseed, b'R', 7
);
nix::ioctl_write_ptr!(
    /// Grows an ext4 file system to a number of blocks.
    ext4_ioc_resize_fs, b'f', 16, u64
);

/// The longest killed processes may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(2);

pub(crate) struct Guest {
    children: Children,
    volumes: Volumes,
    /// Held while the root is mounted: that is done once.
    rooting: Mutex<()>,
}

impl Guest {
    pub(crate) fn new() -> Guest {
        Guest { children: Children::of_init(), volumes: Volumes::default(), rooting: Mutex::default() }
    }

    pub(crate) fn reap_forever(&self) {
        self.children.reap_forever();
    }
}

impl System for Guest {
    fn path(&self, path: &str) -> std::result::Result<PathBuf, AgentError> {
        let absolute = Path::new(path).components().next() == Some(Component::RootDir);
        if !absolute || path.contains('\0') {
            return Err(AgentError::new(ErrorKind::Invalid, format!("{path:?}: paths must be absolute")));
        }
        Ok(PathBuf::from(path))
    }

    fn children(&self) -> &Children {
        &self.children
    }

    fn info(&self) -> GuestInfo {
        let uptime = read_line("/proc/uptime");
        let seconds = uptime.split(' ').next().and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
        GuestInfo {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel: read_line("/proc/sys/kernel/osrelease"),
            uptime_ms: (seconds * 1000.0) as u64,
        }
    }

    fn has_root(&self) -> bool {
        boot::has_root()
    }

    fn mount_root(&self, root: &Root) -> std::result::Result<(), AgentError> {
        let _rooting = self.rooting.lock();
        if boot::has_root() {
            return Ok(());
        }
        let entered = boot::find_devices().and_then(|()| {
            let hostname = Some(root.hostname.as_str());
            boot::enter_root(&root.disk, hostname, root.network)
        });
        entered.map_err(|e| {
            log(&format!("no root: {e}"));
            AgentError::io("enter the root file system", &e)
        })
    }

    fn mount(&self, wanted: &Mount) -> std::result::Result<(), AgentError> {
        self.volumes.mount(wanted, &self.path(&wanted.path)?)
    }

    fn freeze(&self) -> std::result::Result<(), AgentError> {
        // Most of the work before writers have to wait.
        nix::unistd::sync();
        self.volumes.freeze()?;
        freeze(Path::new("/")).inspect_err(|_| self.volumes.thaw())
    }

    fn thaw(&self) -> std::result::Result<(), AgentError> {
        let thawed = thaw(Path::new("/"));
        self.volumes.thaw();
        thawed
    }

    fn set_clock(&self, unix_nanos: u64) -> std::result::Result<(), AgentError> {
        let time = TimeSpec::from_duration(Duration::from_nanos(unix_nanos));
        clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|e| AgentError::io("set the clock", &e.into()))
    }

    fn set_hostname(&self, name: &str) -> std::result::Result<(), AgentError> {
        nix::unistd::sethostname(name).map_err(|e| AgentError::io("set the host name", &e.into()))
    }

    fn set_mac(&self, mac: [u8; 6]) -> std::result::Result<(), AgentError> {
        network::set_mac(mac).map_err(|e| AgentError::io("set the hardware address", &e))
    }

    fn end_connections(&self) {
        if let Err(error) = connections::end_those_to_the_outside() {
            log(&format!(
                "dead connections stay until something is sent over them, the kernel does not end them: {error}"
            ));
        }
    }

    fn add_entropy(&self, bytes: &[u8]) -> std::result::Result<(), AgentError> {
        /// `struct rand_pool_info` of the kernel, with its buffer.
        #[repr(C)]
        struct Pool {
            head: [libc::c_int; 2],
            bytes: [u8; 64],
        }
        let len = bytes.len().min(64);
        let mut pool = Pool { head: [len as libc::c_int * 8, len as libc::c_int], bytes: [0; 64] };
        pool.bytes[..len].copy_from_slice(&bytes[..len]);
        let failed = |e: std::io::Error| AgentError::io("/dev/random", &e);
        let random = File::options().write(true).open("/dev/random").map_err(failed)?;
        // SAFETY: the descriptor is open during both calls; the kernel reads the head and as many bytes behind it as the
        // head says, which are in the same structure.
        unsafe {
            rnd_add_entropy(random.as_raw_fd(), (&raw const pool).cast()).map_err(|e| failed(e.into()))?;
            rnd_reseed(random.as_raw_fd()).map_err(|e| failed(e.into()))?;
        }
        Ok(())
    }

    fn sync(&self) {
        nix::unistd::sync();
    }

    fn shutdown(&self, grace: Duration) -> std::result::Result<(), AgentError> {
        let everyone = Pid::from_raw(-1);
        let _ = kill(everyone, Signal::SIGTERM);
        // A stopped process could not hear it.
        let _ = kill(everyone, Signal::SIGCONT);
        if !wait_for_processes(grace) {
            let _ = kill(everyone, Signal::SIGKILL);
            if !wait_for_processes(KILL_PATIENCE) {
                log("some processes do not go away; going on without them");
            }
        }
        nix::unistd::sync();
        let volumes = self.volumes.leave_clean();
        leave_clean(Path::new("/")).and(volumes)
    }

    fn power_off(&self) {
        power_off();
    }

    fn log(&self, message: &str) {
        log(message);
    }
}

/// Stops writes to a mounted file system; what is on its disk is clean then.
pub(crate) fn freeze(at: &Path) -> std::result::Result<(), AgentError> {
    on_mounted("freeze", at, |fd, argument| {
        // SAFETY: the descriptor is open during the call and the argument a valid int, which is ignored.
        unsafe { fifreeze(fd, argument) }
    })
}

/// Allows them again.
pub(crate) fn thaw(at: &Path) -> std::result::Result<(), AgentError> {
    on_mounted("thaw", at, |fd, argument| {
        // SAFETY: as for the freeze.
        match unsafe { fithaw(fd, argument) } {
            // Somebody in the guest thawed it.
            Err(nix::errno::Errno::EINVAL) => Ok(0),
            result => result,
        }
    })
}

/// Leaves a mounted file system clean on its disk, for the power to go.
pub(crate) fn leave_clean(at: &Path) -> std::result::Result<(), AgentError> {
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    match mount(None::<&str>, at, None::<&str>, read_only, None::<&str>) {
        Ok(()) => Ok(()),
        // Something holds a file open for writing. A frozen file system is as clean on the disk.
        Err(_) => freeze(at),
    }
}

fn on_mounted(
    what: &str,
    at: &Path,
    call: impl FnOnce(i32, *mut libc::c_int) -> nix::Result<libc::c_int>,
) -> std::result::Result<(), AgentError> {
    let mut argument = 0;
    let what = || format!("{what} {}", at.display());
    let root = File::open(at).map_err(|e| AgentError::io(what(), &e))?;
    call(root.as_raw_fd(), &mut argument).map(drop).map_err(|e| AgentError::io(what(), &e.into()))
}

/// Waits until no process but this one and the kernel's own is left; false when `limit` is over first.
fn wait_for_processes(limit: Duration) -> bool {
    let until = Instant::now() + limit;
    while processes_left() {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

fn processes_left() -> bool {
    // The kernel's threads and zombies have no command line.
    fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| {
        let pid: Option<u32> = entry.file_name().to_str().and_then(|name| name.parse().ok());
        pid.is_some_and(|pid| pid != 1) && fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty())
    })
}

pub(crate) fn power_off() {
    let _ = reboot(RebootMode::RB_POWER_OFF);
    log("power off failed");
}

/// Grows the ext4 file system mounted at `at` to `bytes`, unless it is about as large already.
pub(crate) fn grow_ext4(at: &str, bytes: u64) -> Result<()> {
    let stat = nix::sys::statvfs::statvfs(at)?;
    let block = stat.fragment_size().max(1);
    // statvfs leaves out the file system's own blocks, so a full-size one looks a few percent smaller.
    let has = stat.blocks() * block;
    if bytes <= has.saturating_add(has / 16).saturating_add(64 << 20) {
        return Ok(());
    }
    let root = File::open(at)?;
    let blocks = bytes / block;
    // SAFETY: the descriptor is open during the call, the argument a valid u64.
    unsafe { ext4_ioc_resize_fs(root.as_raw_fd(), &blocks) }.map(drop).map_err(Error::from)
}
