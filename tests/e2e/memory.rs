//! What runs is kept with the disk: programs of a real guest go on after pauses, in forks and from snapshots, and whatever
//! dies meanwhile, disk and memory are never of two moments.
//!
//! `MIOSA_E2E_MEMORY_ROUNDS` says how often each is done.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{Lab, miosa_path, until, way};

/// What runs in a sandbox.
const PROGRAMS: &str = include_str!("programs.py");
/// Apart from the database's journal mode.
const NAMES: [&str; 4] = ["counter", "holder", "server", "writer"];

fn variable(name: &str, or: u64) -> u64 {
    std::env::var(name).map_or(or, |n| n.parse().unwrap())
}

fn rounds() -> u64 {
    variable("MIOSA_E2E_MEMORY_ROUNDS", 5)
}

/// Starts them all, as commands that nobody waits for.
fn start(lab: &Lab, sandbox: &str, journal: &str) {
    let file = lab.dir.path().join("programs.py");
    std::fs::write(&file, PROGRAMS).unwrap();
    lab.json(&["sandbox", "write-file", sandbox, "/opt/programs.py", file.to_str().unwrap()]);
    for name in NAMES {
        lab.json(&["sandbox", "exec", sandbox, "--detached", "--", "python3", "/opt/programs.py", name, journal]);
    }
    let ready = || lab.run(&["sandbox", "exec", sandbox, "--", "python3", "/opt/programs.py", "look"]).0 == 0;
    until("the programs to be up", ready);
}

fn programs(lab: &Lab, sandbox: &str, what: &str) -> Value {
    serde_json::from_str(&lab.sh(sandbox, &format!("python3 /opt/programs.py {what}"))).unwrap()
}

/// How they are at one moment.
#[derive(Debug)]
struct Look {
    told: Value,
    /// Their pids, and what they print, which is of the counter.
    commands: Vec<(i64, String, String)>,
}

impl Look {
    fn number(&self, what: &str) -> u64 {
        self.told[what].as_u64().unwrap()
    }

    /// Machine id, host name, hardware address and random numbers.
    fn own(&self) -> Vec<String> {
        self.told["own"].as_array().unwrap().iter().map(|own| own.as_str().unwrap().to_owned()).collect()
    }

    /// All of them have gone on from `before`, none was started again, and nothing is lost.
    fn follows(&self, before: &Look) {
        assert_eq!(self.commands, before.commands);
        for what in ["count", "reads", "committed", "rows"] {
            assert!(self.number(what) >= before.number(what), "{what}: {self:?} after {before:?}");
        }
        assert!(self.number("asked") > before.number("asked"), "{self:?} after {before:?}");
    }
}

/// Looks at them; they all run and what they have is whole.
fn look(lab: &Lab, sandbox: &str) -> Look {
    let told = programs(lab, sandbox, "look");
    let listed = lab.json(&["sandbox", "command", "list", sandbox]);
    let commands: Vec<(i64, String, String)> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|c| {
            let text = |key: &str| c[key].as_str().unwrap().to_owned();
            (c["pid"].as_i64().unwrap(), text("command"), text("status"))
        })
        .collect();
    let logs = |name: &str| {
        let of = listed.as_array().unwrap().iter().find(|c| c["command"].as_str().unwrap().contains(name)).unwrap();
        lab.run(&["sandbox", "command", "logs", sandbox, of["id"].as_str().unwrap()])
    };
    let said = || NAMES.map(|name| (name, logs(name)));
    assert!(commands.len() == NAMES.len() && commands.iter().all(|c| c.2 == "running"), "{commands:?}: {:?}", said());
    let look = Look { told, commands };
    assert!(look.told["integrity"] == "ok" && look.told["gapless"] == true, "{look:?}");
    assert!(look.number("rows") >= look.number("committed"), "{look:?}");
    let here = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((look.told["clock"].as_f64().unwrap() - here).abs() < 60.0, "the host's clock says {here}: {look:?}");
    let printed: Vec<u64> = logs("counter").1.lines().map(|line| line.parse().unwrap()).collect();
    assert!(printed.windows(2).all(|two| two[0] + 1 == two[1]), "{printed:?}");
    look
}

