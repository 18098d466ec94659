//! What sandboxes use over time: the compute of their sessions, and the state that is kept for them.
//!
//! Each sandbox has a [`Ledger`], which outlives it for a while. Sessions are entered as they begin and end, in the
//! transaction that changes the sandbox's record; that one goes on is noted once a `HEARTBEAT`, which is all that a crash
//! can take away. What is kept is looked at from time to time (`watch`): a level lasts until another one is seen, also
//! while no daemon runs.

pub mod ledger;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use storage::{Source, Store, Transaction};
use tokio::sync::Notify;
use tokio::time::Instant;

pub use ledger::{Compute, Ledger, Run, Saved, SavedTime, Used};

use super::error::Result;
use super::lifecycle::State;
use super::records::{Record, SandboxRecord, load_all, new_id};
use super::{Engine, Shared};

/// How often it is noted that sessions go on.
const HEARTBEAT: Duration = Duration::from_secs(60);
/// After a session's end, what is kept is looked at soon, but not more often than this.
const SOON: Duration = Duration::from_secs(10);
/// Of all time, at most one part in so many is spent with looking.
const SHARE: u32 = 20;
/// How long a sandbox that is gone stays in the figures, and how many of them.
const KEPT: jiff::SignedDuration = jiff::SignedDuration::from_hours(24 * 400);
const MAX_GONE: usize = 10_000;

/// A ledger as it is stored.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct LedgerRecord {
    sandbox_id: String,
    /// What it was called last.
    name: String,
    ledger: Ledger,
}

impl Record for LedgerRecord {
    const KIND: &'static str = "usage";
    fn key(&self) -> &str {
        &self.sandbox_id
    }
}

/// By the ids of their sandboxes.
type Known = BTreeMap<String, LedgerRecord>;

/// All ledgers.
#[derive(Default)]
pub(super) struct Ledgers {
    all: Mutex<Known>,
    /// Something was kept or given up.
    changed: Notify,
}

impl Ledgers {
    /// Reads them. Sessions that no machine goes on with have ended when they were last seen; what those had is told by
    /// sandbox.
    pub(super) fn load(store: &Store, goes_on: impl Fn(&str) -> bool) -> Result<(Known, BTreeMap<String, Compute>)> {
        let (mut all, mut ended) = (BTreeMap::new(), BTreeMap::new());
        for mut record in load_all::<LedgerRecord>(store)? {
            let id = record.sandbox_id.clone();
            if !goes_on(&id)
                && let Some(compute) = record.ledger.ended(None)
            {
                ended.insert(id.clone(), compute);
            }
            all.insert(id, record);
        }
        Ok((all, ended))
    }

    pub(super) fn restore(&self, all: Known) {
        *self.all.lock() = all;
    }

    fn of(&self, id: &str, name: &str, change: impl FnOnce(&mut Ledger)) {
        let mut all = self.all.lock();
        let record = all.entry(id.to_owned()).or_default();
        (record.sandbox_id, record.name) = (id.to_owned(), name.to_owned());
        change(&mut record.ledger);
    }

    pub(super) fn session_began(&self, of: &SandboxRecord) {
        let now = Timestamp::now();
        self.of(&of.id, &of.name, |ledger| ledger.began(&new_id("ses"), now, of.cpus, of.memory_mib));
    }

    /// With how long it lasted, unless nobody knows.
    pub(super) fn session_ended(&self, of: &SandboxRecord, ran: Option<Duration>) {
        if self.all.lock().contains_key(&of.id) {
            self.of(&of.id, &of.name, |ledger| {
                ledger.ended(ran.map(|ran| ran.as_millis() as u64));
            });
        }
    }

    /// What is kept may be another amount now.
    pub(super) fn look_soon(&self) {
        self.changed.notify_one();
    }

    /// Writes a ledger together with what else a transaction does.
    pub(super) fn put(&self, tx: &mut Transaction<'_>, id: &str) -> Result<()> {
        let record = self.all.lock().get(id).cloned();
        if let Some(record) = record {
            tx.put_record(LedgerRecord::KIND, id, record.encode()?);
        }
        Ok(())
    }
}

/// Notes from time to time that sessions go on, and what is kept.
pub(super) async fn watch(shared: Arc<Shared>) {
    let period = shared.settings.usage_period;
    let (mut next_look, mut earliest) = (Instant::now() + SOON, Instant::now());
    loop {
        let heartbeat = Instant::now() + HEARTBEAT;
        tokio::select! {
            () = tokio::time::sleep_until(next_look.min(heartbeat)) => {}
            () = shared.usage.changed.notified() => {
                next_look = next_look.min(earliest.max(Instant::now() + SOON.min(period)));
                continue;
            }
        }
        if let Err(error) = note_sessions(&shared).await {
            tracing::warn!(%error, "that sessions go on could not be noted");
        }
        if Instant::now() < next_look {
            continue;
        }
        let began = Instant::now();
        if let Err(error) = look(&shared).await {
            tracing::warn!(%error, "what is kept for sandboxes could not be measured");
        }
        earliest = Instant::now() + began.elapsed() * SHARE;
        next_look = earliest.max(Instant::now() + period);
    }
}

