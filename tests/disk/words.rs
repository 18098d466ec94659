//! Short words for what these tests do.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Daemon, Ran, miosa, run};

/// Where commands go: to a daemon, or to a state directory that nobody holds.
pub enum Place {
    Daemon(Box<Daemon>),
    Alone(TempDir),
}

impl Place {
    /// Both, for what has to be the same.
    pub fn both() -> [Place; 2] {
        [Place::Alone(tempfile::tempdir().unwrap()), Place::Daemon(Box::new(Daemon::start()))]
    }

    pub fn dir(&self) -> &Path {
        match self {
            Place::Daemon(d) => d.dir.path(),
            Place::Alone(d) => d.path(),
        }
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        run(miosa(self.dir(), args), b"")
    }

    /// The document of a command that succeeds.
    pub fn ok(&self, args: &[&str]) -> Value {
        let mut with_json = vec!["--json"];
        with_json.extend(args);
        self.run(&with_json).json()
    }

    /// The error of one that does not.
    pub fn refused(&self, args: &[&str], exit: i32, code: &str) -> Value {
        let mut with_json = vec!["--json"];
        with_json.extend(args);
        let error = self.run(&with_json).error(exit);
        assert_eq!(error["code"], code, "{args:?}: {error}");
        error
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Imports bytes under a name.
    pub fn import(&self, name: &str, bytes: &[u8]) -> Value {
        let file = self.file("to-import");
        std::fs::write(&file, bytes).unwrap();
        self.ok(&["disk", "import", text(&file), "--name", name])
    }

    pub fn export(&self, key: &str) -> Vec<u8> {
        let file = self.file("exported");
        self.ok(&["disk", "export", key, text(&file)]);
        std::fs::read(file).unwrap()
    }

    /// The names of all disks that are the user's own.
    pub fn names(&self) -> Vec<String> {
        let disks = self.ok(&["disk", "list"]);
        let own = disks.as_array().unwrap().iter().filter(|d| d["owner"].is_null());
        own.map(|d| d["name"].as_str().unwrap().to_owned()).collect()
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes that do not compress and are the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
