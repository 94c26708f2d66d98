//! What ranks send in a step, by the standard formulas, and how long that takes.
//!
//! A ring all-reduce of b bytes over n ranks sends 2 (n - 1)/n · b from each (Patarasuk and Yuan, 2009), reduce-scatter
//! and all-gather half of it. Ranks that train on other rows all-reduce gradients, or (ZeRO, Rajbhandari et al., 2020)
//! reduce-scatter gradients and gather weights once a step; from level 2 on gradients are sent after every micro-batch.
//! Tensor parallel (Shoeybi et al., 2019): two all-reduces
//! of the rows forward and two backward, for every layer, and the gradients of what no rank shares; the frozen target has
//! no backward.
//! Ranks of a sequence exchange step-0 keys and values: once for all steps, and their float32 gradients once (`gather`); or
//! in every step, forward and backward, the gradients going with them (`ring`; Liu et al., 2023). Or queries, keys, values
//! and outputs of every step go all to all, of which (n - 1)/n leaves a rank (`heads`; Jacobs et al., 2023).

use serde::Serialize;
use specforge_config::Exchange;
use specforge_methods::eagle3::Dims;
use specforge_models::TargetInfo;

use super::layout::Layout;
use super::memory::{parameters, pieces_and_whole};
use crate::commands::bench::flops::Rows;

/// Bytes a second between ranks, one way.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Links {
    /// Within a machine.
    pub(super) link: f64,
    /// Between machines, for each card.
    pub(super) network: f64,
    /// Cards of a machine.
    pub(super) per_node: u64,
}

/// What one rank sends in an optimizer step.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Traffic {
    /// Gradients and weights.
    pub(super) data_bytes: f64,
    /// Gradients alone.
    pub(super) gradient_bytes: f64,
    /// Gradients that leave while the backward has more to compute: all but that of the first matrix of the forward.
    pub(super) overlapped_bytes: f64,
    /// Of them, the head's, which leave before the backward starts.
    pub(super) head_bytes: f64,
    /// Rows, between tensor-parallel ranks.
    pub(super) tensor_bytes: f64,
    /// Gradients between them, once a step.
    pub(super) agreed_bytes: f64,
    /// Keys, values and their gradients, or heads, between sequence-parallel ranks.
    pub(super) sequence_bytes: f64,
    /// Rows of the target, between ranks that share it; or features, from ranks of its own.
    pub(super) target_bytes: f64,
    /// Seconds of the first, most of which go on beside computing.
    pub(super) data_seconds: f64,
    /// Seconds of the others, for which the step waits.
    pub(super) waited_seconds: f64,
}

/// The sizes that traffic depends on. `rows` are those of a step's micro-batches together, per data-parallel rank.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes<'a> {
    pub(super) dims: &'a Dims,
    /// The target, where it runs in the step.
    pub(super) target: Option<&'a TargetInfo>,
    pub(super) steps: usize,
    pub(super) rows: &'a Rows,
    pub(super) micro_batches: f64,
    pub(super) element: f64,
    pub(super) exchange: Exchange,
}

impl Links {
    /// Between neighbouring ranks, which leave the machine only if they are more than it has cards.
    fn speed(&self, ranks: u64) -> f64 {
        if ranks <= self.per_node { self.link } else { self.network }
    }
}

/// The traffic of one step.
pub(super) fn of(s: &Sizes<'_>, layout: Layout, links: &Links) -> Traffic {
    let [data, tensor, sequence] =
        [data_bytes(s, layout), tensor_bytes(s, layout), sequence_bytes(s, layout)];
    let agreed = agreed_bytes(s.dims, layout);
    let target = s.target.map_or(0.0, |target| target_bytes(s, target, layout));
    let inner = layout.of_batch();
    // Ranks of the target's own are as far away as any.
    let reach = if layout.apart > 0 { layout.ranks() } else { layout.target };
    Traffic {
        data_bytes: data,
        gradient_bytes: gradient_bytes(s, layout, parameters(s.dims, layout.tensor) as f64),
        overlapped_bytes: overlapped_bytes(s, layout),
        head_bytes: gradient_bytes(s, layout, elements(s.dims, "lm_head.weight") / layout.tensor as f64),
        tensor_bytes: tensor,
        agreed_bytes: agreed,
        sequence_bytes: sequence,
        target_bytes: target,
        data_seconds: data / links.speed(layout.ranks()),
        waited_seconds: (tensor + agreed) / links.speed(layout.tensor)
            + sequence / links.speed(inner)
            + target / links.speed(reach),
    }
}

/// The share of a tensor that leaves a rank in half an all-reduce.
fn share(ranks: u64) -> f64 {
    (ranks - 1) as f64 / ranks as f64
}

