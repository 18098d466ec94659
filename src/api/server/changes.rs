//! Changing a sandbox: the whole of it, or its size, its variables, its labels.

use std::collections::BTreeMap;

use axum::extract::State as AppState;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, data};
use super::request::{JsonBody, Path, refuse_unsupported, timeout};
use crate::api::types::{Envelope, SandboxBody};
use crate::engine::Changes;
use crate::engine::SandboxView;
use crate::engine::error::{Error, Kind};
use crate::engine::lifecycle::State;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(resources, resize))
        .routes(routes!(env, set_env))
        .routes(routes!(delete_env))
        .routes(routes!(set_tags))
}

/// Asks for changes; what is left out stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub(super) struct UpdateBody {
    name: Option<String>,
    /// All labels.
    tags: Option<Vec<String>>,
    /// Notes to be added; null takes one out. The SDK sends `miosa_persistent` here.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
    /// Variables to be added; null takes one out.
    env: Option<BTreeMap<String, Option<String>>>,
    persistent: Option<bool>,
    /// No timeout of either kind.
    always_on: Option<bool>,
    /// Of a session; 0 is none. The present one's begins anew.
    timeout_sec: Option<u64>,
    timeout_ms: Option<u64>,
    idle_timeout_sec: Option<u64>,
    idle_timeout_ms: Option<u64>,
    cpu_count: Option<u32>,
    memory_mb: Option<u64>,
    #[serde(flatten)]
    #[schema(ignore)]
    other: Map<String, Value>,
}

impl UpdateBody {
    pub(super) fn changes(self) -> Result<Changes, ApiError> {
        refuse_unsupported("update", &self.other)?;
        let mut metadata = self.metadata.unwrap_or_default();
        let persistent = self.persistent.or(metadata.remove("miosa_persistent").and_then(|v| v.as_bool()));
        Retention::of(&metadata)?;
        check_shape(self.cpu_count.unwrap_or(1), self.memory_mb.unwrap_or(1_024))?;
        let limit = |seconds: Option<u64>, milliseconds: Option<u64>| match (self.always_on, seconds, milliseconds) {
            (Some(true), ..) => Ok(Some(None)),
            (_, None, None) => Ok(None),
            (_, seconds, milliseconds) => timeout(seconds, milliseconds).map(Some),
        };
        Ok(Changes {
            timeout: limit(self.timeout_sec, self.timeout_ms)?,
            idle_timeout: limit(self.idle_timeout_sec, self.idle_timeout_ms)?,
            name: self.name,
            cpus: self.cpu_count,
            memory_mib: self.memory_mb,
            persistent,
            env: self.env.unwrap_or_default(),
            metadata,
            tags: self.tags,
        })
    }
}

/// Asks for a session.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub(super) struct ResumeBody {
    /// Variables to be added.
    pub(super) env: BTreeMap<String, String>,
    /// False: memory that was kept is given up, and the session starts from the files.
    pub(super) memory: Option<bool>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub(super) other: Map<String, Value>,
}

/// Refuses machines that cannot be.
pub(super) fn check_shape(cpus: u32, memory_mib: u64) -> Result<(), ApiError> {
    if !(1..=64).contains(&cpus) {
        let message = format!("{cpus} processors were asked for");
        return Err(Error::new(Kind::InvalidInput, message).hint("1 to 64").into());
    }
    if !(128..=1 << 20).contains(&memory_mib) {
        let message = format!("{memory_mib} MiB of memory were asked for");
        return Err(Error::new(Kind::InvalidInput, message).hint("128 MiB to 1 TiB, such as 2gb").into());
    }
    Ok(())
}

/// How snapshots of a sandbox go by themselves, unless one is taken with other wishes. The SDK keeps this in the metadata.
#[derive(Debug, Default)]
pub(super) struct Retention {
    pub(super) expiration_sec: Option<u64>,
    pub(super) keep_last: Option<u32>,
}

impl Retention {
    pub(super) fn of(metadata: &Map<String, Value>) -> Result<Self, ApiError> {
        let number = |name: &str| match metadata.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_u64().and_then(|n| u32::try_from(n).ok()).map(Some).ok_or_else(|| {
                Error::new(Kind::InvalidInput, format!("the metadata's {name} is a number, and not {value}"))
            }),
        };
        let expiration_sec = number("snapshot_expiration_sec")?.map(u64::from);
        Ok(Self { expiration_sec, keep_last: number("keep_last_snapshots")? })
    }
}

