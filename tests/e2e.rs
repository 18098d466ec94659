//! End to end: the real program, a real daemon, real QEMU, a real Debian guest.
//!
//! Needs root, QEMU, mmdebstrap and Debian's package sources. Kernel and base image are made once and kept in
//! `MIOSA_CACHE_DIR` (default `~/.cache/miosa`). The guest's agent is `MIOSA_AGENT`, or `miosa-agent` next to `miosa`, or
//! is built. Nothing is skipped and nothing depends on speed: deadlines are there only so that a hang ends.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

#[path = "cli/desk.rs"]
mod desk;
#[path = "e2e/memory.rs"]
mod memory;
#[path = "e2e/soak.rs"]
mod soak;

use desk::Desk;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(300);

fn miosa_path() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_miosa"))
}

fn cache_dir() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/miosa");
    std::env::var_os("MIOSA_CACHE_DIR").map_or_else(home, PathBuf::from)
}

/// The guest's agent, a static program; found or built once.
fn agent() -> &'static Path {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(find_agent)
}

fn find_agent() -> PathBuf {
    if let Some(path) = std::env::var_os("MIOSA_AGENT") {
        return path.into();
    }
    let dir = miosa_path().parent().unwrap();
    let beside = dir.join("miosa-agent");
    if beside.is_file() && is_static(&beside) {
        return beside;
    }
    let target = "x86_64-unknown-linux-gnu";
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "-p", "miosa-agent", "--target", target])
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(status.success(), "the agent does not build");
    dir.parent().unwrap().join(target).join("release/miosa-agent")
}

/// A program that names a loader has its path in it.
fn is_static(program: &Path) -> bool {
    let bytes = std::fs::read(program).unwrap();
    !bytes[..bytes.len().min(4_096)].windows(9).any(|w| w == b"ld-linux-")
}

struct Lab {
    dir: tempfile::TempDir,
    daemon: Child,
    extra: &'static [&'static str],
}

