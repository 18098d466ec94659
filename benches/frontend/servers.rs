//! Whoever serves a disk: ours and the peers', each in processes of its own.
//!
//! Ours is this program once more (`serve`), with the front ends of the library on a store with the default options, but that
//! it does nothing in the background, so that what was written stays as it is while others take their turn; [`SEALING`] lets
//! it seal what exceeds the log's limit, as it would.

use crate::harness::tools;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request, Session,
};
use miosa::frontend::{FuseMount, VhostUserServer};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask};
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};
use storage::{Options, Store};

/// The argument that makes this program a server.
const SERVE: &str = "serve";
/// The argument that lets our store work in the background.
pub const SEALING: &str = "--sealing";
/// The name of a store's disk.
pub const DISK: &str = "disk";
/// After this long a server counts as broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// How a disk is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Export {
    VhostUser,
    Fuse,
}

/// What serves a disk, of files in a directory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum System {
    Miosa,
    /// qemu-storage-daemon: a file past the page cache, io_uring.
    QsdRaw,
    /// The same with qcow2 on it.
    QsdQcow2,
    /// Compressed qcow2, for reading.
    QsdCompressed,
    /// nbdkit's file plugin, under nbdfuse.
    Nbdfuse,
    /// Answers reads at once, with zeroes.
    NullFuse,
}

impl System {
    pub fn name(self) -> &'static str {
        match self {
            Self::Miosa => "miosa",
            Self::QsdRaw => "qsd raw",
            Self::QsdQcow2 => "qsd qcow2",
            Self::QsdCompressed => "qsd comp.",
            Self::Nbdfuse => "nbdfuse",
            Self::NullFuse => "null FUSE",
        }
    }

    /// Programs that it needs.
    pub fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Miosa | Self::NullFuse => &[],
            Self::QsdRaw => &["qemu-storage-daemon"],
            Self::QsdQcow2 | Self::QsdCompressed => &["qemu-storage-daemon", "qemu-img"],
            Self::Nbdfuse => &["nbdkit", "nbdfuse"],
        }
    }

    /// Whether it takes writes.
    pub fn writes(self) -> bool {
        !matches!(self, Self::QsdCompressed | Self::NullFuse)
    }

    /// Where its data are in a directory.
    pub fn data(self, dir: &Path) -> PathBuf {
        dir.join(match self {
            Self::Miosa => "store",
            Self::QsdRaw | Self::Nbdfuse | Self::NullFuse => "disk.raw",
            Self::QsdQcow2 => "disk.qcow2",
            Self::QsdCompressed => "compressed.qcow2",
        })
    }
}

/// Processes that serve a disk. They end when this is dropped, or when this process dies.
pub struct Server {
    /// The last one is the one to be asked to end first.
    children: Vec<Child>,
    /// The socket, or the file.
    pub place: PathBuf,
    mount: Option<PathBuf>,
}

impl Server {
    /// Starts `system` on its data in `dir` and waits until the disk can be used. To be called by the main thread:
    /// servers die with the thread that started them.
    ///
    /// # Errors
    /// What is missing or went wrong.
    pub fn start(system: System, export: Export, dir: &Path, size: u64) -> Result<Self, String> {
        let mut server = Self { children: Vec::new(), place: dir.join("disk.sock"), mount: None };
        let _ = std::fs::remove_file(&server.place);
        if export == Export::Fuse {
            let mount = dir.join("mount");
            std::fs::create_dir_all(&mount).map_err(|e| e.to_string())?;
            server.place = mount.join(DISK);
            server.mount = Some(mount);
        }
        let data = system.data(dir);
        match system {
            System::Miosa => server.ourselves(if export == Export::Fuse { "fuse" } else { "vhost-user" }, &data)?,
            System::NullFuse => server.ourselves("null", &data)?,
            System::QsdRaw => server.qsd(export, "raw", &data, true)?,
            System::QsdQcow2 => server.qsd(export, "qcow2", &data, true)?,
            System::QsdCompressed => server.qsd(export, "qcow2", &data, false)?,
            System::Nbdfuse => server.nbdfuse(dir, &data)?,
        }
        server.ready(export, size)?;
        Ok(server)
    }

