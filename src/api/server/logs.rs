//! The guest's console: its end as text, and as server-sent events what comes.

use std::convert::Infallible;

use anstream::adapter::StripBytes;
use axum::body::Body;
use axum::extract::State as AppState;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::stream;
use serde::Deserialize;
use serde_json::json;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, data, event_stream};
use super::exec::encoding;
use super::request::{Params, Path};
use crate::api::stream::{Encoding, KEEP_ALIVE, Lines, event};
use crate::api::types::{Envelope, LogsBody};
use crate::engine::Console;
use crate::engine::error::{Error, Kind};

/// Most of a console that is shown.
const MAX_LOGS: usize = 256 << 10;

/// How the console is told.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "read from the query by hand")]
struct FollowQuery {
    /// Go on until the session's end; that is so unless it is `false`.
    follow: Option<bool>,
    /// `lines`, without control sequences, or `base64`, byte for byte.
    encoding: Option<String>,
}

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(logs)).routes(routes!(follow))
}

/// Shows the end of the guest's console.
#[utoipa::path(get, path = "/sandboxes/{id}/logs", tag = "sandboxes", params(("lines" = Option<u32>, Query, description = "The last so many")), responses((status = 200, body = Envelope<LogsBody>)))]
async fn logs(AppState(api): AppState<Api>, Path(id): Path<String>, Params(params): Params) -> Answer<LogsBody> {
    let lines = match params.get("lines").filter(|text| !text.is_empty()).map(|text| text.parse::<usize>()) {
        None => usize::MAX,
        Some(Ok(lines)) => lines,
        Some(Err(_)) => return Err(Error::new(Kind::InvalidInput, "lines is a number").into()),
    };
    let all = api.engine.console(&id, MAX_LOGS).await?;
    let skipped = all.lines().count().saturating_sub(lines);
    data(LogsBody { logs: all.split_inclusive('\n').skip(skipped).collect() })
}

/// Sends the end of the guest's console, and then what comes, as events `log`; after the session's end an event `end`.
/// Of a sandbox at rest that is the last session's.
#[utoipa::path(get, path = "/sandboxes/{id}/logs/stream", tag = "sandboxes", params(FollowQuery), responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn follow(AppState(api): AppState<Api>, Path(id): Path<String>, query: Params) -> Result<Response, ApiError> {
    let encoding = encoding(query.get("encoding").map(String::as_str))?;
    let mut console = api.engine.follow_console(&id, MAX_LOGS).await?;
    if query.get("follow").is_some_and(|value| value == "false") {
        console = console.without_following();
    }
    let events = LogEvents { console, encoding, plain: StripBytes::new(), lines: Lines::default(), over: false };
    let body = stream::unfold(events, |mut events| async move {
        let piece = events.next().await?;
        Some((Ok::<_, Infallible>(piece), events))
    });
    Ok(event_stream(Body::from_stream(body)))
}

struct LogEvents {
    console: Console,
    encoding: Encoding,
    plain: StripBytes,
    lines: Lines,
    over: bool,
}

impl LogEvents {
    /// The next piece of the answer's body; none at the end.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.over {
            let piece = match tokio::time::timeout(KEEP_ALIVE, self.console.next_piece()).await {
                Err(_) => Bytes::from_static(b": alive\n\n"),
                Ok(Some(bytes)) => self.tell(&bytes),
                Ok(None) => {
                    self.over = true;
                    let rest = self.lines.rest().map(line).unwrap_or_default();
                    [rest, event("end", &json!({}))].into_iter().flatten().collect()
                }
            };
            if !piece.is_empty() {
                return Some(piece);
            }
        }
        None
    }

    fn tell(&mut self, bytes: &[u8]) -> Bytes {
        if self.encoding == Encoding::Base64 {
            return event("log", &json!({ "base64": BASE64.encode(bytes) }));
        }
        let plain: Vec<u8> = self.plain.strip_next(bytes).flatten().copied().collect();
        self.lines.add(&plain).into_iter().flat_map(line).collect()
    }
}

/// Without what is left of a terminal's control characters.
fn line(text: String) -> Bytes {
    let text: String = text.chars().filter(|c| *c == '\t' || !c.is_control()).collect();
    event("log", &json!({ "line": text }))
}
