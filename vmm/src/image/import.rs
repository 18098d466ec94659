//! Images of others' making: raw and qcow2 disks, tar archives of a root file system, container images.
//!
//! What a file is, is seen in its first bytes, and an ext4 file system wins: a guest writes its own disk, and must not
//! be able to have it taken for something that refers to files of the host.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::layer::{self, LeftOut};
use super::oci::{self, Files, Image, ImageConfig};
use super::tree::{Tree, broken};
use super::{make_dir, make_ext4, tool_missing};
use crate::{Error, ErrorKind, Result, jail};

/// Where an ext4 file system says that it is one: the superblock's magic number.
const EXT4_MAGIC_AT: u64 = 1_024 + 56;
const EXT4_MAGIC: [u8; 2] = [0x53, 0xef];
/// The type of a partition that is a root for this processor.
const ROOT_TYPE: [u8; 16] =
    [0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09];
const BLOCK: u64 = 4_096;
/// Largest disk that an image may say it is.
const CONVERTED_BYTES_MAX: u64 = 16 << 40;

/// What a file to be imported is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// A disk's bytes.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// A root file system as a tar archive, compressed or not.
    Tar,
    /// A container image: an OCI layout or what `docker save` writes, as a tar archive, compressed or not.
    Container,
}

/// An image that is ready to be read: one ext4 file system within a raw file.
#[derive(Debug)]
pub struct ReadyImage {
    /// The file.
    pub path: PathBuf,
    /// Where the file system begins in it, in bytes.
    pub offset: u64,
    /// Its length in bytes, a multiple of 4096.
    pub len: u64,
    /// What it was made from, for people.
    pub origin: String,
    /// How it wants its programs to be run.
    pub config: ImageConfig,
    /// Goes with the last use.
    _work: Option<tempfile::TempDir>,
}

impl ReadyImage {
    /// A whole file.
    ///
    /// # Errors
    /// `Io` when it cannot be read.
    pub fn whole(path: PathBuf, origin: String) -> Result<ReadyImage> {
        let len = path.metadata().map_err(|e| Error::io(path.display(), e))?.len();
        Ok(ReadyImage { path, offset: 0, len, origin, config: ImageConfig::default(), _work: None })
    }
}

/// Makes a file ready to be imported. Archives become an ext4 file system of `disk_bytes`; disks have their own size.
/// `work_dir` is where files are kept meanwhile; nothing is left there once the answer is dropped.
///
/// # Errors
/// `Invalid` for what is no image, is broken, does not fit or leads out of itself, with what to do; `ToolMissing`; `Io`.
pub fn prepare(
    file: &Path,
    format: Option<ImageFormat>,
    disk_bytes: u64,
    work_dir: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<ReadyImage> {
    let meta = std::fs::metadata(file).map_err(|e| {
        Error::new(ErrorKind::Invalid, format!("{} cannot be read: {e}", file.display()))
            .hint("name a file that the daemon can read")
    })?;
    if !meta.is_file() {
        return Err(Error::new(ErrorKind::Invalid, format!("{} is not a file", file.display())).hint(
            "name a raw or qcow2 image, or an archive (docker save, an OCI layout, or a root file system's tar)",
        ));
    }
    let format = match format {
        Some(format) => format,
        None => detect(file)?,
    };
    make_dir(work_dir)?;
    let work = tempfile::Builder::new()
        .prefix(".import-")
        .tempdir_in(work_dir)
        .map_err(|e| Error::io(work_dir.display(), e))?;
    let origin = |kind: &str| format!("{kind} {}", file.display());
    match format {
        ImageFormat::Raw => {
            let (offset, len) = find_ext4(file)?;
            let config = ImageConfig::default();
            Ok(ReadyImage { path: file.to_owned(), offset, len, origin: origin("image"), config, _work: None })
        }
        ImageFormat::Qcow2 => {
            progress("converting the qcow2 image");
            let raw = work.path().join("raw");
            convert_qcow2(file, &raw)?;
            let (offset, len) = find_ext4(&raw)?;
            let config = ImageConfig::default();
            Ok(ReadyImage { path: raw, offset, len, origin: origin("qcow2 image"), config, _work: Some(work) })
        }
        ImageFormat::Tar | ImageFormat::Container => {
            let (path, origin, config) = unpack(file, format, disk_bytes, work.path(), progress)?;
            Ok(ReadyImage { path, offset: 0, len: disk_bytes, origin, config, _work: Some(work) })
        }
    }
}

/// An archive's content as an ext4 file system.
fn unpack(
    file: &Path,
    format: ImageFormat,
    disk_bytes: u64,
    work: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<(PathBuf, String, ImageConfig)> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::new(ErrorKind::Invalid, "only root can import archives, for files keep their owners")
            .hint("run the daemon as root, or import a raw ext4 image"));
    }
    let (tree, root, origin, config) = gather(file, format, disk_bytes, work, progress)?;
    let raw = work.join("raw");
    let image = File::create_new(&raw).map_err(|e| Error::io(raw.display(), e))?;
    image.set_len(disk_bytes).map_err(|e| Error::io(raw.display(), e))?;
    let uuid = fresh_uuid();
    make_ext4(&root, &raw, &uuid, &uuid, Some(tree.len() as u64)).map_err(|e| {
        let full = ["Could not allocate", "No space", "no space", "not enough", "No free space"];
        if full.iter().any(|words| e.message.contains(words)) {
            let message =
                format!("the content ({} MiB) does not fit a disk of {} MiB", tree.bytes() >> 20, disk_bytes >> 20);
            return Error::new(ErrorKind::Invalid, message).hint("ask for a larger disk: --disk SIZE");
        }
        e
    })?;
    Ok((raw, origin, config))
}

