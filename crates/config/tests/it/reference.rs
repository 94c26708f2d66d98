//! The generated manual.

use specforge_config::reference::{keys, page};

#[test]
fn every_key_is_documented_and_its_kind_known() {
    let keys = keys();
    assert!(keys.len() > 60, "{} keys", keys.len());
    for key in &keys {
        let (table, name) = (key.table, &key.name);
        assert!(key.meaning.len() > 10, "[{table}] {name} has no comment");
        assert!(!key.kind.contains('?'), "[{table}] {name}: reference.rs has no word for its type");
    }
}

/// Every key that serde writes is on the page, so that a new table cannot be forgotten.
#[test]
fn every_key_of_the_config_is_there() {
    let documented: Vec<String> = keys().iter().map(|key| format!("{}.{}", key.table, key.name)).collect();
    let config = serde_json::to_value(specforge_config::RunConfig::default()).unwrap();
    for (key, value) in config.as_object().unwrap() {
        if key == "method" {
            continue;
        }
        let Some(table) = value.as_object() else {
            assert!(documented.contains(&format!(".{key}")), "{key}");
            continue;
        };
        for (name, value) in table {
            let path = format!("{key}.{name}");
            // A table of its own, filled or absent.
            let below = || documented.iter().any(|key| key.starts_with(&format!("{path}.")));
            let known = documented.contains(&path) || ((value.is_object() || value.is_null()) && below());
            assert!(known, "{path} is not in the reference");
        }
    }
}

#[test]
fn defaults_and_choices_are_shown() {
    let page = page();
    for expected in [
        "| `seed` | whole number | `42` |",
        "| `mode` | `\"online\"`, `\"offline\"`, `\"cache\"` | `\"online\"` |",
        "| `ttt-steps` | whole number | `7` |",
        "| `max-steps` | whole number |  |",
        "| `lr` | number | `1e-4` |",
        "| `encoding` | `\"bf16\"`, `\"fp8\"`, `\"lossless\"` | `\"bf16\"` |",
    ] {
        assert!(page.contains(expected), "{expected} is not on the page:\n{page}");
    }
}

#[test]
fn the_page_in_the_repository_is_fresh() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/recipe.md");
    let written = fs_err::read_to_string(path).unwrap();
    assert!(written == page(), "docs/reference/recipe.md is stale: run `cargo xtask gen`");
}
