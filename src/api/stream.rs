//! Events of a running command as server-sent events.
//!
//! By default an event is a line of text, as the SDK wants it: `{"line": …}`, what is not UTF-8 replaced. With
//! `base64` an event is the bytes as they came: `{"base64": …}`.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Bytes, BytesMut};
use serde::Serialize;
use serde_json::json;

use super::types::{ErrorBody, ExitEvent, StartedEvent, exit_code};
use crate::engine::error::Error;
use crate::engine::{ExecEvent, RunningExec};

/// How often a quiet stream shows that it is alive.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// A line longer than this is cut.
const MAX_LINE: usize = 64 * 1024;

/// How output is written into events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Lines,
    Base64,
}

/// A running command, event by event.
pub(super) struct ExecEvents {
    exec: RunningExec,
    encoding: Encoding,
    out: Lines,
    err: Lines,
    over: bool,
    /// Told once, first.
    pub(super) exec_id: Option<String>,
    /// Ends with the stream.
    pub(super) _cleanup: Option<Box<dyn Send + Sync>>,
}

impl ExecEvents {
    pub(super) fn new(exec: RunningExec, encoding: Encoding) -> Self {
        let (out, err) = (Lines::default(), Lines::default());
        Self { exec, encoding, out, err, over: false, exec_id: None, _cleanup: None }
    }

    /// The next piece of the answer's body; none at the end.
    pub(super) async fn next(&mut self) -> Option<Bytes> {
        if let Some(id) = self.exec_id.take() {
            return Some(event("started", &StartedEvent { exec_id: id }));
        }
        while !self.over {
            let piece = match tokio::time::timeout(KEEP_ALIVE, self.exec.next_event()).await {
                Err(_) => Some(Bytes::from_static(b": alive\n\n")),
                Ok(Ok(Some(ExecEvent::Stdout(bytes)))) => self.output("stdout", &bytes),
                Ok(Ok(Some(ExecEvent::Stderr(bytes)))) => self.output("stderr", &bytes),
                Ok(Ok(Some(ExecEvent::Exit { code, signal, timed_out }))) => {
                    self.over = true;
                    let exit = ExitEvent {
                        exit_code: exit_code(code, signal, timed_out),
                        signal,
                        timed_out,
                        duration_ms: self.exec.age().as_millis() as u64,
                    };
                    Some(self.last(event("exit", &exit)))
                }
                Ok(Ok(None)) => {
                    self.over = true;
                    None
                }
                Ok(Err(error)) => {
                    self.over = true;
                    Some(self.last(error_event(&error)))
                }
            };
            if piece.is_some() {
                return piece;
            }
        }
        None
    }

    fn output(&mut self, name: &str, bytes: &[u8]) -> Option<Bytes> {
        if self.encoding == Encoding::Base64 {
            return Some(event(name, &json!({ "base64": BASE64.encode(bytes) })));
        }
        let lines = if name == "stdout" { &mut self.out } else { &mut self.err };
        let events = lines.add(bytes).iter().flat_map(|line| event(name, &json!({ "line": line }))).collect::<Bytes>();
        (!events.is_empty()).then_some(events)
    }

    /// The last event, after lines without an end.
    fn last(&mut self, last: Bytes) -> Bytes {
        let mut all = BytesMut::new();
        for (name, lines) in [("stdout", &mut self.out), ("stderr", &mut self.err)] {
            if let Some(line) = lines.rest() {
                all.extend_from_slice(&event(name, &json!({ "line": line })));
            }
        }
        all.extend_from_slice(&last);
        all.freeze()
    }
}

/// One event. JSON has no raw line ends, so one `data` line holds it.
pub(super) fn event(name: &str, data: &impl Serialize) -> Bytes {
    let data = serde_json::to_string(data).unwrap_or_else(|_| "{}".to_owned());
    Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
}

/// An error after the answer has begun: what would have been its status, and its body.
pub(super) fn error_event(error: &Error) -> Bytes {
    event("error", &json!({ "status": error.kind().status(), "error": error_body(error) }))
}

/// An error of the engine, as it goes over the wire.
pub(crate) fn error_body(error: &Error) -> ErrorBody {
    ErrorBody {
        code: error.kind().code().to_owned(),
        message: error.to_string(),
        request_id: String::new(),
        hint: error.hint_text().map(str::to_owned),
        retryable: error.kind().retryable(),
        details: error.sandbox().map(|id| json!({ "sandbox_id": id })),
    }
}

/// Cuts output into lines.
#[derive(Default)]
pub(super) struct Lines {
    pending: Vec<u8>,
}

impl Lines {
    pub(super) fn add(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.pending.extend_from_slice(piece);
            if self.pending.ends_with(b"\n") || self.pending.len() >= MAX_LINE {
                lines.extend(self.rest());
            }
        }
        lines
    }

    pub(super) fn rest(&mut self) -> Option<String> {
        if self.pending.is_empty() {
            return None;
        }
        let mut line = std::mem::take(&mut self.pending);
        if line.ends_with(b"\n") {
            line.pop();
            if line.ends_with(b"\r") {
                line.pop();
            }
        }
        Some(String::from_utf8_lossy(&line).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_they_come() {
        let mut lines = Lines::default();
        assert!(lines.add(b"he").is_empty());
        assert_eq!(lines.add(b"llo\r\nwor"), ["hello"]);
        assert_eq!(lines.add(b"ld\n\nx"), ["world", ""]);
        assert_eq!(lines.rest().as_deref(), Some("x"));
        assert_eq!(lines.rest(), None);
    }

    #[test]
    fn an_endless_line_is_cut() {
        let mut lines = Lines::default();
        let cut = lines.add(&vec![b'x'; MAX_LINE + 10]);
        assert_eq!(cut.len(), 1);
        assert!(lines.pending.len() <= MAX_LINE);
    }

    #[test]
    fn an_event_is_one_data_line() {
        let bytes = event("stdout", &json!({ "line": "a\nb" }));
        assert_eq!(&bytes[..], b"event: stdout\ndata: {\"line\":\"a\\nb\"}\n\n");
    }
}
