//! The HTTP/JSON API on the daemon's Unix socket: its shapes, its server, and the client the command line uses.
//!
//! Glue only: a route decodes and checks bounds, calls the engine (or the disks), and maps the answer.

pub mod archives;
mod body;
pub mod client;
pub mod contents;
pub mod disks;
pub mod server;
mod stream;
pub mod types;

pub(crate) use body::read_to_its_end;
pub(crate) use stream::error_body;
