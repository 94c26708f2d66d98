//! Row movement and element-wise sums.

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use super::{f32_mut, tensor, u32s};
use crate::Tensor;
use crate::kernels::{AddedRows, Columns};
use crate::tensor::Buffer;

/// Below this many elements one thread does the work.
const PARALLEL_ELEMENTS: usize = 1 << 15;

/// Calls `f(row, values)` for every row of `dst`, in parallel where that pays.
pub(super) fn for_rows(dst: &mut [f32], cols: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if cols == 0 {
        return;
    }
    if dst.len() < PARALLEL_ELEMENTS {
        dst.chunks_exact_mut(cols).enumerate().for_each(|(i, row)| f(i, row));
    } else {
        let rows = (PARALLEL_ELEMENTS / 4).div_ceil(cols);
        dst.par_chunks_mut(rows * cols).enumerate().for_each(|(block, dst)| {
            dst.chunks_exact_mut(cols).enumerate().for_each(|(i, row)| f(block * rows + i, row));
        });
    }
}

/// A range of a tensor's elements as float32.
pub(super) fn f32_rows(t: &Tensor, range: Range<usize>) -> Cow<'_, [f32]> {
    match t.buffer() {
        Buffer::F32(v) => Cow::Borrowed(&v[range]),
        Buffer::Bf16(v) => v[range].iter().map(|x| x.to_f32()).collect(),
        Buffer::F16(v) => v[range].iter().map(|x| x.to_f32()).collect(),
        Buffer::U32(v) => v[range].iter().map(|&x| x as f32).collect(),
        Buffer::I16(_) | Buffer::F64(_) | Buffer::Cuda(_) => {
            unreachable!("the CPU computes on floats in host memory")
        }
    }
}

/// Elements of a tensor from `start` on as float32, as many as `dst` has.
fn read_f32(t: &Tensor, start: usize, dst: &mut [f32]) {
    let range = start..start + dst.len();
    match t.buffer() {
        Buffer::F32(v) => dst.copy_from_slice(&v[range]),
        Buffer::Bf16(v) => dst.iter_mut().zip(&v[range]).for_each(|(d, x)| *d = x.to_f32()),
        Buffer::F16(v) => dst.iter_mut().zip(&v[range]).for_each(|(d, x)| *d = x.to_f32()),
        Buffer::U32(v) => dst.iter_mut().zip(&v[range]).for_each(|(d, x)| *d = *x as f32),
        Buffer::I16(_) | Buffer::F64(_) | Buffer::Cuda(_) => {
            unreachable!("the CPU computes on floats in host memory")
        }
    }
}

pub(super) fn gather(x: &Tensor, index: &Tensor) -> Tensor {
    let index = u32s(index);
    tensor(gather_values(x, index), &[index.len(), x.rows_cols().1])
}

/// The elements of [`gather`].
pub(super) fn gather_values(x: &Tensor, index: &[u32]) -> Vec<f32> {
    let cols = x.rows_cols().1;
    let mut y = vec![0.0; index.len() * cols];
    for_rows(&mut y, cols, |r, row| {
        if index[r] != u32::MAX {
            read_f32(x, index[r] as usize * cols, row);
        }
    });
    y
}

/// One thread, in row order: an index may name a row twice.
pub(super) fn scatter_add(dst: &mut Tensor, index: &Tensor, src: &Tensor) {
    scatter_add_columns(dst, 0, u32s(index), &src.f32s(), src.rows_cols().1);
}

/// As [`scatter_add`], of rows of `width` to the columns from `first` on.
pub(super) fn scatter_add_columns(dst: &mut Tensor, first: usize, index: &[u32], src: &[f32], width: usize) {
    let cols = dst.rows_cols().1;
    let dst = f32_mut(dst);
    for (&i, row) in index.iter().zip(src.chunks_exact(width.max(1))) {
        if i != u32::MAX {
            let dst = &mut dst[i as usize * cols + first..][..width];
            dst.iter_mut().zip(row).for_each(|(d, v)| *d += v);
        }
    }
}

/// Adds the rows of a table that an index names.
pub(super) fn add_gathered(y: &mut [f32], width: usize, added: &AddedRows<'_>) {
    let (index, table) = (u32s(added.index), added.table.of.f32s());
    let cols = added.table.of.rows_cols().1;
    for_rows(y, width, |r, row| {
        if index[r] != u32::MAX {
            let added = &table[index[r] as usize * cols + added.table.first..][..width];
            row.iter_mut().zip(added).for_each(|(y, v)| *y += v);
        }
    });
}

