//! Who is let in: the Unix socket, the TCP address and its keys, and what a caller can do to the others.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{Daemon, miosa, run};

/// A daemon on a free port, its address, and a key.
fn start(more: &[&str]) -> (Daemon, String, String) {
    let args: Vec<_> = ["--listen", "127.0.0.1:0"].iter().chain(more).copied().collect();
    let d = Daemon::start_with(&args);
    let log = d.log();
    let at = log.find("127.0.0.1:").expect("the address in the log");
    let address = log[at..].split([' ', '"', '\n']).next().unwrap().to_owned();
    let key = std::fs::read_to_string(d.dir.path().join("api-key")).unwrap_or_default().trim().to_owned();
    (d, address, key)
}

fn ask(address: &str, headers: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET /api/v1/sandboxes HTTP/1.0\r\nhost: x\r\n{headers}\r\n").unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn the_tcp_address_takes_keys_only() {
    let (d, address, key) = start(&[]);
    assert!(key.len() > 40, "{key:?}");
    assert_eq!(std::fs::metadata(d.dir.path().join("api-key")).unwrap().mode() & 0o777, 0o600);
    for headers in [
        "",
        "authorization: Bearer \r\n",
        "authorization: Bearer wrong\r\n",
        "x-api-key: wrong\r\n",
        "authorization: Basic eA==\r\n",
    ] {
        let answer = ask(&address, headers);
        assert!(
            answer.starts_with("HTTP/1.0 401") && answer.contains("_key") && answer.contains("request_id"),
            "{answer}"
        );
        assert!(answer.to_lowercase().contains("www-authenticate: bearer"), "{answer}");
    }
    for headers in [format!("authorization: Bearer {key}\r\n"), format!("X-API-Key: {key}\r\n")] {
        assert!(ask(&address, &headers).starts_with("HTTP/1.0 200"));
    }
    assert!(!d.log().contains(&key), "the key is in the log");

    // The command line, from anywhere.
    let elsewhere = tempfile::tempdir().unwrap();
    let with = |key: &str, args: &[&str]| {
        let mut command = miosa(elsewhere.path(), args);
        command.env("MIOSA_ENDPOINT", format!("http://{address}")).env("MIOSA_API_KEY", key);
        run(command, b"")
    };
    assert_eq!(with(&key, &["sandbox", "create", "--name", "far", "--wait", "--json"]).json()["name"], "far");
    assert_eq!(with(&key, &["sandbox", "exec", "far", "--", "echo", "hi"]).out, "hi\n");
    assert!(with(&key, &["store", "stats", "--json"]).json()["disks"].as_u64().unwrap() > 0);
    assert_eq!(with("wrong", &["sandbox", "list", "--json"]).error(3)["code"], "invalid_api_key");
    assert_eq!(with("", &["sandbox", "list", "--json"]).error(3)["code"], "api_key_required");
    assert_eq!(with(&key, &["store", "repair", "--json"]).error(1)["code"], "not_here");
    let nobody = run(miosa(elsewhere.path(), &["--endpoint", "http://127.0.0.1:1", "sandbox", "list", "--json"]), b"");
    assert_eq!(nobody.error(2)["code"], "daemon_unreachable");
    let odd = run(miosa(elsewhere.path(), &["--endpoint", "https://x", "sandbox", "list", "--json"]), b"");
    assert_eq!(odd.error(1)["code"], "invalid_endpoint");
}

#[test]
fn another_address_than_this_machines_own_has_to_be_insisted_on() {
    let dir = tempfile::tempdir().unwrap();
    let refused = run(miosa(dir.path(), &["daemon", "--vmm", "fake", "--listen", "0.0.0.0:0", "--json"]), b"");
    assert_eq!(refused.error(1)["code"], "invalid_config");
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "0123456789abcdef\n").unwrap();
    let open =
        ["daemon", "--vmm", "fake", "--listen", "127.0.0.1:0", "--json", "--api-key-file", keys.to_str().unwrap()];
    let said = run(miosa(dir.path(), &open), b"");
    assert_eq!(said.code, 1);
    assert!(said.err.contains("chmod 600"), "{said:?}");
}

#[test]
fn a_daemon_that_can_open_no_more_files_says_so() {
    let d = Daemon::start();
    let limit = |nofile: &str| {
        let set =
            Command::new("prlimit").args(["--pid", &d.pid().to_string(), &format!("--nofile={nofile}:")]).status();
        assert!(set.expect("this test needs prlimit").success());
    };
    // Every number below the first free one is in use: again and again, because a connection from before may still be ending.
    let is_open = |fd: &u32| Path::new(&format!("/proc/{}/fd/{fd}", d.pid())).is_symlink();
    let began = Instant::now();
    while d.run(&["sandbox", "list"]).code == 0 {
        assert!(began.elapsed() < Duration::from_secs(180));
        limit(&(0..).find(|fd| !is_open(fd)).unwrap().to_string());
    }
    for _ in 0..3 {
        let refused = d.run(&["sandbox", "list", "--json"]).error(4);
        assert_eq!((&refused["code"], &refused["retryable"]), (&"too_many_open_files".into(), &true.into()));
        assert!(refused["hint"].as_str().unwrap().contains("LimitNOFILE"), "{refused}");
    }
    limit("1000");
    assert_eq!(d.run(&["sandbox", "list"]).code, 0);
}

