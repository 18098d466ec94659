//! Files under the other paths that clients know: a file's path as a part of the URL, directories with what is below them,
//! several files at once.

use std::collections::{HashMap, VecDeque};

use axum::extract::{Request, State as AppState};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, data};
use super::files::{MAX_JSON_FILE, streamed};
use super::request::{JsonBody, Params, Path, parse_json};
use crate::api::types::{Envelope, FileBody, PathBody, WrittenBody};
use crate::engine::error::{Error, Kind};

/// Most entries of one listing.
const MAX_ENTRIES: usize = 100_000;
/// Most levels of one listing.
const MAX_DEPTH: usize = 64;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list, write))
        .routes(routes!(tree))
        .routes(routes!(stat))
        .routes(routes!(write_many))
        .routes(routes!(write_many_files))
        .routes(routes!(read))
}

/// What is in a directory.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct ListingBody {
    path: String,
    /// Those of a directory come after it, level by level.
    entries: Vec<FileBody>,
}

/// Lists a directory, and those below it as deep as asked for.
#[utoipa::path(get, path = "/sandboxes/{id}/files", tag = "files", params(("path" = Option<String>, Query, description = "By default /workspace"), ("depth" = Option<u32>, Query, description = "Levels, by default 1")), responses((status = 200, body = Envelope<ListingBody>)))]
async fn list(AppState(api): AppState<Api>, Path(id): Path<String>, Params(params): Params) -> Answer<ListingBody> {
    let path = params.get("path").filter(|p| !p.is_empty()).map_or("/workspace", String::as_str);
    let entries = walk(&api, &id, path, depth(&params, 1)?).await?;
    data(ListingBody { path: path.to_owned(), entries })
}

fn depth(params: &HashMap<String, String>, or: usize) -> Result<usize, ApiError> {
    let Some(text) = params.get("depth") else { return Ok(or) };
    let levels = text.parse().ok().filter(|levels| (1..=MAX_DEPTH).contains(levels));
    levels.ok_or_else(|| Error::new(Kind::InvalidInput, format!("depth is 1 to {MAX_DEPTH}, and not {text:?}")).into())
}

/// Entries level by level. A directory that goes away meanwhile has none; links are not followed.
async fn walk(api: &Api, id: &str, path: &str, depth: usize) -> Result<Vec<FileBody>, ApiError> {
    let mut entries: Vec<FileBody> = Vec::new();
    let mut dirs = VecDeque::from([(path.to_owned(), 1)]);
    while let Some((dir, level)) = dirs.pop_front() {
        let found = match api.engine.list_files(id, &dir).await {
            Err(error) if level > 1 && error.kind() == Kind::FileNotFound => continue,
            found => found?,
        };
        if entries.len() + found.len() > MAX_ENTRIES {
            return Err(Error::new(Kind::InvalidInput, format!("there are more than {MAX_ENTRIES} entries"))
                .hint("list a directory further down, or with a smaller depth")
                .into());
        }
        for entry in found {
            let body =
                FileBody::new(&entry.name, &format!("{}/{}", dir.trim_end_matches('/'), entry.name), &entry.stat);
            if body.is_dir && level < depth {
                dirs.push_back((body.path.clone(), level + 1));
            }
            entries.push(body);
        }
    }
    Ok(entries)
}

/// A file or directory with what is in it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct NodeBody {
    #[serde(flatten)]
    file: FileBody,
    /// Of a directory, as deep as asked for.
    #[schema(no_recursion)]
    children: Vec<NodeBody>,
}

/// Shows a directory with those in it, as deep as asked for.
#[utoipa::path(get, path = "/sandboxes/{id}/files/tree", tag = "files", params(("path" = Option<String>, Query, description = "By default /workspace"), ("depth" = Option<u32>, Query, description = "Levels, by default 3")), responses((status = 200, body = Envelope<NodeBody>)))]
async fn tree(AppState(api): AppState<Api>, Path(id): Path<String>, Params(params): Params) -> Answer<NodeBody> {
    let path = params.get("path").filter(|p| !p.is_empty()).map_or("/workspace", String::as_str);
    let root = FileBody::new(path, path, &api.engine.stat_file(&id, path).await?);
    let mut below = if root.is_dir { walk(&api, &id, path, depth(&params, 3)?).await? } else { Vec::new() };
    // Children come after their parents, so from the end on each is whole when it is put into its parent.
    let mut nodes: Vec<NodeBody> =
        std::iter::once(root).chain(below.drain(..)).map(|file| NodeBody { file, children: Vec::new() }).collect();
    let places: HashMap<String, usize> =
        nodes.iter().enumerate().map(|(at, n)| (n.file.path.trim_end_matches('/').to_owned(), at)).collect();
    while nodes.len() > 1 {
        let Some(node) = nodes.pop() else { break };
        let parent = node.file.path.rsplit_once('/').map_or("", |(parent, _)| parent);
        if let Some(parent) = places.get(parent).and_then(|at| nodes.get_mut(*at)) {
            parent.children.insert(0, node);
        }
    }
    let root = nodes.pop().ok_or_else(|| Error::new(Kind::Internal, "a tree has no root"))?;
    data(root)
}

