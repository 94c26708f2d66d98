//! Ranks that share a draft's matrices, the rows of a batch, or train on other batches, against one alone on the
//! reference cases: losses, every gradient, and the weights after steps of the optimizer.

use std::sync::Arc;
use std::time::Duration;

use specforge_parallel::{Mesh, MeshShape, threads};
use specforge_tensor::{Across, Combine, Group};

use super::parallel::own;
use super::*;
use crate::{Exchange, Sequence};

const PATIENCE: Duration = Duration::from_mins(1);
const STEPS: usize = 2;

/// What training came to: losses and metrics of every step, gradients of the first, weights after the last; by name.
#[derive(Debug, Clone, Default)]
struct Trained {
    figures: Vec<(String, Vec<f64>)>,
    tensors: Vec<(String, Vec<f32>)>,
}

/// All sums and weights of a loss.
fn figures(loss: &Loss) -> Vec<(String, Vec<f64>)> {
    let metric = |m: &Metric| {
        let values = m.values.iter().flat_map(|r| [r.sum, r.weight]).collect();
        (m.name.to_owned(), values)
    };
    let objective = ("objective".to_owned(), vec![loss.objective.sum, loss.objective.weight]);
    std::iter::once(objective).chain(loss.metrics.iter().map(metric)).collect()
}

fn sum(values: &mut Vec<f64>, ranks: &Arc<dyn Group>) {
    let mut all = Tensor::from_f64(Device::Cpu, std::mem::take(values)).unwrap();
    ranks.all_reduce(&mut all, Combine::Sum).unwrap();
    *values = all.later_f64().unwrap().wait().unwrap();
}

/// Adds the figures of another batch.
fn add(all: &mut Vec<(String, Vec<f64>)>, more: Vec<(String, Vec<f64>)>) {
    if all.is_empty() {
        *all = more;
        return;
    }
    for ((_, all), (_, more)) in all.iter_mut().zip(more) {
        all.iter_mut().zip(more).for_each(|(all, more)| *all += more);
    }
}

/// The figures of no batch.
fn no_figures(steps: usize) -> Vec<(String, Vec<f64>)> {
    let names = [("objective", 1), ("loss", steps), ("accuracy", steps), ("acceptance", steps)];
    names.map(|(name, n)| (name.to_owned(), vec![0.0; 2 * n])).to_vec()
}

/// Trains on a case; `data` is the group of those that train on other batches, if there are some.
fn train(mut case: Case, batches: &[Batch], ranks: &Ranks, data: Option<&Arc<dyn Group>>) -> Trained {
    // Clipping is the trainer's: it takes the norm over all ranks.
    let config = AdamWConfig { lr: 1e-3, max_grad_norm: 0.0, ..AdamWConfig::default() };
    let mut optimizer = AdamW::new(config, &case.params).unwrap();
    let mut trained = Trained::default();
    for step in 0..STEPS {
        let (mut all, mut grads) = (Vec::new(), Grads::new());
        for batch in batches {
            case.batch = batch.clone();
            let (loss, more) = run(&case, grads);
            add(&mut all, figures(&loss));
            grads = more;
        }
        add(&mut all, no_figures(case.method.config.ttt_steps));
        let others: Vec<_> =
            data.into_iter().chain(ranks.sequence().map(|sequence| &sequence.ranks)).collect();
        for group in &others {
            all.iter_mut().for_each(|(_, values)| sum(values, group));
        }
        let ids: Vec<_> = case.params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
        for &id in &ids {
            let own = grads.take(id);
            assert!(own.is_some() || batches.is_empty(), "every weight has a gradient");
            let zeros = || Tensor::zeros(Device::Cpu, case.params.get(id).value.shape()).unwrap();
            let mut own = own.unwrap_or_else(zeros);
            others.iter().for_each(|group| group.all_reduce(&mut own, Combine::Sum).unwrap());
            grads.set(id, own);
        }
        ranks.agree(&case.params, &mut grads).unwrap();
        let tensor = ranks.tensor().map_or(1, |group| group.size());
        let across = Across { tensor, ..Across::default() };
        let mut squares = 0.0;
        for id in ids {
            let (param, own) = (case.params.get(id), grads.take(id).expect("every weight has a gradient"));
            let own_squares: f64 = own.to_f32().iter().map(|g| f64::from(*g).powi(2)).sum();
            squares += across.share(param.split) * own_squares;
            if step == 0 {
                let whole = ranks.whole(param, &own).unwrap().to_f32();
                trained.tensors.push((format!("grad.{}", param.name), whole));
            }
            grads.set(id, own);
        }
        let mut norm = vec![squares];
        ranks.tensor().into_iter().for_each(|group| sum(&mut norm, group));
        trained.figures.push((format!("squares of step {step}"), norm));
        let weight = all[0].1[1];
        optimizer.step(&mut case.params, &grads, weight, 1e-3).unwrap().wait().unwrap();
        trained
            .figures
            .extend(all.into_iter().map(|(name, values)| (format!("{name} of step {step}"), values)));
    }
    for (_, param) in case.params.iter().filter(|(_, p)| p.trainable) {
        let whole = ranks.whole(param, &param.value).unwrap().to_f32();
        trained.tensors.push((format!("param.{}", param.name), whole));
    }
    trained
}

