//! Tests of every operation: gradients against finite differences, values against plain float64 arithmetic, and
//! what must hold for all of them (no rows, any number of threads, wrong shapes). `zoo` lists the operations once, and
//! the tests of CUDA devices read it too.

pub(crate) mod adam;
pub(crate) mod alone;
pub(crate) mod attention;
pub(crate) mod delta;
mod finals;
mod finite_difference;
pub(crate) mod frozen;
mod invariants;
pub(crate) mod loss;
mod loss_shares;
pub(crate) mod mixture;
mod shapes;
mod values;
pub(crate) mod zoo;

use std::sync::Arc;

use specforge_testkit::Lcg;

pub(crate) use zoo::{attend, attention_of, documents, heads, zoo};

use crate::{DType, Device, Grads, ParamId, Params, Result, Tape, Tensor, Var};

type Forward = dyn Fn(&Tape<'_>, &[Var], &[ParamId]) -> Result<Var> + Sync + Send;

/// One operation with its arguments: leaves (values whose gradient is read) and trained parameters. It runs where they
/// are.
#[derive(Clone)]
pub(crate) struct Op {
    pub(crate) leaves: Vec<Tensor>,
    pub(crate) params: Vec<Tensor>,
    pub(crate) forward: Arc<Forward>,
}

impl Op {
    pub(crate) fn new(
        leaves: Vec<Tensor>,
        params: Vec<Tensor>,
        forward: impl Fn(&Tape<'_>, &[Var], &[ParamId]) -> Result<Var> + Sync + Send + 'static,
    ) -> Self {
        Self { leaves, params, forward: Arc::new(forward) }
    }

    fn declared(&self) -> (Params, Vec<ParamId>) {
        let mut params = Params::new();
        let ids = self.params.iter().enumerate().map(|(i, p)| params.add(format!("p{i}"), p.clone(), true));
        let ids = ids.collect();
        (params, ids)
    }

    pub(crate) fn value(&self) -> Tensor {
        self.try_value().unwrap()
    }

    /// As [`Op::value`], where the device may refuse.
    pub(crate) fn try_value(&self) -> Result<Tensor> {
        let (params, ids) = self.declared();
        let tape = Tape::inference(&params);
        let leaves: Vec<Var> = self.leaves.iter().map(|t| tape.input(t.clone())).collect();
        Ok((self.forward)(&tape, &leaves, &ids)?.value().clone())
    }

    /// The value, and the gradients of leaves, then parameters, of `Σ dy · value`; dy is drawn from `seed`.
    pub(crate) fn gradients(&self, seed: u64) -> (Tensor, Tensor, Vec<Tensor>) {
        self.try_gradients(seed).unwrap()
    }

    /// As [`Op::gradients`], where the operation may have none.
    pub(crate) fn try_gradients(&self, seed: u64) -> Result<(Tensor, Tensor, Vec<Tensor>)> {
        let (params, ids) = self.declared();
        self.gradients_of(&params, &ids, seed)
    }

    /// As [`Op::gradients`], with parameters declared elsewhere.
    pub(crate) fn gradients_of(
        &self,
        params: &Params,
        ids: &[ParamId],
        seed: u64,
    ) -> Result<(Tensor, Tensor, Vec<Tensor>)> {
        let tape = Tape::recording(params);
        let leaves: Vec<Var> = self.leaves.iter().map(|t| tape.leaf(t.clone())).collect();
        let y = (self.forward)(&tape, &leaves, ids)?;
        let value = y.value().clone();
        let dy = seed_gradient(seed, &value);
        let (grads, mut all) = tape.backward_to(vec![(y, dy.clone())], &leaves)?;
        let zeros = |p: &Tensor| Tensor::zeros(p.device(), p.shape()).unwrap();
        let of = |grads: &Grads, id| grads.get(id).cloned();
        all.extend(ids.iter().zip(&self.params).map(|(&id, p)| of(&grads, id).unwrap_or_else(|| zeros(p))));
        Ok((value, dy, all))
    }
}

/// Normal numbers of the shape of `value`, on its device and in its storage type; of numbers that every storage type
/// holds, so that all devices get the same.
fn seed_gradient(seed: u64, value: &Tensor) -> Tensor {
    let dy = normal(&mut Lcg::new(seed), value.shape()).cast(DType::Bf16).unwrap();
    dy.cast(value.device().storage()).unwrap().to_device(value.device()).unwrap()
}

pub(crate) fn normal(rng: &mut Lcg, shape: &[usize]) -> Tensor {
    matrix(rng.normals(shape.iter().product(), 1.0), shape)
}

pub(crate) fn matrix(values: Vec<f32>, shape: &[usize]) -> Tensor {
    Tensor::from_f32(Device::Cpu, values, shape).unwrap()
}

pub(crate) fn rows(index: impl IntoIterator<Item = u32>) -> Tensor {
    Tensor::from_u32(Device::Cpu, index.into_iter().collect())
}

pub(crate) fn bits(t: &Tensor) -> Vec<u32> {
    t.u32s().map_or_else(|| t.to_f32().iter().map(|v| v.to_bits()).collect(), <[u32]>::to_vec)
}
