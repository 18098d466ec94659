//! Writer of the archive format the kernel unpacks as its initramfs ("newc"): regular files and directories only.

/// An archive in memory; reproducible: no times, no owners but root.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// Adds a directory; its parent must have been added before.
    pub(crate) fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    /// Adds a file; its directory must have been added before. At most 4 GiB, which the format cannot exceed.
    pub(crate) fn file(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.entry(name, 0o100_000 | mode, contents);
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.inode += 1;
        let links = if mode & 0o040_000 != 0 { 2 } else { 1 };
        let name_len = name.len() as u32 + 1;
        // inode, mode, uid, gid, links, mtime, length, device (2), device of the node (2), name's length, checksum
        let fields = [self.inode, mode, 0, 0, links, 0, contents.len() as u32, 0, 0, 0, 0, name_len, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: name, mode, contents.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, len, name_len) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..110 + name_len - 1].to_vec()).unwrap();
            let start = (at + 110 + name_len).next_multiple_of(4) - at;
            let end = (at + start + len).next_multiple_of(4) - at;
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), end);
                return entries;
            }
            entries.push((name, mode, bytes[start..start + len].to_vec()));
            bytes = &bytes[end..];
            at += end;
        }
    }

    #[test]
    fn what_goes_in_comes_out() {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.file("init", 0o755, b"\x7fELF");
        archive.file("dev/odd-length-name", 0o644, b"12345");
        let entries = read(&archive.finish());
        assert_eq!(entries[0], ("dev".into(), 0o040_755, vec![]));
        assert_eq!(entries[1], ("init".into(), 0o100_755, b"\x7fELF".to_vec()));
        assert_eq!(entries[2], ("dev/odd-length-name".into(), 0o100_644, b"12345".to_vec()));
    }
}
