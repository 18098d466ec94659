//! Templates: states that sandboxes start from.
//!
//! An image is imported once: blocks that are zero are skipped, the rest is written to a disk, sealed (so that it costs
//! what is unique in it, compressed) and kept as a state that nothing writes to any more. The disk itself goes in the
//! transaction that registers the state; if the daemon dies before, recovery deletes it. A recipe goes on from such a
//! state, step by step, in a sandbox: see [`build`].

pub(super) mod booted;
mod build;
mod builds;
pub(super) mod spare;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use storage::{Disk, SnapshotId, Source, Store, Transaction};
use tracing::Instrument;
use vmm::image::{ImageFormat, ReadyImage};

use super::error::{Error, Kind, Result};
use super::recipe::Recipe;
use super::records::{BootedRecord, Record, SandboxRecord, StepRecord, TemplateRecord, check_name, load_all, new_id};
use super::{Engine, Shared};
use crate::sparse::{data_runs, next_data};

pub(super) use builds::Builds;
pub use builds::{BuildStatus, BuildView};

/// The template that sandboxes start from unless asked otherwise.
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

    /// Makes the raw image of a bare root file system, and says where it is and what is in it. It may be kept for next
    /// time; its name changes with what is in it.
    async fn build_base(&self, size_bytes: u64, progress: Progress) -> Result<(PathBuf, String)>;

    /// Makes a file ready to be imported; one that no machine will ever boot is taken as it is.
    async fn prepare_image(
        &self,
        file: &Path,
        _: Option<ImageFormat>,
        _disk_bytes: u64,
        _: Progress,
    ) -> Result<ReadyImage> {
        Ok(ReadyImage::whole(file.to_owned(), format!("image {}", file.display()))?)
    }
}

/// What a template is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// Another template, and what is done to it.
    Recipe(Box<Recipe>),
    /// A file on the daemon's machine.
    File {
        /// Its absolute path.
        path: PathBuf,
        /// What it is, if that is not to be seen in its first bytes.
        format: Option<ImageFormat>,
        /// Size of the disk: of an archive's, or a larger one than an image has. Not given: 10 GiB, or the image's.
        disk_bytes: Option<u64>,
    },
}

/// A template to be made; one of this name is replaced.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// Its name.
    pub name: String,
    /// What it is made of.
    pub source: ImageSource,
    /// Do all steps anew, also those that were done before.
    pub no_cache: bool,
}

/// What a template costs, with the states that its builds kept, which go with it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TemplateUsage {
    /// Bytes in packs of everything they refer to.
    pub referenced_bytes: u64,
    /// Of those, what nothing else refers to: about what deleting the template gives back.
    pub exclusive_bytes: u64,
}

/// Disk of an imported archive, unless asked otherwise.
const DISK_BYTES: u64 = 10 << 30;

impl Engine {
    /// Templates, by name.
    pub fn templates(&self) -> Vec<TemplateRecord> {
        self.shared.registry.templates()
    }

    /// One template.
    pub fn template(&self, name: &str) -> Result<TemplateRecord> {
        self.shared.registry.template(name)
    }

    /// How many sandboxes that are there came from this template, through any snapshots and forks in between.
    pub fn sandboxes_from(&self, template: &str) -> usize {
        self.list(None).iter().filter(|v| v.record.template.as_deref() == Some(template)).count()
    }

    /// What one template costs, or all, in the order asked for. Walks their maps.
    pub async fn template_usage(&self, templates: &[TemplateRecord]) -> Result<Vec<TemplateUsage>> {
        let wanted: Vec<(String, SnapshotId)> = templates.iter().map(|t| (t.name.clone(), t.snapshot)).collect();
        self.shared
            .with_store(move |store| {
                let steps: Vec<StepRecord> = load_all(store)?;
                let booted: Vec<BootedRecord> = load_all(store)?;
                let group = |(name, state): &(String, SnapshotId)| {
                    let kept = steps.iter().filter(|step| step.template == *name).map(|step| step.snapshot);
                    let booted = || booted.iter().filter(|b| b.template == *state);
                    let states = std::iter::once(*state).chain(kept).chain(booted().map(|b| b.disk));
                    let memories = booted().map(|b| Source::Disk(b.memory.disk));
                    states.map(Source::Snapshot).chain(memories).collect()
                };
                let groups: Vec<Vec<Source>> = wanted.iter().map(group).collect();
                let costs = store.usage_of_groups(&groups)?;
                let usage = |cost: &storage::GroupUsage| TemplateUsage {
                    referenced_bytes: cost.referenced_bytes,
                    exclusive_bytes: cost.exclusive_bytes,
                };
                Ok(costs.iter().map(usage).collect())
            })
            .await
    }

    /// Builds or imports a template; `progress` hears about the steps.
    pub async fn build_template(
        self: &Arc<Self>,
        request: BuildRequest,
        progress: impl Fn(String) + Send + Sync + 'static,
    ) -> Result<TemplateRecord> {
        let (engine, build) = (self.clone(), self.begin_build(&request)?);
        self.detached(async move { engine.run_build(build, request, Arc::new(progress)).await }).await
    }

