//! EAGLE3 (Li et al., 2025, arXiv 2503.01840) and EAGLE3.1: a one-layer draft over three captured layers of the
//! target, trained on its own outputs for several steps (test-time training, TTT).
//!
//! Shape legend: T packed tokens, L live rows (rows that some loss depends on), R rows with loss over all steps,
//! H draft width, Ht target width, A captured layers, V target vocabulary, Vd draft vocabulary.
//!
//! At TTT step i, row p reads token p+1+i and its own state of the step before (step 0: the target's states of
//! token p), sits at position p+i, attends to the step-0 keys of rows up to p and to its own keys of steps 1..i,
//! and is compared with the target's distribution at token p+1+i, which predicts token p+2+i.

mod config;
mod dims;
mod drafter;
mod plan;
mod reach;
mod shares;
mod slice;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use specforge_models::{Capture, TargetInfo};
use specforge_nn::init;
use specforge_nn::rope::RopeTables;
use specforge_tensor::{
    AttentionShape, Collected, LossFigures, LossRanks, ParamId, Params, Part, Rope, SoftTargetLoss, Tape,
    Tensor, Var, Weight,
};

pub use self::config::{Config, LossMask, Normalization, ObjectiveName};
pub use self::dims::Dims;
use self::dims::N_CAPTURED;
use self::plan::{At, Plan};
use self::reach::Reach;
use crate::{
    Batch, Counts, DraftMethod, Drafter, Error, Frozen, Loss, Metric, PendingLoss, Ranks, Ratio, Result,
    Sequence, Teacher, VocabMap,
};

/// The method's name.
pub const NAME: &str = "eagle3";

/// The draft's modules, by checkpoint name; those that read the same input side by side.
#[derive(Debug)]
struct Modules {
    embed_tokens: ParamId,
    fc: Weight,
    fc_norm: Vec<ParamId>,
    input_layernorm: ParamId,
    hidden_norm: ParamId,
    q_proj: Weight,
    kv_proj: Weight,
    qkv_proj: Weight,
    o_proj: Weight,
    post_attention_layernorm: ParamId,
    gate_up_proj: Weight,
    down_proj: Weight,
    norm: ParamId,
    lm_head: ParamId,
}

impl Modules {
    fn find(params: &Params, dims: &Dims, ranks: &Ranks) -> Result<Self> {
        let shared = ranks.tensor();
        let id = |name: &str| {
            let reason = "missing".to_owned();
            params.find(name).ok_or(Error::Weight { name: name.to_owned(), reason })
        };
        let weight = |name: &str| id(name).map(Weight::of);
        let fc_norm = if dims.fc_norm { 0..N_CAPTURED } else { 0..0 };
        let attention = |name: &str| weight(&format!("midlayer.self_attn.{name}.weight"));
        let outputs = |weight: Result<Weight>| weight.map(|weight| weight.sharing_outputs(shared));
        let [q_proj, k_proj, v_proj] = ["q_proj", "k_proj", "v_proj"].map(|name| outputs(attention(name)));
        let (q_proj, k_proj, v_proj) = (q_proj?, k_proj?, v_proj?);
        let [gate, up] =
            ["gate", "up"].map(|name| outputs(weight(&format!("midlayer.mlp.{name}_proj.weight"))));
        let (gate, up) = (gate?, up?);
        Ok(Self {
            embed_tokens: id("embed_tokens.weight")?,
            fc: weight("fc.weight")?,
            fc_norm: fc_norm.map(|a| id(&format!("fc_norm.{a}.weight"))).collect::<Result<_>>()?,
            input_layernorm: id("midlayer.input_layernorm.weight")?,
            hidden_norm: id("midlayer.hidden_norm.weight")?,
            kv_proj: Weight::stacked(&[&k_proj, &v_proj]),
            qkv_proj: Weight::stacked(&[&q_proj, &k_proj, &v_proj]),
            q_proj,
            o_proj: attention("o_proj")?.sharing_inputs(shared),
            post_attention_layernorm: id("midlayer.post_attention_layernorm.weight")?,
            gate_up_proj: Weight::stacked(&[&gate, &up]),
            down_proj: weight("midlayer.mlp.down_proj.weight")?.sharing_inputs(shared),
            norm: id("norm.weight")?,
            lm_head: id("lm_head.weight")?,
        })
    }
}

