//! The engine: sandboxes as long-lived records, sessions as the compute attached to them now.
//!
//! [`Engine`] holds the registry and speaks to callers; each `sandbox::Sandbox` is driven by one owner at a time and
//! decides by the table in [`lifecycle`]. Durable truth is in the store: a record is written in the same transaction as
//! the disk operation it belongs to, so a crash leaves both or neither, and `recover` has only to finish what was in
//! progress.
//!
//! Trace of a fork: [`Engine::fork`] → registry (names reserved) → the parent's owner lock → table → freeze through the
//! agent → one transaction (child disks and child records: the commit point) → thaw → children in the registry, paused.
//!
//! Every operation that changes something runs in a task of its own: a caller that goes away does not leave it half done.

mod activity;
pub mod attach;
mod batches;
mod checkpoint;
mod commands;
mod console;
mod devices;
pub mod error;
mod files;
mod guest;
pub mod lifecycle;
mod memory;
mod metrics;
mod named;
mod ports;
mod previews;
pub mod recipe;
pub mod records;
mod recover;
mod registry;
mod sandbox;
mod session;
mod setup;
mod snapshots;
mod survivor;
mod template;
mod update;
pub mod usage;
mod vitals;
mod volumes;
mod warm;
mod watch;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use storage::{DiskId, SnapshotId, Source, Store};
use tokio::sync::{Notify, OnceCell, Semaphore};
use tracing::Instrument;
use vmm::Vmm;
use vmm::image::ImageConfig;

use attach::DiskFrontend;
use error::{Error, Kind, Result};
use lifecycle::State;
pub use metrics::Metrics;
pub use named::{NamedSnapshot, NamedSource, Unnamed};
use records::{NetworkPolicy, SandboxRecord, put_all};
use registry::Registry;
use sandbox::Sandbox;
use template::spare;

pub use batches::{BatchCounts, BatchItemView, BatchRequest, BatchStatus, BatchView, BatchWatch, ItemStatus};
pub use checkpoint::{ForkRequest, SnapshotRequest};
pub use console::Console;
pub use files::GuestTreeWriter;
pub(crate) use guest::check_env;
pub use guest::{ExecSpec, GuestReader, GuestWriter, RunningExec};
pub use memory::Keep;
pub use ports::PortConnection;
pub(crate) use previews::check_ports;
pub use previews::{CreatePreview, PREFIX as PREVIEW_TOKEN_PREFIX, Preview, Scope, TOKEN as PREVIEW_TOKEN, token_end};
pub(crate) use session::private_dir;
pub use setup::{GuestFile, GuestSetup};
pub use snapshots::{Deleted, LineageNode, NodeKind};
pub use template::{
    BASE, BootFiles, BuildRequest, BuildStatus, BuildView, ImageSource, Progress, TemplateBuilder, TemplateUsage,
};
pub use update::Changes;
pub use usage::{Compute, Period, SandboxUsage, Saved, SessionUsage, Used};
pub use vitals::Vitals;
pub use vmm::agent::ExecEvent;
pub use vmm::{CommandStatus, DirEntry, FileKind, FileStat, TerminalSize, TreeSummary};
pub use volumes::{Attach, CreateVolume};
pub use watch::{StateChange, Watch};

