//! A virtio-blk driver over vhost-user without a VM: the other side of the socket, for tests and benches.
//!
//! "Guest" memory is a memfd, one equal part a queue: split ring, then slots of a header, a status and a data area. A
//! slot is one request in flight. [`Queue::raw`] gives the ring away to those who want to break it. It knows nothing of
//! the server, so it drives any vhost-user-blk back end.

#![allow(dead_code, reason = "shared with the benches, which use another part of it")]

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where "guest" memory starts. Not 0, which means "no ring".
const GUEST_BASE: u64 = 0x10_0000;
const RING_BYTES: u64 = 64 << 10;
const SLOT_HEADER_BYTES: u64 = 64;
/// After this long a request counts as lost. Only ever reached by a failure.
const PATIENCE: Duration = Duration::from_secs(180);
const CONFIG_BYTES: u32 = 60;

/// What to negotiate.
#[derive(Clone, Copy)]
pub struct Settings {
    pub queues: usize,
    pub ring_size: u16,
    /// The largest transfer of one request.
    pub slot_bytes: usize,
    pub event_idx: bool,
    /// Feature bits of virtio-blk to leave out.
    pub without: u64,
    /// Hold a table of requests in flight for the device.
    pub inflight: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { queues: 1, ring_size: 64, slot_bytes: 1 << 20, event_idx: true, without: 0, inflight: false }
    }
}

impl Settings {
    /// What a queue has of the memory: its ring and its slots.
    fn queue_bytes(&self) -> u64 {
        let slots = u64::from(self.ring_size / 4);
        (RING_BYTES + slots * (SLOT_HEADER_BYTES + self.slot_bytes as u64)).next_multiple_of(4096)
    }
}

/// A connection and its queues.
pub struct Driver {
    pub frontend: Frontend,
    pub features: u64,
    pub config: Vec<u8>,
    pub queues: Vec<Queue>,
    pub memory_file: File,
    /// The table of requests in flight, where the device made one.
    pub inflight: Option<(VhostUserInflight, File)>,
    memory: Arc<GuestMemoryMmap<()>>,
    settings: Settings,
}

