//! A sandbox's server: install, start, wait for its port, give it a preview; and what the sandbox has to show.

use std::time::Duration;

use axum::extract::State as AppState;
use serde_json::{Map, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, data};
use super::exec::run_to_end;
use super::request::{JsonBody, Path, refuse_unsupported};
use crate::api::types::{ArtifactsBody, Command, Envelope, ExecBody, StartTemplateBody, StartedTemplateBody};
use crate::engine::error::{Error, Kind};
use crate::engine::{CreatePreview, ExecSpec, FileKind};

/// Where the SDK's examples put what is to be shown.
const ARTIFACTS: &str = "/workspace/artifacts";
/// How long a server's port may take to answer, unless told; and at most.
const START_TIME: Duration = Duration::from_secs(60);
const START_TIME_MAX: Duration = Duration::from_secs(600);

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(start)).routes(routes!(artifacts))
}

/// Runs the installation, starts the server as a detached command, and answers when its port does.
#[utoipa::path(post, path = "/sandboxes/{id}/template/start", tag = "templates", request_body = StartTemplateBody, responses((status = 200, body = Envelope<StartedTemplateBody>)))]
async fn start(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<StartTemplateBody>,
) -> Answer<StartedTemplateBody> {
    refuse_unsupported("a start", &body.other)?;
    let record = api.engine.show(&id)?.record;
    let line = |line: &str| vec!["sh".to_owned(), "-lc".to_owned(), line.to_owned()];
    let argv = match &body.start_command {
        Some(command) => line(command),
        None => [record.image.entrypoint.clone(), record.image.cmd.clone()].concat(),
    };
    if argv.is_empty() {
        return Err(Error::new(Kind::InvalidInput, "what is to be started was not said, and its image runs nothing")
            .hint("give it a start_command")
            .into());
    }
    // First: it says which port, or that none was named.
    let preview = api.engine.create_preview(&id, CreatePreview { port: body.port, ..CreatePreview::default() }).await?;
    let port = preview.record.port;
    let install = match body.install_command.as_ref().filter(|_| body.install != Some(false)) {
        None => None,
        Some(command) => {
            let exec = ExecBody {
                command: Command::Line(command.clone()),
                cwd: body.workdir.clone(),
                env: None,
                user: None,
                timeout: body.install_timeout_sec.map(|seconds| seconds as f64),
                stdin: None,
                encoding: None,
                other: Map::new(),
            };
            let done = run_to_end(&api, &id, &exec).await?;
            if done.exit_code != 0 {
                let end: String = done.stderr.chars().rev().take(500).collect::<Vec<_>>().into_iter().rev().collect();
                let message = format!("the installation ended with {}: {}", done.exit_code, end.trim());
                return Err(Error::new(Kind::CommandFailed, message).hint("see it run: miosa sandbox exec").into());
            }
            Some(done)
        }
    };
    let spec = ExecSpec { argv, cwd: body.workdir, ..ExecSpec::default() };
    let command = api.engine.start_command(&id, Some("template".to_owned()), spec).await?;
    let patience = body.start_timeout_sec.map_or(START_TIME, Duration::from_secs).min(START_TIME_MAX);
    if !api.engine.listens(&id, port, patience).await? {
        let message = format!("nothing listens on port {port} after {} s", patience.as_secs());
        return Err(Error::new(Kind::PortClosed, message)
            .hint(format!("see what it says: miosa sandbox command logs {id} {}", command.id))
            .into());
    }
    data(StartedTemplateBody {
        sandbox_id: record.id,
        status: "ready".to_owned(),
        port,
        preview_url: preview.open_url(),
        command_id: command.id,
        pid: command.pid,
        install,
    })
}

/// Lists the files of `/workspace/artifacts`, and the first preview.
#[utoipa::path(get, path = "/sandboxes/{id}/artifacts", tag = "files", responses((status = 200, body = Envelope<ArtifactsBody>)))]
async fn artifacts(AppState(api): AppState<Api>, Path(id): Path<String>) -> Answer<ArtifactsBody> {
    let entries = match api.engine.list_files(&id, ARTIFACTS).await {
        Err(error) if error.kind() == Kind::FileNotFound => Vec::new(),
        entries => entries?,
    };
    let files = entries.into_iter().filter(|entry| entry.stat.kind == FileKind::File);
    let artifacts: Map<_, _> =
        files.map(|file| (format!("{ARTIFACTS}/{}", file.name), json!({ "size_bytes": file.stat.size }))).collect();
    let preview = match api.engine.previews(&id) {
        Err(error) if error.kind() == Kind::PreviewsOff => None,
        previews => previews.map_err(ApiError::from)?.into_iter().next().map(Into::into),
    };
    data(ArtifactsBody { artifacts, preview })
}
