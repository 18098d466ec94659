//! Hearing of state changes as they happen. What happened before is in the record, and nowhere else.

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::Engine;
use super::error::Result;
use super::lifecycle::State;
use super::records::SandboxRecord;
use super::sandbox::Sandbox;

/// Changes kept for a listener that is slow; one that is slower hears of the present state alone.
const KEPT: usize = 256;

/// A sandbox has reached a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StateChange {
    /// Which.
    pub sandbox_id: String,
    /// The state it is in now.
    pub state: State,
    /// Why, if that was not asked for.
    pub last_error: Option<String>,
    /// When this was told.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
}

impl StateChange {
    fn of(record: &SandboxRecord) -> Self {
        let (sandbox_id, last_error) = (record.id.clone(), record.last_error.clone());
        Self { sandbox_id, state: record.state, last_error, at: Timestamp::now() }
    }
}

/// Where changes are told. None is the last: the engine ends.
#[derive(Debug)]
pub(super) struct Changes(broadcast::Sender<Option<StateChange>>);

impl Default for Changes {
    fn default() -> Self {
        Self(broadcast::Sender::new(KEPT))
    }
}

impl Changes {
    pub(super) fn tell(&self, record: &SandboxRecord) {
        // An error says that nobody listens.
        let _ = self.0.send(Some(StateChange::of(record)));
    }

    pub(super) fn end(&self) {
        let _ = self.0.send(None);
    }
}

/// The states of one sandbox: the present one, then each as it comes.
pub struct Watch {
    sandbox: Arc<Sandbox>,
    changes: broadcast::Receiver<Option<StateChange>>,
    begun: bool,
    over: bool,
}

impl Watch {
    /// The next state; none after `destroyed`, and when the engine ends. Safe to cancel.
    pub async fn next(&mut self) -> Option<StateChange> {
        while !self.over {
            let present = || Some(StateChange::of(&self.sandbox.record()));
            let change = match self.begun {
                false => present(),
                true => match self.changes.recv().await {
                    Ok(change) => change,
                    Err(RecvError::Lagged(_)) => present(),
                    Err(RecvError::Closed) => None,
                },
            };
            self.begun = true;
            match change {
                Some(change) if change.sandbox_id == self.sandbox.id() => {
                    self.over = change.state == State::Destroyed;
                    return Some(change);
                }
                Some(_) => {}
                None => self.over = true,
            }
        }
        None
    }
}

impl Engine {
    /// Follows a sandbox's states.
    pub fn watch(&self, key: &str) -> Result<Watch> {
        let sandbox = self.find(key)?;
        self.shared.check_open()?;
        Ok(Watch { sandbox, changes: self.shared.changes.0.subscribe(), begun: false, over: false })
    }
}
