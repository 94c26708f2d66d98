//! Opening one safetensors file: map it, parse the header, check every number in it.
//!
//! The element types and the shape of a header entry are those of the `safetensors` crate. Its checks
//! are repeated here because its errors do not name the tensor, a name given twice goes unnoticed, and
//! adding up hostile offsets overflows.
#![expect(unsafe_code, reason = "memory-mapping a file is unsafe by nature; the one place is argued below")]

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::TensorInfo;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{Dtype, Error, Result};

/// A header may not be longer (the format's own limit, in bytes).
const MAX_HEADER: u64 = 100_000_000;
/// The file starts with the header's length: a little-endian u64.
const PREFIX: usize = 8;

/// One mapped file.
pub(super) struct MappedFile {
    pub(super) path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }
}

impl fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.path.display(), self.map.len())
    }
}

/// A header entry that has been checked.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Bytes of the whole file; inside it.
    pub(super) range: Range<usize>,
}

/// Maps the file and returns its tensors by name.
pub(super) fn open(path: &Path) -> Result<(MappedFile, BTreeMap<String, Entry>)> {
    let file = map(path)?;
    let header = header_bytes(path, file.bytes())?;
    let infos = parse(path, header)?;
    let entries = check(path, PREFIX + header.len(), infos)?;
    let described = entries.values().map(|entry| entry.range.end).max().unwrap_or(PREFIX + header.len());
    if described != file.bytes().len() {
        let got = file.bytes().len() as u64;
        return Err(Error::Size { path: path.to_path_buf(), expected: described as u64, got });
    }
    Ok((file, entries))
}

pub(super) fn map(path: &Path) -> Result<MappedFile> {
    let file = fs_err::File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(not_safetensors(path, "it is a folder".to_owned(), "give a file"));
    }
    // SAFETY: the map is read-only and private to this process. What remains is another process cutting
    // the file short or rewriting it in place while it is in use: checkpoints are written once and replaced
    // by renaming, which leaves an existing map intact. The bytes are only ever read as plain numbers, for
    // which every bit pattern is valid.
    let map = unsafe { Mmap::map(file.file()) }?;
    Ok(MappedFile { path: path.to_path_buf(), map })
}

/// The JSON part of the file.
fn header_bytes<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a [u8]> {
    if bytes.is_empty() {
        return Err(not_safetensors(path, "it is empty".to_owned(), AGAIN));
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(not_safetensors(
            path,
            "it is a Git LFS pointer".to_owned(),
            "fetch the content with: git lfs pull",
        ));
    }
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else {
        return Err(not_safetensors(path, format!("it has only {} bytes", bytes.len()), AGAIN));
    };
    let length = u64::from_le_bytes(*prefix);
    // Checked before the length, which is random when the file is something else.
    if rest.first().is_some_and(|&byte| byte != b'{') {
        return Err(not_safetensors(path, "no header follows the length".to_owned(), AGAIN));
    }
    if length > MAX_HEADER {
        let why =
            format!("its header would have {length} bytes, and {MAX_HEADER} is the limit of the format");
        return Err(not_safetensors(path, why, AGAIN));
    }
    rest.get(..length as usize).ok_or_else(|| Error::Size {
        path: path.to_path_buf(),
        expected: PREFIX as u64 + length,
        got: bytes.len() as u64,
    })
}

fn parse(path: &Path, header: &[u8]) -> Result<Vec<(String, TensorInfo)>> {
    let text = std::str::from_utf8(header)
        .map_err(|error| not_safetensors(path, format!("its header is not UTF-8: {error}"), AGAIN))?;
    let mut json = serde_json::Deserializer::from_str(text);
    let infos = json.deserialize_map(Header).and_then(|infos| json.end().map(|()| infos));
    infos.map_err(|error| not_safetensors(path, format!("its header is wrong: {error}"), AGAIN))
}

/// Checks types, sizes and that the tensors follow one another without gap or overlap from `start` on.
fn check(path: &Path, start: usize, mut infos: Vec<(String, TensorInfo)>) -> Result<BTreeMap<String, Entry>> {
    infos.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = 0;
    let mut entries = BTreeMap::new();
    for (name, info) in infos {
        let wrong = |why: String| Error::entry(path, &name, why);
        let dtype = Dtype::from_format(info.dtype).ok_or_else(|| {
            wrong(format!("has the element type {}, which is not supported ({})", info.dtype, Dtype::list()))
        })?;
        let size = info.shape.iter().try_fold(dtype.size(), |size, &extent| size.checked_mul(extent));
        let (from, to) = info.data_offsets;
        let length = to.checked_sub(from);
        if size.is_none() || length != size {
            let size =
                size.map_or_else(|| "more than memory can hold".to_owned(), |size| format!("{size} bytes"));
            let shape = &info.shape;
            return Err(wrong(format!(
                "{dtype} {shape:?} is {size}, but the header gives it bytes {from}..{to}"
            )));
        }
        if from != end {
            let kind = if from < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(wrong(format!("{kind}: it begins at byte {from}, expected {end}")));
        }
        end = to;
        let Some(range_end) = to.checked_add(start) else {
            return Err(wrong(format!("the header gives it bytes {from}..{to}, which no file has")));
        };
        entries.insert(name, Entry { dtype, shape: info.shape, range: from + start..range_end });
    }
    Ok(entries)
}

const AGAIN: &str = "download it again";

fn not_safetensors(path: &Path, why: String, hint: &'static str) -> Error {
    Error::NotSafetensors { path: path.to_path_buf(), why, hint }
}

/// Reads the header object entry by entry, so that errors name the tensor and a second entry of a name is seen.
struct Header;

impl<'de> Visitor<'de> for Header {
    type Value = Vec<(String, TensorInfo)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        let mut infos = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(de::Error::custom(format!("{name} is given twice")));
            }
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let info =
                map.next_value().map_err(|error| de::Error::custom(format!("tensor {name}: {error}")))?;
            infos.push((name, info));
        }
        Ok(infos)
    }
}
