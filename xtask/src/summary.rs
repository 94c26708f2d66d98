//! What the README promises of the quick start, read from its `summary.json`.

use std::path::Path;

use serde_json::Value;

/// The acceptance length that the quick start has to reach.
const ACCEPTANCE_LENGTH: f64 = 1.6;

/// Fails unless the draft is good enough, nothing is lost, and the exported folder is there.
pub(crate) fn check(file: &Path) -> Result<(), String> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let summary: Value = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display()))?;
    let problems = problems(&summary);
    if problems.is_empty() {
        println!("quick start: acceptance length {}, {} s", summary["acceptance_length"], summary["seconds"]);
        return Ok(());
    }
    Err(format!("{}: {}", file.display(), problems.join("; ")))
}

fn problems(summary: &Value) -> Vec<String> {
    let number = |key: &str| summary[key].as_f64();
    let mut problems = Vec::new();
    if number("acceptance_length").is_none_or(|length| length < ACCEPTANCE_LENGTH) {
        problems
            .push(format!("acceptance_length {} is below {ACCEPTANCE_LENGTH}", summary["acceptance_length"]));
    }
    if number("acceptance_length_untrained").is_none_or(|length| length > 1.2) {
        problems.push(format!(
            "acceptance_length_untrained {} is not about 1",
            summary["acceptance_length_untrained"]
        ));
    }
    if summary["lossless"] != true {
        problems.push("lossless is not true".to_owned());
    }
    if summary["acceptance_per_position"].as_array().is_none_or(Vec::is_empty) {
        problems.push("acceptance_per_position is empty".to_owned());
    }
    for key in ["tokens_per_second", "steps", "seconds"] {
        if number(key).is_none_or(|n| n <= 0.0) {
            problems.push(format!("{key} is missing"));
        }
    }
    let export = summary["export_dir"].as_str().map(Path::new);
    if export.is_none_or(|folder| !folder.join("model.safetensors").is_file()) {
        problems.push(format!("export_dir {} holds no model.safetensors", summary["export_dir"]));
    }
    problems
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::problems;

    #[test]
    fn every_missing_figure_is_named() {
        let found = problems(&json!({ "acceptance_length": 1.2, "lossless": false }));
        assert_eq!(found.len(), 8, "{found:?}");
        assert!(found[0].contains("below 1.6"));
    }
}
