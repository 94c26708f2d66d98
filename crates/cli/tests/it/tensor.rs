//! Ranks that share the draft's matrices, as threads of the program or as processes that `mpirun` starts.

use std::process::Command;

use crate::kill::{Running, logged};
use crate::left::{assert_same_export, steps};
use crate::parallel::{How, assert_same_log, left, set, tokens, ways, world};
use crate::world::{Ran, World, torn};

/// A draft that four ranks can share, two of them each key-value head.
const DRAFT: [&str; 3] = [
    "method.eagle3.num-attention-heads=4",
    "method.eagle3.num-key-value-heads=2",
    "method.eagle3.head-dim=8",
];

/// Ranks of data, tensor.
type Mesh = (usize, usize);

/// A training of this name on a mesh, or alone.
fn on(world: &World, (how, mesh): (How, Option<Mesh>), name: &str, sets: &[&str]) -> Command {
    let named = set(name);
    let (data, tensor) = mesh.unwrap_or((1, 1));
    let [data_set, tensor_set] = [format!("parallel.data={data}"), format!("parallel.tensor={tensor}")];
    let mut all = [&DRAFT[..], sets, &[named.as_str()]].concat();
    if mesh.is_some() {
        // The target has an odd vocabulary.
        all.extend([data_set.as_str(), tensor_set.as_str(), "parallel.target-tensor=1"]);
    }
    if mesh.is_some() && how == How::Threads {
        all.push("parallel.ranks-in-process=true");
    }
    let args: Vec<&str> = ["train", "R"].into_iter().chain(all.iter().flat_map(|s| ["--set", s])).collect();
    let command = world.specforge(&args);
    match (how, mesh) {
        #[cfg(feature = "mpi")]
        (How::Processes, Some(_)) => crate::world::mpirun(&command, data * tensor),
        _ => command,
    }
}

#[track_caller]
fn ok(world: &World, at: (How, Option<Mesh>), name: &str, sets: &[&str]) -> Ran {
    let ran = Ran::of(&mut on(world, at, name, sets));
    assert_eq!(ran.code, Some(0), "{at:?} {name}: {}{}", ran.stdout, ran.stderr);
    ran
}

fn alone(world: &World, name: &str, sets: &[&str]) -> Ran {
    ok(world, (How::Threads, None), name, sets)
}

/// The same log, decoding and export as those of a run alone, within rounding.
#[track_caller]
fn assert_same(world: &World, name: &str, other: &str) {
    assert_same_log(world, name, other);
    assert_eq!(tokens(world, name), tokens(world, other), "{name}");
    for (got, want) in steps(world, name).iter().zip(&steps(world, other)) {
        for key in ["grad_norm", "acceptance_length"] {
            let [got, want] = [got, want].map(|step| step[key].as_f64());
            let close = got.zip(want).map_or(got == want, |(a, b)| (a / b - 1.0).abs() < 1e-4);
            assert!(close, "{name}: {key}: {got:?}, alone {want:?}");
        }
    }
    let [summary, wanted] = [name, other].map(|name| world.json(&format!("runs/{name}/summary.json")));
    for key in ["acceptance_length", "acceptance_length_untrained", "lossless", "best_step"] {
        assert_eq!(summary[key], wanted[key], "{name}: {key}");
    }
    assert_eq!(torn(&world.path(&format!("runs/{name}"))), Vec::<String>::new());
    assert_same_export(world, name, other);
}

/// What left a rank in a step is what the plan says, but for what fills parts up to equal ones.
#[track_caller]
fn assert_sent_as_planned(world: &World, name: &str, (data, tensor): Mesh, fsdp: &str) {
    let sets = [
        format!("parallel.data={data}"),
        format!("parallel.tensor={tensor}"),
        format!("parallel.fsdp={fsdp}"),
    ];
    let sets = DRAFT.into_iter().chain(sets.iter().map(String::as_str)).chain(["parallel.target-tensor=1"]);
    let args =
        ["plan", "R", "--json", "--card", "h100"].into_iter().chain(sets.flat_map(|set| ["--set", set]));
    let plan = world.ok_json(&args.collect::<Vec<_>>());
    let sent = &world.json(&format!("runs/{name}/summary.json"))["sent"];
    for (got, want) in [("gradients", "gradient_bytes"), ("agreed", "agreed_bytes")] {
        let (got, want) =
            (sent[got].as_f64().unwrap(), plan["projection"]["traffic"][want].as_f64().unwrap());
        assert!((got - want).abs() <= 1e-3 * want, "{name}: {got} bytes, planned {want}");
    }
    assert!(sent["agreed"].as_f64() > Some(0.0), "{name}: {sent}");
}

