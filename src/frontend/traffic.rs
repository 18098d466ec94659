//! What passes through front ends, counted where they call a disk.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use storage::{Disk, Result};

/// A virtio-blk back end.
pub const VHOST_USER: &str = "vhost-user";
/// A file of the mount.
pub const FUSE: &str = "fuse";

/// The counters of all front ends, by their kind. Shared by clones.
#[derive(Debug, Clone, Default)]
pub struct Traffic {
    requests: Family<Label, Counter>,
    bytes: Family<Label, Counter>,
    errors: Family<Label, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Label {
    front_end: &'static str,
    operation: &'static str,
}

impl Traffic {
    /// Adds the counters to what is told.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Calls of front ends on disks; what moves more than 1 MiB is several";
        registry.register("disk_requests", help, self.requests.clone());
        registry.register("disk_bytes", "Bytes that front ends read, wrote and cleared", self.bytes.clone());
        registry.register("disk_errors", "Calls of front ends that the store refused or failed", self.errors.clone());
        // Told from the start, so that the first one is seen to be one.
        for front_end in [VHOST_USER, FUSE] {
            self.operations(front_end);
        }
    }

    /// A disk whose calls are counted as those of this kind of front end, [`VHOST_USER`] or [`FUSE`].
    pub fn counted(&self, front_end: &'static str, disk: Disk) -> Device {
        let [reads, writes, clears, flushes] = self.operations(front_end);
        Device { disk, reads, writes, clears, flushes }
    }

    fn operations(&self, front_end: &'static str) -> [Operation; 4] {
        ["read", "write", "clear", "flush"].map(|operation| {
            let label = Label { front_end, operation };
            Operation {
                requests: self.requests.get_or_create(&label).clone(),
                bytes: self.bytes.get_or_create(&label).clone(),
                errors: self.errors.get_or_create(&label).clone(),
            }
        })
    }
}

#[derive(Debug, Clone)]
struct Operation {
    requests: Counter,
    bytes: Counter,
    errors: Counter,
}

impl Operation {
    fn count<T>(&self, bytes: u64, outcome: Result<T>) -> Result<T> {
        self.requests.inc();
        match &outcome {
            Ok(_) => self.bytes.inc_by(bytes),
            Err(_) => self.errors.inc(),
        };
        outcome
    }
}

/// A disk as a front end has it: the calls of [`Disk`] that front ends make, counted.
#[derive(Clone)]
pub struct Device {
    disk: Disk,
    reads: Operation,
    writes: Operation,
    clears: Operation,
    flushes: Operation,
}

impl From<Disk> for Device {
    /// Counted for nobody.
    fn from(disk: Disk) -> Self {
        Traffic::default().counted("none", disk)
    }
}

impl Device {
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let len = into.len() as u64;
        self.reads.count(len, self.disk.read(offset, into))
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.writes.count(data.len() as u64, self.disk.write(offset, data))
    }

    pub(super) fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.clears.count(len, self.disk.discard(offset, len))
    }

    pub(super) fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.clears.count(len, self.disk.write_zeroes(offset, len))
    }

    pub(super) fn flush(&self) -> Result<()> {
        self.flushes.count(0, self.disk.flush())
    }

    /// See [`Disk::hand_over`]; part of a write, and not counted by itself.
    pub(super) fn hand_over(&self) -> Result<()> {
        self.disk.hand_over()
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.disk.is_read_only()
    }
}
