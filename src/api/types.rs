//! What goes over the wire. Field names are those of the public API; a field that is not there yet is not sent.

mod batch;
mod machine;
mod preview;
mod process;
mod template;
mod terminal;
mod usage;
mod volume;

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

pub use batch::*;
pub use machine::*;
pub use preview::*;
pub use process::*;
pub use template::*;
pub use terminal::*;
pub use usage::*;
pub use volume::*;

use crate::engine::lifecycle::State;
use crate::engine::records::{Consistency, MemoryRecord, NetworkPolicy, SnapshotRecord, slug};
use crate::engine::{Deleted, FileKind, FileStat, SandboxView};

/// Every successful answer.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Envelope<T> {
    /// The answer.
    pub data: T,
}

/// Every successful list.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ListEnvelope<T> {
    /// The items.
    pub data: Vec<T>,
    /// Which of them these are.
    pub page: Page,
    /// The page's, where the SDK looks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// Which items of a list an answer holds: all of them, unless a `limit` was given.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Page {
    /// Items in this answer.
    pub count: usize,
    /// Items there are.
    pub total: usize,
    /// Whether there are more after these.
    pub has_more: bool,
    /// Names those, as the next request's `cursor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// What lists hold: oldest first.
pub trait Listed {
    /// Unique, and the same as long as the item is there.
    fn position(&self) -> (Timestamp, &str);
}

macro_rules! listed {
    ($($body:ty),*) => {$(
        impl Listed for $body {
            fn position(&self) -> (Timestamp, &str) {
                (self.created_at, &self.id)
            }
        }
    )*};
}

listed!(SandboxBody, SnapshotBody, crate::disks::DiskView);

/// The answer to a fork: with a count a list, without it what was made.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum OneOrMany<T> {
    Many(ListEnvelope<T>),
    One(Envelope<T>),
}

/// Figures by name; more may be added.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = Object)]
pub struct Figures(pub Map<String, Value>);

/// How many bytes were taken.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct SizeBody {
    pub size_bytes: u64,
}

/// Whether the daemon serves requests.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct HealthBody {
    pub status: String,
    pub version: String,
}

/// Whether commands can be run.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ReadinessBody {
    pub ready: bool,
    pub state: State,
    pub last_error: Option<String>,
}

/// Every failed answer.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ErrorEnvelope {
    /// Why.
    pub error: ErrorBody,
}

/// Why a request failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// A stable word to match on.
    pub code: String,
    /// A sentence for people.
    pub message: String,
    /// Finds the request in the daemon's log.
    #[serde(default)]
    pub request_id: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whether the same call may succeed when made again.
    #[serde(default)]
    pub retryable: bool,
    /// Facts for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
}

/// What is kept of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// Its files.
    Filesystem,
    /// Its files, and what ran.
    Memory,
}

impl Kept {
    fn of(memory: Option<&MemoryRecord>) -> Self {
        if memory.is_some() { Kept::Memory } else { Kept::Filesystem }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Kept::Filesystem => "filesystem",
            Kept::Memory => "memory",
        }
    }
}

/// A sandbox.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct SandboxBody {
    pub id: String,
    pub name: String,
    pub slug: String,
    pub state: State,
    pub ready: bool,
    pub template_id: Option<String>,
    pub image_id: Option<String>,
    pub snapshot_id: Option<String>,
    pub forked_from: Option<String>,
    pub cpu_count: u32,
    pub memory_mb: u64,
    pub disk_size_mb: u64,
    pub timeout_sec: Option<u64>,
    pub timeout_remaining_ms: Option<u64>,
    pub idle_timeout_sec: Option<u64>,
    pub always_on: bool,
    pub persistent: bool,
    pub boot_path: Option<String>,
    pub boot_ms: Option<u64>,
    pub preview_url: Option<String>,
    pub network_policy: NetworkPolicy,
    /// Among whose blocks those that it writes are looked for, besides what is shared; null: all share them.
    pub dedup_domain: Option<String>,
    #[schema(value_type = Object)]
    pub metadata: Map<String, Value>,
    pub tags: Vec<String>,
    pub last_error: Option<String>,
    /// What its next session goes on from; none while it has one.
    pub kept: Option<Kept>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ready_at: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub destroyed_at: Option<Timestamp>,
    pub total_runtime_sec: u64,
}