/// Settings of the engine that do not change while it runs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Directory of sessions' sockets and logs; at the start all goes that belongs to no machine that lives.
    pub run_root: PathBuf,
    /// How machines are accelerated; none: with KVM where that works, which is tried once.
    pub accel: Option<vmm::Accel>,
    /// Where it is kept whether KVM works.
    pub probe_dir: PathBuf,
    /// Where states of machines that had booted are kept, for others to start from; none: every machine boots.
    pub warm_dir: Option<PathBuf>,
    /// Machines that wait, held, for the next sandbox of a template; none with the above.
    pub spare_machines: usize,
    /// Network of machines.
    pub network: vmm::Network,
    /// Added to the guest kernel's command line.
    pub kernel_args: Vec<String>,
    /// What every guest is given.
    pub guest: GuestSetup,
    /// Host and port under which previews are served, such as `localhost:7080`; none: they are not.
    pub previews: Option<String>,
    /// From the start of a machine to its agent's answer.
    pub boot_deadline: Duration,
    /// For an orderly shutdown; a guest that takes longer is killed.
    pub stop_deadline: Duration,
    /// For one call to the guest's agent that should be quick.
    pub agent_deadline: Duration,
    /// For freezing the file system; a guest that takes longer is snapshot as it is.
    pub freeze_deadline: Duration,
    /// Machines that may boot at once; more wait.
    pub concurrent_boots: usize,
    /// How often it is measured what is kept for sandboxes, at most; it is also done soon after a session has ended.
    pub usage_period: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            run_root: PathBuf::from("run"),
            accel: None,
            probe_dir: PathBuf::from("boot"),
            warm_dir: None,
            spare_machines: 0,
            network: vmm::Network::User,
            kernel_args: Vec::new(),
            guest: GuestSetup::default(),
            previews: None,
            boot_deadline: Duration::from_secs(120),
            stop_deadline: Duration::from_secs(45),
            agent_deadline: Duration::from_secs(30),
            freeze_deadline: Duration::from_secs(15),
            concurrent_boots: std::thread::available_parallelism().map_or(2, |n| n.get().max(2)),
            usage_period: Duration::from_secs(600),
        }
    }
}

/// What an engine is made of.
pub struct Parts {
    /// The store, open.
    pub store: Store,
    /// Runs machines.
    pub vmm: Arc<dyn Vmm>,
    /// Shows disks to machines.
    pub disks: Arc<dyn DiskFrontend>,
    /// Kernel, initramfs and template images.
    pub templates: Arc<dyn TemplateBuilder>,
    /// The rest.
    pub settings: Settings,
}

/// What everything in the engine shares.
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) vmm: Arc<dyn Vmm>,
    pub(crate) disks: Arc<dyn DiskFrontend>,
    pub(crate) templates: Arc<dyn TemplateBuilder>,
    pub(crate) settings: Settings,
    pub(crate) registry: Registry,
    pub(crate) volumes: volumes::Volumes,
    batches: batches::Batches,
    builds: template::Builds,
    /// Held while a snapshot is deleted or its end is moved: not both.
    snapshot_ends: tokio::sync::Mutex<()>,
    pub(crate) boots: Semaphore,
    warm: warm::Warm,
    memories: memory::Memories,
    booted: template::booted::Booted,
    spares: spare::Spares,
    pub(crate) metrics: Metrics,
    usage: usage::Ledgers,
    acceleration: OnceCell<vmm::Acceleration>,
    changes: watch::Changes,
    closing: AtomicBool,
    seal_wanted: Notify,
}

impl Shared {
    /// Runs a call of the store where it may block.
    pub(crate) async fn with_store<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (store, span) = (self.store.clone(), tracing::Span::current());
        tokio::task::spawn_blocking(move || span.in_scope(|| call(&store)))
            .await
            .map_err(|e| Error::internal(format!("a call of the store did not end: {e}")))?
    }

    /// Makes changes of the store that take effect together, and are durable when this returns; none if `change` fails.
    pub(crate) async fn transact<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut storage::Transaction<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let made = self.with_store(move |store| {
            let mut tx = store.begin();
            let made = change(&mut tx)?;
            tx.commit_durable()?;
            Ok(made)
        });
        made.await
    }

    /// Asks for what was written to be packed, some time soon.
    pub(crate) fn want_seal(&self) {
        self.seal_wanted.notify_one();
    }

    /// What machines run with: as told, or found out by the first who asks.
    pub(crate) async fn acceleration(&self, boot: &BootFiles) -> &vmm::Acceleration {
        let find = || async {
            let found = match self.settings.accel {
                Some(accel) => vmm::Acceleration { accel, reason: "as the daemon was told".into() },
                None => {
                    let (run_root, probe_dir) = (&self.settings.run_root, &self.settings.probe_dir);
                    self.vmm.probe_kvm(&boot.kernel, &boot.initramfs, run_root, probe_dir).await
                }
            };
            tracing::info!(accel = found.accel.name(), reason = found.reason, "machines' accelerator");
            found
        };
        self.acceleration.get_or_init(find).await
    }

    fn check_open(&self) -> Result<()> {
        if self.closing.load(Ordering::Acquire) {
            return Err(Error::new(Kind::ShuttingDown, "the daemon is shutting down").hint("try again when it is back"));
        }
        Ok(())
    }
}

