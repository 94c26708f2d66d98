//! One row: JSON bytes to token ids and loss mask, or the reason why not.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::columns::{Columns, names};
use crate::conversation::{Conversation, Message, RowError, kind, malformed};
use crate::mask::supervised;
use crate::named::Spans;
use crate::report::{DropReason, SpanSource};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// What the rows of an input file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RowFormat {
    /// `conversations` or `messages`.
    Conversations,
    /// A question and its answer in columns of their own.
    Instructions,
    /// `text`: a chat that is already rendered.
    Text,
    /// `input_ids` and `loss_mask`.
    Tokens,
}

/// Settings of the encoding of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EncodeOptions {
    /// Tokens after this many are cut off.
    pub(crate) max_length: usize,
    /// Rows with fewer supervised tokens than this (after the cut) are dropped.
    pub(crate) min_supervised: usize,
    /// Supervise the last assistant turn alone.
    pub(crate) last_turn_only: bool,
    /// Make a row of each assistant turn.
    pub(crate) row_per_turn: bool,
}

/// A row ready for training.
#[expect(clippy::struct_excessive_bools, reason = "the report counts each of them")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EncodedRow {
    pub(crate) ids: Vec<u32>,
    /// 1 where supervised, as long as `ids`.
    pub(crate) loss_mask: Vec<u8>,
    pub(crate) source: SpanSource,
    pub(crate) truncated: bool,
    /// Messages were left out.
    pub(crate) cut: bool,
    /// The assistant says nothing in one of its turns.
    pub(crate) silent: bool,
    /// The template left out reasoning of the assistant that the row supervises or could have supervised.
    pub(crate) unreasoned: bool,
}

/// What became of a row: one row for the set, or as many as the assistant has turns.
pub(crate) type EncodedRows = Vec<Result<EncodedRow, RowError>>;

impl EncodedRow {
    fn new(ids: Vec<u32>, loss_mask: Vec<u8>, source: SpanSource) -> Self {
        Self { ids, loss_mask, source, truncated: false, cut: false, silent: false, unreasoned: false }
    }
}

/// What is needed to encode rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Encoder<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    /// Absent when all rows are tokens already.
    pub(crate) template: Option<&'a ChatTemplate>,
    /// Where questions and answers stand; without them by the names of known datasets.
    pub(crate) columns: Option<&'a Columns>,
    pub(crate) options: EncodeOptions,
}

impl RowFormat {
    /// The format that the keys of a row show.
    pub(crate) fn of(row: &Map<String, Value>) -> Option<Self> {
        match () {
            () if row.contains_key("input_ids") => Some(Self::Tokens),
            () if Conversation::is_in(row) => Some(Self::Conversations),
            () if Columns::of(row).is_some() => Some(Self::Instructions),
            () if row.contains_key("text") => Some(Self::Text),
            () => None,
        }
    }
}

