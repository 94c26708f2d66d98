//! The optimizer's state in a checkpoint: `optimizer.safetensors`, or the files that `optimizer.index.json` lists, each
//! with one flat piece of every tensor, in the order of the pieces.

use std::path::Path;

use serde::{Deserialize, Serialize};
use specforge_nn::weights::{View, Weights};
use specforge_parallel::Shards;
use specforge_tensor::{Device, Tensor};

use super::open;
use crate::{Error, Result};

/// The state in one file.
const SINGLE: &str = "optimizer.safetensors";
/// The list of the files of a state in several.
pub(crate) const INDEX: &str = "optimizer.index.json";

/// What `optimizer.index.json` holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Index {
    /// In the order of the pieces.
    pub files: Vec<String>,
}

/// The name of file `file` of `files`, from 0.
pub(crate) fn file_name(file: usize, files: usize) -> String {
    if files == 1 {
        SINGLE.to_owned()
    } else {
        format!("optimizer-{:05}-of-{files:05}.safetensors", file + 1)
    }
}

/// A saved state, open for reading.
#[derive(Debug)]
pub(crate) struct Saved {
    files: Vec<Weights>,
}

impl Saved {
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        if !index.exists() {
            return Ok(Self { files: vec![open(folder.join(SINGLE))?] });
        }
        let damaged = |reason: String| Error::Checkpoint { path: index.clone(), reason };
        let listed: Index = serde_json::from_str(&fs_err::read_to_string(&index)?)
            .map_err(|e| damaged(format!("{e}; choose another checkpoint with --resume FOLDER")))?;
        if let Some(name) = listed.files.iter().find(|name| name.contains(['/', '\\'])) {
            return Err(damaged(format!("expected files beside it, got {name:?}")));
        }
        let files = listed.files.iter().map(|name| open(folder.join(name))).collect::<Result<_>>()?;
        Ok(Self { files })
    }

    /// The elements of a tensor of all files together; `None` where one does not have it.
    fn elements(&self, name: &str) -> Option<(Vec<f32>, Vec<usize>)> {
        let views = self.files.iter().map(|file| file.get(name)).collect::<Option<Vec<_>>>()?;
        if name.starts_with("step.") {
            return Some((views.first()?.to_f32(), vec![1]));
        }
        let values: Vec<f32> = views.iter().flat_map(View::to_f32).collect();
        let shape = if views.len() == 1 { views[0].shape.to_vec() } else { vec![values.len()] };
        Some((values, shape))
    }

    /// A whole tensor, of this shape if its elements are as many.
    pub(crate) fn whole(&self, name: &str, shape: Option<&[usize]>) -> Option<Tensor> {
        let (values, saved) = self.elements(name)?;
        // Pieces are flat; a tensor that was saved whole has to have the shape itself.
        let is_flat = saved.len() == 1;
        let fits = |shape: &&[usize]| is_flat && shape.iter().product::<usize>() == values.len();
        let shape = shape.filter(fits).map_or(saved, <[usize]>::to_vec);
        Tensor::from_f32(Device::Cpu, values, &shape).ok()
    }

    /// A rank's part of a tensor.
    pub(crate) fn part(&self, name: &str, shards: &Shards) -> Option<Tensor> {
        let whole = self.whole(name, None)?;
        if name.starts_with("step.") { Some(whole) } else { shards.cut(&whole).ok() }
    }
}
