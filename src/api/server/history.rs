//! Snapshots of all sandboxes: by sandbox, several at once, and sandboxes made from one.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State as AppState;
use axum::http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_of};
use super::request::{JsonBody, Paging, Params, Path, Wait, flag, refuse_unsupported};
use crate::api::types::{Envelope, ListEnvelope, Listed, SandboxBody};
use crate::engine::error::{Error, Kind};
use crate::engine::records::SnapshotRecord;
use crate::engine::{CreateRequest, Origin};

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(groups)).routes(routes!(delete)).routes(routes!(fork))
}

/// The snapshots of one sandbox.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct GroupBody {
    resource: ResourceBody,
    count: usize,
    #[schema(value_type = String, format = DateTime)]
    first_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    last_at: Timestamp,
}

/// What snapshots are of.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct ResourceBody {
    /// Always `sandbox`.
    #[serde(rename = "type")]
    kind: String,
    id: String,
    /// None when it is destroyed and forgotten.
    name: Option<String>,
    state: Option<String>,
}

impl Listed for GroupBody {
    fn position(&self) -> (Timestamp, &str) {
        (self.first_at, &self.resource.id)
    }
}

/// Lists the sandboxes that have snapshots without a name that keeps them.
#[utoipa::path(get, path = "/snapshots/groups", tag = "snapshots", params(("q" = Option<String>, Query, description = "A part of the sandbox's name or id"), Paging), responses((status = 200, body = ListEnvelope<GroupBody>)))]
async fn groups(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<GroupBody> {
    let mut groups: BTreeMap<String, GroupBody> = BTreeMap::new();
    for snapshot in api.engine.snapshots(None)?.into_iter().filter(|s| !api.engine.is_named(&s.id)) {
        let group = groups.entry(snapshot.sandbox_id.clone()).or_insert_with(|| {
            let sandbox = api.engine.show(&snapshot.sandbox_id).ok().map(|view| view.record);
            let resource = ResourceBody {
                kind: "sandbox".to_owned(),
                id: snapshot.sandbox_id.clone(),
                state: sandbox.as_ref().map(|r| r.state.name().to_owned()),
                name: sandbox.map(|r| r.name),
            };
            GroupBody { resource, count: 0, first_at: snapshot.created_at, last_at: snapshot.created_at }
        });
        group.count += 1;
        group.last_at = snapshot.created_at;
    }
    let part = params.get("q").map(String::as_str).unwrap_or_default();
    let fits = |r: &ResourceBody| r.id.contains(part) || r.name.as_ref().is_some_and(|name| name.contains(part));
    list_of::<GroupBody, _>(groups.into_values().filter(|g| fits(&g.resource)).collect(), &params)
}

/// Names snapshots to be deleted, or a sandbox whose snapshots are.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
struct DeleteBody {
    ids: Option<Vec<String>>,
    resource_id: Option<String>,
    /// Has to be true with a `resource_id`.
    all: Option<bool>,
    /// Has to be the `resource_id`.
    confirm: Option<String>,
}

/// What became of each.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct DeletedBody {
    deleted: Vec<String>,
    failed: Vec<FailedBody>,
}

/// Why one is still there.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct FailedBody {
    id: String,
    code: String,
    message: String,
}

/// Deletes snapshots, each on its own: one that cannot be deleted does not keep the others.
#[utoipa::path(post, path = "/snapshots/delete", tag = "snapshots", request_body = DeleteBody, responses((status = 200, body = Envelope<DeletedBody>)))]
async fn delete(AppState(api): AppState<Api>, JsonBody(body): JsonBody<DeleteBody>) -> Answer<DeletedBody> {
    let invalid = |message: &str, hint: &str| ApiError::from(Error::new(Kind::InvalidInput, message).hint(hint));
    let ids = match (body.ids, body.resource_id) {
        (Some(ids), None) => ids,
        (None, Some(sandbox)) if body.all == Some(true) && body.confirm.as_ref() == Some(&sandbox) => {
            let all = api.engine.snapshots(None)?.into_iter().filter(|s| s.sandbox_id == sandbox);
            all.map(|s| s.id).collect()
        }
        (None, Some(_)) => {
            return Err(invalid(
                "all snapshots of a sandbox are deleted only when that is confirmed",
                "all: true, and confirm: the resource_id again",
            ));
        }
        _ => return Err(invalid("it is not clear which snapshots are to be deleted", "give ids or a resource_id")),
    };
    let mut done = DeletedBody::default();
    for id in ids {
        match api.engine.delete_snapshot(&id, None, false).await {
            Ok(_) => done.deleted.push(id),
            Err(error) => {
                done.failed.push(FailedBody { id, code: error.kind().code().to_owned(), message: error.to_string() });
            }
        }
    }
    data(done)
}

/// Asks for a sandbox of a snapshot.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub(super) struct ForkSnapshotBody {
    name: Option<String>,
    /// False: of a snapshot with memory, only the files.
    memory: Option<bool>,
    #[serde(flatten)]
    #[schema(ignore)]
    other: Map<String, Value>,
}

/// Makes a sandbox of a snapshot, of the size of the one it was taken of if that is still known.
#[utoipa::path(post, path = "/snapshots/{snapshot}/fork", tag = "snapshots", params(Wait), request_body = ForkSnapshotBody, responses((status = 201, body = Envelope<SandboxBody>)))]
async fn fork(
    AppState(api): AppState<Api>,
    Path(snapshot): Path<String>,
    Params(params): Params,
    JsonBody(body): JsonBody<ForkSnapshotBody>,
) -> Result<(StatusCode, Json<Envelope<SandboxBody>>), ApiError> {
    let snapshot = api.engine.find_snapshot(&snapshot, None)?;
    fork_snapshot(&api, snapshot, body, flag(&params, "wait")).await
}

pub(super) async fn fork_snapshot(
    api: &Api,
    snapshot: SnapshotRecord,
    body: ForkSnapshotBody,
    wait: bool,
) -> Result<(StatusCode, Json<Envelope<SandboxBody>>), ApiError> {
    refuse_unsupported("a fork of a snapshot", &body.other)?;
    let parent = api.engine.show(&snapshot.sandbox_id).ok().map(|view| view.record);
    let limit = |ms: Option<u64>| ms.map(std::time::Duration::from_millis);
    // What ran goes on on a machine as that was.
    let kept = snapshot.memory.as_ref().map(|m| (m.cpus, m.memory_mib));
    let size = kept.or(parent.as_ref().map(|r| (r.cpus, r.memory_mib)));
    let request = CreateRequest {
        origin: Origin::Snapshot(snapshot.id),
        name: body.name,
        cpus: size.map_or(api.defaults.cpus, |(cpus, _)| cpus),
        memory_mib: size.map_or(api.defaults.memory_mib, |(_, mib)| mib),
        disk_mib: None,
        timeout: parent.as_ref().map_or(api.defaults.timeout, |r| limit(r.timeout_ms)),
        idle_timeout: parent.as_ref().and_then(|r| limit(r.idle_timeout_ms)),
        persistent: true,
        env: parent.as_ref().map(|r| r.env.clone()).unwrap_or_default(),
        network_policy: parent.as_ref().map(|r| r.network_policy).unwrap_or_default(),
        dedup_domain: None,
        metadata: Map::new(),
        tags: Vec::new(),
        volumes: Vec::new(),
        publish_ports: parent.map(|r| r.previews.iter().map(|p| p.port).collect()).unwrap_or_default(),
        without_memory: body.memory == Some(false),
        start: true,
        wait,
    };
    Ok((StatusCode::CREATED, data(api.engine.create(request).await?)?))
}
