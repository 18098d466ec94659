//! An archive that somebody has made a template of: a root file system's tar, or a container image. Read and laid down, or
//! refused, and nothing comes to be outside of the directory it is given. The input is what its headers say; they are written
//! here, with their checksums, unless the first byte says to take the input as it is.

#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

const DISK: u64 = 8 << 20;

/// In memory where that can be had: each input makes files.
static PLACE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let shm = Path::new("/dev/shm");
    let dir = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("fuzz-image-").tempdir_in(dir).unwrap()
});

fuzz_target!(|data: &[u8]| {
    let Some((&how, bytes)) = data.split_first() else { return };
    let archive = if how == b'r' { bytes.to_vec() } else { put_together(bytes) };
    let (file, work) = (PLACE.path().join("archive"), PLACE.path().join("inner/work"));
    // Another program unpacks those.
    if archive.starts_with(b"\xfd7zXZ\0") {
        return;
    }
    fs::write(&file, archive).unwrap();
    fs::create_dir_all(&work).unwrap();
    let _ = vmm::image::lay_out(&file, DISK, &work);
    fs::remove_dir_all(&work).unwrap();
    assert_eq!(names(PLACE.path()), [PathBuf::from("archive"), "inner".into()]);
    assert_eq!(names(&PLACE.path().join("inner")), [] as [PathBuf; 0]);
});

fn names(dir: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into()).collect();
    names.sort();
    names
}

/// A tar archive: for each entry eight bytes (type, lengths of name and link, size, mode, whose), name, link and content.
fn put_together(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<8>() {
        let size = usize::from(u16::from_le_bytes([head[3], head[4]]));
        let mode = u16::from_le_bytes([head[5], head[6]]);
        let (name, rest) = rest.split_at(usize::from(head[1]).min(rest.len()));
        let (link, rest) = rest.split_at(usize::from(head[2]).min(rest.len()));
        // What is there of it: it may say more.
        let (content, rest) = rest.split_at(size.min(rest.len()));
        let mut header = [0; 512];
        let mut put = |at: usize, room: usize, text: &[u8]| {
            let len = text.len().min(room);
            header[at..at + len].copy_from_slice(&text[..len]);
        };
        put(0, 100, name);
        put(100, 8, format!("{mode:07o}\0").as_bytes());
        put(108, 8, format!("{:07o}\0", head[7]).as_bytes());
        put(116, 8, format!("{:07o}\0", head[7]).as_bytes());
        put(124, 12, format!("{size:011o}\0").as_bytes());
        put(136, 12, b"00000000000\0");
        put(148, 8, b"        ");
        put(156, 1, &head[..1]);
        put(157, 100, link);
        put(257, 8, b"ustar\x0000");
        // The rest of a long name, as the format has it.
        put(345, 155, name.get(100..).unwrap_or_default());
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend(header);
        out.extend(content);
        out.resize(out.len().next_multiple_of(512), 0);
        bytes = rest;
    }
    out.extend([0; 1024]);
    out
}
