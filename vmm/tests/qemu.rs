//! Real QEMU, a real Debian kernel and root file system, the real agent.
//!
//! Needs root, QEMU, mmdebstrap and Debian's package sources. Kernel and base image are made once and kept in
//! `MIOSA_CACHE_DIR` (default `~/.cache/miosa`). Nothing here is skipped, and nothing depends on speed: the deadlines
//! are only there so that a hang ends.

// Helpers of tests are tests too, which clippy cannot see.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmm::agent::{ExecEvent, ExecOutput};
use vmm::{
    Accel, Agent, BootPath, DiskAttachment, ErrorKind, ExecRequest, ExitReason, GuestErrorKind, Identity, Machine,
    MachineSpec, Mount, Network, QemuVmm, Vmm, VolumeDevice, image,
};

/// Far more than anything here takes, even on a loaded machine without KVM.
const PATIENCE: Duration = Duration::from_secs(240);

struct Images {
    kernel: image::Kernel,
    initramfs: PathBuf,
    base: PathBuf,
}

fn images() -> &'static Images {
    static IMAGES: OnceLock<Images> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/miosa");
        let cache = std::env::var_os("MIOSA_CACHE_DIR").map_or_else(home, PathBuf::from);
        let kernel = image::fetch_kernel(&cache).unwrap();
        let initramfs = cache.join("test-initramfs.cpio");
        image::build_initramfs(&kernel, &static_agent(), &initramfs).unwrap();
        let base = cache.join("test-base.raw");
        image::build_base_rootfs(&cache, &base, 2 << 30, |line| eprintln!("{line}")).unwrap();
        Images { kernel, initramfs, base }
    })
}

/// The agent as it goes into guests.
fn static_agent() -> PathBuf {
    let target = "x86_64-unknown-linux-gnu";
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "-p", "miosa-agent", "--target", target])
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(status.success(), "the agent does not build");
    // target/release/deps/this-test
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(3).unwrap().join(target).join("release/miosa-agent")
}

struct Lab {
    dir: tempfile::TempDir,
    spec: MachineSpec,
}

impl Lab {
    fn new(id: &str) -> Lab {
        let images = images();
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.raw");
        let copied = Command::new("cp").arg("--sparse=always").arg(&images.base).arg(&disk).status().unwrap();
        assert!(copied.success());
        let spec = MachineSpec {
            id: id.into(),
            run_dir: dir.path().join("run").join(id),
            cpus: 2,
            memory_mib: 512,
            kernel: images.kernel.vmlinuz.clone(),
            initramfs: images.initramfs.clone(),
            disk: DiskAttachment::RawFile { path: disk },
            volumes: Vec::new(),
            accel: Accel::Tcg,
            hostname: "box".into(),
            network: Network::User,
            mac: [2, 0, 0, 0, 0, 1],
            kernel_args: Vec::new(),
            warm: None,
        };
        Lab { dir, spec }
    }

    fn run_root(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    async fn boot(&self) -> Arc<dyn Machine> {
        let machine = QemuVmm::new().start(self.spec.clone(), PATIENCE).await.unwrap();
        eprintln!("{}: {:?}", self.spec.id, machine.boot_timing());
        machine
    }
}

fn sh(script: &str) -> ExecRequest {
    ExecRequest { argv: vec!["sh".into(), "-c".into(), script.into()], ..Default::default() }
}

async fn run(agent: &Agent, request: ExecRequest) -> ExecOutput {
    tokio::time::timeout(PATIENCE, agent.run(request, 1 << 20)).await.unwrap().unwrap()
}

async fn stdout(agent: &Agent, script: &str) -> String {
    let output = run(agent, sh(script)).await;
    assert_eq!(output.status.code, Some(0), "{script}: {output:?}");
    String::from_utf8(output.stdout.to_vec()).unwrap().trim_end().to_owned()
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Until the process has been reaped: while its threads are ending, it holds its files and locks.
fn alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// The guest's network works: the host is 10.0.2.2.
async fn reaches_the_host(agent: &Agent) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let greeter = std::thread::spawn(move || std::io::Write::write_all(&mut listener.accept().unwrap().0, b"hello"));
    let connect =
        format!("python3 -c 'import socket; print(socket.create_connection((\"10.0.2.2\", {port})).recv(9))'");
    assert_eq!(stdout(agent, &connect).await, "b'hello'");
    greeter.join().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_run_as_asked() {
    let lab = Lab::new("programs");
    // A disk larger than its file system.
    let DiskAttachment::RawFile { path } = &lab.spec.disk else { unreachable!() };
    std::fs::File::options().write(true).open(path).unwrap().set_len(4 << 30).unwrap();
    let machine = lab.boot().await;
    let agent = machine.agent();
    let size: u64 = stdout(&agent, "df -B1 --output=size / | tail -1").await.trim().parse().unwrap();
    assert!(size > 3 << 30, "the file system has grown to {size}");

    let info = agent.ping().await.unwrap();
    assert_eq!(info.kernel, images().kernel.version);
    assert_eq!(stdout(&agent, "cat /proc/1/comm").await, "init");
    assert_eq!(
        stdout(&agent, "hostname; pwd; echo $HOME; ls -d /dev/pts /dev/shm/. /run /tmp").await.lines().count(),
        7
    );
    assert_eq!(stdout(&agent, "hostname").await, "box");
    assert_eq!(stdout(&agent, "cat /sys/class/net/lo/flags /sys/class/net/eth0/flags").await, "0x9\n0x1003");
    assert_eq!(stdout(&agent, "python3 -c 'print(6*7)' && git --version | cut -c1-3").await, "42\ngit");

    reaches_the_host(&agent).await;
    assert_eq!(stdout(&agent, "cat /etc/resolv.conf").await, "nameserver 10.0.2.3");

    for code in [0, 1, 7, 126, 255] {
        let output = run(&agent, sh(&format!("exit {code}"))).await;
        assert_eq!((output.status.code, output.status.signal), (Some(code), None));
    }
    for signal in [6, 9, 15] {
        let output = run(&agent, sh(&format!("kill -{signal} $$"))).await;
        assert_eq!((output.status.code, output.status.signal), (None, Some(signal)));
    }
    let output = run(&agent, sh("echo out; echo err >&2; exit 3")).await;
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));

    let error = agent.run(ExecRequest { argv: vec!["no-such-program".into()], ..Default::default() }, 0).await;
    assert_eq!(error.unwrap_err().kind, ErrorKind::Guest(GuestErrorKind::NotFound));
    let error = agent.run(ExecRequest { cwd: Some("/none".into()), ..sh("true") }, 0).await;
    assert_eq!(error.unwrap_err().guest_kind(), Some(GuestErrorKind::NotFound));
    assert_eq!(agent.run(ExecRequest::default(), 0).await.unwrap_err().guest_kind(), Some(GuestErrorKind::Invalid));
    let error = agent.run(ExecRequest { user: Some("nobody-there".into()), ..sh("true") }, 0).await;
    assert_eq!(error.unwrap_err().guest_kind(), Some(GuestErrorKind::NotFound));

