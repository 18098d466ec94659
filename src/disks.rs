//! The store's disks without sandboxes: found by id or name, made, forked, taken in and out, and attached.
//!
//! [`Disks`] serves the daemon's API beside the engine, and the same API within the command line where no daemon runs.
//! What belongs to a sandbox, a snapshot of one or a template is shown and can be read and forked; only the engine
//! changes or deletes it. Disks and states that an operation needs for its own time carry a record of the kind
//! `temporary`; those that a crash leaves go when the store is opened next.
//!
//! All calls block.

mod archive;
mod attach;
mod files;
pub mod frames;
mod publish;
mod report;
mod transfer;

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use storage::{DiskId, SnapshotId, Source, Store, Usage};

use crate::config::StateDir;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::lifecycle::State;
use crate::engine::private_dir;
use crate::engine::records::{
    BootedRecord, Record, SandboxRecord, SnapshotRecord, StepRecord, TemplateRecord, VolumeRecord,
    VolumeSnapshotRecord, check_name, is_own_name, load_all,
};
use crate::frontend::Traffic;
pub use archive::ArchiveExport;
pub use attach::{Attachment, Frontend};
pub use files::{Content, FileView, Listing, Still};
pub use publish::PublishRequest;
pub use report::{Family, Member, Report};
pub use transfer::{Export, Import};

/// Most disks that one fork makes.
const MAX_FORKS: u32 = 10_000;
/// Kind of the records of what goes with the operation that made it; the key is the id in the store.
const TEMPORARY: &str = "temporary";
/// A disk that is being filled.
const IMPORTING: &[u8] = b"import";
/// What an export reads from.
const EXPORTING: &[u8] = b"export";

/// A disk or a state of one.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DiskView {
    /// `disk-…` or `snap-…`.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Which of the two.
    pub kind: DiskKind,
    /// `ready`, or `importing`.
    pub state: String,
    /// Size.
    pub size_bytes: u64,
    /// Blocks that are not zero.
    pub logical_bytes: u64,
    /// Stored bytes of all it refers to, shared or not. Only of one that was asked for alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub referenced_bytes: Option<u64>,
    /// Stored bytes that nothing else refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclusive_bytes: Option<u64>,
    /// Bytes not sealed yet, which the other two do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsealed_bytes: Option<u64>,
    /// What it was forked or taken from; that may be gone.
    pub parent: Option<String>,
    /// Among whose blocks those that are written to it are looked for, besides what is shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dedup_domain: Option<String>,
    /// Whose it is, if not the user's own.
    pub owner: Option<Owner>,
    /// How it is attached, if it is.
    pub attachment: Option<Attachment>,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: jiff::Timestamp,
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskKind {
    /// Can be written.
    Disk,
    /// A state that never changes.
    Snapshot,
}

/// Whose a disk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Owner {
    /// What.
    pub kind: OwnerKind,
    /// Its id.
    pub id: String,
    /// Its name, if it has one.
    pub name: Option<String>,
}

/// What a disk can belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OwnerKind {
    /// A sandbox that is not destroyed.
    Sandbox,
    /// A snapshot of a sandbox.
    Snapshot,
    /// A template.
    Template,
    /// A volume.
    Volume,
    /// A snapshot of a volume.
    VolumeSnapshot,
}

impl Owner {
    /// `sandbox web`
    pub fn describe(&self) -> String {
        let kind = match self.kind {
            OwnerKind::Sandbox => "sandbox",
            OwnerKind::Snapshot => "snapshot",
            OwnerKind::Template => "template",
            OwnerKind::Volume => "volume",
            OwnerKind::VolumeSnapshot => "volume snapshot",
        };
        format!("{kind} {}", self.name.as_deref().unwrap_or(&self.id))
    }

