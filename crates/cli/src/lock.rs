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
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let ends = |with: &[&str]| path.extension().is_some_and(|end| with.iter().any(|w| end == *w));
        let remains = hidden && ends(&["partial", "old"]);
        if remains && path.is_dir() {
            fs_err::remove_dir_all(path)?;
        } else if path.is_file() && (remains || ends(&["tmp"])) {
            fs_err::remove_file(path)?;
        }
    }
    Ok(())
}
