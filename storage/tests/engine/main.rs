//! Tests of the whole engine through its public face: against a model, and against power cuts at every point.

#![allow(clippy::unwrap_used)]

mod archive;
mod backup;
mod concurrency;
mod crash;
mod damage;
mod domains;
mod faults;
mod full;
mod gc;
mod golden;
mod kill;
mod model;
mod ops;
mod repack;
mod sequential;
