//! QEMU's command line for a machine.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use miosa_agent::wire::PORT_NAME;
use serde_json::json;

use crate::jail::QEMU_FILTER;
use crate::{Accel, DiskAttachment, Error, ErrorKind, MachineSpec, Network, Result};

/// Queues of a disk: one a virtual CPU, and enough for any load from here on.
const QUEUES_MAX: u32 = 8;

/// Serial number of the root disk.
const ROOT_SERIAL: &str = "disk";
/// Longest serial number of a virtio disk.
const SERIAL_MAX: usize = 20;

/// The sockets and files of a machine.
#[derive(Clone, Debug)]
pub(super) struct Paths {
    pub(super) qmp: PathBuf,
    pub(super) agent: PathBuf,
    /// The guest's console.
    pub(super) console: PathBuf,
    /// What QEMU itself says.
    pub(super) output: PathBuf,
}

impl Paths {
    pub(super) fn of(run_dir: &Path) -> Paths {
        let at = |name| run_dir.join(name);
        Paths { qmp: at("qmp.sock"), agent: at("agent.sock"), console: at("console.log"), output: at("qemu.log") }
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// Refuses what can never work, before anything is started.
pub(super) fn check(spec: &MachineSpec, course: Course) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if spec.id.is_empty() || spec.id.len() > 64 || !spec.id.chars().all(plain) {
        return Err(invalid(format!("{:?} is not a machine's id: 1-64 letters, digits, '-', '_' and '.'", spec.id)));
    }
    if spec.hostname.is_empty() || spec.hostname.len() > 64 || !spec.hostname.chars().all(plain) {
        return Err(invalid(format!("{:?} is not a host name", spec.hostname)));
    }
    if !(1..=255).contains(&spec.cpus) || !(64..=4 << 20).contains(&spec.memory_mib) {
        let message =
            format!("{} CPUs and {} MiB are no machine: 1-255 CPUs, 64 MiB or more", spec.cpus, spec.memory_mib);
        return Err(invalid(message));
    }
    if spec
        .kernel_args
        .iter()
        .any(|word| word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control()))
    {
        return Err(invalid("each kernel argument must be one word"));
    }
    if spec.mac[0] & 1 == 1 {
        return Err(invalid("a hardware address of a group is no machine's"));
    }
    let paths = Paths::of(&spec.run_dir);
    for socket in [&paths.qmp, &paths.agent] {
        crate::process::check_socket_path(socket)?;
    }
    let mut files = vec![("kernel", &spec.kernel), ("initramfs", &spec.initramfs)];
    let serials: BTreeSet<&str> = spec.volumes.iter().map(|v| v.serial.as_str()).chain([ROOT_SERIAL]).collect();
    let good = |serial: &&str| (1..=SERIAL_MAX).contains(&serial.len()) && serial.chars().all(plain);
    if serials.len() != spec.volumes.len() + 1 || !serials.iter().all(good) {
        return Err(invalid(format!("serial numbers of disks are unique, of 1-{SERIAL_MAX} characters: {serials:?}")));
    }
    let disks = std::iter::once(&spec.disk).chain(spec.volumes.iter().map(|v| &v.disk));
    for disk in disks.filter(|_| course != Course::Keep) {
        match disk {
            DiskAttachment::RawFile { path } => files.push(("disk", path)),
            DiskAttachment::VhostUserBlk { socket } => {
                crate::process::check_socket_path(socket)?;
                files.push(("disk's socket", socket));
            }
        }
    }
    for (what, path) in files {
        if !path.exists() {
            return Err(invalid(format!("the machine's {what} is not there: {}", path.display())));
        }
        if path.to_str().is_none() {
            return Err(invalid(format!("the machine's {what} has a path that is not UTF-8: {}", path.display())));
        }
    }
    Ok(())
}

/// In QEMU's options a comma in a value is written twice.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// Where a machine's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ram {
    /// In an inherited file that is written to, shared with the daemon and who serves its disks.
    Shared(RawFd),
    /// What is in an inherited file, which stays as it is.
    Copied(RawFd),
}

/// What a machine's process is handed open, by number: its user may open nothing of it.
#[derive(Clone, Debug)]
pub(super) struct Handed {
    pub(super) ram: Ram,
    pub(super) kernel: RawFd,
    pub(super) initramfs: RawFd,
    /// Sockets that listen.
    pub(super) qmp: RawFd,
    pub(super) agent: RawFd,
    pub(super) console: RawFd,
    /// The files of disks, by serial number.
    pub(super) disks: BTreeMap<String, DiskFile>,
}

