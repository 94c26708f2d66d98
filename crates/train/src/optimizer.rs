//! The optimizer of one rank: of whole parameters, or of its part of each.
//!
//! With several ranks every trained parameter takes every step, with zeros where a rank has nothing to add; collectives
//! are in the order of the parameters, so that all ranks ask for the same.

use std::collections::BTreeMap;
use std::time::Duration;

use specforge_methods::{Exchange, Sequence};
use specforge_nn::optimizer::{AdamW, AdamWConfig, StepReport};
use specforge_parallel::{Level, Mesh, Shards, leaving, sum};
use specforge_tensor::{Across, DType, Device, Grads, Later, Param, ParamId, Params, Tensor};

use crate::checkpoint::{Index, Saved, Wanted};
use crate::sent::agreed_bytes;
use crate::{Result, Sent};

/// The ranks that train together.
#[derive(Debug, Clone)]
pub struct Ranks {
    /// Who is where.
    pub mesh: Mesh,
    /// What is spread over them.
    pub level: Level,
    /// What gradients are sent as.
    pub reduce: DType,
    /// How long a rank waits for the others.
    pub patience: Duration,
}

impl Ranks {
    /// Those that share a batch, whose rows attention reaches by this exchange.
    #[must_use]
    pub fn of_batch(&self, exchange: Exchange) -> specforge_methods::Ranks {
        let ranks = self.mesh.sequence.clone();
        specforge_methods::Ranks { sequence: Some(Sequence { ranks, exchange }), ..self.of_matrices() }
    }

    /// Those that share matrices.
    fn of_matrices(&self) -> specforge_methods::Ranks {
        specforge_methods::Ranks { tensor: Some(self.mesh.tensor.clone()), sequence: None }
    }

    /// Whether this is the first rank, or shares matrices with it: together they have one whole draft.
    pub(crate) fn is_beside_first(&self) -> bool {
        let place = self.mesh.place;
        place.replica + place.shard + place.sequence == 0
    }

    /// Ranks that are given the same batch.
    pub(crate) fn per_batch(&self) -> usize {
        self.mesh.shape.sequence * self.mesh.shape.tensor
    }

    /// Everyone, so that a norm and a weight are one number to the bit.
    fn across(&self) -> Across<'_> {
        let (mesh, tensor) = (&self.mesh, self.mesh.shape.tensor);
        let copies = if self.level == Level::None { &mesh.gradients } else { &mesh.replicas }.size();
        let world = Some(self.mesh.world.as_ref());
        Across { squares: world, weight: world, tensor, copies }
    }
}

/// AdamW, alone or with other ranks.
#[derive(Debug)]
pub struct Optimizer {
    adamw: AdamW,
    ranks: Option<Ranks>,
    parts: Option<Parts>,
    /// Sums over micro-batches and ranks so far in this step, of parameters or of this rank's parts.
    sums: Grads,
    sent: Sent,
}

/// This rank's part of every trained parameter.
#[derive(Debug)]
struct Parts {
    shards: Shards,
    params: Params,
    /// The whole parameter, its part and its shape.
    whole: Vec<(ParamId, ParamId, Vec<usize>)>,
}

impl Optimizer {
    /// At its start for the parameters as they are; `ranks` where there are several.
    pub fn new(config: AdamWConfig, params: &Params, ranks: Option<Ranks>) -> Result<Self> {
        let parts = match &ranks {
            Some(ranks) if ranks.level != Level::None => Some(Parts::cut(ranks, params)?),
            _ => None,
        };
        let adamw = AdamW::new(config, parts.as_ref().map_or(params, |parts| &parts.params))?;
        Ok(Self { adamw, ranks, parts, sums: Grads::new(), sent: Sent::default() })
    }

    /// The settings.
    pub fn config(&self) -> &AdamWConfig {
        self.adamw.config()
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.adamw.steps()
    }

    /// The ranks it works with.
    pub fn ranks(&self) -> Option<&Ranks> {
        self.ranks.as_ref()
    }

    /// What left this rank for others since it was made.
    pub fn sent(&self) -> Sent {
        self.sent
    }

    /// Makes sure that every parameter is there whole, as a step needs it. All ranks call this.
    pub fn gather(&mut self, params: &mut Params) -> Result<()> {
        let Some(parts) = &self.parts else { return Ok(()) };
        if parts.whole.iter().all(|(id, _, shape)| params.get(*id).value.shape() == shape) {
            return Ok(());
        }
        self.sent.weights += parts.bytes();
        Ok(parts.device().beside(|| {
            let whole = |(id, part, shape): &(ParamId, ParamId, Vec<usize>)| {
                Ok((*id, parts.shards.gather(&parts.params.get(*part).value, shape)?))
            };
            params.fill(parts.whole.iter().map(whole).collect::<specforge_tensor::Result<_>>()?)
        })?)
    }

