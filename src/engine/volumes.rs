//! Volumes: disks that are nobody's root, given to sandboxes and taken away again.
//!
//! A volume's record says who has it: one sandbox that writes, or any number that read. It is changed in the transaction
//! of what it goes with, so a crash leaves no volume that is attached to a sandbox that is gone, nor a disk without its
//! record. Who has a volume changes only while that sandbox has no session: its owner's lock is taken first, then the turn
//! to change volumes. A session has the volumes that its sandbox had when it began.
//!
//! Whether a file system was left in order is not remembered, but read from its superblock.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use parking_lot::Mutex;
use storage::{Disk, DiskId, SnapshotId, Source, Store, Usage};
use tokio::sync::MutexGuard;

use super::devices::VolumeOf;
use super::error::{Error, Kind, Result};
use super::guest::check_path;
use super::lifecycle::Request;
use super::records::{
    Consistency, Record, VolumeAttachment, VolumeRecord, VolumeSnapshotRecord, check_comment, check_name, is_own_name,
    new_id, put_all,
};
use super::template::{Copy, copy_data};
use super::{Engine, Shared, in_domain};

/// Most volumes of one sandbox: each is a device of its machine.
const MAX_ATTACHED: usize = 8;
/// Sizes of a volume: what a file system with a journal needs, and what a file of the host can be.
const SIZES: std::ops::RangeInclusive<u64> = 16 << 20..=8 << 40;
/// Where the kernel's own file systems are.
const NOT_THERE: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A new volume.
#[derive(Debug, Clone, Default)]
pub struct CreateVolume {
    /// Its name.
    pub name: String,
    /// Its size; of one made from a snapshot, that of the snapshot.
    pub size_bytes: Option<u64>,
    /// The snapshot of a volume that it starts as, by id or unique name; without one it is empty.
    pub snapshot: Option<String>,
    /// Deduplication domain of what is written to it; without one, that of the snapshot.
    pub dedup_domain: Option<String>,
}

/// A volume for a sandbox.
#[derive(Debug, Clone, Default)]
pub struct Attach {
    /// Which, by id or name.
    pub volume: String,
    /// Where the guest mounts it; without, `/mnt/NAME`.
    pub path: Option<String>,
    /// Nothing is written to it, and others may read it, too.
    pub read_only: bool,
}

/// Who exists, in memory; the store is the durable truth.
#[derive(Default)]
pub(crate) struct Volumes {
    known: Mutex<Known>,
    /// Held from looking to changing.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Known {
    volumes: BTreeMap<String, VolumeRecord>,
    snapshots: BTreeMap<String, VolumeSnapshotRecord>,
}

/// Volumes as they are to be: for a transaction, and seen by readers once published. Nobody else changes any meanwhile.
pub(super) struct Change<'a> {
    of: &'a Volumes,
    records: Vec<VolumeRecord>,
    _turn: MutexGuard<'a, ()>,
}

impl Change<'_> {
    pub(super) fn records(&self) -> Vec<VolumeRecord> {
        self.records.clone()
    }

    /// It is durable: lets readers see it.
    pub(super) fn publish(self) {
        let mut known = self.of.known.lock();
        known.volumes.extend(self.records.into_iter().map(|record| (record.id.clone(), record)));
    }
}

impl Volumes {
    /// Those found in the store.
    pub(super) fn restore(&self, volumes: Vec<VolumeRecord>, snapshots: Vec<VolumeSnapshotRecord>) {
        let volumes = volumes.into_iter().map(|record| (record.id.clone(), record)).collect();
        let snapshots = snapshots.into_iter().map(|record| (record.id.clone(), record)).collect();
        *self.known.lock() = Known { volumes, snapshots };
    }

    /// What a sandbox has, by id. It stays so for as long as the sandbox's owner wants.
    pub(super) fn of(&self, sandbox: &str) -> Vec<VolumeOf> {
        let known = self.known.lock();
        let attached = known.volumes.values().filter_map(|volume| {
            let at = volume.attachments.iter().find(|at| at.sandbox_id == sandbox)?;
            let (id, path) = (volume.id.clone(), at.path.clone());
            Some(VolumeOf { id, disk: volume.disk, path, read_only: at.read_only })
        });
        attached.collect()
    }

