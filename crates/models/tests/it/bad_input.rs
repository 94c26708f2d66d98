//! Folders and inputs that are refused, each with a message that leads to the mistake.

use serde_json::{Value, json};
use specforge_models::{Capture, Target, TargetInfo};
use specforge_tensor::Device;
use specforge_testkit::tempdir;

use crate::folder::{config, kinds, target, tensors, tokens, write};

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
    check(
        json!({ "num_hidden_layers": 1_000_000_000 }),
        "num_hidden_layers = 1000000000: expected at most 1024",
    );
    check(json!({ "num_key_value_heads": 3 }), "num_key_value_heads = 3: expected a divisor of");
    check(
        json!({ "head_dim": null, "num_attention_heads": 5 }),
        "num_attention_heads = 5: expected head_dim, or a divisor",
    );
    check(json!({ "rope_scaling": { "type": "warped" } }), "\"warped\"");
    check(json!({ "attention_bias": "yes" }), "attention_bias: invalid type: string \"yes\"");
    check(json!({ "rms_norm_eps": 3.0 }), "rms_norm_eps = 3.0: expected a small number");
}

/// What a configuration leaves out per layer is filled in before anything is checked: that must not fill the memory.
#[test]
fn a_wrong_number_of_layers_is_refused_at_once() {
    for (architecture, extra) in kinds() {
        let mut config = config(architecture, &extra);
        config["num_hidden_layers"] = json!(u64::MAX);
        for key in ["layer_types", "no_rope_layers", "moe_layers"] {
            config.as_object_mut().expect("keys").remove(key);
        }
        let error = TargetInfo::from_json("config.json".as_ref(), config).expect_err("too many layers");
        assert!(
            error.to_string().contains("num_hidden_layers = 18446744073709551615: "),
            "{architecture}: {error}"
        );
    }
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

#[test]
fn wrong_mixtures_are_named() {
    let check = |architecture: &str, more: Value, expected: &str| {
        let (_, extra) = kinds().into_iter().rfind(|(name, _)| *name == architecture).expect("a kind");
        let tensors = tensors(&config(architecture, &extra));
        let mut wrong = config(architecture, &extra);
        for (key, value) in more.as_object().expect("keys") {
            wrong[key] = value.clone();
        }
        let message = load_error(&wrong, &tensors);
        assert!(message.contains("config.json: ") && message.contains(expected), "{more}: {message}");
    };
    let (qwen, deepseek, gpt) = ("Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM");
    check(
        qwen,
        json!({ "num_local_experts": 6 }),
        "num_local_experts = 6: but num_experts = 5: which is it?",
    );
    check(
        qwen,
        json!({ "num_experts": null }),
        "num_experts = null: expected a number under one of num_experts, ",
    );
    check(qwen, json!({ "num_experts": 0 }), "num_experts = 0: expected a number of at least 1");
    check(
        qwen,
        json!({ "num_experts": 4 }),
        "num_experts = 4: but model.layers.0.mlp.experts has an expert 4",
    );
    check(
        qwen,
        json!({ "num_experts_per_tok": 6 }),
        "num_experts_per_tok = 6: expected 1 to 5, the experts that",
    );
    check(qwen, json!({ "decoder_sparse_step": 0 }), "decoder_sparse_step = 0: expected at least 1");
    check(qwen, json!({ "moe_intermediate_size": null }), "moe_intermediate_size: invalid type: null");
    check(deepseek, json!({ "n_group": 3 }), "n_group = 3: expected a divisor of n_routed_experts = 8");
    check(
        deepseek,
        json!({ "topk_group": 5 }),
        "topk_group = 5: expected 1 to n_group = 4, of 2 experts each",
    );
    check(
        deepseek,
        json!({ "num_experts_per_tok": 5 }),
        "num_experts_per_tok = 5: expected 1 to 4, the experts that",
    );
    check(
        deepseek,
        json!({ "scoring_func": "tanh" }),
        "scoring_func = \"tanh\": unknown router function, expected softmax or sigmoid",
    );
    check(
        deepseek,
        json!({ "topk_method": "random" }),
        "topk_method = \"random\": unknown way to pick experts",
    );
    check(deepseek, json!({ "kv_lora_rank": null }), "kv_lora_rank: invalid type: null");
    check(gpt, json!({ "swiglu_limit": 0.0 }), "swiglu_limit = 0.0: expected a number above 0");
    check(
        gpt,
        json!({ "layer_types": ["full_attention"] }),
        "layer_types = [\"full_attention\"]: expected 3 entries",
    );
    check("Llama4ForCausalLM", json!({ "no_rope_layers": [1] }), "no_rope_layers = [1]: expected 3 entries");
    let next = "Qwen3NextForCausalLM";
    check(next, json!({ "linear_num_key_heads": 3 }), "linear_num_key_heads = 3: expected a divisor of");
    check(
        next,
        json!({ "layer_types": ["conv", "conv", "conv"] }),
        "expected linear_attention and full_attention only",
    );
    check(next, json!({ "attn_output_gate": false }), "attn_output_gate = false: attention without a gate");
}

#[test]
fn missing_experts_are_named() {
    let (architecture, extra) =
        kinds().into_iter().find(|(name, _)| *name == "Qwen3MoeForCausalLM").expect("a kind");
    let config = config(architecture, &extra);
    let missing = "model.layers.2.mlp.experts.3.up_proj.weight";
    let rest: Vec<_> = tensors(&config).into_iter().filter(|(name, _)| name != missing).collect();
    let message = load_error(&config, &rest);
    assert!(message.contains(&format!("tensor {missing} is missing in ")), "{message}");
    assert!(message.contains("the nearest name there is model.layers.2.mlp.experts."), "{message}");
    let mut wrong = tensors(&config);
    wrong.iter_mut().find(|(name, _)| name.ends_with("2.mlp.experts.4.down_proj.weight")).expect("it").1 =
        vec![32, 13];
    let message = load_error(&config, &wrong);
    assert!(
        message.contains("experts.4.down_proj.weight has shape [32, 13], expected [32, 12]"),
        "{message}"
    );
}

#[test]
fn missing_shards_are_named() {
    let dir = tempdir();
    let config = config("LlamaForCausalLM", &json!({}));
    write(dir.path(), &config, &tensors(&config));
    fs_err::rename(dir.path().join("model.safetensors"), dir.path().join("model-1.safetensors"))
        .expect("moved");
    let index = json!({ "weight_map": { "model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors" } });
    fs_err::write(dir.path().join("model.safetensors.index.json"), index.to_string()).expect("written");
    let message = Target::load(dir.path(), Device::Cpu, None).expect_err("no shard").to_string();
    assert!(
        message.contains("model.safetensors.index.json: 1 of the 2 files it names are missing"),
        "{message}"
    );
    assert!(message.contains("model-2.safetensors first"), "{message}");
}

#[test]
fn quantised_weights_that_are_not_read_are_named() {
    let check = |quantization: Value, expected: &str| {
        let config = config("LlamaForCausalLM", &json!({ "quantization_config": quantization }));
        let message = load_error(&config, &tensors(&config));
        assert!(message.contains(expected), "{quantization}: {message}");
    };
    check(json!({ "quant_method": "awq" }), "only fp8 (e4m3, in blocks) and mxfp4 are read");
    check(json!({ "quant_method": "fp8", "fmt": "e5m2" }), "only fp8 (e4m3, in blocks) and mxfp4 are read");
    check(json!({ "quant_method": "fp8", "weight_block_size": null }), "expected weight_block_size");
    check(json!({ "quant_method": "fp8", "weight_block_size": [0, 4] }), "expected weight_block_size");
}
