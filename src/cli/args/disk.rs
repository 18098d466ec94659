//! `miosa disk …`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{CatArgs, DiskFrontendArg, ExtractArgs, LsArgs};
use crate::units::parse_size_mib;

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
        /// Deduplicate what is written to it with this domain only, and with what all share
        #[arg(long, value_name = "DOMAIN")]
        dedup_domain: Option<String>,
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
        /// As what
        #[arg(long, value_enum, default_value_t = ExportFormat::Raw)]
        format: ExportFormat,
    },
    /// List disks, those of sandboxes too
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
        /// Compare the files of the ext4 file systems on them
        #[arg(long)]
        files: bool,
    },
    /// List a directory of the ext4 file system on a disk or snapshot
    Ls(LsArgs),
    /// Write a file of it to stdout
    Cat(CatArgs),
    /// Write a file or directory of it to a tar archive
    Extract(ExtractArgs),
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
    /// What the image is; an archive is known by how it begins, no other format is guessed
    #[arg(long, value_enum, default_value_t = ImageFormat::Raw)]
    pub format: ImageFormat,
    /// Deduplicate what is in it, and is written to it, with this domain only, and with what all share
    #[arg(long, value_name = "DOMAIN")]
    pub dedup_domain: Option<String>,
}

/// A format of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// The disk's bytes
    Raw,
    /// QEMU's, converted with qemu-img
    Qcow2,
    /// What `disk export --format archive` writes; read from a pipe as it comes
    Archive,
}

/// What a disk is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// The disk's bytes
    Raw,
    /// A stream that carries deduplication and compression to another store
    Archive,
}
