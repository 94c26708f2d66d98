//! The gated delta rule, row after row; each value head by itself.

use rayon::prelude::*;

use super::simd::{dot, vectorised};
use super::{f32_mut, tensor, u32s};
use crate::Tensor;
use crate::kernels::{Columns, DeltaInputs};

/// Added to the sum of squares of queries and keys.
const EPS: f32 = 1e-6;

/// What one head makes: its outputs `[R, value_dim]`, and the states it keeps, each with its place.
type Head = (Vec<f32>, Vec<(usize, Vec<f32>)>);

pub(super) fn rule(inputs: &DeltaInputs<'_>, states: &mut Tensor) -> Tensor {
    let s = inputs.shape;
    let (rows, all, dv) = (inputs.qkv.rows_cols().0, s.state(), s.value_dim);
    let size = s.key_dim * dv;
    let known = states.f32s();
    let (qkv, b, a) = (inputs.qkv.f32s(), part(inputs.b, s.value_heads), part(inputs.a, s.value_heads));
    let reads = Reads { inputs, qkv: &qkv, b: &b, a: &a, states: &known };
    let heads: Vec<Head> = (0..s.value_heads).into_par_iter().map(|h| reads.head(h)).collect();
    drop(known);
    let mut out = vec![0.0; rows * s.value_heads * dv];
    let states = f32_mut(states);
    for (h, (values, kept)) in heads.into_iter().enumerate() {
        for (r, row) in values.chunks_exact(dv).enumerate() {
            out[(r * s.value_heads + h) * dv..][..dv].copy_from_slice(row);
        }
        for (slot, state) in kept {
            states[slot * all + h * size..][..size].copy_from_slice(&state);
        }
    }
    tensor(out, &[rows, s.value_heads * dv])
}

fn part(columns: Columns<'_>, width: usize) -> Vec<f32> {
    super::rows::columns(columns.of, columns.first..columns.first + width).to_f32()
}

/// Everything that is read, as slices.
struct Reads<'a> {
    inputs: &'a DeltaInputs<'a>,
    qkv: &'a [f32],
    b: &'a [f32],
    a: &'a [f32],
    states: &'a [f32],
}

impl Reads<'_> {
    fn head(&self, h: usize) -> Head {
        let s = self.inputs.shape;
        let (dk, dv, size) = (s.key_dim, s.value_dim, s.key_dim * s.value_dim);
        let key_head = h / (s.value_heads / s.key_heads);
        let (from, to) = (u32s(self.inputs.from), u32s(self.inputs.to));
        let rows = from.len();
        let (mut out, mut kept) = (vec![0.0; rows * dv], Vec::<(usize, Vec<f32>)>::new());
        let mut state = vec![0.0; size];
        for r in 0..rows {
            if from[r] != u32::MAX {
                let slot = from[r] as usize;
                let new = kept.iter().rev().find(|(at, _)| *at == slot);
                let known = || &self.states[slot * s.state() + h * size..][..size];
                state.copy_from_slice(new.map_or_else(known, |(_, state)| state));
            }
            let row = &self.qkv[r * s.width()..][..s.width()];
            let q = normed(&row[key_head * dk..][..dk], (dk as f32).powf(-0.5));
            let k = normed(&row[(s.key_heads + key_head) * dk..][..dk], 1.0);
            let v = &row[2 * s.key_heads * dk + h * dv..][..dv];
            step(&mut state, [&q, &k, v], self.gates(r, h), &mut out[r * dv..][..dv]);
            if to[r] != u32::MAX {
                kept.push((to[r] as usize, state.clone()));
            }
        }
        (out, kept)
    }

    /// How much of the state stays, and how strongly a row is written.
    fn gates(&self, r: usize, h: usize) -> [f32; 2] {
        let at = r * self.inputs.shape.value_heads + h;
        let (a_log, dt_bias) = (self.inputs.a_log.f32s()[h], self.inputs.dt_bias.f32s()[h]);
        let decay = -a_log.exp() * softplus(self.a[at] + dt_bias);
        [decay.exp(), 1.0 / (1.0 + (-self.b[at]).exp())]
    }
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// A query or key of length `scale`.
fn normed(x: &[f32], scale: f32) -> Vec<f32> {
    let factor = scale / (dot(x, x) + EPS).sqrt();
    x.iter().map(|v| v * factor).collect()
}

/// `S ← keep S; S ← S + k (write (v - Sᵀ k))ᵀ; out = Sᵀ q` of a state `[key_dim, value_dim]`.
fn step(state: &mut [f32], [q, k, v]: [&[f32]; 3], [keep, write]: [f32; 2], out: &mut [f32]) {
    let dv = v.len();
    let mut change = vec![0.0; dv];
    vectorised(|| {
        for (row, k) in state.chunks_exact_mut(dv).zip(k) {
            for (s, seen) in row.iter_mut().zip(&mut change) {
                *s *= keep;
                *seen += *s * k;
            }
        }
        change.iter_mut().zip(v).for_each(|(c, v)| *c = write * (v - *c));
        for ((row, k), q) in state.chunks_exact_mut(dv).zip(k).zip(q) {
            for ((s, c), o) in row.iter_mut().zip(&change).zip(&mut *out) {
                *s += k * c;
                *o += *s * q;
            }
        }
    });
}
