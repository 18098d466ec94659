//! Templates.

use std::time::Duration;

use axum::body::Body;
use axum::extract::State as AppState;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, event_stream, list_of};
use super::request::{JsonBody, Paging, Params, Path, flag};
use crate::api::stream::{error_event, event};
use crate::api::types::{Envelope, ListEnvelope, TemplateBody, TemplateRequestBody};
use crate::engine::error::{Error, Kind};
use crate::engine::{BuildRequest, ImageSource};

/// Size of the base template's disk unless asked otherwise.
const BASE_DISK_MB: u64 = 10 * 1_024;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(templates, build_template)).routes(routes!(template, delete_template))
}

/// Lists templates.
#[utoipa::path(get, path = "/sandbox-templates", tag = "templates", params(Paging), responses((status = 200, body = ListEnvelope<TemplateBody>)))]
async fn templates(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<TemplateBody> {
    list_of(api.engine.templates(), &params)
}

/// Shows a template.
#[utoipa::path(get, path = "/sandbox-templates/{name}", tag = "templates", responses((status = 200, body = Envelope<TemplateBody>)))]
async fn template(AppState(api): AppState<Api>, Path(name): Path<String>) -> Answer<TemplateBody> {
    data(api.engine.template(&name)?)
}

/// Deletes a template; sandboxes made from it stay.
#[utoipa::path(delete, path = "/sandbox-templates/{name}", tag = "templates", responses((status = 200, body = Envelope<TemplateBody>)))]
async fn delete_template(AppState(api): AppState<Api>, Path(name): Path<String>) -> Answer<TemplateBody> {
    data(api.engine.delete_template(&name).await?)
}

/// Answers when the template is there, or with `?stream=true` with an event a step and a last `done` or `error`.
#[utoipa::path(post, path = "/sandbox-templates", tag = "templates", params(("stream" = Option<bool>, Query)), request_body = TemplateRequestBody, responses((status = 200, description = "Events", body = String, content_type = "text/event-stream"), (status = 201, body = Envelope<TemplateBody>)))]
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
