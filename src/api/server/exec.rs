//! Commands in a sandbox, with their output in one answer or as a stream of events.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State as AppState};
use axum::response::Response;
use futures_util::stream;
use parking_lot::Mutex;
use tracing::Instrument;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vmm::agent::{Controls, Stdin};

use super::Api;
use super::answer::{Answer, ApiError, data, event_stream};
use super::commands::signal_number;
use super::request::{JsonBody, Path, refuse_unsupported};
use crate::api::body::next_piece;
use crate::api::stream::{Encoding, ExecEvents};
use crate::api::types::{Envelope, ExecBody, ExecResult, KillBody, SizeBody, StartedEvent, StdinBody, exit_code};
use crate::engine::error::{Error, Kind};
use crate::engine::records::new_id;
use crate::engine::{ExecEvent, ExecSpec, RunningExec};

/// Most of each output of a command that one answer holds.
const MAX_OUTPUT: usize = 16 << 20;
/// How long a command that is to end may take before it is killed.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// Streamed commands whose callers were told an id.
pub(super) type Running = Arc<Mutex<HashMap<String, RunningCommand>>>;

/// What can be done to a streamed command by its id.
pub(super) struct RunningCommand {
    /// Its standard input, while that waits for its content.
    stdin: Option<Stdin>,
    controls: Controls,
}

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(exec))
        .routes(routes!(exec_stream))
        .routes(routes!(exec_stdin))
        .routes(routes!(exec_kill))
}

/// Runs a command and answers with what it did.
#[utoipa::path(post, path = "/sandboxes/{id}/exec", tag = "commands", request_body = ExecBody, responses((status = 200, body = Envelope<ExecResult>)))]
async fn exec(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ExecBody>,
) -> Answer<ExecResult> {
    if matches!(body.stdin, Some(StdinBody::Stream(true))) {
        return Err(Error::new(Kind::InvalidInput, "a standard input can be sent to a streamed command only")
            .hint("POST …/exec/stream, or give its content as a string")
            .into());
    }
    data(run_to_end(&api, &id, &body).await?)
}

/// Runs a command and keeps its output.
pub(super) async fn run_to_end(api: &Api, id: &str, body: &ExecBody) -> Result<ExecResult, ApiError> {
    let mut exec = start_exec(api, id, body).await?;
    feed(&mut exec, body);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut truncated = false;
    let mut keep = |kept: &mut Vec<u8>, bytes: &[u8]| {
        let room = MAX_OUTPUT - kept.len();
        truncated |= bytes.len() > room;
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    };
    loop {
        match exec.next_event().await? {
            Some(ExecEvent::Stdout(bytes)) => keep(&mut out, &bytes),
            Some(ExecEvent::Stderr(bytes)) => keep(&mut err, &bytes),
            Some(ExecEvent::Exit { code, signal, timed_out }) => {
                return Ok(ExecResult {
                    stdout: text(out),
                    stderr: text(err),
                    exit_code: exit_code(code, signal, timed_out),
                    signal,
                    timed_out,
                    truncated,
                    duration_ms: exec.age().as_millis() as u64,
                });
            }
            None => return Err(Error::new(Kind::SessionEnded, "the command's end was not seen").into()),
        }
    }
}

/// Runs a command and answers with its output as server-sent events: `stdout`, `stderr`, and `exit` or `error` at the end.
#[utoipa::path(post, path = "/sandboxes/{id}/exec/stream", tag = "commands", request_body = ExecBody, responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn exec_stream(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ExecBody>,
) -> Result<Response, ApiError> {
    let encoding = encoding(body.encoding.as_deref())?;
    let mut exec = start_exec(&api, &id, &body).await?;
    feed(&mut exec, &body);
    let (stdin, controls) = (exec.take_stdin(), exec.controls());
    let mut events = ExecEvents::new(exec, encoding);
    // The SDK takes an event that it does not know for output, and asks for none of these.
    if stdin.is_some() || encoding == Encoding::Base64 {
        let id = new_id("exec");
        api.running.lock().insert(id.clone(), RunningCommand { stdin, controls });
        events._cleanup = Some(Box::new(Forget { id: id.clone(), running: api.running.clone() }));
        events.exec_id = Some(id);
    }
    Ok(stream_events(events))
}

