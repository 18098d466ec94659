//! Sessions that are limited in time. The tests move tokio's clock; nothing here waits for a real timeout.

use std::time::Duration;

use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use miosa::engine::{CreateRequest, ExecSpec, TerminalSize};

use crate::support::{World, refused, sh, wanted};

const HOUR: Duration = Duration::from_secs(3_600);

/// Stops tokio's clock for good: it moves when a test moves it, and not when everybody waits for I/O (which a blocking
/// task that is under way prevents).
struct StoppedClock {
    _end: std::sync::mpsc::Sender<()>,
}

impl StoppedClock {
    fn new() -> Self {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        tokio::time::pause();
        tokio::task::spawn_blocking(move || {
            let _ = ended.recv();
        });
        Self { _end: end }
    }

    async fn advance(&self, by: Duration) {
        tokio::time::advance(by).await;
    }

    /// Sees something through. The clock creeps on meanwhile, a millisecond at a time: even a sleep of no length needs
    /// that.
    async fn through<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let began = std::time::Instant::now();
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = real_moment() => tokio::time::advance(Duration::from_millis(1)).await,
            }
            assert!(began.elapsed() < Duration::from_secs(180), "did not end in three minutes");
        }
    }

    async fn until(&self, w: &World, key: &str, state: State) {
        self.through(async {
            while w.state(key) != state {
                real_moment().await;
            }
        })
        .await;
    }
}

async fn real_moment() {
    tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_millis(1))).await.unwrap();
}

/// The clock creeps while work is under way; this is far more than it creeps, and far less than what tests look at.
const SLACK: Duration = Duration::from_secs(100);

fn about(is: Option<Duration>, wanted: Duration) {
    let is = is.unwrap();
    assert!(is <= wanted && is + SLACK > wanted, "{is:?} is not about {wanted:?}");
}

fn limited(name: &str, persistent: bool) -> CreateRequest {
    CreateRequest { timeout: Some(HOUR), persistent, wait: true, ..wanted(name) }
}

#[tokio::test]
async fn a_persistent_sandbox_is_paused_and_its_next_session_has_the_whole_time() {
    let w = World::new().await;
    let clock = StoppedClock::new();
    clock.through(w.engine.create(limited("one", true))).await.unwrap();
    clock.advance(HOUR / 2).await;
    let view = w.engine.show("one").unwrap();
    assert_eq!(view.record.state, State::Running);
    about(view.timeout_remaining, HOUR / 2);
    clock.advance(HOUR / 2).await;
    clock.until(&w, "one", State::Paused).await;
    let record = w.engine.show("one").unwrap().record;
    assert_eq!((record.last_error, record.unclean), (None, false));
    about(Some(HOUR + SLACK / 2), Duration::from_millis(record.total_runtime_ms) + SLACK / 2);

    clock.through(w.engine.resume("one")).await.unwrap();
    about(w.engine.show("one").unwrap().timeout_remaining, HOUR);
    clock.advance(HOUR).await;
    clock.until(&w, "one", State::Paused).await;
}

#[tokio::test]
async fn one_that_is_not_persistent_is_destroyed() {
    let w = World::new().await;
    let clock = StoppedClock::new();
    let id = clock.through(w.engine.create(limited("one", false))).await.unwrap().record.id;
    clock.advance(HOUR).await;
    clock.until(&w, &id, State::Destroyed).await;
    assert!(w.store.disks().is_empty());
}

#[tokio::test]
async fn stop_destroys_one_that_is_not_persistent() {
    let w = World::new().await;
    let id = w.engine.create(limited("one", false)).await.unwrap().record.id;
    assert_eq!(w.engine.stop(&id).await.unwrap().record.state, State::Destroyed);
}

#[tokio::test]
async fn time_can_be_extended() {
    let w = World::new().await;
    let clock = StoppedClock::new();
    clock.through(w.engine.create(limited("one", true))).await.unwrap();
    clock.advance(HOUR / 2).await;
    let view = clock.through(w.engine.extend("one", Some(2 * HOUR))).await.unwrap();
    about(view.timeout_remaining, 2 * HOUR);
    clock.advance(HOUR).await;
    // Long past the first limit; give a wrong timeout the chance to show.
    clock.through(w.sh("one", "true")).await.unwrap();
    assert_eq!(w.state("one"), State::Running);
    clock.advance(HOUR).await;
    clock.until(&w, "one", State::Paused).await;
    assert_eq!(refused(clock.through(w.engine.extend("one", Some(HOUR))).await), Kind::NotRunning);
}

