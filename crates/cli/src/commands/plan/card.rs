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

#[cfg(test)]
mod tests {
    use specforge_methods::eagle3::Config;

    use super::*;
    use crate::commands::bench::flops::{self, Sizes};
    use crate::commands::bench::preset::Preset;

    /// Milliseconds of a step by the rates: so many documents of so many tokens; online with the target.
    fn step_ms(card: &Card, preset: Preset, [documents, each]: [usize; 2], online: bool) -> f64 {
        let (info, steps) = (preset.info().unwrap(), Config::default().ttt_steps);
        let dims = Dims::resolve(&Config::default(), &info, 32_000).unwrap();
        let mut rows = Rows::default();
        (0..documents).for_each(|_| rows.add_document(&vec![1; each], steps));
        let target = flops::target(&Sizes::of(&info, 32_000, steps, online), &rows);
        let draft = flops::ours(&Sizes::of_draft(&dims, steps), &rows);
        let seconds = [
            card.seconds(draft),
            card.seconds(target),
            card.moving(&dims, steps, &rows, 2),
            card.optimizer(&dims, 1, 1),
        ];
        1e3 * seconds.iter().sum::<f64>()
    }

    /// The steps of BENCHMARKS.md that measured the card and not the host.
    #[test]
    fn the_rates_give_the_measured_steps() {
        let [h200, h100] = [&CARDS[0], &CARDS[1]];
        let (llama, four, eight) = (Preset::Llama3_8b, Preset::Qwen3_4b, Preset::Qwen3_8b);
        for (card, preset, tokens, online, measured) in [
            (h200, llama, [1, 2048], false, 58.5),
            (h200, llama, [2, 2048], false, 112.6),
            (h200, llama, [1, 8192], false, 242.6),
            (h200, llama, [1, 32768], false, 1302.0),
            (h200, eight, [2, 2048], false, 104.6),
            (h200, llama, [2, 2048], true, 215.8),
            (h200, four, [2, 2048], true, 126.2),
            (h100, llama, [1, 2048], false, 61.7),
            (h100, llama, [2, 2048], false, 114.7),
        ] {
            let ms = step_ms(card, preset, tokens, online);
            let name = card.name;
            assert!(
                (ms / measured - 1.0).abs() < 0.12,
                "{name} {preset:?} {tokens:?}: {ms:.1} ms, {measured}"
            );
        }
    }
}
