//! The command line's grammar.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::FalseyValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::units::{parse_duration, parse_size_mib};

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
    /// Use the store's disks without sandboxes, with or without a daemon
    #[command(subcommand, visible_alias = "disks")]
    Disk(DiskCommand),
    /// Look after the block store, with or without a daemon
    #[command(subcommand)]
    Store(StoreCommand),
}

/// `miosa daemon`
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Where downloads and built images are kept [default: ~/.cache/miosa]
    #[arg(long, env = "MIOSA_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// The guest's agent, a static program [default: miosa-agent next to miosa]
    #[arg(long, env = "MIOSA_AGENT", value_name = "FILE")]
    pub agent: Option<PathBuf>,
    /// How disks are shown to machines
    #[arg(long, value_enum, default_value_t = DiskFrontendArg::VhostUser)]
    pub disk_frontend: DiskFrontendArg,
    /// How machines are accelerated
    #[arg(long, value_enum, env = "MIOSA_ACCEL", default_value_t = AccelArg::Tcg)]
    pub accel: AccelArg,
    /// Network of machines
    #[arg(long, value_enum, default_value_t = NetworkArg::User)]
    pub network: NetworkArg,
    /// Memory of a sandbox that does not ask for any
    #[arg(long, value_parser = parse_size_mib, default_value = "2gb", value_name = "SIZE")]
    pub default_memory: u64,
    /// Processors of a sandbox that does not ask for any
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub default_cpus: u32,
    /// How long a machine may take to boot
    #[arg(long, value_parser = parse_duration, default_value = "2m", value_name = "DURATION")]
    pub boot_timeout: Duration,
    /// How long a guest may take to shut down before it is killed
    #[arg(long, value_parser = parse_duration, default_value = "45s", value_name = "DURATION")]
    pub stop_timeout: Duration,
    /// Added to the guest kernel's command line
    #[arg(long, value_name = "WORD")]
    pub kernel_arg: Vec<String>,
    /// For tests: `fake` runs no machine but a process that answers as a guest would
    #[arg(long, value_enum, default_value_t = VmmArg::Qemu, hide = true)]
    pub vmm: VmmArg,
}

/// A front end for disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DiskFrontendArg {
    /// A virtio-blk back end, one socket a disk
    VhostUser,
    /// Files in a FUSE mount
    Fuse,
}

/// An accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AccelArg {
    /// QEMU's translator, which works everywhere
    Tcg,
    /// The kernel's virtualisation
    Kvm,
}

/// A network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NetworkArg {
    /// Outgoing connections through the daemon's user
    User,
    /// No network
    None,
}

/// What runs machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VmmArg {
    /// QEMU
    Qemu,
    /// A stand-in
    Fake,
}

/// `miosa sandbox`
#[derive(Debug, Subcommand)]
pub enum SandboxCommand {
    /// Create a sandbox from a template or a snapshot
    Create(CreateArgs),
    /// List sandboxes
    #[command(visible_alias = "ls")]
    List {
        /// Only those in this state; destroyed ones are listed only so
        #[arg(long)]
        state: Option<String>,
    },
    /// Show a sandbox
    #[command(visible_alias = "get")]
    Show(Target),
    /// Write a local file into a sandbox
    WriteFile(WriteFileArgs),
    /// Read a file of a sandbox
    ReadFile(ReadFileArgs),
    /// Run a command in a sandbox; its exit code becomes this command's
    #[command(visible_alias = "run")]
    Exec(ExecArgs),
    /// End the session, keep the file system
    Stop(Target),
    /// Start a session
    Resume(Target),
    /// Save the present state under a name
    Snapshot(SnapshotArgs),
    /// List, show and delete snapshots
    #[command(subcommand)]
    Snapshots(SnapshotsCommand),
    /// Create sandboxes on the present state of another
    Fork(ForkArgs),
    /// Delete a sandbox for good
    #[command(visible_aliases = ["delete", "rm"])]
    Destroy(Target),
    /// Give a running session more time, from now
    Extend {
        /// The sandbox
        #[command(flatten)]
        target: Target,
        /// How much
        #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
        timeout: Option<Duration>,
    },
}

/// A sandbox.
#[derive(Debug, Clone, Args)]
pub struct Target {
    /// Id or name of the sandbox
    #[arg(value_name = "SANDBOX")]
    pub sandbox: String,
}

