//! Rotary position embedding, fused with the addition of a projection that was computed once and is read shifted.

use super::{expect_cols_from, expect_rows, expect_shape};
use crate::kernels::{AddedRows, Columns, Rotation};
use crate::tape::{Backward, Sink, Slot};
use crate::{DType, Error, Result, Tape, Tensor, Var};

/// How rows are rotated.
#[derive(Debug, Clone)]
pub struct Rope {
    /// Heads of a row that are rotated, the first ones; what comes after them (values beside keys) stays.
    pub n_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Cosines, float32 `[P, half]` with `2 · half ≤ head_dim`: a narrower table leaves the rest of a head as it is.
    pub cos: Tensor,
    /// Sines, like the cosines.
    pub sin: Tensor,
    /// The table row of each row, `u32 [R]` below P.
    pub positions: Tensor,
}

impl Rope {
    fn rotation(&self) -> Rotation<'_> {
        let Self { n_heads, head_dim, cos, sin, positions } = self;
        Rotation { n_heads: *n_heads, head_dim: *head_dim, cos, sin, positions }
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        let (rows, cols) = x.rows_cols();
        if self.n_heads * self.head_dim > cols || 2 * self.cos.rows_cols().1 > self.head_dim {
            let (heads, d) = (self.n_heads, self.head_dim);
            let expected = format!("[R, {heads} * {d} or more] and tables of at most {} columns", d / 2);
            return Err(Error::shape("rope", "input", expected, x.shape()));
        }
        expect_shape("rope", "sin", &self.sin, self.cos.shape())?;
        expect_shape("rope", "positions", &self.positions, &[rows])?;
        expect_rows("rope", "the cos table", &self.positions, self.cos.rows_cols().0, false)
    }
}

/// Columns of a value.
#[derive(Debug, Clone)]
pub struct Part {
    /// The value.
    pub of: Var,
    /// Its first column that is meant.
    pub first: usize,
}

impl Part {
    /// The columns of `of` from `first` on.
    pub fn new(of: &Var, first: usize) -> Self {
        Self { of: of.clone(), first }
    }

    pub(crate) fn columns(&self) -> Columns<'_> {
        Columns { of: self.of.value(), first: self.first }
    }
}

struct Saved {
    x: Slot,
    rope: Rope,
    added: Option<(Part, Tensor)>,
}

impl Tape<'_> {
    /// Rotates heads by their row's position (Su et al., 2021; half-split pairing as Hugging Face has it); x `[R, D]`.
    pub fn rope(&self, x: &Var, rope: &Rope) -> Result<Var> {
        self.rope_onto(x, rope, None)
    }

    /// As [`Tape::rope`], of `x[r] + table[index[r]]`; `u32::MAX` adds nothing. No other row of the index may be named
    /// twice.
    ///
    /// # Shapes
    /// x `[R, D]`, table `[T, ≥ D]` of which D columns are read, index `u32 [R]`.
    pub fn rope_added(&self, x: &Var, rope: &Rope, table: &Part, index: &Tensor) -> Result<Var> {
        expect_cols_from("rope", "table", table.of.value(), table.first, x.rows_cols().1)?;
        expect_shape("rope", "index", index, &[x.rows_cols().0])?;
        expect_rows("rope", "the table", index, table.of.rows_cols().0, true)?;
        self.rope_onto(x, rope, Some((table, index)))
    }

    fn rope_onto(&self, x: &Var, rope: &Rope, added: Option<(&Part, &Tensor)>) -> Result<Var> {
        rope.check(x.value())?;
        let rows = added.map(|(table, index)| AddedRows { table: table.columns(), index });
        let y = x.value().device().kernels().rope(x.value(), &rope.rotation(), rows)?;
        let needed = self.any_needed(&[x]) || added.is_some_and(|(table, _)| self.any_needed(&[&table.of]));
        let added = added.map(|(table, index)| (table.clone(), index.clone()));
        Ok(self.record(y, needed, || Box::new(Saved { x: x.into(), rope: rope.clone(), added })))
    }
}

impl Backward for Saved {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let (kernels, rotation) = (dy.device().kernels(), self.rope.rotation());
        let dx = match self.added.as_ref().filter(|(table, _)| table.of.is_needed()) {
            None => kernels.rope_backward(&dy, &rotation, None)?,
            Some((table, index)) => {
                // Sums over all steps: kept in float32.
                let so_far = sink.take(&table.of);
                let zeros = || Tensor::zeros(dy.device(), table.of.value().shape());
                let mut d = so_far.map_or_else(zeros, |d| d.cast(DType::F32))?;
                let dx = kernels.rope_backward(&dy, &rotation, Some((&mut d, table.first, index)))?;
                sink.put(&table.of, d);
                dx
            }
        };
        sink.add(self.x, dx)
    }
}
