//! One error for the crate: a kind to match on, a message and, where there is one, a hint for people.

use miosa_agent::wire;

/// Result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of thing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The QEMU program cannot be run.
    QemuMissing,
    /// A program that images are made with cannot be run.
    ToolMissing,
    /// A specification or argument that can never work.
    Invalid,
    /// The machine's process ended, or never came up; the message has the last lines it wrote.
    StartFailed,
    /// The guest did not answer in time; the message has the end of its console.
    BootTimeout,
    /// The guest's agent did not answer a call in time.
    AgentTimeout,
    /// The connection to the agent is gone: the machine ended, or the guest broke the protocol.
    AgentLost,
    /// The agent answered with an error of its own.
    Guest(wire::ErrorKind),
    /// The VMM refused a command, or did not answer it.
    Qmp,
    /// An image could not be made.
    Image,
    /// The host's file system or process calls failed.
    Io,
}

/// What went wrong, for programs (`kind`) and for people (`message`, `hint`).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What to match on.
    pub kind: ErrorKind,
    /// What happened, in a sentence without a full stop; bounded in length.
    pub message: String,
    /// What to try next.
    pub hint: Option<String>,
}

impl Error {
    /// An error without a hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into(), hint: None }
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.hint = Some(hint.into());
        self
    }

    /// A failed system call while doing `what`.
    pub fn io(what: impl std::fmt::Display, error: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::Io, format!("{what}: {error}"))
    }

    /// The guest's kind of error, when the guest reported it.
    pub fn guest_kind(&self) -> Option<wire::ErrorKind> {
        match self.kind {
            ErrorKind::Guest(kind) => Some(kind),
            _ => None,
        }
    }
}

impl From<wire::AgentError> for Error {
    fn from(error: wire::AgentError) -> Error {
        // A guest chooses this text: it is shown to people, so control characters have no place in it.
        let mut message: String = error.message.chars().filter(|c| !c.is_control()).take(4096).collect();
        if message.is_empty() {
            message = format!("the guest failed ({:?})", error.kind);
        }
        Error::new(ErrorKind::Guest(error.kind), message)
    }
}
