//! Programs that run on their own: no stream holds them, and the end of their output is kept for whoever asks.
//!
//! Each has a [`Stream`] of its own like a program of the host's, but what it writes goes into a [`Log`]. They end with
//! the guest; a new host finds those of the host before it.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::{Sink, Stream, System, Waited, exec, thread};
use crate::wire::{AgentError, CommandStatus, ErrorKind, ExecRequest, ExitStatus, KILL_GRACE_MS, Kind};

/// Most commands that are known at once; the oldest that has ended makes room.
const MAX_COMMANDS: usize = 64;
/// Most bytes of a command's output that are kept, the last ones.
const LOG_BYTES: usize = 256 * 1024;
/// What a part of the output counts beside its bytes, so that many small ones are bounded, too.
const PART_COST: usize = 64;
/// Most characters of a command's name and line that are told.
const SHOWN: usize = 200;

/// The commands of this guest, oldest first.
#[derive(Default)]
pub(super) struct Commands {
    known: Mutex<VecDeque<Arc<Detached>>>,
}

struct Detached {
    id: String,
    name: Option<String>,
    command: String,
    pid: i32,
    started_nanos: u64,
    stream: Arc<Stream>,
    log: Arc<Log>,
}

impl Detached {
    fn status(&self) -> CommandStatus {
        let log = self.log.state.lock();
        CommandStatus {
            id: self.id.clone(),
            name: self.name.clone(),
            pid: self.pid,
            command: self.command.clone(),
            started_nanos: self.started_nanos,
            ended: log.ended,
            output_bytes: log.end,
            dropped_bytes: log.first,
        }
    }
}

impl Commands {
    pub(super) fn list(&self) -> Vec<CommandStatus> {
        self.known.lock().iter().map(|command| command.status()).collect()
    }

    /// Kills those that run.
    pub(super) fn end_all(&self) {
        self.known.lock().iter().for_each(|command| command.stream.cancel());
    }

    fn find(&self, id: &str) -> Result<Arc<Detached>, AgentError> {
        let known = self.known.lock();
        let found = known.iter().find(|command| command.id == id).cloned();
        found.ok_or_else(|| AgentError::new(ErrorKind::NotFound, format!("no command {id:?}")))
    }

    fn add(&self, command: Arc<Detached>) {
        self.known.lock().push_back(command);
    }

    /// Room for one more.
    fn make_room(&self, id: &str) -> Result<(), AgentError> {
        let mut known = self.known.lock();
        if known.iter().any(|command| command.id == id) {
            return Err(AgentError::new(ErrorKind::Invalid, format!("there is a command {id:?} already")));
        }
        if known.len() < MAX_COMMANDS {
            return Ok(());
        }
        let ended = known.iter().position(|command| command.log.state.lock().ended.is_some());
        match ended {
            Some(at) => drop(known.remove(at)),
            None => {
                let message = format!("{MAX_COMMANDS} detached commands run already");
                return Err(AgentError::new(ErrorKind::Busy, message));
            }
        }
        Ok(())
    }
}

/// Starts a program; a thread of its own watches it.
pub(super) fn start(
    system: &Arc<dyn System>,
    id: String,
    name: Option<String>,
    request: ExecRequest,
) -> Result<CommandStatus, AgentError> {
    if id.is_empty() || id.len() > 64 || request.stdin {
        return Err(AgentError::new(ErrorKind::Invalid, "a command needs an id of 1 to 64 bytes and has no input"));
    }
    system.children().commands.make_room(&id)?;
    let log = Arc::new(Log::default());
    let stream = Arc::new(Stream::new(0, Sink::Kept(log.clone())));
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let watcher = system.clone();
    thread("agent-command", move || {
        let started = exec::start(&*watcher, &stream, &request);
        let command = started.as_ref().map(|started| Detached {
            id,
            name: name.as_deref().map(beginning),
            command: beginning(&request.argv.join(" ")),
            pid: started.pid(),
            started_nanos: now(),
            stream: stream.clone(),
            log: log.clone(),
        });
        let status = command.map(|command| {
            let command = Arc::new(command);
            watcher.children().commands.add(command.clone());
            command.status()
        });
        let _ = tell.send(status.map_err(Clone::clone));
        if let Ok(started) = started {
            let unknown = ExitStatus { code: None, signal: None, timed_out: false };
            log.end(exec::watch(&*watcher, &stream, started).unwrap_or(unknown));
        }
    })
    .map_err(|e| AgentError::io("the guest cannot start a thread", &e))?;
    told.recv().unwrap_or_else(|_| Err(AgentError::new(ErrorKind::Io, "the command's thread ended")))
}

/// Sends what is kept of a program's output, and with `follow` what comes until its end.
pub(super) fn logs(
    system: &dyn System,
    stream: &Arc<Stream>,
    id: &str,
    follow: bool,
) -> Result<CommandStatus, AgentError> {
    let command = system.children().commands.find(id)?;
    command.log.follow(stream);
    let mut at = 0;
    loop {
        while let Some((kind, bytes, next)) = command.log.after(at) {
            stream.send(kind, &bytes)?;
            at = next;
        }
        let more = |at| command.log.state.lock().end > at;
        let ended = || command.log.state.lock().ended.is_some();
        // Asked in this order: nothing is written after the end.
        if (!follow || ended()) && !more(at) {
            return Ok(command.status());
        }
        stream.wait_for(|| more(at) || ended())?;
    }
}

