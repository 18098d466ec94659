//! The daemon: puts store, front end, machines, engine and API together, and takes them apart again in order.
//!
//! One daemon a state directory, held by a lock on a file. At the end (SIGTERM, SIGINT): no new operations, running
//! sandboxes are stopped and flushed, the store is closed, the socket goes. With SIGUSR2 it ends for another to take its
//! place: sessions are left as they are, for the next daemon to go on with. A second signal ends the daemon at once; what
//! was flushed is in the store, and the next start puts the rest right.

mod disks;
mod images;
mod listen;
mod proxy;

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::api::server::{self, Defaults, Keys};
use crate::config::{self, AccelArg, Config, NetworkArg, PreviewListen, StateDir, VmmArg};
use crate::disks::Disks;
use crate::engine::{self, Engine, GuestFile, GuestSetup, Parts, Settings, TemplateBuilder};
use listen::{Callers, Door};

/// Where previews are served if nothing was told.
const PREVIEW_PORT: u16 = 7080;

/// Beyond what guests may take to shut down: for flushing and closing.
const CLOSING: Duration = Duration::from_secs(15);

/// How long connections may take to end once everything is closed.
const DRAIN: Duration = Duration::from_secs(5);

/// How long a store that another process has open is waited for.
const STORE_WAIT: Duration = Duration::from_secs(5);

/// Why the daemon could not start, or did not end well.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Exit code.
    pub exit: u8,
    /// A stable word.
    pub code: &'static str,
    /// A sentence.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl Error {
    fn new(exit: u8, code: &'static str, message: String) -> Self {
        Self { exit, code, message, hint: None }
    }

    fn hint(mut self, hint: &str) -> Self {
        self.hint = Some(hint.to_owned());
        self
    }

    fn file(what: &str, path: &Path, error: &std::io::Error) -> Self {
        let exit = if error.kind() == std::io::ErrorKind::PermissionDenied { 3 } else { 4 };
        Self::new(exit, "state_dir", format!("could not {what} {}: {error}", path.display()))
            .hint("name a directory of yours: --state-dir DIR")
    }
}

impl From<engine::error::Error> for Error {
    fn from(error: engine::error::Error) -> Self {
        let (code, hint) = (error.kind().code(), error.hint_text().map(str::to_owned));
        Self { exit: 4, code, message: error.to_string(), hint }
    }
}

/// Runs the daemon until it is told to end.
pub async fn run(config: Config) -> Result<(), Error> {
    // Disks, sockets and logs are nobody else's business.
    umask(Mode::from_bits_truncate(0o077));
    let state = config.state();
    let _lock = claim(&state)?;
    let opening = (state.store(), store_options(&config));
    let store = tokio::task::spawn_blocking(move || open_store(&opening.0, &opening.1))
        .await
        .map_err(|e| Error::new(4, "internal_error", format!("opening the store did not end: {e}")))?
        .map_err(|e| {
            let message = format!("could not open the store {}: {e}", state.store().display());
            let failed = Error::new(4, "store_open", message);
            match e.kind() {
                storage::ErrorKind::UnsupportedVersion => failed.hint("use the version of miosa that wrote it"),
                storage::ErrorKind::InUse => failed.hint("wait for the command that has it open, or end it"),
                storage::ErrorKind::NoSpace => failed.hint("free space on its file system"),
                _ => failed,
            }
        })?;
    let closing = store.clone();
    let served = serve(&config, &state, store).await;
    if served.is_err() {
        // Not handed to an engine that would have closed it.
        let _ = tokio::task::spawn_blocking(move || closing.close()).await;
    }
    served
}

fn store_options(config: &Config) -> storage::Options {
    storage::Options {
        cache_bytes: config.cache_memory.bytes(),
        log_bytes: config.log_budget.bytes(),
        log_bytes_max: config.log_limit.bytes(),
        ..storage::Options::default()
    }
}

/// Commands that work on the store without a daemon have it for a moment.
fn open_store(dir: &Path, options: &storage::Options) -> storage::Result<storage::Store> {
    let began = std::time::Instant::now();
    loop {
        match storage::Store::open(dir, options.clone()) {
            Err(e) if e.kind() == storage::ErrorKind::InUse && began.elapsed() < STORE_WAIT => {
                std::thread::sleep(Duration::from_millis(50));
            }
            done => return done,
        }
    }
}

