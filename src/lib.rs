//! miosa: a self-hosted snapshot daemon for persistent sandboxes.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`cli`] | the command line: arguments to API calls, answers to text or JSON |
//! | [`api`] | the HTTP/JSON API: shapes, server, client |
//! | [`serve`] | the daemon: puts store, front ends, machines, engine and API together |
//! | [`engine`] | the life of sandboxes |
//! | [`disks`] | the store's disks without sandboxes: by name, in and out, attached |
//! | [`doctor`] | what this machine has of what the daemon needs |
//! | [`ext4`] | the files on a disk, read without mounting it |
//! | [`oci`] | container images, written |
//! | [`frontend`] | disks of the store as devices |
//! | [`config`] | where things are |
//! | [`sparse`] | holes and zeroes |
//! | [`units`] | the grammar of durations and sizes |
//!
//! Nothing points up: `cli → api client`; `serve → {api server, front ends, engine}`; `disks → {front ends, storage}`;
//! `engine → {storage, vmm}`. Where no daemon holds the store, `cli` opens it and talks to the API's server within its own
//! process.

pub mod api;
pub mod cli;
pub mod config;
pub mod disks;
pub mod doctor;
pub mod engine;
pub mod ext4;
pub mod frontend;
pub mod oci;
pub mod serve;
pub mod sparse;
pub mod units;
