//! Where things are (the state directory and what is in it, the cache, the agent), and the daemon's settings.

mod settings;

use std::path::{Path, PathBuf};

pub use settings::{
    AccelArg, Config, ConfigError, DiskFrontendArg, Flags, LogFormat, Mib, NetworkArg, PreviewListen, Span, Uids,
    VmmArg,
};

/// The state directory, unless told otherwise: the system's for root, the user's own for everybody else.
pub fn default_state_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return PathBuf::from("/var/lib/miosa");
    }
    user_dir("XDG_STATE_HOME", ".local/state").join("miosa")
}

/// Where downloads and built images are kept, unless told otherwise. It can be deleted at any time.
pub fn default_cache_dir() -> PathBuf {
    user_dir("XDG_CACHE_HOME", ".cache").join("miosa")
}

fn user_dir(variable: &str, under_home: &str) -> PathBuf {
    if let Some(dir) = std::env::var_os(variable).map(PathBuf::from).filter(|d| d.is_absolute()) {
        return dir;
    }
    std::env::home_dir().unwrap_or_else(|| PathBuf::from("/")).join(under_home)
}

/// What is where in a state directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
    socket: PathBuf,
}

impl StateDir {
    /// The layout under `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        // Machines look for their sockets by these paths, whatever directory the next daemon is started in.
        let root = std::path::absolute(&root).unwrap_or(root);
        Self { socket: root.join("miosa.sock"), root }
    }

    /// The same with the socket elsewhere.
    pub fn with_socket(self, socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), ..self }
    }

    /// The directory itself; nobody but its owner looks into it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// The keys that the TCP address takes, unless told otherwise.
    pub fn api_key(&self) -> PathBuf {
        self.root.join("api-key")
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// One directory a session: sockets and logs.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// Kernel and initramfs.
    pub fn boot(&self) -> PathBuf {
        self.root.join("boot")
    }

    /// Where disks are shown as files.
    pub fn fuse(&self) -> PathBuf {
        self.root.join("disks")
    }

    /// Sockets and the mount of disks that were attached on request.
    pub fn attached(&self) -> PathBuf {
        self.root.join("attached")
    }

    /// Copies of the whole store, each in a directory that is a state directory of its own.
    pub fn backups(&self) -> PathBuf {
        self.root.join("backups")
    }

    /// Held by the one daemon of this directory.
    pub fn lock(&self) -> PathBuf {
        self.root.join("daemon.lock")
    }
}

/// The guest's agent: told, or next to this program.
pub fn find_agent(told: Option<&Path>) -> Option<PathBuf> {
    match told {
        Some(path) => Some(path.to_owned()),
        None => {
            let beside = std::env::current_exe().ok()?.parent()?.join("miosa-agent");
            beside.is_file().then_some(beside)
        }
    }
}
