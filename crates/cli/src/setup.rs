//! What several commands build from a plan: the prepared set, the target, the draft, prompts, a store's identity.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use specforge_config::{CaptureDType, DeviceChoice, ParallelConfig, Recipe, RunPlan, TargetDType};
use specforge_data::{ChatTemplate, Prepared, TokenCounts, Tokenizer, Unseen, read_prompts};
use specforge_methods::{DraftMethod, Exchange, Frozen, Ranks, VocabMap};
use specforge_models::{Capture, Target, TargetInfo};
use specforge_nn::weights::Weights;
use specforge_store::{CaptureSpec, Identity, Spec, TargetIdentity};
use specforge_tensor::{DType, Device, Group, Params};
use specforge_train::{Checkpoint, features};

use crate::gpu;
use crate::hub;
use crate::machine::available_memory;
use crate::show::{Progress, note};

/// Arguments of every command that takes a recipe.
#[derive(Debug, clap::Args)]
pub(crate) struct RecipeArgs {
    /// The recipe, a TOML file. Paths in it start at the current folder.
    pub recipe: PathBuf,
    /// Replaces a value of the recipe, for example --set train.optimizer.lr=2e-4. May be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

impl RecipeArgs {
    /// Reads the recipe and resolves it, and sets the number of threads it asks for.
    pub(crate) fn plan(&self) -> Result<RunPlan> {
        let plan = self.read()?;
        Ok(RunPlan { device: on_this_machine(plan.device, plan.threads)?, ..plan })
    }

