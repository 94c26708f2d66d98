//! RMSNorm, rotary embedding and gated activations.

use specforge_cuda::Arg;

use super::gemm::column_sum;
use super::launch::{at, at_mut, gpu_of, in_bf16, output, row_blocks, run};
use super::units::{MLP, NORM, ROPE};
use crate::kernels::{AddedRows, Rotation};
use crate::{DType, Result, Tensor};

/// Blocks of the persistent backward: the order of a sum may depend on shapes alone.
const BLOCKS: usize = 264;

pub(super) fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let (x, w) = (in_bf16(x)?, in_bf16(w)?);
    let ((rows, width), d) = (x.rows_cols(), w.len());
    let groups = width / d;
    let y = output(&x, DType::Bf16, x.shape())?;
    let rstd = output(&x, DType::F32, &[rows * groups])?;
    let n = rows * groups;
    let grid = if d <= 256 { n.div_ceil(8) } else { n };
    let args = args![
        at(&y)?,
        at(&rstd)?,
        at(&x)?,
        at(&w)?,
        rows as i32,
        groups as i32,
        d as i32,
        width as i32,
        width as i32,
        eps
    ];
    run(gpu_of(&x), &NORM, "rms_norm", [grid, 1, 1], 256, args)?;
    Ok((y, rstd))
}

pub(super) fn rms_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    rstd: &Tensor,
    dw: Option<&mut Tensor>,
    into: Option<Tensor>,
) -> Result<Tensor> {
    let (dy, x, w) = (in_bf16(dy)?, in_bf16(x)?, in_bf16(w)?);
    let ((rows, width), d) = (x.rows_cols(), w.len());
    let (n, accumulate) = (rows * (width / d), into.is_some());
    let mut dx = match into {
        Some(into) => in_bf16(&into)?,
        None => output(&x, DType::Bf16, x.shape())?,
    };
    if n == 0 {
        return Ok(dx);
    }
    let blocks = if d <= 256 { n.div_ceil(8) } else { n }.min(BLOCKS);
    let partial = dw.is_some().then(|| output(&x, DType::F32, &[blocks, d])).transpose()?;
    let ld = width as i32;
    let args = args![
        at_mut(&mut dx)?,
        partial.as_ref().map_or(Ok(0), at)?,
        at(&dy)?,
        at(&x)?,
        at(&w)?,
        at(rstd)?,
        rows as i32,
        (width / d) as i32,
        d as i32,
        ld,
        ld,
        ld,
        accumulate,
    ];
    run(gpu_of(&x), &NORM, "rms_norm_backward", [blocks, 1, 1], 256, args)?;
    if let (Some(partial), Some(dw)) = (partial, dw) {
        column_sum(&partial, dw)?;
    }
    Ok(dx)
}

pub(super) fn rope(x: &Tensor, rotation: &Rotation<'_>, added: Option<AddedRows<'_>>) -> Result<Tensor> {
    let x = in_bf16(x)?;
    let (rows, width) = x.rows_cols();
    let y = output(&x, DType::Bf16, x.shape())?;
    if rows == 0 {
        return Ok(y);
    }
    let in_storage = added.map(|added| in_bf16(added.table.of)).transpose()?;
    let (table, index, ld_table) = match (added, &in_storage) {
        (Some(AddedRows { table, index }), Some(of)) => {
            (at(of)? + 2 * table.first as u64, at(index)?, of.rows_cols().1)
        }
        _ => (0, 0, 0),
    };
    let args = args![
        at(&y)?,
        at(&x)?,
        table,
        index,
        at(rotation.cos)?,
        at(rotation.sin)?,
        at(rotation.positions)?,
        rows as i32,
        width as i32,
        rotation.n_heads as i32,
        rotation.head_dim as i32,
        rotation.cos.rows_cols().1 as i32,
        width as i32,
        ld_table as i32,
        width as i32,
        false,
    ];
    run(gpu_of(&x), &ROPE, "rope", [row_blocks(rows, width), 1, 1], 256, args)?;
    Ok(y)
}

pub(super) fn rope_backward(
    dy: &Tensor,
    rotation: &Rotation<'_>,
    added: Option<(&mut Tensor, usize, &Tensor)>,
) -> Result<Tensor> {
    let dy = in_bf16(dy)?;
    let (rows, width) = dy.rows_cols();
    let dx = output(&dy, DType::Bf16, dy.shape())?;
    if rows == 0 {
        return Ok(dx);
    }
    let (table, index, ld_table) = match added {
        Some((table, first, index)) => {
            let ld = table.rows_cols().1;
            (at_mut(table)? + 4 * first as u64, at(index)?, ld)
        }
        None => (0, 0, 0),
    };
    let args = args![
        at(&dx)?,
        table,
        at(&dy)?,
        index,
        at(rotation.cos)?,
        at(rotation.sin)?,
        at(rotation.positions)?,
        rows as i32,
        width as i32,
        rotation.n_heads as i32,
        rotation.head_dim as i32,
        rotation.cos.rows_cols().1 as i32,
        width as i32,
        ld_table as i32,
        width as i32,
    ];
    run(gpu_of(&dy), &ROPE, "rope_backward", [row_blocks(rows, width), 1, 1], 256, args)?;
    Ok(dx)
}

pub(super) fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    gated(gate_up, "swiglu")
}

pub(super) fn geglu(gate_up: &Tensor) -> Result<Tensor> {
    gated(gate_up, "geglu")
}

pub(super) fn swiglu_clamped(gate_up: &Tensor, alpha: f32, limit: f32) -> Result<Tensor> {
    gated_by(gate_up, "swiglu_clamped", args![alpha, limit])
}

fn gated(gate_up: &Tensor, kernel: &'static str) -> Result<Tensor> {
    gated_by(gate_up, kernel, &[])
}

fn gated_by(gate_up: &Tensor, kernel: &'static str, more: &[Arg<'_>]) -> Result<Tensor> {
    let x = in_bf16(gate_up)?;
    let (rows, width) = x.rows_cols();
    let n = width / 2;
    let y = output(&x, DType::Bf16, &[rows, n])?;
    if rows * n > 0 {
        let (gate, ld) = (at(&x)?, width as i32);
        let args = args![at(&y)?, gate, gate + 2 * n as u64, rows as i32, n as i32, ld, ld, n as i32];
        let args = [args, more].concat();
        run(gpu_of(&x), &MLP, kernel, [row_blocks(rows, n), 1, 1], 256, &args)?;
    }
    Ok(y)
}

pub(super) fn swiglu_backward(
    dy: &Tensor,
    gate_up: &Tensor,
    [d, y]: [Option<Tensor>; 2],
) -> Result<(Tensor, Tensor)> {
    let (dy, x) = (in_bf16(dy)?, in_bf16(gate_up)?);
    let (rows, width) = x.rows_cols();
    let n = width / 2;
    let or_new =
        |into: Option<Tensor>, width| into.map_or_else(|| output(&x, DType::Bf16, &[rows, width]), Ok);
    let (d, y) = (or_new(d, width)?, or_new(y, n)?);
    if rows * n > 0 {
        let (dgate, gate, ld) = (at(&d)?, at(&x)?, width as i32);
        let half = 2 * n as u64;
        let args = args![
            dgate,
            dgate + half,
            at(&y)?,
            at(&dy)?,
            gate,
            gate + half,
            rows as i32,
            n as i32,
            n as i32,
            ld,
            ld,
            ld,
            ld,
            n as i32,
        ];
        run(gpu_of(&x), &MLP, "swiglu_backward", [row_blocks(rows, n), 1, 1], 256, args)?;
    }
    Ok((d, y))
}
