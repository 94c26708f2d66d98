//! Rotary position embedding, half-split pairing.

use super::rows::{add_gathered, for_rows, scatter_add_columns};
use super::{tensor, u32s};
use crate::Tensor;
use crate::kernels::{AddedRows, Rotation};

pub(super) fn forward(x: &Tensor, rotation: &Rotation<'_>, added: Option<AddedRows<'_>>) -> Tensor {
    let mut y = x.to_f32();
    if let Some(added) = added {
        add_gathered(&mut y, x.rows_cols().1, &added);
    }
    rotate(&mut y, x.rows_cols().1, rotation, 1.0);
    tensor(y, x.shape())
}

pub(super) fn backward(
    dy: &Tensor,
    rotation: &Rotation<'_>,
    added: Option<(&mut Tensor, usize, &Tensor)>,
) -> Tensor {
    let mut dx = dy.to_f32();
    rotate(&mut dx, dy.rows_cols().1, rotation, -1.0);
    if let Some((table, first, index)) = added {
        scatter_add_columns(table, first, u32s(index), &dx, dy.rows_cols().1);
    }
    tensor(dx, dy.shape())
}

/// Rotates the heads of every row, backwards for a negative sign.
fn rotate(y: &mut [f32], width: usize, rotation: &Rotation<'_>, sign: f32) {
    let (cos, sin, positions) = (rotation.cos.f32s(), rotation.sin.f32s(), u32s(rotation.positions));
    let half = rotation.cos.rows_cols().1;
    for_rows(y, width, |r, row| {
        let p = positions[r] as usize * half;
        let (cos, sin) = (&cos[p..p + half], &sin[p..p + half]);
        for head in row.chunks_exact_mut(rotation.head_dim).take(rotation.n_heads) {
            let (a, rest) = head.split_at_mut(half);
            for (((a, b), cos), sin) in a.iter_mut().zip(&mut rest[..half]).zip(cos).zip(sin) {
                let (x, y) = (*a, *b);
                *a = x * cos - sign * y * sin;
                *b = y * cos + sign * x * sin;
            }
        }
    });
}
