use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::wire::{ExecRequest, ExitStatus};

/// A guest whose root is a directory.
struct Directory {
    root: tempfile::TempDir,
    children: Children,
    frozen: AtomicBool,
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
    fn freeze(&self) -> Result<(), AgentError> {
        self.frozen.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn thaw(&self) -> Result<(), AgentError> {
        self.frozen.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn set_clock(&self, _: u64) -> Result<(), AgentError> {
        Ok(())
    }
    fn set_hostname(&self, _: &str) -> Result<(), AgentError> {
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
        let (host, guest) = UnixStream::pair().unwrap();
        host.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let root = tempfile::tempdir().unwrap();
        let system = Arc::new(Directory { root, children: Children::of_process(), frozen: AtomicBool::new(false) });
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
fn nonsense_is_answered_or_ignored() {
    let mut host = Host::new();
    host.send(Frame::new(1, Kind::Open, vec![255; 40]));
    assert_eq!(host.end_of(1).0.unwrap_err().kind, ErrorKind::Invalid);
    host.send(Frame::new(77, Kind::Data, vec![1]));
    host.send(Frame::new(77, Kind::Window, vec![1, 2, 3]));
    host.send(Frame::new(77, Kind::End, vec![]));
    host.send(Frame::new(77, Kind::Cancel, vec![]));
    for stream in 2..2 + wire::MAX_STREAMS as u32 {
        host.open(stream, &Request::WriteFile { path: format!("/f{stream}"), mode: None });
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
    host.open(3, &Request::WriteFile { path: "/half".into(), mode: None });
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
