//! `specforge bench step`: a training step as a whole, its phases, its memory, and how far it is from its floor.

mod ranks;
mod report;

use std::time::Instant;

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;
use specforge_config::ParallelConfig;
use specforge_cuda::{Gemm, Gpu};
use specforge_methods::eagle3::{Config, Eagle3};
use specforge_models::TargetInfo;
use specforge_tensor::{DType, Device};
use specforge_train::Sent;

use super::clock::{Mark, Spread, laps, median};
use super::data::Data;
use super::floor::{self, Floor};
use super::flops::{Rows, Sizes};
use super::preset::{Preset, Tokens};
use super::subject::{PHASES, Pending, Source, Subject};
use super::{Output, Repeats};
use crate::ranks::{Ending, Rank};
use crate::{gpu, setup};

/// Measure an EAGLE3 training step: 7 test-time-training steps, KL, AdamW with clipping.
///
/// Weights and data are random, shapes are real. What comes out:
///
///   step    median, least and most time of back-to-back steps
///   speed   tokens/s by the median; all tokens of the batch count
///   phases  target (online), forward, backward, optimizer, from further
///           steps. The head is fused with its loss: the gradients of the
///           head and of its rows are computed within the forward
///   rows    rows computed at every step (live), rows with loss over all
///           steps, and teacher rows
///   work    operations of matrix products and attention, and SpecForge's
///           for the same batch. Ours are fewer: only live rows, the
///           embedding's half of q, k and v once, and the teacher over the
///           draft vocabulary alone
///   floor   the same matrix products alone, replayed in this run on random
///           values; --json lists them by shape
///   memory  the peak of warm steps, what was held before the first, and
///           whether warm steps took any from the system (none should)
///   sent    bytes that leave a rank in a step, where there are several
///
/// With several ranks, times, rows, work, floor and memory are those of the first one; the speed is that of all.
///
/// Examples:
///
///   specforge bench step --preset llama3-8b --tokens 2x2048 --live 0.5
///   specforge bench step --preset qwen3-4b --tokens 2x2048 --mode online --json
///   specforge bench step --preset llama3-8b --tokens 1x32768 --sequence 4
///   specforge bench step --preset llama3-8b --tokens 2x2048 --data 8 --zero 2
///   specforge bench step --preset quickstart --tokens 2x64 --device cpu
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// The target whose draft is trained; the draft has its widths.
    #[arg(long, value_enum, default_value_t = Preset::Llama3_8b)]
    preset: Preset,
    /// The batch: D documents of T tokens each, packed.
    #[arg(long, value_name = "DxT", default_value = "1x2048")]
    tokens: Tokens,
    /// Share of supervised tokens, above 0 up to 1: spans of 20 to 200, as in chat data. Fewer live rows, less work.
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, value_parser = share)]
    live: f64,
    /// Where features come from.
    #[arg(long, value_enum, default_value_t = Mode::Offline)]
    mode: Mode,
    /// How the target's weights lie in memory and multiply (online).
    #[arg(long, value_enum, default_value_t = TargetType::Bf16)]
    target_dtype: TargetType,
    #[command(flatten)]
    over: ranks::Over,
    #[command(flatten)]
    repeats: Repeats,
    #[command(flatten)]
    output: Output,
}

/// Where features come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    /// They are on the device already, as if read from a store.
    Offline,
    /// The target runs on the batch before every step, and its best tokens are read back.
    Online,
}

/// Types of a target's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum TargetType {
    /// bfloat16; float32 on a CPU.
    Bf16,
    /// 8-bit floats with a scale per row, inputs rounded the same way; needs a GPU.
    Fp8,
}

/// Everything measured on the draft.
struct Measured {
    step: Spread,
    /// What asking for a step takes of the host, at least.
    host_ms: f64,
    /// By the names of [`PHASES`].
    phases: [f64; 4],
    memory: Option<Memory>,
    /// Of the last step.
    loss: f64,
    gemms: Vec<Gemm>,
    /// Of a step; nothing alone.
    sent: Option<Sent>,
}

/// Bytes of device memory.
#[derive(Debug, Serialize)]
struct Memory {
    before_bytes: usize,
    peak_bytes: usize,
    reserved_before_bytes: usize,
    reserved_after_bytes: usize,
    warm_steps_allocate_nothing: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let info = args.preset.info()?;
    expect_length(args, &info)?;
    let wanted = args.wanted()?;
    Eagle3::check_shared(&Config::default(), &info, args.over.counts(&wanted.parallel))?;
    crate::ranks::on(&wanted, |device, rank| {
        on_rank(args, &info, gpu::chosen(device)?, (rank, &wanted.parallel))?;
        Ok(Ending::Done)
    })
}

