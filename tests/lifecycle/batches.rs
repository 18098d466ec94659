//! Batches: many sandboxes made at once, and started a few at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use miosa::engine::error::Kind;
use miosa::engine::lifecycle::State;
use miosa::engine::{Attach, BatchRequest, BatchStatus, BatchView, CreateRequest, ItemStatus, Origin};
use vmm::fake::Script;

use crate::support::{World, refused, wanted};

fn many(name: &str, count: u32) -> BatchRequest {
    BatchRequest { each: wanted(name), count, concurrency: Some(2) }
}

impl World {
    async fn settled(&self, id: &str) -> BatchView {
        self.until_true(|| self.engine.batch(id).unwrap().record.settled_at.is_some()).await;
        self.engine.batch(id).unwrap()
    }
}

fn statuses(view: &BatchView) -> Vec<ItemStatus> {
    view.items.iter().map(|item| item.status).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn all_are_made_at_once_and_started_a_few_at_a_time() {
    let w = World::new().await;
    // Two at a time: a third that is being started while two are would be seen here.
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counting, highest) = (now.clone(), most.clone());
    w.vmm.on_step(Arc::new(move |step| match step {
        "start" => {
            highest.fetch_max(counting.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
        }
        "greet" => drop(counting.fetch_sub(1, Ordering::SeqCst)),
        _ => {}
    }));
    let syncs = w.store.log_syncs();
    let made = w.engine.create_batch(many("job", 6)).await.unwrap();
    assert!(w.store.log_syncs() > syncs, "it is durable");
    assert_eq!((made.items.len(), made.record.concurrency), (6, 2));
    assert_eq!(w.engine.list(None).len(), 6, "all are there");
    let mut watch = w.engine.watch_batch(&made.record.id).unwrap();
    let (mut last, mut seen) = (None, 0);
    while let Some(view) = watch.next().await {
        assert!(view.counts.completed >= seen, "it only goes on");
        seen = view.counts.completed;
        last = Some(view);
    }
    let last = last.unwrap();
    assert_eq!((last.status, last.counts.completed, seen), (BatchStatus::Completed, 6, 6));
    assert_eq!(last.counts.states.get("running"), Some(&6));
    assert_eq!(most.load(Ordering::SeqCst), 2);
    let names: Vec<_> = last.items.iter().map(|item| item.sandbox.clone().unwrap().name).collect();
    assert_eq!(names, ["job-1", "job-2", "job-3", "job-4", "job-5", "job-6"]);
    // What becomes of them later does not change what became of their start.
    w.engine.stop("job-1").await.unwrap();
    w.engine.destroy("job-2").await.unwrap();
    let view = w.engine.batch(&made.record.id).unwrap();
    assert_eq!((view.status, view.counts.completed), (BatchStatus::Completed, 6));
    assert_eq!(
        (view.counts.states["running"], view.counts.states["paused"], view.counts.states["destroyed"]),
        (4, 1, 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_start_is_told_among_the_others() {
    let w = World::new().await;
    w.vmm.script(Script {
        fail_start: Some(vmm::Error::new(vmm::ErrorKind::StartFailed, "no luck")),
        ..Script::default()
    });
    let made = w.engine.create_batch(many("job", 3)).await.unwrap();
    let view = w.settled(&made.record.id).await;
    assert_eq!((view.status, view.counts.completed, view.counts.failed), (BatchStatus::CompletedWithErrors, 2, 1));
    let failed = view.items.iter().find(|item| item.status == ItemStatus::Failed).unwrap();
    assert!(failed.error.as_ref().unwrap().contains("no luck"), "{failed:?}");
    assert_eq!(failed.sandbox.as_ref().unwrap().state, State::Error);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_started_is_cancelled() {
    let w = World::new().await;
    let open = Arc::new(AtomicBool::new(false));
    let gate = open.clone();
    w.vmm.on_step(Arc::new(move |step| {
        while step == "start" && !gate.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }));
    let made = w.engine.create_batch(BatchRequest { concurrency: Some(1), ..many("job", 4) }).await.unwrap();
    w.until_true(|| w.engine.batch(&made.record.id).unwrap().counts.starting == 1).await;
    let cancelled = w.engine.cancel_batch(&made.record.id).await.unwrap();
    assert_eq!((cancelled.counts.cancelled, cancelled.counts.starting), (3, 1));
    open.store(true, Ordering::SeqCst);
    let view = w.settled(&made.record.id).await;
    assert_eq!((view.status, view.counts.completed, view.counts.cancelled), (BatchStatus::Cancelled, 1, 3));
    assert_eq!(w.engine.list(None).len(), 1, "the one that was being started goes on");
    assert_eq!(w.store.disks().len(), 1);
    // What is over is not cancelled.
    let again = w.engine.cancel_batch(&made.record.id).await.unwrap();
    assert_eq!((again.status, again.counts.completed), (BatchStatus::Cancelled, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_goes_on_after_its_daemon() {
    let w = World::new().await;
    let done = w.engine.create_batch(many("done", 2)).await.unwrap().record.id;
    w.settled(&done).await;
    let closed = Arc::new(AtomicBool::new(true));
    let gate = closed.clone();
    w.vmm.on_step(Arc::new(move |step| {
        while step == "start" && gate.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }));
    let made = w.engine.create_batch(many("job", 3)).await.unwrap().record.id;
    let each = CreateRequest { persistent: false, ..wanted("gone") };
    let gone = w.engine.create_batch(BatchRequest { each, ..many("gone", 2) }).await.unwrap().record.id;
    w.until_true(|| w.engine.batch(&made).unwrap().counts.starting == 2).await;

    let next = w.crash().await;
    closed.store(false, Ordering::SeqCst);
    assert_eq!(next.engine.batch(&done).unwrap().status, BatchStatus::Completed);
    let view = next.settled(&made).await;
    assert_eq!((view.status, statuses(&view)), (BatchStatus::Completed, vec![ItemStatus::Completed; 3]));
    for name in ["job-1", "job-2", "job-3"] {
        assert_eq!(next.state(name), State::Running, "{name}");
    }
    // Those that do not outlive a session do not outlive a daemon either.
    let view = next.settled(&gone).await;
    assert_eq!((view.counts.cancelled, view.status), (2, BatchStatus::Failed));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_takes_all_it_asks_for_or_nothing() {
    let w = World::new().await;
    w.create("job-2").await;
    assert_eq!(refused(w.engine.create_batch(many("job", 3)).await), Kind::NameTaken);
    for count in [0, 1_001] {
        assert_eq!(refused(w.engine.create_batch(many("x", count)).await), Kind::InvalidInput);
    }
    let none_at_a_time = BatchRequest { concurrency: Some(0), ..many("x", 1) };
    assert_eq!(refused(w.engine.create_batch(none_at_a_time).await), Kind::InvalidInput);
    let each = CreateRequest { origin: Origin::Template("none".into()), ..wanted("x") };
    assert_eq!(refused(w.engine.create_batch(BatchRequest { each, ..many("x", 1) }).await), Kind::TemplateNotFound);
    let each = CreateRequest { volumes: vec![Attach { volume: "v".into(), ..Attach::default() }], ..wanted("x") };
    assert_eq!(refused(w.engine.create_batch(BatchRequest { each, ..many("x", 1) }).await), Kind::InvalidInput);
    assert_eq!(refused(w.engine.batch("batch-none").map(drop)), Kind::BatchNotFound);
    assert_eq!(refused(w.engine.cancel_batch("batch-none").await.map(drop)), Kind::BatchNotFound);
    assert_eq!((w.engine.list(None).len(), w.store.disks().len()), (1, 1));
    // Made and not started, it is over at once.
    let each = CreateRequest { start: false, name: None, ..wanted("x") };
    let made = w.engine.create_batch(BatchRequest { each, ..many("x", 2) }).await.unwrap();
    assert_eq!((made.status, made.counts.states["paused"]), (BatchStatus::Completed, 2));
}
