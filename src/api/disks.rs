//! The routes of disks and of the store itself. The daemon serves them beside those of sandboxes; the command line serves
//! them to itself where no daemon holds the store.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State as AppState};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::body::hand_over;
use super::server::{
    Answer, ApiError, JsonBody, ListAnswer, Paging, Params, Path, data, flag, list_all, list_of, open,
};
use super::stream::error_body;
use super::types::{Envelope, Figures, ListEnvelope, OneOrMany, SizeBody};
use crate::disks::frames::{self, Decoder, Part};
use crate::disks::{Attachment, Difference, DiskView, Disks, Export, Frontend, Import};
use crate::engine::error::{Error, Kind, Result};

/// Asks for a disk.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct CreateDiskBody {
    pub name: String,
    pub size_bytes: u64,
    /// Deduplication domain of what is written to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dedup_domain: Option<String>,
}

/// Asks for a snapshot of a disk.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct SnapshotDiskBody {
    pub name: String,
}

/// Asks for disks on the state of another.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ForkDiskBody {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
}

/// Asks for a disk to be shown.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct AttachDiskBody {
    pub frontend: Frontend,
}

/// Asks for a copy of the whole store.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct BackupBody {
    pub name: String,
}

/// A copy of the whole store.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct BackupView {
    /// Its name.
    pub name: String,
    /// A state directory of its own, on the daemon's machine.
    pub path: String,
    /// Packs in it.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
    /// Of these, bytes that were copied; the others are in files that the store has, too.
    pub copied_bytes: u64,
    /// Bytes of its log.
    pub log_bytes: u64,
}

/// The routes, for the daemon to put among its own.
pub fn routes<S: Clone + Send + Sync + 'static>(disks: Arc<Disks>) -> OpenApiRouter<S> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(import))
        .routes(routes!(show, delete))
        .routes(routes!(snapshots, snapshot))
        .routes(routes!(fork))
        .routes(routes!(export))
        .routes(routes!(diff))
        .routes(routes!(attach))
        .routes(routes!(detach))
        .routes(routes!(stats))
        .routes(routes!(usage))
        .routes(routes!(seal))
        .routes(routes!(back_up))
        .routes(routes!(gc))
        .routes(routes!(repack))
        .routes(routes!(check))
        .routes(routes!(scrub))
        .with_state(disks)
}

/// All routes there are without sandboxes.
pub fn router(disks: Arc<Disks>) -> Router {
    let all = routes(disks.clone())
        .merge(super::archives::routes(disks.clone(), None))
        .merge(super::contents::routes(disks, None));
    open(OpenApiRouter::new().nest("/api/v1", all).into())
}

/// Runs a call where it may block.
pub(super) async fn blocking<T: Send + 'static>(call: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(call).await;
    done.unwrap_or_else(|e| Err(Error::new(Kind::Internal, format!("a call of the store did not end: {e}"))))
}

type Shared = AppState<Arc<Disks>>;

/// Lists disks, those of sandboxes too.
#[utoipa::path(get, path = "/disks", tag = "disks", params(Paging), responses((status = 200, body = ListEnvelope<DiskView>)))]
async fn list(AppState(disks): Shared, Params(params): Params) -> ListAnswer<DiskView> {
    list_of(blocking(move || disks.list()).await?, &params)
}

/// Makes an empty disk.
#[utoipa::path(post, path = "/disks", tag = "disks", request_body = CreateDiskBody, responses((status = 201, body = Envelope<DiskView>)))]
async fn create(
    AppState(disks): Shared,
    JsonBody(body): JsonBody<CreateDiskBody>,
) -> std::result::Result<Response, ApiError> {
    let made = blocking(move || disks.create(&body.name, body.size_bytes, body.dedup_domain.as_deref())).await?;
    Ok((StatusCode::CREATED, data::<DiskView>(made)?).into_response())
}

