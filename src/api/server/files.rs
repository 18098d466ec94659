//! Files of a sandbox, in and out.

use std::collections::HashMap;

use axum::body::Body;
use axum::extract::{Request, State as AppState};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::stream;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_all};
use super::request::{JsonBody, Params, Path, flag, is_json, parse_json};
use crate::api::body::next_piece;
use crate::api::types::{Envelope, FileBody, ListEnvelope, PathBody, RenameBody, TreeBody, WriteFileBody, WrittenBody};
use crate::engine::error::{Error, Kind};
use crate::engine::{DirEntry, GuestReader};

/// Largest JSON body that carries a file. Larger files are streamed.
pub(super) const MAX_JSON_FILE: usize = 96 << 20;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(write_file))
        .routes(routes!(read_file))
        .routes(routes!(stat, stat_of_body))
        .routes(routes!(list))
        .routes(routes!(make_dir))
        .routes(routes!(remove))
        .routes(routes!(rename))
        .routes(routes!(read_tree, write_tree))
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
    // A body that breaks off leaves the guest's old file: the writer is dropped unfinished.
    while let Some(piece) = next_piece(&mut content).await? {
        writer.write(&piece).await?;
        size_bytes += piece.len() as u64;
    }
    writer.finish().await?;
    data(WrittenBody { path, size_bytes })
}

/// Reads a file, or a part of it.
#[utoipa::path(get, path = "/sandboxes/{id}/fs/download", tag = "files", params(("path" = String, Query), ("offset" = Option<u64>, Query), ("length" = Option<u64>, Query)), responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream")))]
async fn read_file(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
) -> Result<Response, ApiError> {
    let (offset, length) = (number(&params, "offset")?, number(&params, "length")?);
    let reader = api.engine.read_range(&id, path_of(&params), offset.unwrap_or(0), length).await?;
    Ok(streamed(reader, "application/octet-stream"))
}

fn path_of(params: &HashMap<String, String>) -> &str {
    params.get("path").map(String::as_str).unwrap_or_default()
}

fn number(params: &HashMap<String, String>, name: &str) -> Result<Option<u64>, ApiError> {
    let parse = |text: &String| {
        text.parse().map_err(|_| Error::new(Kind::InvalidInput, format!("{name} is a number of bytes, not {text:?}")))
    };
    Ok(params.get(name).map(parse).transpose()?)
}

/// Chunked: what breaks off ends without the last chunk, and the client sees that.
pub(super) fn streamed(reader: GuestReader, kind: &'static str) -> Response {
    let body = stream::unfold(Some(reader), |reader| async move {
        let mut reader = reader?;
        match reader.next_piece().await {
            Ok(Some(piece)) => Some((Ok(piece), Some(reader))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    });
    ([(header::CONTENT_TYPE, kind)], Body::from_stream(body)).into_response()
}

/// Looks at a file; symbolic links are followed.
#[utoipa::path(get, path = "/sandboxes/{id}/fs/stat", tag = "files", params(("path" = String, Query)), responses((status = 200, body = Envelope<FileBody>)))]
async fn stat(AppState(api): AppState<Api>, Path(id): Path<String>, Params(params): Params) -> Answer<FileBody> {
    let path = path_of(&params);
    data(FileBody::new(path, path, &api.engine.stat_file(&id, path).await?))
}

/// The same, with the path in the body.
#[utoipa::path(post, path = "/sandboxes/{id}/fs/stat", tag = "files", request_body = PathBody, responses((status = 200, body = Envelope<FileBody>)))]
async fn stat_of_body(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<PathBody>,
) -> Answer<FileBody> {
    data(FileBody::new(&body.path, &body.path, &api.engine.stat_file(&id, &body.path).await?))
}

/// Lists a directory.
#[utoipa::path(get, path = "/sandboxes/{id}/fs/list", tag = "files", params(("path" = String, Query)), responses((status = 200, body = ListEnvelope<FileBody>)))]
async fn list(AppState(api): AppState<Api>, Path(id): Path<String>, Params(params): Params) -> ListAnswer<FileBody> {
    let dir = path_of(&params);
    let entries = api.engine.list_files(&id, dir).await?;
    let body = |e: DirEntry| FileBody::new(&e.name, &format!("{}/{}", dir.trim_end_matches('/'), e.name), &e.stat);
    Ok(list_all(entries.into_iter().map(body).collect()))
}

/// Makes a directory and those above it.
#[utoipa::path(post, path = "/sandboxes/{id}/fs/mkdir", tag = "files", request_body = PathBody, responses((status = 200, body = Envelope<PathBody>)))]
async fn make_dir(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<PathBody>,
) -> Answer<PathBody> {
    api.engine.make_dir(&id, &body.path, body.mode).await?;
    data(body)
}

/// Removes a file, a link or a directory.
#[utoipa::path(post, path = "/sandboxes/{id}/fs/remove", tag = "files", request_body = PathBody, responses((status = 200, body = Envelope<PathBody>)))]
async fn remove(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<PathBody>,
) -> Answer<PathBody> {
    api.engine.remove_file(&id, &body.path, body.recursive).await?;
    data(body)
}

/// Gives a file or directory another name.
#[utoipa::path(post, path = "/sandboxes/{id}/fs/rename", tag = "files", request_body = RenameBody, responses((status = 200, body = Envelope<RenameBody>)))]
async fn rename(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<RenameBody>,
) -> Answer<RenameBody> {
    api.engine.rename_file(&id, &body.from, &body.to).await?;
    data(body)
}

/// Reads a directory and all that is in it, as a tar archive.
#[utoipa::path(get, path = "/sandboxes/{id}/fs/archive", tag = "files", params(("path" = String, Query)), responses((status = 200, body = Vec<u8>, content_type = "application/x-tar")))]
async fn read_tree(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
) -> Result<Response, ApiError> {
    Ok(streamed(api.engine.read_tree(&id, path_of(&params)).await?, "application/x-tar"))
}

/// Unpacks a tar archive into a directory; with `delete`, what is not in the archive goes.
#[utoipa::path(post, path = "/sandboxes/{id}/fs/archive", tag = "files", params(("path" = String, Query), ("delete" = Option<bool>, Query)), request_body(content = Vec<u8>, content_type = "application/x-tar"), responses((status = 200, body = Envelope<TreeBody>)))]
async fn write_tree(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
    request: Request,
) -> Answer<TreeBody> {
    let path = path_of(&params);
    let mut writer = api.engine.write_tree(&id, path, flag(&params, "delete")).await?;
    let mut content = request.into_body().into_data_stream();
    while let Some(piece) = next_piece(&mut content).await? {
        writer.write(&piece).await?;
    }
    let done = writer.finish().await?;
    data(TreeBody { path: path.to_owned(), files: done.files, size_bytes: done.bytes, removed: done.removed })
}
