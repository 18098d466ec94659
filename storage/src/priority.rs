//! Background work yields the processor to reads and writes: sealing and collection run at a lower priority while there
//! is room in the log for what comes meanwhile.

use crate::inner::Inner;
use nix::libc::{PRIO_PROCESS, getpriority, setpriority};
use std::cell::Cell;
use std::sync::OnceLock;

/// Added to the niceness of a thread that works in the background: about a tenth of a contended core's time.
const NICER_BY: i32 = 10;
/// The nicest there is.
const NICEST: i32 = 19;

/// This thread works in the background for as long as the value lives.
///
/// A lowered thread that holds a lock can be kept from letting go of it, so it is not for sections that hold the
/// registry. Nothing is lowered where the thread could not return: that takes CAP_SYS_NICE or a limit on niceness.
pub(crate) struct Background<'a> {
    inner: &'a Inner,
    before: Option<i32>,
    lowered: Cell<bool>,
}

impl<'a> Background<'a> {
    pub fn begin(inner: &'a Inner) -> Self {
        let background = Self { inner, before: may_return().then(niceness), lowered: Cell::new(false) };
        background.pace();
        background
    }

    /// To be called now and then: the more urgent the work has become, the less it yields.
    pub fn pace(&self) {
        let Some(before) = self.before else { return };
        let calm = !self.inner.pressed();
        if calm != self.lowered.get() && set_niceness(if calm { lower(before) } else { before }) {
            self.lowered.set(calm);
        }
    }
}

impl Drop for Background<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before.filter(|_| self.lowered.get())
            && !set_niceness(before)
        {
            tracing::warn!("a thread stays at a lower priority: the limit on niceness was taken away");
        }
    }
}

fn lower(before: i32) -> i32 {
    (before + NICER_BY).min(NICEST)
}

/// Of the calling thread: Linux has it by thread.
fn niceness() -> i32 {
    // SAFETY: a plain system call, which cannot fail for the calling thread.
    unsafe { getpriority(PRIO_PROCESS, 0) }
}

fn set_niceness(to: i32) -> bool {
    // SAFETY: a plain system call on the calling thread.
    unsafe { setpriority(PRIO_PROCESS, 0, to) == 0 }
}

/// Whether a thread that was lowered may go back to where it was. Found out once, with a thread that can be lost.
fn may_return() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        let before = niceness();
        let trial = std::thread::Builder::new()
            .name("priority".into())
            .spawn(move || set_niceness(lower(before)) && set_niceness(before));
        trial.ok().and_then(|thread| thread.join().ok()).unwrap_or(false)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Options, Store};

    #[test]
    fn a_thread_yields_until_the_log_fills_and_returns_to_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { background: false, log_bytes: 1 << 20, log_bytes_max: 3 << 20, ..Options::default() };
        let store = Store::open(dir.path(), options).unwrap();
        let mut tx = store.begin();
        let id = tx.create_disk("disk", 1 << 30);
        tx.commit_durable().unwrap();
        let disk = store.disk(id).unwrap();
        let before = niceness();
        let low = if may_return() { lower(before) } else { before };
        {
            let background = Background::begin(store.inner());
            assert_eq!(niceness(), low);
            disk.write(0, &vec![1; 3 << 20]).unwrap();
            background.pace();
            assert_eq!(niceness(), before);
            store.seal().unwrap();
            background.pace();
            assert_eq!(niceness(), low);
        }
        assert_eq!(niceness(), before);
    }
}