    /// All volumes without this sandbox.
    pub(super) async fn detached_from(&self, sandbox: &str) -> Change<'_> {
        let turn = self.turn.lock().await;
        let mut records: Vec<VolumeRecord> = self.known.lock().volumes.values().cloned().collect();
        records.retain(|volume| volume.attachments.iter().any(|at| at.sandbox_id == sandbox));
        for record in &mut records {
            record.attachments.retain(|at| at.sandbox_id != sandbox);
        }
        Change { of: self, records, _turn: turn }
    }

    /// By id or name.
    fn find(&self, key: &str) -> Result<VolumeRecord> {
        let known = self.known.lock();
        let found = known.volumes.get(key).or_else(|| known.volumes.values().find(|volume| volume.name == key));
        found.cloned().ok_or_else(|| {
            Error::new(Kind::VolumeNotFound, format!("there is no volume {key:?}"))
                .hint("list them: miosa volume list; or make it: miosa volume create NAME --size 10gb")
        })
    }

    /// By id, or by a name that only one (of this volume, if given) has.
    fn find_snapshot(&self, key: &str, volume: Option<&str>) -> Result<VolumeSnapshotRecord> {
        let known = self.known.lock();
        let fits = |s: &&VolumeSnapshotRecord| volume.is_none_or(|id| s.volume_id == id);
        if let Some(found) = known.snapshots.get(key).filter(fits) {
            return Ok(found.clone());
        }
        let mut named = known.snapshots.values().filter(fits).filter(|s| s.name.as_deref() == Some(key));
        match (named.next(), named.count()) {
            (Some(found), 0) => Ok(found.clone()),
            (Some(_), more) => {
                let message = format!("{} snapshots of volumes are named {key:?}", more + 1);
                Err(Error::new(Kind::SnapshotAmbiguous, message)
                    .hint("use the snapshot's id: miosa volume snapshots list VOLUME"))
            }
            (None, _) => Err(Error::new(Kind::SnapshotNotFound, format!("there is no snapshot {key:?} of a volume"))
                .hint("list them: miosa volume snapshots list VOLUME")),
        }
    }
}

/// Volumes as they are when a sandbox is given these.
pub(super) async fn attaching<'a>(shared: &'a Arc<Shared>, sandbox: &str, wanted: &[Attach]) -> Result<Change<'a>> {
    let volumes = &shared.volumes;
    let turn = volumes.turn.lock().await;
    let mut has = volumes.of(sandbox);
    let mut records: Vec<VolumeRecord> = Vec::new();
    for attach in wanted {
        let mut record = volumes.find(&attach.volume)?;
        let path = match &attach.path {
            Some(path) => check_mount_path(path)?,
            None => format!("/mnt/{}", record.name),
        };
        if let Some(there) = has.iter().find(|v| v.id == record.id) {
            let message = format!("volume {} is attached to this sandbox already, at {}", record.name, there.path);
            return Err(Error::new(Kind::VolumeInUse, message)
                .hint(format!("detach it first: miosa volume detach {}", record.name)));
        }
        if let Some(other) = has.iter().find(|v| v.path == path) {
            return Err(Error::new(
                Kind::VolumeInUse,
                format!("the sandbox has another volume, {}, at {path}", other.id),
            )
            .hint("choose another place: --mount PATH"));
        }
        if has.len() == MAX_ATTACHED {
            return Err(Error::invalid(format!("a sandbox has at most {MAX_ATTACHED} volumes")));
        }
        check_sharing(shared, &record, attach.read_only)?;
        let (disk, read_only) = (record.disk, attach.read_only);
        if read_only && !shared.with_store(move |store| is_clean(&store.disk(disk)?)).await? {
            let message =
                format!("volume {} was not unmounted in order, and who reads it cannot put that right", record.name);
            return Err(Error::new(Kind::VolumeUnclean, message)
                .hint("attach it for writing, and start and stop that sandbox once; then it can be read"));
        }
        has.push(VolumeOf { id: record.id.clone(), disk, path: path.clone(), read_only });
        let attached_at = Timestamp::now();
        record.attachments.push(VolumeAttachment { sandbox_id: sandbox.to_owned(), path, read_only, attached_at });
        records.push(record);
    }
    Ok(Change { of: volumes, records, _turn: turn })
}

