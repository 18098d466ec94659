//! What the product's page says can be done, line by line.

use std::io::Read;
use std::process::Stdio;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{Daemon, miosa};

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

#[test]
fn the_pages_lines_work_as_printed() {
    let d = Daemon::start();
    let created = d
        .run(&[
            "sandbox",
            "create",
            "--template",
            "base",
            "--name",
            "my-agent-workspace",
            "--timeout",
            "1h",
            "--wait",
            "--json",
        ])
        .json();
    assert_eq!((&created["state"], &created["timeout_sec"]), (&"running".into(), &3_600.into()));
    assert_eq!((&created["persistent"], &created["ready"]), (&true.into(), &true.into()));
    let id = text(&created["id"]);

    let page = d.dir.path().join("page.jsx");
    std::fs::write(&page, "export default 1\n").unwrap();
    let written =
        d.run(&["sandbox", "write-file", &id, "/workspace/app/page.jsx", page.to_str().unwrap(), "--json"]).json();
    assert_eq!(written, serde_json::json!({ "path": "/workspace/app/page.jsx", "size_bytes": 17 }));
    let ran = d.run(&["sandbox", "exec", &id, "--json", "--", "sh", "-lc", "echo out; echo err >&2; exit 7"]);
    assert_eq!(ran.code, 7);
    let ran = ran.document();
    assert_eq!((&ran["stdout"], &ran["stderr"], &ran["exit_code"]), (&"out\n".into(), &"err\n".into(), &7.into()));
    assert!(ran["duration_ms"].is_u64());

    assert_eq!(d.run(&["sandbox", "stop", &id, "--json"]).json()["state"], "paused");
    assert_eq!(d.run(&["sandbox", "resume", &id, "--json"]).json()["state"], "running");

    let snapshot = d.run(&["sandbox", "snapshot", &id, "--name", "after dependencies installed", "--json"]).json();
    assert_eq!((&snapshot["status"], &snapshot["consistency"]), (&"ready".into(), &"filesystem".into()));
    let listed = d.run(&["sandbox", "snapshots", "list", &id, "--json"]).json();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["comment"], "after dependencies installed");
    let restored = d
        .run(&[
            "sandbox",
            "create",
            "--snapshot",
            &text(&snapshot["id"]),
            "--name",
            "my-agent-workspace-restored",
            "--timeout",
            "1h",
            "--wait",
            "--json",
        ])
        .json();
    assert_eq!(restored["state"], "running");

    let fork = d.run(&["sandbox", "fork", &id, "--name", "my-agent-workspace-auth-branch", "--json"]).json();
    assert_eq!((&fork["state"], &fork["forked_from"]), (&"paused".into(), &id.clone().into()));
    let ran = d.run(&["sandbox", "exec", "my-agent-workspace-auth-branch", "--", "echo", "resumed"]);
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (0, "resumed\n", ""));

    let fleeting = d
        .run(&[
            "sandbox",
            "create",
            "--template",
            "base",
            "--name",
            "one-off-test",
            "--timeout",
            "10m",
            "--non-persistent",
            "--json",
        ])
        .json();
    assert_eq!(fleeting["persistent"], false);
    assert_eq!(d.run(&["sandbox", "destroy", &id, "--json"]).json()["state"], "destroyed");
    let left = d.run(&["sandbox", "list", "--json"]).json();
    assert_eq!(left.as_array().unwrap().len(), 3);
}

