//! The reference path on several ranks: documents dealt round, gradients summed, the state whole or in parts.

use std::time::Duration;

use specforge_parallel::{Mesh, MeshShape, Shards, sum, threads};
use specforge_tensor::{Across, Combine, ParamId};

use super::*;

/// After each step: the loss, and all trained weights one behind the other.
type Trace = Vec<(f64, Vec<f32>)>;

/// The documents of a rank, each with its weight.
fn own(batch: &Batch, rank: usize, ranks: usize) -> Vec<Batch> {
    let weights = batch.position_weight.as_ref().expect("weights as the case has them");
    let all = batch.bounds.iter().zip(weights).skip(rank).step_by(ranks);
    all.map(|(bounds, weight)| Batch { position_weight: Some(vec![*weight]), ..document(batch, bounds) })
        .collect()
}

/// The rank's state: whole parameters, or its part of each.
struct State {
    adamw: AdamW,
    parts: Option<(Shards, Params)>,
}

impl State {
    fn new(case: &Case, mesh: &Mesh, is_sharded: bool) -> Self {
        let mut whole = optimizer(case);
        let parts = is_sharded.then(|| {
            let (shards, mut parts) = (Shards::new(mesh, DType::F32), Params::new());
            for (_, param) in case.params.iter() {
                parts.add(param.name.clone(), shards.cut(&param.value).expect("a part"), param.trainable);
            }
            whole = AdamW::new(whole.config().clone(), &parts).expect("an optimizer of parts");
            (shards, parts)
        });
        Self { adamw: whole, parts }
    }

    fn step(&mut self, params: &mut Params, grads: &Grads, mesh: &Mesh, weight_lr: (f64, f64)) {
        let (data, mut sums) = (mesh.data.as_ref(), Grads::new());
        let trained: Vec<ParamId> = params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
        for &id in &trained {
            let zeros = || Tensor::zeros(Device::Cpu, params.get(id).value.shape()).expect("zeros");
            let grad = grads.get(id).cloned().unwrap_or_else(zeros);
            let summed = match &self.parts {
                Some((shards, _)) => shards.reduce(&grad),
                None => sum(data, grad, DType::F32),
            };
            sums.set(id, summed.expect("a sum"));
        }
        let Some((shards, parts)) = &mut self.parts else {
            let across = Across { weight: Some(data), ..Across::default() };
            self.adamw.step_across(params, &sums, weight_lr, &across).expect("a step");
            return;
        };
        let across = Across { squares: Some(shards.group()), weight: Some(data), ..Across::default() };
        self.adamw.step_across(parts, &sums, weight_lr, &across).expect("a step");
        for id in trained {
            let value = &mut params.get_mut(id).value;
            let whole = shards.gather(&parts.get(id).value, value.shape()).expect("a whole");
            value.assign(&whole).expect("the same shape");
        }
    }
}

fn path(dir: &Path, ranks: usize, is_sharded: bool) -> Trace {
    let rates = Tensors::read(dir.join("optimizer.safetensors")).f32("opt.lr").1;
    let paths = threads::run(ranks, Duration::from_mins(1), |world| {
        let mut case = load(dir);
        let mesh = Mesh::new(world, MeshShape::data(ranks), Device::Cpu).expect("a mesh");
        let mut state = State::new(&case, &mesh, is_sharded);
        let batches = own(&case.batch, mesh.data.rank(), ranks);
        let one_step = |lr: &f32| {
            let (mut grads, mut ratio) = (Grads::new(), Ratio::default());
            for batch in &batches {
                case.batch = batch.clone();
                let (loss, more) = run(&case, grads);
                grads = more;
                ratio += loss.objective;
            }
            let mut sums = Tensor::from_f64(Device::Cpu, vec![ratio.sum, ratio.weight]).expect("two sums");
            mesh.data.all_reduce(&mut sums, Combine::Sum).expect("their sums");
            let sums = sums.later_f64().expect("float64").wait().expect("values");
            state.step(&mut case.params, &grads, &mesh, (ratio.weight, f64::from(*lr)));
            let trained = case.params.iter().filter(|(_, p)| p.trainable);
            (sums[0] / sums[1], trained.flat_map(|(_, p)| p.value.to_f32()).collect())
        };
        rates.iter().map(one_step).collect::<Trace>()
    });
    assert!(paths.iter().all(|path| *path == paths[0]), "all ranks have the same bits");
    paths.into_iter().next().expect("a rank")
}

#[test]
fn golden_parallel_ranks_take_the_path_of_one() {
    let Some(dir) = golden_case("eagle3-basic") else { return };
    let stored = Tensors::read(dir.join("optimizer.safetensors"));
    let single = path(&dir, 1, false);
    let losses: Vec<f32> = single.iter().map(|(loss, _)| *loss as f32).collect();
    assert_close("the reference losses", &losses, &stored.f32("opt.micro_losses").1, 1e-7, 5e-5);
    for (ranks, is_sharded) in [(2, false), (4, false), (2, true), (4, true)] {
        let name = format!("{ranks} ranks, parts: {is_sharded}");
        for (i, ((loss, got), (want_loss, want))) in
            path(&dir, ranks, is_sharded).iter().zip(&single).enumerate()
        {
            assert!(
                (loss / want_loss - 1.0).abs() < 1e-6,
                "{name}: step {i}: loss {loss}, alone {want_loss}"
            );
            let off = relative_error(got, want);
            assert!(off < 1e-6, "{name}: step {i}: weights are off by {off}");
        }
    }
}
