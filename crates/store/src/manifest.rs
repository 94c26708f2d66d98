//! The two kinds of JSON files: `manifest.json`, what a store is, and `manifest-<writer>.json`, which shards it has.

use std::path::Path;

use fs_err as fse;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Encoding, Error, Identity, Result, Schema, Spec,
    disk::{self, ShardName},
    index::{self, Entry},
    shard::{HEADER_BYTES, VERSION},
};

const FORMAT: &str = "specforge-feature-store";
const WRITER_FORMAT: &str = "specforge-feature-store-shards";
/// A manifest lists 100 bytes per shard; a larger file is none of ours.
const MAX_BYTES: u64 = 1 << 28;

/// `manifest.json`: written once, by the writer that comes first.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    format: String,
    version: u32,
    pub(crate) created_by: String,
    id: String,
    encoding: Encoding,
    schema: Schema,
    identity: Identity,
}

/// `manifest-<writer>.json`: replaced, by its writer alone, whenever a shard is finished.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WriterManifest {
    format: String,
    version: u32,
    id: String,
    writer: u32,
    pub(crate) shards: Vec<ShardInfo>,
}

/// A finished shard as a manifest lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShardInfo {
    pub(crate) file: String,
    pub(crate) number: u32,
    pub(crate) records: u64,
    pub(crate) tokens: u64,
    pub(crate) bytes: u64,
}

impl Manifest {
    pub(crate) fn new(spec: &Spec) -> Self {
        let Spec { encoding, schema, identity } = spec.clone();
        let created_by = concat!("specforge ", env!("CARGO_PKG_VERSION")).into();
        Self {
            format: FORMAT.into(),
            version: VERSION,
            created_by,
            id: hex(spec.id()),
            encoding,
            schema,
            identity,
        }
    }

    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(disk::MANIFEST);
        if !path.exists() {
            return Err(Error::NotAStore { path: folder.into() });
        }
        let manifest: Self = read_sealed(&path, FORMAT)?;
        if manifest.id != hex(manifest.spec().id()) {
            let what = format!("id is {}, its contents have {}", manifest.id, hex(manifest.spec().id()));
            return Err(Error::Damaged { path, what });
        }
        Ok(manifest)
    }

    pub(crate) fn write(&self, folder: &Path) -> std::io::Result<()> {
        disk::write_atomic(&folder.join(disk::MANIFEST), seal(self).as_bytes())
    }

    pub(crate) fn spec(&self) -> Spec {
        Spec { encoding: self.encoding, schema: self.schema.clone(), identity: self.identity.clone() }
    }
}

impl WriterManifest {
    pub(crate) fn new(store_id: u32, writer: u32, shards: Vec<ShardInfo>) -> Self {
        Self { format: WRITER_FORMAT.into(), version: VERSION, id: hex(store_id), writer, shards }
    }

    /// Reads the manifest of a writer; shard names are taken from no one, so that none leads out of the folder.
    pub(crate) fn read(folder: &Path, store_id: u32, writer: u32) -> Result<Self> {
        let path = folder.join(disk::writer_manifest(writer));
        let manifest: Self = read_sealed(&path, WRITER_FORMAT)?;
        let damaged = |what: String| Err(Error::Damaged { path: path.clone(), what });
        if manifest.id != hex(store_id) || manifest.writer != writer {
            let expected = format!("expected writer {writer} of store {}", hex(store_id));
            return damaged(format!("{expected}, got writer {} of store {}", manifest.writer, manifest.id));
        }
        let mut last = None;
        for info in &manifest.shards {
            let name = ShardName { writer, number: info.number };
            if info.file != name.bin() {
                return damaged(format!(
                    "shard {}: expected file {}, got {:?}",
                    info.number,
                    name.bin(),
                    info.file
                ));
            }
            if last.is_some_and(|last| last >= info.number) {
                return damaged(format!("shard {} is listed out of order", info.number));
            }
            last = Some(info.number);
        }
        Ok(manifest)
    }

    pub(crate) fn write(&self, folder: &Path) -> std::io::Result<()> {
        disk::write_atomic(&folder.join(disk::writer_manifest(self.writer)), seal(self).as_bytes())
    }
}

impl ShardInfo {
    pub(crate) fn new(name: ShardName, bytes: u64, entries: &[Entry]) -> Self {
        let (records, tokens) = (entries.len() as u64, index::tokens(entries));
        Self { file: name.bin(), number: name.number, records, tokens, bytes }
    }

    /// Checks that the shard is there and has its size.
    pub(crate) fn check_file(&self, folder: &Path, writer: u32) -> Result<()> {
        let path = folder.join(&self.file);
        let remedy = format!(
            "restore it; or delete it and {} and run the same capture again, which captures its rows again",
            disk::writer_manifest(writer)
        );
        if !path.exists() {
            return Err(Error::Damaged { path, what: format!("the file is missing; {remedy}") });
        }
        let found = fse::metadata(&path)?.len();
        if found != self.bytes || found < HEADER_BYTES as u64 {
            let what = format!("expected {} bytes, got {found}; {remedy}", self.bytes);
            return Err(Error::Damaged { path, what });
        }
        Ok(())
    }

    /// Reads the index of this shard and compares its sums with the manifest's.
    pub(crate) fn read_index(&self, folder: &Path, store_id: u32, name: ShardName) -> Result<Vec<Entry>> {
        let path = folder.join(name.idx());
        let entries = index::read(&path, store_id, name, self.bytes)?;
        let found = Self::new(name, self.bytes, &entries);
        if found != *self {
            let what = format!(
                "{} records and {} tokens, the manifest has {} and {}",
                found.records, found.tokens, self.records, self.tokens
            );
            return Err(Error::Damaged { path, what });
        }
        Ok(entries)
    }
}

fn hex(id: u32) -> String {
    format!("{id:08x}")
}

/// Pretty JSON whose last member `crc32` is the checksum of all bytes before its line.
fn seal(value: &impl Serialize) -> String {
    let json = serde_json::to_string_pretty(value).expect("manifests hold strings, numbers and lists only");
    let body = json.strip_suffix("\n}").expect("pretty JSON of a struct ends so");
    let body = format!("{body},\n");
    let crc = crc32fast::hash(body.as_bytes());
    body + &tail(crc)
}

fn tail(crc: u32) -> String {
    format!("  \"crc32\": \"{crc:08x}\"\n}}\n")
}

fn read_sealed<T: DeserializeOwned>(path: &Path, format: &str) -> Result<T> {
    let damaged = |what: String| Error::Damaged { path: path.into(), what };
    let size = fse::metadata(path)?.len();
    if size > MAX_BYTES {
        return Err(damaged(format!("{size} bytes are too many for a manifest")));
    }
    let text = fse::read_to_string(path)?;
    let whole: Value = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
    if whole["format"] != format {
        return Err(damaged(format!("format is {}, expected {format:?}", whole["format"])));
    }
    // Before the checksum: a newer version may compute it otherwise.
    if let Some(found) = whole["version"].as_u64().filter(|v| *v != VERSION as u64) {
        return Err(Error::Version { path: path.into(), found, supported: VERSION as u64 });
    }
    let body = text.len().checked_sub(tail(0).len()).and_then(|at| text.get(..at));
    let body = body.ok_or_else(|| damaged("it ends too early".into()))?;
    if text[body.len()..] != tail(crc32fast::hash(body.as_bytes())) {
        return Err(damaged("its checksum does not match: damaged, or edited by hand".into()));
    }
    let json = format!("{}\n}}", body.trim_end_matches(",\n"));
    serde_json::from_str(&json).map_err(|e| damaged(e.to_string()))
}
