//! A few threads that help: they read ahead, decode parts of large reads, and compress when writers would soon have to wait.
//!
//! Help is not relied upon. A job that is refused, or has not begun yet, is work that whoever wants it does himself when he
//! gets there; so one whose helpers are all busy is as fast as one without any.

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Jobs that may wait. What is offered beyond that is refused: it would come too late to help.
const QUEUE: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

/// See the module. The threads begin with the first job.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads_max: usize,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    offered: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: Vec<JoinHandle<()>>,
    idle: usize,
    stopped: bool,
}

impl Default for Workers {
    /// As many threads as the host runs at once.
    fn default() -> Self {
        let threads_max = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self { shared: Arc::default(), threads_max }
    }
}

impl Workers {
    /// Threads that can help at once.
    pub fn count(&self) -> usize {
        self.threads_max
    }

    /// Has `job` run soon, unless there is too much to do already.
    pub fn offer(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        if state.stopped || state.jobs.len() >= QUEUE {
            return;
        }
        state.jobs.push_back(Box::new(job));
        if state.idle < state.jobs.len() && state.threads.len() < self.threads_max {
            let shared = self.shared.clone();
            match std::thread::Builder::new().name("help".into()).spawn(move || run(&shared)) {
                Ok(thread) => state.threads.push(thread),
                Err(e) => tracing::warn!("cannot start a thread that helps: {e}"),
            }
        }
        self.shared.offered.notify_one();
    }

    /// Drops what waits, and returns when no job runs any more. From here on all are refused.
    pub fn stop(&self) {
        let threads = {
            let mut state = self.shared.state.lock();
            state.stopped = true;
            state.jobs.clear();
            self.shared.offered.notify_all();
            std::mem::take(&mut state.threads)
        };
        for thread in threads {
            // The thread itself may be the one that drops the store last.
            if thread.thread().id() != std::thread::current().id() {
                drop(thread.join());
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(shared: &Shared) {
    let mut state = shared.state.lock();
    while !state.stopped {
        match state.jobs.pop_front() {
            Some(job) => {
                drop(state);
                job();
                state = shared.state.lock();
            }
            None => {
                state.idle += 1;
                shared.offered.wait(&mut state);
                state.idle -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn jobs_run_and_none_after_the_stop() {
        let workers = Workers::default();
        let (sender, receiver) = mpsc::channel();
        for i in 0..QUEUE {
            let sender = sender.clone();
            workers.offer(move || sender.send(i).expect("the test listens"));
        }
        let mut ran: Vec<_> = receiver.iter().take(QUEUE).collect();
        ran.sort_unstable();
        assert_eq!(ran, (0..QUEUE).collect::<Vec<_>>());
        workers.stop();
        workers.offer(move || sender.send(0).expect("the test listens"));
        assert!(receiver.recv().is_err(), "refused, and the job with its sender dropped");
    }

    #[test]
    fn what_comes_too_fast_is_refused() {
        let workers = Workers::default();
        let gate = Arc::new(Mutex::new(()));
        let closed = gate.lock();
        for _ in 0..10 * QUEUE {
            let gate = gate.clone();
            workers.offer(move || drop(gate.lock()));
        }
        let held = Arc::strong_count(&gate) - 1;
        assert!(held <= QUEUE + workers.count(), "{held} jobs are held");
        drop(closed);
    }
}
