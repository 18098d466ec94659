//! `miosa doctor`: whether this machine has what the daemon needs, and what to do where not.
//!
//! Every check looks for itself and changes nothing. None of them needs a daemon. Where a single command that only adds something
//! puts it right, the check names that, and [`fix`] runs it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statfs::statfs;
use nix::unistd::{AccessFlags, access};
use serde::Serialize;
use vmm::process::find_program;

use crate::config::{self, Config, ConfigError};
use crate::units::show_bytes;

const QEMU_PACKAGE: &str = "qemu-system-x86";

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Something will be slower, or not be there.
    Warn,
    /// Sandboxes will not work.
    Fail,
}

/// What a check found.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it went.
    pub status: Verdict,
    /// What was found.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The command that does it, for root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<Vec<&'static str>>,
}

impl Check {
    /// As it should be.
    pub fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self { name, status: Verdict::Ok, message: message.into(), hint: None, fix: None }
    }

    /// Not as it should be, with what to do.
    pub fn warn(name: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, status: Verdict::Warn, message: message.into(), hint: Some(hint.into()), fix: None }
    }

    /// Nothing works without it.
    pub fn fail(name: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, status: Verdict::Fail, message: message.into(), hint: Some(hint.into()), fix: None }
    }
}

impl Check {
    /// The same, with the command that puts it right.
    fn with_fix(self, command: &[&'static str]) -> Self {
        Self { fix: Some(command.to_vec()), ..self }
    }

    /// The same, with the Debian package that it needs.
    fn with_package(self, package: &'static str) -> Self {
        let hint = Some(format!("install it: apt-get install {package}"));
        Self { hint, ..self.with_fix(&["apt-get", "install", "--yes", "--no-install-recommends", package]) }
    }
}

/// Runs the commands that the checks name, each once, with `tell` told of each before. What they say goes to stderr.
///
/// Errors: one that cannot be run, or fails; those after it are not run.
pub fn fix(checks: &[Check], mut tell: impl FnMut(&str)) -> std::result::Result<(), String> {
    let mut done: Vec<&[&str]> = Vec::new();
    for command in checks.iter().filter_map(|check| check.fix.as_deref()) {
        if done.contains(&command) {
            continue;
        }
        let shown = command.join(" ");
        tell(&shown);
        let mut run = Command::new(command[0]);
        run.args(&command[1..]).env("DEBIAN_FRONTEND", "noninteractive").stdin(std::process::Stdio::null());
        match run.stdout(std::io::stderr()).status() {
            Ok(status) if status.success() => done.push(command),
            Ok(status) => return Err(format!("{shown}: {status}")),
            Err(error) => return Err(format!("{shown}: {error}")),
        }
    }
    Ok(())
}

/// All checks of this machine.
pub fn examine(config: &Config, broken: Option<&ConfigError>) -> Vec<Check> {
    let mut checks = vec![
        configuration(broken),
        kernel(),
        kvm(config),
        qemu(),
        seccomp(),
        users(config),
        landlock(),
        agent(config),
        fuse(),
        tool("mkfs", "mke2fs", "e2fsprogs", "templates are made with it"),
        tool("qemu-img", "qemu-img", "qemu-utils", "qcow2 images are converted with it"),
        state_dir(config),
        headroom(&config.state_dir),
        file_system(&config.state_dir),
        open_files(),
        processes(),
        cgroups(),
    ];
    checks.sort_by_key(|check| std::cmp::Reverse(check.status == Verdict::Fail));
    checks
}

fn configuration(broken: Option<&ConfigError>) -> Check {
    match broken {
        None => Check::ok("configuration", "can be read"),
        Some(error) => Check::fail(
            "configuration",
            error.message.clone(),
            error.hint.clone().unwrap_or_else(|| "put it right".into()),
        ),
    }
}

fn kernel() -> Check {
    let release = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    let mut parts = release.split(['.', '-']).map_while(|p| p.parse::<u32>().ok());
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let message = format!("Linux {release}");
    let off = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").is_ok_and(|v| v.trim() == "2");
    match version {
        v if v < (5, 10) => Check::fail("kernel", message, "use Linux 5.10 or later"),
        _ if off => Check::warn(
            "kernel",
            format!("{message}, with io_uring switched off"),
            "the store does without, more slowly; sysctl kernel.io_uring_disabled=0",
        ),
        _ => Check::ok("kernel", message),
    }
}

/// Whether machines can be accelerated: what the daemon found when it booted one with KVM, or that it has not yet.
fn kvm(config: &Config) -> Check {
    let (name, device) = ("kvm", Path::new("/dev/kvm"));
    let slow = "machines are translated (tcg), some ten times slower than with KVM";
    if !device.exists() {
        return Check::warn(
            name,
            format!("there is no /dev/kvm: {slow}"),
            "switch virtualisation on, in the firmware or for this virtual machine",
        );
    }
    if let Err(error) = access(device, AccessFlags::R_OK | AccessFlags::W_OK) {
        let message = format!("/dev/kvm cannot be opened: {}; {slow}", error.desc());
        return Check::warn(name, message, "add this user to the group kvm");
    }
    let ask = "the daemon boots a guest with it once, at the first start of a machine; to have it asked now: miosa \
               template build base; --accel kvm insists";
    let qemu = qemu_version().unwrap_or_default();
    match vmm::qemu::kept_kvm_answer(&config.cache_dir, &qemu) {
        Some(answer) if answer.outdated => {
            let message =
                format!("/dev/kvm can be opened; what is known of it is of another host or QEMU: {}", answer.found);
            Check::warn(name, message, ask)
        }
        Some(answer) if answer.works => Check::ok(name, format!("works: {}", answer.found)),
        Some(answer) => Check::warn(
            name,
            format!("/dev/kvm can be opened, but does not work: {}; {slow}", answer.found),
            format!("to have it tried again: rm {}", answer.file.display()),
        ),
        None => Check::warn(name, "/dev/kvm can be opened, which does not prove that a machine boots on it", ask),
    }
}

/// The first line of what QEMU says of itself.
fn qemu_version() -> std::result::Result<String, String> {
    match Command::new("qemu-system-x86_64").arg("--version").output() {
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
        }
        Ok(output) => Err(format!("qemu-system-x86_64 does not run: {}", output.status)),
        Err(error) => Err(format!("qemu-system-x86_64 was not found: {error}")),
    }
}

