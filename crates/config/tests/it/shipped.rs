//! The recipes of the repository.

use std::path::Path;

use specforge_config::Recipe;

#[test]
fn all_of_them_resolve() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut names = Vec::new();
    for entry in fs_err::read_dir(root.join("recipes")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let recipe = Recipe::load(&path, &[], &root).unwrap_or_else(|error| panic!("{error}"));
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        assert_eq!(recipe.plan.name, stem, "a recipe's run is named after its file");
        let text = fs_err::read_to_string(&path).unwrap();
        assert!(text.starts_with("# "), "{stem}: the header comment says what to expect");
        names.push(stem);
    }
    names.sort();
    assert!(names.contains(&"quickstart".to_owned()), "{names:?}");
}
