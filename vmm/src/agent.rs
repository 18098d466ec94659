//! The async client of the guest agent.
//!
//! An [`Agent`] is a cheap handle on one connection; any number of calls run over it at once, each on its own stream
//! with its own credit (see [`miosa_agent::wire`]), so a slow reader of one never holds up another. The guest is not
//! trusted: whatever it sends beyond its credit, or that does not parse, ends the connection with `AgentLost`.

mod connection;
mod port;

use std::path::Path;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use miosa_agent::wire::{
    CommandStatus, DirEntry, ExecRequest, ExitStatus, FileStat, GuestInfo, Identity, Kind, MAX_CONNECT_MS, MAX_ENTRY,
    Mount, Reply, Request, Root, TerminalSize, TreeSummary,
};
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::{Error, ErrorKind, Result};
use connection::{Connection, Control, Event, Input, Stream};
pub use port::PortStream;

/// How long a single answer may take unless [`Agent::with_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A client of one guest's agent. Clones share the connection; it closes when the last clone and stream are dropped.
#[derive(Clone, Debug)]
pub struct Agent {
    connection: Connection,
    timeout: Duration,
}

impl Agent {
    /// Connects to the agent's socket and greets the guest, waiting for socket and guest until `deadline` is over. All
    /// streams of an earlier connection are ended by this, and a frozen guest is thawed.
    ///
    /// # Errors
    /// `AgentTimeout`; `AgentLost` when the connection breaks or the guest speaks another version; `Invalid` for a
    /// socket path that is too long.
    pub async fn connect(socket: &Path, deadline: Duration) -> Result<Agent> {
        let at = crate::machine::deadline_at(deadline);
        crate::process::check_socket_path(socket)?;
        let stream = loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= at => {
                    let message = format!("cannot connect to the agent's socket {}: {error}", socket.display());
                    return Err(Error::new(ErrorKind::AgentTimeout, message));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        };
        Agent::over(stream, at.saturating_duration_since(Instant::now())).await
    }

    /// Greets the guest over a connected socket.
    ///
    /// # Errors
    /// As [`Agent::connect`].
    pub async fn over(stream: UnixStream, deadline: Duration) -> Result<Agent> {
        let at = crate::machine::deadline_at(deadline);
        match tokio::time::timeout_at(at, Connection::open(stream)).await {
            Ok(connection) => Ok(Agent { connection: connection?, timeout: DEFAULT_TIMEOUT }),
            Err(_) => Err(Error::new(ErrorKind::AgentTimeout, "the guest's agent did not answer the greeting in time")),
        }
    }

    /// Closes the connection for all clones, so that another client can take the port over. Calls and streams end with
    /// `AgentLost`.
    pub fn disconnect(&self) {
        self.connection.close();
    }

    /// The same connection with another limit on single answers (not on the running time of programs).
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Agent {
        self.timeout = timeout;
        self
    }

    /// Asks whether the agent is there, and who it is.
    ///
    /// # Errors
    /// As every call: `AgentTimeout`, `AgentLost`.
    pub async fn ping(&self) -> Result<GuestInfo> {
        match self.call(Request::Ping).await? {
            Reply::Pong(info) => Ok(info),
            other => Err(unexpected(&other)),
        }
    }

    /// Starts a program. Errors of starting it (`NotFound`, `Permission`, …) come from the first
    /// [`ExecStream::next_event`]. Dropping the stream kills the program's whole process group.
    ///
    /// # Errors
    /// `Invalid` when the request is larger than 64 KiB; `AgentLost`.
    pub async fn exec(&self, request: ExecRequest) -> Result<ExecStream> {
        let limit = request.timeout_ms.map(Duration::from_millis);
        let has_stdin = request.stdin;
        let stream = self.open(Request::Exec(request)).await?;
        let stdin = has_stdin.then(|| Stdin { input: stream.input() });
        let deadline = limit.map(|limit| crate::machine::deadline_at(limit.saturating_add(self.timeout)));
        Ok(ExecStream { stream, stdin, deadline, grace: self.timeout, over: false })
    }

    /// Starts a program that goes on by itself; `id` names it from then on, also for the next connection. It ends with the
    /// guest. The end of its output is kept.
    ///
    /// # Errors
    /// Guest errors of starting it; `Guest(Busy)` when too many run.
    pub async fn start(&self, id: String, name: Option<String>, exec: ExecRequest) -> Result<CommandStatus> {
        self.command_call(Request::Start { id, name, exec }).await
    }

