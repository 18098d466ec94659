//! What a client can ask of the daemon: any route with any path, query and body. Answered in bounded time, and by no failure of
//! the daemon's own. Machines do not start here: programs of theirs would be this machine's.

#![no_main]

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use libfuzzer_sys::fuzz_target;
use miosa::api::server::{self, Defaults, Place};
use miosa::config::StateDir;
use miosa::disks::Disks;
use miosa::engine::attach::{AttachedDisk, DiskFrontend, Slot};
use miosa::engine::error::{Error, Kind, Result};
use miosa::engine::{BootFiles, BuildRequest, Engine, ImageSource, Parts, Progress, Settings, TemplateBuilder};
use serde_json::{Value, json};
use storage::{Disk, Options, Store};
use tower::ServiceExt;
use vmm::{Accel, Acceleration, ErrorKind, Machine, MachineSpec, MachineState, Reaped, Vmm, WarmKey, machine::Loaded};

/// Inputs until all is made anew: what they make stays.
const RUNS: u64 = 2_000;
/// For one answer to begin. Waiting for a machine has an end, for none starts.
const PATIENCE: Duration = Duration::from_secs(20);

struct World {
    runtime: tokio::runtime::Runtime,
    router: Router,
    /// Hash of method and path, and these.
    routes: Vec<(u16, String, String)>,
    /// What is there, by the part of a path before it.
    known: Vec<(&'static str, String)>,
    runs: u64,
    _dir: tempfile::TempDir,
}

static WORLD: Mutex<Option<World>> = Mutex::new(None);
static PLACE: LazyLock<Place> = LazyLock::new(|| Place(Arc::new(())));

fuzz_target!(|data: &[u8]| {
    let Some((&[low, high, how], rest)) = data.split_first_chunk::<3>() else { return };
    let mut world = WORLD.lock().unwrap();
    if world.as_ref().is_none_or(|world| world.runs == RUNS) {
        *world = None;
        *world = Some(World::new());
    }
    let world = world.as_mut().unwrap();
    world.runs += 1;
    // Until the first zero byte what goes into path and query, then the body.
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
    let (words, body) = (&rest[..end], rest.get(end + 1..).unwrap_or_default());
    let mut words = words.split(|byte| *byte == b' ');
    let route = u16::from_le_bytes([low, high]);
    let at = world.routes.partition_point(|(hash, ..)| *hash < route) % world.routes.len();
    let (_, method, pattern) = &world.routes[at];
    let mut of = "";
    let parts = pattern.split('/').enumerate().map(|(n, part)| match std::mem::replace(&mut of, part) {
        _ if !part.starts_with('{') => part.to_owned(),
        of if how >> (n % 6) & 1 == 0 => world.known(of),
        _ => percent(words.next().unwrap_or_default()),
    });
    let path = parts.collect::<Vec<_>>().join("/");
    let query: Vec<String> =
        words.map(|word| word.split(|byte| *byte == b'=').map(percent).collect::<Vec<_>>().join("=")).collect();
    let uri = format!("{path}?{}", query.join("&"));
    let kind = if how & 0x80 == 0 { "application/json" } else { "application/octet-stream" };
    let request = Request::builder().method(&**method).uri(&uri).header(header::CONTENT_TYPE, kind);
    let request = request.header(header::HOST, "localhost").extension(PLACE.clone());
    let Ok(request) = request.body(Body::from(body.to_vec())) else { return };
    let router = world.router.clone();
    let answer = world.runtime.block_on(async { tokio::time::timeout(PATIENCE, router.oneshot(request)).await });
    let answer = answer.unwrap_or_else(|_| panic!("{method} {uri} is not answered")).unwrap();
    assert_ne!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR, "{method} {uri}");
});

fn percent(word: &[u8]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/{}".contains(&byte);
    word.iter().map(|b| if plain(*b) { char::from(*b).to_string() } else { format!("%{b:02x}") }).collect()
}

