//! The disks of a session: the sandbox's own and its volumes, as they are shown to its machine.

use std::path::Path;

use storage::{Disk, DiskId, Store};
use vmm::{DiskAttachment, Mount, VolumeDevice};

use super::attach::{AttachedDisk, DiskFrontend, ROOT, Slot};
use super::error::{Error, Result};

/// A volume as a sandbox has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VolumeOf {
    /// Its id, which is its device's serial number.
    pub(super) id: String,
    pub(super) disk: DiskId,
    /// Where the guest mounts it.
    pub(super) path: String,
    pub(super) read_only: bool,
}

impl VolumeOf {
    pub(super) fn mount(&self) -> Mount {
        Mount { serial: self.id.clone(), path: self.path.clone(), read_only: self.read_only }
    }
}

/// What a machine has for disks. Dropped without [`Devices::withdraw`], its front ends end as their own drop has it.
pub(super) struct Devices {
    root: Shown,
    volumes: Vec<(VolumeOf, Shown)>,
}

struct Shown {
    attached: Box<dyn AttachedDisk>,
    disk: Disk,
}

impl Devices {
    /// Shows a sandbox's disks to the machine of its next session, or of one that goes on. All or none. Blocks.
    pub(super) fn show(
        store: &Store,
        front: &dyn DiskFrontend,
        (sandbox, run_dir): (&str, &Path),
        root: DiskId,
        volumes: Vec<VolumeOf>,
    ) -> Result<Devices> {
        let show = |serial: &str, disk: Disk| {
            let attached = front.attach(Slot { sandbox, run_dir, serial }, disk.clone())?;
            Ok::<_, Error>(Shown { attached, disk })
        };
        let mut devices = Devices { root: show(ROOT, store.disk(root)?)?, volumes: Vec::new() };
        for volume in volumes {
            let shown = store.disk(volume.disk).map_err(Error::from).and_then(|disk| {
                let disk = if volume.read_only { disk.into_read_only() } else { disk };
                show(&volume.id, disk)
            });
            match shown {
                Ok(shown) => devices.volumes.push((volume, shown)),
                Err(error) => {
                    devices.detach();
                    return Err(error);
                }
            }
        }
        Ok(devices)
    }

    fn all(&self) -> impl Iterator<Item = &Shown> {
        std::iter::once(&self.root).chain(self.volumes.iter().map(|(_, shown)| shown))
    }

    /// How the machine finds the sandbox's own disk.
    pub(super) fn root(&self) -> DiskAttachment {
        self.root.attached.attachment()
    }

    /// How it finds the volumes.
    pub(super) fn volumes(&self) -> Vec<VolumeDevice> {
        let device = |(volume, shown): &(VolumeOf, Shown)| VolumeDevice {
            serial: volume.id.clone(),
            disk: shown.attached.attachment(),
            read_only: volume.read_only,
        };
        self.volumes.iter().map(device).collect()
    }

    /// What the guest is to mount, a directory before what is in it.
    pub(super) fn mounts(&self) -> Vec<Mount> {
        let mut mounts: Vec<Mount> = self.volumes.iter().map(|(volume, _)| volume.mount()).collect();
        mounts.sort_by(|a, b| a.path.cmp(&b.path));
        mounts
    }

    /// Whether a machine can wait for all of them.
    pub(super) fn outlive_their_server(&self) -> bool {
        self.all().all(|shown| shown.attached.attachment().outlives_its_server())
    }

    /// Whether the machine has all of them open.
    pub(super) fn are_connected(&self) -> bool {
        self.all().all(|shown| shown.attached.is_connected())
    }

    /// Ends the service of all. When this returns, all that the machine was told is written is in the store. Blocks.
    pub(super) fn detach(self) -> Vec<Disk> {
        let all = std::iter::once(self.root).chain(self.volumes.into_iter().map(|(_, shown)| shown));
        let ended = all.map(|Shown { attached, disk }| {
            attached.detach();
            disk
        });
        ended.collect()
    }

    /// The same, and makes it durable.
    pub(super) async fn withdraw(self) -> Result<()> {
        let flush = move || {
            // One sync for all: what one wrote may be older than what another did, and all is in one log.
            self.detach().iter().try_for_each(|disk| Ok(disk.flush()?))
        };
        tokio::task::spawn_blocking(flush)
            .await
            .map_err(|e| Error::internal(format!("detaching disks did not end: {e}")))?
    }
}
