//! The chat template of a run: a conversation to text, with the supervised part of that text.

mod sources;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use minijinja::Value;
use minijinja::value::Serde;
use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::conversation::{Conversation, RowError, malformed};
use crate::date::Date;
use crate::error::{Error, Result};
use crate::harmony;
use crate::jinja::{GENERATION_END, GENERATION_START, Jinja};
use crate::mask;
use crate::named::{NamedTemplate, Spans, named_templates};
use crate::report::{DropReason, SpanSource};
use crate::spans::{self, Markers, Render};
use crate::specforge::Search;
use crate::special::SpecialTokens;
use crate::tokenizer::{Encoded, Tokenizer};

/// How conversations become text, and how the assistant's part is found.
#[derive(Debug)]
pub struct ChatTemplate {
    /// The target's own template; the second one is for rows with tools where the target has a separate one.
    jinja: Option<Jinja>,
    jinja_tools: Option<Jinja>,
    /// The template that the recipe names.
    named: Option<NamedTemplate>,
    /// What SpecForge would search for, if its masks are asked for.
    specforge: Option<Search>,
    /// What rendering a probe taught about the target's own template.
    markers: Option<Markers>,
    special: SpecialTokens,
    variables: Map<String, serde_json::Value>,
    hash: String,
}

/// Which template, and what it is given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct TemplateOptions {
    /// Name in the table of templates; without one the target folder's own template says everything.
    pub name: Option<String>,
    /// TOML file with further named templates, of the form of `[data.template.inline]`, each in a table of its name.
    pub table: Option<PathBuf>,
    /// A template of your own, instead of a name.
    pub inline: Option<NamedTemplate>,
    /// Jinja file that renders instead of the target's own template; one with `{% generation %}` blocks says itself what
    /// is supervised.
    pub file: Option<PathBuf>,
    /// Template variables for every row (`enable_thinking`, ...); a row's own win.
    pub variables: Map<String, serde_json::Value>,
    /// Date that templates print, YYYY-MM-DD; fixed, so that the tokens do not depend on the day.
    pub date: Option<String>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Its supervised bytes.
    pub spans: Spans,
    /// How they were found.
    pub source: SpanSource,
}

impl ChatTemplate {
    /// Opens the template for a target folder. With a name in the options, the named strings find the turns and
    /// the target's own template, if it has one, renders; without a name the target must have one.
    pub fn open(folder: &Path, special: &SpecialTokens, options: &TemplateOptions) -> Result<Self> {
        let named = named(options)?;
        let sources = sources::sources(folder, options.file.as_deref())?;
        if named.is_none() && sources.usual.is_none() {
            return Err(Error::Target {
                path: folder.join("tokenizer_config.json"),
                message:
                    "no `chat_template` here and no chat_template.jinja beside it; name a built-in template \
                          in the recipe"
                        .to_owned(),
            });
        }
        let today = date(options)?;
        let compile = |source: &Option<String>| -> Result<Option<Jinja>> {
            let compiled =
                source.as_deref().map(|source| Jinja::compile(source, &sources.file, today)).transpose();
            compiled.map_err(|message| Error::Template { origin: folder.display().to_string(), message })
        };
        let mut template = Self {
            jinja: compile(&sources.usual)?,
            jinja_tools: compile(&sources.tools)?,
            hash: identity(&sources, named.as_ref(), today, options),
            special: special.clone(),
            variables: options.variables.clone(),
            specforge: None,
            markers: None,
            named,
        };
        if template.named.is_none() {
            template.markers = spans::learn(&|messages, prompt| template.probe(messages, prompt));
        }
        Ok(template)
    }

    /// The same template with the loss masks of SpecForge, which knows named templates alone.
    pub fn with_specforge_masks(mut self) -> Result<Self> {
        let fail = |message: &str| {
            let expected = "\"off\", or a template that SpecForge can use";
            Err(Error::Setting { name: "mask-compat", expected, got: message.to_owned() })
        };
        let Some(named) = &self.named else {
            return fail(
                "\"specforge\" without data.template.name: SpecForge finds turns by named strings alone",
            );
        };
        let Some(search) = Search::of(named) else {
            return fail(
                "\"specforge\" with a template without a supervised end of turn, on which SpecForge fails",
            );
        };
        self.specforge = Some(search);
        Ok(self)
    }

    /// One byte per token of a rendered text, 1 where it is supervised.
    pub fn loss_mask(
        &self,
        text: &str,
        encoded: &Encoded,
        spans: &Spans,
        tokenizer: &Tokenizer,
        last_turn_only: bool,
    ) -> Result<Vec<u8>> {
        let Some(search) = &self.specforge else {
            return Ok(mask::loss_mask(text, &encoded.offsets, spans, last_turn_only));
        };
        let first = if last_turn_only { spans.turns.len().saturating_sub(1) } else { 0 };
        let spans = Spans { turns: spans.turns[first..].to_vec(), ignored: spans.ignored.clone() };
        search.loss_mask(text, encoded, &spans, tokenizer)
    }

