//! Mixtures of experts: the device picks, the host sorts, and each expert is one product over its rows.

use specforge_cuda::{Gemm, GemmType, Operand};

use super::fp8;
use super::gemm::{plain, product};
use super::launch::{at, gpu_of, in_bf16, new, output, row_blocks, run};
use super::units::MIXTURE;
use crate::kernels::{Groups, Router, Routes, Scoring};
use crate::{DType, Error, Result, Tensor};

/// `MOST_EXPERTS` of mixture.cu.
const MOST_EXPERTS: usize = 1024;

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
    // The only wait of a mixture: where each expert's rows end decides what is launched next.
    Ok(Routes::sorted(x.device(), n, k, &experts.to_u32(), weights))
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

pub(super) fn linear_grouped(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    ends: &[usize],
) -> Result<Tensor> {
    let eight_bits = w.dtype() == DType::E4m3;
    let (x, w) = (in_bf16(x)?, if eight_bits { w.clone() } else { in_bf16(w)? });
    let bias = bias.map(in_bf16).transpose()?;
    let ((m, k), n) = (x.rows_cols(), w.shape()[1]);
    let y = output(&x, DType::Bf16, &[m, n])?;
    let starts = std::iter::once(0).chain(ends.iter().copied());
    for (e, (start, &end)) in starts.zip(ends).enumerate().filter(|(_, (start, end))| start < *end) {
        let rows = x.rows(start..end)?;
        let to = at(&y)? + (2 * start * n) as u64;
        let bias = bias.as_ref().map(|bias| bias.rows(e..e + 1)?.reshape(&[n])).transpose()?;
        let of_expert = w.rows(e * n..(e + 1) * n)?;
        if eight_bits {
            let bias: Vec<&Tensor> = bias.iter().collect();
            let part = fp8::linear(&rows, &[&of_expert], 0..k, &bias, None)?;
            gpu_of(&x).copy(to, at(&part)?, 2 * part.len())?;
            continue;
        }
        let b = Operand { transposed: true, ..plain(at(&of_expert)?, k) };
        let (a, d, bias) = (plain(at(&rows)?, k), plain(to, n), bias.as_ref().map(at).transpose()?);
        let (input, output) = (GemmType::Bf16, GemmType::Bf16);
        product(&x, &Gemm { m: end - start, n, k, a, b, input, d, output, c: None, bias, scales: None })?;
    }
    Ok(y)
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
