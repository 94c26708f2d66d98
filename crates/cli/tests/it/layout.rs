//! A target that ranks share while they train, capture and decode, against one rank that has it all.

use std::process::Command;

use serde_json::Value;
use specforge_nn::weights::Weights;
use specforge_store::Reader;
use specforge_testkit::{SmallTarget, test_device};

use crate::kill::{Running, logged};
use crate::left::steps;
use crate::parallel::{How, assert_same_log, left, tokens, ways};
use crate::world::{Ran, World, conversations, names, torn};

/// States as they are, and an epsilon well above the smallest gradients: what is compared differs by the rounding of sums.
pub(crate) const EXACT: [&str; 2] = ["capture.dtype=f32", "train.optimizer.eps=1e-4"];

/// A target that ranks can share; nothing on a GPU, where sums are rounded to bfloat16.
pub(crate) fn world() -> Option<World> {
    (test_device() == "cpu").then(|| World::with_target(&SmallTarget::shared(1)))
}

pub(crate) fn args(command: &str, sets: &[&str]) -> Vec<String> {
    let sets = sets.iter().flat_map(|set| ["--set".to_owned(), (*set).to_owned()]);
    [command.to_owned(), "R".to_owned()].into_iter().chain(sets).collect()
}

/// A command on so many ranks; `sets` say what each is there for.
pub(crate) fn on(world: &World, how: How, args: &[String]) -> Command {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match how {
        How::Threads => {
            let threads = ["--set", "parallel.ranks-in-process=true"];
            world.specforge(&[&args, threads.as_slice()].concat())
        }
        #[cfg(feature = "mpi")]
        How::Processes => crate::world::mpirun(&world.specforge(&args), ranks(&args)),
    }
}

#[track_caller]
pub(crate) fn ok(world: &World, how: How, args: &[String]) -> Ran {
    let ran = Ran::of(&mut on(world, how, args));
    assert_eq!(ran.code, Some(0), "{how:?} {args:?}: {}{}", ran.stdout, ran.stderr);
    ran
}

/// The ranks that the settings of a command ask for.
#[cfg(feature = "mpi")]
fn ranks(args: &[&str]) -> usize {
    let of = |key: &str, default: usize| {
        let set = args.iter().find_map(|set| set.strip_prefix(&format!("parallel.{key}=")));
        set.map_or(default, |n| n.parse().unwrap())
    };
    of("data", of("target-tensor", 1)) * of("sequence", 1) * of("tensor", 1) + of("target-ranks", 0)
}

/// Trains under a name.
#[track_caller]
pub(crate) fn train(world: &World, how: How, name: &str, sets: &[&str]) -> Ran {
    let named = format!("name={name}");
    ok(world, how, &args("train", &[&[named.as_str()], sets].concat()))
}

/// |got - want| / |want| over all weights of the draft that two runs exported.
fn distance(world: &World, name: &str, other: &str) -> f64 {
    let open = |name: &str| Weights::open(world.path(&format!("runs/{name}/export"))).unwrap();
    let (got, want) = (open(name), open(other));
    let (mut off, mut all) = (0.0, 0.0);
    for name in want.names() {
        let [got, want] = [&got, &want].map(|weights| weights.get(name).unwrap().to_f32());
        off += got.iter().zip(&want).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        all += want.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>();
    }
    (off / all).sqrt()
}

pub(crate) fn summary(world: &World, name: &str, key: &str) -> Value {
    world.json(&format!("runs/{name}/summary.json"))[key].clone()
}

