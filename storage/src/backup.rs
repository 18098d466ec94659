//! A copy of a whole store, taken while it is in use.
//!
//! What is copied is what a power cut at one moment would leave, so a copy opens like a store after one. Packs never change:
//! on the same file system a copy shares their files (hard links), elsewhere they are copied. Collections wait for the whole
//! of it, so that no pack goes; sealing waits only while the packs that came meanwhile, the catalogue (RocksDB's own
//! checkpoint) and the log are copied, the last up to its durable end. Guests write on.

use crate::block::PackId;
use crate::catalogue::{self, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::inner::{Inner, LOCK};
use crate::rows::parse_id;
use crate::{log, pack, recover};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// What a copy of a store is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BackupReport {
    /// Packs in it.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
    /// Of these bytes, those that were copied; the others are in files that the store has, too.
    pub copied_bytes: u64,
    /// Bytes of its log.
    pub log_bytes: u64,
}

/// Copies the store to `to`, a directory that must not be there. When this returns, the copy is durable and whole; if it
/// fails, nothing of it is left.
///
/// # Errors
/// `InvalidInput` if `to` is there or the store is not in a directory; `NoSpace`, `Io`; what a flush fails with.
pub(crate) fn backup(inner: &Inner, to: &Path) -> Result<BackupReport> {
    let Some(from) = &inner.dir else {
        return Err(Error::new(ErrorKind::InvalidInput, "only a store in a directory can be backed up"));
    };
    let parent = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    if to.symlink_metadata().is_ok() || name.is_empty() {
        let what = format!("{} is there already: name a directory that is not", to.display());
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    let partial = parent.join(format!(".{name}.partial"));
    let failed = |e| Error::io(format!("cannot make {}", to.display()), e);
    // One that was cut off.
    match fs::remove_dir_all(&partial) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    fs::create_dir_all(parent).map_err(failed)?;
    let copied = copy(inner, from, &partial).and_then(|report| {
        fs::rename(&partial, to).and_then(|()| sync(parent)).map_err(failed)?;
        Ok(report)
    });
    copied.inspect_err(|_| drop(fs::remove_dir_all(&partial)))
}

fn copy(inner: &Inner, from: &Path, to: &Path) -> Result<BackupReport> {
    let io = |what: &Path| {
        let what = format!("cannot copy {}", what.display());
        move |e| Error::io(what, e)
    };
    for dir in ["", pack::DIR, log::DIR] {
        fs::create_dir(to.join(dir)).map_err(io(&to.join(dir)))?;
    }
    let _no_collection = inner.collecting.lock();
    let (mut report, mut there) = (BackupReport::default(), BTreeSet::new());
    // Most of them, while sealing goes on.
    packs(inner, from, to, &mut there, &mut report)?;
    let _no_sealing = inner.sealer.running.lock();
    packs(inner, from, to, &mut there, &mut report)?;
    inner.catalogue.copy_to(&to.join(catalogue::DIR))?;
    for (name, bytes) in inner.log.durable_files()? {
        let mut part = File::open(from.join(&name)).map_err(io(&from.join(&name)))?.take(bytes);
        let mut file = File::create_new(to.join(&name)).map_err(io(&to.join(&name)))?;
        report.log_bytes += std::io::copy(&mut part, &mut file).map_err(io(&to.join(&name)))?;
    }
    fs::copy(from.join(recover::STORE), to.join(recover::STORE)).map_err(io(&to.join(recover::STORE)))?;
    File::create_new(to.join(LOCK)).map_err(io(&to.join(LOCK)))?;
    sync_all(to).map_err(io(to))?;
    Ok(report)
}

/// Packs that the catalogue knows and that are not there yet.
fn packs(inner: &Inner, from: &Path, to: &Path, there: &mut BTreeSet<PackId>, report: &mut BackupReport) -> Result<()> {
    let mut wanted = Vec::new();
    inner.catalogue.scan(Table::Packs, &mut |key, _| {
        let id = PackId(parse_id(key)?);
        if !there.contains(&id) {
            wanted.push(id);
        }
        Ok(())
    })?;
    for id in wanted {
        let name = pack::file_name(id);
        let (source, target) = (from.join(&name), to.join(&name));
        let failed = |e| Error::io(format!("cannot copy {}", source.display()), e);
        if fs::hard_link(&source, &target).is_err() {
            report.copied_bytes += fs::copy(&source, &target).map_err(failed)?;
        }
        report.pack_bytes += target.metadata().map_err(failed)?.len();
        report.packs += 1;
        there.insert(id);
    }
    Ok(())
}

fn sync(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes everything below a directory durable.
fn sync_all(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path: PathBuf = entry?.path();
        if path.is_dir() { sync_all(&path)? } else { sync(&path)? }
    }
    sync(dir)
}
