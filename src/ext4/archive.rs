//! Files of a file system as a tar archive: owners, permissions, times, links, devices and extended attributes; plain, or as
//! a container image's layer.
//!
//! Equal trees give equal archives. Sockets are left out; tar has no word for them. In a layer, large holes stay holes: its
//! readers know the form in which GNU tar notes them.

use std::collections::HashMap;
use std::io::{self, Read, Write};

use tar::{Builder, EntryType, Header};

use super::{Error, File, FileSystem, Kind, Node, Result, Visited};

/// Deepest directory.
const MAX_DEPTH: usize = 2_000;
/// A piece of a tar archive.
const UNIT: usize = 512;
/// By a name that begins so, a layer deletes what lies below it.
const WHITEOUT: &[u8] = b".wh.";
/// In a directory, this hides everything that layers below have there.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What mkfs puts into the root.
const LOST_AND_FOUND: &[u8] = b"lost+found";

/// Why an archive ends early.
#[derive(Debug)]
enum Stop {
    Image(Error),
    Writer(io::Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Image(error)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Stop::Writer(error)
    }
}

/// Writes `top`, and what is below it, under `name`; without a name, what is below it under names of their own. The outer
/// error is the writer's: nobody reads any more.
pub fn write(fs: &FileSystem, top: Node, name: &str, to: impl Write) -> io::Result<Result<()>> {
    write_with(fs, false, to, |archive| archive.tree(top, name.trim_matches('/').as_bytes().to_vec()))
}

/// Writes what is at `path`, an absolute path without `..`, as a layer: there again, below the directories that lead to it,
/// with their owners and permissions; of the root without `lost+found`. With `alone`, a directory hides what layers below
/// have in it. Symbolic links on the way are followed.
pub fn write_layer(fs: &FileSystem, path: &str, alone: bool, to: impl Write) -> io::Result<Result<()>> {
    write_with(fs, true, to, |archive| archive.layer(path, alone))
}

fn write_with<W: Write>(
    fs: &FileSystem,
    is_layer: bool,
    to: W,
    write: impl FnOnce(&mut Archive<'_, W>) -> std::result::Result<(), Stop>,
) -> io::Result<Result<()>> {
    let mut archive = Archive { fs, to: Builder::new(to), linked: HashMap::new(), is_layer };
    match write(&mut archive).and_then(|()| Ok(archive.to.finish()?)) {
        Ok(()) => Ok(Ok(())),
        Err(Stop::Image(error)) => Ok(Err(error)),
        Err(Stop::Writer(error)) => match error.get_ref().is_some_and(|e| e.is::<ReadFailed>()) {
            true => Ok(Err(Error::Unreadable(error.to_string()))),
            false => Err(error),
        },
    }
}

struct Archive<'a, W: Write> {
    fs: &'a FileSystem,
    to: Builder<W>,
    /// The first name of files that have several.
    linked: HashMap<u32, Vec<u8>>,
    is_layer: bool,
}

