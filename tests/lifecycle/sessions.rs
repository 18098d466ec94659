//! Inside a session: programs, files, identity; and sessions that do not go as they should.

use std::collections::BTreeMap;
use std::time::Duration;

use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use miosa::engine::{CreateRequest, ExecEvent, ExecSpec, ForkRequest, Settings};
use vmm::fake::Script;

use crate::support::{World, forks, refused, sh, wanted};

#[tokio::test]
async fn programs_run_with_the_sandboxes_environment_and_their_own() {
    let w = World::new().await;
    let env = BTreeMap::from([("A".to_owned(), "sandbox".to_owned()), ("B".to_owned(), "sandbox".to_owned())]);
    w.engine.create(CreateRequest { env, wait: true, ..wanted("one") }).await.unwrap();
    let spec = ExecSpec { env: BTreeMap::from([("B".to_owned(), "own".to_owned())]), ..sh("echo $A $B; exit 3") };
    let mut exec = w.engine.exec("one", spec).await.unwrap();
    let mut seen = Vec::new();
    while let Some(event) = exec.next_event().await.unwrap() {
        seen.push(event);
    }
    assert_eq!(seen[0], ExecEvent::Stdout("sandbox own\n".into()));
    assert_eq!(seen[1], ExecEvent::Exit { code: Some(3), signal: None, timed_out: false });
}

#[tokio::test]
async fn bad_commands_and_paths_are_refused() {
    let w = World::new().await;
    w.create("one").await;
    let exec = |argv: &[&str]| ExecSpec { argv: argv.iter().map(|s| (*s).to_owned()).collect(), ..ExecSpec::default() };
    assert_eq!(refused(w.engine.exec("one", exec(&[])).await), Kind::InvalidInput);
    assert_eq!(refused(w.engine.exec("one", exec(&["a\0b"])).await), Kind::InvalidInput);
    let mut absent = w.engine.exec("one", exec(&["no-such-program"])).await.unwrap();
    assert_eq!(refused(absent.next_event().await), Kind::CommandNotFound);
    assert_eq!(refused(w.engine.read_file("one", "relative").await), Kind::InvalidInput);
    assert_eq!(refused(w.engine.read_file("one", "/absent").await), Kind::FileNotFound);
    assert_eq!(refused(w.engine.read_file("one", "/workspace").await), Kind::GuestFile);
    assert_eq!(refused(w.engine.write_file("one", "/dir/", None).await), Kind::InvalidInput);
    // What is wrong in itself starts no session.
    w.engine.stop("one").await.unwrap();
    assert_eq!(refused(w.engine.exec("one", exec(&[])).await), Kind::InvalidInput);
    assert_eq!(refused(w.engine.write_file("one", "relative", None).await), Kind::InvalidInput);
    assert_eq!(w.state("one"), State::Paused);
}

#[tokio::test]
async fn files_go_in_and_come_out_byte_for_byte() {
    let w = World::new().await;
    w.create("one").await;
    let content: Vec<u8> = (0..3_000_000_u32).flat_map(|i| i.to_le_bytes()).collect();
    let mut writer = w.engine.write_file("one", "/workspace/deep/er/file", Some(0o755)).await.unwrap();
    for piece in content.chunks(100_000) {
        writer.write(piece).await.unwrap();
    }
    writer.finish().await.unwrap();
    let mut reader = w.engine.read_file("one", "/workspace/deep/er/file").await.unwrap();
    let mut read = Vec::new();
    while let Some(piece) = reader.next_piece().await.unwrap() {
        read.extend_from_slice(&piece);
    }
    assert!(read == content, "{} bytes became {}", content.len(), read.len());
    // An empty one, too.
    w.engine.write_file("one", "/empty", None).await.unwrap().finish().await.unwrap();
    assert!(w.engine.read_file("one", "/empty").await.unwrap().next_piece().await.unwrap().is_none());
    // One that is not finished was never there.
    let mut writer = w.engine.write_file("one", "/half", None).await.unwrap();
    writer.write(b"half").await.unwrap();
    drop(writer);
    assert_eq!(refused(w.engine.read_file("one", "/half").await), Kind::FileNotFound);
}

