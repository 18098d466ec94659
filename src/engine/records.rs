//! What the daemon remembers: one record a sandbox, snapshot and template, as JSON in the store.
//!
//! A record is written in the same transaction as the disk operation it describes, so after a crash there is never one
//! without the other. Unknown fields are ignored and new ones have defaults, so records outlive versions.

use std::collections::BTreeMap;

use jiff::Timestamp;
use rand::RngExt;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use storage::{DiskId, SnapshotId, Transaction};
use vmm::image::ImageConfig;

use super::error::{Error, Result};
use super::lifecycle::State;
use super::recipe::Recipe;

/// What a sandbox's network reaches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkPolicy {
    /// What the daemon's network allows.
    #[default]
    Allow,
    /// Nothing: its machines have no network device.
    DenyAll,
}

impl NetworkPolicy {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::DenyAll => "deny-all",
        }
    }

    /// The policy of this name.
    pub fn parse(name: &str) -> Option<Self> {
        match name.replace('_', "-").as_str() {
            "allow" | "allow-all" => Some(Self::Allow),
            "deny-all" => Some(Self::DenyAll),
            _ => None,
        }
    }
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// `sb-…`, unique for ever.
    pub id: String,
    /// What the user calls it; unique among sandboxes that are not destroyed.
    pub name: String,
    /// Where it is in its life.
    pub state: State,
    /// Its writable root. Gone once destroyed.
    pub disk: DiskId,
    /// Size of that disk.
    pub disk_size_bytes: u64,
    /// The template it came from, through any snapshots and forks in between.
    pub template: Option<String>,
    /// Among whose blocks those that it writes are looked for, besides what is shared; none: all share them.
    #[serde(default)]
    pub dedup_domain: Option<String>,
    /// The snapshot it was created from.
    #[serde(default)]
    pub from_snapshot: Option<String>,
    /// The sandbox it was forked from.
    #[serde(default)]
    pub forked_from: Option<String>,
    /// Virtual processors of its machines.
    pub cpus: u32,
    /// Memory of its machines.
    pub memory_mib: u64,
    /// How long a session may last; none: until it is stopped.
    pub timeout_ms: Option<u64>,
    /// How long a session may go unused; none: for ever.
    #[serde(default)]
    pub idle_timeout_ms: Option<u64>,
    /// Whether the file system is kept when a session ends.
    pub persistent: bool,
    /// Environment of every exec.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// What its machines' network reaches.
    #[serde(default)]
    pub network_policy: NetworkPolicy,
    /// How the image it came from wants programs to be run.
    #[serde(default)]
    pub image: ImageConfig,
    /// The caller's own notes.
    #[serde(default)]
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// The caller's own labels.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Its ports that have an address, oldest first; one each.
    #[serde(default)]
    pub previews: Vec<PreviewRecord>,
    /// The last session did not end in an orderly shutdown: the file system is as after a power cut.
    #[serde(default)]
    pub unclean: bool,
    /// What its next session goes on from, besides its disk.
    #[serde(default)]
    pub memory: Option<MemoryRecord>,
    /// The template's state that its disk is, for as long as no machine has had it.
    #[serde(default)]
    pub pristine: Option<SnapshotId>,
    /// Why it is where it is, if that was not asked for.
    #[serde(default)]
    pub last_error: Option<String>,
    /// 32 hex digits; a guest's `/etc/machine-id`.
    pub machine_id: String,
    /// When the record was made.
    pub created_at: Timestamp,
    /// When the present or last session was started.
    #[serde(default)]
    pub started_at: Option<Timestamp>,
    /// When its agent answered.
    #[serde(default)]
    pub ready_at: Option<Timestamp>,
    /// From the start of the machine to the agent's answer.
    #[serde(default)]
    pub boot_ms: Option<u64>,
    /// Which way it came up.
    #[serde(default)]
    pub boot_path: Option<vmm::BootPath>,
    /// What ran the guest's instructions in the present or last session.
    #[serde(default)]
    pub accel: Option<vmm::Accel>,
    /// When it was destroyed.
    #[serde(default)]
    pub destroyed_at: Option<Timestamp>,
    /// Sum of all ended sessions.
    #[serde(default)]
    pub total_runtime_ms: u64,
    /// The same, each session times its processors.
    #[serde(default)]
    pub vcpu_ms: u64,
    /// The same, each session times its memory in MiB.
    #[serde(default)]
    pub memory_mib_ms: u64,
}

