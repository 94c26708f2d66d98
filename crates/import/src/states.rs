//! Hidden states in whatever pieces and type a file has them.

use std::borrow::Cow;

use half::bf16;
use specforge_nn::weights::{Dtype, View};

/// States of L tokens: the columns of one or more matrices, side by side.
#[derive(Debug)]
pub struct States<'a> {
    parts: Vec<Matrix<'a>>,
}

/// Some columns of a row-major matrix.
#[derive(Debug, Clone)]
pub(crate) struct Matrix<'a> {
    pub(crate) bytes: Cow<'a, [u8]>,
    pub(crate) dtype: Dtype,
    /// Columns of the whole matrix.
    pub(crate) columns: usize,
    /// The first column that is meant.
    pub(crate) from: usize,
    /// How many are.
    pub(crate) width: usize,
    /// Little-endian F32, a factor for each row.
    pub(crate) scales: Option<Cow<'a, [u8]>>,
}

impl<'a> States<'a> {
    pub(crate) fn of(parts: Vec<Matrix<'a>>) -> Self {
        Self { parts }
    }

    /// Values per token.
    pub fn width(&self) -> usize {
        self.parts.iter().map(|part| part.width).sum()
    }

    /// The states of the first `tokens` tokens, `[tokens, width]`, rounded to bf16; `None` if one of them is not finite.
    pub fn first(&self, tokens: usize) -> Option<Vec<bf16>> {
        let mut out = Vec::with_capacity(tokens * self.width());
        for token in 0..tokens {
            self.parts.iter().for_each(|part| part.row(token, &mut out));
        }
        out.iter().all(|value| value.is_finite()).then_some(out)
    }
}

impl Matrix<'_> {
    fn row(&self, token: usize, out: &mut Vec<bf16>) {
        let size = self.dtype.size();
        let start = (token * self.columns + self.from) * size;
        let bytes = &self.bytes[start..start + self.width * size];
        if self.dtype == Dtype::BF16 {
            out.extend(bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b)));
        } else {
            let view = View { dtype: self.dtype, shape: &[], bytes };
            let scale = self.scales.as_ref().map_or(1.0, |all| f32::from_le_bytes(all.as_chunks().0[token]));
            out.extend(view.to_f32().into_iter().map(|value| bf16::from_f32(value * scale)));
        }
    }
}