/// The same run as `alone`, within the rounding of sums in another order.
#[track_caller]
pub(crate) fn assert_same_run(world: &World, name: &str) {
    assert_same_log(world, name, "alone");
    assert_eq!(tokens(world, name), tokens(world, "alone"), "{name}");
    let off = distance(world, name, "alone");
    assert!(off < 1e-4, "{name}: weights are off by {off}");
    assert_eq!(summary(world, name, "lossless"), true, "{name}");
    for key in ["acceptance_length", "acceptance_length_untrained"] {
        let [got, want] = [name, "alone"].map(|name| summary(world, name, key).as_f64().unwrap());
        assert!((got / want - 1.0).abs() < 0.02, "{name}: {key} {got}, alone {want}");
    }
    assert_eq!(torn(&world.path(&format!("runs/{name}"))), Vec::<String>::new());
}

#[test]
fn parallel_a_shared_target_trains_what_one_trains() {
    let Some(world) = world() else { return };
    world.ok(&args("train", &[&["name=alone"], EXACT.as_slice()].concat())
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>());
    for how in ways() {
        for (name, sets) in [
            ("two", &["parallel.data=2", "parallel.target-tensor=2"][..]),
            ("four", &["parallel.data=4", "parallel.target-tensor=4"]),
            ("pairs", &["parallel.data=4", "parallel.target-tensor=2", "parallel.fsdp=full"]),
            ("rows", &["parallel.data=2", "parallel.sequence=2", "parallel.target-tensor=4"]),
            ("draft", &["parallel.data=2", "parallel.tensor=2", "parallel.fsdp=gradients"]),
            ("wider", &["parallel.data=2", "parallel.tensor=2", "parallel.target-tensor=4"]),
            ("narrower", &["parallel.data=1", "parallel.tensor=4", "parallel.target-tensor=2"]),
            (
                "within",
                &["parallel.data=1", "parallel.sequence=4", "parallel.target-tensor=2", "parallel.fsdp=none"],
            ),
        ] {
            let name = format!("{how:?}-{name}");
            let ran = train(&world, how, &name, &[sets, EXACT.as_slice()].concat());
            assert_same_run(&world, &name);
            assert_eq!(ran.stdout.matches("acceptance length after").count(), 1, "{}", ran.stdout);
            assert!(ran.stderr.contains("shared by"), "{}", ran.stderr);
        }
    }
}

/// Killed so that nobody can clean up, while a step, a checkpoint or an evaluation is going on.
#[track_caller]
pub(crate) fn assert_resumes_to_the_same_bits(world: &World, how: How, name: &str, sets: &[&str]) {
    let whole = format!("{name}-whole");
    train(world, how, &whole, sets);
    for lines in [1, 8, 13] {
        let name = format!("{name}-killed-{lines}");
        let named = format!("name={name}");
        let mut args = args("train", &[&[named.as_str()], sets].concat());
        let mut running = Running::of(on(world, how, &args));
        running.wait_until(|| logged(world, &name) >= lines);
        how.kill(running);
        args.push("--resume".to_owned());
        ok(world, how, &args);
        assert!(left(world, &name) == left(world, &whole), "{name} differs from the whole run");
    }
}

#[test]
fn parallel_a_run_with_a_shared_target_goes_on_to_the_same_bits() {
    let Some(world) = world() else { return };
    for how in ways() {
        let sets = ["parallel.data=2", "parallel.target-tensor=2"];
        assert_resumes_to_the_same_bits(&world, how, &format!("{how:?}"), &sets);
    }
    // Asked to stop, the ranks agree on when.
    let args = args("train", &["name=asked", "parallel.data=2", "parallel.target-tensor=2"]);
    let mut running = Running::of(on(&world, How::Threads, &args));
    running.wait_until(|| logged(&world, "asked") >= 3);
    running.signal("INT").refused(&["stopped at step", "--resume"]);
    ok(&world, How::Threads, &[args.as_slice(), &["--resume".to_owned()]].concat());
    assert!(left(&world, "asked") == left(&world, "Threads-whole"));
}

