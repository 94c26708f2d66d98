//! The way from a recipe file to a plan, and every value of it with its origin.

use std::path::{Path, PathBuf};

use crate::error::{Error, Place, Problem, Result};
use crate::identity::flatten;
use crate::plan::RunPlan;
use crate::provenance::{Origin, Provenance};
use crate::read::{Reading, read};
use crate::resolve::resolve;
use crate::run::RunConfig;
use crate::text::Text;

/// A recipe that can be run.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// What was written, over the defaults.
    pub config: RunConfig,
    /// What it resolves to.
    pub plan: RunPlan,
    /// Where every value comes from.
    pub provenance: Provenance,
    /// The recipe file.
    pub path: PathBuf,
}

/// One value of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The key, dotted, as `train.optimizer.lr`.
    pub key: String,
    /// The resolved value as JSON.
    pub value: String,
    /// Where it comes from.
    pub origin: Origin,
}

impl Recipe {
    /// Reads the recipe at `path`, with `--set` arguments `path=value` over it, the later ones winning. A value that is
    /// not TOML is taken as text. Relative paths in the recipe start at `directory`, the current one.
    pub fn load(path: &Path, sets: &[String], directory: &Path) -> Result<Self> {
        let bytes = fs_err::read(path)?;
        match String::from_utf8(bytes) {
            Ok(text) => Self::parse(path, text, sets, directory),
            Err(error) => {
                let message = format!(
                    "expected UTF-8 text, got other bytes from byte {}",
                    error.utf8_error().valid_up_to()
                );
                let problem = Problem { key: String::new(), place: None, message, hint: None };
                Err(Error::Recipe { path: path.to_owned(), problems: vec![problem] })
            }
        }
    }

    /// The same for the text of a recipe; `path` is only named in problems.
    pub fn parse(path: &Path, text: String, sets: &[String], directory: &Path) -> Result<Self> {
        let text = Text::new(path, text, sets);
        let fail = |mut problems: Vec<Problem>| {
            sort(&mut problems);
            Error::Recipe { path: path.to_owned(), problems }
        };
        let Reading { config, provenance, mut problems, attempted } = read(&text).map_err(fail)?;
        let (plan, found) = resolve(config.clone(), &provenance, directory);
        problems.extend(found.into_iter().filter(|problem| !attempted.contains(&problem.key)));
        match plan {
            Some(plan) if problems.is_empty() => Ok(Self { config, plan, provenance, path: path.to_owned() }),
            _ => Err(fail(problems)),
        }
    }

    /// Every value of the plan with its origin, by key.
    pub fn settings(&self) -> Vec<Setting> {
        let plan = serde_json::to_value(&self.plan).expect("a plan is plain data with text keys");
        let setting = |(key, value): (String, serde_json::Value)| Setting {
            origin: self.provenance.origin(written(&key)),
            value: value.to_string(),
            key,
        };
        flatten(&plan).into_iter().map(setting).collect()
    }
}

/// The key of a recipe that decides a value of the plan.
fn written(key: &str) -> &str {
    match key {
        "run-dir" => "output-dir",
        "store.shard-bytes" => "store.shard-mib",
        key => key,
    }
}

/// In the order of the file; then `--set` arguments; then what is missing.
pub(crate) fn sort(problems: &mut [Problem]) {
    problems.sort_by_key(|problem| match &problem.place {
        Some(Place::File { line, column, .. }) => (0, *line, *column),
        Some(Place::Set { .. }) => (1, 0, 0),
        None => (2, 0, 0),
    });
}