fn protocol(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

/// Connects and agrees on features; also returns the features and the configuration.
fn negotiate(socket: &Path, settings: Settings) -> io::Result<(Frontend, u64, Vec<u8>)> {
    let mut frontend = Frontend::connect(socket, 64).map_err(protocol)?;
    frontend.set_owner().map_err(protocol)?;
    let offered = frontend.get_features().map_err(protocol)?;
    let event_idx = if settings.event_idx { 0 } else { 1 << VIRTIO_RING_F_EVENT_IDX };
    let features = offered & !event_idx & !settings.without;
    assert!(features & (1 << VIRTIO_F_VERSION_1) != 0, "a modern device");
    assert!(features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0, "indirect descriptors");
    assert!(features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0);
    let mut wanted =
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    wanted.set(VhostUserProtocolFeatures::INFLIGHT_SHMFD, settings.inflight);
    // get_protocol_features looks at what was acknowledged.
    frontend.set_features(features).map_err(protocol)?;
    let protocol_features = frontend.get_protocol_features().map_err(protocol)?;
    frontend.set_protocol_features(protocol_features & wanted).map_err(protocol)?;
    let queues = frontend.get_queue_num().map_err(protocol)?;
    assert!(queues >= settings.queues as u64, "the back end has {queues} queues");
    let blank = [0; CONFIG_BYTES as usize];
    let (_, config) = frontend.get_config(0, CONFIG_BYTES, VhostUserConfigFlags::empty(), &blank).map_err(protocol)?;
    Ok((frontend, features, config.to_vec()))
}

impl Driver {
    pub fn connect(socket: &Path, settings: Settings) -> io::Result<Self> {
        let (frontend, features, config) = negotiate(socket, settings)?;
        let part = settings.queue_bytes();
        let bytes = part * settings.queues as u64;
        let memory_file = File::from(memfd_create("driver", MFdFlags::MFD_CLOEXEC)?);
        memory_file.set_len(bytes)?;
        let offset = FileOffset::new(memory_file.try_clone()?, 0);
        let ranges = [(GuestAddress(GUEST_BASE), bytes as usize, Some(offset))];
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges_with_files(ranges).map_err(protocol)?);
        let mut driver =
            Self { frontend, features, config, queues: Vec::new(), memory_file, inflight: None, memory, settings };
        driver.share_memory()?;
        if settings.inflight {
            let wanted = VhostUserInflight::new(0, 0, settings.queues as u16, settings.ring_size);
            driver.inflight = Some(driver.frontend.get_inflight_fd(&wanted).map_err(protocol)?);
        }
        driver.share_inflight()?;
        for index in 0..settings.queues {
            let queue = Queue::new(driver.memory.clone(), GUEST_BASE + part * index as u64, settings)?;
            driver.start(index, &queue, 0)?;
            driver.queues.push(queue);
        }
        Ok(driver)
    }

    /// Connects anew after the back end has gone, as a VMM does: the rings go on where they were answered last.
    pub fn reconnect(&mut self, socket: &Path) -> io::Result<()> {
        (self.frontend, self.features, self.config) = negotiate(socket, self.settings)?;
        self.share_memory()?;
        self.share_inflight()?;
        let queues = std::mem::take(&mut self.queues);
        for (index, queue) in queues.iter().enumerate() {
            self.start(index, queue, queue.raw.load(queue.raw.used + 2))?;
        }
        self.queues = queues;
        Ok(())
    }

    fn share_inflight(&mut self) -> io::Result<()> {
        let Some((described, file)) = &self.inflight else { return Ok(()) };
        self.frontend.set_inflight_fd(described, file.as_raw_fd()).map_err(protocol)
    }

    fn host(&self) -> u64 {
        self.memory.iter().next().expect("one region").as_ptr() as u64
    }

    fn share_memory(&self) -> io::Result<()> {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: self.memory_file.metadata()?.len(),
            userspace_addr: self.host(),
            mmap_offset: 0,
            mmap_handle: self.memory_file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).map_err(protocol)?;
        Ok(())
    }

    fn start(&mut self, index: usize, queue: &Queue, base: u16) -> io::Result<()> {
        let host = self.host();
        let at = |guest: u64| guest - GUEST_BASE + host;
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.size).map_err(protocol)?;
        frontend.set_vring_base(index, base).map_err(protocol)?;
        frontend
            .set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: queue.size,
                    queue_size: queue.size,
                    flags: 0,
                    desc_table_addr: at(queue.raw.descriptors),
                    used_ring_addr: at(queue.raw.used),
                    avail_ring_addr: at(queue.raw.available),
                    log_addr: None,
                },
            )
            .map_err(protocol)?;
        frontend.set_vring_call(index, &queue.call).map_err(protocol)?;
        frontend.set_vring_kick(index, &queue.kick).map_err(protocol)?;
        frontend.set_vring_enable(index, true).map_err(protocol)
    }

    /// Stops a queue and starts it where it stopped, as a guest's reset or a migration does.
    pub fn restart(&mut self, index: usize) -> io::Result<u16> {
        let base = self.frontend.get_vring_base(index).map_err(protocol)? as u16;
        let queue = self.queues.remove(index);
        let result = self.start(index, &queue, base);
        self.queues.insert(index, queue);
        result.map(|()| base)
    }

    /// Starts the first queue anew on memory of zeroes, as a guest that boots does.
    pub fn reset(&mut self) -> io::Result<()> {
        self.frontend.get_vring_base(0).map_err(protocol)?;
        let base = self.queues[0].raw.descriptors;
        self.queues[0].raw.put(base, &vec![0; self.settings.queue_bytes() as usize]);
        let fresh = Queue::new(self.memory.clone(), base, self.settings)?;
        self.start(0, &fresh, 0)?;
        self.queues[0] = fresh;
        Ok(())
    }

    pub fn capacity_sectors(&self) -> u64 {
        u64::from_le_bytes(self.config[..8].try_into().expect("8 bytes"))
    }
}

/// Guest addresses of a ring's parts, and the memory.
#[derive(Clone)]
pub struct RawRing {
    pub memory: Arc<GuestMemoryMmap<()>>,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// First byte of memory that no ring uses.
    pub scratch: u64,
}

/// A descriptor as it is in memory.
#[derive(Clone, Copy)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u32,
    pub next: u16,
}

