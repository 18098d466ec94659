//! What a VMM, or whoever comes to a disk's socket, can send: vhost-user messages in any order, with any descriptors. The server
//! ends such a connection or answers, keeps none of its descriptors, and serves the next one.

#![no_main]

mod store;

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use miosa::frontend::VhostUserServer;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use storage::Store;

/// Messages of one connection.
const MESSAGES: usize = 64;
/// After this long an end that does not come is one that was forgotten.
const PATIENCE: Duration = Duration::from_secs(20);

struct Server {
    socket: PathBuf,
    store: Store,
    runs: u64,
    open: usize,
    _server: VhostUserServer,
    _dir: tempfile::TempDir,
}

static SERVER: LazyLock<Mutex<Server>> = LazyLock::new(|| {
    let (store, disk) = store::with_disk(256 << 10);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("disk.sock");
    let server = VhostUserServer::start(disk, &socket).unwrap();
    Mutex::new(Server { socket, store, runs: 0, open: 0, _server: server, _dir: dir })
});

fuzz_target!(|data: &[u8]| {
    let mut server = SERVER.lock().unwrap();
    let mut stream = UnixStream::connect(&server.socket).unwrap();
    let mut rest = data;
    for _ in 0..MESSAGES {
        let Some((head, after)) = rest.split_first_chunk::<4>() else { break };
        let (payload, after) = after.split_at(usize::from(head[3]).min(after.len()));
        rest = after;
        if send(&stream, *head, payload).is_err() {
            break;
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Write);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answers = Vec::new();
    match stream.read_to_end(&mut answers) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("the connection does not end"),
        _ => {}
    }
    drop(stream);
    server.runs += 1;
    if server.runs.is_multiple_of(512) {
        server.store.seal().unwrap();
        server.store.gc(false).unwrap();
        let began = Instant::now();
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        // Ends of connections come after their last byte.
        while server.open != 0 && open() > server.open {
            assert!(began.elapsed() < PATIENCE, "{} descriptors, and there were {}", open(), server.open);
            std::thread::sleep(Duration::from_millis(5));
        }
        server.open = open();
    }
});

/// A message: its code, what its flags say, which descriptors go with it, and the length of what follows.
fn send(stream: &UnixStream, [code, flags, with, _]: [u8; 4], payload: &[u8]) -> nix::Result<()> {
    let len = if flags & 0x80 == 0 { payload.len() as u32 } else { u32::from(flags) << 4 };
    // Version 1, unless the input says otherwise; an answer is wanted or not.
    let word = if flags & 0x40 == 0 { 1 | u32::from(flags & 0xc) } else { flags.into() };
    let mut message = Vec::new();
    message.extend(u32::from(code % 48).to_le_bytes());
    message.extend(word.to_le_bytes());
    message.extend(len.to_le_bytes());
    message.extend(payload);
    let files = descriptors(with);
    let numbers: Vec<i32> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &control[..] };
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&message)], control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

fn descriptors(with: u8) -> Vec<OwnedFd> {
    let memory = |bytes: u64| {
        let file = File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        OwnedFd::from(file)
    };
    let event = || OwnedFd::from(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap());
    match with % 12 {
        0..=2 => Vec::new(),
        3 | 4 => vec![event()],
        5 | 6 => vec![memory(64 << 10)],
        7 => (0..with / 12).map(|_| memory(64 << 10)).collect(),
        8 => vec![memory(0)],
        9 => vec![File::open("/dev/null").unwrap().into()],
        10 => vec![event(), memory(4096)],
        _ => {
            let (read, write) = nix::unistd::pipe().unwrap();
            vec![read, write]
        }
    }
}
