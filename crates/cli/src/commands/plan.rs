//! `specforge plan`: what a recipe costs before it runs: memory, disk, time, and traffic between ranks.

mod card;
mod layout;
mod ledger;
mod memory;
mod project;
mod report;
mod traffic;
mod work;

use anyhow::{Context, Result, bail};
use clap::builder::PossibleValuesParser;
use specforge_config::{CaptureDType, Fsdp, Mode, ParallelConfig, RunPlan, TargetDType};
use specforge_methods::eagle3::{self, Dims};
use specforge_methods::{Counts, MethodConfig};
use specforge_models::TargetInfo;
use specforge_tensor::Device;

use self::card::{CARDS, Card};
use self::layout::Layout;
use self::memory::{Frozen, Storage};
use self::traffic::Links;
use self::work::Work;
use crate::commands::bench::flops::Rows;
use crate::setup::{self, RecipeArgs};
use crate::{gpu, machine};

/// Say what a recipe costs before it runs: memory of each rank, disk, time, and what ranks send each other.
///
/// Memory is counted from what a step takes and gives back, for the largest micro-batch of the first epoch. Times come
/// from rates that were measured on the card (BENCHMARKS.md); a card that was not measured is marked. Of the target only
/// config.json and the tokenizer are read, so its weights need not be there yet; with --tokens the conversations need not
/// be there either. What cannot fit is refused (exit code 1) with the nearest setting that fits.
///
/// Then the same run is projected on 8, 64 and 512 cards, each with the layout that fits and sends least.
///
/// Examples:
///
///   specforge plan recipes/llama3.1-8b.toml --card h100
///   specforge plan recipes/llama3.1-8b.toml --card h200 --tokens 500e6 --supervised 0.4
///   specforge plan recipes/qwen3-8b.toml --card h100 --gpus 16 --zero 1 --network 25
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The card to plan for; absent: this machine's GPU, or its processor.
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(CARDS.map(|card| card.name)))]
    card: Option<String>,
    /// Memory of a card in GiB, if not what the card has.
    #[arg(long, value_name = "GIB", value_parser = positive)]
    memory: Option<f64>,
    /// Cards altogether; absent: as the recipe's table `parallel` has them.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    gpus: Option<u64>,
    /// Cards that share every matrix; absent: parallel.tensor.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    tensor: Option<u64>,
    /// Cards that share one copy of the target; absent: parallel.target-tensor.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    target_tensor: Option<u64>,
    /// Cards among them that have the target and train nothing; absent: parallel.target-ranks.
    #[arg(long, value_name = "N")]
    target_ranks: Option<u64>,
    /// Cards that share the rows of a batch; absent: parallel.sequence.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    sequence: Option<u64>,
    /// What cards share that train on other batches: 1 the optimizer, 2 the gradients too, 3 the weights too; 0 nothing.
    /// Absent: parallel.fsdp.
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(u8).range(0..=3))]
    zero: Option<u8>,
    /// Cards of a machine.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    per_node: u64,
    /// GB/s from a card to others of its machine, one way; absent: what the card's NVLink is made for.
    #[arg(long, value_name = "GB/S", value_parser = positive)]
    link: Option<f64>,
    /// GB/s from a card to other machines: 50 is 400 Gbit/s for each card.
    #[arg(long, value_name = "GB/S", default_value_t = 50.0, value_parser = positive)]
    network: f64,
    /// Assume so many tokens, in rows of data.max-length, instead of reading the conversations.
    #[arg(long, value_name = "N", value_parser = positive)]
    tokens: Option<f64>,
    /// The share of them that is supervised.
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, requires = "tokens", value_parser = share)]
    supervised: f64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// A recipe with what its cost depends on.
#[derive(Debug)]
struct Subject {
    plan: RunPlan,
    info: TargetInfo,
    config: eagle3::Config,
    dims: Dims,
    device: Device,
    card: Card,
    links: Links,
    layout: Layout,
    work: Work,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let subject = Subject::new(args)?;
    let own = project::own(&subject)?;
    report::show(&subject, &own, &project::larger(&subject), args.json)
}

impl Subject {
    fn new(args: &Args) -> Result<Self> {
        let plan = args.recipe.read()?;
        let info = TargetInfo::read(&plan.target.path).context("target.path (its config.json is enough)")?;
        info.expect_teacher()?;
        let MethodConfig::Eagle3(config) = plan.method.clone() else {
            bail!("plan knows the cost of eagle3 only, and the recipe's method is {}", plan.method.name());
        };
        let draft_vocab = plan.method.draft_vocab_size(&info).unwrap_or(info.vocab_size);
        let dims = Dims::resolve(&config, &info, draft_vocab)?;
        let (device, card) = card(args, &plan)?;
        let link = args.link.map_or(card.link, |gb| gb * 1e9);
        let links = Links { link, network: args.network * 1e9, per_node: args.per_node };
        let work = match args.tokens {
            Some(tokens) => Work::assumed(&plan, tokens as u64, args.supervised, config.ttt_steps),
            None => Work::prepared(&plan, config.ttt_steps)?,
        };
        let layout = layout(args, &plan, &info)?;
        expect_shared(&plan, &info, layout)?;
        Ok(Self { plan, info, config, dims, device, card, links, layout, work })
    }

