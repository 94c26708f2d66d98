//! Mixtures of experts: the device picks experts, sorts rows by expert and multiplies all of them in one launch.

use specforge_cuda::{Arg, Gemm, GemmType, Gpu, Launch, Operand, TensorMap};

use super::gemm::{plain, product};
use super::launch::{at, gpu_of, in_bf16, new, output, row_blocks, run, stored};
use super::units::{GROUPED, GROUPED_WGMMA, MIXTURE, PLAIN};
use crate::kernels::{Groups, Router, Routes, Scoring};
use crate::{DType, Error, Result, Tensor};

/// `MOST_EXPERTS` of mixture.cu.
const MOST_EXPERTS: usize = 1024;
/// `TOGETHER` of grouped.cuh.
const TOGETHER: usize = 8;
/// `SORTERS` of mixture.cu.
const SORTERS: usize = 8;

/// `Grouped` of grouped.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Grouped {
    y: u64,
    x: u64,
    w: u64,
    bias: u64,
    scales: [u64; 2],
    ends: u64,
    experts: i32,
    n: i32,
    row_bytes: i64,
}

pub(super) fn route(x: &Tensor, router: &Router<'_>) -> Result<Routes> {
    let (logits, rule) = (logits(x, router)?, router.rule);
    let (rows, n) = logits.rows_cols();
    let (gpu, k) = (gpu_of(x), rule.top_k);
    let all = Groups { n: 1, kept: 1, best: 1 };
    let groups = rule.groups.unwrap_or(all);
    if n > MOST_EXPERTS || groups.n > 32 || groups.best > 2 {
        let why = format!("{n} experts in {} groups; at most {MOST_EXPERTS} in 32 groups", groups.n);
        return Err(Error::Unsupported { op: "route", why });
    }
    let (experts, weights) = (new(gpu, DType::U32, &[rows * k])?, new(gpu, DType::F32, &[rows * k, 1])?);
    if rows > 0 {
        // The library would take a bias of the type of its product: the kernel adds it.
        let wide = |t: Option<&Tensor>| t.map(|t| t.cast(DType::F32)).transpose();
        let (bias, correction) = (wide(router.bias)?, wide(router.correction)?);
        let args = args![
            at(&experts)?,
            at(&weights)?,
            at(&logits)?,
            bias.as_ref().map_or(Ok(0), at)?,
            correction.as_ref().map_or(Ok(0), at)?,
            rows as i32,
            n as i32,
            k as i32,
            groups.n as i32,
            groups.kept as i32,
            groups.best as i32,
            rule.scoring == Scoring::Softmax,
            rule.normalised,
            rule.scale,
        ];
        run(gpu, &MIXTURE, "route", [rows.div_ceil(4), 1, 1], 128, args)?;
    }
    sorted(gpu, [rows * k, n, k], &experts, weights)
}

/// Sorts the experts of all pairs on the device.
fn sorted(gpu: &'static Gpu, [pairs, n, k]: [usize; 3], experts: &Tensor, weights: Tensor) -> Result<Routes> {
    let index = |len: usize| new(gpu, DType::U32, &[len]);
    let (counts, ends) = (index(n * SORTERS)?, index(n)?);
    let (sorted, rows, slots) = (index(pairs)?, index(pairs)?, index(pairs)?);
    let (count, block) = (args![at(&counts)?, at(experts)?, pairs as i32], 32 * SORTERS);
    run(gpu, &MIXTURE, "count_pairs", [n, 1, 1], block, count)?;
    let [to, by_rows, by_pairs] = [at(&sorted)?, at(&rows)?, at(&slots)?];
    let args = args![at(&ends)?, to, by_rows, by_pairs, at(&counts)?, at(experts)?, pairs as i32, k as i32];
    run(gpu, &MIXTURE, "sort_pairs", [n, 1, 1], block, args)?;
    Ok(Routes { ends, pairs: sorted, rows, slots, weights })
}

/// The router's logits in float32, without its bias.
fn logits(x: &Tensor, router: &Router<'_>) -> Result<Tensor> {
    let (x, w) = (in_bf16(x)?, in_bf16(router.weight)?);
    let ((m, k), n) = (x.rows_cols(), w.rows_cols().0);
    let y = output(&x, DType::F32, &[m, n])?;
    if m > 0 {
        let b = Operand { transposed: true, ..plain(at(&w)?, k) };
        let (a, d) = (plain(at(&x)?, k), plain(at(&y)?, n));
        let (input, output) = (GemmType::Bf16, GemmType::F32);
        product(&x, &Gemm { m, n, k, a, b, input, d, output, c: None, bias: None, scales: None })?;
    }
    Ok(y)
}

