//! Named snapshots: a name keeps a snapshot until it is taken away.

use std::time::Duration;

use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use miosa::engine::{CreateRequest, NamedSource, Origin, SnapshotRequest, Unnamed};

use crate::support::{World, named, refused, wanted};

fn of(sandbox: &str) -> NamedSource {
    NamedSource::Sandbox(sandbox.to_owned())
}

fn pinned(snapshot: &str) -> NamedSource {
    NamedSource::Snapshot(snapshot.to_owned())
}

fn from(name: &str, sandbox: &str) -> CreateRequest {
    CreateRequest { origin: Origin::Snapshot(name.to_owned()), wait: true, ..wanted(sandbox) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_outlives_its_sandbox_and_makes_others() {
    let w = World::new().await;
    let one = w.create("one").await.record;
    w.disk(one.disk).write(4_096, b"golden").unwrap();
    let made = w.engine.name_snapshot("golden", of("one")).await.unwrap();
    assert_eq!(
        (made.record.taken, made.snapshot.sandbox_id.as_str(), w.state("one")),
        (true, one.id.as_str(), State::Running)
    );
    w.engine.destroy("one").await.unwrap();

    let w = w.crash().await;
    assert_eq!(w.engine.named_snapshot("golden").unwrap().snapshot.id, made.snapshot.id);
    let two = w.engine.create(from("golden", "two")).await.unwrap().record;
    let mut content = [0; 6];
    w.disk(two.disk).read(4_096, &mut content).unwrap();
    assert_eq!((&content, two.from_snapshot.as_deref()), (b"golden", Some(made.snapshot.id.as_str())));
    let children: Vec<_> = w.engine.sandboxes_from_snapshot(&made.snapshot.id).into_iter().map(|r| r.name).collect();
    assert_eq!(children, ["two"]);

    // It goes with its name, and nobody needs it.
    assert_eq!(w.engine.unname_snapshot("golden").await.unwrap().1, Unnamed::Deleted);
    assert_eq!((w.engine.snapshots(None).unwrap().len(), w.engine.named_snapshots().len()), (0, 0));
    assert_eq!(w.sh("two", "echo up").await.unwrap().0, "up\n");
    let w = w.crash().await;
    assert!(w.engine.named_snapshots().is_empty() && w.engine.snapshots(None).unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_a_name_is_kept() {
    let w = World::new().await;
    w.create("one").await;
    let first = w.engine.snapshot("one", named("first")).await.unwrap();
    w.engine.name_snapshot("a", pinned("first")).await.unwrap();
    w.engine.name_snapshot("b", pinned(&first.id)).await.unwrap();
    assert!(w.engine.is_named(&first.id));
    let refusal = w.engine.delete_snapshot(&first.id, None, false).await.unwrap_err();
    assert_eq!(refusal.kind(), Kind::SnapshotInUse);
    // Retention goes around it.
    for _ in 0..3 {
        w.engine.snapshot("one", SnapshotRequest { keep_last: Some(2), ..SnapshotRequest::default() }).await.unwrap();
    }
    assert_eq!(w.engine.snapshots(Some("one")).unwrap().len(), 3);
    let short = SnapshotRequest { expires_in: Some(Duration::from_millis(300)), ..named("short") };
    let short = w.engine.snapshot("one", short).await.unwrap();
    w.engine.name_snapshot("c", pinned(&short.id)).await.unwrap_or_else(|e| panic!("it had not expired yet: {e}"));
    tokio::time::sleep(Duration::from_millis(400)).await;
    let w = w.crash().await;
    assert_eq!(w.engine.named_snapshot("c").unwrap().snapshot.id, short.id);

    // A snapshot that was there before its names is there after them.
    assert_eq!(w.engine.unname_snapshot("a").await.unwrap().1, Unnamed::Kept);
    assert_eq!(w.engine.unname_snapshot("b").await.unwrap().1, Unnamed::Released);
    w.engine.delete_snapshot(&first.id, None, false).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_names_are_refused_and_nothing_is_taken() {
    let w = World::new().await;
    w.create("one").await;
    w.engine.name_snapshot("golden", of("one")).await.unwrap();
    let before = w.engine.snapshots(None).unwrap().len();
    assert_eq!(refused(w.engine.name_snapshot("golden", of("one")).await), Kind::NameTaken);
    let id = w.engine.named_snapshot("golden").unwrap().snapshot.id;
    assert_eq!(refused(w.engine.name_snapshot("golden", pinned(&id)).await), Kind::NameTaken);
    assert_eq!(refused(w.engine.name_snapshot(&id, of("one")).await), Kind::NameTaken, "an id is no name");
    for name in ["", "a/b", "-x"] {
        assert_eq!(refused(w.engine.name_snapshot(name, of("one")).await), Kind::InvalidInput, "{name:?}");
    }
    assert_eq!(refused(w.engine.name_snapshot("x", of("none")).await), Kind::SandboxNotFound);
    assert_eq!(refused(w.engine.name_snapshot("x", pinned("none")).await), Kind::SnapshotNotFound);
    assert_eq!(refused(w.engine.unname_snapshot("x").await), Kind::SnapshotNotFound);
    assert_eq!(refused(w.engine.named_snapshot("x")), Kind::SnapshotNotFound);
    assert_eq!(w.engine.snapshots(None).unwrap().len(), before);
    // What was refused did not use the name up; of many at once one gets it.
    let tries = (0..4).map(|_| {
        let engine = w.engine.clone();
        tokio::spawn(async move { engine.name_snapshot("x", of("one")).await })
    });
    let mut given = 0;
    for attempt in tries.collect::<Vec<_>>() {
        match attempt.await.unwrap() {
            Ok(_) => given += 1,
            Err(error) => assert_eq!(error.kind(), Kind::NameTaken),
        }
    }
    assert_eq!((given, w.engine.snapshots(None).unwrap().len()), (1, before + 1));
}
