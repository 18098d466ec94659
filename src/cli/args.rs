//! The command line's grammar: one module a group of commands.

mod contents;
mod daemon;
mod disk;
mod sandbox;
mod store;
mod template;
mod volume;

use std::path::PathBuf;

use clap::builder::FalseyValueParser;
use clap::{Args, Parser, Subcommand};

use crate::api::types::AttachVolumeBody;

pub use contents::*;
pub use daemon::*;
pub use disk::*;
pub use sandbox::*;
pub use store::*;
pub use template::*;
pub use volume::*;

/// Persistent sandboxes on your own machine: create, exec, snapshot, fork, stop, resume.
#[derive(Debug, Parser)]
#[command(name = "miosa", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Print one JSON document on stdout, and errors as JSON on stderr
    #[arg(long, global = true, env = "MIOSA_JSON", value_parser = FalseyValueParser::new(), help_heading = "Global options")]
    pub json: bool,
    /// Print ids only, and no progress
    #[arg(long, short, global = true, env = "MIOSA_QUIET", value_parser = FalseyValueParser::new(), help_heading = "Global options")]
    pub quiet: bool,
    /// No colours
    #[arg(long, global = true, env = "MIOSA_NO_COLOR", value_parser = FalseyValueParser::new(), help_heading = "Global options")]
    pub no_color: bool,
    /// Tell what is done, on stderr
    #[arg(long, global = true, env = "MIOSA_DEBUG", value_parser = FalseyValueParser::new(), help_heading = "Global options")]
    pub debug: bool,
    /// Where the daemon keeps its state and its socket [default: /var/lib/miosa for root, else ~/.local/state/miosa]
    #[arg(long, global = true, env = "MIOSA_STATE_DIR", value_name = "DIR", help_heading = "Global options")]
    pub state_dir: Option<PathBuf>,
    /// Settings of the daemon and where it is [default: ~/.config/miosa/config.toml, else /etc/miosa/config.toml]
    #[arg(long, global = true, env = "MIOSA_CONFIG", value_name = "FILE", help_heading = "Global options")]
    pub config: Option<PathBuf>,
    /// Where the daemon listens: http://HOST:PORT (with MIOSA_API_KEY), or unix:///PATH [default: its socket]
    #[arg(long, global = true, env = "MIOSA_ENDPOINT", value_name = "URL", help_heading = "Global options")]
    pub endpoint: Option<String>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon
    Daemon(DaemonArgs),
    /// Create and use sandboxes
    #[command(subcommand, visible_alias = "sandboxes")]
    Sandbox(SandboxCommand),
    /// Build and list templates
    #[command(subcommand, visible_alias = "templates")]
    Template(TemplateCommand),
    /// Keep data apart from sandboxes, on disks that are attached to them
    #[command(subcommand, visible_alias = "volumes")]
    Volume(VolumeCommand),
    /// Use the store's disks without sandboxes, with or without a daemon
    #[command(subcommand, visible_alias = "disks")]
    Disk(DiskCommand),
    /// Show what sandboxes used over time: compute, and what was saved for them
    Usage {
        /// Id or name of a sandbox [default: all]
        sandbox: Option<String>,
        /// How much of the past
        #[command(flatten)]
        period: PeriodArgs,
    },
    /// See whether this machine has what the daemon needs, and what to do where not
    Doctor {
        /// Install packages and load modules that are missing, as root, and look again
        #[arg(long)]
        fix: bool,
    },
    /// Print a script that completes commands, for a shell to read
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages to a directory
    Man {
        /// The directory
        dir: PathBuf,
    },
    /// Look after the block store, with or without a daemon
    #[command(subcommand)]
    Store(StoreCommand),
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("'{text}' is not NAME=VALUE")),
    }
}

/// `VOLUME[:PATH[:ro]]`
fn parse_volume(text: &str) -> Result<AttachVolumeBody, String> {
    let mut parts = text.splitn(3, ':');
    let volume_id = parts.next().unwrap_or_default().to_owned();
    let mount_path = parts.next().filter(|path| !path.is_empty()).map(str::to_owned);
    let read_only = match parts.next() {
        None | Some("rw") => None,
        Some("ro") => Some(true),
        Some(other) => return Err(format!("'{other}' is neither 'ro' nor 'rw'")),
    };
    match volume_id.is_empty() {
        true => Err(format!("'{text}' is not VOLUME, VOLUME:PATH or VOLUME:PATH:ro")),
        false => Ok(AttachVolumeBody { volume_id, mount_path, read_only }),
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        _ => Err(format!("'{text}' is not a file mode; write octal digits, such as 644")),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    fn parse(line: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"miosa").chain(line))
    }

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_pages_lines_parse() {
        for line in [
            &["sandbox", "create", "--template", "nextjs", "--name", "w", "--timeout", "1h", "--wait", "--json"][..],
            &["sandbox", "write-file", "sb-1", "/workspace/app/page.jsx", "./page.jsx", "--json"],
            &["sandbox", "exec", "sb-1", "--json", "--", "sh", "-lc", "cd /workspace && npm install"],
            &["sandbox", "stop", "sb-1", "--json"],
            &["sandbox", "resume", "sb-1", "--json"],
            &["sandbox", "destroy", "sb-1", "--json"],
            &["sandbox", "snapshot", "sb-1", "--name", "after dependencies installed", "--json"],
            &["sandbox", "snapshots", "list", "sb-1", "--json"],
            &["sandbox", "create", "--snapshot", "snap-1", "--name", "r", "--timeout", "1h", "--wait", "--json"],
            &["sandbox", "fork", "sb-1", "--name", "b", "--json"],
            &[
                "sandbox",
                "create",
                "--template",
                "node",
                "--name",
                "o",
                "--timeout",
                "10m",
                "--non-persistent",
                "--json",
            ],
            &["sandboxes", "ls"],
            &["sandbox", "rm", "sb-1"],
            &["sandbox", "run", "sb-1", "--", "true"],
            &["--json", "store", "stats"],
        ] {
            let cli = parse(line).unwrap_or_else(|e| panic!("{line:?}: {e}"));
            assert_eq!(cli.global.json, line.contains(&"--json"), "{line:?}");
        }
    }

    #[test]
    fn options_after_the_dashes_are_the_commands_own() {
        let cli = parse(&["sandbox", "exec", "sb-1", "--", "echo", "--json", "--", "-x"]).unwrap();
        assert!(!cli.global.json);
        let Command::Sandbox(SandboxCommand::Exec(exec)) = cli.command else { panic!("not an exec") };
        assert_eq!(exec.command, ["echo", "--json", "--", "-x"]);
    }

    #[test]
    fn bad_values_are_refused() {
        for line in [
            &["sandbox", "create", "--timeout", "1w"][..],
            &["sandbox", "create", "--timeout", "-5"],
            &["sandbox", "create", "--memory", "4tb"],
            &["sandbox", "create", "--env", "NOVALUE"],
            &["sandbox", "create", "--volume", ":/data"],
            &["sandbox", "create", "--volume", "data:/data:no"],
            &["volume", "create", "data"],
            &["volume", "create", "data", "--size", "1gb", "--snapshot", "s"],
            &["sandbox", "create", "--template", "a", "--snapshot", "b"],
            &["sandbox", "exec", "sb-1"],
            &["sandbox", "exec", "sb-1", "--"],
            &["sandbox", "write-file", "sb-1", "/x", "y", "--mode", "999"],
            &["sandbox", "stop"],
            &["sandbox", "nonsense"],
        ] {
            assert!(parse(line).is_err(), "{line:?} was accepted");
        }
    }
}
