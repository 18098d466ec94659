//! QEMU's machine protocol: one JSON value a line over a Unix socket. Only what supervising needs.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::{Error, ErrorKind, Result};

/// Longest line that is read, in bytes.
const LINE_MAX: u64 = 1 << 20;
/// How long one command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// What QEMU reports by itself; other events are dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QmpEvent {
    /// The machine is going down.
    Shutdown {
        /// QEMU's word for why: `guest-shutdown`, `guest-reset`, `guest-panic`, `host-qmp-quit`, `host-signal`, …
        reason: String,
    },
}

type Answer = Result<Value, String>;

/// A connection to one QEMU. Closes when dropped; QEMU goes on.
#[derive(Debug)]
pub struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    calls: Arc<Mutex<Calls>>,
    reader: tokio::task::JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Calls {
    next: u64,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    closed: bool,
}

impl Qmp {
    /// Connects, waiting for the socket until `deadline` is over, and takes the greeting. Events arrive on the
    /// channel, which ends with the connection.
    ///
    /// # Errors
    /// `Qmp` when there is no QEMU in time, or it does not greet.
    pub async fn connect(socket: &Path, deadline: Duration) -> Result<(Qmp, mpsc::UnboundedReceiver<QmpEvent>)> {
        let at = crate::machine::deadline_at(deadline);
        crate::process::check_socket_path(socket)?;
        let stream = loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= at => {
                    return Err(failed(format!("cannot connect to {}: {error}", socket.display())));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = tokio::time::timeout_at(at, read_line(&mut reader)).await;
        match greeting.map_err(|_| failed("QEMU does not greet"))?? {
            Some(greeting) if greeting.get("QMP").is_some() => {}
            _ => return Err(failed("what answers on QEMU's control socket is not QEMU")),
        }
        let calls = Arc::new(Mutex::new(Calls::default()));
        let (events, receiver) = mpsc::unbounded_channel();
        let reader = tokio::spawn(read_task(reader, calls.clone(), events));
        let qmp = Qmp { writer: tokio::sync::Mutex::new(writer), calls, reader };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok((qmp, receiver))
    }

    /// Runs one command.
    ///
    /// # Errors
    /// `Qmp` when QEMU refuses it, is gone, or does not answer within 10 s.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        let (answer, answered) = oneshot::channel();
        let id = {
            let mut calls = self.calls.lock();
            if calls.closed {
                return Err(failed(format!("{command}: QEMU is gone")));
            }
            calls.next += 1;
            let id = calls.next;
            calls.waiting.insert(id, answer);
            id
        };
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": id }));
        let call = async {
            let written = self.writer.lock().await.write_all(line.as_bytes()).await;
            written.map_err(|e| failed(format!("{command}: {e}")))?;
            match answered.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(refused)) => Err(failed(format!("QEMU refused {command}: {refused}"))),
                Err(_) => Err(failed(format!("{command}: QEMU is gone"))),
            }
        };
        let result = tokio::time::timeout(COMMAND_TIMEOUT, call).await;
        self.calls.lock().waiting.remove(&id);
        result.unwrap_or_else(|_| Err(failed(format!("QEMU did not answer {command} in time"))))
    }
}

impl Qmp {
    /// Closes the connection, so that another client can take the socket over. Calls fail from here on.
    pub async fn close(&self) {
        self.reader.abort();
        self.calls.lock().closed = true;
        self.calls.lock().waiting.clear();
        let _ = self.writer.lock().await.shutdown().await;
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn failed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Qmp, message)
}

/// The next line as JSON; `None` at the end.
async fn read_line(reader: &mut BufReader<OwnedReadHalf>) -> Result<Option<Value>> {
    let mut line = Vec::new();
    let len = reader.take(LINE_MAX).read_until(b'\n', &mut line).await.map_err(|e| failed(e.to_string()))?;
    if len == 0 {
        return Ok(None);
    }
    serde_json::from_slice(&line).map(Some).map_err(|e| failed(format!("QEMU said what is not JSON: {e}")))
}

