//! Which ranks of a run train the draft, and which have the target: each of them all of it, or neighbours a copy between
//! them; or ranks of the target's own, behind those that train.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail};
use specforge_config::{Fsdp, ParallelConfig, ReduceDType};
use specforge_parallel::{Level, Mesh, MeshShape};
use specforge_tensor::{DType, Group};
use specforge_train::Ranks;

use super::{Rank, patience};

/// What one rank of a run is there for.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    /// Those that train the draft; absent on a rank that is alone.
    pub(crate) train: Option<Ranks>,
    /// Those that share one copy of the target with this rank; absent where nobody does.
    pub(crate) target: Option<Arc<dyn Group>>,
    /// The places of these among the ranks that rows are dealt to.
    pub(crate) peers: Option<Range<usize>>,
    /// The number under which this rank writes into a store, unless another one writes the same rows.
    pub(crate) writer: Option<u32>,
    /// Whether it decodes when the first rank does: what it shares with that one takes both.
    pub(crate) decodes: bool,
}

/// Ranks that a plan asks for where nobody has started any: as few as its target needs.
pub(super) fn asked(plan: &ParallelConfig) -> usize {
    let least = (plan.of_target() / plan.of_batch()).max(1);
    plan.data.unwrap_or(least) * plan.of_batch()
}

/// The mesh of the ranks that train, of so many altogether.
pub(super) fn shape(plan: &ParallelConfig, ranks: usize) -> Result<MeshShape> {
    let (sequence, tensor) = (plan.sequence, plan.tensor);
    let data = plan.data.unwrap_or(ranks / plan.of_batch());
    if data * sequence * tensor != ranks {
        bail!(
            "{ranks} ranks were started, but parallel.data x sequence x tensor is {data} x {sequence} x {tensor} = {}: \
             start that many, or leave parallel.data out",
            data * sequence * tensor
        );
    }
    let of_target = plan.of_target();
    if !ranks.is_multiple_of(of_target) {
        bail!(
            "{ranks} ranks were started, but {of_target} share a copy of the target (parallel.target-tensor): start a multiple of {of_target}"
        );
    }
    let shards = plan.shards.unwrap_or(data);
    if !data.is_multiple_of(shards) {
        bail!("parallel.shards = {shards}: expected a divisor of the {data} ranks that rows are dealt to");
    }
    Ok(MeshShape { replicas: data / shards, shards, sequence, tensor })
}

impl Rank {
    /// What this rank is there for. All ranks call this.
    pub(crate) fn layout(&self, plan: &ParallelConfig) -> Result<Layout> {
        let (number, of_target, of_batch) = (self.number(), plan.of_target(), plan.of_batch());
        let together = of_target.max(of_batch);
        let writer = number.is_multiple_of(together).then_some((number / together) as u32);
        let decodes = number < of_target.max(plan.tensor);
        let Some(world) = &self.world else { return Ok(Layout { writer, decodes, ..Layout::default() }) };
        let train = ranks(plan, Mesh::new(world.clone(), shape(plan, world.size())?, self.device)?);
        let target = self.sharing_target(plan)?;
        let first = number - number % of_target;
        let peers = target.as_ref().map(|_| first / of_batch..(first + of_target).div_ceil(of_batch));
        Ok(Layout { train: Some(train), target, peers, writer, decodes })
    }

    /// Those that share one copy of the target, neighbours all, where every rank has some of it. All ranks call this.
    pub(crate) fn sharing_target(&self, plan: &ParallelConfig) -> Result<Option<Arc<dyn Group>>> {
        let Some(world) = self.world.as_ref().filter(|_| plan.of_target() > 1) else { return Ok(None) };
        Ok(Some(world.split(self.number() / plan.of_target())?))
    }
}

fn ranks(plan: &ParallelConfig, mesh: Mesh) -> Ranks {
    let level = match plan.fsdp {
        Fsdp::None => Level::None,
        Fsdp::Optimizer => Level::Optimizer,
        Fsdp::Gradients => Level::Gradients,
        Fsdp::Full => Level::Full,
    };
    let reduce = match plan.reduce {
        ReduceDType::F32 => DType::F32,
        ReduceDType::Bf16 => DType::Bf16,
    };
    Ranks { mesh, level, reduce, patience: patience(plan) }
}
