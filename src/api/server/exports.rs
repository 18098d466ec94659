//! Files that a sandbox has made, to be taken away: one as it is, several or a directory as one compressed archive.

use std::io::{self, Read, Write};
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Query, State as AppState};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::{Buf, Bytes};
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::runtime::Handle;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{ApiError, data};
use super::files::streamed;
use super::request::{JsonBody, Path, refuse_unsupported};
use crate::api::client::escape;
use crate::api::contents::stream_of;
use crate::api::types::{Envelope, FileBody};
use crate::engine::error::{Error, Kind, Result};
use crate::engine::{Engine, FileKind, GuestReader};

/// Most paths of one export.
const MAX_PATHS: usize = 1_000;
/// Bytes that are sent at a time.
const PIECE: usize = 256 << 10;
const ARCHIVE: &str = "application/gzip";
const FILE: &str = "application/octet-stream";

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(create)).routes(routes!(download))
}

/// What is to be exported.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
struct ExportRequestBody {
    /// One file or directory.
    path: Option<String>,
    /// Or several.
    paths: Vec<String>,
    /// The caller's own.
    label: Option<String>,
    /// What it is to be called where it is saved.
    filename: Option<String>,
    /// Whatever else the request has.
    #[serde(flatten)]
    #[schema(ignore)]
    other: Map<String, Value>,
}

/// What an export has, and where it is.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct ExportBody {
    sandbox_id: String,
    paths: Vec<String>,
    files: Vec<FileBody>,
    label: Option<String>,
    filename: String,
    content_type: String,
    /// Of a single file. An archive is made as it is sent, and its size is known then.
    size_bytes: Option<u64>,
    download_url: String,
}

/// Sees that files can be exported, and says from where. They are read when they are downloaded, as they are then.
#[utoipa::path(post, path = "/sandboxes/{id}/exports", tag = "files", request_body = ExportRequestBody, responses((status = 201, body = Envelope<ExportBody>)))]
async fn create(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ExportRequestBody>,
) -> std::result::Result<(StatusCode, Json<Envelope<ExportBody>>), ApiError> {
    refuse_unsupported("an export", &body.other)?;
    let sandbox = api.engine.show(&id)?.record.id;
    let paths: Vec<String> = body.path.into_iter().chain(body.paths).collect();
    let export = Export::find(&api.engine, &sandbox, paths, body.filename).await?;
    let query: Vec<_> = export.files.iter().map(|f| format!("paths[]={}", escape(&f.path))).collect();
    let download_url = format!(
        "/api/v1/sandboxes/{sandbox}/exports/download?{}&filename={}",
        query.join("&"),
        escape(&export.filename)
    );
    let single = export.single();
    let body = ExportBody {
        sandbox_id: sandbox,
        paths: export.files.iter().map(|f| f.path.clone()).collect(),
        size_bytes: single.map(|f| f.size),
        content_type: if single.is_some() { FILE } else { ARCHIVE }.to_owned(),
        filename: export.filename,
        files: export.files,
        label: body.label,
        download_url,
    };
    Ok((StatusCode::CREATED, data(body)?))
}

/// A file as it is; a directory, or several files, as a compressed tar archive, with their paths from the root.
#[utoipa::path(get, path = "/sandboxes/{id}/exports/download", tag = "files", params(("path" = Option<String>, Query, description = "One file or directory"), ("paths[]" = Option<Vec<String>>, Query, description = "Or several"), ("filename" = Option<String>, Query, description = "What it is to be called where it is saved")), responses((status = 200, content((Vec<u8> = "application/octet-stream"), (Vec<u8> = "application/gzip")))))]
async fn download(
    AppState(api): AppState<Api>,
    Path(id): Path<String>,
    query: std::result::Result<Query<Vec<(String, String)>>, axum::extract::rejection::QueryRejection>,
) -> std::result::Result<Response, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::new(400, "invalid_query", e.body_text()))?;
    let (mut paths, mut filename) = (Vec::new(), None);
    for (name, value) in query {
        match name.as_str() {
            "path" | "paths" | "paths[]" => paths.push(value),
            "filename" => filename = Some(value).filter(|name| !name.is_empty()),
            _ => {}
        }
    }
    let export = Export::find(&api.engine, &id, paths, filename).await?;
    let mut response = match export.single() {
        Some(file) => streamed(api.engine.read_range(&id, &file.path, 0, None).await?, FILE),
        None => {
            let mut response = Response::new(archive(api.engine.clone(), id, export.files));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(ARCHIVE));
            response
        }
    };
    let plain: String =
        export.filename.chars().map(|c| if c.is_ascii_graphic() && c != '"' { c } else { '_' }).collect();
    let disposition = format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{}", escape(&export.filename));
    response.headers_mut().extend(HeaderValue::from_str(&disposition).ok().map(|v| (header::CONTENT_DISPOSITION, v)));
    Ok(response)
}

