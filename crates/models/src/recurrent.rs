//! Layers that read earlier rows otherwise than by attention: short convolutions, and linear attention, whose state is
//! not a row of anything.
//!
//! A state cannot be cut off as rows are. The cache keeps the rows that made it, and states as they were before and
//! after the last extension; what is taken back leaves the rows that stay, and the state is computed again over those
//! from the last place where it is known.

use std::ops::Range;

use specforge_tensor::{Delta, DeltaShape, Device, ParamId, Part, Tensor, Var};

use crate::Result;
use crate::cache::Tree;
use crate::pass::{Pass, Sight};

const NONE: u32 = u32::MAX;

/// The parameters of a gated delta rule, but for the projections around it.
#[derive(Debug)]
pub(crate) struct DeltaRule {
    pub shape: DeltaShape,
    /// `[width, 1, K]`.
    pub taps: ParamId,
    /// Float32 `[value_heads]`.
    pub a_log: ParamId,
    /// Float32 `[value_heads]`.
    pub dt_bias: ParamId,
}

impl Pass<'_, '_> {
    /// A causal convolution with weights `[H, 1, K]` of rows `[R, H]` of the pass and of the cache: tap K - 1 takes the
    /// row itself, the one before it the row before, and nothing is before a document.
    pub(crate) fn short_conv(&mut self, x: &Var, w: ParamId) -> Result<Var> {
        let (tape, device, (n, h)) = (self.tape, x.value().device(), x.rows_cols());
        let taps = tape.params().get(w).value.len() / h;
        let (x, index) = match &mut self.sight {
            Sight::Documents(bounds) => {
                (x.clone(), (0..taps).rev().flat_map(|k| document_rows(bounds, k)).collect())
            }
            Sight::Cached { cache, first, tree } => {
                cache.append(self.layer, &[x.value()])?;
                let index = cached_rows(taps, *first..*first, n, *first, *tree);
                (tape.input(cache.layer(self.layer).swap_remove(0)), index)
            }
        };
        Ok(tape.short_conv(&x, &Tensor::from_u32(device, index), w)?)
    }

    /// The gated delta rule over rows of the pass and of the cache: queries, keys and values `[R, width]` go through a
    /// short convolution and SiLU first; `ba` are b and a of every value head, `[R, 2 · value_heads]`.
    pub(crate) fn delta_rule(&mut self, qkv: &Var, ba: &Var, rule: &DeltaRule) -> Result<Var> {
        let (tape, device, (n, width)) = (self.tape, qkv.value().device(), qkv.rows_cols());
        let taps = tape.params().get(rule.taps).value.len() / width;
        let zeros = |n: usize| Tensor::zeros(device, &[n, rule.shape.state()]);
        let (cache, first, tree) = match &mut self.sight {
            Sight::Cached { cache, first, tree } => (cache, *first, *tree),
            Sight::Documents(bounds) => {
                let index: Vec<u32> = (0..taps).rev().flat_map(|k| document_rows(bounds, k)).collect();
                let mut from = vec![NONE; n];
                bounds.iter().filter(|rows| !rows.is_empty()).for_each(|rows| from[rows.start] = 0);
                let plan = Plan { from, to: vec![NONE; n], settled: 0, end: None, n_states: 1 };
                return run(self, rule, [qkv, ba], &index, &plan, &mut zeros(1)?);
            }
        };
        cache.append(self.layer, &[qkv.value(), ba.value()])?;
        let (known, state) =
            cache.state(self.layer, first).map_or((0, None), |(at, state)| (at, Some(state)));
        let plan = Plan::new(first - known, n, tree);
        let index = cached_rows(taps, known..first, n, first, tree);
        let mut rows = cache.layer(self.layer);
        let (ba, qkv) = (rows.swap_remove(1).rows(known..first + n)?, rows.swap_remove(0));
        let mut states = state.map_or_else(|| zeros(1), Ok)?;
        if plan.n_states > 1 {
            states.append_rows(&zeros(plan.n_states - 1)?)?;
        }
        let (qkv, ba) = (tape.input(qkv), tape.input(ba));
        let out = run(self, rule, [&qkv, &ba], &index, &plan, &mut states)?;
        let settled = (first > 0).then_some((first, plan.settled));
        let after = plan.end.map(|slot| (first + n, slot));
        let keep = |(rows, slot): (usize, u32)| Ok((rows, one_row(&states, slot)?));
        let kept = settled.into_iter().chain(after).map(keep).collect::<Result<_>>()?;
        let Sight::Cached { cache, .. } = &mut self.sight else { return Ok(out) };
        cache.keep_states(self.layer, kept);
        Ok(tape.input(out.value().rows(first - known..first - known + n)?))
    }
}

