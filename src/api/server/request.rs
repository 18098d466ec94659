//! What a request is made of: its path, its query, its JSON body of bounded size.

use std::collections::HashMap;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path as UrlPath, Query, Request};
use axum::http::header;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::IntoParams;

use super::answer::ApiError;
use crate::api::body::next_piece;
use crate::api::types::unsupported;
use crate::engine::error::{Error, Kind};

/// Largest JSON body, but for files.
pub(super) const MAX_JSON: usize = 1 << 20;
/// How long a JSON body may take to come.
const BODY_TIME: Duration = Duration::from_secs(60);

/// Ids and names in the path.
pub(crate) struct Path<T>(pub(crate) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, ApiError> {
        let path = UrlPath::<T>::from_request_parts(parts, state).await;
        path.map(|UrlPath(value)| Path(value)).map_err(|e| ApiError::new(400, "invalid_path", e.body_text()))
    }
}

/// The query, as a map.
pub(crate) struct Params(pub(crate) HashMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, ApiError> {
        let query = Query::<HashMap<String, String>>::from_request_parts(parts, state).await;
        query.map(|Query(map)| Params(map)).map_err(|e| ApiError::new(400, "invalid_query", e.body_text()))
    }
}

impl std::ops::Deref for Params {
    type Target = HashMap<String, String>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

pub(crate) fn flag(params: &HashMap<String, String>, name: &str) -> bool {
    params.get(name).is_some_and(|value| is_set(value))
}

/// The same of a query that was not parsed.
pub(super) fn flag_of(query: Option<&str>, name: &str) -> bool {
    let mut pairs = query.unwrap_or_default().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.any(|(key, value)| key == name && is_set(value))
}

/// The SDK sends `wait` as a flag or as a number of seconds.
fn is_set(value: &str) -> bool {
    !matches!(value.to_ascii_lowercase().as_str(), "false" | "0" | "no")
}

/// A JSON body of bounded size; an empty one is an empty object.
pub(crate) struct JsonBody<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        parse_json(request, MAX_JSON).await.map(JsonBody)
    }
}

pub(super) fn is_json(request: &Request) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    kind.split(';').next().is_some_and(|k| k.trim().eq_ignore_ascii_case("application/json"))
}

pub(super) async fn parse_json<T: DeserializeOwned>(request: Request, most: usize) -> Result<T, ApiError> {
    let named = request.headers().contains_key(header::CONTENT_TYPE);
    let is_json = is_json(&request);
    let bytes = collect(request.into_body(), most).await?;
    if bytes.is_empty() {
        return decode(b"{}");
    }
    if named && !is_json {
        return Err(ApiError::new(415, "unsupported_media_type", "this takes a JSON object")
            .hint("send the header 'Content-Type: application/json'"));
    }
    decode(&bytes)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // A list would be taken for the fields in their order.
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Err(ApiError::new(400, "invalid_json", "the request's body is not a JSON object"));
    }
    serde_json::from_slice(bytes).map_err(|e| {
        let message = format!("the request's body: {e}");
        match e.classify() {
            serde_json::error::Category::Data => ApiError::new(422, "invalid_input", message),
            _ => ApiError::new(400, "invalid_json", message),
        }
    })
}

/// A body of bounded size, which has to come within a bounded time.
pub(super) async fn collect(body: Body, most: usize) -> Result<Bytes, ApiError> {
    let all = async {
        let mut content = body.into_data_stream();
        let mut bytes = BytesMut::new();
        while let Some(piece) = next_piece(&mut content).await? {
            if bytes.len() + piece.len() > most {
                let message = format!("the request's body is larger than {most} bytes");
                return Err(ApiError::new(413, "body_too_large", message));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    };
    let slow = || ApiError::new(408, "body_too_slow", format!("the request's body did not come within {BODY_TIME:?}"));
    tokio::time::timeout(BODY_TIME, all).await.unwrap_or_else(|_| Err(slow()))
}

/// What would be done otherwise than asked for is not done.
pub(crate) fn refuse_unsupported(
    what: &str,
    other: &serde_json::Map<String, serde_json::Value>,
) -> Result<(), ApiError> {
    let names = unsupported(other);
    if names.is_empty() {
        return Ok(());
    }
    let message = format!("{what} does not support: {}", names.join(", "));
    Err(Error::new(Kind::UnsupportedOption, message).hint("leave it out").into())
}

/// None, and zero, mean without limit.
pub(super) fn timeout(seconds: Option<u64>, milliseconds: Option<u64>) -> Result<Option<Duration>, ApiError> {
    const MOST: u64 = 100 * 365 * 86_400 * 1_000;
    match milliseconds.or(seconds.map(|s| s.saturating_mul(1_000))) {
        None | Some(0) => Ok(None),
        Some(ms) if ms <= MOST => Ok(Some(Duration::from_millis(ms))),
        Some(_) => Err(Error::new(Kind::InvalidInput, "the timeout is longer than a hundred years").into()),
    }
}

/// Most items of a list that one answer holds, when a limit is asked for at all.
const MAX_LIMIT: usize = 1_000;

/// The part of a list that is wanted, as it is documented.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "read from the query by hand, for better messages")]
pub(crate) struct Paging {
    /// At most so many items; without it all.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
    /// Items to leave out.
    offset: Option<u64>,
}

/// Whether the answer waits, as it is documented.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "read from the query by hand: clients send a flag or a number of seconds")]
pub(crate) struct Wait {
    /// Answer when the sandbox can be used, not before.
    wait: Option<String>,
}

/// The part of a list that is wanted.
#[derive(Debug, Default)]
pub(super) struct Slice {
    pub(super) limit: Option<usize>,
    pub(super) skip: usize,
    /// The position of the last item of the page before.
    pub(super) after: Option<(Timestamp, String)>,
}

impl Slice {
    pub(super) fn parse(query: &HashMap<String, String>) -> Result<Self, ApiError> {
        let given = |name: &str| query.get(name).filter(|text| !text.is_empty());
        let number = |name: &str| {
            given(name).map(|text| {
                text.parse::<usize>()
                    .map_err(|_| Error::new(Kind::InvalidInput, format!("{name} is a number, and not {text:?}")))
            })
        };
        let limit = number("limit").transpose()?;
        if limit.is_some_and(|limit| !(1..=MAX_LIMIT).contains(&limit)) {
            return Err(Error::new(Kind::InvalidInput, format!("limit is 1 to {MAX_LIMIT}")).into());
        }
        let skip = number("offset").transpose()?.unwrap_or(0);
        let after = given("cursor").map(|text| {
            parse_cursor(text).ok_or_else(|| {
                Error::new(Kind::InvalidInput, "the cursor is none of this daemon's")
                    .hint("take next_cursor from the page before, or leave it out")
            })
        });
        Ok(Self { limit, skip, after: after.transpose()? })
    }
}

/// Names the items after this one, also when it is deleted meanwhile.
pub(super) fn cursor_after((time, id): (Timestamp, &str)) -> String {
    BASE64.encode(format!("{time} {id}"))
}

fn parse_cursor(text: &str) -> Option<(Timestamp, String)> {
    let plain = String::from_utf8(BASE64.decode(text).ok()?).ok()?;
    let (time, id) = plain.split_once(' ')?;
    Some((time.parse().ok()?, id.to_owned()))
}
