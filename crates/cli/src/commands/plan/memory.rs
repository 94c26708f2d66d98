//! The memory of one rank in an EAGLE3 training step, by what the step takes and gives back: the same order as
//! `methods/src/eagle3.rs` and the backward of its operations. Nothing here is fitted; tests hold it against peaks that
//! were measured, and on a CPU against what the process took.

use specforge_methods::eagle3::Dims;
use specforge_models::TargetInfo;
use specforge_tensor::Device;

use super::layout::Layout;
use super::ledger::{Held, Kind, Ledger, Piece};
use crate::commands::bench::flops::Rows;

/// Captured layers.
const CAPTURED: u64 = 3;
/// Rows of logits that a device computes at once, in bytes.
const CUDA_CHUNK: u64 = 256 << 20;
const CPU_CHUNK: u64 = 16 << 20;
/// The MLP of a target goes in chunks of so many bytes of gate and up.
const MLP_CHUNK: u64 = 1 << 30;

/// What a CPU thread keeps for packing matrices, by the size of its second cache.
const PACKING: u64 = 5 << 19;

/// What the process takes on a CPU beside what is counted: pages of the program, 18 MiB, and what `specforge prepare`
/// adds to them at the most on the quick start (tokenizer, rows, stacks), 12 to 13. A target of a larger vocabulary has
/// a larger tokenizer; its tensors are larger still.
const PROGRAM: u64 = 30 << 20;

/// How a device stores things.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage {
    /// Bytes of an element of weights and activations.
    pub(super) element: u64,
    /// Bytes of an element of captured states.
    pub(super) feature: u64,
    /// Bytes of the logits of one chunk.
    chunk: u64,
    /// Whether everything lies in the host's memory.
    on_host: bool,
}

impl Storage {
    /// The device's own, with captured states of `feature` bytes.
    pub(super) fn of(device: Device, feature: u64) -> Self {
        match device {
            Device::Cpu => Self { element: 4, feature, chunk: CPU_CHUNK, on_host: true },
            _ => Self { element: 2, feature, chunk: CUDA_CHUNK, on_host: false },
        }
    }
}

/// What the target keeps in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Frozen {
    /// Only the rows of its head that the draft keeps.
    Rows,
    /// All of it; bytes of an element of its matrices, and of its embedding, head and norms.
    Whole { matrix: u64, table: u64 },
}

/// Everything that the memory of a step depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case<'a> {
    pub(super) dims: &'a Dims,
    pub(super) target: &'a TargetInfo,
    pub(super) steps: u64,
    pub(super) storage: Storage,
    /// Threads that compute on a CPU.
    pub(super) threads: u64,
    pub(super) frozen: Frozen,
    /// Batches whose features are in memory beside that of the step.
    pub(super) ahead: u64,
    /// Whether a rank has several micro-batches in a step.
    pub(super) accumulates: bool,
    /// Whether the target may run while the step does.
    pub(super) target_beside: bool,
    pub(super) layout: Layout,
}

/// Widths of what one rank computes, and its rows.
struct Step {
    h: u64,
    q: u64,
    kv: u64,
    heads: u64,
    i: u64,
    vd: u64,
    /// Rows of the whole batch, which every rank of a sequence fetches.
    batch: u64,
    t: u64,
    l: u64,
    r: u64,
    u: u64,
    e: u64,
}

/// Parameters of the draft that one rank holds: pieces that tensor-parallel ranks share, and what each has whole.
pub(super) fn parameters(dims: &Dims, tensor: u64) -> u64 {
    let [pieces, whole] = pieces_and_whole(dims, tensor);
    pieces + whole
}

