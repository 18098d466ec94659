//! A freeze that cannot outlive its host: a thread thaws when its time is over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::System;
use crate::wire::{AgentError, ErrorKind, MAX_FREEZE_MS};

pub(super) struct Freezer {
    system: Arc<dyn System>,
    /// When to thaw, while frozen. Held over the system calls, so that a freeze and a thaw never cross.
    thaw_at: Mutex<Option<Instant>>,
    changed: Condvar,
}

impl Freezer {
    pub(super) fn start(system: Arc<dyn System>) -> std::io::Result<Arc<Freezer>> {
        let freezer = Arc::new(Freezer { system, thaw_at: Mutex::new(None), changed: Condvar::new() });
        let weak = Arc::downgrade(&freezer);
        super::thread("agent-thaw", move || {
            // Wakes once in a while to see whether its server is still there.
            while let Some(freezer) = weak.upgrade() {
                freezer.thaw_when_due(Duration::from_secs(5));
            }
        })?;
        Ok(freezer)
    }

    fn thaw_when_due(&self, patience: Duration) {
        let mut thaw_at = self.thaw_at.lock();
        let now = Instant::now();
        match *thaw_at {
            Some(at) if at <= now => {
                self.system.log("nobody thawed the file system in time: thawing it");
                if let Err(error) = self.thaw_locked(&mut thaw_at) {
                    self.system.log(&error.message);
                    *thaw_at = Some(now + Duration::from_secs(1));
                }
            }
            Some(at) => drop(self.changed.wait_until(&mut thaw_at, at)),
            None => drop(self.changed.wait_for(&mut thaw_at, patience)),
        }
    }

    pub(super) fn freeze(&self, auto_thaw_ms: u64) -> Result<(), AgentError> {
        if auto_thaw_ms == 0 {
            return Err(AgentError::new(ErrorKind::Invalid, "a freeze needs a time after which it ends by itself"));
        }
        let mut thaw_at = self.thaw_at.lock();
        if thaw_at.is_none() {
            self.system.freeze()?;
        }
        *thaw_at = Some(Instant::now() + Duration::from_millis(auto_thaw_ms.min(MAX_FREEZE_MS)));
        self.changed.notify_all();
        Ok(())
    }

    /// False when it was not frozen.
    pub(super) fn thaw(&self) -> Result<bool, AgentError> {
        let mut thaw_at = self.thaw_at.lock();
        let was_frozen = thaw_at.is_some();
        if was_frozen {
            self.thaw_locked(&mut thaw_at)?;
        }
        Ok(was_frozen)
    }

    pub(super) fn thaw_if_frozen(&self) {
        if let Err(error) = self.thaw() {
            self.system.log(&error.message);
        }
    }

    fn thaw_locked(&self, thaw_at: &mut Option<Instant>) -> Result<(), AgentError> {
        self.system.thaw()?;
        *thaw_at = None;
        Ok(())
    }
}
