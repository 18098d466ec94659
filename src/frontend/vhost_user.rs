//! A disk as a virtio-blk device of a VMM, over vhost-user.
//!
//! ```text
//! VMM ── socket ──► "vblk" thread: accept, one connection at a time; vhost-user messages configure a `Session`
//! guest ─ rings ──► "vblk-q<n>" threads: one a started ring; `ring` takes chains, `request` carries them out
//! ```
//!
//! [`VhostUserServer`] outlives connections: when the VMM goes, its session (rings, mappings, descriptors) goes with it
//! and the socket accepts the next one. The message layer and the ring layout come from the `vhost` and `virtio-queue`
//! crates. The session in between is ours rather than `vhost-user-backend`'s, because that one leaks a descriptor a
//! queue and connection, ends a queue's thread for good when a kick was already consumed, and lets a ring be
//! reconfigured while it is served.
//!
//! One queue serves its requests in order, one after the other; a guest gets parallelism from several queues. What is in
//! flight when this process dies is in a table that the VMM holds (`inflight`).

mod inflight;
mod memory;
mod request;
mod ring;

use super::{Device, Error, Result};
use inflight::Inflight;
use memory::GuestRam;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;
use request::{BlockDevice, MAX_RANGES, SECTOR_BYTES, SERIAL_BYTES};
use ring::{Frozen, Ring};
use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error as ProtocolError, GpuBackend, Result as ProtocolResult, VhostUserBackendReqHandlerMut,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

/// Queues that a VMM may use. A queue that is not used costs nothing.
const QUEUES: u16 = 16;
/// Segments of one request: what fits QEMU's default ring of 128 without indirect descriptors.
const SEGMENTS_MAX: u32 = 126;
const SEGMENT_BYTES_MAX: u32 = 1 << 20;
/// The block that the store works in: 2^3 sectors.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
const PHYSICAL_BLOCK_SECTORS: u32 = 1 << PHYSICAL_BLOCK_EXPONENT;
/// Bit of the feature that says that a back end logs what it writes to guest memory (vhost-user's `VHOST_F_LOG_ALL`).
const VHOST_F_LOG_ALL: u32 = 26;
/// Virtio leaves 256 bytes for a device's configuration; what a device does not have reads as zero.
const CONFIG_SPACE_BYTES: u32 = 256;

/// Serves one disk on one socket until stopped or dropped.
pub struct VhostUserServer {
    socket: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the server and its thread both touch.
struct Shared {
    stopping: AtomicBool,
    /// The connection being served, to be ended under the thread that reads from it.
    connection: Mutex<Option<Connection>>,
    /// One end wakes the other end's poll.
    wake: UnixStream,
}

impl VhostUserServer {
    /// Listens on `socket`, which is replaced if it is a stale socket, and serves `disk` to whoever connects, one at a
    /// time. The guest sees the file's stem as the serial number.
    pub fn start(disk: impl Into<Device>, socket: &Path) -> Result<Self> {
        // The guest's disk is whoever's can connect.
        Self::serve(disk.into(), socket, 0, 0o600)
    }

    /// The same for a VMM that asks a machine for its state only while that is held. A back end has to say that it logs the
    /// pages it writes to (`VHOST_F_LOG_ALL`) for a VMM to do so at all, and is not asked for it while its rings stand still.
    /// It does not: should a VMM ask it to, that is refused. The VMM is another user's; who can come to the socket is a matter
    /// of the directory it is in.
    pub fn start_for_state(disk: impl Into<Device>, socket: &Path) -> Result<Self> {
        Self::serve(disk.into(), socket, 1 << VHOST_F_LOG_ALL, 0o666)
    }

    fn serve(disk: Device, socket: &Path, claimed: u64, mode: u32) -> Result<Self> {
        let failed = |source| Error::Listen { path: socket.to_path_buf(), source };
        if std::fs::symlink_metadata(socket).is_ok_and(|m| m.file_type().is_socket()) {
            std::fs::remove_file(socket).map_err(failed)?;
        }
        let listener = UnixListener::bind(socket).map_err(failed)?;
        let setup = || {
            std::fs::set_permissions(socket, std::fs::Permissions::from_mode(mode))?;
            listener.set_nonblocking(true)?;
            UnixStream::pair()
        };
        let prepared = setup().and_then(|(wake, woken)| {
            let shared = Arc::new(Shared { stopping: AtomicBool::new(false), connection: Mutex::new(None), wake });
            let serial = serial_of(socket);
            let acceptor = Acceptor { listener, woken, shared: shared.clone(), disk, serial, claimed };
            let thread = std::thread::Builder::new().name("vblk".into()).spawn(move || acceptor.run())?;
            Ok((shared, thread))
        });
        match prepared {
            Ok((shared, thread)) => Ok(Self { socket: socket.to_path_buf(), shared, thread: Some(thread) }),
            Err(source) => {
                let _ = std::fs::remove_file(socket);
                Err(failed(source))
            }
        }
    }

