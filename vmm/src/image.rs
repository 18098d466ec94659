//! What guests boot: Debian's cloud kernel, an initramfs with our agent as its init, and a small base root file system.
//!
//! Everything is made with Debian's own tools, from the host's own package sources, under a name of its own first and
//! renamed when it is whole: a result that is there is complete. The functions block for seconds to minutes; from
//! async code call them with `spawn_blocking`. Tools that read what others have made are locked up ([`crate::jail`]); those
//! that read Debian's signed packages are not.

mod cpio;
mod import;
mod layer;
mod modules;
mod oci;
mod tree;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

#[cfg(fuzzing)]
pub use import::lay_out;
pub use import::{ImageFormat, ReadyImage, convert_qcow2, prepare};
pub use oci::ImageConfig;

use crate::{Error, ErrorKind, Result, jail};

/// Debian's package that depends on the newest cloud kernel.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// What the base root file system has besides Debian's minimum.
const BASE_PACKAGES: &str = "python3-minimal,python3,python3-pip,git,ca-certificates";
/// What mkfs.ext4 gives an inode of its own unless told otherwise.
const BYTES_PER_INODE: u64 = 16_384;
/// The same in every image, so that images made from the same packages differ little.
const BASE_UUID: &str = "6d696f73-6100-4000-8000-000000000001";
const BASE_HASH_SEED: &str = "6d696f73-6100-4000-8000-000000000002";

/// An unpacked kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The kernel image.
    pub vmlinuz: PathBuf,
    /// Its modules, as in `/lib/modules/VERSION`.
    pub modules_dir: PathBuf,
    /// Its release, as `uname -r` says.
    pub version: String,
}

/// Fetches and unpacks Debian's cloud kernel under `cache_dir`, unless one is there already. Nothing is installed.
///
/// # Errors
/// `ToolMissing` without apt or dpkg; `Image` when the package cannot be had; `Io`.
pub fn fetch_kernel(cache_dir: &Path) -> Result<Kernel> {
    let home = cache_dir.join("kernel");
    if let Some(kernel) = newest_kernel(&home) {
        return Ok(kernel);
    }
    make_dir(&home)?;
    let depends = run(Command::new("apt-cache").args(["depends", "--important", KERNEL_PACKAGE]), "apt")?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| {
            let message = format!("apt knows no package {KERNEL_PACKAGE}");
            Error::new(ErrorKind::Image, message).hint("run apt-get update; the host must have Debian's sources")
        })?;
    let work = tempfile::tempdir_in(&home).map_err(|e| Error::io(home.display(), e))?;
    run(Command::new("apt-get").args(["download", "--quiet", package]).current_dir(work.path()), "apt").map_err(
        |e| {
            let hint = e.hint.clone().unwrap_or_else(|| "run apt-get update and try again".into());
            e.hint(hint)
        },
    )?;
    let package_file = find_in(work.path(), |name| name.ends_with(".deb"))
        .ok_or_else(|| Error::new(ErrorKind::Image, format!("apt-get download {package} left no package behind")))?;
    let unpacked = work.path().join("unpacked");
    run(Command::new("dpkg-deb").arg("-x").arg(&package_file).arg(&unpacked), "dpkg")?;
    let kernel = kernel_in(&unpacked)
        .ok_or_else(|| Error::new(ErrorKind::Image, format!("package {package} has no kernel and modules")))?;
    let target = home.join(&kernel.version);
    if !target.exists() {
        fs::rename(&unpacked, &target).map_err(|e| Error::io(target.display(), e))?;
    }
    kernel_in(&target).ok_or_else(|| Error::new(ErrorKind::Image, format!("{} has no kernel", target.display())))
}

