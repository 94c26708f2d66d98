//! The rules of the repository that no compiler checks. ARCHITECTURE.md says why they are there.

mod layers;
mod methods;
mod source;
#[cfg(test)]
mod tests;
mod tree;

use std::fmt;

use crate::files::RepoFile;

/// Lines of a source file above which it is listed.
pub(crate) const LONG: usize = 400;
/// Lines that no source file may exceed.
pub(crate) const TOO_LONG: usize = 800;

/// One place that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Violation {
    pub(crate) path: String,
    /// From 1; 0 for the file as a whole.
    pub(crate) line: usize,
    pub(crate) message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line.max(1), self.message)
    }
}

/// What the check found.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) violations: Vec<Violation>,
    /// Source files of more than [`LONG`] lines, the longest first.
    pub(crate) long: Vec<(String, usize)>,
}

/// Holds all rules against all files.
pub(crate) fn check(files: &[RepoFile]) -> Report {
    let mut report = Report::default();
    for file in files {
        report.violations.extend(tree::check(file));
        let Some(text) = &file.text else { continue };
        if file.path.ends_with("Cargo.toml") {
            report.violations.extend(layers::check(&file.path, text));
        }
        if extension(&file.path) == "rs" {
            report.violations.extend(source::check(&file.path, text));
            let lines = text.lines().count();
            if lines > LONG {
                report.long.push((file.path.clone(), lines));
            }
        }
    }
    report.violations.extend(methods::check(files));
    report.violations.sort();
    report.long.sort_by_key(|(_, lines)| std::cmp::Reverse(*lines));
    report
}

/// What follows the last dot of a path.
fn extension(path: &str) -> &str {
    path.rsplit_once('.').map_or("", |(_, extension)| extension)
}

/// The crate a path belongs to, as `tensor` for `crates/tensor/src/lib.rs`.
fn crate_of(path: &str) -> Option<&str> {
    path.strip_prefix("crates/")?.split('/').next()
}

fn violation(path: &str, line: usize, message: impl Into<String>) -> Violation {
    Violation { path: path.to_owned(), line, message: message.into() }
}