/// A sandbox as callers see it.
#[derive(Debug, Clone)]
pub struct SandboxView {
    /// The record.
    pub record: SandboxRecord,
    /// What is left of the session's time, if it is limited.
    pub timeout_remaining: Option<Duration>,
    /// What all sessions had, the present one too.
    pub compute: Compute,
    /// The address that opens its first preview.
    pub preview_url: Option<String>,
}

/// What a new sandbox starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A template, by name.
    Template(String),
    /// A snapshot, by id or by unique name.
    Snapshot(String),
    /// What a template's build has come to.
    Build(BuildState),
}

/// A state of the store on the way to a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildState {
    pub(crate) snapshot: SnapshotId,
    pub(crate) disk_size_bytes: u64,
    pub(crate) image: ImageConfig,
}

/// A new sandbox.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// What its disk starts as.
    pub origin: Origin,
    /// Its name; without one, its id.
    pub name: Option<String>,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory.
    pub memory_mib: u64,
    /// The disk is at least this large; one that is larger than what it starts as gives the file system more room.
    pub disk_mib: Option<u64>,
    /// How long a session may last.
    pub timeout: Option<Duration>,
    /// How long a session may go unused.
    pub idle_timeout: Option<Duration>,
    /// Keep the file system when a session ends.
    pub persistent: bool,
    /// Environment of every exec.
    pub env: BTreeMap<String, String>,
    /// What its network reaches.
    pub network_policy: NetworkPolicy,
    /// Its deduplication domain; without one, that of what its disk starts as.
    pub dedup_domain: Option<String>,
    /// The caller's own notes.
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// The caller's own labels.
    pub tags: Vec<String>,
    /// Volumes that it has from the start.
    pub volumes: Vec<Attach>,
    /// Ports that have previews from the start.
    pub publish_ports: Vec<u16>,
    /// Of a snapshot that has memory, only the files.
    pub without_memory: bool,
    /// Start a session; without, the sandbox is paused.
    pub start: bool,
    /// Answer when the agent answers, not before.
    pub wait: bool,
}

/// The engine. Share it in an `Arc`.
pub struct Engine {
    shared: Arc<Shared>,
    background: [tokio::task::JoinHandle<()>; 3],
}

impl Engine {
    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Machines that wait for the next sandbox of a template.
    pub fn spare_machines(&self) -> usize {
        self.shared.spares.waiting()
    }

    /// Templates that have booted, which sandboxes begin from.
    pub fn booted_templates(&self) -> usize {
        self.shared.booted.there()
    }