pub(super) fn kill(system: &dyn System, id: &str, signal: Option<i32>) -> Result<CommandStatus, AgentError> {
    let children = system.children();
    let command = children.commands.find(id)?;
    match signal {
        Some(signal) if !(1..=libc::SIGRTMAX()).contains(&signal) => {
            return Err(AgentError::new(ErrorKind::Invalid, format!("there is no signal {signal}")));
        }
        Some(signal) => children.signal_group(command.pid, signal),
        None => {
            let until = Instant::now() + Duration::from_millis(KILL_GRACE_MS);
            // Only a program that has not ended still owns its number.
            if matches!(command.stream.wait_exit(Some(Instant::now()), false), Waited::TimedOut) {
                children.signal_group(command.pid, libc::SIGTERM);
            }
            if !command.log.wait_end(until) {
                command.stream.cancel();
                command.log.wait_end(Instant::now() + Duration::from_millis(KILL_GRACE_MS));
            }
        }
    }
    Ok(command.status())
}

fn beginning(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// The end of a program's output. Positions count the bytes it has written.
#[derive(Default)]
pub(super) struct Log {
    state: Mutex<State>,
    changed: parking_lot::Condvar,
}

#[derive(Default)]
struct State {
    parts: VecDeque<(Kind, Vec<u8>)>,
    cost: usize,
    /// Of the first byte that is kept.
    first: u64,
    /// Behind the last one.
    end: u64,
    ended: Option<(u64, ExitStatus)>,
    followers: Vec<Weak<Stream>>,
}

impl Log {
    /// Keeps bytes; the oldest make room.
    pub(super) fn add(&self, kind: Kind, bytes: &[u8]) {
        let mut state = self.state.lock();
        match state.parts.back_mut() {
            Some((last, kept)) if *last == kind && kept.len() + bytes.len() <= LOG_BYTES / 16 => {
                kept.extend_from_slice(bytes);
            }
            _ => {
                state.parts.push_back((kind, bytes.to_vec()));
                state.cost += PART_COST;
            }
        }
        state.cost += bytes.len();
        state.end += bytes.len() as u64;
        while state.cost > LOG_BYTES
            && let Some((_, dropped)) = state.parts.pop_front()
        {
            state.cost -= dropped.len() + PART_COST;
            state.first += dropped.len() as u64;
        }
        self.tell(state);
    }

    fn end(&self, status: ExitStatus) {
        let mut state = self.state.lock();
        state.ended = Some((now(), status));
        self.tell(state);
    }

    /// Wakes who waits. Not under the lock: a follower looks at the log under its own.
    fn tell(&self, mut state: parking_lot::MutexGuard<'_, State>) {
        let followers: Vec<_> = state.followers.iter().filter_map(Weak::upgrade).collect();
        state.followers.retain(|follower| follower.strong_count() > 0);
        drop(state);
        self.changed.notify_all();
        followers.iter().for_each(|follower| follower.wake());
    }

    fn follow(&self, stream: &Arc<Stream>) {
        self.state.lock().followers.push(Arc::downgrade(stream));
    }

    /// What is kept from `at` on, of one kind, and the position behind it.
    fn after(&self, at: u64) -> Option<(Kind, Vec<u8>, u64)> {
        let state = self.state.lock();
        let mut position = state.first;
        for (kind, bytes) in &state.parts {
            let end = position + bytes.len() as u64;
            if end > at {
                let from = at.saturating_sub(position) as usize;
                return Some((*kind, bytes[from..].to_vec(), end));
            }
            position = end;
        }
        None
    }

    /// Waits for the program's end; false when `until` comes first.
    fn wait_end(&self, until: Instant) -> bool {
        let mut state = self.state.lock();
        while state.ended.is_none() {
            if self.changed.wait_until(&mut state, until).timed_out() {
                return state.ended.is_some();
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_output_is_kept_in_bounded_memory() {
        let log = Log::default();
        for i in 0..100_000u32 {
            log.add(if i % 2 == 0 { Kind::Data } else { Kind::ErrData }, &[i as u8]);
        }
        let state = log.state.lock();
        assert_eq!(state.end, 100_000);
        assert!(state.cost <= LOG_BYTES && state.parts.len() <= LOG_BYTES / PART_COST);
        assert_eq!(state.first + state.parts.iter().map(|(_, b)| b.len() as u64).sum::<u64>(), state.end);
        drop(state);
        let (kind, bytes, next) = log.after(99_999).unwrap();
        assert_eq!((kind, bytes, next), (Kind::ErrData, vec![99_999u32 as u8], 100_000));
        assert!(log.after(100_000).is_none());
    }

    #[test]
    fn a_reader_goes_on_where_it_was() {
        let log = Log::default();
        log.add(Kind::Data, b"one ");
        assert_eq!(log.after(0), Some((Kind::Data, b"one ".to_vec(), 4)));
        log.add(Kind::Data, b"two");
        assert_eq!(log.after(4), Some((Kind::Data, b"two".to_vec(), 7)));
        log.add(Kind::Data, &vec![b'x'; LOG_BYTES]);
        assert_eq!(log.after(4), None, "a part that is larger than the bound is not kept");
        assert_eq!(log.state.lock().first, LOG_BYTES as u64 + 7);
    }
}
