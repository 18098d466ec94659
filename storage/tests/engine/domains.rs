//! Deduplication domains: what is found by whom, after everything that moves blocks or makes the index again.

use crate::ops::{Run, expand, options};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use storage::catalogue::{Catalogue, MemCatalogue, RocksCatalogue, Table};
use storage::medium::sim::{Event, SimMedium};
use storage::medium::{Medium, Mode};
use storage::{BLOCK_SIZE, DiskId, ErrorKind, Source, Store};

const SIZE: u64 = 16 << 20;
/// Enough blocks that some of them are in the index on disk.
const COUNT: u64 = 2000;
/// Tags of what the shared domain has, of what domain a has, and of what is in their packs beside that.
const TEMPLATE: Range<u16> = 1..2001;
const OWN: Range<u16> = 3000..5000;
const GARBAGE: [Range<u16>; 2] = [6000..6400, 7000..7400];

fn open(dir: &Path) -> Store {
    Store::open(dir, options()).unwrap()
}

fn write(store: &Store, disk: DiskId, tags: Range<u16>) {
    let bytes: Vec<u8> = tags.flat_map(expand).collect();
    store.disk(disk).unwrap().write(0, &bytes).unwrap();
}

/// A new disk in a domain, with blocks of these tags.
fn create(store: &Store, domain: Option<&str>, tags: Range<u16>) -> DiskId {
    static NAMES: AtomicU64 = AtomicU64::new(0);
    let mut tx = store.begin();
    let id = tx.create_disk(&NAMES.fetch_add(1, Ordering::Relaxed).to_string(), SIZE);
    tx.set_domain(id, domain);
    tx.commit_durable().unwrap();
    write(store, id, tags);
    id
}

/// How many of these blocks a domain does not find.
fn not_found(store: &Store, domain: Option<&str>, tags: Range<u16>) -> u64 {
    create(store, domain, tags);
    store.seal().unwrap().new_blocks
}

fn delete(store: &Store, disks: &[DiskId]) {
    let mut tx = store.begin();
    disks.iter().for_each(|disk| tx.delete_disk(*disk));
    tx.commit_durable().unwrap();
}

/// A template in the shared domain and a disk in domain a, and what can be deleted, in one checkpoint.
fn set_up(store: &Store) -> [DiskId; 2] {
    create(store, None, TEMPLATE);
    create(store, Some("a"), OWN);
    let garbage = [create(store, None, GARBAGE[0].clone()), create(store, Some("a"), GARBAGE[1].clone())];
    assert_eq!(store.seal().unwrap().new_blocks, 2 * COUNT + 800);
    garbage
}

/// Who finds what of [`set_up`].
fn check(store: &Store, what: &str) {
    assert_eq!(not_found(store, Some("a"), OWN), 0, "{what}: a finds its own");
    assert_eq!(not_found(store, Some("a"), TEMPLATE), 0, "{what}: a finds what is shared");
    assert_eq!(not_found(store, Some("b"), OWN), COUNT, "{what}: b does not find what a has");
    assert_eq!(not_found(store, Some("b"), TEMPLATE), 0, "{what}: b finds what is shared");
    assert_eq!(not_found(store, Some("b"), OWN), 0, "{what}: b finds its own");
    assert_eq!(not_found(store, None, TEMPLATE), 0, "{what}: the shared domain finds its own");
    assert_eq!(not_found(store, None, OWN), COUNT, "{what}: the shared domain does not find what a and b have");
    assert_eq!(not_found(store, Some("c"), OWN), 0, "{what}: what was stored in the shared domain is found by all");
    assert_eq!(store.check().unwrap().damage, [""; 0], "{what}");
    for disk in store.disks() {
        let mut block = [0; BLOCK_SIZE];
        store.disk(disk.id).unwrap().read(1999 * BLOCK_SIZE as u64, &mut block).unwrap();
        assert!([expand(TEMPLATE.end - 1), expand(OWN.end - 1)].contains(&block), "{what}: {disk:?}");
    }
}

