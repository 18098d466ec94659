//! Machines that go on from the kept state of one that had booted.
//!
//! What is kept is a machine without disks and without network whose guest waits for a root (`miosa.root=later`): its
//! memory, and what QEMU's migration says of its devices. Memory is not in that stream (`x-ignore-shared`): it is a file of
//! ours that QEMU maps. A machine that starts from it is the kept one with disk and network device added at the end of its
//! buses; its guest looks for them when it is told what it becomes. So a state is good for any disk, however that is shown.
//!
//! A start, of which 2 and 3 go on at the same time:
//! 1. The state's record is read, and the devices' state compared with its digest.
//! 2. QEMU starts with `-incoming defer` and a new memory file. A private mapping of the kept one would share its pages with
//!    other machines, but nobody could take the machine's own state again, nor serve its disk over vhost-user.
//! 3. The kept memory is copied into the new file: only what is not zero.
//! 4. QEMU reads the devices' state, and the guest goes on.
//! 5. The agent is greeted, and told the root disk, the host's clock and random numbers of its own ([`Root`]). What it is to
//!    be told is in the run directory, for a daemon that takes the machine over before that is done.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use miosa_agent::wire::Root;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Whence, lseek};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::command::{self, Course, Handed, Ram};
use super::{Coming, Launch, QemuMachine, QemuVmm, blocking, probe, state};
use crate::machine::deadline_at;
use crate::memory::GuestMemory;
use crate::qmp::Qmp;
use crate::{Error, ErrorKind, Machine, MachineSpec, Network, Result, WarmKey, jail};

/// Version of what is in a state's directory.
const VERSION: u32 = 1;
/// The guest's memory: a file of its size, with holes where it is zero.
const RAM: &str = "ram";
/// What QEMU says of the devices.
const DEVICES: &str = "devices";
/// Written last.
const RECORD: &str = "state.json";
/// Most bytes of it that are believed; it has about 400 KB.
const DEVICES_MAX: u64 = 64 << 20;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    version: u32,
    base: String,
    shape: String,
    ram_bytes: u64,
    devices_bytes: u64,
    devices_blake3: String,
}

/// What was found out about files, for as long as they are the same.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<HashMap<PathBuf, (FileIdentity, String)>>);

type FileIdentity = (u64, u64, u64, i64, i64);

impl Known {
    fn get(&self, path: &Path, find: impl FnOnce() -> Result<String>) -> Result<String> {
        let meta = fs::metadata(path).map_err(|e| Error::io(path.display(), e))?;
        let identity = (meta.dev(), meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec());
        if let Some((known, found)) = self.0.lock().get(path)
            && *known == identity
        {
            return Ok(found.clone());
        }
        let found = find()?;
        self.0.lock().insert(path.to_owned(), (identity, found.clone()));
        Ok(found)
    }

    fn digest(&self, path: &Path) -> Result<String> {
        self.get(path, || {
            let bytes = fs::read(path).map_err(|e| Error::io(path.display(), e))?;
            Ok(blake3::hash(&bytes).to_hex().to_string())
        })
    }
}

/// See [`crate::Vmm::warm_key`].
pub(super) async fn key(vmm: &QemuVmm, spec: &MachineSpec) -> Result<WarmKey> {
    command::check_warm(spec)?;
    let (vmm, spec) = (vmm.clone(), spec.clone());
    blocking(move || {
        let qemu = qemu_version(&vmm)?;
        let (host, processor) = probe::this_host().map_err(|e| Error::io("uname", e))?;
        let (kernel, initramfs) = (vmm.known.digest(&spec.kernel)?, vmm.known.digest(&spec.initramfs)?);
        let base = short([VERSION.to_string(), qemu, host, processor, kernel, initramfs]);
        // Where this machine's files are is of no matter.
        let anywhere = MachineSpec {
            id: "machine".into(),
            run_dir: PathBuf::new(),
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            ..spec
        };
        let arguments = command::arguments(&anywhere, &vmm.machine, Course::Keep, &Handed::nothing(Ram::Shared));
        let arguments: Vec<String> = arguments.iter().map(|a| a.to_string_lossy().into_owned()).collect();
        Ok(WarmKey { base, shape: short(&arguments) })
    })
    .await
}

/// What QEMU says of itself.
pub(super) fn qemu_version(vmm: &QemuVmm) -> Result<String> {
    let program = jail::find(&vmm.program);
    let qemu = vmm.known.get(&program, || {
        let output = std::process::Command::new(&program).arg("--version").output();
        Ok(String::from_utf8_lossy(&output.map_err(|e| vmm.missing(&e))?.stdout).into_owned())
    });
    qemu.map_err(|e| Error::new(ErrorKind::QemuMissing, e.message))
}

/// A word that is another when one of the parts is.
pub(super) fn short<T: AsRef<str>>(parts: impl IntoIterator<Item = T>) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        let part = part.as_ref().as_bytes();
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hasher.finalize().to_hex().chars().take(16).collect()
}

