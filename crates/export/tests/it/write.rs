//! Writing a folder: its keys, its tensors, and what is refused.

use serde_json::{Value, json};
use specforge_export::{
    Eagle3Config, Eagle3Export, Error, TargetConfig, Tensor, WriteOptions, check, is_earlier_export,
    read_eagle3, rope_parameters, write_safetensors,
};
use specforge_nn::weights::Dtype;
use specforge_testkit::tempdir;

use crate::draft::{config, eagle31, export, rope, target, tensors};

fn written(
    config: &Eagle3Config,
    target: &Value,
    options: WriteOptions,
) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempdir();
    let out = dir.path().join("out");
    let warnings = export(config, target).write(&out, options).unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    (dir, out)
}

fn config_of(config: &Eagle3Config, target: &Value) -> Value {
    export(config, target).config_json().unwrap()
}

#[test]
fn config_json_has_every_key_that_engines_read() {
    let expected = r#"{
  "architectures": [
    "LlamaForCausalLMEagle3"
  ],
  "attention_bias": false,
  "bos_token_id": 1,
  "draft_vocab_size": 72,
  "dtype": "bfloat16",
  "eos_token_id": [
    2,
    3
  ],
  "fc_norm": true,
  "head_dim": 16,
  "hidden_act": "silu",
  "hidden_size": 48,
  "intermediate_size": 80,
  "max_position_embeddings": 4096,
  "model_type": "llama",
  "norm_output": true,
  "num_attention_heads": 4,
  "num_hidden_layers": 1,
  "num_key_value_heads": 2,
  "pad_token_id": null,
  "rms_norm_eps": 1e-06,
  "rope_parameters": {
    "rope_theta": 1000000,
    "rope_type": "default"
  },
  "rope_scaling": null,
  "rope_theta": 1000000,
  "specforge_version": "VERSION",
  "tie_word_embeddings": false,
  "torch_dtype": "bfloat16",
  "vocab_size": 200
}
"#;
    let (_dir, out) = written(&eagle31(), &target(), WriteOptions::default());
    let text = fs_err::read_to_string(out.join("config.json")).unwrap();
    assert_eq!(text, expected.replace("VERSION", env!("CARGO_PKG_VERSION")));
    let names: Vec<_> = fs_err::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn what_is_written_is_what_is_read_back() {
    for config in [config(), eagle31()] {
        let (_dir, out) =
            written(&config, &target(), WriteOptions { with_embeddings: true, overwrite: false });
        let draft = read_eagle3(&out).unwrap();
        assert_eq!(draft.config, config);
        let mut expected = tensors(&config);
        expected.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(draft.tensors.into_values().collect::<Vec<_>>(), expected);
    }
}

#[test]
fn floats_become_bf16_and_names_ours() {
    let (config, target) = (config(), target());
    let mut export = export(&config, &target);
    for tensor in &mut export.tensors {
        if tensor.dtype == Dtype::BF16 {
            let values: Vec<f32> = tensor.to_f32().iter().map(|value| value + 1e-9).collect();
            *tensor = Tensor::f32(&tensor.name.replace("midlayer", "layers.0"), &tensor.shape, &values);
        }
    }
    let dir = tempdir();
    let out = dir.path().join("out");
    export.write(&out, WriteOptions::default()).unwrap();
    let (_dir, usual) = written(&config, &target, WriteOptions::default());
    let bytes = |folder: &std::path::Path| fs_err::read(folder.join("model.safetensors")).unwrap();
    assert_eq!(bytes(&out), bytes(&usual));
}

