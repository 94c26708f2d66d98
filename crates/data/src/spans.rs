//! Finds the assistant turns in what a template renders, when nobody says how that template writes them.
//!
//! A turn is the difference between two renderings: of the messages before it with the generation prompt, and of
//! the messages up to and including it. Templates that rewrite the history (dropping earlier reasoning, for
//! example) break that, so a probe conversation also teaches the header and the end-of-turn text.

use std::ops::Range;

use crate::conversation::{Conversation, Message, RowError};
use crate::jinja::{GENERATION_END, GENERATION_START};
use crate::named::NamedTemplate;
use crate::report::{DropReason, SpanSource};

/// Renders the first so many messages of a conversation, with (`true`) or without generation prompt.
pub(crate) type Render<'a> = dyn Fn(usize, bool) -> Result<String, RowError> + 'a;

/// What a probe conversation taught about a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Markers {
    /// Header and end-of-turn text.
    pub(crate) template: NamedTemplate,
    /// Whether the template has a generation prompt.
    prompts: bool,
}

impl Markers {
    /// Whether the header is distinctive enough to be searched for in any text.
    pub(crate) fn can_search(&self) -> bool {
        let NamedTemplate { assistant_header, end_of_turn, .. } = &self.template;
        !assistant_header.trim().is_empty() && !end_of_turn[0].is_empty()
    }
}

/// Renders two short conversations and reads off how the template begins and ends an answer. `None` if it refuses
/// them or writes them in a way that shows no such thing.
pub(crate) fn learn(render: &dyn Fn(&Conversation, bool) -> Option<String>) -> Option<Markers> {
    const TURNS: [(&str, &str, &str); 4] = [
        ("user", "QxQone", ""),
        ("assistant", "AxAone", "RxRone"),
        ("user", "QxQtwo", ""),
        ("assistant", "AxAtwo", "RxRtwo"),
    ];
    let (asked, answered, reasoned) = (TURNS[0].1, TURNS[1].1, TURNS[1].2);
    let probe = |count: usize, prompt: bool, reasons: bool| {
        let message = |(role, text, thought): (&str, &str, &str)| Message {
            reasoning_content: (reasons && !thought.is_empty()).then(|| thought.to_owned()),
            ..Message::new(role, text)
        };
        let messages = TURNS[..count].iter().copied().map(message).collect();
        render(&Conversation { messages, ..Conversation::default() }, prompt)
    };
    let first = |count: usize, prompt: bool| probe(count, prompt, false);
    let (question, prompt, one, two) =
        (first(1, false)?, first(1, true)?, first(2, false)?, first(4, false)?);
    // Only what follows the question is compared: what precedes it may depend on the whole conversation.
    let (_, after_question) = question.split_once(asked)?;
    let (_, after_prompt) = prompt.split_once(asked)?;
    let (before_answer, after_one) = one.split_once(asked)?.1.split_once(answered)?;
    let (before_past_answer, after_two) = two.split_once(asked)?.1.split_once(answered)?;
    // Where reasoning stands, what precedes it; a template may refuse it or leave it out.
    let reasoning = [2, 4].map(|count| {
        let text = probe(count, false, true)?;
        Some(text.split_once(asked)?.1.split_once(reasoned)?.0.to_owned())
    });
    let end_of_turn = common_tags(after_one, after_two);
    let question_end = common_tags(after_question, before_answer);
    // What the last answer, a past one, one with reasoning and the prompt all begin with is the header; the rest is the
    // beginning of a thought, or an empty one.
    let answers = common_prefix(before_answer, before_past_answer);
    let answers = reasoning.iter().flatten().fold(answers, |all, other| common_prefix(all, other));
    let header = answers.strip_prefix(question_end)?;
    let prompts = prompt != question;
    // Nothing says that a prompt would open the thought, so the answer does.
    let header = if prompts { header } else { header.trim_end().strip_suffix("<think>").unwrap_or(header) };
    let generation_prompt = if prompts { after_prompt.strip_prefix(question_end)? } else { header };
    let header = common_prefix(header, generation_prompt);
    let template = NamedTemplate::from_markers(header, &generation_prompt[header.len()..], end_of_turn);
    Some(Markers { template, prompts })
}