/// A disk's open file.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiskFile {
    pub(super) fd: RawFd,
    /// Whether the host's page cache is left out.
    pub(super) direct: bool,
}

impl Handed {
    /// For whoever wants to know what a machine is and not to start it.
    pub(super) fn nothing(ram: fn(RawFd) -> Ram) -> Handed {
        Handed { ram: ram(0), kernel: 0, initramfs: 0, qmp: 0, agent: 0, console: 0, disks: BTreeMap::new() }
    }

    /// All of it.
    pub(super) fn numbers(&self) -> Vec<RawFd> {
        let (Ram::Shared(ram) | Ram::Copied(ram)) = self.ram;
        let fixed = [ram, self.kernel, self.initramfs, self.qmp, self.agent, self.console];
        fixed.into_iter().chain(self.disks.values().map(|disk| disk.fd)).collect()
    }
}

/// The set that the console's file is in; those of disks have the numbers after it.
const CONSOLE_SET: usize = 1;

/// How a machine comes to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    /// It boots.
    Boot,
    /// It boots without disks or network, and its guest waits for a root: its state is to be kept.
    Keep,
    /// It waits for such a state, with disks and network devices that were not there then.
    Restore,
    /// It waits for a state of a machine that was one of this specification.
    Load,
}

/// Words of the kernel's command line that the agent would go by instead of by what it is told later.
const SAYS_ROOT: [&str; 3] = ["miosa.root=", "miosa.net=", "miosa.hostname="];

/// Refuses what can only boot.
pub(super) fn check_warm(spec: &MachineSpec) -> Result<()> {
    match spec.kernel_args.iter().find(|word| SAYS_ROOT.iter().any(|says| word.starts_with(says))) {
        Some(word) => Err(invalid(format!("with the kernel argument {word} a machine can only boot"))),
        None => Ok(()),
    }
}

/// All arguments but the program's name. Those of a machine that is kept are the beginning of those of one that starts
/// from its state: what is added comes after it on the guest's buses, too.
pub(super) fn arguments(spec: &MachineSpec, machine: &str, course: Course, handed: &Handed) -> Vec<OsString> {
    let (accel, cpu) = match spec.accel {
        // Five-level page tables would only make each of the translator's page walks longer.
        Accel::Tcg => ("tcg", "max,la57=off"),
        Accel::Kvm => ("kvm", "host"),
    };
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([format!("-{option}"), value]);
    add("name", spec.id.clone());
    add(
        "machine",
        format!(
            "{machine},accel={accel},memory-backend=ram,usb=off,graphics=off,vmport=off,i8042=off,dump-guest-core=off"
        ),
    );
    add("cpu", cpu.into());
    add("smp", spec.cpus.to_string());
    add("m", format!("{}M", spec.memory_mib));
    // A vhost-user back end reads and writes the guest's memory: it must be shared.
    let (ram, share) = match handed.ram {
        Ram::Shared(fd) => (fd, "on"),
        Ram::Copied(fd) => (fd, "off"),
    };
    let backend = format!("memory-backend-file,id=ram,mem-path=/proc/self/fd/{ram}");
    add("object", format!("{backend},size={}M,share={share}", spec.memory_mib));
    add("kernel", format!("/proc/self/fd/{}", handed.kernel));
    add("initrd", format!("/proc/self/fd/{}", handed.initramfs));
    add("append", kernel_command_line(spec, course));
    add("display", "none".into());
    add("sandbox", QEMU_FILTER.into());
    add("add-fd", format!("set={CONSOLE_SET},fd={}", handed.console));
    add("chardev", format!("file,id=console,path=/dev/fdset/{CONSOLE_SET},append=on"));
    add("serial", "chardev:console".into());
    add("chardev", format!("socket,id=qmp,fd={},server=on,wait=off", handed.qmp));
    add("mon", "chardev=qmp,mode=control".into());
    add("device", "virtio-serial-pci,max_ports=2".into());
    add("chardev", format!("socket,id=agent,fd={},server=on,wait=off", handed.agent));
    add("device", format!("virtserialport,chardev=agent,name={PORT_NAME}"));
    add("device", "virtio-rng-pci".into());
    if matches!(course, Course::Restore | Course::Load) {
        add("incoming", "defer".into());
    }
    if spec.network == Network::User && course != Course::Keep {
        add("netdev", "user,id=net".into());
        // No ROM: nobody boots from the network.
        let [a, b, c, d, e, f] = spec.mac;
        let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        add("device", format!("virtio-net-pci,netdev=net,romfile=,mac={mac}"));
    }
    if course != Course::Keep {
        for (n, (serial, disk, read_only)) in disks(spec).enumerate() {
            let file = handed.disks.get(serial).copied().unwrap_or(DiskFile { fd: 0, direct: false });
            add_disk(&mut arguments, spec, (serial, disk, read_only), (CONSOLE_SET + 1 + n, file));
        }
    }
    let flags = ["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned);
    arguments.into_iter().chain(flags).map(OsString::from).collect()
}

/// All disks of a machine, the root disk first, with their serial numbers, and whether they are only read.
pub(super) fn disks(spec: &MachineSpec) -> impl Iterator<Item = (&str, &DiskAttachment, bool)> {
    let volumes = spec.volumes.iter().map(|v| (v.serial.as_str(), &v.disk, v.read_only));
    std::iter::once((ROOT_SERIAL, &spec.disk, false)).chain(volumes)
}

/// Where a process that is in the run directory finds a file: it may not be able to come there from the root.
fn as_seen_from<'a>(run_dir: &Path, path: &'a Path) -> &'a Path {
    if path.parent() == Some(run_dir) { path.file_name().map_or(path, Path::new) } else { path }
}

