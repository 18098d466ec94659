//! miosa: a self-hosted snapshot daemon for persistent sandboxes.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`cli`] | the command line: arguments to API calls, answers to text or JSON |
//! | [`api`] | the HTTP/JSON API: shapes, server, client |
//! | [`serve`] | the daemon: puts store, front ends, machines, engine and API together |
//! | [`engine`] | the life of sandboxes |
//! | [`frontend`] | disks of the store as devices |
//! | [`config`] | where things are |
//! | [`units`] | the grammar of durations and sizes |
//!
//! Nothing points up: `cli → api client`; `serve → {api server, front ends, engine}`; `engine → {storage, vmm}`.

pub mod api;
pub mod cli;
pub mod config;
pub mod engine;
pub mod frontend;
pub mod serve;
pub mod units;
