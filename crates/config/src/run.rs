//! What the user wrote: one TOML file, the recipe. The comments here are the manual; `docs/reference/recipe.md` is made
//! from them.

mod evaluation;
mod parallel;
mod training;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use specforge_data::{Columns, MaskCompat, OnError, Source, TemplateOptions};
use specforge_methods::MethodConfig;
use specforge_store::Encoding;

pub use evaluation::{EvalConfig, ExportConfig};
pub use parallel::{Exchange, Fsdp, ParallelConfig, ReduceDType};
pub use training::{OnOom, TrainConfig};

/// A recipe. Relative paths are relative to the current directory of the command, not to the recipe file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct RunConfig {
    /// Name of the run, required: letters, digits, `.`, `_` and `-`. The run's folder is `<output-dir>/<name>`.
    pub name: Option<String>,
    /// Folder of all runs.
    pub output_dir: PathBuf,
    /// Where hidden states come from.
    pub mode: Mode,
    /// Where the run computes. What a GPU computes differs from the CPU in the last bits: a run is resumed where it ran.
    pub device: DeviceChoice,
    /// Seed of fresh weights, of the order of the rows, of the held-out split and of sampling.
    pub seed: u64,
    /// CPU threads; 0: as many as the machine has. Results do not depend on it.
    pub threads: usize,
    /// The target.
    pub target: TargetConfig,
    /// The conversations.
    pub data: DataConfig,
    /// What is recorded from the target.
    pub capture: CaptureConfig,
    /// The feature store.
    pub store: StoreConfig,
    /// The draft method, required: one table named after it, as `[method.eagle3]`.
    pub method: Option<MethodConfig>,
    /// The training.
    pub train: TrainConfig,
    /// Many ranks.
    pub parallel: ParallelConfig,
    /// The measurement of the acceptance length.
    pub eval: EvalConfig,
    /// The exported folder.
    pub export: ExportConfig,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            name: None,
            output_dir: PathBuf::from("runs"),
            mode: Mode::Online,
            device: DeviceChoice::Auto,
            seed: 42,
            threads: 0,
            target: TargetConfig::default(),
            data: DataConfig::default(),
            capture: CaptureConfig::default(),
            store: StoreConfig::default(),
            method: None,
            train: TrainConfig::default(),
            parallel: ParallelConfig::default(),
            eval: EvalConfig::default(),
            export: ExportConfig::default(),
        }
    }
}

/// Where hidden states come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The target stays in memory and computes them while the draft trains.
    Online,
    /// They are read from the feature store that `specforge capture` wrote.
    Offline,
    /// Online in the first pass, which also writes the store; read from the store afterwards.
    Cache,
}

/// Where a run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceChoice {
    /// The first NVIDIA GPU, if there is one and its driver and libraries are; the CPU otherwise.
    Auto,
    /// The CPU, in float32.
    Cpu,
    /// The first NVIDIA GPU that the driver shows (`CUDA_VISIBLE_DEVICES` chooses), in bf16; an error without one.
    Cuda,
}

/// The model that will serve: an ordinary Hugging Face folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct TargetConfig {
    /// The folder, required: `config.json`, `tokenizer.json` and safetensors. Where there is no such folder, a repository
    /// of the Hugging Face hub, `owner/name` or `owner/name@revision`, which is downloaded into its usual cache.
    pub path: Option<PathBuf>,
    /// How its weights lie in memory.
    pub dtype: TargetDType,
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self { path: None, dtype: TargetDType::Auto }
    }
}

/// How the target's weights lie in memory. The CPU computes in float32 in any case, a GPU in bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetDType {
    /// On the CPU float32 if that fits into its memory, otherwise as stored; on a GPU bf16.
    Auto,
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
    /// The matrices of linear layers in 8-bit floats (e4m3) with a scale per row, their inputs rounded the same way; the
    /// rest in bf16. On GPUs of compute capability 8.9 and newer; about 1.6 times faster, half the memory.
    Fp8,
}