#[test]
fn files_and_streams_are_passed_on_byte_for_byte() {
    let d = Daemon::start();
    let id = d.run(&["sandbox", "create", "--wait", "--quiet"]).out.trim().to_owned();
    let content: String = (0..200_000).map(|i| format!("{i}\n")).collect();
    assert_eq!(d.run_with(&["sandbox", "write-file", &id, "/big", "-"], content.as_bytes()).code, 0);
    assert!(d.run(&["sandbox", "read-file", &id, "/big"]).out == content);
    let output = d.dir.path().join("out");
    assert_eq!(d.run(&["sandbox", "read-file", &id, "/big", "--output", output.to_str().unwrap()]).code, 0);
    assert!(std::fs::read_to_string(&output).unwrap() == content);
    let small = d.run_with(&["sandbox", "write-file", &id, "/small", "-", "--mode", "755"], b"x").code;
    assert_eq!(small, 0);
    assert_eq!(d.run(&["sandbox", "read-file", &id, "/small", "--json"]).json()["content"], "x");
    // Standard input reaches the command, which may leave the rest of it.
    assert!(d.run_with(&["sandbox", "exec", &id, "--", "cat"], content.as_bytes()).out == content);
    assert_eq!(d.run_with(&["sandbox", "exec", &id, "--", "head", "-n", "1"], content.as_bytes()).out, "0\n");
    // Output comes as it is written.
    let mut command =
        miosa(d.dir.path(), &["sandbox", "exec", &id, "--", "sh", "-c", "echo first; read line; echo $line"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut first = [0; 6];
    out.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"first\n");
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"second\n").unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("second\n", Some(0)));
}

#[test]
fn a_reader_that_goes_away_ends_the_command_in_silence() {
    let d = Daemon::start();
    let id = d.run(&["sandbox", "create", "--wait", "--quiet"]).out.trim().to_owned();
    let mut command = miosa(d.dir.path(), &["sandbox", "exec", &id, "--", "yes"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 100]).unwrap();
    drop(out);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()), (Some(141), ""));
    // And `yes` with it; the sandbox is fine.
    assert_eq!(d.run(&["sandbox", "exec", &id, "--", "true"]).code, 0);
}

#[test]
fn people_get_tables_and_a_next_step() {
    let d = Daemon::start();
    let none = d.run(&["sandbox", "list"]);
    assert!(none.err.contains("next: miosa sandbox create"), "{none:?}");
    let created = d.run(&["sandbox", "create", "--name", "one", "--no-start"]);
    assert!(
        created.out.contains("one is paused") && created.err.contains("next: miosa sandbox exec sb-"),
        "{created:?}"
    );
    let list = d.run(&["sandbox", "ls"]);
    assert!(list.out.starts_with("ID ") && list.out.lines().count() == 2, "{list:?}");
    assert!(d.run(&["sandbox", "show", "one"]).out.contains("persistent"));
    assert!(d.run(&["template", "list"]).out.contains("base"));
    assert!(d.run(&["store", "stats"]).out.contains("dedup"), "{:?}", d.run(&["store", "stats"]));
    assert!(d.run(&["store", "stats", "--json"]).json()["stored_bytes"].is_u64());
    assert!(d.run(&["store", "seal", "--json"]).json().is_object());
}

#[test]
fn many_forks_in_one_command() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "p", "--no-start", "--json"]).json();
    let children = d.run(&["sandbox", "fork", "p", "--name", "c", "--count", "20", "--json"]).json();
    assert_eq!(children.as_array().unwrap().len(), 20);
    assert_eq!(children[19]["name"], "c-20");
    let quiet = d.run(&["sandbox", "fork", "p", "--count", "2", "--quiet"]);
    assert_eq!(quiet.out.lines().count(), 2);
    assert_eq!(d.run(&["sandbox", "fork", "p", "--name", "w", "--wait", "--json"]).json()["state"], "running");
}

#[test]
fn a_daemon_that_is_told_to_end_pauses_what_runs() {
    let mut d = Daemon::start();
    let id = d.run(&["sandbox", "create", "--name", "one", "--wait", "--quiet"]).out.trim().to_owned();
    assert_eq!(d.end(Signal::SIGTERM), Some(0), "{}", d.log());
    assert!(!d.dir.path().join("miosa.sock").exists());
    assert_eq!(d.run(&["sandbox", "list", "--json"]).error(2)["code"], "daemon_unreachable");
    d.start_again();
    let sandbox = d.run(&["sandbox", "show", &id, "--json"]).json();
    assert_eq!((&sandbox["state"], &sandbox["last_error"]), (&"paused".into(), &Value::Null));
}