/// Looks at a file; symbolic links are followed.
#[utoipa::path(post, path = "/sandboxes/{id}/files/stat", tag = "files", request_body = PathBody, responses((status = 200, body = Envelope<FileBody>)))]
async fn stat(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<PathBody>,
) -> Answer<FileBody> {
    data(FileBody::new(&body.path, &body.path, &api.engine.stat_file(&id, &body.path).await?))
}

/// A file's content in base64.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
struct EncodedFile {
    path: String,
    #[serde(alias = "content_base64")]
    content: String,
}

impl EncodedFile {
    async fn write(&self, api: &Api, id: &str) -> Result<WrittenBody, Error> {
        let content = BASE64.decode(&self.content).map_err(|e| {
            Error::new(Kind::InvalidInput, format!("the content of {:?} is not base64: {e}", self.path))
        })?;
        let mut writer = api.engine.write_file(id, &self.path, None).await?;
        writer.write(&content).await?;
        writer.finish().await?;
        Ok(WrittenBody { path: self.path.clone(), size_bytes: content.len() as u64 })
    }
}

/// Writes a file whose content is in base64; see `fs/write` for other ways.
#[utoipa::path(post, path = "/sandboxes/{id}/files", tag = "files", request_body = EncodedFile, responses((status = 200, body = Envelope<WrittenBody>)))]
async fn write(AppState(api): AppState<Api>, Path(id): Path<String>, request: Request) -> Answer<WrittenBody> {
    let body: EncodedFile = parse_json(request, MAX_JSON_FILE).await?;
    data(body.write(&api, &id).await?)
}

/// Several files.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
struct FilesBody {
    files: Vec<EncodedFile>,
}

/// What became of each.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct WrittenManyBody {
    written: Vec<WrittenBody>,
    failed: Vec<FailedFile>,
}

/// Why one was not written.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct FailedFile {
    path: String,
    code: String,
    message: String,
}

/// Writes files, each on its own: one that cannot be written does not keep the others.
#[utoipa::path(post, path = "/sandboxes/{id}/fs/write-many", tag = "files", request_body = FilesBody, responses((status = 200, body = Envelope<WrittenManyBody>)))]
async fn write_many(AppState(api): AppState<Api>, Path(id): Path<String>, request: Request) -> Answer<WrittenManyBody> {
    let body: FilesBody = parse_json(request, MAX_JSON_FILE).await?;
    // One that nobody has is no failure of each file.
    api.engine.show(&id)?;
    let mut done = WrittenManyBody::default();
    for file in body.files {
        match file.write(&api, &id).await {
            Ok(written) => done.written.push(written),
            Err(error) => done.failed.push(FailedFile {
                code: error.kind().code().to_owned(),
                message: error.to_string(),
                path: file.path,
            }),
        }
    }
    data(done)
}

/// The same under the other path that clients know.
#[utoipa::path(post, path = "/sandboxes/{id}/files/write-many", tag = "files", request_body = FilesBody, responses((status = 200, body = Envelope<WrittenManyBody>)))]
async fn write_many_files(api: AppState<Api>, id: Path<String>, request: Request) -> Answer<WrittenManyBody> {
    write_many(api, id, request).await
}

/// Reads the file of this path.
#[utoipa::path(get, path = "/sandboxes/{id}/files/{*path}", tag = "files", responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream")))]
async fn read(AppState(api): AppState<Api>, Path((id, path)): Path<(String, String)>) -> Result<Response, ApiError> {
    let reader = api.engine.read_range(&id, &format!("/{path}"), 0, None).await?;
    Ok(streamed(reader, "application/octet-stream"))
}
