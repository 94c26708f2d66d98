//! Inputs that are not there.

use specforge_config::{Error, Recipe};

use crate::LEAST;

#[test]
fn all_missing_inputs_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recipe.toml");
    fs_err::write(&path, LEAST).unwrap();
    let recipe = Recipe::load(&path, &["eval.prompts=p.txt".to_owned()], folder.path()).unwrap();
    let Err(Error::Recipe { problems, .. }) = recipe.check_inputs() else { panic!("inputs are missing") };
    let keys: Vec<&str> = problems.iter().map(|problem| &*problem.key).collect();
    assert_eq!(keys, ["target.path", "data.conversations", "eval.prompts"]);
    assert!(
        problems[0].to_string().contains("recipe.toml:3:8: `target.path`: there is no folder"),
        "{}",
        problems[0]
    );

    fs_err::create_dir(folder.path().join("model")).unwrap();
    for file in ["rows.jsonl", "p.txt"] {
        fs_err::write(folder.path().join(file), "").unwrap();
    }
    recipe.check_inputs().unwrap();
}

#[test]
fn a_recipe_that_is_not_there_or_not_text_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recipe.toml");
    let error = Recipe::load(&path, &[], folder.path()).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("recipe.toml"), "{cause}");
    fs_err::write(&path, [b'a', 0xff]).unwrap();
    let error = Recipe::load(&path, &[], folder.path()).unwrap_err().to_string();
    assert!(error.contains("expected UTF-8 text, got other bytes from byte 1"), "{error}");
}
