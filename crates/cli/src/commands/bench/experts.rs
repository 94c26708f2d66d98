//! `specforge bench experts`: the experts of a mixture's layer.

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde_json::json;
use specforge_tensor::{Device, Router, Routing, Scoring, Tensor};

use super::clock::{Spread, time};
use super::{Output, Repeats, count, speed, tflops};

/// Measure a mixture of experts as a target's layer runs it: routing, then the experts' products.
///
/// Each row picks --top-k of --experts, rows are sorted by expert, and all experts are one product, gate and up
/// [E, 2 I, H] (bf16, or e4m3 rounded row by row), then another, down [E, H, I]. The default is a layer of
/// Qwen3-30B-A3B on 4096 rows.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Rows.
    #[arg(long, default_value_t = 4096, value_parser = count)]
    rows: usize,
    /// Experts.
    #[arg(long, default_value_t = 128, value_parser = count)]
    experts: usize,
    /// Experts of a row.
    #[arg(long, default_value_t = 8, value_parser = count)]
    top_k: usize,
    /// Width of the residual stream.
    #[arg(long, default_value_t = 2048, value_parser = count)]
    hidden: usize,
    /// Width of an expert.
    #[arg(long, default_value_t = 768, value_parser = count)]
    width: usize,
    /// What the experts' matrices are kept in.
    #[arg(long, value_enum, default_value_t = Kept::Bf16)]
    dtype: Kept,
    #[command(flatten)]
    repeats: Repeats,
    #[command(flatten)]
    output: Output,
}

/// How matrices are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kept {
    Bf16,
    Fp8,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (k, n) = (args.top_k, args.experts);
    ensure!(k <= n, "--top-k {k}: expected at most the {n} experts");
    let device = args.output.device()?;
    let [route, products] = measure(args, device)?;
    let flop = 6.0 * (args.rows * k) as f64 * (args.hidden * args.width) as f64;
    let rate = tflops(flop, products.median);
    let facts = json!({
        "bench": "experts", "rows": args.rows, "experts": n, "top_k": k, "hidden": args.hidden,
        "width": args.width, "fp8": args.dtype == Kept::Fp8,
        "route": { "ms": route }, "products": { "ms": products, "tflops": rate },
    });
    let products = format!("{}, {}", products.text(), speed(rate));
    args.output.print(device, facts, vec![("route", route.text()), ("products", products)])
}

fn measure(args: &Args, device: Device) -> Result<[Spread; 2]> {
    let (n, h, i) = (args.experts, args.hidden, args.width);
    let rule =
        Routing { scoring: Scoring::Softmax, top_k: args.top_k, groups: None, normalised: true, scale: 1.0 };
    let (x, weight) =
        (Tensor::random(device, &[args.rows, h], 1.0, 1)?, Tensor::random(device, &[n, h], 0.02, 2)?);
    let router = Router { weight: &weight, bias: None, correction: None, rule };
    let kept = |shape: &[usize], seed| {
        let w = Tensor::random(device, shape, 0.02, seed)?;
        if args.dtype == Kept::Fp8 { w.quantize_rows() } else { Ok(w) }
    };
    let (gate_up, down) = (kept(&[n, 2 * i, h], 3)?, kept(&[n, h, i], 4)?);
    let kernels = device.kernels();
    let routes = kernels.route(&x, &router)?;
    let rows = kernels.gather_rows(&x, &routes.rows)?;
    let inner = kernels.swiglu(&kernels.linear_grouped(&rows, &gate_up, None, &routes.ends)?)?;
    Ok([
        time(device, args.repeats, || Ok(kernels.route(&x, &router).map(drop)?))?,
        time(device, args.repeats, || {
            kernels.linear_grouped(&rows, &gate_up, None, &routes.ends)?;
            Ok(kernels.linear_grouped(&inner, &down, None, &routes.ends).map(drop)?)
        })?,
    ])
}
