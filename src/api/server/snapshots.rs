//! Snapshots, of one sandbox and of all.

use axum::Json;
use axum::extract::State as AppState;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_of};
use super::request::{JsonBody, Paging, Params, Path, refuse_unsupported};
use crate::api::types::{Envelope, ListEnvelope, SnapshotBody, SnapshotRequestBody};

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(take_snapshot_short))
        .routes(routes!(sandbox_snapshots, take_snapshot))
        .routes(routes!(sandbox_snapshot, delete_sandbox_snapshot))
        .routes(routes!(snapshots))
        .routes(routes!(snapshot, delete_snapshot))
}

/// Keeps the present state under a name.
#[utoipa::path(post, path = "/sandboxes/{id}/snapshots", tag = "snapshots", request_body = SnapshotRequestBody, responses((status = 201, body = Envelope<SnapshotBody>)))]
async fn take_snapshot(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<SnapshotRequestBody>,
) -> Result<(StatusCode, Json<Envelope<SnapshotBody>>), ApiError> {
    refuse_unsupported("snapshot", &body.other)?;
    Ok((StatusCode::CREATED, data(api.engine.snapshot(&id, body.comment).await?)?))
}

/// The same under the other path that clients know.
#[utoipa::path(post, path = "/sandboxes/{id}/snapshot", tag = "snapshots", request_body = SnapshotRequestBody, responses((status = 201, body = Envelope<SnapshotBody>)))]
async fn take_snapshot_short(
    api: AppState<Api>,
    id: Path<String>,
    body: JsonBody<SnapshotRequestBody>,
) -> Result<(StatusCode, Json<Envelope<SnapshotBody>>), ApiError> {
    take_snapshot(api, id, body).await
}

/// Lists snapshots, oldest first.
#[utoipa::path(get, path = "/snapshots", tag = "snapshots", params(("resource_id" = Option<String>, Query, description = "Only those of this sandbox"), Paging), responses((status = 200, body = ListEnvelope<SnapshotBody>)))]
async fn snapshots(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<SnapshotBody> {
    list_of(api.engine.snapshots(params.get("resource_id").map(String::as_str))?, &params)
}

/// Shows a snapshot, by id or by a name that only one has.
#[utoipa::path(get, path = "/snapshots/{snapshot}", tag = "snapshots", responses((status = 200, body = Envelope<SnapshotBody>)))]
async fn snapshot(AppState(api): AppState<Api>, Path(snapshot): Path<String>) -> Answer<SnapshotBody> {
    data(api.engine.find_snapshot(&snapshot, None)?)
}

/// Deletes a snapshot; what was made from it stays.
#[utoipa::path(delete, path = "/snapshots/{snapshot}", tag = "snapshots", responses((status = 200, body = Envelope<SnapshotBody>)))]
async fn delete_snapshot(AppState(api): AppState<Api>, Path(snapshot): Path<String>) -> Answer<SnapshotBody> {
    data(api.engine.delete_snapshot(&snapshot, None).await?)
}

/// Lists the snapshots of a sandbox.
#[utoipa::path(get, path = "/sandboxes/{id}/snapshots", tag = "snapshots", params(Paging), responses((status = 200, body = ListEnvelope<SnapshotBody>)))]
async fn sandbox_snapshots(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
) -> ListAnswer<SnapshotBody> {
    list_of(api.engine.snapshots(Some(&id))?, &params)
}

/// Shows a snapshot of a sandbox.
#[utoipa::path(get, path = "/sandboxes/{id}/snapshots/{snapshot}", tag = "snapshots", responses((status = 200, body = Envelope<SnapshotBody>)))]
async fn sandbox_snapshot(
    AppState(api): AppState<Api>,
    Path((id, snapshot)): Path<(String, String)>,
) -> Answer<SnapshotBody> {
    data(api.engine.find_snapshot(&snapshot, Some(&id))?)
}

/// Deletes a snapshot of a sandbox.
#[utoipa::path(delete, path = "/sandboxes/{id}/snapshots/{snapshot}", tag = "snapshots", responses((status = 200, body = Envelope<SnapshotBody>)))]
async fn delete_sandbox_snapshot(
    AppState(api): AppState<Api>,
    Path((id, snapshot)): Path<(String, String)>,
) -> Answer<SnapshotBody> {
    data(api.engine.delete_snapshot(&snapshot, Some(&id)).await?)
}
