//! Sealing: a checkpoint that turns everything the log holds into packs and maps, and then forgets the log.
//!
//! Data before metadata before the root that names it:
//! 1. the log is rotated, and every disk with something in the log gets a fork point (O(1) each, transactions wait);
//! 2. each fork point is sealed, oldest first: its blocks are hashed, looked up, packed if new, and its map is rewritten;
//! 3. the packs and their names are synced;
//! 4. one durable batch tells the catalogue of the packs, groups, digests, roots and of where the log now begins;
//! 5. disks, snapshots and fork points move onto the sealed roots (transactions wait);
//! 6. the old log segments are removed.
//!
//! A crash before 4 leaves packs that nothing refers to, removed at the next start, and the whole log. A crash after 4
//! leaves log segments from before the new beginning, removed at the next start. Guests read and write all the while.

use crate::block::{BLOCK_SIZE, BlockId, LogPos, Source, is_zero};
use crate::catalogue::{Batch, Table};
use crate::disk::{Device, verify};
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{GroupKind, Node, NodeRef};
use crate::index::{Index, Keys};
use crate::inner::Inner;
use crate::map::{self, Change, NodeSink, NodeSource, push_change};
use crate::note;
use crate::overlay::{Content, Extent};
use crate::pack::{Digest, PackWriters, digest};
use crate::priority::Background;
use crate::registry::Registry;
use crate::repack::{self, RepackReport};
use crate::rows::{Checkpoint, DeviceRow, Manifest, RecordKey, encode};
use crate::state::Layer;
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Blocks hashed and looked up at a time.
const BATCH_BLOCKS: usize = 2048;

/// What one sealing did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct SealReport {
    /// Blocks of data taken from the log.
    pub blocks: u64,
    /// Of them, blocks that were not stored yet.
    pub new_blocks: u64,
    /// Bytes of packs written, map nodes included.
    pub pack_bytes: u64,
}

/// What a checkpoint found when transactions stood still.
struct Plan {
    checkpoint: Checkpoint,
    devices: Vec<(Source, Option<Arc<Device>>)>,
    /// Fork points whose root a device needs.
    layers: HashMap<Source, Arc<Layer>>,
    records: Vec<(RecordKey, Option<Bytes>)>,
    /// All disks, snapshots and records are in it, not only what changed.
    whole: bool,
}

/// Seals everything written before the call. One at a time.
pub(crate) fn checkpoint(inner: &Inner) -> Result<SealReport> {
    let _one = inner.sealer.running.lock();
    checkpoint_locked(inner, false)
}

/// A checkpoint whose manifest has the whole catalogue, so that no older one is needed.
pub(crate) fn checkpoint_all(inner: &Inner) -> Result<SealReport> {
    let _one = inner.sealer.running.lock();
    {
        let mut registry = inner.registry.lock();
        let Registry { devices, records, touched, touched_records, .. } = &mut *registry;
        touched.extend(devices.keys());
        touched_records.extend(records.keys().cloned());
    }
    checkpoint_locked(inner, true)
}

/// A checkpoint, with `running` held. Whoever waits for room in the log hears of it.
fn checkpoint_locked(inner: &Inner, whole: bool) -> Result<SealReport> {
    let outcome = try_checkpoint(inner, whole);
    inner.totals.lock().checkpoint(&outcome);
    let mut state = inner.sealer.state.lock();
    state.tried += 1;
    state.failure = outcome.as_ref().err().cloned();
    inner.sealer.changed.notify_all();
    outcome
}

fn try_checkpoint(inner: &Inner, whole: bool) -> Result<SealReport> {
    let Some(plan) = plan(inner, whole)? else { return Ok(SealReport::default()) };
    let outcome = execute(inner, &plan);
    if outcome.is_err() {
        // Nothing has changed for readers; the next checkpoint has it all to tell again.
        let mut registry = inner.registry.lock();
        registry.touched.extend(plan.devices.iter().map(|(source, _)| *source));
        registry.touched_records.extend(plan.records.into_iter().map(|(key, _)| key));
        inner.index.clear();
    }
    outcome
}