fn qemu() -> Check {
    let line = match qemu_version() {
        Ok(line) => line,
        Err(why) => return Check::fail("qemu", why, "").with_package(QEMU_PACKAGE),
    };
    let major = line.split_whitespace().find_map(|word| word.split('.').next()?.parse::<u32>().ok());
    match major {
        Some(major) if major < 7 => Check::fail("qemu", line, "use QEMU 7 or later"),
        _ => Check::ok("qemu", line),
    }
}

/// Whether QEMU can filter its own system calls; without, it does not start.
fn seccomp() -> Check {
    let name = "seccomp";
    let tried = Command::new("qemu-system-x86_64").args(["-sandbox", vmm::jail::QEMU_FILTER, "-version"]).output();
    match tried {
        Ok(output) if output.status.success() => Check::ok(name, "QEMU filters its system calls"),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().next().unwrap_or("no reason given").to_owned();
            Check::fail(name, said, "use a QEMU that is built with seccomp, such as Debian's")
        }
        Err(_) => Check::fail(name, "there is no QEMU to ask", "").with_package(QEMU_PACKAGE),
    }
}

/// Who machines and tools that read images run as.
fn users(config: &Config) -> Check {
    let (name, range) = ("machine users", config.machine_uids);
    let offer = vmm::jail::offer(range.0);
    let others = "name ids that nobody has: machine_uids = \"FIRST-LAST\" in the configuration";
    match offer {
        vmm::jail::Offer { missing: Some(why), .. } => {
            Check::fail(name, format!("{why}: no machine can be started"), others)
        }
        vmm::jail::Offer { taken: Some(why), .. } => Check::warn(name, why, others),
        vmm::jail::Offer { own_users: true, .. } => {
            Check::ok(name, format!("each machine is a user of its own, of {range}, without privileges"))
        }
        _ => Check::warn(
            name,
            "machines run as you: one that is taken over reaches your Unix sockets, this daemon's among them",
            "run the daemon as root, which gives each machine a user of its own",
        ),
    }
}

