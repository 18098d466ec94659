//! `miosa template …`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use crate::units::parse_size_mib;

/// `miosa template`
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Build a template: base, node or nextjs, or one of your own by a recipe
    Build(BuildArgs),
    /// Make a template of a raw or qcow2 image, a root file system's tar, an OCI layout's tar or what docker save writes
    Import(ImportTemplateArgs),
    /// List templates
    #[command(visible_alias = "ls")]
    List,
    /// Show a template and what it costs
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

/// `miosa template build`
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// Name of the template
    pub name: String,
    /// A recipe (TOML): from, packages, files, env, workdir, run, cpus, memory, disk
    #[arg(long, value_name = "RECIPE", conflicts_with = "image")]
    pub file: Option<PathBuf>,
    /// As `template import FILE --name NAME`
    #[arg(long, value_name = "FILE", conflicts_with = "disk", hide = true)]
    pub image: Option<PathBuf>,
    /// Size of the disk, of a recipe from debian [default: 10gb]
    #[arg(long, value_parser = parse_size_mib, value_name = "SIZE")]
    pub disk: Option<u64>,
    /// Do all steps anew, also those that were done before
    #[arg(long)]
    pub no_cache: bool,
}

/// `miosa template import`
#[derive(Debug, Args)]
pub struct ImportTemplateArgs {
    /// The image or archive (the daemon reads it)
    pub file: PathBuf,
    /// Name of the template
    #[arg(long)]
    pub name: String,
    /// What the file is [default: as its first bytes say]
    #[arg(long, value_enum)]
    pub format: Option<TemplateFormat>,
    /// Size of the disk [default: the image's; of an archive 10gb]
    #[arg(long, value_parser = parse_size_mib, value_name = "SIZE")]
    pub disk: Option<u64>,
}

/// A format of what templates are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TemplateFormat {
    /// A disk's bytes: ext4, or partitions with one ext4 root
    Raw,
    /// QEMU's
    Qcow2,
    /// A root file system, compressed or not
    Tar,
    /// A container image: an OCI layout's tar, or what docker save writes
    Container,
}
