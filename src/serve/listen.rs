//! Where the daemon listens: a Unix socket, which asks the kernel who calls, and if wanted a TCP address, which takes
//! requests with a key only.
//!
//! A caller cannot hold the daemon up: a request's head has a size and a time, and connections have a number. One too
//! many is told so and closed; so is one for which the daemon has no file descriptor left, but for the one it keeps for that.

use std::fs::File;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Gid, Uid, User};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::api::{read_to_its_end, server};

/// How long a request's head may take, and how long a connection may be idle.
const HEAD_TIME: Duration = Duration::from_secs(60);
/// Size of a request's head.
const HEAD_BYTES: usize = 64 << 10;
/// Most headers of a request.
const HEADERS: usize = 100;
/// Connections that are told that there are too many.
const TURNED_AWAY: usize = 64;
/// How long one that is told that no more files can be opened may take to hear it.
const LAST_WORD: Duration = Duration::from_secs(1);
/// How long listening rests after a connection that could not be taken.
const REST: Duration = Duration::from_millis(20);

/// Whom the Unix socket serves, beside root and the daemon's own user.
#[derive(Debug, Clone, Default)]
pub(super) struct Callers {
    pub(super) users: Vec<u32>,
    pub(super) groups: Vec<u32>,
}

impl Callers {
    fn is_only_us(&self) -> bool {
        self.users.is_empty() && self.groups.is_empty()
    }

    fn may_call(&self, uid: u32, gid: u32) -> bool {
        let known = uid == 0 || uid == nix::unistd::geteuid().as_raw() || self.users.contains(&uid);
        known || self.groups.contains(&gid) || groups_of(uid, gid).iter().any(|g| self.groups.contains(g))
    }
}

/// All groups of a user, as the system's database has them.
fn groups_of(uid: u32, gid: u32) -> Vec<u32> {
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return Vec::new() };
    let Ok(name) = std::ffi::CString::new(user.name) else { return Vec::new() };
    let groups = nix::unistd::getgrouplist(&name, Gid::from_raw(gid)).unwrap_or_default();
    groups.into_iter().map(Gid::as_raw).collect()
}

