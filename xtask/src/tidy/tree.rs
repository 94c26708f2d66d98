//! Rules for every file: sizes, paths and names of machines, spaces at the end of lines.

use super::{Violation, extension, violation};
use crate::files::RepoFile;

/// Bytes above which a file belongs into one of [`LARGE`].
const LARGEST: u64 = 3 << 19;
/// Folders of files that are meant to be large.
const LARGE: [&str; 2] = ["assets/", "tests/golden/"];
/// Folders of one user on one machine.
const HOMES: [&str; 4] = ["/home/", "/Users/", "/root/", "/mnt/"];
/// Hosts of registries and caches of packages, in parts, so that this file is not among the finds.
const HOSTS: [[&str; 2]; 5] = [
    ["index.crates", ".io"],
    ["static.crates", ".io"],
    ["files.python", "hosted.org"],
    ["registry.npm", "js.org"],
    ["proxy.gol", "ang.org"],
];

/// Holds the rules against one file.
pub(super) fn check(file: &RepoFile) -> Vec<Violation> {
    let path = file.path.as_str();
    let mut found = Vec::new();
    if file.bytes > LARGEST && !LARGE.iter().any(|folder| path.starts_with(folder)) {
        let message =
            format!("{} bytes: files above {LARGEST} belong into {}", file.bytes, LARGE.join(" or "));
        found.push(violation(path, 0, message));
    }
    let Some(text) = &file.text else { return found };
    let markdown = extension(path) == "md";
    // Lock files name the registry; conversations and vocabularies may speak of anything.
    if extension(path) == "lock" || LARGE.iter().any(|folder| path.starts_with(folder) && !markdown) {
        return found;
    }
    for (index, line) in text.lines().enumerate() {
        if let Some(why) = machine(line) {
            found.push(violation(path, index + 1, why));
        }
        if markdown && line.ends_with([' ', '\t']) {
            found.push(violation(path, index + 1, "space at the end of the line"));
        }
    }
    found
}

fn machine(line: &str) -> Option<String> {
    let home = HOMES.iter().find(|home| {
        // `docs/mnt/x` and `https://host/home/x` are no absolute paths.
        line.match_indices(**home).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            let after = line[at + home.len()..].chars().next();
            before.is_none_or(|c| !c.is_alphanumeric() && !matches!(c, '.' | '_' | '-' | '/' | '}' | '>'))
                && after.is_some_and(|c| c.is_alphanumeric() || c == '.')
        })
    });
    if let Some(home) = home {
        return Some(format!("a path below {home} of one machine"));
    }
    let host = HOSTS.iter().map(|parts| parts.concat()).find(|host| line.contains(host.as_str()))?;
    Some(format!("the host of a registry: {host}"))
}
