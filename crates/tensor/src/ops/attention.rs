//! Attention with explicit key ranges and extra keys.

use super::{Part, expect_cols_from, expect_rows, expect_shape};
use crate::kernels::{AttentionInputs, AttentionShape, Extra, Spans};
use crate::tape::{Backward, Sink};
use crate::{DType, Error, ParamId, Result, Tape, Tensor, Var};

/// Keys and values of the same rows, `n_kv_heads * head_dim` columns each.
#[derive(Debug, Clone)]
pub struct KeyValue {
    /// Keys, after RoPE.
    pub key: Part,
    /// Values.
    pub value: Part,
}

impl KeyValue {
    /// From two values.
    pub fn new(key: &Var, value: &Var) -> Self {
        Self { key: Part::new(key, 0), value: Part::new(value, 0) }
    }

    /// From columns of one value: keys from `first` on, then values.
    pub fn packed(of: &Var, first: usize, shape: AttentionShape) -> Self {
        let width = shape.n_kv_heads * shape.head_dim;
        Self { key: Part::new(of, first), value: Part::new(of, first + width) }
    }
}

/// The inputs of one attention.
#[derive(Debug)]
pub struct Attention<'a> {
    /// Heads and scale.
    pub shape: AttentionShape,
    /// Queries, R rows of `n_heads * head_dim` columns, after RoPE.
    pub query: Part,
    /// Base keys and values of T rows.
    pub base: &'a KeyValue,
    /// The base keys that each query sees.
    pub spans: &'a Spans,
    /// One further key per query and entry, in the same softmax; row r belongs to query r unless the entry has an
    /// index (`u32 [R]`, `u32::MAX` for none).
    pub extras: &'a [(KeyValue, Option<Tensor>)],
}

/// What the backward of an attention reads.
pub(super) struct Saved {
    pub(super) shape: AttentionShape,
    pub(super) query: Part,
    pub(super) base: KeyValue,
    pub(super) spans: Spans,
    pub(super) extras: Vec<(KeyValue, Option<Tensor>)>,
    pub(super) out: Tensor,
    pub(super) lse: Tensor,
}

impl Saved {
    pub(super) fn extras(&self) -> Vec<Extra<'_>> {
        extras_of(&self.extras)
    }

    pub(super) fn add_extras(&self, gradients: Vec<[Tensor; 2]>, sink: &mut Sink<'_>) -> Result<()> {
        for ((kv, _), [dk, dv]) in self.extras.iter().zip(gradients) {
            sink.add_columns(&kv.key.of, kv.key.first, dk)?;
            sink.add_columns(&kv.value.of, kv.value.first, dv)?;
        }
        Ok(())
    }
}

fn extras_of(extras: &[(KeyValue, Option<Tensor>)]) -> Vec<Extra<'_>> {
    extras
        .iter()
        .map(|(kv, index)| Extra { key: kv.key.columns(), value: kv.value.columns(), index: index.as_ref() })
        .collect()
}

fn check(a: &Attention<'_>) -> Result<()> {
    let s = a.shape;
    if s.n_kv_heads == 0 || !s.n_heads.is_multiple_of(s.n_kv_heads) {
        let got = [s.n_heads, s.n_kv_heads];
        return Err(Error::shape("attention", "heads", "a multiple of the key heads", &got));
    }
    let (rows, width) = (a.query.of.rows_cols().0, s.n_kv_heads * s.head_dim);
    let keys = a.base.key.of.rows_cols().0;
    let part = |what, part: &Part, rows: usize, width| {
        let (got, of) = (part.of.rows_cols().0, part.of.value());
        expect_cols_from("attention", what, of, part.first, width)?;
        if got == rows {
            Ok(())
        } else {
            Err(Error::shape("attention", what, format!("[{rows}, ..]"), of.shape()))
        }
    };
    part("query", &a.query, rows, s.n_heads * s.head_dim)?;
    part("key", &a.base.key, keys, width)?;
    part("value", &a.base.value, keys, width)?;
    expect_shape("attention", "span starts", &a.spans.lo, &[rows])?;
    expect_shape("attention", "span ends", &a.spans.hi, &[rows])?;
    expect_rows("attention", "the keys and their end", &a.spans.lo, keys + 1, false)?;
    expect_rows("attention", "the keys and their end", &a.spans.hi, keys + 1, false)?;
    for (kv, index) in a.extras {
        let n = if index.is_some() { kv.key.of.rows_cols().0 } else { rows };
        part("extra key", &kv.key, n, width)?;
        part("extra value", &kv.value, n, width)?;
        if let Some(index) = index {
            expect_shape("attention", "extra index", index, &[rows])?;
            expect_rows("attention", "the extra keys", index, n, true)?;
        }
    }
    Ok(())
}

