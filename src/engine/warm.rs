//! Kept states of machines that had booted: a session that finds one for its machine does without a boot.
//!
//! A state is good for any disk, network and name; what it depends on is its key ([`WarmKey`]), which names its directory.
//! The first machine of a key boots, and then, in the background, another one does whose state is kept: one at a time, in a
//! boot's slot, yielding the processor. A state that a machine cannot start from is removed, and the machine boots.
//!
//! The directory may be shared by daemons: a state is there whole or not at all, is never changed, and whoever uses it when
//! it is removed has its files open.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use vmm::{ErrorKind, Machine, MachineSpec, WarmKey};

use super::Shared;

/// States that are kept; the one that was not used for longest goes first.
const KEPT_MAX: usize = 8;
/// The longest a machine may take to go on from a state; then it boots.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often in a row keeping a state, or starting from it, may fail before it is left alone, and for how long.
const TRIES: u32 = 2;
const REST: Duration = Duration::from_secs(600);
/// Name of the run directory of the machine whose state is kept. No sandbox has it.
const RUN_DIR: &str = "warm";

/// The kept states.
#[derive(Default)]
pub(super) struct Warm {
    /// Where they are; none: machines boot.
    dir: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What was left by others and is of no use is gone.
    tidied: bool,
    keeping: Option<AbortHandle>,
    troubles: HashMap<WarmKey, Trouble>,
    closed: bool,
}

/// How often something failed in a row, and when it did last.
struct Trouble {
    times: u32,
    at: Instant,
}

impl Warm {
    pub(super) fn new(dir: Option<PathBuf>) -> Self {
        Self { dir, state: Mutex::default() }
    }

    /// Whether machines are to start without a boot.
    pub(super) fn is_on(&self) -> bool {
        self.dir.is_some()
    }

    fn state_of(&self, key: &WarmKey) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.join(format!("{}-{}", key.base, key.shape)))
    }

    /// Nothing is kept any more; what is being made is given up.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        if let Some(keeping) = state.keeping.take() {
            keeping.abort();
        }
    }

    fn trouble(&self, key: &WarmKey) {
        let mut state = self.state.lock();
        let trouble = state.troubles.entry(key.clone()).or_insert(Trouble { times: 0, at: Instant::now() });
        (trouble.times, trouble.at) = (trouble.times + 1, Instant::now());
    }

    fn is_fine(&self, key: &WarmKey) {
        self.state.lock().troubles.remove(key);
    }
}

impl State {
    /// Whether it has failed too often of late.
    fn is_hopeless(&self, key: &WarmKey) -> bool {
        self.troubles.get(key).is_some_and(|trouble| trouble.times >= TRIES && trouble.at.elapsed() < REST)
    }
}

/// Starts a session's machine: from a kept state, or, where there is none or it is of no use, by booting. Then a state is
/// made for the next one.
///
/// # Errors
/// Of the boot.
pub(super) async fn start(shared: &Arc<Shared>, spec: MachineSpec) -> vmm::Result<Arc<dyn Machine>> {
    let key = key_of(shared, &spec).await;
    if let Some(key) = &key
        && let Some(machine) = go_on(shared, &spec, key).await
    {
        return Ok(machine);
    }
    let machine = shared.vmm.start(spec.clone(), shared.settings.boot_deadline).await?;
    if let Some(key) = key {
        want(shared, spec, key);
    }
    Ok(machine)
}

/// What a state for this machine depends on; none if it can only boot.
async fn key_of(shared: &Arc<Shared>, spec: &MachineSpec) -> Option<WarmKey> {
    let dir = shared.warm.dir.clone()?;
    let key = match shared.vmm.warm_key(spec).await {
        Ok(key) => key,
        Err(error) => {
            tracing::debug!(machine = %spec.id, %error, "this machine can only boot");
            return None;
        }
    };
    if !std::mem::replace(&mut shared.warm.state.lock().tidied, true) {
        let base = key.base.clone();
        let _ = tokio::task::spawn_blocking(move || tidy(&dir, &base)).await;
    }
    Some(key)
}

/// The machine, if there is a state that it can start from.
async fn go_on(shared: &Arc<Shared>, spec: &MachineSpec, key: &WarmKey) -> Option<Arc<dyn Machine>> {
    let state = shared.warm.state_of(key)?;
    if !is_there(&state) {
        return None;
    }
    // The one that was not used for longest is the one that goes.
    let _ = File::open(&state).and_then(|dir| dir.set_modified(SystemTime::now()));
    let warm = MachineSpec { warm: Some(state.clone()), ..spec.clone() };
    match shared.vmm.start(warm, shared.settings.boot_deadline.min(PATIENCE)).await {
        Ok(machine) => {
            shared.warm.is_fine(key);
            Some(machine)
        }
        Err(error) => {
            tracing::warn!(machine = %spec.id, %error, "a machine did not go on from the kept state; it boots");
            // What the guest itself says is of its disk, and not of the state.
            if !matches!(error.kind, ErrorKind::Guest(_)) {
                shared.warm.trouble(key);
                remove(state).await;
            }
            None
        }
    }
}

/// Has a state made for machines as this one, unless there is one, or one is being made.
fn want(shared: &Arc<Shared>, spec: MachineSpec, key: WarmKey) {
    let Some(to) = shared.warm.state_of(&key) else { return };
    let mut state = shared.warm.state.lock();
    if state.closed || state.keeping.is_some() || state.is_hopeless(&key) || is_there(&to) {
        return;
    }
    let shared = shared.clone();
    // It cannot be over before it is noted: the lock is held.
    let keeping = tokio::spawn(async move {
        keep(&shared, spec, &key, to).await;
        shared.warm.state.lock().keeping = None;
    });
    state.keeping = Some(keeping.abort_handle());
}

