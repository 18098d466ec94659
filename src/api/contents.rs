//! Routes of the files on disks and snapshots: lists, content and differences, without booting anything.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::body::Body;
use axum::extract::State as AppState;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::client;
use super::disks::blocking;
use super::server::{Answer, ApiError, JsonBody, Params, Path, data, flag, refuse_unsupported};
use super::types::Envelope;
use crate::disks::{Content, Disks, FileView, PublishRequest, Still};
use crate::engine::Engine;
use crate::engine::error::{Error, Kind, Result};
use crate::engine::lifecycle::State;
use crate::ext4::diff::FileDiff;
use crate::oci::Compression;

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
        .routes(routes!(publish_snapshot))
        .routes(routes!(publish_sandbox))
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

/// The state of what `key` names; of a sandbox that runs with all that it has written.
async fn still(at: &Contents, key: &str) -> Result<Arc<Still>> {
    let (disks, name) = (at.disks.clone(), key.to_owned());
    let take = move || disks.still(&name).map(Arc::new);
    match &at.engine {
        Some(engine) if engine.show(key).is_ok_and(|s| s.record.state == State::Running) => {
            engine.settled(key, take).await
        }
        _ => blocking(take).await,
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

/// What becomes an image, and how it wants to be run.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct PublishBody {
    /// What is published: an absolute path, `/` for the whole file system. It is at the same path in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(default = "/workspace")]
    pub path: Option<String>,
    /// The image's name, such as `web:1`; by default the sandbox's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// A template or snapshot whose whole file system lies below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    pub env: BTreeMap<String, String>,
    /// Such as `3000` or `53/udp`.
    pub ports: Vec<String>,
    /// By default the path, if that is a directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// How layers are compressed.
    #[schema(default = "gzip")]
    pub compression: Compression,
    /// Whatever else the request has.
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// Makes a container image of a sandbox's files, as an archive in the OCI image layout that `docker load` takes, too. A
/// sandbox that runs goes on; one that is paused stays so.
#[utoipa::path(post, path = "/sandboxes/{id}/publish", tag = "publish", request_body = PublishBody, responses((status = 200, description = "The archive. Headers: x-image-name, x-image-digest", body = Vec<u8>, content_type = "application/x-tar")))]
async fn publish_sandbox(at: AppState<Contents>, key: Path<String>, body: JsonBody<PublishBody>) -> Sent {
    if let Some(engine) = &at.engine {
        engine.show(&key.0)?;
    }
    publish(at, key, body).await
}

/// Makes a container image of the files of a snapshot; the key can be that of a sandbox, a template or a disk, too.
#[utoipa::path(post, path = "/snapshots/{snapshot}/publish", tag = "publish", request_body = PublishBody, responses((status = 200, description = "The archive. Headers: x-image-name, x-image-digest", body = Vec<u8>, content_type = "application/x-tar")))]
async fn publish_snapshot(at: AppState<Contents>, key: Path<String>, body: JsonBody<PublishBody>) -> Sent {
    publish(at, key, body).await
}

async fn publish(
    AppState(at): AppState<Contents>,
    Path(key): Path<String>,
    JsonBody(body): JsonBody<PublishBody>,
) -> Sent {
    refuse_unsupported("publish", &body.other)?;
    let from = still(&at, &key).await?;
    let base = match &body.base {
        Some(base) => Some(still(&at, base).await?),
        None => None,
    };
    let request = PublishRequest {
        path: body.path.unwrap_or_else(|| "/workspace".to_owned()),
        name: body.tag,
        cmd: body.cmd,
        entrypoint: body.entrypoint,
        env: body.env,
        ports: body.ports,
        workdir: body.workdir,
        user: body.user,
        compression: body.compression,
    };
    // Set when the caller goes away, and this future with it.
    let given_up = GivenUp::default();
    let flag = given_up.0.clone();
    let image = blocking(move || at.disks.publish(&from, base.as_deref(), &request, &flag)).await?;
    let (size, name, digest) = (image.size_bytes(), image.name(), image.digest());
    let mut response = stream_of("an image", move |to| image.write(to)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(client::ARCHIVE));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(size));
    for (key, value) in [(client::IMAGE_NAME, name), (client::IMAGE_DIGEST, digest)] {
        headers.extend(HeaderValue::from_str(&value).ok().map(|value| (HeaderName::from_static(key), value)));
    }
    Ok(response)
}

/// Tells work that goes on elsewhere that nobody waits for it.
#[derive(Default)]
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A body of what `write` writes in a thread of its own. What fails on the way breaks the body off.
pub(super) fn stream_of(
    what: &'static str,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static,
) -> Body {
    let (to, from) = mpsc::channel(4);
    tokio::task::spawn_blocking(move || {
        let mut pieces = io::BufWriter::with_capacity(PIECE, Pieces(to.clone()));
        if let Err(error) = write(&mut pieces).and_then(|()| pieces.flush())
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            tracing::error!(%error, "{what} broke off");
            let _ = to.blocking_send(Err(error));
        }
    });
    Body::from_stream(stream::unfold(from, |mut from| async move { Some((from.recv().await?, from)) }))
}

/// A file's bytes, or an archive.
fn send(content: Content) -> Response {
    let size = content.size_bytes();
    let kind = if size.is_some() { client::BYTES } else { client::ARCHIVE };
    let body = stream_of("reading files", move |to| content.write(to)?.map_err(|e| io::Error::other(e.to_string())));
    let mut response = ([(header::CONTENT_TYPE, kind)], body).into_response();
    if let Some(size) = size {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(size));
    }
    response
}

/// What is written becomes pieces of a body.
struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
