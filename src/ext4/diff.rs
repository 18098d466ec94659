//! What differs between two states of one file system, file by file.
//!
//! The store says which bytes of the disks differ. From that follows which inodes do, and whose content does; a file or
//! directory whose inode and blocks are equal is not read twice, and no content is read that is known to be equal. Where
//! two disks do not come from each other (another UUID, another layout) everything is compared.

use std::collections::{BTreeMap, HashSet};

use fs_ext4::inode::Inode;
use serde::{Deserialize, Serialize};

use super::{Entry, Error, File, FileSystem, Kind, MAX_FILE, Node, Result, Run, Visited};

/// Most differences that are told.
const MAX_CHANGES: usize = 500_000;
/// Deepest directory.
const MAX_DEPTH: usize = 2_000;
/// Bytes compared at a time.
const PIECE: u64 = 1 << 20;

/// How a file differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = FileHow)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// Only the second state has it.
    Added,
    /// Only the first state has it.
    Removed,
    /// Both have it, with other content or other attributes.
    Changed,
    /// The same file has another name.
    Renamed,
}

/// A part of a file that differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = FilePart)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Bytes, where a link points, or a device's number.
    Content,
    /// Permissions.
    Mode,
    /// User or group.
    Owner,
    /// Extended attributes.
    Xattrs,
    /// When the content was changed, though it is equal. Not of directories.
    Modified,
}

/// A file that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FileChange {
    /// Its path; of a renamed one the new path. What is not UTF-8 is replaced.
    pub path: String,
    /// How it differs.
    pub how: How,
    /// What it is.
    pub kind: Kind,
    /// The path it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// What of it differs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Part>,
    /// Its size in the first state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_before: Option<u64>,
    /// Its size in the second state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_after: Option<u64>,
}

/// All that differ, by path.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FileDiff {
    /// One entry a file.
    pub changes: Vec<FileChange>,
    /// There are more than are told.
    pub truncated: bool,
}

/// Bytes that may differ, in order and apart.
#[derive(Debug, Default)]
struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    fn new(mut ranges: Vec<(u64, u64)>) -> Self {
        ranges.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
        for (from, upto) in ranges.into_iter().filter(|(from, upto)| from < upto) {
            match joined.last_mut() {
                Some((_, end)) if *end >= from => *end = (*end).max(upto),
                _ => joined.push((from, upto)),
            }
        }
        Self(joined)
    }

    /// The parts of them that lie in `from..upto`.
    fn within(&self, from: u64, upto: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = self.0.partition_point(|(_, end)| *end <= from);
        let inside = self.0[first..].iter().take_while(move |(start, _)| *start < upto);
        inside.map(move |(start, end)| ((*start).max(from), (*end).min(upto)))
    }

    fn touch(&self, run: &Run) -> bool {
        self.within(run.physical, run.physical + run.len).next().is_some()
    }

    /// What is left without `others`.
    fn without(&self, others: &Ranges) -> Ranges {
        let mut left = Vec::new();
        for (from, upto) in &self.0 {
            let mut at = *from;
            for (start, end) in others.within(*from, *upto) {
                left.push((at, start));
                at = end;
            }
            left.push((at, *upto));
        }
        Ranges::new(left)
    }
}

/// What of two file systems is known to be equal.
struct Known {
    /// Bytes of the disks that differ; all others are equal.
    bytes: Ranges,
    /// Inodes that differ, or whose content does.
    inodes: HashSet<u32>,
}

/// Compares; `ranges` are the offsets and lengths in which the disks differ.
pub fn diff(a: &FileSystem, b: &FileSystem, ranges: impl Iterator<Item = (u64, u64)>) -> Result<FileDiff> {
    let known = known(a, b, ranges)?;
    let mut comparison =
        Comparison { sides: [a, b], known, out: FileDiff::default(), gone: Vec::new(), new: Vec::new() };
    let roots = [Some(a.root()?), Some(b.root()?)];
    let mut visited = [Visited::default(), Visited::default()];
    comparison.compare(Vec::new(), roots, &mut visited)?;
    comparison.match_renamed(&mut visited)?;
    comparison.out.changes.sort_by(|x, y| x.path.cmp(&y.path));
    Ok(comparison.out)
}

// ---- what is equal