impl Lab {
    fn new(extra: &'static [&'static str]) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let daemon = Lab::spawn(dir.path(), extra);
        let lab = Lab { dir, daemon, extra };
        lab.until_ready();
        // The first one makes the image, which takes minutes; it is not to be made four times at once.
        static IMAGE: Mutex<()> = Mutex::new(());
        let making = IMAGE.lock().unwrap_or_else(PoisonError::into_inner);
        lab.json(&["template", "build", "base", "--disk", "2gb"]);
        drop(making);
        lab
    }

    fn spawn(state: &Path, extra: &[&str]) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(state.join("log")).unwrap();
        Command::new(miosa_path())
            .args(["daemon", "--default-memory", "384mb", "--boot-timeout", "4m"])
            .args(extra)
            .env("MIOSA_STATE_DIR", state)
            .env("MIOSA_CACHE_DIR", cache_dir())
            .env("MIOSA_AGENT", agent())
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn until_ready(&self) {
        until("the daemon to be ready", || self.run(&["sandbox", "list"]).0 == 0);
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let output = Command::new(miosa_path())
            .args(args)
            .env("MIOSA_STATE_DIR", self.dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    fn json(&self, args: &[&str]) -> Value {
        let (code, out, err) = self.run(&[&["--json"], args].concat());
        let log = || std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        assert_eq!(code, 0, "{args:?}: {out}{err}\n{}", log());
        serde_json::from_str(&out).unwrap()
    }

    /// A line of shell in a sandbox: its output.
    fn sh(&self, sandbox: &str, line: &str) -> String {
        let (code, out, err) = self.run(&["sandbox", "exec", sandbox, "--", "sh", "-c", line]);
        assert_eq!(code, 0, "{line}: {out}{err}");
        out
    }

    fn state(&self, sandbox: &str) -> String {
        self.json(&["sandbox", "show", sandbox])["state"].as_str().unwrap().to_owned()
    }

    /// The QEMU processes of this lab.
    fn machines(&self) -> Vec<i32> {
        let ours = self.dir.path().join("run");
        let ours = ours.to_str().unwrap();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        let is_ours = |pid: &i32| {
            let read = |file| {
                String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default()).into_owned()
            };
            // Its arguments have no paths of the daemon's.
            read("cmdline").contains("qemu-system") && read("environ").contains(ours)
        };
        pids.filter(is_ours).collect()
    }

    /// As a power cut for all of them; returns when they are gone.
    fn kill_machines(&self) {
        for pid in self.machines() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        until("the machines to be gone", || self.machines().is_empty());
    }

    fn kill_daemon(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
    }

    fn start_daemon(&mut self) {
        self.daemon = Lab::spawn(self.dir.path(), self.extra);
        self.until_ready();
    }

    fn end_daemon(&mut self) -> Option<i32> {
        self.signal_daemon(Signal::SIGTERM)
    }

    fn signal_daemon(&mut self, signal: Signal) -> Option<i32> {
        kill(Pid::from_raw(i32::try_from(self.daemon.id()).unwrap()), signal).unwrap();
        self.daemon.wait().unwrap().code()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        for pid in self.machines() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        // Of a daemon that was killed with its FUSE mount.
        let disks = self.dir.path().join("disks");
        while nix::mount::umount2(&disks, nix::mount::MntFlags::MNT_DETACH).is_ok() {}
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn a_shell_at_a_terminal_works(lab: &Lab, sandbox: &str) {
    let mut command = Command::new(miosa_path());
    command.args(["sandbox", "shell", sandbox, "--cwd", "/tmp", "--env", "A=b"]);
    let mut desk = Desk::sit(command.env("MIOSA_STATE_DIR", lab.dir.path()).env("TERM", "vt100"));
    desk.type_in("stty size; tty; echo $TERM:$A:$PWD:$((6 * 7))\n");
    desk.until("vt100:b:/tmp:42");
    assert!(desk.seen.contains("33 101") && desk.seen.contains("/dev/pts/"), "{}", desk.seen);
    // The shell has jobs, so the terminal is its own.
    assert!(desk.is_raw() && !desk.seen.contains("job control"), "{}", desk.seen);
    desk.resize(12, 34);
    desk.type_in("until [ \"$(stty size)\" = '12 34' ]; do sleep 0.1; done; echo resized $((6 * 7))\n");
    desk.until("resized 42");
    desk.interrupt_a_program();
    desk.type_in("exit 9\n");
    assert_eq!(desk.ended(), Some(9));
    assert!(!desk.is_raw());
}

fn commands_at_once_are_exact(lab: &Lab, sandboxes: &[&str]) {
    std::thread::scope(|scope| {
        for i in 0..100usize {
            let sandbox = sandboxes[i % sandboxes.len()];
            scope.spawn(move || {
                let script = format!("seq {i} {}; echo {i} >&2; exit {i}", i + 1_000);
                let ran = lab.run(&["sandbox", "exec", sandbox, "--", "sh", "-c", &script]);
                let out: String = (i..=i + 1_000).map(|n| format!("{n}\n")).collect();
                assert_eq!(ran, (i as i32, out, format!("{i}\n")));
            });
        }
    });
}

#[test]
fn the_whole_story() {
    let mut lab = Lab::new(&[]);
    assert_eq!(
        lab.json(&["sandbox", "create", "--template", "base", "--name", "work", "--timeout", "1h", "--wait"])["state"],
        "running"
    );
    let program = lab.dir.path().join("count.py");
    std::fs::write(&program, "import sys\nprint(sum(range(1000)))\nsys.exit(3)\n").unwrap();
    lab.json(&["sandbox", "write-file", "work", "/workspace/app/count.py", program.to_str().unwrap()]);
    let (code, out, _) = lab.run(&["sandbox", "exec", "work", "--", "python3", "/workspace/app/count.py"]);
    assert_eq!((code, out.as_str()), (3, "499500\n"));

    // Written and not synced: a snapshot of the running machine has it all the same.
    lab.sh("work", "echo precious > /workspace/note");
    let snapshot = lab.json(&["sandbox", "snapshot", "work", "--name", "before risky work"]);
    assert_eq!(snapshot["consistency"], "filesystem");
    lab.sh("work", "rm -rf /workspace/app /usr/lib/python3* && echo ruined > /workspace/note");
    let restored = ["sandbox", "create", "--snapshot", "before risky work", "--name", "restored", "--wait"];
    assert_eq!(lab.json(&restored)["state"], "running");
    assert_eq!(
        lab.sh("restored", "cat /workspace/note; python3 /workspace/app/count.py || true"),
        "precious\n499500\n"
    );
    assert_eq!(lab.sh("work", "cat /workspace/note"), "ruined\n");

    // Forks of a running one have what was written before the call, and diverge.
    lab.sh("restored", "echo shared > /workspace/choice");
    for name in ["left", "right"] {
        lab.json(&["sandbox", "fork", "restored", "--name", name]);
    }
    lab.sh("left", "cat /workspace/choice && echo left > /workspace/choice");
    assert_eq!(lab.sh("right", "cat /workspace/choice"), "shared\n");
    assert_eq!(lab.sh("restored", "cat /workspace/choice"), "shared\n");
    // Each its own.
    let who = |name| lab.sh(name, "hostname; cat /etc/machine-id");
    let (left, right, parent) = (who("left"), who("right"), who("restored"));
    assert!(left.starts_with("left\n") && left != right && right != parent, "{left}{right}{parent}");

    // What was written before the stop answered is there after the resume, without a sync of the guest's.
    lab.sh(
        "left",
        "dd if=/dev/urandom of=/workspace/blob bs=1M count=8 2>/dev/null; sha256sum /workspace/blob > /workspace/sum",
    );
    assert_eq!(lab.json(&["sandbox", "stop", "left"])["state"], "paused");
    assert_eq!(lab.sh("left", "cat /workspace/choice; sha256sum -c /workspace/sum"), "left\n/workspace/blob: OK\n");
    assert_eq!(lab.state("left"), "running");
    // A fork of a paused one.
    lab.json(&["sandbox", "stop", "left"]);
    lab.json(&["sandbox", "fork", "left", "--name", "later"]);
    assert_eq!(lab.sh("later", "sha256sum -c /workspace/sum"), "/workspace/blob: OK\n");

    a_shell_at_a_terminal_works(&lab, "work");
    commands_at_once_are_exact(&lab, &["work", "restored", "left", "right"]);
    a_preview_reaches_a_guests_server(&lab, "restored");

    // Daemon and machines are killed: what was synced is there, nobody is running, and all can be used.
    lab.sh("right", "echo synced > /workspace/kept; sync");
    lab.kill_daemon();
    lab.kill_machines();
    lab.start_daemon();
    for name in ["work", "restored", "left", "right", "later"] {
        assert_eq!(lab.state(name), "paused", "{name}");
    }
    assert_eq!(lab.sh("right", "cat /workspace/kept"), "synced\n");

    for name in ["work", "restored", "left", "right", "later"] {
        assert_eq!(lab.json(&["sandbox", "destroy", name])["state"], "destroyed");
    }
    assert!(lab.machines().is_empty());
    // The template's memory is all that is left.
    let left = lab.json(&["disk", "list"]);
    assert!(left.as_array().unwrap().iter().all(|disk| disk["owner"]["kind"] == "template"), "{left}");
    assert_eq!(lab.end_daemon(), Some(0));
}

/// As a browser does it; then again when the sandbox was stopped, and what listens comes up with the session.
fn a_preview_reaches_a_guests_server(lab: &Lab, name: &str) {
    let serve =
        ["sandbox", "exec", name, "--detached", "--cwd", "/workspace", "--", "python3", "-m", "http.server", "8000"];
    lab.json(&serve);
    let preview = lab.json(&["sandbox", "preview", name, "--port", "8000", "--path", "/choice"]);
    let url = preview["url"].as_str().unwrap();
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let port: u16 = host.rsplit_once(':').unwrap().1.parse().unwrap();
    let get = |path: &str| {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(180))).unwrap();
        write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let page = get(path);
    assert!(page.starts_with("HTTP/1.1 200") && page.ends_with("\r\n\r\nshared\n"), "{page}");
    assert!(get("choice").starts_with("HTTP/1.1 401"));
    lab.json(&["sandbox", "stop", name]);
    std::thread::scope(|scope| {
        let page = scope.spawn(|| get(path));
        until("the preview to start a session", || lab.state(name) == "running");
        lab.json(&serve);
        assert!(page.join().unwrap().ends_with("\r\n\r\nshared\n"));
    });
    assert!(lab.json(&["sandbox", "metrics", name])["memory"]["used_bytes"].as_u64().is_some_and(|bytes| bytes > 0));
}

/// The host's fio and the libraries it needs, as a tar archive for a guest.
fn fio(dir: &Path) -> PathBuf {
    let (tree, tar) = (dir.join("fio"), dir.join("fio.tar"));
    std::fs::create_dir(&tree).unwrap();
    let listed = Command::new("ldd").arg("/usr/bin/fio").output().expect("this test needs ldd and /usr/bin/fio");
    assert!(listed.status.success());
    let listed = String::from_utf8(listed.stdout).unwrap();
    let libraries = listed.split_whitespace().filter(|word| word.starts_with('/'));
    for file in libraries.chain(["/usr/bin/fio"]) {
        std::fs::copy(file, tree.join(Path::new(file).file_name().unwrap())).unwrap();
    }
    let packed = Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(dir).arg("fio").status().unwrap();
    assert!(packed.success());
    tar
}

#[test]
fn a_guest_does_not_notice_that_its_daemon_is_killed_and_replaced() {
    let mut lab = Lab::new(&["--default-cpus", "2"]);
    lab.json(&["volume", "create", "data", "--size", "64mb"]);
    lab.json(&["sandbox", "create", "--name", "one", "--volume", "data:/data", "--timeout", "5h", "--wait"]);
    lab.json(&["sandbox", "create", "--name", "fleeting", "--non-persistent", "--wait"]);
    let tar = fio(lab.dir.path());
    lab.json(&["sandbox", "write-file", "one", "/opt/fio.tar", tar.to_str().unwrap()]);
    // Writes, flushes, reads and compares until it is told to stop; each time round is a line.
    let load = "cd /opt && tar -xf fio.tar && rm fio.tar && cat > load <<'END'
        while [ ! -e /run/stop ]; do
            fio/ld-linux-x86-64.so.2 --library-path fio fio/fio --name=v --filename=/workspace/v --size=24m \\
                --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16 --numjobs=1 --fsync=32 \\
                --randseed=$(date +%N) --verify=crc32c --verify_fatal=1 --output=/run/fio.log || break
            echo verified >> /run/rounds
        done
        echo ended >> /run/rounds
END
        touch /run/rounds
        (setsid sh load < /dev/null > /run/load.log 2>&1 &)
        (setsid sh -c 'n=0; while :; do n=$((n+1)); echo $n > /run/n; mv /run/n /run/count; done' < /dev/null > /dev/null 2>&1 &)
        sleep 1";
    lab.sh("one", load);
    let machines = lab.machines();
    let said = |lab: &Lab| {
        lab.sh("one", "cat /run/rounds /run/load.log; cat /run/fio.log 2>/dev/null | grep -i verif || true")
    };
    let rounds = |lab: &Lab| lab.sh("one", "grep -c verified /run/rounds || true").trim().parse::<u32>().unwrap();
    let count = |lab: &Lab| lab.sh("one", "cat /run/count").trim().parse::<u64>().unwrap();
    for restart in 0..5 {
        let (done, counted) = (rounds(&lab), count(&lab));
        lab.kill_daemon();
        // Long enough for requests to pile up, and sometimes for the machine to try in vain.
        std::thread::sleep(Duration::from_millis(700 * restart));
        lab.start_daemon();
        assert_eq!(lab.machines(), machines, "the same machines go on");
        until("the load to go on", || rounds(&lab) > done || lab.sh("one", "cat /run/rounds").contains("ended"));
        assert!(!lab.sh("one", "cat /run/rounds").contains("ended"), "restart {restart}: {}", said(&lab));
        assert!(count(&lab) > counted);
        let kept = lab.sh("one", &format!("echo {restart} >> /data/restarts && sync && wc -l < /data/restarts"));
        assert_eq!(kept, format!("{}\n", restart + 1), "its volume is there, too");
        assert_eq!((lab.state("one").as_str(), lab.state("fleeting").as_str()), ("running", "running"));
    }
    // A daemon that makes room for another one leaves them too.
    assert_eq!(lab.signal_daemon(Signal::SIGUSR2), Some(0));
    assert_eq!(lab.machines(), machines);
    lab.start_daemon();
    lab.sh("one", "touch /run/stop");
    until("the load to end", || lab.sh("one", "cat /run/rounds").contains("ended"));
    let (all, last) = (rounds(&lab), said(&lab));
    assert!(all >= 6 && last.trim_end().lines().all(|line| line == "verified" || line == "ended"), "{last}");
    let complaints = lab.sh("one", "dmesg | grep -iE 'i/o error|blk_update|ext4-fs error|buffer i/o' || true");
    assert_eq!(complaints, "");
    // Its console goes on, its clock too, and it ends as any other.
    lab.sh("one", "echo heard > /dev/ttyS0");
    let id = lab.json(&["sandbox", "show", "one"])["id"].as_str().unwrap().to_owned();
    let console = lab.dir.path().join("run").join(&id).join("console.log");
    until("the console", || std::fs::read_to_string(&console).unwrap().contains("heard"));
    let left = lab.json(&["sandbox", "show", "one"])["timeout_remaining_ms"].as_u64().unwrap();
    assert!(left < 5 * 3_600_000, "{left}");
    lab.sh("one", "sha256sum /workspace/v > /workspace/sum");
    assert_eq!(lab.json(&["sandbox", "stop", "one"])["state"], "paused");
    assert_eq!(lab.sh("one", "sha256sum -c /workspace/sum"), "/workspace/v: OK\n");
    lab.json(&["sandbox", "destroy", "one"]);
    lab.json(&["sandbox", "destroy", "fleeting"]);
    assert!(lab.machines().is_empty());
    assert_eq!(std::fs::read_dir(lab.dir.path().join("run")).unwrap().count(), 0, "no socket or record is left");
}

#[test]
fn what_was_synced_survives_the_death_of_qemu() {
    let lab = Lab::new(&["--accel", "tcg"]);
    lab.json(&["volume", "create", "data", "--size", "1gb"]);
    lab.json(&["sandbox", "create", "--name", "one", "--volume", "data:/data", "--wait"]);
    lab.sh("one", "for i in $(seq 200); do echo $i > /workspace/f$i; done; cp /workspace/f* /data; sync");
    let pids = lab.machines();
    assert_eq!(pids.len(), 1);
    kill(Pid::from_raw(pids[0]), Signal::SIGKILL).unwrap();
    until("the loss to be seen", || lab.state("one") == "paused");
    assert!(lab.json(&["sandbox", "show", "one"])["last_error"].is_string());
    let snapshot = lab.json(&["volume", "snapshot", "data"]);
    assert_eq!(snapshot["consistency"], "crash", "its journal has not been played back");
    assert_eq!(lab.sh("one", "cat /workspace/f* | wc -l; cat /workspace/f137"), "200\n137\n");
    assert_eq!(lab.sh("one", "cat /data/f* | wc -l; cat /data/f137"), "200\n137\n");
    hand_over(&lab);
}

/// Sandbox `one` runs, and has the volume `data` at `/data`. What it writes is found by another, which can only read it.
fn hand_over(lab: &Lab) {
    lab.sh("one", "dd if=/dev/urandom of=/data/blob bs=1M count=8 2>/dev/null; cd /data; sha256sum blob > sum");
    assert_eq!(lab.json(&["volume", "snapshot", "data", "--name", "then"])["consistency"], "filesystem");
    lab.sh("one", "echo unsynced > /data/later");
    lab.json(&["sandbox", "stop", "one"]);
    lab.json(&["volume", "detach", "data"]);
    assert_eq!(lab.sh("one", "ls -A /data"), "", "the directory it was mounted at");

    lab.json(&["volume", "create", "copy", "--snapshot", "then"]);
    let two = ["sandbox", "create", "--name", "two", "--volume", "data:/mine:ro", "--volume", "copy", "--wait"];
    lab.json(&two);
    let look = "cd /mine; sha256sum -c sum; cat later; touch x 2>/dev/null || echo refused; ls /mnt/copy/later 2>&1";
    let seen = lab.sh("two", &format!("{look} | tail -1; cd /mnt/copy && sha256sum -c sum && touch x"));
    assert_eq!(seen.lines().collect::<Vec<_>>()[..3], ["blob: OK", "unsynced", "refused"], "{seen}");
    assert!(seen.contains("No such file") && seen.ends_with("blob: OK\n"), "{seen}");
    // Not the guest's word: the device refuses.
    let id = lab.json(&["volume", "show", "data"])["id"].as_str().unwrap().to_owned();
    let device = format!("for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = {id} ] && cat $d/ro; done; true");
    assert_eq!(lab.sh("two", &device), "1\n");
    let (code, _, err) = lab.run(&["volume", "delete", "data"]);
    assert!(code == 1 && err.contains("two"), "{err}");
    for sandbox in ["one", "two"] {
        lab.json(&["sandbox", "destroy", sandbox]);
    }
    for volume in ["data", "copy"] {
        assert_eq!(lab.json(&["volume", "delete", volume])["status"], "deleted");
    }
}

#[test]
fn a_timeout_pauses_and_an_orderly_end_keeps_everything() {
    let mut lab = Lab::new(&[]);
    lab.json(&["sandbox", "create", "--name", "short", "--wait", "--timeout", "15s"]);
    lab.sh("short", "echo unsynced > /workspace/x");
    until("the timeout", || lab.state("short") == "paused");
    assert_eq!(lab.json(&["sandbox", "show", "short"])["last_error"], Value::Null);
    let fleeting =
        lab.json(&["sandbox", "create", "--name", "fleeting", "--non-persistent", "--timeout", "2s", "--wait"]);
    until("the end", || lab.state(fleeting["id"].as_str().unwrap()) == "destroyed");
    // The daemon's own end is a stop.
    lab.json(&["sandbox", "create", "--name", "long", "--wait"]);
    lab.sh("long", "echo unsynced > /workspace/y");
    assert_eq!(lab.end_daemon(), Some(0));
    assert!(lab.machines().is_empty());
    lab.start_daemon();
    assert_eq!(lab.sh("long", "cat /workspace/y"), "unsynced\n");
    assert_eq!(lab.sh("short", "cat /workspace/x"), "unsynced\n");
}

#[test]
fn disks_through_fuse_hold_the_same_promises() {
    let mut lab = Lab::new(&["--disk-frontend", "fuse"]);
    lab.json(&["sandbox", "create", "--name", "one", "--wait"]);
    lab.sh(
        "one",
        "dd if=/dev/urandom of=/workspace/blob bs=1M count=4 2>/dev/null; sha256sum /workspace/blob > /workspace/sum",
    );
    lab.json(&["sandbox", "fork", "one", "--name", "two"]);
    lab.json(&["sandbox", "stop", "one"]);
    for name in ["one", "two"] {
        assert_eq!(lab.sh(name, "sha256sum -c /workspace/sum"), "/workspace/blob: OK\n", "{name}");
    }
    // The files go with the daemon, so the machines cannot go on: as after a power cut.
    lab.sh("one", "echo synced > /workspace/kept; sync");
    lab.kill_daemon();
    lab.start_daemon();
    assert!(lab.machines().is_empty());
    assert_eq!((lab.state("one").as_str(), lab.state("two").as_str()), ("paused", "paused"));
    assert_eq!(lab.sh("one", "cat /workspace/kept"), "synced\n");
    // In order, they are stopped in order, whoever is to come after.
    lab.sh("one", "echo unsynced > /workspace/kept");
    assert_eq!(lab.signal_daemon(Signal::SIGUSR2), Some(0));
    assert!(lab.machines().is_empty());
    lab.start_daemon();
    assert_eq!(lab.sh("one", "cat /workspace/kept"), "unsynced\n");
    lab.json(&["sandbox", "stop", "one"]);
    lab.json(&["sandbox", "destroy", "two"]);
    lab.json(&["volume", "create", "data", "--size", "1gb"]);
    lab.json(&["volume", "attach", "data", "one", "--mount", "/data"]);
    hand_over(&lab);
    // However often its daemon was killed, there was one mount.
    assert_eq!(lab.end_daemon(), Some(0));
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(lab.dir.path().to_str().unwrap()), "{mounts}");
}

