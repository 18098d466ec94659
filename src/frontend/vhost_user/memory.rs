//! The guest's memory, mapped from descriptors that the VMM sent, and how losing it does not kill the daemon.
//!
//! A VMM can truncate the file behind a mapping at any time; the next access then raises SIGBUS, which would end the
//! daemon and every other sandbox with it. So every mapping is entered in a table that a SIGBUS handler looks up: a
//! fault inside an entry replaces that mapping by private zero pages and marks it lost, and the access goes on. The
//! queue threads look at the mark before they act on what they copied ([`GuestRam::is_lost`]) and stop serving. A fault
//! anywhere else goes to the handler that was there before.
//!
//! Rejected: `process_vm_readv` on ourselves for each copy, which reports the fault as EFAULT but costs a system call a
//! copy and does not cover the rings; demanding sealed memfds, which QEMU's file-backed memory cannot give.

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::fs::File;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    AtomicAccess, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, VolatileMemory,
};

/// Mappings that can exist at a time; a VMM has at most 8.
const MAX_MAPPINGS: usize = 4096;
/// A start that is no address: the slot is taken but not yet filled.
const RESERVED: usize = 1;

struct Slot {
    /// 0 is free.
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

static SLOTS: [Slot; MAX_MAPPINGS] =
    [const { Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), lost: AtomicBool::new(false) } };
        MAX_MAPPINGS];

static PREVIOUS: OnceLock<SigAction> = OnceLock::new();
static INSTALL: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

/// An entry in the table. Must be dropped before the mapping is.
struct SlotGuard(&'static Slot);

impl SlotGuard {
    fn new(start: usize, len: usize) -> io::Result<Self> {
        install_handler()?;
        let slot = SLOTS
            .iter()
            .find(|s| s.start.compare_exchange(0, RESERVED, Ordering::AcqRel, Ordering::Relaxed).is_ok())
            .ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, "too many guest memory mappings"))?;
        slot.lost.store(false, Ordering::Relaxed);
        slot.end.store(start.saturating_add(len), Ordering::Relaxed);
        slot.start.store(start, Ordering::Release);
        Ok(Self(slot))
    }
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        self.0.start.store(0, Ordering::Release);
    }
}

fn install_handler() -> io::Result<()> {
    let _one_at_a_time = INSTALL.lock();
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    let action = SigAction::new(
        SigHandler::SigAction(on_sigbus),
        // Rust's threads have an alternate stack; the handler needs little of it.
        SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK | SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    // SAFETY: the handler only loads atomics and calls mmap, sigaction and the previous handler: async-signal-safe.
    let previous = unsafe { sigaction(Signal::SIGBUS, &action) }?;
    // Cannot be filled already: this is the only place and INSTALL is held.
    let _ = PREVIOUS.set(previous);
    Ok(())
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler installed with SA_SIGINFO, and SIGBUS fills in the address.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &SLOTS {
        let start = slot.start.load(Ordering::Acquire);
        let end = slot.end.load(Ordering::Relaxed);
        if start > RESERVED && (start..end).contains(&address) {
            // SAFETY: the range is one whole mapping of guest memory, alive as long as its slot is filled, which it is:
            // the thread that faulted holds it. Guest memory is only accessed as volatile bytes, so a change of its
            // contents under other threads is nothing they do not expect. Two threads that fault at once do it twice.
            let replaced = unsafe {
                libc::mmap(
                    start as *mut libc::c_void,
                    end - start,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if replaced != libc::MAP_FAILED {
                slot.lost.store(true, Ordering::Release);
                return;
            }
        }
    }
    match PREVIOUS.get().map(SigAction::handler) {
        Some(SigHandler::SigAction(previous)) => previous(signal, info, context),
        Some(SigHandler::Handler(previous)) => previous(signal),
        _ => {
            let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
            // SAFETY: the default action runs no code of ours; the access faults again on return and ends the process,
            // as it would have without this handler.
            let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
        }
    }
}

/// Memory that is shared with a VMM and is not its guest's. An access outside of it, or to what was taken away, does
/// nothing and reads as zero.
pub(super) struct SharedRegion {
    // Dropped first, before `mapping` unmaps what it points to.
    _slot: SlotGuard,
    mapping: MmapRegion<()>,
}

impl SharedRegion {
    /// Maps `len` bytes at `offset` of a file.
    pub(super) fn map(file: File, offset: u64, len: usize) -> io::Result<Self> {
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(io::Error::other)?;
        Ok(Self { _slot: SlotGuard::new(mapping.as_ptr() as usize, len)?, mapping })
    }

    /// Reads after all that was read before.
    pub(super) fn load<T: AtomicAccess + Default>(&self, at: usize) -> T {
        self.mapping.as_volatile_slice().load(at, Ordering::Acquire).unwrap_or_default()
    }

    /// Writes after all that was written before, as seen by whoever looks when this process is dead.
    pub(super) fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        let _ = self.mapping.as_volatile_slice().store(value, at, Ordering::Release);
    }
}

/// Where one region of the VMM's address space is in the guest's.
struct Mapping {
    vmm_address: u64,
    guest_address: u64,
    len: u64,
}

/// The memory of one guest, as its VMM described it. Never changes: a new table is a new `GuestRam`.
pub(super) struct GuestRam {
    // Dropped first, before `memory` unmaps what they point to.
    slots: Vec<SlotGuard>,
    mappings: Vec<Mapping>,
    memory: GuestMemoryMmap<()>,
}

impl GuestRam {
    /// Maps the regions that a SET_MEM_TABLE names.
    pub(super) fn map(regions: &[VhostUserMemoryRegion], files: Vec<File>) -> io::Result<Self> {
        let mut slots = Vec::new();
        let mut mappings = Vec::new();
        let mut mapped = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let mapping = region.mmap_region::<()>(file).map_err(io::Error::other)?;
            let guest = GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr))
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "guest memory region wraps around"))?;
            slots.push(SlotGuard::new(guest.as_ptr() as usize, guest.len() as usize)?);
            mappings.push(Mapping {
                vmm_address: region.user_addr,
                guest_address: region.guest_phys_addr,
                len: region.memory_size,
            });
            mapped.push(guest);
        }
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(io::Error::other)?;
        Ok(Self { slots, mappings, memory })
    }

    /// The memory, to be accessed by guest address.
    pub(super) fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Whether some of it was taken away. What was copied out since cannot be trusted.
    pub(super) fn is_lost(&self) -> bool {
        self.slots.iter().any(|slot| slot.0.lost.load(Ordering::Acquire))
    }

    /// The guest address of an address in the VMM, which is how rings are named.
    pub(super) fn guest_address(&self, vmm_address: u64) -> Option<u64> {
        self.mappings.iter().find_map(|m| {
            let offset = vmm_address.checked_sub(m.vmm_address)?;
            if offset < m.len { m.guest_address.checked_add(offset) } else { None }
        })
    }

    /// Number of regions, for the log.
    pub(super) fn regions(&self) -> usize {
        self.memory.num_regions()
    }
}
