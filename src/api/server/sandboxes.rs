//! Sandboxes: create, look at, stop, resume, extend, fork, destroy.

use axum::Json;
use axum::extract::State as AppState;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_all, list_of};
use super::changes::{ResumeBody, UpdateBody, check_shape};
use super::request::{JsonBody, Paging, Params, Path, Wait, flag, refuse_unsupported, timeout};
use crate::api::types::{
    CreateBody, Envelope, ExtendBody, ForkBody, ListEnvelope, OneOrMany, ReadinessBody, SandboxBody, StopBody,
};
use crate::engine::error::{Error, Kind};
use crate::engine::lifecycle::State;
use crate::engine::records::NetworkPolicy;
use crate::engine::{Changes, CreateRequest, ForkRequest, Keep, Origin};

/// Processors, memory and disk (both in MiB) of a named size.
const SIZES: [(&str, u32, u64, u64); 5] = [
    ("xs", 1, 2 << 10, 10 << 10),
    ("small", 2, 4 << 10, 10 << 10),
    ("medium", 4, 8 << 10, 20 << 10),
    ("large", 8, 16 << 10, 40 << 10),
    ("xl", 16, 32 << 10, 80 << 10),
];

/// Largest disk of a sandbox: what ext4 and the store can both do, with room to spare.
pub(super) const MAX_DISK_MIB: u64 = 16 << 20;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(by_name))
        .routes(routes!(show, update, destroy))
        .routes(routes!(readiness))
        .routes(routes!(stop))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(extend))
        .routes(routes!(fork))
}

