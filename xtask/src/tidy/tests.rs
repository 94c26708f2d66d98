//! Each rule on a small text that breaks it and one that does not.

use super::{Violation, check, layers, source, tree};
use crate::files::RepoFile;

fn file(path: &str, text: &str) -> RepoFile {
    RepoFile { path: path.to_owned(), bytes: text.len() as u64, text: Some(text.to_owned()) }
}

fn lines(found: &[Violation]) -> Vec<usize> {
    found.iter().map(|violation| violation.line).collect()
}

#[test]
fn crates_depend_downwards() {
    let manifest = |name: &str, table: &str, used: &str| {
        let text = format!(
            "[package]\nname = \"x\"\n[{table}]\nserde.workspace = true\nspecforge-{used}.workspace = true\n"
        );
        lines(&layers::check(&format!("crates/{name}/Cargo.toml"), &text))
    };
    for (name, table, used, expected) in [
        ("nn", "dependencies", "tensor", vec![]),
        ("tensor", "dependencies", "nn", vec![5]),
        ("data", "dependencies", "store", vec![5]),
        ("data", "dev-dependencies", "store", vec![]),
        ("models", "dependencies", "nn", vec![]),
        ("methods", "dependencies", "eval", vec![5]),
        ("train", "dependencies", "eval", vec![]),
        ("train", "dependencies", "config", vec![5]),
        ("config", "dependencies", "train", vec![]),
        ("nn", "dependencies", "testkit", vec![5]),
        ("nn", "dev-dependencies", "testkit", vec![]),
        ("testkit", "dependencies", "tensor", vec![5]),
        ("nn", "target.'cfg(unix)'.dependencies", "models", vec![5]),
        ("other", "dependencies", "tensor", vec![1]),
    ] {
        assert_eq!(manifest(name, table, used), expected, "{name} {table} {used}");
    }
    let table = "[dependencies.specforge-nn]\nworkspace = true\n";
    assert_eq!(lines(&layers::check("crates/tensor/Cargo.toml", table)), [1]);
    assert_eq!(
        lines(&layers::check("Cargo.toml", "[workspace.dependencies]\nspecforge-cli = 1\n")),
        [0_usize; 0]
    );
}

#[test]
fn crates_know_nothing_about_others() {
    let one = |path: &str, line: &str| lines(&source::check(path, &format!("//! Doc.\n{line}\n")));
    for (path, line, expected) in [
        ("crates/tensor/src/ops.rs", "fn llama() {}", vec![2]),
        ("crates/tensor/src/ops.rs", "// as in llama", vec![]),
        ("crates/nn/src/rope.rs", "fn llama() {}", vec![]),
        ("crates/models/src/llama.rs", "use fs_err as fs;", vec![2]),
        ("crates/methods/src/eagle3.rs", "#[cfg(feature = \"x\")]", vec![2]),
        ("crates/methods/src/eagle3.rs", "let d = Device::Cuda(0);", vec![2]),
        ("crates/methods/src/eagle3.rs", "let d = Device::Cpu;", vec![]),
        ("crates/methods/src/eagle3/tests.rs", "use std::fs;", vec![]),
        ("crates/methods/tests/it/main.rs", "use std::fs;", vec![]),
        ("crates/train/src/step.rs", "if name == \"eagle3\" {", vec![2]),
        ("crates/train/src/step.rs", "let x = not_eagle3x;", vec![]),
        ("crates/data/src/read.rs", "println!(\"x\");", vec![2]),
        ("crates/data/src/read.rs", "writeln!(out, \"x\");", vec![]),
        ("crates/data/src/read.rs", "std::env::var(\"X\")", vec![2]),
        ("crates/data/src/read.rs", "env!(\"CARGO\")", vec![]),
        ("crates/cli/src/main.rs", "println!(\"x\");", vec![]),
        ("crates/testkit/src/golden.rs", "std::env::var_os(\"X\")", vec![]),
    ] {
        assert_eq!(one(path, line), expected, "{path} {line}");
    }
    let tests_below = "//! Doc.\n#[cfg(test)]\nmod tests {\n    println!();\n    // TODO\n}\n";
    assert_eq!(lines(&source::check("crates/data/src/read.rs", tests_below)), [5]);
    let tests_aside = "//! Doc.\n#[cfg(test)]\nmod tests;\nprintln!();\n";
    assert_eq!(lines(&source::check("crates/data/src/read.rs", tests_aside)), [4]);
}

