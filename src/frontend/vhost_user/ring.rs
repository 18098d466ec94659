//! A virtqueue and the thread that serves it.
//!
//! While a ring runs, its thread owns everything about it; its configuration can only be changed after [`Ring::stop`]
//! has taken it back. There is no lock to hold and nothing that could be resized under a running queue. The one
//! exception is the call descriptor, which VMMs exchange at run time (they mask interrupts that way).
//!
//! Requests of one ring complete in the order they were made available. A VMM that reconnects resumes from the ring's used
//! index. With a table of requests in flight (`inflight`), those come first, whoever had taken them; without one, the
//! order makes the used index exactly the first request that was not answered. A daemon that dies stops answering before
//! its sockets close; one that stops a server has to do it in that order too.

use super::inflight::QueueTable;
use super::memory::GuestRam;
use super::request::{BlockDevice, Outcome};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_FLUSH;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The largest ring a driver may ask for.
const MAX_RING_SIZE: u16 = 1024;

/// Requests behind a write that are carried out before it is answered: what they write is handed over together. Half of a
/// common depth, so that a driver has something to do meanwhile.
const BATCH: usize = 16;

/// Answers are looked at by the driver when it likes; if it sleeps it is woken for this many, or after this long: to be
/// woken for each costs it more than a short request.
const NOTIFY_FOR: usize = 8;
const NOTIFY_AFTER: Duration = Duration::from_micros(20);

type CallSlot = Arc<Mutex<Option<File>>>;

/// A ring, stopped or running.
pub(super) struct Ring {
    index: usize,
    state: State,
    call: CallSlot,
    kick: Option<File>,
    pub(super) enabled: bool,
    addressed: bool,
}

enum State {
    Stopped(Queue),
    Running { worker: JoinHandle<Queue>, stop: Arc<Stop> },
}

struct Stop {
    flag: AtomicBool,
    event: EventFd,
}

/// The ring runs, so its configuration is fixed.
#[derive(Debug)]
pub(super) struct Frozen;

impl Ring {
    pub(super) fn new(index: usize) -> io::Result<Self> {
        let queue = new_queue()?;
        Ok(Self {
            index,
            state: State::Stopped(queue),
            call: CallSlot::default(),
            kick: None,
            enabled: false,
            addressed: false,
        })
    }

    /// The queue, to be configured.
    pub(super) fn stopped(&mut self) -> Result<&mut Queue, Frozen> {
        match &mut self.state {
            State::Stopped(queue) => Ok(queue),
            State::Running { .. } => Err(Frozen),
        }
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// The ring has addresses now.
    pub(super) fn set_addressed(&mut self) {
        self.addressed = true;
    }

    /// Where the guest rings. The ring has to be stopped.
    pub(super) fn set_kick(&mut self, kick: Option<File>) -> io::Result<()> {
        self.kick = kick.map(event_descriptor).transpose()?;
        Ok(())
    }

    /// Where to ring back, from now on. Rings once, since an answer may have gone to the old place; a call too many is
    /// always allowed.
    pub(super) fn set_call(&mut self, call: Option<File>) -> io::Result<()> {
        *self.call.lock() = call.map(event_descriptor).transpose()?;
        if self.is_running() {
            signal(&self.call);
        }
        Ok(())
    }

    /// Starts the thread if the ring is enabled and complete; otherwise does nothing.
    pub(super) fn start(
        &mut self,
        ram: Option<&Arc<GuestRam>>,
        features: u64,
        mut inflight: Option<QueueTable>,
        device: impl FnOnce() -> BlockDevice,
    ) -> io::Result<()> {
        let (State::Stopped(queue), Some(kick), Some(ram)) = (&mut self.state, &self.kick, ram) else { return Ok(()) };
        if !self.enabled || !self.addressed {
            return Ok(());
        }
        queue.set_ready(true);
        if !queue.is_valid(ram.memory()) {
            queue.set_ready(false);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the ring is outside of guest memory"));
        }
        // The used index is the guest's to keep over a reconnection; the available index came by SET_VRING_BASE.
        let used = queue.used_idx(ram.memory(), Ordering::Acquire).map_err(io::Error::other)?;
        queue.set_next_used(used.0);
        let unfinished = inflight.as_mut().map(|table| table.unfinished(features, used.0)).unwrap_or_default();
        if !unfinished.is_empty() {
            tracing::debug!(queue = self.index, requests = unfinished.len(), "taking up what was in flight");
            // Taken off the ring, and not answered.
            queue.set_next_avail(used.0.wrapping_add(unfinished.len() as u16));
        }
        let stop = Arc::new(Stop { flag: AtomicBool::new(false), event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? });
        let kick = kick.try_clone()?;
        let queue = std::mem::replace(queue, new_queue()?);
        let worker = Worker {
            index: self.index,
            queue,
            kick,
            call: self.call.clone(),
            ram: ram.clone(),
            device: device(),
            inflight,
            unfinished,
            carried_out: Vec::with_capacity(BATCH),
            unnotified: None,
            stop: stop.clone(),
        };
        let worker = std::thread::Builder::new().name(format!("vblk-q{}", self.index)).spawn(move || worker.run())?;
        self.state = State::Running { worker, stop };
        Ok(())
    }

    /// Stops the thread after the request it is at. Afterwards the available index is exact.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        let State::Running { worker, stop } = std::mem::replace(&mut self.state, State::Stopped(new_queue()?)) else {
            return Ok(());
        };
        stop.flag.store(true, Ordering::Release);
        stop.event.write(1)?;
        match worker.join() {
            Ok(mut queue) => {
                queue.set_ready(false);
                self.state = State::Stopped(queue);
                Ok(())
            }
            Err(_) => Err(io::Error::other(format!("the thread of queue {} panicked", self.index))),
        }
    }

    /// Forgets the descriptors: the next start needs new ones.
    pub(super) fn release(&mut self) {
        self.kick = None;
        *self.call.lock() = None;
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(queue = self.index, %error, "a queue did not stop cleanly");
        }
    }
}

