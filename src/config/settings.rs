//! The daemon's settings: defaults, then the configuration file, then environment and flags.
//!
//! A key of the file is a flag's name with underscores. [`Config`] is what results; its defaults are the only ones.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{StateDir, default_cache_dir, default_state_dir, user_dir};
use crate::units::{parse_duration, parse_size_mib};

/// The system's configuration file.
const SYSTEM_FILE: &str = "/etc/miosa/config.toml";

/// What the daemon goes by.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where everything is kept.
    pub state_dir: PathBuf,
    /// The Unix socket, if not in the state directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Ids of users, beside root and the daemon's own, that the Unix socket serves.
    pub socket_users: Vec<u32>,
    /// Ids of groups whose members it serves.
    pub socket_groups: Vec<u32>,
    /// A TCP address to listen on, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// Whether that may be another than this machine's own.
    pub listen_remote: bool,
    /// Keys that the TCP address takes, one a line; if not given one is made in the state directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
    /// TCP address that previews of sandboxes' ports are served on.
    pub preview_listen: PreviewListen,
    /// Connections served at once, each of the socket and the addresses.
    pub max_connections: usize,
    /// Downloads and built images.
    pub cache_dir: PathBuf,
    /// The guest's agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<PathBuf>,
    /// How disks are shown to machines.
    pub disk_frontend: DiskFrontendArg,
    /// How machines are accelerated.
    pub accel: AccelArg,
    /// Network of machines.
    pub network: NetworkArg,
    /// Memory of a sandbox that does not ask for any.
    pub default_memory: Mib,
    /// Processors of a sandbox that does not ask for any.
    pub default_cpus: u32,
    /// How long a session lasts that does not ask for an end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_timeout: Option<Span>,
    /// How long a machine may take to boot.
    pub boot_timeout: Span,
    /// How long a guest may take to shut down.
    pub stop_timeout: Span,
    /// Whether machines start from a kept state of one that had booted.
    pub warm_machines: bool,
    /// Machines that wait, held, for the next sandbox of a template.
    pub spare_machines: usize,
    /// Users that machines run as, each as one of its own, and tools that read images; where the daemon is root.
    pub machine_uids: Uids,
    /// Added to the guest kernel's command line.
    pub kernel_args: Vec<String>,
    /// Environment of every command in every sandbox, such as a proxy's address; a sandbox's own goes before it.
    pub guest_env: BTreeMap<String, String>,
    /// Files of this machine that every guest gets at the start of a session, by their paths in the guest.
    pub guest_files: BTreeMap<String, PathBuf>,
    /// Certificates (PEM) that guests trust besides their own, such as those of a proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<PathBuf>,
    /// Log that gathers until it is packed.
    pub log_budget: Mib,
    /// Log at which writers wait for packing.
    pub log_limit: Mib,
    /// Memory for what was read from the store.
    pub cache_memory: Mib,
    /// What the daemon tells: a level, or targets with levels.
    pub log_level: String,
    /// How.
    pub log_format: LogFormat,
    /// What runs machines.
    #[serde(skip_serializing_if = "is_qemu")]
    pub vmm: VmmArg,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: default_state_dir(),
            socket: None,
            socket_users: Vec::new(),
            socket_groups: Vec::new(),
            listen: None,
            listen_remote: false,
            api_key_file: None,
            preview_listen: PreviewListen::Auto,
            max_connections: 512,
            cache_dir: default_cache_dir(),
            agent: None,
            disk_frontend: DiskFrontendArg::VhostUser,
            accel: AccelArg::Auto,
            network: NetworkArg::User,
            default_memory: Mib(2_048),
            default_cpus: 1,
            default_timeout: None,
            boot_timeout: Span(Duration::from_secs(120)),
            stop_timeout: Span(Duration::from_secs(45)),
            warm_machines: true,
            spare_machines: 1,
            machine_uids: Uids(vmm::jail::Users::DEFAULT),
            kernel_args: Vec::new(),
            guest_env: BTreeMap::new(),
            guest_files: BTreeMap::new(),
            ca_bundle: None,
            log_budget: Mib(512),
            log_limit: Mib(2_048),
            cache_memory: Mib(256),
            log_level: "info".to_owned(),
            log_format: LogFormat::Text,
            vmm: VmmArg::Qemu,
        }
    }
}