pub(super) fn linear_grouped(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, ends: &Tensor) -> Result<Tensor> {
    let eight_bits = w.dtype() == DType::E4m3;
    let w = if eight_bits { w.clone() } else { in_bf16(w)? };
    let x = in_bf16(x)?;
    let x = if eight_bits { x.quantize_rows()? } else { x };
    let bias = bias.map(in_bf16).transpose()?;
    let ((m, k), experts, n) = (x.rows_cols(), w.shape()[0], w.shape()[1]);
    let row_bytes = k * if eight_bits { 1 } else { 2 };
    if !row_bytes.is_multiple_of(16) {
        let why = format!("experts with {k} inputs: expected a multiple of {}", 16 * k / row_bytes.max(1));
        return Err(Error::Unsupported { op: "linear_grouped", why });
    }
    let y = new(gpu_of(&x), DType::Bf16, &[m, n])?;
    if m == 0 {
        return Ok(y);
    }
    let scales = |t: &Tensor| stored(t).scales().unwrap_or(0);
    let grouped = Grouped {
        y: at(&y)?,
        x: at(&x)?,
        w: at(&w)?,
        bias: bias.as_ref().map_or(Ok(0), at)?,
        scales: [scales(&x), scales(&w)],
        ends: at(ends)?,
        experts: experts as i32,
        n: n as i32,
        row_bytes: row_bytes as i64,
    };
    launch(gpu_of(&x), &grouped, m, eight_bits)?;
    Ok(y)
}

/// One launch over the tiles of all experts: how many that are only the device knows, at most one per expert is not full.
fn launch(gpu: &Gpu, grouped: &Grouped, m: usize, eight_bits: bool) -> Result<()> {
    let (experts, n) = (grouped.experts as usize, grouped.n as usize);
    let tiles = (m / 128 + m.min(experts)).next_multiple_of(TOGETHER);
    let of_type = usize::from(eight_bits);
    let grouped_arg = Arg::Bytes(bytemuck::bytes_of(grouped));
    if !gpu.architecture().is_hopper() {
        let (kernel, grid) =
            (["linear_grouped_b", "linear_grouped_e"][of_type], [n.div_ceil(128) * tiles, 1, 1]);
        let launch = Launch { unit: &GROUPED, defines: PLAIN, kernel, grid, block: 256, shared: 99_328 };
        return Ok(gpu.launch(&launch, &[grouped_arg])?);
    }
    let bytes = grouped.row_bytes as usize;
    let (x, w) =
        (TensorMap::new(grouped.x, [m, bytes], 128)?, TensorMap::new(grouped.w, [experts * n, bytes], 256)?);
    let kernel = ["linear_grouped_wgmma_b", "linear_grouped_wgmma_e"][of_type];
    let grid = [n.div_ceil(256) * tiles, 1, 1];
    let launch = Launch { unit: &GROUPED_WGMMA, defines: PLAIN, kernel, grid, block: 384, shared: 197_696 };
    Ok(gpu.launch(&launch, &[grouped_arg, Arg::Bytes(x.as_bytes()), Arg::Bytes(w.as_bytes())])?)
}

pub(super) fn weighted_rows(
    x: &Tensor,
    index: &Tensor,
    weights: &Tensor,
    base: Option<&Tensor>,
    k: usize,
) -> Result<Tensor> {
    let (x, weights) = (in_bf16(x)?, weights.cast(DType::F32)?);
    let base = base.map(in_bf16).transpose()?;
    let (rows, width) = (index.len() / k.max(1), x.rows_cols().1);
    let y = output(&x, DType::Bf16, &[rows, width])?;
    if y.is_empty() {
        return Ok(y);
    }
    let base = base.as_ref().map_or(Ok(0), at)?;
    let args = args![at(&y)?, at(&x)?, at(index)?, at(&weights)?, base, rows as i32, width as i32, k as i32];
    run(gpu_of(&x), &MIXTURE, "weighted_rows", [row_blocks(rows, width), 1, 1], 256, args)?;
    Ok(y)
}
