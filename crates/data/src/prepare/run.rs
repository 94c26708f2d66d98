//! One preparation at work: a thread reads ahead, all encode, rows are written in order as they come. What is in memory
//! is three chunks of rows, and 16 bytes per row where duplicates are looked for.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use rayon::prelude::*;

use super::work::{Work, remove_stale};
use super::{Input, OnError, PrepareConfig, row_error};
use crate::conversation::RowError;
use crate::encode::{EncodeOptions, EncodedRow, EncodedRows, Encoder};
use crate::error::{Error, Result};
use crate::read::{Record, Records};
use crate::report::{DropReason, Dropped, Report};
use crate::set::{FORMAT_VERSION, FileSum, Manifest, SetWriter};
use crate::source::Source;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Rows encoded at a time: enough to keep all threads busy, little enough to stay in memory.
const CHUNK_ROWS: usize = 2048;
/// Bytes of rows at a time.
const CHUNK_BYTES: usize = 32 << 20;

pub(super) struct Run<'a> {
    pub(super) config: &'a PrepareConfig,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) template: Option<&'a ChatTemplate>,
    pub(super) inputs: &'a [Input],
    pub(super) progress: &'a dyn Fn(u64, u64),
}

/// What has come out so far.
struct Output {
    writer: SetWriter,
    report: Report,
    /// Sums of the rows kept, if duplicates are looked for.
    seen: BTreeSet<[u8; 16]>,
}

/// Rows read together, and how far into the file that is.
struct Chunk {
    records: Vec<Record>,
    done: u64,
}

/// A file of the inputs, at work.
struct Reading<'a> {
    input: &'a Input,
    index: usize,
    /// Rows done already.
    skip: u64,
    /// Bytes of the files before, of this one, and of all.
    before: u64,
    size: u64,
    total: u64,
}