/// Whether the kernel keeps machines to their files.
fn landlock() -> Check {
    let name = "landlock";
    match vmm::jail::offer(vmm::jail::Users::DEFAULT).landlock {
        0 => Check::warn(
            name,
            "the kernel has none, or does not use it: only their users keep machines and tools from files",
            "use Linux 5.13 or later, and have landlock in lsm= on its command line",
        ),
        version @ 1..6 => Check::ok(
            name,
            format!("version {version}; from 6 on (Linux 6.12), signals and abstract sockets are kept in, too"),
        ),
        version => Check::ok(name, format!("version {version}")),
    }
}

fn agent(config: &Config) -> Check {
    match config::find_agent(config.agent.as_deref()) {
        Some(path) if path.is_file() => Check::ok("agent", path.display().to_string()),
        found => {
            let message = match found {
                Some(path) => format!("{} is not there", path.display()),
                None => "miosa-agent is not next to miosa".to_owned(),
            };
            let hint = "build it (cargo build --release -p miosa-agent) and name it: miosa daemon --agent FILE";
            Check::fail("agent", message, hint)
        }
    }
}

fn fuse() -> Check {
    let name = "fuse";
    let without = "disks cannot be shown as files; --disk-frontend vhost-user does without";
    if access("/dev/fuse", AccessFlags::R_OK | AccessFlags::W_OK).is_err() {
        let found = Check::warn(name, format!("/dev/fuse cannot be opened: {without}"), "load it: modprobe fuse");
        return found.with_fix(&["modprobe", "fuse"]);
    }
    if !nix::unistd::geteuid().is_root() && find_program("fusermount3".as_ref()).is_none() {
        return Check::warn(name, format!("fusermount3 was not found: {without}"), "").with_package("fuse3");
    }
    Check::ok(name, "/dev/fuse can be opened")
}

fn tool(name: &'static str, program: &str, package: &'static str, why: &str) -> Check {
    match find_program(program.as_ref()) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::warn(name, format!("{program} was not found: {why}"), "").with_package(package),
    }
}

fn state_dir(config: &Config) -> Check {
    let (name, dir) = ("state directory", &config.state_dir);
    let shown = dir.display();
    let Ok(metadata) = std::fs::metadata(dir) else {
        let made = existing(dir);
        return match access(&made, AccessFlags::W_OK | AccessFlags::X_OK) {
            Ok(()) => Check::ok(name, format!("{shown} will be made")),
            Err(_) => Check::fail(
                name,
                format!("{shown} cannot be made: {} is not yours", made.display()),
                "name another: --state-dir DIR",
            ),
        };
    };
    if metadata.uid() != nix::unistd::geteuid().as_raw() {
        let message = format!("{shown} belongs to user {}", metadata.uid());
        return Check::warn(name, message, "run miosa as that user, or name another: --state-dir DIR");
    }
    if metadata.mode() & 0o077 != 0 {
        return Check::warn(name, format!("others can look into {shown}"), format!("chmod 700 {shown}"));
    }
    Check::ok(name, shown.to_string())
}

