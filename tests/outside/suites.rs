//! Programs that others wrote to find lost and wrong data, on disks of the real daemon as files and under file systems,
//! while the background churns.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::churn::Churn;
use crate::lab::{
    Chance, Daemon, Loop, MIB, Mounted, Start, amount, done, is_long, postgres, run, said, seed, sh, text, tool,
    work_dir,
};

/// A disk of a daemon that has no rest, as a file.
struct Bench {
    churn: Option<Churn>,
    file: PathBuf,
    daemon: Daemon,
    dir: tempfile::TempDir,
    seed: u64,
}

impl Bench {
    fn new(bytes: u64) -> Bench {
        let (dir, seed) = (work_dir(), seed());
        let daemon = Daemon::start(&dir.path().join("s"), Start::busy());
        daemon.create("disk", bytes);
        let file = daemon.attach("disk", "fuse");
        let churn = Some(Churn::start(&daemon, "disk", seed, false));
        Bench { churn, file, daemon, dir, seed }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// ext4 on the disk.
    fn ext4(&self) -> Mounted {
        Mounted::made("ext4", &self.file, &self.at("mnt"), "")
    }

    /// The disk as it is at this moment, as a disk of its own, with its file system mounted.
    fn copy(&self, name: &str) -> Mounted {
        self.daemon.cli(&["disk", "snapshot", "disk", "--name", &format!("{name}-state")]);
        self.daemon.cli(&["disk", "fork", &format!("{name}-state"), "--name", name]);
        Mounted::new(Loop::new(&self.daemon.attach(name, "fuse")), &self.at(name), "")
    }

    fn forget(&self, name: &str) {
        self.daemon.detach(name);
        self.daemon.cli(&["disk", "delete", name]);
        self.daemon.cli(&["disk", "delete", &format!("{name}-state")]);
    }

    /// Everything is in order to the end. How much went on in the background.
    fn end(mut self) -> u64 {
        let background = self.churn.take().unwrap().end();
        self.daemon.detach("disk");
        let report = self.daemon.cli(&["store", "check"]);
        assert_eq!(report["damage"].as_array().unwrap().len(), 0, "{report}");
        assert!(self.daemon.stop(), "the daemon does not end");
        background
    }
}

/// A file system without a fault, its journal replayed.
fn is_clean(device: &Loop) {
    run("e2fsck", &["-fn", &device.0]);
}

#[test]
fn fio_verifies_what_it_wrote_on_a_file_and_on_a_loop_device() {
    let bench = Bench::new(96 * MIB);
    let began = Instant::now();
    let seconds = amount("MIOSA_FIO_SECONDS", 1, 600);
    let size = format!("--size={}m", amount("MIOSA_FIO_MIB", 24, 96));
    let (mut runs, mut round) = (0, 0);
    loop {
        let device = Loop::new(&bench.file);
        for place in [text(&bench.file), &device.0] {
            for (engine, depth) in [("psync", 1), ("libaio", 1), ("libaio", 32), ("io_uring", 1), ("io_uring", 32)] {
                let options = [
                    "--name=verify",
                    "--rw=randwrite",
                    "--bsrange=512-64k",
                    "--blockalign=512",
                    "--direct=1",
                    "--verify=crc32c",
                    "--verify_fatal=1",
                    "--allow_file_create=0",
                    "--verify_state_save=0",
                    &size,
                    &format!("--filename={place}"),
                    &format!("--ioengine={engine}"),
                    &format!("--iodepth={depth}"),
                    &format!("--randseed={}", bench.seed + round),
                ];
                run("fio", &options);
                runs += 1;
            }
        }
        // Discards among the writes; what was discarded is zeroes.
        for options in
            [&["--rw=randtrimwrite"][..], &["--rw=randwrite", "--trim_percentage=50", "--trim_verify_zero=1"]]
        {
            let mut all = vec![
                "--name=trim",
                "--bs=64k",
                "--direct=1",
                "--ioengine=psync",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                &size,
            ];
            let (name, random) = (format!("--filename={}", device.0), format!("--randseed={}", bench.seed + round));
            all.extend(options);
            all.extend([&*name, &*random]);
            run("fio", &all);
            runs += 1;
        }
        drop(device);
        round += 1;
        if began.elapsed() > Duration::from_secs(seconds) {
            break;
        }
    }
    println!("fio: {runs} verified runs, {} things in the background", bench.end());
}

#[test]
fn fsx_finds_no_difference_on_a_disk_and_in_a_file_system() {
    let Some(fsx) = tool("fsx", "0.3.2") else { return };
    let fsx = text(&fsx);
    let bench = Bench::new(128 * MIB);
    let rounds = amount("MIOSA_FSX_ROUNDS", 1, 20);
    let operations = amount("MIOSA_FSX_OPERATIONS", 3_000, 50_000);
    let config = bench.at("fsx.toml");
    std::fs::write(
        &config,
        "flen = 16777216\nblockmode = true\nnosizechecks = true\n[opsize]\nmin = 512\nmax = 65536\nalign = 512\n\
         [weights]\ntruncate = 0\npunch_hole = 5\nfsync = 1\nfdatasync = 1\n",
    )
    .unwrap();
    let artifacts = bench.at("fsx");
    std::fs::create_dir(&artifacts).unwrap();
    for round in 0..rounds {
        let (random, count) = ((bench.seed + round).to_string(), operations.to_string());
        run(fsx, &["-q", "-N", &count, "-S", &random, "-f", text(&config), "-P", text(&artifacts), text(&bench.file)]);
        let mounted = bench.ext4();
        let file = mounted.at.join("file");
        run(fsx, &["-q", "-N", &count, "-S", &random, "-P", text(&artifacts), text(&file)]);
        is_clean(&mounted.unmount());
    }
    println!("fsx: {} operations, {} things in the background", 2 * rounds * operations, bench.end());
}

#[test]
fn a_file_system_is_whole_after_load_and_in_snapshots_taken_under_it() {
    let bench = Bench::new(256 * MIB);
    let seconds = amount("MIOSA_LOAD_SECONDS", 6, 300);
    let mounted = bench.ext4();
    let hdd = mounted.at.join("hdd");
    std::fs::create_dir(&hdd).unwrap();
    let mut stress = Command::new("stress-ng");
    stress.args([
        "--hdd",
        "2",
        "--hdd-bytes",
        "12m",
        "--hdd-write-size",
        "64k",
        "--verify",
        "--dir",
        "1",
        "--rename",
        "1",
    ]);
    stress.args(["--timeout", &format!("{seconds}s"), "--temp-path", text(&hdd)]);
    let mut stress = stress.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("this test needs stress-ng");
    let mut copies = 0;
    while stress.try_wait().unwrap().is_none() {
        let name = format!("copy{copies}");
        // Mounting replays the journal, as a guest would after a power cut.
        is_clean(&bench.copy(&name).unmount());
        bench.forget(&name);
        copies += 1;
        std::thread::sleep(Duration::from_millis(300));
    }
    let output = stress.wait_with_output().unwrap();
    assert!(output.status.success(), "stress-ng: {}", String::from_utf8_lossy(&output.stderr));
    let [time, at] = [seconds.to_string(), text(&mounted.at).to_owned()];
    run("dbench", &["-t", &time, "-D", &at, "4"]);
    if is_long() {
        run(
            "stress-ng",
            &["--iomix", "2", "--iomix-bytes", "24m", "--timeout", &format!("{seconds}s"), "--temp-path", &at],
        );
    }
    is_clean(&mounted.unmount());
    println!("load: {copies} snapshots checked as file systems, {} things in the background", bench.end());
}

#[test]
fn a_file_system_on_a_disk_is_posix() {
    let Some(pjdfstest) = tool("pjdfstest", "0.2.2") else { return };
    let bench = Bench::new(128 * MIB);
    let config = bench.at("pjdfstest.toml");
    // Users that every Debian has, and for how long it sleeps where a time has to be another than the one before.
    let users = r#"[["nobody", "nogroup"], ["daemon", "daemon"], ["bin", "bin"]]"#;
    std::fs::write(&config, format!("[dummy_auth]\nentries = {users}\n[settings]\nnaptime = 0.02\n")).unwrap();
    let mounted = bench.ext4();
    let mut suite = Command::new(&pjdfstest);
    suite.args(["-c", text(&config), "-p", text(&mounted.at)]).current_dir(bench.dir.path());
    let output = suite.output().unwrap();
    let told = said(&output);
    let last = told.lines().last().unwrap_or_default().to_owned();
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    is_clean(&mounted.unmount());
    println!("pjdfstest: {last}; {} things in the background", bench.end());
}

/// Inserts rows in two tables at a time, and says each number after its commit.
const WRITER: &str = "
import sqlite3, sys, os
c = sqlite3.connect(sys.argv[1], isolation_level=None)
c.execute('pragma journal_mode=' + sys.argv[2]); c.execute('pragma synchronous=extra')
c.execute('create table if not exists a (n integer primary key, v blob)')
c.execute('create table if not exists b (n integer primary key, v blob)')
n = (c.execute('select max(n) from a').fetchone()[0] or 0)
while True:
    n += 1
    c.execute('begin'); c.execute('insert into a values (?, ?)', (n, os.urandom(1500)))
    if n > 40: c.execute('delete from a where n = ?', (n - 40,)); c.execute('delete from b where n = ?', (n - 40,))
    c.execute('insert into b values (?, ?)', (n, os.urandom(3000))); c.execute('commit')
    print(n, flush=True)
";

#[test]
fn sqlite_has_every_committed_row_after_kills_and_in_snapshots() {
    let bench = Bench::new(96 * MIB);
    let kills = amount("MIOSA_SQLITE_KILLS", 6, 300);
    let mounted = bench.ext4();
    let mut chance = Chance::new(bench.seed);
    let mut rows = 0;
    for kill in 0..kills {
        let mode = ["delete", "wal"][kill as usize % 2];
        let database = format!("{mode}.db");
        let mut writer = Command::new("python3");
        writer.args(["-c", WRITER, text(&mounted.at.join(&database)), mode]).stdout(Stdio::piped());
        let mut writer = writer.spawn().unwrap();
        let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines().map_while(Result::ok);
        let committed: u64 = lines.by_ref().take(5 + chance.below(40) as usize).last().unwrap().parse().unwrap();
        // A snapshot while it goes on has what was committed before.
        let copy = bench.copy(&format!("copy{kill}"));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let last: u64 = lines.filter_map(|l| l.parse().ok()).last().unwrap_or(committed);
        for (at, least) in [(&copy.at, committed), (&mounted.at, last)] {
            let found = integrity(&at.join(&database));
            assert!(found >= least, "kill {kill}, {}: row {least} was committed, {found} is the last", at.display());
            rows += 1;
        }
        is_clean(&copy.unmount());
        bench.forget(&format!("copy{kill}"));
    }
    is_clean(&mounted.unmount());
    println!("sqlite: {kills} kills, {rows} databases whole, {} things in the background", bench.end());
}

/// The last row of a database that is whole.
fn integrity(database: &Path) -> u64 {
    let sql =
        "pragma integrity_check; select (select count(*) from a) = (select count(*) from b); select max(n) from a;";
    let told = said(&run("sqlite3", &[text(database), sql]));
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines[..2], ["ok", "1"], "{}: {told}", database.display());
    lines[2].parse().unwrap()
}

