//! vhost-user-blk, driven by our own driver, well-behaved and hostile, and by QEMU.

use crate::driver::{Descriptor, Driver, Queue, Settings};
use crate::support::{BOOTED, COUNTER, MIB, TestStore, boot, boot_sector, busy_boot_sector, machine, pattern};
use miosa::frontend::VhostUserServer;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use storage::Disk;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
const NEXT: u32 = VRING_DESC_F_NEXT;
const WRITE: u32 = VRING_DESC_F_WRITE;

struct Setup {
    server: VhostUserServer,
    socket: PathBuf,
    disk: Disk,
    store: TestStore,
}

fn serve(size_bytes: u64) -> Setup {
    let store = TestStore::new();
    let disk = store.disk("disk", size_bytes);
    let socket = store.dir.path().join("disk-7.sock");
    let server = VhostUserServer::start(disk.clone(), &socket).unwrap();
    Setup { server, socket, disk, store }
}

impl Setup {
    fn connect(&self, settings: Settings) -> Driver {
        Driver::connect(&self.socket, settings).unwrap()
    }
}

/// The device still works: a write arrives and comes back.
fn check_alive(queue: &mut Queue, seed: u64) {
    let data = pattern(seed, 8192);
    assert_eq!(queue.write(24, &data).unwrap(), OK);
    assert_eq!(queue.read(24, data.len()).unwrap(), (OK, data));
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes()[..], &flags.to_le_bytes()[..]].concat()
}

#[test]
fn reads_and_writes_of_any_sector_arrive_and_the_configuration_tells_the_geometry() {
    for event_idx in [true, false] {
        let setup = serve(64 * MIB);
        let mut driver = setup.connect(Settings { event_idx, ..Settings::default() });
        assert_eq!(driver.capacity_sectors(), 64 * MIB / 512);
        assert_eq!(driver.config[20..24], 512_u32.to_le_bytes());
        assert_eq!(driver.config[24], 3, "physical blocks of 4096 bytes");
        let queue = &mut driver.queues[0];
        // Neither start nor end on a block of the store, one sector, many blocks, the very last sector.
        for (sector, sectors) in [(0, 8), (1, 1), (7, 3), (13, 2000), (64 * 2048 - 1, 1)] {
            let data = pattern(sector + 1, sectors * 512);
            assert_eq!(queue.write(sector, &data).unwrap(), OK);
            assert_eq!(queue.read(sector, data.len()).unwrap(), (OK, data.clone()));
            let mut stored = vec![0; data.len()];
            setup.disk.read(sector * 512, &mut stored).unwrap();
            assert_eq!(stored, data);
        }
        assert_eq!(queue.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).unwrap().0, OK);
        let (status, serial) = queue.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20).unwrap();
        assert_eq!((status, &serial[..6]), (OK, &b"disk-7"[..]));
        assert_eq!(queue.request(77, 0, &[], 0).unwrap().0, UNSUPP);
    }
}

#[test]
fn discard_clears_whole_blocks_and_write_zeroes_exactly_its_ranges() {
    let setup = serve(16 * MIB);
    let mut driver = setup.connect(Settings::default());
    let queue = &mut driver.queues[0];
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let data = pattern(3, 1 << 20);
        assert_eq!(queue.write(0, &data).unwrap(), OK);
        let two = [range(8, 16, 0), range(103, 50, 0)].concat();
        assert_eq!(queue.request(kind, 0, &two, 0).unwrap().0, OK);
        let mut expected = data.clone();
        expected[8 * 512..24 * 512].fill(0);
        // Of a discard the device may leave what is not a whole block, and does.
        let second = if kind == VIRTIO_BLK_T_DISCARD { 104..152 } else { 103..153 };
        expected[second.start * 512..second.end * 512].fill(0);
        assert!(queue.read(0, data.len()).unwrap() == (OK, expected));
    }
    assert_eq!(queue.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 8, 1), 0).unwrap().0, OK, "may unmap");
    assert_eq!(queue.request(VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 1), 0).unwrap().0, UNSUPP);
    assert_eq!(queue.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 8, 2), 0).unwrap().0, UNSUPP);
    let last = 16 * MIB / 512 - 1;
    for bad in [range(last, 2, 0), range(u64::MAX, 1, 0), range(u64::MAX / 512, u32::MAX, 0), vec![0; 15], vec![0; 17]]
    {
        assert_eq!(queue.request(VIRTIO_BLK_T_DISCARD, 0, &bad, 0).unwrap().0, IOERR);
    }
    let too_many = range(0, 8, 0).repeat(65);
    assert_eq!(queue.request(VIRTIO_BLK_T_DISCARD, 0, &too_many, 0).unwrap().0, IOERR);
    check_alive(queue, 9);
}

