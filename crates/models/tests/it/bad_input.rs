//! Folders and inputs that are refused, each with a message that leads to the mistake.

use serde_json::{Value, json};
use specforge_models::{Capture, Target, TargetInfo};
use specforge_tensor::Device;
use specforge_testkit::tempdir;

use crate::folder::{config, target, tensors, tokens, write};

fn load_error(config: &Value, tensors: &[(String, Vec<usize>)]) -> String {
    let dir = tempdir();
    write(dir.path(), config, tensors);
    Target::load(dir.path(), Device::Cpu, None).expect_err("a wrong folder").to_string()
}

#[test]
fn wrong_settings_are_named() {
    let check = |extra: Value, expected: &str| {
        let config = config("LlamaForCausalLM", &extra);
        let message = load_error(&config, &tensors(&self::config("LlamaForCausalLM", &json!({}))));
        assert!(message.contains("config.json: ") && message.contains(expected), "{extra}: {message}");
    };
    check(
        json!({ "architectures": ["LlamaForCausalLN"] }),
        "LlamaForCausalLN is not known; known are LlamaForCausalLM, ",
    );
    check(json!({ "architectures": ["LlamaForCausalLN"] }), "; the nearest is LlamaForCausalLM");
    check(
        json!({ "architectures": ["Xyz"] }),
        "known are LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
    );
    check(json!({ "architectures": null }), "architecture (none is named) is not known");
    check(
        json!({ "quantization_config": { "quant_method": "fp8" } }),
        "quantization_config = {\"quant_method\":\"fp8\"}: ",
    );
    check(json!({ "hidden_act": "gelu" }), "hidden_act = \"gelu\": this activation is not supported");
    check(json!({ "hidden_size": "big" }), "hidden_size: invalid type: string \"big\"");
    check(json!({ "hidden_size": null }), "hidden_size: invalid type: null");
    check(json!({ "head_dim": 0 }), "head_dim = 0: expected at least 1");
    check(json!({ "num_key_value_heads": 3 }), "num_key_value_heads = 3: expected a divisor of");
    check(
        json!({ "head_dim": null, "num_attention_heads": 5 }),
        "num_attention_heads = 5: expected head_dim, or a divisor",
    );
    check(json!({ "rope_scaling": { "type": "warped" } }), "\"warped\"");
    check(json!({ "attention_bias": "yes" }), "attention_bias: invalid type: string \"yes\"");
    check(json!({ "rms_norm_eps": 3.0 }), "rms_norm_eps = 3.0: expected a small number");
}

#[test]
fn capped_logits_are_no_teacher() {
    let read = |extra: Value| {
        let config = config("Gemma2ForCausalLM", &extra);
        TargetInfo::from_json("config.json".as_ref(), config).expect("a sound configuration")
    };
    let gelu = "gelu_pytorch_tanh";
    read(json!({ "hidden_act": gelu })).expect_teacher().expect("no cap");
    let capped = read(json!({ "hidden_act": gelu, "final_logit_softcapping": 30.0 }));
    let message = capped.expect_teacher().expect_err("a cap").to_string();
    assert!(message.contains("final_logit_softcapping = 30.0: the losses know no cap"), "{message}");
}

#[test]
fn wrong_windows_are_named() {
    let check = |extra: Value, expected: &str| {
        let config = config("Qwen2ForCausalLM", &extra);
        let message = load_error(&config, &tensors(&config));
        assert!(message.contains(expected), "{extra}: {message}");
    };
    let window =
        |types: Value| json!({ "use_sliding_window": true, "sliding_window": 4, "layer_types": types });
    check(window(json!(["full_attention"])), "layer_types = [\"full_attention\"]: expected 3 entries");
    check(window(json!(["full_attention", "x", "x"])), "expected full_attention and sliding_attention only");
    check(
        json!({ "use_sliding_window": true, "sliding_window": 0 }),
        "sliding_window = 0: expected at least 1",
    );
}