async fn serve(config: &Config, state: &StateDir, store: storage::Store) -> Result<(), Error> {
    let (vmm, templates): (Arc<dyn vmm::Vmm>, Arc<dyn TemplateBuilder>) = match config.vmm {
        VmmArg::Qemu => {
            let agent = config::find_agent(config.agent.as_deref());
            let images = images::Images::new(config.cache_dir.clone(), state.boot(), agent);
            (Arc::new(vmm::QemuVmm::new()), Arc::new(images))
        }
        VmmArg::Fake => {
            let guests = state.root().join("fake-guests");
            (Arc::new(vmm::FakeVmm::new(guests)), Arc::new(images::FakeImages { work: state.boot() }))
        }
    };
    let previews = bind_previews(config).await?;
    let users_disks = Disks::open(store.clone(), state, true)?;
    let disks = disks::open(config.disk_frontend, config.vmm, &state.fuse(), users_disks.traffic().clone())?;
    let settings = Settings {
        run_root: state.run(),
        accel: match config.accel {
            AccelArg::Auto => None,
            AccelArg::Tcg => Some(vmm::Accel::Tcg),
            AccelArg::Kvm => Some(vmm::Accel::Kvm),
        },
        probe_dir: config.cache_dir.clone(),
        // Fake machines have no state worth keeping among those of real ones.
        warm_dir: (config.warm_machines && config.vmm == VmmArg::Qemu).then(|| config.cache_dir.join("warm")),
        spare_machines: config.spare_machines,
        network: match config.network {
            NetworkArg::User => vmm::Network::User,
            NetworkArg::None => vmm::Network::None,
        },
        kernel_args: config.kernel_args.clone(),
        guest: guest_setup(config),
        previews: previews.as_ref().and_then(|l| l.local_addr().ok()).map(|at| format!("localhost:{}", at.port())),
        boot_deadline: config.boot_timeout.0,
        stop_deadline: config.stop_timeout.0,
        ..Settings::default()
    };
    settings.guest.check()?;
    let engine = Engine::open(Parts { store, vmm, disks, templates, settings }).await?;

    let served = listen(config, state, engine, users_disks, previews).await;
    // Only ours: the lock says that no other daemon has put one there.
    let _ = std::fs::remove_file(state.socket());
    served
}

fn guest_setup(config: &Config) -> GuestSetup {
    let files = config.guest_files.iter();
    GuestSetup {
        env: config.guest_env.clone(),
        files: files.map(|(path, source)| GuestFile { path: path.clone(), source: source.clone() }).collect(),
        ca_bundle: config.ca_bundle.clone(),
    }
}

/// Where previews are served. One that was not told can be another's already: then it is any that is free.
async fn bind_previews(config: &Config) -> Result<Option<TcpListener>, Error> {
    let failed = |address, e| {
        Error::new(4, "listen", format!("could not listen on {address} for previews: {e}"))
            .hint("name another: --preview-listen ADDRESS:PORT, or 'none'")
    };
    match config.preview_listen {
        PreviewListen::None => Ok(None),
        PreviewListen::At(address) => listen::bind_tcp(address).await.map(Some).map_err(|e| failed(address, e)),
        PreviewListen::Auto => {
            let usual = SocketAddr::from((Ipv4Addr::LOCALHOST, PREVIEW_PORT));
            if let Ok(listener) = listen::bind_tcp(usual).await {
                return Ok(Some(listener));
            }
            let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            listen::bind_tcp(any).await.map(Some).map_err(|e| failed(any, e))
        }
    }
}

