//! Processes that are never left behind.
//!
//! A machine's process is written down in its run directory as pid and start time. Both together name one process for
//! the life of the host: pids come again, but not with the same start time. A process is signalled through a pidfd that
//! was opened first and checked after, so that what is killed is what was checked.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{AccessFlags, access};

use crate::{Error, ErrorKind, Reaped, Result};

/// Environment variable of a machine's process with its run directory: it finds those whose record was never written
/// because the daemon died in that moment.
pub const RUN_DIR_VARIABLE: &str = "MIOSA_RUN_DIR";
/// Name of the record in a machine's run directory.
pub const RECORD: &str = "pid";
/// Longest path of a Unix socket, in bytes.
pub const SOCKET_PATH_MAX: usize = 107;
/// The longest a killed process may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// Where a program of this name is that can be run: in the path, or where a user's path does not lead.
pub fn find_program(name: &Path) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(name)).find(|file| access(file, AccessFlags::X_OK).is_ok())
}

/// Whether a socket can be at this path.
///
/// # Errors
/// `Invalid` for a path longer than [`SOCKET_PATH_MAX`].
pub fn check_socket_path(path: &Path) -> Result<()> {
    let len = path.as_os_str().len();
    if len <= SOCKET_PATH_MAX {
        return Ok(());
    }
    let message = format!("the socket path {} has {len} bytes; Unix allows {SOCKET_PATH_MAX}", path.display());
    Err(Error::new(ErrorKind::Invalid, message).hint("use a shorter state or run directory"))
}

/// One process, for ever: its pid will not come again with this start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// The pid.
    pub pid: i32,
    /// Its start, in clock ticks since the host's boot.
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process that has this pid now; `None` when there is none or it has ended.
    pub fn of(pid: i32) -> Option<ProcessId> {
        let (state, start_ticks) = parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        (state != 'Z' && state != 'X').then_some(ProcessId { pid, start_ticks })
    }

    /// A child of ours that nobody has waited for, ended or not, and a descriptor of it.
    ///
    /// # Errors
    /// `Io` when the system has no descriptor left.
    pub(crate) fn of_child(child: &std::process::Child) -> Result<(ProcessId, OwnedFd)> {
        let pid = child.id() as i32;
        let what = || format!("process {pid}");
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|e| Error::io(what(), e))?;
        let (_, start_ticks) = parse_stat(&stat).ok_or_else(|| Error::io(what(), "its state cannot be read"))?;
        // Its pid cannot be another's before it was waited for.
        let handle = pidfd(pid)?.ok_or_else(|| Error::io(what(), "is not there"))?;
        Ok((ProcessId { pid, start_ticks }, handle))
    }

    /// Writes the record of a machine's process.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(self, run_dir: &Path) -> Result<()> {
        let (path, temporary) = (run_dir.join(RECORD), run_dir.join("pid.tmp"));
        fs::write(&temporary, format!("{} {} {}\n", self.pid, self.start_ticks, boot_id()))
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|e| Error::io(path.display(), e))
    }

    /// Reads a record; `None` when there is none or it is of another boot of the host.
    ///
    /// # Errors
    /// `Invalid` when the record makes no sense.
    pub fn read(run_dir: &Path) -> Result<Option<ProcessId>> {
        let path = run_dir.join(RECORD);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path.display(), error)),
        };
        let invalid = || Error::new(ErrorKind::Invalid, format!("{} is not a process record", path.display()));
        let mut words = text.split_whitespace();
        let pid = words.next().and_then(|word| word.parse().ok()).filter(|pid| *pid > 1).ok_or_else(invalid)?;
        let start_ticks = words.next().and_then(|word| word.parse().ok()).ok_or_else(invalid)?;
        Ok((words.next().unwrap_or_default() == boot_id()).then_some(ProcessId { pid, start_ticks }))
    }

    /// Sends SIGKILL and does not wait. False when the process is gone.
    ///
    /// # Errors
    /// `Io` when it may not be killed.
    pub fn send_kill(self) -> Result<bool> {
        self.kill_handle().map(|handle| handle.is_some())
    }

    /// Kills the process and waits until it is gone. False when it was gone before.
    ///
    /// # Errors
    /// `Io` when it may not be killed or does not go away.
    pub fn kill(self) -> Result<bool> {
        let Some(handle) = self.kill_handle()? else { return Ok(false) };
        let mut fds = [PollFd::new(handle.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(KILL_PATIENCE).unwrap_or(PollTimeout::MAX)) {
            Ok(ready) if ready > 0 => Ok(true),
            Ok(_) => Err(Error::io(format!("process {}", self.pid), "was killed but does not go away")),
            Err(errno) => Err(Error::io(format!("wait for process {}", self.pid), errno)),
        }
    }

    fn kill_handle(self) -> Result<Option<OwnedFd>> {
        let Some(handle) = self.open()? else { return Ok(None) };
        // SAFETY: plain system call on a descriptor that is open; no memory is passed.
        let sent = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, handle.as_raw_fd(), libc::SIGKILL, std::ptr::null::<u8>(), 0)
        };
        if sent == -1 {
            let error = std::io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ESRCH) => Ok(None),
                _ => Err(Error::io(format!("kill process {}", self.pid), error)),
            };
        }
        Ok(Some(handle))
    }

    /// A descriptor of exactly this process, readable once it has ended; `None` when it is gone.
    ///
    /// # Errors
    /// `Io` when the system has no descriptor left.
    pub(crate) fn open(self) -> Result<Option<OwnedFd>> {
        let Some(handle) = pidfd(self.pid)? else { return Ok(None) };
        // Opened first, checked after: while the descriptor is open and the start time matches, it is the one.
        Ok((ProcessId::of(self.pid) == Some(self)).then_some(handle))
    }
}

