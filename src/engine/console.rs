//! The guest's console: its end, and what comes.

use std::time::Duration;

use bytes::Bytes;
use vmm::ConsoleReader;

use super::error::{Error, Kind, Result};
use super::lifecycle::State;
use super::sandbox::Sandbox;
use super::{Engine, Watch};

/// How often a console that is followed is looked at.
const PAUSE: Duration = Duration::from_millis(200);

impl Engine {
    /// The end of the guest's console, of this session or, at rest, of the last one of this daemon's. Without control
    /// characters and sequences.
    pub async fn console(&self, key: &str, max_bytes: usize) -> Result<String> {
        let sandbox = self.find(key)?;
        check(&sandbox)?;
        let owner = sandbox.own().await;
        Ok(match &owner.session {
            Some(session) => session.machine.console_tail(max_bytes),
            None => owner.last_console.clone(),
        })
    }

    /// The same, byte for byte and then with what comes until the session's end. Looking is no use of the sandbox.
    pub async fn follow_console(&self, key: &str, max_bytes: usize) -> Result<Console> {
        let sandbox = self.find(key)?;
        check(&sandbox)?;
        let watch = self.watch(key)?;
        let owner = sandbox.own().await;
        let Some(session) = &owner.session else {
            let first = Bytes::from(owner.last_console.clone());
            return Ok(Console { first, reader: None, watch, over: true });
        };
        // A machine may have written nothing yet.
        let reader = ConsoleReader::open(session.machine.console(), max_bytes as u64).ok();
        Ok(Console { first: Bytes::new(), over: reader.is_none(), reader, watch })
    }
}

fn check(sandbox: &Sandbox) -> Result<()> {
    match sandbox.record().state {
        State::Destroyed => {
            Err(Error::new(Kind::SandboxDestroyed, format!("sandbox {} has been destroyed", sandbox.id()))
                .hint("its console is gone with it"))
        }
        _ => Ok(()),
    }
}

/// A guest's console being read.
pub struct Console {
    first: Bytes,
    reader: Option<ConsoleReader>,
    watch: Watch,
    /// Nothing comes any more: what is there is read to its end.
    over: bool,
}

impl Console {
    /// What is there, and no more.
    pub fn without_following(mut self) -> Self {
        self.over = true;
        self
    }

    /// What comes next; none at the session's end. Safe to cancel.
    pub async fn next_piece(&mut self) -> Option<Bytes> {
        loop {
            if !self.first.is_empty() {
                return Some(std::mem::take(&mut self.first));
            }
            let read = self.reader.as_mut().and_then(|reader| reader.read().ok()).unwrap_or_default();
            if !read.is_empty() {
                return Some(read.into());
            }
            if self.over {
                return None;
            }
            tokio::select! {
                () = tokio::time::sleep(PAUSE) => {}
                change = self.watch.next() => {
                    let goes_on = |state| matches!(state, State::Creating | State::Running | State::Snapshotting);
                    self.over = !change.is_some_and(|change| goes_on(change.state));
                }
            }
        }
    }
}
