//! Volumes and their snapshots, over the wire.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::Listed;
use crate::engine::Attach;
use crate::engine::records::{Consistency, VolumeAttachment, VolumeRecord, VolumeSnapshotRecord};

/// A volume.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct VolumeBody {
    pub id: String,
    pub name: String,
    /// `available`, or `in_use` while a sandbox has it.
    pub status: String,
    /// Rounded up.
    pub size_gb: u64,
    pub size_mb: u64,
    pub size_bytes: u64,
    /// The snapshot it was made from.
    pub snapshot_id: Option<String>,
    /// Among whose blocks those that are written to it are looked for, besides what is shared.
    pub dedup_domain: Option<String>,
    pub attachments: Vec<AttachmentBody>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Blocks that are not zero; this and what follows only of one that was asked for alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical_bytes: Option<u64>,
    /// Stored bytes of all it refers to, shared or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub referenced_bytes: Option<u64>,
    /// Stored bytes that nothing else refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclusive_bytes: Option<u64>,
    /// Bytes not sealed yet, which the other two do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsealed_bytes: Option<u64>,
}

impl From<VolumeRecord> for VolumeBody {
    fn from(r: VolumeRecord) -> Self {
        let attachments: Vec<_> = r.attachments.iter().map(|at| AttachmentBody::of(&r, at)).collect();
        Self {
            id: r.id,
            name: r.name,
            status: if attachments.is_empty() { "available" } else { "in_use" }.to_owned(),
            size_gb: r.size_bytes.div_ceil(1 << 30),
            size_mb: r.size_bytes.div_ceil(1 << 20),
            size_bytes: r.size_bytes,
            snapshot_id: r.from_snapshot,
            dedup_domain: r.dedup_domain,
            attachments,
            created_at: r.created_at,
            logical_bytes: None,
            referenced_bytes: None,
            exclusive_bytes: None,
            unsealed_bytes: None,
        }
    }
}

/// A volume's place in a sandbox.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct AttachmentBody {
    /// The volume's id: a sandbox has a volume once.
    pub id: String,
    pub volume_id: String,
    pub volume_name: String,
    pub sandbox_id: String,
    pub mount_path: String,
    pub read_only: bool,
    #[schema(value_type = String, format = DateTime)]
    pub attached_at: Timestamp,
}

impl AttachmentBody {
    /// Of one of a volume's attachments.
    pub fn of(volume: &VolumeRecord, at: &VolumeAttachment) -> Self {
        Self {
            id: volume.id.clone(),
            volume_id: volume.id.clone(),
            volume_name: volume.name.clone(),
            sandbox_id: at.sandbox_id.clone(),
            mount_path: at.path.clone(),
            read_only: at.read_only,
            attached_at: at.attached_at,
        }
    }
}

/// Asks for a volume.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct CreateVolumeBody {
    pub name: String,
    /// Its size; one of the three, or none with a snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_gb: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_mb: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// The snapshot of a volume that it starts as, by id or unique name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<String>,
    /// Deduplication domain of what is written to it; without one, that of the snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dedup_domain: Option<String>,
    /// Whatever else the request has; see [`super::unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// A volume for a sandbox.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct AttachVolumeBody {
    /// Id or name.
    pub volume_id: String,
    /// Where the guest mounts it; without, `/mnt/NAME`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount_path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
}

impl From<AttachVolumeBody> for Attach {
    fn from(body: AttachVolumeBody) -> Self {
        Self { volume: body.volume_id, path: body.mount_path, read_only: body.read_only.unwrap_or(false) }
    }
}

/// From which sandbox a volume is to be taken; it need not be said if only one has it.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct DetachVolumeBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
}

/// A snapshot of a volume.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct VolumeSnapshotBody {
    pub id: String,
    pub volume_id: String,
    pub name: Option<String>,
    pub status: String,
    pub consistency: Consistency,
    pub size_bytes: u64,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

impl From<VolumeSnapshotRecord> for VolumeSnapshotBody {
    fn from(r: VolumeSnapshotRecord) -> Self {
        Self {
            id: r.id,
            volume_id: r.volume_id,
            name: r.name,
            status: "ready".to_owned(),
            consistency: r.consistency,
            size_bytes: r.size_bytes,
            created_at: r.created_at,
        }
    }
}

/// Names a snapshot of a volume to be taken.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct SnapshotVolumeBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

macro_rules! listed {
    ($($body:ty: $time:ident),*) => {$(
        impl Listed for $body {
            fn position(&self) -> (Timestamp, &str) {
                (self.$time, &self.id)
            }
        }
    )*};
}

listed!(VolumeBody: created_at, VolumeSnapshotBody: created_at, AttachmentBody: attached_at);
