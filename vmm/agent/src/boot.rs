//! From the initramfs to a mounted root, in two parts: [`early`] is the same in all guests (the kernel's file systems,
//! modules), [`enter_root`] is what makes one of them (the root disk, the move into it). A guest that is to be copied
//! stops between the two and is told later what it becomes: it has neither disk nor network device until then.

use std::fs::{self, File};
use std::io::{Error, Result};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use parking_lot::Mutex;

use crate::{guest, log, network, read_line, volumes};

/// How long the root disk may take to appear.
const DISK_PATIENCE: Duration = Duration::from_secs(30);
const NEW_ROOT: &str = "/newroot";

/// What the kernel's command line says of the root when the host says it later.
const LATER: &str = "later";

/// `/` is the root disk.
static HAS_ROOT: AtomicBool = AtomicBool::new(false);

/// Whether `/` is the root disk.
pub(crate) fn has_root() -> bool {
    HAS_ROOT.load(Ordering::Acquire)
}

/// Runs once; after it `/` is the root disk, or the guest waits to be told which.
pub(crate) fn boot() -> Result<()> {
    early()?;
    let disk = argument("miosa.root").unwrap_or_else(|| "/dev/vda".into());
    if disk == LATER {
        return Ok(());
    }
    let network = argument("miosa.net").is_none_or(|net| net != "none");
    enter_root(&disk, argument("miosa.hostname").as_deref(), network)
}

/// What is the same whatever the disk.
fn early() -> Result<()> {
    make_mount("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755")?;
    make_mount("proc", "/proc", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, "")?;
    make_mount("sysfs", "/sys", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, "")?;
    load_modules();
    Ok(())
}

/// A word of the kernel's command line.
fn argument(name: &str) -> Option<String> {
    let command_line = read_line("/proc/cmdline");
    command_line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('=').map(str::to_owned))
}

/// Finds the devices that were not there when the kernel looked. Their drivers are loaded, so they are usable after it.
pub(crate) fn find_devices() -> Result<()> {
    fs::write("/sys/bus/pci/rescan", "1").map_err(|e| error("look for devices", e))
}

/// Runs once; after it `/` is the root disk, with what programs expect around it.
pub(crate) fn enter_root(disk: &str, hostname: Option<&str>, network: bool) -> Result<()> {
    let disk = root_disk(disk)?;
    fs::create_dir_all(NEW_ROOT)?;
    // Reading a file must not write to the disk: snapshots would differ for nothing. Discard gives space back.
    let flags = argument("miosa.rootflags").unwrap_or_else(|| "discard,errors=remount-ro".into());
    mount(Some(disk.as_str()), NEW_ROOT, Some("ext4"), MsFlags::MS_NOATIME, Some(flags.as_str()))
        .map_err(|errno| error(&format!("mount {disk}"), errno.into()))?;
    grow_root(&disk);
    switch_root()?;
    furnish(hostname, network);
    HAS_ROOT.store(true, Ordering::Release);
    Ok(())
}

fn error(what: &str, error: Error) -> Error {
    Error::new(error.kind(), format!("{what}: {error}"))
}

fn make_mount(kind: &str, at: &str, flags: MsFlags, options: &str) -> Result<()> {
    fs::create_dir_all(at)?;
    match mount(Some(kind), at, Some(kind), flags, Some(options)) {
        // The kernel may have mounted devtmpfs itself.
        Ok(()) | Err(nix::errno::Errno::EBUSY) => Ok(()),
        Err(errno) => Err(error(&format!("mount {kind} on {at}"), errno.into())),
    }
}

/// Modules that few guests need, not loaded yet. Their files are gone with the initramfs, and stay in memory while open.
static UNLOADED: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Loads what the initramfs lists, in its order. A module that fails is told and skipped: the wait for the disk decides.
fn load_modules() {
    let open = |name: &str| File::open(format!("/modules/{name}"));
    for name in read_line("/modules/order").lines() {
        if let Err(error) = open(name).and_then(|module| load(&module)) {
            log(&format!("module {name}: {error}"));
        }
    }
    *UNLOADED.lock() = read_line("/modules/later").lines().flat_map(open).collect();
}