    /// The same, answering at once; [`Engine::builds`] tells how it goes.
    pub fn start_build(self: &Arc<Self>, request: BuildRequest) -> Result<BuildView> {
        let (engine, build) = (self.clone(), self.begin_build(&request)?);
        let begun = build.view();
        tokio::spawn(async move { engine.run_build(build, request, Arc::new(|_| {})).await }.in_current_span());
        Ok(begun)
    }

    /// Builds of a template that are going on or over, oldest first. They are forgotten with the daemon's end.
    pub fn builds(&self, template: Option<&str>) -> Vec<BuildView> {
        self.shared.builds.list(template)
    }

    /// One build.
    pub fn build(&self, id: &str) -> Result<BuildView> {
        self.shared.builds.list(None).into_iter().find(|build| build.id == id).ok_or_else(|| {
            Error::new(Kind::TemplateNotFound, format!("there is no build {id:?}"))
                .hint("builds are remembered until the daemon ends")
        })
    }

    fn begin_build(&self, request: &BuildRequest) -> Result<builds::Build> {
        self.shared.check_open()?;
        check_name("template", &request.name)?;
        match &request.source {
            ImageSource::File { path, .. } => check_file(path)?,
            ImageSource::Recipe(recipe) => recipe.check()?,
        }
        let claim = self.shared.registry.claim_template(&request.name)?;
        Ok(self.shared.builds.begin(&request.name, claim))
    }

    /// Boxed, for a build may begin with another.
    fn run_build(
        self: Arc<Self>,
        build: builds::Build,
        request: BuildRequest,
        progress: Progress,
    ) -> Pin<Box<dyn Future<Output = Result<TemplateRecord>> + Send>> {
        Box::pin(async move {
            let told = build.hears(progress);
            let done = build_claimed(&self, request, told).await;
            build.end(done.as_ref().err());
            done
        })
    }

    /// Deletes a template and what its builds kept. Sandboxes made from it do not need it.
    pub async fn delete_template(&self, name: &str) -> Result<TemplateRecord> {
        let (shared, name) = (self.shared.clone(), name.to_owned());
        self.detached(async move { delete(&shared, &name).await }).await
    }
}

/// Tags a sandbox in which a template is built.
const BENCH_TAG: &str = "template-build";

/// Whether a template is built in this sandbox: it ends with its build.
pub(super) fn is_bench(record: &SandboxRecord) -> bool {
    !record.persistent && record.tags.iter().any(|tag| tag == BENCH_TAG)
}

async fn find_acceleration(shared: Arc<Shared>) {
    if let Ok(boot) = shared.templates.boot_files().await {
        shared.acceleration(&boot).await;
    }
}

/// Makes a template whose name is claimed.
async fn build_claimed(engine: &Arc<Engine>, request: BuildRequest, progress: Progress) -> Result<TemplateRecord> {
    let shared = &engine.shared;
    shared.templates.prepare_boot_files(progress.clone()).await?;
    // While an image is made, so that the first sandbox does not wait for it.
    tokio::spawn(find_acceleration(shared.clone()));
    match request.source {
        ImageSource::Recipe(recipe) => build::run(engine, &request.name, *recipe, request.no_cache, &progress).await,
        ImageSource::File { path, format, disk_bytes } => {
            let wanted = disk_bytes.unwrap_or(DISK_BYTES);
            let image = shared.templates.prepare_image(&path, format, wanted, progress.clone()).await?;
            if disk_bytes.is_some_and(|wanted| wanted < image.len) {
                let message = format!("the image has {} MiB, and does not fit a smaller disk", image.len >> 20);
                return Err(Error::invalid(message).hint("leave out --disk, or ask for a larger one"));
            }
            import_template(shared, request.name, image, disk_bytes, &progress).await
        }
    }
}

async fn import_template(
    shared: &Arc<Shared>,
    name: String,
    image: ReadyImage,
    disk_bytes: Option<u64>,
    progress: &Progress,
) -> Result<TemplateRecord> {
    let old = shared.registry.template(&name).ok();
    let replaced = old.as_ref().map(|old| old.snapshot);
    let told = progress.clone();
    let record = shared
        .with_store(move |store| {
            let size = disk_bytes.unwrap_or(0).max(image.len);
            import(store, &image, size, &told, |tx, snapshot, data_bytes| {
                let record = TemplateRecord {
                    name,
                    snapshot,
                    disk_size_bytes: size,
                    data_bytes,
                    origin: image.origin.clone(),
                    created_at: Timestamp::now(),
                    image: image.config.clone(),
                    cpus: None,
                    memory_mib: None,
                    recipe: None,
                    built_on: None,
                };
                put_template(tx, &record, old.as_ref())?;
                Ok(record)
            })
        })
        .await?;
    registered(shared, &record, replaced).await;
    Ok(record)
}

