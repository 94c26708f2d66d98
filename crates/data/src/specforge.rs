//! Loss masks as SpecForge makes them, to the token, for comparing runs: `data.mask-compat = "specforge"`.
//!
//! It differs from ours in what it searches for (the tables `specforge` of `named.toml`), in the end of a text (a
//! newline there is left out), and in how bytes become tokens: it counts the tokens of every prefix that ends at an
//! edge, which are not those of the whole text where a token crosses the edge.

use std::ops::Range;

use crate::error::Result;
use crate::named::{NamedTemplate, Spans, SpecforgeStrings};
use crate::tokenizer::{Encoded, Tokenizer};

/// What SpecForge searches for in texts of one template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Search {
    header: String,
    after_header: Vec<String>,
    end_of_turn: Vec<String>,
    ignore: Vec<String>,
    rounds: bool,
    harmony: bool,
}

const HARMONY_USER: &str = "<|start|>user<|message|>";

impl Search {
    /// `None` for the templates that SpecForge itself fails on.
    pub(crate) fn of(template: &NamedTemplate) -> Option<Self> {
        let own = template.specforge.clone().unwrap_or_default();
        let SpecforgeStrings { assistant_header, after_header, end_of_turn, ignore, rounds } = own;
        let search = Self {
            header: assistant_header.unwrap_or_else(|| template.assistant_header.clone()),
            after_header,
            end_of_turn: end_of_turn.unwrap_or_else(|| template.end_of_turn.clone()),
            ignore: ignore.unwrap_or_else(|| template.ignore.clone()),
            rounds,
            harmony: template.harmony,
        };
        (search.harmony || search.rounds || !search.end_of_turn.is_empty()).then_some(search)
    }

    /// The header that begins a turn.
    pub(crate) fn header(&self) -> &str {
        &self.header
    }

    /// The turns, ends of turn included, and what is ignored.
    pub(crate) fn find(&self, text: &str) -> Spans {
        let mut spans = Spans::default();
        let mut from = 0;
        while let Some(at) = text[from..].find(&self.header) {
            let mut start = from + at + self.header.len();
            let rest = &text[start..];
            start += self.after_header.iter().find(|more| rest.starts_with(*more)).map_or(0, String::len);
            from = self.end(text, start);
            spans.turns.push(start..from);
        }
        let found = |ignored: &'_ String| -> Vec<Range<usize>> {
            text.match_indices(ignored.as_str()).map(|(at, found)| at..at + found.len()).collect()
        };
        spans.ignored = self.ignore.iter().flat_map(found).collect();
        spans
    }

    /// The nearest end of a turn that starts at `start`. The end of the text counts before a newline that is its last
    /// character, as `$` does in a regular expression of Python.
    fn end(&self, text: &str, start: usize) -> usize {
        let rest = &text[start..];
        let last = if rest.ends_with('\n') { rest.len() - 1 } else { rest.len() };
        let nearest = if self.harmony {
            rest.find(HARMONY_USER).map(|at| (at, at))
        } else if self.rounds {
            rest.match_indices("[Round ").find_map(|(at, _)| Some((at, at + round(&rest[at..])?)))
        } else {
            let ends = self.end_of_turn.iter();
            ends.filter_map(|end| rest.find(end.as_str()).map(|at| (at, at + end.len()))).min()
        };
        start + nearest.filter(|&(at, _)| at <= last).map_or(last, |(_, end)| end)
    }

    /// One byte per token, 1 where supervised; `encoded` may be cut off.
    pub(crate) fn loss_mask(
        &self,
        text: &str,
        encoded: &Encoded,
        spans: &Spans,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<u8>> {
        let mut mask = vec![0; encoded.ids.len()];
        if self.harmony {
            for (bit, token) in mask.iter_mut().zip(&encoded.offsets) {
                *bit = u8::from(
                    spans.turns.iter().any(|turn| turn.start <= token.start && token.end <= turn.end),
                );
            }
            return Ok(mask);
        }
        for (ranges, bit) in [(&spans.turns, 1), (&spans.ignored, 0)] {
            for range in ranges {
                let count =
                    |end: usize| Ok::<_, crate::Error>(tokenizer.count(&text[..end])?.min(mask.len()));
                let start = count(range.start)?;
                if start == mask.len() {
                    break;
                }
                let end = count(range.end)?;
                if start < end {
                    mask[start..end].fill(bit);
                }
            }
        }
        Ok(mask)
    }
}

/// Length of a `[Round 12] USER:` that `text` begins with.
fn round(text: &str) -> Option<usize> {
    let number = text.strip_prefix("[Round ")?;
    let digits = number.chars().take_while(|c| c.is_numeric()).map(char::len_utf8).sum::<usize>();
    let end = number.get(digits..)?.strip_prefix("] USER:").filter(|_| digits > 0)?;
    Some(text.len() - end.len())
}