fn is_qemu(vmm: &VmmArg) -> bool {
    *vmm == VmmArg::Qemu
}

/// The flags of `miosa daemon` that set what the file can set.
#[derive(Debug, Clone, Default, Args, Serialize)]
pub struct Flags {
    /// Listen on this Unix socket [default: miosa.sock in the state directory]
    #[arg(long, env = "MIOSA_SOCKET", value_name = "FILE")]
    pub socket: Option<PathBuf>,
    /// Let this user (a numeric id) use the Unix socket, beside root and the daemon's own
    #[arg(long = "socket-user", value_name = "UID")]
    pub socket_users: Option<Vec<u32>>,
    /// Let the members of this group (a numeric id) use the Unix socket
    #[arg(long = "socket-group", value_name = "GID")]
    pub socket_groups: Option<Vec<u32>>,
    /// Listen on this TCP address, too, such as 127.0.0.1:7070; callers need a key
    #[arg(long, env = "MIOSA_LISTEN", value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Let that be an address that other machines reach; keys and data go over it unencrypted
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub listen_remote: bool,
    /// A file of keys, one a line, readable by its owner only [default: made in the state directory]
    #[arg(long, env = "MIOSA_API_KEY_FILE", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Serve previews on this TCP address, or 'none' [default: 127.0.0.1:7080, or any port that is free]
    #[arg(long, env = "MIOSA_PREVIEW_LISTEN", value_name = "ADDRESS:PORT")]
    pub preview_listen: Option<PreviewListen>,
    /// Connections served at once [default: 512]
    #[arg(long, value_name = "N")]
    pub max_connections: Option<usize>,
    /// Where downloads and built images are kept [default: ~/.cache/miosa]
    #[arg(long, env = "MIOSA_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// The guest's agent, a static program [default: miosa-agent next to miosa]
    #[arg(long, env = "MIOSA_AGENT", value_name = "FILE")]
    pub agent: Option<PathBuf>,
    /// How disks are shown to machines [default: vhost-user]
    #[arg(long, value_enum)]
    pub disk_frontend: Option<DiskFrontendArg>,
    /// How machines are accelerated [default: auto]
    #[arg(long, value_enum, env = "MIOSA_ACCEL")]
    pub accel: Option<AccelArg>,
    /// Network of machines [default: user]
    #[arg(long, value_enum)]
    pub network: Option<NetworkArg>,
    /// Memory of a sandbox that does not ask for any [default: 2gb]
    #[arg(long, value_name = "SIZE")]
    pub default_memory: Option<Mib>,
    /// Processors of a sandbox that does not ask for any [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub default_cpus: Option<u32>,
    /// How long a session lasts that does not ask for an end [default: no limit]
    #[arg(long, value_name = "DURATION")]
    pub default_timeout: Option<Span>,
    /// How long a machine may take to boot [default: 2m]
    #[arg(long, value_name = "DURATION")]
    pub boot_timeout: Option<Span>,
    /// How long a guest may take to shut down before it is killed [default: 45s]
    #[arg(long, value_name = "DURATION")]
    pub stop_timeout: Option<Span>,
    /// Boot every machine; do not start them from a kept state of one that had booted
    #[arg(long = "no-warm-machines", num_args = 0, default_missing_value = "false")]
    pub warm_machines: Option<bool>,
    /// Machines that wait, held and with their memory, for the next sandbox of a template; 0: none [default: 1]
    #[arg(long, value_name = "COUNT")]
    pub spare_machines: Option<usize>,
    /// Users (FIRST-LAST, numeric ids that nobody has) that machines run as, if the daemon is root [default:
    /// 1900000000-1900065535]
    #[arg(long, value_name = "RANGE")]
    pub machine_uids: Option<Uids>,
    /// Added to the guest kernel's command line
    #[arg(long = "kernel-arg", value_name = "WORD")]
    pub kernel_args: Option<Vec<String>>,
    /// Certificates (PEM) that guests trust besides their own, such as those of a proxy
    #[arg(long, env = "MIOSA_CA_BUNDLE", value_name = "FILE")]
    pub ca_bundle: Option<PathBuf>,
    /// Log that gathers until it is packed [default: 512mb]
    #[arg(long, value_name = "SIZE")]
    pub log_budget: Option<Mib>,
    /// Log at which writers wait for packing [default: 2gb]
    #[arg(long, value_name = "SIZE")]
    pub log_limit: Option<Mib>,
    /// Memory for what was read from the store [default: 256mb]
    #[arg(long, value_name = "SIZE")]
    pub cache_memory: Option<Mib>,
    /// What is told on stderr: a level, or targets with levels such as miosa=debug,storage=info [default: info]
    #[arg(long, env = "MIOSA_LOG", value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// As text or as one JSON document a line [default: text]
    #[arg(long, value_enum, env = "MIOSA_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// For tests: `fake` runs no machine but a process that answers as a guest would
    #[arg(long, value_enum, hide = true)]
    pub vmm: Option<VmmArg>,
}