/// An archive's files, laid down below `work` as they are to be, with where, what they came from and how it wants to be run.
fn gather(
    file: &Path,
    format: ImageFormat,
    disk_bytes: u64,
    work: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<(Tree, PathBuf, String, ImageConfig)> {
    let dir = |name: &str| {
        let path = work.join(name);
        std::fs::create_dir(&path).map(|()| path.clone()).map_err(|e| Error::io(path.display(), e))
    };
    let mut tree = Tree::new(dir("contents")?, disk_bytes);
    let mut left_out = LeftOut::default();
    progress("reading the archive");
    let (origin, config) = if format == ImageFormat::Tar {
        layer::apply(&mut tree, layer::open(file)?, false, &mut left_out)?;
        (format!("archive {}", file.display()), ImageConfig::default())
    } else {
        // Layers can hold more than is left in the end, and be compressed or not.
        let files = Files::unpack(layer::open(file)?, dir("files")?, disk_bytes.saturating_mul(2))?;
        let image = Image::find(&files)?;
        image.apply(&files, &mut tree, &mut left_out, progress)?;
        let name = image.reference.map_or(String::new(), |r| {
            format!(" ({})", r.chars().filter(|c| !c.is_control()).take(100).collect::<String>())
        });
        (format!("container image {}{name}", file.display()), image.config)
    };
    if left_out.devices > 0 {
        progress(&format!("left out {} device nodes: the guest has its own", left_out.devices));
    }
    progress(&format!("making the ext4 image: {} entries, {} MiB", tree.len(), tree.bytes() >> 20));
    let root = dir("root")?;
    tree.lay_down(&root)?;
    Ok((tree, root, origin, config))
}

/// What is done with an archive of others before a file system is made of it: seen for what it is, read and laid down below
/// `work`, an empty directory.
///
/// # Errors
/// As of [`prepare`].
#[cfg(fuzzing)]
pub fn lay_out(file: &Path, disk_bytes: u64, work: &Path) -> Result<()> {
    match detect(file)? {
        ImageFormat::Raw => find_ext4(file).map(drop),
        ImageFormat::Qcow2 => Ok(()),
        archive => gather(file, archive, disk_bytes, work, &mut |_| {}).map(drop),
    }
}

fn fresh_uuid() -> String {
    let mut bytes: [u8; 16] = rand::random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

fn read_at(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) => bytes,
        Err(_) => Vec::new(),
    }
}

fn has_ext4(file: &File, at: u64) -> bool {
    read_at(file, at + EXT4_MAGIC_AT, 2) == EXT4_MAGIC
}

