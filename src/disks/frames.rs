//! A sparse image as a stream: what is not zero, and where it belongs.
//!
//! Eight bytes of [`MAGIC`], the size (u64), then frames: an offset (u64), a length (u32), and as many bytes. Offsets
//! grow. The last frame has the size for its offset and no bytes: a stream without it was cut off. A frame at
//! `u64::MAX` says why the sender could not go on. Numbers are little-endian.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// What a stream begins with.
pub const MAGIC: &[u8; 8] = b"miosaSP1";
/// Content type of such a stream.
pub const CONTENT_TYPE: &str = "application/x-miosa-sparse";
/// Most bytes of a frame.
pub const MAX_FRAME: usize = 4 << 20;
const ERROR: u64 = u64::MAX;

/// The beginning of a stream.
pub fn begin(size: u64) -> Bytes {
    let mut out = BytesMut::with_capacity(16);
    out.put_slice(MAGIC);
    out.put_u64_le(size);
    out.freeze()
}

/// A frame of data.
pub fn data(offset: u64, bytes: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(12 + bytes.len());
    out.put_u64_le(offset);
    out.put_u32_le(bytes.len() as u32);
    out.put_slice(bytes);
    out.freeze()
}

/// The last frame.
pub fn end(size: u64) -> Bytes {
    data(size, &[])
}

/// Why there is no more.
pub fn error(why: &[u8]) -> Bytes {
    data(ERROR, why)
}

/// A part of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// How large the image is; comes first.
    Size(u64),
    /// Bytes, and where they belong.
    Data(u64, Bytes),
    /// The sender could not go on.
    Error(Bytes),
    /// All is there.
    End,
}

/// Takes a stream apart, however it was cut into pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    pending: BytesMut,
    size: Option<u64>,
    /// Offsets below this have been told.
    at: u64,
    ended: bool,
}

impl Decoder {
    /// The next piece of the stream.
    pub fn push(&mut self, piece: &[u8]) {
        self.pending.extend_from_slice(piece);
    }

    /// Whether the last frame has been seen.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// The next part, if it is there whole; an error if this is no such stream.
    pub fn next_part(&mut self) -> Result<Option<Part>, String> {
        if self.ended {
            return if self.pending.is_empty() { Ok(None) } else { Err("there is something behind its end".into()) };
        }
        let Some(size) = self.size else {
            if self.pending.len() < 16 {
                return Ok(None);
            }
            if !self.pending.starts_with(MAGIC) {
                return Err("it does not begin like a sparse image".into());
            }
            self.pending.advance(8);
            let size = self.pending.get_u64_le();
            self.size = Some(size);
            return Ok(Some(Part::Size(size)));
        };
        let Some((mut head, _)) = self.pending.split_at_checked(12) else { return Ok(None) };
        let (offset, len) = (head.get_u64_le(), head.get_u32_le() as usize);
        if len > MAX_FRAME {
            return Err(format!("a frame has {len} bytes"));
        }
        if self.pending.len() < 12 + len {
            return Ok(None);
        }
        self.pending.advance(12);
        let bytes = self.pending.split_to(len).freeze();
        match offset {
            ERROR => Ok(Some(Part::Error(bytes))),
            _ if len == 0 && offset == size => {
                self.ended = true;
                Ok(Some(Part::End))
            }
            _ if offset < self.at || offset.checked_add(len as u64).is_none_or(|end| end > size) => {
                Err(format!("a frame of {len} bytes at {offset} does not fit"))
            }
            _ => {
                self.at = offset + len as u64;
                Ok(Some(Part::Data(offset, bytes)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(stream: &[u8], piece: usize) -> Result<Vec<Part>, String> {
        let mut decoder = Decoder::default();
        let mut parts = Vec::new();
        for piece in stream.chunks(piece) {
            decoder.push(piece);
            while let Some(part) = decoder.next_part()? {
                parts.push(part);
            }
        }
        Ok(parts)
    }

    #[test]
    fn a_stream_comes_apart_as_it_was_made_whatever_its_pieces() {
        let stream = [begin(8_192), data(0, b"ab"), data(4_096, b"cde"), end(8_192)].concat();
        let expected = [
            Part::Size(8_192),
            Part::Data(0, Bytes::from_static(b"ab")),
            Part::Data(4_096, Bytes::from_static(b"cde")),
            Part::End,
        ];
        for piece in 1..stream.len() {
            assert_eq!(parts(&stream, piece).unwrap(), expected);
        }
    }

    #[test]
    fn what_is_no_such_stream_is_refused() {
        for stream in [
            b"not a sparse image".to_vec(),
            [begin(4_096), data(4_095, b"ab")].concat(),
            [begin(4_096), data(8, b"ab"), data(0, b"ab")].concat(),
            [begin(4_096), data(u64::MAX - 1, b"ab")].concat(),
            [begin(4_096), end(4_096), data(0, b"a")].concat(),
        ] {
            assert!(parts(&stream, 7).is_err(), "{stream:?}");
        }
        assert_eq!(
            parts(&[begin(4_096), error(b"why")].concat(), 9).unwrap()[1],
            Part::Error(Bytes::from_static(b"why"))
        );
    }
}
