//! Tensors as bytes on their way from a file to a device: widened, in another order, transposed.

use std::borrow::Cow;

use half::{bf16, f16};
use rayon::prelude::*;
use specforge_nn::weights::{Dtype, Weights};
use specforge_tensor::{DType, Device, Split, Tensor};

use super::Loader;
use crate::quantization::Quantization;
use crate::{Error, Result};

/// In an order of rows or columns: zeros.
pub(crate) const ZEROS: usize = usize::MAX;

/// Elements of a float type, row-major, little-endian.
#[derive(Clone)]
pub(super) struct Raw<'a> {
    pub dtype: Dtype,
    pub bytes: Cow<'a, [u8]>,
}

impl Loader<'_> {
    /// The tensor of this full name and shape. What is kept in 8 or 4 bits is widened.
    pub(super) fn read<'w>(&self, weights: &'w Weights, name: &str, shape: &[usize]) -> Result<Raw<'w>> {
        if self.quantization == Quantization::Mxfp4 && weights.has_mxfp4(name) {
            return Ok(Raw::of_bf16(&weights.mxfp4(name, shape)?));
        }
        let view = weights.require(name, shape)?;
        match (view.dtype, self.quantization, shape) {
            (Dtype::F8E4M3, Quantization::Fp8(block), &[.., _, _]) => {
                Ok(Raw::of_f32(&weights.fp8_blocks(name, shape, block)?))
            }
            (Dtype::F64, ..) => Ok(Raw::of_f32(&view.to_f32())),
            (Dtype::F32 | Dtype::BF16 | Dtype::F16, ..) => {
                Ok(Raw { dtype: view.dtype, bytes: Cow::Borrowed(view.bytes) })
            }
            (other, ..) => {
                let (path, tensor) = (self.folder.to_path_buf(), name.to_owned());
                Err(Error::WeightType { path, tensor, got: other.to_string() })
            }
        }
    }

    /// Straight from the bytes to a type of storage; absent: the loader's, or the type of the bytes.
    pub(super) fn convert(&self, raw: &Raw<'_>, shape: &[usize], storage: Option<DType>) -> Result<Tensor> {
        let stored = match raw.dtype {
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            _ => DType::F32,
        };
        let storage = storage.or(self.storage).unwrap_or(stored);
        let halves = || raw.bytes.as_chunks::<2>().0.iter();
        Ok(match (storage, stored) {
            (DType::Bf16, DType::Bf16) => {
                let values = halves().map(|&b| bf16::from_le_bytes(b)).collect();
                Tensor::from_bf16(self.device, values, shape)?
            }
            (DType::F16, DType::F16) => {
                let values = halves().map(|&b| f16::from_le_bytes(b)).collect();
                Tensor::from_f16(self.device, values, shape)?
            }
            // Rounded here where fewer bytes then go to a device.
            _ => Tensor::from_f32(Device::Cpu, raw.to_f32(), shape)?.cast(storage)?.to_device(self.device)?,
        })
    }
}

