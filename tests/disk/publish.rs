//! Files as container images: what skopeo, umoci and our own import make of them.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::contents::{make_image, make_tree, tool};
use crate::support::{Daemon, miosa, run};
use crate::words::{Place, noise, text};

/// A container's tool, which wants a home and a temporary directory.
fn container_tool(program: &str, dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(args).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let ran = command.env("HOME", dir).env("TMPDIR", dir).output().unwrap();
    let told = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success(), "{program} {args:?}: {told}");
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// A daemon with a template `full` of all kinds of files below `/srv/app`, and a sandbox `web` of it that runs.
fn prepared() -> (Place, tempfile::TempDir) {
    let place = Place::Daemon(Box::new(Daemon::start()));
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    let app = tree.join("srv/app");
    std::fs::create_dir_all(&app).unwrap();
    make_tree(&app);
    std::fs::set_permissions(tree.join("srv"), std::fs::Permissions::from_mode(0o750)).unwrap();
    for (file, owner) in [("dir/big", 1000), ("a.txt", 70_000), ("link", 1000)] {
        std::os::unix::fs::lchown(app.join(file), Some(owner), Some(owner + 1)).unwrap();
    }
    let holes = std::fs::File::create(app.join("holes")).unwrap();
    holes.set_len(300 << 20).unwrap();
    for (at, bytes) in [(100_u64 << 20, &b"in the middle"[..]), ((250 << 20) + 17, &noise(4, 3_000_000))] {
        std::os::unix::fs::FileExt::write_all_at(&holes, bytes, at).unwrap();
    }
    xattr::set(app.join("a.txt"), "user.note", b"a note").unwrap();
    xattr::set(app.join("a.txt"), "system.posix_acl_access", &ACCESS_LIST).unwrap();
    std::fs::create_dir_all(tree.join("etc")).unwrap();
    std::fs::write(tree.join("etc/hostname"), "full\n").unwrap();
    make_image(&tree, &image, &[]);
    place.ok(&["template", "import", text(&image), "--name", "full"]);
    place.ok(&["sandbox", "create", "--template", "full", "--name", "web", "--env", "SECRET=x", "--wait"]);
    (place, dir)
}

/// `u::rw-,u:1234:r--,g::r--,m::r--,o::r--`, as the kernel takes it.
const ACCESS_LIST: [u8; 44] = {
    let entries: [(u8, u8, u32); 5] =
        [(1, 6, u32::MAX), (2, 4, 1234), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 4, u32::MAX)];
    let mut bytes = [0; 44];
    bytes[0] = 2;
    let mut i = 0;
    while i < entries.len() {
        let (tag, permissions, id) = entries[i];
        let id = id.to_le_bytes();
        (bytes[4 + 8 * i], bytes[6 + 8 * i]) = (tag, permissions);
        let mut j = 0;
        while j < 4 {
            bytes[8 + 8 * i + j] = id[j];
            j += 1;
        }
        i += 1;
    }
    bytes
};

/// What skopeo says of an archive; it makes a layout of it, whose layers umoci then unpacks. Checks every digest.
fn unpacked(archive: &Path, tag: &str, dir: &Path) -> (Value, Value, PathBuf) {
    let from = format!("oci-archive:{}", text(archive));
    let seen: Value = serde_json::from_str(&container_tool("skopeo", dir, &["inspect", &from])).unwrap();
    let config: Value = serde_json::from_str(&container_tool("skopeo", dir, &["inspect", "--config", &from])).unwrap();
    let (layout, bundle) = (dir.join("layout"), dir.join("bundle"));
    let to = format!("oci:{}:{tag}", text(&layout));
    container_tool("skopeo", dir, &["--insecure-policy", "copy", &from, &to]);
    container_tool("umoci", dir, &["unpack", "--image", &format!("{}:{tag}", text(&layout)), text(&bundle)]);
    (seen, config, bundle.join("rootfs"))
}

