//! The reference tables, the two generations of settings, and what is refused.

use serde_json::{Value, json};
use specforge_tensor::{Device, Params, Tape, Tensor};
use specforge_testkit::{Tensors, assert_close, case_json, golden_case};

use super::RopeConfig;

fn config(rope_scaling: &Value, extra: &Value) -> Value {
    let mut config = json!({ "rope_theta": 10_000.0, "max_position_embeddings": 64, "rope_scaling": rope_scaling });
    for (key, value) in extra.as_object().expect("extra keys") {
        config[key] = value.clone();
    }
    config
}

fn read(config: &Value) -> RopeConfig {
    RopeConfig::from_json(config, 32).unwrap_or_else(|error| panic!("{config}: {error}"))
}

fn message(config: &Value) -> String {
    RopeConfig::from_json(config, 32).expect_err("a wrong setting").to_string()
}

/// A half table twice beside itself, as the references store them.
fn doubled(table: &Tensor) -> Vec<f32> {
    let half = table.rows_cols().1;
    table.f32s().chunks_exact(half).flat_map(|row| [row, row].concat()).collect()
}

#[test]
fn golden_rope_tables() {
    let Some(folder) = golden_case("rope_tables") else { return };
    let (case, expected) = (case_json(&folder), Tensors::read(folder.join("outputs.safetensors")));
    let atol = case["tolerance"]["atol"].as_f64().expect("a tolerance") as f32;
    for entry in case["cases"].as_array().expect("cases") {
        let name = entry["name"].as_str().expect("a name");
        let head_dim = entry["head_dim"].as_u64().expect("a head size") as usize;
        let rope = RopeConfig::from_json(entry, head_dim).unwrap_or_else(|error| panic!("{name}: {error}"));
        if expected.contains(&format!("{name}.position_ids")) {
            golden_three_axes(&rope, &expected, name, head_dim, atol);
            continue;
        }
        let (shape, cos) = expected.f32(&format!("{name}.cos"));
        // The reference's EAGLE3 tables are 20 rows longer than the model's longest sequence.
        let table_len = entry["max_position_embeddings"].as_u64().expect("a length") as usize
            + if name.starts_with("eagle3.") { 20 } else { 0 };
        let inv_freq = expected.f32(&format!("{name}.inv_freq")).1;
        assert_close(&format!("{name}.inv_freq"), &rope.frequencies(table_len), &inv_freq, 0.0, 1e-6);
        let tables = rope.tables(Device::Cpu, table_len);
        let rows = |table: &Tensor| doubled(table)[..shape[0] * shape[1]].to_vec();
        assert_close(&format!("{name}.cos"), &rows(&tables.0), &cos, atol, 0.0);
        assert_close(&format!("{name}.sin"), &rows(&tables.1), &expected.f32(&format!("{name}.sin")).1, atol, 0.0);
        if let Some(factor) = entry["attention_scaling"].as_f64() {
            assert!((rope.attention_factor() - factor).abs() < 1e-9, "{name}: {}", rope.attention_factor());
        }
    }
}

fn golden_three_axes(rope: &RopeConfig, expected: &Tensors, name: &str, head_dim: usize, atol: f32) {
    let (shape, positions) = expected.i64(&format!("{name}.position_ids"));
    let n = *shape.last().expect("positions");
    let positions: Vec<u32> = positions.iter().map(|&p| p as u32).collect();
    let axes: Vec<&[u32]> = positions.chunks_exact(n).collect();
    // Each axis for itself, then the mixture, applied to queries and keys.
    let by_axis: Vec<f32> = axes.iter().flat_map(|axis| doubled(&rope.rows(Device::Cpu, axis, n).0)).collect();
    assert_close(&format!("{name}.cos"), &by_axis, &expected.f32(&format!("{name}.cos")).1, atol, 0.0);
    let (cos, sin) = rope.rows_3d(Device::Cpu, [axes[0], axes[1], axes[2]], n);
    for which in ["q", "k"] {
        let (shape, x) = expected.f32(&format!("{name}.{which}"));
        let wanted = expected.f32(&format!("{name}.{which}_rotated")).1;
        let n_heads = shape[1];
        let params = Params::new();
        let tape = Tape::inference(&params);
        let x = tape.input(Tensor::from_f32(Device::Cpu, x, &[n_heads * n, head_dim]).unwrap());
        let rows = Tensor::from_u32(Device::Cpu, (0..n_heads * n).map(|r| (r % n) as u32).collect());
        let got = tape.rope(&x, head_dim, (&cos, &sin), &rows).unwrap();
        assert_close(&format!("{name}.{which}_rotated"), &got.value().f32s(), &wanted, 4.0 * atol, 1e-6);
    }
}