    /// The programs that were started so, oldest first: those that run and the last ones that have ended.
    ///
    /// # Errors
    /// As every call.
    pub async fn commands(&self) -> Result<Vec<CommandStatus>> {
        match self.call(Request::Commands).await? {
            Reply::Commands(all) => Ok(all),
            other => Err(unexpected(&other)),
        }
    }

    /// What is kept of such a program's output; with `follow` until it has ended. A stream that is over without an exit
    /// found the program running. Dropping it leaves the program alone.
    ///
    /// # Errors
    /// `AgentLost` here; `Guest(NotFound)` from the first [`ExecStream::next_event`].
    pub async fn command_logs(&self, id: String, follow: bool) -> Result<ExecStream> {
        let stream = self.open(Request::CommandLogs { id, follow }).await?;
        Ok(ExecStream { stream, stdin: None, deadline: None, grace: self.timeout, over: false })
    }

    /// Sends a signal to such a program's process group; without one ends it, by SIGTERM and a little later SIGKILL.
    ///
    /// # Errors
    /// `Guest(NotFound)`, `Guest(Invalid)` for a signal that is none.
    pub async fn kill_command(&self, id: String, signal: Option<i32>) -> Result<CommandStatus> {
        self.command_call(Request::KillCommand { id, signal }).await
    }

