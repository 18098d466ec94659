//! The file `CHECKPOINT`: which checkpoint the catalogue has had. The log tells the same as long as there is any.

use crate::error::{Error, Result};
use crate::format::{CheckpointNote, StoreUuid};
use crate::medium::{Medium, Mode};

const CHECKPOINT: &str = "CHECKPOINT";

/// Notes, durably, that the catalogue has this checkpoint; with the first one the file's name is made durable, too.
pub(crate) fn write(medium: &dyn Medium, uuid: StoreUuid, next_pack: u64) -> Result<()> {
    let cannot = |e| Error::io("cannot write the file CHECKPOINT", e);
    let note = CheckpointNote { store: uuid, next_pack }.encode();
    let (file, is_new) = match medium.open(CHECKPOINT, Mode::Modify) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            (medium.open(CHECKPOINT, Mode::Create).map_err(cannot)?, true)
        }
        opened => (opened.map_err(cannot)?, false),
    };
    file.write_at(&note, 0).map_err(cannot)?;
    file.sync().map_err(cannot)?;
    if is_new { medium.sync_dir("").map_err(cannot) } else { Ok(()) }
}

/// The last note, if there is one. One that cannot be understood says nothing: it is written anew at the next checkpoint.
pub(crate) fn read(medium: &dyn Medium, uuid: StoreUuid) -> Result<Option<u64>> {
    let mut bytes = [0; 64];
    match medium.open(CHECKPOINT, Mode::Read).and_then(|file| file.read_at(&mut bytes, 0)) {
        Ok(()) => {}
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::UnexpectedEof) => {
            return Ok(None);
        }
        Err(e) => return Err(Error::io("cannot read the file CHECKPOINT", e)),
    }
    let note = CheckpointNote::decode(&bytes).filter(|note| note.store == uuid);
    if note.is_none() {
        tracing::warn!("the file CHECKPOINT is damaged; the next checkpoint writes it again");
    }
    Ok(note.map(|note| note.next_pack))
}

/// For a catalogue that is made anew.
pub(crate) fn remove(medium: &dyn Medium) -> Result<()> {
    let cannot = |e| Error::io("cannot remove the file CHECKPOINT", e);
    match medium.remove(CHECKPOINT) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| medium.sync_dir("")).map_err(cannot),
    }
}
