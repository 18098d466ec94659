//! Many callers at once.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use miosa::engine::records::SandboxRecord;
use miosa::engine::{CreateRequest, SnapshotRequest};
use storage::medium::sim::Random;
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
async fn a_hundred_commands_on_ten_paused_sandboxes_are_exact_and_start_ten_sessions() {
    let w = Arc::new(World::new().await);
    let name = |i: u32| format!("box{}", i % 10);
    for i in 0..10 {
        w.engine.create(CreateRequest { start: false, ..wanted(&name(i)) }).await.unwrap();
    }
    let calls = (0..100).map(|i| {
        let (w, name) = (w.clone(), name(i));
        tokio::spawn(async move { w.sh(&name, &format!("seq {i} {}; exit {i}", 1_000 + i)).await })
    });
    for (i, call) in (0..).zip(calls.collect::<Vec<_>>()) {
        let (out, code) = call.await.unwrap().unwrap();
        let expected: String = (i..=1_000 + i).map(|n: i32| format!("{n}\n")).collect();
        assert!(out == expected && code == Some(i), "{i}: {code:?}, {} bytes", out.len());
    }
    assert_eq!(w.vmm.starts(), 10);
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

/// What one of many random callers does; errors are those that a caller can make sense of.
async fn anything(w: &World, random: &mut Random, snapshots: &Mutex<Vec<String>>) {
    let name = ["a", "b", "c"][random.below(3) as usize];
    let outcome = match random.below(12) {
        0 | 1 => {
            let request =
                CreateRequest { wait: random.below(2) == 0, persistent: random.below(4) != 0, ..wanted(name) };
            w.engine.create(request).await.map(drop)
        }
        2 => w.engine.stop(name).await.map(drop),
        3 => w.engine.resume(name).await.map(drop),
        4 => w.sh(name, "echo x > f; cat f").await.map(drop),
        5 => match w.engine.write_file(name, "/workspace/file", None).await {
            Ok(mut writer) => match writer.write(&[7; 100_000]).await {
                Ok(()) => writer.finish().await,
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        },
        6 => {
            let request = SnapshotRequest { stop: random.below(2) == 0, ..SnapshotRequest::default() };
            w.engine.snapshot(name, request).await.map(|s| snapshots.lock().unwrap().push(s.id))
        }
        7 => {
            let child = ["a", "b", "c", "d"][random.below(4) as usize];
            let request = miosa::engine::ForkRequest { wait: random.below(2) == 0, ..forks(child, 1) };
            w.engine.fork(name, request).await.map(drop)
        }
        8 => w.engine.extend(name, Some(Duration::from_secs(1_000))).await.map(drop),
        9 => {
            let some = snapshots.lock().unwrap().last().cloned().unwrap_or_default();
            w.engine.restore(name, &some).await.map(drop)
        }
        10 => {
            let some = snapshots.lock().unwrap().pop().unwrap_or_default();
            w.engine.delete_snapshot(&some, None, random.below(2) == 0).await.map(drop)
        }
        _ => w.engine.destroy(name).await.map(drop),
    };
    if let Err(error) = outcome {
        let sensible = [
            Kind::SandboxNotFound,
            Kind::SandboxDestroyed,
            Kind::NameTaken,
            Kind::NotRunning,
            Kind::SessionEnded,
            Kind::SnapshotNotFound,
            // The store's word for a snapshot that was deleted between its look-up and its use.
            Kind::DiskNotFound,
        ];
        assert!(sensible.contains(&error.kind()), "{:?}: {error}", error.kind());
    }
}

fn is_durable(w: &World, record: &SandboxRecord) -> bool {
    let durable: serde_json::Value = serde_json::from_slice(&w.store.record("sandbox", &record.id).unwrap()).unwrap();
    durable["state"] == record.state.name()
}

/// What is not as it must be whenever nobody is doing anything.
fn what_is_amiss(w: &World) -> Option<String> {
    let (mut live, mut names) = (0, std::collections::BTreeSet::new());
    for state in State::ALL {
        for view in w.engine.list(Some(state)) {
            let r = view.record;
            let wrong = match state {
                _ if !is_durable(w, &r) => "is durable as something else than what is told",
                _ if w.vmm.machine(&r.id).is_some() != (state == State::Running) => "has a machine or has none",
                State::Creating | State::Snapshotting => "is that for nobody",
                State::Destroyed if w.store.disk(r.disk).is_ok() => "has its disk",
                State::Destroyed => continue,
                _ if w.store.disk(r.disk).is_err() => "has no disk",
                _ if !names.insert(r.name.clone()) => "has the name of another that lives",
                _ => {
                    live += 1;
                    continue;
                }
            };
            return Some(format!("{}, which is {state:?}, {wrong}", r.name));
        }
    }
    let (disks, snapshots) = (w.store.disks().len(), w.store.snapshots().len());
    let known = 1 + w.engine.snapshots(None).unwrap().len();
    (disks != live || snapshots != known)
        .then(|| format!("{disks} disks of {live} sandboxes, {snapshots} states of which {known} are known"))
}

/// Machines may still be dying by their scripts, and it takes a while until that is seen; but not longer.
async fn nothing_is_amiss(w: &World) {
    let began = std::time::Instant::now();
    while let Some(wrong) = what_is_amiss(w) {
        assert!(began.elapsed() < Duration::from_secs(180), "{wrong}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_calls_at_once_have_sensible_answers_and_leave_nothing_amiss() {
    for seed in 0..4 {
        let w = Arc::new(World::new().await);
        let snapshots = Arc::new(Mutex::new(Vec::new()));
        let callers = (0..8).map(|caller| {
            let (w, snapshots) = (w.clone(), snapshots.clone());
            tokio::spawn(async move {
                let mut random = Random(seed * 100 + caller + 1);
                for _ in 0..25 {
                    if random.below(10) == 0 {
                        let die_after = Some(Duration::from_millis(random.below(30)));
                        w.vmm.script(Script { die_after, ..Script::default() });
                    }
                    anything(&w, &mut random, &snapshots).await;
                }
            })
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.unwrap();
        }
        nothing_is_amiss(&w).await;
        for view in w.engine.list(None) {
            let out = loop {
                match w.sh(&view.record.id, "echo up").await {
                    Ok((out, _)) => break out,
                    // A script that nobody had used yet: its machine dies, and with it what is not persistent.
                    Err(error) if error.kind() == Kind::SandboxDestroyed && !view.record.persistent => {
                        break String::new();
                    }
                    Err(error) => assert_eq!(error.kind(), Kind::SessionEnded, "{error}"),
                }
            };
            assert!(out == "up\n" || out.is_empty(), "seed {seed}: {} says {out:?}", view.record.name);
        }
    }
}