fn data_bytes(s: &Sizes<'_>, layout: Layout) -> f64 {
    let n = parameters(s.dims, layout.tensor) as f64;
    let weights = share(layout.shards()) * s.element * n;
    gradient_bytes(s, layout, n) + weights
}

/// What leaves a rank of the gradients of `n` parameters.
fn gradient_bytes(s: &Sizes<'_>, layout: Layout, n: f64) -> f64 {
    let times = if layout.zero < 2 { 1.0 } else { s.micro_batches };
    let halves = if layout.zero == 0 { 2.0 } else { 1.0 };
    times * 4.0 * n * halves * share(layout.data * layout.sequence)
}

fn overlapped_bytes(s: &Sizes<'_>, layout: Layout) -> f64 {
    gradient_bytes(s, layout, parameters(s.dims, layout.tensor) as f64 - elements(s.dims, "fc.weight"))
}

fn elements(dims: &Dims, weight: &str) -> f64 {
    let found = dims.weights().into_iter().find(|(name, _)| name == weight);
    found.map_or(0.0, |(_, shape)| shape.iter().product::<usize>() as f64)
}

fn tensor_bytes(s: &Sizes<'_>, layout: Layout) -> f64 {
    let (h, all_reduce) = (s.dims.hidden_size as f64, 2.0 * share(layout.tensor));
    let per_rank = |n: usize| n as f64 / layout.sequence as f64;
    // Two of every step forward, two backward; the gradient of the rows before the head.
    let draft = (4 * s.steps) as f64 * per_rank(s.rows.live) + per_rank(s.rows.loss);
    all_reduce * s.element * draft * h
}

/// Gradients of what all have whole come from one of them, by a ring through all; those of pieces that several have are
/// gathered.
fn agreed_bytes(dims: &Dims, layout: Layout) -> f64 {
    let [_, whole] = pieces_and_whole(dims, layout.tensor);
    let copied = |(name, shape): (String, Vec<usize>)| {
        let (_, pieces) = dims.pieces(&name, layout.tensor as usize)?;
        let is_copied = pieces < layout.tensor as usize;
        is_copied.then(|| shape.iter().product::<usize>() as f64 / pieces as f64)
    };
    let gathered = layout.tensor as f64 * dims.weights().into_iter().filter_map(copied).sum::<f64>();
    share(layout.tensor) * 4.0 * (whole as f64 + gathered) / layout.shards() as f64
}

/// Where ranks share the target, two all-reduces in every layer, over the rows of each of them in turn. Where it has ranks
/// of its own, the captured states and the last one of a rank's rows.
fn target_bytes(s: &Sizes<'_>, target: &TargetInfo, layout: Layout) -> f64 {
    let rows = s.element * s.rows.tokens as f64 * target.hidden_size as f64;
    if layout.apart > 0 { 4.0 * rows } else { shared_bytes(target, rows, layout) }
}

fn shared_bytes(target: &TargetInfo, rows: f64, layout: Layout) -> f64 {
    2.0 * share(layout.target) * 2.0 * target.n_layers as f64 * rows * layout.peers() as f64
}

/// Seconds in which the ranks of a target's own do nothing but send: sums in every layer, and features.
pub(super) fn of_target(s: &Sizes<'_>, layout: Layout, links: &Links) -> f64 {
    let Some(target) = s.target else { return 0.0 };
    let rows = s.element * s.rows.tokens as f64 * target.hidden_size as f64;
    let features = target_bytes(s, target, layout) * layout.peers() as f64;
    shared_bytes(target, rows, layout) / links.speed(layout.target) + features / links.speed(layout.ranks())
}

fn sequence_bytes(s: &Sizes<'_>, layout: Layout) -> f64 {
    let (d, away, steps) = (s.dims, share(layout.sequence), s.steps as f64);
    if away == 0.0 {
        return 0.0;
    }
    let kv = (2 * d.num_key_value_heads * d.head_dim) as f64 / layout.tensor as f64;
    let (keys, gradients) = (s.rows.tokens as f64 * kv * s.element, s.rows.tokens as f64 * kv * 4.0);
    match s.exchange {
        Exchange::Gather => away * (keys + gradients),
        Exchange::Ring => steps * (2.0 * away * keys + gradients),
        Exchange::Heads => {
            let width = kv + (2 * d.num_attention_heads * d.head_dim) as f64 / layout.tensor as f64;
            2.0 * away * s.element * steps * s.rows.live as f64 / layout.sequence as f64 * width
        }
    }
}

#[cfg(test)]
mod tests {
    use specforge_methods::eagle3::Config;

