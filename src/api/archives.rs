//! Routes of archives and of the report: see [`crate::disks`].

use std::io::{self, Read};
use std::sync::Arc;

use axum::extract::{Request, State as AppState};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::body::hand_over;
use super::client;
use super::contents::{settle, stream_of};
use super::disks::blocking;
use super::server::{Answer, ApiError, Params, Path, data, flag};
use super::types::{Envelope, SnapshotBody};
use crate::disks::{DiskView, Disks, Report};
use crate::engine::Engine;
use crate::engine::error::{Error, Kind, Result};

#[derive(Clone)]
struct Archives {
    disks: Arc<Disks>,
    engine: Option<Arc<Engine>>,
}

/// The routes, for whoever serves those of disks.
pub fn routes<S: Clone + Send + Sync + 'static>(disks: Arc<Disks>, engine: Option<Arc<Engine>>) -> OpenApiRouter<S> {
    let all = OpenApiRouter::new().routes(routes!(disk_archive)).routes(routes!(import_disks)).routes(routes!(report));
    let all = match &engine {
        Some(_) => all.routes(routes!(snapshot_archive)).routes(routes!(import_snapshot)),
        None => all,
    };
    all.with_state(Archives { disks, engine })
}

/// What everything that is kept costs, who shares it, and what deleting it would give back.
#[utoipa::path(get, path = "/store/report", tag = "store", responses((status = 200, body = Envelope<Report>)))]
async fn report(AppState(at): AppState<Archives>) -> Answer<Report> {
    data(blocking(move || at.disks.report()).await?)
}

/// A disk or snapshot as an archive, which carries deduplication and compression.
#[utoipa::path(get, path = "/disks/{id}/archive", tag = "disks", responses((status = 200, body = Vec<u8>, content_type = "application/x-miosa-archive")))]
async fn disk_archive(at: AppState<Archives>, key: Path<String>) -> std::result::Result<Response, ApiError> {
    archive(at, key).await
}

/// A snapshot as an archive, which carries deduplication, compression, and what is known of the snapshot.
#[utoipa::path(get, path = "/snapshots/{snapshot}/archive", tag = "snapshots", responses((status = 200, body = Vec<u8>, content_type = "application/x-miosa-archive")))]
async fn snapshot_archive(at: AppState<Archives>, key: Path<String>) -> std::result::Result<Response, ApiError> {
    archive(at, key).await
}

async fn archive(AppState(at): AppState<Archives>, Path(key): Path<String>) -> std::result::Result<Response, ApiError> {
    settle(at.engine.as_ref(), &key).await?;
    let export = blocking(move || at.disks.archive(&key)).await?;
    let body = stream_of("an archive", move |to| match export.write(to) {
        Ok(_) => Ok(()),
        Err(error) => Err(io::Error::other(error.to_string())),
    });
    Ok(([(header::CONTENT_TYPE, client::MIOSA_ARCHIVE)], body).into_response())
}

/// Makes disks of an archive.
#[utoipa::path(post, path = "/disk-archives", tag = "disks", params(("name" = String, Query), ("dedup_domain" = Option<String>, Query), ("dry_run" = Option<bool>, Query)), request_body(content = Vec<u8>, content_type = "application/x-miosa-archive"), responses((status = 201, body = Envelope<Vec<DiskView>>)))]
async fn import_disks(
    AppState(at): AppState<Archives>,
    params: Params,
    request: Request,
) -> std::result::Result<Response, ApiError> {
    let (name, domain) = (params.get("name").cloned().unwrap_or_default(), params.get("dedup_domain").cloned());
    if flag(&params, "dry_run") {
        blocking(move || at.disks.check_import(&name, domain.as_deref())).await?;
        return Ok(data::<Vec<DiskView>>(Vec::new())?.into_response());
    }
    let made = take_in(request, move |body| at.disks.import_archive(&name, domain.as_deref(), body)).await?;
    Ok((StatusCode::CREATED, data::<Vec<DiskView>>(made)?).into_response())
}

/// Makes a snapshot of an archive of one.
#[utoipa::path(post, path = "/snapshot-archives", tag = "snapshots", params(("name" = Option<String>, Query)), request_body(content = Vec<u8>, content_type = "application/x-miosa-archive"), responses((status = 201, body = Envelope<SnapshotBody>)))]
async fn import_snapshot(
    AppState(at): AppState<Archives>,
    params: Params,
    request: Request,
) -> std::result::Result<Response, ApiError> {
    let name = params.get("name").cloned();
    let disks = at.disks;
    let made = take_in(request, move |body| disks.import_snapshot(name.as_deref(), body)).await?;
    if let Some(engine) = &at.engine {
        engine.adopt_snapshot(made.clone());
    }
    Ok((StatusCode::CREATED, data::<SnapshotBody>(made)?).into_response())
}

/// Reads a request's body where it may block.
async fn take_in<T: Send + 'static>(
    request: Request,
    read: impl FnOnce(Incoming) -> Result<T> + Send + 'static,
) -> std::result::Result<T, ApiError> {
    let (send, pieces) = mpsc::channel(8);
    let reading = tokio::task::spawn_blocking(move || read(Incoming { pieces, have: Bytes::new(), ended: false }));
    // Without a last word the reader knows that there is no whole archive, and leaves nothing.
    let sent = hand_over(request, send).await;
    let read = reading.await.unwrap_or_else(|e| Err(Error::new(Kind::Internal, format!("an import did not end: {e}"))));
    sent.and(read.map_err(ApiError::from))
}

/// The pieces of a body as a file; the last of them is none.
struct Incoming {
    pieces: mpsc::Receiver<Option<Bytes>>,
    have: Bytes,
    ended: bool,
}

impl Read for Incoming {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        while self.have.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Some(piece)) => self.have = piece,
                Some(None) => self.ended = true,
                None => {
                    return Err(std::io::Error::new(std::io::ErrorKind::ConnectionAborted, "the connection broke off"));
                }
            }
        }
        let len = buf.len().min(self.have.len());
        self.have.copy_to_slice(&mut buf[..len]);
        Ok(len)
    }
}
