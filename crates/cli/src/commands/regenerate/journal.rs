//! What was done so far, on disk: one line per conversation, written as it ends.
//!
//! The first line holds the settings. A process that is killed leaves at most one line half-written, which is cut off
//! when the journal is opened again.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use fs_err::{File, OpenOptions};
use serde_json::{Map, Value, json};

/// What became of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Done,
    Skipped,
    Failed,
}

/// A journal that is being written.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    end: u64,
    /// Where the line of each conversation is, the last one if there are several.
    entries: BTreeMap<String, (State, u64, u64)>,
}

impl State {
    const NAMES: [(Self, &'static str); 3] =
        [(Self::Done, "done"), (Self::Skipped, "skipped"), (Self::Failed, "failed")];

    fn name(self) -> &'static str {
        Self::NAMES[self as usize].1
    }

    fn of(name: &str) -> Option<Self> {
        Self::NAMES.into_iter().find(|(_, n)| *n == name).map(|(state, _)| state)
    }
}

/// What tells conversations apart: their content, and which of several equal ones it is.
pub(super) fn key(row: &Map<String, Value>, seen: &mut BTreeMap<[u8; 16], u32>) -> String {
    let json = serde_json::to_vec(row).expect("a row came from JSON");
    let hash: [u8; 16] = blake3::hash(&json).as_bytes()[..16].try_into().expect("sixteen bytes");
    let count = seen.entry(hash).or_insert(0);
    *count += 1;
    let hex = hash.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    if *count == 1 { hex } else { format!("{hex}#{count}") }
}

impl Journal {
    pub(super) fn create(path: &Path, settings: &Value) -> Result<Self> {
        let file = OpenOptions::new().create(true).read(true).write(true).truncate(true).open(path)?;
        let mut journal = Self { path: path.to_path_buf(), file, end: 0, entries: BTreeMap::new() };
        journal.lock()?;
        journal.append(&json!({ "settings": settings }))?;
        Ok(journal)
    }

    /// Opens what an earlier run with the same settings left.
    pub(super) fn resume(path: &Path, settings: &Value) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut journal = Self { path: path.to_path_buf(), file, end: 0, entries: BTreeMap::new() };
        journal.lock()?;
        journal.read(settings)?;
        journal.file.file().set_len(journal.end)?;
        journal.file.seek(SeekFrom::Start(journal.end))?;
        Ok(journal)
    }

    fn lock(&self) -> Result<()> {
        self.file.file().try_lock().with_context(|| {
            format!(
                "{}: another run writes to it; wait for it, or choose another --output",
                self.path.display()
            )
        })
    }

    fn read(&mut self, settings: &Value) -> Result<()> {
        let mut reader = BufReader::new(File::open(&self.path)?);
        let (mut line, mut number) = (Vec::new(), 0u64);
        loop {
            line.clear();
            reader.read_until(b'\n', &mut line)?;
            // A torn line, or the end.
            if !line.ends_with(b"\n") {
                break;
            }
            number += 1;
            let damaged = || {
                format!(
                    "{}:{number}: not a line of a journal; start afresh with --overwrite",
                    self.path.display()
                )
            };
            let entry: Value = serde_json::from_slice(&line).with_context(damaged)?;
            if number == 1 {
                self.compare(&entry["settings"], settings)?;
            } else {
                let key = entry["key"].as_str().with_context(damaged)?;
                let state = entry["state"].as_str().and_then(State::of).with_context(damaged)?;
                self.entries.insert(key.to_owned(), (state, self.end, line.len() as u64));
            }
            self.end += line.len() as u64;
        }
        if number == 0 {
            bail!("{}: it is empty; start afresh with --overwrite", self.path.display());
        }
        Ok(())
    }

    fn compare(&self, before: &Value, now: &Value) -> Result<()> {
        let keys = now.as_object().into_iter().flatten();
        let differences: Vec<String> = keys
            .filter(|(key, value)| before[key.as_str()] != **value)
            .map(|(key, value)| format!("{key}: was {}, is {value}", before[key.as_str()]))
            .collect();
        if differences.is_empty() {
            return Ok(());
        }
        bail!(
            "{}: a resumed run must be the same run:\n  {}\nundo these changes, or start afresh with --overwrite",
            self.path.display(),
            differences.join("\n  ")
        )
    }

    /// What became of every conversation so far.
    pub(super) fn states(&self) -> BTreeMap<String, State> {
        self.entries.iter().map(|(key, (state, ..))| (key.clone(), *state)).collect()
    }

    /// Notes what became of a conversation. A failure is noted too, and forgotten by trying again.
    pub(super) fn note(
        &mut self,
        key: &str,
        state: State,
        why: &str,
        row: Option<&Map<String, Value>>,
    ) -> Result<()> {
        let start = self.end;
        self.append(&json!({ "key": key, "state": state.name(), "why": why, "row": row }))?;
        self.entries.insert(key.to_owned(), (state, start, self.end - start));
        Ok(())
    }

    fn append(&mut self, line: &Value) -> Result<()> {
        let bytes = format!("{line}\n");
        self.file.write_all(bytes.as_bytes())?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// The line of a conversation.
    pub(super) fn entry(&self, reader: &mut File, key: &str) -> Result<Option<(State, Value)>> {
        let Some(&(state, start, length)) = self.entries.get(key) else { return Ok(None) };
        reader.seek(SeekFrom::Start(start))?;
        let mut line = vec![0; length as usize];
        reader.read_exact(&mut line)?;
        Ok(Some((state, serde_json::from_slice(&line)?)))
    }

    /// Another handle, for reading lines.
    pub(super) fn reader(&self) -> Result<File> {
        Ok(File::open(&self.path)?)
    }

    /// Everything on the disk.
    pub(super) fn sync(&self) -> Result<()> {
        Ok(self.file.sync_all()?)
    }

    /// Nothing is left to do.
    pub(super) fn remove(self) -> Result<()> {
        Ok(fs_err::remove_file(&self.path)?)
    }
}
