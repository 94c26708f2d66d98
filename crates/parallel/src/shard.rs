//! A rank's part of a tensor: of `size` equal flat pieces the rank's own, the last ones padded with zeros.
//!
//! A draft has some twenty parameters, so each goes by itself: there is nothing to be won by packing them into buckets.

use std::ops::Range;
use std::sync::Arc;

use specforge_tensor::{Combine, DType, Group, Result, Tensor};

use crate::Mesh;

/// What is spread over ranks instead of being held by each; the stages of ZeRO (Rajbhandari et al., 2020,
/// arXiv 1910.02054) and FSDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Nothing.
    None,
    /// The optimizer's state.
    Optimizer,
    /// Gradients too.
    Gradients,
    /// Parameters too.
    Full,
}

/// How tensors are cut over the ranks of a mesh that hold one copy of the state.
#[derive(Debug, Clone)]
pub struct Shards {
    parts: Arc<dyn Group>,
    replicas: Arc<dyn Group>,
    /// What gradients are sent as: float32 or bfloat16.
    reduce: DType,
}

impl Shards {
    /// Those of a mesh.
    pub fn new(mesh: &Mesh, reduce: DType) -> Self {
        Self { parts: mesh.parts.clone(), replicas: mesh.replicas.clone(), reduce }
    }

    /// The ranks that have the other parts.
    pub fn group(&self) -> &dyn Group {
        self.parts.as_ref()
    }

    /// Elements of every part of a tensor of `len`, padding included.
    pub fn part_len(&self, len: usize) -> usize {
        len.div_ceil(self.parts.size())
    }

    /// The elements of a tensor of `len` that are in this rank's part.
    pub fn range(&self, len: usize) -> Range<usize> {
        let (rank, n) = (self.parts.rank(), self.part_len(len));
        (rank * n).min(len)..((rank + 1) * n).min(len)
    }

    /// This rank's part, `[part_len]`, in memory of its own.
    pub fn cut(&self, x: &Tensor) -> Result<Tensor> {
        let own = x.reshape(&[x.len(), 1])?.rows(self.range(x.len()))?;
        let n = self.part_len(x.len());
        if own.len() == n {
            return own.copied()?.reshape(&[n]);
        }
        padded(&own, n)?.reshape(&[n])
    }

    /// Bytes that leave this rank where a gradient of `len` elements is reduced.
    pub fn reduce_bytes(&self, len: usize) -> u64 {
        let part = (self.part_len(len) * self.reduce.size()) as u64;
        leaving(part * self.parts.size() as u64, self.parts.size()) + 2 * leaving(part, self.replicas.size())
    }

    /// Bytes that leave this rank where a tensor is gathered from parts like this one.
    pub fn gather_bytes(&self, part: &Tensor) -> u64 {
        leaving((part.len() * self.parts.size() * part.dtype().size()) as u64, self.parts.size())
    }

    /// This rank's part of the sum of all ranks' gradients, float32 `[part_len]`.
    pub fn reduce(&self, grad: &Tensor) -> Result<Tensor> {
        let n = self.part_len(grad.len());
        let flat = padded(&grad.reshape(&[grad.len(), 1])?, n * self.parts.size())?;
        let flat = flat.reshape(&[self.parts.size(), n])?.cast(self.reduce)?;
        let mut part = self.parts.reduce_scatter(&flat)?;
        if self.replicas.size() > 1 {
            self.replicas.all_reduce(&mut part, Combine::Sum)?;
        }
        part.cast(DType::F32)?.reshape(&[n])
    }

    /// The whole tensor of a shape, from every rank's part.
    pub fn gather(&self, part: &Tensor, shape: &[usize]) -> Result<Tensor> {
        let len: usize = shape.iter().product();
        let all = self.parts.all_gather(part)?;
        all.reshape(&[all.len(), 1])?.rows(0..len)?.reshape(shape)
    }
}

/// A column with zeros up to `n` rows.
fn padded(column: &Tensor, n: usize) -> Result<Tensor> {
    let mut padded = column.clone();
    if column.len() < n {
        padded.append_rows(&column.zeros_like(&[n - column.len(), 1])?)?;
    }
    Ok(padded)
}

/// Bytes that leave each of so many ranks where a tensor of `bytes` is reduced to parts of it, or gathered from parts,
/// by a ring; an all-reduce does both (Patarasuk and Yuan, 2009).
pub fn leaving(bytes: u64, ranks: usize) -> u64 {
    bytes * (ranks as u64 - 1) / ranks as u64
}

/// The sum of all ranks' gradients, float32, sent as `reduce`.
pub fn sum(group: &dyn Group, grad: Tensor, reduce: DType) -> Result<Tensor> {
    // In place, where it is sent as it is.
    let mut sum = if reduce == DType::F32 { grad } else { grad.cast(reduce)? };
    group.all_reduce(&mut sum, Combine::Sum)?;
    sum.cast(DType::F32)
}