#[test]
fn parallel_a_shared_target_decodes_what_one_decodes() {
    let Some(world) = world() else { return };
    world.ok(&["train", "R", "--set", "train.epochs=1"]);
    let alone = world.ok_json(&["eval", "R", "--json"]);
    for how in ways() {
        for size in [2, 4] {
            let shared = format!("parallel.target-tensor={size}");
            // The recipe's own layout is for training.
            let mut args = args("eval", &[&shared, "train.epochs=1"]);
            args.push("--json".to_owned());
            if how == How::Threads {
                args.extend(["--set".to_owned(), "parallel.data=8".to_owned()]);
            }
            let ran = ok(&world, how, &args);
            let report: Value = serde_json::from_str(&ran.stdout).unwrap();
            assert_eq!(report["lossless"], true);
            for key in ["acceptance_length", "tokens", "target_forwards"] {
                let [got, want] = [&report, &alone].map(|report| report[key].as_f64().unwrap());
                assert!((got / want - 1.0).abs() < 0.02, "{how:?} {size}: {key} {got}, alone {want}");
            }
        }
    }
}

/// Two GPUs, or as many as there are of 2 and 4, a process each; skipped with fewer, or without NCCL.
#[test]
fn parallel_gpus_share_a_target_or_keep_it_apart() {
    let gpus = specforge_cuda::Gpu::count().unwrap_or(0);
    if gpus < 2 || specforge_cuda::nccl_library().path.is_none() {
        return;
    }
    let world = World::with_target(&SmallTarget::shared(1));
    let run = |name: &str, sets: &[&str]| {
        let named = format!("name={name}");
        let args = args("train", &[&[named.as_str(), "device=cuda"], sets].concat());
        world.ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
    };
    run("alone", &[]);
    let layouts = [
        ("shared", 2, &["parallel.data=2", "parallel.target-tensor=2"][..]),
        ("gradients", 2, &["parallel.data=2", "parallel.target-tensor=2", "parallel.fsdp=gradients"]),
        ("cache", 2, &["parallel.data=2", "parallel.target-tensor=2", "mode=cache"]),
        ("apart", 2, &["parallel.data=1", "parallel.target-ranks=1"]),
        ("four", 4, &["parallel.data=4", "parallel.target-tensor=4", "parallel.fsdp=full"]),
        ("rows", 4, &["parallel.data=2", "parallel.sequence=2", "parallel.target-tensor=4"]),
        ("apart-shared", 4, &["parallel.data=2", "parallel.target-ranks=2"]),
        ("copies", 4, &["parallel.data=2", "parallel.target-ranks=2", "parallel.target-tensor=1"]),
    ];
    for (name, _, sets) in layouts.into_iter().filter(|(_, ranks, _)| *ranks <= gpus) {
        run(name, sets);
        assert_eq!(tokens(&world, name), tokens(&world, "alone"), "{name}");
        assert_eq!(summary(&world, name, "lossless"), true, "{name}");
        for (got, want) in steps(&world, name).iter().zip(steps(&world, "alone")) {
            let [got, want] = [got, &want].map(|step| step["loss"].as_f64().unwrap());
            assert!((got / want - 1.0).abs() < 2e-2, "{name}: {got}, alone {want}");
        }
        // And again, to the same bits.
        let again = format!("{name}-again");
        run(&again, sets);
        assert!(left(&world, &again) == left(&world, name), "{name}");
    }
}

/// Every row of two stores, apart by no more than the last bit of bfloat16.
fn assert_same_store(world: &World, store: &str, other: &str, rows: usize) {
    let [got, want] = [store, other].map(|store| Reader::open(world.path(store)).unwrap());
    assert_eq!((got.rows().len(), want.rows().len()), (rows, rows), "{store}");
    for &row in want.rows() {
        let [got, want] = [&got, &want].map(|reader| reader.record(row).unwrap());
        assert_eq!(got.field_u32("input_ids").unwrap(), want.field_u32("input_ids").unwrap());
        assert_eq!(got.field_u32("teacher_argmax").unwrap(), want.field_u32("teacher_argmax").unwrap());
        for field in ["hidden_states", "last_hidden"] {
            let [got, want] = [&got, &want].map(|record| record.field_bf16(field).unwrap());
            let largest = want.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
            for (got, want) in got.iter().zip(want.iter()) {
                let (got, want) = (got.to_f32(), want.to_f32());
                let close = (got - want).abs() <= want.abs() / 128.0 + 1e-5 * largest;
                assert!(close, "{store}: row {row}, {field}: {got}, alone {want}");
            }
        }
    }
}