pub(super) fn encoding(name: Option<&str>) -> Result<Encoding, ApiError> {
    match name {
        None | Some("lines") => Ok(Encoding::Lines),
        Some("base64") => Ok(Encoding::Base64),
        Some(other) => {
            Err(Error::new(Kind::InvalidInput, format!("there is no encoding {other:?}")).hint("lines, base64").into())
        }
    }
}

pub(super) fn stream_events(events: ExecEvents) -> Response {
    let body = stream::unfold(events, |mut events| async move {
        let piece = events.next().await?;
        Some((Ok::<_, std::convert::Infallible>(piece), events))
    });
    event_stream(Body::from_stream(body))
}

/// The id goes with its command.
struct Forget {
    id: String,
    running: Running,
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.running.lock().remove(&self.id);
    }
}

/// Sends a running command its standard input.
#[utoipa::path(post, path = "/sandboxes/{id}/exec/{exec}/stdin", tag = "commands", request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses((status = 200, body = Envelope<SizeBody>)))]
async fn exec_stdin(
    AppState(api): AppState<Api>,
    Path((_sandbox, exec)): Path<(String, String)>,
    request: Request,
) -> Answer<SizeBody> {
    let waiting = api.running.lock().get_mut(&exec).and_then(|command| command.stdin.take());
    let Some(mut stdin) = waiting else {
        return Err(ApiError::new(
            404,
            "exec_not_found",
            "no running command waits for a standard input under this id",
        ));
    };
    let mut content = request.into_body().into_data_stream();
    let mut taken = 0;
    while let Some(piece) = next_piece(&mut content).await? {
        if stdin.write(&piece).await.is_err() {
            // The command has ended or closed its input, as `head` does. That is no error of the caller's.
            break;
        }
        taken += piece.len() as u64;
    }
    stdin.close();
    data(SizeBody { size_bytes: taken })
}

/// Sends a streamed command's process group a signal, or ends it. Its stream tells what becomes of it.
#[utoipa::path(post, path = "/sandboxes/{id}/exec/{exec}/kill", tag = "commands", request_body = KillBody, responses((status = 200, body = Envelope<StartedEvent>)))]
async fn exec_kill(
    AppState(api): AppState<Api>,
    Path((_sandbox, exec)): Path<(String, String)>,
    JsonBody(body): JsonBody<KillBody>,
) -> Answer<StartedEvent> {
    refuse_unsupported("kill", &body.other)?;
    let signal = body.signal.as_deref().map(signal_number).transpose()?;
    let controls = api.running.lock().get(&exec).map(|command| command.controls.clone());
    let Some(controls) = controls else {
        return Err(ApiError::new(404, "exec_not_found", "no streamed command runs under this id"));
    };
    // A command that ends in the same moment is no error of the caller's.
    let _ = controls.signal(signal.unwrap_or(nix::libc::SIGTERM)).await;
    if signal.is_none() {
        tokio::spawn(async move {
            tokio::time::sleep(KILL_GRACE).await;
            let _ = controls.signal(nix::libc::SIGKILL).await;
        });
    }
    data(StartedEvent { exec_id: exec })
}

pub(super) async fn start_exec(api: &Api, id: &str, body: &ExecBody) -> Result<RunningExec, ApiError> {
    Ok(api.engine.exec(id, spec_of(body)?).await?)
}

pub(super) fn spec_of(body: &ExecBody) -> Result<ExecSpec, ApiError> {
    refuse_unsupported("exec", &body.other)?;
    let argv = body.command.clone().into_argv();
    let timeout = match body.timeout {
        None => None,
        Some(seconds) if seconds > 0.0 && seconds < 1e9 => Some(Duration::from_secs_f64(seconds)),
        Some(seconds) => return Err(Error::new(Kind::InvalidInput, format!("a timeout of {seconds} s")).into()),
    };
    Ok(ExecSpec {
        argv,
        env: body.env.clone().unwrap_or_default(),
        cwd: body.cwd.clone(),
        user: body.user.clone(),
        timeout,
        stdin: matches!(body.stdin, Some(StdinBody::Stream(true) | StdinBody::Text(_))),
        tty: None,
    })
}

/// Gives a command the input that came with the request.
fn feed(exec: &mut RunningExec, body: &ExecBody) {
    if let Some(StdinBody::Text(content)) = &body.stdin
        && let Some(mut stdin) = exec.take_stdin()
    {
        let content = content.clone();
        tokio::spawn(
            async move {
                // A command that does not read to the end is no error.
                let _ = stdin.write(content.as_bytes()).await;
            }
            .in_current_span(),
        );
    }
}

pub(super) fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
}
