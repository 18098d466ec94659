//! The files on disks, read without booting anything.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use miosa::ext4::{self, FileSystem};
use serde_json::{Value, json};
use storage::{Options, Source, Store};

use crate::words::{Place, noise, text};

/// Runs a tool of e2fsprogs and the like.
pub fn tool(program: &str, args: &[&str]) -> String {
    let ran = Command::new(program).args(args).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output().unwrap();
    let told = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success(), "{program} {args:?}: {told}");
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// Files of all kinds that an unprivileged user can make, and what they are.
pub fn make_tree(top: &Path) {
    let write = |name: &str, bytes: &[u8]| std::fs::write(top.join(name), bytes).unwrap();
    for dir in ["dir", "dir/sub", "many"] {
        std::fs::create_dir_all(top.join(dir)).unwrap();
    }
    write("a.txt", b"hello\n");
    write("empty", b"");
    write("dir/big", &noise(1, 3 << 20));
    std::fs::set_permissions(top.join("dir/big"), std::fs::Permissions::from_mode(0o4751)).unwrap();
    std::fs::hard_link(top.join("a.txt"), top.join("hard")).unwrap();
    symlink("a.txt", top.join("link")).unwrap();
    symlink(format!("/dir/sub/{}", "x".repeat(100)), top.join("long-link")).unwrap();
    symlink("../dir", top.join("dir/up")).unwrap();
    symlink("loop", top.join("loop")).unwrap();
    // More than one block of names.
    for i in 0..400 {
        write(&format!("many/a-file-with-a-long-name-{i:04}"), format!("{i}\n").as_bytes());
    }
    let sparse = std::fs::File::create(top.join("dir/sparse")).unwrap();
    sparse.set_len(40 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 20 << 20).unwrap();
    nix::unistd::mkfifo(&top.join("pipe"), nix::sys::stat::Mode::from_bits_truncate(0o640)).unwrap();
}

pub fn make_image(tree: &Path, image: &Path, options: &[&str]) {
    let file = std::fs::File::create(image).unwrap();
    file.set_len(128 << 20).unwrap();
    let mut args = vec!["-q", "-F", "-d", text(tree)];
    args.extend(options);
    args.push(text(image));
    tool("mkfs.ext4", &args);
}

/// A tree, its image, and a place that has it as the disk `one`.
fn imported(place: &Place) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    std::fs::create_dir(&tree).unwrap();
    make_tree(&tree);
    make_image(&tree, &image, &[]);
    place.ok(&["disk", "import", text(&image), "--name", "one"]);
    (dir, image)
}

fn find<'a>(list: &'a Value, path: &str) -> &'a Value {
    let found = list.as_array().unwrap().iter().find(|f| f["path"] == path);
    found.unwrap_or_else(|| panic!("{path} is not in {list}"))
}

