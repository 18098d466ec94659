//! The protocol between the host and the guest agent: frames, requests, replies.
//!
//! One byte pipe (a virtio-serial port) carries many *streams*. The host opens a stream with a [`Request`]; both sides
//! may then send data on it, each only as far as the other has given it credit; the guest ends it with exactly one
//! [`Outcome`]. Nothing here does I/O, so the host's async client and the guest's threads share it.
//!
//! ## A frame
//! ```text
//! 0      4        8     12    13     16              16+len   20+len
//! | MAGIC | stream | len | kind | 0 0 0 | payload (len) | TRAILER |      little-endian
//! ```
//!
//! ## Finding the start again
//! A host that dies leaves half a frame behind in the pipe, in either direction. So a new host first sends
//! [`greeting`]: zeroes, one whole frame long, and then `Hello`. Zeroes complete whatever frame was cut off with a wrong
//! trailer, which tells the guest to drop it and to seek the next `Hello`; the host in turn drops everything before the
//! `HelloAck` that carries its own nonce. `Hello` ends every older stream.
//!
//! ## Credit
//! Each direction of each stream starts with [`WINDOW`] bytes of credit. A data frame costs [`cost`] of its length, so
//! that a flood of tiny frames is as bounded as one of large frames. The receiver gives credit back with `Window`. A
//! side that sends more than it may is in violation: the host drops the connection, the guest drops the stream.
//!
//! ## Growing
//! A stream is a request, data both ways under credit, and an outcome. A terminal is a program whose outputs are one, and
//! frames for its size and for signals; a connection to a port of the guest adds that the guest says when it is there and
//! when its half is closed. Both sides must have the same [`VERSION`]: an agent lives in the initramfs its machine was
//! started with, and a host that meets another version says so and ends the connection.

use bytes::{Buf, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

/// Version of this protocol; both sides must have the same one.
pub const VERSION: u32 = 8;
/// Name of the virtio-serial port the agent listens on.
pub const PORT_NAME: &str = "miosa.agent";
/// Largest payload of one frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Credit each direction of a stream starts with, in bytes, and the most it may ever hold.
pub const WINDOW: u32 = 256 * 1024;
/// Most streams the guest serves at once.
pub const MAX_STREAMS: usize = 256;

const MAGIC: u32 = u32::from_le_bytes(*b"MIOS");
const TRAILER: u32 = u32::from_le_bytes(*b"aEND");
const HEADER_LEN: usize = 16;
const OVERHEAD: usize = HEADER_LEN + 4;
const HELLO_LEN: usize = 20;
/// Least cost of a data frame, so that tiny frames cannot fill a receiver's memory with bookkeeping.
const MIN_COST: u32 = 256;

/// What a data frame of `len` bytes takes from the sender's credit.
pub fn cost(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX).max(MIN_COST)
}

/// How many bytes a sender with `credit` may put in its next data frame; 0 means wait.
pub fn sendable(credit: u32, wanted: usize) -> usize {
    if credit < MIN_COST { 0 } else { wanted.min(credit as usize).min(MAX_PAYLOAD) }
}

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Host: start over. Payload: nonce (16 bytes), version (4).
    Hello = 1,
    /// Guest: started over. Payload as of `Hello`, the nonce repeated, the guest's version.
    HelloAck = 2,
    /// Host: open a stream. Payload: [`Request`].
    Open = 3,
    /// Either: data (standard input, file contents, standard output).
    Data = 4,
    /// Guest: standard error.
    ErrData = 5,
    /// Host, and guest where the stream is a connection: no more data will follow from this side.
    Eof = 6,
    /// Host: stop the stream and whatever runs for it. The guest still answers `End`.
    Cancel = 7,
    /// Either: the receiver may send so many bytes more. Payload: u32.
    Window = 8,
    /// Guest: the stream is over. Payload: [`Outcome`].
    End = 9,
    /// Host: the terminal of the stream's program has another size. Payload: [`TerminalSize`].
    Resize = 10,
    /// Host: send the stream's program a signal, its terminal's foreground group if it has one. Payload: i32.
    Signal = 11,
    /// Guest: the connection that the host asked for is there; data may follow.
    Connected = 12,
}

