//! A store in memory for what is served from one.

use std::sync::Arc;

use storage::catalogue::MemCatalogue;
use storage::medium::sim::SimMedium;
use storage::{Disk, Options, Store};

/// A store that does nothing by itself.
pub fn empty() -> Store {
    let medium = SimMedium::new();
    let catalogue = Arc::new(MemCatalogue::new(medium.clone()));
    let options = Options { background: false, cache_bytes: 1 << 20, ..Options::default() };
    Store::open_with(Arc::new(medium), catalogue, options).unwrap()
}

/// The same, and a disk of so many bytes.
#[allow(dead_code, reason = "not every target has one")]
pub fn with_disk(bytes: u64) -> (Store, Disk) {
    let store = empty();
    let mut tx = store.begin();
    let id = tx.create_disk("disk", bytes);
    tx.commit().unwrap().wait().unwrap();
    let disk = store.disk(id).unwrap();
    (store, disk)
}
