//! What is live: the addresses that some root reaches.

use crate::block::{BlockId, GroupId};
use crate::blocks::Blocks;
use crate::error::Result;
use crate::format::{Node, NodeRef};
use crate::map::NodeSource;
use roaring::RoaringTreemap;

/// The addresses that are live, as of a mark.
pub(crate) struct Live {
    pub ids: RoaringTreemap,
    /// Groups from here on were not looked at.
    pub upto: GroupId,
}

impl Live {
    /// May this block be referred to from now on?
    pub fn keeps(&self, id: BlockId) -> bool {
        id.group() >= self.upto || self.ids.contains(id.0)
    }

    /// The slots of a group that are live.
    pub fn slots(&self, group: GroupId, slots: u16) -> u16 {
        (0..16).filter(|s| slots >> s & 1 == 1 && self.keeps(BlockId::new(group, *s))).fold(0, |all, s| all | 1 << s)
    }
}

/// Adds everything a tree reaches to `ids`. A node that is there already has been walked.
pub(crate) fn mark(blocks: &Blocks, at: NodeRef, ids: &mut RoaringTreemap) -> Result<()> {
    if at.node.is_none() || !ids.insert(at.node.0) {
        return Ok(());
    }
    match &*blocks.node(at.node)? {
        Node::Leaf(extents) => {
            for extent in extents {
                ids.insert_range(extent.block.0..extent.block.0 + u64::from(extent.len));
            }
            Ok(())
        }
        Node::Inner { children, .. } => children.iter().try_for_each(|child| mark(blocks, *child, ids)),
    }
}