/// They do not only answer, they go on.
fn goes_on(lab: &Lab, sandbox: &str, seen: &Look) {
    let counts = || {
        let told = lab.sh(sandbox, "for of in count reads committed; do cat /dev/shm/$of; echo; done");
        let now: Vec<u64> = told.split_whitespace().map(|n| n.parse().unwrap()).collect();
        ["count", "reads", "committed"].iter().zip(now).all(|(what, now)| now > seen.number(what))
    };
    until("the programs to go on", counts);
}

fn show(lab: &Lab, sandbox: &str) -> Value {
    lab.json(&["sandbox", "show", sandbox])
}

fn stop_with_memory(lab: &Lab, sandbox: &str) {
    let stopped = lab.json(&["sandbox", "stop", sandbox, "--memory"]);
    assert_eq!((&stopped["state"], &stopped["kept"]), (&"paused".into(), &"memory".into()), "{stopped}");
}

/// The store is undamaged, and has a disk for each sandbox and each memory that is kept, and no other.
fn store_is_in_order(lab: &Lab, snapshots_with_memory: usize) {
    let checked = lab.json(&["store", "check"]);
    assert_eq!(checked["damage"].as_array().unwrap().len(), 0, "{checked}");
    let listed = lab.json(&["sandbox", "list"]);
    let live: Vec<&Value> = listed.as_array().unwrap().iter().filter(|s| s["state"] != "destroyed").collect();
    let kept = live.iter().filter(|s| s["kept"] == "memory").count();
    let disks = lab.json(&["disk", "list"]);
    // A template that has booted has its own.
    let of_others = |disk: &&Value| disk["owner"]["kind"] != "template";
    let expected = live.len() + kept + snapshots_with_memory;
    assert_eq!(disks.as_array().unwrap().iter().filter(of_others).count(), expected, "{disks}\n{listed}");
}

/// No process and no socket of any but those that run.
fn only_these_run(lab: &Lab, running: usize) {
    assert_eq!(lab.machines().len(), running);
    let dirs: Vec<_> = std::fs::read_dir(lab.dir.path().join("run")).unwrap().flatten().map(|e| e.path()).collect();
    assert_eq!(dirs.len(), running, "{dirs:?}");
}

#[test]
fn programs_go_on_after_each_pause_with_memory_whoever_served_them() {
    let mut lab = Lab::new(&[]);
    lab.json(&["sandbox", "create", "--name", "one", "--wait"]);
    start(&lab, "one", "WAL");
    let mut before = look(&lab, "one");
    for round in 0..rounds() {
        stop_with_memory(&lab, "one");
        only_these_run(&lab, 0);
        match round % 4 {
            1 => {
                lab.kill_daemon();
                lab.start_daemon();
            }
            3 => {
                assert_eq!(lab.end_daemon(), Some(0));
                lab.start_daemon();
            }
            _ => {}
        }
        assert_eq!(show(&lab, "one")["kept"], "memory");
        if round % 2 == 0 {
            let resumed = lab.json(&["sandbox", "resume", "one"]);
            assert_eq!((&resumed["state"], &resumed["last_error"]), (&"running".into(), &Value::Null), "{resumed}");
        }
        let after = look(&lab, "one");
        assert_eq!((way(&lab, "one").as_str(), &show(&lab, "one")["kept"]), ("memory", &Value::Null));
        after.follows(&before);
        assert_eq!(after.own()[..3], before.own()[..3]);
        assert!(after.own()[3] != before.own()[3]);
        before = after;
        // The one that it runs under is killed now and then.
        if round % 4 == 2 {
            lab.kill_daemon();
            lab.start_daemon();
            let after = look(&lab, "one");
            after.follows(&before);
            assert_eq!(way(&lab, "one"), "memory");
            before = after;
        }
        goes_on(&lab, "one", &before);
    }
    store_is_in_order(&lab, 0);
    // Without its memory it is a sandbox like any other, and its database is whole.
    stop_with_memory(&lab, "one");
    assert_eq!(lab.json(&["sandbox", "resume", "one", "--without-memory"])["last_error"], Value::Null);
    assert_ne!(way(&lab, "one"), "memory");
    let rows = programs(&lab, "one", "check");
    assert!(rows["integrity"] == "ok" && rows["gapless"] == true, "{rows}");
    assert!(rows["rows"].as_u64().unwrap() >= before.number("committed"), "{rows}");
    lab.json(&["sandbox", "destroy", "one"]);
    only_these_run(&lab, 0);
    store_is_in_order(&lab, 0);
    assert_eq!(lab.end_daemon(), Some(0));
}