    fn how_to_delete(&self) -> String {
        match self.kind {
            OwnerKind::Sandbox => format!("miosa sandbox destroy {}", self.id),
            OwnerKind::Snapshot => format!("miosa sandbox snapshots delete {}", self.id),
            OwnerKind::Template => format!("miosa template delete {}", self.id),
            OwnerKind::Volume => format!("miosa volume delete {}", self.id),
            OwnerKind::VolumeSnapshot => format!("miosa volume snapshots delete {}", self.id),
        }
    }
}

/// What differs between two states.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Difference {
    /// The ids compared.
    pub a: String,
    /// See `a`.
    pub b: String,
    /// Bytes in blocks that differ.
    pub changed_bytes: u64,
    /// Where, in order.
    pub ranges: Vec<Range>,
}

/// A run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Range {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
}

/// The disks of an open store.
pub struct Disks {
    store: Store,
    /// For sockets, the mount, and files without names.
    dir: PathBuf,
    backups: PathBuf,
    /// An engine works on the same store.
    with_engine: bool,
    attached: Mutex<BTreeMap<Source, attach::Shown>>,
    mount: Mutex<Option<Arc<crate::frontend::FuseMount>>>,
    traffic: Traffic,
    /// Held from looking to changing, so that nobody changes what was looked at.
    changing: Mutex<()>,
}

impl Disks {
    /// The disks of `store`, which is that of `state`. Removes what operations left that did not end.
    pub fn open(store: Store, state: &StateDir, with_engine: bool) -> Result<Arc<Self>> {
        let left = store.records(TEMPORARY);
        if !left.is_empty() {
            let mut tx = store.begin();
            for (key, _) in &left {
                let source = parse_id(key).filter(|source| store.open_source(*source).is_ok());
                tracing::info!(%key, "left by an operation that did not end");
                match source {
                    Some(Source::Disk(id)) => tx.delete_disk(id),
                    Some(Source::Snapshot(id)) => tx.delete_snapshot(id),
                    None => {}
                }
                tx.delete_record(TEMPORARY, key);
            }
            if let Err(error) = tx.commit_durable() {
                // On a full file system, say. They are not shown as ready, and what is there can be used.
                tracing::warn!(%error, "what is left of operations that did not end stays until the next time");
            }
        }
        Ok(Arc::new(Self {
            store,
            dir: state.attached(),
            backups: state.backups(),
            with_engine,
            attached: Mutex::default(),
            mount: Mutex::default(),
            traffic: Traffic::default(),
            changing: Mutex::default(),
        }))
    }