/// Servers whose data are below a directory. They end when this is dropped, so that their file systems can be unmounted.
struct Servers(PathBuf);

impl Drop for Servers {
    fn drop(&mut self) {
        let _ = Command::new("pkill").args(["-9", "-u", "nobody", "-f", text(&self.0)]).status();
    }
}

#[test]
fn postgres_keeps_its_sums_after_kills_and_in_snapshots() {
    let bench = Bench::new(512 * MIB);
    let kills = amount("MIOSA_POSTGRES_KILLS", 1, 12);
    std::fs::set_permissions(bench.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let Some(bin) = postgres(&bench.at("postgresql")) else { return };
    let bin = text(&bin);
    let mounted = bench.ext4();
    let _servers = Servers(bench.dir.path().to_owned());
    let server = |data: &Path, what: &str| {
        let data = text(data);
        sh(&format!(
            "cd / && runuser -u nobody -- {bin}/pg_ctl -D {data} -w -t 60 -l {data}.log \
             -o '-k {data} -c listen_addresses= -c shared_buffers=32MB -c jit=off -c max_wal_size=64MB -c min_wal_size=32MB' {what} \
             || {{ tail -50 {data}.log >&2; exit 1; }}"
        ))
    };
    let data = mounted.at.join("data");
    let sums = |data: &Path| {
        let sql = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history), \
                   (select sum(bbalance) from pgbench_branches) = (select coalesce(sum(delta), 0) from pgbench_history), \
                   (select count(*) from pgbench_history)";
        sh(&format!("cd / && runuser -u nobody -- {bin}/psql -h {} -Atc '{sql}' bench", text(data)))
    };
    sh(&format!(
        "chown nobody {0} && cd / && runuser -u nobody -- {bin}/initdb -k -A trust -D {1} --wal-segsize=4 && chown -R nobody {0}",
        text(&mounted.at),
        text(&data)
    ));
    server(&data, "start");
    sh(&format!(
        "cd / && runuser -u nobody -- {bin}/createdb -h {0} bench && runuser -u nobody -- {bin}/pgbench -h {0} -i -s 2 -q bench",
        text(&data)
    ));
    let mut transactions = 0;
    for kill in 0..kills {
        // Without -n it would empty the history.
        let mut load = Command::new("runuser");
        load.args([
            "-u",
            "nobody",
            "--",
            &format!("{bin}/pgbench"),
            "-n",
            "-h",
            text(&data),
            "-c",
            "4",
            "-T",
            "60",
            "bench",
        ]);
        let mut load = load.current_dir("/").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(2_500));
        let before = sums(&data);
        let copy = bench.copy(&format!("copy{kill}"));
        let pid = std::fs::read_to_string(data.join("postmaster.pid")).unwrap();
        let pid = pid.lines().next().unwrap();
        // Its processes are those of its session.
        sh(&format!("kill -9 {pid} $(ps -o pid= --ppid {pid})"));
        load.wait().unwrap();
        let copied = copy.at.join("data");
        for data in [&copied, &data] {
            // They name a process that may not have been waited for yet.
            for lock in ["postmaster.pid", ".s.PGSQL.5432.lock"] {
                std::fs::remove_file(data.join(lock)).unwrap();
            }
            server(data, "start");
            let found = sums(data);
            let count = |told: &str| told.rsplit('|').next().unwrap().parse::<u64>().unwrap();
            assert!(found.starts_with("t|t|"), "kill {kill}, {}: {found}", data.display());
            assert!(count(&found) >= count(&before), "kill {kill}, {}: {before}, then {found}", data.display());
            transactions = count(&found);
        }
        server(&copied, "stop");
        sh(&format!("runuser -u nobody -- {bin}/pg_checksums -c -D {}", text(&copied)));
        is_clean(&copy.unmount());
        bench.forget(&format!("copy{kill}"));
    }
    server(&data, "stop");
    sh(&format!("runuser -u nobody -- {bin}/pg_checksums -c -D {}", text(&data)));
    is_clean(&mounted.unmount());
    println!("postgres: {kills} kills, {transactions} transactions, {} things in the background", bench.end());
}