fn same_trees(one: &Path, other: &Path) {
    // Pipes have nothing to compare.
    tool("diff", &["-r", "--no-dereference", "--exclude=pipe", text(one), text(other)]);
    let facts = |top: &Path| {
        let list = tool("find", &[text(top), "-printf", "%P %M %n %U %G %s %l\n"]);
        let facts: BTreeMap<_, _> =
            list.lines().map(|l| l.split_once(' ').unwrap()).map(|(a, b)| (a.to_owned(), b.to_owned())).collect();
        facts
    };
    let (mut one, mut other) = (facts(one), facts(other));
    // Directories differ in how many bytes their names take.
    for facts in [&mut one, &mut other] {
        facts.values_mut().filter(|f| f.starts_with('d')).for_each(|f| *f = f.split(' ').next().unwrap().to_owned());
    }
    assert_eq!(one, other);
}

#[test]
fn a_directory_becomes_an_image_that_others_read() {
    let (place, dir) = prepared();
    let original = dir.path().join("tree/srv/app");
    let archive = place.file("web.tar");
    let options = ["--cmd", "exec ./serve", "--env", "MODE=production", "--port", "3000", "--port", "53/udp"];
    let publish = |compression: &str| {
        let what = ["sandbox", "publish", "web", "--path", "/srv/app/", "--output", text(&archive), "--user", "1000"];
        let how = ["--tag", "team/web:1.0", "--compression", compression];
        let made = place.ok(&[&what[..], &options, &how].concat());
        assert_eq!(made["image"], "team/web:1.0");
        assert_eq!(made["archive_bytes"].as_u64().unwrap(), archive.metadata().unwrap().len());
        assert!(compression == "none" || archive.metadata().unwrap().len() < 20 << 20, "holes take room");
        made
    };
    let made = publish("gzip");
    let work = tempfile::tempdir().unwrap();
    let (seen, config, root) = unpacked(&archive, "1.0", work.path());
    assert_eq!(seen["Digest"], made["digest"]);
    assert_eq!((&seen["Architecture"], &seen["Os"]), (&json!("amd64"), &json!("linux")));
    assert_eq!(
        config["config"],
        json!({
            "User": "1000",
            "ExposedPorts": { "3000/tcp": {}, "53/udp": {} },
            "Env": ["MODE=production"],
            "Cmd": ["/bin/sh", "-c", "exec ./serve"],
            "WorkingDir": "/srv/app",
        })
    );
    same_trees(&original, &root.join("srv/app"));
    let of = |path: &str| std::fs::symlink_metadata(root.join(path)).unwrap();
    assert_eq!(of("srv").mode() & 0o7777, 0o750);
    assert_eq!((of("srv/app/a.txt").uid(), of("srv/app/a.txt").gid()), (70_000, 70_001));
    assert_eq!(of("srv/app/a.txt").ino(), of("srv/app/hard").ino());
    assert_eq!(of("srv/app/holes").size(), 300 << 20);
    let attribute = |name: &str| xattr::get(root.join("srv/app/a.txt"), name).unwrap().unwrap();
    assert_eq!(attribute("user.note"), b"a note");
    assert_eq!(attribute("system.posix_acl_access"), ACCESS_LIST);
    // Nothing else of the file system, and nothing of the sandbox's own.
    let names: Vec<_> = std::fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["srv"]);
    assert!(!config.to_string().contains("SECRET"), "{config}");

    // umoci knows no zstd.
    for compression in ["zstd", "none"] {
        let made = publish(compression);
        let from = format!("oci-archive:{}", text(&archive));
        let seen: Value = serde_json::from_str(&container_tool("skopeo", work.path(), &["inspect", &from])).unwrap();
        assert_eq!(seen["Digest"], made["digest"]);
        import(&place, &archive, compression);
        assert_eq!(facts(&place, "full", "/srv/app"), facts(&place, compression, "/srv/app"));
    }
    assert_eq!(place.ok(&["sandbox", "show", "web"])["state"], "running");
}

