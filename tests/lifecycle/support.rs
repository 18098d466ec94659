//! An engine of one's own, and short words for what tests do with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use miosa::engine::attach::{AttachedDisk, DiskFrontend, ROOT, Slot};
use miosa::engine::error::{Error, Kind, Result};
use miosa::engine::lifecycle::State;
use miosa::engine::{
    BootFiles, BuildRequest, CreateRequest, Engine, ExecEvent, ExecSpec, ForkRequest, ImageSource, Origin, Parts,
    Progress, SandboxView, Settings, SnapshotRequest, TemplateBuilder,
};
use storage::{Disk, DiskId, Options, Store};
use tempfile::TempDir;
use vmm::fake::StepHook;
use vmm::{DiskAttachment, FakeVmm};

/// What the template's disk holds at its start, and at its end.
pub const MARK: &[u8; 8] = b"template";
pub const DISK_BYTES: u64 = 4 << 20;

/// An engine and what it is made of.
pub struct World {
    pub engine: Arc<Engine>,
    pub store: Store,
    pub vmm: Arc<FakeVmm>,
    pub dir: Dir,
    /// Shows disks; knows which.
    pub front: Arc<NoFrontend>,
    run_root: PathBuf,
    /// What it came from, which knows nothing of its own end.
    pub _before: Option<Box<World>>,
}

/// A directory that goes with all that is in it.
pub struct Dir(TempDir);

impl std::ops::Deref for Dir {
    type Target = TempDir;

    fn deref(&self) -> &TempDir {
        &self.0
    }
}

impl Drop for Dir {
    /// Threads of guests that were killed while they started may write a little longer, and make anew what was removed.
    fn drop(&mut self) {
        let began = std::time::Instant::now();
        let mut gone = 0;
        while gone < 3 && began.elapsed() < Duration::from_secs(10) {
            let _ = std::fs::remove_dir_all(self.path());
            gone = if self.path().exists() { 0 } else { gone + 1 };
            std::thread::sleep(Duration::from_millis(10));
        }
    }
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
        World::over(store, dir, settings).await
    }

    /// An engine on any store; what is no store's is in `dir`.
    pub async fn over(store: Store, dir: TempDir, settings: Settings) -> World {
        let vmm = Arc::new(FakeVmm::new(dir.path().join("guests")));
        let run_root = dir.path().join("run");
        World::with_machines(store, dir, settings, vmm, run_root).await
    }

    /// An engine that may find machines.
    async fn with_machines(
        store: Store,
        dir: TempDir,
        settings: Settings,
        vmm: Arc<FakeVmm>,
        run_root: PathBuf,
    ) -> World {
        let front = Arc::new(NoFrontend::default());
        let parts = Parts {
            store: store.clone(),
            vmm: vmm.clone(),
            disks: front.clone(),
            templates: Arc::new(NoImages),
            settings: Settings { run_root: run_root.clone(), ..settings },
        };
        let engine = Engine::open(parts).await.unwrap();
        World { engine, store, vmm, dir: Dir(dir), front, run_root, _before: None }
    }

    /// As after `kill -9` of the daemon alone and a new start: as [`World::crash`], and its machines go on.
    pub async fn replace(self) -> World {
        let copy = self.copy_of_store();
        let (vmm, run_root) = (self.vmm.clone(), self.run_root.clone());
        let store = Store::open(&copy.path().join("store"), Options::default()).unwrap();
        let mut next = World::with_machines(store, copy, Settings::default(), vmm, run_root).await;
        next._before = Some(Box::new(self));
        next
    }

    /// As after `kill -9` of daemon and machines, and a new start: nothing is stopped, and the new engine has a copy of
    /// what is on disk.
    pub async fn crash(self) -> World {
        let copy = self.copy_of_store();
        let mut next = World::open(copy, Settings::default()).await;
        next._before = Some(Box::new(self));
        next
    }

    /// The store's files as they are at one moment: copied again if something changed meanwhile.
    fn copy_of_store(&self) -> TempDir {
        self.store.flush().unwrap();
        let from = self.dir.path().join("store");
        loop {
            let copy = tempfile::tempdir().unwrap();
            let before = files(&from);
            copy_files(&before, &from, &copy.path().join("store"));
            if files(&from) == before {
                return copy;
            }
        }
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

    pub fn run_dir(&self, id: &str) -> PathBuf {
        self.run_root.join(id)
    }

    pub fn disk(&self, id: DiskId) -> Disk {
        self.store.disk(id).unwrap()
    }

    /// Waits until a sandbox is in a state.
    pub async fn until(&self, key: &str, state: State) {
        self.until_true(|| self.state(key) == state).await;
    }

    /// Looks again and again; gives up after three minutes of real time.
    pub async fn until_true(&self, condition: impl Fn() -> bool) {
        let began = std::time::Instant::now();
        while !condition() {
            assert!(began.elapsed() < Duration::from_secs(180), "did not come true in three minutes");
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
        dedup_domain: None,
        metadata: serde_json::Map::new(),
        tags: Vec::new(),
        volumes: Vec::new(),
        publish_ports: Vec::new(),
        without_memory: false,
        start: true,
        wait: false,
    }
}

/// A snapshot of this name.
pub fn named(name: &str) -> SnapshotRequest {
    SnapshotRequest { comment: Some(name.to_owned()), ..SnapshotRequest::default() }
}

pub fn forks(name: &str, count: u32) -> ForkRequest {
    ForkRequest {
        name: Some(name.to_owned()),
        count,
        snapshot: None,
        memory: false,
        timeout: None,
        metadata: None,
        wait: false,
    }
}

/// Files below a directory, with their sizes and times.
fn files(dir: &Path) -> BTreeMap<PathBuf, (u64, SystemTime)> {
    let mut found = BTreeMap::new();
    for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        match std::fs::metadata(&path) {
            Ok(entry) if entry.is_dir() => found.extend(files(&path)),
            Ok(entry) => drop(found.insert(path, (entry.len(), entry.modified().unwrap()))),
            Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{}", path.display()),
        }
    }
    found
}

