//! The API's routes.
//!
//! A failed answer is an [`ApiError`]; the outermost layer gives every request an id, puts it in the answer's header and
//! in the error's body, and logs failures of ours.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path as UrlPath, Query, Request, State as AppState};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use vmm::agent::Stdin;

use super::stream::{Encoding, ExecEvents, error_body, error_event, event};
use super::types::*;
use crate::disks::Disks;
use crate::engine::error::{Error, Kind};
use crate::engine::lifecycle::State;
use crate::engine::records::new_id;
use crate::engine::{
    BuildRequest, CreateRequest, Engine, ExecEvent, ExecSpec, ForkRequest, ImageSource, Origin, RunningExec,
};

/// Largest JSON body, but for files.
const MAX_JSON: usize = 1 << 20;
/// Largest JSON body that carries a file. Larger files are streamed.
const MAX_JSON_FILE: usize = 96 << 20;
/// Most of each output of a command that one answer holds.
const MAX_OUTPUT: usize = 16 << 20;
/// Size of the base template's disk unless asked otherwise.
const BASE_DISK_MB: u64 = 10 * 1_024;

/// Processors and memory of a named size.
const SIZES: [(&str, u32, u64); 5] =
    [("xs", 1, 2_048), ("small", 2, 4_096), ("medium", 4, 8_192), ("large", 8, 16_384), ("xl", 16, 32_768)];

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
    /// Standard inputs of running commands that wait for their content.
    stdins: Stdins,
}

type Stdins = Arc<Mutex<HashMap<String, Stdin>>>;
pub(super) type Answer<T> = Result<Json<Envelope<T>>, ApiError>;
pub(super) type ListAnswer<T> = Result<Json<ListEnvelope<T>>, ApiError>;

/// All routes.
pub fn router(engine: Arc<Engine>, disks: Arc<Disks>, defaults: Defaults) -> Router {
    let sandbox = Router::new()
        .route("/", get(show).delete(destroy))
        .route("/readiness", get(readiness))
        .route("/stop", post(stop))
        .route("/pause", post(stop))
        .route("/resume", post(resume))
        .route("/extend", post(extend))
        .route("/fork", post(fork))
        .route("/snapshot", post(take_snapshot))
        .route("/snapshots", get(sandbox_snapshots).post(take_snapshot))
        .route("/snapshots/{snapshot}", get(sandbox_snapshot).delete(delete_sandbox_snapshot))
        .route("/exec", post(exec))
        .route("/exec/stream", post(exec_stream))
        .route("/exec/{exec}/stdin", post(exec_stdin))
        .route("/fs/write", post(write_file).put(write_file))
        .route("/fs/download", get(read_file));
    let v1 = Router::new()
        .route("/health", get(health))
        .route("/sandboxes", get(list).post(create))
        .route("/sandboxes/by-name/{name}", get(by_name))
        .nest("/sandboxes/{id}", sandbox)
        .route("/snapshots", get(snapshots))
        .route("/snapshots/{snapshot}", get(snapshot).delete(delete_snapshot))
        .route("/sandbox-templates", get(templates).post(build_template))
        .route("/sandbox-templates/{name}", get(template).delete(delete_template))
        .merge(super::disks::routes(disks));
    let api = Api { engine, defaults, stdins: Stdins::default() };
    own_layers(Router::new().nest("/api/v1", v1).with_state(api))
}

/// What every answer has: our own bodies where nothing serves a request, and an id.
pub(super) fn own_layers(router: Router) -> Router {
    router.fallback(no_route).method_not_allowed_fallback(no_method).layer(axum::middleware::from_fn(request_id))
}

pub(super) fn data<T>(data: impl Into<T>) -> Answer<T> {
    Ok(Json(Envelope { data: data.into() }))
}

pub(super) fn list_of<T, R: Into<T>>(items: Vec<R>) -> ListAnswer<T> {
    let data: Vec<T> = items.into_iter().map(Into::into).collect();
    let page = Page { count: data.len(), total: data.len(), has_more: false };
    Ok(Json(ListEnvelope { data, page }))
}

// ---- sandboxes

