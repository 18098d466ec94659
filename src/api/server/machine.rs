//! What runs sandboxes, and how one of them is doing.

use axum::extract::State as AppState;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ListAnswer, data, list_all};
use super::request::Path;
use super::sandboxes::MAX_DISK_MIB;
use crate::api::types::{CapabilitiesBody, Envelope, ListEnvelope, MetricsBody, RuntimeBody, ShapeBody};

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(runtimes)).routes(routes!(metrics))
}

/// Lists the ways to run sandboxes: there is one.
#[utoipa::path(get, path = "/sandboxes/runtimes", tag = "sandboxes", responses((status = 200, body = ListEnvelope<RuntimeBody>)))]
async fn runtimes(AppState(api): AppState<Api>) -> ListAnswer<RuntimeBody> {
    let found = api.engine.runtime().await;
    Ok(list_all(vec![RuntimeBody {
        id: "qemu".to_owned(),
        runtime_profile: "standard".to_owned(),
        label: "QEMU".to_owned(),
        description: found.as_ref().cloned().unwrap_or_else(|_| "virtual machines".to_owned()),
        default: true,
        available: found.is_ok(),
        unavailable_reason: found.err().map(|error| error.to_string()),
        capabilities: CapabilitiesBody {
            browser: false,
            network_egress: api.engine.has_network(),
            persistence: true,
            pause: true,
            gpu: false,
            max_shape: ShapeBody { cpu_count: 64, memory_mb: 1 << 20, disk_size_mb: MAX_DISK_MIB },
        },
    }]))
}

/// Says what a sandbox's guest tells of its load now. Starts no session.
#[utoipa::path(get, path = "/sandboxes/{id}/metrics", tag = "usage", params(("window" = Option<String>, Query, description = "Makes no difference: no history is kept")), responses((status = 200, body = Envelope<MetricsBody>)))]
async fn metrics(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<MetricsBody> {
    let vitals = api.engine.vitals(&id).await?.unwrap_or_default();
    data(MetricsBody::of(api.engine.show(&id)?, vitals))
}