/// See [`crate::Vmm::warm`].
pub(super) async fn keep(vmm: &QemuVmm, spec: &MachineSpec, to: &Path, deadline: Duration) -> Result<()> {
    let (started, at) = (Instant::now(), deadline_at(deadline));
    let key = key(vmm, spec).await?;
    let spec = MachineSpec { volumes: Vec::new(), network: Network::None, warm: None, ..spec.clone() };
    let ram = new_ram(spec.memory_mib)?;
    let fd = ram.file().as_raw_fd();
    let launch = Launch { course: Course::Keep, ram: Ram::Shared(fd), state: None, yields: true };
    let machine = vmm.spawn(&spec, launch)?.into_machine(started, at, Coming::Boot).await?;
    machine.agent.disconnect();
    let devices = tokio::time::timeout_at(at, state::devices_of(&machine.qmp, &spec.run_dir)).await;
    machine.kill().await?;
    let devices = devices.map_err(|_| Error::new(ErrorKind::Qmp, "QEMU did not tell a machine's state in time"))??;
    let to = to.to_owned();
    blocking(move || write(&to, &key, &ram, &devices).map_err(|e| Error::io(to.display(), e))).await
}

/// Memory for a guest.
pub(super) fn new_ram(mib: u32) -> Result<GuestMemory> {
    GuestMemory::new(u64::from(mib) << 20).map_err(|e| Error::io("a guest's memory", e))
}

