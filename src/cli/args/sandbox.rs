//! `miosa sandbox …`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::{CatArgs, ExtractArgs, FileDiffArgs, LsArgs, parse_env, parse_mode, parse_volume};
use crate::api::types::AttachVolumeBody;
use crate::oci::Compression;
use crate::units::{parse_duration, parse_size_mib};

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
        /// Only those with this label; several: with all of them
        #[arg(long, value_name = "TAG")]
        tag: Vec<String>,
    },
    /// Show a sandbox
    #[command(visible_alias = "get")]
    Show(Target),
    /// Write a local file into a sandbox
    WriteFile(WriteFileArgs),
    /// Read a file of a sandbox
    ReadFile(ReadFileArgs),
    /// Copy files and directories into and out of a sandbox
    Cp(CpArgs),
    /// Copy a local file into a sandbox
    Upload(UploadArgs),
    /// Copy a local directory into a sandbox
    UploadDir(UploadDirArgs),
    /// Copy a file or directory out of a sandbox
    Download(DownloadArgs),
    /// Wait until a sandbox can be used
    Wait(WaitArgs),
    /// Show the end of the guest's console
    Logs(LogsArgs),
    /// Run a command in a sandbox; its exit code becomes this command's
    #[command(visible_alias = "run")]
    Exec(ExecArgs),
    /// Open a login shell on a terminal; its exit code becomes this command's
    Shell(ShellArgs),
    /// Make a TCP port of this machine one of the sandbox's, until Ctrl-C
    PortForward(ForwardArgs),
    /// Give a port of the sandbox an address for browsers, and say who may open it
    Preview(PreviewArgs),
    /// Look at detached commands and end them
    #[command(subcommand)]
    Command(DetachedCommand),
    /// End the session, keep the file system, and what runs if that is asked for
    Stop(StopArgs),
    /// Start a session; it goes on with what ran if that was kept
    Resume(ResumeArgs),
    /// Save the present state under a name
    Snapshot(SnapshotArgs),
    /// List, show and delete snapshots
    #[command(subcommand)]
    Snapshots(SnapshotsCommand),
    /// Put the file system back to a snapshot of it
    Restore {
        /// The sandbox
        #[command(flatten)]
        target: Target,
        /// Id or name of the snapshot
        snapshot: String,
    },
    /// Create sandboxes on the present state of another
    Fork(ForkArgs),
    /// Make a container image of a sandbox's files
    Publish(PublishArgs),
    /// Show what a sandbox used over time
    Usage {
        /// The sandbox
        #[command(flatten)]
        target: Target,
        /// How much of the past
        #[command(flatten)]
        period: PeriodArgs,
    },
    /// Show the load of a running sandbox, as its guest tells it
    Metrics(Target),
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

/// `miosa sandbox stop`
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Keep what runs, too: the next session goes on with the same processes
    #[arg(long)]
    pub memory: bool,
}

/// `miosa sandbox resume`
#[derive(Debug, Args)]
pub struct ResumeArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Start from the files, and give up the memory that was kept
    #[arg(long)]
    pub without_memory: bool,
}

