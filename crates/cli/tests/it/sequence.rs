//! Ranks that share the tokens of a batch, as threads of the program, against one that has them all.

use specforge_testkit::test_device;

use crate::left::{assert_same_export, steps};
use crate::world::World;

/// Trains on a mesh and holds its log and weights against those of the run `alone`.
#[track_caller]
fn check(world: &World, (name, alone): (&str, &str), sets: &[&str]) {
    let own = format!("name={name}");
    let sets: Vec<&str> = [&["parallel.ranks-in-process=true", &own], sets].concat();
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let args: Vec<&str> = ["train", "recipe.toml"].into_iter().chain(sets).collect();
    world.ok(&args);
    let (got, want) = (steps(world, name), steps(world, alone));
    assert_eq!(got.len(), want.len(), "{name}");
    for (got, want) in got.iter().zip(&want) {
        assert_eq!(got["step"], want["step"], "{name}");
        for figure in ["loss", "grad_norm"] {
            let [got, want] = [got, want].map(|line| line[figure].as_f64().unwrap());
            assert!((got / want - 1.0).abs() < 1e-4, "{name}: {figure} {got}, alone {want}");
        }
        let values = |line: &serde_json::Value| -> Vec<f64> {
            line["acceptance"].as_array().unwrap().iter().filter_map(serde_json::Value::as_f64).collect()
        };
        for (got, want) in values(got).iter().zip(values(want)) {
            assert!((got - want).abs() < 1e-4, "{name}: acceptance {got}, alone {want}");
        }
    }
    assert_same_export(world, name, alone);
}

#[test]
fn parallel_sequence_ranks_train_what_one_trains() {
    if test_device() != "cpu" {
        return;
    }
    let world = World::new();
    world.ok(&["train", "recipe.toml", "--set", "name=alone"]);
    let one = "parallel.data=1";
    check(&world, ("gather", "alone"), &[one, "parallel.sequence=3"]);
    check(&world, ("ring", "alone"), &[one, "parallel.sequence=3", "parallel.exchange=ring"]);
    check(&world, ("heads", "alone"), &[one, "parallel.sequence=2", "parallel.exchange=heads"]);
    let both = ["parallel.data=2", "parallel.sequence=2", "parallel.fsdp=gradients"];
    check(&world, ("both", "alone"), &both);
    // What one has saved another goes on with.
    world.ok(&["eval", "recipe.toml", "--set", "name=both"]);
}

#[test]
fn parallel_sequence_ranks_train_every_objective() {
    if test_device() != "cpu" {
        return;
    }
    let world = World::new();
    for name in ["lk-alpha", "lk-lambda"] {
        let objective = format!("method.eagle3.objective={name}");
        world.ok(&["train", "recipe.toml", "--set", &format!("name={name}"), "--set", &objective]);
        let of = [&objective, "parallel.data=1"];
        let ring = [&of[..], &["parallel.sequence=3"]].concat();
        check(&world, (&format!("{name}-ring"), name), &ring);
        let heads = [&of[..], &["parallel.sequence=2", "parallel.exchange=heads"]].concat();
        check(&world, (&format!("{name}-heads"), name), &heads);
    }
}

#[test]
fn parallel_what_a_sequence_cannot_is_refused() {
    let world = World::new();
    let base =
        ["train", "recipe.toml", "--set", "parallel.ranks-in-process=true", "--set", "parallel.data=1"];
    for (sets, message) in [
        (&["parallel.sequence=8", "parallel.exchange=heads"][..], "gather keys"),
        (&["parallel.sequence=2", "train.on-oom=shrink"], "train.on-oom"),
        (&["parallel.sequence=0"], "parallel.sequence"),
    ] {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> = base.into_iter().chain(sets).collect();
        let ran = world.run(&args);
        assert!(ran.code == Some(1) && ran.stderr.contains(message), "{args:?}: {ran:?}");
    }
}
