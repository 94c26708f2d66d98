//! The `[parallel]` table: how many ranks, what each holds, and how they find each other.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Many ranks, described in [parallel.md](../parallel.md). What a run computes does not depend on this table but for the
/// order in which numbers are summed; a run may be resumed with another one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ParallelConfig {
    /// Ranks that the rows of a step are dealt to; absent: as many as were started by torchrun, SLURM or MPI, over
    /// `tensor` and `sequence`; without one of these, 1, or as many as `target-tensor` or `target-ranks` need.
    pub data: Option<usize>,
    /// What is spread over the ranks instead of being held by each.
    pub fsdp: Fsdp,
    /// Ranks over which one copy is spread, a divisor of `data`, on each of them those of its sequence too; absent: all of
    /// `data`.
    pub shards: Option<usize>,
    /// What gradients are sent as between ranks.
    pub reduce: ReduceDType,
    /// Ranks that share the tokens of a batch, long documents included.
    pub sequence: usize,
    /// How attention reaches the tokens of the other ranks of a sequence.
    pub exchange: Exchange,
    /// Ranks that share the matrices of the draft: a divisor of its heads, `intermediate-size` and `draft-vocab-size`.
    pub tensor: usize,
    /// Neighbouring ranks that share one copy of the target, however the draft lies over them; absent: all of
    /// `target-ranks`, without these `tensor`.
    pub target_tensor: Option<usize>,
    /// Ranks behind all others that hold the target and compute features while the others train, in mode `online`; 0:
    /// those that train hold it.
    pub target_ranks: usize,
    /// Seconds that a rank waits for the others before it gives up; at least 1.
    pub timeout: u64,
    /// Folder of this run that all ranks see, in which rank 0 writes where it can be reached; absent: at `MASTER_ADDR`
    /// and `MASTER_PORT`. For GPUs; MPI needs neither.
    pub rendezvous: Option<PathBuf>,
    /// Ranks are threads of one process that share its device: for tests and for trying a mesh.
    pub ranks_in_process: bool,
}

/// What is spread over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fsdp {
    /// Nothing: gradients are summed, everything else is done by every rank.
    None,
    /// The optimizer's state (ZeRO-1); gradients add up over all micro-batches before they are sent, once a step.
    Optimizer,
    /// Gradients too (ZeRO-2): sent after every micro-batch, and only a rank's own part is kept.
    Gradients,
    /// Parameters too (ZeRO-3): gathered before the first micro-batch of a step and let go of after the last.
    Full,
}

/// How attention reaches the tokens of other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exchange {
    /// Keys and values of all tokens come to every rank, once a micro-batch: any number of ranks. Sends least.
    Gather,
    /// Keys and values pass around (ring attention): any number of ranks, none of which ever has all of them.
    Ring,
    /// Heads for tokens, all to all (Ulysses): `sequence` divides the draft's key-value heads.
    Heads,
}

/// What gradients are sent as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReduceDType {
    /// As they are.
    F32,
    /// bfloat16: half the traffic; each is rounded before it is summed.
    Bf16,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self {
            data: None,
            fsdp: Fsdp::Optimizer,
            shards: None,
            reduce: ReduceDType::F32,
            sequence: 1,
            exchange: Exchange::Gather,
            tensor: 1,
            target_tensor: None,
            target_ranks: 0,
            timeout: 600,
            rendezvous: None,
            ranks_in_process: false,
        }
    }
}

impl ParallelConfig {
    /// Ranks that share a batch of the draft's.
    pub fn of_batch(&self) -> usize {
        self.sequence * self.tensor
    }

    /// Ranks that share one copy of the target.
    pub fn of_target(&self) -> usize {
        let together = if self.target_ranks > 0 { self.target_ranks } else { self.tensor };
        self.target_tensor.unwrap_or(together)
    }
}
