//! Several ranks, each a thread, against one.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use specforge_methods::Batch;
use specforge_parallel::{Level, Mesh, MeshShape, nccl, threads};
use specforge_tensor::{DType, Device};
use specforge_testkit::{assert_close, assert_close_max};
use specforge_train::{Checkpoints, FeatureSource, Outcome, Ranks, Result, Sent, Trainer};

use crate::fixture::{Fixture, LEN, Script, Source, names, run, sound, weights};

const PATIENCE: Duration = Duration::from_secs(30);
const LEVELS: [Level; 4] = [Level::None, Level::Optimizer, Level::Gradients, Level::Full];

/// How often each row was fetched for training.
#[derive(Default)]
struct Seen(Mutex<BTreeMap<usize, usize>>);

/// A source that notes which rows it gave.
struct Noting<'a>(Source, &'a Seen);

impl FeatureSource for Noting<'_> {
    fn fetch(&mut self, rows: &[usize]) -> Result<Batch> {
        for &row in rows.iter().filter(|row| **row < 12) {
            *self.1.0.lock().unwrap().entry(row).or_default() += 1;
        }
        self.0.fetch(rows)
    }
}

/// What is done with a trainer before it runs.
type Change<'a> = &'a (dyn Fn(&mut Trainer<'_>) + Sync);
/// The lines of the log, and the weights.
type Trained = (Vec<(u64, f64)>, Vec<(String, Vec<f32>)>);

/// Runs on ranks to the end or until the script stops them; the weights of every rank are the same bits.
fn on_ranks(
    fixture: &Fixture,
    name: &str,
    (shape, level): (MeshShape, Level),
    change: Change<'_>,
) -> (Trained, Outcome) {
    let seen = Seen::default();
    let of_ranks = threads::run(shape.ranks(), PATIENCE, |world| {
        let mesh = Mesh::new(world, shape, Device::Cpu).unwrap();
        let mut trainer = fixture.ranked(name, Ranks { mesh, level, reduce: DType::F32, patience: PATIENCE });
        change(&mut trainer);
        let began = trainer.state.position.step;
        let mut script = Script { stop_after: stop_after(&trainer), ..Script::default() };
        let outcome = trainer.run(&mut Noting(sound(), &seen), &mut script).unwrap();
        (weights(&trainer), outcome, (began, trainer.state.tokens))
    });
    let (first, outcome, (began, tokens)) = of_ranks[0].clone();
    for (rank, (weights, ended, _)) in of_ranks.iter().enumerate() {
        assert_eq!((weights, *ended), (&first, outcome), "{name}: rank {rank}");
    }
    let counts = seen.0.into_inner().unwrap();
    if outcome == Outcome::Finished {
        assert_eq!(tokens, 2 * 12 * LEN as u64, "{name}: every row once an epoch");
        let all_twice = counts.values().all(|n| *n == 2) && counts.len() == 12;
        assert!(began > 0 || all_twice, "{name}: {counts:?}");
    }
    ((fixture.log(name), first), outcome)
}

/// A test asks to stop by what it puts into the identity.
fn stop_after(trainer: &Trainer<'_>) -> Option<u64> {
    trainer.state.identity["stop"].as_u64()
}

fn alone(fixture: &Fixture, name: &str, change: Change<'_>) -> Trained {
    let mut trainer = fixture.trainer(name);
    change(&mut trainer);
    run(&mut trainer);
    (fixture.log(name), weights(&trainer))
}

#[track_caller]
fn assert_same(name: &str, (losses, got): &Trained, (wanted, want): &Trained) {
    let values = |log: &[(u64, f64)]| log.iter().map(|(_, loss)| *loss as f32).collect::<Vec<_>>();
    assert_close(name, &values(losses), &values(wanted), 0.0, 1e-6);
    for ((weight, got), (_, want)) in got.iter().zip(want) {
        let off = relative_error(got, want);
        assert!(off < 1e-6, "{name}: {weight} is off by {off}");
    }
}

/// |got - want| / |want| of all elements together.
fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let off: f64 = got.iter().zip(want).map(|(a, b)| square(f64::from(a - b))).sum();
    (off / want.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}

/// Two epochs of steps of `accumulation` micro-batches of two rows.
fn accumulating(accumulation: usize) -> impl Fn(&mut Trainer<'_>) + Sync {
    move |trainer| {
        trainer.order.accumulation = accumulation;
        trainer.settings.total_steps = trainer.order.total_steps(2);
    }
}

#[test]
fn parallel_ranks_train_what_one_trains() {
    let fixture = Fixture::new();
    for accumulation in [1, 3, 4] {
        let change = accumulating(accumulation);
        let single = alone(&fixture, &format!("alone-{accumulation}"), &change);
        for ranks in [2, 4] {
            for level in LEVELS {
                let name = format!("{accumulation}-{ranks}-{level:?}");
                let (trained, _) = on_ranks(&fixture, &name, (MeshShape::data(ranks), level), &change);
                assert_same(&name, &trained, &single);
            }
        }
    }
}

#[test]
fn parallel_copies_of_shards_train_what_one_trains() {
    let fixture = Fixture::new();
    let single = alone(&fixture, "alone", &|_| ());
    let shape = MeshShape { replicas: 2, ..MeshShape::data(2) };
    for level in LEVELS {
        let name = format!("hybrid-{level:?}");
        let (trained, _) = on_ranks(&fixture, &name, (shape, level), &|_| ());
        assert_same(&name, &trained, &single);
    }
}

/// One rank in a group of its own takes the steps of no group, to the bit.
#[test]
fn parallel_a_group_of_one_changes_no_bit() {
    let fixture = Fixture::new();
    let single = alone(&fixture, "alone", &accumulating(3));
    for level in LEVELS {
        let name = format!("one-{level:?}");
        let (trained, _) = on_ranks(&fixture, &name, (MeshShape::data(1), level), &accumulating(3));
        // Sent after every micro-batch, gradients are added up outside of the matrix products.
        if matches!(level, Level::None | Level::Optimizer) {
            assert_eq!(trained, single, "{name}");
        }
        assert_same(&name, &trained, &single);
    }
}

/// Stops a run after so many steps; the others finish it.
fn stop_at(step: u64) -> impl Fn(&mut Trainer<'_>) + Sync {
    move |trainer| trainer.state.identity["stop"] = step.into()
}

fn take_up(trainer: &mut Trainer<'_>) {
    let folder = trainer.settings.folder.join("checkpoints");
    let latest = Checkpoints::open(folder, 0).unwrap().latest().unwrap().unwrap();
    trainer.resume(&latest).unwrap();
}

#[test]
fn parallel_a_run_resumed_on_the_same_mesh_goes_on_to_the_same_bits() {
    let fixture = Fixture::new();
    for level in LEVELS {
        let mesh = (MeshShape::data(3), level);
        let (whole, _) = on_ranks(&fixture, &format!("whole-{level:?}"), mesh, &|_| ());
        for stop in [1, 4, 7] {
            let name = format!("stopped-{stop}-{level:?}");
            let (_, outcome) = on_ranks(&fixture, &name, mesh, &stop_at(stop));
            assert_eq!(outcome, Outcome::Stopped);
            let (resumed, _) = on_ranks(&fixture, &name, mesh, &take_up);
            assert_eq!(resumed, whole, "{name}");
        }
    }
}

#[test]
fn parallel_a_run_goes_from_four_ranks_to_two_to_one_to_three() {
    let fixture = Fixture::new();
    let single = alone(&fixture, "alone", &|_| ());
    for level in LEVELS {
        let name = format!("moved-{level:?}");
        for (ranks, stop) in [(4, Some(2)), (2, Some(4)), (1, Some(6)), (3, None)] {
            let change = |trainer: &mut Trainer<'_>| {
                if ranks < 4 {
                    take_up(trainer);
                }
                if let Some(stop) = stop {
                    trainer.state.identity["stop"] = stop.into();
                }
            };
            on_ranks(&fixture, &name, (MeshShape::data(ranks), level), &change);
        }
        // And back to a process that knows no ranks.
        let trained = (fixture.log(&name), weights_of(&fixture, &name));
        assert_same(&name, &trained, &single);
    }
}

/// The weights of a run's last checkpoint, taken up without ranks.
fn weights_of(fixture: &Fixture, name: &str) -> Vec<(String, Vec<f32>)> {
    let mut trainer = fixture.trainer(name);
    take_up(&mut trainer);
    weights(&trainer)
}

#[test]
fn parallel_every_rank_writes_its_part_of_the_optimizer() {
    let fixture = Fixture::new();
    on_ranks(&fixture, "files", (MeshShape::data(3), Level::Optimizer), &|_| ());
    let saved = names(&fixture.folder.path().join("files/checkpoints/step-00000012"));
    let parts: Vec<String> = (1..=3).map(|i| format!("optimizer-{i:05}-of-00003.safetensors")).collect();
    let other = ["draft.safetensors", "optimizer.index.json", "state.json"].map(str::to_owned);
    let mut expected = [parts, other.to_vec()].concat();
    expected.sort();
    assert_eq!(saved, expected);
    // A damaged list of files is told, and so is a part that is missing.
    let folder = fixture.folder.path().join("files/checkpoints");
    let said = |text: &str| {
        fs_err::write(folder.join("step-00000012/optimizer.index.json"), text).unwrap();
        let latest = Checkpoints::open(folder.clone(), 0).unwrap().latest().unwrap().unwrap();
        fixture.trainer("files").resume(&latest).unwrap_err().to_string()
    };
    assert!(said("{").contains("optimizer.index.json"));
    assert!(said(r#"{"files": ["../x"]}"#).contains("files beside it"));
    assert!(said(r#"{"files": ["optimizer-00009-of-00003.safetensors"]}"#).contains("00009"));
}

#[test]
fn parallel_a_rank_with_an_error_ends_all_and_names_itself() {
    let fixture = Fixture::new();
    for level in LEVELS {
        let name = format!("broken-{level:?}");
        let said = threads::run(2, PATIENCE, |world| {
            let rank = world.rank();
            let mesh = Mesh::new(world, MeshShape::data(2), Device::Cpu).unwrap();
            let mut trainer =
                fixture.ranked(&name, Ranks { mesh, level, reduce: DType::F32, patience: PATIENCE });
            let broken = (rank == 1).then(|| trainer.order.deal(&trainer.order.epoch(0)[3], 1, 2)[0][0]);
            let mut source = Source { broken, ..sound() };
            trainer.run(&mut source, &mut Script::default()).unwrap_err().to_string()
        });
        assert!(said[1].contains("the disk says no"), "{said:?}");
        assert!(said[0].contains("rank 1 has ended"), "{said:?}");
    }
}

#[test]
fn parallel_bf16_gradients_train_about_the_same() {
    let fixture = Fixture::new();
    let (_, single) = alone(&fixture, "alone", &|_| ());
    let reduced = threads::run(2, PATIENCE, |world| {
        let mesh = Mesh::new(world, MeshShape::data(2), Device::Cpu).unwrap();
        let ranks = Ranks { mesh, level: Level::Optimizer, reduce: DType::Bf16, patience: PATIENCE };
        let mut trainer = fixture.ranked("bf16", ranks);
        run(&mut trainer);
        weights(&trainer)
    });
    assert_ne!(reduced[0], single);
    for ((weight, got), (_, want)) in reduced[0].iter().zip(&single) {
        assert_close_max(weight, got, want, 2e-2);
    }
}

#[expect(clippy::print_stdout, clippy::exit, reason = "what no test could go on from")]
fn die(why: &str) {
    println!("alarm: {why}");
    std::process::exit(1);
}

/// On a GPU, twice in one process: the second run's memory is used memory.
#[test]
fn cuda_a_run_again_trains_to_the_same_bits() {
    let Ok(device) = Device::cuda(0) else {
        println!("skipped: no GPU");
        return;
    };
    let fixture = Fixture::on(device);
    let all = ["first", "second", "third"].map(|name| {
        let mut trainer = fixture.trainer(name);
        run(&mut trainer);
        weights(&trainer)
    });
    assert_eq!(fixture.log("second"), fixture.log("first"));
    assert_eq!(fixture.log("third"), fixture.log("first"));
    assert!(all[0] == all[1] && all[0] == all[2]);
}

/// Alone on a GPU, with NCCL and without: the same steps to the bit. Skipped without a GPU.
#[test]
fn parallel_nccl_with_one_rank_trains_to_the_same_bits() {
    let Some(device) = Device::cuda(0).ok().filter(|_| specforge_cuda::nccl_library().path.is_some()) else {
        println!("skipped: no GPU, or no NCCL");
        return;
    };
    let fixture = Fixture::on(device);
    let mut single = fixture.trainer("alone");
    run(&mut single);
    let id = nccl::unique_id().unwrap();
    let world = nccl::join(device, &id, (0, 1), (PATIENCE, die)).unwrap();
    for level in LEVELS {
        let name = format!("nccl-{level:?}");
        let mesh = Mesh::new(world.clone(), MeshShape::data(1), device).unwrap();
        let ranks = Ranks { mesh, level, reduce: DType::F32, patience: PATIENCE };
        let mut trainer = fixture.ranked(&format!("{name}-whole"), ranks.clone());
        run(&mut trainer);
        assert_eq!(fixture.log(&format!("{name}-whole")), fixture.log("alone"), "{name}, in one go");
        let mut trainer = fixture.ranked(&name, ranks.clone());
        let stop = &mut Script { stop_after: Some(7), ..Script::default() };
        assert_eq!(trainer.run(&mut sound(), stop).unwrap(), Outcome::Stopped);
        let mut resumed = fixture.ranked(&name, ranks);
        take_up(&mut resumed);
        run(&mut resumed);
        assert_eq!(fixture.log(&name), fixture.log("alone"), "{name}");
        assert!(weights(&resumed) == weights(&single), "{name}");
    }
}

/// One rank of threads: the same steps to the bit as no ranks.
#[test]
fn parallel_one_rank_trains_to_the_same_bits() {
    let fixture = Fixture::new();
    let mut single = fixture.trainer("alone");
    run(&mut single);
    for level in LEVELS {
        let name = format!("one-{level:?}");
        let got = threads::run(1, PATIENCE, |world| {
            let mesh = Mesh::new(world, MeshShape::data(1), Device::Cpu).unwrap();
            let ranks = Ranks { mesh, level, reduce: DType::F32, patience: PATIENCE };
            let mut trainer = fixture.ranked(&name, ranks);
            run(&mut trainer);
            weights(&trainer)
        });
        assert_eq!(fixture.log(&name), fixture.log("alone"), "{name}");
        assert!(got[0] == weights(&single), "{name}");
    }
}

/// What two ranks sent in a run without checkpoints.
fn sent(fixture: &Fixture, name: &str, level: Level, accumulation: usize) -> Vec<Sent> {
    threads::run(2, PATIENCE, |world| {
        let mesh = Mesh::new(world, MeshShape::data(2), Device::Cpu).unwrap();
        let mut trainer = fixture.ranked(name, Ranks { mesh, level, reduce: DType::F32, patience: PATIENCE });
        accumulating(accumulation)(&mut trainer);
        run(&mut trainer);
        trainer.optimizer.sent()
    })
}

/// All gradients but the last one leave while the backward has more to compute; each level sends what its stage does.
#[test]
fn parallel_gradients_leave_while_the_backward_goes_on() {
    let fixture = Fixture::new();
    let trained = || fixture.params.iter().filter(|(_, param)| param.trainable);
    // Halves of float32, padded to equal ones.
    let half = |len: usize| 4 * len.div_ceil(2) as u64;
    let parts: u64 = trained().map(|(_, param)| half(param.value.len())).sum();
    let whole: u64 = trained().map(|(_, param)| 4 * param.value.len() as u64).sum();
    let fc = fixture.params.get(fixture.params.find("fc.weight").unwrap()).value.len();
    for level in LEVELS {
        // Of a reduced gradient, half leaves each of two ranks; an all-reduce is two of that.
        let (all, last) = if level == Level::None { (whole, 4 * fc as u64) } else { (parts, half(fc)) };
        // A micro-batch of each rank in a step, six steps; then two of the first rank and one of the other, four steps.
        let name = format!("sent-{level:?}");
        let weights = |steps| if level == Level::None { 0 } else { steps * parts };
        let even = Sent { gradients: 6 * all, overlapped: 6 * (all - last), agreed: 0, weights: weights(6) };
        assert_eq!(sent(&fixture, &name, level, 2), [even, even], "{name}");
        let each = matches!(level, Level::Gradients | Level::Full);
        let times = if each { 8 } else { 4 };
        let uneven = |overlapped| Sent {
            gradients: times * all,
            overlapped: overlapped * (all - last),
            agreed: 0,
            weights: weights(4),
        };
        // Without rows in the last round there is no backward to send beside.
        let others = if each { uneven(4) } else { uneven(0) };
        assert_eq!(sent(&fixture, &format!("{name}-uneven"), level, 3), [uneven(times), others], "{name}");
    }
}
