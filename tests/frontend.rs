//! The front ends against what people will use them with: the kernel's FUSE, fio, e2fsprogs, loop devices, QEMU, and a
//! virtio-blk driver of our own that can also misbehave.
//!
//! These need root, /dev/fuse, fio, e2fsprogs, util-linux, qemu-utils and qemu-system-x86: a test that misses one says so
//! and fails.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

#[path = "frontend/driver.rs"]
mod driver;
#[path = "frontend/fuse.rs"]
mod fuse;
#[path = "frontend/programs.rs"]
mod programs;
#[path = "frontend/support.rs"]
mod support;
#[path = "frontend/vhost_user.rs"]
mod vhost_user;
