//! A prepared set on disk: token ids and loss masks of all rows, in order, memory-mapped.
//!
//! A set is a folder of three files. All numbers are little-endian.
//!
//! `rows.bin`
//!
//! | bytes | content |
//! |---|---|
//! | 8 | magic `SFROWS01` |
//! | 8 | number of rows, u64 |
//! | per row | `length` token ids, u32 each; `length` mask entries, u8 each, 1 = supervised; zeros up to a multiple of 4 |
//!
//! `index.bin`
//!
//! | bytes | content |
//! |---|---|
//! | 8 | magic `SFINDX01` |
//! | 8 | number of rows, u64 |
//! | 16 per row | offset of the row in `rows.bin`, u64; `length`, u32; supervised tokens, u32 |
//!
//! `manifest.json`: format version, the sizes and blake3 sums of both files, the hashes of tokenizer and template,
//! all settings, and the report of the preparation.
//!
//! A set is written in a working folder beside its place, flushed to the disk and renamed, so a folder with the final
//! name is complete. It is checked in full when it is opened.
#![expect(unsafe_code, reason = "memory-mapping a file; token ids are read in place")]

mod writer;

use std::path::{Path, PathBuf};

use bytemuck::{Pod, Zeroable};
use fs_err::File;
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::report::Report;

pub(crate) use writer::{Committed, SetWriter, committed_rows, write_synced};

#[cfg(target_endian = "big")]
compile_error!("prepared sets are read in place and little-endian");

/// Version of the format described above, and of everything that decides what is written.
pub(crate) const FORMAT_VERSION: u32 = 1;
const ROWS_FILE: &str = "rows.bin";
const INDEX_FILE: &str = "index.bin";
const MANIFEST_FILE: &str = "manifest.json";
const ROWS_MAGIC: [u8; 8] = *b"SFROWS01";
const INDEX_MAGIC: [u8; 8] = *b"SFINDX01";
const HEADER: usize = 16;

/// The rows of a training set, in order.
#[derive(Debug)]
pub struct Prepared {
    folder: PathBuf,
    manifest: Manifest,
    rows: Mmap,
    index: Mmap,
}

/// One training sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowRef<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// 1 where the token is supervised; as long as `ids`.
    pub loss_mask: &'a [u8],
}

/// What `manifest.json` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format_version: u32,
    pub(crate) key: String,
    pub(crate) hash: String,
    pub(crate) rows: u64,
    pub(crate) files: Vec<FileSum>,
    pub(crate) tokenizer_hash: String,
    pub(crate) template_hash: Option<String>,
    pub(crate) vocab_size: usize,
    pub(crate) settings: serde_json::Value,
    pub(crate) report: Report,
}

/// Size and sum of a file of the set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileSum {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) blake3: String,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Entry {
    offset: u64,
    length: u32,
    supervised: u32,
}

impl Prepared {
    /// Opens a set and checks all of it: sizes, sums, bounds of every row.
    pub fn open(folder: &Path) -> Result<Self> {
        let manifest = read_manifest(&folder.join(MANIFEST_FILE))?;
        let rows = map(folder, ROWS_FILE, ROWS_MAGIC, &manifest)?;
        let index = map(folder, INDEX_FILE, INDEX_MAGIC, &manifest)?;
        let set = Self { folder: folder.to_path_buf(), manifest, rows, index };
        set.check_index()?;
        Ok(set)
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.entries().len()
    }