async fn note_sessions(shared: &Arc<Shared>) -> Result<()> {
    let mut going_on = Vec::new();
    for sandbox in shared.registry.sandboxes() {
        let Some(ran) = sandbox.session_age() else { continue };
        let mut noted = false;
        shared.usage.of(sandbox.id(), &sandbox.name(), |ledger| noted = ledger.goes_on(ran.as_millis() as u64));
        if noted {
            going_on.push(sandbox.id().to_owned());
        }
    }
    write(shared, going_on, Vec::new()).await
}

async fn write(shared: &Arc<Shared>, changed: Vec<String>, gone: Vec<String>) -> Result<()> {
    if changed.is_empty() && gone.is_empty() {
        return Ok(());
    }
    let writing = shared.clone();
    shared
        .transact(move |tx| {
            for id in &changed {
                writing.usage.put(tx, id)?;
            }
            gone.iter().for_each(|id| tx.delete_record(LedgerRecord::KIND, id));
            Ok(())
        })
        .await
}

/// Measures what is kept for each sandbox and its snapshots. Walks all maps.
async fn look(shared: &Arc<Shared>) -> Result<()> {
    let mut kept: BTreeMap<String, (Option<String>, Vec<Source>)> = BTreeMap::new();
    for sandbox in shared.registry.sandboxes() {
        let r = sandbox.record();
        let disk = (r.state != State::Destroyed).then_some(Source::Disk(r.disk));
        let memory = r.memory.map(|m| Source::Disk(m.disk));
        kept.insert(r.id, (Some(r.name), disk.into_iter().chain(memory).collect()));
    }
    for snapshot in shared.registry.snapshots() {
        let sources = &mut kept.entry(snapshot.sandbox_id).or_default().1;
        sources.push(Source::Snapshot(snapshot.snapshot));
        sources.extend(snapshot.memory.map(|m| Source::Disk(m.disk)));
    }
    // Those of which nothing is left.
    for id in shared.usage.all.lock().keys() {
        kept.entry(id.clone()).or_default();
    }
    let (owners, groups): (Vec<_>, Vec<_>) =
        kept.into_iter().map(|(id, (name, sources))| ((id, name), sources)).unzip();
    let measured = shared.with_store(move |store| measure(store, &groups)).await?;
    let now = Timestamp::now();
    let mut changed = Vec::new();
    for ((id, name), saved) in owners.into_iter().zip(measured) {
        let known = shared.usage.all.lock().get(&id).map(|r| r.name.clone());
        let name = name.or(known).unwrap_or_else(|| id.clone());
        let mut differs = false;
        shared.usage.of(&id, &name, |ledger| differs = ledger.saves(now, saved));
        if differs {
            changed.push(id);
        }
    }
    let gone = forget(shared, now);
    write(shared, changed, gone).await
}

fn measure(store: &Store, groups: &[Vec<Source>]) -> Result<Vec<Saved>> {
    let costs = store.usage_of_groups(groups)?;
    let logical = |group: &Vec<Source>| {
        // One that was deleted meanwhile holds nothing.
        group.iter().map(|source| store.logical_bytes(*source).unwrap_or(0)).sum()
    };
    let saved = groups.iter().zip(costs).map(|(group, cost)| Saved {
        logical_bytes: logical(group),
        referenced_bytes: cost.referenced_bytes,
        exclusive_bytes: cost.exclusive_bytes,
    });
    Ok(saved.collect())
}

/// Takes out what has long been gone, and says which.
fn forget(shared: &Arc<Shared>, now: Timestamp) -> Vec<String> {
    let oldest = now.checked_sub(KEPT).map_or(i64::MIN, |at| at.as_millisecond());
    let here: std::collections::BTreeSet<String> = shared
        .registry
        .sandboxes()
        .iter()
        .filter(|s| s.record().state != State::Destroyed)
        .map(|s| s.id().to_owned())
        .collect();
    let mut all = shared.usage.all.lock();
    let nothing = |ledger: &Ledger| ledger.saved().is_none_or(|(_, saved)| saved == Saved::default());
    let gone = all.values().filter(|r| !here.contains(&r.sandbox_id) && nothing(&r.ledger));
    let mut gone: Vec<(i64, String)> = gone.map(|r| (r.ledger.last_ms(), r.sandbox_id.clone())).collect();
    gone.sort();
    let too_many = gone.len().saturating_sub(MAX_GONE);
    let ids: Vec<String> = gone
        .into_iter()
        .enumerate()
        .filter(|(i, (at, _))| *i < too_many || *at < oldest)
        .map(|(_, (_, id))| id)
        .collect();
    ids.iter().for_each(|id| drop(all.remove(id)));
    ids
}

