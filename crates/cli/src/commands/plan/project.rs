//! A recipe on one layout of ranks: memory, time and traffic; and the setting nearest to one that does not fit.

use anyhow::{Result, bail};
use serde::Serialize;
use specforge_config::{Mode, TargetDType};
use specforge_tensor::Device;

use super::layout::{Layout, of_ranks};
use super::ledger::{Held, total};
use super::memory::{Case, peak};
use super::traffic::{self, Traffic};
use super::{Subject, expect_shared};
use crate::commands::bench::flops::{self, Rows, Sizes};
use crate::show::bytes;

/// What a driver, its libraries and compiled kernels take of a card.
const DRIVER: u64 = 600 << 20;
/// What the program takes beside its tensors on a CPU.
const PROGRAM: u64 = 64 << 20;
/// The share of a step in which the backward runs and gradients can already be sent.
const BACKWARD: f64 = 0.42;
/// Seconds that a card takes at least for a micro-batch: some 500 kernels are launched.
const LAUNCHES: f64 = 4e-3;
/// Cards that the projections are for.
const LARGER: [u64; 3] = [8, 64, 512];

/// What a layout comes to.
#[derive(Debug, Serialize)]
pub(super) struct Projection {
    pub(super) layout: Layout,
    /// Of each rank, by what it is for.
    pub(super) memory: Held,
    pub(super) memory_bytes: u64,
    /// Seconds of computing in a step.
    pub(super) compute_seconds: f64,
    pub(super) traffic: Traffic,
    /// Whether gradients and weights can be sent while the backward runs.
    pub(super) hides: bool,
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
    if total(&held) <= room {
        return Ok(projection(subject, subject.layout, held));
    }
    let (needs, has) = (bytes(total(&held)), bytes(room));
    let what = format!(
        "this recipe needs {needs} on each rank ({}), and {} has room for {has}",
        subject.layout, subject.card.name
    );
    match nearest(subject, room) {
        Some((words, held)) => {
            bail!("{what}; the nearest setting that fits: {words} ({})", bytes(total(&held)))
        }
        None => {
            bail!("{what}, and no setting of the recipe fits there; take a smaller target or larger cards")
        }
    }
}

/// The recipe on more cards, each time with the first layout that fits.
pub(super) fn larger(subject: &Subject) -> Vec<Projection> {
    if subject.device == Device::Cpu {
        return Vec::new();
    }
    let fitting = |ranks: u64| {
        let most = subject.links.per_node.min(subject.dims.num_attention_heads as u64);
        let possible = |layout: &Layout| expect_shared(&subject.plan, &subject.info, *layout).is_ok();
        of_ranks(ranks, most).into_iter().filter(possible).find_map(|layout| {
            let held = memory(subject, &Setting { layout, ..Setting::of(subject) });
            (total(&held) <= room(subject)).then(|| projection(subject, layout, held))
        })
    };
    LARGER.into_iter().filter_map(fitting).collect()
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
        if self.layout != own.layout {
            words.push(format!("{} cards: {}", self.layout.ranks(), self.layout));
        }
        words.join(" ")
    }
}

/// Bytes that tensors may take.
fn room(subject: &Subject) -> u64 {
    let besides = if subject.device == Device::Cpu { PROGRAM } else { DRIVER };
    subject.card.memory.saturating_sub(besides)
}

