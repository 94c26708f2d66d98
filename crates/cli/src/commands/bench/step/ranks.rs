//! The ranks of `specforge bench step`: how many, how a step lies over them, and what one of them has.

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;
use specforge_config::{DeviceChoice, Fsdp, ParallelConfig, ReduceDType};
use specforge_cuda::Gpu;
use specforge_methods::Counts;

use super::super::count;
use super::{Args, Mode};
use crate::ranks::Wanted;
use crate::setup;

/// Over which ranks a step goes.
#[derive(Debug, Clone, Copy, clap::Args, Serialize)]
pub(super) struct Over {
    /// Ranks that have a batch of this size each: a GPU for every one, on a CPU a thread.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = ranks)]
    pub(super) data: usize,
    /// Ranks that share the rows of a batch.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = ranks)]
    pub(super) sequence: usize,
    /// Ranks that share the draft's matrices (offline).
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = ranks)]
    pub(super) tensor: usize,
    /// What is spread over the ranks of --data and --sequence: 1 the optimizer, 2 the gradients too, 3 the weights too; 0 nothing.
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=3))]
    zero: u8,
    /// How attention reaches the rows of the other ranks of --sequence.
    #[arg(long, value_enum, default_value_t = Exchange::Gather)]
    exchange: Exchange,
    /// What gradients are sent as.
    #[arg(long, value_enum, default_value_t = Reduce::F32)]
    reduce: Reduce,
}

/// How attention reaches the rows of other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Exchange {
    /// Keys and values of all rows come to every rank, once a step.
    Gather,
    /// Keys and values pass around.
    Ring,
    /// Heads for rows, all to all.
    Heads,
}

/// What gradients are sent as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Reduce {
    /// As they are.
    F32,
    /// Half of that.
    Bf16,
}

impl Over {
    /// Ranks altogether.
    pub(super) fn all(&self) -> usize {
        self.data * self.of_batch()
    }

    /// Ranks that share a batch.
    pub(super) fn of_batch(&self) -> usize {
        self.sequence * self.tensor
    }

    /// Those that share a batch, and how.
    pub(super) fn counts(&self, parallel: &ParallelConfig) -> Counts {
        Counts { tensor: self.tensor, sequence: self.sequence, exchange: setup::exchange(parallel) }
    }

    fn parallel(&self, device: DeviceChoice) -> ParallelConfig {
        let fsdp = [Fsdp::None, Fsdp::Optimizer, Fsdp::Gradients, Fsdp::Full][usize::from(self.zero)];
        let reduce = if self.reduce == Reduce::Bf16 { ReduceDType::Bf16 } else { ReduceDType::F32 };
        let exchange = match self.exchange {
            Exchange::Gather => specforge_config::Exchange::Gather,
            Exchange::Ring => specforge_config::Exchange::Ring,
            Exchange::Heads => specforge_config::Exchange::Heads,
        };
        let on_cpu = match device {
            DeviceChoice::Auto => Gpu::count().unwrap_or(0) == 0,
            chosen => chosen == DeviceChoice::Cpu,
        };
        ParallelConfig {
            data: Some(self.data),
            fsdp,
            reduce,
            sequence: self.sequence,
            exchange,
            tensor: self.tensor,
            // Each rank has the whole, where there is one.
            target_tensor: Some(1),
            ranks_in_process: on_cpu && self.all() > 1,
            ..ParallelConfig::default()
        }
    }
}

impl Args {
    /// The ranks of this measurement.
    pub(super) fn wanted(&self) -> Result<Wanted> {
        if self.over.tensor > 1 && self.mode == Mode::Online {
            bail!(
                "--tensor {}: targets of random weights are not shared; use --mode offline",
                self.over.tensor
            );
        }
        let device = self.output.device.choice();
        Ok(Wanted { parallel: self.over.parallel(device), device, threads: 0 })
    }
}

/// A number of ranks.
fn ranks(text: &str) -> Result<usize, String> {
    let most = 4096;
    count(text)?;
    text.parse().ok().filter(|&n| n <= most).ok_or_else(|| format!("expected at most {most}"))
}
