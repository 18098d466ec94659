//! Tar archives into a [`Tree`]: a whole root file system, or one layer of an image.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tar::{Archive, Entry, EntryType};

use super::tree::{Meta, Tree, bad_path, broken, shown};
use crate::{Error, ErrorKind, Result};

/// What was left out of an archive.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct LeftOut {
    /// Device nodes: the guest's kernel makes its own.
    pub(super) devices: u64,
}

/// Applies a tar stream. With `whiteouts` the names by which a layer deletes are obeyed.
pub(super) fn apply(tree: &mut Tree, stream: impl Read, whiteouts: bool, left_out: &mut LeftOut) -> Result<()> {
    tree.begin_layer();
    let mut archive = Archive::new(stream);
    let entries = archive.entries().map_err(|e| broken("at its beginning", &e))?;
    let before = tree.len();
    let mut last = Vec::new();
    let mut count = 0_u64;
    for entry in entries {
        let mut entry = entry.map_err(|e| broken(&format!("after {}", shown(&last)), &e))?;
        last = entry.path_bytes().into_owned();
        count += 1;
        // Names can come again and again without the tree growing.
        if count > 8_000_000 {
            return Err(Error::new(ErrorKind::Invalid, "the archive has more than 8000000 entries"));
        }
        if whiteouts && obey_whiteout(tree, &last)? {
            continue;
        }
        add(tree, &last, &mut entry, left_out)?;
    }
    if count == 0 && !whiteouts && tree.len() == before {
        return Err(Error::new(ErrorKind::Invalid, "the archive has no entries"));
    }
    Ok(())
}

/// Whether the name is a whiteout.
fn obey_whiteout(tree: &mut Tree, path: &[u8]) -> Result<bool> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let split = path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
    let (dir, name) = path.split_at(split);
    let Some(hidden) = name.strip_prefix(b".wh.") else { return Ok(false) };
    if hidden == b".wh..opq" {
        tree.make_opaque(dir)?;
    } else if hidden.is_empty() || hidden == b"." || hidden == b".." {
        return Err(bad_path(path, "it is a whiteout of nothing"));
    } else if !hidden.starts_with(b".wh.") {
        // Others of that beginning are notes of an old storage driver.
        tree.white_out(&[dir, hidden].concat())?;
    }
    Ok(true)
}

fn add<R: Read>(tree: &mut Tree, path: &[u8], entry: &mut Entry<'_, R>, left_out: &mut LeftOut) -> Result<()> {
    let kind = entry.header().entry_type();
    let meta = meta(path, entry)?;
    match kind {
        EntryType::Directory => tree.add_directory(path, meta),
        // Of old archives: a directory is a file whose name ends in a slash.
        EntryType::Regular if path.ends_with(b"/") && entry.size() == 0 => tree.add_directory(path, meta),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let size = entry.size();
            tree.add_file(path, meta, size, entry)
        }
        EntryType::Symlink => {
            let target = entry.link_name_bytes().map(|t| t.into_owned()).unwrap_or_default();
            tree.add_link(path, meta, &target)
        }
        EntryType::Link => {
            let target = entry.link_name_bytes().map(|t| t.into_owned()).unwrap_or_default();
            tree.add_hard_link(path, &target)
        }
        EntryType::Fifo => tree.add_pipe(path, meta),
        EntryType::Char | EntryType::Block => {
            left_out.devices += 1;
            Ok(())
        }
        EntryType::XGlobalHeader => Ok(()),
        other => Err(bad_path(path, &format!("its kind {:?} is not known", char::from(other.as_byte())))),
    }
}

fn meta<R: Read>(path: &[u8], entry: &mut Entry<'_, R>) -> Result<Meta> {
    let number = |value: std::io::Result<u64>, what: &str| {
        let value = value.map_err(|e| broken(&format!("in {}", shown(path)), &e))?;
        u32::try_from(value).map_err(|_| bad_path(path, &format!("its {what} {value} is out of range")))
    };
    let header = entry.header();
    let mut meta = Meta {
        mode: header.mode().map_err(|e| broken(&format!("in {}", shown(path)), &e))? & 0o7777,
        uid: number(header.uid(), "owner")?,
        gid: number(header.gid(), "group")?,
        mtime: header.mtime().ok().and_then(|t| i64::try_from(t).ok()).unwrap_or(0),
        xattrs: Vec::new(),
    };
    let Some(extensions) = entry.pax_extensions().map_err(|e| broken(&format!("in {}", shown(path)), &e))? else {
        return Ok(meta);
    };
    for extension in extensions {
        let extension = extension.map_err(|e| broken(&format!("in {}", shown(path)), &e))?;
        let value = || extension.value().ok().and_then(|v| v.parse().ok());
        match extension.key_bytes() {
            b"uid" => meta.uid = value().ok_or_else(|| bad_path(path, "its owner is no number"))?,
            b"gid" => meta.gid = value().ok_or_else(|| bad_path(path, "its group is no number"))?,
            b"mtime" => {
                let text = extension.value().unwrap_or_default();
                meta.mtime = text.split('.').next().and_then(|s| s.parse().ok()).unwrap_or(meta.mtime);
            }
            b"GNU.sparse.major" | b"GNU.sparse.map" | b"GNU.sparse.offset" => {
                return Err(bad_path(path, "it is stored with holes").hint("make the archive without --sparse"));
            }
            key => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    meta.xattrs.push((name.to_vec(), extension.value_bytes().to_vec()));
                }
            }
        }
    }
    Ok(meta)
}

/// A file's content with the compression taken off, as its first bytes say.
pub(super) fn open(path: &Path) -> Result<Box<dyn Read>> {
    let failed = |e: std::io::Error| Error::io(path.display(), e);
    let mut magic = [0; 6];
    let mut file = File::open(path).map_err(failed)?;
    let len = read_full(&mut file, &mut magic).map_err(failed)?;
    let file = BufReader::with_capacity(1 << 18, File::open(path).map_err(failed)?);
    Ok(match &magic[..len] {
        [0x1f, 0x8b, ..] => Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(file))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::with_buffer(file).map_err(failed)?),
        b"\xfd7zXZ\0" => Box::new(Unxz::start(path)?),
        [b'B', b'Z', b'h', ..] => {
            return Err(Error::new(ErrorKind::Invalid, format!("{} is compressed with bzip2", path.display()))
                .hint("unpack it first: bunzip2 FILE; plain, gzip, zstd and xz are read"));
        }
        _ => Box::new(file),
    })
}

pub(super) fn read_full(from: &mut impl Read, to: &mut [u8]) -> std::io::Result<usize> {
    let mut have = 0;
    while have < to.len() {
        match from.read(&mut to[have..]) {
            Ok(0) => break,
            Ok(len) => have += len,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(have)
}

/// What `xz` unpacks. It is killed when nobody reads any more.
struct Unxz(Child);

impl Unxz {
    fn start(path: &Path) -> Result<Unxz> {
        let file = File::open(path).map_err(|e| Error::io(path.display(), e))?;
        let child =
            Command::new("xz").args(["-dc", "-T1"]).stdin(file).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        child.map(Unxz).map_err(|e| super::tool_missing("xz", "xz-utils", &e))
    }
}

impl Read for Unxz {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let Some(stdout) = &mut self.0.stdout else { return Ok(0) };
        let len = stdout.read(buffer)?;
        if len == 0 && !buffer.is_empty() && !self.0.wait()?.success() {
            return Err(std::io::Error::other("xz cannot unpack it"));
        }
        Ok(len)
    }
}

impl Drop for Unxz {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
