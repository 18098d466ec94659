//! Without a daemon: what a disk can do, and who may have the store.

use std::os::unix::fs::PermissionsExt;

use crate::support::{Daemon, miosa, run};
use crate::words::{Place, noise, text};

#[test]
fn a_disk_has_the_promised_fields() {
    for place in Place::both() {
        let made = place.ok(&["disk", "create", "one", "--size", "1gb"]);
        assert_eq!(
            (&made["name"], &made["size_bytes"], &made["parent"]),
            (&"one".into(), &(1 << 30).into(), &().into())
        );
        let shown = place.ok(&["disk", "show", "one"]);
        for field in ["id", "name", "size_bytes", "logical_bytes", "referenced_bytes", "exclusive_bytes", "parent"] {
            assert!(shown.get(field).is_some(), "{field} is missing: {shown}");
        }
        let stats = place.ok(&["store", "stats"]);
        for field in [
            "disks",
            "snapshots",
            "logical_bytes",
            "unique_bytes",
            "pack_bytes",
            "map_bytes",
            "index_bytes",
            "log_bytes",
            "stored_bytes",
            "dedup_ratio",
            "compression_ratio",
            "checked_unix_seconds",
            "damage",
        ] {
            assert!(stats.get(field).is_some(), "{field} is missing: {stats}");
        }
        let people = place.run(&["disk", "list"]);
        assert!(people.out.contains("one") && people.out.contains("1.0 GiB"), "{people:?}");
        assert_eq!(place.run(&["disk", "list", "--quiet"]).out.trim(), made["id"].as_str().unwrap());
    }
}

#[test]
fn forks_and_snapshots_are_found_by_id_and_name() {
    for place in Place::both() {
        let image = noise(10, 1 << 20);
        let id = place.import("golden", &image)["id"].clone();
        let snapshot = place.ok(&["disk", "snapshot", "golden", "--name", "clean"]);
        assert_eq!((&snapshot["parent"], &snapshot["kind"]), (&id, &"snapshot".into()));
        assert_eq!(place.ok(&["disk", "snapshots", "golden"])[0]["name"], "clean");
        let child = place.ok(&["disk", "fork", "clean", "--name", "child"]);
        assert_eq!(child["parent"], snapshot["id"]);
        assert!(place.export("child") == image && place.export("clean") == image);
        let many = place.ok(&["disk", "fork", "golden", "--name", "w", "--count", "100"]);
        assert_eq!(many.as_array().unwrap().len(), 100);
        assert_eq!((&many[99]["name"], &many[99]["parent"]), (&"w-100".into(), &id));
        assert!(place.export("w-57") == image);
        // All or none.
        place.ok(&["disk", "delete", "w-1"]);
        place.refused(&["disk", "fork", "golden", "--name", "w", "--count", "100"], 1, "name_taken");
        assert_eq!(place.names().len(), 101);
        place.refused(&["disk", "fork", "golden", "--name", "none", "--count", "0"], 1, "invalid_input");
        // One name of two things is nobody's.
        place.ok(&["disk", "snapshot", "child", "--name", "clean"]);
        place.refused(&["disk", "show", "clean"], 1, "disk_ambiguous");
        place.refused(&["disk", "snapshot", "golden", "--name", "clean"], 1, "name_taken");
        place.refused(&["disk", "create", "golden", "--size", "1mb"], 1, "name_taken");
        for (args, code) in [
            (&["disk", "show", "nobody"][..], "disk_not_found"),
            (&["disk", "show", "disk-999999"], "disk_not_found"),
            (&["disk", "delete", "nobody"], "disk_not_found"),
            (&["disk", "diff", "golden", "nobody"], "disk_not_found"),
            (&["disk", "detach", "golden"], "disk_not_attached"),
            (&["disk", "snapshots", snapshot["id"].as_str().unwrap()], "invalid_input"),
            (&["disk", "create", "x", "--size", "0"], "usage"),
            (&["disk", "create", "snap-1", "--size", "1mb"], "invalid_input"),
            (&["disk", "create", "x"], "usage"),
        ] {
            place.refused(args, 1, code);
        }
    }
}

#[test]
fn a_difference_is_exact() {
    for place in Place::both() {
        let mut image = noise(20, 4 << 20);
        place.import("a", &image);
        for offset in [4_096, 8_192, 1 << 20] {
            image[offset + 5] ^= 1;
        }
        image[3 << 20..(3 << 20) + 8_192].fill(0);
        place.import("b", &image);
        let expected = serde_json::json!([
            { "offset": 4_096, "bytes": 8_192 },
            { "offset": 1 << 20, "bytes": 4_096 },
            { "offset": 3 << 20, "bytes": 8_192 },
        ]);
        for _ in 0..2 {
            let difference = place.ok(&["disk", "diff", "a", "b"]);
            assert_eq!((&difference["ranges"], &difference["changed_bytes"]), (&expected, &20_480.into()));
            place.ok(&["store", "seal"]);
        }
        place.ok(&["disk", "fork", "a", "--name", "c"]);
        assert_eq!(place.ok(&["disk", "diff", "a", "c"])["changed_bytes"], 0);
        assert!(place.run(&["disk", "diff", "a", "c"]).out.contains("do not differ"));
    }
}