impl From<SandboxView> for SandboxBody {
    fn from(view: SandboxView) -> Self {
        let SandboxView { record: r, timeout_remaining, compute, preview_url } = view;
        Self {
            slug: slug(&r.name),
            ready: r.state == State::Running,
            image_id: r.template.clone(),
            template_id: r.template,
            snapshot_id: r.from_snapshot,
            forked_from: r.forked_from,
            cpu_count: r.cpus,
            memory_mb: r.memory_mib,
            disk_size_mb: r.disk_size_bytes >> 20,
            timeout_sec: r.timeout_ms.map(|ms| ms.div_ceil(1_000)),
            timeout_remaining_ms: timeout_remaining.map(|t| t.as_millis() as u64),
            idle_timeout_sec: r.idle_timeout_ms.map(|ms| ms.div_ceil(1_000)),
            always_on: r.timeout_ms.is_none() && r.idle_timeout_ms.is_none(),
            persistent: r.persistent,
            boot_path: r.boot_ms.map(|_| r.boot_path.unwrap_or(vmm::BootPath::Cold).name().to_owned()),
            boot_ms: r.boot_ms,
            preview_url,
            network_policy: r.network_policy,
            dedup_domain: r.dedup_domain,
            metadata: r.metadata,
            tags: r.tags,
            last_error: r.last_error,
            kept: matches!(r.state, State::Paused | State::Error).then(|| Kept::of(r.memory.as_ref())),
            created_at: r.created_at,
            started_at: r.started_at,
            ready_at: r.ready_at,
            destroyed_at: r.destroyed_at,
            total_runtime_sec: compute.runtime_ms / 1_000,
            id: r.id,
            name: r.name,
            state: r.state,
        }
    }
}

/// Whether something listens on a port.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct PortStateBody {
    pub port: u16,
    pub listening: bool,
}

/// A snapshot.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct SnapshotBody {
    pub id: String,
    /// The same, where the SDK looks for it.
    pub snapshot_id: String,
    pub sandbox_id: String,
    pub status: String,
    pub comment: Option<String>,
    pub consistency: Consistency,
    pub kept: Kept,
    pub template_id: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    pub updated_at: Timestamp,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<Timestamp>,
    /// What deleting it gave back, about; only in the answer to that, and when asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freed_bytes: Option<u64>,
    /// Of the disk, as the guest sees it.
    pub size_bytes: u64,
}

impl From<SnapshotRecord> for SnapshotBody {
    fn from(r: SnapshotRecord) -> Self {
        Self {
            snapshot_id: r.id.clone(),
            id: r.id,
            sandbox_id: r.sandbox_id,
            status: "ready".to_owned(),
            comment: r.comment,
            consistency: r.consistency,
            kept: Kept::of(r.memory.as_ref()),
            template_id: r.template,
            created_at: r.created_at,
            updated_at: r.created_at,
            expires_at: r.expires_at,
            freed_bytes: None,
            size_bytes: r.disk_size_bytes,
        }
    }
}

impl From<Deleted> for SnapshotBody {
    fn from(deleted: Deleted) -> Self {
        Self { freed_bytes: deleted.freed_bytes, status: "deleted".to_owned(), ..deleted.record.into() }
    }
}

/// Asks for a sandbox.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct CreateBody {
    #[serde(skip_serializing_if = "Option::is_none", alias = "image", alias = "image_id")]
    pub template_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_count: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none", alias = "disk_mb")]
    pub disk_size_mb: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<u64>,
    /// As `timeout_sec`, finer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_timeout_sec: Option<u64>,
    /// As `idle_timeout_sec`, finer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_timeout_ms: Option<u64>,
    /// No timeout of either kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub always_on: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// `allow` or `deny-all`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_policy: Option<String>,
    /// Deduplication domain: what the sandbox writes is stored once among those of the same domain and against what is shared, and
    /// nobody outside can tell. Without one, that of what it is created from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dedup_domain: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub metadata: Option<Map<String, Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    /// Volumes that it has from the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Vec<AttachVolumeBody>>,
    /// Ports that have previews from the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub publish_ports: Option<Vec<u16>>,
    /// False: of a snapshot with memory, only the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_start: Option<bool>,
    /// Whatever else the request has; see [`unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// Options that other servers of this API know and that make no difference here: who asks, for what project, where.