#[test]
fn files_are_listed_shown_and_extracted() {
    for place in Place::both() {
        let (dir, _) = imported(&place);
        let tree = dir.path().join("tree");

        let all = place.ok(&["disk", "ls", "one", "/", "-R"]);
        for path in
            ["a.txt", "dir", "dir/big", "dir/sparse", "link", "long-link", "many/a-file-with-a-long-name-0399", "pipe"]
        {
            let meta = std::fs::symlink_metadata(tree.join(path)).unwrap();
            let file = find(&all, &format!("/{path}"));
            assert_eq!(file["mode"], format!("{:04o}", meta.mode() & 0o7777), "{file}");
            assert_eq!(
                (file["uid"].as_u64(), file["gid"].as_u64()),
                (Some(meta.uid().into()), Some(meta.gid().into()))
            );
            if meta.is_file() {
                assert_eq!(
                    (file["size_bytes"].as_u64(), file["links"].as_u64()),
                    (Some(meta.len()), Some(meta.nlink()))
                );
            }
        }
        assert_eq!(find(&all, "/a.txt")["inode"], find(&all, "/hard")["inode"]);
        assert_eq!(find(&all, "/link")["target"], "a.txt");
        assert_eq!(find(&all, "/long-link")["target"].as_str().unwrap().len(), 109);
        assert_eq!(place.ok(&["disk", "ls", "one", "many"]).as_array().unwrap().len(), 400);
        let long = place.run(&["disk", "ls", "one", "/dir", "-l"]);
        assert!(long.out.contains("-rwsr-x--x"), "{long:?}");

        assert_eq!(place.run(&["disk", "cat", "one", "/dir/up/up/../link"]).out, "hello\n");
        place.refused(&["disk", "ls", "one", "/nothing"], 1, "file_not_found");
        place.refused(&["disk", "ls", "one", "/loop/x"], 1, "file_error");
        place.refused(&["disk", "ls", "nothing", "/"], 1, "disk_not_found");
        assert_eq!(place.run(&["disk", "cat", "one", "/dir"]).code, 1);

        let archive = place.file("files.tar");
        place.ok(&["disk", "extract", "one", "/", "-o", text(&archive)]);
        let out = dir.path().join("out");
        std::fs::create_dir(&out).unwrap();
        tool("tar", &["-xpf", text(&archive), "-C", text(&out)]);
        std::fs::remove_dir(out.join("lost+found")).unwrap();
        tool("diff", &["-r", "--no-dereference", text(&tree.join("dir")), text(&out.join("dir"))]);
        tool("diff", &["-r", "--no-dereference", text(&tree.join("many")), text(&out.join("many"))]);
        let of = |path: &str| std::fs::symlink_metadata(out.join(path)).unwrap();
        assert_eq!(of("a.txt").ino(), of("hard").ino());
        assert_eq!(of("dir/big").mode() & 0o7777, 0o4751);
        assert_eq!(of("a.txt").mtime(), std::fs::metadata(tree.join("a.txt")).unwrap().mtime());
        assert_eq!(
            std::fs::read_link(out.join("long-link")).unwrap(),
            std::fs::read_link(tree.join("long-link")).unwrap()
        );
    }
}

#[test]
fn what_has_no_file_system_is_refused() {
    let place = Place::Alone(tempfile::tempdir().unwrap());
    place.import("noise", &noise(3, 1 << 20));
    place.refused(&["disk", "ls", "noise", "/"], 1, "file_error");
    place.ok(&["disk", "create", "empty", "--size", "1mb"]);
    place.refused(&["disk", "ls", "empty", "/x"], 1, "file_error");
}

#[test]
fn a_difference_is_told_file_by_file() {
    let place = Place::Alone(tempfile::tempdir().unwrap());
    let (dir, image) = imported(&place);
    let new = dir.path().join("new");
    std::fs::write(&new, b"something new\n").unwrap();
    let commands = [
        format!("write {} dir/new", text(&new)),
        "rm many/a-file-with-a-long-name-0007".to_owned(),
        "rm empty".to_owned(),
        format!("write {} empty", text(&new)),
        "set_inode_field dir/sparse mode 0100600".to_owned(),
        "set_inode_field pipe uid 77".to_owned(),
        "ln dir/big moved".to_owned(),
        "unlink dir/big".to_owned(),
        "ea_set a.txt user.note value".to_owned(),
        "mkdir made".to_owned(),
        format!("write {} made/inside", text(&new)),
    ];
    let script = dir.path().join("script");
    std::fs::write(&script, commands.join("\n")).unwrap();
    tool("debugfs", &["-w", "-f", text(&script), text(&image)]);
    place.ok(&["disk", "import", text(&image), "--name", "two"]);

    let diff = place.ok(&["disk", "diff", "--files", "one", "two"]);
    let told: Vec<_> = diff["changes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| {
            let parts: Vec<_> = c["parts"].as_array().into_iter().flatten().map(|p| p.as_str().unwrap()).collect();
            (c["how"].as_str().unwrap(), c["path"].as_str().unwrap(), parts.join(","))
        })
        .collect();
    let expected = [
        ("changed", "/a.txt", "xattrs"),
        ("added", "/dir/new", ""),
        ("changed", "/dir/sparse", "mode"),
        ("changed", "/empty", "content"),
        ("changed", "/hard", "xattrs"),
        ("added", "/made", ""),
        ("added", "/made/inside", ""),
        ("removed", "/many/a-file-with-a-long-name-0007", ""),
        ("renamed", "/moved", ""),
        ("changed", "/pipe", "owner"),
    ];
    assert_eq!(told, expected.map(|(how, path, parts)| (how, path, parts.to_owned())), "{diff}");
    let moved = find(&diff["changes"], "/moved");
    assert_eq!((&moved["from"], &moved["size_after"]), (&json!("/dir/big"), &json!(3 << 20)));

    // Nothing differs from itself, and the other way round is the other way round.
    assert_eq!(place.ok(&["disk", "diff", "--files", "one", "one"])["changes"], json!([]));
    let back = place.ok(&["disk", "diff", "--files", "two", "one"]);
    assert_eq!(find(&back["changes"], "/dir/new")["how"], "removed");
}

