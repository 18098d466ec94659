//! Batches of sandboxes, the one-shot run, and operations, over the wire.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Command, CreateBody, ErrorBody, ExecResult, Listed, SandboxBody, StdinBody};
use crate::engine::lifecycle::State;
use crate::engine::{BatchItemView, BatchStatus, BatchView, BuildStatus, BuildView, ItemStatus};

/// Asks for sandboxes of one kind.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct BatchRequestBody {
    /// How many, 1 to 1000.
    pub count: u32,
    /// How many are started at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// What each is to be; with a name, they are `NAME-1`, `NAME-2` and so on.
    #[serde(flatten)]
    pub each: CreateBody,
}

/// A batch.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct BatchBody {
    pub id: String,
    /// `running`, `completed`, `completed_with_errors`, `failed` or `cancelled`.
    pub status: String,
    pub requested_count: usize,
    pub completed_count: usize,
    pub failed_count: usize,
    pub queued_count: usize,
    pub starting_count: usize,
    pub cancelled_count: usize,
    pub concurrency: u32,
    /// How many sandboxes are in which state now.
    pub runtime_counts: BTreeMap<String, usize>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub settled_at: Option<Timestamp>,
}

/// Its name at the API.
fn status_name(status: BatchStatus) -> &'static str {
    match status {
        BatchStatus::Running => "running",
        BatchStatus::Completed => "completed",
        BatchStatus::CompletedWithErrors => "completed_with_errors",
        BatchStatus::Failed => "failed",
        BatchStatus::Cancelled => "cancelled",
    }
}

impl From<&BatchView> for BatchBody {
    fn from(view: &BatchView) -> Self {
        let BatchView { record, status, counts, items } = view;
        Self {
            id: record.id.clone(),
            status: status_name(*status).to_owned(),
            requested_count: items.len(),
            completed_count: counts.completed,
            failed_count: counts.failed,
            queued_count: counts.queued,
            starting_count: counts.starting,
            cancelled_count: counts.cancelled,
            concurrency: record.concurrency,
            runtime_counts: counts.states.iter().map(|(state, n)| ((*state).to_owned(), *n)).collect(),
            created_at: record.created_at,
            settled_at: record.settled_at,
        }
    }
}

/// A sandbox of a batch.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct BatchItemBody {
    /// The sandbox's id.
    pub id: String,
    pub sandbox_id: String,
    /// Its place in the batch, from 0.
    pub index: usize,
    pub name: Option<String>,
    /// `queued`, `starting`, `completed`, `failed` or `cancelled`.
    pub status: String,
    /// The sandbox's own.
    pub state: Option<State>,
    pub error: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

impl BatchItemBody {
    /// Of a batch.
    pub fn all_of(view: BatchView) -> Vec<Self> {
        let made_at = view.record.created_at;
        view.items.into_iter().map(|item| Self::of(item, made_at)).collect()
    }

    fn of(item: BatchItemView, made_at: Timestamp) -> Self {
        let status = match item.status {
            ItemStatus::Queued => "queued",
            ItemStatus::Starting => "starting",
            ItemStatus::Completed => "completed",
            ItemStatus::Failed => "failed",
            ItemStatus::Cancelled => "cancelled",
        };
        Self {
            id: item.sandbox_id.clone(),
            sandbox_id: item.sandbox_id,
            index: item.index,
            status: status.to_owned(),
            state: item.sandbox.as_ref().map(|r| r.state),
            created_at: item.sandbox.as_ref().map_or(made_at, |r| r.created_at),
            name: item.sandbox.map(|r| r.name),
            error: item.error,
        }
    }
}

impl Listed for BatchItemBody {
    fn position(&self) -> (Timestamp, &str) {
        (self.created_at, &self.id)
    }
}

/// Asks for a sandbox and for a command to be run in it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct RunRequestBody {
    pub command: Command,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Of the command, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<f64>,
    /// The command's standard input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// False: the sandbox is destroyed once the command has ended. By default one that is not persistent is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<bool>,
    /// The sandbox.
    #[serde(flatten)]
    pub sandbox: CreateBody,
}

impl RunRequestBody {
    /// The command, as one of a sandbox that is there.
    pub fn exec(&self) -> super::ExecBody {
        super::ExecBody {
            command: self.command.clone(),
            cwd: self.cwd.clone(),
            env: None,
            user: self.user.clone(),
            timeout: self.timeout,
            stdin: self.stdin.clone().map(StdinBody::Text),
            encoding: None,
            other: serde_json::Map::new(),
        }
    }
}

/// A sandbox, and what a command in it did.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct RunBody {
    #[serde(flatten)]
    pub sandbox: SandboxBody,
    pub result: ExecResult,
}

/// Work that outlives the request that began it: a batch, or a template's build.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct OperationBody {
    /// That of the batch or the build.
    pub id: String,
    /// `sandbox_batch` or `template_build`.
    #[serde(rename = "type")]
    pub kind: String,
    pub resource_type: String,
    pub resource_id: String,
    /// `running`, `succeeded`, `failed` or `cancelled`.
    pub status: String,
    pub current_step: Option<String>,
    pub error: Option<ErrorBody>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub finished_at: Option<Timestamp>,
}

impl From<&BatchView> for OperationBody {
    fn from(view: &BatchView) -> Self {
        let (counts, all) = (&view.counts, view.items.len());
        let status = match view.status {
            BatchStatus::Running => "running",
            BatchStatus::Completed | BatchStatus::CompletedWithErrors => "succeeded",
            BatchStatus::Failed => "failed",
            BatchStatus::Cancelled => "cancelled",
        };
        let failed = view.items.iter().find_map(|item| item.error.clone());
        let error = failed.map(|message| ErrorBody {
            code: "boot_failed".to_owned(),
            message: format!("{} of {all} did not start, one because: {message}", counts.failed),
            ..ErrorBody::default()
        });
        Self {
            id: view.record.id.clone(),
            kind: "sandbox_batch".to_owned(),
            resource_type: "sandbox_batch".to_owned(),
            resource_id: view.record.id.clone(),
            status: status.to_owned(),
            current_step: Some(format!("{} of {all} started", counts.completed)),
            error,
            created_at: view.record.created_at,
            finished_at: view.record.settled_at,
        }
    }
}

impl From<&BuildView> for OperationBody {
    fn from(build: &BuildView) -> Self {
        let status = match build.status {
            BuildStatus::Running => "running",
            BuildStatus::Succeeded => "succeeded",
            BuildStatus::Failed => "failed",
        };
        Self {
            id: build.id.clone(),
            kind: "template_build".to_owned(),
            resource_type: "template".to_owned(),
            resource_id: build.template.clone(),
            status: status.to_owned(),
            current_step: build.log.back().cloned(),
            error: build.error.as_ref().map(crate::api::error_body),
            created_at: build.started_at,
            finished_at: build.finished_at,
        }
    }
}