    /// Opens the engine on an open store: ends what a previous daemon left, then serves.
    pub async fn open(parts: Parts) -> Result<Arc<Engine>> {
        let Parts { store, vmm, disks, templates, settings } = parts;
        let boots = Semaphore::new(settings.concurrent_boots.max(1));
        let warm = warm::Warm::new(settings.warm_dir.clone());
        let shared = Arc::new(Shared {
            store,
            vmm,
            disks,
            templates,
            settings,
            registry: Registry::default(),
            volumes: volumes::Volumes::default(),
            batches: batches::Batches::default(),
            builds: template::Builds::default(),
            snapshot_ends: tokio::sync::Mutex::default(),
            boots,
            warm,
            memories: memory::Memories::default(),
            booted: template::booted::Booted::default(),
            spares: spare::Spares::default(),
            metrics: Metrics::default(),
            usage: usage::Ledgers::default(),
            acceleration: OnceCell::new(),
            changes: watch::Changes::default(),
            closing: AtomicBool::new(false),
            seal_wanted: Notify::new(),
        });
        recover::run(&shared).await?;
        batches::go_on(&shared).await?;
        let background = [
            tokio::spawn(seal_when_wanted(shared.clone())),
            tokio::spawn(snapshots::delete_expired(shared.clone())),
            tokio::spawn(usage::watch(shared.clone())),
        ];
        Ok(Arc::new(Engine { shared, background }))
    }

