//! `miosa sandbox shell` and `miosa sandbox exec --tty`: this terminal becomes the sandbox's.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use nix::libc;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use serde_json::{Map, json};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::{ExecArgs, ShellArgs, Surroundings};
use super::exec::{pass_on, refusal, stdin_pieces};
use super::output::{Failure, Result};
use super::sandbox::path;
use crate::api::client::{Client, Message, SocketSender};
use crate::api::types::{Command, TerminalBody, TerminalRequestBody};

/// The daemon shows every 15 seconds that it is there.
const PATIENCE: Duration = Duration::from_secs(60);

/// The exit code of a terminal that was hung up, as of SIGHUP.
const HUNG_UP: u8 = 128 + 1;

nix::ioctl_read_bad!(get_size, libc::TIOCGWINSZ, libc::winsize);

pub(super) async fn shell(client: &Client, args: ShellArgs) -> Result<ExitCode> {
    run(client, &args.target.sandbox, wanted(args.surroundings, None), true).await
}

pub(super) async fn exec(client: &Client, args: ExecArgs) -> Result<ExitCode> {
    let typed = args.interactive || !std::io::stdin().is_terminal();
    let command = Some(Command::Argv(args.command));
    run(client, &args.target.sandbox, wanted(args.surroundings, command), typed).await
}

/// A terminal as large as this one; without a command, with a login shell.
fn wanted(Surroundings { cwd, env: given, user }: Surroundings, command: Option<Command>) -> TerminalRequestBody {
    let (rows, cols) = size().unzip();
    let other = Map::new();
    TerminalRequestBody { command, cwd, env: Some(env(given)), user, rows, cols, other, ..Default::default() }
}

/// With the kind of this terminal.
fn env(given: Vec<(String, String)>) -> std::collections::BTreeMap<String, String> {
    let term = std::env::var("TERM").ok().filter(|term| !term.is_empty()).map(|term| ("TERM".to_owned(), term));
    term.into_iter().chain(given).collect()
}

/// Runs the program on a terminal of the sandbox. `typed` says whether it gets what is typed here.
async fn run(client: &Client, sandbox: &str, wanted: TerminalRequestBody, typed: bool) -> Result<ExitCode> {
    let resized = signal(SignalKind::window_change())?;
    let interrupt = (!typed).then(|| signal(SignalKind::interrupt())).transpose()?;
    let made: TerminalBody = client.post(&path(sandbox, "/terminal"), &wanted).await?;
    let (to, from) = client.socket(&made.stream_path).await?.split();
    let raw = if typed { Raw::begin()? } else { None };
    both(show(from), send(to, typed, raw.is_some(), resized, interrupt)).await
}