impl Kind {
    fn from_u8(byte: u8) -> Option<Kind> {
        use Kind::*;
        [Hello, HelloAck, Open, Data, ErrData, Eof, Cancel, Window, End, Resize, Signal, Connected]
            .into_iter()
            .find(|k| *k as u8 == byte)
    }
}

/// One unit on the pipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The stream it belongs to; 0 for `Hello` and `HelloAck`.
    pub stream: u32,
    /// What it is for.
    pub kind: Kind,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Bytes,
}

/// Why bytes were not a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("protocol violation: {0}")]
pub struct Violation(pub &'static str);

impl Frame {
    /// A frame with raw bytes.
    pub fn new(stream: u32, kind: Kind, payload: impl Into<Bytes>) -> Frame {
        Frame { stream, kind, payload: payload.into() }
    }

    /// Gives the other side `credit` more bytes.
    pub fn window(stream: u32, credit: u32) -> Frame {
        Frame::new(stream, Kind::Window, credit.to_le_bytes().to_vec())
    }

    /// A frame with a serialised value.
    ///
    /// # Errors
    /// When the value does not fit into one frame.
    pub fn with<T: Serialize>(stream: u32, kind: Kind, value: &T) -> Result<Frame, Violation> {
        let bytes = postcard::to_stdvec(value).map_err(|_| Violation("value cannot be serialised"))?;
        if bytes.len() > MAX_PAYLOAD {
            return Err(Violation("request is larger than one frame"));
        }
        Ok(Frame::new(stream, kind, bytes))
    }

    /// The payload as a value.
    ///
    /// # Errors
    /// When the bytes are not such a value.
    pub fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, Violation> {
        postcard::from_bytes(&self.payload).map_err(|_| Violation("payload does not parse"))
    }

    /// The payload of a `Window` frame.
    ///
    /// # Errors
    /// When it is not four bytes, or more than [`WINDOW`].
    pub fn credit(&self) -> Result<u32, Violation> {
        let bytes: [u8; 4] = self.payload.as_ref().try_into().map_err(|_| Violation("window is not four bytes"))?;
        match u32::from_le_bytes(bytes) {
            credit if credit <= WINDOW => Ok(credit),
            _ => Err(Violation("window is too large")),
        }
    }

    /// Nonce and version of a `Hello` or `HelloAck`.
    ///
    /// # Errors
    /// When the payload has another length.
    pub fn hello(&self) -> Result<([u8; 16], u32), Violation> {
        let wrong = Violation("hello has a wrong length");
        let (nonce, version) = self.payload.split_at_checked(16).ok_or(wrong.clone())?;
        let version: [u8; 4] = version.try_into().map_err(|_| wrong.clone())?;
        Ok((nonce.try_into().map_err(|_| wrong)?, u32::from_le_bytes(version)))
    }

    /// Appends the frame's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        debug_assert!(self.payload.len() <= MAX_PAYLOAD);
        out.extend_from_slice(&header(self.stream, self.kind, self.payload.len() as u32));
        out.extend_from_slice(&self.payload);
        out.extend_from_slice(&TRAILER.to_le_bytes());
    }
}

fn header(stream: u32, kind: Kind, len: u32) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[4..8].copy_from_slice(&stream.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12] = kind as u8;
    bytes
}

fn hello_frame(kind: Kind, nonce: [u8; 16], version: u32) -> Frame {
    let mut payload = nonce.to_vec();
    payload.extend_from_slice(&version.to_le_bytes());
    Frame::new(0, kind, payload)
}

/// What a host sends first: a frame's length of zeroes, then `Hello`.
pub fn greeting(nonce: [u8; 16]) -> Vec<u8> {
    let mut bytes = vec![0; MAX_PAYLOAD + OVERHEAD];
    hello_frame(Kind::Hello, nonce, VERSION).encode(&mut bytes);
    bytes
}

