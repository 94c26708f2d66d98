//! Commands for looking: `prepare`, `info`, `--help`; and readers that have seen enough.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::world::{World, names};

#[test]
fn prepare_counts_what_it_read_and_caches_it() {
    let world = World::new();
    let report = world.ok_json(&["prepare", "R", "--json"]);
    assert_eq!((&report["rows_read"], &report["rows_kept"]), (&60.into(), &60.into()));
    assert!(report["supervised_tokens"].as_u64() < report["tokens"].as_u64());
    let sets = names(&world.path("runs/cache"));
    assert_eq!(sets.len(), 1);
    let made = fs_err::metadata(world.path(&format!("runs/cache/{}", sets[0]))).unwrap().modified().unwrap();
    assert_eq!(world.ok_json(&["prepare", "R", "--json"]), report);
    let folder = world.ok(&["prepare", "R"]).stdout;
    assert_eq!(folder.trim(), world.path(&format!("runs/cache/{}", sets[0])).display().to_string());
    assert_eq!(fs_err::metadata(folder.trim()).unwrap().modified().unwrap(), made);
    // Anything that changes a row makes another set.
    world.ok(&["prepare", "R", "--set", "data.max-length=40"]);
    assert_eq!(names(&world.path("runs/cache")).len(), 2);
}

#[test]
fn the_mask_viewer_marks_what_is_supervised() {
    let world = World::new();
    let text = crate::world::line("ABC", "DEFG") + &crate::world::line("XYZ", "abcdefgh");
    world.write("conversations.jsonl", text);
    let shown = world.ok(&["prepare", "R", "--show-mask", "1"]).stdout;
    assert_eq!(
        shown.trim_end_matches('\n'),
        "<|im_start|>user\nXYZ<|im_end|>\n<|im_start|>assistant\n[[abcdefgh<|im_end|>\n]]"
    );
    world.fails(&["prepare", "R", "--show-mask", "2"], &["--show-mask 2", "rows 0 to 1"]);
}

#[test]
fn info_tells_every_kind_of_folder() {
    let world = World::new();
    world.ok(&["train", "R", "--set", "mode=cache"]);
    let saved = format!("runs/run/checkpoints/{}", world.text("runs/run/checkpoints/latest").trim());
    let set = world.ok(&["prepare", "R"]).stdout.trim().to_owned();
    for (folder, kind, key, value) in [
        ("target", "target", "hidden_size", 32),
        ("runs/run/features", "feature store", "rows", 60),
        (saved.as_str(), "checkpoint", "step", 27),
        ("runs/run/export", "EAGLE3 draft", "draft_vocab_size", 40),
        (set.as_str(), "prepared set", "rows", 60),
    ] {
        let info = world.ok_json(&["info", folder, "--json"]);
        assert_eq!((&info["kind"], &info[key]), (&kind.into(), &value.into()), "{info}");
        let text = world.ok(&["info", folder]).stdout;
        assert!(text.contains(kind) && text.contains(key), "{text}");
    }
    let machine = world.ok_json(&["info", "--json"]);
    assert!(machine["threads"].as_u64() >= Some(1) && machine["version"].is_string(), "{machine}");
    let verified = world.ok(&["info", "runs/run/features", "--verify"]).stdout;
    assert!(verified.contains("verified: 60 records"), "{verified}");
}

/// JSON is all of stdout, also where a command does more than tell.
#[test]
fn json_parses_wherever_it_is_offered() {
    let world = World::new();
    let summary = world.ok_json(&["train", "R", "--json"]);
    assert_eq!(summary, world.json("runs/run/summary.json"));
    let store = world.ok_json(&["capture", "R", "--json"]);
    assert_eq!(store["rows"], 60);
    let verified = world.ok_json(&["info", "runs/run/features", "--verify", "--json"]);
    assert_eq!((&verified["rows"], &verified["verified"]["records"]), (&60.into(), &60.into()));
}

#[test]
fn every_command_explains_itself() {
    let world = World::new();
    for (command, words) in [
        ("--help", ["train", "capture", "recipe"]),
        ("prepare", ["--show-mask", "--set", "--json"]),
        ("capture", ["--set", "--json", "specforge info STORE --verify"]),
        ("train", ["--resume", "--overwrite", "--set"]),
        ("eval", ["--draft", "--prompts", "--temperature"]),
        ("export", ["--check", "--output", "--overwrite"]),
        ("info", ["--verify", "--json", "store"]),
    ] {
        let args: &[&str] = if command == "--help" { &["--help"] } else { &[command, "--help"] };
        let help = world.ok(args).stdout;
        for word in words {
            assert!(help.contains(word), "{command}: {word} is not in: {help}");
        }
    }
    assert_eq!(world.ok(&["--version"]).stdout.trim(), format!("specforge {}", env!("CARGO_PKG_VERSION")));
}

/// As with `| head -1` when the reader is gone before the first line.
#[test]
fn a_reader_that_has_gone_is_no_failure() {
    let world = World::new();
    world.ok(&["train", "R"]);
    for args in [
        &["info", "target"][..],
        &["info", "--json"],
        &["prepare", "R", "--show-mask", "0"],
        &["prepare", "R", "--json"],
        &["export", "--check", "runs/run/export"],
        &["eval", "R", "--json"],
        &["--help"],
    ] {
        let mut command = world.specforge(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

/// Who closes the terminal's lines loses them, not the run.
#[test]
fn a_run_goes_on_when_nobody_reads_its_progress() {
    let world = World::new();
    let mut command: Command = world.specforge(&["train", "R", "--json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["lossless"], Value::Bool(true));
}
