//! A daemon of one's own, with fake or real machines.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

pub struct Lab {
    pub dir: TempDir,
    daemon: Child,
}

impl Lab {
    /// A daemon whose machines are stand-ins, with a template `base` that nobody boots.
    pub fn fake() -> Lab {
        let lab = Lab::start(&["--vmm", "fake"]);
        let image = lab.dir.path().join("image.raw");
        std::fs::write(&image, vec![1; 64 * 4096]).unwrap();
        lab.json(&["template", "import", image.to_str().unwrap(), "--name", "base"]);
        lab
    }

    /// A daemon with QEMU.
    pub fn real(options: &[&str]) -> Lab {
        Lab::start(&[&["--default-memory", "256mb", "--boot-timeout", "4m"], options].concat())
    }

    fn start(options: &[&str]) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_miosa"));
        command.arg("daemon").args(options).env("MIOSA_STATE_DIR", dir.path()).stdin(Stdio::null()).stderr(log);
        if !options.contains(&"fake") {
            command.env("MIOSA_AGENT", agent());
            if let Some(cache) = std::env::var_os("MIOSA_CACHE_DIR") {
                command.env("MIOSA_CACHE_DIR", cache);
            }
        }
        let lab = Lab { dir, daemon: command.spawn().unwrap() };
        let began = Instant::now();
        while lab.run(&["sandbox", "list"]).code != 0 {
            assert!(began.elapsed() < PATIENCE, "the daemon is not ready: {}", lab.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        lab
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        let output = Command::new(env!("CARGO_BIN_EXE_miosa"))
            .args(args)
            .env("MIOSA_STATE_DIR", self.dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ran { code: output.status.code().unwrap_or(-1), out: text(&output.stdout), err: text(&output.stderr) }
    }

    pub fn json(&self, args: &[&str]) -> Value {
        let ran = self.run(&[&["--json"], args].concat());
        assert_eq!(ran.code, 0, "{args:?}: {ran:?}\n{}", self.log());
        serde_json::from_str(&ran.out).unwrap()
    }

    /// A refusal, with its exit code; every one says what to do.
    pub fn error(&self, exit: i32, args: &[&str]) -> String {
        let ran = self.run(&[&["--json"], args].concat());
        assert_eq!((ran.code, ran.out.as_str()), (exit, ""), "{args:?}: {ran:?}");
        let document: Value = serde_json::from_str(&ran.err).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
        assert!(document["error"]["hint"].is_string(), "{ran:?}");
        document["error"]["message"].as_str().unwrap().to_owned()
    }

    /// A program in a sandbox: its output.
    pub fn exec(&self, sandbox: &str, command: &[&str]) -> String {
        let ran = self.run(&[&["sandbox", "exec", sandbox, "--"], command].concat());
        assert_eq!(ran.code, 0, "{command:?}: {ran:?}\n{}", self.log());
        ran.out
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Sandboxes that are there, and disks of the store.
    pub fn left(&self) -> (usize, u64) {
        let sandboxes = self.json(&["sandbox", "list"]).as_array().unwrap().len();
        (sandboxes, self.json(&["store", "stats"])["disks"].as_u64().unwrap())
    }

    pub fn snapshots(&self) -> u64 {
        self.json(&["store", "stats"])["snapshots"].as_u64().unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // An orderly end takes the machines with it.
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(self.daemon.id()).unwrap()),
            nix::sys::signal::Signal::SIGTERM,
        );
        let _ = self.daemon.wait();
    }
}

/// The guest's agent, a static program; found or built once.
fn agent() -> &'static Path {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(|| {
        if let Some(path) = std::env::var_os("MIOSA_AGENT") {
            return path.into();
        }
        let target = "x86_64-unknown-linux-gnu";
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--release", "-p", "miosa-agent", "--target", target])
            .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static")
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(status.success(), "the agent does not build");
        let dir = Path::new(env!("CARGO_BIN_EXE_miosa")).parent().unwrap();
        dir.parent().unwrap().join(target).join("release/miosa-agent")
    })
}
