//! Several ranks, as threads of the program or as processes that `mpirun` starts.

use std::process::Command;

use serde_json::Value;
use specforge_testkit::test_device;

use crate::kill::{Running, logged};
use crate::left::{Left, steps};
use crate::world::{Ran, World, names, torn};

/// How the ranks of a run are started.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum How {
    Threads,
    #[cfg(feature = "mpi")]
    Processes,
}

impl How {
    /// Kills the ranks, or one of them, so that nothing can be cleaned up.
    pub(crate) fn kill(self, running: Running) {
        match self {
            Self::Threads => {
                running.kill();
            }
            #[cfg(feature = "mpi")]
            Self::Processes => {
                running.kill_child(0);
            }
        }
    }
}

/// All that this build has.
pub(crate) fn ways() -> Vec<How> {
    vec![
        How::Threads,
        #[cfg(feature = "mpi")]
        How::Processes,
    ]
}

/// A command on so many ranks.
fn on(world: &World, how: How, ranks: usize, args: &[&str]) -> Command {
    let data = format!("parallel.data={ranks}");
    let threads = ["--set", &data, "--set", "parallel.ranks-in-process=true"];
    match how {
        How::Threads => world.specforge(&[args, &threads].concat()),
        #[cfg(feature = "mpi")]
        How::Processes => crate::world::mpirun(&world.specforge(args), ranks),
    }
}

#[track_caller]
fn ok(world: &World, how: How, ranks: usize, args: &[&str]) -> Ran {
    let ran = Ran::of(&mut on(world, how, ranks, args));
    assert_eq!(ran.code, Some(0), "{how:?} {ranks} {args:?}: {}{}", ran.stdout, ran.stderr);
    ran
}

/// A recipe of short runs: everything in float32.
pub(crate) fn world() -> Option<World> {
    (test_device() == "cpu").then(World::new)
}

