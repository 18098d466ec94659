//! Previews: a port of a guest under a host name of its own, `http://<port>-<sandbox>.localhost:<listener>/`.
//!
//! A request's host name says whose port it is for; a token, in the address, a header or a cookie, that it may go there.
//! It then goes to the guest on a connection of its own, which starts a session if there is none and waits until the port
//! answers. The guest never sees the token. Host names differ by sandbox and port, so that browsers keep previews apart.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::header::{self, HeaderName};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, Version};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;

use crate::api::server::Place;
use crate::api::{error_body, types::ErrorBody, types::ErrorEnvelope};
use crate::engine::error::Error;
use crate::engine::records::Visibility;
use crate::engine::{Engine, PREVIEW_TOKEN, PREVIEW_TOKEN_PREFIX, Preview, Scope};

/// How long a request waits for its port to answer, the start of a session not included.
const PATIENCE: Duration = Duration::from_secs(30);
/// Carries a token for callers that keep no cookies.
const TOKEN_HEADER: &str = "x-miosa-preview-token";
/// Carries a token for browsers.
const COOKIE: &str = "miosa_preview";

/// Serves previews, and nothing else.
pub(super) fn routes(engine: Arc<Engine>) -> Router {
    Router::new().fallback(answer).with_state(engine)
}

async fn answer(State(engine): State<Arc<Engine>>, place: Option<Extension<Place>>, request: Request) -> Response {
    let for_people = wants_page(request.headers());
    match pass(&engine, place, request).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_response(for_people),
    }
}

/// Why a request does not get to its port.
struct Refusal {
    status: u16,
    body: Box<ErrorBody>,
}

impl Refusal {
    fn new(status: u16, code: &str, message: impl Into<String>, hint: &str) -> Self {
        let hint = Some(hint.to_owned());
        Self {
            status,
            body: Box::new(ErrorBody { code: code.into(), message: message.into(), hint, ..ErrorBody::default() }),
        }
    }

    fn into_response(self, for_people: bool) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::info!(status = self.status, code = %self.body.code, message = %self.body.message, "a preview failed");
        }
        let headers = [(header::CACHE_CONTROL, "no-store")];
        if for_people {
            let content = [(header::CONTENT_TYPE, "text/html; charset=utf-8")];
            return (status, headers, content, page(self.status, &self.body)).into_response();
        }
        (status, headers, Json(ErrorEnvelope { error: *self.body })).into_response()
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self { status: error.kind().status(), body: Box::new(error_body(&error)) }
    }
}

fn wants_page(headers: &HeaderMap) -> bool {
    headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).is_some_and(|accept| accept.contains("text/html"))
}

fn page(status: u16, body: &ErrorBody) -> String {
    let (message, hint) = (escape(&body.message), escape(body.hint.as_deref().unwrap_or_default()));
    format!(
        "<!doctype html><meta charset=utf-8><meta name=viewport content=\"width=device-width\"><title>{status} preview</title>\
         <style>body{{font:16px/1.5 system-ui,sans-serif;margin:20vh auto;max-width:36em;padding:0 1em;color:#222;background:#fafafa}}\
         code{{color:#777}}@media(prefers-color-scheme:dark){{body{{color:#ddd;background:#181818}}}}</style>\
         <h1>{status}</h1><p>{message}</p><p>{hint}</p><p><code>{}</code></p>",
        escape(&body.code)
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

async fn pass(
    engine: &Arc<Engine>,
    place: Option<Extension<Place>>,
    mut request: Request,
) -> Result<Response, Refusal> {
    let host = host_of(&request).ok_or_else(|| no_preview("this address"))?;
    let preview = engine.preview_at(&host).map_err(|_| no_preview(&host))?;
    let granted = authorise(&preview, &mut request)?;
    if let Some(way) = granted.as_ref().and_then(|granted| granted.redirect(&request)) {
        return Ok(way);
    }
    let port = preview.record.port;
    let connection = engine.connect_port(&preview.sandbox_id, port, PATIENCE).await?;
    let (mut sender, driver) =
        hyper::client::conn::http1::handshake(TokioIo::new(connection)).await.map_err(|e| no_http(port, &e))?;
    // Ends with the answer's body, however that ends.
    let driver = Driver(tokio::spawn(async move {
        if let Err(error) = driver.with_upgrades().await {
            tracing::debug!(%error, "a connection to a preview's port broke off");
        }
    }));
    let upgrade = request.headers().get(header::UPGRADE).cloned();
    let caller = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    prepare(&mut request, &host, upgrade);
    let mut response = sender.send_request(request).await.map_err(|e| no_http(port, &e))?;
    // Between us and the caller; a guest may speak the older one.
    *response.version_mut() = Version::HTTP_11;
    let keep = (response.status() == StatusCode::SWITCHING_PROTOCOLS).then(|| upgrade_headers(response.headers()));
    if let (Some(kept), Some(caller)) = (keep, caller) {
        let guest = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            // Counts among the daemon's connections for as long as it lasts.
            let (_place, _driver) = (place, driver);
            let (Ok(caller), Ok(guest)) = (caller.await, guest.await) else { return };
            let (mut caller, mut guest) = (TokioIo::new(caller), TokioIo::new(guest));
            if let Err(error) = tokio::io::copy_bidirectional(&mut caller, &mut guest).await {
                tracing::debug!(%error, "an upgraded connection of a preview broke off");
            }
        });
        clean_answer(response.headers_mut());
        response.headers_mut().extend(kept);
        return Ok(response.map(|_| Body::empty()));
    }
    clean_answer(response.headers_mut());
    if let Some(cookie) = granted.and_then(|granted| granted.cookie()) {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
    Ok(response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _ = &driver;
            frame
        }))
    }))
}

