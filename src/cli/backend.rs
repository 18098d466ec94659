//! The server of a command that works on the store: the daemon where there is one, or this process for as long as the
//! command takes.

use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use storage::{ErrorKind, Options, Store};

use super::output::{Failure, Result};
use crate::api::client::{self, Client};
use crate::api::{disks, read_to_its_end};
use crate::config::StateDir;
use crate::disks::Disks;

/// How long a store is waited for that another command has open.
const WAIT: Duration = Duration::from_secs(5);

/// Where commands find their server.
pub(super) struct Place {
    /// A client of the daemon.
    pub(super) client: Client,
    /// The state directory of this machine.
    pub(super) state: StateDir,
    /// The daemon was named by its endpoint, so no store of this machine is meant.
    pub(super) is_named: bool,
}

impl Place {
    /// The endpoint told, or the daemon of the state directory.
    pub(super) fn new(endpoint: Option<&str>, state: StateDir) -> Result<Self> {
        let Some(endpoint) = endpoint.filter(|e| !e.is_empty()) else {
            return Ok(Self { client: Client::new(&state.socket()), state, is_named: false });
        };
        let key = std::env::var("MIOSA_API_KEY").ok().filter(|key| !key.is_empty());
        let client = Client::at(endpoint, key.as_deref()).map_err(|message| {
            Failure::user("invalid_endpoint", message).hint("encryption is for a proxy or a tunnel: ssh -L")
        })?;
        Ok(Self { client, state, is_named: true })
    }
}

/// See the module.
pub(super) struct Backend {
    pub(super) client: Client,
    own: Option<Own>,
}

/// A store that this process has open.
struct Own {
    disks: Arc<Disks>,
    server: tokio::task::JoinHandle<()>,
}

impl Backend {
    /// Finds the daemon, or opens the store; makes one only if told so.
    pub(super) async fn open(place: &Place, make: bool) -> Result<Self> {
        let (daemon, state) = (place.client.clone(), &place.state);
        if place.is_named {
            return Ok(Self { client: daemon, own: None });
        }
        let began = Instant::now();
        loop {
            match daemon.is_answered().await {
                Ok(()) => return Ok(Self { client: daemon, own: None }),
                Err(client::Error::Unreachable { ref source, .. })
                    if source.kind() == std::io::ErrorKind::PermissionDenied =>
                {
                    let message = format!("the state directory {} is not yours to use", state.root().display());
                    return Err(Failure::new(3, "permission_denied", message)
                        .hint("run this as the user that owns it, or name another: --state-dir DIR"));
                }
                Err(_) => {}
            }
            let dir = state.store();
            if !make && !dir.join("LOCK").exists() {
                return Err(no_store(state));
            }
            prepare(state)?;
            let opened = tokio::task::spawn_blocking(move || Store::open(&dir, Options::default())).await;
            let opened =
                opened.map_err(|e| Failure::new(4, "internal_error", format!("opening the store did not end: {e}")))?;
            match opened {
                Ok(store) => return Self::serve(state, store),
                // Somebody's short command, or a daemon that is about to listen.
                Err(e) if e.kind() == ErrorKind::InUse && began.elapsed() < WAIT => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(e) => return Err(not_opened(state, &e)),
            }
        }
    }

    fn serve(state: &StateDir, store: Store) -> Result<Self> {
        let disks = Disks::open(store, state, false)
            .map_err(|e| Failure::new(4, e.kind().code(), format!("could not open the store: {e}")))?;
        let (client, within) = client::within();
        let read = axum::middleware::map_request(async |request| read_to_its_end(request).map(axum::body::Body::new));
        let router = disks::router(disks.clone()).layer(read);
        let server = tokio::spawn(async move {
            // Ends only by being aborted.
            let _ = axum::serve(within, router).await;
        });
        Ok(Self { client, own: Some(Own { disks, server }) })
    }

    /// Whether the store is open in this process.
    pub(super) fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// Closes the store, if it is ours, and passes on how the command ended.
    pub(super) async fn close<T>(self, done: Result<T>) -> Result<T> {
        let Some(own) = self.own else { return done };
        own.server.abort();
        let disks = own.disks;
        let closed = tokio::task::spawn_blocking(move || {
            disks.detach_all();
            disks.store().close()
        });
        match closed.await {
            Ok(Ok(())) => done,
            // What went wrong first matters more.
            Ok(Err(e)) => done.and_then(|_| Err(Failure::from(crate::engine::error::Error::from(e)))),
            Err(e) => {
                done.and_then(|_| Err(Failure::new(4, "internal_error", format!("closing the store did not end: {e}"))))
            }
        }
    }
}

/// Makes the state directory, ours alone.
fn prepare(state: &StateDir) -> Result<()> {
    for dir in [state.root().to_owned(), state.store()] {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|e| {
            let exit = if e.kind() == std::io::ErrorKind::PermissionDenied { 3 } else { 4 };
            Failure::new(exit, "state_dir", format!("could not make {}: {e}", dir.display()))
                .hint("name a directory of yours: --state-dir DIR")
        })?;
    }
    Ok(())
}

/// Neither a daemon nor a store.
pub(super) fn no_store(state: &StateDir) -> Failure {
    Failure::user("no_store", format!("there is no store in {}, and no daemon", state.root().display())).hint(
        "name its state directory: --state-dir DIR; or begin one: miosa daemon, or miosa disk create NAME --size 10gb",
    )
}

/// Why the store could not be opened.
pub(super) fn not_opened(state: &StateDir, error: &storage::Error) -> Failure {
    let message = format!("could not open the store {}: {error}", state.store().display());
    let cause = std::error::Error::source(error).and_then(|s| s.downcast_ref::<std::io::Error>());
    match error.kind() {
        ErrorKind::InUse => {
            Failure::user("store_in_use", message).hint("wait for the process that has it open, or end it")
        }
        ErrorKind::UnsupportedVersion => {
            Failure::user("unsupported_version", message).hint("use the version of miosa that wrote it")
        }
        ErrorKind::Damaged => Failure::new(4, "storage_damaged", message)
            .hint("make the catalogue again from what is intact: miosa store repair"),
        ErrorKind::NoSpace => Failure::new(4, "storage_full", message).hint("free space on its file system"),
        _ if message.contains("Permission denied")
            || cause.is_some_and(|c| c.kind() == std::io::ErrorKind::PermissionDenied) =>
        {
            Failure::new(3, "permission_denied", message).hint("run this as the user that owns it")
        }
        _ if message.contains("Read-only file system") => {
            Failure::new(4, "read_only", message).hint("mount its file system for writing")
        }
        _ => Failure::new(4, "store_open", message),
    }
}
