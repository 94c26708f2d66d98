//! One conversation, turn by turn.

use std::sync::atomic::AtomicBool;

use serde_json::{Map, Value, json};
use specforge_data::{Conversation, Message};

use super::answer::{Answer, Answerer, NoAnswer};
use super::{Args, CutOff, Reasoning};

/// What became of a conversation.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The row with the new answers, how many they are and of how many tokens.
    Done { row: Map<String, Value>, answers: u64, tokens: u64 },
    /// There is nothing to regenerate, or the answer is of no use.
    Skipped(String),
    /// Another try may succeed.
    Failed(String),
}

/// Regenerates row number `number`. An error is one that every conversation would have.
pub(super) fn regenerate(
    args: &Args,
    answerer: &Answerer,
    (number, row): (u64, &Map<String, Value>),
    stop: &AtomicBool,
) -> Result<Outcome, NoAnswer> {
    let original = match usable(row) {
        Ok(conversation) => conversation,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    let mut history = Conversation { messages: Vec::new(), ..original.clone() };
    let (mut answers, mut tokens) = (0u64, 0);
    for turn in asked_for(&original.messages) {
        let Some(turn) = turn else {
            // Where the model is to speak. 4096 answers of one conversation do not happen.
            let answer = match answerer.answer(args, &history, number << 12 | answers, stop) {
                Ok(answer) => answer,
                Err(NoAnswer::Failed(why)) => return Ok(Outcome::Failed(why)),
                Err(other) => return Err(other),
            };
            answers += 1;
            tokens += answer.tokens;
            if let Some(why) = unusable(&answer, args, answers) {
                return Ok(Outcome::Skipped(why));
            }
            let ends = answer.cut_off;
            history.messages.push(message(answer, args.reasoning));
            if ends {
                break;
            }
            continue;
        };
        history.messages.push(turn.clone());
    }
    let row = with_messages(row, &history, (answerer.name(), tokens));
    Ok(Outcome::Done { row, answers, tokens })
}

/// The conversation of a row, if its answers are plain texts.
fn usable(row: &Map<String, Value>) -> Result<Conversation, String> {
    let conversation = Conversation::of_row(row)?;
    let strange = conversation.messages.iter().find(|m| {
        m.role == "tool"
            || m.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty())
            || m.role.contains('_')
    });
    match strange {
        Some(message) if message.role.contains('_') => {
            Err(format!("a turn of the role {}, which chat interfaces do not have", message.role))
        }
        // A tool's result belongs to the call that the old answer made.
        Some(_) => Err("tool calls: their results would not be those of new answers".to_owned()),
        None => Ok(conversation),
    }
}

/// The turns of others in order, and `None` wherever the model speaks: instead of its turns, and after a question at
/// the end.
fn asked_for(messages: &[Message]) -> Vec<Option<&Message>> {
    let mut turns: Vec<Option<&Message>> =
        messages.iter().map(|message| (!message.is_assistant()).then_some(message)).collect();
    if turns.last().is_some_and(|last| last.is_some_and(|message| message.role == "user")) {
        turns.push(None);
    }
    turns
}

fn unusable(answer: &Answer, args: &Args, number: u64) -> Option<String> {
    if answer.calls_tool {
        return Some(format!("answer {number} calls a tool"));
    }
    if answer.cut_off && args.cut_off == CutOff::Skip {
        return Some(format!(
            "answer {number} was cut off after {} tokens (--max-tokens, --cut-off keep)",
            answer.tokens
        ));
    }
    answer.content.trim().is_empty().then(|| format!("answer {number} is empty"))
}

fn message(answer: Answer, reasoning: Reasoning) -> Message {
    let mut message = Message::new("assistant", &answer.content);
    message.reasoning_content = answer.reasoning.filter(|_| reasoning == Reasoning::Keep);
    message
}

/// The row with these messages, whatever else is in it, and who answered.
fn with_messages(
    row: &Map<String, Value>,
    conversation: &Conversation,
    (model, tokens): (&str, u64),
) -> Map<String, Value> {
    let mut row = row.clone();
    let key = if row.contains_key("conversations") { "conversations" } else { "messages" };
    row.insert(key.to_owned(), Value::Array(conversation.messages_json()));
    row.insert("regenerated".to_owned(), json!({ "model": model, "tokens": tokens }));
    row
}
