//! Rules for Rust source: what a crate knows nothing about, and what no file contains.

use super::{TOO_LONG, Violation, crate_of, violation};

/// A text that some files must not contain.
struct Rule {
    /// Whether it holds for this file.
    holds: fn(&str) -> bool,
    /// Found as a word: no letter, digit or `_` before it or after it.
    words: &'static [&'static str],
    why: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        holds: |path| crate_of(path) == Some("tensor") && is_code(path),
        words: &[
            "llama", "qwen", "qwen2", "qwen3", "eagle", "eagle3", "Llama", "Qwen2", "Qwen3", "Eagle3",
            "EAGLE3",
        ],
        why: "tensor knows no model and no method",
    },
    Rule {
        // config.rs opens a target's folder; no architecture does.
        holds: |path| {
            matches!(crate_of(path), Some("models" | "methods"))
                && is_code(path)
                && !path.ends_with("models/src/config.rs")
        },
        words: &["std::fs", "fs_err", "Device::Cuda", "cfg(feature"],
        why: "models and methods know no file, device or feature",
    },
    Rule {
        holds: |path| crate_of(path) == Some("train") && is_code(path),
        words: &["eagle3", "Eagle3", "EAGLE3"],
        why: "train knows no method by name",
    },
    Rule {
        holds: |path| is_code(path) && !may_print(path),
        words: &[
            "println!",
            "print!",
            "eprintln!",
            "eprint!",
            "std::env",
            "env::var",
            "env::args",
            "stdout()",
            "stderr()",
        ],
        why: "only cli prints and reads arguments and the environment",
    },
    Rule {
        holds: |_| true,
        words: &["#[ignore", "#[should_panic", "should_panic(", "todo!", "unimplemented!", "TODO", "FIXME"],
        why: "nothing unfinished and no test that does not run",
    },
    Rule {
        holds: |_| true,
        words: &["#[allow(", "#![allow("],
        why: "write #[expect(lint, reason = \"...\")]",
    },
];

/// Where the words of the rules are spelled out.
const RULE_FILES: &str = "xtask/src/tidy/";

/// Holds the rules against one Rust file.
pub(super) fn check(path: &str, text: &str) -> Vec<Violation> {
    let mut found = Vec::new();
    let lines = text.lines().count();
    if lines > TOO_LONG {
        found.push(violation(path, TOO_LONG + 1, format!("{lines} lines: the limit is {TOO_LONG}")));
    }
    // The name of a file of unit tests says it all.
    if !text.starts_with("//!") && file_name(path) != "tests.rs" {
        found.push(violation(path, 1, "a file starts with `//!` and what it is responsible for"));
    }
    if path.starts_with(RULE_FILES) {
        return found;
    }
    let mut in_tests = false;
    for (index, line) in text.lines().enumerate() {
        // Unit tests are at the bottom of a file; they may use files, and print why they are skipped.
        in_tests |=
            line == "#[cfg(test)]" && text.lines().nth(index + 1).is_some_and(|next| next.ends_with('{'));
        for rule in RULES.iter().filter(|rule| (rule.holds)(path)) {
            let of_crate = !rule.why.starts_with("nothing") && !rule.why.starts_with("write");
            if in_tests && of_crate {
                continue;
            }
            if let Some(word) = rule.words.iter().find(|word| contains_word(code(line, of_crate), word)) {
                found.push(violation(path, index + 1, format!("`{word}`: {}", rule.why)));
            }
        }
    }
    found
}

/// Library code: neither tests nor examples.
fn is_code(path: &str) -> bool {
    path.contains("/src/") && file_name(path) != "tests.rs" && !path.contains("/tests/")
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The command line, the chores, and the one switch of the tests.
fn may_print(path: &str) -> bool {
    crate_of(path) == Some("cli") || path.starts_with("xtask/") || path == "crates/testkit/src/golden.rs"
}

/// What a line does: comments may speak of anything, where a rule is about what a crate does.
fn code(line: &str, without_comments: bool) -> &str {
    if without_comments { line.split_once("//").map_or(line, |(code, _)| code) } else { line }
}

fn contains_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    let starts = word.starts_with(part);
    let ends = word.ends_with(part);
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back().is_some_and(part);
        let after = line[at + word.len()..].chars().next().is_some_and(part);
        !(starts && before || ends && after)
    })
}
