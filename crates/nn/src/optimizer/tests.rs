use specforge_tensor::{Device, Tape};
use specforge_testkit::{Lcg, Tensors, assert_close, case_json, golden_case};

use super::*;

/// Gradients as a backward pass leaves them: looking up every row of a table hands its gradient through.
fn grads_of(params: &Params, grads: &[(ParamId, Tensor)]) -> Grads {
    let tape = Tape::recording(params);
    let seeds = grads.iter().map(|(id, grad)| {
        let (rows, cols) = grad.rows_cols();
        let index = Tensor::from_u32(Device::Cpu, (0..rows as u32).collect());
        (tape.embedding(*id, &index).unwrap(), grad.reshape(&[rows, cols]).unwrap())
    });
    let seeds = seeds.collect();
    tape.backward_from(seeds).unwrap()
}

/// One step, and its report.
fn stepped(optimizer: &mut AdamW, params: &mut Params, grads: &Grads, weight: f64, lr: f64) -> StepReport {
    optimizer.step(params, grads, weight, lr).unwrap().wait().unwrap()
}

fn tensor(values: Vec<f32>, shape: &[usize]) -> Tensor {
    Tensor::from_f32(Device::Cpu, values, shape).unwrap()
}

fn from_golden(file: &Tensors, name: &str) -> Tensor {
    let (shape, values) = file.f32(name);
    tensor(values, shape)
}

const NAMES: [&str; 3] = ["a.weight", "b.weight", "c.weight"];

#[test]
fn golden_optimizer_states_and_parameters_agree_after_every_step() {
    let Some(dir) = golden_case("optimizer") else { return };
    let case = case_json(&dir);
    let tolerance = |key: &str| case["tolerance"][key].as_f64().unwrap() as f32;
    let (atol, rtol) = (tolerance("atol"), tolerance("rtol"));
    let inputs = Tensors::read(dir.join("inputs.safetensors"));
    let outputs = Tensors::read(dir.join("outputs.safetensors"));
    for run in case["runs"].as_array().unwrap() {
        let name = run["name"].as_str().unwrap();
        let bf16 = run["param_dtype"] == "bfloat16";
        let dtype = if bf16 { DType::Bf16 } else { DType::F32 };
        let mut params = Params::new();
        let ids = NAMES
            .map(|n| params.add(n, from_golden(&inputs, &format!("init.{n}")).cast(dtype).unwrap(), true));
        let config = AdamWConfig {
            lr: run["lr"].as_f64().unwrap(),
            eps: run["eps"].as_f64().unwrap(),
            weight_decay: run["weight_decay"].as_f64().unwrap(),
            max_grad_norm: run["max_grad_norm"].as_f64().unwrap(),
            ..AdamWConfig::default()
        };
        let mut optimizer = AdamW::new(config, &params).unwrap();
        let (_, rates) = outputs.f32(&format!("{name}.lr"));
        let (_, norms) = outputs.f32(&format!("{name}.grad_norm"));
        for (i, (&lr, &norm)) in rates.iter().zip(&norms).enumerate() {
            // The reference rounds the gradients of bfloat16 parameters.
            let grad = |n| {
                from_golden(&inputs, &format!("grad{i}.{n}")).cast(dtype).unwrap().cast(DType::F32).unwrap()
            };
            let grads: Vec<_> = ids.into_iter().zip(NAMES.map(grad)).collect();
            let grads = grads_of(&params, &grads);
            let report = stepped(&mut optimizer, &mut params, &grads, 1.0, f64::from(lr));
            let step = format!("{name}.step{}", i + 1);
            assert_close(&step, &[report.grad_norm as f32], &[norm], atol, rtol);
            assert_eq!(report.clipped, norm > 0.5, "{step}");
            let state = optimizer.state(&params).unwrap();
            let find =
                |kind: &str, n| state.iter().find(|(s, _)| *s == format!("{kind}.{n}")).map(|(_, t)| t);
            for (id, n) in ids.into_iter().zip(NAMES) {
                let param = &params.get(id).value;
                let master = find("master", n).unwrap_or(param);
                let check = |kind: &str, got: &Tensor| {
                    let name = format!("{step}.{kind}.{n}");
                    assert_close(&name, &got.to_f32(), &outputs.f32(&name).1, atol, rtol);
                };
                check("master", master);
                check("exp_avg", find("exp_avg", n).unwrap());
                check("exp_avg_sq", find("exp_avg_sq", n).unwrap());
                if bf16 {
                    assert_eq!(
                        param.to_bf16(),
                        master.to_bf16(),
                        "{step}: a parameter is its rounded master"
                    );
                    // Where master and expected master round to different neighbours, the parameter may too.
                    let name = format!("{step}.param.{n}");
                    assert_close(&name, &param.to_f32(), &outputs.f32(&name).1, 0.0, 1.0 / 128.0);
                }
            }
        }
    }
}