    /// Reads a row with `conversations` or `messages` into the order of turns that this template renders.
    pub fn conversation(&self, row: &Map<String, serde_json::Value>) -> Result<Conversation> {
        let read = || -> Result<_, RowError> {
            let mut conversation = Conversation::from_row(row)?;
            self.arrange(&mut conversation)?;
            Ok(conversation)
        };
        read().map_err(|error| self.public(&error))
    }

    /// Renders a conversation and finds what is supervised in it.
    pub fn render(&self, conversation: &Conversation) -> Result<Rendered> {
        self.render_row(conversation).map_err(|error| self.public(&error))
    }

    /// Renders the conversation up to the point where the assistant would answer.
    pub fn render_prompt(&self, conversation: &Conversation) -> Result<String> {
        self.prompt_row(conversation).map_err(|error| self.public(&error))
    }

    /// The supervised part of a text that was rendered elsewhere.
    pub fn find(&self, text: &str) -> Result<Spans> {
        self.find_row(text).map(|(spans, _)| spans).map_err(|error| self.public(&error))
    }

    /// Content identity: blake3 (hex) of the template, the named strings, the variables and the date.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The assistant header looked for, where that is how turns are found.
    pub fn header(&self) -> Option<&str> {
        if let Some(search) = &self.specforge {
            return Some(search.header());
        }
        let named = self.named.as_ref().map(|named| named.assistant_header.as_str());
        named.or_else(|| self.markers.as_ref().map(|markers| markers.template.assistant_header.as_str()))
    }

    /// Applies the rules about the order of roles; says whether messages were left out.
    pub(crate) fn arrange(&self, conversation: &mut Conversation) -> Result<bool, RowError> {
        // Harmony has roles and a system message of its own.
        if self.is_harmony() {
            return Ok(false);
        }
        conversation.arrange(self.named.as_ref().and_then(|named| named.default_system.as_deref()))
    }

    pub(crate) fn render_row(&self, conversation: &Conversation) -> Result<Rendered, RowError> {
        let render = self.renderer(conversation);
        let text = render(conversation.messages.len(), false)?;
        if let Some(named) = &self.named {
            let (text, _) = self.unmark(conversation, text)?;
            let spans = self.find_named(named, &text);
            return Ok(Rendered { text, spans, source: SpanSource::NamedHeader });
        }
        if self.marks(conversation) {
            let (text, turns) = self.unmark(conversation, text)?;
            let spans = Spans { turns, ignored: Vec::new() };
            return Ok(Rendered { text, spans, source: SpanSource::GenerationBlocks });
        }
        let (turns, source) =
            spans::from_renderings(&text, &conversation.messages, &render, self.markers.as_ref())?;
        Ok(Rendered { text, spans: Spans { turns, ignored: Vec::new() }, source })
    }

    pub(crate) fn prompt_row(&self, conversation: &Conversation) -> Result<String, RowError> {
        let render = self.renderer(conversation);
        let count = conversation.messages.len();
        let (prompt, _) = self.unmark(conversation, render(count, true)?)?;
        let (plain, _) = self.unmark(conversation, render(count, false)?)?;
        // A template that knows no generation prompt still needs the answer to begin somewhere.
        let header = if prompt == plain { self.header().unwrap_or_default() } else { "" };
        Ok(prompt + header)
    }

    pub(crate) fn find_row(&self, text: &str) -> Result<(Spans, SpanSource), RowError> {
        if let Some(named) = &self.named {
            return Ok((self.find_named(named, text), SpanSource::NamedHeader));
        }
        match self.markers.as_ref().filter(|markers| markers.can_search()) {
            Some(markers) => Ok((markers.template.find(text), SpanSource::LearnedHeader)),
            None => Err(RowError {
                reason: DropReason::SpansNotFound,
                message: "the target's template does not show how an answer begins and ends; name a template in the \
                          recipe"
                    .to_owned(),
            }),
        }
    }

    fn find_named(&self, named: &NamedTemplate, text: &str) -> Spans {
        self.specforge.as_ref().map_or_else(|| named.find(text), |search| search.find(text))
    }

    fn is_harmony(&self) -> bool {
        self.named.as_ref().is_some_and(|named| named.harmony)
    }

    fn jinja_for(&self, conversation: &Conversation) -> Option<&Jinja> {
        let special = self.jinja_tools.as_ref().filter(|_| conversation.tools.is_some());
        special.or(self.jinja.as_ref())
    }

    /// Whether the template marks what the assistant generates.
    fn marks(&self, conversation: &Conversation) -> bool {
        !self.is_harmony() && self.jinja_for(conversation).is_some_and(Jinja::has_generation_blocks)
    }

