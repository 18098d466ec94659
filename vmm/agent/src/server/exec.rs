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
use super::terminal::Terminal;
use super::users::{self, User};
use super::{Cancelled, Stream, System, Waited};
use crate::wire::{AgentError, ErrorKind, ExecRequest, ExitStatus, Kind};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most of what a program wrote last that is still in the pipe when it has ended: the largest pipe there is.
const PIPE_BYTES_MAX: usize = 1 << 20;

/// How long a program whose terminal hangs up has to end by itself.
const HANG_UP_GRACE: Duration = Duration::from_secs(2);
/// What the end key of a terminal sends, Ctrl-D.
const END_OF_INPUT: u8 = 4;

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

    /// Signals a stream's program: the foreground group of its terminal, or its own.
    pub(super) fn signal_stream(&self, stream: &Stream, signal: libc::c_int) {
        let state = stream.state.lock();
        let (pid, foreground) = (state.pid, state.terminal.as_ref().and_then(Terminal::foreground));
        drop(state);
        match (foreground, pid) {
            // SAFETY: plain system call; the group is of this terminal's session a moment ago.
            (Some(group), _) => drop(unsafe { libc::killpg(group, signal) }),
            (None, Some(pid)) => self.signal_group(pid, signal),
            (None, None) => {}
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
    terminal: Option<Terminal>,
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
    let (mut command, terminal) = command(system, request)?;
    let over = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map(Arc::new)
        .map_err(|e| AgentError::io("eventfd", &e.into()))?;
    let program = request.argv.first().map(String::as_str).unwrap_or_default();
    let child = system.children().spawn(&mut command, stream).map_err(|e| AgentError::io(program, &e))?;
    let kill_at = request.timeout_ms.and_then(|ms| now.checked_add(Duration::from_millis(ms)));
    if let Some(terminal) = &terminal {
        stream.runs(child.id() as i32, Some(terminal.again().map_err(|e| AgentError::io("terminal", &e))?));
    } else {
        stream.runs(child.id() as i32, None);
    }
    Ok(Started { child, terminal, over, kill_at })
}

/// Moves a program's data until it has ended, or kills it when its time is over or its stream is cancelled.
pub(super) fn watch(system: &dyn System, stream: &Arc<Stream>, started: Started) -> Result<ExitStatus, AgentError> {
    let (children, pid) = (system.children(), started.pid());
    let Started { mut child, terminal, over, kill_at } = started;
    let on_terminal = terminal.is_some();
    let (stdin, outputs) = match terminal {
        Some(terminal) => {
            let (read, write) = terminal.ends().map_err(|e| AgentError::io("terminal", &e))?;
            (Some(write), [(Some(read), Kind::Data), (None, Kind::ErrData)])
        }
        None => {
            let (out, err) = (child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from));
            (child.stdin.take().map(OwnedFd::from), [(out, Kind::Data), (err, Kind::ErrData)])
        }
    };
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
            if let Err(error) = builder().spawn_scoped(scope, move || pump_in(&stream, pipe, on_terminal, &over)) {
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
                if on_terminal && matches!(waited, Waited::Cancelled) {
                    // A shell tells its jobs, which have groups of their own.
                    children.signal_stream(stream, libc::SIGHUP);
                    children.signal_group(pid, libc::SIGHUP);
                    stream.wait_exit(Some(Instant::now() + HANG_UP_GRACE), false);
                }
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

fn command(system: &dyn System, request: &ExecRequest) -> Result<(Command, Option<Terminal>), AgentError> {
    let invalid = |message: &str| AgentError::new(ErrorKind::Invalid, message);
    let user = users::find(system, request.user.as_deref())?;
    let (program, arguments) = match request.argv.split_first() {
        Some((program, arguments)) => (program.clone(), arguments),
        None if request.tty.is_some() => (user.shell.clone(), &[][..]),
        None => return Err(invalid("argv is empty")),
    };
    if program.is_empty() {
        return Err(invalid("the program's name is empty"));
    }
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
    let mut command = Command::new(&program);
    if request.argv.is_empty() {
        // What tells a shell that it is a login shell.
        command.arg0(format!("-{}", program.rsplit('/').next().unwrap_or_default()));
    }
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
    let terminal = match request.tty {
        Some(size) => {
            let terminal = Terminal::open(size).map_err(|e| AgentError::io("terminal", &e))?;
            terminal.attach(&mut command, user.uid).map_err(|e| AgentError::io("terminal", &e))?;
            Some(terminal)
        }
        None => {
            command.stdin(if request.stdin { Stdio::piped() } else { Stdio::null() });
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            None
        }
    };
    become_user(&mut command, user, terminal.is_some());
    Ok((command, terminal))
}

/// Has the child lead a session, hence a process group, of its own and take on the user.
fn become_user(command: &mut Command, user: User, on_terminal: bool) {
    let switch = user.uid != 0;
    let groups: Vec<libc::gid_t> = user.groups;
    let (uid, gid) = (user.uid, user.gid);
    // SAFETY: between fork and exec the closure makes only plain system calls; it allocates and locks nothing, and what
    // it reads was made before the fork.
    unsafe {
        command.pre_exec(move || {
            let check = |result: libc::c_int| if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) };
            check(libc::setsid())?;
            if on_terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
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
fn pump_out(stream: &Stream, pipe: OwnedFd, kind: Kind, over: &EventFd) {
    set_nonblocking(&pipe);
    let mut pipe = File::from(pipe);
    let mut bytes = vec![0; 32 * 1024];
    let mut left = PIPE_BYTES_MAX;
    let mut running = true;
    while left > 0 {
        running = running && ready(&pipe, PollFlags::POLLIN, over);
        match pipe.read(&mut bytes) {
            Ok(0) => return,
            Ok(len) => {
                if !running {
                    left = left.saturating_sub(len);
                }
                if stream.send(kind, &bytes[..len]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && running => {}
            Err(_) => return,
        }
    }
}

/// Gives the program what the host sends. When the program has closed its input, the rest is dropped, so that the host
/// is not held up. A terminal is not closed at the end: it is sent what the end key sends.
fn pump_in(stream: &Stream, pipe: OwnedFd, on_terminal: bool, over: &EventFd) {
    set_nonblocking(&pipe);
    let mut pipe = Some(File::from(pipe));
    while let Ok(Some(bytes)) = stream.receive_next() {
        if !write_all(&mut pipe, &bytes, over) {
            return;
        }
    }
    if on_terminal {
        write_all(&mut pipe, &[END_OF_INPUT], over);
    }
}

/// False when the program is over.
fn write_all(pipe: &mut Option<File>, mut rest: &[u8], over: &EventFd) -> bool {
    while !rest.is_empty()
        && let Some(writable) = pipe
    {
        if !ready(writable, PollFlags::POLLOUT, over) {
            return false;
        }
        match writable.write(rest) {
            Ok(len) => rest = &rest[len..],
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => *pipe = None,
        }
    }
    true
}
