//! Front ends beside those of others: vhost-user-blk and FUSE, each driven in the same way as qemu-storage-daemon's, and
//! FUSE also as nbdkit's file plugin under nbdfuse.
//!
//! `cargo bench --bench frontend [-- --only TEXT] [--json FILE] [--rounds N] [--size MIB] [--milliseconds N]
//! [--alone] [--sealing]`: three rounds of 0.3 s a job on 192 MiB, and with peers, unless told otherwise. Parts are
//! named by front end and case, such as `fuse, fresh`. Every system serves a disk of the same content, on the same file
//! system, from processes of its own; their processor time is counted. vhost-user is driven by a driver of ours with a
//! thread a queue that sleeps until it is called; FUSE by io_uring past the page cache. The systems of a job take turns,
//! round by round; a figure is the median of the rounds, a ratio that of the rounds' ratios. Quantiles are of all rounds.
//!
//! A job begins with nothing unflushed. Writes are volatile until a flush, with O_DIRECT as well; what a flush at their end
//! takes is told beside (*with a closing flush*), and counted as processor time.
//!
//! Our store seals nothing meanwhile: what the log takes is measured, not what becomes of it later. With `--sealing` it does
//! once the log exceeds its limit, as the daemon's would, and then a job with many writes also pays for those before it.
//!
//! Every read is checked for being of the right block, and each case begins with a comparison of whole blocks, read and
//! written at depth 32. The FUSE export of qemu-storage-daemon 7.2 fails it: the line says how many blocks were wrong, and
//! its figures are those of a server that answers wrongly.
//!
//! Needs root for FUSE. `apt-get install qemu-utils nbdkit libnbd-bin` for the peers.

mod harness;

#[path = "../tests/frontend/driver.rs"]
mod driver;
#[path = "frontend/images.rs"]
mod images;
#[path = "frontend/jobs.rs"]
mod jobs;
#[path = "frontend/lanes.rs"]
mod lanes;
#[path = "frontend/servers.rs"]
mod servers;

use harness::load::{MIB, forget_files};
use harness::{Report, Samples, argument, median, tools};
use images::Case;
use jobs::{JOBS, Job, Lane, Limit, Outcome};
use servers::{Export, Server, System};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One cold read a frame in four: more would find what others have brought.
const COLD_READ_EVERY: u64 = 4 * (64 << 10);

struct Settings {
    rounds: usize,
    size: u64,
    time: Duration,
    alone: bool,
}

impl Settings {
    fn read() -> Self {
        let value = |name: &str, or: u64| argument(name).map_or(or, |value| value.parse().expect("a number"));
        Self {
            rounds: value("--rounds", 3) as usize,
            size: value("--size", 192) * MIB,
            time: Duration::from_millis(value("--milliseconds", 300)),
            alone: std::env::args().any(|arg| arg == "--alone"),
        }
    }
}

/// A system with its disk, served or not.
struct Served {
    system: System,
    dir: PathBuf,
    attached: Option<Attached>,
    /// What its rounds came to, by job.
    results: Vec<Vec<Measured>>,
}

/// In this order they are let go of.
struct Attached {
    lanes: Vec<Box<dyn Lane>>,
    _connection: Option<Box<dyn Send>>,
    server: Server,
}

struct Measured {
    outcome: Outcome,
    cpu_seconds: f64,
}

impl Measured {
    fn per_second(&self) -> f64 {
        self.outcome.operations as f64 / self.outcome.seconds
    }
}

impl Attached {
    fn new(system: System, export: Export, dir: &Path, size: u64) -> Result<Self, String> {
        let server = Server::start(system, export, dir, size)?;
        let said = |e: std::io::Error| e.to_string();
        let (connection, lanes) = match export {
            Export::VhostUser => lanes::vhost_user(&server.place).map(|(c, lanes)| (Some(c), lanes)).map_err(said)?,
            Export::Fuse => (None, lanes::uring(&server.place, !system.writes()).map_err(said)?),
        };
        Ok(Self { lanes, _connection: connection, server })
    }

    fn run(&mut self, job: Job, size: u64, limit: Limit, seed: u64) -> Result<Measured, String> {
        let before = self.server.cpu_seconds();
        let outcome = jobs::run(&mut self.lanes, job, size, limit, seed).map_err(|e| e.to_string())?;
        Ok(Measured { outcome, cpu_seconds: self.server.cpu_seconds() - before })
    }
}

/// What is compared, and what the ratio is to be.
fn target(export: Export, case: Case, job: Job, peer: System) -> Option<f64> {
    match (export, peer) {
        (Export::VhostUser, System::QsdRaw) => Some(1.0),
        (Export::VhostUser, System::QsdQcow2) => Some(1.5),
        (Export::Fuse, System::QsdRaw | System::Nbdfuse) => Some(1.5),
        (_, System::QsdCompressed) if case == Case::Cold && job.is_sequential() => Some(1.0),
        _ => None,
    }
}