/// Beside each other: a program that shows much and reads nothing holds up what is typed, and only that. A daemon that
/// takes nothing more has said why, or will be missed: that is for the one who listens to tell.
async fn both(
    show: impl Future<Output = Result<ExitCode>>,
    send: impl Future<Output = std::result::Result<ExitCode, SendFailure>>,
) -> Result<ExitCode> {
    let sent = async {
        match send.await {
            Ok(code) => Ok(code),
            Err(SendFailure::Here(failure)) => Err(failure),
            Err(SendFailure::NotTaken) => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = show => ended,
        ended = sent => ended,
    }
}

/// Why no more is sent.
enum SendFailure {
    /// What is typed cannot be read.
    Here(Failure),
    /// The connection takes nothing more.
    NotTaken,
}

/// Shows what comes, until the program's end.
async fn show(mut from: impl Stream<Item = crate::api::client::Result<Message>> + Unpin) -> Result<ExitCode> {
    while let Ok(Some(message)) = tokio::time::timeout(PATIENCE, from.next()).await {
        match message? {
            Message::Data(bytes) => pass_on(std::io::stdout().lock(), &bytes)?,
            Message::Control(value) => match value["type"].as_str() {
                Some("exit") => {
                    let code = value["exit_code"].as_i64().and_then(|code| u8::try_from(code).ok());
                    return Ok(ExitCode::from(code.unwrap_or(u8::MAX)));
                }
                Some("error") => return Err(refusal(&value)),
                _ => {}
            },
            Message::Alive => {}
        }
    }
    Err(Failure::new(2, "connection_broken", "the terminal's connection broke off")
        .hint("see whether the sandbox still runs: miosa sandbox show SANDBOX"))
}

/// Sends what is typed and what else there is to say. Returns when nobody wants it, or to hang up.
async fn send(
    mut to: SocketSender,
    typed: bool,
    escapes: bool,
    mut resized: Signal,
    mut interrupt: Option<Signal>,
) -> std::result::Result<ExitCode, SendFailure> {
    let mut input = typed.then(|| Box::pin(stdin_pieces()));
    let mut escape = escapes.then(Escape::default);
    // It may have changed since the terminal was asked for.
    let mut message = size_now();
    loop {
        if let Some(message) = message.take() {
            to.send(message).await.map_err(|_| SendFailure::NotTaken)?;
        }
        message = tokio::select! {
            piece = next(&mut input) => match (piece.transpose().map_err(|e| SendFailure::Here(e.into()))?, &mut escape) {
                (Some(piece), None) => Some(Message::Data(piece)),
                (Some(piece), Some(escape)) => match escape.pass(&piece) {
                    Some(rest) => (!rest.is_empty()).then(|| Message::Data(rest.into())),
                    None => return Ok(ExitCode::from(HUNG_UP)),
                },
                (None, _) => {
                    input = None;
                    Some(Message::Control(json!({ "type": "eof" })))
                }
            },
            _ = resized.recv() => size_now(),
            // The key, for this terminal is not raw.
            () = next_signal(&mut interrupt) => Some(Message::Control(json!({ "type": "signal", "signal": "INT" }))),
        };
    }
}

fn size_now() -> Option<Message> {
    size().map(|(rows, cols)| Message::Control(json!({ "type": "resize", "rows": rows, "cols": cols })))
}

/// What comes next; nothing ever where nothing is.
async fn next<T>(from: &mut Option<impl Stream<Item = T> + Unpin>) -> Option<T> {
    match from {
        Some(from) => from.next().await,
        None => std::future::pending().await,
    }
}

async fn next_signal(from: &mut Option<Signal>) {
    match from {
        Some(from) => drop(from.recv().await),
        None => std::future::pending().await,
    }
}

/// Of the terminal that is looked at.
fn size() -> Option<(u16, u16)> {
    [libc::STDOUT_FILENO, libc::STDIN_FILENO, libc::STDERR_FILENO].into_iter().find_map(|fd| {
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the kernel writes the structure it is given; a descriptor that is closed or no terminal is an error.
        unsafe { get_size(fd, &mut size) }.ok()?;
        (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
    })
}

/// Standard input's terminal, raw until this is dropped, also by a panic. A signal that ends this program puts it back
/// first, even if nobody reads our output.
struct Raw {
    before: Termios,
    watch: tokio::task::JoinHandle<()>,
}

impl Raw {
    /// None where standard input is no terminal.
    fn begin() -> Result<Option<Raw>> {
        if !std::io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(std::io::stdin()).map_err(std::io::Error::from)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        let kinds = [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt(), SignalKind::quit()];
        let watches = kinds.map(|kind| Ok((kind, signal(kind)?)));
        let watches = watches.into_iter().collect::<std::io::Result<Vec<_>>>()?;
        tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, &raw).map_err(std::io::Error::from)?;
        let after = before.clone();
        let watch = tokio::spawn(async move {
            let came = watches.into_iter().map(|(kind, mut signal)| {
                Box::pin(async move {
                    signal.recv().await;
                    kind.as_raw_value()
                })
            });
            let (signal, ..) = futures_util::future::select_all(came).await;
            put_back(&after);
            std::process::exit(128 + signal);
        });
        Ok(Some(Raw { before, watch }))
    }
}

/// Does not wait for what is still to be shown: nobody may look.
fn put_back(settings: &Termios) {
    let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, settings);
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.watch.abort();
        put_back(&self.before);
    }
}

/// Finds `~.` at the beginning of a line, which hangs up, for no key does: they are all the guest's. `~~` is one tilde.
struct Escape {
    line_begins: bool,
    held: bool,
}

impl Default for Escape {
    fn default() -> Self {
        Self { line_begins: true, held: false }
    }
}

impl Escape {
    /// What is to be sent of this; none to hang up.
    fn pass(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut sent = Vec::with_capacity(bytes.len() + 1);
        for &byte in bytes {
            match (std::mem::take(&mut self.held), byte) {
                (true, b'.') => return None,
                (true, b'~') => {}
                (true, _) => sent.push(b'~'),
                (false, b'~') if self.line_begins => {
                    self.held = true;
                    continue;
                }
                (false, _) => {}
            }
            self.line_begins = matches!(byte, b'\r' | b'\n');
            sent.push(byte);
        }
        Some(sent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_daemon_that_takes_nothing_more_is_heard_to_the_end() {
        let show = async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok(ExitCode::from(3))
        };
        let ended = both(show, std::future::ready(Err(SendFailure::NotTaken))).await;
        assert_eq!(ended.ok(), Some(ExitCode::from(3)));
    }

    #[test]
    fn a_tilde_and_a_dot_at_the_beginning_of_a_line_hang_up() {
        let passed = |pieces: &[&[u8]]| {
            let mut escape = Escape::default();
            let passed = pieces.iter().map(|piece| escape.pass(piece)).collect::<Option<Vec<_>>>();
            passed.map(|sent| String::from_utf8(sent.concat()).unwrap())
        };
        assert_eq!(passed(&[b"~."]), None);
        assert_eq!(passed(&[b"ls\r~", b"."]), None);
        assert_eq!(passed(&[b"cd ~.\r"]).as_deref(), Some("cd ~.\r"));
        assert_eq!(passed(&[b"~/bin\r~", b"x"]).as_deref(), Some("~/bin\r~x"));
        assert_eq!(passed(&[b"~~.\r"]).as_deref(), Some("~.\r"));
    }
}
