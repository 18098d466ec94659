//! The command line: arguments to API calls, answers to text or to one JSON document.
//!
//! Exit codes: 0 done, 1 the user's mistake, 2 the daemon cannot be reached, 3 not allowed, 4 the daemon failed; `exec`
//! passes on its command's own (128 and the signal, 124 for its time limit, 127 and 126 when it could not be started).

mod archives;
mod args;
mod backend;
mod commands;
mod contents;
mod daemon;
mod disk;
mod doctor;
mod examples;
mod exec;
mod files;
mod images;
mod logs;
mod output;
mod ports;
mod previews;
mod publish;
mod report;
mod sandbox;
mod save;
mod store;
mod template;
mod terminal;
mod transfer;
mod tree;
mod usage;
mod volume;

use std::process::ExitCode;

use clap::FromArgMatches;
use clap::error::ErrorKind;
use tracing_subscriber::EnvFilter;

use crate::config::{Config, ConfigError, Flags, LogFormat};
use crate::serve;
use args::{Cli, Command};
use output::{Failure, Out, fail};

/// Runs the command of this process's arguments.
pub fn main() -> ExitCode {
    let matches = examples::grammar().try_get_matches();
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => return misused(&error),
    };
    let json = cli.global.json;
    let (config, broken) = match (configuration(&cli), &cli.command) {
        (Ok(config), _) => (config, None),
        // These need none, or say so among the rest.
        (Err(error), Command::Doctor { .. } | Command::Completion { .. } | Command::Man { .. }) => {
            (Config::default(), Some(error))
        }
        (Err(error), _) => return fail(json, &Failure::from(error)),
    };
    tell(&cli, &config);
    a_heap_for_each_core();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            return fail(json, &Failure::new(4, "internal_error", format!("no threads could be started: {error}")));
        }
    };
    let may_open_store = matches!(cli.command, Command::Daemon(_) | Command::Disk(_) | Command::Store(_));
    let done = runtime.block_on(run(cli, config, broken));
    if may_open_store {
        // What still works on the store may end; it is closed, so nothing new begins.
        runtime.shutdown_timeout(std::time::Duration::from_secs(10));
        let code = match &done {
            Ok(_) => 0,
            Err(failure) => {
                fail(json, failure);
                failure.exit()
            }
        };
        end_at_once(code);
    }
    // A read of standard input that nobody waits for any more must not hold up the end.
    runtime.shutdown_background();
    match done {
        Ok(code) => code,
        Err(failure) => fail(json, &failure),
    }
}

/// Of the eight heaps a core that glibc would use, threads that come and go leave most half empty (decision 0026). To be called
/// before the first thread is started.
fn a_heap_for_each_core() {
    #[cfg(target_env = "gnu")]
    {
        let cores = std::thread::available_parallelism().map_or(1, |n| i32::try_from(n.get()).unwrap_or(i32::MAX));
        // SAFETY: sets a number of the allocator's, and touches no memory of ours.
        unsafe { nix::libc::mallopt(nix::libc::M_ARENA_MAX, cores.max(2)) };
    }
}

/// Ends the process without the C++ library's destructors: RocksDB has threads of its own that outlive the last handle,
/// and one that meets a destroyed static aborts an end that was in order.
fn end_at_once(code: u8) -> ! {
    // SAFETY: ends the process; no state of ours is looked at afterwards. Standard output and error are not buffered
    // beyond a line, and what is durable is so by the store's own syncs.
    unsafe { nix::libc::_exit(i32::from(code)) }
}

/// Of defaults, file, environment and flags. Commands need it, too: it says where the daemon is.
fn configuration(cli: &Cli) -> Result<Config, ConfigError> {
    // The one setting of the daemon that its callers need, too.
    let none = Flags { socket: std::env::var_os("MIOSA_SOCKET").map(Into::into), ..Flags::default() };
    let flags = if let Command::Daemon(args) = &cli.command { &args.flags } else { &none };
    Config::load(cli.global.config.as_deref(), cli.global.state_dir.clone(), flags)
}

