//! Matrix products over the `gemm` crate. Threads split the output by rows (or, for a few rows, by columns) at
//! places that depend on the shapes alone, and each part is computed by one thread: same bits on any machine size.
#![expect(
    unsafe_code,
    reason = "the gemm crate takes raw pointers; Mat and gemm_into check every bound first"
)]

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use super::simd::Products;
use super::{f32_mut, rows, tensor};
use crate::{DType, Tensor};

/// A matrix view: element (i, j) is `data[i * rs + j * cs]`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    rs: usize,
    cs: usize,
}

impl<'a> Mat<'a> {
    /// A row-major view whose rows are `stride` apart.
    pub(super) fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, rs: stride, cs: 1 }
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, rs: self.cs, cs: self.rs, ..self }
    }

    fn row_range(self, range: Range<usize>) -> Self {
        Self { data: &self.data[(range.start * self.rs).min(self.data.len())..], rows: range.len(), ..self }
    }

    fn fits(self) -> bool {
        self.rows == 0
            || self.cols == 0
            || (self.rows - 1) * self.rs + (self.cols - 1) * self.cs < self.data.len()
    }
}

/// `dst = alpha · a · b`, or `dst += …` if `add`; dst is row-major with rows `stride` apart. One thread.
pub(super) fn gemm_into(dst: &mut [f32], stride: usize, a: Mat<'_>, b: Mat<'_>, alpha: f32, add: bool) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!(b.rows == k && a.fits() && b.fits() && (m - 1) * stride + n <= dst.len(), "gemm operands fit");
    // SAFETY: the assertion bounds every element that the strides reach in all three matrices, and `dst` is
    // borrowed mutably, so it cannot overlap the operands.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            stride as isize,
            add,
            a.data.as_ptr(),
            a.cs as isize,
            a.rs as isize,
            b.data.as_ptr(),
            b.cs as isize,
            b.rs as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Below this many multiplications one thread does the whole product.
const PARALLEL_WORK: usize = 1 << 18;

/// Rows of the output per task.
fn panel(rows: usize) -> usize {
    match rows {
        0..512 => 64,
        512..2048 => 128,
        _ => 256,
    }
}

/// As [`gemm_into`], over all threads: dst has `a.rows` rows of `stride` elements.
fn gemm(dst: &mut [f32], stride: usize, a: Mat<'_>, b: Mat<'_>, add: bool) {
    let work = a.rows * b.cols * a.cols;
    let rows = panel(a.rows);
    if work < PARALLEL_WORK {
        gemm_into(dst, stride, a, b, 1.0, add);
    } else if a.rows > rows {
        dst.par_chunks_mut(rows * stride).enumerate().for_each(|(i, dst)| {
            let range = i * rows..((i + 1) * rows).min(a.rows);
            gemm_into(dst, stride, a.row_range(range), b, 1.0, add);
        });
    } else {
        gemm_by_columns(dst, stride, a, b, add);
    }
}

/// Few rows (decoding): the output's columns are split instead, each part computed apart and copied in.
fn gemm_by_columns(dst: &mut [f32], stride: usize, a: Mat<'_>, b: Mat<'_>, add: bool) {
    const COLUMNS: usize = 256;
    let bt = b.t();
    let parts: Vec<(usize, usize, Vec<f32>)> = (0..b.cols.div_ceil(COLUMNS))
        .into_par_iter()
        .map(|i| {
            let range = i * COLUMNS..((i + 1) * COLUMNS).min(b.cols);
            let n = range.len();
            let mut part = vec![0.0; a.rows * n];
            gemm_into(&mut part, n, a, bt.row_range(range).t(), 1.0, false);
            (i * COLUMNS, n, part)
        })
        .collect();
    for (start, n, part) in parts {
        for (row, values) in part.chunks_exact(n).enumerate() {
            let dst = &mut dst[row * stride + start..][..n];
            if add {
                dst.iter_mut().zip(values).for_each(|(d, v)| *d += v);
            } else {
                dst.copy_from_slice(values);
            }
        }
    }
}

