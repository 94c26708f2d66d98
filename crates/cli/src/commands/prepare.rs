//! `specforge prepare`: conversations to token ids and loss masks, and a look at what is supervised.

use std::io::{IsTerminal, Write};

use anyhow::{Result, bail};
use specforge_data::{Prepared, Tokenizer, runs};

use crate::env;
use crate::setup::{RecipeArgs, prepared};
use crate::show::print;

/// Tokenise the conversations of a recipe and mark what is supervised.
///
/// The result is cached by content: the same files and settings are not read twice. Stopped or killed, the same command
/// goes on where it was. `train` and `capture` prepare by themselves; this command is for looking. --show-mask prints a row with its supervised text in colour (or in
/// brackets where there is no colour): look at one before a long run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Print this row (from 0) with its supervised text marked.
    #[arg(long, value_name = "ROW")]
    show_mask: Option<usize>,
    /// Print the counts as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let plan = args.recipe.plan()?;
    let data = prepared(&plan)?;
    if let Some(row) = args.show_mask {
        return show(&data, row, &Tokenizer::open(&plan.target.path)?);
    }
    if args.json {
        print(serde_json::to_string_pretty(data.report())?)
    } else {
        print(data.folder().display())
    }
}

fn show(data: &Prepared, row: usize, tokenizer: &Tokenizer) -> Result<()> {
    if row >= data.len() {
        bail!("--show-mask {row}: there are rows 0 to {}", data.len().saturating_sub(1));
    }
    let mut out = std::io::stdout().lock();
    let colour = out.is_terminal() && !env::no_color();
    let marks = if colour { ("\u{1b}[30;42m", "\u{1b}[0m") } else { ("[[", "]]") };
    for run in runs(tokenizer, data.row(row))? {
        let (on, off) = if run.supervised { marks } else { ("", "") };
        write!(out, "{on}{}{off}", run.text)?;
    }
    Ok(writeln!(out)?)
}
