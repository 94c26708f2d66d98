//! A repository into the cache.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::cache::RepoCache;
use super::file::Remote;
use super::listing::Listing;
use super::{Hub, Kind, RepoId, Watch};
use crate::{Error, Result};

/// Files that come at once.
const AT_ONCE: usize = 4;

impl Hub {
    /// The folder with a repository's configuration, tokenizer, template and weights, downloaded if it is not there; of a
    /// dataset the folder with its rows, or the file, folder or pattern in it that is meant.
    ///
    /// Interrupted downloads go on where they were; every file is compared with the hub's size and hash. Without a
    /// network, or where the settings say so, what the cache has of the revision is used.
    pub fn folder(&self, id: &RepoId, watch: Watch<'_>) -> Result<PathBuf> {
        let snapshot = self.snapshot(id, watch)?;
        Ok(id.part().map_or_else(|| snapshot.clone(), |part| snapshot.join(part)))
    }

    fn snapshot(&self, id: &RepoId, watch: Watch<'_>) -> Result<PathBuf> {
        let cache = RepoCache::new(&self.cache, id);
        let cached = cache.commit(id);
        if self.offline {
            let commit =
                cached.ok_or_else(|| Error::Offline { what: id.to_string(), cache: self.cache.clone() })?;
            return Ok(cache.snapshot(&commit));
        }
        let listing = match self.retried(watch, || self.listing(id)) {
            Ok(listing) => listing,
            Err(Error::Connection { .. } | Error::Unreachable { .. }) if cached.is_some() => {
                return Ok(cache.snapshot(&cached.unwrap_or_default()));
            }
            Err(error) => return Err(error),
        };
        let is_model = listing.files.iter().any(|file| file == "config.json" || file == "training_state.pt");
        let usable = if id.kind() == Kind::Dataset { !listing.files.is_empty() } else { is_model };
        if !usable {
            let why = match id.kind() {
                Kind::Model => "it has no config.json: it is not a model in the form of transformers",
                Kind::Dataset if id.part().is_some() => {
                    "it has no .jsonl, .json or .parquet file of this name or folder"
                }
                Kind::Dataset => {
                    "it has no .jsonl, .json or .parquet file; the hub may have a converted copy: add @refs/convert/parquet"
                }
            };
            let why = why.to_owned();
            return Err(Error::Repository { what: id.to_string(), why });
        }
        self.fetch_all(id, &cache, &listing, watch)?;
        cache.set_commit(id, &listing.commit)?;
        Ok(cache.snapshot(&listing.commit))
    }

    fn fetch_all(&self, id: &RepoId, cache: &RepoCache, listing: &Listing, watch: Watch<'_>) -> Result<()> {
        let snapshot = cache.snapshot(&listing.commit);
        let mut missing = Vec::new();
        // A link whose content is there was made after the content was checked.
        for file in listing.files.iter().filter(|file| !snapshot.join(file).exists()) {
            missing.push(self.retried(watch, || self.remote(id, &listing.commit, file))?);
        }
        let total: u64 = missing.iter().map(|remote| remote.size).sum();
        // The largest first, so that they do not come last alone.
        missing.sort_by_key(|remote| std::cmp::Reverse(remote.size));
        let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
        let failed: Mutex<Option<Error>> = Mutex::new(None);
        let first_failure = || failed.lock().unwrap_or_else(PoisonError::into_inner);
        let work = || {
            while let Some(remote) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                if first_failure().is_some() {
                    return;
                }
                let more = |bytes: i64| {
                    let before = done.fetch_add(bytes as u64, Ordering::Relaxed);
                    (watch.progress)(before.wrapping_add(bytes as u64), total);
                };
                if let Err(error) = self.fetch(id, cache, &listing.commit, remote, (watch, &more)) {
                    first_failure().get_or_insert(error);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(missing.len()) {
                scope.spawn(work);
            }
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn fetch(
        &self,
        id: &RepoId,
        cache: &RepoCache,
        commit: &str,
        remote: &Remote,
        (watch, more): (Watch<'_>, &dyn Fn(i64)),
    ) -> Result<()> {
        let blob = cache.blob(&remote.etag);
        let there = blob.metadata().is_ok_and(|found| found.len() == remote.size);
        if there {
            more(remote.size as i64);
        } else {
            self.fetch_blob(id, remote, &blob, (watch, more))?;
        }
        cache.link(commit, &remote.file, &remote.etag)
    }

    /// Tries until it works, fails for good, or was tried often enough.
    pub(super) fn retried<T>(&self, watch: Watch<'_>, mut once: impl FnMut() -> Result<T>) -> Result<T> {
        let mut failure = 0;
        loop {
            match once() {
                // Without a network there is none a minute later.
                Err(error @ Error::Unreachable { .. }) => return Err(error),
                Err(error) if error.is_transient() && failure < self.backoff.retries => {
                    failure += 1;
                    crate::backoff::sleep(self.backoff.delay(failure, None, failure.into()), watch.stop)?;
                }
                result => return result,
            }
        }
    }
}