#[test]
fn queues_work_at_the_same_time_and_deep() {
    let setup = serve(64 * MIB);
    let settings = Settings { queues: 4, ring_size: 128, slot_bytes: 64 << 10, ..Settings::default() };
    let mut driver = setup.connect(settings);
    std::thread::scope(|scope| {
        for (part, queue) in driver.queues.iter_mut().enumerate() {
            scope.spawn(move || {
                let first_sector = part as u64 * 16 * MIB / 512;
                let request_of = |i: u64| (first_sector + i * 96, pattern(part as u64 * 1000 + i, 48 << 10));
                let mut in_flight = 0;
                for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN] {
                    let (mut submitted, mut completed) = (0, 0);
                    let mut slots = std::collections::VecDeque::new();
                    while completed < 300 {
                        while submitted < 300 {
                            let (sector, data) = request_of(submitted);
                            let slot = match kind {
                                VIRTIO_BLK_T_OUT => queue.submit(kind, sector, &data, 0),
                                _ => queue.submit(kind, sector, &[], data.len()),
                            };
                            let Some(slot) = slot else { break };
                            slots.push_back(slot);
                            submitted += 1;
                            in_flight = slots.len().max(in_flight);
                        }
                        let completion = queue.complete().unwrap();
                        assert_eq!((completion.status, Some(completion.slot)), (OK, slots.pop_front()));
                        if kind == VIRTIO_BLK_T_IN {
                            let (_, expected) = request_of(completed);
                            let mut data = vec![0; expected.len()];
                            queue.take(completion.slot, &mut data);
                            assert!(data == expected, "queue {part}, request {completed}");
                            assert_eq!(completion.written as usize, expected.len() + 1);
                        }
                        completed += 1;
                    }
                }
                assert_eq!(in_flight, queue.depth());
            });
        }
    });
}

#[test]
fn a_server_outlives_connections_and_restarts_of_queues() {
    let setup = serve(16 * MIB);
    for round in 0..5 {
        let mut driver = setup.connect(Settings::default());
        if round > 0 {
            assert_eq!(driver.queues[0].read(0, 4096).unwrap(), (OK, pattern(round - 1, 4096)));
        }
        assert_eq!(driver.queues[0].write(0, &pattern(round, 4096)).unwrap(), OK);
        check_alive(&mut driver.queues[0], round);
        driver.restart(0).unwrap();
        check_alive(&mut driver.queues[0], round + 50);
    }
}

#[test]
fn a_flush_reaches_the_log_on_disk_and_without_that_feature_every_write_does() {
    let setup = serve(16 * MIB);
    let store = &setup.store.store;
    let mut driver = setup.connect(Settings::default());
    let syncs = store.log_syncs();
    assert_eq!(driver.queues[0].write(3, &pattern(1, 4096)).unwrap(), OK);
    assert_eq!(driver.queues[0].request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).unwrap().0, OK);
    assert!(store.log_syncs() > syncs);
    drop(driver);
    let mut driver = setup.connect(Settings { without: 1 << VIRTIO_BLK_F_FLUSH, ..Settings::default() });
    let syncs = store.log_syncs();
    assert_eq!(driver.queues[0].write(3, &pattern(2, 4096)).unwrap(), OK);
    assert!(store.log_syncs() > syncs);
    check_alive(&mut driver.queues[0], 99);
}

