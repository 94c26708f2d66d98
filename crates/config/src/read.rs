//! From text to [`RunConfig`]: every problem is found, not the first alone.
//!
//! serde stops at the first problem. So the entry that it stops at is noted, taken out of the tree, and the rest is
//! read again, until nothing is left to complain about.

use std::collections::BTreeSet;
use std::ops::Range;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

use crate::error::Problem;
use crate::provenance::Provenance;
use crate::reference;
use crate::run::RunConfig;
use crate::text::Text;

/// What could be read of a recipe.
#[derive(Debug)]
pub(crate) struct Reading {
    /// The values that could be read; defaults in the place of the others.
    pub(crate) config: RunConfig,
    pub(crate) provenance: Provenance,
    pub(crate) problems: Vec<Problem>,
    /// Keys that were meant but could not be read: that they are missing need not be said.
    pub(crate) attempted: BTreeSet<String>,
}

/// Reads a recipe. Text that is not TOML is not read at all.
pub(crate) fn read(text: &Text) -> Result<Reading, Vec<Problem>> {
    let mut tree = text.parse()?;
    let mut problems = Vec::new();
    let mut attempted = BTreeSet::new();
    loop {
        let error = match RunConfig::deserialize(Deserializer::from(tree.clone())) {
            Ok(config) => {
                let provenance = Provenance::of(text, tree.get_ref());
                return Ok(Reading { config, provenance, problems, attempted });
            }
            Err(error) => error,
        };
        let Some(keys) = error.span().and_then(|span| locate(tree.get_ref(), &span)) else {
            problems.push(problem(text, &error, "", &mut attempted));
            return Err(problems);
        };
        // What is wrong with the choice of the method concerns the one table that makes it.
        let method = keys.len() == 2 && keys[0] == "method";
        let keys = if method { &keys[..1] } else { &keys[..] };
        problems.push(problem(text, &error, &keys.join("."), &mut attempted));
        remove(tree.get_mut(), keys);
    }
}

/// The entry that a span belongs to: the one whose key or value it is, or the innermost whose value it is within.
fn locate(tree: &DeTable<'_>, span: &Range<usize>) -> Option<Vec<String>> {
    tree.iter().find_map(|(key, value)| {
        let here = key.get_ref().to_string();
        if let Some(mut below) = value.get_ref().as_table().and_then(|table| locate(table, span)) {
            below.insert(0, here);
            return Some(below);
        }
        let within = value.span().start <= span.start && span.end <= value.span().end;
        (key.span() == *span || within).then(|| vec![here])
    })
}

fn remove(tree: &mut DeTable<'_>, keys: &[String]) {
    match keys {
        [] => {}
        [key] => {
            tree.remove(key.as_str());
        }
        [key, rest @ ..] => {
            if let Some(DeValue::Table(below)) = tree.get_mut(key.as_str()).map(Spanned::get_mut) {
                remove(below, rest);
            }
        }
    }
}

/// serde's message in the words of a recipe.
fn problem(text: &Text, error: &toml::de::Error, key: &str, attempted: &mut BTreeSet<String>) -> Problem {
    let place = error.span().map(|span| text.place(&span));
    let (parent, name) = key.rsplit_once('.').unwrap_or(("", key));
    let message = error.message();
    let mut quoted = message.split('`').skip(1).step_by(2);
    let (message, hint) = if message.starts_with("unknown field") {
        let field = quoted.next().unwrap_or(name);
        let near = nearest(field, quoted);
        let meant = near.clone().unwrap_or_else(|| field.to_owned());
        attempted.insert(join(parent, &meant));
        (
            unknown_key(field, parent),
            near.map(|near| format!("did you mean `{near}`?")).or_else(|| elsewhere(field)),
        )
    } else if message.starts_with("unknown variant") {
        attempted.insert(key.to_owned());
        let variant = quoted.next().unwrap_or_default();
        let known: Vec<&str> = quoted.collect();
        let hint = nearest(variant, known.iter().copied()).map(|near| format!("did you mean `{near}`?"));
        let known = known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        (format!("`{key}` has no `{variant}`; expected one of {known}"), hint)
    } else {
        attempted.insert(key.to_owned());
        (format!("`{key}`: {}", plain(message)), None)
    };
    Problem { key: key.to_owned(), place, message, hint }
}

fn unknown_key(field: &str, parent: &str) -> String {
    match parent {
        "" => format!("unknown key `{field}`"),
        parent => format!("unknown key `{field}` in [{parent}]"),
    }
}

/// Where a key that is unknown here would be known.
fn elsewhere(field: &str) -> Option<String> {
    let tables: Vec<String> = reference::keys()
        .into_iter()
        .filter(|key| key.name == field)
        .map(|key| if key.table.is_empty() { "the top level".to_owned() } else { format!("[{}]", key.table) })
        .collect();
    (!tables.is_empty()).then(|| format!("`{field}` is a key of {}", tables.join(" and ")))
}

/// The known name that a word was meant to be, if one is near enough.
fn nearest<'n>(word: &str, known: impl Iterator<Item = &'n str>) -> Option<String> {
    let distance = |name: &str| strsim::damerau_levenshtein(word, name);
    let (name, best) = known.map(|name| (name, distance(name))).min_by_key(|(_, distance)| *distance)?;
    let contained = name.len() > 3 && word.len() > 3 && (name.contains(word) || word.contains(name));
    (best <= 1 + name.len() / 4 || contained).then(|| name.to_owned())
}

/// "invalid type: string "x", expected usize" without the words of Rust.
fn plain(message: &str) -> String {
    let Some((got, expected)) = message
        .strip_prefix("invalid ")
        .and_then(|m| m.split_once(": "))
        .and_then(|(_, m)| m.split_once(", expected "))
    else {
        return match message {
            "wanted exactly 1 element, found 0 elements" => {
                "expected one table in it, as [method.eagle3]".to_owned()
            }
            "wanted exactly 1 element, more than 1 element" => {
                "expected one table in it, got several".to_owned()
            }
            other => other.to_owned(),
        };
    };
    let expected = match expected {
        "usize" | "u64" | "u32" | "u16" => "a whole number, at least 0",
        "i64" | "i32" => "a whole number",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "a string" | "path string" => "text in quotes",
        "a sequence" => "a list",
        "newtype variant" => "a table, as [method.eagle3]",
        other if other.starts_with("struct ") => "a table",
        other => other,
    };
    format!(
        "expected {expected}, got {}",
        got.replace("unit variant", "text").replace("floating point", "number").replace("sequence", "a list")
    )
}

fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
}
