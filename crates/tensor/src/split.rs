//! Tensors that ranks share: what of the whole each has, how it is cut out, and how the whole comes back.

use std::sync::Arc;

use crate::{Error, Grads, Group, Params, Result, Tensor};

/// A rank's piece of a tensor that is cut into equal ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Whether rows are cut; columns otherwise.
    pub rows: bool,
    /// Which piece.
    pub piece: usize,
    /// How many there are. Where they are fewer than ranks, neighbouring ranks have the same piece, and the gradient of
    /// the piece is the sum over them, see [`Grads::add_copies`].
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
        let all = all.reshape(&[size * n, width])?;
        let of = |p: usize| (p * size).div_ceil(self.pieces) * n;
        let mut whole = all.rows(of(0)..of(0) + n)?;
        if self.rows {
            (1..self.pieces).try_for_each(|p| whole.append_rows(&all.rows(of(p)..of(p) + n)?))?;
            return whole.reshape(&[&[self.pieces * n], &shape[1..]].concat());
        }
        let mut wide = piece.zeros_like(&[n, self.pieces * width])?;
        for p in 0..self.pieces {
            let part = all.rows(of(p)..of(p) + n)?;
            piece.device().kernels().add_columns(&mut wide, p * width..(p + 1) * width, &part)?;
        }
        Ok(wide)
    }
}

impl Grads {
    /// Adds up the gradients of pieces that several ranks have, over those ranks; all ranks of `ranks`, which share the
    /// parameters, call this once the backward of a step is done.
    pub fn add_copies(&mut self, params: &Params, ranks: &Arc<dyn Group>) -> Result<()> {
        for (id, param) in params.iter() {
            let Some(split) = param.split.filter(|split| split.pieces < ranks.size()) else { continue };
            let Some(own) = self.get_mut(id) else { continue };
            let n = own.shape()[0];
            let all = ranks.all_gather(own)?.reshape(&[ranks.size() * n, own.len() / n.max(1)])?;
            let same = (0..ranks.size()).filter(|rank| rank * split.pieces / ranks.size() == split.piece);
            let shape = own.shape().to_vec();
            let mut sum: Option<Tensor> = None;
            for rank in same {
                let part = all.rows(rank * n..(rank + 1) * n)?.reshape(&shape)?;
                match &mut sum {
                    Some(sum) => sum.device().kernels().add_assign(sum, &part)?,
                    None => sum = Some(part),
                }
            }
            if let Some(sum) = sum {
                own.assign(&sum)?;
            }
        }
        Ok(())
    }
}