#[test]
fn a_caller_cannot_keep_the_others_out() {
    let d = Daemon::start_with(&["--max-connections", "4"]);
    let socket = d.dir.path().join("miosa.sock");
    let mut idle: Vec<_> = (0..4).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    // The listener takes connections in order, so these four are in, unless one from before them was still ending.
    let began = Instant::now();
    let busy = loop {
        let ran = d.run(&["sandbox", "list", "--json"]);
        if ran.code != 0 {
            break ran.error(4);
        }
        assert!(began.elapsed() < Duration::from_secs(180), "{ran:?}");
        idle.push(UnixStream::connect(&socket).unwrap());
    };
    assert_eq!((&busy["code"], &busy["retryable"]), (&"too_many_connections".into(), &true.into()));
    drop(idle);
    let began = Instant::now();
    while d.run(&["sandbox", "list"]).code != 0 {
        assert!(began.elapsed() < Duration::from_secs(180));
        std::thread::sleep(Duration::from_millis(50));
    }
    // A head that is too large.
    let mut stream = UnixStream::connect(&socket).unwrap();
    let _ = stream.write_all(format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1 << 20)).as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(d.run(&["sandbox", "list"]).code, 0);
}

#[test]
fn the_configuration_file_is_read_and_what_is_wrong_in_it_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    let socket = dir.path().join("run").join("m.sock");
    std::fs::write(&file, format!("socket = {socket:?}\ndefault_memory = '512mb'\nguest_env = {{ FROM = 'file' }}\n"))
        .unwrap();
    let config = file.to_str().unwrap();
    let printed = run(miosa(dir.path(), &["daemon", "--config", config, "--default-cpus", "3", "--print-config"]), b"");
    for line in ["default_memory = \"512mb\"", "default_cpus = 3", "FROM = \"file\"", "stop_timeout = \"45s\""] {
        assert!(printed.out.contains(line), "{line}: {printed:?}");
    }
    let unit = run(miosa(dir.path(), &["daemon", "--config", config, "--print-systemd-unit"]), b"");
    assert!(unit.out.contains("Type=notify") && unit.out.contains(config), "{unit:?}");

    let d = Daemon::start_with_env(&[], &[("MIOSA_CONFIG", config)]);
    assert!(socket.exists());
    let made = d.run(&["sandbox", "create", "--name", "one", "--wait", "--json"]).json();
    assert_eq!(made["memory_mb"], 512);
    assert_eq!(d.run(&["sandbox", "exec", "one", "--", "printenv", "FROM"]).out, "file\n");

    std::fs::write(&file, "default_memry = '1gb'\n").unwrap();
    let error = run(miosa(dir.path(), &["--config", config, "sandbox", "list", "--json"]), b"").error(1);
    assert_eq!(error["code"], "invalid_config");
    assert!(error["message"].as_str().unwrap().contains("default_memry"), "{error}");
    assert!(error["hint"].as_str().unwrap().contains("default_memory"), "{error}");
}

#[test]
fn systemd_is_told_when_the_daemon_is_ready_and_when_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let notified = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    notified.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut d = Daemon::start_with_env(&[], &[("NOTIFY_SOCKET", path.to_str().unwrap())]);
    let next = || {
        let mut text = [0; 256];
        let n = notified.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..n]).into_owned()
    };
    assert!(next().contains("READY=1"));
    assert_eq!(d.end(nix::sys::signal::Signal::SIGTERM), Some(0));
    assert!(next().contains("STOPPING=1"));
}

#[test]
fn logs_can_be_json_and_hold_no_secrets() {
    let (mut d, address, key) = start(&["--log-format", "json", "--log-level", "debug"]);
    ask(&address, &format!("authorization: Bearer {key}\r\n"));
    d.run(&["sandbox", "create", "--name", "one", "--wait", "--env", "TOKEN=hush-hush-1"]);
    d.run(&["sandbox", "exec", "one", "--env", "PASSWORD=hush-hush-2", "--", "true"]);
    d.run_with(&["sandbox", "write-file", "one", "/f", "-"], b"hush-hush-3");
    d.run(&["sandbox", "snapshot", "one"]);
    d.run(&["sandbox", "show", "nobody"]);
    d.end(nix::sys::signal::Signal::SIGTERM);
    let (log, mut frozen) = (d.log(), 0);
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(line["level"].is_string() && line["timestamp"].is_string(), "{line}");
        // What goes on without its caller is told as part of the caller's request.
        if line.to_string().contains("the file system was frozen") {
            assert!(line.to_string().contains("req-"), "{line}");
            frozen += 1;
        }
    }
    assert_eq!(frozen, 1, "{log}");
    assert!(log.contains("req-"), "{log}");
    assert!(!log.contains("hush-hush") && !log.contains(&key), "{log}");
    // Nor are they kept, in the store or beside it: the key has its file, what a sandbox was made with is in its record.
    let (mut files, mut open) = (0, vec![d.dir.path().to_owned()]);
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() && entry.file_name() != "api-key" {
                let bytes = std::fs::read(entry.path()).unwrap();
                let holds = |secret: &str| bytes.windows(secret.len()).any(|w| w == secret.as_bytes());
                assert!(!holds("hush-hush-2") && !holds(&key), "{}", entry.path().display());
                files += 1;
            }
        }
    }
    assert!(files > 3, "{files}");
}