const HARMLESS: [&str; 9] =
    ["wait", "fail_fast", "idempotency_key", "slug", "description", "label", "region", "allow_provision", "no_env"];
const HARMLESS_PREFIXES: [&str; 3] = ["workspace_", "project_", "external_"];

/// The options of a request that ask for something this daemon does not do. An option that is null, false, zero or empty
/// asks for nothing.
pub fn unsupported(other: &Map<String, Value>) -> Vec<&str> {
    let asks = |value: &Value| match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    };
    // The only way there is to run sandboxes.
    let usual = |name: &str, value: &Value| name == "runtime_profile" && (value == "standard" || value == "auto");
    let harmless =
        |name: &str| HARMLESS.contains(&name) || HARMLESS_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    other
        .iter()
        .filter(|(name, value)| asks(value) && !harmless(name) && !usual(name, value))
        .map(|(name, _)| name.as_str())
        .collect()
}

/// Asks for forks.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct ForkBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// With it the answer is a list, without it a sandbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<String>,
    /// With what runs, or ran when its memory was kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub metadata: Option<Map<String, Value>>,
    /// Whatever else the request has; see [`unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// Asks for a snapshot.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct SnapshotRequestBody {
    #[serde(skip_serializing_if = "Option::is_none", alias = "name")]
    pub comment: Option<String>,
    /// With what runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
    /// End the session afterwards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<bool>,
    /// Delete the snapshot by itself so long after it was last used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expiration_sec: Option<u64>,
    /// Delete the oldest snapshots of the sandbox, so that so many are left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_last_snapshots: Option<u32>,
    /// Whatever else the request has; see [`unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// Asks for a session's end.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct StopBody {
    /// Keep what runs, besides the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
    /// Whatever else the request has; see [`unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// Asks for more time.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct ExtendBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// A command: a line for a shell, or a program and its arguments.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum Command {
    Line(String),
    Argv(Vec<String>),
}

impl Command {
    /// What is run.
    pub fn into_argv(self) -> Vec<String> {
        match self {
            Command::Argv(argv) => argv,
            Command::Line(line) => vec!["sh".to_owned(), "-lc".to_owned(), line],
        }
    }
}

/// A command's standard input: its content, or whether it is sent to `/exec/{exec_id}/stdin`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum StdinBody {
    Stream(bool),
    Text(String),
}

/// Asks for a command to be run.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ExecBody {
    pub command: Command,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<StdinBody>,
    /// `base64`: events carry bytes exactly and as they come, and not lines of text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<String>,
    /// Whatever else the request has; see [`unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// Asks for a command to be run as the SDK's commands are: waited for, or detached.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct CommandRequestBody {
    pub command: Command,
    /// Relative ones are below `/workspace`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Run as root, which is what happens without a user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sudo: Option<bool>,
    /// It is killed after so long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Answer once it has been started; it goes on by itself.
    #[serde(default, skip_serializing_if = "is_false")]
    pub detached: bool,
    /// What a detached command is called in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whatever else the request has; see [`unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// A command that was run, or one that runs.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum RanBody {
    Ran(ExecResult),
    Started(CommandBody),
}

/// A detached command.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct CommandBody {
    pub id: String,
    /// Its process in the guest; calls take it in place of the id.
    pub pid: i32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The beginning of it.
    pub command: String,
    /// `running` or `exited`.
    pub status: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub timed_out: bool,
    /// By the guest's clock.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Timestamp>,
    /// Bytes it has written.
    pub output_bytes: u64,
    /// How many of them, the first ones, are not kept any more.
    pub dropped_bytes: u64,
}

