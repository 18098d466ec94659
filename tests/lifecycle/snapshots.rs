//! Snapshots once they are there, and where everything came from.

use std::time::Duration;

use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use miosa::engine::{CreateRequest, ForkRequest, LineageNode, NodeKind, Origin, SnapshotRequest};

use crate::support::{DISK_BYTES, World, forks, named, refused, wanted};

#[tokio::test]
async fn a_disk_can_be_larger_than_its_templates() {
    let w = World::new().await;
    let twice = Some((2 * DISK_BYTES) >> 20);
    let one = w.engine.create(CreateRequest { disk_mib: twice, wait: true, ..wanted("one") }).await.unwrap().record;
    assert_eq!(one.disk_size_bytes, 2 * DISK_BYTES);
    assert_eq!(w.disk(one.disk).size_bytes(), 2 * DISK_BYTES);
    let mut bytes = [1; 8];
    w.disk(one.disk).read(DISK_BYTES, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 8]);
    // What is made from it is as large.
    let child = w.engine.fork("one", forks("child", 1)).await.unwrap().remove(0).record;
    assert_eq!((child.disk_size_bytes, w.disk(child.disk).size_bytes()), (2 * DISK_BYTES, 2 * DISK_BYTES));
    // A smaller one is as large as the template's.
    let small = CreateRequest { disk_mib: Some(1), start: false, ..wanted("small") };
    assert_eq!(w.engine.create(small).await.unwrap().record.disk_size_bytes, DISK_BYTES);
}

#[tokio::test]
async fn restore_puts_the_file_system_back_and_keeps_the_identity() {
    let w = World::new().await;
    let before = w.create("one").await.record;
    w.disk(before.disk).write(8_192, b"before").unwrap();
    let snapshot = w.engine.snapshot("one", named("good")).await.unwrap();
    w.disk(before.disk).write(8_192, b"broken").unwrap();
    let after = w.engine.restore("one", "good").await.unwrap().record;
    assert_eq!((after.state, &after.id, &after.name), (State::Running, &before.id, &before.name));
    assert_eq!(after.machine_id, before.machine_id);
    assert_ne!(after.disk, before.disk);
    assert_eq!(w.vmm.starts(), 2);
    let mut content = [0; 6];
    w.disk(after.disk).read(8_192, &mut content).unwrap();
    assert_eq!(&content, b"before");
    assert_eq!(w.store.disks().len(), 1, "the old disk is gone");
    // At rest it stays at rest; and the snapshot of another is none of its own.
    w.engine.stop("one").await.unwrap();
    assert_eq!(w.engine.restore("one", &snapshot.id).await.unwrap().record.state, State::Paused);
    w.create("other").await;
    assert_eq!(refused(w.engine.restore("other", &snapshot.id).await), Kind::SnapshotNotFound);
    let w = w.crash().await;
    assert_eq!(w.state("one"), State::Paused);
    assert_eq!(w.sh("one", "echo up").await.unwrap().0, "up\n");
}

#[tokio::test]
async fn a_snapshot_can_stop_its_sandbox_and_only_the_last_are_kept() {
    let w = World::new().await;
    w.create("one").await;
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(
            w.engine.snapshot("one", SnapshotRequest { keep_last: Some(2), ..Default::default() }).await.unwrap().id,
        );
    }
    let left: Vec<_> = w.engine.snapshots(Some("one")).unwrap().into_iter().map(|s| s.id).collect();
    assert_eq!(left, ids[2..]);
    w.engine.snapshot("one", SnapshotRequest { stop: true, ..named("end") }).await.unwrap();
    assert_eq!(w.state("one"), State::Paused);
    let none = SnapshotRequest { keep_last: Some(0), ..Default::default() };
    assert_eq!(refused(w.engine.snapshot("one", none).await), Kind::InvalidInput);
}

#[tokio::test]
async fn a_snapshot_expires() {
    let w = World::new().await;
    w.create("one").await;
    let short = SnapshotRequest { expires_in: Some(Duration::from_millis(1)), ..named("short") };
    let short = w.engine.snapshot("one", short).await.unwrap();
    let long = SnapshotRequest { expires_in: Some(Duration::from_secs(86_400)), ..named("long") };
    let long = w.engine.snapshot("one", long).await.unwrap();
    // The next daemon looks at once.
    tokio::time::sleep(Duration::from_millis(5)).await;
    let w = w.crash().await;
    w.until_true(|| w.engine.find_snapshot(&short.id, None).is_err()).await;
    assert_eq!(w.engine.find_snapshot("long", None).unwrap().expires_at, long.expires_at);
}

