//! An engine of one's own, and short words for what tests do with it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use miosa::engine::attach::{AttachedDisk, DiskFrontend};
use miosa::engine::error::{Error, Kind, Result};
use miosa::engine::lifecycle::State;
use miosa::engine::{
    BootFiles, BuildRequest, CreateRequest, Engine, ExecEvent, ExecSpec, ForkRequest, ImageSource, Origin, Parts,
    Progress, SandboxView, Settings, SnapshotRequest, TemplateBuilder,
};
use storage::{Disk, DiskId, Options, Store};
use tempfile::TempDir;
use vmm::{DiskAttachment, FakeVmm};

/// What the template's disk holds at its start, and at its end.
pub const MARK: &[u8; 8] = b"template";
pub const DISK_BYTES: u64 = 4 << 20;

/// An engine and what it is made of.
pub struct World {
    pub engine: Arc<Engine>,
    pub store: Store,
    pub vmm: Arc<FakeVmm>,
    pub dir: TempDir,
    /// What it came from, which knows nothing of its own end.
    pub _before: Option<Box<World>>,
}

impl World {
    /// An engine with a template `base`.
    pub async fn new() -> World {
        let world = World::open(tempfile::tempdir().unwrap(), Settings::default()).await;
        world.import("base").await;
        world
    }

    /// The same with settings of one's own.
    pub async fn with(settings: Settings) -> World {
        let world = World::open(tempfile::tempdir().unwrap(), settings).await;
        world.import("base").await;
        world
    }

    pub async fn open(dir: TempDir, settings: Settings) -> World {
        let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
        let vmm = Arc::new(FakeVmm::new(dir.path().join("guests")));
        let parts = Parts {
            store: store.clone(),
            vmm: vmm.clone(),
            disks: Arc::new(NoFrontend),
            templates: Arc::new(NoImages),
            settings: Settings { run_root: dir.path().join("run"), ..settings },
        };
        let engine = Engine::open(parts).await.unwrap();
        World { engine, store, vmm, dir, _before: None }
    }

    /// As after `kill -9` and a new start: nothing is stopped, and the new engine has a copy of what is on disk.
    pub async fn crash(self) -> World {
        self.store.flush().unwrap();
        let copy = tempfile::tempdir().unwrap();
        copy_dir(&self.dir.path().join("store"), &copy.path().join("store"));
        let mut next = World::open(copy, Settings::default()).await;
        next._before = Some(Box::new(self));
        next
    }

    /// Imports a small image.
    pub async fn import(&self, name: &str) {
        let path = self.dir.path().join("image");
        let mut image = vec![0; DISK_BYTES as usize];
        image[..8].copy_from_slice(MARK);
        image[DISK_BYTES as usize - 8..].copy_from_slice(MARK);
        std::fs::write(&path, image).unwrap();
        let source = ImageSource::File { path, format: None, disk_bytes: None };
        let request = BuildRequest { name: name.to_owned(), source, no_cache: false };
        self.engine.build_template(request, |_| {}).await.unwrap();
    }

    /// A running sandbox.
    pub async fn create(&self, name: &str) -> SandboxView {
        self.engine.create(CreateRequest { wait: true, ..wanted(name) }).await.unwrap()
    }

    pub fn state(&self, key: &str) -> State {
        self.engine.show(key).unwrap().record.state
    }

    pub fn disk(&self, id: DiskId) -> Disk {
        self.store.disk(id).unwrap()
    }

    /// Waits until a sandbox is in a state.
    pub async fn until(&self, key: &str, state: State) {
        self.until_true(|| self.state(key) == state).await;
    }

    /// Looks again and again; gives up after a minute of real time.
    pub async fn until_true(&self, condition: impl Fn() -> bool) {
        let began = std::time::Instant::now();
        while !condition() {
            assert!(began.elapsed() < Duration::from_secs(60), "did not come true in a minute");
            // Real time: tests stop tokio's.
            tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_millis(2))).await.unwrap();
        }
    }

    /// Runs a line of shell; its output and exit code.
    pub async fn sh(&self, key: &str, line: &str) -> Result<(String, Option<i32>)> {
        let mut exec = self.engine.exec(key, sh(line)).await?;
        let mut out = Vec::new();
        loop {
            match exec.next_event().await? {
                Some(ExecEvent::Stdout(bytes)) => out.extend_from_slice(&bytes),
                Some(ExecEvent::Stderr(_)) => {}
                Some(ExecEvent::Exit { code, .. }) => return Ok((String::from_utf8(out).unwrap(), code)),
                None => return Err(Error::new(Kind::Internal, "no exit")),
            }
        }
    }
}

pub fn sh(line: &str) -> ExecSpec {
    ExecSpec { argv: vec!["sh".into(), "-c".into(), line.into()], ..ExecSpec::default() }
}

pub fn wanted(name: &str) -> CreateRequest {
    CreateRequest {
        origin: Origin::Template("base".into()),
        name: Some(name.to_owned()),
        cpus: 1,
        memory_mib: 256,
        disk_mib: None,
        timeout: None,
        idle_timeout: None,
        persistent: true,
        env: BTreeMap::new(),
        network_policy: Default::default(),
        metadata: serde_json::Map::new(),
        tags: Vec::new(),
        start: true,
        wait: false,
    }
}

/// A snapshot of this name.
pub fn named(name: &str) -> SnapshotRequest {
    SnapshotRequest { comment: Some(name.to_owned()), ..SnapshotRequest::default() }
}

pub fn forks(name: &str, count: u32) -> ForkRequest {
    ForkRequest { name: Some(name.to_owned()), count, snapshot: None, timeout: None, metadata: None, wait: false }
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The kind of a refusal.
pub fn refused<T: std::fmt::Debug>(outcome: Result<T>) -> Kind {
    outcome.expect_err("was not refused").kind()
}

struct NoFrontend;

impl DiskFrontend for NoFrontend {
    fn attach(&self, _: &str, run_dir: &Path, disk: Disk) -> Result<Box<dyn AttachedDisk>> {
        assert!(run_dir.is_dir());
        Ok(Box::new(NoFrontendDisk { path: run_dir.join("disk"), _disk: disk }))
    }
}

struct NoFrontendDisk {
    path: PathBuf,
    _disk: Disk,
}

impl AttachedDisk for NoFrontendDisk {
    fn attachment(&self) -> DiskAttachment {
        DiskAttachment::RawFile { path: self.path.clone() }
    }

    fn detach(self: Box<Self>) {}
}

struct NoImages;

#[async_trait]
impl TemplateBuilder for NoImages {
    async fn boot_files(&self) -> Result<BootFiles> {
        Ok(BootFiles { kernel: "/none/kernel".into(), initramfs: "/none/initramfs".into() })
    }

    async fn prepare_boot_files(&self, _: Progress) -> Result<()> {
        Ok(())
    }

    async fn build_base(&self, _: u64, _: Progress) -> Result<(PathBuf, String)> {
        Err(Error::new(Kind::ImageMissing, "tests import"))
    }
}
