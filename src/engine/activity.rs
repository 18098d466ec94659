//! When a sandbox was last used. Monotonic time alone: a wall clock that jumps ends no session.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

/// The idle clock of one sandbox.
#[derive(Debug)]
pub(super) struct Activity {
    state: Mutex<State>,
    ended: Notify,
}

#[derive(Debug)]
struct State {
    last: Instant,
    in_use: usize,
}

/// A use that lasts, such as a running program or a file on its way: the sandbox is not idle until this is dropped.
#[derive(Debug)]
pub struct InUse(Arc<Activity>);

impl Default for Activity {
    fn default() -> Self {
        Self { state: Mutex::new(State { last: Instant::now(), in_use: 0 }), ended: Notify::new() }
    }
}

impl Activity {
    /// It is used now.
    pub(super) fn touch(&self) {
        self.state.lock().last = Instant::now();
    }

    /// It is used from now on.
    pub(super) fn begin(self: &Arc<Self>) -> InUse {
        self.state.lock().in_use += 1;
        InUse(self.clone())
    }

    /// When it will have been idle for `limit`; never while it is in use.
    pub(super) fn idle_at(&self, limit: Duration) -> Option<Instant> {
        let state = self.state.lock();
        if state.in_use > 0 { None } else { state.last.checked_add(limit) }
    }

    /// Waits for the end of a use. One that ended since the last wait counts.
    pub(super) async fn use_ended(&self) {
        self.ended.notified().await;
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.in_use -= 1;
        state.last = Instant::now();
        if state.in_use == 0 {
            self.0.ended.notify_one();
        }
    }
}
