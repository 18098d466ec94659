//! What the engine asks of a front end: make a disk of the store something a machine can open.
//!
//! The engine does not know the front ends; the daemon hands it one (see `serve`).

use std::path::Path;

use storage::Disk;
use vmm::DiskAttachment;

use super::error::Result;

/// A way to show disks to machines. Calls block.
pub trait DiskFrontend: Send + Sync + 'static {
    /// Shows `disk` in its slot; a handle for reading as a device that refuses writes.
    fn attach(&self, slot: Slot<'_>, disk: Disk) -> Result<Box<dyn AttachedDisk>>;
}

/// Which of a sandbox's disks one is.
#[derive(Debug, Clone, Copy)]
pub struct Slot<'a> {
    /// The sandbox.
    pub sandbox: &'a str,
    /// A directory of the session's, which exists: files that are needed go there.
    pub run_dir: &'a Path,
    /// The serial number that the guest is to see, unique in the sandbox: [`ROOT`] or a volume's id.
    pub serial: &'a str,
}

/// Serial number of a sandbox's own disk.
pub const ROOT: &str = "disk";

/// A disk being shown.
pub trait AttachedDisk: Send + Sync + 'static {
    /// How the machine finds it.
    fn attachment(&self) -> DiskAttachment;

    /// Whether a machine has it open, as far as can be told.
    fn is_connected(&self) -> bool {
        true
    }

    /// Ends the service. When this returns, no write is in flight: all that a machine was told is written is in the
    /// store (if not yet durable). Called once the machine is gone.
    fn detach(self: Box<Self>);
}
