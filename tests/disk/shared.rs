//! Attached disks, disks of sandboxes, and who holds the store.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileTypeExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Daemon, miosa, run};
use crate::words::{Place, noise, text};

#[test]
fn a_daemon_attaches_until_it_is_told_to_detach() {
    let place = Place::Daemon(Box::new(Daemon::start()));
    place.ok(&["disk", "create", "one", "--size", "16mb"]);
    let shown = place.ok(&["disk", "attach", "one", "--frontend", "vhost-user"]);
    let socket = std::path::PathBuf::from(shown["path"].as_str().unwrap());
    assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
    assert_eq!(place.ok(&["disk", "show", "one"])["attachment"], shown);
    place.refused(&["disk", "attach", "one", "--frontend", "vhost-user"], 1, "disk_in_use");
    place.refused(&["disk", "delete", "one"], 1, "disk_in_use");
    place.ok(&["disk", "detach", "one"]);
    assert!(!socket.exists());
    place.ok(&["disk", "delete", "one"]);
}

#[test]
fn a_file_in_the_mount_is_the_disk() {
    for place in Place::both() {
        place.import("one", &noise(50, 1 << 20));
        place.ok(&["disk", "snapshot", "one", "--name", "before"]);
        let write_to = |path: &str| {
            let file = std::fs::File::options().write(true).open(path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4_096], 8_192).unwrap();
        };
        match &place {
            Place::Daemon(_) => {
                let shown = place.ok(&["disk", "attach", "one", "--frontend", "fuse"]);
                let state = place.ok(&["disk", "attach", "before", "--frontend", "fuse"]);
                assert_eq!((&shown["read_only"], &state["read_only"]), (&false.into(), &true.into()));
                let path = state["path"].as_str().unwrap();
                assert!(std::fs::read(path).unwrap() == noise(50, 1 << 20));
                write_to(shown["path"].as_str().unwrap());
                place.ok(&["disk", "detach", "one"]);
                place.ok(&["disk", "detach", "before"]);
                assert!(!std::path::Path::new(path).exists());
            }
            Place::Alone(dir) => {
                let mut command = miosa(dir.path(), &["disk", "attach", "one", "--frontend", "fuse", "--quiet"]);
                let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
                let mut line = String::new();
                BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
                write_to(line.trim());
                // Whoever else wants the store is told, after waiting a little.
                place.refused(&["disk", "list"], 1, "store_in_use");
                kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
                assert!(child.wait().unwrap().success());
                assert!(!std::path::Path::new(line.trim()).exists());
            }
        }
        let difference = place.ok(&["disk", "diff", "before", "one"]);
        assert_eq!(difference["ranges"], serde_json::json!([{ "offset": 8_192, "bytes": 4_096 }]));
    }
}

#[test]
fn disks_of_sandboxes_are_shown_and_left_to_them() {
    let mut d = Daemon::start();
    let id = d.run(&["sandbox", "create", "--name", "web", "--wait", "--quiet"]).out.trim().to_owned();
    d.run(&["sandbox", "snapshot", "web", "--name", "good"]);
    let disks = d.run(&["disk", "list", "--json"]).json();
    let disk = disks.as_array().unwrap().iter().find(|x| x["owner"]["id"] == *id).unwrap().clone();
    let key = disk["id"].as_str().unwrap();
    let refused = |args: &[&str]| run(miosa(d.dir.path(), args), b"").error(1);
    let error = refused(&["--json", "disk", "delete", key]);
    assert_eq!(error["code"], "disk_in_use");
    assert!(error["hint"].as_str().unwrap().contains("miosa sandbox destroy"), "{error}");
    assert_eq!(refused(&["--json", "disk", "attach", key, "--frontend", "vhost-user"])["code"], "disk_in_use");
    // Its snapshots and the template's state, too.
    let usage = d.run(&["store", "usage", "--json"]).json();
    for kind in ["snapshot", "template"] {
        let state = usage.as_array().unwrap().iter().find(|u| u["owner"]["kind"] == kind).unwrap().clone();
        assert_eq!(refused(&["--json", "disk", "delete", state["id"].as_str().unwrap()])["code"], "disk_in_use");
    }
    // What is the user's own survives the daemon; and a copy of a sandbox's disk is the user's own.
    d.run(&["disk", "fork", key, "--name", "copy"]);
    d.run(&["disk", "create", "golden", "--size", "1mb"]);
    d.run(&["disk", "snapshot", "golden", "--name", "clean"]);
    d.end(Signal::SIGKILL);
    // The store is nobody's now: the same rules hold without a daemon.
    assert_eq!(run(miosa(d.dir.path(), &["--json", "disk", "delete", key]), b"").error(1)["code"], "disk_in_use");
    d.start_again();
    let names =
        |args: &[&str]| d.run(args).json().as_array().unwrap().iter().map(|x| x["name"].clone()).collect::<Vec<_>>();
    let after = names(&["disk", "list", "--json"]);
    assert!(
        after.contains(&"golden".into()) && after.contains(&"copy".into()) && after.contains(&(*id).into()),
        "{after:?}"
    );
    assert_eq!(names(&["disk", "snapshots", "golden", "--json"]), ["clean"]);
    d.run(&["sandbox", "destroy", "web"]);
    assert_eq!(d.run(&["disk", "show", key]).code, 1);
}

