//! Rows of an input file one after the other, in bounded memory: JSONL or one JSON array, plain or
//! compressed, Parquet or Arrow.

mod arrow;
mod decode;
mod guard;
mod parquet;
mod text;

use std::path::Path;

use crate::conversation::{RowError, malformed};
use crate::error::Result;
use decode::Content;

/// One row, not parsed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    /// Line where it starts, from 1; of a Parquet or Arrow file the number of the row.
    pub(crate) line: u64,
    /// Its JSON text, empty for an empty line between others; or why it is not even read.
    pub(crate) row: Result<Vec<u8>, RowError>,
}

/// How rows stand in a text file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One per line.
    Lines,
    /// Elements of one JSON array.
    Array,
}

/// Iterates over the rows of a file.
#[derive(Debug)]
pub(crate) enum Records {
    Text(text::TextRecords),
    Parquet(parquet::ParquetRecords),
    Arrow(arrow::ArrowRecords),
}

/// Longest row, in bytes: far above the longest context of any model, and little enough for memory.
const MAX_ROW: usize = 64 << 20;

impl Records {
    /// Opens a file; its first bytes say what it is. The layout of a text is read off its first character unless given.
    pub(crate) fn open(path: &Path, layout: Option<Layout>) -> Result<Self> {
        Ok(match decode::open(path)? {
            Content::Text(source) => Self::Text(text::TextRecords::open(path, source, layout)?),
            Content::Parquet(file) => Self::Parquet(parquet::ParquetRecords::open(path, file)?),
            Content::Arrow { file, stream } => Self::Arrow(arrow::ArrowRecords::open(path, file, stream)?),
        })
    }

    /// Bytes of the file consumed so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        match self {
            Self::Text(records) => records.bytes_read(),
            Self::Parquet(records) => records.bytes_read(),
            Self::Arrow(records) => records.bytes_read(),
        }
    }
}

impl Iterator for Records {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Text(records) => records.next(),
            Self::Parquet(records) => records.next(),
            Self::Arrow(records) => records.next(),
        }
    }
}

fn too_long() -> RowError {
    malformed(format!("a row of more than {} MiB", MAX_ROW >> 20))
}
