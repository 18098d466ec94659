//! Snapshots once they are there: finding, deleting, expiring; and where everything came from.
//!
//! A snapshot is a state of its own in the store. Deleting one never harms what was made from it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use storage::{Source, Usage};

use super::checkpoint::SnapshotRequest;
use super::error::{Error, Result};
use super::lifecycle::State;
use super::records::{Record, SnapshotRecord, check_comment, put_all};
use super::{Engine, SandboxView, Shared};

/// How often snapshots whose time is over are looked for.
const EXPIRY_PERIOD: Duration = Duration::from_secs(30);

/// A snapshot that is gone.
#[derive(Debug, Clone)]
pub struct Deleted {
    /// What it was.
    pub record: SnapshotRecord,
    /// About how many stored bytes nobody else has, if that was asked for. They come back in the background.
    pub freed_bytes: Option<u64>,
}

/// What a node of the lineage is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum NodeKind {
    Template,
    Sandbox,
    Snapshot,
}

/// A template, sandbox or snapshot, and what it was made from.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LineageNode {
    /// What it is.
    pub kind: NodeKind,
    /// Id; of a template, its name.
    pub id: String,
    /// What the user calls it.
    pub name: Option<String>,
    /// The id of what it was made from, which may be gone; none for what is at the root.
    pub parent: Option<String>,
    /// State of a sandbox; `ready`, or `deleted` where only descendants are left.
    pub state: String,
    /// When it was made; unknown of what is deleted.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub created_at: Option<Timestamp>,
    /// Stored bytes that nothing else has: about what deleting it gives back.
    pub exclusive_bytes: Option<u64>,
    /// Bytes written to it that are not packed yet.
    pub unsealed_bytes: Option<u64>,
}

impl Engine {
    /// Takes a named state.
    pub async fn snapshot(&self, key: &str, request: SnapshotRequest) -> Result<SnapshotRecord> {
        let sandbox = self.find(key)?;
        check_request(&request)?;
        let shared = self.shared.clone();
        self.detached(async move {
            let keep = request.keep_last;
            let record = sandbox.snapshot(request, None).await?;
            if let Some(keep) = keep {
                keep_last(&shared, sandbox.id(), keep).await;
            }
            Ok(record)
        })
        .await
    }

    /// Puts a sandbox's file system back to one of its snapshots. A running session ends and a new one begins.
    pub async fn restore(&self, key: &str, snapshot: &str) -> Result<SandboxView> {
        let sandbox = self.find(key)?;
        let snapshot = self.shared.registry.snapshot(snapshot, Some(sandbox.id()))?;
        self.detached(async move { sandbox.restore(snapshot).await }).await
    }

    /// Snapshots, oldest first: of one sandbox (which may be gone), or all.
    pub fn snapshots(&self, sandbox: Option<&str>) -> Result<Vec<SnapshotRecord>> {
        let id = sandbox.map(|key| self.find(key).map(|s| s.id().to_owned())).transpose()?;
        Ok(sorted(&self.shared, id.as_deref()))
    }

    /// A snapshot by id or by unique name; `sandbox` narrows the choice.
    pub fn find_snapshot(&self, key: &str, sandbox: Option<&str>) -> Result<SnapshotRecord> {
        let id = sandbox.map(|key| self.find(key).map(|s| s.id().to_owned())).transpose()?;
        self.shared.registry.snapshot(key, id.as_deref())
    }

    /// Deletes a snapshot. Sandboxes made from it do not need it. `measure` says what that gives back, which walks the
    /// maps of all disks.
    pub async fn delete_snapshot(&self, key: &str, sandbox: Option<&str>, measure: bool) -> Result<Deleted> {
        let record = self.find_snapshot(key, sandbox)?;
        let shared = self.shared.clone();
        self.detached(async move {
            let source = Source::Snapshot(record.snapshot);
            let freed_bytes = match measure {
                true => Some(shared.with_store(move |store| Ok(cost(&store.usage_of(source)?))).await?),
                false => None,
            };
            let record = delete(&shared, &record.id).await?;
            Ok(Deleted { record, freed_bytes })
        })
        .await
    }

    /// What is stored for a sandbox; walks the maps of all disks.
    pub async fn stored(&self, sandbox: &str) -> Result<Usage> {
        let disk = Source::Disk(self.find(sandbox)?.record().disk);
        self.shared.with_store(move |store| Ok(store.usage_of(disk)?)).await
    }