/// What a sandbox's machine has.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct ResourcesBody {
    id: String,
    resources: Shape,
    capabilities: Capabilities,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct Shape {
    cpu: u32,
    memory_mb: u64,
    disk_mb: u64,
}

/// What can change while the machine runs: nothing.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct Capabilities {
    live_cpu: bool,
    live_memory: bool,
    reason: String,
}

/// What became of a change.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct ResizedBody {
    applied_live: bool,
    /// A session runs, with what it was started with.
    requires_restart: bool,
    #[schema(value_type = Object)]
    changes: Map<String, Value>,
    #[serde(flatten)]
    now: ResourcesBody,
}

impl From<SandboxView> for ResourcesBody {
    fn from(view: SandboxView) -> Self {
        let r = view.record;
        let resources = Shape { cpu: r.cpus, memory_mb: r.memory_mib, disk_mb: r.disk_size_bytes >> 20 };
        let reason = "a machine keeps what it was started with; changes count from the next session on".to_owned();
        Self { id: r.id, resources, capabilities: Capabilities { live_cpu: false, live_memory: false, reason } }
    }
}

/// Asks for another machine.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
struct ResizeBody {
    cpu_count: Option<u32>,
    memory_mb: Option<u64>,
    #[serde(flatten)]
    #[schema(ignore)]
    other: Map<String, Value>,
}

/// Says what a sandbox's machine has, or will have.
#[utoipa::path(get, path = "/sandboxes/{id}/resources", tag = "sandboxes", responses((status = 200, body = Envelope<ResourcesBody>)))]
async fn resources(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<ResourcesBody> {
    data(api.engine.show(&id)?)
}

/// Changes what the machine has, from the next session on.
#[utoipa::path(patch, path = "/sandboxes/{id}/resources", tag = "sandboxes", request_body = ResizeBody, responses((status = 200, body = Envelope<ResizedBody>)))]
async fn resize(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ResizeBody>,
) -> Answer<ResizedBody> {
    refuse_unsupported("a change of resources", &body.other)?;
    let asked = UpdateBody { cpu_count: body.cpu_count, memory_mb: body.memory_mb, ..UpdateBody::default() };
    let view = api.engine.update(&id, asked.changes()?).await?;
    let asked = [("cpu_count", body.cpu_count.map(Value::from)), ("memory_mb", body.memory_mb.map(Value::from))];
    let changes = asked.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
    let requires_restart = view.record.state == State::Running;
    data(ResizedBody { applied_live: false, requires_restart, changes, now: view.into() })
}

/// The environment of a sandbox's commands.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct EnvBody {
    vars: Vec<Variable>,
}

/// A variable.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct Variable {
    key: String,
    value: String,
}

impl From<SandboxView> for EnvBody {
    fn from(view: SandboxView) -> Self {
        Self { vars: view.record.env.into_iter().map(|(key, value)| Variable { key, value }).collect() }
    }
}

/// Lists the variables that every command gets.
#[utoipa::path(get, path = "/sandboxes/{id}/env", tag = "sandboxes", responses((status = 200, body = Envelope<EnvBody>)))]
async fn env(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<EnvBody> {
    data(api.engine.show(&id)?)
}

/// Gives variables a value; the others stay.
#[utoipa::path(put, path = "/sandboxes/{id}/env", tag = "sandboxes", request_body = EnvBody, responses((status = 200, body = Envelope<EnvBody>)))]
async fn set_env(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<EnvBody>,
) -> Answer<EnvBody> {
    let env = body.vars.into_iter().map(|v| (v.key, Some(v.value))).collect();
    data(api.engine.update(&id, Changes { env, ..Changes::default() }).await?)
}

/// Takes a variable out; fine when it is not there.
#[utoipa::path(delete, path = "/sandboxes/{id}/env/{key}", tag = "sandboxes", responses((status = 200, body = Envelope<EnvBody>)))]
async fn delete_env(AppState(api): AppState<Api>, Path((id, key)): Path<(String, String)>) -> Answer<EnvBody> {
    let env = BTreeMap::from([(key, None)]);
    data(api.engine.update(&id, Changes { env, ..Changes::default() }).await?)
}

/// All of a sandbox's labels.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct TagsBody {
    tags: Vec<String>,
}

/// Replaces a sandbox's labels.
#[utoipa::path(patch, path = "/sandboxes/{id}/tags", tag = "sandboxes", request_body = TagsBody, responses((status = 200, body = Envelope<SandboxBody>)))]
async fn set_tags(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<TagsBody>,
) -> Answer<SandboxBody> {
    data(api.engine.update(&id, Changes { tags: Some(body.tags), ..Changes::default() }).await?)
}
