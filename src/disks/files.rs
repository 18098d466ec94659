//! The files on disks, snapshots, sandboxes and templates, read without booting anything.

use std::io::Write;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use storage::Source;
use vmm::image::ImageConfig;

use super::{Disks, EXPORTING, TEMPORARY, parse_id};
use crate::engine::error::{Error, Kind, Result};
use crate::engine::lifecycle::State;
use crate::engine::records::{Record, SandboxRecord, SnapshotRecord, TemplateRecord, load_all};
use crate::ext4::diff::FileDiff;
use crate::ext4::{self, File, FileSystem, Node, archive, contained, contained_copy};

/// Most files of one list.
const MAX_LISTED: usize = 500_000;
/// Bytes of a file that are read at a time.
const PIECE: usize = 1 << 20;

/// A file, as a list shows it.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FileView {
    /// Its last name; what is not UTF-8 is replaced.
    pub name: String,
    /// Its path from the root.
    pub path: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: ext4::Kind,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Permissions, in octal.
    pub mode: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names it has.
    pub links: u32,
    /// Number of its inode.
    pub inode: u32,
    /// When its content was changed.
    #[schema(value_type = String, format = DateTime)]
    pub modified_at: jiff::Timestamp,
    /// Where a symbolic link points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// What a directory has.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Listing {
    /// The path that was asked for.
    pub path: String,
    /// It is a directory, and this is what is in it; else it is the one file.
    pub is_directory: bool,
    /// By name; with all below, by path.
    pub files: Vec<FileView>,
}

impl From<ext4::Error> for Error {
    fn from(error: ext4::Error) -> Self {
        match error {
            ext4::Error::NotFound(_) => Error::new(Kind::FileNotFound, error.to_string())
                .hint("see what is there: miosa sandbox snapshots ls SNAPSHOT /, miosa disk ls DISK /"),
            ext4::Error::WrongKind(message) => Error::new(Kind::GuestFile, message),
            ext4::Error::Unreadable(message) => {
                Error::new(Kind::GuestFile, format!("the files cannot be read: {message}"))
                    .hint("only ext4 that fills the disk is read here; attach or boot it to read it otherwise")
            }
            ext4::Error::Store(error) => error.into(),
        }
    }
}

/// What a key names.
#[derive(Debug, Clone)]
struct Found {
    source: Source,
    /// What people call it.
    name: String,
    /// How the image it came from wants programs to be run.
    image: ImageConfig,
    /// When it was as it is, if that does not change.
    created_at: Option<jiff::Timestamp>,
}

/// A state that stands still while it is read.
pub struct Still {
    disks: Arc<Disks>,
    found: Found,
    temporary: bool,
}

impl Still {
    /// What stands still.
    pub fn source(&self) -> Source {
        self.found.source
    }

    /// What people call what it is a state of.
    pub fn name(&self) -> &str {
        &self.found.name
    }

    /// How the image it came from wants programs to be run.
    pub fn image(&self) -> &ImageConfig {
        &self.found.image
    }

    /// When it was as it is; none: just now.
    pub fn created_at(&self) -> Option<jiff::Timestamp> {
        self.found.created_at
    }

    /// Opens its file system.
    pub fn open(&self) -> Result<FileSystem> {
        let disk = self.disks.store.open_source(self.source())?;
        Ok(contained(|| FileSystem::open(disk))?)
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        let Source::Snapshot(id) = self.source() else { return };
        if !self.temporary {
            return;
        }
        let mut tx = self.disks.store.begin();
        tx.delete_snapshot(id);
        tx.delete_record(TEMPORARY, &id.to_string());
        if let Err(error) = tx.commit().map(drop) {
            tracing::warn!(%error, "what files were read from stays until the store is opened again");
        }
    }
}

/// A file, or a directory as an archive, that is ready to be sent.
pub struct Content {
    still: Still,
    fs: FileSystem,
    what: What,
}

enum What {
    File(Box<File>),
    Archive(Box<Node>, String),
}

impl Content {
    /// Bytes of a file; of an archive it is not known before.
    pub fn size_bytes(&self) -> Option<u64> {
        match &self.what {
            What::File(file) => Some(file.node().size()),
            What::Archive(..) => None,
        }
    }

