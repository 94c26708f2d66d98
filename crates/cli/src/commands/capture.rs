//! `specforge capture`: the target runs once over the prepared set, its hidden states go to the feature store.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use specforge_config::RunPlan;
use specforge_models::Capture;
use specforge_store::{Reader, Spec, Writer, WriterOptions, finish_interrupted};
use specforge_train::{Online, features};

use crate::ranks::{self, Ending, Rank};
use crate::setup::{self, RecipeArgs};
use crate::show::{Progress, bytes, note, print, table};

/// Run the target once and keep its hidden states, so that training needs only the draft.
///
/// Stopped or killed, the same command goes on where it was, on any number of ranks. The store is described in
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
    ranks::run(args.recipe.read()?, |plan, rank| on_rank(args, &plan, rank))
}

fn on_rank(args: &Args, plan: &RunPlan, rank: &Rank) -> Result<Ending> {
    let data = rank.first_then_others(|| setup::prepared(plan))?;
    let target = setup::target(plan)?;
    target.info().expect_teacher()?;
    setup::expect_room(target.info(), &data)?;
    let capture: Capture = plan.method.capture(target.info())?;
    let spec = setup::store_spec(plan, target.info(), &capture, &data)?;
    let mut writer = open(plan, &spec, rank)?;
    let missing: Vec<usize> = (0..data.len()).filter(|&row| !writer.contains(row as u64)).collect();
    let (total, already) = (data.len() as u64, (data.len() - missing.len()) as u64);
    // Nobody finishes a shard before everyone has seen which rows are missing.
    rank.barrier()?;
    if already > 0 {
        note!("store     {already} of {total} rows are there already");
    }
    let own: Vec<usize> = missing.into_iter().skip(rank.number()).step_by(rank.size()).collect();
    let online = Online { target, data, capture, dtype: setup::capture_dtype(plan) };
    let done = already + rank.sum(capture_rows(&online, &mut writer, &own, (already, total), rank)?)?;
    writer.finish()?;
    rank.barrier()?;
    if done < total {
        let how = "run the same command again to go on";
        return Ok(Ending::Stopped(format!("stopped with {done} of {total} rows captured; {how}")));
    }
    if rank.is_first() {
        show(args, plan)?;
    }
    Ok(Ending::Done)
}

/// This rank's part of the store. What another number of ranks has left unfinished is finished first.
fn open(plan: &RunPlan, spec: &Spec, rank: &Rank) -> Result<Writer> {
    if rank.is_first() {
        let own = (rank.size() == 1).then_some(0);
        finish_interrupted(&plan.store.path, spec, own)?;
    }
    rank.barrier()?;
    let (writer, shard_bytes) = (rank.number() as u32, plan.store.shard_bytes);
    Ok(Writer::open(&plan.store.path, spec, &WriterOptions { writer, shard_bytes })?)
}

/// Captures rows until they are done or somebody asks to stop; how many were.
fn capture_rows(
    online: &Online,
    writer: &mut Writer,
    rows: &[usize],
    (already, total): (u64, u64),
    rank: &Rank,
) -> Result<u64> {
    let stop = stop_on_signal()?;
    let progress = Progress::new("capture", false);
    let mut done = 0;
    for rows in rows.chunks(ROWS_AT_ONCE) {
        for (&row, row_features) in rows.iter().zip(online.rows(rows)?) {
            features::append(writer, row, &row_features)?;
        }
        done += rows.len() as u64;
        // The other ranks are about as far.
        progress.set((already + done * rank.size() as u64).min(total), total);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    progress.done();
    Ok(done)
}

fn show(args: &Args, plan: &RunPlan) -> Result<()> {
    let summary = Reader::open(&plan.store.path)?.summary();
    if args.json {
        return print(serde_json::to_string_pretty(&summary)?);
    }
    let rows = [
        ("store", plan.store.path.display().to_string()),
        ("rows", summary.rows.to_string()),
        ("tokens", summary.tokens.to_string()),
        ("size", bytes(summary.bytes)),
        ("per token", format!("{:.0} B", summary.bytes_per_token)),
    ];
    print(table(&rows))
}

/// Becomes true at the first SIGINT or SIGTERM; the second one ends the process.
pub(crate) fn stop_on_signal() -> Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    static SET: Mutex<bool> = Mutex::new(false);
    // Ranks that are threads share the handler.
    let mut is_set = SET.lock().unwrap_or_else(PoisonError::into_inner);
    if std::mem::replace(&mut *is_set, true) {
        return Ok(&STOP);
    }
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
