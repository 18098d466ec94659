//! The same disk for every system, made anew for each case.

use super::jobs::{BLOCK, content, write_all};
use super::lanes;
use super::servers::{DISK, Export, Server, System};
use crate::harness::load::{MIB, forget_files, new_disk};
use crate::harness::tools;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use storage::medium::sim::Random;
use storage::{DiskId, Options, Source, Store};

/// How a disk came to hold what it holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// Written in pieces of 1 MiB, not sealed yet.
    Fresh,
    /// Sealed, and read once.
    Warm,
    /// Sealed; server and page cache know nothing of it.
    Cold,
    /// A fork; half of its blocks, at random, were then written in single blocks.
    Fork,
    /// The last of a chain of forks, each of which wrote a block; sealed.
    Deep,
}

/// Forks of [`Case::Deep`].
const DEPTH: u64 = 1000;

impl Case {
    pub const ALL: [Self; 5] = [Self::Fresh, Self::Warm, Self::Cold, Self::Fork, Self::Deep];

    pub fn name(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Warm => "sealed, warm",
            Self::Cold => "sealed, cold",
            Self::Fork => "half a fork",
            Self::Deep => "fork at depth 1000",
        }
    }

    /// Sealed disks are measured as they are, so they are not written to.
    pub fn only_reads(self) -> bool {
        matches!(self, Self::Warm | Self::Cold)
    }

    /// The version of a block, 0 if it is the base's.
    pub fn version(self, block: u64) -> u64 {
        match self {
            Self::Fork => Random(block + 1).bits() >> 7 & 1,
            Self::Deep => u64::from(block.is_multiple_of(37) && block / 37 < DEPTH),
            _ => 0,
        }
    }

    fn changed(self, base: &[u8]) -> Vec<u64> {
        (0..(base.len() / BLOCK) as u64).filter(|block| self.version(*block) > 0).collect()
    }
}

/// What every disk holds before it is forked.
pub fn base(size: u64) -> Vec<u8> {
    (0..size / BLOCK as u64).flat_map(|block| content(block, 0)).collect()
}

/// Puts the data of a system into `dir`.
///
/// # Errors
/// What is missing or went wrong.
pub fn make(system: System, case: Case, base: &[u8], dir: &Path) -> Result<(), String> {
    std::fs::create_dir_all(dir).map_err(|e| e.to_string())?;
    match system {
        System::Miosa => store(case, base, &system.data(dir)),
        System::QsdRaw | System::Nbdfuse | System::NullFuse => raw(case, base, &system.data(dir)),
        System::QsdQcow2 if case == Case::Fork => overlay(case, base, dir)?,
        System::QsdQcow2 | System::QsdCompressed => {
            let (from, image) = (dir.join("disk.raw"), system.data(dir));
            raw(case, base, &from);
            let compress: &[&str] = if system == System::QsdCompressed { &["-c"] } else { &[] };
            convert(&from, &image, compress)?;
            std::fs::remove_file(from).map_err(|e| e.to_string())?;
        }
    }
    forget_files(dir);
    Ok(())
}

fn store(case: Case, base: &[u8], dir: &Path) {
    let store = Store::open(dir, Options { background: false, ..Options::default() }).expect("a store");
    let size = base.len() as u64;
    let forked = matches!(case, Case::Fork | Case::Deep);
    let (mut id, disk) = new_disk(&store, if forked { "base" } else { DISK }, size);
    for (i, piece) in base.chunks(MIB as usize).enumerate() {
        disk.write(i as u64 * MIB, piece).expect("a write");
    }
    if case != Case::Fresh {
        store.seal().expect("sealing");
    }
    let fork = |from: DiskId, name: &str| {
        let mut tx = store.begin();
        let id = tx.fork(Source::Disk(from), name);
        let _ = tx.commit().expect("a fork");
        (id, store.disk(id).expect("it is there"))
    };
    let change = |disk: &storage::Disk, block: u64| {
        disk.write(block * BLOCK as u64, &content(block, 1)).expect("a write");
    };
    match case {
        Case::Fork => {
            let (_, disk) = fork(id, DISK);
            case.changed(base).into_iter().for_each(|block| change(&disk, block));
        }
        Case::Deep => {
            let changed = case.changed(base);
            for i in 0..DEPTH {
                let name = if i + 1 == DEPTH { DISK.to_owned() } else { format!("fork-{i}") };
                let (next, disk) = fork(id, &name);
                id = next;
                if let Some(block) = changed.get(i as usize) {
                    change(&disk, *block);
                }
            }
            store.seal().expect("sealing");
        }
        _ => {}
    }
    store.flush().expect("a flush");
}

fn raw(case: Case, base: &[u8], path: &Path) {
    let file = File::create(path).expect("a file");
    file.write_all_at(base, 0).expect("a write");
    for block in case.changed(base) {
        file.write_all_at(&content(block, 1), block * BLOCK as u64).expect("a write");
    }
    file.sync_all().expect("a sync");
}

fn convert(from: &Path, to: &Path, more: &[&str]) -> Result<(), String> {
    let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"convert", &"-f", &"raw", &"-O", &"qcow2"];
    args.extend(more.iter().map(|arg| arg as &dyn AsRef<std::ffi::OsStr>));
    args.extend([&from as &dyn AsRef<std::ffi::OsStr>, &to]);
    tools::run("qemu-img", &args)?;
    File::open(to).and_then(|file| file.sync_all()).map_err(|e| e.to_string())
}

/// An overlay with a backing file, written as ours was: block by block.
fn overlay(case: Case, base: &[u8], dir: &Path) -> Result<(), String> {
    let (from, backing, image) = (dir.join("base.raw"), dir.join("base.qcow2"), System::QsdQcow2.data(dir));
    raw(Case::Fresh, base, &from);
    convert(&from, &backing, &[])?;
    std::fs::remove_file(from).map_err(|e| e.to_string())?;
    tools::run("qemu-img", &[&"create", &"-q", &"-f", &"qcow2", &"-b", &backing, &"-F", &"qcow2", &image])?;
    let server = Server::start(System::QsdQcow2, Export::VhostUser, dir, base.len() as u64)?;
    let (connection, mut lanes) = lanes::vhost_user(&server.place).map_err(|e| e.to_string())?;
    let written = write_all(&mut *lanes[0], &case.changed(base), 1);
    drop((lanes, connection));
    written.map_err(|e| e.to_string())
}
