//! What goes wrong while a run is under way: losses, disks, other runs.

use std::process::Command;

use crate::kill::{Running, logged};
use crate::left::{Left, steps};
use crate::world::{Ran, World, line, names, torn};

#[test]
fn an_earlier_run_is_neither_continued_nor_replaced_unasked() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let before = Left::by(&world, "run");
    world.fails(&["train", "R"], &["runs/run", "step 27", "--resume", "--overwrite", "--set name="]);
    before.assert_same(&Left::by(&world, "run"), "a refused run");
    world.write("runs/run/notes.txt", "mine");
    world.ok(&["train", "R", "--overwrite"]);
    before.assert_same(&Left::by(&world, "run"), "the same run again");
    assert_eq!(world.text("runs/run/notes.txt"), "mine");
}

#[test]
fn two_processes_in_one_folder() {
    let world = World::new();
    world.write("conversations.jsonl", crate::world::conversations(600, 3));
    // Long enough to outlast the others on any device.
    let mut first = Running::start(&world, &["train", "R", "--set", "train.epochs=1000"]);
    first.wait_until(|| logged(&world, "run") >= 2);
    world
        .fails(&["train", "R", "--resume"], &["runs/run", "another run works in this folder", "--set name="]);
    world.fails(&["train", "R", "--overwrite"], &["another run works in this folder"]);
    // Looking is allowed, and disturbs nobody.
    first.wait_until(|| world.has("runs/run/checkpoints/latest"));
    for _ in 0..5 {
        world.ok(&["eval", "R", "--checkpoint", "latest", "--max-prompts", "1"]);
    }
    first.signal("INT").refused(&["stopped at step", "and saved"]);
}

#[test]
fn a_target_with_nan_in_its_weights() {
    let mut target = specforge_testkit::SmallTarget::llama(1);
    target.tensor("model.layers.3.mlp.up_proj.weight").2[5] = f32::NAN;
    let world = World::with_target(&target);
    world.fails(&["train", "R"], &["target's logits are not finite", "NaN"]);
    // Without decoding, the first row tells: nothing is captured from such a target, nothing trained on it.
    let expected = ["row ", "hidden states are not finite", "weights are damaged"];
    world.fails(&["capture", "R"], &expected);
    world.fails(&["train", "R", "--set", "eval.training-prompts=0"], &expected);
    assert!(!world.has("runs/run/export") && !world.has("runs/run/checkpoints/latest"));
}

#[test]
fn a_loss_that_overflows_stops_the_run_with_what_is_needed_to_go_on() {
    let world = World::new();
    let sets = [
        "--set",
        "train.optimizer.lr=1e30",
        "--set",
        "train.save-every=1",
        "--set",
        "eval.training-prompts=0",
    ];
    let message = world.fails(
        &[&["train", "R"], sets.as_slice()].concat(),
        &[
            "step ",
            "rows [",
            "nothing of this step was applied",
            "last good checkpoint: ",
            "checkpoints/step-",
        ],
    );
    let named = message.split("last good checkpoint: ").nth(1).unwrap().lines().next().unwrap();
    let info = world.ok_json(&["info", named.trim(), "--json"]);
    let stopped: u64 =
        message.split("error: step ").nth(1).unwrap().split(':').next().unwrap().parse().unwrap();
    assert_eq!(info["step"], stopped - 1, "{message}");
    let text = world.text("runs/run/metrics.jsonl");
    assert!(!text.contains("null") && !text.contains("NaN"), "{text}");
    assert!(!world.has("runs/run/summary.json"));
}

/// A limit on the size of files is met as a full disk is: in the middle of a write.
#[test]
fn no_space_left_stops_with_the_last_checkpoint_whole() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let whole = Left::by(&world, "run");
    let mut running = Running::start(&world, &["train", "R", "--set", "name=full"]);
    running.wait_until(|| world.has("runs/full/checkpoints/step-00000004"));
    running.kill();
    let command = world.specforge(&["train", "R", "--set", "name=full", "--resume"]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 120; exec \"$@\"", "sh"]).arg(command.get_program());
    limited.args(command.get_args()).current_dir(world.path(""));
    let ran = Ran::of(&mut limited);
    ran.refused(&["runs/full/checkpoints/step-", "safetensors", "File too large"]);
    assert_eq!(torn(&world.path("runs/full")), Vec::<String>::new());
    let info = world.ok_json(&["info", "runs/full/checkpoints/step-00000004", "--json"]);
    assert_eq!(info["step"], 4);
    world.ok(&["train", "R", "--set", "name=full", "--resume"]);
    Left::by(&world, "full").assert_same(&whole, "after a full disk");
    assert_eq!(torn(&world.path("runs/full")), Vec::<String>::new());
}

