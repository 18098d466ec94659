//! The map from a disk's block numbers to stored blocks: a radix tree of immutable nodes.
//!
//! A leaf covers 512 blocks with extents; an inner node has 256 children. A root is immutable, so a snapshot or fork
//! keeps it by copying twelve bytes; an update writes new nodes for the paths that change and shares the rest. Every
//! reference carries the number of mapped blocks below it, so that a disk knows its logical size without a walk.
//!
//! A node may stand at a place above its own level: it then covers the beginning of that place, and nothing else there is
//! mapped. That is how a fork that is larger than what it was made from has the same root.

use crate::block::BlockId;
use crate::error::Result;
use crate::format::{INNER_BITS, LEAF_BITS, LeafExtent, Node, NodeRef, push_extent};
use std::sync::Arc;

/// Where nodes come from.
pub(crate) trait NodeSource {
    fn node(&self, id: BlockId) -> Result<Arc<Node>>;
}

/// Where new nodes go.
pub(crate) trait NodeSink: NodeSource {
    fn put_node(&mut self, node: Node) -> Result<BlockId>;
}

/// Blocks `start..start + len` now hold the stored blocks from `block` on, or nothing if that is [`BlockId::NONE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Change {
    pub start: u64,
    pub len: u64,
    pub block: BlockId,
}

/// Appends to sorted changes, joining runs.
pub(crate) fn push_change(changes: &mut Vec<Change>, start: u64, len: u64, block: BlockId) {
    if let Some(last) = changes.last_mut()
        && last.start + last.len == start
        && (if block.is_none() {
            last.block.is_none()
        } else {
            !last.block.is_none() && last.block.plus(last.len) == block
        })
    {
        last.len += len;
        return;
    }
    changes.push(Change { start, len, block });
}

/// The level of the root of a disk with this many blocks: 0 is a leaf.
pub(crate) fn levels(blocks: u64) -> u32 {
    let mut level = 0;
    while blocks > span(level) {
        level += 1;
    }
    level
}

/// Blocks below a node of this level.
fn span(level: u32) -> u64 {
    1 << (LEAF_BITS + INNER_BITS * level)
}

/// Calls `f(start, len, block)` for consecutive pieces that cover `start..start + len` of the tree at `root`, whose
/// root is at `level`; `block` is [`BlockId::NONE`] where nothing is mapped.
pub(crate) fn pieces<E: From<crate::Error>>(
    source: &dyn NodeSource,
    root: NodeRef,
    level: u32,
    start: u64,
    len: u64,
    f: &mut dyn FnMut(u64, u64, BlockId) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    visit(source, root, level, 0, start, start + len, f)
}

fn visit<E: From<crate::Error>>(
    source: &dyn NodeSource,
    at: NodeRef,
    level: u32,
    base: u64,
    start: u64,
    end: u64,
    f: &mut dyn FnMut(u64, u64, BlockId) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    if start >= end {
        return Ok(());
    }
    if at.node.is_none() {
        return f(start, end - start, BlockId::NONE);
    }
    let node = source.node(at.node)?;
    if node.level() < level {
        let covered = base + span(node.level());
        visit(source, at, node.level(), base, start, end.min(covered), f)?;
        let rest = start.max(covered);
        return if rest < end { f(rest, end - rest, BlockId::NONE) } else { Ok(()) };
    }
    match &*node {
        Node::Leaf(extents) => {
            let mut next = start;
            // The first extent that ends beyond `start`.
            let first = extents.partition_point(|e| base + u64::from(e.offset + e.len) <= start);
            for e in &extents[first..] {
                let from = (base + u64::from(e.offset)).max(start);
                if from >= end {
                    break;
                }
                let upto = (base + u64::from(e.offset + e.len)).min(end);
                if from > next {
                    f(next, from - next, BlockId::NONE)?;
                }
                f(from, upto - from, e.block.plus(from - base - u64::from(e.offset)))?;
                next = upto;
            }
            if next < end { f(next, end - next, BlockId::NONE) } else { Ok(()) }
        }
        Node::Inner { level: found, children } => {
            if u32::from(*found) != level {
                return Err(wrong_level(at.node).into());
            }
            let below = span(level - 1);
            let first = (start - base) / below;
            let last = (end - 1 - base) / below;
            for i in first..=last {
                let child_base = base + i * below;
                let (from, upto) = (start.max(child_base), end.min(child_base + below));
                visit(source, children[i as usize], level - 1, child_base, from, upto, f)?;
            }
            Ok(())
        }
    }
}

