//! A tiny random draft and target for the other tests.

use serde_json::{Map, Value, json};
use specforge_export::{Eagle3Config, Eagle3Export, Tensor};
use specforge_testkit::Lcg;

/// Sizes that differ from one another wherever they may.
pub(crate) fn config() -> Eagle3Config {
    Eagle3Config {
        hidden_size: 48,
        target_hidden_size: 48,
        intermediate_size: 80,
        num_hidden_layers: 1,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        vocab_size: 200,
        draft_vocab_size: 72,
        rms_norm_eps: 1e-6,
        rope: rope(json!({"rope_theta": 1_000_000, "rope_type": "default"})),
        num_aux_hidden_states: 3,
        capture_layers: None,
        fc_norm: false,
        norm_output: false,
        norm_before_fc: false,
        shares_target_head: false,
    }
}

pub(crate) fn eagle31() -> Eagle3Config {
    Eagle3Config { fc_norm: true, norm_output: true, ..config() }
}

pub(crate) fn rope(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(rope) => rope,
        other => panic!("RoPE parameters are an object, not {other}"),
    }
}

/// The `config.json` of a target that [`config`] fits.
pub(crate) fn target() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 48, "num_hidden_layers": 12,
        "vocab_size": 200, "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "rope_theta": 1_000_000,
        "bos_token_id": 1, "eos_token_id": [2, 3], "quantization_config": {"quant_method": "fp8"},
    })
}

/// All tensors of a draft, random, the map taking every id that leaves remainder 0 or 1 by 3 and then some.
pub(crate) fn tensors(config: &Eagle3Config) -> Vec<Tensor<'static>> {
    let mut lcg = Lcg::new(11);
    let (h, t, inner) = (config.hidden_size, config.target_hidden_size, config.intermediate_size);
    let (q, kv) =
        (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let mut matrix = |name: &str, shape: &[usize]| {
        let scale = if shape.len() == 1 { 1.0 } else { 0.05 };
        Tensor::bf16(name, shape, &lcg.normals(shape.iter().product(), scale))
    };
    let mut tensors = vec![
        matrix("fc.weight", &[h, config.num_aux_hidden_states * t]),
        matrix("norm.weight", &[h]),
        matrix("lm_head.weight", &[config.draft_vocab_size, h]),
        matrix("embed_tokens.weight", &[config.vocab_size, h]),
        matrix("midlayer.self_attn.q_proj.weight", &[q, 2 * h]),
        matrix("midlayer.self_attn.k_proj.weight", &[kv, 2 * h]),
        matrix("midlayer.self_attn.v_proj.weight", &[kv, 2 * h]),
        matrix("midlayer.self_attn.o_proj.weight", &[h, q]),
        matrix("midlayer.mlp.gate_proj.weight", &[inner, h]),
        matrix("midlayer.mlp.up_proj.weight", &[inner, h]),
        matrix("midlayer.mlp.down_proj.weight", &[h, inner]),
        matrix("midlayer.hidden_norm.weight", &[h]),
        matrix("midlayer.input_layernorm.weight", &[h]),
        matrix("midlayer.post_attention_layernorm.weight", &[h]),
    ];
    if config.fc_norm {
        tensors
            .extend((0..config.num_aux_hidden_states).map(|i| matrix(&format!("fc_norm.{i}.weight"), &[t])));
    }
    let ids: Vec<i64> =
        (0..config.vocab_size as i64).filter(|id| id % 3 < 2).take(config.draft_vocab_size).collect();
    let offsets: Vec<i64> = ids.iter().zip(0..).map(|(id, draft)| id - draft).collect();
    let mask: Vec<bool> = (0..config.vocab_size as i64).map(|id| ids.contains(&id)).collect();
    tensors.extend([Tensor::i64("d2t", &offsets), Tensor::bool("t2d", &mask)]);
    tensors
}

/// A draft of [`tensors`] for a target.
pub(crate) fn export<'a>(config: &Eagle3Config, target: &'a Value) -> Eagle3Export<'a> {
    Eagle3Export { config: config.clone(), tensors: tensors(config), target }
}
