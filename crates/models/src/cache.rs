//! Keys and values of one sequence while it is decoded, and the tree of tokens that stands on top of it until some
//! of them are accepted.

use specforge_tensor::{Device, Tensor};

use crate::reach::Reach;
use crate::{Error, Result, Target};

/// Keys and values of one sequence, per layer; after [`Target::extend`] with a tree, its nodes too.
///
/// Rows are appended in place; a clone shares them until one of the two is written.
#[derive(Debug, Clone)]
pub struct KvCache {
    /// Keys and values, each `[rows, n_kv_heads · head_dim]`; or what a layer reads of earlier rows instead.
    layers: Vec<Vec<Tensor>>,
    /// Per layer with a recurrence, its state after so many rows, at two places at most: before the last extension, and
    /// after it where that was no tree. What lies between is computed again from the cached rows.
    states: Vec<Vec<(usize, Tensor)>>,
    /// Rows before the last extension, and the parents of the rows in it.
    last: (usize, Vec<u32>),
    is_tree: bool,
}

impl KvCache {
    /// An empty cache with room for `capacity` rows, tree nodes included; it grows beyond where it has to.
    pub fn new(target: &Target, capacity: usize) -> Result<Self> {
        let info = target.info();
        let empty = |width: &usize| -> Result<Tensor> {
            // Truncating keeps the storage, and on the CPU zeroed storage takes no memory before it is written.
            let shape = [capacity.min(info.max_position_embeddings), *width];
            let mut rows = Tensor::activations(target.device(), &shape)?;
            rows.truncate_rows(0);
            Ok(rows)
        };
        let layer = |widths: &Vec<usize>| widths.iter().map(empty).collect::<Result<_>>();
        let layers: Vec<_> = target.cached().iter().map(layer).collect::<Result<_>>()?;
        let states = vec![Vec::new(); layers.len()];
        Ok(Self { layers, states, last: (0, Vec::new()), is_tree: false })
    }

    /// Rows held: the sequence, and the nodes of a tree that is not settled yet.
    pub fn len(&self) -> usize {
        self.layers.first().and_then(|rows| rows.first()).map_or(0, |rows| rows.rows_cols().0)
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Settles the last extension: of its rows only `accepted` stay, a path from the sequence's end (each row the
    /// child of the one before). `n_before` is the length before that extension.
    pub fn keep(&mut self, n_before: usize, accepted: &[usize]) -> Result<()> {
        let (first, parents) = &self.last;
        if n_before != *first {
            let why = format!("keep after row {n_before}, but the last extension started at row {first}");
            return Err(Error::Cache(why));
        }
        let mut parent = u32::MAX;
        for &node in accepted {
            if parents.get(node) != Some(&parent) {
                let why = format!(
                    "accepted nodes {accepted:?} are not a path of the tree with parents {parents:?}"
                );
                return Err(Error::Cache(why));
            }
            parent = node as u32;
        }
        if !accepted.iter().copied().eq(0..accepted.len()) {
            self.compact(n_before, accepted)?;
        }
        self.truncate(n_before + accepted.len());
        Ok(())
    }

    /// Drops all rows from the `n`-th on.
    pub fn truncate(&mut self, n: usize) {
        if n < self.len() {
            self.layers.iter_mut().flatten().for_each(|rows| rows.truncate_rows(n));
        }
        self.last = (self.len(), Vec::new());
        self.is_tree = false;
    }

    /// Moves the rows of accepted nodes to the front of the extension.
    fn compact(&mut self, first: usize, accepted: &[usize]) -> Result<()> {
        let index: Vec<u32> = accepted.iter().map(|&node| (first + node) as u32).collect();
        for rows in self.layers.iter_mut().flatten() {
            let device = rows.device();
            let kept = device.kernels().gather_rows(rows, &Tensor::from_u32(device, index.clone()))?;
            rows.truncate_rows(first);
            rows.append_rows(&kept)?;
        }
        Ok(())
    }

    /// Announces rows with these parents; `tree` if they are no continuation.
    pub(crate) fn begin(&mut self, parents: Vec<u32>, is_tree: bool) -> Result<()> {
        if self.is_tree {
            let nodes = self.last.1.len();
            return Err(Error::Cache(format!(
                "it ends with a tree of {nodes} nodes: keep() or truncate() comes first"
            )));
        }
        (self.last, self.is_tree) = ((self.len(), parents), is_tree);
        Ok(())
    }

    pub(crate) fn append(&mut self, layer: usize, rows: &[&Tensor]) -> Result<()> {
        for (cached, new) in self.layers[layer].iter_mut().zip(rows) {
            cached.append_rows(new)?;
        }
        Ok(())
    }

    /// What is cached of one layer; the storage is shared, so they have to be dropped before the next append.
    pub(crate) fn layer(&self, layer: usize) -> Vec<Tensor> {
        self.layers[layer].clone()
    }

    /// The last known state of a layer after at most `n` rows, and after how many; nothing is known of no rows.
    pub(crate) fn state(&self, layer: usize, n: usize) -> Option<(usize, Tensor)> {
        self.states[layer].iter().rfind(|(at, _)| *at <= n).cloned()
    }

    /// Replaces what is known of a layer's state, in ascending order of rows.
    pub(crate) fn keep_states(&mut self, layer: usize, states: Vec<(usize, Tensor)>) {
        self.states[layer] = states;
    }

    /// Whether the cache holds layers of rows of these widths on this device.
    pub(crate) fn fits(&self, layers: &[Vec<usize>], device: Device) -> bool {
        let width = |rows: &Tensor| rows.rows_cols().1;
        let is_alike =
            |(rows, widths): (&Vec<Tensor>, &Vec<usize>)| rows.iter().map(width).eq(widths.iter().copied());
        self.layers.len() == layers.len()
            && self.layers.iter().zip(layers).all(is_alike)
            && self.layers.iter().flatten().all(|rows| rows.device() == device)
    }
}

/// The shape of a tree of tokens: depth from 0, and each node's path from its root to itself.
#[derive(Debug)]
pub(crate) struct Tree {
    paths: Vec<Vec<u32>>,
}

impl Tree {
    /// A tree from each node's parent: an earlier node, or `u32::MAX` for the last cached token.
    pub(crate) fn new(parents: &[u32]) -> Result<Self> {
        let mut paths: Vec<Vec<u32>> = Vec::with_capacity(parents.len());
        for (node, &parent) in parents.iter().enumerate() {
            let mut path = match parent {
                u32::MAX => Vec::new(),
                parent if (parent as usize) < node => paths[parent as usize].clone(),
                _ => {
                    let why = format!("parent {parent} of node {node} is not an earlier node, nor u32::MAX");
                    return Err(Error::Cache(why));
                }
            };
            path.push(node as u32);
            paths.push(path);
        }
        Ok(Self { paths })
    }

