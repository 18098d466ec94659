//! What an answer is: an envelope, a list's page, or an error with the request's id.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use tracing::Instrument;

use super::request::{Slice, cursor_after};
use crate::api::stream::error_body;
use crate::api::types::{Envelope, ErrorBody, ErrorEnvelope, ListEnvelope, Listed, Page};
use crate::engine::error::Error;
use crate::engine::records::new_id;

pub(crate) type Answer<T> = Result<Json<Envelope<T>>, ApiError>;
pub(crate) type ListAnswer<T> = Result<Json<ListEnvelope<T>>, ApiError>;

pub(crate) fn data<T>(data: impl Into<T>) -> Answer<T> {
    Ok(Json(Envelope { data: data.into() }))
}

/// A list, or the part of it that the request's query asks for.
pub(crate) fn list_of<T: Listed, R: Into<T>>(items: Vec<R>, query: &HashMap<String, String>) -> ListAnswer<T> {
    let slice = Slice::parse(query)?;
    let mut data: Vec<T> = items.into_iter().map(Into::into).collect();
    data.sort_by(|a, b| a.position().cmp(&b.position()));
    let total = data.len();
    if let Some((time, id)) = &slice.after {
        data.drain(..data.partition_point(|item| item.position() <= (*time, id.as_str())));
    }
    data.drain(..slice.skip.min(data.len()));
    let has_more = slice.limit.is_some_and(|limit| data.len() > limit);
    data.truncate(slice.limit.unwrap_or(usize::MAX));
    let next_cursor = data.last().filter(|_| has_more).map(|last| cursor_after(last.position()));
    let page = Page { count: data.len(), total, has_more, next_cursor: next_cursor.clone() };
    Ok(Json(ListEnvelope { data, page, next_cursor }))
}

/// A list that is never cut.
pub(crate) fn list_all<T, R: Into<T>>(items: Vec<R>) -> Json<ListEnvelope<T>> {
    let data: Vec<T> = items.into_iter().map(Into::into).collect();
    let page = Page { count: data.len(), total: data.len(), has_more: false, next_cursor: None };
    Json(ListEnvelope { data, page, next_cursor: None })
}

pub(super) fn event_stream(body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, body).into_response()
}

/// A failed answer.
#[derive(Debug)]
pub struct ApiError {
    status: u16,
    body: Box<ErrorBody>,
}

impl ApiError {
    pub(crate) fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        let body = ErrorBody { code: code.to_owned(), message: message.into(), ..ErrorBody::default() };
        Self::of(status, body)
    }

    pub(super) fn of(status: u16, body: ErrorBody) -> Self {
        Self { status, body: Box::new(body) }
    }

    /// Adds what to do next.
    pub(crate) fn hint(mut self, hint: &str) -> Self {
        self.body.hint = Some(hint.to_owned());
        self
    }

    /// The same call may succeed when made again.
    pub(crate) fn retryable(mut self) -> Self {
        self.body.retryable = true;
        self
    }

    /// Answers every request so.
    pub(crate) fn into_router(self) -> Router {
        let (status, body) = (self.status, self.body);
        let refuse = move || std::future::ready(ApiError { status, body: body.clone() });
        Router::new().fallback(refuse).layer(axum::middleware::from_fn(request_id))
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self { status: error.kind().status(), body: Box::new(error_body(&error)) }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(Arc::new(*self.body));
        response
    }
}

/// Gives every request an id and a span in the log, and every failure its body.
pub(super) async fn request_id(request: Request, next: Next) -> Response {
    let id = new_id("req");
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let span = tracing::info_span!("request", %id, %method, path = %printable(&path));
    async move {
        let began = Instant::now();
        let mut response = next.run(request).await;
        let (status, ms) = (response.status(), began.elapsed().as_millis() as u64);
        match response.extensions_mut().remove::<Arc<ErrorBody>>() {
            Some(error) => {
                let (code, message) = (&error.code, &error.message);
                if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED {
                    tracing::error!(status = status.as_u16(), ms, %code, %message, "failed");
                } else {
                    tracing::info!(status = status.as_u16(), ms, %code, "refused");
                }
                let error = ErrorBody { request_id: id.clone(), ..(*error).clone() };
                let headers = std::mem::take(response.headers_mut());
                response = (status, headers, Json(ErrorEnvelope { error })).into_response();
            }
            None if method == Method::GET => tracing::debug!(status = status.as_u16(), ms, "answered"),
            None => tracing::info!(status = status.as_u16(), ms, "answered"),
        }
        if let Ok(value) = HeaderValue::from_str(&id) {
            response.headers_mut().insert("x-request-id", value);
        }
        response
    }
    .instrument(span)
    .await
}

/// A path as far as a line of the log should hold it.
fn printable(path: &str) -> &str {
    let end = path.char_indices().nth(200).map_or(path.len(), |(at, _)| at);
    &path[..end]
}
