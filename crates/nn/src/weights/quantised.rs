//! Weights in fewer bits than they are computed in, widened while they are read.

use half::bf16;
use rayon::prelude::*;

use super::view::{f8e4m3_to_f32, f8e8m0_to_f32};
use super::{Dtype, Error, Result, View, Weights};

/// Values of a 4-bit float (OCP E2M1) by its lower three bits; the fourth is the sign.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// 4-bit floats that share a scale.
const MX_BLOCK: usize = 32;

impl Weights {
    /// Matrices `name` of 8-bit floats, `[.., R, C]`, each block of `block` rows and columns of one (fewer at the edges)
    /// times its number in `{name}_scale_inv` `[.., R / rows, C / columns]`, rounded up: exact products in float32. The
    /// numbers may also be called `_weight_scale_inv`, `_weight_scale` or `_scale`.
    pub fn fp8_blocks(&self, name: &str, shape: &[usize], block: [usize; 2]) -> Result<Vec<f32>> {
        let view = self.require(name, shape)?;
        let scale_name = self.fp8_scale_name(name);
        let (outer, matrix) = shape.split_at(shape.len().saturating_sub(2));
        let &[height, width] = matrix else {
            let why = "is no matrix, but has the element type F8_E4M3".to_owned();
            return Err(Error::entry(self.file_of(name), name, why));
        };
        let grid = [height.div_ceil(block[0]), width.div_ceil(block[1])];
        let scales = self.require(&scale_name, &[outer, &grid].concat())?;
        self.expect_type(name, &view, &[Dtype::F8E4M3])?;
        let floats = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8E8M0];
        self.expect_type(&scale_name, &scales, &floats)?;
        let (codes, scales) = (f8e4m3_table(), scales.to_f32());
        let (mut values, width) = (vec![0.0; view.bytes.len()], width.max(1));
        let rows = values.par_chunks_exact_mut(width).zip(view.bytes.par_chunks_exact(width));
        rows.enumerate().for_each(|(r, (row, bytes))| {
            let (of_matrix, r) = (r / height * grid[0], r % height);
            let scales = &scales[(of_matrix + r / block[0]) * grid[1]..][..grid[1]];
            for ((part, bytes), scale) in row.chunks_mut(block[1]).zip(bytes.chunks(block[1])).zip(scales) {
                part.iter_mut().zip(bytes).for_each(|(v, byte)| *v = codes[usize::from(*byte)] * scale);
            }
        });
        Ok(values)
    }

    /// What the factors of 8-bit floats are called here; the usual name if there are none.
    fn fp8_scale_name(&self, name: &str) -> String {
        let names =
            ["_scale_inv", "_weight_scale_inv", "_weight_scale", "_scale"].map(|end| format!("{name}{end}"));
        let [usual, ..] = &names;
        names.iter().find(|name| self.get(name).is_some()).unwrap_or(usual).clone()
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
        let mut values = vec![bf16::ZERO; 2 * blocks.bytes.len()];
        let pairs = blocks.bytes.par_chunks_exact(MX_BLOCK / 2).zip(scales.bytes);
        let pairs = values.par_chunks_exact_mut(MX_BLOCK).zip(pairs);
        pairs.for_each(|(values, (block, &scale))| widen(values, block, scale));
        Ok(values)
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

/// The values of all codes.
fn f8e4m3_table() -> [f32; 256] {
    std::array::from_fn(|code| f8e4m3_to_f32(code as u8))
}

fn widen(values: &mut [bf16], block: &[u8], scale: u8) {
    let scale = f8e8m0_to_f32(scale);
    let value = |code: u8| {
        let size = E2M1[usize::from(code & 7)] * scale;
        bf16::from_f32(if code & 8 == 0 { size } else { -size })
    };
    for (pair, byte) in values.as_chunks_mut::<2>().0.iter_mut().zip(block) {
        *pair = [value(byte & 0xf), value(byte >> 4)];
    }
}

#[cfg(test)]
mod tests;
