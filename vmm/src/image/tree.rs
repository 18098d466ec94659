//! A root file system in memory: names, kinds and owners, with the files' contents in numbered files beside it.
//!
//! Archives come from strangers. Their paths are resolved here, in a tree of ours, and never by the host's kernel: a
//! link or a `..` cannot lead out of what has no outside. Only when all layers are applied is the tree laid down, from
//! the top, through directories that were made a moment ago.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

use crate::{Error, ErrorKind, Result};

/// Most names in a tree.
const MAX_NODES: usize = 4_000_000;
/// Largest file, holes included: what ext4 takes.
const MAX_FILE: u64 = (1 << 44) - 4_096;
/// Longest path; what a host's path can hold, less the directory it is laid down in.
const MAX_PATH: usize = 3_800;
/// Deepest directory: links can make a tree deeper than any one path of the archive.
const MAX_DEPTH: usize = 1_024;
/// Links followed on the way to one name, as the kernel does.
const MAX_LINKS: u32 = 40;
/// Of a directory that an archive does not mention.
const PLAIN_DIRECTORY: Meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime: 0, xattrs: Vec::new() };

type Name = Vec<u8>;
type Id = usize;

/// Owner, permissions and the rest of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since 1970.
    pub(super) mtime: i64,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

#[derive(Debug)]
enum Kind {
    Directory(BTreeMap<Name, Place>),
    /// The number of its content, its bytes but for holes, and the names it has.
    File {
        content: u64,
        bytes: u64,
        names: u32,
    },
    Link(Vec<u8>),
    Pipe,
}

#[derive(Debug)]
struct Node {
    kind: Kind,
    meta: Meta,
}

/// A name's node, and the layer that put it there.
#[derive(Clone, Copy, Debug)]
struct Place {
    node: Id,
    layer: u32,
}

/// The tree.
pub(super) struct Tree {
    nodes: Vec<Node>,
    layer: u32,
    contents: PathBuf,
    next_content: u64,
    live_bytes: u64,
    max_bytes: u64,
}

const ROOT: Id = 0;

impl Tree {
    /// An empty tree that keeps contents in `contents`, an empty directory, and refuses to hold more than `max_bytes`.
    pub(super) fn new(contents: PathBuf, max_bytes: u64) -> Tree {
        let root = Node { kind: Kind::Directory(BTreeMap::new()), meta: PLAIN_DIRECTORY };
        Tree { nodes: vec![root], layer: 0, contents, next_content: 0, live_bytes: 0, max_bytes }
    }

    /// What comes now lies above what came before.
    pub(super) fn begin_layer(&mut self) {
        self.layer += 1;
    }

    /// Names in the tree, counting those that were taken out.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Bytes of its files.
    pub(super) fn bytes(&self) -> u64 {
        self.live_bytes
    }

    /// Adds a directory, or changes the one that is there.
    pub(super) fn add_directory(&mut self, path: &[u8], meta: Meta) -> Result<()> {
        let Some((parent, name)) = self.locate(path)? else {
            self.nodes[ROOT].meta = meta;
            return Ok(());
        };
        if let Some(place) = self.child(parent, &name)
            && matches!(self.nodes[place.node].kind, Kind::Directory(_))
        {
            self.nodes[place.node].meta = meta;
            self.put(parent, name, place.node);
            return Ok(());
        }
        self.add(parent, name, Kind::Directory(BTreeMap::new()), meta)
    }

    /// Adds a file with all that `content` gives; `size` is what the archive says of it.
    pub(super) fn add_file(&mut self, path: &[u8], meta: Meta, size: u64, content: &mut dyn Read) -> Result<()> {
        self.add_file_with_holes(path, meta, size, &[(0, size)], content)
    }

