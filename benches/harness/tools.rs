//! Programs of the host, and file systems on loop devices that go away with their value.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Whether a program is installed.
pub fn has(program: &str) -> bool {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&dirs).chain(["/usr/sbin", "/sbin"].map(PathBuf::from)).any(|dir| dir.join(program).is_file())
}

/// Runs a program to its end; its standard output.
///
/// # Errors
/// What it said when it failed or could not be started.
pub fn run(program: &str, args: &[&dyn AsRef<OsStr>]) -> Result<String, String> {
    run_in(Path::new("."), program, args)
}

/// [`run`] in a directory.
///
/// # Errors
/// As there.
pub fn run_in(dir: &Path, program: &str, args: &[&dyn AsRef<OsStr>]) -> Result<String, String> {
    let mut command = Command::new(program);
    command.current_dir(dir).args(args.iter().map(|a| a.as_ref())).stdin(Stdio::null());
    finish(&mut command)
}

/// Runs a command to its end; its standard output.
///
/// # Errors
/// As [`run`].
pub fn finish(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let out = command.output().map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    Err(format!("{program}: {}: {}", out.status, String::from_utf8_lossy(&out.stderr).trim()))
}

mod ioctl {
    nix::ioctl_write_int_bad!(ficlone, nix::request_code_write!(0x94, 9, std::mem::size_of::<i32>()));
}

/// A new file that shares all of another, on a file system that can (`FICLONE`).
pub fn clone(parent: &Path, child: &Path) -> File {
    let from = File::open(parent).expect("the parent is there");
    let to = File::create_new(child).expect("a new file");
    // SAFETY: FICLONE takes a descriptor by value and both are open for the whole call.
    unsafe { ioctl::ficlone(to.as_raw_fd(), from.as_raw_fd()) }.expect("a clone");
    to
}

/// Bytes a directory occupies on the disk.
pub fn allocated(path: &Path) -> u64 {
    let out = run("du", &[&"-s", &"-B1", &path]).expect("du works");
    out.split_whitespace().next().and_then(|n| n.parse().ok()).expect("du prints a number")
}

/// Whether file systems can be mounted here.
pub fn can_mount() -> bool {
    nix::unistd::geteuid().is_root() && Path::new("/dev/loop-control").exists()
}

/// Goes on in a mount namespace of its own, so that no mount or loop device outlives the process, however it ends. Call
/// it first in `main`. Where that is not possible nothing happens.
pub fn own_mounts() {
    use std::os::unix::process::CommandExt;
    const DONE: &str = "MIOSA_BENCH_OWN_MOUNTS";
    if !can_mount() || !has("unshare") || std::env::var_os(DONE).is_some() {
        return;
    }
    let mut args = std::env::args_os();
    let me = args.next().expect("a program has a name");
    let failed = Command::new("unshare").args(["--mount", "--"]).arg(me).args(args).env(DONE, "1").exec();
    eprintln!("unshare: {failed}");
}

/// A mounted image; unmounted when dropped.
pub struct Mount {
    at: tempfile::TempDir,
    /// An image made for the purpose.
    _image: Option<tempfile::NamedTempFile>,
}

impl Mount {
    /// Mounts an image that is there.
    ///
    /// # Errors
    /// What `mount` said.
    pub fn image(image: &Path, options: &str) -> Result<Self, String> {
        let at = tempfile::tempdir().map_err(|e| e.to_string())?;
        run("mount", &[&"-o", &format!("loop,{options}"), &image, &at.path()])?;
        Ok(Self { at, _image: None })
    }

    /// Makes a new file system of this size with `mkfs.KIND` and mounts it.
    ///
    /// # Errors
    /// What `mkfs` or `mount` said, or that one is missing.
    pub fn fresh(kind: &str, mkfs: &[&str], options: &str, size: u64) -> Result<Self, String> {
        if !can_mount() {
            return Err("it needs root and loop devices".into());
        }
        let program = format!("mkfs.{kind}");
        if !has(&program) {
            return Err(format!("{program} is not installed"));
        }
        let image = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
        image.as_file().set_len(size).map_err(|e| e.to_string())?;
        finish(Command::new(&program).args(mkfs).arg(image.path()))?;
        let mut mount = Self::image(image.path(), options)?;
        mount._image = Some(image);
        Ok(mount)
    }

    /// Where.
    pub fn path(&self) -> &Path {
        self.at.path()
    }

    /// Bytes in use, data and metadata, after a sync.
    pub fn used(&self) -> u64 {
        run("sync", &[&"-f", &self.path()]).expect("sync works");
        let stat = nix::sys::statvfs::statvfs(self.path()).expect("a file system says how full it is");
        (stat.blocks() - stat.blocks_free()) * stat.fragment_size()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(e) = run("umount", &[&self.at.path()]) {
            eprintln!("{e}");
            let _ = run("umount", &[&"-l", &self.at.path()]);
        }
    }
}
