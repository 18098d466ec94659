//! What the engine counts.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Counters, shared by clones.
#[derive(Debug, Clone)]
pub struct Metrics {
    boots: Histogram,
    failed_boots: Counter,
    execs: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let boots = Histogram::new(exponential_buckets(0.05, 2.0, 12));
        Self { boots, failed_boots: Counter::default(), execs: Counter::default() }
    }
}

impl Metrics {
    /// Adds them to what is told.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Time from the start of a machine to its agent's answer";
        registry.register_with_unit("boot_duration", help, Unit::Seconds, self.boots.clone());
        registry.register("boots_failed", "Machines that did not come up", self.failed_boots.clone());
        registry.register("execs", "Commands started in sandboxes", self.execs.clone());
    }

    pub(crate) fn booted(&self, took: Duration) {
        self.boots.observe(took.as_secs_f64());
    }

    pub(crate) fn boot_failed(&self) {
        self.failed_boots.inc();
    }

    pub(crate) fn exec_started(&self) {
        self.execs.inc();
    }
}
