//! The rows of conversations files as they are, for whoever changes them rather than trains on them.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::conversation::Conversation;
use crate::encode::parse_object;
use crate::error::Result;
use crate::read::{Record, Records};
use crate::source::Source;

/// One row of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct RawRow {
    /// The file.
    pub path: PathBuf,
    /// Where it starts, from 1: a line, or in Parquet the number of the row.
    pub line: u64,
    /// The JSON object, or why it is none.
    pub row: Result<Map<String, Value>, String>,
}

/// All rows of several sources, in order; weights play no part.
#[derive(Debug)]
pub struct RawRows {
    files: std::vec::IntoIter<PathBuf>,
    current: Option<(PathBuf, Records)>,
    bytes_before: u64,
    total_bytes: u64,
}

impl RawRows {
    /// Opens the sources; fails if there is nothing in one of them.
    pub fn open(sources: &[Source]) -> Result<Self> {
        let mut files = Vec::new();
        for source in sources {
            files.extend(source.files()?);
        }
        let sizes = files.iter().map(|file| Ok(fs_err::metadata(file)?.len()));
        let total_bytes = sizes.sum::<Result<u64>>()?;
        Ok(Self { files: files.into_iter(), current: None, bytes_before: 0, total_bytes })
    }

    /// Bytes read so far, and of all files.
    pub fn progress(&self) -> (u64, u64) {
        let here = self.current.as_ref().map_or(0, |(_, records)| records.bytes_read());
        (self.bytes_before + here, self.total_bytes)
    }
}

impl Iterator for RawRows {
    type Item = Result<RawRow>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((path, records)) = &mut self.current {
                match records.next() {
                    Some(Ok(Record { line, row })) => {
                        // Empty lines between rows are nobody's row.
                        if row.as_ref().is_ok_and(Vec::is_empty) {
                            continue;
                        }
                        let row = row.and_then(|bytes| parse_object(&bytes)).map_err(|error| error.message);
                        return Some(Ok(RawRow { path: path.clone(), line, row }));
                    }
                    Some(Err(error)) => return Some(Err(error)),
                    None => {
                        self.bytes_before += records.bytes_read();
                        self.current = None;
                    }
                }
            }
            let path = self.files.next()?;
            match Records::open(&path, None) {
                Ok(records) => self.current = Some((path, records)),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl Conversation {
    /// The conversation of a row with `conversations` or `messages`, its turns in an order that templates render; or why
    /// there is none.
    pub fn of_row(row: &Map<String, Value>) -> Result<Self, String> {
        let mut conversation = Self::from_row(row).map_err(|error| error.message)?;
        conversation.arrange(None).map_err(|error| error.message)?;
        Ok(conversation)
    }

    /// The messages as JSON, as chat interfaces have them.
    pub fn messages_json(&self) -> Vec<Value> {
        self.messages.iter().map(|message| message.to_value(true)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_in_order_with_their_places() {
        let dir = specforge_testkit::tempdir();
        let (a, b) = (dir.path().join("a.jsonl"), dir.path().join("b.json"));
        fs_err::write(&a, "{\"id\": 1}\n\nnonsense\n[1]\n").unwrap();
        fs_err::write(&b, "[{\"id\": 2}]").unwrap();
        let mut rows = RawRows::open(&[a.clone().into(), b.clone().into()]).unwrap();
        let all: Vec<RawRow> = rows.by_ref().map(Result::unwrap).collect();
        let seen: Vec<(u64, bool)> = all.iter().map(|row| (row.line, row.row.is_ok())).collect();
        assert_eq!(seen, [(1, true), (3, false), (4, false), (1, true)]);
        assert_eq!(all[3].row.as_ref().unwrap()["id"], 2);
        assert!(all[2].row.as_ref().unwrap_err().contains("expected an object"));
        let (done, total) = rows.progress();
        assert_eq!(done, total);
    }
}
