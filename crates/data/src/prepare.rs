//! Conversations files to a prepared set: in parallel, in order, in bounded memory, and only once per content.

mod run;
mod work;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::columns::{Columns, names};
use crate::conversation::RowError;
use crate::encode::{RowFormat, parse_object};
use crate::error::{Error, Result};
use crate::read::Records;
use crate::set::{FORMAT_VERSION, Prepared};
use crate::source::Source;
use crate::template::{ChatTemplate, TemplateOptions};
use crate::tokenizer::Tokenizer;

/// What to prepare, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct PrepareConfig {
    /// Where the conversations come from, in order.
    pub inputs: Vec<Source>,
    /// Seed of what the weights of the inputs leave to chance.
    pub seed: u64,
    /// Leave out rows that are equal to an earlier one.
    pub deduplicate: bool,
    /// Target folder, for tokenizer and chat template.
    pub target: PathBuf,
    /// The chat template.
    pub template: TemplateOptions,
    /// What the rows are; without it the first row of each file decides for that file.
    pub format: Option<RowFormat>,
    /// Where question and answer stand, for rows that have them in columns of their own.
    pub columns: Option<Columns>,
    /// Whose loss masks to make.
    pub mask_compat: MaskCompat,
    /// Tokens after this many are cut off.
    pub max_length: usize,
    /// Rows with fewer supervised tokens than this are dropped; at least 1.
    pub min_supervised: usize,
    /// Supervise the last assistant turn alone.
    pub last_turn_only: bool,
    /// Make a row of each assistant turn.
    pub row_per_turn: bool,
    /// Read at most this many rows.
    pub max_rows: Option<u64>,
    /// What to do about rows that cannot be used.
    pub on_error: OnError,
    /// Folder of prepared sets.
    pub cache: PathBuf,
}

/// What to do about a row that cannot be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// Stop with an error that names file, line and reason.
    #[default]
    Stop,
    /// Leave the row out and count it.
    Skip,
}

/// Whose loss masks to make.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MaskCompat {
    /// Our own.
    #[default]
    Off,
    /// SpecForge's, to the token and with its faults; for named templates.
    Specforge,
}

impl PrepareConfig {
    /// The usual settings for these files and target.
    pub fn new(inputs: Vec<PathBuf>, target: PathBuf, cache: PathBuf) -> Self {
        Self {
            inputs: inputs.into_iter().map(Source::from).collect(),
            seed: 0,
            deduplicate: false,
            target,
            template: TemplateOptions::default(),
            format: None,
            columns: None,
            mask_compat: MaskCompat::Off,
            max_length: 2048,
            min_supervised: 1,
            last_turn_only: false,
            row_per_turn: false,
            max_rows: None,
            on_error: OnError::Stop,
            cache,
        }
    }
}

/// Prepares the set, or opens it if it has been prepared before from the same bytes with the same settings.
///
/// `progress` gets the bytes of input done and their total.
pub fn prepare(config: &PrepareConfig, progress: &dyn Fn(u64, u64)) -> Result<Prepared> {
    check(config)?;
    let tokenizer = Tokenizer::open(&config.target)?;
    let inputs = inputs(config)?;
    // Rows of token ids need no template, so a target without one will do for them.
    let template = inputs.iter().any(|input| input.format != RowFormat::Tokens);
    let template = template.then(|| open_template(config, &tokenizer)).transpose()?;
    let settings = settings(config, &inputs);
    let key = key(&inputs, &tokenizer, template.as_ref(), &settings)?;
    let folder = config.cache.join(&key);
    if !folder.exists() {
        let run = run::Run {
            config,
            tokenizer: &tokenizer,
            template: template.as_ref(),
            inputs: &inputs,
            progress,
        };
        run.write(&folder, &key, settings)?;
    }
    Prepared::open(&folder)
}

fn open_template(config: &PrepareConfig, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    let template = ChatTemplate::open(&config.target, tokenizer.special(), &config.template)?;
    match config.mask_compat {
        MaskCompat::Off => Ok(template),
        MaskCompat::Specforge => template.with_specforge_masks(),
    }
}

