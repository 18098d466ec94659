//! What the engine counts.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Counters, shared by clones.
#[derive(Debug, Clone)]
pub struct Metrics {
    boots: Histogram,
    failed_boots: Counter,
    execs: Counter,
    freezes: Family<Phase, Histogram>,
    freezes_failed: Counter,
    holds: Histogram,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    phase: &'static str,
}

/// How long a guest's file system was kept still, as the daemon saw it: a write of the guest waits no longer than the sum.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Freeze {
    /// From the call until the guest said that it is frozen. Most of it the guest writes back, and writes are free to go on.
    pub freezing: Duration,
    /// From there until the state was durable.
    pub committing: Duration,
    /// From there until the guest said that it is thawed.
    pub thawing: Duration,
}

impl Default for Metrics {
    fn default() -> Self {
        let boots = Histogram::new(exponential_buckets(0.05, 2.0, 12));
        let freezes =
            Family::<Phase, Histogram>::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 14)));
        let (failed_boots, execs, freezes_failed) = (Counter::default(), Counter::default(), Counter::default());
        let holds = Histogram::new(exponential_buckets(0.001, 2.0, 14));
        Self { boots, failed_boots, execs, freezes, freezes_failed, holds }
    }
}

impl Metrics {
    /// Adds them to what is told.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Time from the start of a machine to its agent's answer";
        registry.register_with_unit("boot_duration", help, Unit::Seconds, self.boots.clone());
        registry.register("boots_failed", "Machines that did not come up", self.failed_boots.clone());
        registry.register("execs", "Commands started in sandboxes", self.execs.clone());
        let help = "Time that a guest's file system took to freeze, was kept so, and took to thaw";
        registry.register_with_unit("freeze_duration", help, Unit::Seconds, self.freezes.clone());
        let help = "Snapshots and forks of a running sandbox without a freeze: as after a power cut";
        registry.register("freezes_failed", help, self.freezes_failed.clone());
        let help = "Time that a running machine stood still for its memory to be taken";
        registry.register_with_unit("hold_duration", help, Unit::Seconds, self.holds.clone());
    }

    pub(crate) fn booted(&self, took: Duration) {
        self.boots.observe(took.as_secs_f64());
    }

    pub(crate) fn boot_failed(&self) {
        self.failed_boots.inc();
    }

    pub(crate) fn froze(&self, took: Freeze) {
        for (phase, took) in [("freeze", took.freezing), ("commit", took.committing), ("thaw", took.thawing)] {
            self.freezes.get_or_create(&Phase { phase }).observe(took.as_secs_f64());
        }
    }

    pub(crate) fn freeze_failed(&self) {
        self.freezes_failed.inc();
    }

    pub(crate) fn held(&self, took: Duration) {
        self.holds.observe(took.as_secs_f64());
    }

    pub(crate) fn exec_started(&self) {
        self.execs.inc();
    }
}
