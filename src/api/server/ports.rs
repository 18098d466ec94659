//! Ports of a sandbox: whether something listens, and a stream of bytes to it.

use std::collections::HashMap;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Request, State as AppState};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::answer::{Answer, ApiError, data};
use super::request::{Params, Path};
use super::{Api, Place};
use crate::api::types::{Envelope, PortStateBody};
use crate::engine::error::{Error, Kind};

/// Longest wait of one request.
const MAX_WAIT: Duration = Duration::from_secs(60);

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(port)).routes(routes!(connect))
}

/// Says whether something listens on a port of the guest's loopback, waiting for it if asked to. Starts no session.
#[utoipa::path(get, path = "/sandboxes/{id}/ports/{port}", tag = "ports", params(("port" = u16, Path, minimum = 1), ("wait_ms" = Option<u64>, Query, description = "Wait so long for it, at most a minute")), responses((status = 200, body = Envelope<PortStateBody>)))]
async fn port(
    AppState(api): AppState<Api>,
    Path((id, port)): Path<(String, u16)>,
    Params(params): Params,
) -> Answer<PortStateBody> {
    let wait = wait_of(&params)?;
    check_port(port)?;
    data(PortStateBody { port, listening: api.engine.listens(&id, port, wait).await? })
}

fn wait_of(params: &HashMap<String, String>) -> Result<Duration, ApiError> {
    match params.get("wait_ms").filter(|text| !text.is_empty()).map(|text| text.parse::<u64>()) {
        None => Ok(Duration::ZERO),
        Some(Ok(ms)) => Ok(Duration::from_millis(ms).min(MAX_WAIT)),
        Some(Err(_)) => Err(Error::new(Kind::InvalidInput, "wait_ms is a number").into()),
    }
}

fn check_port(port: u16) -> Result<(), ApiError> {
    match port {
        0 => Err(Error::new(Kind::InvalidInput, "there is no port 0").hint("1 to 65535, such as 3000").into()),
        _ => Ok(()),
    }
}

/// Turns the connection into a stream of bytes to a port of the guest's loopback; asks for `Upgrade: tcp`. Starts a
/// session if there is none. Each direction is closed on its own.
#[utoipa::path(get, path = "/sandboxes/{id}/ports/{port}/stream", tag = "ports", params(("port" = u16, Path, minimum = 1), ("wait_ms" = Option<u64>, Query, description = "Wait so long for something to listen, at most a minute")), responses((status = 101, description = "The connection is the stream")))]
async fn connect(
    AppState(api): AppState<Api>,
    Path((id, port)): Path<(String, u16)>,
    Params(params): Params,
    place: Option<Extension<Place>>,
    request: Request,
) -> Result<Response, ApiError> {
    let wait = wait_of(&params)?;
    check_port(port)?;
    if !asks_for_tcp(request.headers()) {
        return Err(ApiError::new(426, "upgrade_required", "this turns the connection into another protocol")
            .hint("send 'Connection: upgrade' and 'Upgrade: tcp'; or run: miosa sandbox port-forward"));
    }
    let mut connection = api.engine.connect_port(&id, port, wait).await?;
    let upgrading = hyper::upgrade::on(request);
    tokio::spawn(async move {
        // Counts among the daemon's connections for as long as it lasts.
        let _place = place;
        let Ok(caller) = upgrading.await else { return };
        if let Err(error) = tokio::io::copy_bidirectional(&mut TokioIo::new(caller), &mut connection).await {
            tracing::debug!(%error, "a connection to a port broke off");
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, "tcp")];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response())
}

fn asks_for_tcp(headers: &HeaderMap) -> bool {
    headers.get(header::UPGRADE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"tcp"))
}