    fn storage(&self) -> Storage {
        Storage::of(self.device, if self.plan.capture.dtype == CaptureDType::F32 { 4 } else { 2 })
    }

    /// What of the target stays in memory in `mode`.
    fn frozen(&self, mode: Mode, dtype: TargetDType) -> Frozen {
        if mode == Mode::Offline {
            return Frozen::Rows;
        }
        let table = match dtype {
            TargetDType::F32 => 4,
            TargetDType::Auto if self.device == Device::Cpu => 4,
            _ => 2,
        };
        Frozen::Whole { matrix: if dtype == TargetDType::Fp8 { 1 } else { table }, table }
    }

    /// The micro-batch of the first epoch that takes most.
    fn largest(&self) -> Rows {
        let most = self.work.batches.iter().max_by_key(|rows| rows.tokens + 12 * rows.live);
        most.cloned().unwrap_or_default()
    }
}

/// Where the recipe would run.
fn card(args: &Args, plan: &RunPlan) -> Result<(Device, Card)> {
    let given = args.memory.map(|gib| (gib * f64::from(1 << 30)) as u64);
    if let Some(card) = args.card.as_ref().and_then(|name| CARDS.iter().find(|card| card.name == name)) {
        // Plans never touch the device: its number only says that it is a card.
        return Ok((Device::Cuda(0), Card { memory: given.unwrap_or(card.memory), ..*card }));
    }
    let device = gpu::device(plan.device)?;
    let Some(gpu) = device.gpu() else {
        let free = machine::available_memory().unwrap_or(u64::MAX);
        return Ok((device, Card::cpu(threads(plan), given.unwrap_or(free))));
    };
    let (name, memory) = (&gpu.properties().name, given.unwrap_or(gpu.properties().memory as u64));
    let card = Card::of_device(name, memory).with_context(|| {
        let known = CARDS.map(|card| card.name).join(", ");
        format!(
            "no rates are known of {name}: name a card that is like it with --card ({known}) and --memory"
        )
    })?;
    Ok((device, card))
}

/// Threads that compute on a CPU.
fn threads(plan: &RunPlan) -> usize {
    if plan.threads == 0 { machine::threads() } else { plan.threads }
}

/// The layout that was asked for.
fn layout(args: &Args, plan: &RunPlan, info: &TargetInfo) -> Result<Layout> {
    let parallel = ParallelConfig {
        tensor: args.tensor.map_or(plan.parallel.tensor, |n| n as usize),
        sequence: args.sequence.map_or(plan.parallel.sequence, |n| n as usize),
        target_tensor: args.target_tensor.map(|n| n as usize).or(plan.parallel.target_tensor),
        target_ranks: args.target_ranks.map_or(plan.parallel.target_ranks, |n| n as usize),
        ..plan.parallel.clone()
    };
    let [tensor, sequence, target, apart] =
        [parallel.tensor, parallel.sequence, parallel.of_target(), parallel.target_ranks].map(|n| n as u64);
    let gpus = args.gpus.unwrap_or(parallel.data.unwrap_or(1) as u64 * tensor * sequence + apart);
    let zero = args.zero.unwrap_or(match parallel.fsdp {
        Fsdp::None => 0,
        Fsdp::Optimizer => 1,
        Fsdp::Gradients => 2,
        Fsdp::Full => 3,
    });
    let training = gpus.saturating_sub(apart);
    if training == 0 || !training.is_multiple_of(tensor * sequence) {
        let of_target = if apart > 0 { format!(", {apart} of them for the target,") } else { String::new() };
        bail!("--gpus {gpus}{of_target} is no multiple of --tensor {tensor} x --sequence {sequence}");
    }
    let data = training / (tensor * sequence);
    let copied = if apart > 0 { apart } else { gpus };
    if !copied.is_multiple_of(target) || apart > 0 && !data.is_multiple_of(apart / target) {
        bail!(
            "--target-tensor {target}: expected a divisor of {copied} cards, with as many batches for each copy"
        );
    }
    if plan.mode != Mode::Offline {
        info.shared_by(target as usize)?;
    }
    Ok(Layout { data, tensor, sequence, zero: if data > 1 { zero } else { 0 }, target, apart })
}

/// Fails where a training would: the draft cannot be shared like this.
fn expect_shared(plan: &RunPlan, info: &TargetInfo, layout: Layout) -> Result<()> {
    let exchange = setup::exchange(&plan.parallel);
    let (tensor, sequence) = (layout.tensor as usize, layout.sequence as usize);
    Ok(plan.method.check_shared(info, Counts { tensor, sequence, exchange })?)
}

/// A number above 0 of an argument.
fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|n: &f64| *n > 0.0 && n.is_finite());
    number.ok_or_else(|| "expected a number above 0".to_owned())
}

/// A share of an argument.
fn share(text: &str) -> Result<f64, String> {
    positive(text)?;
    text.parse().ok().filter(|n| *n <= 1.0).ok_or_else(|| "expected a share, at most 1".to_owned())
}
