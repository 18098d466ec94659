//! The life of sandboxes: the real engine on the real store, with machines that are stand-ins (`vmm::FakeVmm`: the real
//! agent protocol against a directory of the host).

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

#[path = "lifecycle/batches.rs"]
mod batches;
#[path = "lifecycle/concurrency.rs"]
mod concurrency;
#[path = "lifecycle/domains.rs"]
mod domains;
#[path = "lifecycle/memory.rs"]
mod memory;
#[path = "lifecycle/named.rs"]
mod named;
#[path = "lifecycle/recovery.rs"]
mod recovery;
#[path = "lifecycle/sessions.rs"]
mod sessions;
#[path = "lifecycle/snapshots.rs"]
mod snapshots;
#[path = "lifecycle/states.rs"]
mod states;
#[path = "lifecycle/support.rs"]
mod support;
#[path = "lifecycle/survival.rs"]
mod survival;
#[path = "lifecycle/timeouts.rs"]
mod timeouts;
#[path = "lifecycle/volumes.rs"]
mod volumes;
#[path = "lifecycle/warm.rs"]
mod warm;