    let request = ExecRequest {
        env: vec![("GREETING".into(), "ü b".into())],
        cwd: Some("/usr/bin".into()),
        user: Some("sandbox".into()),
        ..sh("echo \"$GREETING $PWD $(id -u) $(id -g) $HOME\"")
    };
    assert_eq!(&run(&agent, request).await.stdout[..], "ü b /usr/bin 1000 1000 /home/sandbox\n".as_bytes());

    // A process left behind keeps running and does not hold up the answer.
    let left = stdout(&agent, "sleep 1000 & echo $!").await;
    assert_eq!(stdout(&agent, &format!("cat /proc/{left}/comm")).await, "sleep");
    // Orphans are reaped: no zombies are left.
    stdout(&agent, "for i in 1 2 3 4 5; do (sh -c 'exit 1' &) ; done").await;
    while stdout(&agent, "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z ' || true").await != "0" {}

    assert_eq!(machine.shutdown(PATIENCE).await.unwrap(), ExitReason::Shutdown);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_do_not_hold_each_other_up() {
    let lab = Lab::new("streams");
    let machine = lab.boot().await;
    let agent = machine.agent();

    // Standard input goes in and comes back, more than any buffer holds.
    let data = noise(3 << 20);
    let mut cat =
        agent.exec(ExecRequest { argv: vec!["cat".into()], stdin: true, ..Default::default() }).await.unwrap();
    let mut stdin = cat.take_stdin().unwrap();
    let sent = data.clone();
    let feeding = tokio::spawn(async move { stdin.write(&sent).await });
    let echoed = cat.collect(data.len() + 1).await.unwrap();
    feeding.await.unwrap().unwrap();
    assert!(echoed.stdout == data, "{} bytes came back of {}", echoed.stdout.len(), data.len());

    // Output arrives while the program runs: it waits for an answer to it.
    let mut chat =
        agent.exec(ExecRequest { stdin: true, ..sh("echo first; read line; echo \"got $line\"") }).await.unwrap();
    assert_eq!(chat.next_event().await.unwrap(), Some(ExecEvent::Stdout("first\n".into())));
    chat.take_stdin().unwrap().write(b"answer\n").await.unwrap();
    assert_eq!(&chat.collect(100).await.unwrap().stdout[..], b"got answer\n");

    // One floods and nobody reads it, one does not read its input: others do not notice.
    let stuck_reader = agent.exec(sh("yes")).await.unwrap();
    let mut deaf = agent.exec(ExecRequest { stdin: true, ..sh("sleep 100000") }).await.unwrap();
    let mut deaf_stdin = deaf.take_stdin().unwrap();
    let feeding = tokio::spawn(async move { deaf_stdin.write(&[0; 4 << 20]).await });
    let many = (0..20).map(|number| {
        let agent = agent.clone();
        tokio::spawn(async move {
            let output = run(&agent, sh(&format!("head -c 100000 /dev/zero | tr '\\0' x; exit {number}"))).await;
            assert_eq!((output.status.code, output.stdout.len()), (Some(number), 100_000));
        })
    });
    for one in many.collect::<Vec<_>>() {
        one.await.unwrap();
    }
    // Dropping a stream ends its program, whatever it does.
    let marked = agent.exec(sh("exec sleep 424242")).await.unwrap();
    let find = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 42424[2]' || true";
    while stdout(&agent, find).await != "1" {}
    drop(marked);
    while stdout(&agent, find).await != "0" {}
    drop((stuck_reader, deaf));
    assert!(feeding.await.unwrap().is_err(), "the deaf program's input ends with it");

    // The whole group is killed when time is over.
    let request = ExecRequest { timeout_ms: Some(300), ..sh("sleep 313131 & sleep 313131; true") };
    let output = run(&agent, request).await;
    assert_eq!((output.status.signal, output.status.timed_out), (Some(9), true));
    while stdout(&agent, "cat /proc/[0-9]*/cmdline 2>/dev/null | grep -c 31313[1] || true").await != "0" {}

    assert_eq!(machine.kill().await.unwrap(), ExitReason::Killed);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_come_and_go_whole() {
    let lab = Lab::new("files");
    let machine = lab.boot().await;
    let agent = machine.agent();
    let guest = |error: vmm::Error| error.guest_kind();

    let data = noise(20 << 20);
    let mut writer = agent.write_file("/workspace/deep/er/noise.bin", Some(0o640)).await.unwrap();
    for part in data.chunks(1 << 20) {
        writer.write(part).await.unwrap();
    }
    writer.finish().await.unwrap();
    let stat = agent.stat("/workspace/deep/er/noise.bin").await.unwrap();
    assert_eq!((stat.size, stat.mode, stat.uid), (data.len() as u64, 0o640, 0));
    let back = agent.read_file("/workspace/deep/er/noise.bin").await.unwrap().read_to_end(1 << 30).await.unwrap();
    assert!(back == data);

    // The old file stays until the new one is whole; its owner and mode stay for ever.
    stdout(&agent, "echo old > /workspace/f; chown 1000:1000 /workspace/f; chmod 751 /workspace/f").await;
    let mut writer = agent.write_file("/workspace/f", None).await.unwrap();
    writer.write(b"half of the new").await.unwrap();
    assert_eq!(stdout(&agent, "cat /workspace/f").await, "old");
    drop(writer);
    while stdout(&agent, "ls -A /workspace").await != "deep\nf" {}
    agent.write_file("/workspace/f", None).await.unwrap().finish().await.unwrap();
    assert_eq!(stdout(&agent, "stat -c '%s %u %g %a' /workspace/f").await, "0 1000 1000 751");

    let read = async |path: &str| agent.read_file(path).await.unwrap().read_to_end(1 << 20).await;
    assert_eq!(read("/none").await.map_err(guest), Err(Some(GuestErrorKind::NotFound)));
    assert_eq!(read("/etc").await.map_err(guest), Err(Some(GuestErrorKind::IsDirectory)));
    assert_eq!(read("relative").await.map_err(guest), Err(Some(GuestErrorKind::Invalid)));
    assert!(read("/proc/cpuinfo").await.unwrap().starts_with(b"processor"));
    let write = async |path: &str| {
        let mut writer = agent.write_file(path, None).await.unwrap();
        writer.write(&[1; 8 << 20]).await?;
        writer.finish().await
    };
    assert_eq!(write("/etc").await.map_err(guest), Err(Some(GuestErrorKind::IsDirectory)));
    assert_eq!(write("/etc/passwd/x").await.map_err(guest), Err(Some(GuestErrorKind::NotDirectory)));
    assert_eq!(write("/workspace/../none/").await.map_err(guest), Err(Some(GuestErrorKind::Invalid)));
    stdout(&agent, "mkdir /small && mount -t tmpfs -o size=1m none /small").await;
    assert_eq!(write("/small/f").await.map_err(guest), Err(Some(GuestErrorKind::NoSpace)));
    assert_eq!(stdout(&agent, "ls -A /small").await, "");

    assert_eq!(machine.shutdown(PATIENCE).await.unwrap(), ExitReason::Shutdown);
    // It went down in order: the file system is clean, without a journal to replay.
    let DiskAttachment::RawFile { path } = &lab.spec.disk else { unreachable!() };
    let check = Command::new("e2fsck").arg("-fn").arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&check.stdout);
    assert!(check.status.success() && !said.contains("recover"), "{said}");
    // What was written is there after the next boot.
    let machine = lab.boot().await;
    let sum = stdout(&machine.agent(), "sha256sum < /workspace/deep/er/noise.bin | cut -d' ' -f1").await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &data).unwrap();
    let expected = Command::new("sha256sum").arg(file.path()).output().unwrap().stdout;
    assert!(String::from_utf8_lossy(&expected).starts_with(&sum));
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_means_still_and_thaws_by_itself() {
    let lab = Lab::new("freeze");
    let machine = lab.boot().await;
    let agent = machine.agent();

    // While frozen a writer waits and everything else goes on.
    agent.freeze(Duration::from_secs(60)).await.unwrap();
    let mut writer = agent.exec(sh("echo new > /workspace/frozen; echo done")).await.unwrap();
    assert_eq!(stdout(&agent, "test -e /workspace/frozen || echo still").await, "still");
    assert!(agent.thaw().await.unwrap());
    assert_eq!(writer.next_event().await.unwrap(), Some(ExecEvent::Stdout("done\n".into())));
    assert!(!agent.thaw().await.unwrap());

    // A disk copied while frozen is a clean file system with all that was written.
    stdout(&agent, "echo kept > /workspace/kept").await;
    agent.freeze(Duration::from_secs(60)).await.unwrap();
    let DiskAttachment::RawFile { path } = &lab.spec.disk else { unreachable!() };
    let copy = lab.dir.path().join("copy.raw");
    assert!(Command::new("cp").arg("--sparse=always").arg(path).arg(&copy).status().unwrap().success());
    assert!(agent.thaw().await.unwrap());
    let check = Command::new("e2fsck").arg("-fn").arg(&copy).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let cat = Command::new("debugfs").args(["-R", "cat /workspace/kept"]).arg(&copy).output().unwrap();
    assert_eq!(&cat.stdout[..], b"kept\n");

    // Nobody thaws it: it does so itself.
    agent.freeze(Duration::from_millis(200)).await.unwrap();
    stdout(&agent, "echo more > /workspace/more").await;
    assert!(!agent.thaw().await.unwrap());

    // The clock, the host name.
    let then = UNIX_EPOCH + Duration::from_secs(2_000_000_000);
    agent.set_clock(then).await.unwrap();
    assert!(stdout(&agent, "date +%s").await.parse::<u64>().unwrap() >= 2_000_000_000);
    agent.set_clock(SystemTime::now()).await.unwrap();
    assert!(stdout(&agent, "date +%s").await.parse::<u64>().unwrap() < 2_000_000_000);
    agent.set_hostname("other").await.unwrap();
    assert_eq!(stdout(&agent, "hostname").await, "other");
    assert_eq!(agent.set_hostname("a b").await.unwrap_err().guest_kind(), Some(GuestErrorKind::Invalid));
    agent.sync().await.unwrap();

    // A guest that resets is at its end.
    let reset = agent.exec(sh("echo b > /proc/sysrq-trigger")).await;
    assert_eq!(tokio::time::timeout(PATIENCE, machine.wait()).await.unwrap(), ExitReason::GuestReset);
    assert_eq!(machine.wait().await, ExitReason::GuestReset, "every waiter hears it");
    assert_eq!(agent.ping().await.unwrap_err().kind, ErrorKind::AgentLost);
    assert_eq!(reset.unwrap().collect(0).await.unwrap_err().kind, ErrorKind::AgentLost);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_host_finds_the_agent_working() {
    let lab = Lab::new("again");
    let machine = lab.boot().await;
    let socket = lab.spec.run_dir.join("agent.sock");
    // The machine's own connection has to go first, for the port has one host at a time. It is broken by a relay that
    // stands in for a daemon killed in the middle of a frame.
    let spoil = machine.agent();
    let before = spoil.exec(sh("exec sleep 515151")).await.unwrap();
    let pid = machine.pid().unwrap();
    let guard = Handover::of(machine, before, spoil).await;
    for round in 0..3 {
        let raw = tokio::net::UnixStream::connect(&socket).await.unwrap();
        let agent = Agent::over(raw, PATIENCE).await.unwrap();
        let find = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 51515[1]' || true";
        while stdout(&agent, find).await != "0" {}
        // Left in the middle of everything: output nobody takes, a file half written, frozen.
        let _flood = agent.exec(sh("exec sleep 515151 | yes")).await.unwrap();
        let mut writer = agent.write_file(format!("/workspace/half{round}"), None).await.unwrap();
        writer.write(&noise(200_000)).await.unwrap();
        agent.freeze(Duration::from_secs(50)).await.unwrap();
        drop((writer, _flood, agent));
        // Half a frame.
        use tokio::io::AsyncWriteExt;
        let mut raw = tokio::net::UnixStream::connect(&socket).await.unwrap();
        let mut bytes = miosa_agent::wire::greeting([round; 16]);
        miosa_agent::wire::Frame::new(1, miosa_agent::wire::Kind::Data, vec![7; 60_000]).encode(&mut bytes);
        raw.write_all(&bytes[..bytes.len() - 30_000]).await.unwrap();
    }
    let agent = Agent::connect(&socket, PATIENCE).await.unwrap();
    assert_eq!(stdout(&agent, "echo fine > /workspace/f; ls -A /workspace").await, "f");
    drop(guard);
    while alive(pid) {
        tokio::task::yield_now().await;
    }
}

/// Keeps a machine alive while its own agent connection is closed.
struct Handover(#[allow(dead_code)] Arc<dyn Machine>);

impl Handover {
    async fn of(machine: Arc<dyn Machine>, stream: vmm::agent::ExecStream, agent: Agent) -> Handover {
        agent.disconnect();
        drop(stream);
        Handover(machine)
    }
}

/// For one that was kept while it ran, and goes on with this hardware address.
fn woken(mac: [u8; 6]) -> Identity {
    let unix_nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let (machine_id, hostname) = ("7".repeat(32), "woken".into());
    Identity { machine_id, hostname, entropy: vec![7; 32], unix_nanos, mac: Some(mac), woken: true }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_woken_guest_has_an_address_of_its_own_and_no_connections_that_hang() {
    let lab = Lab::new("woken");
    let machine = lab.boot().await;
    let agent = machine.agent();
    // It lets all connect and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let script = format!(
        r#"
import errno, socket
host = ("10.0.2.2", {})
half = socket.create_connection(host)
half.shutdown(socket.SHUT_WR)
six = socket.socket(socket.AF_INET6)
six.connect(("::ffff:10.0.2.2", host[1]))
outside = [socket.create_connection(host), half, six]
inside = []
for at, family in [("127.0.0.1", socket.AF_INET), ("10.0.2.15", socket.AF_INET), ("::1", socket.AF_INET6)]:
    listener = socket.create_server((at, 0), family=family)
    a = socket.create_connection(listener.getsockname()[:2])
    inside.append((a, listener.accept()[0], listener))
print("connected", flush=True)
for one in outside:
    try:
        print("read", one.recv(1))
    except OSError as error:
        print(errno.errorcode[error.errno])
for a, b, listener in inside:
    a.sendall(b"still")
    socket.create_connection(listener.getsockname()[:2]).sendall(b"listens")
    print(b.recv(9), listener.accept()[0].recv(9))
"#,
        silent.local_addr().unwrap().port()
    );
    let argv = ["python3", "-c", &script].map(str::to_owned).to_vec();
    let mut program = agent.exec(ExecRequest { argv, ..Default::default() }).await.unwrap();
    assert_eq!(program.next_event().await.unwrap(), Some(ExecEvent::Stdout("connected\n".into())));
    assert_eq!(stdout(&agent, "grep -c diag /proc/modules || true").await, "0", "a boot does not pay for them");

    let mac = [2, 0, 0, 0, 0, 9];
    assert!(agent.identify(woken(mac)).await.unwrap().fresh);
    let output = tokio::time::timeout(PATIENCE, program.collect(1 << 16)).await.unwrap().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).lines().collect::<Vec<_>>(),
        [["ECONNABORTED"; 3], ["b'still' b'listens'"; 3]].concat(),
        "{output:?}"
    );
    assert_eq!(stdout(&agent, "cat /sys/class/net/eth0/address").await, "02:00:00:00:00:09");
    reaches_the_host(&agent).await;
    // The same again finds nothing to do.
    assert!(!agent.identify(woken(mac)).await.unwrap().fresh);
    reaches_the_host(&agent).await;
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_behind() {
    let lab = Lab::new("orphan");
    // A start that is given up.
    let vmm = QemuVmm::new();
    let given_up = tokio::time::timeout(Duration::from_millis(700), vmm.start(lab.spec.clone(), PATIENCE)).await;
    assert!(given_up.is_err());
    let record = lab.spec.run_dir.join(vmm::process::RECORD);
    // The record goes when the process has been reaped.
    while record.exists() {
        tokio::task::yield_now().await;
    }
    assert_eq!(vmm.reap_orphans(&lab.run_root(), &[]).await.unwrap(), []);

    // A guest that never answers: its console is in the error.
    let spec =
        MachineSpec { kernel_args: vec!["miosa.root=/dev/none".into(), "loglevel=7".into()], ..lab.spec.clone() };
    let error = vmm.start(spec, Duration::from_secs(8)).await.err().unwrap();
    assert_eq!(error.kind, ErrorKind::BootTimeout, "{error}");
    // A QEMU that ends at once, and one that is not there.
    let spec = MachineSpec { disk: DiskAttachment::RawFile { path: "/proc/version".into() }, ..lab.spec.clone() };
    let error = vmm.start(spec, PATIENCE).await.err().unwrap();
    assert_eq!(error.kind, ErrorKind::StartFailed, "{error}");
    let error = QemuVmm::new().program("/no/qemu").start(lab.spec.clone(), PATIENCE).await.err().unwrap();
    assert_eq!((error.kind, error.hint.is_some()), (ErrorKind::QemuMissing, true));
    assert!(vmm.version().await.unwrap().contains("QEMU"));

    // The handle goes: so does the process.
    let machine = lab.boot().await;
    let pid = machine.pid().unwrap();
    assert!(alive(pid));
    drop(machine);
    while alive(pid) || record.exists() {
        tokio::task::yield_now().await;
    }

    // Its groups went with it; while it lives it is in them, if there are any.
    let machine = lab.boot().await;
    let groups = std::fs::read_to_string(lab.spec.run_dir.join("cgroups")).unwrap();
    for group in groups.lines().map(Path::new).filter(|group| group.exists()) {
        let procs = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
        assert_eq!(procs.trim(), machine.pid().unwrap().to_string(), "{}", group.display());
    }
    machine.kill().await.unwrap();
    assert!(groups.lines().all(|group| !Path::new(group).exists()), "{groups}");

    // The daemon was killed: the next one finds what it left, and kills it.
    let machine = lab.boot().await;
    let pid = machine.pid().unwrap();
    let waiting = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.wait().await })
    };
    let reaped = vmm.reap_orphans(&lab.run_root(), &[]).await.unwrap();
    assert_eq!(reaped.iter().map(|r| (r.pid, r.killed)).collect::<Vec<_>>(), [(pid, true)]);
    assert!(matches!(waiting.await.unwrap(), ExitReason::Failed { .. }));
    assert!(!alive(pid));
    assert_eq!(vmm.reap_orphans(&lab.run_root(), &[]).await.unwrap(), []);
}

