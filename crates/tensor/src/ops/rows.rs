//! Operations that move rows: embedding, gathering, adding a table's rows, taking columns.

use std::ops::Range;

use super::{expect_cols, expect_rows, expect_shape};
use crate::tape::{Backward, Sink};
use crate::{Error, ParamId, Result, Tape, Tensor, Var};

struct Embedding {
    id: ParamId,
    index: Tensor,
}

struct GatherRows {
    x: Var,
    index: Tensor,
}

struct AddRows {
    x: Var,
    table: Var,
    index: Tensor,
}

struct CollectRows {
    sources: Vec<Collected>,
}

/// Rows of one value and the places they take in a collection.
#[derive(Debug, Clone)]
pub struct Collected {
    /// The value.
    pub source: Var,
    /// Its rows, `u32 [n]`.
    pub from: Tensor,
    /// Their rows in the collection, `u32 [n]`; every row of the collection is named exactly once.
    pub to: Tensor,
}

struct Columns {
    x: Var,
    cols: Range<usize>,
}

impl Tape<'_> {
    /// The rows of an embedding table `[V, H]` for token ids `u32 [R]`, float32 `[R, H]`.
    pub fn embedding(&self, id: ParamId, index: &Tensor) -> Result<Var> {
        let table = &self.params().get(id).value;
        expect_rows("embedding", "the embedding table", index, table.rows_cols().0, false)?;
        let y = table.device().kernels().gather_rows(table, index);
        Ok(self.record(y, self.is_trained(id), || Box::new(Embedding { id, index: index.clone() })))
    }

    /// The rows of x that `index` names; `u32::MAX` gives a row of zeros.
    pub fn gather_rows(&self, x: &Var, index: &Tensor) -> Result<Var> {
        expect_rows("gather_rows", "the input", index, x.rows_cols().0, true)?;
        let y = x.value().device().kernels().gather_rows(x.value(), index);
        Ok(self
            .record(y, self.any_needed(&[x]), || Box::new(GatherRows { x: x.clone(), index: index.clone() })))
    }

    /// `y[r] = x[r] + table[index[r]]`: a projection that was computed once and is read shifted. `u32::MAX` adds
    /// nothing.
    ///
    /// # Shapes
    /// x `[R, D]`, table `[T, D]`, index `u32 [R]`.
    pub fn add_rows(&self, x: &Var, table: &Var, index: &Tensor) -> Result<Var> {
        expect_cols("add_rows", "table", table.value(), x.rows_cols().1)?;
        expect_shape("add_rows", "index", index, &[x.rows_cols().0])?;
        expect_rows("add_rows", "the table", index, table.rows_cols().0, true)?;
        let kernels = x.value().device().kernels();
        let mut y = kernels.gather_rows(table.value(), index);
        kernels.add_assign(&mut y, x.value());
        let needed = self.any_needed(&[x, table]);
        Ok(self.record(y, needed, || {
            Box::new(AddRows { x: x.clone(), table: table.clone(), index: index.clone() })
        }))
    }

    /// One value of `n_rows` rows out of rows of several, all of the same width.
    pub fn collect_rows(&self, sources: Vec<Collected>, n_rows: usize) -> Result<Var> {
        let width = sources.first().map_or(0, |c| c.source.rows_cols().1);
        let device = sources.first().map_or(crate::Device::Cpu, |c| c.source.value().device());
        let mut y = Tensor::zeros(device, &[n_rows, width]);
        let kernels = device.kernels();
        for c in &sources {
            expect_cols("collect_rows", "source", c.source.value(), width)?;
            expect_shape("collect_rows", "destination rows", &c.to, c.from.shape())?;
            expect_rows("collect_rows", "the source", &c.from, c.source.rows_cols().0, false)?;
            expect_rows("collect_rows", "the collection", &c.to, n_rows, false)?;
            kernels.scatter_add_rows(&mut y, &c.to, &kernels.gather_rows(c.source.value(), &c.from));
        }
        let needed = sources.iter().any(|c| self.any_needed(&[&c.source]));
        Ok(self.record(y, needed, || Box::new(CollectRows { sources })))
    }

    /// A copy of some columns of x, in float32.
    pub fn columns(&self, x: &Var, cols: Range<usize>) -> Result<Var> {
        if cols.end > x.rows_cols().1 || cols.start > cols.end {
            let expected = format!("at least {} columns", cols.end);
            return Err(Error::shape("columns", "input", expected, x.value().shape()));
        }
        let y = x.value().device().kernels().columns(x.value(), cols.clone());
        Ok(self.record(y, self.any_needed(&[x]), || Box::new(Columns { x: x.clone(), cols })))
    }
}

impl Backward for Embedding {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        if let Some(d) = sink.param(self.id) {
            d.device().kernels().scatter_add_rows(d, &self.index, &dy);
        }
        Ok(())
    }
}

/// Rows scattered back onto zeros of the shape of `like`.
fn scattered(like: &Var, index: &Tensor, dy: &Tensor) -> Tensor {
    let mut d = Tensor::zeros(dy.device(), like.value().shape());
    dy.device().kernels().scatter_add_rows(&mut d, index, dy);
    d
}

impl Backward for GatherRows {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(&self.x, scattered(&self.x, &self.index, &dy));
        Ok(())
    }
}

impl Backward for AddRows {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        if self.table.is_needed() {
            sink.add(&self.table, scattered(&self.table, &self.index, &dy));
        }
        sink.add(&self.x, dy);
        Ok(())
    }
}

impl Backward for CollectRows {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        for c in &self.sources {
            let rows = dy.device().kernels().gather_rows(&dy, &c.to);
            sink.add(&c.source, scattered(&c.source, &c.from, &rows));
        }
        Ok(())
    }
}

impl Backward for Columns {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let mut d = Tensor::zeros(dy.device(), self.x.value().shape());
        dy.device().kernels().add_columns(&mut d, self.cols, &dy);
        sink.add(&self.x, d);
        Ok(())
    }
}
