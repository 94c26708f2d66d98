//! What can go wrong with a store, each variant saying where and what to do.

use std::{io, path::PathBuf};

use crate::identity::Difference;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong with a store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or opening a file failed; the message of the source names the path.
    #[error("{0}")]
    Io(#[from] io::Error),

    /// Writing failed, usually because the disk is full. Nothing half-written is visible.
    #[error(
        "{source}; the {records} records written before are kept: free some space (or fix the cause), \
         then run the same capture again, it goes on from there"
    )]
    Write {
        /// Records of this writer that are in the store.
        records: u64,
        /// The failure; its message names the path.
        source: io::Error,
    },

    /// A writer whose file could not be brought back to a clean state after a failed write.
    #[error("{path} could not be cut back after a failed write; open the store again to go on")]
    Broken {
        /// The unfinished shard.
        path: PathBuf,
    },

    /// The folder is no store.
    #[error("{path} is not a feature store: it has no manifest.json; `specforge capture` makes one")]
    NotAStore {
        /// The folder given.
        path: PathBuf,
    },

    /// A store of a newer format.
    #[error(
        "{path} has format version {found}, this program reads version {supported}; use a newer specforge"
    )]
    Version {
        /// The file that says so.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The version this program reads and writes.
        supported: u64,
    },

    /// A manifest, index or shard whose own bytes are wrong.
    #[error("{path} is damaged or no part of this store: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong and, where something can be done, what.
        what: String,
    },

    /// A record whose bytes are wrong.
    #[error(
        "damaged record for row {row} at byte {offset} of {path}: {what}; to repair, delete this shard and the \
         manifest-*.json of its writer, then run the same capture again"
    )]
    DamagedRecord {
        /// The shard.
        path: PathBuf,
        /// Where the record starts.
        offset: u64,
        /// The row it holds according to the index.
        row: u64,
        /// What is wrong.
        what: String,
    },

    /// A store that does not fit what was asked for.
    #[error("store {path} does not fit{}\n  capture into another folder, or change the recipe", lines(.differences))]
    Mismatch {
        /// The folder of the store.
        path: PathBuf,
        /// Every difference, in the order of the manifest.
        differences: Vec<Difference>,
    },

    /// Two processes with the same writer number.
    #[error(
        "store {path} is in use: another process writes as writer {writer}; wait for it, or give every process \
         its own writer number"
    )]
    InUse {
        /// The folder of the store.
        path: PathBuf,
        /// The writer number.
        writer: u32,
    },

    /// The file system cannot lock.
    #[error("cannot lock {path}: {source}; stores are written on a file system with file locks")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },

    /// A schema no store can have.
    #[error("schema: {0}")]
    Schema(String),

    /// A row that is not in the store.
    #[error("store {path} has no row {row}")]
    NoSuchRow {
        /// The folder of the store.
        path: PathBuf,
        /// The row asked for.
        row: u64,
    },

    /// A row appended twice.
    #[error("row {row} is in the store already; skip the rows of `Writer::rows`")]
    DuplicateRow {
        /// The row.
        row: u64,
    },

    /// A field asked for or appended that does not fit the schema.
    #[error("row {row}, field {field}: expected {expected}, got {got}")]
    Field {
        /// The row.
        row: u64,
        /// The name of the field.
        field: String,
        /// What the schema says.
        expected: String,
        /// What was given or asked for.
        got: String,
    },

    /// A value that `fp8` cannot hold.
    #[error(
        "row {row}, field {field}, token {token}: value is {value}, and encoding fp8 stores finite values only; \
         the target produced it, so look there (or use encoding bf16)"
    )]
    NotFinite {
        /// The row.
        row: u64,
        /// The name of the field.
        field: String,
        /// The token within the row, from 0.
        token: usize,
        /// NaN, inf or -inf.
        value: f32,
    },
}

fn lines(differences: &[Difference]) -> String {
    differences.iter().fold(String::new(), |all, d| all + "\n  " + &d.to_string())
}
