//! Archives made here, and what becomes of them, seen without a machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};
use vmm::image::{ReadyImage, prepare};

pub const DISK: u64 = 64 << 20;

/// A tar archive by hand.
pub struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Tar {
        Tar(tar::Builder::new(Vec::new()))
    }

    fn entry(&mut self, kind: tar::EntryType, path: &str, mode: u32, link: &str, content: &[u8]) {
        let mut header = tar::Header::new_gnu();
        // By hand: the library's own setters refuse what a stranger's would not.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        header.set_mtime(1_000_000_000);
        header.set_uid(if path.contains("owned") { 1_234 } else { 0 });
        header.set_gid(0);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
    }

    pub fn file(mut self, path: &str, mode: u32, content: impl AsRef<[u8]>) -> Tar {
        self.entry(tar::EntryType::Regular, path, mode, "", content.as_ref());
        self
    }

    pub fn dir(mut self, path: &str, mode: u32) -> Tar {
        self.entry(tar::EntryType::Directory, path, mode, "", b"");
        self
    }

    pub fn link(mut self, path: &str, target: &str) -> Tar {
        self.entry(tar::EntryType::Symlink, path, 0o777, target, b"");
        self
    }

    pub fn hard(mut self, path: &str, target: &str) -> Tar {
        self.entry(tar::EntryType::Link, path, 0o644, target, b"");
        self
    }

    pub fn device(mut self, path: &str) -> Tar {
        self.entry(tar::EntryType::Char, path, 0o666, "", b"");
        self
    }

    pub fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// What `docker save` writes of these layers.
pub fn docker_save(layers: &[Vec<u8>], config: serde_json::Value) -> Vec<u8> {
    let digests: Vec<_> = layers.iter().map(|l| format!("sha256:{}", sha256(l))).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": config, "rootfs": { "type": "layers", "diff_ids": digests },
    });
    let names: Vec<_> = (0..layers.len()).map(|n| format!("{:064x}/layer.tar", n + 1)).collect();
    let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": ["test:1"], "Layers": names }]);
    let mut tar = Tar::new();
    for (name, layer) in names.iter().zip(layers) {
        tar = tar.file(name, 0o644, layer);
    }
    tar.file("manifest.json", 0o644, manifest.to_string()).file("config.json", 0o644, config.to_string()).finish()
}

/// An OCI layout of these layers, the second of which is compressed.
pub fn oci_layout(layers: &[Vec<u8>], config: serde_json::Value) -> Vec<u8> {
    let digests: Vec<_> = layers.iter().map(|l| format!("sha256:{}", sha256(l))).collect();
    let mut tar = Tar::new().file("oci-layout", 0o644, r#"{"imageLayoutVersion":"1.0.0"}"#);
    let mut add = |content: &[u8], kind: &str| {
        let digest = sha256(content);
        let before = std::mem::replace(&mut tar, Tar::new());
        tar = before.file(&format!("blobs/sha256/{digest}"), 0o644, content);
        serde_json::json!({ "mediaType": kind, "digest": format!("sha256:{digest}"), "size": content.len() })
    };
    let blobs: Vec<_> = layers
        .iter()
        .enumerate()
        .map(|(n, layer)| match n {
            1 => add(&zstd::encode_all(&layer[..], 1).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd"),
            _ => add(layer, "application/vnd.oci.image.layer.v1.tar"),
        })
        .collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": config, "rootfs": { "type": "layers", "diff_ids": digests },
    });
    let config = add(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
    let manifest = serde_json::json!({ "schemaVersion": 2, "config": config, "layers": blobs });
    let mut manifest = add(manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json");
    manifest["platform"] = serde_json::json!({ "architecture": "amd64", "os": "linux" });
    let other = serde_json::json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{:064}", 0), "size": 1,
        "platform": { "architecture": "arm64", "os": "linux" },
    });
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [other, manifest] });
    tar.file("index.json", 0o644, index.to_string()).finish()
}

/// Layers that need whiteouts, links and all that to come out right.
pub fn layers() -> Vec<Vec<u8>> {
    let low = Tar::new()
        .dir("./", 0o755)
        .dir("usr/bin/", 0o755)
        .link("bin", "usr/bin")
        .file("bin/tool", 0o4755, "tool")
        .file("etc/kept", 0o600, "kept")
        .file("etc/gone", 0o644, "gone")
        .file("var/cache/old", 0o644, "old")
        .file("owned", 0o644, "x")
        .hard("etc/same", "etc/kept")
        .device("dev/null")
        .finish();
    let high = Tar::new()
        .file("etc/.wh.gone", 0o644, "")
        .file("var/cache/new", 0o644, "new")
        .file("var/cache/.wh..wh..opq", 0o644, "")
        .file("bin/second", 0o755, "second")
        .finish();
    vec![low, high]
}

