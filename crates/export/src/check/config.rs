//! `config.json`: every key that makes an engine refuse, or serve something else than was trained.

use std::path::Path;

use serde_json::{Map, Value};

use super::Problem;
use crate::eagle3::{Eagle3Config, IDS};
use crate::target::{TargetConfig, architecture, context_length, declared_dtype, serving_dtype};

/// What is wrong with the file, and what it says if that can be understood.
pub(super) fn problems(
    path: &Path,
    raw: &Value,
    target: Option<&TargetConfig>,
) -> (Vec<Problem>, Option<Eagle3Config>) {
    if let Some(problem) = other_format(raw) {
        return (vec![problem], None);
    }
    let mut problems = Vec::new();
    problems.extend(flags(raw));
    problems.extend(heads(raw));
    problems.extend(element_type(raw, target));
    problems.extend(rope(raw));
    match Eagle3Config::parse(path, raw) {
        Err(error) => {
            problems.push(Problem::unreadable("config.json", &error));
            (problems, None)
        }
        Ok(config) => {
            problems.extend(sizes(&config));
            problems.extend(capture_layers(raw, &config, target));
            if let Some(target) = target {
                problems.extend(against_target(raw, &config, target));
            }
            (problems, Some(config))
        }
    }
}

/// A folder that is something else altogether.
fn other_format(raw: &Value) -> Option<Problem> {
    if raw.get("speculators_model_type").is_some() {
        let what = "this is the speculators format, which SGLang does not read";
        return Some(Problem::error("speculators_model_type", what, "convert it to the EAGLE3 format first"));
    }
    let fix = match architecture(raw) {
        "LlamaForCausalLMEagle3" => return None,
        "" => "set it to [\"LlamaForCausalLMEagle3\"]",
        "LlamaForCausalLMEagle" => "this is an EAGLE-1 or EAGLE-2 draft, which this check does not cover",
        "PEagleDraftModel" | "PeagleLlamaForCausalLM" => {
            "this is a P-EAGLE draft, which SGLang does not serve"
        }
        "Eagle3DeepseekV2ForCausalLM" => {
            "this is an EAGLE3 draft with latent attention, which this check does not cover"
        }
        _ => "is it the folder of a draft?",
    };
    let what =
        format!("expected LlamaForCausalLMEagle3, got {}", raw.get("architectures").unwrap_or(&Value::Null));
    Some(Problem::error("architectures", what, fix))
}

/// Keys that have to have one certain value.
fn flags(raw: &Value) -> Vec<Problem> {
    let is_true = |key: &str| raw.get(key).and_then(Value::as_bool) == Some(true);
    let mut problems = Vec::new();
    let mut must_not = |key: &str, what: &str, fix: &str| {
        if is_true(key) {
            problems.push(Problem::error(key, format!("it is true: {what}"), fix));
        }
    };
    must_not(
        "tie_word_embeddings",
        "SGLang then ignores lm_head.weight and uses the embedding",
        "set it to false",
    );
    must_not("bias", "SGLang then makes an attention bias that no file fills", "remove the key");
    must_not("attention_bias", "SGLang then makes an attention bias that no file fills", "set it to false");
    must_not("norm_before_residual", "SGLang does not know it and serves another model", "train with false");
    if is_true("norm_before_fc") || raw.pointer("/eagle_config/norm_before_fc") == Some(&Value::Bool(true)) {
        let what = "it is true: SGLang before 0.5.23 ignores it";
        problems.push(Problem::warning("norm_before_fc", what, "serve with 0.5.23 or later"));
    }
    if !raw.get("quantization_config").is_none_or(Value::is_null) {
        let what = "the draft would be loaded as a quantised model, and its tensors are not";
        problems.push(Problem::error("quantization_config", what, "remove the key (it is the target's)"));
    }
    match raw.get("hidden_act").and_then(Value::as_str) {
        Some("silu") => {}
        Some(other) => problems.push(Problem::error(
            "hidden_act",
            format!("expected silu, got {other}"),
            "only silu is served",
        )),
        None => problems.push(Problem::warning("hidden_act", "it is missing", "set it to silu")),
    }
    match raw.get("model_type").and_then(Value::as_str) {
        Some("llama" | "qwen3") => {}
        other => {
            let what = format!("expected llama, got {}", other.unwrap_or("nothing"));
            problems.push(Problem::warning("model_type", what, "set it to llama"));
        }
    }
    problems
}