/// Loads the other modules too, once.
pub(crate) fn load_later() -> Result<()> {
    std::mem::take(&mut *UNLOADED.lock()).iter().try_for_each(load)
}

fn load(module: &File) -> Result<()> {
    match finit_module(module, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The root disk's file: named so, or by its serial number, for the order of several disks is the kernel's affair.
fn root_disk(named: &str) -> Result<String> {
    let until = Instant::now() + DISK_PATIENCE;
    loop {
        let found = match named.strip_prefix("serial:") {
            Some(serial) => volumes::device_of(serial).map(|device| device.node),
            None => Some(named.to_owned()),
        };
        if let Some(disk) = found.filter(|disk| Path::new(disk).exists()) {
            return Ok(disk);
        }
        if Instant::now() >= until {
            let message = format!("no {named} after {} s", DISK_PATIENCE.as_secs());
            return Err(Error::new(std::io::ErrorKind::TimedOut, message));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A disk larger than its file system: grow it, for this is a fork that was given more room.
fn grow_root(disk: &str) {
    let Some(name) = disk.strip_prefix("/dev/") else { return };
    let sectors: u64 = read_line(&format!("/sys/class/block/{name}/size")).parse().unwrap_or(0);
    if let Err(error) = guest::grow_ext4(NEW_ROOT, sectors * 512) {
        log(&format!("cannot grow the root file system: {error}"));
    }
}

/// Makes the disk the root, with the kernel's file systems moved into it. The initramfs stays below, unreachable but
/// for the running agent; its files are removed first, for they are memory.
fn switch_root() -> Result<()> {
    for dir in ["dev", "proc", "sys"] {
        let target = format!("{NEW_ROOT}/{dir}");
        // A root without these directories gets them.
        fs::create_dir_all(&target)?;
        mount(Some(format!("/{dir}").as_str()), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(|errno| error(&format!("move /{dir}"), errno.into()))?;
    }
    let _ = fs::remove_dir_all("/modules");
    let _ = fs::remove_file("/init");
    std::env::set_current_dir(NEW_ROOT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")
}

/// What programs expect to find. Nothing here is needed to serve the host, so nothing here stops the boot.
fn furnish(hostname: Option<&str>, with_network: bool) {
    let tell = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            log(&format!("{what}: {error}"));
        }
    };
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    tell(
        "/dev/pts",
        make_mount("devpts", "/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "mode=620,gid=5,ptmxmode=666"),
    );
    tell("/dev/shm", make_mount("tmpfs", "/dev/shm", quiet, "mode=1777"));
    tell("/run", make_mount("tmpfs", "/run", quiet, "mode=0755,size=20%"));
    tell("/run/lock", fs::create_dir_all("/run/lock"));
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(target, format!("/dev/{link}"));
    }
    if !Path::new("/tmp").exists() {
        use std::os::unix::fs::PermissionsExt;
        tell(
            "/tmp",
            fs::create_dir("/tmp").and_then(|()| fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777))),
        );
    }
    if Path::new("/sys/fs/cgroup").is_dir() {
        tell("/sys/fs/cgroup", make_mount("cgroup2", "/sys/fs/cgroup", quiet | MsFlags::MS_NOEXEC, ""));
    }
    let hostname = hostname.map(str::to_owned).unwrap_or_else(|| read_line("/etc/hostname"));
    if !hostname.is_empty() {
        tell("hostname", nix::unistd::sethostname(&hostname).map_err(Error::from));
    }
    tell("lo", network::bring_up_loopback());
    if with_network {
        tell("eth0", network::bring_up_user_network());
    }
    // What programs leave on the console must not stop them when nobody reads it.
    let _ = std::env::set_current_dir("/");
}
