//! Volumes: who has them, what becomes of them, and that they are nobody's root.

use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use miosa::engine::records::{Consistency, VolumeRecord};
use miosa::engine::{Attach, CreateRequest, CreateVolume};
use vmm::fake::Script;

use crate::support::{World, forks, named, refused, wanted};

const MIB: u64 = 1 << 20;
/// Where ext4 says that its journal has to be played back.
const INCOMPAT: u64 = 1_024 + 0x60;

fn new(name: &str) -> CreateVolume {
    CreateVolume { name: name.to_owned(), size_bytes: Some(64 * MIB), ..CreateVolume::default() }
}

fn at(volume: &str, path: &str) -> Attach {
    Attach { volume: volume.to_owned(), path: Some(path.to_owned()), read_only: false }
}

fn reading(volume: &str) -> Attach {
    Attach { volume: volume.to_owned(), path: None, read_only: true }
}

impl World {
    async fn idle(&self, name: &str) -> String {
        self.engine.create(CreateRequest { start: false, ..wanted(name) }).await.unwrap().record.id
    }

    async fn volume(&self, name: &str) -> VolumeRecord {
        self.engine.create_volume(new(name)).await.unwrap()
    }

    fn mounts(&self, sandbox: &str) -> Vec<(String, bool)> {
        let id = self.engine.show(sandbox).unwrap().record.id;
        self.vmm.machine(&id).unwrap().mounts().into_iter().map(|m| (m.path, m.read_only)).collect()
    }

    fn holders(&self, volume: &str) -> Vec<String> {
        let name = |id: &String| self.engine.show(id).unwrap().record.name;
        self.engine.volume(volume).unwrap().attachments.iter().map(|at| name(&at.sandbox_id)).collect()
    }