/// One writes, or any number read.
fn check_sharing(shared: &Shared, volume: &VolumeRecord, read_only: bool) -> Result<()> {
    let Some(holder) = volume.attachments.iter().find(|at| !(read_only && at.read_only)) else { return Ok(()) };
    let (name, holders) = (&volume.name, holders(shared, volume));
    let (message, hint) = match holder.read_only {
        false => (format!("volume {name} is attached for writing to {holders}"), "a copy can be attached elsewhere"),
        true => {
            (format!("volume {name} is attached for reading to {holders}"), "it can be read by others: --read-only")
        }
    };
    let detach = format!("detach it there: miosa volume detach {name} {}; or {hint}", holder.sandbox_id);
    Err(Error::new(Kind::VolumeInUse, message).hint(detach))
}

/// `sandbox web (sb-…) and sandbox db (sb-…)`
fn holders(shared: &Shared, volume: &VolumeRecord) -> String {
    let names = volume.attachments.iter().map(|at| match shared.registry.sandbox(&at.sandbox_id) {
        Ok(sandbox) if sandbox.name() != at.sandbox_id => format!("sandbox {} ({})", sandbox.name(), at.sandbox_id),
        _ => format!("sandbox {}", at.sandbox_id),
    });
    names.collect::<Vec<_>>().join(" and ")
}

/// A directory of the guest's that something can be mounted at, without a slash at its end.
fn check_mount_path(path: &str) -> Result<String> {
    check_path(path)?;
    let plain = path.trim_end_matches('/');
    let parts = || plain.split('/').skip(1);
    let odd = parts().next().is_none()
        || parts().any(|part| matches!(part, "" | "." | ".."))
        || plain.contains(char::is_control);
    let below = |top: &str| plain.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if odd || NOT_THERE.into_iter().any(below) {
        return Err(Error::invalid(format!("nothing can be mounted at {path:?}"))
            .hint("name a directory of its own, such as /data; it is made if it is missing"));
    }
    Ok(plain.to_owned())
}

/// Whether the ext4 file system on a disk has nothing in its journal: it was unmounted in order, or is frozen.
fn is_clean(disk: &Disk) -> Result<bool> {
    const AT: u64 = 1_024;
    const MAGIC: [u8; 2] = [0x53, 0xef];
    /// `EXT4_FEATURE_INCOMPAT_RECOVER`
    const RECOVER: u8 = 0x04;
    let mut superblock = [0; 0x64];
    disk.read(AT, &mut superblock)?;
    Ok(superblock[0x38..0x3a] == MAGIC && superblock[0x60] & RECOVER == 0)
}

/// Takes a state, as strong as what its superblock tells.
fn take_snapshot(store: &Store, of: &VolumeRecord, name: Option<String>) -> Result<VolumeSnapshotRecord> {
    let mut tx = store.begin();
    let id = new_id("vsnap");
    let mut record = VolumeSnapshotRecord {
        snapshot: tx.snapshot(of.disk, &id),
        id,
        volume_id: of.id.clone(),
        name,
        size_bytes: of.size_bytes,
        consistency: Consistency::Crash,
        created_at: Timestamp::now(),
    };
    put_all(&mut tx, std::slice::from_ref(&record))?;
    tx.commit_durable()?;
    if is_clean(&store.snapshot(record.snapshot)?)? {
        record.consistency = Consistency::Filesystem;
        let mut tx = store.begin();
        put_all(&mut tx, std::slice::from_ref(&record))?;
        tx.commit_durable()?;
    }
    Ok(record)
}

/// Makes a disk with an empty file system and its record, or neither.
fn make_empty(store: &Store, image: &tempfile::NamedTempFile, mut record: VolumeRecord) -> Result<VolumeRecord> {
    let mut tx = store.begin();
    record.disk = tx.create_disk(&record.id, record.size_bytes);
    in_domain(&mut tx, record.disk, record.dedup_domain.as_deref());
    tx.commit_durable()?;
    let disk = record.disk;
    let made = (|| {
        copy_data(image.as_file(), 0, record.size_bytes, &store.disk(disk)?, &(Arc::new(|_| ()) as _)).map_err(
            |error| match error {
                Copy::Read(e) => Error::internal(format!("an empty file system could not be read: {e}")),
                Copy::Store(e) => e.into(),
            },
        )?;
        // The commit point; its sync is that of what was written, too.
        let mut tx = store.begin();
        put_all(&mut tx, std::slice::from_ref(&record))?;
        tx.commit_durable()?;
        Ok(record)
    })();
    if made.is_err() {
        let mut tx = store.begin();
        tx.delete_disk(disk);
        if let Err(error) = tx.commit_durable() {
            tracing::warn!(%error, "a half-made volume stays until the next start");
        }
    }
    made
}

