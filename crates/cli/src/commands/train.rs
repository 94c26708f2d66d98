//! `specforge train`: a recipe to a trained draft, its acceptance length, and the folder that SGLang loads.

mod decoder;
mod serving;
mod terminal;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;
use specforge_config::{Length, Mode, OnOom, RunPlan};
use specforge_data::Prepared;
use specforge_methods::{Counts, DraftMethod};
use specforge_models::{Target, TargetInfo};
use specforge_nn::weights::Weights;
use specforge_store::Reader;
use specforge_tensor::{Device, Param, Params};
use specforge_train::{
    Cache, Checkpoint, Checkpoints, FeatureSource, Offline, Online, Optimizer, Order, Outcome, Ranks,
    Received, Sent, Settings, State, Trainer, Writers,
};

use decoder::{Decoder, Far};
use serving::{Served, serve};
use terminal::Terminal;

use super::capture::stop_on_signal;
use super::export;
use crate::lock;
use crate::machine;
use crate::ranks::{self, Apart, Ending, Layout, Rank};
use crate::setup::{self, RecipeArgs};
use crate::show::{bytes, note, positions, print, rate, sent_text, table};
use crate::warm_start;

/// Train a draft, measure its acceptance length by real decoding, and export the folder that SGLang loads.
///
/// Online recipes keep the target in memory; offline recipes read a store that `specforge capture` made; cache
/// recipes do the first in the first pass and the second afterwards. Everything goes to OUTPUT-DIR/NAME:
/// checkpoints, metrics.jsonl, summary.json, export. Ctrl-C finishes the step and saves; --resume goes on to the same
/// bits as a run that never stopped.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Go on from the newest checkpoint of the run, or from the checkpoint folder given.
    #[arg(long, value_name = "CHECKPOINT", num_args = 0..=1, default_missing_value = LATEST)]
    resume: Option<String>,
    /// Throw away what an earlier run of this name left, and start afresh.
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// Print the summary as JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// `--resume` without a checkpoint.
const LATEST: &str = "latest";
/// The plan a run was started with.
const PLAN: &str = "plan.json";
/// The acceptance length before training.
const UNTRAINED: &str = "untrained.json";

/// `summary.json`, and what is printed at the end.
#[derive(Debug, Serialize)]
struct Summary {
    name: String,
    method: &'static str,
    steps: u64,
    tokens: u64,
    acceptance_length: Option<f64>,
    acceptance_length_untrained: Option<f64>,
    acceptance_per_position: Vec<f64>,
    lossless: Option<bool>,
    /// Training throughput.
    tokens_per_second: f64,
    /// Decoding with the draft, over decoding without.
    speedup: Option<f64>,
    decode_tokens_per_second: Option<f64>,
    plain_tokens_per_second: Option<f64>,
    best_step: u64,
    /// Bytes that left the first rank in a step; nothing alone.
    sent: Option<Sent>,
    /// The most that the device had in use, as `specforge plan` projects it; on a CPU the whole process.
    peak_memory_bytes: Option<u64>,
    export_dir: PathBuf,
    /// Of the whole command.
    seconds: f64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let started = Instant::now();
    ranks::run(&args.recipe.read()?, |plan, rank| on_rank(args, &plan, rank, started))
}

