//! A store in a directory that goes away, and outside programs.

use std::process::{Command, Output};
use storage::{Disk, DiskId, Options, Store};

pub use crate::programs::run;

pub const MIB: u64 = 1 << 20;

/// A store of its own for one test.
pub struct TestStore {
    pub store: Store,
    pub dir: tempfile::TempDir,
}

impl TestStore {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(&dir.path().join("store"), Options::default()).expect("a new store");
        Self { store, dir }
    }

    pub fn disk(&self, name: &str, size_bytes: u64) -> Disk {
        self.store.disk(self.create(name, size_bytes)).expect("the disk just made")
    }

    pub fn create(&self, name: &str, size_bytes: u64) -> DiskId {
        let mut transaction = self.store.begin();
        let id = transaction.create_disk(name, size_bytes);
        transaction.commit_durable().expect("a new disk");
        id
    }

    /// The disk as it is now, read-only.
    pub fn snapshot(&self, disk: DiskId, name: &str) -> Disk {
        let mut transaction = self.store.begin();
        let id = transaction.snapshot(disk, name);
        transaction.commit_durable().expect("a snapshot");
        self.store.snapshot(id).expect("the snapshot just made")
    }
}

/// Runs a program to its end. Fails only if it cannot be started.
pub fn attempt(program: &str, arguments: &[&str]) -> Output {
    match Command::new(program).args(arguments).output() {
        Ok(output) => output,
        Err(error) => panic!("this test needs {program}: {error}"),
    }
}

/// Bytes that differ from sector to sector and from seed to seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A boot sector that writes itself to sector 4 through the BIOS and ends the machine with [`BOOTED`].
pub fn boot_sector() -> Vec<u8> {
    let mut sector = vec![
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xc0, // mov es, ax
        0xbb, 0x00, 0x7c, // mov bx, 0x7c00
        0xb8, 0x01, 0x03, // mov ax, 0x0301: write one sector
        0xb9, 0x05, 0x00, // mov cx, 5: the fifth
        0x30, 0xf6, // xor dh, dh
        0xcd, 0x13, // int 0x13
        0x18, 0xc0, // sbb al, al: -1 if it failed
        0x04, 0x2a, // add al, 0x2a
        0xba, 0xf4, 0x00, // mov dx, 0xf4
        0xee, // out dx, al
        0xf4, // hlt
    ];
    sector.resize(512, 0);
    sector[510] = 0x55;
    sector[511] = 0xaa;
    sector
}

/// Exit code of a machine that booted [`boot_sector`] and could write.
pub const BOOTED: i32 = (0x2a << 1) | 1;

/// A boot sector that writes itself to sector 4, with a counter in it, and reads sector 5, over and over until that begins
/// with something else than zero. Ends with [`BOOTED`].
pub fn busy_boot_sector() -> Vec<u8> {
    let mut sector = vec![
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xc0, // mov es, ax
        0x8e, 0xd8, // mov ds, ax
        0xff, 0x06, 0xfc, 0x7d, // again: inc word [0x7dfc]: the counter
        0xbb, 0x00, 0x7c, // mov bx, 0x7c00
        0xb8, 0x01, 0x03, // mov ax, 0x0301: write one sector
        0xb9, 0x05, 0x00, // mov cx, 5: the fifth
        0x30, 0xf6, // xor dh, dh
        0xcd, 0x13, // int 0x13
        0x72, 0x1a, // jc failed
        0xbb, 0x00, 0x7e, // mov bx, 0x7e00
        0xb8, 0x01, 0x02, // mov ax, 0x0201: read one sector
        0xb9, 0x06, 0x00, // mov cx, 6: the sixth
        0x30, 0xf6, // xor dh, dh
        0xcd, 0x13, // int 0x13
        0x72, 0x0b, // jc failed
        0x80, 0x3e, 0x00, 0x7e, 0x00, // cmp byte [0x7e00], 0
        0x74, 0xd7, // je again
        0xb0, 0x2a, // mov al, 0x2a
        0xeb, 0x02, // jmp out
        0xb0, 0x29, // failed: mov al, 0x29
        0xba, 0xf4, 0x00, // out: mov dx, 0xf4
        0xee, // out dx, al
        0xf4, // hlt
    ];
    sector.resize(512, 0);
    sector[510] = 0x55;
    sector[511] = 0xaa;
    sector
}

/// Where [`busy_boot_sector`] counts.
pub const COUNTER: std::ops::Range<usize> = 508..510;

/// A command that boots a machine with the given disk arguments. It is ended after two minutes.
pub fn machine(disk: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["120", "qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]).args(disk);
    command
}

/// Boots a machine and waits for its end.
pub fn boot(disk: &[&str]) -> Output {
    match machine(disk).output() {
        Ok(output) => output,
        Err(error) => panic!("this test needs timeout and qemu-system-x86_64: {error}"),
    }
}