/// An empty file system, in a file that goes when it is dropped.
fn empty_file_system(dir: &std::path::Path, size_bytes: u64) -> Result<tempfile::NamedTempFile> {
    let failed = |e: std::io::Error| Error::internal(format!("a file of {size_bytes} bytes in {}: {e}", dir.display()));
    let file = tempfile::Builder::new().prefix(".volume-").tempfile_in(dir).map_err(failed)?;
    file.as_file().set_len(size_bytes).map_err(failed)?;
    vmm::image::make_empty_ext4(file.path())?;
    Ok(file)
}

impl Engine {
    /// Volumes, oldest first.
    pub fn volumes(&self) -> Vec<VolumeRecord> {
        let mut all: Vec<_> = self.shared.volumes.known.lock().volumes.values().cloned().collect();
        all.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        all
    }

    /// One, by id or name.
    pub fn volume(&self, key: &str) -> Result<VolumeRecord> {
        self.shared.volumes.find(key)
    }

    /// The volumes of a sandbox, oldest first.
    pub fn volumes_of(&self, sandbox: &str) -> Result<Vec<VolumeRecord>> {
        let id = self.find(sandbox)?.id().to_owned();
        let mut all = self.volumes();
        all.retain(|volume| volume.attachments.iter().any(|at| at.sandbox_id == id));
        Ok(all)
    }

    /// What is stored for a volume; walks the maps of all disks.
    pub async fn volume_usage(&self, key: &str) -> Result<Usage> {
        let disk = Source::Disk(self.volume(key)?.disk);
        self.shared.with_store(move |store| Ok(store.usage_of(disk)?)).await
    }

    /// Makes a volume: empty, or as a snapshot of one was.
    pub async fn create_volume(&self, request: CreateVolume) -> Result<VolumeRecord> {
        check_name("volume", &request.name)?;
        if is_own_name(&request.name) {
            return Err(
                Error::invalid(format!("{:?} would be mistaken for an id", request.name)).hint("choose another name")
            );
        }
        let shared = self.shared.clone();
        self.detached(async move {
            let turn = shared.volumes.turn.lock().await;
            if shared.volumes.known.lock().volumes.values().any(|volume| volume.name == request.name) {
                return Err(Error::new(Kind::NameTaken, format!("a volume named {:?} exists already", request.name))
                    .hint(format!("choose another name, or delete it: miosa volume delete {:?}", request.name)));
            }
            let record = VolumeRecord {
                id: new_id("vol"),
                name: request.name,
                disk: DiskId(0),
                size_bytes: 0,
                from_snapshot: None,
                dedup_domain: request.dedup_domain,
                attachments: Vec::new(),
                created_at: Timestamp::now(),
            };
            let records = vec![match request.snapshot {
                Some(key) => {
                    copy_of(&shared, record, shared.volumes.find_snapshot(&key, None)?, request.size_bytes).await?
                }
                None => empty(&shared, record, request.size_bytes).await?,
            }];
            let record = records[0].clone();
            Change { of: &shared.volumes, records, _turn: turn }.publish();
            Ok(record)
        })
        .await
    }

    /// Deletes a volume that no sandbox has. Snapshots taken of it stay until they are deleted.
    pub async fn delete_volume(&self, key: &str) -> Result<VolumeRecord> {
        let (shared, key) = (self.shared.clone(), key.to_owned());
        self.detached(async move {
            let _turn = shared.volumes.turn.lock().await;
            let record = shared.volumes.find(&key)?;
            refuse_attached(&shared, &record)?;
            let (disk, id) = (record.disk, record.id.clone());
            shared
                .transact(move |tx| {
                    tx.delete_disk(disk);
                    tx.delete_record(VolumeRecord::KIND, &id);
                    Ok(())
                })
                .await?;
            shared.volumes.known.lock().volumes.remove(&record.id);
            Ok(record)
        })
        .await
    }

    /// Gives a sandbox that has no session a volume; its next session mounts it.
    pub async fn attach_volume(&self, sandbox: &str, request: Attach) -> Result<VolumeRecord> {
        let (sandbox, shared) = (self.find(sandbox)?, self.shared.clone());
        self.detached(async move {
            let _owner = sandbox.own().await;
            sandbox.decide(Request::Attach)?;
            let change = attaching(&shared, sandbox.id(), std::slice::from_ref(&request)).await?;
            save(&shared, change).await
        })
        .await
    }

