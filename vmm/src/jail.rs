//! What a process that meets foreign bytes is locked up in: QEMU, whose guest may take it over, and the tools that read
//! images of others' making.
//!
//! Where the daemon is root, each such process has a user of its own, from a range that nobody else uses: it owns no file and
//! no other process is its user's. It has no groups and no capabilities, and gains none (`no_new_privs`, an empty bounding
//! set). A Landlock ruleset names all files that it may open, everywhere; the kernel also keeps its signals, abstract
//! sockets and TCP ports in. Limits stand on what it may write, open and start, and it leaves no core file, for a guest's
//! memory would be in it. What it needs beside that is handed to it open.
//!
//! Where the daemon is not root, the process is the daemon's user, and Landlock and the limits are what there is.
//!
//! A cell is made by the parent, and entered between fork and exec, where only system calls are allowed.

use std::ffi::c_int;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::str::FromStr;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
};
use parking_lot::{Mutex, MutexGuard, RwLock};

use crate::process::find_program;
use crate::{Error, ErrorKind, Result};

/// The rights that are asked for; of those that the kernel does not know, it is not asked. Paths of Unix sockets (ABI 9) are
/// left to the users' rights: a machine connects to its disk.
const RIGHTS: ABI = ABI::V6;
/// Where programs and what they are linked with are.
const PROGRAMS: [&str; 5] = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"];
/// Most files that a process has open. A guest makes a connection of each of its own to the outside.
const OPEN_FILES_MAX: u64 = 4096;
/// What a tool may take of the host.
const TOOL_SECONDS: u64 = 1800;
const TOOL_MEMORY_BYTES: u64 = 4 << 30;
const TOOL_THREADS: u64 = 64;

/// The users that jailed processes run as, where the daemon is root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Users {
    first: u32,
    last: u32,
}

impl Users {
    /// Between those of containers and those that systemd leaves to nobody (1879048192 and above are unused), so that no
    /// distribution's own or mapped users are among them.
    pub const DEFAULT: Users = Users { first: 1_900_000_000, last: 1_900_065_535 };

    /// The first and the last.
    pub fn range(self) -> (u32, u32) {
        (self.first, self.last)
    }

    fn count(self) -> u64 {
        u64::from(self.last - self.first) + 1
    }
}

impl Default for Users {
    fn default() -> Users {
        Users::DEFAULT
    }
}

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for Users {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Users, String> {
        let parse = || {
            let (first, last) = text.split_once('-')?;
            Some(Users { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? })
        };
        match parse() {
            // (uid_t)-1 is no user to the kernel.
            Some(users) if 0 < users.first && users.first <= users.last && users.last < u32::MAX => Ok(users),
            _ => Err(format!("{text:?} is no range of user ids: FIRST-LAST, such as {}, without root", Users::DEFAULT)),
        }
    }
}

static USERS: RwLock<Users> = RwLock::new(Users::DEFAULT);

/// Sets the users of all that this process locks up from now on.
pub fn set_users(users: Users) {
    *USERS.write() = users;
}

/// What of a machine as a whole can be limited by control groups of either version: some of `memory`, `pids` and `cpu`.
pub fn limited_by_groups() -> Vec<&'static str> {
    crate::cgroup::Cgroups::offered()
}

/// What this host has to offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Version of Landlock's interface; 0 where the kernel has none or does not use it.
    pub landlock: u32,
    /// This process is root, and gives each jailed process a user of its own.
    pub own_users: bool,
    /// Why it cannot although it is root: nothing is started then.
    pub missing: Option<String>,
    /// Whose those users are already.
    pub taken: Option<String>,
}

/// Looks what a jail is made of here.
pub fn offer(users: Users) -> Offer {
    let is_root = nix::unistd::geteuid().is_root();
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let missing = ["/proc/self/uid_map", "/proc/self/gid_map"].into_iter().find_map(|map| {
        let text = read(map);
        (!text.is_empty() && !is_mapped(&text, users)).then(|| format!("this container has no ids {users} ({map})"))
    });
    let taken = ["/etc/passwd", "/etc/group"]
        .into_iter()
        .find_map(|file| named_among(&read(file), users).map(|name| format!("{name} of {file} is among {users}")));
    let of_root = |found: Option<String>| found.filter(|_| is_root);
    let (missing, taken) = (of_root(missing), of_root(taken));
    Offer { landlock: landlock_version(), own_users: is_root && missing.is_none(), missing, taken }
}

