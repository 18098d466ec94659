//! What was destroyed is in no file of the state directory once garbage was collected.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use crate::death::files;
use crate::lab::{Daemon, MIB, Start, amount, noise, seed, text, work_dir};

/// Whether any file has one of the pieces.
fn holders(daemon: &Daemon, pieces: &[Vec<u8>]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, _) in files(&daemon.state) {
        if path.starts_with(daemon.state.join("attached")) {
            continue;
        }
        let Ok(bytes) = std::fs::read(&path) else { continue };
        // The first bytes of each piece, wherever they are: noise does not compress, so a frame has it as it is.
        let heads: std::collections::HashSet<&[u8]> = pieces.iter().map(|p| &p[..16]).collect();
        if bytes.windows(16).any(|w| heads.contains(w)) {
            found.push(path.display().to_string());
        }
    }
    found
}

#[test]
fn what_was_destroyed_is_in_no_file_after_a_collection() {
    let seed = seed();
    let rounds = amount("MIOSA_CANARIES", 1, 20);
    let dir = work_dir();
    let mut daemon = Daemon::start(&dir.path().join("s"), Start::busy());
    // Others stay, in the same packs and segments.
    daemon.create("other", 8 * MIB);
    let other = File::options().write(true).open(daemon.attach("other", "fuse")).unwrap();
    let mut pieces = 0;
    for round in 0..rounds {
        let canaries: Vec<Vec<u8>> = (0..200).map(|i| noise(seed ^ 0xCA ^ round << 40 ^ i << 20, 4096)).collect();
        pieces += canaries.len();
        // On a disk, in a snapshot and a fork of it, and on a sandbox's template and disk.
        daemon.create("secret", 4 * MIB);
        let file = File::options().write(true).open(daemon.attach("secret", "fuse")).unwrap();
        for (i, canary) in canaries.iter().take(100).enumerate() {
            file.write_all_at(canary, i as u64 * 4096).unwrap();
            other.write_all_at(&noise(seed ^ i as u64 ^ round << 30, 4096), i as u64 * 4096).unwrap();
            if i % 40 == 39 {
                file.sync_data().unwrap();
                daemon.ok("POST", "/store/seal", Value::Null);
            }
        }
        daemon.ok("POST", "/disks/secret/snapshots", json!({ "name": "kept" }));
        daemon.ok("POST", "/disks/kept/fork", json!({ "name": "child" }));
        // Overwritten before it is destroyed, too.
        for i in 0..30 {
            file.write_all_at(&noise(i, 4096), i * 4096).unwrap();
        }
        file.sync_data().unwrap();
        drop(file);
        let image = dir.path().join("image");
        let mut bytes: Vec<u8> = canaries[100..].concat();
        bytes.resize(64 * 4096 * 2, 0);
        std::fs::write(&image, &bytes).unwrap();
        daemon.cli(&["template", "build", "base", "--image", text(&image)]);
        daemon.cli(&["sandbox", "create", "--template", "base", "--name", "box", "--wait"]);
        daemon.cli(&["sandbox", "snapshot", "box", "--name", "of-box"]);
        daemon.cli(&["sandbox", "fork", "box", "--name", "box-2"]);
        assert!(!holders(&daemon, &canaries).is_empty(), "the search finds nothing that is there");

        daemon.detach("secret");
        for name in ["secret", "kept", "child"] {
            daemon.cli(&["disk", "delete", name]);
        }
        daemon.cli(&["sandbox", "snapshots", "delete", "box", "of-box"]);
        daemon.cli(&["sandbox", "destroy", "box"]);
        daemon.cli(&["sandbox", "destroy", "box-2"]);
        daemon.cli(&["template", "delete", "base"]);
        daemon.ok("POST", "/store/seal", Value::Null);
        daemon.ok("POST", "/store/gc", Value::Null);
        let found = holders(&daemon, &canaries);
        assert!(found.is_empty(), "round {round}: {found:?} still have what was destroyed");
    }
    drop(other);
    assert!(daemon.stop());
    println!("canary: {pieces} destroyed blocks searched for, none found");
}
