//! Prompts for evaluation: what the target would be asked to continue.

use std::path::Path;

use serde_json::{Map, Value};

use crate::conversation::{Conversation, Message, RowError, kind, malformed};
use crate::encode::{integers, parse_object};
use crate::error::{Error, Result};
use crate::read::{Layout, Record, Records};
use crate::report::DropReason;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The same as text.
    pub text: String,
}

/// Reads a prompts file: JSONL or a JSON array of conversations (assistant turns at the end are left out),
/// `{"prompt": "..."}` or `{"input_ids": [...]}`; or plain text, one prompt per line.
///
/// Conversations, prompts and lines are rendered as a user would ask them, up to the assistant's answer. Without a
/// template, `prompt` and lines are taken as they are, and conversations are an error.
pub fn read_prompts(
    path: &Path,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<Vec<Prompt>> {
    let reader = PromptReader { tokenizer, template };
    let json = is_json(path)?;
    let layout = (!json).then_some(Layout::Lines);
    let mut prompts = Vec::new();
    for record in Records::open(path, layout)? {
        let Record { line, row } = record?;
        if !json && row.as_ref().is_ok_and(Vec::is_empty) {
            continue;
        }
        let prompt = row.and_then(|bytes| if json { reader.json(&bytes) } else { reader.plain(&bytes) });
        let prompt = prompt.map_err(|RowError { reason, message }| Error::Row {
            path: path.to_path_buf(),
            line,
            reason,
            message,
        })?;
        prompts.push(prompt);
    }
    if prompts.is_empty() {
        return Err(Error::EmptyInput { path: path.to_path_buf() });
    }
    Ok(prompts)
}

/// Whether the file holds JSON: by its name, else by its first row.
fn is_json(path: &Path) -> Result<bool> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension {
        Some("json" | "jsonl" | "ndjson") => return Ok(true),
        Some("txt") => return Ok(false),
        _ => {}
    }
    let Some(first) = Records::open(path, Some(Layout::Lines))?.next().transpose()? else { return Ok(false) };
    Ok(first.row.is_ok_and(|bytes| parse_object(&bytes).is_ok()))
}

struct PromptReader<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
}

impl PromptReader<'_> {
    fn json(&self, bytes: &[u8]) -> Result<Prompt, RowError> {
        let row = parse_object(bytes)?;
        if row.contains_key("input_ids") {
            return self.given(&row);
        }
        match row.get("prompt") {
            Some(Value::String(text)) => self.question(text),
            Some(other) => Err(malformed(format!("`prompt` is {}, expected text", kind(other)))),
            None => self.conversation(Conversation::from_row(&row)?),
        }
    }

    fn plain(&self, bytes: &[u8]) -> Result<Prompt, RowError> {
        let text =
            std::str::from_utf8(bytes).map_err(|error| malformed(format!("not UTF-8 text: {error}")))?;
        self.question(text)
    }

    fn question(&self, text: &str) -> Result<Prompt, RowError> {
        if self.template.is_none() {
            let ids = self.tokenizer.encode_plain(text).map_err(|error| tokenizer_error(&error))?;
            return Ok(Prompt { ids, text: text.to_owned() });
        }
        self.conversation(Conversation {
            messages: vec![Message::new("user", text)],
            ..Conversation::default()
        })
    }

    fn conversation(&self, mut conversation: Conversation) -> Result<Prompt, RowError> {
        let template = self.template.ok_or_else(|| malformed("a conversation needs a chat template"))?;
        template.arrange(&mut conversation)?;
        while conversation.messages.last().is_some_and(Message::is_assistant) {
            conversation.messages.pop();
        }
        let text = template.prompt_row(&conversation)?;
        let ids = self.tokenizer.encode(&text).map_err(|error| tokenizer_error(&error))?.ids;
        Ok(Prompt { ids, text })
    }

    fn given(&self, row: &Map<String, Value>) -> Result<Prompt, RowError> {
        let ids: Vec<u32> = integers(row, "input_ids")?;
        let vocabulary = self.tokenizer.vocab_size();
        if ids.is_empty() {
            return Err(malformed("`input_ids` is empty"));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            let message = format!("token id {id}, but the target has {vocabulary} ids");
            return Err(RowError { reason: DropReason::OutsideVocabulary, message });
        }
        let text = self.tokenizer.decode(&ids).map_err(|error| tokenizer_error(&error))?;
        Ok(Prompt { ids, text })
    }
}

fn tokenizer_error(error: &Error) -> RowError {
    RowError { reason: DropReason::Tokenizer, message: error.to_string() }
}