/// The first name of a file such as `/etc/passwd` that has one of those ids.
fn named_among(text: &str, users: Users) -> Option<&str> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let id: u32 = fields.nth(1)?.parse().ok()?;
        (users.first <= id && id <= users.last).then_some(name)
    })
}

/// Whether all of them are users of this namespace.
fn is_mapped(map: &str, users: Users) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(|word| word.parse::<u64>().unwrap_or(0));
        let (inside, _, count) = (numbers.next().unwrap_or(0), numbers.next(), numbers.next().unwrap_or(0));
        inside <= u64::from(users.first) && u64::from(users.last) < inside + count
    })
}

/// How QEMU is told to filter its own system calls: nothing obsolete, no other user, program or priority.
pub const QEMU_FILTER: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

fn landlock_version() -> u32 {
    // SAFETY: without attributes the call looks at no memory and answers with a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, 1) };
    u32::try_from(version).unwrap_or(0)
}

/// What a process may do with a file that it opens by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Read it, or all that is below it.
    Read,
    /// Read and change it, if it is a file; nothing is made or removed.
    Write,
}

/// What a process needs.
#[derive(Debug, Default)]
pub(crate) struct Needs {
    /// The program, as a path.
    pub(crate) program: PathBuf,
    /// Files that it opens; those that are not there are left out.
    pub(crate) files: Vec<(PathBuf, Use)>,
    /// It connects to the outside.
    pub(crate) network: bool,
    /// Groups that it needs for a device.
    pub(crate) groups: Vec<u32>,
    /// It reads what belongs to any user, of the files that it is let to; without Landlock these are all.
    pub(crate) reads_of_any_user: bool,
    /// Descriptors that it has under the numbers that they have here.
    pub(crate) inherited: Vec<RawFd>,
    /// Limits besides the usual.
    pub(crate) limits: Vec<(Limit, u64)>,
}

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Bytes that a file may have after it wrote to it.
    FileBytes,
    /// Processes and threads of its user; only where it has one of its own.
    Threads,
    /// Seconds of a processor.
    CpuSeconds,
    /// Bytes of its address space.
    AddressSpace,
}

