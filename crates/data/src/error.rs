//! Everything that can go wrong between a conversations file and a prepared set.

use std::path::PathBuf;

use crate::report::{DropReason, Report};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, and what the user can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// One row of an input file is unusable and the setting is to stop at the first one.
    #[error("{path}:{line}: {reason}: {message}; correct the row, or, for training data, leave such rows out with data.on-error = \"skip\"",
            path = path.display())]
    Row {
        /// The input file.
        path: PathBuf,
        /// Line in that file, from 1 (for a JSON array: the line where the element starts; for Parquet: the row).
        line: u64,
        /// The class of the problem.
        reason: DropReason,
        /// What exactly was wrong.
        message: String,
    },

    /// An input file holds no row.
    #[error("{path} holds no row; expected one JSON object per line, or one JSON array of objects",
            path = path.display())]
    EmptyInput {
        /// The input file.
        path: PathBuf,
    },

    /// An input file is no sequence of JSON values at all.
    #[error("{path}:{line}: {message}", path = path.display())]
    Syntax {
        /// The input file.
        path: PathBuf,
        /// Line in that file, from 1.
        line: u64,
        /// What was found.
        message: String,
    },

    /// An input file is something else than rows of JSON or Parquet, or its end is missing.
    #[error("{path}: {message}", path = path.display())]
    Unreadable {
        /// The input file.
        path: PathBuf,
        /// What it is, and what to do.
        message: String,
    },

    /// Not one row of a file shows which kind of rows it holds.
    #[error("{path}: cannot tell the format: {message}; expected rows with `conversations` or `messages`, a \
             question and its answer in columns (data.columns names them), `text`, or `input_ids` with `loss_mask`", path = path.display())]
    UnknownFormat {
        /// The input file.
        path: PathBuf,
        /// What the first row looks like.
        message: String,
    },

    /// Every row was dropped.
    #[error("no row of {rows} is left after filtering: {}", summary(report))]
    NothingKept {
        /// Rows read.
        rows: u64,
        /// Counts by reason, with examples.
        report: Box<Report>,
    },

    /// A file of the target folder is missing or does not have the expected content.
    #[error("{path}: {message}", path = path.display())]
    Target {
        /// The file.
        path: PathBuf,
        /// Expected, got, and what to do.
        message: String,
    },

    /// A chat template could not be read or compiled.
    #[error("chat template of {origin}: {message}")]
    Template {
        /// The file or name the template comes from.
        origin: String,
        /// What the template engine says.
        message: String,
    },

    /// The recipe names a template that is not in the table.
    #[error("no built-in chat template is called `{name}`; known: {known}")]
    UnknownTemplate {
        /// The name asked for.
        name: String,
        /// All names, separated by commas.
        known: String,
    },

    /// The tokenizer refused an input that it should accept.
    #[error("tokenizer {path}: {message}", path = path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What the tokenizer says.
        message: String,
    },

    /// A setting is out of its range.
    #[error("{name} is {got}, expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// The range.
        expected: &'static str,
        /// The value given.
        got: String,
    },

    /// A prepared set on disk is damaged or was written by something else.
    #[error("prepared set {path}: {message}; delete the folder {folder} and prepare again",
            path = path.display(), folder = path.parent().unwrap_or(path).display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Expected and got.
        message: String,
    },

    /// The draft vocabulary does not fit into the target's.
    #[error(
        "draft vocabulary of {draft} tokens is larger than the target's vocabulary of {target}; \
         lower draft-vocab-size"
    )]
    DraftVocabularyTooLarge {
        /// Size of the draft vocabulary.
        draft: usize,
        /// Size of the target's vocabulary.
        target: usize,
    },

    /// The draft vocabulary has more entries than different tokens were seen in supervised positions.
    #[error(
        "draft vocabulary of {draft} tokens, but only {seen} different tokens are supervised in the data; \
             lower draft-vocab-size to that, or add data"
    )]
    DraftVocabularyUnseen {
        /// Size of the draft vocabulary.
        draft: usize,
        /// Different tokens seen.
        seen: usize,
    },

    /// A token id is not in the target's vocabulary.
    #[error("token id {id} of row {row} is outside the target's vocabulary of {vocabulary} ids")]
    OutsideVocabulary {
        /// The id.
        id: u32,
        /// The row, from 0.
        row: usize,
        /// Size of the target's vocabulary.
        vocabulary: usize,
    },

    /// A vocabulary map read from a file contradicts itself.
    #[error("vocabulary map: {message}")]
    VocabMap {
        /// Expected and got.
        message: String,
    },
}

fn summary(report: &Report) -> String {
    let mut parts: Vec<String> =
        report.dropped.iter().map(|(reason, count)| format!("{count} x {reason}")).collect();
    if let Some(example) = report.examples.first() {
        parts.push(format!("first: {}:{}: {}", example.path.display(), example.line, example.message));
    }
    parts.extend(report.warnings.iter().map(ToString::to_string));
    parts.join(", ")
}
