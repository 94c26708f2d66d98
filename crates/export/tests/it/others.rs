//! Drafts as the other programs' own code saved them; see tools/golden/others.py.

use std::path::PathBuf;

use serde_json::json;
use specforge_export::{check, read_eagle3, read_eagle3_weights};
use specforge_nn::weights::Weights;
use specforge_testkit::own_case;

fn folder(name: &str) -> PathBuf {
    own_case("others").join(name)
}

#[test]
fn drafts_of_other_programs_are_read_whole() {
    // Folder, captured layers, RoPE type, whether the states and the output are normed.
    for (name, layers, rope, normed) in [
        ("speculators-0.9.0/eagle3-plain", Some(vec![1, 3, 4]), "llama3", true),
        ("speculators-0.3.0/eagle3", None, "default", false),
        ("specforge-0.2.0/hf", None, "llama3", false),
        ("specforge-0.2.0/sglang", None, "llama3", false),
    ] {
        let draft = read_eagle3(&folder(name)).unwrap();
        let config = &draft.config;
        assert_eq!((config.hidden_size, config.head_dim, config.num_key_value_heads), (16, 8, 1), "{name}");
        assert_eq!((config.vocab_size, config.draft_vocab_size), (48, 20), "{name}");
        assert_eq!((config.fc_norm, config.norm_output), (normed, normed), "{name}");
        assert_eq!(config.capture_layers, layers, "{name}");
        let (theta, kind) = (config.rope.get("rope_theta"), config.rope.get("rope_type"));
        assert_eq!((theta, kind), (Some(&json!(5e5)), Some(&json!(rope))), "{name}");
        assert!(draft.departures().is_empty() && draft.window().is_none(), "{name}");
        assert!(config.rms_norm_eps == 1e-5, "{name}");
        // Every tensor of the file, to the byte.
        let file = Weights::open(folder(name)).unwrap();
        assert_eq!(draft.tensors.len(), file.names().count(), "{name}");
        for tensor in file.names() {
            let ours = &draft.tensors[&tensor.replace("layers.0.", "midlayer.")];
            assert_eq!(ours.bytes, file.get(tensor).unwrap().bytes, "{name}: {tensor}");
        }
        let d2t = draft.tensors["d2t"].to_f32();
        let expected: Vec<f32> = (0..20u8).map(|i| f32::from(3 + i)).collect();
        assert_eq!(d2t, expected, "{name}");
    }
}

#[test]
fn what_speculators_defaults_compute_otherwise_is_told() {
    let draft = read_eagle3(&folder("speculators-0.9.0/eagle3-default")).unwrap();
    let how = draft.departures().join(" ");
    assert!(how.contains("norm_before_residual") && how.contains("norm_before_fc"), "{how}");
    assert_eq!(draft.window(), Some(2048));
    let error = read_eagle3(&folder("speculators-0.9.0/eagle3-qwen3")).unwrap_err().to_string();
    assert!(error.contains("k_norm.weight") && error.contains("--draft-arch llama"), "{error}");
}

#[test]
fn a_training_state_of_specforge_has_the_draft_of_its_export() {
    let state = read_eagle3_weights(&folder("specforge-0.2.0/run-step10")).unwrap();
    let export = read_eagle3(&folder("specforge-0.2.0/sglang")).unwrap();
    assert_eq!(state, export.tensors);
}

#[test]
fn exports_of_specforge_are_servable() {
    for name in ["specforge-0.2.0/hf", "specforge-0.2.0/sglang"] {
        let report = check(&folder(name), None);
        assert!(report.is_servable(), "{name}: {:?}", report.errors().collect::<Vec<_>>());
    }
}
