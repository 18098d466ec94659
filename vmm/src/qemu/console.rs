//! What a machine's process writes: the guest's console and QEMU's own complaints. A guest chooses the console's bytes
//! and how many there are, so both the file and the part in memory are capped.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes of output kept in memory.
const TAIL_MAX: usize = 16 * 1024;
/// Bytes after which the log file is started over; the one before is kept as `.old`.
const FILE_MAX: u64 = 512 * 1024;

/// The end of an output.
#[derive(Clone, Debug, Default)]
pub(super) struct Tail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
}

impl Tail {
    fn push(&self, bytes: &[u8]) {
        let mut tail = self.bytes.lock();
        tail.extend(bytes);
        let excess = tail.len().saturating_sub(TAIL_MAX);
        tail.drain(..excess);
    }

    /// The last `max_bytes` as text: lines only, no control characters.
    pub(super) fn text(&self, max_bytes: usize) -> String {
        let tail = self.bytes.lock();
        let bytes: Vec<u8> = tail.iter().skip(tail.len().saturating_sub(max_bytes)).copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        text.chars().filter(|c| *c == '\n' || !c.is_control()).collect::<String>().trim().to_owned()
    }
}

/// Reads an output to its end, into the tail and, if there is one, the file.
pub(super) async fn record(mut output: impl AsyncRead + Unpin, tail: Tail, file: Option<PathBuf>) {
    let mut log = match &file {
        Some(path) => Log::open(path).await,
        None => None,
    };
    let mut bytes = vec![0; 8192];
    while let Ok(len @ 1..) = output.read(&mut bytes).await {
        tail.push(&bytes[..len]);
        if let Some(open) = &mut log
            && let Err(error) = open.write(&bytes[..len]).await
        {
            tracing::warn!(%error, "cannot write a machine's console log");
            log = None;
        }
    }
}

struct Log {
    path: PathBuf,
    file: tokio::fs::File,
    len: u64,
}

impl Log {
    async fn open(path: &Path) -> Option<Log> {
        match tokio::fs::File::create(path).await {
            Ok(file) => Some(Log { path: path.to_owned(), file, len: 0 }),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot make a machine's console log");
                None
            }
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        use tokio::io::AsyncWriteExt;
        if self.len >= FILE_MAX {
            tokio::fs::rename(&self.path, self.path.with_extension("log.old")).await?;
            self.file = tokio::fs::File::create(&self.path).await?;
            self.len = 0;
        }
        self.file.write_all(bytes).await?;
        self.len += bytes.len() as u64;
        self.file.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_flood_is_capped_and_the_end_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut flood = vec![b'x'; 3 << 20];
        flood.extend_from_slice(b"\n\x1b[1mlast\x07 words\r\n");
        let tail = Tail::default();
        record(&flood[..], tail.clone(), Some(path.clone())).await;
        assert!(tail.text(1000).ends_with("[1mlast words"));
        assert!(tail.text(5).len() <= 5);
        assert!(std::fs::metadata(&path).unwrap().len() <= FILE_MAX + 8192);
        assert!(std::fs::read_to_string(&path).unwrap().contains("last"));
        assert!(tail.bytes.lock().len() <= TAIL_MAX);
    }
}