/// The method: configuration, shapes, and the frozen tensors it reads. Trained weights are in a [`Params`].
#[derive(Debug)]
pub struct Eagle3 {
    config: Config,
    dims: Dims,
    capture: Capture,
    vocab: VocabMap,
    modules: Modules,
    ranks: Ranks,
    /// The rows of the target's head that the draft vocabulary keeps, `[Vd, Ht]`; this rank's where it is shared.
    teacher_head: Tensor,
    rope: RopeTables,
    /// Whether the head reads the normed state. Always, but for one of SpecForge's reference cases.
    head_norm: bool,
    /// Whether rows without loss are computed too. Never, but in the test that compares the two.
    all_rows_live: bool,
}

impl Eagle3 {
    /// Builds the draft for a target, with fresh weights drawn from `seed`.
    pub fn new(
        config: &Config,
        target: &TargetInfo,
        frozen: &Frozen,
        vocab: VocabMap,
        seed: u64,
    ) -> Result<(Self, Params)> {
        Self::new_on(&Ranks::default(), config, target, frozen, vocab, seed)
    }

    /// As [`Eagle3::new`], for one of several ranks: the same weights, of which it holds its pieces.
    pub fn new_on(
        ranks: &Ranks,
        config: &Config,
        target: &TargetInfo,
        frozen: &Frozen,
        vocab: VocabMap,
        seed: u64,
    ) -> Result<(Self, Params)> {
        let device = frozen.head.device();
        let draw = |name: &str, shape: &[usize]| {
            Ok(init::normal(device, shape, config.initializer_range, seed, name)?)
        };
        Self::drawn(ranks, config, target, frozen, vocab, draw)
    }

    /// Fails where so many ranks cannot share the work on a draft for this target.
    pub fn check_shared(config: &Config, target: &TargetInfo, ranks: Counts) -> Result<()> {
        let draft_vocab_size =
            config.draft_vocab_size.map_or(target.vocab_size, |n| n.min(target.vocab_size));
        shares::check(&Dims::resolve(config, target, draft_vocab_size)?, ranks)
    }

    /// As [`Eagle3::new_on`], with matrices that `draw` makes whole from name and shape: for measuring, on the device
    /// itself.
    pub fn drawn(
        ranks: &Ranks,
        config: &Config,
        target: &TargetInfo,
        frozen: &Frozen,
        vocab: VocabMap,
        draw: impl Fn(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<(Self, Params)> {
        let dims = Dims::resolve(config, target, vocab.len())?;
        shares::check(&dims, ranks.counts())?;
        let device = frozen.head.device();
        let mut params = Params::new();
        for (name, shape) in dims.weights() {
            let shared_table = shares::table_split(frozen, &shape, ranks);
            if name == "embed_tokens.weight" && (frozen.embedding.shape() == shape || shared_table.is_some())
            {
                let id = params.add(name, frozen.embedding.clone(), false);
                params.get_mut(id).split = shared_table;
            } else if name.ends_with("norm.weight") || name.starts_with("fc_norm") {
                params.add(name, init::constant(device, &shape, 1.0)?, true);
            } else {
                let split = ranks.tensor().and_then(|ranks| shares::split_of(&name, &dims, ranks));
                let whole = draw(&name, &shape)?;
                let value = split.map_or(Ok(whole.clone()), |split| split.cut(&whole))?;
                let id = params.add(name, value, true);
                params.get_mut(id).split = split;
            }
        }
        let method = Self::over_on(ranks, config, dims, config.capture(target)?, frozen, vocab, &params)?;
        for together in [&method.modules.qkv_proj, &method.modules.gate_up_proj] {
            params.stack(together.params())?;
        }
        Ok((method, params))
    }

    /// The method over weights that are already declared in `params` by their checkpoint names.
    pub fn over(
        config: &Config,
        dims: Dims,
        capture: Capture,
        frozen: &Frozen,
        vocab: VocabMap,
        params: &Params,
    ) -> Result<Self> {
        Self::over_on(&Ranks::default(), config, dims, capture, frozen, vocab, params)
    }

    /// As [`Eagle3::over`], for one of several ranks that share the work on a batch: `params` holds its pieces.
    pub fn over_on(
        ranks: &Ranks,
        config: &Config,
        dims: Dims,
        capture: Capture,
        frozen: &Frozen,
        vocab: VocabMap,
        params: &Params,
    ) -> Result<Self> {
        config.check()?;
        shares::check(&dims, ranks.counts())?;
        let rope = RopeTables::new(dims.rope.clone(), frozen.head.device());
        let modules = Modules::find(params, &dims, ranks)?;
        let teacher_head = shares::teacher_head(frozen, &vocab, &dims, ranks)?;
        Ok(Self {
            config: config.clone(),
            dims,
            capture,
            vocab,
            modules,
            ranks: ranks.clone(),
            teacher_head,
            rope,
            head_norm: true,
            all_rows_live: false,
        })
    }

    fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            n_heads: self.n_heads(),
            n_kv_heads: self.n_kv_heads(),
            head_dim: self.dims.head_dim,
            scale: (self.dims.head_dim as f32).powf(-0.5),
        }
    }