async fn keep(shared: &Arc<Shared>, spec: MachineSpec, key: &WarmKey, to: PathBuf) {
    let Ok(_slot) = shared.boots.acquire().await else { return };
    let began = Instant::now();
    let run_dir = shared.settings.run_root.join(RUN_DIR);
    // Other daemons may keep states, too.
    let id = format!("warm-{:08x}", rand::random::<u32>());
    let spec = MachineSpec { id, run_dir: run_dir.clone(), ..spec };
    let kept = shared.vmm.warm(&spec, &to, shared.settings.boot_deadline).await;
    let _ = tokio::fs::remove_dir_all(&run_dir).await;
    match kept {
        Ok(()) => {
            let ms = began.elapsed().as_millis() as u64;
            tracing::info!(state = %to.display(), ms, "machines of this shape start without a boot from now on");
            let _ = tokio::task::spawn_blocking(move || trim(&to)).await;
        }
        Err(error) => {
            tracing::warn!(%error, "no state could be kept for machines to start from; they boot");
            shared.warm.trouble(key);
        }
    }
}

fn is_there(state: &Path) -> bool {
    state.is_dir()
}

async fn remove(state: PathBuf) {
    let removed = tokio::task::spawn_blocking(move || fs::remove_dir_all(&state).map_err(|e| (state, e))).await;
    if let Ok(Err((state, error))) = removed
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(state = %state.display(), %error, "a state of no use could not be removed");
    }
}

/// Removes states of other kernels, initramfs and VMMs than `base`, and what nobody is making any more. Blocks.
fn tidy(dir: &Path, base: &str) {
    for (name, path) in entries(dir) {
        let is_ours = name.starts_with('.') || is_state(&name);
        if is_ours && !name.starts_with(base) && !is_being_made(&path) {
            match fs::remove_dir_all(&path) {
                Ok(()) => tracing::info!(state = %path.display(), "a kept state of no use any more is removed"),
                Err(error) => tracing::warn!(state = %path.display(), %error, "a state of no use could not be removed"),
            }
        }
    }
}

/// Whether another daemon is writing it: that holds a lock on it.
fn is_being_made(path: &Path) -> bool {
    let locked = File::open(path).map(|dir| Flock::lock(dir, FlockArg::LockExclusiveNonblock));
    matches!(locked, Ok(Err((_, nix::errno::Errno::EWOULDBLOCK))))
}

/// Removes the states that were not used for longest, beyond [`KEPT_MAX`]. Blocks.
fn trim(newest: &Path) {
    let Some(dir) = newest.parent() else { return };
    let states = entries(dir).into_iter().filter(|(name, path)| is_state(name) && path != newest);
    let mut states: Vec<_> = states
        .map(|(_, path)| (fs::metadata(&path).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH), path))
        .collect();
    states.sort();
    let more = (states.len() + 1).saturating_sub(KEPT_MAX);
    for (_, path) in states.drain(..more) {
        tracing::info!(state = %path.display(), "a kept state makes room");
        let _ = fs::remove_dir_all(&path);
    }
}

/// Two words of 16 hexadecimal digits.
fn is_state(name: &str) -> bool {
    let is_word = |word: &str| word.len() == 16 && word.bytes().all(|b| b.is_ascii_hexdigit());
    name.split_once('-').is_some_and(|(base, shape)| is_word(base) && is_word(shape))
}

fn entries(dir: &Path) -> Vec<(String, PathBuf)> {
    let found = fs::read_dir(dir).into_iter().flatten().flatten();
    found.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = entries(dir).into_iter().map(|(name, _)| name).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_of_no_use_goes_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, others) = ("00000000000000aa-0000000000000001", "00000000000000bb-0000000000000001");
        for name in [ours, others, ".warm-dead", ".warm-live", "notes", "kernel-6"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let live = File::open(dir.path().join(".warm-live")).unwrap();
        let lock = Flock::lock(live, FlockArg::LockExclusiveNonblock).unwrap();
        tidy(dir.path(), "00000000000000aa");
        assert_eq!(names(dir.path()), [".warm-live", ours, "kernel-6", "notes"]);
        drop(lock);
        tidy(dir.path(), "00000000000000aa");
        assert_eq!(names(dir.path()), [ours, "kernel-6", "notes"]);
    }

    #[test]
    fn the_states_that_were_used_last_stay() {
        let dir = tempfile::tempdir().unwrap();
        let name = |n: u64| format!("00000000000000aa-{n:016x}");
        for n in 0..KEPT_MAX as u64 + 3 {
            let path = dir.path().join(name(n));
            fs::create_dir(&path).unwrap();
            // The first one made was the last one used.
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 - n);
            File::open(&path).unwrap().set_modified(at).unwrap();
        }
        // Except that this is new.
        trim(&dir.path().join(name(KEPT_MAX as u64 + 2)));
        let mut stay: Vec<String> = (0..KEPT_MAX as u64 - 1).map(name).collect();
        stay.push(name(KEPT_MAX as u64 + 2));
        assert_eq!(names(dir.path()), stay);
    }

    #[tokio::test]
    async fn what_fails_again_and_again_is_left_alone_for_a_while() {
        tokio::time::pause();
        let warm = Warm::new(None);
        let key = WarmKey { base: "a".into(), shape: "b".into() };
        let hopeless = || warm.state.lock().is_hopeless(&key);
        warm.trouble(&key);
        assert!(!hopeless(), "once is chance");
        warm.trouble(&key);
        assert!(hopeless());
        tokio::time::advance(REST).await;
        assert!(!hopeless());
        warm.is_fine(&key);
        warm.trouble(&key);
        assert!(!hopeless());
    }
}
