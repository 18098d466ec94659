//! A store beside a model of it, driven by seeded random operations that are one log record each.
//!
//! A block's content is a tag, expanded to 4 KiB; few different tags, so that blocks repeat and deduplication has work.

use std::collections::BTreeMap;
use std::sync::Arc;
use storage::catalogue::MemCatalogue;
use storage::medium::sim::{Random, SimMedium};
use storage::{BLOCK_SIZE, Disk, DiskId, Options, Result, Source, Store};

/// Blocks of every disk in these tests.
pub const BLOCKS: u64 = 1200;

/// How much of something is done, where a variable says so.
pub fn from_env(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().unwrap_or_else(|e| panic!("{variable}={value}: {e}")))
}

/// What a disk or snapshot holds, and its deduplication domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// A tag a block, 0 for zeroes.
    pub tags: Vec<u16>,
    pub domain: Option<String>,
}

/// What there is.
pub type Contents = BTreeMap<(u8, u64), Held>;

/// The domains that disks of a run are in.
pub const DOMAINS: [Option<&str>; 3] = [None, Some("a"), Some("b")];

pub fn key(source: Source) -> (u8, u64) {
    match source {
        Source::Disk(id) => (0, id.0),
        Source::Snapshot(id) => (1, id.0),
    }
}

pub fn source((kind, id): (u8, u64)) -> Source {
    if kind == 0 { Source::Disk(DiskId(id)) } else { Source::Snapshot(storage::SnapshotId(id)) }
}

pub fn expand(tag: u16) -> [u8; BLOCK_SIZE] {
    let mut block = [0; BLOCK_SIZE];
    if tag != 0 {
        for (i, byte) in block.iter_mut().enumerate() {
            *byte = (tag as usize * 31 + i / 64 * (1 + tag as usize % 3)) as u8;
        }
        block[..2].copy_from_slice(&tag.to_le_bytes());
    }
    block
}

/// The tag of a block; panics when the block is torn or foreign.
fn tag(block: &[u8]) -> u16 {
    let tag = u16::from_le_bytes([block[0], block[1]]);
    assert_eq!(block, expand(tag), "a torn or foreign block");
    tag
}

pub fn options() -> Options {
    // Small caches, so that reads reach the packs, and frames of several groups.
    Options {
        repack_frame_bytes: 128 << 10,
        background: false,
        reserve_bytes: 0,
        cache_bytes: 1 << 20,
        node_cache_bytes: 1 << 18,
        ..Options::default()
    }
}

pub fn open(medium: &SimMedium, catalogue: &MemCatalogue) -> Result<Store> {
    Store::open_with(Arc::new(medium.clone()), Arc::new(catalogue.clone()), options())
}

pub fn read_all(disk: &Disk) -> Result<Vec<u16>> {
    let mut bytes = vec![0; BLOCKS as usize * BLOCK_SIZE];
    disk.read(0, &mut bytes)?;
    Ok(bytes.chunks(BLOCK_SIZE).map(tag).collect())
}

pub fn contents(store: &Store) -> Result<Contents> {
    let disks = store.disks().into_iter().map(|d| Source::Disk(d.id));
    let snapshots = store.snapshots().into_iter().map(|s| Source::Snapshot(s.id));
    let held = |s| Ok(Held { tags: read_all(&store.open_source(s)?)?, domain: store.domain(s)? });
    disks.chain(snapshots).map(|s| Ok((key(s), held(s)?))).collect()
}

/// A run of random operations.
pub struct Run {
    pub medium: SimMedium,
    pub catalogue: MemCatalogue,
    pub store: Store,
    random: Random,
    /// What the store should hold after each record, the last being now.
    pub history: Vec<Contents>,
    /// Everything up to this index of the history is durable.
    pub durable: usize,
    /// What its disks are put into.
    pub domains: &'static [Option<&'static str>],
    names: u64,
}

impl Run {
    pub fn start(seed: u64, medium: SimMedium) -> Result<Self> {
        let catalogue = MemCatalogue::new(medium.clone());
        let store = open(&medium, &catalogue)?;
        Ok(Self {
            medium,
            catalogue,
            store,
            random: Random(seed),
            history: vec![Contents::new()],
            durable: 0,
            domains: &DOMAINS,
            names: 0,
        })
    }

    fn now(&self) -> &Contents {
        self.history.last().expect("the history is never empty")
    }

    fn pick(&mut self, disks_only: bool) -> Option<Source> {
        let all: Vec<_> = self.now().keys().copied().filter(|(kind, _)| !disks_only || *kind == 0).collect();
        if all.is_empty() { None } else { Some(source(all[self.random.below(all.len() as u64) as usize])) }
    }

