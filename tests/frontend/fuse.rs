//! The FUSE mount, used as people will: fio, e2fsprogs, loop devices, QEMU, and plain system calls.

use crate::support::{BOOTED, MIB, TestStore, attempt, boot, boot_sector, pattern, run};
use miosa::frontend::{Error, FuseMount};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A store and a mount, both gone at the end of the test whatever happens.
struct Setup {
    // Unmounted before its directory goes.
    mount: FuseMount,
    store: TestStore,
}

fn mounted() -> Setup {
    assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse");
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let store = TestStore::new();
    let mount = FuseMount::mount(&store.dir.path().join("disks")).unwrap();
    Setup { mount, store }
}

impl Setup {
    fn add(&self, name: &str, size_bytes: u64) -> PathBuf {
        self.mount.add(name, self.store.disk(name, size_bytes)).unwrap()
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

fn mounts_on(dir: &Path) -> usize {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().filter(|line| line.split(' ').nth(1) == dir.to_str()).count()
}

fn is_mounted(dir: &Path) -> bool {
    mounts_on(dir) > 0
}

#[test]
fn disks_come_and_go_as_files() {
    let setup = mounted();
    let dir = setup.mount.dir().to_path_buf();
    let names = || {
        let mut names: Vec<_> =
            std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert!(names().is_empty());
    let one = setup.add("one", MIB);
    let two = setup.add("two", 3 * MIB + 4096);
    assert_eq!(names(), ["one", "two"]);
    assert_eq!(one, setup.mount.path("one"));
    let metadata = std::fs::metadata(&two).unwrap();
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o7777), (3 * MIB + 4096, 0o600));
    assert!(matches!(setup.mount.add("one", setup.store.disk("else", MIB)), Err(Error::NameTaken(_))));
    let spare = setup.store.disk("spare", MIB);
    for bad in ["", ".", "..", "a/b", "nul\0", &"x".repeat(256)] {
        assert!(matches!(setup.mount.add(bad, spare.clone()), Err(Error::InvalidName(_))), "{bad:?}");
    }

    // They do not mix.
    let (file_one, file_two) = (open(&one), open(&two));
    file_one.write_all_at(&pattern(1, 5000), 100).unwrap();
    file_two.write_all_at(&pattern(2, 5000), 100).unwrap();
    let mut back = vec![0; 5000];
    file_one.read_exact_at(&mut back, 100).unwrap();
    assert!(back == pattern(1, 5000));

    // Removal takes effect for open files too, and the name is free at once.
    assert!(setup.mount.remove("one"));
    assert!(!setup.mount.remove("one"));
    assert_eq!(names(), ["two"]);
    assert_eq!(errno(File::open(&one)), libc::ENOENT);
    assert_eq!(errno(file_one.read_at(&mut back, 100)), libc::ENODEV);
    assert_eq!(errno(file_one.write_at(&back, 100)), libc::ENODEV);
    assert_eq!(errno(file_one.sync_all()), libc::ENODEV);
    setup.mount.add("one", setup.store.disk("another", MIB)).unwrap();
    open(&one).read_exact_at(&mut back, 100).unwrap();
    assert!(back.iter().all(|byte| *byte == 0), "a new disk under the old name");

    // Nobody but us makes or removes files.
    assert_eq!(errno(File::create(dir.join("new"))), libc::EPERM);
    assert_eq!(errno(std::fs::remove_file(&two)), libc::EPERM);
    assert_eq!(errno(std::fs::create_dir(dir.join("new"))), libc::EPERM);
    assert_eq!(errno(std::fs::rename(&two, dir.join("new"))), libc::EPERM);
    assert_eq!(nix::sys::statvfs::statvfs(&dir).unwrap().files(), 2);
}

#[test]
fn a_file_ends_where_the_disk_ends() {
    let setup = mounted();
    let file = open(&setup.add("disk", MIB));
    assert_eq!(file.write_at(&[7; 1000], MIB - 300).unwrap(), 300, "a write over the end is short");
    assert_eq!(errno(file.write_at(&[7; 1000], MIB)), libc::ENOSPC);
    let mut back = [0; 1000];
    assert_eq!(file.read_at(&mut back, MIB - 300).unwrap(), 300);
    assert_eq!(file.read_at(&mut back, MIB).unwrap(), 0);
    assert_eq!(file.read_at(&mut back, 1 << 50).unwrap(), 0);
    assert_eq!(errno(file.set_len(MIB + 1)), libc::EPERM);
    assert_eq!(errno(file.set_len(0)), libc::EPERM);
    file.set_len(MIB).unwrap();
    assert_eq!(errno(OpenOptions::new().write(true).truncate(true).open(setup.mount.path("disk"))), libc::EPERM);
    let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    file.set_times(std::fs::FileTimes::new().set_modified(time)).unwrap();
    assert_eq!(file.metadata().unwrap().modified().unwrap(), time);
    assert_eq!(errno(file.set_permissions(std::fs::Permissions::from_mode(0o666))), libc::EPERM);
    // All of it counts as data.
    let seek = |offset, whence| nix::unistd::lseek(&file, offset, whence);
    assert_eq!(seek(5, nix::unistd::Whence::SeekData), Ok(5));
    assert_eq!(seek(5, nix::unistd::Whence::SeekHole), Ok(MIB as i64));
    assert_eq!(seek(MIB as i64, nix::unistd::Whence::SeekData), Err(nix::errno::Errno::ENXIO));
    assert_eq!(file.metadata().unwrap().size(), MIB);
}

#[test]
fn punched_and_zeroed_ranges_read_as_zeroes_and_the_rest_stays() {
    let setup = mounted();
    let file = open(&setup.add("disk", 4 * MIB));
    let mut expected = pattern(1, 4 << 20);
    file.write_all_at(&expected, 0).unwrap();
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (punch, zero) = (FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE);
    for (flags, offset, len) in
        [(punch | keep, 4096, 8192), (zero | keep, 100_000, 300_000), (zero, 1, 1), (punch | keep, 1_000_001, 77_777)]
    {
        fallocate(&file, flags, offset, len).unwrap();
        expected[offset as usize..(offset + len) as usize].fill(0);
    }
    // Over the end: only what is there.
    fallocate(&file, punch | keep, 4 * MIB as i64 - 512, 4096).unwrap();
    expected[(4 << 20) - 512..].fill(0);
    fallocate(&file, punch | keep, 5 * MIB as i64, 4096).unwrap();
    let mut back = vec![0; expected.len()];
    file.read_exact_at(&mut back, 0).unwrap();
    assert!(back == expected);
    for (flags, offset, len) in [
        (FallocateFlags::empty(), 0, 4096),
        (keep, 0, 4096),
        (zero, 4 * MIB as i64 - 512, 4096),
        (FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, 4096),
    ] {
        assert_eq!(fallocate(&file, flags, offset, len), Err(nix::errno::Errno::EOPNOTSUPP), "{flags:?}");
    }
    assert_eq!(file.metadata().unwrap().len(), 4 * MIB);
}

#[test]
fn a_snapshot_is_a_file_that_cannot_be_written() {
    let setup = mounted();
    let id = setup.store.create("disk", 4 * MIB);
    let disk = setup.store.store.disk(id).unwrap();
    disk.write(0, &pattern(1, 9000)).unwrap();
    let path = setup.mount.add("snapshot", setup.store.snapshot(id, "then")).unwrap();
    disk.write(0, &pattern(2, 9000)).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o400);
    assert_eq!(errno(OpenOptions::new().write(true).open(&path)), libc::EROFS);
    assert_eq!(errno(OpenOptions::new().read(true).write(true).open(&path)), libc::EROFS);
    let mut file = File::open(&path).unwrap();
    let mut all = Vec::new();
    file.read_to_end(&mut all).unwrap();
    assert_eq!(all.len() as u64, 4 * MIB);
    assert!(all[..9000] == pattern(1, 9000)[..] && all[9000..].iter().all(|byte| *byte == 0));
    file.sync_all().unwrap();
}

