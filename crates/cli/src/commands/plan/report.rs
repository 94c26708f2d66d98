//! The figures of `specforge plan`, as a table and as JSON.

use anyhow::Result;
use serde_json::json;
use specforge_config::{CaptureDType, Mode};
use specforge_store::Encoding;
use specforge_tensor::Device;

use super::Subject;
use super::ledger::Kind;
use super::memory::parameters;
use super::project::Projection;
use crate::show::{bytes, print, rate, table};

/// Bytes of a token beside its states: id, loss mask, best token, log-sum-exp.
const BESIDE: f64 = 13.0;

pub(super) fn show(subject: &Subject, own: &Projection, larger: &[Projection], as_json: bool) -> Result<()> {
    let disk = disk(subject);
    if as_json {
        let facts = json!({
            "recipe": subject.plan.name,
            "mode": subject.plan.mode,
            "card": subject.card,
            "links": subject.links,
            "tokens": subject.work.tokens,
            "micro_batches": subject.work.batches.len(),
            "largest_micro_batch": subject.largest(),
            "parameters": parameters(&subject.dims, 1),
            "store_bytes": disk.store,
            "checkpoints_bytes": disk.checkpoints,
            "projection": own,
            "larger": larger,
        });
        return print(serde_json::to_string_pretty(&facts)?);
    }
    print(table(&rows(subject, own, &disk)))?;
    if larger.is_empty() {
        return Ok(());
    }
    print(format_args!("\nthe same run on more cards, one line per number of cards:"))?;
    let line = |p: &Projection| (p.layout.ranks().to_string(), summary(p));
    let lines: Vec<(String, String)> = larger.iter().map(line).collect();
    let lines: Vec<(&str, String)> = lines.iter().map(|(n, line)| (n.as_str(), line.clone())).collect();
    print(table(&lines))
}

/// Bytes that a run leaves on disk.
struct Disk {
    store: u64,
    checkpoints: u64,
}

fn disk(subject: &Subject) -> Disk {
    let plan = &subject.plan;
    let states = 4.0 * subject.info.hidden_size as f64;
    // Measured shares of the encodings (BENCHMARKS.md); float32 states are written as they are.
    let per_token = match (plan.capture.dtype, plan.store.encoding) {
        (CaptureDType::F32, _) => 4.0 * states,
        (_, Encoding::Fp8) => 2.0 * states * 0.501,
        (_, Encoding::Lossless) => 2.0 * states * 0.683,
        _ => 2.0 * states,
    } + BESIDE;
    let store = if plan.mode == Mode::Online { 0.0 } else { per_token * subject.work.tokens as f64 };
    // Weights and two moments; on a GPU the float32 masters too.
    let of_parameter = if subject.device == Device::Cpu { 4 + 8 } else { 2 + 8 + 4 };
    let kept = plan.train.keep as u64 + 1;
    Disk { store: store as u64, checkpoints: kept * of_parameter * parameters(&subject.dims, 1) }
}

fn rows(subject: &Subject, own: &Projection, disk: &Disk) -> Vec<(&'static str, String)> {
    let (card, work, largest) = (&subject.card, &subject.work, subject.largest());
    let measured = if card.measured { "" } else { ", rates not measured: from published peaks" };
    let mut rows = vec![
        ("recipe", format!("{}, {:?}", subject.plan.name, subject.plan.mode).to_lowercase()),
        ("card", format!("{}, {}{measured}", card.name, bytes(card.memory))),
        ("ranks", own.layout.to_string() + &sharing_text(own)),
        (
            "data",
            format!(
                "{} tokens, {} micro-batches an epoch, the largest of {} tokens, {} live",
                work.tokens,
                work.batches.len(),
                largest.tokens,
                largest.live
            ),
        ),
        ("draft", format!("{} parameters trained", parameters(&subject.dims, 1))),
        ("memory", format!("{} on each rank at most", bytes(own.memory_bytes))),
    ];
    rows.extend(own.memory.iter().map(|(kind, n)| (name(*kind), bytes(*n))));
    let of_target = own.target_memory_bytes.iter();
    rows.extend(of_target.map(|n| ("target", format!("{} on each of its ranks at most", bytes(*n)))));
    rows.push(("disk", format!("{} of checkpoints{}", bytes(disk.checkpoints), store_text(disk))));
    rows.push(("step", format!("{:.1} ms of computing", 1e3 * own.compute_seconds)));
    if own.layout.ranks() > 1 {
        rows.push(("traffic", traffic_text(own)));
    }
    let speed = rate(own.tokens_per_second);
    rows.push(("time", format!("{} steps, {speed}, {}", own.steps, duration(own.hours))));
    rows
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Weights => "  weights",
        Kind::Optimizer => "  optimizer",
        Kind::Gradients => "  gradients",
        Kind::Activations => "  activations",
        Kind::Features => "  features",
        Kind::Buffers => "  buffers",
        Kind::Program => "  program",
        Kind::Target => "  target",
    }
}

/// What to do where ranks that have batches of their own are more than a step's micro-batches.
fn sharing_text(own: &Projection) -> String {
    let (data, n) = (own.layout.data, own.accumulation);
    if data as usize <= n {
        return String::new();
    }
    format!(
        "; {data} of them share {n} of a step's micro-batches, train.accumulation = {data} gives each a whole one"
    )
}

fn store_text(disk: &Disk) -> String {
    if disk.store == 0 { String::new() } else { format!(", {} of features", bytes(disk.store)) }
}

fn traffic_text(p: &Projection) -> String {
    let t = &p.traffic;
    let sent =
        bytes((t.data_bytes + t.tensor_bytes + t.agreed_bytes + t.sequence_bytes + t.target_bytes) as u64);
    format!(
        "{sent} from each rank a step: gradients and weights {:.1} ms, {:.1} of them beside computing; rows, heads and features {:.1} ms, waited for",
        1e3 * t.data_seconds,
        1e3 * p.hidden_seconds,
        1e3 * t.waited_seconds
    )
}

fn summary(p: &Projection) -> String {
    format!(
        "{}, accumulation {}; {} each; {}, {}; {}",
        p.layout,
        p.accumulation,
        bytes(p.memory_bytes),
        rate(p.tokens_per_second),
        duration(p.hours),
        traffic_text(p)
    )
}

fn duration(hours: f64) -> String {
    match hours {
        h if h < 1.0 / 60.0 => format!("{:.0} s", 3600.0 * h),
        h if h < 1.0 => format!("{:.1} min", 60.0 * h),
        h => format!("{h:.1} h"),
    }
}
