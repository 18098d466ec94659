//! Archives between two stores, and the report of what is kept.

use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::{Daemon, miosa, run};
use crate::words::{Place, noise, text};

#[test]
fn an_archive_takes_a_disk_to_another_store() {
    for place in Place::both() {
        let image = [noise(1, 3 << 20), vec![0; 5 << 20], noise(1, 1 << 20)].concat();
        place.import("one", &image);
        let file = place.file("archive");
        place.ok(&["disk", "export", "one", text(&file), "--format", "archive"]);
        // The last mebibyte is in the first three.
        let size = std::fs::metadata(&file).unwrap().len();
        assert!(size < (3 << 20) + (200 << 10), "{size}");

        let there = Place::Alone(tempfile::tempdir().unwrap());
        let made = there.ok(&["disk", "import", text(&file), "--name", "two"]);
        assert_eq!((&made["name"], &made["size_bytes"]), (&json!("two"), &json!(9 << 20)));
        assert!(there.export("two") == image);
        there.refused(&["disk", "import", text(&file), "--name", "two"], 1, "name_taken");

        // Through a pipe, as over ssh.
        let mut from = miosa(place.dir(), &["disk", "export", "one", "-", "--format", "archive"]);
        let mut from = from.stdout(Stdio::piped()).spawn().unwrap();
        let mut to: Command = miosa(there.dir(), &["disk", "import", "-", "--format", "archive", "--name", "piped"]);
        let done = to.stdin(from.stdout.take().unwrap()).status().unwrap();
        assert!(from.wait().unwrap().success() && done.success());
        assert!(there.export("piped") == image);
    }
}

#[test]
fn a_damaged_archive_is_refused_and_leaves_nothing() {
    for place in Place::both() {
        place.import("one", &noise(4, 2 << 20));
        let before = place.names();
        let file = place.file("archive");
        place.ok(&["disk", "export", "one", text(&file), "--format", "archive"]);
        let whole = std::fs::read(&file).unwrap();
        let mut changed = whole.clone();
        let middle = changed.len() / 2;
        changed[middle] ^= 4;
        for (what, bytes) in [("cut off", &whole[..whole.len() - 10]), ("changed", &changed[..])] {
            std::fs::write(&file, bytes).unwrap();
            let error = place.refused(&["disk", "import", text(&file), "--name", "two"], 1, "invalid_input");
            assert!(error["message"].as_str().unwrap().contains("damaged or was cut off"), "{what}: {error}");
        }
        let not_one =
            run(miosa(place.dir(), &["disk", "import", "-", "--format", "archive", "--name", "x"]), b"nothing");
        assert_eq!(not_one.code, 1, "{not_one:?}");
        assert_eq!(place.names(), before);
    }
}

#[test]
fn a_snapshot_goes_to_another_daemon_with_what_is_known_of_it() {
    let (here, there) = (Daemon::start(), Daemon::start());
    let ok = |d: &Daemon, args: &[&str]| d.run(&[args, &["--json"]].concat()).json();
    ok(&here, &["sandbox", "create", "--name", "web", "--no-start"]);
    let taken = ok(&here, &["sandbox", "snapshot", "web", "--name", "clean"]);
    let file = here.dir.path().join("archive");
    ok(&here, &["sandbox", "snapshots", "export", "clean", text(&file)]);

    let arrived = ok(&there, &["sandbox", "snapshots", "import", text(&file)]);
    for field in ["comment", "consistency", "template_id", "sandbox_id", "created_at", "size_bytes"] {
        assert_eq!(arrived[field], taken[field], "{field}");
    }
    assert_ne!(arrived["id"], taken["id"]);
    let named = ok(&there, &["sandbox", "snapshots", "import", text(&file), "--name", "other"]);
    assert_eq!(named["comment"], "other");
    let id = arrived["id"].as_str().unwrap();
    ok(&there, &["sandbox", "create", "--snapshot", id, "--name", "again", "--no-start"]);
    let disks = ok(&there, &["disk", "list"]);
    assert!(disks.as_array().unwrap().iter().all(|d| d["state"] == "ready" && !d["owner"].is_null()), "{disks}");
}

#[test]
fn the_report_adds_up() {
    for place in Place::both() {
        place.import("one", &noise(1, 2 << 20));
        place.ok(&["disk", "fork", "one", "--name", "child"]);
        place.import("other", &noise(2, 1 << 20));
        place.ok(&["store", "seal"]);
        let picture = place.file("report.svg");
        let report = place.ok(&["store", "report", "--svg", text(&picture)]);
        let bytes = |value: &serde_json::Value| value.as_u64().unwrap();
        assert_eq!(
            bytes(&report["referenced_bytes"]),
            bytes(&report["exclusive_bytes"]) + bytes(&report["shared_bytes"])
        );
        let family = |name: &str| {
            let families = report["families"].as_array().unwrap();
            families.iter().find(|f| f["name"] == name).unwrap_or_else(|| panic!("{name}: {report}"))
        };
        // Parent and child have everything in common: neither alone gives anything back, both together all of it.
        let one = family("one");
        assert_eq!(one["members"].as_array().unwrap().len(), 2);
        assert!(one["members"].as_array().unwrap().iter().all(|m| m["exclusive_bytes"] == 0), "{one}");
        assert!(bytes(&one["exclusive_bytes"]) >= 2 << 20 && bytes(&one["referenced_bytes"]) < 3 << 20, "{one}");
        assert_eq!(bytes(&one["logical_bytes"]), 4 << 20);
        let other = family("other");
        assert_eq!(other["members"][0]["exclusive_bytes"], other["exclusive_bytes"]);
        assert!(std::fs::read_to_string(&picture).unwrap().starts_with("<svg "));
        let people = place.run(&["store", "report"]);
        assert!(people.out.contains("child") && people.out.contains('░'), "{people:?}");
    }
}
