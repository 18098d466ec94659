//! The numbers the engine counts in, one type each.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Bytes of a block: the unit of identity, of deduplication and of the map.
pub const BLOCK_SIZE: usize = 4096;
/// The same for offset arithmetic.
pub const BLOCK_BYTES: u64 = BLOCK_SIZE as u64;
/// Blocks of a group: neighbouring block ids that share one frame when first written.
pub const GROUP_BLOCKS: u64 = 16;

macro_rules! named_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "-{}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(s: &str) -> Result<Self, String> {
                s.strip_prefix(concat!($prefix, "-"))
                    .and_then(|n| n.parse().ok())
                    .map(Self)
                    .ok_or_else(|| format!("{s:?} is not an id of the form {}-<number>", $prefix))
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                if s.is_human_readable() { s.collect_str(self) } else { s.serialize_u64(self.0) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                if d.is_human_readable() {
                    String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
                } else {
                    u64::deserialize(d).map(Self)
                }
            }
        }
    };
}

named_id!(
    /// A disk. Shown, parsed and serialised as `disk-<n>`; never reused within a store.
    DiskId,
    "disk"
);
named_id!(
    /// A snapshot. Shown, parsed and serialised as `snap-<n>`; never reused within a store.
    SnapshotId,
    "snap"
);

/// What a fork starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Source {
    /// The current state of a disk.
    Disk(DiskId),
    /// A snapshot.
    Snapshot(SnapshotId),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(id) => id.fmt(f),
            Self::Snapshot(id) => id.fmt(f),
        }
    }
}

/// The address of a stored block: `group * 16 + slot`. It never changes while the block lives; where the group's bytes
/// are is the group table's business, so that blocks can be moved without touching a map. 0 is no block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct BlockId(pub u64);

impl BlockId {
    /// Reads as zeroes; stored nowhere.
    pub const NONE: Self = Self(0);

    pub(crate) fn new(group: GroupId, slot: u64) -> Self {
        Self(group.0 * GROUP_BLOCKS + slot)
    }

    pub(crate) fn is_none(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn group(self) -> GroupId {
        GroupId(self.0 / GROUP_BLOCKS)
    }

    pub(crate) fn slot(self) -> u32 {
        (self.0 % GROUP_BLOCKS) as u32
    }

    pub(crate) fn plus(self, blocks: u64) -> Self {
        Self(self.0 + blocks)
    }
}

/// Sixteen consecutive block ids. Group 0 is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct GroupId(pub u64);

/// A pack file's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PackId(pub u64);

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pack {:016x}", self.0)
    }
}

/// A byte's place in the log since the store was made; the log's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct LogPos(pub u64);

impl LogPos {
    pub(crate) fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

/// Is every byte zero?
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Or-ing whole words lets the compiler use vector registers; the early exit is once a cache line or so.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |acc, b| acc | b) == 0) && rest.iter().all(|b| *b == 0)
}