impl Raw<'_> {
    fn of_f32(values: &[f32]) -> Self {
        let mut bytes = vec![0; 4 * values.len()];
        let pairs = bytes.as_chunks_mut::<4>().0.par_iter_mut().zip(values);
        pairs.for_each(|(bytes, value)| *bytes = value.to_le_bytes());
        Self { dtype: Dtype::F32, bytes: Cow::Owned(bytes) }
    }

    fn of_bf16(values: &[bf16]) -> Self {
        let mut bytes = vec![0; 2 * values.len()];
        let pairs = bytes.as_chunks_mut::<2>().0.par_iter_mut().zip(values);
        pairs.for_each(|(bytes, value)| *bytes = value.to_le_bytes());
        Self { dtype: Dtype::BF16, bytes: Cow::Owned(bytes) }
    }

    fn to_f32(&self) -> Vec<f32> {
        let halves = || self.bytes.as_chunks::<2>().0.iter();
        match self.dtype {
            Dtype::BF16 => halves().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            Dtype::F16 => halves().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            _ => self.bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        }
    }

    /// With the elements of another one behind its own; in float32 where their types differ.
    pub(super) fn followed_by(self, more: Self) -> Self {
        let widened = |raw: Self| Self::of_f32(&raw.to_f32());
        let (mut all, more) =
            if self.dtype == more.dtype { (self, more) } else { (widened(self), widened(more)) };
        all.bytes.to_mut().extend_from_slice(&more.bytes);
        all
    }

    /// The same bytes.
    pub(super) fn whole(&self) -> Raw<'_> {
        Raw { dtype: self.dtype, bytes: Cow::Borrowed(&self.bytes) }
    }

    /// Of a tensor of `rows` rows, one piece of several.
    pub(super) fn piece(&self, rows: usize, split: Split) -> Raw<'_> {
        let n = self.bytes.len() / split.pieces;
        if split.rows {
            return Raw { dtype: self.dtype, bytes: Cow::Borrowed(&self.bytes[split.piece * n..][..n]) };
        }
        let row = self.bytes.len() / rows;
        let part = row / split.pieces;
        let parts = self.bytes.chunks_exact(row).flat_map(|row| row[split.piece * part..][..part].iter());
        Raw { dtype: self.dtype, bytes: Cow::Owned(parts.copied().collect()) }
    }

    /// Of a matrix of `rows` rows, row `order[i]` as row i.
    pub(super) fn rows_in_order(&self, rows: usize, order: &[usize]) -> Raw<'static> {
        let bytes = in_order(&self.bytes, self.bytes.len() / rows.max(1), order);
        Raw { dtype: self.dtype, bytes: Cow::Owned(bytes) }
    }

    /// Of a matrix with `columns` columns, column `order[i]` as column i.
    pub(super) fn columns_in_order(&self, columns: usize, order: &[usize]) -> Raw<'static> {
        let size = self.dtype.size();
        let rows = self.bytes.chunks_exact(size * columns.max(1));
        let bytes = rows.flat_map(|row| in_order(row, size, order)).collect();
        Raw { dtype: self.dtype, bytes: Cow::Owned(bytes) }
    }

    /// Of matrices `[k, n]` one behind the other the transposes, row i being column `order[i]`.
    pub(super) fn transposed(&self, [k, n]: [usize; 2], order: &[usize]) -> Raw<'static> {
        let bytes = match self.dtype.size() {
            2 => transposed::<2>(&self.bytes, [k, n], order),
            _ => transposed::<4>(&self.bytes, [k, n], order),
        };
        Raw { dtype: self.dtype, bytes: Cow::Owned(bytes) }
    }
}

fn transposed<const SIZE: usize>(bytes: &[u8], [k, n]: [usize; 2], order: &[usize]) -> Vec<u8> {
    // Rows of the result per task, which read neighbouring columns together.
    const ROWS: usize = 64;
    let mut moved = vec![0; bytes.len() / (n * SIZE).max(1) * order.len() * SIZE];
    let from = bytes.as_chunks::<SIZE>().0;
    let matrices = moved
        .par_chunks_exact_mut((k * order.len() * SIZE).max(1))
        .zip(from.par_chunks_exact((k * n).max(1)));
    matrices.for_each(|(to, from)| {
        let blocks = to.par_chunks_mut(ROWS * k * SIZE).zip(order.par_chunks(ROWS));
        blocks.for_each(|(to, columns)| {
            let to = to.as_chunks_mut::<SIZE>().0;
            for (i, row) in from.chunks_exact(n).enumerate() {
                columns.iter().enumerate().for_each(|(r, &column)| to[r * k + i] = row[column]);
            }
        });
    });
    moved
}

/// Pieces of `size` bytes in another order.
fn in_order(bytes: &[u8], size: usize, order: &[usize]) -> Vec<u8> {
    let mut moved = Vec::with_capacity(order.len() * size);
    for &from in order {
        match from {
            ZEROS => moved.resize(moved.len() + size, 0),
            from => moved.extend_from_slice(&bytes[from * size..][..size]),
        }
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(values: &[f32]) -> Raw<'static> {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Raw { dtype: Dtype::F32, bytes: Cow::Owned(bytes) }
    }

    #[test]
    fn rows_and_columns_are_moved() {
        let x = raw(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(
            x.rows_in_order(2, &[1, ZEROS, 0]).to_f32(),
            [4.0, 5.0, 6.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0]
        );
        assert_eq!(x.columns_in_order(3, &[2, ZEROS, 0]).to_f32(), [3.0, 0.0, 1.0, 6.0, 0.0, 4.0]);
        assert_eq!(x.transposed([1, 3], &[2, 0]).to_f32(), [3.0, 1.0, 6.0, 4.0]);
        assert_eq!(x.transposed([2, 3], &[0, 2, 1]).to_f32(), [1.0, 4.0, 3.0, 6.0, 2.0, 5.0]);
    }
}