    /// Copies the whole store, as of one moment, into a state directory of its own below [`StateDir::backups`]: where that
    /// is, and what it is made of. Blocks; sandboxes go on.
    ///
    /// # Errors
    /// `invalid_input` for a name that cannot be one or is taken; `store_full`, `internal_error`: then nothing of it is left.
    pub fn back_up(&self, name: &str) -> Result<(PathBuf, storage::BackupReport)> {
        check_name("backup", name)?;
        let place = self.backups.join(name);
        // Of two at once with one name, one makes it.
        let made = private_dir(&self.backups).and_then(|()| std::fs::DirBuilder::new().mode(0o700).create(&place));
        made.map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => Error::invalid(format!("there is a backup {name:?} already"))
                .hint(format!("choose another name, or remove {}", place.display())),
            _ => Error::internal(format!("could not make {}: {e}", place.display())),
        })?;
        let copied = self.store.backup(&place.join("store")).map_err(Error::from);
        let report = copied.inspect_err(|_| drop(std::fs::remove_dir(&place)))?;
        Ok((place, report))
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What passes through front ends: those of attached disks, and whoever else counts here.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// All disks, by id.
    pub fn list(&self) -> Result<Vec<DiskView>> {
        let facts = self.facts()?;
        self.views(&facts, facts.infos.keys().copied().filter(|s| matches!(s, Source::Disk(_))))
    }

    /// The snapshots of a disk, by id.
    pub fn snapshots(&self, key: &str) -> Result<Vec<DiskView>> {
        let disk = self.find_disk(key)?;
        let facts = self.facts()?;
        let of = Some(disk.to_string());
        let states = facts.infos.iter().filter(|(s, info)| matches!(s, Source::Snapshot(_)) && info.parent == of);
        self.views(&facts, states.map(|(s, _)| *s))
    }

    fn views(&self, facts: &Facts, sources: impl Iterator<Item = Source>) -> Result<Vec<DiskView>> {
        let views = sources.map(|source| self.view(source, facts)).filter(|view| {
            // Deleted since the list was made.
            !matches!(view, Err(e) if e.kind() == Kind::DiskNotFound)
        });
        views.collect()
    }

    /// One, with what it costs.
    pub fn show(&self, key: &str) -> Result<DiskView> {
        let source = self.find(key)?;
        let mut view = self.view(source, &self.facts()?)?;
        let Usage { referenced_bytes, exclusive_bytes, unsealed_bytes, .. } = self.store.usage_of(source)?;
        view.referenced_bytes = Some(referenced_bytes);
        view.exclusive_bytes = Some(exclusive_bytes);
        view.unsealed_bytes = Some(unsealed_bytes);
        Ok(view)
    }

    /// A new disk of zeroes, in a deduplication domain or none.
    pub fn create(&self, name: &str, size_bytes: u64, domain: Option<&str>) -> Result<DiskView> {
        let _changing = self.changing.lock();
        self.check_new(name, size_bytes, domain)?;
        let mut tx = self.store.begin();
        let id = create(&mut tx, name, size_bytes, domain);
        tx.commit_durable()?;
        self.view(Source::Disk(id), &self.facts()?)
    }

    /// Would a disk of this name and size be made, in this domain or none?
    pub fn check_new(&self, name: &str, size_bytes: u64, domain: Option<&str>) -> Result<()> {
        check_disk_name(name)?;
        check_size(size_bytes)?;
        domain.map_or(Ok(()), storage::check_domain)?;
        match self.store.disk_by_name(name) {
            Some(_) => Err(name_taken(name)),
            None => Ok(()),
        }
    }

    /// Keeps a disk's present state under a name.
    pub fn snapshot(&self, key: &str, name: &str) -> Result<DiskView> {
        check_disk_name(name)?;
        let _changing = self.changing.lock();
        let disk = self.find_disk(key)?;
        self.check_ready(Source::Disk(disk))?;
        if self.store.snapshots().iter().any(|s| s.disk == Some(disk) && s.name == name) {
            return Err(Error::new(Kind::NameTaken, format!("{disk} has a snapshot named {name:?} already"))
                .hint(format!("choose another --name; see: miosa disk snapshots {disk}")));
        }
        let mut tx = self.store.begin();
        let id = tx.snapshot(disk, name);
        tx.commit_durable()?;
        self.view(Source::Snapshot(id), &self.facts()?)
    }

    /// New disks on what another holds now: one of this name, or with a count `NAME-1`, `NAME-2` and so on. All or none.
    pub fn fork(&self, key: &str, name: &str, count: Option<u32>) -> Result<Vec<DiskView>> {
        let names: Vec<String> = match count {
            None => vec![name.to_owned()],
            Some(count) if (1..=MAX_FORKS).contains(&count) => (1..=count).map(|n| format!("{name}-{n}")).collect(),
            Some(count) => {
                return Err(Error::new(
                    Kind::InvalidInput,
                    format!("a fork makes 1 to {MAX_FORKS} disks, not {count}"),
                ));
            }
        };
        let _changing = self.changing.lock();
        let source = self.find(key)?;
        self.check_ready(source)?;
        for name in &names {
            check_disk_name(name)?;
            if self.store.disk_by_name(name).is_some() {
                return Err(name_taken(name));
            }
        }
        let mut tx = self.store.begin();
        let ids: Vec<DiskId> = names.iter().map(|name| tx.fork(source, name)).collect();
        tx.commit_durable()?;
        let facts = self.facts()?;
        ids.into_iter().map(|id| self.view(Source::Disk(id), &facts)).collect()
    }

    /// Deletes a disk or snapshot; what was forked or taken from it stays.
    pub fn delete(&self, key: &str) -> Result<DiskView> {
        let _changing = self.changing.lock();
        let source = self.find(key)?;
        self.check_ready(source)?;
        let view = self.view(source, &self.facts()?)?;
        if let Some(owner) = &view.owner {
            let what = format!("{} belongs to {}", view.id, owner.describe());
            return Err(Error::new(Kind::DiskInUse, what).hint(format!("delete that: {}", owner.how_to_delete())));
        }
        if view.attachment.is_some() {
            return Err(Error::new(Kind::DiskInUse, format!("{} {:?} is attached", view.id, view.name))
                .hint(format!("detach it first: miosa disk detach {}", view.id)));
        }
        let mut tx = self.store.begin();
        match source {
            Source::Disk(id) => tx.delete_disk(id),
            Source::Snapshot(id) => tx.delete_snapshot(id),
        }
        tx.commit_durable()?;
        Ok(view)
    }

    /// Where two of them read differently.
    pub fn diff(&self, a: &str, b: &str) -> Result<Difference> {
        let (a, b) = (self.find(a)?, self.find(b)?);
        let ranges: Vec<_> =
            self.store.diff(a, b)?.into_iter().map(|r| Range { offset: r.offset, bytes: r.bytes }).collect();
        let changed_bytes = ranges.iter().map(|r| r.bytes).sum();
        Ok(Difference { a: a.to_string(), b: b.to_string(), changed_bytes, ranges })
    }

    /// What every disk and snapshot costs.
    pub fn usage(&self) -> Result<Vec<DiskView>> {
        let facts = self.facts()?;
        let mut views = Vec::new();
        for usage in self.store.usage()? {
            let Some(source) = parse_id(&usage.id) else { continue };
            // What has been deleted meanwhile is left out.
            let Ok(mut view) = self.view(source, &facts) else { continue };
            view.logical_bytes = usage.logical_bytes;
            view.referenced_bytes = Some(usage.referenced_bytes);
            view.exclusive_bytes = Some(usage.exclusive_bytes);
            view.unsealed_bytes = Some(usage.unsealed_bytes);
            views.push(view);
        }
        Ok(views)
    }

    // ---- finding

    /// Everything that is shown.
    fn infos(&self) -> BTreeMap<Source, Info> {
        let disks = self.store.disks().into_iter().map(|d| {
            let created = d.created_unix_ms;
            (Source::Disk(d.id), Info { name: d.name, size_bytes: d.size_bytes, parent: d.parent, created })
        });
        let states = self.store.snapshots().into_iter().map(|s| {
            let (parent, created) = (s.disk.map(|d| d.to_string()), s.created_unix_ms);
            (Source::Snapshot(s.id), Info { name: s.name, size_bytes: s.size_bytes, parent, created })
        });
        let mut infos: BTreeMap<_, _> = disks.chain(states).collect();
        for (key, what) in self.store.records(TEMPORARY) {
            if &what[..] == EXPORTING
                && let Some(source) = parse_id(&key)
            {
                infos.remove(&source);
            }
        }
        infos
    }

    fn facts(&self) -> Result<Facts> {
        Ok(Facts { infos: self.infos(), owners: self.owners()? })
    }

    /// A disk or snapshot, by id or by a name that only one has.
    fn find(&self, key: &str) -> Result<Source> {
        if let Some(source) = parse_id(key)
            && !self.is_hidden(source)
            && self.store.open_source(source).is_ok()
        {
            return Ok(source);
        }
        let named: Vec<_> = self.infos().into_iter().filter(|(_, i)| i.name == key).map(|(source, _)| source).collect();
        match named.as_slice() {
            [one] => Ok(*one),
            [] => Err(Error::new(Kind::DiskNotFound, format!("there is no disk or snapshot {key:?}"))
                .hint("list them: miosa disk list, miosa disk snapshots DISK")),
            several => {
                let ids: Vec<_> = several.iter().map(Source::to_string).collect();
                Err(Error::new(Kind::DiskAmbiguous, format!("{key:?} is the name of {}", ids.join(", ")))
                    .hint("use the id"))
            }
        }
    }

    fn find_disk(&self, key: &str) -> Result<DiskId> {
        if parse_id(key).is_none()
            && let Some(disk) = self.store.disk_by_name(key).filter(|d| !self.is_hidden(Source::Disk(d.id)))
        {
            return Ok(disk.id);
        }
        match self.find(key)? {
            Source::Disk(id) => Ok(id),
            Source::Snapshot(id) => Err(Error::new(Kind::InvalidInput, format!("{id} is a snapshot, not a disk"))
                .hint(format!("fork it first: miosa disk fork {id} --name NAME"))),
        }
    }

    fn view(&self, source: Source, facts: &Facts) -> Result<DiskView> {
        let gone = || Error::new(Kind::DiskNotFound, format!("{source} has been deleted"));
        let info = facts.infos.get(&source).ok_or_else(gone)?;
        let importing = self.store.record(TEMPORARY, &source.to_string()).is_some();
        Ok(DiskView {
            id: source.to_string(),
            name: info.name.clone(),
            kind: match source {
                Source::Disk(_) => DiskKind::Disk,
                Source::Snapshot(_) => DiskKind::Snapshot,
            },
            state: if importing { "importing" } else { "ready" }.to_owned(),
            size_bytes: info.size_bytes,
            logical_bytes: self.store.logical_bytes(source)?,
            referenced_bytes: None,
            exclusive_bytes: None,
            unsealed_bytes: None,
            parent: info.parent.clone(),
            dedup_domain: self.store.domain(source)?,
            owner: facts.owners.get(&source).cloned(),
            attachment: self.attachment(source),
            created_at: jiff::Timestamp::from_millisecond(info.created as i64).unwrap_or_default(),
        })
    }

    /// Not for users: an export's own.
    fn is_hidden(&self, source: Source) -> bool {
        self.store.record(TEMPORARY, &source.to_string()).is_some_and(|what| &what[..] == EXPORTING)
    }

    fn check_ready(&self, source: Source) -> Result<()> {
        if self.store.record(TEMPORARY, &source.to_string()).is_some() {
            return Err(Error::new(Kind::DiskInUse, format!("{source} is being imported"))
                .hint("wait until the import has ended: miosa disk list"));
        }
        // Made by the engine, and not yet, or no more, anybody's.
        if self.with_engine {
            let facts = self.facts()?;
            if facts.infos.get(&source).is_some_and(|i| is_own_name(&i.name)) && !facts.owners.contains_key(&source) {
                return Err(Error::new(Kind::DiskInUse, format!("{source} is in use by the daemon"))
                    .hint("wait until it is done: miosa template list"));
            }
        }
        Ok(())
    }

    /// What belongs to sandboxes, volumes, their snapshots and templates.
    fn owners(&self) -> Result<BTreeMap<Source, Owner>> {
        let sandboxes = load_all::<SandboxRecord>(&self.store)?.into_iter().filter(|r| r.state != State::Destroyed);
        // What is kept of a machine's memory goes with whose it is.
        let sandboxes = sandboxes.flat_map(|r| {
            let owner = Owner { kind: OwnerKind::Sandbox, id: r.id, name: Some(r.name) };
            let memory = r.memory.map(|m| (Source::Disk(m.disk), owner.clone()));
            memory.into_iter().chain([(Source::Disk(r.disk), owner)])
        });
        let snapshots = load_all::<SnapshotRecord>(&self.store)?.into_iter().flat_map(|r| {
            let owner = Owner { kind: OwnerKind::Snapshot, id: r.id, name: r.comment };
            let memory = r.memory.map(|m| (Source::Disk(m.disk), owner.clone()));
            memory.into_iter().chain([(Source::Snapshot(r.snapshot), owner)])
        });
        let templates = load_all::<TemplateRecord>(&self.store)?;
        let by_state: BTreeMap<_, _> = templates.iter().map(|r| (r.snapshot, r.name.clone())).collect();
        let templates = templates.into_iter().map(|r| {
            let owner = Owner { kind: OwnerKind::Template, id: r.key().to_owned(), name: None };
            (Source::Snapshot(r.snapshot), owner)
        });
        // What a template's build keeps goes with the template.
        let steps = load_all::<StepRecord>(&self.store)?.into_iter().map(|r| {
            let owner = Owner { kind: OwnerKind::Template, id: r.template, name: None };
            (Source::Snapshot(r.snapshot), owner)
        });
        let volumes = load_all::<VolumeRecord>(&self.store)?
            .into_iter()
            .map(|r| (Source::Disk(r.disk), Owner { kind: OwnerKind::Volume, id: r.id, name: Some(r.name) }));
        let volume_snapshots = load_all::<VolumeSnapshotRecord>(&self.store)?.into_iter().map(|r| {
            let owner = Owner { kind: OwnerKind::VolumeSnapshot, id: r.id, name: r.name };
            (Source::Snapshot(r.snapshot), owner)
        });
        let booted = load_all::<BootedRecord>(&self.store)?.into_iter().filter_map(|r| {
            let of = by_state.get(&r.template)?;
            let owner = Owner { kind: OwnerKind::Template, id: of.clone(), name: None };
            Some([(Source::Snapshot(r.disk), owner.clone()), (Source::Disk(r.memory.disk), owner)])
        });
        let templates = templates.chain(steps).chain(booted.flatten());
        Ok(sandboxes.chain(snapshots).chain(templates).chain(volumes).chain(volume_snapshots).collect())
    }
}

