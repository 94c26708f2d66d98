//! Ranks that share matrices, beside those that share rows, the optimizer's state or nothing, against one alone.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;
use specforge_methods::Exchange;
use specforge_parallel::{Level, Mesh, MeshShape, threads};
use specforge_tensor::{DType, Device};
use specforge_train::{Checkpoints, Outcome, Ranks, Trainer};

use crate::fixture::{Fixture, LEN, Script, names, sound};

const PATIENCE: Duration = Duration::from_secs(30);
const LEVELS: [Level; 4] = [Level::None, Level::Optimizer, Level::Gradients, Level::Full];
const STEPS: u64 = 20;
const ALONE: MeshShape = MeshShape { replicas: 1, shards: 1, sequence: 1, tensor: 1 };

/// By name.
type Tensors = BTreeMap<String, Vec<f32>>;

/// What a run came to, as one rank has it.
#[derive(Debug, Clone)]
struct Trained {
    outcome: Outcome,
    tokens: u64,
    losses: Vec<f64>,
    /// Times that it decoded.
    decoded: usize,
    /// The trained weights, whole; and what the rank has of each, by name and piece.
    whole: Tensors,
    own: Tensors,
}

/// A draft with fewer key-value heads than four ranks, which therefore have some of it in common.
fn fixture() -> Fixture {
    fixture_of("kl")
}

fn fixture_of(objective: &str) -> Fixture {
    Fixture::shareable(&json!({
        "ttt-steps": 2, "num-attention-heads": 4, "num-key-value-heads": 2, "head-dim": 8, "objective": objective
    }))
}