    /// Takes a volume away from a sandbox that has no session; which one need not be said if only one has it.
    pub async fn detach_volume(&self, key: &str, sandbox: Option<&str>) -> Result<VolumeRecord> {
        let volume = self.volume(key)?;
        let holder = match (sandbox, volume.attachments.as_slice()) {
            (Some(sandbox), _) => self.find(sandbox)?.id().to_owned(),
            (None, [one]) => one.sandbox_id.clone(),
            (None, []) => return Err(not_attached(&volume, "any sandbox")),
            (None, _) => {
                let message = format!("volume {} is attached to {}", volume.name, holders(&self.shared, &volume));
                return Err(
                    Error::new(Kind::VolumeInUse, message).hint("say from which: miosa volume detach VOLUME SANDBOX")
                );
            }
        };
        let (sandbox, shared) = (self.find(&holder)?, self.shared.clone());
        self.detached(async move {
            let _owner = sandbox.own().await;
            let mut change = shared.volumes.detached_from(sandbox.id()).await;
            change.records.retain(|record| record.id == volume.id);
            if change.records.is_empty() {
                return Err(not_attached(&volume, &format!("sandbox {}", sandbox.name())));
            }
            sandbox.decide(Request::Attach)?;
            save(&shared, change).await
        })
        .await
    }

    /// Keeps a volume's present state. If a running sandbox writes to it, its file systems are frozen meanwhile.
    pub async fn snapshot_volume(&self, key: &str, name: Option<String>) -> Result<VolumeSnapshotRecord> {
        check_comment(name.as_deref())?;
        let (shared, key) = (self.shared.clone(), key.to_owned());
        self.detached(async move {
            let writer = |volume: &VolumeRecord| {
                volume.attachments.iter().find(|at| !at.read_only).map(|at| at.sandbox_id.clone())
            };
            let volume = shared.volumes.find(&key)?;
            let record = match writer(&volume) {
                Some(holder) => {
                    let sandbox = shared.registry.sandbox(&holder)?;
                    let mut owner = sandbox.own().await;
                    if writer(&shared.volumes.find(&volume.id)?) != Some(holder) {
                        return Err(Error::new(Kind::Busy, format!("volume {} changes hands", volume.name))
                            .hint("try again in a moment"));
                    }
                    let take = move |store: &Store, _| take_snapshot(store, &volume, name);
                    sandbox.at_one_point(&mut owner, Request::Snapshot, take, |_, _| Ok(())).await?.0
                }
                None => {
                    let _turn = shared.volumes.turn.lock().await;
                    let volume = shared.volumes.find(&volume.id)?;
                    shared.with_store(move |store| take_snapshot(store, &volume, name)).await?
                }
            };
            shared.volumes.known.lock().snapshots.insert(record.id.clone(), record.clone());
            Ok(record)
        })
        .await
    }

    /// Snapshots of volumes, oldest first: of one, or all, also of those that are gone.
    pub fn volume_snapshots(&self, volume: Option<&str>) -> Result<Vec<VolumeSnapshotRecord>> {
        let id = volume.map(|key| self.volume(key).map(|v| v.id)).transpose()?;
        let mut all: Vec<_> = self.shared.volumes.known.lock().snapshots.values().cloned().collect();
        all.retain(|snapshot| id.as_ref().is_none_or(|id| *id == snapshot.volume_id));
        all.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(all)
    }

    /// Deletes a snapshot of a volume, by id or unique name. Volumes made from it do not need it.
    pub async fn delete_volume_snapshot(&self, key: &str) -> Result<VolumeSnapshotRecord> {
        let (shared, key) = (self.shared.clone(), key.to_owned());
        self.detached(async move {
            let _turn = shared.volumes.turn.lock().await;
            let record = shared.volumes.find_snapshot(&key, None)?;
            let (state, id): (SnapshotId, String) = (record.snapshot, record.id.clone());
            shared
                .transact(move |tx| {
                    tx.delete_snapshot(state);
                    tx.delete_record(VolumeSnapshotRecord::KIND, &id);
                    Ok(())
                })
                .await?;
            shared.volumes.known.lock().snapshots.remove(&record.id);
            Ok(record)
        })
        .await
    }