/// Step 1. `None`: there is nothing to seal.
fn plan(inner: &Inner, whole: bool) -> Result<Option<Plan>> {
    inner.log.healthy()?;
    let mut registry = inner.registry.lock();
    let log_start = inner.log.rotate();
    let mut sources: BTreeSet<Source> = std::mem::take(&mut registry.touched);
    let mut layers = HashMap::new();
    for device in registry.devices.values() {
        let _still = device.stop_writes();
        // Behind every record of this device, since its writers stand still.
        let end = inner.log.end();
        if let Some(layer) = device.freeze(end) {
            sources.insert(device.source);
            layers.insert(device.source, layer);
        }
    }
    let devices = sources.into_iter().map(|s| (s, registry.devices.get(&s).cloned())).collect::<Vec<_>>();
    let keys = std::mem::take(&mut registry.touched_records);
    let records: Vec<_> = keys.into_iter().map(|k| (k.clone(), registry.records.get(&k).cloned())).collect();
    if devices.is_empty() && records.is_empty() && inner.log.live_bytes() == 0 {
        return Ok(None);
    }
    let counters = &inner.counters;
    let checkpoint = Checkpoint {
        log_start,
        next_segment: inner.log.next_number(),
        next_id: inner.next_id.load(Ordering::Relaxed),
        next_group: counters.group.load(Ordering::Relaxed),
        next_pack: counters.pack.load(Ordering::Relaxed),
    };
    Ok(Some(Plan { checkpoint, devices, layers, records, whole }))
}

/// Steps 2 to 6.
fn execute(inner: &Inner, plan: &Plan) -> Result<SealReport> {
    let mut sealing = Sealing::begin(inner)?;
    let mut layers: Vec<_> = plan.devices.iter().filter_map(|(source, _)| plan.layers.get(source)).collect();
    // The shared domain first, so that the others find what it has.
    layers.sort_by_key(|layer| layer.frozen.read().domain);
    for layer in layers {
        sealing.seal_with_bases(layer)?;
    }
    let Sealing { background, mut writers, roots, mut report, .. } = sealing;
    writers.end_frames()?;

    let mut manifest = Manifest {
        whole: plan.whole,
        checkpoint: Checkpoint {
            next_group: inner.counters.group.load(Ordering::Relaxed),
            next_pack: inner.counters.pack.load(Ordering::Relaxed) + 1,
            ..plan.checkpoint
        },
        devices: Vec::with_capacity(plan.devices.len()),
        records: plan.records.clone(),
    };
    for (source, device) in &plan.devices {
        let row = device.as_ref().map(|device| {
            let sealed = plan.layers.get(source).and_then(|layer| roots.get(&Arc::as_ptr(layer)));
            DeviceRow {
                name: device.name.clone(),
                size_blocks: device.size_blocks,
                parent: device.parent,
                unix_ms: device.created_unix_ms,
                // Without a fork point the map had everything at the plan, and its root has not changed since: only a
                // checkpoint changes roots.
                root: sealed.map_or_else(|| device.state().root, |(_, root)| *root),
            }
        });
        manifest.devices.push((*source, row));
    }
    let packs = writers.finish(&encode(&manifest)?)?;

    let mut batch = Batch::default();
    for pack in &packs {
        report.pack_bytes += pack.facts.bytes;
        pack.add_to(&mut batch)?;
        let keys = inner.index.keys(pack.facts.origin.domain);
        let known = pack.data.iter().map(|(digest, id)| (keys.of(digest), id));
        for (key, id) in known.filter(|(key, _)| key.is_sampled()) {
            batch.put(Table::Index, key.row(), id.0.to_be_bytes());
        }
    }
    manifest.add_to(&mut batch)?;
    batch.put(Table::Meta, "checkpoint", encode(&manifest.checkpoint)?);
    inner.catalogue.commit(batch)?;
    if let Err(e) = note::write(&*inner.medium, inner.uuid, manifest.checkpoint.next_pack) {
        // Nothing is lost by it: an older catalogue would be found out by the log only.
        tracing::warn!("a checkpoint is not noted: {e}");
    }

    for (layer, root) in roots.values() {
        // Each is set once: what was sealed before is not sealed again.
        let _ = layer.sealed.set(*root);
    }
    drop(background);
    move_onto_roots(inner);
    inner.log.release(plan.checkpoint.log_start);
    Ok(report)
}