/// What the draft trains on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct DataConfig {
    /// JSONL or JSON files (plain, gzip or zstd), Parquet and Arrow files, at least one; the content says which, not the
    /// name. Also folders of such files, as the datasets library saves them (without the splits for testing where there is
    /// one for training), `datasets/owner/name` on the Hugging Face hub, patterns with `*`, `?` and `**`, and
    /// `{ path = "...", weight = 0.5 }`: a weight below 1 uses that share of the rows, drawn by `seed` and content; one
    /// above 1 repeats rows.
    pub conversations: Vec<Source>,
    /// What the rows are.
    pub format: DataFormat,
    /// Where question and answer stand, for rows that have them in columns of their own. Columns of well-known datasets
    /// need not be named.
    pub columns: Option<Columns>,
    /// The chat template; without a name it is the target's own.
    pub template: TemplateOptions,
    /// Whose loss masks to make; see docs/loss-mask.md.
    pub mask_compat: MaskCompat,
    /// Tokens of a row after this many are cut off; at least 2.
    pub max_length: usize,
    /// Rows with fewer supervised tokens are left out; at least 1.
    pub min_supervised: usize,
    /// Supervise the last assistant turn alone.
    pub last_turn_only: bool,
    /// Make a row of each assistant turn, supervised alone, with what comes before it as the template renders it then. For
    /// models whose template rewrites earlier turns, as those that drop earlier reasoning.
    pub row_per_turn: bool,
    /// Leave out rows whose tokens and loss mask are those of an earlier row.
    pub deduplicate: bool,
    /// What to do about a row that cannot be used.
    pub on_error: OnError,
    /// Read at most this many rows; absent: all.
    pub max_rows: Option<u64>,
    /// Share of the rows held out for evaluation, from 0 to below 1. Equal rows are always on the same side.
    pub eval_fraction: f64,
    /// Folder of prepared sets, by content; absent: `<output-dir>/cache`.
    pub cache_dir: Option<PathBuf>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            conversations: Vec::new(),
            format: DataFormat::Auto,
            columns: None,
            template: TemplateOptions::default(),
            mask_compat: MaskCompat::Off,
            max_length: 2048,
            min_supervised: 1,
            last_turn_only: false,
            row_per_turn: false,
            deduplicate: false,
            on_error: OnError::Stop,
            max_rows: None,
            eval_fraction: 0.05,
            cache_dir: None,
        }
    }
}

/// What the rows of the conversations files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataFormat {
    /// The first row of each file decides.
    Auto,
    /// `conversations` or `messages`: messages of `role` and `content` or of `from` and `value`; or a list of texts, a
    /// question and an answer in turn.
    Conversations,
    /// A question and its answer in columns of their own: those of `data.columns`, or `instruction` and `output`,
    /// `question` and `answer`, `problem` and `solution`, `prompt` and `completion`, and the like.
    Instructions,
    /// `text`: chats that are rendered already.
    Text,
    /// `input_ids` and `loss_mask`.
    Tokens,
}

/// What is recorded from the target. The layers are the method's to say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct CaptureConfig {
    /// What captured states are rounded to, in online mode too, so that every mode trains on the same numbers.
    pub dtype: CaptureDType,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self { dtype: CaptureDType::Bf16 }
    }
}

/// What captured states are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureDType {
    /// bfloat16, what most servers feed to the draft.
    Bf16,
    /// float32: not rounded.
    F32,
}

/// The feature store of the modes `offline` and `cache`; unused in mode `online`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct StoreConfig {
    /// The store's folder; absent: `<output-dir>/<name>/features`.
    pub path: Option<PathBuf>,
    /// How bf16 states are written; states captured in float32 are always written as they are.
    pub encoding: Encoding,
    /// Size in MiB at which a file of the store is closed and the next begun.
    pub shard_mib: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { path: None, encoding: Encoding::Bf16, shard_mib: 1024 }
    }
}
