//! Figures for Prometheus, at `/metrics`: counted as things happen, or read when they are asked for.
//!
//! Labels are routes, methods, statuses and states: what callers send never becomes a label.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State as AppState};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::Api;
use super::answer::ApiError;
use crate::disks::Disks;
use crate::engine::Engine;
use crate::engine::error::Error;
use crate::engine::lifecycle::State;

/// Figures of the store are read anew after so long: they walk over every disk.
const FRESH: Duration = Duration::from_secs(5);

type Number = Gauge<f64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Asked {
    method: String,
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    method: String,
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InState {
    state: &'static str,
}

/// All figures.
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<Asked, Counter>,
    latency: Family<Route, Histogram>,
    sandboxes: Family<InState, Gauge>,
    spares: Gauge,
    booted: Gauge,
    store: Vec<(Read, Gauge)>,
    totals: Vec<(ReadTotal, Counter)>,
    process: Process,
    disks: Arc<Disks>,
    measured: Mutex<Option<Instant>>,
}

impl Metrics {
    pub(super) fn new(engine: &Engine, disks: Arc<Disks>) -> Self {
        let mut registry = Registry::with_prefix("miosa");
        let requests = Family::<Asked, Counter>::default();
        registry.register("http_requests", "Requests answered", requests.clone());
        let latency =
            Family::<Route, Histogram>::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 4.0, 9)));
        let help = "Time from a request's head to its answer's head";
        registry.register_with_unit("http_request_duration", help, Unit::Seconds, latency.clone());
        let sandboxes = Family::<InState, Gauge>::default();
        registry.register("sandboxes", "Sandboxes by state, destroyed ones aside", sandboxes.clone());
        let spares = Gauge::default();
        let booted = Gauge::default();
        registry.register(
            "booted_templates",
            "Templates that have booted, for sandboxes to begin from",
            booted.clone(),
        );
        registry.register("spare_machines", "Machines that wait for the next sandbox", spares.clone());
        engine.metrics().register(&mut registry);
        disks.traffic().register(&mut registry);
        let totals = TOTALS.map(|(name, help, read)| {
            let counter = Counter::<u64>::default();
            registry.register(name, help, counter.clone());
            (read, counter)
        });
        let store = STORE.map(|(name, help, read)| {
            let gauge = Gauge::<i64>::default();
            registry.register(name, help, gauge.clone());
            (read, gauge)
        });
        let process = Process::register(&mut registry);
        let (store, totals, measured) = (store.into(), totals.into(), Mutex::default());
        Self { registry, requests, latency, sandboxes, spares, booted, store, totals, process, disks, measured }
    }

    /// The figures as text, those that are read now read now. It may block.
    fn gather(&self, engine: &Engine) -> Result<String, Error> {
        let mut count = State::ALL.map(|state| (state, 0));
        for view in engine.list(None) {
            if let Some((_, n)) = count.iter_mut().find(|(state, _)| *state == view.record.state) {
                *n += 1;
            }
        }
        for (state, n) in count {
            if state != State::Destroyed {
                self.sandboxes.get_or_create(&InState { state: state.name() }).set(n);
            }
        }
        self.booted.set(i64::try_from(engine.booted_templates()).unwrap_or(i64::MAX));
        self.spares.set(i64::try_from(engine.spare_machines()).unwrap_or(i64::MAX));
        self.measure_store()?;
        self.measure_totals();
        self.process.measure();
        let mut text = String::new();
        encode(&mut text, &self.registry).map_err(|e| Error::internal(format!("figures could not be written: {e}")))?;
        Ok(text)
    }

    /// Figures that the store counts itself.
    fn measure_totals(&self) {
        let totals = self.disks.store().totals();
        for (read, counter) in &self.totals {
            // Both only grow; who asks at the same time may have told some of it.
            counter.inner().fetch_max(read(&totals), Ordering::Relaxed);
        }
    }

    fn measure_store(&self) -> Result<(), Error> {
        let mut measured = self.measured.lock();
        if measured.is_none_or(|at| at.elapsed() >= FRESH) {
            let stats = self.disks.store().stats()?;
            for (read, gauge) in &self.store {
                gauge.set(i64::try_from(read(&stats)).unwrap_or(i64::MAX));
            }
            *measured = Some(Instant::now());
        }
        Ok(())
    }
}

/// Takes a figure out of the store's.
type Read = fn(&storage::Stats) -> u64;

type Figure = (&'static str, &'static str, Read);

const STORE: [Figure; 11] = [
    ("store_disks", "Disks in the store", |s| s.disks),
    ("store_snapshots", "Snapshots in the store", |s| s.snapshots),
    ("store_logical_bytes", "What disks and snapshots hold, each counted in full", |s| s.logical_bytes),
    ("store_unique_bytes", "Different blocks among them, uncompressed", |s| s.unique_bytes),
    ("store_pack_bytes", "Packs, as far as they hold data", |s| s.pack_bytes),
    ("store_map_bytes", "Packs, as far as they hold map nodes", |s| s.map_bytes),
    ("store_index_bytes", "The catalogue and index", |s| s.index_bytes),
    ("store_log_bytes", "The log: what waits to be packed", |s| s.log_bytes),
    ("store_stored_bytes", "All that the store occupies", |s| s.stored_bytes),
    ("store_checked_timestamp_seconds", "When everything was last checked, in seconds since 1970; 0: never", |s| {
        s.checked_unix_seconds
    }),
    ("store_damage", "What the last check found damaged and not healed", |s| s.damage),
];

