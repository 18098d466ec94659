//! What each operation does to a sandbox, one at a time.

use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use miosa::engine::records::Consistency;
use miosa::engine::{BuildRequest, CreateRequest, ForkRequest, ImageSource, Origin, SnapshotRequest};

use crate::support::{DISK_BYTES, MARK, World, forks, named, refused, wanted};

#[tokio::test]
async fn create_makes_a_running_sandbox_on_the_templates_content() {
    let w = World::new().await;
    let sandbox = w.create("one").await.record;
    assert_eq!(sandbox.state, State::Running);
    assert!(sandbox.ready_at.is_some() && sandbox.boot_ms.is_some());
    let mut mark = [0; 8];
    w.disk(sandbox.disk).read(0, &mut mark).unwrap();
    assert_eq!(&mark, MARK);
    w.disk(sandbox.disk).read(DISK_BYTES - 8, &mut mark).unwrap();
    assert_eq!(&mark, MARK);
    // By id and by name.
    assert_eq!(w.engine.show("one").unwrap().record.id, sandbox.id);
    assert_eq!(w.engine.show(&sandbox.id).unwrap().record.name, "one");
}

#[tokio::test]
async fn create_without_waiting_answers_while_it_starts() {
    let w = World::new().await;
    let script = vmm::fake::Script { boot_delay: std::time::Duration::from_millis(300), ..Default::default() };
    w.vmm.script(script);
    let sandbox = w.engine.create(wanted("slow")).await.unwrap().record;
    assert_eq!(sandbox.state, State::Creating);
    w.until("slow", State::Running).await;
}

#[tokio::test]
async fn create_without_a_start_is_paused_and_the_first_use_starts_it() {
    let w = World::new().await;
    let sandbox = w.engine.create(CreateRequest { start: false, ..wanted("idle") }).await.unwrap().record;
    assert_eq!((sandbox.state, w.vmm.starts()), (State::Paused, 0));
    assert_eq!(w.sh("idle", "echo up").await.unwrap(), ("up\n".to_owned(), Some(0)));
    assert_eq!((w.state("idle"), w.vmm.starts()), (State::Running, 1));
}

#[tokio::test]
async fn bad_requests_leave_nothing_behind() {
    let w = World::new().await;
    let create = |r| async { refused(w.engine.create(r).await) };
    let from = |origin| CreateRequest { origin, ..wanted("x") };
    assert_eq!(create(from(Origin::Template("nextjs".into()))).await, Kind::TemplateNotFound);
    assert_eq!(create(from(Origin::Snapshot("snap-none".into()))).await, Kind::SnapshotNotFound);
    assert_eq!(create(CreateRequest { disk_mib: Some(1 << 40), ..wanted("x") }).await, Kind::InvalidInput);
    assert_eq!(create(wanted("no/slash")).await, Kind::InvalidInput);
    assert_eq!(refused(w.engine.stop("nobody").await), Kind::SandboxNotFound);
    assert_eq!(refused(w.sh("nobody", "true").await), Kind::SandboxNotFound);
    assert!(w.engine.list(None).is_empty());
    assert!(w.store.disks().is_empty());
    // The name was not used up.
    w.create("x").await;
    assert_eq!(create(wanted("x")).await, Kind::NameTaken);
    assert_eq!(w.store.disks().len(), 1);
}

#[tokio::test]
async fn stop_keeps_and_resume_starts_again() {
    let w = World::new().await;
    w.create("one").await;
    let stopped = w.engine.stop("one").await.unwrap().record;
    assert_eq!((stopped.state, stopped.last_error, stopped.unclean), (State::Paused, None, false));
    assert!(w.vmm.machine(&stopped.id).is_none());
    // Again is fine.
    assert_eq!(w.engine.stop("one").await.unwrap().record.state, State::Paused);
    assert_eq!(w.engine.resume("one").await.unwrap().record.state, State::Running);
    assert_eq!(w.engine.resume("one").await.unwrap().record.state, State::Running);
    assert_eq!(w.vmm.starts(), 2);
}

#[tokio::test]
async fn a_destroyed_sandbox_is_gone_and_says_so() {
    let w = World::new().await;
    let id = w.create("one").await.record.id;
    let gone = w.engine.destroy("one").await.unwrap().record;
    assert_eq!(gone.state, State::Destroyed);
    assert!(w.store.disks().is_empty());
    assert!(w.vmm.machine(&id).is_none());
    assert_eq!(refused(w.sh(&id, "true").await), Kind::SandboxDestroyed);
    assert_eq!(refused(w.engine.resume(&id).await), Kind::SandboxDestroyed);
    assert_eq!(refused(w.engine.snapshot(&id, SnapshotRequest::default()).await), Kind::SandboxDestroyed);
    assert_eq!(refused(w.engine.fork(&id, forks("f", 1)).await), Kind::SandboxDestroyed);
    // A client that repeats itself is not scolded, the name is free, and lists are of the living.
    assert_eq!(w.engine.destroy(&id).await.unwrap().record.state, State::Destroyed);
    assert_eq!(refused(w.engine.show("one")), Kind::SandboxNotFound);
    assert!(w.engine.list(None).is_empty());
    assert_eq!(w.engine.list(Some(State::Destroyed)).len(), 1);
    assert_ne!(w.create("one").await.record.id, id);
}

