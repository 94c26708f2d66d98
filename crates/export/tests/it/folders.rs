//! Folders as others write them: other names, several files, other formats.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use specforge_export::{Eagle3Folder, Tensor, WriteOptions, check, read_eagle3, write_safetensors};
use specforge_testkit::tempdir;

use crate::draft::{eagle31, export, target};

/// Our own export, to be written in another way.
fn ours(dir: &Path) -> (PathBuf, Eagle3Folder) {
    let out = dir.join("out");
    export(&eagle31(), &target()).write(&out, WriteOptions::default()).unwrap();
    let draft = read_eagle3(&out).unwrap();
    (out, draft)
}

/// The tensors of `draft` under other names.
fn renamed(draft: &Eagle3Folder, rename: impl Fn(&str) -> String) -> Vec<Tensor<'static>> {
    draft.tensors.values().map(|tensor| Tensor { name: rename(&tensor.name), ..tensor.clone() }).collect()
}

#[test]
fn names_of_other_programs_are_understood() {
    let forms: [&dyn Fn(&str) -> String; 3] = [
        &|name| name.replace("midlayer.", "layers.0."),
        &|name| {
            name.replace("fc_norm.0.", "aux_norm_low.")
                .replace("fc_norm.1.", "aux_norm_mid.")
                .replace("fc_norm.2.", "aux_norm_high.")
        },
        &|name| {
            if name.contains("layer") {
                format!("model.{}", name.replace("midlayer.", "layers.0."))
            } else {
                name.to_owned()
            }
        },
    ];
    for (i, form) in forms.into_iter().enumerate() {
        let dir = tempdir();
        let (out, draft) = ours(dir.path());
        write_safetensors(&out.join("model.safetensors"), &renamed(&draft, form)).unwrap();
        assert_eq!(read_eagle3(&out).unwrap().tensors, draft.tensors, "form {i}");
        assert!(check(&out, None).is_servable(), "form {i}: {:?}", check(&out, None));
    }
}

#[test]
fn shards_and_single_files_of_other_names_are_read() {
    let dir = tempdir();
    let (out, draft) = ours(dir.path());
    let tensors = renamed(&draft, str::to_owned);
    let (first, second) = tensors.split_at(7);
    fs_err::remove_file(out.join("model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (file, part) in [("a.safetensors", first), ("b.safetensors", second)] {
        write_safetensors(&out.join(file), part).unwrap();
        map.extend(part.iter().map(|tensor| (tensor.name.clone(), json!(file))));
    }
    let index = out.join("model.safetensors.index.json");
    fs_err::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    assert_eq!(read_eagle3(&out).unwrap().tensors, draft.tensors);
    assert!(check(&out, None).problems.is_empty(), "{:?}", check(&out, None));

    fs_err::remove_file(&index).unwrap();
    fs_err::remove_file(out.join("b.safetensors")).unwrap();
    write_safetensors(&out.join("a.safetensors"), &tensors).unwrap();
    assert_eq!(read_eagle3(&out).unwrap().tensors, draft.tensors);
    let report = check(&out, None);
    assert!(report.is_servable() && report.problems[0].about == "a.safetensors", "{report:?}");
}

#[test]
fn the_config_of_other_programs_is_understood() {
    let dir = tempdir();
    let (out, draft) = ours(dir.path());
    let mut config = draft.config_json.clone();
    let keys = config.as_object_mut().unwrap();
    for key in ["rope_parameters", "dtype", "head_dim", "num_key_value_heads", "rms_norm_eps", "fc_norm"] {
        keys.remove(key);
    }
    keys.insert("use_aux_norm".to_owned(), json!(true));
    keys.insert("num_attention_heads".to_owned(), json!(4));
    fs_err::write(out.join("config.json"), config.to_string()).unwrap();
    // Four heads of 12 instead of 16, and four for keys: other shapes than in the file, and said so.
    let error = read_eagle3(&out).unwrap_err().to_string();
    assert!(
        error.contains("midlayer.self_attn.q_proj.weight has shape [64, 96], expected [48, 96]"),
        "{error}"
    );
    config["head_dim"] = json!(16);
    config["num_key_value_heads"] = json!(2);
    fs_err::write(out.join("config.json"), config.to_string()).unwrap();
    assert_eq!(read_eagle3(&out).unwrap().config, draft.config);
}

#[test]
fn what_is_not_this_draft_is_refused() {
    let dir = tempdir();
    let (out, draft) = ours(dir.path());
    let save = |tensors: &[Tensor<'_>]| write_safetensors(&out.join("model.safetensors"), tensors).unwrap();
    let refusal = || read_eagle3(&out).unwrap_err().to_string();

    let mut tensors = renamed(&draft, str::to_owned);
    tensors.push(Tensor::bf16("extra.weight", &[1], &[1.0]));
    save(&tensors);
    assert!(refusal().starts_with("tensor extra.weight: in "), "{}", refusal());
    *tensors.last_mut().unwrap() = Tensor::bf16("layers.0.hidden_norm.weight", &[48], &[1.0; 48]);
    save(&tensors);
    assert!(refusal().contains(
        "midlayer.hidden_norm.weight: is the same as layers.0.hidden_norm.weight under another name"
    ));
    *tensors.last_mut().unwrap() = Tensor::bf16("midlayer.self_attn.rotary_emb.inv_freq", &[8], &[1.0; 8]);
    save(&tensors);
    assert_eq!(read_eagle3(&out).unwrap().tensors, draft.tensors);
    tensors.truncate(3);
    save(&tensors);
    assert!(refusal().contains("is missing in"), "{}", refusal());

    fs_err::write(out.join("config.json"), "{").unwrap();
    assert!(refusal().contains("config.json: not valid JSON"), "{}", refusal());
    for (key, value, expected) in [
        ("hidden_size", json!("48"), "key hidden_size: expected a positive number, got \"48\""),
        ("hidden_size", json!(0), "key hidden_size: expected a positive number, got 0"),
        (
            "hidden_size",
            json!(u64::MAX),
            "key hidden_size: expected a positive number, got 18446744073709551615",
        ),
        ("num_hidden_layers", json!(1025), "key num_hidden_layers: expected at most 1024, got 1025"),
        (
            "eagle_config",
            json!({"eagle_aux_hidden_state_layer_ids": [u64::MAX]}),
            "expected a list of layers, got [",
        ),
        ("vocab_size", Value::Null, "key vocab_size: is missing"),
        ("fc_norm", json!("yes"), "key fc_norm: expected true or false, got \"yes\""),
        ("rms_norm_eps", json!(-1), "key rms_norm_eps: expected a positive number, got -1"),
        ("eagle_config", json!({"eagle_aux_hidden_state_layer_ids": 3}), "expected a list of layers, got 3"),
    ] {
        let mut config = draft.config_json.clone();
        config[key] = value;
        fs_err::write(out.join("config.json"), config.to_string()).unwrap();
        assert!(refusal().contains(expected), "{}", refusal());
    }
}