    /// Adds a file of which `content` gives the pieces between holes, whose offsets and lengths are in order and within
    /// `size`.
    pub(super) fn add_file_with_holes(
        &mut self,
        path: &[u8],
        meta: Meta,
        size: u64,
        pieces: &[(u64, u64)],
        content: &mut dyn Read,
    ) -> Result<()> {
        let (parent, name) = self.locate(path)?.ok_or_else(|| bad_path(path, "it is the root, and no file"))?;
        let bytes = pieces.iter().map(|(_, len)| len).fold(0, |sum: u64, len| sum.saturating_add(*len));
        if self.live_bytes.saturating_add(bytes) > self.max_bytes {
            let message = format!("the content does not fit the disk of {} MiB", self.max_bytes >> 20);
            return Err(Error::new(ErrorKind::Invalid, message).hint("ask for a larger disk: --disk SIZE"));
        }
        if size > MAX_FILE {
            return Err(bad_path(path, "it is larger than a file can be"));
        }
        let number = self.next_content;
        let at = self.content_path(number);
        let failed = |e: std::io::Error| Error::io(at.display(), e);
        let mut file = File::options().write(true).create_new(true).open(&at).map_err(failed)?;
        let mut buffer = vec![0; 64 << 10];
        for (offset, len) in pieces {
            file.seek(SeekFrom::Start(*offset)).map_err(failed)?;
            let mut left = *len;
            while left > 0 {
                let part = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let read = content.read(&mut buffer[..part]).map_err(|e| broken(&format!("in {}", shown(path)), &e))?;
                if read == 0 {
                    return Err(broken(&format!("in {}", shown(path)), &"it ends too early"));
                }
                file.write_all(&buffer[..read]).map_err(failed)?;
                left -= read as u64;
            }
        }
        // An archive that lies about a size must not fill the host.
        if content.read(&mut buffer[..1]).map_err(|e| broken(&format!("in {}", shown(path)), &e))? > 0 {
            return Err(bad_path(path, "it is longer than the archive says"));
        }
        file.set_len(size).map_err(failed)?;
        self.next_content += 1;
        self.live_bytes += bytes;
        self.add(parent, name, Kind::File { content: number, bytes, names: 1 }, meta)
    }

    /// Adds a symbolic link; where it leads is the guest's business.
    pub(super) fn add_link(&mut self, path: &[u8], meta: Meta, target: &[u8]) -> Result<()> {
        let (parent, name) = self.locate(path)?.ok_or_else(|| bad_path(path, "it is the root, and no link"))?;
        if target.is_empty() || target.len() > 4_095 || target.contains(&0) {
            return Err(bad_path(path, "its target is empty or too long"));
        }
        self.add(parent, name, Kind::Link(target.to_vec()), meta)
    }

    /// Adds a named pipe.
    pub(super) fn add_pipe(&mut self, path: &[u8], meta: Meta) -> Result<()> {
        let (parent, name) = self.locate(path)?.ok_or_else(|| bad_path(path, "it is the root, and no pipe"))?;
        self.add(parent, name, Kind::Pipe, meta)
    }