#[test]
fn deleting_and_collecting_gives_the_bytes_back() {
    for place in Place::both() {
        place.import("kept", &noise(30, 8 << 20));
        place.import("gone", &noise(31, 32 << 20));
        place.ok(&["store", "seal"]);
        let exclusive = place.ok(&["disk", "show", "gone"])["exclusive_bytes"].as_u64().unwrap();
        assert!(exclusive > 32 << 20, "{exclusive}");
        let usage = place.ok(&["store", "usage"]);
        assert!(usage.as_array().unwrap().iter().any(|u| u["name"] == "gone" && u["exclusive_bytes"] == exclusive));
        let before = place.ok(&["store", "stats"]);
        place.ok(&["disk", "delete", "gone"]);
        place.ok(&["store", "seal"]);
        let dry = place.ok(&["store", "gc", "--dry-run"]);
        assert_eq!(dry["dry_run"], true);
        place.ok(&["store", "gc"]);
        let after = place.ok(&["store", "stats"]);
        let packs = |s: &serde_json::Value| s["pack_bytes"].as_u64().unwrap() + s["map_bytes"].as_u64().unwrap();
        let freed = packs(&before) - packs(&after);
        assert!(freed as f64 >= exclusive as f64 * 0.95, "{freed} of {exclusive}");
        assert!(place.export("kept") == noise(30, 8 << 20));
        place.ok(&["store", "check"]);
    }
}

#[test]
fn a_backup_is_a_state_directory_of_its_own() {
    for place in Place::both() {
        place.import("disk", &noise(44, 4 << 20));
        let report = place.ok(&["store", "backup", "monday"]);
        let path = std::path::PathBuf::from(report["path"].as_str().unwrap());
        assert_eq!(path, place.dir().join("backups/monday"));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        place.refused(&["store", "backup", "monday"], 1, "invalid_input");
        for name in ["../up", "/tmp/x", "", ".hidden"] {
            place.refused(&["store", "backup", name], 1, "invalid_input");
        }
        // What happens to the store is nothing to it.
        place.ok(&["disk", "delete", "disk"]);
        place.ok(&["store", "gc"]);
        let copy = Place::Alone(tempfile::tempdir().unwrap());
        std::fs::rename(path.join("store"), copy.dir().join("store")).unwrap();
        copy.ok(&["store", "check"]);
        assert!(copy.export("disk") == noise(44, 4 << 20));
    }
}

#[test]
fn packing_again_saves_space_once_and_changes_nothing() {
    for place in Place::both() {
        let words = ["pack ", "frame ", "block ", "log ", "snapshot ", "fork ", "seal ", "overlay "];
        let mut text: Vec<u8> = noise(43, 2 << 20).iter().flat_map(|b| words[usize::from(b % 8)].bytes()).collect();
        text.truncate(8 << 20);
        place.import("disk", &text);
        place.ok(&["store", "seal"]);
        let report = place.ok(&["store", "repack"]);
        let [before, after] = ["before_bytes", "after_bytes"].map(|field| report[field].as_u64().unwrap());
        assert!(after > 0 && after < before, "{report}");
        assert_eq!(place.ok(&["store", "repack"])["packs_rewritten"], 0);
        assert!(place.export("disk") == text);
        place.ok(&["store", "check"]);
    }
}

#[test]
fn damage_is_found_and_told_with_the_exit_code() {
    let place = Place::Alone(tempfile::tempdir().unwrap());
    place.import("disk", &noise(40, 8 << 20));
    place.ok(&["store", "seal"]);
    assert!(place.ok(&["store", "check"])["damage"].as_array().unwrap().is_empty());
    let packs = std::fs::read_dir(place.dir().join("store/packs")).unwrap().map(|e| e.unwrap().path());
    let largest = packs.max_by_key(|p| std::fs::metadata(p).unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&largest, bytes).unwrap();
    for command in [&["--json", "store", "check"][..], &["--json", "store", "scrub"]] {
        let ran = place.run(command);
        assert_eq!(ran.code, 4, "{ran:?}");
        assert!(!ran.document()["damage"].as_array().unwrap().is_empty());
        assert!(ran.err.contains("storage_damaged"), "{ran:?}");
    }
    // What is damaged is not exported, and says so; the file is not there half.
    let out = place.file("out");
    place.refused(&["disk", "export", "disk", text(&out)], 4, "storage_damaged");
    assert!(!out.exists());
}

