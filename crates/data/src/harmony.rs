//! The harmony format of gpt-oss, as far as the roles of prepared conversations reach.

use crate::conversation::{Message, RowError, malformed};

/// Writes the messages; `assistant_reasoning_effort` sets the effort of the default system message.
/// `forgets`: a system message discards what precedes it, as in SpecForge.
pub(crate) fn render(
    messages: &[Message],
    generation_prompt: bool,
    forgets: bool,
) -> Result<String, RowError> {
    let mut text = String::new();
    let last = messages.iter().rposition(sets_system).filter(|_| forgets).unwrap_or(0);
    let messages = &messages[last..];
    if messages.first().is_none_or(|message| !sets_system(message)) {
        text.push_str(&turn("system", None, &default_system("low")));
    }
    for message in messages {
        let content = message.content.as_str();
        text.push_str(&match message.role.as_str() {
            "system" | "user" | "developer" => turn(&message.role, None, content),
            "assistant_reasoning_effort" => turn("system", None, &default_system(&content.to_lowercase())),
            "assistant_analysis" => turn("assistant", Some("analysis"), content),
            "assistant_commentary" => turn("assistant", Some("commentary"), content),
            "assistant_final" | "assistant" => turn("assistant", Some("final"), content),
            role => return Err(malformed(format!("role `{role}` has no place in a harmony conversation"))),
        });
    }
    if generation_prompt {
        text.push_str("<|start|>assistant");
    }
    Ok(text)
}

fn sets_system(message: &Message) -> bool {
    matches!(message.role.as_str(), "system" | "assistant_reasoning_effort")
}

fn turn(role: &str, channel: Option<&str>, content: &str) -> String {
    let channel = channel.map_or(String::new(), |channel| format!("<|channel|>{channel}"));
    format!("<|start|>{role}{channel}<|message|>{content}<|end|>")
}

/// The system message of gpt-oss with the dates that SpecForge's templates fix.
fn default_system(effort: &str) -> String {
    format!(
        "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\
         Current date: 2025-06-28\n\nReasoning: {effort}\n\n\
         # Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
}