    /// Query heads of this rank.
    fn n_heads(&self) -> usize {
        self.dims.num_attention_heads / self.ranks.tensor().map_or(1, |ranks| ranks.size())
    }

    /// Key-value heads of this rank, at least one.
    fn n_kv_heads(&self) -> usize {
        (self.dims.num_key_value_heads / self.ranks.tensor().map_or(1, |ranks| ranks.size())).max(1)
    }

    fn eps(&self) -> f32 {
        self.dims.rms_norm_eps as f32
    }

    /// The captured states to the draft's width: `g = fc(a)`, each `a` normed first in EAGLE3.1. `[T, H]`.
    fn project(&self, tape: &Tape<'_>, hidden_states: &Var) -> Result<Var> {
        let m = &self.modules;
        if m.fc_norm.is_empty() {
            return Ok(tape.linear(hidden_states, &m.fc)?);
        }
        let mut sum: Option<Var> = None;
        for (a, &norm) in m.fc_norm.iter().enumerate() {
            let cols = a * self.dims.target_hidden_size..(a + 1) * self.dims.target_hidden_size;
            let state = tape.columns(hidden_states, cols.clone())?;
            let part = tape.linear(&tape.rms_norm(&state, norm, self.eps())?, &m.fc.columns(cols))?;
            sum = Some(match sum {
                Some(sum) => tape.add(&sum, &part)?,
                None => part,
            });
        }
        Ok(sum.expect("a draft has captured layers"))
    }

    /// The embedding half of q, k and v for every token, `[T, ..]`: the same at every step but for the row read.
    fn embedding_half(&self, tape: &Tape<'_>, input_ids: &Tensor) -> Result<Var> {
        let m = &self.modules;
        let shared = self.ranks.tensor().filter(|_| tape.params().get(m.embed_tokens).split.is_some());
        let e = tape.embedding_shared(m.embed_tokens, input_ids, shared)?;
        let e = tape.rms_norm(&e, m.input_layernorm, self.eps())?;
        Ok(tape.linear(&e, &m.qkv_proj.columns(0..self.dims.hidden_size))?)
    }

    /// Queries, keys and values that `w` projects from normed states `n`: the hidden half, plus the embedding half of
    /// row `at.token` (in `half` from column `first` on), their first `n_heads` heads rotated.
    fn attend(
        &self,
        tape: &Tape<'_>,
        (n, half): (&Var, &Var),
        (w, first, n_heads): (&Weight, usize, usize),
        at: &At,
    ) -> Result<Var> {
        let (h, (cos, sin)) = (self.dims.hidden_size, self.rope.up_to(at.end));
        let rope = Rope { n_heads, head_dim: self.dims.head_dim, cos, sin, positions: at.position.clone() };
        let x = tape.linear(n, &w.columns(h..2 * h))?;
        Ok(tape.rope_added(&x, &rope, &Part::new(half, first), &at.token)?)
    }

    /// Queries alone, `[R, N·D]`.
    fn queries(&self, tape: &Tape<'_>, states: (&Var, &Var), at: &At) -> Result<Var> {
        self.attend(tape, states, (&self.modules.q_proj, 0, self.n_heads()), at)
    }

    /// Keys, then values, `[R, 2·G·D]`.
    fn keys_values(&self, tape: &Tape<'_>, states: (&Var, &Var), at: &At) -> Result<Var> {
        let what = (&self.modules.kv_proj, self.query_width(), self.n_kv_heads());
        self.attend(tape, states, what, at)
    }

    /// Queries, keys, values, `[R, (N + 2·G)·D]`.
    fn queries_keys_values(&self, tape: &Tape<'_>, states: (&Var, &Var), at: &At) -> Result<Var> {
        let n_heads = self.n_heads() + self.n_kv_heads();
        self.attend(tape, states, (&self.modules.qkv_proj, 0, n_heads), at)
    }

    fn query_width(&self) -> usize {
        self.n_heads() * self.dims.head_dim
    }

    /// The rest of the layer for states `h` whose attention is `a`: both residual branches.
    fn finish_layer(&self, tape: &Tape<'_>, h: &Var, a: &Var) -> Result<Var> {
        let m = &self.modules;
        let h = tape.linear_add(a, &m.o_proj, h)?;
        let n = tape.rms_norm(&h, m.post_attention_layernorm, self.eps())?;
        let gate_up = tape.linear(&n, &m.gate_up_proj)?;
        Ok(tape.swiglu_linear_add(&gate_up, &m.down_proj, &h)?)
    }

