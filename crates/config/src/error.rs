//! What can be wrong with a recipe, and where: every problem names its place and, where there is one, the way out.

use std::fmt;
use std::path::PathBuf;

/// The result of a call into this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong while a recipe is read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The recipe file cannot be read.
    #[error("recipe cannot be read")]
    Io(#[from] std::io::Error),
    /// The recipe cannot be used: all problems found, in the order of the file.
    #[error("{}", list(path, problems))]
    Recipe {
        /// The recipe file.
        path: PathBuf,
        /// At least one.
        problems: Vec<Problem>,
    },
    /// A saved plan cannot be read back.
    #[error("{}: not a plan of this version", path.display())]
    Plan {
        /// The plan file.
        path: PathBuf,
        /// Key and reason.
        source: serde_json::Error,
    },
}

/// One problem of a recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key it is about, dotted, as `train.optimizer.lr`.
    pub key: String,
    /// Where it stands; absent for a key that is missing.
    pub place: Option<Place>,
    /// What is wrong: expected and got.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the recipe file.
    File {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// Characters to underline, at least 1.
        width: usize,
        /// The whole line.
        text: String,
    },
    /// In a `--set` argument.
    Set {
        /// The argument, `path=value`.
        argument: String,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line, column, .. } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Set { argument } => write!(f, "--set {argument}"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.message)?;
        if let Some(Place::File { line, column, width, text, .. }) = &self.place {
            let gutter = " ".repeat(line.to_string().len());
            // Tabs stay tabs, so that the mark stands below what it marks.
            let indent: String =
                text.chars().take(column - 1).map(|c| if c == '\t' { c } else { ' ' }).collect();
            write!(f, "\n  {line} | {text}\n  {gutter} | {indent}{}", "^".repeat(*width))?;
        }
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

fn list(path: &std::path::Path, problems: &[Problem]) -> String {
    let blocks: Vec<String> = problems.iter().map(ToString::to_string).collect();
    let count = match problems.len() {
        1 => "1 problem".to_owned(),
        n => format!("{n} problems"),
    };
    format!("{}: {count}\n\n{}", path.display(), blocks.join("\n\n"))
}
