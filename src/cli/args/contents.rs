//! Arguments of what reads the files of disks and snapshots.

use std::path::PathBuf;

use clap::Args;

/// `… ls`
#[derive(Debug, Args)]
pub struct LsArgs {
    /// Id or name; without one, disks or snapshots are listed themselves
    #[arg(value_name = "SNAPSHOT")]
    pub key: Option<String>,
    /// Absolute path
    #[arg(default_value = "/")]
    pub path: String,
    /// Show permissions, owners, sizes and times
    #[arg(short, long)]
    pub long: bool,
    /// Show what is in directories below, too
    #[arg(short = 'R', long)]
    pub recursive: bool,
}

/// `… cat`
#[derive(Debug, Args)]
pub struct CatArgs {
    /// Id or name
    #[arg(value_name = "SNAPSHOT")]
    pub key: String,
    /// Absolute path of a file
    pub path: String,
}

/// `… extract`
#[derive(Debug, Args)]
pub struct ExtractArgs {
    /// Id or name
    #[arg(value_name = "SNAPSHOT")]
    pub key: String,
    /// Absolute path of a file or directory
    #[arg(default_value = "/")]
    pub path: String,
    /// The archive, or - for stdout
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
}

/// `… diff`
#[derive(Debug, Args)]
pub struct FileDiffArgs {
    /// Id or name of the first state
    pub a: String,
    /// Id or name of the second: a snapshot, or a sandbox for its present state
    pub b: String,
}