impl From<crate::engine::CommandStatus> for CommandBody {
    fn from(status: crate::engine::CommandStatus) -> Self {
        let time = |nanos: u64| Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or_default();
        let exit = status.ended.map(|(_, exit)| exit);
        Self {
            id: status.id,
            pid: status.pid,
            name: status.name,
            command: status.command,
            status: if exit.is_some() { "exited" } else { "running" }.to_owned(),
            exit_code: exit.map(|e| exit_code(e.code, e.signal, e.timed_out)),
            signal: exit.and_then(|e| e.signal),
            timed_out: exit.is_some_and(|e| e.timed_out),
            started_at: time(status.started_nanos),
            ended_at: status.ended.map(|(nanos, _)| time(nanos)),
            output_bytes: status.output_bytes,
            dropped_bytes: status.dropped_bytes,
        }
    }
}

/// What is kept of a detached command's output.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct CommandLogsBody {
    pub stdout: String,
    pub stderr: String,
    #[serde(flatten)]
    pub command: CommandBody,
}

/// Asks for a detached command to be signalled.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct KillBody {
    /// Such as `INT`, `SIGINT` or `2`. Without: SIGTERM and, five seconds later, SIGKILL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Whatever else the request has; see [`unsupported`].
    #[serde(flatten)]
    #[schema(ignore)]
    pub other: Map<String, Value>,
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ExecResult {
    pub stdout: String,
    pub stderr: String,
    pub exit_code: i32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub timed_out: bool,
    /// Output was larger than what an answer holds; its beginning is kept.
    #[serde(default, skip_serializing_if = "is_false")]
    pub truncated: bool,
    pub duration_ms: u64,
}

/// The first event of a stream whose command can be sent input and signals.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct StartedEvent {
    pub exec_id: String,
}

/// The last event of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct ExitEvent {
    pub exit_code: i32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub timed_out: bool,
    pub duration_ms: u64,
}

/// What a shell would say: the code, 128 and the signal, or 124 when its time was over.
pub fn exit_code(code: Option<i32>, signal: Option<i32>, timed_out: bool) -> i32 {
    match (timed_out, code, signal) {
        (true, _, _) => 124,
        (false, Some(code), _) => code,
        (false, None, signal) => 128 + signal.unwrap_or(0),
    }
}

/// Asks for a small file to be written. Large ones are sent as the request's body, with the path in the query.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct WriteFileBody {
    pub path: String,
    pub content: Option<String>,
    pub content_base64: Option<String>,
    pub mode: Option<u32>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct WrittenBody {
    pub path: String,
    pub size_bytes: u64,
}

/// A file of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct FileBody {
    pub name: String,
    pub path: String,
    /// `file`, `directory`, `symlink` or `other`.
    #[serde(rename = "type")]
    pub kind: String,
    pub size_bytes: u64,
    /// The same, where the SDK looks for it.
    pub size: u64,
    pub is_dir: bool,
    pub is_symlink: bool,
    /// Permissions, in octal.
    pub mode: String,
    pub uid: u32,
    pub gid: u32,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub modified_at: Option<Timestamp>,
}

impl FileBody {
    pub(super) fn new(name: &str, path: &str, stat: &FileStat) -> Self {
        Self {
            name: name.rsplit('/').find(|part| !part.is_empty()).unwrap_or("/").to_owned(),
            path: path.to_owned(),
            kind: match stat.kind {
                FileKind::File => "file",
                FileKind::Directory => "directory",
                FileKind::Symlink => "symlink",
                FileKind::Other => "other",
            }
            .to_owned(),
            size_bytes: stat.size,
            size: stat.size,
            is_dir: matches!(stat.kind, FileKind::Directory),
            is_symlink: matches!(stat.kind, FileKind::Symlink),
            mode: format!("{:o}", stat.mode),
            uid: stat.uid,
            gid: stat.gid,
            modified_at: Timestamp::from_nanosecond(stat.mtime_nanos.into()).ok(),
        }
    }
}

/// Names a path of a sandbox.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct PathBody {
    pub path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
    #[serde(skip_serializing_if = "is_false")]
    pub recursive: bool,
}

/// Asks for another name.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
#[allow(missing_docs)]
pub struct RenameBody {
    pub from: String,
    pub to: String,
}

/// What became of an archive.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct TreeBody {
    pub path: String,
    pub files: u64,
    pub size_bytes: u64,
    pub removed: u64,
}

/// The end of a guest's console.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub struct LogsBody {
    pub logs: String,
}

fn is_false(b: &bool) -> bool {
    !b
}