#[test]
fn a_daemon_that_is_killed_has_everything_when_it_is_back() {
    let mut d = Daemon::start();
    let id = d.run(&["sandbox", "create", "--name", "one", "--wait", "--quiet"]).out.trim().to_owned();
    d.run(&["sandbox", "snapshot", "one", "--name", "s", "--json"]).json();
    assert_eq!(d.end(Signal::SIGKILL), None);
    d.start_again();
    let sandbox = d.run(&["sandbox", "show", "one", "--json"]).json();
    assert_eq!((&sandbox["id"], &sandbox["state"]), (&id.into(), &"paused".into()));
    assert!(sandbox["last_error"].is_string());
    assert_eq!(d.run(&["sandbox", "snapshots", "get", "one", "s", "--json"]).json()["comment"], "s");
    assert_eq!(d.run(&["sandbox", "exec", "one", "--", "echo", "up"]).out, "up\n");
}

#[test]
fn directories_are_copied_both_ways() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "one", "--wait", "--json"]).json();
    let local = d.dir.path().join("app");
    std::fs::create_dir_all(local.join("src")).unwrap();
    std::fs::write(local.join("src/main.py"), "print(1)").unwrap();
    std::fs::write(local.join("README"), "read me").unwrap();
    let at = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let sh = |line: &str| d.run(&["sandbox", "exec", "one", "--", "sh", "-c", line]).out;
    // A directory needs -r; into one that is there it goes by its own name.
    let refused = d.run(&["sandbox", "cp", &at(&local), "one:/workspace", "--json"]).error(1);
    assert!(refused["hint"].as_str().unwrap().contains("-r"), "{refused}");
    let done = d.run(&["sandbox", "cp", "-r", &at(&local), "one:/workspace", "--json"]).json();
    assert_eq!((done["files"].as_u64(), done["path"].as_str()), (Some(2), Some("/workspace/app")));
    let listed = d.run(&["sandbox", "read-file", "one", "/workspace/app/src/main.py"]);
    assert_eq!(listed.out, "print(1)", "{}", sh("ls -R"));
    // Again, without what has gone meanwhile.
    std::fs::remove_file(local.join("README")).unwrap();
    let done = d.run(&["sandbox", "upload-dir", "one", &at(&local), "/workspace/app", "--delete", "--json"]).json();
    assert_eq!((done["files"].as_u64(), done["removed"].as_u64()), (Some(1), Some(1)));
    // Back, and a single file with its mode.
    let back = d.dir.path().join("back");
    assert_eq!(d.run(&["sandbox", "cp", "-r", "one:/workspace/app", &at(&back)]).code, 0);
    assert_eq!(std::fs::read_to_string(back.join("src/main.py")).unwrap(), "print(1)");
    assert!(!back.join("README").exists());
    let script = d.dir.path().join("run.sh");
    std::fs::write(&script, "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    d.run(&["sandbox", "upload", "one", &at(&script), "--json"]).json();
    assert_eq!(d.run(&["sandbox", "cp", "one:/workspace/run.sh", &at(&back)]).code, 0);
    assert_eq!(std::fs::read_to_string(back.join("run.sh")).unwrap(), "#!/bin/sh\n");
    assert_eq!(d.run(&["sandbox", "download", "one", "/workspace/app", "--output", &at(&back.join("x"))]).code, 0);
    assert!(back.join("x/src/main.py").exists());
    // What is wrong is said.
    d.run(&["sandbox", "cp", "one:/none", &at(&back), "--json"]).error(1);
    d.run(&["sandbox", "cp", "one:/a", "two:/b", "--json"]).error(1);
    d.run(&["sandbox", "cp", "nothing", "here", "--json"]).error(1);
    d.run(&["sandbox", "cp", &at(&d.dir.path().join("absent")), "one:/x", "--json"]).error(1);
    let not_local = d.run(&["sandbox", "upload-dir", "one", &at(&script), "--json"]).error(1);
    assert_eq!(not_local["code"], "local_file");
    // To wait for what is there is short, for what is stopped an error.
    assert_eq!(d.run(&["sandbox", "wait", "one", "--json"]).json()["state"], "running");
    d.run(&["sandbox", "stop", "one", "--json"]).json();
    assert_eq!(d.run(&["sandbox", "wait", "one", "--json"]).error(1)["code"], "sandbox_not_running");
    // Snapshots as a tree.
    d.run(&["sandbox", "snapshot", "one", "--name", "kept", "--json"]).json();
    let tree = d.run(&["sandbox", "snapshots", "tree"]).out;
    assert!(tree.starts_with("template base") && tree.contains("└─ ") && tree.contains("“kept”"), "{tree}");
    assert_eq!(d.run(&["sandbox", "snapshots", "tree", "one", "--json"]).json().as_array().unwrap().len(), 3);
    let freed = d.run(&["sandbox", "snapshots", "delete", "one", "kept", "--json"]).json();
    assert!(freed["freed_bytes"].is_u64());
}

