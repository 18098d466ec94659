//! Deduplication domains: among whose blocks a disk's new blocks are looked for.
//!
//! Disks of one domain share what they write with each other and find what the shared domain has; nobody finds what they
//! have. The domain of a disk or snapshot is a record; without one it is in the shared domain.

use crate::block::{DiskId, SnapshotId, Source};
use crate::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

/// Kind of the records that say which domain a disk or snapshot is in. The key is its id, the value the domain's name.
pub(crate) const KIND: &str = "dedup-domain";
/// Bytes of the longest name.
const NAME_MAX: usize = 64;

/// A domain's number, which packs have in place of its name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Domain(pub u64);

impl Domain {
    /// What is in it is found by everybody.
    pub const SHARED: Self = Self(0);
    /// That of blocks of which it is no longer known: what is in it is found by nobody.
    pub const UNKNOWN: Self = Self(u64::MAX);

    /// The domain that a record names, or the one without a record.
    pub fn of(name: Option<&[u8]>) -> Self {
        name.map_or(Self::SHARED, |name| {
            let [a, b, c, d, e, f, g, h, ..] = *blake3::hash(name).as_bytes();
            Self(u64::from_le_bytes([a, b, c, d, e, f, g, h]).clamp(1, u64::MAX - 1))
        })
    }
}

/// Kind and key of the record that says which domain a disk or snapshot is in.
pub(crate) fn record(source: Source) -> (String, String) {
    (KIND.to_owned(), source.to_string())
}

/// Whose domain a record of this kind and key tells, if it tells one's.
pub(crate) fn source(kind: &str, key: &str) -> Option<Source> {
    let disk = key.parse::<DiskId>().map(Source::Disk);
    let source = disk.or_else(|_| key.parse::<SnapshotId>().map(Source::Snapshot)).ok()?;
    (kind == KIND && source.to_string() == key).then_some(source)
}

/// Whether this can be the name of a deduplication domain. `InvalidInput` says why it cannot.
pub fn check_domain(name: &str) -> Result<()> {
    check_name(name.as_bytes())
}

pub(crate) fn check_name(name: &[u8]) -> Result<()> {
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    if name.is_empty() || name.len() > NAME_MAX || !name.iter().all(fits) {
        let name = String::from_utf8_lossy(name);
        let what = format!("{name:?} cannot be a domain: use 1 to {NAME_MAX} letters, digits, '-', '_' and '.'");
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_numbers_that_stay() {
        assert_eq!(Domain::of(None), Domain::SHARED);
        // What packs have: it must not change.
        assert_eq!(Domain::of(Some(b"tenant-1")), Domain(17_903_848_531_778_640_529));
        assert_ne!(Domain::of(Some(b"tenant-1")), Domain::of(Some(b"tenant-2")));
    }

    #[test]
    fn only_keys_as_they_are_written_tell_a_source() {
        let disk = Source::Disk(DiskId(5));
        let (kind, key) = record(disk);
        assert_eq!(source(&kind, &key), Some(disk));
        assert_eq!(source(KIND, "snap-7"), Some(Source::Snapshot(SnapshotId(7))));
        for key in ["", "disk-", "disk-05", "disk-+5", "5", "snap-7 "] {
            assert_eq!(source(KIND, key), None, "{key}");
        }
        assert_eq!(source("sandbox", "disk-5"), None);
    }

    #[test]
    fn names_are_short_and_plain() {
        for good in ["a", "Tenant_1.eu-west", &"x".repeat(NAME_MAX)] {
            check_name(good.as_bytes()).unwrap();
        }
        for bad in ["", "a b", "a/b", "ä", "a\0", &"x".repeat(NAME_MAX + 1)] {
            assert_eq!(check_name(bad.as_bytes()).unwrap_err().kind(), ErrorKind::InvalidInput, "{bad}");
        }
    }
}