    /// As a machine that was killed leaves it.
    fn soil(&self, volume: &str) {
        let disk = self.disk(self.engine.volume(volume).unwrap().disk);
        let mut flags = [0; 4];
        disk.read(INCOMPAT, &mut flags).unwrap();
        flags[0] |= 4;
        disk.write(INCOMPAT, &flags).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_goes_from_sandbox_to_sandbox() {
    let w = World::new().await;
    let volume = w.volume("data").await;
    assert_eq!((volume.size_bytes, volume.attachments.len()), (64 * MIB, 0));
    assert_eq!(w.disk(volume.disk).size_bytes(), 64 * MIB);
    let mut magic = [0; 2];
    w.disk(volume.disk).read(1_024 + 0x38, &mut magic).unwrap();
    assert_eq!(magic, [0x53, 0xef], "it has a file system");

    let one = w.idle("one").await;
    w.engine.attach_volume("one", at("data", "/srv/data/")).await.unwrap();
    w.engine.resume("one").await.unwrap();
    assert_eq!(w.mounts("one"), [("/srv/data".to_owned(), false)]);
    assert!(w.front.shown.lock().unwrap().contains(&format!("{one} {}", volume.id)));
    w.sh("one", "echo kept > ../srv/data/note").await.unwrap();

    // What a session has it keeps until it ends.
    assert_eq!(refused(w.engine.detach_volume("data", None).await), Kind::Running);
    assert_eq!(refused(w.engine.detach_volume("data", Some("one")).await), Kind::Running);
    w.volume("late").await;
    assert_eq!(refused(w.engine.attach_volume("one", at("late", "/late")).await), Kind::Running);
    assert_eq!(w.holders("late"), Vec::<String>::new());

    w.engine.stop("one").await.unwrap();
    w.engine.detach_volume(&volume.id, Some(&one)).await.unwrap();
    w.idle("two").await;
    w.engine.attach_volume("two", Attach { volume: volume.id.clone(), ..Attach::default() }).await.unwrap();
    assert_eq!(w.sh("two", "cat ../mnt/data/note").await.unwrap().0, "kept\n");
    assert_eq!(w.sh("one", "cat ../srv/data/note").await.unwrap().1, Some(1), "it is not there any more");
    assert_eq!(w.mounts("one"), []);

    // It outlives who had it.
    w.engine.destroy("two").await.unwrap();
    assert_eq!(w.holders("data"), Vec::<String>::new());
    let three = CreateRequest { volumes: vec![at("data", "/data")], wait: true, ..wanted("three") };
    w.engine.create(three).await.unwrap();
    assert_eq!(w.sh("three", "cat ../data/note").await.unwrap().0, "kept\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_writes_or_any_number_read() {
    let w = World::new().await;
    let volume = w.volume("data").await;
    let (a, b) = (w.idle("a").await, w.idle("b").await);
    w.engine.attach_volume("a", at("data", "/data")).await.unwrap();
    let again = w.engine.attach_volume("b", at("data", "/data")).await.unwrap_err();
    assert_eq!(again.kind(), Kind::VolumeInUse);
    assert!(again.to_string().contains(&format!("sandbox a ({a})")), "names the holder: {again}");
    assert!(again.hint_text().unwrap().contains("miosa volume detach"), "{:?}", again.hint_text());
    assert_eq!(refused(w.engine.attach_volume("b", reading("data")).await), Kind::VolumeInUse);
    assert_eq!(refused(w.engine.attach_volume("a", at("data", "/other")).await), Kind::VolumeInUse);
    let taken = CreateRequest { volumes: vec![at("data", "/data")], ..wanted("c") };
    assert_eq!(refused(w.engine.create(taken).await), Kind::VolumeInUse);
    assert_eq!(refused(w.engine.show("c")), Kind::SandboxNotFound, "a refused create leaves nothing");

    w.engine.detach_volume("data", Some("a")).await.unwrap();
    w.engine.attach_volume("a", reading("data")).await.unwrap();
    w.engine.attach_volume("b", reading("data")).await.unwrap();
    assert_eq!(refused(w.engine.attach_volume("c", at("data", "/data")).await), Kind::SandboxNotFound);
    w.idle("c").await;
    assert_eq!(refused(w.engine.attach_volume("c", at("data", "/data")).await), Kind::VolumeInUse);
    for name in ["a", "b"] {
        w.engine.resume(name).await.unwrap();
        assert_eq!(w.mounts(name), [("/mnt/data".to_owned(), true)]);
    }
    for id in [&a, &b] {
        let shown = format!("{id} {} for reading", volume.id);
        assert!(w.front.shown.lock().unwrap().contains(&shown), "the device refuses writes");
    }
    assert_eq!(refused(w.engine.detach_volume("data", None).await), Kind::VolumeInUse, "which one?");
    assert_eq!(refused(w.engine.detach_volume("data", Some("c")).await), Kind::VolumeNotAttached);
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_no_part_of_snapshots_and_forks() {
    let w = World::new().await;
    w.volume("data").await;
    let create = CreateRequest { volumes: vec![at("data", "/data")], wait: true, ..wanted("one") };
    w.engine.create(create).await.unwrap();
    w.sh("one", "echo kept > ../data/note").await.unwrap();
    let snapshot = w.engine.snapshot("one", named("s")).await.unwrap();
    w.engine.fork("one", forks("child", 1)).await.unwrap();
    let origin = miosa::engine::Origin::Snapshot(snapshot.id.clone());
    w.engine.create(CreateRequest { origin, wait: true, ..wanted("copy") }).await.unwrap();
    w.engine.resume("child").await.unwrap();
    for name in ["child", "copy"] {
        assert_eq!(w.mounts(name), [], "{name}");
        assert_eq!(w.engine.volumes_of(name).unwrap(), []);
    }
    assert_eq!(w.holders("data"), ["one"]);
    // A restore puts back the sandbox's own disk alone.
    w.engine.restore("one", &snapshot.id).await.unwrap();
    assert_eq!(w.sh("one", "cat ../data/note").await.unwrap().0, "kept\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_refused_and_leave_nothing() {
    let w = World::new().await;
    w.volume("data").await;
    let disks = w.store.disks().len();
    assert_eq!(refused(w.engine.create_volume(new("data")).await), Kind::NameTaken);
    for name in ["", "a/b", "-a", "vol-0123456789ab"] {
        assert_eq!(refused(w.engine.create_volume(new(name)).await), Kind::InvalidInput, "{name:?}");
    }
    for size_bytes in [None, Some(0), Some(MIB), Some(16 * MIB + 1), Some(1 << 50), Some(u64::MAX)] {
        let wrong = CreateVolume { size_bytes, ..new("x") };
        assert_eq!(refused(w.engine.create_volume(wrong).await), Kind::InvalidInput, "{size_bytes:?}");
    }
    let of_nothing = CreateVolume { snapshot: Some("none".into()), size_bytes: None, ..new("x") };
    assert_eq!(refused(w.engine.create_volume(of_nothing).await), Kind::SnapshotNotFound);
    assert_eq!((w.store.disks().len(), w.engine.volumes().len()), (disks, 1));

    w.idle("one").await;
    assert_eq!(refused(w.engine.attach_volume("one", at("none", "/x")).await), Kind::VolumeNotFound);
    assert_eq!(refused(w.engine.attach_volume("none", at("data", "/x")).await), Kind::SandboxNotFound);
    for path in ["", "x", "/", "/proc/x", "/dev", "/a/../b", "/a\nb"] {
        assert_eq!(refused(w.engine.attach_volume("one", at("data", path)).await), Kind::InvalidInput, "{path:?}");
    }
    assert_eq!(refused(w.engine.detach_volume("data", None).await), Kind::VolumeNotAttached);
    assert_eq!(refused(w.engine.detach_volume("data", Some("one")).await), Kind::VolumeNotAttached);
    assert_eq!(refused(w.engine.delete_volume("none").await), Kind::VolumeNotFound);
    assert_eq!(refused(w.engine.snapshot_volume("none", None).await), Kind::VolumeNotFound);
    assert_eq!(refused(w.engine.snapshot_volume("data", Some(String::new())).await), Kind::InvalidInput);
    assert_eq!(refused(w.engine.restore_volume("data", "none").await), Kind::SnapshotNotFound);
    assert_eq!(refused(w.engine.delete_volume_snapshot("none").await), Kind::SnapshotNotFound);
    assert_eq!(w.holders("data"), Vec::<String>::new());

    w.volume("other").await;
    w.engine.attach_volume("one", at("data", "/data")).await.unwrap();
    assert_eq!(refused(w.engine.attach_volume("one", at("other", "/data/")).await), Kind::VolumeInUse, "same place");
    for i in 1..8 {
        let name = format!("v{i}");
        w.engine.create_volume(CreateVolume { size_bytes: Some(16 * MIB), ..new(&name) }).await.unwrap();
        w.engine.attach_volume("one", at(&name, &format!("/data/{name}"))).await.unwrap();
    }
    assert_eq!(refused(w.engine.attach_volume("one", at("other", "/more")).await), Kind::InvalidInput, "eight at most");
    assert_eq!(refused(w.engine.delete_volume("data").await), Kind::VolumeInUse);
    w.engine.resume("one").await.unwrap();
    let paths: Vec<_> = w.mounts("one").into_iter().map(|(path, _)| path).collect();
    assert_eq!((paths.len(), paths[0].as_str()), (8, "/data"), "what holds the others is mounted first");

    w.engine.destroy("one").await.unwrap();
    assert_eq!(refused(w.engine.attach_volume("one", at("other", "/x")).await), Kind::SandboxNotFound);
    for volume in w.engine.volumes() {
        w.engine.delete_volume(&volume.name).await.unwrap();
    }
    assert_eq!(w.store.disks().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volumes_states_are_kept_and_put_back() {
    let w = World::new().await;
    let volume = w.volume("data").await;
    let note = |w: &World| {
        let mut byte = [0];
        w.disk(w.engine.volume("data").unwrap().disk).read(32 * MIB, &mut byte).unwrap();
        byte[0]
    };
    w.disk(volume.disk).write(32 * MIB, &[1]).unwrap();
    let create = CreateRequest { volumes: vec![at("data", "/data")], wait: true, ..wanted("one") };
    let one = w.engine.create(create).await.unwrap().record.id;

    // Of one that is written to: its writer is frozen, and goes on.
    let snapshot = w.engine.snapshot_volume("data", Some("first".into())).await.unwrap();
    assert_eq!((snapshot.consistency, snapshot.size_bytes), (Consistency::Filesystem, 64 * MIB));
    let machine = w.vmm.machine(&one).unwrap();
    assert_eq!((machine.freezes(), machine.is_frozen(), w.state("one")), (1, false, State::Running));
    w.disk(volume.disk).write(32 * MIB, &[2]).unwrap();
    assert_eq!(refused(w.engine.restore_volume("data", "first").await), Kind::VolumeInUse);
    w.engine.stop("one").await.unwrap();
    assert_eq!(refused(w.engine.restore_volume("data", "first").await), Kind::VolumeInUse, "while anybody has it");
    w.engine.detach_volume("data", None).await.unwrap();
    w.engine.snapshot_volume("data", Some("second".into())).await.unwrap();
    w.engine.restore_volume("data", "first").await.unwrap();
    assert_eq!(note(&w), 1);
    w.engine.restore_volume("data", "second").await.unwrap();
    assert_eq!(note(&w), 2);

    // A volume of its own, which needs neither; and snapshots outlive their volume.
    let copy = CreateVolume { name: "copy".into(), snapshot: Some("first".into()), ..CreateVolume::default() };
    let larger = CreateVolume { size_bytes: Some(65 * MIB), ..copy.clone() };
    assert_eq!(refused(w.engine.create_volume(larger).await), Kind::InvalidInput);
    let copy = w.engine.create_volume(copy).await.unwrap();
    assert_eq!((copy.size_bytes, copy.from_snapshot.as_deref()), (64 * MIB, Some(snapshot.id.as_str())));
    w.engine.delete_volume("data").await.unwrap();
    assert_eq!(w.engine.volume_snapshots(None).unwrap().len(), 2);
    assert_eq!(w.engine.delete_volume_snapshot("first").await.unwrap().id, snapshot.id);
    let mut byte = [0];
    w.disk(copy.disk).read(32 * MIB, &mut byte).unwrap();
    assert_eq!(byte, [1]);
    let w = w.crash().await;
    assert_eq!(w.engine.volume_snapshots(None).unwrap().len(), 1);
    assert_eq!(w.engine.volume("copy").unwrap(), copy);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_unmounted_in_order_says_so() {
    let w = World::new().await;
    w.volume("data").await;
    w.idle("one").await;
    w.soil("data");
    assert_eq!(w.engine.snapshot_volume("data", None).await.unwrap().consistency, Consistency::Crash);
    let unclean = w.engine.attach_volume("one", reading("data")).await.unwrap_err();
    assert!(unclean.kind() == Kind::VolumeUnclean && unclean.hint_text().unwrap().contains("for writing"), "{unclean}");
    w.engine.attach_volume("one", at("data", "/data")).await.unwrap();
    // A freeze that did not succeed leaves the superblock as it is.
    w.vmm.script(Script { fail_freeze: Some("no".into()), ..Script::default() });
    w.engine.resume("one").await.unwrap();
    assert_eq!(w.engine.snapshot_volume("data", None).await.unwrap().consistency, Consistency::Crash);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_cannot_be_mounted_is_told_and_can_be_taken_away() {
    let w = World::new().await;
    w.volume("data").await;
    w.idle("one").await;
    w.engine.attach_volume("one", at("data", "/data")).await.unwrap();
    w.vmm.script(Script { fail_mount: Some("wrong fs type".into()), ..Script::default() });
    let failed = w.engine.resume("one").await.unwrap_err();
    assert!(failed.to_string().contains("/data: wrong fs type"), "{failed}");
    assert!(failed.hint_text().unwrap().contains("miosa volume detach"), "{:?}", failed.hint_text());
    assert_eq!(w.state("one"), State::Error);
    assert!(w.front.shown.lock().unwrap().is_empty());
    w.engine.detach_volume("data", None).await.unwrap();
    w.engine.resume("one").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_survive_every_end_of_a_daemon() {
    let w = World::new().await;
    let (data, shared) = (w.volume("data").await, w.volume("shared").await);
    let volumes = vec![at("data", "/data"), reading("shared")];
    let one = w.engine.create(CreateRequest { volumes, wait: true, ..wanted("one") }).await.unwrap().record.id;
    let fleeting =
        CreateRequest { persistent: false, volumes: vec![reading("shared")], wait: true, ..wanted("fleeting") };
    w.engine.create(fleeting).await.unwrap();
    w.sh("one", "echo kept > ../data/note").await.unwrap();
    let starts = w.vmm.starts();

    // The machine goes on, and has both its volumes back.
    let w = w.replace().await;
    w.until("one", State::Running).await;
    assert_eq!(w.sh("one", "cat ../data/note").await.unwrap().0, "kept\n");
    assert_eq!(w.vmm.starts(), starts);
    let shown = w.front.shown.lock().unwrap().clone();
    for name in [one.clone(), format!("{one} {}", data.id), format!("{one} {} for reading", shared.id)] {
        assert!(shown.contains(&name), "{name}: {shown:?}");
    }
    assert_eq!(refused(w.engine.delete_volume("data").await), Kind::VolumeInUse);

    // Nobody goes on: what is persistent has what it had, what is not has left.
    let w = w.crash().await;
    assert_eq!((w.state("one"), w.engine.list(None).len()), (State::Paused, 1));
    assert_eq!((w.holders("data"), w.holders("shared")), (vec!["one".to_owned()], vec!["one".to_owned()]));
    w.engine.resume("one").await.unwrap();
    assert_eq!(w.mounts("one"), [("/data".to_owned(), false), ("/mnt/shared".to_owned(), true)]);
    w.engine.destroy("one").await.unwrap();
    let w = w.crash().await;
    assert_eq!(w.engine.volumes().len(), 2);
    assert!(w.holders("data").is_empty() && w.holders("shared").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_was_being_made_leaves_nothing() {
    let w = World::new().await;
    let mut tx = w.store.begin();
    tx.create_disk("vol-0123456789ab", 16 * MIB);
    tx.create_disk("volumes of mine", 16 * MIB);
    tx.commit_durable().unwrap();
    let w = w.crash().await;
    let names: Vec<_> = w.store.disks().into_iter().map(|d| d.name).collect();
    assert_eq!(names, ["volumes of mine"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_attach_at_once_one_writes() {
    let w = World::new().await;
    w.volume("data").await;
    let mut calls = Vec::new();
    for i in 0..8 {
        let name = format!("s{i}");
        w.idle(&name).await;
        let engine = w.engine.clone();
        calls.push(tokio::spawn(async move { engine.attach_volume(&name, at("data", "/data")).await }));
    }
    let mut won = 0;
    for call in calls {
        match call.await.unwrap() {
            Ok(_) => won += 1,
            Err(error) => assert_eq!(error.kind(), Kind::VolumeInUse),
        }
    }
    assert_eq!((won, w.holders("data").len()), (1, 1));
}
