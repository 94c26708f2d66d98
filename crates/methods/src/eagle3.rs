//! EAGLE3 (Li et al., 2025, arXiv 2503.01840) and EAGLE3.1: a one-layer draft over three captured layers of the
//! target, trained on its own outputs for several steps (test-time training, TTT).
//!
//! Shape legend: T packed tokens, L live rows (rows that some loss depends on), R rows with loss over all steps,
//! H draft width, Ht target width, A captured layers, V target vocabulary, Vd draft vocabulary.
//!
//! At TTT step i, row p reads token p+1+i and its own state of the step before (step 0: the target's states of
//! token p), sits at position p+i, attends to the step-0 keys of rows up to p and to its own keys of steps 1..i,
//! and is compared with the target's distribution at token p+1+i, which predicts token p+2+i.

mod drafter;
mod plan;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use specforge_models::{Capture, TargetInfo};
use specforge_nn::init;
use specforge_nn::rope::{RopeConfig, RopeTables, whole_heads};
use specforge_tensor::{
    Attention, AttentionShape, Collected, KeyValue, LossFigures, Objective, ParamId, Params, Part, Rope,
    SoftTargetLoss, Tape, Tensor, Var, Weight,
};

use self::plan::{At, Plan};
use crate::{
    Batch, DraftMethod, Drafter, Error, Frozen, Loss, Metric, PendingLoss, Ratio, Result, Teacher, VocabMap,
};

/// The method's name.
pub const NAME: &str = "eagle3";

/// The `[method.eagle3]` table of a recipe. Sizes left out follow the target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Test-time-training steps: how many tokens ahead the draft learns to run on its own outputs.
    pub ttt_steps: usize,
    /// Weight of step i: `step-decay^i`.
    pub step_decay: f64,
    /// What is minimised: `kl`, `lk-alpha` or `lk-lambda`.
    pub objective: ObjectiveName,
    /// `lk-lambda`: factor of the KL weight.
    pub kl_scale: f64,
    /// `lk-lambda`: how fast the KL weight falls as acceptance rises.
    pub kl_decay: f64,
    /// Which rows carry loss: `aligned` (rows whose input token is supervised, as at serving) or `specforge`
    /// (shifted back by one token, as SpecForge and the authors' code have it).
    pub loss_mask: LossMask,
    /// What a row's loss is divided by: `sequence` (all tokens of its document, so each document counts equally, as
    /// SpecForge has it for one document a batch) or `supervised` (all supervised tokens count equally).
    pub normalization: Normalization,
    /// Tokens the draft's head can name; absent or the target's size: all of them.
    pub draft_vocab_size: Option<usize>,
    /// Width H; absent: the target's. A draft of another width cannot share the target's embedding and trains its own.
    pub hidden_size: Option<usize>,
    /// Width of the MLP; absent: the target's.
    pub intermediate_size: Option<usize>,
    /// Query heads; absent: the target's.
    pub num_attention_heads: Option<usize>,
    /// Key-value heads; absent: the target's.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; absent: the target's.
    pub head_dim: Option<usize>,
    /// Layers whose outputs are captured (0-based, ascending); absent: `[1, n/2-1, n-4]`.
    pub capture_layers: Option<Vec<usize>>,
    /// EAGLE3.1: norm every captured state before `fc`.
    pub fc_norm: bool,
    /// EAGLE3.1: feed the normed state to the next step.
    pub norm_output: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
}

/// Names of the objectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectiveName {
    /// Cross-entropy against the target's distribution.
    Kl,
    /// Minus the log of the acceptance probability.
    LkAlpha,
    /// KL and acceptance, weighed by how high the acceptance is.
    LkLambda,
}

/// Which rows carry loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossMask {
    /// The row's input token is supervised.
    Aligned,
    /// The token before it is.
    Specforge,
}

/// What a row's loss is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalization {
    /// All tokens of its document.
    Sequence,
    /// All supervised tokens.
    Supervised,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ttt_steps: 7,
            step_decay: 0.8,
            objective: ObjectiveName::Kl,
            kl_scale: 1.0,
            kl_decay: 1.0,
            loss_mask: LossMask::Aligned,
            normalization: Normalization::Sequence,
            draft_vocab_size: None,
            hidden_size: None,
            intermediate_size: None,
            num_attention_heads: None,
            num_key_value_heads: None,
            head_dim: None,
            capture_layers: None,
            fc_norm: false,
            norm_output: false,
            initializer_range: 0.02,
        }
    }
}