async fn health() -> Answer<serde_json::Value> {
    data(serde_json::json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION") }))
}

async fn list(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<SandboxBody> {
    let state = match params.get("state").map(String::as_str).filter(|s| !s.is_empty()) {
        None => None,
        Some(name) => Some(State::parse(name).ok_or_else(|| {
            Error::new(Kind::InvalidInput, format!("there is no state {name:?}"))
                .hint(State::ALL.map(State::name).join(", "))
        })?),
    };
    list_of(api.engine.list(state))
}

async fn create(
    AppState(api): AppState<Api>,
    Params(params): Params,
    JsonBody(body): JsonBody<CreateBody>,
) -> Result<(StatusCode, Json<Envelope<SandboxBody>>), ApiError> {
    refuse_unsupported("create", &body.other)?;
    let mut request = create_request(body, api.defaults)?;
    request.wait = flag(&params, "wait");
    let view = api.engine.create(request).await?;
    Ok((StatusCode::CREATED, Json(Envelope { data: view.into() })))
}

fn create_request(body: CreateBody, defaults: Defaults) -> Result<CreateRequest, ApiError> {
    let invalid = |message: String, hint: &str| ApiError::from(Error::new(Kind::InvalidInput, message).hint(hint));
    let origin = match (body.template_id, body.snapshot_id) {
        (Some(_), Some(_)) => return Err(invalid("a template and a snapshot were given".into(), "give one of them")),
        (Some(template), None) => Origin::Template(template),
        (None, Some(snapshot)) => Origin::Snapshot(snapshot),
        (None, None) => Origin::Template(crate::engine::BASE.to_owned()),
    };
    let (mut cpus, mut memory_mib) = (defaults.cpus, defaults.memory_mib);
    if let Some(size) = &body.size {
        let Some((_, c, m)) = SIZES.iter().find(|(name, ..)| name == size) else {
            return Err(invalid(format!("there is no size {size:?}"), "xs, small, medium, large, xl"));
        };
        // A disk is as large as its template's.
        (cpus, memory_mib) = (*c, *m);
    }
    cpus = body.cpu_count.unwrap_or(cpus);
    memory_mib = body.memory_mb.unwrap_or(memory_mib);
    if !(1..=64).contains(&cpus) {
        return Err(invalid(format!("{cpus} processors were asked for"), "1 to 64"));
    }
    if !(128..=1 << 20).contains(&memory_mib) {
        return Err(invalid(format!("{memory_mib} MiB of memory were asked for"), "128 MiB to 1 TiB, such as 2gb"));
    }
    let env = body.env.unwrap_or_default();
    crate::engine::check_env(&env)?;
    Ok(CreateRequest {
        origin,
        name: body.name,
        cpus,
        memory_mib,
        disk_mib: body.disk_size_mb,
        timeout: timeout(body.timeout_sec, body.timeout_ms)?,
        persistent: body.persistent.unwrap_or(true),
        env,
        metadata: body.metadata.unwrap_or_default(),
        tags: body.tags.unwrap_or_default(),
        start: body.auto_start.unwrap_or(true),
        wait: false,
    })
}

/// What would be done otherwise than asked for is not done.
fn refuse_unsupported(what: &str, other: &serde_json::Map<String, serde_json::Value>) -> Result<(), ApiError> {
    let names = unsupported(other);
    if names.is_empty() {
        return Ok(());
    }
    let message = format!("{what} does not support: {}", names.join(", "));
    Err(Error::new(Kind::UnsupportedOption, message).hint("leave it out").into())
}

/// None, and zero, mean without limit.
fn timeout(seconds: Option<u64>, milliseconds: Option<u64>) -> Result<Option<Duration>, ApiError> {
    const MOST: u64 = 100 * 365 * 86_400 * 1_000;
    match milliseconds.or(seconds.map(|s| s.saturating_mul(1_000))) {
        None | Some(0) => Ok(None),
        Some(ms) if ms <= MOST => Ok(Some(Duration::from_millis(ms))),
        Some(_) => Err(Error::new(Kind::InvalidInput, "the timeout is longer than a hundred years").into()),
    }
}

async fn show(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<SandboxBody> {
    data(api.engine.show(&id)?)
}

async fn by_name(AppState(api): AppState<Api>, Path(name): Path<String>) -> Answer<SandboxBody> {
    data(api.engine.show_by_name(&name)?)
}

async fn readiness(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<serde_json::Value> {
    let record = api.engine.show(&id)?.record;
    data(
        serde_json::json!({ "ready": record.state == State::Running, "state": record.state, "last_error": record.last_error }),
    )
}

async fn destroy(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<SandboxBody> {
    data(api.engine.destroy(&id).await?)
}

async fn stop(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<SandboxBody> {
    data(api.engine.stop(&id).await?)
}

async fn resume(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<SandboxBody> {
    data(api.engine.resume(&id).await?)
}

async fn extend(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ExtendBody>,
) -> Answer<SandboxBody> {
    data(api.engine.extend(&id, timeout(body.timeout_sec, body.timeout_ms)?).await?)
}

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
        timeout: timeout(body.timeout_sec, body.timeout_ms)?,
        metadata: body.metadata,
        wait: flag(&params, "wait"),
    };
    let mut children = api.engine.fork(&id, request).await?;
    if body.count.is_some() {
        return Ok((StatusCode::CREATED, list_of::<SandboxBody, _>(children)?).into_response());
    }
    let child = children.pop().ok_or_else(|| Error::new(Kind::Internal, "a fork made no child"))?;
    Ok((StatusCode::CREATED, data::<SandboxBody>(child)?).into_response())
}

// ---- snapshots

async fn take_snapshot(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<SnapshotRequestBody>,
) -> Result<(StatusCode, Json<Envelope<SnapshotBody>>), ApiError> {
    refuse_unsupported("snapshot", &body.other)?;
    Ok((StatusCode::CREATED, data(api.engine.snapshot(&id, body.comment).await?)?))
}

async fn snapshots(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<SnapshotBody> {
    list_of(api.engine.snapshots(params.get("resource_id").map(String::as_str))?)
}

async fn snapshot(AppState(api): AppState<Api>, Path(snapshot): Path<String>) -> Answer<SnapshotBody> {
    data(api.engine.find_snapshot(&snapshot, None)?)
}

async fn delete_snapshot(AppState(api): AppState<Api>, Path(snapshot): Path<String>) -> Answer<SnapshotBody> {
    data(api.engine.delete_snapshot(&snapshot, None).await?)
}

async fn sandbox_snapshots(AppState(api): AppState<Api>, Path(id): Path<String>) -> ListAnswer<SnapshotBody> {
    list_of(api.engine.snapshots(Some(&id))?)
}

async fn sandbox_snapshot(
    AppState(api): AppState<Api>,
    Path((id, snapshot)): Path<(String, String)>,
) -> Answer<SnapshotBody> {
    data(api.engine.find_snapshot(&snapshot, Some(&id))?)
}

async fn delete_sandbox_snapshot(
    AppState(api): AppState<Api>,
    Path((id, snapshot)): Path<(String, String)>,
) -> Answer<SnapshotBody> {
    data(api.engine.delete_snapshot(&snapshot, Some(&id)).await?)
}

// ---- commands

async fn exec(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ExecBody>,
) -> Answer<ExecResult> {
    if matches!(body.stdin, Some(StdinBody::Stream(true))) {
        return Err(Error::new(Kind::InvalidInput, "a standard input can be sent to a streamed command only")
            .hint("POST …/exec/stream, or give its content as a string")
            .into());
    }
    let mut exec = start_exec(&api, &id, &body).await?;
    feed(&mut exec, &body);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut truncated = false;
    let mut keep = |kept: &mut Vec<u8>, bytes: &[u8]| {
        let room = MAX_OUTPUT - kept.len();
        truncated |= bytes.len() > room;
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    };
    loop {
        match exec.next_event().await? {
            Some(ExecEvent::Stdout(bytes)) => keep(&mut out, &bytes),
            Some(ExecEvent::Stderr(bytes)) => keep(&mut err, &bytes),
            Some(ExecEvent::Exit { code, signal, timed_out }) => {
                return data(ExecResult {
                    stdout: text(out),
                    stderr: text(err),
                    exit_code: exit_code(code, signal, timed_out),
                    signal,
                    timed_out,
                    truncated,
                    duration_ms: exec.age().as_millis() as u64,
                });
            }
            None => return Err(Error::new(Kind::SessionEnded, "the command's end was not seen").into()),
        }
    }
}

async fn exec_stream(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ExecBody>,
) -> Result<Response, ApiError> {
    let encoding = match body.encoding.as_deref() {
        None | Some("lines") => Encoding::Lines,
        Some("base64") => Encoding::Base64,
        Some(other) => {
            return Err(Error::new(Kind::InvalidInput, format!("there is no encoding {other:?}"))
                .hint("lines, base64")
                .into());
        }
    };
    let mut exec = start_exec(&api, &id, &body).await?;
    feed(&mut exec, &body);
    let waiting = match (&body.stdin, exec.take_stdin()) {
        (Some(StdinBody::Stream(true)), Some(stdin)) => {
            let id = new_id("exec");
            api.stdins.lock().insert(id.clone(), stdin);
            Some(id)
        }
        _ => None,
    };
    let mut events = ExecEvents::new(exec, encoding);
    if let Some(id) = waiting {
        events._cleanup = Some(Box::new(WaitingStdin { id: id.clone(), stdins: api.stdins.clone() }));
        events.exec_id = Some(id);
    }
    let body = stream::unfold(events, |mut events| async move {
        let piece = events.next().await?;
        Some((Ok::<_, std::convert::Infallible>(piece), events))
    });
    Ok(event_stream(Body::from_stream(body)))
}

fn event_stream(body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, body).into_response()
}

/// A standard input that nobody came for goes with its command.
struct WaitingStdin {
    id: String,
    stdins: Stdins,
}

impl Drop for WaitingStdin {
    fn drop(&mut self) {
        self.stdins.lock().remove(&self.id);
    }
}

async fn exec_stdin(
    AppState(api): AppState<Api>,
    Path((_, exec)): Path<(String, String)>,
    request: Request,
) -> Answer<serde_json::Value> {
    let Some(mut stdin) = api.stdins.lock().remove(&exec) else {
        return Err(ApiError::new(
            404,
            "exec_not_found",
            "no running command waits for a standard input under this id",
        ));
    };
    let mut content = request.into_body().into_data_stream();
    let mut taken = 0;
    while let Some(piece) = content.next().await {
        let piece =
            piece.map_err(|e| ApiError::new(400, "body_broken", format!("the request's body broke off: {e}")))?;
        if stdin.write(&piece).await.is_err() {
            // The command has ended or closed its input, as `head` does. That is no error of the caller's.
            break;
        }
        taken += piece.len() as u64;
    }
    stdin.close();
    data(serde_json::json!({ "size_bytes": taken }))
}

async fn start_exec(api: &Api, id: &str, body: &ExecBody) -> Result<RunningExec, ApiError> {
    refuse_unsupported("exec", &body.other)?;
    let argv = match &body.command {
        Command::Argv(argv) => argv.clone(),
        Command::Line(line) => vec!["sh".to_owned(), "-lc".to_owned(), line.clone()],
    };
    let timeout = match body.timeout {
        None => None,
        Some(seconds) if seconds > 0.0 && seconds < 1e9 => Some(Duration::from_secs_f64(seconds)),
        Some(seconds) => return Err(Error::new(Kind::InvalidInput, format!("a timeout of {seconds} s")).into()),
    };
    let spec = ExecSpec {
        argv,
        env: body.env.clone().unwrap_or_default(),
        cwd: body.cwd.clone(),
        user: body.user.clone(),
        timeout,
        stdin: matches!(body.stdin, Some(StdinBody::Stream(true) | StdinBody::Text(_))),
    };
    Ok(api.engine.exec(id, spec).await?)
}

/// Gives a command the input that came with the request.
fn feed(exec: &mut RunningExec, body: &ExecBody) {
    if let Some(StdinBody::Text(content)) = &body.stdin
        && let Some(mut stdin) = exec.take_stdin()
    {
        let content = content.clone();
        tokio::spawn(async move {
            // A command that does not read to the end is no error.
            let _ = stdin.write(content.as_bytes()).await;
        });
    }
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
}

// ---- files

async fn write_file(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
    request: Request,
) -> Answer<WrittenBody> {
    if is_json(&request) {
        let body: WriteFileBody = parse_json(request, MAX_JSON_FILE).await?;
        let content = match (body.content, body.content_base64) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(encoded)) => BASE64
                .decode(encoded)
                .map_err(|e| Error::new(Kind::InvalidInput, format!("content_base64 is not base64: {e}")))?,
            _ => return Err(Error::new(Kind::InvalidInput, "give content or content_base64, and not both").into()),
        };
        let mut writer = api.engine.write_file(&id, &body.path, body.mode).await?;
        writer.write(&content).await?;
        writer.finish().await?;
        return data(WrittenBody { path: body.path, size_bytes: content.len() as u64 });
    }
    let path = params.get("path").cloned().unwrap_or_default();
    let mode = match params.get("mode") {
        None => None,
        Some(octal) => Some(u32::from_str_radix(octal, 8).map_err(|_| {
            Error::new(Kind::InvalidInput, format!("{octal:?} is not a file mode")).hint("octal digits, such as 644")
        })?),
    };
    let mut writer = api.engine.write_file(&id, &path, mode).await?;
    let mut content = request.into_body().into_data_stream();
    let mut size_bytes = 0;
    while let Some(piece) = content.next().await {
        // A body that breaks off leaves the guest's old file: the writer is dropped unfinished.
        let piece =
            piece.map_err(|e| ApiError::new(400, "body_broken", format!("the request's body broke off: {e}")))?;
        writer.write(&piece).await?;
        size_bytes += piece.len() as u64;
    }
    writer.finish().await?;
    data(WrittenBody { path, size_bytes })
}

async fn read_file(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    Params(params): Params,
) -> Result<Response, ApiError> {
    let path = params.get("path").map(String::as_str).unwrap_or_default();
    let reader = api.engine.read_file(&id, path).await?;
    // Chunked: a file that breaks off ends without the last chunk, and the client sees that.
    let body = stream::unfold(Some(reader), |reader| async move {
        let mut reader = reader?;
        match reader.next_piece().await {
            Ok(Some(piece)) => Some((Ok(piece), Some(reader))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    });
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], Body::from_stream(body)).into_response())
}

// ---- templates

async fn templates(AppState(api): AppState<Api>) -> ListAnswer<TemplateBody> {
    list_of(api.engine.templates())
}

async fn template(AppState(api): AppState<Api>, Path(name): Path<String>) -> Answer<TemplateBody> {
    data(api.engine.template(&name)?)
}

async fn delete_template(AppState(api): AppState<Api>, Path(name): Path<String>) -> Answer<TemplateBody> {
    data(api.engine.delete_template(&name).await?)
}

/// Answers when the template is there, or with `?stream=true` with an event a step and a last `done` or `error`.
async fn build_template(
    AppState(api): AppState<Api>,
    Params(params): Params,
    JsonBody(body): JsonBody<TemplateRequestBody>,
) -> Result<Response, ApiError> {
    let source = match (body.image_path, body.disk_size_mb) {
        (Some(_), Some(_)) => {
            return Err(Error::new(Kind::InvalidInput, "an image has its own size")
                .hint("give an image or a size")
                .into());
        }
        (Some(path), None) => ImageSource::Raw { path: path.into() },
        (None, size) if body.name == crate::engine::BASE => {
            ImageSource::Base { size_bytes: size.unwrap_or(BASE_DISK_MB) << 20 }
        }
        (None, _) => {
            return Err(Error::new(Kind::InvalidInput, format!("there is no recipe for a template {:?}", body.name))
                .hint("the template base is built; others are imported: miosa template build NAME --image FILE")
                .into());
        }
    };
    if let ImageSource::Base { size_bytes } = source
        && !(1 << 30..=64 << 40).contains(&size_bytes)
    {
        return Err(Error::new(Kind::InvalidInput, "the base template's disk has 1 GiB to 64 TiB").into());
    }
    let request = BuildRequest { name: body.name, source };
    if !flag(&params, "stream") {
        let record = api.engine.build_template(request, |_| {}).await?;
        return Ok((StatusCode::CREATED, data::<TemplateBody>(record)?).into_response());
    }
    let (tell, told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let steps = tell.clone();
        let built = api
            .engine
            .build_template(request, move |message| {
                let _ = steps.send(event("progress", &serde_json::json!({ "message": message })));
            })
            .await;
        // Nobody listens any more when this fails; the build has gone on without them.
        let _ = tell.send(match built {
            Ok(record) => event("done", &TemplateBody::from(record)),
            Err(error) => error_event(&error),
        });
    });
    let body = stream::unfold(told, |mut told| async move {
        let piece = match tokio::time::timeout(Duration::from_secs(15), told.recv()).await {
            Ok(piece) => piece?,
            Err(_) => Bytes::from_static(b": alive\n\n"),
        };
        Some((Ok::<_, std::convert::Infallible>(piece), told))
    });
    Ok(event_stream(Body::from_stream(body)))
}

// ---- requests and errors

async fn no_route(request: Request) -> ApiError {
    let message = format!("there is no {} {}", request.method(), request.uri().path());
    ApiError::new(404, "route_not_found", message)
        .hint("this daemon serves /api/v1/sandboxes, snapshots, sandbox-templates, disks and store")
}

async fn no_method(request: Request) -> ApiError {
    ApiError::new(405, "method_not_allowed", format!("{} does not take {}", request.uri().path(), request.method()))
}

/// A failed answer.
#[derive(Debug)]
pub struct ApiError {
    status: u16,
    body: Box<ErrorBody>,
}

impl ApiError {
    pub(super) fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        let body = ErrorBody { code: code.to_owned(), message: message.into(), ..ErrorBody::default() };
        Self { status, body: Box::new(body) }
    }

    fn hint(mut self, hint: &str) -> Self {
        self.body.hint = Some(hint.to_owned());
        self
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self { status: error.kind().status(), body: Box::new(error_body(&error)) }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(Arc::new(*self.body));
        response
    }
}