    /// Whether gradients are sent after a micro-batch: every one, or the last of a step.
    pub(crate) fn sends_after(&self, is_last: bool) -> bool {
        let each = |level| matches!(level, Level::Gradients | Level::Full);
        self.ranks.as_ref().is_some_and(|ranks| is_last || each(ranks.level))
    }

    /// Adds a parameter's final gradient to the sum over all ranks, or to this rank's part of it, without waiting for it.
    /// All ranks call this in the same order. `overlapped`: the backward goes on.
    pub(crate) fn send(
        &mut self,
        (id, param): (ParamId, &Param),
        grad: Option<Tensor>,
        overlapped: bool,
    ) -> specforge_tensor::Result<()> {
        let Some(ranks) = &self.ranks else { return Ok(()) };
        let (parts, sums, len) = (&self.parts, &mut self.sums, param.value.len());
        let part = parts.as_ref().map(|parts| (&parts.shards, parts.of(id)));
        let id = part.map_or(id, |(_, part)| part);
        // What is used once more here is dropped here too, and so goes back in order.
        param.value.device().beside(|| {
            let value = &param.value;
            let grad = grad.map_or_else(|| Tensor::zeros(value.device(), value.shape()), Ok)?;
            let more = match part {
                Some((shards, _)) => shards.reduce(&grad)?,
                None => sum(ranks.mesh.gradients.as_ref(), grad, ranks.reduce)?,
            };
            let sum = match sums.take(id) {
                Some(mut sum) => {
                    sum.device().kernels().add_assign(&mut sum, &more)?;
                    sum
                }
                None => more,
            };
            sums.set(id, sum);
            Ok(())
        })?;
        let bytes = match part {
            Some((shards, _)) => shards.reduce_bytes(len),
            None => 2 * leaving((len * ranks.reduce.size()) as u64, ranks.mesh.gradients.size()),
        };
        self.sent.gradients += bytes;
        self.sent.overlapped += if overlapped { bytes } else { 0 };
        Ok(())
    }

    /// One step with what was sent, or alone with `grads`; `weight` is what this rank's losses are divided by, summed over
    /// all here. All ranks call this.
    pub fn step(
        &mut self,
        params: &mut Params,
        grads: &Grads,
        (weight, lr): (f64, f64),
    ) -> Result<Later<StepReport>> {
        let Some(ranks) = &self.ranks else { return Ok(self.adamw.step(params, grads, weight, lr)?) };
        let (of_matrices, across) = (ranks.of_matrices(), ranks.across());
        let weight_lr = (weight / ranks.per_batch() as f64, lr);
        let mut sums = std::mem::take(&mut self.sums);
        let own = self.parts.as_ref().map_or(&*params, |parts| &parts.params);
        self.sent.agreed += agreed_bytes(own, ranks.mesh.tensor.size());
        let Some(parts) = &mut self.parts else {
            of_matrices.agree(params, &mut sums)?;
            return Ok(self.adamw.step_across(params, &sums, weight_lr, &across)?);
        };
        of_matrices.agree(&parts.params, &mut sums)?;
        let report = self.adamw.step_across(&mut parts.params, &sums, weight_lr, &across)?;
        parts.hand_back(params, ranks.level)?;
        if ranks.level != Level::Full {
            self.sent.weights += parts.bytes();
        }
        Ok(report)
    }

    /// What a checkpoint keeps of this rank: tensors, and of how many files theirs is which. Nothing for a rank that
    /// holds what another one saves.
    pub(crate) fn state(&self, params: &Params) -> Result<Option<OptimizerState>> {
        let Some(ranks) = &self.ranks else { return self.whole_state(params, (0, 1)).map(Some) };
        let (place, tensor) = (ranks.mesh.place, ranks.mesh.shape.tensor);
        let Some(parts) = &self.parts else {
            let beside = ranks.is_beside_first();
            return if beside {
                self.whole_state(params, (place.tensor, tensor)).map(Some)
            } else {
                Ok(None)
            };
        };
        if place.replica > 0 {
            return Ok(None);
        }
        let named = self.adamw.state(&parts.params)?;
        let tensors = named.into_iter().map(|(name, tensor)| parts.trimmed(name, tensor));
        let (part, n_parts) = (parts.shards.group().rank(), parts.shards.group().size());
        let (file, index) = (place.tensor * n_parts + part, Index::new(tensor * n_parts, tensor, params));
        Ok(Some(OptimizerState { tensors: tensors.collect::<Result<_>>()?, file, index }))
    }

