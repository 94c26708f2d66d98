//! The exports of the reference, byte for byte, and folders of others that have to pass.

use std::path::Path;

use serde_json::Value;
use specforge_export::{
    Eagle3Export, Severity, TargetConfig, Tensor, WriteOptions, check, read_eagle3, to_json_text,
    write_safetensors,
};
use specforge_nn::weights::Weights;
use specforge_testkit::{case_json, golden_case, golden_cases, tempdir};

/// The real EAGLE3 exports.
fn exports() -> impl Iterator<Item = (String, std::path::PathBuf)> {
    ["exports/qwen3-8b-eagle3", "exports/qwen3-30B-A3B-eagle3.1"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), golden_case(name)?)))
}

/// A target's config.json that fits a golden draft, whose own keys it takes.
fn target_of(draft: &Value) -> Value {
    let mut target = draft.clone();
    target["architectures"] = serde_json::json!(["Qwen3ForCausalLM"]);
    target["model_type"] = serde_json::json!("qwen3");
    target["num_hidden_layers"] = serde_json::json!(36);
    target
}

#[test]
fn golden_tensors_are_rewritten_to_the_same_bytes() {
    let folders = golden_cases("exports/").into_iter().chain(golden_cases("serving/"));
    let mut rewritten = 0;
    for (name, folder) in folders.filter(|(_, folder)| folder.join("model.safetensors").exists()) {
        let weights = Weights::open(&folder).unwrap();
        // Given in the wrong order: the writer has to sort them.
        let mut tensors: Vec<Tensor<'_>> =
            weights.names().map(|name| Tensor::from_view(name, weights.get(name).unwrap())).collect();
        tensors.reverse();
        let dir = tempdir();
        let path = dir.path().join("model.safetensors");
        write_safetensors(&path, &tensors).unwrap();
        let same = fs_err::read(&path).unwrap() == fs_err::read(folder.join("model.safetensors")).unwrap();
        assert!(same, "{name}: other bytes");
        rewritten += 1;
    }
    assert!(rewritten >= 2 || golden_case("exports").is_none(), "{rewritten}");
}

#[test]
fn golden_config_json_is_rewritten_to_the_same_bytes() {
    for (name, folder) in golden_cases("exports/") {
        let path = folder.join("config.json");
        assert_eq!(to_json_text(&case_json(&path)), fs_err::read_to_string(&path).unwrap(), "{name}");
    }
}

#[test]
fn golden_exports_are_reproduced_from_their_parts() {
    for (name, folder) in exports() {
        let draft = read_eagle3(&folder).unwrap();
        let target = target_of(&draft.config_json);
        let export = Eagle3Export {
            config: draft.config,
            tensors: draft.tensors.into_values().collect(),
            target: &target,
        };
        let ours = export.config_json().unwrap();
        for (key, value) in draft.config_json.as_object().unwrap() {
            if !KEYS_NO_ENGINE_READS.contains(&key.as_str()) {
                assert_eq!(&ours[key], value, "{name}: {key}");
            }
        }
        let dir = tempdir();
        let out = dir.path().join("out");
        export.write(&out, WriteOptions::default()).unwrap();
        let bytes = |folder: &Path| fs_err::read(folder.join("model.safetensors")).unwrap();
        assert!(bytes(&out) == bytes(&folder), "{name}: other bytes");
    }
}

/// Keys that are there only because the configuration class of the reference has them.
const KEYS_NO_ENGINE_READS: [&str; 9] = [
    "attention_dropout",
    "initializer_range",
    "max_window_layers",
    "mlp_bias",
    "pretraining_tp",
    "sliding_window",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
];

#[test]
fn golden_folders_pass_the_check() {
    for (name, folder) in exports().chain(golden_cases("serving/")) {
        let report = check(&folder, None);
        assert!(report.is_servable(), "{name}: {:#?}", report.problems);
        assert!(report.tensors >= 14 && report.elements > report.tensors, "{name}: {report:?}");
        let warned: Vec<&str> = report.problems.iter().map(|problem| problem.about.as_str()).collect();
        // The reference wrote the first two before it had built a map; the third holds expected values.
        let unexpected = |about: &&&str| !["d2t", "t2d", "expected.safetensors"].contains(about);
        assert_eq!(warned.iter().find(unexpected), None, "{name}: {:#?}", report.problems);
    }
}

#[test]
fn golden_drafts_of_other_kinds_are_told_apart() {
    for name in ["qwen3-8b-peagle", "qwen3-8b-dflash", "qwen3-8b-dspark", "qwen3-8b-domino"] {
        let Some(folder) = golden_case(&format!("exports/{name}")) else { return };
        let report = check(&folder, None);
        let architecture = report.errors().find(|problem| problem.about == "architectures");
        assert_eq!(architecture.map(|problem| problem.severity), Some(Severity::Error), "{name}: {report:?}");
    }
}

#[test]
fn golden_targets_are_understood_in_both_forms() {
    for (name, folder) in golden_cases("targets/") {
        let parse = |file: &str| {
            let path = folder.join(file);
            TargetConfig::parse(&path, &case_json(&path)).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let (old, new) = (parse("config.json"), parse("config.v5.json"));
        // SGLang's rule gives longer contexts only for these two types, and not where each kind of
        // attention has its own: that of gemma3.
        let longer = ["linear", "dynamic"].contains(&new.rope["rope_type"].as_str().unwrap());
        let factor = new.rope.get("factor").filter(|_| longer && !new.architecture.starts_with("Gemma3"));
        let expected =
            (new.max_position_embeddings as f64 * factor.map_or(1.0, |f| f.as_f64().unwrap())) as usize;
        assert_eq!((old.context_length, new.context_length), (expected, expected), "{name}");
        // Newer files also fill in what was in other keys, or implied.
        let ours =
            |target: &TargetConfig| (target.rope["rope_theta"].as_f64(), target.rope["rope_type"].clone());
        assert_eq!(ours(&old), ours(&new), "{name}");
        assert_eq!((old.dtype, &old.eos_token_id), (new.dtype, &new.eos_token_id), "{name}");
    }
}
