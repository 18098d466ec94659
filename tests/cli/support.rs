//! A daemon of one's own, and commands to it.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// The one document on stdout.
    pub fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        self.document()
    }

    /// The one document on stdout, whatever the exit code.
    pub fn document(&self) -> Value {
        assert_eq!(self.out.lines().count(), 1, "{self:?}");
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The error on stderr; nothing is on stdout.
    pub fn error(&self, exit: i32) -> Value {
        assert_eq!((self.code, self.out.as_str()), (exit, ""), "{self:?}");
        let document: Value = serde_json::from_str(&self.err).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        assert_eq!(document["ok"], false);
        assert!(document["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{self:?}");
        document["error"].clone()
    }
}

/// The program in a sealed environment.
pub fn miosa(state: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_miosa"));
    command.args(args).env_clear().env("MIOSA_STATE_DIR", state).env("PATH", std::env::var_os("PATH").unwrap());
    command.env("HOME", state).stdin(Stdio::null());
    command
}

pub fn run(mut command: Command, input: &[u8]) -> Ran {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feed = std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    feed.join().unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A daemon with fake machines and a template `base`.
pub struct Daemon {
    pub dir: TempDir,
    child: Child,
    args: Vec<String>,
    env: Vec<(String, String)>,
}

impl Daemon {
    pub fn start() -> Daemon {
        Daemon::start_with(&[])
    }

    /// With more arguments.
    pub fn start_with(args: &[&str]) -> Daemon {
        Daemon::start_with_env(args, &[])
    }

    /// And with variables, for it and for the commands run on it.
    pub fn start_with_env(args: &[&str], env: &[(&str, &str)]) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let args: Vec<_> = args.iter().map(|&a| a.to_owned()).collect();
        let env: Vec<_> = env.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        let child = Daemon::spawn(dir.path(), &args, &env);
        let daemon = Daemon { dir, child, args, env };
        daemon.until_ready();
        let image = daemon.dir.path().join("image.raw");
        std::fs::write(&image, vec![1; 64 * 4096]).unwrap();
        let built = daemon.run(&["template", "build", "base", "--image", image.to_str().unwrap(), "--json"]);
        assert_eq!(built.json()["name"], "base");
        daemon
    }

    fn spawn(state: &Path, args: &[String], env: &[(String, String)]) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(state.join("log")).unwrap();
        let mut command = miosa(state, &["daemon", "--vmm", "fake", "--stop-timeout", "20s"]);
        command.args(args).envs(env.iter().cloned()).stderr(log).spawn().unwrap()
    }

    fn until_ready(&self) {
        let began = Instant::now();
        while self.run(&["sandbox", "list"]).code != 0 {
            let log = || std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(began.elapsed() < Duration::from_secs(180), "the daemon is not ready: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.run_with(args, b"")
    }

    pub fn run_with(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut command = miosa(self.dir.path(), args);
        command.envs(self.env.iter().cloned());
        run(command, input)
    }

    /// Ends it with a signal, and says its exit code, if it had one.
    pub fn end(&mut self, signal: nix::sys::signal::Signal) -> Option<i32> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
        self.child.wait().unwrap().code()
    }

    pub fn start_again(&mut self) {
        self.child = Daemon::spawn(self.dir.path(), &self.args, &self.env);
        self.until_ready();
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