#[test]
fn both_generations_of_settings_give_the_same() {
    let kinds = [
        json!({ "rope_type": "linear", "factor": 2.0 }),
        json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16 }),
        json!({ "rope_type": "yarn", "factor": 4.0 }),
        json!({ "rope_type": "longrope", "short_factor": vec![1.5; 16], "long_factor": vec![3.0; 16],
                "original_max_position_embeddings": 16 }),
        json!({ "rope_type": "mrope", "mrope_section": [4, 6, 6] }),
    ];
    for kind in kinds {
        let old = read(&config(&kind, &json!({})));
        let mut typed = kind.clone();
        let renamed = typed.as_object_mut().unwrap();
        let name = renamed.remove("rope_type").unwrap();
        renamed.insert("type".to_owned(), name);
        assert_eq!(old, read(&config(&typed, &json!({}))), "{kind}");
        let mut parameters = kind.clone();
        parameters["rope_theta"] = json!(10_000.0);
        let new = read(&json!({ "rope_parameters": parameters, "max_position_embeddings": 64 }));
        assert_eq!(old.frequencies(64), new.frequencies(64), "{kind}");
        assert_eq!(old.attention_factor(), new.attention_factor(), "{kind}");
        // What is written is read as the same again, by readers of either generation.
        let mut written = Value::Object(old.to_json());
        written["max_position_embeddings"] = json!(64);
        assert_eq!(old, read(&written), "{kind}");
        written.as_object_mut().unwrap().remove("rope_parameters");
        assert_eq!(old, read(&written), "{kind}");
    }
}

#[test]
fn present_settings_win_and_old_ones_may_be_null() {
    let both = json!({ "rope_parameters": { "rope_theta": 500.0, "rope_type": "default" }, "rope_theta": 10.0 });
    assert_eq!(read(&both).theta(), 500.0);
    assert_eq!(read(&json!({ "rope_scaling": null })).theta(), 10_000.0);
    let keys = read(&json!({ "rope_theta": 1_000_000 })).to_json();
    let expected = json!({ "rope_parameters": { "rope_theta": 1_000_000, "rope_type": "default" },
                           "rope_theta": 1_000_000, "rope_scaling": null });
    assert_eq!(Value::Object(keys), expected);
}

#[test]
fn partial_rotary_narrows_the_tables() {
    let rope = read(&json!({ "partial_rotary_factor": 0.25 }));
    assert_eq!(rope.tables(Device::Cpu, 5).0.shape(), [5, 4]);
    assert_eq!(rope.frequencies(5), RopeConfig::from_json(&json!({}), 8).unwrap().frequencies(5));
    assert_eq!(rope.to_json()["partial_rotary_factor"], 0.25);
}

