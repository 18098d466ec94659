//! The API's routes: one module a resource.
//!
//! A failed answer is an [`ApiError`]; the outermost layer gives every request an id, puts it in the answer's header and
//! in the error's body, and logs failures of ours.

mod answer;
mod auth;
mod batches;
mod changes;
mod commands;
mod events;
mod exec;
mod exports;
mod files;
mod history;
mod idempotency;
mod logs;
mod machine;
mod metrics;
mod missing;
mod named;
mod openapi;
mod paths;
mod ports;
mod previews;
mod processes;
mod request;
mod sandboxes;
mod snapshots;
mod start;
mod templates;
mod terminal;
mod usage;
mod volumes;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::types::{Envelope, HealthBody};
use crate::disks::Disks;
use crate::engine::Engine;

pub use answer::ApiError;
pub(super) use answer::{Answer, ListAnswer, data, list_all, list_of};
pub use auth::Keys;
pub(super) use request::{JsonBody, Paging, Params, Path, flag, refuse_unsupported};

/// What a sandbox has that does not ask for it.
#[derive(Debug, Clone)]
pub struct Defaults {
    /// Virtual processors.
    pub cpus: u32,
    /// Memory.
    pub memory_mib: u64,
    /// How long a session lasts that does not ask for an end.
    pub timeout: Option<Duration>,
}

/// A connection's place among those that there may be. Every request has it; one that becomes something else than HTTP
/// keeps it for as long as that lasts.
#[derive(Clone)]
pub struct Place(pub Arc<dyn std::any::Any + Send + Sync>);

/// What routes share.
#[derive(Clone)]
pub struct Api {
    engine: Arc<Engine>,
    defaults: Arc<Defaults>,
    running: exec::Running,
    terminals: terminal::Terminals,
    metrics: Arc<metrics::Metrics>,
}

/// All routes, to be put behind [`open`] or [`locked`].
pub fn router(engine: Arc<Engine>, disks: Arc<Disks>, defaults: Defaults) -> Router {
    let v1 = OpenApiRouter::new()
        .routes(routes!(health))
        .merge(sandboxes::routes())
        .merge(batches::routes())
        .merge(changes::routes())
        .merge(events::routes())
        .merge(usage::routes())
        .merge(logs::routes())
        .merge(snapshots::routes())
        .merge(history::routes())
        .merge(named::routes())
        .merge(exec::routes())
        .merge(commands::routes())
        .merge(processes::routes())
        .merge(terminal::routes())
        .merge(files::routes())
        .merge(exports::routes())
        .merge(paths::routes())
        .merge(ports::routes())
        .merge(previews::routes())
        .merge(machine::routes())
        .merge(start::routes())
        .merge(templates::routes())
        .merge(volumes::routes())
        .merge(super::archives::routes(disks.clone(), Some(engine.clone())))
        .merge(super::contents::routes(disks.clone(), Some(engine.clone())))
        .merge(super::disks::routes(disks.clone()));
    let keeper = Arc::new(idempotency::Keeper::new(disks.store().clone()));
    let metrics = Arc::new(metrics::Metrics::new(&engine, disks));
    let api = Api {
        engine,
        defaults: Arc::new(defaults),
        running: exec::Running::default(),
        terminals: terminal::Terminals::default(),
        metrics: metrics.clone(),
    };
    let all = OpenApiRouter::new().nest("/api/v1", v1).routes(routes!(metrics::metrics)).with_state(api);
    let (router, document) = all.split_for_parts();
    openapi::serve(router, document)
        .layer(axum::middleware::from_fn_with_state(keeper, idempotency::once))
        .layer(axum::middleware::from_fn_with_state(metrics, metrics::count))
}

/// The routes for callers who are known: our own bodies where nothing serves a request, and an id for every answer.
pub fn open(router: Router) -> Router {
    with_fallbacks(router).layer(axum::middleware::from_fn(answer::request_id))
}

/// The same for callers who have to show a key first.
pub fn locked(router: Router, keys: Arc<Keys>) -> Router {
    with_fallbacks(router)
        .layer(axum::middleware::from_fn_with_state(keys, auth::require_key))
        .layer(axum::middleware::from_fn(answer::request_id))
}

fn with_fallbacks(router: Router) -> Router {
    router.fallback(missing::no_route).method_not_allowed_fallback(missing::no_method)
}

/// An answer that is the same to every request.
pub fn refusing(status: u16, code: &str, message: &str) -> ApiError {
    ApiError::new(status, code, message)
}

/// Whether the daemon serves requests.
#[utoipa::path(get, path = "/health", tag = "daemon", responses((status = 200, body = Envelope<HealthBody>)))]
async fn health() -> Answer<HealthBody> {
    data(HealthBody { status: "ok".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() })
}