/// Takes a sum out of the store's.
type ReadTotal = fn(&storage::Totals) -> u64;

const TOTALS: [(&str, &str, ReadTotal); 10] = [
    ("store_checkpoints", "Checkpoints: what the log held was packed", |t| t.checkpoints),
    ("store_checkpoints_failed", "Checkpoints that failed", |t| t.checkpoints_failed),
    ("store_sealed_blocks", "Blocks of 4 KiB taken from the log by checkpoints", |t| t.sealed_blocks),
    ("store_new_blocks", "Of these, blocks that were not stored yet", |t| t.new_blocks),
    ("store_packed_bytes", "Bytes of packs that checkpoints wrote", |t| t.packed_bytes),
    ("store_collections", "Garbage collections", |t| t.collections),
    ("store_collections_failed", "Garbage collections that failed", |t| t.collections_failed),
    ("store_collected_bytes", "Bytes of packs that collections gave back", |t| t.collected_bytes),
    ("store_repacked_packs", "Packs that were packed again", |t| t.repacked_packs),
    ("store_repacked_bytes", "Bytes that packing again gave back", |t| t.repacked_bytes),
];

/// Figures of this process, under the names that they have everywhere.
struct Process {
    cpu: Counter<f64, AtomicU64>,
    resident: Gauge,
    virtual_: Gauge,
    files: Gauge,
    threads: Gauge,
    /// What `cpu` has been told so far.
    told: Mutex<f64>,
}

impl Process {
    fn register(registry: &mut Registry) -> Self {
        let (cpu, resident, virtual_, files, threads, start) = (
            Counter::default(),
            Gauge::default(),
            Gauge::default(),
            Gauge::default(),
            Gauge::default(),
            Number::default(),
        );
        registry.register(
            "process_cpu_seconds",
            "Processor time, in the program and for it in the kernel",
            Counter::clone(&cpu),
        );
        registry.register("process_resident_memory_bytes", "Memory in use", Gauge::clone(&resident));
        registry.register("process_virtual_memory_bytes", "Address space in use", Gauge::clone(&virtual_));
        registry.register("process_open_fds", "Open files", Gauge::clone(&files));
        registry.register("process_threads", "Threads", Gauge::clone(&threads));
        registry.register("process_start_time_seconds", "When it was started, in seconds since 1970", start.clone());
        start.set(jiff::Timestamp::now().as_millisecond() as f64 / 1_000.0);
        Self { cpu, resident, virtual_, files, threads, told: Mutex::default() }
    }

    /// What cannot be read stays as it was.
    fn measure(&self) {
        if let Ok(usage) = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF) {
            let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
            let now = seconds(usage.user_time()) + seconds(usage.system_time());
            let mut told = self.told.lock();
            self.cpu.inc_by((now - *told).max(0.0));
            *told = now;
        }
        if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
            let field = |name: &str| -> Option<i64> {
                let line = status.lines().find_map(|line| line.strip_prefix(name))?;
                line.split_whitespace().next()?.parse().ok()
            };
            for (name, scale, gauge) in
                [("VmRSS:", 1_024, &self.resident), ("VmSize:", 1_024, &self.virtual_), ("Threads:", 1, &self.threads)]
            {
                if let Some(value) = field(name) {
                    gauge.set(value * scale);
                }
            }
        }
        if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
            self.files.set(i64::try_from(open.count()).unwrap_or(i64::MAX));
        }
    }
}

/// Counts a request under the route that serves it.
pub(super) async fn count(AppState(metrics): AppState<Arc<Metrics>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    // A method that HTTP does not know could be any word.
    let method = request.method().clone();
    let known = matches!(method.as_str(), "GET" | "POST" | "PUT" | "PATCH" | "DELETE" | "HEAD" | "OPTIONS");
    let method = if known { method.to_string() } else { "other".to_owned() };
    let response = next.run(request).await;
    let asked = Asked { method: method.clone(), route: route.clone(), status: response.status().as_u16() };
    metrics.requests.get_or_create(&asked).inc();
    metrics.latency.get_or_create(&Route { method, route }).observe(began.elapsed().as_secs_f64());
    response
}

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "daemon", responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
pub(super) async fn metrics(AppState(api): AppState<Api>) -> Result<Response, ApiError> {
    let (metrics, engine) = (api.metrics.clone(), api.engine.clone());
    let gathered = tokio::task::spawn_blocking(move || metrics.gather(&engine)).await;
    let text = gathered.map_err(|e| Error::internal(format!("gathering figures did not end: {e}")))??;
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}