#[test]
fn fsync_and_synchronous_writes_reach_the_log_on_disk() {
    let setup = mounted();
    let path = setup.add("disk", MIB);
    let (file, store) = (open(&path), &setup.store.store);
    let syncs = store.log_syncs();
    file.write_all_at(&pattern(1, 5000), 0).unwrap();
    file.sync_data().unwrap();
    assert!(store.log_syncs() > syncs);
    for flag in [libc::O_DSYNC, libc::O_SYNC] {
        let file = OpenOptions::new().write(true).custom_flags(flag).open(&path).unwrap();
        let syncs = store.log_syncs();
        file.write_all_at(&pattern(2, 5000), 0).unwrap();
        assert!(store.log_syncs() > syncs);
    }
}

#[test]
fn mapped_memory_works() {
    let setup = mounted();
    let path = setup.add("disk", MIB);
    let file = open(&path);
    file.write_all_at(&pattern(1, 1 << 20), 0).unwrap();
    // Shared and writable, by another process: one that waits for a page of its own file may be what its server waits for.
    let script = "import mmap, sys\n\
                  file = open(sys.argv[1], 'r+b')\n\
                  memory = mmap.mmap(file.fileno(), 1 << 20)\n\
                  sys.stdout.buffer.write(memory[:])\n\
                  memory[5000:9000] = b'\\x09' * 4000\n\
                  memory.flush()\n";
    let done = std::process::Command::new("python3").args(["-c", script]).arg(&path).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(done.stdout == pattern(1, 1 << 20));
    file.sync_all().unwrap();
    let mut back = [0; 4002];
    file.read_exact_at(&mut back, 4999).unwrap();
    let old = pattern(1, 1 << 20);
    assert!(back[0] == old[4999] && back[1..4001] == [9; 4000] && back[4001] == old[9000]);
}

