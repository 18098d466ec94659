//! Ports of a guest from outside. The guests are stand-ins whose agent is real: their loopback is this machine's.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::support::{Daemon, miosa};

/// A server that answers with all it was sent, once it was told that this is all. Ends with the test.
fn mirror() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut caller in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut all = Vec::new();
                caller.read_to_end(&mut all).unwrap();
                caller.write_all(&all).unwrap();
            });
        }
    });
    port
}

/// A port on which nothing listens.
fn nobody() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

struct Forward {
    child: Child,
    port: u16,
}

impl Forward {
    fn start(d: &Daemon, remote: u16) -> Forward {
        let remote = remote.to_string();
        let args = ["sandbox", "port-forward", "web", "--remote", &remote, "--local", "0", "--json"];
        let mut child = miosa(d.dir.path(), &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
        Forward { child, port: u16::try_from(said["port"].as_u64().unwrap()).unwrap() }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        stream
    }

    /// Ends it as Ctrl-C does; its exit code, and what it said on stderr.
    fn end(mut self) -> (Option<i32>, String) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, Signal::SIGINT).unwrap();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn many_connections_carry_bytes_both_ways_and_start_one_session() {
    let d = Daemon::start();
    let made = d.run(&["sandbox", "create", "--name", "web", "--no-start", "--json"]).json();
    assert_eq!(made["state"], "paused");
    let forward = Forward::start(&d, mirror());
    std::thread::scope(|scope| {
        for seed in 0..24_u8 {
            let forward = &forward;
            scope.spawn(move || {
                let sent: Vec<u8> = (0..(1 << 20) + usize::from(seed)).map(|i| (i * 7 % 251) as u8 ^ seed).collect();
                let mut stream = forward.connect();
                stream.write_all(&sent).unwrap();
                // The other direction stays open: the answer comes after this.
                stream.shutdown(Shutdown::Write).unwrap();
                let mut got = Vec::new();
                stream.read_to_end(&mut got).unwrap();
                assert!(got == sent, "{} bytes came back of {}", got.len(), sent.len());
            });
        }
    });
    assert_eq!(d.run(&["sandbox", "show", "web", "--json"]).json()["state"], "running");
    assert_eq!(d.log().matches("machine lost").count(), 0);
    assert_eq!(forward.end().0, Some(0));
}

#[test]
fn a_port_that_nobody_listens_on_is_told_and_ends_no_other_connection() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let port = nobody();
    let forward = Forward::start(&d, port);
    let mut got = Vec::new();
    // Closed, in whichever way, and without a byte.
    let _ = forward.connect().read_to_end(&mut got);
    assert!(got.is_empty());
    let (code, said) = forward.end();
    assert_eq!(code, Some(0));
    assert!(said.contains(&format!("port {port} of sandbox web does not answer")), "{said}");

    let (port, open) = (port.to_string(), mirror().to_string());
    let waited = d.run(&["sandbox", "wait", "web", "--port", &port, "--timeout", "1s", "--json"]);
    assert_eq!(waited.error(1)["code"], "wait_timeout");
    assert_eq!(d.run(&["sandbox", "wait", "web", "--port", &open, "--json"]).json()["name"], "web");
    d.run(&["sandbox", "stop", "web"]);
    assert_eq!(d.run(&["sandbox", "wait", "web", "--port", &open, "--json"]).error(1)["code"], "sandbox_not_running");
    let unknown = d.run(&["sandbox", "port-forward", "none", "--remote", "80", "--local", "0", "--json"]);
    assert_eq!(unknown.error(1)["code"], "sandbox_not_found");
}

#[test]
fn connections_end_with_their_session() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let forward = Forward::start(&d, mirror());
    let mut stream = forward.connect();
    stream.write_all(b"never answered").unwrap();
    // The connection is there once the port's own side of it is: a second one is served meanwhile.
    let mut other = forward.connect();
    other.write_all(b"x").unwrap();
    other.shutdown(Shutdown::Write).unwrap();
    let mut echo = Vec::new();
    other.read_to_end(&mut echo).unwrap();
    assert_eq!(echo, b"x");
    assert_eq!(d.run(&["sandbox", "stop", "web", "--json"]).json()["state"], "paused");
    let mut got = Vec::new();
    let _ = stream.read_to_end(&mut got);
    assert!(got.is_empty());
    assert_eq!(forward.end().0, Some(0));
}
