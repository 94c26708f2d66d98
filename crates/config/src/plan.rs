//! What a recipe resolves to: absolute paths, checked numbers, no open choice that the recipe could decide.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use specforge_data::{Columns, MaskCompat, OnError, PrepareConfig, RowFormat, Source, TemplateOptions};
use specforge_methods::MethodConfig;
use specforge_nn::optimizer::AdamWConfig;
use specforge_nn::schedule::ScheduleConfig;
use specforge_store::Encoding;

use crate::error::{Error, Result};
use crate::run::{CaptureConfig, DeviceChoice, Mode, OnOom, ParallelConfig, TargetDType};

/// Everything that a run needs to know. It is saved as JSON beside every checkpoint; keys are those of the recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RunPlan {
    /// Name of the run.
    pub name: String,
    /// The run's folder.
    pub run_dir: PathBuf,
    /// Where hidden states come from.
    pub mode: Mode,
    /// Where the run computes; `auto` until the machine was looked at.
    pub device: DeviceChoice,
    /// Seed of everything drawn.
    pub seed: u64,
    /// CPU threads; 0: all.
    pub threads: usize,
    /// The target.
    pub target: TargetPlan,
    /// The conversations.
    pub data: DataPlan,
    /// What captured states are rounded to.
    pub capture: CaptureConfig,
    /// The feature store; unused in mode `online`.
    pub store: StorePlan,
    /// The draft method.
    pub method: MethodConfig,
    /// The training.
    pub train: TrainPlan,
    /// Many ranks, as written: how many there are is known once they were started. Plans from before there were several
    /// have a single one.
    #[serde(default)]
    pub parallel: ParallelConfig,
    /// The measurement of the acceptance length.
    pub eval: EvalPlan,
    /// The exported folder.
    pub export: ExportPlan,
}

/// The target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TargetPlan {
    /// Its folder.
    pub path: PathBuf,
    /// As written: `auto` is decided when the target is opened, by its size and the machine's memory.
    pub dtype: TargetDType,
}

/// The conversations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DataPlan {
    /// Files, folders and patterns, in order.
    pub conversations: Vec<Source>,
    /// What the rows are; `None`: the first row of each file decides.
    pub format: Option<RowFormat>,
    /// Where question and answer stand.
    #[serde(default)]
    pub columns: Option<Columns>,
    /// The chat template.
    pub template: TemplateOptions,
    /// Whose loss masks to make.
    #[serde(default)]
    pub mask_compat: MaskCompat,
    /// Tokens of a row after this many are cut off.
    pub max_length: usize,
    /// Rows with fewer supervised tokens are left out.
    pub min_supervised: usize,
    /// Supervise the last assistant turn alone.
    pub last_turn_only: bool,
    /// Make a row of each assistant turn.
    #[serde(default)]
    pub row_per_turn: bool,
    /// Leave out rows that are equal to an earlier one.
    #[serde(default)]
    pub deduplicate: bool,
    /// What to do about a row that cannot be used.
    pub on_error: OnError,
    /// Read at most this many rows.
    pub max_rows: Option<u64>,
    /// Share of the rows held out.
    pub eval_fraction: f64,
    /// Folder of prepared sets.
    pub cache_dir: PathBuf,
}

/// The feature store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct StorePlan {
    /// Its folder.
    pub path: PathBuf,
    /// How bf16 states are written.
    pub encoding: Encoding,
    /// Size at which a file is closed, in bytes.
    pub shard_bytes: u64,
}

/// The training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrainPlan {
    /// How long.
    #[serde(flatten)]
    pub length: Length,
    /// Tokens of a micro-batch, at most.
    pub tokens_per_batch: usize,
    /// Micro-batches of one optimizer step.
    pub accumulation: usize,
    /// What happens where a micro-batch does not fit into device memory.
    pub on_oom: OnOom,
    /// Steps between two lines of the log.
    pub log_every: u64,
    /// Steps between two evaluations; `None`: only at the end.
    pub eval_every: Option<u64>,
    /// Steps between two checkpoints; `None`: only at the end and when interrupted.
    pub save_every: Option<u64>,
    /// Checkpoints kept besides the best one.
    pub keep: usize,
    /// Continue from the newest checkpoint if there is one.
    pub auto_resume: bool,
    /// Draft whose weights the training starts from.
    pub warm_start: Option<PathBuf>,
    /// The optimizer.
    pub optimizer: AdamWConfig,
    /// The learning rate over the steps.
    pub schedule: ScheduleConfig,
}

/// How long a run trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Length {
    /// Passes over the rows.
    Epochs(u64),
    /// Optimizer steps.
    MaxSteps(u64),
}

/// The measurement of the acceptance length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct EvalPlan {
    /// Prompts file; `None`: the prompts of the held-out rows.
    pub prompts: Option<PathBuf>,
    /// Prompts decoded at the end, at most.
    pub max_prompts: usize,
    /// Prompts decoded by each evaluation during training.
    pub training_prompts: usize,
    /// Tokens decoded for each prompt.
    pub max_new_tokens: usize,
    /// Tokens the draft proposes one after the other.
    pub draft_steps: usize,
    /// 1: a chain; more: a tree.
    pub topk: usize,
    /// Tokens verified at once, the last accepted one included.
    pub draft_tokens: usize,
    /// 0: greedy.
    pub temperature: f64,
}

/// The exported folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ExportPlan {
    /// The folder.
    pub path: PathBuf,
    /// Also write the target's embeddings.
    pub embeddings: bool,
}

impl RunPlan {
    /// The settings of `specforge prepare`.
    pub fn prepare_config(&self) -> PrepareConfig {
        let DataPlan {
            conversations,
            format,
            columns,
            template,
            mask_compat,
            max_length,
            min_supervised,
            last_turn_only,
            row_per_turn,
            deduplicate,
            on_error,
            max_rows,
            eval_fraction: _,
            cache_dir,
        } = self.data.clone();
        PrepareConfig {
            inputs: conversations,
            seed: self.seed,
            deduplicate,
            target: self.target.path.clone(),
            template,
            format,
            columns,
            mask_compat,
            max_length,
            min_supervised,
            last_turn_only,
            row_per_turn,
            max_rows,
            on_error,
            cache: cache_dir,
        }
    }

    /// The plan as the text of a JSON file.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("a plan is plain data with text keys");
        text.push('\n');
        text
    }

    /// Reads the plan that was saved at `path`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs_err::read(path)?;
        serde_json::from_slice(&text).map_err(|source| Error::Plan { path: path.to_owned(), source })
    }
}
