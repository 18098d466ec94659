//! What a guest can put on a virtqueue of its disk: descriptors that lie, loop or lead nowhere, and requests that make no sense.
//! The device answers or does not, and serves a ring that is started anew as if nothing had been.

#![no_main]

#[path = "../../frontend/driver.rs"]
mod driver;
mod store;

use std::sync::{LazyLock, Mutex};

use driver::{Descriptor, Driver, Settings};
use libfuzzer_sys::fuzz_target;
use miosa::frontend::VhostUserServer;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use storage::Store;

const DISK: u64 = 256 << 10;
const SETTINGS: Settings =
    Settings { queues: 1, ring_size: 64, slot_bytes: 4096, event_idx: true, without: 0, inflight: true };
/// Of what the guest has beside its ring.
const SCRATCH: usize = 64 << 10;

struct Machine {
    driver: Driver,
    store: Store,
    runs: u64,
    _server: VhostUserServer,
    _dir: tempfile::TempDir,
}

static MACHINE: LazyLock<Mutex<Machine>> = LazyLock::new(|| {
    let (store, disk) = store::with_disk(DISK);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("disk.sock");
    let server = VhostUserServer::start(disk, &socket).unwrap();
    let driver = Driver::connect(&socket, SETTINGS).unwrap();
    Mutex::new(Machine { driver, store, runs: 0, _server: server, _dir: dir })
});

fuzz_target!(|data: &[u8]| {
    let Some((&[descriptors, heads], rest)) = data.split_first_chunk::<2>() else { return };
    let mut machine = MACHINE.lock().unwrap();
    let machine = &mut *machine;
    let (table, rest) = rest.split_at((usize::from(descriptors) % 64 * 8).min(rest.len()));
    let (heads, scratch) = rest.split_at((usize::from(heads) % 32).min(rest.len()));
    let ring = machine.driver.queues[0].raw();
    ring.put(ring.scratch, &scratch[..scratch.len().min(SCRATCH)]);
    for (index, bytes) in table.chunks_exact(8).enumerate() {
        let (place, len) = (u16::from_le_bytes([bytes[0], bytes[1]]), u16::from_le_bytes([bytes[2], bytes[3]]));
        let address = match bytes[4] % 8 {
            0 => ring.descriptors.wrapping_add(place.into()),
            1 => u64::from(place) << 48 | u64::from(len),
            _ => ring.scratch.wrapping_add(place.into()),
        };
        let len = if bytes[4] & 0x80 == 0 { len.into() } else { u32::from(len) << 16 };
        let descriptor = Descriptor { address, len, flags: bytes[5].into(), next: bytes[6].into() };
        ring.write_descriptor(ring.descriptors, index as u16, descriptor);
    }
    for (at, head) in heads.iter().enumerate() {
        ring.store(ring.available + 4 + 2 * at as u64, (*head).into());
    }
    ring.store(ring.available + 2, heads.len() as u16);
    // Who takes the second kick has done with the first.
    kick(&machine.driver);
    kick(&machine.driver);
    machine.driver.reset().unwrap();
    let (status, _) = machine.driver.queues[0].read(0, 4096).unwrap();
    assert_eq!(status, 0, "the device does not serve any more");
    machine.runs += 1;
    if machine.runs.is_multiple_of(256) {
        machine.store.seal().unwrap();
        machine.store.gc(false).unwrap();
    }
});

fn kick(driver: &Driver) {
    let kick = &driver.queues[0].kick;
    kick.write(1).unwrap();
    // SAFETY: the eventfd lives as long as the driver.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(kick)) };
    while poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO) != Ok(0) {
        std::thread::yield_now();
    }
}