fn packs(dir: &Path) -> Vec<PathBuf> {
    let mut packs: Vec<_> = fs::read_dir(dir.join("packs")).unwrap().map(|e| e.unwrap().path()).collect();
    packs.retain(|p| p.extension().is_some_and(|e| e == "pack"));
    packs.sort();
    packs
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The first pack that is not of the shared domain.
fn pack_of_a(dir: &Path) -> (PathBuf, Vec<u8>) {
    let packs = packs(dir).into_iter().map(|path| (fs::read(&path).unwrap(), path));
    packs.map(|(bytes, path)| (path, bytes)).find(|(_, bytes)| u64_at(bytes, 52) != 0).expect("a pack of domain a")
}

/// Where a pack's digests begin.
fn digests_at(pack: &[u8]) -> usize {
    u64_at(pack, pack.len() - 64 + 20) as usize
}

fn repaired(dir: &Path, store: Store) -> Store {
    drop(store);
    fs::remove_dir_all(dir.join("catalogue")).unwrap();
    assert_eq!(Store::repair(dir).unwrap().damage, [""; 0]);
    open(dir)
}

fn reopened(dir: &Path, store: Store) -> Store {
    drop(store);
    open(dir)
}

fn collected(store: Store, garbage: &[DiskId]) -> Store {
    delete(&store, garbage);
    let report = store.gc(false).unwrap();
    assert!(report.packs_rewritten >= 2, "{report:?}");
    store
}

fn repacked(store: Store) -> Store {
    let report = store.repack().unwrap();
    assert!(report.packs_rewritten >= 2, "{report:?}");
    store
}

#[test]
fn blocks_are_found_in_their_own_domain_and_in_the_shared_one_whatever_came_between() {
    type Between = dyn Fn(&Path, Store, &[DiskId]) -> Store;
    let cases: [(&str, &Between); 8] = [
        ("at once", &|_, store, garbage| {
            delete(&store, garbage);
            store
        }),
        ("opened again", &|dir, store, garbage| {
            delete(&store, garbage);
            reopened(dir, store)
        }),
        ("collected", &|_, store, garbage| collected(store, garbage)),
        ("collected and opened again", &|dir, store, garbage| reopened(dir, collected(store, garbage))),
        ("packed again", &|_, store, garbage| {
            delete(&store, garbage);
            repacked(store)
        }),
        ("packed again, collected and opened again", &|dir, store, garbage| {
            reopened(dir, collected(repacked(store), garbage))
        }),
        ("repaired", &|dir, store, garbage| repaired(dir, collected(store, garbage))),
        ("backed up", &|dir, store, garbage| {
            delete(&store, garbage);
            store.backup(&dir.join("copy")).unwrap();
            open(&dir.join("copy"))
        }),
    ];
    for (what, between) in cases {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let garbage = set_up(&store);
        check(&between(dir.path(), store, &garbage), what);
    }
}

fn index_rows(dir: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let catalogue = RocksCatalogue::open(&dir.join("catalogue"), false).unwrap();
    let mut rows = Vec::new();
    let mut take = |key: &[u8], value: &[u8]| {
        rows.push((key.to_vec(), value.to_vec()));
        Ok(())
    };
    catalogue.scan(Table::Index, &mut take).unwrap();
    rows
}

#[test]
fn a_repair_makes_the_same_index() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    set_up(&store);
    drop(store);
    let before = index_rows(dir.path());
    assert!(before.len() > 20);
    drop(repaired(dir.path(), open(dir.path())));
    assert!(index_rows(dir.path()) == before);
}

#[test]
fn healed_blocks_stay_in_their_domain() {
    for tables in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        delete(&store, &set_up(&store));
        // The copy that is healed from.
        assert_eq!(not_found(&store, Some("b"), OWN), COUNT);
        let (path, mut bytes) = pack_of_a(dir.path());
        let digests = digests_at(&bytes);
        if tables {
            bytes[digests] ^= 1;
        } else {
            (64..digests).step_by(500).for_each(|at| bytes[at] ^= 1);
        }
        fs::write(&path, bytes).unwrap();
        store.drop_caches();
        let report = store.scrub(true).unwrap();
        assert!(if tables { report.damage.is_empty() } else { report.healed >= COUNT }, "{report:?}");
        let store = reopened(dir.path(), store);
        assert_eq!(not_found(&store, Some("a"), OWN), 0);
        assert_eq!(not_found(&store, Some("c"), OWN), COUNT);
        assert_eq!(not_found(&store, None, OWN), COUNT);
    }
}

#[test]
fn what_is_saved_from_a_broken_pack_stays_in_its_domain_or_is_found_by_nobody() {
    for (part, a_finds_it) in [("footer", true), ("header", false)] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        set_up(&store);
        assert_eq!(not_found(&store, None, 9000..9010), 10);
        drop(store);
        let (path, mut bytes) = pack_of_a(dir.path());
        let at = if part == "footer" { bytes.len() - 10 } else { 53 };
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
        let report = Store::repair(dir.path()).unwrap();
        assert!(report.damage.iter().any(|what| what.contains(part)), "{report:?}");
        let store = open(dir.path());
        assert_eq!(not_found(&store, Some("c"), OWN), COUNT, "{part}");
        assert_eq!(not_found(&store, Some("a"), OWN), if a_finds_it { 0 } else { COUNT }, "{part}");
        assert_eq!(not_found(&store, None, OWN), COUNT, "{part}");
    }
}

