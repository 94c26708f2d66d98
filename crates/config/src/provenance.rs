//! Where every value of a recipe comes from: a line of the file, a `--set` argument, or the default.

use std::collections::BTreeMap;
use std::fmt;

use toml::de::{DeTable, DeValue};

use crate::error::Place;
use crate::text::Text;

/// Where each key that was written stands.
#[derive(Debug, Clone, Default)]
pub struct Provenance {
    places: BTreeMap<String, Place>,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of the recipe file, from 1.
    Line(usize),
    /// A `--set` argument.
    Set,
    /// Nobody set it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Set => f.write_str("--set"),
            Self::Default => f.write_str("default"),
        }
    }
}

impl Provenance {
    pub(crate) fn of(text: &Text, tree: &DeTable<'_>) -> Self {
        let mut places = BTreeMap::new();
        collect(text, tree, "", &mut places);
        Self { places }
    }

    /// Where a key was written, as `train.optimizer.lr`.
    pub fn place(&self, key: &str) -> Option<&Place> {
        self.places.get(key)
    }

    /// Where the value of a key comes from.
    pub fn origin(&self, key: &str) -> Origin {
        match self.place(key) {
            Some(Place::File { line, .. }) => Origin::Line(*line),
            Some(Place::Set { .. }) => Origin::Set,
            None => Origin::Default,
        }
    }
}

fn collect(text: &Text, tree: &DeTable<'_>, parent: &str, places: &mut BTreeMap<String, Place>) {
    for (key, value) in tree {
        let path = if parent.is_empty() { key.to_string() } else { format!("{parent}.{key}") };
        // The value's place, since problems of range are about the value; a table's is its key.
        let span = match value.get_ref() {
            DeValue::Table(below) => {
                collect(text, below, &path, places);
                key.span()
            }
            _ => value.span(),
        };
        places.insert(path, text.place(&span));
    }
}
