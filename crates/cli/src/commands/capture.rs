//! `specforge capture`: the target runs once over the prepared set, its hidden states go to the feature store.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use specforge_models::Capture;
use specforge_store::{Reader, Writer, WriterOptions};
use specforge_train::{Online, features};

use crate::setup::{self, RecipeArgs};
use crate::show::{Progress, bytes, note, print, table};

/// Run the target once and keep its hidden states, so that training needs only the draft.
///
/// Stopped or killed, the same command goes on where it was. The store is described in
/// docs/reference/feature-store.md; `specforge info STORE --verify` checks every byte of it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Print a summary as JSON.
    #[arg(long)]
    json: bool,
}

/// Rows that run side by side before they are written.
const ROWS_AT_ONCE: usize = 64;

pub(crate) fn run(args: &Args) -> Result<()> {
    let plan = args.recipe.plan()?;
    let data = setup::prepared(&plan)?;
    let target = setup::target(&plan)?;
    target.info().expect_teacher()?;
    setup::expect_room(target.info(), &data)?;
    let capture: Capture = plan.method.capture(target.info())?;
    let spec = setup::store_spec(&plan, target.info(), &capture, &data)?;
    let options = WriterOptions { shard_bytes: plan.store.shard_bytes, ..WriterOptions::default() };
    let mut writer = Writer::open(&plan.store.path, &spec, &options)?;
    let missing: Vec<usize> = (0..data.len()).filter(|&row| !writer.contains(row as u64)).collect();
    let (total, already) = (data.len() as u64, (data.len() - missing.len()) as u64);
    if already > 0 {
        note!("store     {already} of {total} rows are there already");
    }
    let online = Online { target, data, capture, dtype: setup::capture_dtype(&plan) };
    let stop = stop_on_signal()?;
    let progress = Progress::new("capture", false);
    let mut done = already;
    for rows in missing.chunks(ROWS_AT_ONCE) {
        for (&row, row_features) in rows.iter().zip(online.rows(rows)?) {
            features::append(&mut writer, row, &row_features)?;
        }
        done += rows.len() as u64;
        progress.set(done, total);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    progress.done();
    writer.finish()?;
    if done < total {
        bail!("stopped with {done} of {total} rows captured; run the same command again to go on");
    }
    let summary = Reader::open(&plan.store.path)?.summary();
    if args.json {
        print(serde_json::to_string_pretty(&summary)?)
    } else {
        let rows = [
            ("store", plan.store.path.display().to_string()),
            ("rows", summary.rows.to_string()),
            ("tokens", summary.tokens.to_string()),
            ("size", bytes(summary.bytes)),
            ("per token", format!("{:.0} B", summary.bytes_per_token)),
        ];
        print(table(&rows))
    }
}

/// Becomes true at the first SIGINT or SIGTERM; the second one ends the process.
pub(crate) fn stop_on_signal() -> Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            // The user asked twice: nothing half-written is ever visible, so going at once loses only time.
            #[expect(clippy::exit, reason = "a second signal means now")]
            std::process::exit(130);
        }
        note!("\nstopping after this step; press Ctrl-C again to stop at once");
    })?;
    Ok(&STOP)
}
