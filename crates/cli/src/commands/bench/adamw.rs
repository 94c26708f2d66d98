//! `specforge bench adamw`: the optimizer's step alone.

use anyhow::Result;
use serde_json::json;
use specforge_tensor::{Across, AdamStep, AdamTensor, DType, Device, Tensor};

use super::clock::{Spread, time};
use super::{Output, Repeats};

/// Memory that a parameter moves: its bf16 value and remainder and both moments read and written, its gradient read.
/// (The norm reads the gradient once more.)
const BYTES: f64 = 28.0;
/// Shares of the parameters that the tensors of a draft have, about: head, MLP (three), fc, q and o, k and v.
const SHARES: [f64; 9] = [0.31, 0.14, 0.14, 0.14, 0.12, 0.08, 0.04, 0.02, 0.01];

/// Measure the AdamW step of all parameters of a draft: the gradients' norm, clipping, moments, update.
///
/// Bandwidth counts 28 bytes a parameter: bf16 value and its remainder, two float32 moments (all read and written) and
/// the float32 gradient. The parameters come in nine tensors of sizes as a draft has them.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Parameters in all, for example 425e6.
    #[arg(long, value_name = "N", default_value = "425e6", value_parser = parameters)]
    params: f64,
    #[command(flatten)]
    repeats: Repeats,
    #[command(flatten)]
    output: Output,
}

/// A parameter and what its step reads and writes.
struct Parameter {
    value: Tensor,
    remainder: Option<Tensor>,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let device = args.output.device()?;
    let sizes = SHARES.map(|share| (share * args.params).ceil() as usize);
    let n: usize = sizes.iter().sum();
    let of = |(seed, n): (usize, usize)| Parameter::new(device, n, seed as u64);
    let mut all = sizes.into_iter().enumerate().map(of).collect::<Result<Vec<_>>>()?;
    let ms = measure(&mut all, args.repeats, device)?;
    let bandwidth = BYTES * n as f64 / ms.median / 1e6;
    let facts = json!({
        "bench": "adamw", "params": n, "tensors": all.len(), "ms": ms,
        "bytes_per_param": BYTES, "gb_per_second": bandwidth,
    });
    let rows = vec![
        ("params", format!("{n} in {} tensors", all.len())),
        ("step", ms.text()),
        ("bandwidth", format!("{bandwidth:.0} GB/s")),
    ];
    args.output.print(device, facts, rows)
}

fn measure(all: &mut [Parameter], repeats: Repeats, device: Device) -> Result<Spread> {
    let mut number = 0;
    let (betas, lr, max_norm) = ([0.9, 0.999], 1e-4, 0.5);
    let [beta1, beta2] = betas;
    let step = AdamStep { lr, beta1, beta2, eps: 1e-8, weight_decay: 0.0, weight: 1.0, max_norm };
    time(device, repeats, || {
        number += 1;
        let mut tensors: Vec<AdamTensor<'_>> = all.iter_mut().map(|p| p.tensor(number)).collect();
        // Nobody reads the norm: it comes later, on its own.
        Ok(device.kernels().adamw(&mut tensors, &step, &Across::default()).map(drop)?)
    })
}

impl Parameter {
    fn new(device: Device, n: usize, seed: u64) -> Result<Self> {
        let value = Tensor::random(device, &[n], 0.02, seed)?;
        let remainder = device.kernels().remainder(&value)?;
        let grad = Tensor::random(device, &[n], 1e-3, seed + 100)?.cast(DType::F32)?;
        let zeros = || Tensor::zeros(device, &[n]);
        Ok(Self { value, remainder, exp_avg: zeros()?, exp_avg_sq: zeros()?, grad })
    }

    fn tensor(&mut self, step: u64) -> AdamTensor<'_> {
        AdamTensor {
            param: &mut self.value,
            remainder: self.remainder.as_mut(),
            exp_avg: &mut self.exp_avg,
            exp_avg_sq: &mut self.exp_avg_sq,
            grad: &self.grad,
            step,
            share: 1.0,
        }
    }
}

/// A number of parameters, also as 425e6.
fn parameters(text: &str) -> Result<f64, String> {
    let n = text.parse().ok().filter(|n| (1.0..1e12).contains(n));
    n.ok_or_else(|| "expected a number of parameters, as 425e6".to_owned())
}