/// State and start time of a `/proc/PID/stat` line; the name in it may contain anything.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.first()?.chars().next()?, fields.get(19)?.parse().ok()?))
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// A descriptor of the process that has this pid; `None` when there is none.
fn pidfd(pid: i32) -> Result<Option<OwnedFd>> {
    // SAFETY: plain system call without memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ESRCH) => Ok(None),
            _ => Err(Error::io(format!("pidfd of process {pid}"), error)),
        };
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

/// The run directories under `run_root` whose records name live processes.
///
/// # Errors
/// `Io` when `run_root` exists but cannot be listed.
pub fn recorded_alive(run_root: &Path) -> Result<Vec<PathBuf>> {
    let alive =
        |run_dir: &PathBuf| matches!(ProcessId::read(run_dir), Ok(Some(id)) if ProcessId::of(id.pid) == Some(id));
    Ok(run_dirs(run_root)?.into_iter().filter(alive).collect())
}

fn run_dirs(run_root: &Path) -> Result<BTreeSet<PathBuf>> {
    match fs::read_dir(run_root) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(Error::io(run_root.display(), error)),
    }
}

/// Kills the machines under `run_root` whose run directories are not in `keep`, and removes their records; see
/// [`crate::Vmm::reap_orphans`].
///
/// # Errors
/// `Io` when `run_root` exists but cannot be listed.
pub fn reap_orphans(run_root: &Path, keep: &[PathBuf]) -> Result<Vec<Reaped>> {
    let mut run_dirs = run_dirs(run_root)?;
    let started: Vec<_> = started_processes().into_iter().filter(|(_, dir)| dir.parent() == Some(run_root)).collect();
    // A machine may be left whose directory is not.
    run_dirs.extend(started.iter().map(|(_, run_dir)| run_dir.clone()));
    let mut reaped = Vec::new();
    for run_dir in run_dirs.iter().filter(|run_dir| !keep.contains(run_dir)) {
        match end(run_dir, &started) {
            Ok(ended) => reaped.extend(ended),
            Err(error) => tracing::warn!(run_dir = %run_dir.display(), %error, "an orphaned machine cannot be killed"),
        }
    }
    Ok(reaped)
}

/// Kills the machine of one run directory, however much of it there is, and waits until it is gone.
///
/// # Errors
/// `Io` when it may not be killed or does not go away.
pub fn reap(run_dir: &Path) -> Result<Option<Reaped>> {
    end(run_dir, &started_processes())
}