/// `miosa sandbox create`
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Start from this template [default: base]
    #[arg(long, value_name = "NAME", conflicts_with = "snapshot")]
    pub template: Option<String>,
    /// Start from this snapshot, by id or by unique name
    #[arg(long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// Name of the sandbox [default: its id]
    #[arg(long)]
    pub name: Option<String>,
    /// Processors and memory: xs, small, medium, large, xl
    #[arg(long)]
    pub size: Option<String>,
    /// Processors
    #[arg(long, value_name = "N")]
    pub cpu: Option<u32>,
    /// Memory, such as 4gb
    #[arg(long, value_parser = parse_size_mib, value_name = "SIZE")]
    pub memory: Option<u64>,
    /// The disk must be at least this large; it is as large as the template's
    #[arg(long, value_parser = parse_size_mib, value_name = "SIZE")]
    pub disk: Option<u64>,
    /// How long a session may last; then it is stopped (non-persistent: destroyed) [default: no limit]
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub timeout: Option<Duration>,
    /// Environment of every command
    #[arg(long, value_parser = parse_env, value_name = "NAME=VALUE")]
    pub env: Vec<(String, String)>,
    /// Label the sandbox
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<String>,
    /// Discard the file system when the session ends
    #[arg(long)]
    pub non_persistent: bool,
    /// Do not start a session; the first use does
    #[arg(long, conflicts_with = "wait")]
    pub no_start: bool,
    /// Return when the sandbox can be used, not before
    #[arg(long)]
    pub wait: bool,
}

/// `miosa sandbox exec`
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Added to the environment
    #[arg(long, value_parser = parse_env, value_name = "NAME=VALUE")]
    pub env: Vec<(String, String)>,
    /// Run as this user
    #[arg(long)]
    pub user: Option<String>,
    /// Kill the command after this long (exit code 124)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub timeout: Option<Duration>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `miosa sandbox write-file`
#[derive(Debug, Args)]
pub struct WriteFileArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Absolute path in the sandbox; directories are made
    pub path: String,
    /// Local file, or - for stdin
    pub file: PathBuf,
    /// Permissions in octal [default: as they are, or 644]
    #[arg(long, value_parser = parse_mode, value_name = "MODE")]
    pub mode: Option<u32>,
}

/// `miosa sandbox read-file`
#[derive(Debug, Args)]
pub struct ReadFileArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Absolute path in the sandbox
    pub path: String,
    /// Write here and not to stdout
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `miosa sandbox snapshot`
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Name of the snapshot
    #[arg(long, visible_alias = "comment")]
    pub name: Option<String>,
}

/// `miosa sandbox snapshots`
#[derive(Debug, Subcommand)]
pub enum SnapshotsCommand {
    /// List snapshots of a sandbox, or all
    #[command(visible_alias = "ls")]
    List {
        /// Id or name of the sandbox
        sandbox: Option<String>,
    },
    /// Show a snapshot
    #[command(visible_alias = "show")]
    Get(SnapshotTarget),
    /// Delete a snapshot
    #[command(visible_aliases = ["rm", "destroy"])]
    Delete(SnapshotTarget),
}

/// A snapshot: `SNAPSHOT`, or `SANDBOX SNAPSHOT`.
#[derive(Debug, Args)]
pub struct SnapshotTarget {
    /// Id or name of the snapshot, or of its sandbox with the snapshot after it
    #[arg(value_name = "[SANDBOX] SNAPSHOT", num_args = 1..=2, required = true)]
    pub keys: Vec<String>,
}

/// `miosa sandbox fork`
#[derive(Debug, Args)]
pub struct ForkArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Name of the child; with --count NAME-1, NAME-2 … [default: its id]
    #[arg(long)]
    pub name: Option<String>,
    /// How many children
    #[arg(long, value_name = "N")]
    pub count: Option<u32>,
    /// From this snapshot of the sandbox and not from its present state
    #[arg(long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// How long a session of the child may last [default: as the parent's]
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub timeout: Option<Duration>,
    /// Start a session in each child and return when it can be used
    #[arg(long)]
    pub wait: bool,
}