impl<W: Write> Archive<'_, W> {
    fn layer(&mut self, path: &str, alone: bool) -> std::result::Result<(), Stop> {
        let names: Vec<&str> = path.split('/').filter(|name| !matches!(*name, "" | ".")).collect();
        for above in 1..names.len() {
            let above = names[..above].join("/");
            let node = self.fs.lookup(&above, true)?;
            self.entry(above.as_bytes(), &node)?;
        }
        let name = names.join("/");
        let top = self.fs.lookup(&name, true)?;
        if alone && top.kind == Kind::Directory {
            self.entry(name.as_bytes(), &top)?;
            let mut header = Header::new_gnu();
            header.set_mode(0o600);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(0);
            let marker = [name.as_bytes(), b"/", OPAQUE].concat();
            self.to.append_data(&mut header, os_path(&marker), io::empty())?;
        }
        self.tree(top, name.into_bytes())
    }

    fn tree(&mut self, top: Node, name: Vec<u8>) -> std::result::Result<(), Stop> {
        let mut visited = Visited::default();
        let mut todo = vec![(name, top, 0)];
        while let Some((path, node, depth)) = todo.pop() {
            if depth > MAX_DEPTH {
                return Err(Error::Unreadable("its directories are nested too deeply".to_owned()).into());
            }
            if !path.is_empty() {
                self.entry(&path, &node)?;
            }
            if node.kind != Kind::Directory {
                continue;
            }
            visited.enter(node.ino)?;
            // By name, though the last is taken first.
            for entry in self.fs.read_dir(&node)?.into_iter().rev() {
                if self.is_layer && path.is_empty() && entry.name == LOST_AND_FOUND {
                    continue;
                }
                if self.is_layer && entry.name.starts_with(WHITEOUT) {
                    let name = String::from_utf8_lossy(&[&path[..], b"/", &entry.name].concat()).into_owned();
                    let message = format!("/{}: in an image such a name means a deletion", name.trim_matches('/'));
                    return Err(Error::WrongKind(message).into());
                }
                let path = match path.is_empty() {
                    true => entry.name,
                    false => [&path[..], b"/", &entry.name].concat(),
                };
                todo.push((path, self.fs.node(entry.ino)?, depth + 1));
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &[u8], node: &Node) -> std::result::Result<(), Stop> {
        if node.kind == Kind::Socket {
            return Ok(());
        }
        let mut header = Header::new_gnu();
        header.set_mode(node.mode());
        header.set_uid(u64::from(node.uid()));
        header.set_gid(u64::from(node.gid()));
        header.set_mtime(u64::try_from(node.modified().0).unwrap_or(0));
        header.set_size(0);
        if node.kind != Kind::Directory && node.links() > 1 {
            if let Some(first) = self.linked.get(&node.ino) {
                header.set_entry_type(EntryType::Link);
                let first = first.clone();
                return Ok(self.to.append_link(&mut header, os_path(path), os_path(&first))?);
            }
            self.linked.insert(node.ino, path.to_vec());
        }
        if node.kind == Kind::File {
            return self.file(path, node, header);
        }
        self.extensions(self.attributes(node)?)?;
        match node.kind {
            Kind::Symlink => {
                header.set_entry_type(EntryType::Symlink);
                let target = self.fs.read_link(node)?;
                return Ok(self.to.append_link(&mut header, os_path(path), os_path(&target))?);
            }
            Kind::Directory => header.set_entry_type(EntryType::Directory),
            Kind::Fifo => header.set_entry_type(EntryType::Fifo),
            Kind::CharDevice | Kind::BlockDevice => {
                let is_block = node.kind == Kind::BlockDevice;
                header.set_entry_type(if is_block { EntryType::Block } else { EntryType::Char });
                let (major, minor) = node.device().unwrap_or_default();
                header.set_device_major(major)?;
                header.set_device_minor(minor)?;
            }
            Kind::File | Kind::Socket => {}
        }
        let path = if node.kind == Kind::Directory { [path, b"/"].concat() } else { path.to_vec() };
        Ok(self.to.append_data(&mut header, os_path(&path), io::empty())?)
    }

    fn file(&mut self, path: &[u8], node: &Node, mut header: Header) -> std::result::Result<(), Stop> {
        let file = self.fs.open_file(node.clone())?;
        let mut extensions = self.attributes(node)?;
        header.set_entry_type(EntryType::Regular);
        let pieces = if self.is_layer { file.pieces() } else { None };
        let Some(pieces) = pieces else {
            self.extensions(extensions)?;
            header.set_size(node.size());
            let whole = [(0, node.size())];
            return Ok(self.to.append_data(&mut header, os_path(path), Content::of(self.fs, &file, &whole))?);
        };
        // Version 1.0 of the form: a placeholder's name, and a list of the pieces in front of them.
        let real = [("major", b"1".to_vec()), ("minor", b"0".to_vec()), ("name", path.to_vec())];
        extensions.extend(real.map(|(key, value)| (format!("GNU.sparse.{key}"), value)));
        extensions.push(("GNU.sparse.realsize".to_owned(), node.size().to_string().into_bytes()));
        self.extensions(extensions)?;
        let mut list = format!("{}\n", pieces.len());
        pieces.iter().for_each(|(at, len)| list.push_str(&format!("{at}\n{len}\n")));
        let mut list = list.into_bytes();
        list.resize(list.len().next_multiple_of(UNIT), 0);
        header.set_size(list.len() as u64 + pieces.iter().map(|(_, len)| len).sum::<u64>());
        let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
        let placeholder = [b"GNUSparseFile.0/", &name[..name.len().min(80)]].concat();
        let content = io::Cursor::new(list).chain(Content::of(self.fs, &file, &pieces));
        Ok(self.to.append_data(&mut header, os_path(&placeholder), content)?)
    }

    fn attributes(&self, node: &Node) -> Result<Vec<(String, Vec<u8>)>> {
        let all = self.fs.xattrs(node)?;
        Ok(all.into_iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), value)).collect())
    }

    /// What a header has no field for. There is at most one such list before a header.
    fn extensions(&mut self, all: Vec<(String, Vec<u8>)>) -> io::Result<()> {
        if all.is_empty() {
            return Ok(());
        }
        self.to.append_pax_extensions(all.iter().map(|(name, value)| (name.as_str(), &value[..])))
    }
}

fn os_path(bytes: &[u8]) -> &std::path::Path {
    use std::os::unix::ffi::OsStrExt;
    std::path::Path::new(std::ffi::OsStr::from_bytes(bytes))
}

/// A file that could not be read, told through the archive's own reading.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct ReadFailed(Error);

/// Pieces of a file, one after the other.
struct Content<'a> {
    fs: &'a FileSystem,
    file: &'a File,
    /// Offset and length.
    pieces: &'a [(u64, u64)],
    /// Of the first piece.
    done: u64,
}

impl<'a> Content<'a> {
    fn of(fs: &'a FileSystem, file: &'a File, pieces: &'a [(u64, u64)]) -> io::BufReader<Self> {
        // Tar reads in small pieces.
        io::BufReader::with_capacity(1 << 18, Self { fs, file, pieces, done: 0 })
    }
}

impl Read for Content<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while let Some((at, len)) = self.pieces.first() {
            let left = len - self.done;
            if left > 0 {
                let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let read = self.fs.read(self.file, at + self.done, &mut buf[..len]);
                let read = read.map_err(|e| io::Error::other(ReadFailed(e)))?;
                self.done += read as u64;
                return Ok(read);
            }
            (self.pieces, self.done) = (&self.pieces[1..], 0);
        }
        Ok(0)
    }
}
