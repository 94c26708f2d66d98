//! Chat templates known by name: the strings that begin and end the turns. A data table, extended by a file of
//! the same form.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::conversation::Message;
use crate::error::{Error, Result};

/// The entries that come with the program.
const BUILT_IN: &str = include_str!("named.toml");

/// Strings of one chat template: how the turns of an assistant begin and end in a rendered text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NamedTemplate {
    /// Text that begins an assistant turn; what follows is supervised.
    pub assistant_header: String,
    /// Texts after the header that still belong to the prompt.
    #[serde(default)]
    pub after_header: Vec<String>,
    /// Text that begins a user turn.
    #[serde(default)]
    pub user_header: String,
    /// Texts that end a turn and are supervised with it.
    #[serde(default)]
    pub end_of_turn: Vec<String>,
    /// Texts that end a turn and are not supervised.
    #[serde(default)]
    pub stop: Vec<String>,
    /// Texts inside a turn that are not supervised.
    #[serde(default)]
    pub ignore: Vec<String>,
    /// System prompt of conversations that have none.
    #[serde(default)]
    pub default_system: Option<String>,
    /// Whether `reasoning_content`, `name` and `tool_call_id` reach the template.
    #[serde(default)]
    pub reasoning: bool,
    /// Value of the template variable `enable_thinking`, unless the row sets it.
    #[serde(default)]
    pub enable_thinking: Option<bool>,
    /// Rendered in the harmony format.
    #[serde(default)]
    pub harmony: bool,
    /// What SpecForge searches for, where that differs; read with `data.mask-compat`.
    #[serde(default)]
    pub specforge: Option<SpecforgeStrings>,
}

/// What SpecForge searches for in the texts of a template; what is absent is as in the entry itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct SpecforgeStrings {
    /// Text that begins an assistant turn.
    pub assistant_header: Option<String>,
    /// Texts after the header that still belong to the prompt.
    pub after_header: Vec<String>,
    /// Texts that end a turn and are supervised with it; an empty list: SpecForge cannot use the template.
    pub end_of_turn: Option<Vec<String>>,
    /// Texts that are not supervised.
    pub ignore: Option<Vec<String>>,
    /// A turn ends after the next `[Round n] USER:`.
    pub rounds: bool,
}

/// Supervised bytes of a text, and the bytes inside them that are not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spans {
    /// One range per assistant turn, ascending, without overlap.
    pub turns: Vec<Range<usize>>,
    /// Ranges to leave out.
    pub ignored: Vec<Range<usize>>,
}

/// The built-in templates, overlaid with those of `extension`, a TOML file of the same form.
pub fn named_templates(extension: Option<&Path>) -> Result<BTreeMap<String, NamedTemplate>> {
    let mut table = parse(BUILT_IN, "the built-in table")?;
    if let Some(path) = extension {
        table.extend(parse(&fs_err::read_to_string(path)?, &path.display().to_string())?);
    }
    Ok(table)
}

fn parse(text: &str, origin: &str) -> Result<BTreeMap<String, NamedTemplate>> {
    let table: BTreeMap<String, NamedTemplate> = toml::from_str(text)
        .map_err(|error| Error::Template { origin: origin.to_owned(), message: error.to_string() })?;
    match table.iter().find_map(|(name, template)| Some((name, template.incomplete()?))) {
        None => Ok(table),
        Some((name, message)) => {
            Err(Error::Template { origin: origin.to_owned(), message: format!("[{name}] {message}") })
        }
    }
}

impl NamedTemplate {
    /// A template that only knows how turns begin and end.
    pub(crate) fn from_markers(header: &str, after_header: &str, end_of_turn: &str) -> Self {
        Self {
            assistant_header: header.to_owned(),
            after_header: Some(after_header)
                .filter(|text| !text.is_empty())
                .map(str::to_owned)
                .into_iter()
                .collect(),
            user_header: String::new(),
            end_of_turn: vec![end_of_turn.to_owned()],
            stop: Vec::new(),
            ignore: Vec::new(),
            default_system: None,
            reasoning: true,
            enable_thinking: None,
            harmony: false,
            specforge: None,
        }
    }

    /// Finds the assistant turns in a rendered text. A turn without an end runs to the end of the text.
    pub fn find(&self, text: &str) -> Spans {
        let mut spans = Spans::default();
        let mut ends = Ends::of(self, text);
        let mut from = 0;
        while let Some(header) = text[from..].find(&self.assistant_header) {
            let mut start = from + header + self.assistant_header.len();
            let skipped = self.after_header.iter().find(|prefix| text[start..].starts_with(prefix.as_str()));
            start += skipped.map_or(0, String::len);
            from = ends.after(start);
            spans.turns.push(start..from);
        }
        for ignored in &self.ignore {
            spans
                .ignored
                .extend(text.match_indices(ignored.as_str()).map(|(at, found)| at..at + found.len()));
        }
        spans
    }

    /// Where the turn whose text starts at `start` ends: after the first end-of-turn text, before the first stop
    /// text, or at the end of the text.
    pub(crate) fn end_of_turn_from(&self, text: &str, start: usize) -> usize {
        Ends::of(self, text).after(start)
    }

    /// Writes a conversation without a Jinja template: begin token, system prompt, then header and content of
    /// each turn. Other roles have no form here and are left out.
    pub(crate) fn render_plain(&self, messages: &[Message], bos: &str, generation_prompt: bool) -> String {
        let mut text = bos.to_owned();
        for message in messages {
            match message.role.as_str() {
                "system" => text.push_str(&message.content),
                "user" => text.extend([self.user_header.as_str(), &message.content]),
                "assistant" => {
                    text.extend([self.assistant_header.as_str(), &message.content]);
                    text.push_str(self.end_of_turn.first().or(self.stop.first()).map_or("", String::as_str));
                }
                _ => {}
            }
        }
        if generation_prompt {
            text.push_str(&self.assistant_header);
        }
        text
    }

    /// What an entry lacks.
    pub fn incomplete(&self) -> Option<&'static str> {
        let all = [&self.after_header, &self.end_of_turn, &self.stop, &self.ignore];
        let ends = self.end_of_turn.len() + self.stop.len();
        let complete = ends > 0
            && !self.assistant_header.is_empty()
            && all.into_iter().flatten().all(|text| !text.is_empty());
        (!complete).then_some("needs an assistant-header and at least one end-of-turn or stop, none empty")
    }
}

/// The ends of turns in a text. Where each end occurs next is kept, so that a text of many turns is read once.
struct Ends<'t> {
    text: &'t str,
    /// The end, how much of it belongs to the turn, and where it was found last.
    ends: Vec<(&'t str, usize, usize)>,
}

impl<'t> Ends<'t> {
    fn of(template: &'t NamedTemplate, text: &'t str) -> Self {
        let next = |end: &str, from: usize| text[from..].find(end).map_or(text.len(), |at| from + at);
        let supervised = template.end_of_turn.iter().map(|end| (end.as_str(), end.len(), next(end, 0)));
        let stops = template.stop.iter().map(|end| (end.as_str(), 0, next(end, 0)));
        Self { text, ends: supervised.chain(stops).collect() }
    }

    /// The end of the turn that starts at `start`.
    fn after(&mut self, start: usize) -> usize {
        let text = self.text;
        for (end, _, at) in self.ends.iter_mut().filter(|(_, _, at)| *at < start) {
            *at = text[start..].find(*end).map_or(text.len(), |found| start + found);
        }
        let nearest = self.ends.iter().map(|(_, length, at)| (*at, *length)).min();
        nearest.map_or(text.len(), |(at, length)| (at + length).min(text.len()))
    }
}
