//! Connections to TCP ports of the guest's own loopback: two threads each, one a direction, for as long as it lasts.
//!
//! Credit bounds what waits for a program that does not read, and for a host that does not. A stream that is cancelled
//! shuts its socket down, which wakes both threads wherever they are.

use std::io::{ErrorKind as Io, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Cancelled, Stream, Waited};
use crate::wire::{AgentError, ErrorKind, Kind, MAX_CONNECT_MS};

/// How long one attempt may take. A program whose queue is full for a moment is reached by the kernel's second or third
/// attempt, one and three seconds after the first.
const ATTEMPT: Duration = Duration::from_secs(10);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

pub(super) fn serve(stream: &Arc<Stream>, port: u16, wait_ms: u64) -> Result<(), AgentError> {
    let until = Instant::now() + Duration::from_millis(wait_ms.min(MAX_CONNECT_MS));
    let failed = |e: std::io::Error| AgentError::io(format_args!("port {port}"), &e);
    let socket = connect(stream, port, until)??;
    let _ = socket.set_nodelay(true);
    stream.connected(socket.try_clone().map_err(failed)?)?;
    let reading = socket.try_clone().map_err(failed)?;
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("agent-port".into()).stack_size(256 * 1024);
        let reader = builder.spawn_scoped(scope, || send(stream, reading)).map_err(failed)?;
        let written = receive(stream, &socket);
        let read = reader.join().unwrap_or(Err(Cancelled.into()));
        written?;
        read
    })
}

/// Tries again until the port is there or `until` has come, and at least once.
fn connect(stream: &Stream, port: u16, until: Instant) -> Result<Result<TcpStream, AgentError>, Cancelled> {
    let addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    loop {
        let mut first = None;
        for address in addresses {
            match TcpStream::connect_timeout(&SocketAddr::new(address, port), ATTEMPT) {
                Ok(socket) => return Ok(Ok(socket)),
                // What the other address says counts less: a guest may have no IPv6 at all.
                Err(error) => _ = first.get_or_insert(error),
            }
        }
        let next = Instant::now() + PAUSE;
        if next >= until {
            let error = first.unwrap_or_else(|| Io::ConnectionRefused.into());
            return Ok(Err(match error.kind() {
                Io::ConnectionRefused => AgentError::new(ErrorKind::Refused, format!("nothing listens on port {port}")),
                _ => AgentError::io(format_args!("port {port}"), &error),
            }));
        }
        if let Waited::Cancelled = stream.wait_exit(Some(next), true) {
            return Err(Cancelled);
        }
    }
}

/// From the program to the host. When the connection is broken, the other direction ends, too.
fn send(stream: &Stream, mut socket: TcpStream) -> Result<(), AgentError> {
    let mut bytes = vec![0; 32 * 1024];
    loop {
        match socket.read(&mut bytes) {
            Ok(0) => {
                stream.send_eof();
                return Ok(());
            }
            Ok(len) => stream.send(Kind::Data, &bytes[..len])?,
            Err(error) if error.kind() == Io::Interrupted => {}
            Err(error) => {
                stream.stop_receiving();
                return Err(AgentError::io("the connection broke off", &error));
            }
        }
    }
}

/// From the host to the program.
fn receive(stream: &Stream, mut socket: &TcpStream) -> Result<(), AgentError> {
    while let Some(bytes) = stream.receive_next()? {
        if let Err(error) = socket.write_all(&bytes) {
            // The program has closed its end. What it said before may still be on its way to the host.
            stream.stop_receiving();
            return Err(AgentError::io("the connection broke off", &error));
        }
    }
    let _ = socket.shutdown(Shutdown::Write);
    Ok(())
}
