//! What goes over the wire of processes, which are detached commands by another name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{Command, CommandBody};

/// Asks for a process to be started.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ProcessRequestBody {
    pub command: Command,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Seconds after which it is killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<f64>,
    /// What it is called in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whatever else the request has; see [`super::unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// A process that was started.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ProcessBody {
    /// The command's status, where the SDK looks for it.
    pub state: String,
    #[serde(flatten)]
    pub command: CommandBody,
}

impl From<crate::engine::CommandStatus> for ProcessBody {
    fn from(status: crate::engine::CommandStatus) -> Self {
        let command = CommandBody::from(status);
        Self { state: command.status.clone(), command }
    }
}
