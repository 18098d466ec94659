//! The crate's one error: a stable kind to match on, a sentence of context, and the cause.

use std::fmt;

/// Result of this crate's fallible calls.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a caller can act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// No disk, snapshot or record has this id or name.
    NotFound,
    /// A disk of this name exists already.
    NameTaken,
    /// The call writes to a snapshot or to a disk opened for reading.
    ReadOnly,
    /// An argument is out of range (offset, size, name).
    InvalidInput,
    /// The file system that holds the store is full. Nothing was accepted; retry when there is room.
    NoSpace,
    /// Another process has the store open.
    InUse,
    /// The store was written by a version with another format.
    UnsupportedVersion,
    /// Bytes on disk do not match their checksum or break an invariant. They are not served.
    Damaged,
    /// The operating system refused an I/O call.
    Io,
    /// A sync failed earlier: what was acknowledged since the last sync is uncertain. Reads go on, writes do not
    /// until the store is opened again.
    Poisoned,
    /// The store has been closed.
    Closed,
}

impl ErrorKind {
    /// A stable, lower-case word for machine-readable output.
    pub fn code(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::NameTaken => "name_taken",
            Self::ReadOnly => "read_only",
            Self::InvalidInput => "invalid_input",
            Self::NoSpace => "no_space",
            Self::InUse => "in_use",
            Self::UnsupportedVersion => "unsupported_version",
            Self::Damaged => "damaged",
            Self::Io => "io",
            Self::Poisoned => "poisoned",
            Self::Closed => "closed",
        }
    }
}

/// An error of the store. `Display` shows the context and what caused it; `source` is what lies below that.
#[derive(Clone)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<std::sync::Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `context` says what was tried, on what, and where it helps what to do.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// The same with the error that caused it.
    pub fn caused(
        kind: ErrorKind,
        context: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self { kind, context: context.into(), source: Some(std::sync::Arc::new(source)) }
    }

    /// Classifies an operating-system error: a full file system is `NoSpace`, everything else is `Io`.
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(nix::libc::ENOSPC | nix::libc::EDQUOT | nix::libc::EFBIG) => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Self::caused(kind, context, source)
    }

    pub(crate) fn damaged(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Damaged, context)
    }

    /// The stable kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().and_then(|s| s.source())
    }
}
