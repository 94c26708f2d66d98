//! Finding files of features, and opening one.

use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use specforge_nn::weights::Weights;
use specforge_nn::weights::torch::TorchFile;

use crate::{Error, Features, Result, layout};

/// One file of features.
#[derive(Debug)]
pub struct FeatureFile {
    path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Torch(TorchFile),
    Safetensors(Weights),
}

/// The files of features in a folder and all below it, sorted by path, numbers by value.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    walk(folder, &mut found)?;
    found.sort_by_cached_key(|path| in_natural_order(path));
    if found.is_empty() { Err(Error::NoFiles { path: folder.to_path_buf() }) } else { Ok(found) }
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs_err::read_dir(folder)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if entry.file_type()?.is_dir() {
            walk(&path, found)?;
        } else if is_features(&name) {
            found.push(path);
        }
    }
    Ok(())
}

fn is_features(name: &str) -> bool {
    let numbered = |start: &str, ends: &[&str]| {
        let inner = ends.iter().find_map(|end| name.strip_prefix(start)?.strip_suffix(end));
        inner.is_some_and(|inner| !inner.is_empty())
    };
    numbered("data_", &[".ckpt", ".ckpt.gz", ".pt"]) || numbered("hs_", &[".safetensors"])
}

/// `data_9` before `data_10`: runs of digits compare by length first.
fn in_natural_order(path: &Path) -> Vec<(usize, String)> {
    let text = path.to_string_lossy();
    let mut parts: Vec<(usize, String)> = Vec::new();
    let mut digits = false;
    for c in text.chars() {
        if c.is_ascii_digit() != digits || parts.is_empty() {
            parts.push((0, String::new()));
            digits = c.is_ascii_digit();
        }
        let last = parts.last_mut().expect("one was pushed");
        last.0 += usize::from(digits);
        last.1.push(c);
    }
    parts
}

impl FeatureFile {
    /// Opens a file. One that is compressed is unpacked into memory, up to `most` bytes.
    pub fn open(path: &Path, most: u64) -> Result<Self> {
        let ends = |end: &str| path.as_os_str().as_encoded_bytes().ends_with(end.as_bytes());
        let content = if ends(".safetensors") {
            Content::Safetensors(Weights::open(path)?)
        } else if ends(".gz") {
            Content::Torch(TorchFile::from_bytes(path, unpack(path, most)?)?)
        } else {
            Content::Torch(TorchFile::open(path)?)
        };
        Ok(Self { path: path.to_path_buf(), content })
    }

    /// What it holds.
    pub fn features(&self) -> Result<Features<'_>> {
        match &self.content {
            Content::Torch(file) => layout::of_torch(&self.path, file.root()),
            Content::Safetensors(weights) => layout::of_safetensors(&self.path, weights),
        }
    }
}

fn unpack(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut unpacked = MultiGzDecoder::new(fs_err::File::open(path)?).take(most + 1);
    unpacked
        .read_to_end(&mut bytes)
        .map_err(|error| Error::features(path, format!("not unpacked: {error}; copy it again")))?;
    if bytes.len() as u64 > most {
        let why =
            format!("it unpacks to more than {most} bytes, the most that a row of this target can take");
        return Err(Error::features(path, why));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_name_in_the_order_of_their_numbers() {
        let dir = specforge_testkit::tempdir();
        for name in
            ["rows_0-2000/data_10.ckpt", "rows_0-2000/data_9.ckpt.gz", "hs_3.safetensors", "data_1.pt"]
        {
            fs_err::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            fs_err::write(dir.path().join(name), "").unwrap();
        }
        for name in ["vocab_mapping.pt", "data_.ckpt", "data_2.json", "hs_1.bin", "model.safetensors"] {
            fs_err::write(dir.path().join(name), "").unwrap();
        }
        let found = files(dir.path()).unwrap();
        let names: Vec<_> = found.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["data_1.pt", "hs_3.safetensors", "data_9.ckpt.gz", "data_10.ckpt"]);
        let empty = specforge_testkit::tempdir();
        assert!(files(empty.path()).unwrap_err().to_string().contains("no features"));
    }
}
