//! Batches of sandboxes, a sandbox for one command, and work that outlives its request.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State as AppState;
use axum::http::StatusCode;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, event_stream, list_of};
use super::exec::{run_to_end, spec_of};
use super::request::{JsonBody, Paging, Params, Path, refuse_unsupported};
use super::sandboxes::create_request;
use crate::api::stream::{KEEP_ALIVE, event};
use crate::api::types::{
    BatchBody, BatchItemBody, BatchRequestBody, Envelope, ExecBody, ListEnvelope, OperationBody, RunBody,
    RunRequestBody,
};
use crate::engine::error::{Error, Kind};
use crate::engine::{BatchRequest, BatchView, BatchWatch, BuildStatus, CreateRequest};

/// How often a build is looked at.
const LOOK: Duration = Duration::from_millis(500);

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create))
        .routes(routes!(run))
        .routes(routes!(show))
        .routes(routes!(items))
        .routes(routes!(cancel))
        .routes(routes!(events))
        .routes(routes!(operation))
        .routes(routes!(operation_events))
        .routes(routes!(cancel_operation))
}

/// Makes sandboxes of one kind, all or none, and answers before they are started. The batch survives the daemon.
#[utoipa::path(post, path = "/sandboxes/batch", tag = "batches", request_body = BatchRequestBody, responses((status = 201, body = Envelope<BatchBody>)))]
async fn create(
    AppState(api): AppState<Api>,
    JsonBody(body): JsonBody<BatchRequestBody>,
) -> Result<(StatusCode, Json<Envelope<BatchBody>>), ApiError> {
    refuse_unsupported("a batch", &body.each.other)?;
    let each = create_request(body.each, &api)?;
    let view = api.engine.create_batch(BatchRequest { each, count: body.count, concurrency: body.concurrency }).await?;
    Ok((StatusCode::CREATED, data(&view)?))
}

/// Shows a batch.
#[utoipa::path(get, path = "/sandboxes/batches/{batch}", tag = "batches", responses((status = 200, body = Envelope<BatchBody>)))]
async fn show(AppState(api): AppState<Api>, Path(batch): Path<String>) -> Answer<BatchBody> {
    data(&api.engine.batch(&batch)?)
}

/// Lists the sandboxes of a batch, in their order.
#[utoipa::path(get, path = "/sandboxes/batches/{batch}/items", tag = "batches", params(Paging), responses((status = 200, body = ListEnvelope<BatchItemBody>)))]
async fn items(
    AppState(api): AppState<Api>,
    Path(batch): Path<String>,
    Params(params): Params,
) -> ListAnswer<BatchItemBody> {
    list_of(BatchItemBody::all_of(api.engine.batch(&batch)?), &params)
}

/// Starts no more of a batch's sandboxes: those that were not started are destroyed, the others go on.
#[utoipa::path(post, path = "/sandboxes/batches/{batch}/cancel", tag = "batches", responses((status = 200, body = Envelope<BatchBody>)))]
async fn cancel(AppState(api): AppState<Api>, Path(batch): Path<String>) -> Answer<BatchBody> {
    data(&api.engine.cancel_batch(&batch).await?)
}

/// Sends `batch_progress` as a batch goes on, the first at once, and `batch_settled` at its end.
#[utoipa::path(get, path = "/sandboxes/batches/{batch}/events", tag = "batches", responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn events(AppState(api): AppState<Api>, Path(batch): Path<String>) -> Result<Response, ApiError> {
    let tell = |view: &BatchView| {
        let name = if view.record.settled_at.is_some() { "batch_settled" } else { "batch_progress" };
        let mut told = serde_json::to_value(BatchBody::from(view)).unwrap_or_default();
        told["type"] = name.into();
        event(name, &told)
    };
    Ok(follow(api.engine.watch_batch(&batch)?, tell))
}

fn follow(watch: BatchWatch, tell: impl Fn(&BatchView) -> Bytes + Send + 'static) -> Response {
    let pieces = stream::unfold((watch, tell), |(mut watch, tell)| async move {
        let piece = match tokio::time::timeout(KEEP_ALIVE, watch.next()).await {
            Err(_) => Bytes::from_static(b": alive\n\n"),
            Ok(view) => tell(&view?),
        };
        Some((Ok::<_, Infallible>(piece), (watch, tell)))
    });
    event_stream(Body::from_stream(pieces))
}

