//! Batches: many sandboxes of one kind at once.
//!
//! Their disks and records and the batch's own are made in one transaction, so they are all there or none, and that costs
//! what it costs for one. Then they are started a few at a time. What became of each start is in the batch's record; a
//! batch that a daemon's end cut off goes on with those that were not started (of which those that are not persistent are
//! gone, as ever).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use super::error::{Error, Kind, Result};
use super::lifecycle::State;
use super::records::{BatchItem, BatchOutcome, BatchRecord, Record, SandboxRecord, load_all, new_id, put_all};
use super::sandbox::Sandbox;
use super::{CreateRequest, Engine, Shared, put_sandbox, record_of, resolve_origin};

/// Most sandboxes of one batch.
const MAX_COUNT: u32 = 1_000;
/// Batches that are over and remembered.
const REMEMBERED: usize = 1_000;

/// Sandboxes of one kind.
#[derive(Debug, Clone)]
pub struct BatchRequest {
    /// What each is to be; with a name, they are `NAME-1`, `NAME-2` and so on.
    pub each: CreateRequest,
    /// How many.
    pub count: u32,
    /// How many are started at a time; without, as many as the daemon boots at a time.
    pub concurrency: Option<u32>,
}

/// How a batch is going.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchStatus {
    /// Some are still to be started.
    Running,
    /// All were started.
    Completed,
    /// Some were not.
    CompletedWithErrors,
    /// None was.
    Failed,
    /// Those that had not been started were not to be.
    Cancelled,
}

/// How one of them is going.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ItemStatus {
    Queued,
    Starting,
    Completed,
    Failed,
    Cancelled,
}

/// A sandbox of a batch as callers see it.
#[derive(Debug, Clone)]
pub struct BatchItemView {
    /// Its place in the batch, from 0.
    pub index: usize,
    /// Its id.
    pub sandbox_id: String,
    /// How its start is going.
    pub status: ItemStatus,
    /// Why it failed.
    pub error: Option<String>,
    /// The sandbox; none if it is destroyed and forgotten.
    pub sandbox: Option<SandboxRecord>,
}

/// How many of a batch's sandboxes are where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct BatchCounts {
    pub queued: usize,
    pub starting: usize,
    pub completed: usize,
    pub failed: usize,
    pub cancelled: usize,
    /// By the state the sandboxes are in now.
    pub states: BTreeMap<&'static str, usize>,
}

/// A batch as callers see it.
#[derive(Debug, Clone)]
pub struct BatchView {
    /// The record.
    pub record: BatchRecord,
    /// How it is going.
    pub status: BatchStatus,
    /// How many are where.
    pub counts: BatchCounts,
    /// The sandboxes.
    pub items: Vec<BatchItemView>,
}

/// All batches.
#[derive(Default)]
pub(super) struct Batches {
    known: Mutex<BTreeMap<String, Arc<Batch>>>,
    ended: AtomicBool,
}

struct Batch {
    record: Mutex<BatchRecord>,
    /// Held from changing the record to its being durable, so that the last word is the last one written.
    saving: tokio::sync::Mutex<()>,
    changed: watch::Sender<()>,
}

impl Batches {
    fn find(&self, id: &str) -> Result<Arc<Batch>> {
        self.known.lock().get(id).cloned().ok_or_else(|| {
            Error::new(Kind::BatchNotFound, format!("there is no batch {id:?}"))
                .hint(format!("the last {REMEMBERED} that are over are remembered"))
        })
    }

    fn insert(&self, record: BatchRecord) -> Arc<Batch> {
        let id = record.id.clone();
        let batch = Arc::new(Batch {
            record: Mutex::new(record),
            saving: tokio::sync::Mutex::default(),
            changed: watch::Sender::new(()),
        });
        self.known.lock().insert(id, batch.clone());
        batch
    }