    /// Gives a file a second name.
    pub(super) fn add_hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let missing = || bad_path(path, &format!("it is a hard link to {}, which is not there", shown(target)));
        let (dir, name) = self.locate(target)?.ok_or_else(missing)?;
        let node = self.child(dir, &name).ok_or_else(missing)?.node;
        if matches!(self.nodes[node].kind, Kind::Directory(_)) {
            return Err(bad_path(path, "it is a hard link to a directory"));
        }
        let (parent, name) = self.locate(path)?.ok_or_else(|| bad_path(path, "it is the root, and no link"))?;
        if self.child(parent, &name).is_some_and(|place| place.node == node) {
            return Ok(());
        }
        if let Kind::File { names, .. } = &mut self.nodes[node].kind {
            *names += 1;
        }
        self.take_out(parent, &name);
        self.put(parent, name, node);
        Ok(())
    }

    /// A whiteout: takes out what a layer below put under this name.
    pub(super) fn white_out(&mut self, path: &[u8]) -> Result<()> {
        let mut parts = components(path)?;
        let Some(name) = parts.pop() else { return Ok(()) };
        if let Some(parent) = self.directory(parts, false, path)?
            && let Some(place) = self.child(parent, &name)
        {
            self.hide_below(parent, &name, place);
        }
        Ok(())
    }

    /// An opaque whiteout: takes out all that layers below put into this directory.
    pub(super) fn make_opaque(&mut self, path: &[u8]) -> Result<()> {
        if let Some(dir) = self.directory(components(path)?, false, path)? {
            self.hide_all_below(dir);
        }
        Ok(())
    }

    /// Sees that a directory is there; the mode and owner of one that is are left.
    pub(super) fn ensure_directory(&mut self, path: &[u8]) -> Result<()> {
        self.directory(components(path)?, true, path).map(drop)
    }

    fn hide_all_below(&mut self, dir: Id) {
        let Kind::Directory(children) = &self.nodes[dir].kind else { return };
        let children: Vec<(Name, Place)> = children.iter().map(|(name, place)| (name.clone(), *place)).collect();
        for (name, place) in children {
            self.hide_below(dir, &name, place);
        }
    }

    /// What this layer itself put in stays, with the directories it is in, whatever the order of the entries.
    fn hide_below(&mut self, parent: Id, name: &[u8], place: Place) {
        self.hide_all_below(place.node);
        let empty = match &self.nodes[place.node].kind {
            Kind::Directory(children) => children.is_empty(),
            _ => true,
        };
        if place.layer < self.layer && empty {
            self.take_out(parent, name);
        }
    }

    fn add(&mut self, parent: Id, name: Name, kind: Kind, meta: Meta) -> Result<()> {
        if self.nodes.len() >= MAX_NODES {
            return Err(Error::new(ErrorKind::Invalid, format!("the archive has more than {MAX_NODES} entries")));
        }
        self.take_out(parent, &name);
        self.nodes.push(Node { kind, meta });
        self.put(parent, name, self.nodes.len() - 1);
        Ok(())
    }

    fn put(&mut self, parent: Id, name: Name, node: Id) {
        let place = Place { node, layer: self.layer };
        if let Kind::Directory(children) = &mut self.nodes[parent].kind {
            children.insert(name, place);
        }
    }

    /// Takes a name out, with all that is below it. The nodes stay, unreachable.
    fn take_out(&mut self, parent: Id, name: &[u8]) {
        let Kind::Directory(children) = &mut self.nodes[parent].kind else { return };
        let Some(place) = children.remove(name) else { return };
        match &mut self.nodes[place.node].kind {
            Kind::Directory(children) => {
                let names: Vec<Name> = children.keys().cloned().collect();
                for name in names {
                    self.take_out(place.node, &name);
                }
            }
            Kind::File { content, bytes, names } => {
                *names -= 1;
                if *names == 0 {
                    let (content, bytes) = (*content, *bytes);
                    self.live_bytes -= bytes;
                    let _ = fs::remove_file(self.content_path(content));
                }
            }
            Kind::Link(_) | Kind::Pipe => {}
        }
    }

    fn child(&self, dir: Id, name: &[u8]) -> Option<Place> {
        match &self.nodes[dir].kind {
            Kind::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn content_path(&self, number: u64) -> PathBuf {
        self.contents.join(number.to_string())
    }

    /// The directory and name of a path; none for the root itself. Directories on the way are made.
    fn locate(&mut self, path: &[u8]) -> Result<Option<(Id, Name)>> {
        let mut parts = components(path)?;
        let Some(name) = parts.pop() else { return Ok(None) };
        Ok(self.directory(parts, true, path)?.map(|dir| (dir, name)))
    }

    /// The directory that these components lead to from the root, through links, of which none leads out. What is
    /// missing is made, or the answer is none.
    fn directory(&mut self, mut parts: Vec<Name>, make: bool, whole: &[u8]) -> Result<Option<Id>> {
        parts.reverse();
        let mut links = 0;
        let mut way = vec![ROOT];
        while let Some(part) = parts.pop() {
            let here = way.last().copied().unwrap_or(ROOT);
            if part == b".." {
                // At the root it stays there, as it does for the kernel.
                way.truncate((way.len() - 1).max(1));
                continue;
            }
            if way.len() > MAX_DEPTH {
                return Err(bad_path(whole, "it is too deep"));
            }
            let Some(place) = self.child(here, &part) else {
                if !make {
                    return Ok(None);
                }
                self.add(here, part, Kind::Directory(BTreeMap::new()), PLAIN_DIRECTORY)?;
                way.push(self.nodes.len() - 1);
                continue;
            };
            match &self.nodes[place.node].kind {
                Kind::Directory(_) => way.push(place.node),
                Kind::Link(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(bad_path(whole, "its directory's links lead in a circle"));
                    }
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    let ahead = target.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".");
                    parts.extend(ahead.rev().map(<[u8]>::to_vec));
                }
                _ => return Err(bad_path(whole, "a file is where its directory should be")),
            }
        }
        Ok(way.last().copied())
    }

    /// Lays the tree down in `at`, a new empty directory of ours. Contents move there. Needs root: files keep their
    /// owners.
    pub(super) fn lay_down(&self, at: &Path) -> Result<()> {
        let mut made: BTreeMap<Id, PathBuf> = BTreeMap::new();
        // An explicit stack: an archive chooses the depth.
        let mut order = Vec::new();
        let mut open = vec![(ROOT, at.to_owned())];
        while let Some((id, path)) = open.pop() {
            let Kind::Directory(children) = &self.nodes[id].kind else { continue };
            for (name, place) in children {
                let child = path.join(OsStr::from_bytes(name));
                let node = &self.nodes[place.node];
                if matches!(node.kind, Kind::Directory(_)) {
                    fs::create_dir(&child).map_err(|e| Error::io(child.display(), e))?;
                    open.push((place.node, child));
                } else if let Some(first) = made.get(&place.node) {
                    fs::hard_link(first, &child).map_err(|e| Error::io(child.display(), e))?;
                } else {
                    self.lay_down_leaf(node, &child).map_err(|e| Error::io(child.display(), e))?;
                    if matches!(node.kind, Kind::File { names: 2.., .. } | Kind::Link(_)) {
                        made.insert(place.node, child);
                    }
                }
            }
            order.push((id, path));
        }
        // From below, so that what is made inside does not change a directory's time again.
        for (id, path) in order.iter().rev() {
            set_meta(path, &self.nodes[*id].meta, false).map_err(|e| Error::io(path.display(), e))?;
        }
        Ok(())
    }

    fn lay_down_leaf(&self, node: &Node, at: &Path) -> std::io::Result<()> {
        match &node.kind {
            Kind::File { content, .. } => fs::rename(self.content_path(*content), at)?,
            Kind::Link(target) => symlink(OsStr::from_bytes(target), at)?,
            Kind::Pipe => nix::unistd::mkfifo(at, Mode::from_bits_truncate(0o600))?,
            Kind::Directory(_) => {}
        }
        set_meta(at, &node.meta, matches!(node.kind, Kind::Link(_)))
    }

    /// A line a name.
    #[cfg(test)]
    fn describe(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut open = vec![(ROOT, String::new())];
        while let Some((id, path)) = open.pop() {
            match &self.nodes[id].kind {
                Kind::Directory(children) => {
                    for (name, place) in children {
                        open.push((place.node, format!("{path}/{}", String::from_utf8_lossy(name))));
                    }
                    if children.is_empty() {
                        lines.push(format!("{path}/"));
                    }
                }
                Kind::File { content, .. } => {
                    let text = fs::read_to_string(self.content_path(*content)).unwrap();
                    lines.push(format!("{path}={text}"));
                }
                Kind::Link(target) => lines.push(format!("{path}->{}", String::from_utf8_lossy(target))),
                Kind::Pipe => lines.push(format!("{path}|")),
            }
        }
        lines.sort();
        lines
    }
}