    use super::*;
    use crate::commands::bench::preset::Preset;

    #[test]
    fn volumes_are_those_of_the_papers() {
        let info = Preset::Llama3_8b.info().unwrap();
        let dims = Dims::resolve(&Config::default(), &info, 32_000).unwrap();
        let n = parameters(&dims, 1) as f64;
        assert!((n / 425e6 - 1.0).abs() < 0.01, "{n}");
        let mut rows = Rows::default();
        rows.add_document(&[1; 2048], 7);
        let exchange = Exchange::Gather;
        let (target, micro_batches, element) = (None, 1.0, 2.0);
        let s = Sizes { dims: &dims, target, steps: 7, rows: &rows, micro_batches, element, exchange };
        let links = Links { link: 100e9, network: 10e9, per_node: 8 };
        let at = |layout| of(&s, layout, &links);
        let plain = at(Layout { data: 8, ..Layout::ALONE });
        assert_eq!(plain.data_bytes, 2.0 * 7.0 / 8.0 * 4.0 * n);
        assert_eq!(plain.data_seconds, plain.data_bytes / 100e9);
        // All but fc, [4096, 3 * 4096].
        assert_eq!(plain.overlapped_bytes, 2.0 * 7.0 / 8.0 * 4.0 * (n - 3.0 * 4096.0 * 4096.0));
        let two_machines = at(Layout { data: 16, zero: 2, ..Layout::ALONE });
        assert_eq!(two_machines.data_seconds, 15.0 / 16.0 * 6.0 * n / 10e9);
        assert_eq!((plain.tensor_bytes, plain.sequence_bytes), (0.0, 0.0));
        let tensor = at(Layout { tensor: 2, ..Layout::ALONE });
        // Half of fc and the norms, in float32.
        let agreed = 2.0 * (4096.0 * 3.0 * 4096.0 + 4.0 * 4096.0);
        assert_eq!(tensor.tensor_bytes, 2.0 * 4096.0 * (28.0 * 2047.0 + 14_308.0));
        assert_eq!(tensor.agreed_bytes, agreed);
        assert_eq!(tensor.waited_seconds, (tensor.tensor_bytes + agreed) / 100e9);
        // With 16 ranks two have each of 8 key-value heads, and gather keys' and values' gradients, [128, 2 * 4096] each.
        let agreed_of_16 = 15.0 / 16.0 * 2.0 * agreed + 15.0 * 2.0 * 4.0 * 128.0 * 2.0 * 4096.0;
        assert_eq!(at(Layout { tensor: 16, ..Layout::ALONE }).agreed_bytes, agreed_of_16);
        assert_eq!(at(Layout::ALONE).waited_seconds, 0.0);
        // Keys and values, [2048, 2 * 1024], and their gradients: once, or in every step.
        let keys = 2048.0 * 2.0 * 1024.0;
        let sequence = Layout { sequence: 4, ..Layout::ALONE };
        assert_eq!(at(sequence).sequence_bytes, 0.75 * 6.0 * keys);
        let ring = of(&Sizes { exchange: Exchange::Ring, ..s }, sequence, &links);
        assert_eq!(ring.sequence_bytes, 7.0 * (1.5 * 2.0 + 4.0) * keys);
        let heads = of(&Sizes { exchange: Exchange::Heads, ..s }, sequence, &links);
        assert_eq!(heads.sequence_bytes, 7.0 * 1.5 * 2.0 * (2047.0 / 4.0) * 2.0 * (4096.0 + 1024.0));
        // The target of eight ranks runs over the rows of all eight.
        let online = Sizes { target: Some(&info), ..s };
        let shared = of(&online, Layout { data: 8, target: 8, ..Layout::ALONE }, &links);
        assert_eq!(shared.target_bytes, 2.0 * 7.0 / 8.0 * 2.0 * 32.0 * 2.0 * 2048.0 * 4096.0 * 8.0);
        assert_eq!(shared.waited_seconds, shared.target_bytes / 100e9);
        let apart = of(&online, Layout { data: 4, target: 4, apart: 4, ..Layout::ALONE }, &links);
        assert_eq!(apart.target_bytes, 4.0 * 2.0 * 2048.0 * 4096.0);
        let of_target = of_target(&online, Layout { data: 4, target: 4, apart: 4, ..Layout::ALONE }, &links);
        let [sums, features] = [2.0 * 0.75 * 2.0 * 32.0 * 4.0, 4.0 * 4.0].map(|n| n * 2.0 * 2048.0 * 4096.0);
        assert!((of_target / ((sums + features) / 100e9) - 1.0).abs() < 1e-12, "{of_target}");
    }
}
