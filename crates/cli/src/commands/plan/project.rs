//! A recipe on one layout of ranks: memory, time and traffic; and the setting nearest to one that does not fit.

use anyhow::{Result, bail};
use serde::Serialize;
use specforge_config::{Mode, TargetDType};
use specforge_tensor::Device;

use super::layout::{Layout, of_ranks};
use super::ledger::{Held, total};
use super::memory::{Case, Frozen, peak, target_peak};
use super::traffic::{self, Traffic};
use super::{Subject, expect_shared, threads};
use crate::commands::bench::flops::{self, Rows, Sizes};
use crate::show::bytes;

/// What a driver, its libraries and compiled kernels take of a card.
const DRIVER: u64 = 600 << 20;
/// The share of a step in which the backward runs.
const BACKWARD: f64 = 0.42;
/// Seconds that a card takes at least for a micro-batch: some 500 kernels are launched.
const LAUNCHES: f64 = 4e-3;
/// Cards that the projections are for.
const LARGER: [u64; 3] = [8, 64, 512];

/// What a layout comes to.
#[derive(Debug, Serialize)]
pub(super) struct Projection {
    pub(super) layout: Layout,
    /// Micro-batches of a step, over all ranks together.
    pub(super) accumulation: usize,
    /// Of each rank, by what it is for.
    pub(super) memory: Held,
    pub(super) memory_bytes: u64,
    /// Of each rank that has the target and trains nothing, where there are such.
    pub(super) target_memory_bytes: Option<u64>,
    /// Seconds of computing in a step.
    pub(super) compute_seconds: f64,
    pub(super) traffic: Traffic,
    /// Of the seconds in which gradients and weights are sent, those beside computing.
    pub(super) hidden_seconds: f64,
    /// Tokens a second of all ranks, nothing hidden.
    pub(super) tokens_per_second: f64,
    pub(super) steps: u64,
    pub(super) hours: f64,
}

/// The settings that make room, as far as they differ from the recipe's.
#[derive(Debug, Clone, Copy)]
struct Setting {
    layout: Layout,
    mode: Mode,
    dtype: TargetDType,
    /// Tokens of a micro-batch are the recipe's divided by this.
    divisor: usize,
}

/// The recipe as it is; an error that names the nearest setting that fits if it does not.
pub(super) fn own(subject: &Subject) -> Result<Projection> {
    let setting = Setting::of(subject);
    let (held, room) = (memory(subject, &setting), room(subject));
    let most = needs(subject, &setting);
    if most <= room {
        return Ok(projection(subject, (subject.layout, subject.plan.train.accumulation), held));
    }
    let what = format!(
        "this recipe needs {} on each rank ({}), and {} has room for {}",
        bytes(most),
        subject.layout,
        subject.card.name,
        bytes(room)
    );
    match nearest(subject, room) {
        Some((words, needs)) => {
            bail!("{what}; the nearest setting that fits: {words} ({})", bytes(needs))
        }
        None => {
            bail!("{what}, and no setting of the recipe fits there; take a smaller target or larger cards")
        }
    }
}

/// The recipe on more cards, each time with the first layout that fits, and a micro-batch at least for every rank that
/// has its own.
pub(super) fn larger(subject: &Subject) -> Vec<Projection> {
    if subject.device == Device::Cpu {
        return Vec::new();
    }
    let fitting = |ranks: u64| {
        let most = subject.links.per_node.min(subject.dims.num_attention_heads as u64);
        layouts(subject, ranks, most).find_map(|layout| {
            let held = memory(subject, &Setting { layout, ..Setting::of(subject) });
            let accumulation = subject.plan.train.accumulation.next_multiple_of(layout.data as usize);
            (total(&held) <= room(subject)).then(|| projection(subject, (layout, accumulation), held))
        })
    };
    LARGER.into_iter().filter_map(fitting).collect()
}

/// Layouts of so many ranks over which target and draft can lie.
fn layouts(subject: &Subject, ranks: u64, most: u64) -> impl Iterator<Item = Layout> {
    let can = |layout: &Layout| {
        let target = subject.info.shared_by(layout.target as usize);
        target.is_ok() && expect_shared(&subject.plan, &subject.info, *layout).is_ok()
    };
    of_ranks(ranks, most).into_iter().filter(can)
}