impl Config {
    /// What to record from the target: the layers, and the last hidden state as the teacher.
    pub fn capture(&self, target: &TargetInfo) -> Result<Capture> {
        let Some(layers) = &self.capture_layers else { return Ok(Capture::eagle3_default(target.n_layers)?) };
        // The last layer's output is never captured by serving engines (sglang-contract: capture at layer entry).
        let ascending = layers.windows(2).all(|w| w[0] < w[1]);
        if layers.len() != 3 || !ascending || layers[2] + 1 >= target.n_layers {
            let reason =
                format!("expected three ascending layers below {}", target.n_layers.saturating_sub(1));
            return Err(config_error("capture-layers", format!("{layers:?}"), reason));
        }
        Ok(Capture { layers: layers.clone(), last_hidden: true })
    }

    fn objective(&self) -> Objective {
        match self.objective {
            ObjectiveName::Kl => Objective::Kl,
            ObjectiveName::LkAlpha => Objective::LkAlpha,
            ObjectiveName::LkLambda => {
                Objective::LkLambda { kl_scale: self.kl_scale, kl_decay: self.kl_decay }
            }
        }
    }

    /// Refuses values that no target could make right.
    pub fn check(&self) -> Result<()> {
        let fail = |key, got: String, why: &str| Err(config_error(key, got, format!("expected {why}")));
        if !(1..=32).contains(&self.ttt_steps) {
            return fail("ttt-steps", self.ttt_steps.to_string(), "1 to 32");
        }
        if !(self.step_decay > 0.0 && self.step_decay <= 1.0) {
            return fail("step-decay", self.step_decay.to_string(), "above 0 and at most 1");
        }
        let scales = [
            ("kl-scale", self.kl_scale),
            ("kl-decay", self.kl_decay),
            ("initializer-range", self.initializer_range),
        ];
        if let Some((key, got)) = scales.into_iter().find(|(_, v)| !(*v >= 0.0 && v.is_finite())) {
            return fail(key, got.to_string(), "0 or above");
        }
        let sizes = [
            ("draft-vocab-size", self.draft_vocab_size),
            ("hidden-size", self.hidden_size),
            ("intermediate-size", self.intermediate_size),
            ("num-attention-heads", self.num_attention_heads),
            ("num-key-value-heads", self.num_key_value_heads),
            ("head-dim", self.head_dim),
        ];
        match sizes.into_iter().find(|(_, size)| *size == Some(0)) {
            Some((key, _)) => fail(key, "0".to_owned(), "1 or more; leave it out to follow the target"),
            None => Ok(()),
        }
    }
}

fn config_error(key: &str, got: String, reason: String) -> Error {
    Error::Config { method: NAME, key: key.to_owned(), got, reason }
}

/// The draft's shape: the keys of its `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Dims {
    /// H.
    pub hidden_size: usize,
    /// Ht.
    pub target_hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// V.
    pub vocab_size: usize,
    /// Vd.
    pub draft_vocab_size: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Positions the tables cover.
    pub max_position_embeddings: usize,
    /// EAGLE3.1: norm every captured state before `fc`.
    pub fc_norm: bool,
    /// EAGLE3.1: feed the normed state to the next step.
    pub norm_output: bool,
}

/// Captured layers of an EAGLE3 draft.
const N_CAPTURED: usize = 3;

impl Dims {
    fn resolve(config: &Config, target: &TargetInfo, draft_vocab_size: usize) -> Result<Self> {
        let dims = Self {
            hidden_size: config.hidden_size.unwrap_or(target.hidden_size),
            target_hidden_size: target.hidden_size,
            intermediate_size: config.intermediate_size.unwrap_or(target.intermediate_size),
            num_attention_heads: config.num_attention_heads.unwrap_or(target.n_heads),
            num_key_value_heads: config.num_key_value_heads.unwrap_or(target.n_kv_heads),
            head_dim: config.head_dim.unwrap_or(target.head_dim),
            vocab_size: target.vocab_size,
            draft_vocab_size,
            rms_norm_eps: target.rms_norm_eps,
            rope: RopeConfig::from_json(
                &whole_heads(&target.raw),
                config.head_dim.unwrap_or(target.head_dim),
            )?,
            max_position_embeddings: target.max_position_embeddings,
            fc_norm: config.fc_norm,
            norm_output: config.norm_output,
        };
        dims.check_heads()?;
        Ok(dims)
    }

    fn check_heads(&self) -> Result<()> {
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if kv == 0 || !heads.is_multiple_of(kv) {
            let reason = format!("expected a divisor of the {heads} attention heads");
            return Err(config_error("num-key-value-heads", kv.to_string(), reason));
        }
        Ok(())
    }

