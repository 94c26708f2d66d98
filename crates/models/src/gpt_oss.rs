//! gpt-oss (OpenAI, 2025): Llama's attention with biases, a learned sink per head and a sliding window in every other
//! layer, and mixtures of experts with biases and a clamped gate. The experts of published checkpoints are in 4 bits.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size, I width of an
//! expert.

use serde::Deserialize;
use serde_json::{Value, json};
use specforge_tensor::{ParamId, RouterParams, Routing, Scoring, Var, Weight};

use crate::config::{Windows, count, n_layers, parse, with_defaults};
use crate::loader::Loader;
use crate::mixture::FeedForward;
use crate::mixture::{ExpertGate, Mixture, MixtureShape};
use crate::pass::{Layer, Layers, Pass, qkv};
use crate::{Result, TargetInfo};

/// The slope of the experts' gate.
const ALPHA: f32 = 1.702;

/// The settings of `config.json` that only this family has.
#[derive(Debug, Deserialize)]
struct Config {
    /// Biases on q, k, v and o.
    #[serde(default = "yes")]
    attention_bias: bool,
    /// Gates, and the absolute value of ups, are at most this.
    #[serde(default = "limit")]
    swiglu_limit: f32,
}

fn yes() -> bool {
    true
}

fn limit() -> f32 {
    7.0
}

#[derive(Debug)]
struct GptOssLayer {
    input_layernorm: ParamId,
    qkv_proj: Weight,
    /// Float32 `[N]`.
    sinks: ParamId,
    o_proj: Weight,
    post_attention_layernorm: ParamId,
    mlp: FeedForward,
    window: Option<usize>,
}

/// `config.json` with the keys that other families have: layer 0 slides, layer 1 sees all, and so on.
pub(crate) fn settings(config: Value) -> Value {
    let mut config =
        with_defaults(config, &json!({ "head_dim": 64, "sliding_window": 128, "use_sliding_window": true }));
    if config["layer_types"].is_null() {
        let kind = |i: u64| if i.is_multiple_of(2) { "sliding_attention" } else { "full_attention" };
        config["layer_types"] = (0..n_layers(&config)).map(kind).collect();
    }
    config
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    if config.swiglu_limit <= 0.0 {
        return Err(info.wrong("swiglu_limit", "expected a number above 0"));
    }
    let windows = parse::<Windows>(&info.path, &info.raw)?.per_layer(info)?;
    let (_, top_k) = count(info, &["num_experts_per_tok", "experts_per_token"])?;
    let rule = Routing { scoring: Scoring::Softmax, top_k, groups: None, normalised: true, scale: 1.0 };
    let shape = MixtureShape::new(info, info.intermediate_size, rule)?;
    loader.layers(windows, |window, loader| GptOssLayer::new(info, &config, shape, window, loader))
}

impl GptOssLayer {
    fn new(
        info: &TargetInfo,
        config: &Config,
        shape: MixtureShape,
        window: Option<usize>,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let (h, bias) = (info.hidden_size, config.attention_bias);
        let (q, kv) = (info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim);
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            qkv_proj: loader.stacked(&qkv(q, kv), h, bias)?,
            sinks: loader.exact("self_attn.sinks", &[info.n_heads])?,
            o_proj: loader.linear("self_attn.o_proj", q, h, bias)?,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp: mixture(info, config, shape, &mut loader.at("mlp"))?.into(),
            window,
        })
    }
}

/// Gate and up of an expert alternate in the file.
fn mixture(
    info: &TargetInfo,
    config: &Config,
    shape: MixtureShape,
    loader: &mut Loader<'_>,
) -> Result<Mixture> {
    let MixtureShape { n_experts: n, width: i, rule } = shape;
    let h = info.hidden_size;
    let weight = loader.tensor("router.weight", &[n, h])?;
    let bias = Some(loader.tensor("router.bias", &[n])?);
    let router = RouterParams { weight, bias, correction: None, rule };
    let apart: Vec<usize> = (0..i).map(|j| 2 * j).chain((0..i).map(|j| 2 * j + 1)).collect();
    let plain: Vec<usize> = (0..h).collect();
    let mut experts = loader.at("experts");
    let mut gate_up = experts.experts_transposed("gate_up_proj", &[n, 2 * i, h], &apart)?;
    gate_up.bias = Some(experts.experts_bias("gate_up_proj_bias", [n, 2 * i], &apart)?);
    let mut down = experts.experts_transposed("down_proj", &[n, h, i], &plain)?;
    down.bias = Some(experts.experts_bias("down_proj_bias", [n, h], &plain)?);
    let gate = ExpertGate::Clamped { alpha: ALPHA, limit: config.swiglu_limit };
    Ok(Mixture { router, gate_up, gate, down, scales_input: false, shared: None, width: i })
}

impl Layer for GptOssLayer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state, with biases.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let qkv = tape.linear(&x, &self.qkv_proj)?;
        // 2. Positions.
        let qkv = pass.rope_packed(&qkv)?;
        // 3. Attention to what the window shows and to the sink, and the residual sum.
        let a = pass.attention_packed_with(&qkv, self.window, Some(self.sinks))?;
        let h = tape.linear_add(&a, &self.o_proj, h)?;
        // 4. Mixture of the normed state, and the residual sum.
        let x = tape.rms_norm(&h, self.post_attention_layernorm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
