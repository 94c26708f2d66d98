//! What tests take from their environment: where the golden cases are, and on which device to run.
//!
//! A case is a folder; its `case.json` holds settings and tolerances, its tensors are in safetensors
//! files. The folder of cases can be exchanged for another one of the same format.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// The folder of golden cases: `SPECFORGE_GOLDEN`, else `tests/golden` of the repository.
#[expect(
    clippy::disallowed_methods,
    reason = "tests have no command line: the environment is the only way to hand them other cases"
)]
pub fn golden_dir() -> PathBuf {
    match std::env::var_os("SPECFORGE_GOLDEN") {
        Some(dir) if !dir.is_empty() => dir.into(),
        _ => own_case(""),
    }
}

/// A case that the repository itself holds, whatever other cases tests run on.
pub fn own_case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

/// Where the end-to-end tests compute: `SPECFORGE_TEST_DEVICE` (`cuda` on a machine with a GPU), else `cpu`. What a test
/// expects must not depend on what the machine happens to have.
#[expect(
    clippy::disallowed_methods,
    reason = "tests have no command line: the environment is the only way to run them on another device"
)]
pub fn test_device() -> String {
    std::env::var("SPECFORGE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned())
}

/// Whether `mpirun` started this process.
#[expect(
    clippy::disallowed_methods,
    reason = "the environment is how mpirun tells a process that it is a rank"
)]
pub fn is_rank() -> bool {
    std::env::var_os("OMPI_COMM_WORLD_RANK").is_some()
}

/// The test program itself, to be started once more.
pub(crate) fn this_program() -> PathBuf {
    std::env::current_exe().expect("a test is a program")
}

/// The folder of the case `name` (a path below [`golden_dir`], `targets/llama` for example).
///
/// `None` after saying so when the case is not there: the test should then return.
pub fn golden_case(name: &str) -> Option<PathBuf> {
    let dir = golden_dir();
    let case = dir.join(name);
    if case.exists() {
        return Some(case);
    }
    announce_skip(&format!("golden case {name} is not in {}", dir.display()));
    None
}

/// All cases whose name starts with `prefix`, sorted by name.
///
/// `eagle3-` gives `eagle3-accum`, `eagle3-basic`, ...; a prefix with a slash looks into a sub-folder:
/// `targets/` gives `targets/deepseek-v2`, .... Empty, after saying so, when there is none.
pub fn golden_cases(prefix: &str) -> Vec<(String, PathBuf)> {
    let dir = golden_dir();
    let cases = cases_below(&dir, prefix);
    if cases.is_empty() {
        announce_skip(&format!("no golden case {prefix}* is in {}", dir.display()));
    }
    cases
}

/// The parsed JSON file at `path`; a folder stands for the `case.json` in it.
pub fn case_json(path: impl AsRef<Path>) -> Value {
    let path = path.as_ref();
    let path = if path.is_dir() { path.join("case.json") } else { path.to_path_buf() };
    let text = fs_err::read_to_string(&path).unwrap_or_else(|error| panic!("{error}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{} is not JSON: {error}", path.display()))
}

fn cases_below(dir: &Path, prefix: &str) -> Vec<(String, PathBuf)> {
    let (parent, stem) = prefix.rfind('/').map_or(("", prefix), |slash| prefix.split_at(slash + 1));
    let Ok(entries) = fs_err::read_dir(dir.join(parent)) else { return Vec::new() };
    let mut cases: Vec<(String, PathBuf)> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .filter(|(name, _)| name.starts_with(stem))
        .map(|(name, path)| (format!("{parent}{name}"), path))
        .collect();
    cases.sort();
    cases
}

/// Says that a test is skipped, and why.
#[expect(clippy::print_stdout, reason = "a skipped test has to say so, and test output is captured")]
pub fn announce_skip(why: &str) {
    println!("skipped: {why}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_found_by_prefix_in_name_order() {
        let dir = crate::tempdir();
        for name in ["b-two", "b-one", "a", "nested/x1", "nested/y"] {
            fs_err::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs_err::write(dir.path().join("b-file"), "").unwrap();
        let names =
            |prefix| cases_below(dir.path(), prefix).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names("b-"), ["b-one", "b-two"]);
        assert_eq!(names("nested/"), ["nested/x1", "nested/y"]);
        assert_eq!(names("nested/x"), ["nested/x1"]);
        assert!(names("c").is_empty());
        assert!(names("absent/c").is_empty());
    }

    #[test]
    fn case_json_reads_a_folder_or_a_file() {
        let dir = crate::tempdir();
        fs_err::write(dir.path().join("case.json"), r#"{"atol": 0.5}"#).unwrap();
        assert_eq!(case_json(dir.path())["atol"], 0.5);
        assert_eq!(case_json(dir.path().join("case.json"))["atol"], 0.5);
    }

    #[test]
    fn an_absent_case_is_none() {
        assert_eq!(golden_case("no such case"), None);
    }

    /// Cases for methods that are not there yet are reported, not ignored.
    #[test]
    fn golden_cases_that_no_test_reads_are_named() {
        const READ: [&str; 10] = [
            "eagle3",
            "exports",
            "loss_mask",
            "lr_schedule",
            "optimizer",
            "rope_tables",
            "serving",
            "targets",
            "torch",
            "vocab_mapping",
        ];
        let all = golden_cases("");
        assert!(!all.is_empty(), "{} holds no case", golden_dir().display());
        for (name, _) in all.iter().filter(|(name, _)| !READ.iter().any(|read| name.starts_with(read))) {
            println!("not covered: {name}");
        }
    }
}