    /// The socket to point the VMM at.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether a VMM is connected and has begun to talk.
    pub fn is_connected(&self) -> bool {
        self.shared.connection.lock().as_ref().is_some_and(|connection| connection.greeted.load(Ordering::Relaxed))
    }

    /// Disconnects the VMM if there is one, waits until no request is being carried out and removes the socket.
    pub fn stop(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Either the thread sees the flag after it has stored its connection, or we see the connection here. Done from
        // here, because the thread may be stuck in an answer that the VMM does not read.
        if let Some(connection) = self.shared.connection.lock().as_ref() {
            connection.end();
        }
        let _ = self.shared.wake.shutdown(Shutdown::Both);
        if thread.join().is_err() {
            tracing::error!(socket = %self.socket.display(), "the vhost-user thread panicked");
        }
        if let Err(error) = std::fs::remove_file(&self.socket)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(socket = %self.socket.display(), %error, "cannot remove the socket");
        }
    }
}

impl Drop for VhostUserServer {
    fn drop(&mut self) {
        self.shut_down();
    }
}

fn serial_of(socket: &Path) -> [u8; SERIAL_BYTES] {
    let mut serial = [0; SERIAL_BYTES];
    let stem = socket.file_stem().map(|s| s.as_encoded_bytes()).unwrap_or_default();
    let len = stem.len().min(SERIAL_BYTES);
    serial[..len].copy_from_slice(&stem[..len]);
    serial
}

struct Acceptor {
    listener: UnixListener,
    woken: UnixStream,
    shared: Arc<Shared>,
    disk: Device,
    serial: [u8; SERIAL_BYTES],
    /// Features that are said to be there.
    claimed: u64,
}

impl Acceptor {
    fn run(self) {
        while let Some(stream) = self.accept() {
            match self.serve(stream) {
                Ok(()) => tracing::debug!("VMM disconnected"),
                Err(error) => tracing::warn!(%error, "vhost-user connection dropped"),
            }
        }
    }

