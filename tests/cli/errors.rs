//! What can be wrong: each time a code, a message and a hint, and the right exit code.

use crate::support::{Daemon, miosa, run};

#[test]
fn without_a_daemon_every_command_says_so() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["sandbox", "list", "--json"][..],
        &["sandbox", "create", "--json"],
        &["sandbox", "exec", "x", "--json", "--", "true"],
        &["sandbox", "read-file", "x", "/f", "--json"],
        &["template", "build", "base", "--json"],
    ] {
        let error = run(miosa(dir.path(), args), b"").error(2);
        assert_eq!(error["code"], "daemon_unreachable", "{args:?}");
        assert_eq!(error["retryable"], true);
        assert!(error["hint"].as_str().is_some_and(|h| h.contains("miosa daemon")), "{error}");
    }
    let people = run(miosa(dir.path(), &["sandbox", "list"]), b"");
    assert!(
        people.err.starts_with("error: ") && people.err.contains("\nhint: start it with: miosa daemon"),
        "{people:?}"
    );
}

#[test]
fn bad_requests_have_codes_hints_and_exit_codes() {
    let d = Daemon::start();
    let id = d.run(&["sandbox", "create", "--name", "one", "--wait", "--quiet"]).out.trim().to_owned();
    d.run(&["sandbox", "create", "--name", "gone", "--no-start"]);
    let gone = d.run(&["sandbox", "destroy", "gone", "--quiet"]).out.trim().to_owned();
    let long = "x".repeat(65);
    for (args, exit, code) in [
        (&["sandbox", "create", "--template", "nextjs"][..], 1, "template_not_found"),
        (&["sandbox", "create", "--snapshot", "snap-none"], 1, "snapshot_not_found"),
        (&["sandbox", "create", "--name", "one"], 1, "name_taken"),
        (&["sandbox", "create", "--name", &long], 1, "invalid_input"),
        (&["sandbox", "create", "--size", "huge"], 1, "invalid_input"),
        (&["sandbox", "create", "--memory", "1mb"], 1, "invalid_input"),
        (&["sandbox", "create", "--disk", "20000gb"], 1, "invalid_input"),
        (&["sandbox", "list", "--state", "sleeping"], 1, "invalid_input"),
        (&["sandbox", "show", "nobody"], 1, "sandbox_not_found"),
        (&["sandbox", "show", "../../etc"], 1, "sandbox_not_found"),
        (&["sandbox", "exec", &gone, "--", "true"], 1, "sandbox_destroyed"),
        (&["sandbox", "resume", &gone], 1, "sandbox_destroyed"),
        (&["sandbox", "snapshot", &gone], 1, "sandbox_destroyed"),
        (&["sandbox", "fork", &id, "--name", "one"], 1, "name_taken"),
        (&["sandbox", "exec", &id, "--", "no-such-program"], 127, "command_not_found"),
        (&["sandbox", "exec", &id, "--", "/etc/passwd"], 126, "command_failed"),
        (&["sandbox", "read-file", &id, "/absent"], 1, "file_not_found"),
        (&["sandbox", "read-file", &id, "relative"], 1, "invalid_input"),
        (&["sandbox", "write-file", &id, "relative", "/dev/null"], 1, "invalid_input"),
        (&["sandbox", "write-file", &id, "/x", "/no/such/local/file"], 1, "local_file"),
        (&["sandbox", "write-file", &id, "/x", "/tmp"], 1, "local_file"),
        (&["sandbox", "extend", &id], 1, "invalid_input"),
        (&["sandbox", "snapshots", "delete", "snap-none"], 1, "snapshot_not_found"),
        (&["template", "build", "unheard-of"], 1, "invalid_input"),
        (&["template", "build", "x", "--image", "/no/such/image"], 1, "invalid_input"),
        (&["template", "build", "base"], 4, "image_missing"),
        (&["template", "delete", "nextjs"], 1, "template_not_found"),
        (&["sandbox", "create", "--timeout", "1w"], 1, "usage"),
        (&["sandbox", "create", "--memory", "4tb"], 1, "usage"),
        (&["sandbox", "exec", &id], 1, "usage"),
        (&["sandbox", "nonsense"], 1, "usage"),
    ] {
        let mut with_json = vec!["--json"];
        with_json.extend(args);
        let error = d.run(&with_json).error(exit);
        assert_eq!(error["code"], code, "{args:?}: {error}");
        // For people: the same, in words.
        let people = d.run(args);
        assert_eq!((people.code, people.out.as_str()), (exit, ""), "{args:?}: {people:?}");
        assert!(people.err.contains("error: "), "{people:?}");
    }
    // Nothing came of any of it.
    assert_eq!(d.run(&["sandbox", "list", "--json"]).json().as_array().unwrap().len(), 1);
}

#[test]
fn an_execs_end_is_the_commands_end() {
    let d = Daemon::start();
    let id = d.run(&["sandbox", "create", "--wait", "--quiet"]).out.trim().to_owned();
    let code = |line: &str| d.run(&["sandbox", "exec", &id, "--", "sh", "-c", line]).code;
    assert_eq!(
        [code("exit 0"), code("exit 3"), code("exit 255"), code("kill -9 $$"), code("kill -15 $$")],
        [0, 3, 255, 137, 143]
    );
    let timed_out = d.run(&["sandbox", "exec", &id, "--timeout", "200ms", "--json", "--", "sleep", "600"]);
    assert_eq!((timed_out.code, &timed_out.document()["timed_out"]), (124, &true.into()));
}

