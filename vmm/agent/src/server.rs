//! The guest's end of the protocol: one thread reads frames, one writes them, each stream has its own.
//!
//! The reading thread never waits for a stream: data goes to the stream's inbox, which the host's credit bounds. So a
//! program that does not read its input, or whose output nobody takes, holds up its own stream only.

mod commands;
mod exec;
mod files;
mod freezer;
mod identity;
mod port;
mod terminal;
mod tree;
mod users;

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::wire::{self, AgentError, Decoder, ErrorKind, Frame, GuestInfo, Kind, Mount, Outcome, Reply, Request, Root};
pub use exec::Children;
use freezer::Freezer;
use terminal::Terminal;

/// Bytes of output that may wait for the pipe before streams wait.
const QUEUE_BYTES: usize = 256 * 1024;

/// What differs between a real guest and one that tests run in process.
pub trait System: Send + Sync + 'static {
    /// The path that the guest's `path` is at.
    ///
    /// # Errors
    /// `Invalid` for a path that is not absolute.
    fn path(&self, path: &str) -> Result<PathBuf, AgentError>;
    /// The programs that run for streams.
    fn children(&self) -> &Children;
    /// Who this is.
    fn info(&self) -> GuestInfo;
    /// Whether there is a root file system; a guest may have been started to get one later.
    fn has_root(&self) -> bool;
    /// Finds the root disk, mounts it and moves into it; nothing to do where there is one. Random numbers and clock are
    /// this guest's own by then.
    ///
    /// # Errors
    /// Of the system. The guest is of no use then.
    fn mount_root(&self, root: &Root) -> Result<(), AgentError>;
    /// Mounts a disk besides the root.
    ///
    /// # Errors
    /// `NotFound` when there is no such disk; others of the system.
    fn mount(&self, wanted: &Mount) -> Result<(), AgentError>;
    /// Writes everything back and stops writes to the root file system and to what is mounted besides.
    ///
    /// # Errors
    /// Of the system; nothing is frozen then.
    fn freeze(&self) -> Result<(), AgentError>;
    /// Allows writes again.
    ///
    /// # Errors
    /// Of the system.
    fn thaw(&self) -> Result<(), AgentError>;
    /// Sets the wall clock.
    ///
    /// # Errors
    /// Of the system.
    fn set_clock(&self, unix_nanos: u64) -> Result<(), AgentError>;
    /// Sets the host name, already checked.
    ///
    /// # Errors
    /// Of the system.
    fn set_hostname(&self, name: &str) -> Result<(), AgentError>;
    /// Sets the hardware address of the network device, if there is one.
    ///
    /// # Errors
    /// Of the system.
    fn set_mac(&self, mac: [u8; 6]) -> Result<(), AgentError>;
    /// Ends all TCP connections to the outside, so that programs that use them get an error at once. Where the kernel
    /// cannot do that, they get it when they next send something.
    fn end_connections(&self);
    /// Mixes bytes into the kernel's random numbers.
    ///
    /// # Errors
    /// Of the system.
    fn add_entropy(&self, bytes: &[u8]) -> Result<(), AgentError>;
    /// Writes back all dirty data.
    fn sync(&self);
    /// Ends all processes, with `grace` between asking and killing, and leaves the disk flushed and clean.
    ///
    /// # Errors
    /// Of the system.
    fn shutdown(&self, grace: Duration) -> Result<(), AgentError>;
    /// Powers off, after the answer to a shutdown has been sent.
    fn power_off(&self);
    /// Says something on the console.
    fn log(&self, message: &str);
}

/// A server: what is needed to read frames and to answer them.
pub struct Server {
    system: Arc<dyn System>,
    output: Arc<Output>,
    streams: Mutex<HashMap<u32, Arc<Stream>>>,
    freezer: Arc<Freezer>,
}

