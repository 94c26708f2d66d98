//! `specforge import`: features that another program captured become the feature store of a recipe.

mod rows;
mod verify;

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use serde::Serialize;
use specforge_config::RunPlan;
use specforge_data::Prepared;
use specforge_import::{FeatureFile, Features, RowIndex, files};
use specforge_models::{Capture, FinalNorm, TargetInfo};
use specforge_store::{Reader, Writer, WriterOptions};
use specforge_tensor::{Device, Tensor};
use specforge_train::features::{self, RowFeatures};

use super::capture::stop_on_signal;
use crate::setup::{self, RecipeArgs};
use crate::show::{Progress, bytes, note, print, table};

/// Turn features that SpecForge or speculators captured into the store that offline training reads.
///
/// Reads SpecForge's data_*.ckpt and .ckpt.gz and speculators' hs_*.safetensors and data_*.pt in --from and below; files
/// of PyTorch are read as data and never run. Rows of the recipe's conversations are found by their tokens, so that
/// padding, other names and another order do no harm, and the loss mask is the recipe's. Stopped or killed, the same
/// command goes on where it was; rows that no file has can be captured with `specforge capture`.
///
/// Without the conversations, --write-rows makes a file of token ids and loss masks that data.conversations may name.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The recipe, a TOML file. Paths in it start at the current folder.
    #[arg(required_unless_present = "write_rows")]
    recipe: Option<PathBuf>,
    /// Replaces a value of the recipe.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// The folder with the other program's files.
    #[arg(long, value_name = "FOLDER")]
    from: PathBuf,
    /// Only write token ids and loss masks of all files to this JSONL file.
    #[arg(long, value_name = "FILE")]
    write_rows: Option<PathBuf>,
    /// Whether the last hidden state is after the target's final norm; without this SpecForge's is, speculators' is not.
    #[arg(long, value_enum, value_name = "WHICH")]
    last_hidden: Option<LastHidden>,
    /// Run the target on so many of the rows and compare.
    #[arg(long, value_name = "ROWS", default_value_t = 0)]
    verify: usize,
    /// Print a summary as JSON.
    #[arg(long)]
    json: bool,
}

/// What a file's last hidden state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LastHidden {
    /// After the final norm: the head's input.
    Normed,
    /// Before it.
    Raw,
}

/// Files that are read side by side before their rows are written.
const FILES_AT_ONCE: usize = 16;
/// Files that could not be used are named up to this many.
const NAMED: usize = 5;

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct Summary {
    store: PathBuf,
    rows: u64,
    imported: u64,
    already_there: u64,
    missing: u64,
    files: u64,
    /// Files whose tokens are those of no row.
    without_row: u64,
    /// Files that could not be read.
    unreadable: u64,
    /// Rows whose loss mask in the file is not the recipe's.
    other_masks: u64,
    /// Of the tokens that a loss may read: how often the target's best next token is the one that follows.
    next_token_is_best: Option<f64>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(out) = &args.write_rows {
        return rows::write(&args.from, out);
    }
    let recipe = args.recipe.clone().context("expected a recipe, or --write-rows FILE")?;
    let plan = RecipeArgs { recipe, sets: args.sets.clone() }.plan()?;
    let files = files(&args.from)?;
    let data = setup::prepared(&plan)?;
    let info = TargetInfo::read(&plan.target.path)?;
    info.expect_teacher()?;
    setup::expect_room(&info, &data)?;
    let capture = plan.method.capture(&info)?;
    let spec = setup::store_spec(&plan, &info, &capture, &data)?;
    let options = WriterOptions { shard_bytes: plan.store.shard_bytes, ..WriterOptions::default() };
    let mut writer = Writer::open(&plan.store.path, &spec, &options)?;
    let mut summary = Summary {
        store: plan.store.path.clone(),
        rows: data.len() as u64,
        already_there: writer.rows().len() as u64,
        files: files.len() as u64,
        ..Summary::default()
    };
    note!("import    states taken for the outputs of layers {:?}, as the recipe says", capture.layers);
    let importer = Importer::new(args, &plan, info, capture, &data)?;
    let imported = importer.all(&files, &mut writer, &mut summary);
    writer.finish()?;
    let stopped = imported?;
    summary.missing = summary.rows - summary.already_there - summary.imported;
    if args.verify > 0 && summary.imported + summary.already_there > 0 {
        verify::against_target(&plan, &data, &importer.capture, args.verify)?;
    }
    conclude(args, &summary, stopped)
}