/// Ends the process that the record names, and those among `started` that were started for this directory: a daemon may
/// have died before it had written the record, or while it did.
fn end(run_dir: &Path, started: &[(ProcessId, PathBuf)]) -> Result<Option<Reaped>> {
    let recorded = ProcessId::read(run_dir).unwrap_or_else(|error| {
        tracing::warn!(run_dir = %run_dir.display(), %error, "a machine's record cannot be read");
        None
    });
    let mut processes: Vec<ProcessId> = recorded.into_iter().collect();
    processes.extend(started.iter().filter(|(process, dir)| dir == run_dir && recorded != Some(*process)).map(|s| s.0));
    let mut reaped = None;
    for process in processes {
        let killed = process.kill()?;
        if killed || reaped.is_none() {
            reaped = Some(Reaped { run_dir: run_dir.to_owned(), pid: process.pid, killed });
        }
    }
    crate::cgroup::remove_recorded(run_dir);
    let _ = fs::remove_file(run_dir.join(RECORD));
    Ok(reaped)
}

/// Live processes that were started for a run directory.
fn started_processes() -> Vec<(ProcessId, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // Not ourselves, who may have inherited the variable from a test or shell.
    pids.filter(|pid| *pid != std::process::id() as i32)
        .filter_map(|pid: i32| {
            let process = ProcessId::of(pid)?;
            let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
            let run_dir = environment.split(|byte| *byte == 0).find_map(|variable| {
                let value = variable.strip_prefix(RUN_DIR_VARIABLE.as_bytes())?.strip_prefix(b"=")?;
                Some(PathBuf::from(OsStr::from_bytes(value)))
            })?;
            Some((process, run_dir))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn sleeper() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    #[test]
    fn a_recorded_process_is_killed_and_its_record_removed() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = root.path().join("m1");
        fs::create_dir(&run_dir).unwrap();
        let mut child = sleeper();
        let pid = child.id() as i32;
        ProcessId::of(pid).unwrap().write(&run_dir).unwrap();
        assert_eq!(reap_orphans(root.path(), std::slice::from_ref(&run_dir)).unwrap(), [], "it is to be kept");
        let reaped = reap_orphans(root.path(), &[]).unwrap();
        assert_eq!(reaped, [Reaped { run_dir: run_dir.clone(), pid, killed: true }]);
        assert!(!child.wait().unwrap().success());
        assert!(!run_dir.join(RECORD).exists());
        assert_eq!(reap_orphans(root.path(), &[]).unwrap(), []);
    }

    #[test]
    fn a_process_without_a_record_is_found_by_its_environment() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = root.path().join("m1");
        let mut child = Command::new("sleep").arg("1000").env(RUN_DIR_VARIABLE, &run_dir).spawn().unwrap();
        let pid = child.id() as i32;
        // The kernel lets the parent of a new process go on before the process has its environment.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while fs::read(format!("/proc/{pid}/environ")).unwrap().is_empty() {
            assert!(std::time::Instant::now() < deadline, "the process never had an environment");
            std::thread::yield_now();
        }
        assert_eq!(reap_orphans(&root.path().join("other"), &[]).unwrap(), []);
        assert_eq!(reap_orphans(root.path(), &[]).unwrap(), [Reaped { run_dir, pid, killed: true }]);
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn another_process_with_the_same_pid_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = root.path().join("m1");
        fs::create_dir(&run_dir).unwrap();
        let mut child = sleeper();
        let pid = child.id() as i32;
        let now = ProcessId::of(pid).unwrap();
        ProcessId { start_ticks: now.start_ticks - 1, ..now }.write(&run_dir).unwrap();
        assert_eq!(reap_orphans(root.path(), &[]).unwrap(), [Reaped { run_dir, pid, killed: false }]);
        assert_eq!(child.try_wait().unwrap(), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_broken_record_stops_nothing() {
        let root = tempfile::tempdir().unwrap();
        for text in ["", "x y z", "1 2 3", "-5 1 x"] {
            let run_dir = root.path().join(format!("m{}", text.len()));
            fs::create_dir_all(&run_dir).unwrap();
            fs::write(run_dir.join(RECORD), text).unwrap();
        }
        assert_eq!(reap_orphans(root.path(), &[]).unwrap(), []);
        assert_eq!(reap_orphans(&root.path().join("none"), &[]).unwrap(), []);
    }

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 1";
        assert_eq!(parse_stat(stat), Some(('S', 987654)));
        assert_eq!(parse_stat("garbage"), None);
    }

    #[test]
    fn long_socket_paths_are_refused_with_a_hint() {
        assert!(check_socket_path(Path::new(&"a".repeat(107))).is_ok());
        let error = check_socket_path(Path::new(&"a".repeat(108))).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert!(error.hint.is_some());
    }
}
