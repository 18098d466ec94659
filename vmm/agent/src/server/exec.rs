//! Programs: started in a process group of their own, watched, killed as a group, reaped exactly once.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use parking_lot::{Condvar, Mutex};

use super::commands::Commands;
use super::users::{self, User};
use super::{Cancelled, Stream, System, Waited};
use crate::wire::{AgentError, ErrorKind, ExecRequest, ExitStatus, Kind};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most of what a program wrote last that is still in the pipe when it has ended: the largest pipe there is.
const PIPE_BYTES_MAX: usize = 1 << 20;

/// The programs of all streams. A process is in the table from its start until it is reaped, and both happen under the
/// table's lock: so a process that is in the table is really the one that was started.
pub struct Children {
    table: Mutex<HashMap<i32, Arc<Stream>>>,
    started: Condvar,
    init: bool,
    /// Those that run on their own.
    pub(super) commands: Commands,
}

impl Children {
    /// For PID 1, which reaps everybody's orphans: somebody must call [`Children::reap_forever`].
    pub fn of_init() -> Children {
        Children { table: Mutex::default(), started: Condvar::new(), init: true, commands: Commands::default() }
    }

    /// For a process with other children that are none of our business.
    pub fn of_process() -> Children {
        Children { init: false, ..Children::of_init() }
    }