#[test]
fn a_detached_command_is_listed_followed_and_killed() {
    let d = Daemon::start();
    d.run(&["sandbox", "create", "--name", "web", "--wait"]);
    let start = |script: &str| {
        d.run(&["sandbox", "exec", "web", "--detached", "--quiet", "--", "sh", "-c", script]).out.trim().to_owned()
    };
    let id = start("echo a; echo b >&2; exit 4");
    let followed = d.run(&["sandbox", "command", "logs", "web", &id, "--follow"]);
    assert_eq!(followed.code, 0);
    assert_eq!(followed.err, "b\n");
    assert_eq!(followed.out, "a\n");
    let logs = d.run(&["sandbox", "command", "logs", "web", &id, "--json"]).json();
    assert_eq!((&logs["exit_code"], &logs["stderr"]), (&4.into(), &"b\n".into()));
    let sleeper = start("sleep 600");
    let listed = d.run(&["sandbox", "command", "list", "web"]).out;
    assert!(listed.contains(&sleeper) && listed.contains("running") && listed.contains("exited 4"), "{listed}");
    assert_eq!(d.run(&["sandbox", "command", "get", "web", &sleeper, "--json"]).json()["status"], "running");
    assert_eq!(d.run(&["sandbox", "command", "kill", "web", &sleeper, "--json"]).json()["signal"], 15);
    assert_eq!(d.run(&["sandbox", "command", "get", "web", "cmd-none", "--json"]).error(1)["code"], "exec_not_found");
}