/// Of each child and of the parent: what is to be its own, a line each.
const LOOK: &str = "cat /etc/machine-id; hostname; cat /sys/class/net/eth0/address; \
    ssh-keyscan -t ed25519 127.0.0.1 2>/dev/null | cut -d' ' -f3; cat /proc/sys/kernel/random/boot_id; \
    od -An -N16 -tx1 /dev/urandom; date +%s; cat /workspace/note; grep 127.0.1.1 /etc/hosts";

/// Fifty forks of a running sandbox that is an ssh server, on a disk larger than its template's. `MIOSA_E2E_STARTED` says
/// how many of them are started and looked into, the others stay paused; `MIOSA_E2E_TOGETHER`, how many of them run at a
/// time.
#[test]
fn forks_of_a_running_sandbox_are_sandboxes_of_their_own() {
    let number = |name, or| std::env::var(name).map_or(or, |n| n.parse::<usize>().unwrap());
    let (started, together) = (number("MIOSA_E2E_STARTED", 2), number("MIOSA_E2E_TOGETHER", 2));
    let lab = Lab::new(&[]);
    // Installed in a guest, over its own network, on a disk that the recipe enlarges.
    let recipe = lab.dir.path().join("ssh.toml");
    std::fs::write(&recipe, "from = \"base\"\ndisk = \"3gb\"\nmemory = \"512mb\"\npackages = [\"openssh-server\"]\n")
        .unwrap();
    let built = lab.json(&["template", "build", "ssh", "--file", recipe.to_str().unwrap()]);
    assert_eq!(built["disk_size_mb"], 3_072, "{built}");
    let parent = ["sandbox", "create", "--name", "parent", "--template", "ssh", "--memory", "256mb", "--disk", "4gb"];
    assert_eq!(lab.json(&[&parent[..], &["--wait"]].concat())["disk_size_mb"], 4_096);
    let size: u64 = lab.sh("parent", "df -B1 --output=size / | tail -1").trim().parse().unwrap();
    assert!(size > 3 << 30, "the file system has {size} bytes");
    let serve = "until [ -s /etc/ssh/ssh_host_ed25519_key.pub ]; do sleep 1; done; mkdir -p /run/sshd; /usr/sbin/sshd";
    lab.sh("parent", &format!("{serve}; echo kept > /workspace/note"));
    lab.sh("parent", "(i=0; while :; do i=$((i+1)); echo $i > /workspace/count; sleep 0.1; done) >/dev/null 2>&1 &");
    let counted = || lab.sh("parent", "cat /workspace/count").trim().parse::<u64>().unwrap_or(0);
    let own = lab.sh("parent", LOOK);

    let children = lab.json(&["sandbox", "fork", "parent", "--name", "child", "--count", "50"]);
    assert_eq!(children.as_array().unwrap().len(), 50);
    let before = counted();
    until("the parent to go on", || counted() > before);

    // What nobody has written to costs nothing of its own.
    let cost = |name: &str| {
        let nodes = lab.json(&["sandbox", "snapshots", "tree"]);
        let node = nodes.as_array().unwrap().iter().find(|n| n["name"] == name).unwrap().clone();
        (node["exclusive_bytes"].as_u64().unwrap(), node["unsealed_bytes"].as_u64().unwrap())
    };
    assert_eq!(cost("child-50"), (0, 0));

    let mut seen = std::collections::BTreeSet::new();
    let mut tell = |name: &str, told: &str| {
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(lines.len(), 9, "{name}: {told}");
        assert_eq!((lines[1], lines[7], lines[8]), (name, "kept", &*format!("127.0.1.1 {name}")), "{told}");
        for (what, index) in
            [("machine id", 0), ("hardware address", 2), ("ssh host key", 3), ("boot id", 4), ("random number", 5)]
        {
            assert!(!lines[index].is_empty() && seen.insert(lines[index].to_owned()), "{name}'s {what}: {told}");
        }
        let clock: i64 = lines[6].parse().unwrap();
        let here = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
        assert!((clock - here).abs() < 300, "{name}'s clock says {clock}, ours {here}");
    };
    tell("parent", &own);
    let child = |number: usize| format!("child-{number}");
    for number in 1..=started {
        let name = child(number);
        lab.sh(&name, serve);
        tell(&name, &lab.sh(&name, LOOK));
        lab.sh(&name, &format!("echo {name} > /workspace/note; head -c 1048576 /dev/urandom > /workspace/own"));
        if number > together {
            lab.json(&["sandbox", "stop", &child(number - together)]);
        }
    }
    assert_eq!(lab.sh("parent", "cat /workspace/note"), "kept\n");
    let before = counted();
    until("the parent to go on", || counted() > before);
    // Those that still run, all at once, are what they were.
    for number in (started + 1).saturating_sub(together).max(1)..=started {
        assert_eq!(lab.sh(&child(number), "cat /workspace/note"), format!("{}\n", child(number)));
        lab.json(&["sandbox", "stop", &child(number)]);
    }
    // Each costs what it has written itself, which is a MiB and what a boot and a new identity write.
    lab.json(&["store", "seal"]);
    for number in 1..=started {
        let (exclusive, unsealed) = cost(&child(number));
        assert!(
            unsealed == 0 && (1 << 20..32 << 20).contains(&exclusive),
            "{number}: {exclusive} and {unsealed} bytes"
        );
    }
    assert!(started == 50 || cost("child-50") == (0, 0));
}

