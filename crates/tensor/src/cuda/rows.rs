//! Row movement and element-wise sums.

use std::ops::Range;

use super::launch::{at, at_mut, elements, gpu_of, in_bf16, letter, output, row_blocks, run, typed};
use super::units::ROWS;
use crate::kernels::Columns;
use crate::{DType, Later, Result, Tensor};

pub(super) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if letter(a) != 'b' || letter(b) != 'b' {
        let mut sum = a.cast(DType::F32)?;
        add_assign(&mut sum, b)?;
        return Ok(sum);
    }
    let y = output(a, a.dtype(), a.shape())?;
    let args = args![at(&y)?, at(a)?, at(b)?, a.len() as i64];
    run(gpu_of(a), &ROWS, "add_bb", [elements(a.len()), 1, 1], 256, args)?;
    Ok(y)
}

pub(super) fn product(a: Columns<'_>, b: Columns<'_>, width: usize) -> Result<Tensor> {
    let (x, z) = (in_bf16(a.of)?, in_bf16(b.of)?);
    let rows = x.rows_cols().0;
    let y = output(&x, x.dtype(), &[rows, width])?;
    if y.is_empty() {
        return Ok(y);
    }
    let place = |t: &Tensor, first: usize| Ok::<_, crate::Error>(at(t)? + 2 * first as u64);
    let (ldx, ldz) = (x.rows_cols().1 as i64, z.rows_cols().1 as i64);
    let args = args![at(&y)?, place(&x, a.first)?, place(&z, b.first)?, rows as i32, width as i32, ldx, ldz];
    run(gpu_of(&x), &ROWS, "product", [row_blocks(rows, width), 1, 1], 256, args)?;
    Ok(y)
}

pub(super) fn short_conv(x: &Tensor, index: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (x, w) = (in_bf16(x)?, in_bf16(w)?);
    let h = x.rows_cols().1;
    let taps = w.len() / h.max(1);
    let n = index.len() / taps.max(1);
    let y = output(&x, x.dtype(), &[n, h])?;
    if y.is_empty() {
        return Ok(y);
    }
    let args = args![at(&y)?, at(&x)?, at(index)?, at(&w)?, n as i32, h as i32, taps as i32];
    run(gpu_of(&x), &ROWS, "short_conv", [row_blocks(n, h), 1, 1], 256, args)?;
    Ok(y)
}

