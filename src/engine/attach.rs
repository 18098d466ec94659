//! What the engine asks of a front end: make a disk of the store something a machine can open.
//!
//! The engine does not know the front ends; the daemon hands it one (see `serve`).

use std::path::Path;

use storage::Disk;
use vmm::DiskAttachment;

use super::error::Result;

/// A way to show disks to machines. Calls block.
pub trait DiskFrontend: Send + Sync + 'static {
    /// Shows `disk` under `name` (unique among attached disks); files it needs go into `run_dir`, which exists.
    fn attach(&self, name: &str, run_dir: &Path, disk: Disk) -> Result<Box<dyn AttachedDisk>>;
}

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
