//! Volumes, their snapshots, and the sandboxes that have them.

use axum::Json;
use axum::extract::State as AppState;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_of};
use super::request::{JsonBody, Paging, Params, Path, refuse_unsupported};
use crate::api::types::{
    AttachVolumeBody, AttachmentBody, CreateVolumeBody, DetachVolumeBody, Envelope, ListEnvelope, SnapshotVolumeBody,
    VolumeBody, VolumeSnapshotBody,
};
use crate::engine::CreateVolume;
use crate::engine::error::{Error, Kind};
use crate::engine::records::VolumeRecord;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(all_snapshots))
        .routes(routes!(delete_snapshot))
        .routes(routes!(show, delete))
        .routes(routes!(snapshots, snapshot))
        .routes(routes!(restore))
        .routes(routes!(detach_volume))
        .routes(routes!(attachments, attach))
        .routes(routes!(detach))
        .routes(routes!(attachments_of_computer, attach_to_computer))
        .routes(routes!(detach_from_computer))
}

/// Lists volumes, oldest first.
#[utoipa::path(get, path = "/volumes", tag = "volumes", params(Paging), responses((status = 200, body = ListEnvelope<VolumeBody>)))]
async fn list(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<VolumeBody> {
    list_of(api.engine.volumes(), &params)
}

/// Makes a volume: empty, with a file system, or as a snapshot of one was.
#[utoipa::path(post, path = "/volumes", tag = "volumes", request_body = CreateVolumeBody, responses((status = 201, body = Envelope<VolumeBody>)))]
async fn create(
    AppState(api): AppState<Api>,
    JsonBody(body): JsonBody<CreateVolumeBody>,
) -> Result<(StatusCode, Json<Envelope<VolumeBody>>), ApiError> {
    refuse_unsupported("a volume", &body.other)?;
    let sizes = [(body.size_gb, 1 << 30), (body.size_mb, 1 << 20), (body.size_bytes, 1)];
    let mut sizes = sizes.into_iter().filter_map(|(size, unit): (Option<u64>, u64)| Some(size?.saturating_mul(unit)));
    let size_bytes = sizes.next();
    if sizes.next().is_some() {
        return Err(Error::new(Kind::InvalidInput, "the size is given twice")
            .hint("give one: size_gb or size_mb")
            .into());
    }
    let request =
        CreateVolume { name: body.name, size_bytes, snapshot: body.snapshot_id, dedup_domain: body.dedup_domain };
    Ok((StatusCode::CREATED, data(api.engine.create_volume(request).await?)?))
}

/// Shows a volume, by id or name, and what it costs, for which the maps of all disks are walked.
#[utoipa::path(get, path = "/volumes/{volume}", tag = "volumes", responses((status = 200, body = Envelope<VolumeBody>)))]
async fn show(AppState(api): AppState<Api>, Path(volume): Path<String>) -> Answer<VolumeBody> {
    let record = api.engine.volume(&volume)?;
    let usage = api.engine.volume_usage(&record.id).await?;
    data(VolumeBody {
        logical_bytes: Some(usage.logical_bytes),
        referenced_bytes: Some(usage.referenced_bytes),
        exclusive_bytes: Some(usage.exclusive_bytes),
        unsealed_bytes: Some(usage.unsealed_bytes),
        ..record.into()
    })
}

/// Deletes a volume that no sandbox has. Its snapshots stay.
#[utoipa::path(delete, path = "/volumes/{volume}", tag = "volumes", responses((status = 200, body = Envelope<VolumeBody>)))]
async fn delete(AppState(api): AppState<Api>, Path(volume): Path<String>) -> Answer<VolumeBody> {
    let deleted = VolumeBody::from(api.engine.delete_volume(&volume).await?);
    data(VolumeBody { status: "deleted".to_owned(), ..deleted })
}

/// Lists the snapshots of a volume, oldest first.
#[utoipa::path(get, path = "/volumes/{volume}/snapshots", tag = "volumes", params(Paging), responses((status = 200, body = ListEnvelope<VolumeSnapshotBody>)))]
async fn snapshots(
    AppState(api): AppState<Api>,
    Path(volume): Path<String>,
    Params(params): Params,
) -> ListAnswer<VolumeSnapshotBody> {
    list_of(api.engine.volume_snapshots(Some(&volume))?, &params)
}

/// Keeps a volume's present state; the file systems of a running sandbox that writes to it are frozen meanwhile.
#[utoipa::path(post, path = "/volumes/{volume}/snapshots", tag = "volumes", request_body = SnapshotVolumeBody, responses((status = 201, body = Envelope<VolumeSnapshotBody>)))]
async fn snapshot(
    AppState(api): AppState<Api>,
    Path(volume): Path<String>,
    JsonBody(body): JsonBody<SnapshotVolumeBody>,
) -> Result<(StatusCode, Json<Envelope<VolumeSnapshotBody>>), ApiError> {
    Ok((StatusCode::CREATED, data(api.engine.snapshot_volume(&volume, body.name).await?)?))
}

/// Lists the snapshots of all volumes, also of those that are gone, oldest first.
#[utoipa::path(get, path = "/volume-snapshots", tag = "volumes", params(Paging), responses((status = 200, body = ListEnvelope<VolumeSnapshotBody>)))]
async fn all_snapshots(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<VolumeSnapshotBody> {
    list_of(api.engine.volume_snapshots(None)?, &params)
}

/// Deletes a snapshot of a volume, by id or by a name that only one has.
#[utoipa::path(delete, path = "/volume-snapshots/{snapshot}", tag = "volumes", responses((status = 200, body = Envelope<VolumeSnapshotBody>)))]
async fn delete_snapshot(AppState(api): AppState<Api>, Path(snapshot): Path<String>) -> Answer<VolumeSnapshotBody> {
    let deleted = VolumeSnapshotBody::from(api.engine.delete_volume_snapshot(&snapshot).await?);
    data(VolumeSnapshotBody { status: "deleted".to_owned(), ..deleted })
}

/// Puts a volume that no sandbox has back to one of its snapshots.
#[utoipa::path(post, path = "/volumes/{volume}/restore/{snapshot}", tag = "volumes", responses((status = 200, body = Envelope<VolumeBody>)))]
async fn restore(AppState(api): AppState<Api>, Path((volume, snapshot)): Path<(String, String)>) -> Answer<VolumeBody> {
    data(api.engine.restore_volume(&volume, &snapshot).await?)
}

/// Takes a volume away from a sandbox that has no session.
#[utoipa::path(post, path = "/volumes/{volume}/detach", tag = "volumes", request_body = DetachVolumeBody, responses((status = 200, body = Envelope<VolumeBody>)))]
async fn detach_volume(
    AppState(api): AppState<Api>,
    Path(volume): Path<String>,
    JsonBody(body): JsonBody<DetachVolumeBody>,
) -> Answer<VolumeBody> {
    data(api.engine.detach_volume(&volume, body.sandbox_id.as_deref()).await?)
}

/// Lists the volumes that a sandbox has.
#[utoipa::path(get, path = "/sandboxes/{id}/volumes", tag = "volumes", params(Paging), responses((status = 200, body = ListEnvelope<AttachmentBody>)))]
async fn attachments(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
) -> ListAnswer<AttachmentBody> {
    let id = api.engine.show(&id)?.record.id;
    let all: Vec<_> = api.engine.volumes_of(&id)?.iter().filter_map(|volume| attachment(volume, &id)).collect();
    list_of::<AttachmentBody, _>(all, &params)
}

fn attachment(volume: &VolumeRecord, sandbox: &str) -> Option<AttachmentBody> {
    let at = volume.attachments.iter().find(|at| at.sandbox_id == sandbox)?;
    Some(AttachmentBody::of(volume, at))
}

/// Gives a sandbox that has no session a volume; its next session mounts it.
#[utoipa::path(post, path = "/sandboxes/{id}/volumes", tag = "volumes", request_body = AttachVolumeBody, responses((status = 201, body = Envelope<AttachmentBody>)))]
async fn attach(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<AttachVolumeBody>,
) -> Result<(StatusCode, Json<Envelope<AttachmentBody>>), ApiError> {
    let id = api.engine.show(&id)?.record.id;
    let volume = api.engine.attach_volume(&id, body.into()).await?;
    let made = attachment(&volume, &id).ok_or_else(|| Error::new(Kind::Internal, "it was detached at once"))?;
    Ok((StatusCode::CREATED, data(made)?))
}

/// Takes a volume away from a sandbox that has no session.
#[utoipa::path(delete, path = "/sandboxes/{id}/volumes/{volume}", tag = "volumes", responses((status = 200, body = Envelope<VolumeBody>)))]
async fn detach(AppState(api): AppState<Api>, Path((id, volume)): Path<(String, String)>) -> Answer<VolumeBody> {
    data(api.engine.detach_volume(&volume, Some(&id)).await?)
}

/// The same as `/sandboxes/{id}/volumes`, where the SDK looks for it.
#[utoipa::path(get, path = "/computers/{id}/volumes", tag = "volumes", params(Paging), responses((status = 200, body = ListEnvelope<AttachmentBody>)))]
async fn attachments_of_computer(api: AppState<Api>, id: Path<String>, params: Params) -> ListAnswer<AttachmentBody> {
    attachments(api, id, params).await
}

/// The same as `/sandboxes/{id}/volumes`, where the SDK looks for it.
#[utoipa::path(post, path = "/computers/{id}/volumes", tag = "volumes", request_body = AttachVolumeBody, responses((status = 201, body = Envelope<AttachmentBody>)))]
async fn attach_to_computer(
    api: AppState<Api>,
    id: Path<String>,
    body: JsonBody<AttachVolumeBody>,
) -> Result<(StatusCode, Json<Envelope<AttachmentBody>>), ApiError> {
    attach(api, id, body).await
}

/// The same as `/sandboxes/{id}/volumes/{volume}`, where the SDK looks for it.
#[utoipa::path(delete, path = "/computers/{id}/volumes/{volume}", tag = "volumes", responses((status = 200, body = Envelope<VolumeBody>)))]
async fn detach_from_computer(api: AppState<Api>, ids: Path<(String, String)>) -> Answer<VolumeBody> {
    detach(api, ids).await
}
