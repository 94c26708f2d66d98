//! `specforge export`: a checkpoint as the folder that SGLang loads; and the check of any such folder.

mod push;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use specforge_config::RunPlan;
use specforge_export::{
    Eagle3Config, Eagle3Export, Severity, Tensor as FileTensor, WriteOptions, check, is_earlier_export,
    read_eagle3, rope_parameters,
};
use specforge_methods::{DraftMethod, Frozen, MethodConfig, Ranks, VocabMap, eagle3};
use specforge_models::{Capture, TargetInfo};
use specforge_tensor::{Params, Tensor};

use super::eval::checkpoint;
use crate::hub;
use crate::setup::{self, RecipeArgs};
use crate::show::{note, print};

/// Write a checkpoint as the folder that SGLang loads as it is, or check such a folder.
///
/// Training exports its best checkpoint by itself; this command exports another one, or to another place.
/// With --check, any EAGLE3 folder is verified against what the serving side reads: names, shapes, dtypes, vocabulary
/// maps, configuration. A folder made by other programs may be checked too.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent flags of the command line")]
pub(crate) struct Args {
    /// The recipe whose run is exported.
    #[arg(required_unless_present = "check")]
    recipe: Option<PathBuf>,
    /// Replaces a value of the recipe.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// `best`, `latest`, or the folder of a checkpoint.
    #[arg(long, default_value = "best")]
    checkpoint: String,
    /// Where to, instead of the recipe's place.
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// Also write the embeddings, as Hugging Face's form has them; SGLang takes the target's.
    #[arg(long)]
    embeddings: bool,
    /// Replace whatever is in the output folder.
    #[arg(long)]
    overwrite: bool,
    /// Upload the folder to this repository (owner/name) of the Hugging Face hub, with a model card that holds the recipe;
    /// needs HF_TOKEN.
    #[arg(long, value_name = "REPOSITORY", conflicts_with = "check")]
    push: Option<String>,
    /// With --push: a repository that is made is private.
    #[arg(long, requires = "push")]
    private: bool,
    /// Verify this folder instead of writing one.
    #[arg(long, value_name = "FOLDER")]
    check: Option<PathBuf>,
    /// With --check: the target's folder, to compare vocabulary, width and context length with.
    #[arg(long, value_name = "FOLDER", requires = "check")]
    target: Option<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Where and how to write.
#[derive(Debug)]
pub(crate) struct Options {
    path: PathBuf,
    write: WriteOptions,
}

impl Options {
    /// As the plan says.
    pub(crate) fn of(plan: &RunPlan, overwrite: bool) -> Self {
        let write = WriteOptions { overwrite, with_embeddings: plan.export.embeddings };
        Self { path: plan.export.path.clone(), write }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(written) = &args.check {
        let folder = hub::folder(written)?.unwrap_or_else(|| written.clone());
        let target = match &args.target {
            Some(written) => Some(hub::folder(written)?.unwrap_or_else(|| written.clone())),
            None => None,
        };
        return run_check(&folder, target.as_deref(), args.json);
    }
    let id = args.push.as_deref().map(push::repository).transpose()?;
    let recipe = args.recipe.clone().context("expected a recipe, or --check FOLDER")?;
    let recipe = RecipeArgs { recipe, sets: args.sets.clone() };
    let plan = recipe.plan()?;
    let info = TargetInfo::read(&plan.target.path)?;
    let data = setup::prepared(&plan)?;
    let (method, mut params) =
        setup::draft(&plan, &info, &setup::frozen(&plan, &info)?, &data, &Ranks::default())?;
    setup::restore(&checkpoint(&plan, &args.checkpoint)?, &plan, method.as_ref(), &mut params)?;
    let mut options = Options::of(&plan, args.overwrite);
    options.write.with_embeddings |= args.embeddings;
    options.path = args.output.clone().unwrap_or(options.path);
    let folder = write(&plan, &info, method.as_ref(), &params, &options)?;
    let url = match id {
        Some(id) => Some(push::push(
            &id,
            args.private,
            &folder,
            &push::card(&id, &recipe, &plan, &data, best_of(args))?,
        )?),
        None => None,
    };
    if args.json {
        return print(json!({ "export_dir": folder, "url": url }));
    }
    print(folder.display())?;
    url.map_or(Ok(()), print)
}

/// Whether the exported checkpoint is the one that the run's summary is about.
fn best_of(args: &Args) -> bool {
    args.checkpoint == "best"
}

fn run_check(folder: &Path, target: Option<&Path>, as_json: bool) -> Result<()> {
    let report = check(folder, target);
    let errors = report.errors().count();
    if as_json {
        let problem = |p: &specforge_export::Problem| {
            let severity = if p.severity == Severity::Error { "error" } else { "warning" };
            json!({ "severity": severity, "about": p.about, "what": p.what, "fix": p.fix })
        };
        let problems: Vec<_> = report.problems.iter().map(problem).collect();
        print(json!({ "ok": errors == 0, "tensors": report.tensors, "problems": problems }))?;
    } else {
        report.problems.iter().try_for_each(print)?;
        let verdict = if errors == 0 { "PASS" } else { "FAIL" };
        print(format_args!(
            "{verdict}: {} ({} tensors, {} values)",
            folder.display(),
            report.tensors,
            report.elements
        ))?;
    }
    if errors > 0 {
        bail!(
            "{}: {errors} of {} problems keep it from being served",
            folder.display(),
            report.problems.len()
        );
    }
    Ok(())
}

/// Fails if a run could not be exported to this folder in the end; better said before the training than after.
pub(crate) fn check_place(path: &Path) -> Result<()> {
    let free = !path.exists() || path.is_dir() && fs_err::read_dir(path)?.next().is_none();
    if !free && !is_earlier_export(path)? {
        bail!(
            "{}: the draft is to be exported there, but it has something else in it; choose another export.path",
            path.display()
        );
    }
    Ok(())
}

/// Writes the serving folder of a draft; returns its path.
pub(crate) fn write(
    plan: &RunPlan,
    info: &TargetInfo,
    method: &dyn DraftMethod,
    params: &Params,
    options: &Options,
) -> Result<PathBuf> {
    let mut config = serde_json::Map::from_iter(method.export_config());
    config.insert("rope_parameters".to_owned(), rope_parameters(&info.raw).into());
    config.insert("num_hidden_layers".to_owned(), json!(1));
    let mut config = Eagle3Config::parse(&plan.export.path, &config.into())?;
    let layers = &method.capture().layers;
    let default = Capture::eagle3_default(info.n_layers).map(|c| c.layers).unwrap_or_default();
    config.capture_layers = (*layers != default).then(|| layers.clone());
    let mut tensors: Vec<FileTensor<'_>> =
        params.iter().map(|(_, p)| FileTensor::f32(&p.name, p.value.shape(), &p.value.f32s())).collect();
    tensors.push(FileTensor::i64("d2t", &method.vocab().d2t()));
    tensors.push(FileTensor::bool("t2d", &method.vocab().t2d()));
    let warnings = Eagle3Export { config, tensors, target: &info.raw }.write(&options.path, options.write)?;
    warnings.iter().for_each(|warning| note!("{warning}"));
    Ok(options.path.clone())
}

/// A draft from an EAGLE3 folder, over the target's frozen parts.
pub(crate) fn load(
    folder: &Path,
    plan: &RunPlan,
    info: &TargetInfo,
    frozen: &Frozen,
) -> Result<(Box<dyn DraftMethod>, Params)> {
    let read = read_eagle3(folder)?;
    if let Some(how) = read.departures().first() {
        bail!(
            "{}: {how}, which this program does not compute; the folder can only be trained on (train.warm-start)",
            folder.display()
        );
    }
    if let Some(window) = read.window() {
        note!(
            "warning: {} was trained to see {window} tokens; here and in SGLang it sees all",
            folder.display()
        );
    }
    let dims = eagle3::Dims::from_json(&read.config_json)
        .with_context(|| format!("{}/config.json", folder.display()))?;
    let capture = match read.config.capture_layers.clone() {
        Some(layers) => Capture { layers, last_hidden: true },
        None => Capture::eagle3_default(info.n_layers)?,
    };
    let mut params = Params::new();
    for (name, shape) in dims.weights() {
        let value = match read.tensors.get(&name) {
            Some(tensor) if tensor.shape == shape => {
                let device = frozen.embedding.device();
                Tensor::from_f32(device, tensor.to_f32(), &shape)?.cast(device.storage())?
            }
            Some(tensor) => {
                bail!("{}: {name} has shape {:?}, expected {shape:?}", folder.display(), tensor.shape)
            }
            None if name == "embed_tokens.weight" && frozen.embedding.shape() == shape => {
                frozen.embedding.clone()
            }
            None => bail!("{}: {name} is missing", folder.display()),
        };
        params.add(name, value, false);
    }
    let vocab = match read.tensors.get("d2t") {
        Some(d2t) => {
            let offsets: Vec<i64> = d2t
                .bytes
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes")))
                .collect();
            VocabMap::from_offsets(&offsets, dims.vocab_size)?
        }
        None => VocabMap::full(dims.vocab_size),
    };
    let MethodConfig::Eagle3(config) = &plan.method else {
        bail!("{}: an EAGLE3 folder, but the recipe's method is {}", folder.display(), plan.method.name());
    };
    let method = eagle3::Eagle3::over(config, dims, capture, frozen, vocab, &params)?;
    note!("draft     {}", folder.display());
    Ok((Box::new(method), params))
}
