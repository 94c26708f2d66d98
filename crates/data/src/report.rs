//! What happened to the rows: counts of everything kept and dropped, with reasons, and warnings as data.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Counts over a whole preparation. Stored in the manifest, so that a cached set tells the same story.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Rows read from the input files.
    pub rows_read: u64,
    /// Rows in the prepared set.
    pub rows_kept: u64,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Rows kept of which the tail was cut off at `max_length`.
    pub truncated: u64,
    /// Rows of which messages were left out because the roles were out of order.
    pub conversations_cut: u64,
    /// Rows kept in which the assistant answers with nothing.
    pub empty_answers: u64,
    /// Rows kept in which the template left out reasoning of the assistant that could have been supervised.
    pub reasoning_left_out: u64,
    /// Rows more than were read, because each assistant turn has a row of its own.
    pub turns_apart: u64,
    /// Rows read but not used, because the weight of their source left them out.
    pub not_drawn: u64,
    /// Copies among the kept rows, because of a weight above 1.
    pub repeated: u64,
    /// Tokens in the kept rows.
    pub tokens: u64,
    /// Supervised tokens in the kept rows.
    pub supervised_tokens: u64,
    /// Supervised tokens that end a turn (the tokenizer's end-of-sequence ids).
    pub supervised_end_tokens: u64,
    /// Where the supervised spans of the rows came from (rows kept).
    pub spans: BTreeMap<SpanSource, u64>,
    /// The first dropped rows, at most [`Report::EXAMPLES`].
    pub examples: Vec<Dropped>,
    /// What the user should look at before training on this.
    pub warnings: Vec<Warning>,
}

/// Why a row is not in the prepared set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DropReason {
    /// No JSON, wrong types, missing keys.
    Malformed,
    /// The chat template raised an error or exceeded its budget.
    Template,
    /// The assistant turns could not be found in the rendered text.
    SpansNotFound,
    /// A token id beyond the target's vocabulary.
    OutsideVocabulary,
    /// The tokenizer failed.
    Tokenizer,
    /// No user turn, or nothing left after the role rules.
    NoUsableTurn,
    /// No supervised token before `max_length`.
    NothingSupervised,
    /// Some, but fewer supervised tokens than the minimum.
    TooFewSupervised,
    /// The same tokens and mask as an earlier row.
    Duplicate,
}

/// How the supervised part of a row was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpanSource {
    /// `{% generation %}` blocks of the chat template.
    GenerationBlocks,
    /// Differences between renderings with and without a turn.
    Incremental,
    /// Header and end-of-turn strings learned from the target's template by rendering a probe.
    LearnedHeader,
    /// Header and end-of-turn strings of a named template.
    NamedHeader,
    /// The row brought its own loss mask.
    Given,
}

/// One dropped row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Input file.
    pub path: PathBuf,
    /// Line in it, from 1.
    pub line: u64,
    /// Class of the problem.
    pub reason: DropReason,
    /// The problem.
    pub message: String,
}

/// Something that is no error, but rarely wanted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Warning {
    /// Under one percent of the tokens are supervised.
    AlmostNothingSupervised {
        /// Supervised tokens / tokens.
        share: f64,
    },
    /// Over ninety-nine percent of the tokens are supervised: the mask probably covers the prompts too.
    AlmostEverythingSupervised {
        /// Supervised tokens / tokens.
        share: f64,
    },
    /// The assistant header occurs in none of the rows: the wrong template was named.
    HeaderNeverFound {
        /// The header looked for.
        header: String,
    },
    /// The assistant answers with nothing, and the draft learns to end there at once.
    EmptyAnswers {
        /// Rows with such a turn.
        rows: u64,
    },
    /// The template writes answers without the reasoning that the rows have.
    ReasoningLeftOut {
        /// Such rows.
        rows: u64,
    },
    /// No end-of-turn token is supervised: the draft will not learn when an answer ends.
    EndOfTurnNotSupervised,
}

impl Report {
    /// Dropped rows kept as examples.
    pub const EXAMPLES: usize = 20;

