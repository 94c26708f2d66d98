//! Conversations with tools as OpenAI's interface has them, and calls that come back as text.

use serde_json::Value;
use specforge_data::Conversation;

/// The messages of a request: arguments of calls are JSON in a text, and every call and result has an id.
///
/// Calls without an id get one, results without one answer the calls before them in order. The ids are of the form that
/// the strictest template asks for (nine letters and digits) and are not kept.
pub(super) fn messages(conversation: &Conversation) -> Vec<Value> {
    let mut messages = conversation.messages_json();
    let (mut made, mut open) = (0u32, Vec::new());
    for message in &mut messages {
        if message["role"] == "tool" {
            answer(message, &mut open);
            continue;
        }
        open.clear();
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            if call["id"] == "" {
                made += 1;
                call["id"] = format!("call{made:05}").into();
            }
            open.push(call["id"].clone());
            let arguments = &mut call["function"]["arguments"];
            *arguments = arguments.to_string().into();
        }
        open.reverse();
    }
    messages
}

/// Gives a result the id of the next call that has none yet; `open` ends with it.
fn answer(message: &mut Value, open: &mut Vec<Value>) {
    match message.get("tool_call_id") {
        Some(id) => open.retain(|open| open != id),
        None => {
            if let Some(id) = open.pop() {
                message["tool_call_id"] = id;
            }
        }
    }
}

/// Whether an answer to a conversation with tools is a call that nobody took out of the text.
pub(super) fn calls_in_text(conversation: &Conversation, text: &str) -> bool {
    let has_tools = conversation.tools.is_some() || conversation.messages.iter().any(|m| m.role == "tool");
    has_tools && OPENINGS.iter().any(|opening| text.contains(opening))
}

/// How models of many families begin a call.
const OPENINGS: [&str; 8] = [
    "<tool_call>",
    "<function=",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "<|tool_call",
    "<\u{ff5c}tool\u{2581}call",
    "<minimax:tool_call>",
    "functools[",
];

#[cfg(test)]
mod tests {
    use serde_json::json;
    use specforge_data::Conversation;

    use super::{calls_in_text, messages};

    #[test]
    fn calls_and_results_get_what_the_interface_asks_for() {
        let call = |id: &str| json!({ "id": id, "function": { "name": "f", "arguments": { "a": 1 } } });
        let row = json!({ "messages": [
            { "role": "user", "content": "x" },
            { "role": "assistant", "tool_calls": [call(""), call("mine")] },
            { "role": "tool", "content": "1" }, { "role": "tool", "content": "2" },
            { "role": "assistant", "content": "ok", "tool_calls": [call("a"), call("b")] },
            { "role": "tool", "content": "b", "tool_call_id": "b" }, { "role": "tool", "content": "a" },
            { "role": "tool", "content": "one too many" },
        ] });
        let conversation = Conversation::of_row(row.as_object().unwrap()).unwrap();
        let messages = messages(&conversation);
        let calls = &messages[1]["tool_calls"];
        assert_eq!((&calls[0]["id"], &calls[1]["id"]), (&json!("call00001"), &json!("mine")));
        assert_eq!(calls[0]["function"]["arguments"], "{\"a\":1}");
        assert_eq!(messages[1]["content"], "");
        let ids: Vec<_> = messages.iter().map(|message| message["tool_call_id"].as_str()).collect();
        assert_eq!(&ids[2..4], [Some("call00001"), Some("mine")]);
        assert_eq!(&ids[5..], [Some("b"), Some("a"), None]);
        assert!(calls_in_text(&conversation, "so <tool_call>\n{}"));
        assert!(!calls_in_text(&Conversation::default(), "so <tool_call>"));
        assert!(!calls_in_text(&conversation, "a tool_call"));
    }
}
