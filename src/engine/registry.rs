//! Who exists, by id and by name. In memory; the store is the durable truth.
//!
//! One short lock, never held across a wait. A name is reserved before the transaction that makes it durable and given
//! up if that fails, so two creates of one name cannot both succeed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::error::{Error, Kind, Result};
use super::lifecycle::State;
use super::records::{NamedSnapshotRecord, SnapshotRecord, TemplateRecord, check_name, slug};
use super::sandbox::Sandbox;

/// The registry.
#[derive(Default)]
pub(crate) struct Registry {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    sandboxes: BTreeMap<String, Arc<Sandbox>>,
    /// Names in use, and names reserved by an operation in progress.
    names: BTreeMap<String, Holder>,
    snapshots: BTreeMap<String, SnapshotRecord>,
    templates: BTreeMap<String, TemplateRecord>,
    /// Templates being built.
    building: BTreeSet<String>,
    /// Names of snapshots; none of one whose snapshot is being taken.
    named: BTreeMap<String, Option<NamedSnapshotRecord>>,
}

impl Inner {
    fn names_of<'a>(&'a self, snapshot: &'a str) -> impl Iterator<Item = &'a NamedSnapshotRecord> {
        self.named.values().flatten().filter(move |record| record.snapshot_id == snapshot)
    }
}

enum Holder {
    Reserved,
    Sandbox(String),
}

/// Names held for an operation in progress; given up when dropped unless a sandbox took them.
pub(crate) struct Reservation {
    inner: Arc<Mutex<Inner>>,
    names: Vec<String>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut inner = self.inner.lock();
        for name in &self.names {
            if matches!(inner.names.get(name), Some(Holder::Reserved)) {
                inner.names.remove(name);
            }
        }
    }
}

/// The one build of a template of this name; ends when dropped.
pub(crate) struct Building {
    inner: Arc<Mutex<Inner>>,
    name: String,
}

impl Drop for Building {
    fn drop(&mut self) {
        self.inner.lock().building.remove(&self.name);
    }
}

/// A snapshot's name that is about to be given; free again when dropped, unless it was.
pub(crate) struct Naming {
    inner: Arc<Mutex<Inner>>,
    name: String,
}

impl Naming {
    /// It is durable.
    pub(crate) fn give(&self, record: NamedSnapshotRecord) {
        self.inner.lock().named.insert(self.name.clone(), Some(record));
    }
}

impl Drop for Naming {
    fn drop(&mut self) {
        let mut inner = self.inner.lock();
        if matches!(inner.named.get(&self.name), Some(None)) {
            inner.named.remove(&self.name);
        }
    }
}

impl Registry {
    /// Reserves all of these names or none.
    pub(crate) fn reserve_names(&self, names: &[String]) -> Result<Reservation> {
        let mut inner = self.inner.lock();
        let mut seen = BTreeSet::new();
        for name in names {
            check_name("sandbox", name)?;
            if !seen.insert(name) || inner.names.contains_key(name) || inner.sandboxes.contains_key(name) {
                return Err(Error::new(Kind::NameTaken, format!("a sandbox named {name:?} exists already"))
                    .hint(format!("choose another --name, or destroy it: miosa sandbox destroy {name:?}")));
            }
        }
        for name in names {
            inner.names.insert(name.clone(), Holder::Reserved);
        }
        Ok(Reservation { inner: self.inner.clone(), names: names.to_vec() })
    }

    /// Adds a sandbox under its reserved name.
    pub(crate) fn insert(&self, sandbox: Arc<Sandbox>, reservation: Reservation) {
        self.insert_all(vec![sandbox], reservation);
    }

    /// Adds sandboxes under their reserved names.
    pub(crate) fn insert_all(&self, sandboxes: Vec<Arc<Sandbox>>, reservation: Reservation) {
        let mut inner = self.inner.lock();
        for sandbox in sandboxes {
            inner.names.insert(sandbox.name(), Holder::Sandbox(sandbox.id().to_owned()));
            inner.sandboxes.insert(sandbox.id().to_owned(), sandbox);
        }
        // The reservation's drop takes the lock.
        drop(inner);
        drop(reservation);
    }

    /// Adds a sandbox found in the store; a destroyed one holds no name.
    pub(crate) fn restore(&self, sandbox: Arc<Sandbox>, live: bool) {
        let mut inner = self.inner.lock();
        if live {
            inner.names.insert(sandbox.name(), Holder::Sandbox(sandbox.id().to_owned()));
        }
        inner.sandboxes.insert(sandbox.id().to_owned(), sandbox);
    }

    /// Gives a sandbox that has changed its name the one reserved for it, and its old one up.
    pub(crate) fn rename(&self, old: &str, sandbox: &Sandbox, reservation: Reservation) {
        let mut inner = self.inner.lock();
        inner.names.remove(old);
        inner.names.insert(sandbox.name(), Holder::Sandbox(sandbox.id().to_owned()));
        drop(inner);
        drop(reservation);
    }

