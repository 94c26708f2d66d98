//! `specforge regenerate`: conversations with the answers that the target itself gives.

mod answer;
mod chat;
mod journal;
mod output;
mod turns;
mod work;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Value, json};
use specforge_config::RunPlan;
use specforge_data::Source;
use specforge_remote::Backoff;
use specforge_remote::chat::Servers;

use crate::setup::RecipeArgs;
use crate::show::{note, print, table};
use crate::{env, hub};
use answer::{Answerer, InProcess, OverHttp};
use journal::Journal;
use work::Counts;

/// Replace the answers of conversations by the target's own, which is what a draft has to learn.
///
/// Every assistant turn is asked for in order, on top of the answers before it. The answers come from servers of the
/// OpenAI interface (SGLang, vLLM: --server, several times for several) or, without one, from the recipe's target in
/// this process. Stopped or killed, the same command with --resume goes on, conversation by conversation.
///
/// With --output out.jsonl, out.jsonl gets the conversations in the order of the input, out.skipped.jsonl what could
/// not be used and out.errors.jsonl what failed, each with the reason: the three add up to the input. --resume tries
/// failures again. OPENAI_API_KEY is sent to the servers.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The recipe, for its target and its conversations; with --server and --input it is not needed.
    #[arg(required_unless_present_all = ["servers", "input"])]
    recipe: Option<PathBuf>,
    /// Replaces a value of the recipe.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Conversations instead of the recipe's: files, folders or patterns.
    #[arg(long, value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Where to, a JSONL file.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Address of a server, as http://localhost:30000. May be given several times.
    #[arg(long = "server", value_name = "URL")]
    servers: Vec<String>,
    /// The model's name at the servers; absent: the one they have.
    #[arg(long, value_name = "NAME", requires = "servers")]
    model: Option<String>,
    /// Requests at once, for each server; in this process: conversations at once.
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,
    /// Tries after the first one, with waits that double.
    #[arg(long, value_name = "N", default_value_t = 5)]
    retries: u32,
    /// Seconds before the second try; each further wait is twice as long, up to a minute.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    retry_wait: f64,
    /// Seconds that one answer may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// 0: always the most probable token.
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    temperature: f64,
    /// Keep the most probable tokens that together reach this probability.
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Keep so many of the most probable tokens; servers only.
    #[arg(long, value_name = "K", requires = "servers")]
    top_k: Option<u64>,
    /// Above 1: tokens that appeared are less probable; servers only.
    #[arg(long, value_name = "X", requires = "servers")]
    repetition_penalty: Option<f64>,
    /// Seed of sampling; every answer has its own that follows from it.
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Tokens of an answer at most.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    max_tokens: usize,
    /// What becomes of the model's reasoning.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Reasoning::Drop)]
    reasoning: Reasoning,
    /// What becomes of a conversation with an answer that was cut off at --max-tokens.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = CutOff::Skip)]
    cut_off: CutOff,
    /// What becomes of conversations in which the model calls tools.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Tools::Keep)]
    tools: Tools,
    /// Read at most so many conversations.
    #[arg(long, value_name = "N")]
    max_rows: Option<usize>,
    /// Go on with what an earlier run left.
    #[arg(long)]
    resume: bool,
    /// Throw away what an earlier run left.
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// Print the counts as JSON.
    #[arg(long)]
    json: bool,
}

/// What becomes of the model's reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Reasoning {
    /// Left out of the output; the model may think.
    Drop,
    /// Kept as reasoning_content.
    Keep,
    /// The model is told not to think (enable_thinking: false for its template).
    Disable,
}

/// What becomes of a conversation with an answer that was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum CutOff {
    /// It is skipped: its end would be taught as an end.
    Skip,
    /// It ends with that answer.
    Keep,
}

/// What becomes of conversations in which the model calls tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Tools {
    /// Turns that call tools and the results stay as they are; texts are regenerated, also after a result.
    Keep,
    /// They are skipped.
    Skip,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    check(args)?;
    let plan = args
        .recipe
        .clone()
        .map(|recipe| RecipeArgs { recipe, sets: args.sets.clone() }.plan())
        .transpose()?;
    let sources = sources(args, plan.as_ref())?;
    let (answerer, model, at_once) = answerer(args, plan.as_ref())?;
    let settings = settings(args, &model, &sources);
    let place = output::Place::new(&args.output);
    let Some(mut journal) = open(args, &place, &settings)? else { return Ok(()) };
    let place_of = if args.servers.is_empty() { "in this process" } else { "over HTTP" };
    note!("regenerate by {} {place_of}, {at_once} at once, to {}", answerer.name(), args.output.display());
    let counts = work::all(args, &sources, &answerer, at_once, &mut journal)?;
    output::write(&place, &sources, args.max_rows, &journal)?;
    if counts.failed == 0 {
        journal.remove()?;
    }
    conclude(args, &place, &counts)
}

