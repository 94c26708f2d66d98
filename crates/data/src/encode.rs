//! One row: JSON bytes to token ids and loss mask, or the reason why not.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::conversation::{Message, RowError, kind, malformed};
use crate::mask::{loss_mask, supervised};
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
}

/// A row ready for training.
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
}

/// What is needed to encode rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Encoder<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    /// Absent when all rows are tokens already.
    pub(crate) template: Option<&'a ChatTemplate>,
    pub(crate) options: EncodeOptions,
}

impl RowFormat {
    /// The format that the keys of a row show.
    pub(crate) fn of(row: &Map<String, Value>) -> Option<Self> {
        let has = |key: &str| row.contains_key(key);
        match () {
            () if has("input_ids") => Some(Self::Tokens),
            () if has("conversations") || has("messages") => Some(Self::Conversations),
            () if has("text") => Some(Self::Text),
            () => None,
        }
    }
}

impl Encoder<'_> {
    /// Encodes one row.
    pub(crate) fn encode(&self, bytes: &[u8], format: RowFormat) -> Result<EncodedRow, RowError> {
        let row = parse_object(bytes)?;
        let mut encoded = match format {
            RowFormat::Conversations => self.conversation(&row)?,
            RowFormat::Text => self.text(&row)?,
            RowFormat::Tokens => given(&row, self.options.last_turn_only)?,
        };
        encoded.truncated = encoded.ids.len() > self.options.max_length;
        encoded.ids.truncate(self.options.max_length);
        encoded.loss_mask.truncate(self.options.max_length);
        self.check(&encoded)?;
        Ok(encoded)
    }

    fn conversation(&self, row: &Map<String, Value>) -> Result<EncodedRow, RowError> {
        let template = self.template()?;
        let (conversation, cut) = template.conversation_row(row)?;
        let rendered = template.render_row(&conversation)?;
        let mut encoded = self.encode_text(&rendered.text, &rendered.spans, rendered.source)?;
        encoded.cut = cut;
        encoded.silent = conversation.messages.iter().any(Message::is_silent);
        Ok(encoded)
    }

    fn text(&self, row: &Map<String, Value>) -> Result<EncodedRow, RowError> {
        let text = match row.get("text") {
            Some(Value::String(text)) => text,
            Some(other) => return Err(malformed(format!("`text` is {}, expected text", kind(other)))),
            None => return Err(malformed("no `text`")),
        };
        let (spans, source) = self.template()?.find_row(text)?;
        self.encode_text(text, &spans, source)
    }

    fn encode_text(&self, text: &str, spans: &Spans, source: SpanSource) -> Result<EncodedRow, RowError> {
        let encoded = self
            .tokenizer
            .encode(text)
            .map_err(|error| RowError { reason: DropReason::Tokenizer, message: error.to_string() })?;
        let loss_mask = loss_mask(text, &encoded.offsets, spans, self.options.last_turn_only);
        Ok(EncodedRow { ids: encoded.ids, loss_mask, source, truncated: false, cut: false, silent: false })
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
    Ok(EncodedRow { ids, loss_mask, source: SpanSource::Given, truncated: false, cut: false, silent: false })
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