/// A field of `/proc/PID/status` or `/proc/PID/limits`.
fn field(pid: i32, file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line.trim_start_matches(':').split_whitespace().collect::<Vec<_>>().join(" ")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_a_user_of_its_own_without_privileges() {
    let lab = Lab::new("jailed");
    let machine = lab.boot().await;
    let pid = machine.pid().unwrap();
    let (first, last) = vmm::jail::Users::DEFAULT.range();
    let ids: Vec<u32> = field(pid, "status", "Uid").split(' ').map(|id| id.parse().unwrap()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]) && (first..=last).contains(&ids[0]), "{ids:?}");
    assert_eq!(field(pid, "status", "Gid"), field(pid, "status", "Uid"));
    assert_eq!(field(pid, "status", "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(pid, "status", set), "0000000000000000", "{set}");
    }
    assert_eq!(field(pid, "status", "NoNewPrivs"), "1");
    // A filter, and not the strict mode, which would leave nothing.
    assert_eq!(field(pid, "status", "Seccomp"), "2");
    assert_eq!(field(pid, "limits", "Max core file size"), "0 0 bytes");
    let DiskAttachment::RawFile { path: disk } = &lab.spec.disk else { unreachable!() };
    let bytes = std::fs::metadata(disk).unwrap().len();
    assert_eq!(field(pid, "limits", "Max file size"), format!("{bytes} {bytes} bytes"));
    // Nothing of the daemon's environment, where keys may be.
    let environment = std::fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    assert_eq!(environment, format!("MIOSA_RUN_DIR={}\0", lab.spec.run_dir.display()));
    // What it has open is what it was handed and what it made: no file of the host's but its disk, console and complaints.
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let Ok(to) = std::fs::read_link(fd.path()) else { continue };
        let own = [disk.clone(), lab.spec.run_dir.join("console.log"), lab.spec.run_dir.join("qemu.log")];
        let in_memory = ["/memfd:boot", "/memfd:ram"].iter().any(|name| to.to_string_lossy().starts_with(name));
        assert!(!to.starts_with("/") || in_memory || own.contains(&to) || to.starts_with("/dev"), "{}", to.display());
    }
    // The directory is not its own: what the daemon believes of what is in it, the daemon has written.
    let meta = std::fs::metadata(&lab.spec.run_dir).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (0, ids[0], 0o710));
    let other = Lab::new("jailed-too").boot().await;
    assert_ne!(field(other.pid().unwrap(), "status", "Uid"), field(pid, "status", "Uid"));
    other.kill().await.unwrap();
    assert_eq!(machine.shutdown(PATIENCE).await.unwrap(), ExitReason::Shutdown);
}

