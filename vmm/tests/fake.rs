//! The fake machine behaves as machines do, and fails as it was told.

use std::path::PathBuf;
use std::time::Duration;

use vmm::fake::Script;
use vmm::{
    Accel, DiskAttachment, Error, ErrorKind, ExecRequest, ExitReason, FakeVmm, Identity, MachineSpec, Network, Vmm,
};

const PATIENCE: Duration = Duration::from_secs(60);

fn spec(id: &str) -> MachineSpec {
    MachineSpec {
        id: id.into(),
        run_dir: PathBuf::from("/nonexistent"),
        cpus: 1,
        memory_mib: 256,
        kernel: PathBuf::new(),
        initramfs: PathBuf::new(),
        disk: DiskAttachment::RawFile { path: PathBuf::new() },
        volumes: Vec::new(),
        accel: Accel::Tcg,
        hostname: "box".into(),
        network: Network::None,
        mac: [2, 0, 0, 0, 0, 1],
        kernel_args: Vec::new(),
        warm: None,
    }
}

fn sh(script: &str) -> ExecRequest {
    ExecRequest { argv: vec!["sh".into(), "-c".into(), script.into()], ..Default::default() }
}

#[tokio::test]
async fn it_runs_programs_and_keeps_files() {
    let dir = tempfile::tempdir().unwrap();
    let vmm = FakeVmm::new(dir.path());
    let machine = vmm.start(spec("m"), PATIENCE).await.unwrap();
    let agent = machine.agent();
    let output = agent.run(sh("echo hi > f; cat f; exit 3"), 100).await.unwrap();
    assert_eq!((output.status.code, &output.stdout[..]), (Some(3), &b"hi\n"[..]));
    let mut writer = agent.write_file("/workspace/g", Some(0o600)).await.unwrap();
    writer.write(&[7; 1 << 20]).await.unwrap();
    writer.finish().await.unwrap();
    assert_eq!(agent.stat("/workspace/g").await.unwrap().size, 1 << 20);
    assert_eq!(agent.read_file("/workspace/f").await.unwrap().read_to_end(10).await.unwrap(), "hi\n");
    agent.freeze(PATIENCE).await.unwrap();
    assert!(vmm.machine("m").unwrap().is_frozen());
    assert!(agent.thaw().await.unwrap());
    agent.set_hostname("other").await.unwrap();
    let told = vmm.machine("m").unwrap();
    assert_eq!((told.hostname().as_str(), told.mac(), told.woken()), ("other", None, 0));
    let identity = Identity {
        machine_id: "7".repeat(32),
        hostname: "woken".into(),
        entropy: vec![7; 32],
        unix_nanos: 1,
        mac: Some([2, 0, 0, 0, 0, 9]),
        woken: true,
    };
    agent.identify(identity.clone()).await.unwrap();
    agent.identify(Identity { mac: None, woken: false, ..identity }).await.unwrap();
    assert_eq!((told.hostname().as_str(), told.mac(), told.woken()), ("woken", Some([2, 0, 0, 0, 0, 9]), 1));
    drop(told);
    assert_eq!(machine.shutdown(PATIENCE).await.unwrap(), ExitReason::Shutdown);
    assert_eq!(machine.wait().await, ExitReason::Shutdown);
    assert_eq!(agent.ping().await.unwrap_err().kind, ErrorKind::AgentLost);
    assert!(vmm.machine("m").is_none());

    let again = vmm.start(spec("m"), PATIENCE).await.unwrap();
    assert_eq!(&again.agent().run(sh("cat f"), 100).await.unwrap().stdout[..], b"hi\n");
    assert_eq!(again.kill().await.unwrap(), ExitReason::Killed);
}

#[tokio::test]
async fn it_fails_as_scripted() {
    let dir = tempfile::tempdir().unwrap();
    let vmm = FakeVmm::new(dir.path());
    vmm.script(Script { fail_start: Some(Error::new(ErrorKind::StartFailed, "no")), ..Default::default() });
    vmm.script(Script { hang_at_boot: true, ..Default::default() });
    vmm.script(Script { die_after: Some(Duration::ZERO), ..Default::default() });
    vmm.script(Script { hang_at_shutdown: true, ..Default::default() });
    vmm.script(Script { fail_freeze: Some("bad disk".into()), ..Default::default() });
    assert_eq!(vmm.start(spec("a"), PATIENCE).await.err().unwrap().kind, ErrorKind::StartFailed);
    assert_eq!(vmm.start(spec("a"), Duration::from_millis(1)).await.err().unwrap().kind, ErrorKind::BootTimeout);
    let dying = vmm.start(spec("a"), PATIENCE).await.unwrap();
    assert_eq!(dying.wait().await, ExitReason::Failed { message: "scripted".into() });
    let stubborn = vmm.start(spec("b"), PATIENCE).await.unwrap();
    assert_eq!(stubborn.shutdown(Duration::from_millis(50)).await.unwrap(), ExitReason::Killed);
    let bad_disk = vmm.start(spec("c"), PATIENCE).await.unwrap();
    assert_eq!(bad_disk.agent().freeze(PATIENCE).await.unwrap_err().message, "bad disk");
    assert_eq!(vmm.starts(), 5);
}
