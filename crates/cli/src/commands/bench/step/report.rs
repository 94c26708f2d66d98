//! The figures of `specforge bench step`, as a table and as JSON.

use anyhow::Result;
use serde_json::{Value, json};
use specforge_tensor::Device;

use super::super::floor::Floor;
use super::super::flops::{self, Rows, Sizes, Work};
use super::super::subject::PHASES;
use super::super::{speed, tflops};
use super::ranks::Over;
use super::{Args, Measured, Memory, Mode};
use crate::show::{bytes, rate, sent_text};

pub(super) fn print(
    args: &Args,
    device: Device,
    measured: &Measured,
    floor: Option<&Floor>,
    (rows, sizes): (&Rows, &Sizes),
) -> Result<()> {
    let work = [flops::ours(sizes, rows), flops::specforge(sizes, rows)];
    let facts = facts(args, measured, floor, rows, work);
    let ms = measured.step.median;
    let of_batch = args.over.of_batch() as f64;
    let mut lines = vec![
        ("bench", title(args)),
        ("step", measured.step.text()),
        ("speed", rate(tokens_per_second(args, rows, ms))),
        ("host", format!("asks for a step in {:.3} ms", measured.host_ms)),
        ("phases", phases_text(args, measured)),
        ("rows", rows_text(rows)),
        ("work", work_text(work, rows, ms * of_batch)),
    ];
    lines.extend(measured.sent.map(|sent| ("sent", format!("{} a step", sent_text(sent)))));
    lines.extend(floor.map(|floor| ("floor", floor_text(floor, ms))));
    lines.extend(measured.memory.as_ref().map(|memory| ("memory", memory_text(memory))));
    args.output.print(device, facts, lines)
}

fn facts(args: &Args, measured: &Measured, floor: Option<&Floor>, rows: &Rows, work: [Work; 2]) -> Value {
    let (ms, of_batch) = (measured.step.median, args.over.of_batch() as f64);
    let phase =
        |i: usize| if i == 0 && args.mode == Mode::Offline { Value::Null } else { measured.phases[i].into() };
    let phases: serde_json::Map<String, Value> =
        PHASES.iter().enumerate().map(|(i, name)| ((*name).to_owned(), phase(i))).collect();
    let [ours, specforge] = work;
    json!({
        "bench": "step",
        "preset": args.preset.name(),
        "tokens": args.tokens.to_string(),
        "live": args.live,
        "mode": args.mode,
        "target_dtype": args.target_dtype,
        "warmup": args.repeats.warmup,
        "steps": args.repeats.steps,
        "ranks": args.over,
        "step_ms": measured.step,
        "host_ms": measured.host_ms,
        "tokens_per_second": tokens_per_second(args, rows, ms),
        "sent_bytes": measured.sent,
        "phases_ms": phases,
        "rows": rows,
        "flop": { "ours": ours, "specforge": specforge },
        "gflop_per_token": {
            "ours": total(ours) / rows.tokens as f64 / 1e9,
            "specforge": total(specforge) / rows.tokens as f64 / 1e9,
            "specforge_products": specforge.products / rows.tokens as f64 / 1e9,
        },
        "tflops": tflops(total(ours) / of_batch, ms),
        "tflops_as_specforge": tflops(total(specforge) / of_batch, ms),
        "floor": floor,
        "step_over_floor": floor.map(|floor| ms / floor.ms),
        "memory": measured.memory,
        "loss": measured.loss,
    })
}

/// Of all ranks.
fn tokens_per_second(args: &Args, rows: &Rows, ms: f64) -> f64 {
    (rows.tokens * args.over.data) as f64 / ms * 1e3
}

fn total(work: Work) -> f64 {
    work.products + work.attention
}

fn title(args: &Args) -> String {
    let mode = if args.mode == Mode::Online { "online" } else { "offline" };
    let Over { data, sequence, tensor, .. } = args.over;
    let ranks = if args.over.all() == 1 {
        String::new()
    } else {
        format!(", data {data} x sequence {sequence} x tensor {tensor}")
    };
    format!("{} {}, live {}, {mode}{ranks}", args.preset.name(), args.tokens, args.live)
}

fn phases_text(args: &Args, measured: &Measured) -> String {
    let skip = usize::from(args.mode == Mode::Offline);
    let phases = PHASES.iter().zip(measured.phases).skip(skip);
    phases.map(|(name, ms)| format!("{name} {ms:.3}")).collect::<Vec<_>>().join(", ") + " ms"
}

fn rows_text(rows: &Rows) -> String {
    format!(
        "{} tokens, {} live, {} with loss, {} of the teacher",
        rows.tokens, rows.live, rows.loss, rows.teacher
    )
}

fn work_text([ours, specforge]: [Work; 2], rows: &Rows, ms: f64) -> String {
    let per_token = |work| total(work) / rows.tokens as f64 / 1e9;
    format!(
        "{:.3} GFLOP/token ({:.0} % attention), {}; SpecForge's {:.3}",
        per_token(ours),
        100.0 * ours.attention / total(ours),
        speed(tflops(total(ours), ms)),
        per_token(specforge)
    )
}

fn floor_text(floor: &Floor, ms: f64) -> String {
    format!(
        "{:.3} ms for {} matrix products ({}); the step takes {:.3} times that",
        floor.ms,
        floor.products,
        speed(tflops(floor.flop, floor.ms)),
        ms / floor.ms
    )
}

fn memory_text(memory: &Memory) -> String {
    let size = |n: usize| bytes(n as u64);
    let warm = if memory.warm_steps_allocate_nothing {
        "warm steps allocate nothing".to_owned()
    } else {
        let grown = memory.reserved_after_bytes.abs_diff(memory.reserved_before_bytes);
        format!("WARM STEPS CHANGED what is reserved by {}", size(grown))
    };
    format!("peak {}, {} before the first step; {warm}", size(memory.peak_bytes), size(memory.before_bytes))
}