/// `miosa sandbox create`
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Start from this template [default: base]
    #[arg(long, value_name = "NAME", conflicts_with = "snapshot")]
    pub template: Option<String>,
    /// Start from this snapshot, by id or by unique name; what ran goes on if its memory was kept
    #[arg(long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// Of a snapshot with memory, take only the files
    #[arg(long, requires = "snapshot")]
    pub without_memory: bool,
    /// Name of the sandbox [default: its id]
    #[arg(long)]
    pub name: Option<String>,
    /// Processors, memory and disk: xs, small, medium, large, xl
    #[arg(long)]
    pub size: Option<String>,
    /// Processors
    #[arg(long, value_name = "N")]
    pub cpu: Option<u32>,
    /// Memory, such as 4gb
    #[arg(long, value_parser = parse_size_mib, value_name = "SIZE")]
    pub memory: Option<u64>,
    /// Size of the disk; never smaller than the template's
    #[arg(long, value_parser = parse_size_mib, value_name = "SIZE")]
    pub disk: Option<u64>,
    /// How long a session may last; then it is stopped (non-persistent: destroyed) [default: no limit]
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub timeout: Option<Duration>,
    /// How long a session may go unused; then the same [default: no limit]
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub idle_timeout: Option<Duration>,
    /// Environment of every command
    #[arg(long, value_parser = parse_env, value_name = "NAME=VALUE")]
    pub env: Vec<(String, String)>,
    /// What its network reaches: allow, deny-all [default: allow]
    #[arg(long, value_name = "POLICY")]
    pub network_policy: Option<String>,
    /// Deduplicate what it writes with this domain only, and with what all share [default: as what it is created from]
    #[arg(long, value_name = "DOMAIN")]
    pub dedup_domain: Option<String>,
    /// Give it a volume: VOLUME, VOLUME:PATH or VOLUME:PATH:ro
    #[arg(long, value_parser = parse_volume, value_name = "VOLUME")]
    pub volume: Vec<AttachVolumeBody>,
    /// Give this port of it an address for browsers: see miosa sandbox preview
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub publish_port: Vec<u16>,
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

/// What a program finds when it starts
#[derive(Debug, Args)]
pub struct Surroundings {
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Added to the environment
    #[arg(long, value_parser = parse_env, value_name = "NAME=VALUE")]
    pub env: Vec<(String, String)>,
    /// Run as this user
    #[arg(long)]
    pub user: Option<String>,
}

/// `miosa sandbox exec`
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub surroundings: Surroundings,
    /// Kill the command after this long (exit code 124)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub timeout: Option<Duration>,
    /// Run the command on a terminal
    #[arg(long, short, conflicts_with = "timeout")]
    pub tty: bool,
    /// Send it what is typed, also when standard input is a terminal
    #[arg(long, short)]
    pub interactive: bool,
    /// Start the command and answer with its id; it goes on until it ends or the session does
    #[arg(long, conflicts_with_all = ["tty", "interactive"])]
    pub detached: bool,
    /// What a detached command is called
    #[arg(long, requires = "detached")]
    pub name: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `miosa sandbox logs`
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Go on until the session's end
    #[arg(long, short)]
    pub follow: bool,
    /// Every byte as it came, with a terminal's control sequences
    #[arg(long)]
    pub raw: bool,
}

/// `miosa sandbox shell`
#[derive(Debug, Args)]
pub struct ShellArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub surroundings: Surroundings,
}

/// `miosa sandbox port-forward`
#[derive(Debug, Args)]
pub struct ForwardArgs {
    /// The sandbox; a paused one is started by the first connection
    #[command(flatten)]
    pub target: Target,
    /// Port in the sandbox
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub remote: u16,
    /// Port on 127.0.0.1 here; 0 is any that is free [default: the same]
    #[arg(long, value_name = "PORT")]
    pub local: Option<u16>,
}

/// `miosa sandbox preview`
#[derive(Debug, Args)]
pub struct PreviewArgs {
    /// The sandbox; a paused one is started by whoever opens the preview
    #[command(flatten)]
    pub target: Target,
    /// Port in the sandbox
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..), required_unless_present = "list")]
    pub port: Option<u16>,
    /// Path of the page
    #[arg(long, value_name = "PATH", default_value = "/")]
    pub path: String,
    /// Let whoever reaches the daemon's address for previews open it
    #[arg(long, conflicts_with_all = ["expires", "read_only", "private"])]
    pub public: bool,
    /// Let only those open it who have a link, as is the default
    #[arg(long)]
    pub private: bool,
    /// A link that is good for so long only
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub expires: Option<Duration>,
    /// A link to look and not to change: GET, HEAD and OPTIONS
    #[arg(long)]
    pub read_only: bool,
    /// Make all links that were given so far void; then as otherwise
    #[arg(long)]
    pub revoke: bool,
    /// Take the address away
    #[arg(long, conflicts_with_all = ["public", "private", "expires", "read_only", "revoke"])]
    pub delete: bool,
    /// List the sandbox's previews
    #[arg(long, conflicts_with_all = ["port", "public", "private", "expires", "read_only", "revoke", "delete"])]
    pub list: bool,
}

