//! A target on ranks of its own, against ranks that each have it.

use specforge_testkit::SmallTarget;

use crate::kill::{Running, logged};
#[cfg(feature = "mpi")]
use crate::layout::ok;
use crate::layout::{
    EXACT, args, assert_resumes_to_the_same_bits, assert_same_run, on, summary, train, world,
};
use crate::parallel::{How, assert_same_log, left, ways};
use crate::world::{Ran, World, torn};

/// Ranks that have nothing but the target give the bits that each rank's own target gives.
#[test]
fn parallel_a_target_on_ranks_of_its_own_gives_the_same_bits() {
    let Some(world) = world() else { return };
    for how in ways() {
        for (name, sets, apart) in [
            ("two", &["parallel.data=2"][..], &["parallel.target-ranks=1"][..]),
            ("one", &["parallel.data=1"], &["parallel.target-ranks=1"]),
            (
                "copies",
                &["parallel.data=4", "parallel.fsdp=full"],
                &["parallel.target-ranks=2", "parallel.target-tensor=1"],
            ),
            ("rows", &["parallel.data=1", "parallel.sequence=2"], &["parallel.target-ranks=1"]),
            (
                "draft",
                &["parallel.data=1", "parallel.tensor=2", "parallel.target-tensor=1"],
                &["parallel.target-ranks=1"],
            ),
        ] {
            let [together, alone] = ["together", "apart"].map(|side| format!("{how:?}-{name}-{side}"));
            train(&world, how, &together, sets);
            let ran = train(&world, how, &alone, &[sets, apart].concat());
            let [mut got, mut want] = [&alone, &together].map(|name| left(&world, name));
            if name == "one" {
                // Without other ranks the optimizer's state is not saved flat.
                got.1.truncate(1);
                want.1.truncate(1);
            }
            assert!(got == want, "{alone}");
            for key in
                ["acceptance_length", "acceptance_length_untrained", "acceptance_per_position", "lossless"]
            {
                assert_eq!(summary(&world, &alone, key), summary(&world, &together, key), "{alone}: {key}");
            }
            assert_eq!(ran.stdout.matches("acceptance length after").count(), 1, "{}", ran.stdout);
            assert_eq!(torn(&world.path(&format!("runs/{alone}"))), Vec::<String>::new());
        }
    }
}

#[test]
fn parallel_a_shared_target_on_ranks_of_its_own_trains_what_one_trains() {
    let Some(world) = world() else { return };
    let alone = args("train", &[&["name=alone"], EXACT.as_slice()].concat());
    world.ok(&alone.iter().map(String::as_str).collect::<Vec<_>>());
    for how in ways() {
        for (name, sets) in [
            ("shared", &["parallel.data=2", "parallel.target-ranks=2"][..]),
            ("draft", &["parallel.data=1", "parallel.tensor=2", "parallel.target-ranks=2"]),
            ("copies", &["parallel.data=2", "parallel.target-ranks=4", "parallel.target-tensor=2"]),
        ] {
            let name = format!("{how:?}-{name}");
            train(&world, how, &name, &[sets, EXACT.as_slice()].concat());
            assert_same_run(&world, &name);
        }
    }
}

#[test]
fn parallel_a_run_with_the_target_apart_goes_on_to_the_same_bits() {
    let Some(world) = world() else { return };
    for how in ways() {
        let sets = ["parallel.data=2", "parallel.target-ranks=1"];
        assert_resumes_to_the_same_bits(&world, how, &format!("{how:?}"), &sets);
    }
    // Asked to stop, both sides end.
    let args = args("train", &["name=asked", "parallel.data=2", "parallel.target-ranks=2"]);
    let mut running = Running::of(on(&world, How::Threads, &args));
    running.wait_until(|| logged(&world, "asked") >= 3);
    running.signal("INT").refused(&["stopped at step", "--resume"]);
    // And another layout goes on.
    world.ok(&["train", "R", "--set", "name=asked", "--set", "parallel.data=1", "--resume"]);
    world.ok(&["train", "R", "--set", "name=alone"]);
    assert_same_log(&world, "asked", "alone");
}

/// An error on either side ends both, and is the one that is told.
#[test]
fn parallel_an_error_on_either_side_of_a_target_apart_ends_both() {
    let Some(world) = world() else { return };
    let fails = |how, world: &World, sets: &[&str], expected: &str| {
        let sets = [&["parallel.data=2", "parallel.target-ranks=2"], sets].concat();
        let started = std::time::Instant::now();
        let ran = Ran::of(&mut on(world, how, &args("train", &sets)));
        assert_ne!(ran.code, Some(0));
        assert!(ran.stderr.contains(expected) && !ran.stderr.contains("panicked"), "{}", ran.stderr);
        assert!(started.elapsed().as_secs() < 30, "a rank waited");
    };
    let mut damaged = SmallTarget::shared(1);
    damaged.tensor("model.layers.2.mlp.up_proj.weight").2[7] = f32::NAN;
    let broken = World::with_target(&damaged);
    for how in ways() {
        fails(how, &broken, &["eval.training-prompts=0"], "hidden states are not finite");
        let name = format!("name={how:?}");
        fails(how, &world, &[&name, "train.optimizer.lr=1e30"], "is NaN");
    }
}

/// A rank of the target's own is killed: those that train end, and the run goes on to the same bits.
#[cfg(feature = "mpi")]
#[test]
fn parallel_a_killed_rank_of_the_target_ends_the_run_which_goes_on() {
    let Some(world) = world() else { return };
    let sets = ["parallel.data=2", "parallel.target-ranks=2"];
    train(&world, How::Processes, "whole", &sets);
    let args = args("train", &[&["name=killed", "train.auto-resume=true"], sets.as_slice()].concat());
    for (lines, rank) in [(3, 2), (9, 3)] {
        let mut running = Running::of(on(&world, How::Processes, &args));
        running.wait_until(|| logged(&world, "killed") >= lines);
        let started = std::time::Instant::now();
        if let Some(ran) = running.kill_child(rank).filter(|ran| ran.code != Some(0)) {
            assert!(started.elapsed().as_secs() < 15, "the others went on");
            assert!(ran.stderr.contains("signal 9"), "{}", ran.stderr);
        }
    }
    ok(&world, How::Processes, &args);
    assert!(left(&world, "killed") == left(&world, "whole"));
}