/// Held from the choice of a user until its process runs: nobody else of this process is given the same.
pub(crate) struct Turn(#[allow(dead_code, reason = "held, not read")] MutexGuard<'static, ()>);

static TURN: Mutex<()> = Mutex::new(());

/// What a process enters before it becomes another program.
#[derive(Debug)]
pub(crate) struct Cell {
    user: Option<u32>,
    groups: Vec<u32>,
    reads_of_any_user: bool,
    ruleset: Option<OwnedFd>,
    inherited: Vec<RawFd>,
    limits: Vec<(c_int, libc::rlimit)>,
}

impl Cell {
    /// A cell that no other process is in. Opens all that it is let to read, so that what is there then is what it gets.
    ///
    /// # Errors
    /// `Io` where the host has no user left, or none to give, or Landlock fails.
    pub(crate) fn new(needs: Needs) -> Result<(Cell, Turn)> {
        let ruleset = ruleset(&needs)?;
        let turn = Turn(TURN.lock());
        let user = free_user()?;
        let mut limits =
            vec![limit(libc::RLIMIT_CORE as c_int, 0)?, limit(libc::RLIMIT_NOFILE as c_int, OPEN_FILES_MAX)?];
        for (what, value) in &needs.limits {
            let resource = match what {
                Limit::FileBytes => libc::RLIMIT_FSIZE,
                Limit::Threads if user.is_none() => continue,
                Limit::Threads => libc::RLIMIT_NPROC,
                Limit::CpuSeconds => libc::RLIMIT_CPU,
                Limit::AddressSpace => libc::RLIMIT_AS,
            };
            limits.push(limit(resource as c_int, *value)?);
        }
        let reads_of_any_user = needs.reads_of_any_user && user.is_some();
        let Needs { groups, inherited, .. } = needs;
        Ok((Cell { user, groups, reads_of_any_user, ruleset, inherited, limits }, turn))
    }

    /// Its user, who has a group of the same number; none where that is this process's.
    pub(crate) fn user(&self) -> Option<u32> {
        self.user
    }

    /// Locks up the calling process, for good. Between fork and exec: makes system calls and nothing else.
    ///
    /// # Errors
    /// Of the system: then the process must not go on.
    pub(crate) fn enter(&self) -> io::Result<()> {
        nix::sys::prctl::set_no_new_privs()?;
        // What this process has open and does not know of, or forgot to mark, stays here. Linux before 5.11 has no such call.
        // SAFETY: plain system calls without memory; the flags are this process's own.
        unsafe { libc::syscall(libc::SYS_close_range, 3, c_int::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        for fd in &self.inherited {
            // SAFETY: as above. Its parent's descriptor keeps its flag.
            check(unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) }.into())?;
        }
        for (resource, limit) in &self.limits {
            // SAFETY: `limit` lives over the call; nothing is written back.
            let set = unsafe {
                libc::syscall(libc::SYS_prlimit64, 0, *resource, std::ptr::from_ref(limit), std::ptr::null::<u8>())
            };
            check(set)?;
        }
        if let Some(user) = self.user {
            self.become_user(user)?;
        }
        if let Some(ruleset) = &self.ruleset {
            // SAFETY: a descriptor that is open, and no memory.
            check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) })?;
        }
        Ok(())
    }

    /// The calls themselves and not the library's, which would tell threads that this process does not have.
    fn become_user(&self, user: u32) -> io::Result<()> {
        for capability in 0..=63 {
            if self.reads_of_any_user && capability == CAP_DAC_READ_SEARCH {
                continue;
            }
            // Refused for numbers that the kernel does not know, and where there are none to drop.
            // SAFETY: no memory is passed.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        }
        if self.reads_of_any_user {
            // SAFETY: no memory is passed.
            check(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }.into())?;
        }
        // SAFETY: `groups` lives over the call, which reads as many numbers of it.
        check(unsafe { libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr()) })?;
        // SAFETY: no memory is passed.
        check(unsafe { libc::syscall(libc::SYS_setresgid, user, user, user) })?;
        // SAFETY: no memory is passed. With its user the process loses all capabilities, or those it has in effect.
        check(unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) })?;
        if self.reads_of_any_user {
            let header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
            let one = CapabilitySet { effective: READS, permitted: READS, inheritable: READS };
            let sets = [one, CapabilitySet::default()];
            // SAFETY: both live over the call, and are what this version of the interface reads.
            check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) })?;
            // SAFETY: no memory is passed.
            let raised = unsafe {
                libc::prctl(
                    libc::PR_CAP_AMBIENT,
                    libc::PR_CAP_AMBIENT_RAISE,
                    CAP_DAC_READ_SEARCH as libc::c_ulong,
                    0,
                    0,
                )
            };
            check(raised.into())?;
        }
        Ok(())
    }
}

const CAP_DAC_READ_SEARCH: c_int = 2;
const READS: u32 = 1 << CAP_DAC_READ_SEARCH;
const CAPABILITY_VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

#[repr(C)]
#[derive(Default)]
struct CapabilitySet {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn check(returned: libc::c_long) -> io::Result<()> {
    if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The least of what is wanted and what there may be.
fn limit(resource: c_int, wanted: u64) -> Result<(c_int, libc::rlimit)> {
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `now` lives over the call, which fills it.
    let got = unsafe { libc::getrlimit(resource as libc::__rlimit_resource_t, &raw mut now) };
    check(got.into()).map_err(|e| Error::io("read a limit", e))?;
    let most = wanted.min(now.rlim_max);
    Ok((resource, libc::rlimit { rlim_cur: most, rlim_max: most }))
}

/// A user that nobody is, where this process is root. The search begins anywhere, so that two daemons on one host do not
/// meet.
fn free_user() -> Result<Option<u32>> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(None);
    }
    let users = *USERS.read();
    let from = u64::from(rand::random::<u32>());
    let candidates = (0..users.count()).map(|n| users.first + ((from + n) % users.count()) as u32);
    for user in candidates {
        // Answers with a priority if somebody is that user.
        nix::errno::Errno::clear();
        // SAFETY: no memory is passed.
        let found = unsafe { libc::getpriority(libc::PRIO_USER, user) };
        if found == -1 && nix::errno::Errno::last() == nix::errno::Errno::ESRCH {
            return Ok(Some(user));
        }
    }
    let message = format!("every user of {users} has processes");
    Err(Error::new(ErrorKind::Io, message).hint("give machines more users: machine_uids in the configuration"))
}