/// What the guest answers to a greeting.
pub fn hello_ack(nonce: [u8; 16]) -> Frame {
    hello_frame(Kind::HelloAck, nonce, VERSION)
}

/// Turns bytes into frames. Holds at most one frame more than it was given.
#[derive(Debug)]
pub struct Decoder {
    buf: BytesMut,
    needle: Vec<u8>,
    seeking: bool,
}

impl Decoder {
    /// The guest's end: everything up to the next `Hello` is dropped.
    pub fn guest() -> Decoder {
        let needle = header(0, Kind::Hello, HELLO_LEN as u32).to_vec();
        Decoder { buf: BytesMut::new(), needle, seeking: true }
    }

    /// The host's end: everything up to the `HelloAck` with this nonce is dropped.
    pub fn host(nonce: [u8; 16]) -> Decoder {
        let mut needle = header(0, Kind::HelloAck, HELLO_LEN as u32).to_vec();
        needle.extend_from_slice(&nonce);
        Decoder { buf: BytesMut::new(), needle, seeking: true }
    }

    /// Takes bytes from the pipe. Call [`Decoder::next_frame`] until it has none before pushing more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// When the bytes are no frame. The decoder has then dropped the bad one and seeks the next greeting: the guest
    /// goes on calling, the host hangs up.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Violation> {
        if self.seeking && !self.seek() {
            return Ok(None);
        }
        let Some((header, rest)) = self.buf.split_at_checked(HEADER_LEN) else { return Ok(None) };
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (stream, len) = (word(4), word(8) as usize);
        let kind = Kind::from_u8(header[12]);
        let Some(kind) = kind.filter(|_| word(0) == MAGIC && header[13..] == [0; 3]) else {
            return Err(self.lost("bad frame header"));
        };
        if len > MAX_PAYLOAD {
            return Err(self.lost("frame too large"));
        }
        if rest.len() < len + 4 {
            return Ok(None);
        }
        if rest[len..len + 4] != TRAILER.to_le_bytes() {
            return Err(self.lost("frame cut short"));
        }
        let payload = Bytes::copy_from_slice(&rest[..len]);
        self.buf.advance(OVERHEAD + len);
        Ok(Some(Frame { stream, kind, payload }))
    }

    fn lost(&mut self, why: &'static str) -> Violation {
        self.buf.advance(1);
        self.seeking = true;
        Violation(why)
    }

    /// Drops bytes until the needle starts the buffer; false when more bytes are needed.
    fn seek(&mut self) -> bool {
        match self.buf.windows(self.needle.len()).position(|window| window == self.needle) {
            Some(at) => {
                self.buf.advance(at);
                self.seeking = false;
                true
            }
            None => {
                let keep = self.buf.len().min(self.needle.len() - 1);
                self.buf.advance(self.buf.len() - keep);
                false
            }
        }
    }
}

