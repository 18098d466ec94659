//! The daemon: puts store, front end, machines, engine and API together, and takes them apart again in order.
//!
//! One daemon a state directory, held by a lock on a file. At the end (SIGTERM, SIGINT): no new operations, running
//! sandboxes are stopped and flushed, the store is closed, the socket goes. A second signal ends the daemon at once;
//! what was flushed is in the store, and the next start puts the rest right.

mod disks;
mod images;

use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::api::server::{self, Defaults};
use crate::cli::{AccelArg, DaemonArgs, NetworkArg, VmmArg};
use crate::config::{self, StateDir};
use crate::disks::Disks;
use crate::engine::{self, Engine, Parts, Settings, TemplateBuilder};

/// Beyond what guests may take to shut down: for flushing and closing.
const CLOSING: Duration = Duration::from_secs(15);

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
pub async fn run(state: StateDir, args: DaemonArgs) -> Result<(), Error> {
    // Disks, sockets and logs are nobody else's business.
    umask(Mode::from_bits_truncate(0o077));
    let _lock = claim(&state)?;
    let (store_dir, opening) = (state.store(), state.store());
    let store = tokio::task::spawn_blocking(move || open_store(&opening))
        .await
        .map_err(|e| Error::new(4, "internal_error", format!("opening the store did not end: {e}")))?
        .map_err(|e| {
            let failed = Error::new(4, "store_open", format!("could not open the store {}: {e}", store_dir.display()));
            match e.kind() {
                storage::ErrorKind::UnsupportedVersion => failed.hint("use the version of miosa that wrote it"),
                storage::ErrorKind::InUse => failed.hint("wait for the command that has it open, or end it"),
                storage::ErrorKind::NoSpace => failed.hint("free space on its file system"),
                _ => failed,
            }
        })?;
    let closing = store.clone();
    let served = serve(&state, args, store).await;
    if served.is_err() {
        // Not handed to an engine that would have closed it.
        let _ = tokio::task::spawn_blocking(move || closing.close()).await;
    }
    served
}

/// Commands that work on the store without a daemon have it for a moment.
fn open_store(dir: &Path) -> storage::Result<storage::Store> {
    let began = std::time::Instant::now();
    loop {
        match storage::Store::open(dir, storage::Options::default()) {
            Err(e) if e.kind() == storage::ErrorKind::InUse && began.elapsed() < STORE_WAIT => {
                std::thread::sleep(Duration::from_millis(50));
            }
            done => return done,
        }
    }
}

async fn serve(state: &StateDir, args: DaemonArgs, store: storage::Store) -> Result<(), Error> {
    let cache = args.cache_dir.clone().unwrap_or_else(config::default_cache_dir);
    let (vmm, templates): (Arc<dyn vmm::Vmm>, Arc<dyn TemplateBuilder>) = match args.vmm {
        VmmArg::Qemu => {
            let agent = config::find_agent(args.agent.as_deref());
            (Arc::new(vmm::QemuVmm::new()), Arc::new(images::Images::new(cache, state.boot(), agent)))
        }
        VmmArg::Fake => {
            let guests = state.root().join("fake-guests");
            (Arc::new(vmm::FakeVmm::new(guests)), Arc::new(images::FakeImages))
        }
    };
    let disks = disks::open(args.disk_frontend, args.vmm, &state.fuse())?;
    let settings = Settings {
        run_root: state.run(),
        accel: match args.accel {
            AccelArg::Tcg => vmm::Accel::Tcg,
            AccelArg::Kvm => vmm::Accel::Kvm,
        },
        network: match args.network {
            NetworkArg::User => vmm::Network::User,
            NetworkArg::None => vmm::Network::None,
        },
        kernel_args: args.kernel_arg.clone(),
        boot_deadline: args.boot_timeout,
        stop_deadline: args.stop_timeout,
        ..Settings::default()
    };
    let stop_deadline = settings.stop_deadline;
    let users_disks = Disks::open(store.clone(), state.attached(), true)?;
    let engine = Engine::open(Parts { store, vmm, disks, templates, settings }).await?;

    let socket = state.socket();
    let served = listen(&socket, engine.clone(), users_disks, &args, stop_deadline).await;
    // Only ours: the lock says that no other daemon has put one there.
    let _ = std::fs::remove_file(&socket);
    served
}

async fn listen(
    socket: &Path,
    engine: Arc<Engine>,
    users_disks: Arc<Disks>,
    args: &DaemonArgs,
    stop_deadline: Duration,
) -> Result<(), Error> {
    let failed = |e: std::io::Error| Error::file("listen on", socket, &e);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    // Left by a daemon that was killed; the lock says that it is nobody's.
    match std::fs::remove_file(socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let listener = UnixListener::bind(socket).map_err(failed)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let defaults = Defaults { cpus: args.default_cpus, memory_mib: args.default_memory };
    let router = server::router(engine.clone(), users_disks.clone(), defaults);
    let mut server = tokio::spawn(async move { axum::serve(listener, router).await });
    tracing::info!(socket = %socket.display(), "ready");

    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        done = &mut server => Err(Error::new(4, "internal_error", format!("the API's server ended: {done:?}"))),
    };
    tracing::info!("stopping: running sandboxes are paused");
    // Before the store is closed: what their users were told is written is made durable.
    let _ = tokio::task::spawn_blocking(move || users_disks.detach_all()).await;
    let closed = tokio::select! {
        closed = engine.shutdown(stop_deadline + CLOSING) => closed.map_err(Error::from),
        _ = terminate.recv() => Err(Error::new(4, "killed", "ended before everything was stopped".to_owned())),
        _ = interrupt.recv() => Err(Error::new(4, "killed", "ended before everything was stopped".to_owned())),
    };
    server.abort();
    tracing::info!("stopped");
    ended.and(closed)
}

/// Makes the state directory ours alone.
fn claim(state: &StateDir) -> Result<Flock<File>, Error> {
    let root = state.root();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(|e| Error::file("make the state directory", root, &e))?;
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