impl Server {
    /// A server that writes to `pipe` from a thread of its own.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn new(system: Arc<dyn System>, pipe: impl Write + Send + 'static) -> std::io::Result<Arc<Server>> {
        let output = Arc::new(Output::default());
        let (writer, log) = (output.clone(), system.clone());
        thread("agent-write", move || writer.write_to(pipe, &*log))?;
        let freezer = Freezer::start(system.clone())?;
        Ok(Arc::new(Server { system, output, streams: Mutex::default(), freezer }))
    }

    /// Reads frames until the pipe ends and `at_end` says to give up, or reading fails. Then all streams are over.
    pub fn serve(self: &Arc<Self>, mut pipe: impl Read, mut at_end: impl FnMut() -> bool) -> std::io::Result<()> {
        let mut decoder = Decoder::guest();
        let mut bytes = vec![0; wire::MAX_PAYLOAD];
        let result = loop {
            match pipe.read(&mut bytes) {
                Ok(0) if at_end() => break Ok(()),
                Ok(0) => continue,
                Ok(len) => decoder.push(&bytes[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => break Err(error),
            }
            loop {
                match decoder.next_frame() {
                    Ok(None) => break,
                    Ok(Some(frame)) => self.take(frame),
                    Err(violation) => self.system.log(&format!("{violation}; waiting for a greeting")),
                }
            }
        };
        self.cancel_all();
        if result.is_ok() {
            self.system.children().commands.end_all();
        }
        self.output.close();
        result
    }

    fn cancel_all(&self) {
        for (_, stream) in self.streams.lock().drain() {
            stream.cancel();
        }
    }

    fn take(self: &Arc<Self>, frame: Frame) {
        let stream = || self.streams.lock().get(&frame.stream).cloned();
        match frame.kind {
            Kind::Hello => {
                let Ok((nonce, _)) = frame.hello() else { return };
                self.cancel_all();
                self.freezer.thaw_if_frozen();
                self.output.start_over(wire::hello_ack(nonce));
            }
            Kind::Open => self.open(&frame),
            Kind::Data => {
                if let Some(stream) = stream() {
                    stream.receive(frame.payload);
                }
            }
            Kind::Window => {
                if let (Some(stream), Ok(credit)) = (stream(), frame.credit()) {
                    stream.add_credit(credit);
                }
            }
            Kind::Eof => {
                if let Some(stream) = stream() {
                    stream.change(|state| state.eof = true);
                }
            }
            Kind::Cancel => {
                if let Some(stream) = stream() {
                    stream.cancel();
                }
            }
            Kind::Resize => {
                if let (Some(stream), Ok(size)) = (stream(), frame.parse()) {
                    stream.change(|state| state.resize(size));
                }
            }
            Kind::Signal => {
                if let (Some(stream), Ok(signal)) = (stream(), frame.parse()) {
                    self.system.children().signal_stream(&stream, signal);
                }
            }
            Kind::HelloAck | Kind::ErrData | Kind::End | Kind::Connected => {
                self.system.log("ignoring a frame that only a guest sends")
            }
        }
    }

    fn open(self: &Arc<Self>, frame: &Frame) {
        let stream = Arc::new(Stream::new(frame.stream, Sink::host(&self.output)));
        let request: Request = match frame.parse() {
            Ok(request) => request,
            Err(violation) => {
                return stream.end(&Err(AgentError::new(ErrorKind::Invalid, violation.to_string())));
            }
        };
        let mut streams = self.streams.lock();
        if streams.len() >= wire::MAX_STREAMS || streams.contains_key(&frame.stream) {
            drop(streams);
            return stream.end(&Err(AgentError::new(ErrorKind::Busy, "the guest serves too many requests at once")));
        }
        streams.insert(frame.stream, stream.clone());
        drop(streams);
        let (server, served) = (self.clone(), stream.clone());
        let spawned = thread("agent-stream", move || {
            let shutdown = matches!(request, Request::Shutdown { .. });
            let outcome = server.handle(&served, request);
            server.forget(&served);
            let power_off = shutdown && outcome.is_ok();
            served.end(&outcome);
            if power_off {
                server.output.flush(Duration::from_secs(2));
                server.system.power_off();
            }
        });
        if let Err(error) = spawned {
            self.forget(&stream);
            stream.end(&Err(AgentError::io("the guest cannot start a thread", &error)));
        }
    }

    /// Only the stream itself: a new connection may have given its number to another.
    fn forget(&self, stream: &Arc<Stream>) {
        let mut streams = self.streams.lock();
        if streams.get(&stream.id).is_some_and(|there| Arc::ptr_eq(there, stream)) {
            streams.remove(&stream.id);
        }
    }

    fn handle(&self, stream: &Arc<Stream>, request: Request) -> Outcome {
        let system = &*self.system;
        if !system.has_root() && !matches!(request, Request::MountRoot(_)) {
            return Err(AgentError::new(ErrorKind::Invalid, "the guest has no root file system yet"));
        }
        match request {
            Request::Ping => return Ok(Reply::Pong(system.info())),
            Request::Exec(request) => return exec::run(system, stream, &request).map(Reply::Exit),
            Request::Start { id, name, exec } => {
                return commands::start(&self.system, id, name, exec).map(Reply::Command);
            }
            Request::Commands => return Ok(Reply::Commands(system.children().commands.list())),
            Request::CommandLogs { id, follow } => {
                return commands::logs(system, stream, &id, follow).map(Reply::Command);
            }
            Request::KillCommand { id, signal } => return commands::kill(system, &id, signal).map(Reply::Command),
            Request::Connect { port, wait_ms } => port::serve(stream, port, wait_ms)?,
            Request::WriteFile { path, mode, owner } => files::write(system, stream, &path, mode, owner)?,
            Request::ReadFile { path, offset, len } => files::read(system, stream, &path, offset, len)?,
            Request::List { path } => files::list(system, stream, &path)?,
            Request::MakeDir { path, mode } => files::make_dir(system, &path, mode)?,
            Request::Remove { path, recursive } => files::remove(system, &path, recursive)?,
            Request::Rename { from, to } => files::rename(system, &from, &to)?,
            Request::ReadTree { path } => tree::read(system, stream, &path)?,
            Request::WriteTree { path, delete } => {
                return tree::write(system, stream, &path, delete).map(Reply::Tree);
            }
            Request::Identify(identity) => return identity::assume(system, &identity),
            Request::Mount(wanted) => system.mount(&wanted)?,
            Request::MountRoot(root) => {
                identity::check_hostname(&root.hostname)?;
                // First: from here on it is no copy any more.
                system.add_entropy(&root.entropy)?;
                system.set_clock(root.unix_nanos)?;
                system.mount_root(&root)?;
            }
            Request::Stat { path } => return files::stat(system, &path).map(Reply::Stat),
            Request::Freeze { auto_thaw_ms } => self.freezer.freeze(auto_thaw_ms)?,
            Request::Thaw => return Ok(Reply::Thawed { was_frozen: self.freezer.thaw()? }),
            Request::SetClock { unix_nanos } => system.set_clock(unix_nanos)?,
            Request::SetHostname { name } => identity::set_hostname(system, &name)?,
            Request::Sync => system.sync(),
            Request::Shutdown { grace_ms } => {
                self.freezer.thaw_if_frozen();
                system.shutdown(Duration::from_millis(grace_ms.min(30_000)))?;
            }
        }
        Ok(Reply::Done)
    }
}

/// Starts a named thread with a small stack.
pub(crate) fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.into()).stack_size(256 * 1024).spawn(body).map(drop)
}

