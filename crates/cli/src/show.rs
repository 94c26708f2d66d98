//! What a user sees while something runs: a bar on a terminal, now and then a line elsewhere.

use std::cell::Cell;
use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use specforge_train::Sent;

/// Prints a result to stdout. That nobody reads it any more is an error, which ends the command in peace.
pub(crate) fn print(result: impl Display) -> Result<()> {
    let text = result.to_string();
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    Ok(out.flush()?)
}

/// Prints a line for people to stderr; a run goes on when nobody reads it.
macro_rules! note {
    ($($line:tt)*) => {
        if !$crate::show::is_quiet() {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), $($line)*);
        }
    };
}
pub(crate) use note;

thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });

/// Whether this thread keeps to itself what goes on: one rank of several speaks for all.
pub(crate) fn quiet(is_quiet: bool) {
    QUIET.set(is_quiet);
}

/// See [`quiet`].
pub(crate) fn is_quiet() -> bool {
    QUIET.get()
}

/// How often a line is printed where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress of one piece of work.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    name: &'static str,
    terminal: bool,
    last_line: Cell<Instant>,
}

impl Progress {
    /// Work called `name`, counted in things that `unit` formats: `bytes` or plain numbers.
    pub(crate) fn new(name: &'static str, bytes: bool) -> Self {
        let (done, total) = if bytes { ("{bytes}", "{total_bytes}") } else { ("{pos}", "{len}") };
        let template =
            format!("{{prefix:<10}} {{bar:24}} {done}/{total}  {{elapsed}} (eta {{eta}})  {{msg}}");
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = if is_quiet() { ProgressBar::hidden() } else { ProgressBar::new(0) };
        let bar = bar.with_style(style).with_prefix(name);
        Self { bar, name, terminal: std::io::stderr().is_terminal(), last_line: Cell::new(Instant::now()) }
    }

    /// So much of so much is done.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        if !self.terminal && self.last_line.get().elapsed() >= LINE_EVERY {
            self.last_line.set(Instant::now());
            let eta = self.bar.eta().as_secs();
            note!("{}: {done} of {total}  eta {eta} s  {}", self.name, self.bar.message());
        }
    }

    /// What is beside the bar.
    pub(crate) fn message(&self, message: String) {
        self.bar.set_message(message);
    }

    /// A line above the bar.
    pub(crate) fn line(&self, line: &str) {
        if self.terminal && !is_quiet() {
            self.bar.println(line);
        } else {
            note!("{line}");
        }
    }

    /// The bar goes away.
    pub(crate) fn done(&self) {
        self.bar.finish_and_clear();
    }
}

/// `0.71 0.52 0.40`: one figure per draft position.
pub(crate) fn positions(values: &[f64]) -> String {
    values.iter().map(|v| format!("{v:.2}")).collect::<Vec<_>>().join(" ")
}

/// Tokens per second, short.
pub(crate) fn rate(tokens_per_second: f64) -> String {
    match tokens_per_second {
        r if r >= 10_000.0 => format!("{:.1}k tok/s", r / 1000.0),
        r => format!("{r:.0} tok/s"),
    }
}

/// A table of names and values, names to the left.
pub(crate) fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let lines: Vec<String> = rows.iter().map(|(name, value)| format!("{name:<width$}  {value}")).collect();
    lines.join("\n") + "\n"
}

/// What left a rank.
pub(crate) fn sent_text(Sent { gradients, overlapped, agreed, weights }: Sent) -> String {
    let [gradients, overlapped, weights] = [gradients + agreed, overlapped, weights].map(bytes);
    format!("{gradients} of gradients ({overlapped} beside the backward), {weights} of weights")
}

/// Bytes in the unit that suits them.
pub(crate) fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..0x10_0000 => format!("{:.1} KiB", n as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", n as f64 / 1_073_741_824.0),
    }
}
