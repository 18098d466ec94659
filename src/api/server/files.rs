//! Files of a sandbox, in and out.

use axum::body::Body;
use axum::extract::{Request, State as AppState};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::{StreamExt, stream};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, data};
use super::request::{Params, Path, is_json, parse_json};
use crate::api::types::{Envelope, WriteFileBody, WrittenBody};
use crate::engine::error::{Error, Kind};

/// Largest JSON body that carries a file. Larger files are streamed.
const MAX_JSON_FILE: usize = 96 << 20;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(write_file)).routes(routes!(read_file))
}

/// Writes a file: a small one as JSON, any other as the body with its path in the query.
#[utoipa::path(method(post, put), path = "/sandboxes/{id}/fs/write", tag = "files", params(("path" = Option<String>, Query), ("mode" = Option<String>, Query, description = "Octal")), request_body(content((WriteFileBody = "application/json"), (Vec<u8> = "application/octet-stream"))), responses((status = 200, body = Envelope<WrittenBody>)))]
async fn write_file(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
    request: Request,
) -> Answer<WrittenBody> {
    if is_json(&request) {
        let body: WriteFileBody = parse_json(request, MAX_JSON_FILE).await?;
        let content = match (body.content, body.content_base64) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(encoded)) => BASE64
                .decode(encoded)
                .map_err(|e| Error::new(Kind::InvalidInput, format!("content_base64 is not base64: {e}")))?,
            _ => return Err(Error::new(Kind::InvalidInput, "give content or content_base64, and not both").into()),
        };
        let mut writer = api.engine.write_file(&id, &body.path, body.mode).await?;
        writer.write(&content).await?;
        writer.finish().await?;
        return data(WrittenBody { path: body.path, size_bytes: content.len() as u64 });
    }
    let path = params.get("path").cloned().unwrap_or_default();
    let mode = match params.get("mode") {
        None => None,
        Some(octal) => Some(u32::from_str_radix(octal, 8).map_err(|_| {
            Error::new(Kind::InvalidInput, format!("{octal:?} is not a file mode")).hint("octal digits, such as 644")
        })?),
    };
    let mut writer = api.engine.write_file(&id, &path, mode).await?;
    let mut content = request.into_body().into_data_stream();
    let mut size_bytes = 0;
    while let Some(piece) = content.next().await {
        // A body that breaks off leaves the guest's old file: the writer is dropped unfinished.
        let piece =
            piece.map_err(|e| ApiError::new(400, "body_broken", format!("the request's body broke off: {e}")))?;
        writer.write(&piece).await?;
        size_bytes += piece.len() as u64;
    }
    writer.finish().await?;
    data(WrittenBody { path, size_bytes })
}

/// Reads a file.
#[utoipa::path(get, path = "/sandboxes/{id}/fs/download", tag = "files", params(("path" = String, Query)), responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream")))]
async fn read_file(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
) -> Result<Response, ApiError> {
    let path = params.get("path").map(String::as_str).unwrap_or_default();
    let reader = api.engine.read_file(&id, path).await?;
    // Chunked: a file that breaks off ends without the last chunk, and the client sees that.
    let body = stream::unfold(Some(reader), |reader| async move {
        let mut reader = reader?;
        match reader.next_piece().await {
            Ok(Some(piece)) => Some((Ok(piece), Some(reader))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    });
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], Body::from_stream(body)).into_response())
}
