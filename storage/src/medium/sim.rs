//! A [`Medium`] in memory that behaves like a disk at its worst, reproducibly from a seed.
//!
//! Every call that changes the medium is an *event*, numbered from 0. [`SimMedium::stop_at`] makes the power go at an
//! event: that call and all later ones fail. [`SimMedium::after_power_loss`] then gives the medium a reboot would find:
//! all that was synced, and of the rest an arbitrary seeded subset of sectors and of directory changes.

use super::{Entry, File, Medium, Mode};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// The unit a power cut keeps or loses whole, in bytes.
const SECTOR: usize = 512;

/// A call that changes the medium; what a fault plan can aim at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// `write_at`
    Write,
    /// `sync`
    Sync,
    /// `allocate` or `truncate`
    Allocate,
    /// `open` with `Create`
    Create,
    /// `remove`
    Remove,
    /// `sync_dir`
    SyncDir,
    /// A durable step outside of the medium's files (the catalogue's commit), announced by [`SimMedium::external`].
    External,
}

/// Decides, for the event of this number and kind, whether it fails and with which errno.
pub type FaultPlan = Box<dyn FnMut(u64, Event) -> Option<i32> + Send>;

#[derive(Default, Clone)]
struct SimFile {
    data: Vec<u8>,
    /// What is certain to be there after a power cut.
    durable: Vec<u8>,
    /// Writes since the last sync: offset and bytes.
    pending: Vec<(usize, Vec<u8>)>,
}

type FileRef = Arc<Mutex<SimFile>>;

#[derive(Clone)]
enum DirChange {
    Add(String, FileRef),
    Remove(String),
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, FileRef>,
    durable: BTreeMap<String, FileRef>,
    changes: Vec<DirChange>,
    events: u64,
    syncs: u64,
    stop_at: Option<u64>,
    stopped: bool,
    plan: Option<FaultPlan>,
}

/// See the module. Cloning gives another handle on the same medium.
#[derive(Clone, Default)]
pub struct SimMedium {
    state: Arc<Mutex<State>>,
}

impl SimMedium {
    /// An empty medium that never fails.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cuts the power at event `n`.
    pub fn stop_at(&self, n: u64) {
        self.state.lock().stop_at = Some(n);
    }

    /// Installs a fault plan; it is asked at every event from now on.
    pub fn set_faults(&self, plan: FaultPlan) {
        self.state.lock().plan = Some(plan);
    }

    /// Events so far.
    pub fn events(&self) -> u64 {
        self.state.lock().events
    }

    /// File syncs so far.
    pub fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// Whether the power has gone.
    pub fn stopped(&self) -> bool {
        self.state.lock().stopped
    }

    /// Announces a durable step that happens elsewhere, so that power can be cut before it.
    pub fn external(&self) -> io::Result<()> {
        self.state.lock().event(Event::External)
    }

    /// Flips one bit of a file, in place and durably. `false` when the file is not there or shorter than that.
    pub fn flip_bit(&self, name: &str, byte: u64, bit: u8) -> bool {
        let state = self.state.lock();
        let Some(file) = state.files.get(name) else { return false };
        let mut file = file.lock();
        let byte = byte as usize;
        if byte >= file.data.len() {
            return false;
        }
        file.data[byte] ^= 1 << (bit & 7);
        if byte < file.durable.len() {
            file.durable[byte] ^= 1 << (bit & 7);
        }
        true
    }

    /// The medium after a reboot: everything synced, and a subset of the rest chosen by `seed`.
    pub fn after_power_loss(&self, seed: u64) -> SimMedium {
        let state = self.state.lock();
        let mut random = Random(seed);
        let mut files = state.durable.clone();
        // Directory changes reach the disk in order, up to some point.
        let kept = random.below(state.changes.len() as u64 + 1) as usize;
        for change in &state.changes[..kept] {
            match change {
                DirChange::Add(name, file) => drop(files.insert(name.clone(), file.clone())),
                DirChange::Remove(name) => drop(files.remove(name)),
            }
        }
        let survived: BTreeMap<String, FileRef> = files
            .iter()
            .map(|(name, file)| (name.clone(), Arc::new(Mutex::new(file.lock().after_power_loss(&mut random)))))
            .collect();
        let after = State { durable: survived.clone(), files: survived, ..State::default() };
        SimMedium { state: Arc::new(Mutex::new(after)) }
    }
}