impl World {
    fn new() -> World {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, [7; 1 << 20]).unwrap();
        let router = runtime.block_on(async {
            let disks = Disks::open(store.clone(), &state, true).unwrap();
            let settings = Settings { run_root: state.run(), probe_dir: state.boot(), ..Settings::default() };
            let (vmm, templates) = (Arc::new(NoMachines), Arc::new(NoImages));
            let parts = Parts { store, vmm, disks: Arc::new(NoFrontend), templates, settings };
            let engine = Engine::open(parts).await.unwrap();
            let source = ImageSource::File { path: image, format: None, disk_bytes: None };
            let request = BuildRequest { name: "base".to_owned(), source, no_cache: false };
            engine.build_template(request, |_| {}).await.unwrap();
            server::open(server::router(engine, disks, Defaults { cpus: 1, memory_mib: 256, timeout: None }))
        });
        let mut world = World { runtime, router, routes: Vec::new(), known: Vec::new(), runs: 0, _dir: dir };
        let document = world.ask("GET", "/api/v1/openapi.json", &json!({}));
        for (path, methods) in document["paths"].as_object().unwrap() {
            for method in ["get", "post", "put", "patch", "delete"].into_iter().filter(|m| methods.get(m).is_some()) {
                let hash = blake3_of(&format!("{method} {path}"));
                world.routes.push((hash, method.to_uppercase(), path.clone()));
            }
        }
        world.routes.sort();
        let made = |world: &World, path: &str, body: Value| {
            let answer = world.ask("POST", &format!("/api/v1{path}"), &body);
            answer["data"]["id"].as_str().unwrap_or_else(|| panic!("{path}: {answer}")).to_owned()
        };
        let sandbox = made(&world, "/sandboxes", json!({ "template_id": "base", "name": "one", "auto_start": false }));
        let snapshot = made(&world, &format!("/sandboxes/{sandbox}/snapshot"), json!({ "name": "first" }));
        let disk = made(&world, "/disks", json!({ "name": "plain", "size_bytes": 1 << 20 }));
        let volume = made(&world, "/volumes", json!({ "name": "data", "size_mb": 16 }));
        world.known = vec![("sandboxes", sandbox), ("snapshots", snapshot), ("disks", disk), ("volumes", volume)];
        world
    }

    fn known(&self, of: &str) -> String {
        let found = self.known.iter().find(|(known, _)| *known == of);
        found.map_or_else(|| "base".to_owned(), |(_, id)| id.clone())
    }

    fn ask(&self, method: &str, uri: &str, body: &Value) -> Value {
        let request = Request::builder().method(method).uri(uri).header(header::CONTENT_TYPE, "application/json");
        let request = request.extension(PLACE.clone()).body(Body::from(body.to_string())).unwrap();
        self.runtime.block_on(async {
            let answer = self.router.clone().oneshot(request).await.unwrap();
            let bytes = axum::body::to_bytes(answer.into_body(), 8 << 20).await.unwrap();
            serde_json::from_slice(&bytes).unwrap_or(Value::Null)
        })
    }
}

fn blake3_of(text: &str) -> u16 {
    let hash = blake3::hash(text.as_bytes());
    u16::from_le_bytes([hash.as_bytes()[0], hash.as_bytes()[1]])
}

struct NoMachines;

fn none<T>() -> vmm::Result<T> {
    Err(vmm::Error::new(ErrorKind::StartFailed, "there are no machines here"))
}

#[async_trait]
impl Vmm for NoMachines {
    async fn start(&self, _: MachineSpec, _: Duration) -> vmm::Result<Arc<dyn Machine>> {
        none()
    }

    async fn warm_key(&self, _: &MachineSpec) -> vmm::Result<WarmKey> {
        none()
    }

    async fn warm(&self, _: &MachineSpec, _: &Path, _: Duration) -> vmm::Result<()> {
        none()
    }

    async fn state_key(&self, _: &MachineSpec) -> vmm::Result<String> {
        none()
    }

    async fn load(&self, _: MachineSpec, _: MachineState, _: Duration) -> vmm::Result<Box<dyn Loaded>> {
        none()
    }

    async fn survivors(&self, _: &Path) -> vmm::Result<Vec<PathBuf>> {
        Ok(Vec::new())
    }

    async fn adopt(&self, _: &Path, _: Duration) -> vmm::Result<Option<Arc<dyn Machine>>> {
        Ok(None)
    }

    async fn reap_orphans(&self, _: &Path, _: &[PathBuf]) -> vmm::Result<Vec<Reaped>> {
        Ok(Vec::new())
    }

    async fn probe_kvm(&self, _: &Path, _: &Path, _: &Path, _: &Path) -> Acceleration {
        Acceleration { accel: Accel::Tcg, reason: "told".to_owned() }
    }

    async fn version(&self) -> vmm::Result<String> {
        Ok("none".to_owned())
    }
}

struct NoImages;

#[async_trait]
impl TemplateBuilder for NoImages {
    async fn boot_files(&self) -> Result<BootFiles> {
        let file = PathBuf::from("/dev/null");
        Ok(BootFiles { kernel: file.clone(), initramfs: file })
    }

    async fn prepare_boot_files(&self, _: Progress) -> Result<()> {
        Ok(())
    }

    async fn build_base(&self, _: u64, _: Progress) -> Result<(PathBuf, String)> {
        Err(Error::new(Kind::ImageMissing, "there are no images here"))
    }
}

struct NoFrontend;

impl DiskFrontend for NoFrontend {
    fn attach(&self, _: Slot<'_>, _: Disk) -> Result<Box<dyn AttachedDisk>> {
        Err(Error::new(Kind::MachineUnavailable, "there are no front ends here"))
    }
}