#[test]
fn a_store_of_another_version_or_damaged_is_refused_and_left_alone() {
    let place = Place::Alone(tempfile::tempdir().unwrap());
    place.ok(&["disk", "create", "one", "--size", "1mb"]);
    let path = place.dir().join("store/STORE");
    let ours = std::fs::read(&path).unwrap();
    let mut other = ours.clone();
    other[8] += 1;
    let checksum = crc32c(&other[..60]);
    other[60..].copy_from_slice(&checksum.to_le_bytes());
    std::fs::write(&path, &other).unwrap();
    place.refused(&["disk", "list"], 1, "unsupported_version");
    place.refused(&["disk", "create", "two", "--size", "1mb"], 1, "unsupported_version");
    assert!(std::fs::read(&path).unwrap() == other);
    other[20] ^= 1;
    std::fs::write(&path, &other).unwrap();
    place.refused(&["disk", "list"], 4, "storage_damaged");
    std::fs::write(&path, &ours).unwrap();
    assert_eq!(place.names(), ["one"]);
}

fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// A small file system, gone with the test.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(&self, options: &str, flags: nix::mount::MsFlags) {
        let options = Some(options).filter(|o| !o.is_empty());
        nix::mount::mount(Some("tmpfs"), self.0.path(), Some("tmpfs"), flags, options).expect("needs root");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_or_read_only_directory_is_told_and_loses_nothing() {
    let small = Small(tempfile::tempdir().unwrap());
    small.mount("size=96m", nix::mount::MsFlags::empty());
    let dir = small.0.path();
    let ran = |args: &[&str]| run(miosa(dir, args), b"");
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), noise(70, 4 << 20)).unwrap();
    assert_eq!(ran(&["disk", "import", text(image.path()), "--name", "kept", "--json"]).json()["name"], "kept");
    std::fs::write(image.path(), noise(71, 200 << 20)).unwrap();
    let error = ran(&["disk", "import", text(image.path()), "--name", "large", "--json"]).error(4);
    assert_eq!(error["code"], "storage_full", "{error}");
    assert!(error["hint"].as_str().unwrap().contains("free space"), "{error}");
    let disks = ran(&["disk", "list", "--json"]).json();
    let names: Vec<_> = disks.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["kept"]);
    let out = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(ran(&["disk", "export", "kept", text(out.path())]).code, 0);
    assert!(std::fs::read(out.path()).unwrap() == noise(70, 4 << 20));

    small.mount("", nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY);
    assert_eq!(ran(&["disk", "list", "--json"]).error(4)["code"], "read_only");
    small.mount("size=96m", nix::mount::MsFlags::MS_REMOUNT);
    assert_eq!(ran(&["disk", "list", "--json"]).code, 0);
}

#[test]
fn a_daemon_waits_for_a_command_and_commands_go_to_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::Alone(dir);
    place.import("one", &noise(60, 64 << 20));
    let mut slow = miosa(place.dir(), &["disk", "export", "one", text(&place.file("out"))]).spawn().unwrap();
    let mut daemon = miosa(place.dir(), &["daemon", "--vmm", "fake"]).stderr(Stdio::null()).spawn().unwrap();
    assert!(slow.wait().unwrap().success());
    let began = Instant::now();
    while !place.file("miosa.sock").exists() {
        assert!(began.elapsed() < Duration::from_secs(180));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(place.names(), ["one"]);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