/// Step 5. Devices first, then fork points made meanwhile, newest first: each finds the sealed one below it through
/// chains that are still whole.
fn move_onto_roots(inner: &Inner) {
    let registry = inner.registry.lock();
    let mut open: HashMap<*const Layer, Arc<Layer>> = HashMap::new();
    for device in registry.devices.values() {
        let _still = device.stop_writes();
        device.with_state(|state| {
            let (layers, sealed) = state.chain();
            if sealed.is_some() {
                open.extend(layers.into_iter().map(|l| (Arc::as_ptr(&l), l)));
                state.rebase();
            }
        });
    }
    let mut open: Vec<_> = open.into_values().collect();
    open.sort_by_key(|layer| std::cmp::Reverse(layer.upto));
    for layer in open {
        layer.frozen.write().rebase();
    }
}

/// Step 2: packs in the making and the roots so far.
struct Sealing<'a> {
    inner: &'a Inner,
    background: Background<'a>,
    writers: PackWriters<'a>,
    /// Of what is being sealed.
    domain: Domain,
    keys: Keys,
    /// Map nodes written by this checkpoint, which no catalogue knows yet.
    fresh: HashMap<BlockId, Arc<Node>>,
    /// By the layer's address.
    roots: HashMap<*const Layer, (Arc<Layer>, NodeRef)>,
    report: SealReport,
}

impl NodeSource for Sealing<'_> {
    fn node(&self, id: BlockId) -> Result<Arc<Node>> {
        self.fresh.get(&id).map_or_else(|| self.inner.blocks.node(id), |node| Ok(node.clone()))
    }
}

impl NodeSink for Sealing<'_> {
    fn put_node(&mut self, node: Node) -> Result<BlockId> {
        let bytes = node.encode();
        let writer = self.writers.at(self.inner.options.level, self.domain)?;
        let id = writer.put(GroupKind::Node, &bytes, digest(&bytes))?;
        self.fresh.insert(id, Arc::new(node));
        Ok(id)
    }
}

impl<'a> Sealing<'a> {
    fn begin(inner: &'a Inner) -> Result<Self> {
        let domain = Domain::SHARED;
        let mut writers = inner.pack_writers();
        // If nothing else is written, it has the manifest.
        writers.at(inner.options.level, domain)?;
        Ok(Self {
            inner,
            background: Background::begin(inner),
            writers,
            domain,
            keys: inner.index.keys(domain),
            fresh: HashMap::new(),
            roots: HashMap::new(),
            report: SealReport::default(),
        })
    }

    /// Seals a fork point after those it grew from.
    fn seal_with_bases(&mut self, layer: &Arc<Layer>) -> Result<()> {
        let mut open = Vec::new();
        let mut next = Some(layer.clone());
        while let Some(layer) = next.take_if(|l| l.sealed.get().is_none() && !self.roots.contains_key(&Arc::as_ptr(l)))
        {
            next = layer.frozen.read().base.clone();
            open.push(layer);
        }
        for layer in open.into_iter().rev() {
            let root = self.seal(&layer)?;
            self.roots.insert(Arc::as_ptr(&layer), (layer, root));
        }
        Ok(())
    }

    fn seal(&mut self, layer: &Layer) -> Result<NodeRef> {
        let state = layer.frozen.read().clone();
        if self.domain != state.domain {
            (self.domain, self.keys) = (state.domain, self.inner.index.keys(state.domain));
        }
        let base = state.base.as_ref().and_then(|b| Some((b, self.roots.get(&Arc::as_ptr(b))?.1)));
        let (root, extents) = match base {
            Some((base, root)) => (root, state.overlay.since(&base.frozen.read().overlay, base.upto)),
            None => (state.root, state.overlay.iter().map(|(start, e)| (start, e.clone())).collect()),
        };
        let changes = self.store_extents(&extents)?;
        map::update(self, root, layer.level, &changes)
    }

