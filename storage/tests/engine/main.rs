//! Tests of the whole engine through its public face: against a model, and against power cuts at every point.

mod crash;
mod faults;
mod model;
mod ops;