    /// Of a rank whose parameters are no parts, one of so many that share matrices.
    fn whole_state(&self, params: &Params, (file, tensor): (usize, usize)) -> Result<OptimizerState> {
        let index = Index::new(tensor, tensor, params);
        Ok(OptimizerState { tensors: self.adamw.state(params)?, file, index })
    }

    /// The whole of a parameter that is there; of one that ranks share all of them call this.
    pub fn whole(&self, param: &Param) -> Result<Tensor> {
        let Some(ranks) = &self.ranks else { return Ok(param.value.clone()) };
        Ok(ranks.of_matrices().whole(param, &param.value)?)
    }

    /// Goes on from a saved state, whatever number of ranks wrote it; `params` have the saved weights already.
    pub(crate) fn restore(&mut self, params: &mut Params, steps: u64, saved: &Saved) -> Result<()> {
        let config = self.adamw.config().clone();
        let wants: BTreeMap<String, Wanted> =
            params.iter().map(|(_, p)| (p.name.clone(), Wanted::of(p))).collect();
        let own = |name: &str| {
            let (_, param) = name.split_once('.')?;
            saved.piece(name, wants.get(param)?)
        };
        let Some(ranks) = self.ranks.as_ref().filter(|_| self.parts.is_some()) else {
            self.adamw = AdamW::restore(config, params, steps, own)?;
            return Ok(());
        };
        let mut parts = Parts::cut(ranks, params)?;
        let shards = parts.shards.clone();
        let find = |name: &str| {
            let piece = own(name)?;
            if name.starts_with("step.") { Some(piece) } else { shards.cut(&piece).ok() }
        };
        self.adamw = AdamW::restore(config, &mut parts.params, steps, find)?;
        parts.hand_back(params, Level::Gradients)?;
        self.parts = Some(parts);
        Ok(())
    }
}

/// What one rank saves of the optimizer.
#[derive(Debug)]
pub(crate) struct OptimizerState {
    pub tensors: Vec<(String, Tensor)>,
    pub file: usize,
    pub index: Index,
}

impl Parts {
    fn cut(ranks: &Ranks, params: &Params) -> Result<Self> {
        let shards = Shards::new(&ranks.mesh, ranks.reduce);
        let (mut cut, mut whole) = (Params::new(), Vec::new());
        for (id, param) in params.iter().filter(|(_, param)| param.trainable) {
            let part = cut.add(param.name.clone(), shards.cut(&param.value)?, true);
            cut.get_mut(part).split = param.split;
            whole.push((id, part, param.value.shape().to_vec()));
        }
        Ok(Self { shards, params: cut, whole })
    }

    /// The part of a whole parameter.
    fn of(&self, id: ParamId) -> ParamId {
        let found = self.whole.iter().find(|(whole, ..)| *whole == id);
        found.map(|(_, part, _)| *part).expect("every trained parameter was cut")
    }

    fn device(&self) -> Device {
        self.params.iter().next().map_or(Device::Cpu, |(_, param)| param.value.device())
    }

    /// Bytes that leave this rank where all parameters are gathered.
    fn bytes(&self) -> u64 {
        self.params.iter().map(|(_, part)| self.shards.gather_bytes(&part.value)).sum()
    }

    /// Whole parameters from everyone's parts, each waited for where it is used; or, where they are spread too, nothing
    /// until they are needed.
    fn hand_back(&self, params: &mut Params, level: Level) -> Result<()> {
        if level == Level::Full {
            let ids: Vec<ParamId> = self.whole.iter().map(|(id, ..)| *id).collect();
            return Ok(params.release(&ids)?);
        }
        for (id, part, shape) in &self.whole {
            let value = &mut params.get_mut(*id).value;
            value
                .device()
                .beside(|| value.assign(&self.shards.gather(&self.params.get(*part).value, shape)?))?;
        }
        Ok(())
    }

    /// Without the zeros at the end.
    fn trimmed(&self, name: String, tensor: Tensor) -> Result<(String, Tensor)> {
        let of = self.whole.iter().find(|(_, part, _)| {
            let param = &self.params.get(*part).name;
            name.split_once('.').is_some_and(|(_, rest)| rest == param)
        });
        let Some((_, _, shape)) = of.filter(|_| !name.starts_with("step.")) else {
            return Ok((name, tensor));
        };
        let n = self.shards.range(shape.iter().product()).len();
        let own = tensor.reshape(&[tensor.len(), 1])?.rows(0..n)?.reshape(&[n])?;
        Ok((name, own))
    }
}
