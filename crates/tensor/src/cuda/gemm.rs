//! Linear layers: cuBLASLt, and a kernel of our own for the few rows of decoding.

use std::ops::Range;

use specforge_cuda::{Gemm, GemmType, Operand};

use super::fp8;
use super::launch::{at, at_mut, gpu_of, in_bf16, output, run, stored};
use super::units::{NORM, SKINNY};
use crate::{DType, Result, Tensor};

/// Up to so many rows a product goes through a kernel whose result for a row does not depend on how many rows there
/// are: what a draft proposes is verified to the bit that plain decoding computes.
pub(super) const FEW_ROWS: usize = 32;

/// Rows from which a weight gradient is a product near the card's speed: below, reading and writing the float32 sum
/// takes a share of it that shows (545 against 690 TFLOP/s on an H200 for 2048 rows).
pub(super) const WGRAD_ROWS: usize = 8192;

/// Fewer columns than these go through the same kernel.
const FEW_COLUMNS: usize = 8;

const BF16: u64 = 2;
const F32: u64 = 4;

pub(super) fn plain(address: u64, ld: usize) -> Operand {
    Operand { address, ld, transposed: false }
}

/// Matrices of a stack that lie one behind the other, as one: first row in the stack, rows, and the first of them.
pub(super) fn groups(w: &[&Tensor]) -> Result<Vec<(usize, usize, usize)>> {
    let (mut groups, mut first): (Vec<(usize, usize, usize)>, usize) = (Vec::new(), 0);
    for (i, matrix) in w.iter().enumerate() {
        let rows = matrix.rows_cols().0;
        match groups.last_mut() {
            Some(group) if stored(w[i - 1]).is_before(stored(matrix))? => group.1 += rows,
            _ => groups.push((first, rows, i)),
        }
        first += rows;
    }
    Ok(groups)
}

pub(super) fn linear(
    x: &Tensor,
    w: &[&Tensor],
    cols: Range<usize>,
    bias: &[&Tensor],
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    if w[0].dtype() == DType::E4m3 {
        return fp8::linear(x, w, cols, bias, residual);
    }
    let (x, w) = (in_bf16(x)?, bf16_all(w)?);
    let w: Vec<&Tensor> = w.iter().collect();
    let ((r, k), n) = (x.rows_cols(), w.iter().map(|w| w.rows_cols().0).sum());
    let (residual, bias) = (residual.map(in_bf16).transpose()?, joined_bias(bias)?);
    let y = output(&x, DType::Bf16, &[r, n])?;
    let k_all = w[0].rows_cols().1;
    for (first, rows, i) in groups(&w)? {
        let gemm = Gemm {
            m: r,
            n: rows,
            k,
            a: plain(at(&x)?, k),
            b: Operand { address: at(w[i])? + BF16 * cols.start as u64, ld: k_all, transposed: true },
            input: GemmType::Bf16,
            d: plain(at(&y)? + BF16 * first as u64, n),
            output: GemmType::Bf16,
            c: residual
                .as_ref()
                .map(|c| Ok::<_, crate::Error>(plain(at(c)? + BF16 * first as u64, n)))
                .transpose()?,
            bias: bias.as_ref().map(|b| Ok::<_, crate::Error>(at(b)? + BF16 * first as u64)).transpose()?,
            scales: None,
        };
        product(&x, &gemm)?;
    }
    Ok(y)
}

/// A product of few rows, or one that the library does not take, by our own kernel.
pub(super) fn product(x: &Tensor, gemm: &Gemm) -> Result<()> {
    let gpu = gpu_of(x);
    // The library has algorithms for columns of a few elements, but does not run all of them.
    if gemm.m > FEW_ROWS && gemm.n >= FEW_COLUMNS && gpu.try_gemm(gemm)? {
        return Ok(());
    }
    let kernel = if gemm.output == GemmType::F32 { "skinny_linear_f" } else { "skinny_linear_b" };
    let (c, ldc) = gemm.c.map_or((0, 0), |c| (c.address, c.ld));
    let args = args![
        gemm.d.address,
        gemm.a.address,
        gemm.b.address,
        gemm.bias.unwrap_or(0),
        c,
        gemm.m as i32,
        gemm.n as i32,
        gemm.k as i32,
        gemm.a.ld as i64,
        gemm.b.ld as i64,
        gemm.d.ld as i64,
        ldc as i64,
    ];
    run(gpu, &SKINNY, kernel, [gemm.n.div_ceil(16), gemm.m.div_ceil(64), 1], 256, args)
}

