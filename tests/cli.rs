//! The command line as users meet it: the real program against a real daemon process, whose machines are stand-ins.
//! What is looked at is stdout, stderr and the exit code.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

#[path = "cli/desk.rs"]
mod desk;
#[path = "cli/errors.rs"]
mod errors;
#[path = "cli/listen.rs"]
mod listen;
#[path = "cli/ports.rs"]
mod ports;
#[path = "cli/previews.rs"]
mod previews;
#[path = "cli/story.rs"]
mod story;
#[path = "cli/support.rs"]
mod support;
#[path = "cli/terminal.rs"]
mod terminal;
#[path = "cli/usage.rs"]
mod usage;
