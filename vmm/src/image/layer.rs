//! Tar archives into a [`Tree`]: a whole root file system, or one layer of an image.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tar::{Archive, Entry, EntryType};

use super::tree::{Meta, Tree, bad_path, broken, shown};
use crate::{Error, ErrorKind, Result, jail};

/// Longest list of a file's pieces, in units of 512 bytes.
const MAX_LIST: u32 = 1 << 16;

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
        let (meta, sparse) = meta(&last, &mut entry)?;
        if let Some(sparse) = &sparse {
            last.clone_from(&sparse.name);
        }
        if whiteouts && obey_whiteout(tree, &last)? {
            continue;
        }
        add(tree, &last, meta, sparse, &mut entry, left_out)?;
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

fn add<R: Read>(
    tree: &mut Tree,
    path: &[u8],
    meta: Meta,
    sparse: Option<Sparse>,
    entry: &mut Entry<'_, R>,
    left_out: &mut LeftOut,
) -> Result<()> {
    match entry.header().entry_type() {
        EntryType::Directory => tree.add_directory(path, meta),
        // Of old archives: a directory is a file whose name ends in a slash.
        EntryType::Regular if path.ends_with(b"/") && entry.size() == 0 => tree.add_directory(path, meta),
        EntryType::Regular | EntryType::Continuous if let Some(sparse) = sparse => {
            let pieces = read_pieces(entry, sparse.size).map_err(|why| bad_path(path, &why))?;
            tree.add_file_with_holes(path, meta, sparse.size, &pieces, entry)
        }
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

/// A file that is stored without its holes, as version 1.0 of GNU tar's form has it: under a placeholder's name, with a list
/// of its pieces in front of them.
#[derive(Debug, Default)]
struct Sparse {
    name: Vec<u8>,
    size: u64,
}

/// The list in front of the pieces: numbers in lines, padded to whole 512 bytes.
fn read_pieces(from: &mut impl Read, size: u64) -> std::result::Result<Vec<(u64, u64)>, String> {
    let mut unit = [0; 512];
    let (mut at, mut units) = (unit.len(), 0);
    let mut number = || {
        let mut value: Option<u64> = None;
        loop {
            if at == unit.len() {
                units += 1;
                if units > MAX_LIST || read_full(from, &mut unit).ok() != Some(unit.len()) {
                    return Err("the list of its pieces is cut off or too long".to_owned());
                }
                at = 0;
            }
            let byte = unit[at];
            at += 1;
            match (byte, value) {
                (b'\n', Some(value)) => return Ok(value),
                (b'0'..=b'9', _) => {
                    let more = value.unwrap_or(0).checked_mul(10).and_then(|v| v.checked_add(u64::from(byte - b'0')));
                    value = Some(more.ok_or("a piece's place is no number")?);
                }
                _ => return Err("a piece's place is no number".to_owned()),
            }
        }
    };
    let mut pieces = Vec::new();
    let mut end = 0;
    for _ in 0..number()? {
        let (offset, len) = (number()?, number()?);
        let upto = offset.checked_add(len).filter(|upto| offset >= end && *upto <= size);
        end = upto.ok_or("its pieces are out of order or beyond its end")?;
        pieces.push((offset, len));
    }
    Ok(pieces)
}

fn meta<R: Read>(path: &[u8], entry: &mut Entry<'_, R>) -> Result<(Meta, Option<Sparse>)> {
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
        return Ok((meta, None));
    };
    let (mut sparse, mut version) = (Sparse::default(), None);
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
            b"GNU.sparse.major" => version = extension.value().ok().map(str::to_owned),
            b"GNU.sparse.name" => sparse.name = extension.value_bytes().to_vec(),
            b"GNU.sparse.realsize" => {
                let size = extension.value().ok().and_then(|v| v.parse().ok());
                sparse.size = size.ok_or_else(|| bad_path(path, "its size is no number"))?;
            }
            b"GNU.sparse.map" | b"GNU.sparse.offset" => {
                return Err(bad_path(path, "it is stored with holes in an old form")
                    .hint("make the archive without --sparse, or with --sparse-version=1.0"));
            }
            key => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    meta.xattrs.push((name.to_vec(), extension.value_bytes().to_vec()));
                }
            }
        }
    }
    match version.as_deref() {
        None => Ok((meta, None)),
        Some("1") if !sparse.name.is_empty() => Ok((meta, Some(sparse))),
        Some(_) => Err(bad_path(path, "it is stored with holes in a form that is not known")
            .hint("make the archive without --sparse, or with --sparse-version=1.0")),
    }
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
        let mut command = Command::new("xz");
        command.args(["-dc", "-T1"]).stdin(file).stdout(Stdio::piped()).stderr(Stdio::null());
        let missing = |e| super::tool_missing("xz", "xz-utils", &e);
        let turn = jail::lock_up_tool(&mut command, &[], &[], 0).map_err(missing)?;
        let child = command.spawn();
        drop(turn);
        child.map(Unxz).map_err(missing)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of one sparse file `dir/holes`.
    fn archive(list: &str, data: &[u8], size: u64) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let size = size.to_string();
        let extensions: [(&str, &[u8]); 4] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"dir/holes"),
            ("GNU.sparse.realsize", size.as_bytes()),
        ];
        builder.append_pax_extensions(extensions).unwrap();
        let mut content = list.as_bytes().to_vec();
        content.resize(content.len().next_multiple_of(512), 0);
        content.extend_from_slice(data);
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o640);
        header.set_uid(7);
        header.set_gid(8);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, "GNUSparseFile.0/holes", &*content).unwrap();
        builder.into_inner().unwrap()
    }

    fn read(archive: &[u8]) -> Result<(tempfile::TempDir, Tree)> {
        let dir = tempfile::tempdir().unwrap();
        let mut tree = Tree::new(dir.path().to_owned(), 1 << 20);
        apply(&mut tree, archive, true, &mut LeftOut::default())?;
        Ok((dir, tree))
    }

    #[test]
    fn files_with_holes_come_back_with_them() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        // Larger than the tree may be: its holes do not count.
        let size = 3 << 30;
        let (dir, tree) = read(&archive("3\n4096\n5\n1073741824\n3\n3221225472\n0\n", b"helloend", size)).unwrap();
        assert_eq!(tree.bytes(), 8);
        let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        let file = File::open(&files[0]).unwrap();
        let meta = file.metadata().unwrap();
        assert!(meta.size() == size && meta.blocks() < 1_000, "{meta:?}");
        let mut five = [0; 5];
        for (at, expected) in [(4_096, b"hello"), (1 << 30, b"end\0\0"), (0, b"\0\0\0\0\0")] {
            file.read_exact_at(&mut five, at).unwrap();
            assert_eq!(&five, expected);
        }
    }

    #[test]
    fn lists_of_pieces_are_not_believed() {
        for (list, data) in [
            ("", &b""[..]),
            ("x\n", b""),
            ("1\n0\n", b""),
            ("2\n10\n1\n5\n1\n", b"ab"),
            ("1\n99999999999\n1\n", b"a"),
            ("1\n18446744073709551615\n2\n", b"ab"),
            ("1\n99999999999999999999\n2\n", b"ab"),
            ("1\n0\n9\n", b"short"),
            ("1\n0\n2\n", b"too long"),
        ] {
            assert!(read(&archive(list, data, 1 << 20)).is_err(), "{list:?}");
        }
    }
}