/// Gives every request an id, and every failure its body.
async fn request_id(request: Request, next: Next) -> Response {
    let id = new_id("req");
    let what = format!("{} {}", request.method(), request.uri().path());
    let mut response = next.run(request).await;
    let status = response.status();
    if let Some(error) = response.extensions_mut().remove::<Arc<ErrorBody>>() {
        if status.is_server_error() {
            tracing::error!(request = %id, %what, status = status.as_u16(), code = %error.code, message = %error.message, "failed");
        } else {
            tracing::debug!(request = %id, %what, status = status.as_u16(), code = %error.code, message = %error.message, "refused");
        }
        let error = ErrorBody { request_id: id.clone(), ..(*error).clone() };
        response = (status, Json(ErrorEnvelope { error })).into_response();
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

/// Ids and names in the path.
pub(super) struct Path<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, ApiError> {
        let path = UrlPath::<T>::from_request_parts(parts, state).await;
        path.map(|UrlPath(value)| Path(value)).map_err(|e| ApiError::new(400, "invalid_path", e.body_text()))
    }
}

/// The query, as a map.
pub(super) struct Params(pub(super) HashMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, ApiError> {
        let query = Query::<HashMap<String, String>>::from_request_parts(parts, state).await;
        query.map(|Query(map)| Params(map)).map_err(|e| ApiError::new(400, "invalid_query", e.body_text()))
    }
}

impl std::ops::Deref for Params {
    type Target = HashMap<String, String>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

pub(super) fn flag(params: &HashMap<String, String>, name: &str) -> bool {
    // The SDK sends `wait` as a flag or as a number of seconds.
    params.get(name).is_some_and(|v| !matches!(v.to_ascii_lowercase().as_str(), "false" | "0" | "no"))
}

/// A JSON body of bounded size; an empty one is an empty object.
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        parse_json(request, MAX_JSON).await.map(JsonBody)
    }
}

fn is_json(request: &Request) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    kind.split(';').next().is_some_and(|k| k.trim().eq_ignore_ascii_case("application/json"))
}

async fn parse_json<T: DeserializeOwned>(request: Request, most: usize) -> Result<T, ApiError> {
    let mut content = request.into_body().into_data_stream();
    let mut bytes = BytesMut::new();
    while let Some(piece) = content.next().await {
        let piece =
            piece.map_err(|e| ApiError::new(400, "body_broken", format!("the request's body broke off: {e}")))?;
        if bytes.len() + piece.len() > most {
            let message = format!("the request's body is larger than {most} bytes");
            return Err(ApiError::new(413, "body_too_large", message));
        }
        bytes.extend_from_slice(&piece);
    }
    let bytes = if bytes.is_empty() { b"{}" } else { &bytes[..] };
    // A list would be taken for the fields in their order.
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Err(ApiError::new(400, "invalid_json", "the request's body is not a JSON object"));
    }
    serde_json::from_slice(bytes).map_err(|e| ApiError::new(400, "invalid_json", format!("the request's body: {e}")))
}
