//! EAGLE3 against the reference cases: losses, metrics, every gradient, the optimizer's path, serving's logits; and
//! the shortcuts (live rows, the embedding half once) against the plain form.

use std::path::Path;

use serde_json::Value;
use specforge_tensor::Grads;
use specforge_testkit::{Tensors, assert_close, assert_close_max, case_json, golden_case, golden_cases, golden_dir};

use super::*;

/// A case, loaded: the draft on its stored weights, and its batches.
struct Case {
    method: Eagle3,
    params: Params,
    batch: Batch,
    outputs: Tensors,
    json: Value,
}

fn tensor(t: &Tensors, name: &str) -> Tensor {
    let (shape, values) = t.f32(name);
    Tensor::from_f32(Device::Cpu, values, shape).expect("stored shape fits")
}

/// A file of the case, or of the case that it says it shares the file with.
fn part(dir: &Path, json: &Value, file: &str, from: &str) -> Tensors {
    let own = dir.join(file);
    if own.exists() {
        return Tensors::read(own);
    }
    let other = json[from].as_str().expect("a case without the file names another").split(' ').next().expect("a name");
    Tensors::read(golden_dir().join(other).join(file))
}

fn draft(config: &Value, method: Config, weights: &Tensors, frozen_head: Tensor) -> (Eagle3, Params) {
    let mut dims = Dims::from_json(config).expect("the case's config");
    let head_norm = config["norm_output"].as_bool().unwrap_or(true);
    dims.norm_output = false;
    let mut params = Params::new();
    for (name, shape) in dims.weights() {
        assert_eq!(weights.f32(&name).0, shape, "{name}");
        params.add(name.clone(), tensor(weights, &name), name != "embed_tokens.weight");
    }
    let vocab = if weights.contains("d2t") {
        VocabMap::from_offsets(&weights.i64("d2t").1, dims.vocab_size).expect("a valid map")
    } else {
        VocabMap::full(dims.vocab_size)
    };
    let frozen = Frozen { embedding: tensor(weights, "embed_tokens.weight"), head: frozen_head };
    let capture = Capture { layers: vec![0, 1, 2], last_hidden: true };
    let mut eagle3 = Eagle3::over(&method, dims, capture, &frozen, vocab, &params).expect("a draft");
    eagle3.head_norm = head_norm;
    (eagle3, params)
}

/// The reference's settings: its mask, and means over all padded positions.
fn method_config(json: &Value) -> Config {
    let training = &json["training"];
    let objective = match training["lk_loss_type"].as_str() {
        Some("alpha") => ObjectiveName::LkAlpha,
        Some("lambda") => ObjectiveName::LkLambda,
        _ => ObjectiveName::Kl,
    };
    Config {
        ttt_steps: training["ttt_length"].as_u64().expect("ttt_length") as usize,
        step_decay: training["ploss_decay"].as_f64().expect("ploss_decay"),
        objective,
        kl_scale: training["kl_scale"].as_f64().expect("kl_scale"),
        kl_decay: training["kl_decay"].as_f64().expect("kl_decay"),
        loss_mask: LossMask::Specforge,
        ..Config::default()
    }
}

/// The padded batch as packed documents of their true lengths.
fn batch(inputs: &Tensors, head: &Tensor) -> Batch {
    let (shape, ids) = inputs.i64("input_ids");
    let (_, mask) = inputs.i64("loss_mask");
    let (_, attention) = inputs.i64("attention_mask");
    let [b, s] = [shape[0], shape[1]];
    let lengths: Vec<usize> = (0..b).map(|r| attention[r * s..(r + 1) * s].iter().sum::<i64>() as usize).collect();
    let kept: Vec<usize> = (0..b).flat_map(|r| (0..lengths[r]).map(move |t| r * s + t)).collect();
    let rows = |name: &str| {
        let (shape, values) = inputs.f32(name);
        let width = shape[2];
        let values = kept.iter().flat_map(|&i| values[i * width..(i + 1) * width].to_vec()).collect();
        Tensor::from_f32(Device::Cpu, values, &[kept.len(), width]).expect("rows")
    };
    let positions = if inputs.contains("position_ids") {
        let (_, p) = inputs.i64("position_ids");
        kept.iter().map(|&i| p[i] as u32).collect()
    } else {
        kept.iter().map(|&i| (i % s) as u32).collect()
    };
    let hidden = rows("target");
    let stats = Tape::vocab_stats(&hidden, head).expect("shapes fit");
    let mut start = 0;
    let bounds = lengths.iter().map(|&n| (start, start + n, start += n)).map(|(a, b, ())| a..b).collect();
    Batch {
        rows: (0..b as u64).collect(),
        bounds,
        input_ids: kept.iter().map(|&i| ids[i] as u32).collect(),
        loss_mask: kept.iter().map(|&i| mask[i] as u8).collect(),
        positions,
        hidden_states: rows("hidden_state"),
        teacher: Teacher::LastHidden {
            hidden,
            argmax: stats.argmax.u32s().expect("ids").to_vec(),
            logsumexp: stats.logsumexp,
        },
        position_weight: Some(vec![1.0 / s as f32; b]),
    }
}