#[tokio::test]
async fn a_running_sandbox_is_frozen_for_a_snapshot_and_goes_on() {
    let w = World::new().await;
    let sandbox = w.create("one").await.record;
    let disk = w.disk(sandbox.disk);
    disk.write(8_192, b"before").unwrap();
    let snapshot = w.engine.snapshot("one", named("after dependencies installed")).await.unwrap();
    disk.write(8_192, b"BROKEN").unwrap();
    assert_eq!(snapshot.consistency, Consistency::Filesystem);
    assert_eq!(w.state("one"), State::Running);
    let machine = w.vmm.machine(&sandbox.id).unwrap();
    assert!(!machine.is_frozen());
    assert_eq!(machine.freezes(), 1);

    let origin = Origin::Snapshot("after dependencies installed".into());
    let restored = w.engine.create(CreateRequest { origin, ..wanted("restored") }).await.unwrap().record;
    let mut content = [0; 6];
    w.disk(restored.disk).read(8_192, &mut content).unwrap();
    assert_eq!(&content, b"before");
    assert_eq!(restored.from_snapshot, Some(snapshot.id));
    assert_eq!(restored.template.as_deref(), Some("base"));
}

#[tokio::test]
async fn a_guest_that_does_not_freeze_is_snapshot_as_it_is() {
    let w = World::new().await;
    w.vmm.script(vmm::fake::Script { fail_freeze: Some("busy".into()), ..Default::default() });
    w.create("one").await;
    let snapshot = w.engine.snapshot("one", SnapshotRequest::default()).await.unwrap();
    assert_eq!(snapshot.consistency, Consistency::Crash);
    let child = w.engine.fork("one", forks("child", 1)).await.unwrap().remove(0).record;
    assert!(child.unclean);
    assert_eq!(w.state("one"), State::Running);
}