    fn pick_domain(&mut self) -> Option<&'static str> {
        self.domains[self.random.below(self.domains.len() as u64) as usize]
    }

    /// Records what the store should hold *before* asking it, since a refused call may have got half way.
    fn expect(&mut self, change: impl FnOnce(&mut Contents)) {
        let mut next = self.now().clone();
        change(&mut next);
        self.history.push(next);
    }

    /// One random operation. `Err` is the store's, after which the run is over.
    pub fn step(&mut self) -> Result<()> {
        self.names += 1;
        let name = format!("d{}", self.names);
        let what = self.random.below(100);
        match what {
            0..6 => {
                if self.now().len() > 12 {
                    return self.delete();
                }
                let store = self.store.clone();
                let mut tx = store.begin();
                let id = tx.create_disk(&name, BLOCKS * BLOCK_SIZE as u64);
                let domain = self.pick_domain();
                tx.set_domain(id, domain);
                let new = Held { tags: vec![0; BLOCKS as usize], domain: domain.map(str::to_owned) };
                self.expect(|c| drop(c.insert(key(Source::Disk(id)), new)));
                drop(tx.commit()?);
            }
            6..43 => return self.write(),
            43..46 => {
                let Some(Source::Disk(id)) = self.pick(true) else { return Ok(()) };
                self.change_domain(id)?;
            }
            46..58 => return self.zero(),
            58..68 => {
                self.store.flush()?;
                self.durable = self.history.len() - 1;
            }
            68..76 => {
                let Some(from) = self.pick(false) else { return Ok(()) };
                let store = self.store.clone();
                let mut tx = store.begin();
                let id = tx.fork(from, &name);
                let mut fork = self.now()[&key(from)].clone();
                if self.random.below(3) == 0 {
                    let domain = self.pick_domain();
                    tx.set_domain(id, domain);
                    fork.domain = domain.map(str::to_owned);
                }
                self.expect(|c| drop(c.insert(key(Source::Disk(id)), fork)));
                drop(tx.commit()?);
            }
            76..84 => {
                let Some(Source::Disk(from)) = self.pick(true) else { return Ok(()) };
                let store = self.store.clone();
                let mut tx = store.begin();
                let id = tx.snapshot(from, &name);
                self.expect(|c| drop(c.insert(key(Source::Snapshot(id)), c[&key(Source::Disk(from))].clone())));
                drop(tx.commit()?);
            }
            84..88 => return self.delete(),
            88..92 => drop(self.store.gc(false)?),
            92..95 => drop(self.store.repack()?),
            _ => {
                self.store.seal()?;
                self.durable = self.history.len() - 1;
            }
        }
        Ok(())
    }

    fn change_domain(&mut self, id: DiskId) -> Result<()> {
        let domain = self.pick_domain();
        let store = self.store.clone();
        let mut tx = store.begin();
        tx.set_domain(id, domain);
        self.expect(|c| {
            let disk = c.get_mut(&key(Source::Disk(id))).expect("picked from the model");
            disk.domain = domain.map(str::to_owned);
        });
        tx.commit().map(drop)
    }

    fn delete(&mut self) -> Result<()> {
        let Some(gone) = self.pick(false) else { return Ok(()) };
        let store = self.store.clone();
        let mut tx = store.begin();
        match gone {
            Source::Disk(id) => tx.delete_disk(id),
            Source::Snapshot(id) => tx.delete_snapshot(id),
        }
        self.expect(|c| drop(c.remove(&key(gone))));
        drop(tx.commit()?);
        Ok(())
    }

    /// A place to write: small or large, anywhere.
    fn range(&mut self) -> (u64, u64) {
        let start = self.random.below(BLOCKS);
        let reach = if self.random.below(4) == 0 { 256 } else { 8 };
        (start, 1 + self.random.below(reach.min(BLOCKS - start)))
    }

    fn write(&mut self) -> Result<()> {
        let Some(Source::Disk(id)) = self.pick(true) else { return Ok(()) };
        let (start, len) = self.range();
        let first = self.random.below(60) as u16;
        let run = self.random.below(2) == 0;
        let tags: Vec<u16> = (0..len as u16).map(|i| if run { first + i } else { first }).collect();
        let bytes: Vec<u8> = tags.iter().flat_map(|t| expand(*t)).collect();
        self.expect(|c| {
            let disk = c.get_mut(&key(Source::Disk(id))).expect("picked from the model");
            disk.tags[start as usize..(start + len) as usize].copy_from_slice(&tags);
        });
        self.store.disk(id)?.write(start * BLOCK_SIZE as u64, &bytes)
    }

    fn zero(&mut self) -> Result<()> {
        let Some(Source::Disk(id)) = self.pick(true) else { return Ok(()) };
        let (start, mut len) = self.range();
        if self.random.below(10) == 0 {
            len = BLOCKS - start;
        }
        self.expect(|c| {
            let disk = c.get_mut(&key(Source::Disk(id))).expect("picked from the model");
            disk.tags[start as usize..(start + len) as usize].fill(0);
        });
        let disk = self.store.disk(id)?;
        let (offset, len) = (start * BLOCK_SIZE as u64, len * BLOCK_SIZE as u64);
        if self.random.below(2) == 0 { disk.discard(offset, len) } else { disk.write_zeroes(offset, len) }
    }

    /// Everything the store holds is what the model says.
    pub fn check(&self) {
        assert_eq!(&contents(&self.store).expect("reads of a healthy store"), self.now());
    }

    /// Closes the store and opens it again on the same medium.
    pub fn reopen(&mut self) -> Result<()> {
        self.store.close()?;
        self.durable = self.history.len() - 1;
        self.store = open(&self.medium, &self.catalogue)?;
        Ok(())
    }
}