#[test]
fn callers_that_dawdle_are_hung_up_on() {
    let d = Daemon::start();
    let socket = d.dir.path().join("miosa.sock");
    // Nothing at all, half a head, and a head that never ends, a byte at a time.
    let mut silent = UnixStream::connect(&socket).unwrap();
    let mut half = UnixStream::connect(&socket).unwrap();
    half.write_all(b"GET /api/v1/sandboxes HTTP/1.1\r\nhost: x\r\n").unwrap();
    let mut dripping = UnixStream::connect(&socket).unwrap();
    dripping.write_all(b"GET / HTTP/1.1\r\nx: ").unwrap();
    let began = Instant::now();
    while dripping.write_all(b"y").is_ok() {
        assert!(began.elapsed() < Duration::from_secs(600), "it may go on for ever");
        std::thread::sleep(Duration::from_millis(200));
    }
    for stream in [&mut silent, &mut half] {
        stream.set_read_timeout(Some(Duration::from_secs(600))).unwrap();
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        assert!(ended.is_ok() || ended.unwrap_err().kind() != std::io::ErrorKind::WouldBlock);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(d.run(&["sandbox", "list"]).code, 0);
}

/// Sends all of a request, and only then reads the answer.
fn send_and_read(mut stream: impl Read + Write, headers: &str, length: usize) -> String {
    let path = "/api/v1/sandboxes/nobody/fs/write?path=/x";
    let kind = "content-type: application/octet-stream";
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\n{headers}{kind}\r\ncontent-length: {length}\r\n");
    stream.write_all(format!("{head}connection: close\r\n\r\n").as_bytes()).unwrap();
    stream.write_all(&vec![7; length]).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn who_still_sends_hears_why_it_was_refused() {
    let (d, address, key) = start(&[]);
    let socket = d.dir.path().join("miosa.sock");
    for length in [100, 300_000, 8 << 20] {
        let answer = send_and_read(UnixStream::connect(&socket).unwrap(), "", length);
        assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("sandbox_not_found"), "{length}: {answer}");
        let with_key = format!("authorization: Bearer {key}\r\n");
        let answer = send_and_read(TcpStream::connect(&address).unwrap(), &with_key, length);
        assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("sandbox_not_found"), "{length}: {answer}");
        let answer = send_and_read(TcpStream::connect(&address).unwrap(), "", length);
        assert!(answer.starts_with("HTTP/1.1 401"), "{length}: {answer}");
    }
    let large = d.dir.path().join("large");
    std::fs::write(&large, vec![7; 8 << 20]).unwrap();
    for _ in 0..20 {
        let refused = d.run(&["sandbox", "write-file", "nobody", "/x", large.to_str().unwrap(), "--json"]);
        assert_eq!(refused.error(1)["code"], "sandbox_not_found");
    }
    // One that sends for ever is hung up on.
    let mut endless = UnixStream::connect(&socket).unwrap();
    endless.write_all(b"POST /api/v1/sandboxes/nobody/fs/write?path=/x HTTP/1.1\r\nhost: x\r\n").unwrap();
    endless.write_all(b"content-type: application/octet-stream\r\ncontent-length: 99999999999999\r\n\r\n").unwrap();
    let began = Instant::now();
    while endless.write_all(&[7; 4096]).is_ok() {
        assert!(began.elapsed() < Duration::from_secs(600), "it may go on for ever");
    }
}

#[test]
fn the_socket_serves_no_user_that_was_not_named() {
    let place = tempfile::tempdir().unwrap();
    std::fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let socket = place.path().join("m.sock");
    let path = socket.to_str().unwrap().to_owned();
    let named = ["--socket-user", "54321", "--socket-group", "777"];
    let _d = Daemon::start_with_env(&named, &[("MIOSA_SOCKET", &path)]);
    let ask = |user: &str, group: &str| {
        let line = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); \
                    s.sendall(b'GET /api/v1/sandboxes HTTP/1.0\\r\\nhost: x\\r\\n\\r\\n'); print(s.recv(65536).decode())";
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid", user, "--regid", group, "--clear-groups", "/usr/bin/python3", "-c", line, &path]);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    // Only root can become others.
    assert!(ask("54321", "1").starts_with("HTTP/1.0 200"));
    assert!(ask("54322", "777").starts_with("HTTP/1.0 200"));
    for (user, group) in [("54322", "778"), ("1900000000", "1900000000")] {
        let answer = ask(user, group);
        assert!(answer.starts_with("HTTP/1.0 403") && answer.contains("permission_denied"), "{answer}");
    }
}