#[test]
fn parallel_ranks_that_share_a_target_capture_what_one_captures() {
    let Some(world) = world() else { return };
    world.write("conversations.jsonl", conversations(900, 5));
    let capture = |store: &str, sets: &[&str]| {
        let store = format!("store.path={store}");
        args("capture", &[&["mode=offline", store.as_str()], sets].concat())
    };
    let shared = ["parallel.data=4", "parallel.target-tensor=2"];
    let alone = capture("alone", &[]);
    world.ok(&alone.iter().map(String::as_str).collect::<Vec<_>>());
    for how in ways() {
        let store = format!("{how:?}-shared");
        ok(&world, how, &capture(&store, &shared));
        assert_same_store(&world, &store, "alone", 900);
        // Interrupted, others go on: two that share a copy, then one alone.
        let store = format!("{how:?}-moved");
        let written = || if world.has(&store) { names(&world.path(&store)) } else { Vec::new() };
        for sets in [shared, ["parallel.data=2", "parallel.target-tensor=2"]] {
            let mut running = Running::of(on(&world, how, &capture(&store, &sets)));
            running.wait_until(|| written().iter().any(|name| name.contains(".part")));
            std::thread::sleep(std::time::Duration::from_millis(5));
            how.kill(running);
        }
        let moved = capture(&store, &[]);
        world.ok(&moved.iter().map(String::as_str).collect::<Vec<_>>());
        assert_same_store(&world, &store, "alone", 900);
        world.ok(&["info", &store, "--verify"]);
    }
}

/// Nobody needs the target for the steps; those that decode with the first rank load it when it is time to.
#[test]
fn parallel_a_shared_target_is_loaded_for_decoding_alone() {
    let Some(world) = world() else { return };
    let offline = ["mode=offline", "store.path=store", EXACT[1]];
    let alone = |command: &str| args(command, &[offline.as_slice(), &["name=alone"]].concat());
    for command in ["capture", "train"] {
        world.ok(&alone(command).iter().map(String::as_str).collect::<Vec<_>>());
    }
    for how in ways() {
        let name = format!("{how:?}-shared");
        let sets = ["parallel.data=4", "parallel.target-tensor=2"];
        train(&world, how, &name, &[offline.as_slice(), &sets].concat());
        assert_same_run(&world, &name);
    }
}

#[test]
fn parallel_a_shared_capture_that_is_asked_to_stop_goes_on() {
    let Some(world) = world() else { return };
    world.write("conversations.jsonl", conversations(2000, 5));
    let args =
        args("capture", &["mode=offline", "store.path=store", "parallel.data=2", "parallel.target-tensor=2"]);
    let mut running = Running::of(on(&world, How::Threads, &args));
    running
        .wait_until(|| world.has("store") && names(&world.path("store")).iter().any(|n| n.contains(".part")));
    running.signal("INT").refused(&["stopped with", "of 2000 rows captured", "same command again"]);
    ok(&world, How::Threads, &args);
    world.ok(&["info", "store", "--verify"]);
}

