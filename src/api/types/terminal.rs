//! What goes over the wire of terminals.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::Command;

/// Asks for a program on a terminal; without one it is the user's login shell.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct TerminalRequestBody {
    /// Lines; 24.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub rows: Option<u16>,
    /// Characters a line; 80.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub cols: Option<u16>,
    /// A shell other than the user's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shell: Option<String>,
    /// In place of a shell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<Command>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whatever else the request has; see [`super::unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// A terminal that waits for its client.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct TerminalBody {
    pub id: String,
    /// The same, where the SDK's users look for it.
    pub session_id: String,
    pub sandbox_id: String,
    pub rows: u16,
    pub cols: u16,
    /// Where its WebSocket is, below `/api/v1`.
    pub stream_path: String,
}