    /// No more is told: the engine ends.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.known.lock().values().for_each(|batch| batch.tell());
    }

    /// The oldest that are over, beyond the bound.
    fn too_old(&self) -> Vec<String> {
        let known = self.known.lock();
        let mut over: Vec<_> = known
            .values()
            .filter_map(|batch| {
                let record = batch.record.lock();
                record.settled_at.map(|_| (record.created_at, record.id.clone()))
            })
            .collect();
        over.sort();
        over.truncate(over.len().saturating_sub(REMEMBERED));
        over.into_iter().map(|(_, id)| id).collect()
    }
}

impl Batch {
    fn tell(&self) {
        self.changed.send_replace(());
    }

    /// Changes the record: seen at once, and then durable.
    async fn change(&self, shared: &Shared, change: impl FnOnce(&mut BatchRecord)) -> Result<()> {
        let _saving = self.saving.lock().await;
        let record = {
            let mut record = self.record.lock();
            change(&mut record);
            if record.items.iter().all(|item| item.outcome.is_some()) {
                record.settled_at.get_or_insert_with(Timestamp::now);
            }
            record.clone()
        };
        self.tell();
        shared.transact(move |tx| put_all(tx, &[record])).await
    }

    async fn outcome(&self, shared: &Shared, index: usize, outcome: BatchOutcome) {
        let noted = self.change(shared, |record| {
            record.items[index].outcome.get_or_insert(outcome);
        });
        if let Err(error) = noted.await {
            tracing::warn!(%error, "what became of a batch's sandbox is found out again at the next start");
        }
    }

    fn is_cancelled(&self) -> bool {
        self.record.lock().cancelled
    }

    fn view(&self, shared: &Shared) -> BatchView {
        let record = self.record.lock().clone();
        let item = |(index, item): (usize, &BatchItem)| {
            let sandbox = shared.registry.sandbox(&item.sandbox_id).ok().map(|sandbox| sandbox.record());
            let (status, error) = match &item.outcome {
                Some(BatchOutcome::Completed) => (ItemStatus::Completed, None),
                Some(BatchOutcome::Failed(error)) => (ItemStatus::Failed, Some(error.clone())),
                Some(BatchOutcome::Cancelled) => (ItemStatus::Cancelled, None),
                None if sandbox.as_ref().is_some_and(is_queued) => (ItemStatus::Queued, None),
                None => (ItemStatus::Starting, None),
            };
            BatchItemView { index, sandbox_id: item.sandbox_id.clone(), status, error, sandbox }
        };
        let items: Vec<_> = record.items.iter().enumerate().map(item).collect();
        let counts = count(&items);
        let status = match &record {
            r if r.settled_at.is_none() => BatchStatus::Running,
            r if r.cancelled && counts.cancelled > 0 => BatchStatus::Cancelled,
            _ if counts.completed == items.len() => BatchStatus::Completed,
            _ if counts.completed == 0 => BatchStatus::Failed,
            _ => BatchStatus::CompletedWithErrors,
        };
        BatchView { record, status, counts, items }
    }
}

fn count(items: &[BatchItemView]) -> BatchCounts {
    let mut counts = BatchCounts::default();
    for item in items {
        *match item.status {
            ItemStatus::Queued => &mut counts.queued,
            ItemStatus::Starting => &mut counts.starting,
            ItemStatus::Completed => &mut counts.completed,
            ItemStatus::Failed => &mut counts.failed,
            ItemStatus::Cancelled => &mut counts.cancelled,
        } += 1;
        if let Some(sandbox) = &item.sandbox {
            *counts.states.entry(sandbox.state.name()).or_default() += 1;
        }
    }
    counts
}

/// Nobody has started it.
fn is_queued(record: &SandboxRecord) -> bool {
    record.state == State::Paused && record.started_at.is_none()
}

