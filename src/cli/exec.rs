//! `miosa sandbox exec`: output as it comes, input as it is there, and the command's own exit code.

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::stream;
use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::ExecArgs;
use super::output::{Failure, Out, Result};
use super::sandbox::path;
use crate::api::client::{BYTES, Client};
use crate::api::types::{Command, ErrorBody, ExecBody, ExecResult, ExitEvent, KillBody, StdinBody};

/// Most of each output that one document holds.
const MAX_DOCUMENT: usize = 64 << 20;

pub(super) async fn run(client: &Client, out: Out, args: ExecArgs) -> Result<ExitCode> {
    if args.detached {
        return super::commands::start(client, out, args).await.map(|()| ExitCode::SUCCESS);
    }
    if args.tty {
        return super::terminal::exec(client, args).await;
    }
    let with_stdin = args.interactive || !std::io::stdin().is_terminal();
    let sandbox = args.target.sandbox;
    let body = ExecBody {
        command: Command::Argv(args.command),
        cwd: args.surroundings.cwd,
        env: Some(args.surroundings.env.into_iter().collect()),
        user: args.surroundings.user,
        timeout: args.timeout.map(|t| t.as_secs_f64()),
        stdin: with_stdin.then_some(StdinBody::Stream(true)),
        encoding: Some("base64".to_owned()),
        other: serde_json::Map::new(),
    };
    let mut signals = Signals::new()?;
    let route = path(&sandbox, "/exec/stream");
    let mut events = tokio::select! {
        events = client.events(&route, &body) => events?,
        signal = signals.next() => return Ok(ended_by(signal)),
    };
    let mut kept = Kept::default();
    loop {
        let event = tokio::select! {
            event = events.next_event() => event?,
            signal = signals.next() => {
                if !signals.pass_on(client, signal) {
                    return Ok(ended_by(signal));
                }
                continue;
            }
        };
        let Some((name, data)) = event else { break };
        match name.as_str() {
            "started" => {
                if let Some(id) = data["exec_id"].as_str() {
                    let route = |what: &str| path(&sandbox, &format!("/exec/{id}/{what}"));
                    signals.to = Some(route("kill"));
                    if with_stdin {
                        forward_stdin(client.clone(), route("stdin"));
                    }
                }
            }
            "stdout" | "stderr" => {
                let bytes = bytes_of(&data)?;
                match (out.json, name.as_str()) {
                    (true, _) => kept.add(&name, &bytes),
                    (false, "stdout") => pass_on(std::io::stdout().lock(), &bytes)?,
                    (false, _) => pass_on(std::io::stderr().lock(), &bytes)?,
                }
            }
            "exit" => {
                let exit: ExitEvent = serde_json::from_value(data)
                    .map_err(|e| Failure::new(4, "bad_answer", format!("an exit that cannot be decoded: {e}")))?;
                let code = exit.exit_code;
                if out.json {
                    let result = kept.finish(exit);
                    out.answer(&result, "", |_| String::new())?;
                }
                return Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)));
            }
            "error" => {
                return Err(refusal(&data));
            }
            _ => {}
        }
    }
    Err(Failure::new(2, "connection_broken", "the daemon's answer broke off before the command's end")
        .hint("see whether the daemon still runs, and what the command did: miosa sandbox show SANDBOX"))
}

/// SIGINT and SIGTERM: the first one goes to the command, and the next one ends this program.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// Where they go; none before the command runs, and after one has gone.
    to: Option<String>,
}

impl Signals {
    fn new() -> Result<Signals> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            to: None,
        })
    }

    async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
        }
    }

    /// False when there is nobody to pass it on to any more.
    fn pass_on(&mut self, client: &Client, signal: SignalKind) -> bool {
        let Some(route) = self.to.take() else { return false };
        let client = client.clone();
        tokio::spawn(async move {
            let body = KillBody { signal: Some(signal.as_raw_value().to_string()), ..KillBody::default() };
            let passed: crate::api::client::Result<Value> = client.post(&route, &body).await;
            if let Err(error) = passed {
                // Mostly a command that has ended; its own exit tells what matters.
                tracing::debug!(%error, "a signal");
            }
        });
        true
    }
}

fn ended_by(signal: SignalKind) -> ExitCode {
    ExitCode::from(u8::try_from(128 + signal.as_raw_value()).unwrap_or(u8::MAX))
}

/// The bytes of an event of output.
pub(super) fn bytes_of(data: &Value) -> Result<Vec<u8>> {
    BASE64
        .decode(data["base64"].as_str().unwrap_or_default())
        .map_err(|e| Failure::new(4, "bad_answer", format!("output that cannot be decoded: {e}")))
}

/// What an `error` event says.
pub(super) fn refusal(data: &Value) -> Failure {
    let status = data["status"].as_u64().and_then(|s| u16::try_from(s).ok()).unwrap_or(500);
    let body: ErrorBody = serde_json::from_value(data["error"].clone()).unwrap_or_default();
    Failure::refused(status, body)
}

pub(super) fn pass_on(mut to: impl Write, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes)?;
    Ok(to.flush()?)
}

/// Output kept for one document.
#[derive(Default)]
struct Kept {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    truncated: bool,
}

impl Kept {
    fn add(&mut self, name: &str, bytes: &[u8]) {
        let kept = if name == "stdout" { &mut self.stdout } else { &mut self.stderr };
        let room = MAX_DOCUMENT - kept.len();
        self.truncated |= bytes.len() > room;
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn finish(self, exit: ExitEvent) -> ExecResult {
        ExecResult {
            stdout: String::from_utf8_lossy(&self.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
            exit_code: exit.exit_code,
            signal: exit.signal,
            timed_out: exit.timed_out,
            truncated: self.truncated,
            duration_ms: exit.duration_ms,
        }
    }
}

/// Sends what is on standard input, for as long as the command wants it.
fn forward_stdin(client: Client, route: String) {
    tokio::spawn(async move {
        let sent: crate::api::client::Result<Value> = client.upload(&route, BYTES, stdin_pieces()).await;
        if let Err(error) = sent {
            // Mostly a command that has ended; its own exit tells what matters.
            tracing::debug!(%error, "standard input");
        }
    });
}

/// Standard input, piece by piece, read on a thread that nobody has to wait for.
pub(super) fn stdin_pieces() -> impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    let (send, receive) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(4);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let piece = match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => Ok(Bytes::copy_from_slice(&buffer[..n])),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = piece.is_err();
            if send.blocking_send(piece).is_err() || failed {
                return;
            }
        }
    });
    stream::unfold(receive, |mut receive| async move { Some((receive.recv().await?, receive)) })
}
