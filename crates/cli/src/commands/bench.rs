//! `specforge bench`: what a training step and its parts cost on this machine.

mod adamw;
mod attention;
mod clock;
pub(super) mod data;
mod experts;
mod floor;
pub(super) mod flops;
mod gemm;
mod loss;
pub(super) mod preset;
mod step;
pub(super) mod subject;

use anyhow::Result;
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};
use specforge_config::DeviceChoice;
use specforge_tensor::Device;

use crate::show::{print, table};
use crate::{gpu, machine};

/// Measure a training step, or one part of it, on random weights and data of real shapes.
///
/// Nothing is read from disk: a preset names the sizes of a published model, and the device draws the values. Start
/// with `specforge bench step`; the others time one kind of work alone. Times are medians, by events of the GPU (by
/// the clock on a CPU) over repetitions that follow each other without a pause. Figures of one machine compare only
/// with figures of the same machine: the first line names it. docs/dev/benchmarks.md has the commands behind
/// BENCHMARKS.md.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Step(step::Args),
    Attention(attention::Args),
    Gemm(gemm::Args),
    Adamw(adamw::Args),
    Loss(loss::Args),
    Experts(experts::Args),
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Step(args) => step::run(args),
        What::Attention(args) => attention::run(args),
        What::Gemm(args) => gemm::run(args),
        What::Adamw(args) => adamw::run(args),
        What::Loss(args) => loss::run(args),
        What::Experts(args) => experts::run(args),
    }
}

/// Where to measure.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum On {
    /// The first GPU if there is one that works, the CPU otherwise.
    Auto,
    /// The CPU, in float32; real presets take it minutes.
    Cpu,
    /// The first GPU; an error without one.
    Cuda,
}

/// Arguments that every measurement has.
#[derive(Debug, clap::Args)]
struct Output {
    /// Where to measure.
    #[arg(long, value_enum, default_value_t = On::Auto)]
    device: On,
    /// Print one JSON object with every figure, more than the table has.
    #[arg(long)]
    json: bool,
}

/// How often to repeat what is measured.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Repeats {
    /// Repetitions before the measured ones: they compile kernels, choose algorithms and fill the memory pool.
    #[arg(long, value_name = "N", default_value_t = 3)]
    warmup: u32,
    /// Measured repetitions.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
}

impl On {
    fn choice(self) -> DeviceChoice {
        match self {
            Self::Auto => DeviceChoice::Auto,
            Self::Cpu => DeviceChoice::Cpu,
            Self::Cuda => DeviceChoice::Cuda,
        }
    }
}

impl Output {
    fn device(&self) -> Result<Device> {
        gpu::device(self.device.choice())
    }

    /// Prints `facts` as JSON or `rows` as a table, the device first.
    fn print(&self, device: Device, facts: Value, rows: Vec<(&str, String)>) -> Result<()> {
        let (name, driver) = names(device);
        if !self.json {
            let driver = driver.map(|driver| format!(", driver for CUDA {driver}")).unwrap_or_default();
            let first = ("device", format!("{name}{driver}"));
            return print(table(&[vec![first], rows].concat()));
        }
        let mut all = json!({ "device": name, "driver": driver });
        if let (Value::Object(all), Value::Object(facts)) = (&mut all, facts) {
            all.extend(facts);
        }
        print(serde_json::to_string_pretty(&all)?)
    }
}

/// The device's name, and the CUDA version of its driver.
fn names(device: Device) -> (String, Option<String>) {
    let Some(gpu) = device.gpu() else { return (format!("cpu, {} threads", machine::threads()), None) };
    let (p, driver) = (gpu.properties(), gpu.properties().driver);
    (p.name.clone(), Some(format!("{}.{}", driver / 1000, driver % 1000 / 10)))
}

/// A count of an argument: 1 or more.
fn count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number of at least 1".to_owned())
}

/// Operations a second in the unit that suits them.
fn speed(tflops: f64) -> String {
    if tflops < 1.0 { format!("{:.1} GFLOP/s", 1e3 * tflops) } else { format!("{tflops:.1} TFLOP/s") }
}

/// TFLOP/s of so much work in so many milliseconds.
fn tflops(flop: f64, ms: f64) -> f64 {
    flop / ms / 1e9
}