/// `miosa sandbox command`
#[derive(Debug, Subcommand)]
pub enum DetachedCommand {
    /// List the session's detached commands: those that run and the last ones that have ended
    #[command(visible_alias = "ls")]
    List(Target),
    /// Show a detached command
    #[command(visible_alias = "show")]
    Get(DetachedTarget),
    /// Write what is kept of its output, the last 256 KiB
    Logs {
        /// The command
        #[command(flatten)]
        target: DetachedTarget,
        /// Go on until it has ended
        #[arg(long, short)]
        follow: bool,
    },
    /// End it: SIGTERM and, five seconds later, SIGKILL
    Kill {
        /// The command
        #[command(flatten)]
        target: DetachedTarget,
        /// Only send this signal, such as INT or 2
        #[arg(long, short)]
        signal: Option<String>,
    },
}

/// A detached command.
#[derive(Debug, Args)]
pub struct DetachedTarget {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Id of the command, or its number in the guest
    #[arg(value_name = "ID")]
    pub id: String,
}

/// `miosa sandbox cp`
#[derive(Debug, Args)]
pub struct CpArgs {
    /// A local path, or SANDBOX:/path
    pub from: String,
    /// A local path, or SANDBOX:/path; into a directory that is there
    pub to: String,
    /// Copy directories with all that is in them
    #[arg(long, short)]
    pub recursive: bool,
}

/// `miosa sandbox upload`
#[derive(Debug, Args)]
pub struct UploadArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Local file
    pub file: PathBuf,
    /// Absolute path in the sandbox [default: /workspace/]
    pub path: Option<String>,
}

/// `miosa sandbox upload-dir`
#[derive(Debug, Args)]
pub struct UploadDirArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Local directory; what is in it is copied
    pub dir: PathBuf,
    /// Absolute path of a directory in the sandbox [default: /workspace]
    pub path: Option<String>,
    /// Remove what is in the sandbox's directory and not in the local one
    #[arg(long)]
    pub delete: bool,
}

/// `miosa sandbox download`
#[derive(Debug, Args)]
pub struct DownloadArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Absolute path in the sandbox
    pub path: String,
    /// Write here [default: its name, here]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `miosa sandbox wait`
#[derive(Debug, Args)]
pub struct WaitArgs {
    /// The sandbox
    #[command(flatten)]
    pub target: Target,
    /// Until something listens on this TCP port of its loopback, too
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Give up after this long
    #[arg(long, value_parser = parse_duration, default_value = "5m", value_name = "DURATION")]
    pub timeout: Duration,
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
    /// With what runs: sandboxes made from it go on with the same processes
    #[arg(long)]
    pub memory: bool,
    /// End the session afterwards
    #[arg(long)]
    pub stop: bool,
    /// Delete the snapshot by itself so long after its last use, such as 14d
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub expiration: Option<Duration>,
    /// Then delete the oldest snapshots of the sandbox, so that so many are left
    #[arg(long, value_name = "N")]
    pub keep_last_snapshots: Option<u32>,
}

/// `miosa sandbox snapshots`
#[derive(Debug, Subcommand)]
pub enum SnapshotsCommand {
    /// List snapshots of a sandbox, or all
    List {
        /// Id or name of the sandbox
        sandbox: Option<String>,
    },
    /// Draw what came from what, with sizes and ages
    Tree {
        /// Id or name of a sandbox: what it came from, and what came from it [default: everything]
        sandbox: Option<String>,
    },
    /// Show a snapshot
    #[command(visible_alias = "show")]
    Get(SnapshotTarget),
    /// Delete a snapshot
    #[command(visible_aliases = ["rm", "destroy"])]
    Delete(SnapshotTarget),
    /// Show which files differ between two snapshots, or a snapshot and a sandbox's present state
    Diff(FileDiffArgs),
    /// List a directory of a snapshot
    Ls(LsArgs),
    /// Write a file of a snapshot to stdout
    Cat(CatArgs),
    /// Write a file or directory of a snapshot to a tar archive
    Extract(ExtractArgs),
    /// Write a snapshot to a file that another host imports
    Export(SnapshotExportArgs),
    /// Take such a file in
    Import(SnapshotImportArgs),
}