fn on_rank(args: &Args, plan: &RunPlan, rank: &Rank, started: Instant) -> Result<Ending> {
    let info = expect_possible(plan)?;
    let _lock = if rank.is_first() { Some(lock::take(&plan.run_dir)?) } else { None };
    let resume = resumed(args, plan, rank)?;
    let data = rank.first_then_others(|| setup::prepared(plan))?;
    let (train_rows, held_out) = data.split(plan.data.eval_fraction, plan.seed);
    let mut layout = rank.layout(&plan.parallel)?;
    if let Some(Apart::Serves { clients, dealt }) = layout.apart.take_if(|apart| apart.serves()) {
        let (sharing, peers) = (layout.target, layout.peers.unwrap_or_default());
        let served = Served { sharing, peers, dealt, clients, resume: resume.as_ref() };
        return serve(plan, &data, (&train_rows, &held_out), served);
    }
    let Parts { method, params, mut source, mut decoder } =
        Parts::build(plan, &info, (&data, &held_out), (rank, &layout))?;
    let mut trainer =
        trainer(plan, method.as_ref(), params, &data, (&train_rows, &held_out), layout.train.take())?;
    let untrained = begin(&mut trainer, resume.as_ref(), plan, &mut decoder, rank)?;
    let training = Instant::now();
    let (tokens_before, steps_before) = (trainer.state.tokens, trainer.state.position.step);
    let mut hooks = Terminal::new(&mut decoder, stop_on_signal()?, trainer.settings.total_steps);
    let outcome = trainer.run(source.as_mut(), &mut hooks);
    hooks.progress.done();
    if outcome? == Outcome::Stopped {
        layout.end()?;
        return Ok(Ending::Stopped(format!(
            "stopped at step {} and saved; go on with: specforge train {} --resume",
            trainer.state.position.step,
            args.recipe.words()
        )));
    }
    let tokens_per_second =
        (trainer.state.tokens - tokens_before) as f64 / training.elapsed().as_secs_f64().max(1e-9);
    // The last checkpoint is complete once the first rank is here.
    trainer.optimizer.ranks().map_or(Ok(()), |ranks| ranks.mesh.world.barrier())?;
    if !decoder.decodes {
        layout.end()?;
        return Ok(Ending::Done);
    }
    let best = use_best(&mut trainer, plan)?;
    let report = decoder.measure(method.as_ref(), &trainer.params, true)?;
    layout.end()?;
    let whole = whole(&trainer)?;
    if !rank.is_first() {
        return Ok(Ending::Done);
    }
    let export_dir = export::write(plan, &info, method.as_ref(), &whole, &export::Options::of(plan, false))?;
    let steps = trainer.state.position.step - steps_before;
    let sent = trainer.optimizer.ranks().map(|_| trainer.optimizer.sent().per_step(steps));
    let summary = Summary {
        name: plan.name.clone(),
        method: plan.method.name(),
        steps: trainer.state.position.step,
        tokens: trainer.state.tokens,
        acceptance_length: report.as_ref().map(|r| r.acceptance_length),
        acceptance_length_untrained: untrained,
        acceptance_per_position: report
            .as_ref()
            .map(|r| r.acceptance_per_position.clone())
            .unwrap_or_default(),
        lossless: report.as_ref().and_then(|r| r.lossless),
        tokens_per_second,
        speedup: report.as_ref().and_then(|r| r.speedup),
        decode_tokens_per_second: report.as_ref().and_then(|r| r.tokens_per_second),
        plain_tokens_per_second: report.as_ref().and_then(|r| r.plain_tokens_per_second),
        best_step: best,
        sent,
        peak_memory_bytes: peak_memory(plan)?,
        export_dir,
        seconds: started.elapsed().as_secs_f64(),
    };
    setup::write_json(&plan.run_dir.join("summary.json"), &summary)?;
    if args.json {
        print(serde_json::to_string_pretty(&summary)?)?;
    } else {
        print(format_args!("\n{}", shown(&summary, plan)))?;
    }
    Ok(Ending::Done)
}

/// The checkpoint to go on from, which the first rank chooses.
fn resumed(args: &Args, plan: &RunPlan, rank: &Rank) -> Result<Option<Checkpoint>> {
    let mut own = None;
    let folder = rank.told(|| {
        own = clear_or_resume(args, plan)?;
        export::check_place(&plan.export.path)?;
        let folder = own.as_ref().map(|checkpoint| checkpoint.folder.to_string_lossy().into_owned());
        Ok(folder.unwrap_or_default())
    })?;
    if rank.is_first() {
        return Ok(own);
    }
    Ok(if folder.is_empty() { None } else { Some(Checkpoint::open(Path::new(&folder))?) })
}

/// Takes a checkpoint up, or starts afresh; the acceptance length before training.
fn begin(
    trainer: &mut Trainer<'_>,
    resume: Option<&Checkpoint>,
    plan: &RunPlan,
    decoder: &mut Decoder,
    rank: &Rank,
) -> Result<Option<f64>> {
    let path = plan.run_dir.join(UNTRAINED);
    if let Some(checkpoint) = resume {
        take_up(trainer, checkpoint, plan)?;
        return Ok(fs_err::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()));
    }
    if rank.is_first() {
        setup::write_text(&plan.run_dir.join(PLAN), &plan.to_json())?;
    }
    let untrained = decoder.acceptance_length(trainer.method, &trainer.params)?;
    if rank.is_first() {
        setup::write_json(&path, &untrained)?;
    }
    Ok(untrained)
}