/// The mesh of a case: ranks with other batches, ranks of a sequence, ranks of a matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) data: usize,
    pub(super) sequence: usize,
    pub(super) tensor: usize,
    pub(super) exchange: Exchange,
}

impl Shape {
    fn mesh(&self) -> MeshShape {
        MeshShape { replicas: 1, shards: self.data, sequence: self.sequence, tensor: self.tensor }
    }
}

fn check(case: &str, shape: Shape) {
    let Some(dir) = golden_case(case) else { return };
    threads::run(shape.mesh().ranks(), PATIENCE, |world| check_on(&world, &dir, shape));
}

/// Trains as one rank of a mesh, and alone.
pub(super) fn check_on(world: &Arc<dyn Group>, dir: &Path, shape: Shape) {
    let alone = load(dir);
    let batch = alone.batch.clone();
    let want = train(alone, &[batch], &Ranks::default(), None);
    let mesh = Mesh::new(world.clone(), shape.mesh(), Device::Cpu).unwrap();
    let sequence = Some(Sequence { ranks: mesh.sequence.clone(), exchange: shape.exchange });
    let ranks = Ranks { tensor: Some(mesh.tensor.clone()), sequence };
    let case = load_on(dir, &ranks);
    let batches = match shape.data {
        1 => vec![case.batch.clone()],
        // Documents are dealt; with more ranks than there are, some have none.
        n => own(&case.batch, mesh.place.shard, n),
    };
    let got = train(case, &batches, &ranks, Some(&mesh.data));
    compare(&format!("{}, {shape:?}, rank {}", dir.display(), world.rank()), &got, &want);
}

fn compare(name: &str, got: &Trained, want: &Trained) {
    assert_eq!((got.figures.len(), got.tensors.len()), (want.figures.len(), want.tensors.len()));
    for ((what, got), (_, want)) in got.figures.iter().zip(&want.figures) {
        for (got, want) in got.iter().zip(want) {
            // Squares double a relative difference.
            let bound = if what.starts_with("squares") { 2e-6 } else { 1e-6 };
            assert!((got - want).abs() <= bound * want.abs(), "{name}: {what}: {got}, alone {want}");
        }
    }
    for ((what, got), (_, want)) in got.tensors.iter().zip(&want.tensors) {
        // The optimizer divides by the root of squares: where gradients are tiny it enlarges their last digits.
        let bound = if what.starts_with("param.") && !name.contains("basic") { 5e-6 } else { 1e-6 };
        let error = relative_error(got, want);
        assert!(error <= bound, "{name}: {what}: {error:e}");
    }
}

pub(super) const ALONE: Shape = Shape { data: 1, sequence: 1, tensor: 1, exchange: Exchange::Ring };

#[test]
fn parallel_tensor_ranks_train_as_one() {
    for tensor in [2, 4] {
        check("eagle3-basic", Shape { tensor, ..ALONE });
    }
    check("eagle3-lk-lambda", Shape { tensor: 2, ..ALONE });
    check("eagle3-lk-alpha", Shape { tensor: 2, ..ALONE });
    check("eagle3.1-fc-norm", Shape { tensor: 2, ..ALONE });
}

#[test]
fn parallel_sequence_ranks_train_as_one() {
    for exchange in [Exchange::Heads, Exchange::Ring, Exchange::Gather] {
        check("eagle3-basic", Shape { sequence: 2, exchange, ..ALONE });
    }
    for exchange in [Exchange::Ring, Exchange::Gather] {
        check("eagle3-basic", Shape { sequence: 3, exchange, ..ALONE });
    }
    check("eagle3.1-fc-norm", Shape { sequence: 2, exchange: Exchange::Heads, ..ALONE });
}

/// Their objectives are means over the rows of all ranks.
#[test]
fn parallel_sequence_ranks_train_every_objective_as_one() {
    for case in ["eagle3-lk-lambda", "eagle3-lk-alpha"] {
        check(case, Shape { sequence: 2, exchange: Exchange::Heads, ..ALONE });
        check(case, Shape { sequence: 3, ..ALONE });
        check(case, Shape { sequence: 2, tensor: 2, ..ALONE });
    }
}

