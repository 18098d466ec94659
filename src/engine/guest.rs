//! Work inside a sandbox: programs and files. Each call starts a session if there is none.
//!
//! The sandbox's lock is held until the call has been handed to the guest's agent, so that a stop comes before a call or
//! after its beginning; the call's own stream then lives on its own. A stop ends it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use vmm::agent::{Controls, ExecEvent, ExecStream, FileReader, FileWriter, Stdin};
use vmm::{Agent, ExecRequest, TerminalSize};

use super::Engine;
use super::activity::InUse;
use super::error::{Error, Kind, Result};
use super::lifecycle::Request;
use super::sandbox::Sandbox;
use super::session::within;

/// Longest path of a guest's file, as the kernel has it.
const MAX_PATH: usize = 4_095;

/// A program to run.
#[derive(Debug, Clone, Default)]
pub struct ExecSpec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the sandbox's environment.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// User name or number.
    pub user: Option<String>,
    /// Kill it after this long.
    pub timeout: Option<Duration>,
    /// Give it a standard input.
    pub stdin: bool,
    /// Run it on a terminal; without a program that is the user's login shell.
    pub tty: Option<TerminalSize>,
}

impl ExecSpec {
    pub(super) fn into_request(self, sandbox: &Sandbox) -> ExecRequest {
        // Of several with one name, the last one counts.
        let record = sandbox.record();
        let mut env = sandbox.shared.settings.guest.environment();
        env.extend(record.image.env);
        env.extend(record.env);
        env.extend(self.env);
        ExecRequest {
            argv: self.argv,
            env: env.into_iter().collect(),
            cwd: self.cwd.or(record.image.workdir),
            user: self.user,
            timeout_ms: self.timeout.map(|t| (t.as_millis() as u64).max(1)),
            stdin: self.stdin,
            tty: self.tty,
        }
    }
}

impl Engine {
    /// Starts a program.
    pub async fn exec(&self, key: &str, spec: ExecSpec) -> Result<RunningExec> {
        let sandbox = self.find(key)?;
        check_exec(&spec)?;
        let metrics = self.shared.metrics.clone();
        self.detached(async move {
            // A terminal that nobody types into is no use; whoever serves it tells of what is.
            let lasts = spec.tty.is_none();
            let request = spec.into_request(&sandbox);
            let began = Instant::now();
            let stream = use_guest(&sandbox, |agent| async move { Ok(agent.exec(request).await?) }).await?;
            metrics.exec_started();
            Ok(RunningExec { stream, began, _in_use: lasts.then(|| sandbox.begin_use()) })
        })
        .await
    }

    /// Resets a sandbox's idle clock: somebody uses it in a way that the engine does not see.
    pub fn touch(&self, key: &str) -> Result<()> {
        self.find(key)?.touch();
        Ok(())
    }

    /// Opens a guest's file to be read. An absent file is an error here and not in the middle of the data.
    pub async fn read_file(&self, key: &str, path: &str) -> Result<GuestReader> {
        self.read_range(key, path, 0, None).await
    }

    /// [`Engine::read_file`] from an offset, at most so many bytes.
    pub async fn read_range(&self, key: &str, path: &str, offset: u64, len: Option<u64>) -> Result<GuestReader> {
        let (sandbox, path) = (self.find(key)?, check_path(path)?);
        self.detached(async move {
            let reader =
                use_guest(&sandbox, |agent| async move { Ok(agent.read_range(path, offset, len).await?) }).await?;
            GuestReader::begin(reader, sandbox.begin_use()).await
        })
        .await
    }

    /// Opens a guest's file to be replaced. The old one stays until [`GuestWriter::finish`].
    pub async fn write_file(&self, key: &str, path: &str, mode: Option<u32>) -> Result<GuestWriter> {
        let (sandbox, path) = (self.find(key)?, check_path(path)?);
        if path.ends_with('/') {
            return Err(Error::invalid(format!("{path:?} names a directory, not a file")).hint("add the file's name"));
        }
        if mode.is_some_and(|m| m > 0o7777) {
            return Err(Error::invalid("a file's mode is at most 7777 (octal)"));
        }
        self.detached(async move {
            let writer = use_guest(&sandbox, |agent| async move { Ok(agent.write_file(path, mode).await?) }).await?;
            Ok(GuestWriter { writer, _in_use: sandbox.begin_use() })
        })
        .await
    }
}

