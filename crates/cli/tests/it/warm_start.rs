//! `train.warm-start`: from exports, checkpoints, and what SpecForge, speculators and the EAGLE authors write.

use serde_json::{Value, json};
use specforge_nn::weights::{Dtype, Weights};
use specforge_testkit::torch_file;

use crate::world::World;

/// The acceptance length before training of a run that starts from `folder`, with this setting too.
fn warm(world: &World, folder: &str, set: &str) -> f64 {
    let (name, start) = (format!("name={}", folder.replace('/', "-")), format!("train.warm-start={folder}"));
    world.ok(&[
        "train",
        "R",
        "--overwrite",
        "--set",
        &name,
        "--set",
        &start,
        "--set",
        "train.epochs=1",
        "--set",
        set,
    ]);
    let summary = world.json(&format!("runs/{}/summary.json", folder.replace('/', "-")));
    summary["acceptance_length_untrained"].as_f64().unwrap()
}

/// The export's tensors as a file of PyTorch.
fn as_torch(world: &World, to: &str) {
    let weights = Weights::open(world.path("runs/run/export")).unwrap();
    let class = |dtype| match dtype {
        Dtype::BF16 => "BFloat16Storage",
        Dtype::I64 => "LongStorage",
        Dtype::Bool => "BoolStorage",
        other => panic!("{other}"),
    };
    let tensors: Vec<_> = weights
        .names()
        .map(|name| {
            let view = weights.get(name).unwrap();
            (name, class(view.dtype), view.shape, view.bytes.to_vec())
        })
        .collect();
    torch_file(&world.path(to), &tensors);
}

/// speculators' folder of the exported draft: other names, other configuration, a tensor of the target beside.
fn as_speculators(world: &World, to: &str) {
    fs_err::create_dir_all(world.path(to)).unwrap();
    let weights = Weights::open(world.path("runs/run/export")).unwrap();
    let views = weights.names().map(|name| {
        let view = weights.get(name).unwrap();
        let dtype = match view.dtype {
            Dtype::BF16 => safetensors::Dtype::BF16,
            Dtype::I64 => safetensors::Dtype::I64,
            _ => safetensors::Dtype::BOOL,
        };
        let tensor = safetensors::tensor::TensorView::new(dtype, view.shape.to_vec(), view.bytes).unwrap();
        (name.replace("midlayer.", "layers.0."), tensor)
    });
    let mut views: Vec<_> = views.collect();
    let norm = views.iter().find(|(name, _)| name == "norm.weight").unwrap().1.clone();
    views.push(("verifier_norm.weight".to_owned(), norm));
    safetensors::serialize_to_file(views, None, &world.path(&format!("{to}/model.safetensors"))).unwrap();
    let mut layer = world.json("runs/run/export/config.json");
    for key in ["draft_vocab_size", "architectures", "num_hidden_layers"] {
        layer.as_object_mut().unwrap().remove(key);
    }
    let config = json!({
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.3.0",
        "draft_vocab_size": 40, "norm_before_residual": false, "target_hidden_size": null,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5], "transformer_layer_config": layer,
    });
    world.write(&format!("{to}/config.json"), config.to_string());
}

/// The export rounds weights to bfloat16; a run that starts from it starts as good as it was, up to that.
#[test]
fn a_run_may_start_from_a_draft_of_anybody() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let fresh = world.json("runs/run/summary.json")["acceptance_length_untrained"].as_f64().unwrap();
    let none = "threads=2";
    let exported = warm(&world, "runs/run/export", none);
    assert!(exported > fresh + 0.1, "{fresh} fresh, {exported} warm");
    // The EAGLE authors' folders.
    fs_err::create_dir_all(world.path("authors")).unwrap();
    fs_err::copy(world.path("runs/run/export/config.json"), world.path("authors/config.json")).unwrap();
    as_torch(&world, "authors/pytorch_model.bin");
    assert_eq!(warm(&world, "authors", none), exported);
    // SpecForge's training state, without any configuration.
    fs_err::create_dir_all(world.path("state")).unwrap();
    as_torch(&world, "state/training_state.pt");
    assert_eq!(warm(&world, "state", none), exported);
    as_speculators(&world, "speculators");
    assert_eq!(warm(&world, "speculators", none), exported);
    let eval = ["eval", "R", "--json", "--draft"];
    let decoded = |folder: &str| world.ok_json(&[&eval[..], &[folder]].concat())["acceptance_length"].clone();
    assert_eq!(decoded("speculators"), decoded("runs/run/export"));
    assert_eq!(decoded("authors"), decoded("runs/run/export"));
    // Another vocabulary: rows go with their tokens.
    let fewer = warm(&world, "authors", "method.eagle3.draft-vocab-size=30");
    assert!(fewer > fresh + 0.1, "{fresh} fresh, {fewer} with fewer tokens");
}

#[test]
fn a_run_may_start_from_a_checkpoint_of_the_same_vocabulary() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let fresh = world.json("runs/run/summary.json")["acceptance_length_untrained"].as_f64().unwrap();
    let best = format!("runs/run/checkpoints/{}", world.text("runs/run/checkpoints/best").trim());
    assert!(warm(&world, &best, "threads=2") > fresh + 0.1);
    let start = format!("train.warm-start={best}");
    let other =
        ["train", "R", "--set", "name=other", "--set", &start, "--set", "method.eagle3.draft-vocab-size=30"];
    world.fails(&other, &["checkpoint", "export"]);
}

#[test]
fn drafts_that_cannot_be_started_from_say_why() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let fails = |folder: &str, expected: &[&str]| {
        let start = format!("train.warm-start={folder}");
        world.fails(&["train", "R", "--set", "name=again", "--set", &start], expected);
    };
    fs_err::create_dir_all(world.path("code")).unwrap();
    let golden = specforge_testkit::own_case("torch").join("code.pt");
    fs_err::copy(golden, world.path("code/training_state.pt")).unwrap();
    fails("code", &["training_state.pt", "the name posix.system"]);
    as_speculators(&world, "speculators");
    let mut config = world.json("speculators/config.json");
    config["norm_before_residual"] = Value::Bool(true);
    world.write("speculators/config.json", config.to_string());
    world.fails(&["eval", "R", "--draft", "speculators"], &["norm_before_residual", "train.warm-start"]);
    config["norm_before_residual"] = Value::Bool(false);
    config["transformer_layer_config"]["layer_types"] = json!(["sliding_attention"]);
    config["transformer_layer_config"]["sliding_window"] = 64.into();
    world.write("speculators/config.json", config.to_string());
    let ran = world.ok(&["eval", "R", "--draft", "speculators"]);
    assert!(ran.stderr.contains("was trained to see 64 tokens"), "{}", ran.stderr);
    config["speculators_model_type"] = "dflash".into();
    world.write("speculators/config.json", config.to_string());
    fails("speculators", &["speculators_model_type", "eagle3"]);
}
