//! Conversations files to a prepared set: in parallel, in order, in bounded memory, and only once per content.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::conversation::RowError;
use crate::encode::{EncodeOptions, EncodedRow, Encoder, RowFormat, parse_object};
use crate::error::{Error, Result};
use crate::read::{Record, Records};
use crate::report::{Dropped, Report};
use crate::set::{FORMAT_VERSION, Manifest, Prepared, SetWriter};
use crate::template::{ChatTemplate, TemplateOptions};
use crate::tokenizer::Tokenizer;

/// What to prepare, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrepareConfig {
    /// Conversations files, in order.
    pub inputs: Vec<PathBuf>,
    /// Target folder, for tokenizer and chat template.
    pub target: PathBuf,
    /// The chat template.
    pub template: TemplateOptions,
    /// What the rows are; without it the first row of each file decides for that file.
    pub format: Option<RowFormat>,
    /// Tokens after this many are cut off.
    pub max_length: usize,
    /// Rows with fewer supervised tokens than this are dropped; at least 1.
    pub min_supervised: usize,
    /// Supervise the last assistant turn alone.
    pub last_turn_only: bool,
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

/// Rows encoded at a time: enough to keep all threads busy, little enough to stay in memory.
const CHUNK_ROWS: usize = 2048;
/// Bytes of rows at a time.
const CHUNK_BYTES: usize = 32 << 20;

