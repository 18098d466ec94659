//! What runs sandboxes, and how they are doing, over the wire.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{ExecResult, PreviewBody};
use crate::engine::Vitals;
use crate::engine::lifecycle::State;

/// A way to run sandboxes.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct RuntimeBody {
    pub id: String,
    /// What a create names it by.
    pub runtime_profile: String,
    pub label: String,
    pub description: String,
    pub default: bool,
    pub available: bool,
    pub unavailable_reason: Option<String>,
    pub capabilities: CapabilitiesBody,
}

/// What sandboxes can have.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct CapabilitiesBody {
    pub browser: bool,
    pub network_egress: bool,
    pub persistence: bool,
    pub pause: bool,
    pub gpu: bool,
    pub max_shape: ShapeBody,
}

/// The largest machine.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ShapeBody {
    pub cpu_count: u32,
    pub memory_mb: u64,
    pub disk_size_mb: u64,
}

/// A sandbox's load, as its guest tells it; null of what it does not, and at rest.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct MetricsBody {
    pub sandbox_id: String,
    pub state: State,
    /// Always `now`: no history is kept.
    pub window: String,
    #[schema(value_type = String, format = DateTime)]
    pub sampled_at: Timestamp,
    pub uptime_sec: Option<u64>,
    pub cpu: CpuMetricsBody,
    pub memory: MemoryMetricsBody,
    pub disk: DiskMetricsBody,
    pub network: NetworkMetricsBody,
}

/// Processors.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct CpuMetricsBody {
    pub count: u32,
    /// Of all processors, since the guest booted.
    pub busy_ms: Option<u64>,
    /// Runnable tasks, a mean over a minute.
    pub load_1m: Option<f64>,
}

/// Memory.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct MemoryMetricsBody {
    pub total_bytes: Option<u64>,
    pub used_bytes: Option<u64>,
}

/// The sandbox's own disk.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct DiskMetricsBody {
    pub size_bytes: u64,
    pub read_bytes: Option<u64>,
    pub written_bytes: Option<u64>,
}

/// All interfaces but the loopback.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct NetworkMetricsBody {
    pub received_bytes: Option<u64>,
    pub sent_bytes: Option<u64>,
}

impl MetricsBody {
    /// Of a sandbox that says this now.
    pub fn of(view: crate::engine::SandboxView, vitals: Vitals) -> Self {
        let record = view.record;
        Self {
            sandbox_id: record.id,
            state: record.state,
            window: "now".to_owned(),
            sampled_at: Timestamp::now(),
            uptime_sec: vitals.uptime.map(|time| time.as_secs()),
            cpu: CpuMetricsBody {
                count: record.cpus,
                busy_ms: vitals.cpu_busy.map(|time| time.as_millis() as u64),
                load_1m: vitals.load,
            },
            memory: MemoryMetricsBody { total_bytes: vitals.memory_bytes, used_bytes: vitals.memory_used_bytes },
            disk: DiskMetricsBody {
                size_bytes: record.disk_size_bytes,
                read_bytes: vitals.disk_read_bytes,
                written_bytes: vitals.disk_written_bytes,
            },
            network: NetworkMetricsBody { received_bytes: vitals.received_bytes, sent_bytes: vitals.sent_bytes },
        }
    }
}

/// Asks for a sandbox's server to be started.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct StartTemplateBody {
    /// Whether `install_command` is run; it is, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub install: Option<bool>,
    /// A line for a shell, run to its end first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub install_command: Option<String>,
    /// A line for a shell, which goes on; without it what the image runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_command: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub install_timeout_sec: Option<u64>,
    /// How long the port may take to answer; a minute unless told, ten at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_timeout_sec: Option<u64>,
    /// What the server listens on; without it the port of the sandbox's first preview.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// Whatever else the request has; see [`super::unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// A server that answers.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct StartedTemplateBody {
    pub sandbox_id: String,
    /// Always `ready`.
    pub status: String,
    pub port: u16,
    /// Opens its preview.
    pub preview_url: String,
    /// The detached command that it is.
    pub command_id: String,
    pub pid: i32,
    /// What the installation came to, if there was one.
    pub install: Option<ExecResult>,
}

/// What a sandbox has to show.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ArtifactsBody {
    /// Files of `/workspace/artifacts`, by their paths.
    #[schema(value_type = Object)]
    pub artifacts: Map<String, Value>,
    /// Its first preview.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preview: Option<PreviewBody>,
}