fn is_false(b: &bool) -> bool {
    !b
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    /// What is wrong, and where.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl ConfigError {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl Config {
    /// The file told, or the first of those looked for that is there; over it, the flags.
    pub fn load(told: Option<&Path>, state_dir: Option<PathBuf>, flags: &Flags) -> Result<Self, ConfigError> {
        let mut settings = match told.map(Path::to_owned).or_else(find_file) {
            Some(file) => read_file(&file)?,
            None => toml::Table::new(),
        };
        let flags = toml::Table::try_from(flags)
            .map_err(|e| ConfigError::new(format!("a flag has a value that no configuration can hold: {e}")))?;
        settings.extend(flags);
        let mut config: Self = settings.try_into().map_err(|e| ConfigError::new(e.to_string()))?;
        if let Some(dir) = state_dir {
            config.state_dir = dir;
        }
        config.make_absolute()?;
        config.check()?;
        Ok(config)
    }

    /// What is where.
    pub fn state(&self) -> StateDir {
        let state = StateDir::new(&self.state_dir);
        match &self.socket {
            Some(socket) => state.with_socket(socket),
            None => state,
        }
    }

    fn make_absolute(&mut self) -> Result<(), ConfigError> {
        let paths =
            [&mut self.socket, &mut self.api_key_file, &mut self.agent, &mut self.ca_bundle].into_iter().flatten();
        for path in paths.chain(self.guest_files.values_mut()).chain([&mut self.state_dir, &mut self.cache_dir]) {
            *path = std::path::absolute(&*path)
                .map_err(|e| ConfigError::new(format!("the path {} cannot be used: {e}", path.display())))?;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ConfigError> {
        let previews = match self.preview_listen {
            PreviewListen::At(address) => Some(address),
            PreviewListen::Auto | PreviewListen::None => None,
        };
        let remote = [self.listen, previews].into_iter().flatten().find(|address| !address.ip().is_loopback());
        if let Some(address) = remote
            && !self.listen_remote
        {
            return Err(ConfigError::new(format!("other machines reach {address}, and it is not encrypted"))
                .hint("listen on 127.0.0.1, behind a proxy that encrypts; or insist with listen_remote"));
        }
        if self.log_limit.0 < self.log_budget.0 {
            return Err(ConfigError::new("log_limit is below log_budget"));
        }
        if self.max_connections == 0 {
            return Err(ConfigError::new("max_connections is zero, so nobody could be served"));
        }
        if !(1..=64).contains(&self.default_cpus) {
            return Err(ConfigError::new(format!("default_cpus is 1 to 64, and not {}", self.default_cpus)));
        }
        if !(128..=1 << 20).contains(&self.default_memory.0) {
            return Err(ConfigError::new(format!(
                "default_memory is 128mb to 1048576mb, and not {}",
                self.default_memory
            )));
        }
        crate::engine::check_env(&self.guest_env).map_err(|e| ConfigError::new(format!("guest_env: {e}")))?;
        tracing_subscriber::EnvFilter::try_new(&self.log_level).map(drop).map_err(|e| {
            ConfigError::new(format!("log_level {:?} is none: {e}", self.log_level))
                .hint("info, debug, warn, error, or miosa=debug,storage=info")
        })
    }
}

/// The user's own file goes before the system's.
fn find_file() -> Option<PathBuf> {
    let own = user_dir("XDG_CONFIG_HOME", ".config").join("miosa/config.toml");
    [own, PathBuf::from(SYSTEM_FILE)].into_iter().find(|file| file.exists())
}

fn read_file(file: &Path) -> Result<toml::Table, ConfigError> {
    let at = |what: String| ConfigError::new(format!("configuration file {}: {what}", file.display()));
    let text = std::fs::read_to_string(file)
        .map_err(|e| at(e.to_string()).hint("name another: --config FILE (or none: --config /dev/null)"))?;
    // As a whole first: its errors name the line.
    if let Err(error) = toml::from_str::<Config>(&text) {
        let failed = at(error.to_string().trim_end().to_owned());
        return Err(match nearest(error.message()) {
            Some(known) => failed.hint(format!("did you mean {known}? See them all: miosa daemon --print-config")),
            None => failed.hint("see all settings: miosa daemon --print-config"),
        });
    }
    text.parse().map_err(|e: toml::de::Error| at(e.to_string()))
}

/// Of the keys that an "unknown field" lists, the one most like it.
fn nearest(message: &str) -> Option<&str> {
    let mut quoted = message.strip_prefix("unknown field ")?.split('`').skip(1).step_by(2);
    let unknown = quoted.next()?;
    let likeness = |known: &&str| (strsim::jaro(unknown, known) * 1_000.0) as u32;
    quoted.max_by_key(likeness).filter(|known| likeness(known) > 700)
}

/// A front end for disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFrontendArg {
    /// A virtio-blk back end, one socket a disk
    VhostUser,
    /// Files in a FUSE mount
    Fuse,
}

/// An accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccelArg {
    /// KVM where a guest boots with it, which is tried once, and else tcg
    Auto,
    /// QEMU's translator, which works everywhere
    Tcg,
    /// The kernel's virtualisation
    Kvm,
}