/// A float32 and a bfloat16 parameter, one without gradient, and a frozen one.
fn model() -> (Params, [ParamId; 4]) {
    let mut rng = Lcg::new(5);
    let mut params = Params::new();
    let mut add = |name: &str, dtype, trainable| {
        params.add(name, tensor(rng.normals(12, 1.0), &[3, 4]).cast(dtype).unwrap(), trainable)
    };
    let ids = [
        add("full", DType::F32, true),
        add("half", DType::Bf16, true),
        add("unused", DType::F32, true),
        add("frozen", DType::F32, false),
    ];
    (params, ids)
}

fn random_grads(params: &Params, ids: &[ParamId], seed: u64) -> Grads {
    let mut rng = Lcg::new(seed);
    let grads: Vec<_> = ids.iter().map(|&id| (id, tensor(rng.normals(12, 1.0), &[3, 4]))).collect();
    grads_of(params, &grads)
}

#[test]
fn only_trained_parameters_with_a_gradient_are_stepped() {
    let (mut params, ids) = model();
    let before = params.clone();
    let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
    let mut optimizer = AdamW::new(config, &params).unwrap();
    let grads = random_grads(&params, &ids[..2], 1);
    stepped(&mut optimizer, &mut params, &grads, 1.0, 0.1);
    let moved = ids.map(|id| params.get(id).value.to_f32() != before.get(id).value.to_f32());
    assert_eq!(moved, [true, true, false, false]);
    let names: Vec<String> = optimizer.state(&params).unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(
        names,
        [
            "exp_avg.full",
            "exp_avg_sq.full",
            "step.full",
            "exp_avg.half",
            "exp_avg_sq.half",
            "step.half",
            "master.half",
            "exp_avg.unused",
            "exp_avg_sq.unused",
            "step.unused",
        ]
    );
    // A parameter that gets its first gradient late starts with the bias correction of a first step: its update is
    // about the learning rate, whatever the number of steps before.
    let grads = random_grads(&params, &ids[2..3], 2);
    stepped(&mut optimizer, &mut params, &grads, 1.0, 0.01);
    let (old, new) = (before.get(ids[2]).value.to_f32(), params.get(ids[2]).value.to_f32());
    for (old, new) in old.iter().zip(new) {
        assert!(((old * (1.0 - 0.001) - new).abs() - 0.01).abs() < 1e-4, "{old} went to {new}");
    }
}

#[test]
fn gradients_are_divided_by_the_weight_and_the_norm_is_that_of_the_mean() {
    let (mut params, ids) = model();
    let sums = random_grads(&params, &ids[..2], 3);
    let squares = ids[..2].iter().flat_map(|&id| sums.get(id).unwrap().to_f32());
    let norm = squares.map(|g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    for (max_grad_norm, clipped) in [(0.5, true), (norm, false), (0.0, false)] {
        let config = AdamWConfig { max_grad_norm, ..AdamWConfig::default() };
        let mut optimizer = AdamW::new(config, &params).unwrap();
        let report = stepped(&mut optimizer, &mut params, &sums, 4.0, 0.0);
        assert!((report.grad_norm / (norm / 4.0) - 1.0).abs() < 1e-6, "{report:?}, {norm}");
        assert_eq!(report.clipped, clipped);
        // The first moment after one step is a tenth of the gradient that was applied.
        let applied = optimizer.state(&params).unwrap()[0].1.to_f32();
        let factor = if clipped { 0.5 / norm } else { 0.25 } * 0.1;
        let expected: Vec<f32> =
            sums.get(ids[0]).unwrap().to_f32().iter().map(|g| g * factor as f32).collect();
        assert_close("applied gradient", &applied, &expected, 1e-7, 1e-5);
    }
}

#[test]
fn a_restored_optimizer_goes_on_with_the_same_bits() {
    let (mut params, ids) = model();
    let mut optimizer = AdamW::new(AdamWConfig::default(), &params).unwrap();
    for seed in 0..3 {
        let grads = random_grads(&params, &ids[..2], seed);
        stepped(&mut optimizer, &mut params, &grads, 2.0, 0.01);
    }
    let saved = optimizer.state(&params).unwrap();
    let (mut other_params, _) = model();
    other_params.get_mut(ids[0]).value = params.get(ids[0]).value.clone();
    let find = |name: &str| saved.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone());
    let mut other =
        AdamW::restore(AdamWConfig::default(), &mut other_params, optimizer.steps(), find).unwrap();
    for seed in 3..5 {
        let grads = random_grads(&params, &ids[..3], seed);
        let report = stepped(&mut optimizer, &mut params, &grads, 2.0, 0.01);
        assert_eq!(stepped(&mut other, &mut other_params, &grads, 2.0, 0.01), report);
    }
    assert_eq!(other.steps(), 5);
    let bits = |s: &AdamW, p: &Params| -> Vec<(String, Vec<u32>)> {
        let all =
            s.state(p).unwrap().into_iter().chain(p.iter().map(|(_, p)| (p.name.clone(), p.value.clone())));
        all.map(|(name, t)| (name, t.to_f32().iter().map(|v| v.to_bits()).collect())).collect()
    };
    assert_eq!(bits(&other, &other_params), bits(&optimizer, &params));
}