    /// All TTT steps; returns the states that the head reads for the rows with loss, in the order of `plan.rows`.
    fn unroll(&self, tape: &Tape<'_>, batch: &Batch, plan: &Plan) -> Result<Var> {
        let m = &self.modules;
        let device = batch.hidden_states.device();
        // 1. Everything that all rows share: projected states, the embedding half, step-0 keys and values. Only attention
        // reaches beyond this rank's slice of the rows.
        let g = self.project(tape, &plan.slice.hidden_states(tape, batch)?)?;
        let half = self.embedding_half(tape, &Tensor::from_u32(device, plan.slice.tokens(batch)))?;
        let n = tape.rms_norm(&g, m.hidden_norm, self.eps())?;
        let reach = Reach::new(plan, self.attention_shape(), self.ranks.sequence(), device);
        let base = self.keys_values(tape, (&n, &half), &plan.all_rows(batch, device))?;
        let base = reach.base(tape, &base)?;
        // 2. From here on only live rows.
        let live = plan.live_in_slice(device);
        let (mut h, mut n) = (tape.gather_rows(&g, &live)?, tape.gather_rows(&n, &live)?);
        let (mut extras, mut states) = (Vec::new(), Vec::new());
        for step in 0..self.config.ttt_steps {
            let at = plan.live_rows(batch, step, device);
            let q = if step == 0 {
                self.queries(tape, (&n, &half), &at)?
            } else {
                let qkv = self.queries_keys_values(tape, (&n, &half), &at)?;
                extras.push((reach.extra(tape, &qkv, self.query_width())?, None));
                qkv
            };
            let a = reach.attention(tape, &q, &base, &extras)?;
            // 3. This step's output: to the head, and to the next step.
            let out = self.finish_layer(tape, &h, &a)?;
            let normed = if self.dims.norm_output { tape.rms_norm(&out, m.norm, self.eps())? } else { out };
            let [from, to] = plan.places(step).map(|rows| Tensor::from_u32(device, rows));
            states.push(Collected { source: normed.clone(), from, to });
            h = normed;
            n = tape.rms_norm(&h, m.hidden_norm, self.eps())?;
        }
        // 4. Only rows with loss go on; ordered by teacher row, so that each teacher row is computed once.
        let x = tape.collect_rows(states, plan.rows.teacher_row.len())?;
        if self.dims.norm_output || !self.head_norm {
            return Ok(x);
        }
        Ok(tape.rms_norm(&x, m.norm, self.eps())?)
    }

    /// The teacher over the draft vocabulary, and what is known of the whole one.
    fn teacher(&self, teacher: &Teacher) -> Result<TeacherParts> {
        match teacher {
            Teacher::LastHidden { hidden, argmax, logsumexp } => {
                let (rows, argmax) = (hidden.clone(), argmax.clone());
                Ok(TeacherParts { rows, are_logits: false, argmax, logsumexp: logsumexp.clone() })
            }
            Teacher::Logits(logits) => {
                let stats = Tape::logit_stats(logits)?;
                let argmax = stats.argmax.to_u32();
                let rows = self.kept_columns(logits)?;
                Ok(TeacherParts { rows, are_logits: true, argmax, logsumexp: stats.logsumexp })
            }
        }
    }

    /// The logits of the draft vocabulary: `[T, V]` to `[T, Vd]`.
    fn kept_columns(&self, logits: &Tensor) -> Result<Tensor> {
        let ((t, v), values) = (logits.rows_cols(), logits.f32s());
        // This rank's piece of the draft vocabulary.
        let n = self.teacher_head.rows_cols().0;
        let first = self.ranks.tensor().map_or(0, |ranks| ranks.rank() * n);
        let ids = &self.vocab.target_ids()[first..first + n];
        let row = |r: usize| ids.iter().map(move |&id| r * v + id as usize);
        let kept = (0..t).flat_map(row).map(|i| values[i]).collect();
        Ok(Tensor::from_f32(logits.device(), kept, &[t, n])?)
    }
}

/// The teacher of a batch: its last hidden states, or its logits over the draft vocabulary.
struct TeacherParts {
    rows: Tensor,
    are_logits: bool,
    argmax: Vec<u32>,
    logsumexp: Tensor,
}

impl DraftMethod for Eagle3 {
    fn capture(&self) -> &Capture {
        &self.capture
    }

    fn vocab(&self) -> &VocabMap {
        &self.vocab
    }