    async fn command_call(&self, request: Request) -> Result<CommandStatus> {
        match self.call(request).await? {
            Reply::Command(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Runs a program to its end and keeps at most `max_output` bytes of each of its outputs; the rest is read and
    /// dropped.
    ///
    /// # Errors
    /// Those of [`Agent::exec`] and [`ExecStream::next_event`].
    pub async fn run(&self, request: ExecRequest, max_output: usize) -> Result<ExecOutput> {
        self.exec(request).await?.collect(max_output).await
    }

    /// Reads a file of any size in pieces. Dropping the reader stops the guest.
    ///
    /// # Errors
    /// `AgentLost` here; errors of the file come from [`FileReader::next`].
    pub async fn read_file(&self, path: impl Into<String>) -> Result<FileReader> {
        self.read_range(path, 0, None).await
    }

    /// Reads a part of a file: from `offset`, at most `len` bytes. Beyond the end there is nothing.
    ///
    /// # Errors
    /// As [`Agent::read_file`].
    pub async fn read_range(&self, path: impl Into<String>, offset: u64, len: Option<u64>) -> Result<FileReader> {
        let stream = self.open(Request::ReadFile { path: path.into(), offset, len }).await?;
        Ok(FileReader { stream, timeout: self.timeout, over: false })
    }

    /// Reads a directory and all that is in it, as a tar archive in pieces.
    ///
    /// # Errors
    /// As [`Agent::read_file`]; `Guest(NotDirectory)`.
    pub async fn read_tree(&self, path: impl Into<String>) -> Result<FileReader> {
        let stream = self.open(Request::ReadTree { path: path.into() }).await?;
        Ok(FileReader { stream, timeout: self.timeout, over: false })
    }

    /// Unpacks a tar archive into a directory; see [`TreeWriter`]. With `delete`, what is in the directory and not in the
    /// archive is removed at the end.
    ///
    /// # Errors
    /// `AgentLost` here; errors of the archive and its files come from the writer's methods.
    pub async fn write_tree(&self, path: impl Into<String>, delete: bool) -> Result<TreeWriter> {
        let stream = self.open(Request::WriteTree { path: path.into(), delete }).await?;
        Ok(TreeWriter { upload: Upload { input: stream.input(), stream, timeout: self.timeout } })
    }

    /// Connects to a TCP port of the guest's own loopback. While nothing listens there, the guest tries again for `wait`,
    /// at most ten minutes, and at least once. Dropping the connection ends it.
    ///
    /// # Errors
    /// `Guest(Refused)` when nothing listens, `Guest(Timeout)` when what listens does not accept; `AgentLost`,
    /// `AgentTimeout`.
    pub async fn connect_port(&self, port: u16, wait: Duration) -> Result<PortStream> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).min(MAX_CONNECT_MS);
        let mut stream = self.open(Request::Connect { port, wait_ms }).await?;
        let limit = self.timeout.saturating_add(Duration::from_millis(wait_ms));
        match within(crate::machine::deadline_at(limit), stream.next()).await? {
            Event::Connected => Ok(PortStream::new(stream)),
            Event::End(outcome) => Err(outcome.map_or_else(Error::from, |reply| unexpected(&reply))),
            Event::Data(_) | Event::ErrData(_) | Event::Eof => Err(no_connection()),
        }
    }

    /// What is in a directory, by name, at most `max` entries.
    ///
    /// # Errors
    /// Guest errors; `Invalid` when there are more than `max`; `AgentLost` for what is no list.
    pub async fn list(&self, path: impl Into<String>, max: usize) -> Result<Vec<DirEntry>> {
        let stream = self.open(Request::List { path: path.into() }).await?;
        let mut reader = FileReader { stream, timeout: self.timeout, over: false };
        let (mut bytes, mut entries) = (BytesMut::new(), Vec::new());
        while let Some(piece) = reader.next().await? {
            bytes.extend_from_slice(&piece);
            while let Some(entry) = take_entry(&mut bytes)? {
                if entries.len() == max {
                    return Err(Error::new(ErrorKind::Invalid, format!("the directory has more than {max} entries")));
                }
                entries.push(entry);
            }
        }
        if bytes.is_empty() { Ok(entries) } else { Err(no_list()) }
    }

    /// Makes a directory and those above it; fine when it is there.
    ///
    /// # Errors
    /// Guest errors.
    pub async fn make_dir(&self, path: impl Into<String>, mode: Option<u32>) -> Result<()> {
        self.done(Request::MakeDir { path: path.into(), mode }).await
    }

    /// Removes a file, a link or a directory; with `recursive` all that is in it.
    ///
    /// # Errors
    /// Guest errors.
    pub async fn remove(&self, path: impl Into<String>, recursive: bool) -> Result<()> {
        self.done(Request::Remove { path: path.into(), recursive }).await
    }

    /// Gives a file or directory another name.
    ///
    /// # Errors
    /// Guest errors.
    pub async fn rename(&self, from: impl Into<String>, to: impl Into<String>) -> Result<()> {
        self.done(Request::Rename { from: from.into(), to: to.into() }).await
    }

    /// Makes the guest one sandbox and no other.
    ///
    /// # Errors
    /// Guest errors; `Guest(Invalid)` for an id or a name that is none.
    pub async fn identify(&self, identity: Identity) -> Result<Identified> {
        match self.call(Request::Identify(identity)).await? {
            Reply::Identified { fresh, host_keys_missing } => Ok(Identified { fresh, host_keys_missing }),
            other => Err(unexpected(&other)),
        }
    }

    /// Mounts a disk besides the root; fine when it is mounted there already.
    ///
    /// # Errors
    /// `Guest(NotFound)` when there is no such disk; other guest errors.
    pub async fn mount(&self, wanted: Mount) -> Result<()> {
        self.done(Request::Mount(wanted)).await
    }

    /// Gives a guest its root that was started to wait for one; fine when it has it. Until then nothing else can be asked
    /// of it.
    ///
    /// # Errors
    /// Guest errors; the guest is of no use then.
    pub async fn mount_root(&self, root: Root) -> Result<()> {
        self.done(Request::MountRoot(root)).await
    }

    /// Writes a file of any size: the file at `path` is the old one until [`FileWriter::finish`] has returned, then
    /// the new one. Missing parent directories are made. `mode` are permission bits; `None` keeps those of the file
    /// that is there (else 0644). The owner of a replaced file is kept. Dropping the writer leaves the old file.
    ///
    /// # Errors
    /// `AgentLost` here; errors of the file come from the writer's methods.
    pub async fn write_file(&self, path: impl Into<String>, mode: Option<u32>) -> Result<FileWriter> {
        self.write_file_as(path, mode, None).await
    }

    /// [`Agent::write_file`] with an owner: user and group.
    ///
    /// # Errors
    /// As [`Agent::write_file`].
    pub async fn write_file_as(
        &self,
        path: impl Into<String>,
        mode: Option<u32>,
        owner: Option<(u32, u32)>,
    ) -> Result<FileWriter> {
        let stream = self.open(Request::WriteFile { path: path.into(), mode, owner }).await?;
        Ok(FileWriter { upload: Upload { input: stream.input(), stream, timeout: self.timeout } })
    }

    /// Looks at a file; follows symbolic links.
    ///
    /// # Errors
    /// `Guest(NotFound)` and other guest errors.
    pub async fn stat(&self, path: impl Into<String>) -> Result<FileStat> {
        match self.call(Request::Stat { path: path.into() }).await? {
            Reply::Stat(stat) => Ok(stat),
            other => Err(unexpected(&other)),
        }
    }

    /// Writes everything back and stops writes to the guest's root file system and volumes until [`Agent::thaw`], but no longer
    /// than `auto_thaw` (capped at a minute). When it returns, the disk holds a clean file system state. Freezing a
    /// frozen guest only moves the limit.
    ///
    /// # Errors
    /// Guest errors; the guest is then not frozen.
    pub async fn freeze(&self, auto_thaw: Duration) -> Result<()> {
        let auto_thaw_ms = u64::try_from(auto_thaw.as_millis()).unwrap_or(u64::MAX);
        self.done(Request::Freeze { auto_thaw_ms }).await
    }

    /// Allows writes again. False when the guest had thawed by itself before: what was taken meanwhile is only as
    /// consistent as after a crash.
    ///
    /// # Errors
    /// Guest errors.
    pub async fn thaw(&self) -> Result<bool> {
        match self.call(Request::Thaw).await? {
            Reply::Thawed { was_frozen } => Ok(was_frozen),
            other => Err(unexpected(&other)),
        }
    }

    /// Sets the guest's wall clock to the host's.
    ///
    /// # Errors
    /// Guest errors.
    pub async fn set_clock(&self, to: std::time::SystemTime) -> Result<()> {
        let since = to.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        self.done(Request::SetClock { unix_nanos: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX) }).await
    }