impl Encoder<'_> {
    /// Encodes one row of an input.
    pub(crate) fn encode(&self, bytes: &[u8], format: RowFormat) -> EncodedRows {
        self.try_encode(bytes, format).unwrap_or_else(|error| vec![Err(error)])
    }

    fn try_encode(&self, bytes: &[u8], format: RowFormat) -> Result<EncodedRows, RowError> {
        let row = parse_object(bytes)?;
        let last = self.options.last_turn_only;
        Ok(match format {
            RowFormat::Conversations => self.conversation(Conversation::from_row(&row)?)?,
            RowFormat::Instructions => self.conversation(self.instruction(&row)?)?,
            RowFormat::Text => vec![self.text(&row).and_then(|row| self.finish(row))],
            RowFormat::Tokens => vec![given(&row, last).and_then(|row| self.finish(row))],
        })
    }

    fn instruction(&self, row: &Map<String, Value>) -> Result<Conversation, RowError> {
        if let Some(columns) = self.columns {
            return columns.conversation(row);
        }
        let columns = Columns::of(row).ok_or_else(|| {
            malformed(format!(
                "no columns of a question and its answer that are known here, but {}; name them with data.columns",
                names(row)
            ))
        })?;
        columns.conversation(row)
    }

    fn conversation(&self, mut conversation: Conversation) -> Result<EncodedRows, RowError> {
        let cut = self.template()?.arrange(&mut conversation)?;
        let ends = if self.options.row_per_turn { turn_ends(&conversation.messages) } else { Vec::new() };
        if ends.is_empty() {
            let last = self.options.last_turn_only;
            return Ok(vec![self.messages(&conversation, cut, last)]);
        }
        let row = |end: &usize| {
            let messages = conversation.messages[..*end].to_vec();
            self.messages(&Conversation { messages, ..conversation.clone() }, cut, true)
        };
        Ok(ends.iter().map(row).collect())
    }

    /// A row of a conversation that is in order.
    fn messages(&self, conversation: &Conversation, cut: bool, last: bool) -> Result<EncodedRow, RowError> {
        let rendered = self.template()?.render_row(conversation)?;
        let mut encoded = self.encode_text(&rendered.text, &rendered.spans, rendered.source, last)?;
        let supervised = if last { conversation.messages.len().saturating_sub(1) } else { 0 };
        let mut supervised = conversation.messages[supervised..].iter();
        encoded.cut = cut;
        encoded.silent = supervised.clone().any(Message::is_silent);
        encoded.unreasoned = supervised.any(|message| !message.reasoning_is_in(&rendered.text));
        self.finish(encoded)
    }

    /// Cuts the tail off and looks at what is left.
    fn finish(&self, mut row: EncodedRow) -> Result<EncodedRow, RowError> {
        row.truncated |= row.ids.len() > self.options.max_length;
        row.ids.truncate(self.options.max_length);
        row.loss_mask.truncate(self.options.max_length);
        self.check(&row)?;
        Ok(row)
    }

    fn text(&self, row: &Map<String, Value>) -> Result<EncodedRow, RowError> {
        let text = match row.get("text") {
            Some(Value::String(text)) => text,
            Some(other) => return Err(malformed(format!("`text` is {}, expected text", kind(other)))),
            None => return Err(malformed("no `text`")),
        };
        let (spans, source) = self.template()?.find_row(text)?;
        self.encode_text(text, &spans, source, self.options.last_turn_only)
    }

    fn encode_text(
        &self,
        text: &str,
        spans: &Spans,
        source: SpanSource,
        last: bool,
    ) -> Result<EncodedRow, RowError> {
        let failed =
            |error: crate::Error| RowError { reason: DropReason::Tokenizer, message: error.to_string() };
        let mut encoded = self.tokenizer.encode(text).map_err(failed)?;
        let truncated = encoded.ids.len() > self.options.max_length;
        encoded.ids.truncate(self.options.max_length);
        encoded.offsets.truncate(self.options.max_length);
        let mask = self.template()?.loss_mask(text, &encoded, spans, self.tokenizer, last);
        Ok(EncodedRow { truncated, ..EncodedRow::new(encoded.ids, mask.map_err(failed)?, source) })
    }

    fn check(&self, row: &EncodedRow) -> Result<(), RowError> {
        let vocabulary = self.tokenizer.vocab_size();
        if let Some(id) = row.ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(RowError {
                reason: DropReason::OutsideVocabulary,
                message: format!("token id {id}, but the target has {vocabulary} ids"),
            });
        }
        let supervised = supervised(&row.loss_mask);
        let minimum = self.options.min_supervised.max(1);
        if supervised >= minimum {
            return Ok(());
        }
        let reason =
            if supervised == 0 { DropReason::NothingSupervised } else { DropReason::TooFewSupervised };
        let message =
            format!("{supervised} supervised of {} tokens, the minimum is {minimum}", row.ids.len());
        Err(RowError { reason, message })
    }

    fn template(&self) -> Result<&ChatTemplate, RowError> {
        self.template
            .ok_or_else(|| malformed("needs a chat template, but the file was taken to hold token ids"))
    }
}

/// The number of messages up to and including each turn of the assistant. Messages of it that follow each other, as the
/// channels of harmony do, are one turn.
fn turn_ends(messages: &[Message]) -> Vec<usize> {
    let ends = (1..=messages.len()).filter(|&end| {
        messages[end - 1].is_assistant() && messages.get(end).is_none_or(|next| !next.is_assistant())
    });
    ends.collect()
}

/// A row as JSON object.
pub(crate) fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, RowError> {
    if bytes.is_empty() {
        return Err(malformed("empty line"));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(row)) => Ok(row),
        Ok(other) => Err(malformed(format!("{}, expected an object", kind(&other)))),
        Err(error) => {
            // Its own line count starts at the row, which would contradict ours.
            let text = error.to_string();
            let what = text.split(" at line ").next().unwrap_or(&text);
            Err(malformed(format!("not valid JSON: {what} (column {})", error.column())))
        }
    }
}

fn given(row: &Map<String, Value>, last_turn_only: bool) -> Result<EncodedRow, RowError> {
    let ids: Vec<u32> = integers(row, "input_ids")?;
    let mut loss_mask: Vec<u8> = integers(row, "loss_mask")?;
    if ids.len() != loss_mask.len() {
        let message = format!("{} input_ids, but {} entries of loss_mask", ids.len(), loss_mask.len());
        return Err(malformed(message));
    }
    if let Some(other) = loss_mask.iter().find(|&&bit| bit > 1) {
        return Err(malformed(format!("loss_mask has the entry {other}, expected 0 or 1")));
    }
    if last_turn_only {
        let end = loss_mask.iter().rposition(|&bit| bit == 1).unwrap_or(0);
        let before = loss_mask[..end].iter().rposition(|&bit| bit == 0).map_or(0, |last| last + 1);
        loss_mask[..before].fill(0);
    }
    Ok(EncodedRow::new(ids, loss_mask, SpanSource::Given))
}

/// A list of integers (or truth values) that fit the type.
pub(crate) fn integers<T: TryFrom<u64>>(row: &Map<String, Value>, key: &str) -> Result<Vec<T>, RowError> {
    let list = match row.get(key) {
        Some(Value::Array(list)) => list,
        Some(other) => {
            return Err(malformed(format!("`{key}` is {}, expected a list of integers", kind(other))));
        }
        None => return Err(malformed(format!("no `{key}`"))),
    };
    let integer = |(index, value): (usize, &Value)| {
        let number = value.as_u64().or_else(|| value.as_bool().map(u64::from));
        number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| {
            malformed(format!("entry {index} of `{key}` is {value}, expected an integer from 0 in range"))
        })
    };
    list.iter().enumerate().map(integer).collect()
}
