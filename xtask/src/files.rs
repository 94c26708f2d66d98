//! The files of the repository: what git tracks, and what it would track after `git add`.

use std::path::Path;
use std::process::Command;

/// One file.
#[derive(Debug, Clone)]
pub(crate) struct RepoFile {
    /// Path from the repository's root, with slashes.
    pub(crate) path: String,
    /// Size in bytes.
    pub(crate) bytes: u64,
    /// Contents; `None` for a file that is not text.
    pub(crate) text: Option<String>,
}

/// Files larger than this are never read as text.
const LARGEST_TEXT: u64 = 8 << 20;

/// All files that git does not ignore.
pub(crate) fn tracked(root: &Path) -> Result<Vec<RepoFile>, String> {
    let arguments = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let output = Command::new("git")
        .args(arguments)
        .current_dir(root)
        .output()
        .map_err(|error| format!("git {}: {error}", arguments.join(" ")))?;
    if !output.status.success() {
        return Err(format!("git {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr)));
    }
    let names = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut names: Vec<&str> = names.split('\0').filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    names.dedup();
    // A tracked file that was deleted is still listed.
    names.into_iter().filter(|name| root.join(name).is_file()).map(|name| read(root, name)).collect()
}

fn read(root: &Path, name: &str) -> Result<RepoFile, String> {
    let path = root.join(name);
    let failed = |error| format!("{name}: {error}");
    let bytes = std::fs::metadata(&path).map_err(failed)?.len();
    let mut text = None;
    if bytes <= LARGEST_TEXT {
        let content = std::fs::read(&path).map_err(failed)?;
        text = String::from_utf8(content).ok().filter(|text| !text.contains('\0'));
    }
    Ok(RepoFile { path: name.to_owned(), bytes, text })
}