/// What the host asks for when it opens a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Answered with [`Reply::Pong`].
    Ping,
    /// Run a program; answered with [`Reply::Exit`] after all its output.
    Exec(ExecRequest),
    /// Run a program that goes on when this stream and this host are gone. Answered with [`Reply::Command`] when it has
    /// been started.
    Start {
        /// 1-64 bytes that no other command has.
        id: String,
        /// What it is called, for people.
        name: Option<String>,
        /// The program; it gets no standard input.
        exec: ExecRequest,
    },
    /// The programs that were started so: those that run and the last ones that have ended. Answered with
    /// [`Reply::Commands`].
    Commands,
    /// Send what is kept of such a program's output, each part on the stream it was written to. Answered with
    /// [`Reply::Command`].
    CommandLogs {
        /// Which.
        id: String,
        /// Go on sending until it has ended.
        follow: bool,
    },
    /// Send a signal to such a program's process group. Answered with [`Reply::Command`].
    KillCommand {
        /// Which.
        id: String,
        /// Without: SIGTERM, then SIGKILL after [`KILL_GRACE_MS`], and the answer comes after its end.
        signal: Option<i32>,
    },
    /// Take the stream's data up to `Eof` and put it in place of `path` in one step.
    WriteFile {
        /// Where to; missing parent directories are made.
        path: String,
        /// Permission bits; `None` keeps those of the file that is there, or 0644.
        mode: Option<u32>,
        /// User and group; `None` keeps those of the file that is there, or takes the directory's.
        owner: Option<(u32, u32)>,
    },
    /// Send the contents of `path`.
    ReadFile {
        /// A regular file, or anything that can be read to an end.
        path: String,
        /// Where to begin, in bytes.
        offset: u64,
        /// At most so many bytes; `None`: to the end.
        len: Option<u64>,
    },
    /// Answered with [`Reply::Stat`].
    Stat {
        /// What to look at; symbolic links are followed.
        path: String,
    },
    /// Write everything back and stop writes to the root file system and to what was mounted by [`Request::Mount`], for at
    /// most `auto_thaw_ms`.
    Freeze {
        /// When the guest thaws by itself, in milliseconds; capped at [`MAX_FREEZE_MS`].
        auto_thaw_ms: u64,
    },
    /// Allow writes again. Answered with [`Reply::Thawed`].
    Thaw,
    /// Set the wall clock.
    SetClock {
        /// Nanoseconds since the Unix epoch.
        unix_nanos: u64,
    },
    /// Set the host name.
    SetHostname {
        /// 1-64 letters, digits, dots and hyphens.
        name: String,
    },
    /// Write back all dirty data.
    Sync,
    /// Send what is in a directory, by name: the data are [`DirEntry`]s, each in postcard with its length (u32) before it.
    List {
        /// A directory.
        path: String,
    },
    /// Make a directory and those above it; fine when it is there.
    MakeDir {
        /// Its path.
        path: String,
        /// Permission bits of a directory that is made; `None`: 0755.
        mode: Option<u32>,
    },
    /// Remove a file, a link, or a directory.
    Remove {
        /// Its path.
        path: String,
        /// With all that is in it; otherwise a directory must be empty.
        recursive: bool,
    },
    /// Give a file or directory another name; a file that has it is replaced.
    Rename {
        /// What.
        from: String,
        /// Its new path, on the same file system.
        to: String,
    },
    /// Send a directory and all that is in it as a tar archive.
    ReadTree {
        /// A directory.
        path: String,
    },
    /// Take the stream's data up to `Eof` as a tar archive and unpack it. Answered with [`Reply::Tree`].
    WriteTree {
        /// A directory; made if missing.
        path: String,
        /// Remove what is in it and not in the archive.
        delete: bool,
    },
    /// Connect to a TCP port of the guest's loopback, 127.0.0.1 and else ::1. The guest says `Connected` and then the
    /// stream's data, both ways, is the connection's; each side's `Eof` closes its half. Answered with [`Reply::Done`] when
    /// both halves are closed.
    Connect {
        /// The port.
        port: u16,
        /// How long to try again while nothing listens there, in milliseconds; capped at [`MAX_CONNECT_MS`].
        wait_ms: u64,
    },
    /// Be this sandbox and no other. Answered with [`Reply::Identified`].
    Identify(Identity),
    /// Mount a disk besides the root. Fine when it is mounted there already.
    Mount(Mount),
    /// Look for devices, mount the root disk and move into it: what a guest waits for that was started to have its root
    /// later (`miosa.root=later` on the kernel's command line). Until then it refuses everything else. Fine when it has a
    /// root already.
    MountRoot(Root),
    /// End all processes, write everything back and power off. Answered just before the power goes.
    Shutdown {
        /// Time between SIGTERM and SIGKILL, in milliseconds; capped at 30 s.
        grace_ms: u64,
    },
}

/// What makes a guest one sandbox and not another one with the same disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// 32 hex digits, for `/etc/machine-id`. When the disk has another one, it is a copy: what must not be shared goes.
    pub machine_id: String,
    /// Host name: 1-64 letters, digits, dots and hyphens.
    pub hostname: String,
    /// Mixed into the kernel's random numbers.
    pub entropy: Vec<u8>,
    /// Nanoseconds since the Unix epoch.
    pub unix_nanos: u64,
    /// The hardware address of its network device, if it has one. None: the device keeps its own.
    pub mac: Option<[u8; 6]>,
    /// It goes on from a state in which it was running: nobody is at the other end of its TCP connections to the outside
    /// any more, so they are ended. Those within the guest stay.
    pub woken: bool,
}

