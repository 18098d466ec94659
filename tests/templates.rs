//! Templates: what recipes and archives become, with fake machines and with real ones.
//!
//! Needs root, QEMU, e2fsprogs and busybox-static. Images are made here, small, of busybox alone.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

#[path = "templates/archives.rs"]
mod archives;
#[path = "templates/escapes.rs"]
mod escapes;
#[path = "templates/lab.rs"]
mod lab;
#[path = "templates/machines.rs"]
mod machines;
#[path = "templates/recipes.rs"]
mod recipes;