/// What a running guest has written is read from outside, compared, and taken to another daemon, while a command that nobody
/// waits for goes on.
#[test]
fn what_a_running_guest_has_written_is_read_compared_and_taken_elsewhere() {
    let lab = Lab::new(&[]);
    lab.json(&["sandbox", "create", "--name", "one", "--wait"]);
    lab.sh("one", "mkdir -p /workspace/app && cd /workspace/app && echo first > a && echo gone > b && echo same > c");
    lab.json(&["sandbox", "snapshot", "one", "--name", "before"]);
    let script =
        "i=0; while [ ! -e /run/stop ]; do i=$((i+1)); echo $i; echo $i > /workspace/count; sleep 0.1; done; exit 3";
    let detached = ["sandbox", "exec", "one", "--detached", "--quiet", "--", "sh", "-c", script];
    let (code, command, err) = lab.run(&detached);
    assert_eq!(code, 0, "{err}");
    let command = command.trim();
    let counted = || lab.sh("one", "cat /workspace/count || true").trim().parse::<u64>().unwrap_or(0);
    let goes_on = || {
        let before = counted();
        until("the command to go on", || counted() > before);
    };
    goes_on();
    // Its caller has not synced it; the difference to the present state has it all the same.
    lab.sh(
        "one",
        "cd /workspace/app && echo second > a && rm b && head -c 3000000 /dev/urandom > blob && chmod 640 blob",
    );
    let differences = |a: &str, b: &str| {
        let diff = lab.json(&["sandbox", "snapshots", "diff", a, b]);
        let of = |change: &Value| {
            let path = change["path"].as_str().unwrap();
            let told = format!("{} {path}", change["how"].as_str().unwrap());
            path.starts_with("/workspace/app/").then_some(told)
        };
        let mut told: Vec<String> = diff["changes"].as_array().unwrap().iter().filter_map(of).collect();
        told.sort();
        told
    };
    let expected = ["added /workspace/app/blob", "changed /workspace/app/a", "removed /workspace/app/b"];
    assert_eq!(differences("before", "one"), expected);
    lab.json(&["sandbox", "snapshot", "one", "--name", "after"]);
    assert_eq!(differences("before", "after"), expected);
    goes_on();

    let (_, listed, _) = lab.run(&["sandbox", "snapshots", "ls", "after", "/workspace/app", "-l"]);
    assert!(listed.contains("-rw-r-----") && listed.contains("3000000") && listed.contains("blob"), "{listed}");
    assert_eq!(lab.run(&["sandbox", "snapshots", "cat", "before", "/workspace/app/b"]).1, "gone\n");
    let (code, _, err) = lab.run(&["sandbox", "snapshots", "cat", "after", "/workspace/app/b"]);
    assert_eq!(code, 1, "{err}");
    let tar = lab.dir.path().join("app.tar");
    lab.json(&["sandbox", "snapshots", "extract", "after", "/workspace/app", "-o", tar.to_str().unwrap()]);
    let out = lab.dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    assert!(Command::new("tar").arg("-xf").arg(&tar).arg("-C").arg(&out).status().unwrap().success());
    let found = Command::new("sh").arg("-c").arg("sha256sum $(find . -name blob)").current_dir(&out).output().unwrap();
    let sum = lab.sh("one", "sha256sum < /workspace/app/blob");
    let sum = sum.split(' ').next().unwrap();
    assert!(String::from_utf8_lossy(&found.stdout).starts_with(sum), "{sum}: {found:?}");

    // Taken to another daemon, it boots there.
    let archive = lab.dir.path().join("after.miosa");
    lab.json(&["sandbox", "snapshots", "export", "after", archive.to_str().unwrap()]);
    let there = Lab::new(&[]);
    let arrived = there.json(&["sandbox", "snapshots", "import", archive.to_str().unwrap()]);
    assert_eq!((arrived["comment"].as_str(), arrived["consistency"].as_str()), (Some("after"), Some("filesystem")));
    there.json(&["sandbox", "create", "--snapshot", "after", "--name", "copy", "--wait"]);
    let told = there.sh("copy", "cd /workspace/app && cat a && ls && sha256sum < blob");
    assert_eq!(told, format!("second\na\nblob\nc\n{sum}  -\n"));

    goes_on();
    lab.sh("one", "touch /run/stop");
    let ended = || lab.json(&["sandbox", "command", "get", "one", command]);
    until("the command to end", || ended()["exit_code"] == 3);
    let (_, logs, _) = lab.run(&["sandbox", "command", "logs", "one", command]);
    assert!(logs.starts_with("1\n2\n3\n"), "{logs}");
}

