//! Linear layers with 8-bit weights: inputs are rounded row by row, products accumulate in float32.

use std::ops::Range;

use specforge_cuda::{Gemm, GemmType, Operand};

use super::gemm::{FEW_ROWS, groups, joined_bias, plain};
use super::launch::{at, gpu_of, in_bf16, output, row_blocks, run, stored};
use super::rows;
use super::stored::Stored;
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
    let rounded = rounded(x, [r, k], padded)?;
    let y = output(x, DType::Bf16, &[padded, n])?;
    let mut residual = residual.map(in_bf16).transpose()?;
    // In the product only where it has the rows of the output.
    let c = residual.take_if(|_| padded == r && r > FEW_ROWS);
    for (first, count, i) in groups(w)? {
        product(&rounded, w[i], (&y, first, count), c.as_ref())?;
    }
    let mut y = y.rows(0..r)?;
    if let Some(bias) = joined_bias(bias)? {
        let args = args![at(&y)?, at(&bias)?, r as i32, n as i32, n as i64];
        run(gpu_of(x), &ROWS, "bias_add", [row_blocks(r, n), 1, 1], 256, args)?;
    }
    if let Some(residual) = residual {
        rows::add_assign(&mut y, &residual)?;
    }
    Ok(y)
}

/// The rows of x in 8 bits, and zeros up to `padded` rows.
fn rounded(x: &Tensor, [r, k]: [usize; 2], padded: usize) -> Result<Tensor> {
    if x.dtype() == DType::E4m3 {
        return Ok(x.clone());
    }
    let mut x = in_bf16(x)?;
    if padded > r {
        x = x.reshape(&[r, k])?;
        x.append_rows(&Tensor::activations(x.device(), &[padded - r, k])?)?;
    }
    x.quantize_rows()
}

/// Whether rows `[rows, width]` can be computed and rounded in one pass, to at most `most` columns. Few rows are padded,
/// which is done before they are rounded.
fn in_one_pass(of: &[&Tensor], [rows, width]: [usize; 2], most: usize) -> bool {
    let is_aligned = |t: &&Tensor| t.dtype() == DType::Bf16 && at(t).is_ok_and(|at| at.is_multiple_of(16));
    rows > FEW_ROWS && width.is_multiple_of(8) && width <= most && of.iter().all(is_aligned)
}

/// `quantize_rows(rms_norm(x))`, over whole rows.
pub(super) fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Option<Tensor>> {
    let (rows, width) = x.rows_cols();
    if w.len() != width || !in_one_pass(&[x, w], [rows, width], 16384) {
        return Ok(None);
    }
    let y = Stored::rows_of_e4m3(gpu_of(x), rows, width)?;
    let [to, scales] = [y.address()?, y.scales().expect("made with scales")];
    let args = args![to, scales, at(x)?, at(w)?, rows as i32, width as i32, eps];
    run(gpu_of(x), &FP8, "rms_norm_rounded", [rows, 1, 1], 256, args)?;
    Ok(Some(Tensor::from_stored(x.device(), y, &[rows, width])))
}

/// `quantize_rows(swiglu(gate_up))`.
pub(super) fn swiglu(gate_up: &Tensor) -> Result<Option<Tensor>> {
    let (rows, width) = (gate_up.rows_cols().0, gate_up.rows_cols().1 / 2);
    if !in_one_pass(&[gate_up], [rows, width], 32768) {
        return Ok(None);
    }
    let y = Stored::rows_of_e4m3(gpu_of(gate_up), rows, width)?;
    let [to, scales] = [y.address()?, y.scales().expect("made with scales")];
    let args = args![to, scales, at(gate_up)?, rows as i32, width as i32];
    run(gpu_of(gate_up), &FP8, "swiglu_rounded", [rows, 1, 1], 512, args)?;
    Ok(Some(Tensor::from_stored(gate_up.device(), y, &[rows, width])))
}

/// `y[:, first..first + n]` of a product with `n` rows of a stack from the matrix `w` on, plus those columns of c.
fn product(x: &Tensor, w: &Tensor, (y, first, n): (&Tensor, usize, usize), c: Option<&Tensor>) -> Result<()> {
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
        c: c.map(|c| Ok::<_, Error>(plain(at(c)? + 2 * first as u64, width))).transpose()?,
        bias: None,
        scales: Some(scales),
    };
    if gpu.try_gemm(&gemm)? {
        return Ok(());
    }
    // Libraries before 12.9 do not take scales by row and column: they follow the product.
    gpu.gemm(&Gemm { scales: None, c: None, ..gemm })?;
    let c = gemm.c.map_or(0, |c| c.address);
    let args = args![d.address, d.address, scales[0], scales[1], c, m as i32, n as i32, width as i64];
    run(gpu, &FP8, "scale_columns", [row_blocks(m, n), 1, 1], 256, args)
}
