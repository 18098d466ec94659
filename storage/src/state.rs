//! What a disk holds at an instant: a map root and an overlay; and the fork points that several of them grew from.

use crate::block::LogPos;
use crate::domain::Domain;
use crate::format::NodeRef;
use crate::overlay::Overlay;
use parking_lot::RwLock;
use std::sync::{Arc, OnceLock};

/// A disk's contents: the overlay where it holds something, else the map. Cloning costs two reference counts.
#[derive(Clone, Default)]
pub(crate) struct State {
    pub root: NodeRef,
    pub overlay: Overlay,
    /// The fork point this state grew out of, while that is not sealed. Its overlay is part of ours.
    pub base: Option<Arc<Layer>>,
    /// Of what came after the fork point.
    pub domain: Domain,
}

/// A fork point: a state that no longer changes and that disks and snapshots grew out of. Sealing it once serves all of
/// them: afterwards they stand on its root and keep only what came later.
pub(crate) struct Layer {
    /// Every record in the overlay is before this, every later one at or after it.
    pub upto: LogPos,
    /// Level of the root it is sealed with: that of the disk it is a state of. Larger forks may have grown from it.
    pub level: u32,
    pub frozen: RwLock<State>,
    /// The root that holds everything, once it is durable.
    pub sealed: OnceLock<NodeRef>,
}

impl State {
    /// Makes the present contents a fork point and returns it; `None` when the map has everything and there is nothing
    /// to share. `end` is the log's end, `level` that of the
    /// disk's root. O(1).
    pub fn freeze(&mut self, end: LogPos, level: u32) -> Option<Arc<Layer>> {
        if self.overlay.is_empty() {
            self.base = None;
            return None;
        }
        if let Some(base) = &self.base
            && base.frozen.read().overlay.same(&self.overlay)
        {
            return Some(base.clone());
        }
        let layer = Arc::new(Layer { upto: end, level, frozen: RwLock::new(self.clone()), sealed: OnceLock::new() });
        self.base = Some(layer.clone());
        Some(layer)
    }

    /// The fork points below, newest first, that are not sealed; and the first that is.
    pub fn chain(&self) -> (Vec<Arc<Layer>>, Option<Arc<Layer>>) {
        let mut open = Vec::new();
        let mut next = self.base.clone();
        while let Some(layer) = next {
            if layer.sealed.get().is_some() {
                return (open, Some(layer));
            }
            next = layer.frozen.read().base.clone();
            open.push(layer);
        }
        (open, None)
    }

    /// Stands on the newest sealed fork point below, keeping only what came after it.
    pub fn rebase(&mut self) {
        let (open, Some(sealed)) = self.chain() else { return };
        let Some(root) = sealed.sealed.get() else { return };
        self.overlay = Overlay::from_extents(self.overlay.since(&sealed.frozen.read().overlay, sealed.upto));
        self.root = *root;
        if open.is_empty() {
            self.base = None;
        }
    }
}

impl Drop for Layer {
    /// Unlinks a chain of fork points one by one: dropping it by recursion could overflow the stack.
    fn drop(&mut self) {
        let mut next = self.frozen.get_mut().base.take();
        while let Some(layer) = next {
            let Some(mut last) = Arc::into_inner(layer) else { break };
            next = last.frozen.get_mut().base.take();
        }
    }
}