/// As [`parameters`], one by one.
pub(super) fn pieces_and_whole(dims: &Dims, tensor: u64) -> [u64; 2] {
    let size = |shape: &[usize]| shape.iter().map(|&n| n as u64).product::<u64>();
    let shared =
        |name: &str, shape: &[usize]| name == "embed_tokens.weight" && shape[1] == dims.target_hidden_size;
    let mut sums = [0, 0];
    for (name, shape) in dims.weights().into_iter().filter(|(name, shape)| !shared(name, shape)) {
        match dims.pieces(&name, tensor as usize) {
            Some((_, pieces)) => sums[0] += size(&shape).div_ceil(pieces as u64),
            None => sums[1] += size(&shape),
        }
    }
    sums
}

/// Parameters of the target that one rank holds: matrices of layers; then embedding and head.
pub(super) fn target_parameters(info: &TargetInfo, tensor: u64) -> [u64; 2] {
    let [h, d, v] = [info.hidden_size, info.head_dim, info.vocab_size].map(|n| n as u64);
    let [n, g, i] = [info.n_heads, info.n_kv_heads, info.intermediate_size].map(|n| n as u64);
    // With fewer key-value heads than ranks each rank keeps one.
    let (q, kv, i) = (n * d / tensor, (g / tensor).max(1) * d, i.div_ceil(tensor));
    let layer = h * (q + 2 * kv) + q * h + 3 * h * i;
    let tables = if info.tie_word_embeddings { 1 } else { 2 };
    [info.n_layers as u64 * layer, tables * v.div_ceil(tensor) * h]
}

/// What one rank holds at most in a step over `rows`, which are those of the whole micro-batch.
pub(super) fn peak(case: &Case<'_>, rows: &Rows) -> Held {
    let (step, mut ledger) = (Step::new(case, rows), Ledger::default());
    standing(case, &mut ledger);
    features(case, &step, &mut ledger);
    let kept = forward(case, &step, &mut ledger);
    backward(case, &step, kept, &mut ledger);
    ledger.peak()
}

impl Step {
    fn new(case: &Case<'_>, rows: &Rows) -> Self {
        let (d, Layout { tensor, sequence, .. }) = (case.dims, case.layout);
        let share = |n: usize| (n as u64).div_ceil(sequence);
        let heads = (d.num_attention_heads as u64).div_ceil(tensor);
        let kv_heads = (d.num_key_value_heads as u64).div_ceil(tensor);
        Self {
            h: d.hidden_size as u64,
            q: heads * d.head_dim as u64,
            kv: kv_heads * d.head_dim as u64,
            heads,
            i: (d.intermediate_size as u64).div_ceil(tensor),
            vd: (d.draft_vocab_size as u64).div_ceil(tensor),
            batch: rows.tokens as u64,
            t: share(rows.tokens),
            l: share(rows.live),
            r: share(rows.loss),
            u: share(rows.teacher),
            e: case.storage.element,
        }
    }

    fn qkv(&self) -> u64 {
        self.q + 2 * self.kv
    }

    /// Width of what step `i` projects: queries alone at first.
    fn projected(&self, i: usize) -> u64 {
        if i == 0 { self.q } else { self.qkv() }
    }

    /// A matrix of the live rows.
    fn live(&self, width: u64) -> u64 {
        self.l * width * self.e
    }

    /// A matrix of all keys, which ranks of a sequence gather.
    fn keys(&self) -> u64 {
        self.batch * 2 * self.kv * self.e
    }

    /// A matrix of all rows.
    fn all(&self, width: u64) -> u64 {
        self.t * width * self.e
    }
}