#[test]
fn a_vmm_that_does_not_read_its_answers_cannot_hold_the_server() {
    let setup = serve(16 * MIB);
    let mut stream = UnixStream::connect(&setup.socket).unwrap();
    // GET_FEATURES, version 1, no payload; until the server is stuck with its answers and takes no more.
    let message = [1_u32, 1, 0].map(u32::to_le_bytes).concat();
    stream.set_nonblocking(true).unwrap();
    let mut events = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    while poll(&mut events, PollTimeout::from(500_u16)).unwrap() == 1 {
        let _ = (&stream).write(&message);
    }
    setup.server.stop();
    assert!(!setup.socket.exists());
    let _ = stream.write(&message);
}

#[test]
fn a_driver_that_reconnects_loses_no_request() {
    reconnect_under_load(false);
    reconnect_under_load(true);
}

fn reconnect_under_load(inflight: bool) {
    let mut setup = serve(64 * MIB);
    let settings = Settings { queues: 2, ring_size: 256, slot_bytes: 64 << 10, inflight, ..Settings::default() };
    let mut driver = setup.connect(settings);
    let data = |round: u64, queue: usize, i: u64| pattern(round * 1000 + queue as u64 * 100 + i, 64 << 10);
    let sector = |queue: usize, i: u64| (queue as u64 * 64 + i) * 128;
    for round in 0..10 {
        for (index, queue) in driver.queues.iter_mut().enumerate() {
            for i in 0..queue.depth() as u64 {
                queue.submit(VIRTIO_BLK_T_OUT, sector(index, i), &data(round, index, i), 0).unwrap();
            }
        }
        // Some of these are answered, some are not; one of each queue may be under way.
        setup.server.stop();
        setup.server = VhostUserServer::start(setup.disk.clone(), &setup.socket).unwrap();
        driver.reconnect(&setup.socket).unwrap();
        for (index, queue) in driver.queues.iter_mut().enumerate() {
            for _ in 0..queue.depth() {
                assert_eq!(queue.complete().unwrap().status, OK);
            }
            for i in 0..queue.depth() as u64 {
                assert!(queue.read(sector(index, i), 64 << 10).unwrap() == (OK, data(round, index, i)));
            }
        }
    }
}

#[test]
fn what_was_in_flight_is_carried_out_oldest_first_and_nothing_else() {
    let mut setup = serve(16 * MIB);
    let mut driver = setup.connect(Settings { inflight: true, ..Settings::default() });
    check_alive(&mut driver.queues[0], 1);
    let base = driver.queues[0].raw().load(driver.queues[0].raw().used + 2);
    setup.server.stop();
    // A device that completes out of order died over these: the second was answered, the others were not; and by its
    // counters it had taken the third before the first. Both write to the same place, so the last one is seen.
    let queue = &mut driver.queues[0];
    let heads: Vec<u16> = [(8, 11), (16, 12), (8, 13), (32, 14)]
        .map(|(sector, seed)| queue.submit(VIRTIO_BLK_T_OUT, sector, &pattern(seed, 4096), 0).unwrap() * 4)
        .to_vec();
    let raw = queue.raw();
    let slot = raw.used + 4 + 8 * u64::from(base % raw.size);
    raw.put(slot, &u32::from(heads[1]).to_le_bytes());
    raw.put(slot + 4, &1_u32.to_le_bytes());
    raw.store(raw.used + 2, base.wrapping_add(1));
    let (_, file) = driver.inflight.as_ref().unwrap();
    let entry = |head: u16| 16 + 16 * u64::from(head);
    let put = |at: u64, bytes: &[u8]| std::os::unix::fs::FileExt::write_all_at(file, bytes, at).unwrap();
    // The last batch is what it had answered and not yet noted.
    put(12, &heads[1].to_le_bytes());
    for (head, counter) in [(heads[0], 102_u64), (heads[1], 101), (heads[2], 100)] {
        put(entry(head), &[1]);
        put(entry(head) + 8, &counter.to_le_bytes());
    }
    let untouched = pattern(7, 4096);
    setup.disk.write(16 * 512, &untouched).unwrap();
    setup.server = VhostUserServer::start(setup.disk.clone(), &setup.socket).unwrap();
    driver.reconnect(&setup.socket).unwrap();
    let queue = &mut driver.queues[0];
    let order: Vec<u16> = (0..4).map(|_| queue.complete().unwrap().slot * 4).collect();
    // The one that was not taken at all comes last, and none comes twice.
    assert_eq!(order, [heads[1], heads[2], heads[0], heads[3]]);
    assert!(queue.read(8, 4096).unwrap() == (OK, pattern(11, 4096)));
    assert!(queue.read(32, 4096).unwrap() == (OK, pattern(14, 4096)));
    assert!(queue.read(16, 4096).unwrap() == (OK, untouched), "an answered request is not carried out again");
    check_alive(queue, 2);
}