fn known(a: &FileSystem, b: &FileSystem, ranges: impl Iterator<Item = (u64, u64)>) -> Result<Option<Known>> {
    let layout = |f: &FileSystem| {
        let sb = &f.fs.sb;
        (sb.uuid, sb.log_block_size, sb.blocks_per_group, sb.inodes_per_group, sb.inode_size, sb.first_data_block)
    };
    if layout(a) != layout(b) {
        return Ok(None);
    }
    let from_store = ranges.map(|(offset, bytes)| (offset, offset.saturating_add(bytes)));
    // What one of them reads from its journal may differ from what the other has in that place.
    let from_journals = [a, b].into_iter().flat_map(|f| {
        let size = f.device.overlay.block_bytes;
        f.device.overlay.blocks.keys().map(move |block| (block * size, (block + 1) * size))
    });
    let bytes = Ranges::new(from_store.chain(from_journals).collect());
    let Some(mut inodes) = changed_inodes(a, b, &bytes)? else { return Ok(None) };

    // Bytes that no changed inode accounts for may be the content of a file whose inode is as it was: written in place
    // within one tick of the clock, or with its times set back. Then all inodes are asked what they have.
    let mut explained = own_places(a)?;
    explained.extend(own_places(b)?);
    for side in [a, b] {
        for ino in &inodes {
            explained.extend(places(side, *ino)?.into_iter().map(|r| (r.physical, r.physical + r.len)));
        }
    }
    let unexplained = in_use(a, b, bytes.without(&Ranges::new(explained)))?;
    if !unexplained.0.is_empty() {
        for ino in 1..=b.fs.sb.inodes_count.min(a.fs.sb.inodes_count) {
            if !inodes.contains(&ino) && places(b, ino)?.iter().any(|run| unexplained.touch(run)) {
                inodes.insert(ino);
            }
        }
    }
    Ok(Some(Known { bytes, inodes }))
}

/// Inodes that are not the same, byte for byte; none if the tables are not in the same places.
fn changed_inodes(a: &FileSystem, b: &FileSystem, bytes: &Ranges) -> Result<Option<HashSet<u32>>> {
    let mut changed = HashSet::new();
    let sb = &a.fs.sb;
    let (per_group, inode_size) = (u64::from(sb.inodes_per_group), u64::from(sb.inode_size));
    let mut slices = [vec![0; inode_size as usize], vec![0; inode_size as usize]];
    for (group, (one, other)) in a.fs.groups.iter().zip(&b.fs.groups).enumerate() {
        if one.inode_table != other.inode_table {
            return Ok(None);
        }
        let table = one.inode_table * a.block_bytes();
        for (from, upto) in bytes.within(table, table + per_group * inode_size) {
            for i in (from - table) / inode_size..(upto - table).div_ceil(inode_size) {
                for (side, slice) in [a, b].into_iter().zip(&mut slices) {
                    side.device.read(table + i * inode_size, slice).map_err(fs_ext4::error::Error::Io)?;
                }
                let ino = group as u64 * per_group + i + 1;
                if slices[0] != slices[1] && ino <= u64::from(u32::MAX) {
                    changed.insert(ino as u32);
                }
            }
        }
    }
    Ok(Some(changed))
}

/// The file system's own places: what differs there is told by inodes.
fn own_places(side: &FileSystem) -> Result<Vec<(u64, u64)>> {
    let (fs, size) = (&side.fs, side.block_bytes());
    let descriptors = (fs.groups.len() as u64 * u64::from(fs.sb.desc_size.max(32))).div_ceil(size);
    let head = u64::from(fs.sb.first_data_block) + 1 + descriptors + u64::from(fs.sb.reserved_gdt_blocks);
    let table = u64::from(fs.sb.inodes_per_group) * u64::from(fs.sb.inode_size);
    let mut own = vec![(0, head * size)];
    for group in &fs.groups {
        for block in [group.block_bitmap, group.inode_bitmap] {
            own.push((block * size, (block + 1) * size));
        }
        own.push((group.inode_table * size, group.inode_table * size + table));
    }
    // Journal, resize inode and the like.
    for ino in 1..fs.sb.first_inode.min(64) {
        if ino != super::ROOT {
            own.extend(places(side, ino)?.into_iter().map(|r| (r.physical, r.physical + r.len)));
        }
    }
    Ok(own)
}