/// `miosa template`
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Build the template base, or import an image under another name
    Build {
        /// Name of the template
        name: String,
        /// A raw ext4 image to import (the daemon reads it)
        #[arg(long, value_name = "FILE", conflicts_with = "disk")]
        image: Option<PathBuf>,
        /// Size of the disk [default: 10gb]
        #[arg(long, value_parser = parse_size_mib, value_name = "SIZE")]
        disk: Option<u64>,
    },
    /// List templates
    #[command(visible_alias = "ls")]
    List,
    /// Show a template
    #[command(visible_alias = "get")]
    Show {
        /// Name of the template
        name: String,
    },
    /// Delete a template; sandboxes made from it stay
    #[command(visible_aliases = ["rm", "destroy"])]
    Delete {
        /// Name of the template
        name: String,
    },
}

/// `miosa store`
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Show what the store holds and what it costs
    Stats,
    /// Deduplicate and compress everything written so far, and return when it is done
    Seal {
        /// Said for clearness: it is always waited for
        #[arg(long)]
        wait: bool,
    },
    /// Give back the space of what nothing refers to
    Gc {
        /// Only say what that would give back
        #[arg(long)]
        dry_run: bool,
    },
    /// Read everything that is stored and compare it with its checksums; fails when anything is damaged
    Check,
    /// Check everything, and with --heal write anew what is damaged and has an undamaged copy
    Scrub {
        /// Heal what can be healed
        #[arg(long)]
        heal: bool,
    },
    /// Make the catalogue again from packs and log; no daemon may run
    Repair,
    /// Show what each disk and snapshot costs
    Usage,
}

/// `miosa disk`
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make an empty disk
    Create {
        /// Name of the disk
        name: String,
        /// Its size, such as 10gb
        #[arg(long, value_parser = parse_size_mib, value_name = "SIZE")]
        size: u64,
    },
    /// Make a disk of an image
    Import(ImportArgs),
    /// Write a disk or snapshot to a file, with holes where it is empty
    Export {
        /// Id or name
        #[arg(value_name = "DISK|SNAPSHOT")]
        disk: String,
        /// A file, or - for stdout
        file: PathBuf,
    },
    /// List disks, those of sandboxes too
    #[command(visible_alias = "ls")]
    List,
    /// Show a disk or snapshot and what it costs
    #[command(visible_alias = "get")]
    Show(DiskTarget),
    /// Keep a disk's present state under a name
    Snapshot {
        /// Id or name
        #[arg(value_name = "DISK")]
        disk: String,
        /// Name of the snapshot
        #[arg(long)]
        name: String,
    },
    /// List the snapshots of a disk
    Snapshots {
        /// Id or name
        #[arg(value_name = "DISK")]
        disk: String,
    },
    /// Make disks on what another holds now; they cost what is written to them
    Fork {
        /// Id or name
        #[arg(value_name = "DISK|SNAPSHOT")]
        disk: String,
        /// Name of the new disk; with --count NAME-1, NAME-2 …
        #[arg(long)]
        name: String,
        /// How many
        #[arg(long, value_name = "N")]
        count: Option<u32>,
    },
    /// Delete a disk or snapshot; what was made from it stays
    #[command(visible_aliases = ["rm", "destroy"])]
    Delete(DiskTarget),
    /// Show where two disks or snapshots differ
    Diff {
        /// Id or name
        a: String,
        /// Id or name
        b: String,
    },
    /// Show a disk, or a snapshot for reading, as a device; without a daemon until this is interrupted
    Attach {
        /// Id or name
        #[arg(value_name = "DISK|SNAPSHOT")]
        disk: String,
        /// How
        #[arg(long, value_enum)]
        frontend: DiskFrontendArg,
    },
    /// End that
    Detach(DiskTarget),
}

/// A disk or snapshot.
#[derive(Debug, Args)]
pub struct DiskTarget {
    /// Id or name
    #[arg(value_name = "DISK|SNAPSHOT")]
    pub disk: String,
}

/// `miosa disk import`
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// An image, or - for stdin
    pub file: PathBuf,
    /// Name of the disk
    #[arg(long)]
    pub name: String,
    /// What the image is; it is not guessed
    #[arg(long, value_enum, default_value_t = ImageFormat::Raw)]
    pub format: ImageFormat,
}

/// A format of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// The disk's bytes
    Raw,
    /// QEMU's, converted with qemu-img
    Qcow2,
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("'{text}' is not NAME=VALUE")),
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