/// What is tried where QEMU would be, by whoever has taken it over. What is expected comes with each.
const PROBE: &str = r#"#!/usr/bin/python3 -I
import os, signal, socket, sys, ctypes
def tried(name, what):
    try: what(); print(name, "yes")
    except OSError: print(name, "no")
def connect(path):
    s = socket.socket(socket.AF_UNIX); s.connect(path)
def tcp(bind):
    s = socket.socket(socket.AF_INET)
    if bind: s.bind(("127.0.0.1", 0)); s.listen()
    else: s.connect(("127.0.0.1", PORT))
def ptrace():
    if ctypes.CDLL(None).ptrace(16, PARENT, 0, 0) != 0: raise OSError()
tried("own-disk", lambda: connect("disk.sock"))
tried("own-list", lambda: os.listdir("."))
tried("own-write", lambda: open("new", "w"))
tried("own-record", lambda: open("pid", "a"))
tried("own-note", lambda: open("machine.json").read())
tried("own-swap", lambda: os.rename("disk.sock", "pid"))
tried("store", lambda: os.listdir("STORE"))
tried("store-open", lambda: open("STORE/pack").read())
tried("open-list", lambda: os.listdir("OPEN"))
tried("open-read", lambda: open("OPEN/file").read())
tried("open-write", lambda: open("OPEN/new", "w"))
tried("api", lambda: connect("API"))
tried("other-list", lambda: os.listdir("OTHER"))
tried("other-disk", lambda: connect("OTHER/disk.sock"))
tried("other-qmp", lambda: connect("OTHER/qmp.sock"))
tried("passwd", lambda: open("/etc/passwd").read())
tried("kill", lambda: os.kill(PARENT, 0))
tried("ptrace", ptrace)
tried("memory", lambda: open("/proc/PARENT/mem", "rb"))
tried("environ", lambda: open("/proc/PARENT/environ").read())
tried("root", lambda: os.setuid(0))
tried("mount", lambda: ctypes.CDLL(None).mount(b"none", b"/mnt", b"tmpfs", 0, None) == 0 or os.stat("/no"))
tried("chroot", lambda: os.chroot("/usr"))
tried("device", lambda: os.mknod("/dev/shm/x", 0o60666, os.makedev(8, 0)))
tried("tmp", lambda: open("/tmp/probe", "w"))
tried("shm", lambda: open("/dev/shm/probe", "w"))
tried("listen", lambda: tcp(True))
tried("reach", lambda: tcp(False))
tried("abstract", lambda: connect("\0ABSTRACT"))
sys.exit(1)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn whoever_takes_a_machines_process_over_gets_nowhere() {
    let lab = Lab::new("probed");
    let at = |name: &str| lab.dir.path().join(name);
    let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    // A daemon's state: private as it is, and one directory that any user could read and write.
    let open = tempfile::tempdir().unwrap();
    for (dir, file) in
        [(at("store"), "pack"), (lab.run_root().join("other"), "machine.json"), (open.path().into(), "file")]
    {
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(file), "secret").unwrap();
    }
    mode(lab.dir.path(), 0o700);
    mode(open.path(), 0o777);
    mode(&open.path().join("file"), 0o666);
    std::fs::create_dir_all(&lab.spec.run_dir).unwrap();
    let sockets = [
        lab.spec.run_dir.join("disk.sock"),
        lab.run_root().join("other/disk.sock"),
        lab.run_root().join("other/qmp.sock"),
        at("miosa.sock"),
    ];
    let _listening: Vec<_> =
        sockets.iter().map(|socket| std::os::unix::net::UnixListener::bind(socket).unwrap()).collect();
    sockets.iter().for_each(|socket| mode(socket, 0o666));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("miosa-probe-{}", std::process::id());
    let address =
        <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(&name).unwrap();
    let _abstract = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
    let script = PROBE
        .replace("STORE", at("store").to_str().unwrap())
        .replace("OPEN", open.path().to_str().unwrap())
        .replace("API", sockets[3].to_str().unwrap())
        .replace("OTHER", sockets[1].parent().unwrap().to_str().unwrap())
        .replace("PARENT", &std::process::id().to_string())
        .replace("PORT", &port.local_addr().unwrap().port().to_string())
        .replace("ABSTRACT", &name);
    let dir = tempfile::tempdir().unwrap();
    mode(dir.path(), 0o755);
    let program = dir.path().join("probe");
    std::fs::write(&program, script).unwrap();
    mode(&program, 0o755);

    let disk = DiskAttachment::VhostUserBlk { socket: sockets[0].clone() };
    for network in [Network::User, Network::None] {
        let spec = MachineSpec { disk: disk.clone(), network, ..lab.spec.clone() };
        let error = QemuVmm::new().program(&program).start(spec, PATIENCE).await.err().unwrap();
        assert_eq!(error.kind, ErrorKind::StartFailed, "{error}");
        let told = std::fs::read_to_string(lab.spec.run_dir.join("qemu.log")).unwrap();
        let allowed: Vec<&str> = told.lines().filter_map(|line| line.strip_suffix(" yes")).collect();
        // What keeps ports in came with Linux 6.7, what does abstract sockets with 6.12.
        let landlock = vmm::jail::offer(vmm::jail::Users::DEFAULT).landlock;
        let expected = [
            ("own-disk", true),
            ("listen", landlock < 4),
            ("reach", network == Network::User || landlock < 4),
            ("abstract", landlock < 6),
        ];
        let expected: Vec<&str> = expected.iter().filter(|(_, allowed)| *allowed).map(|(name, _)| *name).collect();
        assert_eq!(allowed, expected, "{told}");
        assert_eq!(told.lines().filter(|line| line.ends_with(" no")).count() + allowed.len(), 29, "{told}");
    }
    assert!(!open.path().join("new").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_left_and_taken_over() {
    let lab = Lab::new("adopted");
    let vmm = QemuVmm::new();
    let run_dir = &lab.spec.run_dir;
    assert!(vmm.adopt(run_dir, PATIENCE).await.unwrap().is_none(), "there is none");
    let mut machine = lab.boot().await;
    let pid = machine.pid().unwrap();
    let count = "n=0; while :; do n=$((n+1)); echo $n > /run/count.new; mv /run/count.new /run/count; done";
    stdout(&machine.agent(), &format!("(setsid sh -c '{count}' < /dev/null > /dev/null 2>&1 &)")).await;
    let counted = |agent: Agent| async move {
        stdout(&agent, "until test -e /run/count; do sleep 0.1; done; cat /run/count").await.parse::<u64>().unwrap()
    };
    let mut before = counted(machine.agent()).await;
    for round in 0..3 {
        // What belongs to the connection ends with it.
        let mut tied = machine.agent().exec(sh("echo here; exec sleep 616161")).await.unwrap();
        assert_eq!(tied.next_event().await.unwrap(), Some(ExecEvent::Stdout("here\n".into())));
        machine.agent().freeze(Duration::from_secs(60)).await.unwrap();
        machine.leave().await;
        assert_eq!(tied.next_event().await.unwrap_err().kind, ErrorKind::AgentLost);
        drop(machine);
        machine = vmm.adopt(run_dir, PATIENCE).await.unwrap().unwrap();
        assert_eq!(machine.pid(), Some(pid));
        let agent = machine.agent();
        stdout(&agent, &format!("echo {round} > /workspace/thawed; echo round {round} > /dev/ttyS0")).await;
        while !stdout(&agent, "pgrep -f 'sleep 61616[1]' || true").await.is_empty() {}
        while counted(agent.clone()).await <= before {}
        before = counted(agent).await;
        assert!(machine.console_tail(1000).contains(&format!("round {round}")), "the console goes on");
    }
    // A console that was flooded is started over under the guest's writes. (Its serial port is too slow to wait for.)
    let console = run_dir.join("console.log");
    let mut flood = std::fs::File::options().append(true).open(&console).unwrap();
    std::io::Write::write_all(&mut flood, &vec![b'x'; 2 << 20]).unwrap();
    while std::fs::metadata(&console).unwrap().len() > 1 << 20 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stdout(&machine.agent(), "echo told > /dev/ttyS0").await;
    while !machine.console_tail(1000).contains("told") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // Dead when it is to be taken over: nothing is left of it.
    machine.leave().await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    while alive(pid) {
        tokio::task::yield_now().await;
    }
    assert!(vmm.adopt(run_dir, PATIENCE).await.unwrap().is_none());
    // One that does not answer is killed.
    let machine = lab.boot().await;
    let pid = machine.pid().unwrap();
    machine.leave().await;
    drop(machine);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGSTOP).unwrap();
    assert!(vmm.adopt(run_dir, Duration::from_secs(1)).await.is_err());
    while alive(pid) {
        tokio::task::yield_now().await;
    }
    // One whose record was not written whole.
    let machine = lab.boot().await;
    let pid = machine.pid().unwrap();
    machine.leave().await;
    drop(machine);
    std::fs::write(run_dir.join(vmm::process::RECORD), "12").unwrap();
    assert!(vmm.adopt(run_dir, PATIENCE).await.is_err());
    while alive(pid) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kvm_is_used_only_where_a_guest_boots_with_it() {
    let lab = Lab::new("probe");
    let images = images();
    let (run_root, kept) = (lab.run_root(), lab.dir.path().join("boot"));
    std::fs::create_dir(&kept).unwrap();
    let vmm = QemuVmm::new();
    let probe = async || vmm.probe_kvm(&images.kernel.vmlinuz, &images.initramfs, &run_root, &kept).await;
    let found = probe().await;
    eprintln!("{found:?}");
    assert!(!run_root.join("kvm-probe").exists());
    let answer = kept.join("kvm-probe.json");
    if !answer.exists() {
        // There is nothing to try here, which is the same answer as fast again.
        assert_eq!(found.accel, Accel::Tcg);
        assert_eq!(probe().await, found);
        return;
    }
    // What it says is what happens: a guest boots with it, or does not.
    let spec = MachineSpec { accel: Accel::Kvm, ..lab.spec.clone() };
    let booted = vmm.start(spec, Duration::from_secs(15)).await;
    assert_eq!(booted.is_ok(), found.accel == Accel::Kvm, "{:?}", booted.err());
    drop(booted);
    // Asked again, it is not tried again; for another host it is.
    let text = std::fs::read_to_string(&answer).unwrap();
    std::fs::write(&answer, text.replace("\"found\": \"", "\"found\": \"kept: ")).unwrap();
    assert!(probe().await.reason.starts_with("kept: "));
    std::fs::write(&answer, text.replace("\"host\": \"", "\"host\": \"other ")).unwrap();
    let again = probe().await;
    assert_eq!(again.accel, found.accel);
    assert!(!std::fs::read_to_string(&answer).unwrap().contains("other "));
    std::fs::write(&answer, "{ half").unwrap();
    assert_eq!(probe().await.accel, found.accel);
}

/// Kills a process that a test started when the test ends, however it ends.
struct KillOnDrop(std::process::Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU's own vhost-user-blk back end, once its socket is there.
fn back_end(disk: &Path, socket: &Path) -> KillOnDrop {
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", disk.display()));
    let address = format!("addr.type=unix,addr.path={}", socket.display());
    command.arg("--export").arg(format!("type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues=8,{address}"));
    let mut child = command.spawn().unwrap();
    while !socket.exists() {
        assert_eq!(child.try_wait().unwrap(), None, "the back end ended");
        std::thread::yield_now();
    }
    // The machine is another user, in a directory where nobody else comes.
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    KillOnDrop(child)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vhost_user_disk_may_go_and_come_back() {
    let mut lab = Lab::new("vhost");
    let DiskAttachment::RawFile { path: disk } = lab.spec.disk.clone() else { unreachable!() };
    std::fs::create_dir_all(&lab.spec.run_dir).unwrap();
    let socket = lab.spec.run_dir.join("disk.sock");
    let first = back_end(&disk, &socket);
    lab.spec.disk = DiskAttachment::VhostUserBlk { socket: socket.clone() };
    let machine = lab.boot().await;
    let agent = machine.agent();
    stdout(&agent, "echo before > /workspace/f; sync").await;
    drop(first);
    // The guest waits for its disk, the agent does not.
    let mut waiting = agent.exec(sh("echo after >> /workspace/f; sync; echo synced")).await.unwrap();
    agent.ping().await.unwrap();
    let _second = back_end(&disk, &socket);
    assert_eq!(waiting.next_event().await.unwrap(), Some(ExecEvent::Stdout("synced\n".into())));
    stdout(&agent, "echo 3 > /proc/sys/vm/drop_caches").await;
    assert_eq!(stdout(&agent, "cat /workspace/f").await, "before\nafter");
    assert_eq!(machine.shutdown(PATIENCE).await.unwrap(), ExitReason::Shutdown);
}

/// A kept state for machines as this lab's.
async fn kept(lab: &Lab) -> PathBuf {
    let vmm = QemuVmm::new();
    let key = vmm.warm_key(&lab.spec).await.unwrap();
    let dir = lab.dir.path().join("warm").join(format!("{}-{}", key.base, key.shape));
    let spec = MachineSpec { id: "keeper".into(), run_dir: lab.run_root().join("keeper"), ..lab.spec.clone() };
    vmm.warm(&spec, &dir, PATIENCE).await.unwrap();
    assert_eq!(vmm.survivors(&lab.run_root()).await.unwrap(), Vec::<PathBuf>::new(), "the kept machine is gone");
    dir
}

/// A second disk for a machine as another lab's.
fn another_disk(lab: &Lab, name: &str) -> PathBuf {
    let disk = lab.dir.path().join(name);
    assert!(Command::new("cp").arg("--sparse=always").arg(&images().base).arg(&disk).status().unwrap().success());
    disk
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_go_on_from_a_kept_state_and_are_not_the_same() {
    let lab = Lab::new("warm");
    let dir = kept(&lab).await;
    let vmm = QemuVmm::new();
    let disk = another_disk(&lab, "larger.raw");
    std::fs::File::options().write(true).open(&disk).unwrap().set_len(4 << 30).unwrap();
    let one = MachineSpec { warm: Some(dir.clone()), ..lab.spec.clone() };
    let other = MachineSpec {
        id: "other".into(),
        run_dir: lab.run_root().join("other"),
        disk: DiskAttachment::RawFile { path: disk },
        hostname: "other-box".into(),
        mac: [2, 0, 0, 0, 0, 9],
        ..one.clone()
    };
    // The clock of the kept machine stood still in between.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut told = Vec::new();
    let mut machines = Vec::new();
    for spec in [&one, &other] {
        let machine = vmm.start(spec.clone(), PATIENCE).await.unwrap();
        eprintln!("{}: {:?}", spec.id, machine.boot_timing());
        assert_eq!(machine.boot_timing().path, BootPath::Warm);
        let agent = machine.agent();
        let script = "cat /proc/sys/kernel/random/boot_id; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; \
                      python3 -c 'import os, random; print(os.getrandom(16).hex(), random.random())'; \
                      cat /sys/class/net/eth0/address; hostname; mktemp -u";
        let before = unix_now();
        let clock: u64 = stdout(&agent, "date +%s").await.parse().unwrap();
        assert!((before - 1..=unix_now() + 1).contains(&clock), "its clock is right: {clock}");
        told.push(stdout(&agent, script).await.lines().map(str::to_owned).collect::<Vec<_>>());
        machines.push(machine);
    }
    eprintln!("{told:?}");
    assert_eq!(told[0].len(), 6, "{told:?}");
    for (a, b) in told[0].iter().zip(&told[1]) {
        assert_ne!(a, b, "{told:?}");
    }
    assert_eq!((told[0][3].as_str(), told[1][3].as_str()), ("02:00:00:00:00:01", "02:00:00:00:00:09"));
    assert_eq!((told[0][4].as_str(), told[1][4].as_str()), ("box", "other-box"));

    // The disk was not there when the state was kept, and is as large as it is.
    let agent = machines[1].agent();
    let size: u64 = stdout(&agent, "df -B1 --output=size / | tail -1").await.trim().parse().unwrap();
    assert!(size > 3 << 30, "the file system has grown to {size}");
    stdout(&agent, "echo kept > /workspace/note").await;
    reaches_the_host(&agent).await;
    for machine in machines {
        assert_eq!(machine.shutdown(PATIENCE).await.unwrap(), ExitReason::Shutdown);
    }
    // What was written is there for one that boots.
    let machine = vmm.start(MachineSpec { warm: None, ..other }, PATIENCE).await.unwrap();
    assert_eq!(machine.boot_timing().path, BootPath::Cold);
    assert_eq!(stdout(&machine.agent(), "cat /workspace/note").await, "kept");
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_from_a_kept_state_has_volumes_or_no_network_and_is_taken_over() {
    let mut lab = Lab::new("warm-more");
    let dir = kept(&lab).await;
    let volume = another_disk(&lab, "volume.raw");
    lab.spec.volumes =
        vec![VolumeDevice { serial: "vol-1".into(), disk: DiskAttachment::RawFile { path: volume }, read_only: false }];
    lab.spec.network = Network::None;
    lab.spec.warm = Some(dir);
    let machine = lab.boot().await;
    let agent = machine.agent();
    agent.mount(Mount { serial: "vol-1".into(), path: "/data".into(), read_only: false }).await.unwrap();
    assert_eq!(stdout(&agent, "ls /data/workspace; ls /sys/class/net; ls /workspace").await, "lo");
    assert_eq!(stdout(&agent, "cat /sys/block/vda/serial; echo; cat /sys/block/vdb/serial").await, "disk\nvol-1");
    // There is no device to have the hardware address. What ends connections is loaded when there are any; its modules were in
    // memory all the time. Those within the guest stay.
    let loaded = "grep -c '^tcp_diag ' /proc/modules || true";
    agent.identify(woken([2, 0, 0, 0, 0, 9])).await.unwrap();
    assert_eq!(stdout(&agent, loaded).await, "0");
    let within = "import os, socket, time\n\
                  l = socket.create_server((\"127.0.0.1\", 0))\n\
                  c = socket.create_connection(l.getsockname()); s = l.accept()\n\
                  os.fork() and os._exit(0)\n\
                  os.close(1); time.sleep(100000)";
    stdout(&agent, &format!("python3 -c '{within}'")).await;
    agent.identify(woken([2, 0, 0, 0, 0, 9])).await.unwrap();
    assert_eq!(stdout(&agent, loaded).await, "1");
    assert_eq!(stdout(&agent, "grep -c ' 01 ' /proc/net/tcp").await, "2");
    stdout(&agent, "echo still > /run/here; sleep 100000 >/dev/null 2>&1 &").await;

    machine.leave().await;
    drop((agent, machine));
    let vmm = QemuVmm::new();
    assert_eq!(vmm.survivors(&lab.run_root()).await.unwrap(), [lab.spec.run_dir.clone()]);
    let machine = vmm.adopt(&lab.spec.run_dir, PATIENCE).await.unwrap().unwrap();
    assert_eq!(machine.boot_timing().path, BootPath::Warm);
    assert_eq!(
        stdout(&machine.agent(), "cat /run/here; hostname; cat /proc/[0-9]*/comm | grep -c sleep").await,
        "still\nwoken\n1"
    );
    assert_eq!(machine.shutdown(PATIENCE).await.unwrap(), ExitReason::Shutdown);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_is_damaged_is_an_error_and_leaves_no_process() {
    let lab = Lab::new("warm-bad");
    let dir = kept(&lab).await;
    let vmm = QemuVmm::new();
    let spec = MachineSpec { warm: Some(dir.clone()), ..lab.spec.clone() };
    let gone = || !spec.run_dir.join(vmm::process::RECORD).exists();
    let fails = async |spec: MachineSpec, kinds: &[ErrorKind]| {
        let error = vmm.start(spec, PATIENCE).await.err().unwrap();
        assert!(kinds.contains(&error.kind), "{:?}: {error}", error.kind);
        while !gone() {
            tokio::task::yield_now().await;
        }
        error
    };
    let whole = std::fs::read(dir.join("devices")).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    std::fs::write(dir.join("devices"), &damaged).unwrap();
    fails(spec.clone(), &[ErrorKind::Invalid]).await;
    // Damage that its digest does not tell: QEMU finds it.
    std::fs::write(dir.join("devices"), &whole[..whole.len() / 2]).unwrap();
    let record = std::fs::read_to_string(dir.join("state.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&record).unwrap();
    json["devices_blake3"] = blake3::hash(&whole[..whole.len() / 2]).to_hex().to_string().into();
    std::fs::write(dir.join("state.json"), json.to_string()).unwrap();
    fails(spec.clone(), &[ErrorKind::StartFailed]).await;
    std::fs::write(dir.join("devices"), &whole).unwrap();
    std::fs::write(dir.join("state.json"), record).unwrap();
    // A disk that is none: the guest says so, and is gone.
    let nonsense = lab.dir.path().join("nonsense.raw");
    std::fs::write(&nonsense, noise(1 << 20)).unwrap();
    let bad_disk = MachineSpec { disk: DiskAttachment::RawFile { path: nonsense }, ..spec.clone() };
    let error =
        fails(bad_disk, &[ErrorKind::Guest(GuestErrorKind::Invalid), ErrorKind::Guest(GuestErrorKind::Io)]).await;
    assert!(error.message.contains("mount /dev/vda"), "{error}");
    // Of another shape.
    fails(MachineSpec { cpus: 1, ..spec.clone() }, &[ErrorKind::Invalid]).await;
    // The state is whole all the same.
    let machine = vmm.start(spec.clone(), PATIENCE).await.unwrap();
    machine.kill().await.unwrap();
    assert_eq!(vmm.reap_orphans(&lab.run_root(), &[]).await.unwrap(), []);
}

/// What a test's programs say of a machine.
async fn counted(agent: &Agent) -> u64 {
    stdout(agent, "cat /dev/shm/count").await.parse().unwrap()
}

/// A machine whose programs have been going on for a while: one counts, one has a file open that is gone.
async fn busy(lab: &Lab) -> Arc<dyn Machine> {
    let machine = lab.boot().await;
    let agent = machine.agent();
    let count =
        "n=0; while true; do n=$((n+1)); echo $n > /dev/shm/new; mv /dev/shm/new /dev/shm/count; sleep 0.01; done";
    agent.start("count".into(), None, sh(count)).await.unwrap();
    let open = "echo unseen > /workspace/f; exec 3< /workspace/f; rm /workspace/f; \
                while ! [ -e /workspace/say ]; do sleep 0.1; done; cat <&3 > /workspace/said; sleep 1000";
    agent.start("open".into(), None, sh(open)).await.unwrap();
    while !stdout(&agent, "ls /dev/shm; [ -e /workspace/f ] || echo gone").await.contains("count\ngone") {}
    machine
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_goes_on_from_its_state_and_others_from_the_same() {
    let lab = Lab::new("busy");
    let machine = busy(&lab).await;
    let agent = machine.agent();
    let vmm = QemuVmm::new();
    let key = vmm.state_key(&lab.spec).await.unwrap();
    let Lab { spec, .. } = &lab;
    let DiskAttachment::RawFile { path: disk } = &spec.disk else { panic!("{:?}", spec.disk) };

    let before = counted(&agent).await;
    machine.hold().await.unwrap();
    let live = machine.memory().await.unwrap();
    let memory = vmm::GuestMemory::new(live.bytes()).unwrap();
    live.copy_to(&memory, true).unwrap();
    let devices = machine.devices().await.unwrap();
    let copies: Vec<PathBuf> = (0..3).map(|n| lab.dir.path().join(format!("disk-{n}.raw"))).collect();
    for copy in &copies {
        assert!(Command::new("cp").arg("--sparse=always").arg(disk).arg(copy).status().unwrap().success());
    }
    machine.go_on().await.unwrap();
    // It has not lost anything.
    while counted(&agent).await <= before {}
    stdout(&agent, "echo first > /workspace/who; sync").await;

    // Two at once from the same memory, which neither changes.
    let state = vmm::MachineState { memory: Arc::new(memory), devices };
    let mut others = Vec::new();
    for (n, copy) in copies[..2].iter().enumerate() {
        let id = format!("other-{n}");
        let spec = MachineSpec {
            run_dir: lab.run_root().join(&id),
            id,
            disk: DiskAttachment::RawFile { path: copy.clone() },
            ..spec.clone()
        };
        assert_eq!(vmm.state_key(&spec).await.unwrap(), key);
        let loaded = vmm.load(spec, state.clone(), PATIENCE).await.unwrap();
        let other = loaded.go_on().await.unwrap();
        assert_eq!(other.boot_timing().path, BootPath::Memory);
        let agent = other.agent();
        assert!(counted(&agent).await >= before);
        stdout(&agent, &format!("[ ! -e /workspace/who ] && echo {n} > /workspace/who && sync")).await;
        stdout(&agent, "touch /workspace/say; while ! [ -s /workspace/said ]; do sleep 0.05; done").await;
        assert_eq!(stdout(&agent, "cat /workspace/said").await, "unseen");
        assert_eq!(agent.commands().await.unwrap().len(), 2, "the commands are still known");
        others.push(other);
    }
    for (n, other) in others.iter().enumerate() {
        assert_eq!(stdout(&other.agent(), "cat /workspace/who").await, n.to_string());
    }
    assert_eq!(stdout(&agent, "cat /workspace/who; ls /workspace/said 2>&1 | wc -l").await, "first\n1");
    assert!(others[0].memory().await.is_err(), "it is not its own");
    for other in others {
        other.kill().await.unwrap();
    }
    // The last one's memory is given to it.
    let spec = MachineSpec {
        id: "other-1".into(),
        run_dir: lab.run_root().join("other-1"),
        disk: DiskAttachment::RawFile { path: copies[1].clone() },
        ..spec.clone()
    };
    Command::new("cp").arg("--sparse=always").arg(&copies[2]).arg(&copies[1]).status().unwrap();
    let other = vmm.load(spec.clone(), state, PATIENCE).await.unwrap().go_on().await.unwrap();
    stdout(&other.agent(), "echo mine > /dev/shm/mine").await;
    other.hold().await.unwrap();
    let (devices, memory) = (other.devices().await.unwrap(), other.memory().await.unwrap());
    other.kill().await.unwrap();
    let state = vmm::MachineState { memory: Arc::new(memory), devices };
    let again = vmm.load(spec, state, PATIENCE).await.unwrap().go_on().await.unwrap();
    assert_eq!(stdout(&again.agent(), "cat /dev/shm/mine").await, "mine");
    again.shutdown(PATIENCE).await.unwrap();
    machine.shutdown(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_is_of_no_use_is_refused_and_leaves_nothing() {
    let lab = Lab::new("useless");
    let vmm = QemuVmm::new();
    let state = |devices: &'static [u8], mib: u64| vmm::MachineState {
        memory: Arc::new(vmm::GuestMemory::new(mib << 20).unwrap()),
        devices: devices.into(),
    };
    for (state, kind) in [
        (state(b"", 64), ErrorKind::Invalid),
        (state(b"", 512), ErrorKind::Qmp),
        (state(b"no state", 512), ErrorKind::Qmp),
    ] {
        let error = vmm.load(lab.spec.clone(), state, PATIENCE).await.err().unwrap();
        assert!(error.kind == kind || error.kind == ErrorKind::StartFailed, "{error}");
        assert_eq!(vmm.survivors(&lab.run_root()).await.unwrap(), Vec::<PathBuf>::new());
    }
    // One that is found held goes on.
    let machine = lab.boot().await;
    machine.hold().await.unwrap();
    machine.devices().await.unwrap();
    machine.leave().await;
    let machine = QemuVmm::new().adopt(&lab.spec.run_dir, PATIENCE).await.unwrap().unwrap();
    assert_eq!(stdout(&machine.agent(), "echo here").await, "here");
    machine.shutdown(PATIENCE).await.unwrap();
}
