//! One conversation, turn by turn.

use std::sync::atomic::AtomicBool;

use serde_json::{Map, Value, json};
use specforge_data::{Conversation, Message};

use super::answer::{Answer, Answerer, NoAnswer};
use super::{Args, CutOff, Reasoning, Tools};

/// What became of a conversation.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The row with the new answers, how many they are and of how many tokens, and how many turns that call tools stay.
    Done { row: Map<String, Value>, answers: u64, tokens: u64, kept: u64 },
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
    let original = match usable(row, args.tools) {
        Ok(conversation) => conversation,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    let mut history = Conversation { messages: Vec::new(), ..original.clone() };
    let (mut answers, mut tokens, mut kept) = (0u64, 0, 0);
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
        kept += u64::from(turn.is_assistant());
        history.messages.push(others_turn(turn, args.reasoning));
    }
    let row = with_messages(row, &history, (answerer.name(), tokens, kept));
    Ok(Outcome::Done { row, answers, tokens, kept })
}

/// The conversation of a row, if a chat interface can be asked for its answers.
fn usable(row: &Map<String, Value>, tools: Tools) -> Result<Conversation, String> {
    let conversation = Conversation::of_row(row)?;
    let messages = &conversation.messages;
    if let Some(message) = messages.iter().find(|message| message.role.contains('_')) {
        return Err(format!("a turn of the role {}, which chat interfaces do not have", message.role));
    }
    if tools == Tools::Skip && (0..messages.len()).any(|i| is_call(messages, i)) {
        return Err("tool calls (--tools skip)".to_owned());
    }
    if asked_for(messages).iter().all(Option::is_some) {
        return Err("nothing to regenerate: every answer calls a tool".to_owned());
    }
    Ok(conversation)
}

/// The turns that stay in order, and `None` wherever the model speaks: instead of its texts, and after a question or a
/// tool's result at the end. A turn that calls a tool stays, because the result that follows is that of this call.
fn asked_for(messages: &[Message]) -> Vec<Option<&Message>> {
    let stays = |i: usize| !messages[i].is_assistant() || is_call(messages, i);
    let mut turns: Vec<Option<&Message>> =
        messages.iter().enumerate().map(|(i, message)| stays(i).then_some(message)).collect();
    if messages.last().is_some_and(|last| matches!(last.role.as_str(), "user" | "tool")) {
        turns.push(None);
    }
    turns
}

/// Whether a turn of the model calls a tool: it says so, or a result follows (some data have calls in the text).
fn is_call(messages: &[Message], i: usize) -> bool {
    let calls = messages[i].tool_calls.as_ref().is_some_and(|calls| !calls.is_empty());
    messages[i].is_assistant() && (calls || messages.get(i + 1).is_some_and(|next| next.role == "tool"))
}

/// A turn that stays; what another model thought before a call goes unless reasoning is kept.
fn others_turn(turn: &Message, reasoning: Reasoning) -> Message {
    let mut turn = turn.clone();
    if reasoning != Reasoning::Keep {
        turn.reasoning_content = None;
    }
    turn
}

fn unusable(answer: &Answer, args: &Args, number: u64) -> Option<String> {
    if answer.calls_tool {
        return Some(format!("answer {number} calls a tool, whose result nobody has"));
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
    (model, tokens, kept): (&str, u64, u64),
) -> Map<String, Value> {
    let mut row = row.clone();
    let key = if row.contains_key("conversations") { "conversations" } else { "messages" };
    row.insert(key.to_owned(), Value::Array(conversation.messages_json()));
    let mut how = json!({ "model": model, "tokens": tokens });
    if kept > 0 {
        how["kept_calls"] = kept.into();
    }
    row.insert("regenerated".to_owned(), how);
    row
}
