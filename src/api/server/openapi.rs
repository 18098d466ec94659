//! The document that describes the routes, made from them.
//!
//! A route says what is its own; what all have in common is added here: the parameters in its path, and its failures.

use std::sync::Arc;

use axum::routing::get;
use axum::{Json, Router};
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{Content, Info, OpenApi, Ref, RefOr, Required, Response, ResponseBuilder};
use utoipa::{PartialSchema, ToSchema};

use super::idempotency;
use crate::api::types::{ErrorBody, ErrorEnvelope};

/// Adds the route of the document.
pub(super) fn serve(router: Router, document: OpenApi) -> Router {
    let document = Arc::new(complete(document));
    router.route("/api/v1/openapi.json", get(move || async move { Json((*document).clone()) }))
}

fn complete(mut document: OpenApi) -> OpenApi {
    document.info = Info::new("miosa", env!("CARGO_PKG_VERSION"));
    document.info.description = Some("Persistent sandboxes on your own machine.".to_owned());
    let components = document.components.get_or_insert_default();
    components.schemas.insert(ErrorBody::name().into_owned(), ErrorBody::schema());
    components.schemas.insert(ErrorEnvelope::name().into_owned(), ErrorEnvelope::schema());
    // The router's way of writing a parameter with slashes in it.
    let paths = std::mem::take(&mut document.paths.paths);
    document.paths.paths = paths.into_iter().map(|(path, item)| (path.replace("{*", "{"), item)).collect();
    for (path, item) in &mut document.paths.paths {
        if let Some(post) = &mut item.post {
            add_idempotency_key(path, post);
        }
        let methods = [&mut item.get, &mut item.put, &mut item.post, &mut item.delete, &mut item.patch];
        for operation in methods.into_iter().flatten() {
            add_path_parameters(path, operation);
            add_failures(operation);
        }
    }
    document
}

fn add_path_parameters(path: &str, operation: &mut Operation) {
    let names = path.split('/').filter_map(|piece| piece.strip_prefix('{')?.strip_suffix('}'));
    let parameters = operation.parameters.get_or_insert_default();
    for name in names {
        if !parameters.iter().any(|p| matches!(p, RefOr::T(p) if p.name == name)) {
            let text = ObjectBuilder::new().schema_type(Type::String);
            let parameter = ParameterBuilder::new()
                .name(name)
                .parameter_in(ParameterIn::Path)
                .required(Required::True)
                .schema(Some(text));
            parameters.push(parameter.build().into());
        }
    }
}

fn add_idempotency_key(path: &str, operation: &mut Operation) {
    if !idempotency::takes_key(path) {
        return;
    }
    let text = ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).max_length(Some(255));
    let parameter = ParameterBuilder::new()
        .name("Idempotency-Key")
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some("The same request with the same key within 24 hours is answered as the first was"))
        .schema(Some(text));
    operation.parameters.get_or_insert_default().push(parameter.build().into());
}

fn add_failures(operation: &mut Operation) {
    for (status, description) in [("4XX", "What is wrong with the request"), ("5XX", "What went wrong here")] {
        operation.responses.responses.insert(status.to_owned(), RefOr::T(failure(description)));
    }
}

fn failure(description: &str) -> Response {
    let body = Content::new(Some(Ref::from_schema_name(ErrorEnvelope::name())));
    ResponseBuilder::new().description(description).content("application/json", body).build()
}