fn new_queue() -> io::Result<Queue> {
    Queue::new(MAX_RING_SIZE).map_err(io::Error::other)
}

/// Accepts only a real eventfd, made non-blocking: a descriptor of another kind could block the thread for ever.
fn event_descriptor(file: File) -> io::Result<File> {
    let target = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if target.as_os_str() != "anon_inode:[eventfd]" {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "kick and call have to be eventfds"));
    }
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(file)
}

fn signal(call: &CallSlot) {
    if let Some(mut call) = call.lock().as_ref() {
        // A full counter is a signal that nobody has read yet.
        if let Err(error) = call.write(&1_u64.to_ne_bytes())
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::warn!(%error, "cannot signal the VMM");
        }
    }
}

/// Whether a request is likely to be a flush: the guest may change it until it is carried out.
fn is_flush<M>(memory: &GuestMemoryMmap<()>, mut chain: DescriptorChain<M>) -> bool
where
    M: Deref,
    M::Target: GuestMemory,
{
    let kind = chain.next().map(|first| memory.read_obj::<u32>(first.addr()));
    kind.is_some_and(|kind| kind.is_ok_and(|kind| u32::from_le(kind) == VIRTIO_BLK_T_FLUSH))
}

struct Worker {
    index: usize,
    queue: Queue,
    kick: File,
    call: CallSlot,
    ram: Arc<GuestRam>,
    device: BlockDevice,
    inflight: Option<QueueTable>,
    /// Heads of requests to be carried out before those on the ring.
    unfinished: Vec<u16>,
    /// Heads of requests that were carried out and not answered yet, in order.
    carried_out: Vec<(u16, Outcome)>,
    /// Answers that the driver was not woken for, and when the first one was given.
    unnotified: Option<(usize, Instant)>,
    stop: Arc<Stop>,
}

impl Worker {
    fn run(mut self) -> Queue {
        if let Err(error) = self.resubmit() {
            tracing::warn!(queue = self.index, %error, "requests that were in flight cannot be taken up");
        }
        loop {
            // First, then wait: a kick may have come before the thread was there.
            if let Err(error) = self.drain() {
                // The driver broke its ring. It may repair it and kick again, or reset the device.
                tracing::debug!(queue = self.index, %error, "ring not usable");
            }
            if self.ram.is_lost() {
                tracing::warn!(queue = self.index, "the VMM took guest memory away; the queue is not served any more");
                return self.queue;
            }
            if !self.wait() {
                return self.queue;
            }
        }
    }

