//! The API's routes: one module a resource.
//!
//! A failed answer is an [`ApiError`]; the outermost layer gives every request an id, puts it in the answer's header and
//! in the error's body, and logs failures of ours.

mod answer;
mod exec;
mod files;
mod openapi;
mod request;
mod sandboxes;
mod snapshots;
mod templates;

use std::sync::Arc;

use axum::Router;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::types::{Envelope, HealthBody};
use crate::disks::Disks;
use crate::engine::Engine;

pub use answer::ApiError;
pub(super) use answer::{Answer, ListAnswer, data, list_all, list_of};
pub(super) use request::{JsonBody, Paging, Params, Path, flag};

/// Processors and memory of a sandbox that does not ask for any.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// Virtual processors.
    pub cpus: u32,
    /// Memory.
    pub memory_mib: u64,
}

/// What routes share.
#[derive(Clone)]
pub struct Api {
    engine: Arc<Engine>,
    defaults: Defaults,
    stdins: exec::Stdins,
}

/// All routes.
pub fn router(engine: Arc<Engine>, disks: Arc<Disks>, defaults: Defaults) -> Router {
    let v1 = OpenApiRouter::new()
        .routes(routes!(health))
        .merge(sandboxes::routes())
        .merge(snapshots::routes())
        .merge(exec::routes())
        .merge(files::routes())
        .merge(templates::routes())
        .merge(super::disks::routes(disks));
    let api = Api { engine, defaults, stdins: exec::Stdins::default() };
    let (router, document) = OpenApiRouter::new().nest("/api/v1", v1).with_state(api).split_for_parts();
    own_layers(openapi::serve(router, document))
}

/// What every answer has: our own bodies where nothing serves a request, and an id.
pub(super) fn own_layers(router: Router) -> Router {
    router
        .fallback(answer::no_route)
        .method_not_allowed_fallback(answer::no_method)
        .layer(axum::middleware::from_fn(answer::request_id))
}

/// Whether the daemon serves requests.
#[utoipa::path(get, path = "/health", tag = "daemon", responses((status = 200, body = Envelope<HealthBody>)))]
async fn health() -> Answer<HealthBody> {
    data(HealthBody { status: "ok".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() })
}