    /// The next connection; none when the server stops.
    fn accept(&self) -> Option<UnixStream> {
        loop {
            if self.shared.stopping.load(Ordering::SeqCst) {
                return None;
            }
            let mut events = [
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut events, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot wait for a VMM");
                    return None;
                }
            }
            match self.listener.accept() {
                Ok((stream, _)) => return Some(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    // Most likely out of descriptors. The connection stays pending: wait for the stop only, for a while.
                    tracing::error!(%error, "cannot accept a VMM");
                    let mut events = [PollFd::new(self.woken.as_fd(), PollFlags::POLLIN)];
                    let _ = poll(&mut events, PollTimeout::from(1000_u16));
                }
            }
        }
    }

    fn serve(&self, stream: UnixStream) -> ProtocolResult<()> {
        let session =
            Session::new(self.disk.clone(), self.serial, self.claimed).map_err(ProtocolError::ReqHandlerError)?;
        let session = Arc::new(std::sync::Mutex::new(session));
        let clone = stream.try_clone().map_err(ProtocolError::ReqHandlerError)?;
        let greeted = Arc::new(AtomicBool::new(false));
        *self.shared.connection.lock() =
            Some(Connection { stream: clone, session: session.clone(), greeted: greeted.clone() });
        let mut messages = BackendReqHandler::from_stream(stream, session);
        let outcome = loop {
            if self.shared.stopping.load(Ordering::SeqCst) {
                break Ok(());
            }
            match messages.handle_request() {
                Ok(()) => greeted.store(true, Ordering::Relaxed),
                Err(ProtocolError::Disconnected | ProtocolError::PartialMessage | ProtocolError::SocketBroken(_)) => {
                    break Ok(());
                }
                Err(_) if self.shared.stopping.load(Ordering::SeqCst) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if let Some(connection) = self.shared.connection.lock().take() {
            connection.end();
        }
        outcome
    }
}

/// A VMM that is connected.
struct Connection {
    stream: UnixStream,
    /// Locked for the length of one message, and to end.
    session: Arc<std::sync::Mutex<Session>>,
    /// It has sent a message: a connection alone can be one that its VMM has forgotten.
    greeted: Arc<AtomicBool>,
}

impl Connection {
    /// Stops the rings, then lets the VMM know. In this order: the VMM takes the used index of the moment it notices for
    /// the place to go on from, so no request may be answered after it.
    fn end(&self) {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).rings.clear();
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// One VMM's connection: negotiated features, guest memory and the rings. Dropping it stops the rings.
struct Session {
    disk: Device,
    serial: [u8; SERIAL_BYTES],
    claimed: u64,
    acked_features: u64,
    ram: Option<Arc<GuestRam>>,
    inflight: Option<Inflight>,
    rings: Vec<Ring>,
}

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

impl Session {
    fn new(disk: Device, serial: [u8; SERIAL_BYTES], claimed: u64) -> io::Result<Self> {
        let rings = (0..usize::from(QUEUES)).map(Ring::new).collect::<io::Result<_>>()?;
        Ok(Self { disk, serial, claimed, acked_features: 0, ram: None, inflight: None, rings })
    }

    fn features(&self) -> u64 {
        let mut features = PROTOCOL_FEATURES | self.claimed;
        for bit in [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ] {
            features |= 1 << bit;
        }
        let by_mode: &[u32] = if self.disk.is_read_only() {
            &[VIRTIO_BLK_F_RO]
        } else {
            &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]
        };
        by_mode.iter().fold(features, |features, bit| features | 1 << bit)
    }

    /// `struct virtio_blk_config`, little-endian.
    fn config(&self) -> [u8; CONFIG_SPACE_BYTES as usize] {
        let mut config = [0; CONFIG_SPACE_BYTES as usize];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.size_bytes() / SECTOR_BYTES).to_le_bytes()); // capacity
        put(8, &SEGMENT_BYTES_MAX.to_le_bytes()); // size_max
        put(12, &SEGMENTS_MAX.to_le_bytes()); // seg_max
        put(20, &(SECTOR_BYTES as u32).to_le_bytes()); // blk_size
        put(24, &[PHYSICAL_BLOCK_EXPONENT, 0]); // physical_block_exp, alignment_offset
        put(26, &(PHYSICAL_BLOCK_SECTORS as u16).to_le_bytes()); // min_io_size
        put(32, &[1]); // writeback
        put(34, &QUEUES.to_le_bytes()); // num_queues
        put(36, &u32::MAX.to_le_bytes()); // max_discard_sectors
        put(40, &MAX_RANGES.to_le_bytes()); // max_discard_seg
        put(44, &PHYSICAL_BLOCK_SECTORS.to_le_bytes()); // discard_sector_alignment
        put(48, &u32::MAX.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
        config
    }

    fn has_acked(&self, bit: u32) -> bool {
        self.acked_features & (1 << bit) != 0
    }

    fn ring(&mut self, index: u32) -> ProtocolResult<&mut Ring> {
        self.rings.get_mut(index as usize).ok_or(ProtocolError::InvalidParam)
    }

    fn any_running(&self) -> bool {
        self.rings.iter().any(Ring::is_running)
    }

    /// Starts the ring if it is complete and may run.
    fn start_ring(&mut self, index: usize) -> ProtocolResult<()> {
        let write_through = !self.has_acked(VIRTIO_BLK_F_FLUSH);
        let (disk, serial) = (&self.disk, self.serial);
        let table = self.inflight.as_ref().and_then(|inflight| inflight.queue(index));
        self.rings[index]
            .start(self.ram.as_ref(), self.acked_features, table, || {
                BlockDevice::new(disk.clone(), serial, write_through)
            })
            .map_err(ProtocolError::ReqHandlerError)
    }
}

impl From<Frozen> for ProtocolError {
    fn from(_: Frozen) -> Self {
        ProtocolError::InvalidOperation("the ring is running")
    }
}