impl PrepareConfig {
    /// The usual settings for these files and target.
    pub fn new(inputs: Vec<PathBuf>, target: PathBuf, cache: PathBuf) -> Self {
        Self {
            inputs,
            target,
            template: TemplateOptions::default(),
            format: None,
            max_length: 2048,
            min_supervised: 1,
            last_turn_only: false,
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
    let formats = formats(config)?;
    // Rows of token ids need no template, so a target without one will do for them.
    let template = formats.iter().any(|format| *format != RowFormat::Tokens);
    let template =
        template.then(|| ChatTemplate::open(&config.target, tokenizer.special(), &config.template));
    let template = template.transpose()?;
    let settings = settings(config, &formats);
    let key = key(config, &tokenizer, template.as_ref(), &settings)?;
    let folder = config.cache.join(&key);
    if !folder.exists() {
        let run =
            Run { config, tokenizer: &tokenizer, template: template.as_ref(), formats: &formats, progress };
        run.write(&folder, &key, settings)?;
    }
    Prepared::open(&folder)
}

fn check(config: &PrepareConfig) -> Result<()> {
    let setting =
        |name, expected, got: &dyn ToString| Err(Error::Setting { name, expected, got: got.to_string() });
    match config {
        PrepareConfig { inputs, .. } if inputs.is_empty() => setting("inputs", "at least one file", &"empty"),
        PrepareConfig { max_length, .. } if !(2..=u32::MAX as usize).contains(max_length) => {
            setting("max_length", "at least 2 tokens", max_length)
        }
        _ => Ok(()),
    }
}

/// The format of each file.
fn formats(config: &PrepareConfig) -> Result<Vec<RowFormat>> {
    config.inputs.iter().map(|path| config.format.map_or_else(|| detect(path, config.on_error), Ok)).collect()
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
                let keys: Vec<_> = row.keys().take(8).map(|key| format!("`{key}`")).collect();
                let message = format!("line {} has {}", record.line, keys.join(", "));
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
fn settings(config: &PrepareConfig, formats: &[RowFormat]) -> serde_json::Value {
    serde_json::json!({
        "formats": formats,
        "max_length": config.max_length,
        "min_supervised": config.min_supervised,
        "last_turn_only": config.last_turn_only,
        "max_rows": config.max_rows,
        // With the same bytes, `stop` gives the same set as `skip` or none; `skip` must not open the way for it.
        "on_error": config.on_error,
        "template": config.template.name,
    })
}

fn key(
    config: &PrepareConfig,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    settings: &serde_json::Value,
) -> Result<String> {
    let mut inputs = Vec::new();
    for path in &config.inputs {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(fs_err::File::open(path)?)?;
        inputs.push(hasher.finalize().to_hex().to_string());
    }
    let parts = serde_json::json!({
        "format_version": FORMAT_VERSION,
        "inputs": inputs,
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

/// One preparation at work.
struct Run<'a> {
    config: &'a PrepareConfig,
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    formats: &'a [RowFormat],
    progress: &'a dyn Fn(u64, u64),
}

impl Run<'_> {
    fn write(&self, folder: &Path, key: &str, settings: serde_json::Value) -> Result<()> {
        let temporary = self.config.cache.join(format!(".{key}.{}.tmp", std::process::id()));
        let written = self.write_to(&temporary, folder, key, settings);
        if written.is_err() && temporary.exists() {
            // The first error is the one to report.
            let _ = fs_err::remove_dir_all(&temporary);
        }
        written
    }

    fn write_to(
        &self,
        temporary: &Path,
        folder: &Path,
        key: &str,
        settings: serde_json::Value,
    ) -> Result<()> {
        let mut writer = SetWriter::create(temporary.to_path_buf())?;
        let report = self.encode_all(&mut writer)?;
        writer.finish(folder, |files| Manifest {
            format_version: FORMAT_VERSION,
            key: key.to_owned(),
            hash: content_hash(&files),
            rows: report.rows_kept,
            files,
            tokenizer_hash: self.tokenizer.hash().to_owned(),
            template_hash: self.template.map(|template| template.hash().to_owned()),
            vocab_size: self.tokenizer.vocab_size(),
            settings,
            report,
        })
    }

    fn encode_all(&self, writer: &mut SetWriter) -> Result<Report> {
        let sizes: Vec<u64> =
            self.config.inputs.iter().map(|path| Ok(fs_err::metadata(path)?.len())).collect::<Result<_>>()?;
        let total = sizes.iter().sum();
        let mut report = Report::default();
        let mut before = 0;
        for ((path, format), size) in self.config.inputs.iter().zip(self.formats).zip(sizes) {
            self.encode_file(path, *format, writer, &mut report, &|done| {
                (self.progress)(before + done, total);
            })?;
            before += size;
        }
        let header = self.template.and_then(ChatTemplate::header);
        report.warn(header, !self.tokenizer.special().eos_ids.is_empty());
        if report.rows_kept == 0 {
            return Err(Error::NothingKept { rows: report.rows_read, report: Box::new(report) });
        }
        Ok(report)
    }

    fn encode_file(
        &self,
        path: &Path,
        format: RowFormat,
        writer: &mut SetWriter,
        report: &mut Report,
        progress: &dyn Fn(u64),
    ) -> Result<()> {
        let options = EncodeOptions {
            max_length: self.config.max_length,
            min_supervised: self.config.min_supervised,
            last_turn_only: self.config.last_turn_only,
        };
        let encoder = Encoder { tokenizer: self.tokenizer, template: self.template, options };
        let mut records = Records::open(path, None)?;
        let rows_before = report.rows_read;
        loop {
            let left = self.config.max_rows.map_or(u64::MAX, |rows| rows.saturating_sub(report.rows_read));
            let chunk = read_chunk(&mut records, left)?;
            if chunk.is_empty() {
                break;
            }
            let encoded: Vec<_> = chunk
                .par_iter()
                .map(|record| encoder.encode(record.row.as_deref().map_err(Clone::clone)?, format))
                .collect();
            for (record, row) in chunk.iter().zip(encoded) {
                self.take(path, record.line, row, writer, report)?;
            }
            progress(records.bytes_read());
        }
        if report.rows_read == rows_before && self.config.max_rows.is_none_or(|rows| rows > report.rows_read)
        {
            return Err(Error::EmptyInput { path: path.to_path_buf() });
        }
        Ok(())
    }

    fn take(
        &self,
        path: &Path,
        line: u64,
        row: Result<EncodedRow, RowError>,
        writer: &mut SetWriter,
        report: &mut Report,
    ) -> Result<()> {
        report.rows_read += 1;
        match row {
            Ok(row) => {
                writer.push(&row)?;
                self.count(&row, report);
            }
            Err(error) if error.reason.is_error() && self.config.on_error == OnError::Stop => {
                return Err(row_error(path, line, error));
            }
            Err(RowError { reason, message }) => {
                report.drop_row(Dropped { path: path.to_path_buf(), line, reason, message });
            }
        }
        Ok(())
    }

    fn count(&self, row: &EncodedRow, report: &mut Report) {
        let supervised =
            || row.ids.iter().zip(&row.loss_mask).filter(|(_, bit)| **bit == 1).map(|(id, _)| *id);
        report.rows_kept += 1;
        report.truncated += u64::from(row.truncated);
        report.conversations_cut += u64::from(row.cut);
        report.tokens += row.ids.len() as u64;
        report.supervised_tokens += supervised().count() as u64;
        report.supervised_end_tokens +=
            supervised().filter(|&id| self.tokenizer.special().is_eos(id)).count() as u64;
        *report.spans.entry(row.source).or_default() += 1;
    }
}

/// The next rows, at most `limit`.
fn read_chunk(records: &mut Records, limit: u64) -> Result<Vec<Record>> {
    let mut chunk = Vec::new();
    let mut bytes = 0;
    while chunk.len() < CHUNK_ROWS && bytes < CHUNK_BYTES && (chunk.len() as u64) < limit {
        let Some(record) = records.next().transpose()? else { break };
        bytes += record.row.as_ref().map_or(0, Vec::len);
        chunk.push(record);
    }
    Ok(chunk)
}

fn content_hash(files: &[crate::set::FileSum]) -> String {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(file.blake3.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}