/// Sets up what is told on stderr while things are done: the daemon's log, or what `--debug` asks for.
fn tell(cli: &Cli, config: &Config) {
    let level = match (&cli.command, cli.global.debug) {
        (_, true) => "miosa=debug,storage=debug,vmm=debug",
        (Command::Daemon(_), false) => &config.log_level,
        (_, false) => "off",
    };
    // Where the log cannot be written, saying so on stderr would be a panic: the same place is full.
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(level))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .log_internal_errors(false);
    match (&cli.command, config.log_format) {
        (Command::Daemon(_), LogFormat::Json) => builder.json().flatten_event(true).init(),
        _ => builder.init(),
    }
}

async fn run(cli: Cli, config: Config, broken: Option<ConfigError>) -> output::Result<ExitCode> {
    let out = Out::new(&cli.global);
    vmm::jail::set_users(config.machine_uids.0);
    let place = backend::Place::new(cli.global.endpoint.as_deref(), config.state())?;
    match cli.command {
        Command::Daemon(args) if args.print_config => daemon::print_config(&config).map(|()| ExitCode::SUCCESS),
        Command::Daemon(args) if args.print_systemd_unit => {
            daemon::print_systemd_unit(&config, cli.global.config.as_deref()).map(|()| ExitCode::SUCCESS)
        }
        Command::Daemon(_) => serve::run(config).await.map(|()| ExitCode::SUCCESS).map_err(|error| {
            let failure = Failure::new(error.exit, error.code, error.message);
            match error.hint {
                Some(hint) => failure.hint(hint),
                None => failure,
            }
        }),
        Command::Sandbox(command) => sandbox::run(&place.client, out, command).await,
        Command::Usage { sandbox, period } => {
            usage::run(&place.client, out, sandbox.as_deref(), &period).await.map(|()| ExitCode::SUCCESS)
        }
        Command::Template(command) => template::run(&place.client, out, command).await.map(|()| ExitCode::SUCCESS),
        Command::Volume(command) => volume::run(&place.client, out, command).await.map(|()| ExitCode::SUCCESS),
        Command::Disk(command) => disk::run(&place, out, command).await.map(|()| ExitCode::SUCCESS),
        Command::Completion { shell } => examples::completion(shell).map(|()| ExitCode::SUCCESS),
        Command::Man { dir } => examples::man(&dir).map(|()| ExitCode::SUCCESS),
        Command::Doctor { fix } => {
            doctor::run(&place, out, (&config, broken.as_ref()), fix).await.map(|()| ExitCode::SUCCESS)
        }
        Command::Store(command) => store::run(&place, out, command).await.map(|()| ExitCode::SUCCESS),
    }
}

fn absolute(path: std::path::PathBuf) -> output::Result<std::path::PathBuf> {
    std::path::absolute(&path)
        .map_err(|e| Failure::user("invalid_input", format!("the path {} cannot be used: {e}", path.display())))
}

/// Help and version are answers; everything else is the user's mistake.
fn misused(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    // The arguments did not parse, so whether JSON is wanted is seen without them.
    let said = std::env::args_os().skip(1).take_while(|a| a != "--").any(|a| a == "--json");
    let falsy = |v: &std::ffi::OsString| {
        matches!(v.to_ascii_lowercase().to_str(), Some("" | "0" | "n" | "no" | "f" | "false" | "off"))
    };
    if !said && std::env::var_os("MIOSA_JSON").is_none_or(|v| falsy(&v)) {
        let _ = error.print();
        return ExitCode::from(1);
    }
    let text = error.render().to_string();
    let mut parts = text.splitn(2, "\n\n");
    let message = parts.next().unwrap_or_default().trim_start_matches("error: ").replace('\n', " ");
    let failure = Failure::user("usage", message);
    let rest = parts.next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    fail(true, &if rest.is_empty() { failure } else { failure.hint(rest) })
}