/// What a guest becomes that waits without a root. Many may have been started as copies of one such guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The disk: a device's file, or `serial:` and a virtio device's serial number.
    pub disk: String,
    /// Host name: 1-64 letters, digits, dots and hyphens.
    pub hostname: String,
    /// Bring up the network device, if there is one.
    pub network: bool,
    /// Mixed into the kernel's random numbers before anything else is done: copies of a guest have the same ones.
    pub entropy: Vec<u8>,
    /// Nanoseconds since the Unix epoch: the clock of a copy stood still.
    pub unix_nanos: u64,
}

/// A disk besides the root, and where it is to be seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The virtio device's serial number.
    pub serial: String,
    /// A directory; made if missing.
    pub path: String,
    /// Nothing is written to it.
    pub read_only: bool,
}

/// The longest a guest stays frozen without being told to thaw, in milliseconds.
pub const MAX_FREEZE_MS: u64 = 60_000;

/// The longest a guest waits for something to listen on a port, in milliseconds.
pub const MAX_CONNECT_MS: u64 = 600_000;

/// How long a command may take to end by itself before it is killed, in milliseconds.
pub const KILL_GRACE_MS: u64 = 5_000;

/// A program to run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; the program is looked up in `PATH` of the resulting environment. None, on a terminal: the
    /// user's login shell.
    pub argv: Vec<String>,
    /// Added to the default environment (`PATH`, `HOME`, `USER`, `LOGNAME`, `SHELL`, `TERM`, `LANG`).
    pub env: Vec<(String, String)>,
    /// Working directory; by default `/workspace` if it exists, else `/`.
    pub cwd: Option<String>,
    /// User name or numeric id; by default root.
    pub user: Option<String>,
    /// When the whole process group is killed, in milliseconds from its start.
    pub timeout_ms: Option<u64>,
    /// Whether the stream's data is the program's standard input; otherwise that is `/dev/null`.
    pub stdin: bool,
    /// Run it on a terminal of this size: its input and both outputs are that, and all it writes is standard output.
    pub tty: Option<TerminalSize>,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub cols: u16,
}

/// A successful end of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// To `Ping`.
    Pong(GuestInfo),
    /// To `Exec`.
    Exit(ExitStatus),
    /// To `Start`, `CommandLogs` and `KillCommand`.
    Command(CommandStatus),
    /// To `Commands`, oldest first.
    Commands(Vec<CommandStatus>),
    /// To `Stat`.
    Stat(FileStat),
    /// To `WriteTree`.
    Tree(TreeSummary),
    /// To `Identify`.
    Identified {
        /// The disk had been another sandbox's.
        fresh: bool,
        /// An ssh server is installed and has no host keys: make some.
        host_keys_missing: bool,
    },
    /// To `Thaw`.
    Thawed {
        /// False when the guest had thawed by itself before: what was done meanwhile did not see a frozen disk.
        was_frozen: bool,
    },
}

/// What the agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// Version of the agent's package.
    pub agent_version: String,
    /// The kernel's release.
    pub kernel: String,
    /// Milliseconds since the guest's kernel started.
    pub uptime_ms: u64,
}

/// How a program ended: exactly one of `code` and `signal` is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// Exit code.
    pub code: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Whether it was killed because its time was over.
    pub timed_out: bool,
}

/// A program that runs, or ran, on its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandStatus {
    /// What the host called it.
    pub id: String,
    /// For people; the beginning of it.
    pub name: Option<String>,
    /// Number of its process in the guest.
    pub pid: i32,
    /// Program and arguments, the beginning of them.
    pub command: String,
    /// By the guest's clock, nanoseconds since the Unix epoch.
    pub started_nanos: u64,
    /// When it ended, and how; none while it runs. When it could not be watched any more, neither code nor signal is set.
    pub ended: Option<(u64, ExitStatus)>,
    /// Bytes it has written to both outputs.
    pub output_bytes: u64,
    /// How many of them, from the first on, are kept no more.
    pub dropped_bytes: u64,
}

