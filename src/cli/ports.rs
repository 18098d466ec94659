//! `miosa sandbox port-forward`: a port of this machine that is one of the guest's.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

use super::args::ForwardArgs;
use super::output::{Failure, Out, Result, fail};
use super::sandbox::path;
use crate::api::client::Client;
use crate::api::types::SandboxBody;

/// Forwards every connection until a signal ends it.
pub(super) async fn forward(client: &Client, out: Out, args: ForwardArgs) -> Result<ExitCode> {
    let sandbox = &args.target.sandbox;
    let _: SandboxBody = client.get(&path(sandbox, "")).await?;
    let wanted = SocketAddr::from((Ipv4Addr::LOCALHOST, args.local.unwrap_or(args.remote)));
    let failed = |e: std::io::Error| {
        Failure::user("listen", format!("could not listen on {wanted}: {e}"))
            .hint("name another port: --local N; 0 is any that is free")
    };
    let listener = TcpListener::bind(wanted).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let said = json!({ "local": local.to_string(), "port": local.port(), "remote": args.remote, "sandbox": sandbox });
    out.answer(&said, &local.to_string(), |_| format!("{local} is port {} of {sandbox}; Ctrl-C ends it", args.remote))?;
    let route = path(sandbox, &format!("/ports/{}/stream", args.remote));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = tokio::signal::ctrl_c() => return Ok(ExitCode::SUCCESS),
            _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
        };
        match accepted {
            Ok((caller, _)) => drop(tokio::spawn(connect(client.clone(), out, route.clone(), caller))),
            Err(error) => {
                out.progress(&format!("a connection could not be taken: {error}"));
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// One connection; what goes wrong with it is told, and ends no other.
async fn connect(client: Client, out: Out, route: String, mut caller: TcpStream) {
    let _ = caller.set_nodelay(true);
    match client.tunnel(&route).await {
        Ok(mut guest) => {
            if let Err(error) = tokio::io::copy_bidirectional(&mut caller, &mut guest).await {
                tracing::debug!(%error, "a forwarded connection broke off");
            }
        }
        // Told as a command's failure is, but nothing ends.
        Err(error) => _ = fail(out.json, &Failure::from(error)),
    }
}