    /// Gives up the name of a sandbox that was destroyed.
    pub(crate) fn release_name(&self, name: &str, id: &str) {
        let mut inner = self.inner.lock();
        if matches!(inner.names.get(name), Some(Holder::Sandbox(holder)) if holder == id) {
            inner.names.remove(name);
        }
    }

    /// Forgets sandboxes.
    pub(crate) fn forget(&self, ids: &[String]) {
        let mut inner = self.inner.lock();
        for id in ids {
            inner.sandboxes.remove(id);
        }
    }

    /// Forgets everybody: the engine goes.
    pub(crate) fn clear(&self) {
        let gone = std::mem::take(&mut *self.inner.lock());
        drop(gone);
    }

    /// All sandboxes, destroyed ones too.
    pub(crate) fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        self.inner.lock().sandboxes.values().cloned().collect()
    }

    /// How many sandboxes and snapshots have this memory.
    pub(crate) fn have_memory(&self, content: &str) -> usize {
        let inner = self.inner.lock();
        let of_snapshots = inner.snapshots.values().filter(|s| s.memory.as_ref().is_some_and(|m| m.content == content));
        inner.sandboxes.values().filter(|s| s.has_memory(content)).count() + of_snapshots.count()
    }

    /// The sandbox of this id or name.
    pub(crate) fn sandbox(&self, key: &str) -> Result<Arc<Sandbox>> {
        let found = self.inner.lock().sandboxes.get(key).cloned();
        match found {
            Some(sandbox) => Ok(sandbox),
            None => self.sandbox_by_name(key),
        }
    }

    /// The live sandbox that a host name means: by id, by name, or by the only name that looks like it there.
    pub(crate) fn sandbox_of_host(&self, word: &str) -> Option<Arc<Sandbox>> {
        let inner = self.inner.lock();
        let live = |holder: &Holder| match holder {
            Holder::Sandbox(id) => inner.sandboxes.get(id).cloned(),
            Holder::Reserved => None,
        };
        let known = inner.sandboxes.get(word).filter(|s| s.record().state != State::Destroyed).cloned();
        if let Some(sandbox) = known.or_else(|| inner.names.get(word).and_then(live)) {
            return Some(sandbox);
        }
        let mut alike = inner.names.iter().filter(|(name, _)| slug(name) == word).filter_map(|(_, h)| live(h));
        let one = alike.next()?;
        alike.next().is_none().then_some(one)
    }

    /// The live sandbox of this name.
    pub(crate) fn sandbox_by_name(&self, name: &str) -> Result<Arc<Sandbox>> {
        let inner = self.inner.lock();
        let found = match inner.names.get(name) {
            Some(Holder::Sandbox(id)) => inner.sandboxes.get(id).cloned(),
            _ => None,
        };
        found.ok_or_else(|| {
            Error::new(Kind::SandboxNotFound, format!("there is no sandbox {name:?}"))
                .hint("list them: miosa sandbox list")
        })
    }

    pub(crate) fn insert_snapshot(&self, record: SnapshotRecord) {
        self.inner.lock().snapshots.insert(record.id.clone(), record);
    }

    pub(crate) fn snapshots(&self) -> Vec<SnapshotRecord> {
        self.inner.lock().snapshots.values().cloned().collect()
    }

    /// A snapshot by id, by the name that keeps it, or by a comment that only one (of this sandbox, if given) has.
    pub(crate) fn snapshot(&self, key: &str, sandbox_id: Option<&str>) -> Result<SnapshotRecord> {
        let inner = self.inner.lock();
        let fits = |s: &&SnapshotRecord| sandbox_id.is_none_or(|id| s.sandbox_id == id);
        let named = inner.named.get(key).and_then(|record| inner.snapshots.get(&record.as_ref()?.snapshot_id));
        if let Some(found) = inner.snapshots.get(key).or(named).filter(fits) {
            return Ok(found.clone());
        }
        let mut named = inner.snapshots.values().filter(fits).filter(|s| s.comment.as_deref() == Some(key));
        match (named.next(), named.count()) {
            (Some(found), 0) => Ok(found.clone()),
            (Some(_), more) => {
                Err(Error::new(Kind::SnapshotAmbiguous, format!("{} snapshots are named {key:?}", more + 1))
                    .hint("use the snapshot's id: miosa sandbox snapshots list SANDBOX"))
            }
            (None, _) => Err(Error::new(Kind::SnapshotNotFound, format!("there is no snapshot {key:?}"))
                .hint("list them: miosa sandbox snapshots list SANDBOX")),
        }
    }

    /// Takes a snapshot out, by id. One that a name keeps stays.
    pub(crate) fn take_snapshot(&self, id: &str) -> Result<SnapshotRecord> {
        let mut inner = self.inner.lock();
        if let Some(record) = inner.names_of(id).next() {
            let message = format!("snapshot {id} is kept by the name {:?}", record.name);
            return Err(Error::new(Kind::SnapshotInUse, message)
                .hint(format!("remove the name first: DELETE /named-snapshots/{}", record.name)));
        }
        inner
            .snapshots
            .remove(id)
            .ok_or_else(|| Error::new(Kind::SnapshotNotFound, format!("there is no snapshot {id:?}")))
    }

    /// Reserves a name for a snapshot.
    pub(crate) fn name_snapshot(&self, name: &str) -> Result<Naming> {
        check_name("snapshot", name)?;
        let mut inner = self.inner.lock();
        if inner.snapshots.contains_key(name) || inner.named.contains_key(name) {
            return Err(Error::new(Kind::NameTaken, format!("a snapshot named {name:?} exists already"))
                .hint("choose another name, or remove that one; a name is never given anew"));
        }
        inner.named.insert(name.to_owned(), None);
        drop(inner);
        Ok(Naming { inner: self.inner.clone(), name: name.to_owned() })
    }

    /// Gives a reserved name to a snapshot that is there: from now on it is kept.
    pub(crate) fn pin_snapshot(&self, naming: &Naming, record: &NamedSnapshotRecord) -> Result<()> {
        let mut inner = self.inner.lock();
        if !inner.snapshots.contains_key(&record.snapshot_id) {
            let message = format!("there is no snapshot {:?}", record.snapshot_id);
            return Err(Error::new(Kind::SnapshotNotFound, message));
        }
        inner.named.insert(naming.name.clone(), Some(record.clone()));
        Ok(())
    }

    pub(crate) fn insert_named(&self, record: NamedSnapshotRecord) {
        self.inner.lock().named.insert(record.name.clone(), Some(record));
    }

    /// Names of snapshots, with these.
    pub(crate) fn named(&self) -> Vec<(NamedSnapshotRecord, SnapshotRecord)> {
        let inner = self.inner.lock();
        let pairs = inner
            .named
            .values()
            .flatten()
            .filter_map(|record| Some((record.clone(), inner.snapshots.get(&record.snapshot_id)?.clone())));
        pairs.collect()
    }

    /// Takes a name out, and with it the snapshot, if that was taken for it and no other name keeps it.
    pub(crate) fn take_named(&self, name: &str) -> Result<(NamedSnapshotRecord, Option<SnapshotRecord>)> {
        let mut inner = self.inner.lock();
        let record = inner.named.get(name).cloned().flatten().ok_or_else(|| no_name(name))?;
        inner.named.remove(name);
        let goes = record.taken && inner.names_of(&record.snapshot_id).next().is_none();
        let snapshot = if goes { inner.snapshots.remove(&record.snapshot_id) } else { None };
        Ok((record, snapshot))
    }

    /// Whether a name keeps this snapshot.
    pub(crate) fn is_named(&self, snapshot: &str) -> bool {
        self.inner.lock().names_of(snapshot).next().is_some()
    }

    pub(crate) fn templates(&self) -> Vec<TemplateRecord> {
        self.inner.lock().templates.values().cloned().collect()
    }

    pub(crate) fn template(&self, name: &str) -> Result<TemplateRecord> {
        let inner = self.inner.lock();
        inner.templates.get(name).cloned().ok_or_else(|| {
            let error = Error::new(Kind::TemplateNotFound, format!("there is no template {name:?}"));
            let known: Vec<_> = inner.templates.keys().map(String::as_str).collect();
            match known.is_empty() {
                true => error.hint("build one first: miosa template build base"),
                false => error.hint(format!("there is: {}; or build it: miosa template build NAME", known.join(", "))),
            }
        })
    }

    /// Registers a template; the one of this name before, if any.
    pub(crate) fn insert_template(&self, record: TemplateRecord) -> Option<TemplateRecord> {
        self.inner.lock().templates.insert(record.name.clone(), record)
    }

    pub(crate) fn remove_template(&self, name: &str) {
        self.inner.lock().templates.remove(name);
    }

    /// Claims the building (or deleting) of a template.
    pub(crate) fn claim_template(&self, name: &str) -> Result<Building> {
        if !self.inner.lock().building.insert(name.to_owned()) {
            return Err(Error::new(Kind::Busy, format!("template {name:?} is being built or deleted"))
                .hint("wait for that to end: miosa template list"));
        }
        Ok(Building { inner: self.inner.clone(), name: name.to_owned() })
    }
}

pub(super) fn no_name(name: &str) -> Error {
    Error::new(Kind::SnapshotNotFound, format!("there is no snapshot named {name:?}"))
        .hint("list them: GET /named-snapshots")
}