    /// Waits for a kick; false means to stop.
    fn wait(&mut self) -> bool {
        loop {
            let mut events =
                [PollFd::new(self.kick.as_fd(), PollFlags::POLLIN), PollFd::new(self.stop_fd(), PollFlags::POLLIN)];
            match poll(&mut events, PollTimeout::NONE) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(queue = self.index, %error, "cannot wait for the guest");
                    return false;
                }
            }
        }
        // Nothing to read is possible: the VMM has the descriptor as well.
        let _ = self.kick.read(&mut [0; 8]);
        !self.stop.flag.load(Ordering::Acquire)
    }

    fn stop_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        // SAFETY: `EventFd` owns the descriptor and `self.stop` keeps it open for as long as `self` is borrowed.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(self.stop.event.as_raw_fd()) }
    }

    /// Serves what is available, until there is nothing or the ring is to stop.
    fn drain(&mut self) -> Result<(), virtio_queue::Error> {
        let served = self.serve();
        // Whatever ended it, what was carried out is answered.
        let ram = self.ram.clone();
        let answered = self.answer(&ram);
        served.and(answered).and(self.notify(&ram))
    }

    fn serve(&mut self) -> Result<(), virtio_queue::Error> {
        let ram = self.ram.clone();
        let memory = ram.memory();
        loop {
            self.queue.disable_notification(memory)?;
            while let Some(chain) = self.queue.iter(memory)?.next() {
                // The guest can keep the ring full for ever.
                if self.stop.flag.load(Ordering::Acquire) {
                    self.queue.go_to_previous_position();
                    return Ok(());
                }
                if let Some(table) = &mut self.inflight {
                    table.begin(chain.head_index());
                }
                if is_flush(memory, chain.clone()) {
                    // Nobody before it is to wait for the disk.
                    self.answer(&ram)?;
                    self.notify(&ram)?;
                }
                self.carry_out(&ram, chain)?;
                if ram.is_lost() {
                    return Ok(());
                }
            }
            self.answer(&ram)?;
            self.notify(&ram)?;
            if !self.queue.enable_notification(memory)? {
                return Ok(());
            }
        }
    }

    /// Carries one request out. It is answered unless something before it waits to be handed over together with it.
    fn carry_out<M>(&mut self, ram: &GuestRam, chain: DescriptorChain<M>) -> Result<(), virtio_queue::Error>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let head = chain.head_index();
        let outcome = self.device.execute(ram, chain);
        let waits = outcome.is_held() || !self.carried_out.is_empty();
        self.carried_out.push((head, outcome));
        if waits && self.carried_out.len() < BATCH {
            return Ok(());
        }
        self.answer(ram)?;
        match self.unnotified {
            Some((count, since)) if count >= NOTIFY_FOR || since.elapsed() >= NOTIFY_AFTER => self.notify(ram),
            _ => Ok(()),
        }
    }

    /// Wakes the driver if it wants to be woken for what was answered.
    fn notify(&mut self, ram: &GuestRam) -> Result<(), virtio_queue::Error> {
        if self.unnotified.take().is_some() && !ram.is_lost() && self.queue.needs_notification(ram.memory())? {
            signal(&self.call);
        }
        Ok(())
    }

    /// Answers what was carried out, in order.
    fn answer(&mut self, ram: &GuestRam) -> Result<(), virtio_queue::Error> {
        if self.carried_out.is_empty() {
            return Ok(());
        }
        let memory = ram.memory();
        self.device.hand_over(self.carried_out.iter_mut().map(|(_, outcome)| outcome));
        let unnotified = self.unnotified.get_or_insert_with(|| (0, Instant::now()));
        unnotified.0 += self.carried_out.len();
        for (head, outcome) in self.carried_out.drain(..) {
            let written = self.device.answer(ram, &outcome);
            if ram.is_lost() {
                return Ok(());
            }
            if let Some(table) = &self.inflight {
                table.answering(head);
            }
            match self.queue.add_used(memory, head, written) {
                Ok(()) => {
                    if let Some(table) = &self.inflight {
                        table.answered(head, self.queue.next_used());
                    }
                }
                // Refuses a head outside of the ring: such a request cannot be answered.
                Err(virtio_queue::Error::InvalidDescriptorIndex) => {
                    if let Some(table) = &self.inflight {
                        table.give_up(head);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Carries out what was in flight, oldest first. Its heads may have left the ring by now, so they are put on one of
    /// our own, behind the guest's memory.
    fn resubmit(&mut self) -> Result<(), virtio_queue::Error> {
        let heads = std::mem::take(&mut self.unfinished);
        if heads.is_empty() {
            return Ok(());
        }
        let ram = self.ram.clone();
        let behind = GuestAddress(ram.memory().last_addr().0.next_multiple_of(4096).saturating_add(4096));
        let bytes = (6 + 2 * heads.len()).next_multiple_of(4096);
        let other = |_| virtio_queue::Error::AddressOverflow;
        let region = GuestRegionMmap::<()>::from_range(behind, bytes, None).map_err(other)?;
        let memory = ram.memory().insert_region(Arc::new(region)).map_err(|_| virtio_queue::Error::AddressOverflow)?;
        let mut ring = vec![0_u16.to_le(), (heads.len() as u16).to_le()];
        ring.extend(heads.iter().map(|head| head.to_le()));
        for (at, word) in ring.into_iter().enumerate() {
            memory.write_obj(word, behind.unchecked_add(2 * at as u64)).map_err(virtio_queue::Error::GuestMemory)?;
        }
        let mut own = Queue::new(MAX_RING_SIZE)?;
        own.try_set_size(self.queue.size())?;
        own.try_set_desc_table_address(GuestAddress(self.queue.desc_table()))?;
        own.try_set_avail_ring_address(behind)?;
        own.try_set_used_ring_address(GuestAddress(self.queue.used_ring()))?;
        own.set_ready(true);
        for chain in own.iter(&memory)? {
            if self.stop.flag.load(Ordering::Acquire) {
                // Still in the table, for whoever starts the ring next.
                break;
            }
            self.carry_out(&ram, chain)?;
        }
        self.answer(&ram)?;
        self.notify(&ram)
    }
}