    /// Runs `work` to its end even if the caller goes away. What it logs is the caller's request still.
    async fn detached<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        self.shared.check_open()?;
        tokio::spawn(work.in_current_span())
            .await
            .unwrap_or_else(|e| Err(Error::internal(format!("an operation did not end: {e}"))))
    }

    /// The sandbox of this id or name.
    fn find(&self, key: &str) -> Result<Arc<Sandbox>> {
        self.shared.registry.sandbox(key)
    }

    /// Makes a sandbox and starts its first session.
    pub async fn create(&self, request: CreateRequest) -> Result<SandboxView> {
        let shared = self.shared.clone();
        self.detached(async move {
            let (source, base) = resolve_origin(&shared, &request.origin)?;
            let state = if request.start { State::Creating } else { State::Paused };
            let id = records::new_id("sb");
            let name = request.name.clone().unwrap_or_else(|| id.clone());
            let mut record = record_of(&request, &base, id, name, state);
            let reservation = shared.registry.reserve_names(std::slice::from_ref(&record.name))?;
            record.pristine = base.pristine.filter(|_| record.disk_size_bytes == base.disk_size_bytes);
            if let Some(template) = record.pristine
                && request.start
                && !request.without_memory
                && request.volumes.is_empty()
                && let Some(spare) = spare::take(&shared, &spare::KindOf::new(template, &record)).await
            {
                let (record, given) = spare::give(&shared, spare, record).await?;
                let sandbox = Sandbox::new(shared.clone(), record);
                return begin(&shared, sandbox, reservation, Some(given), request.wait).await;
            }
            // The commit point: the disk and the record that names it.
            let volumes = match request.volumes.as_slice() {
                // Nobody waits for a turn to change nothing.
                [] => None,
                wanted => Some(volumes::attaching(&shared, &record.id, wanted).await?),
            };
            let attached = volumes.as_ref().map(|change| change.records()).unwrap_or_default();
            let record = shared
                .transact(move |tx| {
                    let mut record = record;
                    put_all(tx, &attached)?;
                    // What ran on another disk, or on another machine, cannot go on.
                    let fits = |m: &&records::MemoryRecord| {
                        (m.cpus, m.memory_mib) == (record.cpus, record.memory_mib)
                            && record.disk_size_bytes == base.disk_size_bytes
                            && attached.is_empty()
                            && !request.without_memory
                    };
                    record.memory = base.memory.as_ref().filter(fits).map(|m| memory::fork(tx, m));
                    put_sandbox(tx, &mut record, source, base.disk_size_bytes)?;
                    Ok(record)
                })
                .await?;
            if let Some(change) = volumes {
                change.publish();
            }
            if let Some(from) = &record.from_snapshot {
                snapshots::used(&shared, from).await;
            }
            let sandbox = Sandbox::new(shared.clone(), record);
            if !request.start {
                shared.registry.insert(sandbox.clone(), reservation);
                return Ok(sandbox.view());
            }
            begin(&shared, sandbox, reservation, None, request.wait).await
        })
        .await
    }

    /// Sandboxes, oldest first; destroyed ones only when asked for by state.
    pub fn list(&self, state: Option<State>) -> Vec<SandboxView> {
        let mut views: Vec<_> = self.shared.registry.sandboxes().iter().map(|s| s.view()).collect();
        views.retain(|v| match state {
            Some(state) => v.record.state == state,
            None => v.record.state != State::Destroyed,
        });
        views.sort_by(|a, b| (a.record.created_at, &a.record.id).cmp(&(b.record.created_at, &b.record.id)));
        views
    }

    /// One sandbox, by id or name; a destroyed one by its id.
    pub fn show(&self, key: &str) -> Result<SandboxView> {
        Ok(self.find(key)?.view())
    }

    /// One sandbox that is not destroyed, by name.
    pub fn show_by_name(&self, name: &str) -> Result<SandboxView> {
        Ok(self.shared.registry.sandbox_by_name(name)?.view())
    }

    /// Ends the session in an orderly way; the file system is kept (of a non-persistent sandbox: destroyed).
    pub async fn stop(&self, key: &str) -> Result<SandboxView> {
        self.pause(key, Keep::Files).await
    }

    /// Ends the session; the file system is kept, and what runs as `keep` says. Of a non-persistent sandbox nothing is.
    pub async fn pause(&self, key: &str, keep: Keep) -> Result<SandboxView> {
        let sandbox = self.find(key)?;
        self.detached(async move { sandbox.stop(keep).await }).await
    }

    /// Starts a session unless there is one. It goes on from the memory that was kept, if there is any.
    pub async fn resume(&self, key: &str) -> Result<SandboxView> {
        let sandbox = self.find(key)?;
        self.detached(async move { sandbox.resume(false).await }).await
    }

    /// The same, from the files alone: memory that was kept is given up.
    pub async fn resume_from_files(&self, key: &str) -> Result<SandboxView> {
        let sandbox = self.find(key)?;
        self.detached(async move { sandbox.resume(true).await }).await
    }

    /// Gives the session this much time from now (or its own timeout anew), and later ones as much.
    pub async fn extend(&self, key: &str, timeout: Option<Duration>) -> Result<SandboxView> {
        let sandbox = self.find(key)?;
        self.detached(async move { sandbox.extend(timeout).await }).await
    }

    /// Deletes a sandbox and its disk. Snapshots taken of it stay until they are deleted.
    pub async fn destroy(&self, key: &str) -> Result<SandboxView> {
        let sandbox = self.find(key)?;
        self.detached(async move { sandbox.destroy().await }).await
    }

    /// A snapshot that came from elsewhere, and is in the store by now.
    pub fn adopt_snapshot(&self, record: records::SnapshotRecord) {
        self.shared.registry.insert_snapshot(record);
    }

    /// Sees that all a running guest has written is on its disk, as far as the guest can be asked.
    pub async fn settle(&self, key: &str) -> Result<()> {
        let sandbox = self.find(key)?;
        self.detached(async move { sandbox.settled(|| Ok(())).await }).await
    }

    /// Runs `take` at one consistent point of a sandbox: with its guest frozen, as far as the guest can be asked.
    pub async fn settled<T: Clone + Send + 'static>(
        &self,
        key: &str,
        take: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let sandbox = self.find(key)?;
        self.detached(async move { sandbox.settled(take).await }).await
    }

    /// Makes sandboxes on the present state of another.
    pub async fn fork(&self, key: &str, request: ForkRequest) -> Result<Vec<SandboxView>> {
        let sandbox = self.find(key)?;
        self.detached(async move { sandbox.fork(request).await }).await
    }

    /// What machines run with and why. Finds out if nobody has yet, which can take as long as a boot; fails if there is
    /// nothing to boot.
    pub async fn acceleration(&self) -> Result<vmm::Acceleration> {
        let boot = self.shared.templates.boot_files().await?;
        Ok(self.shared.acceleration(&boot).await.clone())
    }

    /// Name and version of what runs machines; why not, if it cannot be run.
    pub async fn runtime(&self) -> Result<String> {
        Ok(self.shared.vmm.version().await?)
    }

    /// Whether guests reach a network at all.
    pub fn has_network(&self) -> bool {
        self.shared.settings.network != vmm::Network::None
    }

    /// Ends the engine: no new operations, running sandboxes are stopped in an orderly way (those that do not make it
    /// by the deadline are killed; what they flushed is kept), the store is closed.
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        self.close(deadline, |sandbox| async move { sandbox.shut_down().await }).await
    }

    /// Ends the engine for the next one to go on: sessions stay, their machines wait for their disks. Machines that
    /// cannot outlive the daemon are stopped, as in [`Engine::shutdown`].
    pub async fn leave(&self, deadline: Duration) -> Result<()> {
        self.close(deadline, |sandbox| async move { sandbox.leave().await }).await
    }

    async fn close<F: Future<Output = ()> + Send + 'static>(
        &self,
        deadline: Duration,
        end: impl Fn(Arc<Sandbox>) -> F,
    ) -> Result<()> {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.batches.end();
        self.shared.warm.end();
        self.shared.booted.end();
        spare::end(&self.shared).await;
        let mut ends = tokio::task::JoinSet::new();
        for sandbox in self.shared.registry.sandboxes() {
            ends.spawn(end(sandbox));
        }
        let all = async { while ends.join_next().await.is_some() {} };
        if tokio::time::timeout(deadline, all).await.is_err() {
            tracing::warn!("some sandboxes did not stop in time; their machines are killed");
            ends.abort_all();
            for sandbox in self.shared.registry.sandboxes() {
                sandbox.kill_machine().await;
            }
        }
        self.background.iter().for_each(|task| task.abort());
        self.shared.changes.end();
        self.shared.with_store(|store| Ok(store.close()?)).await
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.background.iter().for_each(|task| task.abort());
        self.shared.warm.end();
        self.shared.booted.end();
        // Sandboxes and what they share hold each other.
        self.shared.registry.clear();
    }
}