#[test]
fn nothing_is_unfinished_or_unexplained() {
    for line in [
        "#[ignore]",
        "#[ignore = \"slow\"]",
        "#[should_panic]",
        "#[should_panic(expected = \"x\")]",
        "todo!()",
        "unimplemented!()",
        "// TODO: later",
        "// FIXME",
        "#[allow(dead_code)]",
        "#![allow(dead_code)]",
    ] {
        let found = source::check("crates/eval/tests/it/main.rs", &format!("//! Doc.\n{line}\n"));
        assert_eq!(lines(&found), [2], "{line}");
    }
    for line in ["#[expect(dead_code, reason = \"x\")]", "let ignored = 1;", "// METHODOLOGY", "mastodo!()"] {
        assert_eq!(source::check("crates/eval/src/lib.rs", &format!("//! Doc.\n{line}\n")), [], "{line}");
    }
}

#[test]
fn files_are_introduced_and_short() {
    assert_eq!(lines(&source::check("crates/nn/src/lib.rs", "use a;\n//! late\n")), [1]);
    assert_eq!(source::check("crates/nn/src/rope/tests.rs", "use a;\n"), []);
    let text = |lines: usize| format!("//! Doc.\n{}", "\n".repeat(lines - 1));
    assert_eq!(source::check("crates/nn/src/lib.rs", &text(800)), []);
    assert_eq!(lines(&source::check("crates/nn/src/lib.rs", &text(801))), [801]);
    assert_eq!(
        check(&[file("crates/nn/src/a.rs", &text(401))]).long,
        [("crates/nn/src/a.rs".to_owned(), 401)]
    );
    assert!(check(&[file("crates/nn/src/a.rs", &text(400))]).long.is_empty());
}

#[test]
fn methods_have_recipe_and_golden_test() {
    let list = "//! Doc.\npub enum MethodConfig {\n    /// One.\n    Alpha(alpha::Config),\n}\n";
    let list = file("crates/methods/src/lib.rs", list);
    let recipe = file("recipes/a.toml", "[method.alpha]\n");
    let test = file("crates/methods/tests/it/alpha.rs", "//! alpha.\nfn golden_loss() {}\n");
    assert_eq!(lines(&check(std::slice::from_ref(&list)).violations), [4, 4]);
    assert_eq!(lines(&check(&[list.clone(), recipe.clone()]).violations), [4]);
    assert_eq!(check(&[list, recipe, test]).violations, []);
}

#[test]
fn files_name_no_machine_and_are_small() {
    let one = |path: &str, line: &str| lines(&tree::check(&file(path, &format!("first\n{line}\n"))));
    let host = ["index.crates", ".io"].concat();
    let home = ["/ho", "me/someone/x"].concat();
    let disk = ["/mn", "t/data"].concat();
    for (path, line, expected) in [
        ("README.md", home.as_str(), vec![2]),
        ("tools/a.py", &format!("open('{disk}')"), vec![2]),
        ("tools/a.py", &format!("a{disk}"), vec![]),
        ("README.md", "https://host.example/home/x", vec![]),
        (".ci/run", &format!("curl https://{host}/x"), vec![2]),
        ("Cargo.lock", &host, vec![]),
        ("README.md", "space ", vec![2]),
        ("README.md", "no space", vec![]),
        ("src/a.rs", "space ", vec![]),
    ] {
        assert_eq!(one(path, line), expected, "{path} {line}");
    }
    let sized = |path: &str, bytes| {
        let file = RepoFile { path: path.to_owned(), bytes, text: None };
        tree::check(&file).len()
    };
    let limit = 1024 * 1024 + 512 * 1024;
    assert_eq!((sized("docs/a.png", limit), sized("docs/a.png", limit + 1)), (0, 1));
    assert_eq!((sized("assets/a.bin", limit + 1), sized("tests/golden/a.bin", limit + 1)), (0, 0));
}

#[test]
fn a_violation_is_printed_as_a_place() {
    let violation = super::violation("a.rs", 0, "too large");
    assert_eq!(violation.to_string(), "a.rs:1: too large");
}
