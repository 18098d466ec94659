//! The power goes at every event; what a reboot finds is what some prefix of the operations made, and that prefix has
//! everything that was acknowledged as durable.
//!
//! `MIOSA_CRASH_SEEDS` runs are made (30), from seed `MIOSA_CRASH_FIRST_SEED` (0) on. A failure names its seed.

use crate::ops::{Run, contents, from_env, open};
use storage::medium::sim::SimMedium;

const STEPS: usize = 40;

/// Runs a seed until the power goes; `None` when it does not go.
fn run_until_stop(seed: u64, stop_at: Option<u64>) -> (Option<Run>, SimMedium) {
    let medium = SimMedium::new();
    if let Some(n) = stop_at {
        medium.stop_at(n);
    }
    let Ok(mut run) = Run::start(seed, medium.clone()) else { return (None, medium) };
    for _ in 0..STEPS {
        if let Err(e) = run.step() {
            assert!(medium.stopped(), "seed {seed}: {e:?}");
            break;
        }
    }
    (Some(run), medium)
}

fn check_point(seed: u64, stop_at: u64) {
    let (run, medium) = run_until_stop(seed, Some(stop_at));
    // A power cut while the store is being made leaves something that can be made again.
    let Some(run) = run else { return };
    let what = format!("seed {seed}, power cut at event {stop_at}");
    for outcome in 0..2 {
        let medium = medium.after_power_loss(seed ^ stop_at << 8 ^ outcome << 40);
        let catalogue = run.catalogue.after_power_loss(medium.clone());
        let store = open(&medium, &catalogue).unwrap_or_else(|e| panic!("{what}: does not open: {e:?}"));
        let found = contents(&store).unwrap_or_else(|e| panic!("{what}: does not read: {e:?}"));
        let allowed = &run.history[run.durable..];
        assert!(allowed.contains(&found), "{what}: what is found is no state since the last durable one");
        // And it goes on working.
        store.seal().unwrap_or_else(|e| panic!("{what}: does not seal: {e:?}"));
        let report = store.check().unwrap_or_else(|e| panic!("{what}: cannot be checked: {e:?}"));
        assert_eq!(report.damage, [""; 0], "{what}");
        assert_eq!(contents(&store).expect("reads"), found, "{what}: after sealing");
        let mut tx = store.begin();
        let _ = tx.create_disk("after", 1 << 20);
        tx.commit_durable().unwrap_or_else(|e| panic!("{what}: takes no transaction: {e:?}"));
        drop(store);
        let again = open(&medium, &catalogue).unwrap_or_else(|e| panic!("{what}: does not open again: {e:?}"));
        assert_eq!(again.disks().len(), found.keys().filter(|k| k.0 == 0).count() + 1, "{what}");
    }
}

#[test]
fn power_cuts_at_every_event_leave_a_prefix_with_everything_durable() {
    let mut points = 0;
    let first = from_env("MIOSA_CRASH_FIRST_SEED", 0);
    let seeds = from_env("MIOSA_CRASH_SEEDS", 30);
    for seed in first..first + seeds {
        let (run, medium) = run_until_stop(seed, None);
        run.expect("no power cut").check();
        for stop_at in 0..medium.events() {
            check_point(seed, stop_at);
            points += 1;
        }
    }
    println!("{points} power cuts, each with two outcomes of what was not synced");
    assert!(points > 15 * seeds, "the runs have fewer events than this test is meant for");
}
