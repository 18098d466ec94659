//! What the benches share: samples, a table on stdout, and `-- --json FILE` with one object a line.

// Each bench uses a part of it.
#![allow(dead_code)]

pub mod corpus;
pub mod load;
pub mod tools;

use std::io::Write;
use std::time::{Duration, Instant};

/// Measured durations of one thing.
#[derive(Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    /// Runs `f` and keeps how long it took.
    pub fn time<T>(&mut self, f: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let out = f();
        self.0.push(start.elapsed());
        out
    }

    /// The value below which this share of the samples is, in microseconds.
    pub fn quantile_us(&mut self, share: f64) -> f64 {
        self.0.sort();
        let at = ((self.0.len() - 1) as f64 * share).round() as usize;
        self.0[at].as_secs_f64() * 1e6
    }

    /// Adds one.
    pub fn push(&mut self, sample: Duration) {
        self.0.push(sample);
    }
}

/// Processor time this process has used, in seconds.
pub fn cpu_seconds() -> f64 {
    let used = nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID.now().expect("the clock of the process");
    Duration::from(used).as_secs_f64()
}

/// What follows an option on the command line.
pub fn argument(name: &str) -> Option<String> {
    let mut args = std::env::args();
    args.find(|arg| arg == name)?;
    args.next()
}

/// Collects rows and prints them.
pub struct Report {
    bench: &'static str,
    json: Option<std::fs::File>,
    only: Option<String>,
}

impl Report {
    /// Reads the command line: `--json FILE`, `--only TEXT` for parts whose name has the text.
    pub fn new(bench: &'static str) -> Self {
        let json = argument("--json").map(|path| std::fs::File::create(path).expect("the JSON file can be made"));
        println!("{:<10} {:<34} {:<22} {:>12} unit", "system", "case", "metric", "value");
        Self { bench, json, only: argument("--only") }
    }

    /// Whether this part was asked for.
    pub fn wants(&self, part: &str) -> bool {
        self.only.as_ref().is_none_or(|only| part.contains(only))
    }

    /// A peer that cannot be measured here, and why.
    pub fn missing(&self, system: &str, why: &str) {
        println!("{system:<10} not measured: {why}");
    }

    /// One figure.
    pub fn row(&mut self, system: &str, case: &str, metric: &str, value: f64, unit: &str) {
        println!("{system:<10} {case:<34} {metric:<22} {value:>12.2} {unit}");
        if let Some(file) = &mut self.json {
            let bench = self.bench;
            let row = serde_json::json!({
                "bench": bench, "system": system, "case": case, "metric": metric, "value": value, "unit": unit
            });
            writeln!(file, "{row}").expect("the JSON file can be written");
        }
    }
}

/// The middle one of some figures.
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Where benches keep what is dear to make: `MIOSA_CACHE_DIR`, or `~/.cache/miosa`.
pub fn cache_dir() -> std::path::PathBuf {
    let home = || std::path::PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/miosa");
    std::env::var_os("MIOSA_CACHE_DIR").map_or_else(home, Into::into)
}
