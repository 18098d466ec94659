//! A disk of the store as the device that the ext4 library reads, with what the journal has for it laid over.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use fs_ext4::block_io::BlockDevice;
use storage::Disk;

/// Where the superblock is.
pub(super) const SUPERBLOCK_AT: u64 = 1024;
/// How long it is.
pub(super) const SUPERBLOCK_BYTES: usize = 1024;
/// What a block of the journal's own begins with.
const JOURNAL_MAGIC: [u8; 4] = [0xC0, 0x3B, 0x39, 0x98];
/// Such a block that lists revoked blocks.
const REVOKE: [u8; 4] = [0, 0, 0, 5];
/// Most revoked blocks of one journal: they are kept in memory while it is read.
const MAX_REVOKED: u64 = 4 << 20;

/// Blocks of the file system whose newest content is in the journal.
#[derive(Debug, Clone, Default)]
pub(super) struct Overlay {
    pub(super) block_bytes: u64,
    /// Block → block of the journal, and whether its first four bytes were taken out.
    pub(super) blocks: HashMap<u64, (u64, bool)>,
}

/// See the module.
pub(super) struct Device {
    pub(super) disk: Disk,
    pub(super) overlay: Overlay,
    /// Read in the place of the one on the disk.
    pub(super) superblock: [u8; SUPERBLOCK_BYTES],
    /// Revoked blocks read so far, if the journal is being read.
    pub(super) revoked: Option<AtomicU64>,
}

impl Device {
    /// Fills `buf` from the disk and what the journal has for it.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        read_with(&self.disk, &self.overlay, offset, buf)?;
        lay_over(SUPERBLOCK_AT, &self.superblock, offset, buf);
        if let Some(revoked) = &self.revoked
            && buf.len() >= 16
            && buf[..4] == JOURNAL_MAGIC
            && buf[4..8] == REVOKE
        {
            // One block can stand for many places of a made-up journal.
            let listed = u64::from(u32::from_be_bytes([buf[12], buf[13], buf[14], buf[15]])) / 4;
            if revoked.fetch_add(listed, Ordering::Relaxed) > MAX_REVOKED {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the journal revokes too many blocks"));
            }
        }
        Ok(())
    }
}

/// Reads a disk with an overlay.
pub(super) fn read_with(disk: &Disk, overlay: &Overlay, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let from_disk = |offset: u64, buf: &mut [u8]| disk.read(offset, buf).map_err(io::Error::other);
    from_disk(offset, buf)?;
    if overlay.blocks.is_empty() {
        return Ok(());
    }
    let size = overlay.block_bytes;
    let mut bytes = vec![0; size as usize];
    for block in offset / size..(offset + buf.len() as u64).div_ceil(size) {
        if let Some((journal, escaped)) = overlay.blocks.get(&block) {
            from_disk(journal * size, &mut bytes)?;
            if *escaped {
                bytes[..4].copy_from_slice(&JOURNAL_MAGIC);
            }
            lay_over(block * size, &bytes, offset, buf);
        }
    }
    Ok(())
}

/// Copies what `bytes`, which belong at `at`, and `buf`, which is at `offset`, have in common.
fn lay_over(at: u64, bytes: &[u8], offset: u64, buf: &mut [u8]) {
    let from = at.max(offset);
    let upto = (at + bytes.len() as u64).min(offset + buf.len() as u64);
    if from < upto {
        let len = (upto - from) as usize;
        buf[(from - offset) as usize..][..len].copy_from_slice(&bytes[(from - at) as usize..][..len]);
    }
}

impl BlockDevice for Device {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> fs_ext4::error::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.disk.size_bytes()) {
            return Err(fs_ext4::error::Error::OutOfBounds);
        }
        self.read(offset, buf).map_err(fs_ext4::error::Error::Io)
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }
}