/// The rule over all rows of a plan; `index` names the rows of `qkv` that the convolution reads for each.
fn run(
    pass: &Pass<'_, '_>,
    rule: &DeltaRule,
    [qkv, ba]: [&Var; 2],
    index: &[u32],
    plan: &Plan,
    states: &mut Tensor,
) -> Result<Var> {
    let (tape, device) = (pass.tape, qkv.value().device());
    let of = |index: &[u32]| Tensor::from_u32(device, index.to_vec());
    let qkv = tape.short_conv(qkv, &of(index), rule.taps)?;
    let qkv = tape.activated(&qkv, specforge_tensor::Activation::Silu)?;
    let (b, a) = (Part::new(ba, 0), Part::new(ba, rule.shape.value_heads));
    let (from, to) = (of(&plan.from), of(&plan.to));
    let (shape, a_log, dt_bias) = (rule.shape, rule.a_log, rule.dt_bias);
    let delta = Delta { shape, qkv: &qkv, b, a, a_log, dt_bias, from: &from, to: &to };
    Ok(tape.delta_rule(&delta, states)?)
}

/// A copy of one row.
fn one_row(states: &Tensor, row: u32) -> Result<Tensor> {
    let device: Device = states.device();
    Ok(device.kernels().gather_rows(states, &Tensor::from_u32(device, vec![row]))?)
}

/// Which states rows start from and leave. State 0 is the one that is known before all of them.
#[derive(Debug, PartialEq)]
struct Plan {
    from: Vec<u32>,
    to: Vec<u32>,
    /// The state after the rows that were there before.
    settled: u32,
    /// That after the last row, unless the new rows are a tree.
    end: Option<u32>,
    n_states: usize,
}

impl Plan {
    /// For `again` rows that are computed once more, and `n` new ones.
    fn new(again: usize, n: usize, tree: Option<&Tree>) -> Self {
        let mut plan = Self {
            from: vec![NONE; again + n],
            to: vec![NONE; again + n],
            settled: 0,
            end: None,
            n_states: 1,
        };
        plan.from[0] = 0;
        if again > 0 {
            plan.settled = plan.keep(again - 1);
        }
        for node in 0..tree.map_or(0, Tree::len) {
            plan.from[again + node] = match tree.and_then(|tree| tree.parent(node)) {
                None => plan.settled,
                Some(parent) if parent + 1 == node => NONE,
                Some(parent) => plan.keep(again + parent),
            };
        }
        if tree.is_none() {
            plan.end = Some(plan.keep(again + n - 1));
        }
        plan
    }

    /// The place where the state after a row is kept.
    fn keep(&mut self, row: usize) -> u32 {
        if self.to[row] == NONE {
            self.to[row] = self.n_states as u32;
            self.n_states += 1;
        }
        self.to[row]
    }
}

/// Per tap, the cached rows that it reads: for the rows `again`, and for `n` new ones after the first `first`.
fn cached_rows(taps: usize, again: Range<usize>, n: usize, first: usize, tree: Option<&Tree>) -> Vec<u32> {
    let rows = |back: usize| {
        let mut before = document_rows(std::slice::from_ref(&(0..first + n)), back);
        match tree {
            None => before.split_off(again.start),
            Some(tree) => {
                before.truncate(first);
                [before.split_off(again.start), tree.rows_before(first, back)].concat()
            }
        }
    };
    (0..taps).rev().flat_map(rows).collect()
}

/// The row `back` rows before each, `u32::MAX` before its document.
fn document_rows(bounds: &[Range<usize>], back: usize) -> Vec<u32> {
    let rows = bounds.iter().flat_map(|document| document.clone().map(|row| (document.start, row)));
    rows.map(|(start, row)| if row >= start + back { (row - back) as u32 } else { NONE }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_continuation_leaves_its_state_behind() {
        let plan = Plan::new(0, 3, None);
        assert_eq!((plan.from, plan.to), (vec![0, NONE, NONE], vec![NONE, NONE, 1]));
        assert_eq!((plan.settled, plan.end, plan.n_states), (0, Some(1), 2));
        let plan = Plan::new(2, 1, None);
        assert_eq!((plan.from, plan.to), (vec![0, NONE, NONE], vec![NONE, 1, 2]));
        assert_eq!((plan.settled, plan.end, plan.n_states), (1, Some(2), 3));
    }

    #[test]
    fn nodes_start_from_their_parents() {
        // 0 - 1 - 3, 0 - 2, 4
        let tree = Tree::new(&[NONE, 0, 0, 1, NONE]).unwrap();
        let plan = Plan::new(1, 5, Some(&tree));
        assert_eq!(plan.from, [0, 1, NONE, 2, 3, 1]);
        assert_eq!(plan.to, [1, 2, 3, NONE, NONE, NONE]);
        assert_eq!((plan.settled, plan.end, plan.n_states), (1, None, 4));
        assert_eq!(Plan::new(0, 5, Some(&tree)).from, [0, NONE, 1, 2, 0].map(|f: u32| f));
    }

    #[test]
    fn taps_read_along_the_path() {
        let tree = Tree::new(&[NONE, 0, 0]).unwrap();
        assert_eq!(cached_rows(2, 1..2, 3, 2, Some(&tree)), [0, 1, 2, 2, 1, 2, 3, 4]);
        assert_eq!(cached_rows(2, 2..2, 2, 2, None), [1, 2, 2, 3]);
        assert_eq!(cached_rows(2, 0..1, 1, 1, None), [NONE, 0, 0, 1]);
    }
}
