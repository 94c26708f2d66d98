//! `specforge plan`: figures of a recipe and of more cards, and what is said where they do not fit.

use serde_json::Value;

use crate::world::World;

#[track_caller]
fn at(facts: &Value, pointer: &str) -> f64 {
    facts.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer} in {facts:#}"))
}

#[test]
fn a_recipe_is_planned_for_this_machine_and_for_more_cards() {
    let world = World::new();
    let here = world.ok_json(&["plan", "recipe.toml", "--json", "--set", "device=cpu"]);
    assert_eq!((&here["card"]["name"], &here["larger"]), (&"cpu".into(), &Value::Array(vec![])));
    let parts: f64 =
        here["projection"]["memory"].as_object().unwrap().values().filter_map(Value::as_f64).sum();
    assert_eq!(parts, at(&here, "/projection/memory_bytes"));
    // The steps are those that a run takes, and nothing is written for a run.
    let run = world.ok_json(&["train", "recipe.toml", "--json"]);
    assert_eq!(here["projection"]["steps"], run["steps"]);

    let cards = ["plan", "recipe.toml", "--json", "--card", "h100", "--gpus", "4", "--zero", "2"];
    let four = world.ok_json(&cards);
    assert_eq!(at(&four, "/projection/layout/data"), 4.0);
    let n = at(&four, "/parameters");
    // Two micro-batches of a step, in which four ranks have half of one each: reduce-scatter of float32 gradients,
    // all-gather of bf16 weights. Steps are the same on any number of ranks.
    assert_eq!(at(&four, "/projection/traffic/data_bytes"), 0.75 * 6.0 * n);
    assert_eq!(at(&four, "/projection/steps"), at(&here, "/projection/steps"));
    // On more cards, one each.
    let accumulation = |i: usize| at(&four, &format!("/larger/{i}/accumulation"));
    assert_eq!([accumulation(0), accumulation(1), accumulation(2)], [8.0, 64.0, 512.0]);
    assert!(at(&four, "/larger/0/steps") < at(&four, "/projection/steps") / 3.0, "{four:#}");
    let said = world.ok(&cards[..2].iter().chain(&cards[3..]).copied().collect::<Vec<_>>()).stdout;
    assert!(said.contains("4 of them share 2 of a step's micro-batches, train.accumulation = 4"), "{said}");
    // The recipe's own ranks count where no others are asked for.
    let own = world.ok_json(&["plan", "recipe.toml", "--json", "--card", "h100", "--set", "parallel.data=2"]);
    let layout = |key: &str| at(&own, &format!("/projection/layout/{key}"));
    assert_eq!([layout("data"), layout("zero")], [2.0, 1.0]);
    let ranks = |i: usize| at(&four, &format!("/larger/{i}/layout/data"));
    assert_eq!([ranks(0), ranks(1), ranks(2)], [8.0, 64.0, 512.0]);
}

/// A target that is shared takes as much less memory on each rank; on ranks of its own it takes none of the others'.
#[test]
fn a_target_takes_memory_where_it_lies() {
    let mut target = specforge_testkit::SmallTarget::shared(1);
    // As plans see it: nobody reads the weights.
    target.config["hidden_size"] = 4096.into();
    target.config["head_dim"] = 128.into();
    for key in ["num_attention_heads", "num_key_value_heads"] {
        target.config[key] = 32.into();
    }
    target.config["intermediate_size"] = 14336.into();
    let world = World::with_target(&target);
    let plan = |more: &[&str]| {
        let args = ["plan", "recipe.toml", "--json", "--card", "h100", "--gpus", "8"];
        world.ok_json(&[&args[..], more].concat())
    };
    let of_target = |facts: &Value| at(facts, "/projection/memory/target");
    let (whole, shared) = (plan(&[]), plan(&["--set", "parallel.target-tensor=8"]));
    assert!(of_target(&shared) < 0.14 * of_target(&whole), "{} {}", of_target(&shared), of_target(&whole));
    assert_eq!(whole["projection"]["target_memory_bytes"], Value::Null);
    assert!(at(&shared, "/projection/traffic/target_bytes") > 0.0);
    let apart = plan(&["--target-ranks", "4", "--target-tensor", "2"]);
    assert!(of_target(&apart) < 0.01 * of_target(&whole));
    let of_its_own = at(&apart, "/projection/target_memory_bytes");
    assert!(of_its_own > 0.5 * of_target(&whole), "{of_its_own}");
    assert_eq!(at(&apart, "/projection/layout/data"), 4.0);
    // Where it does not fit, the nearest setting is to share it.
    let gib = at(&whole, "/projection/memory_bytes") * 0.9 / f64::from(1 << 30);
    let tight = ["plan", "recipe.toml", "--card", "h100", "--gpus", "8", "--memory", &gib.to_string()];
    world.fails(&tight, &["the nearest setting that fits: --set parallel.target-tensor=2 ("]);
    let refused = ["plan", "recipe.toml", "--card", "h100", "--gpus", "8", "--target-tensor", "3"];
    world.fails(&refused, &["--target-tensor 3", "a divisor of 8"]);
}