/// Weights, optimizer and target.
fn standing(case: &Case<'_>, ledger: &mut Ledger) {
    let (e, layout) = (case.storage.element, case.layout);
    let n = parameters(case.dims, layout.tensor);
    // Whole while a step runs. Where the optimizer is spread each rank has a part of its own beside that, and of the
    // gradients if they are sent after every micro-batch and more of these follow.
    let (shards, zero) = (layout.shards(), layout.zero);
    let part = if zero > 0 { n.div_ceil(shards) } else { 0 };
    ledger.keep(Kind::Weights, e * (n + part));
    ledger.keep(Kind::Gradients, if zero > 1 && case.accumulates { 4 * part } else { 0 });
    // Moments, and the 16 bits that stored weights lack of float32.
    let remainder = if e == 2 { 2 } else { 0 };
    ledger.keep(Kind::Optimizer, (8 + remainder) * n.div_ceil(shards));
    if case.storage.on_host {
        ledger.keep(Kind::Program, PROGRAM);
    }
    let vd = case.dims.draft_vocab_size as u64;
    let (ht, tensor) = (case.target.hidden_size as u64, layout.tensor);
    ledger.keep(Kind::Target, e * vd.div_ceil(tensor) * ht);
    // The embedding stays on the host, unless the target's own serves the draft too.
    let own_table = if case.storage.on_host { e * case.target.vocab_size as u64 * ht } else { 0 };
    let is_whole = matches!(case.frozen, Frozen::Whole { .. });
    let serves = is_whole && (layout.target == 1 || layout.target == tensor);
    ledger.keep(Kind::Target, target(case) + if serves { 0 } else { own_table });
}

/// What of the target a rank has.
fn target(case: &Case<'_>) -> u64 {
    let [matrices, tables] = target_parameters(case.target, case.layout.target);
    match case.frozen {
        Frozen::Rows => 0,
        Frozen::Whole { matrix, table } => matrix * matrices + table * tables,
    }
}

/// What a rank holds at most that has the target and trains nothing: its part of it, features of one batch for each rank
/// that it serves and of the one that it computes, and the draft that it decodes with.
pub(super) fn target_peak(case: &Case<'_>, rows: &Rows) -> Held {
    let mut ledger = Ledger::default();
    let alone = Layout { tensor: 1, sequence: 1, ..case.layout };
    let case = Case { layout: alone, ahead: case.layout.peers(), target_beside: true, ..*case };
    ledger.keep(Kind::Target, target(&case));
    ledger.keep(Kind::Weights, case.storage.element * parameters(case.dims, 1));
    let head = case.dims.draft_vocab_size as u64 * case.target.hidden_size as u64;
    ledger.keep(Kind::Target, case.storage.element * head);
    features(&case, &Step::new(&case, rows), &mut ledger);
    ledger.peak()
}

/// The batch, those fetched ahead, and the target's own pass where it runs beside the step.
fn features(case: &Case<'_>, s: &Step, ledger: &mut Ledger) {
    let width = (CAPTURED + 1) * case.target.hidden_size as u64;
    ledger.keep(Kind::Features, (1 + case.ahead) * s.batch * width * case.storage.feature);
    if case.storage.on_host {
        ledger.keep(Kind::Buffers, PACKING * case.threads);
    }
    if !case.target_beside {
        return;
    }
    let (info, ranks, e) = (case.target, case.layout.target, s.e);
    let [h, i] = [info.hidden_size as u64, (info.intermediate_size as u64).div_ceil(ranks)];
    let vocab = (info.vocab_size as u64).div_ceil(ranks);
    // Captured states before they are rounded; residual stream and norm; gate, up and their product; or logits.
    let mlp = (s.t * 2 * i * e).min(MLP_CHUNK) * 3 / 2;
    let logits = case.storage.chunk.min(s.t * vocab * 4);
    ledger.keep(Kind::Buffers, s.t * h * e * (CAPTURED + 3) + mlp.max(logits));
}

/// What the forward leaves for the backward.
struct Kept {
    /// Of all rows, gone with the last operations.
    shared: Vec<Piece>,
    steps: Vec<KeptStep>,
    /// The gradient of the rows with loss, and those rows before their norm.
    d_rows: Piece,
    rows: Piece,
}

/// What one TTT step keeps: the state it starts from, projections, attention, state after it, normed, gate and up.
struct KeptStep {
    projected: [Piece; 2],
    attention: [Piece; 2],
    after: Piece,
    normed: Piece,
    gate_up: Piece,
    /// What it gives; the next one's start.
    out: Piece,
}