/// Settings in the order of what they change: what is shared, portions, the target's type, the mode, more cards.
fn nearest(subject: &Subject, room: u64) -> Option<(String, Held)> {
    let own = Setting::of(subject);
    let longest = subject.plan.data.max_length;
    let portions = (1..8).map(|p| 1 << p);
    let portions = portions.filter(|divisor| subject.plan.train.tokens_per_batch / divisor >= longest);
    let mut all: Vec<Setting> = Vec::new();
    if own.layout.data > 1 && own.layout.zero != 1 {
        all.push(Setting { layout: Layout { zero: 1, ..own.layout }, ..own });
    }
    all.extend(portions.map(|divisor| Setting { divisor, ..own }));
    let smallest = all.iter().map(|s| s.divisor).max().unwrap_or(1);
    let fp8 = own.mode == Mode::Online && subject.device != Device::Cpu && own.dtype != TargetDType::Fp8;
    let (dtype, mode) = (TargetDType::Fp8, Mode::Offline);
    if fp8 {
        all.extend([Setting { dtype, ..own }, Setting { dtype, divisor: smallest, ..own }]);
    }
    all.extend([Setting { mode, ..own }, Setting { mode, divisor: smallest, ..own }]);
    if subject.device != Device::Cpu {
        let more =
            [2, 4, 8].into_iter().flat_map(|n| of_ranks(own.layout.ranks() * n, subject.links.per_node));
        let possible = |layout: &Layout| expect_shared(&subject.plan, &subject.info, *layout).is_ok();
        all.extend(more.filter(possible).map(|layout| Setting { layout, divisor: smallest, ..own }));
    }
    all.into_iter().find_map(|setting| {
        let held = memory(subject, &setting);
        (total(&held) <= room).then(|| (setting.words(subject), held))
    })
}

/// What each rank holds at most.
fn memory(subject: &Subject, setting: &Setting) -> Held {
    let mut rows = subject.largest();
    let online = setting.mode != Mode::Offline;
    if setting.divisor > 1 {
        // Portions hold whole rows, the longest at least.
        let longest = subject.plan.data.max_length.min(rows.tokens);
        let tokens = (rows.tokens / setting.divisor).max(longest);
        rows.shrink(tokens as f64 / rows.tokens.max(1) as f64);
    }
    let case = Case {
        dims: &subject.dims,
        target: &subject.info,
        steps: subject.config.ttt_steps as u64,
        storage: subject.storage(),
        frozen: subject.frozen(setting.mode, setting.dtype),
        // One batch waits for the step, one for its place.
        ahead: 2,
        target_beside: online,
        layout: setting.layout,
    };
    peak(&case, &rows)
}

fn projection(subject: &Subject, layout: Layout, memory: Held) -> Projection {
    let Subject { plan, info, config, dims, card, work, .. } = subject;
    let epoch = work.rows();
    let micro_batches = work.batches.len().max(1);
    let accumulation = plan.train.accumulation.min(micro_batches);
    let steps_of_epoch = micro_batches.div_ceil(accumulation) as f64;
    let element = subject.storage().element;
    let online = plan.mode != Mode::Offline;
    // The same micro-batches on every rank; a step has as many more as there are data-parallel ranks.
    let seconds_of_epoch = card.seconds(draft_work(subject, &epoch))
        + card.moving(dims, config.ttt_steps, &epoch, element)
        + if online {
            card.seconds(target_work(subject, &epoch)) * fp8_factor(plan.target.dtype)
        } else {
            0.0
        };
    let launches = if subject.device == Device::Cpu { 0.0 } else { LAUNCHES * accumulation as f64 };
    let shared = seconds_of_epoch / steps_of_epoch / (layout.tensor * layout.sequence) as f64;
    let compute_seconds = shared.max(launches) + card.optimizer(dims, layout.tensor, layout.shards());
    let mut of_step = epoch.clone();
    of_step.shrink(1.0 / steps_of_epoch);
    let sizes = traffic::Sizes {
        dims,
        target: online.then_some(info),
        steps: config.ttt_steps,
        rows: &of_step,
        micro_batches: accumulation as f64,
        element: element as f64,
    };
    let traffic = traffic::of(&sizes, layout, &subject.links);
    let step = compute_seconds + traffic.data_seconds + traffic.waited_seconds;
    let steps = (work.steps as f64 / layout.data as f64).ceil();
    Projection {
        layout,
        memory_bytes: total(&memory),
        memory,
        compute_seconds,
        traffic,
        hides: traffic.data_seconds <= BACKWARD * compute_seconds / accumulation as f64,
        tokens_per_second: of_step.tokens as f64 * layout.data as f64 / step,
        steps: steps as u64,
        hours: steps * step / 3600.0,
    }
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