/// One digest of all names and contents below a directory.
fn tree(at: &Path) -> String {
    sh(&format!(
        "cd {} && (find . -type f -print0 | sort -z | xargs -0 sha256sum; find . -type l -printf '%p %l\\n' | sort) | sha256sum",
        text(at)
    ))
}

#[test]
fn a_repository_and_an_installed_package_are_whole_after_snapshot_restore_and_fork() {
    let bench = Bench::new(256 * MIB);
    let rounds = amount("MIOSA_TREE_ROUNDS", 1, 25);
    let mounted = bench.ext4();
    let work = mounted.at.join("work");
    let here = env!("CARGO_MANIFEST_DIR");
    let git = "git -c user.name=t -c user.email=t@localhost -c init.defaultBranch=main -c safe.directory=*";
    for _ in 0..rounds {
        let at = text(&work);
        sh(&format!(
            "rm -rf {at} && mkdir -p {at} && cd {at} && cp -a {here}/src {here}/storage {here}/vmm {here}/docs . && {git} init -q . && \
             {git} add -A && {git} commit -qm one && echo more >> docs/format.md && {git} commit -qam two && {git} gc -q && \
             python3 -m venv venv && sync -f ."
        ));
        let before = tree(&work);
        let copy = bench.copy("kept");
        sh(&format!("cd {at} && rm -rf venv src && {git} commit -qam gone && sync -f ."));
        assert_eq!(tree(&copy.at.join("work")), before, "the copy has changed with its parent");
        sh(&format!(
            "cd {} && {git} fsck --full --strict && test -z \"$({git} status --short -uno)\"",
            text(&copy.at.join("work"))
        ));
        assert!(tree(&work) != before);
        sh(&format!("cd {at} && {git} fsck --full --strict"));
        is_clean(&copy.unmount());
        // And once more from the same state, sealed and read anew.
        bench.daemon.cli(&["store", "seal"]);
        bench.daemon.detach("kept");
        bench.daemon.cli(&["disk", "delete", "kept"]);
        bench.daemon.cli(&["disk", "fork", "kept-state", "--name", "kept"]);
        let again = Mounted::new(Loop::new(&bench.daemon.attach("kept", "fuse")), &bench.at("kept"), "");
        assert_eq!(tree(&again.at.join("work")), before, "a fork of a sealed state differs");
        is_clean(&again.unmount());
        bench.forget("kept");
    }
    is_clean(&mounted.unmount());
    let files = said(&done("find", Command::new("find").args([&format!("{here}/src"), "-type", "f"]))).lines().count();
    println!("trees: {rounds} rounds ({files} files of src among others), {} things in the background", bench.end());
}