impl Setting {
    fn of(subject: &Subject) -> Self {
        let (layout, mode, dtype) = (subject.layout, subject.plan.mode, subject.plan.target.dtype);
        Self { layout, mode, dtype, divisor: 1 }
    }

    /// The arguments that make it.
    fn words(&self, subject: &Subject) -> String {
        let (plan, own) = (&subject.plan, Self::of(subject));
        let mut words = Vec::new();
        if self.divisor > 1 {
            words
                .push(format!("--set train.tokens-per-batch={}", plan.train.tokens_per_batch / self.divisor));
            words.push(format!("--set train.accumulation={}", plan.train.accumulation * self.divisor));
        }
        if self.dtype != own.dtype {
            words.push("--set target.dtype=fp8".to_owned());
        }
        if self.mode != own.mode {
            words.push("--set mode=offline (after specforge capture)".to_owned());
        }
        let with_own_target = Layout { target: own.layout.target, ..self.layout };
        if self.layout != own.layout && with_own_target == own.layout {
            words.push(format!("--set parallel.target-tensor={}", self.layout.target));
        } else if self.layout != own.layout {
            words.push(format!("{} cards: {}", self.layout.ranks(), self.layout));
        }
        words.join(" ")
    }
}

/// Bytes that a projection may come to.
fn room(subject: &Subject) -> u64 {
    let besides = if subject.device == Device::Cpu { 0 } else { DRIVER };
    subject.card.memory.saturating_sub(besides)
}

/// Settings in the order of what they change: what is shared, portions, the target's type, the mode, more cards.
fn nearest(subject: &Subject, room: u64) -> Option<(String, u64)> {
    let own = Setting::of(subject);
    let longest = subject.plan.data.max_length;
    let portions = (1..8).map(|p| 1 << p);
    let portions = portions.filter(|divisor| subject.plan.train.tokens_per_batch / divisor >= longest);
    let mut all: Vec<Setting> = Vec::new();
    if own.layout.data > 1 && own.layout.zero != 1 {
        all.push(Setting { layout: Layout { zero: 1, ..own.layout }, ..own });
    }
    all.extend(sharing(subject).map(|layout| Setting { layout, ..own }));
    all.extend(portions.map(|divisor| Setting { divisor, ..own }));
    let smallest = all.iter().map(|s| s.divisor).max().unwrap_or(1);
    let fp8 = own.mode == Mode::Online && subject.device != Device::Cpu && own.dtype != TargetDType::Fp8;
    let (dtype, mode) = (TargetDType::Fp8, Mode::Offline);
    if fp8 {
        all.extend([Setting { dtype, ..own }, Setting { dtype, divisor: smallest, ..own }]);
    }
    all.extend([Setting { mode, ..own }, Setting { mode, divisor: smallest, ..own }]);
    if subject.device != Device::Cpu {
        let more = [1, 2, 4, 8].into_iter();
        let more = more.flat_map(|n| layouts(subject, own.layout.ranks() * n, subject.links.per_node));
        all.extend(more.map(|layout| Setting { layout, divisor: smallest, ..own }));
    }
    let mut sized = all.into_iter().map(|setting| (setting.words(subject), needs(subject, &setting)));
    sized.find(|(_, needs)| *needs <= room)
}

/// The recipe's layout with its target over more of the same ranks.
fn sharing(subject: &Subject) -> impl Iterator<Item = Layout> {
    let (own, online) = (subject.layout, subject.plan.mode != Mode::Offline);
    let copied = if own.apart > 0 { own.apart } else { own.ranks() };
    let doubled = (1..).map(move |p| own.target << p);
    let fits = move |target: &u64| {
        copied.is_multiple_of(*target) && subject.info.shared_by(*target as usize).is_ok()
    };
    let targets = doubled.take_while(move |target| online && *target <= copied).filter(fits);
    targets.map(move |target| Layout { target, ..own })
}

