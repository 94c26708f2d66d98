//! Tensors that ranks share: what of the whole each has, how it is cut out, and how the whole comes back.

use std::sync::Arc;

use crate::{Error, Group, Result, Tensor};

/// A rank's piece of a tensor that is cut into equal ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Whether rows are cut; columns otherwise.
    pub rows: bool,
    /// Which piece.
    pub piece: usize,
    /// How many there are. Where they are fewer than ranks, neighbouring ranks have the same piece, and the gradient of
    /// the piece is the sum over them, see [`Split::add_copies`].
    pub pieces: usize,
}

impl Split {
    /// The piece that rank `ranks.rank()` has of `pieces`.
    pub fn of(ranks: &Arc<dyn Group>, rows: bool, pieces: usize) -> Self {
        Self { rows, piece: ranks.rank() * pieces / ranks.size(), pieces }
    }

    /// The piece, cut out of the whole matrix (or vector of rows).
    pub fn cut(&self, whole: &Tensor) -> Result<Tensor> {
        let shape = whole.shape();
        let n = if self.rows { shape[0] } else { whole.rows_cols().1 };
        if !n.is_multiple_of(self.pieces) {
            let what = if self.rows { "rows" } else { "columns" };
            let expected = format!("a multiple of {} {what}", self.pieces);
            return Err(Error::shape("split", "a shared tensor", expected, shape));
        }
        let range = self.piece * n / self.pieces..(self.piece + 1) * n / self.pieces;
        if !self.rows {
            return whole.device().kernels().columns(whole, range);
        }
        let width = whole.len() / n;
        let own = whole.reshape(&[n, width])?.rows(range.clone())?;
        // A copy of its own: the whole is not kept for the sake of a piece.
        let index = Tensor::from_u32(whole.device(), (0..range.len() as u32).collect());
        let own = whole.device().kernels().gather_rows(&own, &index)?;
        own.reshape(&[&[range.len()], &shape[1..]].concat())
    }

    /// The whole, from the pieces of all ranks; all of them call this.
    pub fn whole(&self, piece: &Tensor, ranks: &Arc<dyn Group>) -> Result<Tensor> {
        let (size, shape) = (ranks.size(), piece.shape());
        let all = ranks.all_gather(piece)?;
        let (n, width) = (shape[0], piece.len() / shape[0].max(1));
        if self.rows && self.pieces == size {
            return all.reshape(&self.whole_shape(shape));
        }
        let all = all.reshape(&[size * n, width])?;
        let of = |p: usize| (p * size).div_ceil(self.pieces) * n;
        let mut whole = all.rows(of(0)..of(0) + n)?;
        if self.rows {
            (1..self.pieces).try_for_each(|p| whole.append_rows(&all.rows(of(p)..of(p) + n)?))?;
            return whole.reshape(&self.whole_shape(shape));
        }
        let mut wide = piece.zeros_like(&[n, self.pieces * width])?;
        for p in 0..self.pieces {
            let part = all.rows(of(p)..of(p) + n)?;
            piece.device().kernels().add_columns(&mut wide, p * width..(p + 1) * width, &part)?;
        }
        Ok(wide)
    }

    /// Adds up the gradient of a piece over the ranks that have the same one, where there are more ranks than pieces; all
    /// ranks call this.
    pub fn add_copies(&self, gradient: Tensor, ranks: &Arc<dyn Group>) -> Result<Tensor> {
        let size = ranks.size();
        if self.pieces >= size {
            return Ok(gradient);
        }
        let (shape, n) = (gradient.shape().to_vec(), gradient.shape()[0]);
        let all = ranks.all_gather(&gradient)?.reshape(&[size * n, gradient.len() / n.max(1)])?;
        let mut sum: Option<Tensor> = None;
        for rank in (0..size).filter(|rank| rank * self.pieces / size == self.piece) {
            let part = all.rows(rank * n..(rank + 1) * n)?.reshape(&shape)?;
            match &mut sum {
                Some(sum) => sum.device().kernels().add_assign(sum, &part)?,
                None => sum = Some(part),
            }
        }
        Ok(sum.unwrap_or(gradient))
    }

    /// The shape of the whole, from that of a piece.
    pub fn whole_shape(&self, piece: &[usize]) -> Vec<usize> {
        let mut shape = piece.to_vec();
        let cut = if self.rows { shape.first_mut() } else { shape.last_mut() };
        cut.into_iter().for_each(|n| *n *= self.pieces);
        shape
    }
}
