//! A conversation as chat templates expect it, made from the spellings found in the wild.

use serde_json::{Map, Value, json};

use crate::report::DropReason;

/// Messages in order, with what else a chat template may ask for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// The messages, roles and keys normalised.
    pub messages: Vec<Message>,
    /// Tool descriptions: a non-empty JSON list.
    pub tools: Option<Value>,
    /// Further template variables of this row (`enable_thinking`, `documents`, ...).
    pub variables: Map<String, Value>,
}

/// One turn.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or one of the harmony roles.
    pub role: String,
    /// The text; parts are joined.
    pub content: String,
    /// Reasoning that came before the answer.
    pub reasoning_content: Option<String>,
    /// Calls, each with `id`, `type` and `function` of `name` and `arguments` (parsed).
    pub tool_calls: Option<Vec<Value>>,
    /// Name of the tool, for tool turns.
    pub name: Option<String>,
    /// Which call a tool turn answers.
    pub tool_call_id: Option<String>,
}

/// Why one row cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RowError {
    pub(crate) reason: DropReason,
    pub(crate) message: String,
}

/// Columns that hold the messages, in the order in which they are looked for.
const MESSAGES: [&str; 4] = ["conversations", "messages", "conversation", "data"];
/// Further columns of a row that are no template variables.
const OWN_COLUMNS: [&str; 8] = [
    "id",
    "tools",
    "text",
    "input_ids",
    "loss_mask",
    "chat_template_kwargs",
    // How `specforge regenerate` made the answers.
    "regenerated",
    ANSWER,
];

/// The last answer, where it is beside the messages (datasets of answers that a model gave to others' conversations).
const ANSWER: &str = "generated_message";

impl Conversation {
    /// Whether a row holds messages; a column called `data` may hold anything.
    pub(crate) fn is_in(row: &Map<String, Value>) -> bool {
        MESSAGES[..3].iter().any(|key| row.contains_key(*key))
            || row.get("data").and_then(Value::as_array).is_some_and(|list| list.iter().all(Value::is_string))
    }

    /// Reads a row with `conversations` or `messages`.
    pub(crate) fn from_row(row: &Map<String, Value>) -> Result<Self, RowError> {
        let messages = MESSAGES.iter().find_map(|key| row.get(*key));
        let Some(Value::Array(messages)) = messages else {
            return Err(malformed(match messages {
                None => "no `conversations` or `messages`".to_owned(),
                Some(other) => format!("the messages are {}, expected a list", kind(other)),
            }));
        };
        let answer = row.get(ANSWER).filter(|answer| answer.is_object());
        let messages: Result<Vec<_>, _> = messages
            .iter()
            .chain(answer)
            .enumerate()
            .map(|(index, message)| {
                Message::from_value(message, index)
                    .map_err(|problem| malformed(format!("message {}: {problem}", index + 1)))
            })
            .collect();
        Ok(Self { messages: messages?, tools: tools(row.get("tools"))?, variables: variables(row)? })
    }

    /// Brings the turns into the order that every template can render, as SpecForge does: the conversation
    /// starts with at most one system prompt (`default_system` when it has none) and a user turn; it is cut
    /// before an assistant turn that answers nobody and a tool turn that nobody called. Says whether messages
    /// were left out.
    pub(crate) fn arrange(&mut self, default_system: Option<&str>) -> Result<bool, RowError> {
        let before = self.messages.len();
        let has_system = self.messages.first().is_some_and(|message| message.role == "system");
        let system = has_system.then(|| self.messages.remove(0));
        let system = system.or_else(|| {
            default_system.filter(|text| !text.is_empty()).map(|text| Message::new("system", text))
        });
        let first_user = self.messages.iter().position(|message| message.role == "user");
        let Some(first_user) = first_user else {
            return Err(RowError { reason: DropReason::NoUsableTurn, message: "no user turn".to_owned() });
        };
        self.messages.drain(..first_user);
        let out_of_order = self.messages.windows(2).position(|pair| !follows(&pair[1].role, &pair[0].role));
        if let Some(last) = out_of_order {
            self.messages.truncate(last + 1);
        }
        let kept = self.messages.len() + usize::from(has_system);
        self.messages.splice(..0, system);
        Ok(kept < before)
    }
}

impl Message {
    /// A message with nothing but a text.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned(), ..Self::default() }
    }

    /// The message at `index` of a conversation. Plain texts are turns of user and assistant.
    fn from_value(value: &Value, index: usize) -> Result<Self, String> {
        if let Value::String(text) = value {
            return Ok(Self::new(["user", "assistant"][index % 2], text));
        }
        let Value::Object(message) = value else {
            return Err(format!("{}, expected an object", kind(value)));
        };
        let role = message.get("role").or_else(|| message.get("from"));
        let role = role.and_then(Value::as_str).ok_or("no `role` (or `from`) text")?;
        let content = message.get("content").or_else(|| message.get("value"));
        let reasoning = optional_text(message, "reasoning_content")?;
        Ok(Self {
            role: normal_role(role).ok_or_else(|| format!("unknown role `{role}`"))?.to_owned(),
            content: text_of(content)?,
            reasoning_content: reasoning.or(optional_text(message, "reasoning")?),
            tool_calls: tool_calls(message.get("tool_calls"))?,
            name: optional_text(message, "name")?,
            tool_call_id: optional_text(message, "tool_call_id")?,
        })
    }

    /// The message as a template sees it; `full` adds the keys that only reasoning templates ask for.
    pub(crate) fn to_value(&self, full: bool) -> Value {
        let mut message = json!({ "role": self.role, "content": self.content });
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                message[key] = value;
            }
        };
        set("tool_calls", self.tool_calls.clone().map(Value::Array));
        if full {
            set("reasoning_content", self.reasoning_content.clone().map(Value::String));
            set("name", self.name.clone().map(Value::String));
            set("tool_call_id", self.tool_call_id.clone().map(Value::String));
        }
        message
    }

    /// Whether the turn is the model's.
    pub fn is_assistant(&self) -> bool {
        self.role.starts_with("assistant")
    }

    /// Whether `text` has the reasoning of this message in it, if there is any.
    pub(crate) fn reasoning_is_in(&self, text: &str) -> bool {
        self.reasoning_content.as_deref().is_none_or(|thought| text.contains(thought.trim()))
    }

    /// Whether it is a turn of the model without text, thought or call.
    pub(crate) fn is_silent(&self) -> bool {
        let thought = self.reasoning_content.as_deref().unwrap_or_default();
        let calls = self.tool_calls.as_deref().unwrap_or_default();
        self.is_assistant() && self.content.trim().is_empty() && thought.trim().is_empty() && calls.is_empty()
    }
}