async fn seal_when_wanted(shared: Arc<Shared>) {
    loop {
        shared.seal_wanted.notified().await;
        match shared.with_store(|store| Ok(store.seal()?)).await {
            Ok(report) => {
                tracing::debug!(?report, "sealed");
                shared.usage.look_soon();
            }
            Err(error) => tracing::warn!(%error, "sealing failed; it is tried again after the next stop"),
        }
    }
}

/// Lets a new sandbox be found, and begins its first session.
async fn begin(
    shared: &Arc<Shared>,
    sandbox: Arc<Sandbox>,
    reservation: registry::Reservation,
    spare: Option<spare::Given>,
    wait: bool,
) -> Result<SandboxView> {
    // Locked before anybody can find it, so that the first session is the first thing that happens to it.
    let owner = sandbox.own().await;
    shared.registry.insert(sandbox.clone(), reservation);
    let starting = tokio::spawn({
        let sandbox = sandbox.clone();
        async move { sandbox.start_first(owner, spare).await }.in_current_span()
    });
    if wait {
        let started = starting.await;
        started
            .unwrap_or_else(|e| Err(Error::internal(format!("the first start did not end: {e}"))))
            .map_err(|e| e.about_sandbox(sandbox.id()))?;
    }
    Ok(sandbox.view())
}

