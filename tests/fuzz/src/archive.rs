//! An archive that somebody sends (`disk import`, `snapshot import`): read to its end into disks, or refused. The input is what its
//! records say; lengths and checksums are put right here, since no fuzzer finds them, unless the first byte says to leave them.

#![no_main]

mod store;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use storage::{ARCHIVE_MAGIC, ArchiveReader, Store};

/// Most bytes of disks that an input is given.
const ROOM: u64 = 64 << 20;

/// An archive of ours, for its header.
static GOLDEN: &[u8] = include_bytes!("../../../storage/tests/golden/archive-v1.bin");

static STORE: LazyLock<Store> = LazyLock::new(store::empty);

fuzz_target!(|data: &[u8]| {
    let Some((&how, bytes)) = data.split_first() else { return };
    let archive = if how == b'r' { bytes.to_vec() } else { put_right(bytes) };
    let Ok(reader) = ArchiveReader::open(archive.as_slice()) else { return };
    let sizes: Vec<u64> = reader.states().iter().map(|state| state.size_bytes).collect();
    if sizes.iter().try_fold(0u64, |sum, size| sum.checked_add(*size)).is_none_or(|sum| sum > ROOM) {
        return;
    }
    let mut tx = STORE.begin();
    let ids: Vec<_> = (0..sizes.len()).map(|i| tx.create_disk(&format!("d-{i}"), sizes[i])).collect();
    tx.commit().unwrap().wait().unwrap();
    let disks: Vec<_> = ids.iter().map(|id| STORE.disk(*id).unwrap()).collect();
    let _ = reader.fill(&disks);
    let mut block = [0; 4096];
    for disk in &disks {
        disk.read(0, &mut block).unwrap();
    }
    drop(disks);
    let mut tx = STORE.begin();
    ids.iter().for_each(|id| tx.delete_disk(*id));
    tx.commit().unwrap().wait().unwrap();
    STORE.seal().unwrap();
    STORE.gc(false).unwrap();
});

/// A header of ours, and then records: kind and length as the input has them, cut off at its end, with their checksums.
fn put_right(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = GOLDEN[..64].to_vec();
    assert_eq!(&out[..8], ARCHIVE_MAGIC);
    while let Some((head, rest)) = bytes.split_first_chunk::<3>() {
        let kind = [*b"HEAD", *b"RUNS", *b"FRAM", *b"END "][usize::from(head[0]) % 4];
        let len = usize::from(u16::from_le_bytes([head[1], head[2]])).min(rest.len());
        let (mut body, after) = (rest[..len].to_vec(), &rest[len..]);
        match &kind {
            b"FRAM" => put_right_digests(&mut body),
            b"END " if body.len() >= 32 => body[..32].copy_from_slice(blake3::hash(&out).as_bytes()),
            _ => {}
        }
        let mut head = [0; 16];
        head[..4].copy_from_slice(&kind);
        head[4..8].copy_from_slice(&(body.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..8]), &body);
        head[8..12].copy_from_slice(&crc.to_le_bytes());
        out.extend(head);
        out.extend(body);
        bytes = after;
    }
    out
}

/// Of blocks that are not compressed; of the others what decoding finds is compared with what the input says.
fn put_right_digests(body: &mut [u8]) {
    const HEAD: usize = 16;
    let Some(count) = body.get(8..12).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize) else { return };
    let Some(blocks_at) = count.checked_mul(32).and_then(|digests| digests.checked_add(HEAD)) else { return };
    if body.len() != blocks_at.saturating_add(count.saturating_mul(4096)) {
        return;
    }
    let (digests, blocks) = body[HEAD..].split_at_mut(blocks_at - HEAD);
    for (digest, block) in digests.chunks_mut(32).zip(blocks.chunks(4096)) {
        digest.copy_from_slice(blake3::hash(block).as_bytes());
    }
}