/// Where previews are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreviewListen {
    /// On the usual port of the loopback, or on any that is free.
    Auto,
    /// There.
    At(SocketAddr),
    /// Nowhere.
    None,
}

impl FromStr for PreviewListen {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            address => address.parse().map(Self::At).map_err(|_| {
                format!("{address:?} is no address for previews: such as 127.0.0.1:7080, or 'auto' or 'none'")
            }),
        }
    }
}

impl fmt::Display for PreviewListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::At(address) => write!(f, "{address}"),
            Self::None => f.write_str("none"),
        }
    }
}

/// A network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkArg {
    /// Outgoing connections through the daemon's user
    User,
    /// No network
    None,
}

/// What runs machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmArg {
    /// QEMU
    Qemu,
    /// A stand-in
    Fake,
}

/// How the daemon tells what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// A line for people
    Text,
    /// A JSON document a line
    Json,
}

/// A duration as it is written everywhere: `10m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

/// Users that machines run as: `200000-265535`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uids(pub vmm::jail::Users);

impl FromStr for Uids {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

impl fmt::Display for Uids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A size as it is written everywhere: `4gb`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mib(pub u64);

impl Mib {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0 << 20
    }
}

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        parse_duration(text).map(Span)
    }
}

impl FromStr for Mib {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        parse_size_mib(text).map(Mib)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            ms if ms % 1_000 != 0 => write!(f, "{ms}ms"),
            ms => write!(f, "{}s", ms / 1_000),
        }
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}mb", self.0)
    }
}

/// In the file, a string of the grammar or a bare number.
macro_rules! written {
    ($kind:ty, $what:literal) => {
        impl Serialize for $kind {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $kind {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Written;
                impl de::Visitor<'_> for Written {
                    type Value = $kind;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($what)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$kind, E> {
                        text.parse().map_err(E::custom)
                    }
                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$kind, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Written)
            }
        }
    };
}