    /// Writes it all.
    pub fn write(self, mut to: impl Write) -> std::io::Result<Result<()>> {
        let Content { still, fs, what } = self;
        let done = match what {
            What::Archive(node, name) => contained_copy(|| archive::write(&fs, *node, &name, &mut to))?,
            What::File(file) => {
                let mut buffer = vec![0; PIECE];
                let mut at = 0;
                loop {
                    match contained(|| fs.read(&file, at, &mut buffer)) {
                        Ok(0) => break Ok(()),
                        Ok(read) => to.write_all(&buffer[..read])?,
                        Err(error) => break Err(error),
                    }
                    at += PIECE as u64;
                }
            }
        };
        to.flush()?;
        drop(still);
        Ok(done.map_err(Error::from))
    }
}

impl From<&SnapshotRecord> for Found {
    fn from(r: &SnapshotRecord) -> Self {
        let name = r.comment.clone().unwrap_or_else(|| r.id.clone());
        let (image, created_at) = (r.image.clone(), Some(r.created_at));
        Self { source: Source::Snapshot(r.snapshot), name, image, created_at }
    }
}

impl From<&SandboxRecord> for Found {
    fn from(r: &SandboxRecord) -> Self {
        Self { source: Source::Disk(r.disk), name: r.name.clone(), image: r.image.clone(), created_at: None }
    }
}

impl From<&TemplateRecord> for Found {
    fn from(r: &TemplateRecord) -> Self {
        let (image, created_at) = (r.image.clone(), Some(r.created_at));
        Self { source: Source::Snapshot(r.snapshot), name: r.name.clone(), image, created_at }
    }
}

impl Disks {
    /// A disk or snapshot of the store, a snapshot of a sandbox, a sandbox or a template: by id, or by a name that only one
    /// has.
    fn find_state(&self, key: &str) -> Result<Found> {
        let snapshots = load_all::<SnapshotRecord>(&self.store)?;
        let sandboxes = load_all::<SandboxRecord>(&self.store)?;
        let sandboxes: Vec<_> = sandboxes.into_iter().filter(|r| r.state != State::Destroyed).collect();
        if let Some(record) = snapshots.iter().find(|r| r.id == key) {
            return Ok(Found::from(record));
        }
        if let Some(record) = sandboxes.iter().find(|r| r.id == key) {
            return Ok(Found::from(record));
        }
        let templates = load_all::<TemplateRecord>(&self.store)?;
        let snapshots = snapshots.iter().filter(|r| r.comment.as_deref() == Some(key)).map(|r| (&r.id[..], r.into()));
        let sandboxes = sandboxes.iter().filter(|r| r.name == key).map(|r| (&r.id[..], r.into()));
        let templates = templates.iter().filter(|r| r.key() == key).map(|r| (r.key(), r.into()));
        let named: Vec<(&str, Found)> = snapshots.chain(sandboxes).chain(templates).collect();
        match named.as_slice() {
            [] => {
                let source = self.find(key)?;
                Ok(Found { source, name: key.to_owned(), image: ImageConfig::default(), created_at: None })
            }
            [(_, one)] if parse_id(key).is_none() && self.store.disk_by_name(key).is_none() => Ok(one.clone()),
            several => {
                let ids: Vec<_> = several.iter().map(|(id, _)| *id).collect();
                Err(Error::new(Kind::DiskAmbiguous, format!("{key:?} is the name of several: {}", ids.join(", ")))
                    .hint("use the id"))
            }
        }
    }

    /// The state of what `key` names, as it is now.
    pub fn still(self: &Arc<Self>, key: &str) -> Result<Still> {
        let mut found = self.find_state(key)?;
        let Source::Disk(id) = found.source else {
            return Ok(Still { disks: self.clone(), found, temporary: false });
        };
        let mut tx = self.store.begin();
        let snapshot = tx.snapshot(id, "reading files");
        tx.put_record(TEMPORARY, &snapshot.to_string(), EXPORTING);
        // It need not survive anything, so nobody waits for a sync.
        drop(tx.commit()?);
        found.source = Source::Snapshot(snapshot);
        Ok(Still { disks: self.clone(), found, temporary: true })
    }

