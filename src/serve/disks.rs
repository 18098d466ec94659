//! The front ends, as the engine asks for them.

use std::path::Path;
use std::sync::Arc;

use storage::Disk;
use vmm::DiskAttachment;

use super::Error;
use crate::config::{DiskFrontendArg, VmmArg};
use crate::engine::attach::{AttachedDisk, DiskFrontend, ROOT, Slot};
use crate::engine::error::{Error as EngineError, Kind, Result};
use crate::frontend::{FUSE, FuseMount, Traffic, VHOST_USER, VhostUserServer};

/// The front end of the daemon's setting. A fake machine needs none.
pub(super) fn open(
    kind: DiskFrontendArg,
    vmm: VmmArg,
    dir: &Path,
    traffic: Traffic,
) -> std::result::Result<Arc<dyn DiskFrontend>, Error> {
    match (vmm, kind) {
        (VmmArg::Fake, _) => Ok(Arc::new(Unshown)),
        (VmmArg::Qemu, DiskFrontendArg::VhostUser) => Ok(Arc::new(VhostUser { traffic })),
        (VmmArg::Qemu, DiskFrontendArg::Fuse) => {
            let mount = FuseMount::mount(dir).map_err(|e| {
                Error::new(4, "fuse_unavailable", chain(&e)).hint("install fuse3, or use --disk-frontend vhost-user")
            })?;
            Ok(Arc::new(Fuse { mount: Arc::new(mount), traffic }))
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// One virtio-blk back end a disk.
struct VhostUser {
    traffic: Traffic,
}

impl DiskFrontend for VhostUser {
    fn attach(&self, slot: Slot<'_>, disk: Disk) -> Result<Box<dyn AttachedDisk>> {
        // Its name is the device's serial number.
        let socket = slot.run_dir.join(format!("{}.sock", slot.serial));
        let server = VhostUserServer::start_for_state(self.traffic.counted(VHOST_USER, disk), &socket)
            .map_err(|e| EngineError::new(Kind::MachineUnavailable, chain(&e)))?;
        Ok(Box::new(VhostUserDisk(server)))
    }
}

struct VhostUserDisk(VhostUserServer);

impl AttachedDisk for VhostUserDisk {
    fn attachment(&self) -> DiskAttachment {
        DiskAttachment::VhostUserBlk { socket: self.0.socket().to_owned() }
    }

    fn is_connected(&self) -> bool {
        self.0.is_connected()
    }

    fn detach(self: Box<Self>) {
        self.0.stop();
    }
}

/// One file a disk.
struct Fuse {
    mount: Arc<FuseMount>,
    traffic: Traffic,
}

impl DiskFrontend for Fuse {
    fn attach(&self, slot: Slot<'_>, disk: Disk) -> Result<Box<dyn AttachedDisk>> {
        let name = match slot.serial {
            ROOT => slot.sandbox.to_owned(),
            // Several sandboxes may read one volume.
            volume => format!("{}.{volume}", slot.sandbox),
        };
        self.mount
            .add(&name, self.traffic.counted(FUSE, disk))
            .map_err(|e| EngineError::new(Kind::MachineUnavailable, chain(&e)))?;
        Ok(Box::new(FuseDisk { mount: self.mount.clone(), name }))
    }
}

struct FuseDisk {
    mount: Arc<FuseMount>,
    name: String,
}

impl AttachedDisk for FuseDisk {
    fn attachment(&self) -> DiskAttachment {
        DiskAttachment::RawFile { path: self.mount.path(&self.name) }
    }

    fn detach(self: Box<Self>) {
        if !self.mount.remove(&self.name) {
            tracing::warn!(name = %self.name, "a disk to be taken off the FUSE mount was not there");
        }
    }
}

/// For fake machines, which have files of their own.
struct Unshown;

impl DiskFrontend for Unshown {
    fn attach(&self, slot: Slot<'_>, _: Disk) -> Result<Box<dyn AttachedDisk>> {
        Ok(Box::new(UnshownDisk(slot.run_dir.join(slot.serial))))
    }
}

struct UnshownDisk(std::path::PathBuf);

impl AttachedDisk for UnshownDisk {
    fn attachment(&self) -> DiskAttachment {
        DiskAttachment::RawFile { path: self.0.clone() }
    }

    fn detach(self: Box<Self>) {}
}