fn check(config: &PrepareConfig) -> Result<()> {
    let setting =
        |name, expected, got: &dyn ToString| Err(Error::Setting { name, expected, got: got.to_string() });
    let mut weights = config.inputs.iter().map(|source| source.weight);
    if let Some(weight) = weights.find(|weight| !(0.0..=1000.0).contains(weight)) {
        return setting("weight", "from 0 to 1000", &weight);
    }
    match config {
        PrepareConfig { inputs, .. } if inputs.is_empty() => setting("inputs", "at least one file", &"empty"),
        PrepareConfig { max_length, .. } if !(2..=u32::MAX as usize).contains(max_length) => {
            setting("max_length", "at least 2 tokens", max_length)
        }
        _ => Ok(()),
    }
}

/// A file to read.
#[derive(Debug)]
struct Input {
    path: PathBuf,
    weight: f64,
    format: RowFormat,
}

/// The files of all sources.
fn inputs(config: &PrepareConfig) -> Result<Vec<Input>> {
    let mut inputs = Vec::new();
    for source in &config.inputs {
        for path in source.files()? {
            // Columns that are named leave nothing to find out.
            let given = config.format.or(config.columns.as_ref().map(|_| RowFormat::Instructions));
            let format = given.map_or_else(|| detect(&path, config.on_error), Ok)?;
            inputs.push(Input { path, weight: source.weight, format });
        }
    }
    Ok(inputs)
}

/// The first row that shows its format decides. A row that shows none ends the search unless such rows are skipped.
fn detect(path: &Path, on_error: OnError) -> Result<RowFormat> {
    let mut first = None;
    for record in Records::open(path, None)? {
        let record = record?;
        let problem = match record.row.and_then(|bytes| parse_object(&bytes)) {
            Ok(row) => {
                if let Some(format) = RowFormat::of(&row) {
                    return Ok(format);
                }
                let message = format!("line {} has {}", record.line, names(&row));
                Error::UnknownFormat { path: path.to_path_buf(), message }
            }
            Err(error) => row_error(path, record.line, error),
        };
        if on_error == OnError::Stop {
            return Err(problem);
        }
        first.get_or_insert(problem);
    }
    Err(first.unwrap_or_else(|| Error::EmptyInput { path: path.to_path_buf() }))
}

/// All that decides what a set contains, apart from the inputs, the tokenizer and the template.
fn settings(config: &PrepareConfig, inputs: &[Input]) -> serde_json::Value {
    let drawn = inputs.iter().any(|input| input.weight.fract() != 0.0);
    serde_json::json!({
        "formats": inputs.iter().map(|input| input.format).collect::<Vec<_>>(),
        "weights": inputs.iter().map(|input| input.weight).collect::<Vec<_>>(),
        // Where nothing is drawn, every seed gives the same set.
        "seed": drawn.then_some(config.seed),
        "deduplicate": config.deduplicate,
        "max_length": config.max_length,
        "min_supervised": config.min_supervised,
        "last_turn_only": config.last_turn_only,
        "row_per_turn": config.row_per_turn,
        "columns": config.columns,
        "mask_compat": config.mask_compat,
        "max_rows": config.max_rows,
        // With the same bytes, `stop` gives the same set as `skip` or none; `skip` must not open the way for it.
        "on_error": config.on_error,
        "template": config.template.name,
    })
}

fn key(
    inputs: &[Input],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    settings: &serde_json::Value,
) -> Result<String> {
    let mut hashes = Vec::new();
    for Input { path, .. } in inputs {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(fs_err::File::open(path)?)?;
        hashes.push(hasher.finalize().to_hex().to_string());
    }
    let parts = serde_json::json!({
        "format_version": FORMAT_VERSION,
        "inputs": hashes,
        "tokenizer": tokenizer.hash(),
        "template": template.map(ChatTemplate::hash),
        "vocab_size": tokenizer.vocab_size(),
        "settings": settings,
    });
    Ok(blake3::hash(parts.to_string().as_bytes()).to_hex()[..32].to_owned())
}

fn row_error(path: &Path, line: u64, error: RowError) -> Error {
    Error::Row { path: path.to_path_buf(), line, reason: error.reason, message: error.message }
}
