//! Templates and their builds, over the wire.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{ErrorBody, Listed};
use crate::api::stream::error_body;
use crate::engine::records::TemplateRecord;
use crate::engine::{BuildStatus, BuildView, TemplateUsage};

/// A template.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct TemplateBody {
    pub id: String,
    pub name: String,
    pub slug: String,
    /// `ready`; of one that is not there, how its last build goes: `building` or `failed`.
    pub status: String,
    pub origin: String,
    pub description: Option<String>,
    /// The template it was built on.
    pub from: Option<String>,
    pub disk_size_mb: u64,
    /// What is not zero on its disk.
    pub data_bytes: u64,
    /// What it refers to in the store, and of that what nothing else does; told when asked for.
    pub referenced_bytes: Option<u64>,
    pub exclusive_bytes: Option<u64>,
    /// Sandboxes that came from it and are there.
    pub sandbox_count: usize,
    pub cpu_count: Option<u32>,
    pub memory_mb: Option<u64>,
    pub env: BTreeMap<String, String>,
    pub workdir: Option<String>,
    /// What a container image says of its program; kept, and not used here.
    pub user: Option<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    #[schema(value_type = Option<Object>)]
    pub build_spec: Option<Value>,
    pub error: Option<ErrorBody>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

impl Listed for TemplateBody {
    fn position(&self) -> (Timestamp, &str) {
        (self.created_at, &self.id)
    }
}

impl TemplateBody {
    /// A template that is there.
    pub fn new(record: TemplateRecord, usage: Option<TemplateUsage>, sandbox_count: usize) -> Self {
        let r = record;
        let build_spec = r.recipe.as_ref().and_then(|recipe| serde_json::to_value(recipe).ok());
        let (description, from) = r.recipe.map_or((None, None), |recipe| (recipe.description, Some(recipe.from)));
        Self {
            id: r.name.clone(),
            slug: r.name.clone(),
            name: r.name,
            status: "ready".to_owned(),
            origin: r.origin,
            description,
            from,
            disk_size_mb: r.disk_size_bytes >> 20,
            data_bytes: r.data_bytes,
            referenced_bytes: usage.map(|u| u.referenced_bytes),
            exclusive_bytes: usage.map(|u| u.exclusive_bytes),
            sandbox_count,
            cpu_count: r.cpus,
            memory_mb: r.memory_mib,
            env: r.image.env,
            workdir: r.image.workdir,
            user: r.image.user,
            entrypoint: r.image.entrypoint,
            cmd: r.image.cmd,
            build_spec,
            error: None,
            created_at: r.created_at,
        }
    }

    /// A template that is being built, or could not be.
    pub fn of_build(build: BuildView) -> Self {
        Self {
            id: build.template.clone(),
            slug: build.template.clone(),
            name: build.template,
            status: if build.status == BuildStatus::Running { "building" } else { "failed" }.to_owned(),
            error: build.error.as_ref().map(error_body),
            created_at: build.started_at,
            ..Self::default()
        }
    }
}

/// A build of a template.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct BuildBody {
    pub id: String,
    pub template_id: String,
    /// `building`, `ready` or `failed`.
    pub status: String,
    /// The last lines of what it said.
    pub log: Vec<String>,
    pub error: Option<ErrorBody>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub finished_at: Option<Timestamp>,
}

impl Listed for BuildBody {
    fn position(&self) -> (Timestamp, &str) {
        (self.created_at, &self.id)
    }
}

impl From<BuildView> for BuildBody {
    fn from(build: BuildView) -> Self {
        let status = match build.status {
            BuildStatus::Running => "building",
            BuildStatus::Succeeded => "ready",
            BuildStatus::Failed => "failed",
        };
        Self {
            id: build.id,
            template_id: build.template,
            status: status.to_owned(),
            log: build.log.into(),
            error: build.error.as_ref().map(error_body),
            created_at: build.started_at,
            finished_at: build.finished_at,
        }
    }
}

/// Asks for a template: one of a recipe, of an image, or by name alone of a built-in recipe.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct TemplateRequestBody {
    pub name: String,
    /// A recipe; its schema is at `/sandbox-templates/build-spec`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub build_spec: Option<Value>,
    /// An image or archive on the daemon's machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_path: Option<String>,
    /// What that is, if not to be seen in it: `raw`, `qcow2`, `tar`, `container`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u64>,
    /// Do all steps anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_cache: Option<bool>,
    /// Whatever else the request has; see [`super::unsupported`].
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub other: Map<String, Value>,
}

/// A recipe to be looked at.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct ValidateBody {
    #[schema(value_type = Object)]
    pub build_spec: Value,
}

/// Whether a recipe can be built, as far as that is to be seen in it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ValidityBody {
    pub valid: bool,
    pub errors: Vec<String>,
}