async fn listen(
    config: &Config,
    state: &StateDir,
    engine: Arc<Engine>,
    users_disks: Arc<Disks>,
    previews: Option<TcpListener>,
) -> Result<(), Error> {
    let socket = state.socket();
    let failed = |e: std::io::Error| Error::file("listen on", &socket, &e);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut replace = signal(SignalKind::user_defined2()).map_err(failed)?;
    let defaults = Defaults {
        cpus: config.default_cpus,
        memory_mib: config.default_memory.0,
        timeout: config.default_timeout.map(|t| t.0),
    };
    let routes = server::router(engine.clone(), users_disks.clone(), defaults);
    let (end, ending) = watch::channel(false);
    let callers = Callers { users: config.socket_users.clone(), groups: config.socket_groups.clone() };
    let listener = listen::bind_unix(&socket, &callers).map_err(failed)?;
    let local =
        Arc::new(Door::new(server::open(routes.clone()), config.max_connections, ending.clone()).map_err(failed)?);
    let mut doors = vec![local.clone()];
    let mut serving = JoinSet::new();
    serving.spawn(async move { local.serve_unix(listener, callers).await });
    if let Some(address) = config.listen {
        let keys = keys(config, state)?;
        let listener = listen::bind_tcp(address).await.map_err(|e| {
            Error::new(4, "listen", format!("could not listen on {address}: {e}"))
                .hint("name another: --listen ADDRESS:PORT")
        })?;
        // Told as it is: port 0 asks for any.
        let address = listener.local_addr().unwrap_or(address);
        let remote =
            Arc::new(Door::new(server::locked(routes, keys), config.max_connections, ending.clone()).map_err(failed)?);
        doors.push(remote.clone());
        serving.spawn(async move { remote.serve_tcp(listener).await });
        tracing::info!(%address, "listening");
    }
    if let Some(listener) = previews {
        if let Ok(address) = listener.local_addr() {
            tracing::info!(%address, "previews are served");
        }
        let door = Arc::new(Door::new(proxy::routes(engine.clone()), config.max_connections, ending).map_err(failed)?);
        doors.push(door.clone());
        serving.spawn(async move { door.serve_tcp(listener).await });
    }
    tracing::info!(socket = %socket.display(), version = env!("CARGO_PKG_VERSION"), "ready");
    // Nobody listens for this unless systemd started us.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let leaves = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        _ = replace.recv() => true,
    };
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let (deadline, sandboxes) =
        (config.stop_timeout.0 + CLOSING, if leaves { "left to the next daemon" } else { "paused" });
    tracing::info!("stopping: running sandboxes are {sandboxes}");
    let closing = async { if leaves { engine.leave(deadline).await } else { engine.shutdown(deadline).await } };
    // Connections end after what they are at; what comes from now on is refused by the engine.
    let _ = end.send(true);
    // Before the store is closed: what their users were told is written is made durable.
    let _ = tokio::task::spawn_blocking(move || users_disks.detach_all()).await;
    let closed = tokio::select! {
        closed = closing => closed.map_err(Error::from),
        _ = terminate.recv() => Err(Error::new(4, "killed", "ended before everything was stopped".to_owned())),
        _ = interrupt.recv() => Err(Error::new(4, "killed", "ended before everything was stopped".to_owned())),
    };
    // Those who waited for something come to read how it ended.
    for door in doors {
        if !door.empty(DRAIN).await {
            tracing::warn!("some connections did not end by themselves");
        }
    }
    serving.abort_all();
    tracing::info!("stopped");
    closed
}

/// The keys told, or one made for this state directory.
fn keys(config: &Config, state: &StateDir) -> Result<Arc<Keys>, Error> {
    let path = config.api_key_file.clone().unwrap_or_else(|| state.api_key());
    let keys = if config.api_key_file.is_some() { Keys::read(&path) } else { Keys::read_or_make(&path) };
    if keys.is_ok() {
        tracing::info!(file = %path.display(), "callers of the TCP address need a key of this file");
    }
    keys.map(Arc::new).map_err(|e| {
        Error::new(1, "api_key_file", format!("the key file {} cannot be used: {e}", path.display()))
            .hint("one key a line, at least 16 characters each, and mode 600")
    })
}

/// Makes the state directory ours alone.
fn claim(state: &StateDir) -> Result<Flock<File>, Error> {
    let root = state.root();
    engine::private_dir(root).map_err(|e| Error::file("make the state directory", root, &e))?;
    let path = state.lock();
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| Error::file("open", &path, &e))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => {
            Error::new(1, "daemon_running", format!("a daemon runs on {} already", root.display()))
                .hint("use it, stop it, or name another directory: --state-dir DIR")
        }
        errno => Error::file("lock", &path, &errno.into()),
    })
}
