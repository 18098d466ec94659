//! What is open: options, and everything that handles and background threads share.

use crate::block::BLOCK_BYTES;
use crate::blocks::Blocks;
use crate::catalogue::Catalogue;
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::format::StoreUuid;
use crate::index::Index;
use crate::log::Log;
use crate::medium::file::Backend;
use crate::medium::{Medium, Mode};
use crate::pack::{Counters, PackWriter, PackWriters};
use crate::registry::Registry;
use crate::seal::Sealer;
use crate::workers::Workers;
use parking_lot::Mutex;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// The file that keeps space back.
const RESERVE: &str = "RESERVE";
/// The file that is locked while a store is open.
pub(crate) const LOCK: &str = "LOCK";

/// How a store runs. None of it is remembered in the store.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which system calls carry the I/O.
    pub backend: Backend,
    /// Bytes of decoded data kept in memory.
    pub cache_bytes: u64,
    /// Bytes of decoded map nodes kept in memory.
    pub node_cache_bytes: u64,
    /// Bytes read ahead of each stream of sequential reads, at most, and at most a sixteenth of `cache_bytes`; 0: none.
    pub read_ahead_bytes: u64,
    /// Digests kept in memory for deduplication, at some 70 bytes each.
    pub index_digests: usize,
    /// Bytes of log at which sealing starts.
    pub log_bytes: u64,
    /// Bytes of log at which writers wait for sealing.
    pub log_bytes_max: u64,
    /// How long nothing has to be written until what is in the log is sealed.
    pub idle: Duration,
    /// zstd level of what is sealed.
    pub level: i32,
    /// zstd level at which cold data is packed again, when the store is idle. 0, or no more than `level`: never.
    pub repack_level: i32,
    /// Bytes of data in a frame of what is packed again: 64 KiB to 1 MiB.
    pub repack_frame_bytes: u32,
    /// How old a pack has to be for its data to be taken for cold.
    pub repack_after: Duration,
    /// Bytes kept back on the file system, so that deleting and collecting still work when it is full.
    pub reserve_bytes: u64,
    /// Where the log is damaged, go on without what is behind the damage, and say so, rather than refuse to open.
    pub salvage_log: bool,
    /// Seal, and collect garbage, in the background. Without it only [`crate::Store::seal`] and [`crate::Store::gc`] do, and writers
    /// never wait.
    pub background: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            cache_bytes: 256 << 20,
            node_cache_bytes: 64 << 20,
            read_ahead_bytes: 4 << 20,
            index_digests: 1 << 20,
            log_bytes: 512 << 20,
            log_bytes_max: 2 << 30,
            idle: Duration::from_secs(5),
            level: 1,
            repack_level: 9,
            repack_frame_bytes: 64 << 10,
            repack_after: Duration::from_secs(600),
            reserve_bytes: 8 << 20,
            salvage_log: false,
            background: true,
        }
    }
}

/// Everything that is open, shared by handles and background threads.
pub(crate) struct Inner {
    pub uuid: StoreUuid,
    pub medium: Arc<dyn Medium>,
    pub catalogue: Arc<dyn Catalogue>,
    pub blocks: Arc<Blocks>,
    pub index: Index,
    pub workers: Arc<Workers>,
    pub log: Log,
    pub registry: Mutex<Registry>,
    pub counters: Arc<Counters>,
    /// The next disk or snapshot id.
    pub next_id: AtomicU64,
    pub sealer: Sealer,
    /// Held while garbage is collected.
    pub collecting: Mutex<()>,
    /// Disks and snapshots deleted since garbage was last collected.
    pub deleted: AtomicU64,
    /// What was done since it was opened.
    pub totals: Mutex<crate::Totals>,
    pub options: Options,
    /// Where the store is, on a file medium.
    pub dir: Option<PathBuf>,
    /// Keeps other processes out while it is open.
    pub _lock: Option<nix::fcntl::Flock<std::fs::File>>,
}

impl Inner {
    /// Runs something that gives space back. On a full file system the reserve is given up for it.
    pub fn with_reserve<T>(&self, mut f: impl FnMut() -> Result<T>) -> Result<T> {
        match f() {
            Err(e) if e.kind() == ErrorKind::NoSpace && self.medium.remove(RESERVE).is_ok() => {
                tracing::warn!("the file system is full; the store's reserve is given up to make room");
                f()
            }
            done => done,
        }
    }

    /// Writes packs at the levels that are asked for, or at that of sealing where that is higher. What is packed harder than
    /// by sealing has larger frames.
    pub fn pack_writers(&self) -> PackWriters<'_> {
        PackWriters::new(|level, domain| self.pack_writer(level, domain))
    }

    fn pack_writer(&self, level: i32, domain: Domain) -> PackWriter {
        let Options { level: sealing, repack_frame_bytes, .. } = self.options;
        let new = |level| PackWriter::new(self.medium.clone(), self.uuid, self.counters.clone(), level, domain);
        if level <= sealing {
            return new(sealing);
        }
        new(level).with_frames_of(u64::from(repack_frame_bytes) / BLOCK_BYTES).or_at_level(sealing)
    }

    /// Collects garbage, if need be out of the reserve.
    pub fn collect(&self) -> Result<crate::GcReport> {
        let report = self.with_reserve(|| crate::gc::collect(self, false));
        self.totals.lock().collection(&report);
        self.set_reserve();
        report
    }

    /// Sets the reserve aside, if it is not and there is room.
    pub fn set_reserve(&self) {
        if self.options.reserve_bytes == 0 {
            return;
        }
        let file = self.medium.open(RESERVE, Mode::Modify).or_else(|_| self.medium.open(RESERVE, Mode::Create));
        if let Ok(file) = file
            && file.allocate(0, self.options.reserve_bytes).is_err()
        {
            drop(self.medium.remove(RESERVE));
            tracing::warn!(
                "the file system has no room for the store's reserve of {} bytes",
                self.options.reserve_bytes
            );
        }
    }

    /// Whether the log has come so near to its limit that writers will soon have to wait.
    pub fn pressed(&self) -> bool {
        let Options { log_bytes, log_bytes_max, .. } = self.options;
        self.log.live_bytes() >= log_bytes + log_bytes_max.saturating_sub(log_bytes) / 2
    }

    /// Makes a writer wait while the log is over its limit and sealing goes on. Fails when sealing cannot go on.
    pub fn throttle(&self) -> Result<()> {
        if !self.options.background || self.log.live_bytes() < self.options.log_bytes {
            return Ok(());
        }
        self.sealer.request();
        while self.log.live_bytes() >= self.options.log_bytes_max {
            self.sealer.wait_for_progress()?;
            self.log.healthy()?;
        }
        Ok(())
    }
}

/// Takes the lock that keeps other processes out of the store in `dir`.
pub(crate) fn lock(dir: &Path) -> Result<nix::fcntl::Flock<std::fs::File>> {
    let path = dir.join(LOCK);
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| Error::io(format!("cannot open {}", path.display()), e))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
        nix::errno::Errno::EWOULDBLOCK => Error::new(
            ErrorKind::InUse,
            format!("the store in {} is in use by another process: stop that one, or talk to it", dir.display()),
        ),
        e => Error::io(format!("cannot lock {}", path.display()), e.into()),
    })
}
