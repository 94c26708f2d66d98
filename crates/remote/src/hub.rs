//! The Hugging Face hub: repositories into the cache that every program of it shares, and folders up to it.
//!
//! ```text
//! <cache>/models--<owner>--<name>/refs/<revision>                   the commit that the revision was
//!                                /snapshots/<commit>/<file>         link to the content
//!                                /blobs/<etag>, <etag>.incomplete   content, by its hash
//! ```

mod cache;
mod download;
mod file;
mod id;
mod listing;
mod upload;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub use id::{Kind, RepoId};
pub use upload::{Upload, UploadFile};

use crate::http::{Http, Limits};
use crate::{Backoff, Error};

/// The hub's own address.
pub const ENDPOINT: &str = "https://huggingface.co";

/// A hub, and the cache on this machine.
#[derive(Debug)]
pub struct Hub {
    endpoint: String,
    cache: PathBuf,
    offline: bool,
    has_token: bool,
    http: Http,
    backoff: Backoff,
}

/// What a user's environment says about the hub.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// The hub's address; a mirror's, with the same routes.
    pub endpoint: String,
    /// The cache's folder.
    pub cache: PathBuf,
    /// The user's access token.
    pub token: Option<String>,
    /// Whether the network must not be used.
    pub offline: bool,
    /// How often and how soon a request is tried again.
    pub backoff: Backoff,
}

/// What is shown while files come or go: bytes that are there, and bytes in all.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// What a call needs besides the hub: where progress goes, and whether to stop.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Progress.
    pub progress: Progress<'a>,
    /// Becomes true when it is to stop; what was downloaded stays for the next time.
    pub stop: &'a AtomicBool,
}

impl std::fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("stop", &self.stop).finish_non_exhaustive()
    }
}

impl Hub {
    /// The hub of these settings.
    pub fn new(settings: HubSettings) -> Self {
        let HubSettings { endpoint, cache, token, offline, backoff } = settings;
        let limits = Limits { answer: Duration::from_mins(1), body: Duration::from_mins(30) };
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Self { endpoint, cache, offline, has_token: token.is_some(), http: Http::new(token, limits), backoff }
    }

    /// The repository and commit whose snapshot a folder of the cache is.
    pub fn of_snapshot(path: &std::path::Path) -> Option<RepoId> {
        cache::of_snapshot(path)
    }

    /// What a failed request means for a repository, and what to do about it.
    fn explain(&self, id: &RepoId, error: Error, code: Option<&str>) -> Error {
        let Error::Status { status, message, .. } = &error else { return error };
        let page = format!("{}/{}", self.endpoint, id.page_path());
        let token = if self.has_token {
            "the token in HF_TOKEN (or the file `token` of HF_HOME) does not allow it"
        } else {
            "set HF_TOKEN to an access token of yours (made in the settings of the hub)"
        };
        let why = match (status, code) {
            (_, Some("GatedRepo")) => {
                format!("access has to be granted: accept the terms at {page}, and {token}")
            }
            (404, Some("RevisionNotFound")) => {
                format!("it has no revision {}: see {page}/commits", id.revision())
            }
            (404, Some("EntryNotFound")) => format!("it lacks a file that it lists: {message}"),
            (401 | 403 | 404, Some("RepoNotFound") | None) | (401 | 403, _) => format!(
                "the hub does not show it (status {status}{}): is the name right? If it is private or gated, {token}. A \
                 local folder of that name is not there either",
                if message.is_empty() { String::new() } else { format!(", {message}") }
            ),
            _ => return error,
        };
        Error::Repository { what: id.to_string(), why }
    }
}