/// Makes the socket. Only its owner can open it, unless others are to be served; these are looked at one by one.
pub(super) fn bind_unix(path: &Path, callers: &Callers) -> std::io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        let mode = if callers.is_only_us() { 0o700 } else { 0o711 };
        std::fs::DirBuilder::new().recursive(true).mode(mode).create(dir)?;
    }
    // Left by a daemon that was killed; the state directory's lock says that it is nobody's.
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let mode = if callers.is_only_us() { 0o600 } else { 0o666 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// What every listener has: its routes, its room, and the end.
pub(super) struct Door {
    routes: Router,
    room: Arc<Semaphore>,
    connections: usize,
    crowd: Arc<Semaphore>,
    full: Router,
    /// A descriptor to give up for a connection that there would be none for.
    spare: Mutex<Option<File>>,
    no_files: Router,
    ending: watch::Receiver<bool>,
}

impl Door {
    /// `ending` turns true when connections are to end after what they are at. An error if no file can be opened.
    pub(super) fn new(routes: Router, connections: usize, ending: watch::Receiver<bool>) -> std::io::Result<Self> {
        let full = server::refusing(503, "too_many_connections", "the daemon serves as many connections as it may")
            .retryable()
            .into_router();
        let no_files = server::refusing(503, "too_many_open_files", "the daemon can open no more files")
            .hint("stop what you do not need, or raise its limit: LimitNOFILE= in its unit, or ulimit -n before it starts")
            .retryable()
            .into_router();
        let (room, crowd) = (Arc::new(Semaphore::new(connections)), Arc::new(Semaphore::new(TURNED_AWAY)));
        let spare = Mutex::new(Some(spare()?));
        Ok(Self { routes, room, connections, crowd, full, spare, no_files, ending })
    }

    /// Serves a Unix socket, for ever.
    pub(super) async fn serve_unix(&self, listener: UnixListener, callers: Callers) {
        let stranger = server::refusing(403, "permission_denied", "the daemon's socket is not yours to use")
            .hint("run this as the user that runs the daemon, or have it let you in: miosa daemon --socket-user UID")
            .into_router();
        let accept = |cx: &mut Context<'_>| listener.poll_accept(cx).map_ok(|(stream, _)| stream);
        let may_call = |stream: &UnixStream| stream.peer_cred().is_ok_and(|c| callers.may_call(c.uid(), c.gid()));
        self.serve(listener.as_fd(), accept, |stream| if may_call(stream) { &self.routes } else { &stranger }).await;
    }

    /// Serves a TCP address, for ever.
    pub(super) async fn serve_tcp(&self, listener: TcpListener) {
        let accept = |cx: &mut Context<'_>| {
            listener.poll_accept(cx).map_ok(|(stream, _)| {
                let _ = stream.set_nodelay(true);
                stream
            })
        };
        self.serve(listener.as_fd(), accept, |_| &self.routes).await;
    }

    async fn serve<'a, S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        listener: BorrowedFd<'_>,
        accept: impl Fn(&mut Context<'_>) -> Poll<std::io::Result<S>>,
        routes_of: impl Fn(&S) -> &'a Router,
    ) {
        loop {
            let taken = match poll_fn(&accept).await {
                Ok(stream) => Some(stream),
                // The kernel looks for a descriptor before it looks for a connection.
                Err(error) if is_for_want_of_files(&error) && is_called(listener) => {
                    tracing::warn!(%error, "a connection is taken with the last file descriptor");
                    self.take_with_the_spare(&accept).await
                }
                Err(error) => {
                    if !is_for_want_of_files(&error) {
                        tracing::warn!(%error, "a connection could not be taken");
                    }
                    // It takes a while to be better.
                    tokio::time::sleep(REST).await;
                    None
                }
            };
            if let Some(stream) = taken {
                let routes = routes_of(&stream);
                self.enter(stream, routes);
            }
        }
    }

    /// Takes a connection that is there by giving up the spare descriptor. If there is no other one after that, it is told
    /// so and ended.
    async fn take_with_the_spare<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        accept: impl Fn(&mut Context<'_>) -> Poll<std::io::Result<S>>,
    ) -> Option<S> {
        drop(self.spare.lock().take());
        // Its caller may be gone, and somebody else may have the descriptor by now.
        let taken = tokio::time::timeout(REST, poll_fn(accept)).await.ok().and_then(Result::ok);
        let is_back = self.open_spare();
        let Some(stream) = taken else {
            tokio::time::sleep(REST).await;
            return None;
        };
        if is_back {
            return Some(stream);
        }
        match self.crowd.clone().try_acquire_owned() {
            Ok(permit) => {
                let last_word = converse(stream, self.no_files.clone(), permit, self.ending.clone());
                let _ = tokio::time::timeout(LAST_WORD, last_word).await;
            }
            Err(_) => drop(stream),
        }
        self.open_spare();
        None
    }

    fn open_spare(&self) -> bool {
        let opened = spare().ok();
        let is_open = opened.is_some();
        *self.spare.lock() = opened;
        is_open
    }

    fn enter(&self, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, routes: &Router) {
        let (routes, permit) = match self.room.clone().try_acquire_owned() {
            Ok(permit) => (routes, permit),
            Err(_) => match self.crowd.clone().try_acquire_owned() {
                Ok(permit) => (&self.full, permit),
                Err(_) => return,
            },
        };
        tokio::spawn(converse(stream, routes.clone(), permit, self.ending.clone()));
    }

    /// Waits until every connection has ended, at most so long.
    pub(super) async fn empty(&self, patience: Duration) -> bool {
        let all = self.room.acquire_many(u32::try_from(self.connections).unwrap_or(u32::MAX));
        tokio::time::timeout(patience, all).await.is_ok()
    }
}

fn is_for_want_of_files(error: &std::io::Error) -> bool {
    matches!(Errno::from_raw(error.raw_os_error().unwrap_or(0)), Errno::EMFILE | Errno::ENFILE)
}

/// Whether a connection waits to be taken.
fn is_called(listener: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(listener, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn spare() -> std::io::Result<File> {
    File::open("/dev/null")
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    routes: Router,
    permit: OwnedSemaphorePermit,
    mut ending: watch::Receiver<bool>,
) {
    let (place, routes) = (server::Place(Arc::new(permit)), TowerToHyperService::new(routes));
    let serve = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(place.clone());
        routes.call(read_to_its_end(request))
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(HEAD_BYTES).max_headers(HEADERS);
    let connection = server.serve_connection(TokioIo::new(stream), serve).with_upgrades();
    tokio::pin!(connection);
    let told = async { ending.wait_for(|ending| *ending).await.map(drop) };
    let early = tokio::select! {
        done = connection.as_mut() => Some(done),
        _ = told => None,
    };
    let done = match early {
        Some(done) => done,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = done {
        tracing::debug!(%error, "a connection broke off");
    }
}

/// A TCP listener.
pub(super) async fn bind_tcp(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_we_may_call_and_others_when_they_are_named() {
        let own = nix::unistd::geteuid().as_raw();
        let nobody = Callers::default();
        assert!(nobody.may_call(0, 0) && nobody.may_call(own, 12_345));
        assert!(!nobody.may_call(54_321, 54_321));
        let some = Callers { users: vec![54_321], groups: vec![777] };
        assert!(some.may_call(54_321, 1) && some.may_call(54_322, 777));
        assert!(!some.may_call(54_322, 778));
    }
}