/// Owner first: a change of owner clears the set-user-id bit, and the capabilities among the attributes.
fn set_meta(at: &Path, meta: &Meta, is_link: bool) -> std::io::Result<()> {
    lchown(at, Some(meta.uid), Some(meta.gid))?;
    for (name, value) in &meta.xattrs {
        match xattr::set(at, OsStr::from_bytes(name), value) {
            Err(error)
                if error.raw_os_error() == Some(libc::EOPNOTSUPP) || error.raw_os_error() == Some(libc::EPERM) =>
            {
                // A kind that this file system, or a link, cannot have.
                tracing::debug!(path = %at.display(), %error, "an extended attribute is left out");
            }
            result => result?,
        }
    }
    if !is_link {
        fs::set_permissions(at, Permissions::from_mode(meta.mode & 0o7777))?;
    }
    let time = TimeSpec::new(meta.mtime, 0);
    Ok(utimensat(AT_FDCWD, at, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}

/// The parts of an archive's path. One that leads out is refused, even where the tree would hold it.
fn components(path: &[u8]) -> Result<Vec<Name>> {
    if path.starts_with(b"/") {
        return Err(bad_path(path, "it is absolute").hint("make the archive with relative paths (tar -C ROOT -c .)"));
    }
    if path.len() > MAX_PATH || path.contains(&0) {
        return Err(bad_path(path, "it is too long"));
    }
    let mut parts = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(bad_path(path, "it leads up with '..'")),
            _ if part.len() > 255 => return Err(bad_path(path, "a part of it has more than 255 bytes")),
            _ => parts.push(part.to_vec()),
        }
    }
    Ok(parts)
}

/// An entry that cannot be taken.
pub(super) fn bad_path(path: &[u8], why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("the archive's entry {} is refused: {why}", shown(path)))
}

/// An archive that cannot be read further.
pub(super) fn broken(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::new(ErrorKind::Invalid, format!("the archive is broken {what}: {why}"))
        .hint("make or download it again, and check it: tar -tf FILE")
}