#[test]
fn a_second_daemon_is_refused() {
    let d = Daemon::start();
    let second = run(miosa(d.dir.path(), &["daemon", "--vmm", "fake", "--json"]), b"");
    let last = second.err.lines().last().unwrap();
    let error: serde_json::Value = serde_json::from_str(last).unwrap();
    assert_eq!((second.code, &error["error"]["code"]), (1, &"daemon_running".into()));
    assert_eq!(d.run(&["sandbox", "list"]).code, 0);
}

#[test]
fn the_environment_can_ask_for_json() {
    let d = Daemon::start();
    let mut command = miosa(d.dir.path(), &["sandbox", "show", "nobody"]);
    command.env("MIOSA_JSON", "1");
    assert_eq!(run(command, b"").error(1)["code"], "sandbox_not_found");
    let mut command = miosa(d.dir.path(), &["sandbox", "create", "--timeout", "soon"]);
    command.env("MIOSA_JSON", "true");
    assert_eq!(run(command, b"").error(1)["code"], "usage");
    let mut command = miosa(d.dir.path(), &["sandbox", "list"]);
    command.env("MIOSA_JSON", "false");
    assert!(run(command, b"").out.contains("no sandboxes"));
}

#[test]
fn the_socket_and_the_state_are_nobody_elses() {
    use std::os::unix::fs::PermissionsExt;
    let d = Daemon::start();
    let mode = |name: &str| std::fs::metadata(d.dir.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("miosa.sock"), 0o600);
    assert_eq!([mode("store"), mode("run")], [0o700; 2]);
}

#[test]
fn the_doctor_installs_what_is_missing_and_looks_again() {
    let dir = tempfile::tempdir().unwrap();
    let script = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    let fix = |args: &[&str]| {
        let mut command = miosa(dir.path(), &[&["doctor", "--json"], args].concat());
        command.env("PATH", dir.path());
        run(command, b"")
    };
    let check = |document: &serde_json::Value| {
        let checks = document["checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == "qemu-img").unwrap().clone()
    };
    // One that fails changes nothing, and says so.
    script("apt-get", "exit 100");
    assert_eq!(check(&fix(&[]).document())["status"], "warn");
    let failed = fix(&["--fix"]);
    assert!(failed.code == 1 && failed.out.is_empty() && failed.err.contains("\"fix_failed\""), "{failed:?}");
    // One that installs.
    let place = dir.path().display();
    let install = format!(
        "for package; do :; done
        echo $package >> {place}/installed
        [ $package != qemu-utils ] || {{ : > {place}/qemu-img; /bin/chmod 755 {place}/qemu-img; }}"
    );
    script("apt-get", &install);
    let fixed = fix(&["--fix"]);
    assert!(fixed.err.contains("+ apt-get install --yes --no-install-recommends qemu-utils"), "{fixed:?}");
    assert_eq!(check(&fixed.document())["status"], "ok");
    let installed = std::fs::read_to_string(dir.path().join("installed")).unwrap();
    let mut packages: Vec<&str> = installed.lines().collect();
    let all = packages.len();
    packages.dedup();
    assert_eq!(packages.len(), all, "each once: {installed}");
    assert!(packages.contains(&"qemu-system-x86"), "{installed}");
}

#[test]
fn the_doctor_looks_without_a_daemon_and_with_one() {
    let d = Daemon::start();
    let named = |document: &serde_json::Value, name: &str| {
        document["checks"]
            .as_array()
            .unwrap()
            .iter()
            .find(|c| c["name"] == name)
            .unwrap_or_else(|| panic!("{name}: {document}"))
            .clone()
    };
    let ran = d.run(&["doctor", "--json"]);
    let document = ran.document();
    let failed = document["checks"].as_array().unwrap().iter().any(|c| c["status"] == "fail");
    assert_eq!((ran.code, &document["ok"]), (i32::from(failed), &(!failed).into()), "{ran:?}");
    assert_eq!(named(&document, "daemon")["status"], "ok");
    assert_eq!(named(&document, "configuration")["status"], "ok");
    for part in ["machine users", "landlock", "seccomp", "cgroups"] {
        assert!(named(&document, part)["message"].is_string());
    }
    for check in document["checks"].as_array().unwrap() {
        assert!(check["status"] == "ok" || check["hint"].as_str().is_some_and(|h| !h.is_empty()), "{check}");
    }
    // Without a daemon, and with a file that is broken.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    std::fs::write(&file, "stop_timeout = 'soon'\n").unwrap();
    let broken = run(miosa(dir.path(), &["doctor", "--json", "--config", file.to_str().unwrap()]), b"");
    let document = broken.document();
    assert_eq!((broken.code, &document["ok"]), (1, &false.into()));
    assert_eq!(named(&document, "configuration")["status"], "fail");
    assert_eq!(named(&document, "daemon")["status"], "warn");
    let people = run(miosa(dir.path(), &["doctor"]), b"");
    assert!(people.out.contains("CHECK") && people.out.contains("disk space"), "{people:?}");
}

#[test]
fn scripts_and_pages_are_printed() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let script = run(miosa(dir.path(), &["completion", shell]), b"");
        assert!(script.code == 0 && script.out.contains("sandbox") && script.err.is_empty(), "{shell}");
    }
    assert_eq!(run(miosa(dir.path(), &["completion", "tcsh"]), b"").code, 1);
    let man = dir.path().join("man1");
    assert_eq!(run(miosa(dir.path(), &["man", man.to_str().unwrap()]), b"").code, 0);
    assert!(std::fs::read_dir(&man).unwrap().count() > 30);
    let help = run(miosa(dir.path(), &["sandbox", "fork", "--help"]), b"");
    assert!(help.out.contains("miosa sandbox fork web"), "{help:?}");
}
