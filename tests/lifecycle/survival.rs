//! Sessions that outlive their daemon, and a daemon that dies at every step of what it does.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use miosa::engine::lifecycle::State;
use miosa::engine::{Attach, CreateRequest, CreateVolume, Engine};
use vmm::fake::{Script, StepHook};

use crate::support::{World, forks, named, wanted};

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_on_with_its_clock() {
    let w = World::new().await;
    let timed = CreateRequest { timeout: Some(HOUR), wait: true, ..wanted("timed") };
    let before = w.engine.create(timed).await.unwrap();
    let extended = CreateRequest { timeout: Some(HOUR), wait: true, ..wanted("extended") };
    w.engine.create(extended).await.unwrap();
    w.engine.extend("extended", Some(8 * HOUR)).await.unwrap();
    let fleeting = CreateRequest { persistent: false, wait: true, ..wanted("fleeting") };
    w.engine.create(fleeting).await.unwrap();
    w.sh("timed", "echo kept > note").await.unwrap();
    let starts = w.vmm.starts();
    let age = w.engine.show("timed").unwrap().compute.runtime_ms;

    let w = w.replace().await;
    for name in ["timed", "extended", "fleeting"] {
        w.until(name, State::Running).await;
        assert_eq!(w.sh(name, "echo up").await.unwrap().0, "up\n");
    }
    assert_eq!(w.vmm.starts(), starts, "no machine was started");
    let after = w.engine.show("timed").unwrap();
    assert_eq!(w.sh("timed", "cat note").await.unwrap().0, "kept\n");
    assert!(after.compute.runtime_ms >= age, "its age goes on");
    assert!(after.timeout_remaining.unwrap() <= before.timeout_remaining.unwrap(), "it has no more time than before");
    assert!(w.engine.show("extended").unwrap().timeout_remaining.unwrap() > 7 * HOUR);
    assert_eq!(w.engine.show("fleeting").unwrap().timeout_remaining, None);
    assert_eq!((after.record.boot_ms, after.record.ready_at), (before.record.boot_ms, before.record.ready_at));

    // And ends as any other.
    w.engine.stop("timed").await.unwrap();
    let record = w.engine.show("timed").unwrap().record;
    assert_eq!((record.state, record.unclean, record.last_error), (State::Paused, false, None));
    w.vmm.machine(&w.engine.show("extended").unwrap().record.id).unwrap().die("later");
    w.until("extended", State::Paused).await;
    w.engine.destroy("fleeting").await.unwrap();
    assert!(w.front.shown.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn time_that_was_up_meanwhile_is_up() {
    let w = World::new().await;
    let timed = CreateRequest { timeout: Some(Duration::from_secs(2)), wait: true, ..wanted("timed") };
    w.engine.create(timed).await.unwrap();
    let w = w.replace().await;
    w.until("timed", State::Paused).await;
    assert_eq!(w.engine.show("timed").unwrap().record.last_error, None, "stopped in order");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_makes_room_for_another_leaves_its_sessions() {
    let w = World::new().await;
    w.create("one").await;
    w.create("two").await;
    w.engine.leave(HOUR).await.unwrap();
    assert!(w.front.shown.lock().unwrap().is_empty(), "nobody serves the disks any more");
    let w = w.replace().await;
    for name in ["one", "two"] {
        w.until(name, State::Running).await;
        assert_eq!(w.sh(name, "echo up").await.unwrap().0, "up\n");
    }
    assert_eq!(w.vmm.starts(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_of_nobody_are_ended_and_no_others() {
    let w = World::new().await;
    let [kept, destroyed, paused] = ["kept", "destroyed", "paused"].map(|name| name.to_owned());
    for name in [&kept, &destroyed, &paused] {
        w.create(name).await;
    }
    let ids = [&kept, &destroyed, &paused].map(|name| w.engine.show(name).unwrap().record.id);
    let machines = [0, 1, 2].map(|i| w.vmm.machine(&ids[i]).unwrap());
    // Their records are at rest, and their machines live all the same.
    let mut tx = w.store.begin();
    for name in [&destroyed, &paused] {
        let mut record = w.engine.show(name).unwrap().record;
        record.state = if name == &paused { State::Paused } else { State::Destroyed };
        tx.put_record("sandbox", &record.id, serde_json::to_vec(&record).unwrap());
    }
    tx.commit_durable().unwrap();
    let w = w.replace().await;
    w.until("kept", State::Running).await;
    for id in &ids[1..] {
        assert!(w.vmm.machine(id).is_none());
    }
    drop(machines);
    assert_eq!(w.sh("kept", "echo up").await.unwrap().0, "up\n");
    assert_eq!(w.state("paused"), State::Paused);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_machine_that_ends_before_it_is_taken_over_nothing_is_left() {
    let w = World::new().await;
    let id = w.create("one").await.record.id;
    let machine = w.vmm.machine(&id).unwrap();
    w.vmm.on_step(Arc::new(move |step| {
        if step == "adopt" {
            machine.die("just now");
        }
    }));
    let w = w.replace().await;
    w.until("one", State::Paused).await;
    assert!(w.engine.show("one").unwrap().record.last_error.unwrap().contains("the machine ended"));
    assert!(!w.run_dir(&id).exists());
    assert!(w.front.shown.lock().unwrap().is_empty());
}

/// Stops at one step: whoever gets there stays until the end of the test.
#[derive(Default)]
struct Gate {
    at: usize,
    steps: AtomicUsize,
    reached: AtomicBool,
    open: Mutex<bool>,
    opened: Condvar,
    name: Mutex<Option<&'static str>>,
}

impl Gate {
    fn hook(self: &Arc<Self>) -> StepHook {
        let gate = self.clone();
        Arc::new(move |name| {
            let step = gate.steps.fetch_add(1, Ordering::SeqCst);
            if step == gate.at {
                *gate.name.lock().unwrap() = Some(name);
                gate.reached.store(true, Ordering::SeqCst);
            }
            // Nothing goes on around the dead either.
            if step >= gate.at {
                let mut open = gate.open.lock().unwrap();
                while !*open {
                    open = gate.opened.wait(open).unwrap();
                }
            }
        })
    }

    fn release(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl Drop for OpenAtEnd {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// However the test ends, nobody is left waiting.
pub struct OpenAtEnd(Arc<Gate>);

/// What is done while the daemon dies. What had been answered is in `done`.
async fn work(engine: Arc<Engine>, done: Arc<Mutex<Vec<&'static str>>>) {
    let did = |what| done.lock().unwrap().push(what);
    let volumes = vec![Attach { volume: "data".into(), ..Attach::default() }];
    engine.create(CreateRequest { wait: true, volumes, ..wanted("one") }).await.unwrap();
    did("create");
    engine.snapshot("one", named("kept")).await.unwrap();
    did("snapshot");
    engine.snapshot_volume("data", None).await.unwrap();
    did("volume snapshot");
    engine.fork("one", forks("child", 1)).await.unwrap();
    did("fork");
    engine.stop("one").await.unwrap();
    did("stop");
    engine.detach_volume("data", None).await.unwrap();
    did("detach");
    engine.attach_volume("one", Attach { volume: "data".into(), ..Attach::default() }).await.unwrap();
    did("attach");
    engine.resume("one").await.unwrap();
    did("resume");
    engine.restore("one", "kept").await.unwrap();
    did("restore");
    engine.destroy("one").await.unwrap();
    did("destroy");
}

/// What a daemon that died has left, and the next one on it.
pub struct Died {
    pub _open: OpenAtEnd,
    pub w: World,
    /// Before which step it died.
    pub step: &'static str,
    /// What had been answered.
    pub done: Vec<&'static str>,
    /// All that in words.
    pub what: String,
}

/// Works until step `at`, where the daemon dies, and its machines with it if asked; then everybody comes to rest or goes on
/// with the next daemon. None if there is no such step.
pub async fn dies_during<F: Future<Output = ()> + Send + 'static>(
    w: World,
    at: usize,
    machines_too: bool,
    work: impl FnOnce(Arc<Engine>, Arc<Mutex<Vec<&'static str>>>) -> F,
) -> Option<Died> {
    let gate = Arc::new(Gate { at, ..Gate::default() });
    let _open = OpenAtEnd(gate.clone());
    w.vmm.on_step(gate.hook());
    *w.front.hook.lock().unwrap() = Some(gate.hook());
    let done = Arc::new(Mutex::new(Vec::new()));
    let working = tokio::spawn(work(w.engine.clone(), done.clone()));
    w.until_true(|| gate.reached.load(Ordering::SeqCst) || working.is_finished()).await;
    if !gate.reached.load(Ordering::SeqCst) {
        working.await.unwrap();
        return None;
    }
    let step = gate.name.lock().unwrap().unwrap();
    let done: Vec<_> = done.lock().unwrap().clone();
    let what = format!("at step {at}, {step:?}, after {done:?}");
    w.vmm.on_step(Arc::new(|_| ()));
    let w = if machines_too { w.crash().await } else { w.replace().await };
    let settled = |state| !matches!(state, State::Creating | State::Snapshotting);
    w.until_true(|| w.engine.list(None).iter().all(|s| settled(s.record.state))).await;
    Some(Died { _open, w, step, done, what })
}

/// One run: the daemon dies at step `at`, and its machines with it if asked. False when there is no such step.
async fn dies_at(at: usize, machines_too: bool) -> bool {
    let w = World::new().await;
    w.create("bystander").await;
    let disk = w.engine.show("bystander").unwrap().record.disk;
    w.disk(disk).write(4_096, b"flushed").unwrap();
    w.disk(disk).flush().unwrap();
    let volume = CreateVolume { name: "data".into(), size_bytes: Some(16 << 20), ..CreateVolume::default() };
    let volume = w.engine.create_volume(volume).await.unwrap();
    w.disk(volume.disk).write((16 << 20) - 8, b"flushed!").unwrap();
    w.disk(volume.disk).flush().unwrap();
    let Some(Died { _open, w, done, what, .. }) = dies_during(w, at, machines_too, work).await else { return false };
    let names: Vec<_> = w.engine.list(None).into_iter().map(|s| s.record.name).collect();
    assert!(names.contains(&"bystander".to_owned()), "{what}: {names:?}");
    assert!(!done.contains(&"create") || done.contains(&"restore") || names.contains(&"one".to_owned()), "{what}");
    assert!(!done.contains(&"fork") || names.contains(&"child".to_owned()), "{what}");
    assert!(!done.contains(&"snapshot") || w.engine.snapshots(None).unwrap().len() == 1, "{what}");
    if !machines_too {
        assert_eq!(w.state("bystander"), State::Running, "{what}");
    }
    // As many machines as run, and as many disks as there are.
    for sandbox in w.engine.list(None) {
        let running = sandbox.record.state == State::Running;
        assert_eq!(w.vmm.machine(&sandbox.record.id).is_some(), running, "{what}: {}", sandbox.record.name);
        assert_eq!(w.front.shown.lock().unwrap().contains(&sandbox.record.id), running, "{what}");
    }
    assert_eq!(w.store.disks().len(), names.len() + 1, "{what}");
    // The volume is there; who has it has it, and nobody who is gone does.
    let snapshots = w.engine.volume_snapshots(None).unwrap().len();
    assert_eq!(w.store.snapshots().len(), 1 + w.engine.snapshots(None).unwrap().len() + snapshots, "{what}");
    assert!(!done.contains(&"volume snapshot") || snapshots == 1, "{what}");
    let mut content = [0; 8];
    w.disk(w.engine.volume("data").unwrap().disk).read((16 << 20) - 8, &mut content).unwrap();
    assert_eq!(&content, b"flushed!", "{what}");
    for at in w.engine.volume("data").unwrap().attachments {
        let holder = w.engine.show(&at.sandbox_id).unwrap().record;
        let shown = w.front.shown.lock().unwrap().contains(&format!("{} {}", holder.id, volume.id));
        assert_eq!((holder.name.as_str(), shown), ("one", holder.state == State::Running), "{what}");
        w.sh("one", "touch ../mnt/data/it").await.unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(w.vmm.machine(&holder.id).unwrap().mounts()[0].serial, volume.id, "{what}");
    }
    // And can be used, with what was there.
    for name in &names {
        let up = w.sh(name, "echo up").await.unwrap_or_else(|e| panic!("{what}: {name}: {e}"));
        assert_eq!(up.0, "up\n", "{what}: {name}");
        assert!(!w.vmm.machine(&w.engine.show(name).unwrap().record.id).unwrap().is_frozen(), "{what}: {name}");
    }
    let mut content = [0; 7];
    w.disk(w.engine.show("bystander").unwrap().record.disk).read(4_096, &mut content).unwrap();
    assert_eq!(&content, b"flushed", "{what}");
    for name in names {
        w.engine.destroy(&name).await.unwrap();
    }
    assert!(w.front.shown.lock().unwrap().is_empty(), "{what}");
    w.engine.delete_volume("data").await.unwrap_or_else(|e| panic!("{what}: {e}"));
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_daemon_that_dies_at_any_step_loses_nobody() {
    for machines_too in [false, true] {
        let mut steps = 0;
        while dies_at(steps, machines_too).await {
            steps += 1;
        }
        assert!(steps > 12, "{steps} steps");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_cannot_be_taken_over_is_ended() {
    let w = World::new().await;
    w.create("one").await;
    let id = w.engine.show("one").unwrap().record.id;
    std::fs::write(w.run_dir(&id).join("session.json"), "{").unwrap();
    let w = w.replace().await;
    let record = w.engine.show("one").unwrap().record;
    assert!(record.state == State::Paused && record.unclean && record.last_error.is_some(), "{record:?}");
    assert!(w.vmm.machine(&id).is_none());
    w.vmm.script(Script::default());
    w.engine.resume("one").await.unwrap();
}