fn newest_kernel(home: &Path) -> Option<Kernel> {
    let mut dirs: Vec<PathBuf> = fs::read_dir(home).ok()?.flatten().map(|entry| entry.path()).collect();
    // Temporary directories begin with a dot.
    dirs.retain(|dir| !dir.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")));
    dirs.sort();
    dirs.iter().rev().find_map(|dir| kernel_in(dir))
}

/// The kernel in an unpacked package; modules may be under `usr/lib` or `lib`.
fn kernel_in(root: &Path) -> Option<Kernel> {
    let vmlinuz = find_in(&root.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    let version = vmlinuz.file_name()?.to_str()?.strip_prefix("vmlinuz-")?.to_owned();
    let modules_dir = ["lib/modules", "usr/lib/modules"]
        .iter()
        .map(|dir| root.join(dir).join(&version))
        .find(|dir| dir.join("kernel").is_dir())?;
    Some(Kernel { vmlinuz, modules_dir, version })
}

fn find_in(dir: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    fs::read_dir(dir).ok()?.flatten().find(|e| e.file_name().to_str().is_some_and(&wanted)).map(|e| e.path())
}

/// Makes the initramfs at `out`: the agent (a static program) as `/init`, the modules it loads before the root disk is
/// there (`modules/order`), and those it keeps for later (`modules/later`). Nothing is done when `out` was made from the same agent and kernel.
///
/// # Errors
/// `Image` for a missing module or an agent that is no static program; `Io`.
pub fn build_initramfs(kernel: &Kernel, agent_binary: &Path, out: &Path) -> Result<()> {
    let agent = fs::read(agent_binary).map_err(|e| {
        Error::new(ErrorKind::Image, format!("the guest's agent {}: {e}", agent_binary.display()))
            .hint("build it with: cargo build --release -p miosa-agent")
    })?;
    if is_dynamic(&agent) {
        let message = format!("the guest's agent {} is not a static program", agent_binary.display());
        return Err(Error::new(ErrorKind::Image, message)
            .hint("build it for x86_64-unknown-linux-gnu with RUSTFLAGS=\"-C target-feature=+crt-static\""));
    }
    // An archive is made of nothing but these.
    let wanted = [modules::WANTED, modules::LATER].concat();
    let inputs = blake3::Hasher::new()
        .update(b"miosa initramfs 2\n")
        .update(kernel.version.as_bytes())
        .update(wanted.join(",").as_bytes())
        .update(&agent)
        .finalize()
        .to_hex();
    let mark = sibling(out, "inputs");
    if out.is_file() && fs::read_to_string(&mark).is_ok_and(|made_from| made_from == inputs.as_str()) {
        return Ok(());
    }
    let modules = modules::resolve(&kernel.modules_dir, &wanted)?;
    let mut archive = cpio::Archive::default();
    for dir in ["dev", "proc", "sys", "newroot", "modules"] {
        archive.directory(dir);
    }
    archive.file("init", 0o755, &agent);
    let (mut order, mut later) = (String::new(), String::new());
    for module in &modules {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.code);
        let list = if modules::LATER.contains(&module.name.as_str()) { &mut later } else { &mut order };
        list.push_str(&format!("{}.ko\n", module.name));
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive.file("modules/later", 0o644, later.as_bytes());
    let _ = fs::remove_file(&mark);
    write_whole(out, &archive.finish())?;
    write_whole(&mark, inputs.as_bytes())
}

/// Whether an ELF program asks for a dynamic loader (program header PT_INTERP).
fn is_dynamic(elf: &[u8]) -> bool {
    let number = |at: usize, len: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(len)?)?;
        usize::try_from(bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))).ok()
    };
    let Some((table, len, count)) = (|| Some((number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?)))() else {
        return false;
    };
    (0..count).any(|index| {
        let at = index.checked_mul(len).and_then(|offset| table.checked_add(offset));
        at.and_then(|at| number(at, 4)) == Some(3)
    })
}

/// A short word that is another when [`build_base_rootfs`] puts in something else.
pub fn base_version() -> String {
    blake3::hash(BASE_PACKAGES.as_bytes()).to_hex().chars().take(8).collect()
}