/// The task that moves a connection's bytes; it ends with this.
struct Driver(tokio::task::JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn no_preview(what: &str) -> Refusal {
    Refusal::new(
        404,
        "preview_not_found",
        format!("{what} is no preview"),
        "make one: miosa sandbox preview SANDBOX --port PORT",
    )
}

fn no_http(port: u16, error: &hyper::Error) -> Refusal {
    let message = format!("what listens on port {port} does not answer as an HTTP server does: {error}");
    Refusal::new(502, "preview_no_http", message, "look at it: miosa sandbox port-forward, miosa sandbox exec")
}

/// The first word of the host name, if the name is one of ours: `<word>.localhost`, with any port.
fn host_of(request: &Request) -> Option<String> {
    let named = request.headers().get(header::HOST).and_then(|v| v.to_str().ok());
    let host = request.uri().authority().map(|a| a.as_str()).or(named)?.to_ascii_lowercase();
    let host = host.split_once(':').map_or(host.as_str(), |(host, _)| host).trim_end_matches('.');
    let (word, rest) = host.split_once('.')?;
    (rest == "localhost").then(|| word.to_owned())
}

/// A token that came with the address: a browser is to remember it, and not to show it.
struct Granted {
    token: String,
    until: Option<Timestamp>,
}

impl Granted {
    fn cookie(&self) -> Option<HeaderValue> {
        let lasts = self.until.map(|until| until.as_second() - Timestamp::now().as_second());
        let lasts = lasts.map(|seconds| format!("; Max-Age={}", seconds.max(0))).unwrap_or_default();
        HeaderValue::from_str(&format!("{COOKIE}={}; Path=/; HttpOnly; SameSite=Lax{lasts}", self.token)).ok()
    }

    /// Where a person's browser is sent, whose request has no token in its address any more.
    fn redirect(&self, request: &Request) -> Option<Response> {
        let navigates = request.headers().get("sec-fetch-mode").is_some_and(|mode| mode == "navigate");
        if !navigates || request.method() != Method::GET {
            return None;
        }
        let to = HeaderValue::from_str(request.uri().path_and_query()?.as_str()).ok()?;
        let mut response = StatusCode::SEE_OTHER.into_response();
        response.headers_mut().insert(header::LOCATION, to);
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response.headers_mut().append(header::SET_COOKIE, self.cookie()?);
        Some(response)
    }
}

/// Takes all tokens out of a request, and refuses it if none of them opens the preview.
fn authorise(preview: &Preview, request: &mut Request) -> Result<Option<Granted>, Refusal> {
    let in_address = take_query_token(request.uri_mut());
    let headers = request.headers_mut();
    let in_header = headers.remove(TOKEN_HEADER).and_then(|v| v.to_str().ok().map(str::to_owned));
    let in_cookies = take_cookie(headers);
    if preview.record.visibility == Visibility::Public {
        return Ok(None);
    }
    let told = [&in_address, &in_header].into_iter().flatten().chain(&in_cookies);
    let opened = told.filter_map(|token| preview.allows(token).map(|(scope, until)| (token, scope, until)));
    // Of several the one that allows most: a browser may have an older cookie.
    let Some((token, scope, until)) = opened.min_by_key(|(_, scope, _)| *scope == Scope::Read) else {
        let tried = in_address.is_some() || in_header.is_some() || !in_cookies.is_empty();
        let message = if tried { "the token for this preview is no longer good" } else { "this preview is private" };
        return Err(Refusal::new(
            401,
            "preview_token_needed",
            message,
            "open the address that this prints: miosa sandbox preview SANDBOX --port PORT",
        ));
    };
    let looks = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS)
        && !request.headers().contains_key(header::UPGRADE);
    if scope == Scope::Read && !looks {
        return Err(Refusal::new(
            403,
            "preview_read_only",
            "this link only lets you look",
            "ask for one with the scope 'write'",
        ));
    }
    Ok((in_address.as_ref() == Some(token)).then(|| Granted { token: token.clone(), until }))
}