#[test]
fn a_catalogue_is_made_again() {
    let place = Place::Alone(tempfile::tempdir().unwrap());
    place.import("disk", &noise(41, 4 << 20));
    place.ok(&["store", "seal"]);
    let catalogue = place.dir().join("store/catalogue");
    for entry in std::fs::read_dir(&catalogue).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let report = place.ok(&["store", "repair"]);
    assert_eq!(report["disks"], 1, "{report}");
    assert!(place.export("disk") == noise(41, 4 << 20));
    let d = Daemon::start();
    assert_eq!(run(miosa(d.dir.path(), &["store", "repair", "--json"]), b"").error(1)["code"], "store_in_use");
}

#[test]
fn a_store_that_is_not_there_is_not_made_by_looking() {
    let place = Place::Alone(tempfile::tempdir().unwrap());
    for args in [
        &["disk", "list"][..],
        &["store", "stats"],
        &["store", "gc"],
        &["store", "repack"],
        &["disk", "show", "x"],
        &["store", "repair"],
    ] {
        place.refused(args, 1, "no_store");
    }
    assert_eq!(std::fs::read_dir(place.dir()).unwrap().count(), 0);
    // And what is wrong with an image is found before one is made.
    place.refused(&["disk", "import", "/no/such", "--name", "x"], 1, "local_file");
    assert_eq!(std::fs::read_dir(place.dir()).unwrap().count(), 0);
    place.ok(&["disk", "create", "x", "--size", "1mb"]);
    let mode = std::fs::metadata(place.dir().join("store")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o700);
}

#[test]
fn two_commands_on_one_directory_take_turns() {
    let place = Place::Alone(tempfile::tempdir().unwrap());
    place.ok(&["disk", "create", "golden", "--size", "1mb"]);
    std::thread::scope(|scope| {
        for i in 0..6 {
            let place = &place;
            scope.spawn(move || place.ok(&["disk", "fork", "golden", "--name", &format!("child-{i}")]));
        }
    });
    assert_eq!(place.names().len(), 7);
}

#[test]
fn a_disk_has_the_domain_that_it_is_given_and_what_is_made_of_it_has_it_too() {
    for place in Place::both() {
        let domain = |disk: &str| place.ok(&["disk", "show", disk])["dedup_domain"].clone();
        place.ok(&["disk", "create", "one", "--size", "16mb", "--dedup-domain", "blue"]);
        place.ok(&["disk", "snapshot", "one", "--name", "first"]);
        place.ok(&["disk", "fork", "first", "--name", "two"]);
        place.ok(&["disk", "create", "none", "--size", "16mb"]);
        assert!(["one", "first", "two"].iter().all(|disk| domain(disk) == "blue"));
        assert_eq!(domain("none"), serde_json::Value::Null);
        let bad = place.run(&["disk", "create", "bad", "--size", "16mb", "--dedup-domain", "a b"]);
        assert!(bad.code != 0 && bad.err.contains("cannot be a domain"), "{bad:?}");
        assert!(place.run(&["disk", "show", "bad"]).code != 0);

        // What is imported, as an image and as an archive, which has no domain of its own.
        let files = tempfile::tempdir().unwrap();
        let [image, archive] = ["image", "archive"].map(|name| files.path().join(name).to_str().unwrap().to_owned());
        let of_random = |seed: u8| blake3::Hasher::new().update(&[seed]).finalize_xof();
        let mut bytes = vec![0; 1 << 20];
        of_random(1).fill(&mut bytes);
        std::fs::write(&image, &bytes).unwrap();
        place.ok(&["disk", "export", "one", &archive, "--format", "archive"]);
        for (file, name, given) in [(&image, "i", Some("red")), (&archive, "a", Some("red")), (&archive, "b", None)] {
            let more = given.map(|domain| vec!["--dedup-domain", domain]).unwrap_or_default();
            place.ok(&[&["disk", "import", file, "--name", name][..], &more].concat());
            assert_eq!(domain(name), serde_json::json!(given), "{name}");
        }
        for file in [&image, &archive] {
            let bad = place.run(&["disk", "import", file, "--name", "bad", "--dedup-domain", "a b"]);
            assert!(bad.code != 0 && bad.err.contains("cannot be a domain"), "{bad:?}");
            assert!(place.run(&["disk", "show", "bad"]).code != 0);
        }
        // Two domains that are given the same have it twice.
        let mut other = vec![0; 1 << 20];
        of_random(2).fill(&mut other);
        std::fs::write(&image, &other).unwrap();
        let exclusive = |disk: &str| {
            place.ok(&["store", "seal"]);
            place.ok(&["disk", "show", disk])["exclusive_bytes"].as_u64().unwrap()
        };
        for (name, domain) in [("x", "green"), ("y", "yellow"), ("z", "yellow")] {
            place.ok(&["disk", "import", &image, "--name", name, "--dedup-domain", domain]);
        }
        assert!(exclusive("x") >= 1 << 20, "nobody else has it");
        assert!(exclusive("y") < 1 << 18 && exclusive("z") < 1 << 18, "they have it together");
    }
}