fn import(place: &Place, archive: &Path, name: &str) {
    let file = ["template", "import", text(archive), "--name", name];
    place.ok(&[&file[..], &["--format", "container", "--disk", "1gb"]].concat());
}

/// What there is below a path.
fn facts(place: &Place, key: &str, path: &str) -> Vec<Value> {
    let list = place.ok(&["sandbox", "snapshots", "ls", key, path, "-R"]);
    let files = list.as_array().unwrap().iter().filter(|f| f["path"] != "/lost+found");
    let facts = files.map(|f| {
        let of_files = match f["type"] == "directory" {
            true => Value::Null,
            false => json!([f["size_bytes"], f["links"], f["target"]]),
        };
        json!([f["path"], f["type"], f["mode"], f["uid"], f["gid"], of_files])
    });
    facts.collect()
}

#[test]
fn a_whole_file_system_goes_out_and_comes_back() {
    let (place, dir) = prepared();
    place.ok(&["sandbox", "snapshot", "web", "--name", "release"]);
    let (one, two) = (place.file("one.tar"), place.file("two.tar"));
    let made = place.ok(&["sandbox", "publish", "release", "--path", "/", "-o", text(&one)]);
    assert_eq!(made["image"], "release:latest");
    place.ok(&["sandbox", "publish", "release", "--path", "/", "-o", text(&two)]);
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&two).unwrap(), "equal states give equal images");
    let work = tempfile::tempdir().unwrap();
    let (_, _, root) = unpacked(&one, "latest", work.path());
    same_trees(&dir.path().join("tree"), &root);
    // The older form beside it holds the same.
    let saved = format!("docker-archive:{}:release:latest", text(&one));
    container_tool(
        "skopeo",
        work.path(),
        &["--insecure-policy", "copy", &saved, &format!("oci:{}:a", text(&work.path().join("old")))],
    );

    import(&place, &one, "back");
    assert_eq!(facts(&place, "full", "/"), facts(&place, "back", "/"));
    let diff = place.ok(&["sandbox", "snapshots", "diff", "full", "back"]);
    let changed =
        diff["changes"].as_array().unwrap().iter().filter(|c| c["path"].as_str().unwrap().starts_with("/srv/app/"));
    let changed: Vec<_> = changed.filter(|c| c["parts"] != json!(["modified"])).collect();
    assert_eq!(changed, Vec::<&Value>::new());
}

/// What the base has at the path is hidden, the rest of it is there.
#[test]
fn a_path_lies_upon_a_base() {
    let (place, dir) = prepared();
    let tree = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(tree.path().join("srv/app/dir")).unwrap();
    std::fs::create_dir_all(tree.path().join("bin")).unwrap();
    for (path, content) in
        [("srv/app/old", "old"), ("srv/app/dir/old", "old"), ("bin/sh", "a shell"), ("srv/kept", "kept")]
    {
        std::fs::write(tree.path().join(path), content).unwrap();
    }
    let image = dir.path().join("base");
    make_image(tree.path(), &image, &[]);
    place.ok(&["template", "import", text(&image), "--name", "under"]);
    let archive = place.file("web.tar");
    place.ok(&["sandbox", "publish", "web", "--path", "/srv/app", "--base", "under", "-o", text(&archive)]);
    let work = tempfile::tempdir().unwrap();
    let (seen, _, root) = unpacked(&archive, "latest", work.path());
    assert_eq!(seen["Layers"].as_array().unwrap().len(), 2);
    same_trees(&dir.path().join("tree/srv/app"), &root.join("srv/app"));
    assert_eq!(std::fs::read(root.join("bin/sh")).unwrap(), b"a shell");
    assert_eq!(std::fs::read(root.join("srv/kept")).unwrap(), b"kept");
    import(&place, &archive, "both");
    assert_eq!(place.run(&["sandbox", "snapshots", "cat", "both", "/srv/app/old"]).code, 1);
    assert_eq!(place.run(&["sandbox", "snapshots", "cat", "both", "/srv/kept"]).out, "kept");
}

