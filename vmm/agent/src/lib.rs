//! miosa's guest agent: the protocol both ends share, and the guest's end of it.
//!
//! [`wire`] is pure and used by host and guest. [`server`] serves the protocol over any pair of byte pipes and asks a
//! [`server::System`] for what differs between a real guest (PID 1 of a VM) and the fake one that tests run in process.

pub mod server;
pub mod wire;