    /// Stores what the extents hold; returns where it all is now.
    fn store_extents(&mut self, extents: &[(u64, Extent)]) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        let mut batch = Blocks::default();
        for (start, extent) in extents {
            match &extent.content {
                Content::Zero => {
                    self.store_batch(&mut batch, &mut changes)?;
                    push_change(&mut changes, *start, extent.len, BlockId::NONE);
                }
                Content::Data { payload, crcs, first } => {
                    let mut done = 0;
                    while done < extent.len {
                        let take = (extent.len - done).min((BATCH_BLOCKS - batch.numbers.len()) as u64);
                        let crcs = &crcs[*first as usize + done as usize..][..take as usize];
                        batch.read(self.inner, payload.plus(done * BLOCK_SIZE as u64), crcs, start + done)?;
                        done += take;
                        if batch.numbers.len() == BATCH_BLOCKS {
                            self.store_batch(&mut batch, &mut changes)?;
                        }
                    }
                }
            }
        }
        self.store_batch(&mut batch, &mut changes)?;
        Ok(changes)
    }

    fn store_batch(&mut self, batch: &mut Blocks, changes: &mut Vec<Change>) -> Result<()> {
        self.background.pace();
        // While there is room, what is written and read comes first.
        let writer = self.writers.at(self.inner.options.level, self.domain)?;
        writer.have_help(self.inner.pressed().then(|| self.inner.workers.clone()));
        let index: &Index = &self.inner.index;
        let blocks = || batch.bytes.chunks_exact(BLOCK_SIZE);
        // Zero blocks are not stored, so they need no digest.
        let digests: Vec<Option<Digest>> = blocks().map(|b| (!is_zero(b)).then(|| digest(b))).collect();
        let known: Vec<Digest> = digests.iter().flatten().copied().collect();
        index.warm(&self.keys, &known)?;
        self.report.blocks += batch.numbers.len() as u64;
        for ((number, block), digest) in batch.numbers.iter().zip(blocks()).zip(digests) {
            let id = match digest {
                None => BlockId::NONE,
                Some(digest) => match index.find(&self.keys, &digest) {
                    Some(id) => id,
                    None => {
                        let id = writer.put(GroupKind::Data, block, digest)?;
                        index.insert(&self.keys, &digest, id);
                        self.report.new_blocks += 1;
                        id
                    }
                },
            };
            push_change(changes, *number, 1, id);
        }
        batch.numbers.clear();
        batch.bytes.clear();
        Ok(())
    }
}

/// Blocks read from the log and not yet stored.
#[derive(Default)]
struct Blocks {
    numbers: Vec<u64>,
    bytes: Vec<u8>,
}

impl Blocks {
    fn read(&mut self, inner: &Inner, payload: LogPos, crcs: &[u32], start: u64) -> Result<()> {
        let at = self.bytes.len();
        self.bytes.resize(at + crcs.len() * BLOCK_SIZE, 0);
        if !inner.log.read(payload, &mut self.bytes[at..])? {
            return Err(Error::damaged(format!("the log at position {} is gone before it was sealed", payload.0)));
        }
        verify(payload, crcs, &self.bytes[at..])?;
        self.numbers.extend(start..start + crcs.len() as u64);
        Ok(())
    }
}

/// The background thread's side of a store.
#[derive(Default)]
pub(crate) struct Sealer {
    /// Held while a checkpoint runs.
    pub running: Mutex<()>,
    state: Mutex<SealerState>,
    changed: Condvar,
}

#[derive(Default)]
struct SealerState {
    requested: bool,
    stopping: bool,
    /// Checkpoints tried, and how the last one failed.
    tried: u64,
    failure: Option<Error>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Sealings after which collection looks for small packs to merge.
const SEALS_BEFORE_GC: u64 = 32;
/// How long a store that is never quiet goes without the collection it needs.
const COLLECT_AT_LATEST: Duration = Duration::from_secs(60);
/// How often an idle store looks for packs that have become cold, and how often when some could not be packed again.
const LOOK_FOR_COLD: Duration = Duration::from_secs(60);
const LOOK_FOR_COLD_AFTER_DAMAGE: Duration = Duration::from_secs(3600);
/// How long the background work rests after a failure.
const RETRY: Duration = Duration::from_secs(2);
/// How often the background thread looks whether the store is idle.
const LOOK: Duration = Duration::from_millis(500);

impl Sealer {
    /// Asks for a checkpoint soon.
    pub fn request(&self) {
        let mut state = self.state.lock();
        if !state.requested {
            state.requested = true;
            self.changed.notify_all();
        }
    }

    /// For the background thread: rests this long, or until it is asked for something. Returns whether it is.
    pub fn rest(&self, pause: Duration) -> bool {
        let mut state = self.state.lock();
        if !state.requested && !state.stopping {
            self.changed.wait_for(&mut state, pause);
        }
        state.requested || state.stopping
    }

