//! `specforge bench gemm`: the three products of one linear layer.

use anyhow::Result;
use serde_json::json;
use specforge_tensor::{Device, Tensor};

use super::clock::{Spread, time};
use super::{Output, Repeats, count, speed, tflops};

/// Measure the products of a linear layer as a training step runs them.
///
/// Rows x [M, K], weight w [N, K]: forward y = x w^T (bf16), input gradient dy w (bf16), weight gradient
/// dw += dy^T x (float32, added to what is there). The default is the MLP's gate and up of llama3-8b on 2048 rows.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Rows.
    #[arg(long, default_value_t = 2048, value_parser = count)]
    m: usize,
    /// Outputs.
    #[arg(long, default_value_t = 28672, value_parser = count)]
    n: usize,
    /// Inputs.
    #[arg(long, default_value_t = 4096, value_parser = count)]
    k: usize,
    #[command(flatten)]
    repeats: Repeats,
    #[command(flatten)]
    output: Output,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let device = args.output.device()?;
    let kinds = ["forward", "input_gradient", "weight_gradient"];
    let times = measure(args, device)?;
    let flop = 2.0 * args.m as f64 * args.n as f64 * args.k as f64;
    let mut facts = json!({ "bench": "gemm", "m": args.m, "n": args.n, "k": args.k });
    for (kind, time) in kinds.iter().zip(times) {
        facts[*kind] = json!({ "ms": time, "tflops": tflops(flop, time.median) });
    }
    let text = |time: Spread| format!("{}, {}", time.text(), speed(tflops(flop, time.median)));
    let rows = kinds.iter().zip(times).map(|(kind, time)| (*kind, text(time)));
    args.output.print(device, facts, rows.collect())
}

fn measure(args: &Args, device: Device) -> Result<[Spread; 3]> {
    let (m, n, k) = (args.m, args.n, args.k);
    let (x, dy) = (Tensor::random(device, &[m, k], 1.0, 1)?, Tensor::random(device, &[m, n], 1.0, 2)?);
    let w = Tensor::random(device, &[n, k], 0.02, 3)?;
    let mut dw = [Tensor::zeros(device, &[n, k])?];
    let kernels = device.kernels();
    Ok([
        time(device, args.repeats, || Ok(kernels.linear(&x, &[&w], 0..k, &[], None).map(drop)?))?,
        time(device, args.repeats, || Ok(kernels.linear_dgrad(&dy, &[&w], 0..k, None).map(drop)?))?,
        time(device, args.repeats, || Ok(kernels.linear_wgrad(&dy, &x, &mut dw, 0..k, false)?))?,
    ])
}