/// Content that changes under an inode that does not.
#[test]
fn bytes_written_in_place_are_a_difference() {
    let place = Place::Alone(tempfile::tempdir().unwrap());
    let (_dir, image) = imported(&place);
    let block: u64 = tool("debugfs", &["-R", "bmap dir/big 300", text(&image)]).trim().parse().unwrap();
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    let size: u64 = tool("dumpe2fs", &["-h", text(&image)])
        .lines()
        .find_map(|l| l.strip_prefix("Block size:"))
        .map(|l| l.trim().parse().unwrap())
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"changed", block * size + 9).unwrap();
    place.ok(&["disk", "import", text(&image), "--name", "two"]);
    let diff = place.ok(&["disk", "diff", "--files", "one", "two"]);
    let changes = diff["changes"].as_array().unwrap();
    assert_eq!(
        (changes.len(), &changes[0]["path"], &changes[0]["parts"]),
        (1, &json!("/dir/big"), &json!(["content"]))
    );
}

/// What is only in the journal is read from there.
#[test]
fn an_unclean_journal_is_played_back() {
    let kinds: [(usize, &str, &[&str]); 3] = [
        (4096, "jo -c", &["-b", "4096"]),
        (4096, "jo", &["-b", "4096", "-O", "^metadata_csum,^64bit"]),
        (1024, "jo -c", &["-b", "1024"]),
    ];
    for (size, open, options) in kinds {
        let dir = tempfile::tempdir().unwrap();
        let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
        std::fs::create_dir(&tree).unwrap();
        make_tree(&tree);
        make_image(&tree, &image, options);
        let after = dir.path().join("after");
        std::fs::copy(&image, &after).unwrap();
        let new = dir.path().join("new");
        std::fs::write(&new, noise(9, 10_000)).unwrap();
        let script = dir.path().join("script");
        std::fs::write(&script, format!("write {} dir/new\nrm many/a-file-with-a-long-name-0003\n", text(&new)))
            .unwrap();
        tool("debugfs", &["-w", "-f", text(&script), text(&after)]);

        // All blocks in which the two differ go into the journal of the first, and nowhere else.
        let (old, wanted) = (std::fs::read(&image).unwrap(), std::fs::read(&after).unwrap());
        let differing = (0..old.len() / size).filter(|i| old[i * size..][..size] != wanted[i * size..][..size]);
        let (mut blocks, mut bytes) = (Vec::new(), Vec::new());
        for block in differing {
            blocks.push(block.to_string());
            bytes.extend_from_slice(&wanted[block * size..][..size]);
        }
        let content = dir.path().join("content");
        std::fs::write(&content, &bytes).unwrap();
        std::fs::write(&script, format!("{open}\njw -b {} {}\njc\n", blocks.join(","), text(&content))).unwrap();
        tool("debugfs", &["-w", "-f", text(&script), text(&image)]);
        assert!(tool("dumpe2fs", &["-h", text(&image)]).contains("needs_recovery"), "{options:?}");

        let place = Place::Alone(tempfile::tempdir().unwrap());
        place.ok(&["disk", "import", text(&image), "--name", "torn"]);
        place.ok(&["disk", "import", text(&after), "--name", "whole"]);
        let names = place.ok(&["disk", "ls", "torn", "/dir"]);
        assert_eq!(find(&names, "/dir/new")["size_bytes"], 10_000, "{options:?}");
        assert_eq!(place.ok(&["disk", "diff", "--files", "torn", "whole"])["changes"], json!([]), "{options:?}");
    }
}