/// What kind of file there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link; only in lists, elsewhere links are followed.
    Symlink,
    /// Anything else.
    Other,
}

/// Answer to `Stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStat {
    /// What it is.
    pub kind: FileKind,
    /// Length in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the contents, nanoseconds since the Unix epoch.
    pub mtime_nanos: i64,
}

/// Something in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntry {
    /// Its name; what is not UTF-8 is replaced.
    pub name: String,
    /// What it is; of a link, the link itself.
    pub stat: FileStat,
}

/// Most bytes of an encoded [`DirEntry`].
pub const MAX_ENTRY: usize = 4096;

/// What became of an archive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeSummary {
    /// Files written.
    pub files: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Files and directories removed because the archive does not have them.
    pub removed: u64,
}

/// What kind of thing went wrong in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorKind {
    /// No such file, program or user.
    NotFound,
    /// A file was wanted and there is a directory.
    IsDirectory,
    /// A directory was wanted and there is something else.
    NotDirectory,
    /// The disk is full or a quota is used up.
    NoSpace,
    /// Not allowed.
    Permission,
    /// The request makes no sense.
    Invalid,
    /// The guest is at a limit; try later.
    Busy,
    /// It took too long.
    Timeout,
    /// The host cancelled the stream.
    Cancelled,
    /// Any other error of the guest's kernel.
    Io,
    /// Nothing listens on the port.
    Refused,
    /// The other end of a connection broke it off.
    Reset,
}

/// A failure reported by the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AgentError {
    /// What to match on.
    pub kind: ErrorKind,
    /// What to show.
    pub message: String,
}

impl AgentError {
    /// An error with a message of at most 4 KiB.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> AgentError {
        let mut message: String = message.into();
        if message.len() > 4096 {
            let end = (0..=4096).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
            message.truncate(end);
        }
        AgentError { kind, message }
    }

    /// An I/O error met while doing `what`.
    pub fn io(what: impl std::fmt::Display, error: &std::io::Error) -> AgentError {
        use std::io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::NotFound => ErrorKind::NotFound,
            Io::IsADirectory => ErrorKind::IsDirectory,
            Io::NotADirectory => ErrorKind::NotDirectory,
            Io::StorageFull | Io::QuotaExceeded => ErrorKind::NoSpace,
            Io::PermissionDenied | Io::ReadOnlyFilesystem => ErrorKind::Permission,
            Io::InvalidInput | Io::InvalidFilename | Io::ArgumentListTooLong => ErrorKind::Invalid,
            Io::TimedOut => ErrorKind::Timeout,
            Io::ConnectionRefused => ErrorKind::Refused,
            Io::ConnectionReset | Io::BrokenPipe | Io::NotConnected => ErrorKind::Reset,
            Io::ResourceBusy | Io::WouldBlock => ErrorKind::Busy,
            _ => ErrorKind::Io,
        };
        AgentError::new(kind, format!("{what}: {error}"))
    }
}