/// The systems of a part, ours first.
fn systems(export: Export, case: Case) -> Vec<System> {
    let mut systems = vec![System::Miosa, System::QsdRaw, System::QsdQcow2];
    if case == Case::Cold {
        systems.push(System::QsdCompressed);
    }
    if export == Export::Fuse {
        systems.push(System::Nbdfuse);
        if case == Case::Warm {
            systems.push(System::NullFuse);
        }
    }
    systems
}

fn jobs_of(system: System, case: Case) -> impl Iterator<Item = (usize, Job)> {
    JOBS.into_iter().enumerate().filter(move |(i, job)| match system {
        System::NullFuse => *i == 0,
        System::QsdCompressed => job.is_sequential() && job.only_reads(),
        _ => job.only_reads() || !case.only_reads(),
    })
}

/// Ratios and their targets, of all parts.
#[derive(Default)]
struct Verdicts {
    lines: Vec<(String, f64, f64)>,
    /// Blocks that our own front ends got wrong.
    wrong: u64,
}

fn part(report: &mut Report, settings: &Settings, base: &[u8], root: &Path, part: (Export, Case), all: &mut Verdicts) {
    let (export, case) = part;
    let mut served = Vec::new();
    for system in systems(export, case) {
        if settings.alone && system != System::Miosa {
            continue;
        }
        if let Some(program) = servers::missing(system) {
            report.missing(system.name(), &format!("{program} is not installed"));
            continue;
        }
        let dir = root.join(format!("{}-{}", served.len(), if export == Export::Fuse { "f" } else { "v" }));
        let made = images::make(system, case, base, &dir);
        let mut one = Served { system, dir, attached: None, results: Vec::new() };
        one.results.resize_with(JOBS.len(), Vec::new);
        match made.and_then(|()| first_look(report, settings, &mut one, part, all)) {
            Ok(()) => served.push(one),
            Err(e) => failed(report, system, &e),
        }
    }
    for round in 0..settings.rounds {
        for (i, job) in JOBS.into_iter().enumerate() {
            for turn in 0..served.len() {
                // Nobody is always first.
                let one = (turn + round) % served.len();
                let one = &mut served[one];
                if !jobs_of(one.system, case).any(|(of, _)| of == i) {
                    continue;
                }
                match measure(settings, one, export, job, round) {
                    Ok(measured) => {
                        if one.system == System::Miosa {
                            all.wrong += measured.outcome.wrong;
                        }
                        one.results[i].push(measured);
                    }
                    Err(e) => failed(report, one.system, &format!("{}: {e}", job.name)),
                }
            }
        }
    }
    tell(report, settings, part, &served, all);
    for one in served {
        drop(one.attached);
        let _ = std::fs::remove_dir_all(&one.dir);
    }
}

fn failed(report: &Report, system: System, why: &str) {
    assert!(system != System::Miosa, "our own front end: {why}");
    report.missing(system.name(), why);
}

fn part_name(export: Export, case: Case) -> String {
    let export = if export == Export::Fuse { "fuse" } else { "vhost-user" };
    format!("{export}, {}", case.name())
}

/// Attaches the disk, compares blocks, and reads all of it once where it is not to be cold.
fn first_look(
    report: &mut Report,
    settings: &Settings,
    one: &mut Served,
    (export, case): (Export, Case),
    all: &mut Verdicts,
) -> Result<(), String> {
    let mut attached = Attached::new(one.system, export, &one.dir, settings.size)?;
    if one.system != System::NullFuse {
        let writes = !case.only_reads() && one.system.writes();
        let looked = jobs::check(&mut *attached.lanes[0], settings.size, |block| case.version(block), writes, 7);
        let (wrong, of) = looked.map_err(|e| e.to_string())?;
        let name = format!("{}, comparison at QD 32", part_name(export, case));
        report.row(one.system.name(), &name, &format!("wrong blocks of {of}"), wrong as f64, "");
        if one.system == System::Miosa {
            all.wrong += wrong;
        }
    }
    if case == Case::Cold {
        return Ok(());
    }
    let whole = Limit { time: Duration::from_secs(600), bytes: settings.size };
    attached.run(JOBS[4], settings.size, whole, 1)?;
    one.attached = Some(attached);
    Ok(())
}

fn measure(settings: &Settings, one: &mut Served, export: Export, job: Job, round: usize) -> Result<Measured, String> {
    let seed = round as u64 + 2;
    if let Some(attached) = &mut one.attached {
        let limit = Limit { time: settings.time, bytes: u64::MAX };
        return attached.run(job, settings.size, limit, seed);
    }
    forget_files(&one.dir);
    let mut attached = Attached::new(one.system, export, &one.dir, settings.size)?;
    let bytes = if job.is_sequential() { settings.size } else { settings.size / COLD_READ_EVERY * jobs::BLOCK as u64 };
    attached.run(job, settings.size, Limit { time: Duration::from_secs(60), bytes }, seed)
}

