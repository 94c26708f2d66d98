//! EAGLE3 while decoding: committed rows with the target's states, and proposals on the draft's own states, at the
//! positions and with the keys that training's steps had.

use std::ops::Range;

use specforge_tensor::{Attention, KeyValue, Params, Part, Spans, Split, Tape, Tensor, Var, Weight};

use super::{At, Eagle3};
use crate::{Drafter, Error, Result};

/// A draft decoding one sequence: keys and values of committed rows, and of the nodes proposed on top.
#[derive(Debug)]
pub(super) struct Eagle3Drafter<'a> {
    method: &'a Eagle3,
    params: &'a Params,
    /// Keys, then values, `[rows, 2·G·D]`.
    base: Tensor,
    nodes: Tensor,
    /// Parent and depth (from 1) of each node.
    tree: Vec<(Option<usize>, usize)>,
    /// The state each node gives its children, `[nodes, H]`; that of the committed rows comes apart.
    states: Tensor,
    root: Tensor,
}

impl<'a> Eagle3Drafter<'a> {
    pub(super) fn new(method: &'a Eagle3, params: &'a Params) -> Result<Self> {
        let device = method.teacher_head.device();
        let kv = 2 * method.n_kv_heads() * method.dims.head_dim;
        let empty = |width: usize| Tensor::activations(device, &[0, width]);
        let (base, nodes) = (empty(kv)?, empty(kv)?);
        let (states, root) = (empty(method.dims.hidden_size)?, empty(method.dims.hidden_size)?);
        Ok(Self { method, params, base, nodes, tree: Vec::new(), states, root })
    }

    fn committed(&self) -> usize {
        self.base.rows_cols().0
    }

    /// The rest of the layer and the head for states `h` that attend to `base` within `spans` and to `extras`.
    /// Returns the states for the next step and the logits.
    fn finish(
        &self,
        tape: &Tape<'_>,
        h: &Var,
        query: Part,
        extras: &[(KeyValue, Option<Tensor>)],
    ) -> Result<(Tensor, Var)> {
        let (device, n) = (h.value().device(), h.rows_cols().0);
        let m = self.method;
        let spans = Spans {
            lo: Tensor::from_u32(device, vec![0; n]),
            hi: Tensor::from_u32(device, vec![self.committed() as u32; n]),
        };
        let shape = m.attention_shape();
        let base = KeyValue::packed(&tape.input(self.base.clone()), 0, shape);
        let a = tape.attention(&Attention { shape, query, base: &base, spans: &spans, extras })?;
        let out = m.finish_layer(tape, h, &a)?;
        let normed = tape.rms_norm(&out, m.modules.norm, m.eps())?;
        let logits = tape.linear(&normed, &Weight::of(m.modules.lm_head))?;
        let logits = match m.ranks.tensor() {
            Some(ranks) => tape.input(Split::of(ranks, false, ranks.size()).whole(logits.value(), ranks)?),
            None => logits,
        };
        let state = if m.dims.norm_output { normed } else { out };
        Ok((state.value().clone(), logits))
    }

    /// For each node, its ancestor (or itself) of every depth up to `depth`, as rows of the nodes' keys.
    fn ancestors(&self, first: usize, depth: usize) -> Vec<Vec<u32>> {
        let mut at_depth = vec![Vec::new(); depth];
        for node in first..self.tree.len() {
            let mut next = Some(node);
            while let Some(n) = next {
                at_depth[self.tree[n].1 - 1].push(n as u32);
                next = self.tree[n].0;
            }
        }
        at_depth
    }
}

/// The rows of a matrix of logits.
fn logit_rows(logits: &Var) -> Vec<Vec<f32>> {
    let width = logits.rows_cols().1.max(1);
    logits.value().f32s().chunks_exact(width).map(<[f32]>::to_vec).collect()
}

