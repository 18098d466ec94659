//! Many callers at once.

use std::time::Duration;

use miosa::engine::CreateRequest;
use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use vmm::fake::Script;

use crate::support::{World, forks, wanted};

const SLOW: Duration = Duration::from_millis(200);

#[tokio::test(flavor = "multi_thread")]
async fn many_resumes_start_one_session() {
    let w = World::new().await;
    w.engine.create(CreateRequest { start: false, ..wanted("one") }).await.unwrap();
    w.vmm.script(Script { boot_delay: SLOW, ..Script::default() });
    let calls = (0..16).map(|i| {
        let engine = w.engine.clone();
        tokio::spawn(async move {
            match i % 2 {
                0 => engine.resume("one").await.map(drop),
                _ => engine.read_file("one", "/absent").await.map(drop),
            }
        })
    });
    for call in calls.collect::<Vec<_>>() {
        if let Err(error) = call.await.unwrap() {
            assert_eq!(error.kind(), Kind::FileNotFound);
        }
    }
    assert_eq!((w.vmm.starts(), w.state("one")), (1, State::Running));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_creates_of_a_name_succeeds() {
    let w = World::new().await;
    let calls = (0..8).map(|_| {
        let engine = w.engine.clone();
        tokio::spawn(async move { engine.create(CreateRequest { start: false, ..wanted("one") }).await })
    });
    let mut made = 0;
    for call in calls.collect::<Vec<_>>() {
        match call.await.unwrap() {
            Ok(_) => made += 1,
            Err(error) => assert_eq!(error.kind(), Kind::NameTaken),
        }
    }
    assert_eq!((made, w.store.disks().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_and_a_stop_at_once_both_happen() {
    let w = World::new().await;
    w.create("one").await;
    for round in 0..5 {
        let name = format!("child{round}");
        let request = forks(&name, 1);
        let (forked, stopped) = tokio::join!(w.engine.fork("one", request), w.engine.stop("one"));
        assert_eq!(stopped.unwrap().record.state, State::Paused);
        assert!(!forked.unwrap()[0].record.unclean);
        assert_eq!(w.engine.resume("one").await.unwrap().record.state, State::Running);
    }
    assert_eq!(w.engine.list(None).len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn execs_and_stops_at_once_end_and_leave_no_session_unaccounted() {
    let w = World::new().await;
    let id = w.create("one").await.record.id;
    for _ in 0..10 {
        let (ran, stopped) = tokio::join!(w.sh("one", "echo x"), w.engine.stop("one"));
        match ran {
            Ok((out, code)) => assert!(out == "x\n" || code != Some(0), "{out:?} {code:?}"),
            Err(error) => assert_eq!(error.kind(), Kind::SessionEnded, "{error}"),
        }
        stopped.unwrap();
        let running = w.state("one") == State::Running;
        assert_eq!(w.vmm.machine(&id).is_some(), running);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destroy_waits_for_a_start_and_then_ends_it() {
    let w = World::new().await;
    w.vmm.script(Script { boot_delay: SLOW, ..Script::default() });
    let id = w.engine.create(wanted("one")).await.unwrap().record.id;
    assert_eq!(w.state(&id), State::Creating);
    assert_eq!(w.engine.destroy(&id).await.unwrap().record.state, State::Destroyed);
    assert!(w.vmm.machine(&id).is_none() && w.store.disks().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_leaves_nothing_half_done() {
    let w = World::new().await;
    w.vmm.script(Script { boot_delay: SLOW, ..Script::default() });
    let engine = w.engine.clone();
    let call = tokio::spawn(async move { engine.create(CreateRequest { wait: true, ..wanted("one") }).await });
    w.until_true(|| w.vmm.starts() == 1).await;
    call.abort();
    w.until("one", State::Running).await;
    assert_eq!(w.sh("one", "echo here").await.unwrap().0, "here\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_of_one_parent_by_many_callers_are_all_there() {
    let w = World::new().await;
    w.create("one").await;
    let calls = (0..10).map(|i| {
        let engine = w.engine.clone();
        tokio::spawn(async move { engine.fork("one", forks(&format!("c{i}"), 10)).await })
    });
    for call in calls.collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap().unwrap().len(), 10);
    }
    assert_eq!(w.engine.list(Some(State::Paused)).len(), 100);
    assert_eq!(w.store.disks().len(), 101);
}
