//! What goes on in the background while a suite runs: snapshots, forks, deletes, sealing, collection, scrubs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

use crate::lab::{Chance, Daemon, Refused};

/// At most so many snapshots and forks at a time.
const KEPT: usize = 6;

/// A thread that leaves a daemon no rest.
pub struct Churn {
    over: Arc<AtomicBool>,
    steps: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<(), String>>>,
}

impl Churn {
    /// Of the disk `name`. With `dies` it is no error when nobody answers.
    pub fn start(daemon: &Daemon, name: &str, seed: u64, dies: bool) -> Churn {
        let (over, steps) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (is_over, count, name) = (over.clone(), steps.clone(), name.to_owned());
        let call = daemon.caller();
        let thread = std::thread::spawn(move || {
            let mut chance = Chance::new(seed ^ 0x63_6875_726e);
            let mut kept: Vec<String> = Vec::new();
            let mut serial = 0;
            while !is_over.load(Ordering::SeqCst) {
                serial += 1;
                let made = format!("{name}-c{serial}");
                let done = match chance.below(10) {
                    0..=2 => {
                        let answer = call("POST", &format!("/disks/{name}/snapshots"), json!({ "name": made }));
                        kept.extend(answer.is_ok().then_some(made));
                        answer
                    }
                    3 | 4 => {
                        let of = match kept.is_empty() {
                            true => &name,
                            false => &kept[chance.below(kept.len() as u64) as usize],
                        };
                        let answer = call("POST", &format!("/disks/{of}/fork"), json!({ "name": made }));
                        kept.extend(answer.is_ok().then_some(made));
                        answer
                    }
                    5 => call("POST", "/store/seal", Value::Null),
                    6 => call("POST", "/store/gc", Value::Null),
                    7 => undamaged(call("POST", "/store/scrub?heal=true", Value::Null)),
                    8 => call("POST", "/store/repack", Value::Null),
                    _ => call("GET", "/store/usage", Value::Null),
                };
                let done = done.and_then(|_| match kept.len() > KEPT {
                    true => call("DELETE", &format!("/disks/{}", kept.remove(0)), Value::Null),
                    false => Ok(Value::Null),
                });
                match done {
                    Ok(_) => drop(count.fetch_add(1, Ordering::SeqCst)),
                    // Cut off, or done before it was: what was left behind is taken for granted.
                    Err(e) if dies && (e.status == 0 || e.code == "disk_not_found") => {}
                    Err(e) => return Err(format!("step {serial} in the background: {e:?}")),
                }
                std::thread::sleep(Duration::from_millis(chance.below(30)));
            }
            Ok(())
        });
        Churn { over, steps, thread: Some(thread) }
    }

    /// Ends it; how many things it did.
    pub fn end(mut self) -> u64 {
        self.over.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap().unwrap_or_else(|e| panic!("{e}"));
        self.steps.load(Ordering::SeqCst)
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn undamaged(answer: Result<Value, Refused>) -> Result<Value, Refused> {
    let report = answer?;
    match report["damage"].as_array().is_some_and(Vec::is_empty) {
        true => Ok(report),
        false => Err(Refused { status: 200, code: "damage".into(), message: report.to_string() }),
    }
}
