//! What is not served: routes of the hosted product that this daemon does not have, and routes that nobody has.

use axum::extract::Request;
use axum::http::Method;

use super::answer::ApiError;
use super::request::{MAX_JSON, collect};

/// First words of paths that are not done here, and what to do without them.
const AREAS: [(&[&str], &str); 8] = [
    (
        &["deployments", "deploy", "functions", "builder-apps", "custom-domains", "domains", "regions", "cron-jobs"],
        "nothing is deployed from here",
    ),
    (&["agents", "agent", "agent-runs", "agent-chats", "runs", "run-groups", "workflows", "mcp"], "no agents run here"),
    (&["ai", "ai-gateway", "completions", "models", "embeddings"], "no models are served here"),
    (&["databases", "storage", "email", "connectors", "connections", "integrations"], "there are sandboxes only"),
    (&["computers", "desktop", "open-computers", "devices", "cloud"], "there are sandboxes only, without a desktop"),
    (
        &["tenant", "workspaces", "projects", "organizations", "account", "api-keys", "admin", "external-users"],
        "a daemon has one owner, and its keys in a file",
    ),
    (&["webhooks", "notifications", "environments", "secrets", "bulk"], "that is not there yet"),
    (&["audit", "activity", "alerts", "quotas", "network", "billing"], "that is in the daemon's log and its figures"),
];

/// The same of what comes after a sandbox's id.
const OF_SANDBOXES: [(&[&str], &str); 5] = [
    (&["deploy", "services"], "nothing is deployed from here"),
    (&["agent", "connectors", "browser", "code"], "run a program of your own: POST …/exec"),
    (&["ssh-certificates", "ssh-info", "ssh-tunnel"], "open a terminal: GET …/terminal"),
    (&["shares"], "share a preview of one port: POST …/previews/{preview_id}/share"),
    (&["audit"], "that is in the daemon's log"),
];

/// What is asked for. The body is read to its end, for nothing else: a connection on which some of it is left is closed
/// with the answer, and the caller's next request on it with that.
async fn read_out(request: Request) -> (Method, String) {
    let (head, body) = request.into_parts();
    let _ = collect(body, MAX_JSON).await;
    (head.method, head.uri.path().to_owned())
}

pub(super) async fn no_route(request: Request) -> ApiError {
    let (method, path) = read_out(request).await;
    let known = path.strip_prefix("/api/v1/").and_then(|path| {
        let mut words = path.split('/');
        match (words.next()?, words.next(), words.next()) {
            ("sandboxes", Some(id), Some(what)) if !id.is_empty() => find(what, &OF_SANDBOXES),
            (area, ..) => find(area, &AREAS),
        }
    });
    known.unwrap_or_else(|| {
        ApiError::new(404, "route_not_found", format!("there is no {method} {path}"))
            .hint("this daemon serves /api/v1/sandboxes, snapshots, sandbox-templates, volumes, disks and store")
    })
}

pub(super) async fn no_method(request: Request) -> ApiError {
    let (method, path) = read_out(request).await;
    ApiError::new(405, "method_not_allowed", format!("{path} does not take {method}"))
}

fn find(what: &str, table: &[(&[&str], &str)]) -> Option<ApiError> {
    let (_, instead) = table.iter().find(|(words, _)| words.contains(&what))?;
    Some(ApiError::new(501, "not_supported", format!("{what} is not done by this daemon")).hint(instead))
}
