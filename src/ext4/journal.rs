//! What a journal has that the file system's own blocks have not yet: the state of a guest that runs or was cut off.
//!
//! Nothing is written. The transactions that were committed are found by the library, and each block's newest copy is
//! read from the journal in the block's place.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use fs_ext4::fs::Filesystem;
use fs_ext4::inode::Inode;
use fs_ext4::{jbd2, journal};
use storage::Disk;

use super::device::{Device, Overlay, SUPERBLOCK_AT, SUPERBLOCK_BYTES, read_with};
use super::{Error, Result};

/// Blocks that the library keeps; the store has caches of its own.
const CACHED_BLOCKS: usize = 64;
/// The largest journal that is read: the largest that mkfs makes.
const MAX_JOURNAL: u64 = 1 << 30;

/// The file system on a disk, with its journal played back, and the device it is read from.
pub(super) fn open(disk: Disk) -> Result<(Arc<Device>, Filesystem)> {
    if disk.size_bytes() < SUPERBLOCK_AT + SUPERBLOCK_BYTES as u64 {
        return Err(Error::Unreadable("it has no ext4 file system: it is too small".to_owned()));
    }
    let found = superblock(&disk, &Overlay::default())?;
    let without = Device {
        disk: disk.clone(),
        overlay: Overlay::default(),
        superblock: without_journal(&found),
        revoked: Some(AtomicU64::new(0)),
    };
    let device = Arc::new(without);
    let mut fs = Filesystem::mount_with_cache(device.clone(), CACHED_BLOCKS)?;
    // As the kernel does, the journal is believed only if the file system says that it needs it.
    if word(&found, 0x60) & 0x4 == 0 || word(&found, 0x5C) & 0x4 == 0 {
        return Ok((device, fs));
    }
    fs.sb.journal_inode = word(&found, 0xE0);
    let overlay = committed(&fs)?;
    if overlay.blocks.is_empty() {
        fs.sb.journal_inode = 0;
        return Ok((device, fs));
    }
    let replayed = without_journal(&superblock(&disk, &overlay)?);
    let device = Arc::new(Device { disk, overlay, superblock: replayed, revoked: None });
    let fs = Filesystem::mount_with_cache(device.clone(), CACHED_BLOCKS)?;
    Ok((device, fs))
}

/// The newest committed copy of each block.
fn committed(fs: &Filesystem) -> Result<Overlay> {
    let block_bytes = u64::from(fs.sb.block_size());
    let mut overlay = Overlay { block_bytes, ..Overlay::default() };
    let Some(log) = jbd2::read_superblock(fs)? else { return Ok(overlay) };
    if log.is_clean() {
        return Ok(overlay);
    }
    let bytes = u64::from(log.max_len) * block_bytes;
    if bytes > MAX_JOURNAL.min(fs.dev.size_bytes()) {
        return Err(Error::Unreadable(format!("its journal claims to have {bytes} bytes")));
    }
    let inode = Inode::parse(&fs.read_inode_raw(fs.sb.journal_inode)?)?;
    for entry in journal::walk(fs, &log)?.writes {
        let place = jbd2::journal_block_to_physical(fs, &inode, entry.journal_block)?;
        let place = place.filter(|place| *place < fs.sb.blocks_count);
        match place {
            // In the order they were committed: the last one counts.
            Some(place) if entry.fs_block < fs.sb.blocks_count => {
                overlay.blocks.insert(entry.fs_block, (place, entry.flags & journal::TAG_ESCAPED != 0));
            }
            _ => return Err(Error::Unreadable("its journal refers to blocks beyond its end".to_owned())),
        }
    }
    Ok(overlay)
}

fn superblock(disk: &Disk, overlay: &Overlay) -> Result<[u8; SUPERBLOCK_BYTES]> {
    let mut bytes = [0; SUPERBLOCK_BYTES];
    read_with(disk, overlay, SUPERBLOCK_AT, &mut bytes).map_err(|e| Error::from(fs_ext4::error::Error::Io(e)))?;
    Ok(bytes)
}

/// The same file system without a journal, so that the library does not play it back in a way of its own, which takes
/// memory for all of it.
fn without_journal(found: &[u8; SUPERBLOCK_BYTES]) -> [u8; SUPERBLOCK_BYTES] {
    const CHECKSUM_AT: usize = 0x3FC;
    let mut bytes = *found;
    let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0x5C, word(found, 0x5C) & !0x4);
    put(0x60, word(found, 0x60) & !0x4);
    put(0xE0, 0);
    // A wrong checksum stays wrong.
    let is_right = word(found, CHECKSUM_AT) == checksum(&found[..CHECKSUM_AT]);
    if word(found, 0x64) & 0x400 != 0 && is_right {
        let right = checksum(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&right.to_le_bytes());
    }
    bytes
}

/// CRC-32C as ext4 has it: not inverted at the end.
fn checksum(bytes: &[u8]) -> u32 {
    !crc32c::crc32c(bytes)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b))
}
