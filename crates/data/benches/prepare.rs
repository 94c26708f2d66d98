//! How fast conversations become ids and loss masks: `cargo bench -p specforge-data --bench prepare -- [ROWS] [THREADS]`.
//!
//! The rows are the quick start's conversations, four to a row, one after the other; the tokenizer and the template are
//! those of its target. The file is left in the folder of benchmarks, so that others can be measured on it.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(clippy::print_stdout, reason = "a benchmark prints what it measured")]

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use specforge_data::{PrepareConfig, prepare};

/// As in the program for the small pieces, which are nearly all.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TURNS: usize = 4;

fn main() {
    // `cargo bench` adds `--bench`.
    let numbers: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let rows = numbers.first().copied().unwrap_or(20_000);
    let threads = numbers.get(1).copied().unwrap_or(1);
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/quickstart");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench");
    fs_err::create_dir_all(&folder).unwrap();
    let file = write_rows(&assets.join("conversations.jsonl"), &folder.join("conversations.jsonl"), rows);
    let cache = tempfile::tempdir_in(&folder).unwrap();
    let config = PrepareConfig::new(vec![file.clone()], assets.join("target"), cache.path().to_owned());

    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let set = pool.install(|| prepare(&config, &|_, _| {})).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    let tokens = set.report().tokens as f64;
    println!("{rows} rows of {TURNS} turns, {tokens} tokens, {}", file.display());
    println!("{threads} threads: {seconds:.2} s, {:.0} tokens/s", tokens / seconds);
    if let Some(cpu) = cpu_seconds().zip(cpu).map(|(after, before)| after - before) {
        println!("{cpu:.2} CPU seconds, {:.0} tokens per CPU second", tokens / cpu);
    }
}

/// Rows of [`TURNS`] conversations of `from`, which go round.
fn write_rows(from: &Path, to: &Path, rows: usize) -> PathBuf {
    let text = fs_err::read_to_string(from).unwrap();
    let turns: Vec<Vec<Value>> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["conversations"].as_array().unwrap().clone())
        .collect();
    let mut out = BufWriter::new(fs_err::File::create(to).unwrap());
    for row in 0..rows {
        let messages: Vec<&Value> =
            (0..TURNS).flat_map(|turn| &turns[(row * TURNS + turn) % turns.len()]).collect();
        writeln!(out, "{}", json!({ "conversations": messages })).unwrap();
    }
    out.flush().unwrap();
    to.to_owned()
}

/// User and system time of this process, where the system tells it (in hundredths of a second).
fn cpu_seconds() -> Option<f64> {
    let stat = fs_err::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / 100.0)
}