#[tokio::test]
async fn without_a_timeout_there_is_none() {
    let w = World::new().await;
    let clock = StoppedClock::new();
    clock.through(w.create("one")).await;
    clock.advance(1_000 * HOUR).await;
    clock.through(w.sh("one", "true")).await.unwrap();
    assert_eq!(w.state("one"), State::Running);
    assert_eq!(refused(clock.through(w.engine.extend("one", None)).await), Kind::InvalidInput);
}

fn idling(name: &str) -> CreateRequest {
    CreateRequest { idle_timeout: Some(HOUR), wait: true, ..wanted(name) }
}

#[tokio::test]
async fn a_sandbox_that_nobody_uses_is_paused_and_use_resets_its_clock() {
    let w = World::new().await;
    let clock = StoppedClock::new();
    clock.through(w.engine.create(idling("one"))).await.unwrap();
    for round in 0..4 {
        clock.advance(HOUR - SLACK).await;
        match round {
            0 => drop(clock.through(w.sh("one", "true")).await.unwrap()),
            1 => {
                let writer = clock.through(w.engine.write_file("one", "/f", None)).await.unwrap();
                clock.through(writer.finish()).await.unwrap();
            }
            2 => drop(clock.through(w.engine.read_file("one", "/f")).await.unwrap()),
            _ => w.engine.touch("one").unwrap(),
        }
    }
    // To look at it is no use of it.
    clock.advance(HOUR / 2).await;
    assert_eq!(w.state("one"), State::Running);
    clock.advance(HOUR / 2).await;
    clock.until(&w, "one", State::Paused).await;
    assert_eq!(w.engine.show("one").unwrap().record.last_error, None);
}

#[tokio::test]
async fn a_running_program_is_use_for_as_long_as_it_runs() {
    let w = World::new().await;
    let clock = StoppedClock::new();
    clock.through(w.engine.create(idling("one"))).await.unwrap();
    let mut program = clock.through(w.engine.exec("one", sh("echo up; exec sleep 100000"))).await.unwrap();
    clock.through(program.next_event()).await.unwrap();
    clock.advance(10 * HOUR).await;
    clock.through(async { tokio::time::sleep(std::time::Duration::from_millis(20)).await }).await;
    assert_eq!(w.state("one"), State::Running);
    drop(program);
    clock.advance(HOUR / 2).await;
    clock.through(async { tokio::time::sleep(std::time::Duration::from_millis(20)).await }).await;
    assert_eq!(w.state("one"), State::Running);
    clock.advance(HOUR / 2).await;
    clock.until(&w, "one", State::Paused).await;
}

#[tokio::test]
async fn a_terminal_is_use_only_when_something_happens_in_it() {
    let w = World::new().await;
    let clock = StoppedClock::new();
    clock.through(w.engine.create(idling("one"))).await.unwrap();
    let tty = Some(TerminalSize { rows: 24, cols: 80 });
    let mut shell = clock.through(w.engine.exec("one", ExecSpec { tty, ..sh("echo up; cat") })).await.unwrap();
    clock.through(shell.next_event()).await.unwrap();
    for _ in 0..4 {
        clock.advance(HOUR / 2).await;
        w.engine.touch("one").unwrap();
    }
    clock.through(async { tokio::time::sleep(Duration::from_millis(20)).await }).await;
    assert_eq!(w.state("one"), State::Running);
    clock.advance(HOUR).await;
    clock.until(&w, "one", State::Paused).await;
}

#[tokio::test]
async fn an_idle_sandbox_that_is_not_persistent_is_destroyed_and_its_bytes_come_back() {
    let w = World::new().await;
    let clock = StoppedClock::new();
    let request = CreateRequest { persistent: false, ..idling("one") };
    let record = clock.through(w.engine.create(request)).await.unwrap().record;
    let before = w.store.stats().unwrap();
    let mut bytes = vec![0; 2 << 20];
    rand::fill(&mut bytes[..]);
    w.disk(record.disk).write(1 << 20, &bytes).unwrap();
    w.store.seal().unwrap();
    let packs = |stats: &storage::Stats| stats.pack_bytes;
    assert!(packs(&w.store.stats().unwrap()) >= packs(&before) + bytes.len() as u64, "noise takes what it takes");
    clock.advance(HOUR).await;
    clock.until(&w, &record.id, State::Destroyed).await;
    assert!(w.store.disks().is_empty());
    w.store.gc(false).unwrap();
    let after = w.store.stats().unwrap();
    assert!(packs(&after) < packs(&before) + (64 << 10), "{} bytes, {} before", packs(&after), packs(&before));
}