/// Weights that are not float32 are widened this many rows at a time.
const WIDEN_ROWS: usize = 1024;

/// The rows of a weight in float32 blocks: all at once if stored so.
fn weight_blocks(w: &Tensor) -> impl Iterator<Item = (usize, usize, Cow<'_, [f32]>)> {
    let (n, k) = w.rows_cols();
    let rows = if w.dtype() == DType::F32 { n.max(1) } else { WIDEN_ROWS };
    (0..n).step_by(rows).map(move |start| {
        let count = rows.min(n - start);
        (start, count, rows::f32_rows(w, start * k..(start + count) * k))
    })
}

/// Up to so many input rows (decoding, and verifying proposals) each output is a dot product of its own: nothing is
/// packed, the weights are read once, and a row's result does not depend on how many rows there are.
const FEW_ROWS: usize = 16;

/// Columns of the output per task of [`few_rows`].
const FEW_COLUMNS: usize = 128;

/// `y[:, first..first + rows.len()] = x · rowsᵀ` for a few rows of x; y has `n` columns.
fn few_rows(y: &mut [f32], n: usize, x: &[f32], k: usize, (first, rows): (usize, &[&[f32]])) {
    let n_rows = x.len() / k;
    let part = |rows: &[&[f32]]| -> Vec<f32> {
        let mut products = vec![0.0; rows.len() * n_rows];
        Products { x, k, rows, out: &mut products }.run();
        products
    };
    // Waking threads costs more than a small product.
    let parts: Vec<Vec<f32>> = if x.len() * rows.len() < 4 * PARALLEL_WORK {
        vec![part(rows)]
    } else {
        rows.par_chunks(FEW_COLUMNS).map(part).collect()
    };
    for (column, values) in parts.iter().flat_map(|part| part.chunks_exact(n_rows)).enumerate() {
        values.iter().enumerate().for_each(|(r, v)| y[r * n + first + column] = *v);
    }
}

/// Matrices of a stack, each with its first row in it.
fn stacked<'a>(w: &'a [&Tensor]) -> impl Iterator<Item = (usize, &'a Tensor)> {
    w.iter().scan(0, |end, &w| {
        let first = *end;
        *end += w.rows_cols().0;
        Some((first, w))
    })
}

/// Rows of a weight, and the columns of them that are multiplied.
struct Rows<'a> {
    block: &'a [f32],
    count: usize,
    width: usize,
    cols: Range<usize>,
}

/// `y[:, first..first + count] = x · w[:, cols]ᵀ` for r rows of x; y has `n` columns.
fn product(y: &mut [f32], n: usize, (x, r): (&[f32], usize), first: usize, w: &Rows<'_>) {
    let k = w.cols.len();
    if (1..=FEW_ROWS).contains(&r) && k > 0 {
        let rows: Vec<&[f32]> = w.block.chunks_exact(w.width).map(|row| &row[w.cols.clone()]).collect();
        few_rows(y, n, x, k, (first, &rows));
        return;
    }
    let b = Mat::new(&w.block[w.cols.start..], w.count, k, w.width).t();
    gemm(&mut y[first.min(r * n)..], n, Mat::new(x, r, k, k), b, false);
}

/// As [`linear`], of rows sorted by the matrix that multiplies them; each matrix by a thread of its own.
pub(super) fn linear_grouped(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, ends: &Tensor) -> Tensor {
    let ((m, k), n) = (x.rows_cols(), w.shape()[1]);
    let (values, bias) = (x.f32s(), bias.map(Tensor::f32s));
    let mut y = vec![0.0; m * n];
    let (mut parts, mut rest, mut start) = (Vec::new(), &mut y[..], 0);
    for (e, end) in ends.to_u32().into_iter().map(|end| end as usize).enumerate() {
        let (part, more) = rest.split_at_mut((end - start) * n);
        parts.push((e, start..end, part));
        (rest, start) = (more, end);
    }
    parts.into_par_iter().filter(|(_, rows, _)| !rows.is_empty()).for_each(|(e, range, y)| {
        let block = rows::f32_rows(w, e * n * k..(e + 1) * n * k);
        let w = Rows { block: &block, count: n, width: k, cols: 0..k };
        product(y, n, (&values[range.start * k..range.end * k], range.len()), 0, &w);
        if let Some(bias) = &bias {
            rows::add_to_each_row(y, &bias[e * n..(e + 1) * n]);
        }
    });
    tensor(y, &[m, n])
}