fn conclude(args: &Args, summary: &Summary, stopped: bool) -> Result<()> {
    if args.json {
        print(serde_json::to_string_pretty(summary)?)?;
    } else {
        print(table(&shown(summary)))?;
    }
    let Summary { missing, rows, .. } = summary;
    if stopped {
        bail!("stopped with {} of {rows} rows imported; run the same command again to go on", rows - missing);
    }
    if *missing > 0 {
        bail!(
            "{missing} of {rows} rows have no features: no file begins with their tokens. If that is all or most, \
             conversations, template or data.max-length are not those of the files (--write-rows makes rows of what the \
             files hold); the rest can be captured: `specforge capture` with this recipe goes on in the same store"
        );
    }
    Ok(())
}

fn shown(s: &Summary) -> Vec<(&'static str, String)> {
    let store = Reader::open(&s.store).map(|reader| reader.summary());
    let size = store.map_or_else(|_| "nothing".to_owned(), |store| bytes(store.bytes));
    let best = |share: f64| format!("{:.0} % of supervised places", 100.0 * share);
    vec![
        ("store", s.store.display().to_string()),
        ("rows", format!("{} imported, {} were there, {} missing", s.imported, s.already_there, s.missing)),
        ("files", format!("{} read, {} of no row, {} unreadable", s.files, s.without_row, s.unreadable)),
        ("loss masks unlike the files'", s.other_masks.to_string()),
        ("target's best token follows at", s.next_token_is_best.map_or("none read".to_owned(), best)),
        ("size", size),
    ]
}

/// What turns a file into rows.
struct Importer<'a> {
    data: &'a Prepared,
    info: TargetInfo,
    capture: Capture,
    head: Tensor,
    norm: Option<FinalNorm>,
    last_hidden: Option<LastHidden>,
}

/// The rows of one file, or why there are none.
enum Read {
    Rows(Vec<(usize, RowFeatures)>, u64),
    NoRow,
    Unreadable(String),
}

impl<'a> Importer<'a> {
    fn new(
        args: &Args,
        plan: &RunPlan,
        info: TargetInfo,
        capture: Capture,
        data: &'a Prepared,
    ) -> Result<Self> {
        let head = setup::frozen(plan, &info)?.head;
        let norm = match args.last_hidden {
            Some(LastHidden::Normed) => None,
            _ => Some(FinalNorm::open(&plan.target.path, &info, Device::Cpu)?),
        };
        Ok(Self { data, info, capture, head, norm, last_hidden: args.last_hidden })
    }

    /// Imports all files; whether it was stopped by a signal.
    fn all(&self, files: &[PathBuf], writer: &mut Writer, summary: &mut Summary) -> Result<bool> {
        let missing = (0..self.data.len()).filter(|&row| !writer.contains(row as u64));
        let index = RowIndex::new(missing.map(|row| (self.data.row(row).ids, row)));
        let stop = stop_on_signal()?;
        let progress = Progress::new("import", false);
        let (mut best, mut done) = ((0, 0), 0);
        for some in files.chunks(FILES_AT_ONCE) {
            let read: Vec<Result<Read>> = some.par_iter().map(|file| self.read(file, &index)).collect();
            for (file, read) in some.iter().zip(read) {
                let read = read.with_context(|| file.display().to_string())?;
                take(read, writer, summary, &mut best, &progress)?;
            }
            done += some.len() as u64;
            progress.set(done, files.len() as u64);
            if stop.load(Ordering::Relaxed) && done < files.len() as u64 {
                progress.done();
                return Ok(true);
            }
        }
        progress.done();
        summary.next_token_is_best = (best.1 > 0).then(|| best.0 as f64 / best.1 as f64);
        warn_of_strangers(summary, best.1);
        Ok(false)
    }

    /// The rows of one file; an error is one of ours, what the file is to blame for is not.
    fn read(&self, path: &std::path::Path, index: &RowIndex<'_>) -> Result<Read> {
        let opened = FeatureFile::open(path, self.most_bytes());
        let file = match opened {
            Ok(file) => file,
            Err(error) => return Ok(Read::Unreadable(error.to_string())),
        };
        let features = match file.features() {
            Ok(features) => features,
            Err(error) => return Ok(Read::Unreadable(error.to_string())),
        };
        let rows = index.begun_by(&features.input_ids);
        if rows.is_empty() {
            return Ok(Read::NoRow);
        }
        self.rows(path, &features, &rows)
    }