/// All that an inode has on the disk. Nothing, if it is free or cannot be read: whoever has a name for it will be told.
fn places(side: &FileSystem, ino: u32) -> Result<Vec<Run>> {
    let raw = match side.fs.read_inode_raw(ino) {
        Ok(raw) => raw,
        Err(fs_ext4::error::Error::Io(e)) => return Err(fs_ext4::error::Error::Io(e).into()),
        Err(_) => return Ok(Vec::new()),
    };
    let Ok(inode) = Inode::parse(&raw) else { return Ok(Vec::new()) };
    let size = side.block_bytes();
    let attributes = (inode.file_acl != 0).then_some(Run {
        logical: 0,
        physical: inode.file_acl.saturating_mul(size).min(MAX_FILE),
        len: size,
    });
    let mut runs: Vec<Run> = attributes.into_iter().collect();
    let kind = Kind::of_mode(inode.mode).unwrap_or(Kind::File);
    let node = Node { ino, kind, inode, raw };
    if node.has_extents() {
        match side.extents(&node) {
            Ok((data, nodes)) => runs.extend(data.into_iter().chain(nodes)),
            Err(Error::Store(e)) => return Err(Error::Store(e)),
            Err(_) => {}
        }
    }
    Ok(runs)
}

/// Without the blocks that are free in both.
fn in_use(a: &FileSystem, b: &FileSystem, bytes: Ranges) -> Result<Ranges> {
    let size = a.block_bytes();
    let mut used = Vec::new();
    let mut bitmaps = BTreeMap::new();
    for (from, upto) in &bytes.0 {
        for block in from / size..upto.div_ceil(size) {
            let first = u64::from(a.fs.sb.first_data_block);
            let Some(at) = block.checked_sub(first) else { continue };
            let (group, bit) = (at / u64::from(a.fs.sb.blocks_per_group), at % u64::from(a.fs.sb.blocks_per_group));
            let mut is_used = false;
            for (i, side) in [a, b].into_iter().enumerate() {
                let Some(descriptor) = side.fs.groups.get(group as usize) else { continue };
                if bitmaps.len() > 64 {
                    bitmaps.clear();
                }
                let bitmap = match bitmaps.entry((i, group)) {
                    std::collections::btree_map::Entry::Occupied(e) => e.into_mut(),
                    std::collections::btree_map::Entry::Vacant(e) => {
                        e.insert(side.fs.read_block(descriptor.block_bitmap)?)
                    }
                };
                is_used |= bitmap.get(bit as usize / 8).is_none_or(|byte| byte >> (bit % 8) & 1 == 1);
            }
            if is_used {
                used.push((block * size, (block + 1) * size));
            }
        }
    }
    Ok(Ranges::new(used))
}

// ---- comparing

/// A file that only one side has, in a place where both were looked at.
struct Single {
    path: Vec<u8>,
    node: Node,
}

struct Comparison<'a> {
    sides: [&'a FileSystem; 2],
    /// None: nothing is known to be equal.
    known: Option<Known>,
    out: FileDiff,
    gone: Vec<Single>,
    new: Vec<Single>,
}

/// Directories that both have, and how deep they are.
type Pairs = Vec<(Vec<u8>, [Option<Node>; 2], usize)>;

