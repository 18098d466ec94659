//! What everything that is kept costs, who shares it, and what deleting it would give back.
//!
//! A *family* is what comes from one disk: a template, its sandboxes, their snapshots and forks. What members of a family
//! share is counted once in the family's figures; what families share, once in the store's.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use storage::Source;

use super::{DiskKind, DiskView, Disks, OwnerKind, parse_id};
use crate::engine::error::Result;
use crate::engine::records::{SandboxRecord, load_all};

/// The figures of a store. All are bytes.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Report {
    /// All that the store's directory occupies on the host.
    pub stored_bytes: u64,
    /// What disks and snapshots hold, each counted in full.
    pub logical_bytes: u64,
    /// Stored bytes that anything refers to, each counted once: exclusive and shared ones.
    pub referenced_bytes: u64,
    /// Of these, those that exactly one disk or snapshot refers to: the sum of the members' exclusive bytes.
    pub exclusive_bytes: u64,
    /// Of these, those that two or more refer to. Deleting one of them gives none of these back.
    pub shared_bytes: u64,
    /// Stored bytes that nothing refers to, and the packs' tables of contents; `store gc` gives back what it can of it.
    pub unreferenced_bytes: u64,
    /// What is not sealed yet.
    pub log_bytes: u64,
    /// The catalogue and the index.
    pub index_bytes: u64,
    /// The dearest first.
    pub families: Vec<Family>,
}

/// What comes from one disk.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Family {
    /// Of its template, or of its oldest member.
    pub name: String,
    /// What its members hold, each counted in full.
    pub logical_bytes: u64,
    /// Stored bytes that any member refers to, each counted once.
    pub referenced_bytes: u64,
    /// Of these, what deleting the whole family would give back.
    pub exclusive_bytes: u64,
    /// Those that would give back most first.
    pub members: Vec<Member>,
}

/// A disk or snapshot.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Member {
    /// In the store.
    pub id: String,
    /// What people know it by.
    pub name: String,
    /// `sandbox`, `snapshot`, `template`, `volume`, `volume snapshot` or `disk`.
    pub what: String,
    /// Of a sandbox: `running`, `paused` and so on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Blocks that are not zero.
    pub logical_bytes: u64,
    /// Stored bytes of all it refers to.
    pub referenced_bytes: u64,
    /// Of these, what deleting it alone would give back.
    pub exclusive_bytes: u64,
    /// Of these, what others refer to as well.
    pub shared_bytes: u64,
    /// What it has in the log, not counted in the others.
    pub unsealed_bytes: u64,
}

impl Disks {
    /// What everything costs. Walks all maps several times; sealing waits meanwhile.
    pub fn report(&self) -> Result<Report> {
        let (stats, views) = (self.store.stats()?, self.usage()?);
        let families = self.families(&views)?;
        let mut groups: Vec<Vec<Source>> =
            families.iter().map(|members| members.iter().map(|(s, _)| *s).collect()).collect();
        let costs = self.store.usage_of_groups(&groups)?;
        let everything = vec![groups.drain(..).flatten().collect()];
        let total = self.store.usage_of_groups(&everything)?.first().copied().unwrap_or_default();
        let states: BTreeMap<String, String> = load_all::<SandboxRecord>(&self.store)?
            .into_iter()
            .map(|r| (r.disk.to_string(), r.state.name().to_owned()))
            .collect();
        let mut report = Report {
            stored_bytes: stats.stored_bytes,
            referenced_bytes: total.referenced_bytes,
            unreferenced_bytes: (stats.pack_bytes + stats.map_bytes).saturating_sub(total.referenced_bytes),
            log_bytes: stats.log_bytes,
            index_bytes: stats.index_bytes,
            ..Report::default()
        };
        for (members, cost) in families.iter().zip(costs) {
            let mut all: Vec<_> = members.iter().map(|(_, view)| member(view, &states)).collect();
            all.sort_by_key(|m| std::cmp::Reverse((m.exclusive_bytes, m.referenced_bytes)));
            let name = members.iter().find(|(_, v)| v.owner.as_ref().is_some_and(|o| o.kind == OwnerKind::Template));
            let name = name.or_else(|| members.iter().min_by_key(|(_, v)| v.created_at));
            report.families.push(Family {
                name: name.map(|(_, view)| display_name(view)).unwrap_or_default(),
                logical_bytes: all.iter().map(|m| m.logical_bytes).sum(),
                referenced_bytes: cost.referenced_bytes,
                exclusive_bytes: cost.exclusive_bytes,
                members: all,
            });
        }
        report.families.sort_by_key(|f| std::cmp::Reverse(f.referenced_bytes));
        report.logical_bytes = report.families.iter().map(|f| f.logical_bytes).sum();
        report.exclusive_bytes = report.families.iter().flat_map(|f| &f.members).map(|m| m.exclusive_bytes).sum();
        report.shared_bytes = report.referenced_bytes.saturating_sub(report.exclusive_bytes);
        Ok(report)
    }

    /// The disks and snapshots by the first disk in their line, which may be gone.
    fn families<'a>(&self, views: &'a [DiskView]) -> Result<Vec<Vec<(Source, &'a DiskView)>>> {
        let parents: BTreeMap<&str, &str> =
            views.iter().filter_map(|v| Some((v.id.as_str(), v.parent.as_deref()?))).collect();
        let mut families: BTreeMap<&str, Vec<(Source, &DiskView)>> = BTreeMap::new();
        for view in views {
            let mut root = view.id.as_str();
            // A parent is older than its child, so this ends.
            while let Some(parent) = parents.get(root) {
                root = parent;
            }
            if let Some(source) = parse_id(&view.id) {
                families.entry(root).or_default().push((source, view));
            }
        }
        Ok(families.into_values().collect())
    }
}

fn display_name(view: &DiskView) -> String {
    view.owner.as_ref().map_or_else(|| view.name.clone(), super::Owner::describe)
}

fn member(view: &DiskView, states: &BTreeMap<String, String>) -> Member {
    let what = match (&view.owner, view.kind) {
        (Some(owner), _) => match owner.kind {
            OwnerKind::Sandbox => "sandbox",
            OwnerKind::Snapshot => "snapshot",
            OwnerKind::Template => "template",
            OwnerKind::Volume => "volume",
            OwnerKind::VolumeSnapshot => "volume snapshot",
        },
        (None, DiskKind::Disk) => "disk",
        (None, DiskKind::Snapshot) => "snapshot",
    };
    let (referenced, exclusive) = (view.referenced_bytes.unwrap_or(0), view.exclusive_bytes.unwrap_or(0));
    Member {
        id: view.id.clone(),
        name: view.owner.as_ref().map_or(&view.name, |o| o.name.as_ref().unwrap_or(&o.id)).clone(),
        what: what.to_owned(),
        state: states.get(&view.id).filter(|_| what == "sandbox").cloned(),
        logical_bytes: view.logical_bytes,
        referenced_bytes: referenced,
        exclusive_bytes: exclusive,
        shared_bytes: referenced.saturating_sub(exclusive),
        unsealed_bytes: view.unsealed_bytes.unwrap_or(0),
    }
}