/// The directory itself, or what is there of the way to it.
fn existing(dir: &Path) -> PathBuf {
    dir.ancestors().find(|d| d.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn headroom(dir: &Path) -> Check {
    let name = "disk space";
    let facts = match nix::sys::statvfs::statvfs(&existing(dir)) {
        Ok(facts) => facts,
        Err(error) => return Check::warn(name, format!("cannot be told: {}", error.desc()), "look at it: df"),
    };
    let free = facts.blocks_available() as u64 * facts.fragment_size() as u64;
    let message = format!("{} are free", show_bytes(free));
    let hint = "free some, or name a directory on another disk: --state-dir DIR";
    match free {
        0..0x4000_0000 => Check::fail(name, message, hint),
        0x4000_0000..0x2_8000_0000 => Check::warn(name, message, hint),
        _ => Check::ok(name, message),
    }
}

fn file_system(dir: &Path) -> Check {
    use nix::sys::statfs::{
        BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC,
        XFS_SUPER_MAGIC,
    };
    let name = "file system";
    let Ok(facts) = statfs(&existing(dir)) else {
        return Check::warn(name, "cannot be told", "look at it: findmnt");
    };
    let hint = "keep state on a local disk: --state-dir DIR";
    let kind = facts.filesystem_type();
    let known: [(FsType, &str); 3] =
        [(EXT4_SUPER_MAGIC, "ext4"), (XFS_SUPER_MAGIC, "xfs"), (BTRFS_SUPER_MAGIC, "btrfs")];
    if let Some((_, shown)) = known.iter().find(|(magic, _)| *magic == kind) {
        return Check::ok(name, *shown);
    }
    match kind {
        TMPFS_MAGIC => Check::warn(name, "tmpfs: a restart of the machine loses everything", hint),
        NFS_SUPER_MAGIC => Check::fail(name, "NFS: the store needs locks and syncs that it does not promise", hint),
        OVERLAYFS_SUPER_MAGIC => Check::warn(name, "overlayfs, as in a container: everything goes with it", hint),
        other => Check::warn(name, format!("of a kind that the store was not tested on ({:#x})", other.0), hint),
    }
}

fn open_files() -> Check {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    let message = format!("{soft} (at most {hard})");
    match soft {
        0..4_096 => {
            Check::warn("open files", message, "a sandbox takes some ten: ulimit -n 65536, or LimitNOFILE= in the unit")
        }
        _ => Check::ok("open files", message),
    }
}

fn processes() -> Check {
    let (soft, _) = getrlimit(Resource::RLIMIT_NPROC).unwrap_or_default();
    let cgroup = own_cgroup().and_then(|dir| std::fs::read_to_string(dir.join("pids.max")).ok());
    let cgroup = cgroup.and_then(|text| text.trim().parse::<u64>().ok());
    let most = cgroup.map_or(soft, |limit| limit.min(soft));
    let message = if most == u64::MAX { "no limit".to_owned() } else { format!("{most} processes and threads") };
    match most {
        0..2_048 => {
            Check::warn("processes", message, "a sandbox takes some ten threads: ulimit -u, or TasksMax= in the unit")
        }
        _ => Check::ok("processes", message),
    }
}

fn own_cgroup() -> Option<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new("/sys/fs/cgroup").join(path))
}

fn cgroups() -> Check {
    let limited = vmm::jail::limited_by_groups();
    let missing: Vec<_> = ["memory", "pids", "cpu"].into_iter().filter(|what| !limited.contains(what)).collect();
    match &missing[..] {
        [] => Check::ok("cgroups", "each machine has limits of its own"),
        _ => Check::warn(
            "cgroups",
            format!("machines run without limits of their own on {}", missing.join(", ")),
            "run the daemon under systemd with Delegate=yes, or where it may make control groups",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_configuration_fails_and_comes_first() {
        let broken = ConfigError { message: "line 3".to_owned(), hint: None };
        let checks = examine(&Config::default(), Some(&broken));
        let configuration = checks.iter().find(|c| c.name == "configuration").unwrap();
        assert_eq!((configuration.status, configuration.message.as_str()), (Verdict::Fail, "line 3"));
        assert_eq!(checks[0].status, Verdict::Fail);
        assert!(checks.iter().all(|c| c.status == Verdict::Ok || c.hint.as_deref().is_some_and(|h| !h.is_empty())));
    }

    #[test]
    fn what_is_not_there_yet_is_judged_by_where_it_will_be() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { state_dir: dir.path().join("a/b/c"), ..Config::default() };
        assert_eq!(state_dir(&config).status, Verdict::Ok);
        assert_eq!(existing(&config.state_dir), dir.path());
        assert!(headroom(&config.state_dir).message.contains("free"));
    }
}
