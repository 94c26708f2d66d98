//! Reading checkpoint folders: safetensors files, one or sharded, memory-mapped and fully validated.
//!
//! Nothing is believed that a header says: every length, offset, type and shape is checked against the
//! file when it is opened, so that a [`View`] can be handed out later without a second thought, and a
//! damaged download is reported with the file, the tensor and what to do about it.
//! This module knows bytes and names, not models.

mod error;
mod fingerprint;
mod header;
mod quantised;
pub mod torch;
mod view;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use error::{Error, Result};
pub use view::{Dtype, View};

use header::MappedFile;

/// All tensors of a checkpoint, whichever of its files they are in.
#[derive(Debug)]
pub struct Weights {
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Location>,
}

/// Where one tensor is.
#[derive(Debug, Clone)]
struct Location {
    /// Index into [`Weights::files`].
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes of the whole file.
    range: Range<usize>,
}

impl Weights {
    /// Opens a checkpoint folder, or one file of safetensors or PyTorch.
    ///
    /// In a folder `model.safetensors` is taken if it exists, else the shards that
    /// `model.safetensors.index.json` names (the order of Hugging Face transformers), else `pytorch_model.bin`.
    /// Files of PyTorch are read as data, see [`torch`].
    /// Only headers are read; the tensors' bytes are mapped, not loaded.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !fs_err::metadata(path)?.is_dir() {
            let torch = ["bin", "pt", "pth", "ckpt"].map(std::ffi::OsStr::new);
            let is_torch = path.extension().is_some_and(|end| torch.contains(&end));
            return if is_torch { Self::open_torch(path) } else { Self::open_file(path) };
        }
        let single = path.join(SINGLE);
        let index = path.join(INDEX);
        let torch = path.join(TORCH);
        if single.exists() {
            Self::open_file(&single)
        } else if index.exists() {
            Self::open_sharded(path, &index)
        } else if torch.exists() {
            Self::open_torch(&torch)
        } else {
            Err(Error::no_weights(path))
        }
    }

    /// Names in byte order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The files the tensors are in.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// The tensor `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<View<'_>> {
        let Location { file, dtype, shape, range } = self.tensors.get(name)?;
        Some(View { dtype: *dtype, shape, bytes: &self.files[*file].bytes()[range.clone()] })
    }

    /// The tensor `name`, which has to exist and to have this shape.
    pub fn require(&self, name: &str, shape: &[usize]) -> Result<View<'_>> {
        let view = self.get(name).ok_or_else(|| self.missing(name))?;
        if view.shape == shape {
            return Ok(view);
        }
        Err(Error::Shape {
            path: self.file_of(name).to_path_buf(),
            tensor: name.to_owned(),
            expected: shape.to_vec(),
            got: view.shape.to_vec(),
        })
    }

    /// 64 hexadecimal digits that tell one checkpoint from another.
    ///
    /// A hash (BLAKE3) of every tensor's name, type and shape, of the files' sizes, and of the bytes:
    /// all of them up to 64 MB, otherwise 64 windows of 16 KiB spread evenly over each file. It is meant
    /// to catch mix-ups (another model, another fine-tune, another download), not to prove that two
    /// large checkpoints are equal in every byte.
    pub fn fingerprint(&self) -> String {
        fingerprint::of(self)
    }

    /// The file that holds a tensor that exists.
    fn file_of(&self, name: &str) -> &Path {
        &self.files[self.tensors[name].file].path
    }

    fn open_file(path: &Path) -> Result<Self> {
        let (file, tensors) = header::open(path)?;
        let tensors = tensors
            .into_iter()
            .map(|(name, t)| (name, Location { file: 0, dtype: t.dtype, shape: t.shape, range: t.range }))
            .collect();
        Ok(Self { files: vec![file], tensors })
    }

    fn open_sharded(folder: &Path, index_path: &Path) -> Result<Self> {
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        for (shard, names) in read_index(folder, index_path)? {
            let (file, mut in_shard) = header::open(&shard)?;
            for name in names {
                let Some(t) = in_shard.remove(&name) else {
                    return Err(Error::index(index_path, format!("{name} is not in {}", shard.display())));
                };
                let location = Location { file: files.len(), dtype: t.dtype, shape: t.shape, range: t.range };
                tensors.insert(name, location);
            }
            files.push(file);
        }
        Ok(Self { files, tensors })
    }

    /// A file of `torch.save`: a dictionary of tensors, or one that holds such a dictionary under a usual name.
    fn open_torch(path: &Path) -> Result<Self> {
        let file = torch::TorchFile::open(path)?;
        let wrong = |why: String, hint| Error::Torch { path: path.to_path_buf(), why, hint };
        let inner = STATE_DICTS.iter().find_map(|key| file.root().get(key).filter(|inner| inner.is_dict()));
        let Some(entries) = inner.unwrap_or(file.root()).entries() else {
            let why = format!("it holds {}, expected tensors by name", file.root().kind());
            return Err(wrong(why, "save a model's state_dict()"));
        };
        let mut tensors = BTreeMap::new();
        for (name, value) in entries {
            let (Some(name), Some(tensor)) = (name.text(), value.tensor()) else {
                let name = name.text().unwrap_or("a key that is no text");
                let why = format!("{name} is {}, expected tensors by name", value.kind());
                return Err(wrong(why, "save a model's state_dict()"));
            };
            let Some(range) = tensor.range() else {
                let why = format!("tensor {name} does not lie in one piece");
                return Err(wrong(why, "save it with .contiguous()"));
            };
            let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
            tensors.insert(name.to_owned(), Location { file: 0, dtype, shape, range });
        }
        let files = file.into_mapped().into_iter().collect();
        Ok(Self { files, tensors })
    }

    fn missing(&self, name: &str) -> Error {
        let nearest = self
            .names()
            .map(|candidate| (strsim::normalized_levenshtein(name, candidate), candidate))
            .filter(|(similarity, _)| *similarity > 0.6)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, candidate)| candidate.to_owned());
        let searched: Vec<PathBuf> = self.files().map(Path::to_path_buf).collect();
        Error::missing(name, nearest, &searched)
    }
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TORCH: &str = "pytorch_model.bin";
/// Where files of trainers have a model's tensors.
const STATE_DICTS: [&str; 3] = ["draft_state_dict", "state_dict", "model"];

/// The part of `model.safetensors.index.json` that matters here.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The shards an index names, in order, each with the tensors it should hold.
fn read_index(folder: &Path, path: &Path) -> Result<BTreeMap<PathBuf, Vec<String>>> {
    let text = fs_err::read(path)?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|error| Error::index(path, format!("not a weight index: {error}")))?;
    let mut shards: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    for (tensor, file) in index.weight_map {
        // An index comes from a download: it must not be able to point outside its folder.
        if Path::new(&file).file_name().is_none_or(|name| name != file.as_str()) {
            return Err(Error::index(
                path,
                format!("{tensor} is said to be in {file:?}, which is not a plain file name"),
            ));
        }
        shards.entry(folder.join(file)).or_default().push(tensor);
    }
    if shards.is_empty() {
        return Err(Error::index(path, "it names no tensor".to_owned()));
    }
    let missing: Vec<&PathBuf> = shards.keys().filter(|shard| !shard.exists()).collect();
    match missing[..] {
        [] => Ok(shards),
        [first, ..] => Err(Error::missing_shards(path, first, missing.len(), shards.len())),
    }
}