impl Drafter for Eagle3Drafter<'_> {
    fn commit(&mut self, hidden_states: &Tensor, next_tokens: &[u32]) -> Result<Vec<f32>> {
        let (m, n) = (self.method, next_tokens.len());
        if n == 0 || hidden_states.rows_cols().0 != n {
            let rows = hidden_states.rows_cols().0;
            return Err(Error::Batch(format!(
                "commit: {rows} rows of states for {n} tokens, expected as many, at least one"
            )));
        }
        let device = hidden_states.device();
        let tape = Tape::inference(self.params);
        self.tree.clear();
        self.nodes.truncate_rows(0);
        self.states.truncate_rows(0);
        // 1. Keys and values of all new rows.
        let start = self.committed() as u32;
        let g = m.project(&tape, &tape.input(hidden_states.clone()))?;
        let half = m.embedding_half(&tape, &Tensor::from_u32(device, next_tokens.to_vec()))?;
        let normed = tape.rms_norm(&g, m.modules.hidden_norm, m.eps())?;
        let rows = |range: Range<u32>| range.collect::<Vec<u32>>();
        let at = At::new(device, rows(0..n as u32), rows(start..start + n as u32));
        self.base.append_rows(m.keys_values(&tape, (&normed, &half), &at)?.value())?;
        // 2. The rest of the layer for the last row alone.
        let last = Tensor::from_u32(device, vec![n as u32 - 1]);
        let (h, normed) = (tape.gather_rows(&g, &last)?, tape.gather_rows(&normed, &last)?);
        let at = At::new(device, vec![n as u32 - 1], vec![start + n as u32 - 1]);
        let q = m.queries(&tape, (&normed, &half), &at)?;
        let (state, logits) = self.finish(&tape, &h, Part::new(&q, 0), &[])?;
        self.root = state;
        Ok(logit_rows(&logits).swap_remove(0))
    }

    fn expand(&mut self, nodes: &[(u32, Option<usize>)]) -> Result<Vec<Vec<f32>>> {
        let (m, device, first) = (self.method, self.root.device(), self.tree.len());
        let depth = nodes.first().map_or(1, |(_, parent)| parent.map_or(1, |p| self.tree[p].1 + 1));
        let (mut tokens, mut parents) = (Vec::new(), Vec::new());
        for &(token, parent) in nodes {
            tokens.push(token);
            parents.push(parent.map_or(0, |p| p as u32));
            self.tree.push((parent, depth));
        }
        // 1. States of the parents, keys and values of the nodes: depth d sits d - 1 rows past the committed ones.
        let tape = Tape::inference(self.params);
        let source = if depth == 1 { &self.root } else { &self.states };
        let h = tape.gather_rows(&tape.input(source.clone()), &Tensor::from_u32(device, parents))?;
        let half = m.embedding_half(&tape, &Tensor::from_u32(device, tokens))?;
        let n = tape.rms_norm(&h, m.modules.hidden_norm, m.eps())?;
        let position = vec![(self.committed() + depth - 1) as u32; nodes.len()];
        let at = At::new(device, (0..nodes.len() as u32).collect(), position);
        let qkv = m.queries_keys_values(&tape, (&n, &half), &at)?;
        let first_key = m.query_width();
        let kv = tape.columns(&qkv, first_key..qkv.rows_cols().1)?;
        self.nodes.append_rows(kv.value())?;
        // 2. Attention to the committed rows, the node's ancestors and itself.
        let keys = KeyValue::packed(&tape.input(self.nodes.clone()), 0, m.attention_shape());
        let ancestors = self.ancestors(first, depth).into_iter();
        let extras: Vec<_> =
            ancestors.map(|rows| (keys.clone(), Some(Tensor::from_u32(device, rows)))).collect();
        let (state, logits) = self.finish(&tape, &h, Part::new(&qkv, 0), &extras)?;
        self.states.append_rows(&state)?;
        Ok(logit_rows(&logits))
    }
}
