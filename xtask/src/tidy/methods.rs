//! Every draft method has a recipe that uses it and a golden test that proves it.

use super::{Violation, crate_of, extension, violation};
use crate::files::RepoFile;

const LIST: &str = "crates/methods/src/lib.rs";

/// Holds the list of methods against recipes and tests.
pub(super) fn check(files: &[RepoFile]) -> Vec<Violation> {
    let Some(list) = files.iter().find(|file| file.path == LIST).and_then(|file| file.text.as_deref()) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for (line, name) in methods(list) {
        let table = format!("[method.{name}]");
        let recipe = |file: &&RepoFile| file.path.starts_with("recipes/") && has(file, &table);
        if !files.iter().any(|file| recipe(&file)) {
            found.push(violation(LIST, line, format!("method {name} has no recipe with {table}")));
        }
        if !files.iter().any(|file| is_golden_test(file, name)) {
            found.push(violation(
                LIST,
                line,
                format!("method {name} has no test with `golden` and its name"),
            ));
        }
    }
    found
}

/// The variants of `MethodConfig`, `Name(module::Config)`, with their lines.
fn methods(list: &str) -> Vec<(usize, &str)> {
    let variant = |line: &'_ str| -> Option<usize> {
        let (name, inner) = line.strip_prefix("    ")?.split_once('(')?;
        let single = name.chars().all(char::is_alphanumeric) && name.starts_with(char::is_uppercase);
        (single && inner.ends_with("::Config),")).then_some(name.len() + "    (".len())
    };
    let numbered = list.lines().enumerate();
    numbered
        .skip_while(|(_, line)| !line.starts_with("pub enum MethodConfig"))
        .take_while(|(_, line)| *line != "}")
        .filter_map(|(index, line)| {
            let name = line.get(variant(line)?..)?.strip_suffix("::Config),")?;
            Some((index + 1, name))
        })
        .collect()
}

fn is_golden_test(file: &RepoFile, name: &str) -> bool {
    let test = |line: &str| {
        let name_of = line.trim_start().strip_prefix("fn ").unwrap_or_default();
        name_of.split('(').next().is_some_and(|function| function.contains("golden"))
    };
    let of_method = crate_of(&file.path).is_some() && extension(&file.path) == "rs" && has(file, name);
    let mut lines = file.text.iter().flat_map(|text| text.lines());
    of_method && (lines.any(test) || file.path.contains("golden"))
}

fn has(file: &RepoFile, text: &str) -> bool {
    file.text.as_ref().is_some_and(|content| content.contains(text))
}
