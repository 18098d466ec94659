//! Commands as the SDK has them: waited for, or detached and looked at later.

use axum::extract::State as AppState;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_all};
use super::exec::{encoding, run_to_end, spec_of, stream_events, text};
use super::request::{JsonBody, Params, Path, flag, refuse_unsupported};
use crate::api::stream::ExecEvents;
use crate::api::types::{
    CommandBody, CommandLogsBody, CommandRequestBody, Envelope, ExecBody, KillBody, ListEnvelope, RanBody, StdinBody,
};
use crate::engine::ExecEvent;
use crate::engine::error::{Error, Kind};

/// How a command's output is told.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "read from the query by hand")]
struct LogsQuery {
    /// Answer with events, as they come until the command's end.
    follow: Option<bool>,
    /// Answer with events, of what is there: `lines` or `base64`.
    encoding: Option<String>,
}

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(commands, run_command))
        .routes(routes!(command))
        .routes(routes!(command_logs))
        .routes(routes!(kill_command))
}

/// Runs a command: waits for it, or with `detached` answers once it has been started.
#[utoipa::path(post, path = "/sandboxes/{id}/commands", tag = "commands", request_body = CommandRequestBody, responses((status = 200, body = Envelope<RanBody>)))]
async fn run_command(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<CommandRequestBody>,
) -> Answer<RanBody> {
    let (detached, name) = (body.detached, body.name.clone());
    if body.user.is_some() && body.sudo == Some(true) {
        return Err(Error::new(Kind::InvalidInput, "sudo runs as root, and a user is named, too").into());
    }
    let exec = ExecBody {
        command: body.command,
        cwd: body.cwd.map(|cwd| if cwd.starts_with('/') { cwd } else { format!("/workspace/{cwd}") }),
        env: body.env,
        user: body.user,
        timeout: body.timeout_seconds,
        stdin: body.stdin.map(StdinBody::Text),
        encoding: None,
        other: body.other,
    };
    data(match detached {
        true => RanBody::Started(api.engine.start_command(&id, name, spec_of(&exec)?).await?.into()),
        false => RanBody::Ran(run_to_end(&api, &id, &exec).await?),
    })
}

/// The detached commands of the present session, oldest first: those that run and the last ones that have ended.
#[utoipa::path(get, path = "/sandboxes/{id}/commands", tag = "commands", responses((status = 200, body = ListEnvelope<CommandBody>)))]
async fn commands(AppState(api): AppState<Api>, Path(id): Path<String>) -> ListAnswer<CommandBody> {
    Ok(list_all(api.engine.commands(&id).await?))
}

/// A detached command.
#[utoipa::path(get, path = "/sandboxes/{id}/commands/{command}", tag = "commands", responses((status = 200, body = Envelope<CommandBody>)))]
async fn command(AppState(api): AppState<Api>, Path((id, command)): Path<(String, String)>) -> Answer<CommandBody> {
    data(api.engine.command(&id, &command).await?)
}

/// What is kept of a detached command's output; with `follow` or `encoding` as server-sent events, as of a streamed one.
#[utoipa::path(get, path = "/sandboxes/{id}/commands/{command}/logs", tag = "commands", params(LogsQuery), responses((status = 200, content((Envelope<CommandLogsBody> = "application/json"), (String = "text/event-stream")))))]
async fn command_logs(
    AppState(api): AppState<Api>,
    Path((id, command)): Path<(String, String)>,
    query: Params,
) -> Result<Response, ApiError> {
    let (follow, named) = (flag(&query, "follow"), query.get("encoding"));
    let encoding = encoding(named.map(String::as_str))?;
    let mut logs = api.engine.command_logs(&id, &command, follow).await?;
    if follow || named.is_some() {
        return Ok(stream_events(ExecEvents::new(logs, encoding)));
    }
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while let Some(event) = logs.next_event().await? {
        match event {
            ExecEvent::Stdout(bytes) => out.extend_from_slice(&bytes),
            ExecEvent::Stderr(bytes) => err.extend_from_slice(&bytes),
            ExecEvent::Exit { .. } => break,
        }
    }
    let command = api.engine.command(&id, &command).await?.into();
    Ok(data::<CommandLogsBody>(CommandLogsBody { stdout: text(out), stderr: text(err), command })?.into_response())
}

/// Ends a detached command, or sends its process group a signal.
#[utoipa::path(post, path = "/sandboxes/{id}/commands/{command}/kill", tag = "commands", request_body = KillBody, responses((status = 200, body = Envelope<CommandBody>)))]
async fn kill_command(
    AppState(api): AppState<Api>,
    Path((id, command)): Path<(String, String)>,
    JsonBody(body): JsonBody<KillBody>,
) -> Answer<CommandBody> {
    refuse_unsupported("kill", &body.other)?;
    let signal = body.signal.as_deref().map(signal_number).transpose()?;
    data(api.engine.kill_command(&id, &command, signal).await?)
}

/// `INT`, `SIGINT` or `2`.
pub(super) fn signal_number(text: &str) -> Result<i32, ApiError> {
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper.clone() } else { format!("SIG{upper}") };
    let named = name.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32);
    named.or_else(|| text.parse().ok().filter(|n| (1..=64).contains(n))).ok_or_else(|| {
        Error::new(Kind::InvalidInput, format!("there is no signal {text:?}"))
            .hint("such as INT, TERM, KILL or 9")
            .into()
    })
}