/// The end of a stream.
pub type Outcome = Result<Reply, AgentError>;

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: [u8; 16] = *b"0123456789abcdef";

    fn drain(decoder: &mut Decoder) -> (Vec<Frame>, Vec<Violation>) {
        let (mut frames, mut violations) = (Vec::new(), Vec::new());
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => return (frames, violations),
                Err(violation) => violations.push(violation),
            }
        }
    }

    fn greeted() -> Decoder {
        let mut decoder = Decoder::guest();
        decoder.push(&greeting(NONCE));
        assert_eq!(drain(&mut decoder).0[0].hello(), Ok((NONCE, VERSION)));
        decoder
    }

    fn bytes_of(frame: &Frame) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        bytes
    }

    #[test]
    fn frames_come_back_whatever_the_pieces() {
        let request = Request::Exec(ExecRequest { argv: vec!["ls".into(), "ü".into()], ..Default::default() });
        let frames = [
            Frame::with(7, Kind::Open, &request).unwrap(),
            Frame::new(7, Kind::Data, vec![0; MAX_PAYLOAD]),
            Frame::window(7, 4096),
            Frame::new(7, Kind::Eof, Bytes::new()),
        ];
        let bytes: Vec<u8> = frames.iter().flat_map(bytes_of).collect();
        for piece in [1, 3, 4096, bytes.len()] {
            let mut decoder = greeted();
            let mut seen = Vec::new();
            for part in bytes.chunks(piece) {
                decoder.push(part);
                let (frames, violations) = drain(&mut decoder);
                assert!(violations.is_empty());
                seen.extend(frames);
            }
            assert_eq!(seen, frames);
        }
        assert_eq!(frames[0].parse::<Request>(), Ok(request));
        assert_eq!(frames[2].credit(), Ok(4096));
    }

    #[test]
    fn a_new_greeting_is_found_behind_a_frame_cut_off_anywhere() {
        let whole = bytes_of(&Frame::new(3, Kind::Data, vec![7; MAX_PAYLOAD]));
        for cut in [1, 8, 15, 16, 17, 30_000, whole.len() - 4, whole.len() - 1] {
            let mut decoder = greeted();
            decoder.push(&whole[..cut]);
            assert_eq!(drain(&mut decoder), (vec![], vec![]));
            decoder.push(&greeting(NONCE));
            let (frames, _) = drain(&mut decoder);
            assert_eq!(frames.len(), 1, "cut at {cut}");
            assert_eq!(frames[0].kind, Kind::Hello);
        }
    }

    #[test]
    fn the_host_ignores_what_was_meant_for_another() {
        let mut decoder = Decoder::host(NONCE);
        decoder.push(&[0x4d; 100]);
        decoder.push(&bytes_of(&hello_ack([1; 16])));
        decoder.push(&bytes_of(&Frame::new(3, Kind::Data, vec![7; 999]))[500..]);
        assert_eq!(drain(&mut decoder), (vec![], vec![]));
        decoder.push(&bytes_of(&hello_ack(NONCE)));
        assert_eq!(drain(&mut decoder).0, vec![hello_ack(NONCE)]);
    }

    #[test]
    fn hostile_bytes_are_refused_and_bounded() {
        let mut too_long = bytes_of(&Frame::new(3, Kind::Data, vec![1]));
        too_long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut kind = bytes_of(&Frame::new(3, Kind::Data, vec![1]));
        kind[12] = 99;
        for bad in [too_long, kind, vec![0xff; 4096]] {
            let mut decoder = greeted();
            decoder.push(&bad);
            let (frames, violations) = drain(&mut decoder);
            assert!(frames.is_empty() && violations.len() == 1, "{violations:?}");
            for _ in 0..100 {
                decoder.push(&[0xaa; 4096]);
                assert!(drain(&mut decoder).0.is_empty());
            }
            assert!(decoder.buf.len() < 64, "garbage is not kept");
        }
        assert!(Frame::window(1, WINDOW + 1).credit().is_err());
        assert!(Frame::new(1, Kind::Window, vec![1]).credit().is_err());
        assert!(Frame::new(1, Kind::Open, vec![200; 9]).parse::<Request>().is_err());
        let huge = Request::Exec(ExecRequest { argv: vec!["x".repeat(MAX_PAYLOAD)], ..Default::default() });
        assert!(Frame::with(1, Kind::Open, &huge).is_err());
    }

    #[test]
    fn tiny_frames_cost_more_than_their_length() {
        assert_eq!((cost(0), cost(1), cost(5000)), (MIN_COST, MIN_COST, 5000));
        assert_eq!((sendable(10, 10), sendable(300, 1000), sendable(WINDOW, 1 << 20)), (0, 300, MAX_PAYLOAD));
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        assert_eq!(AgentError::new(ErrorKind::Io, "ü".repeat(4000)).message.len(), 4096);
    }
}