/// The stream's host is gone or does not want it any more.
#[derive(Debug)]
pub(crate) struct Cancelled;

impl From<Cancelled> for AgentError {
    fn from(_: Cancelled) -> AgentError {
        AgentError::new(ErrorKind::Cancelled, "cancelled by the host")
    }
}

/// Where a stream's data goes.
enum Sink {
    /// To the host that opened it, as far as that gives credit.
    Host { output: Arc<Output>, generation: u64 },
    /// Into what is kept of a command's output, at once.
    Kept(Arc<commands::Log>),
}

impl Sink {
    fn host(output: &Arc<Output>) -> Sink {
        Sink::Host { output: output.clone(), generation: output.queue.lock().generation }
    }

    fn push(&self, frame: Frame, wait: bool) {
        if let Sink::Host { output, generation } = self {
            output.push(*generation, frame, wait);
        }
    }
}

/// The guest's end of a stream.
pub struct Stream {
    id: u32,
    sink: Sink,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    inbox: VecDeque<Bytes>,
    /// What the host may still send.
    granted: u32,
    /// Taken from the inbox and not yet given back.
    owed: u32,
    /// What we may still send.
    credit: u32,
    eof: bool,
    cancelled: bool,
    /// How the stream's program ended: `wait` status.
    exit: Option<i32>,
    /// The stream's program, while it runs, and its terminal.
    pid: Option<i32>,
    terminal: Option<Terminal>,
    /// A size that was told before there was a terminal.
    size: Option<wire::TerminalSize>,
    /// Where the stream's data goes to and comes from: to be shut down when the stream is cancelled.
    connection: Option<TcpStream>,
}