/// What the process may open; none where the kernel has no Landlock.
fn ruleset(needs: &Needs) -> Result<Option<OwnedFd>> {
    let failed = |e: &dyn fmt::Display| Error::new(ErrorKind::Io, format!("Landlock: {e}"));
    let ports = if needs.network { AccessNet::BindTcp.into() } else { AccessNet::from_all(RIGHTS) };
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(RIGHTS))
        .and_then(|rules| rules.handle_access(ports))
        .and_then(|rules| rules.scope(Scope::from_all(RIGHTS)))
        .and_then(|rules| rules.create())
        .map_err(|e| failed(&e))?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let change = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let program = needs.program.canonicalize().unwrap_or_else(|_| needs.program.clone());
    let mut allow = |path: &Path, rights: BitFlags<AccessFs>| -> Result<()> {
        let Ok(file) = PathFd::new(path) else { return Ok(()) };
        // A right of directories is none of a file's.
        let rights = if path.is_dir() { rights } else { rights & AccessFs::from_file(RIGHTS) };
        rules.as_mut().add_rule(PathBeneath::new(file, rights)).map(drop).map_err(|e| failed(&e))
    };
    for path in PROGRAMS.iter().map(Path::new).chain([program.as_path()]) {
        allow(path, read | AccessFs::Execute)?;
    }
    for (path, rights) in [("/dev/null", change), ("/dev/zero", read), ("/dev/urandom", read)] {
        allow(Path::new(path), rights)?;
    }
    for (path, use_of) in &needs.files {
        allow(path, if *use_of == Use::Read { read } else { change })?;
    }
    Ok(rules.into())
}

/// Runs a tool that reads what others have made to its end, locked up, and returns what it printed.
///
/// `reads` are files and directories of any user, `writes` files of this process's own that are there; `file_bytes` is how
/// long these may become.
///
/// # Errors
/// Of the system; `NotFound` when there is no such program. Where the host cannot lock it up, it is not run.
pub(crate) fn run_tool(
    command: &mut Command,
    reads: &[&Path],
    writes: &[&Path],
    file_bytes: u64,
) -> io::Result<Output> {
    let turn = lock_up_tool(command, reads, writes, file_bytes)?;
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    drop(turn);
    let output = child.and_then(std::process::Child::wait_with_output);
    for path in writes.iter().filter(|_| nix::unistd::geteuid().is_root()) {
        std::os::unix::fs::lchown(path, Some(0), Some(0))?;
    }
    output
}

/// Has a tool be locked up when it is spawned, which must be before the turn is dropped.
pub(crate) fn lock_up_tool(
    command: &mut Command,
    reads: &[&Path],
    writes: &[&Path],
    file_bytes: u64,
) -> io::Result<Turn> {
    let program = find(Path::new(command.get_program()));
    let files = reads.iter().map(|path| (path.to_path_buf(), Use::Read));
    let files = files.chain(writes.iter().map(|path| (path.to_path_buf(), Use::Write)));
    let needs = Needs {
        program,
        files: files.chain([("/etc/mke2fs.conf".into(), Use::Read)]).collect(),
        reads_of_any_user: true,
        limits: vec![
            (Limit::FileBytes, file_bytes),
            (Limit::CpuSeconds, TOOL_SECONDS),
            (Limit::AddressSpace, TOOL_MEMORY_BYTES),
            (Limit::Threads, TOOL_THREADS),
        ],
        ..Needs::default()
    };
    let (cell, turn) = Cell::new(needs).map_err(|e| io::Error::other(e.message))?;
    if let Some(user) = cell.user() {
        for path in writes {
            // Not by its name: it is a file of ours, and no link to another.
            let file = File::options().write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
            nix::unistd::fchown(&file, Some(user.into()), Some(user.into()))?;
        }
    }
    // Nothing of this process's environment is for what may be taken over.
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    // SAFETY: between fork and exec only system calls are made, on what was allocated before.
    unsafe { command.pre_exec(move || cell.enter()) };
    Ok(turn)
}

