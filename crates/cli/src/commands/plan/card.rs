//! What cards do, measured where it could be, and how long work takes on them.

use serde::Serialize;

use super::memory::parameters;
use crate::commands::bench::flops::{Rows, Work};
use specforge_methods::eagle3::Dims;

/// One kind of device. Rates are those reached in a training step, not peaks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Card {
    pub(super) name: &'static str,
    /// Bytes of memory.
    pub(super) memory: u64,
    /// Matrix products, operations a second.
    pub(super) products: f64,
    /// Attention, forward and backward together.
    pub(super) attention: f64,
    /// Bytes a second of operations that only move.
    pub(super) bandwidth: f64,
    /// Bytes a second to other cards of the machine, one way.
    pub(super) link: f64,
    /// Whether the rates were measured (BENCHMARKS.md); otherwise they are the H100's by published peaks.
    pub(super) measured: bool,
}

const GB: u64 = 1_000_000_000;

/// The cards that are known.
pub(super) const CARDS: [Card; 4] = [
    card("h200", 141, [620e12, 440e12, 3.5e12], 450e9, true),
    card("h100", 80, [610e12, 440e12, 2.5e12], 450e9, true),
    card("a100", 80, [610e12 * 312.0 / 989.0, 440e12 * 312.0 / 989.0, 2.5e12 * 2.0 / 3.35], 300e9, false),
    card("b200", 180, [610e12 * 2250.0 / 989.0, 440e12 * 2250.0 / 989.0, 2.5e12 * 8.0 / 3.35], 900e9, false),
];

/// Operations a second of one CPU thread in the quick start (BENCHMARKS.md), and bytes a second of all of them.
const CPU_THREAD: f64 = 46e9;
const CPU_BANDWIDTH: f64 = 10e9;

const fn card(name: &'static str, gb: u64, rates: [f64; 3], link: f64, measured: bool) -> Card {
    let [products, attention, bandwidth] = rates;
    Card { name, memory: gb * GB, products, attention, bandwidth, link, measured }
}

impl Card {
    /// The card that a device's own name tells, with the memory it has.
    pub(super) fn of_device(name: &str, memory: u64) -> Option<Self> {
        let name = name.to_lowercase();
        CARDS.iter().find(|card| name.contains(card.name)).map(|card| Self { memory, ..*card })
    }

    /// The processor.
    pub(super) fn cpu(threads: usize, memory: u64) -> Self {
        let rate = CPU_THREAD * threads as f64;
        let (bandwidth, link) = (CPU_BANDWIDTH, CPU_BANDWIDTH);
        Self { name: "cpu", memory, products: rate, attention: rate, bandwidth, link, measured: true }
    }

    /// Seconds of this work.
    pub(super) fn seconds(&self, work: Work) -> f64 {
        work.products / self.products + work.attention / self.attention
    }

    /// Seconds of what moves only: norms, rotation, gates and sums of live rows at every step, and logits.
    pub(super) fn moving(&self, dims: &Dims, steps: usize, rows: &Rows, element: u64) -> f64 {
        let [h, i] = [dims.hidden_size, dims.intermediate_size].map(|n| n as f64);
        let qkv = ((dims.num_attention_heads + 2 * dims.num_key_value_heads) * dims.head_dim) as f64;
        // Reads and writes of a row, forward and backward; logits are written, turned into gradients, and read.
        let row = (9.0 * i + 12.0 * h + 5.0 * qkv) * (steps * rows.live) as f64;
        let logits = 3.0 * rows.loss as f64 * dims.draft_vocab_size as f64;
        element as f64 * (row + logits) / self.bandwidth
    }

    /// Seconds of an optimizer step over `share` ranks: 28 bytes a parameter, clipping included.
    pub(super) fn optimizer(&self, dims: &Dims, tensor: u64, share: u64) -> f64 {
        28.0 * parameters(dims, tensor) as f64 / share as f64 / self.bandwidth
    }
}