#[test]
fn the_console_is_shown_plain_raw_and_as_it_comes() {
    let d = Daemon::start();
    let made = d.run(&["sandbox", "create", "--name", "web", "--wait", "--json"]).json();
    assert_eq!(d.run(&["sandbox", "logs", "web"]).out, "fake firmware\nfake guest\n");
    assert!(d.run(&["sandbox", "logs", "web", "--raw"]).out.starts_with("\u{1b}c\u{1b}[?7l"));
    let log = d.dir.path().join("run").join(text(&made["id"])).join("console.log");
    let say = |what: &[u8]| {
        std::io::Write::write_all(&mut std::fs::File::options().append(true).open(&log).unwrap(), what).unwrap();
    };
    let follow = |raw: &[&str]| {
        let args = [&["sandbox", "logs", "web", "--follow"], raw].concat();
        miosa(d.dir.path(), &args).stdout(Stdio::piped()).spawn().unwrap()
    };
    let (mut plain, mut raw) = (follow(&[]), follow(&["--raw"]));
    let mut seen = Vec::new();
    while !seen.ends_with(b"fake guest\r\n") {
        let mut bytes = [0; 1];
        raw.stdout.as_mut().unwrap().read_exact(&mut bytes).unwrap();
        seen.push(bytes[0]);
    }
    say(b"\x1b[1mbold\x1b[");
    say(b"0m one\r\n\xff\x00 last");
    d.run(&["sandbox", "stop", "web"]);
    let rest = |child: &mut std::process::Child| {
        let mut rest = Vec::new();
        child.stdout.as_mut().unwrap().read_to_end(&mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        rest
    };
    assert_eq!(rest(&mut raw), b"\x1b[1mbold\x1b[0m one\r\n\xff\x00 last");
    let plain = String::from_utf8(rest(&mut plain)).unwrap();
    assert!(plain.ends_with("fake guest\nbold one\n last\n"), "{plain:?}");
    // At rest the last session's.
    assert!(d.run(&["sandbox", "logs", "web", "--follow"]).out.starts_with("fake firmware\nfake guest\n"));
    assert_eq!(d.run(&["sandbox", "logs", "none", "--follow", "--json"]).error(1)["code"], "invalid_input");
    assert_eq!(d.run(&["sandbox", "logs", "none", "--json"]).error(1)["code"], "sandbox_not_found");
}

#[test]
fn data_is_kept_apart_on_volumes() {
    let d = Daemon::start();
    let made = d.run(&["volume", "create", "data", "--size", "64mb", "--json"]).json();
    assert_eq!((&made["status"], &made["size_mb"]), (&"available".into(), &64.into()));
    let two = ["sandbox", "create", "--name", "two", "--volume", "data:/srv", "--no-start", "--json"];
    d.run(&["sandbox", "create", "--name", "one", "--no-start", "--json"]).json();
    let attached = d.run(&["volume", "attach", "data", "one", "--mount", "/data", "--json"]).json();
    assert_eq!((&attached["mount_path"], &attached["read_only"]), (&"/data".into(), &false.into()));
    let refused = d.run(&two).error(1);
    assert_eq!(refused["code"], "volume_in_use");
    assert!(text(&refused["message"]).contains("sandbox one"), "{refused}");
    d.run(&["sandbox", "exec", "one", "--", "sh", "-c", "echo kept > ../data/note"]);
    assert_eq!(d.run(&["volume", "detach", "data", "--json"]).error(1)["code"], "sandbox_running");
    assert_eq!(d.run(&["volume", "snapshot", "data", "--name", "s", "--json"]).json()["consistency"], "filesystem");
    d.run(&["sandbox", "destroy", "one", "--json"]).json();
    d.run(&two).json();
    assert_eq!(d.run(&["sandbox", "exec", "two", "--", "cat", "../srv/note"]).out, "kept\n");
    let shown = d.run(&["volume", "show", "data", "--json"]).json();
    assert_eq!((&shown["status"], &shown["attachments"][0]["mount_path"]), (&"in_use".into(), &"/srv".into()));
    assert!(shown["referenced_bytes"].is_u64());
    assert_eq!(d.run(&["volume", "delete", "data", "--json"]).error(1)["code"], "volume_in_use");
    // It is the engine's, and shown as what it is.
    let disks = d.run(&["disk", "list", "--json"]).json();
    let disk = disks.as_array().unwrap().iter().find(|disk| disk["name"] == shown["id"]).unwrap();
    assert_eq!((&disk["owner"]["kind"], &disk["owner"]["name"]), (&"volume".into(), &"data".into()));
    for line in [&["disk", "delete"][..], &["disk", "attach", "--frontend", "fuse"]] {
        let refused = d.run(&[line, &[disk["id"].as_str().unwrap(), "--json"]].concat()).error(1);
        assert_eq!(refused["code"], "disk_in_use");
    }
    let report = d.run(&["store", "report", "--json"]).json();
    let members = report["families"].as_array().unwrap().iter().flat_map(|f| f["members"].as_array().unwrap());
    let mut kinds: Vec<_> = members.map(|m| text(&m["what"])).collect();
    kinds.sort();
    assert_eq!(kinds, ["sandbox", "template", "volume", "volume snapshot"]);

    d.run(&["sandbox", "stop", "two", "--json"]).json();
    assert_eq!(d.run(&["volume", "detach", "data", "two", "--json"]).json()["status"], "available");
    assert_eq!(d.run(&["volume", "restore", "data", "s", "--json"]).json()["name"], "data");
    d.run(&["volume", "delete", "data", "--json"]).json();
    assert_eq!(d.run(&["volume", "create", "again", "--snapshot", "s", "--json"]).json()["size_mb"], 64);
    assert_eq!(d.run(&["volume", "snapshots", "list", "--json"]).json().as_array().unwrap().len(), 1);
    d.run(&["volume", "snapshots", "delete", "s", "--json"]).json();
    assert!(d.run(&["volume", "list"]).out.contains("again"));
    assert_eq!(d.run(&["volume", "show", "data", "--json"]).error(1)["code"], "volume_not_found");
    assert_eq!(d.run(&["volume", "create", "x", "--size", "1mb", "--json"]).error(1)["code"], "invalid_input");
}