/// Makes a raw ext4 image of `size_bytes` at `out`, unless it is there: a small Debian of the host's release with
/// Python, pip, git and certificates, and an empty `/workspace`. The file is sparse. `progress` gets a line at a time.
/// `cache_dir` is where the file tree is kept meanwhile (about 300 MB).
///
/// # Errors
/// `ToolMissing` with the package to install; `Image` when Debian's packages cannot be had; `Io`; `Invalid` for a size
/// below 512 MiB.
pub fn build_base_rootfs(cache_dir: &Path, out: &Path, size_bytes: u64, mut progress: impl FnMut(&str)) -> Result<()> {
    if out.is_file() {
        return Ok(());
    }
    if size_bytes < 512 << 20 {
        return Err(Error::new(ErrorKind::Invalid, "a base image needs at least 512 MiB"));
    }
    make_dir(cache_dir)?;
    let work = tempfile::Builder::new()
        .prefix(".rootfs-")
        .tempdir_in(cache_dir)
        .map_err(|e| Error::io(cache_dir.display(), e))?;
    let tree = work.path().join("tree");
    bootstrap(work.path(), &tree, &mut progress)?;
    furnish(&tree)?;

    progress("making the ext4 image");
    let temporary = tempfile::Builder::new()
        .prefix(".image-")
        .tempfile_in(out.parent().unwrap_or(Path::new(".")))
        .map_err(|e| Error::io(out.display(), e))?;
    temporary.as_file().set_len(size_bytes).map_err(|e| Error::io(out.display(), e))?;
    make_ext4(&tree, temporary.path(), BASE_UUID, BASE_HASH_SEED, None)?;
    temporary.as_file().sync_all().map_err(|e| Error::io(out.display(), e))?;
    temporary.persist(out).map_err(|e| Error::io(out.display(), e))?;
    Ok(())
}

/// Puts a directory tree into a file of the wanted size as an ext4 file system without partitions. With `entries` there
/// are inodes for at least so many, with room to grow.
///
/// # Errors
/// `ToolMissing` without e2fsprogs; `Image` when the tree does not fit.
pub fn make_ext4(tree: &Path, image: &Path, uuid: &str, hash_seed: &str, entries: Option<u64>) -> Result<()> {
    // The file is one hole: nothing has to be zeroed, neither now nor by the guest's kernel later.
    let options = format!("hash_seed={hash_seed},assume_storage_prezeroed=1,nodiscard,root_owner=0:0");
    let mut command = Command::new("mkfs.ext4");
    command.args(["-q", "-F", "-b", "4096", "-m", "1", "-O", "^orphan_file,^metadata_csum_seed", "-L", "miosa-root"]);
    let size = image.metadata().map_err(|e| Error::io(image.display(), e))?.len();
    if let Some(entries) = entries.filter(|entries| entries * 2 > size / BYTES_PER_INODE) {
        command.args(["-N", &(entries * 2).to_string()]);
    }
    command.args(["-U", uuid, "-E", &options, "-d"]).arg(tree).arg(image);
    make(&mut command, &[tree], image, size)
}

/// Puts an empty ext4 file system without partitions into a file of the wanted size that is one hole. Each has an identity
/// of its own.
///
/// # Errors
/// `ToolMissing` without e2fsprogs; `Image` when the size is none for a file system; `Io`.
pub fn make_empty_ext4(image: &Path) -> Result<()> {
    let mut command = Command::new("mkfs.ext4");
    // As in `make_ext4`: what reads as zero already is not written.
    command.args(["-q", "-F", "-b", "4096", "-m", "0", "-O", "^orphan_file,^metadata_csum_seed"]);
    command.args(["-E", "assume_storage_prezeroed=1,nodiscard,root_owner=0:0"]).arg(image);
    let size = image.metadata().map_err(|e| Error::io(image.display(), e))?.len();
    make(&mut command, &[], image, size)
}

/// Has a tool of e2fsprogs write a file system into a file of that size, of what others may have made.
fn make(command: &mut Command, reads: &[&Path], image: &Path, size: u64) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = jail::run_tool(command, reads, &[image], size).map_err(|e| tool_missing(&name, "e2fsprogs", &e))?;
    printed(command, &output).map(drop)
}

