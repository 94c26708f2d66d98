//! Whether an engine will serve exactly the draft that a folder holds.
//!
//! SGLang ignores tensors it has no place for and leaves places without a tensor uninitialised, both
//! without a word; a wrong flag serves another model than was trained. Each rule here stands for one way
//! in which a folder loads and then drafts badly, or does not load at all.

mod config;
mod files;
mod tensors;

use std::fmt;
use std::path::Path;

use crate::eagle3::{Eagle3Config, open_weights};
use crate::target::{TargetConfig, read_json};

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Everything that is wrong, config before tensors.
    pub problems: Vec<Problem>,
    /// What `config.json` says, if it can be understood.
    pub config: Option<Eagle3Config>,
    /// Number of tensors in the files.
    pub tensors: usize,
    /// Number of elements of all tensors.
    pub elements: usize,
}

/// One thing that is wrong with a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Whether it can be served all the same.
    pub severity: Severity,
    /// The key, tensor or file.
    pub about: String,
    /// What is wrong: expected, got, and what follows from it.
    pub what: String,
    /// What to do; empty when `what` says so.
    pub fix: String,
}

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Served, but not everywhere, or it looks unintended.
    Warning,
    /// Not served, or another model is served than was trained.
    Error,
}

/// Checks the EAGLE3 or EAGLE3.1 folder `folder`, of whatever origin.
///
/// With the folder of the target also what has to agree with it is checked. Nothing is an `Err`: a folder
/// that cannot be read is a [`Problem`] like any other.
pub fn check(folder: &Path, target: Option<&Path>) -> Report {
    match target.map(|path| TargetConfig::open(path).map(|target| (path, target))).transpose() {
        Ok(target) => check_against(folder, target.as_ref().map(|(path, target)| (*path, target))),
        Err(error) => {
            let mut report = check_against(folder, None);
            report.problems.insert(0, Problem::unreadable("the target", &error));
            report
        }
    }
}

/// [`check()`] with a target that has been read.
pub(crate) fn check_against(folder: &Path, target: Option<(&Path, &TargetConfig)>) -> Report {
    let mut report = Report::default();
    report.problems.extend(files::problems(folder));
    let path = folder.join("config.json");
    match read_json(&path) {
        Err(error) => report.problems.push(Problem::unreadable("config.json", &error)),
        Ok(raw) => {
            let (problems, config) = config::problems(&path, &raw, target.map(|(_, target)| target));
            report.problems.extend(problems);
            report.config = config;
        }
    }
    match open_weights(folder) {
        Err(error) => report.problems.push(Problem::unreadable("weights", &error)),
        Ok(weights) => {
            let sizes = weights
                .names()
                .filter_map(|name| weights.get(name))
                .map(|view| view.shape.iter().product::<usize>());
            (report.tensors, report.elements) = sizes.fold((0, 0), |(n, sum), size| (n + 1, sum + size));
            if let Some(config) = &report.config {
                report.problems.extend(tensors::problems(config, &weights));
            }
        }
    }
    report
}

impl Report {
    /// Whether nothing stands against serving the folder.
    pub fn is_servable(&self) -> bool {
        self.errors().next().is_none()
    }

    /// The problems that stand against serving the folder.
    pub fn errors(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter().filter(|problem| problem.severity == Severity::Error)
    }
}

impl Problem {
    fn error(about: impl Into<String>, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { severity: Severity::Error, about: about.into(), what: what.into(), fix: fix.into() }
    }

    fn warning(about: impl Into<String>, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(about, what, fix) }
    }

    fn unreadable(about: &str, error: &crate::Error) -> Self {
        Self::error(about, error.to_string(), "")
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        write!(f, "{severity}: {}: {}", self.about, self.what)?;
        if self.fix.is_empty() { Ok(()) } else { write!(f, "; {}", self.fix) }
    }
}
