//! The order of the crates: each may depend only on those of lower layers.

use super::{Violation, crate_of, violation};

/// From the bottom up; crates of one layer do not depend on each other.
const LAYERS: [&[&str]; 10] = [
    &["cuda", "remote"],
    &["tensor"],
    &["parallel"],
    &["nn"],
    &["models", "data", "store"],
    &["methods"],
    &["eval", "export", "import"],
    &["train"],
    &["config"],
    &["cli"],
];
/// Help for tests alone.
const TESTKIT: &str = "testkit";
const PREFIX: &str = "specforge-";

/// Holds the dependencies of one manifest against the order.
pub(super) fn check(path: &str, text: &str) -> Vec<Violation> {
    let Some(name) = crate_of(path) else { return Vec::new() };
    let known = name == TESTKIT || layer(name).is_some();
    let unknown = (!known).then(|| {
        violation(path, 1, format!("crate {name} has no place in the order (xtask/src/tidy/layers.rs)"))
    });
    let mut table = String::new();
    let mut found: Vec<Violation> = unknown.into_iter().collect();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        let mut used = None;
        if let Some(header) = line.strip_prefix('[') {
            header.trim_end_matches(']').clone_into(&mut table);
            // `[dependencies.specforge-nn]` is a dependency too.
            used = table.rsplit_once("dependencies.").map(|(_, dependency)| dependency.to_owned());
        } else if table.ends_with("dependencies") {
            used = line.split(['.', '=', ' ']).next().map(str::to_owned);
        }
        let used = used.as_deref().and_then(|used| used.strip_prefix(PREFIX));
        if let Some(why) = used.and_then(|used| forbidden(name, used, table.contains("dev-dependencies"))) {
            found.push(violation(path, index + 1, why));
        }
    }
    found
}

fn forbidden(name: &str, used: &str, for_tests: bool) -> Option<String> {
    if used == TESTKIT {
        let message = format!("{name} depends on {TESTKIT}: only [dev-dependencies] may");
        return (!for_tests && name != TESTKIT).then_some(message);
    }
    if name == TESTKIT {
        return Some(format!("{TESTKIT} depends on {used}: every crate uses it, so it uses none"));
    }
    // Tests may look down as the code does, and sideways: a store is tested with what is put into it.
    let (own, other) = (layer(name)?, layer(used)?);
    let allowed = if for_tests { other <= own } else { other < own };
    (!allowed).then(|| format!("{name} depends on {used}, which is not below it in the order of the crates"))
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}