    /// Waits for the next checkpoint that is tried; fails as it failed.
    pub fn wait_for_progress(&self) -> Result<()> {
        let mut state = self.state.lock();
        let before = state.tried;
        while state.tried == before {
            if state.stopping {
                return Err(Error::new(ErrorKind::Closed, "the store is closed"));
            }
            state.requested = true;
            self.changed.notify_all();
            self.changed.wait_for(&mut state, LOOK);
        }
        state.failure.clone().map_or(Ok(()), Err)
    }

    /// Ends the background thread and waits for it. Fine to call again.
    pub fn stop(&self) {
        let thread = {
            let mut state = self.state.lock();
            state.stopping = true;
            self.changed.notify_all();
            state.thread.take()
        };
        // The thread itself may be the one that drops the store last.
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            drop(thread.join());
        }
    }
}

/// Starts the background thread: it seals when asked to, and when nothing was written for a while.
pub(crate) fn start(inner: &Arc<Inner>) -> Result<()> {
    let weak = Arc::downgrade(inner);
    let thread = std::thread::Builder::new()
        .name("seal".into())
        .spawn(move || run(&weak))
        .map_err(|e| Error::io("cannot start the sealing thread", e))?;
    inner.sealer.state.lock().thread = Some(thread);
    Ok(())
}

fn run(weak: &Weak<Inner>) {
    let mut seen = LogPos(0);
    let mut quiet_since = Instant::now();
    let mut collected_at = Instant::now();
    // Sealings since garbage was last collected: each makes a pack, and collection merges small ones.
    let mut sealed = 0;
    let mut cold_look = Instant::now();
    // After a failure the next try waits, so that a full disk is not hammered.
    let mut not_before = Instant::now();
    while let Some(inner) = weak.upgrade() {
        let requested = {
            let mut state = inner.sealer.state.lock();
            if !state.requested && !state.stopping {
                inner.sealer.changed.wait_for(&mut state, LOOK);
            }
            if state.stopping {
                return;
            }
            std::mem::take(&mut state.requested)
        };
        let end = inner.log.end();
        if end != seen {
            (seen, quiet_since) = (end, Instant::now());
        }
        if Instant::now() < not_before {
            continue;
        }
        let quiet = quiet_since.elapsed() >= inner.options.idle;
        let no_room = inner.sealer.state.lock().failure.as_ref().is_some_and(|e| e.kind() == ErrorKind::NoSpace);
        let wanted = inner.deleted.load(Ordering::Relaxed) + sealed / SEALS_BEFORE_GC > 0;
        if wanted && (quiet || no_room || collected_at.elapsed() >= COLLECT_AT_LATEST) {
            let deleted = inner.deleted.load(Ordering::Relaxed);
            match inner.collect() {
                Ok(report) => {
                    tracing::info!(?report, "garbage collected");
                    inner.deleted.fetch_sub(deleted, Ordering::Relaxed);
                    sealed = 0;
                }
                Err(e) => {
                    tracing::error!("garbage collection failed; it will be tried again: {e}");
                    not_before = Instant::now() + RETRY;
                }
            }
            collected_at = Instant::now();
        }
        let live = inner.log.live_bytes();
        if requested || (live > 0 && quiet) || live >= inner.options.log_bytes {
            if let Err(e) = checkpoint(&inner) {
                tracing::error!("sealing failed; it will be tried again: {e}");
                not_before = Instant::now() + RETRY;
            }
            sealed += 1;
        } else if quiet && !wanted && live == 0 && Instant::now() >= cold_look {
            let mut pause = inner.options.repack_after.clamp(LOOK, LOOK_FOR_COLD);
            match repack::repack_cold(&inner) {
                Ok(report) if report == RepackReport::default() => {}
                Ok(report) => {
                    tracing::info!(?report, "cold data packed again");
                    if report.packs_damaged > 0 {
                        pause = LOOK_FOR_COLD_AFTER_DAMAGE;
                    }
                    // It may have left a small pack with a manifest.
                    sealed += 1;
                }
                Err(e) => {
                    tracing::error!("packing cold data again failed; it will be tried again: {e}");
                    not_before = Instant::now() + RETRY;
                }
            }
            cold_look = Instant::now() + pause;
        }
    }
}