/// `miosa sandbox snapshots export`
#[derive(Debug, Args)]
pub struct SnapshotExportArgs {
    /// Id or name of the snapshot; of a sandbox for its present state
    pub snapshot: String,
    /// A file, or - for stdout
    pub file: PathBuf,
}

/// `miosa sandbox snapshots import`
#[derive(Debug, Args)]
pub struct SnapshotImportArgs {
    /// A file, or - for stdin
    pub file: PathBuf,
    /// Name of the snapshot [default: as it was]
    #[arg(long)]
    pub name: Option<String>,
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
    /// With what runs: the children go on with the same processes, each for itself
    #[arg(long)]
    pub memory: bool,
    /// How long a session of the child may last [default: as the parent's]
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub timeout: Option<Duration>,
    /// Start a session in each child and return when it can be used
    #[arg(long)]
    pub wait: bool,
}

/// A stretch of the past.
#[derive(Debug, Args)]
pub struct PeriodArgs {
    /// How far back from now: 24h, 7d, 30d, month-to-date
    #[arg(long, value_name = "PERIOD", default_value = "30d", conflicts_with = "start")]
    pub period: String,
    /// From this time on, such as 2026-01-31T00:00:00Z
    #[arg(long, value_name = "TIME")]
    pub start: Option<String>,
    /// Until this time [default: now]
    #[arg(long, value_name = "TIME")]
    pub end: Option<String>,
    /// List sessions and not sums
    #[arg(long)]
    pub sessions: bool,
    /// Look now at what is kept, before answering
    #[arg(long, conflicts_with = "sessions")]
    pub measure: bool,
}

/// `miosa sandbox publish`
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("to").required(true).multiple(true).args(["output", "docker"]))]
pub struct PublishArgs {
    /// Id or name of the sandbox, or of a snapshot
    #[arg(value_name = "SANDBOX")]
    pub key: String,
    /// What becomes the image, at the same path in it; / is the whole file system
    #[arg(long, default_value = "/workspace")]
    pub path: String,
    /// Write the image here as an OCI archive, or - for stdout
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Load the image into the local Docker
    #[arg(long)]
    pub docker: bool,
    /// What the image is called [default: the sandbox's name, and latest]
    #[arg(long, value_name = "NAME:TAG")]
    pub tag: Option<String>,
    /// A template or snapshot whose file system lies below the path
    #[arg(long, value_name = "TEMPLATE")]
    pub base: Option<String>,
    /// What the image runs: a line for sh -c, or a JSON list of words
    #[arg(long, value_name = "COMMAND", value_parser = parse_words)]
    pub cmd: Option<Words>,
    /// What runs the command, written in the same way
    #[arg(long, value_name = "COMMAND", value_parser = parse_words)]
    pub entrypoint: Option<Words>,
    /// Environment of the image; the sandbox's own is not taken along
    #[arg(long, value_parser = parse_env, value_name = "NAME=VALUE")]
    pub env: Vec<(String, String)>,
    /// A port that the image listens on, such as 3000 or 53/udp
    #[arg(long, value_name = "PORT")]
    pub port: Vec<String>,
    /// Where the command starts [default: the path, if it is a directory]
    #[arg(long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// Who the command runs as
    #[arg(long)]
    pub user: Option<String>,
    /// How layers are compressed: gzip, zstd, none
    #[arg(long, value_name = "NAME", default_value = "gzip", value_parser = parse_compression)]
    pub compression: Compression,
}

/// A command as its words.
pub type Words = Vec<String>;

/// As a container file has it: a list in JSON is taken as it is, anything else is a line for the shell.
fn parse_words(text: &str) -> Result<Words, String> {
    if text.trim_start().starts_with('[') {
        return serde_json::from_str(text).map_err(|e| format!("it begins like a JSON list of words, but: {e}"));
    }
    Ok(["/bin/sh", "-c", text].map(str::to_owned).to_vec())
}

fn parse_compression(name: &str) -> Result<Compression, String> {
    Compression::parse(name).ok_or_else(|| "write gzip, zstd or none".to_owned())
}
