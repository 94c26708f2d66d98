//! Rows of an Arrow stream (`save_to_disk` of the datasets library) or file, as the JSON text that a JSONL file would have.
//! Columns and keys without a value are left out.

use std::fmt;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, RecordBatch, StructArray};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType};
use fs_err::File;
use serde_json::{Map, Value};

use super::decode::Counted;
use super::guard::guarded;
use super::{MAX_ROW, Record, too_long};
use crate::conversation::{RowError, malformed};
use crate::error::{Error, Result};

type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + Send>;

/// Iterates over the rows of an Arrow stream or file.
pub(crate) struct ArrowRecords {
    path: PathBuf,
    batches: Batches,
    /// The batch being read, and its next row.
    batch: Option<(StructArray, usize)>,
    row: u64,
    consumed: Arc<AtomicU64>,
    done: bool,
}

impl ArrowRecords {
    /// `stream`: batches one after the other, without the frame of a file.
    pub(super) fn open(path: &Path, file: File, stream: bool) -> Result<Self> {
        let consumed = Arc::new(AtomicU64::new(0));
        let counted = BufReader::new(Counted { file, consumed: Arc::clone(&consumed) });
        let opened = guarded(|| -> Result<Batches, ArrowError> {
            Ok(if stream {
                Box::new(StreamReader::try_new(counted, None)?)
            } else {
                Box::new(FileReader::try_new(counted, None)?)
            })
        });
        let batches = opened.map_err(|problem| Error::Unreadable {
            path: path.to_path_buf(),
            message: format!(
                "not a whole Arrow file ({problem}); get it again, or write it with `to_parquet`"
            ),
        })?;
        Ok(Self { path: path.to_path_buf(), batches, batch: None, row: 0, consumed, done: false })
    }

    pub(super) fn bytes_read(&self) -> u64 {
        self.consumed.load(Ordering::Relaxed)
    }

    /// The next row, after reading the next batch where that is due.
    fn read(&mut self) -> Result<Option<Result<Vec<u8>, RowError>>, String> {
        loop {
            if let Some((batch, row)) = self.batch.as_mut().filter(|(batch, row)| *row < batch.len()) {
                *row += 1;
                let (batch, row) = (&*batch, *row - 1);
                return guarded(|| Ok::<_, String>(Some(json(batch, row))));
            }
            let batches = &mut self.batches;
            match guarded(|| batches.next().transpose())? {
                Some(batch) => self.batch = Some((batch.into(), 0)),
                None => return Ok(None),
            }
        }
    }
}

impl Iterator for ArrowRecords {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        self.row += 1;
        let line = self.row;
        match self.read() {
            Ok(Some(row)) => Some(Ok(Record { line, row })),
            Ok(None) => {
                self.done = true;
                None
            }
            Err(problem) => {
                self.done = true;
                let message = format!(
                    "the row cannot be read ({problem}): the Arrow file is cut off or damaged, or uses something that \
                     this version does not read; get it again, or write it with `to_parquet`"
                );
                Some(Err(Error::Syntax { path: self.path.clone(), line, message }))
            }
        }
    }
}

impl fmt::Debug for ArrowRecords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArrowRecords")
            .field("path", &self.path)
            .field("row", &self.row)
            .finish_non_exhaustive()
    }
}

fn json(batch: &StructArray, row: usize) -> Result<Vec<u8>, RowError> {
    let text = serde_json::to_vec(&object(batch, row)).map_err(|error| malformed(error.to_string()))?;
    if text.len() > MAX_ROW { Err(too_long()) } else { Ok(text) }
}

fn object(fields: &StructArray, row: usize) -> Value {
    let columns = fields.fields().iter().zip(fields.columns());
    let filled = columns.filter_map(|(field, column)| Some((field.name().clone(), filled(column, row)?)));
    Value::Object(filled.collect::<Map<_, _>>())
}

/// The value in a row of a column. `None` for nothing, and for what has no form in JSON: data such as images, times.
fn filled(column: &ArrayRef, row: usize) -> Option<Value> {
    if column.is_null(row) {
        return None;
    }
    let list = |list: ArrayRef| (0..list.len()).map(|row| filled(&list, row).unwrap_or_default()).collect();
    Some(match column.data_type() {
        DataType::Utf8 => Value::from(column.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => Value::from(column.as_string::<i64>().value(row)),
        DataType::Utf8View => Value::from(column.as_string_view().value(row)),
        DataType::Boolean => Value::from(column.as_boolean().value(row)),
        DataType::Struct(_) => object(column.as_struct(), row),
        DataType::List(_) => Value::Array(list(column.as_list::<i32>().value(row))),
        DataType::LargeList(_) => Value::Array(list(column.as_list::<i64>().value(row))),
        DataType::FixedSizeList(..) => Value::Array(list(column.as_fixed_size_list().value(row))),
        DataType::Dictionary(..) => {
            let dictionary = column.as_any_dictionary();
            return filled(dictionary.values(), *dictionary.normalized_keys().get(row)?);
        }
        _ => return number(column, row),
    })
}

fn number(column: &ArrayRef, row: usize) -> Option<Value> {
    macro_rules! of {
        ($($kind:pat => $type:ty),+ $(,)?) => {
            match column.data_type() {
                $($kind => Some(Value::from(column.as_primitive::<$type>().value(row))),)+
                DataType::Float16 => Some(Value::from(column.as_primitive::<Float16Type>().value(row).to_f32())),
                _ => None,
            }
        };
    }
    of! {
        DataType::Int8 => Int8Type,
        DataType::Int16 => Int16Type,
        DataType::Int32 => Int32Type,
        DataType::Int64 => Int64Type,
        DataType::UInt8 => UInt8Type,
        DataType::UInt16 => UInt16Type,
        DataType::UInt32 => UInt32Type,
        DataType::UInt64 => UInt64Type,
        DataType::Float32 => Float32Type,
        DataType::Float64 => Float64Type,
    }
}