/// Biases of a stack as one vector.
pub(super) fn joined_bias(bias: &[&Tensor]) -> Result<Option<Tensor>> {
    let Some((first, rest)) = bias.split_first() else { return Ok(None) };
    let mut all = in_bf16(first)?.reshape(&[first.len(), 1])?;
    for more in rest {
        all.append_rows(&in_bf16(more)?.reshape(&[more.len(), 1])?)?;
    }
    Ok(Some(all))
}

fn bf16_all(w: &[&Tensor]) -> Result<Vec<Tensor>> {
    w.iter().map(|w| in_bf16(w)).collect()
}

pub(super) fn linear_dgrad(
    dy: &Tensor,
    w: &[&Tensor],
    cols: Range<usize>,
    into: Option<Tensor>,
) -> Result<Tensor> {
    let (dy, w) = (in_bf16(dy)?, bf16_all(w)?);
    let w: Vec<&Tensor> = w.iter().collect();
    let ((r, n), k) = (dy.rows_cols(), cols.len());
    let k_all = w[0].rows_cols().1;
    let mut adds = into.is_some();
    let mut dx = match into {
        Some(into) => in_bf16(&into)?,
        None => output(&dy, DType::Bf16, &[r, k])?,
    };
    let d = plain(at_mut(&mut dx)?, k);
    for (first, rows, i) in groups(&w)? {
        let gemm = Gemm {
            m: r,
            n: k,
            k: rows,
            a: plain(at(&dy)? + BF16 * first as u64, n),
            b: plain(at(w[i])? + BF16 * cols.start as u64, k_all),
            input: GemmType::Bf16,
            d,
            output: GemmType::Bf16,
            c: adds.then_some(d),
            bias: None,
            scales: None,
        };
        gpu_of(&dy).gemm(&gemm)?;
        adds = true;
    }
    Ok(dx)
}

pub(super) fn linear_wgrad(
    dy: &Tensor,
    x: &Tensor,
    dw: &mut [Tensor],
    cols: Range<usize>,
    fresh: bool,
) -> Result<()> {
    let (dy, x) = (in_bf16(dy)?, in_bf16(x)?);
    let ((r, n), k) = (dy.rows_cols(), cols.len());
    if r == 0 {
        return zero_where(fresh, dw);
    }
    dw.iter_mut().try_for_each(|dw| at_mut(dw).map(|_| ()))?;
    let dw: Vec<&Tensor> = dw.iter().collect();
    let k_all = dw[0].rows_cols().1;
    for (first, rows, i) in groups(&dw)? {
        let d = plain(at(dw[i])? + F32 * cols.start as u64, k_all);
        let gemm = Gemm {
            m: rows,
            n: k,
            k: r,
            a: Operand { address: at(&dy)? + BF16 * first as u64, ld: n, transposed: true },
            b: plain(at(&x)?, k),
            input: GemmType::Bf16,
            d,
            output: GemmType::F32,
            c: (!fresh).then_some(d),
            bias: None,
            scales: None,
        };
        gpu_of(&dy).gemm(&gemm)?;
    }
    Ok(())
}

/// A product over no rows: fresh gradients are zeros then.
fn zero_where(fresh: bool, dw: &mut [Tensor]) -> Result<()> {
    for dw in dw.iter_mut().filter(|_| fresh) {
        gpu_of(dw).fill_zero(at_mut(dw)?, 4 * dw.len())?;
    }
    Ok(())
}

pub(super) fn bias_grad(dy: &Tensor, db: &mut [Tensor]) -> Result<()> {
    let dy = in_bf16(dy)?;
    let ((rows, n), mut first) = (dy.rows_cols(), 0u64);
    if rows == 0 {
        return Ok(());
    }
    let (gpu, slabs) = (gpu_of(&dy), rows.div_ceil(64).min(256));
    for db in db {
        let width = db.len();
        let partial = output(&dy, DType::F32, &[slabs, width])?;
        let from = at(&dy)? + BF16 * first;
        let args = args![at(&partial)?, from, rows as i32, width as i32, n as i32];
        run(gpu, &NORM, "column_partial", [width.div_ceil(256), slabs, 1], 256, args)?;
        column_sum(&partial, db)?;
        first += width as u64;
    }
    Ok(())
}

/// Adds the rows of a float32 matrix to a vector, in order.
pub(super) fn column_sum(partial: &Tensor, sum: &mut Tensor) -> Result<()> {
    let (n, width) = partial.rows_cols();
    let args = args![at_mut(sum)?, at(partial)?, n as i32, width as i32];
    run(gpu_of(partial), &NORM, "column_sum", [width.div_ceil(32), 1, 1], 256, args)
}