pub fn ready(dir: &Path, name: &str, bytes: &[u8]) -> vmm::Result<ReadyImage> {
    let file = dir.join(name);
    std::fs::write(&file, bytes).unwrap();
    prepare(&file, None, DISK, &dir.join("work"), &mut |_| {})
}

/// What debugfs says; the file system is checked first.
fn debugfs(image: &Path, request: &str) -> String {
    let checked = Command::new("e2fsck").arg("-fn").arg(image).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    let output = Command::new("debugfs").args(["-R", request]).arg(image).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn check_layers(image: &Path) {
    let cat = |path: &str| debugfs(image, &format!("cat {path}"));
    assert_eq!(cat("/etc/kept"), "kept");
    assert_eq!(cat("/etc/gone"), "");
    assert_eq!(cat("/usr/bin/tool"), "tool");
    assert_eq!(cat("/usr/bin/second"), "second", "a layer's path goes through the link of the one below");
    assert_eq!(cat("/var/cache/new"), "new");
    assert_eq!(cat("/var/cache/old"), "");
    let stat = |path: &str| debugfs(image, &format!("stat {path}"));
    assert!(stat("/usr/bin/tool").contains("Mode:  04755"), "{}", stat("/usr/bin/tool"));
    assert!(stat("/etc/same").contains("Links: 2"), "{}", stat("/etc/same"));
    assert!(stat("/owned").contains("User:  1234"), "{}", stat("/owned"));
    assert!(stat("/bin").contains("Type: symlink"), "{}", stat("/bin"));
    assert!(stat("/").contains("Mode:  0755"), "{}", stat("/"));
    assert!(!debugfs(image, "ls -p /dev").contains("null"));
}

#[test]
fn layers_become_one_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let config = serde_json::json!({ "Env": ["PATH=/bin", "A=b=c"], "WorkingDir": "/srv/app", "Cmd": ["tool"] });
    for (name, bytes) in
        [("docker.tar", docker_save(&layers(), config.clone())), ("oci.tar", oci_layout(&layers(), config.clone()))]
    {
        let image = ready(dir.path(), name, &bytes).unwrap_or_else(|e| panic!("{name}: {e} {:?}", e.hint));
        check_layers(&image.path);
        assert_eq!(image.config.env["A"], "b=c");
        assert_eq!(image.config.workdir.as_deref(), Some("/srv/app"));
        assert_eq!(image.config.cmd, ["tool"]);
        assert!(debugfs(&image.path, "stat /srv/app").contains("Type: directory"));
    }
    assert_eq!(std::fs::read_dir(dir.path().join("work")).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn a_root_file_systems_tar_is_read_however_it_is_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let plain = Tar::new().file("etc/hello", 0o644, "hello").file("etc/.wh.literal", 0o644, "x").finish();
    let file = dir.path().join("root.tar");
    std::fs::write(&file, &plain).unwrap();
    for (tool, name) in [("gzip", "root.tar.gz"), ("xz", "root.tar.xz"), ("zstd", "root.tar.zst")] {
        let packed = match tool {
            "zstd" => zstd::encode_all(&plain[..], 3).unwrap(),
            tool => Command::new(tool).arg("-c").arg(&file).output().unwrap().stdout,
        };
        let image = ready(dir.path(), name, &packed).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(debugfs(&image.path, "cat /etc/hello"), "hello", "{name}");
        // Only layers have whiteouts.
        assert_eq!(debugfs(&image.path, "cat /etc/.wh.literal"), "x", "{name}");
        let cut = &packed[..packed.len() / 2];
        assert!(ready(dir.path(), "cut", cut).is_err(), "{name}, cut off");
    }
}

#[test]
fn what_leads_out_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("escaped");
    let inside = target.to_str().unwrap();
    for (what, tar) in [
        ("absolute", Tar::new().file(inside, 0o644, "x")),
        ("dots", Tar::new().file("a/../../../../../../../../tmp/escaped", 0o644, "x")),
        ("hard link", Tar::new().hard("x", "../../etc/passwd")),
    ] {
        let error = ready(dir.path(), "bad.tar", &tar.finish()).unwrap_err();
        assert!(error.message.contains("is refused"), "{what}: {error}");
    }
    // A link that leads out leads to the root's own.
    let tar = Tar::new().link("etc", dir.path().to_str().unwrap()).file("etc/escaped", 0o644, "inside").finish();
    let image = ready(dir.path(), "link.tar", &tar).unwrap();
    assert_eq!(debugfs(&image.path, &format!("cat {inside}")), "inside");
    assert!(!target.exists() && !Path::new("/tmp/escaped").exists());
}