#[test]
fn fio_finds_no_wrong_block() {
    let setup = mounted();
    let path = setup.add("disk", 256 * MIB);
    let filename = format!("--filename={}", path.display());
    for (engine, depth) in [("libaio", 32), ("io_uring", 32), ("psync", 1)] {
        run(
            "fio",
            &[
                "--name=verify",
                &filename,
                "--size=64m",
                "--rw=randwrite",
                "--bsrange=512-64k",
                "--blockalign=512",
                "--direct=1",
                &format!("--ioengine={engine}"),
                &format!("--iodepth={depth}"),
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--fsync=64",
                "--allow_file_create=0",
            ],
        );
    }
    // Several writers at a time, each in its part.
    run(
        "fio",
        &[
            "--name=parts",
            &filename,
            "--size=32m",
            "--numjobs=4",
            "--offset_increment=32m",
            "--rw=randwrite",
            "--bs=16k",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=8",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--allow_file_create=0",
        ],
    );
    // Trims need a block device; a loop device makes punched holes of them.
    let device = Loop::on(&path, &["--direct-io=on"]);
    run(
        "fio",
        &[
            "--name=trim",
            &format!("--filename={}", device.0),
            "--size=128m",
            "--rw=randtrimwrite",
            "--bs=64k",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=16",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ],
    );
}

/// A loop device, detached when dropped.
struct Loop(String);

impl Loop {
    fn on(path: &Path, options: &[&str]) -> Self {
        let path = path.to_str().unwrap();
        let output = run("losetup", &[&["--find", "--show"], options, &[path]].concat());
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        attempt("losetup", &["--detach", &self.0]);
    }
}

/// A mounted file system, unmounted when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        attempt("umount", &[self.0.to_str().unwrap()]);
    }
}

