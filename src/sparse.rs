//! Holes and zeroes: what need not be read, sent or stored.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// The unit of what is left out.
pub const BLOCK: usize = 4_096;

/// Where data begins at or after `offset`, down to a block; the file's end if there is no more. File systems without
/// holes, and devices, say `offset`.
pub fn next_data(file: &File, offset: u64, size: u64) -> u64 {
    match nix::unistd::lseek64(file, offset as i64, nix::unistd::Whence::SeekData) {
        Ok(at) => (at as u64 & !(BLOCK as u64 - 1)).clamp(offset, size),
        Err(nix::errno::Errno::ENXIO) => size,
        Err(error) => {
            tracing::trace!(fd = file.as_raw_fd(), %error, "no holes are known of this file");
            offset
        }
    }
}

/// The runs of blocks that are not all zeroes; the last block may be a part of one.
pub fn data_runs(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, block) in bytes.chunks(BLOCK).enumerate() {
        if is_zero(block) {
            continue;
        }
        let (start, end) = (i * BLOCK, i * BLOCK + block.len());
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

fn is_zero(block: &[u8]) -> bool {
    // Sixteen at a time: the compiler makes vectors of it.
    let (head, words, tail) = {
        // SAFETY: any bytes are a valid u128.
        unsafe { block.align_to::<u128>() }
    };
    head.iter().chain(tail).all(|b| *b == 0) && words.iter().all(|w| *w == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn holes_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 100], (32 << 20) + 5_000).unwrap();
        let at = next_data(&file, 0, 64 << 20);
        assert!(at <= (32 << 20) + 4_096 && at.is_multiple_of(4_096), "{at}");
        assert!(next_data(&file, 40 << 20, 64 << 20) >= 40 << 20);
    }

    #[test]
    fn runs_of_data_are_whole_blocks() {
        let mut bytes = vec![0; 5 * BLOCK + 10];
        assert!(data_runs(&bytes).is_empty());
        bytes[BLOCK + 7] = 1;
        bytes[2 * BLOCK] = 1;
        bytes[5 * BLOCK + 9] = 1;
        assert_eq!(data_runs(&bytes), [BLOCK..3 * BLOCK, 5 * BLOCK..5 * BLOCK + 10]);
    }
}
