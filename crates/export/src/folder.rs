//! Files and folders that are there completely or not at all.
//!
//! A file is written beside its place, synced and renamed; a folder is filled beside its place and
//! renamed. What is interrupted leaves only a name that starts with a dot and ends in `.partial`.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use fs_err as fs;

use crate::error::{Error, Result};

/// Writes a file of `size` bytes through `fill`, atomically.
pub(crate) fn write_file(
    path: &Path,
    size: u64,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let partial = sibling(path, "partial");
    let written = write_synced(&partial, fill)
        .and_then(|()| fs::rename(&partial, path))
        .and_then(|()| sync_parent(path));
    written.map_err(|error| {
        // The first error is the one to report; a leftover is only clutter.
        let _ = fs::remove_file(&partial);
        disk_full(error, path, size)
    })
}

/// Puts the folder that `fill` writes into at `path`, whose former content goes away as a whole.
///
/// `fill` gets an empty folder beside `path`. When it fails, `path` is as before.
pub(crate) fn replace_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let (partial, old) = (sibling(path, "partial"), sibling(path, "old"));
    if let Some(parent) = parent(path) {
        fs::create_dir_all(parent)?;
    }
    remove_folder(&partial)?;
    fs::create_dir(&partial)?;
    let done = fill(&partial).and_then(|()| {
        sync(&partial)?;
        swap(&partial, path, &old)
    });
    if done.is_err() {
        // The first error is the one to report; a leftover is only clutter.
        let _ = remove_folder(&partial);
    }
    done
}

/// The names in a folder, sorted; none if it does not exist.
pub(crate) fn names(folder: &Path) -> Result<Vec<String>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn swap(new: &Path, path: &Path, old: &Path) -> Result<()> {
    let moved = |error: io::Error| match error.kind() {
        io::ErrorKind::CrossesDevices | io::ErrorKind::ResourceBusy => Error::Occupied {
            path: path.to_path_buf(),
            why: format!("it cannot be replaced as a whole ({error})"),
            hint: "if it is a mount point, give a folder inside it",
        },
        _ => error.into(),
    };
    if !path.exists() {
        fs::rename(new, path).map_err(moved)?;
        return Ok(sync_parent(path)?);
    }
    remove_folder(old)?;
    fs::rename(path, old).map_err(moved)?;
    if let Err(error) = fs::rename(new, path) {
        fs::rename(old, path)?;
        return Err(moved(error));
    }
    sync_parent(path)?;
    remove_folder(old)
}

fn write_synced(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, fs::File::create(path)?);
    fill(&mut out)?;
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

fn disk_full(error: io::Error, path: &Path, needed: u64) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::DiskFull { path: path.to_path_buf(), needed }
        }
        _ => error.into(),
    }
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    sync(parent(path).unwrap_or(Path::new(".")))
}

/// Makes renames in a folder durable; on other systems folders cannot be opened, and need not be.
fn sync(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { fs::File::open(folder)?.sync_all() } else { Ok(()) }
}

fn parent(path: &Path) -> Option<&Path> {
    path.parent().filter(|parent| !parent.as_os_str().is_empty())
}

/// `.NAME.PID.kind` beside `path`: on the same file system, and of no other process.
fn sibling(path: &Path, kind: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.{kind}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> io::Error {
        io::ErrorKind::StorageFull.into()
    }

    #[test]
    fn a_full_disk_is_named_and_leaves_nothing() {
        let dir = specforge_testkit::tempdir();
        let path = dir.path().join("model.safetensors");
        fs::write(&path, "old").unwrap();
        let error =
            write_file(&path, 1234, |out| out.write_all(b"ne").and_then(|()| Err(full()))).unwrap_err();
        assert!(
            error.to_string().contains("no space left on the device for a file of 1234 bytes; free some"),
            "{error}"
        );
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()).unwrap(), ["model.safetensors"]);
    }

    #[test]
    fn a_device_that_is_full_is_reported_as_such() {
        if !Path::new("/dev/full").exists() {
            return;
        }
        let error = write_synced(Path::new("/dev/full"), |out| out.write_all(&[0; 16])).unwrap_err();
        let error = disk_full(error, Path::new("x"), 16);
        assert!(matches!(error, Error::DiskFull { needed: 16, .. }), "{error}");
    }

    #[test]
    fn a_folder_is_replaced_as_a_whole_or_not_at_all() {
        let dir = specforge_testkit::tempdir();
        let path = dir.path().join("deep/out");
        let put = |name: &'static str| replace_folder(&path, |new| Ok(fs::write(new.join(name), name)?));
        put("one").unwrap();
        put("two").unwrap();
        assert_eq!(names(&path).unwrap(), ["two"]);
        let failed = replace_folder(&path, |new| {
            fs::write(new.join("three"), "")?;
            Err(full().into())
        });
        assert!(failed.is_err());
        assert_eq!(names(&path).unwrap(), ["two"]);
        assert_eq!(names(path.parent().unwrap()).unwrap(), ["out"]);
    }
}