impl RawRing {
    pub fn write_descriptor(&self, table: u64, index: u16, descriptor: Descriptor) {
        let at = table + 16 * u64::from(index);
        self.put(at, &descriptor.address.to_le_bytes());
        self.put(at + 8, &descriptor.len.to_le_bytes());
        self.put(at + 12, &(descriptor.flags as u16).to_le_bytes());
        self.put(at + 14, &descriptor.next.to_le_bytes());
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).expect("driver memory");
    }

    pub fn load(&self, address: u64) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(address), Ordering::Acquire).expect("driver memory"))
    }

    pub fn store(&self, address: u64, value: u16) {
        self.memory.store(value.to_le(), GuestAddress(address), Ordering::Release).expect("driver memory");
    }
}

/// A completed request.
pub struct Completion {
    pub slot: u16,
    pub status: u8,
    /// Bytes that the device says it wrote.
    pub written: u32,
}

/// One virtqueue. Requests are put into slots; a slot is free again after its completion.
pub struct Queue {
    memory: Arc<GuestMemoryMmap<()>>,
    raw: RawRing,
    size: u16,
    slot_bytes: usize,
    event_idx: bool,
    pub kick: EventFd,
    pub call: EventFd,
    next_available: u16,
    next_used: u16,
    free: Vec<u16>,
}

impl Queue {
    fn new(memory: Arc<GuestMemoryMmap<()>>, base: u64, settings: Settings) -> io::Result<Self> {
        let size = settings.ring_size;
        let available = base + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(64);
        let raw =
            RawRing { memory: memory.clone(), size, descriptors: base, available, used, scratch: base + RING_BYTES };
        Ok(Self {
            memory,
            raw,
            size,
            slot_bytes: settings.slot_bytes,
            event_idx: settings.event_idx,
            kick: EventFd::new(EFD_NONBLOCK)?,
            call: EventFd::new(EFD_NONBLOCK)?,
            next_available: 0,
            next_used: 0,
            free: (0..size / 4).rev().collect(),
        })
    }

    /// The ring itself, for those who break it. Its first four descriptors belong to slot 0 and so on.
    pub fn raw(&self) -> RawRing {
        self.raw.clone()
    }

    /// Requests that fit at a time.
    pub fn depth(&self) -> usize {
        usize::from(self.size / 4)
    }

    fn slot_base(&self, slot: u16) -> u64 {
        self.raw.scratch + u64::from(slot) * (SLOT_HEADER_BYTES + self.slot_bytes as u64)
    }

    fn data(&self, slot: u16) -> GuestAddress {
        GuestAddress(self.slot_base(slot) + SLOT_HEADER_BYTES)
    }

    /// Reads what the device left in a slot.
    pub fn take(&self, slot: u16, into: &mut [u8]) {
        self.peek(slot, 0, into);
    }

    /// The same, from byte `at` of the data area on.
    pub fn peek(&self, slot: u16, at: usize, into: &mut [u8]) {
        assert!(at + into.len() <= self.slot_bytes);
        self.memory.read_slice(into, GuestAddress(self.data(slot).0 + at as u64)).expect("driver memory");
    }

    /// Makes a request available and kicks if the device wants it. None if no slot is free. `output` goes to the device;
    /// `input_bytes` are asked of it.
    pub fn submit(&mut self, kind: u32, sector: u64, output: &[u8], input_bytes: usize) -> Option<u16> {
        self.put(self.next_slot()?, 0, output);
        self.submit_as_is(kind, sector, output.len(), input_bytes)
    }

    /// The slot that the next request will have. None if no slot is free.
    pub fn next_slot(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Changes the data area of a slot from byte `at` on.
    pub fn put(&self, slot: u16, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.slot_bytes);
        self.raw.put(self.data(slot).0 + at as u64, bytes);
    }

