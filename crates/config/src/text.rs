//! The recipe's text: the file and the `--set` arguments, with one numbering of bytes over both, so that a span alone
//! tells where a value was written.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::{Place, Problem};

/// A recipe file and the `--set` arguments over it.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    path: PathBuf,
    file: String,
    sets: Vec<Set>,
}

/// One `--set` argument.
#[derive(Debug, Clone)]
struct Set {
    /// Its first byte in the numbering of all of the text.
    start: usize,
    argument: String,
    /// `path=value` as the TOML document it is, with line breaks in front that move its spans to `start`.
    document: String,
}

impl Text {
    pub(crate) fn new(path: &Path, file: String, arguments: &[String]) -> Self {
        let mut start = file.len() + 1;
        let mut sets = Vec::new();
        for argument in arguments {
            let document = format!("{}{}", "\n".repeat(start), document(argument));
            let end = document.len() + 1;
            sets.push(Set { start, argument: argument.clone(), document });
            start = end;
        }
        Self { path: path.to_owned(), file, sets }
    }

    /// Where these bytes stand.
    pub(crate) fn place(&self, span: &Range<usize>) -> Place {
        if let Some(set) = self.sets.iter().rev().find(|set| span.start >= set.start) {
            return Place::Set { argument: set.argument.clone() };
        }
        let start = floor(&self.file, span.start);
        let line_start = self.file[..start].rfind('\n').map_or(0, |at| at + 1);
        let text = self.file[line_start..].lines().next().unwrap_or_default();
        let end = floor(&self.file, span.end).min(line_start + text.len());
        Place::File {
            path: self.path.clone(),
            line: self.file[..line_start].matches('\n').count() + 1,
            column: self.file[line_start..start].chars().count() + 1,
            width: self.file.get(start..end).map_or(1, |marked| marked.chars().count().max(1)),
            text: text.to_owned(),
        }
    }

    /// Parses file and arguments; the arguments replace what the file says, later ones what earlier ones say.
    pub(crate) fn parse(&self) -> Result<Spanned<DeTable<'_>>, Vec<Problem>> {
        let (mut tree, errors) = DeTable::parse_recoverable(&self.file);
        let mut problems: Vec<Problem> = errors.iter().map(|error| self.syntax(error)).collect();
        for set in &self.sets {
            match DeTable::parse(&set.document) {
                Ok(table) => merge(tree.get_mut(), table.into_inner()),
                Err(_) => problems.push(not_an_assignment(&set.argument)),
            }
        }
        if problems.is_empty() { Ok(tree) } else { Err(problems) }
    }

    fn syntax(&self, error: &toml::de::Error) -> Problem {
        let place = error.span().map(|span| self.place(&span));
        Problem { key: String::new(), place, message: format!("not TOML: {}", error.message()), hint: None }
    }
}

fn not_an_assignment(argument: &str) -> Problem {
    Problem {
        key: String::new(),
        place: Some(Place::Set { argument: argument.to_owned() }),
        message: "expected path=value with a TOML value".to_owned(),
        hint: Some("write it as --set train.max-steps=100 or --set mode=offline".to_owned()),
    }
}

/// `path=value` is TOML. A value that is not is taken as text, so that the shell needs no second pair of quotes.
fn document(argument: &str) -> String {
    let bare = argument.split_once('=').filter(|(_, value)| {
        let value = value.trim();
        !value.is_empty() && !value.starts_with(['[', '{']) && !value.contains(['"', '\'', '\\', '\n'])
    });
    match bare {
        Some((path, value)) if DeTable::parse(argument).is_err() => format!("{path}=\"{}\"", value.trim()),
        _ => argument.to_owned(),
    }
}

/// The largest char boundary up to `at`.
fn floor(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

fn merge<'t>(under: &mut DeTable<'t>, over: DeTable<'t>) {
    for (key, value) in over {
        let span = value.span();
        let value = match (under.get_mut(&key).map(Spanned::get_mut), value.into_inner()) {
            (Some(DeValue::Table(below)), DeValue::Table(above)) => {
                merge(below, above);
                continue;
            }
            (_, value) => value,
        };
        // A map keeps the key it has, and with it the old place.
        under.remove(&key);
        under.insert(key, Spanned::new(span, value));
    }
}