/// The steps, then head and loss.
fn forward(case: &Case<'_>, s: &Step, ledger: &mut Ledger) -> Kept {
    use Kind::Activations as A;
    // 1. Projected and normed states, the embedding and its half, step-0 keys and values, of all rows.
    let mut shared: Vec<Piece> = [3 * s.h, s.h, s.qkv()].map(|width| ledger.take(A, s.all(width))).into();
    let turned = ledger.take(A, s.all(2 * s.kv));
    shared.push(ledger.take(A, s.all(2 * s.kv)));
    ledger.give(turned);
    if s.batch > s.t {
        shared.push(ledger.take(A, s.keys()));
    }
    // 2. Live rows of them.
    let mut start = Some(ledger.take(A, s.live(s.h)));
    let mut n = ledger.take(A, s.live(s.h));
    let mut steps = Vec::new();
    for i in 0..case.steps as usize {
        let turned = ledger.take(A, s.live(s.projected(i)));
        let projections = ledger.take(A, s.live(s.projected(i)));
        ledger.give(turned);
        let attention = [ledger.take(A, s.live(s.q)), ledger.take(A, s.l * s.heads * 4)];
        let after = ledger.take(A, s.live(s.h));
        ledger.give_all(start.take());
        let normed = ledger.take(A, s.live(s.h));
        let gate_up = ledger.take(A, s.live(2 * s.i));
        let product = ledger.take(A, s.live(s.i));
        let out = ledger.take(A, s.live(s.h));
        ledger.give(product);
        steps.push(KeptStep { projected: [n, projections], attention, after, normed, gate_up, out });
        n = ledger.take(A, s.live(s.h));
    }
    // 3. Rows with loss, normed; the last norm is for nobody.
    let rows = ledger.take(A, s.r * s.h * s.e);
    ledger.give(n);
    let normed = ledger.take(A, s.r * s.h * s.e);
    ledger.keep(Kind::Gradients, gradient(s.vd * s.h));
    let d_rows = ledger.take(A, s.r * s.h * s.e);
    loss_chunk(case, s, ledger);
    ledger.give(normed);
    Kept { shared, steps, d_rows, rows }
}

/// Logits of one chunk, of the draft and of the teacher, and the teacher's rows.
fn loss_chunk(case: &Case<'_>, s: &Step, ledger: &mut Ledger) {
    let rows = (case.storage.chunk / (s.e * s.vd).max(1)).clamp(1, s.r.max(1));
    let teachers = rows.div_ceil(case.steps.max(1)).min(s.u);
    let read = if s.u < s.t { s.u * case.target.hidden_size as u64 * case.storage.feature } else { 0 };
    ledger.pass(Kind::Buffers, read + (rows + teachers) * s.vd * s.e);
}

/// Bytes of a gradient of so many elements.
fn gradient(elements: u64) -> u64 {
    4 * elements
}

