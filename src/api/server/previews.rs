//! Previews of a sandbox's ports, and tokens that open them. What opens them is `serve::proxy`.

use std::time::Duration;

use axum::Json;
use axum::extract::State as AppState;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_all};
use super::request::{JsonBody, Path, refuse_unsupported, timeout};
use crate::api::types::{
    CreatePreviewBody, Envelope, ListEnvelope, PreviewBody, PreviewTokenBody, ShareBody, TokenBody,
};
use crate::engine::error::{Error, Kind};
use crate::engine::{CreatePreview, Preview, Scope, token_end};

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(expose))
        .routes(routes!(token))
        .routes(routes!(list, create))
        .routes(routes!(show, delete))
        .routes(routes!(share, revoke))
}

async fn make(api: &Api, id: &str, body: CreatePreviewBody) -> Result<Preview, ApiError> {
    refuse_unsupported("a preview", &body.other)?;
    let wanted = CreatePreview { port: body.port, visibility: body.visibility, label: body.label };
    Ok(api.engine.create_preview(id, wanted).await?)
}

/// Makes a preview of a port, or answers with the one that is there.
#[utoipa::path(post, path = "/sandboxes/{id}/expose", tag = "previews", request_body = CreatePreviewBody, responses((status = 200, body = Envelope<PreviewBody>)))]
async fn expose(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<CreatePreviewBody>,
) -> Answer<PreviewBody> {
    data(make(&api, &id, body).await?)
}

/// Lists a sandbox's previews, oldest first.
#[utoipa::path(get, path = "/sandboxes/{id}/previews", tag = "previews", responses((status = 200, body = ListEnvelope<PreviewBody>)))]
async fn list(AppState(api): AppState<Api>, Path(id): Path<String>) -> ListAnswer<PreviewBody> {
    Ok(list_all(api.engine.previews(&id)?))
}

/// Makes a preview of a port, or answers with the one that is there.
#[utoipa::path(post, path = "/sandboxes/{id}/previews", tag = "previews", request_body = CreatePreviewBody, responses((status = 201, body = Envelope<PreviewBody>)))]
async fn create(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<CreatePreviewBody>,
) -> Result<(StatusCode, Json<Envelope<PreviewBody>>), ApiError> {
    Ok((StatusCode::CREATED, data(make(&api, &id, body).await?)?))
}

/// Shows a preview, by id or port.
#[utoipa::path(get, path = "/sandboxes/{id}/previews/{preview_id}", tag = "previews", responses((status = 200, body = Envelope<PreviewBody>)))]
async fn show(AppState(api): AppState<Api>, Path((id, preview)): Path<(String, String)>) -> Answer<PreviewBody> {
    data(api.engine.preview(&id, &preview)?)
}

/// Takes a preview's address away.
#[utoipa::path(delete, path = "/sandboxes/{id}/previews/{preview_id}", tag = "previews", responses((status = 200, body = Envelope<PreviewBody>)))]
async fn delete(AppState(api): AppState<Api>, Path((id, preview)): Path<(String, String)>) -> Answer<PreviewBody> {
    data(api.engine.delete_preview(&id, &preview).await?)
}

/// Makes a token that opens a preview.
#[utoipa::path(post, path = "/sandboxes/{id}/preview-token", tag = "previews", request_body = PreviewTokenBody, responses((status = 200, body = Envelope<TokenBody>)))]
async fn token(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<PreviewTokenBody>,
) -> Answer<TokenBody> {
    let (scope, until) = claims(&body)?;
    let wanted = CreatePreviewBody { port: body.port, ..CreatePreviewBody::default() };
    let preview = make(&api, &id, wanted).await?;
    let token = preview.token(scope, until);
    data(TokenBody { url: preview.url_with(&token), token, scope: scope.name().to_owned(), expires_at: until })
}

/// Makes a link that opens a preview for a while.
#[utoipa::path(post, path = "/sandboxes/{id}/previews/{preview_id}/share", tag = "previews", request_body = PreviewTokenBody, responses((status = 200, body = Envelope<ShareBody>)))]
async fn share(
    AppState(api): AppState<Api>,
    Path((id, preview)): Path<(String, String)>,
    JsonBody(body): JsonBody<PreviewTokenBody>,
) -> Answer<ShareBody> {
    let (scope, until) = claims(&body)?;
    let preview = api.engine.preview(&id, &preview)?;
    let token = preview.token(scope, until);
    let share_url = preview.url_with(&token);
    data(ShareBody { preview: preview.into(), preview_token: token, share_url, expires_at: until })
}

/// Takes all tokens of a preview away, whoever has them; its address stays.
#[utoipa::path(delete, path = "/sandboxes/{id}/previews/{preview_id}/share", tag = "previews", responses((status = 200, body = Envelope<PreviewBody>)))]
async fn revoke(AppState(api): AppState<Api>, Path((id, preview)): Path<(String, String)>) -> Answer<PreviewBody> {
    data(api.engine.revoke_preview_tokens(&id, &preview).await?)
}

fn claims(body: &PreviewTokenBody) -> Result<(Scope, Option<jiff::Timestamp>), ApiError> {
    refuse_unsupported("a token", &body.other)?;
    let scope = match body.scope.as_deref() {
        None => Scope::default(),
        Some(name) => Scope::parse(name)
            .ok_or_else(|| Error::new(Kind::InvalidInput, format!("there is no scope {name:?}")).hint("read, write"))?,
    };
    let lasts: Option<Duration> = timeout(body.expires_in, None)?;
    Ok((scope, token_end(lasts)?))
}