written!(Span, "a duration, such as \"10m\"");
written!(Mib, "a size, such as \"4gb\"");
written!(Uids, "user ids, such as \"200000-265535\"");
written!(PreviewListen, "an address, such as \"127.0.0.1:7080\", \"auto\" or \"none\"");

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: Flags,
    }

    fn load(text: &str, line: &[&str]) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, text).unwrap();
        let flags = Line::parse_from(std::iter::once(&"miosa").chain(line)).flags;
        Config::load(Some(&file), None, &flags)
    }

    #[test]
    fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
        let text = "stop_timeout = '10s'\nboot_timeout = 90\ndefault_memory = '1gb'\nguest_env = { A = 'b' }\n";
        let config = load(text, &["--stop-timeout", "20s", "--default-cpus", "2"]).unwrap();
        assert_eq!(config.stop_timeout.0, Duration::from_secs(20));
        assert_eq!(config.boot_timeout.0, Duration::from_secs(90));
        assert_eq!((config.default_memory, config.default_cpus, config.cache_memory), (Mib(1_024), 2, Mib(256)));
        assert_eq!(config.guest_env["A"], "b");
        let warm = |text: &str, flags: &[&str]| load(text, flags).unwrap().warm_machines;
        assert!(warm("", &[]) && warm("warm_machines = true", &[]));
        assert!(!warm("warm_machines = false", &[]) && !warm("warm_machines = true", &["--no-warm-machines"]));
    }

    #[test]
    fn what_is_wrong_in_the_file_is_named() {
        for (text, message, hint) in [
            ("stop_timout = '10s'", "stop_timout", "stop_timeout"),
            ("zzz = 1", "zzz", "--print-config"),
            ("stop_timeout = '10 parsecs'", "line 1", "--print-config"),
            ("accel = 'warp'", "tcg", "--print-config"),
            ("a = = b", "line 1", "--print-config"),
            ("default_cpus = 0", "default_cpus", ""),
            ("default_memory = '1mb'", "default_memory", ""),
            ("log_budget = '4gb'", "log_limit", ""),
            ("log_level = 'a=b=c'", "log_level", "info"),
            ("listen = '0.0.0.0:80'", "0.0.0.0:80", "listen_remote"),
            ("preview_listen = '0.0.0.0:81'", "0.0.0.0:81", "listen_remote"),
            ("preview_listen = 7080", "127.0.0.1:7080", "--print-config"),
            ("machine_uids = '0-10'", "without root", "--print-config"),
            ("machine_uids = 1000", "FIRST-LAST", "--print-config"),
            ("guest_env = { 'A=B' = 'c' }", "guest_env", ""),
        ] {
            let error = load(text, &[]).expect_err(text);
            assert!(error.message.contains(message), "{text}: {error:?}");
            assert!(error.hint.as_deref().unwrap_or_default().contains(hint), "{text}: {error:?}");
        }
        assert!(load("listen = '0.0.0.0:80'\nlisten_remote = true", &[]).is_ok());
        assert!(load("listen = '[::1]:80'\npreview_listen = 'none'", &[]).is_ok());
        let absent = Config::load(Some(Path::new("/no/such/file")), None, &Flags::default()).unwrap_err();
        assert!(absent.message.contains("/no/such/file"));
    }

    #[test]
    fn what_is_printed_can_be_read_again() {
        let config = load("default_timeout = '90m'\nstop_timeout = '1500ms'\n", &[]).unwrap();
        let text = toml::to_string(&config).unwrap();
        let again = load(&text, &[]).unwrap();
        assert_eq!(toml::to_string(&again).unwrap(), text);
        assert!(text.contains("default_timeout = \"5400s\"") && text.contains("stop_timeout = \"1500ms\""), "{text}");
    }

    #[test]
    fn every_flag_is_a_key() {
        let keys = toml::Table::try_from(Config { vmm: VmmArg::Fake, ..Config::default() }).unwrap();
        for argument in Line::command().get_arguments() {
            let id = argument.get_id().as_str();
            // Keys that have no default are not printed.
            let unset = ["socket", "listen", "api_key_file", "agent", "default_timeout", "ca_bundle"];
            let known = keys.contains_key(id) || unset.contains(&id);
            assert!(known || ["help", "version"].contains(&id), "{id}");
        }
    }
}