impl Run<'_> {
    pub(super) fn write(&self, folder: &Path, key: &str, settings: serde_json::Value) -> Result<()> {
        let Some(mut work) = Work::take(&self.config.cache, key, folder, self.progress)? else {
            return Ok(());
        };
        remove_stale(&self.config.cache);
        let written = self.write_to(&mut work, folder, key, settings);
        // The first error is the one to report, and the set is there.
        let _ = work.remove();
        written
    }

    fn write_to(&self, work: &mut Work, folder: &Path, key: &str, settings: serde_json::Value) -> Result<()> {
        let (writer, done) = work.open()?;
        let mut output = Output { writer, report: Report::default(), seen: BTreeSet::new() };
        if let Some(done) = &done {
            output.report = done.report.clone();
            if self.config.deduplicate {
                work.rows(done, |ids, mask| {
                    output.seen.insert(sum(ids, mask));
                })?;
            }
        }
        let position = done.map_or((0, 0), |done| (done.input, done.rows));
        self.encode_all(work, position, &mut output)?;
        let Output { writer, report, .. } = output;
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

    /// Encodes all inputs from a position on: the number of the file, and how many of its rows are done.
    fn encode_all(&self, work: &mut Work, position: (usize, u64), output: &mut Output) -> Result<()> {
        let sizes: Vec<u64> = self
            .inputs
            .iter()
            .map(|input| Ok(fs_err::metadata(&input.path)?.len()))
            .collect::<Result<_>>()?;
        let total = sizes.iter().sum();
        let mut before = 0;
        for (index, (input, size)) in self.inputs.iter().zip(sizes).enumerate() {
            let skip = if index == position.0 { position.1 } else { 0 };
            if index >= position.0 {
                self.encode_file(&Reading { input, index, skip, before, size, total }, work, output)?;
            }
            before += size;
        }
        let report = &mut output.report;
        let header = self.template.and_then(ChatTemplate::header);
        report.warn(header, !self.tokenizer.special().eos_ids.is_empty());
        if report.rows_kept == 0 {
            return Err(Error::NothingKept { rows: report.rows_read, report: Box::new(report.clone()) });
        }
        Ok(())
    }

    fn encode_file(&self, reading: &Reading<'_>, work: &mut Work, output: &mut Output) -> Result<()> {
        let &Reading { input, index, skip, before, size, total } = reading;
        let limit =
            self.config.max_rows.map_or(u64::MAX, |rows| rows.saturating_sub(output.report.rows_read));
        let (encoder, seed) = (self.encoder(), self.config.seed);
        let mut rows_done = skip;
        // One chunk waits while the next one is read and the one before is encoded.
        let (sender, chunks) = sync_channel(1);
        thread::scope(|scope| {
            scope.spawn(move || read_ahead(&input.path, skip, limit, &sender));
            for chunk in chunks {
                let Chunk { records, done } = chunk?;
                let rows: Vec<_> =
                    records.par_iter().map(|record| encode(record, input, &encoder, seed)).collect();
                for (record, (copies, rows)) in records.iter().zip(rows) {
                    self.take(&input.path, record.line, copies, rows, output)?;
                }
                rows_done += records.len() as u64;
                let done = before + done.min(size);
                (self.progress)(done, total);
                work.commit(&mut output.writer, &output.report, (index, rows_done), (done, total))?;
            }
            Ok::<_, Error>(())
        })?;
        if rows_done == 0 && limit > 0 {
            return Err(Error::EmptyInput { path: input.path.clone() });
        }
        Ok(())
    }

    fn encoder(&self) -> Encoder<'_> {
        let options = EncodeOptions {
            max_length: self.config.max_length,
            min_supervised: self.config.min_supervised,
            last_turn_only: self.config.last_turn_only,
            row_per_turn: self.config.row_per_turn,
        };
        let columns = self.config.columns.as_ref();
        Encoder { tokenizer: self.tokenizer, template: self.template, columns, options }
    }

    /// Writes and counts what became of a row of an input; `None` if it was not drawn.
    fn take(
        &self,
        path: &Path,
        line: u64,
        copies: u64,
        rows: Option<EncodedRows>,
        output: &mut Output,
    ) -> Result<()> {
        output.report.rows_read += 1;
        let Some(rows) = rows else {
            output.report.not_drawn += 1;
            return Ok(());
        };
        output.report.turns_apart += rows.len() as u64 - 1;
        for row in rows {
            self.take_row(path, line, copies, row, output)?;
        }
        Ok(())
    }

    fn take_row(
        &self,
        path: &Path,
        line: u64,
        copies: u64,
        row: Result<EncodedRow, RowError>,
        output: &mut Output,
    ) -> Result<()> {
        let Output { writer, report, seen } = output;
        let row = row.and_then(|row| {
            let sum = || sum(bytemuck::cast_slice(&row.ids), &row.loss_mask);
            let again = self.config.deduplicate && !seen.insert(sum());
            if again { Err(duplicate()) } else { Ok(row) }
        });
        match row {
            Ok(row) => {
                for _ in 0..copies {
                    writer.push(&row)?;
                    self.count(&row, report);
                }
                report.repeated += copies - 1;
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
        report.empty_answers += u64::from(row.silent);
        report.reasoning_left_out += u64::from(row.unreasoned);
        report.tokens += row.ids.len() as u64;
        report.supervised_tokens += supervised().count() as u64;
        report.supervised_end_tokens +=
            supervised().filter(|&id| self.tokenizer.special().is_eos(id)).count() as u64;
        *report.spans.entry(row.source).or_default() += 1;
    }
}

/// The row, and how many times it is used. One that is not used is not looked at any further.
fn encode(record: &Record, input: &Input, encoder: &Encoder<'_>, seed: u64) -> (u64, Option<EncodedRows>) {
    let bytes = match &record.row {
        Ok(bytes) => bytes,
        Err(error) => return (1, Some(vec![Err(error.clone())])),
    };
    let copies = Source::copies(input.weight, seed, bytes);
    (copies, (copies > 0).then(|| encoder.encode(bytes, input.format)))
}

/// Reads at most `limit` rows after the first `skip`. A receiver that is gone has met an error of its own.
fn read_ahead(path: &Path, skip: u64, limit: u64, chunks: &SyncSender<Result<Chunk>>) {
    let read = || -> Result<()> {
        let mut records = Records::open(path, None)?;
        for _ in 0..skip {
            records.next().transpose()?;
        }
        let mut left = limit;
        loop {
            let chunk = read_chunk(&mut records, left)?;
            left -= chunk.len() as u64;
            let (empty, done) = (chunk.is_empty(), records.bytes_read());
            if empty || chunks.send(Ok(Chunk { records: chunk, done })).is_err() {
                return Ok(());
            }
        }
    };
    if let Err(error) = read() {
        let _ = chunks.send(Err(error));
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

/// What makes two rows the same to the training: ids and mask.
fn sum(ids: &[u8], mask: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(ids).update(mask);
    let mut sum = [0; 16];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    sum
}

fn duplicate() -> RowError {
    RowError { reason: DropReason::Duplicate, message: "the same tokens as an earlier row".to_owned() }
}

fn content_hash(files: &[FileSum]) -> String {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(file.blake3.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}
