//! What runs, kept with the disk: pauses, snapshots and forks with memory.

use std::sync::{Arc, Mutex};

use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use miosa::engine::{Attach, Changes, CreateRequest, CreateVolume, Engine, ForkRequest, Keep, Origin, SnapshotRequest};
use vmm::fake::{FakeMachine, Script};
use vmm::{BootPath, Error, ErrorKind};

use crate::support::{World, forks, named, refused, wanted};
use crate::survival::{Died, dies_during};

/// Where a test's program has its number, in memory and on the disk.
const PLACES: [u64; 2] = [4_096 + 7, (256 << 20) - 8];
const ON_DISK: u64 = 1 << 20;

fn machine(w: &World, name: &str) -> Arc<FakeMachine> {
    w.vmm.machine(&w.engine.show(name).unwrap().record.id).unwrap()
}

/// The guest's program counts, in memory and on the disk.
fn count(w: &World, name: &str, number: u64) {
    for place in PLACES {
        machine(w, name).guest_memory().write(place, &number.to_le_bytes()).unwrap();
    }
    w.disk(w.engine.show(name).unwrap().record.disk).write(ON_DISK, &number.to_le_bytes()).unwrap();
}

/// What it has come to: in memory, and on the disk.
fn counted(w: &World, name: &str) -> (u64, u64) {
    let machine = machine(w, name);
    let read = |place| {
        let mut number = [0; 8];
        machine.guest_memory().read(place, &mut number).unwrap();
        u64::from_le_bytes(number)
    };
    assert_eq!(read(PLACES[0]), read(PLACES[1]));
    let mut number = [0; 8];
    w.disk(w.engine.show(name).unwrap().record.disk).read(ON_DISK, &mut number).unwrap();
    (read(PLACES[0]), u64::from_le_bytes(number))
}

fn way(w: &World, name: &str) -> Option<BootPath> {
    w.engine.show(name).unwrap().record.boot_path
}

fn has_memory(w: &World, name: &str) -> bool {
    w.engine.show(name).unwrap().record.memory.is_some()
}

fn live(name: &str, count: u32) -> ForkRequest {
    ForkRequest { memory: true, wait: true, ..forks(name, count) }
}

fn with_memory(name: &str) -> SnapshotRequest {
    SnapshotRequest { memory: true, ..named(name) }
}