/// What is kept of a machine: its guest's memory and its devices, of the same moment as the disk of who has this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRecord {
    /// Where it is.
    pub disk: DiskId,
    /// `mem-…`, the same for all that have the same.
    pub content: String,
    /// What a machine must be to go on from it.
    pub key: String,
    /// Virtual processors of the machine.
    pub cpus: u32,
    /// Memory of the machine.
    pub memory_mib: u64,
    /// The same, in bytes.
    pub memory_bytes: u64,
    /// How much of it is not zero.
    pub data_bytes: u64,
    /// Length of what the VMM says of the devices.
    pub devices_bytes: u64,
    /// How many runs of memory are not zero.
    pub runs: u64,
    /// It is a template's: nobody's work is in it.
    #[serde(default)]
    pub of_template: bool,
    /// Of which moment it is.
    pub kept_at: Timestamp,
}

/// A port of a sandbox that has an address of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviewRecord {
    /// `pv-…`, unique for ever.
    pub id: String,
    /// On the guest's loopback.
    pub port: u16,
    /// Who may open it.
    pub visibility: Visibility,
    /// What the caller calls it.
    #[serde(default)]
    pub label: Option<String>,
    /// 64 hex digits from which tokens are made and verified.
    pub secret: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Who may open a preview.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Visibility {
    /// Who has a token.
    #[default]
    Private,
    /// Whoever reaches the daemon's address for previews.
    Public,
}

/// A private preview of a port.
pub(crate) fn new_preview(port: u16) -> PreviewRecord {
    let random: [u8; 32] = rand::rng().random();
    PreviewRecord {
        id: new_id("pv"),
        port,
        visibility: Visibility::Private,
        label: None,
        secret: random.iter().map(|byte| format!("{byte:02x}")).collect(),
        created_at: Timestamp::now(),
    }
}

/// How much of a running machine's work a snapshot is certain to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// Everything written before the call: the file system was frozen, or was not mounted.
    Filesystem,
    /// Everything flushed before the call, as after a power cut: the guest did not answer in time.
    Crash,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// `snap-…`, unique for ever.
    pub id: String,
    /// The sandbox it was taken of, which may be gone.
    pub sandbox_id: String,
    /// What the user calls it; need not be unique.
    pub comment: Option<String>,
    /// The state in the store.
    pub snapshot: SnapshotId,
    /// Size of the disk it was taken of.
    pub disk_size_bytes: u64,
    /// What it is certain to hold.
    pub consistency: Consistency,
    /// The template the sandbox came from.
    pub template: Option<String>,
    /// How the image it came from wants programs to be run.
    #[serde(default)]
    pub image: ImageConfig,
    /// What was running, at the same moment.
    #[serde(default)]
    pub memory: Option<MemoryRecord>,
    /// When it was taken.
    pub created_at: Timestamp,
    /// When it is deleted by itself.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// So long after it was last used that is; without it, whatever is done with it.
    #[serde(default)]
    pub ttl_ms: Option<u64>,
}

/// A template.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TemplateRecord {
    /// What `--template` takes; its key.
    pub name: String,
    /// The state in the store.
    pub snapshot: SnapshotId,
    /// Size of the disk.
    pub disk_size_bytes: u64,
    /// Bytes of the image that are not zero.
    pub data_bytes: u64,
    /// Where the image came from, for people.
    pub origin: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// How its programs want to be run.
    #[serde(default)]
    pub image: ImageConfig,
    /// Processors of its sandboxes, unless asked otherwise.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// Memory of its sandboxes, unless asked otherwise.
    #[serde(default)]
    pub memory_mib: Option<u64>,
    /// What it was built by, unless it was imported or that is large.
    #[serde(default)]
    pub recipe: Option<Recipe>,
    /// The state of its last step that it is a copy of, if it was built by a recipe.
    #[serde(default)]
    pub built_on: Option<SnapshotId>,
}

/// Disk and memory of a template that has booted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BootedRecord {
    /// The template's state, and the memory's key.
    pub id: String,
    /// The template's own state.
    pub template: SnapshotId,
    /// That of its disk when it had booted.
    pub disk: SnapshotId,
    /// Of the same moment.
    pub memory: MemoryRecord,
    /// When a sandbox last began from it.
    pub used_at: Timestamp,
}

