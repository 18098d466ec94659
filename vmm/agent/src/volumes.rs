//! Disks besides the root: found by their serial numbers, mounted, frozen and left clean together with it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use miosa_agent::wire::{AgentError, ErrorKind, Mount};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use parking_lot::Mutex;

use crate::guest::{freeze, leave_clean, thaw};
use crate::{log, read_line};

/// How long a disk may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);

/// A block device of the guest's.
pub(crate) struct Device {
    /// Its file.
    pub(crate) node: String,
    /// Its number.
    number: u64,
}

/// The block device with this serial number.
pub(crate) fn device_of(serial: &str) -> Option<Device> {
    let devices = fs::read_dir("/sys/class/block").ok()?.flatten();
    let name = devices.filter_map(|entry| entry.file_name().into_string().ok()).find(|name| {
        // The attribute is there at once; its first line comes from the device.
        read_line(&format!("/sys/class/block/{name}/serial")) == serial
    })?;
    let (major, minor) = read_line(&format!("/sys/class/block/{name}/dev"))
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))?;
    Some(Device { node: format!("/dev/{name}"), number: libc::makedev(major, minor) })
}

/// What was mounted, in that order.
#[derive(Default)]
pub(crate) struct Volumes(Mutex<Vec<Mounted>>);

struct Mounted {
    path: PathBuf,
    device: u64,
    read_only: bool,
}

impl Mounted {
    /// Whether it is what is seen there: somebody in the guest may have unmounted it.
    fn is_there(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|meta| meta.dev() == self.device)
    }
}

impl Volumes {
    pub(crate) fn mount(&self, wanted: &Mount, path: &Path) -> Result<(), AgentError> {
        let mut mounted = self.0.lock();
        let device = appears(&wanted.serial)?;
        let this = Mounted { path: path.to_owned(), device: device.number, read_only: wanted.read_only };
        if mounted.iter().any(|m| m.path == this.path && m.device == this.device) && this.is_there() {
            return Ok(());
        }
        let failed = |what: &str, error: std::io::Error| {
            AgentError::io(format!("{what} {} for volume {}", path.display(), wanted.serial), &error)
        };
        fs::create_dir_all(path).map_err(|e| failed("make the directory", e))?;
        let (mode, options) = match wanted.read_only {
            true => (MsFlags::MS_RDONLY, None),
            false => (MsFlags::empty(), Some("discard,errors=remount-ro")),
        };
        mount(Some(device.node.as_str()), path, Some("ext4"), MsFlags::MS_NOATIME | mode, options)
            .map_err(|errno| failed("mount", errno.into()))?;
        mounted.retain(|m| m.device != this.device);
        mounted.push(this);
        Ok(())
    }

    /// Freezes all, or none.
    pub(crate) fn freeze(&self) -> Result<(), AgentError> {
        let mounted = self.0.lock();
        let writable: Vec<&Mounted> = mounted.iter().filter(|m| !m.read_only && m.is_there()).collect();
        for (i, volume) in writable.iter().enumerate() {
            if let Err(error) = freeze(&volume.path) {
                writable[..i].iter().for_each(|before| tell(thaw(&before.path)));
                return Err(error);
            }
        }
        Ok(())
    }

    pub(crate) fn thaw(&self) {
        let mounted = self.0.lock();
        mounted.iter().filter(|m| !m.read_only && m.is_there()).for_each(|m| tell(thaw(&m.path)));
    }

    /// Unmounts them, or leaves them as clean where something holds them. Call when no programs are left.
    pub(crate) fn leave_clean(&self) -> Result<(), AgentError> {
        for volume in self.0.lock().drain(..).rev().filter(Mounted::is_there) {
            if umount2(&volume.path, MntFlags::empty()).is_err() && !volume.read_only {
                leave_clean(&volume.path)?;
            }
        }
        Ok(())
    }
}

fn appears(serial: &str) -> Result<Device, AgentError> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(device) = device_of(serial) {
            return Ok(device);
        }
        if Instant::now() >= until {
            return Err(AgentError::new(
                ErrorKind::NotFound,
                format!("there is no disk with the serial number {serial}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn tell(result: Result<(), AgentError>) {
    if let Err(error) = result {
        log(&error.message);
    }
}