/// Lists sandboxes, oldest first; destroyed ones only when asked for by state.
#[utoipa::path(get, path = "/sandboxes", tag = "sandboxes", params(("state" = Option<State>, Query), ("name" = Option<String>, Query, description = "Only the one of this name"), ("tags" = Option<String>, Query, description = "Only those that have all of these, with commas between"), Paging), responses((status = 200, body = ListEnvelope<SandboxBody>)))]
async fn list(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<SandboxBody> {
    let state = match params.get("state").map(String::as_str).filter(|s| !s.is_empty()) {
        None => None,
        Some(name) => Some(State::parse(name).ok_or_else(|| {
            Error::new(Kind::InvalidInput, format!("there is no state {name:?}"))
                .hint(State::ALL.map(State::name).join(", "))
        })?),
    };
    let given = |name: &str| params.get(name).map(String::as_str).filter(|text| !text.is_empty());
    let tags: Vec<&str> = given("tags").or(given("tag")).map(|tags| tags.split(',').collect()).unwrap_or_default();
    let mut all = api.engine.list(state);
    all.retain(|view| {
        let record = &view.record;
        given("name").is_none_or(|name| record.name == name)
            && tags.iter().all(|tag| record.tags.iter().any(|own| own == tag))
    });
    list_of(all, &params)
}

/// Makes a sandbox of a template or a snapshot.
#[utoipa::path(post, path = "/sandboxes", tag = "sandboxes", params(Wait), request_body = CreateBody, responses((status = 201, body = Envelope<SandboxBody>)))]
async fn create(
    AppState(api): AppState<Api>,
    Params(params): Params,
    JsonBody(body): JsonBody<CreateBody>,
) -> Result<(StatusCode, Json<Envelope<SandboxBody>>), ApiError> {
    refuse_unsupported("create", &body.other)?;
    let mut request = create_request(body, &api)?;
    request.wait = flag(&params, "wait");
    let view = api.engine.create(request).await?;
    Ok((StatusCode::CREATED, Json(Envelope { data: view.into() })))
}

/// The template that the public SDK asks for when it is asked for none: ours of that name, if there is one, or the default.
const SDK_DEFAULT: &str = "miosa-sandbox";

pub(super) fn create_request(body: CreateBody, api: &Api) -> Result<CreateRequest, ApiError> {
    let invalid = |message: String, hint: &str| ApiError::from(Error::new(Kind::InvalidInput, message).hint(hint));
    let origin = match (body.template_id, body.snapshot_id) {
        (Some(_), Some(_)) => return Err(invalid("a template and a snapshot were given".into(), "give one of them")),
        (Some(name), None) if name == SDK_DEFAULT && api.engine.template(&name).is_err() => {
            Origin::Template(crate::engine::BASE.to_owned())
        }
        (Some(template), None) => Origin::Template(template),
        (None, Some(snapshot)) => Origin::Snapshot(snapshot),
        (None, None) => Origin::Template(crate::engine::BASE.to_owned()),
    };
    let (mut cpus, mut memory_mib, mut disk_mib) = (api.defaults.cpus, api.defaults.memory_mib, None);
    if let Origin::Template(name) = &origin
        && let Ok(template) = api.engine.template(name)
    {
        cpus = template.cpus.unwrap_or(cpus);
        memory_mib = template.memory_mib.unwrap_or(memory_mib);
    }
    // What ran goes on on a machine as that was.
    if let Origin::Snapshot(key) = &origin
        && body.memory != Some(false)
        && let Some(kept) = api.engine.find_snapshot(key, None).ok().and_then(|snapshot| snapshot.memory)
    {
        (cpus, memory_mib) = (kept.cpus, kept.memory_mib);
    }
    if let Some(size) = &body.size {
        let Some((_, c, m, d)) = SIZES.iter().find(|(name, ..)| name == size) else {
            return Err(invalid(format!("there is no size {size:?}"), "xs, small, medium, large, xl"));
        };
        (cpus, memory_mib, disk_mib) = (*c, *m, Some(*d));
    }
    cpus = body.cpu_count.unwrap_or(cpus);
    memory_mib = body.memory_mb.unwrap_or(memory_mib);
    disk_mib = body.disk_size_mb.or(disk_mib);
    if disk_mib.is_some_and(|mib| !(1..=MAX_DISK_MIB).contains(&mib)) {
        return Err(invalid(
            format!("a disk of {} MiB was asked for", disk_mib.unwrap_or_default()),
            "1 MiB to 16 TiB, such as 20gb; it is at least as large as its template's",
        ));
    }
    let always_on = body.always_on.unwrap_or(false);
    let timeout_of = |sec, ms| if always_on { Ok(None) } else { timeout(sec, ms) };
    check_shape(cpus, memory_mib)?;
    let env = body.env.unwrap_or_default();
    crate::engine::check_env(&env)?;
    let network_policy = match body.network_policy.as_deref() {
        None => NetworkPolicy::default(),
        Some(name) => NetworkPolicy::parse(name)
            .ok_or_else(|| invalid(format!("there is no network policy {name:?}"), "allow, deny-all"))?,
    };
    let publish_ports = body.publish_ports.unwrap_or_default();
    crate::engine::check_ports(&publish_ports)?;
    Ok(CreateRequest {
        origin,
        name: body.name,
        cpus,
        memory_mib,
        disk_mib,
        timeout: match (body.timeout_sec, body.timeout_ms) {
            (None, None) => api.defaults.timeout,
            (seconds, milliseconds) => timeout_of(seconds, milliseconds)?,
        },
        idle_timeout: timeout_of(body.idle_timeout_sec, body.idle_timeout_ms)?,
        persistent: body.persistent.unwrap_or(true),
        env,
        network_policy,
        dedup_domain: body.dedup_domain,
        metadata: body.metadata.unwrap_or_default(),
        tags: body.tags.unwrap_or_default(),
        volumes: body.volumes.unwrap_or_default().into_iter().map(Into::into).collect(),
        publish_ports,
        without_memory: body.memory == Some(false),
        start: body.auto_start.unwrap_or(true),
        wait: false,
    })
}

/// Shows a sandbox, by id or name.
#[utoipa::path(get, path = "/sandboxes/{id}", tag = "sandboxes", responses((status = 200, body = Envelope<SandboxBody>)))]
async fn show(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<SandboxBody> {
    data(api.engine.show(&id)?)
}

/// Shows the sandbox of a name.
#[utoipa::path(get, path = "/sandboxes/by-name/{name}", tag = "sandboxes", responses((status = 200, body = Envelope<SandboxBody>)))]
async fn by_name(AppState(api): AppState<Api>, Path(name): Path<String>) -> Answer<SandboxBody> {
    data(api.engine.show_by_name(&name)?)
}

/// Says whether commands can be run.
#[utoipa::path(get, path = "/sandboxes/{id}/readiness", tag = "sandboxes", responses((status = 200, body = Envelope<ReadinessBody>)))]
async fn readiness(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<ReadinessBody> {
    let record = api.engine.show(&id)?.record;
    let ready = record.state == State::Running;
    data(ReadinessBody { ready, state: record.state, last_error: record.last_error })
}

/// Changes what a sandbox is made with; what concerns its machine counts from the next session on.
#[utoipa::path(patch, path = "/sandboxes/{id}", tag = "sandboxes", request_body = UpdateBody, responses((status = 200, body = Envelope<SandboxBody>)))]
async fn update(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<UpdateBody>,
) -> Answer<SandboxBody> {
    data(api.engine.update(&id, body.changes()?).await?)
}

/// Destroys a sandbox for good.
#[utoipa::path(delete, path = "/sandboxes/{id}", tag = "sandboxes", responses((status = 200, body = Envelope<SandboxBody>)))]
async fn destroy(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<SandboxBody> {
    data(api.engine.destroy(&id).await?)
}

/// Ends the session; the file system is kept, and with `memory` what runs.
#[utoipa::path(post, path = "/sandboxes/{id}/stop", tag = "sandboxes", request_body = StopBody, responses((status = 200, body = Envelope<SandboxBody>)))]
async fn stop(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<StopBody>,
) -> Answer<SandboxBody> {
    end_session(&api, &id, ("stop", Keep::Files), body).await
}

/// Ends the session; the file system is kept, and what runs, too, where that can be had, unless `memory` says otherwise. The
/// answer's `kept` says which.
#[utoipa::path(post, path = "/sandboxes/{id}/pause", tag = "sandboxes", request_body = StopBody, responses((status = 200, body = Envelope<SandboxBody>)))]
async fn pause(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<StopBody>,
) -> Answer<SandboxBody> {
    end_session(&api, &id, ("pause", Keep::MemoryIfPossible), body).await
}

async fn end_session(api: &Api, id: &str, (call, default): (&str, Keep), body: StopBody) -> Answer<SandboxBody> {
    refuse_unsupported(call, &body.other)?;
    let keep = match body.memory {
        None => default,
        Some(true) => Keep::Memory,
        Some(false) => Keep::Files,
    };
    data(api.engine.pause(id, keep).await?)
}

/// Starts a session; variables that come with the request are kept.
#[utoipa::path(post, path = "/sandboxes/{id}/resume", tag = "sandboxes", request_body = ResumeBody, responses((status = 200, body = Envelope<SandboxBody>)))]
async fn resume(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ResumeBody>,
) -> Answer<SandboxBody> {
    refuse_unsupported("resume", &body.other)?;
    if !body.env.is_empty() {
        let env = body.env.into_iter().map(|(name, value)| (name, Some(value))).collect();
        api.engine.update(&id, Changes { env, ..Changes::default() }).await?;
    }
    data(match body.memory {
        Some(false) => api.engine.resume_from_files(&id).await?,
        _ => api.engine.resume(&id).await?,
    })
}

/// Gives a running session more time, from now.
#[utoipa::path(post, path = "/sandboxes/{id}/extend", tag = "sandboxes", request_body = ExtendBody, responses((status = 200, body = Envelope<SandboxBody>)))]
async fn extend(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ExtendBody>,
) -> Answer<SandboxBody> {
    data(api.engine.extend(&id, timeout(body.timeout_sec, body.timeout_ms)?).await?)
}

/// Makes sandboxes on the present state of another, or on a snapshot of it; with a count the answer is a list.
#[utoipa::path(post, path = "/sandboxes/{id}/fork", tag = "sandboxes", params(Wait), request_body = ForkBody, responses((status = 201, body = OneOrMany<SandboxBody>)))]
async fn fork(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
    JsonBody(body): JsonBody<ForkBody>,
) -> Result<Response, ApiError> {
    refuse_unsupported("fork", &body.other)?;
    let request = ForkRequest {
        name: body.name,
        count: body.count.unwrap_or(1),
        snapshot: body.snapshot_id,
        memory: body.memory.unwrap_or(false),
        timeout: timeout(body.timeout_sec, body.timeout_ms)?,
        metadata: body.metadata,
        wait: flag(&params, "wait"),
    };
    let mut children = api.engine.fork(&id, request).await?;
    if body.count.is_some() {
        return Ok((StatusCode::CREATED, list_all::<SandboxBody, _>(children)).into_response());
    }
    let child = children.pop().ok_or_else(|| Error::new(Kind::Internal, "a fork made no child"))?;
    Ok((StatusCode::CREATED, data::<SandboxBody>(child)?).into_response())
}
