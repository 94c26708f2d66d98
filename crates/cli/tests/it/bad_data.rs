//! Recipes and conversations with something wrong: what it is, where, and what to do.

use crate::world::{World, line, names};

/// Replaces a part of the recipe that must be there.
fn edit(world: &World, from: &str, to: &str) {
    let recipe = world.text("recipe.toml");
    assert!(recipe.contains(from), "{from}");
    world.write("recipe.toml", recipe.replace(from, to));
}

/// What a refused command must not leave.
fn nothing_begun(world: &World) {
    assert!(!world.has("runs/run/checkpoints"), "{:?}", names(&world.path("runs/run")));
}

#[test]
fn a_recipe_that_is_not_there() {
    let world = World::new();
    for command in ["prepare", "capture", "train", "eval", "export"] {
        world.fails(&[command, "no.toml"], &["no.toml", "No such file"]);
    }
}

#[test]
fn a_typo_in_a_recipe_is_found_by_line_and_column() {
    let world = World::new();
    edit(&world, "tokens-per-batch", "token-per-batch");
    let line = 1 + world.text("recipe.toml").lines().position(|l| l.starts_with("token-per")).unwrap();
    world
        .fails(&["train", "R"], &[&format!("recipe.toml:{line}:1"), "token-per-batch", "`tokens-per-batch`"]);
    assert!(!world.has("runs"));
}

#[test]
fn several_problems_of_a_recipe_are_told_at_once() {
    let world = World::new();
    edit(&world, "epochs = 2", "epochs = 0");
    edit(&world, "max-length = 96", "max-length = \"long\"");
    edit(&world, "mode = \"online\"", "mode = \"onlin\"");
    world.fails(&["prepare", "R"], &["train.epochs", "max-length", "onlin", "recipe.toml:"]);
    let world = World::new();
    world.fails(&["train", "R", "--set", "train.optimizer.beta1=0.8"], &["--set", "beta1"]);
    world.fails(&["train", "R", "--set", "seed"], &["--set", "seed"]);
    world.fails(&["train", "R", "--set", "device=tpu"], &["device", "cpu"]);
}