/// Keys of the two vocabularies and the heads.
fn heads(raw: &Value) -> Vec<Problem> {
    let mut problems = Vec::new();
    match raw.get("draft_vocab_size") {
        None => {
            let what = "it is missing, and SGLang stops with an AttributeError";
            problems.push(Problem::error("draft_vocab_size", what, "set it to the rows of lm_head.weight"));
        }
        Some(Value::Null) => {
            let what = "it is null: the target's head is used, not lm_head.weight of this folder";
            problems.push(Problem::warning("draft_vocab_size", what, "set it to the rows of lm_head.weight"));
        }
        Some(_) => {}
    }
    if raw.get("head_dim").is_none_or(Value::is_null) {
        let what = "it is missing, and engines take hidden_size / num_attention_heads";
        problems.push(Problem::warning("head_dim", what, "write it"));
    }
    problems
}

fn sizes(config: &Eagle3Config) -> Vec<Problem> {
    let Eagle3Config {
        num_attention_heads: n,
        num_key_value_heads: kv,
        vocab_size: v,
        draft_vocab_size: vd,
        ..
    } = *config;
    let mut problems = Vec::new();
    if !n.is_multiple_of(kv) {
        let what = format!("{n} query heads cannot share {kv} key and value heads");
        problems.push(Problem::error("num_key_value_heads", what, "it has to divide num_attention_heads"));
    }
    if vd > v {
        problems.push(Problem::error(
            "draft_vocab_size",
            format!("{vd} is more than vocab_size, {v}"),
            "correct it",
        ));
    }
    if config.num_aux_hidden_states * config.target_hidden_size == config.hidden_size {
        let what = "the captured states are as wide as the draft: SGLang cannot tell them apart and skips fc";
        problems.push(Problem::error("hidden_size", what, "train a draft of another width"));
    }
    if config.num_hidden_layers > 1 {
        let what = "SGLang before 0.5.14 serves only one layer";
        problems.push(Problem::warning("num_hidden_layers", what, "serve with 0.5.14 or later"));
    }
    problems
}

fn element_type(raw: &Value, target: Option<&TargetConfig>) -> Option<Problem> {
    let Some(dtype) = declared_dtype(raw) else {
        let what = "it is missing, and SGLang then computes in float16";
        return Some(Problem::error("dtype", what, "write the target's, usually bfloat16"));
    };
    match (target, serving_dtype(raw)) {
        (Some(target), got) if got != target.dtype => {
            let what = format!(
                "{dtype} is served as {got}, the target as {}: they do not match in fc",
                target.dtype
            );
            Some(Problem::error("dtype", what, format!("write {}", target.dtype)))
        }
        (None, "float16") => {
            Some(Problem::warning("dtype", format!("{dtype} is served as float16"), "usually it is bfloat16"))
        }
        _ => None,
    }
}

fn rope(raw: &Value) -> Vec<Problem> {
    let modern = raw.get("rope_parameters").and_then(Value::as_object);
    let theta = raw.get("rope_theta").filter(|theta| !theta.is_null());
    let scaling = raw.get("rope_scaling").and_then(Value::as_object);
    let Some(modern) = modern else {
        let missing = Problem::warning("rope_theta", "it is missing, and engines take 10000", "write it");
        return if theta.is_none() { vec![missing] } else { Vec::new() };
    };
    if theta.is_none() {
        let what = "only rope_parameters is given, which SGLang before 0.5.14 does not read";
        return vec![Problem::warning("rope_theta", what, "write rope_theta (and rope_scaling) as well")];
    }
    let own = modern.get("rope_theta");
    let same_theta = own.is_none() || own.and_then(Value::as_f64) == theta.and_then(Value::as_f64);
    if same_theta && rope_type(Some(modern)) == rope_type(scaling) {
        return Vec::new();
    }
    let what =
        "rope_parameters and rope_theta with rope_scaling disagree, and engines differ in what they read";
    vec![Problem::error("rope_parameters", what, "write the same in both forms")]
}