/// Takes the token out of an address; the rest of the query stays as it was written, the guest's own `mt` too.
fn take_query_token(uri: &mut Uri) -> Option<String> {
    let query = uri.query()?;
    let is_token = |pair: &&str| {
        pair.split_once('=')
            .is_some_and(|(name, value)| name == PREVIEW_TOKEN && value.starts_with(PREVIEW_TOKEN_PREFIX))
    };
    let token = query.split('&').find(is_token)?.split_once('=')?.1.to_owned();
    let rest: Vec<&str> = query.split('&').filter(|pair| !is_token(pair)).collect();
    let path = uri.path();
    let whole = if rest.is_empty() { path.to_owned() } else { format!("{path}?{}", rest.join("&")) };
    let mut parts = std::mem::take(uri).into_parts();
    parts.path_and_query = PathAndQuery::try_from(whole).ok();
    *uri = Uri::from_parts(parts).unwrap_or_default();
    Some(token)
}

/// Takes our cookies out of a request's; the guest's own stay.
fn take_cookie(headers: &mut HeaderMap) -> Vec<String> {
    let (mut ours, mut others) = (Vec::new(), Vec::new());
    for value in headers.get_all(header::COOKIE) {
        let Ok(text) = value.to_str() else { continue };
        for pair in text.split(';').map(str::trim).filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some((COOKIE, token)) => ours.push(token.to_owned()),
                _ => others.push(pair.to_owned()),
            }
        }
    }
    if !ours.is_empty() {
        headers.remove(header::COOKIE);
        if let (false, Ok(rest)) = (others.is_empty(), HeaderValue::from_str(&others.join("; "))) {
            headers.insert(header::COOKIE, rest);
        }
    }
    ours
}

/// Headers that are between two neighbours (RFC 9110, 7.6.1).
const OF_THE_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn remove_hop_headers(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().map(HeaderName::as_str).chain(OF_THE_HOP) {
        headers.remove(name);
    }
}

/// Makes a caller's request one to the guest. The host name stays the caller's, as dev servers want to see it.
fn prepare(request: &mut Request, host: &str, upgrade: Option<HeaderValue>) {
    *request.version_mut() = Version::HTTP_11;
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from(path);
    let headers = request.headers_mut();
    remove_hop_headers(headers);
    headers.remove(header::EXPECT);
    for name in ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"] {
        headers.remove(name);
    }
    let named = headers.get(header::HOST).cloned();
    let named = named.or_else(|| HeaderValue::from_str(&format!("{host}.localhost")).ok());
    if let Some(named) = named {
        headers.insert("x-forwarded-host", named.clone());
        headers.insert(header::HOST, named);
    }
    headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
    if let Some(upgrade) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, upgrade);
    }
}

fn upgrade_headers(headers: &HeaderMap) -> HeaderMap {
    let mut kept = HeaderMap::new();
    kept.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(upgrade) = headers.get(header::UPGRADE) {
        kept.insert(header::UPGRADE, upgrade.clone());
    }
    kept
}

