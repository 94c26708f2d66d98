//! Repository chores, run as `cargo xtask <chore>`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command-line program")]

mod files;
mod generate;
mod summary;
mod tidy;

use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <chore>

  tidy          check the rules of the repository (ARCHITECTURE.md); prints each violation, fails if there are any
  gen           write the generated pages of docs/reference
  gen --check   fail if a generated page is stale
  check-summary FILE
                fail unless the quick start's summary.json holds what the README promises";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository's root");
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tidy"] => run_tidy(root),
        ["gen"] => generate::write(root).map(|path| println!("wrote {}", path.display())),
        ["gen", "--check"] => generate::check(root),
        ["check-summary", file] => summary::check(Path::new(file)),
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run_tidy(root: &Path) -> Result<(), String> {
    let files = files::tracked(root)?;
    let tidy::Report { violations, long } = tidy::check(&files);
    for (path, lines) in &long {
        eprintln!("note: {path}: {lines} lines; {} is the norm, {} the limit", tidy::LONG, tidy::TOO_LONG);
    }
    for violation in &violations {
        println!("{violation}");
    }
    match violations.len() {
        0 => Ok(()),
        count => Err(format!("tidy: {count} violation(s) in {} files", files.len())),
    }
}