#[test]
fn embeddings_are_written_where_they_are_needed() {
    let has = |config: &Eagle3Config, target: &Value, with_embeddings| {
        let (_dir, out) = written(config, target, WriteOptions { with_embeddings, overwrite: false });
        read_eagle3(&out).unwrap().tensors.contains_key("embed_tokens.weight")
    };
    assert!(!has(&config(), &target(), false));
    assert!(has(&config(), &target(), true));
    let narrow = Eagle3Config { target_hidden_size: 64, ..config() };
    let mut wide_target = target();
    wide_target["hidden_size"] = json!(64);
    assert!(has(&narrow, &wide_target, false), "the target's embedding has another width");
    assert_eq!(config_of(&narrow, &wide_target)["target_hidden_size"], 64);
    let mut without = export(&narrow, &wide_target);
    without.tensors.retain(|tensor| tensor.name != "embed_tokens.weight");
    let error = without.write(&tempdir().path().join("out"), WriteOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "tensor embed_tokens.weight: is to be written, but the draft has none");
}

#[test]
fn a_draft_with_the_whole_vocabulary_has_no_map() {
    let whole = Eagle3Config { draft_vocab_size: 200, ..config() };
    let target = target();
    let with_map = |offset| {
        let mut export = export(&whole, &target);
        export.tensors.retain(|tensor| tensor.name != "d2t");
        export.tensors.push(Tensor::i64("d2t", &[offset; 200]));
        export
    };
    let dir = tempdir();
    let out = dir.path().join("out");
    with_map(0).write(&out, WriteOptions::default()).unwrap();
    let names: Vec<String> = read_eagle3(&out).unwrap().tensors.into_keys().collect();
    assert!(!names.iter().any(|name| name == "d2t" || name == "t2d"), "{names:?}");
    let error = with_map(1).write(&out, WriteOptions::default()).unwrap_err();
    assert!(error.to_string().starts_with("tensor d2t: has to be all zeros"), "{error}");
}

#[test]
fn capture_layers_are_written_for_two_engines() {
    let with = |layers: &[usize], architecture: &str| {
        let mut target = target();
        target["architectures"] = json!([architecture]);
        let capture_layers = Some(layers.to_vec());
        let config = Eagle3Config { capture_layers, num_aux_hidden_states: layers.len(), ..config() };
        export(&config, &target).config_json()
    };
    let ids = |layers: &[usize], architecture| {
        let config = with(layers, architecture).unwrap();
        let sglang = config.pointer("/eagle_config/eagle_aux_hidden_state_layer_ids").cloned();
        (sglang, config.get("eagle_aux_hidden_state_layer_ids").cloned())
    };
    let llama = "LlamaForCausalLM";
    assert_eq!(ids(&[1, 5, 8], llama), (None, None), "the default of 12 layers");
    assert_eq!(ids(&[0, 5, 10], llama), (Some(json!([0, 5, 10])), Some(json!([1, 6, 11]))));
    assert_eq!(ids(&[2, 4], llama), (Some(json!([2, 4])), Some(json!([3, 5]))));
    assert_eq!(ids(&[1, 4, 9], "DeepseekV3ForCausalLM"), (Some(json!([1, 4, 9])), Some(json!([2, 5, 10]))));
    assert_eq!(ids(&[2, 4, 9], "DeepseekV3ForCausalLM"), (Some(json!([3, 5, 10])), Some(json!([3, 5, 10]))));
    let refused = |layers: &[usize], architecture| with(layers, architecture).unwrap_err().to_string();
    assert!(refused(&[1, 5, 11], llama).contains("[1, 5, 11] cannot be served: layer 11 is the last one"));
    assert!(refused(&[5, 1, 8], llama).contains("they have to ascend"));
    assert!(refused(&[1, 1, 8], llama).contains("they have to ascend"));
    assert!(refused(&[0, 4, 9], "DeepseekV3ForCausalLM").contains("cannot be told to capture layer 0"));
    let wrong_number = Eagle3Config { capture_layers: Some(vec![2, 4]), ..config() };
    assert!(
        export(&wrong_number, &target())
            .config_json()
            .unwrap_err()
            .to_string()
            .contains("the draft takes 3 states")
    );
    let mut shallow = target();
    shallow["num_hidden_layers"] = json!(6);
    let error = export(&config(), &shallow).config_json().unwrap_err();
    assert!(error.to_string().contains("a target of 6 layers has no default"), "{error}");
}

