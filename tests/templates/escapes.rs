//! Archives that try to get out: by the names in them, by links, by what a later entry does with an earlier one, and by what
//! a container image says of its own files. Each is refused, or comes out inside of its own root.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::archives::{Tar, docker_save, ready};

/// What is never to be read.
const SECRET: &str = "canary-5b1f0d6c-not-yours";

/// A directory with something outside of what archives are given.
struct Ground {
    dir: tempfile::TempDir,
}

impl Ground {
    fn new() -> Ground {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/canary"), SECRET).unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        Ground { dir }
    }

    fn outside(&self) -> PathBuf {
        self.dir.path().join("outside")
    }

    /// All that is there, but for what archives are given, and what is in it.
    fn seen(&self) -> (BTreeSet<PathBuf>, Vec<u8>) {
        let list = |dir: &Path| std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
        let own = list(self.dir.path()).into_iter().filter(|p| !p.ends_with("work") && !p.ends_with("payload"));
        let names = own.chain(list(&self.outside())).chain(list(Path::new("/")));
        let escaped = list(Path::new("/tmp")).into_iter().filter(|p| p.to_string_lossy().contains("escaped"));
        (names.chain(escaped).collect(), std::fs::read(self.outside().join("canary")).unwrap())
    }
}

/// Most of an image is zero.
fn holds_the_secret(image: &[u8]) -> bool {
    let found = |piece: &[u8]| piece.windows(SECRET.len()).any(|window| window == SECRET.as_bytes());
    let pieces = image.chunks(4_096).enumerate().filter(|(_, piece)| piece.iter().any(|byte| *byte != 0));
    pieces.into_iter().any(|(n, _)| found(&image[n * 4_096..image.len().min((n + 1) * 4_096 + SECRET.len())]))
}

/// Names that lead to `escaped` or to the canary outside, from a root or from directories in it.
fn names(outside: &str) -> Vec<String> {
    let bare = outside.trim_start_matches('/');
    let mut names = vec![
        outside.to_owned(),
        format!("/{outside}"),
        format!("/./{bare}"),
        format!("//{bare}"),
        format!("/../{bare}"),
        format!("./{outside}"),
        "..".into(),
        "../".into(),
        "./..".into(),
        "a/..".into(),
        "a/../..".into(),
        "/".into(),
        "/..".into(),
        "..//escaped".into(),
        "a//..//..//escaped".into(),
        "../outside/canary".into(),
        "../../outside/canary".into(),
        "../../../outside/canary".into(),
        "../../../../outside/canary".into(),
        "../../../../../outside/canary".into(),
    ];
    for depth in 1..=7 {
        let up = "../".repeat(depth);
        names.extend([
            format!("{up}escaped"),
            format!("{up}tmp/escaped"),
            format!("{up}{bare}"),
            format!("a/{up}escaped"),
            format!("a/./{up}{bare}"),
            format!("./{up}escaped/x"),
        ]);
    }
    names
}

/// Archives by what they try.
fn payloads(ground: &Ground) -> Vec<(String, Vec<u8>)> {
    let canary = ground.outside().join("canary").to_str().unwrap().to_owned();
    let mut all: Vec<(String, Tar)> = Vec::new();
    for name in names(&canary) {
        let mut add = |kind: &str, tar: Tar| all.push((format!("{kind} {name}"), tar));
        add("file", Tar::new().file(&name, 0o644, "escaped"));
        add("directory", Tar::new().dir(&name, 0o777));
        add("link at", Tar::new().link(&name, "/etc/passwd"));
        add("hard link to", Tar::new().hard("x", &name));
        add("hard link at", Tar::new().file("x", 0o644, "x").hard(&name, "x"));
    }
    let bare = canary.trim_start_matches('/');
    let dir = ground.outside().to_str().unwrap().to_owned();
    let targets = [
        "/",
        "..",
        "../..",
        "../../..",
        "../../../../../../../../..",
        "/tmp",
        "/proc/self/root",
        "/proc/self/cwd",
        &dir,
    ];
    for target in targets {
        let mut add = |kind: &str, tar: Tar| all.push((format!("{kind} {target}"), tar));
        let link = || Tar::new().link("a", target);
        add("file through a link to", link().file("a/escaped", 0o644, "x"));
        add("file at the canary through", link().file("a/canary", 0o644, "x").file(&format!("a/{bare}"), 0o644, "x"));
        add("directory through", link().dir("a/escaped", 0o777));
        add("link through", link().link("a/escaped", "x"));
        add("hard link through", link().hard("b", "a/canary").hard("c", &format!("a/{bare}")));
        add("two links to", link().link("b", "a/..").file("b/escaped", 0o644, "x"));
        add(
            "a directory that becomes a link to",
            Tar::new().dir("a", 0o755).link("a", target).file("a/escaped", 0o644, "x"),
        );
        add("a link that becomes a directory, of", link().dir("a", 0o755).file("a/escaped", 0o644, "x"));
    }
    for target in [&*canary, "../outside/canary", "../../../outside/canary"] {
        let mut add = |kind: &str, tar: Tar| all.push((format!("{kind} {target}"), tar));
        add("file over a link to", Tar::new().link("a", target).file("a", 0o644, "x"));
        add("file over a hard link of a link to", Tar::new().link("a", target).hard("b", "a").file("b", 0o644, "x"));
        add("hard link of a link to", Tar::new().link("a", target).hard("b", "a"));
    }
    let long = format!("{}escaped", "../".repeat(200));
    let mut archives: Vec<(String, Vec<u8>)> = all.into_iter().map(|(what, tar)| (what, tar.finish())).collect();
    for (key, value) in [("path", &*canary), ("path", "../../escaped"), ("path", &long), ("linkpath", &*canary)] {
        archives.push((format!("pax {key} {value}"), pax(key, value)));
    }
    for name in [&*canary, "../../outside/canary", &long] {
        archives.push((format!("GNU long name {name}"), long_name(name)));
    }
    archives
}

