//! Files that `torch.save` wrote, read without running them: tensors, dictionaries, lists, numbers and texts.
//!
//! Such a file is a zip archive of one pickle and the bytes of each tensor's storage. A pickle is a program; here it
//! meets a machine that only builds data, and that fails at the first instruction or name that would do
//! more. Tensors stay in the mapped file: nothing is allocated by a size that the file claims.

mod names;
mod node;
mod pickle;
mod tensor;
mod value;

#[cfg(test)]
mod tests;

use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use zip::{CompressionMethod, ZipArchive};

use super::header::{self, MappedFile};
use super::{Error, Result};
use node::Node;
use pickle::Machine;

pub use tensor::TorchTensor;
pub use value::Value;

/// A pickle holds names and shapes alone; a longer one is none of PyTorch's.
const MAX_PICKLE: u64 = 64 << 20;

/// An opened file.
#[derive(Debug)]
pub struct TorchFile {
    path: PathBuf,
    content: Content,
    nodes: Vec<Node>,
    root: usize,
}

/// Where the bytes are.
#[derive(Debug)]
enum Content {
    Mapped(MappedFile),
    /// Unpacked before.
    Memory(Vec<u8>),
}

impl TorchFile {
    /// Opens a file of `torch.save`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::read(path, Content::Mapped(header::map(path)?))
    }

    /// The same for bytes that lie in memory; `path` is for messages.
    pub fn from_bytes(path: impl AsRef<Path>, bytes: Vec<u8>) -> Result<Self> {
        Self::read(path.as_ref(), Content::Memory(bytes))
    }

    /// What was saved.
    pub fn root(&self) -> Value<'_> {
        Value { file: self, id: self.root }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All bytes of the file.
    pub(super) fn bytes(&self) -> &[u8] {
        self.content.bytes()
    }

    /// The mapped file, for tensors that outlive this.
    pub(super) fn into_mapped(self) -> Option<MappedFile> {
        match self.content {
            Content::Mapped(file) => Some(file),
            Content::Memory(_) => None,
        }
    }

    fn read(path: &Path, content: Content) -> Result<Self> {
        let archive = Archive::open(path, content.bytes())?;
        let (nodes, root) = Machine::new(path, archive).run()?;
        Ok(Self { path: path.to_path_buf(), content, nodes, root })
    }
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => file.bytes(),
            Self::Memory(bytes) => bytes,
        }
    }
}

/// The zip archive, and the folder in it that everything lies in.
struct Archive<'a> {
    path: &'a Path,
    zip: ZipArchive<Cursor<&'a [u8]>>,
    /// Bytes of the whole file.
    length: u64,
    prefix: String,
    pickle: Vec<u8>,
}

impl<'a> Archive<'a> {
    fn open(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        if !bytes.starts_with(b"PK\x03\x04") {
            return Err(not_a_zip(path, bytes));
        }
        let zip = ZipArchive::new(Cursor::new(bytes))
            .map_err(|error| torch(path, format!("a damaged zip archive: {error}"), AGAIN))?;
        let prefix = zip
            .file_names()
            .filter_map(std::result::Result::ok)
            .find_map(|name| name.strip_suffix("/data.pkl").map(str::to_owned));
        let prefix = prefix.ok_or_else(|| {
            torch(path, "a zip archive without data.pkl".to_owned(), "is it a file of torch.save?")
        })?;
        let mut archive = Self { path, zip, length: bytes.len() as u64, prefix, pickle: Vec::new() };
        archive.pickle = archive.read("data.pkl", MAX_PICKLE)?;
        if archive.range("byteorder").is_ok() && archive.read("byteorder", 16)? != b"little" {
            let why = "its numbers are big-endian".to_owned();
            return Err(torch(path, why, "save it again on a little-endian machine"));
        }
        Ok(archive)
    }

    /// Bytes of the file that an entry takes; PyTorch never compresses them.
    fn range(&mut self, name: &str) -> Result<std::ops::Range<usize>> {
        let full = format!("{}/{name}", self.prefix);
        let wrong = |why: String| torch(self.path, format!("{full}: {why}"), AGAIN);
        let entry = self.zip.by_name(&full).map_err(|error| wrong(error.to_string()))?;
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(wrong("it is compressed or encrypted, which torch.save never does".to_owned()));
        }
        let (start, size) = (entry.data_start(), entry.size());
        let end = start.and_then(|start| start.checked_add(size));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(wrong("it lies outside the file".to_owned()));
        };
        drop(entry);
        if end > self.length {
            return Err(torch(self.path, format!("{full}: it ends behind the file"), AGAIN));
        }
        Ok(start as usize..end as usize)
    }

    fn read(&mut self, name: &str, most: u64) -> Result<Vec<u8>> {
        let full = format!("{}/{name}", self.prefix);
        let wrong = |why: String| torch(self.path, format!("{full}: {why}"), AGAIN);
        let entry = self.zip.by_name(&full).map_err(|error| wrong(error.to_string()))?;
        let mut bytes = Vec::new();
        entry.take(most + 1).read_to_end(&mut bytes).map_err(|error| wrong(error.to_string()))?;
        if bytes.len() as u64 > most {
            return Err(wrong(format!("it has more than {most} bytes")));
        }
        Ok(bytes)
    }
}

const AGAIN: &str = "copy or download it again";
/// PyTorch's number before 1.6, as its pickle begins.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

fn not_a_zip(path: &Path, bytes: &[u8]) -> Error {
    let convert = "write it anew with PyTorch, from a source you trust: torch.save(torch.load(FILE, map_location='cpu', \
                   weights_only=True), FILE)";
    let (why, hint) = match bytes {
        [] => ("it is empty", AGAIN),
        _ if bytes.starts_with(LEGACY) => ("PyTorch's format before 1.6, a chain of pickles", convert),
        [0x80, ..] => ("a plain pickle, which is a program and is not run", convert),
        [0x1f, 0x8b, ..] => ("compressed with gzip", "unpack it, or name it .ckpt.gz"),
        _ if bytes.starts_with(b"version https://git-lfs") => {
            ("a Git LFS pointer", "fetch the content with: git lfs pull")
        }
        _ => ("not a zip archive, as torch.save writes since PyTorch 1.6", "is it the right file?"),
    };
    torch(path, why.to_owned(), hint)
}

fn torch(path: &Path, why: String, hint: &'static str) -> Error {
    Error::Torch { path: path.to_path_buf(), why, hint }
}
