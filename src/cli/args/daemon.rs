//! `miosa daemon`.

use clap::Args;

pub use crate::config::DiskFrontendArg;
use crate::config::Flags;

/// `miosa daemon`
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// What the configuration file can say, too.
    #[command(flatten)]
    pub flags: Flags,
    /// Print what results of defaults, file, environment and flags, as a configuration file, and end
    #[arg(long, conflicts_with = "print_systemd_unit")]
    pub print_config: bool,
    /// Print a systemd unit for this program and configuration, and end
    #[arg(long)]
    pub print_systemd_unit: bool,
}
