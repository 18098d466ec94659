//! The memory of a guest, where the host can read it.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};

/// Bytes that are copied at a time: what stays in a processor's cache.
const PIECE: usize = 128 << 10;
/// What memory is counted in, in bytes.
pub const PAGE: usize = 4096;

/// The memory of a guest: a file that is nothing else. A call sees one moment only where the guest does not run meanwhile.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    bytes: u64,
}

impl GuestMemory {
    /// New memory of zeroes, which takes no space until it is written to. Nobody who has its file can make it shorter under
    /// another's mapping.
    ///
    /// # Errors
    /// Of the system.
    pub fn new(bytes: u64) -> Result<GuestMemory> {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        file.set_len(bytes)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK))?;
        Ok(GuestMemory { file, bytes })
    }

    /// Makes it what it is for good: nobody who has its file, whatever they were given it for, can write to it any more.
    ///
    /// # Errors
    /// Of the system; while somebody has it mapped to write.
    pub(crate) fn freeze(&self) -> Result<()> {
        match fcntl(&self.file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL)) {
            // Somebody else has done it.
            Err(Errno::EPERM) if self.is_frozen()? => Ok(()),
            sealed => Ok(sealed.map(drop)?),
        }
    }

    /// Whether it is what it is for good.
    ///
    /// # Errors
    /// Of the system.
    pub(crate) fn is_frozen(&self) -> Result<bool> {
        let seals = SealFlag::from_bits_truncate(fcntl(&self.file, FcntlArg::F_GET_SEALS)?);
        Ok(seals.contains(SealFlag::F_SEAL_WRITE))
    }

    /// That in a file.
    ///
    /// # Errors
    /// Of the system.
    pub(crate) fn of_file(file: File) -> Result<GuestMemory> {
        let bytes = file.metadata()?.len();
        Ok(GuestMemory { file, bytes })
    }

    /// That of so many bytes that a process shares with whoever has its file.
    ///
    /// # Errors
    /// `NotFound` when it has none, or has it for itself; of the system, also when the process is not for us to look at.
    pub(crate) fn of_process(pid: i32, bytes: u64) -> Result<GuestMemory> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            // A descriptor that has been closed meanwhile is none.
            let is_memory =
                std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
            let Some(inode) = std::fs::metadata(entry.path()).ok().filter(|_| is_memory).map(|meta| meta.ino()) else {
                continue;
            };
            if maps.lines().any(|line| is_shared(line, inode, bytes)) {
                return GuestMemory::of_file(File::options().read(true).write(true).open(entry.path())?);
            }
        }
        Err(Error::new(ErrorKind::NotFound, "it is not shared with the host"))
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Fills `buf` from `offset` on, in bytes.
    ///
    /// # Errors
    /// Of the system; `UnexpectedEof` beyond its end.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// Writes `data` at `offset` bytes.
    ///
    /// # Errors
    /// Of the system; beyond its end.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Calls `visit` with what is in it that is not zero, page by page and joined, in order, with where that is.
    ///
    /// # Errors
    /// Of the system, or of `visit`.
    pub fn for_each_run<E: From<Error>>(
        &self,
        mut visit: impl FnMut(u64, &[u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        self.for_each_piece(0..self.bytes, |at, piece| {
            runs(piece).into_iter().try_for_each(|(start, run)| visit(at + start, run))
        })
    }

    /// Copies what is in it to other memory of the same size, which is all zero; with `thin` without pages of zeroes.
    ///
    /// # Errors
    /// Of the system.
    pub fn copy_to(&self, to: &GuestMemory, thin: bool) -> Result<()> {
        match thin {
            true => self.for_each_run(|at, run| to.write(at, run)),
            false => self.for_each_piece(0..self.bytes, |at, piece| to.write(at, piece)),
        }
    }

    /// Makes an earlier copy of it what it is now.
    ///
    /// # Errors
    /// Of the system.
    pub fn update(&self, copy: &GuestMemory) -> Result<()> {
        let update = |range: std::ops::Range<u64>| {
            let mut before = vec![0; PIECE];
            self.for_each_piece(range, |at, piece| {
                let before = &mut before[..piece.len()];
                copy.read(at, before)?;
                // Mostly all of it is the same.
                if before == piece {
                    return Ok(());
                }
                let pages = piece.chunks(PAGE).zip(before.chunks(PAGE)).enumerate();
                let changed = pages.filter(|(_, (now, before))| now != before);
                changed.into_iter().try_for_each(|(n, (now, _))| copy.write(at + (n * PAGE) as u64, now))
            })
        };
        // The guest waits: both halves at once.
        let middle = self.bytes / 2 / PIECE as u64 * PIECE as u64;
        std::thread::scope(|scope| {
            let first = scope.spawn(|| update(0..middle));
            let second = update(middle..self.bytes);
            first.join().unwrap_or_else(|_| Err(Error::other("a copy of memory was cut off"))).and(second)
        })
    }

    /// Calls `visit` with each piece of a range in which there may be something.
    fn for_each_piece<E: From<Error>>(
        &self,
        range: std::ops::Range<u64>,
        mut visit: impl FnMut(u64, &[u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let mut piece = vec![0; PIECE.min(self.bytes as usize)];
        let mut at = range.start;
        while let Some((mut data, hole)) = self.next_data(at)? {
            at = hole.min(range.end);
            while data < at {
                let len = PIECE.min((at - data) as usize);
                self.read(data, &mut piece[..len])?;
                visit(data, &piece[..len])?;
                data += len as u64;
            }
            if at >= range.end {
                break;
            }
        }
        Ok(())
    }

    /// Where the next bytes are that are there, and where the hole after them begins.
    fn next_data(&self, at: u64) -> Result<Option<(u64, u64)>> {
        if at >= self.bytes {
            return Ok(None);
        }
        let seek = |offset: u64, whence| match lseek(&self.file, offset as i64, whence) {
            Err(Errno::ENXIO) => Ok(None),
            found => found.map(|at| Some(at as u64)),
        };
        let Some(data) = seek(at, Whence::SeekData)? else { return Ok(None) };
        Ok(Some((data, seek(data, Whence::SeekHole)?.unwrap_or(self.bytes))))
    }
}

/// The runs of pages of a piece that are not zero, with where they begin in it.
fn runs(piece: &[u8]) -> Vec<(u64, &[u8])> {
    let mut runs = Vec::new();
    let mut begin = 0;
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    for (number, page) in piece.chunks(PAGE).enumerate() {
        if is_zero(page) {
            runs.push((begin, number * PAGE));
            begin = number * PAGE + page.len();
        }
    }
    runs.push((begin, piece.len()));
    runs.into_iter().filter(|(begin, end)| begin < end).map(|(begin, end)| (begin as u64, &piece[begin..end])).collect()
}

/// Whether a line of `/proc/PID/maps` is of a shared mapping of so many bytes of this file.
fn is_shared(line: &str, inode: u64, bytes: u64) -> bool {
    let parse = || {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let shared = words.next()?.ends_with('s');
        let of: u64 = words.nth(2)?.parse().ok()?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(shared && of == inode && number(end)?.checked_sub(number(start)?)? == bytes)
    };
    parse().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(memory: &GuestMemory) -> Vec<u64> {
        let mut found = Vec::new();
        memory
            .for_each_run(|at, run| {
                found.extend((at / PAGE as u64..).take(run.len() / PAGE));
                Ok::<_, Error>(())
            })
            .unwrap();
        found
    }

    #[test]
    fn a_copy_is_brought_up_to_date() {
        let memory = GuestMemory::new(8 << 20).unwrap();
        for page in [0_u64, 1, 31, 32, 1023, 1024, 2047] {
            memory.write(page * PAGE as u64 + 5, b"first").unwrap();
        }
        // There, and zero.
        memory.write(40 * PAGE as u64, &[0; PAGE]).unwrap();
        let copy = GuestMemory::new(8 << 20).unwrap();
        memory.copy_to(&copy, true).unwrap();
        assert_eq!(pages(&copy), [0, 1, 31, 32, 1023, 1024, 2047]);
        memory.write(PAGE as u64, &[0; PAGE]).unwrap();
        memory.write(7 << 20, b"second").unwrap();
        memory.write((8 << 20) - 1, b"x").unwrap();
        memory.write(1024 * PAGE as u64, b"more").unwrap();
        memory.update(&copy).unwrap();
        assert_eq!(pages(&copy), pages(&memory));
        let (mut a, mut b) = (vec![0; 8 << 20], vec![0; 8 << 20]);
        memory.read(0, &mut a).unwrap();
        copy.read(0, &mut b).unwrap();
        assert!(a == b);
        assert_eq!(copy.read(8 << 20, &mut [0]).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn any_number_may_freeze_it_at_once() {
        for _ in 0..200 {
            let (memory, start) = (GuestMemory::new(1 << 20).unwrap(), std::sync::Barrier::new(4));
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        start.wait();
                        memory.freeze().unwrap();
                        assert!(memory.is_frozen().unwrap());
                    });
                }
            });
        }
    }

    #[test]
    fn what_is_frozen_is_written_by_nobody_and_mapped_privately() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.write(0, b"before").unwrap();
        assert!(!memory.is_frozen().unwrap());
        memory.freeze().unwrap();
        memory.freeze().unwrap();
        assert!(memory.is_frozen().unwrap());
        let fd = std::os::fd::AsRawFd::as_raw_fd(memory.file());
        let again = File::options().read(true).write(true).open(format!("/proc/self/fd/{fd}")).unwrap();
        assert_eq!(again.write_all_at(b"after", 0).unwrap_err().kind(), ErrorKind::PermissionDenied);
        assert!(again.set_len(0).is_err());
        let write = libc::PROT_READ | libc::PROT_WRITE;
        let map = |flags| {
            // SAFETY: a new mapping, of a file that nobody makes shorter.
            unsafe { libc::mmap(std::ptr::null_mut(), 1 << 20, write, flags, fd, 0) }
        };
        assert_eq!(map(libc::MAP_SHARED), libc::MAP_FAILED);
        let own = map(libc::MAP_PRIVATE);
        assert_ne!(own, libc::MAP_FAILED);
        // SAFETY: it is as long as that, and unmapped once.
        unsafe {
            own.cast::<u8>().write(7);
            libc::munmap(own, 1 << 20);
        }
        let mut read = [0; 6];
        memory.read(0, &mut read).unwrap();
        assert_eq!(&read, b"before");
    }

    #[test]
    fn the_memory_that_a_process_shares_is_found() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let found = |memory: &GuestMemory| GuestMemory::of_process(std::process::id() as i32, memory.bytes());
        for flags in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
            let write = libc::PROT_READ | libc::PROT_WRITE;
            let fd = std::os::fd::AsRawFd::as_raw_fd(memory.file());
            // SAFETY: a new mapping, of a file that nobody makes shorter.
            let address = unsafe { libc::mmap(std::ptr::null_mut(), 1 << 20, write, flags, fd, 0) };
            assert_ne!(address, libc::MAP_FAILED);
            // SAFETY: it is as long as that.
            unsafe { address.cast::<u8>().add(PAGE).write(7) };
            match flags {
                libc::MAP_PRIVATE => assert_eq!(found(&memory).unwrap_err().kind(), ErrorKind::NotFound),
                _ => assert_eq!(pages(&found(&memory).unwrap()), [1]),
            }
            // SAFETY: it was mapped above and is not used any more.
            unsafe { libc::munmap(address, 1 << 20) };
        }
        assert_eq!(found(&GuestMemory::new(2 << 20).unwrap()).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