/// Each writes what it is to its disk and its memory.
fn mark(lab: &Lab, sandbox: &str) {
    lab.sh(sandbox, &format!("echo {sandbox} >> /dev/shm/mark; echo {sandbox} >> /workspace/mark; sync"));
}

fn marks(lab: &Lab, sandbox: &str) -> String {
    lab.sh(sandbox, "cat /dev/shm/mark; echo and; cat /workspace/mark")
}

/// Forks `one` while it runs; the children go on for themselves and are destroyed.
fn live_forks(lab: &Lab, before: &Look) -> Look {
    let children = ["child-1", "child-2"];
    lab.sh("one", "rm -f /dev/shm/mark /workspace/mark");
    mark(lab, "one");
    lab.json(&["sandbox", "fork", "one", "--memory", "--count", "2", "--name", "child", "--wait"]);
    mark(lab, "one");
    let mut own = std::collections::BTreeSet::new();
    for name in children {
        assert_eq!((way(lab, name).as_str(), lab.state(name).as_str()), ("memory", "running"));
        let seen = look(lab, name);
        seen.follows(before);
        assert_eq!(seen.own()[1], name);
        own.extend(seen.own());
        mark(lab, name);
        goes_on(lab, name, &seen);
    }
    let parent = look(lab, "one");
    parent.follows(before);
    assert_eq!(parent.own()[..3], before.own()[..3]);
    goes_on(lab, "one", &parent);
    own.extend(parent.own());
    assert_eq!(own.len(), 12, "{own:?}");
    assert_eq!(marks(lab, "one"), "one\none\nand\none\none\n");
    for name in children {
        assert_eq!(marks(lab, name), format!("one\n{name}\nand\none\n{name}\n"));
    }
    parent
}

#[test]
fn forks_and_snapshots_with_memory_go_on_for_themselves() {
    let mut lab = Lab::new(&[]);
    lab.json(&["sandbox", "create", "--name", "one", "--wait"]);
    start(&lab, "one", "DELETE");
    let mut before = look(&lab, "one");
    let children = ["child-1", "child-2"];
    for round in 0..rounds().div_ceil(5) {
        before = live_forks(&lab, &before);
        // They are paused and go on like any other; so does a fork of a paused one.
        let seen = look(&lab, children[0]);
        stop_with_memory(&lab, children[0]);
        if round % 2 == 1 {
            lab.kill_daemon();
            lab.start_daemon();
        }
        lab.json(&["sandbox", "fork", children[0], "--memory", "--name", "grandchild", "--wait"]);
        for name in [children[0], "grandchild"] {
            let after = look(&lab, name);
            after.follows(&seen);
            assert_eq!(after.own()[1], name);
            assert_eq!(way(&lab, name), "memory");
        }
        for name in [children[0], children[1], "grandchild"] {
            lab.json(&["sandbox", "destroy", name]);
        }
        only_these_run(&lab, 1);
        store_is_in_order(&lab, 0);
    }

    let snapshot = lab.json(&["sandbox", "snapshot", "one", "--memory", "--name", "up"]);
    assert_eq!(snapshot["kept"], "memory", "{snapshot}");
    mark(&lab, "one");
    let of_then = before;
    let present = look(&lab, "one");
    lab.json(&["store", "seal"]);
    lab.kill_daemon();
    lab.start_daemon();
    for name in ["two", "three"] {
        lab.json(&["sandbox", "create", "--snapshot", "up", "--name", name, "--wait"]);
        assert_eq!(way(&lab, name), "memory");
        let seen = look(&lab, name);
        seen.follows(&of_then);
        assert_eq!(seen.own()[1], name);
        assert!(!marks(&lab, name).ends_with("one\none\none\n"), "as of the snapshot");
        goes_on(&lab, name, &seen);
    }
    until("the parent to be further", || look(&lab, "one").number("asked") > present.number("asked") + 3);
    lab.json(&["sandbox", "restore", "one", "up"]);
    let restored = look(&lab, "one");
    restored.follows(&of_then);
    assert_eq!((way(&lab, "one").as_str(), restored.number("asked")), ("memory", of_then.number("asked") + 1));
    assert_eq!(restored.own()[..3], of_then.own()[..3]);
    for name in ["one", "two", "three"] {
        lab.json(&["sandbox", "destroy", name]);
    }
    only_these_run(&lab, 0);
    store_is_in_order(&lab, 1);
    lab.json(&["sandbox", "snapshots", "delete", "up"]);
    store_is_in_order(&lab, 0);
    assert_eq!(lab.end_daemon(), Some(0));
}