fn add_disk(
    arguments: &mut Vec<String>,
    spec: &MachineSpec,
    (serial, disk, read_only): (&str, &DiskAttachment, bool),
    (set, file): (usize, DiskFile),
) {
    let mut add = |option: &str, value: String| arguments.extend([format!("-{option}"), value]);
    match disk {
        DiskAttachment::VhostUserBlk { socket } => {
            // The guest waits while its back end restarts.
            let path = escaped(as_seen_from(&spec.run_dir, socket));
            add("chardev", format!("socket,id=disk-{serial},path={path},reconnect=1"));
            let queues = spec.cpus.min(QUEUES_MAX);
            add("device", format!("vhost-user-blk-pci,chardev=disk-{serial},num-queues={queues}"));
        }
        DiskAttachment::RawFile { .. } => {
            add("add-fd", format!("set={set},fd={}", file.fd));
            let file = json!({
                "driver": "file", "node-name": format!("file-{serial}"), "filename": format!("/dev/fdset/{set}"),
                "cache": { "direct": file.direct, "no-flush": false }, "discard": "unmap", "aio": "threads",
                "read-only": read_only,
            });
            let raw = json!({
                "driver": "raw", "node-name": format!("disk-{serial}"), "file": format!("file-{serial}"),
                "discard": "unmap", "detect-zeroes": "off", "read-only": read_only,
            });
            add("blockdev", file.to_string());
            add("blockdev", raw.to_string());
            add("device", format!("virtio-blk-pci,drive=disk-{serial},serial={serial}"));
        }
    }
}

/// How the guest finds its root disk: with others beside it, by its serial number.
pub(super) fn root_disk(spec: &MachineSpec) -> String {
    if spec.volumes.is_empty() { "/dev/vda".into() } else { format!("serial:{ROOT_SERIAL}") }
}