/// The record of a new sandbox, whose disk is still to be made.
fn record_of(request: &CreateRequest, base: &Base, id: String, name: String, state: State) -> SandboxRecord {
    SandboxRecord {
        id,
        name,
        state,
        disk: DiskId(0),
        disk_size_bytes: request.disk_mib.map_or(0, |mib| mib.saturating_mul(1 << 20)).max(base.disk_size_bytes),
        template: base.template.clone(),
        dedup_domain: request.dedup_domain.clone().or(base.dedup_domain.clone()),
        from_snapshot: base.snapshot_id.clone(),
        forked_from: None,
        cpus: request.cpus,
        memory_mib: request.memory_mib,
        timeout_ms: request.timeout.map(|t| t.as_millis() as u64),
        idle_timeout_ms: request.idle_timeout.map(|t| t.as_millis() as u64),
        persistent: request.persistent,
        env: request.env.clone(),
        network_policy: request.network_policy,
        image: base.image.clone(),
        metadata: request.metadata.clone(),
        tags: request.tags.clone(),
        previews: previews::published(&request.publish_ports),
        unclean: base.unclean,
        memory: None,
        pristine: None,
        last_error: None,
        machine_id: records::new_machine_id(),
        created_at: Timestamp::now(),
        started_at: None,
        ready_at: None,
        boot_ms: None,
        boot_path: None,
        accel: None,
        destroyed_at: None,
        total_runtime_ms: 0,
        vcpu_ms: 0,
        memory_mib_ms: 0,
    }
}

/// Puts the disk and the record of a new sandbox into a transaction.
fn put_sandbox(
    tx: &mut storage::Transaction<'_>,
    record: &mut SandboxRecord,
    source: Source,
    source_bytes: u64,
) -> Result<()> {
    record.disk = match record.disk_size_bytes > source_bytes {
        true => tx.fork_larger(source, &record.id, record.disk_size_bytes),
        false => tx.fork(source, &record.id),
    };
    in_domain(tx, record.disk, record.dedup_domain.as_deref());
    put_all(tx, std::slice::from_ref(record))
}

/// Puts a disk, which may be one of the transaction, into the deduplication domain of whose it is. Without one it stays in that
/// of what it was made of.
fn in_domain(tx: &mut storage::Transaction<'_>, disk: DiskId, domain: Option<&str>) {
    if domain.is_some() {
        tx.set_domain(disk, domain);
    }
}

/// What a sandbox inherits from where it starts.
struct Base {
    disk_size_bytes: u64,
    template: Option<String>,
    snapshot_id: Option<String>,
    image: ImageConfig,
    unclean: bool,
    dedup_domain: Option<String>,
    memory: Option<records::MemoryRecord>,
    /// It is a template's state.
    pristine: Option<SnapshotId>,
}

fn resolve_origin(shared: &Shared, origin: &Origin) -> Result<(Source, Base)> {
    let (state, mut base): (SnapshotId, Base) = match origin {
        Origin::Template(name) => {
            let template = shared.registry.template(name)?;
            let base = Base {
                disk_size_bytes: template.disk_size_bytes,
                template: Some(template.name),
                image: template.image,
                snapshot_id: None,
                unclean: false,
                dedup_domain: None,
                memory: None,
                pristine: Some(template.snapshot),
            };
            (template.snapshot, base)
        }
        Origin::Snapshot(key) => {
            let snapshot = shared.registry.snapshot(key, None)?;
            let base = Base {
                disk_size_bytes: snapshot.disk_size_bytes,
                template: snapshot.template,
                image: snapshot.image,
                snapshot_id: Some(snapshot.id),
                unclean: snapshot.consistency == records::Consistency::Crash,
                dedup_domain: None,
                memory: snapshot.memory,
                pristine: None,
            };
            (snapshot.snapshot, base)
        }
        Origin::Build(state) => {
            let base = Base {
                disk_size_bytes: state.disk_size_bytes,
                template: None,
                image: state.image.clone(),
                snapshot_id: None,
                unclean: false,
                dedup_domain: None,
                memory: None,
                pristine: None,
            };
            (state.snapshot, base)
        }
    };
    base.dedup_domain = shared.store.domain(Source::Snapshot(state))?;
    Ok((Source::Snapshot(state), base))
}