    /// Everything that was made from each other, parents before children; of one sandbox, those it came from and those
    /// that came from it. With `sizes` it walks the maps of all disks.
    pub async fn lineage(&self, sandbox: Option<&str>, sizes: bool) -> Result<Vec<LineageNode>> {
        let of = sandbox.map(|key| self.find(key).map(|s| s.id().to_owned())).transpose()?;
        let usage = match sizes {
            true => self.shared.with_store(|store| Ok(store.usage()?)).await?,
            false => Vec::new(),
        };
        let usage: HashMap<String, Usage> = usage.into_iter().map(|u| (u.id.clone(), u)).collect();
        let mut nodes = all_nodes(&self.shared, &usage);
        if let Some(of) = &of {
            nodes = related(nodes, of);
        }
        add_missing_parents(&mut nodes);
        Ok(nodes)
    }
}

fn cost(usage: &Usage) -> u64 {
    usage.exclusive_bytes + usage.unsealed_bytes
}

fn check_request(request: &SnapshotRequest) -> Result<()> {
    check_comment(request.comment.as_deref())?;
    if request.keep_last == Some(0) {
        return Err(Error::invalid("the last 0 snapshots cannot be kept: the one that is taken is one")
            .hint("keep 1 or more; delete one: miosa sandbox snapshots delete SNAPSHOT"));
    }
    Ok(())
}

fn sorted(shared: &Shared, sandbox_id: Option<&str>) -> Vec<SnapshotRecord> {
    let mut all = shared.registry.snapshots();
    all.retain(|s| sandbox_id.is_none_or(|id| id == s.sandbox_id));
    all.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
    all
}

/// Deletes by id. Of two callers one deletes and the other finds nothing.
async fn delete(shared: &Arc<Shared>, id: &str) -> Result<SnapshotRecord> {
    let _turn = shared.snapshot_ends.lock().await;
    let record = shared.registry.take_snapshot(id)?;
    let (state, memory, key) = (record.snapshot, record.memory.clone(), record.id.clone());
    let deleted = shared
        .transact(move |tx| {
            tx.delete_snapshot(state);
            super::memory::delete(tx, memory.as_ref());
            tx.delete_record(SnapshotRecord::KIND, &key);
            Ok(())
        })
        .await;
    if let Err(error) = deleted {
        shared.registry.insert_snapshot(record);
        return Err(error);
    }
    Ok(record)
}

/// Something was made of it: one that expires so long after its last use does so from now. To move that by little is not
/// worth a sync.
pub(super) async fn used(shared: &Arc<Shared>, id: &str) {
    let _turn = shared.snapshot_ends.lock().await;
    let Ok(mut record) = shared.registry.snapshot(id, None) else { return };
    let (Some(ttl), Some(before)) = (record.ttl_ms, record.expires_at) else { return };
    let lasts = jiff::SignedDuration::from_millis(ttl as i64);
    let Ok(after) = Timestamp::now().checked_add(lasts) else { return };
    if after.duration_since(before) <= lasts / 64 {
        return;
    }
    record.expires_at = Some(after);
    let saved = record.clone();
    match shared.transact(move |tx| put_all(tx, &[saved])).await {
        Ok(()) => shared.registry.insert_snapshot(record),
        Err(error) => tracing::warn!(snapshot = %id, %error, "a snapshot that was used expires as if it was not"),
    }
}

/// Deletes the oldest snapshots of a sandbox beyond `keep`.
async fn keep_last(shared: &Arc<Shared>, sandbox_id: &str, keep: u32) {
    let all = sorted(shared, Some(sandbox_id));
    // What a name keeps is not counted.
    for old in all.iter().rev().filter(|s| !shared.registry.is_named(&s.id)).skip(keep as usize) {
        if let Err(error) = delete(shared, &old.id).await {
            tracing::warn!(snapshot = %old.id, %error, "an old snapshot stays");
        }
    }
}

/// Deletes snapshots whose time is over, for as long as the engine runs. Their time is the calendar's: it goes on while no
/// daemon runs.
pub(super) async fn delete_expired(shared: Arc<Shared>) {
    loop {
        let now = Timestamp::now();
        let over = |s: &SnapshotRecord| s.expires_at.is_some_and(|at| at <= now) && !shared.registry.is_named(&s.id);
        for record in shared.registry.snapshots().into_iter().filter(over) {
            match delete(&shared, &record.id).await {
                Ok(_) => tracing::info!(snapshot = %record.id, "expired"),
                Err(error) => tracing::warn!(snapshot = %record.id, %error, "an expired snapshot stays for now"),
            }
        }
        tokio::time::sleep(EXPIRY_PERIOD).await;
    }
}

