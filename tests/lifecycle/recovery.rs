//! A daemon that ends, well or badly, and the next one.

use std::sync::Arc;
use std::time::Duration;

use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use miosa::engine::{Changes, CreateRequest, Settings};
use storage::catalogue::MemCatalogue;
use storage::medium::sim::SimMedium;
use storage::{Options, Store};
use vmm::fake::Script;

use crate::support::{World, forks, named, refused, wanted};

#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_every_sandbox_is_at_rest() {
    let w = World::new().await;
    let running = w.create("running").await.record;
    w.disk(running.disk).write(4_096, b"flushed").unwrap();
    w.disk(running.disk).flush().unwrap();
    let fleeting =
        w.engine.create(CreateRequest { persistent: false, wait: true, ..wanted("fleeting") }).await.unwrap().record;
    w.create("stopped").await;
    w.engine.stop("stopped").await.unwrap();
    let snapshot = w.engine.snapshot("stopped", named("kept")).await.unwrap();
    w.engine.fork("running", forks("child", 1)).await.unwrap();
    w.engine.destroy(&w.create("gone").await.record.id).await.unwrap();

    let w = w.crash().await;
    let record = w.engine.show("running").unwrap().record;
    assert_eq!(record.state, State::Paused);
    assert!(record.unclean && record.last_error.is_some());
    let mut content = [0; 7];
    w.disk(record.disk).read(4_096, &mut content).unwrap();
    assert_eq!(&content, b"flushed");
    assert_eq!(w.state(&fleeting.id), State::Destroyed);
    let stopped = w.engine.show("stopped").unwrap().record;
    assert_eq!((stopped.state, stopped.last_error), (State::Paused, None));
    assert_eq!(w.state("child"), State::Paused);
    assert_eq!(refused(w.engine.show("gone")), Kind::SandboxNotFound);
    assert_eq!(w.engine.find_snapshot("kept", None).unwrap().id, snapshot.id);
    assert_eq!(w.engine.templates().len(), 1);
    assert_eq!(w.store.disks().len(), 3);
    // And can be used; the names of the dead are free.
    assert_eq!(w.sh("running", "echo up").await.unwrap().0, "up\n");
    w.create("fleeting").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_was_cut_off_leaves_a_paused_sandbox() {
    let w = World::new().await;
    w.vmm.script(Script { boot_delay: Duration::from_secs(600), ..Script::default() });
    let id = w.engine.create(wanted("one")).await.unwrap().record.id;
    w.until_true(|| w.vmm.starts() == 1).await;
    let w = w.crash().await;
    assert_eq!(w.state(&id), State::Paused);
    w.engine.resume(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_engine_made_and_no_record_names_is_deleted_and_what_others_made_is_not() {
    let w = World::new().await;
    let sandbox = w.create("one").await.record.id;
    let make = |disk: &str, snapshot: &str| {
        let mut tx = w.store.begin();
        let id = tx.create_disk(disk, 1 << 20);
        tx.snapshot(id, snapshot);
        tx.commit_durable().unwrap();
    };
    make("import-0123456789ab", "template-0123456789ab");
    make("golden", "sb-1");
    let w = w.crash().await;
    let mut disks: Vec<_> = w.store.disks().into_iter().map(|d| d.name).collect();
    disks.sort();
    assert_eq!(disks, ["golden".to_owned(), sandbox]);
    let names: Vec<_> = w.store.snapshots().into_iter().map(|s| s.name).collect();
    assert_eq!(names.len(), 2);
    assert!(names.contains(&"sb-1".to_owned()) && !names.contains(&"template-0123456789ab".to_owned()), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orderly_end_stops_everything_and_refuses_the_rest() {
    let w = World::new().await;
    w.create("one").await;
    w.create("two").await;
    w.engine.shutdown(Duration::from_secs(60)).await.unwrap();
    assert_eq!(refused(w.engine.create(wanted("late")).await), Kind::ShuttingDown);
    assert_eq!(refused(w.engine.resume("one").await), Kind::ShuttingDown);
    let w = w.crash().await;
    for name in ["one", "two"] {
        let record = w.engine.show(name).unwrap().record;
        assert_eq!((record.state, record.last_error, record.unclean), (State::Paused, None, false), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_does_not_wait_for_ever() {
    let w = World::new().await;
    w.vmm.script(Script { hang_at_shutdown: true, ..Script::default() });
    w.create("stuck").await;
    w.engine.shutdown(Duration::from_millis(300)).await.unwrap();
    let w = w.crash().await;
    assert_eq!(w.state("stuck"), State::Paused);
}

/// A world on a simulated medium, on which the power can go.
async fn world_on(medium: &SimMedium, catalogue: &MemCatalogue) -> World {
    let options = Options { background: false, reserve_bytes: 0, ..Options::default() };
    let store = Store::open_with(Arc::new(medium.clone()), Arc::new(catalogue.clone()), options).unwrap();
    World::over(store, tempfile::tempdir().unwrap(), Settings::default()).await
}

/// The power goes at each event of a restore in turn. Whoever was told that it worked finds the snapshot's state; who was
/// not, that one or the one before; and the sandbox can be used.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_cut_off_leaves_the_old_state_or_the_restored_one() {
    let (mut old, mut restored) = (0, 0);
    for event in 0.. {
        let medium = SimMedium::new();
        let catalogue = MemCatalogue::new(medium.clone());
        let w = world_on(&medium, &catalogue).await;
        w.import("base").await;
        let disk = w.create("one").await.record.disk;
        w.disk(disk).write(8_192, b"before").unwrap();
        w.engine.snapshot("one", named("good")).await.unwrap();
        w.disk(disk).write(8_192, b"broken").unwrap();
        w.store.flush().unwrap();
        medium.stop_at(medium.events() + event);
        let answer = w.engine.restore("one", "good").await;
        if !medium.stopped() {
            answer.unwrap();
            break;
        }
        for outcome in 0..2 {
            let what = format!("power cut at event {event} of the restore, which answered {answer:?}");
            let medium = medium.after_power_loss(event << 8 | outcome);
            let w = world_on(&medium, &catalogue.after_power_loss(medium.clone())).await;
            let record = w.engine.show("one").unwrap().record;
            assert_eq!(record.state, State::Paused, "{what}");
            assert_eq!(w.store.disks().len(), 1, "{what}");
            let mut content = [0; 6];
            w.disk(record.disk).read(8_192, &mut content).unwrap();
            match &content {
                b"before" => restored += 1,
                b"broken" if answer.is_err() => old += 1,
                _ => panic!("{what}: found {content:?}"),
            }
            assert_eq!(w.sh("one", "echo up").await.unwrap().0, "up\n", "{what}");
        }
    }
    assert!(old > 0 && restored > 0, "{old} times the old state, {restored} times the restored one");
}

/// The power goes right after a change was answered, with and without what was not synced.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_was_answered_is_there_after_a_power_cut() {
    for outcome in 0..8 {
        let medium = SimMedium::new();
        let catalogue = MemCatalogue::new(medium.clone());
        let w = world_on(&medium, &catalogue).await;
        w.import("base").await;
        w.create("one").await;
        let changes = Changes {
            name: Some("two".to_owned()),
            memory_mib: Some(512),
            timeout: Some(Some(Duration::from_secs(77))),
            env: [("COLOUR".to_owned(), Some("red".to_owned()))].into(),
            tags: Some(vec!["kept".to_owned()]),
            ..Changes::default()
        };
        w.engine.update("one", changes).await.unwrap();
        medium.stop_at(medium.events());
        let medium = medium.after_power_loss(outcome);
        let w = world_on(&medium, &catalogue.after_power_loss(medium.clone())).await;
        let record = w.engine.show("two").unwrap().record;
        assert_eq!((record.memory_mib, record.timeout_ms, record.tags), (512, Some(77_000), vec!["kept".to_owned()]));
        assert_eq!(record.env.get("COLOUR").map(String::as_str), Some("red"));
        assert_eq!(refused(w.engine.show("one")), Kind::SandboxNotFound);
    }
}

/// What a daemon sees whose wall clock was set: moments in its records that are years ahead, or years ago.
#[tokio::test(flavor = "multi_thread")]
async fn a_wall_clock_that_jumps_ends_no_session_and_shortens_none() {
    const HOUR: Duration = Duration::from_secs(3_600);
    for (years, machines_too) in [(-30, true), (30, true), (-30, false), (30, false)] {
        let w = World::new().await;
        let limits = CreateRequest { timeout: Some(HOUR), idle_timeout: Some(HOUR), wait: true, ..wanted("one") };
        let mut record = w.engine.create(limits).await.unwrap().record;
        let jump = jiff::SignedDuration::from_hours(years * 365 * 24);
        record.created_at += jump;
        record.started_at = record.started_at.map(|at| at + jump);
        record.ready_at = record.ready_at.map(|at| at + jump);
        let mut tx = w.store.begin();
        tx.put_record("sandbox", &record.id, serde_json::to_vec(&record).unwrap());
        tx.commit_durable().unwrap();
        let w = if machines_too { w.crash().await } else { w.replace().await };
        assert_eq!(w.sh("one", "echo up").await.unwrap().0, "up\n");
        assert_eq!(w.vmm.starts(), 1, "of each stand-in for machines");
        let view = w.engine.show("one").unwrap();
        let left = view.timeout_remaining.unwrap();
        assert!(left <= HOUR && left > HOUR / 2, "{left:?} of an hour is left");
        assert_eq!(view.record.state, State::Running);
        let stopped = w.engine.stop("one").await.unwrap().record;
        assert!(stopped.total_runtime_ms < HOUR.as_millis() as u64, "{} ms", stopped.total_runtime_ms);
    }
}