    /// Sets the guest's host name.
    ///
    /// # Errors
    /// `Guest(Invalid)` for a name that is none.
    pub async fn set_hostname(&self, name: impl Into<String>) -> Result<()> {
        self.done(Request::SetHostname { name: name.into() }).await
    }

    /// Writes back all the guest's dirty data.
    ///
    /// # Errors
    /// Guest errors; `AgentTimeout` when the disk is too slow for the call's limit.
    pub async fn sync(&self) -> Result<()> {
        self.done(Request::Sync).await
    }

    /// Ends all processes (SIGTERM, and SIGKILL after `grace`), writes everything back and powers the guest off. Ok
    /// means that the disk is flushed and its file system clean; the power goes right after.
    ///
    /// # Errors
    /// Guest errors; `AgentTimeout`, `AgentLost`.
    pub async fn shutdown(&self, grace: Duration) -> Result<()> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let stream = self.open(Request::Shutdown { grace_ms }).await?;
        self.finish(stream, self.timeout.saturating_add(grace)).await.map(drop)
    }

    async fn done(&self, request: Request) -> Result<()> {
        match self.call(request).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn call(&self, request: Request) -> Result<Reply> {
        let stream = self.open(request).await?;
        self.finish(stream, self.timeout).await
    }

    async fn finish(&self, mut stream: Stream, timeout: Duration) -> Result<Reply> {
        within(crate::machine::deadline_at(timeout), async {
            loop {
                if let Event::End(outcome) = stream.next().await? {
                    return Ok(outcome?);
                }
            }
        })
        .await
    }

    async fn open(&self, request: Request) -> Result<Stream> {
        within(crate::machine::deadline_at(self.timeout), self.connection.stream(&request)).await
    }
}

/// What an [`Agent::identify`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identified {
    /// The disk had been another sandbox's: what must not be shared was made anew.
    pub fresh: bool,
    /// An ssh server is installed and has no host keys.
    pub host_keys_missing: bool,
}

fn no_list() -> Error {
    Error::new(ErrorKind::AgentLost, "the guest's agent sent a list that cannot be read")
}