#[test]
fn a_state_of_another_model_is_refused() {
    let (mut params, _) = model();
    let saved = AdamW::new(AdamWConfig::default(), &params).unwrap().state(&params).unwrap();
    let mut message = |change: &dyn Fn(&str, Tensor) -> Option<Tensor>| {
        let find = |name: &str| saved.iter().find(|(n, _)| n == name).and_then(|(n, t)| change(n, t.clone()));
        AdamW::restore(AdamWConfig::default(), &mut params, 0, find).unwrap_err().to_string()
    };
    assert_eq!(
        message(&|name, t| (name != "master.half").then_some(t)),
        "optimizer state: tensor master.half is missing; the checkpoint is of another model or other frozen parts"
    );
    assert_eq!(
        message(&|name, t| Some(if name == "exp_avg_sq.full" { t.reshape(&[4, 3]).unwrap() } else { t })),
        "optimizer state: tensor exp_avg_sq.full is F32 [4, 3], expected F32 [3, 4]; the checkpoint is of another model"
    );
    assert_eq!(
        message(&|name, t| Some(if name == "exp_avg.half" { t.cast(DType::Bf16).unwrap() } else { t })),
        "optimizer state: tensor exp_avg.half is Bf16 [3, 4], expected F32 [3, 4]; the checkpoint is of another model"
    );
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    let (mut params, ids) = model();
    let before = params.clone();
    let mut optimizer = AdamW::new(AdamWConfig::default(), &params).unwrap();
    let broken = grads_of(&params, &[(ids[0], tensor(vec![f32::INFINITY; 12], &[3, 4]))]);
    assert!(!stepped(&mut optimizer, &mut params, &broken, 1.0, 0.1).grad_norm.is_finite());
    let nothing = grads_of(&params, &[(ids[0], tensor(vec![0.0; 12], &[3, 4]))]);
    assert!(!stepped(&mut optimizer, &mut params, &nothing, 0.0, 0.1).grad_norm.is_finite());
    assert_eq!(optimizer.steps(), 0);
    assert_eq!(params.get(ids[0]).value.to_f32(), before.get(ids[0]).value.to_f32());
    assert!(
        optimizer
            .state(&params)
            .unwrap()
            .iter()
            .filter(|(n, _)| n != "master.half")
            .all(|(_, t)| t.to_f32().iter().all(|&v| v == 0.0))
    );
}

#[test]
fn settings_are_read_by_their_names_and_checked() {
    let read = |text: &str| serde_json::from_str::<AdamWConfig>(text);
    assert_eq!(read("{}").unwrap(), AdamWConfig::default());
    let all =
        r#"{"lr": 0.002, "betas": [0.8, 0.95], "eps": 1e-6, "weight-decay": 0.1, "max-grad-norm": 1.0}"#;
    let config =
        AdamWConfig { lr: 0.002, betas: [0.8, 0.95], eps: 1e-6, weight_decay: 0.1, max_grad_norm: 1.0 };
    assert_eq!(read(all).unwrap(), config);
    assert!(
        read(r#"{"weight_decay": 0.1}"#).unwrap_err().to_string().contains("unknown field `weight_decay`")
    );
    for (text, message) in [
        (r#"{"lr": -1}"#, "lr = -1: a learning rate is a finite number of at least 0"),
        (r#"{"betas": [0.9, 1.0]}"#, "betas[1] = 1: a decay is at least 0 and below 1"),
        (r#"{"eps": 0}"#, "eps = 0: it must be above 0, to divide by"),
        (r#"{"weight-decay": -0.1}"#, "weight-decay = -0.1: it must be finite and at least 0"),
        (
            r#"{"max-grad-norm": -1}"#,
            "max-grad-norm = -1: it must be finite and at least 0 (0 switches clipping off)",
        ),
    ] {
        assert_eq!(AdamW::new(read(text).unwrap(), &Params::new()).unwrap_err().to_string(), message);
    }
}