/// Which way the sandbox's session came up.
fn way(lab: &Lab, sandbox: &str) -> String {
    lab.json(&["sandbox", "show", sandbox])["boot_path"].as_str().unwrap().to_owned()
}

/// Stops the sandbox and starts it again until there is a state that it goes on from.
fn until_warm(lab: &Lab, sandbox: &str) {
    until("a machine that goes on from a kept state", || {
        lab.json(&["sandbox", "stop", sandbox]);
        lab.sh(sandbox, "true");
        way(lab, sandbox) == "warm"
    });
}

/// Machines that did not boot are as those that did: what they write is kept, none is like another, and they go on without
/// their daemon.
#[test]
fn a_session_that_goes_on_from_a_kept_state_is_as_any_other() {
    let mut lab = Lab::new(&[]);
    lab.json(&["sandbox", "create", "--name", "one", "--disk", "3gb", "--wait"]);
    lab.json(&["volume", "create", "data", "--size", "1gb"]);
    lab.json(&["sandbox", "stop", "one"]);
    lab.json(&["volume", "attach", "data", "one", "--mount", "/data"]);
    lab.sh("one", "echo unsynced > /workspace/x; echo too > /data/y");
    until_warm(&lab, "one");
    assert_eq!(lab.sh("one", "cat /workspace/x /data/y; hostname"), "unsynced\ntoo\none\n");
    let size: u64 = lab.sh("one", "df -B1 --output=size / | tail -1").trim().parse().unwrap();
    assert!(size > 5 << 29, "the file system has {size} bytes");
    lab.json(&["sandbox", "create", "--name", "two", "--wait"]);
    assert_eq!(way(&lab, "two"), "warm");
    let look = "cat /proc/sys/kernel/random/boot_id /etc/machine-id /sys/class/net/eth0/address; \
                od -An -N16 -tx1 /dev/urandom";
    let (one, two) = (lab.sh("one", look), lab.sh("two", look));
    assert!(one.lines().count() == 4 && one.lines().zip(two.lines()).all(|(a, b)| a != b), "{one}{two}");
    let own = lab.sh("one", "cat /etc/machine-id /sys/class/net/eth0/address");
    // In a session, a command that nobody waits for writes while its daemon is killed.
    let count = "(i=0; while :; do i=$((i+1)); echo $i > /workspace/count; sync; sleep 0.1; done) >/dev/null 2>&1 &";
    lab.sh("one", count);
    // The template's may still be on its way.
    until("the others to be gone", || lab.machines().len() == 2);
    let machines = 2;
    for _ in 0..2 {
        lab.kill_daemon();
        lab.start_daemon();
        let counted = || lab.sh("one", "cat /workspace/count").trim().parse::<u64>().unwrap_or(0);
        let before = counted();
        until("the command to go on", || counted() > before);
        assert_eq!((way(&lab, "one").as_str(), lab.machines().len()), ("warm", machines));
    }
    assert_eq!(lab.signal_daemon(Signal::SIGUSR2), Some(0));
    lab.start_daemon();
    assert_eq!(lab.sh("one", "cat /workspace/x /data/y"), "unsynced\ntoo\n");
    lab.sh("one", "echo later > /workspace/x");
    lab.json(&["sandbox", "stop", "one"]);
    // What it is has not changed, and its file system is as a stopped machine leaves it.
    assert_eq!(lab.sh("one", "cat /workspace/x"), "later\n");
    assert_eq!(lab.sh("one", "cat /etc/machine-id /sys/class/net/eth0/address"), own);
    lab.kill_machines();
    assert_eq!(lab.end_daemon(), Some(0));
    assert!(lab.machines().is_empty());
}

#[test]
fn machines_go_on_from_a_kept_state_on_disks_through_fuse_and_boot_where_they_are_told_to() {
    let mut lab = Lab::new(&["--disk-frontend", "fuse"]);
    lab.json(&["sandbox", "create", "--name", "one", "--wait"]);
    lab.sh("one", "dd if=/dev/urandom of=/workspace/blob bs=1M count=4 2>/dev/null; sha256sum /workspace/blob > /sum");
    until_warm(&lab, "one");
    assert_eq!(lab.sh("one", "sha256sum -c /sum"), "/workspace/blob: OK\n");
    lab.kill_daemon();
    lab.start_daemon();
    assert!(lab.machines().is_empty());
    assert_eq!(lab.sh("one", "sha256sum -c /sum"), "/workspace/blob: OK\n");
    assert_eq!(lab.end_daemon(), Some(0));

    lab.extra = &["--no-warm-machines"];
    lab.start_daemon();
    assert_eq!(lab.sh("one", "sha256sum -c /sum"), "/workspace/blob: OK\n");
    assert_eq!(way(&lab, "one"), "cold");
}
