//! What sandboxes used: compute over time, and what is stored for them.

use axum::extract::State as AppState;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ListAnswer, data, list_all};
use super::request::{Params, Path, flag, refuse_unsupported};
use crate::api::types::{Envelope, ListEnvelope};
use crate::engine::SandboxView;
use crate::engine::lifecycle::State;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(usage)).routes(routes!(usage_of_all)).routes(routes!(summary))
}

/// What a sandbox used since it was made.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct UsageBody {
    sandbox_id: String,
    name: String,
    state: State,
    /// Of all sessions together.
    runtime_sec: u64,
    provisioned_vcpu_ms: u64,
    provisioned_memory_mb_ms: u64,
    creation_count: u64,
    /// Not measured, as the next two.
    active_cpu_ms: Option<u64>,
    network_ingress_bytes: Option<u64>,
    network_egress_bytes: Option<u64>,
    #[schema(value_type = Object)]
    measurement_status: Value,
    /// Nothing has a price here.
    estimated_cost_cents: u64,
    timeout_sec: u64,
    timeout_remaining_ms: Option<u64>,
    disk_size_bytes: u64,
    /// When asked for: stored bytes that it refers to, shared or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    referenced_bytes: Option<u64>,
    /// When asked for: stored bytes that only it refers to, about what destroying it gives back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exclusive_bytes: Option<u64>,
}

impl From<SandboxView> for UsageBody {
    fn from(view: SandboxView) -> Self {
        let (r, compute) = (view.record, view.compute);
        Self {
            sandbox_id: r.id,
            name: r.name,
            state: r.state,
            runtime_sec: compute.runtime_ms / 1_000,
            provisioned_vcpu_ms: compute.vcpu_ms,
            provisioned_memory_mb_ms: compute.memory_mib_ms,
            creation_count: 1,
            active_cpu_ms: None,
            network_ingress_bytes: None,
            network_egress_bytes: None,
            measurement_status: json!({
                "provisioned_vcpu": "measured",
                "provisioned_memory": "measured",
                "active_cpu": "not_measured",
                "network": "not_measured",
            }),
            estimated_cost_cents: 0,
            timeout_sec: r.timeout_ms.unwrap_or_default() / 1_000,
            timeout_remaining_ms: view.timeout_remaining.map(|t| t.as_millis() as u64),
            disk_size_bytes: r.disk_size_bytes,
            referenced_bytes: None,
            exclusive_bytes: None,
        }
    }
}

/// Says what a sandbox used since it was made.
#[utoipa::path(get, path = "/sandboxes/{id}/usage", tag = "usage", params(("measure" = Option<bool>, Query, description = "Say what it stores, too; that walks the maps of all disks")), responses((status = 200, body = Envelope<UsageBody>)))]
async fn usage(AppState(api): AppState<Api>, Path(id): Path<String>, Params(params): Params) -> Answer<UsageBody> {
    let view = api.engine.show(&id)?;
    let stored = match flag(&params, "measure") && view.record.state != State::Destroyed {
        true => Some(api.engine.stored(&view.record.id).await?),
        false => None,
    };
    let mut body = UsageBody::from(view);
    body.referenced_bytes = stored.as_ref().map(|s| s.referenced_bytes);
    body.exclusive_bytes = stored.as_ref().map(|s| s.exclusive_bytes + s.unsealed_bytes);
    data(body)
}

/// Says what each sandbox used since it was made; destroyed ones are in it for as long as they are remembered.
#[utoipa::path(get, path = "/usage", tag = "usage", responses((status = 200, body = ListEnvelope<UsageBody>)))]
async fn usage_of_all(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<UsageBody> {
    // Sessions are not kept one by one, so that no period can be cut out.
    let asked = params.iter().map(|(name, value)| (name.clone(), Value::from(value.clone()))).collect();
    refuse_unsupported("usage", &asked)?;
    Ok(list_all(everybody(&api)))
}

fn everybody(api: &Api) -> Vec<SandboxView> {
    let mut all = api.engine.list(None);
    all.extend(api.engine.list(Some(State::Destroyed)));
    all
}

/// What all sandboxes used together.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct SummaryBody {
    sandboxes: u64,
    running: u64,
    runtime_sec: u64,
    provisioned_vcpu_ms: u64,
    provisioned_memory_mb_ms: u64,
    estimated_cost_cents: u64,
}

/// Says what all sandboxes used together, destroyed ones for as long as they are remembered.
#[utoipa::path(get, path = "/usage/summary", tag = "usage", responses((status = 200, body = Envelope<SummaryBody>)))]
async fn summary(AppState(api): AppState<Api>) -> Answer<SummaryBody> {
    let mut sum = SummaryBody::default();
    let mut runtime_ms = 0;
    for view in everybody(&api) {
        sum.sandboxes += u64::from(view.record.state != State::Destroyed);
        sum.running += u64::from(view.record.state == State::Running);
        runtime_ms += view.compute.runtime_ms;
        sum.provisioned_vcpu_ms += view.compute.vcpu_ms;
        sum.provisioned_memory_mb_ms += view.compute.memory_mib_ms;
    }
    sum.runtime_sec = runtime_ms / 1_000;
    data(sum)
}
