//! What can go wrong on the way to another machine.

use std::path::PathBuf;

/// The result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// Nobody there: no such host, or nothing listens.
    #[error("{url}: {why}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What happened, and what to do.
        why: String,
    },

    /// No whole answer: cut off, too slow.
    #[error("{url}: {why}")]
    Connection {
        /// What was asked for.
        url: String,
        /// What happened, and what to do.
        why: String,
    },

    /// An answer that says no.
    #[error("{url}: status {status}{}", after_colon(message))]
    Status {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What the server says about it, and what to do.
        message: String,
    },

    /// An answer that is not what it should be.
    #[error("{url}: {why}")]
    Malformed {
        /// What was asked for.
        url: String,
        /// Expected and got.
        why: String,
    },

    /// Something is not in the cache, and the network is not to be used.
    #[error("{what} is not in the cache ({cache}), and HF_HUB_OFFLINE is set; unset it, or download on a machine with a \
             network and copy the cache", cache = cache.display())]
    Offline {
        /// The repository or file.
        what: String,
        /// The cache's folder.
        cache: PathBuf,
    },

    /// A repository that the hub does not show.
    #[error("{what}: {why}")]
    Repository {
        /// The repository, with revision.
        what: String,
        /// Why, and what to do.
        why: String,
    },

    /// A downloaded file whose content is not the hub's.
    #[error(
        "{file}: expected {expected}, got {got}; the download was thrown away, run the same command again"
    )]
    Damaged {
        /// The file.
        file: String,
        /// Size or hash that the hub gave.
        expected: String,
        /// Size or hash of what came.
        got: String,
    },

    /// It was told to stop.
    #[error("stopped")]
    Stopped,
}

fn after_colon(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}

impl Error {
    /// Whether another try may succeed without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Connection { .. } | Self::Malformed { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 425 | 429 | 500..=599),
            _ => false,
        }
    }
}
