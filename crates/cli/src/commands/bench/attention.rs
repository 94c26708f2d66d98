//! `specforge bench attention`: causal attention forward and backward.

use anyhow::{Result, ensure};
use serde_json::json;
use specforge_tensor::{AttentionInputs, AttentionShape, Columns, Device, Extra, Spans, Tensor};

use super::clock::{Spread, time};
use super::preset::Tokens;
use super::{Output, Repeats, count, speed, tflops};

/// Measure causal attention, forward and backward, as a training step runs it.
///
/// Operations are counted by the keys that a query may see: 4 * heads * head-dim a key forward, 2.5 times that
/// backward. With --extras N each row has N more keys of its own, as at test-time-training step N; with --window W it
/// sees the last W keys alone.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Tokens: T, or D documents of T tokens each.
    #[arg(long, value_name = "DxT", default_value = "8192")]
    tokens: Tokens,
    /// Query heads.
    #[arg(long, default_value_t = 32, value_parser = count)]
    heads: usize,
    /// Key-value heads; they divide the query heads.
    #[arg(long, default_value_t = 8, value_parser = count)]
    kv_heads: usize,
    /// Width of a head.
    #[arg(long, default_value_t = 128, value_parser = count)]
    head_dim: usize,
    /// Further keys of each row's own.
    #[arg(long, value_name = "N", default_value_t = 0)]
    extras: usize,
    /// Keys that a query sees at most, itself among them; all before it if left out.
    #[arg(long, value_name = "W", value_parser = count)]
    window: Option<usize>,
    #[command(flatten)]
    repeats: Repeats,
    #[command(flatten)]
    output: Output,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (heads, kv) = (args.heads, args.kv_heads);
    ensure!(heads.is_multiple_of(kv), "--kv-heads {kv}: expected a divisor of the {heads} query heads");
    let device = args.output.device()?;
    let [lo, hi] = bounds(args);
    let seen: f64 = lo.iter().zip(&hi).map(|(lo, hi)| f64::from(hi - lo)).sum();
    let keys = seen + (args.extras * lo.len()) as f64;
    let forward = 4.0 * (heads * args.head_dim) as f64 * keys;
    let flops = [forward, 2.5 * forward];
    let spans = Spans { lo: Tensor::from_u32(device, lo), hi: Tensor::from_u32(device, hi) };
    let times = measure(args, device, &spans)?;
    let [forward, backward] = [0, 1].map(|i| (times[i], tflops(flops[i], times[i].median)));
    let figures = |(ms, tflops): (Spread, f64)| json!({ "ms": ms, "tflops": tflops });
    let facts = json!({
        "bench": "attention", "tokens": args.tokens.to_string(), "heads": heads, "kv_heads": kv,
        "head_dim": args.head_dim, "extras": args.extras, "window": args.window,
        "forward": figures(forward), "backward": figures(backward),
    });
    let text = |(ms, tflops): (Spread, f64)| format!("{}, {}", ms.text(), speed(tflops));
    args.output.print(device, facts, vec![("forward", text(forward)), ("backward", text(backward))])
}

/// First key of each row, and one past the last.
fn bounds(args: &Args) -> [Vec<u32>; 2] {
    let (each, window) = (args.tokens.each, args.window.unwrap_or(usize::MAX));
    let rows = 0..args.tokens.documents * each;
    let lo = rows.clone().map(|r| (r - r % each).max((r + 1).saturating_sub(window)) as u32).collect();
    [lo, rows.map(|r| r as u32 + 1).collect()]
}

fn measure(args: &Args, device: Device, spans: &Spans) -> Result<[Spread; 2]> {
    let (rows, d) = (spans.lo.len(), args.head_dim);
    let (q, kv) = (args.heads * d, args.kv_heads * d);
    let qkv = Tensor::random(device, &[rows, q + 2 * kv], 1.0, 1)?;
    let dout = Tensor::random(device, &[rows, q], 1.0, 2)?;
    let own = |seed| Tensor::random(device, &[rows, 2 * kv], 1.0, seed);
    let own = (3..3 + args.extras as u64).map(own).collect::<Result<Vec<_>, _>>()?;
    let columns = |of, first| Columns { of, first };
    let extra = |of| Extra { key: columns(of, 0), value: columns(of, kv), index: None };
    let extras: Vec<Extra<'_>> = own.iter().map(extra).collect();
    let (n_heads, n_kv_heads, scale) = (args.heads, args.kv_heads, (d as f32).powf(-0.5));
    let inputs = AttentionInputs {
        shape: AttentionShape { n_heads, n_kv_heads, head_dim: d, scale },
        qkv: [columns(&qkv, 0), columns(&qkv, q), columns(&qkv, q + kv)],
        spans,
        extras: &extras,
        sinks: None,
        cap: None,
    };
    let kernels = device.kernels();
    let forward = time(device, args.repeats, || Ok(kernels.attention(&inputs).map(drop)?))?;
    let (out, lse) = kernels.attention(&inputs)?;
    let backward = || Ok(kernels.attention_backward(&inputs, [&out, &lse, &dout]).map(drop)?);
    Ok([forward, time(device, args.repeats, backward)?])
}
