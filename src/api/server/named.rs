//! Named snapshots, as the SDK has them.

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
use super::answer::ApiError;
use super::history::{ForkSnapshotBody, fork_snapshot};
use super::request::{JsonBody, Params, Path, Wait, flag, refuse_unsupported};
use crate::api::types::{Envelope, Page, SandboxBody};
use crate::engine::error::{Error, Kind};
use crate::engine::lifecycle::State;
use crate::engine::records::{Consistency, SandboxRecord};
use crate::engine::{NamedSnapshot, NamedSource, Unnamed};

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(list, create)).routes(routes!(show, delete)).routes(routes!(deploy))
}

/// A name, and the snapshot that it keeps.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct NamedSnapshotBody {
    name: String,
    /// Always `ready`.
    status: String,
    snapshot_id: String,
    /// The sandbox it was taken of, which may be gone.
    sandbox_id: String,
    resource: NamedResourceBody,
    template_id: Option<String>,
    consistency: Consistency,
    size_bytes: u64,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// Of the snapshot.
    #[schema(value_type = String, format = DateTime)]
    snapshot_at: Timestamp,
}

/// What it was taken of.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct NamedResourceBody {
    /// Always `sandbox`.
    #[serde(rename = "type")]
    kind: String,
    id: String,
}

impl From<NamedSnapshot> for NamedSnapshotBody {
    fn from(named: NamedSnapshot) -> Self {
        let NamedSnapshot { record, snapshot } = named;
        Self {
            name: record.name,
            status: "ready".to_owned(),
            snapshot_id: record.snapshot_id,
            resource: NamedResourceBody { kind: "sandbox".to_owned(), id: snapshot.sandbox_id.clone() },
            sandbox_id: snapshot.sandbox_id,
            template_id: snapshot.template,
            consistency: snapshot.consistency,
            size_bytes: snapshot.disk_size_bytes,
            created_at: record.created_at,
            snapshot_at: snapshot.created_at,
        }
    }
}

/// All names.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct NamedListBody {
    data: Vec<NamedSnapshotBody>,
    page: Page,
    allowance: AllowanceBody,
}

/// How many names there may be.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct AllowanceBody {
    used: usize,
    /// None: as many as the disk has room for.
    limit: Option<usize>,
}

/// Lists all names, newest first.
#[utoipa::path(get, path = "/named-snapshots", tag = "snapshots", responses((status = 200, body = NamedListBody)))]
async fn list(AppState(api): AppState<Api>) -> Json<NamedListBody> {
    let data: Vec<NamedSnapshotBody> = api.engine.named_snapshots().into_iter().map(Into::into).collect();
    let count = data.len();
    let page = Page { count, total: count, has_more: false, next_cursor: None };
    Json(NamedListBody { data, page, allowance: AllowanceBody { used: count, limit: None } })
}

/// Gives a name: to a snapshot that is there, or to one that is taken of a sandbox.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
struct NameBody {
    name: String,
    snapshot_id: Option<String>,
    sandbox_id: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    other: Map<String, Value>,
}

/// Names a snapshot, or takes one and names it. A name that is there is not given anew.
#[utoipa::path(post, path = "/named-snapshots", tag = "snapshots", request_body = NameBody, responses((status = 201, body = Envelope<NamedSnapshotBody>)))]
async fn create(
    AppState(api): AppState<Api>,
    JsonBody(body): JsonBody<NameBody>,
) -> Result<(StatusCode, Json<Envelope<NamedSnapshotBody>>), ApiError> {
    refuse_unsupported("a named snapshot", &body.other)?;
    let source = match (body.snapshot_id, body.sandbox_id) {
        (Some(snapshot), None) => NamedSource::Snapshot(snapshot),
        (None, Some(sandbox)) => NamedSource::Sandbox(sandbox),
        _ => {
            return Err(Error::new(Kind::InvalidInput, "a name is given to one snapshot")
                .hint("give either snapshot_id, or the sandbox_id of which one is taken")
                .into());
        }
    };
    let named = api.engine.name_snapshot(&body.name, source).await?;
    Ok((StatusCode::CREATED, Json(Envelope { data: named.into() })))
}

/// A name and who came from its snapshot.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct NamedShowBody {
    data: NamedSnapshotBody,
    /// Sandboxes that were made from it. They do not need it.
    dependents: Vec<DependentBody>,
}

/// A sandbox.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct DependentBody {
    /// Always `sandbox`.
    #[serde(rename = "type")]
    kind: String,
    id: String,
    name: String,
    state: State,
}

impl From<SandboxRecord> for DependentBody {
    fn from(r: SandboxRecord) -> Self {
        Self { kind: "sandbox".to_owned(), id: r.id, name: r.name, state: r.state }
    }
}

/// Shows a name.
#[utoipa::path(get, path = "/named-snapshots/{name}", tag = "snapshots", responses((status = 200, body = NamedShowBody)))]
async fn show(AppState(api): AppState<Api>, Path(name): Path<String>) -> Result<Json<NamedShowBody>, ApiError> {
    let named = api.engine.named_snapshot(&name)?;
    let dependents = api.engine.sandboxes_from_snapshot(&named.record.snapshot_id);
    Ok(Json(NamedShowBody { data: named.into(), dependents: dependents.into_iter().map(Into::into).collect() }))
}

/// A name that is gone.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct UnnamedBody {
    data: NamedSnapshotBody,
    /// What became of the snapshot: `released`, `deleted`, or `kept` by another name.
    outcome: String,
}

/// Takes a name away; a snapshot that was taken for it goes too.
#[utoipa::path(delete, path = "/named-snapshots/{name}", tag = "snapshots", responses((status = 200, body = UnnamedBody)))]
async fn delete(AppState(api): AppState<Api>, Path(name): Path<String>) -> Result<Json<UnnamedBody>, ApiError> {
    let (named, outcome) = api.engine.unname_snapshot(&name).await?;
    let outcome = match outcome {
        Unnamed::Released => "released",
        Unnamed::Deleted => "deleted",
        Unnamed::Kept => "kept",
    };
    let data = NamedSnapshotBody { status: "deleted".to_owned(), ..named.into() };
    Ok(Json(UnnamedBody { data, outcome: outcome.to_owned() }))
}

/// Makes a sandbox of a named snapshot, of the size of the one it was taken of if that is still known.
#[utoipa::path(post, path = "/named-snapshots/{name}/deploy", tag = "snapshots", params(Wait), request_body = ForkSnapshotBody, responses((status = 201, body = Envelope<SandboxBody>)))]
async fn deploy(
    AppState(api): AppState<Api>,
    Path(name): Path<String>,
    Params(params): Params,
    JsonBody(body): JsonBody<ForkSnapshotBody>,
) -> Result<(StatusCode, Json<Envelope<SandboxBody>>), ApiError> {
    let snapshot = api.engine.named_snapshot(&name)?.snapshot;
    fork_snapshot(&api, snapshot, body, flag(&params, "wait")).await
}