/// What the rank needs that needs most.
fn needs(subject: &Subject, setting: &Setting) -> u64 {
    total(&memory(subject, setting)).max(target_memory(subject, setting).unwrap_or(0))
}

/// What each rank holds at most that has the target and trains nothing.
fn target_memory(subject: &Subject, setting: &Setting) -> Option<u64> {
    let case = case(subject, setting);
    let frozen = subject.frozen(setting.mode, setting.dtype);
    let is_apart = case.layout.apart > 0 && setting.mode == Mode::Online;
    is_apart.then(|| total(&target_peak(&Case { frozen, ..case }, &largest(subject, setting))))
}

/// What each rank holds at most that trains.
fn memory(subject: &Subject, setting: &Setting) -> Held {
    peak(&case(subject, setting), &largest(subject, setting))
}

/// The largest micro-batch.
fn largest(subject: &Subject, setting: &Setting) -> Rows {
    let mut rows = subject.largest();
    if setting.divisor > 1 {
        // Portions hold whole rows, the longest at least.
        let longest = subject.plan.data.max_length.min(rows.tokens);
        let tokens = (rows.tokens / setting.divisor).max(longest);
        rows.shrink(tokens as f64 / rows.tokens.max(1) as f64);
    }
    rows
}

/// What the memory of a rank that trains depends on.
fn case<'a>(subject: &'a Subject, setting: &Setting) -> Case<'a> {
    let (online, layout) = (setting.mode != Mode::Offline, setting.layout);
    let is_here = online && layout.apart == 0;
    Case {
        dims: &subject.dims,
        target: &subject.info,
        steps: subject.config.ttt_steps as u64,
        storage: subject.storage(),
        threads: threads(&subject.plan) as u64,
        frozen: if is_here { subject.frozen(setting.mode, setting.dtype) } else { Frozen::Rows },
        // One batch waits for the step, one for its place. Ranks that meet in a fetch have one of another rank's beside
        // their own, or none.
        ahead: match (is_here, layout.target) {
            (false, _) if online => 0,
            (true, 2..) => 1,
            _ => 2,
        },
        accumulates: subject.plan.train.accumulation > layout.data as usize,
        target_beside: is_here,
        layout,
    }
}

fn projection(subject: &Subject, (layout, accumulation): (Layout, usize), memory: Held) -> Projection {
    let Subject { plan, info, config, dims, card, work, .. } = subject;
    let epoch = work.rows();
    let micro_batches = work.batches.len().max(1);
    let of_step = accumulation.min(micro_batches);
    let steps_of_epoch = micro_batches.div_ceil(of_step) as f64;
    // A rank's micro-batches of a step, or its piece of one where there are fewer than ranks; and what of a step that is.
    let data = layout.data as usize;
    let of_rank = of_step.div_ceil(data);
    let share = if of_step < data { 1.0 / data as f64 } else { of_rank as f64 / of_step as f64 };
    let shares = share / steps_of_epoch;
    let element = subject.storage().element;
    let online = plan.mode != Mode::Offline;
    let draft =
        card.seconds(draft_work(subject, &epoch)) + card.moving(dims, config.ttt_steps, &epoch, element);
    let draft = draft * shares / layout.of_batch() as f64;
    let target = card.seconds(target_work(subject, &epoch)) * fp8_factor(plan.target.dtype);
    // The rows of every rank that a copy serves, over the ranks that share it.
    let target = if online { target * layout.peers() as f64 / layout.target as f64 } else { 0.0 };
    let target = target * shares;
    let mut rows = epoch.clone();
    rows.shrink(shares);
    let sizes = traffic::Sizes {
        dims,
        target: online.then_some(info),
        steps: config.ttt_steps,
        rows: &rows,
        micro_batches: of_rank as f64,
        element: element as f64,
        exchange: plan.parallel.exchange,
    };
    let launches = if subject.device == Device::Cpu { 0.0 } else { LAUNCHES * of_rank as f64 };
    let optimizer = card.optimizer(dims, layout.tensor, layout.shards());
    let compute_seconds = if layout.apart > 0 {
        // Both at once.
        let of_target = target + traffic::of_target(&sizes, layout, &subject.links);
        of_target.max(draft.max(launches) + optimizer)
    } else {
        (draft + target).max(launches) + optimizer
    };
    let traffic = traffic::of(&sizes, layout, &subject.links);
    let sends = if layout.zero < 2 { (1, of_rank) } else { (of_rank, of_rank) };
    let step = compute_seconds + traffic.data_seconds + traffic.waited_seconds;
    let steps = (work.steps as f64 * plan.train.accumulation as f64 / accumulation as f64).ceil();
    Projection {
        layout,
        accumulation,
        memory_bytes: total(&memory),
        target_memory_bytes: target_memory(subject, &Setting { layout, ..Setting::of(subject) }),
        memory,
        compute_seconds,
        traffic,
        hidden_seconds: hidden_seconds(&traffic, BACKWARD * compute_seconds, sends, config.ttt_steps),
        tokens_per_second: epoch.tokens as f64 / steps_of_epoch / step,
        steps: steps as u64,
        hours: steps * step / 3600.0,
    }
}

