//! `miosa daemon`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::units::{parse_duration, parse_size_mib};

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