#[test]
fn rope_follows_the_target_in_both_forms() {
    let table = [
        (json!({"rope_theta": 5e5}), json!({"rope_theta": 5e5, "rope_type": "default"}), Value::Null),
        (json!({}), json!({"rope_theta": 1e4, "rope_type": "default"}), Value::Null),
        (
            json!({"rope_theta": 10, "rope_scaling": {"type": "linear", "factor": 2}}),
            json!({"rope_theta": 10, "rope_type": "linear", "factor": 2}),
            json!({"rope_type": "linear", "factor": 2}),
        ),
        (
            json!({"rope_parameters": {"rope_theta": 10, "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8}}),
            json!({"rope_theta": 10, "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8}),
            json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8}),
        ),
        (
            json!({"rope_theta": 10, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}),
            json!({"rope_theta": 10, "rope_type": "default"}),
            Value::Null,
        ),
        (
            json!({"text_config": {"rope_parameters": {"full_attention": {"rope_theta": 7, "rope_type": "default", "partial_rotary_factor": 0.5}}}}),
            json!({"rope_theta": 7, "rope_type": "default"}),
            Value::Null,
        ),
    ];
    for (target_keys, modern, legacy) in table {
        let draft = Eagle3Config { rope: rope_parameters(&target_keys), ..config() };
        assert_eq!(Value::Object(draft.rope.clone()), modern);
        let written = config_of(&draft, &target());
        assert_eq!((&written["rope_parameters"], &written["rope_scaling"]), (&modern, &legacy));
        assert_eq!(written["rope_theta"], modern["rope_theta"]);
    }
}

#[test]
fn the_context_is_never_shorter_than_the_targets() {
    let mut target = target();
    target["rope_scaling"] = json!({"type": "linear", "factor": 2.5});
    assert_eq!(TargetConfig::parse("t".as_ref(), &target).unwrap().context_length, 10240);
    assert_eq!(config_of(&config(), &target)["max_position_embeddings"], 10240, "plain RoPE in the draft");
    let same = Eagle3Config { rope: rope_parameters(&target), ..config() };
    assert_eq!(config_of(&same, &target)["max_position_embeddings"], 4096);
}

#[test]
fn the_element_type_is_the_one_the_target_is_served_in() {
    let dtype = |declared: Value, model_type: &str| {
        let mut target = target();
        target["torch_dtype"] = declared;
        target["model_type"] = json!(model_type);
        config_of(&config(), &target)["dtype"].clone()
    };
    assert_eq!(dtype(json!("bfloat16"), "llama"), "bfloat16");
    assert_eq!(dtype(json!("float16"), "llama"), "float16");
    assert_eq!(dtype(json!("float32"), "llama"), "float16");
    assert_eq!(dtype(Value::Null, "llama"), "float16");
    assert_eq!(dtype(json!("float32"), "gemma2"), "bfloat16");
}

#[test]
fn what_cannot_be_served_is_not_written() {
    let (target, dir) = (target(), tempdir());
    let out = dir.path().join("out");
    let check = |config: &Eagle3Config, change: &dyn Fn(&mut Vec<Tensor<'static>>), expected: &str| {
        let mut tensors = tensors(config);
        change(&mut tensors);
        let export = Eagle3Export { config: config.clone(), tensors, target: &target };
        let error = export.write(&out, WriteOptions::default()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
    };
    let keep = |_: &mut Vec<Tensor<'static>>| {};
    check(
        &config(),
        &|tensors| tensors.retain(|tensor| tensor.name != "d2t"),
        "nothing was written:\n  error: d2t: it is missing",
    );
    check(
        &config(),
        &|tensors| tensors.retain(|tensor| tensor.name != "norm.weight"),
        "error: norm.weight: it is missing",
    );
    check(
        &config(),
        &|tensors| tensors.push(Tensor::bf16("fc.bias", &[48], &[0.5; 48])),
        "error: fc.bias: engines have no place",
    );
    check(&config(), &|tensors| tensors.push(tensors[0].clone()), "tensor fc.weight: is given twice");
    check(
        &config(),
        &|tensors| tensors[1] = Tensor::bf16("norm.weight", &[48], &[f32::NAN; 48]),
        "48 of its elements are NaN",
    );
    check(
        &config(),
        &|tensors| tensors[1].shape = vec![49],
        "tensor norm.weight: BF16 [49] does not take 96 bytes",
    );
    check(
        &Eagle3Config { vocab_size: 300, ..config() },
        &keep,
        "error: vocab_size: 300, but the target has 200",
    );
    check(
        &Eagle3Config { num_hidden_layers: 2, ..config() },
        &keep,
        "key num_hidden_layers: only drafts of one layer",
    );
    check(&Eagle3Config { norm_before_fc: true, ..config() }, &keep, "key norm_before_fc");
    check(&Eagle3Config { shares_target_head: true, ..config() }, &keep, "key draft_vocab_size");
    check(
        &Eagle3Config { rope: rope(json!({})), ..config() },
        &keep,
        "key rope: needs rope_theta and rope_type",
    );
}

#[test]
fn only_earlier_exports_are_replaced() {
    let (config, target) = (config(), target());
    let (dir, out) = written(&config, &target, WriteOptions::default());
    let write = |overwrite| {
        export(&config, &target).write(&out, WriteOptions { overwrite, ..WriteOptions::default() })
    };
    assert!(is_earlier_export(&out).unwrap());
    write(false).unwrap();

    fs_err::write(out.join("notes.txt"), "mine").unwrap();
    assert!(!is_earlier_export(&out).unwrap());
    let error = write(false).unwrap_err();
    let expected = "the folder is not empty (it has config.json and 2 more) and not an earlier export; \
                    choose another folder, or allow to overwrite it";
    assert_eq!(error.to_string(), format!("{}: {expected}", out.display()));
    assert!(out.join("notes.txt").exists());
    write(true).unwrap();
    assert!(is_earlier_export(&out).unwrap());

    // Somebody else's draft has the same two files.
    fs_err::write(out.join("config.json"), "{}").unwrap();
    assert!(matches!(write(false), Err(Error::Occupied { .. })));
    write(true).unwrap();

    let names: Vec<_> =
        fs_err::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["out"], "nothing is left beside it");
    let file = dir.path().join("file");
    fs_err::write(&file, "").unwrap();
    let error = export(&config, &target).write(&file, WriteOptions::default()).unwrap_err();
    assert!(error.to_string().ends_with("it is a file; give a folder"), "{error}");
    let empty = dir.path().join("empty");
    fs_err::create_dir(&empty).unwrap();
    export(&config, &target).write(&empty, WriteOptions::default()).unwrap();
    assert!(check(&empty, None).is_servable());
}

#[test]
fn a_target_without_the_needed_keys_is_named() {
    let mut target = target();
    target.as_object_mut().unwrap().remove("hidden_size");
    let error = export(&config(), &target).config_json().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the target's config.json: key hidden_size: expected a positive number, got null"
    );
}

#[test]
fn the_writer_gives_the_bytes_of_the_library() {
    let tensors = tensors(&eagle31());
    let dir = tempdir();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    write_safetensors(&ours, &tensors).unwrap();
    let views = tensors.iter().map(|tensor| {
        let dtype = match tensor.dtype {
            Dtype::I64 => safetensors::Dtype::I64,
            Dtype::Bool => safetensors::Dtype::BOOL,
            _ => safetensors::Dtype::BF16,
        };
        (
            &tensor.name,
            safetensors::tensor::TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes).unwrap(),
        )
    });
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into_iter().collect());
    safetensors::serialize_to_file(views, metadata, &theirs).unwrap();
    assert!(fs_err::read(&ours).unwrap() == fs_err::read(&theirs).unwrap());
}