/// What is done with a trainer before it runs; the step to stop after, if any.
type Change<'a> = &'a (dyn Fn(&mut Trainer<'_>) -> Option<u64> + Sync);

fn to_the_end(_: &mut Trainer<'_>) -> Option<u64> {
    None
}

fn take_up(trainer: &mut Trainer<'_>) -> Option<u64> {
    let folder = trainer.settings.folder.join("checkpoints");
    let latest = Checkpoints::open(folder, 0).unwrap().latest().unwrap().unwrap();
    trainer.resume(&latest).unwrap();
    None
}

fn train(fixture: &Fixture, name: &str, ranks: Option<Ranks>, change: Change<'_>) -> Trained {
    let of_batch = ranks.as_ref().map(|ranks| ranks.of_batch(Exchange::Ring)).unwrap_or_default();
    let (method, params) = fixture.shared(&of_batch);
    let mut trainer = fixture.trainer_of(name, method.as_ref(), params);
    let config = trainer.optimizer.config().clone();
    trainer.optimizer = specforge_train::Optimizer::new(config, &trainer.params, ranks).unwrap();
    trainer.settings.total_steps = STEPS;
    trainer.settings.eval_every = 10;
    let stop_after = change(&mut trainer);
    let mut script = Script { stop_after, ..Script::default() };
    let outcome = trainer.run(&mut sound(), &mut script).unwrap();
    let (mut whole, mut own) = (Tensors::new(), Tensors::new());
    for (_, param) in trainer.params.iter().filter(|(_, p)| p.trainable) {
        let piece = param.split.map(|split| split.piece);
        own.insert(format!("{}, {piece:?}", param.name), param.value.to_f32());
        whole.insert(param.name.clone(), trainer.optimizer.whole(param).unwrap().to_f32());
    }
    let (tokens, losses, decoded) = (trainer.state.tokens, script.losses, script.evaluations);
    Trained { outcome, tokens, losses, decoded, whole, own }
}

/// Runs on ranks; what several have in common is the same bits on all.
fn on_ranks(
    fixture: &Fixture,
    name: &str,
    (shape, level): (MeshShape, Level),
    change: Change<'_>,
) -> Trained {
    let mut all = threads::run(shape.ranks(), PATIENCE, |world| {
        let mesh = Mesh::new(world, shape, Device::Cpu).unwrap();
        train(fixture, name, Some(Ranks { mesh, level, reduce: DType::F32, patience: PATIENCE }), change)
    });
    let mut common = Tensors::new();
    for (rank, got) in all.iter().enumerate() {
        assert_eq!((got.outcome, got.tokens), (all[0].outcome, all[0].tokens), "{name}: rank {rank}");
        assert_eq!(got.whole, all[0].whole, "{name}: rank {rank}");
        assert_eq!(got.decoded, all[0].decoded, "{name}: every rank is asked, {rank} too");
        for (what, value) in &got.own {
            let first = common.entry(what.clone()).or_insert_with(|| value.clone());
            assert_eq!(value, first, "{name}: rank {rank}: {what}");
        }
    }
    all.swap_remove(0)
}

/// |got - want| / |want| of all elements together.
fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let off = squares(&mut got.iter().zip(want).map(|(a, b)| f64::from(a - b)));
    (off / squares(&mut want.iter().map(|b| f64::from(*b)))).sqrt()
}

/// The weights of a run's log and end, against those of another.
#[track_caller]
fn assert_same(fixture: &Fixture, name: &str, got: &Trained, want: &Trained) {
    assert_eq!(got.tokens, want.tokens, "{name}");
    let (losses, wanted) = (fixture.log(name), fixture.log("alone"));
    assert_eq!((losses.len(), wanted.len()), (STEPS as usize, STEPS as usize), "{name}");
    for ((step, got), (_, want)) in losses.iter().zip(&wanted) {
        assert!((got / want - 1.0).abs() < 1e-6, "{name}: loss of step {step}: {got}, alone {want}");
    }
    assert_eq!(got.whole.keys().collect::<Vec<_>>(), want.whole.keys().collect::<Vec<_>>());
    for (weight, want) in &want.whole {
        let off = relative_error(&got.whole[weight], want);
        assert!(off < 1e-6, "{name}: {weight} is off by {off:e}");
    }
}

fn check(fixture: &Fixture, alone: &Trained, shape: MeshShape, level: Level) {
    let name = format!("{shape:?}-{level:?}").replace(['{', '}', ' ', ':', ','], "");
    let got = on_ranks(fixture, &name, (shape, level), &to_the_end);
    assert_eq!(got.decoded, 2, "{name}");
    assert_same(fixture, &name, &got, alone);
}

#[test]
fn parallel_tensor_ranks_take_the_steps_of_one() {
    let fixture = fixture();
    let alone = train(&fixture, "alone", None, &to_the_end);
    assert_eq!(alone.tokens, STEPS * 2 * LEN as u64);
    check(&fixture, &alone, MeshShape { tensor: 4, ..ALONE }, Level::None);
    for level in LEVELS {
        check(&fixture, &alone, MeshShape { tensor: 2, ..ALONE }, level);
        check(&fixture, &alone, MeshShape { shards: 2, tensor: 2, ..ALONE }, level);
        check(&fixture, &alone, MeshShape { shards: 2, tensor: 4, ..ALONE }, level);
    }
}

#[test]
fn parallel_tensor_ranks_share_batches_with_all_others() {
    let fixture = fixture();
    let alone = train(&fixture, "alone", None, &to_the_end);
    for level in LEVELS {
        check(&fixture, &alone, MeshShape { sequence: 2, tensor: 2, ..ALONE }, level);
        check(&fixture, &alone, MeshShape { replicas: 2, shards: 2, tensor: 2, ..ALONE }, level);
    }
    check(&fixture, &alone, MeshShape { shards: 2, sequence: 2, tensor: 2, ..ALONE }, Level::Optimizer);
}

#[test]
fn parallel_ranks_of_a_batch_train_every_objective() {
    for objective in ["lk-lambda", "lk-alpha"] {
        let fixture = fixture_of(objective);
        let alone = train(&fixture, "alone", None, &to_the_end);
        check(&fixture, &alone, MeshShape { tensor: 2, ..ALONE }, Level::None);
        check(&fixture, &alone, MeshShape { tensor: 4, ..ALONE }, Level::Optimizer);
        check(&fixture, &alone, MeshShape { sequence: 3, ..ALONE }, Level::None);
        check(&fixture, &alone, MeshShape { sequence: 2, tensor: 2, ..ALONE }, Level::None);
        // With a micro-batch for each of those that train on others; of one, each would take the means of its documents.
        let micro_batches = |trainer: &mut Trainer<'_>| {
            (trainer.order.tokens_per_batch, trainer.order.accumulation) = (LEN, 2);
            None
        };
        let alone = train(&fixture, "alone", None, &micro_batches);
        let mesh = (MeshShape { shards: 2, sequence: 2, ..ALONE }, Level::Gradients);
        let got = on_ranks(&fixture, "micro-batches", mesh, &micro_batches);
        assert_same(&fixture, "micro-batches", &got, &alone);
    }
}

