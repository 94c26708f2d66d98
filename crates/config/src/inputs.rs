//! Whether the files and folders that a recipe names are there, before anything starts.

use std::path::Path;

use crate::error::{Error, Problem, Result};
use crate::recipe::{Recipe, sort};

impl Recipe {
    /// Fails with all inputs that are missing: target, conversations, template table, prompts, draft to start from.
    /// Folders that a run makes are not inputs, nor is the store, which says itself what is wrong with it.
    pub fn check_inputs(&self) -> Result<()> {
        let plan = &self.plan;
        let mut problems = Vec::new();
        let mut need = |key: &str, path: &Path, folder: bool| {
            let there = if folder { path.is_dir() } else { path.is_file() };
            if !there {
                problems.push(self.absent(key, path, folder));
            }
        };
        need("target.path", &plan.target.path, true);
        if let Some(path) = &plan.data.template.table {
            need("data.template.table", path, false);
        }
        if let Some(path) = &plan.data.template.file {
            need("data.template.file", path, false);
        }
        if let Some(path) = &plan.train.warm_start {
            need("train.warm-start", path, true);
        }
        if let Some(path) = &plan.eval.prompts {
            need("eval.prompts", path, false);
        }
        for source in &plan.data.conversations {
            match source.files() {
                Ok(_) => {}
                Err(specforge_data::Error::Io(_)) => {
                    problems.push(self.absent("data.conversations", &source.path, false));
                }
                Err(error) => problems.push(self.problem("data.conversations", error.to_string(), None)),
            }
        }
        sort(&mut problems);
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Recipe { path: self.path.clone(), problems })
    }

    fn absent(&self, key: &str, path: &Path, folder: bool) -> Problem {
        let kind = if folder { "folder" } else { "file" };
        let hint = "relative paths start at the current directory; run from the repository root for the shipped recipes";
        let message = format!("`{key}`: there is no {kind} {}", path.display());
        self.problem(key, message, Some(hint.to_owned()))
    }

    fn problem(&self, key: &str, message: String, hint: Option<String>) -> Problem {
        Problem { key: key.to_owned(), place: self.provenance.place(key).cloned(), message, hint }
    }
}
