//! `specforge capture`: the target runs once over the prepared set, its hidden states go to the feature store.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, bail};
use specforge_config::RunPlan;
use specforge_models::Capture;
use specforge_parallel::tell_numbers;
use specforge_store::{Reader, Spec, Writer, WriterOptions, finish_interrupted};
use specforge_tensor::{Combine, Device, Group, Tensor};
use specforge_train::{Online, features};

use crate::ranks::{self, Ending, Rank};
use crate::setup::{self, RecipeArgs};
use crate::show::{Progress, bytes, note, print, table};

/// Run the target once and keep its hidden states, so that training needs only the draft.
///
/// Stopped or killed, the same command goes on where it was, on any number of ranks, whatever they share. The store is described in
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
    ranks::run(&args.recipe.read()?, |plan, rank| on_rank(args, &plan, rank))
}

fn on_rank(args: &Args, plan: &RunPlan, rank: &Rank) -> Result<Ending> {
    let data = rank.first_then_others(|| setup::prepared(plan))?;
    let sharing = rank.sharing_target(&plan.parallel)?;
    let target = setup::target(plan, sharing.as_ref())?;
    target.info().expect_teacher()?;
    setup::expect_room(target.info(), &data)?;
    let capture: Capture = plan.method.capture(target.info())?;
    let spec = setup::store_spec(plan, target.info(), &capture, &data)?;
    let copy = Copy::of(plan, rank, sharing)?;
    let mut writer = copy.open(plan, &spec, rank)?;
    let total = data.len() as u64;
    let (own, already) = copy.own_rows(writer.as_ref(), data.len())?;
    // Nobody finishes a shard before everyone has seen which rows are missing.
    rank.barrier()?;
    if already > 0 {
        note!("store     {already} of {total} rows are there already");
    }
    let online = Online { target, data, capture, dtype: setup::capture_dtype(plan), peers: None };
    let done = copy.capture_rows(&online, writer.as_mut(), &own, (already, total))?;
    let done = already + rank.sum(if writer.is_some() { done } else { 0 })?;
    writer.map_or(Ok(()), Writer::finish)?;
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

/// A copy of the target: one of several ranks' own, or one that this rank shares with others. The first of these writes.
struct Copy {
    number: usize,
    copies: usize,
    sharing: Option<Arc<dyn Group>>,
    device: Device,
}

impl Copy {
    fn of(plan: &RunPlan, rank: &Rank, sharing: Option<Arc<dyn Group>>) -> Result<Self> {
        let ranks = sharing.as_ref().map_or(1, |sharing| sharing.size());
        if !rank.size().is_multiple_of(ranks) {
            bail!(
                "{ranks} ranks share a copy of the target (parallel.target-tensor), but {} were started: capture on a \
                 multiple of {ranks}",
                rank.size()
            );
        }
        let (number, copies, device) = (rank.number() / ranks, rank.size() / ranks, setup::device(plan)?);
        Ok(Self { number, copies, sharing, device })
    }

    /// Whether this rank writes what the ranks that share the copy compute.
    fn writes(&self) -> bool {
        self.sharing.as_ref().is_none_or(|sharing| sharing.rank() == 0)
    }

    /// Its part of the store. What another number of copies has left unfinished is finished first.
    fn open(&self, plan: &RunPlan, spec: &Spec, rank: &Rank) -> Result<Option<Writer>> {
        if rank.is_first() {
            let own = (self.copies == 1).then_some(0);
            finish_interrupted(&plan.store.path, spec, own)?;
        }
        rank.barrier()?;
        if !self.writes() {
            return Ok(None);
        }
        let options = WriterOptions { writer: self.number as u32, shard_bytes: plan.store.shard_bytes };
        Ok(Some(Writer::open(&plan.store.path, spec, &options)?))
    }

    /// The rows that it is to capture, and how many need no capture by anyone; as the rank that writes finds the store.
    fn own_rows(&self, writer: Option<&Writer>, n_rows: usize) -> Result<(Vec<usize>, u64)> {
        let found = writer.map_or_else(Vec::new, |writer| {
            let missing: Vec<u32> =
                (0..n_rows as u32).filter(|row| !writer.contains((*row).into())).collect();
            let already = n_rows as u32 - missing.len() as u32;
            [already].into_iter().chain(missing.into_iter().skip(self.number).step_by(self.copies)).collect()
        });
        let told = match &self.sharing {
            Some(sharing) => tell_numbers(sharing.as_ref(), self.device, 0, &found)?,
            None => found,
        };
        let (already, rows) =
            told.split_first().map_or((0, [].as_slice()), |(already, rows)| (*already, rows));
        Ok((rows.iter().map(|row| *row as usize).collect(), already.into()))
    }

    /// Captures rows until they are done or somebody asks to stop; how many were.
    fn capture_rows(
        &self,
        online: &Online,
        mut writer: Option<&mut Writer>,
        rows: &[usize],
        (already, total): (u64, u64),
    ) -> Result<u64> {
        let stop = stop_on_signal()?;
        let progress = Progress::new("capture", false);
        let mut done = 0;
        for rows in rows.chunks(ROWS_AT_ONCE) {
            for (&row, row_features) in rows.iter().zip(online.rows(rows)?) {
                writer.as_mut().map_or(Ok(()), |writer| features::append(writer, row, &row_features))?;
            }
            done += rows.len() as u64;
            // The other copies are about as far.
            progress.set((already + done * self.copies as u64).min(total), total);
            if self.any(stop.load(Ordering::Relaxed))? {
                break;
            }
        }
        progress.done();
        Ok(done)
    }

    /// Whether it is so on any of the ranks that share the copy: they go on together.
    fn any(&self, own: bool) -> Result<bool> {
        let Some(sharing) = &self.sharing else { return Ok(own) };
        let mut any = Tensor::from_u32(self.device, vec![u32::from(own)]);
        sharing.all_reduce(&mut any, Combine::Max)?;
        Ok(any.to_u32()[0] > 0)
    }
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
