//! Operations that move rows: embedding, gathering, adding a table's rows, taking columns.

use std::ops::Range;
use std::sync::Arc;

use super::{expect_cols, expect_rows, expect_shape};
use crate::tape::{Backward, Sink, Slot};
use crate::{Combine, Error, Group, ParamId, Result, Tape, Tensor, Var};

struct Embedding {
    id: ParamId,
    index: Tensor,
}

struct GatherRows {
    x: Slot,
    index: Tensor,
}

struct CollectRows {
    /// Each source, its rows, and their places.
    sources: Vec<(Slot, Tensor, Tensor)>,
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
    x: Slot,
    cols: Range<usize>,
}

impl Tape<'_> {
    /// The rows of an embedding table `[V, H]` for token ids `u32 [R]`, `[R, H]`.
    pub fn embedding(&self, id: ParamId, index: &Tensor) -> Result<Var> {
        let table = &self.params().get(id).value;
        expect_rows("embedding", "the embedding table", index, table.rows_cols().0, false)?;
        // A frozen table may stay on the host: its rows go to the device of the index.
        let y = if table.device() == index.device() {
            table.device().kernels().gather_rows(table, index)?
        } else {
            table.rows_from_host(&index.to_u32(), index.device())?.cast(index.device().storage())?
        };
        Ok(self.record(y, self.is_trained(id), || Box::new(Embedding { id, index: index.clone() })))
    }

    /// As [`Tape::embedding`], of a table that ranks share: each has as many of its rows as the others, in their order.
    /// Alone it is the same.
    pub fn embedding_shared(
        &self,
        id: ParamId,
        index: &Tensor,
        ranks: Option<&Arc<dyn Group>>,
    ) -> Result<Var> {
        let Some(ranks) = ranks else { return self.embedding(id, index) };
        let table = &self.params().get(id).value;
        let n = table.rows_cols().0;
        expect_rows("embedding", "the embedding table", index, n * ranks.size(), false)?;
        // 1. This rank's rows; zeros for the others'.
        let own = |&i: &u32| (i as usize).checked_sub(ranks.rank() * n).filter(|&i| i < n);
        let ids = index.to_u32();
        let own: Vec<u32> = ids.iter().map(|i| own(i).map_or(u32::MAX, |i| i as u32)).collect();
        let device = index.device();
        let local = Tensor::from_u32(device, own.clone());
        let mut y = if table.device() == device {
            device.kernels().gather_rows(table, &local)?
        } else {
            let near: Vec<u32> = own.iter().map(|&i| if i == u32::MAX { 0 } else { i }).collect();
            let rows = table.rows_from_host(&near, device)?.cast(device.storage())?;
            let kept = own.iter().enumerate().map(|(r, &i)| if i == u32::MAX { i } else { r as u32 });
            device.kernels().gather_rows(&rows, &Tensor::from_u32(device, kept.collect()))?
        };
        // 2. Each row is some rank's.
        ranks.all_reduce(&mut y, Combine::Sum)?;
        Ok(self.record(y, self.is_trained(id), || Box::new(Embedding { id, index: local })))
    }

    /// The rows of x that `index` names; `u32::MAX` gives a row of zeros.
    pub fn gather_rows(&self, x: &Var, index: &Tensor) -> Result<Var> {
        expect_rows("gather_rows", "the input", index, x.rows_cols().0, true)?;
        let n = x.rows_cols().0;
        if index.len() == n
            && index.u32s().is_some_and(|rows| rows.iter().enumerate().all(|(i, &r)| i == r as usize))
        {
            return Ok(x.clone());
        }
        let y = x.value().device().kernels().gather_rows(x.value(), index)?;
        Ok(self
            .record(y, self.any_needed(&[x]), || Box::new(GatherRows { x: x.into(), index: index.clone() })))
    }

    /// One value of `n_rows` rows out of rows of several, all of the same width.
    pub fn collect_rows(&self, sources: Vec<Collected>, n_rows: usize) -> Result<Var> {
        let width = sources.first().map_or(0, |c| c.source.rows_cols().1);
        let device = sources.first().map_or(crate::Device::Cpu, |c| c.source.value().device());
        // Every row is named once: nothing is left unwritten.
        let mut y = Tensor::unwritten(device, &[n_rows, width])?;
        let kernels = device.kernels();
        for c in &sources {
            expect_cols("collect_rows", "source", c.source.value(), width)?;
            expect_shape("collect_rows", "destination rows", &c.to, c.from.shape())?;
            expect_rows("collect_rows", "the source", &c.from, c.source.rows_cols().0, false)?;
            expect_rows("collect_rows", "the collection", &c.to, n_rows, false)?;
            kernels.copy_rows(&mut y, &c.to, c.source.value(), &c.from)?;
        }
        let needed = sources.iter().any(|c| self.any_needed(&[&c.source]));
        let sources = || sources.into_iter().map(|c| (Slot::from(&c.source), c.from, c.to)).collect();
        Ok(self.record(y, needed, || Box::new(CollectRows { sources: sources() })))
    }

    /// A copy of some columns of x.
    pub fn columns(&self, x: &Var, cols: Range<usize>) -> Result<Var> {
        if cols.end > x.rows_cols().1 || cols.start > cols.end {
            let expected = format!("at least {} columns", cols.end);
            return Err(Error::shape("columns", "input", expected, x.value().shape()));
        }
        let y = x.value().device().kernels().columns(x.value(), cols.clone())?;
        Ok(self.record(y, self.any_needed(&[x]), || Box::new(Columns { x: x.into(), cols })))
    }
}

impl Backward for Embedding {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let kernels = dy.device().kernels();
        sink.params(&[self.id], |grads| kernels.scatter_add_rows(&mut grads[0], &self.index, &dy))
    }

    fn params(&self) -> Vec<ParamId> {
        vec![self.id]
    }
}

impl Backward for GatherRows {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        sink.add_onto(self.x, |sum| {
            let mut d = sum.map_or_else(|| Tensor::activations(dy.device(), &self.x.shape()), Ok)?;
            dy.device().kernels().scatter_add_rows(&mut d, &self.index, &dy)?;
            Ok(d)
        })
    }
}

impl Backward for CollectRows {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let kernels = dy.device().kernels();
        for (source, from, to) in &self.sources {
            sink.add_onto(*source, |sum| match (sum, inverse(from, to, source.shape()[0])) {
                (None, Some(index)) => kernels.gather_rows(&dy, &Tensor::from_u32(dy.device(), index)),
                (sum, _) => {
                    let zeros = || Tensor::activations(dy.device(), &source.shape());
                    let mut d = sum.map_or_else(zeros, Ok)?;
                    kernels.scatter_add_rows(&mut d, from, &kernels.gather_rows(&dy, to)?)?;
                    Ok(d)
                }
            })?;
        }
        Ok(())
    }
}

/// For each row of a source its place in the collection, `u32::MAX` for none; nothing if a row has several.
fn inverse(from: &Tensor, to: &Tensor, rows: usize) -> Option<Vec<u32>> {
    let mut index = vec![u32::MAX; rows];
    for (&from, &to) in from.u32s()?.iter().zip(to.u32s()?) {
        let place = &mut index[from as usize];
        if *place != u32::MAX {
            return None;
        }
        *place = to;
    }
    Some(index)
}

impl Backward for Columns {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        sink.add_columns(self.x, self.cols.start, dy)
    }
}
