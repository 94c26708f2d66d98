//! `specforge eval`: real speculative decoding with a draft.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use specforge_config::RunPlan;
use specforge_eval::{Options, Report, Sampling, Speculation};
use specforge_methods::{DraftMethod, Frozen, Ranks};
use specforge_models::Target;
use specforge_tensor::Params;
use specforge_train::{Checkpoint, Checkpoints};

use super::export;
use crate::hub;
use crate::ranks::{self, Ending, Rank};
use crate::setup::{self, RecipeArgs};
use crate::show::{Progress, note, positions, print, rate, table};

/// Decode prompts with the target and a draft, and report how many proposed tokens are accepted.
///
/// The draft is a checkpoint of the recipe's run (the best one, unless told otherwise) or any EAGLE3 folder given with
/// --draft, whoever made it. Greedy output is compared token for token with the target's own. Settings not given here
/// are the recipe's.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// An exported draft, a folder or owner/name on the hub, instead of a checkpoint of the run.
    #[arg(long, value_name = "FOLDER", conflicts_with = "checkpoint")]
    draft: Option<PathBuf>,
    /// `best`, `latest`, or the folder of a checkpoint.
    #[arg(long, default_value = "best")]
    checkpoint: String,
    /// Prompts: JSONL conversations (the last answer is dropped), {"prompt": ...}, {"input_ids": [...]}, or plain lines.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// At most so many prompts.
    #[arg(long, value_name = "N")]
    max_prompts: Option<usize>,
    /// Tokens decoded for each prompt, at most.
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Tokens the draft proposes one after the other (SGLang: --speculative-num-steps).
    #[arg(long, value_name = "N")]
    draft_steps: Option<usize>,
    /// 1: a chain; more: the EAGLE tree with so many branches (SGLang: --speculative-eagle-topk).
    #[arg(long, value_name = "N")]
    topk: Option<usize>,
    /// Tokens verified at once, the root included (SGLang: --speculative-num-draft-tokens).
    #[arg(long, value_name = "N")]
    draft_tokens: Option<usize>,
    /// 0: greedy; above: exact rejection sampling.
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Seed of sampled decoding.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print the whole report as JSON, every prompt's result included.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    ranks::run_decoding(args.recipe.read()?, |mut plan, rank| {
        override_eval(&mut plan, args);
        on_rank(args, &plan, rank)
    })
}

/// Ranks that share the target decode the same prompts in step; the first one says what came out.
fn on_rank(args: &Args, plan: &RunPlan, rank: &Rank) -> Result<Ending> {
    let layout = rank.layout(&plan.parallel)?;
    let prompts = rank.first_then_others(|| prompts(plan))?;
    if !layout.decodes {
        return Ok(Ending::Done);
    }
    let target = setup::target(plan, layout.target.as_ref())?;
    let frozen = setup::frozen_of(plan, &target, &Ranks::default())?;
    let (method, params) = draft(args, plan, &target, &frozen)?;
    let options =
        Options { sampling: Sampling { seed: args.seed, ..options(plan).sampling }, ..options(plan) };
    let progress = Progress::new("eval", false);
    let shown = |done, total| progress.set(done, total);
    let report = specforge_eval::evaluate(&target, method.as_ref(), &params, &prompts, &options, &shown);
    progress.done();
    let report = report?;
    if rank.is_first() {
        if args.json {
            print(serde_json::to_string_pretty(&report)?)?;
        } else {
            print(table(&rows(&report)))?;
        }
    }
    Ok(Ending::Done)
}

fn override_eval(plan: &mut RunPlan, args: &Args) {
    let eval = &mut plan.eval;
    eval.prompts = args.prompts.clone().or(eval.prompts.take());
    eval.max_prompts = args.max_prompts.unwrap_or(eval.max_prompts);
    eval.max_new_tokens = args.max_new_tokens.unwrap_or(eval.max_new_tokens);
    eval.temperature = args.temperature.unwrap_or(eval.temperature);
    if args.draft_steps.is_some() || args.topk.is_some() || args.draft_tokens.is_some() {
        eval.draft_steps = args.draft_steps.unwrap_or(eval.draft_steps);
        eval.topk = args.topk.unwrap_or(eval.topk);
        // A chain has one token per step and the root; a tree without a budget of its own has room for two branches.
        let nodes =
            if eval.topk == 1 { eval.draft_steps + 1 } else { 2 * eval.draft_steps * eval.topk.min(4) };
        eval.draft_tokens = args.draft_tokens.unwrap_or(nodes);
    }
}

