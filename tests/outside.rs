//! Nothing lost: the real daemon, judged by programs that others wrote, and through faults of everything below it.
//!
//! Two forms: the short one runs with all tests; `MIOSA_OUTSIDE=long` runs longer and adds what takes long. Where chance
//! decides, `MIOSA_OUTSIDE_SEED` does; a failure names its seed. What was reached is printed (`--nocapture`) and published
//! in `docs/reliability.md`.
//!
//! Needs root, /dev/fuse, loop devices and the programs of `.ci/install`; the long form more, see there. A program that
//! is missing fails the test that needs it.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

#[path = "outside/canary.rs"]
mod canary;
#[path = "outside/churn.rs"]
mod churn;
#[path = "outside/damage.rs"]
mod damage;
#[path = "outside/death.rs"]
mod death;
#[path = "frontend/driver.rs"]
mod driver;
#[path = "outside/faults.rs"]
mod faults;
#[path = "outside/lab.rs"]
mod lab;
#[path = "outside/ledger.rs"]
mod ledger;
#[path = "outside/limits.rs"]
mod limits;
#[path = "outside/power.rs"]
mod power;
#[path = "frontend/programs.rs"]
mod programs;
#[path = "outside/ring.rs"]
mod ring;
#[path = "outside/suites.rs"]
mod suites;
