//! Front ends: a disk of the store as a device somebody else can open.
//!
//! A front end is glue. It decodes a request, checks its bounds, calls [`storage::Disk`] and maps the error; it keeps
//! no data, so that nothing is lost when it goes. Two of them:
//!
//! - [`vhost_user`]: virtio-blk for a VMM that shares its guest's memory, one socket a disk;
//! - [`fuse`]: one mount with every attached disk as a raw file, for everything else.
//!
//! Errors of the store become an errno or a virtio status here, in one place, and are logged here, once.

pub mod fuse;
mod traffic;
pub mod vhost_user;

pub use fuse::FuseMount;
pub use traffic::{Device, FUSE, Traffic, VHOST_USER};
pub use vhost_user::VhostUserServer;

use nix::errno::Errno;
use std::path::PathBuf;
use storage::ErrorKind;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP};

/// Result of setting a front end up.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a front end could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket could not be created.
    #[error("cannot listen on {path}")]
    Listen {
        /// Where the socket was to be.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory could not be mounted.
    #[error("cannot mount FUSE on {dir} (needs /dev/fuse and the right to mount)")]
    Mount {
        /// Where the mount was to be.
        dir: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The mount could not be taken away.
    #[error("cannot unmount {dir}")]
    Unmount {
        /// Where the mount is.
        dir: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The mount has a file of this name.
    #[error("a disk named {0:?} is exported already")]
    NameTaken(String),
    /// The name cannot be a file name.
    #[error("{0:?} cannot be a file name")]
    InvalidName(String),
}

/// The errno that a system call on the disk fails with.
fn errno(kind: ErrorKind) -> Errno {
    match kind {
        ErrorKind::ReadOnly => Errno::EROFS,
        ErrorKind::InvalidInput => Errno::EINVAL,
        ErrorKind::NoSpace => Errno::ENOSPC,
        ErrorKind::NotFound | ErrorKind::Closed => Errno::ENODEV,
        ErrorKind::NameTaken => Errno::EEXIST,
        ErrorKind::InUse => Errno::EBUSY,
        ErrorKind::UnsupportedVersion => Errno::EOPNOTSUPP,
        ErrorKind::Damaged | ErrorKind::Io | ErrorKind::Poisoned => Errno::EIO,
    }
}

/// The status byte of a virtio-blk request. virtio knows one failure and one "this device cannot"; the errno of the
/// same kind is in the log.
fn virtio_status(kind: ErrorKind) -> u8 {
    let status = match kind {
        ErrorKind::UnsupportedVersion => VIRTIO_BLK_S_UNSUPP,
        _ => VIRTIO_BLK_S_IOERR,
    };
    status as u8
}

/// Logs an error of the store where it is answered. What a client can cause at will does not fill the log.
fn log_storage_error(front_end: &'static str, operation: &'static str, error: &storage::Error) {
    let kind = error.kind().code();
    match error.kind() {
        ErrorKind::ReadOnly | ErrorKind::InvalidInput | ErrorKind::NotFound | ErrorKind::Closed => {
            tracing::debug!(front_end, operation, kind, %error, "request refused");
        }
        _ => tracing::error!(front_end, operation, kind, %error, "request failed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_of_the_medium_is_an_io_error_and_a_full_store_is_not() {
        for kind in [ErrorKind::Damaged, ErrorKind::Io, ErrorKind::Poisoned] {
            assert_eq!(errno(kind), Errno::EIO);
        }
        assert_eq!(errno(ErrorKind::NoSpace), Errno::ENOSPC);
        assert_eq!(errno(ErrorKind::ReadOnly), Errno::EROFS);
        assert_eq!(errno(ErrorKind::Closed), Errno::ENODEV);
        assert_eq!(virtio_status(ErrorKind::NoSpace), VIRTIO_BLK_S_IOERR as u8);
    }
}
