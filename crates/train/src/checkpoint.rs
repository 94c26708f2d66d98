//! Checkpoints: a folder per saved step with the draft's weights, the optimizer's state (one file, or one of each rank
//! that holds a part) and `state.json`. A folder appears complete or not at all: written under a temporary name, synced,
//! renamed; `latest` and `best` name one. Any number of ranks reads what any other number has written.

mod saved;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use specforge_export::Tensor as FileTensor;
use specforge_nn::weights::{self, Weights};
use specforge_tensor::{DType, Device, Params, Tensor};

use crate::saving::Snapshot;
use crate::{Error, Optimizer, Result};

pub(crate) use saved::{INDEX, Index, Saved, Wanted};

/// Where a run stands in its order of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Steps taken.
    pub step: u64,
    /// The epoch, from 0.
    pub epoch: u64,
    /// Steps taken of the epoch.
    pub epoch_step: u64,
}

/// Everything of the loop besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Version of this layout.
    pub format: u32,
    /// Where the run stands.
    pub position: Position,
    /// Tokens trained on.
    pub tokens: u64,
    /// Highest acceptance length so far and its step.
    pub best: Option<Best>,
    /// The run's settings that decide its bits.
    pub identity: serde_json::Value,
}

/// The best checkpoint so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// Its acceptance length.
    pub acceptance_length: f64,
    /// Whether that is from decoding, or estimated from held-out accuracies because no target was at hand.
    pub decoded: bool,
}

/// The layout that this version writes.
const FORMAT: u32 = 1;
pub(crate) const STATE: &str = "state.json";
pub(crate) const DRAFT: &str = "draft.safetensors";

impl State {
    /// The state of a run that has not begun.
    pub fn new(identity: serde_json::Value) -> Self {
        Self { format: FORMAT, position: Position::default(), tokens: 0, best: None, identity }
    }
}

/// A saved step.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its folder.
    pub folder: PathBuf,
    /// Its state.
    pub state: State,
}

impl Checkpoint {
    /// Opens the folder of one checkpoint.
    pub fn open(folder: &Path) -> Result<Self> {
        let damaged = |reason: String| Error::Checkpoint { path: folder.join(STATE), reason };
        let text = fs_err::read_to_string(folder.join(STATE))?;
        let state: State = serde_json::from_str(&text)
            .map_err(|e| damaged(format!("{e}; choose another checkpoint with --resume FOLDER")))?;
        if state.format != FORMAT {
            return Err(damaged(format!("format {}, this version reads format {FORMAT}", state.format)));
        }
        Ok(Self { folder: folder.to_owned(), state })
    }

    /// The draft's weights file.
    pub fn draft(&self) -> PathBuf {
        self.folder.join(DRAFT)
    }

    /// Puts the saved weights into `params`, exactly, and the optimizer as it was.
    pub fn restore(&self, params: &mut Params, optimizer: &mut Optimizer) -> Result<()> {
        optimizer.gather(params)?;
        self.restore_weights(params)?;
        optimizer.restore(params, self.state.position.step, &Saved::open(&self.folder)?)
    }

    /// Puts the saved weights of the draft into place, or of matrices that ranks share this one's pieces.
    pub fn restore_weights(&self, params: &mut Params) -> Result<()> {
        let weights = open(self.draft())?;
        let ids: Vec<_> = params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
        for id in ids {
            let param = params.get_mut(id);
            let whole = weights.require(&param.name, &param.whole_shape())?.to_f32();
            param.assign_whole(&Tensor::from_f32(Device::Cpu, whole, &param.whole_shape())?)?;
        }
        Ok(())
    }
}

/// The checkpoints of a run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    /// How many to keep besides the latest and the best; 0 keeps all.
    keep: usize,
}

impl Checkpoints {
    /// Those in `folder`, which need not be there yet.
    pub fn open(folder: PathBuf, keep: usize) -> Result<Self> {
        fs_err::create_dir_all(&folder)?;
        Ok(Self { folder, keep })
    }

    /// Finishes what an interrupted process began: removes remains of writes, and makes `latest` and `best` name what
    /// the newest checkpoint says. For the process that trains alone: another one's unfinished files look the same.
    pub fn recover(&self) -> Result<()> {
        for entry in fs_err::read_dir(&self.folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().ends_with(".tmp") {
                let path = entry.path();
                if path.is_dir() { fs_err::remove_dir_all(path)? } else { fs_err::remove_file(path)? }
            }
        }
        let Some(Checkpoint { state, .. }) = self.latest()? else { return Ok(()) };
        self.point("latest", &name(state.position.step))?;
        match state.best.map(|best| name(best.step)) {
            Some(best) if self.folder.join(&best).exists() => self.point("best", &best),
            _ => Ok(()),
        }
    }

