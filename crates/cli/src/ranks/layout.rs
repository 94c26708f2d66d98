//! Which ranks of a run train the draft, and which have the target: each of them all of it, or neighbours a copy between
//! them; or ranks of the target's own, behind those that train.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail};
use specforge_config::{Fsdp, ParallelConfig, ReduceDType};
use specforge_parallel::{Level, Mesh, MeshShape};
use specforge_tensor::{DType, Group};
use specforge_train::{Line, Ranks};

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
    /// Where the target has ranks of its own.
    pub(crate) apart: Option<Apart>,
}

/// One side of a run whose target has ranks of its own.
#[derive(Debug)]
pub(crate) enum Apart {
    /// This rank trains.
    Trains {
        /// To the rank that computes its features.
        line: Line,
        /// Its place among those that rows are dealt to.
        own: usize,
        /// Whether it speaks for all that the other end serves.
        is_first: bool,
    },
    /// This rank has the target.
    Serves {
        /// For each of its peers, lines to those that share a batch.
        clients: Vec<Vec<Line>>,
        /// Ranks that rows are dealt to, by whomever they are served.
        dealt: usize,
    },
}

impl Apart {
    /// Whether this rank has the target.
    pub(crate) fn serves(&self) -> bool {
        matches!(self, Self::Serves { .. })
    }
}

impl Layout {
    /// To the rank that has the target, where that is another one.
    pub(crate) fn line(&self) -> Option<Line> {
        match &self.apart {
            Some(Apart::Trains { line, .. }) => Some(line.clone()),
            _ => None,
        }
    }

    /// Says that this side has all that it needs.
    pub(crate) fn end(&self) -> Result<()> {
        match &self.apart {
            Some(Apart::Trains { line, is_first: true, .. }) => Ok(line.end()?),
            _ => Ok(()),
        }
    }
}

/// Ranks that a plan asks for where nobody has started any: as few as its target needs.
pub(super) fn asked(plan: &ParallelConfig) -> usize {
    let least = match plan.target_ranks {
        0 => plan.of_target() / plan.of_batch(),
        apart => apart / plan.of_target(),
    };
    plan.data.unwrap_or(least.max(1)) * plan.of_batch() + plan.target_ranks
}

/// The mesh of the ranks that train, of so many altogether.
pub(super) fn shape(plan: &ParallelConfig, ranks: usize) -> Result<MeshShape> {
    let ParallelConfig { sequence, tensor, target_ranks, .. } = *plan;
    let of_target = plan.of_target();
    let data = plan.data.unwrap_or(ranks.saturating_sub(target_ranks) / plan.of_batch());
    let all = data * plan.of_batch() + target_ranks;
    if data == 0 || all != ranks {
        let (apart, besides) = match target_ranks {
            0 => (String::new(), String::new()),
            n => (" + target-ranks".to_owned(), format!(" + {n}")),
        };
        bail!(
            "{ranks} ranks were started, but parallel.data x sequence x tensor{apart} is {data} x {sequence} x \
             {tensor}{besides} = {all}: start that many, or leave parallel.data out"
        );
    }
    if target_ranks == 0 && !ranks.is_multiple_of(of_target) {
        bail!(
            "{ranks} ranks were started, but {of_target} share a copy of the target (parallel.target-tensor): start a \
             multiple of {of_target}"
        );
    }
    let copies = target_ranks / of_target;
    if copies > 1 && !data.is_multiple_of(copies) {
        bail!(
            "parallel.target-ranks = {target_ranks} are {copies} copies of the target, each for as many of the {data} \
             batches that are trained on at once: expected a divisor of {data}"
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
        if plan.target_ranks > 0 {
            return self.apart(plan, world);
        }
        let train = ranks(plan, Mesh::new(world.clone(), shape(plan, world.size())?, self.device)?);
        let target = self.sharing_target(plan)?;
        let first = number - number % of_target;
        let peers = target.as_ref().map(|_| first / of_batch..(first + of_target).div_ceil(of_batch));
        Ok(Layout { train: Some(train), target, peers, writer, decodes, apart: None })
    }

    /// Those that train come first, then those that have the target. Each copy of it serves as many neighbours; the first
    /// one, which serves the first rank, decodes for it.
    fn apart(&self, plan: &ParallelConfig, world: &Arc<dyn Group>) -> Result<Layout> {
        let (number, of_target, of_batch) = (self.number(), plan.of_target(), plan.of_batch());
        let shape = shape(plan, world.size())?;
        let training = shape.ranks();
        let behind = number.checked_sub(training);
        let side = world.split(usize::from(behind.is_some()))?;
        let target = world.split(behind.map_or(0, |behind| 1 + behind / of_target))?;
        let between = world.split(0)?;
        let line = |other| Line { group: between.clone(), other, device: self.device };
        let dealt = training / of_batch;
        let of_copy = dealt / (plan.target_ranks / of_target);
        let Some(copy) = behind.map(|behind| behind / of_target) else {
            let own = number / of_batch;
            let line = line(training + own / of_copy * of_target);
            let is_first = number.is_multiple_of(of_copy * of_batch);
            let train = Some(ranks(plan, Mesh::new(side, shape, self.device)?));
            let (decodes, apart) = (number < plan.tensor, Some(Apart::Trains { line, own, is_first }));
            return Ok(Layout { train, decodes, apart, ..Layout::default() });
        };
        let peers = copy * of_copy..(copy + 1) * of_copy;
        let of_peer = |peer: usize| (peer * of_batch..(peer + 1) * of_batch).map(line).collect();
        let apart = Some(Apart::Serves { clients: peers.clone().map(of_peer).collect(), dealt });
        let target = (of_target > 1).then_some(target);
        Ok(Layout { target, peers: Some(peers), decodes: true, apart, ..Layout::default() })
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
