//! A daemon of one's own, requests to it, loop devices, mounts, and outside programs. All of it goes when it is dropped.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use serde_json::Value;

pub use crate::programs::{done, run};

pub const MIB: u64 = 1 << 20;
/// After this long something hangs. Only ever reached by a failure.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Whether this is the long form.
pub fn is_long() -> bool {
    std::env::var("MIOSA_OUTSIDE").is_ok_and(|form| form == "long")
}

/// How much of something is done in each form; `variable` says otherwise.
pub fn amount(variable: &str, short: u64, long: u64) -> u64 {
    match std::env::var(variable) {
        Ok(value) => value.parse().unwrap_or_else(|e| panic!("{variable}={value}: {e}")),
        Err(_) if is_long() => long,
        Err(_) => short,
    }
}

/// What chance goes by. Told at the beginning, so that a failure shows it.
pub fn seed() -> u64 {
    let seed = std::env::var("MIOSA_OUTSIDE_SEED").map_or_else(
        |_| if is_long() { std::process::id().into() } else { 1 },
        |value| value.parse().expect("MIOSA_OUTSIDE_SEED is a number"),
    );
    println!("MIOSA_OUTSIDE_SEED={seed}");
    seed
}

/// xorshift.
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.bits() >> 11) % n
    }
}

/// Bytes that do not compress and are the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    let mut bytes: Vec<u8> =
        std::iter::repeat_with(|| chance.bits().to_le_bytes()).take(len / 8 + 1).flatten().collect();
    bytes.truncate(len);
    bytes
}

/// A directory that is not on a file system in memory: loop devices and direct I/O need one.
pub fn work_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("miosa-o").tempdir().unwrap()
}