/// Begins a call to the guest in its session.
pub(super) async fn use_guest<T, F: Future<Output = Result<T>>>(
    sandbox: &Arc<Sandbox>,
    call: impl FnOnce(Agent) -> F,
) -> Result<T> {
    let mut owner = sandbox.own().await;
    sandbox.ensure_session(&mut owner, Request::Use).await?;
    sandbox.touch();
    let Some(session) = &owner.session else {
        return Err(Error::internal(format!("sandbox {} is running without a session", sandbox.name())));
    };
    within(sandbox.shared.settings.agent_deadline, "handing the call to the guest", call(session.agent())).await
}

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub struct RunningExec {
    stream: ExecStream,
    began: Instant,
    _in_use: Option<InUse>,
}

impl RunningExec {
    /// What only looks at a program is no use of the sandbox.
    pub(super) fn looking(stream: ExecStream) -> Self {
        Self { stream, began: Instant::now(), _in_use: None }
    }

    /// The next thing it does; none after its exit. Safe to cancel.
    pub async fn next_event(&mut self) -> Result<Option<ExecEvent>> {
        self.stream.next_event().await.map_err(exec_error)
    }

    /// Signals for it, and sizes for its terminal.
    pub fn controls(&self) -> Controls {
        self.stream.controls()
    }

    /// Its standard input, once, if it was asked for. Dropping that closes it.
    pub fn take_stdin(&mut self) -> Option<Stdin> {
        self.stream.take_stdin()
    }

    /// How long ago it was asked for; a session that had to be started is included.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }
}

/// A guest's file being read.
#[derive(Debug)]
pub struct GuestReader {
    first: Option<Bytes>,
    reader: FileReader,
    over: bool,
    _in_use: InUse,
}

impl GuestReader {
    /// Waits for the first piece, so that an absent file is told before anything else is.
    pub(super) async fn begin(mut reader: FileReader, in_use: InUse) -> Result<Self> {
        let first = reader.next().await?;
        Ok(Self { over: first.is_none(), first, reader, _in_use: in_use })
    }

    /// The next piece; none at the end.
    pub async fn next_piece(&mut self) -> Result<Option<Bytes>> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        if self.over {
            return Ok(None);
        }
        Ok(self.reader.next().await?)
    }
}

/// A guest's file being replaced.
#[derive(Debug)]
pub struct GuestWriter {
    writer: FileWriter,
    _in_use: InUse,
}

impl GuestWriter {
    /// Sends bytes; waits while the guest is slow.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.writer.write(bytes).await?)
    }

    /// Puts the file in its place.
    pub async fn finish(self) -> Result<()> {
        Ok(self.writer.finish().await?)
    }
}

pub(super) fn exec_error(error: vmm::Error) -> Error {
    use vmm::{ErrorKind, GuestErrorKind};
    match error.kind {
        ErrorKind::Guest(GuestErrorKind::NotFound) => {
            Error::new(Kind::CommandNotFound, error.message).hint("shell syntax needs a shell: -- sh -lc \"…\"")
        }
        ErrorKind::Guest(
            GuestErrorKind::Permission
            | GuestErrorKind::IsDirectory
            | GuestErrorKind::NotDirectory
            | GuestErrorKind::Invalid
            | GuestErrorKind::Io,
        ) => Error::new(Kind::CommandFailed, error.message),
        _ => error.into(),
    }
}

pub(super) fn check_exec(spec: &ExecSpec) -> Result<()> {
    match spec.argv.first() {
        None if spec.tty.is_some() => {}
        None => {
            return Err(Error::invalid("there is no command to run")
                .hint("put it after --: miosa sandbox exec SANDBOX -- sh -lc \"…\""));
        }
        Some(program) if program.is_empty() => return Err(Error::invalid("the command's name is empty")),
        Some(_) => {}
    }
    let nul = |s: &String| s.contains('\0');
    if spec.argv.iter().any(nul) || spec.cwd.iter().any(nul) || spec.user.iter().any(nul) {
        return Err(Error::invalid("a command, directory or user cannot have a NUL byte"));
    }
    if let Some(cwd) = &spec.cwd {
        check_path(cwd)?;
    }
    check_env(&spec.env)
}

/// Refuses names that no environment can hold.
pub(crate) fn check_env(env: &BTreeMap<String, String>) -> Result<()> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(Error::invalid(format!("{name:?} cannot be an environment variable")).hint("write NAME=VALUE"));
        }
    }
    Ok(())
}

/// Guest paths are absolute, and resolved by the guest alone.
pub(super) fn check_path(path: &str) -> Result<String> {
    if !path.starts_with('/') {
        return Err(Error::invalid(format!("the guest path {path:?} is not absolute"))
            .hint("start it with /, for example /workspace/app/page.jsx"));
    }
    if path.len() > MAX_PATH || path.contains('\0') {
        return Err(Error::invalid(format!("a guest path has at most {MAX_PATH} bytes and no NUL")));
    }
    Ok(path.to_owned())
}
