//! Generated pages. The recipe reference comes from the crate that reads recipes, by its example `reference`.

use std::path::{Path, PathBuf};
use std::process::Command;

const PAGE: &str = "docs/reference/recipe.md";

/// Writes the page; returns its path.
pub(crate) fn write(root: &Path) -> Result<PathBuf, String> {
    let path = root.join(PAGE);
    std::fs::write(&path, page(root)?).map_err(|error| format!("{PAGE}: {error}"))?;
    Ok(path)
}

/// Fails if the page in the repository is not what would be written.
pub(crate) fn check(root: &Path) -> Result<(), String> {
    let written = std::fs::read_to_string(root.join(PAGE)).map_err(|error| format!("{PAGE}: {error}"))?;
    if written == page(root)? { Ok(()) } else { Err(format!("{PAGE} is stale: run `cargo xtask gen`")) }
}

fn page(root: &Path) -> Result<String, String> {
    let arguments =
        ["run", "--quiet", "--release", "--package", "specforge-config", "--example", "reference"];
    let failed = |why: &str| format!("cargo {}: {why}", arguments.join(" "));
    let output = Command::new("cargo")
        .args(arguments)
        .current_dir(root)
        .output()
        .map_err(|e| failed(&e.to_string()))?;
    if !output.status.success() {
        return Err(failed(&String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).map_err(|e| failed(&e.to_string()))
}
