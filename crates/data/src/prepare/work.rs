//! The folder in which a set is made: one process at a time works in it, and the next one goes on where it was killed.
//!
//! `.<key>.work` beside the sets holds `lock`, the unfinished files in `set`, and `progress.json`: how far they are on
//! the disk, and which rows of the inputs are in them.

use std::fs::TryLockError;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use fs_err::{File, OpenOptions};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::report::Report;
use crate::set::{Committed, FORMAT_VERSION, SetWriter, write_synced};

const PROGRESS_FILE: &str = "progress.json";
/// How often a process that waits for another one looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A commit may take this share of the time, at most.
const COMMIT_SHARE: u32 = 20;

/// What a killed process left and nobody went on with for so long is removed.
const STALE_AFTER: Duration = Duration::from_hours(24);

/// The folder, held by this process.
#[derive(Debug)]
pub(super) struct Work {
    folder: PathBuf,
    _lock: File,
    last_commit: Instant,
    commit_took: Duration,
}

/// What is done of a preparation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    format_version: u32,
    /// The input being read, and how many of its rows are done.
    pub(super) input: usize,
    pub(super) rows: u64,
    pub(super) report: Report,
    /// Bytes of input, for whoever waits.
    pub(super) done: u64,
    pub(super) total: u64,
    committed: Committed,
}

impl Work {
    /// Takes the folder for this process. While another one works in it, waits for that and shows its progress; `None`
    /// if it finished the set.
    pub(super) fn take(
        cache: &Path,
        key: &str,
        set: &Path,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Option<Self>> {
        let folder = cache.join(format!(".{key}.work"));
        while !set.exists() {
            fs_err::create_dir_all(&folder)?;
            let path = folder.join("lock");
            let lock = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
            let lock = match lock {
                // Who had the folder has removed it just now.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                lock => lock?,
            };
            match lock.file().try_lock() {
                Ok(()) if set.exists() || !path.exists() => {}
                Ok(()) => {
                    return Ok(Some(Self {
                        folder,
                        _lock: lock,
                        last_commit: Instant::now(),
                        commit_took: Duration::ZERO,
                    }));
                }
                Err(TryLockError::WouldBlock) => {
                    if let Some(other) = read(&folder) {
                        progress(other.done, other.total);
                    }
                    thread::sleep(LOOK_EVERY);
                }
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    /// A writer that goes on where the last process was, with what it had done; or a new one.
    pub(super) fn open(&self) -> Result<(SetWriter, Option<Progress>)> {
        if let Some(progress) = read(&self.folder)
            && let Ok(Some(writer)) = SetWriter::resume(self.set(), progress.committed)
        {
            return Ok((writer, Some(progress)));
        }
        Ok((SetWriter::create(self.set())?, None))
    }

    /// Rows on the disk, as ids and mask.
    pub(super) fn rows(&self, progress: &Progress, each: impl FnMut(&[u8], &[u8])) -> Result<()> {
        crate::set::committed_rows(&self.set(), progress.committed, each)
    }

    /// Puts everything so far on the disk, unless that was done a moment ago. `position`: the input being read, and its
    /// rows done.
    pub(super) fn commit(
        &mut self,
        writer: &mut SetWriter,
        report: &Report,
        position: (usize, u64),
        (done, total): (u64, u64),
    ) -> Result<()> {
        let start = Instant::now();
        if start - self.last_commit < self.commit_took * COMMIT_SHARE {
            return Ok(());
        }
        let progress = Progress {
            format_version: FORMAT_VERSION,
            input: position.0,
            rows: position.1,
            report: report.clone(),
            done,
            total,
            committed: writer.commit()?,
        };
        let unfinished = self.folder.join("progress.tmp");
        write_synced(&unfinished, &serde_json::to_vec(&progress).map_err(std::io::Error::other)?)?;
        fs_err::rename(unfinished, self.folder.join(PROGRESS_FILE))?;
        self.last_commit = Instant::now();
        self.commit_took = start.elapsed();
        Ok(())
    }

    /// Removes the folder: the set is finished, or cannot be.
    pub(super) fn remove(self) -> Result<()> {
        Ok(fs_err::remove_dir_all(&self.folder)?)
    }

    fn set(&self) -> PathBuf {
        self.folder.join("set")
    }
}

/// Removes folders of killed processes whose settings or inputs are asked for no more: nobody holds them, and nothing in
/// them changed for a day. What cannot be removed stays.
pub(super) fn remove_stale(cache: &Path) {
    let entries = fs_err::read_dir(cache).into_iter().flatten().flatten();
    let is_work = |path: &PathBuf| path.extension().is_some_and(|end| end == "work");
    for folder in entries.map(|entry| entry.path()).filter(is_work) {
        let Ok(lock) = OpenOptions::new().write(true).open(folder.join("lock")) else { continue };
        // Held while it is removed, so that whoever comes meanwhile waits and starts anew.
        if is_stale(&folder) && lock.file().try_lock().is_ok() {
            let _ = fs_err::remove_dir_all(&folder);
        }
    }
}

/// Whether nothing in the folder, or one below it, changed for long.
fn is_stale(folder: &Path) -> bool {
    let files =
        |folder: &Path| fs_err::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let inside = files(folder).chain(files(&folder.join("set")));
    let changed = inside.filter_map(|path| fs_err::metadata(path).ok()?.modified().ok()).max();
    changed.is_some_and(|changed| changed.elapsed().is_ok_and(|age| age > STALE_AFTER))
}

/// What is done according to the folder; nothing if that cannot be read.
fn read(folder: &Path) -> Option<Progress> {
    let bytes = fs_err::read(folder.join(PROGRESS_FILE)).ok()?;
    let progress: Progress = serde_json::from_slice(&bytes).ok()?;
    (progress.format_version == FORMAT_VERSION).then_some(progress)
}
