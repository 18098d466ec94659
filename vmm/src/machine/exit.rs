//! The end of a machine: told once, heard by any number of waiters.

use tokio::sync::watch;

use super::ExitReason;

#[derive(Debug)]
pub(crate) struct Exit {
    reason: watch::Sender<Option<ExitReason>>,
}

impl Exit {
    pub(crate) fn new() -> Exit {
        Exit { reason: watch::Sender::new(None) }
    }

    /// Tells the reason; only the first counts.
    pub(crate) fn tell(&self, reason: ExitReason) {
        self.reason.send_if_modified(|told| {
            let first = told.is_none();
            if first {
                *told = Some(reason);
            }
            first
        });
    }

    pub(crate) fn told(&self) -> Option<ExitReason> {
        self.reason.borrow().clone()
    }

    pub(crate) async fn wait(&self) -> ExitReason {
        let mut told = self.reason.subscribe();
        let lost = || ExitReason::Failed { message: "nobody watches the machine any more".into() };
        match told.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_else(lost),
            Err(_) => lost(),
        }
    }
}
