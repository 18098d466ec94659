//! What a request is made of: its path, its query, its JSON body of bounded size.

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Path as UrlPath, Query, Request};
use axum::http::header;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use bytes::BytesMut;
use futures_util::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::IntoParams;

use super::answer::ApiError;
use crate::api::types::unsupported;
use crate::engine::error::{Error, Kind};

/// Largest JSON body, but for files.
const MAX_JSON: usize = 1 << 20;

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
    // The SDK sends `wait` as a flag or as a number of seconds.
    params.get(name).is_some_and(|v| !matches!(v.to_ascii_lowercase().as_str(), "false" | "0" | "no"))
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
    let mut content = request.into_body().into_data_stream();
    let mut bytes = BytesMut::new();
    while let Some(piece) = content.next().await {
        let piece =
            piece.map_err(|e| ApiError::new(400, "body_broken", format!("the request's body broke off: {e}")))?;
        if bytes.len() + piece.len() > most {
            let message = format!("the request's body is larger than {most} bytes");
            return Err(ApiError::new(413, "body_too_large", message));
        }
        bytes.extend_from_slice(&piece);
    }
    let bytes = if bytes.is_empty() { b"{}" } else { &bytes[..] };
    // A list would be taken for the fields in their order.
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Err(ApiError::new(400, "invalid_json", "the request's body is not a JSON object"));
    }
    serde_json::from_slice(bytes).map_err(|e| ApiError::new(400, "invalid_json", format!("the request's body: {e}")))
}

/// What would be done otherwise than asked for is not done.
pub(super) fn refuse_unsupported(
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