fn detect(path: &Path) -> Result<ImageFormat> {
    let file = File::open(path).map_err(|e| Error::io(path.display(), e))?;
    if has_ext4(&file, 0) {
        return Ok(ImageFormat::Raw);
    }
    let head = read_at(&file, 0, 6);
    let compressed = matches!(&head[..], [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..] | [b'B', b'Z', b'h', ..])
        || head == *b"\xfd7zXZ\0";
    if !compressed {
        if head.starts_with(b"QFI\xfb") {
            return Ok(ImageFormat::Qcow2);
        }
        if read_at(&file, 510, 2) == [0x55, 0xaa] && read_at(&file, 257, 5) != *b"ustar" {
            return Ok(ImageFormat::Raw);
        }
    }
    let unknown = || {
        Error::new(ErrorKind::Invalid, format!("{} is no image that is known here", path.display())).hint(
            "a raw ext4 image, a qcow2 image, a tar of a root file system, an OCI layout's tar, or what docker save writes",
        )
    };
    // An archive of the oldest kind has no magic number: its first header's checksum decides.
    let mut archive = tar::Archive::new(layer::open(path)?);
    let mut seen = false;
    for entry in archive.entries().map_err(|_| unknown())? {
        let entry = match entry {
            Ok(entry) => entry,
            Err(_) if !seen => return Err(unknown()),
            Err(e) => return Err(broken("among its files", &e)),
        };
        seen = true;
        let name = entry.path_bytes();
        let plain = name.strip_prefix(b"./").unwrap_or(&name);
        if !oci::is_image_name(&name) {
            return Ok(ImageFormat::Tar);
        }
        if matches!(plain, b"oci-layout" | b"index.json" | b"manifest.json") {
            return Ok(ImageFormat::Container);
        }
    }
    if seen { Ok(ImageFormat::Tar) } else { Err(unknown()) }
}

/// Where the one ext4 file system of a disk is: all of it, or a partition. Offset and length in bytes.
fn find_ext4(path: &Path) -> Result<(u64, u64)> {
    let failed = |e: std::io::Error| Error::io(path.display(), e);
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let whole = |len: u64| len / BLOCK * BLOCK;
    let invalid = |message: String| Error::new(ErrorKind::Invalid, format!("the image {} {message}", path.display()));
    if has_ext4(&file, 0) {
        if !size.is_multiple_of(BLOCK) {
            return Err(invalid(format!("has {size} bytes, which is not a multiple of 4096"))
                .hint("pad it with zeroes: truncate -s %4096 FILE"));
        }
        return check_superblock(&file, 0, size)
            .map(|()| (0, size))
            .map_err(|why| invalid(why).hint("check it: e2fsck -fn FILE"));
    }
    let partitions = partitions(&file, size);
    let with_ext4: Vec<&Partition> = partitions.iter().filter(|p| has_ext4(&file, p.start)).collect();
    let roots: Vec<&&Partition> = with_ext4.iter().filter(|p| p.is_root).collect();
    let chosen = match (roots.as_slice(), with_ext4.as_slice()) {
        ([one], _) => **one,
        (_, [one]) => *one,
        (_, []) if partitions.is_empty() => {
            return Err(invalid("holds no ext4 file system".to_owned())
                .hint("a template's disk is one ext4 file system; make it of a directory: mkfs.ext4 -d DIR IMAGE SIZE, or import a tar"));
        }
        (_, []) => {
            return Err(invalid(format!("has {} partitions, none with ext4", partitions.len()))
                .hint("copy the files into a tar archive (as root: tar -C MOUNTED -c .) and import that"));
        }
        (_, several) => {
            let list: Vec<_> = several.iter().map(|p| format!("{} (at byte {})", p.number, p.start)).collect();
            return Err(invalid(format!("has ext4 in several partitions: {}", list.join(", "))).hint(
                "copy the root's out and import that: dd if=FILE of=ROOT bs=512 skip=START count=SECTORS conv=sparse",
            ));
        }
    };
    let len = whole(chosen.len);
    check_superblock(&file, chosen.start, len).map_err(|why| invalid(why).hint("check it: e2fsck -fn FILE"))?;
    Ok((chosen.start, len))
}

