//! A control group for each machine: it cannot take more of the host than its size says.
//!
//! Version 1 and 2 are both used, whichever has the controller. A machine's group is made below the daemon's own, so that
//! what limits the daemon limits its machines too; in version 2, where a group with processes cannot give controllers to
//! groups below it, beside the daemon's own. What cannot be limited is told once, and machines run without.

use std::fs;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use crate::{Accel, MachineSpec};

/// File in a run directory with the machine's groups, one a line.
const RECORD: &str = "cgroups";
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];
/// What QEMU needs beside the guest's memory.
const VMM_BYTES: u64 = 256 << 20;
/// What QEMU's translator may keep of translated code.
const TRANSLATOR_BYTES: u64 = 1 << 30;
/// Threads beside the virtual CPUs: the main loop, workers for disk requests.
const VMM_THREADS: u32 = 256;
const CPU_PERIOD_US: u64 = 100_000;

/// Where machines' groups can be made.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cgroups {
    parents: Vec<Parent>,
}

/// A group below which others are made, and what it can limit.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Parent {
    dir: PathBuf,
    controllers: Vec<&'static str>,
    version: u8,
}

impl Cgroups {
    /// Looks where this process may make groups.
    pub(crate) fn find() -> Cgroups {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let mut parents = Vec::new();
        for own in own_groups(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup")) {
            let parent = if own.version == 1 { Some(own) } else { delegated(&own.dir) };
            parents.extend(parent.filter(|parent| !parent.controllers.is_empty() && is_writable(&parent.dir)));
        }
        let covered = |c: &&str| parents.iter().any(|parent| parent.controllers.contains(c));
        let missing: Vec<_> = CONTROLLERS.into_iter().filter(|c| !covered(c)).collect();
        if !missing.is_empty() {
            tracing::info!(?missing, "no control group can be made for these; machines run without such limits");
        }
        Cgroups { parents }
    }

    /// What can be limited here, as far as that can be told without a change.
    pub(crate) fn offered() -> Vec<&'static str> {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let own = own_groups(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
        let has = |group: &Parent, controller: &str| match group.version {
            1 => group.controllers.contains(&controller),
            _ => fs::read_to_string(group.dir.join("cgroup.controllers"))
                .is_ok_and(|text| text.split_whitespace().any(|name| name == controller)),
        };
        let own: Vec<_> = own.into_iter().filter(|group| is_writable(&group.dir)).collect();
        CONTROLLERS.into_iter().filter(|controller| own.iter().any(|group| has(group, controller))).collect()
    }

    /// Makes the groups of a machine, and their record in its run directory. What fails is logged and left out.
    pub(crate) fn make(&self, spec: &MachineSpec) -> Group {
        let dirs: Vec<_> = self.parents.iter().map(|parent| parent.dir.join(format!("miosa-{}", spec.id))).collect();
        // First the record: a group that it names and that is not there does no harm.
        let text: String = dirs.iter().map(|dir| format!("{}\n", dir.display())).collect();
        if let Err(error) = fs::write(spec.run_dir.join(RECORD), text) {
            tracing::warn!(%error, "the record of a machine's control groups cannot be written; it gets none");
            return Group { run_dir: spec.run_dir.clone(), doors: Vec::new() };
        }
        let mut doors = Vec::new();
        for (parent, dir) in self.parents.iter().zip(&dirs) {
            match enter_new(parent, dir, spec) {
                Ok(door) => doors.push(door),
                Err(error) => tracing::warn!(dir = %dir.display(), %error, "a machine runs without this control group"),
            }
        }
        Group { run_dir: spec.run_dir.clone(), doors }
    }
}

/// The groups of one machine.
pub(crate) struct Group {
    run_dir: PathBuf,
    doors: Vec<fs::File>,
}

impl Group {
    /// Files to which a process writes `0` to put itself into the groups.
    pub(crate) fn doors(&mut self) -> Vec<fs::File> {
        std::mem::take(&mut self.doors)
    }

    /// Removes the groups; their process is gone.
    pub(crate) fn remove(&self) {
        remove_recorded(&self.run_dir);
    }
}

/// Puts the calling process into a group. Safe between fork and exec.
pub(crate) fn enter(door: BorrowedFd<'_>) {
    // It stays where it is if this fails: limits are not worth a machine.
    let _ = nix::unistd::write(door, b"0");
}

/// Removes the groups that a run directory's record names, and the record.
pub(crate) fn remove_recorded(run_dir: &Path) {
    let record = run_dir.join(RECORD);
    for dir in fs::read_to_string(&record).unwrap_or_default().lines().map(Path::new) {
        // Nothing but a group of ours, whatever the record says; and only an empty directory can be removed so.
        let ours = dir.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"miosa-"));
        if ours
            && let Err(error) = fs::remove_dir(dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %dir.display(), %error, "a machine's control group cannot be removed");
        }
    }
    let _ = fs::remove_file(record);
}

/// Makes a group with its limits; the file that processes enter by.
fn enter_new(parent: &Parent, dir: &Path, spec: &MachineSpec) -> std::io::Result<fs::File> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    for (name, value) in limits(parent, spec) {
        // Not created: these files are there or the controller is not.
        fs::File::options().write(true).open(dir.join(name)).and_then(|mut file| file.write_all(value.as_bytes()))?;
    }
    fs::File::options().write(true).open(dir.join("cgroup.procs"))
}

