//! Linear layers with 8-bit weights: inputs are rounded row by row, products accumulate in float32.

use std::ops::Range;

use specforge_cuda::{Gemm, GemmType, Operand};

use super::gemm::{FEW_ROWS, groups, joined_bias, plain};
use super::launch::{at, gpu_of, in_bf16, output, row_blocks, run, stored};
use super::rows;
use super::units::{FP8, ROWS};
use crate::{DType, Error, Result, Tensor};

/// `y = x · wᵀ (+ bias) (+ residual)`, every weight whole and in 8 bits.
pub(super) fn linear(
    x: &Tensor,
    w: &[&Tensor],
    cols: Range<usize>,
    bias: &[&Tensor],
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let ((r, k), n) = (x.rows_cols(), w.iter().map(|w| w.rows_cols().0).sum());
    if cols != (0..w[0].rows_cols().1) {
        let why = "columns of an 8-bit weight; use bf16".to_owned();
        return Err(Error::Unsupported { op: "linear", why });
    }
    // A few rows are always computed as the same number of rows: a row's bits do not depend on the others.
    let padded = r.max(FEW_ROWS);
    let mut rows_of_x = in_bf16(x)?;
    if padded > r {
        rows_of_x = rows_of_x.reshape(&[r, k])?;
        rows_of_x.append_rows(&Tensor::activations(x.device(), &[padded - r, k])?)?;
    }
    let rounded = rows_of_x.quantize_rows()?;
    let y = output(x, DType::Bf16, &[padded, n])?;
    for (first, count, i) in groups(w)? {
        product(&rounded, w[i], (&y, first, count))?;
    }
    let mut y = y.rows(0..r)?;
    if let Some(bias) = joined_bias(bias)? {
        let args = args![at(&y)?, at(&bias)?, r as i32, n as i32, n as i64];
        run(gpu_of(x), &ROWS, "bias_add", [row_blocks(r, n), 1, 1], 256, args)?;
    }
    if let Some(residual) = residual {
        rows::add_assign(&mut y, residual)?;
    }
    Ok(y)
}

/// `y[:, first..first + n]` of a product with `n` rows of a stack from the matrix `w` on.
fn product(x: &Tensor, w: &Tensor, (y, first, n): (&Tensor, usize, usize)) -> Result<()> {
    let ((m, width), k) = (y.rows_cols(), x.rows_cols().1);
    let scales_of = |t: &Tensor| stored(t).scales().expect("8-bit floats have scales");
    let (gpu, scales) = (gpu_of(x), [scales_of(x), scales_of(w)]);
    let d = plain(at(y)? + 2 * first as u64, width);
    let gemm = Gemm {
        m,
        n,
        k,
        a: plain(at(x)?, k),
        b: Operand { transposed: true, ..plain(at(w)?, k) },
        input: GemmType::E4m3,
        d,
        output: GemmType::Bf16,
        c: None,
        bias: None,
        scales: Some(scales),
    };
    if gpu.try_gemm(&gemm)? {
        return Ok(());
    }
    // Libraries before 12.9 do not take scales by row and column: they follow the product.
    gpu.gemm(&Gemm { scales: None, ..gemm })?;
    let args = args![d.address, d.address, scales[0], scales[1], m as i32, n as i32, width as i64];
    run(gpu, &FP8, "scale_columns", [row_blocks(m, n), 1, 1], 256, args)
}