fn f64_of(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

/// The log of a run says what another one's does, within the rounding of sums in another order.
#[track_caller]
pub(crate) fn assert_same_log(world: &World, name: &str, other: &str) {
    let (got, want) = (steps(world, name), steps(world, other));
    assert_eq!(got.len(), want.len(), "{name}");
    for (got, want) in got.iter().zip(&want) {
        assert_eq!((&got["step"], &got["epoch"], &got["lr"]), (&want["step"], &want["epoch"], &want["lr"]));
        let off = (f64_of(&got["loss"]) / f64_of(&want["loss"]) - 1.0).abs();
        assert!(off < 1e-5, "{name}: the loss of step {} is off by {off}", got["step"]);
    }
}

/// Tokens that a run trained on, by its last checkpoint.
pub(crate) fn tokens(world: &World, name: &str) -> Value {
    let latest = world.text(&format!("runs/{name}/checkpoints/latest"));
    world.json(&format!("runs/{name}/checkpoints/{}/state.json", latest.trim()))["tokens"].clone()
}

pub(crate) fn set(name: &str) -> String {
    format!("name={name}")
}

#[test]
fn parallel_runs_log_what_a_single_rank_logs() {
    let Some(world) = world() else { return };
    world.ok(&["train", "R", "--set", "name=alone"]);
    for how in ways() {
        for (ranks, fsdp) in [(2, "none"), (4, "optimizer"), (3, "gradients"), (2, "full")] {
            let name = format!("{how:?}-{fsdp}");
            let (set, level) = (set(&name), format!("parallel.fsdp={fsdp}"));
            let ran = ok(&world, how, ranks, &["train", "R", "--set", &set, "--set", &level]);
            assert_same_log(&world, &name, "alone");
            assert_eq!(tokens(&world, &name), tokens(&world, "alone"));
            assert!(world.has(&format!("runs/{name}/export/model.safetensors")));
            assert_eq!(ran.stdout.matches("acceptance length after").count(), 1, "{}", ran.stdout);
            assert_eq!(torn(&world.path(&format!("runs/{name}"))), Vec::<String>::new());
        }
    }
}

/// What a run on several ranks left that must be the same bits.
pub(crate) fn left(world: &World, name: &str) -> (Vec<Value>, Vec<Vec<u8>>, Value) {
    let latest = world.text(&format!("runs/{name}/checkpoints/latest"));
    let folder = format!("runs/{name}/checkpoints/{}", latest.trim());
    let files = names(&world.path(&folder)).into_iter().filter(|file| file.ends_with(".safetensors"));
    (
        steps(world, name),
        files.map(|file| world.bytes(&format!("{folder}/{file}"))).collect(),
        tokens(world, name),
    )
}

#[test]
fn parallel_a_stopped_run_goes_on_to_the_same_bits() {
    let Some(world) = world() else { return };
    ok(&world, How::Threads, 2, &["train", "R", "--set", "name=whole"]);
    // Killed so that nobody can clean up, while a step, a checkpoint or an evaluation is going on.
    for lines in [1, 4, 8, 13] {
        let name = format!("killed-{lines}");
        let args = ["train", "R", "--set", &set(&name)];
        let mut running = Running::of(on(&world, How::Threads, 2, &args));
        running.wait_until(|| logged(&world, &name) >= lines);
        running.kill();
        ok(&world, How::Threads, 2, &[&args[..], &["--resume"]].concat());
        assert!(left(&world, &name) == left(&world, "whole"), "{name} differs from the whole run");
    }
}

/// Kills of the test below, and how many of them a run has to get over.
#[cfg(feature = "mpi")]
const KILLS: (usize, usize) = (50, 5);

/// A rank and how many lines are in the log when it is killed: the kills of one run, the same every time.
#[cfg(feature = "mpi")]
fn kills(lcg: &mut specforge_testkit::Lcg, ranks: usize, last: usize) -> Vec<(usize, usize)> {
    let mut lines: Vec<usize> = (0..KILLS.1).map(|_| 1 + lcg.below(last)).collect();
    lines.sort_unstable();
    lines.into_iter().map(|lines| (lcg.below(ranks), lines)).collect()
}

/// Takes a run through its kills to the end: each time the other rank stops with an error.
#[cfg(feature = "mpi")]
fn survive(world: &World, name: &str, ranks: usize, kills: &[(usize, usize)], sets: &[&str]) {
    let set = set(name);
    let own = ["--set", set.as_str(), "--set", "train.auto-resume=true"];
    let args = [&["train", "R"], sets, &own].concat();
    for &(rank, lines) in kills {
        // Never before it has got further than when it was killed last.
        let lines = lines.max(logged(world, name) + 1);
        let mut running = Running::of(on(world, How::Processes, ranks, &args));
        running.wait_until(|| logged(world, name) >= lines);
        let started = std::time::Instant::now();
        let ran = running.kill_child(rank).expect("both ranks are at work");
        let what = format!("{name}: rank {rank} killed at {lines}");
        assert!(ran.code != Some(0) && ran.stderr.contains("signal 9"), "{what}: {ran:?}");
        assert!(started.elapsed().as_secs() < 15, "{what}: the other went on");
    }
    ok(world, How::Processes, ranks, &args);
    assert!(left(world, name) == left(world, "whole"), "{name} differs from the whole run: {kills:?}");
}

/// 50 times, one rank of two is killed so that it cannot clean up, at steps drawn from a seed. The other stops with an
/// error; the run goes on to the bits of one that was never killed, and trains on every row once an epoch: tokens are
/// among what is compared.
#[cfg(feature = "mpi")]
#[test]
fn parallel_a_killed_rank_ends_the_others_and_the_run_goes_on_to_the_same_bits() {
    let Some(world) = world() else { return };
    let sets =
        ["train.epochs=3", "train.save-every=2", "train.eval-every=0", "threads=1", "eval.max-prompts=1"];
    let sets = sets.into_iter().chain(["eval.training-prompts=0"]).flat_map(|set| ["--set", set]);
    let sets: Vec<&str> = sets.collect();
    let ranks = 2;
    ok(&world, How::Processes, ranks, &[&["train", "R", "--set", "name=whole"], sets.as_slice()].concat());
    // Not the very last steps: a run must not be done before it is killed.
    let last = logged(&world, "whole") * 2 / 3;
    let mut lcg = specforge_testkit::Lcg::new(11);
    let all: Vec<_> = (0..KILLS.0 / KILLS.1).map(|_| kills(&mut lcg, ranks, last)).collect();
    // Two runs at a time: most of a run's time is its start.
    let (world, sets, all) = (&world, &sets, &all);
    std::thread::scope(|scope| {
        for chain in 0..2 {
            scope.spawn(move || {
                for (run, kills) in all.iter().enumerate().skip(chain).step_by(2) {
                    survive(world, &format!("killed-{run}"), ranks, kills, sets);
                }
            });
        }
    });
}

#[test]
fn parallel_a_signal_saves_and_says_how_to_go_on() {
    let Some(world) = world() else { return };
    let args = ["train", "R", "--set", "name=signalled"];
    let mut running = Running::of(on(&world, How::Threads, 2, &args));
    running.wait_until(|| logged(&world, "signalled") >= 3);
    let ran = running.signal("INT");
    ran.refused(&["stopped at step", "--resume"]);
    ok(&world, How::Threads, 2, &["train", "R", "--set", "name=signalled", "--resume"]);
    ok(&world, How::Threads, 2, &["train", "R", "--set", "name=whole"]);
    assert!(left(&world, "signalled") == left(&world, "whole"));
}

#[test]
fn parallel_a_run_moves_between_numbers_of_ranks() {
    let Some(world) = world() else { return };
    world.ok(&["train", "R", "--set", "name=alone"]);
    for how in ways() {
        let name = format!("{how:?}-moving");
        let args = ["train", "R", "--set", &set(&name), "--set", "train.auto-resume=true"];
        for (ranks, lines) in [(4, 4), (2, 9), (1, 14), (3, usize::MAX)] {
            let mut running = Running::of(on(&world, how, ranks, &args));
            running.wait_until(|| logged(&world, &name) >= lines);
            if lines < usize::MAX {
                how.kill(running);
            } else {
                assert_eq!(running.end().code, Some(0));
            }
        }
        assert_same_log(&world, &name, "alone");
        assert_eq!(tokens(&world, &name), tokens(&world, "alone"));
    }
}

/// One rank's store is what several ranks write, and a training from either is the same.
#[test]
fn parallel_a_capture_goes_on_with_another_number_of_ranks() {
    let Some(world) = world() else { return };
    world.write("conversations.jsonl", crate::world::conversations(900, 5));
    let with = |command: &str, store: &str| {
        let sets = [
            "mode=offline".to_owned(),
            format!("store.path={store}"),
            set(store),
            "train.epochs=1".to_owned(),
        ];
        let sets = sets.into_iter().flat_map(|s| ["--set".to_owned(), s]);
        [command.to_owned(), "R".to_owned()].into_iter().chain(sets).collect::<Vec<_>>()
    };
    let alone = with("capture", "alone");
    world.ok(&alone.iter().map(String::as_str).collect::<Vec<_>>());
    for how in ways() {
        let store = format!("{how:?}-store");
        let args = with("capture", &store);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        for ranks in [4, 3] {
            let mut running = Running::of(on(&world, how, ranks, &args));
            let parts = || if world.has(&store) { names(&world.path(&store)) } else { Vec::new() };
            running.wait_until(|| parts().iter().any(|name| name.contains(".part")));
            std::thread::sleep(std::time::Duration::from_millis(5));
            how.kill(running);
        }
        ok(&world, how, 2, &args);
        let verified = world.ok(&["info", &store, "--verify"]);
        assert!(verified.stdout.contains("verified: 900 records"), "{}", verified.stdout);
        let trained = |store: &str| {
            let args = with("train", store);
            world.ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
            Left::by(&world, store)
        };
        if !world.has("runs/alone/summary.json") {
            trained("alone");
        }
        trained(&store).assert_same(&Left::by(&world, "alone"), &store);
    }
}

#[test]
fn parallel_what_cannot_be_is_told_with_the_way_out() {
    let Some(world) = world() else { return };
    let sets = |sets: &[&str], expected: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
        world.fails(&[&["train", "R"], sets.as_slice()].concat(), expected);
    };
    sets(&["parallel.data=4"], &["asks for 4 ranks", "mpirun -n 4", "parallel.data = 1"]);
    sets(&["parallel.tensor=0"], &["parallel.tensor", "at least 1"]);
    sets(&["parallel.data=4", "parallel.shards=3"], &["parallel.shards", "a divisor"]);
    sets(&["parallel.ranks-in-process=true"], &["parallel.data", "missing"]);
    sets(&["parallel.timeout=0"], &["parallel.timeout", "at least 1"]);
    let mut partial = world.specforge(&["train", "R"]);
    Ran::of(partial.env("RANK", "0").env("WORLD_SIZE", "2")).refused(&[
        "torchrun",
        "LOCAL_RANK",
        "set all of them",
    ]);
    let mut wrong = world.specforge(&["train", "R"]);
    wrong.env("RANK", "5").env("WORLD_SIZE", "2").env("LOCAL_RANK", "0");
    Ran::of(&mut wrong).refused(&["RANK = \"5\"", "0 to 1"]);
    assert!(!world.has("runs/run/checkpoints"));
}