    /// Whether there is no row at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row `row`, which must be below [`len`](Self::len).
    pub fn row(&self, row: usize) -> RowRef<'_> {
        let Entry { offset, length, .. } = self.entries()[row];
        let (start, length) = (offset as usize, length as usize);
        let ids = bytemuck::cast_slice(&self.rows[start..start + 4 * length]);
        RowRef { ids, loss_mask: &self.rows[start + 4 * length..start + 5 * length] }
    }

    /// All rows in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = RowRef<'_>> {
        (0..self.len()).map(|row| self.row(row))
    }

    /// Tokens of a row and how many of them are supervised, without touching the row.
    pub fn lengths(&self, row: usize) -> (usize, usize) {
        let entry = self.entries()[row];
        (entry.length as usize, entry.supervised as usize)
    }

    /// What was read, kept and dropped when the set was made.
    pub fn report(&self) -> &Report {
        &self.manifest.report
    }

    /// Content identity: blake3 (hex) of rows and index. Two sets with the same hash train the same.
    pub fn hash(&self) -> &str {
        &self.manifest.hash
    }

    /// Identity of what the set was made from: inputs, tokenizer, template and settings.
    pub fn key(&self) -> &str {
        &self.manifest.key
    }

    /// Identity of the tokenizer that made the ids.
    pub fn tokenizer_hash(&self) -> &str {
        &self.manifest.tokenizer_hash
    }

    /// Identity of the chat template; absent when the rows came as token ids.
    pub fn template_hash(&self) -> Option<&str> {
        self.manifest.template_hash.as_deref()
    }

    /// Size of the target's vocabulary; every id is below it.
    pub fn vocab_size(&self) -> usize {
        self.manifest.vocab_size
    }

    /// The folder of the set.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn entries(&self) -> &[Entry] {
        bytemuck::cast_slice(&self.index[HEADER..])
    }

    fn check_index(&self) -> Result<()> {
        let damaged = |file: &str, message: String| Error::Damaged { path: self.folder.join(file), message };
        let entry_bytes = self.index.len() - HEADER;
        if !entry_bytes.is_multiple_of(size_of::<Entry>()) || self.len() as u64 != self.manifest.rows {
            let message = format!("{entry_bytes} bytes of entries for {} rows", self.manifest.rows);
            return Err(damaged(INDEX_FILE, message));
        }
        let mut expected = HEADER as u64;
        for (row, entry) in self.entries().iter().enumerate() {
            if entry.offset != expected || entry.supervised > entry.length {
                let Entry { offset, length, supervised } = *entry;
                let message = format!(
                    "row {row} has offset {offset}, length {length}, supervised {supervised}; expected offset {expected}"
                );
                return Err(damaged(INDEX_FILE, message));
            }
            expected += padded(entry.length as usize) as u64;
        }
        if expected != self.rows.len() as u64 {
            let message = format!("{} bytes, but the index describes {expected}", self.rows.len());
            return Err(damaged(ROWS_FILE, message));
        }
        Ok(())
    }
}

/// Bytes of a row of `length` tokens.
fn padded(length: usize) -> usize {
    (5 * length).next_multiple_of(4)
}

fn read_manifest(path: &Path) -> Result<Manifest> {
    let bytes = fs_err::read(path)?;
    let damaged = |message: String| Error::Damaged { path: path.to_path_buf(), message };
    let value: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| damaged(format!("not valid JSON: {error}")))?;
    // The version first: another one may well have other keys.
    let version = value.get("format_version").and_then(serde_json::Value::as_u64);
    if version != Some(u64::from(FORMAT_VERSION)) {
        let got = version.map_or("none".to_owned(), |version| version.to_string());
        return Err(damaged(format!("format version {got}, expected {FORMAT_VERSION}")));
    }
    serde_json::from_value(value).map_err(|error| damaged(error.to_string()))
}

fn map(folder: &Path, name: &str, magic: [u8; 8], manifest: &Manifest) -> Result<Mmap> {
    let path = folder.join(name);
    let damaged = |message: String| Error::Damaged { path: path.clone(), message };
    let sum = manifest.files.iter().find(|file| file.name == name);
    let sum = sum.ok_or_else(|| damaged("not listed in manifest.json".to_owned()))?;
    let file = File::open(&path)?;
    let bytes = file.metadata()?.len();
    if bytes != sum.bytes || bytes < HEADER as u64 {
        return Err(damaged(format!("{bytes} bytes, expected {}", sum.bytes)));
    }
    // SAFETY: the map is read-only; a set is never changed in place after its folder got its final name.
    let map = unsafe { Mmap::map(file.file()) }?;
    if map[..8] != magic || map[8..16] != manifest.rows.to_le_bytes() {
        return Err(damaged("the header is not the expected one".to_owned()));
    }
    let got = blake3::hash(&map).to_hex();
    if got.as_str() != sum.blake3 {
        return Err(damaged(format!("blake3 sum {got}, expected {}", sum.blake3)));
    }
    Ok(map)
}