    fn spawn(&mut self, command: &mut Command) -> Result<(), String> {
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        // SAFETY: between fork and exec only two system calls are made, on the child's own signal mask and death signal.
        unsafe {
            command.pre_exec(|| {
                pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&signals()), None)?;
                Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)
            });
        }
        self.children.push(command.spawn().map_err(|e| format!("{program}: {e}"))?);
        Ok(())
    }

    fn ourselves(&mut self, export: &str, data: &Path) -> Result<(), String> {
        let me = std::env::current_exe().map_err(|e| e.to_string())?;
        let place = self.mount.as_ref().unwrap_or(&self.place).clone();
        let sealing = std::env::args().any(|arg| arg == SEALING);
        self.spawn(Command::new(me).arg(SERVE).arg(export).arg(data).arg(place).args(sealing.then_some(SEALING)))
    }

    fn qsd(&mut self, export: Export, format: &str, data: &Path, writable: bool) -> Result<(), String> {
        let mut command = Command::new("qemu-storage-daemon");
        let (read_only, writable) = if writable { ("off", "on") } else { ("on", "off") };
        let file = format!(
            "driver=file,node-name=file,cache.direct=on,aio=io_uring,read-only={read_only},filename={}",
            data.display()
        );
        let disk = format!("driver={format},node-name=disk,file=file,cache.direct=on,read-only={read_only}");
        command.args(["--object", "iothread,id=io0", "--blockdev", &file, "--blockdev", &disk]);
        let place = self.place.display();
        let export = match export {
            Export::VhostUser => format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={place},num-queues={},\
                 writable={writable},iothread=io0",
                super::lanes::QUEUES
            ),
            Export::Fuse => {
                // It takes the place of a file that is there.
                std::fs::write(&self.place, []).map_err(|e| e.to_string())?;
                self.mount = Some(self.place.clone());
                format!("type=fuse,id=export,node-name=disk,mountpoint={place},writable={writable},iothread=io0")
            }
        };
        self.spawn(command.args(["--export", &export]))
    }

    fn nbdfuse(&mut self, dir: &Path, data: &Path) -> Result<(), String> {
        let socket = dir.join("nbd.sock");
        let _ = std::fs::remove_file(&socket);
        self.spawn(Command::new("nbdkit").args(["--foreground", "--unix"]).arg(&socket).arg("file").arg(data))?;
        let deadline = Instant::now() + PATIENCE;
        while !socket.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let place = self.place.clone();
        self.spawn(Command::new("nbdfuse").arg(place).arg("--unix").arg(&socket))
    }

    fn ready(&mut self, export: Export, size: u64) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let there = match export {
                // Whoever listens is connected to for good, so it is only looked for.
                Export::VhostUser => {
                    let listening = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
                    listening.lines().any(|line| line.ends_with(&*self.place.to_string_lossy()))
                }
                Export::Fuse => std::fs::metadata(&self.place).is_ok_and(|m| m.len() == size),
            };
            if there {
                return Ok(());
            }
            for child in &mut self.children {
                if let Ok(Some(status)) = child.try_wait() {
                    return Err(format!("a server ended: {status}"));
                }
            }
            if Instant::now() > deadline {
                return Err("a server does not begin to serve".into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Processor time that its processes have used, in seconds.
    pub fn cpu_seconds(&self) -> f64 {
        let of = |child: &Child| {
            let clock = nix::time::clock_getcpuclockid(Pid::from_raw(child.id() as i32)).expect("a process's clock");
            Duration::from(clock.now().expect("a living process")).as_secs_f64()
        };
        self.children.iter().map(of).sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A file system whose server has gone would be in the way, so the mount goes first.
        if let Some(mount) = &self.mount {
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        for child in self.children.iter_mut().rev() {
            drop(child.stdin.take());
            let pid = Pid::from_raw(child.id() as i32);
            // Ours ends with its standard input.
            let _ = kill(pid, Signal::SIGTERM);
            let deadline = Instant::now() + PATIENCE;
            while matches!(child.try_wait(), Ok(None)) {
                if Instant::now() > deadline {
                    let _ = child.kill();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

fn signals() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect()
}

/// Has the directory and what is mounted in it removed when this process is told to end. Servers die with it. To be called
/// before there are other threads.
pub fn clean_up_when_told_to_end(dir: PathBuf) {
    signals().thread_block().expect("signals can be blocked");
    std::thread::spawn(move || {
        let signal = signals().wait();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for mount in mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new) {
            if mount.starts_with(&dir) {
                let _ = umount2(mount, MntFlags::MNT_DETACH);
            }
        }
        let _ = std::fs::remove_dir_all(&dir);
        std::process::exit(128 + signal.map_or(0, |signal| signal as i32));
    });
}

/// Serves, if this is what the command line says, until standard input ends or SIGTERM comes, and then ends the process.
pub fn serve_if_asked_to() {
    let args: Vec<OsString> = std::env::args_os().collect();
    let [_, word, export, data, place, more @ ..] = &args[..] else { return };
    if word != SERVE {
        return;
    }
    signals().thread_block().expect("signals can be blocked");
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = kill(Pid::this(), Signal::SIGTERM);
    });
    serve(export, Path::new(data), Path::new(place), more.iter().any(|arg| arg == SEALING));
    std::process::exit(0);
}

fn serve(export: &OsStr, data: &Path, place: &Path, background: bool) {
    if export == "null" {
        let size = std::fs::metadata(data).expect("the disk's file").len();
        let mut config = Config::default();
        config.n_threads = Some(1);
        let session = Session::new(NullFile { size }, place, &config).and_then(Session::spawn).expect("a mount");
        let _ = signals().wait();
        drop(session);
        return;
    }
    let options = Options { background, idle: Duration::from_secs(24 * 3600), ..Options::default() };
    let store = Store::open(data, options).expect("the store opens");
    let id = store.disk_by_name(DISK).expect("the store has the disk").id;
    let disk = store.disk(id).expect("it is there");
    if export == "fuse" {
        let mount = FuseMount::mount(place).expect("a mount");
        mount.add(DISK, disk).expect("a file");
        let _ = signals().wait();
        drop(mount);
    } else {
        let server = VhostUserServer::start(disk, place).expect("a socket");
        let _ = signals().wait();
        server.stop();
    }
}

/// Programs of a system that are not installed.
pub fn missing(system: System) -> Option<&'static str> {
    system.programs().iter().find(|program| !tools::has(program)).copied()
}

/// A file system with one file that reads as zeroes: what a read through FUSE costs when nothing is done for it.
struct NullFile {
    size: u64,
}

const TTL: Duration = Duration::from_secs(3600);

impl NullFile {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let root = inode == INodeNo::ROOT;
        let now = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size: if root { 0 } else { self.size },
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            kind: if root { FileType::Directory } else { FileType::RegularFile },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for NullFile {
    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == DISK {
            true => reply.entry(&TTL, &self.attributes(INodeNo(2)), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, inode: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn open(&self, _req: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _req: &Request,
        _inode: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        static ZEROES: [u8; 1 << 20] = [0; 1 << 20];
        reply.data(&ZEROES[..size as usize]);
    }
}
