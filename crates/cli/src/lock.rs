//! One process per run folder.

use std::fs::TryLockError;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Held for as long as a run works in its folder; the system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct RunLock {
    _file: fs_err::File,
}

/// Takes the folder for this process, making it if needed.
pub(crate) fn take(folder: &Path) -> Result<RunLock> {
    fs_err::create_dir_all(folder)?;
    let path = folder.join("lock");
    let file = fs_err::OpenOptions::new().create(true).write(true).truncate(false).open(&path)?;
    match file.file().try_lock() {
        Ok(()) => {
            remove_remains(folder)?;
            Ok(RunLock { _file: file })
        }
        Err(TryLockError::WouldBlock) => bail!(
            "{}: another run works in this folder; wait for it to end, or give this run another name (--set name=...)",
            folder.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("{}: cannot be locked", path.display()))
        }
    }
}

/// Removes what an interrupted process left half-written; nobody else works here now.
fn remove_remains(folder: &Path) -> Result<()> {
    for entry in fs_err::read_dir(folder)? {
        let (name, path) = entry.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))?;
        let hidden = name.starts_with('.') && (name.ends_with(".partial") || name.ends_with(".old"));
        if hidden && path.is_dir() {
            fs_err::remove_dir_all(path)?;
        } else if hidden || name.ends_with(".tmp") && path.is_file() {
            fs_err::remove_file(path)?;
        }
    }
    Ok(())
}
