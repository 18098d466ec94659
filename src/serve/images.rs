//! What machines boot, made by `vmm::image` and kept in the cache and the state directory.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use vmm::image::{self, ImageFormat, ReadyImage};

use crate::engine::error::{Error, Kind, Result};
use crate::engine::{BootFiles, Progress, TemplateBuilder};

/// Where archives are unpacked, beside the boot files.
const IMPORTS: &str = "imports";

/// Kernel, initramfs and the base image of real machines.
pub(super) struct Images {
    cache: PathBuf,
    boot: PathBuf,
    agent: Option<PathBuf>,
    /// One build at a time; others find what it made.
    building: tokio::sync::Mutex<()>,
}

impl Images {
    pub(super) fn new(cache: PathBuf, boot: PathBuf, agent: Option<PathBuf>) -> Self {
        // Of an import that the daemon's death cut off.
        let _ = std::fs::remove_dir_all(boot.join(IMPORTS));
        Self { cache, boot, agent, building: tokio::sync::Mutex::default() }
    }

    /// Fetches what is missing and makes the initramfs anew if the agent is another.
    async fn make(&self, progress: Option<Progress>) -> Result<BootFiles> {
        let _building = self.building.lock().await;
        let agent = self.agent.clone().ok_or_else(|| {
            Error::new(Kind::ImageMissing, "the guest's agent is not next to miosa")
                .hint("build it (cargo build --release -p miosa-agent) and name it: miosa daemon --agent FILE")
        })?;
        let (cache, boot) = (self.cache.clone(), self.boot.clone());
        let tell = move |step: &str| {
            if let Some(progress) = &progress {
                progress(step.to_owned());
            }
        };
        blocking(move || {
            std::fs::create_dir_all(&boot).map_err(|e| {
                Error::new(Kind::ImageMissing, format!("could not make the directory {}: {e}", boot.display()))
            })?;
            tell("fetching the kernel, unless it is there");
            let kernel = image::fetch_kernel(&cache)?;
            tell("making the initramfs, unless it is there");
            let initramfs = boot.join("initramfs");
            image::build_initramfs(&kernel, &agent, &initramfs)?;
            Ok(BootFiles { kernel: kernel.vmlinuz, initramfs })
        })
        .await
    }
}

#[async_trait]
impl TemplateBuilder for Images {
    async fn boot_files(&self) -> Result<BootFiles> {
        // A few milliseconds when all is there; a new agent, or a cache that was emptied, is put right.
        self.make(None).await
    }

    async fn prepare_boot_files(&self, progress: Progress) -> Result<()> {
        self.make(Some(progress)).await.map(drop)
    }

    async fn build_base(&self, size_bytes: u64, progress: Progress) -> Result<(PathBuf, String)> {
        let _building = self.building.lock().await;
        let cache = self.cache.clone();
        blocking(move || {
            // Named by what is in it, so that another version makes another.
            let image = cache.join(format!("base-{}-{}m.raw", image::base_version(), size_bytes >> 20));
            image::build_base_rootfs(&cache, &image, size_bytes, |line| progress(line.to_owned()))?;
            Ok((image, "Debian with python3, pip and git".to_owned()))
        })
        .await
    }

    async fn prepare_image(
        &self,
        file: &Path,
        format: Option<ImageFormat>,
        disk_bytes: u64,
        progress: Progress,
    ) -> Result<ReadyImage> {
        let (file, work) = (file.to_owned(), self.boot.join(IMPORTS));
        blocking(move || Ok(image::prepare(&file, format, disk_bytes, &work, &mut |line| progress(line.to_owned()))?))
            .await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::new(Kind::Internal, format!("a build did not end: {e}")))?
}

/// Fake machines boot nothing. A file is taken as it is, unless it is said to be of some format.
pub(super) struct FakeImages {
    /// Where archives are unpacked.
    pub(super) work: PathBuf,
}

#[async_trait]
impl TemplateBuilder for FakeImages {
    async fn boot_files(&self) -> Result<BootFiles> {
        Ok(BootFiles {
            kernel: PathBuf::from("/nonexistent/kernel"),
            initramfs: PathBuf::from("/nonexistent/initramfs"),
        })
    }

    async fn prepare_boot_files(&self, _: Progress) -> Result<()> {
        Ok(())
    }

    async fn build_base(&self, _: u64, _: Progress) -> Result<(PathBuf, String)> {
        Err(Error::new(Kind::ImageMissing, "a daemon with fake machines builds no base image")
            .hint("import one: --image FILE"))
    }

    async fn prepare_image(
        &self,
        file: &Path,
        format: Option<ImageFormat>,
        disk_bytes: u64,
        _: Progress,
    ) -> Result<ReadyImage> {
        let (file, work) = (file.to_owned(), self.work.clone());
        blocking(move || match format {
            Some(_) => Ok(image::prepare(&file, format, disk_bytes, &work, &mut |_| {})?),
            None => Ok(ReadyImage::whole(file.clone(), format!("image {}", file.display()))?),
        })
        .await
    }
}