    /// Takes the generation marks out of a rendered text, and gives what they enclosed.
    fn unmark(
        &self,
        conversation: &Conversation,
        text: String,
    ) -> Result<(String, Vec<Range<usize>>), RowError> {
        if !self.marks(conversation) {
            return Ok((text, Vec::new()));
        }
        let forged = conversation
            .messages
            .iter()
            .any(|message| message.content.contains([GENERATION_START, GENERATION_END]));
        if forged {
            return Err(malformed(
                "the text contains the noncharacter U+FDD0 or U+FDD1, which marks generated text",
            ));
        }
        Ok(spans::strip_marks(&text))
    }

    /// A function that renders the first so many messages, with or without generation prompt.
    fn renderer<'a>(&'a self, conversation: &'a Conversation) -> Box<Render<'a>> {
        if self.is_harmony() {
            let forgets = self.specforge.is_some();
            return Box::new(move |count, prompt| {
                harmony::render(&conversation.messages[..count], prompt, forgets)
            });
        }
        match (self.jinja_for(conversation), &self.named) {
            (Some(jinja), _) => self.jinja_renderer(jinja, conversation),
            (None, Some(named)) => {
                let bos = self.special.bos.as_deref().unwrap_or_default();
                Box::new(move |count, prompt| {
                    Ok(named.render_plain(&conversation.messages[..count], bos, prompt))
                })
            }
            (None, None) => {
                unreachable!("a template has a Jinja source or a name: checked when it was opened")
            }
        }
    }

    fn jinja_renderer<'a>(&'a self, jinja: &'a Jinja, conversation: &'a Conversation) -> Box<Render<'a>> {
        let full = self.named.as_ref().is_none_or(|named| named.reasoning);
        let messages: Vec<Value> =
            conversation.messages.iter().map(|message| Value::from(Serde(&message.to_value(full)))).collect();
        let shared = self.shared_variables(conversation);
        Box::new(move |count, prompt| {
            let mut variables = shared.clone();
            variables.insert("messages", Value::from(messages[..count].to_vec()));
            variables.insert("add_generation_prompt", Value::from(prompt));
            jinja
                .render(Value::from(variables))
                .map_err(|message| RowError { reason: DropReason::Template, message })
        })
    }

    fn shared_variables<'a>(&'a self, conversation: &'a Conversation) -> BTreeMap<&'a str, Value> {
        let mut variables = BTreeMap::new();
        let special = &self.special;
        for (name, token) in
            [("bos_token", &special.bos), ("eos_token", &special.eos), ("pad_token", &special.pad)]
        {
            variables.extend(token.as_ref().map(|token| (name, Value::from(token))));
        }
        let thinking = self.named.as_ref().and_then(|named| named.enable_thinking);
        variables.extend(thinking.map(|thinking| ("enable_thinking", Value::from(thinking))));
        for (name, value) in self.variables.iter().chain(&conversation.variables) {
            variables.insert(name, Value::from(Serde(value)));
        }
        let tools = conversation.tools.as_ref();
        variables.insert("tools", tools.map_or(Value::from(()), |tools| Value::from(Serde(tools))));
        variables
    }

    /// Renders messages that are no row's, for learning how the template writes turns.
    fn probe(&self, conversation: &Conversation, prompt: bool) -> Option<String> {
        let text = self.renderer(conversation)(conversation.messages.len(), prompt).ok()?;
        Some(self.unmark(conversation, text).ok()?.0)
    }

    fn public(&self, error: &RowError) -> Error {
        let origin = if self.named.is_some() { "the named template" } else { "the target" };
        Error::Template { origin: origin.to_owned(), message: format!("{}: {}", error.reason, error.message) }
    }
}

fn named(options: &TemplateOptions) -> Result<Option<NamedTemplate>> {
    if let Some(inline) = &options.inline {
        let failed = |message: &str| Error::Template {
            origin: "[data.template.inline]".to_owned(),
            message: message.to_owned(),
        };
        if options.name.is_some() {
            return Err(failed("there is data.template.name too; one alone can say how turns are found"));
        }
        return inline.incomplete().map_or_else(|| Ok(Some(inline.clone())), |problem| Err(failed(problem)));
    }
    let Some(name) = &options.name else { return Ok(None) };
    let mut table = named_templates(options.table.as_deref())?;
    let known = table.keys().cloned().collect::<Vec<_>>().join(", ");
    table.remove(name).map(Some).ok_or_else(|| Error::UnknownTemplate { name: name.clone(), known })
}

fn date(options: &TemplateOptions) -> Result<Date> {
    let Some(date) = &options.date else { return Ok(Date::default()) };
    date.parse().map_err(|_| Error::Setting {
        name: "date",
        expected: "a day as YYYY-MM-DD",
        got: date.clone(),
    })
}

fn identity(
    sources: &sources::Sources,
    named: Option<&NamedTemplate>,
    today: Date,
    options: &TemplateOptions,
) -> String {
    let parts =
        serde_json::json!([sources.usual, sources.tools, named, today.to_string(), options.variables]);
    blake3::hash(parts.to_string().as_bytes()).to_hex().to_string()
}
