//! Supervisor for machines.
