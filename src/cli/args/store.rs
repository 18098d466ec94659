//! `miosa store …`.

use std::path::PathBuf;

use clap::Subcommand;

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
    /// Copy the whole store as of one moment, while everything runs, into a state directory of its own
    Backup {
        /// A name for the copy
        name: String,
    },
    /// Give back the space of what nothing refers to
    Gc {
        /// Only say what that would give back
        #[arg(long)]
        dry_run: bool,
    },
    /// Compress everything again that is sealed, harder; an idle store does that by itself with what has become cold
    Repack,
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
    /// Show what everything costs, who shares it, and what deleting it would give back
    Report {
        /// Draw it, too
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
}
