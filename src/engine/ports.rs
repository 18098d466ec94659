//! Connections to ports of a guest. They end with the session, and what goes over them is use of the sandbox.

use std::io::Result as IoResult;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use vmm::agent::PortStream;

use super::Engine;
use super::error::{Error, Kind, Result};
use super::guest::use_guest;
use super::lifecycle::Request;
use super::sandbox::Sandbox;

/// Connections to one sandbox at a time; the guest's agent serves twice as many calls of all kinds.
pub(super) const CONNECTIONS: usize = 128;

impl Engine {
    /// Connects to a port of the guest's loopback, starting a session if there is none. While nothing listens, it is tried
    /// again for `wait`. What goes over the connection resets the idle clock.
    pub async fn connect_port(&self, key: &str, port: u16, wait: Duration) -> Result<PortConnection> {
        let sandbox = self.find(key)?;
        let _in_use = sandbox.begin_use();
        let starting = sandbox.clone();
        let agent = self.detached(async move { use_guest(&starting, |agent| async move { Ok(agent) }).await }).await?;
        let until = Instant::now() + wait;
        let crowded = || {
            let message = format!("sandbox {} has {CONNECTIONS} connections to its ports already", sandbox.name());
            Error::new(Kind::Busy, message).hint("close some, or try again in a moment")
        };
        let place =
            tokio::time::timeout_at(until + Duration::from_secs(1), sandbox.connections.clone().acquire_owned());
        let place = place.await.ok().and_then(std::result::Result::ok).ok_or_else(crowded)?;
        let stream = agent.connect_port(port, until.saturating_duration_since(Instant::now())).await;
        let stream = stream.map_err(|e| port_error(&sandbox.name(), port, e))?;
        Ok(PortConnection { stream, sandbox: sandbox.clone(), _place: place })
    }

    /// Whether something listens on a port of the guest's loopback, within `wait`. Looking starts no session, and is no use
    /// of the sandbox.
    pub async fn listens(&self, key: &str, port: u16, wait: Duration) -> Result<bool> {
        let sandbox = self.find(key)?;
        let Some(agent) = super::commands::agent_of(&sandbox).await else {
            // Refused, as everything that needs a session and starts none.
            sandbox.decide(Request::Extend)?;
            return Ok(false);
        };
        match agent.connect_port(port, wait).await {
            Ok(_) => Ok(true),
            Err(error) => match port_error(&sandbox.name(), port, error) {
                error if error.kind() == Kind::PortClosed => Ok(false),
                error => Err(error),
            },
        }
    }
}

fn port_error(sandbox: &str, port: u16, error: vmm::Error) -> Error {
    use vmm::GuestErrorKind as Guest;
    match error.guest_kind() {
        Some(Guest::Refused | Guest::Timeout | Guest::Io) => {
            let message = format!("port {port} of sandbox {sandbox} does not answer: {}", error.message);
            Error::new(Kind::PortClosed, message)
                .hint("start what listens there, on 127.0.0.1 or all addresses of the guest")
        }
        _ => error.into(),
    }
}

/// A connection to a port of a guest: bytes both ways, and each way closed on its own. It ends with the session, and that
/// is an error to whoever reads; what goes over it is use of the sandbox.
pub struct PortConnection {
    stream: PortStream,
    sandbox: Arc<Sandbox>,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for PortConnection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<IoResult<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buf);
        if buf.filled().len() > before {
            self.sandbox.touch();
        }
        polled
    }
}

impl AsyncWrite for PortConnection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<IoResult<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        if polled.is_ready() {
            self.sandbox.touch();
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<IoResult<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<IoResult<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