/// Whether a turn of `role` may come right after one of `previous`.
fn follows(role: &str, previous: &str) -> bool {
    match role {
        "tool" => matches!(previous, "assistant" | "tool"),
        "assistant" => matches!(previous, "user" | "tool"),
        _ => true,
    }
}

fn normal_role(role: &str) -> Option<&str> {
    match role {
        "human" | "user" => Some("user"),
        "gpt" | "chatgpt" | "bing" | "bard" | "bot" | "model" | "assistant" => Some("assistant"),
        "system" | "developer" | "tool" => Some(role),
        "observation" | "function" | "ipython" => Some("tool"),
        "assistant_analysis" | "assistant_commentary" | "assistant_final" | "assistant_reasoning_effort" => {
            Some(role)
        }
        _ => None,
    }
}

/// A text, a list of text parts, or nothing (which is the empty text: a turn may consist of tool calls alone).
fn text_of(content: Option<&Value>) -> Result<String, String> {
    match content {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => parts.iter().map(text_of_part).collect(),
        Some(other) => Err(format!("the content is {}, expected text or a list of text parts", kind(other))),
    }
}

fn text_of_part(part: &Value) -> Result<String, String> {
    if let Some(text) = part.as_str() {
        return Ok(text.to_owned());
    }
    let text = part.get("text").and_then(Value::as_str);
    text.map(str::to_owned).ok_or_else(|| {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("unknown");
        format!("a content part of type `{kind}` has no text; only text parts can be used")
    })
}

fn optional_text(message: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match message.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(format!("`{key}` is {}, expected text", kind(other))),
    }
}

/// Calls as a list or as JSON text, reduced to the keys that templates know.
fn tool_calls(value: Option<&Value>) -> Result<Option<Vec<Value>>, String> {
    let parsed = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => parse_if_text(value, "tool_calls")?,
    };
    let Value::Array(calls) = parsed else { return Err("`tool_calls` is no list".to_owned()) };
    calls.iter().map(tool_call).collect::<Result<_, _>>().map(Some)
}

fn tool_call(call: &Value) -> Result<Value, String> {
    let function = call.get("function").ok_or("a tool call has no `function`")?;
    let name = function.get("name").and_then(Value::as_str).ok_or("a tool call has no function name")?;
    let arguments =
        function.get("arguments").map_or(Ok(json!({})), |value| parse_if_text(value, "arguments"))?;
    let or = |key: &str, default: &str| call.get(key).and_then(Value::as_str).unwrap_or(default).to_owned();
    Ok(json!({
        "id": or("id", ""),
        "type": or("type", "function"),
        "function": { "name": name, "arguments": arguments },
    }))
}

fn parse_if_text(value: &Value, key: &str) -> Result<Value, String> {
    match value {
        Value::String(text) if text.trim().is_empty() => Ok(json!({})),
        Value::String(text) => {
            serde_json::from_str(text).map_err(|error| format!("`{key}` is text, but not JSON: {error}"))
        }
        value => Ok(value.clone()),
    }
}

fn tools(value: Option<&Value>) -> Result<Option<Value>, RowError> {
    let parsed = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(value) => parse_if_text(value, "tools").map_err(malformed)?,
    };
    match parsed {
        Value::Array(tools) if tools.is_empty() => Ok(None),
        Value::Array(tools) => Ok(Some(Value::Array(tools))),
        other => Err(malformed(format!("`tools` is {}, expected a list", kind(&other)))),
    }
}

fn variables(row: &Map<String, Value>) -> Result<Map<String, Value>, RowError> {
    let own = |key: &str| OWN_COLUMNS.contains(&key) || MESSAGES.contains(&key);
    let columns = row.iter().filter(|(key, _)| !own(key));
    let mut variables: Map<String, Value> =
        columns.map(|(key, value)| (key.clone(), value.clone())).collect();
    match row.get("chat_template_kwargs") {
        None | Some(Value::Null) => {}
        Some(Value::Object(more)) => variables.extend(more.clone()),
        Some(other) => {
            return Err(malformed(format!("`chat_template_kwargs` is {}, expected an object", kind(other))));
        }
    }
    Ok(variables)
}

pub(crate) fn malformed(message: impl Into<String>) -> RowError {
    RowError { reason: DropReason::Malformed, message: message.into() }
}

/// A JSON value's type in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