/// Seconds of sending that the step does not wait for. The head's gradient leaves before a backward starts, those of the
/// layer in the last of the backward's TTT steps, the first matrix's when all is done; weights leave while the next
/// forward, half as long as the backward, comes to them. `backward`: seconds of all micro-batches; `sends`: how often
/// gradients are sent, in how many micro-batches.
fn hidden_seconds(
    t: &Traffic,
    backward: f64,
    (times, micro_batches): (usize, usize),
    ttt_steps: usize,
) -> f64 {
    if t.data_bytes == 0.0 {
        return 0.0;
    }
    let seconds = |bytes: f64| t.data_seconds * bytes / t.data_bytes;
    let of_one = |bytes: f64| seconds(bytes) / times as f64;
    let one_backward = backward / micro_batches as f64;
    let layer_from = of_one(t.head_bytes).max(one_backward * (1.0 - 1.0 / ttt_steps as f64));
    let layer_until = layer_from + of_one(t.overlapped_bytes - t.head_bytes);
    let late = (layer_until - one_backward).max(0.0) + of_one(t.gradient_bytes - t.overlapped_bytes);
    let weights_late = (seconds(t.data_bytes - t.gradient_bytes) - one_backward / 2.0).max(0.0);
    t.data_seconds - times as f64 * late - weights_late
}

fn draft_work(subject: &Subject, rows: &Rows) -> flops::Work {
    flops::ours(&Sizes::of_draft(&subject.dims, subject.config.ttt_steps), rows)
}

fn target_work(subject: &Subject, rows: &Rows) -> flops::Work {
    flops::target(
        &Sizes::of(&subject.info, subject.dims.draft_vocab_size, subject.config.ttt_steps, true),
        rows,
    )
}

/// How much less time a target in 8-bit floats takes: measured, 77.1 of 103.6 ms.
fn fp8_factor(dtype: TargetDType) -> f64 {
    if dtype == TargetDType::Fp8 { 77.1 / 103.6 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_in_time_is_hidden() {
        // 30 + 50 + 20 bytes of gradients at 10 bytes a second, and 40 of weights.
        let (head_bytes, overlapped_bytes, gradient_bytes, data_bytes) = (30.0, 80.0, 100.0, 140.0);
        let data_seconds = data_bytes / 10.0;
        let t = Traffic {
            data_bytes,
            gradient_bytes,
            overlapped_bytes,
            head_bytes,
            data_seconds,
            ..Traffic::default()
        };
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a}, expected {b}");
        // The layer from second 90 of 100 on, in 5 of the last 10: only the first matrix is waited for.
        near(hidden_seconds(&t, 100.0, (1, 1), 10), 12.0);
        // A backward of no time hides nothing.
        near(hidden_seconds(&t, 0.0, (1, 1), 10), 0.0);
        // From second 9 of 10 to 14, then 2 more; 4 of weights in 5.
        near(hidden_seconds(&t, 10.0, (1, 1), 10), 14.0 - 4.0 - 2.0);
        near(hidden_seconds(&Traffic::default(), 1.0, (1, 1), 7), 0.0);
    }
}