#[test]
fn what_is_no_image_is_told_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let big = vec![7; 40 << 20];
    let mut wrong = docker_save(&layers(), serde_json::json!({}));
    let at = wrong.windows(4).position(|w| w == b"kept").unwrap() + 512;
    wrong[at] ^= 1;
    let arm = docker_save(&[], serde_json::json!({}));
    let arm = String::from_utf8_lossy(&arm).replace("amd64", "arm64").into_bytes();
    let mut half = vec![0; 1 << 20];
    half[1_080..1_082].copy_from_slice(&[0x53, 0xef]);
    half[1_028..1_032].copy_from_slice(&1_000_000_u32.to_le_bytes());
    for (what, bytes, words) in [
        ("text", b"hello, world".repeat(1_000), "no image"),
        ("zeroes", vec![0; 1 << 20], "no image"),
        (
            "content that does not fit",
            Tar::new().file("a", 0o644, &big).file("b", 0o644, &big).finish(),
            "does not fit",
        ),
        ("a layer of another content", wrong, "broken"),
        ("another processor", arm, "arm64"),
        ("a file system that is cut off", half, "cut off"),
        (
            "a container image without its layers",
            docker_save(&layers(), serde_json::json!({}))[..4_096].to_vec(),
            "broken",
        ),
    ] {
        let error = ready(dir.path(), "bad", &bytes).unwrap_err();
        assert!(error.message.contains(words) && error.hint.is_some(), "{what}: {error} {:?}", error.hint);
    }
    let error = prepare(&dir.path().join("absent"), None, DISK, dir.path(), &mut |_| {}).unwrap_err();
    assert!(error.hint.is_some());
    assert_eq!(std::fs::read_dir(dir.path().join("work")).unwrap().count(), 0, "nothing is left behind");
}

/// An ext4 file system of a tree with this one file.
pub fn ext4(dir: &Path, name: &str, content: &str) -> PathBuf {
    let tree = dir.join("tree");
    std::fs::create_dir_all(&tree).unwrap();
    std::fs::write(tree.join(name), content).unwrap();
    let image = dir.join("ext4.raw");
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&tree).arg(&image).arg("16M").output().unwrap();
    assert!(made.status.success(), "{made:?}");
    image
}

#[test]
fn the_root_of_a_partitioned_disk_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let ext4 = std::fs::read(ext4(dir.path(), "who", "root")).unwrap();
    let disk = |types: &[u8]| {
        let mut disk = vec![0; (1 << 20) + types.len() * (16 << 20)];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        for (n, kind) in types.iter().enumerate() {
            let start = 2_048 + n * 32_768;
            let entry = &mut disk[446 + n * 16..];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&(start as u32).to_le_bytes());
            entry[12..16].copy_from_slice(&32_768_u32.to_le_bytes());
            if *kind == 0x83 {
                disk[start * 512..start * 512 + ext4.len()].copy_from_slice(&ext4);
            }
        }
        disk
    };
    let image = ready(dir.path(), "disk.raw", &disk(&[0x82, 0x83])).unwrap();
    assert_eq!((image.offset, image.len), ((2_048 + 32_768) * 512, 16 << 20));
    let several = ready(dir.path(), "disk.raw", &disk(&[0x83, 0x83])).unwrap_err();
    assert!(several.message.contains("several partitions") && several.hint.is_some(), "{several}");
    let none = ready(dir.path(), "disk.raw", &disk(&[0x82])).unwrap_err();
    assert!(none.message.contains("none with ext4") && none.hint.is_some(), "{none}");
}

#[test]
fn a_qcow2_image_is_converted_unless_it_needs_other_files() {
    let dir = tempfile::tempdir().unwrap();
    let raw = ext4(dir.path(), "who", "qcow2");
    let qemu_img = |args: &[&str]| {
        let ran = Command::new("qemu-img").args(args).current_dir(dir.path()).output().unwrap();
        assert!(ran.status.success(), "{ran:?}");
    };
    qemu_img(&["convert", "-O", "qcow2", raw.to_str().unwrap(), "whole.qcow2"]);
    let image = prepare(&dir.path().join("whole.qcow2"), None, DISK, dir.path(), &mut |_| {}).unwrap();
    assert_eq!(debugfs(&image.path, "cat /who"), "qcow2");
    qemu_img(&["create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", "top.qcow2", "16M"]);
    let error = prepare(&dir.path().join("top.qcow2"), None, DISK, dir.path(), &mut |_| {}).unwrap_err();
    assert!(error.message.contains("/etc/passwd") && error.hint.is_some(), "{error}");
}
