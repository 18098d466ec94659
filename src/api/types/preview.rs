//! Previews, over the wire.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::engine::Preview;
use crate::engine::records::Visibility;

/// A port of a sandbox that has an address of its own.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct PreviewBody {
    pub id: String,
    pub sandbox_id: String,
    /// What the caller calls it.
    pub name: Option<String>,
    pub port: u16,
    pub visibility: Visibility,
    /// Always `active`.
    pub state: String,
    /// Opens it as it is: of a private preview with a token that is good until all are revoked.
    pub url: String,
    /// Always `temporary_preview`.
    pub url_class: String,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

impl From<Preview> for PreviewBody {
    fn from(preview: Preview) -> Self {
        Self {
            url: preview.open_url(),
            id: preview.record.id,
            sandbox_id: preview.sandbox_id,
            name: preview.record.label,
            port: preview.record.port,
            visibility: preview.record.visibility,
            state: "active".to_owned(),
            url_class: "temporary_preview".to_owned(),
            created_at: preview.record.created_at,
        }
    }
}

/// Asks for a preview.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct CreatePreviewBody {
    /// On the guest's loopback; without it the sandbox's first preview is meant.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub port: Option<u16>,
    /// Who may open it; a new one is private.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub visibility: Option<Visibility>,
    #[serde(skip_serializing_if = "Option::is_none", alias = "name")]
    pub label: Option<String>,
    /// Whatever else the request has; see [`super::unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// Asks for a token.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct PreviewTokenBody {
    /// The preview's; without it the sandbox's first preview is meant, and one that is not there yet is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub port: Option<u16>,
    /// Seconds; without it, or with 0, until all are revoked.
    #[serde(skip_serializing_if = "Option::is_none", alias = "ttl_seconds")]
    pub expires_in: Option<u64>,
    /// `read`: GET, HEAD and OPTIONS; `write`: everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    /// Whatever else the request has; see [`super::unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// A token, which is told once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct TokenBody {
    pub token: String,
    /// Opens the preview with it.
    pub url: String,
    pub scope: String,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<Timestamp>,
}

/// A link to share.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ShareBody {
    pub preview: PreviewBody,
    /// Told once.
    pub preview_token: String,
    pub share_url: String,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<Timestamp>,
}
