//! Files that are there whole or as they were.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::output::{Failure, Result};

/// Lets `write` fill a file beside `path`, which then takes its place; what fails leaves what was there. A device or a
/// pipe is written to as it is.
pub(super) async fn beside<T>(path: &Path, write: impl AsyncFnOnce(&mut File) -> Result<T>) -> Result<T> {
    let failed = |e: std::io::Error| unwritable(path, e);
    if path.is_dir() {
        return Err(Failure::user("local_file", format!("{} is a directory", path.display())).hint("name a file"));
    }
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        return write(&mut File::options().write(true).open(path).map_err(failed)?).await;
    }
    let name =
        path.file_name().ok_or_else(|| Failure::user("local_file", format!("{} names no file", path.display())))?;
    let partial: PathBuf = path.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()));
    let mut file = File::options().write(true).create(true).truncate(true).open(&partial).map_err(failed)?;
    let written = write(&mut file).await.and_then(|done| {
        file.sync_all().and_then(|()| std::fs::rename(&partial, path)).map_err(failed)?;
        Ok(done)
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written
}

pub(super) fn unwritable(path: &Path, error: std::io::Error) -> Failure {
    if path == Path::new("-") {
        return error.into();
    }
    Failure::user("local_file", format!("{} cannot be written: {error}", path.display()))
}