/// Serves a store until it is killed: the other process of the next test.
fn serve_until_killed(dir: &Path) -> ! {
    let store = storage::Store::open(&dir.join("store"), storage::Options::default()).unwrap();
    let disk = store.disk(store.disks()[0].id).unwrap();
    let _server = VhostUserServer::start(disk, &dir.join("disk.sock")).unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn a_server_that_is_killed_loses_nothing_that_its_driver_was_told() {
    if let Some(dir) = std::env::var_os("MIOSA_TEST_SERVE") {
        serve_until_killed(Path::new(&dir));
    }
    let test = TestStore::new();
    test.create("disk", 64 * MIB);
    let TestStore { store, dir } = test;
    store.close().unwrap();
    drop(store);
    let dir = dir.path();
    let spawn = || {
        let _ = std::fs::remove_file(dir.join("disk.sock"));
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "vhost_user::a_server_that_is_killed_loses_nothing_that_its_driver_was_told"])
            .env("MIOSA_TEST_SERVE", dir)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut child = Running(child);
        while UnixStream::connect(dir.join("disk.sock")).is_err() {
            assert!(child.0.try_wait().unwrap().is_none(), "the server ended");
            std::thread::yield_now();
        }
        child
    };
    let mut server = spawn();
    let settings = Settings { queues: 2, ring_size: 256, slot_bytes: 16 << 10, inflight: true, ..Settings::default() };
    let mut driver = Driver::connect(&dir.join("disk.sock"), settings).unwrap();
    let data = |round: u64, queue: usize, i: u64| pattern(round * 10_000 + queue as u64 * 1000 + i, 16 << 10);
    let sector = |queue: usize, i: u64| (queue as u64 * 1024 + i) * 32;
    for round in 0..6 {
        for (index, queue) in driver.queues.iter_mut().enumerate() {
            for i in 0..queue.depth() as u64 {
                queue.submit(VIRTIO_BLK_T_OUT, sector(index, i), &data(round, index, i), 0).unwrap();
            }
            // Answered, and never flushed.
            for _ in 0..10 * round {
                assert_eq!(queue.complete().unwrap().status, OK);
            }
        }
        server.0.kill().unwrap();
        server.0.wait().unwrap();
        server = spawn();
        driver.reconnect(&dir.join("disk.sock")).unwrap();
        for (index, queue) in driver.queues.iter_mut().enumerate() {
            for _ in 10 * round..queue.depth() as u64 {
                assert_eq!(queue.complete().unwrap().status, OK);
            }
            for i in 0..queue.depth() as u64 {
                assert!(queue.read(sector(index, i), 16 << 10).unwrap() == (OK, data(round, index, i)), "{round} {i}");
            }
        }
    }
}