/// A message that belongs to a feature we do not offer.
fn not_offered<T>() -> ProtocolResult<T> {
    Err(ProtocolError::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> ProtocolResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> ProtocolResult<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> ProtocolResult<()> {
        for ring in &mut self.rings {
            ring.stop().map_err(ProtocolError::ReqHandlerError)?;
            ring.enabled = false;
        }
        self.acked_features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> ProtocolResult<u64> {
        Ok(self.features())
    }

    fn set_features(&mut self, features: u64) -> ProtocolResult<()> {
        if features & !self.features() != 0 {
            return Err(ProtocolError::InvalidParam);
        }
        if features & (1 << VHOST_F_LOG_ALL) != 0 {
            return not_offered();
        }
        if features != self.acked_features && self.any_running() {
            return Err(Frozen.into());
        }
        self.acked_features = features;
        let event_idx = self.has_acked(VIRTIO_RING_F_EVENT_IDX);
        for index in 0..self.rings.len() {
            let ring = &mut self.rings[index];
            if let Ok(queue) = ring.stopped() {
                queue.set_event_idx(event_idx);
            }
            // Without the protocol features there is no message to enable a ring.
            if features & PROTOCOL_FEATURES == 0 {
                ring.enabled = true;
                self.start_ring(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> ProtocolResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        let ram = GuestRam::map(regions, files).map_err(ProtocolError::ReqHandlerError)?;
        tracing::debug!(regions = ram.regions(), "guest memory mapped");
        // Memory may be plugged while rings run: their addresses are the guest's and stay.
        let running: Vec<usize> = (0..self.rings.len()).filter(|&i| self.rings[i].is_running()).collect();
        for &index in &running {
            self.rings[index].stop().map_err(ProtocolError::ReqHandlerError)?;
        }
        self.ram = Some(Arc::new(ram));
        for index in running {
            self.start_ring(index)?;
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> ProtocolResult<()> {
        let size = u16::try_from(num).map_err(|_| ProtocolError::InvalidParam)?;
        self.ring(index)?.stopped()?.try_set_size(size).map_err(|_| ProtocolError::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> ProtocolResult<()> {
        let ram = self.ram.clone().ok_or(ProtocolError::InvalidParam)?;
        let guest =
            |address| ram.guest_address(address).map(vm_memory::GuestAddress).ok_or(ProtocolError::InvalidParam);
        let (descriptor, available, used) = (guest(descriptor)?, guest(available)?, guest(used)?);
        let ring = self.ring(index)?;
        let queue = ring.stopped()?;
        queue
            .try_set_desc_table_address(descriptor)
            .and_then(|()| queue.try_set_avail_ring_address(available))
            .and_then(|()| queue.try_set_used_ring_address(used))
            .map_err(|_| ProtocolError::InvalidParam)?;
        ring.set_addressed();
        self.start_ring(index as usize)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> ProtocolResult<()> {
        let base = u16::try_from(base).map_err(|_| ProtocolError::InvalidParam)?;
        self.ring(index)?.stopped()?.set_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> ProtocolResult<VhostUserVringState> {
        let ring = self.ring(index)?;
        ring.stop().map_err(ProtocolError::ReqHandlerError)?;
        ring.release();
        let base = ring.stopped()?.next_avail();
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> ProtocolResult<()> {
        // A ring that is polled rather than kicked is nothing that VMMs ask for.
        let fd = fd.ok_or(ProtocolError::InvalidParam)?;
        let always_enabled = self.acked_features & PROTOCOL_FEATURES == 0;
        let ring = self.ring(u32::from(index))?;
        ring.stop().and_then(|()| ring.set_kick(Some(fd))).map_err(ProtocolError::ReqHandlerError)?;
        ring.enabled |= always_enabled;
        self.start_ring(usize::from(index))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> ProtocolResult<()> {
        self.ring(u32::from(index))?.set_call(fd).map_err(ProtocolError::ReqHandlerError)
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> ProtocolResult<()> {
        self.ring(u32::from(index)).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> ProtocolResult<VhostUserProtocolFeatures> {
        // Goes with what is claimed of logging.
        let log = match self.claimed {
            0 => VhostUserProtocolFeatures::empty(),
            _ => VhostUserProtocolFeatures::LOG_SHMFD,
        };
        Ok(log
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> ProtocolResult<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> ProtocolResult<u64> {
        Ok(u64::from(QUEUES))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> ProtocolResult<()> {
        let ring = self.ring(index)?;
        ring.enabled = enable;
        if enable { self.start_ring(index as usize) } else { ring.stop().map_err(ProtocolError::ReqHandlerError) }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> ProtocolResult<Vec<u8>> {
        let end =
            offset.checked_add(size).filter(|end| *end <= CONFIG_SPACE_BYTES).ok_or(ProtocolError::InvalidParam)?;
        Ok(self.config()[offset as usize..end as usize].to_vec())
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> ProtocolResult<()> {
        // Only the write cache could be set, and its feature is not offered. The VMM passes the guest's writes on, so
        // this is no reason to end the connection.
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> ProtocolResult<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> ProtocolResult<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> ProtocolResult<(VhostUserInflight, File)> {
        let (queues, entries) = (inflight.num_queues, inflight.queue_size);
        let (bytes, file) = Inflight::create(queues, entries).map_err(ProtocolError::ReqHandlerError)?;
        // The VMM sets it when it is to be used.
        Ok((VhostUserInflight::new(bytes, 0, queues, entries), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> ProtocolResult<()> {
        if self.any_running() {
            return Err(Frozen.into());
        }
        let (offset, bytes) = (inflight.mmap_offset, inflight.mmap_size);
        let table = Inflight::map(file, offset, bytes, inflight.num_queues, inflight.queue_size);
        self.inflight = Some(table.map_err(ProtocolError::ReqHandlerError)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> ProtocolResult<u64> {
        not_offered()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy_listening: Option<bool>,
    ) -> ProtocolResult<Option<VhostUserMemoryRegionBase>> {
        not_offered()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> ProtocolResult<()> {
        not_offered()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> ProtocolResult<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> ProtocolResult<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> ProtocolResult<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> ProtocolResult<()> {
        not_offered()
    }
}
