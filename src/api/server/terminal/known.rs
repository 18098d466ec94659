//! Terminals that were made by one request and are opened by another.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::super::answer::ApiError;
use crate::engine::RunningExec;
use crate::engine::records::new_id;

/// How long a terminal waits for its client.
const PATIENCE: Duration = Duration::from_secs(300);
/// Most terminals that wait at once.
const MAX_WAITING: usize = 64;

/// Those that have not ended.
#[derive(Clone, Default)]
pub(in super::super) struct Terminals(Arc<Mutex<HashMap<String, Known>>>);

struct Known {
    sandbox: String,
    made: Instant,
    state: State,
}

enum State {
    /// For its client. Its program waits with it as soon as it has written as much as the guest may send unread.
    Waiting(RunningExec),
    /// Somebody is at it, who hears when this is dropped.
    Attended { _end: oneshot::Sender<()> },
}

/// A terminal for the one who is at it.
pub(super) struct Attended {
    pub(super) exec: RunningExec,
    pub(super) ended: Ended,
    /// Takes it out of those that are known.
    _forget: Option<Forget>,
}

/// Hears when somebody else ends the terminal.
pub(super) struct Ended(Option<oneshot::Receiver<()>>);

struct Forget {
    terminals: Terminals,
    id: String,
}

impl Attended {
    /// One that nobody else can name.
    pub(super) fn unknown(exec: RunningExec) -> Self {
        Self { exec, ended: Ended(None), _forget: None }
    }
}

impl Ended {
    pub(super) async fn wait(&mut self) {
        match &mut self.0 {
            // An error says that the other end was dropped, which is what is waited for.
            Some(end) => drop(end.await),
            None => std::future::pending().await,
        }
    }
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.terminals.0.lock().remove(&self.id);
    }
}

impl Terminals {
    /// Refuses one more when too many wait already.
    pub(super) fn check_room(&self) -> Result<(), ApiError> {
        let waiting = self.0.lock().values().filter(|known| matches!(known.state, State::Waiting(_))).count();
        if waiting < MAX_WAITING {
            return Ok(());
        }
        let message = format!("{MAX_WAITING} terminals wait to be opened already");
        Err(ApiError::new(429, "too_many_terminals", message).hint("open their WebSockets, or end them").retryable())
    }

    /// Keeps a terminal until its client comes, or for as long as one waits; its id.
    pub(super) fn add(&self, sandbox: &str, exec: RunningExec) -> Result<String, ApiError> {
        self.check_room()?;
        let id = new_id("term");
        let known = Known { sandbox: sandbox.to_owned(), made: Instant::now(), state: State::Waiting(exec) };
        self.0.lock().insert(id.clone(), known);
        let (all, waiting) = (self.clone(), id.clone());
        tokio::spawn(async move {
            tokio::time::sleep(PATIENCE).await;
            let mut all = all.0.lock();
            if all.get(&waiting).is_some_and(|known| matches!(known.state, State::Waiting(_))) {
                all.remove(&waiting);
            }
        });
        Ok(id)
    }

    /// The one that is named, or the newest one of the sandbox that waits, if there is any.
    pub(super) fn attend(&self, sandbox: &str, id: Option<&str>) -> Result<Option<Attended>, ApiError> {
        let mut all = self.0.lock();
        let id = match id {
            Some(id) => id.to_owned(),
            None => {
                let waits = |known: &Known| known.sandbox == sandbox && matches!(known.state, State::Waiting(_));
                let newest = all.iter().filter(|(_, known)| waits(known)).max_by_key(|(_, known)| known.made);
                let Some((id, _)) = newest else { return Ok(None) };
                id.clone()
            }
        };
        let known = all.get_mut(&id).filter(|known| known.sandbox == sandbox).ok_or_else(|| not_found(&id))?;
        let (end, ended) = oneshot::channel();
        match std::mem::replace(&mut known.state, State::Attended { _end: end }) {
            State::Waiting(exec) => {
                let forget = Some(Forget { terminals: self.clone(), id });
                Ok(Some(Attended { exec, ended: Ended(Some(ended)), _forget: forget }))
            }
            State::Attended { _end } => {
                known.state = State::Attended { _end };
                Err(ApiError::new(409, "terminal_in_use", format!("somebody is at the terminal {id} already"))
                    .hint("make another one: POST …/terminal"))
            }
        }
    }

    /// Hangs up.
    pub(super) fn end(&self, sandbox: &str, id: &str) -> Result<(), ApiError> {
        let mut all = self.0.lock();
        match all.get(id).is_some_and(|known| known.sandbox == sandbox) {
            true => {
                all.remove(id);
                Ok(())
            }
            false => Err(not_found(id)),
        }
    }
}

fn not_found(id: &str) -> ApiError {
    ApiError::new(404, "terminal_not_found", format!("the sandbox has no terminal {id:?}"))
        .hint("one that nobody opens within five minutes ends; make another one: POST …/terminal")
}
