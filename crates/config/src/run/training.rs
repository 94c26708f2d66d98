//! The `[train]` table: how long, in what portions, and what is kept.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use specforge_nn::optimizer::AdamWConfig;
use specforge_nn::schedule::ScheduleConfig;

/// The training loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct TrainConfig {
    /// Passes over the rows; absent: 1, unless `max-steps` is set.
    pub epochs: Option<u64>,
    /// Optimizer steps; instead of `epochs`.
    pub max_steps: Option<u64>,
    /// Tokens of a micro-batch: rows are packed up to this many, without padding. At least `data.max-length`.
    pub tokens_per_batch: usize,
    /// Micro-batches of one optimizer step.
    pub accumulation: usize,
    /// What happens where a micro-batch does not fit into device memory.
    pub on_oom: OnOom,
    /// Steps between two lines of the log.
    pub log_every: u64,
    /// Steps between two evaluations; 0: only at the end.
    pub eval_every: u64,
    /// Steps between two checkpoints; 0: only at the end and when the run is interrupted.
    pub save_every: u64,
    /// Checkpoints kept besides the best one; at least 1.
    pub keep: usize,
    /// Continue from the newest checkpoint of the run's folder if there is one, as if `--resume` were given.
    pub auto_resume: bool,
    /// Folder of a draft whose weights the training starts from: an export, a checkpoint, or what SpecForge, speculators
    /// or the EAGLE authors write; or a repository of the hub, `owner/name`. Absent: fresh weights. The draft vocabulary
    /// stays this run's; rows of the head go with their tokens.
    pub warm_start: Option<PathBuf>,
    /// The optimizer.
    pub optimizer: AdamWConfig,
    /// The learning rate over the steps.
    pub schedule: ScheduleConfig,
}

/// What happens where a micro-batch does not fit into device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnOom {
    /// The run ends, and says which setting would help.
    Error,
    /// The step is taken again with its micro-batches halved, between documents: the same sums, in another order.
    Shrink,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: None,
            max_steps: None,
            tokens_per_batch: 8192,
            accumulation: 1,
            on_oom: OnOom::Error,
            log_every: 10,
            eval_every: 0,
            save_every: 0,
            keep: 3,
            auto_resume: false,
            warm_start: None,
            optimizer: AdamWConfig::default(),
            schedule: ScheduleConfig::default(),
        }
    }
}
