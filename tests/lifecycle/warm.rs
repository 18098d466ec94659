//! Sessions that begin from a kept state of a machine that had booted.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};

use miosa::engine::lifecycle::State;
use miosa::engine::{CreateRequest, Settings};
use vmm::BootPath::{Cold, Warm};
use vmm::fake::Script;
use vmm::{Error, ErrorKind};

use crate::support::{MARK, World, forks, wanted};

/// An engine that keeps states in this directory.
async fn world(states: &Path) -> World {
    World::with(Settings { warm_dir: Some(states.to_owned()), ..Settings::default() }).await
}

fn states(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Which way the sandbox's session came up.
fn way(w: &World, name: &str) -> vmm::BootPath {
    w.engine.show(name).unwrap().record.boot_path.unwrap()
}

async fn again(w: &World, name: &str) -> vmm::BootPath {
    w.engine.stop(name).await.unwrap();
    w.engine.resume(name).await.unwrap();
    way(w, name)
}

/// Whoever gets to this step passes the first barrier, and stays until the second is passed.
fn stop_at(w: &World, step: &'static str) -> (Arc<Barrier>, Arc<Barrier>) {
    let (stuck, freed) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
    let (entered, left) = (stuck.clone(), freed.clone());
    w.vmm.on_step(Arc::new(move |name| {
        if name == step {
            entered.wait();
            left.wait();
        }
    }));
    (stuck, freed)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_machine_of_a_shape_boots_and_others_go_on_from_its_state() {
    let dir = tempfile::tempdir().unwrap();
    let w = world(dir.path()).await;
    let one = w.create("one").await;
    assert_eq!(one.record.boot_path, Some(Cold));
    w.until_true(|| w.vmm.kept() == 1).await;
    assert_eq!(states(dir.path()).len(), 1);
    assert!(!w.run_dir("warm").exists(), "nothing is left of the machine that was kept");

    assert_eq!(w.create("two").await.record.boot_path, Some(Warm), "whatever its disk and name");
    assert_eq!(w.sh("two", "echo up").await.unwrap().0, "up\n");
    let two = w.vmm.machine(&w.engine.show("two").unwrap().record.id).unwrap();
    assert_eq!(two.hostname(), "two");
    assert_eq!(again(&w, "one").await, Warm);
    let one = w.vmm.machine(&one.record.id).unwrap();
    assert_ne!(one.entropy(), two.entropy());

    // Another shape is another state.
    let larger = w.engine.create(CreateRequest { memory_mib: 512, wait: true, ..wanted("larger") }).await.unwrap();
    assert_eq!(larger.record.boot_path, Some(Cold));
    w.until_true(|| w.vmm.kept() == 2).await;
    assert_eq!(again(&w, "larger").await, Warm);
    assert_eq!(w.vmm.kept(), 2, "what is there is not made again");

    // Those of another kernel are of no use to the next daemon.
    w.vmm.install_anew();
    assert_eq!(again(&w, "one").await, Cold);
    w.until_true(|| w.vmm.kept() == 3).await;
    w.until_true(|| states(dir.path()).len() == 3).await;
    let next = world(dir.path()).await;
    next.vmm.install_anew();
    next.create("one").await;
    assert_eq!((way(&next, "one"), states(dir.path()).len()), (Warm, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_state_is_of_no_use_boots() {
    let dir = tempfile::tempdir().unwrap();
    let w = world(dir.path()).await;
    w.create("one").await;
    w.until_true(|| w.vmm.kept() == 1).await;
    // Its machine starts from the state as well.
    w.until_true(|| booted(&w) == 1).await;
    let damage = || std::fs::write(states(dir.path())[0].join("fake-state"), "damaged").unwrap();
    damage();
    assert_eq!(again(&w, "one").await, Cold);
    w.until_true(|| w.vmm.kept() == 2).await;
    assert_eq!(again(&w, "one").await, Warm, "it was made anew");
    // A machine that dies on the way, or whose guest does not answer.
    w.vmm.script(Script { fail_start: Some(Error::new(ErrorKind::StartFailed, "scripted")), ..Script::default() });
    assert_eq!(again(&w, "one").await, Cold);
    w.until_true(|| w.vmm.kept() == 3).await;
    // What a guest says of its disk does the state no harm.
    let of_the_disk = Error::new(ErrorKind::Guest(vmm::GuestErrorKind::Io), "no file system");
    w.vmm.script(Script { fail_start: Some(of_the_disk), ..Script::default() });
    assert_eq!(again(&w, "one").await, Cold);
    assert_eq!(again(&w, "one").await, Warm);
    assert_eq!(w.vmm.kept(), 3);

    // One that fails again and again is left alone.
    for _ in 0..2 {
        damage();
        assert_eq!(again(&w, "one").await, Cold);
        if states(dir.path()).is_empty() && w.vmm.kept() == 3 {
            w.until_true(|| w.vmm.kept() == 4).await;
        }
    }
    assert_eq!(again(&w, "one").await, Cold);
    assert_eq!((w.vmm.kept(), states(dir.path()).len()), (4, 0));
    // And the boot's own failure is told as ever.
    w.engine.stop("one").await.unwrap();
    w.vmm.script(Script { fail_start: Some(Error::new(ErrorKind::StartFailed, "scripted")), ..Script::default() });
    let error = w.engine.resume("one").await.unwrap_err();
    assert!(error.to_string().contains("scripted"), "{error}");
    assert_eq!(w.state("one"), State::Error);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_cannot_be_kept_is_nobodys_trouble() {
    let dir = tempfile::tempdir().unwrap();
    let w = world(dir.path()).await;
    w.vmm.fail_warm(Some(Error::new(ErrorKind::BootTimeout, "scripted")));
    w.create("one").await;
    for _ in 0..3 {
        assert_eq!(again(&w, "one").await, Cold);
    }
    assert!(states(dir.path()).is_empty());
    // Nor one that is being made when the daemon ends.
    let dir = tempfile::tempdir().unwrap();
    let w = world(dir.path()).await;
    let (stuck, freed) = stop_at(&w, "warm");
    w.create("one").await;
    tokio::task::spawn_blocking(move || stuck.wait()).await.unwrap();
    assert_eq!(again(&w, "one").await, Cold, "nobody waits for it");
    w.engine.shutdown(std::time::Duration::from_secs(60)).await.unwrap();
    freed.wait();
    assert_eq!((w.vmm.kept(), states(dir.path()).len()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_did_not_boot_goes_on_without_its_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let w = world(dir.path()).await;
    w.create("one").await;
    w.until_true(|| w.vmm.kept() == 1).await;
    assert_eq!(again(&w, "one").await, Warm);
    let starts = w.vmm.starts();
    let w = w.replace().await;
    w.until("one", State::Running).await;
    assert_eq!(w.sh("one", "echo up").await.unwrap().0, "up\n");
    assert_eq!((way(&w, "one"), w.vmm.starts()), (Warm, starts));
    // Without the setting everything boots.
    assert_eq!(again(&w, "one").await, Cold);
}

/// Whether the sandbox's guest was told that it goes on from an earlier moment.
fn woken(w: &World, name: &str) -> bool {
    w.vmm.machine(&w.engine.show(name).unwrap().record.id).unwrap().woken() > 0
}

/// Templates that have booted, as the engine knows them: it does so a moment after their records are there.
fn booted(w: &World) -> usize {
    w.engine.booted_templates()
}

/// Records of them.
fn booted_records(w: &World) -> usize {
    w.store.records("booted-template").len()
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_begin_where_their_template_has_booted() {
    let dir = tempfile::tempdir().unwrap();
    let w = world(dir.path()).await;
    w.create("one").await;
    assert!(!woken(&w, "one"));
    w.until_true(|| booted(&w) == 1).await;
    w.create("two").await;
    assert_eq!((way(&w, "two"), woken(&w, "two")), (Warm, true));
    let machine = w.vmm.machine(&w.engine.show("two").unwrap().record.id).unwrap();
    assert!(machine.hostname() == "two" && machine.mac().is_some() && machine.clock().is_some());
    assert!(w.engine.show("two").unwrap().record.memory.is_none());
    let mut mark = [0; 8];
    w.disk(w.engine.show("two").unwrap().record.disk).read(0, &mut mark).unwrap();
    assert_eq!(&mark, MARK, "its disk is its template's");
    // Its own, one for each sandbox, and the memory of what has booted.
    w.until_true(|| w.store.disks().len() == 3).await;

    // Only what no machine has had: not its later sessions, nor forks, and not one with a volume or another disk.
    again(&w, "two").await;
    assert!(!woken(&w, "two"));
    w.engine.create(CreateRequest { start: false, ..wanted("rest") }).await.unwrap();
    w.engine.fork("rest", forks("fork", 1)).await.unwrap();
    for (name, expected) in [("fork", false), ("rest", true)] {
        w.engine.resume(name).await.unwrap();
        assert_eq!(woken(&w, name), expected, "{name}");
    }
    let larger = CreateRequest { disk_mib: Some(64), wait: true, ..wanted("larger") };
    w.engine.create(larger).await.unwrap();
    assert_eq!((woken(&w, "larger"), booted(&w)), (false, 1));
    // Another kind of machine is another.
    w.engine.create(CreateRequest { memory_mib: 512, wait: true, ..wanted("more") }).await.unwrap();
    w.until_true(|| booted(&w) == 2).await;

    // They outlive the daemon, and go with their template.
    w.engine.create(CreateRequest { start: false, ..wanted("later") }).await.unwrap();
    w.import("base").await;
    assert_eq!((booted(&w), booted_records(&w)), (0, 0));
    w.engine.resume("later").await.unwrap();
    assert!(!woken(&w, "later"));
    w.create("new").await;
    w.until_true(|| booted(&w) == 1).await;
    w.engine.delete_template("base").await.unwrap();
    assert_eq!((booted(&w), booted_records(&w)), (0, 0));
    let sandboxes = w.engine.list(None).len();
    w.until_true(|| w.store.disks().len() == sandboxes && w.store.snapshots().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_has_booted_and_is_of_no_use_costs_nobody_anything() {
    let dir = tempfile::tempdir().unwrap();
    let w = world(dir.path()).await;
    w.create("one").await;
    w.until_true(|| booted(&w) == 1).await;
    w.vmm.script(Script { fail_start: Some(Error::new(ErrorKind::StartFailed, "scripted")), ..Script::default() });
    w.create("two").await;
    assert_eq!((way(&w, "two"), woken(&w, "two"), booted(&w), booted_records(&w)), (Warm, false, 0, 0));
    let record = w.engine.show("two").unwrap().record;
    assert!(record.last_error.is_none() && record.memory.is_none() && record.state == State::Running);
    w.create("three").await;
    assert_eq!((woken(&w, "three"), booted(&w)), (false, 0), "it is not tried again");

    // One of an earlier daemon is of use.
    let w = world(dir.path()).await;
    w.create("one").await;
    w.until_true(|| booted(&w) == 1).await;
    w.until_true(|| w.store.disks().len() == 2).await;
    let disks = w.store.disks().len();
    let w = w.crash().await;
    assert_eq!(
        (booted(&w), booted_records(&w), w.store.disks().len()),
        (1, 1, disks),
        "nothing of it is lost or left over"
    );
}

/// Names of the run directories that there are.
fn sessions(w: &World) -> Vec<String> {
    let entries = std::fs::read_dir(w.run_dir("x").parent().unwrap()).unwrap().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// An engine whose template has booted, and for whose next sandbox a machine waits.
async fn with_spare(states: &Path) -> World {
    let settings = Settings { warm_dir: Some(states.to_owned()), spare_machines: 1, ..Settings::default() };
    let w = World::with(settings).await;
    w.create("one").await;
    w.until_true(|| booted(&w) == 1).await;
    assert_eq!(w.engine.spare_machines(), 0, "it is not known yet whether there will be others");
    w.create("two").await;
    w.until_true(|| w.engine.spare_machines() == 1).await;
    w
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_waits_for_the_next_sandbox() {
    let dir = tempfile::tempdir().unwrap();
    let w = with_spare(dir.path()).await;
    assert_eq!(w.engine.list(None).len(), 2, "it is no sandbox");
    let starts = w.vmm.starts();
    w.create("three").await;
    let record = w.engine.show("three").unwrap().record;
    assert_eq!((record.boot_path, record.state, woken(&w, "three")), (Some(Warm), State::Running, true));
    let machine = w.vmm.machine(&record.id).unwrap();
    assert!(machine.hostname() == "three" && machine.clock().is_some());
    assert_eq!(w.sh("three", "echo up").await.unwrap().0, "up\n");
    let mut mark = [0; 8];
    w.disk(record.disk).read(0, &mut mark).unwrap();
    assert_eq!(&mark, MARK, "its disk is its template's");
    // The machine that was there, and the one that waits next.
    w.until_true(|| w.engine.spare_machines() == 1).await;
    assert_eq!(w.vmm.starts(), starts + 1);

    // Its end is like any other's, and so are its next sessions.
    assert_eq!(again(&w, "three").await, Warm);
    assert!(!woken(&w, "three"));
    w.engine.destroy("three").await.unwrap();

    // One without a name has its id for one, and its timeout counts from now.
    let timeout = Some(std::time::Duration::from_secs(3600));
    let unnamed = CreateRequest { name: None, wait: true, timeout, ..wanted("") };
    let unnamed = w.engine.create(unnamed).await.unwrap();
    assert_eq!(unnamed.record.name, unnamed.record.id);
    assert!(unnamed.timeout_remaining.is_some_and(|left| left > std::time::Duration::from_secs(3500)));
    w.until_true(|| w.engine.spare_machines() == 1).await;

    // Not for another kind, nor one that is not to start.
    w.engine.create(CreateRequest { start: false, ..wanted("rest") }).await.unwrap();
    w.engine.create(CreateRequest { memory_mib: 512, wait: true, ..wanted("more") }).await.unwrap();
    let denied = miosa::engine::records::NetworkPolicy::DenyAll;
    w.engine.create(CreateRequest { network_policy: denied, wait: true, ..wanted("alone") }).await.unwrap();
    assert_eq!(w.engine.spare_machines(), 1);

    // Where nothing runs any more, it does not wait either.
    for name in ["one", "two", "more", "alone", &unnamed.record.id] {
        w.engine.stop(name).await.unwrap();
    }
    assert_eq!(w.engine.spare_machines(), 0);
    // Templates that were being booted for later are done with by themselves.
    w.until_true(|| sessions(&w).is_empty()).await;
    w.engine.resume("one").await.unwrap();
    w.create("four").await;
    w.until_true(|| w.engine.spare_machines() == 1).await;

    // It goes with its template, and with the daemon.
    w.import("base").await;
    assert_eq!(w.engine.spare_machines(), 0);
    let w = with_spare(dir.path()).await;
    w.engine.shutdown(std::time::Duration::from_secs(60)).await.unwrap();
    assert_eq!((w.engine.spare_machines(), sessions(&w).len()), (0, 0), "nothing of it is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_machine_that_is_of_no_use_costs_nobody_anything() {
    let dir = tempfile::tempdir().unwrap();
    let w = with_spare(dir.path()).await;
    // A name that is taken costs nobody the machine.
    w.engine.create(CreateRequest { wait: true, ..wanted("two") }).await.unwrap_err();
    assert_eq!(w.engine.spare_machines(), 1);
    // Its guest does not answer any more.
    let known: Vec<String> = w.engine.list(None).into_iter().map(|view| view.record.id).collect();
    let spare = sessions(&w).into_iter().find(|id| !known.contains(id)).unwrap();
    w.vmm.machine(&spare).unwrap().die("scripted");
    w.create("three").await;
    let record = w.engine.show("three").unwrap().record;
    assert!(record.state == State::Running && record.last_error.is_none());
    assert_eq!(w.sh("three", "echo up").await.unwrap().0, "up\n");

    // One that is being made when the daemon ends is given up: machines outlive a daemon, and nobody would know of it.
    let w = with_spare(dir.path()).await;
    let known = sessions(&w);
    let (stuck, freed) = stop_at(&w, "hold");
    w.create("three").await;
    tokio::task::spawn_blocking(move || stuck.wait()).await.unwrap();
    let three = w.engine.show("three").unwrap().record.id;
    let spare = sessions(&w).into_iter().find(|id| !known.contains(id) && *id != three).unwrap();
    w.engine.shutdown(std::time::Duration::from_secs(60)).await.unwrap();
    let gone = w.until_true(|| w.vmm.machine(&spare).is_none());
    let gone = tokio::time::timeout(std::time::Duration::from_secs(60), gone).await;
    freed.wait();
    assert!(gone.is_ok(), "its machine outlives the daemon");

    // One that waited when its daemon was killed leaves nothing.
    let w = with_spare(dir.path()).await;
    let w = w.crash().await;
    w.until_true(|| w.store.disks().len() == w.engine.list(None).len() + 1).await;
    assert_eq!(w.engine.spare_machines(), 0);
}
