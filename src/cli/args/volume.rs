//! `miosa volume …`.

use clap::{Args, Subcommand};

use crate::units::parse_size_mib;

/// `miosa volume`
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume, with an empty file system or as a snapshot of one was
    Create {
        /// Name of the volume
        name: String,
        /// Its size, such as 10gb
        #[arg(long, value_parser = parse_size_mib, value_name = "SIZE", required_unless_present = "snapshot")]
        size: Option<u64>,
        /// The snapshot of a volume it starts as, by id or by unique name
        #[arg(long, value_name = "SNAPSHOT", conflicts_with = "size")]
        snapshot: Option<String>,
        /// Deduplicate what is written to it with this domain only, and with what all share
        #[arg(long, value_name = "DOMAIN")]
        dedup_domain: Option<String>,
    },
    /// List volumes
    #[command(visible_alias = "ls")]
    List,
    /// Show a volume, who has it and what it costs
    #[command(visible_alias = "get")]
    Show(VolumeTarget),
    /// Give a sandbox that is not running a volume; its next session mounts it
    Attach {
        /// Id or name of the volume
        volume: String,
        /// Id or name of the sandbox
        sandbox: String,
        /// Where the guest mounts it [default: /mnt/NAME]
        #[arg(long, value_name = "PATH")]
        mount: Option<String>,
        /// Only read it; others may do so, too
        #[arg(long)]
        read_only: bool,
    },
    /// Take a volume away from a sandbox that is not running
    Detach {
        /// Id or name of the volume
        volume: String,
        /// Id or name of the sandbox; may be left out if only one has it
        sandbox: Option<String>,
    },
    /// Delete a volume that no sandbox has; its snapshots stay
    #[command(visible_alias = "rm")]
    Delete(VolumeTarget),
    /// Save a volume's present state
    Snapshot {
        /// The volume
        #[command(flatten)]
        target: VolumeTarget,
        /// What to call it
        #[arg(long)]
        name: Option<String>,
    },
    /// List and delete snapshots of volumes
    #[command(subcommand)]
    Snapshots(VolumeSnapshotsCommand),
    /// Put a volume that no sandbox has back to a snapshot of it
    Restore {
        /// The volume
        #[command(flatten)]
        target: VolumeTarget,
        /// Id or name of the snapshot
        snapshot: String,
    },
}

/// `miosa volume snapshots`
#[derive(Debug, Subcommand)]
pub enum VolumeSnapshotsCommand {
    /// List the snapshots of a volume, or of all
    #[command(visible_alias = "ls")]
    List {
        /// Id or name of the volume
        volume: Option<String>,
    },
    /// Delete a snapshot; volumes made from it stay
    #[command(visible_alias = "rm")]
    Delete {
        /// Id or unique name of the snapshot
        snapshot: String,
    },
}

/// A volume.
#[derive(Debug, Clone, Args)]
pub struct VolumeTarget {
    /// Id or name of the volume
    #[arg(value_name = "VOLUME")]
    pub volume: String,
}