/// The checkpoint to go on from; a run that is there already is neither continued nor replaced without being told.
fn clear_or_resume(args: &Args, plan: &RunPlan) -> Result<Option<Checkpoint>> {
    let folder = plan.run_dir.join("checkpoints");
    if let Some(given) = args.resume.as_ref().filter(|given| *given != LATEST) {
        return Ok(Some(Checkpoint::open(Path::new(given))?));
    }
    if args.overwrite {
        // Only what a run writes; anything else in the folder stays.
        for name in ["checkpoints", "export"] {
            let path = plan.run_dir.join(name);
            if path.exists() {
                fs_err::remove_dir_all(path)?;
            }
        }
        for name in ["metrics.jsonl", "summary.json", UNTRAINED, PLAN] {
            let path = plan.run_dir.join(name);
            if path.exists() {
                fs_err::remove_file(path)?;
            }
        }
        return Ok(None);
    }
    let latest = if folder.exists() { Checkpoints::open(folder, 0)?.latest()? } else { None };
    match latest {
        None if args.resume.is_some() => {
            note!("resume    {} has no checkpoint yet: starting from the beginning", plan.run_dir.display());
            Ok(None)
        }
        Some(checkpoint) if args.resume.is_none() && !plan.train.auto_resume => bail!(
            "{}: this run is at step {} already; go on with --resume, start afresh with --overwrite, or choose another name with --set name=...",
            plan.run_dir.display(),
            checkpoint.state.position.step
        ),
        latest => Ok(latest),
    }
}

/// Puts a checkpoint's weights and position into the trainer, if it belongs to this plan and these inputs.
fn take_up(trainer: &mut Trainer<'_>, checkpoint: &Checkpoint, plan: &RunPlan) -> Result<()> {
    let saved = plan.run_dir.join(PLAN);
    let mut differences = if saved.exists() { plan.differences(&RunPlan::read(&saved)?) } else { Vec::new() };
    let (now, before) = (&trainer.state.identity, &checkpoint.state.identity);
    for key in ["data", "target", "draft"] {
        if now[key] != before[key] {
            differences.push(format!("{key}: the contents are not those that the run was started with"));
        }
    }
    if !differences.is_empty() {
        bail!(
            "{}: a resumed run must be the same run:\n  {}\nundo these changes, or start another run with --set name=...",
            checkpoint.folder.display(),
            differences.join("\n  ")
        );
    }
    trainer.resume(checkpoint)?;
    note!("resume    step {} of {}", trainer.state.position.step, trainer.settings.total_steps);
    Ok(())
}

/// The best checkpoint's weights instead of the last ones.
fn use_best(trainer: &mut Trainer<'_>, plan: &RunPlan) -> Result<u64> {
    let best = Checkpoints::open(plan.run_dir.join("checkpoints"), 0)?.named("best")?;
    let step = trainer.state.position.step;
    let Some(best) = best.filter(|best| best.state.position.step != step) else { return Ok(step) };
    best.restore_weights(&mut trainer.params)?;
    Ok(best.state.position.step)
}

/// The draft with every matrix whole; the ranks that share its matrices call this.
fn whole(trainer: &Trainer<'_>) -> Result<Params> {
    let mut whole = Params::new();
    for (_, param) in trainer.params.iter() {
        let mut value = trainer.optimizer.whole(param)?;
        if param.split.is_some() {
            // One at a time is whole on a device.
            value = value.to_device(Device::Cpu)?;
        }
        whole.add(param.name.clone(), value, param.trainable);
    }
    Ok(whole)
}

/// The most memory that was in use on the device of this process.
fn peak_memory(plan: &RunPlan) -> Result<Option<u64>> {
    Ok(match setup::device(plan)?.gpu() {
        Some(gpu) => Some(gpu.usage().peak as u64),
        None => machine::peak_memory(),
    })
}

