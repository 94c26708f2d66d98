//! The optimizer's state in a checkpoint: `optimizer.safetensors`, or the files that `optimizer.index.json` lists, each
//! with one flat part of every tensor, in the order of the parts. Where ranks share matrices, the parts are those of a
//! rank's piece of a matrix, one rank's files after the other's, and the list says how the whole was cut.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use specforge_nn::weights::{View, Weights};
use specforge_tensor::{Device, Param, Params, Split, Tensor};

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
    /// In the order of the parts, one rank's of those that share matrices after the other's.
    pub files: Vec<String>,
    /// Ranks that shared matrices.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    tensor: usize,
    /// The parameters of which each of them had a piece.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    cuts: BTreeMap<String, Cut>,
}

/// How a matrix was cut.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cut {
    /// Whether rows were; columns otherwise.
    rows: bool,
    /// Into so many pieces; neighbouring ranks had the same one where they were more.
    pieces: usize,
    /// The whole.
    shape: Vec<usize>,
}

fn one() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_one(n: &usize) -> bool {
    *n == 1
}

impl Index {
    /// Of so many files of ranks of which `tensor` share matrices, as `params` say.
    pub(crate) fn new(files: usize, tensor: usize, params: &Params) -> Self {
        let cut = |param: &Param| {
            let Wanted { shape, split } = Wanted::of(param);
            split.map(|split| (param.name.clone(), Cut { rows: split.rows, pieces: split.pieces, shape }))
        };
        let cuts = params.iter().filter(|(_, param)| param.trainable).filter_map(|(_, param)| cut(param));
        let names = (0..files).map(|file| file_name(file, files));
        Self { files: names.collect(), tensor, cuts: cuts.collect() }
    }

    fn check(&self) -> Result<(), String> {
        if let Some(name) = self.files.iter().find(|name| name.contains(['/', '\\'])) {
            return Err(format!("expected files beside it, got {name:?}"));
        }
        let (files, tensor) = (self.files.len(), self.tensor);
        if tensor == 0 || files == 0 || !files.is_multiple_of(tensor) {
            return Err(format!("expected as many files of each of {tensor} ranks, got {files}"));
        }
        let odd = self.cuts.iter().find(|(_, cut)| !(1..=tensor).contains(&cut.pieces));
        odd.map_or(Ok(()), |(name, cut)| {
            Err(format!("{name}: expected 1 to {tensor} pieces, got {}", cut.pieces))
        })
    }
}

/// What a rank needs of a saved tensor of a parameter.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// Of the whole.
    shape: Vec<usize>,
    /// The rank's piece of it.
    split: Option<Split>,
}

impl Wanted {
    pub(crate) fn of(param: &Param) -> Self {
        Self { shape: param.whole_shape(), split: param.split }
    }

    /// The rank's piece of a whole tensor of this shape; another one is passed on for whoever knows what to say.
    pub(crate) fn cut(&self, whole: Tensor) -> Option<Tensor> {
        match self.split.filter(|_| whole.shape() == self.shape) {
            Some(split) => split.cut(&whole).ok(),
            None => Some(whole),
        }
    }
}

/// The name of file `file` of `files`, from 0.
fn file_name(file: usize, files: usize) -> String {
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
    index: Index,
}

impl Saved {
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        if !index.exists() {
            let index = Index::new(1, 1, &Params::new());
            return Ok(Self { files: vec![open(folder.join(SINGLE))?], index });
        }
        let damaged = |reason: String| Error::Checkpoint { path: index.clone(), reason };
        let index: Index = serde_json::from_str(&fs_err::read_to_string(&index)?)
            .map_err(|e| damaged(format!("{e}; choose another checkpoint with --resume FOLDER")))?;
        index.check().map_err(damaged)?;
        let files = index.files.iter().map(|name| open(folder.join(name))).collect::<Result<_>>()?;
        Ok(Self { files, index })
    }

    /// The elements of what one of the ranks that shared matrices had of a tensor, and their shape; `None` where a file
    /// does not have it.
    fn elements(&self, name: &str, rank: usize) -> Option<(Vec<f32>, Vec<usize>)> {
        let parts = self.files.len() / self.index.tensor;
        let files = &self.files[rank * parts..(rank + 1) * parts];
        let views = files.iter().map(|file| file.get(name)).collect::<Option<Vec<_>>>()?;
        if name.starts_with("step.") {
            return Some((views.first()?.to_f32(), vec![1]));
        }
        let values: Vec<f32> = views.iter().flat_map(View::to_f32).collect();
        let shape = if views.len() == 1 { views[0].shape.to_vec() } else { vec![values.len()] };
        Some((values, shape))
    }

    /// The elements of a tensor that was cut, from the pieces of all ranks.
    fn joined(&self, name: &str, cut: &Cut) -> Option<(Vec<f32>, Vec<usize>)> {
        // The first rank that had a piece.
        let rank = |piece: usize| (piece * self.index.tensor).div_ceil(cut.pieces);
        let pieces = (0..cut.pieces).map(|p| self.elements(name, rank(p)).map(|(values, _)| values));
        let pieces = pieces.collect::<Option<Vec<_>>>()?;
        let len: usize = pieces.iter().map(Vec::len).sum();
        if len != cut.shape.iter().product::<usize>() {
            // Not flat: nobody takes it for a whole.
            return Some((pieces.concat(), vec![1, len]));
        }
        let rows = if cut.rows { 1 } else { cut.shape[0].max(1) };
        let row =
            |r: usize| pieces.iter().flat_map(move |p| &p[r * p.len() / rows..(r + 1) * p.len() / rows]);
        Some(((0..rows).flat_map(row).copied().collect(), cut.shape.clone()))
    }

    /// A whole tensor, of this shape if its elements are as many.
    fn whole(&self, name: &str, shape: &[usize]) -> Option<Tensor> {
        let cut = name.split_once('.').and_then(|(_, param)| self.index.cuts.get(param));
        let (values, saved) = match cut.filter(|_| !name.starts_with("step.")) {
            Some(cut) => self.joined(name, cut)?,
            None => self.elements(name, 0)?,
        };
        // Parts are flat; a tensor that was saved whole has to have the shape itself.
        let fits = saved.len() == 1 && shape.iter().product::<usize>() == values.len();
        let shape = if fits { shape } else { &saved };
        Tensor::from_f32(Device::Cpu, values, shape).ok()
    }

    /// What a rank needs of a tensor of a parameter.
    pub(crate) fn piece(&self, name: &str, wanted: &Wanted) -> Option<Tensor> {
        let whole = self.whole(name, &wanted.shape)?;
        if name.starts_with("step.") { Some(whole) } else { wanted.cut(whole) }
    }
}
