//! `miosa sandbox exec`: output as it comes, input as it is there, and the command's own exit code.

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::stream;
use serde_json::Value;

use super::args::ExecArgs;
use super::output::{Failure, Out, Result};
use super::sandbox::path;
use crate::api::client::{BYTES, Client};
use crate::api::types::{Command, ErrorBody, ExecBody, ExecResult, ExitEvent, StdinBody};

/// Most of each output that one document holds.
const MAX_DOCUMENT: usize = 64 << 20;

pub(super) async fn run(client: &Client, out: Out, args: ExecArgs) -> Result<ExitCode> {
    if args.detached {
        return super::commands::start(client, out, args).await.map(|()| ExitCode::SUCCESS);
    }
    let with_stdin = !std::io::stdin().is_terminal();
    let sandbox = args.target.sandbox;
    let body = ExecBody {
        command: Command::Argv(args.command),
        cwd: args.cwd,
        env: Some(args.env.into_iter().collect()),
        user: args.user,
        timeout: args.timeout.map(|t| t.as_secs_f64()),
        stdin: with_stdin.then_some(StdinBody::Stream(true)),
        encoding: Some("base64".to_owned()),
        other: serde_json::Map::new(),
    };
    let mut events = client.events(&path(&sandbox, "/exec/stream"), &body).await?;
    let mut kept = Kept::default();
    while let Some((name, data)) = events.next_event().await? {
        match name.as_str() {
            "started" => {
                if let Some(id) = data["exec_id"].as_str() {
                    forward_stdin(client.clone(), path(&sandbox, &format!("/exec/{id}/stdin")));
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
