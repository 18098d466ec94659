//! What a machine's process writes: the guest's console and QEMU's own complaints. QEMU writes both to files in the run
//! directory by itself, so that they go on while there is no daemon. A guest chooses the console's bytes and how many
//! there are, so files are capped twice: a daemon that looks starts them over, and the process's limit on the size of
//! files (see `qemu::spawn`) holds while nobody looks.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Bytes after which a file is started over; what it held is kept as `.old`.
const FILE_MAX: u64 = 512 * 1024;

/// Makes an empty file that is only ever appended to: whoever holds it goes on at its end when it is started over.
pub(crate) fn create(path: &Path) -> std::io::Result<File> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::options().append(true).create_new(true).mode(0o600).open(path)
}

/// Starts the file over if it has grown too long. Its end is kept as `.old`. What is written between the copy and the cut
/// is lost, which is a few bytes of a flood.
pub(crate) fn cap(path: &Path) -> std::io::Result<()> {
    let mut file = File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let len = file.metadata()?.len();
    if len <= FILE_MAX {
        return Ok(());
    }
    file.seek(SeekFrom::Start(len.saturating_sub(FILE_MAX)))?;
    let mut old = create(&path.with_extension("log.old"))?;
    std::io::copy(&mut (&file).take(FILE_MAX), &mut old)?;
    file.set_len(0)
}

/// The last `max_bytes` as text: lines only, no control characters or sequences. Empty when there is no such file.
pub(crate) fn tail(path: &Path, max_bytes: usize) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(max_bytes as u64)))?;
        let mut bytes = Vec::new();
        file.take(max_bytes as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let bytes = anstream::adapter::strip_bytes(&bytes).into_vec();
    let text = String::from_utf8_lossy(&bytes);
    text.chars().filter(|c| *c == '\n' || !c.is_control()).collect::<String>().trim().to_owned()
}

/// Reads a console as it grows.
#[derive(Debug)]
pub struct ConsoleReader {
    file: File,
    at: u64,
}

impl ConsoleReader {
    /// Begins `before` bytes before its present end.
    ///
    /// # Errors
    /// Of the file system, also when there is no such file.
    pub fn open(path: &Path, before: u64) -> std::io::Result<ConsoleReader> {
        let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        let at = file.metadata()?.len().saturating_sub(before);
        Ok(ConsoleReader { file, at })
    }

    /// What was written since, at most 64 KiB of it; empty when that is nothing. Of a file that was started over what came
    /// before that is lost.
    ///
    /// # Errors
    /// Of the file system.
    pub fn read(&mut self) -> std::io::Result<Vec<u8>> {
        if self.file.metadata()?.len() < self.at {
            self.at = 0;
        }
        let mut bytes = vec![0; 64 * 1024];
        let len = self.file.read_at(&mut bytes, self.at)?;
        bytes.truncate(len);
        self.at += len as u64;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_flood_is_capped_and_its_writer_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut writer = create(&path).unwrap();
        writer.write_all(&vec![b'x'; 3 << 20]).unwrap();
        writer.write_all(b"\n\x1b[1mlast\x07 words\r\n").unwrap();
        assert!(tail(&path, 1000).ends_with("x\nlast words"));
        assert!(tail(&path, 5).len() <= 5);
        cap(&path).unwrap();
        let old = path.with_extension("log.old");
        assert_eq!(std::fs::metadata(&old).unwrap().len(), FILE_MAX);
        assert!(tail(&old, 100).ends_with("last words"));
        writer.write_all(b"goes on").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"goes on");
        cap(&path).unwrap();
        assert_eq!(tail(&path, 100), "goes on");
        assert_eq!(tail(Path::new("/nonexistent"), 100), "");
    }

    #[test]
    fn a_console_is_followed_also_when_it_is_started_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut writer = create(&path).unwrap();
        writer.write_all(b"long ago\nlately").unwrap();
        let mut reader = ConsoleReader::open(&path, 6).unwrap();
        assert_eq!(reader.read().unwrap(), b"lately");
        assert_eq!(reader.read().unwrap(), b"");
        let flood = vec![b'x'; FILE_MAX as usize + 1];
        writer.write_all(&flood).unwrap();
        let mut seen = 0;
        while seen < flood.len() {
            seen += reader.read().unwrap().len();
        }
        cap(&path).unwrap();
        writer.write_all(b"\xff\x00 new").unwrap();
        assert_eq!(reader.read().unwrap(), b"\xff\x00 new");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(reader.read().unwrap(), b"");
        assert!(ConsoleReader::open(&path, 0).is_err());
    }
}