fn kernel_command_line(spec: &MachineSpec, course: Course) -> String {
    // A panic is a reset, a reset is the machine's end: nothing is left hanging.
    let mut words = vec!["console=ttyS0", "quiet", "panic=-1", "random.trust_cpu=on", "rcupdate.rcu_expedited=1"];
    if spec.accel == Accel::Tcg {
        // The translator is not open to what these guard against, and its timer is late under load.
        words.extend(["mitigations=off", "no_timer_check", "tsc=reliable", "nokaslr"]);
    }
    let hostname = format!("miosa.hostname={}", spec.hostname);
    let root = format!("miosa.root={}", root_disk(spec));
    if course == Course::Boot {
        words.push(&hostname);
        if spec.network == Network::None {
            words.push("miosa.net=none");
        }
        if !spec.volumes.is_empty() {
            words.push(&root);
        }
    } else {
        words.push("miosa.root=later");
    }
    words.extend(spec.kernel_args.iter().map(String::as_str));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VolumeDevice;

    fn spec(dir: &Path) -> MachineSpec {
        let file = dir.join("a,file");
        std::fs::write(&file, b"").unwrap();
        MachineSpec {
            id: "m1".into(),
            run_dir: dir.join("run"),
            cpus: 2,
            memory_mib: 256,
            kernel: file.clone(),
            initramfs: file.clone(),
            disk: DiskAttachment::VhostUserBlk { socket: file },
            volumes: Vec::new(),
            accel: Accel::Tcg,
            hostname: "box".into(),
            network: Network::None,
            mac: [2, 0, 0, 0, 0, 1],
            kernel_args: vec!["debug".into()],
            warm: None,
        }
    }

    #[test]
    fn nonsense_is_refused_before_anything_starts() {
        let dir = tempfile::tempdir().unwrap();
        let good = spec(dir.path());
        check(&good, Course::Boot).unwrap();
        let volume = |serial: &str| VolumeDevice {
            serial: serial.into(),
            disk: DiskAttachment::RawFile { path: "/dev/null".into() },
            read_only: false,
        };
        check(&MachineSpec { volumes: vec![volume("vol-1")], ..good.clone() }, Course::Boot).unwrap();
        for volumes in [vec![volume("disk")], vec![volume("a"), volume("a")], vec![volume("a,b")], vec![volume("")]] {
            let spec = MachineSpec { volumes, ..good.clone() };
            assert_eq!(check(&spec, Course::Boot).unwrap_err().kind, ErrorKind::Invalid, "{:?}", spec.volumes);
        }
        let bad: [fn(&mut MachineSpec); 9] = [
            |s| s.id = "a b".into(),
            |s| s.id = String::new(),
            |s| s.hostname = "x init=/bin/sh".into(),
            |s| s.cpus = 0,
            |s| s.mac[0] = 1,
            |s| s.memory_mib = 1,
            |s| s.kernel = "/nonexistent".into(),
            |s| s.kernel_args = vec!["a b".into()],
            |s| s.run_dir = PathBuf::from("/x".repeat(60)),
        ];
        for (number, change) in bad.iter().enumerate() {
            let mut spec = good.clone();
            change(&mut spec);
            assert_eq!(check(&spec, Course::Boot).unwrap_err().kind, ErrorKind::Invalid, "case {number}");
        }
    }

    #[test]
    fn a_path_cannot_add_options() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path());
        let arguments = arguments(&spec, "pc", Course::Boot, &Handed::nothing(Ram::Shared));
        let disk = arguments.iter().find(|a| a.to_string_lossy().starts_with("socket,id=disk")).unwrap();
        assert!(disk.to_string_lossy().contains("/a,,file,reconnect=1"), "{disk:?}");
        // Of what is in its directory it knows no more than the name.
        let here = MachineSpec { run_dir: dir.path().to_owned(), ..spec };
        let arguments = super::arguments(&here, "pc", Course::Boot, &Handed::nothing(Ram::Shared));
        let disk = arguments.iter().find(|a| a.to_string_lossy().starts_with("socket,id=disk")).unwrap();
        assert_eq!(disk, "socket,id=disk-disk,path=a,,file,reconnect=1");
        assert!(!arguments.iter().any(|a| a.to_string_lossy().contains(dir.path().to_str().unwrap())), "{arguments:?}");
        let append = &arguments[arguments.iter().position(|a| a == "-append").unwrap() + 1];
        assert!(append.to_string_lossy().ends_with("miosa.hostname=box miosa.net=none debug"), "{append:?}");
        assert!(!arguments.iter().any(|a| a.to_string_lossy().contains("virtio-net")));
    }

    #[test]
    fn a_restored_machine_is_the_kept_one_and_more() {
        let dir = tempfile::tempdir().unwrap();
        let one = MachineSpec { network: Network::User, ..spec(dir.path()) };
        let other =
            MachineSpec { hostname: "other".into(), mac: [2, 0, 0, 0, 0, 9], volumes: Vec::new(), ..one.clone() };
        let devices = |arguments: Vec<OsString>| -> Vec<OsString> {
            arguments.windows(2).filter(|pair| pair[0] == "-device").map(|pair| pair[1].clone()).collect()
        };
        let kept = devices(arguments(&one, "pc", Course::Keep, &Handed::nothing(Ram::Shared)));
        let restored = devices(arguments(&other, "pc", Course::Restore, &Handed::nothing(Ram::Copied)));
        assert_eq!(restored[..kept.len()], kept, "in the same places on the buses");
        assert_eq!(restored.len(), kept.len() + 2, "a network device and a disk are added: {restored:?}");
        // Nothing of one machine is in what is kept for all.
        let kept = arguments(&one, "pc", Course::Keep, &Handed::nothing(Ram::Shared));
        assert_eq!(kept, arguments(&other, "pc", Course::Keep, &Handed::nothing(Ram::Shared)));
        check_warm(&one).unwrap();
        check_warm(&MachineSpec { kernel_args: vec!["miosa.net=none".into()], ..one }).unwrap_err();
    }
}