/// Clipping takes the norm of the whole, in which copies count once: with a limit below every norm each step is scaled.
#[test]
fn parallel_tensor_ranks_clip_by_the_norm_of_the_whole() {
    let fixture = fixture();
    let clip = |trainer: &mut Trainer<'_>| {
        let config = specforge_nn::optimizer::AdamWConfig {
            max_grad_norm: 1e-3,
            ..trainer.optimizer.config().clone()
        };
        let ranks = trainer.optimizer.ranks().cloned();
        trainer.optimizer = specforge_train::Optimizer::new(config, &trainer.params, ranks).unwrap();
        None
    };
    let alone = train(&fixture, "alone", None, &clip);
    for (name, mesh) in [
        ("four", (MeshShape { tensor: 4, ..ALONE }, Level::None)),
        ("both", (MeshShape { shards: 2, tensor: 2, ..ALONE }, Level::Optimizer)),
    ] {
        let got = on_ranks(&fixture, name, mesh, &clip);
        assert_same(&fixture, name, &got, &alone);
    }
}

#[test]
fn parallel_shared_runs_resumed_on_the_same_mesh_go_on_to_the_same_bits() {
    let fixture = fixture();
    for (shards, sequence, tensor) in [(1, 1, 4), (2, 1, 2), (2, 2, 1)] {
        for level in LEVELS {
            let mesh = (MeshShape { shards, sequence, tensor, ..ALONE }, level);
            let whole = on_ranks(&fixture, &format!("whole-{tensor}-{level:?}"), mesh, &to_the_end);
            for stop in [1, 9] {
                let name = format!("stopped-{tensor}-{stop}-{level:?}");
                let stopped = on_ranks(&fixture, &name, mesh, &|_| Some(stop));
                assert_eq!(stopped.outcome, Outcome::Stopped);
                let resumed = on_ranks(&fixture, &name, mesh, &take_up);
                assert_eq!(fixture.log(&name), fixture.log(&format!("whole-{tensor}-{level:?}")));
                assert_eq!((&resumed.whole, &resumed.own), (&whole.whole, &whole.own), "{name}");
            }
        }
    }
}

#[test]
fn parallel_a_run_goes_from_two_tensor_ranks_to_one_to_four_and_to_ranks_of_a_sequence() {
    let fixture = fixture();
    let alone = train(&fixture, "alone", None, &to_the_end);
    for (i, level) in LEVELS.into_iter().enumerate() {
        let name = format!("moved-{level:?}");
        // Another level each time, too.
        let other = LEVELS[(i + 1) % 4];
        let two = (MeshShape { shards: 2, tensor: 2, ..ALONE }, level);
        on_ranks(&fixture, &name, two, &|_| Some(5));
        let moved = |stop: Option<u64>| {
            move |trainer: &mut Trainer<'_>| {
                take_up(trainer);
                stop.map(|stop| stop - trainer.state.position.step)
            }
        };
        train(&fixture, &name, None, &moved(Some(9)));
        on_ranks(&fixture, &name, (MeshShape { tensor: 4, ..ALONE }, other), &moved(Some(13)));
        on_ranks(&fixture, &name, (MeshShape { shards: 3, ..ALONE }, level), &moved(Some(15)));
        on_ranks(&fixture, &name, (MeshShape { shards: 2, sequence: 2, ..ALONE }, other), &moved(Some(17)));
        let got =
            on_ranks(&fixture, &name, (MeshShape { shards: 2, tensor: 4, ..ALONE }, level), &moved(None));
        assert_same(&fixture, &name, &got, &alone);
        // And back to a process that knows no ranks.
        let back = train(&fixture, &name, None, &take_up);
        assert_eq!(back.whole, got.whole);
    }
}