#[test]
fn missing_and_misshaped_tensors_are_named() {
    let config = config("Qwen3ForCausalLM", &json!({}));
    for missing in ["model.layers.1.self_attn.q_norm.weight", "lm_head.weight", "model.norm.weight"] {
        let rest: Vec<_> = tensors(&config).into_iter().filter(|(name, _)| name != missing).collect();
        let message = load_error(&config, &rest);
        assert!(message.contains(missing) && message.contains("model.safetensors"), "{message}");
    }
    let mut wrong = tensors(&config);
    wrong.iter_mut().find(|(name, _)| name.ends_with("2.mlp.up_proj.weight")).expect("a layer").1 =
        vec![47, 32];
    let message = load_error(&config, &wrong);
    assert!(message.contains("model.safetensors: tensor model.layers.2.mlp.up_proj.weight"), "{message}");
    assert!(message.contains("[47, 32], expected [48, 32]"), "{message}");
}

#[test]
fn unused_tensors_are_passed_over() {
    let dir = tempdir();
    let config = config("LlamaForCausalLM", &json!({}));
    let mut tensors = tensors(&config);
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), vec![4]));
    write(dir.path(), &config, &tensors);
    Target::load(dir.path(), Device::Cpu, None).expect("a sound folder");
}

#[test]
fn folders_that_are_none_are_named() {
    let dir = tempdir();
    let message =
        |dir: &std::path::Path| Target::load(dir, Device::Cpu, None).expect_err("no folder").to_string();
    assert!(message(&dir.path().join("absent")).contains("absent/config.json"));
    fs_err::write(dir.path().join("config.json"), "{").expect("written");
    assert!(message(dir.path()).contains("config.json: not JSON: "));
    fs_err::write(dir.path().join("config.json"), config("LlamaForCausalLM", &json!({})).to_string())
        .expect("written");
    assert!(message(dir.path()).contains("no model.safetensors"));
}

#[test]
fn wrong_documents_are_named() {
    let target = target("LlamaForCausalLM", &json!({}));
    let capture = Capture { layers: vec![0], last_hidden: false };
    let check = |documents: &[&[u32]], expected: &str| {
        let message = target.forward(documents, &capture).expect_err("refused").to_string();
        assert!(message.contains(expected), "{message}");
    };
    check(&[&[1], &[1, 50]], "document 1: token 50 at 1 is outside the vocabulary of 50");
    check(&[&[1], &[]], "document 1 has 0 tokens, expected 1 to 64");
    check(&[&tokens(1, 65)], "document 0 has 65 tokens, expected 1 to 64 (max_position_embeddings)");
    let message =
        target.forward(&[&[1]], &Capture { layers: vec![3], last_hidden: true }).expect_err("refused");
    assert!(message.to_string().contains("capture of layers [3] in a model of 3 layers"), "{message}");
}

#[test]
fn the_description_follows_the_files() {
    let dir = tempdir();
    let read = |extra: Value| {
        fs_err::write(dir.path().join("config.json"), config("Qwen3ForCausalLM", &extra).to_string())
            .expect("written");
        TargetInfo::read(dir.path()).expect("a sound configuration")
    };
    let info = read(json!({ "tie_word_embeddings": true }));
    assert_eq!((info.n_layers, info.n_kv_heads, info.head_dim), (3, 2, 8));
    assert_eq!((info.dtype.as_str(), info.tie_word_embeddings), ("float32", true));
    assert_eq!((info.bos_token_id, info.eos_token_ids, info.pad_token_id), (Some(1), vec![2, 3], None));
    assert_eq!(read(json!({ "torch_dtype": null, "dtype": "bfloat16" })).dtype, "bfloat16");
    assert_eq!(read(json!({ "eos_token_id": 7 })).eos_token_ids, [7]);
    assert_eq!(read(json!({ "head_dim": null })).head_dim, 128);
    assert_eq!(read(json!({ "architectures": null, "model_type": "qwen2", "head_dim": null })).head_dim, 8);
    assert_eq!(read(json!({ "num_key_value_heads": null })).n_kv_heads, 4);
    fs_err::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [4, 5]}"#).expect("written");
    assert_eq!(read(json!({})).eos_token_ids, [4, 5]);
}