    /// Puts a volume that no sandbox has back to one of its snapshots. A crash leaves the old state or the restored one.
    pub async fn restore_volume(&self, key: &str, snapshot: &str) -> Result<VolumeRecord> {
        let (shared, key, snapshot) = (self.shared.clone(), key.to_owned(), snapshot.to_owned());
        self.detached(async move {
            let turn = shared.volumes.turn.lock().await;
            let mut record = shared.volumes.find(&key)?;
            let snapshot = shared.volumes.find_snapshot(&snapshot, Some(&record.id))?;
            refuse_attached(&shared, &record)?;
            let restored = shared.transact(move |tx| {
                tx.delete_disk(record.disk);
                record.disk = tx.fork(Source::Snapshot(snapshot.snapshot), &record.id);
                in_domain(tx, record.disk, record.dedup_domain.as_deref());
                record.size_bytes = snapshot.size_bytes;
                put_all(tx, std::slice::from_ref(&record))?;
                Ok(record)
            });
            let record = restored.await?;
            Change { of: &shared.volumes, records: vec![record.clone()], _turn: turn }.publish();
            Ok(record)
        })
        .await
    }
}

/// Makes a change of one volume durable, and seen.
async fn save(shared: &Shared, change: Change<'_>) -> Result<VolumeRecord> {
    let records = change.records();
    let record = shared
        .transact(move |tx| {
            put_all(tx, &records)?;
            records.into_iter().next().ok_or_else(|| Error::internal("a change of no volume"))
        })
        .await?;
    change.publish();
    Ok(record)
}

async fn empty(shared: &Shared, record: VolumeRecord, size_bytes: Option<u64>) -> Result<VolumeRecord> {
    let Some(size_bytes) = size_bytes else {
        return Err(Error::invalid("a new volume needs a size").hint("say it: --size 10gb"));
    };
    if !SIZES.contains(&size_bytes) || !size_bytes.is_multiple_of(4_096) {
        return Err(Error::invalid(format!("a volume cannot have {size_bytes} bytes"))
            .hint("16mb to 8192gb, in whole blocks of 4096 bytes"));
    }
    let dir = shared.settings.run_root.clone();
    shared
        .with_store(move |store| {
            let image = empty_file_system(&dir, size_bytes)?;
            make_empty(store, &image, VolumeRecord { size_bytes, ..record })
        })
        .await
}

async fn copy_of(
    shared: &Shared,
    mut record: VolumeRecord,
    snapshot: VolumeSnapshotRecord,
    size_bytes: Option<u64>,
) -> Result<VolumeRecord> {
    if size_bytes.is_some_and(|size| size != snapshot.size_bytes) {
        let message = format!(
            "the snapshot is of a volume of {} MiB, and what is made of it is as large",
            snapshot.size_bytes >> 20
        );
        return Err(Error::invalid(message).hint("leave out the size"));
    }
    record.size_bytes = snapshot.size_bytes;
    record.from_snapshot = Some(snapshot.id);
    if record.dedup_domain.is_none() {
        record.dedup_domain = shared.store.domain(Source::Snapshot(snapshot.snapshot))?;
    }
    shared
        .transact(move |tx| {
            record.disk = tx.fork(Source::Snapshot(snapshot.snapshot), &record.id);
            in_domain(tx, record.disk, record.dedup_domain.as_deref());
            put_all(tx, std::slice::from_ref(&record))?;
            Ok(record)
        })
        .await
}

fn refuse_attached(shared: &Shared, volume: &VolumeRecord) -> Result<()> {
    if volume.attachments.is_empty() {
        return Ok(());
    }
    let message = format!("volume {} is attached to {}", volume.name, holders(shared, volume));
    Err(Error::new(Kind::VolumeInUse, message)
        .hint(format!("detach it first: miosa volume detach {} SANDBOX", volume.name)))
}

fn not_attached(volume: &VolumeRecord, to: &str) -> Error {
    Error::new(Kind::VolumeNotAttached, format!("volume {} is not attached to {to}", volume.name))
        .hint(format!("see where it is: miosa volume show {}", volume.name))
}

#[cfg(test)]
mod tests {
    use super::check_mount_path;

    #[test]
    fn mounts_have_directories_of_their_own() {
        for (path, plain) in
            [("/data", "/data"), ("/data/", "/data"), ("/srv/a b", "/srv/a b"), ("/process", "/process")]
        {
            assert_eq!(check_mount_path(path).unwrap(), plain);
        }
        for path in ["", "data", "/", "//", "/a//b", "/a/../b", "/./a", "/proc", "/dev/x", "/sys/", "/a\n", "/a\0"] {
            assert!(check_mount_path(path).is_err(), "{path:?}");
        }
    }
}
