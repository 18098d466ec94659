//! Processes as the SDK has them: detached commands, looked at by their number in the guest.

use axum::Json;
use axum::extract::State as AppState;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_all};
use super::exec::{spec_of, stream_events, text};
use super::request::{JsonBody, Params, Path};
use crate::api::stream::{Encoding, ExecEvents};
use crate::api::types::{Envelope, ExecBody, ListEnvelope, ProcessBody, ProcessRequestBody};
use crate::engine::ExecEvent;
use crate::engine::error::{Error, Kind};

/// How much of a process's output is wanted.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "read from the query by hand")]
struct TailQuery {
    /// The last so many lines.
    tail: Option<u32>,
}

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(processes, start))
        .routes(routes!(process, stop))
        .routes(routes!(logs))
        .routes(routes!(stream))
}

/// Starts a process that goes on by itself, as a detached command does.
#[utoipa::path(post, path = "/sandboxes/{id}/processes", tag = "commands", request_body = ProcessRequestBody, responses((status = 201, body = Envelope<ProcessBody>)))]
async fn start(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ProcessRequestBody>,
) -> Result<(StatusCode, Json<Envelope<ProcessBody>>), ApiError> {
    let ProcessRequestBody { command, cwd, env, user, timeout, name, other } = body;
    let exec = ExecBody { command, cwd, env, user, timeout, stdin: None, encoding: None, other };
    let started = api.engine.start_command(&id, name, spec_of(&exec)?).await?;
    Ok((StatusCode::CREATED, Json(Envelope { data: started.into() })))
}

/// The processes of the present session, oldest first: those that run and the last ones that have ended.
#[utoipa::path(get, path = "/sandboxes/{id}/processes", tag = "commands", responses((status = 200, body = ListEnvelope<ProcessBody>)))]
async fn processes(AppState(api): AppState<Api>, Path(id): Path<String>) -> ListAnswer<ProcessBody> {
    Ok(list_all(api.engine.commands(&id).await?))
}

/// A process, by its number in the guest or its command's id.
#[utoipa::path(get, path = "/sandboxes/{id}/processes/{pid}", tag = "commands", responses((status = 200, body = Envelope<ProcessBody>)))]
async fn process(AppState(api): AppState<Api>, Path((id, pid)): Path<(String, String)>) -> Answer<ProcessBody> {
    data(api.engine.command(&id, &pid).await?)
}

/// Ends a process: SIGTERM and, five seconds later, SIGKILL.
#[utoipa::path(delete, path = "/sandboxes/{id}/processes/{pid}", tag = "commands", responses((status = 200, body = Envelope<ProcessBody>)))]
async fn stop(AppState(api): AppState<Api>, Path((id, pid)): Path<(String, String)>) -> Answer<ProcessBody> {
    data(api.engine.kill_command(&id, &pid, None).await?)
}

/// What is kept of a process's output, both of its outputs in one text.
#[utoipa::path(get, path = "/sandboxes/{id}/processes/{pid}/logs", tag = "commands", params(TailQuery), responses((status = 200, body = Envelope<String>)))]
async fn logs(AppState(api): AppState<Api>, Path((id, pid)): Path<(String, String)>, query: Params) -> Answer<String> {
    let tail = match query.get("tail").filter(|text| !text.is_empty()).map(|text| text.parse::<usize>()) {
        None => usize::MAX,
        Some(Ok(lines)) => lines,
        Some(Err(_)) => return Err(Error::new(Kind::InvalidInput, "tail is a number").into()),
    };
    let mut logs = api.engine.command_logs(&id, &pid, false).await?;
    let mut all = Vec::new();
    while let Some(event) = logs.next_event().await? {
        match event {
            ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => all.extend_from_slice(&bytes),
            ExecEvent::Exit { .. } => break,
        }
    }
    let all = text(all);
    let skipped = all.lines().count().saturating_sub(tail);
    data(all.split_inclusive('\n').skip(skipped).collect::<String>())
}

/// A process's output as server-sent events until its end, as of a streamed command.
#[utoipa::path(get, path = "/sandboxes/{id}/processes/{pid}/stream", tag = "commands", responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn stream(AppState(api): AppState<Api>, Path((id, pid)): Path<(String, String)>) -> Result<Response, ApiError> {
    let logs = api.engine.command_logs(&id, &pid, true).await?;
    Ok(stream_events(ExecEvents::new(logs, Encoding::Lines)))
}