    /// The checkpoint that `latest` or `best` names.
    pub fn named(&self, name: &str) -> Result<Option<Checkpoint>> {
        let pointer = self.folder.join(name);
        if !pointer.exists() {
            return Ok(None);
        }
        let step = fs_err::read_to_string(&pointer)?;
        let step = step.trim();
        if !step.starts_with("step-") || step.contains(['/', '\\']) {
            let reason = format!("expected the name of a checkpoint beside it, got {step:?}");
            return Err(Error::Checkpoint { path: pointer, reason });
        }
        Checkpoint::open(&self.folder.join(step)).map(Some)
    }

    /// The newest complete checkpoint. A pointer that was not updated in time does not hide a newer folder.
    pub fn latest(&self) -> Result<Option<Checkpoint>> {
        match self.steps()?.pop() {
            Some((_, folder)) => Checkpoint::open(&folder).map(Some),
            None => Ok(None),
        }
    }

    /// Complete checkpoints, oldest first.
    fn steps(&self) -> Result<Vec<(u64, PathBuf)>> {
        let mut steps = Vec::new();
        for entry in fs_err::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            if let Some(step) = name.strip_prefix("step-").and_then(|n| n.parse().ok()) {
                steps.push((step, path));
            }
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Writes a step; `latest` names it, and `best` too if it is. Older ones beyond the limit are removed. Every rank
    /// writes its own files; the first one waits for the others' and does the rest.
    pub(crate) fn write(&self, snapshot: &Snapshot) -> Result<PathBuf> {
        let state = &snapshot.state;
        let name = name(state.position.step);
        let (folder, unfinished) = (self.folder.join(&name), self.folder.join(format!("{name}.tmp")));
        if !folder.exists() {
            match snapshot.write(&unfinished) {
                // The first rank took the folder as soon as this one's file was there, before it could look back at it.
                Err(_) if !snapshot.is_first && folder.exists() => {}
                Err(error) => {
                    // The first error is the one to report; a full disk should not stay full of this.
                    let _ = fs_err::remove_dir_all(&unfinished);
                    return Err(error);
                }
                Ok(()) => {}
            }
            if snapshot.is_first {
                fs_err::rename(&unfinished, &folder)?;
                sync_folder(&self.folder)?;
            }
        }
        if snapshot.is_first {
            self.point("latest", &name)?;
            if state.best.is_some_and(|best| best.step == state.position.step) {
                self.point("best", &name)?;
            }
            self.rotate(state)?;
        }
        Ok(folder)
    }

    /// Makes `latest` or `best` name a checkpoint.
    fn point(&self, name: &str, step: &str) -> Result<()> {
        if fs_err::read_to_string(self.folder.join(name)).is_ok_and(|named| named.trim() == step) {
            return Ok(());
        }
        let unfinished = self.folder.join(format!("{name}.tmp"));
        write_synced(&unfinished, &format!("{step}\n"))?;
        fs_err::rename(&unfinished, self.folder.join(name))?;
        sync_folder(&self.folder)
    }

    fn rotate(&self, state: &State) -> Result<()> {
        let steps = self.steps()?;
        if self.keep == 0 || steps.len() <= self.keep {
            return Ok(());
        }
        // A run that was taken up at an earlier step is not among the newest for a while.
        let needed = [Some(state.position.step), state.best.map(|best| best.step)];
        for (step, folder) in &steps[..steps.len() - self.keep] {
            if !needed.contains(&Some(*step)) {
                // Renamed first: a removal that is cut short leaves no folder that looks complete.
                let gone = folder.with_extension("tmp");
                fs_err::rename(folder, &gone)?;
                fs_err::remove_dir_all(gone)?;
            }
        }
        Ok(())
    }
}

/// Opens a file of a checkpoint; a damaged one cannot be downloaded again, but there may be an earlier one.
pub(crate) fn open(path: PathBuf) -> Result<Weights> {
    Weights::open(&path).map_err(|error| {
        let what = match error {
            weights::Error::Size { expected, got, .. } => {
                format!("cut off or damaged: {got} bytes, but its header describes {expected}")
            }
            other => other.to_string(),
        };
        Error::Checkpoint {
            path,
            reason: format!("{what}; choose an earlier checkpoint with --resume FOLDER"),
        }
    })
}

/// The name of a step's folder.
fn name(step: u64) -> String {
    format!("step-{step:08}")
}

/// A tensor as a file keeps it: bf16 as it is, everything else exactly in float32.
pub(crate) fn file_tensor(name: &str, value: &Tensor) -> FileTensor<'static> {
    match value.dtype() {
        DType::Bf16 => FileTensor::bf16(name, value.shape(), &value.to_f32()),
        _ => FileTensor::f32(name, value.shape(), &value.to_f32()),
    }
}

pub(crate) fn write_synced(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    let mut file = fs_err::File::create(path)?;
    file.write_all(text.as_bytes())?;
    Ok(file.sync_all()?)
}

pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    Ok(fs_err::File::open(folder)?.sync_all()?)
}