/// Goes on with what an earlier daemon's end cut off.
pub(super) async fn go_on(shared: &Arc<Shared>) -> Result<()> {
    let records: Vec<BatchRecord> = shared.with_store(load_all).await?;
    for mut record in records {
        for item in record.items.iter_mut().filter(|item| item.outcome.is_none()) {
            let sandbox = shared.registry.sandbox(&item.sandbox_id).ok().map(|sandbox| sandbox.record());
            item.outcome = match sandbox {
                Some(sandbox) if sandbox.ready_at.is_some() => Some(BatchOutcome::Completed),
                Some(sandbox) if sandbox.state == State::Error => {
                    Some(BatchOutcome::Failed(sandbox.last_error.unwrap_or_default()))
                }
                // Also one that was being started, and was brought to rest or is being taken over.
                Some(sandbox) if sandbox.state != State::Destroyed => None,
                _ => Some(BatchOutcome::Cancelled),
            };
        }
        let (settled, cancelled) = (record.settled_at.is_some(), record.cancelled);
        let (batch, shared) = (shared.batches.insert(record), shared.clone());
        if !settled {
            tokio::spawn(async move {
                if cancelled && let Err(error) = cancel_rest(&shared, &batch).await {
                    tracing::warn!(%error, "a batch that was cancelled is not, in full");
                }
                start_all(shared, batch).await;
            });
        }
    }
    Ok(())
}

/// Starts those that are not, a few at a time.
async fn start_all(shared: Arc<Shared>, batch: Arc<Batch>) {
    let record = batch.record.lock().clone();
    let places = Arc::new(Semaphore::new(record.concurrency.max(1) as usize));
    for (index, item) in record.items.iter().enumerate().filter(|(_, item)| item.outcome.is_none()) {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        if batch.is_cancelled() || shared.check_open().is_err() {
            break;
        }
        let (shared, batch, id) = (shared.clone(), batch.clone(), item.sandbox_id.clone());
        tokio::spawn(async move {
            let started = match shared.registry.sandbox(&id) {
                Ok(sandbox) => sandbox.resume(false).await,
                Err(error) => Err(error),
            };
            let outcome = match started {
                Ok(_) => BatchOutcome::Completed,
                // The daemon ends: it is started by the next one.
                Err(error) if error.kind() == Kind::ShuttingDown => return,
                Err(error) if error.kind() == Kind::SandboxDestroyed => BatchOutcome::Cancelled,
                Err(error) => BatchOutcome::Failed(error.to_string()),
            };
            batch.outcome(&shared, index, outcome).await;
            drop(place);
        });
    }
    // A batch of which nothing was left is settled by that.
    if record.items.iter().all(|item| item.outcome.is_some())
        && let Err(error) = batch.change(&shared, |_| ()).await
    {
        tracing::warn!(%error, "a batch is gone over again at the next start");
    }
}

/// Destroys those that were not started.
async fn cancel_rest(shared: &Arc<Shared>, batch: &Batch) -> Result<()> {
    let items = batch.record.lock().items.clone();
    for (index, item) in items.iter().enumerate().filter(|(_, item)| item.outcome.is_none()) {
        let gone = match shared.registry.sandbox(&item.sandbox_id) {
            Err(_) => true,
            Ok(sandbox) => match sandbox.record() {
                record if record.state == State::Destroyed => true,
                record => is_queued(&record) && sandbox.destroy_if(is_queued).await?,
            },
        };
        if gone {
            batch.outcome(shared, index, BatchOutcome::Cancelled).await;
        }
    }
    Ok(())
}