/// A call that nobody waits for: it ends with its daemon.
fn begin(state: &Path, args: &[&str]) -> std::process::Child {
    let mut command = Command::new(miosa_path());
    command.args(args).env("MIOSA_STATE_DIR", state);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// The database of one that may have started from its files is whole, and it has what it had said that it has.
fn database_is_whole(lab: &Lab, sandbox: &str, committed: u64) {
    let found = programs(lab, sandbox, "check");
    assert!(found["integrity"] == "ok" && found["gapless"] == true, "{sandbox}: {found}");
    assert!(found["rows"].as_u64().unwrap() >= committed, "{sandbox}: {found}, and {committed} were committed");
}

#[test]
fn whatever_is_killed_meanwhile_memory_and_disk_are_of_one_moment() {
    let mut lab = Lab::new(&[]);
    lab.json(&["sandbox", "create", "--name", "one", "--wait"]);
    start(&lab, "one", "WAL");
    // QEMU dies: what was committed is in the files.
    let before = look(&lab, "one");
    stop_with_memory(&lab, "one");
    let resumed = look(&lab, "one");
    resumed.follows(&before);
    let pids = lab.machines();
    assert_eq!(pids.len(), 1);
    kill(Pid::from_raw(pids[0]), Signal::SIGKILL).unwrap();
    until("the loss to be seen", || lab.state("one") == "paused");
    let lost = show(&lab, "one");
    assert!(lost["last_error"].is_string() && lost["kept"] == "filesystem", "{lost}");
    database_is_whole(&lab, "one", resumed.number("committed"));
    assert_ne!(way(&lab, "one"), "memory");

    // The daemon dies, at any moment of any call.
    let seed = variable("MIOSA_E2E_SEED", u64::from(std::process::id()));
    eprintln!("MIOSA_E2E_SEED={seed}");
    let mut random = seed;
    let mut until_killed = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Duration::from_millis((random >> 33) % 300)
    };
    let mut ways = std::collections::BTreeMap::new();
    for round in 0..rounds() {
        if lab.sh("one", "cat /dev/shm/count 2>/dev/null || true").is_empty() {
            start(&lab, "one", "WAL");
        }
        let before = look(&lab, "one");
        let call: &[&str] = match round % 3 {
            0 => &["sandbox", "stop", "one", "--memory"],
            1 => {
                stop_with_memory(&lab, "one");
                &["sandbox", "resume", "one"]
            }
            _ => &["sandbox", "fork", "one", "--memory", "--count", "2", "--name", "child", "--wait"],
        };
        let mut calling = begin(lab.dir.path(), call);
        let delay = until_killed();
        std::thread::sleep(delay);
        lab.kill_daemon();
        calling.wait().unwrap();
        lab.start_daemon();
        let what = format!("round {round}: {call:?}, killed after {delay:?}");
        let live = || {
            let listed = lab.json(&["sandbox", "list"]);
            listed.as_array().unwrap().iter().filter(|s| s["state"] != "destroyed").cloned().collect::<Vec<Value>>()
        };
        // Which waits for its turn, and starts nothing.
        for found in live() {
            lab.run(&["sandbox", "extend", found["id"].as_str().unwrap(), "--timeout", "5h"]);
        }
        let all = live();
        let running = all.iter().filter(|s| s["state"] == "running").count();
        only_these_run(&lab, running);
        store_is_in_order(&lab, 0);
        assert!(matches!(all.len(), 1 | 3), "{what}: {all:?}");
        for found in &all {
            let name = found["name"].as_str().unwrap();
            let found = show(&lab, name);
            let (state, kept) = (found["state"].as_str().unwrap(), found["kept"].as_str().unwrap_or_default());
            let who = if name == "one" { "itself" } else { "a child" };
            *ways.entry(format!("{} leaves {who} {state} {kept}", call[1])).or_insert(0) += 1;
            if (state, kept) == ("paused", "filesystem") {
                // Killed between the last word of QEMU and its being noted.
                assert!(found["last_error"].is_string() && who == "itself" && call[1] != "resume", "{what}: {found}");
                database_is_whole(&lab, name, before.number("committed"));
                continue;
            }
            assert!(matches!((state, kept), ("running", "") | ("paused", "memory")), "{what}: {found}");
            let after = look(&lab, name);
            after.follows(&before);
            assert_eq!(after.own()[1], name, "{what}");
            let own = after.own();
            let mac = own[0].as_bytes()[..10].chunks(2).map(|two| format!(":{}", std::str::from_utf8(two).unwrap()));
            assert_eq!(own[2], format!("02{}", mac.collect::<String>()), "{what}: its hardware address is its own");
            assert!(way(&lab, name) == "memory" || state == "running", "{what}");
            goes_on(&lab, name, &after);
        }
        for child in all.iter().filter(|s| s["name"] != "one") {
            lab.json(&["sandbox", "destroy", child["id"].as_str().unwrap()]);
        }
        only_these_run(&lab, 1);
        store_is_in_order(&lab, 0);
    }
    eprintln!("{ways:?}");
    assert_eq!(lab.end_daemon(), Some(0));
    only_these_run(&lab, 0);
}

