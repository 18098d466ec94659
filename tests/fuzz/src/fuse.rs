//! Requests as a kernel sends them to the FUSE front end, and as no kernel would: answered, or refused, and the next one is. The
//! library that takes them apart may fail at lengths that do not fit each other, which a kernel does not send.

#![no_main]

mod panics;
mod store;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use miosa::frontend::fuse;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use storage::Store;

const REQUESTS: usize = 64;
const INIT: u32 = 26;
const GETATTR: u32 = 3;
const ROOT: u64 = 1;
/// Of an answer, or of nothing.
const PATIENCE: Duration = Duration::from_secs(20);

struct Kernel {
    store: Store,
    disk: storage::Disk,
    connection: Option<UnixStream>,
    runs: u64,
}

static KERNEL: LazyLock<Mutex<Kernel>> = LazyLock::new(|| {
    panics::allow_in(&["/fuser-"]);
    let (store, disk) = store::with_disk(256 << 10);
    Mutex::new(Kernel { store, disk, connection: None, runs: 0 })
});

fuzz_target!(|data: &[u8]| {
    let mut kernel = KERNEL.lock().unwrap();
    let kernel = &mut *kernel;
    let connection = kernel.connection.take().unwrap_or_else(|| connect(kernel.disk.clone()));
    if talk(&connection, data).is_some() {
        kernel.connection = Some(connection);
    }
    kernel.runs += 1;
    if kernel.runs.is_multiple_of(256) {
        kernel.store.seal().unwrap();
        kernel.store.gc(false).unwrap();
    }
});

/// A session that has been greeted.
fn connect(disk: storage::Disk) -> UnixStream {
    // One message is one request, as with the device.
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let ours = UnixStream::from(ours);
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut greeting = Vec::new();
    for word in [7_u32, 40, 1 << 20, u32::MAX >> 2] {
        greeting.extend(word.to_le_bytes());
    }
    greeting.resize(64, 0);
    (&ours).write_all(&message(INIT, 1, ROOT, &greeting)).unwrap();
    fuse::serve_connection(OwnedFd::from(theirs), vec![("disk".into(), disk.into())]).unwrap();
    let mut answer = [0; 4096];
    assert!((&ours).read(&mut answer).unwrap() >= 16, "it is greeted");
    ours
}

/// Sends the requests and one that is always answered. Nothing when the session has ended.
fn talk(mut connection: &UnixStream, mut data: &[u8]) -> Option<()> {
    for unique in 0..REQUESTS as u64 {
        // What, of which file, how much; as the input has it, or of the length that it is.
        let Some((head, rest)) = data.split_first_chunk::<4>() else { break };
        let (payload, rest) = data_of(rest, u16::from_le_bytes([head[2], head[3]]));
        data = rest;
        let mut message = message((head[0] % 64).into(), 16 + unique, node(head[1]), payload);
        if head[0] & 0x80 != 0 {
            message[0] = message[0].wrapping_add(head[1]);
        }
        connection.write_all(&message).ok()?;
    }
    connection.write_all(&message(GETATTR, 2, ROOT, &[0; 16])).ok()?;
    let mut answer = vec![0; 2 << 20];
    loop {
        let len = match connection.read(&mut answer) {
            Ok(0) => return None,
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("the last request is not answered"),
            Err(_) => return None,
        };
        assert!(len >= 16, "an answer of {len} bytes");
        if answer[8..16] == 2_u64.to_le_bytes() {
            assert_eq!(&answer[4..8], &[0; 4], "the directory is there");
            return Some(());
        }
    }
}

fn data_of(rest: &[u8], len: u16) -> (&[u8], &[u8]) {
    rest.split_at(usize::from(len).min(rest.len()))
}

/// The directory, the disk or none.
fn node(which: u8) -> u64 {
    match which % 8 {
        0 => ROOT,
        1..=6 => 17,
        _ => u64::from(which) << 8,
    }
}

fn message(opcode: u32, unique: u64, node: u64, payload: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(40 + payload.len());
    message.extend((40 + payload.len() as u32).to_le_bytes());
    message.extend(opcode.to_le_bytes());
    message.extend(unique.to_le_bytes());
    message.extend(node.to_le_bytes());
    // User, group, process and padding.
    message.extend([0; 16]);
    message.extend(payload);
    message
}