/// More than are written to at the same time.
#[test]
fn a_checkpoint_of_many_domains_keeps_them_apart() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let names: Vec<String> = (0..40).map(|i| format!("tenant-{i}")).collect();
    // Each begins with a fork point of the shared domain's.
    let base = create(&store, None, 2500..2600);
    let mut tx = store.begin();
    let disks: Vec<_> = names.iter().map(|name| (tx.fork(Source::Disk(base), name), name)).collect();
    disks.iter().for_each(|(disk, name)| tx.set_domain(*disk, Some(name)));
    tx.commit_durable().unwrap();
    disks.iter().for_each(|(disk, _)| write(&store, *disk, 1..51));
    assert_eq!(store.seal().unwrap().new_blocks, 100 + 40 * 50);
    let domains: std::collections::BTreeSet<u64> =
        packs(dir.path()).iter().map(|pack| u64_at(&fs::read(pack).unwrap(), 52)).collect();
    assert_eq!(domains.len(), 41);
    for (disk, name) in &disks {
        assert_eq!(not_found(&store, Some(name), 1..51), 0);
        let mut bytes = vec![0; 100 * BLOCK_SIZE];
        store.disk(*disk).unwrap().read(0, &mut bytes).unwrap();
        assert!(bytes == (1..51).chain(2550..2600).flat_map(expand).collect::<Vec<u8>>());
    }
    assert_eq!(not_found(&store, None, 1..51), 50);
    let store = repaired(dir.path(), store);
    assert_eq!(store.domain(Source::Disk(disks[7].0)).unwrap().as_deref(), Some("tenant-7"));
    assert_eq!(store.check().unwrap().damage, [""; 0]);
}

/// Small packs of different domains cannot be merged, and are not moved for it.
#[test]
fn small_packs_of_many_domains_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for tenant in 0..20 {
        create(&store, Some(&format!("tenant-{tenant}")), 1..51);
    }
    store.seal().unwrap();
    assert_eq!(store.gc(false).unwrap().packs_rewritten, 0);
    for round in 0..20 {
        not_found(&store, Some("tenant-0"), 100 + 50 * round..150 + 50 * round);
    }
    assert!(store.gc(false).unwrap().packs_rewritten >= 16);
}

fn domain(store: &Store, source: Source) -> Option<String> {
    store.domain(source).unwrap()
}

#[test]
fn forks_and_snapshots_are_in_the_domain_of_what_they_come_from() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    let disk = create(&store, Some("a"), TEMPLATE);
    let mut tx = store.begin();
    let snapshot = tx.snapshot(disk, "snapshot");
    let fork = tx.fork(Source::Snapshot(snapshot), "fork");
    let larger = tx.fork_larger(Source::Disk(fork), "larger", 2 * SIZE);
    let other = tx.fork(Source::Disk(disk), "other");
    tx.set_domain(other, Some("b"));
    let shared = tx.fork(Source::Disk(other), "shared");
    tx.set_domain(shared, None);
    let of_other = tx.snapshot(other, "of other");
    tx.commit_durable().unwrap();
    let disks = [disk, fork, larger, other, shared].map(Source::Disk);
    let sources = [&disks[..], &[snapshot, of_other].map(Source::Snapshot)].concat();
    let want = [Some("a"), Some("a"), Some("a"), Some("b"), None, Some("a"), Some("b")];
    let check = |store: &Store, what| {
        let found: Vec<_> = sources.iter().map(|source| domain(store, *source)).collect();
        assert_eq!(found, want.map(|name| name.map(str::to_owned)), "{what}");
    };
    check(&store, "at once");
    store = reopened(dir.path(), store);
    check(&store, "from the log");
    let written = |i: u16| 10_000 + 2000 * i..12_000 + 2000 * i;
    for (i, fork) in [fork, larger, other, shared].into_iter().enumerate() {
        write(&store, fork, written(i as u16));
    }
    assert_eq!(store.seal().unwrap().new_blocks, 5 * COUNT);
    store = reopened(dir.path(), store);
    check(&store, "from the catalogue");
    store = repaired(dir.path(), store);
    check(&store, "from the packs");
    for (i, missed) in [COUNT, COUNT, COUNT, 0].into_iter().enumerate() {
        assert_eq!(not_found(&store, Some("c"), written(i as u16)), missed, "fork {i}");
    }
    for (domain, tags) in [("a", TEMPLATE), ("a", written(0)), ("a", written(1)), ("b", written(2))] {
        assert_eq!(not_found(&store, Some(domain), tags.clone()), 0, "{domain} finds {tags:?}");
    }
}