/// Files that are there.
struct Export {
    files: Vec<FileBody>,
    filename: String,
}

impl Export {
    async fn find(engine: &Engine, id: &str, paths: Vec<String>, filename: Option<String>) -> Result<Export> {
        if paths.is_empty() || paths.len() > MAX_PATHS {
            return Err(Error::new(Kind::InvalidInput, format!("an export has 1 to {MAX_PATHS} paths"))
                .hint("name one: path=/workspace/out"));
        }
        let mut files = Vec::new();
        for path in paths {
            let stat = engine.stat_file(id, &path).await?;
            if !matches!(stat.kind, FileKind::File | FileKind::Directory) {
                return Err(Error::new(Kind::GuestFile, format!("{path} is neither a file nor a directory")));
            }
            files.push(FileBody::new(&path, &path, &stat));
        }
        let last = |path: &str| path.rsplit('/').find(|name| !name.is_empty()).unwrap_or("root").to_owned();
        let filename = filename.map(|name| last(&name)).unwrap_or_else(|| match files.as_slice() {
            [file] if !file.is_dir => last(&file.path),
            [dir] => format!("{}.tar.gz", last(&dir.path)),
            _ => "export.tar.gz".to_owned(),
        });
        Ok(Export { files, filename })
    }

    /// The one file that is sent as it is.
    fn single(&self) -> Option<&FileBody> {
        match self.files.as_slice() {
            [file] if !file.is_dir => Some(file),
            _ => None,
        }
    }
}

/// An archive that is made as it is read. What fails on the way breaks it off.
fn archive(engine: Arc<Engine>, id: String, files: Vec<FileBody>) -> Body {
    let runtime = Handle::current();
    stream_of("an export", move |to| {
        let mut archive = tar::Builder::new(GzEncoder::new(to, flate2::Compression::fast()));
        files.iter().try_for_each(|file| add(&mut archive, &runtime, &engine, &id, file))?;
        archive.into_inner()?.finish().map(drop)
    })
}

fn add(
    archive: &mut tar::Builder<impl Write>,
    runtime: &Handle,
    engine: &Engine,
    id: &str,
    file: &FileBody,
) -> io::Result<()> {
    let name = file.path.split('/').filter(|name| !matches!(*name, "" | "." | "..")).collect::<Vec<_>>().join("/");
    let open = |reader: Result<GuestReader>| {
        Ok::<_, io::Error>(Blocking { reader: reader.map_err(io::Error::other)?, runtime, have: Bytes::new() })
    };
    if file.is_dir {
        let tree = open(runtime.block_on(engine.read_tree(id, &file.path)))?;
        let mut tree = tar::Archive::new(io::BufReader::with_capacity(PIECE, tree));
        for entry in tree.entries()? {
            let mut entry = entry?;
            let inside = entry.path()?.components().as_path().to_path_buf();
            let at = std::path::Path::new(&name).join(inside);
            // The root of the file system has no name.
            if at.components().next().is_none() {
                continue;
            }
            let mut header = entry.header().clone();
            match entry.link_name()?.map(|target| target.into_owned()) {
                Some(target) => archive.append_link(&mut header, at, target)?,
                None => archive.append_data(&mut header, at, &mut entry)?,
            }
        }
        return Ok(());
    }
    let mut header = tar::Header::new_gnu();
    header.set_size(file.size);
    header.set_mode(u32::from_str_radix(&file.mode, 8).unwrap_or(0o644));
    header.set_mtime(file.modified_at.and_then(|at| u64::try_from(at.as_second()).ok()).unwrap_or(0));
    let content = open(runtime.block_on(engine.read_range(id, &file.path, 0, Some(file.size))))?;
    // One that has become shorter meanwhile is as long as it was, so that the rest of the archive can be read.
    let content = content.chain(io::repeat(0)).take(file.size);
    archive.append_data(&mut header, name, io::BufReader::with_capacity(PIECE, content))
}

/// What a guest sends, for a thread that may wait for it.
struct Blocking<'a> {
    reader: GuestReader,
    runtime: &'a Handle,
    have: Bytes,
}

impl Read for Blocking<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.have.is_empty() {
            match self.runtime.block_on(self.reader.next_piece()).map_err(io::Error::other)? {
                Some(piece) => self.have = piece,
                None => return Ok(0),
            }
        }
        let len = buf.len().min(self.have.len());
        self.have.copy_to_slice(&mut buf[..len]);
        Ok(len)
    }
}