/// Whatever is done to an image: an answer or an error, and an end.
#[test]
fn a_damaged_image_gives_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    std::fs::create_dir(&tree).unwrap();
    make_tree(&tree);
    // Without checksums, so that damage gets through to what reads it.
    make_image(&tree, &image, &["-O", "^metadata_csum,^uninit_bg"]);
    let content = std::fs::read(&image).unwrap();
    let store = Store::open(&dir.path().join("store"), Options { background: false, ..Options::default() }).unwrap();
    let mut tx = store.begin();
    let base = tx.create_disk("base", content.len() as u64);
    tx.commit_durable().unwrap();
    let disk = store.disk(base).unwrap();
    for (i, block) in content.chunks(4096).enumerate().filter(|(_, b)| b.iter().any(|b| *b != 0)) {
        disk.write(i as u64 * 4096, block).unwrap();
    }
    // Where its own structures are: the damage goes there.
    let used: Vec<usize> =
        (0..content.len() / 4096).filter(|i| content[i * 4096..][..4096].iter().any(|b| *b != 0)).collect();
    let structures: Vec<_> = used.iter().copied().filter(|i| *i < 3000).collect();
    let mut seed = 1;
    let mut random = |below: usize| {
        seed += 1;
        usize::from_le_bytes(noise(seed, 8).try_into().unwrap()) % below
    };
    let (mut errors, mut answers) = (0, 0);
    for round in 0..400 {
        let mut tx = store.begin();
        let id = tx.fork(Source::Disk(base), &format!("round-{round}"));
        drop(tx.commit().unwrap());
        let disk = store.disk(id).unwrap();
        for _ in 0..1 + random(30) {
            let at = structures[random(structures.len())] as u64 * 4096 + random(4096 / 4) as u64 * 4;
            let value = [0, 1, 0x7FFF_FFFF, u32::MAX, random(1 << 20) as u32][random(5)];
            disk.write(at, &value.to_le_bytes()).unwrap();
        }
        match ext4::contained(|| read_all(&disk)) {
            Ok(()) => answers += 1,
            Err(ext4::Error::Store(error)) => panic!("{error}"),
            Err(error) => {
                assert!(!error.to_string().contains("in a way that reading it fails"), "round {round} panicked");
                errors += 1;
            }
        }
    }
    assert!(errors > 20 && answers > 20, "{errors} errors, {answers} answers");
}

/// Reads everything there is.
fn read_all(disk: &storage::Disk) -> ext4::Result<()> {
    let fs = FileSystem::open(disk.clone())?;
    let top = fs.root()?;
    // A size that was made up is endless zeroes, which nobody has to wait for.
    let mut sink = Limited(256 << 20);
    match ext4::archive::write(&fs, top, "", &mut sink) {
        Ok(done) => done,
        Err(_) => Ok(()),
    }
}

struct Limited(usize);

impl std::io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 = self.0.checked_sub(bytes.len()).ok_or(std::io::ErrorKind::StorageFull)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
