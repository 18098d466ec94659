//! A full file system: new writes are refused, old ones stay, deleting makes room again.

use std::path::Path;
use std::process::Command;
use storage::medium::sim::Random;
use storage::{BLOCK_SIZE, ErrorKind, Options, Source, Store};

/// A small file system of its own, unmounted at the end.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(dir.path()).status();
        assert!(status.unwrap().success(), "this test mounts a tmpfs and needs root");
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let status = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(std::thread::panicking() || status.unwrap().success());
    }
}

fn noise(seed: u64, blocks: usize) -> Vec<u8> {
    let mut random = Random(seed << 32);
    (0..blocks * BLOCK_SIZE / 8).flat_map(|_| random.bits().to_le_bytes()).collect()
}

#[test]
fn a_full_file_system_refuses_writes_loses_nothing_and_recovers_by_deleting() {
    let mount = Mount::new("80m");
    let dir = mount.path().join("store");
    let options = || Options { background: false, ..Options::default() };
    let store = Store::open(&dir, options()).unwrap();
    let mut tx = store.begin();
    let kept = tx.create_disk("kept", 1 << 30);
    let filler = tx.create_disk("filler", 1 << 30);
    tx.commit_durable().unwrap();
    let precious = noise(1, 500);
    let disk = store.disk(kept).unwrap();
    disk.write(0, &precious).unwrap();
    disk.flush().unwrap();

    let fill = store.disk(filler).unwrap();
    let mut accepted = 0;
    let refused = loop {
        if let Err(e) = fill.write(accepted << 20, &noise(100 + accepted, 256)).and_then(|()| fill.flush()) {
            break e;
        }
        accepted += 1;
        if accepted % 8 == 0 && store.seal().is_err() {
            break store.seal().unwrap_err();
        }
        assert!(accepted < 100, "80 MiB took 100");
    };
    assert_eq!(refused.kind(), ErrorKind::NoSpace, "{refused}");
    let mut got = vec![0; precious.len()];
    disk.read(0, &mut got).unwrap();
    assert!(got == precious);

    // Forking needs space and says so, or still finds some; deleting works in any case, and collecting gives it back.
    let mut tx = store.begin();
    tx.delete_disk(filler);
    tx.commit_durable().unwrap();
    drop(fill);
    store.seal().or_else(|_| store.gc(false).map(|_| Default::default())).unwrap();
    store.gc(false).unwrap();
    let mut tx = store.begin();
    let fork = tx.fork(Source::Disk(kept), "fork");
    tx.commit_durable().unwrap();
    store.disk(fork).unwrap().write(0, &noise(2, 2560)).unwrap();
    store.flush().unwrap();
    store.seal().unwrap();
    assert_eq!(store.check().unwrap().damage, [""; 0]);
    drop((disk, store));
    let store = Store::open(&dir, options()).unwrap();
    store.disk(kept).unwrap().read(0, &mut got).unwrap();
    assert!(got == precious);
}