/// The children of an inner node in whose place a lower node stands.
fn lifted(at: NodeRef) -> Vec<NodeRef> {
    let mut children = vec![NodeRef::default(); 1 << INNER_BITS];
    children[0] = at;
    children
}

fn wrong_level(node: BlockId) -> crate::Error {
    crate::Error::damaged(format!("map node {} is not at the level its parent says", node.0))
}

/// Calls `f(start, len)` for runs of blocks, in order, that two trees of the same height map differently. Shared nodes are
/// not walked.
pub(crate) fn differences(
    source: &dyn NodeSource,
    a: NodeRef,
    b: NodeRef,
    level: u32,
    base: u64,
    f: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    if a.node == b.node {
        return Ok(());
    }
    if level > 0 {
        let children = |at: NodeRef| -> Result<Vec<NodeRef>> {
            if at.node.is_none() {
                return Ok(vec![NodeRef::default(); 1 << INNER_BITS]);
            }
            match &*source.node(at.node)? {
                Node::Inner { level: found, children } if u32::from(*found) == level => Ok(children.clone()),
                node if node.level() < level => Ok(lifted(at)),
                _ => Err(wrong_level(at.node)),
            }
        };
        for (i, (a, b)) in children(a)?.into_iter().zip(children(b)?).enumerate() {
            differences(source, a, b, level - 1, base + i as u64 * span(level - 1), f)?;
        }
        return Ok(());
    }
    let ids = |at: NodeRef| -> Result<Vec<BlockId>> {
        let mut ids = Vec::with_capacity(1 << LEAF_BITS);
        pieces::<crate::Error>(source, at, 0, 0, span(0), &mut |_, len, block| {
            ids.extend((0..len).map(|i| if block.is_none() { block } else { block.plus(i) }));
            Ok(())
        })?;
        Ok(ids)
    };
    for (i, (a, b)) in ids(a)?.into_iter().zip(ids(b)?).enumerate() {
        if a != b {
            f(base + i as u64, 1);
        }
    }
    Ok(())
}

/// Mapped blocks in `start..end`.
pub(crate) fn mapped(source: &dyn NodeSource, root: NodeRef, level: u32, start: u64, end: u64) -> Result<u64> {
    count(source, root, level, 0, start, end)
}

fn count(source: &dyn NodeSource, at: NodeRef, level: u32, base: u64, start: u64, end: u64) -> Result<u64> {
    if at.node.is_none() || start >= end {
        return Ok(0);
    }
    if start <= base && end >= base + span(level) {
        return Ok(at.mapped);
    }
    let node = source.node(at.node)?;
    if node.level() < level {
        return count(source, at, node.level(), base, start, end.min(base + span(node.level())));
    }
    match &*node {
        Node::Leaf(extents) => Ok(extents
            .iter()
            .map(|e| {
                let from = (base + u64::from(e.offset)).max(start);
                (base + u64::from(e.offset + e.len)).min(end).saturating_sub(from)
            })
            .sum()),
        Node::Inner { level: found, .. } if u32::from(*found) != level => Err(wrong_level(at.node)),
        Node::Inner { children, .. } => {
            let below = span(level - 1);
            let mut total = 0;
            for i in (start.max(base) - base) / below..=(end.min(base + span(level)) - 1 - base) / below {
                let child_base = base + i * below;
                let (from, upto) = (start.max(child_base), end.min(child_base + below));
                total += count(source, children[i as usize], level - 1, child_base, from, upto)?;
            }
            Ok(total)
        }
    }
}

/// The tree after `changes`, which are sorted and do not overlap. New nodes go to `sink`, children before parents; what
/// does not change is shared with the old tree, and an update that changes nothing returns the old root.
pub(crate) fn update(sink: &mut dyn NodeSink, root: NodeRef, level: u32, changes: &[Change]) -> Result<NodeRef> {
    rewrite(sink, root, level, 0, changes)
}

