//! Files of a sandbox beyond reading and writing one: looking, making, removing, renaming, and whole directories as tar
//! archives. Each call starts a session if there is none; nothing is held whole.

use vmm::{DirEntry, FileStat, TreeSummary, agent::TreeWriter};

use super::Engine;
use super::activity::InUse;
use super::error::{Error, Result};
use super::guest::{GuestReader, check_path, use_guest};

/// Most entries of a directory that are listed.
const MAX_ENTRIES: usize = 100_000;

impl Engine {
    /// Looks at a file; symbolic links are followed.
    pub async fn stat_file(&self, key: &str, path: &str) -> Result<FileStat> {
        let (sandbox, path) = (self.find(key)?, check_path(path)?);
        self.detached(async move { use_guest(&sandbox, |agent| async move { Ok(agent.stat(path).await?) }).await })
            .await
    }

    /// What is in a directory, by name.
    pub async fn list_files(&self, key: &str, path: &str) -> Result<Vec<DirEntry>> {
        let (sandbox, path) = (self.find(key)?, check_path(path)?);
        self.detached(async move {
            use_guest(&sandbox, |agent| async move { Ok(agent.list(path, MAX_ENTRIES).await?) }).await
        })
        .await
    }

    /// Makes a directory and those above it; fine when it is there.
    pub async fn make_dir(&self, key: &str, path: &str, mode: Option<u32>) -> Result<()> {
        let (sandbox, path) = (self.find(key)?, check_path(path)?);
        self.detached(
            async move { use_guest(&sandbox, |agent| async move { Ok(agent.make_dir(path, mode).await?) }).await },
        )
        .await
    }

    /// Removes a file, a link or a directory; with `recursive` all that is in it.
    pub async fn remove_file(&self, key: &str, path: &str, recursive: bool) -> Result<()> {
        let (sandbox, path) = (self.find(key)?, check_path(path)?);
        if path.trim_matches('/').is_empty() {
            return Err(Error::invalid("the root of the file system cannot be removed")
                .hint("delete the sandbox: miosa sandbox destroy SANDBOX"));
        }
        self.detached(async move {
            use_guest(&sandbox, |agent| async move { Ok(agent.remove(path, recursive).await?) }).await
        })
        .await
    }

    /// Gives a file or directory another name; a file that has it is replaced.
    pub async fn rename_file(&self, key: &str, from: &str, to: &str) -> Result<()> {
        let (sandbox, from, to) = (self.find(key)?, check_path(from)?, check_path(to)?);
        self.detached(
            async move { use_guest(&sandbox, |agent| async move { Ok(agent.rename(from, to).await?) }).await },
        )
        .await
    }

    /// Opens a directory to be read as a tar archive. An absent one is an error here.
    pub async fn read_tree(&self, key: &str, path: &str) -> Result<GuestReader> {
        let (sandbox, path) = (self.find(key)?, check_path(path)?);
        self.detached(async move {
            let reader = use_guest(&sandbox, |agent| async move { Ok(agent.read_tree(path).await?) }).await?;
            GuestReader::begin(reader, sandbox.begin_use()).await
        })
        .await
    }

    /// Opens a directory to be filled from a tar archive. With `delete`, what the archive does not have is removed at
    /// [`GuestTreeWriter::finish`].
    pub async fn write_tree(&self, key: &str, path: &str, delete: bool) -> Result<GuestTreeWriter> {
        let (sandbox, path) = (self.find(key)?, check_path(path)?);
        if delete && path.trim_matches('/').is_empty() {
            return Err(Error::invalid("what is not in the archive cannot be removed from the whole file system")
                .hint("name a directory below /"));
        }
        self.detached(async move {
            let writer = use_guest(&sandbox, |agent| async move { Ok(agent.write_tree(path, delete).await?) }).await?;
            Ok(GuestTreeWriter { writer, _in_use: sandbox.begin_use() })
        })
        .await
    }
}

/// A directory being filled from an archive.
#[derive(Debug)]
pub struct GuestTreeWriter {
    writer: TreeWriter,
    _in_use: InUse,
}

impl GuestTreeWriter {
    /// Sends bytes; waits while the guest is slow.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.writer.write(bytes).await?)
    }

    /// Ends the archive.
    pub async fn finish(self) -> Result<TreeSummary> {
        Ok(self.writer.finish().await?)
    }
}