/// A kernel of one number on every element; of bfloat16, or of float32.
pub(super) fn map(x: &Tensor, kernels: [&'static str; 2], number: f32) -> Result<Tensor> {
    let x = if letter(x) == 'f' { x.clone() } else { in_bf16(x)? };
    let y = output(&x, x.dtype(), x.shape())?;
    if x.is_empty() {
        return Ok(y);
    }
    let kernel = kernels[usize::from(letter(&x) == 'f')];
    let args = args![at(&y)?, at(&x)?, x.len() as i64, number];
    run(gpu_of(&x), &ROWS, kernel, [elements(x.len()), 1, 1], 256, args)?;
    Ok(y)
}

pub(super) fn add_assign(dst: &mut Tensor, src: &Tensor) -> Result<()> {
    let kernel = typed(["add_assign_bb", "add_assign_fb", "add_assign_bf", "add_assign_ff"], dst, src);
    let args = args![at_mut(dst)?, at(src)?, src.len() as i64];
    run(gpu_of(src), &ROWS, kernel, [elements(src.len()), 1, 1], 256, args)
}

pub(super) fn gather(x: &Tensor, index: &Tensor) -> Result<Tensor> {
    let x = if x.dtype() == DType::F16 { x.cast(DType::Bf16)? } else { x.clone() };
    let (n, width) = (index.len(), x.rows_cols().1);
    let y = output(&x, x.dtype(), &[n, width])?;
    if n == 0 || width == 0 {
        return Ok(y);
    }
    let kernel = if letter(&x) == 'f' { "gather_rows_f" } else { "gather_rows_b" };
    let args = args![at(&y)?, at(&x)?, at(index)?, n as i32, width as i32, width as i64, width as i64];
    run(gpu_of(&x), &ROWS, kernel, [row_blocks(n, width), 1, 1], 256, args)?;
    Ok(y)
}

pub(super) fn scatter_add(dst: &mut Tensor, index: &Tensor, src: &Tensor) -> Result<()> {
    let (n, width) = src.rows_cols();
    if n == 0 || width == 0 {
        return Ok(());
    }
    // What is kept in bfloat16 gets bfloat16 rows: there are no kernels that round while they add.
    let src = &if letter(dst) == 'b' { src.cast(DType::Bf16)? } else { src.clone() };
    // A row that is named twice is summed in the order of the rows, whatever the device does at once.
    let known = index.u32s().map(repeated);
    if let Some(Some([order, starts, target])) = known {
        let n = target.len();
        let device = dst.device();
        let [order, starts, target] = [order, starts, target].map(|v| Tensor::from_u32(device, v));
        let kernel = typed(
            ["scatter_segments_bb", "scatter_segments_fb", "scatter_segments_fb", "scatter_segments_ff"],
            dst,
            src,
        );
        let args = args![
            at_mut(dst)?,
            at(src)?,
            at(&order)?,
            at(&starts)?,
            at(&target)?,
            n as i32,
            width as i32,
            width as i64,
            width as i64
        ];
        return run(gpu_of(src), &ROWS, kernel, [row_blocks(n, width), 1, 1], 256, args);
    }
    let kernel =
        typed(["scatter_rows_bb", "scatter_rows_fb", "scatter_rows_fb", "scatter_rows_ff"], dst, src);
    let args =
        args![at_mut(dst)?, at(src)?, at(index)?, n as i32, width as i32, width as i64, width as i64, true];
    run(gpu_of(src), &ROWS, kernel, [row_blocks(n, width), 1, 1], 256, args)
}

/// Where an index names a row twice: source rows in the order of their targets, where each target's begin, and the
/// targets. Nothing where it does not.
fn repeated(index: &[u32]) -> Option<[Vec<u32>; 3]> {
    let named = || index.iter().filter(|&&i| i != u32::MAX);
    if named().is_sorted_by(|a, b| a < b) {
        return None;
    }
    let mut order: Vec<u32> = (0..index.len() as u32).filter(|&r| index[r as usize] != u32::MAX).collect();
    order.sort_by_key(|&r| index[r as usize]);
    let (mut starts, mut target) = (Vec::new(), Vec::new());
    for (at, &r) in order.iter().enumerate() {
        if target.last() != Some(&index[r as usize]) {
            starts.push(at as u32);
            target.push(index[r as usize]);
        }
    }
    starts.push(order.len() as u32);
    (target.len() < order.len()).then_some([order, starts, target])
}

pub(super) fn copy_rows(dst: &mut Tensor, to: &Tensor, src: &Tensor, from: &Tensor) -> Result<()> {
    let src = src.cast(dst.dtype())?;
    let (n, width) = (to.len(), src.rows_cols().1);
    if n == 0 || width == 0 {
        return Ok(());
    }
    let kernel = if letter(&src) == 'f' { "copy_rows_f" } else { "copy_rows_b" };
    let args = args![
        at_mut(dst)?,
        at(to)?,
        at(&src)?,
        at(from)?,
        n as i32,
        width as i32,
        width as i64,
        width as i64
    ];
    run(gpu_of(&src), &ROWS, kernel, [row_blocks(n, width), 1, 1], 256, args)
}

pub(super) fn columns(x: &Tensor, cols: Range<usize>) -> Result<Tensor> {
    let (rows, width) = x.rows_cols();
    let y = output(x, x.dtype(), &[rows, cols.len()])?;
    let from = at(x)? + (cols.start * x.dtype().size()) as u64;
    let kernel = if letter(x) == 'f' { "copy_columns_ff" } else { "copy_columns_bb" };
    copy_columns(kernel, (&y, at(&y)?, cols.len()), (from, width), [rows, cols.len()], false)?;
    Ok(y)
}

pub(super) fn add_columns(dst: &mut Tensor, cols: Range<usize>, src: &Tensor) -> Result<()> {
    let (rows, width) = dst.rows_cols();
    let kernel =
        typed(["copy_columns_bb", "copy_columns_fb", "copy_columns_bf", "copy_columns_ff"], dst, src);
    let to = at_mut(dst)? + (cols.start * dst.dtype().size()) as u64;
    copy_columns(kernel, (src, to, width), (at(src)?, cols.len()), [rows, cols.len()], true)
}

/// `(on, to, ld)` from `(from, ld)`.
fn copy_columns(
    kernel: &'static str,
    (on, to, ld_to): (&Tensor, u64, usize),
    (from, ld_from): (u64, usize),
    [rows, width]: [usize; 2],
    accumulate: bool,
) -> Result<()> {
    if rows == 0 || width == 0 {
        return Ok(());
    }
    let args = args![to, from, rows as i32, width as i32, ld_to as i64, ld_from as i64, accumulate];
    run(gpu_of(on), &ROWS, kernel, [row_blocks(rows, width), 1, 1], 256, args)
}

pub(super) fn all_finite(x: &Tensor) -> Result<Later<bool>> {
    let gpu = gpu_of(x);
    let flag = gpu.alloc_zeroed(4)?;
    let kernel = if letter(x) == 'f' { "all_finite_f" } else { "all_finite_b" };
    run(gpu, &ROWS, kernel, [elements(x.len()), 1, 1], 256, args![flag.address(), at(x)?, x.len() as i64])?;
    let read = gpu.read_back(flag.address(), 4)?;
    Ok(Later::new(move || Ok(read.wait()? == [0; 4])))
}

/// Outputs and log-sum-exps of two attentions of the same queries, as one.
pub(super) fn merge_attention(a: &(Tensor, Tensor), b: &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
    let (first, second) = (in_bf16(&a.0)?, in_bf16(&b.0)?);
    let y = output(&first, DType::Bf16, first.shape())?;
    let lse = output(&first, DType::F32, a.1.shape())?;
    let (rows, width) = (lse.len(), first.len() / lse.len().max(1));
    if first.is_empty() {
        return Ok((y, lse));
    }
    let args = args![
        at(&y)?,
        at(&lse)?,
        at(&first)?,
        at(&a.1)?,
        at(&second)?,
        at(&b.1)?,
        rows as i32,
        width as i32,
    ];
    run(gpu_of(&first), &ROWS, "merge_attention", [row_blocks(rows, width), 1, 1], 256, args)?;
    Ok((y, lse))
}