/// What one rank finds out ends all of them, and stands in the one error that is told.
#[test]
fn parallel_an_error_of_one_rank_is_the_error_of_the_run() {
    let Some(world) = world() else { return };
    for how in ways() {
        // A store that lacks a row: whoever fetches it says so.
        let mut command =
            on(&world, how, 3, &["train", "R", "--set", "mode=offline", "--set", "store.path=none"]);
        let ran = Ran::of(&mut command);
        assert_ne!(ran.code, Some(0));
        assert!(ran.stderr.contains("offline training reads"), "{}", ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    }
}

/// The first 20 steps of the quick start over its first rows: losses, and weights by the norm of each tensor.
///
/// AdamW divides a gradient by the root of its square, so in the first steps an element whose gradient is about nothing
/// moves as far as any other, in a direction that the last digits of sums decide. That is why weights are compared with
/// an epsilon above those gradients; with the recipe's own, they are held to what was measured.
#[test]
fn parallel_ranks_take_the_first_steps_of_the_quick_start() {
    let Some(world) = world() else { return };
    world.write_quick_start("quick.toml", 20);
    let short =
        ["eval.max-prompts=1", "eval.training-prompts=0", "eval.max-new-tokens=4", "train.log-every=1"];
    let train = |name: &str, ranks: usize, more: &[&str]| {
        let own = set(name);
        let sets = short.iter().chain(more).copied().chain([own.as_str()]).flat_map(|set| ["--set", set]);
        let args: Vec<&str> = ["train", "quick.toml"].into_iter().chain(sets).collect();
        if ranks == 0 {
            world.ok(&args)
        } else {
            ok(&world, How::Threads, ranks, &args)
        };
    };
    let check = |name: &str, other: &str, bound: f64| {
        let losses =
            |name: &str| steps(&world, name).iter().map(|step| f64_of(&step["loss"])).collect::<Vec<_>>();
        let (got, want) = (losses(name), losses(other));
        assert_eq!((got.len(), want.len()), (20, 20));
        for (step, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!((got / want - 1.0).abs() < 1e-6, "{name}, step {step}: {got}, alone {want}");
        }
        for (weight, off) in weights_off(&world, name, other) {
            println!("{name}: {weight} {off:.2e}");
            assert!(off < bound, "{name}: {weight} is off by {off:e}");
        }
    };
    train("alone", 0, &[]);
    train("dp4", 4, &[]);
    check("dp4", "alone", 5e-6);
    let eps = "train.optimizer.eps=1e-5";
    train("alone-eps", 0, &[eps]);
    // Its draft has one key-value head, so heads cannot be exchanged; a whole target on every rank has the states of one.
    let tensor = ["parallel.tensor=2", "parallel.target-tensor=1"];
    let meshes: [(&str, usize, &[&str]); 7] = [
        ("dp2-eps", 2, &["parallel.fsdp=full"]),
        ("dp4-eps", 4, &["parallel.fsdp=gradients"]),
        ("dp4-none-eps", 4, &["parallel.fsdp=none"]),
        ("sp2-eps", 1, &["parallel.sequence=2"]),
        ("sp2-ring-eps", 1, &["parallel.sequence=2", "parallel.exchange=ring"]),
        ("tp2-eps", 1, &tensor),
        ("dp2-tp2-eps", 2, &tensor),
    ];
    for (name, ranks, more) in meshes {
        train(name, ranks, &[&[eps], more].concat());
        check(name, "alone-eps", 1e-6);
    }
}

/// |got - want| / |want| of every tensor of two runs' last drafts.
fn weights_off(world: &World, name: &str, other: &str) -> Vec<(String, f64)> {
    let draft = |name: &str| {
        let latest = world.text(&format!("runs/{name}/checkpoints/latest"));
        let file = format!("runs/{name}/checkpoints/{}/draft.safetensors", latest.trim());
        specforge_testkit::Tensors::read(world.path(&file))
    };
    let (got, want) = (draft(name), draft(other));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let floats = want.names().filter(|name| *name != "d2t" && *name != "t2d");
    let off = floats.map(|name| {
        let (got, want) = (got.f32(name).1, want.f32(name).1);
        let off = norm(&mut got.iter().zip(&want).map(|(a, b)| f64::from(a - b)));
        (name.to_owned(), off / norm(&mut want.iter().map(|b| f64::from(*b))))
    });
    off.collect()
}

/// Two GPUs, a process each that the program starts itself; skipped with fewer.
#[test]
fn parallel_gpus_of_this_machine_train_what_one_trains() {
    if specforge_cuda::Gpu::count().unwrap_or(0) < 2 || specforge_cuda::nccl_library().path.is_none() {
        return;
    }
    let world = World::new();
    let gpu = ["--set", "device=cuda"];
    let run = |name: &str, more: &[&str]| {
        let set = set(name);
        world.ok(&[&["train", "R", "--set", set.as_str()], &gpu[..], more].concat());
    };
    run("alone", &[]);
    for fsdp in ["none", "optimizer", "gradients", "full"] {
        let level = format!("parallel.fsdp={fsdp}");
        run(fsdp, &["--set", "parallel.data=2", "--set", &level]);
        let losses =
            |name: &str| steps(&world, name).iter().map(|step| f64_of(&step["loss"])).collect::<Vec<_>>();
        for (got, want) in losses(fsdp).iter().zip(losses("alone")) {
            assert!((got / want - 1.0).abs() < 2e-2, "{fsdp}: {got}, alone {want}");
        }
        assert_eq!(tokens(&world, fsdp), tokens(&world, "alone"));
    }
    // Ranks of a sequence: gradients too, of rows that see nothing of another rank's keys.
    let lambda = ["--set", "method.eagle3.objective=lk-lambda"];
    run("alone-lambda", &lambda);
    for (exchange, more, alone) in [
        ("gather", &[][..], "alone"),
        ("ring", &[], "alone"),
        ("heads", &[], "alone"),
        ("gather", &lambda, "alone-lambda"),
    ] {
        let (name, how) = (format!("{exchange}-{alone}"), format!("parallel.exchange={exchange}"));
        let sequence = ["--set", "parallel.data=1", "--set", "parallel.sequence=2", "--set", how.as_str()];
        run(&name, &[&sequence[..], more].concat());
        for (got, want) in steps(&world, &name).iter().zip(&steps(&world, alone)) {
            for key in ["loss", "grad_norm"] {
                let [got, want] = [got, want].map(|step| f64_of(&step[key]));
                assert!((got / want - 1.0).abs() < 2e-2, "{name}: {key} {got}, alone {want}");
            }
        }
    }
    // Killed, one rank ends the other; the run goes on to the same bits.
    let args = [&["train", "R", "--set", "name=killed", "--set", "parallel.data=2"], &gpu[..]].concat();
    let mut running = Running::of(world.specforge(&args));
    running.wait_until(|| logged(&world, "killed") >= 6);
    if let Some(ran) = running.kill_child(1).filter(|ran| ran.code != Some(0)) {
        ran.refused(&["rank 1 of 2"]);
    }
    world.ok(&[&args[..], &["--resume"]].concat());
    assert!(left(&world, "killed") == left(&world, "optimizer"));
}