    /// Rows dropped for any reason.
    pub fn rows_dropped(&self) -> u64 {
        self.dropped.values().sum()
    }

    /// Supervised tokens / tokens; 0 for an empty set.
    pub fn supervised_share(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.supervised_tokens as f64 / self.tokens as f64 }
    }

    pub(crate) fn drop_row(&mut self, dropped: Dropped) {
        *self.dropped.entry(dropped.reason).or_default() += 1;
        // Duplicates would leave no place for what is worth a look.
        if self.examples.len() < Self::EXAMPLES && dropped.reason != DropReason::Duplicate {
            self.examples.push(dropped);
        }
    }

    /// Fills in the warnings; `header` is the assistant header that was looked for, if there was one, and
    /// `has_end_tokens` says whether the tokenizer declares any end-of-sequence token.
    pub(crate) fn warn(&mut self, header: Option<&str>, has_end_tokens: bool) {
        let share = self.supervised_share();
        let mut warnings = Vec::new();
        if self.rows_kept > 0 && share < 0.01 {
            warnings.push(Warning::AlmostNothingSupervised { share });
        }
        if share > 0.99 {
            warnings.push(Warning::AlmostEverythingSupervised { share });
        }
        // A row without any header has nothing to supervise, so it is dropped for that.
        let unsupervised = self.dropped.contains_key(&DropReason::NothingSupervised);
        if let Some(header) = header.filter(|_| unsupervised && self.rows_kept == 0) {
            warnings.push(Warning::HeaderNeverFound { header: header.to_owned() });
        }
        if self.supervised_tokens > 0 && self.supervised_end_tokens == 0 && has_end_tokens {
            warnings.push(Warning::EndOfTurnNotSupervised);
        }
        if self.empty_answers > 0 {
            warnings.push(Warning::EmptyAnswers { rows: self.empty_answers });
        }
        if self.reasoning_left_out > 0 {
            warnings.push(Warning::ReasoningLeftOut { rows: self.reasoning_left_out });
        }
        self.warnings = warnings;
    }
}

impl DropReason {
    /// Whether the row itself is at fault (then `on-error` decides); the others are filters that the
    /// settings ask for.
    pub fn is_error(self) -> bool {
        !matches!(
            self,
            Self::NoUsableTurn | Self::NothingSupervised | Self::TooFewSupervised | Self::Duplicate
        )
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "malformed row",
            Self::Template => "the chat template failed",
            Self::SpansNotFound => "assistant turns not found",
            Self::OutsideVocabulary => "token outside the vocabulary",
            Self::Tokenizer => "the tokenizer failed",
            Self::NoUsableTurn => "no usable turn",
            Self::NothingSupervised => "no supervised token",
            Self::TooFewSupervised => "too few supervised tokens",
            Self::Duplicate => "the same as an earlier row",
        })
    }
}

impl fmt::Display for SpanSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GenerationBlocks => "generation blocks of the template",
            Self::Incremental => "turn-by-turn rendering",
            Self::LearnedHeader => "header learned from the template",
            Self::NamedHeader => "header of the named template",
            Self::Given => "loss mask of the row",
        })
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlmostNothingSupervised { share } => {
                write!(f, "only {:.2} % of the tokens are supervised", share * 100.0)
            }
            Self::AlmostEverythingSupervised { share } => write!(
                f,
                "{:.2} % of the tokens are supervised: prompts seem to be supervised too",
                share * 100.0
            ),
            Self::HeaderNeverFound { header } => {
                write!(f, "the assistant header {header:?} leads to a supervised token in no row")
            }
            Self::EmptyAnswers { rows } => {
                write!(
                    f,
                    "rows with an assistant turn that says nothing: {rows}; the draft learns to end there at once"
                )
            }
            Self::ReasoningLeftOut { rows } => write!(
                f,
                "rows of which the template left reasoning out: {rows}; templates of reasoning models drop it from \
                 earlier turns, and data.row-per-turn = true makes a row of each turn, as it was generated"
            ),
            Self::EndOfTurnNotSupervised => f.write_str(
                "no end-of-turn token is supervised: the draft will not learn when an answer ends",
            ),
        }
    }
}