#[test]
fn connections_do_not_leak_descriptors_or_threads() {
    let setup = serve(16 * MIB);
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    // Other tests of this process come and go, so count what is ours: threads of queues with a name of ours would be
    // theirs as well. Hence a child: this test run alone.
    if std::env::var_os("MIOSA_TEST_ALONE").is_none() {
        let alone = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "vhost_user::connections_do_not_leak_descriptors_or_threads", "--nocapture"])
            .env("MIOSA_TEST_ALONE", "1")
            .output()
            .unwrap();
        assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stderr));
        return;
    }
    let once = || {
        let mut driver = setup.connect(Settings { queues: 4, ..Settings::default() });
        driver.queues.iter_mut().for_each(|queue| check_alive(queue, 1));
    };
    // A connection is known to be over when the next one is served.
    once();
    drop(setup.connect(Settings::default()));
    let mut last = setup.connect(Settings::default());
    check_alive(&mut last.queues[0], 2);
    let before = (count("fd"), count("task"));
    drop(last);
    for _ in 0..20 {
        once();
    }
    let mut last = setup.connect(Settings::default());
    check_alive(&mut last.queues[0], 2);
    assert_eq!((count("fd"), count("task")), before);
}

#[test]
fn stopping_disconnects_the_vmm_and_removes_the_socket() {
    let setup = serve(16 * MIB);
    let mut driver = setup.connect(Settings { queues: 2, ..Settings::default() });
    check_alive(&mut driver.queues[0], 1);
    setup.server.stop();
    assert!(!setup.socket.exists());
    assert!(driver.restart(0).is_err(), "the connection is gone");
    // The name is free, and a stale socket in its place is no obstacle.
    drop(std::os::unix::net::UnixListener::bind(&setup.socket).unwrap());
    assert!(setup.socket.exists());
    let again = VhostUserServer::start(setup.disk.clone(), &setup.socket).unwrap();
    let mut driver = Driver::connect(&setup.socket, Settings::default()).unwrap();
    check_alive(&mut driver.queues[0], 2);
    drop(again);
    assert!(!setup.socket.exists());
    // Something that is not a socket is not replaced.
    std::fs::write(&setup.socket, "mine").unwrap();
    assert!(VhostUserServer::start(setup.disk.clone(), &setup.socket).is_err());
    assert_eq!(std::fs::read(&setup.socket).unwrap(), b"mine");
}

#[test]
fn a_read_only_disk_says_so_and_refuses_to_change() {
    let store = TestStore::new();
    let id = store.create("disk", 16 * MIB);
    let data = pattern(5, 4096);
    store.store.disk(id).unwrap().write(0, &data).unwrap();
    let snapshot = store.snapshot(id, "then");
    let socket = store.dir.path().join("snapshot.sock");
    let _server = VhostUserServer::start(snapshot, &socket).unwrap();
    let mut driver = Driver::connect(&socket, Settings::default()).unwrap();
    assert!(driver.features & (1 << VIRTIO_BLK_F_RO) != 0);
    let queue = &mut driver.queues[0];
    assert_eq!(queue.write(0, &pattern(6, 4096)).unwrap(), IOERR);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(queue.request(kind, 0, &range(0, 8, 0), 0).unwrap().0, IOERR);
    }
    assert_eq!(queue.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).unwrap().0, OK);
    assert_eq!(queue.read(0, 4096).unwrap(), (OK, data));
}

#[test]
fn requests_over_the_end_are_refused_and_touch_nothing() {
    let setup = serve(16 * MIB);
    let mut driver = setup.connect(Settings::default());
    let queue = &mut driver.queues[0];
    let end = 16 * MIB / 512;
    assert_eq!(queue.write(end - 1, &pattern(1, 512)).unwrap(), OK);
    for sector in [end, end - 1, u64::MAX, u64::MAX / 512, u64::MAX / 512 - 1, 1 << 55] {
        assert_eq!(queue.write(sector, &pattern(2, 1024)).unwrap(), IOERR, "sector {sector}");
        assert_eq!(queue.read(sector, 1024).unwrap().0, IOERR, "sector {sector}");
    }
    assert_eq!(queue.read(end - 1, 512).unwrap(), (OK, pattern(1, 512)));
    // Not a whole number of sectors.
    assert_eq!(queue.write(0, &[1; 700]).unwrap(), IOERR);
    assert_eq!(queue.read(0, 100).unwrap().0, IOERR);
    check_alive(queue, 3);
}

