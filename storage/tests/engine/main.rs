//! Tests of the whole engine through its public face: against a model, and against power cuts at every point.

#![allow(clippy::unwrap_used)]

mod crash;
mod faults;
mod model;
mod ops;
