//! Datasets of questions and answers in columns of their own, as conversations of one turn.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::conversation::{Conversation, Message, RowError, kind, malformed};

/// The columns of a question and its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Columns {
    /// The question, required.
    pub question: String,
    /// Follows the question, after a blank line, where it is not empty: an input of an instruction.
    #[serde(default)]
    pub input: Option<String>,
    /// The answer, required.
    pub answer: String,
    /// The system prompt.
    #[serde(default)]
    pub system: Option<String>,
}

/// Question, what follows it, and answer in published datasets. The first pair that a row has is used.
const KNOWN: [(&str, Option<&str>, &str); 13] = [
    // OPC, CodeAlpaca, Alpaca.
    ("instruction", Some("input"), "output"),
    // Magicoder Evol-Instruct, Magpie, Dolly.
    ("instruction", Some("context"), "response"),
    // OpenCodeInstruct.
    ("input", None, "output"),
    // GSM8K.
    ("question", None, "answer"),
    // Hendrycks' MATH.
    ("problem", None, "solution"),
    // MathQA.
    ("Problem", Some("options"), "Rationale"),
    // SciQ.
    ("question", None, "correct_answer"),
    // OpenOrca.
    ("question", None, "response"),
    // MetaMathQA.
    ("query", None, "response"),
    // CAMEL.
    ("message_1", None, "message_2"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("prompt", None, "answer"),
];
const SYSTEM: [&str; 2] = ["system_prompt", "system"];

impl Columns {
    /// The columns of this row, if they are those of a known dataset.
    pub(crate) fn of(row: &Map<String, Value>) -> Option<Self> {
        let has = |name: &str| matches!(row.get(name), Some(Value::String(_)));
        let (question, input, answer) =
            KNOWN.into_iter().find(|(question, _, answer)| has(question) && has(answer))?;
        let system = SYSTEM.into_iter().find(|name| has(name));
        Some(Self {
            question: question.to_owned(),
            input: input.map(str::to_owned),
            answer: answer.to_owned(),
            system: system.map(str::to_owned),
        })
    }

    /// The conversation in a row that has these columns.
    pub(crate) fn conversation(&self, row: &Map<String, Value>) -> Result<Conversation, RowError> {
        let required = |name: &str| {
            text(row, name)?.ok_or_else(|| malformed(format!("no `{name}`; it has {}", names(row))))
        };
        let optional = |name: &Option<String>| name.as_ref().map_or(Ok(None), |name| text(row, name));
        let (mut question, mut answer) = (required(&self.question)?, required(&self.answer)?);
        if let Some(input) = optional(&self.input)?.filter(|input| !input.trim().is_empty()) {
            question = format!("{question}\n\n{input}");
        }
        if let Some(choices) = choices(row, &question, &answer) {
            (question, answer) = choices;
        }
        let system = optional(&self.system)?.filter(|system| !system.trim().is_empty());
        let system = system.map(|text| Message::new("system", &text)).into_iter();
        let turns = [Message::new("user", &question), Message::new("assistant", &answer)];
        Ok(Conversation { messages: system.chain(turns).collect(), ..Conversation::default() })
    }
}

/// Question and answer of a row of SciQ, whose wrong answers stand in three more columns: the choices are listed in an
/// order that follows from their text.
fn choices(row: &Map<String, Value>, question: &str, answer: &str) -> Option<(String, String)> {
    let column = |name: &str| row.get(name).and_then(Value::as_str);
    let mut options =
        [column("distractor1")?, column("distractor2")?, column("distractor3")?, column("correct_answer")?];
    options.sort_by_key(|option| *blake3::hash(format!("{question}\n{option}").as_bytes()).as_bytes());
    let label = |index: usize| char::from(b'a' + index as u8);
    let correct = options.iter().position(|&option| option == answer)?;
    let list = options.iter().enumerate().map(|(index, option)| format!("\n{}) {option}", label(index)));
    let support = column("support").filter(|text| !text.trim().is_empty());
    let support = support.map(|text| format!("{text}\n")).unwrap_or_default();
    Some((
        question.to_owned() + &list.collect::<String>(),
        format!("{support}answer: {}) {answer}", label(correct)),
    ))
}

fn text(row: &Map<String, Value>, name: &str) -> Result<Option<String>, RowError> {
    match row.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(malformed(format!("`{name}` is {}, expected text", kind(other)))),
    }
}

/// The first columns of a row, for a message.
pub(crate) fn names(row: &Map<String, Value>) -> String {
    let names: Vec<_> = row.keys().take(8).map(|key| format!("`{key}`")).collect();
    names.join(", ")
}
