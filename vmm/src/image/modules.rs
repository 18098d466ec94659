//! Which kernel modules a guest needs before it has its root disk, and in what order.
//!
//! The order comes from the modules themselves (`depends=` and `softdep=pre:` in their `.modinfo`), not from
//! `modules.dep`: that file is made when a kernel is installed, and ours is only unpacked.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::{Error, ErrorKind, Result};

/// What has to work before the root disk is mounted and the host is served, and what every guest wants at once.
pub(crate) const WANTED: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "crc32c_generic",
    "crc32c_intel",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
];
/// What few guests need, and those not at once: the agent loads them then. All they depend on is named here too.
pub(crate) const LATER: &[&str] = &["inet_diag", "tcp_diag"];
/// Those that some kernels do not have at all.
const OPTIONAL: &[&str] = &["crc32c_intel", "virtio_rng", "inet_diag", "tcp_diag"];

/// A module's name and its code, decompressed.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) code: Vec<u8>,
}

/// The wanted modules and all they depend on, each after its dependencies. Those built into the kernel are left out.
///
/// # Errors
/// `Image` when a needed module is neither there nor built in, cannot be read, or depends on itself.
pub(crate) fn resolve(modules_dir: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut resolver = Resolver { files: BTreeMap::new(), built_in: Vec::new(), done: Vec::new(), open: Vec::new() };
    let listed = fs::read_to_string(modules_dir.join("modules.builtin")).unwrap_or_default();
    resolver.built_in = listed.lines().filter_map(|line| name_of(Path::new(line))).collect();
    find(modules_dir, 0, &mut resolver.files)?;
    for name in wanted {
        resolver.add(name, OPTIONAL.contains(name))?;
    }
    Ok(resolver.done)
}

struct Resolver {
    files: BTreeMap<String, PathBuf>,
    built_in: Vec<String>,
    done: Vec<Module>,
    open: Vec<String>,
}

impl Resolver {
    fn add(&mut self, name: &str, optional: bool) -> Result<()> {
        let name = normal(name);
        if self.built_in.contains(&name) || self.done.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let failed = |message: String| Error::new(ErrorKind::Image, message);
        if self.open.contains(&name) {
            return Err(failed(format!("kernel module {name} depends on itself: {}", self.open.join(" → "))));
        }
        let Some(path) = self.files.get(&name).cloned() else {
            if optional {
                return Ok(());
            }
            return Err(failed(format!("the kernel has no module {name}, built in or not"))
                .hint("guests need virtio-pci, virtio-blk, virtio-console, virtio-net and ext4"));
        };
        let code = read(&path)?;
        let info = modinfo(&code).ok_or_else(|| failed(format!("{} is not a kernel module", path.display())))?;
        self.open.push(name.clone());
        for (dependency, soft) in info {
            self.add(&dependency, soft)?;
        }
        self.open.pop();
        self.done.push(Module { name, code });
        Ok(())
    }
}

/// Names are the same with `-` and `_`.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn name_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, rest) = name.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"].contains(&rest).then(|| normal(stem))
}

fn find(dir: &Path, depth: usize, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(dir).map_err(|e| Error::new(ErrorKind::Image, format!("{}: {e}", dir.display())))?;
    for entry in entries.flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth < 16 => find(&path, depth + 1, files)?,
            Ok(kind) if kind.is_file() => {
                if let Some(name) = name_of(&path) {
                    files.insert(name, path);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// A module's code; compressed ones go through the tool of that name.
fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |e: std::io::Error| Error::new(ErrorKind::Image, format!("{}: {e}", path.display()));
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => {
            let mut code = Vec::new();
            fs::File::open(path).and_then(|mut file| file.read_to_end(&mut code)).map_err(failed)?;
            return Ok(code);
        }
    };
    let output = std::process::Command::new(tool).arg("-dc").arg(path).output().map_err(|e| {
        let message = format!("cannot run {tool} to unpack {}: {e}", path.display());
        Error::new(ErrorKind::ToolMissing, message).hint(format!("install {tool}"))
    })?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(failed(std::io::Error::other(format!("{tool} failed"))))
    }
}