#[test]
fn ext4_lives_on_it_directly_and_through_a_loop_device() {
    let setup = mounted();
    let path = setup.add("disk", 128 * MIB);
    let disk = path.to_str().unwrap();
    run("mkfs.ext4", &["-q", "-F", disk]);
    run("e2fsck", &["-f", "-n", disk]);
    for options in [&[][..], &["--direct-io=on"]] {
        let device = Loop::on(&path, options);
        let target = setup.store.dir.path().join("mnt");
        std::fs::create_dir_all(&target).unwrap();
        run("mount", &["-o", "discard", &device.0, target.to_str().unwrap()]);
        let mounted = Mounted(target.clone());
        for i in 0..40 {
            std::fs::write(target.join(format!("file-{i}")), pattern(i, 300_000)).unwrap();
        }
        for i in (0..40).step_by(2) {
            std::fs::remove_file(target.join(format!("file-{i}"))).unwrap();
        }
        run("fstrim", &[target.to_str().unwrap()]);
        drop(mounted);
        assert!(!is_mounted(&target));
        run("mount", &[&device.0, target.to_str().unwrap()]);
        let mounted = Mounted(target.clone());
        for i in (1..40).step_by(2) {
            assert!(std::fs::read(target.join(format!("file-{i}"))).unwrap() == pattern(i, 300_000), "file {i}");
        }
        drop(mounted);
        drop(device);
        run("e2fsck", &["-f", "-n", disk]);
    }
}

#[test]
fn qemu_opens_it_with_every_kind_of_asynchronous_io() {
    let setup = mounted();
    let disk = setup.store.disk("disk", 64 * MIB);
    let path = setup.mount.add("disk", disk.clone()).unwrap();
    for aio in ["native", "io_uring", "threads"] {
        for arguments in [&["-w", "--flush-interval=64"][..], &[]] {
            let common = ["bench", "-f", "raw", "-t", "none", "-i", aio, "-d", "32", "-c", "2000", "-s", "16384"];
            run("qemu-img", &[&common[..], arguments, &[path.to_str().unwrap()]].concat());
        }
        disk.write(0, &boot_sector()).unwrap();
        disk.write_zeroes(4 * 512, 512).unwrap();
        let drive = format!("file={},format=raw,if=virtio,cache=none,aio={aio}", path.display());
        let output = boot(&["-machine", "pc", "-m", "64", "-drive", &drive]);
        assert_eq!(output.status.code(), Some(BOOTED), "{aio}: {}", String::from_utf8_lossy(&output.stderr));
        let mut written = vec![0; 512];
        disk.read(4 * 512, &mut written).unwrap();
        assert_eq!(written, boot_sector(), "{aio}");
    }
}

#[test]
fn unmounting_waits_for_nobody_and_leaves_nothing() {
    let setup = mounted();
    let dir = setup.mount.dir().to_path_buf();
    let path = setup.add("disk", MIB);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    assert!(is_mounted(&dir));
    setup.mount.unmount().unwrap();
    assert!(!is_mounted(&dir));
    assert!(file.read_at(&mut [0; 512], 0).is_err());
    // The directory is an ordinary one again, and can be mounted again.
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    let again = FuseMount::mount(&dir).unwrap();
    assert!(is_mounted(&dir));
    // Somebody else unmounts it.
    run("umount", &[dir.to_str().unwrap()]);
    drop(again);
    assert!(!is_mounted(&dir));
    drop(file);
}

#[test]
fn what_a_dead_server_left_mounted_is_cleared_away() {
    let setup = mounted();
    let dir = setup.mount.dir().to_path_buf();
    let path = setup.add("disk", MIB);
    let file = open(&path);
    assert!(std::fs::symlink_metadata(&dir).is_ok());
    // As the death of a server: the connection is over, and the mount, being in use, stays.
    nix::mount::umount2(&dir, nix::mount::MntFlags::MNT_FORCE).unwrap_err();
    assert_eq!(errno(std::fs::read_dir(&dir)), libc::ENOTCONN);
    // The kernel still knows what the directory was like, and does not ask.
    assert!(std::fs::symlink_metadata(&dir).is_ok());
    let again = FuseMount::mount(&dir).unwrap();
    assert_eq!(mounts_on(&dir), 1);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    again.unmount().unwrap();
    assert!(!is_mounted(&dir));
    drop(file);
}
