//! Queues to a device: virtqueues over vhost-user, and io_uring on a file past the page cache.

use super::driver::{self, Driver, Settings};
use super::jobs::{Lane, Op, REQUEST_BYTES_MAX};
use crate::harness::load::Aligned;
use io_uring::{IoUring, opcode, types};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

/// Lanes of a device.
pub const QUEUES: usize = 4;
/// Requests of a lane.
pub const DEPTH: usize = 32;

/// Lanes, and what they need to stay open.
pub type Connected = (Box<dyn Send>, Vec<Box<dyn Lane>>);

/// Virtqueues of a vhost-user socket. The connection ends with the first part of the value.
///
/// # Errors
/// What the other side said.
pub fn vhost_user(socket: &Path) -> io::Result<Connected> {
    let ring_size = 4 * DEPTH as u16;
    let settings = Settings { queues: QUEUES, ring_size, slot_bytes: REQUEST_BYTES_MAX, ..Settings::default() };
    let mut driver = Driver::connect(socket, settings)?;
    let queues = std::mem::take(&mut driver.queues);
    let lanes = queues.into_iter().map(|queue| -> Box<dyn Lane> { Box::new(Virtqueue { queue, filled: [0; DEPTH] }) });
    Ok((Box::new(driver.frontend), lanes.collect()))
}

struct Virtqueue {
    queue: driver::Queue,
    filled: [usize; DEPTH],
}

impl Virtqueue {
    fn next(&self) -> u16 {
        self.queue.next_slot().expect("a free slot")
    }

    fn finished(completion: driver::Completion) -> io::Result<usize> {
        if completion.status != 0 {
            return Err(io::Error::other(format!("the device answered with status {}", completion.status)));
        }
        Ok(usize::from(completion.slot))
    }
}

impl Lane for Virtqueue {
    fn depth(&self) -> usize {
        self.queue.depth()
    }

    fn fill(&mut self, at: usize, bytes: &[u8]) {
        self.queue.put(self.next(), at, bytes);
    }

    fn filled(&mut self) -> &mut usize {
        let next = usize::from(self.next());
        &mut self.filled[next]
    }

    fn start(&mut self, op: Op) -> usize {
        let (kind, at, output, input) = match op {
            Op::Read { at, len } => (VIRTIO_BLK_T_IN, at, 0, len),
            Op::Write { at, len } => (VIRTIO_BLK_T_OUT, at, len, 0),
            Op::Flush => (VIRTIO_BLK_T_FLUSH, 0, 0, 0),
        };
        usize::from(self.queue.submit_as_is(kind, at / 512, output, input).expect("a free slot"))
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> io::Result<()> {
        done.push(Self::finished(self.queue.complete()?)?);
        while let Some(completion) = self.queue.poll_complete()? {
            done.push(Self::finished(completion)?);
        }
        Ok(())
    }

    fn look(&self, slot: usize, at: usize, into: &mut [u8]) {
        self.queue.peek(slot as u16, at, into);
    }
}

/// Rings on one file.
///
/// # Errors
/// What the kernel said.
pub fn uring(file: &Path, read_only: bool) -> io::Result<Vec<Box<dyn Lane>>> {
    let flags = nix::fcntl::OFlag::O_DIRECT.bits();
    let file = Arc::new(File::options().read(true).write(!read_only).custom_flags(flags).open(file)?);
    (0..QUEUES).map(|_| Ok(Box::new(Uring::new(file.clone())?) as Box<dyn Lane>)).collect()
}

struct Uring {
    // Before the memory: what is in flight goes first.
    ring: IoUring,
    file: Arc<File>,
    slots: Vec<Box<Aligned>>,
    filled: [usize; DEPTH],
    free: Vec<usize>,
    /// Bytes that the request in each slot is to move.
    wanted: [usize; DEPTH],
}

impl Uring {
    fn new(file: Arc<File>) -> io::Result<Self> {
        Ok(Self {
            ring: IoUring::new(DEPTH as u32)?,
            file,
            slots: (0..DEPTH).map(|_| Aligned::zeroed()).collect(),
            filled: [0; DEPTH],
            free: (0..DEPTH).rev().collect(),
            wanted: [0; DEPTH],
        })
    }

    fn next(&self) -> usize {
        *self.free.last().expect("a free slot")
    }
}

impl Drop for Uring {
    /// The kernel may still write to the memory of what is in flight.
    fn drop(&mut self) {
        while self.free.len() < DEPTH {
            let waited = self.ring.submit_and_wait(1);
            let done = self.ring.completion().map(|completion| completion.user_data() as usize);
            self.free.extend(done);
            if waited.is_err() {
                std::process::abort();
            }
        }
    }
}

impl Lane for Uring {
    fn depth(&self) -> usize {
        DEPTH
    }

    fn fill(&mut self, at: usize, bytes: &[u8]) {
        let next = self.next();
        self.slots[next].0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn filled(&mut self) -> &mut usize {
        let next = self.next();
        &mut self.filled[next]
    }

    fn start(&mut self, op: Op) -> usize {
        let slot = self.free.pop().expect("a free slot");
        let memory = self.slots[slot].0.as_mut_ptr();
        let fd = types::Fd(self.file.as_raw_fd());
        self.wanted[slot] = op.bytes() as usize;
        let entry = match op {
            Op::Read { at, len } => opcode::Read::new(fd, memory, len as u32).offset(at).build(),
            Op::Write { at, len } => opcode::Write::new(fd, memory, len as u32).offset(at).build(),
            Op::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        // SAFETY: the file and the slot's memory, which is large enough and nobody else's until the slot is free again,
        // live as long as the ring, and the ring is dropped first.
        unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) }.expect("as many entries as slots");
        slot
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> io::Result<()> {
        self.ring.submit_and_wait(1)?;
        for completion in self.ring.completion() {
            let slot = completion.user_data() as usize;
            self.free.push(slot);
            done.push(slot);
            match usize::try_from(completion.result()) {
                Ok(moved) if moved == self.wanted[slot] => {}
                Ok(moved) => return Err(io::Error::other(format!("{moved} of {} bytes", self.wanted[slot]))),
                Err(_) => return Err(io::Error::from_raw_os_error(-completion.result())),
            }
        }
        Ok(())
    }

    fn look(&self, slot: usize, at: usize, into: &mut [u8]) {
        into.copy_from_slice(&self.slots[slot].0[at..at + into.len()]);
    }
}
