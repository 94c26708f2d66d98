//! Attention with explicit key ranges and extra keys.

use super::{expect_rows, expect_shape};
use crate::kernels::{AttentionShape, Extra, Spans};
use crate::tape::{Backward, Sink};
use crate::{Error, Result, Tape, Tensor, Var};

/// Keys and values of the same rows, each `[rows, n_kv_heads * head_dim]`.
#[derive(Debug, Clone)]
pub struct KeyValue {
    /// Keys, after RoPE.
    pub key: Var,
    /// Values.
    pub value: Var,
}

/// The inputs of one attention.
#[derive(Debug)]
pub struct Attention<'a> {
    /// Heads and scale.
    pub shape: AttentionShape,
    /// Queries, `[R, n_heads * head_dim]`, after RoPE.
    pub query: &'a Var,
    /// Base keys and values, `[T, n_kv_heads * head_dim]`.
    pub base: &'a KeyValue,
    /// The base keys that each query sees.
    pub spans: &'a Spans,
    /// One further key per query and entry, in the same softmax; row r belongs to query r unless the entry has an
    /// index (`u32 [R]`, `u32::MAX` for none).
    pub extras: &'a [(KeyValue, Option<Tensor>)],
}

struct Saved {
    shape: AttentionShape,
    query: Var,
    base: KeyValue,
    spans: Spans,
    extras: Vec<(KeyValue, Option<Tensor>)>,
    out: Tensor,
    lse: Tensor,
}

fn extras_of(extras: &[(KeyValue, Option<Tensor>)]) -> Vec<Extra<'_>> {
    extras
        .iter()
        .map(|(kv, index)| Extra { key: kv.key.value(), value: kv.value.value(), index: index.as_ref() })
        .collect()
}

fn check(a: &Attention<'_>) -> Result<()> {
    let s = a.shape;
    if s.n_kv_heads == 0 || !s.n_heads.is_multiple_of(s.n_kv_heads) {
        let got = [s.n_heads, s.n_kv_heads];
        return Err(Error::shape("attention", "heads", "a multiple of the key heads", &got));
    }
    let rows = a.query.rows_cols().0;
    let kv_shape = [a.base.key.rows_cols().0, s.n_kv_heads * s.head_dim];
    expect_shape("attention", "query", a.query.value(), &[rows, s.n_heads * s.head_dim])?;
    expect_shape("attention", "key", a.base.key.value(), &kv_shape)?;
    expect_shape("attention", "value", a.base.value.value(), &kv_shape)?;
    expect_shape("attention", "span starts", &a.spans.lo, &[rows])?;
    expect_shape("attention", "span ends", &a.spans.hi, &[rows])?;
    expect_rows("attention", "the keys and their end", &a.spans.lo, kv_shape[0] + 1, false)?;
    expect_rows("attention", "the keys and their end", &a.spans.hi, kv_shape[0] + 1, false)?;
    for (kv, index) in a.extras {
        let n = kv.key.rows_cols().0;
        expect_shape("attention", "extra key", kv.key.value(), &[n, kv_shape[1]])?;
        expect_shape("attention", "extra value", kv.value.value(), &[n, kv_shape[1]])?;
        match index {
            Some(index) => {
                expect_shape("attention", "extra index", index, &[rows])?;
                expect_rows("attention", "the extra keys", index, n, true)?;
            }
            None => expect_shape("attention", "extra key", kv.key.value(), &[rows, kv_shape[1]])?,
        }
    }
    Ok(())
}

impl Tape<'_> {
    /// `softmax(scale · q kᵀ) v` over each query's base keys and extras, one softmax for all of them. A query that
    /// sees no key gives zeros. Nothing of size queries x keys is kept.
    pub fn attention(&self, a: &Attention<'_>) -> Result<Var> {
        check(a)?;
        let (query, base) = (a.query, a.base);
        let qkv = [query.value(), base.key.value(), base.value.value()];
        let (out, lse) =
            query.value().device().kernels().attention(a.shape, qkv, a.spans, &extras_of(a.extras));
        let needed = self.any_needed(&[query, &base.key, &base.value])
            || a.extras.iter().any(|(kv, _)| self.any_needed(&[&kv.key, &kv.value]));
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
}

impl Backward for Saved {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let qkv = [self.query.value(), self.base.key.value(), self.base.value.value()];
        let ([dq, dk, dv], dextras) = dy.device().kernels().attention_backward(
            self.shape,
            qkv,
            &self.spans,
            &extras_of(&self.extras),
            [&self.out, &self.lse, &dy],
        );
        sink.add(&self.query, dq);
        sink.add(&self.base.key, dk);
        sink.add(&self.base.value, dv);
        for ((kv, _), [dk, dv]) in self.extras.iter().zip(dextras) {
            sink.add(&kv.key, dk);
            sink.add(&kv.value, dv);
        }
        Ok(())
    }
}