/// The assistant turns of `text`, the rendering of all messages.
pub(crate) fn from_renderings(
    text: &str,
    messages: &[Message],
    render: &Render<'_>,
    markers: Option<&Markers>,
) -> Result<(Vec<Range<usize>>, SpanSource), RowError> {
    if let Some(turns) = incremental(text, messages, render, markers) {
        return Ok((turns, SpanSource::Incremental));
    }
    let expected = messages.iter().filter(|message| message.is_assistant()).count();
    let found =
        markers.filter(|markers| markers.can_search()).map(|markers| markers.template.find(text).turns);
    match found {
        Some(turns) if turns.len() == expected => Ok((turns, SpanSource::LearnedHeader)),
        found => Err(RowError {
            reason: DropReason::SpansNotFound,
            message: format!(
                "the template rewrites earlier turns, or there are too many; and its assistant header is found {} times in the text of {expected} \
                 assistant turns; name a template in the recipe",
                found.map_or(0, |turns| turns.len())
            ),
        }),
    }
}

/// Rendering turn by turn writes every beginning of a conversation: not where that would be more than this many bytes.
const MOST_RENDERED: usize = 256 << 20;

fn incremental(
    text: &str,
    messages: &[Message],
    render: &Render<'_>,
    markers: Option<&Markers>,
) -> Option<Vec<Range<usize>>> {
    let mut turns: Vec<Range<usize>> = Vec::new();
    // A message costs time even where a template writes nothing for it.
    let size = text.len() + 16 * messages.len();
    if messages.len().saturating_mul(size) > MOST_RENDERED {
        return None;
    }
    let assistant = messages.iter().enumerate().filter(|(_, message)| message.is_assistant());
    for (index, _) in assistant {
        let start = turn_start(text, index, render, markers)?;
        let end =
            turn_end(text, start, index + 1 == messages.len(), &|| render(index + 1, false).ok(), markers)?;
        let in_order = turns.last().is_none_or(|previous| previous.end <= start);
        if !in_order || end < start {
            return None;
        }
        turns.push(start..end);
    }
    Some(turns)
}

fn turn_start(text: &str, index: usize, render: &Render<'_>, markers: Option<&Markers>) -> Option<usize> {
    if markers.is_none_or(|markers| markers.prompts) {
        let prompt = render(index, true).ok()?;
        if text.starts_with(&prompt) {
            return Some(prompt.len());
        }
    }
    // No generation prompt, or one that differs from how past answers begin.
    let header = &markers?.template.assistant_header;
    let before = render(index, false).ok()?;
    let rest = text.strip_prefix(&before)?;
    rest.starts_with(header.as_str()).then(|| before.len() + header.len())
}

fn turn_end(
    text: &str,
    start: usize,
    is_last: bool,
    with_turn: &dyn Fn() -> Option<String>,
    markers: Option<&Markers>,
) -> Option<usize> {
    if is_last {
        return Some(text.len());
    }
    if let Some(prefix) = with_turn().filter(|prefix| text.starts_with(prefix.as_str())) {
        return Some(prefix.len());
    }
    let template = &markers.filter(|markers| markers.can_search())?.template;
    Some(template.end_of_turn_from(text, start))
}

/// Takes the generation marks out of a rendered text; gives the ranges that they enclosed.
pub(crate) fn strip_marks(text: &str) -> (String, Vec<Range<usize>>) {
    let mut stripped = String::with_capacity(text.len());
    let mut turns = Vec::new();
    let mut start = None;
    for character in text.chars() {
        match character {
            GENERATION_START => start = Some(stripped.len()),
            GENERATION_END => turns.extend(start.take().map(|start| start..stripped.len())),
            other => stripped.push(other),
        }
    }
    turns.extend(start.map(|start| start..stripped.len()));
    (stripped, turns)
}

/// The common prefix of what follows a turn in two texts. Where both go on, they may go on with different tags
/// that begin alike (`<|end|>`, `<|user|>`): a tag that only begins in the prefix is no part of it.
fn common_tags<'a>(a: &'a str, b: &str) -> &'a str {
    let prefix = common_prefix(a, b);
    let open = prefix.rfind(['<', '[']).filter(|&at| !prefix[at..].contains(['>', ']']));
    match open {
        Some(at) if prefix.len() < a.len() => &prefix[..at],
        _ => prefix,
    }
}

fn common_prefix<'a>(a: &'a str, b: &str) -> &'a str {
    let length = a.char_indices().zip(b.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
    // Without a difference the shorter text is the common prefix.
    &a[..length.unwrap_or(a.len().min(b.len()))]
}