/// A path from an archive as it may be shown.
pub(super) fn shown(path: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(path).chars().filter(|c| !c.is_control()).take(200).collect();
    format!("{text:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::new(dir.path().to_owned(), 1 << 20);
        (dir, tree)
    }

    fn meta() -> Meta {
        Meta { mode: 0o644, ..Meta::default() }
    }

    fn file(tree: &mut Tree, path: &str, text: &str) {
        tree.add_file(path.as_bytes(), meta(), text.len() as u64, &mut text.as_bytes()).unwrap();
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        let (_dir, mut tree) = tree();
        for path in ["/etc/passwd", "../x", "a/../../x", "a/..", "a/./../b"] {
            let error = tree.add_file(path.as_bytes(), meta(), 0, &mut &b""[..]).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Invalid, "{path}");
            assert!(tree.add_hard_link(b"x", path.as_bytes()).is_err(), "{path}");
        }
        assert_eq!(tree.describe(), ["/"]);
    }

    #[test]
    fn links_lead_nowhere_but_into_the_tree() {
        let (_dir, mut tree) = tree();
        tree.add_link(b"up", meta(), b"../../..").unwrap();
        tree.add_link(b"abs", meta(), b"/etc").unwrap();
        file(&mut tree, "up/one", "1");
        file(&mut tree, "abs/two", "2");
        assert_eq!(tree.describe(), ["/abs->/etc", "/etc/two=2", "/one=1", "/up->../../.."]);
        tree.add_link(b"a", meta(), b"b").unwrap();
        tree.add_link(b"b", meta(), b"a").unwrap();
        assert!(tree.add_directory(b"a/x", meta()).is_err(), "a circle");
        file(&mut tree, "plain", "");
        assert!(tree.add_directory(b"plain/x", meta()).is_err(), "through a file");
    }

    #[test]
    fn layers_hide_what_is_below_them_and_nothing_else() {
        let (dir, mut tree) = tree();
        tree.begin_layer();
        for path in ["etc/a", "etc/b", "opt/x/deep", "opt/y", "keep/z", "gone/1"] {
            file(&mut tree, path, "low");
        }
        tree.begin_layer();
        // Its own entries come before and after the whiteouts, and stay.
        file(&mut tree, "opt/x/new", "high");
        tree.white_out(b"etc/a").unwrap();
        tree.white_out(b"gone").unwrap();
        tree.white_out(b"never/was").unwrap();
        tree.make_opaque(b"opt").unwrap();
        file(&mut tree, "opt/later", "high");
        file(&mut tree, "etc/b", "high");
        tree.white_out(b"etc/b").unwrap();
        assert_eq!(tree.describe(), ["/etc/b=high", "/keep/z=low", "/opt/later=high", "/opt/x/new=high"]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "contents that nothing names are gone");
        assert_eq!(tree.bytes(), 4 + 3 + 4 + 4);
    }

    #[test]
    fn kinds_replace_each_other() {
        let (_dir, mut tree) = tree();
        file(&mut tree, "x/y", "1");
        file(&mut tree, "x", "now a file");
        tree.add_directory(b"x", meta()).unwrap();
        tree.add_link(b"d", meta(), b"x").unwrap();
        tree.add_directory(b"d", meta()).unwrap();
        file(&mut tree, "d/in", "2");
        assert_eq!(tree.describe(), ["/d/in=2", "/x/"]);
    }

    #[test]
    fn hard_links_share_and_count() {
        let (dir, mut tree) = tree();
        file(&mut tree, "a", "text");
        tree.add_hard_link(b"b", b"./a").unwrap();
        tree.add_hard_link(b"b", b"a").unwrap();
        assert!(tree.add_hard_link(b"c", b"missing").is_err());
        file(&mut tree, "a", "other");
        assert_eq!(tree.describe(), ["/a=other", "/b=text"]);
        tree.begin_layer();
        tree.white_out(b"b").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn sizes_are_held_to() {
        let (_dir, mut tree) = tree();
        assert!(tree.add_file(b"short", meta(), 4, &mut &b"abc"[..]).is_err());
        assert!(tree.add_file(b"long", meta(), 2, &mut &b"abc"[..]).is_err());
        let error = tree.add_file(b"big", meta(), 2 << 20, &mut std::io::repeat(0)).unwrap_err();
        assert!(error.hint.unwrap().contains("--disk"));
    }
}