    fn loss(&self, tape: &Tape<'_>, batch: &Batch) -> Result<PendingLoss> {
        // 1. What the batch is, and which rows matter.
        batch.check(N_CAPTURED * self.dims.target_hidden_size)?;
        let longest = batch.positions.iter().max().map_or(0, |&p| p as usize + 1);
        if longest > self.dims.max_position_embeddings {
            let limit = self.dims.max_position_embeddings;
            return Err(Error::Batch(format!(
                "position {} is beyond max_position_embeddings {limit}",
                longest - 1
            )));
        }
        let teacher = self.teacher(&batch.teacher)?;
        let plan = Plan::new(self, batch, &teacher.argmax);
        let plan = match self.ranks.sequence() {
            Some(Sequence { ranks, exchange }) => {
                plan.share((ranks.rank(), ranks.size()), *exchange, self.config.ttt_steps)
            }
            None => plan,
        };
        // 2. The steps.
        let x = self.unroll(tape, batch, &plan)?;
        // 3. Head and loss, fused.
        let group_weight: Vec<f64> =
            (0..self.config.ttt_steps).map(|i| self.config.step_decay.powi(i as i32)).collect();
        let soft_teacher = if teacher.are_logits {
            specforge_tensor::Teacher::Logits(&teacher.rows)
        } else {
            specforge_tensor::Teacher::Hidden { hidden: &teacher.rows, head: &self.teacher_head }
        };
        let loss = SoftTargetLoss {
            x: &x,
            head: self.modules.lm_head,
            teacher: soft_teacher,
            logsumexp: &teacher.logsumexp,
            rows: &plan.rows,
            objective: self.config.objective(),
            group_weight: &group_weight,
        };
        let rows = self.ranks.sequence().map(|sequence| &sequence.ranks);
        let ranks = LossRanks { heads: self.ranks.tensor(), rows };
        let stats = tape.soft_target_loss_shared(&loss, ranks)?;
        // 4. Figures, when they are there.
        let (weight, target_ids) = (plan.rows.total_weight, self.vocab.target_ids().to_vec());
        let loss = stats.map(move |figures| report(&plan, &figures, &target_ids, &group_weight));
        Ok(PendingLoss { weight, loss })
    }

    fn drafter<'a>(&'a self, params: &'a Params) -> Result<Box<dyn Drafter + 'a>> {
        Ok(Box::new(drafter::Eagle3Drafter::new(self, params)?))
    }

    fn export_config(&self) -> BTreeMap<String, serde_json::Value> {
        let d = &self.dims;
        let numbers = [
            ("hidden_size", d.hidden_size),
            ("intermediate_size", d.intermediate_size),
            ("num_attention_heads", d.num_attention_heads),
            ("num_key_value_heads", d.num_key_value_heads),
            ("head_dim", d.head_dim),
            ("vocab_size", d.vocab_size),
            ("draft_vocab_size", d.draft_vocab_size),
            ("target_hidden_size", d.target_hidden_size),
            ("max_position_embeddings", d.max_position_embeddings),
        ];
        let mut config: BTreeMap<String, serde_json::Value> =
            numbers.into_iter().map(|(key, n)| (key.to_owned(), n.into())).collect();
        config.insert("rms_norm_eps".to_owned(), d.rms_norm_eps.into());
        config.insert("fc_norm".to_owned(), d.fc_norm.into());
        config.insert("norm_output".to_owned(), d.norm_output.into());
        config
    }
}

/// The loss and its figures per TTT step.
fn report(plan: &Plan, figures: &LossFigures, target_ids: &[u32], group_weight: &[f64]) -> Loss {
    let (groups, weight) = (&figures.groups, plan.weight);
    let mut correct = vec![0.0; groups.len()];
    for ((&group, &draft), &best) in plan.rows.group.iter().zip(&figures.argmax).zip(&plan.best) {
        correct[group as usize] += f64::from(u8::from(target_ids[draft as usize] == best));
    }
    let metric = |name, value: &dyn Fn(usize) -> Ratio| Metric {
        name,
        values: (0..groups.len()).map(value).collect(),
    };
    let objective = groups.iter().zip(group_weight).map(|(g, w)| g.loss * w).sum();
    Loss {
        objective: Ratio { sum: objective, weight },
        metrics: vec![
            metric("loss", &|i| Ratio { sum: groups[i].loss, weight }),
            metric("accuracy", &|i| Ratio { sum: correct[i], weight: plan.supervised[i] }),
            metric("acceptance", &|i| Ratio { sum: groups[i].acceptance, weight: groups[i].count }),
        ],
    }
}
