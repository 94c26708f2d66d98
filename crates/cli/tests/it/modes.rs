//! Online, offline and cache are one run: the same bits wherever the hidden states come from.

use specforge_testkit::{announce_skip, test_device};

use crate::kill::{Running, logged};
use crate::left::Left;
use crate::world::World;

/// The run to compare with. Only the CPU gives a row the same bits whatever it is batched with.
fn online(world: &World) -> Option<Left> {
    if test_device() != "cpu" {
        announce_skip("on a GPU a row's bits depend on the rows beside it");
        return None;
    }
    world.ok(&["train", "R"]);
    Some(Left::by(world, "run"))
}

#[test]
fn offline_training_gives_the_bits_of_online_training() {
    let world = World::new();
    let Some(online) = online(&world) else { return };
    for encoding in ["bf16", "lossless"] {
        let sets = [
            "--set".to_owned(),
            format!("name={encoding}"),
            "--set".to_owned(),
            format!("store.encoding={encoding}"),
            "--set".to_owned(),
            "mode=offline".to_owned(),
        ];
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        world.ok(&[&["capture", "R"], sets.as_slice()].concat());
        world.ok(&[&["train", "R"], sets.as_slice()].concat());
        Left::by(&world, encoding).assert_same(&online, encoding);
    }
}

/// One scale per row in eight bits is lossy, and good enough to train on.
#[test]
fn an_fp8_store_trains_a_draft_nearly_as_good() {
    let world = World::new();
    let sets = ["--set", "store.encoding=fp8", "--set", "mode=offline"];
    world.ok(&[&["capture", "R"], sets.as_slice()].concat());
    world.ok(&[&["train", "R"], sets.as_slice()].concat());
    let summary = world.json("runs/run/summary.json");
    let length = |key: &str| summary[key].as_f64().unwrap();
    assert!(length("acceptance_length") > length("acceptance_length_untrained") + 0.1, "{summary}");
}

#[test]
fn cache_mode_gives_the_bits_of_online_training() {
    let world = World::new();
    let Some(online) = online(&world) else { return };
    for encoding in ["bf16", "lossless"] {
        let (name, encoding) = (format!("name=cache-{encoding}"), format!("store.encoding={encoding}"));
        world.ok(&["train", "R", "--set", &name, "--set", "mode=cache", "--set", &encoding]);
        let run = name.strip_prefix("name=").unwrap();
        Left::by(&world, run).assert_same(&online, run);
        let info = world.ok_json(&["info", &format!("runs/{run}/features"), "--json"]);
        assert_eq!(info["rows"], 60, "{info}");
    }
}

/// In the first pass, which writes the store, and in the second, which reads it.
#[test]
fn cache_mode_resumes_to_the_same_bits() {
    let world = World::new();
    let Some(online) = online(&world) else { return };
    for lines in [1, 6, online.last_step() / 2, online.last_step() / 2 + 3] {
        let run = format!("cache-{lines}");
        let name = format!("name={run}");
        let args = ["train", "R", "--set", &name, "--set", "mode=cache"];
        let mut running = Running::start(&world, &args);
        running.wait_until(|| logged(&world, &run) >= lines);
        running.kill();
        world.ok(&[args.as_slice(), &["--resume"]].concat());
        Left::by(&world, &run).assert_same(&online, &run);
    }
}

#[test]
fn cache_mode_refuses_an_encoding_that_changes_values() {
    let world = World::new();
    let sets = ["--set", "mode=cache", "--set", "store.encoding=fp8"];
    world.fails(&[&["train", "R"], sets.as_slice()].concat(), &["fp8", "bf16", "lossless"]);
}

/// Whoever starts online may go on from a store: `mode` decides no bit.
#[test]
fn a_run_may_change_from_online_to_offline() {
    let world = World::new();
    let Some(online) = online(&world) else { return };
    let store = ["--set", "store.path=store"];
    world.ok(&[&["capture", "R"], store.as_slice()].concat());
    let mut running = Running::start(&world, &["train", "R", "--set", "name=moved"]);
    running.wait_until(|| logged(&world, "moved") >= 6);
    running.kill();
    let sets = ["--set", "name=moved", "--set", "mode=offline", "--resume"];
    world.ok(&[&["train", "R"], store.as_slice(), &sets].concat());
    Left::by(&world, "moved").assert_same(&online, "online, then offline");
}
