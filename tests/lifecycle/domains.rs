//! Deduplication domains of sandboxes and volumes: nobody outside of one finds what is written in it.

use miosa::engine::error::Kind;
use miosa::engine::{CreateRequest, CreateVolume, Keep, Origin};
use storage::{DiskId, Source};

use crate::support::{World, forks, named, refused, wanted};

const MIB: u64 = 1 << 20;
/// Blocks of a content.
const BLOCKS: u64 = 64;

impl World {
    /// How many blocks of a content are stored anew when it is written to a disk.
    fn new_blocks(&self, disk: DiskId, content: u64) -> u64 {
        let mut chance = content;
        let block = std::iter::repeat_with(|| {
            chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            chance.to_le_bytes()
        });
        let bytes: Vec<u8> = block.take(BLOCKS as usize * 512).flatten().collect();
        self.disk(disk).write(MIB, &bytes).unwrap();
        self.store.seal().unwrap().new_blocks
    }

    async fn in_domain(&self, name: &str, domain: Option<&str>) -> DiskId {
        let dedup_domain = domain.map(str::to_owned);
        let request = CreateRequest { dedup_domain, start: false, ..wanted(name) };
        self.engine.create(request).await.unwrap().record.disk
    }

    fn domain_of(&self, name: &str) -> (Option<String>, Option<String>) {
        let record = self.engine.show(name).unwrap().record;
        (record.dedup_domain, self.store.domain(Source::Disk(record.disk)).unwrap())
    }
}

fn both(domain: &str) -> (Option<String>, Option<String>) {
    (Some(domain.to_owned()), Some(domain.to_owned()))
}

#[tokio::test]
async fn what_a_domain_has_is_found_in_it_only() {
    let w = World::new().await;
    let (a, b) = (w.in_domain("a", Some("blue")).await, w.in_domain("b", Some("blue")).await);
    let (c, d) = (w.in_domain("c", Some("red")).await, w.in_domain("d", None).await);
    w.store.seal().unwrap();
    assert_eq!(w.new_blocks(a, 1), BLOCKS);
    assert_eq!(w.new_blocks(b, 1), 0, "of the same domain");
    assert_eq!(w.new_blocks(c, 1), BLOCKS, "of another");
    assert_eq!(w.new_blocks(d, 1), BLOCKS, "of none");
    // What all share is found by all.
    assert_eq!(w.new_blocks(d, 2), BLOCKS);
    assert_eq!((w.new_blocks(a, 2), w.new_blocks(c, 2)), (0, 0));
}

#[tokio::test]
async fn what_comes_of_a_sandbox_is_in_its_domain() {
    let w = World::new().await;
    w.in_domain("one", Some("blue")).await;
    w.engine.snapshot("one", named("first")).await.unwrap();
    w.engine.fork("one", forks("child", 1)).await.unwrap();
    let of_snapshot =
        |name: &str| CreateRequest { origin: Origin::Snapshot("first".to_owned()), start: false, ..wanted(name) };
    w.engine.create(of_snapshot("copy")).await.unwrap();
    w.engine.create(CreateRequest { dedup_domain: Some("red".into()), ..of_snapshot("other") }).await.unwrap();
    w.engine.restore("one", "first").await.unwrap();
    let w = w.crash().await;
    for name in ["one", "child", "copy"] {
        assert_eq!(w.domain_of(name), both("blue"), "{name}");
    }
    assert_eq!(w.domain_of("other"), both("red"));
    w.in_domain("none", None).await;
    assert_eq!(w.domain_of("none"), (None, None));
}

#[tokio::test]
async fn kept_memory_is_in_it_too() {
    let w = World::new().await;
    let request = CreateRequest { dedup_domain: Some("blue".into()), wait: true, ..wanted("one") };
    w.engine.create(request).await.unwrap();
    w.engine.pause("one", Keep::Memory).await.unwrap();
    let memory = w.engine.show("one").unwrap().record.memory.unwrap();
    assert_eq!(w.store.domain(Source::Disk(memory.disk)).unwrap().as_deref(), Some("blue"));
    w.engine.resume("one").await.unwrap();
    assert_eq!(w.domain_of("one"), both("blue"));
}

#[tokio::test]
async fn volumes_have_one_as_well() {
    let w = World::new().await;
    let data = CreateVolume {
        name: "data".into(),
        size_bytes: Some(16 * MIB),
        dedup_domain: Some("blue".into()),
        ..CreateVolume::default()
    };
    let data = w.engine.create_volume(data).await.unwrap();
    w.engine.snapshot_volume("data", Some("first".into())).await.unwrap();
    let copy = CreateVolume { name: "copy".into(), snapshot: Some("first".into()), ..CreateVolume::default() };
    let copy = w.engine.create_volume(copy).await.unwrap();
    let restored = w.engine.restore_volume("data", "first").await.unwrap();
    assert_ne!(restored.disk, data.disk);
    for volume in [&copy, &restored] {
        assert_eq!(volume.dedup_domain.as_deref(), Some("blue"), "{}", volume.name);
        assert_eq!(w.store.domain(Source::Disk(volume.disk)).unwrap().as_deref(), Some("blue"), "{}", volume.name);
    }
}

#[tokio::test]
async fn a_domain_that_is_none_is_refused_and_nothing_is_made() {
    let w = World::new().await;
    let long = "x".repeat(65);
    for domain in ["", "a b", "../x", &long] {
        let request = CreateRequest { dedup_domain: Some(domain.to_owned()), ..wanted("one") };
        assert_eq!(refused(w.engine.create(request).await), Kind::InvalidInput, "{domain:?}");
        assert!(w.engine.list(None).is_empty() && w.store.disks().is_empty());
    }
}