fn rewrite(sink: &mut dyn NodeSink, at: NodeRef, level: u32, base: u64, changes: &[Change]) -> Result<NodeRef> {
    // Only the first and last change can reach beyond this subtree.
    let (from, upto) = (base, base + span(level));
    let clip = |c: &Change| -> Change {
        let start = c.start.max(from);
        let end = (c.start + c.len).min(upto);
        let block = if c.block.is_none() { c.block } else { c.block.plus(start - c.start) };
        Change { start, len: end - start, block }
    };
    if let [only] = changes {
        let c = clip(only);
        if c.block.is_none() && (at.node.is_none() || (c.start == from && c.len == span(level))) {
            return Ok(NodeRef::default());
        }
    }
    let old = if at.node.is_none() { None } else { Some(sink.node(at.node)?) };
    if level == 0 {
        let old: &[LeafExtent] = match old.as_deref() {
            None => &[],
            Some(Node::Leaf(extents)) => extents,
            Some(Node::Inner { .. }) => return Err(wrong_level(at.node)),
        };
        let extents = merge_leaf(old, base, changes.iter().map(clip));
        if extents == old {
            return Ok(at);
        }
        return finish(sink, extents.iter().map(|e| u64::from(e.len)).sum(), || Node::Leaf(extents));
    }
    let mut children = match old.as_deref() {
        None => vec![NodeRef::default(); 1 << INNER_BITS],
        Some(Node::Inner { level: found, children }) if u32::from(*found) == level => children.clone(),
        Some(node) if node.level() < level => lifted(at),
        Some(_) => return Err(wrong_level(at.node)),
    };
    let below = span(level - 1);
    let mut rest = changes;
    let mut next = from;
    let mut changed = false;
    while let Some(first) = rest.first()
        && next < upto
    {
        let i = (first.start.max(next) - base) / below;
        let (child_from, child_upto) = (base + i * below, base + (i + 1) * below);
        let here = rest.partition_point(|c| c.start < child_upto);
        let new = rewrite(sink, children[i as usize], level - 1, child_from, &rest[..here])?;
        changed |= new != children[i as usize];
        children[i as usize] = new;
        // A change that reaches beyond this child stays, for the next one.
        rest = &rest[rest.partition_point(|c| c.start + c.len <= child_upto)..];
        next = child_upto;
    }
    if !changed {
        return Ok(at);
    }
    finish(sink, children.iter().map(|c| c.mapped).sum(), || Node::Inner { level: level as u8, children })
}

fn finish(sink: &mut dyn NodeSink, mapped: u64, node: impl FnOnce() -> Node) -> Result<NodeRef> {
    if mapped == 0 {
        return Ok(NodeRef::default());
    }
    Ok(NodeRef { node: sink.put_node(node())?, mapped })
}