fn rope_type(rope: Option<&Map<String, Value>>) -> &str {
    let key = |key: &str| rope?.get(key)?.as_str();
    key("rope_type").or_else(|| key("type")).filter(|name| *name != "mrope").unwrap_or("default")
}

fn capture_layers(raw: &Value, config: &Eagle3Config, target: Option<&TargetConfig>) -> Vec<Problem> {
    let about = format!("eagle_config.{IDS}");
    let top_level: Option<Vec<u64>> =
        raw.get(IDS).and_then(Value::as_array).map(|ids| ids.iter().filter_map(Value::as_u64).collect());
    let Some(ids) = &config.capture_layers else {
        return default_layers(config, target, &about, top_level.is_some());
    };
    let mut problems = Vec::new();
    if !ids.is_sorted_by(|a, b| a < b) {
        let what = format!("{ids:?} do not ascend, but the states come in the order of the layers");
        problems.push(Problem::error(&about, what, "train with ascending layers"));
    }
    if ids.len() != config.num_aux_hidden_states {
        let what =
            format!("{} layers, but num_aux_hidden_states is {}", ids.len(), config.num_aux_hidden_states);
        problems.push(Problem::error(&about, what, "correct one of them"));
    }
    // What is given as layer inputs is one more than the layer whose output is meant.
    let raw_ids = target.is_some_and(TargetConfig::takes_raw_capture_ids) && ids.first() != Some(&1);
    let outputs: Vec<u64> = ids.iter().map(|&id| (id as u64).saturating_sub(u64::from(raw_ids))).collect();
    if let Some(last) = target.map(|target| target.num_hidden_layers as u64 - 1)
        && outputs.iter().any(|&layer| layer >= last)
    {
        let what = format!("{ids:?} reaches layer {last}, the last one, whose output is never captured");
        problems.push(Problem::error(&about, what, "train with earlier layers"));
    }
    let vllm: Vec<u64> = outputs.iter().map(|layer| layer + 1).collect();
    if top_level.is_none_or(|top_level| top_level != vllm) {
        let what = format!("vLLM reads the top-level key, and counts from 1: expected {vllm:?} there");
        problems.push(Problem::warning(IDS, what, "write both to serve with vLLM"));
    }
    problems
}

/// No ids for SGLang: it captures its three default layers.
fn default_layers(
    config: &Eagle3Config,
    target: Option<&TargetConfig>,
    about: &str,
    top_level: bool,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    if top_level {
        let what = format!("only the top-level {IDS} is given, which SGLang does not capture by");
        problems.push(Problem::error(
            about,
            what,
            "write the layers (counted from 0) into eagle_config as well",
        ));
    }
    if config.num_aux_hidden_states != 3 {
        let what =
            format!("no layers are given, SGLang captures 3, and fc takes {}", config.num_aux_hidden_states);
        problems.push(Problem::error(about, what, "write the layers"));
    }
    if target.is_some_and(|target| target.default_capture_layers().is_none()) {
        let what = "no layers are given, and the target has too few for SGLang's default";
        problems.push(Problem::error(about, what, "write the layers"));
    }
    problems
}

fn against_target(raw: &Value, config: &Eagle3Config, target: &TargetConfig) -> Vec<Problem> {
    let mut problems = Vec::new();
    let context = context_length(raw);
    if context < target.context_length {
        let what = format!(
            "gives a context of {context}, the target has {}: SGLang refuses to start",
            target.context_length
        );
        let fix = format!("write the target's, {}", target.max_position_embeddings);
        problems.push(Problem::error("max_position_embeddings", what, fix));
    }
    if config.vocab_size != target.vocab_size {
        let what = format!("{}, but the target has {}", config.vocab_size, target.vocab_size);
        problems.push(Problem::error("vocab_size", what, "is it a draft for this target?"));
    }
    if config.target_hidden_size != target.hidden_size {
        let key = if raw.get("target_hidden_size").is_some() { "target_hidden_size" } else { "hidden_size" };
        let what = format!(
            "{}, but the target's hidden states have {}",
            config.target_hidden_size, target.hidden_size
        );
        problems.push(Problem::error(key, what, "is it a draft for this target?"));
    }
    problems
}
