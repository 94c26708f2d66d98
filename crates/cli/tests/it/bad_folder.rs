//! Folders to export to and to check, and folders that are nothing at all.

use serde_json::Value;

use crate::world::{World, names};

#[test]
fn a_folder_with_something_else_in_it_is_not_exported_to() {
    let world = World::new();
    fs_err::create_dir(world.path("precious")).unwrap();
    world.write("precious/thesis.txt", "years");
    // Before the training, not after it.
    let set = "export.path=precious";
    world.fails(&["train", "R", "--set", set], &["precious", "export.path"]);
    assert!(!world.has("runs/run/checkpoints"));
    world.ok(&["train", "R"]);
    world.fails(&["export", "R", "--output", "precious"], &["precious", "not empty", "thesis.txt"]);
    assert_eq!(names(&world.path("precious")), ["thesis.txt"]);
    world.ok(&["export", "R", "--output", "precious", "--overwrite"]);
    assert_eq!(names(&world.path("precious")), ["config.json", "model.safetensors"]);
}

#[test]
fn an_export_may_be_repeated_and_carry_embeddings() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let first = world.bytes("runs/run/export/model.safetensors");
    world.ok(&["export", "R"]);
    assert!(first == world.bytes("runs/run/export/model.safetensors"));
    let shown = world.ok_json(&["export", "R", "--output", "whole", "--embeddings", "--json"]);
    assert_eq!(shown["export_dir"], "whole");
    assert!(world.bytes("whole/model.safetensors").len() > first.len() + 263 * 32 * 2 - 100);
    world.ok(&["export", "--check", "whole", "--target", "target"]);
    world.ok(&["eval", "R", "--draft", "whole"]);
}

#[test]
fn a_draft_that_cannot_be_served_fails_the_check_by_name() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let mut config = world.json("runs/run/export/config.json");
    config["draft_vocab_size"] = 41.into();
    world.write("runs/run/export/config.json", config.to_string());
    let ran = world.run(&["export", "--check", "runs/run/export"]);
    ran.refused(&["problems"]);
    assert!(
        ran.stdout.contains("FAIL") && ran.stdout.contains("d2t") && ran.stdout.contains("41"),
        "{}",
        ran.stdout
    );
    let ran = world.run(&["export", "--check", "runs/run/export", "--json"]);
    let shown: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((ran.code, &shown["ok"]), (Some(1), &Value::Bool(false)));
    world.fails(&["eval", "R", "--draft", "runs/run/export"], &["runs/run/export"]);
    world.fails(&["export", "--check", "target"], &["target"]);
    world.fails(&["export", "--check", "nowhere"], &["nowhere"]);
}

#[test]
fn a_draft_for_another_target_is_refused() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let mut other = specforge_testkit::SmallTarget::llama(1);
    other.config["hidden_size"] = 64.into();
    other.write(&world.path("other"));
    let ran = world.run(&["export", "--check", "runs/run/export", "--target", "other"]);
    ran.refused(&[]);
    assert!(ran.stdout.contains("64"), "{}", ran.stdout);
    world.fails(
        &[
            "train",
            "R",
            "--set",
            "name=wider",
            "--set",
            "method.eagle3.intermediate-size=64",
            "--set",
            "train.warm-start=runs/run/export",
        ],
        &["runs/run/export", "[48, 32]", "[64, 32]"],
    );
    assert!(!world.has("runs/wider/checkpoints"));
}

#[test]
fn folders_that_are_nothing() {
    let world = World::new();
    fs_err::create_dir(world.path("empty")).unwrap();
    for (folder, what) in
        [("empty", "not a target"), ("nowhere", "no such folder"), ("recipe.toml", "no such folder")]
    {
        world.fails(&["info", folder], &[folder, what]);
        world.fails(&["info", folder, "--verify"], &[folder, what]);
    }
    world.fails(&["info", "target", "--verify"], &["target", "not a feature store"]);
}