#[test]
fn parallel_data_tensor_and_sequence_ranks_train_as_one() {
    check("eagle3-basic", Shape { data: 4, ..ALONE });
    check("eagle3-basic", Shape { data: 2, tensor: 2, ..ALONE });
    check("eagle3-basic", Shape { data: 2, sequence: 2, ..ALONE });
    check("eagle3-basic", Shape { sequence: 2, tensor: 2, ..ALONE });
}

/// A batch of fewer tokens than it takes to give every rank some.
#[test]
fn parallel_short_batches_leave_ranks_without_rows() {
    for case in ["eagle3-basic", "eagle3-lk-lambda", "eagle3-lk-alpha"] {
        short_batches(case);
    }
}

fn short_batches(case: &str) {
    let Some(dir) = golden_case(case) else { return };
    let short = |case: &Case| {
        let mut batch = case.batch.clone();
        let n = 9;
        batch.bounds = std::iter::once(0..n).collect();
        batch.rows.truncate(1);
        batch.input_ids.truncate(n);
        batch.loss_mask = vec![1; n];
        batch.positions.truncate(n);
        batch.position_weight = None;
        batch.hidden_states = batch.hidden_states.rows(0..n).unwrap();
        let Teacher::LastHidden { hidden, argmax, logsumexp } = &mut batch.teacher else { unreachable!() };
        *hidden = hidden.rows(0..n).unwrap();
        // Tokens that the draft can name.
        *argmax = argmax[..n].iter().map(|_| case.method.vocab.target_ids()[3]).collect();
        *logsumexp = Tensor::from_f32(Device::Cpu, logsumexp.to_f32()[..n].to_vec(), &[n]).unwrap();
        batch
    };
    let alone = load(&dir);
    let batch = short(&alone);
    let want = train(alone, &[batch], &Ranks::default(), None);
    let both = [4, 7].map(|size| [(size, Exchange::Ring), (size, Exchange::Gather)]);
    for (size, exchange) in both.concat().into_iter().chain([(2, Exchange::Heads)]) {
        let got = threads::run(size, PATIENCE, |group| {
            let ranks = Ranks { tensor: None, sequence: Some(Sequence { ranks: group.clone(), exchange }) };
            let case = load_on(&dir, &ranks);
            let batch = short(&case);
            train(case, &[batch], &ranks, None)
        });
        got.iter()
            .enumerate()
            .for_each(|(r, got)| compare(&format!("short {case}, {r} of {size}, {exchange:?}"), got, &want));
    }
}

#[test]
fn parallel_drafts_propose_as_one() {
    let Some(dir) = golden_case("eagle3-basic") else { return };
    let propose = |case: &Case| {
        let mut drafter = case.method.drafter(&case.params).unwrap();
        let states = case.batch.hidden_states.rows(0..5).unwrap();
        let first = drafter.commit(&states, &case.batch.input_ids[1..6]).unwrap();
        let next = drafter.expand(&[(7, None), (9, None)]).unwrap();
        let last = drafter.expand(&[(11, Some(1))]).unwrap();
        [vec![first], next, last].concat().concat()
    };
    let want = propose(&load(&dir));
    let got = threads::run(4, PATIENCE, |group| {
        propose(&load_on(&dir, &Ranks { tensor: Some(group), sequence: None }))
    });
    got.iter().for_each(|got| assert_close_max("logits", got, &want, 1e-5));
}

/// What cannot be shared is refused with the setting that is at fault.
#[test]
fn parallel_drafts_that_do_not_come_out_even_are_refused() {
    let Some(dir) = golden_case("eagle3-basic") else { return };
    let config = case_json(dir.join("config.json"));
    let dims = Dims::from_json(&config).unwrap();
    let refuse = |size: usize, of: &(dyn Fn(Arc<dyn Group>) -> Ranks + Sync)| {
        let told = threads::run(size, PATIENCE, |group| {
            shares::check(&dims, of(group).counts()).unwrap_err().to_string()
        });
        told[0].clone()
    };
    let message = refuse(3, &|group| Ranks { tensor: Some(group), sequence: None });
    assert!(message.contains("num-attention-heads = 4") && message.contains("parallel.tensor"), "{message}");
    let message = refuse(4, &|ranks| Ranks {
        tensor: None,
        sequence: Some(Sequence { ranks, exchange: Exchange::Heads }),
    });
    assert!(message.contains("num-key-value-heads = 2") && message.contains("gather"), "{message}");
}