/// The state after a step of a template's build, from which the next build of the same steps goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Digest of where the build began and of all steps up to this one; its key.
    pub digest: String,
    /// The template that was built.
    pub template: String,
    /// The state in the store.
    pub snapshot: SnapshotId,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Sandboxes that were made at once, to be started a few at a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchRecord {
    /// `batch-…`; its key.
    pub id: String,
    /// How many are started at a time.
    pub concurrency: u32,
    /// The sandboxes.
    pub items: Vec<BatchItem>,
    /// Those that had not been started were not to be any more.
    pub cancelled: bool,
    /// When it was made.
    pub created_at: Timestamp,
    /// When there was nothing left to start.
    pub settled_at: Option<Timestamp>,
}

/// A sandbox of a batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchItem {
    /// Which.
    pub sandbox_id: String,
    /// What became of its start; none before that.
    pub outcome: Option<BatchOutcome>,
}

/// What became of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchOutcome {
    /// Its first session began.
    Completed,
    /// It did not, because of this.
    Failed(String),
    /// It was not to be started any more.
    Cancelled,
}

/// A name that keeps a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NamedSnapshotRecord {
    /// The name, unique among names; its key.
    pub name: String,
    /// The snapshot.
    pub snapshot_id: String,
    /// The snapshot was taken for it, and goes with it.
    pub taken: bool,
    /// When it was given.
    pub created_at: Timestamp,
}

/// A volume: a disk of its own, and the sandboxes that have it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// `vol-…`, unique for ever.
    pub id: String,
    /// What the user calls it; unique among volumes.
    pub name: String,
    /// An ext4 file system without partitions.
    pub disk: DiskId,
    /// Size of that disk.
    pub size_bytes: u64,
    /// The snapshot it was made from.
    #[serde(default)]
    pub from_snapshot: Option<String>,
    /// As of a sandbox.
    #[serde(default)]
    pub dedup_domain: Option<String>,
    /// Who has it: one sandbox that writes, or any number that read.
    #[serde(default)]
    pub attachments: Vec<VolumeAttachment>,
    /// When the record was made.
    pub created_at: Timestamp,
}

/// A volume's place in a sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeAttachment {
    /// Which.
    pub sandbox_id: String,
    /// Where its guest mounts it.
    pub path: String,
    /// The guest reads only.
    pub read_only: bool,
    /// Since when.
    pub attached_at: Timestamp,
}

/// A named state of a volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeSnapshotRecord {
    /// `vsnap-…`, unique for ever.
    pub id: String,
    /// The volume it was taken of, which may be gone.
    pub volume_id: String,
    /// What the user calls it; need not be unique.
    pub name: Option<String>,
    /// The state in the store.
    pub snapshot: SnapshotId,
    /// Size of the disk.
    pub size_bytes: u64,
    /// What it is certain to hold.
    pub consistency: Consistency,
    /// When it was taken.
    pub created_at: Timestamp,
}

/// A kind of record.
pub(crate) trait Record: Serialize + DeserializeOwned {
    /// The store's name of the kind.
    const KIND: &'static str;
    /// The store's key of this one.
    fn key(&self) -> &str;

    fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self)
            .map_err(|e| Error::internal(format!("could not encode {} record {}: {e}", Self::KIND, self.key())))
    }
}

impl Record for SandboxRecord {
    const KIND: &'static str = "sandbox";
    fn key(&self) -> &str {
        &self.id
    }
}

impl Record for SnapshotRecord {
    const KIND: &'static str = "snapshot";
    fn key(&self) -> &str {
        &self.id
    }
}

impl Record for TemplateRecord {
    const KIND: &'static str = "template";
    fn key(&self) -> &str {
        &self.name
    }
}

impl Record for BootedRecord {
    const KIND: &'static str = "booted-template";
    fn key(&self) -> &str {
        &self.id
    }
}

impl Record for StepRecord {
    const KIND: &'static str = "template-step";
    fn key(&self) -> &str {
        &self.digest
    }
}

impl Record for BatchRecord {
    const KIND: &'static str = "batch";
    fn key(&self) -> &str {
        &self.id
    }
}

impl Record for NamedSnapshotRecord {
    const KIND: &'static str = "named-snapshot";
    fn key(&self) -> &str {
        &self.name
    }
}

impl Record for VolumeRecord {
    const KIND: &'static str = "volume";
    fn key(&self) -> &str {
        &self.id
    }
}

impl Record for VolumeSnapshotRecord {
    const KIND: &'static str = "volume-snapshot";
    fn key(&self) -> &str {
        &self.id
    }
}

