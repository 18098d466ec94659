//! Terminals: a program on a pseudo-terminal of the guest, and a WebSocket to it.
//!
//! Binary messages are what is typed and what is shown. Text messages are JSON: from the client `{"type":"resize",
//! "rows":24,"cols":80}`, `{"type":"signal","signal":"INT"}`, `{"type":"stdin","data":"ls\n"}` and `{"type":"eof"}`, and text
//! that is none of these is typed; from the daemon, last, `{"type":"exit","exit_code":0}` or `{"type":"error","error":{…}}`.
//! When its client goes away, the terminal hangs up.

mod known;

use std::time::Duration;

use axum::extract::State as AppState;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::Response;
use axum::{Extension, Json};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vmm::agent::{Controls, Stdin};

use super::answer::{Answer, ApiError, data};
use super::commands::signal_number;
use super::request::{JsonBody, Params, Path, refuse_unsupported};
use super::{Api, Place};
use crate::api::types::{Command, Envelope, TerminalBody, TerminalRequestBody, exit_code};
use crate::engine::error::{Error, Kind};
use crate::engine::{ExecEvent, ExecSpec, RunningExec, TerminalSize};
use known::Attended;
pub(super) use known::Terminals;

/// How long a client may take to go once it has been told the end.
const GOODBYE: Duration = Duration::from_secs(5);
/// How often a terminal shows that it is alive, and asks the same of its client.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long a client may be silent; it answers what shows it that the terminal is alive.
const PATIENCE: Duration = Duration::from_secs(60);
/// Largest message of a client.
const MAX_MESSAGE: usize = 1 << 20;
/// What a terminal has that nobody has measured.
const USUAL: TerminalSize = TerminalSize { rows: 24, cols: 80 };

/// Which terminal is wanted.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "read from the query by hand")]
struct TerminalQuery {
    /// One that was made before. Without: the newest one of the sandbox that waits, or else a new one with a login shell.
    session_id: Option<String>,
    /// Lines of a new one; 24.
    #[param(minimum = 1)]
    rows: Option<u16>,
    /// Characters a line of a new one; 80.
    #[param(minimum = 1)]
    cols: Option<u16>,
}

/// What a client says in text.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Control {
    Resize {
        rows: u16,
        cols: u16,
    },
    Signal {
        signal: String,
    },
    #[serde(alias = "input")]
    Stdin {
        data: String,
    },
    #[serde(alias = "stdin_close")]
    Eof,
}

/// What became of the terminal.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct EndedBody {
    id: String,
    ended: bool,
}

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(open, create)).routes(routes!(stream)).routes(routes!(end))
}

/// Makes a terminal, with its program running. It ends if nobody opens its WebSocket within five minutes.
#[utoipa::path(post, path = "/sandboxes/{id}/terminal", tag = "commands", request_body = TerminalRequestBody, responses((status = 201, body = Envelope<TerminalBody>)))]
async fn create(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<TerminalRequestBody>,
) -> Result<(StatusCode, Json<Envelope<TerminalBody>>), ApiError> {
    refuse_unsupported("terminal", &body.other)?;
    let sandbox_id = api.engine.show(&id)?.record.id;
    let size = size(body.rows, body.cols)?;
    api.terminals.check_room()?;
    let exec = api.engine.exec(&sandbox_id, spec_of(body, size)?).await?;
    let id = api.terminals.add(&sandbox_id, exec)?;
    let stream_path = format!("/sandboxes/{sandbox_id}/terminal/stream?session_id={id}");
    let TerminalSize { rows, cols } = size;
    let made = TerminalBody { session_id: id.clone(), id, sandbox_id, rows, cols, stream_path };
    Ok((StatusCode::CREATED, Json(Envelope { data: made })))
}

fn spec_of(body: TerminalRequestBody, size: TerminalSize) -> Result<ExecSpec, ApiError> {
    let argv = match (body.shell, body.command) {
        (Some(_), Some(_)) => {
            return Err(Error::new(Kind::InvalidInput, "a shell and a command were given")
                .hint("give one of them")
                .into());
        }
        (Some(shell), None) => vec![shell],
        (None, command) => command.map(Command::into_argv).unwrap_or_default(),
    };
    Ok(ExecSpec {
        argv,
        env: body.env.unwrap_or_default(),
        cwd: body.cwd,
        user: body.user,
        timeout: None,
        stdin: true,
        tty: Some(size),
    })
}

fn size(rows: Option<u16>, cols: Option<u16>) -> Result<TerminalSize, ApiError> {
    let size = TerminalSize { rows: rows.unwrap_or(USUAL.rows), cols: cols.unwrap_or(USUAL.cols) };
    match size.rows > 0 && size.cols > 0 {
        true => Ok(size),
        false => Err(Error::new(Kind::InvalidInput, "a terminal has at least one line and one column").into()),
    }
}

/// Ends a terminal that was made, whether somebody is at it or not.
#[utoipa::path(delete, path = "/sandboxes/{id}/terminal/{session}", tag = "commands", responses((status = 200, body = Envelope<EndedBody>)))]
async fn end(AppState(api): AppState<Api>, Path((id, session)): Path<(String, String)>) -> Answer<EndedBody> {
    let sandbox = api.engine.show(&id)?.record.id;
    api.terminals.end(&sandbox, &session)?;
    data(EndedBody { id: session, ended: true })
}