    /// From an exported `config.json`. Keys it may leave out: `head_dim`, `draft_vocab_size`, `target_hidden_size`.
    pub fn from_json(config: &serde_json::Value) -> Result<Self> {
        let optional = |key: &str| config[key].as_u64().map(|n| n as usize);
        let required = |key: &str| {
            let reason = format!("expected a positive number, got {}", config[key]);
            optional(key).filter(|&n| n > 0).ok_or(Error::DraftConfig { key: key.to_owned(), reason })
        };
        let (hidden_size, heads) = (required("hidden_size")?, required("num_attention_heads")?);
        let vocab_size = required("vocab_size")?;
        let head_dim = optional("head_dim").unwrap_or(hidden_size / heads);
        let dims = Self {
            hidden_size,
            target_hidden_size: optional("target_hidden_size").unwrap_or(hidden_size),
            intermediate_size: required("intermediate_size")?,
            num_attention_heads: heads,
            num_key_value_heads: optional("num_key_value_heads").unwrap_or(heads),
            head_dim,
            vocab_size,
            draft_vocab_size: optional("draft_vocab_size").unwrap_or(vocab_size),
            rms_norm_eps: config["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope: RopeConfig::from_json(config, head_dim)?,
            max_position_embeddings: required("max_position_embeddings")?,
            fc_norm: config["fc_norm"].as_bool().unwrap_or(false),
            norm_output: config["norm_output"].as_bool().unwrap_or(false),
        };
        dims.check_heads()?;
        Ok(dims)
    }

    /// Every weight's checkpoint name and shape, in declaration order; the embedding comes first.
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        let (h, ht, i) = (self.hidden_size, self.target_hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let mut weights = vec![
            ("embed_tokens.weight".to_owned(), vec![self.vocab_size, h]),
            ("fc.weight".to_owned(), vec![h, N_CAPTURED * ht]),
            ("midlayer.input_layernorm.weight".to_owned(), vec![h]),
            ("midlayer.hidden_norm.weight".to_owned(), vec![h]),
            ("midlayer.self_attn.q_proj.weight".to_owned(), vec![q, 2 * h]),
            ("midlayer.self_attn.k_proj.weight".to_owned(), vec![kv, 2 * h]),
            ("midlayer.self_attn.v_proj.weight".to_owned(), vec![kv, 2 * h]),
            ("midlayer.self_attn.o_proj.weight".to_owned(), vec![h, q]),
            ("midlayer.post_attention_layernorm.weight".to_owned(), vec![h]),
            ("midlayer.mlp.gate_proj.weight".to_owned(), vec![i, h]),
            ("midlayer.mlp.up_proj.weight".to_owned(), vec![i, h]),
            ("midlayer.mlp.down_proj.weight".to_owned(), vec![h, i]),
            ("norm.weight".to_owned(), vec![h]),
            ("lm_head.weight".to_owned(), vec![self.draft_vocab_size, h]),
        ];
        if self.fc_norm {
            weights.extend((0..N_CAPTURED).map(|a| (format!("fc_norm.{a}.weight"), vec![ht])));
        }
        weights
    }
}

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
    fn find(params: &Params, dims: &Dims) -> Result<Self> {
        let id = |name: &str| {
            let reason = "missing".to_owned();
            params.find(name).ok_or(Error::Weight { name: name.to_owned(), reason })
        };
        let weight = |name: &str| id(name).map(Weight::of);
        let fc_norm = if dims.fc_norm { 0..N_CAPTURED } else { 0..0 };
        let attention = |name: &str| weight(&format!("midlayer.self_attn.{name}.weight"));
        let (q_proj, k_proj, v_proj) = (attention("q_proj")?, attention("k_proj")?, attention("v_proj")?);
        let (gate, up) = (weight("midlayer.mlp.gate_proj.weight")?, weight("midlayer.mlp.up_proj.weight")?);
        Ok(Self {
            embed_tokens: id("embed_tokens.weight")?,
            fc: weight("fc.weight")?,
            fc_norm: fc_norm.map(|a| id(&format!("fc_norm.{a}.weight"))).collect::<Result<_>>()?,
            input_layernorm: id("midlayer.input_layernorm.weight")?,
            hidden_norm: id("midlayer.hidden_norm.weight")?,
            kv_proj: Weight::stacked(&[&k_proj, &v_proj]),
            qkv_proj: Weight::stacked(&[&q_proj, &k_proj, &v_proj]),
            q_proj,
            o_proj: attention("o_proj")?,
            post_attention_layernorm: id("midlayer.post_attention_layernorm.weight")?,
            gate_up_proj: Weight::stacked(&[&gate, &up]),
            down_proj: weight("midlayer.mlp.down_proj.weight")?,
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
    /// The rows of the target's head that the draft vocabulary keeps, `[Vd, Ht]`.
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
        let device = frozen.head.device();
        let draw = |name: &str, shape: &[usize]| {
            Ok(init::normal(device, shape, config.initializer_range, seed, name)?)
        };
        Self::drawn(config, target, frozen, vocab, draw)
    }

    /// As [`Eagle3::new`], with matrices that `draw` makes from name and shape: for measuring, on the device itself.
    pub fn drawn(
        config: &Config,
        target: &TargetInfo,
        frozen: &Frozen,
        vocab: VocabMap,
        draw: impl Fn(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<(Self, Params)> {
        let dims = Dims::resolve(config, target, vocab.len())?;
        let device = frozen.head.device();
        let mut params = Params::new();
        for (name, shape) in dims.weights() {
            if name == "embed_tokens.weight" && frozen.embedding.shape() == shape {
                params.add(name, frozen.embedding.clone(), false);
            } else if name.ends_with("norm.weight") || name.starts_with("fc_norm") {
                params.add(name, init::constant(device, &shape, 1.0)?, true);
            } else {
                let value = draw(&name, &shape)?;
                params.add(name, value, true);
            }
        }
        let method = Self::over(config, dims, config.capture(target)?, frozen, vocab, &params)?;
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
        config.check()?;
        let device = frozen.head.device();
        let kept = Tensor::from_u32(device, vocab.target_ids().to_vec());
        let head = Tape::inference(params).input(frozen.head.clone());
        let teacher_head = Tape::inference(params).gather_rows(&head, &kept)?.value().clone();
        let rope = RopeTables::new(dims.rope.clone(), device);
        let modules = Modules::find(params, &dims)?;
        Ok(Self {
            config: config.clone(),
            dims,
            capture,
            vocab,
            modules,
            teacher_head,
            rope,
            head_norm: true,
            all_rows_live: false,
        })
    }

    fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            n_heads: self.dims.num_attention_heads,
            n_kv_heads: self.dims.num_key_value_heads,
            head_dim: self.dims.head_dim,
            scale: (self.dims.head_dim as f32).powf(-0.5),
        }
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
        let e = tape.embedding(m.embed_tokens, input_ids)?;
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
        self.attend(tape, states, (&self.modules.q_proj, 0, self.dims.num_attention_heads), at)
    }

    /// Keys, then values, `[R, 2·G·D]`.
    fn keys_values(&self, tape: &Tape<'_>, states: (&Var, &Var), at: &At) -> Result<Var> {
        let what = (&self.modules.kv_proj, self.query_width(), self.dims.num_key_value_heads);
        self.attend(tape, states, what, at)
    }

    /// Queries, keys, values, `[R, (N + 2·G)·D]`.
    fn queries_keys_values(&self, tape: &Tape<'_>, states: (&Var, &Var), at: &At) -> Result<Var> {
        let n_heads = self.dims.num_attention_heads + self.dims.num_key_value_heads;
        self.attend(tape, states, (&self.modules.qkv_proj, 0, n_heads), at)
    }

    fn query_width(&self) -> usize {
        self.dims.num_attention_heads * self.dims.head_dim
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
        // 1. Everything that all rows share: projected states, the embedding half, step-0 keys and values.
        let g = self.project(tape, &tape.input(batch.hidden_states.clone()))?;
        let half = self.embedding_half(tape, &Tensor::from_u32(device, batch.input_ids.clone()))?;
        let n = tape.rms_norm(&g, m.hidden_norm, self.eps())?;
        let base = self.keys_values(tape, (&n, &half), &Plan::all_rows(batch, device))?;
        let (shape, spans) = (self.attention_shape(), plan.spans(device));
        let base = KeyValue::packed(&base, 0, shape);
        // 2. From here on only live rows.
        let live = Tensor::from_u32(device, plan.live.clone());
        let (mut h, mut n) = (tape.gather_rows(&g, &live)?, tape.gather_rows(&n, &live)?);
        let (mut extras, mut states) = (Vec::new(), Vec::new());
        for step in 0..self.config.ttt_steps {
            let at = plan.live_rows(batch, step, device);
            let q = if step == 0 {
                self.queries(tape, (&n, &half), &at)?
            } else {
                let qkv = self.queries_keys_values(tape, (&n, &half), &at)?;
                extras.push((KeyValue::packed(&qkv, self.query_width(), shape), None));
                qkv
            };
            let query = Part::new(&q, 0);
            let a =
                tape.attention(&Attention { shape, query, base: &base, spans: &spans, extras: &extras })?;
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
        let row = |r: usize| self.vocab.target_ids().iter().map(move |&id| r * v + id as usize);
        let kept = (0..t).flat_map(row).map(|i| values[i]).collect();
        Ok(Tensor::from_f32(logits.device(), kept, &[t, self.vocab.len()])?)
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
        let stats = tape.soft_target_loss(&SoftTargetLoss {
            x: &x,
            head: self.modules.lm_head,
            teacher: soft_teacher,
            logsumexp: &teacher.logsumexp,
            rows: &plan.rows,
            objective: self.config.objective(),
            group_weight: &group_weight,
        })?;
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
    let (groups, weight) = (&figures.groups, plan.rows.total_weight);
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