#[test]
fn a_wrong_argument_is_the_users_error_too() {
    let world = World::new();
    let ran = world.run(&["train", "R", "--rseume"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("--resume"), "{}", ran.stderr);
}

#[test]
fn conversations_that_are_not_there_or_empty() {
    let world = World::new();
    for (content, expected) in [("", "holds no row"), ("\n\n", "holds no row"), ("[]", "holds no row")] {
        world.write("conversations.jsonl", content);
        world.fails(&["train", "R"], &["conversations.jsonl", expected]);
    }
    fs_err::remove_file(world.path("conversations.jsonl")).unwrap();
    world.fails(&["train", "R"], &["conversations.jsonl", "No such file"]);
    nothing_begun(&world);
}

#[test]
fn a_malformed_row_stops_or_is_skipped_and_counted() {
    let world = World::new();
    let good = world.text("conversations.jsonl");
    let rows: Vec<&str> = good.split_inclusive('\n').collect();
    let bad = "{\"messages\": [{\"role\": \"user\", \"content\": \n";
    world.write("conversations.jsonl", rows[..5].concat() + bad + &rows[5..].concat() + "17\n");
    world.fails(&["train", "R"], &["conversations.jsonl:6", "on-error"]);
    nothing_begun(&world);
    let report = world.ok_json(&["prepare", "R", "--set", "data.on-error=skip", "--json"]);
    assert_eq!((&report["rows_read"], &report["rows_kept"]), (&62.into(), &60.into()), "{report}");
    assert_eq!(report["dropped"]["malformed"], 2, "{report}");
    assert_eq!((&report["examples"][0]["line"], &report["examples"][1]["line"]), (&6.into(), &62.into()));
    let ran = world.ok(&["prepare", "R", "--set", "data.on-error=skip"]);
    assert!(ran.stderr.contains("2 dropped: malformed row"), "{}", ran.stderr);
}

#[test]
fn a_template_that_raises() {
    let mut target = specforge_testkit::SmallTarget::llama(1);
    let raise = "{%- if messages[0].content == 'bad' %}{{ raise_exception('not this one') }}{%- endif %}";
    target.template = format!("{raise}{}", target.template);
    let world = World::with_target(&target);
    let good = world.text("conversations.jsonl");
    world.write("conversations.jsonl", good + &line("bad", "answer"));
    world.fails(&["train", "R"], &["conversations.jsonl:61", "not this one"]);
    let report = world.ok_json(&["prepare", "R", "--set", "data.on-error=skip", "--json"]);
    assert_eq!(report["dropped"]["template"], 1, "{report}");
    // One that raises on everything leaves nothing to train on.
    target.template = "{{ raise_exception('never') }}".to_owned();
    target.write(&world.path("target"));
    world.fails(&["train", "R", "--set", "data.on-error=skip"], &["never"]);
}

#[test]
fn a_template_that_is_not_there_or_not_known() {
    let world = World::new();
    world.write("target/tokenizer_config.json", "{}");
    world.fails(&["train", "R"], &["template"]);
    world.fails(&["train", "R", "--set", "data.template.name=chatlm"], &["chatlm", "known"]);
}

#[test]
fn rows_without_a_supervised_token() {
    let world = World::new();
    let question = "{\"messages\": [{\"role\": \"user\", \"content\": \"and?\"}]}\n";
    world.write("conversations.jsonl", question.repeat(3));
    world.fails(&["train", "R"], &["no row of 3 is left", "3 x no supervised token"]);
    let world = World::new();
    world.fails(
        &["train", "R", "--set", "data.min-supervised=90"],
        &["no row of 60 is left", "too few supervised"],
    );
}

#[test]
fn a_draft_vocabulary_larger_than_what_was_seen() {
    let world = World::new();
    let set = "method.eagle3.draft-vocab-size=200";
    world.fails(&["train", "R", "--set", set], &["draft vocabulary of 200", "different tokens", "draft"]);
    nothing_begun(&world);
}

#[test]
fn prompts_that_are_empty_or_unusable() {
    let world = World::new();
    let with = ["train", "R", "--set", "eval.prompts=prompts.jsonl"];
    world.fails(&with, &["prompts.jsonl", "No such file"]);
    world.write("prompts.jsonl", "");
    world.fails(&with, &["prompts.jsonl", "holds no row"]);
    world.write("prompts.jsonl", "{\"prompt\": \"ok\"}\n{\"prompt\": 3}\n");
    world.fails(&with, &["prompts.jsonl:2", "`prompt`"]);
    world.write("prompts.jsonl", "{\"input_ids\": [5, 9999]}\n");
    world.fails(&with, &["prompts.jsonl:1", "9999"]);
    nothing_begun(&world);
}

/// One row cannot be held out and trained on: the run says that it measures nothing, and invents no figure.
#[test]
fn a_run_with_nothing_to_measure_on_says_so() {
    let world = World::new();
    world.write("conversations.jsonl", line("ABC", "DEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcdefghijklmnop"));
    let ran = world.ok(&["train", "R"]);
    assert!(ran.stderr.contains("nothing will be measured"), "{}", ran.stderr);
    assert!(ran.stdout.contains("not measured"), "{}", ran.stdout);
    let summary = world.json("runs/run/summary.json");
    assert!(summary["acceptance_length"].is_null() && summary["lossless"].is_null(), "{summary}");
    assert!(world.text("runs/run/metrics.jsonl").contains("\"loss\":null"));
}

#[test]
fn some_row_is_always_trained_on() {
    let world = World::new();
    let ran = world.ok(&["train", "R", "--set", "data.eval-fraction=0.999"]);
    assert!(ran.stderr.contains("1 rows, 59 held out"), "{}", ran.stderr);
}

#[test]
fn a_prompt_longer_than_the_targets_positions() {
    let world = World::new();
    let ids: Vec<String> = (0..600).map(|i| (i % 90).to_string()).collect();
    world.write("prompts.jsonl", format!("{{\"input_ids\": [{}]}}\n", ids.join(",")));
    world.fails(&["train", "R", "--set", "eval.prompts=prompts.jsonl"], &["600", "512"]);
}
