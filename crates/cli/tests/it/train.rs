//! A run from the recipe to the exported folder, and what the commands say about it.

use serde_json::Value;

use crate::left::Left;
use crate::world::{World, torn};

#[test]
fn a_run_leaves_a_summary_and_a_draft_that_can_be_served() {
    let world = World::new();
    let ran = world.ok(&["train", "R"]);
    for said in ["acceptance length after", "lossless", "exported folder"] {
        assert!(ran.stdout.contains(said), "{said} is not in: {}", ran.stdout);
    }
    let summary = world.json("runs/run/summary.json");
    let number = |key: &str| summary[key].as_f64().unwrap_or_else(|| panic!("{key}: {summary}"));
    let (before, after) = (number("acceptance_length_untrained"), number("acceptance_length"));
    assert!((1.0..1.5).contains(&before) && after > before + 0.1 && after <= 4.0, "{before} to {after}");
    assert_eq!(summary["lossless"], Value::Bool(true));
    assert_eq!(summary["acceptance_per_position"].as_array().unwrap().len(), 3);
    assert!(number("tokens_per_second") > 0.0 && number("seconds") > 0.0 && number("steps") > 15.0);
    let export = summary["export_dir"].as_str().unwrap();
    let check = world.ok(&["export", "--check", export, "--target", "target"]);
    assert!(check.stdout.contains("PASS"), "{}", check.stdout);
    assert_eq!(torn(&world.path("runs")), Vec::<String>::new());
}

/// The draft trains in float32 and is exported in bfloat16, so that proposals whose scores nearly tie may swap: the
/// acceptance length over four prompts may move by a token or two, and in most runs does not move. The output must be
/// the target's own with either.
#[test]
fn an_exported_draft_decodes_like_its_checkpoint() {
    let world = World::new();
    let summary = {
        world.ok(&["train", "R"]);
        world.json("runs/run/summary.json")
    };
    let best = world.ok_json(&["eval", "R", "--json"]);
    let exported = world.ok_json(&["eval", "R", "--draft", "runs/run/export", "--json"]);
    // The checkpoint holds the very weights that the run measured.
    assert_eq!(best["acceptance_length"], summary["acceptance_length"]);
    assert_eq!(best["acceptance_per_position"], summary["acceptance_per_position"]);
    let length = |report: &Value| report["acceptance_length"].as_f64().unwrap();
    let (full, rounded) = (length(&best), length(&exported));
    assert!((full - rounded).abs() <= 0.05 * full, "{full} and exported {rounded}");
    for report in [&best, &exported] {
        assert_eq!(report["lossless"], Value::Bool(true), "{report}");
    }
    let outputs = |report: &Value| -> Vec<Value> {
        report["results"].as_array().unwrap().iter().map(|r| r["output_ids"].clone()).collect()
    };
    assert_eq!(outputs(&best), outputs(&exported));
}

/// Every draft position learns, not the first alone.
#[test]
fn a_longer_run_learns_to_look_further_ahead() {
    let world = World::new();
    let sets =
        ["--set", "train.epochs=20", "--set", "train.eval-every=0", "--set", "train.optimizer.lr=3e-3"];
    let summary = world.ok_json(&[&["train", "R", "--json"], sets.as_slice()].concat());
    assert!(summary["acceptance_length"].as_f64() > Some(2.2), "{summary}");
    assert!(summary["acceptance_per_position"][2].as_f64() > Some(0.2), "{summary}");
}

#[test]
fn decoding_settings_are_taken_from_the_command_line() {
    let world = World::new();
    world.ok(&["train", "R"]);
    world.write("prompts.txt", "abc\nxyz 1\n");
    let eval = |more: &[&str]| world.ok_json(&[&["eval", "R", "--json"], more].concat());
    let tree = eval(&["--topk", "2", "--draft-steps", "2", "--draft-tokens", "5"]);
    assert_eq!((&tree["mode"], &tree["n_nodes"]), (&Value::from("tree"), &Value::from(5)));
    assert_eq!(tree["lossless"], Value::Bool(true));
    let other = eval(&["--prompts", "prompts.txt", "--max-new-tokens", "5", "--checkpoint", "latest"]);
    assert_eq!(other["prompts"], Value::from(2));
    assert!(
        other["results"].as_array().unwrap().iter().all(|r| r["output_ids"].as_array().unwrap().len() <= 5)
    );
    let sampled = |seed: &str| {
        let report = eval(&["--temperature", "4", "--seed", seed]);
        assert_eq!(report["lossless"], Value::Null);
        report["results"][0]["output_ids"].clone()
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
}

#[test]
fn threads_change_no_bit() {
    let world = World::new();
    for n in ["1", "2"] {
        world.ok(&["train", "R", "--set", &format!("threads={n}"), "--set", &format!("name=threads-{n}")]);
    }
    Left::by(&world, "threads-1").assert_same(&Left::by(&world, "threads-2"), "one thread and two");
}

/// Measuring must not touch what it measures.
#[test]
fn evaluating_and_saving_more_often_changes_no_weight() {
    let world = World::new();
    let draft = |name: &str, every: &str| {
        let sets = [
            format!("name={name}"),
            format!("train.eval-every={every}"),
            format!("train.save-every={every}"),
        ];
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        world.ok(&[&["train", "R"], sets.as_slice()].concat());
        let last = world.text(&format!("runs/{name}/checkpoints/latest"));
        world.bytes(&format!("runs/{name}/checkpoints/{}/draft.safetensors", last.trim()))
    };
    assert!(draft("never", "0") == draft("often", "3"));
}

#[test]
fn the_eagle_3_1_form_trains_and_exports() {
    let world = World::new();
    let recipe = world
        .text("recipe.toml")
        .replace("[method.eagle3]", "[method.eagle3]\nfc-norm = true\nnorm-output = true");
    world.write("recipe.toml", recipe);
    world.ok(&["train", "R"]);
    let check = world.ok_json(&["export", "--check", "runs/run/export", "--json"]);
    assert_eq!(check["ok"], Value::Bool(true), "{check}");
    let exported = world.ok_json(&["eval", "R", "--draft", "runs/run/export", "--json"]);
    assert_eq!(exported["lossless"], Value::Bool(true));
    assert!(exported["acceptance_length"].as_f64().unwrap() > 1.1, "{exported}");
}