    fn rows(&self, path: &std::path::Path, features: &Features<'_>, rows: &[usize]) -> Result<Read> {
        let (layers, width) = (self.capture.layers.len(), self.info.hidden_size);
        let unreadable = |why: String| Ok(Read::Unreadable(format!("{}: {why}", path.display())));
        let Some(last) = &features.last_hidden else {
            return unreadable(
                "no last hidden state, which the teacher's distribution comes from".to_owned(),
            );
        };
        let (got, expected) = ([features.hidden_states.width(), last.width()], [layers * width, width]);
        if got != expected {
            return unreadable(format!(
                "states of width {} and last hidden states of width {}; {layers} layers of this target have {} and {}",
                got[0], got[1], expected[0], expected[1]
            ));
        }
        let longest = rows.iter().map(|&row| self.data.row(row).ids.len()).max().unwrap_or(0);
        let (Some(states), Some(last)) = (features.hidden_states.first(longest), last.first(longest)) else {
            return unreadable("a hidden state is NaN or infinite".to_owned());
        };
        let states = Tensor::from_bf16(Device::Cpu, states, &[longest, layers * width])?;
        let last =
            self.normed(Tensor::from_bf16(Device::Cpu, last, &[longest, width])?, features.is_normed)?;
        let mut found = Vec::new();
        let mut other_masks = 0;
        for &number in rows {
            let row = self.data.row(number);
            let n = row.ids.len();
            let (states, last) = (states.rows(0..n)?, last.rows(0..n)?);
            found.push((number, features::with_teacher(row, states, last, &self.head)?));
            let mask = features.loss_mask.as_ref().map(|mask| &mask[..n]);
            other_masks += u64::from(mask.is_some_and(|mask| mask != row.loss_mask));
        }
        Ok(Read::Rows(found, other_masks))
    }

    /// The last hidden state after the final norm, in bf16.
    fn normed(&self, last: Tensor, is_normed: bool) -> Result<Tensor> {
        let is_normed = self.last_hidden.map_or(is_normed, |which| which == LastHidden::Normed);
        match &self.norm {
            Some(norm) if !is_normed => Ok(norm.apply(&last)?.cast(specforge_tensor::DType::Bf16)?),
            _ => Ok(last),
        }
    }

    /// The most that one row's file can take: the target's longest row in float32, and its ids and mask.
    fn most_bytes(&self) -> u64 {
        let per_token = (self.capture.layers.len() + 1) * self.info.hidden_size * 4 + 32;
        (self.info.max_position_embeddings as u64).saturating_mul(per_token as u64).saturating_add(1 << 20)
    }
}

/// Writes the rows of a file that are not in the store yet.
fn take(
    read: Read,
    writer: &mut Writer,
    summary: &mut Summary,
    best: &mut (u64, u64),
    progress: &Progress,
) -> Result<()> {
    match read {
        Read::NoRow => summary.without_row += 1,
        Read::Unreadable(why) => {
            summary.unreadable += 1;
            if summary.unreadable <= NAMED as u64 {
                progress.line(&format!("warning: left out: {why}"));
            }
        }
        Read::Rows(rows, other_masks) => {
            summary.other_masks += other_masks;
            for (row, of_row) in &rows {
                // An earlier file may have had it.
                if !writer.contains(*row as u64) {
                    features::append(writer, *row, of_row)?;
                    summary.imported += 1;
                    count_best(of_row, best);
                }
            }
        }
    }
    Ok(())
}

fn count_best(row: &RowFeatures, (hits, all): &mut (u64, u64)) {
    let next = row.input_ids.iter().skip(1);
    for ((&best, &next), supervised) in row.argmax.iter().zip(next).zip(row.loss_mask.iter().skip(1)) {
        *all += u64::from(*supervised);
        *hits += u64::from(*supervised == 1 && best == next);
    }
}

/// States of another model, or before the final norm, predict nothing.
fn warn_of_strangers(summary: &Summary, places: u64) {
    if summary.next_token_is_best.is_some_and(|share| share < 0.1) && places >= 100 {
        note!(
            "warning: at less than 10 % of the supervised places the target's best token is the one that follows: are these \
             states of this target, is --last-hidden right, are the answers the target's own? --verify 4 compares them"
        );
    }
}