/// The next entry, if all of it is there.
fn take_entry(bytes: &mut BytesMut) -> Result<Option<DirEntry>> {
    let Some((len, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_le_bytes(*len) as usize;
    if len > MAX_ENTRY {
        return Err(no_list());
    }
    let Some(entry) = rest.get(..len) else { return Ok(None) };
    let entry = miosa_agent::wire::Frame::new(0, miosa_agent::wire::Kind::Data, Bytes::copy_from_slice(entry));
    let entry = entry.parse().map_err(|_| no_list())?;
    bytes.advance(4 + len);
    Ok(Some(entry))
}

async fn within<T>(at: Instant, what: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout_at(at, what).await {
        Ok(result) => result,
        Err(_) => Err(Error::new(ErrorKind::AgentTimeout, "the guest's agent did not answer in time")),
    }
}

fn unexpected(reply: &Reply) -> Error {
    Error::new(ErrorKind::AgentLost, format!("the guest's agent gave a wrong kind of answer: {reply:?}"))
}

fn no_connection() -> Error {
    Error::new(ErrorKind::AgentLost, "the guest's agent took the call for a connection")
}

/// What a running program does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// Bytes of its standard output.
    Stdout(Bytes),
    /// Bytes of its standard error.
    Stderr(Bytes),
    /// Its end; exactly one of `code` and `signal` is set.
    Exit {
        /// Exit code.
        code: Option<i32>,
        /// Signal that ended it.
        signal: Option<i32>,
        /// Whether it was killed because its time was over.
        timed_out: bool,
    },
}

/// A running program. Dropping it kills the program's process group.
#[derive(Debug)]
pub struct ExecStream {
    stream: Stream,
    stdin: Option<Stdin>,
    deadline: Option<Instant>,
    grace: Duration,
    over: bool,
}

impl ExecStream {
    /// The next thing the program does; `None` after its exit. All output written before the exit comes before it;
    /// within one of the two outputs the order is kept, between them it is not. What a process left behind in the
    /// background writes after the program's own exit is not delivered. Safe to cancel.
    ///
    /// # Errors
    /// Guest errors when the program could not be started; `AgentLost`; `AgentTimeout` when the program's own time
    /// limit is long over.
    pub async fn next_event(&mut self) -> Result<Option<ExecEvent>> {
        if self.over {
            return Ok(None);
        }
        let event = match self.deadline {
            // A caller that was slow itself still gets the grace for each answer.
            Some(at) => within(at.max(Instant::now() + self.grace), self.stream.next()).await?,
            None => self.stream.next().await?,
        };
        Ok(match event {
            Event::Data(bytes) => Some(ExecEvent::Stdout(bytes)),
            Event::ErrData(bytes) => Some(ExecEvent::Stderr(bytes)),
            Event::Connected | Event::Eof => return Err(no_connection()),
            Event::End(outcome) => {
                self.over = true;
                let exit = match outcome? {
                    Reply::Exit(exit) => Some(exit),
                    Reply::Command(status) => status.ended.map(|(_, exit)| exit),
                    other => return Err(unexpected(&other)),
                };
                exit.map(|ExitStatus { code, signal, timed_out }| ExecEvent::Exit { code, signal, timed_out })
            }
        })
    }

    /// Signals for the program, and sizes for its terminal.
    pub fn controls(&self) -> Controls {
        Controls(self.stream.control())
    }

    /// The program's standard input, once, if it was asked for. Dropping it closes the input.
    pub fn take_stdin(&mut self) -> Option<Stdin> {
        self.stdin.take()
    }

    /// Reads to the end, keeping at most `max_output` bytes of each output. Standard input is closed first unless it
    /// was taken.
    ///
    /// # Errors
    /// Those of [`ExecStream::next_event`].
    pub async fn collect(mut self, max_output: usize) -> Result<ExecOutput> {
        drop(self.stdin.take());
        let (mut stdout, mut stderr) = (BytesMut::new(), BytesMut::new());
        let mut truncated = false;
        let mut keep = |kept: &mut BytesMut, bytes: Bytes| {
            let room = max_output.saturating_sub(kept.len());
            truncated |= bytes.len() > room;
            kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
        };
        while let Some(event) = self.next_event().await? {
            match event {
                ExecEvent::Stdout(bytes) => keep(&mut stdout, bytes),
                ExecEvent::Stderr(bytes) => keep(&mut stderr, bytes),
                ExecEvent::Exit { code, signal, timed_out } => {
                    let status = ExitStatus { code, signal, timed_out };
                    return Ok(ExecOutput { status, stdout: stdout.freeze(), stderr: stderr.freeze(), truncated });
                }
            }
        }
        Err(Error::new(ErrorKind::AgentLost, "the program's stream ended without an exit status"))
    }
}

/// A program that has ended, with its output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// How it ended.
    pub status: ExitStatus,
    /// The beginning of its standard output.
    pub stdout: Bytes,
    /// The beginning of its standard error.
    pub stderr: Bytes,
    /// Whether either was longer than what was kept.
    pub truncated: bool,
}

/// A program's standard input. Dropping it closes the input.
#[derive(Debug)]
pub struct Stdin {
    input: Input,
}

impl Stdin {
    /// Sends bytes; waits while the program does not read.
    ///
    /// # Errors
    /// `AgentLost` when the program or the connection is gone.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.input.send(bytes).await
    }

    /// Closes the input, as dropping does.
    pub fn close(self) {}
}

/// What can be told to a running program beside its input. Clones are of the same program; they do not keep it alive.
#[derive(Clone, Debug)]
pub struct Controls(Control);