#[tokio::test]
async fn a_snapshot_that_is_used_expires_so_long_after_that() {
    let w = World::new().await;
    w.create("one").await;
    let hour = SnapshotRequest { expires_in: Some(Duration::from_secs(3_600)), ..named("hour") };
    let id = w.engine.snapshot("one", hour).await.unwrap().id;
    // As if it was taken a while ago.
    let age = |w: &World| {
        let mut record = w.engine.find_snapshot(&id, None).unwrap();
        record.expires_at = Some(jiff::Timestamp::now() + jiff::SignedDuration::from_secs(60));
        w.engine.adopt_snapshot(record.clone());
        record.expires_at
    };
    let origin = || Origin::Snapshot(id.clone());
    let aged = age(&w);
    assert_eq!(w.engine.find_snapshot(&id, None).unwrap().expires_at, aged);
    w.engine.create(CreateRequest { origin: origin(), start: false, ..wanted("two") }).await.unwrap();
    let created = w.engine.find_snapshot(&id, None).unwrap().expires_at;
    assert!(created > aged.map(|at| at + jiff::SignedDuration::from_secs(3_000)), "{created:?} {aged:?}");
    age(&w);
    w.engine.fork("one", ForkRequest { snapshot: Some(id.clone()), ..forks("three", 1) }).await.unwrap();
    assert!(w.engine.find_snapshot(&id, None).unwrap().expires_at > created);
    age(&w);
    w.engine.restore("one", &id).await.unwrap();
    let restored = w.engine.find_snapshot(&id, None).unwrap().expires_at;
    assert!(restored > created);
    // Durable, and used again at once it is not written again.
    let w = w.crash().await;
    assert_eq!(w.engine.find_snapshot(&id, None).unwrap().expires_at, restored);
    w.engine.create(CreateRequest { origin: origin(), start: false, ..wanted("four") }).await.unwrap();
    assert_eq!(w.engine.find_snapshot(&id, None).unwrap().expires_at, restored);
}

#[tokio::test]
async fn what_came_from_what_is_told_and_survives_deletions() {
    let w = World::new().await;
    let one = w.create("one").await.record.id;
    w.disk(w.engine.show("one").unwrap().record.disk).write(8_192, &[7; 40_960]).unwrap();
    let snap = w.engine.snapshot("one", named("s")).await.unwrap().id;
    let child = w.engine.fork("one", forks("child", 1)).await.unwrap().remove(0).record.id;
    let origin = Origin::Snapshot(snap.clone());
    let two = w.engine.create(CreateRequest { origin, start: false, ..wanted("two") }).await.unwrap().record.id;
    let other = w.create("other").await.record.id;
    let parents = |nodes: &[LineageNode]| -> Vec<(String, Option<String>)> {
        nodes.iter().map(|n| (n.id.clone(), n.parent.clone())).collect()
    };
    let edge = |id: &str, parent: &str| (id.to_owned(), Some(parent.to_owned()));
    let nodes = w.engine.lineage(None, true).await.unwrap();
    let base = ("base".to_owned(), None);
    let whole = [
        base.clone(),
        edge(&one, "base"),
        edge(&snap, &one),
        edge(&child, &one),
        edge(&two, &snap),
        edge(&other, "base"),
    ];
    assert_eq!(parents(&nodes), whole);
    assert!(nodes.iter().all(|n| n.exclusive_bytes.is_some() && n.unsealed_bytes.is_some()));
    assert_eq!(nodes[1].unsealed_bytes.unwrap() + nodes[1].exclusive_bytes.unwrap(), 0, "the snapshot has it too");
    // Of one: what it came from and what came from it.
    let of = parents(&w.engine.lineage(Some("two"), false).await.unwrap());
    assert_eq!(of, [base.clone(), edge(&one, "base"), edge(&snap, &one), edge(&two, &snap)]);
    // What is gone is shown for the sake of what is left.
    w.engine.destroy("one").await.unwrap();
    let deleted = w.engine.delete_snapshot(&snap, None, true).await.unwrap();
    assert!(deleted.freed_bytes.is_some());
    let nodes = w.engine.lineage(None, false).await.unwrap();
    assert_eq!(
        parents(&nodes),
        [(snap.clone(), None), base, edge(&one, "base"), edge(&child, &one), edge(&two, &snap), edge(&other, "base")]
    );
    assert_eq!((nodes[0].kind, nodes[0].state.as_str()), (NodeKind::Snapshot, "deleted"));
    assert_eq!(nodes[2].state, "destroyed");
    w.engine.destroy("child").await.unwrap();
    w.engine.destroy("two").await.unwrap();
    assert_eq!(w.engine.lineage(None, false).await.unwrap().len(), 2);
}