impl Tape<'_> {
    /// `softmax(scale · q kᵀ) v` over each query's base keys and extras, one softmax for all of them. A query that
    /// sees no key gives zeros. Nothing of size queries x keys is kept.
    pub fn attention(&self, a: &Attention<'_>) -> Result<Var> {
        let (query, base, needed) = (&a.query, a.base, self.is_needed(a));
        if needed {
            expect_ordered(a.spans)?;
        }
        let (out, lse) = forward(a, None, None)?;
        Ok(self.record(out.clone(), needed, || {
            Box::new(Saved {
                shape: a.shape,
                query: query.clone(),
                base: base.clone(),
                spans: a.spans.clone(),
                extras: a.extras.to_vec(),
                out,
                lse,
            })
        }))
    }

    /// As [`Tape::attention`], of scores s that become `cap · tanh(s / cap)` (Gemma 2). It has no gradient.
    pub fn attention_capped(&self, a: &Attention<'_>, cap: f32) -> Result<Var> {
        if self.is_needed(a) {
            return Err(Error::NoGradient { op: "attention_capped" });
        }
        Ok(self.input(forward(a, None, Some(cap))?.0))
    }

    /// As [`Tape::attention`], with one more logit per query head in the softmax, which has no value (attention sinks,
    /// float32 `[n_heads]`; Xiao et al., 2024). It has no gradient.
    pub fn attention_with_sinks(&self, a: &Attention<'_>, sinks: ParamId) -> Result<Var> {
        if self.is_needed(a) {
            return Err(Error::NoGradient { op: "attention_with_sinks" });
        }
        let sinks = &self.params().get(sinks).value;
        expect_shape("attention", "sinks", sinks, &[a.shape.n_heads])?;
        if sinks.dtype() != DType::F32 {
            let (op, what, got) = ("attention", "sinks", sinks.dtype());
            return Err(Error::DType { op, what, expected: "F32", got });
        }
        Ok(self.input(forward(a, Some(sinks), None)?.0))
    }

    /// Whether a gradient is wanted for anything that an attention reads.
    fn is_needed(&self, a: &Attention<'_>) -> bool {
        self.any_needed(&[&a.query.of, &a.base.key.of, &a.base.value.of])
            || a.extras.iter().any(|(kv, _)| self.any_needed(&[&kv.key.of, &kv.value.of]))
    }
}

/// A backward finds the queries of a key by the order of their bounds.
pub(super) fn expect_ordered(spans: &Spans) -> Result<()> {
    for (what, bounds) in [("span starts", &spans.lo), ("span ends", &spans.hi)] {
        let bounds = bounds.u32s().unwrap_or_default();
        if let Some(at) = bounds.windows(2).position(|pair| pair[0] > pair[1]) {
            let expected = format!("bounds that never decrease, got these from row {at} on");
            let got = [bounds[at] as usize, bounds[at + 1] as usize];
            return Err(Error::shape("attention", what, expected, &got));
        }
    }
    Ok(())
}

/// Output and log-sum-exp, once the shapes are checked.
fn forward(a: &Attention<'_>, sinks: Option<&Tensor>, cap: Option<f32>) -> Result<(Tensor, Tensor)> {
    check(a)?;
    let (query, base, extras) = (&a.query, a.base, extras_of(a.extras));
    let qkv = [query.columns(), base.key.columns(), base.value.columns()];
    let inputs = AttentionInputs { shape: a.shape, qkv, spans: a.spans, extras: &extras, sinks, cap };
    query.of.value().device().kernels().attention(&inputs)
}

/// Output and log-sum-exp over base keys, then values, `[n, 2 · width]`, that are on no tape.
pub(super) fn forward_parts(
    shape: AttentionShape,
    query: &Part,
    base: &Tensor,
    spans: &Spans,
    extras: &[(KeyValue, Option<Tensor>)],
) -> Result<(Tensor, Tensor)> {
    let base = Var::constant(base.clone());
    let base = KeyValue::packed(&base, 0, shape);
    forward(&Attention { shape, query: query.clone(), base: &base, spans, extras }, None, None)
}

impl Backward for Saved {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let (query, base, extras) = (&self.query, &self.base, self.extras());
        let qkv = [query.columns(), base.key.columns(), base.value.columns()];
        let (shape, spans) = (self.shape, &self.spans);
        let inputs = AttentionInputs { shape, qkv, spans, extras: &extras, sinks: None, cap: None };
        let out = [&self.out, &self.lse, &dy];
        let ([dq, dk, dv], dextras) = dy.device().kernels().attention_backward(&inputs, out)?;
        let mut add = |part: &Part, d| sink.add_columns(&part.of, part.first, d);
        add(query, dq)?;
        add(&base.key, dk)?;
        add(&base.value, dv)?;
        self.add_extras(dextras, sink)
    }
}