/// The summary as a table.
fn shown(s: &Summary, plan: &RunPlan) -> String {
    let length = |l: Option<f64>| l.map_or("not measured".to_owned(), |l| format!("{l:.2}"));
    let lossless = match s.lossless {
        Some(true) => "yes: greedy output is token for token the target's own",
        Some(false) => "NO: see `specforge eval`",
        None => "not measured",
    };
    let decoding = match (s.decode_tokens_per_second, s.plain_tokens_per_second, s.speedup) {
        (Some(with), Some(without), Some(speedup)) => {
            format!("{} with the draft, {} without ({speedup:.2}x)", rate(with), rate(without))
        }
        _ => "not measured".to_owned(),
    };
    let mut rows = vec![
        ("acceptance length before", length(s.acceptance_length_untrained)),
        ("acceptance length after", length(s.acceptance_length)),
        ("accepted at draft position", positions(&s.acceptance_per_position)),
        ("lossless", lossless.to_owned()),
        ("decoding on this machine", decoding),
        (
            "training",
            format!("{} steps, {}, best at step {}", s.steps, rate(s.tokens_per_second), s.best_step),
        ),
    ];
    rows.extend(s.sent.map(|sent| ("sent to other ranks a step", sent_text(sent))));
    rows.extend(s.peak_memory_bytes.map(|peak| ("memory at most", bytes(peak))));
    rows.extend([
        ("run", plan.run_dir.display().to_string()),
        ("exported folder for SGLang", s.export_dir.display().to_string()),
        ("time", format!("{:.0} s", s.seconds)),
    ]);
    table(&rows)
}

/// What a run is built of, mode decided.
struct Parts {
    method: Box<dyn DraftMethod>,
    params: Params,
    source: Box<dyn FeatureSource>,
    decoder: Decoder,
}

impl Parts {
    fn build(
        plan: &RunPlan,
        info: &TargetInfo,
        (data, held_out): (&Arc<Prepared>, &[usize]),
        (rank, layout): (&Rank, &Layout),
    ) -> Result<Self> {
        let sharing = layout.target.clone();
        let of_batch = of_batch(plan, layout.train.as_ref());
        // Read from a store, or from ranks of the target's own, features need no target here.
        let is_here = plan.mode != Mode::Offline && layout.apart.is_none();
        let target = if is_here { Some(setup::target(plan, sharing.as_ref())?) } else { None };
        let frozen = match &target {
            Some(target) => setup::frozen_of(plan, target, &of_batch)?,
            None => setup::frozen(plan, info)?,
        };
        let (method, mut params) = setup::draft(plan, info, &frozen, data, &of_batch)?;
        if let Some(folder) = &plan.train.warm_start {
            warm_start::replace(folder, method.as_ref(), &mut params)?;
        }
        setup::expect_room(info, data)?;
        let source = source(plan, (info, data), method.as_ref(), target.clone(), (rank, layout))?;
        let prompts = setup::prompts(plan, held_out, data, plan.eval.max_prompts)?;
        if prompts.is_empty() {
            note!("warning: no prompt is held out and eval.prompts names none: nothing will be measured");
        }
        let in_step = sharing.is_some() || plan.parallel.tensor > 1;
        let far = layout.line().map(|line| Far { line, draft: of_batch, asks: rank.is_first() });
        let (decodes, plan) = (layout.decodes, plan.clone());
        let decoder = Decoder { target, sharing, decodes, in_step, far, plan, prompts };
        Ok(Self { method, params, source, decoder })
    }
}

/// The ranks that share a batch.
fn of_batch(plan: &RunPlan, ranks: Option<&Ranks>) -> specforge_methods::Ranks {
    ranks.map(|ranks| ranks.of_batch(setup::exchange(&plan.parallel))).unwrap_or_default()
}

/// What is known of the target without its weights; fails where the draft cannot be trained for it, or by these ranks.
fn expect_possible(plan: &RunPlan) -> Result<TargetInfo> {
    let info = TargetInfo::read(&plan.target.path)?;
    info.expect_teacher()?;
    let (tensor, sequence) = (plan.parallel.tensor, plan.parallel.sequence);
    plan.method
        .check_shared(&info, Counts { tensor, sequence, exchange: setup::exchange(&plan.parallel) })?;
    Ok(info)
}

