//! Target folders with something wrong, met by every command that opens one.

use serde_json::json;
use specforge_testkit::SmallTarget;

use crate::world::World;

/// Both ways to meet a target: the whole of it, and its parts that an offline run reads.
#[track_caller]
fn refused(world: &World, expected: &[&str]) {
    for mode in ["online", "offline"] {
        world.fails(&["train", "R", "--set", &format!("mode={mode}")], expected);
    }
    world.fails(&["capture", "R"], expected);
    assert!(!world.has("runs/run/checkpoints") && !world.has("runs/run/export"));
    assert!(!world.has("runs/run/features/manifest.json"), "a store was begun");
}

#[test]
fn a_folder_that_is_not_there() {
    let world = World::new();
    fs_err::remove_dir_all(world.path("target")).unwrap();
    refused(&world, &["/target: there is no such folder", "target.path"]);
}

#[test]
fn a_folder_without_weights_or_configuration() {
    let world = World::new();
    fs_err::remove_file(world.path("target/model.safetensors")).unwrap();
    refused(&world, &["target", "no model.safetensors"]);
    let world = World::new();
    fs_err::remove_file(world.path("target/config.json")).unwrap();
    refused(&world, &["config.json"]);
    let world = World::new();
    fs_err::remove_file(world.path("target/tokenizer.json")).unwrap();
    refused(&world, &["tokenizer.json"]);
}

#[test]
fn weights_that_are_cut_off() {
    let world = World::new();
    let bytes = world.bytes("target/model.safetensors");
    for (length, expected) in
        [(bytes.len() - 1000, "cut off"), (100, "model.safetensors"), (3, "model.safetensors")]
    {
        world.write("target/model.safetensors", &bytes[..length]);
        refused(&world, &["model.safetensors", expected]);
    }
}

#[test]
fn a_header_that_claims_more_than_the_file_has() {
    let world = World::new();
    let mut bytes = world.bytes("target/model.safetensors");
    for length in [u64::MAX, 1 << 40, bytes.len() as u64] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        world.write("target/model.safetensors", &bytes);
        refused(&world, &["model.safetensors", "header"]);
    }
}

#[test]
fn a_tensor_of_another_shape() {
    let mut target = SmallTarget::llama(1);
    *target.tensor("lm_head.weight") = ("lm_head.weight".to_owned(), vec![262, 32], vec![0.0; 262 * 32]);
    refused(&World::with_target(&target), &["lm_head.weight", "[262, 32]", "[263, 32]"]);
}

#[test]
fn a_tensor_that_is_missing() {
    let mut target = SmallTarget::llama(1);
    target.tensor("model.embed_tokens.weight").0 = "model.embed_token.weight".to_owned();
    refused(
        &World::with_target(&target),
        &["model.embed_tokens.weight is missing", "model.embed_token.weight"],
    );
}

#[test]
fn an_architecture_nobody_knows() {
    let mut target = SmallTarget::llama(1);
    target.config["architectures"] = json!(["LlamaForCausalML"]);
    refused(&World::with_target(&target), &["LlamaForCausalML", "known are", "LlamaForCausalLM"]);
}

#[test]
fn a_configuration_that_contradicts_itself() {
    let mut target = SmallTarget::llama(1);
    target.config["num_key_value_heads"] = json!(3);
    refused(&World::with_target(&target), &["config.json", "num_key_value_heads"]);
    let mut target = SmallTarget::llama(1);
    target.config["hidden_size"] = json!("wide");
    refused(&World::with_target(&target), &["config.json", "hidden_size"]);
    let world = World::new();
    world.write("target/config.json", "{\"architectures\": [");
    refused(&world, &["config.json"]);
}

#[test]
fn a_target_with_too_few_layers_for_the_capture() {
    let mut target = SmallTarget::llama(1);
    target.config["num_hidden_layers"] = json!(2);
    refused(&World::with_target(&target), &["layers"]);
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_target() {
    let mut target = SmallTarget::llama(1);
    target.config["vocab_size"] = json!(200);
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let (_, shape, values) = target.tensor(name);
        shape[0] = 200;
        values.truncate(200 * 32);
    }
    let world = World::with_target(&target);
    world.fails(&["train", "R"], &["outside", "200"]);
}
