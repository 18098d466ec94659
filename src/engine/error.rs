//! The engine's error: a stable kind, a sentence of context, and what to do about it.
//!
//! The kind maps once to the API's code and HTTP status here; the command line derives its exit code from the status.

use std::fmt;

/// Result of the engine's fallible calls.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a caller can act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No sandbox has this id or name.
    SandboxNotFound,
    /// The sandbox existed and was destroyed.
    SandboxDestroyed,
    /// No snapshot has this id or name.
    SnapshotNotFound,
    /// Several snapshots have this name.
    SnapshotAmbiguous,
    /// A name keeps the snapshot.
    SnapshotInUse,
    /// No template has this name.
    TemplateNotFound,
    /// No batch has this id.
    BatchNotFound,
    /// No disk or state of the store has this id or name.
    DiskNotFound,
    /// Several disks or states of the store have this name.
    DiskAmbiguous,
    /// The disk belongs to a sandbox, is attached, or is being imported.
    DiskInUse,
    /// The disk is not attached.
    DiskNotAttached,
    /// No volume has this id or name.
    VolumeNotFound,
    /// The volume is attached, and not in a way that allows this.
    VolumeInUse,
    /// The volume is not attached to this sandbox.
    VolumeNotAttached,
    /// The volume's journal has to be played back by somebody who may write to it.
    VolumeUnclean,
    /// The sandbox has no preview of this id or port, or nobody has one of this host name.
    PreviewNotFound,
    /// The daemon has no address for previews.
    PreviewsOff,
    /// Disks cannot be shown in this way here.
    FrontendUnavailable,
    /// Another sandbox has this name.
    NameTaken,
    /// An argument is malformed or out of range.
    InvalidInput,
    /// The request asks for something that is not done here.
    UnsupportedOption,
    /// The request needs a running session and does not start one.
    NotRunning,
    /// The request is for a sandbox without a session.
    Running,
    /// The machine's memory cannot be kept, or what was kept cannot be used.
    MemoryUnavailable,
    /// Another call is changing this sandbox.
    Busy,
    /// The session ended while the call was using it.
    SessionEnded,
    /// The guest has no such file.
    FileNotFound,
    /// The guest refuses the access to a file.
    GuestFile,
    /// The guest's own file system is full.
    GuestDiskFull,
    /// The guest has no such program (or working directory, or user).
    CommandNotFound,
    /// No detached command of that id runs or is remembered.
    ExecNotFound,
    /// The program could not be started in the guest.
    CommandFailed,
    /// Nothing listens on that port of the guest.
    PortClosed,
    /// The guest's agent did not answer in time.
    AgentTimeout,
    /// The program that runs machines is not installed.
    MachineUnavailable,
    /// A kernel, an initramfs or the guest's agent is missing.
    ImageMissing,
    /// A step of a template's build failed.
    BuildFailed,
    /// The machine did not come up.
    BootFailed,
    /// The file system that holds the state directory is full.
    StorageFull,
    /// Stored bytes are damaged, and are not served.
    StorageDamaged,
    /// The store refuses writes until it is opened again.
    StoragePoisoned,
    /// The store failed in another way.
    Storage,
    /// The daemon is about to end.
    ShuttingDown,
    /// A defect of ours.
    Internal,
}

