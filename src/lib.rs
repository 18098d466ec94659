//! The daemon and the command line of miosa.
pub mod frontend;