/// A stretch of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period {
    /// Its beginning.
    pub from: Timestamp,
    /// Its end, which may be to come.
    pub until: Timestamp,
}

/// What a sandbox used within a period.
#[derive(Debug, Clone)]
pub struct SandboxUsage {
    /// Whose.
    pub sandbox_id: String,
    /// What it is called, or was.
    pub name: String,
    /// None: it is not even remembered as destroyed.
    pub state: Option<State>,
    /// In all.
    pub used: Used,
    /// The same of equal parts of the period, as many as were asked for.
    pub parts: Vec<Used>,
    /// What is kept now, and since when, if it was ever looked at.
    pub saved: Option<(Timestamp, Saved)>,
}

/// A session as the ledger has it.
#[derive(Debug, Clone)]
pub struct SessionUsage {
    /// Whose.
    pub sandbox_id: String,
    /// What that is called, or was.
    pub name: String,
    /// When it began and ended, and with what.
    pub run: Run,
    /// Whether its machine runs.
    pub goes_on: bool,
    /// All of it, until now.
    pub compute: Compute,
}

impl Engine {
    /// What sandboxes used within a period, or one of them, by id or name: those that used anything, or are there. Oldest
    /// first.
    pub fn usage(&self, of: Option<&str>, period: Period, parts: u32) -> Result<Vec<SandboxUsage>> {
        let now = Timestamp::now();
        let only = of.map(|key| self.ledger_id(key)).transpose()?;
        let ledgers = self.ledgers(only.as_deref());
        let mut out = Vec::new();
        for record in ledgers {
            let sandbox = self.shared.registry.sandbox(&record.sandbox_id).ok().filter(|s| s.id() == record.sandbox_id);
            let state = sandbox.as_ref().map(|s| s.record().state);
            let used = record.ledger.over(period.from, period.until, now);
            if only.is_none() && used == Used::default() && state.is_none_or(|s| s == State::Destroyed) {
                continue;
            }
            let parts = split(period, parts).map(|p| record.ledger.over(p.from, p.until, now)).collect();
            let saved = record.ledger.saved();
            out.push(SandboxUsage { sandbox_id: record.sandbox_id, name: record.name, state, used, parts, saved });
        }
        Ok(out)
    }

    /// The sessions that were going on within a period, of all sandboxes or of one; the latest first.
    pub fn usage_sessions(&self, of: Option<&str>, period: Period) -> Result<Vec<SessionUsage>> {
        let now = Timestamp::now().as_millisecond();
        let (from, until) = (period.from.as_millisecond(), period.until.as_millisecond());
        let only = of.map(|key| self.ledger_id(key)).transpose()?;
        let mut out = Vec::new();
        for LedgerRecord { sandbox_id, name, ledger } in self.ledgers(only.as_deref()) {
            for run in ledger.runs().iter().filter(|run| run.over(from, until, now).sessions > 0) {
                let (compute, goes_on) = (run.over(i64::MIN, i64::MAX, now).compute, run.until_ms.is_none());
                out.push(SessionUsage {
                    sandbox_id: sandbox_id.clone(),
                    name: name.clone(),
                    run: run.clone(),
                    goes_on,
                    compute,
                });
            }
        }
        out.sort_by(|a, b| (b.run.from_ms, &b.run.id).cmp(&(a.run.from_ms, &a.run.id)));
        Ok(out)
    }

    /// Looks now at what is kept for everybody; walks the maps of all disks.
    pub async fn measure_usage(&self) -> Result<()> {
        let shared = self.shared.clone();
        self.detached(async move { look(&shared).await }).await
    }

    /// Also of one that is gone.
    fn ledger_id(&self, key: &str) -> Result<String> {
        if self.shared.usage.all.lock().contains_key(key) {
            return Ok(key.to_owned());
        }
        Ok(self.find(key)?.id().to_owned())
    }

    fn ledgers(&self, only: Option<&str>) -> Vec<LedgerRecord> {
        let all = self.shared.usage.all.lock();
        all.values().filter(|r| only.is_none_or(|id| id == r.sandbox_id)).cloned().collect()
    }
}

/// Equal parts of a period.
fn split(period: Period, parts: u32) -> impl Iterator<Item = Period> {
    let (from, until) = (period.from.as_millisecond(), period.until.as_millisecond());
    let at = move |i: u32| {
        let ms = i128::from(from) + i128::from(until - from) * i128::from(i) / i128::from(parts.max(1));
        Timestamp::from_millisecond(ms as i64).unwrap_or(period.until)
    };
    (0..parts).map(move |i| Period { from: at(i), until: at(i + 1) })
}