/// Writes a state, whole or not at all.
fn write(to: &Path, key: &WarmKey, ram: &GuestMemory, devices: &[u8]) -> std::io::Result<()> {
    let parent = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    // Nobody else may look at a guest's memory, which these directories are made for.
    let work = tempfile::Builder::new().prefix(".warm-").tempdir_in(parent)?;
    let _lock = Flock::lock(File::open(work.path())?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    let create = |name| File::options().write(true).create_new(true).mode(0o600).open(work.path().join(name));
    let file = create(RAM)?;
    file.set_len(ram.bytes())?;
    ram.copy_to(&GuestMemory::of_file(file.try_clone()?)?, true)?;
    file.sync_all()?;
    let put = |name, bytes: &[u8]| {
        let mut file = create(name)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    put(DEVICES, devices)?;
    let record = Record {
        version: VERSION,
        base: key.base.clone(),
        shape: key.shape.clone(),
        ram_bytes: ram.bytes(),
        devices_bytes: devices.len() as u64,
        devices_blake3: blake3::hash(devices).to_hex().to_string(),
    };
    put(RECORD, &serde_json::to_vec_pretty(&record)?)?;
    File::open(work.path())?.sync_all()?;
    match fs::rename(work.path(), to) {
        Ok(()) => {
            let _ = work.keep();
            File::open(parent)?.sync_all()
        }
        // Somebody else has kept one of the same key meanwhile.
        Err(_) if to.join(RECORD).is_file() => Ok(()),
        Err(error) => Err(error),
    }
}

/// A state that is whole, as far as its record tells.
struct Kept {
    ram: File,
    devices: File,
}

impl Kept {
    fn open(dir: &Path, key: &WarmKey, memory_mib: u32) -> Result<Kept> {
        let open = |name| {
            let path = dir.join(name);
            File::open(&path).map_err(|e| Error::io(path.display(), e))
        };
        let read = |file: &File, bytes: &mut Vec<u8>| {
            let mut file = file;
            Read::take(&mut file, DEVICES_MAX).read_to_end(bytes).map_err(|e| Error::io(dir.display(), e))
        };
        let broken = |what: &str| Error::new(ErrorKind::Invalid, format!("the kept state {} {what}", dir.display()));
        let mut record = Vec::new();
        read(&open(RECORD)?, &mut record)?;
        let record: Record = serde_json::from_slice(&record).map_err(|e| broken(&format!("has no record: {e}")))?;
        if (record.version, &record.base, &record.shape) != (VERSION, &key.base, &key.shape) {
            return Err(broken("is of another machine"));
        }
        let (ram, devices) = (open(RAM)?, open(DEVICES)?);
        let mut state = Vec::new();
        read(&devices, &mut state)?;
        if blake3::hash(&state).to_hex().as_str() != record.devices_blake3 {
            return Err(broken("is damaged: its devices are not what they were"));
        }
        let len = ram.metadata().map_err(|e| Error::io(dir.display(), e))?.len();
        if len != record.ram_bytes || len != u64::from(memory_mib) << 20 {
            return Err(broken("is damaged: its memory is not what it was"));
        }
        // The same open file is read by QEMU.
        lseek(&devices, 0, Whence::SeekSet).map_err(|e| Error::io(dir.display(), e))?;
        Ok(Kept { ram, devices })
    }
}

/// Starts a machine from a kept state. If that fails, its process is gone.
pub(super) async fn restore(
    vmm: &QemuVmm,
    spec: &MachineSpec,
    dir: &Path,
    (started, at): (Instant, Instant),
) -> Result<QemuMachine> {
    let key = key(vmm, spec).await?;
    let (from, memory_mib) = (dir.to_owned(), spec.memory_mib);
    let kept = blocking(move || Kept::open(&from, &key, memory_mib)).await?;
    let devices = kept.devices.as_raw_fd();
    let memory = new_ram(spec.memory_mib)?;
    let ram = Ram::Shared(memory.file().as_raw_fd());
    let launch = Launch { course: Course::Restore, ram, state: Some(devices), yields: false };
    let process = vmm.spawn(spec, launch)?;
    let filled = tokio::spawn(blocking(move || {
        GuestMemory::of_file(kept.ram)
            .and_then(|kept| kept.copy_to(&memory, false))
            .map_err(|e| Error::io("fill a guest's memory", e))
    }));
    let restoring = Restoring { devices, filled, root: root_of(spec) };
    process.into_machine(started, at, Coming::Restored(restoring)).await
}

/// What is left to do once QEMU answers.
pub(super) struct Restoring {
    /// The number of the file with the devices' state, in QEMU.
    devices: RawFd,
    filled: JoinHandle<Result<()>>,
    pub(super) root: Root,
}

impl Restoring {
    /// Has the guest go on. When its state is of no use, QEMU ends, which its watcher sees.
    pub(super) async fn load(self, qmp: &Qmp) -> Result<Root> {
        state::ignore_shared(qmp).await?;
        self.filled.await.map_err(|e| Error::io("fill a guest's memory", e))??;
        qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{}", self.devices) })).await?;
        Ok(self.root)
    }
}

/// What the guest becomes, but for what is told at the moment itself.
pub(super) fn root_of(spec: &MachineSpec) -> Root {
    Root {
        disk: command::root_disk(spec),
        hostname: spec.hostname.clone(),
        network: spec.network != Network::None,
        entropy: Vec::new(),
        unix_nanos: 0,
    }
}

/// The same with what is.
pub(super) fn told_now(root: Root) -> Root {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let unix_nanos = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    Root { entropy: rand::random::<[u8; 64]>().to_vec(), unix_nanos, ..root }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_written_whole_and_without_pages_of_zeroes() {
        let dir = tempfile::tempdir().unwrap();
        let ram = GuestMemory::new(4 << 20).unwrap();
        let mut bytes = vec![0; 4 << 20];
        for at in [0, 4097, (128 << 10) - 1, 128 << 10, 3 << 20, (4 << 20) - 1] {
            bytes[at] = 7;
            ram.write(at as u64, &[7]).unwrap();
        }
        // A page that is there and zero.
        ram.write(2 << 20, &[0; 4096]).unwrap();
        let key = WarmKey { base: "a".into(), shape: "b".into() };
        let to = dir.path().join("kept/a-b");
        write(&to, &key, &ram, b"devices").unwrap();
        write(&to, &key, &ram, b"another").unwrap();
        assert_eq!(fs::read_dir(dir.path().join("kept")).unwrap().count(), 1, "nothing is left beside it");
        assert_eq!(fs::read(to.join(RAM)).unwrap(), bytes);
        assert!(fs::metadata(to.join(RAM)).unwrap().blocks() <= 6 * 8, "with holes");
        let kept = Kept::open(&to, &key, 4).unwrap();
        let again = GuestMemory::new(4 << 20).unwrap();
        GuestMemory::of_file(kept.ram).unwrap().copy_to(&again, false).unwrap();
        let mut read = vec![1; 4 << 20];
        again.read(0, &mut read).unwrap();
        assert!(read == bytes);
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let key = WarmKey { base: "a".into(), shape: "b".into() };
        let to = dir.path().join("a-b");
        let refused = |what: &str| {
            let error = Kept::open(&to, &key, 4).err().unwrap();
            assert!(matches!(error.kind, ErrorKind::Invalid | ErrorKind::Io), "{what}: {error}");
        };
        refused("nothing is there");
        let ram = GuestMemory::new(4 << 20).unwrap();
        ram.write(0, b"x").unwrap();
        write(&to, &key, &ram, b"devices").unwrap();
        Kept::open(&to, &key, 4).unwrap();
        assert!(Kept::open(&to, &key, 8).is_err(), "of another size");
        assert!(Kept::open(&to, &WarmKey { base: "c".into(), ..key.clone() }, 4).is_err(), "of another key");
        for (name, damage) in [(DEVICES, &b"devicez"[..]), (RAM, b"short"), (RECORD, b"{"), (RECORD, b"")] {
            let before = fs::read(to.join(name)).unwrap();
            fs::write(to.join(name), damage).unwrap();
            refused(name);
            fs::write(to.join(name), before).unwrap();
            Kept::open(&to, &key, 4).unwrap();
        }
    }

    #[test]
    fn what_is_known_of_a_file_is_asked_again_when_it_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let (known, path) = (Known::default(), dir.path().join("kernel"));
        known.digest(&path).unwrap_err();
        fs::write(&path, "one").unwrap();
        let one = known.digest(&path).unwrap();
        assert_eq!(known.get(&path, || Err(Error::new(ErrorKind::Io, "asked again"))).unwrap(), one);
        fs::write(&path, "three").unwrap();
        assert_ne!(known.digest(&path).unwrap(), one);
    }
}
