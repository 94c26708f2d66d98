//! What a recipe resolves to.

use std::path::Path;

use specforge_config::{CaptureDType, Length, Mode, Origin, RunPlan};

use crate::{LEAST, parse};

#[test]
fn the_least_recipe_gets_the_defaults() {
    let plan = parse(LEAST, &[]).unwrap().plan;
    assert_eq!(plan.run_dir, Path::new("/here/runs/tiny"));
    assert_eq!(plan.target.path, Path::new("/here/model"));
    assert_eq!(plan.data.conversations, [Path::new("/here/rows.jsonl").to_owned().into()]);
    assert_eq!(plan.data.cache_dir, Path::new("/here/runs/cache"));
    assert_eq!(plan.store.path, Path::new("/here/runs/tiny/features"));
    assert_eq!(plan.export.path, Path::new("/here/runs/tiny/export"));
    assert_eq!((plan.mode, plan.seed, plan.capture.dtype), (Mode::Online, 42, CaptureDType::Bf16));
    assert_eq!((plan.train.length, plan.train.eval_every), (Length::Epochs(1), None));
    assert_eq!((plan.eval.draft_steps, plan.eval.topk, plan.eval.draft_tokens), (5, 1, 6));
    assert_eq!(plan.store.shard_bytes, 1 << 30);
}

#[test]
fn paths_are_absolute_and_plain() {
    let sets =
        ["target.path=./a/./b", "output-dir=/elsewhere", "eval.prompts=p.txt", "train.warm-start=../draft"];
    let plan = parse(LEAST, &sets).unwrap().plan;
    assert_eq!(plan.target.path.to_str(), Some("/here/a/b"));
    assert_eq!(plan.run_dir, Path::new("/elsewhere/tiny"));
    assert_eq!(plan.eval.prompts.as_deref(), Some(Path::new("/here/p.txt")));
    assert_eq!(plan.train.warm_start.as_deref(), Some(Path::new("/here/../draft")));
}

#[test]
fn a_tree_verifies_as_many_tokens_as_it_has_up_to_eight() {
    for (steps, topk, tokens) in [(5, 4, 8), (1, 3, 4), (2, 2, 7)] {
        let sets = [format!("eval.draft-steps={steps}"), format!("eval.topk={topk}")];
        let plan = parse(LEAST, &sets.each_ref().map(String::as_str)).unwrap().plan;
        assert_eq!(plan.eval.draft_tokens, tokens, "{steps} {topk}");
    }
}

#[test]
fn the_data_settings_reach_the_preparation() {
    let plan =
        parse(LEAST, &["data.max-length=77", "data.format=text", "data.last-turn-only=true"]).unwrap().plan;
    let config = plan.prepare_config();
    assert_eq!((config.max_length, config.last_turn_only), (77, true));
    assert_eq!(config.format, Some(specforge_data::RowFormat::Text));
    assert_eq!((config.inputs, config.target), (plan.data.conversations, plan.target.path));
}

#[test]
fn conversations_may_have_weights() {
    let list = "data.conversations=[\"a.jsonl\", { path = \"b/*.parquet\", weight = 2 }]";
    let plan = parse(LEAST, &[list, "data.deduplicate=true"]).unwrap().plan;
    let config = plan.prepare_config();
    let found: Vec<_> =
        config.inputs.iter().map(|input| (input.path.to_str().unwrap(), input.weight)).collect();
    assert_eq!(found, [("/here/a.jsonl", 1.0), ("/here/b/*.parquet", 2.0)]);
    assert_eq!((config.seed, config.deduplicate), (42, true));
    for (value, expected) in [
        ("{ path = \"a\", weight = 0.0 }", "weight of a: expected more than 0, at most 1000, got 0"),
        ("{ path = \"a\", weight = nan }", "got NaN"),
        ("{ path = \"a\", wieght = 1.0 }", "`path` and `weight` are known here, not `wieght`"),
        ("{ weight = 1.0 }", "a `path` is missing"),
        ("3", "expected a path, or { path = \"...\", weight = 0.5 }"),
    ] {
        let error = parse(LEAST, &[&format!("data.conversations=[{value}]")]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_plan_is_saved_and_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.json");
    for sets in [&[][..], &["train.max-steps=5", "mode=cache", "train.schedule.kind=wsd", "eval.topk=3"]] {
        let plan = parse(LEAST, sets).unwrap().plan;
        fs_err::write(&path, plan.to_json()).unwrap();
        assert_eq!(RunPlan::read(&path).unwrap(), plan);
    }
    fs_err::write(&path, "{\"name\": 3}").unwrap();
    let error = RunPlan::read(&path).unwrap_err().to_string();
    assert!(error.ends_with("plan.json: not a plan of this version"), "{error}");
}

#[test]
fn every_value_has_an_origin() {
    let recipe = parse(&format!("{LEAST}[train]\nmax-steps = 5\n"), &["store.shard-mib=2"]).unwrap();
    let settings = recipe.settings();
    let find =
        |key: &str| settings.iter().find(|setting| setting.key == key).unwrap_or_else(|| panic!("{key}"));
    assert_eq!((&*find("train.max-steps").value, &find("train.max-steps").origin), ("5", &Origin::Line(8)));
    assert_eq!(
        (&*find("store.shard-bytes").value, &find("store.shard-bytes").origin),
        ("2097152", &Origin::Set)
    );
    assert_eq!(find("train.keep").origin, Origin::Default);
    assert_eq!(find("name").origin, Origin::Line(1));
    assert_eq!(find("method.eagle3.ttt-steps").value, "7");
}