/// A leaf's extents with sorted, clipped `changes` laid over them.
fn merge_leaf(old: &[LeafExtent], base: u64, changes: impl Iterator<Item = Change>) -> Vec<LeafExtent> {
    let mut out = Vec::with_capacity(old.len() + 4);
    let mut next = 0;
    // Copies what `old` has in `next..upto`.
    let copy = |out: &mut Vec<LeafExtent>, next: u16, upto: u16| {
        let first = old.partition_point(|e| e.offset + e.len <= next);
        for e in old[first..].iter().take_while(|e| e.offset < upto) {
            let from = e.offset.max(next);
            let end = (e.offset + e.len).min(upto);
            push_extent(out, from, end - from, e.block.plus(u64::from(from - e.offset)));
        }
    };
    for c in changes {
        let offset = (c.start - base) as u16;
        copy(&mut out, next, offset);
        push_extent(&mut out, offset, c.len as u16, c.block);
        next = offset + c.len as u16;
    }
    copy(&mut out, next, 1 << LEAF_BITS);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::medium::sim::Random;
    use std::collections::HashMap;

    /// Nodes in memory, encoded and decoded on the way so that the format is tested too.
    #[derive(Default)]
    struct Nodes {
        nodes: HashMap<u64, Vec<u8>>,
    }

    impl NodeSource for Nodes {
        fn node(&self, id: BlockId) -> Result<Arc<Node>> {
            Ok(Arc::new(Node::decode(&self.nodes[&id.0]).expect("a node this test wrote")))
        }
    }

    impl NodeSink for Nodes {
        fn put_node(&mut self, node: Node) -> Result<BlockId> {
            let id = self.nodes.len() as u64 + 1;
            self.nodes.insert(id, node.encode());
            Ok(BlockId(id))
        }
    }

    fn show(nodes: &Nodes, root: NodeRef, level: u32, start: u64, len: u64) -> Vec<u64> {
        let mut out = Vec::new();
        pieces::<crate::Error>(nodes, root, level, start, len, &mut |at, len, block| {
            assert_eq!(at, start + out.len() as u64);
            out.extend((0..len).map(|i| if block.is_none() { 0 } else { block.0 + i }));
            Ok(())
        })
        .unwrap();
        out
    }

    #[test]
    fn a_tree_is_read_and_updated_at_a_place_above_its_own() {
        let mut random = Random(5);
        for (small, large) in [(300, 5_000), (300, 200_000), (5_000, 200_000)] {
            let mut nodes = Nodes::default();
            let mut model = vec![0u64; large as usize];
            let mut change = |nodes: &mut Nodes, model: &mut Vec<u64>, root, level, below: u64| {
                let start = random.below(below);
                let len = 1 + random.below(40.min(below - start));
                let block = BlockId(1 + random.below(1 << 40));
                (0..len).for_each(|i| model[(start + i) as usize] = block.0 + i);
                update(nodes, root, level, &[Change { start, len, block }]).unwrap()
            };
            let mut root = NodeRef::default();
            for _ in 0..10 {
                root = change(&mut nodes, &mut model, root, levels(small), small);
            }
            let before = root;
            for _ in 0..10 {
                assert_eq!(show(&nodes, root, levels(large), 0, large), model);
                assert_eq!(show(&nodes, root, levels(large), 200, large - 200), model[200..]);
                let some = model[..4_000].iter().filter(|b| **b != 0).count() as u64;
                assert_eq!(mapped(&nodes, root, levels(large), 0, 4_000).unwrap(), some);
                let mut differ = std::collections::BTreeSet::new();
                let mut note = |start, len| differ.extend(start..start + len);
                differences(&nodes, before, root, levels(large), 0, &mut note).unwrap();
                let was = show(&nodes, before, levels(large), 0, large);
                assert!(differ.iter().copied().eq((0..large).filter(|i| was[*i as usize] != model[*i as usize])));
                root = change(&mut nodes, &mut model, root, levels(large), large);
            }
            // A tree above its place is no tree of that disk.
            assert!(pieces::<crate::Error>(&nodes, root, levels(small), 0, small, &mut |_, _, _| Ok(())).is_err());
        }
    }

    #[test]
    fn agrees_with_an_array_and_old_roots_do_not_change() {
        let mut random = Random(3);
        for round in 0..30 {
            let blocks = [300, 5_000, 200_000][round % 3];
            let level = levels(blocks);
            let mut nodes = Nodes::default();
            let mut root = NodeRef::default();
            let mut model = vec![0u64; blocks as usize];
            let mut history = Vec::new();
            for _ in 0..20 {
                let mut changes = Vec::new();
                let mut at = random.below(blocks);
                while at < blocks && changes.len() < 40 {
                    let reach = if random.below(8) == 0 { blocks } else { 40 };
                    let len = (1 + random.below(reach)).min(blocks - at);
                    let block = if random.below(3) == 0 { BlockId::NONE } else { BlockId(1 + random.below(1 << 40)) };
                    changes.push(Change { start: at, len, block });
                    for i in 0..len {
                        model[(at + i) as usize] = if block.is_none() { 0 } else { block.0 + i };
                    }
                    at += len + random.below(blocks / 10);
                }
                root = update(&mut nodes, root, level, &changes).unwrap();
                assert_eq!(root.mapped, model.iter().filter(|b| **b != 0).count() as u64);
                assert_eq!(update(&mut nodes, root, level, &changes).unwrap(), root, "the same change again");
                history.push((root, model.clone()));
            }
            for (root, model) in history {
                assert_eq!(show(&nodes, root, level, 0, blocks), model);
                let start = random.below(blocks);
                let len = random.below(blocks - start);
                let part = &model[start as usize..(start + len) as usize];
                assert_eq!(show(&nodes, root, level, start, len), part);
                let want = part.iter().filter(|b| **b != 0).count() as u64;
                assert_eq!(mapped(&nodes, root, level, start, start + len).unwrap(), want);
            }
        }
    }
}