    /// What a directory has; with `recursive`, all below it, too.
    pub fn list_files(self: &Arc<Self>, key: &str, path: &str, recursive: bool) -> Result<Listing> {
        let still = self.still(key)?;
        let fs = still.open()?;
        Ok(contained(|| list(&fs, path, recursive))?)
    }

    /// A file's content; a directory's, or with `archive` a file's, as a tar archive.
    pub fn open_content(self: &Arc<Self>, key: &str, path: &str, archive: bool) -> Result<Content> {
        let still = self.still(key)?;
        let fs = still.open()?;
        let what = contained(|| {
            let node = fs.lookup(path, !archive)?;
            if archive || node.kind == ext4::Kind::Directory {
                let name = path.split('/').rfind(|name| !matches!(*name, "" | "." | "..")).unwrap_or_default();
                return Ok(What::Archive(Box::new(node), name.to_owned()));
            }
            let file = fs.open_file(node).map_err(|e| about(path, e))?;
            Ok(What::File(Box::new(file)))
        })?;
        Ok(Content { still, fs, what })
    }

    /// Which files two states have differently.
    pub fn file_diff(self: &Arc<Self>, a: &str, b: &str) -> Result<FileDiff> {
        let (a, b) = (self.still(a)?, self.still(b)?);
        let ranges = self.store.diff(a.source(), b.source())?;
        let (one, other) = (a.open()?, b.open()?);
        Ok(contained(|| ext4::diff::diff(&one, &other, ranges.iter().map(|r| (r.offset, r.bytes))))?)
    }
}

fn about(path: &str, error: ext4::Error) -> ext4::Error {
    match error {
        ext4::Error::WrongKind(message) => ext4::Error::WrongKind(format!("{path}: {message}")),
        error => error,
    }
}

fn list(fs: &FileSystem, path: &str, recursive: bool) -> ext4::Result<Listing> {
    let top = fs.lookup(path, true)?;
    let base = format!("/{}", path.split('/').filter(|n| !matches!(*n, "" | ".")).collect::<Vec<_>>().join("/"));
    if top.kind != ext4::Kind::Directory {
        return Ok(Listing { path: path.to_owned(), is_directory: false, files: vec![view(fs, &top, base)?] });
    }
    let mut files = Vec::new();
    let mut visited = std::collections::HashSet::new();
    let mut todo = vec![(base, top)];
    while let Some((base, directory)) = todo.pop() {
        if !visited.insert(directory.ino) {
            return Err(ext4::Error::Unreadable("a directory is in two places".to_owned()));
        }
        let mut below = Vec::new();
        for entry in fs.read_dir(&directory)? {
            if files.len() >= MAX_LISTED {
                let message = format!("{path} has more than {MAX_LISTED} files; extract it instead");
                return Err(ext4::Error::WrongKind(message));
            }
            let node = fs.node(entry.ino)?;
            let path = format!("{}/{}", base.trim_end_matches('/'), String::from_utf8_lossy(&entry.name));
            files.push(view(fs, &node, path.clone())?);
            if recursive && node.kind == ext4::Kind::Directory {
                below.push((path, node));
            }
        }
        todo.extend(below.into_iter().rev());
    }
    if recursive {
        files.sort_by(|a, b| a.path.cmp(&b.path));
    }
    Ok(Listing { path: path.to_owned(), is_directory: true, files })
}

fn view(fs: &FileSystem, node: &Node, path: String) -> ext4::Result<FileView> {
    let target = match node.kind {
        ext4::Kind::Symlink => Some(String::from_utf8_lossy(&fs.read_link(node)?).into_owned()),
        _ => None,
    };
    let (seconds, nanos) = node.modified();
    Ok(FileView {
        name: path.rsplit('/').next().unwrap_or_default().to_owned(),
        path,
        kind: node.kind,
        size_bytes: node.size(),
        mode: format!("{:04o}", node.mode()),
        uid: node.uid(),
        gid: node.gid(),
        links: node.links(),
        inode: node.ino,
        modified_at: jiff::Timestamp::new(seconds, i32::try_from(nanos).unwrap_or(0)).unwrap_or_default(),
        target,
    })
}
