//! Routes of the files on disks and snapshots: lists, content and differences, without booting anything.

use std::io::Write;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State as AppState;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::client;
use super::disks::blocking;
use super::server::{Answer, ApiError, Params, Path, data, flag};
use super::types::Envelope;
use crate::disks::{Content, Disks, FileView};
use crate::engine::Engine;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::lifecycle::State;
use crate::ext4::diff::FileDiff;

/// Bytes of an archive that are sent at a time.
const PIECE: usize = 256 << 10;

/// What these routes work on.
#[derive(Clone)]
struct Contents {
    disks: Arc<Disks>,
    /// Whose sandboxes are told to write back what they hold, if any runs.
    engine: Option<Arc<Engine>>,
}

/// A folder's entries. The image is always ready to be read.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct TreeBody {
    pub status: String,
    pub path: String,
    pub is_directory: bool,
    pub entries: Vec<FileView>,
}

/// The routes, for whoever serves those of disks.
pub fn routes<S: Clone + Send + Sync + 'static>(disks: Arc<Disks>, engine: Option<Arc<Engine>>) -> OpenApiRouter<S> {
    OpenApiRouter::new()
        .routes(routes!(snapshot_tree))
        .routes(routes!(snapshot_files))
        .routes(routes!(snapshot_diff))
        .routes(routes!(disk_tree))
        .routes(routes!(disk_files))
        .routes(routes!(disk_file_diff))
        .with_state(Contents { disks, engine })
}

/// Sees that what a running sandbox has written so far is on its disk.
pub(super) async fn settle(engine: Option<&Arc<Engine>>, key: &str) -> Result<()> {
    let Some(engine) = engine else { return Ok(()) };
    match engine.show(key) {
        Ok(sandbox) if sandbox.record.state == State::Running => engine.settle(&sandbox.record.id).await,
        _ => Ok(()),
    }
}

/// Lists a folder of a snapshot's disk; `key` can be that of a sandbox or a template, too.
#[utoipa::path(get, path = "/snapshots/{snapshot}/tree", tag = "snapshots", params(("path" = Option<String>, Query, description = "Absolute; by default the root"), ("recursive" = Option<bool>, Query)), responses((status = 200, body = Envelope<TreeBody>)))]
async fn snapshot_tree(at: AppState<Contents>, key: Path<String>, params: Params) -> Answer<TreeBody> {
    tree(at, key, params).await
}

/// Lists a folder of a disk.
#[utoipa::path(get, path = "/disks/{id}/tree", tag = "disks", params(("path" = Option<String>, Query, description = "Absolute; by default the root"), ("recursive" = Option<bool>, Query)), responses((status = 200, body = Envelope<TreeBody>)))]
async fn disk_tree(at: AppState<Contents>, key: Path<String>, params: Params) -> Answer<TreeBody> {
    tree(at, key, params).await
}

/// A file of a snapshot's disk, or a folder as a tar archive.
#[utoipa::path(get, path = "/snapshots/{snapshot}/files", tag = "snapshots", params(("path" = Option<String>, Query, description = "Absolute; by default the root"), ("archive" = Option<bool>, Query, description = "An archive of a file, too")), responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream")))]
async fn snapshot_files(at: AppState<Contents>, key: Path<String>, params: Params) -> Sent {
    files(at, key, params).await
}

/// A file of a disk, or a folder as a tar archive.
#[utoipa::path(get, path = "/disks/{id}/files", tag = "disks", params(("path" = Option<String>, Query, description = "Absolute; by default the root"), ("archive" = Option<bool>, Query, description = "An archive of a file, too")), responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream")))]
async fn disk_files(at: AppState<Contents>, key: Path<String>, params: Params) -> Sent {
    files(at, key, params).await
}

/// Says which files differ between a snapshot and another one, or the present state of a sandbox.
#[utoipa::path(get, path = "/snapshots/{snapshot}/diff", tag = "snapshots", params(("with" = String, Query)), responses((status = 200, body = Envelope<FileDiff>)))]
async fn snapshot_diff(at: AppState<Contents>, key: Path<String>, params: Params) -> Answer<FileDiff> {
    diff(at, key, params).await
}

/// Says which files differ between two disks.
#[utoipa::path(get, path = "/disks/{id}/file-diff", tag = "disks", params(("with" = String, Query)), responses((status = 200, body = Envelope<FileDiff>)))]
async fn disk_file_diff(at: AppState<Contents>, key: Path<String>, params: Params) -> Answer<FileDiff> {
    diff(at, key, params).await
}

type Sent = std::result::Result<Response, ApiError>;

fn path_of(params: &Params) -> String {
    params.get("path").filter(|p| !p.is_empty()).cloned().unwrap_or_else(|| "/".to_owned())
}

async fn tree(AppState(at): AppState<Contents>, Path(key): Path<String>, params: Params) -> Answer<TreeBody> {
    settle(at.engine.as_ref(), &key).await?;
    let (path, recursive) = (path_of(&params), flag(&params, "recursive"));
    let listing = blocking(move || at.disks.list_files(&key, &path, recursive)).await?;
    data(TreeBody {
        status: "ready".to_owned(),
        path: listing.path,
        is_directory: listing.is_directory,
        entries: listing.files,
    })
}

async fn files(AppState(at): AppState<Contents>, Path(key): Path<String>, params: Params) -> Sent {
    settle(at.engine.as_ref(), &key).await?;
    let (path, archive) = (path_of(&params), flag(&params, "archive"));
    let content = blocking(move || at.disks.open_content(&key, &path, archive)).await?;
    Ok(send(content))
}

async fn diff(AppState(at): AppState<Contents>, Path(key): Path<String>, params: Params) -> Answer<FileDiff> {
    let Some(with) = params.get("with").cloned() else {
        return Err(Error::new(Kind::InvalidInput, "a difference is between two").hint("?with=ID").into());
    };
    settle(at.engine.as_ref(), &key).await?;
    settle(at.engine.as_ref(), &with).await?;
    data(blocking(move || at.disks.file_diff(&key, &with)).await?)
}

/// A file's bytes, or an archive. What fails on the way breaks the body off.
fn send(content: Content) -> Response {
    let (size, (to, from)) = (content.size_bytes(), mpsc::channel(4));
    let kind = if size.is_some() { client::BYTES } else { client::ARCHIVE };
    tokio::task::spawn_blocking(move || {
        let pieces = std::io::BufWriter::with_capacity(PIECE, Pieces(to.clone()));
        if let Ok(Err(error)) = content.write(pieces) {
            tracing::error!(%error, "files could not be read to their end");
            let _ = to.blocking_send(Err(std::io::Error::other(error.to_string())));
        }
    });
    let body = Body::from_stream(stream::unfold(from, |mut from| async move { Some((from.recv().await?, from)) }));
    let mut response = ([(header::CONTENT_TYPE, kind)], body).into_response();
    if let Some(size) = size {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(size));
    }
    response
}

/// What is written becomes pieces of a body.
pub(super) struct Pieces(pub(super) mpsc::Sender<std::io::Result<Bytes>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map(|()| bytes.len()).map_err(|_| std::io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