#[test]
fn parallel_tensor_ranks_write_their_pieces_and_say_how_they_were_cut() {
    let fixture = fixture();
    // Ranks of a sequence have parts of their own.
    on_ranks(&fixture, "sequence", (MeshShape { sequence: 3, ..ALONE }, Level::Optimizer), &|_| Some(1));
    let saved = names(&fixture.folder.path().join("sequence/checkpoints/step-00000002"));
    assert_eq!(saved.iter().filter(|name| name.ends_with("of-00003.safetensors")).count(), 3, "{saved:?}");
    let mesh = (MeshShape { shards: 2, tensor: 2, ..ALONE }, Level::Optimizer);
    on_ranks(&fixture, "files", mesh, &|_| Some(2));
    let step = fixture.folder.path().join("files/checkpoints/step-00000003");
    let files: Vec<String> = (1..=4).map(|i| format!("optimizer-{i:05}-of-00004.safetensors")).collect();
    let other = ["draft.safetensors", "optimizer.index.json", "state.json"].map(str::to_owned);
    let mut expected = [files.clone(), other.to_vec()].concat();
    expected.sort();
    assert_eq!(names(&step), expected);
    let read = || fs_err::read_to_string(step.join("optimizer.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&read()).unwrap();
    assert_eq!((&index["files"], &index["tensor"]), (&json!(files), &json!(2)));
    let down = json!({ "rows": false, "pieces": 2, "shape": [32, 48] });
    assert_eq!(index["cuts"]["midlayer.mlp.down_proj.weight"], down);
    assert_eq!(index["cuts"]["fc.weight"], json!(null));
    // Damage is told.
    let said = |text: &str| {
        fs_err::write(step.join("optimizer.index.json"), text).unwrap();
        let latest =
            Checkpoints::open(step.parent().unwrap().to_owned(), 0).unwrap().latest().unwrap().unwrap();
        fixture.trainer("files").resume(&latest).unwrap_err().to_string()
    };
    let text = read();
    assert!(said(&text.replace("\"tensor\": 2", "\"tensor\": 3")).contains("each of 3 ranks"));
    assert!(said(&text.replace("\"tensor\": 2", "\"tensor\": 0")).contains("each of 0 ranks"));
    assert!(said(&text.replacen("\"pieces\": 2", "\"pieces\": 9", 1)).contains("1 to 2 pieces, got 9"));
    let other_shape = text.replacen("32,\n        48", "32,\n        47", 1);
    assert_ne!(other_shape, text);
    let message = said(&other_shape);
    assert!(message.contains("down_proj") && message.contains("expected"), "{message}");
}

/// A rank alone is asked to stop: all do, at the same step.
#[test]
fn parallel_any_rank_of_a_batch_stops_all() {
    let fixture = fixture();
    for rank in 0..4 {
        let name = format!("stopped-by-{rank}");
        let shape = MeshShape { sequence: 2, tensor: 2, ..ALONE };
        let steps = threads::run(4, PATIENCE, |world| {
            let stops = world.rank() == rank;
            let mesh = Mesh::new(world, shape, Device::Cpu).unwrap();
            let ranks = Ranks { mesh, level: Level::None, reduce: DType::F32, patience: PATIENCE };
            let trained = train(&fixture, &name, Some(ranks), &move |_| stops.then_some(3));
            assert_eq!(trained.outcome, Outcome::Stopped);
            (trained.losses.len(), trained.tokens)
        });
        assert!(steps.iter().all(|ended| *ended == steps[0] && ended.0 < 8), "{name}: {steps:?}");
        assert_eq!(steps[0].1, (steps[0].0 * 2 * LEN) as u64, "{name}");
    }
}