#[test]
fn on_fuse_programs_go_on_and_children_that_share_their_memory_keep_files_only() {
    let mut lab = Lab::new(&["--disk-frontend", "fuse"]);
    lab.json(&["sandbox", "create", "--name", "one", "--wait"]);
    start(&lab, "one", "WAL");
    for round in 0..rounds().div_ceil(5) {
        let before = look(&lab, "one");
        stop_with_memory(&lab, "one");
        only_these_run(&lab, 0);
        if round % 2 == 0 {
            lab.kill_daemon();
            lab.start_daemon();
        }
        let after = look(&lab, "one");
        after.follows(&before);
        assert_eq!(way(&lab, "one"), "memory");
        live_forks(&lab, &after);
        for name in ["child-1", "child-2"] {
            let seen = look(&lab, name);
            for call in ["stop", "snapshot", "fork"] {
                let (code, _, err) = lab.run(&["--json", "sandbox", call, name, "--memory"]);
                let error: Value = serde_json::from_str(&err).unwrap();
                assert!(code == 1 && error["error"]["code"] == "memory_unavailable", "{call}: {err}");
            }
            assert_eq!(lab.state(name), "running");
            let after = look(&lab, name);
            after.follows(&seen);
            goes_on(&lab, name, &after);
            assert_eq!(lab.json(&["sandbox", "stop", name])["kept"], "filesystem");
            database_is_whole(&lab, name, after.number("committed"));
            lab.json(&["sandbox", "destroy", name]);
        }
        store_is_in_order(&lab, 0);
    }
    let before = look(&lab, "one");
    // The machine dies with its daemon, and with it what ran; its files are whole.
    lab.kill_daemon();
    lab.start_daemon();
    assert!(lab.machines().is_empty());
    database_is_whole(&lab, "one", before.number("committed"));
    assert_eq!(lab.end_daemon(), Some(0));
}