    /// Reaps every process that ends.
    pub fn reap_forever(&self) {
        loop {
            let mut table = self.table.lock();
            match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG) {
                Ok(status) => match status.pid() {
                    Some(pid) => {
                        drop(table);
                        self.reap(pid);
                    }
                    None => {
                        drop(table);
                        // There are children, none has ended yet.
                        let _ = waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
                    }
                },
                // No children; only a start can change that, for orphans come from children.
                Err(Errno::ECHILD) => self.started.wait(&mut table),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn spawn(self: &Children, command: &mut Command, stream: &Arc<Stream>) -> std::io::Result<Child> {
        let mut table = self.table.lock();
        let child = command.spawn()?;
        table.insert(child.id() as i32, stream.clone());
        self.started.notify_all();
        Ok(child)
    }

    /// Takes the status of an ended process and tells its stream, if it has one.
    fn reap(&self, pid: Pid) {
        let mut status = 0;
        let mut table = self.table.lock();
        // SAFETY: waitpid writes one int to the valid pointer it is given. The raw status is wanted: nix refuses
        // real-time signals.
        let reaped = unsafe { libc::waitpid(pid.as_raw(), &mut status, libc::WNOHANG) };
        if reaped == pid.as_raw()
            && let Some(stream) = table.remove(&reaped)
        {
            stream.exited(status);
        }
    }

    /// Signals the process group of a program that has not been reaped.
    pub(super) fn signal_group(&self, pid: i32, signal: libc::c_int) {
        if self.table.lock().contains_key(&pid) {
            // SAFETY: plain system call. nix refuses real-time signals.
            unsafe { libc::killpg(pid, signal) };
        }
    }
}

/// A program that has been started and has to be watched.
pub(super) struct Started {
    child: Child,
    /// Written to once the program is over.
    over: Arc<EventFd>,
    kill_at: Option<Instant>,
}

impl Started {
    pub(super) fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

pub(super) fn run(system: &dyn System, stream: &Arc<Stream>, request: &ExecRequest) -> Result<ExitStatus, AgentError> {
    let started = start(system, stream, request)?;
    watch(system, stream, started)
}

pub(super) fn start(system: &dyn System, stream: &Arc<Stream>, request: &ExecRequest) -> Result<Started, AgentError> {
    let now = Instant::now();
    let mut command = command(system, request)?;
    let over = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map(Arc::new)
        .map_err(|e| AgentError::io("eventfd", &e.into()))?;
    let program = request.argv.first().map(String::as_str).unwrap_or_default();
    let child = system.children().spawn(&mut command, stream).map_err(|e| AgentError::io(program, &e))?;
    let kill_at = request.timeout_ms.and_then(|ms| now.checked_add(Duration::from_millis(ms)));
    Ok(Started { child, over, kill_at })
}

/// Moves a program's data until it has ended, or kills it when its time is over or its stream is cancelled.
pub(super) fn watch(system: &dyn System, stream: &Arc<Stream>, started: Started) -> Result<ExitStatus, AgentError> {
    let (children, pid) = (system.children(), started.pid());
    let Started { mut child, over, kill_at } = started;
    let stdin = child.stdin.take().map(OwnedFd::from);
    let outputs =
        [(child.stdout.take().map(OwnedFd::from), Kind::Data), (child.stderr.take().map(OwnedFd::from), Kind::ErrData)];
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        let mut failed = None;
        let builder = || std::thread::Builder::new().name("agent-exec".into()).stack_size(256 * 1024);
        for (pipe, kind) in outputs {
            let (stream, over) = (stream.clone(), over.clone());
            let Some(pipe) = pipe else { continue };
            match builder().spawn_scoped(scope, move || pump_out(&stream, pipe, kind, &over)) {
                Ok(thread) => threads.push(thread),
                Err(error) => failed = Some(error),
            }
        }
        if let Some(pipe) = stdin {
            let (stream, over) = (stream.clone(), over.clone());
            if let Err(error) = builder().spawn_scoped(scope, move || pump_in(&stream, pipe, &over)) {
                failed = Some(error);
            }
        }
        if !children.init
            && let Err(error) = builder().spawn_scoped(scope, || {
                let _ = waitid(Id::Pid(Pid::from_raw(pid)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
                children.reap(Pid::from_raw(pid));
            })
        {
            failed = Some(error);
        }
        if failed.is_some() {
            stream.cancel();
        }
        let waited = stream.wait_exit(kill_at, true);
        let (status, timed_out) = match waited {
            Waited::Exited(status) => (status, false),
            Waited::TimedOut | Waited::Cancelled => {
                children.signal_group(pid, libc::SIGKILL);
                if failed.is_some() && !children.init {
                    let _ = waitid(Id::Pid(Pid::from_raw(pid)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
                    children.reap(Pid::from_raw(pid));
                }
                match stream.wait_exit(None, false) {
                    // It may have ended by itself in the same moment.
                    Waited::Exited(status) => (status, matches!(waited, Waited::TimedOut) && libc::WIFSIGNALED(status)),
                    Waited::TimedOut | Waited::Cancelled => return Err(Cancelled.into()),
                }
            }
        };
        let _ = over.write(1);
        for thread in threads {
            let _ = thread.join();
        }
        if let Some(error) = failed {
            return Err(AgentError::io("the guest cannot start a thread", &error));
        }
        Ok(exit_status(status, timed_out))
    })
}

fn exit_status(status: i32, timed_out: bool) -> ExitStatus {
    if libc::WIFSIGNALED(status) {
        ExitStatus { code: None, signal: Some(libc::WTERMSIG(status)), timed_out }
    } else {
        ExitStatus { code: Some(libc::WEXITSTATUS(status)), signal: None, timed_out }
    }
}

fn command(system: &dyn System, request: &ExecRequest) -> Result<Command, AgentError> {
    let invalid = |message: &str| AgentError::new(ErrorKind::Invalid, message);
    let Some((program, arguments)) = request.argv.split_first() else { return Err(invalid("argv is empty")) };
    if program.is_empty() {
        return Err(invalid("the program's name is empty"));
    }
    let user = users::find(system, request.user.as_deref())?;
    let cwd = match &request.cwd {
        Some(cwd) => {
            let path = system.path(cwd)?;
            let meta = std::fs::metadata(&path).map_err(|e| AgentError::io(format!("working directory {cwd}"), &e))?;
            if !meta.is_dir() {
                return Err(AgentError::new(ErrorKind::NotDirectory, format!("{cwd}: is not a directory")));
            }
            path
        }
        None => {
            let workspace = system.path("/workspace")?;
            if workspace.is_dir() { workspace } else { system.path("/")? }
        }
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().current_dir(cwd);
    for (name, value) in [
        ("PATH", DEFAULT_PATH),
        ("HOME", &user.home),
        ("USER", &user.name),
        ("LOGNAME", &user.name),
        ("SHELL", &user.shell),
        ("TERM", "xterm-256color"),
        ("LANG", "C.UTF-8"),
    ] {
        command.env(name, value);
    }
    for (name, value) in &request.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(invalid("an environment variable has a bad name or value"));
        }
        command.env(name, value);
    }
    command.stdin(if request.stdin { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    become_user(&mut command, user);
    Ok(command)
}

/// Has the child lead a session, hence a process group, of its own and take on the user.
fn become_user(command: &mut Command, user: User) {
    let switch = user.uid != 0;
    let groups: Vec<libc::gid_t> = user.groups;
    let (uid, gid) = (user.uid, user.gid);
    // SAFETY: between fork and exec the closure makes only plain system calls; it allocates and locks nothing, and what
    // it reads was made before the fork.
    unsafe {
        command.pre_exec(move || {
            let check = |result: libc::c_int| if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) };
            check(libc::setsid())?;
            if switch {
                check(libc::setgroups(groups.len(), groups.as_ptr()))?;
                check(libc::setresgid(gid, gid, gid))?;
                check(libc::setresuid(uid, uid, uid))?;
            }
            Ok(())
        });
    }
}

/// Waits until `pipe` is ready; false when the program is over first.
fn ready(pipe: &impl AsFd, events: PollFlags, over: &EventFd) -> bool {
    loop {
        let mut fds = [PollFd::new(pipe.as_fd(), events), PollFd::new(over.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(_) => return false,
            Ok(_) => {}
        }
        let [pipe, over] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        if !over.is_empty() {
            return false;
        }
        if !pipe.is_empty() {
            return true;
        }
    }
}

fn set_nonblocking(pipe: &OwnedFd) {
    let _ = fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
}

/// Sends what the program writes. After the program's end, only what it left in the pipe: a process that it left
/// behind may hold the pipe open for ever.
///
/// Gives the pipe back, which is closed once the program is dead: one that is killed for its stream's end is to die of
/// that, and not of a closed pipe shortly before.
fn pump_out(stream: &Stream, pipe: OwnedFd, kind: Kind, over: &EventFd) -> File {
    set_nonblocking(&pipe);
    let mut pipe = File::from(pipe);
    let mut bytes = vec![0; 32 * 1024];
    let mut left = PIPE_BYTES_MAX;
    let mut running = true;
    while left > 0 {
        running = running && ready(&pipe, PollFlags::POLLIN, over);
        match pipe.read(&mut bytes) {
            Ok(0) => break,
            Ok(len) => {
                if !running {
                    left = left.saturating_sub(len);
                }
                if stream.send(kind, &bytes[..len]).is_err() {
                    break;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && running => {}
            Err(_) => break,
        }
    }
    pipe
}

/// Gives the program what the host sends. When the program has closed its input, the rest is dropped, so that the host
/// is not held up.
fn pump_in(stream: &Stream, pipe: OwnedFd, over: &EventFd) {
    set_nonblocking(&pipe);
    let mut pipe = Some(File::from(pipe));
    while let Ok(Some(bytes)) = stream.receive_next() {
        let mut rest: &[u8] = &bytes;
        while !rest.is_empty()
            && let Some(writable) = &mut pipe
        {
            if !ready(writable, PollFlags::POLLOUT, over) {
                return;
            }
            match writable.write(rest) {
                Ok(len) => rest = &rest[len..],
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => pipe = None,
            }
        }
    }
}