    /// Whether each node is the child of the one before it.
    pub(crate) fn is_chain(&self) -> bool {
        self.paths.iter().enumerate().all(|(node, path)| path.len() == node + 1)
    }

    pub(crate) fn depth(&self, node: usize) -> usize {
        self.paths[node].len() - 1
    }

    /// The row `back` rows before each node on its path, in a cache whose sequence has `first` rows; `u32::MAX` before
    /// its begin.
    pub(crate) fn rows_before(&self, first: usize, back: usize) -> Vec<u32> {
        let row = |path: &Vec<u32>| match path.len().checked_sub(back + 1) {
            Some(depth) => first as u32 + path[depth],
            None => (first + path.len()).checked_sub(back + 1).map_or(u32::MAX, |row| row as u32),
        };
        self.paths.iter().map(row).collect()
    }

    /// The parent of a node, if that is a node.
    pub(crate) fn parent(&self, node: usize) -> Option<usize> {
        self.paths[node].iter().rev().nth(1).map(|&parent| parent as usize)
    }

    /// Nodes.
    pub(crate) fn len(&self) -> usize {
        self.paths.len()
    }

    /// The cached rows that each node sees.
    pub(crate) fn spans(&self, first: usize, reach: Reach) -> Vec<(u32, u32)> {
        let start = |node| reach.start(first + self.depth(node)).min(first);
        (0..self.paths.len()).map(|node| (start(node) as u32, first as u32)).collect()
    }

    /// For every depth, the node of that depth which each node sees: an ancestor or itself, `u32::MAX` for none. The
    /// sequence below has `first` rows.
    pub(crate) fn ancestors(&self, first: usize, reach: Reach) -> Vec<Vec<u32>> {
        let deepest = self.paths.iter().map(Vec::len).max().unwrap_or(0);
        let seen = |path: &Vec<u32>, depth: usize| {
            let is_near = first + depth >= reach.start(first + path.len() - 1);
            path.get(depth).copied().filter(|_| is_near).unwrap_or(u32::MAX)
        };
        (0..deepest).map(|depth| self.paths.iter().map(|path| seen(path, depth)).collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: u32 = u32::MAX;

    #[test]
    fn nodes_see_their_ancestors_within_the_window() {
        // 0 - 1 - 3, 0 - 2, 4
        let tree = Tree::new(&[NONE, 0, 0, 1, NONE]).unwrap();
        assert!(!tree.is_chain());
        let all = [vec![0, 0, 0, 0, 4], vec![NONE, 1, 2, 1, NONE], vec![NONE, NONE, NONE, 3, NONE]];
        assert_eq!(tree.ancestors(5, Reach::All), all);
        assert_eq!(tree.ancestors(5, Reach::Window(3)), all);
        assert_eq!(tree.ancestors(5, Reach::Window(2))[0], [0, 0, 0, NONE, 4]);
        assert_eq!(tree.spans(5, Reach::All), [(0, 5); 5]);
        assert_eq!(tree.spans(5, Reach::Window(3)), [(3, 5), (4, 5), (4, 5), (5, 5), (3, 5)]);
        // Chunks are of positions: nodes of depth 1 stand at 6, where the second begins.
        assert_eq!(tree.spans(5, Reach::Chunk(6)), [(0, 5), (5, 5), (5, 5), (5, 5), (0, 5)]);
        let apart =
            [vec![0, NONE, NONE, NONE, 4], vec![NONE, 1, 2, 1, NONE], vec![NONE, NONE, NONE, 3, NONE]];
        assert_eq!(tree.ancestors(5, Reach::Chunk(6)), apart);
    }

    #[test]
    fn a_node_follows_its_path_and_then_the_sequence() {
        let tree = Tree::new(&[NONE, 0, 0, 1, NONE]).unwrap();
        assert_eq!([0, 1, 2, 3, 4].map(|node| tree.parent(node)), [None, Some(0), Some(0), Some(1), None]);
        assert_eq!(tree.rows_before(2, 0), [2, 3, 4, 5, 6]);
        assert_eq!(tree.rows_before(2, 1), [1, 2, 2, 3, 1]);
        assert_eq!(tree.rows_before(2, 3), [NONE, 0, 0, 1, NONE]);
    }

    #[test]
    fn a_chain_is_told_from_a_tree() {
        assert!(Tree::new(&[NONE, 0, 1]).unwrap().is_chain());
        assert!(!Tree::new(&[NONE, NONE]).unwrap().is_chain());
        let message = Tree::new(&[NONE, 1]).unwrap_err().to_string();
        assert!(message.contains("parent 1 of node 1 is not an earlier node"), "{message}");
    }
}
