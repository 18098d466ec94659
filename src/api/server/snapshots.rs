//! Snapshots, of one sandbox and of all.

use axum::extract::State as AppState;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_of};
use super::request::{JsonBody, Params, Path, refuse_unsupported};
use crate::api::types::{Envelope, SnapshotBody, SnapshotRequestBody};

pub(super) fn routes() -> Router<Api> {
    Router::new()
        .route("/sandboxes/{id}/snapshot", post(take_snapshot))
        .route("/sandboxes/{id}/snapshots", get(sandbox_snapshots).post(take_snapshot))
        .route("/sandboxes/{id}/snapshots/{snapshot}", get(sandbox_snapshot).delete(delete_sandbox_snapshot))
        .route("/snapshots", get(snapshots))
        .route("/snapshots/{snapshot}", get(snapshot).delete(delete_snapshot))
}

async fn take_snapshot(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<SnapshotRequestBody>,
) -> Result<(StatusCode, Json<Envelope<SnapshotBody>>), ApiError> {
    refuse_unsupported("snapshot", &body.other)?;
    Ok((StatusCode::CREATED, data(api.engine.snapshot(&id, body.comment).await?)?))
}

async fn snapshots(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<SnapshotBody> {
    list_of(api.engine.snapshots(params.get("resource_id").map(String::as_str))?)
}

async fn snapshot(AppState(api): AppState<Api>, Path(snapshot): Path<String>) -> Answer<SnapshotBody> {
    data(api.engine.find_snapshot(&snapshot, None)?)
}

async fn delete_snapshot(AppState(api): AppState<Api>, Path(snapshot): Path<String>) -> Answer<SnapshotBody> {
    data(api.engine.delete_snapshot(&snapshot, None).await?)
}

async fn sandbox_snapshots(AppState(api): AppState<Api>, Path(id): Path<String>) -> ListAnswer<SnapshotBody> {
    list_of(api.engine.snapshots(Some(&id))?)
}

async fn sandbox_snapshot(
    AppState(api): AppState<Api>,
    Path((id, snapshot)): Path<(String, String)>,
) -> Answer<SnapshotBody> {
    data(api.engine.find_snapshot(&snapshot, Some(&id))?)
}

async fn delete_sandbox_snapshot(
    AppState(api): AppState<Api>,
    Path((id, snapshot)): Path<(String, String)>,
) -> Answer<SnapshotBody> {
    data(api.engine.delete_snapshot(&snapshot, Some(&id)).await?)
}
