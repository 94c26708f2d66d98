//! Recipes: read, resolved, overridden, wrong in every way, shipped and documented.

mod identity;
mod inputs;
mod overrides;
mod problems;
mod reference;
mod resolved;
mod shipped;

use std::path::Path;

use specforge_config::{Error, Problem, Recipe, Result};

/// The least that a recipe says.
const LEAST: &str = r#"name = "tiny"
[target]
path = "model"
[data]
conversations = ["rows.jsonl"]
[method.eagle3]
"#;

fn parse(text: &str, sets: &[&str]) -> Result<Recipe> {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    Recipe::parse(Path::new("recipe.toml"), text.to_owned(), &sets, Path::new("/here"))
}

#[track_caller]
fn problems(text: &str, sets: &[&str]) -> Vec<Problem> {
    match parse(text, sets) {
        Err(Error::Recipe { problems, .. }) => problems,
        other => panic!("expected problems of the recipe, got {other:?}"),
    }
}
