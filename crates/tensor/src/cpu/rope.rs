//! Rotary position embedding, half-split pairing.

use super::rows::for_rows;
use super::{tensor, u32s};
use crate::Tensor;

pub(super) fn rotate(
    x: &Tensor,
    head_dim: usize,
    tables: (&Tensor, &Tensor),
    positions: &Tensor,
    inverse: bool,
) -> Tensor {
    let (cos, sin, positions) = (tables.0.f32s(), tables.1.f32s(), u32s(positions));
    let half = tables.0.rows_cols().1;
    let sign = if inverse { -1.0 } else { 1.0 };
    let mut y = x.to_f32();
    for_rows(&mut y, x.rows_cols().1, |r, row| {
        let p = positions[r] as usize * half;
        let (cos, sin) = (&cos[p..p + half], &sin[p..p + half]);
        for head in row.chunks_exact_mut(head_dim) {
            let (a, rest) = head.split_at_mut(half);
            for (((a, b), cos), sin) in a.iter_mut().zip(&mut rest[..half]).zip(cos).zip(sin) {
                let (x, y) = (*a, *b);
                *a = x * cos - sign * y * sin;
                *b = y * cos + sign * x * sin;
            }
        }
    });
    tensor(y, x.shape())
}
