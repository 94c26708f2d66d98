//! Where conversations come from: files, folders and patterns, each with a weight.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// A file, a folder of files or a pattern, and how often its rows are used.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// The file or folder; or a pattern with `*`, `?` and `**`, where no file has that very name.
    pub path: PathBuf,
    /// Below 1: that share of the rows, drawn by seed and content. Above 1: rows are repeated, and what follows the
    /// point is a share again.
    pub weight: f64,
}

/// Endings of the files of a folder that hold rows; what they are is still up to their content.
const ENDINGS: [&str; 10] = [
    ".jsonl",
    ".json",
    ".ndjson",
    ".parquet",
    ".arrow",
    ".jsonl.gz",
    ".json.gz",
    ".jsonl.zst",
    ".json.zst",
    ".ndjson.gz",
];
/// What the datasets library writes beside the rows.
const DESCRIPTIONS: [&str; 5] =
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json"];
/// Splits that are not for training.
const HELD_OUT: [&str; 5] = ["test", "validation", "valid", "eval", "dev"];

impl From<PathBuf> for Source {
    fn from(path: PathBuf) -> Self {
        Self { path, weight: 1.0 }
    }
}

impl Source {
    /// The files, sorted by path. A folder is searched to the bottom; where it has a split `train`, splits that are for
    /// testing (by the name of the file or of its folder) are left out.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let path = &self.path;
        let none = |message: &str| Error::Unreadable { path: path.clone(), message: message.to_owned() };
        if path.is_dir() {
            let mut files = Vec::new();
            walk(path, &mut files)?;
            let missing = "has no .jsonl, .json, .parquet or .arrow file";
            return if files.is_empty() { Err(none(missing)) } else { Ok(for_training(path, files)) };
        }
        let text = path.to_string_lossy();
        if path.exists() || !text.contains(['*', '?', '[']) {
            fs_err::metadata(path)?;
            return Ok(vec![path.clone()]);
        }
        let found = glob::glob(&text).map_err(|error| none(&format!("not a pattern: {error}")))?;
        let files = found.collect::<Result<Vec<_>, _>>().map_err(|error| none(&error.to_string()))?;
        let files: Vec<_> = files.into_iter().filter(|path| path.is_file()).collect();
        if files.is_empty() { Err(none("no file matches this pattern")) } else { Ok(files) }
    }

    /// How many copies of a row are used: the whole part of the weight, and one more for a share of the rows.
    pub(crate) fn copies(weight: f64, seed: u64, row: &[u8]) -> u64 {
        let share = weight.fract();
        let drawn = share > 0.0 && draw(seed, row) < share;
        weight as u64 + u64::from(drawn)
    }
}

/// A number from 0 to below 1 that follows from the seed and the content of the row, so that neither the order of the
/// rows nor their file decides.
fn draw(seed: u64, row: &[u8]) -> f64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(row);
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    (u64::from_le_bytes(first) >> 11) as f64 / (1_u64 << 53) as f64
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries: Vec<PathBuf> =
        fs_err::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // The datasets library keeps what `map` and `filter` made beside the rows.
        let cached = name.starts_with("cache-") && path.extension().is_some_and(|end| end == "arrow");
        if cached || name.starts_with('.') {
            continue;
        }
        if path.is_dir() {
            walk(&path, files)?;
        } else if ENDINGS.iter().any(|ending| name.ends_with(ending)) && !DESCRIPTIONS.contains(&&*name) {
            files.push(path);
        }
    }
    Ok(())
}

fn for_training(folder: &Path, mut files: Vec<PathBuf>) -> Vec<PathBuf> {
    let of = |file: &Path, splits: &[&str]| {
        let inner = file.strip_prefix(folder).unwrap_or(file);
        let part = |part: std::path::Component<'_>| {
            let name = part.as_os_str().to_string_lossy().into_owned();
            splits.iter().any(|split| {
                name.strip_prefix(split).is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()))
            })
        };
        inner.components().any(part)
    };
    if files.iter().any(|file| of(file, &["train"])) {
        files.retain(|file| !of(file, &HELD_OUT));
    }
    files
}

impl Serialize for Source {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        if self.weight == 1.0 {
            return self.path.serialize(serializer);
        }
        let mut table = serializer.serialize_struct("Source", 2)?;
        table.serialize_field("path", &self.path)?;
        table.serialize_field("weight", &self.weight)?;
        table.end()
    }
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PathOrTable)
    }
}

/// An untagged enum would do, were it not for its messages.
struct PathOrTable;

impl<'de> Visitor<'de> for PathOrTable {
    type Value = Source;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path, or { path = \"...\", weight = 0.5 }")
    }

    fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<Source, E> {
        Ok(PathBuf::from(path).into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut table: A) -> Result<Source, A::Error> {
        let (mut path, mut weight) = (None, 1.0);
        while let Some(key) = table.next_key::<String>()? {
            match key.as_str() {
                "path" => path = Some(table.next_value()?),
                "weight" => weight = table.next_value()?,
                other => {
                    return Err(A::Error::custom(format!(
                        "`path` and `weight` are known here, not `{other}`"
                    )));
                }
            }
        }
        Ok(Source { path: path.ok_or_else(|| A::Error::custom("a `path` is missing"))?, weight })
    }
}