#[tokio::test]
async fn a_file_operation_starts_a_session() {
    let w = World::new().await;
    w.engine.create(CreateRequest { start: false, ..wanted("one") }).await.unwrap();
    w.engine.write_file("one", "/f", None).await.unwrap().finish().await.unwrap();
    assert_eq!(w.state("one"), State::Running);
    w.engine.stop("one").await.unwrap();
    assert!(w.engine.read_file("one", "/f").await.is_ok());
    assert_eq!(w.state("one"), State::Running);
}

#[tokio::test]
async fn a_guest_is_told_who_it_is() {
    let w = World::new().await;
    let sandbox = w.create("My Agent_1").await.record;
    let machine = w.vmm.machine(&sandbox.id).unwrap();
    assert_eq!(machine.hostname(), "my-agent-1");
    assert!(machine.clock().is_some());
    let file = w.vmm.root_of(&sandbox.id).join("etc/machine-id");
    assert_eq!(std::fs::read_to_string(file).unwrap(), format!("{}\n", sandbox.machine_id));
}

#[tokio::test]
async fn a_stop_ends_what_runs() {
    let w = World::new().await;
    w.create("one").await;
    let mut exec = w.engine.exec("one", sh("echo started; exec sleep 600")).await.unwrap();
    assert_eq!(exec.next_event().await.unwrap(), Some(ExecEvent::Stdout("started\n".into())));
    w.engine.stop("one").await.unwrap();
    match exec.next_event().await {
        Err(error) => assert_eq!(error.kind(), Kind::SessionEnded),
        // The guest ends its programs before itself, and that may be heard.
        Ok(event) => assert!(matches!(event, Some(ExecEvent::Exit { code: None, signal: Some(_), .. })), "{event:?}"),
    }
    assert_eq!(w.state("one"), State::Paused);
}

#[tokio::test]
async fn a_machine_that_dies_leaves_a_paused_sandbox_that_can_be_used() {
    let w = World::new().await;
    let id = w.create("one").await.record.id;
    w.vmm.machine(&id).unwrap().die("killed by a test");
    w.until("one", State::Paused).await;
    let record = w.engine.show("one").unwrap().record;
    assert!(record.last_error.as_deref().is_some_and(|e| e.contains("killed by a test")), "{:?}", record.last_error);
    assert!(record.unclean);
    assert_eq!(w.sh("one", "echo again").await.unwrap().0, "again\n");
    assert_eq!(w.engine.show("one").unwrap().record.last_error, None);
}

#[tokio::test]
async fn a_machine_that_dies_takes_a_sandbox_that_is_not_persistent_with_it() {
    let w = World::new().await;
    let id = w.engine.create(CreateRequest { persistent: false, wait: true, ..wanted("one") }).await.unwrap().record.id;
    w.vmm.machine(&id).unwrap().die("killed by a test");
    w.until(&id, State::Destroyed).await;
    assert!(w.store.disks().is_empty());
}

#[tokio::test]
async fn a_start_that_fails_can_be_tried_again() {
    let w = World::new().await;
    let fail = || Script {
        fail_start: Some(vmm::Error::new(vmm::ErrorKind::QemuMissing, "no qemu here").hint("install it")),
        ..Script::default()
    };
    w.vmm.script(fail());
    let error = w.engine.create(CreateRequest { wait: true, ..wanted("one") }).await.unwrap_err();
    assert_eq!(error.kind(), Kind::MachineUnavailable);
    assert!(error.hint_text().is_some_and(|h| h.starts_with("install it; sandbox sb-")), "{error:?}");
    let record = w.engine.show("one").unwrap().record;
    assert_eq!((record.state, record.last_error.as_deref()), (State::Error, Some("no qemu here")));
    assert!(!w.run_dir(&record.id).exists());
    w.vmm.script(fail());
    assert_eq!(refused(w.sh("one", "true").await), Kind::MachineUnavailable);
    assert_eq!(w.state("one"), State::Error);
    assert_eq!(w.engine.resume("one").await.unwrap().record.last_error, None);
    assert_eq!(w.state("one"), State::Running);
}