/// What a module depends on: name, and whether it may be missing. `None` when this is no module.
fn modinfo(elf: &[u8]) -> Option<Vec<(String, bool)>> {
    let info = section(elf, b".modinfo")?;
    let mut dependencies = Vec::new();
    for entry in info.split(|byte| *byte == 0) {
        let entry = String::from_utf8_lossy(entry);
        if let Some(names) = entry.strip_prefix("depends=") {
            dependencies.extend(names.split(',').filter(|name| !name.is_empty()).map(|name| (name.to_owned(), false)));
        } else if let Some(soft) = entry.strip_prefix("softdep=pre:") {
            let names = soft.split_whitespace().take_while(|word| *word != "post:");
            dependencies.extend(names.map(|name| (name.to_owned(), true)));
        }
    }
    Some(dependencies)
}

/// A section of a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let number = |at: usize, len: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(len)?)?;
        let value = bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    };
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, entry_len, count, names) = (number(0x28, 8)?, number(0x3a, 2)?, number(0x3c, 2)?, number(0x3e, 2)?);
    let header = |index: usize| table.checked_add(index.checked_mul(entry_len)?);
    let contents = |header: usize| -> Option<&'a [u8]> {
        let (offset, len) = (number(header.checked_add(0x18)?, 8)?, number(header.checked_add(0x20)?, 8)?);
        elf.get(offset..offset.checked_add(len)?)
    };
    let names = contents(header(names)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let name = names.get(number(header, 4)?..)?;
        (name.split(|byte| *byte == 0).next()? == wanted).then(|| contents(header))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest ELF file with a `.modinfo`.
    fn module(info: &str) -> Vec<u8> {
        let (names, info) = (b"\0.modinfo\0", info.as_bytes());
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let table = 64 + names.len() + info.len();
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        elf[0x3a] = 64;
        elf[0x3c] = 2;
        elf.extend_from_slice(names);
        elf.extend_from_slice(info);
        for (name, offset, len) in [(0_u32, 64, names.len()), (1, 64 + names.len(), info.len())] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(len as u64).to_le_bytes());
            elf.extend_from_slice(&header);
        }
        elf
    }

    fn tree(modules: &[(&str, &str)], built_in: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("kernel/sub")).unwrap();
        for (name, info) in modules {
            fs::write(dir.path().join("kernel/sub").join(name), module(info)).unwrap();
        }
        fs::write(dir.path().join("modules.builtin"), built_in).unwrap();
        dir
    }

    fn names(dir: &tempfile::TempDir, wanted: &[&str]) -> Vec<String> {
        resolve(dir.path(), wanted).unwrap().into_iter().map(|module| module.name).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tree(
            &[
                ("ext4.ko", "license=GPL\0softdep=pre: crc32c\0depends=jbd2,crc16\0"),
                ("jbd2.ko", "depends=crc16\0"),
                ("crc16.ko", "depends=\0"),
                ("virtio-pci.ko", "depends=virtio,built-in\0"),
                ("virtio.ko", "\0"),
            ],
            "kernel/lib/built_in.ko\n",
        );
        assert_eq!(names(&dir, &["ext4", "virtio_pci"]), ["crc16", "jbd2", "ext4", "virtio", "virtio_pci"]);
    }

    #[test]
    fn what_is_missing_or_broken_is_an_error() {
        let dir = tree(&[("a.ko", "depends=b\0"), ("b.ko", "depends=a\0"), ("c.ko", "depends=none\0")], "");
        for wanted in ["a", "c", "nothing"] {
            assert_eq!(resolve(dir.path(), &[wanted]).unwrap_err().kind, ErrorKind::Image, "{wanted}");
        }
        fs::write(dir.path().join("kernel/bad.ko"), b"not ELF").unwrap();
        assert_eq!(resolve(dir.path(), &["bad"]).unwrap_err().kind, ErrorKind::Image);
        assert!(names(&dir, &["virtio_rng"]).is_empty(), "optional modules may be missing");
    }

    #[test]
    fn hostile_section_tables_are_refused() {
        let good = module("depends=\0");
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] = 0xff;
            let _ = modinfo(&bad);
            let _ = modinfo(&good[..at]);
        }
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        let dir = tree(&[("m.ko", "depends=\0")], "");
        let path = dir.path().join("kernel/sub/m.ko");
        let status = std::process::Command::new("gzip").arg(&path).status().unwrap();
        assert!(status.success());
        assert_eq!(resolve(dir.path(), &["m"]).unwrap()[0].code, module("depends=\0"));
    }
}