fn from(snapshot: &str, name: &str) -> CreateRequest {
    CreateRequest { origin: Origin::Snapshot(snapshot.into()), wait: true, ..wanted(name) }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_goes_on_after_a_pause_with_memory() {
    let w = World::new().await;
    w.create("one").await;
    count(&w, "one", 41);
    let paused = w.engine.pause("one", Keep::Memory).await.unwrap().record;
    let kept = paused.memory.clone().unwrap();
    assert_eq!((paused.state, paused.last_error.clone(), kept.memory_mib), (State::Paused, None, 256));
    assert!(kept.data_bytes == 2 * 4_096 && kept.runs == 2, "{kept:?}");
    assert!(w.vmm.machine(&paused.id).is_none() && w.front.shown.lock().unwrap().is_empty());
    assert_eq!(w.store.disks().len(), 2, "its disk, and its memory");
    assert_eq!(w.engine.pause("one", Keep::Memory).await.unwrap().record, paused, "it is paused already");

    let resumed = w.engine.resume("one").await.unwrap().record;
    assert_eq!((resumed.boot_path, resumed.memory, resumed.unclean), (Some(BootPath::Memory), None, true));
    assert_eq!(counted(&w, "one"), (41, 41));
    let again = machine(&w, "one");
    assert!(again.woken() == 1 && again.clock().is_some() && again.mac().is_some() && !again.is_held());
    assert_eq!(w.store.disks().len(), 1, "it is of no use any more");
    assert_eq!(w.sh("one", "echo up").await.unwrap().0, "up\n");

    // Whoever uses it starts it in the same way; and a plain stop keeps the files.
    count(&w, "one", 42);
    w.engine.pause("one", Keep::MemoryIfPossible).await.unwrap();
    w.sh("one", "true").await.unwrap();
    assert_eq!((way(&w, "one"), counted(&w, "one")), (Some(BootPath::Memory), (42, 42)));
    let stopped = w.engine.stop("one").await.unwrap().record;
    assert!(stopped.memory.is_none() && !stopped.unclean);
    w.engine.resume("one").await.unwrap();
    assert_eq!((way(&w, "one"), counted(&w, "one")), (Some(BootPath::Cold), (0, 42)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_of_a_running_sandbox_goes_on_for_itself() {
    let w = World::new().await;
    w.create("one").await;
    count(&w, "one", 5);
    let parent = machine(&w, "one");
    w.engine.fork("one", live("child", 3)).await.unwrap();
    assert!(!parent.is_held() && parent.woken() == 0 && parent.freezes() == 0, "the parent does not notice");
    for n in 1..=3_u64 {
        let name = format!("child-{n}");
        assert_eq!((way(&w, &name), counted(&w, &name)), (Some(BootPath::Memory), (5, 5)));
        count(&w, &name, 10 + n);
        assert_eq!(machine(&w, &name).hostname(), name);
    }
    count(&w, "one", 6);
    for (name, number) in [("one", 6), ("child-1", 11), ("child-2", 12), ("child-3", 13)] {
        assert_eq!(counted(&w, name), (number, number));
    }
    let macs: std::collections::BTreeSet<_> = (1..=3).map(|n| machine(&w, &format!("child-{n}")).mac()).collect();
    assert_eq!(macs.len(), 3);
    assert_eq!(w.store.disks().len(), 4, "nobody's memory is kept any more");
    assert!(w.store.snapshots().len() == 1, "the template's");

    // Children that are not started have it until they are.
    w.engine.fork("one", ForkRequest { wait: false, ..live("later", 2) }).await.unwrap();
    assert_eq!(w.store.disks().len(), 4 + 4);
    w.engine.destroy("later-1").await.unwrap();
    assert_eq!(w.store.disks().len(), 4 + 2);
    w.engine.resume("later-2").await.unwrap();
    assert_eq!(counted(&w, "later-2"), (6, 6));
    // Without, they have the files.
    w.engine.fork("one", ForkRequest { wait: true, ..forks("files", 1) }).await.unwrap();
    assert_eq!(counted(&w, "files"), (0, 6));
    assert_eq!(parent.freezes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_with_memory_is_where_others_begin() {
    let w = World::new().await;
    w.create("one").await;
    count(&w, "one", 7);
    let snapshot = w.engine.snapshot("one", with_memory("up")).await.unwrap();
    assert!(snapshot.memory.is_some());
    let files = w.engine.snapshot("one", named("files")).await.unwrap();
    assert_eq!(files.memory, None);
    count(&w, "one", 8);
    for name in ["two", "three"] {
        w.engine.create(from("up", name)).await.unwrap();
        assert_eq!((way(&w, name), counted(&w, name)), (Some(BootPath::Memory), (7, 7)));
    }
    let plain = CreateRequest { without_memory: true, ..from("up", "plain") };
    w.engine.create(plain).await.unwrap();
    w.engine.create(from("files", "other")).await.unwrap();
    w.engine.create(CreateRequest { memory_mib: 512, ..from("up", "larger") }).await.unwrap();
    for name in ["plain", "other", "larger"] {
        assert_eq!((way(&w, name), counted(&w, name).1), (Some(BootPath::Cold), 7), "{name}");
    }
    // Put back to it, what ran goes on from there.
    w.engine.restore("one", "up").await.unwrap();
    assert_eq!((way(&w, "one"), counted(&w, "one")), (Some(BootPath::Memory), (7, 7)));
    w.engine.restore("one", "files").await.unwrap();
    assert_eq!((way(&w, "one"), counted(&w, "one")), (Some(BootPath::Cold), (0, 7)));
    w.engine.stop("one").await.unwrap();
    w.engine.restore("one", "up").await.unwrap();
    assert!(has_memory(&w, "one"));
    w.engine.restore("one", "files").await.unwrap();
    assert!(!has_memory(&w, "one"));

    assert_eq!(w.store.disks().len(), 6 + 1);
    w.engine.delete_snapshot("up", None, false).await.unwrap();
    assert_eq!(w.store.disks().len(), 6, "its memory goes with it");
    assert_eq!(counted(&w, "two"), (7, 7));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_at_rest_passes_its_memory_on() {
    let w = World::new().await;
    w.create("one").await;
    count(&w, "one", 9);
    w.engine.pause("one", Keep::Memory).await.unwrap();
    let snapshot = w.engine.snapshot("one", with_memory("rest")).await.unwrap();
    assert!(snapshot.memory.is_some());
    assert_eq!(w.engine.snapshot("one", named("files")).await.unwrap().memory, None);
    w.engine.fork("one", live("child", 2)).await.unwrap();
    w.engine.fork("one", ForkRequest { wait: true, ..forks("files", 1) }).await.unwrap();
    let of_snapshot = ForkRequest { snapshot: Some("rest".into()), ..live("grandchild", 1) };
    w.engine.fork("one", of_snapshot).await.unwrap();
    assert!(has_memory(&w, "one"), "it has its own still");
    for name in ["child-1", "child-2", "grandchild"] {
        assert_eq!(counted(&w, name), (9, 9), "{name}");
    }
    assert_eq!(counted(&w, "files"), (0, 9));
    w.engine.resume("one").await.unwrap();
    assert_eq!(counted(&w, "one"), (9, 9));
    // What is there of no memory is the files.
    w.engine.stop("files").await.unwrap();
    assert_eq!(w.engine.snapshot("files", with_memory("none")).await.unwrap().memory, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_cannot_be_kept_leaves_the_machine_as_it_was() {
    let w = World::new().await;
    let fails =
        || w.vmm.script(Script { fail_devices: Some(Error::new(ErrorKind::Qmp, "scripted")), ..Script::default() });
    fails();
    w.create("one").await;
    count(&w, "one", 3);
    assert_eq!(refused(w.engine.pause("one", Keep::Memory).await), Kind::MemoryUnavailable);
    assert_eq!(refused(w.engine.fork("one", live("child", 1)).await), Kind::MemoryUnavailable);
    assert_eq!(refused(w.engine.snapshot("one", with_memory("x")).await), Kind::MemoryUnavailable);
    assert!(!machine(&w, "one").is_held() && w.state("one") == State::Running);
    assert_eq!((w.store.disks().len(), w.store.snapshots().len()), (1, 1), "nothing is left of it");
    assert_eq!(w.engine.list(None).len(), 1);
    // Where it need not be, there are the files.
    let paused = w.engine.pause("one", Keep::MemoryIfPossible).await.unwrap().record;
    assert!(paused.memory.is_none() && !paused.unclean && paused.last_error.is_none(), "{paused:?}");

    w.engine
        .create_volume(CreateVolume { name: "data".into(), size_bytes: Some(16 << 20), ..CreateVolume::default() })
        .await
        .unwrap();
    let volumes = vec![Attach { volume: "data".into(), ..Attach::default() }];
    w.engine.create(CreateRequest { wait: true, volumes, ..wanted("two") }).await.unwrap();
    let error = w.engine.pause("two", Keep::Memory).await.unwrap_err();
    assert!(error.kind() == Kind::MemoryUnavailable && error.hint_text().unwrap().contains("volume"), "{error}");
    assert_eq!(w.state("two"), State::Running);
    assert_eq!(w.engine.pause("two", Keep::MemoryIfPossible).await.unwrap().record.memory, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_cannot_be_used_is_kept_or_its_files_are() {
    let w = World::new().await;
    w.create("one").await;
    count(&w, "one", 4);
    w.engine.pause("one", Keep::Memory).await.unwrap();
    // A start that fails leaves it, and says how to go on without.
    w.vmm.script(Script { fail_start: Some(Error::new(ErrorKind::StartFailed, "scripted")), ..Script::default() });
    let error = w.engine.resume("one").await.unwrap_err();
    assert!(error.hint_text().unwrap().contains("--without-memory"), "{error:?}");
    assert!(w.state("one") == State::Error && has_memory(&w, "one"));
    w.engine.resume("one").await.unwrap();
    assert_eq!((way(&w, "one"), counted(&w, "one")), (Some(BootPath::Memory), (4, 4)));

    // One that is of another machine now.
    let others: [fn(&World) -> Changes; 2] = [
        |_| Changes { memory_mib: Some(512), ..Changes::default() },
        |w| {
            w.vmm.install_anew();
            Changes::default()
        },
    ];
    for change in others {
        w.engine.pause("one", Keep::Memory).await.unwrap();
        assert!(has_memory(&w, "one"));
        w.engine.update("one", change(&w)).await.unwrap();
        let record = w.engine.resume("one").await.unwrap().record;
        assert_eq!((record.state, record.boot_path, record.memory), (State::Running, Some(BootPath::Cold), None));
        assert!(record.last_error.unwrap().contains("memory"), "it is told");
        assert_eq!(w.store.disks().len(), 1);
    }
    // Given up by whoever says so.
    w.engine.pause("one", Keep::Memory).await.unwrap();
    let record = w.engine.resume_from_files("one").await.unwrap().record;
    assert_eq!((record.boot_path, record.last_error), (Some(BootPath::Cold), None));
    assert_eq!(w.store.disks().len(), 1);
    w.engine.pause("one", Keep::Memory).await.unwrap();
    w.engine.destroy("one").await.unwrap();
    assert_eq!(w.store.disks().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_outlives_the_daemon() {
    let w = World::new().await;
    w.create("one").await;
    count(&w, "one", 12);
    w.engine.pause("one", Keep::Memory).await.unwrap();
    w.engine.snapshot("one", with_memory("kept")).await.unwrap();
    let w = w.crash().await;
    w.engine.resume("one").await.unwrap();
    assert_eq!((way(&w, "one"), counted(&w, "one")), (Some(BootPath::Memory), (12, 12)));
    w.engine.create(from("kept", "two")).await.unwrap();
    assert_eq!(counted(&w, "two"), (12, 12));
}

/// What is done while the daemon dies.
async fn work(engine: Arc<Engine>, done: Arc<Mutex<Vec<&'static str>>>) {
    let did = |what| done.lock().unwrap().push(what);
    engine.snapshot("one", with_memory("kept")).await.unwrap();
    did("snapshot");
    engine.pause("one", Keep::Memory).await.unwrap();
    did("pause");
    engine.resume("one").await.unwrap();
    did("resume");
    engine.fork("one", live("child", 1)).await.unwrap();
    did("fork");
    engine.create(from("kept", "two")).await.unwrap();
    did("create");
}

/// One run: the daemon dies at step `at`, and its machines with it if asked. False when there is no such step.
async fn dies_at(at: usize, machines_too: bool) -> bool {
    let w = World::new().await;
    w.create("one").await;
    count(&w, "one", 100);
    let Some(Died { _open, w, step, done, what }) = dies_during(w, at, machines_too, work).await else { return false };
    let all = w.engine.list(None);
    let names: Vec<_> = all.iter().map(|s| s.record.name.clone()).collect();
    assert!(names.contains(&"one".to_owned()), "{what}: {names:?}");
    for (after, name) in [("fork", "child"), ("create", "two")] {
        assert!(!done.contains(&after) || names.contains(&name.to_owned()), "{what}: {names:?}");
    }
    // Nobody who was paused with memory has lost it, nor one whose machine lives. Once it was given up for a guest to go on,
    // a machine that dies leaves its files.
    let given_up = machines_too && !matches!(step, "attach" | "load");
    let is_paused = done.last() == Some(&"pause") && !given_up;
    let one = w.engine.show("one").unwrap().record;
    assert!(!is_paused || one.memory.is_some() || one.state == State::Running, "{what}: {one:?}");
    assert!(machines_too || one.state == State::Running || one.memory.is_some(), "{what}: {one:?}");
    // No disk and no state that no record names.
    let memories = all.iter().filter(|s| s.record.memory.is_some()).count();
    let snapshots = w.engine.snapshots(None).unwrap();
    let of_snapshots = snapshots.iter().filter(|s| s.memory.is_some()).count();
    assert_eq!(snapshots.len(), of_snapshots, "{what}");
    assert_eq!(w.store.disks().len(), names.len() + memories + of_snapshots, "{what}");
    assert_eq!(w.store.snapshots().len(), 1 + snapshots.len(), "{what}");
    for name in &names {
        let up = w.sh(name, "echo up").await.unwrap_or_else(|e| panic!("{what}: {name}: {e}"));
        assert_eq!(up.0, "up\n", "{what}: {name}");
        assert!(!machine(&w, name).is_held(), "{what}: {name}");
        let (memory, disk) = counted(&w, name);
        let went_on = memory == 100 && disk == 100;
        let booted = memory == 0 && disk == 100 && way(&w, name) == Some(BootPath::Cold);
        assert!(went_on || booted, "{what}: {name}: {memory} in memory, {disk} on disk, {:?}", way(&w, name));
        w.engine.destroy(name).await.unwrap();
    }
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_daemon_that_dies_at_any_step_mixes_no_memory_with_another_disk() {
    for machines_too in [false, true] {
        let mut steps = 0;
        while dies_at(steps, machines_too).await {
            steps += 1;
        }
        assert!(steps > 12, "{steps} steps");
    }
}