/// A real full disk, where a small one can be mounted without being root.
#[test]
fn a_full_disk_is_named_and_survived() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let script = r#"
        mkdir small && mount -t tmpfs -o size=700k none small || exit 77
        "$0" train recipe.toml --set output-dir=small
        echo "code $?" >&2
        "$0" info "small/run/checkpoints/$(cat small/run/checkpoints/latest)" >&2 || exit 78
        mount -o remount,size=16m small || exit 79
        "$0" train recipe.toml --set output-dir=small --resume >&2 || exit 80
        cp -r small/run runs/small"#;
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", script, env!("CARGO_BIN_EXE_specforge")]).current_dir(world.path(""));
    let Ok(output) = command.output() else { return skipped("there is no unshare") };
    let said = String::from_utf8(output.stderr).unwrap();
    if said.contains("unshare") || output.status.code() == Some(77) {
        return skipped("no small disk can be mounted");
    }
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("code 1") && said.contains("o space left on"), "{said}");
    Left::by(&world, "small").assert_same(&Left::by(&world, "run"), "after a full disk");
}

#[expect(clippy::print_stdout, reason = "a skipped test has to say so, and test output is captured")]
fn skipped(why: &str) {
    println!("skipped: {why}");
}

#[test]
fn a_capture_that_finds_no_space_keeps_what_it_has() {
    let world = World::new();
    world.write("conversations.jsonl", crate::world::conversations(200, 5));
    let command = world.specforge(&["capture", "R", "--json"]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 800; exec \"$@\"", "sh"]).arg(command.get_program());
    limited.args(command.get_args()).current_dir(world.path(""));
    let ran = Ran::of(&mut limited);
    ran.refused(&["runs/run/features", "are kept", "same capture again"]);
    let ran = world.ok(&["capture", "R", "--json"]);
    assert!(ran.stderr.contains("are there already") && ran.stdout.contains("\"rows\": 200"), "{ran:?}");
    world.ok(&["info", "runs/run/features", "--verify"]);
}

#[test]
fn a_run_folder_that_cannot_be_written() {
    let world = World::new();
    world.write("runs", "a file");
    world.fails(&["train", "R"], &["runs"]);
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let saved = format!("runs/run/checkpoints/{}", world.text("runs/run/checkpoints/latest").trim());
    let draft = world.bytes(&format!("{saved}/draft.safetensors"));
    world.write(&format!("{saved}/draft.safetensors"), &draft[..draft.len() / 2]);
    world.fails(&["train", "R", "--resume"], &["draft.safetensors", "cut off", "earlier checkpoint"]);
    world.write(&format!("{saved}/draft.safetensors"), draft);
    world.write(&format!("{saved}/state.json"), "{\"format\": 1");
    world.fails(&["train", "R", "--resume"], &["state.json", "--resume FOLDER"]);
    world.fails(&["train", "R", "--resume", "nowhere"], &["nowhere"]);
    // The checkpoint before it is as good as new.
    let earlier = names(&world.path("runs/run/checkpoints")).into_iter().rev();
    let earlier = earlier.filter(|name| name.starts_with("step-")).nth(1).unwrap();
    fs_err::remove_dir_all(world.path(&saved)).unwrap();
    world.ok(&["train", "R", "--resume", &format!("runs/run/checkpoints/{earlier}")]);
}

#[test]
fn evaluating_and_exporting_need_a_checkpoint() {
    let world = World::new();
    for command in ["eval", "export"] {
        world.fails(&[command, "R"], &["runs/run", "no checkpoint", "train first"]);
        world.fails(&[command, "R", "--checkpoint", "step-9"], &["step-9"]);
    }
    assert!(!world.has("runs/run/checkpoints"));
}

/// Weights do not show which tokens they stand for: what a checkpoint was trained with must be what it is used with.
#[test]
fn a_checkpoint_is_not_used_with_another_vocabulary_or_target() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let good = world.text("conversations.jsonl");
    world.write("conversations.jsonl", good.clone() + &line("A", &"$".repeat(80)));
    for command in ["eval", "export"] {
        world.fails(&[command, "R"], &["another draft vocabulary", "checkpoints/step-"]);
    }
    world.write("conversations.jsonl", good);
    world.ok(&["export", "R"]);
    specforge_testkit::SmallTarget::llama(2).write(&world.path("target"));
    world.fails(&["export", "R"], &["another target", "checkpoints/step-"]);
}

/// Every step is there once, in order, whatever was logged before a resume.
#[test]
fn a_log_has_each_step_once() {
    let world = World::new();
    let mut running = Running::start(&world, &["train", "R"]);
    running.wait_until(|| logged(&world, "run") >= 7);
    running.kill();
    world.ok(&["train", "R", "--resume"]);
    let steps: Vec<u64> = steps(&world, "run").iter().map(|r| r["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
}

#[test]
fn a_row_longer_than_the_targets_positions() {
    let world = World::new();
    world.write("conversations.jsonl", world.text("conversations.jsonl") + &line("A", &"ABC".repeat(300)));
    let sets = ["--set", "data.max-length=1000", "--set", "train.tokens-per-batch=1000"];
    world.fails(
        &[&["train", "R"], sets.as_slice()].concat(),
        &["row 60 has 922 tokens", "data.max-length = 512"],
    );
    world.fails(&[&["capture", "R"], sets.as_slice()].concat(), &["data.max-length = 512"]);
    assert!(!world.has("runs/run/checkpoints") && !world.has("runs/run/features"));
}
