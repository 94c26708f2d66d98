//! When the gradient of a parameter is final: once the backward is past the first operation that used it.

use std::collections::BTreeMap;

use super::{Backward, Sink, Told};
use crate::{ParamId, Params, Result};

/// The trainable parameters by the place of the operation that used them first. Those that are stacked count as one:
/// their gradients lie together.
pub(super) struct Finals {
    unused: Vec<ParamId>,
    by_node: BTreeMap<usize, Vec<ParamId>>,
}

impl Finals {
    pub(super) fn of(nodes: &[Box<dyn Backward + '_>], params: &Params) -> Self {
        let mut first: Vec<Option<usize>> = vec![None; params.len()];
        for (i, node) in nodes.iter().enumerate() {
            for id in node.params().iter().flat_map(|id| params.stack_of(*id)) {
                first[id.0].get_or_insert(i);
            }
        }
        let mut finals = Self { unused: Vec::new(), by_node: BTreeMap::new() };
        for (id, _) in params.iter().filter(|(_, param)| param.trainable) {
            match first[id.0] {
                Some(i) => finals.by_node.entry(i).or_default().push(id),
                None => finals.unused.push(id),
            }
        }
        finals
    }

    /// Those that no operation used: only the loss, which has written their gradients.
    pub(super) fn at_start(&self) -> &[ParamId] {
        &self.unused
    }

    /// Those that are final once an operation's backward is done.
    pub(super) fn after(&self, node: usize) -> &[ParamId] {
        self.by_node.get(&node).map_or(&[], Vec::as_slice)
    }
}

impl Sink<'_> {
    /// Adds what still waits for these gradients, and tells of them.
    pub(super) fn close(&mut self, ids: &[ParamId], told: Told<'_>) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        self.settle_all_of(ids)?;
        self.closed.extend(ids);
        told(ids, &mut self.grads)
    }

    /// An operation must name all parameters that it uses, or a gradient would be sent before it is complete.
    pub(super) fn expect_open(&self, ids: &[ParamId]) {
        let closed = ids.iter().find(|id| self.closed.contains(id));
        assert!(closed.is_none(), "an operation adds to a gradient that is final: {closed:?}");
    }
}
