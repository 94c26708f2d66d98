//! Rows of a Parquet file, as the JSON text that a JSONL file would have. Columns and keys without a value are left out.

use std::fmt;
use std::path::{Path, PathBuf};

use fs_err::File;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Value};

use super::guard::guarded;
use super::{MAX_ROW, Record, too_long};
use crate::conversation::{RowError, malformed};
use crate::error::{Error, Result};

/// Iterates over the rows of a Parquet file.
pub(crate) struct ParquetRecords {
    path: PathBuf,
    rows: RowIter<'static>,
    row: u64,
    total: u64,
    bytes: u64,
}

impl ParquetRecords {
    pub(super) fn open(path: &Path, file: File) -> Result<Self> {
        let bytes = file.metadata()?.len();
        let refuse = |message| Error::Unreadable { path: path.to_path_buf(), message };
        let opened = guarded(|| {
            let reader = SerializedFileReader::new(file.into_file())?;
            let total = reader.metadata().file_metadata().num_rows();
            Ok::<_, ParquetError>((RowIter::from_file_into(Box::new(reader)), total))
        });
        let (rows, total) = opened.map_err(|problem| {
            refuse(format!(
                "not a whole Parquet file ({problem}); get it again: a copy that was cut off lacks its end"
            ))
        })?;
        Ok(Self { path: path.to_path_buf(), rows, row: 0, total: u64::try_from(total).unwrap_or(0), bytes })
    }

    /// The share of the rows, in bytes: columns are not read one after the other.
    pub(super) fn bytes_read(&self) -> u64 {
        let done = self.row.min(self.total);
        if self.total == 0 {
            self.bytes
        } else {
            (self.bytes as f64 * (done as f64 / self.total as f64)) as u64
        }
    }

    fn damaged(&mut self, problem: &str) -> Error {
        let message = format!(
            "the row cannot be read ({problem}): the Parquet file is damaged, or uses something that this version does \
             not read; get it again, or write it as JSONL"
        );
        let line = self.row;
        // Nothing that follows can be trusted.
        self.row = self.total;
        Error::Syntax { path: self.path.clone(), line, message }
    }
}

impl Iterator for ParquetRecords {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.row >= self.total {
            return None;
        }
        self.row += 1;
        let row = guarded(|| self.rows.next().transpose());
        Some(match row {
            Ok(Some(row)) => Ok(Record { line: self.row, row: json(&row) }),
            Ok(None) => Err(self.damaged(&format!("the file promises {} rows", self.total))),
            Err(problem) => Err(self.damaged(&problem)),
        })
    }
}

impl fmt::Debug for ParquetRecords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParquetRecords")
            .field("path", &self.path)
            .field("row", &self.row)
            .finish_non_exhaustive()
    }
}

fn json(row: &Row) -> Result<Vec<u8>, RowError> {
    // A column of other data (images, for example) beside the conversations does no harm.
    let is_data =
        |field: &Field| matches!(field, Field::Bytes(bytes) if std::str::from_utf8(bytes.data()).is_err());
    let columns = row.get_column_iter().filter(|(_, field)| !is_data(field));
    let text = serde_json::to_vec(&object(columns)?).map_err(|error| malformed(error.to_string()))?;
    if text.len() > MAX_ROW { Err(too_long()) } else { Ok(text) }
}

fn object<'a>(fields: impl Iterator<Item = (&'a String, &'a Field)>) -> Result<Value, RowError> {
    let filled = fields.filter(|(_, field)| !matches!(field, Field::Null));
    filled
        .map(|(name, field)| Ok((name.clone(), value(field)?)))
        .collect::<Result<Map<_, _>, _>>()
        .map(Value::Object)
}

fn value(field: &Field) -> Result<Value, RowError> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::from(*value),
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) => Value::from(*value),
        Field::Long(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float(value) => Value::from(*value),
        Field::Double(value) => Value::from(*value),
        Field::Str(text) => Value::from(text.as_str()),
        Field::Bytes(bytes) => Value::from(
            std::str::from_utf8(bytes.data()).map_err(|_| malformed("bytes that are no UTF-8 text"))?,
        ),
        Field::Group(row) => object(row.get_column_iter())?,
        Field::ListInternal(list) => list.elements().iter().map(value).collect::<Result<_, _>>()?,
        Field::MapInternal(map) => map
            .entries()
            .iter()
            .map(|(key, content)| Ok((key_text(key)?, value(content)?)))
            .collect::<Result<Map<_, _>, RowError>>()
            .map(Value::Object)?,
        // Dates, times and decimals, as they are written.
        other => Value::from(other.to_string()),
    })
}

fn key_text(key: &Field) -> Result<String, RowError> {
    match value(key)? {
        Value::String(text) => Ok(text),
        other => Ok(other.to_string()),
    }
}
