//! Snapshots, of one sandbox and of all.

use axum::Json;
use axum::extract::State as AppState;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_all, list_of};
use super::changes::Retention;
use super::request::{JsonBody, Paging, Params, Path, flag, refuse_unsupported, timeout};
use crate::api::types::{Envelope, ListEnvelope, SandboxBody, SnapshotBody, SnapshotRequestBody};
use crate::engine::{LineageNode, SnapshotRequest};

/// Whether a deletion says what it gives back; that walks the maps of all disks.
#[derive(utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "for the description")]
struct Measure {
    /// Say what it gives back.
    measure: Option<bool>,
}

/// Whether a lineage has sizes; that walks the maps of all disks.
#[derive(utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "for the description")]
struct Sizes {
    /// Say what each holds that nothing else has.
    sizes: Option<bool>,
}

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(take_snapshot_short))
        .routes(routes!(sandbox_snapshots, take_snapshot))
        .routes(routes!(sandbox_snapshot, delete_sandbox_snapshot))
        .routes(routes!(sandbox_tree))
        .routes(routes!(restore))
        .routes(routes!(tree))
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
    let own = Retention::of(&api.engine.show(&id)?.record.metadata)?;
    let request = SnapshotRequest {
        comment: body.comment,
        memory: body.memory.unwrap_or(false),
        stop: body.stop.unwrap_or(false),
        expires_in: timeout(body.expiration_sec.or(own.expiration_sec), None)?,
        keep_last: body.keep_last_snapshots.or(own.keep_last),
    };
    Ok((StatusCode::CREATED, data(api.engine.snapshot(&id, request).await?)?))
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
    let mut all = api.engine.snapshots(params.get("resource_id").map(String::as_str))?;
    all.retain(|snapshot| !api.engine.is_named(&snapshot.id));
    list_of(all, &params)
}

/// Shows a snapshot, by id or by a name that only one has.
#[utoipa::path(get, path = "/snapshots/{snapshot}", tag = "snapshots", responses((status = 200, body = Envelope<SnapshotBody>)))]
async fn snapshot(AppState(api): AppState<Api>, Path(snapshot): Path<String>) -> Answer<SnapshotBody> {
    data(api.engine.find_snapshot(&snapshot, None)?)
}

/// Deletes a snapshot; what was made from it stays.
#[utoipa::path(delete, path = "/snapshots/{snapshot}", tag = "snapshots", params(Measure), responses((status = 200, body = Envelope<SnapshotBody>)))]
async fn delete_snapshot(
    AppState(api): AppState<Api>,
    Path(snapshot): Path<String>,
    Params(params): Params,
) -> Answer<SnapshotBody> {
    data(api.engine.delete_snapshot(&snapshot, None, flag(&params, "measure")).await?)
}

/// Shows what came from what: templates, sandboxes and snapshots.
#[utoipa::path(get, path = "/snapshots/tree", tag = "snapshots", params(Sizes), responses((status = 200, body = ListEnvelope<LineageNode>)))]
async fn tree(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<LineageNode> {
    Ok(list_all(api.engine.lineage(None, flag(&params, "sizes")).await?))
}

/// Shows what a sandbox came from, and what came from it.
#[utoipa::path(get, path = "/sandboxes/{id}/snapshots/tree", tag = "snapshots", params(Sizes), responses((status = 200, body = ListEnvelope<LineageNode>)))]
async fn sandbox_tree(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
) -> ListAnswer<LineageNode> {
    Ok(list_all(api.engine.lineage(Some(&id), flag(&params, "sizes")).await?))
}

/// Puts the file system back to a snapshot of the sandbox. A running session ends, and a new one begins.
#[utoipa::path(post, path = "/sandboxes/{id}/restore/{snapshot}", tag = "snapshots", responses((status = 200, body = Envelope<SandboxBody>)))]
async fn restore(AppState(api): AppState<Api>, Path((id, snapshot)): Path<(String, String)>) -> Answer<SandboxBody> {
    data(api.engine.restore(&id, &snapshot).await?)
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
#[utoipa::path(delete, path = "/sandboxes/{id}/snapshots/{snapshot}", tag = "snapshots", params(Measure), responses((status = 200, body = Envelope<SnapshotBody>)))]
async fn delete_sandbox_snapshot(
    AppState(api): AppState<Api>,
    Path((id, snapshot)): Path<(String, String)>,
    Params(params): Params,
) -> Answer<SnapshotBody> {
    data(api.engine.delete_snapshot(&snapshot, Some(&id), flag(&params, "measure")).await?)
}