#[test]
fn an_image_is_piped_to_docker() {
    let (place, _dir) = prepared();
    let bin = tempfile::tempdir().unwrap();
    let stand_in = |script: &str| {
        let file = bin.path().join("docker");
        std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    let publish = |path: &Path| {
        let args = ["--json", "sandbox", "publish", "web", "--path", "/srv/app/dir", "--docker", "--tag", "web:2"];
        let mut command = miosa(place.dir(), &args);
        command.env("PATH", path);
        run(command, b"")
    };
    let error = publish(bin.path()).error(1);
    assert_eq!(error["code"], "docker_missing", "{error}");

    let got = bin.path().join("got");
    stand_in(&format!("[ \"$*\" = load ] && exec /bin/cat > {}", text(&got)));
    let made = publish(bin.path()).json();
    assert_eq!((&made["docker"], &made["file"]), (&json!(true), &Value::Null));
    assert_eq!(made["archive_bytes"].as_u64().unwrap(), got.metadata().unwrap().len());
    let work = tempfile::tempdir().unwrap();
    let saved = format!("docker-archive:{}:web:2", text(&got));
    container_tool("skopeo", work.path(), &["inspect", &saved]);

    // One that fails early says why, and one that says nothing is not believed.
    for script in ["echo cannot connect >&2; exit 1", "/bin/cat > /dev/null; echo no room >&2; exit 1", "exit 1"] {
        stand_in(script);
        let error = publish(bin.path()).error(1);
        assert_eq!(error["code"], "docker_failed", "{error}");
        let why = script.split_whitespace().nth(2).unwrap_or("");
        assert!(!script.starts_with("echo") || error["message"].as_str().unwrap().contains(why), "{error}");
    }
}

#[test]
fn what_cannot_be_published_is_said() {
    let (place, _dir) = prepared();
    let file = place.file("web.tar");
    let publish = |more: &[&str]| {
        let mut args = vec!["--json", "sandbox", "publish", "web", "-o", text(&file)];
        args.extend(more);
        place.run(&args).error(1)["code"].as_str().unwrap().to_owned()
    };
    for (more, code) in [
        (&["--path", "/none"][..], "file_not_found"),
        (&["--path", "srv"], "invalid_input"),
        (&["--path", "/srv/../etc"], "invalid_input"),
        (&["--path", "/srv/app/loop/x"], "file_error"),
        (&["--path", "/srv", "--tag", "Not A Name"], "invalid_input"),
        (&["--path", "/srv", "--port", "0"], "invalid_input"),
        (&["--path", "/srv", "--workdir", "here"], "invalid_input"),
        (&["--path", "/", "--base", "full"], "invalid_input"),
        (&["--path", "/srv", "--base", "none"], "disk_not_found"),
        // The template of these tests has no file system.
        (&["--path", "/srv", "--base", "base"], "file_error"),
        (&["--path", "/srv", "--cmd", "[1]"], "usage"),
    ] {
        assert_eq!(publish(more), code, "{more:?}");
    }
    assert!(!file.exists());
    assert_eq!(place.run(&["--json", "sandbox", "publish", "none", "-o", "x"]).error(1)["code"], "sandbox_not_found");
    assert_eq!(place.run(&["--json", "sandbox", "publish", "web"]).error(1)["code"], "usage");
    assert_eq!(place.run(&["--json", "sandbox", "publish", "web", "-o", "-"]).error(1)["code"], "usage");
    // Paused, and piped on.
    place.ok(&["sandbox", "stop", "web"]);
    let piped = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("{} sandbox publish web --path /etc -o - | tar -t", env!("CARGO_BIN_EXE_miosa")))
        .env("MIOSA_STATE_DIR", place.dir())
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&piped.stdout).contains("oci-layout"), "{piped:?}");
    assert_eq!(place.ok(&["sandbox", "show", "web"])["state"], "paused");
}