/// What a program printed.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Runs a shell script to its end.
pub fn sh(script: &str) -> String {
    said(&run("bash", &["-euo", "pipefail", "-c", script]))
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Why a request was not done.
#[derive(Debug)]
#[allow(dead_code, reason = "shown when a test fails")]
pub struct Refused {
    /// The HTTP status; 0 when nobody answered.
    pub status: u16,
    pub code: String,
    pub message: String,
}

pub type Answer = Result<Value, Refused>;

/// What a daemon is started with.
#[derive(Clone, Default)]
pub struct Start {
    /// Words before the program, such as those of strace.
    pub before: Vec<String>,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Where its stderr goes, if not beside the state directory.
    pub log: Option<PathBuf>,
}

impl Start {
    pub fn args(args: &[&str]) -> Self {
        Self { args: args.iter().map(|&a| a.to_owned()).collect(), ..Self::default() }
    }

    /// Seals all the time, and soon makes writers wait.
    pub fn busy() -> Self {
        Self::args(&["--log-budget", "2mb", "--log-limit", "8mb", "--cache-memory", "16mb"])
    }
}

/// The real program, in a process of its own, on a state directory.
pub struct Daemon {
    pub state: PathBuf,
    pub start: Start,
    child: Child,
    log_at: PathBuf,
    /// How long it took from the start of the process to the first answer.
    pub took: Duration,
}

impl Daemon {
    pub fn start(state: &Path, start: Start) -> Daemon {
        Daemon::try_start(state, start).unwrap_or_else(|log| panic!("the daemon is not ready: {log}"))
    }

    /// Its log, when it ended before it was ready.
    pub fn try_start(state: &Path, start: Start) -> Result<Daemon, String> {
        std::fs::create_dir_all(state).unwrap();
        let log_at = start.log.clone().unwrap_or_else(|| state.with_extension("daemon-log"));
        let log = std::fs::File::options().create(true).append(true).open(&log_at).unwrap();
        let words: Vec<&str> = start.before.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_miosa")]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(["--state-dir", text(state), "daemon", "--vmm", "fake"]);
        command.args(["--preview-listen", "none", "--stop-timeout", "20s"]).args(&start.args);
        command.env("MIOSA_CONFIG", "/dev/null").envs(start.env.iter().cloned());
        // A group of its own: what wraps it ends with it.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
        let began = Instant::now();
        let child = command.spawn().unwrap_or_else(|e| panic!("this test needs {}: {e}", words[0]));
        let mut daemon = Daemon { state: state.to_owned(), log_at, start, child, took: Duration::ZERO };
        // An answer is one also when it is a refusal.
        while daemon.call("GET", "/store/stats", Value::Null).is_err_and(|refused| refused.status == 0) {
            if daemon.has_ended() || began.elapsed() > PATIENCE {
                assert!(began.elapsed() < PATIENCE, "the daemon hangs at its start: {}", daemon.log());
                return Err(daemon.log());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon.took = began.elapsed();
        Ok(daemon)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub fn log(&self) -> String {
        let log = std::fs::read(&self.log_at).unwrap_or_default();
        String::from_utf8_lossy(&log[log.len().saturating_sub(40_000)..]).into_owned()
    }

    /// A request of the API, with its body.
    pub fn call(&self, method: &str, route: &str, body: Value) -> Answer {
        call(&self.state.join("miosa.sock"), method, route, &body)
    }

    /// The same for a thread that outlives this one daemon.
    pub fn caller(&self) -> impl Fn(&str, &str, Value) -> Answer + Send + Sync + Clone + 'static {
        let socket = self.state.join("miosa.sock");
        move |method, route, body| call(&socket, method, route, &body)
    }

    /// One that has to be done.
    pub fn ok(&self, method: &str, route: &str, body: Value) -> Value {
        self.call(method, route, body).unwrap_or_else(|e| panic!("{method} {route}: {e:?}\n{}", self.log()))
    }

    /// The command line. Its document on stdout.
    pub fn cli(&self, args: &[&str]) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_miosa"));
        command.args(["--json", "--state-dir", text(&self.state)]).args(args).env("MIOSA_CONFIG", "/dev/null");
        serde_json::from_slice(&done("miosa", &mut command).stdout).unwrap()
    }

    pub fn create(&self, name: &str, bytes: u64) {
        self.cli(&["disk", "create", name, "--size", &format!("{}mb", bytes / MIB)]);
    }

    pub fn attach(&self, key: &str, frontend: &str) -> PathBuf {
        self.try_attach(key, frontend).unwrap_or_else(|e| panic!("{key}: {e:?}"))
    }

    pub fn try_attach(&self, key: &str, frontend: &str) -> Result<PathBuf, Refused> {
        let body = serde_json::json!({ "frontend": frontend });
        Ok(self.call("POST", &format!("/disks/{key}/attach"), body)?["path"].as_str().unwrap().into())
    }

    pub fn detach(&self, key: &str) {
        self.ok("POST", &format!("/disks/{key}/detach"), Value::Null);
    }

    /// `kill -9`, of whatever wraps it, too.
    pub fn kill(&mut self) {
        let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(self.pid() as i32), nix::sys::signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// Asks it to end, and waits. False when it had to be killed.
    pub fn stop(&mut self) -> bool {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid() as i32), nix::sys::signal::SIGTERM);
        let began = Instant::now();
        while !self.has_ended() {
            if began.elapsed() > PATIENCE {
                self.kill();
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    pub fn again(&mut self) {
        self.kill();
        let fresh = Daemon::start(&self.state, self.start.clone());
        drop(std::mem::replace(self, fresh));
    }

    /// Kilobytes of memory that are its own.
    pub fn memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
        }
        // Nothing is there unless it died with disks shown, and no other has taken its place.
        if std::fs::read_dir(self.state.join("attached/fuse")).is_err() {
            let _ = umount2(&self.state.join("attached/fuse"), MntFlags::MNT_DETACH);
        }
    }
}

fn call(socket: &Path, method: &str, route: &str, body: &Value) -> Answer {
    let nobody = |e: std::io::Error| Refused { status: 0, code: "no_answer".into(), message: e.to_string() };
    let mut stream = UnixStream::connect(socket).map_err(nobody)?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let body = if body.is_null() { "{}".to_owned() } else { body.to_string() };
    let head = format!(
        "{method} /api/v1{route} HTTP/1.1\r\nHost: miosa\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).map_err(nobody)?;
    let mut answer = Vec::new();
    if let Err(e) = stream.read_to_end(&mut answer) {
        assert!(e.kind() != std::io::ErrorKind::WouldBlock, "{method} {route} hangs");
        return Err(nobody(e));
    }
    let answer = String::from_utf8_lossy(&answer);
    let cut_off = || Refused { status: 0, code: "no_answer".into(), message: format!("cut off: {answer:?}") };
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(cut_off)?;
    let status: u16 = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(cut_off)?;
    let document: Value = serde_json::from_str(body).map_err(|_| cut_off())?;
    if status < 300 {
        return Ok(document.get("data").unwrap_or(&document).clone());
    }
    let field = |name: &str| {
        let error = document.get("error").unwrap_or(&document);
        error[name].as_str().map_or_else(|| error.to_string(), str::to_owned)
    };
    Err(Refused { status, code: field("code"), message: field("message") })
}

/// A loop device on a file.
pub struct Loop(pub String);

impl Loop {
    pub fn new(file: &Path) -> Loop {
        Loop(said(&run("losetup", &["--find", "--show", "--direct-io=on", text(file)])))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).output();
    }
}

/// A mounted file system and its loop device.
pub struct Mounted {
    pub at: PathBuf,
    device: Option<Loop>,
}

impl Mounted {
    /// Mounts what is on a device.
    pub fn new(device: Loop, at: &Path, options: &str) -> Mounted {
        Mounted::attempt(device, at, options).unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn attempt(device: Loop, at: &Path, options: &str) -> Result<Mounted, String> {
        std::fs::create_dir_all(at).unwrap();
        let options = if options.is_empty() { "rw" } else { options };
        let output = Command::new("mount").args(["-o", options, &device.0, text(at)]).output().unwrap();
        match output.status.success() {
            true => Ok(Mounted { at: at.to_owned(), device: Some(device) }),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// A fresh file system on a file.
    pub fn made(kind: &str, file: &Path, at: &Path, options: &str) -> Mounted {
        let device = Loop::new(file);
        run(&format!("mkfs.{kind}"), &[if kind == "ext4" { "-qF" } else { "-qf" }, &device.0]);
        Mounted::new(device, at, options)
    }

    /// Unmounts, and gives the device back.
    pub fn unmount(mut self) -> Loop {
        run("umount", &[text(&self.at)]);
        self.device.take().unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.device.is_some() {
            let _ = umount2(&self.at, MntFlags::MNT_DETACH);
        }
    }
}

/// Ends a hang: kills a process when it is not dropped in time, and remembers that.
pub struct Watchdog {
    over: Arc<AtomicBool>,
    pub bit: Arc<AtomicBool>,
}

impl Watchdog {
    /// Over the group of `pid`.
    pub fn new(pid: u32, patience: Duration) -> Watchdog {
        let dog = Watchdog { over: Arc::default(), bit: Arc::default() };
        let (over, bit) = (dog.over.clone(), dog.bit.clone());
        std::thread::spawn(move || {
            let began = Instant::now();
            while !over.load(Ordering::SeqCst) {
                if began.elapsed() > patience {
                    bit.store(true, Ordering::SeqCst);
                    let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::SIGKILL);
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        dog
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

/// A program of crates.io, installed once beside the tests. Where it cannot be had the reason is printed and there is
/// none; the long form fails.
pub fn tool(name: &str, version: &str) -> Option<PathBuf> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tools");
    let program = root.join("bin").join(name);
    if !program.exists() {
        let built = Command::new(env!("CARGO"))
            .args(["install", "--quiet", "--locked", "--version", version, "--root", text(&root), name])
            .env("CARGO_TARGET_DIR", root.join("build"))
            .output()
            .unwrap();
        let _ = std::fs::remove_dir_all(root.join("build"));
        if !built.status.success() {
            return left_out(&format!("{name} {version}"), &built);
        }
    }
    Some(program)
}

/// Tells that a suite is left out, and why; the long form fails.
fn left_out(what: &str, output: &Output) -> Option<PathBuf> {
    let why = String::from_utf8_lossy(&output.stderr);
    // Past the capture of the tests' output.
    let _ = writeln!(std::io::stderr(), "left out: {what}, which cannot be had: {why}");
    assert!(!is_long(), "{what} cannot be had: {why}");
    None
}

/// PostgreSQL's programs, unpacked below `to` and not installed: that would start a server. The packages are kept beside
/// the tests. As [`tool`] where they cannot be had.
pub fn postgres(to: &Path) -> Option<PathBuf> {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tools/postgresql-15");
    if !kept.exists() {
        let partial = kept.with_extension(std::process::id().to_string());
        std::fs::create_dir_all(&partial).unwrap();
        let mut download = Command::new("apt-get");
        let output = download.args(["download", "-q", "postgresql-15", "postgresql-client-15"]).current_dir(&partial);
        let output = output.output().unwrap();
        if !output.status.success() {
            let _ = std::fs::remove_dir_all(&partial);
            return left_out("PostgreSQL", &output);
        }
        std::fs::rename(&partial, &kept).unwrap();
    }
    sh(&format!("for package in {}/*.deb; do dpkg -x $package {}; done", text(&kept), text(to)));
    Some(to.join("usr/lib/postgresql/15/bin"))
}
