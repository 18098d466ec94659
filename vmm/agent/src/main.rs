//! The guest's init: it is started by the kernel from the initramfs, mounts the root disk, stays as PID 1 and serves
//! the host. It must never end: when something fails it says so on the console and goes on.

mod boot;
mod connections;
mod guest;
mod network;
mod volumes;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use miosa_agent::server::Server;
use miosa_agent::wire;

/// How often to look whether a host has connected, and before there is a root.
const IDLE: Duration = Duration::from_millis(10);
const IDLE_WITHOUT_ROOT: Duration = Duration::from_millis(1);
/// How long to look for the host's port before saying so; the search goes on.
const PORT_PATIENCE: Duration = Duration::from_secs(10);

fn main() {
    if std::process::id() != 1 {
        eprintln!("miosa-agent {}: the init of miosa's guests; it only runs as PID 1", env!("CARGO_PKG_VERSION"));
        std::process::exit(2);
    }
    loop {
        // A panic is a bug, but it must not take the guest's kernel with it.
        if std::panic::catch_unwind(run).is_err() {
            log("the agent panicked; starting it again");
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn run() {
    static BOOTED: std::sync::Once = std::sync::Once::new();
    BOOTED.call_once(|| {
        if let Err(error) = boot::boot() {
            log(&format!("boot failed: {error}"));
            // The end of the console is what the host shows; without a root there is nothing to serve.
            guest::power_off();
        }
    });
    let system = Arc::new(guest::Guest::new());
    let reaper = system.clone();
    if let Err(error) = std::thread::Builder::new().name("agent-reap".into()).spawn(move || reaper.reap_forever()) {
        return log(&format!("cannot start a thread: {error}"));
    }
    loop {
        if let Err(error) = serve(&system) {
            log(&format!("serving the host failed: {error}"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn serve(system: &Arc<guest::Guest>) -> std::io::Result<()> {
    let path = find_port();
    let port = File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path)?;
    let server = Server::new(system.clone(), port.try_clone()?)?;
    server.serve(&port, || {
        // No host is connected; the port gives no way to wait for one without a signal. A guest without a root is waited
        // for as soon as there is one.
        std::thread::sleep(if boot::has_root() { IDLE } else { IDLE_WITHOUT_ROOT });
        false
    })
}

/// The device of the port with our name.
fn find_port() -> PathBuf {
    let (started, mut told) = (Instant::now(), false);
    loop {
        let ports = std::fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten();
        for port in ports {
            let name = std::fs::read_to_string(port.path().join("name")).unwrap_or_default();
            let device = PathBuf::from("/dev").join(port.file_name());
            if name.trim() == wire::PORT_NAME && device.exists() {
                return device;
            }
        }
        if !told && started.elapsed() > PORT_PATIENCE {
            log(&format!("no virtio-serial port named {}", wire::PORT_NAME));
            told = true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Says something on the console, through the kernel's log.
pub(crate) fn log(message: &str) {
    if let Ok(mut kmsg) = File::options().write(true).open("/dev/kmsg") {
        // Priority 3 (error) is shown on a quiet console too.
        let _ = kmsg.write_all(format!("<3>miosa-agent: {message}\n").as_bytes());
    } else {
        eprintln!("miosa-agent: {message}");
    }
}

/// A small file of the kernel's, without the trailing newline; empty when it cannot be read.
pub(crate) fn read_line(path: &str) -> String {
    let mut text = String::new();
    let _ = File::open(path).and_then(|file| file.take(64 * 1024).read_to_string(&mut text));
    text.trim().to_owned()
}