impl Comparison<'_> {
    /// Whether inode, attributes and content are equal.
    fn is_same(&self, ino: u32) -> bool {
        self.known.as_ref().is_some_and(|known| !known.inodes.contains(&ino))
    }

    /// Compares what is below two directories; one of them, if they are the same.
    fn compare(&mut self, path: Vec<u8>, roots: [Option<Node>; 2], visited: &mut [Visited; 2]) -> Result<()> {
        let mut todo: Pairs = vec![(path, roots, 0)];
        while let Some((path, [Some(one), other], depth)) = todo.pop() {
            if depth > MAX_DEPTH {
                return Err(Error::Unreadable("its directories are nested too deeply".to_owned()));
            }
            visited[0].enter(one.ino)?;
            let entries = self.sides[0].read_dir(&one)?;
            let others = match &other {
                // The same directory has the same names for the same inodes.
                None => {
                    visited[1].enter(one.ino)?;
                    None
                }
                Some(other) => {
                    visited[1].enter(other.ino)?;
                    self.change(&path, &one, other)?;
                    Some(self.sides[1].read_dir(other)?)
                }
            };
            match others {
                None => {
                    for entry in &entries {
                        self.both(&path, entry, entry, depth, &mut todo)?;
                    }
                }
                Some(others) => self.merge(&path, &entries, &others, depth, &mut todo)?,
            }
        }
        Ok(())
    }

    fn merge(&mut self, path: &[u8], a: &[Entry], b: &[Entry], depth: usize, todo: &mut Pairs) -> Result<()> {
        let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
        loop {
            let order = match (a.peek(), b.peek()) {
                (None, None) => return Ok(()),
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some(x), Some(y)) => x.name.cmp(&y.name),
            };
            let one = if order.is_le() { a.next() } else { None };
            let other = if order.is_ge() { b.next() } else { None };
            match (one, other) {
                (Some(one), Some(other)) => self.both(path, one, other, depth, todo)?,
                (Some(one), None) => {
                    let node = self.sides[0].node(one.ino)?;
                    self.gone.push(Single { path: join(path, &one.name), node });
                }
                (None, Some(other)) => {
                    let node = self.sides[1].node(other.ino)?;
                    self.new.push(Single { path: join(path, &other.name), node });
                }
                (None, None) => {}
            }
        }
    }

    /// A name that both have.
    fn both(&mut self, path: &[u8], one: &Entry, other: &Entry, depth: usize, todo: &mut Pairs) -> Result<()> {
        let path = join(path, &one.name);
        if one.ino == other.ino && self.is_same(one.ino) {
            if !one.is_directory {
                return Ok(());
            }
            let node = self.sides[0].node(one.ino)?;
            if node.kind == Kind::Directory {
                todo.push((path, [Some(node), None], depth + 1));
            }
            return Ok(());
        }
        let (one, other) = (self.sides[0].node(one.ino)?, self.sides[1].node(other.ino)?);
        if one.kind != other.kind {
            self.gone.push(Single { path: path.clone(), node: one });
            self.new.push(Single { path, node: other });
        } else if one.kind == Kind::Directory {
            todo.push((path, [Some(one), Some(other)], depth + 1));
        } else {
            self.change(&path, &one, &other)?;
        }
        Ok(())
    }

    /// Tells of a file that both have, if it differs.
    fn change(&mut self, path: &[u8], one: &Node, other: &Node) -> Result<()> {
        let parts = self.parts(one, other)?;
        if parts.is_empty() {
            return Ok(());
        }
        let [before, after] = [one, other].map(size_of);
        self.tell(FileChange {
            path: show(path),
            how: How::Changed,
            kind: one.kind,
            from: None,
            parts,
            size_before: before,
            size_after: after,
        });
        Ok(())
    }

    fn parts(&self, one: &Node, other: &Node) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        let [a, b] = self.sides;
        let content = match one.kind {
            Kind::File => !self.equal_content(one, other)?,
            Kind::Symlink => a.read_link(one)? != b.read_link(other)?,
            _ => one.device() != other.device(),
        };
        if content {
            parts.push(Part::Content);
        }
        if one.mode() != other.mode() {
            parts.push(Part::Mode);
        }
        if (one.uid(), one.gid()) != (other.uid(), other.gid()) {
            parts.push(Part::Owner);
        }
        if a.xattrs(one)? != b.xattrs(other)? {
            parts.push(Part::Xattrs);
        }
        if !content && one.kind != Kind::Directory && one.modified() != other.modified() {
            parts.push(Part::Modified);
        }
        Ok(parts)
    }

    fn equal_content(&self, one: &Node, other: &Node) -> Result<bool> {
        if one.size() != other.size() {
            return Ok(false);
        }
        let [a, b] = self.sides;
        let (one, other) = (a.open_file(one.clone())?, b.open_file(other.clone())?);
        let (size, mut at) = (one.node.size(), 0);
        let mut bytes = [vec![0; PIECE as usize], vec![0; PIECE as usize]];
        while at < size {
            let skip = self.equal_from(&one, &other, at);
            if skip > 0 {
                at += skip;
                continue;
            }
            let lengths = [a.read(&one, at, &mut bytes[0])?, b.read(&other, at, &mut bytes[1])?];
            if lengths[0] == 0 || lengths[0] != lengths[1] || bytes[0][..lengths[0]] != bytes[1][..lengths[1]] {
                return Ok(false);
            }
            at += lengths[0] as u64;
        }
        Ok(true)
    }

    /// How many bytes from `at` on are known to be equal without being read.
    fn equal_from(&self, one: &File, other: &File, at: u64) -> u64 {
        let (Some(mine), Some(theirs)) = (&one.runs, &other.runs) else { return 0 };
        let run_at = |runs: &[Run]| {
            let i = runs.partition_point(|r| r.logical + r.len <= at);
            match runs.get(i) {
                Some(run) if run.logical <= at => {
                    let into = at - run.logical;
                    (Some(run.physical + into), run.len - into)
                }
                // A hole.
                Some(run) => (None, run.logical - at),
                None => (None, one.node.size() - at),
            }
        };
        let ((mine, len), (theirs, other_len)) = (run_at(mine), run_at(theirs));
        let len = len.min(other_len);
        match (mine, theirs, &self.known) {
            (None, None, _) => len,
            (Some(mine), Some(theirs), Some(known)) if mine == theirs => {
                known.bytes.within(mine, mine + len).next().map_or(len, |(from, _)| from - mine)
            }
            _ => 0,
        }
    }

    fn tell(&mut self, change: FileChange) {
        if self.out.changes.len() < MAX_CHANGES {
            self.out.changes.push(change);
        } else {
            self.out.truncated = true;
        }
    }

    /// Pairs what is gone with what is new where it is the same file; tells of the rest.
    fn match_renamed(&mut self, visited: &mut [Visited; 2]) -> Result<()> {
        loop {
            let (gone, new) = (std::mem::take(&mut self.gone), std::mem::take(&mut self.new));
            if gone.is_empty() && new.is_empty() {
                return Ok(());
            }
            // A number is given again after a file is gone; generation and kind tell the difference.
            let key = |s: &Single| (s.node.ino, s.node.inode.generation, s.node.kind as u8);
            let mut found: BTreeMap<_, Vec<Single>> = BTreeMap::new();
            let is_related = self.known.is_some();
            let mut old = Vec::new();
            for single in gone {
                if is_related { found.entry(key(&single)).or_default().push(single) } else { old.push(single) }
            }
            for single in new {
                match found.get_mut(&key(&single)).and_then(Vec::pop) {
                    Some(was) => self.renamed(was, single, visited)?,
                    None => self.whole(1, single, How::Added, &mut visited[1])?,
                }
            }
            for single in found.into_values().flatten().chain(old) {
                self.whole(0, single, How::Removed, &mut visited[0])?;
            }
        }
    }

    fn renamed(&mut self, was: Single, is: Single, visited: &mut [Visited; 2]) -> Result<()> {
        let same = self.is_same(is.node.ino);
        let parts = if same { Vec::new() } else { self.parts(&was.node, &is.node)? };
        let [before, after] = [&was.node, &is.node].map(size_of);
        self.tell(FileChange {
            path: show(&is.path),
            how: How::Renamed,
            kind: is.node.kind,
            from: Some(show(&was.path)),
            parts,
            size_before: before,
            size_after: after,
        });
        if is.node.kind != Kind::Directory {
            return Ok(());
        }
        let told = self.out.changes.len();
        self.compare(is.path, [Some(was.node), (!same).then_some(is.node)], visited)?;
        // The directory's own attributes have been told with its name.
        if let Some(again) = self.out.changes.get(told)
            && again.how == How::Changed
            && Some(&again.path) == self.out.changes.get(told - 1).map(|c| &c.path)
        {
            self.out.changes.remove(told);
        }
        Ok(())
    }

    /// Tells of a file, and of all below it if it is a directory.
    fn whole(&mut self, side: usize, single: Single, how: How, visited: &mut Visited) -> Result<()> {
        let mut todo = vec![single];
        while let Some(Single { path, node }) = todo.pop() {
            let size = size_of(&node);
            self.tell(FileChange {
                path: show(&path),
                how,
                kind: node.kind,
                from: None,
                parts: Vec::new(),
                size_before: size.filter(|_| how == How::Removed),
                size_after: size.filter(|_| how == How::Added),
            });
            if node.kind == Kind::Directory {
                visited.enter(node.ino)?;
                if self.out.truncated || path.len() > MAX_DEPTH * 256 {
                    continue;
                }
                for entry in self.sides[side].read_dir(&node)? {
                    todo.push(Single { path: join(&path, &entry.name), node: self.sides[side].node(entry.ino)? });
                }
            }
        }
        Ok(())
    }
}

/// Of directories it says nothing.
fn size_of(node: &Node) -> Option<u64> {
    (node.kind == Kind::File).then(|| node.size())
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    [path, b"/", name].concat()
}

fn show(path: &[u8]) -> String {
    if path.is_empty() { "/".to_owned() } else { String::from_utf8_lossy(path).into_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_and_left_over() {
        let ranges = Ranges::new(vec![(10, 20), (0, 4), (18, 30), (5, 5)]);
        assert_eq!(ranges.0, [(0, 4), (10, 30)]);
        assert_eq!(ranges.within(3, 12).collect::<Vec<_>>(), [(3, 4), (10, 12)]);
        assert_eq!(ranges.within(4, 10).count(), 0);
        let left = ranges.without(&Ranges::new(vec![(2, 11), (15, 16), (29, 40)]));
        assert_eq!(left.0, [(0, 2), (11, 15), (16, 29)]);
    }
}