impl State {
    fn event(&mut self, event: Event) -> io::Result<()> {
        let n = self.events;
        self.events += 1;
        if event == Event::Sync {
            self.syncs += 1;
        }
        self.stopped |= self.stop_at.is_some_and(|at| n >= at);
        if self.stopped {
            return Err(io::Error::other("the simulated power is off"));
        }
        match self.plan.as_mut().and_then(|plan| plan(n, event)) {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }
}

impl SimFile {
    fn after_power_loss(&self, random: &mut Random) -> SimFile {
        let mut data = self.durable.clone();
        // Three kinds of cut: nothing more, everything up to a point, or any sectors in any order.
        let mode = random.below(3);
        let upto = random.below(self.pending.len() as u64 + 1) as usize;
        for (i, (offset, bytes)) in self.pending.iter().enumerate() {
            if mode == 0 || (mode == 1 && i >= upto) {
                break;
            }
            let mut at = *offset;
            let end = offset + bytes.len();
            while at < end {
                let next = ((at / SECTOR + 1) * SECTOR).min(end);
                if mode == 1 || random.below(2) == 0 {
                    if data.len() < next {
                        data.resize(next, 0);
                    }
                    data[at..next].copy_from_slice(&bytes[at - offset..next - offset]);
                }
                at = next;
            }
        }
        SimFile { durable: data.clone(), data, pending: Vec::new() }
    }
}

struct Handle {
    file: FileRef,
    state: Arc<Mutex<State>>,
}

impl File for Handle {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if self.state.lock().stopped {
            return Err(io::Error::other("the simulated power is off"));
        }
        let file = self.file.lock();
        let start = offset as usize;
        let end = start + buf.len();
        let bytes = file.data.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let cut = self.state.lock().event(Event::Write);
        let mut file = self.file.lock();
        let start = offset as usize;
        // The write the power goes at may still reach the disk in part.
        if cut.is_ok() || self.state.lock().stopped {
            file.pending.push((start, data.to_vec()));
        }
        cut?;
        let end = start + data.len();
        if file.data.len() < end {
            file.data.resize(end, 0);
        }
        file.data[start..end].copy_from_slice(data);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.state.lock().event(Event::Sync)?;
        let mut file = self.file.lock();
        file.durable = file.data.clone();
        file.pending.clear();
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.state.lock().event(Event::Allocate)?;
        let mut file = self.file.lock();
        let end = (offset + len) as usize;
        if file.data.len() < end {
            file.data.resize(end, 0);
        }
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.state.lock().event(Event::Allocate)?;
        self.file.lock().data.truncate(len as usize);
        Ok(())
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.file.lock().data.len() as u64)
    }
}

impl Medium for SimMedium {
    fn open(&self, name: &str, mode: Mode) -> io::Result<Arc<dyn File>> {
        let mut state = self.state.lock();
        let file = match (mode, state.files.get(name).cloned()) {
            (Mode::Read | Mode::Modify, Some(file)) => file,
            (Mode::Read | Mode::Modify, None) => return Err(io::ErrorKind::NotFound.into()),
            (Mode::Create, Some(_)) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Mode::Create, None) => {
                state.event(Event::Create)?;
                let file = FileRef::default();
                state.files.insert(name.to_owned(), file.clone());
                state.changes.push(DirChange::Add(name.to_owned(), file.clone()));
                file
            }
        };
        Ok(Arc::new(Handle { file, state: self.state.clone() }))
    }

    fn create_dir(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Entry>> {
        let prefix = if dir.is_empty() { String::new() } else { format!("{dir}/") };
        let state = self.state.lock();
        let below = state.files.iter().filter_map(|(name, file)| Some((name.strip_prefix(&prefix)?, file)));
        Ok(below
            .filter(|(rest, _)| !rest.contains('/'))
            .map(|(rest, file)| (rest.to_owned(), file.lock().data.len() as u64))
            .collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        state.event(Event::Remove)?;
        state.files.remove(name).ok_or(io::ErrorKind::NotFound)?;
        state.changes.push(DirChange::Remove(name.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        state.event(Event::SyncDir)?;
        let here = |name: &str| name.rsplit_once('/').map_or("", |(parent, _)| parent) == dir;
        let (done, left) =
            std::mem::take(&mut state.changes).into_iter().partition::<Vec<_>, _>(|change| match change {
                DirChange::Add(name, _) | DirChange::Remove(name) => here(name),
            });
        state.changes = left;
        for change in done {
            match change {
                DirChange::Add(name, file) => drop(state.durable.insert(name, file)),
                DirChange::Remove(name) => drop(state.durable.remove(&name)),
            }
        }
        Ok(())
    }

    fn allocated_bytes(&self, dir: &str) -> io::Result<u64> {
        let prefix = if dir.is_empty() { String::new() } else { format!("{dir}/") };
        let state = self.state.lock();
        Ok(state
            .files
            .iter()
            .filter(|(name, _)| name.starts_with(&prefix))
            .map(|(_, file)| file.lock().data.len() as u64)
            .sum())
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, seedable and good enough to choose faults with.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.bits() % n }
    }
}