/// What the store knows of a disk or snapshot.
struct Info {
    name: String,
    size_bytes: u64,
    parent: Option<String>,
    created: u64,
}

/// What is shown, and whose it is, at one time.
struct Facts {
    infos: BTreeMap<Source, Info>,
    owners: BTreeMap<Source, Owner>,
}

/// The source of an id.
fn parse_id(id: &str) -> Option<Source> {
    let disk = id.parse::<DiskId>().map(Source::Disk);
    disk.or_else(|_| id.parse::<SnapshotId>().map(Source::Snapshot)).ok()
}

fn name_taken(name: &str) -> Error {
    Error::new(Kind::NameTaken, format!("a disk named {name:?} exists already"))
        .hint(format!("choose another --name, or delete it: miosa disk delete {name:?}"))
}

/// A disk of zeroes, in a deduplication domain or none.
fn create(tx: &mut storage::Transaction<'_>, name: &str, size_bytes: u64, domain: Option<&str>) -> DiskId {
    let id = tx.create_disk(name, size_bytes);
    if domain.is_some() {
        tx.set_domain(id, domain);
    }
    id
}

/// Names that cannot be taken for ids, nor for the engine's own disks.
fn check_disk_name(name: &str) -> Result<()> {
    check_name("disk", name)?;
    if parse_id(name).is_some() || is_own_name(name) {
        return Err(
            Error::new(Kind::InvalidInput, format!("{name:?} would be mistaken for an id")).hint("choose another name")
        );
    }
    Ok(())
}

fn check_size(size_bytes: u64) -> Result<()> {
    const MOST: u64 = 64 << 40;
    if size_bytes == 0 || size_bytes > MOST {
        return Err(Error::new(Kind::InvalidInput, format!("a disk cannot have {size_bytes} bytes"))
            .hint("4096 bytes to 64 TiB"));
    }
    if !size_bytes.is_multiple_of(4_096) {
        let message = format!("a disk's size is a multiple of 4096 bytes, and {size_bytes} is not");
        return Err(Error::new(Kind::InvalidInput, message)
            .hint(format!("the next size is {} bytes", size_bytes.next_multiple_of(4_096))));
    }
    Ok(())
}
