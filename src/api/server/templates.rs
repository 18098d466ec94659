//! Templates and their builds.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State as AppState};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vmm::image::ImageFormat;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, event_stream, list_of};
use super::request::{JsonBody, Paging, Params, Path, flag, parse_json, refuse_unsupported};
use crate::api::stream::{error_event, event};
use crate::api::types::{
    BuildBody, Envelope, Figures, ListEnvelope, TemplateBody, TemplateRequestBody, ValidateBody, ValidityBody,
};
use crate::engine::error::{Error, Kind};
use crate::engine::recipe::{DEBIAN, Recipe};
use crate::engine::records::TemplateRecord;
use crate::engine::{BuildRequest, ImageSource};

/// Largest request that carries a recipe, with the files in it.
const MAX_RECIPE: usize = 96 << 20;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(templates, build_template))
        .routes(routes!(build_spec))
        .routes(routes!(validate))
        .routes(routes!(template, delete_template))
        .routes(routes!(builds, build_again))
        .routes(routes!(build))
}

/// Lists templates; with `usage=true` with what each costs.
#[utoipa::path(get, path = "/sandbox-templates", tag = "templates", params(("usage" = Option<bool>, Query), Paging), responses((status = 200, body = ListEnvelope<TemplateBody>)))]
async fn templates(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<TemplateBody> {
    let records = api.engine.templates();
    if flag(&params, "usage") {
        let usage = api.engine.template_usage(&records).await?;
        let with_usage = records.into_iter().zip(usage);
        let bodies = with_usage.map(|(r, usage)| {
            let count = api.engine.sandboxes_from(&r.name);
            TemplateBody::new(r, Some(usage), count)
        });
        return list_of(bodies.collect::<Vec<_>>(), &params);
    }
    list_of(records.into_iter().map(|r| body_of(&api, r)).collect::<Vec<_>>(), &params)
}

fn body_of(api: &Api, record: TemplateRecord) -> TemplateBody {
    let count = api.engine.sandboxes_from(&record.name);
    TemplateBody::new(record, None, count)
}

/// Shows a template, or how its first build goes.
#[utoipa::path(get, path = "/sandbox-templates/{name}", tag = "templates", responses((status = 200, body = Envelope<TemplateBody>)))]
async fn template(AppState(api): AppState<Api>, Path(name): Path<String>) -> Answer<TemplateBody> {
    match api.engine.template(&name) {
        Ok(record) => {
            let usage = api.engine.template_usage(std::slice::from_ref(&record)).await?;
            let count = api.engine.sandboxes_from(&name);
            data(TemplateBody::new(record, usage.first().copied(), count))
        }
        Err(error) => match api.engine.builds(Some(&name)).pop() {
            Some(build) if build.status != crate::engine::BuildStatus::Succeeded => data(TemplateBody::of_build(build)),
            _ => Err(error.into()),
        },
    }
}

/// Deletes a template; sandboxes made from it stay.
#[utoipa::path(delete, path = "/sandbox-templates/{name}", tag = "templates", responses((status = 200, body = Envelope<TemplateBody>)))]
async fn delete_template(AppState(api): AppState<Api>, Path(name): Path<String>) -> Answer<TemplateBody> {
    let record = api.engine.delete_template(&name).await?;
    data(body_of(&api, record))
}

/// Builds or imports a template: answers when it is there; with `?stream=true` with an event a step and a last `done` or
/// `error`; with a `build_spec` and without `?wait=true` at once, as a build can take longer than a client waits.
#[utoipa::path(post, path = "/sandbox-templates", tag = "templates", params(("stream" = Option<bool>, Query), ("wait" = Option<bool>, Query)), request_body = TemplateRequestBody, responses((status = 200, description = "Events", body = String, content_type = "text/event-stream"), (status = 201, body = Envelope<TemplateBody>), (status = 202, body = Envelope<TemplateBody>)))]
async fn build_template(
    AppState(api): AppState<Api>,
    Params(params): Params,
    request: Request,
) -> Result<Response, ApiError> {
    let body: TemplateRequestBody = parse_json(request, MAX_RECIPE).await?;
    refuse_unsupported("a template", &body.other)?;
    let at_once = body.build_spec.is_some() && !flag(&params, "wait");
    let request = build_request(body)?;
    if flag(&params, "stream") {
        return Ok(streamed(api, request));
    }
    if at_once {
        let build = api.engine.start_build(request)?;
        return Ok((StatusCode::ACCEPTED, data::<TemplateBody>(TemplateBody::of_build(build))?).into_response());
    }
    let record = api.engine.build_template(request, |_| {}).await?;
    Ok((StatusCode::CREATED, data::<TemplateBody>(body_of(&api, record))?).into_response())
}

fn build_request(body: TemplateRequestBody) -> Result<BuildRequest, Error> {
    let invalid = |message: &str, hint: &str| Err(Error::new(Kind::InvalidInput, message).hint(hint));
    let no_cache = body.no_cache.unwrap_or(false);
    let source = match (body.image_path, body.build_spec) {
        (Some(_), Some(_)) => return invalid("a recipe and an image were given", "give one of them"),
        (Some(path), None) => ImageSource::File {
            path: path.into(),
            format: body.format.as_deref().map(image_format).transpose()?,
            disk_bytes: body.disk_size_mb.map(disk_bytes).transpose()?,
        },
        (None, spec) => {
            let mut recipe = match spec {
                Some(spec) => parse_spec(spec)?,
                None => Recipe::built_in(&body.name).ok_or_else(|| {
                    let message = format!("there is no recipe for a template {:?}", body.name);
                    Error::new(Kind::InvalidInput, message).hint(format!(
                        "built-in recipes: {}; your own: miosa template build NAME --file RECIPE; an image: miosa template import FILE --name NAME",
                        Recipe::built_in_names().join(", ")
                    ))
                })?,
            };
            if let Some(mib) = body.disk_size_mb {
                if recipe.from != DEBIAN {
                    return invalid(
                        &format!("the recipe starts from {:?}, whose disk it has", recipe.from),
                        "leave out the size, or set it where the recipe from debian is built",
                    );
                }
                recipe.disk = Some(format!("{mib}mb"));
            }
            ImageSource::Recipe(Box::new(recipe))
        }
    };
    Ok(BuildRequest { name: body.name, source, no_cache })
}

fn image_format(name: &str) -> Result<ImageFormat, Error> {
    match name {
        "raw" => Ok(ImageFormat::Raw),
        "qcow2" => Ok(ImageFormat::Qcow2),
        "tar" => Ok(ImageFormat::Tar),
        "container" | "oci" | "docker" => Ok(ImageFormat::Container),
        other => Err(Error::new(Kind::InvalidInput, format!("there is no format {other:?}"))
            .hint("raw, qcow2, tar, container; or leave it out")),
    }
}

fn disk_bytes(mib: u64) -> Result<u64, Error> {
    if !(8..=64 << 20).contains(&mib) {
        return Err(Error::new(Kind::InvalidInput, format!("a template's disk has 8 MiB to 64 TiB, not {mib} MiB")));
    }
    Ok(mib << 20)
}

fn parse_spec(spec: Value) -> Result<Recipe, Error> {
    serde_json::from_value(spec).map_err(|e| {
        Error::new(Kind::InvalidInput, format!("the build_spec cannot be read: {e}"))
            .hint("its schema: GET /api/v1/sandbox-templates/build-spec")
    })
}

fn streamed(api: Api, request: BuildRequest) -> Response {
    let (tell, told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let steps = tell.clone();
        let built = api
            .engine
            .build_template(request, move |message| {
                let _ = steps.send(event("progress", &json!({ "message": message })));
            })
            .await;
        // Nobody listens any more when this fails; the build has gone on without them.
        let _ = tell.send(match built {
            Ok(record) => event("done", &body_of(&api, record)),
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
    event_stream(Body::from_stream(body))
}

/// Lists the builds of a template since the daemon's start.
#[utoipa::path(get, path = "/sandbox-templates/{name}/builds", tag = "templates", params(Paging), responses((status = 200, body = ListEnvelope<BuildBody>)))]
async fn builds(
    AppState(api): AppState<Api>,
    Path(name): Path<String>,
    Params(params): Params,
) -> ListAnswer<BuildBody> {
    let builds = api.engine.builds(Some(&name));
    if builds.is_empty() {
        // One that is there may have been built before the daemon's start.
        api.engine.template(&name)?;
    }
    list_of(builds, &params)
}

/// Builds a template again, by the recipe it was built by or another; answers at once.
#[utoipa::path(post, path = "/sandbox-templates/{name}/builds", tag = "templates", request_body = TemplateRequestBody, responses((status = 202, body = Envelope<BuildBody>)))]
async fn build_again(
    AppState(api): AppState<Api>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut body: TemplateRequestBody = parse_json(request, MAX_RECIPE).await?;
    refuse_unsupported("a build", &body.other)?;
    body.name = name;
    if body.build_spec.is_none() && body.image_path.is_none() {
        let record = api.engine.template(&body.name)?;
        let Some(recipe) = record.recipe else {
            let message = format!("template {:?} was not built by a recipe that is known", body.name);
            return Err(Error::new(Kind::InvalidInput, message).hint("give a build_spec").into());
        };
        let no_cache = body.no_cache.unwrap_or(false);
        let request = BuildRequest { name: body.name, source: ImageSource::Recipe(Box::new(recipe)), no_cache };
        let build = api.engine.start_build(request)?;
        return Ok((StatusCode::ACCEPTED, data::<BuildBody>(build)?).into_response());
    }
    let build = api.engine.start_build(build_request(body)?)?;
    Ok((StatusCode::ACCEPTED, data::<BuildBody>(build)?).into_response())
}

/// Shows a build.
#[utoipa::path(get, path = "/sandbox-template-builds/{build}", tag = "templates", responses((status = 200, body = Envelope<BuildBody>)))]
async fn build(AppState(api): AppState<Api>, Path(build): Path<String>) -> Answer<BuildBody> {
    data(api.engine.build(&build)?)
}

/// Says whether a recipe can be built, as far as that is to be seen in it.
#[utoipa::path(post, path = "/sandbox-templates/validate", tag = "templates", request_body = ValidateBody, responses((status = 200, body = Envelope<ValidityBody>)))]
async fn validate(JsonBody(body): JsonBody<ValidateBody>) -> Answer<ValidityBody> {
    let checked = parse_spec(body.build_spec).and_then(|recipe| recipe.check());
    let errors = checked.err().map(|error| error.to_string());
    data(ValidityBody { valid: errors.is_none(), errors: errors.into_iter().collect() })
}

/// The JSON schema of a recipe.
#[utoipa::path(get, path = "/sandbox-templates/build-spec", tag = "templates", responses((status = 200, body = Envelope<Figures>)))]
async fn build_spec() -> Answer<Value> {
    let text = |what: &str| json!({ "type": "string", "description": what });
    let env = json!({ "type": "object", "additionalProperties": { "type": "string" } });
    let file = json!({
        "type": "object", "required": ["path"], "additionalProperties": false,
        "properties": {
            "path": text("Absolute, in the guest"), "content": text("Text"), "content_base64": text("Bytes"),
            "mode": text("Octal digits, such as 755"),
        },
    });
    let run = json!({
        "type": "object", "required": ["command"], "additionalProperties": false,
        "properties": {
            "command": text("Lines of shell"), "user": text("Who runs it, if not root"), "workdir": text("Where"),
            "env": env, "timeout": text("How long it may take, such as 10m"),
        },
    });
    data(json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe", "type": "object", "required": ["from"], "additionalProperties": false,
        "properties": {
            "name": text("Name of the template, unless asked otherwise"), "description": text("For people"),
            "from": text("The template it starts from, or debian"),
            "disk": text("Size, such as 10gb; only from debian"),
            "packages": { "type": "array", "items": text("A Debian package") },
            "files": { "type": "array", "items": file },
            "env": env,
            "workdir": text("Where commands run; made if missing"),
            "run": { "type": "array", "items": { "oneOf": [text("A command"), run] } },
            "cpus": { "type": "integer", "minimum": 1, "maximum": 64 },
            "memory": text("Such as 2gb"),
        },
    }))
}