/// The options of a plan: with the plain decoding that the proof and the speed-up need.
pub(crate) fn options(plan: &RunPlan) -> Options {
    let eval = &plan.eval;
    Options {
        speculation: Speculation { steps: eval.draft_steps, topk: eval.topk, n_nodes: eval.draft_tokens },
        sampling: Sampling { temperature: eval.temperature, ..Sampling::default() },
        max_new_tokens: eval.max_new_tokens,
        plain: true,
        parallel: false,
    }
}

fn prompts(plan: &RunPlan) -> Result<Vec<Vec<u32>>> {
    if let Some(file) = &plan.eval.prompts {
        return setup::prompts_from(plan, file, plan.eval.max_prompts);
    }
    let data = setup::prepared(plan)?;
    let (_, held_out) = data.split(plan.data.eval_fraction, plan.seed);
    setup::prompts(plan, &held_out, &data, plan.eval.max_prompts)
}

fn draft(
    args: &Args,
    plan: &RunPlan,
    target: &Target,
    frozen: &Frozen,
) -> Result<(Box<dyn DraftMethod>, Params)> {
    if let Some(written) = &args.draft {
        let folder = hub::folder(written)?.unwrap_or_else(|| written.clone());
        return export::load(&folder, plan, target.info(), frozen);
    }
    let checkpoint = checkpoint(plan, &args.checkpoint)?;
    let data = setup::prepared(plan)?;
    let (method, mut params) = setup::draft(plan, target.info(), frozen, &data, &Ranks::default())?;
    setup::restore(&checkpoint, plan, method.as_ref(), &mut params)?;
    note!("draft     {}", checkpoint.folder.display());
    Ok((method, params))
}

/// A checkpoint of the plan's run by name (`best`, `latest`), or any by its folder.
pub(crate) fn checkpoint(plan: &RunPlan, name: &str) -> Result<Checkpoint> {
    if !matches!(name, "best" | "latest") {
        return Ok(Checkpoint::open(Path::new(name))?);
    }
    let folder = plan.run_dir.join("checkpoints");
    if !folder.exists() {
        bail!(
            "{}: there is no checkpoint; train first, or name a draft folder with --draft",
            folder.display()
        );
    }
    let checkpoints = Checkpoints::open(folder, 0)?;
    let found = match checkpoints.named(name)? {
        None => checkpoints.latest()?,
        found => found,
    };
    found.with_context(|| format!("{}: there is no checkpoint; train first", plan.run_dir.display()))
}

fn rows(report: &Report) -> Vec<(&'static str, String)> {
    let lossless = match (&report.lossless, &report.first_difference) {
        (Some(true), _) => "yes: greedy output is token for token the target's own".to_owned(),
        (Some(false), Some(d)) => format!(
            "NO: prompt {}, token {}: {} instead of {} (logits differ by {:.2e})",
            d.prompt, d.index, d.token, d.plain_token, d.logit_gap
        ),
        (Some(false), None) => "NO".to_owned(),
        (None, _) => "sampled: the distribution is the target's, single tokens are not compared".to_owned(),
    };
    let speed = |tokens: Option<f64>| tokens.map_or("not measured".to_owned(), rate);
    vec![
        ("acceptance length", format!("{:.3}", report.acceptance_length)),
        ("accepted at draft position", positions(&report.acceptance_per_position)),
        (
            "prompts, tokens, target calls",
            format!("{}, {}, {}", report.prompts, report.tokens, report.target_forwards),
        ),
        ("lossless", lossless),
        ("with the draft", speed(report.tokens_per_second)),
        ("without", speed(report.plain_tokens_per_second)),
        (
            "speed-up on this machine",
            report.speedup.map_or("not measured".to_owned(), |s| format!("{s:.2}x")),
        ),
    ]
}
