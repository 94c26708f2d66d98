//! Names in the cache.

use std::path::{Path, PathBuf};

use super::id::is_commit;
use super::{Kind, RepoId};
use crate::Result;

/// A repository's folder in the cache.
#[derive(Debug, Clone)]
pub(super) struct RepoCache {
    folder: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache: &Path, id: &RepoId) -> Self {
        let kind = if id.kind() == Kind::Dataset { "datasets" } else { "models" };
        Self { folder: cache.join(format!("{kind}--{}", id.name().replace('/', "--"))) }
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.folder.join("refs").join(revision)
    }

    /// The commit that a revision was when it was last asked for, if its snapshot is there.
    pub(super) fn commit(&self, id: &RepoId) -> Option<String> {
        let commit = if id.is_pinned() {
            id.revision().to_owned()
        } else {
            fs_err::read_to_string(self.reference(id.revision())).ok()?.trim().to_owned()
        };
        (is_commit(&commit) && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    /// Notes the commit of a revision.
    pub(super) fn set_commit(&self, id: &RepoId, commit: &str) -> Result<()> {
        if id.is_pinned() {
            return Ok(());
        }
        let path = self.reference(id.revision());
        fs_err::create_dir_all(path.parent().unwrap_or(&self.folder))?;
        let unfinished = path.with_added_extension(format!("{}.tmp", std::process::id()));
        fs_err::write(&unfinished, commit)?;
        Ok(fs_err::rename(&unfinished, &path)?)
    }

    /// Makes a file of a snapshot of a blob: a relative link, so that caches can be moved; a copy where links cannot be.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        fs_err::create_dir_all(path.parent().unwrap_or(&self.folder))?;
        let unfinished = path.with_added_extension(format!("{}.tmp", std::process::id()));
        let up = "../".repeat(2 + file.matches('/').count());
        let _ = fs_err::remove_file(&unfinished);
        #[cfg(unix)]
        fs_err::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &unfinished)?;
        #[cfg(not(unix))]
        {
            let _ = up;
            fs_err::copy(self.blob(etag), &unfinished)?;
        }
        Ok(fs_err::rename(&unfinished, &path)?)
    }
}

/// `.../models--owner--name/snapshots/<commit>`.
pub(super) fn of_snapshot(path: &Path) -> Option<RepoId> {
    let mut parts = path.iter().rev().map(|part| part.to_str());
    let (commit, snapshots, repo) = (parts.next()??, parts.next()??, parts.next()??);
    let (kind, name) = repo.split_once("--")?;
    let kind = match kind {
        "models" => Kind::Model,
        "datasets" => Kind::Dataset,
        _ => return None,
    };
    let name = name.replacen("--", "/", 1);
    (snapshots == "snapshots" && is_commit(commit)).then(|| RepoId::at(kind, name, commit.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_says_whose_it_is() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let path = format!("/x/models--Qwen--Qwen3-8B/snapshots/{commit}");
        assert_eq!(of_snapshot(Path::new(&path)).unwrap().to_string(), format!("Qwen/Qwen3-8B@{commit}"));
        for path in ["/x/target", "/x/models--a--b/snapshots/main", "/x/a--b/snapshots"] {
            assert_eq!(of_snapshot(Path::new(path)), None);
        }
    }
}