#[test]
fn long_sequences_change_dynamic_and_longrope() {
    let dynamic = read(&config(&json!({ "rope_type": "dynamic", "factor": 4.0 }), &json!({})));
    assert_eq!(dynamic.frequencies(64), read(&json!({})).frequencies(1));
    assert!(dynamic.frequencies(65)[15] < dynamic.frequencies(64)[15]);
    let kind = json!({ "rope_type": "longrope", "short_factor": vec![1.0; 16], "long_factor": vec![4.0; 16] });
    let long = read(&config(&kind, &json!({ "original_max_position_embeddings": 16 })));
    assert_eq!(long.frequencies(16), read(&json!({})).frequencies(1));
    assert_eq!(long.frequencies(17)[0], 0.25);
    let expected = (1.0 + 4f64.ln() / 16f64.ln()).sqrt();
    assert!((long.attention_factor() - expected).abs() < 1e-12, "{}", long.attention_factor());
    let (cos, _) = long.tables_for(Device::Cpu, 3, 64);
    assert_eq!(cos.f32s()[16], 0.25f32.cos() * expected as f32);
}

#[test]
fn yarn_follows_its_optional_keys() {
    let yarn = |extra: Value| {
        let mut kind = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512 });
        kind.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        read(&config(&kind, &json!({})))
    };
    let plain = yarn(json!({}));
    assert_eq!(plain.frequencies(1), yarn(json!({ "beta_fast": 32, "beta_slow": 1, "truncate": true })).frequencies(1));
    assert_ne!(plain.frequencies(1), yarn(json!({ "beta_fast": 4 })).frequencies(1));
    assert_ne!(plain.frequencies(1), yarn(json!({ "truncate": false })).frequencies(1));
    assert_eq!(yarn(json!({ "attention_factor": 0.5 })).attention_factor(), 0.5);
    assert_eq!(yarn(json!({ "mscale": 1.0, "mscale_all_dim": 1.0 })).attention_factor(), 1.0);
    assert_eq!(yarn(json!({ "factor": null, "original_max_position_embeddings": 16 })).attention_factor(),
               0.1 * 4f64.ln() + 1.0);
}

#[test]
fn interleaved_axes_take_every_third_frequency() {
    let rope = read(&config(&json!({ "mrope_section": [8, 4, 4], "mrope_interleaved": true }), &json!({})));
    let (cos, _) = rope.rows_3d(Device::Cpu, [&[0], &[1], &[2]], 8);
    let frequencies = rope.frequencies(8);
    let angle = |j: usize| if j < 12 { (j % 3) as f32 } else { 0.0 };
    let wanted: Vec<f32> = frequencies.iter().enumerate().map(|(j, f)| (angle(j) * f).cos()).collect();
    assert_eq!(*cos.f32s(), *wanted);
}

#[test]
fn wrong_settings_are_named() {
    let check = |scaling: Value, expected: &str| {
        let message = message(&config(&scaling, &json!({})));
        assert!(message.contains(expected), "{scaling}: {message}");
    };
    check(json!({ "rope_type": "warped" }), "rope_scaling.rope_type = \"warped\": this kind");
    check(json!({ "rope_type": "warped" }), "default, linear, dynamic, llama3, yarn, longrope, su, mrope");
    check(json!({ "rope_type": 7 }), "rope_scaling.rope_type = \"7\"");
    check(json!({ "rope_type": "linear" }), "rope_scaling.factor = null: expected a number above 0");
    check(json!({ "rope_type": "linear", "factor": -1 }), "rope_scaling.factor = -1: expected a number above 0");
    check(json!({ "rope_type": "longrope", "short_factor": [1.0] }), "short_factor = [1.0]: expected 16 numbers");
    check(json!({ "rope_type": "mrope" }), "mrope_section = null: expected three counts");
    check(json!({ "mrope_section": [1, 2, 3] }), "mrope_section = [1,2,3]: expected three counts with the sum 16");
    check(json!({ "full_attention": {} }), "rope_scaling.full_attention = {}: expected one rotary embedding");
    check(json!("yarn"), "rope_scaling = \"yarn\": expected a table of settings");
    assert!(message(&json!({ "rope_theta": "x" })).contains("rope_theta = \"x\": expected a number above 0"));
    assert!(message(&json!({ "partial_rotary_factor": 0.1 })).contains("an even number of elements"));
    let dynamic = json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } });
    assert!(message(&dynamic).contains("max_position_embeddings = null: expected a number of positions"));
}