impl Kind {
    /// The API's error code.
    pub fn code(self) -> &'static str {
        match self {
            Kind::SandboxNotFound => "sandbox_not_found",
            Kind::SandboxDestroyed => "sandbox_destroyed",
            Kind::SnapshotNotFound => "snapshot_not_found",
            Kind::SnapshotAmbiguous => "snapshot_ambiguous",
            Kind::SnapshotInUse => "snapshot_in_use",
            Kind::TemplateNotFound => "template_not_found",
            Kind::BatchNotFound => "batch_not_found",
            Kind::DiskNotFound => "disk_not_found",
            Kind::DiskAmbiguous => "disk_ambiguous",
            Kind::DiskInUse => "disk_in_use",
            Kind::DiskNotAttached => "disk_not_attached",
            Kind::VolumeNotFound => "volume_not_found",
            Kind::VolumeInUse => "volume_in_use",
            Kind::VolumeNotAttached => "volume_not_attached",
            Kind::VolumeUnclean => "volume_unclean",
            Kind::PreviewNotFound => "preview_not_found",
            Kind::PreviewsOff => "previews_off",
            Kind::FrontendUnavailable => "frontend_unavailable",
            Kind::NameTaken => "name_taken",
            Kind::InvalidInput => "invalid_input",
            Kind::UnsupportedOption => "unsupported_option",
            Kind::NotRunning => "sandbox_not_running",
            Kind::Running => "sandbox_running",
            Kind::MemoryUnavailable => "memory_unavailable",
            Kind::Busy => "sandbox_busy",
            Kind::SessionEnded => "session_ended",
            Kind::FileNotFound => "file_not_found",
            Kind::GuestFile => "file_error",
            Kind::GuestDiskFull => "guest_disk_full",
            Kind::CommandNotFound => "command_not_found",
            Kind::ExecNotFound => "exec_not_found",
            Kind::CommandFailed => "command_failed",
            Kind::PortClosed => "port_closed",
            Kind::AgentTimeout => "agent_timeout",
            Kind::MachineUnavailable => "machine_unavailable",
            Kind::ImageMissing => "image_missing",
            Kind::BuildFailed => "build_failed",
            Kind::BootFailed => "boot_failed",
            Kind::StorageFull => "storage_full",
            Kind::StorageDamaged => "storage_damaged",
            Kind::StoragePoisoned => "storage_poisoned",
            Kind::Storage => "storage_error",
            Kind::ShuttingDown => "shutting_down",
            Kind::Internal => "internal_error",
        }
    }

    /// The HTTP status that goes with it.
    pub fn status(self) -> u16 {
        match self {
            Kind::SandboxNotFound
            | Kind::SnapshotNotFound
            | Kind::TemplateNotFound
            | Kind::FileNotFound
            | Kind::BatchNotFound
            | Kind::DiskNotFound
            | Kind::VolumeNotFound
            | Kind::PreviewNotFound
            | Kind::ExecNotFound => 404,
            Kind::SandboxDestroyed => 410,
            Kind::SnapshotAmbiguous
            | Kind::SnapshotInUse
            | Kind::DiskAmbiguous
            | Kind::DiskInUse
            | Kind::DiskNotAttached
            | Kind::VolumeInUse
            | Kind::VolumeNotAttached
            | Kind::VolumeUnclean
            | Kind::Running
            | Kind::NameTaken
            | Kind::NotRunning
            | Kind::MemoryUnavailable
            | Kind::Busy
            | Kind::SessionEnded => 409,
            Kind::InvalidInput
            | Kind::UnsupportedOption
            | Kind::GuestFile
            | Kind::GuestDiskFull
            | Kind::BuildFailed
            | Kind::CommandNotFound
            | Kind::CommandFailed => 422,
            Kind::PortClosed => 502,
            Kind::AgentTimeout => 504,
            Kind::MachineUnavailable
            | Kind::FrontendUnavailable
            | Kind::PreviewsOff
            | Kind::ImageMissing
            | Kind::ShuttingDown
            | Kind::StoragePoisoned => 503,
            Kind::StorageFull => 507,
            Kind::BootFailed | Kind::StorageDamaged | Kind::Storage | Kind::Internal => 500,
        }
    }

    /// Whether the same call may succeed when made again, with nothing else changed.
    pub fn retryable(self) -> bool {
        matches!(
            self,
            Kind::Busy
                | Kind::SessionEnded
                | Kind::PortClosed
                | Kind::AgentTimeout
                | Kind::BootFailed
                | Kind::ShuttingDown
        )
    }
}

/// An error of the engine.
#[derive(Debug, Clone)]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
    sandbox: Option<String>,
}

impl Error {
    /// An error of `kind`; `message` says what was tried, on what, and why it failed.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, sandbox: None }
    }

    /// Adds what the user can do next.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Says first what was being done.
    pub(crate) fn context(self, what: &str) -> Self {
        Self { message: format!("{what}: {}", self.message), ..self }
    }

    /// Adds that the sandbox is there all the same.
    pub(crate) fn about_sandbox(mut self, id: &str) -> Self {
        let kept = format!("sandbox {id} was created; start it again with: miosa sandbox resume {id}");
        self.sandbox = Some(id.to_owned());
        self.hint = Some(match self.hint {
            Some(hint) => format!("{hint}; {kept}"),
            None => kept,
        });
        self
    }

    /// The stable kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The sandbox that was made all the same.
    pub fn sandbox(&self) -> Option<&str> {
        self.sandbox.as_deref()
    }

    /// What the user can do next.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidInput, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        use storage::ErrorKind;
        let message = error.to_string();
        match error.kind() {
            ErrorKind::NoSpace => Self::new(Kind::StorageFull, message)
                .hint("free space on the file system of the state directory, or destroy sandboxes and snapshots; nothing was lost"),
            ErrorKind::Damaged => Self::new(Kind::StorageDamaged, message)
                .hint("see what is damaged: miosa store check; heal what has a copy: miosa store scrub --heal"),
            ErrorKind::Poisoned => Self::new(Kind::StoragePoisoned, message)
                .hint("a disk sync failed earlier; check the disk, then restart the daemon"),
            ErrorKind::Closed => Self::new(Kind::ShuttingDown, "the daemon is shutting down"),
            ErrorKind::InvalidInput => Self::new(Kind::InvalidInput, message),
            ErrorKind::NotFound => Self::new(Kind::DiskNotFound, message).hint("list them: miosa disk list"),
            ErrorKind::NameTaken => Self::new(Kind::NameTaken, message),
            _ => Self::new(Kind::Storage, message),
        }
    }
}