impl Controls {
    /// Tells the program's terminal its size; without a terminal nothing happens.
    ///
    /// # Errors
    /// `AgentLost` when the program or the connection is gone.
    pub async fn resize(&self, size: TerminalSize) -> Result<()> {
        self.0.send(Kind::Resize, &size).await
    }

    /// Sends the program a signal: the foreground group of its terminal, or its own.
    ///
    /// # Errors
    /// `AgentLost` when the program or the connection is gone.
    pub async fn signal(&self, signal: i32) -> Result<()> {
        self.0.send(Kind::Signal, &signal).await
    }
}

impl Drop for Stdin {
    fn drop(&mut self) {
        self.input.eof();
    }
}

/// A file being read.
#[derive(Debug)]
pub struct FileReader {
    stream: Stream,
    timeout: Duration,
    over: bool,
}

impl FileReader {
    /// The next piece, at most 64 KiB; `None` at the end of the file.
    ///
    /// # Errors
    /// `Guest(NotFound)`, `Guest(IsDirectory)` and other guest errors; `AgentLost`, `AgentTimeout`.
    // Not an iterator: it is async.
    #[allow(clippy::should_implement_trait)]
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        if self.over {
            return Ok(None);
        }
        match within(crate::machine::deadline_at(self.timeout), self.stream.next()).await? {
            Event::Data(bytes) | Event::ErrData(bytes) => Ok(Some(bytes)),
            Event::Connected | Event::Eof => Err(no_connection()),
            Event::End(outcome) => {
                self.over = true;
                outcome?;
                Ok(None)
            }
        }
    }

    /// The whole rest of the file.
    ///
    /// # Errors
    /// Those of [`FileReader::next`], and `Invalid` when there are more than `max` bytes.
    pub async fn read_to_end(mut self, max: usize) -> Result<Bytes> {
        let mut all = BytesMut::new();
        while let Some(piece) = self.next().await? {
            if all.len() + piece.len() > max {
                return Err(Error::new(ErrorKind::Invalid, format!("the file is larger than {max} bytes")));
            }
            all.extend_from_slice(&piece);
        }
        Ok(all.freeze())
    }
}

/// A file being written. Dropped before [`FileWriter::finish`], it leaves the old file in place.
#[derive(Debug)]
pub struct FileWriter {
    upload: Upload,
}

impl FileWriter {
    /// Sends bytes; waits while the guest's disk is slow.
    ///
    /// # Errors
    /// `Guest(NoSpace)`, `Guest(IsDirectory)` and other guest errors; `AgentLost`, `AgentTimeout`.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.upload.write(bytes).await
    }

    /// Puts the file in its place; it is there and durable on the guest's disk when this returns.
    ///
    /// # Errors
    /// As [`FileWriter::write`].
    pub async fn finish(self) -> Result<()> {
        self.upload.finish().await.map(drop)
    }
}

/// A directory being unpacked from a tar archive. Dropped before [`TreeWriter::finish`], it leaves what has been unpacked
/// and removes nothing.
#[derive(Debug)]
pub struct TreeWriter {
    upload: Upload,
}

impl TreeWriter {
    /// Sends a piece of the archive; waits while the guest's disk is slow.
    ///
    /// # Errors
    /// As [`FileWriter::write`]; `Guest(Invalid)` for a path that leaves the directory.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.upload.write(bytes).await
    }

    /// Ends the archive; all is durable on the guest's disk when this returns.
    ///
    /// # Errors
    /// As [`TreeWriter::write`].
    pub async fn finish(self) -> Result<TreeSummary> {
        match self.upload.finish().await? {
            Reply::Tree(summary) => Ok(summary),
            other => Err(unexpected(&other)),
        }
    }
}

#[derive(Debug)]
struct Upload {
    stream: Stream,
    input: Input,
    timeout: Duration,
}

impl Upload {
    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(64 * 1024) {
            let sent = within(crate::machine::deadline_at(self.timeout), self.input.send(piece)).await;
            if let Err(error) = sent {
                // The guest ended the stream early: its reason is better than ours.
                return Err(match error.kind {
                    ErrorKind::AgentLost => self.outcome().await.err().unwrap_or(error),
                    _ => error,
                });
            }
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<Reply> {
        self.input.eof();
        self.outcome().await
    }

    async fn outcome(&mut self) -> Result<Reply> {
        within(crate::machine::deadline_at(self.timeout), async {
            loop {
                if let Event::End(outcome) = self.stream.next().await? {
                    return Ok(outcome?);
                }
            }
        })
        .await
    }
}
