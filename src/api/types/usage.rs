//! Shapes of usage over time.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Listed;
use crate::engine::lifecycle::State;
use crate::engine::{SandboxUsage, Saved, SessionUsage, Used};

/// What was used within a period, or a part of one.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct FiguresBody {
    /// Sessions that were going on.
    pub sessions: u64,
    pub runtime_sec: f64,
    pub vcpu_sec: f64,
    pub memory_mb_sec: f64,
    pub provisioned_vcpu_ms: u64,
    pub provisioned_memory_mb_ms: u64,
    /// What disk and snapshots held, each counted in full, times the hours that it was kept.
    pub logical_byte_hours: f64,
    /// The same of the stored bytes that they refer to, shared with others or not.
    pub referenced_byte_hours: f64,
    /// The same of those that nothing else refers to.
    pub exclusive_byte_hours: f64,
    /// Nothing has a price here.
    pub estimated_cost_cents: u64,
}

impl From<Used> for FiguresBody {
    fn from(used: Used) -> Self {
        let seconds = |ms: u64| ms as f64 / 1_000.0;
        let hours = |byte_ms: u128| byte_ms as f64 / 3_600_000.0;
        Self {
            sessions: used.sessions,
            runtime_sec: seconds(used.compute.runtime_ms),
            vcpu_sec: seconds(used.compute.vcpu_ms),
            memory_mb_sec: seconds(used.compute.memory_mib_ms),
            provisioned_vcpu_ms: used.compute.vcpu_ms,
            provisioned_memory_mb_ms: used.compute.memory_mib_ms,
            logical_byte_hours: hours(used.saved.logical),
            referenced_byte_hours: hours(used.saved.referenced),
            exclusive_byte_hours: hours(used.saved.exclusive),
            estimated_cost_cents: 0,
        }
    }
}

/// What a sandbox used within a period.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct SandboxUsageBody {
    pub sandbox_id: String,
    pub name: String,
    /// None of one that was destroyed long ago.
    pub state: Option<State>,
    #[serde(flatten)]
    pub used: FiguresBody,
    /// What is kept now, when that was last another amount, if it was looked at.
    pub saved: Option<Saved>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub saved_since: Option<Timestamp>,
    /// The same of equal parts of the period, when asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<FiguresBody>,
}

impl From<SandboxUsage> for SandboxUsageBody {
    fn from(usage: SandboxUsage) -> Self {
        Self {
            sandbox_id: usage.sandbox_id,
            name: usage.name,
            state: usage.state,
            used: usage.used.into(),
            saved: usage.saved.map(|(_, saved)| saved),
            saved_since: usage.saved.map(|(at, _)| at),
            parts: usage.parts.into_iter().map(Into::into).collect(),
        }
    }
}

/// What sandboxes used within a period.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct UsageReport {
    #[schema(value_type = String, format = DateTime)]
    pub period_start: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    pub period_end: Timestamp,
    /// All of it together. Of referenced bytes, what several refer to is in it several times.
    pub total: FiguresBody,
    pub results: Vec<SandboxUsageBody>,
}

/// A session.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct SessionBody {
    pub id: String,
    pub sandbox_id: String,
    pub name: String,
    /// `running` or `ended`.
    pub status: String,
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Timestamp>,
    pub runtime_sec: f64,
    pub cpu_count: u32,
    pub memory_mb: u64,
    pub provisioned_vcpu_ms: u64,
    pub provisioned_memory_mb_ms: u64,
}

impl From<SessionUsage> for SessionBody {
    fn from(session: SessionUsage) -> Self {
        let time = |ms: i64| Timestamp::from_millisecond(ms).unwrap_or_default();
        Self {
            sandbox_id: session.sandbox_id,
            name: session.name,
            status: if session.goes_on { "running" } else { "ended" }.to_owned(),
            started_at: time(session.run.from_ms),
            ended_at: session.run.until_ms.map(time),
            runtime_sec: session.compute.runtime_ms as f64 / 1_000.0,
            cpu_count: session.run.cpus,
            memory_mb: session.run.memory_mib,
            provisioned_vcpu_ms: session.compute.vcpu_ms,
            provisioned_memory_mb_ms: session.compute.memory_mib_ms,
            id: session.run.id,
        }
    }
}

impl Listed for SessionBody {
    fn position(&self) -> (Timestamp, &str) {
        (self.started_at, &self.id)
    }
}
