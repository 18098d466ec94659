//! Files of a file system as a tar archive: owners, permissions, times, links, devices and extended attributes.
//!
//! Equal trees give equal archives. Sockets are left out; tar has no word for them.

use std::collections::HashMap;
use std::io::{self, Read, Write};

use tar::{Builder, EntryType, Header};

use super::{Error, File, FileSystem, Kind, Node, Result, Visited};

/// Deepest directory.
const MAX_DEPTH: usize = 2_000;

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
    let mut archive = Archive { fs, to: Builder::new(to), linked: HashMap::new() };
    match archive.tree(top, name).and_then(|()| Ok(archive.to.finish()?)) {
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
}

impl<W: Write> Archive<'_, W> {
    fn tree(&mut self, top: Node, name: &str) -> std::result::Result<(), Stop> {
        let mut visited = Visited::default();
        let mut todo = vec![(name.trim_matches('/').as_bytes().to_vec(), top, 0)];
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
        self.attributes(node)?;
        match node.kind {
            Kind::File => {
                let file = self.fs.open_file(node.clone())?;
                header.set_entry_type(EntryType::Regular);
                header.set_size(node.size());
                // Tar reads in small pieces.
                let content = io::BufReader::with_capacity(1 << 18, Content { fs: self.fs, file: &file, at: 0 });
                return Ok(self.to.append_data(&mut header, os_path(path), content)?);
            }
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
            Kind::Socket => {}
        }
        let path = if node.kind == Kind::Directory { [path, b"/"].concat() } else { path.to_vec() };
        Ok(self.to.append_data(&mut header, os_path(&path), io::empty())?)
    }

    fn attributes(&mut self, node: &Node) -> std::result::Result<(), Stop> {
        let all = self.fs.xattrs(node)?;
        let all: Vec<_> = all.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), &value[..])).collect();
        if !all.is_empty() {
            self.to.append_pax_extensions(all.iter().map(|(name, value)| (name.as_str(), *value)))?;
        }
        Ok(())
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

struct Content<'a> {
    fs: &'a FileSystem,
    file: &'a File,
    at: u64,
}

impl Read for Content<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.fs.read(self.file, self.at, buf).map_err(|e| io::Error::other(ReadFailed(e)))?;
        self.at += read as u64;
        Ok(read)
    }
}