#[test]
fn a_domain_counts_for_what_is_written_after_it_was_set() {
    for again in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path());
        let disk = create(&store, None, TEMPLATE);
        for (domain, tags) in [(Some("a"), OWN), (None, 6000..8000)] {
            let mut tx = store.begin();
            tx.set_domain(disk, domain);
            drop(tx.commit().unwrap());
            let bytes: Vec<u8> = tags.flat_map(expand).collect();
            store.disk(disk).unwrap().write(0, &bytes).unwrap();
            if domain.is_some() {
                // It holds what was written in the first two; later it holds only what came last.
                let mut tx = store.begin();
                let _ = tx.snapshot(disk, "snapshot");
                drop(tx.commit().unwrap());
            }
        }
        let mut tx = store.begin();
        let keeps = tx.fork(Source::Disk(disk), "keeps what came first");
        drop(tx.commit().unwrap());
        if again {
            store.flush().unwrap();
            store = reopened(dir.path(), store);
        }
        assert_eq!(domain(&store, Source::Disk(keeps)), None);
        assert_eq!(store.seal().unwrap().new_blocks, 3 * COUNT);
        assert_eq!(not_found(&store, Some("b"), TEMPLATE), 0);
        assert_eq!(not_found(&store, Some("b"), 6000..8000), 0);
        assert_eq!(not_found(&store, Some("a"), OWN), 0);
        assert_eq!(not_found(&store, Some("b"), OWN), COUNT);
        assert_eq!(not_found(&store, None, OWN), COUNT);
    }
}