/// Rows of a part.
fn tell(
    report: &mut Report,
    settings: &Settings,
    (export, case): (Export, Case),
    served: &[Served],
    all: &mut Verdicts,
) {
    let name = part_name(export, case);
    let middle = |of: &[Measured], figure: &dyn Fn(&Measured) -> f64| median(of.iter().map(figure).collect());
    for (i, job) in JOBS.into_iter().enumerate() {
        let title = format!("{name}, {}", job.name);
        let mut p50 = Vec::new();
        for one in served.iter().filter(|one| !one.results[i].is_empty()) {
            let (system, results) = (one.system.name(), &one.results[i]);
            report.row(system, &title, "operations", middle(results, &Measured::per_second), "/s");
            let rate = |m: &Measured| m.outcome.bytes as f64 / 1e6 / m.outcome.seconds;
            report.row(system, &title, "throughput", middle(results, &rate), "MB/s");
            if !job.only_reads() {
                let rate = |m: &Measured| m.outcome.operations as f64 / (m.outcome.seconds + m.outcome.flush_seconds);
                report.row(system, &title, "with a closing flush", middle(results, &rate), "/s");
            }
            let mut samples = Samples::default();
            results.iter().flat_map(|m| &m.outcome.latencies).for_each(|latency| samples.push(*latency));
            for (metric, share) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
                report.row(system, &title, metric, samples.quantile_us(share), "us");
            }
            p50.push((one.system, samples.quantile_us(0.5)));
            let cpu = |m: &Measured| m.cpu_seconds / (m.outcome.bytes as f64 / 1e9);
            report.row(system, &title, "processor time", middle(results, &cpu), "s/GB");
            let wrong: u64 = results.iter().map(|m| m.outcome.wrong).sum();
            if wrong > 0 && one.system != System::NullFuse {
                report.row(system, &title, "blocks of another place", wrong as f64, "");
            }
        }
        let Some(ours) = served.iter().find(|one| one.system == System::Miosa) else { continue };
        for peer in served.iter().filter(|one| !matches!(one.system, System::Miosa | System::NullFuse)) {
            let rounds = ours.results[i].iter().zip(&peer.results[i]);
            let ratios: Vec<f64> = rounds.map(|(a, b)| a.per_second() / b.per_second()).collect();
            if ratios.len() < settings.rounds {
                continue;
            }
            let ratio = median(ratios);
            report.row("miosa", &title, &format!("ratio to {}", peer.system.name()), ratio, "x");
            if !job.only_reads() {
                let time = |m: &Measured| (m.outcome.seconds + m.outcome.flush_seconds) / m.outcome.operations as f64;
                let rounds = ours.results[i].iter().zip(&peer.results[i]);
                let ratio = median(rounds.map(|(a, b)| time(b) / time(a)).collect());
                let metric = format!("ratio to {}, flushed", peer.system.name());
                report.row("miosa", &title, &metric, ratio, "x");
            }
            if let Some(target) = target(export, case, job, peer.system) {
                all.lines.push((format!("{title}, to {}", peer.system.name()), ratio, target));
            }
        }
        let of = |system: System| p50.iter().find(|(of, _)| *of == system).map(|(_, p50)| *p50);
        if let (Some(ours), Some(null)) = (of(System::Miosa), of(System::NullFuse)) {
            report.row("miosa", &title, "p50 above null FUSE's", ours - null, "us");
        }
    }
}

fn main() {
    servers::serve_if_asked_to();
    tools::own_mounts();
    let settings = Settings::read();
    let dir = tempfile::tempdir().expect("a directory");
    servers::clean_up_when_told_to_end(dir.path().to_owned());
    let mut report = Report::new("frontend");
    let base = images::base(settings.size);
    let mut all = Verdicts::default();
    for export in [Export::VhostUser, Export::Fuse] {
        for case in Case::ALL {
            if report.wants(&part_name(export, case)) {
                part(&mut report, &settings, &base, dir.path(), (export, case), &mut all);
            }
        }
    }
    let missed: Vec<_> = all.lines.iter().filter(|(_, ratio, target)| ratio < target).collect();
    println!("\n{} of {} ratios reach their target", all.lines.len() - missed.len(), all.lines.len());
    for (what, ratio, target) in missed {
        println!("missed: {what}: {ratio:.2}, target {target}");
    }
    drop(dir);
    assert_eq!(all.wrong, 0, "our own front ends gave wrong blocks");
}