fn all_nodes(shared: &Shared, usage: &HashMap<String, Usage>) -> Vec<LineageNode> {
    let sizes = |source: Source| {
        let of = usage.get(&source.to_string());
        (of.map(|u| u.exclusive_bytes), of.map(|u| u.unsealed_bytes))
    };
    let mut nodes = Vec::new();
    for template in shared.registry.templates() {
        let (exclusive_bytes, unsealed_bytes) = sizes(Source::Snapshot(template.snapshot));
        nodes.push(LineageNode {
            kind: NodeKind::Template,
            id: template.name,
            name: None,
            parent: None,
            state: "ready".to_owned(),
            created_at: Some(template.created_at),
            exclusive_bytes,
            unsealed_bytes,
        });
    }
    for sandbox in shared.registry.sandboxes() {
        let r = sandbox.record();
        let (exclusive_bytes, unsealed_bytes) = sizes(Source::Disk(r.disk));
        nodes.push(LineageNode {
            kind: NodeKind::Sandbox,
            id: r.id,
            name: Some(r.name),
            parent: r.from_snapshot.or(r.forked_from).or(r.template),
            state: r.state.name().to_owned(),
            created_at: Some(r.created_at),
            exclusive_bytes,
            unsealed_bytes,
        });
    }
    for r in shared.registry.snapshots() {
        let (exclusive_bytes, unsealed_bytes) = sizes(Source::Snapshot(r.snapshot));
        nodes.push(LineageNode {
            kind: NodeKind::Snapshot,
            id: r.id,
            name: r.comment,
            parent: Some(r.sandbox_id),
            state: "ready".to_owned(),
            created_at: Some(r.created_at),
            exclusive_bytes,
            unsealed_bytes,
        });
    }
    nodes.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
    drop_childless_dead(&mut nodes);
    nodes
}

/// Destroyed sandboxes are of interest only for what came from them.
fn drop_childless_dead(nodes: &mut Vec<LineageNode>) {
    let dead = State::Destroyed.name();
    // A child is made after its parent: from the youngest on, each is decided before its parent is.
    let mut parents: std::collections::HashSet<String> = std::collections::HashSet::new();
    let mut kept: Vec<LineageNode> = Vec::with_capacity(nodes.len());
    for node in nodes.drain(..).rev() {
        if node.state != dead || parents.contains(&node.id) {
            parents.extend(node.parent.clone());
            kept.push(node);
        }
    }
    kept.reverse();
    *nodes = kept;
}

/// Those that `of` came from, itself, and those that came from it.
fn related(nodes: Vec<LineageNode>, of: &str) -> Vec<LineageNode> {
    let parents: HashMap<&str, &str> =
        nodes.iter().filter_map(|n| Some((n.id.as_str(), n.parent.as_deref()?))).collect();
    let above = |from: &str| {
        let mut chain: Vec<String> = vec![from.to_owned()];
        // Bounded, should records ever point in a circle.
        while let Some(next) = chain.last().and_then(|id| parents.get(id.as_str()))
            && chain.len() <= nodes.len()
        {
            chain.push((*next).to_owned());
        }
        chain
    };
    let ancestors = above(of);
    let keep: std::collections::HashSet<String> = nodes
        .iter()
        .filter(|n| ancestors.contains(&n.id) || above(&n.id).iter().any(|id| id == of))
        .map(|n| n.id.clone())
        .collect();
    nodes.into_iter().filter(|n| keep.contains(&n.id)).collect()
}

/// A parent that is deleted is shown as such, so that its children stand together.
fn add_missing_parents(nodes: &mut Vec<LineageNode>) {
    let known: std::collections::HashSet<String> = nodes.iter().map(|n| n.id.clone()).collect();
    let missing: std::collections::BTreeSet<String> =
        nodes.iter().filter_map(|n| n.parent.clone()).filter(|p| !known.contains(p)).collect();
    let gone = missing.into_iter().map(|id| LineageNode {
        kind: match id.split_once('-').map(|(prefix, _)| prefix) {
            Some("snap") => NodeKind::Snapshot,
            Some("sb") => NodeKind::Sandbox,
            _ => NodeKind::Template,
        },
        id,
        name: None,
        parent: None,
        state: "deleted".to_owned(),
        created_at: None,
        exclusive_bytes: None,
        unsealed_bytes: None,
    });
    nodes.splice(0..0, gone);
}
