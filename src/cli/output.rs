//! What the command line prints: one document or a table on stdout, everything else on stderr.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Value, json};

use super::args::Global;
use crate::api::client;
use crate::api::types::ErrorBody;

/// Before the last line of a text that says what to do next. No terminal shows it, and no name has it.
const NEXT: char = '\u{1e}';

/// How to print.
#[derive(Debug, Clone, Copy)]
pub struct Out {
    /// JSON wanted.
    pub json: bool,
    /// Ids only.
    pub quiet: bool,
    colour: bool,
}

/// Result of a command.
pub type Result<T> = std::result::Result<T, Failure>;

/// Why a command failed: what is printed, and the exit code.
#[derive(Debug)]
pub struct Failure {
    exit: u8,
    body: Box<ErrorBody>,
}

impl Failure {
    /// The user's own mistake: exit code 1.
    pub fn user(code: &str, message: impl Into<String>) -> Self {
        Self::new(1, code, message)
    }

    /// A failure with its exit code.
    pub fn new(exit: u8, code: &str, message: impl Into<String>) -> Self {
        let body = ErrorBody { code: code.to_owned(), message: message.into(), ..ErrorBody::default() };
        Self { exit, body: Box::new(body) }
    }

    /// Adds what to do next.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.body.hint = Some(hint.into());
        self
    }

    /// The stable word.
    pub fn code(&self) -> &str {
        &self.body.code
    }

    /// The exit code.
    pub fn exit(&self) -> u8 {
        self.exit
    }

    /// The reader of our output has gone: end without a word, as a program that a signal ends would.
    pub fn closed_pipe() -> Self {
        Self::new(128 + nix::libc::SIGPIPE as u8, "", "")
    }

    /// All was said already: only the exit code is left.
    pub fn told(exit: u8) -> Self {
        Self::new(exit, "", "")
    }

    /// An answer of the daemon.
    pub fn refused(status: u16, body: ErrorBody) -> Self {
        let exit = match (body.code.as_str(), status) {
            // As a shell says it.
            ("command_not_found", _) => 127,
            ("command_failed", _) => 126,
            (_, 401 | 403) => 3,
            (_, 400..500) => 1,
            _ => 4,
        };
        Self { exit, body: Box::new(body) }
    }
}

impl From<crate::engine::error::Error> for Failure {
    fn from(error: crate::engine::error::Error) -> Self {
        Self::refused(error.kind().status(), crate::api::error_body(&error))
    }
}

impl From<crate::config::ConfigError> for Failure {
    fn from(error: crate::config::ConfigError) -> Self {
        let failure = Self::user("invalid_config", error.message);
        if let Some(hint) = error.hint { failure.hint(hint) } else { failure }
    }
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        let message = error.to_string();
        match error {
            client::Error::Refused { status, body } => Self::refused(status, *body),
            client::Error::Unreachable { place, source } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                Self::new(3, "permission_denied", format!("the daemon's socket {place} is not yours to use"))
                    .hint("run this as the user that runs the daemon")
            }
            client::Error::Unreachable { .. } => Self::new(2, "daemon_unreachable", message)
                .hint("start it with: miosa daemon (or name its state directory: --state-dir DIR)")
                .retryable(),
            client::Error::Broken(_) => {
                Self::new(2, "connection_broken", message).hint("see whether the daemon still runs").retryable()
            }
            client::Error::Local(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Self::closed_pipe(),
            client::Error::Local(_) => Self::user("local_file", message),
        }
    }
}

impl Failure {
    fn retryable(mut self) -> Self {
        self.body.retryable = true;
        self
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self::closed_pipe();
        }
        Self::user("local_io", format!("the output could not be written: {error}"))
    }
}

impl Out {
    /// As the global options and the terminal say.
    pub fn new(global: &Global) -> Self {
        let colour = !global.no_color
            && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
            && std::io::stdout().is_terminal();
        Self { json: global.json, quiet: global.quiet, colour }
    }