/// Shows a disk or snapshot, and what it costs.
#[utoipa::path(get, path = "/disks/{id}", tag = "disks", responses((status = 200, body = Envelope<DiskView>)))]
async fn show(AppState(disks): Shared, Path(id): Path<String>) -> Answer<DiskView> {
    data(blocking(move || disks.show(&id)).await?)
}

/// Deletes a disk or snapshot; what was made from it stays.
#[utoipa::path(delete, path = "/disks/{id}", tag = "disks", responses((status = 200, body = Envelope<DiskView>)))]
async fn delete(AppState(disks): Shared, Path(id): Path<String>) -> Answer<DiskView> {
    data(blocking(move || disks.delete(&id)).await?)
}

/// Lists the snapshots of a disk.
#[utoipa::path(get, path = "/disks/{id}/snapshots", tag = "disks", params(Paging), responses((status = 200, body = ListEnvelope<DiskView>)))]
async fn snapshots(AppState(disks): Shared, Path(id): Path<String>, Params(params): Params) -> ListAnswer<DiskView> {
    list_of(blocking(move || disks.snapshots(&id)).await?, &params)
}

/// Keeps a disk's present state under a name.
#[utoipa::path(post, path = "/disks/{id}/snapshots", tag = "disks", request_body = SnapshotDiskBody, responses((status = 201, body = Envelope<DiskView>)))]
async fn snapshot(
    AppState(disks): Shared,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<SnapshotDiskBody>,
) -> std::result::Result<Response, ApiError> {
    let made = blocking(move || disks.snapshot(&id, &body.name)).await?;
    Ok((StatusCode::CREATED, data::<DiskView>(made)?).into_response())
}

/// With a count the answer is a list, without a disk.
#[utoipa::path(post, path = "/disks/{id}/fork", tag = "disks", request_body = ForkDiskBody, responses((status = 201, body = OneOrMany<DiskView>)))]
async fn fork(
    AppState(disks): Shared,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ForkDiskBody>,
) -> std::result::Result<Response, ApiError> {
    let mut made = blocking(move || disks.fork(&id, &body.name, body.count)).await?;
    if body.count.is_some() {
        return Ok((StatusCode::CREATED, list_all::<DiskView, _>(made)).into_response());
    }
    let one = made.pop().ok_or_else(|| Error::new(Kind::Internal, "a fork made no disk"))?;
    Ok((StatusCode::CREATED, data::<DiskView>(one)?).into_response())
}

/// Says where two disks or snapshots differ.
#[utoipa::path(get, path = "/disks/{id}/diff", tag = "disks", params(("with" = String, Query)), responses((status = 200, body = Envelope<Difference>)))]
async fn diff(AppState(disks): Shared, Path(id): Path<String>, Params(params): Params) -> Answer<Difference> {
    let Some(with) = params.get("with").cloned() else {
        return Err(Error::new(Kind::InvalidInput, "a difference is between two").hint("?with=ID").into());
    };
    data(blocking(move || disks.diff(&id, &with)).await?)
}

/// Shows a disk, or a snapshot for reading, as a device.
#[utoipa::path(post, path = "/disks/{id}/attach", tag = "disks", request_body = AttachDiskBody, responses((status = 200, body = Envelope<Attachment>)))]
async fn attach(
    AppState(disks): Shared,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<AttachDiskBody>,
) -> Answer<Attachment> {
    data(blocking(move || disks.attach(&id, body.frontend)).await?)
}

/// Ends that.
#[utoipa::path(post, path = "/disks/{id}/detach", tag = "disks", responses((status = 200, body = Envelope<Attachment>)))]
async fn detach(AppState(disks): Shared, Path(id): Path<String>) -> Answer<Attachment> {
    data(blocking(move || disks.detach(&id)).await?)
}

// ---- content

