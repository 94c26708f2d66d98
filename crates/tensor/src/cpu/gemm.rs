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

/// `y[:, start..start + count] = x · blockᵀ` for a few rows.
fn few_rows(y: &mut [f32], n: usize, x: &[f32], k: usize, (start, rows): (usize, &[&[f32]])) {
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
        values.iter().enumerate().for_each(|(r, v)| y[r * n + start + column] = *v);
    }
}

pub(super) fn linear(x: &Tensor, w: &Tensor, cols: Range<usize>, bias: Option<&Tensor>) -> Tensor {
    let ((r, k), (n, k_all)) = (x.rows_cols(), w.rows_cols());
    let values = x.f32s();
    let mut y = vec![0.0; r * n];
    for (start, count, block) in weight_blocks(w) {
        if (1..=FEW_ROWS).contains(&r) && k > 0 {
            let rows: Vec<&[f32]> = block.chunks_exact(k_all).map(|row| &row[cols.clone()]).collect();
            few_rows(&mut y, n, &values, k, (start, &rows));
            continue;
        }
        let b = Mat::new(&block[cols.start..], count, k, k_all).t();
        gemm(&mut y[start.min(r * n)..], n, Mat::new(&values, r, k, k), b, false);
    }
    if let Some(bias) = bias {
        rows::add_to_each_row(&mut y, &bias.f32s());
    }
    tensor(y, &[r, n])
}

pub(super) fn linear_dgrad(dy: &Tensor, w: &Tensor, cols: Range<usize>) -> Tensor {
    let ((r, n), k_all) = (dy.rows_cols(), w.rows_cols().1);
    let values = dy.f32s();
    let mut dx = vec![0.0; r * cols.len()];
    for (start, count, block) in weight_blocks(w) {
        let a = Mat::new(&values[start.min(r * n)..], r, count, n);
        gemm(&mut dx, cols.len(), a, Mat::new(&block[cols.start..], count, cols.len(), k_all), start > 0);
    }
    tensor(dx, &[r, cols.len()])
}

pub(super) fn linear_wgrad(dy: &Tensor, x: &Tensor, dw: &mut Tensor, cols: Range<usize>) {
    let ((r, n), k_all) = (dy.rows_cols(), dw.rows_cols().1);
    let (dy, x) = (dy.f32s(), x.f32s());
    let dst = &mut f32_mut(dw)[cols.start..];
    gemm(dst, k_all, Mat::new(&dy, r, n, n).t(), Mat::new(&x, r, cols.len(), cols.len()), true);
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