/// Whether the file system can be all there.
fn check_superblock(file: &File, at: u64, len: u64) -> std::result::Result<(), String> {
    let head = read_at(file, at + 1_024, 0x160);
    let number =
        |at: usize| head.get(at..at + 4).map_or(0, |b| u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    let has_64bit = number(0x60) & 0x80 != 0;
    let blocks = number(0x04) | if has_64bit { number(0x150) << 32 } else { 0 };
    let shift = number(0x18);
    if shift > 6 {
        return Err("has a damaged ext4 superblock".to_owned());
    }
    let bytes = blocks.saturating_mul(1_024 << shift);
    if bytes > len {
        return Err(format!("is cut off: its file system has {bytes} bytes, but only {len} are there"));
    }
    if number(0x60) & 0x0008 != 0 {
        return Err("is a journal and no file system".to_owned());
    }
    Ok(())
}

struct Partition {
    number: usize,
    start: u64,
    len: u64,
    is_root: bool,
}

/// The partitions of a GPT, or the primary ones of an MBR, as far as they lie within the disk.
fn partitions(file: &File, size: u64) -> Vec<Partition> {
    let sector = read_at(file, 0, 512);
    if sector.get(510..) != Some(&[0x55, 0xaa]) {
        return Vec::new();
    }
    let header = read_at(file, 512, 92);
    let mut found = Vec::new();
    let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let u64_at = |bytes: &[u8], at: usize| u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32;
    let mut add = |number: usize, first: u64, sectors: u64, is_root: bool| {
        let (start, len) = (first.saturating_mul(512), sectors.saturating_mul(512));
        if len >= BLOCK && start.checked_add(len).is_some_and(|end| end <= size) {
            found.push(Partition { number, start, len, is_root });
        }
    };
    if header.starts_with(b"EFI PART") {
        let (table, count, entry_len) = (u64_at(&header, 72), u32_at(&header, 80).min(128), u32_at(&header, 84));
        for index in 0..count {
            let at = table.saturating_mul(512).saturating_add(u64::from(index) * u64::from(entry_len));
            let entry = read_at(file, at, 48);
            if entry.len() == 48 && entry[..16] != [0; 16] {
                let (first, last) = (u64_at(&entry, 32), u64_at(&entry, 40));
                let sectors = last.checked_sub(first).and_then(|s| s.checked_add(1)).unwrap_or(0);
                add(index as usize + 1, first, sectors, entry[..16] == ROOT_TYPE);
            }
        }
    } else {
        for (index, entry) in sector[446..510].chunks_exact(16).enumerate() {
            if entry[4] != 0 {
                add(index + 1, u64::from(u32_at(entry, 8)), u64::from(u32_at(entry, 12)), false);
            }
        }
    }
    found
}

/// Makes a raw file of a qcow2 image. One that refers to other files is refused: they would be read, too.
///
/// # Errors
/// `ToolMissing` without qemu-img; `Invalid` for what is no qcow2 image or needs other files; `Io`.
pub fn convert_qcow2(path: &Path, raw: &Path) -> Result<()> {
    // A path that begins like an option or a protocol is neither.
    let path = std::path::absolute(path).map_err(|e| Error::io(path.display(), e))?;
    let os = std::ffi::OsStr::new;
    let qemu_img = |args: &[&std::ffi::OsStr], writes: &[&Path]| {
        let mut command = std::process::Command::new("qemu-img");
        // It is let to what was asked for and nothing else: what the image says of other files leads nowhere.
        let ran = jail::run_tool(command.args(args), &[&path], writes, CONVERTED_BYTES_MAX);
        let ran = ran.map_err(|e| tool_missing("qemu-img", "qemu-utils", &e))?;
        if ran.status.success() {
            return Ok(ran.stdout);
        }
        let why = String::from_utf8_lossy(&ran.stderr).trim().replace('\n', "; ");
        let message = format!("{} is no qcow2 image that can be read: {why}", path.display());
        Err(Error::new(ErrorKind::Invalid, message)
            .hint("check it: qemu-img info FILE; a raw image is imported with --format raw"))
    };
    let told = qemu_img(&[os("info"), os("-f"), os("qcow2"), os("--output=json"), path.as_os_str()], &[])?;
    let info: serde_json::Value = serde_json::from_slice(&told)
        .map_err(|e| Error::new(ErrorKind::Invalid, format!("what qemu-img says cannot be read: {e}")))?;
    let other = [&info["backing-filename"], &info["format-specific"]["data"]["data-file"]];
    if let Some(other) = other.iter().find_map(|v| v.as_str()) {
        return Err(Error::new(ErrorKind::Invalid, format!("{} needs another file: {other}", path.display()))
            .hint("make one image of them first: qemu-img convert -O qcow2 FILE WHOLE"));
    }
    let size = info["virtual-size"].as_u64().filter(|size| *size <= CONVERTED_BYTES_MAX);
    let size = size.ok_or_else(|| {
        let most = CONVERTED_BYTES_MAX >> 40;
        Error::new(ErrorKind::Invalid, format!("{} is a disk of more than {most} TiB", path.display()))
    })?;
    // Made here: it may write to files and make none.
    File::create(raw).and_then(|file| file.set_len(size)).map_err(|e| Error::io(raw.display(), e))?;
    let args = [os("convert"), os("-n"), os("-f"), os("qcow2"), os("-O"), os("raw"), path.as_os_str(), raw.as_os_str()];
    qemu_img(&args, &[raw]).map(drop)
}
