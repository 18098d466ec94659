//! `miosa template …`.

use std::path::PathBuf;

use clap::Subcommand;

use crate::units::parse_size_mib;

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