async fn read_task(
    mut reader: BufReader<OwnedReadHalf>,
    calls: Arc<Mutex<Calls>>,
    events: mpsc::UnboundedSender<QmpEvent>,
) {
    loop {
        match read_line(&mut reader).await {
            Ok(Some(value)) => take(&value, &calls, &events),
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%error, "QEMU's control connection broke");
                break;
            }
        }
    }
    let mut calls = calls.lock();
    calls.closed = true;
    calls.waiting.clear();
}

fn take(value: &Value, calls: &Mutex<Calls>, events: &mpsc::UnboundedSender<QmpEvent>) {
    if let Some(waiting) = value.get("id").and_then(Value::as_u64).and_then(|id| calls.lock().waiting.remove(&id)) {
        let answer = match (value.get("return"), value.get("error")) {
            (Some(value), _) => Ok(value.clone()),
            (None, error) => {
                let text = error.and_then(|error| error.get("desc")).and_then(Value::as_str);
                Err(text.unwrap_or("no reason given").to_owned())
            }
        };
        let _ = waiting.send(answer);
    } else if value.get("event").and_then(Value::as_str) == Some("SHUTDOWN") {
        let reason = value.pointer("/data/reason").and_then(Value::as_str).unwrap_or("unknown").to_owned();
        let _ = events.send(QmpEvent::Shutdown { reason });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

    /// A QEMU that answers each line with what the script says.
    fn scripted(answers: impl Fn(&Value) -> String + Send + 'static) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (reader, mut writer) = listener.accept().await.unwrap().0.into_split();
            writer.write_all(GREETING.as_bytes()).await.unwrap();
            let mut lines = BufReader::new(reader).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let call: Value = serde_json::from_str(&line).unwrap();
                let answer = if call["execute"] == "qmp_capabilities" {
                    format!("{}\n", json!({ "return": {}, "id": call["id"] }))
                } else {
                    answers(&call)
                };
                if writer.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
        (dir, path)
    }

    #[tokio::test]
    async fn answers_and_events_find_their_way() {
        let (_dir, path) = scripted(|call| {
            let event = json!({ "event": "SHUTDOWN", "data": { "guest": true, "reason": "guest-shutdown" } });
            let other = json!({ "event": "RTC_CHANGE", "data": {} });
            match call["execute"].as_str().unwrap() {
                "query-status" => {
                    format!("{other}\n{event}\n{}\n", json!({ "return": { "running": true }, "id": call["id"] }))
                }
                _ => format!("{}\n", json!({ "error": { "class": "X", "desc": "no such command" }, "id": call["id"] })),
            }
        });
        let (qmp, mut events) = Qmp::connect(&path, Duration::from_secs(10)).await.unwrap();
        let (status, refused) =
            tokio::join!(qmp.execute("query-status", json!({})), qmp.execute("bad", json!({ "x": 1 })));
        assert_eq!(status.unwrap()["running"], true);
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Qmp);
        assert!(refused.message.contains("no such command"), "{refused}");
        assert_eq!(events.recv().await, Some(QmpEvent::Shutdown { reason: "guest-shutdown".into() }));
    }

    #[tokio::test]
    async fn garbage_ends_calls_with_an_error() {
        let (_dir, path) = scripted(|_| "}{ not json\n".into());
        let (qmp, mut events) = Qmp::connect(&path, Duration::from_secs(10)).await.unwrap();
        assert_eq!(qmp.execute("quit", json!({})).await.unwrap_err().kind, ErrorKind::Qmp);
        assert_eq!(events.recv().await, None);
        assert_eq!(qmp.execute("quit", json!({})).await.unwrap_err().kind, ErrorKind::Qmp);
    }

    #[tokio::test]
    async fn nobody_there_is_an_error_in_time() {
        let error = Qmp::connect(Path::new("/nonexistent/qmp"), Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Qmp);
    }
}