fn on_rank(
    args: &Args,
    info: &TargetInfo,
    device: Device,
    (rank, parallel): (&Rank, &ParallelConfig),
) -> Result<()> {
    let config = Config::default();
    let storage = storage(args, device)?;
    let source = if args.mode == Mode::Online { Source::Target(storage) } else { Source::Store };
    let ranks = rank.layout(parallel)?.train;
    // Those that share a batch draw the same one.
    let number = rank.number() / args.over.of_batch();
    let data = Data::draw(args.tokens, (args.live, number), info.vocab_size);
    let vocab = args.preset.vocab(info.vocab_size)?;
    let sizes = Sizes::of(info, vocab.len(), config.ttt_steps, args.mode == Mode::Online);
    let rows = Rows::of(&data.bounds, &data.loss_mask, config.ttt_steps);
    // The draft is gone before the floor takes memory for its operands.
    let measured = {
        let ranks = ranks.map(|ranks| (ranks, setup::exchange(parallel)));
        let subject = Subject::new((info, vocab), &config, data, source, (device, ranks))?;
        measure(subject, args.repeats, device)?
    };
    if !rank.is_first() {
        return Ok(());
    }
    let floor = device.gpu().map(|gpu| floor_of(gpu, &measured.gemms)).transpose()?;
    report::print(args, device, &measured, floor.as_ref(), (&rows, &sizes))
}

/// How the target's weights are stored; `None`: as the device has them.
fn storage(args: &Args, device: Device) -> Result<Option<DType>> {
    match args.target_dtype {
        TargetType::Bf16 => Ok(None),
        TargetType::Fp8 if args.mode == Mode::Offline => bail!("--target-dtype fp8 needs --mode online"),
        TargetType::Fp8 if device == Device::Cpu => {
            bail!("--target-dtype fp8 needs a GPU; on a CPU use bf16")
        }
        TargetType::Fp8 => Ok(Some(DType::E4m3)),
    }
}

fn expect_length(args: &Args, info: &TargetInfo) -> Result<()> {
    let (tokens, most) = (args.tokens, info.max_position_embeddings);
    if tokens.each > most {
        bail!("--tokens {tokens}: documents of {} have at most {most} tokens", args.preset.name());
    }
    Ok(())
}

fn floor_of(gpu: &'static Gpu, gemms: &[Gemm]) -> Result<Floor> {
    // What the draft held goes back, so that the operands have room.
    gpu.release_kept()?;
    floor::replay(gpu, gemms)
}

fn measure(mut subject: Subject, repeats: Repeats, device: Device) -> Result<Measured> {
    device.synchronize()?;
    let gpu = device.gpu();
    let before = gpu.map(Gpu::usage);
    steps(&mut subject, repeats.warmup, device)?;
    device.synchronize()?;
    gpu.into_iter().for_each(Gpu::reset_peak);
    let warm = gpu.map(Gpu::usage);
    let (step, host_ms, loss) = steps(&mut subject, repeats.steps, device)?;
    let memory = gpu.zip(before).zip(warm).map(|((gpu, before), warm)| Memory {
        before_bytes: before.held,
        peak_bytes: gpu.usage().peak,
        reserved_before_bytes: warm.reserved,
        reserved_after_bytes: gpu.usage().reserved,
        warm_steps_allocate_nothing: warm.reserved == gpu.usage().reserved,
    });
    let sent = subject.sent(repeats.warmup + repeats.steps);
    let phases = phases(&mut subject, repeats.steps, device)?;
    let once = || subject.step(&mut || Ok(()))?.wait().map(|_| ());
    let gemms = gpu.map(|gpu| floor::record(gpu, once)).transpose()?.unwrap_or_default();
    Ok(Measured { step: Spread::of(&step), host_ms, phases, memory, loss, gemms, sent })
}

/// Times of back-to-back steps, the least time that the host took to ask for one, and the last one's loss. A step's figures are read while the next one runs, as
/// `specforge train` does.
fn steps(subject: &mut Subject, n: u32, device: Device) -> Result<(Vec<f64>, f64, f64)> {
    let mut marks = vec![Mark::now(device)?];
    let mut in_flight: Option<Pending> = None;
    let mut host_ms = f64::INFINITY;
    for _ in 0..n {
        let started = Instant::now();
        let issued = subject.step(&mut || Ok(()))?;
        host_ms = host_ms.min(started.elapsed().as_secs_f64() * 1e3);
        marks.push(Mark::now(device)?);
        in_flight.replace(issued).map(Pending::wait).transpose()?;
    }
    let loss = subject.of_batch(in_flight.map(Pending::wait).transpose()?.unwrap_or_default())?;
    Ok((laps(&marks)?, host_ms, loss))
}

/// Median milliseconds of each of [`PHASES`].
fn phases(subject: &mut Subject, n: u32, device: Device) -> Result<[f64; 4]> {
    let mut times = [const { Vec::new() }; PHASES.len()];
    let mut in_flight: Option<Pending> = None;
    let mut marks = Vec::new();
    for _ in 0..n {
        let mut of_step = vec![Mark::now(device)?];
        let issued = subject.step(&mut || {
            of_step.push(Mark::now(device)?);
            Ok(())
        })?;
        marks.push(of_step);
        in_flight.replace(issued).map(Pending::wait).transpose()?;
    }
    for of_step in &marks {
        laps(of_step)?.into_iter().zip(&mut times).for_each(|(ms, times)| times.push(ms));
    }
    Ok(times.map(|times| median(&times)))
}

/// A share of an argument.
fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|v| *v > 0.0 && *v <= 1.0);
    share.ok_or_else(|| "expected a share above 0 and at most 1".to_owned())
}