fn bootstrap(work: &Path, tree: &Path, progress: &mut impl FnMut(&str)) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    command.env("TMPDIR", work).args(["--mode=root", "--variant=minbase", "--format=directory"]);
    command.arg(format!("--include={BASE_PACKAGES}"));
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    for path in ["man", "locale", "doc", "info", "lintian", "bash-completion"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{path}/*"));
    }
    command.arg("--dpkgopt=path-include=/usr/share/doc/*/copyright");
    // No suite's sources are named here: those of the host are used.
    command.arg(host_release()?).arg(tree);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| tool_missing("mmdebstrap", "mmdebstrap", &e))?;
    let mut last = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).split(b'\n').map_while(|line| line.ok()) {
            let line = String::from_utf8_lossy(&line).into_owned();
            progress(line.trim_start_matches("I: "));
            last.push(line);
            if last.len() > 15 {
                last.remove(0);
            }
        }
    }
    let status = child.wait().map_err(|e| Error::io("mmdebstrap", e))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Image, format!("mmdebstrap failed: {}", last.join(" | ")))
        .hint("it needs root and Debian's package sources; try apt-get update"))
}

fn host_release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").map_err(|e| Error::io("/etc/os-release", e))?;
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(|value| value.trim_matches('"'))
    };
    match (field("ID"), field("VERSION_CODENAME")) {
        (Some("debian"), Some(codename)) => Ok(codename.to_owned()),
        _ => Err(Error::new(ErrorKind::Image, "the host is not a Debian release")
            .hint("give a raw ext4 image of your own instead")),
    }
}

/// What Debian's minimum lacks for a sandbox.
fn furnish(tree: &Path) -> Result<()> {
    let write = |path: &str, text: &str| {
        let path = tree.join(path);
        fs::write(&path, text).map_err(|e| Error::io(path.display(), e))
    };
    for dir in ["workspace", "root", "proc", "sys", "dev", "run", "tmp"] {
        let path = tree.join(dir);
        fs::create_dir_all(&path).map_err(|e| Error::io(path.display(), e))?;
    }
    write("etc/hostname", "sandbox\n")?;
    write("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")?;
    // The agent fills it in when there is a network; the host's own is none of the guest's business.
    let _ = fs::remove_file(tree.join("etc/resolv.conf"));
    write("etc/resolv.conf", "")?;
    // Every machine gets its own.
    write("etc/machine-id", "")?;
    write("etc/fstab", "/dev/vda / ext4 noatime 0 1\n")?;
    let user = "sandbox:x:1000:1000:,,,:/home/sandbox:/bin/bash\n";
    append(&tree.join("etc/passwd"), user)?;
    append(&tree.join("etc/group"), "sandbox:x:1000:\n")?;
    append(&tree.join("etc/shadow"), "sandbox:*:19700:0:99999:7:::\n")?;
    let home = tree.join("home/sandbox");
    fs::create_dir_all(&home).map_err(|e| Error::io(home.display(), e))?;
    std::os::unix::fs::chown(&home, Some(1000), Some(1000)).map_err(|e| Error::io(home.display(), e))?;
    // Logs of the making differ from run to run.
    for log in ["var/log/dpkg.log", "var/log/alternatives.log", "var/log/bootstrap.log", "var/cache/ldconfig/aux-cache"]
    {
        let _ = fs::remove_file(tree.join(log));
    }
    let _ = fs::remove_dir_all(tree.join("var/log/apt"));
    Ok(())
}

fn append(path: &Path, line: &str) -> Result<()> {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().append(true).open(path).map_err(|e| Error::io(path.display(), e))?;
    file.write_all(line.as_bytes()).map_err(|e| Error::io(path.display(), e))
}

/// Runs a tool to its end and returns what it printed.
fn run(command: &mut Command, package: &str) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|e| tool_missing(&name, package, &e))?;
    printed(command, &output)
}

/// What a tool printed, unless it failed.
fn printed(command: &Command, output: &Output) -> Result<String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let name = command.get_program().to_string_lossy();
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    let last = lines[lines.len().saturating_sub(8)..].join(" | ");
    let arguments: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
    Err(Error::new(ErrorKind::Image, format!("{name} {} failed ({}): {last}", arguments.join(" "), output.status)))
}

fn tool_missing(name: &str, package: &str, error: &std::io::Error) -> Error {
    let message = format!("cannot run {name}: {error}");
    Error::new(ErrorKind::ToolMissing, message).hint(format!("apt-get install {package}"))
}

fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir.display(), e))
}

fn sibling(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    PathBuf::from(name)
}

/// Writes a file so that it is there whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = sibling(path, "tmp");
    fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path)).map_err(|e| Error::io(path.display(), e))
}