/// Puts these as they are now.
pub(crate) fn put_all<R: Record>(tx: &mut Transaction<'_>, records: &[R]) -> Result<()> {
    for record in records {
        tx.put_record(R::KIND, record.key(), record.encode()?);
    }
    Ok(())
}

/// All records of a kind. One that cannot be read is an error: it names a disk that must not be collected.
pub(crate) fn load_all<R: Record>(store: &storage::Store) -> Result<Vec<R>> {
    store
        .records(R::KIND)
        .into_iter()
        .map(|(key, bytes)| {
            serde_json::from_slice(&bytes)
                .map_err(|e| Error::internal(format!("{} record {key} cannot be read: {e}", R::KIND)))
        })
        .collect()
}

const ID_ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const ID_CHARS: usize = 12;

/// A new id: the prefix and 60 random bits in letters and digits that are not mistaken for each other.
pub(crate) fn new_id(prefix: &str) -> String {
    let mut random: u64 = rand::rng().random();
    let mut id = format!("{prefix}-");
    for _ in 0..ID_CHARS {
        id.push(char::from(ID_ALPHABET[(random & 31) as usize]));
        random >>= 5;
    }
    id
}

/// What the names of the engine's own disks and states in the store begin with; an id of [`new_id`] each.
const OWN_PREFIXES: [&str; 7] = ["sb-", "snap-", "import-", "template-", "vol-", "vsnap-", "mem-"];

/// Whether a disk or state of this name was made by the engine, and not by a user of the store.
pub(crate) fn is_own_name(name: &str) -> bool {
    OWN_PREFIXES.iter().any(|prefix| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| rest.len() == ID_CHARS && rest.bytes().all(|b| ID_ALPHABET.contains(&b)))
    })
}

/// 32 random hex digits.
pub(crate) fn new_machine_id() -> String {
    format!("{:032x}", rand::rng().random::<u128>())
}

/// Letters, digits and hyphens, for a host name.
pub(crate) fn slug(name: &str) -> String {
    let mut slug = String::new();
    for c in name.chars() {
        if c.is_ascii_alphanumeric() {
            slug.push(c.to_ascii_lowercase());
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    slug.truncate(63);
    let slug = slug.trim_end_matches('-');
    if slug.is_empty() { "sandbox".to_owned() } else { slug.to_owned() }
}

/// Names of sandboxes and templates: 1 to 64 letters, digits, spaces, `.`, `_`, `-`, starting with a letter or digit.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, ' ' | '.' | '_' | '-');
    let starts = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if !starts || name.len() > 64 || !name.chars().all(good) || name.ends_with(' ') {
        return Err(Error::invalid(format!("{what} name {name:?} is not allowed"))
            .hint("use 1 to 64 letters, digits, spaces, '.', '_' or '-', starting with a letter or digit"));
    }
    Ok(())
}

/// Names of snapshots.
pub(crate) fn check_comment(comment: Option<&str>) -> Result<()> {
    match comment {
        Some(c) if c.is_empty() || c.len() > 256 || c.chars().any(char::is_control) => {
            Err(Error::invalid("a snapshot's name must have 1 to 256 bytes and no control characters"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_lower_case_and_fresh() {
        let a = new_id("sb");
        assert_eq!(a.len(), 15);
        assert!(a.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "{a}");
        assert_ne!(a, new_id("sb"));
        assert_eq!(new_machine_id().len(), 32);
    }

    #[test]
    fn our_own_names_are_known() {
        for prefix in ["sb", "snap", "import", "template", "vol", "vsnap", "mem"] {
            assert!(is_own_name(&new_id(prefix)));
        }
        for name in ["golden", "sb-golden", "snap-1", "import-cut-off", "template-0123456789AB", "x-0123456789ab"] {
            assert!(!is_own_name(name), "{name}");
        }
    }

    #[test]
    fn slugs_are_host_names() {
        assert_eq!(slug("my-agent-workspace"), "my-agent-workspace");
        assert_eq!(slug("  After: deps  Installed! "), "after-deps-installed");
        assert_eq!(slug("日本"), "sandbox");
        assert!(slug(&"x-".repeat(60)).len() <= 63);
    }

    #[test]
    fn names_are_checked() {
        for name in ["a", "my-agent-workspace", "A b.c_d-9"] {
            assert!(check_name("sandbox", name).is_ok(), "{name}");
        }
        for name in ["", "-a", " a", "a ", "a/b", "a\n", "ü", &"x".repeat(65)] {
            assert!(check_name("sandbox", name).is_err(), "{name:?}");
        }
    }
}