/// Opens a terminal: a WebSocket with bytes both ways, and JSON texts for size, signals and the exit.
#[utoipa::path(get, path = "/sandboxes/{id}/terminal", tag = "commands", params(TerminalQuery), responses((status = 101, description = "The WebSocket")))]
async fn open(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    query: Params,
    place: Option<Extension<Place>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(|e| {
        ApiError::new(400, "websocket_expected", e.body_text())
            .hint("open it with a WebSocket client: miosa sandbox shell")
    })?;
    let sandbox = api.engine.show(&id)?.record.id;
    let (session, number) = (query.get("session_id"), |name| number(&query, name));
    let attended = match api.terminals.attend(&sandbox, session.map(String::as_str))? {
        Some(attended) => attended,
        None => {
            let spec = spec_of(TerminalRequestBody::default(), size(number("rows")?, number("cols")?)?)?;
            Attended::unknown(api.engine.exec(&sandbox, spec).await?)
        }
    };
    let touch = move || {
        // A sandbox that has gone meanwhile ends the terminal by itself.
        let _ = api.engine.touch(&sandbox);
    };
    Ok(upgrade.max_message_size(MAX_MESSAGE).on_upgrade(async move |socket| {
        serve(socket, attended, touch).await;
        drop(place);
    }))
}

/// The same, where the SDK has it.
#[utoipa::path(get, path = "/sandboxes/{id}/terminal/stream", tag = "commands", params(TerminalQuery), responses((status = 101, description = "The WebSocket")))]
async fn stream(
    api: AppState<Api>,
    id: Path<String>,
    query: Params,
    place: Option<Extension<Place>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    open(api, id, query, place, upgrade).await
}

fn number(query: &Params, name: &str) -> Result<Option<u16>, ApiError> {
    let wrong = |_| Error::new(Kind::InvalidInput, format!("{name} is a number from 1 to {}", u16::MAX)).into();
    query.get(name).filter(|text| !text.is_empty()).map(|text| text.parse().map_err(wrong)).transpose()
}

async fn serve(socket: WebSocket, mut attended: Attended, touch: impl Fn()) {
    let (stdin, controls) = (attended.exec.take_stdin(), attended.exec.controls());
    let (mut sender, mut receiver) = socket.split();
    let last = tokio::select! {
        last = show(&mut sender, &mut attended.exec, &touch) => last,
        () = typed(&mut receiver, stdin, &controls, &touch) => None,
        () = attended.ended.wait() => None,
    };
    // Whoever has read the end finds that the terminal is no longer known.
    drop(attended);
    if let Some(last) = last {
        let _ = sender.send(Message::text(last.to_string())).await;
    }
    let _ = sender.close().await;
    // Until the client is gone: one that still has something to say, if only an answer to a ping, must not find the
    // connection closed before it has read the end.
    let gone = async { while let Some(Ok(_)) = receiver.next().await {} };
    let _ = tokio::time::timeout(GOODBYE, gone).await;
}

/// Sends what is shown; the last message, which tells how it ended and is still to be sent.
async fn show(
    to: &mut SplitSink<WebSocket, Message>,
    exec: &mut RunningExec,
    touch: &impl Fn(),
) -> Option<serde_json::Value> {
    let mut alive = tokio::time::interval(KEEP_ALIVE);
    loop {
        let event = tokio::select! {
            event = exec.next_event() => event,
            _ = alive.tick() => match to.send(Message::Ping(Default::default())).await {
                Ok(()) => continue,
                Err(_) => return None,
            },
        };
        let message = match event {
            Ok(Some(ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes))) => {
                touch();
                Message::Binary(bytes)
            }
            Ok(Some(ExecEvent::Exit { code, signal, timed_out })) => {
                let code = exit_code(code, signal, timed_out);
                return Some(json!({ "type": "exit", "exit_code": code, "signal": signal }));
            }
            Ok(None) => return None,
            Err(error) => {
                let body = crate::api::stream::error_body(&error);
                return Some(json!({ "type": "error", "status": error.kind().status(), "error": body }));
            }
        };
        to.send(message).await.ok()?;
    }
}

/// Takes what is typed, until the client goes away.
async fn typed(from: &mut SplitStream<WebSocket>, mut stdin: Option<Stdin>, controls: &Controls, touch: &impl Fn()) {
    // A program that has ended reads no more; its exit is told by the other direction. So errors are of no interest.
    while let Ok(Some(Ok(message))) = tokio::time::timeout(PATIENCE, from.next()).await {
        let bytes = match message {
            Message::Close(_) => return,
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Binary(bytes) => bytes,
            Message::Text(text) => match serde_json::from_str(&text) {
                Err(_) => text.into(),
                Ok(Control::Stdin { data }) => data.into(),
                Ok(Control::Resize { rows, cols }) => {
                    let _ = controls.resize(TerminalSize { rows, cols }).await;
                    continue;
                }
                Ok(Control::Signal { signal }) => {
                    if let Ok(signal) = signal_number(&signal) {
                        let _ = controls.signal(signal).await;
                    }
                    continue;
                }
                Ok(Control::Eof) => {
                    stdin = None;
                    continue;
                }
            },
        };
        touch();
        if let Some(input) = &mut stdin {
            let _ = input.write(&bytes).await;
        }
    }
}
