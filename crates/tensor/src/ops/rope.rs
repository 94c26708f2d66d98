//! Rotary position embedding.

use super::{expect_rows, expect_shape};
use crate::tape::{Backward, Sink};
use crate::{Error, Result, Tape, Tensor, Var};

struct Rope {
    x: Var,
    head_dim: usize,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
}

impl Tape<'_> {
    /// Rotates each head by its row's position (Su et al., 2021; half-split pairing as Hugging Face has it). Tables
    /// narrower than half a head leave the rest of the head as it is.
    ///
    /// # Shapes
    /// x `[R, heads · head_dim]`, cos and sin `[P, half]` with `2 · half ≤ head_dim`, positions `u32 [R]` below P.
    pub fn rope(
        &self,
        x: &Var,
        head_dim: usize,
        tables: (&Tensor, &Tensor),
        positions: &Tensor,
    ) -> Result<Var> {
        let (cos, sin) = tables;
        let (rows, cols) = x.rows_cols();
        if !cols.is_multiple_of(head_dim) || 2 * cos.rows_cols().1 > head_dim {
            let expected = format!("[R, heads * {head_dim}] and tables of at most {} columns", head_dim / 2);
            return Err(Error::shape("rope", "input", expected, x.value().shape()));
        }
        expect_shape("rope", "sin", sin, cos.shape())?;
        expect_shape("rope", "positions", positions, &[rows])?;
        expect_rows("rope", "the cos table", positions, cos.rows_cols().0, false)?;
        let y = x.value().device().kernels().rope(x.value(), head_dim, tables, positions, false);
        Ok(self.record(y, self.any_needed(&[x]), || {
            let (cos, sin, positions) = (cos.clone(), sin.clone(), positions.clone());
            Box::new(Rope { x: x.clone(), head_dim, cos, sin, positions })
        }))
    }
}

impl Backward for Rope {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let tables = (&self.cos, &self.sin);
        let dx = dy.device().kernels().rope(&dy, self.head_dim, tables, &self.positions, true);
        sink.add(&self.x, dx);
        Ok(())
    }
}