/// From the last step to the first.
fn backward(case: &Case<'_>, s: &Step, kept: Kept, ledger: &mut Ledger) {
    use Kind::Activations as A;
    // 1. Through the last norm to the states of all steps.
    let d_collected = ledger.take(A, s.r * s.h * s.e);
    ledger.give_all([kept.d_rows, kept.rows]);
    let mut d_outs: Vec<Piece> = (0..case.steps).map(|_| ledger.take(A, s.live(s.h))).collect();
    ledger.give(d_collected);
    // 2. Step by step. What later steps leave: gradients of keys and values of the steps before, of the embedding half
    // (float32) and of the step-0 keys.
    let mut d_projected: Vec<Option<Piece>> = (0..case.steps).map(|_| None).collect();
    let mut first = true;
    let mut ends = Vec::new();
    for (i, step) in kept.steps.into_iter().enumerate().rev() {
        // The last state that nobody starts from was gone with the norm that nobody read.
        if first {
            ledger.give(step.out);
        } else {
            ends.push(step.out);
        }
        mlp_backward(s, first, [step.gate_up, step.normed, step.after], ledger);
        if first {
            ledger.keep(Kind::Gradients, gradient(s.h * s.q));
        }
        attention_backward(case, s, i, first, &mut d_projected, step.attention, ledger);
        // Through rotation and projections.
        if first {
            ledger.keep(A, s.t * s.qkv() * 4);
        }
        let d_linear = ledger.take(A, s.live(s.projected(i)));
        let [n, projections] = step.projected;
        ledger.give_all(d_projected[i].take().into_iter().chain([projections]));
        if first {
            ledger.keep(Kind::Gradients, gradient(s.qkv() * 2 * s.h));
        }
        let dn = ledger.take(A, s.live(s.h));
        ledger.give_all([d_linear, n]);
        ledger.give(dn);
        ledger.give_all(ends.pop());
        if i > 0 {
            ledger.give_all(d_outs.pop());
        }
        first = false;
    }
    // 3. The states of all rows, and fc.
    ledger.keep(A, 2 * s.all(s.h));
    ledger.keep(Kind::Gradients, gradient(CAPTURED * s.h * case.target.hidden_size as u64));
    ledger.give_all(kept.shared);
    ledger.give_all(d_outs);
}

/// The MLP of one step: the widest activation again, its gradient and that of gate and up.
fn mlp_backward(s: &Step, first: bool, [gate_up, normed, after]: [Piece; 3], ledger: &mut Ledger) {
    use Kind::Activations as A;
    let d_product = ledger.take(A, s.live(s.i));
    let [d_gate_up, product] = [2 * s.i, s.i].map(|width| ledger.take(A, s.live(width)));
    if first {
        ledger.keep(Kind::Gradients, gradient(s.h * s.i));
    }
    ledger.give_all([d_product, product, gate_up]);
    if first {
        ledger.keep(Kind::Gradients, gradient(2 * s.i * s.h));
    }
    let d_normed = ledger.take(A, s.live(s.h));
    ledger.give_all([d_gate_up, normed, d_normed, after]);
}

/// The attention of step `i`: gradients of its queries, of all step-0 keys, and of its own keys of every step.
fn attention_backward(
    case: &Case<'_>,
    s: &Step,
    i: usize,
    first: bool,
    d_projected: &mut [Option<Piece>],
    attention: [Piece; 2],
    ledger: &mut Ledger,
) {
    use Kind::Activations as A;
    let d_out = ledger.take(A, s.live(s.q));
    let dq = ledger.take(A, s.live(s.q));
    let d_base = ledger.take(A, s.keys());
    let scratch = ledger.take(Kind::Buffers, attention_scratch(case, s, i as u64));
    let d_extras: Vec<Piece> = (0..i).map(|_| ledger.take(A, s.live(2 * s.kv))).collect();
    for (j, d) in d_projected.iter_mut().enumerate().take(i + 1) {
        if d.is_none() && (j > 0 || i == 0) {
            *d = Some(ledger.take(A, s.live(s.projected(j))));
        }
    }
    if first {
        ledger.keep(A, s.keys());
    }
    ledger.give_all(d_extras.into_iter().chain(attention).chain([dq, d_base, scratch, d_out]));
}

/// What the kernels of an attention's backward take beside their results.
fn attention_scratch(case: &Case<'_>, s: &Step, i: u64) -> u64 {
    if !case.storage.on_host {
        return s.l * s.heads * 4 * (2 + i.max(1));
    }
    // Columns that are read, as matrices of their own; then each head's part of every gradient.
    let read = s.live(s.q + 2 * s.kv * i) + s.all(2 * s.kv);
    read + s.live(s.q + 2 * s.q * i) + s.all(2 * s.kv)
}

#[cfg(test)]
mod tests;