pub(super) fn linear(
    x: &Tensor,
    w: &[&Tensor],
    cols: Range<usize>,
    bias: &[&Tensor],
    residual: Option<&Tensor>,
) -> Tensor {
    let (r, n) = (x.rows_cols().0, w.iter().map(|w| w.rows_cols().0).sum::<usize>());
    let values = x.f32s();
    let mut y = vec![0.0; r * n];
    for (first, w) in stacked(w) {
        for (start, count, block) in weight_blocks(w) {
            let w = Rows { block: &block, count, width: w.rows_cols().1, cols: cols.clone() };
            product(&mut y, n, (&values, r), first + start, &w);
        }
    }
    if !bias.is_empty() {
        let bias: Vec<f32> = bias.iter().flat_map(|b| b.to_f32()).collect();
        rows::add_to_each_row(&mut y, &bias);
    }
    let mut y = tensor(y, &[r, n]);
    if let Some(residual) = residual {
        rows::add_assign(&mut y, residual);
    }
    y
}

pub(super) fn linear_dgrad(dy: &Tensor, w: &[&Tensor], cols: Range<usize>, into: Option<Tensor>) -> Tensor {
    let (r, n) = dy.rows_cols();
    let values = dy.f32s();
    let mut dx = vec![0.0; r * cols.len()];
    for (first, w) in stacked(w) {
        let k_all = w.rows_cols().1;
        for (start, count, block) in weight_blocks(w) {
            let first = first + start;
            let a = Mat::new(&values[first.min(r * n)..], r, count, n);
            gemm(&mut dx, cols.len(), a, Mat::new(&block[cols.start..], count, cols.len(), k_all), first > 0);
        }
    }
    rows::onto(into, tensor(dx, &[r, cols.len()]))
}

pub(super) fn linear_wgrad(dy: &Tensor, x: &Tensor, dw: &mut [Tensor], cols: Range<usize>, fresh: bool) {
    let (r, n_all) = dy.rows_cols();
    let (dy, x) = (dy.f32s(), x.f32s());
    let mut first = 0;
    for dw in dw {
        let (n, k_all) = dw.rows_cols();
        let dst = &mut f32_mut(dw)[cols.start..];
        let dy = Mat::new(&dy[first.min(dy.len())..], r, n, n_all).t();
        gemm(dst, k_all, dy, Mat::new(&x, r, cols.len(), cols.len()), !fresh);
        first += n;
    }
}

/// `dst = a · bᵀ` for row-major matrices, over all threads.
pub(super) fn matmul_t(dst: &mut [f32], a: (&[f32], usize), b: (&[f32], usize), k: usize) {
    gemm(dst, b.1, Mat::new(a.0, a.1, k, k), Mat::new(b.0, b.1, k, k).t(), false);
}

/// `dst = a · b` (a `[m, n]`, b `[n, k]`), over all threads.
pub(super) fn matmul(dst: &mut [f32], a: (&[f32], usize), b: (&[f32], usize), k: usize) {
    gemm(dst, k, Mat::new(a.0, a.1, b.1, b.1), Mat::new(b.0, b.1, k, k), false);
}

/// `dst += aᵀ · b` (a `[m, n]`, b `[m, k]`), over all threads.
pub(super) fn matmul_tn_add(dst: &mut [f32], a: (&[f32], usize), b: &[f32], m: usize, k: usize) {
    gemm(dst, k, Mat::new(a.0, m, a.1, a.1).t(), Mat::new(b, m, k, k), true);
}
