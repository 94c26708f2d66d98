//! Weights in fewer bits than they are computed in, widened while they are read.

use half::bf16;
use rayon::prelude::*;

use super::view::f8e8m0_to_f32;
use super::{Dtype, Error, Result, View, Weights};

/// Values of a 4-bit float (OCP E2M1) by its lower three bits; the fourth is the sign.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// 4-bit floats that share a scale.
const MX_BLOCK: usize = 32;

impl Weights {
    /// The matrix `name` of 8-bit floats, each block of `block` rows and columns (fewer at the edges) times its number in
    /// `{name}_scale_inv`: exact products in float32.
    pub fn fp8_blocks(&self, name: &str, shape: [usize; 2], block: [usize; 2]) -> Result<Vec<f32>> {
        let view = self.require(name, &shape)?;
        let scale_name = format!("{name}_scale_inv");
        let grid = [shape[0].div_ceil(block[0]), shape[1].div_ceil(block[1])];
        let scales = self.require(&scale_name, &grid)?;
        self.expect_type(name, &view, &[Dtype::F8E4M3])?;
        let floats = [Dtype::F32, Dtype::BF16, Dtype::F8E8M0];
        self.expect_type(&scale_name, &scales, &floats)?;
        let (mut values, scales) = (view.to_f32(), scales.to_f32());
        for (r, row) in values.chunks_exact_mut(shape[1].max(1)).enumerate() {
            let scales = &scales[r / block[0] * grid[1]..][..grid[1]];
            for (part, scale) in row.chunks_mut(block[1]).zip(scales) {
                part.iter_mut().for_each(|v| *v *= scale);
            }
        }
        Ok(values)
    }

    /// Whether `name` is kept as 4-bit floats: as `{name}_blocks` and `{name}_scales`.
    pub fn has_mxfp4(&self, name: &str) -> bool {
        self.get(&format!("{name}_blocks")).is_some()
    }

    /// Matrices of 4-bit floats (OCP microscaling MXFP4), exact in bfloat16. Of a shape `[.., K]`, `{name}_blocks` is
    /// `[.., K / 32, 16]`, two numbers in a byte, the first in its lower half, and `{name}_scales` `[.., K / 32]` powers
    /// of two.
    pub fn mxfp4(&self, name: &str, shape: &[usize]) -> Result<Vec<bf16>> {
        let (outer, k) = shape.split_at(shape.len().saturating_sub(1));
        let grid = [outer, &[k[0] / MX_BLOCK]].concat();
        let (blocks_name, scales_name) = (format!("{name}_blocks"), format!("{name}_scales"));
        let blocks = self.require(&blocks_name, &[&grid[..], &[MX_BLOCK / 2]].concat())?;
        let scales = self.require(&scales_name, &grid)?;
        self.expect_type(&blocks_name, &blocks, &[Dtype::U8])?;
        self.expect_type(&scales_name, &scales, &[Dtype::U8, Dtype::F8E8M0])?;
        let pairs = blocks.bytes.par_chunks_exact(MX_BLOCK / 2).zip(scales.bytes);
        Ok(pairs.flat_map_iter(|(block, &scale)| widened(block, scale)).collect())
    }

    fn expect_type(&self, name: &str, view: &View<'_>, types: &[Dtype]) -> Result<()> {
        if types.contains(&view.dtype) {
            return Ok(());
        }
        let expected: Vec<&str> = types.iter().map(|t| t.name()).collect();
        let why = format!("has the element type {}, expected {}", view.dtype, expected.join(" or "));
        Err(Error::entry(self.file_of(name), name, why))
    }
}

fn widened(block: &[u8], scale: u8) -> impl Iterator<Item = bf16> + '_ {
    let scale = f8e8m0_to_f32(scale);
    let value = move |code: u8| {
        let size = E2M1[usize::from(code & 7)] * scale;
        bf16::from_f32(if code & 8 == 0 { size } else { -size })
    };
    block.iter().flat_map(move |byte| [value(byte & 0xf), value(byte >> 4)])
}

#[cfg(test)]
mod tests;