/// Makes a sandbox, runs a command in it, and answers with both. The sandbox stays, unless it is not to be kept.
#[utoipa::path(post, path = "/sandboxes/run", tag = "batches", request_body = RunRequestBody, responses((status = 201, body = Envelope<RunBody>)))]
async fn run(
    AppState(api): AppState<Api>,
    JsonBody(body): JsonBody<RunRequestBody>,
) -> Result<(StatusCode, Json<Envelope<RunBody>>), ApiError> {
    refuse_unsupported("run", &body.sandbox.other)?;
    let exec = body.exec();
    // What is wrong with the command is told before anything is made.
    spec_of(&exec)?;
    let keep = body.keep.unwrap_or(body.sandbox.persistent != Some(false));
    let mut request = create_request(body.sandbox, &api)?;
    (request.start, request.wait) = (true, true);
    // To its end, also if the caller goes away: a sandbox that is not to be kept must not stay.
    let work = tokio::spawn(async move { run_once(&api, request, &exec, keep).await });
    let ended = work.await.map_err(|e| Error::new(Kind::Internal, format!("the run did not end: {e}")))?;
    Ok((StatusCode::CREATED, data(ended?)?))
}

async fn run_once(api: &Api, request: CreateRequest, exec: &ExecBody, keep: bool) -> Result<RunBody, ApiError> {
    let made = match api.engine.create(request).await {
        Ok(view) => view.record.id,
        Err(error) => {
            if !keep && let Some(id) = error.sandbox() {
                api.engine.destroy(id).await?;
            }
            return Err(error.into());
        }
    };
    let ran = run_to_end(api, &made, exec).await;
    let view = match keep {
        true => api.engine.show(&made)?,
        false => api.engine.destroy(&made).await?,
    };
    Ok(RunBody { sandbox: view.into(), result: ran? })
}

/// A batch, or a template's build.
#[utoipa::path(get, path = "/operations/{operation}", tag = "batches", responses((status = 200, body = Envelope<OperationBody>)))]
async fn operation(AppState(api): AppState<Api>, Path(operation): Path<String>) -> Answer<OperationBody> {
    data(find(&api, &operation)?)
}

fn find(api: &Api, id: &str) -> Result<OperationBody, ApiError> {
    match (api.engine.batch(id), api.engine.build(id)) {
        (Ok(batch), _) => Ok(OperationBody::from(&batch)),
        (_, Ok(build)) => Ok(OperationBody::from(&build)),
        _ => Err(ApiError::new(404, "operation_not_found", format!("there is no operation {id:?}"))
            .hint("batches of sandboxes and builds of templates are operations; all else is done when it is answered")),
    }
}

/// Sends an operation as it goes on, the first time at once and the last time at its end, as events `operation`.
#[utoipa::path(get, path = "/operations/{operation}/events", tag = "batches", responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn operation_events(AppState(api): AppState<Api>, Path(operation): Path<String>) -> Result<Response, ApiError> {
    find(&api, &operation)?;
    if let Ok(watch) = api.engine.watch_batch(&operation) {
        return Ok(follow(watch, |view| event("operation", &OperationBody::from(view))));
    }
    let looks = stream::unfold((api, Some(operation), String::new()), |(api, id, told)| async move {
        let (id, mut told) = (id?, told);
        loop {
            let build = api.engine.build(&id).ok()?;
            let step = format!("{:?} {:?}", build.status, build.log.back());
            if step != told {
                told = step;
                let rest = (build.status == BuildStatus::Running).then_some(id);
                let piece = event("operation", &OperationBody::from(&build));
                return Some((Ok::<_, Infallible>(piece), (api, rest, told)));
            }
            tokio::time::sleep(LOOK).await;
        }
    });
    Ok(event_stream(Body::from_stream(looks)))
}

/// Cancels a batch. A build cannot be cancelled.
#[utoipa::path(post, path = "/operations/{operation}/cancel", tag = "batches", responses((status = 200, body = Envelope<OperationBody>)))]
async fn cancel_operation(AppState(api): AppState<Api>, Path(operation): Path<String>) -> Answer<OperationBody> {
    let found = find(&api, &operation)?;
    match api.engine.cancel_batch(&operation).await {
        Ok(_) if found.finished_at.is_some() => {
            Err(ApiError::new(409, "operation_not_cancellable", format!("operation {operation} is over")))
        }
        Ok(view) => data(&view),
        Err(_) => Err(ApiError::new(409, "operation_not_cancellable", "a template's build cannot be cancelled")
            .hint("wait for its end")),
    }
}
