//! The block store: content-addressed, deduplicated, compressed, and a live block device.
mod error;
mod skeleton;
pub use error::{Error, ErrorKind, Result};
pub use skeleton::*;