/// What to write where.
fn limits(parent: &Parent, spec: &MachineSpec) -> Vec<(&'static str, String)> {
    let translator = if spec.accel == Accel::Tcg { TRANSLATOR_BYTES } else { 0 };
    let memory = (u64::from(spec.memory_mib) << 20) + VMM_BYTES + translator;
    let threads = spec.cpus + VMM_THREADS;
    // One more than the guest sees, for the work that QEMU does beside it.
    let quota = u64::from(spec.cpus + 1) * CPU_PERIOD_US;
    let mut limits = Vec::new();
    for controller in &parent.controllers {
        match (*controller, parent.version) {
            ("memory", 1) => limits.push(("memory.limit_in_bytes", memory.to_string())),
            ("memory", _) => limits.push(("memory.max", memory.to_string())),
            ("pids", _) => limits.push(("pids.max", threads.to_string())),
            ("cpu", 1) => limits
                .extend([("cpu.cfs_period_us", CPU_PERIOD_US.to_string()), ("cpu.cfs_quota_us", quota.to_string())]),
            ("cpu", _) => limits.push(("cpu.max", format!("{quota} {CPU_PERIOD_US}"))),
            _ => {}
        }
    }
    limits
}

/// The groups this process is in: of version 1 those of our controllers, and the one of version 2, still without any.
fn own_groups(mountinfo: &str, cgroup: &str) -> Vec<Parent> {
    let mut groups: Vec<Parent> = Vec::new();
    for line in mountinfo.lines() {
        // id parent major:minor root mount-point options … - type source super-options
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let fields: Vec<&str> = before.split(' ').collect();
        let mut after = after.split(' ');
        let (Some(root), Some(point), Some(kind)) = (fields.get(3), fields.get(4), after.next()) else { continue };
        let options: Vec<&str> = after.nth(1).unwrap_or_default().split(',').collect();
        let controllers: Vec<_> = CONTROLLERS.into_iter().filter(|c| options.contains(c)).collect();
        let version = match kind {
            "cgroup" if !controllers.is_empty() => 1,
            "cgroup2" => 2,
            _ => continue,
        };
        let controllers = if version == 1 { controllers } else { Vec::new() };
        // hierarchy:controllers:path; version 2 has no controllers here.
        let path = cgroup.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (named, path) = (parts.next()?, parts.next()?);
            let fits = match controllers.first() {
                Some(first) => named.split(',').any(|name| name == *first),
                None => named.is_empty(),
            };
            fits.then_some(path)
        });
        let Some(path) = path else { continue };
        // A container may see only a part of the tree.
        let below = path.strip_prefix(root).unwrap_or(path).trim_start_matches('/');
        let parent = Parent { dir: Path::new(point).join(below), controllers, version };
        if !groups.iter().any(|group| group.controllers == parent.controllers && group.version == version) {
            groups.push(parent);
        }
    }
    groups
}

/// Of version 2: the daemon's own group, or the one above, once it gives our controllers to the groups below it.
fn delegated(own: &Path) -> Option<Parent> {
    [Some(own), own.parent()].into_iter().flatten().find_map(|dir| {
        let has = fs::read_to_string(dir.join("cgroup.controllers")).ok()?;
        let controllers: Vec<_> =
            CONTROLLERS.into_iter().filter(|c| has.split_whitespace().any(|name| name == *c)).collect();
        let given = || fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap_or_default();
        let lacks = |given: &str| controllers.iter().any(|c| !given.split_whitespace().any(|name| name == *c));
        if lacks(&given()) {
            let wanted: Vec<_> = controllers.iter().map(|c| format!("+{c}")).collect();
            fs::write(dir.join("cgroup.subtree_control"), wanted.join(" ")).ok()?;
        }
        (!controllers.is_empty() && !lacks(&given())).then(|| Parent { dir: dir.to_owned(), controllers, version: 2 })
    })
}

fn is_writable(dir: &Path) -> bool {
    nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIXED: &str = "\
30 25 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
31 25 0:27 /docker/abc /sys/fs/cgroup/memory rw,relatime shared:1 - cgroup cgroup rw,memory
32 25 0:28 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
33 25 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
34 25 0:30 / /proc rw - proc proc rw";

    #[test]
    fn our_own_groups_are_found_where_they_are_mounted() {
        let cgroup = "9:freezer:/\n4:memory:/docker/abc/deep\n3:cpu,cpuacct:/a\n0::/user.slice/x.scope\n";
        let found = own_groups(MIXED, cgroup);
        let parent = |dir: &str, controllers: &[&'static str], version| Parent {
            dir: dir.into(),
            controllers: controllers.to_vec(),
            version,
        };
        assert_eq!(
            found,
            [
                parent("/sys/fs/cgroup/cpu/a", &["cpu"], 1),
                parent("/sys/fs/cgroup/memory/deep", &["memory"], 1),
                parent("/sys/fs/cgroup/unified/user.slice/x.scope", &[], 2),
            ]
        );
        assert_eq!(own_groups("", ""), []);
        assert_eq!(own_groups("garbage\n1 2 3 - cgroup", "x"), []);
    }

    #[test]
    fn version_2_takes_the_group_that_can_delegate() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("daemon");
        fs::create_dir(&own).unwrap();
        assert_eq!(delegated(&own), None);
        fs::write(root.path().join("cgroup.controllers"), "cpu io memory pids\n").unwrap();
        fs::write(root.path().join("cgroup.subtree_control"), "memory pids cpu\n").unwrap();
        let found = delegated(&own).unwrap();
        assert_eq!((found.dir.as_path(), found.controllers.len()), (root.path(), 3));
    }

    #[test]
    fn a_record_removes_no_directory_but_ours() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, other) = (dir.path().join("miosa-m1"), dir.path().join("other"));
        fs::create_dir(&ours).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(dir.path().join(RECORD), format!("{}\n{}\n/none/miosa-x\n", ours.display(), other.display()))
            .unwrap();
        remove_recorded(dir.path());
        assert_eq!((ours.exists(), other.exists(), dir.path().join(RECORD).exists()), (false, true, false));
    }
}
