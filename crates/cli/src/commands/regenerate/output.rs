//! The files that a finished run leaves, in the order of the input, each there whole or not at all.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use fs_err::File;
use serde_json::{Value, json};
use specforge_data::{RawRow, RawRows, Source};

use super::journal::{Journal, State, key};

/// Where everything goes.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) output: PathBuf,
    pub(super) skipped: PathBuf,
    pub(super) errors: PathBuf,
    pub(super) journal: PathBuf,
}

impl Place {
    pub(super) fn new(output: &Path) -> Self {
        let stem = output.with_extension("");
        let of = |kind: &str| stem.with_added_extension(kind).with_added_extension("jsonl");
        Self {
            output: output.to_path_buf(),
            skipped: of("skipped"),
            errors: of("errors"),
            journal: output.with_added_extension("journal"),
        }
    }
}

/// A file under a temporary name; nothing at all if no line comes.
struct Lines {
    path: PathBuf,
    unfinished: PathBuf,
    file: BufWriter<File>,
    count: u64,
}

impl Lines {
    fn new(path: &Path) -> Result<Self> {
        let unfinished = path.with_added_extension("tmp");
        let file = BufWriter::new(File::create(&unfinished)?);
        Ok(Self { path: path.to_path_buf(), unfinished, file, count: 0 })
    }

    fn push(&mut self, line: &Value) -> Result<()> {
        self.count += 1;
        Ok(writeln!(self.file, "{line}")?)
    }

    fn finish(self, even_empty: bool) -> Result<()> {
        self.file.into_inner().context("writing")?.sync_all()?;
        if self.count > 0 || even_empty {
            return Ok(fs_err::rename(&self.unfinished, &self.path)?);
        }
        fs_err::remove_file(&self.unfinished)?;
        // What an earlier run left of failures that are none any more.
        match fs_err::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// Reads the input once more and puts every row where it belongs.
pub(super) fn write(place: &Place, sources: &[Source], most: Option<usize>, journal: &Journal) -> Result<()> {
    journal.sync()?;
    let mut reader = journal.reader()?;
    let mut files = (Lines::new(&place.output)?, Lines::new(&place.skipped)?, Lines::new(&place.errors)?);
    let mut seen = BTreeMap::new();
    for row in RawRows::open(sources)?.take(most.unwrap_or(usize::MAX)) {
        let RawRow { path, line, row } = row?;
        let aside =
            |why: &Value, row: Option<Value>| json!({ "path": path, "line": line, "why": why, "row": row });
        let row = match row {
            Ok(row) => row,
            Err(why) => {
                files.1.push(&aside(&why.into(), None))?;
                continue;
            }
        };
        let found = journal.entry(&mut reader, &key(&row, &mut seen))?;
        match found {
            Some((State::Done, entry)) => files.0.push(&entry["row"])?,
            Some((State::Skipped, entry)) => files.1.push(&aside(&entry["why"], Some(row.into())))?,
            Some((State::Failed, entry)) => files.2.push(&aside(&entry["why"], Some(row.into())))?,
            None => files.2.push(&aside(&"the input changed while it was read".into(), Some(row.into())))?,
        }
    }
    files.1.finish(false)?;
    files.2.finish(false)?;
    files.0.finish(true)
}
