//! One mutation of a good folder at a time, and the problem that has to be named.

use serde_json::{Value, json};
use specforge_export::{
    Eagle3Config, Eagle3Folder, Report, Severity, Tensor, WriteOptions, check, read_eagle3, to_json_text,
    write_safetensors,
};
use specforge_testkit::tempdir;

use crate::draft::{config, eagle31, export, target};

/// A good draft, changed, and checked against its target.
fn checked(config: &Eagle3Config, change: impl FnOnce(&mut Value, &mut Vec<Tensor<'static>>)) -> Report {
    checked_with(config, &target(), change)
}

fn checked_with(
    config: &Eagle3Config,
    target: &Value,
    change: impl FnOnce(&mut Value, &mut Vec<Tensor<'static>>),
) -> Report {
    let dir = tempdir();
    let out = dir.path().join("out");
    export(config, &crate::draft::target()).write(&out, WriteOptions::default()).unwrap();
    let Eagle3Folder { mut config_json, tensors, .. } = read_eagle3(&out).unwrap();
    let mut tensors: Vec<Tensor<'static>> = tensors.into_values().collect();
    change(&mut config_json, &mut tensors);
    fs_err::write(out.join("config.json"), to_json_text(&config_json)).unwrap();
    write_safetensors(&out.join("model.safetensors"), &tensors).unwrap();
    let target_path = dir.path().join("target.json");
    fs_err::write(&target_path, target.to_string()).unwrap();
    check(&out, Some(&target_path))
}

/// Asserts that exactly one problem was found, of this severity, about this, saying this.
fn expect_only(report: &Report, severity: Severity, about: &str, what: &str) {
    let found: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
    assert_eq!(found.len(), 1, "{about}: {found:#?}");
    let problem = &report.problems[0];
    assert_eq!((problem.severity, problem.about.as_str()), (severity, about), "{found:?}");
    assert!(found[0].contains(what), "{about}: {found:?} does not say {what:?}");
    assert_eq!(report.is_servable(), severity == Severity::Warning);
}

fn find<'a>(tensors: &'a mut [Tensor<'static>], name: &str) -> &'a mut Tensor<'static> {
    tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
}

#[test]
fn a_good_folder_has_no_problem() {
    for config in [config(), eagle31()] {
        let report = checked(&config, |_, _| {});
        assert!(report.problems.is_empty(), "{report:?}");
        assert_eq!(report.config, Some(config));
    }
}

/// Keys set to another value, or removed (null), in a folder and against a target that are otherwise fine.
#[test]
fn wrong_keys_are_named() {
    use Severity::{Error, Warning};
    let ids = "eagle_config.eagle_aux_hidden_state_layer_ids";
    let own_ids = |ids: Value| json!({"eagle_aux_hidden_state_layer_ids": ids});
    let removed = Value::Null;
    let table: &[(&str, Value, Severity, &str, &str)] = &[
        ("architectures", json!(["LlamaForCausalLMEagle"]), Error, "architectures", "EAGLE-1"),
        ("architectures", json!(["PEagleDraftModel"]), Error, "architectures", "P-EAGLE"),
        ("architectures", json!(["Eagle3DeepseekV2ForCausalLM"]), Error, "architectures", "latent attention"),
        ("architectures", removed.clone(), Error, "architectures", "got null"),
        ("speculators_model_type", json!("eagle3"), Error, "speculators_model_type", "speculators format"),
        ("tie_word_embeddings", json!(true), Error, "tie_word_embeddings", "ignores lm_head.weight"),
        ("bias", json!(true), Error, "bias", "that no file fills"),
        ("attention_bias", json!(true), Error, "attention_bias", "that no file fills"),
        ("norm_before_residual", json!(true), Error, "norm_before_residual", "another model"),
        ("quantization_config", json!({"quant_method": "fp8"}), Error, "quantization_config", "not"),
        ("hidden_act", json!("gelu"), Error, "hidden_act", "expected silu, got gelu"),
        ("hidden_act", removed.clone(), Warning, "hidden_act", "missing"),
        ("model_type", json!("llama4_text"), Warning, "model_type", "expected llama"),
        ("head_dim", json!("16"), Error, "config.json", "key head_dim: expected a positive number"),
        ("hidden_size", removed.clone(), Error, "config.json", "key hidden_size: is missing"),
        ("dtype", json!("float32"), Error, "dtype", "served as float16, the target as bfloat16"),
        (
            "max_position_embeddings",
            json!(2048),
            Error,
            "max_position_embeddings",
            "write the target's, 4096",
        ),
        ("max_position_embeddings", removed.clone(), Error, "max_position_embeddings", "context of 2048"),
        ("rope_theta", json!(10000), Error, "rope_parameters", "disagree"),
        ("rope_scaling", json!({"type": "yarn", "factor": 2}), Error, "rope_parameters", "disagree"),
        ("rope_theta", removed.clone(), Warning, "rope_theta", "only rope_parameters is given"),
        ("eagle_aux_hidden_state_layer_ids", json!([2, 6, 9]), Error, ids, "only the top-level"),
        ("eagle_config", own_ids(json!([1, 5, 11])), Error, ids, "reaches layer 11, the last one"),
        ("eagle_config", own_ids(json!([5, 1, 8])), Error, ids, "do not ascend"),
        (
            "eagle_config",
            own_ids(json!([0, 5, 8])),
            Warning,
            "eagle_aux_hidden_state_layer_ids",
            "expected [1, 6, 9] there",
        ),
    ];
    for (key, value, severity, about, what) in table {
        let mut report = checked(&config(), |config, _| {
            let keys = config.as_object_mut().unwrap();
            keys.insert((*key).to_owned(), value.clone());
            if value.is_null() {
                keys.remove(*key);
            }
        });
        // Ids for SGLang alone also bring the warning that vLLM reads others.
        if report.problems.len() == 2 && *key == "eagle_config" {
            assert_eq!(report.problems.remove(1).severity, Warning);
        }
        expect_only(&report, *severity, about, what);
    }
}

#[test]
fn keys_that_change_shapes_are_named_with_the_tensor() {
    let table = [
        ("draft_vocab_size", json!(71), "lm_head.weight", "shape [72, 48], expected [71, 48]"),
        (
            "intermediate_size",
            json!(96),
            "midlayer.mlp.down_proj.weight",
            "shape [48, 80], expected [48, 96]",
        ),
        (
            "num_attention_heads",
            json!(6),
            "midlayer.self_attn.q_proj.weight",
            "shape [64, 96], expected [96, 96]",
        ),
        ("num_key_value_heads", json!(3), "num_key_value_heads", "4 query heads cannot share 3"),
        ("num_hidden_layers", json!(2), "layers.1.self_attn.q_proj.weight", "it is missing"),
        ("num_aux_hidden_states", json!(4), "fc.weight", "expected [48, 192]"),
        ("target_hidden_size", json!(16), "hidden_size", "SGLang cannot tell them apart"),
        ("target_hidden_size", json!(16), "target_hidden_size", "16, but the target's hidden states have 48"),
        ("target_hidden_size", json!(16), "embed_tokens.weight", "it is missing"),
        ("draft_vocab_size", json!(201), "draft_vocab_size", "201 is more than vocab_size, 200"),
        ("vocab_size", json!(201), "vocab_size", "201, but the target has 200"),
        ("norm_before_fc", json!(true), "input_norm.weight", "it is missing (shape [144])"),
        ("fc_norm", json!(true), "fc_norm.2.weight", "it is missing (shape [48])"),
    ];
    for (key, value, about, what) in table {
        let report = checked(&config(), |config, _| config[key] = value);
        let found = report.errors().find(|problem| problem.about == about && problem.what.contains(what));
        assert!(found.is_some(), "{key}: {:#?}", report.problems);
    }
    let report = checked(&eagle31(), |config, _| drop(config.as_object_mut().unwrap().remove("fc_norm")));
    assert_eq!(report.errors().count(), 3, "{report:?}");
    assert!(report.errors().all(|problem| problem.fix.contains("write fc_norm: true")));
    let report =
        checked(&config(), |config, _| drop(config.as_object_mut().unwrap().remove("draft_vocab_size")));
    assert!(
        report
            .errors()
            .any(|problem| problem.about == "draft_vocab_size" && problem.what.contains("AttributeError"))
    );
    let report = checked(&config(), |config, _| config["draft_vocab_size"] = Value::Null);
    assert!(
        report.problems.iter().any(|problem| problem.what.contains("the target's head is used")),
        "{report:?}"
    );
    let report = checked(&config(), |config, _| {
        config["dtype"] = Value::Null;
        config["torch_dtype"] = Value::Null;
    });
    expect_only(&report, Severity::Error, "dtype", "SGLang then computes in float16");
}

#[test]
fn ids_that_are_taken_as_inputs_are_understood() {
    let with = |ids: Value, top: Value, architecture: &str| {
        let mut target = target();
        target["architectures"] = json!([architecture]);
        checked_with(&config(), &target, |config, _| {
            config["eagle_config"] = json!({"eagle_aux_hidden_state_layer_ids": ids});
            config["eagle_aux_hidden_state_layer_ids"] = top;
        })
    };
    // Inputs of layers 3, 6 and 11 are outputs of 2, 5 and 10; of another family 11 is the last layer's output.
    let good = with(json!([3, 6, 11]), json!([3, 6, 11]), "DeepseekV3ForCausalLM");
    assert!(good.problems.is_empty(), "{good:?}");
    assert!(!with(json!([3, 6, 11]), json!([4, 7, 12]), "LlamaForCausalLM").is_servable());
    let mut target = target();
    target["num_hidden_layers"] = json!(6);
    let report = checked_with(&config(), &target, |_, _| {});
    expect_only(
        &report,
        Severity::Error,
        "eagle_config.eagle_aux_hidden_state_layer_ids",
        "too few for SGLang's default",
    );
}

type Mutation = fn(&mut Vec<Tensor<'static>>);

/// Asserts that each mutation of the tensors alone brings exactly its problem.
fn expect_each(table: &[(Mutation, Severity, &str, &str)]) {
    for (mutate, severity, about, what) in table {
        expect_only(&checked(&config(), |_, tensors| mutate(tensors)), *severity, about, what);
    }
}

#[test]
fn missing_and_unknown_tensors_are_named() {
    use Severity::{Error, Warning};
    let table: &[(Mutation, Severity, &str, &str)] = &[
        (|t| t.retain(|t| t.name != "fc.weight"), Error, "fc.weight", "it is missing (shape [48, 144])"),
        (
            |t| t.retain(|t| t.name != "lm_head.weight"),
            Error,
            "lm_head.weight",
            "engines leave it uninitialised",
        ),
        (|t| t.retain(|t| t.name != "d2t"), Error, "d2t", "draft ids are taken for target ids"),
        (|t| t.push(Tensor::bf16("fc.bias", &[48], &[1.0; 48])), Error, "fc.bias", "has a bias"),
        (
            |t| t.push(Tensor::bf16("what.weight", &[1], &[1.0])),
            Error,
            "what.weight",
            "ignores it without a word",
        ),
        (
            |t| t.push(Tensor::bf16("old_d2t", &[1], &[1.0])),
            Error,
            "old_d2t",
            "takes every name with d2t in it",
        ),
        (|t| t.push(Tensor::bf16("mask_hidden", &[1], &[1.0])), Error, "mask_hidden", "P-EAGLE"),
        (
            |t| t.push(Tensor::bf16("input_norm.weight", &[1], &[1.0])),
            Error,
            "input_norm.weight",
            "norm_before_fc: true",
        ),
        (|t| t.push(Tensor::bf16("x.inv_freq", &[1], &[1.0])), Error, "x.inv_freq", "rename or remove it"),
        (
            |t| t.push(Tensor::bf16("midlayer.self_attn.rotary_emb.inv_freq", &[1], &[1.0])),
            Warning,
            "midlayer.self_attn.rotary_emb.inv_freq",
            "compute it themselves",
        ),
        (
            |t| t.push(Tensor::bf16("layers.0.hidden_norm.weight", &[48], &[1.0; 48])),
            Error,
            "midlayer.hidden_norm.weight",
            "the same as layers.0.hidden_norm.weight under another name",
        ),
    ];
    expect_each(table);
    let prefixed = checked(&config(), |_, tensors| {
        for tensor in tensors {
            tensor.name = format!("draft_model.{}", tensor.name);
        }
    });
    assert!(
        prefixed.errors().any(|problem| problem.fix == "remove draft_model. in front of the name"),
        "{prefixed:?}"
    );
}

#[test]
fn wrong_types_shapes_and_values_are_named() {
    use Severity::{Error, Warning};
    expect_each(&[
        (
            |t| *find(t, "norm.weight") = Tensor::f32("norm.weight", &[48], &[1.0; 48]),
            Warning,
            "norm.weight",
            "type F32",
        ),
        (
            |t| *find(t, "norm.weight") = Tensor::i64("norm.weight", &[1; 48]),
            Error,
            "norm.weight",
            "type I64, expected BF16",
        ),
        (
            |t| *find(t, "norm.weight") = Tensor::bf16("norm.weight", &[40], &[1.0; 40]),
            Error,
            "norm.weight",
            "shape [40]",
        ),
        (
            |t| *find(t, "norm.weight") = Tensor::bf16("norm.weight", &[48], &[f32::INFINITY; 48]),
            Error,
            "norm.weight",
            "48 of its elements are NaN or infinite",
        ),
        (
            |t| *find(t, "lm_head.weight") = Tensor::bf16("lm_head.weight", &[72, 48], &[0.0; 72 * 48]),
            Error,
            "lm_head.weight",
            "all its elements are zero",
        ),
        (
            |t| {
                let o_proj = find(t, "midlayer.self_attn.o_proj.weight");
                *o_proj = Tensor::bf16(&o_proj.name, &o_proj.shape, &[0.0; 48 * 64]);
            },
            Warning,
            "midlayer.self_attn.o_proj.weight",
            "all its elements are zero",
        ),
        (
            |t| *find(t, "norm.weight") = Tensor::bf16("norm.weight", &[48], &[1e20; 48]),
            Warning,
            "norm.weight",
            "largest element is",
        ),
    ]);
}

#[test]
fn wrong_maps_are_named() {
    use Severity::{Error, Warning};
    let good: Vec<i64> = (0..108).filter(|id| id % 3 < 2).zip(0..).map(|(id, draft)| id - draft).collect();
    let absolute: Vec<i64> = good.iter().zip(0..).map(|(offset, draft)| offset + draft + 60).collect();
    let edit = |at: usize, value| {
        let mut map = good.clone();
        map[at] = value;
        map
    };
    let mut swapped = good.clone();
    (swapped[0], swapped[1]) = (good[1] + 1, good[0] - 1);
    let table: &[(Vec<i64>, Severity, &str)] = &[
        (edit(71, 200), Error, "draft id 71 becomes target id 271, outside 0..200"),
        (edit(0, -1), Error, "draft id 0 becomes target id -1, outside 0..200; build the map again"),
        (edit(0, i64::MAX), Error, "outside 0..200"),
        (edit(70, i64::MAX), Error, "outside 0..200"),
        (absolute, Error, "these look like target ids: subtract the draft id"),
        (edit(1, -1), Error, "two draft ids become target id 0"),
        (swapped, Warning, "the target ids do not ascend"),
        (edit(71, 100), Error, "marks 72 target ids, and not the 72 that d2t leads to"),
    ];
    for (map, severity, what) in table {
        let report = checked(&config(), |_, tensors| *find(tensors, "d2t") = Tensor::i64("d2t", map));
        let text: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
        assert!(text.iter().any(|text| text.contains(what)), "{what}: {text:?}");
        assert_eq!(report.is_servable(), *severity == Warning, "{what}: {text:?}");
    }
    let never_set = checked(&config(), |_, tensors| {
        *find(tensors, "d2t") = Tensor::i64("d2t", &[0; 72]);
        *find(tensors, "t2d") = Tensor::bool("t2d", &[true; 200]);
    });
    assert!(never_set.is_servable() && never_set.problems.len() == 2, "{never_set:?}");
    let no_mask = checked(&config(), |_, tensors| tensors.retain(|tensor| tensor.name != "t2d"));
    assert!(no_mask.problems.is_empty(), "{no_mask:?}");
    let float_map =
        checked(&config(), |_, tensors| *find(tensors, "d2t") = Tensor::f32("d2t", &[72], &[0.0; 72]));
    expect_only(&float_map, Error, "d2t", "type F32, expected I64");
}

#[test]
fn a_map_over_the_whole_vocabulary_is_a_warning() {
    let whole = Eagle3Config { draft_vocab_size: 200, ..config() };
    let dir = tempdir();
    let out = dir.path().join("out");
    let target = target();
    let mut draft = export(&whole, &target);
    draft.tensors.retain(|tensor| tensor.name != "d2t");
    draft.write(&out, WriteOptions::default()).unwrap();
    assert!(check(&out, None).problems.is_empty());
    let mut tensors: Vec<Tensor<'static>> = read_eagle3(&out).unwrap().tensors.into_values().collect();
    tensors.push(Tensor::i64("d2t", &[0; 200]));
    write_safetensors(&out.join("model.safetensors"), &tensors).unwrap();
    expect_only(&check(&out, None), Severity::Warning, "d2t", "the draft has the whole vocabulary");
}

#[test]
fn files_in_the_way_are_named() {
    let dir = tempdir();
    let out = dir.path().join("out");
    export(&config(), &target()).write(&out, WriteOptions::default()).unwrap();
    let file = out.join("optimizer.safetensors");
    let expect = |stray: &str, severity, what: &str| {
        write_safetensors(&file, &[Tensor::bf16(stray, &[48], &[1.0; 48])]).unwrap();
        expect_only(&check(&out, None), severity, "optimizer.safetensors", what);
    };
    expect("unrelated", Severity::Warning, "has no use for its tensors");
    expect("my_d2t", Severity::Error, "takes my_d2t from one file or the other");
    expect("model.norm.weight", Severity::Error, "takes model.norm.weight from one file or the other");
    fs_err::write(&file, "").unwrap();
    expect_only(&check(&out, None), Severity::Error, "optimizer.safetensors", "and fails: ");
    let index = |file: &str| json!({"weight_map": {"norm.weight": file}}).to_string();
    fs_err::write(out.join("model.safetensors.index.json"), index("model.safetensors")).unwrap();
    expect_only(&check(&out, None), Severity::Warning, "optimizer.safetensors", "does not name it");
    fs_err::write(out.join("model.safetensors.index.json"), index("optimizer.safetensors")).unwrap();
    expect_only(&check(&out, None), Severity::Error, "model.safetensors", "while others read it first");
}

#[test]
fn unreadable_folders_are_problems_too() {
    let dir = tempdir();
    let out = dir.path().join("out");
    let texts =
        |report: &Report| report.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    let report = check(&out, None);
    assert_eq!(report.errors().count(), 2, "{report:?}");
    export(&config(), &target()).write(&out, WriteOptions::default()).unwrap();
    let weights = out.join("model.safetensors");
    let bytes = fs_err::read(&weights).unwrap();
    fs_err::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    assert!(texts(&check(&out, None)).contains("the file is cut off, download it again"));
    fs_err::rename(&weights, out.join("pytorch_model.bin")).unwrap();
    assert!(texts(&check(&out, None)).contains("not a zip archive, as torch.save writes"));
    let report = check(&out, Some(&dir.path().join("no target")));
    assert!(texts(&report).starts_with("error: the target: "), "{}", texts(&report));
}
