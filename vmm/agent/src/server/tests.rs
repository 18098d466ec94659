use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::wire::{ExecRequest, ExitStatus};

/// A guest whose root is a directory.
struct Directory {
    root: tempfile::TempDir,
    children: Children,
    frozen: AtomicBool,
    rooted: AtomicBool,
    /// What was done to get a root or an identity, in that order.
    steps: Mutex<Vec<String>>,
}

impl System for Directory {
    fn path(&self, path: &str) -> Result<PathBuf, AgentError> {
        let inside = path.strip_prefix('/').ok_or_else(|| AgentError::new(ErrorKind::Invalid, "not absolute"))?;
        Ok(self.root.path().join(inside))
    }
    fn children(&self) -> &Children {
        &self.children
    }
    fn info(&self) -> GuestInfo {
        GuestInfo { agent_version: "test".into(), kernel: "test".into(), uptime_ms: 0 }
    }
    fn has_root(&self) -> bool {
        self.rooted.load(Ordering::SeqCst)
    }
    fn mount_root(&self, root: &Root) -> Result<(), AgentError> {
        self.steps.lock().push(format!("root {}", root.disk));
        if root.disk == "/dev/none" {
            return Err(AgentError::new(ErrorKind::NotFound, "no disk"));
        }
        self.rooted.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn mount(&self, _: &wire::Mount) -> Result<(), AgentError> {
        Ok(())
    }
    fn freeze(&self) -> Result<(), AgentError> {
        self.frozen.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn thaw(&self) -> Result<(), AgentError> {
        self.frozen.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn set_clock(&self, unix_nanos: u64) -> Result<(), AgentError> {
        self.steps.lock().push(format!("clock {unix_nanos}"));
        Ok(())
    }
    fn set_hostname(&self, _: &str) -> Result<(), AgentError> {
        Ok(())
    }
    fn set_mac(&self, mac: [u8; 6]) -> Result<(), AgentError> {
        self.steps.lock().push(format!("mac {mac:?}"));
        Ok(())
    }
    fn end_connections(&self) {
        let id = std::fs::read_to_string(self.root.path().join("etc/machine-id")).unwrap();
        self.steps.lock().push(format!("woken as {}", &id[..1]));
    }
    fn add_entropy(&self, bytes: &[u8]) -> Result<(), AgentError> {
        self.steps.lock().push(format!("entropy {bytes:?}"));
        Ok(())
    }
    fn sync(&self) {}
    fn shutdown(&self, _: Duration) -> Result<(), AgentError> {
        Ok(())
    }
    fn power_off(&self) {}
    fn log(&self, _: &str) {}
}

/// A host that speaks in frames.
struct Host {
    pipe: UnixStream,
    decoder: Decoder,
    system: Arc<Directory>,
}

impl Host {
    fn new() -> Host {
        Host::with_root(true)
    }

    fn with_root(rooted: bool) -> Host {
        let (host, guest) = UnixStream::pair().unwrap();
        host.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let root = tempfile::tempdir().unwrap();
        let system = Arc::new(Directory {
            root,
            children: Children::of_process(),
            frozen: AtomicBool::new(false),
            rooted: AtomicBool::new(rooted),
            steps: Mutex::default(),
        });
        let server = Server::new(system.clone(), guest.try_clone().unwrap()).unwrap();
        std::thread::spawn(move || server.serve(guest, || true));
        let mut host = Host { pipe: host, decoder: Decoder::host([0; 16]), system };
        host.greet(1);
        host
    }

    fn greet(&mut self, nonce: u8) {
        self.decoder = Decoder::host([nonce; 16]);
        self.pipe.write_all(&wire::greeting([nonce; 16])).unwrap();
        assert_eq!(self.next().kind, Kind::HelloAck);
    }

    fn send(&mut self, frame: Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.pipe.write_all(&bytes).unwrap();
    }

    fn open(&mut self, stream: u32, request: &Request) {
        self.send(Frame::with(stream, Kind::Open, request).unwrap());
    }

    fn next(&mut self) -> Frame {
        let mut bytes = [0; 65536];
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return frame;
            }
            let len = self.pipe.read(&mut bytes).unwrap();
            assert!(len > 0, "the guest hung up");
            self.decoder.push(&bytes[..len]);
        }
    }

    /// The outcome of a stream, and what was sent on it and on others before.
    fn end_of(&mut self, stream: u32) -> (Outcome, Vec<Frame>) {
        let mut before = Vec::new();
        loop {
            match self.next() {
                frame if frame.kind == Kind::End && frame.stream == stream => return (frame.parse().unwrap(), before),
                frame => before.push(frame),
            }
        }
    }
}

fn sh(script: &str, stdin: bool) -> Request {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    Request::Exec(ExecRequest { argv, stdin, ..Default::default() })
}

fn exit(code: i32) -> Outcome {
    Ok(Reply::Exit(ExitStatus { code: Some(code), signal: None, timed_out: false }))
}

#[test]
fn a_stream_without_credit_stands_still_alone() {
    let mut host = Host::new();
    host.open(1, &sh("head -c 10000000 /dev/zero", false));
    host.open(2, &sh("exit 5", false));
    let (outcome, before) = host.end_of(2);
    assert_eq!(outcome, exit(5));
    // A third one after the first has used up its credit.
    let mut received: usize = before.iter().filter(|frame| frame.stream == 1).map(|frame| frame.payload.len()).sum();
    while received < wire::WINDOW as usize - 256 {
        received += host.next().payload.len();
    }
    host.open(3, &Request::Ping);
    let (_, before) = host.end_of(3);
    received += before.iter().map(|frame| frame.payload.len()).sum::<usize>();
    assert!(received <= wire::WINDOW as usize, "{received} bytes were sent without credit");
    host.send(Frame::new(1, Kind::Cancel, vec![]));
    let (outcome, _) = host.end_of(1);
    assert!(matches!(outcome, Ok(Reply::Exit(status)) if status.signal == Some(9) || status.signal == Some(13)));
}

#[test]
fn a_host_that_sends_without_credit_loses_the_stream_only() {
    let mut host = Host::new();
    host.open(1, &sh("exec sleep 1000", true));
    for _ in 0..10 {
        host.send(Frame::new(1, Kind::Data, vec![0; wire::MAX_PAYLOAD]));
    }
    assert!(matches!(host.end_of(1).0, Ok(Reply::Exit(status)) if status.signal == Some(9)));
    host.open(2, &Request::Ping);
    assert!(host.end_of(2).0.is_ok());
}

#[test]
fn a_guest_without_a_root_takes_one_and_nothing_else() {
    let mut host = Host::with_root(false);
    for request in [Request::Ping, Request::Sync, Request::Shutdown { grace_ms: 0 }, Request::Commands] {
        host.open(1, &request);
        let error = host.end_of(1).0.unwrap_err();
        assert!(error.kind == ErrorKind::Invalid && error.message.contains("no root"), "{request:?}: {error:?}");
    }
    let root = |disk: &str, hostname: &str| {
        let (disk, hostname) = (disk.to_owned(), hostname.to_owned());
        Request::MountRoot(Root { disk, hostname, network: false, entropy: vec![7], unix_nanos: 5 })
    };
    host.open(1, &root("/dev/vda", "no name"));
    assert_eq!(host.end_of(1).0.unwrap_err().kind, ErrorKind::Invalid);
    host.open(1, &root("/dev/none", "box"));
    assert_eq!(host.end_of(1).0.unwrap_err().kind, ErrorKind::NotFound);
    assert!(host.system.steps.lock().drain(..).eq(["entropy [7]", "clock 5", "root /dev/none"]));
    host.open(1, &Request::Ping);
    assert!(host.end_of(1).0.is_err(), "it has none still");
    host.open(1, &root("/dev/vda", "box"));
    assert_eq!(host.end_of(1).0, Ok(Reply::Done));
    host.open(1, &Request::Ping);
    assert!(host.end_of(1).0.is_ok());
}

#[test]
fn nonsense_is_answered_or_ignored() {
    let mut host = Host::new();
    host.send(Frame::new(1, Kind::Open, vec![255; 40]));
    assert_eq!(host.end_of(1).0.unwrap_err().kind, ErrorKind::Invalid);
    host.send(Frame::new(77, Kind::Data, vec![1]));
    host.send(Frame::new(77, Kind::Window, vec![1, 2, 3]));
    host.send(Frame::new(77, Kind::End, vec![]));
    host.send(Frame::new(77, Kind::Cancel, vec![]));
    for stream in 2..2 + wire::MAX_STREAMS as u32 {
        host.open(stream, &Request::WriteFile { path: format!("/f{stream}"), mode: None, owner: None });
    }
    host.open(1000, &Request::Ping);
    assert_eq!(host.end_of(1000).0.unwrap_err().kind, ErrorKind::Busy);
    host.send(Frame::new(2, Kind::Eof, vec![]));
    assert_eq!(host.end_of(2).0, Ok(Reply::Done));
    host.open(1001, &Request::Ping);
    assert!(host.end_of(1001).0.is_ok());
}

#[test]
fn a_greeting_ends_what_was_before_and_thaws() {
    let mut host = Host::new();
    host.open(1, &Request::Freeze { auto_thaw_ms: 60_000 });
    assert_eq!(host.end_of(1).0, Ok(Reply::Done));
    assert!(host.system.frozen.load(Ordering::SeqCst));
    host.open(2, &sh("yes", false));
    host.open(3, &Request::WriteFile { path: "/half".into(), mode: None, owner: None });
    host.send(Frame::new(3, Kind::Data, vec![1; 1000]));
    let mut cut = Vec::new();
    Frame::new(3, Kind::Data, vec![2; 60_000]).encode(&mut cut);
    host.pipe.write_all(&cut[..30_000]).unwrap();
    host.greet(2);
    assert!(!host.system.frozen.load(Ordering::SeqCst));
    // The same numbers, new streams; nothing of the old ones comes.
    host.open(3, &sh("exit 4", false));
    let (outcome, before) = host.end_of(3);
    assert_eq!((outcome, before), (exit(4), vec![]));
    assert!(!host.system.root.path().join("half").exists());
}

#[test]
fn a_freeze_ends_by_itself() {
    let mut host = Host::new();
    host.open(1, &Request::Freeze { auto_thaw_ms: 1 });
    assert_eq!(host.end_of(1).0, Ok(Reply::Done));
    while host.system.frozen.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    host.open(2, &Request::Thaw);
    assert_eq!(host.end_of(2).0, Ok(Reply::Thawed { was_frozen: false }));
    host.open(3, &Request::Freeze { auto_thaw_ms: 0 });
    assert_eq!(host.end_of(3).0.unwrap_err().kind, ErrorKind::Invalid);
}

/// Sends data on a stream as credit comes, and returns its outcome.
fn upload(host: &mut Host, stream: u32, bytes: &[u8]) -> Outcome {
    let mut credit = wire::WINDOW;
    let mut rest = bytes;
    while !rest.is_empty() {
        match wire::sendable(credit, rest.len()) {
            0 => match host.next() {
                frame if frame.kind == Kind::Window => credit += frame.credit().unwrap(),
                frame if frame.kind == Kind::End => return frame.parse().unwrap(),
                frame => panic!("{frame:?}"),
            },
            len => {
                credit -= wire::cost(len);
                host.send(Frame::new(stream, Kind::Data, rest[..len].to_vec()));
                rest = &rest[len..];
            }
        }
    }
    host.send(Frame::new(stream, Kind::Eof, vec![]));
    host.end_of(stream).0
}

/// All data of a stream, with credit given back as it comes.
fn download(host: &mut Host, stream: u32) -> (Outcome, Vec<u8>) {
    let mut bytes = Vec::new();
    loop {
        let frame = host.next();
        match frame.kind {
            Kind::End => return (frame.parse().unwrap(), bytes),
            Kind::Data => {
                bytes.extend_from_slice(&frame.payload);
                host.send(Frame::window(stream, wire::cost(frame.payload.len())));
            }
            _ => panic!("{frame:?}"),
        }
    }
}

#[test]
fn a_tree_goes_in_and_comes_out_as_it_was() {
    let mut host = Host::new();
    let root = host.system.root.path().to_path_buf();
    let source = tempfile::tempdir().unwrap();
    let long = "long-name-".repeat(20);
    std::fs::create_dir_all(source.path().join("a/b")).unwrap();
    std::fs::write(source.path().join("a/b/large"), vec![7; 3_000_000]).unwrap();
    std::fs::write(source.path().join(&long), b"x").unwrap();
    std::os::unix::fs::symlink("a/b", source.path().join("link")).unwrap();
    std::os::unix::fs::symlink("/nowhere", source.path().join("dangling")).unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    builder.follow_symlinks(false);
    builder.append_dir_all(".", source.path()).unwrap();
    let archive = builder.into_inner().unwrap();

    // What was there stays, but with `delete`.
    std::fs::create_dir_all(root.join("work/old/deep")).unwrap();
    std::fs::write(root.join("work/old/deep/file"), b"old").unwrap();
    host.open(1, &Request::WriteTree { path: "/work".into(), delete: false });
    let Ok(Reply::Tree(summary)) = upload(&mut host, 1, &archive) else { panic!("not unpacked") };
    assert_eq!((summary.files, summary.bytes, summary.removed), (2, 3_000_001, 0));
    assert!(root.join("work/old/deep/file").exists());
    host.open(2, &Request::WriteTree { path: "/work".into(), delete: true });
    let Ok(Reply::Tree(summary)) = upload(&mut host, 2, &archive) else { panic!("not unpacked") };
    assert_eq!(summary.removed, 1);
    assert!(!root.join("work/old").exists());
    assert_eq!(std::fs::read(root.join("work/a/b/large")).unwrap(), vec![7; 3_000_000]);
    assert_eq!(std::fs::read_link(root.join("work/dangling")).unwrap().to_str(), Some("/nowhere"));

    host.open(3, &Request::ReadTree { path: "/work".into() });
    let (outcome, back) = download(&mut host, 3);
    assert_eq!(outcome, Ok(Reply::Done));
    let copy = tempfile::tempdir().unwrap();
    tar::Archive::new(&back[..]).unpack(copy.path()).unwrap();
    assert_eq!(std::fs::read(copy.path().join("a/b/large")).unwrap(), vec![7; 3_000_000]);
    assert_eq!(std::fs::read(copy.path().join(&long)).unwrap(), b"x");
    assert_eq!(std::fs::read_link(copy.path().join("link")).unwrap().to_str(), Some("a/b"));

    // Nothing is removed for an archive that breaks off, and nothing is written outside.
    host.open(4, &Request::WriteTree { path: "/work".into(), delete: true });
    host.send(Frame::new(4, Kind::Data, archive[..1024].to_vec()));
    host.send(Frame::new(4, Kind::Cancel, vec![]));
    assert!(host.end_of(4).0.is_err());
    assert!(root.join("work").join(&long).exists());
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.as_gnu_mut().unwrap().name[..9].copy_from_slice(b"../escape");
    header.set_cksum();
    builder.append(&header, &b"x"[..]).unwrap();
    let escape = builder.into_inner().unwrap();
    host.open(5, &Request::WriteTree { path: "/work".into(), delete: false });
    assert_eq!(upload(&mut host, 5, &escape).unwrap_err().kind, ErrorKind::Invalid);
    assert!(!root.join("escape").exists());
    host.open(6, &Request::WriteTree { path: "/work".into(), delete: false });
    assert!(upload(&mut host, 6, &[0x55; 4_096]).is_err());
    host.open(7, &Request::ReadTree { path: "/work/dangling".into() });
    assert_eq!(host.end_of(7).0.unwrap_err().kind, ErrorKind::NotFound);
    host.open(8, &Request::ReadTree { path: format!("/work/{long}") });
    assert_eq!(host.end_of(8).0.unwrap_err().kind, ErrorKind::NotDirectory);
}

#[test]
fn files_are_listed_made_renamed_removed_and_read_in_part() {
    let mut host = Host::new();
    let root = host.system.root.path().to_path_buf();
    let mut next = 0;
    let mut call = |host: &mut Host, request: Request| {
        next += 1;
        host.open(next, &request);
        host.end_of(next)
    };
    let kind = |outcome: Outcome| outcome.unwrap_err().kind;
    assert_eq!(call(&mut host, Request::MakeDir { path: "/d/e".into(), mode: Some(0o700) }).0, Ok(Reply::Done));
    assert_eq!(call(&mut host, Request::MakeDir { path: "/d/e".into(), mode: None }).0, Ok(Reply::Done));
    std::fs::write(root.join("d/e/f"), b"0123456789").unwrap();
    assert_eq!(
        kind(call(&mut host, Request::MakeDir { path: "/d/e/f".into(), mode: None }).0),
        ErrorKind::NotDirectory
    );
    for (offset, len, expected) in [(0, None, "0123456789"), (3, Some(4), "3456"), (8, Some(99), "89"), (99, None, "")]
    {
        let (outcome, data) = call(&mut host, Request::ReadFile { path: "/d/e/f".into(), offset, len });
        assert_eq!(outcome, Ok(Reply::Done));
        assert_eq!(data.iter().flat_map(|f| f.payload.to_vec()).collect::<Vec<_>>(), expected.as_bytes());
    }
    assert_eq!(call(&mut host, Request::Rename { from: "/d/e/f".into(), to: "/d/new/g".into() }).0, Ok(Reply::Done));
    assert!(root.join("d/new/g").exists());
    assert_eq!(kind(call(&mut host, Request::Rename { from: "/none".into(), to: "/x".into() }).0), ErrorKind::NotFound);
    std::os::unix::fs::symlink("new", root.join("d/z")).unwrap();
    let (outcome, data) = call(&mut host, Request::List { path: "/d".into() });
    assert_eq!(outcome, Ok(Reply::Done));
    let mut bytes: &[u8] = &data[0].payload;
    let mut seen = Vec::new();
    while let Some((len, rest)) = bytes.split_first_chunk::<4>() {
        let (entry, rest) = rest.split_at(u32::from_le_bytes(*len) as usize);
        let entry: wire::DirEntry = postcard::from_bytes(entry).unwrap();
        seen.push((entry.name, entry.stat.kind));
        bytes = rest;
    }
    use wire::FileKind::{Directory, Symlink};
    let expected = [("e", Directory), ("new", Directory), ("z", Symlink)].map(|(n, k)| (n.to_owned(), k));
    assert_eq!(seen, expected);
    assert_eq!(kind(call(&mut host, Request::List { path: "/none".into() }).0), ErrorKind::NotFound);
    let remove = |path: &str, recursive| Request::Remove { path: path.into(), recursive };
    assert!(call(&mut host, remove("/d/new", false)).0.is_err(), "it is not empty");
    assert_eq!(call(&mut host, remove("/d/z", true)).0, Ok(Reply::Done));
    assert!(root.join("d/new/g").exists(), "the link went and not what it points to");
    assert_eq!(call(&mut host, remove("/d", true)).0, Ok(Reply::Done));
    assert_eq!(kind(call(&mut host, remove("/d", true)).0), ErrorKind::NotFound);
}

#[test]
fn a_copy_of_a_disk_becomes_a_sandbox_of_its_own_once() {
    let mut host = Host::new();
    let root = host.system.root.path().to_path_buf();
    let write = |path: &str, text: &str| {
        std::fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
        std::fs::write(root.join(path), text).unwrap();
    };
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    write("etc/machine-id", &format!("{}\n", "1".repeat(32)));
    write("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 parent\n");
    write("etc/ssh/ssh_host_rsa_key", "secret");
    write("etc/ssh/ssh_host_rsa_key.pub", "public");
    write("etc/ssh/sshd_config", "");
    write("usr/sbin/sshd", "");
    write("var/lib/systemd/random-seed", "seed");
    let identity = |id: &str| wire::Identity {
        machine_id: id.repeat(32),
        hostname: "child".into(),
        entropy: vec![1, 2],
        unix_nanos: 1,
        mac: None,
        woken: false,
    };
    let found = |fresh, host_keys_missing| Ok(Reply::Identified { fresh, host_keys_missing });
    host.open(1, &Request::Identify(identity("2")));
    assert_eq!(host.end_of(1).0, found(true, true));
    assert_eq!(read("etc/machine-id"), format!("{}\n", "2".repeat(32)));
    assert_eq!(
        (read("etc/hostname"), read("etc/hosts")),
        ("child\n".into(), "127.0.0.1 localhost\n127.0.1.1 child\n".into())
    );
    assert!(!root.join("etc/ssh/ssh_host_rsa_key").exists() && !root.join("etc/ssh/ssh_host_rsa_key.pub").exists());
    assert!(root.join("etc/ssh/sshd_config").exists() && !root.join("var/lib/systemd/random-seed").exists());
    // The same again is a resume: what the guest has made since stays.
    write("etc/ssh/ssh_host_ed25519_key", "own");
    write("etc/hostname", "its own choice\n");
    host.open(2, &Request::Identify(identity("2")));
    assert_eq!(host.end_of(2).0, found(false, false));
    assert_eq!(read("etc/hostname"), "its own choice\n");
    assert!(root.join("etc/ssh/ssh_host_ed25519_key").exists());
    assert!(host.system.steps.lock().drain(..).eq(["clock 1", "entropy [1, 2]"].repeat(2)));
    host.open(3, &Request::Identify(wire::Identity { machine_id: "x".into(), ..identity("2") }));
    assert_eq!(host.end_of(3).0.unwrap_err().kind, ErrorKind::Invalid);
    host.open(4, &Request::Identify(wire::Identity { hostname: "a b".into(), ..identity("2") }));
    assert_eq!(host.end_of(4).0.unwrap_err().kind, ErrorKind::Invalid);
    // One that was woken as another's copy is itself before its programs connect anew.
    let woken = wire::Identity { mac: Some([2, 0, 0, 0, 0, 9]), woken: true, ..identity("3") };
    host.open(5, &Request::Identify(woken));
    assert_eq!(host.end_of(5).0, found(true, true));
    let steps = ["clock 1", "entropy [1, 2]", "mac [2, 0, 0, 0, 0, 9]", "woken as 3"];
    assert!(host.system.steps.lock().drain(..).eq(steps));
}

#[test]
fn a_command_outlives_its_host_and_its_output_is_found_again() {
    let mut host = Host::new();
    let exec =
        |script: &str| ExecRequest { argv: ["sh", "-c", script].map(str::to_owned).to_vec(), ..Default::default() };
    let start = |id: &str, script: &str| Request::Start { id: id.into(), name: None, exec: exec(script) };
    let status = |outcome: Outcome| match outcome {
        Ok(Reply::Command(status)) => status,
        other => panic!("{other:?}"),
    };
    let gate = host.system.root.path().join("gate");
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
    host.open(1, &start("a", "echo out; echo err >&2; read line < gate; echo $line; exit 3"));
    let begun = status(host.end_of(1).0);
    assert!(begun.ended.is_none() && begun.pid > 0);
    host.open(2, &start("a", "true"));
    assert_eq!(host.end_of(2).0.unwrap_err().kind, ErrorKind::Invalid);
    host.open(
        3,
        &Request::Start {
            id: "b".into(),
            name: None,
            exec: ExecRequest { argv: vec!["/none".into()], ..Default::default() },
        },
    );
    assert_eq!(host.end_of(3).0.unwrap_err().kind, ErrorKind::NotFound);

    // Another host: the program is still there, and can be followed to its end.
    host.greet(2);
    host.open(1, &Request::CommandLogs { id: "a".into(), follow: true });
    std::thread::spawn(move || std::fs::write(gate, "go on\n"));
    let (outcome, before) = host.end_of(1);
    let ended = status(outcome);
    assert_eq!(ended.ended.unwrap().1.code, Some(3));
    let text =
        |kind| -> Vec<u8> { before.iter().filter(|f| f.kind == kind).flat_map(|f| f.payload.to_vec()).collect() };
    assert_eq!((text(Kind::Data), text(Kind::ErrData)), (b"out\ngo on\n".to_vec(), b"err\n".to_vec()));
    assert_eq!(ended.output_bytes, 14);

    // One that minds no SIGTERM is killed, and one that is gone takes no harm.
    host.open(2, &start("c", "trap '' TERM; echo up; while :; do sleep 1; done"));
    status(host.end_of(2).0);
    host.open(3, &Request::KillCommand { id: "c".into(), signal: None });
    assert!(status(host.end_of(3).0).ended.is_some());
    host.open(4, &Request::KillCommand { id: "a".into(), signal: Some(9) });
    assert_eq!(status(host.end_of(4).0).ended, ended.ended);
    host.open(5, &Request::KillCommand { id: "none".into(), signal: None });
    assert_eq!(host.end_of(5).0.unwrap_err().kind, ErrorKind::NotFound);
    host.open(6, &Request::Commands);
    let Ok(Reply::Commands(all)) = host.end_of(6).0 else { panic!() };
    assert_eq!(all.iter().map(|c| c.id.as_str()).collect::<Vec<_>>(), ["a", "c"]);
}

#[test]
fn a_program_on_a_terminal_has_a_size_signals_and_an_end_key() {
    let mut host = Host::new();
    let tty = Some(wire::TerminalSize { rows: 31, cols: 97 });
    let script = "stty size; test -t 2 && echo tty; trap 'stty size; echo hup' WINCH; trap 'echo int' INT; \
                  echo go; while [ \"$line\" != end ]; do line=; read line && echo got $line; done; echo over; cat; exit 6";
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    host.open(1, &Request::Exec(ExecRequest { argv, stdin: true, tty, ..Default::default() }));
    let mut seen = String::new();
    let mut until = |host: &mut Host, what: &str| {
        while !seen.contains(what) {
            let frame = host.next();
            assert_eq!(frame.kind, Kind::Data, "{seen}");
            seen.push_str(&String::from_utf8_lossy(&frame.payload));
        }
        seen.clone()
    };
    assert!(until(&mut host, "go\r\n").starts_with("31 97\r\ntty\r\n"));
    host.send(Frame::new(1, Kind::Data, &b"one\n"[..]));
    until(&mut host, "got one");
    host.send(Frame::with(1, Kind::Resize, &wire::TerminalSize { rows: 5, cols: 6 }).unwrap());
    host.send(Frame::new(1, Kind::Data, &b"two\n"[..]));
    // What is typed may be shown in between.
    assert!(until(&mut host, "hup").contains("5 6\r\n"));
    host.send(Frame::with(1, Kind::Signal, &libc::SIGINT).unwrap());
    host.send(Frame::new(1, Kind::Data, &b"three\n"[..]));
    until(&mut host, "int");
    // The key takes what was not read away: of a line that is half read the other half would be missing.
    until(&mut host, "got three");
    // The interrupt key, as the terminal has it.
    host.send(Frame::new(1, Kind::Data, &b"\x03"[..]));
    until(&mut host, "^C");
    host.send(Frame::new(1, Kind::Data, &b"end\n"[..]));
    until(&mut host, "over");
    host.send(Frame::new(1, Kind::Eof, Bytes::new()));
    let (outcome, rest) = host.end_of(1);
    assert_eq!(outcome, exit(6), "{rest:?}");
}

#[test]
fn a_terminal_without_a_command_is_a_login_shell_that_ends_with_its_host() {
    let mut host = Host::new();
    let tty = Some(wire::TerminalSize { rows: 24, cols: 80 });
    host.open(1, &Request::Exec(ExecRequest { stdin: true, tty, ..Default::default() }));
    host.send(Frame::new(1, Kind::Data, &b"echo name=$0 pid=$$.\n"[..]));
    let mut seen = String::new();
    let pid: i32 = loop {
        seen.push_str(&String::from_utf8_lossy(&host.next().payload));
        let told = seen.split_once("name=-sh pid=").and_then(|(_, rest)| rest.split_once('.'));
        if let Some(Ok(pid)) = told.map(|(pid, _)| pid.parse()) {
            break pid;
        }
    };
    host.greet(2);
    while nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None).is_ok() {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A program that listens on this machine's loopback, and its port.
fn listener() -> (std::net::TcpListener, u16) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[test]
fn a_connection_is_closed_one_half_at_a_time() {
    let mut host = Host::new();
    let (listener, port) = listener();
    host.open(1, &Request::Connect { port, wait_ms: 0 });
    let (mut program, _) = listener.accept().unwrap();
    assert_eq!(host.next().kind, Kind::Connected);
    host.send(Frame::new(1, Kind::Data, &b"to the program"[..]));
    host.send(Frame::new(1, Kind::Eof, Bytes::new()));
    let mut all = String::new();
    program.read_to_string(&mut all).unwrap();
    assert_eq!(all, "to the program");
    program.write_all(b"to the host").unwrap();
    drop(program);
    let (outcome, frames) = host.end_of(1);
    assert_eq!(outcome, Ok(Reply::Done));
    let frames: Vec<_> = frames.iter().map(|frame| (frame.kind, &frame.payload[..])).collect();
    assert_eq!(frames, [(Kind::Data, &b"to the host"[..]), (Kind::Eof, &b""[..])]);
}

#[test]
fn a_port_without_a_listener_is_told_and_one_to_come_is_waited_for() {
    let mut host = Host::new();
    let (there, port) = listener();
    drop(there);
    host.open(1, &Request::Connect { port, wait_ms: 0 });
    assert_eq!(host.end_of(1).0.unwrap_err().kind, ErrorKind::Refused);
    host.open(2, &Request::Connect { port, wait_ms: 60_000 });
    host.open(3, &Request::Ping);
    assert!(host.end_of(3).0.is_ok(), "nobody else waits");
    let listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    assert_eq!(host.next().kind, Kind::Connected);
    drop(listener);
    host.open(4, &Request::Connect { port, wait_ms: 60_000 });
    host.send(Frame::new(4, Kind::Cancel, Bytes::new()));
    assert_eq!(host.end_of(4).0.unwrap_err().kind, ErrorKind::Cancelled);
}

#[test]
fn a_cancelled_connection_is_closed_wherever_it_stands() {
    let mut host = Host::new();
    let (listener, port) = listener();
    host.open(1, &Request::Connect { port, wait_ms: 0 });
    let (mut program, _) = listener.accept().unwrap();
    assert_eq!(host.next().kind, Kind::Connected);
    // Neither side reads: both directions stand still when the host gives up.
    let writing = program.try_clone().unwrap();
    let flood = std::thread::spawn(move || {
        let mut writing = writing;
        while writing.write_all(&[7; 65536]).is_ok() {}
    });
    for _ in 0..3 {
        host.send(Frame::new(1, Kind::Data, vec![8; wire::MAX_PAYLOAD]));
    }
    host.send(Frame::new(1, Kind::Cancel, Bytes::new()));
    assert!(host.end_of(1).0.is_err());
    flood.join().unwrap();
    let _ = program.read_to_end(&mut Vec::new());
}

#[test]
fn a_program_whose_queue_is_full_for_a_moment_is_reached() {
    let mut host = Host::new();
    let (listener, port) = listener();
    // SAFETY: plain system call on an open socket; it makes its queue as short as it can be.
    assert_eq!(unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) }, 0);
    let _first = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    host.open(1, &Request::Connect { port, wait_ms: 0 });
    // Longer than the kernel waits before it tries again.
    std::thread::sleep(Duration::from_millis(1_500));
    drop(listener.accept().unwrap());
    assert_eq!(host.next().kind, Kind::Connected);
}