/// `?name=&size_bytes=`, and as the body the disk's bytes as they are, or a sparse stream (see [`frames`]).
#[utoipa::path(post, path = "/disk-imports", tag = "disks", params(("name" = String, Query), ("size_bytes" = u64, Query), ("dedup_domain" = Option<String>, Query, description = "Deduplication domain of what is in it and will be written to it"), ("dry_run" = Option<bool>, Query, description = "Only check these")), request_body(content((Vec<u8> = "application/octet-stream"), (Vec<u8> = "application/x-miosa-sparse"))), responses((status = 200, description = "A dry run", body = Envelope<SizeBody>), (status = 201, body = Envelope<DiskView>)))]
async fn import(
    AppState(disks): Shared,
    Params(params): Params,
    request: Request,
) -> std::result::Result<Response, ApiError> {
    let (name, domain) = (params.get("name").cloned().unwrap_or_default(), params.get("dedup_domain").cloned());
    let size = params.get("size_bytes").and_then(|s| s.parse::<u64>().ok());
    let Some(size) = size else {
        return Err(Error::new(Kind::InvalidInput, "an import needs the size of the disk")
            .hint("&size_bytes=N")
            .into());
    };
    if flag(&params, "dry_run") {
        blocking(move || disks.check_new(&name, size, domain.as_deref())).await?;
        return Ok(data::<SizeBody>(SizeBody { size_bytes: size })?.into_response());
    }
    let sparse = request.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == frames::CONTENT_TYPE);
    let (send, pieces) = mpsc::channel(8);
    let writer = tokio::task::spawn_blocking(move || {
        let import = Import::begin(disks, &name, size, domain.as_deref())?;
        fill(import, size, sparse, pieces)
    });
    // Without a last word the writer knows that there is no whole image, and leaves nothing.
    let sent = hand_over(request, send).await;
    let filled =
        writer.await.unwrap_or_else(|e| Err(Error::new(Kind::Internal, format!("an import did not end: {e}"))));
    let view = sent.and(filled.map_err(ApiError::from))?;
    Ok((StatusCode::CREATED, data::<DiskView>(view)?).into_response())
}

/// Makes a disk of the pieces of a body; the last of them is none.
fn fill(mut import: Import, size: u64, sparse: bool, mut pieces: mpsc::Receiver<Option<Bytes>>) -> Result<DiskView> {
    let cut_off = |why: String| Error::new(Kind::InvalidInput, format!("the image was not all sent: {why}"));
    let mut decoder = Decoder::default();
    let mut at = 0;
    while let Some(piece) = pieces.blocking_recv() {
        match piece {
            Some(piece) if sparse => {
                decoder.push(&piece);
                while let Some(part) = decoder.next_part().map_err(cut_off)? {
                    match part {
                        Part::Size(told) if told != size => {
                            return Err(cut_off(format!("{size} bytes were announced, and its head says {told}")));
                        }
                        Part::Size(_) | Part::End => {}
                        Part::Data(offset, bytes) => import.write(offset, &bytes)?,
                        Part::Error(why) => return Err(cut_off(String::from_utf8_lossy(&why).into_owned())),
                    }
                }
            }
            Some(piece) => {
                import.write(at, &piece)?;
                at += piece.len() as u64;
            }
            None if sparse && !decoder.ended() => return Err(cut_off("its end is missing".to_owned())),
            None if !sparse && at != size => return Err(cut_off(format!("{at} bytes of {size} came"))),
            None => return import.finish(),
        }
    }
    Err(cut_off("the connection broke off".to_owned()))
}

/// A sparse stream (see [`frames`]) of what the disk holds now.
#[utoipa::path(get, path = "/disks/{id}/export", tag = "disks", responses((status = 200, body = Vec<u8>, content_type = "application/x-miosa-sparse")))]
async fn export(AppState(disks): Shared, Path(id): Path<String>) -> std::result::Result<Response, ApiError> {
    let export = blocking(move || Export::begin(disks, &id)).await?;
    let size = export.size_bytes();
    let head = stream::once(async move { Ok::<_, std::convert::Infallible>(frames::begin(size)) });
    let body = stream::unfold(Some(export), move |export| async move {
        let mut export = export?;
        let read = tokio::task::spawn_blocking(move || {
            let piece = export.next_piece();
            // Dropping it ends in a call of the store, too.
            match piece {
                Ok(Some((offset, bytes))) => (frames::data(offset, &bytes), Some(export)),
                Ok(None) => (frames::end(size), None),
                Err(error) => {
                    tracing::error!(%error, "an export broke off");
                    let status = error.kind().status();
                    let why = serde_json::json!({ "status": status, "error": error_body(&error) });
                    (frames::error(why.to_string().as_bytes()), None)
                }
            }
        });
        let (piece, rest) = read.await.ok()?;
        Some((Ok(piece), rest))
    });
    Ok(([(header::CONTENT_TYPE, frames::CONTENT_TYPE)], Body::from_stream(head.chain(body))).into_response())
}