/// A guest's answer is for its own host name: no cookie for others, and none of ours.
fn clean_answer(headers: &mut HeaderMap) {
    remove_hop_headers(headers);
    let cookies: Vec<HeaderValue> = headers.get_all(header::SET_COOKIE).iter().filter_map(own_cookie).collect();
    headers.remove(header::SET_COOKIE);
    for cookie in cookies {
        headers.append(header::SET_COOKIE, cookie);
    }
}

fn own_cookie(value: &HeaderValue) -> Option<HeaderValue> {
    let Ok(text) = value.to_str() else { return Some(value.clone()) };
    let mut parts = text.split(';');
    let pair = parts.next()?;
    if pair.split('=').next().is_some_and(|name| name.trim() == COOKIE) {
        return None;
    }
    let wide = |part: &&str| part.trim().get(..6).is_some_and(|start| start.eq_ignore_ascii_case("domain"));
    let kept: Vec<&str> = std::iter::once(pair).chain(parts.filter(|part| !wide(part))).collect();
    HeaderValue::from_str(&kept.join(";")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(uri: &str) -> Request {
        Request::builder().uri(uri).body(Body::empty()).unwrap()
    }

    #[test]
    fn only_names_under_localhost_are_previews() {
        let host = |name: &str| {
            let mut request = to("/");
            request.headers_mut().insert(header::HOST, name.parse().unwrap());
            host_of(&request)
        };
        assert_eq!(host("3000-web.localhost:7080").as_deref(), Some("3000-web"));
        assert_eq!(host("3000-WEB.LocalHost.").as_deref(), Some("3000-web"));
        for other in ["localhost", "3000-web.localhost.evil.example", "3000-web.example", "127.0.0.1:7080", ""] {
            assert_eq!(host(other), None, "{other}");
        }
        assert_eq!(host_of(&to("http://80-a.localhost/x")).as_deref(), Some("80-a"));
    }

    #[test]
    fn a_token_is_taken_out_of_the_address_and_the_rest_stays_as_it_was() {
        for (before, token, after) in [
            ("/a%20b?mt=mp_T", Some("mp_T"), "/a%20b"),
            ("/?x=1&mt=mp_T&y=%2f&mt=7", Some("mp_T"), "/?x=1&y=%2f&mt=7"),
            ("/?mt=7", None, "/?mt=7"),
            ("/?x=mt=mp_T", None, "/?x=mt=mp_T"),
            ("/?mt", None, "/?mt"),
            ("/", None, "/"),
        ] {
            let mut uri: Uri = before.parse().unwrap();
            assert_eq!(take_query_token(&mut uri).as_deref(), token, "{before}");
            assert_eq!(uri.to_string(), after);
        }
    }

    #[test]
    fn our_cookie_does_not_reach_the_guest_and_its_cookies_are_its_own() {
        let mut headers = HeaderMap::new();
        headers.append(header::COOKIE, "a=1; miosa_preview=T; b=2".parse().unwrap());
        assert_eq!(take_cookie(&mut headers), ["T"]);
        assert_eq!(headers[header::COOKIE], "a=1; b=2");
        assert!(take_cookie(&mut headers).is_empty());

        let mut headers = HeaderMap::new();
        for cookie in
            ["a=1; Domain=localhost; Path=/", "miosa_preview=X", "b=2; domain = .localhost;HttpOnly", "domain=3"]
        {
            headers.append(header::SET_COOKIE, cookie.parse().unwrap());
        }
        clean_answer(&mut headers);
        let kept: Vec<_> = headers.get_all(header::SET_COOKIE).iter().collect();
        assert_eq!(kept, ["a=1; Path=/", "b=2;HttpOnly", "domain=3"]);
    }

    #[test]
    fn headers_between_neighbours_go_no_further() {
        let mut request = to("http://3000-web.localhost:1/p?q");
        for (name, value) in [
            ("connection", "close, x-secret"),
            ("x-secret", "1"),
            ("te", "trailers"),
            ("expect", "100-continue"),
            ("x-forwarded-for", "1.2.3.4"),
            ("accept", "*/*"),
        ] {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        prepare(&mut request, "3000-web", None);
        assert_eq!(request.uri(), "/p?q");
        let mut names: Vec<_> = request.headers().keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "host", "x-forwarded-host", "x-forwarded-proto"]);
    }
}