    /// A document for programs, or what `text` makes of it for people; of which only `id` if that is wanted.
    pub fn answer<T: Serialize>(&self, value: &T, id: &str, text: impl FnOnce(&Self) -> String) -> Result<()> {
        let line = match (self.json, self.quiet) {
            (true, _) => serde_json::to_string(value)
                .map_err(|e| Failure::new(4, "internal_error", format!("the answer cannot be printed: {e}")))?,
            (false, true) => id.to_owned(),
            (false, false) => {
                let text = text(self);
                // What to do next is for people, and no part of the answer.
                let (answer, next) = text.rsplit_once(NEXT).map_or((text.as_str(), None), |(a, n)| (a, Some(n)));
                self.print(answer)?;
                if let Some(command) = next {
                    self.progress(&self.faint(&format!("next: {}", command.trim_end())));
                }
                return Ok(());
            }
        };
        self.print(&line)
    }

    /// A line on stdout.
    pub fn print(&self, text: &str) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.trim_end_matches('\n').as_bytes())?;
        stdout.write_all(b"\n")?;
        Ok(stdout.flush()?)
    }

    /// Tells people what is going on.
    pub fn progress(&self, text: &str) {
        if !self.json && !self.quiet {
            // Nobody there to read it is no reason to stop.
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// Bold, if colours are wanted.
    pub fn strong(&self, text: &str) -> String {
        if self.colour { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Faint, if colours are wanted.
    pub fn faint(&self, text: &str) -> String {
        if self.colour { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// The last line of a text for people, which says what to do next; it goes to stderr.
    pub fn next_step(&self, command: &str) -> String {
        format!("{NEXT}{command}")
    }

    /// Columns under a bold head.
    pub fn table(&self, head: &[&str], rows: &[Vec<String>]) -> String {
        let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let line = |cells: Vec<&str>| {
            let padded: Vec<_> = cells.iter().zip(&widths).map(|(c, w)| format!("{c:<w$}")).collect();
            padded.join("  ").trim_end().to_owned()
        };
        let mut text = self.strong(&line(head.to_vec()));
        for row in rows {
            text.push('\n');
            text.push_str(&line(row.iter().map(String::as_str).collect()));
        }
        text
    }

    /// `key  value` lines.
    pub fn fields(&self, fields: &[(&str, String)]) -> String {
        let width = fields.iter().map(|(k, _)| k.len()).max().unwrap_or(0);
        let lines: Vec<_> =
            fields.iter().map(|(k, v)| format!("{}  {v}", self.faint(&format!("{k:<width$}")))).collect();
        lines.join("\n")
    }
}

/// Prints a failure on stderr, and says the exit code.
pub fn fail(json: bool, failure: &Failure) -> ExitCode {
    let body = &failure.body;
    if body.code.is_empty() {
        return ExitCode::from(failure.exit);
    }
    let mut stderr = std::io::stderr().lock();
    // With stderr gone there is nobody left to tell; the exit code still does.
    let _ = if json {
        let mut error = json!({ "code": body.code, "message": body.message, "retryable": body.retryable });
        if let Some(hint) = &body.hint {
            error["hint"] = Value::from(hint.as_str());
        }
        let mut details = match &body.details {
            Some(Value::Object(map)) => map.clone(),
            _ => serde_json::Map::new(),
        };
        if !body.request_id.is_empty() {
            details.insert("request_id".to_owned(), Value::from(body.request_id.as_str()));
        }
        if !details.is_empty() {
            error["details"] = Value::Object(details);
        }
        writeln!(stderr, "{{\"ok\":false,\"error\":{error}}}")
    } else {
        let hint = body.hint.as_ref().map(|h| format!("\nhint: {h}")).unwrap_or_default();
        writeln!(stderr, "error: {} ({}){hint}", body.message, body.code)
    };
    ExitCode::from(failure.exit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_maps_to_one_exit_code() {
        let exit =
            |status, code: &str| Failure::refused(status, ErrorBody { code: code.into(), ..Default::default() }).exit;
        assert_eq!(exit(404, "sandbox_not_found"), 1);
        assert_eq!(exit(409, "name_taken"), 1);
        assert_eq!(exit(403, "forbidden"), 3);
        assert_eq!(exit(507, "storage_full"), 4);
        assert_eq!(exit(503, "machine_unavailable"), 4);
        assert_eq!(exit(422, "command_not_found"), 127);
    }

    #[test]
    fn columns_line_up() {
        let out = Out { json: false, quiet: false, colour: false };
        let text = out.table(&["ID", "NAME"], &[vec!["sb-1".into(), "ä".into()], vec!["x".into(), "long name".into()]]);
        assert_eq!(text, "ID    NAME\nsb-1  ä\nx     long name");
    }
}