fn check(args: &Args) -> Result<()> {
    let sampling = args.temperature >= 0.0 && args.temperature.is_finite();
    if !sampling || args.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
        bail!("--temperature: expected 0 or more; --top-p: expected above 0, at most 1");
    }
    if !(args.retry_wait >= 0.0 && args.retry_wait <= 60.0) {
        bail!("--retry-wait: expected 0 to 60");
    }
    if args.max_tokens == 0 || args.concurrency == Some(0) || args.timeout == 0 {
        bail!("--max-tokens, --concurrency and --timeout: expected at least 1");
    }
    Ok(())
}

fn sources(args: &Args, plan: Option<&RunPlan>) -> Result<Vec<Source>> {
    if !args.input.is_empty() {
        let of_hub = |path: &PathBuf| Ok(hub::folder(path)?.unwrap_or_else(|| path.clone()).into());
        return args.input.iter().map(of_hub).collect();
    }
    let plan = plan.context("expected a recipe, or --input FILE")?;
    Ok(plan.data.conversations.clone())
}

/// Who answers, what the model is called, and how many conversations run at once.
fn answerer(args: &Args, plan: Option<&RunPlan>) -> Result<(Answerer, String, usize)> {
    if args.servers.is_empty() {
        let plan = plan.context("expected a recipe with the target, or --server URL")?;
        let in_process = InProcess::open(plan)?;
        let at_once = args.concurrency.unwrap_or_else(|| in_process.at_once());
        let model = hub::name(&plan.target.path);
        return Ok((Answerer::InProcess(Box::new(in_process)), model, at_once));
    }
    let backoff = Backoff {
        retries: args.retries,
        first: Duration::from_secs_f64(args.retry_wait),
        ..Backoff::default()
    };
    let (at_once, limit) = (args.concurrency.unwrap_or(64), Duration::from_secs(args.timeout));
    let servers = Servers::new(&args.servers, env::openai_key(), at_once, backoff, limit);
    let names = servers.models()?;
    let model = match (&args.model, &names[..]) {
        (Some(model), _) if names.contains(model) => model.clone(),
        (None, [only]) => only.clone(),
        (given, _) => bail!(
            "--model {}: {} has {}",
            given.as_deref().unwrap_or("NAME is needed"),
            if args.servers.len() == 1 { "the server" } else { "every server" },
            if names.is_empty() { "no model".to_owned() } else { names.join(", ") }
        ),
    };
    let at_once = servers.capacity();
    Ok((Answerer::OverHttp(Box::new(OverHttp { servers, model: model.clone() })), model, at_once))
}

/// Everything that decides what is answered: a resumed run must have the same.
fn settings(args: &Args, model: &str, sources: &[Source]) -> Value {
    json!({
        "model": model,
        "input": sources.iter().map(|source| source.path.clone()).collect::<Vec<_>>(),
        "temperature": args.temperature,
        "top-p": args.top_p,
        "top-k": args.top_k,
        "repetition-penalty": args.repetition_penalty,
        "seed": args.seed,
        "max-tokens": args.max_tokens,
        "reasoning": args.reasoning,
        "cut-off": args.cut_off,
        "tools": args.tools,
        "max-rows": args.max_rows,
    })
}

/// The journal to go on with; none if there is nothing left to do.
fn open(args: &Args, place: &output::Place, settings: &Value) -> Result<Option<Journal>> {
    let (output, journal) = (&place.output, &place.journal);
    if args.resume {
        if journal.exists() {
            return Journal::resume(journal, settings).map(Some);
        }
        if output.exists() {
            note!("resume    {} is complete already", output.display());
            return Ok(None);
        }
        note!("resume    there is nothing yet: starting from the beginning");
    } else if !args.overwrite {
        let left = [output, journal].into_iter().find(|path| path.exists());
        if let Some(left) = left {
            bail!(
                "{}: an earlier run left this; go on with --resume, start afresh with --overwrite, or choose another \
                 --output",
                left.display()
            );
        }
    }
    if let Some(folder) = parent(output) {
        fs_err::create_dir_all(folder)?;
    }
    Journal::create(journal, settings).map(Some)
}

fn parent(path: &Path) -> Option<&Path> {
    path.parent().filter(|parent| !parent.as_os_str().is_empty())
}

fn conclude(args: &Args, place: &output::Place, counts: &Counts) -> Result<()> {
    if args.json {
        print(serde_json::to_string_pretty(counts)?)?;
    } else {
        print(table(&[
            ("output", place.output.display().to_string()),
            ("conversations", format!("{} read", counts.rows)),
            ("regenerated", format!("{} ({} by earlier runs)", counts.done, counts.resumed)),
            ("skipped", counts.skipped.to_string()),
            ("failed", counts.failed.to_string()),
            ("answers", format!("{}, {} tokens", counts.answers, counts.tokens)),
            ("tool calls", format!("{} kept", counts.kept_calls)),
        ]))?;
    }
    if counts.failed > 0 {
        bail!(
            "{} of {} conversations failed, see {}; the same command with --resume tries them again",
            counts.failed,
            counts.rows,
            place.errors.display()
        );
    }
    Ok(())
}
