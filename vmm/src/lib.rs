//! Supervisor for machines: it starts, watches and ends virtual machines, and talks to the agent inside.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`machine`] | the traits [`Vmm`] and [`Machine`], and what a machine is made of |
//! | [`agent`] | the async client of the guest agent: programs, files, freeze, clock |
//! | [`qemu`] | machines as QEMU processes, over [`qmp`] |
//! | [`memory`] | a guest's memory, where the host can read it |
//! | [`process`] | processes that are found again and never left behind |
//! | [`jail`] | what they are locked up in: a user, Landlock, limits |
//! | `cgroup` | what limits them as a whole |
//! | `console` | what they write, kept short |
//! | [`fake`] | a scripted stand-in for tests: real agent protocol, no virtual machine |
//! | [`image`] | what guests boot: kernel, initramfs, base root file system |
//!
//! The crate knows nothing of storage, sandboxes or snapshots: a disk is a path. Everything has a deadline, and a guest
//! is never trusted: its frames, its answers and its console are bounded in size and time.

pub mod agent;
mod cgroup;
mod console;
pub mod error;
pub mod fake;
pub mod image;
pub mod jail;
pub mod machine;
pub mod memory;
pub mod process;
pub mod qemu;
pub mod qmp;

pub use agent::Agent;
pub use console::ConsoleReader;
pub use error::{Error, ErrorKind, Result};
pub use fake::FakeVmm;
pub use machine::{
    Accel, Acceleration, BootPath, BootTiming, DiskAttachment, ExitReason, Loaded, Machine, MachineSpec, MachineState,
    Network, Reaped, Vmm, VolumeDevice, WarmKey,
};
pub use memory::GuestMemory;
pub use miosa_agent::wire::{
    CommandStatus, DirEntry, ErrorKind as GuestErrorKind, ExecRequest, ExitStatus, FileKind, FileStat, GuestInfo,
    Identity, Mount, Root, TerminalSize, TreeSummary,
};
pub use qemu::QemuVmm;