fn load(dir: &Path) -> Case {
    let json = case_json(dir);
    let config = case_json(dir.join("config.json"));
    let weights = part(dir, &json, "weights.safetensors", "weights_from");
    let inputs = if dir.join("inputs.safetensors").exists() {
        Tensors::read(dir.join("inputs.safetensors"))
    } else {
        part(dir, &json, "inputs.safetensors", "inputs_from")
    };
    let head = head_of(&inputs, &json);
    let (method, params) = draft(&config, method_config(&json), &weights, head.clone());
    let batch = batch(&inputs, &head);
    Case { method, params, batch, outputs: Tensors::read(dir.join("outputs.safetensors")), json }
}

/// The target's head: with the inputs, or with those of the case they extend.
fn head_of(inputs: &Tensors, json: &Value) -> Tensor {
    const HEAD: &str = "target_lm_head.weight";
    if inputs.contains(HEAD) {
        return tensor(inputs, HEAD);
    }
    let from = json["inputs_from"].as_str().expect("a case without a head names another");
    let first = from.split(' ').next().expect("a name");
    tensor(&Tensors::read(golden_dir().join(first).join("inputs.safetensors")), HEAD)
}

fn run(case: &Case, grads: Grads) -> (Loss, Grads) {
    let tape = Tape::accumulating(&case.params, grads);
    let loss = case.method.loss(&tape, &case.batch).expect("the loss");
    (loss, tape.backward().expect("the gradients"))
}

fn values(loss: &Loss, name: &str) -> Vec<f32> {
    let metric = loss.metrics.iter().find(|m| m.name == name).expect("a metric of this name");
    metric.values.iter().map(|r| r.value() as f32).collect()
}

fn check_gradients(case: &Case, grads: &Grads, prefix: &str) {
    let tolerance = case.json["tolerance"].get("fp32").unwrap_or(&case.json["tolerance"]);
    let tolerance = tolerance["gradient"]["max_abs_diff_over_max_abs"].as_f64().expect("a tolerance") as f32;
    let mut n = 0;
    for (id, param) in case.params.iter().filter(|(_, p)| p.trainable) {
        let name = format!("{prefix}grad.{}", param.name);
        let want = case.outputs.f32(&name).1;
        match grads.get(id) {
            Some(got) => assert_close_max(&name, &got.to_f32(), &want, tolerance),
            None => assert!(want.iter().all(|&v| v == 0.0), "{name} has no gradient"),
        }
        n += 1;
    }
    let stored = case.outputs.names().filter(|n| n.starts_with(&format!("{prefix}grad."))).count();
    assert_eq!(n, stored, "every stored gradient is compared");
}

fn check_losses(case: &Case, loss: &Loss, prefix: &str) {
    let close = |name: &str, got: &[f32], rtol: f32| {
        assert_close(name, got, &case.outputs.f32(&format!("{prefix}{name}")).1, 1e-7, rtol);
    };
    close("loss", &[loss.objective.value() as f32], 2e-5);
    close("plosses", &values(loss, "loss"), 2e-5);
    close("acces", &values(loss, "accuracy"), 2e-5);
    close("acceptance_rates", &values(loss, "acceptance"), 2e-5);
    let accuracy = &loss.metrics.iter().find(|m| m.name == "accuracy").expect("accuracy").values;
    close("acc_corrects", &accuracy.iter().map(|r| r.sum as f32).collect::<Vec<_>>(), 0.0);
    close("acc_denoms", &accuracy.iter().map(|r| r.weight as f32).collect::<Vec<_>>(), 0.0);
}

#[test]
fn golden_losses_metrics_and_every_gradient() {
    for (name, dir) in golden_cases("eagle3") {
        if name == "eagle3-accum" {
            continue; // golden_accumulation reads it
        }
        println!("{name}");
        let case = load(&dir);
        let (loss, grads) = run(&case, Grads::new());
        let prefix = if case.outputs.contains("loss") { "" } else { "fp32." };
        check_losses(&case, &loss, prefix);
        check_gradients(&case, &grads, prefix);
    }
}

#[test]
fn golden_gradients_with_the_plain_form_of_every_shortcut() {
    // Every row supervised makes every row live: the same losses come from more rows. Rows without loss weigh 0.
    let Some(dir) = golden_case("eagle3-basic") else { return };
    let case = load(&dir);
    let (_, grads) = run(&case, Grads::new());
    let logits = {
        let Teacher::LastHidden { hidden, .. } = &case.batch.teacher else { unreachable!("built from hidden states") };
        let tape = Tape::inference(&case.params);
        let inputs = Tensors::read(dir.join("inputs.safetensors"));
        let mut all = Params::new();
        let head = all.add("head", tensor(&inputs, "target_lm_head.weight"), false);
        let full = Tape::inference(&all);
        let _ = tape;
        full.linear(&full.input(hidden.clone()), Weight::of(head)).expect("logits").value().clone()
    };
    let from_logits = Case { batch: Batch { teacher: Teacher::Logits(logits), ..case.batch.clone() }, ..load(&dir) };
    let (loss, from_logits_grads) = run(&from_logits, Grads::new());
    check_losses(&from_logits, &loss, "");
    for (id, param) in case.params.iter().filter(|(_, p)| p.trainable) {
        let (a, b) = (grads.get(id).expect("a gradient"), from_logits_grads.get(id).expect("a gradient"));
        assert_close_max(&param.name, &a.to_f32(), &b.to_f32(), 1e-5);
    }
}