/// Copies files that may go at any moment.
fn copy_files(files: &BTreeMap<PathBuf, (u64, SystemTime)>, from: &Path, to: &Path) {
    for path in files.keys() {
        let target = to.join(path.strip_prefix(from).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        if let Err(error) = std::fs::copy(path, target) {
            assert_eq!(error.kind(), ErrorKind::NotFound, "{}", path.display());
        }
    }
}

/// The kind of a refusal.
pub fn refused<T: std::fmt::Debug>(outcome: Result<T>) -> Kind {
    outcome.expect_err("was not refused").kind()
}

/// Shows disks to nobody, as a front end whose machines can wait for it would.
#[derive(Default)]
pub struct NoFrontend {
    /// What is shown now: the ids of sandboxes, and after them those of volumes.
    pub shown: Arc<Mutex<BTreeSet<String>>>,
    /// Told before each step, as machines tell theirs.
    pub hook: Mutex<Option<StepHook>>,
}

impl NoFrontend {
    fn step(&self, name: &'static str) {
        let hook = self.hook.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook(name);
        }
    }
}

impl DiskFrontend for NoFrontend {
    fn attach(&self, slot: Slot<'_>, disk: Disk) -> Result<Box<dyn AttachedDisk>> {
        assert!(slot.run_dir.is_dir());
        self.step("attach");
        let id = match (slot.serial, disk.is_read_only()) {
            (ROOT, false) => slot.sandbox.to_owned(),
            (serial, false) => format!("{} {serial}", slot.sandbox),
            (serial, true) => format!("{} {serial} for reading", slot.sandbox),
        };
        assert!(self.shown.lock().unwrap().insert(id.clone()), "{id} is shown twice");
        let hook = self.hook.lock().unwrap().clone();
        let (socket, shown) = (slot.run_dir.join(slot.serial), self.shown.clone());
        Ok(Box::new(NoFrontendDisk { socket, id, shown, hook, _disk: disk }))
    }
}

struct NoFrontendDisk {
    socket: PathBuf,
    id: String,
    shown: Arc<Mutex<BTreeSet<String>>>,
    hook: Option<StepHook>,
    _disk: Disk,
}

impl AttachedDisk for NoFrontendDisk {
    fn attachment(&self) -> DiskAttachment {
        DiskAttachment::VhostUserBlk { socket: self.socket.clone() }
    }

    fn detach(self: Box<Self>) {
        if let Some(hook) = &self.hook {
            hook("detach");
        }
        self.shown.lock().unwrap().remove(&self.id);
    }
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