    /// [`Queue::submit`] with `output_bytes` of what is in the next slot's data area.
    pub fn submit_as_is(&mut self, kind: u32, sector: u64, output_bytes: usize, input_bytes: usize) -> Option<u16> {
        assert!(output_bytes.max(input_bytes) <= self.slot_bytes);
        let slot = self.free.pop()?;
        let (base, data, first) = (self.slot_base(slot), self.data(slot).0, slot * 4);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.raw.put(base, &header);
        self.raw.put(base + 32, &[0xff]);
        let parts = [
            (base, 16, 0),
            (data, output_bytes as u32, 0),
            (data, input_bytes as u32, VRING_DESC_F_WRITE),
            (base + 32, 1, VRING_DESC_F_WRITE),
        ];
        let mut index = first;
        for (address, len, flags) in parts.into_iter().filter(|(_, len, _)| *len > 0) {
            let status = address == base + 32;
            let next = index + 1;
            let flags = if status { flags } else { flags | VRING_DESC_F_NEXT };
            self.raw.write_descriptor(self.raw.descriptors, index, Descriptor { address, len, flags, next });
            index = next;
        }
        self.publish(first);
        Some(slot)
    }

    /// Puts a chain's head on the available ring.
    pub fn publish(&mut self, head: u16) {
        self.raw.store(self.raw.available + 4 + 2 * u64::from(self.next_available % self.size), head);
        let old = self.next_available;
        self.next_available = old.wrapping_add(1);
        self.raw.store(self.raw.available + 2, self.next_available);
        fence(Ordering::SeqCst);
        let wanted = self.raw.load(self.raw.used + 4 + 8 * u64::from(self.size));
        // The device names the index whose passing it wants to hear of.
        if !self.event_idx || self.next_available.wrapping_sub(wanted).wrapping_sub(1) < 1 {
            self.kick.write(1).expect("an eventfd");
        }
    }

    /// The next used element, if there is one.
    pub fn poll_used(&mut self) -> Option<(u32, u32)> {
        if self.raw.load(self.raw.used + 2) == self.next_used {
            return None;
        }
        let at = self.raw.used + 4 + 8 * u64::from(self.next_used % self.size);
        let id: u32 = self.memory.read_obj(GuestAddress(at)).expect("driver memory");
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).expect("driver memory");
        self.next_used = self.next_used.wrapping_add(1);
        Some((u32::from_le(id), u32::from_le(len)))
    }

    /// Waits for the next used element by the device's call, not by looking.
    pub fn wait_used(&mut self) -> io::Result<(u32, u32)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.raw.store(self.raw.available + 4 + 2 * u64::from(self.size), self.next_used);
            fence(Ordering::SeqCst);
            if let Some(used) = self.poll_used() {
                return Ok(used);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the device does not answer"));
            }
            // SAFETY: the eventfd lives as long as `self`.
            let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
            let timeout = PollTimeout::try_from(left).map_err(protocol)?;
            match poll(&mut [PollFd::new(call, PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let _ = self.call.read();
        }
    }

    /// Waits for the next completion.
    pub fn complete(&mut self) -> io::Result<Completion> {
        let used = self.wait_used()?;
        self.completion(used)
    }

    /// The next completion, if there is one already.
    pub fn poll_complete(&mut self) -> io::Result<Option<Completion>> {
        self.poll_used().map(|used| self.completion(used)).transpose()
    }

    fn completion(&mut self, (head, written): (u32, u32)) -> io::Result<Completion> {
        let slot = u16::try_from(head / 4).map_err(protocol)?;
        let mut status = [0];
        self.memory.read_slice(&mut status, GuestAddress(self.slot_base(slot) + 32)).map_err(protocol)?;
        self.free.push(slot);
        Ok(Completion { slot, status: status[0], written })
    }

    /// One request from beginning to end, with nothing else in flight: its status and what the device sent.
    pub fn request(&mut self, kind: u32, sector: u64, output: &[u8], input_bytes: usize) -> io::Result<(u8, Vec<u8>)> {
        let slot = self.submit(kind, sector, output, input_bytes).expect("a free slot");
        let completion = self.complete()?;
        assert_eq!(completion.slot, slot, "requests of a queue complete in order");
        let mut input = vec![0; input_bytes];
        self.take(slot, &mut input);
        Ok((completion.status, input))
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) -> io::Result<u8> {
        Ok(self.request(VIRTIO_BLK_T_OUT, sector, data, 0)?.0)
    }

    pub fn read(&mut self, sector: u64, len: usize) -> io::Result<(u8, Vec<u8>)> {
        self.request(VIRTIO_BLK_T_IN, sector, &[], len)
    }
}
