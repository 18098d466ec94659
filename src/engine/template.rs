//! Templates: images that sandboxes start from.
//!
//! An image is imported once: blocks that are zero are skipped, the rest is written to a disk, sealed (so that it costs
//! what is unique in it, compressed) and kept as a state that nothing writes to any more. The disk itself goes in the
//! transaction that registers the template; if the daemon dies before, recovery deletes it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use storage::{Disk, Store};

use super::Shared;
use super::error::{Error, Kind, Result};
use super::records::{Record, TemplateRecord, check_name, new_id};
use crate::sparse::{data_runs, next_data};

/// The template that is built and not imported.
pub const BASE: &str = "base";

/// Kernel and initramfs that every machine boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// Modules and the agent.
    pub initramfs: PathBuf,
}

/// Hears about the steps of a long operation.
pub type Progress = Arc<dyn Fn(String) + Send + Sync>;

/// Makes what machines boot from.
#[async_trait]
pub trait TemplateBuilder: Send + Sync + 'static {
    /// Kernel and initramfs, which were made before.
    async fn boot_files(&self) -> Result<BootFiles>;

    /// Makes kernel and initramfs, unless they are there.
    async fn prepare_boot_files(&self, progress: Progress) -> Result<()>;

    /// Makes the raw image of the base template, and says where it is and what is in it. It may be kept for next time.
    async fn build_base(&self, size_bytes: u64, progress: Progress) -> Result<(PathBuf, String)>;
}

/// Where a template's image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// Debian with python3 and git, of this size.
    Base {
        /// Size of the disk.
        size_bytes: u64,
    },
    /// A raw file: one ext4 file system, no partitions.
    Raw {
        /// On the daemon's machine.
        path: PathBuf,
    },
}

/// A template to be made; one of this name is replaced.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// Its name.
    pub name: String,
    /// Its image.
    pub source: ImageSource,
}

pub(super) async fn build(shared: &Arc<Shared>, request: BuildRequest, progress: Progress) -> Result<TemplateRecord> {
    check_name("template", &request.name)?;
    let _building = shared.registry.claim_template(&request.name)?;
    if let ImageSource::Raw { path } = &request.source {
        check_raw_image(path)?;
    }
    shared.templates.prepare_boot_files(progress.clone()).await?;
    let (image, origin) = match request.source {
        ImageSource::Base { size_bytes } => shared.templates.build_base(size_bytes, progress.clone()).await?,
        ImageSource::Raw { path } => {
            let origin = format!("image {}", path.display());
            (path, origin)
        }
    };
    progress("importing the image".to_owned());
    let (name, told) = (request.name.clone(), progress.clone());
    let record = shared.with_store(move |store| import(store, &name, &image, origin, &told)).await?;
    let replaced = shared.registry.insert_template(record.clone());
    if let Some(old) = replaced {
        let deleted = shared
            .with_store(move |store| {
                let mut tx = store.begin();
                tx.delete_snapshot(old.snapshot);
                Ok(tx.commit_durable()?)
            })
            .await;
        if let Err(error) = deleted {
            tracing::warn!(%error, "the replaced template's state stays until the next start");
        }
    }
    Ok(record)
}

pub(super) async fn delete(shared: &Arc<Shared>, name: &str) -> Result<TemplateRecord> {
    let _deleting = shared.registry.claim_template(name)?;
    let record = shared.registry.template(name)?;
    let (state, key) = (record.snapshot, record.name.clone());
    shared
        .with_store(move |store| {
            let mut tx = store.begin();
            tx.delete_snapshot(state);
            tx.delete_record(TemplateRecord::KIND, &key);
            Ok(tx.commit_durable()?)
        })
        .await?;
    shared.registry.remove_template(name);
    Ok(record)
}

fn check_raw_image(path: &Path) -> Result<()> {
    let fail = |why: String| {
        Err(Error::invalid(format!("the image {} {why}", path.display()))
            .hint("give the absolute path of a raw ext4 image on the daemon's machine"))
    };
    if !path.is_absolute() {
        return fail("is not an absolute path".to_owned());
    }
    match std::fs::metadata(path) {
        Err(error) => fail(format!("cannot be read: {error}")),
        Ok(meta) if !meta.is_file() => fail("is not a regular file".to_owned()),
        Ok(meta) if meta.len() == 0 || !meta.len().is_multiple_of(4_096) => {
            fail(format!("has {} bytes, which is not a multiple of 4096", meta.len()))
        }
        Ok(_) => Ok(()),
    }
}

fn import(store: &Store, name: &str, image: &Path, origin: String, progress: &Progress) -> Result<TemplateRecord> {
    let unreadable =
        |e: std::io::Error| Error::new(Kind::ImageMissing, format!("could not read {}: {e}", image.display()));
    let file = File::open(image).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    let mut tx = store.begin();
    let disk_id = tx.create_disk(&new_id("import"), size);
    tx.commit_durable()?;
    let imported = (|| {
        let disk = store.disk(disk_id)?;
        let data_bytes = copy_data(&file, size, &disk, progress).map_err(|e| match e {
            Copy::Read(e) => unreadable(e),
            Copy::Store(e) => e.into(),
        })?;
        disk.flush()?;
        progress("packing".to_owned());
        store.seal()?;
        let mut tx = store.begin();
        let snapshot = tx.snapshot(disk_id, &new_id("template"));
        tx.delete_disk(disk_id);
        let record = TemplateRecord {
            name: name.to_owned(),
            snapshot,
            disk_size_bytes: size,
            data_bytes,
            origin,
            created_at: Timestamp::now(),
        };
        tx.put_record(TemplateRecord::KIND, name, record.encode()?);
        tx.commit_durable()?;
        Ok(record)
    })();
    if imported.is_err() {
        let mut tx = store.begin();
        tx.delete_disk(disk_id);
        if let Err(error) = tx.commit_durable() {
            tracing::warn!(%error, "a half-imported disk stays until the next start");
        }
    }
    imported
}

enum Copy {
    Read(std::io::Error),
    Store(storage::Error),
}

/// Copies what is not zero, and says how much that was. Holes of the file are not read.
fn copy_data(file: &File, size: u64, disk: &Disk, progress: &Progress) -> std::result::Result<u64, Copy> {
    const CHUNK: usize = 1 << 20;
    let mut buffer = vec![0; CHUNK];
    let (mut offset, mut copied, mut told) = (0, 0, 0);
    while offset < size {
        offset = next_data(file, offset, size);
        let len = CHUNK.min((size - offset) as usize);
        let chunk = &mut buffer[..len];
        file.read_exact_at(chunk, offset).map_err(Copy::Read)?;
        for run in data_runs(chunk) {
            disk.write(offset + run.start as u64, &chunk[run.clone()]).map_err(Copy::Store)?;
            copied += run.len() as u64;
        }
        offset += len as u64;
        if copied - told >= 64 << 20 {
            told = copied;
            progress(format!("imported {} MiB", copied >> 20));
        }
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_image_is_refused_before_anything_is_built() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("odd");
        std::fs::write(&odd, b"not a multiple").unwrap();
        for path in [Path::new("relative.raw"), &dir.path().join("absent"), dir.path(), &odd] {
            let error = check_raw_image(path).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{}", path.display());
            assert!(error.hint_text().is_some());
        }
    }
}