/// What ranks trained from a store that they filled themselves is what they train online.
#[test]
fn parallel_ranks_with_a_cache_train_what_they_train_online() {
    let Some(world) = world() else { return };
    let rows = conversations(60, 3).lines().count();
    for how in ways() {
        for (name, sets) in [
            ("data", &["parallel.data=2"][..]),
            ("shared", &["parallel.data=2", "parallel.target-tensor=2"]),
            ("sequence", &["parallel.data=2", "parallel.sequence=2"]),
            ("tensor", &["parallel.data=2", "parallel.tensor=2"]),
        ] {
            let [online, cache] = ["online", "cache"].map(|mode| format!("{how:?}-{name}-{mode}"));
            train(&world, how, &online, sets);
            train(&world, how, &cache, &[sets, &["mode=cache"]].concat());
            assert!(left(&world, &cache) == left(&world, &online), "{cache}");
            let store = world.ok_json(&["info", &format!("runs/{cache}/features"), "--json"]);
            assert_eq!(store["rows"], rows, "{store}");
            world.ok(&["info", &format!("runs/{cache}/features"), "--verify"]);
        }
    }
}

#[test]
fn parallel_a_run_with_a_cache_goes_on_to_the_same_bits() {
    let Some(world) = world() else { return };
    for how in ways() {
        for (name, sets) in [
            ("data", ["parallel.data=2", "parallel.target-tensor=1", "mode=cache"]),
            ("shared", ["parallel.data=2", "parallel.target-tensor=2", "mode=cache"]),
        ] {
            assert_resumes_to_the_same_bits(&world, how, &format!("{how:?}-{name}"), &sets);
        }
    }
    // What two ranks have begun one goes on with.
    let args = args("train", &["name=moved", "parallel.data=2", "mode=cache"]);
    let mut running = Running::of(on(&world, How::Threads, &args));
    running.wait_until(|| logged(&world, "moved") >= 4);
    running.kill();
    world.ok(&["train", "R", "--set", "name=moved", "--set", "mode=cache", "--resume"]);
    world.ok(&["train", "R", "--set", "name=alone"]);
    assert_same_log(&world, "moved", "alone");
    world.ok(&["info", "runs/moved/features", "--verify"]);
}

#[test]
fn parallel_what_a_target_cannot_be_shared_by_is_refused_before_any_work() {
    let Some(world) = world() else { return };
    let refused = |sets: &[&str], expected: &[&str]| {
        let args = args("train", sets);
        world.fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    };
    let threads = "parallel.ranks-in-process=true";
    refused(&["parallel.target-tensor=0"], &["parallel.target-tensor", "at least 1"]);
    refused(
        &["parallel.data=4", "parallel.target-tensor=3"],
        &["parallel.target-tensor", "a divisor of the 4 ranks"],
    );
    refused(
        &["parallel.data=3", "parallel.sequence=2", "parallel.target-tensor=3"],
        &["parallel.target-tensor", "a multiple or a divisor of `sequence`"],
    );
    refused(
        &["parallel.data=8", "parallel.target-tensor=8", threads],
        &["num_attention_heads = 4", "parallel.target-tensor", "a multiple of 8"],
    );
    refused(
        &["parallel.data=2", "parallel.target-ranks=3", "parallel.target-tensor=2"],
        &["parallel.target-ranks", "a multiple of `target-tensor`"],
    );
    refused(
        &["parallel.data=3", "parallel.target-ranks=2", "parallel.target-tensor=1", threads],
        &["parallel.target-ranks", "2 copies", "a divisor of `data` = 3"],
    );
    for mode in ["mode=offline", "mode=cache"] {
        refused(
            &["parallel.data=2", "parallel.target-ranks=2", mode, threads],
            &["parallel.target-ranks", "online"],
        );
    }
    refused(&["parallel.data=2", "parallel.target-ranks=1"], &["asks for 3 ranks", "mpirun -n 3"]);
    let mut other = SmallTarget::shared(1);
    other.config["architectures"] = serde_json::json!(["Gemma2ForCausalLM"]);
    other.config["hidden_act"] = serde_json::json!("gelu_pytorch_tanh");
    let world = World::with_target(&other);
    let args = args("capture", &["parallel.data=2", "parallel.target-tensor=2", threads]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    world.fails(&args, &["architectures", "ranks cannot share it", "LlamaForCausalLM"]);
    assert!(!world.has("runs"));
}