fn header(kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..1].copy_from_slice(b"x");
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    header
}

/// An entry whose name, or what it is a link to, is said before it.
fn pax(key: &str, value: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_pax_extensions([(key, value.as_bytes())]).unwrap();
    let kind = if key == "path" { tar::EntryType::Regular } else { tar::EntryType::Link };
    builder.append(&header(kind, 0), &b""[..]).unwrap();
    builder.into_inner().unwrap()
}

fn long_name(name: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(&header(tar::EntryType::GNULongName, name.len() as u64), name.as_bytes()).unwrap();
    builder.append(&header(tar::EntryType::Regular, 1), &b"x"[..]).unwrap();
    builder.into_inner().unwrap()
}

/// Container images whose own files are somewhere else.
fn images(ground: &Ground) -> Vec<(String, Vec<u8>)> {
    let canary = ground.outside().join("canary").to_str().unwrap().to_owned();
    let elsewhere =
        [&*canary, "../../outside/canary", "../../../outside/canary", "/etc/passwd", "a/../../../../etc/passwd"];
    let mut all = Vec::new();
    for name in elsewhere {
        let save = |config: &str, layer: &str| {
            let manifest = json!([{ "Config": config, "RepoTags": ["x:1"], "Layers": [layer] }]).to_string();
            Tar::new().file("manifest.json", 0o644, manifest)
        };
        let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
        all.push((format!("configuration {name}"), save(name, "l/layer.tar").finish()));
        let saved = save("config.json", name).file("config.json", 0o644, config.to_string());
        all.push((format!("layer {name}"), saved.finish()));
        let linked = save("config.json", "l/layer.tar").file("config.json", 0o644, config.to_string());
        all.push((format!("layer that is a link to {name}"), linked.link("l/layer.tar", name).finish()));
        let linked = save("config.json", "l/layer.tar").link("config.json", name);
        all.push((format!("configuration that is a link to {name}"), linked.finish()));
        for digest in [name.to_owned(), format!("sha256:{name}"), format!("../{name}:x")] {
            let index = json!({ "schemaVersion": 2, "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 10,
            }] });
            let layout = Tar::new().file("oci-layout", 0o644, r#"{"imageLayoutVersion":"1.0.0"}"#);
            all.push((format!("digest {digest}"), layout.file("index.json", 0o644, index.to_string()).finish()));
        }
    }
    all
}

#[test]
fn no_archive_gets_out_of_its_root() {
    let ground = Ground::new();
    let before = ground.seen();
    let payloads = payloads(&ground);
    let layers = payloads
        .iter()
        .map(|(what, tar)| (format!("layer: {what}"), docker_save(std::slice::from_ref(tar), json!({}))));
    let layers: Vec<_> = layers.step_by(5).collect();
    let images = images(&ground);
    let (mut tried, mut refused) = (0, 0);
    for (what, archive) in payloads.iter().chain(&layers).chain(&images) {
        tried += 1;
        match ready(ground.dir.path(), "payload", archive) {
            Err(_) => refused += 1,
            Ok(image) => {
                let bytes = std::fs::read(&image.path).unwrap();
                assert!(!holds_the_secret(&bytes), "{what}: what is outside is in the image");
            }
        }
        assert_eq!(ground.seen(), before, "{what}: something got out");
        assert_eq!(std::fs::read_dir(ground.dir.path().join("work")).unwrap().count(), 0, "{what}: something is left");
    }
    assert!(tried >= 200 && refused >= 100, "{refused} of {tried} were refused");
    eprintln!("{tried} archives, {refused} refused, none got out");
}
