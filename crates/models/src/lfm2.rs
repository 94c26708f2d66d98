//! LFM2 (Liquid AI, 2025): short gated convolutions in most layers, attention with normed queries and keys in the
//! others, and a SwiGLU MLP behind each.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size, K taps.

use serde::Deserialize;
use serde_json::{Value, json};
use specforge_tensor::{KeyValue, ParamId, Part, Var, Weight};

use crate::config::{n_layers, parse, with_defaults};
use crate::frame::Frame;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::pass::{Layer, Layers, Pass};
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only this family has.
#[derive(Debug, Deserialize)]
struct Config {
    /// `conv` or `full_attention`.
    layer_types: Vec<String>,
    /// K.
    #[serde(rename = "conv_L_cache", default = "default_taps")]
    taps: usize,
    #[serde(default)]
    conv_bias: bool,
}

fn default_taps() -> usize {
    3
}

/// What a layer does before its MLP.
#[derive(Debug)]
enum Operator {
    Conv {
        in_proj: Weight,
        taps: ParamId,
        out_proj: Weight,
    },
    Attention {
        q_proj: Weight,
        k_proj: Weight,
        v_proj: Weight,
        out_proj: Weight,
        q_norm: ParamId,
        k_norm: ParamId,
    },
}

#[derive(Debug)]
struct Lfm2Layer {
    operator_norm: ParamId,
    operator: Operator,
    ffn_norm: ParamId,
    mlp: Mlp,
    hidden_size: usize,
}

/// `config.json` with Llama's keys, and with the width that the MLP has in the end.
pub(crate) fn settings(config: Value) -> Value {
    let mut config = with_defaults(config, &json!({ "tie_word_embeddings": true }));
    let eps = ["norm_eps", "block_norm_eps"].iter().find_map(|key| config[key].as_f64()).unwrap_or(1e-5);
    config["rms_norm_eps"] = json!(eps);
    let width = ["block_ff_dim", "intermediate_size"].iter().find_map(|key| config[key].as_u64());
    if let Some(width) = width.filter(|_| config["block_auto_adjust_ff_dim"].as_bool() != Some(false)) {
        let factor = config["block_ffn_dim_multiplier"].as_f64().unwrap_or(1.0);
        let multiple = config["block_multiple_of"].as_u64().unwrap_or(256).max(1);
        let adjusted = ((2 * width / 3) as f64 * factor) as u64;
        config["intermediate_size"] = json!(adjusted.next_multiple_of(multiple));
    } else if let Some(width) = width {
        config["intermediate_size"] = json!(width);
    }
    // Read again, this is what it says.
    config["block_ff_dim"] = config["intermediate_size"].clone();
    config["block_auto_adjust_ff_dim"] = json!(false);
    if config["layer_types"].is_null() {
        let attends = |i: u64| config["full_attn_idxs"].as_array().is_some_and(|all| all.contains(&json!(i)));
        let kind = |i| if attends(i) { "full_attention" } else { "conv" };
        config["layer_types"] = (0..n_layers(&config)).map(kind).collect();
    }
    config
}

/// What stands around the layers.
pub(crate) fn frame(info: &TargetInfo) -> Result<Frame> {
    if parse::<Config>(&info.path, &info.raw)?.conv_bias {
        return Err(info.wrong("conv_bias", "convolutions with a bias are not supported"));
    }
    Ok(Frame { norm: "embedding_norm", ..Frame::default() })
}

/// All layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    if config.layer_types.len() != info.n_layers {
        return Err(info.wrong("layer_types", format!("expected {} entries", info.n_layers)));
    }
    loader.layers(&config.layer_types, |kind, loader| Lfm2Layer::new(info, &config, kind, loader))
}

impl Lfm2Layer {
    fn new(info: &TargetInfo, config: &Config, kind: &str, loader: &mut Loader<'_>) -> Result<Self> {
        let h = info.hidden_size;
        let operator = match kind {
            "conv" => Operator::conv(h, config.taps, &mut loader.at("conv"))?,
            "full_attention" => Operator::attention(info, &mut loader.at("self_attn"))?,
            _ => return Err(info.wrong("layer_types", "expected conv and full_attention only")),
        };
        Ok(Self {
            operator_norm: loader.norm("operator_norm", h)?,
            operator,
            ffn_norm: loader.norm("ffn_norm", h)?,
            mlp: Mlp::named(
                ["w1", "w3", "w2"],
                [h, info.intermediate_size],
                false,
                &mut loader.at("feed_forward"),
            )?,
            hidden_size: h,
        })
    }
}

impl Operator {
    fn conv(h: usize, taps: usize, loader: &mut Loader<'_>) -> Result<Self> {
        Ok(Self::Conv {
            in_proj: loader.linear("in_proj", h, 3 * h, false)?,
            taps: loader.tensor("conv.weight", &[h, 1, taps])?,
            out_proj: loader.linear("out_proj", h, h, false)?,
        })
    }

    fn attention(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Self> {
        let (h, d) = (info.hidden_size, info.head_dim);
        let (q, kv) = (info.n_heads * d, info.n_kv_heads * d);
        Ok(Self::Attention {
            q_proj: loader.linear("q_proj", h, q, false)?,
            k_proj: loader.linear("k_proj", h, kv, false)?,
            v_proj: loader.linear("v_proj", h, kv, false)?,
            out_proj: loader.linear("out_proj", q, h, false)?,
            q_norm: loader.norm("q_layernorm", d)?,
            k_norm: loader.norm("k_layernorm", d)?,
        })
    }

    /// The residual stream `h` with what the operator makes of its normed state `x` added.
    fn add_to(&self, pass: &mut Pass<'_, '_>, h: &Var, x: &Var) -> Result<Var> {
        let (tape, eps, width) = (pass.tape, pass.eps, h.rows_cols().1);
        Ok(match self {
            Self::Conv { in_proj, taps, out_proj } => {
                // B, C and x side by side: C · conv(B · x).
                let bcx = tape.linear(x, in_proj)?;
                let bx = tape.product(&Part::new(&bcx, 0), &Part::new(&bcx, 2 * width), width)?;
                let y = pass.short_conv(&bx, *taps)?;
                let y = tape.product(&Part::new(&bcx, width), &Part::new(&y, 0), width)?;
                tape.linear_add(&y, out_proj, h)?
            }
            Self::Attention { q_proj, k_proj, v_proj, out_proj, q_norm, k_norm } => {
                let q = pass.rope(&tape.rms_norm(&tape.linear(x, q_proj)?, *q_norm, eps)?)?;
                let k = pass.rope(&tape.rms_norm(&tape.linear(x, k_proj)?, *k_norm, eps)?)?;
                let kv = KeyValue::new(&k, &tape.linear(x, v_proj)?);
                let a = pass.attention(&Part::new(&q, 0), &kv, None)?;
                tape.linear_add(&a, out_proj, h)?
            }
        })
    }
}

impl Layer for Lfm2Layer {
    fn cached(&self, kv: usize) -> Vec<usize> {
        match self.operator {
            Operator::Conv { .. } => vec![self.hidden_size],
            Operator::Attention { .. } => vec![kv; 2],
        }
    }

    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Convolution or attention of the normed state, and the residual sum.
        let x = tape.rms_norm(h, self.operator_norm, pass.eps)?;
        let h = self.operator.add_to(pass, h, &x)?;
        // 2. MLP of the normed state, and the residual sum.
        let x = tape.rms_norm(&h, self.ffn_norm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