/// The file that is run under a name.
pub(crate) fn find(program: &Path) -> PathBuf {
    if program.components().count() != 1 {
        return std::path::absolute(program).unwrap_or_else(|_| program.to_owned());
    }
    find_program(program).unwrap_or_else(|| program.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_users_are_read_and_root_is_in_none() {
        let users: Users = "200000-265535".parse().unwrap();
        assert_eq!((users.range(), users.to_string().as_str()), ((200_000, 265_535), "200000-265535"));
        for wrong in ["", "5", "0-10", "9-8", "a-b", "1-4294967295", "-1-5", "1-2-3"] {
            assert!(wrong.parse::<Users>().is_err(), "{wrong}");
        }
        assert_eq!(Users::DEFAULT.to_string().parse(), Ok(Users::DEFAULT));
    }

    #[test]
    fn users_that_a_container_does_not_have_are_found_out() {
        let users: Users = "1000-1999".parse().unwrap();
        assert!(is_mapped("         0          0 4294967295\n", users));
        assert!(is_mapped("0 100000 500\n1000 200000 1000\n", users));
        assert_eq!(named_among("root:x:0:0::/:\nweb:x:1500:5::/:\n", users), Some("web"));
        assert_eq!(named_among("root:x:0:0::/:\nbroken\nweb:x:2000:1500::/:\n", users), None);
        for map in ["0 100000 1000\n", "0 100000 1999\n", "1001 5 70000\n", "nonsense\n"] {
            assert!(!is_mapped(map, users), "{map}");
        }
    }

    /// What a shell says that runs in a cell of these needs.
    fn told(script: &str, needs: Needs) -> String {
        let (cell, turn) = Cell::new(Needs { program: "/bin/sh".into(), ..needs }).unwrap();
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script);
        // SAFETY: between fork and exec only system calls are made.
        unsafe { command.pre_exec(move || cell.enter()) };
        let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        drop(turn);
        String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
    }

    #[test]
    fn a_cell_has_what_was_named_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        // As if users' rights were no hindrance.
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["read", "written", "other"] {
            std::fs::write(at(name), name).unwrap();
            std::fs::set_permissions(at(name), std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        }
        let script = format!(
            "cd {}; cat read other; echo x >> read; echo more >> written; cat written; echo > new; ulimit -c; ulimit -n; \
             cat /etc/hostname /proc/1/cmdline; grep -h '^[A-Za-z]' /dev/null",
            dir.path().display()
        );
        let files = vec![(at("read"), Use::Read), (at("written"), Use::Write), (at("missing"), Use::Read)];
        let needs = Needs { files, ..Needs::default() };
        let told = told(&script, needs);
        assert_eq!(std::fs::read(at("read")).unwrap(), b"read");
        assert!(!at("new").exists());
        assert!(told.starts_with("readwrittenmore\n0\n"), "{told}");
        assert_eq!(told.lines().count(), 3, "{told}");
        assert!(told.lines().last().unwrap().parse::<u64>().unwrap() <= OPEN_FILES_MAX, "{told}");
    }

    #[test]
    fn each_process_is_another_user_without_privileges() {
        let script = "while read -r line; do echo \"$line\"; done < /proc/self/status";
        let told = told(script, Needs { files: vec![("/proc".into(), Use::Read)], ..Needs::default() });
        let field = |name: &str| told.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        let text = |name: &str| field(name).unwrap_or_else(|| panic!("no {name} in {told}")).to_owned();
        assert_eq!(text("NoNewPrivs"), "1");
        let ids: Vec<u32> = text("Uid").split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        if nix::unistd::geteuid().is_root() {
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(text(set), "0000000000000000", "{set}");
            }
            assert_eq!(text("Groups"), "");
            assert_eq!(text("Uid"), text("Gid"));
            assert!(Users::DEFAULT.first <= ids[0], "{ids:?}");
        } else {
            assert_eq!(ids[0], nix::unistd::geteuid().as_raw());
        }
    }

    #[test]
    fn a_tool_reads_what_is_anybodys_and_writes_what_it_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["in", "out", "secret"] {
            std::fs::write(at(name), name).unwrap();
            std::fs::set_permissions(at(name), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        }
        let script = format!(
            "cat {0}/in; cat {0}/secret; echo {0}/*; cat {0}/in > {0}/out; head -c 3000000 /dev/zero > {0}/out; \
             echo $MIOSA_JAIL_TEST $HOME; true",
            dir.path().display()
        );
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).env("HOME", "/root");
        let output = run_tool(&mut command, &[&at("in")], &[&at("out")], 1 << 20).unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.starts_with("in") && !said.contains("secret\n") && !said.contains("/root"), "{said}");
        let left = std::fs::metadata(at("out")).unwrap();
        assert_eq!(left.len(), 1 << 20, "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&left), nix::unistd::geteuid().as_raw());
    }
}
