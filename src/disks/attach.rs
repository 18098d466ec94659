//! Disks shown as devices to whoever wants them, on request.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use storage::{Disk, Source};

use super::Disks;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::private_dir;
use crate::frontend::{FUSE, FuseMount, VHOST_USER, VhostUserServer};

/// How a disk is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Frontend {
    /// A virtio-blk back end on a socket.
    VhostUser,
    /// A raw file in a FUSE mount.
    Fuse,
}

/// A disk that is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Attachment {
    /// How.
    pub frontend: Frontend,
    /// The socket or the file.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Snapshots cannot be written.
    pub read_only: bool,
}

/// What has to be kept while a disk is shown.
pub(super) struct Shown {
    told: Attachment,
    disk: Disk,
    service: Service,
}

enum Service {
    VhostUser(VhostUserServer),
    Fuse { mount: Arc<FuseMount>, name: String },
}

impl Disks {
    /// Shows a disk, or a snapshot for reading.
    pub fn attach(&self, key: &str, frontend: Frontend) -> Result<Attachment> {
        let _changing = self.changing.lock();
        let source = self.find(key)?;
        self.check_ready(source)?;
        if let Some(owner) = self.owners()?.get(&source).filter(|_| matches!(source, Source::Disk(_))) {
            let what = format!("{source} is the disk of {}, whose machine may write to it", owner.describe());
            return Err(
                Error::new(Kind::DiskInUse, what).hint(format!("attach a copy: miosa disk fork {source} --name NAME"))
            );
        }
        if let Some(there) = self.attachment(source) {
            return Err(Error::new(Kind::DiskInUse, format!("{source} is attached at {}", there.path.display()))
                .hint(format!("use that, or detach it: miosa disk detach {source}")));
        }
        let disk = self.store.open_source(source)?;
        private_dir(&self.dir).map_err(|e| unavailable(format!("cannot make {}: {e}", self.dir.display())))?;
        let (path, service) = match frontend {
            Frontend::VhostUser => {
                let server = VhostUserServer::start(
                    self.traffic.counted(VHOST_USER, disk.clone()),
                    &self.dir.join(format!("{source}.sock")),
                )
                .map_err(|e| unavailable(chain(&e)).hint("a socket's path has at most 107 bytes"))?;
                (server.socket().to_owned(), Service::VhostUser(server))
            }
            Frontend::Fuse => {
                let mount = self.mounted()?;
                let name = source.to_string();
                let path =
                    mount.add(&name, self.traffic.counted(FUSE, disk.clone())).map_err(|e| unavailable(chain(&e)))?;
                (path, Service::Fuse { mount, name })
            }
        };
        let told = Attachment { frontend, path, read_only: disk.is_read_only() };
        self.attached.lock().insert(source, Shown { told: told.clone(), disk, service });
        Ok(told)
    }

    /// Ends that. When this returns no request is being carried out, and all that was written is durable.
    pub fn detach(&self, key: &str) -> Result<Attachment> {
        let _changing = self.changing.lock();
        let source = self.find(key)?;
        let Some(shown) = self.attached.lock().remove(&source) else {
            return Err(Error::new(Kind::DiskNotAttached, format!("{source} is not attached"))
                .hint("see what is: miosa disk list"));
        };
        let told = shown.told.clone();
        let ended = shown.end();
        if !self.attached.lock().values().any(|s| matches!(s.service, Service::Fuse { .. })) {
            self.unmount();
        }
        ended.map(|()| told)
    }

    /// Detaches everything: the store is about to be closed.
    pub fn detach_all(&self) {
        let _changing = self.changing.lock();
        let all = std::mem::take(&mut *self.attached.lock());
        for (source, shown) in all {
            if let Err(error) = shown.end() {
                tracing::error!(%source, %error, "a detached disk could not be made durable");
            }
        }
        self.unmount();
    }

    pub(super) fn attachment(&self, source: Source) -> Option<Attachment> {
        self.attached.lock().get(&source).map(|shown| shown.told.clone())
    }

    /// The mount, which is made for the first that needs it.
    fn mounted(&self) -> Result<Arc<FuseMount>> {
        let mut mount = self.mount.lock();
        if let Some(mount) = &*mount {
            return Ok(mount.clone());
        }
        let made = FuseMount::mount(&self.dir.join("fuse"))
            .map_err(|e| unavailable(chain(&e)).hint("run as root where /dev/fuse is, or use --frontend vhost-user"))?;
        let made = Arc::new(made);
        *mount = Some(made.clone());
        Ok(made)
    }

    fn unmount(&self) {
        let Some(mount) = self.mount.lock().take().and_then(Arc::into_inner) else { return };
        if let Err(error) = mount.unmount() {
            tracing::error!(error = %chain(&error), "cannot unmount");
        }
    }
}

impl Shown {
    fn end(self) -> Result<()> {
        match self.service {
            Service::VhostUser(server) => server.stop(),
            Service::Fuse { mount, name } => drop(mount.remove(&name)),
        }
        if self.disk.is_read_only() {
            return Ok(());
        }
        Ok(self.disk.flush()?)
    }
}

fn unavailable(message: String) -> Error {
    Error::new(Kind::FrontendUnavailable, message)
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