/// Writes a chain into the ring from descriptor 200 on, publishes it, and expects an answer.
fn answer_to(queue: &mut Queue, chain: &[Descriptor]) -> (u32, u32) {
    let raw = queue.raw();
    for (i, descriptor) in chain.iter().enumerate() {
        raw.write_descriptor(raw.descriptors, 200 + i as u16, *descriptor);
    }
    queue.publish(200);
    queue.wait_used().unwrap()
}

#[test]
fn hostile_chains_are_answered_or_dropped_and_the_next_request_works() {
    let setup = serve(16 * MIB);
    let mut driver = setup.connect(Settings { ring_size: 256, slot_bytes: 64 << 10, ..Settings::default() });
    let queue = &mut driver.queues[0];
    let raw = queue.raw();
    // The last slots' memory: a header of a write to sector 0, and a place for the status.
    let header = raw.scratch + 50 * ((64 << 10) + 64);
    let (status, data, table) = (header + 100, header + 4096, header + 16384);
    raw.put(header, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let d = |address, len, flags, next| Descriptor { address, len, flags, next };
    let status_after = |queue: &mut Queue, chain: &[Descriptor]| {
        raw.put(status, &[0xee]);
        assert_eq!(answer_to(queue, chain).0, 200);
        let mut byte = [0];
        vm_memory::Bytes::read_slice(&*raw.memory, &mut byte, vm_memory::GuestAddress(status)).unwrap();
        byte[0]
    };

    // Loops: onto itself, over two, with a status in it.
    assert_eq!(answer_to(queue, &[d(header, 16, NEXT, 200)]), (200, 0));
    assert_eq!(answer_to(queue, &[d(header, 16, NEXT, 201), d(data, 512, NEXT, 200)]), (200, 0));
    assert_eq!(status_after(queue, &[d(header, 16, NEXT, 201), d(status, 1, NEXT | WRITE, 201)]), IOERR);
    // A next descriptor outside of the table.
    assert_eq!(answer_to(queue, &[d(header, 16, NEXT, 5000)]), (200, 0));
    // No status, no data, nothing at all, only a status.
    assert_eq!(answer_to(queue, &[d(header, 16, 0, 0)]), (200, 0));
    assert_eq!(answer_to(queue, &[d(header, 0, 0, 0)]), (200, 0));
    assert_eq!(answer_to(queue, &[d(header, 0, NEXT, 201), d(data, 0, WRITE, 0)]), (200, 0));
    assert_eq!(status_after(queue, &[d(status, 1, WRITE, 0)]), IOERR);
    // A header that is too short, and one that is not there.
    assert_eq!(status_after(queue, &[d(header, 15, NEXT, 201), d(status, 1, WRITE, 0)]), IOERR);
    for nowhere in [0, 1 << 40, u64::MAX - 8, u64::MAX] {
        assert_eq!(status_after(queue, &[d(nowhere, 16, NEXT, 201), d(status, 1, WRITE, 0)]), IOERR);
        let chain = [d(header, 16, NEXT, 201), d(nowhere, 512, NEXT, 202), d(status, 1, WRITE, 0)];
        assert_eq!(status_after(queue, &chain), IOERR);
        // The status itself is nowhere: the request is given back all the same.
        assert_eq!(answer_to(queue, &[d(header, 16, NEXT, 201), d(nowhere, 1, WRITE, 0)]), (200, 0));
    }
    // Data that runs out of memory at its end; lengths that add up to more than 2^32.
    let chain = [d(header, 16, NEXT, 201), d(data, !511, NEXT, 202), d(status, 1, WRITE, 0)];
    assert_eq!(status_after(queue, &chain), IOERR);
    let chain = [d(header, 16, NEXT, 201), d(data, u32::MAX, NEXT, 202), d(status, 1, WRITE, 0)];
    assert_eq!(answer_to(queue, &chain).0, 200);
    // Readable after writable.
    let chain = [d(header, 16, NEXT, 201), d(status, 1, NEXT | WRITE, 202), d(data, 512, 0, 0)];
    assert_eq!(status_after(queue, &chain), IOERR);
    // Indirect tables: of no whole descriptors, nowhere, endless, naming another indirect one.
    let indirect = VRING_DESC_F_INDIRECT;
    assert_eq!(answer_to(queue, &[d(table, 17, indirect, 0)]), (200, 0));
    assert_eq!(answer_to(queue, &[d(1 << 40, 32, indirect, 0)]), (200, 0));
    assert_eq!(answer_to(queue, &[d(table, !15, indirect, 0)]), (200, 0));
    raw.write_descriptor(table, 0, d(header, 16, NEXT, 0));
    assert_eq!(answer_to(queue, &[d(table, 1 << 19, indirect, 0)]), (200, 0));
    raw.write_descriptor(table, 0, d(table, 16, indirect, 0));
    assert_eq!(answer_to(queue, &[d(table, 16, indirect, 0)]), (200, 0));
    // And a good one, with everything in pieces: header in two, data in two, status by itself.
    raw.put(data, &pattern(77, 1024));
    for (i, descriptor) in [
        d(header, 7, NEXT, 1),
        d(header + 7, 9, NEXT, 2),
        d(data, 100, NEXT, 3),
        d(data + 100, 924, NEXT, 4),
        d(status, 1, WRITE, 0),
    ]
    .into_iter()
    .enumerate()
    {
        raw.write_descriptor(table, i as u16, descriptor);
    }
    assert_eq!(status_after(queue, &[d(table, 5 * 16, indirect, 0)]), OK);
    assert_eq!(queue.read(0, 1024).unwrap(), (OK, pattern(77, 1024)));
    // A head outside of the ring cannot be given back; what follows it is served.
    queue.publish(999);
    check_alive(queue, 4);
}

#[test]
fn an_available_index_too_far_ahead_is_ignored_until_it_is_right_again() {
    let setup = serve(16 * MIB);
    let mut driver = setup.connect(Settings::default());
    let queue = &mut driver.queues[0];
    check_alive(queue, 1);
    let raw = queue.raw();
    for ahead in [raw.size + 1, 1000, u16::MAX] {
        let good = raw.load(raw.available + 2);
        raw.store(raw.available + 2, good.wrapping_add(ahead));
        driver.queues[0].kick.write(1).unwrap();
        // Stopping joins the queue's thread. Its index has not moved.
        assert_eq!(driver.restart(0).unwrap(), good);
        raw.store(raw.available + 2, good);
        check_alive(&mut driver.queues[0], u64::from(ahead));
    }
}

#[test]
fn a_ring_that_runs_cannot_be_made_another() {
    use vhost::VhostBackend;
    use vm_memory::GuestMemoryBackend;
    let setup = serve(16 * MIB);
    let elsewhere = |queue: &Queue, offset: u64| {
        let raw = queue.raw();
        let at = |guest: u64| raw.memory.get_host_address(vm_memory::GuestAddress(guest + offset)).unwrap() as u64;
        vhost::VringConfigData {
            queue_max_size: raw.size,
            queue_size: raw.size,
            flags: 0,
            desc_table_addr: at(raw.descriptors),
            used_ring_addr: at(raw.used),
            avail_ring_addr: at(raw.available),
            log_addr: None,
        }
    };
    type Change<'a> = (&'a str, &'a dyn Fn(&Driver) -> bool);
    let changes: [Change<'_>; 5] = [
        ("larger", &|driver| driver.frontend.set_vring_num(0, 128).is_ok()),
        ("smaller", &|driver| driver.frontend.set_vring_num(0, 16).is_ok()),
        ("begun elsewhere", &|driver| driver.frontend.set_vring_base(0, 7).is_ok()),
        ("moved", &|driver| driver.frontend.set_vring_addr(0, &elsewhere(&driver.queues[0], 4096)).is_ok()),
        ("put where it is", &|driver| driver.frontend.set_vring_addr(0, &elsewhere(&driver.queues[0], 0)).is_ok()),
    ];
    for (what, change) in changes {
        let mut driver = setup.connect(Settings::default());
        check_alive(&mut driver.queues[0], 1);
        // It says no, or nothing more.
        let accepted = change(&driver) && driver.frontend.get_features().is_ok();
        assert!(!accepted, "{what}");
        drop(driver);
        check_alive(&mut setup.connect(Settings::default()).queues[0], 2);
    }
    // Sizes that no ring has, before it runs.
    for size in [0, 3, 1000, u16::MAX] {
        let driver = setup.connect(Settings::default());
        driver.frontend.get_vring_base(0).unwrap();
        let accepted = driver.frontend.set_vring_num(0, size).is_ok() && driver.frontend.get_features().is_ok();
        assert!(!accepted, "a size of {size}");
    }
    check_alive(&mut setup.connect(Settings::default()).queues[0], 3);
}

#[test]
fn a_vmm_that_takes_its_memory_away_loses_only_its_own_device() {
    let setup = serve(16 * MIB);
    let data = pattern(1, 4096);
    let mut driver = setup.connect(Settings::default());
    assert_eq!(driver.queues[0].write(0, &data).unwrap(), OK);
    driver.memory_file.set_len(0).unwrap();
    // The driver's side of this touches no memory; the server's reads the ring.
    driver.restart(0).unwrap();
    driver.queues[0].kick.write(1).unwrap();
    drop(driver);
    let mut driver = setup.connect(Settings::default());
    assert_eq!(driver.queues[0].read(0, 4096).unwrap(), (OK, data));
    check_alive(&mut driver.queues[0], 2);
}

/// Arguments for a machine whose disk is at `socket`.
fn machine_on(socket: &Path) -> Vec<String> {
    let chardev = format!("socket,id=disk,reconnect=1,path={}", socket.display());
    [
        "-machine",
        "pc,memory-backend=ram",
        "-m",
        "64",
        "-object",
        "memory-backend-memfd,id=ram,size=64M,share=on",
        "-chardev",
        &chardev,
        "-device",
        "vhost-user-blk-pci,chardev=disk,bootindex=0,num-queues=4",
    ]
    .map(str::to_owned)
    .to_vec()
}

#[test]
fn qemu_boots_from_it_and_writes_to_it() {
    let setup = serve(16 * MIB);
    setup.disk.write(0, &boot_sector()).unwrap();
    let arguments = machine_on(&setup.socket);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    for round in 0..2 {
        setup.disk.write_zeroes(4 * 512, 512).unwrap();
        let output = boot(&arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(BOOTED), "round {round}: {errors}");
        let mut written = vec![0; 512];
        setup.disk.read(4 * 512, &mut written).unwrap();
        assert_eq!(written, boot_sector());
    }
}

/// A process that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_machine_does_not_notice_that_its_server_was_restarted() {
    let mut setup = serve(16 * MIB);
    setup.disk.write(0, &busy_boot_sector()).unwrap();
    let arguments = machine_on(&setup.socket);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut machine = Running(machine(&arguments).spawn().unwrap());
    let disk = setup.disk.clone();
    let count = || {
        let mut sector = [0; 512];
        disk.read(4 * 512, &mut sector).unwrap();
        u16::from_le_bytes(sector[COUNTER].try_into().unwrap())
    };
    let mut busy = |from: u16| {
        // Ends with the machine, which does not live for ever.
        while count().wrapping_sub(from) < 100 {
            let ended = machine.0.try_wait().unwrap();
            assert!(ended.is_none(), "the machine ended: {ended:?}");
            std::thread::yield_now();
        }
    };
    busy(0);
    for _ in 0..3 {
        setup.server.stop();
        let stopped_at = count();
        setup.server = VhostUserServer::start(setup.disk.clone(), &setup.socket).unwrap();
        busy(stopped_at);
    }
    setup.disk.write(5 * 512, &[1]).unwrap();
    assert_eq!(machine.0.wait().unwrap().code(), Some(BOOTED), "no I/O of the machine failed");
}
