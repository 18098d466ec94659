//! What others take for the same fork.

use super::{GIB, Shape, make};
use crate::harness::tools::{Mount, clone, has, run};
use crate::harness::{Report, Samples};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use storage::Source;
use storage::medium::sim::Random;

const SIZE: u64 = 10 * GIB;
const ROUNDS: usize = 9;

/// A file in fragments on a file system that can clone it.
struct Reflink {
    name: &'static str,
    mount: Mount,
    parent: PathBuf,
    samples: Samples,
    durable: Samples,
}

impl Reflink {
    fn new(name: &'static str, kind: &str, mkfs: &[&str], fragments: u64) -> Result<Self, String> {
        let mount = Mount::fresh(kind, mkfs, "noatime", 2 * SIZE)?;
        let parent = mount.path().join("parent");
        let file = File::create(&parent).map_err(|e| e.to_string())?;
        file.set_len(SIZE).map_err(|e| e.to_string())?;
        write_fragments(&file, fragments);
        Ok(Self { name, mount, parent, samples: Samples::default(), durable: Samples::default() })
    }

    fn round(&mut self, round: usize) {
        let parent = File::options().write(true).open(&self.parent).expect("the parent is there");
        parent.write_all_at(&[round as u8; 4096], 0).expect("a write");
        parent.sync_all().expect("a sync");
        let path = self.mount.path().join("child");
        let child = self.samples.time(|| clone(&self.parent, &path));
        self.durable.time(|| child.sync_all().expect("a sync"));
        drop(child);
        std::fs::remove_file(path).expect("the child is there");
        run("sync", &[&"-f", &self.mount.path()]).expect("sync works");
    }
}

/// The same shape as a case of ours: 4 KiB pieces at random, never side by side.
fn write_fragments(file: &File, count: u64) {
    let mut random = Random(1);
    let mut block = [0; 4096];
    for i in 0..count {
        block[..8].copy_from_slice(&random.bits().to_le_bytes());
        file.write_all_at(&block, random.below(SIZE / 8192) * 8192).expect("a write");
        if i % 1000 == 999 {
            file.sync_data().expect("a sync");
        }
    }
    file.sync_all().expect("a sync");
}

/// A file whose blocks are there and written: a sync of one of them is a write to the device and nothing else, the least that
/// anything durable takes.
fn written_file() -> (tempfile::TempDir, File) {
    let dir = tempfile::tempdir().expect("a directory");
    let file = File::create(dir.path().join("written")).expect("a file");
    file.write_all_at(&[1; ROUNDS * 4096], 0).expect("a write");
    file.sync_all().expect("a sync");
    (dir, file)
}

pub fn measure(report: &mut Report) {
    for fragments in [0, 1_000, 25_000, 100_000] {
        let case = format!("peers, fragments {fragments}");
        let ours = make(&case, &Shape { sealed_fragments: fragments, ..Shape::default() });
        let [mut commit, mut durable, mut both, mut limit] = [(); 4].map(|()| Samples::default());
        let (scratch, written) = written_file();
        let mut clones = Vec::new();
        for (name, kind, mkfs) in
            [("xfs", "xfs", &["-q", "-m", "reflink=1"][..]), ("btrfs", "btrfs", &["-q", "-m", "single"])]
        {
            match Reflink::new(name, kind, mkfs, fragments) {
                Ok(peer) => clones.push(peer),
                Err(e) => report.missing(name, &e),
            }
        }
        let mut qemu = has("qemu-img").then(|| {
            let dir = tempfile::tempdir().expect("a directory");
            let file = File::create(dir.path().join("parent")).expect("a file");
            file.set_len(SIZE).expect("a size");
            write_fragments(&file, fragments);
            (dir, Samples::default())
        });
        for round in 0..ROUNDS {
            ours.store.disk(ours.disk).expect("there").write(0, &[round as u8 + 1; 4096]).expect("a write");
            ours.store.flush().expect("a flush");
            both.time(|| {
                let done = commit.time(|| {
                    let mut tx = ours.store.begin();
                    let _ = tx.fork(Source::Disk(ours.disk), &format!("p{round}"));
                    tx.commit().expect("a fork")
                });
                durable.time(|| done.wait().expect("durable"));
            });
            limit.time(|| {
                written.write_all_at(&[round as u8 + 1; 4096], round as u64 * 4096).expect("a write");
                written.sync_data().expect("a sync");
            });
            clones.iter_mut().for_each(|peer| peer.round(round));
            if let Some((dir, samples)) = &mut qemu {
                let (parent, child) = (dir.path().join("parent"), dir.path().join("child"));
                samples
                    .time(|| run("qemu-img", &[&"create", &"-f", &"qcow2", &"-b", &parent, &"-F", &"raw", &child]))
                    .expect("an overlay");
            }
        }
        let ours = commit.quantile_us(0.5);
        report.row("miosa", &case, "fork median", ours, "us");
        report.row("miosa", &case, "its sync", durable.quantile_us(0.5), "us");
        report.row("miosa", &case, "durable fork median", both.quantile_us(0.5), "us");
        report.row("limit", &case, "one synced write median", limit.quantile_us(0.5), "us");
        drop(scratch);
        for peer in &mut clones {
            let median = peer.samples.quantile_us(0.5);
            report.row(peer.name, &case, "fork median", median, "us");
            report.row(peer.name, &case, "ratio to miosa", median / ours, "x");
            report.row(peer.name, &case, "its sync", peer.durable.quantile_us(0.5), "us");
        }
        match &mut qemu {
            None => report.missing("qemu-img", "qemu-utils is not installed"),
            Some((_, samples)) => {
                let median = samples.quantile_us(0.5);
                report.row("qemu-img", &case, "create -b median", median, "us");
                report.row("qemu-img", &case, "ratio to miosa", median / ours, "x");
            }
        }
    }
}
