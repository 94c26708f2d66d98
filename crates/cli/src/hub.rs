//! Names of the Hugging Face hub wherever a folder is named. A folder that is there wins.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use specforge_remote::hub::{Hub, RepoId, Watch};

use crate::env;
use crate::show::{Progress, note};

/// Signals end the process: what was downloaded stays, and the next run goes on with it.
static NEVER: AtomicBool = AtomicBool::new(false);

/// The folder of a repository that `written` names (`owner/name`, `owner/name@revision`), downloaded if need be; `None`
/// if it is a path.
pub(crate) fn folder(written: &Path) -> Result<Option<PathBuf>> {
    if written.exists() {
        return Ok(None);
    }
    let Some(id) = written.to_str().and_then(RepoId::parse) else { return Ok(None) };
    let hub = Hub::new(env::hub());
    let folder = watched("download", |watch| hub.folder(&id, watch));
    let folder = folder.with_context(|| {
        format!("{}: there is no such folder, so it was taken for a repository of the hub", written.display())
    })?;
    if let Some(found) = Hub::of_snapshot(&folder) {
        note!("hub       {found}");
    }
    Ok(Some(folder))
}

/// The name on the hub of what came from there; else the name of the file or folder.
pub(crate) fn name(path: &Path) -> String {
    let own = || path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Hub::of_snapshot(path).map_or_else(own, |id| id.name().to_owned())
}

/// Does something of the hub with its progress shown.
pub(crate) fn watched<T>(name: &'static str, work: impl FnOnce(Watch<'_>) -> T) -> T {
    let progress = Mutex::new(Progress::new(name, true));
    let set = |done, total| {
        if let Ok(progress) = progress.lock() {
            progress.set(done, total);
        }
    };
    let result = work(Watch { progress: &set, stop: &NEVER });
    if let Ok(progress) = progress.lock() {
        progress.done();
    }
    result
}
