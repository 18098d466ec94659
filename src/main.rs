//! miosa: a self-hosted snapshot daemon for persistent sandboxes.
fn main() {}
