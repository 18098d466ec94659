//! A sandbox's states as they change, as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State as AppState;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use tokio::time::Instant;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{ApiError, event_stream};
use super::request::Path;
use crate::api::stream::{KEEP_ALIVE, event};
use crate::engine::Watch;
use crate::engine::lifecycle::State;

/// How long one answer waits for a sandbox to be ready.
const READY_TIME: Duration = Duration::from_secs(300);

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(events)).routes(routes!(readiness))
}

/// Sends the present state, and each one that comes, as events `state`.
#[utoipa::path(get, path = "/sandboxes/{id}/events", tag = "sandboxes", responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn events(AppState(api): AppState<Api>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let states = stream::unfold(api.engine.watch(&id)?, |mut watch| async move {
        let piece = match tokio::time::timeout(KEEP_ALIVE, watch.next()).await {
            Err(_) => Bytes::from_static(b": alive\n\n"),
            Ok(change) => event("state", &change?),
        };
        Some((Ok::<_, Infallible>(piece), watch))
    });
    Ok(event_stream(Body::from_stream(states)))
}

/// Sends `ready` as soon as commands can be run; `error` if that cannot come by itself, `timeout` if it takes too long.
/// States on the way are events `state`.
#[utoipa::path(get, path = "/sandboxes/{id}/readiness/stream", tag = "sandboxes", responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn readiness(AppState(api): AppState<Api>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let waiting = (Some(api.engine.watch(&id)?), Instant::now() + READY_TIME);
    let states = stream::unfold(waiting, |(watch, until)| async move {
        let (piece, watch) = until_ready(watch?, until).await?;
        Some((Ok::<_, Infallible>(piece), (watch, until)))
    });
    Ok(event_stream(Body::from_stream(states)))
}

/// The next piece, and what to wait on after it.
async fn until_ready(mut watch: Watch, until: Instant) -> Option<(Bytes, Option<Watch>)> {
    let quiet = (Instant::now() + KEEP_ALIVE).min(until);
    let Ok(change) = tokio::time::timeout_at(quiet, watch.next()).await else {
        return Some(match quiet == until {
            true => (event("timeout", &serde_json::json!({ "ready": false })), None),
            false => (Bytes::from_static(b": alive\n\n"), Some(watch)),
        });
    };
    let change = change?;
    Some(match change.state {
        State::Running => (event("ready", &change), None),
        State::Error | State::Destroyed => (event("error", &change), None),
        State::Creating | State::Snapshotting | State::Paused => (event("state", &change), Some(watch)),
    })
}