#[tokio::test]
async fn a_guest_that_does_not_shut_down_is_killed_and_that_is_told() {
    let w = World::with(Settings { stop_deadline: Duration::from_millis(200), ..Settings::default() }).await;
    w.vmm.script(Script { hang_at_shutdown: true, ..Script::default() });
    w.create("one").await;
    let record = w.engine.stop("one").await.unwrap().record;
    assert_eq!(record.state, State::Paused);
    assert!(record.unclean && record.last_error.is_some(), "{record:?}");
    // The next orderly end makes it whole.
    w.engine.resume("one").await.unwrap();
    let record = w.engine.stop("one").await.unwrap().record;
    assert!(!record.unclean && record.last_error.is_none(), "{record:?}");
}

#[tokio::test]
async fn each_child_of_a_fork_has_an_identity_of_its_own_and_keeps_it() {
    let w = World::new().await;
    w.create("parent").await;
    let children = w.engine.fork("parent", ForkRequest { wait: true, ..forks("child", 5) }).await.unwrap();
    let file = |id: &str, path: &str| std::fs::read_to_string(w.vmm.root_of(id).join(path)).unwrap();
    let mut ids = std::collections::BTreeSet::new();
    let mut entropy = std::collections::BTreeSet::new();
    for child in &children {
        let r = &child.record;
        assert_eq!(file(&r.id, "etc/machine-id").trim(), r.machine_id);
        assert_eq!(file(&r.id, "etc/hostname").trim(), r.name);
        assert!(file(&r.id, "etc/hosts").contains(&format!("127.0.1.1 {}\n", r.name)));
        assert!(ids.insert(r.machine_id.clone()));
        assert!(entropy.insert(w.vmm.machine(&r.id).unwrap().entropy()));
        assert!(w.vmm.machine(&r.id).unwrap().clock().is_some());
    }
    // A resume is no copy: what the guest has changed stays.
    let id = &children[0].record.id;
    std::fs::write(w.vmm.root_of(id).join("etc/hostname"), "changed\n").unwrap();
    w.engine.stop(id).await.unwrap();
    w.engine.resume(id).await.unwrap();
    assert_eq!(file(id, "etc/hostname"), "changed\n");
}

#[tokio::test]
async fn directories_go_in_and_come_out_and_files_are_managed() {
    let w = World::new().await;
    w.create("one").await;
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o755);
    builder.append_data(&mut header, "a/run.sh", &b"hello"[..]).unwrap();
    let archive = builder.into_inner().unwrap();
    let mut writer = w.engine.write_tree("one", "/workspace/app", false).await.unwrap();
    writer.write(&archive).await.unwrap();
    assert_eq!(writer.finish().await.unwrap().files, 1);
    let stat = w.engine.stat_file("one", "/workspace/app/a/run.sh").await.unwrap();
    assert_eq!((stat.size, stat.mode), (5, 0o755));
    let mut reader = w.engine.read_tree("one", "/workspace/app").await.unwrap();
    let mut back = Vec::new();
    while let Some(piece) = reader.next_piece().await.unwrap() {
        back.extend_from_slice(&piece);
    }
    assert!(back.windows(5).any(|w| w == b"hello"));
    w.engine.rename_file("one", "/workspace/app/a", "/workspace/b").await.unwrap();
    let names: Vec<_> = w.engine.list_files("one", "/workspace").await.unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(names, ["app", "b"]);
    w.engine.remove_file("one", "/workspace/b", true).await.unwrap();
    assert_eq!(refused(w.engine.stat_file("one", "/workspace/b").await), Kind::FileNotFound);
    assert_eq!(refused(w.engine.remove_file("one", "/", true).await), Kind::InvalidInput);
    assert_eq!(refused(w.engine.write_tree("one", "//", true).await), Kind::InvalidInput);
    assert_eq!(refused(w.engine.read_tree("one", "/none").await), Kind::FileNotFound);
    let mut part = w.engine.read_range("one", "/etc/hostname", 1, Some(2)).await.unwrap();
    assert_eq!(part.next_piece().await.unwrap().as_deref(), Some(&b"ne"[..]));
}