impl State {
    fn resize(&mut self, size: wire::TerminalSize) {
        self.size = Some(size);
        if let Some(terminal) = &self.terminal {
            terminal.resize(size);
        }
    }

    fn cancel(&mut self) {
        self.cancelled = true;
        if let Some(connection) = &self.connection {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Stream {
    fn new(id: u32, sink: Sink) -> Stream {
        let state = State { granted: wire::WINDOW, credit: wire::WINDOW, ..State::default() };
        Stream { id, sink, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changed.notify_all();
    }

    fn cancel(&self) {
        self.change(State::cancel);
    }

    fn receive(&self, bytes: Bytes) {
        self.change(|state| match state.granted.checked_sub(wire::cost(bytes.len())) {
            // What comes after the program's end is of no interest.
            _ if state.exit.is_some() || state.eof => {}
            Some(granted) => {
                state.granted = granted;
                state.inbox.push_back(bytes);
            }
            None => state.cancel(),
        });
    }

    fn add_credit(&self, credit: u32) {
        self.change(|state| state.credit = state.credit.saturating_add(credit).min(wire::WINDOW));
    }

    pub(crate) fn exited(&self, status: i32) {
        self.change(|state| {
            state.exit = Some(status);
            (state.pid, state.terminal) = (None, None);
        });
    }

    /// The stream's program has been started.
    fn runs(&self, pid: i32, terminal: Option<Terminal>) {
        self.change(|state| {
            if state.exit.is_none() {
                (state.pid, state.terminal) = (Some(pid), terminal);
                if let Some(size) = state.size {
                    state.resize(size);
                }
            }
        });
    }

    /// Sends data as the host gives credit for it.
    pub(crate) fn send(&self, kind: Kind, mut bytes: &[u8]) -> Result<(), Cancelled> {
        if let Sink::Kept(log) = &self.sink {
            log.add(kind, bytes);
            return Ok(());
        }
        while !bytes.is_empty() {
            let mut state = self.state.lock();
            let len = loop {
                if state.cancelled {
                    return Err(Cancelled);
                }
                match wire::sendable(state.credit, bytes.len()) {
                    0 => self.changed.wait(&mut state),
                    len => break len,
                }
            };
            state.credit -= wire::cost(len);
            drop(state);
            let (now, later) = bytes.split_at(len);
            self.sink.push(Frame::new(self.id, kind, Bytes::copy_from_slice(now)), true);
            bytes = later;
        }
        Ok(())
    }

    /// The next data from the host; `None` when there is no more, or the stream's program has ended.
    pub(crate) fn receive_next(&self) -> Result<Option<Bytes>, Cancelled> {
        let mut state = self.state.lock();
        loop {
            if state.cancelled {
                return Err(Cancelled);
            }
            if state.exit.is_some() {
                return Ok(None);
            }
            if let Some(bytes) = state.inbox.pop_front() {
                state.owed += wire::cost(bytes.len());
                if state.owed >= wire::WINDOW / 4 {
                    let owed = std::mem::take(&mut state.owed);
                    state.granted += owed;
                    drop(state);
                    self.sink.push(Frame::window(self.id, owed), false);
                }
                return Ok(Some(bytes));
            }
            if state.eof {
                return Ok(None);
            }
            self.changed.wait(&mut state);
        }
    }

    /// Waits until the program has ended, the stream is cancelled, or `until` has come.
    pub(crate) fn wait_exit(&self, until: Option<Instant>, mind_cancel: bool) -> Waited {
        let mut state = self.state.lock();
        loop {
            if let Some(status) = state.exit {
                return Waited::Exited(status);
            }
            if mind_cancel && state.cancelled {
                return Waited::Cancelled;
            }
            match until {
                Some(until) if Instant::now() >= until => return Waited::TimedOut,
                Some(until) => drop(self.changed.wait_until(&mut state, until)),
                None => self.changed.wait(&mut state),
            }
        }
    }

    /// From now on the stream is this connection, and a cancelled stream shuts it down.
    fn connected(&self, connection: TcpStream) -> Result<(), Cancelled> {
        let mut state = self.state.lock();
        if state.cancelled {
            return Err(Cancelled);
        }
        state.connection = Some(connection);
        drop(state);
        self.sink.push(Frame::new(self.id, Kind::Connected, Bytes::new()), false);
        Ok(())
    }

    /// Nothing more comes from the guest.
    fn send_eof(&self) {
        self.sink.push(Frame::new(self.id, Kind::Eof, Bytes::new()), false);
    }

    /// What the host has sent and still sends is of no interest.
    fn stop_receiving(&self) {
        self.change(|state| {
            state.inbox.clear();
            state.eof = true;
        });
    }

    /// Waits until `there` says so; it is asked again after each [`Stream::wake`].
    fn wait_for(&self, there: impl Fn() -> bool) -> Result<(), Cancelled> {
        let mut state = self.state.lock();
        loop {
            if state.cancelled {
                return Err(Cancelled);
            }
            if there() {
                return Ok(());
            }
            self.changed.wait(&mut state);
        }
    }

    fn wake(&self) {
        self.change(|_| ());
    }

    fn end(&self, outcome: &Outcome) {
        let frame = Frame::with(self.id, Kind::End, outcome).or_else(|_| {
            let error: Outcome = Err(AgentError::new(ErrorKind::Io, "the answer is too large"));
            Frame::with(self.id, Kind::End, &error)
        });
        if let Ok(frame) = frame {
            self.sink.push(frame, false);
        }
    }
}

/// What a wait for a program came to.
pub(crate) enum Waited {
    Exited(i32),
    Cancelled,
    TimedOut,
}

/// Frames on their way to the host.
#[derive(Default)]
struct Output {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// Which greeting the frames answer; frames of streams from before it are dropped.
    generation: u64,
    writing: bool,
    closed: bool,
}

impl Output {
    /// Adds a frame; with `wait`, once there is room. Frames without are few: one end a stream, one window each 64 KiB.
    fn push(&self, generation: u64, frame: Frame, wait: bool) {
        let mut queue = self.queue.lock();
        while wait && queue.bytes >= QUEUE_BYTES && queue.generation == generation && !queue.closed {
            self.changed.wait(&mut queue);
        }
        if queue.generation == generation && !queue.closed {
            queue.bytes += frame.payload.len();
            queue.frames.push_back(frame);
            self.changed.notify_all();
        }
    }

    fn start_over(&self, ack: Frame) {
        let mut queue = self.queue.lock();
        queue.generation += 1;
        queue.frames.clear();
        queue.bytes = 0;
        queue.frames.push_back(ack);
        self.changed.notify_all();
    }

    fn close(&self) {
        self.queue.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits until everything is written, or `limit` is over.
    fn flush(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut queue = self.queue.lock();
        while (queue.writing || !queue.frames.is_empty()) && !queue.closed {
            if self.changed.wait_until(&mut queue, until).timed_out() {
                return;
            }
        }
    }

    fn write_to(&self, mut pipe: impl Write, system: &dyn System) {
        let mut bytes = Vec::new();
        loop {
            let mut queue = self.queue.lock();
            queue.writing = false;
            self.changed.notify_all();
            while queue.frames.is_empty() {
                if queue.closed {
                    return;
                }
                self.changed.wait(&mut queue);
            }
            bytes.clear();
            while bytes.len() < wire::MAX_PAYLOAD
                && let Some(frame) = queue.frames.pop_front()
            {
                queue.bytes = queue.bytes.saturating_sub(frame.payload.len());
                frame.encode(&mut bytes);
            }
            queue.writing = true;
            drop(queue);
            if let Err(error) = pipe.write_all(&bytes).and_then(|()| pipe.flush()) {
                system.log(&format!("cannot write to the host: {error}"));
                // Whatever was lost, the next greeting starts over; until then do not spin.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

#[cfg(test)]
mod tests;