#[test]
fn tokens_may_be_assumed_and_a_store_takes_room() {
    let world = World::new();
    let args = ["plan", "recipe.toml", "--json", "--card", "h200", "--tokens", "1e6", "--supervised", "0.5"];
    let online = world.ok_json(&args);
    assert_eq!((at(&online, "/tokens"), at(&online, "/store_bytes")), (1e6, 0.0));
    let largest = |name: &str| at(&online, &format!("/largest_micro_batch/{name}"));
    assert!(largest("live") < 0.6 * largest("tokens"), "{online:#}");
    let offline = world.ok_json(&[&args[..], &["--set", "mode=offline"]].concat());
    assert!(at(&offline, "/store_bytes") > 1e6 * 2.0 * 4.0 * 32.0, "{offline:#}");
    assert!(at(&offline, "/projection/memory_bytes") < at(&online, "/projection/memory_bytes"));
    // Nobody read the conversations.
    world.write("conversations.jsonl", "no JSON");
    world.ok_json(&args);
}

#[test]
fn what_cannot_fit_is_refused_with_what_can() {
    let world = World::new();
    let plan = |more: &[&str]| world.run(&[&["plan", "recipe.toml", "--card", "a100"], more].concat());
    let all = world.ok_json(&["plan", "recipe.toml", "--card", "a100", "--json"]);
    let gib = (at(&all, "/projection/memory_bytes") * 0.9 + f64::from(600 << 20)) / f64::from(1 << 30);
    let tight = plan(&["--memory", &gib.to_string()]);
    assert_eq!(tight.code, Some(1), "{tight:?}");
    assert!(tight.stderr.contains("the nearest setting that fits: --set mode=offline"), "{tight:?}");
    let none = plan(&["--memory", "0.1"]);
    assert!(none.code == Some(1) && none.stderr.contains("no setting of the recipe fits"), "{none:?}");
    for (args, message) in [
        (&["--gpus", "6", "--tensor", "4"][..], "no multiple of --tensor 4"),
        (&["--gpus", "3", "--tensor", "3"], "a multiple of 3"),
        (&["--supervised", "0.5"], "--tokens"),
        (&["--tokens", "0"], "above 0"),
        (&["--zero", "4"], "0..=3"),
        (&["--set", "target.path=nowhere"], "there is no such folder"),
    ] {
        let ran = plan(args);
        assert!(ran.code == Some(1) && ran.stderr.contains(message), "{args:?}: {ran:?}");
    }
}

/// The quick start's first steps: what the process took at the most is what was planned.
#[cfg(target_os = "linux")]
#[test]
fn the_memory_of_the_quick_start_is_what_was_planned() {
    let world = World::new();
    world.write_quick_start("quick.toml", 20);
    let on = |command: &str| {
        // Threads count: each packs matrices for itself. Few prompts: decoding takes less than training.
        let sets = ["device=cpu", "threads=2", "eval.max-prompts=4"].map(|set| ["--set", set]);
        world.ok_json(&[&[command, "quick.toml", "--json"], sets.as_flattened()].concat())
    };
    let planned = at(&on("plan"), "/projection/memory_bytes");
    let taken = at(&on("train"), "/peak_memory_bytes");
    assert!((planned / taken - 1.0).abs() < 0.1, "{planned} B planned, the process took {taken} B");
}