pub(super) fn copy_rows(dst: &mut Tensor, to: &Tensor, src: &Tensor, from: &Tensor) {
    let cols = dst.rows_cols().1;
    let dst = f32_mut(dst);
    for (&to, &from) in u32s(to).iter().zip(u32s(from)) {
        read_f32(src, from as usize * cols, &mut dst[to as usize * cols..][..cols]);
    }
}

/// `d`, on top of `into` if there is something.
pub(super) fn onto(into: Option<Tensor>, d: Tensor) -> Tensor {
    match into {
        Some(mut sum) => {
            add_assign(&mut sum, &d);
            sum
        }
        None => d,
    }
}

pub(super) fn add_assign(dst: &mut Tensor, src: &Tensor) {
    let src = src.f32s();
    let dst = f32_mut(dst);
    if dst.len() < PARALLEL_ELEMENTS {
        dst.iter_mut().zip(src.iter()).for_each(|(d, s)| *d += s);
    } else {
        let chunks = dst.par_chunks_mut(PARALLEL_ELEMENTS / 4).zip(src.par_chunks(PARALLEL_ELEMENTS / 4));
        chunks.for_each(|(d, s)| d.iter_mut().zip(s).for_each(|(d, s)| *d += s));
    }
}

pub(super) fn product(a: Columns<'_>, b: Columns<'_>, width: usize) -> Tensor {
    let [mut y, b] = [a, b].map(|part| columns(part.of, part.first..part.first + width).to_f32());
    for_rows(&mut y, width, |r, row| row.iter_mut().zip(&b[r * width..]).for_each(|(y, b)| *y *= b));
    tensor(y, &[a.of.rows_cols().0, width])
}

pub(super) fn short_conv(x: &Tensor, index: &Tensor, w: &Tensor) -> Tensor {
    let (index, h, x, w) = (u32s(index), x.rows_cols().1, x.f32s(), w.f32s());
    let taps = w.len() / h.max(1);
    let n = index.len() / taps.max(1);
    let mut y = vec![0.0; n * h];
    for_rows(&mut y, h, |r, row| {
        for k in (0..taps).filter(|k| index[k * n + r] != u32::MAX) {
            let x = &x[index[k * n + r] as usize * h..][..h];
            row.iter_mut().zip(x).enumerate().for_each(|(c, (y, x))| *y += w[c * taps + k] * x);
        }
    });
    tensor(y, &[n, h])
}

/// `f` of every element.
pub(super) fn map(x: &Tensor, f: impl Fn(f32) -> f32 + Sync) -> Tensor {
    let mut y = x.to_f32();
    for_rows(&mut y, x.rows_cols().1, |_, row| row.iter_mut().for_each(|v| *v = f(*v)));
    tensor(y, x.shape())
}

pub(super) fn add_to_each_row(y: &mut [f32], bias: &[f32]) {
    for_rows(y, bias.len(), |_, row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
}

pub(super) fn bias_grad(dy: &Tensor, db: &mut [Tensor]) {
    let (width, dy) = (dy.rows_cols().1, dy.f32s());
    let mut first = 0;
    for db in db {
        let n = db.len();
        let db = f32_mut(db);
        let rows = dy.chunks_exact(width.max(1)).map(|row| &row[first..first + n]);
        rows.for_each(|row| db.iter_mut().zip(row).for_each(|(d, v)| *d += v));
        first += n;
    }
}

pub(super) fn columns(x: &Tensor, cols: Range<usize>) -> Tensor {
    let (rows, width) = x.rows_cols();
    let mut y = vec![0.0; rows * cols.len()];
    for_rows(&mut y, cols.len(), |r, row| {
        read_f32(x, r * width + cols.start, row);
    });
    tensor(y, &[rows, cols.len()])
}

pub(super) fn add_columns(dst: &mut Tensor, cols: Range<usize>, src: &Tensor) {
    let width = dst.rows_cols().1;
    let src = src.f32s();
    let dst = f32_mut(dst).chunks_exact_mut(width.max(1));
    for (dst, src) in dst.zip(src.chunks_exact(cols.len().max(1))) {
        dst[cols.clone()].iter_mut().zip(src).for_each(|(d, s)| *d += s);
    }
}