/// A template is there from now on, in the place of one whose state is gone.
async fn registered(shared: &Arc<Shared>, record: &TemplateRecord, replaced: Option<SnapshotId>) {
    shared.registry.insert_template(record.clone());
    if let Some(old) = replaced {
        spare::forget_of(shared, old).await;
        booted::forget_of(shared, old).await;
    }
}

/// Registers a template, and gives up the state of the one it replaces.
fn put_template(tx: &mut Transaction<'_>, record: &TemplateRecord, old: Option<&TemplateRecord>) -> Result<()> {
    if let Some(old) = old {
        tx.delete_snapshot(old.snapshot);
    }
    tx.put_record(TemplateRecord::KIND, &record.name, record.encode()?);
    Ok(())
}

async fn delete(shared: &Arc<Shared>, name: &str) -> Result<TemplateRecord> {
    let _deleting = shared.registry.claim_template(name)?;
    let record = shared.registry.template(name)?;
    let (state, key) = (record.snapshot, record.name.clone());
    shared
        .with_store(move |store| {
            let mut tx = store.begin();
            tx.delete_snapshot(state);
            tx.delete_record(TemplateRecord::KIND, &key);
            for step in load_all::<StepRecord>(store)?.iter().filter(|step| step.template == key) {
                tx.delete_snapshot(step.snapshot);
                tx.delete_record(StepRecord::KIND, &step.digest);
            }
            Ok(tx.commit_durable()?)
        })
        .await?;
    shared.registry.remove_template(name);
    spare::forget_of(shared, state).await;
    booted::forget_of(shared, state).await;
    Ok(record)
}

fn check_file(path: &Path) -> Result<()> {
    let fail = |why: String| {
        Err(Error::invalid(format!("the image {} {why}", path.display()))
            .hint("give the absolute path of an image or archive on the daemon's machine"))
    };
    if !path.is_absolute() {
        return fail("is not an absolute path".to_owned());
    }
    match std::fs::metadata(path) {
        Err(error) => fail(format!("cannot be read: {error}")),
        Ok(meta) if !meta.is_file() => fail("is not a regular file".to_owned()),
        Ok(meta) if meta.len() == 0 => fail("is empty".to_owned()),
        Ok(_) => Ok(()),
    }
}

/// Imports an image into a disk of `size` bytes, seals it, and keeps it as a state; `register` puts what names the state
/// into the same transaction.
fn import<T>(
    store: &Store,
    image: &ReadyImage,
    size: u64,
    progress: &Progress,
    register: impl FnOnce(&mut Transaction<'_>, SnapshotId, u64) -> Result<T>,
) -> Result<T> {
    let unreadable =
        |e: std::io::Error| Error::new(Kind::ImageMissing, format!("could not read {}: {e}", image.path.display()));
    let file = File::open(&image.path).map_err(unreadable)?;
    if image.len == 0 || !image.len.is_multiple_of(4_096) || !size.is_multiple_of(4_096) {
        let message =
            format!("the image {} has {} bytes, which is not a multiple of 4096", image.path.display(), image.len);
        return Err(Error::invalid(message).hint("pad it with zeroes: truncate -s %4096 FILE"));
    }
    progress("importing the image".to_owned());
    let mut tx = store.begin();
    let disk_id = tx.create_disk(&new_id("import"), size);
    tx.commit_durable()?;
    let imported = (|| {
        let disk = store.disk(disk_id)?;
        let data_bytes = copy_data(&file, image.offset, image.len, &disk, progress).map_err(|e| match e {
            Copy::Read(e) => unreadable(e),
            Copy::Store(e) => e.into(),
        })?;
        disk.flush()?;
        progress("packing".to_owned());
        store.seal()?;
        let mut tx = store.begin();
        let snapshot = tx.snapshot(disk_id, &new_id("template"));
        tx.delete_disk(disk_id);
        let registered = register(&mut tx, snapshot, data_bytes)?;
        tx.commit_durable()?;
        Ok(registered)
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

pub(super) enum Copy {
    Read(std::io::Error),
    Store(storage::Error),
}

/// Copies what is not zero, and says how much that was. Holes of the file are not read.
pub(super) fn copy_data(
    file: &File,
    from: u64,
    size: u64,
    disk: &Disk,
    progress: &Progress,
) -> std::result::Result<u64, Copy> {
    const CHUNK: usize = 1 << 20;
    let mut buffer = vec![0; CHUNK];
    let (mut offset, mut copied, mut told) = (0, 0, 0);
    while offset < size {
        offset = next_data(file, from + offset, from + size) - from;
        if offset >= size {
            break;
        }
        let len = CHUNK.min((size - offset) as usize);
        let chunk = &mut buffer[..len];
        file.read_exact_at(chunk, from + offset).map_err(Copy::Read)?;
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
    fn a_bad_file_is_refused_before_anything_is_built() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        for path in [Path::new("relative.raw"), &dir.path().join("absent"), dir.path(), &empty] {
            let error = check_file(path).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{}", path.display());
            assert!(error.hint_text().is_some());
        }
    }
}