/// What a crash in the middle of a snapshot would leave: a look from beside, again and again, sees the weaker label first.
#[tokio::test(flavor = "multi_thread")]
async fn a_label_is_as_strong_as_what_is_certain() {
    let w = World::new().await;
    w.create("one").await;
    let mut weaker_seen = false;
    for _ in 0..200 {
        let (store, over) = (w.store.clone(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let before = store.records("snapshot").len();
        let ended = over.clone();
        let looker = std::thread::spawn(move || {
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                let records = store.records("snapshot");
                if records.len() > before {
                    let crash = |r: &[u8]| r.windows(7).any(|w| w == b"\"crash\"");
                    return records.iter().any(|(_, record)| crash(record));
                }
                std::hint::spin_loop();
            }
            false
        });
        let snapshot = w.engine.snapshot("one", SnapshotRequest::default()).await.unwrap();
        assert_eq!(snapshot.consistency, Consistency::Filesystem);
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        weaker_seen = looker.join().unwrap();
        if weaker_seen {
            break;
        }
    }
    assert!(weaker_seen, "the stronger label was there from the start");
}

#[tokio::test]
async fn a_child_that_does_not_start_is_told_with_the_others() {
    let w = World::new().await;
    w.create("parent").await;
    let broken = vmm::Error::new(vmm::ErrorKind::StartFailed, "no luck");
    w.vmm.script(vmm::fake::Script { fail_start: Some(broken), ..Default::default() });
    let children = w.engine.fork("parent", ForkRequest { wait: true, ..forks("child", 3) }).await.unwrap();
    let mut states: Vec<_> = children.iter().map(|c| c.record.state.name()).collect();
    states.sort();
    assert_eq!(states, ["error", "running", "running"]);
    for child in children {
        let failed = child.record.state == State::Error;
        assert_eq!(child.record.last_error.is_some_and(|e| e.contains("no luck")), failed);
    }
}

#[tokio::test]
async fn snapshots_are_found_by_id_and_by_unique_name_and_outlive_their_sandbox() {
    let w = World::new().await;
    w.create("one").await;
    let first = w.engine.snapshot("one", named("same")).await.unwrap();
    w.engine.stop("one").await.unwrap();
    let second = w.engine.snapshot("one", named("same")).await.unwrap();
    let third = w.engine.snapshot("one", named("other")).await.unwrap();
    assert_eq!(second.consistency, Consistency::Filesystem);
    let ids: Vec<_> = w.engine.snapshots(Some("one")).unwrap().into_iter().map(|s| s.id).collect();
    assert_eq!(ids, [first.id.clone(), second.id.clone(), third.id.clone()]);
    assert_eq!(refused(w.engine.find_snapshot("same", None)), Kind::SnapshotAmbiguous);
    assert_eq!(w.engine.find_snapshot("other", Some("one")).unwrap().id, third.id);

    w.engine.destroy("one").await.unwrap();
    w.engine.create(CreateRequest { origin: Origin::Snapshot(first.id.clone()), ..wanted("two") }).await.unwrap();
    for id in [&first.id, &second.id, &third.id] {
        w.engine.delete_snapshot(id, None, false).await.unwrap();
    }
    assert_eq!(refused(w.engine.delete_snapshot(&first.id, None, false).await), Kind::SnapshotNotFound);
    // The template's alone is left, and the sandbox that was made from one that is gone.
    assert_eq!(w.store.snapshots().len(), 1);
    assert_eq!(w.sh("two", "echo still here").await.unwrap().0, "still here\n");
}

#[tokio::test]
async fn forks_have_what_was_written_and_diverge() {
    let w = World::new().await;
    let parent = w.create("parent").await.record;
    let write = |disk, text: &[u8]| w.disk(disk).write(40_960, text).unwrap();
    let read = |disk| {
        let mut content = [0; 6];
        w.disk(disk).read(40_960, &mut content).unwrap();
        content
    };
    write(parent.disk, b"shared");
    let children = w.engine.fork("parent", forks("child", 2)).await.unwrap();
    let [a, b] = [children[0].record.clone(), children[1].record.clone()];
    assert_eq!([a.name.as_str(), b.name.as_str()], ["child-1", "child-2"]);
    assert_eq!([a.state, b.state], [State::Paused; 2]);
    assert_eq!(a.forked_from.as_deref(), Some(parent.id.as_str()));
    write(parent.disk, b"parent");
    write(a.disk, b"aaaaaa");
    assert_eq!([read(parent.disk), read(a.disk), read(b.disk)], [*b"parent", *b"aaaaaa", *b"shared"]);
    // A fork of a paused one, too; and the child does not need its parent.
    w.engine.stop("parent").await.unwrap();
    let c = w.engine.fork("parent", forks("c", 1)).await.unwrap().remove(0).record;
    w.engine.destroy("parent").await.unwrap();
    assert_eq!([read(b.disk), read(c.disk)], [*b"shared", *b"parent"]);
    // Nobody is mistaken for another.
    let ids = [&parent.machine_id, &a.machine_id, &b.machine_id, &c.machine_id];
    assert_eq!(ids.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
}

#[tokio::test]
async fn a_fork_takes_all_its_names_or_none() {
    let w = World::new().await;
    w.create("parent").await;
    w.engine.fork("parent", forks("child-2", 1)).await.unwrap();
    assert_eq!(refused(w.engine.fork("parent", forks("child", 3)).await), Kind::NameTaken);
    assert_eq!(w.engine.list(None).len(), 2);
    assert_eq!(refused(w.engine.fork("parent", forks("child", 0)).await), Kind::InvalidInput);
    w.engine.fork("parent", forks("child-1", 1)).await.unwrap();
}

#[tokio::test]
async fn a_template_can_be_replaced_and_deleted_under_its_sandboxes() {
    let w = World::new().await;
    let sandbox = w.create("one").await.record;
    w.import("base").await;
    assert_eq!(w.store.snapshots().len(), 1);
    w.engine.delete_template("base").await.unwrap();
    assert!(w.store.snapshots().is_empty() && w.engine.templates().is_empty());
    let mut mark = [0; 8];
    w.disk(sandbox.disk).read(0, &mut mark).unwrap();
    assert_eq!(&mark, MARK);
    assert_eq!(refused(w.engine.delete_template("base").await), Kind::TemplateNotFound);
    assert_eq!(refused(w.engine.create(wanted("two")).await), Kind::TemplateNotFound);
}

#[tokio::test]
async fn an_import_keeps_holes_holes() {
    let w = World::new().await;
    let template = w.engine.template("base").unwrap();
    assert_eq!(template.disk_size_bytes, DISK_BYTES);
    assert_eq!(template.data_bytes, 2 * 4_096);
    assert!(w.store.disks().is_empty(), "the disk of the import stays");
    let source = ImageSource::File { path: "/nonexistent".into(), format: None, disk_bytes: None };
    let request = BuildRequest { name: "bad/name".into(), source, no_cache: false };
    assert_eq!(refused(w.engine.build_template(request, |_| {}).await), Kind::InvalidInput);
}