// ---- the store

/// What the store holds and costs.
#[utoipa::path(get, path = "/store/stats", tag = "store", responses((status = 200, body = Envelope<Figures>)))]
async fn stats(AppState(disks): Shared) -> Answer<storage::Stats> {
    data(blocking(move || Ok(disks.store().stats()?)).await?)
}

/// What each disk and snapshot costs.
#[utoipa::path(get, path = "/store/usage", tag = "store", params(Paging), responses((status = 200, body = ListEnvelope<DiskView>)))]
async fn usage(AppState(disks): Shared, Params(params): Params) -> ListAnswer<DiskView> {
    list_of(blocking(move || disks.usage()).await?, &params)
}

/// Deduplicates and compresses everything written so far.
#[utoipa::path(post, path = "/store/seal", tag = "store", responses((status = 200, body = Envelope<Figures>)))]
async fn seal(AppState(disks): Shared) -> Answer<storage::SealReport> {
    data(blocking(move || Ok(disks.store().seal()?)).await?)
}

/// Copies the whole store as of one moment, on the daemon's machine.
#[utoipa::path(post, path = "/store/backups", tag = "store", request_body = BackupBody, responses((status = 201, body = Envelope<BackupView>)))]
async fn back_up(
    AppState(disks): Shared,
    JsonBody(body): JsonBody<BackupBody>,
) -> std::result::Result<Response, ApiError> {
    let name = body.name.clone();
    let (path, made) = blocking(move || disks.back_up(&name)).await?;
    let storage::BackupReport { packs, pack_bytes, copied_bytes, log_bytes } = made;
    let path = path.display().to_string();
    let view = BackupView { name: body.name, path, packs, pack_bytes, copied_bytes, log_bytes };
    Ok((StatusCode::CREATED, data::<BackupView>(view)?).into_response())
}

/// Gives back the space of what nothing refers to.
#[utoipa::path(post, path = "/store/gc", tag = "store", params(("dry_run" = Option<bool>, Query)), responses((status = 200, body = Envelope<Figures>)))]
async fn gc(AppState(disks): Shared, Params(params): Params) -> Answer<storage::GcReport> {
    let dry_run = flag(&params, "dry_run");
    data(blocking(move || Ok(disks.store().gc(dry_run)?)).await?)
}

/// Compresses everything again that is sealed, harder, and returns when it is done.
#[utoipa::path(post, path = "/store/repack", tag = "store", responses((status = 200, body = Envelope<Figures>)))]
async fn repack(AppState(disks): Shared) -> Answer<storage::RepackReport> {
    data(blocking(move || Ok(disks.store().repack()?)).await?)
}

/// Reads everything that is stored and compares it with its checksums.
#[utoipa::path(post, path = "/store/check", tag = "store", responses((status = 200, body = Envelope<Figures>)))]
async fn check(AppState(disks): Shared) -> Answer<storage::CheckReport> {
    data(blocking(move || Ok(disks.store().check()?)).await?)
}

/// The same, and heals what has an undamaged copy.
#[utoipa::path(post, path = "/store/scrub", tag = "store", params(("heal" = Option<bool>, Query)), responses((status = 200, body = Envelope<Figures>)))]
async fn scrub(AppState(disks): Shared, Params(params): Params) -> Answer<storage::CheckReport> {
    let heal = flag(&params, "heal");
    data(blocking(move || Ok(disks.store().scrub(heal)?)).await?)
}
