//! Who answers: servers, or the target in this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use serde_json::{Value, json};
use specforge_config::RunPlan;
use specforge_data::{ChatTemplate, Conversation, Tokenizer};
use specforge_eval::{Options, Sampling, Stop, plain};
use specforge_models::Target;
use specforge_remote::chat::Servers;
use specforge_tensor::Device;

use super::{Args, Reasoning, chat};
use crate::{hub, machine, setup};

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answer {
    pub(super) content: String,
    pub(super) reasoning: Option<String>,
    /// It reached the most tokens, or the end of the context.
    pub(super) cut_off: bool,
    /// It is a call of a tool and no text.
    pub(super) calls_tool: bool,
    pub(super) tokens: u64,
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// This conversation cannot be answered.
    Failed(String),
    /// Nobody would be answered: a wrong key, a wrong model.
    Hopeless(anyhow::Error),
    /// It was told to stop.
    Stopped,
}

/// Who answers.
#[derive(Debug)]
pub(super) enum Answerer {
    OverHttp(Box<OverHttp>),
    InProcess(Box<InProcess>),
}

/// Servers and the model's name there.
#[derive(Debug)]
pub(super) struct OverHttp {
    pub(super) servers: Servers,
    pub(super) model: String,
}

/// The target in this process.
#[derive(Debug)]
pub(super) struct InProcess {
    name: String,
    target: Arc<Target>,
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Answerer {
    /// What the model is called.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::OverHttp(http) => &http.model,
            Self::InProcess(target) => &target.name,
        }
    }

    /// The answer to a conversation that ends with somebody else's turn. `number` tells every answer's random choices
    /// apart.
    pub(super) fn answer(
        &self,
        args: &Args,
        conversation: &Conversation,
        number: u64,
        stop: &AtomicBool,
    ) -> Result<Answer, NoAnswer> {
        match self {
            Self::OverHttp(http) => http.answer(args, conversation, number, stop),
            Self::InProcess(target) => target.answer(args, conversation, number, stop),
        }
    }
}

impl OverHttp {
    fn answer(
        &self,
        args: &Args,
        conversation: &Conversation,
        number: u64,
        stop: &AtomicBool,
    ) -> Result<Answer, NoAnswer> {
        let body = self.request(args, conversation, number);
        let completion = self.servers.complete(&body, stop).map_err(no_answer)?;
        Ok(Answer {
            cut_off: completion.finish_reason == "length",
            calls_tool: completion.finish_reason == "tool_calls"
                || chat::calls_in_text(conversation, &completion.content),
            content: completion.content,
            reasoning: completion.reasoning,
            tokens: completion.tokens.unwrap_or(0),
        })
    }

    /// The request; settings that are not set are the server's.
    fn request(&self, args: &Args, conversation: &Conversation, number: u64) -> Value {
        let mut body = json!({
            "model": self.model,
            "messages": chat::messages(conversation),
            "temperature": args.temperature,
            "max_tokens": args.max_tokens,
            // Servers take 32 bits with a sign.
            "seed": seed(args, number) & 0x7fff_ffff,
            "stream": false,
        });
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                body[key] = value;
            }
        };
        set("top_p", args.top_p.map(Value::from));
        set("top_k", args.top_k.map(Value::from));
        set("repetition_penalty", args.repetition_penalty.map(Value::from));
        set("tools", conversation.tools.clone());
        let mut variables = conversation.variables.clone();
        if args.reasoning == Reasoning::Disable {
            variables.insert("enable_thinking".to_owned(), Value::Bool(false));
        }
        set("chat_template_kwargs", (!variables.is_empty()).then_some(Value::Object(variables)));
        body
    }
}

/// Every answer's own seed.
fn seed(args: &Args, number: u64) -> u64 {
    let hash = blake3::hash(&[args.seed.to_le_bytes(), number.to_le_bytes()].concat());
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"))
}

fn no_answer(error: specforge_remote::Error) -> NoAnswer {
    match error {
        specforge_remote::Error::Stopped => NoAnswer::Stopped,
        // The model and the key are the same for everybody.
        specforge_remote::Error::Status { status: 401 | 403 | 404 | 405, .. } => {
            NoAnswer::Hopeless(error.into())
        }
        other => NoAnswer::Failed(other.to_string()),
    }
}

impl InProcess {
    pub(super) fn open(plan: &RunPlan) -> Result<Self> {
        let tokenizer = Tokenizer::open(&plan.target.path)?;
        let template = ChatTemplate::open(&plan.target.path, tokenizer.special(), &plan.data.template)?;
        Ok(Self {
            name: hub::name(&plan.target.path),
            target: setup::target(plan, None)?,
            tokenizer,
            template,
        })
    }

    /// A GPU is busy with one; a core of a CPU with one each.
    pub(super) fn at_once(&self) -> usize {
        if self.target.device() == Device::Cpu { machine::threads() } else { 1 }
    }

    fn answer(
        &self,
        args: &Args,
        conversation: &Conversation,
        number: u64,
        stop: &AtomicBool,
    ) -> Result<Answer, NoAnswer> {
        if stop.load(Ordering::Relaxed) {
            return Err(NoAnswer::Stopped);
        }
        self.decode(args, conversation, number).map_err(|error| NoAnswer::Failed(format!("{error:#}")))
    }

    fn decode(&self, args: &Args, conversation: &Conversation, number: u64) -> Result<Answer> {
        let mut conversation = conversation.clone();
        if args.reasoning == Reasoning::Disable {
            conversation.variables.insert("enable_thinking".to_owned(), Value::Bool(false));
        }
        let prompt = self.tokenizer.encode(&self.template.render_prompt(&conversation)?)?.ids;
        let sampling = Sampling {
            temperature: args.temperature,
            top_p: args.top_p.unwrap_or(1.0),
            seed: seed(args, number),
        };
        let options = Options { sampling, max_new_tokens: args.max_tokens, ..Options::default() };
        let mut generated = plain(&self.target, (0, &prompt), &options)?;
        let tokens = generated.tokens.len() as u64;
        if generated.stop == Stop::Eos {
            generated.tokens.pop();
        }
        let (reasoning, content) = without_reasoning(&self.tokenizer.decode(&generated.tokens)?);
        let calls_tool = chat::calls_in_text(&conversation, &content);
        Ok(Answer { content, reasoning, cut_off: generated.stop != Stop::Eos, calls_tool, tokens })
    }
}

/// Reasoning and answer: what comes before `</think>`, and the rest.
fn without_reasoning(text: &str) -> (Option<String>, String) {
    match text.split_once("</think>") {
        None => (None, text.trim().to_owned()),
        Some((before, after)) => {
            let thought = before.trim().trim_start_matches("<think>").trim();
            ((!thought.is_empty()).then(|| thought.to_owned()), after.trim().to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::without_reasoning;

    #[test]
    fn reasoning_ends_where_it_is_closed() {
        let split = |text| without_reasoning(text);
        assert_eq!(split(" yes\n"), (None, "yes".to_owned()));
        assert_eq!(split("<think>\nhm\n</think>\n\nyes"), (Some("hm".to_owned()), "yes".to_owned()));
        assert_eq!(split("hm</think>yes"), (Some("hm".to_owned()), "yes".to_owned()));
        assert_eq!(split("<think>\n\n</think>\n\nyes"), (None, "yes".to_owned()));
    }
}