#[test]
fn the_record_goes_with_its_disk_or_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let disk = create(&store, Some("a"), 1..51);
    let mut tx = store.begin();
    let fork = tx.fork(Source::Disk(disk), "fork");
    let snapshots = [tx.snapshot(disk, "one"), tx.snapshot(fork, "two")];
    let none = tx.create_disk("none", SIZE);
    tx.put_record("kind", &disk.to_string(), "value");
    tx.commit_durable().unwrap();
    let keys = |store: &Store| store.records("dedup-domain").into_iter().map(|(key, _)| key).collect::<Vec<_>>();
    assert_eq!(keys(&store).len(), 4);
    store.seal().unwrap();
    let mut tx = store.begin();
    tx.delete_disk(disk);
    tx.delete_disk(none);
    tx.delete_snapshot(snapshots[0]);
    tx.commit_durable().unwrap();
    let left = [fork.to_string(), snapshots[1].to_string()];
    assert_eq!(keys(&store), left);
    let store = reopened(dir.path(), store);
    assert_eq!(keys(&store), left, "from the log");
    store.seal().unwrap();
    let store = reopened(dir.path(), store);
    assert_eq!(keys(&store), left, "from the catalogue");
    let store = repaired(dir.path(), store);
    assert_eq!(keys(&store), left, "from the packs");
    assert_eq!(store.records("kind").len(), 1);
    assert_eq!(store.domain(Source::Disk(disk)).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn names_and_disks_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let disk = create(&store, None, 1..2);
    let refused = |id, name: &str, deleted: bool| {
        let mut tx = store.begin();
        if deleted {
            tx.delete_disk(id);
        }
        tx.set_domain(id, Some(name));
        tx.commit_durable().unwrap_err().kind()
    };
    for name in ["", "a b", "../a", "ä", &"x".repeat(65)] {
        assert_eq!(refused(disk, name, false), ErrorKind::InvalidInput, "{name:?}");
    }
    assert_eq!(refused(DiskId(99), "a", false), ErrorKind::NotFound);
    assert_eq!(refused(disk, "a", true), ErrorKind::NotFound);
    let mut tx = store.begin();
    tx.put_record("dedup-domain", "key", "a");
    assert_eq!(tx.commit_durable().unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(domain(&store, Source::Disk(disk)), None);
    assert_eq!(store.disks().len(), 1);
}

/// Nothing that is written in domains only is ever found outside of them.
#[test]
fn random_histories_leak_nothing() {
    for seed in 400..430 {
        let mut run = Run::start(seed, SimMedium::new()).unwrap();
        run.domains = &[Some("a"), Some("b")];
        for step in 0..100 {
            run.step().unwrap_or_else(|e| panic!("seed {seed} step {step}: {e:?}"));
            if step % 30 == 29 {
                run.reopen().unwrap();
            }
        }
        run.check();
        run.store.seal().unwrap();
        // All tags that a run writes.
        for domain in [Some("c"), None] {
            assert_eq!(not_found(&run.store, domain, 1..320), 319, "seed {seed}, {domain:?}");
        }
    }
}

/// A store on a simulated medium with a disk and two forks of it, all rewritten, in three domains, not sealed yet.
fn three_domains(medium: &SimMedium, names: [&str; 3]) -> (Store, MemCatalogue, [DiskId; 3]) {
    let catalogue = MemCatalogue::new(medium.clone());
    let store = crate::ops::open(medium, &catalogue).unwrap();
    let first = create(&store, Some(names[0]), TEMPLATE);
    let mut tx = store.begin();
    let forks = [names[1], names[2]].map(|name| {
        let fork = tx.fork(Source::Disk(first), name);
        tx.set_domain(fork, Some(name));
        fork
    });
    tx.commit_durable().unwrap();
    forks.iter().for_each(|fork| write(&store, *fork, TEMPLATE));
    (store, catalogue, [first, forks[0], forks[1]])
}

fn pack_files(medium: &SimMedium) -> Vec<Vec<u8>> {
    let files = medium.list("packs").unwrap().into_iter().map(|(name, bytes)| {
        let mut data = vec![0; bytes as usize];
        medium.open(&format!("packs/{name}"), Mode::Read).unwrap().read_at(&mut data, 0).unwrap();
        data
    });
    files.collect()
}

/// A checkpoint that fails between packs of several domains leaves none of them behind.
#[test]
fn a_checkpoint_that_fails_removes_the_packs_of_all_domains() {
    let medium = SimMedium::new();
    let (store, _, _) = three_domains(&medium, ["a", "b", "c"]);
    for failing in 0.. {
        let syncs = AtomicU64::new(0);
        medium.set_faults(Box::new(move |_, event| {
            (event == Event::Sync && syncs.fetch_add(1, Ordering::Relaxed) == failing).then_some(28)
        }));
        if store.seal().is_ok() {
            assert!(failing >= 3, "there are fewer packs than this test is meant for");
            assert_eq!(pack_files(&medium).len(), 3);
            break;
        }
        assert_eq!(pack_files(&medium).len(), 0, "sync {failing} failed");
    }
}

/// Whatever is left of a checkpoint, a manifest in it tells only of packs that are there; whichever domain's is begun first.
#[test]
fn the_manifest_is_durable_after_the_packs_of_all_domains() {
    for names in [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]] {
        let mut manifests = 0;
        for cut in 0.. {
            let medium = SimMedium::new();
            let (store, _, _) = three_domains(&medium, names);
            medium.stop_at(medium.events() + cut);
            if store.seal().is_ok() {
                break;
            }
            for seed in 0..4 {
                let left = pack_files(&medium.after_power_loss(seed << 32 | cut));
                let is_whole = |pack: &&Vec<u8>| pack.len() > 64 && pack[pack.len() - 64..].starts_with(b"MIOSAEND");
                let whole: Vec<_> = left.iter().filter(is_whole).collect();
                let has_manifest = |pack: &[u8]| u64_at(pack, pack.len() - 64 + 36) + 64 < pack.len() as u64;
                if whole.iter().any(|pack| has_manifest(pack)) {
                    assert_eq!(whole.len(), 3, "{names:?}, power cut at event {cut}");
                    manifests += 1;
                }
            }
        }
        assert!(manifests > 0, "no power cut came late enough");
    }
}

#[test]
fn a_collection_takes_the_blocks_of_a_domain_out_of_the_index() {
    let medium = SimMedium::new();
    let (store, catalogue, disks) = three_domains(&medium, ["a", "b", "c"]);
    store.seal().unwrap();
    let rows = || {
        let mut rows = 0;
        let mut count = |_: &[u8], _: &[u8]| {
            rows += 1;
            Ok(())
        };
        catalogue.scan(Table::Index, &mut count).unwrap();
        rows
    };
    assert!(rows() > 20);
    delete(&store, &disks);
    store.gc(false).unwrap();
    assert_eq!(rows(), 0);
}