/// Where the features come from.
fn source(
    plan: &RunPlan,
    (info, data): (&TargetInfo, &Arc<Prepared>),
    method: &dyn DraftMethod,
    target: Option<Arc<Target>>,
    (rank, layout): (&Rank, &Layout),
) -> Result<Box<dyn FeatureSource>> {
    let (capture, dtype) = (method.capture().clone(), setup::capture_dtype(plan));
    if let Some(Apart::Trains { line, own, .. }) = &layout.apart {
        let (line, data, own) = (line.clone(), data.clone(), *own);
        let widths = [capture.layers.len() * info.hidden_size, info.hidden_size];
        return Ok(Box::new(Received { line, data, widths, dtype, own }));
    }
    let spec = |capture| setup::store_spec(plan, info, capture, data);
    let Some(target) = target else {
        let reader = Reader::open(&plan.store.path).with_context(|| {
            format!("offline training reads what `specforge capture` wrote to {}", plan.store.path.display())
        })?;
        let spec = spec(&capture)?;
        reader.expect(&spec.identity, &spec.schema)?;
        return Ok(Box::new(Offline::new(Arc::new(reader))));
    };
    let online = Online { target, data: data.clone(), capture, dtype, peers: layout.peers.clone() };
    if plan.mode == Mode::Cache {
        let spec = spec(&online.capture)?;
        let writers = Writers { ranks: rank.world(), own: layout.writer };
        return Ok(Box::new(Cache::open(online, plan.store.path.clone(), spec, writers)?));
    }
    Ok(Box::new(online))
}

fn trainer<'a>(
    plan: &RunPlan,
    method: &'a dyn DraftMethod,
    params: Params,
    data: &Prepared,
    (train_rows, held_out): (&[usize], &[usize]),
    ranks: Option<Ranks>,
) -> Result<Trainer<'a>> {
    let (order, total_steps) = order(plan, data, train_rows);
    let held = Order { rows: lengths(data, held_out), accumulation: 1, ..order.clone() };
    let settings = Settings {
        folder: plan.run_dir.clone(),
        total_steps,
        shrink_on_oom: plan.train.on_oom == OnOom::Shrink,
        log_every: plan.train.log_every,
        eval_every: plan.train.eval_every.unwrap_or(0),
        save_every: plan.train.save_every.unwrap_or(0),
        keep: plan.train.keep,
        schedule: plan.train.schedule.clone(),
        held_out: held.epoch(0).into_iter().flatten().collect(),
    };
    let identity = json!({
        "plan": plan.training_identity(),
        "data": data.hash(),
        "target": Weights::open(&plan.target.path)?.fingerprint(),
        "draft": setup::vocab_hash(method),
    });
    let size = |p: &Param| p.whole_shape().iter().product::<usize>();
    let trained: usize = params.iter().filter(|(_, p)| p.trainable).map(|(_, p)| size(p)).sum();
    note!(
        "train     {} rows, {} held out, {total_steps} steps; {} has {:.2} M trained parameters",
        train_rows.len(),
        held_out.len(),
        plan.method.name(),
        trained as f64 / 1e6
    );
    let optimizer = Optimizer::new(plan.train.optimizer.clone(), &params, ranks)?;
    Ok(Trainer { method, params, optimizer, order, settings, state: State::new(identity) })
}

/// The order of rows, and the steps of the whole run.
fn order(plan: &RunPlan, data: &Prepared, train_rows: &[usize]) -> (Order, u64) {
    let order = Order {
        rows: lengths(data, train_rows),
        tokens_per_batch: plan.train.tokens_per_batch,
        accumulation: plan.train.accumulation,
        seed: plan.seed,
    };
    let total_steps = match plan.train.length {
        Length::Epochs(epochs) => order.total_steps(epochs),
        Length::MaxSteps(steps) => steps,
    };
    (order, total_steps)
}

fn lengths(data: &Prepared, rows: &[usize]) -> Vec<(usize, usize)> {
    rows.iter().map(|&row| (row, data.row(row).ids.len())).collect()
}