    /// Reads the recipe and resolves it; the device is not chosen yet.
    pub(crate) fn read(&self) -> Result<RunPlan> {
        let recipe = Recipe::load(&self.recipe, &self.sets, &std::env::current_dir()?)?;
        let mut plan = recipe.plan;
        let written = recipe.config.target.path.unwrap_or_default();
        plan.target.path = hub::folder(&written)?.unwrap_or(plan.target.path);
        for (source, written) in plan.data.conversations.iter_mut().zip(&recipe.config.data.conversations) {
            if let Some(folder) = hub::folder(&written.path)? {
                source.path = folder;
            }
        }
        if let Some(written) = recipe.config.train.warm_start {
            plan.train.warm_start = hub::folder(&written)?.or(plan.train.warm_start);
        }
        if !plan.target.path.is_dir() {
            bail!(
                "{}: there is no such folder; target.path names the target's Hugging Face folder, or owner/name on the hub",
                plan.target.path.display()
            );
        }
        Ok(plan)
    }
}

/// Chooses the device and sets the number of threads.
pub(crate) fn on_this_machine(device: DeviceChoice, threads: usize) -> Result<DeviceChoice> {
    let device = gpu::choice(gpu::device(device)?);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    // A second pool in one process is only ever asked for by tests.
    let _ = pool.build_global();
    Ok(device)
}

impl RecipeArgs {
    /// The arguments again, as a shell takes them.
    pub(crate) fn words(&self) -> String {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@".contains(c);
        let quoted = |word: &str| {
            if word.chars().all(plain) {
                word.to_owned()
            } else {
                format!("'{}'", word.replace('\'', "'\\''"))
            }
        };
        let sets = self.sets.iter().map(|set| format!(" --set {}", quoted(set)));
        quoted(&self.recipe.display().to_string()) + &sets.collect::<String>()
    }
}

/// Tokenised rows, from the cache if nothing changed, and what was dropped.
pub(crate) fn prepared(plan: &RunPlan) -> Result<Arc<Prepared>> {
    let progress = Progress::new("prepare", true);
    let prepared = specforge_data::prepare(&plan.prepare_config(), &|done, total| progress.set(done, total))?;
    progress.done();
    let report = prepared.report();
    note!(
        "data      {} rows of {}, {} tokens, {:.0} % supervised",
        report.rows_kept,
        report.rows_read,
        report.tokens,
        100.0 * report.supervised_share()
    );
    for (reason, count) in &report.dropped {
        note!("          {count} dropped: {reason}");
    }
    if report.not_drawn + report.repeated > 0 {
        note!("          {} left out and {} repeated by weight", report.not_drawn, report.repeated);
    }
    report.warnings.iter().for_each(|warning| note!("warning: {warning}"));
    Ok(Arc::new(prepared))
}

/// The device of a plan that [`RecipeArgs::plan`] made.
pub(crate) fn device(plan: &RunPlan) -> Result<Device> {
    gpu::chosen(plan.device)
}

/// The element type for the target's weights: float32 computes fastest on a CPU, if it fits.
fn storage(plan: &RunPlan) -> Result<Option<DType>> {
    Ok(match plan.target.dtype {
        TargetDType::Auto if plan.device == DeviceChoice::Cuda => Some(DType::Bf16),
        TargetDType::F32 => Some(DType::F32),
        TargetDType::Bf16 => Some(DType::Bf16),
        TargetDType::F16 => Some(DType::F16),
        TargetDType::Fp8 if plan.device == DeviceChoice::Cuda => Some(DType::E4m3),
        TargetDType::Fp8 => bail!("target.dtype = \"fp8\" needs a GPU; on the CPU use \"auto\""),
        TargetDType::Auto => {
            let weights = Weights::open(&plan.target.path)?;
            let elements: usize = weights
                .names()
                .filter_map(|n| weights.get(n))
                .map(|v| v.shape.iter().product::<usize>())
                .sum();
            let fits = available_memory().is_none_or(|free| (elements as u64) * 4 < free / 2);
            fits.then_some(DType::F32)
        }
    })
}

/// The target in memory: all of it, or what this one of several ranks has of it.
pub(crate) fn target(plan: &RunPlan, ranks: Option<&Arc<dyn Group>>) -> Result<Arc<Target>> {
    let (path, device, storage) = (&plan.target.path, device(plan)?, storage(plan)?);
    let target = match ranks {
        None => Target::load(path, device, storage)?,
        Some(ranks) => Target::load_shared(path, device, storage, ranks)?,
    };
    let info = target.info();
    let shared = ranks.map_or_else(String::new, |ranks| format!(", shared by {} ranks", ranks.size()));
    note!(
        "target    {} ({} layers, width {}, vocabulary {}){shared}, {}",
        info.architecture,
        info.n_layers,
        info.hidden_size,
        info.vocab_size,
        plan.target.path.display()
    );
    Ok(Arc::new(target))
}

/// The parts of the target that every draft reads, without the rest of it.
pub(crate) fn frozen(plan: &RunPlan, info: &TargetInfo) -> Result<Frozen> {
    let device = device(plan)?;
    // A batch reads a few rows of the embedding: it stays on the host.
    let [embedding, head] = specforge_models::tables(&plan.target.path, info, device.storage())?;
    Ok(Frozen { head: head.to_device(device)?, embedding })
}

/// How attention reaches the rows of other ranks.
pub(crate) fn exchange(parallel: &ParallelConfig) -> Exchange {
    match parallel.exchange {
        specforge_config::Exchange::Gather => Exchange::Gather,
        specforge_config::Exchange::Ring => Exchange::Ring,
        specforge_config::Exchange::Heads => Exchange::Heads,
    }
}

/// The parts of a target in memory that a draft reads: its own, unless it lies over other ranks than the draft does.
pub(crate) fn frozen_of(plan: &RunPlan, target: &Target, draft: &Ranks) -> Result<Frozen> {
    let (of_target, of_draft) = (target.ranks(), draft.tensor.as_ref());
    if of_target.is_some_and(|ranks| of_draft.map_or(1, |draft| draft.size()) != ranks.size()) {
        return frozen(plan, target.info());
    }
    Ok(Frozen { embedding: target.embedding().clone(), head: target.head().clone() })
}

/// The draft with fresh weights, its vocabulary counted over the supervised tokens of the prepared set.
pub(crate) fn draft(
    plan: &RunPlan,
    info: &TargetInfo,
    frozen: &Frozen,
    data: &Prepared,
    ranks: &Ranks,
) -> Result<(Box<dyn DraftMethod>, Params)> {
    let vocab = match plan.method.draft_vocab_size(info) {
        None => VocabMap::full(info.vocab_size),
        Some(size) => {
            let counts = TokenCounts::of(info.vocab_size, data.rows())?;
            let map = specforge_data::VocabMap::build(&counts, size, Unseen::Refuse)?;
            note!(
                "draft     {size} of {} tokens cover {:.2} % of the supervised text",
                info.vocab_size,
                100.0 * map.coverage(&counts)
            );
            VocabMap::from_offsets(&map.d2t, info.vocab_size)?
        }
    };
    Ok(plan.method.build_on(ranks, info, frozen, vocab, plan.seed)?)
}

/// Stands for the tokens that a draft can name, in their order.
pub(crate) fn vocab_hash(method: &dyn DraftMethod) -> String {
    let ids: Vec<u8> = method.vocab().target_ids().iter().flat_map(|id| id.to_le_bytes()).collect();
    blake3::hash(&ids).to_hex().to_string()
}

/// Puts a checkpoint's weights into place, if they are of this target and draft vocabulary: the shapes would not tell.
pub(crate) fn restore(
    checkpoint: &Checkpoint,
    plan: &RunPlan,
    method: &dyn DraftMethod,
    params: &mut Params,
) -> Result<()> {
    let identity = &checkpoint.state.identity;
    let (vocab, target) = (vocab_hash(method), Weights::open(&plan.target.path)?.fingerprint());
    for (what, now, of) in
        [("draft", vocab, "draft vocabulary (data.conversations)"), ("target", target, "target")]
    {
        if identity[what] != now.as_str() {
            bail!(
                "{}: it was trained with another {of} than the recipe names now; put back what has changed since",
                checkpoint.folder.display()
            );
        }
    }
    Ok(checkpoint.restore_weights(params)?)
}

/// Fails if a row is longer than the target can read; better said before the work than in the middle.
pub(crate) fn expect_room(info: &TargetInfo, data: &Prepared) -> Result<()> {
    let most = info.max_position_embeddings;
    let long = data.rows().map(|row| row.ids.len()).enumerate().find(|(_, len)| *len > most);
    match long {
        Some((row, len)) => {
            bail!("row {row} has {len} tokens, the target reads {most}: set data.max-length = {most}")
        }
        None => Ok(()),
    }
}

/// What captured states are rounded to.
pub(crate) fn capture_dtype(plan: &RunPlan) -> DType {
    match plan.capture.dtype {
        CaptureDType::Bf16 => DType::Bf16,
        CaptureDType::F32 => DType::F32,
    }
}

/// What a store for this plan is made of.
pub(crate) fn store_spec(
    plan: &RunPlan,
    info: &TargetInfo,
    capture: &Capture,
    data: &Prepared,
) -> Result<Spec> {
    let config = fs_err::read(plan.target.path.join("config.json"))?;
    let target = TargetIdentity {
        path: plan.target.path.display().to_string(),
        architecture: info.architecture.clone(),
        config_hash: blake3::hash(&config).to_hex().to_string(),
        weights_hash: Weights::open(&plan.target.path)?.fingerprint(),
        dtype: format!("{:?}", plan.target.dtype).to_lowercase(),
    };
    let layers = capture.layers.iter().map(|&layer| layer as u32).collect();
    Ok(Spec {
        encoding: plan.store.encoding,
        schema: features::schema(capture, info.hidden_size)?,
        identity: Identity {
            target,
            capture: CaptureSpec { layers, last_hidden: capture.last_hidden },
            tokenizer_hash: data.tokenizer_hash().to_owned(),
            template_hash: data.template_hash().unwrap_or_default().to_owned(),
            prepared_hash: data.hash().to_owned(),
            prepared_rows: data.len() as u64,
            max_length: plan.data.max_length as u64,
        },
    })
}

/// Prompts for decoding: the file's, or what comes before the first answer of held-out rows.
pub(crate) fn prompts(
    plan: &RunPlan,
    held_out: &[usize],
    data: &Prepared,
    most: usize,
) -> Result<Vec<Vec<u32>>> {
    if let Some(file) = &plan.eval.prompts {
        return prompts_from(plan, file, most);
    }
    let prompt = |&row: &usize| {
        let row = data.row(row);
        let answer = row.loss_mask.iter().position(|&m| m == 1)?;
        (answer > 0).then(|| row.ids[..answer].to_vec())
    };
    Ok(held_out.iter().filter_map(prompt).take(most).collect())
}

/// The prompts of a file.
pub(crate) fn prompts_from(plan: &RunPlan, file: &Path, most: usize) -> Result<Vec<Vec<u32>>> {
    let tokenizer = Tokenizer::open(&plan.target.path)?;
    let template = ChatTemplate::open(&plan.target.path, tokenizer.special(), &plan.data.template)?;
    let prompts = read_prompts(file, &tokenizer, Some(&template))?;
    Ok(prompts.into_iter().map(|p| p.ids).take(most).collect())
}

/// Writes a JSON file in one piece.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write_text(path, &(serde_json::to_string_pretty(value)? + "\n"))
}

/// Writes a file in one piece: it is there whole, or as it was.
pub(crate) fn write_text(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    let unfinished = path.with_extension("tmp");
    let mut file = fs_err::File::create(&unfinished)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs_err::rename(&unfinished, path).with_context(|| format!("{}: cannot be replaced", path.display()))
}