#[test]
fn parallel_tensor_runs_log_decode_and_export_what_a_single_rank_does() {
    let Some(world) = world() else { return };
    let single = alone(&world, "alone", &[]);
    for how in ways() {
        for (mesh, fsdp) in [((1, 4), "none"), ((2, 2), "optimizer"), ((2, 2), "full")] {
            let name = format!("{how:?}-{}-{fsdp}", mesh.1);
            let ran = ok(&world, (how, Some(mesh)), &name, &[&format!("parallel.fsdp={fsdp}")]);
            assert_same(&world, &name, "alone");
            assert_sent_as_planned(&world, &name, mesh, fsdp);
            assert_eq!(ran.stdout.matches("acceptance length after").count(), 1, "{}", ran.stdout);
            let lines = |ran: &Ran| ran.stderr.lines().filter(|line| line.starts_with("held out")).count();
            assert_eq!(lines(&ran), lines(&single), "{}", ran.stderr);
        }
    }
    let sequence = ["parallel.sequence=2", "parallel.fsdp=gradients"];
    ok(&world, (How::Threads, Some((1, 2))), "sequence", &sequence);
    assert_same(&world, "sequence", "alone");
    // One rank evaluates and exports what four have saved.
    let one = |command: &str| {
        let sets = DRAFT.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> =
            [command, "R", "--set", "name=Threads-4-none"].into_iter().chain(sets).collect();
        world.ok(&args)
    };
    one("eval");
}

#[test]
fn parallel_tensor_runs_train_on_a_store_and_from_other_drafts() {
    let Some(world) = world() else { return };
    let offline = ["mode=offline", "store.path=store"];
    let sets = DRAFT.iter().chain(&offline).flat_map(|set| ["--set", set]);
    world.ok(&["capture", "R"].into_iter().chain(sets).collect::<Vec<_>>());
    alone(&world, "alone", &offline);
    ok(&world, (How::Threads, Some((2, 2))), "shared", &offline);
    assert_same(&world, "shared", "alone");
    // From an export, whose draft has other tokens: rows of the head go with them.
    let warm = ["train.warm-start=runs/alone/export", "method.eagle3.draft-vocab-size=36", "train.epochs=1"];
    alone(&world, "warm-alone", &warm);
    let ran = ok(&world, (How::Threads, Some((1, 4))), "warm", &warm);
    assert!(ran.stderr.contains("warm      weights of"), "{}", ran.stderr);
    assert_same(&world, "warm", "warm-alone");
}

#[test]
fn parallel_a_killed_tensor_run_goes_on_to_the_same_bits() {
    let Some(world) = world() else { return };
    let mesh = Some((2, 2));
    for how in ways() {
        let whole = format!("{how:?}-whole");
        ok(&world, (how, mesh), &whole, &[]);
        for lines in [1, 8, 13] {
            let name = format!("{how:?}-killed-{lines}");
            let mut running = Running::of(on(&world, (how, mesh), &name, &[]));
            running.wait_until(|| logged(&world, &name) >= lines);
            how.kill(running);
            ok(&world, (how, mesh), &name, &["train.auto-resume=true"]);
            assert!(left(&world, &name) == left(&world, &whole), "{name} differs from the whole run");
        }
    }
}

#[test]
fn parallel_a_run_moves_between_numbers_of_tensor_ranks() {
    let Some(world) = world() else { return };
    alone(&world, "alone", &[]);
    for how in ways() {
        let name = format!("{how:?}-moving");
        let meshes = [(Some((1, 2)), 4), (None, 9), (Some((1, 4)), 14), (Some((2, 2)), usize::MAX)];
        for (mesh, lines) in meshes {
            let mut running = Running::of(on(&world, (how, mesh), &name, &["train.auto-resume=true"]));
            running.wait_until(|| logged(&world, &name) >= lines);
            match (lines, mesh) {
                (usize::MAX, _) => assert_eq!(running.end().code, Some(0)),
                (_, None) => assert!(running.kill() || lines > 0),
                _ => how.kill(running),
            }
        }
        assert_same_log(&world, &name, "alone");
        assert_eq!(tokens(&world, &name), tokens(&world, "alone"));
    }
}

#[test]
fn parallel_what_tensor_ranks_cannot_share_is_refused_before_anything_is_loaded() {
    let Some(world) = world() else { return };
    let refused = |mesh, sets: &[&str], expected: &[&str]| {
        let ran = Ran::of(&mut on(&world, (How::Threads, Some(mesh)), "refused", sets));
        ran.refused(expected);
        assert!(!ran.stderr.contains("target    ") && !ran.stderr.contains("data      "), "{}", ran.stderr);
        assert!(!world.has("runs/refused"));
    };
    refused((1, 3), &[], &["num-attention-heads = 4", "3 ranks share it (parallel.tensor)"]);
    refused((1, 4), &["method.eagle3.draft-vocab-size=38"], &["draft-vocab-size = 38", "a multiple of 4"]);
    refused((1, 4), &["method.eagle3.intermediate-size=50"], &["intermediate-size = 50"]);
    refused((1, 2), &["train.on-oom=shrink"], &["train.on-oom", "in the same portions"]);
    refused((1, 0), &[], &["parallel.tensor", "at least 1"]);
}