impl Engine {
    /// Makes sandboxes of one kind, all or none; they are started after the answer.
    pub async fn create_batch(&self, request: BatchRequest) -> Result<BatchView> {
        let BatchRequest { each, count, concurrency } = request;
        if !(1..=MAX_COUNT).contains(&count) {
            return Err(Error::invalid(format!("a batch has 1 to {MAX_COUNT} sandboxes, not {count}")));
        }
        if concurrency.is_some_and(|n| !(1..=MAX_COUNT).contains(&n)) {
            return Err(Error::invalid(format!("1 to {MAX_COUNT} sandboxes are started at a time")));
        }
        if !each.volumes.is_empty() {
            return Err(Error::invalid("sandboxes of a batch have no volumes").hint("attach them one by one"));
        }
        let concurrency = concurrency.unwrap_or(self.shared.settings.concurrent_boots as u32);
        let shared = self.shared.clone();
        self.detached(async move {
            let (source, base) = resolve_origin(&shared, &each.origin)?;
            let ids: Vec<String> = (0..count).map(|_| new_id("sb")).collect();
            let names: Vec<String> = match &each.name {
                None => ids.clone(),
                Some(name) => (1..=count).map(|n| format!("{name}-{n}")).collect(),
            };
            let reservation = shared.registry.reserve_names(&names)?;
            let sandboxes = ids.iter().zip(names);
            let sandboxes: Vec<_> =
                sandboxes.map(|(id, name)| record_of(&each, &base, id.clone(), name, State::Paused)).collect();
            let batch = BatchRecord {
                id: new_id("batch"),
                concurrency,
                // Those that nobody wants started are done.
                items: ids
                    .into_iter()
                    .map(|sandbox_id| BatchItem {
                        sandbox_id,
                        outcome: (!each.start).then_some(BatchOutcome::Completed),
                    })
                    .collect(),
                cancelled: false,
                created_at: Timestamp::now(),
                settled_at: (!each.start).then(Timestamp::now),
            };
            let too_old = shared.batches.too_old();
            let forgotten = too_old.clone();
            // The commit point: before it there is none, after it there are all.
            let (sandboxes, batch) = shared
                .transact(move |tx| {
                    let mut sandboxes = sandboxes;
                    for record in &mut sandboxes {
                        put_sandbox(tx, record, source, base.disk_size_bytes)?;
                    }
                    put_all(tx, std::slice::from_ref(&batch))?;
                    too_old.iter().for_each(|id| tx.delete_record(BatchRecord::KIND, id));
                    Ok((sandboxes, batch))
                })
                .await?;
            shared.batches.known.lock().retain(|id, _| !forgotten.contains(id));
            let sandboxes = sandboxes.into_iter().map(|record| Sandbox::new(shared.clone(), record)).collect();
            shared.registry.insert_all(sandboxes, reservation);
            let batch = shared.batches.insert(batch);
            let view = batch.view(&shared);
            if each.start {
                tokio::spawn(start_all(shared, batch));
            }
            Ok(view)
        })
        .await
    }

    /// How a batch is going.
    pub fn batch(&self, id: &str) -> Result<BatchView> {
        Ok(self.shared.batches.find(id)?.view(&self.shared))
    }

    /// Starts no more of a batch's sandboxes. Those that were not started are destroyed; the others go on.
    pub async fn cancel_batch(&self, id: &str) -> Result<BatchView> {
        let (shared, batch) = (self.shared.clone(), self.shared.batches.find(id)?);
        self.detached(async move {
            if batch.record.lock().settled_at.is_some() {
                return Ok(batch.view(&shared));
            }
            batch.change(&shared, |record| record.cancelled = true).await?;
            cancel_rest(&shared, &batch).await?;
            Ok(batch.view(&shared))
        })
        .await
    }

    /// Follows a batch.
    pub fn watch_batch(&self, id: &str) -> Result<BatchWatch> {
        let batch = self.shared.batches.find(id)?;
        self.shared.check_open()?;
        let mut changed = batch.changed.subscribe();
        changed.mark_changed();
        Ok(BatchWatch { shared: self.shared.clone(), batch, changed, over: false })
    }
}

/// A batch, each time it changes.
pub struct BatchWatch {
    shared: Arc<Shared>,
    batch: Arc<Batch>,
    changed: watch::Receiver<()>,
    over: bool,
}

impl BatchWatch {
    /// How it is going; first at once, then after each change. None after it was settled, and when the engine ends.
    pub async fn next(&mut self) -> Option<BatchView> {
        if self.over || self.changed.changed().await.is_err() || self.shared.batches.ended.load(Ordering::Acquire) {
            return None;
        }
        let view = self.batch.view(&self.shared);
        self.over = view.record.settled_at.is_some();
        Some(view)
    }
}
