//! `miosa disk` and `miosa store`: the real program, with a daemon and without one.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

#[path = "disk/alone.rs"]
mod alone;
#[path = "disk/archives.rs"]
mod archives;
#[path = "disk/contents.rs"]
mod contents;
#[path = "disk/images.rs"]
mod images;
#[path = "disk/publish.rs"]
mod publish;
#[path = "disk/shared.rs"]
mod shared;
#[path = "cli/support.rs"]
#[allow(dead_code, reason = "the command line's tests use more of it")]
mod support;
#[path = "disk/words.rs"]
mod words;
