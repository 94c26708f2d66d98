//! An unfinished shard: records are appended to `shard-*.part`, which becomes `shard-*.bin` when it is finished.

use std::{
    io,
    path::{Path, PathBuf},
};

use fs_err as fse;

use crate::{
    Error, Result, Spec,
    disk::{self, OpenShard, ShardFile, ShardName},
    index::{self, Entry},
    manifest::ShardInfo,
    shard::{self, BadHeader, HEADER_BYTES},
};

/// An unfinished shard, its file positioned behind the last record.
#[derive(Debug)]
pub(crate) struct Part {
    file: Box<dyn ShardFile>,
    path: PathBuf,
    name: ShardName,
    entries: Vec<Entry>,
    bytes: u64,
    /// What the file holds is no longer known.
    broken: bool,
}

/// Why a write to an unfinished shard failed.
#[derive(Debug)]
pub(crate) enum WriteError {
    Io(io::Error),
    Broken(PathBuf),
}

impl WriteError {
    /// As an error of the crate; `records` are those the writer has kept.
    pub(crate) fn into_error(self, records: u64) -> Error {
        match self {
            Self::Io(source) => Error::Write { records, source },
            Self::Broken(path) => Error::Broken { path },
        }
    }
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Part {
    /// Begins an empty shard.
    pub(crate) fn begin(
        folder: &Path,
        name: ShardName,
        header: &[u8; HEADER_BYTES],
        open: OpenShard,
    ) -> io::Result<Self> {
        let path = folder.join(name.part());
        let mut file = open(&path)?;
        file.cut(0)?;
        file.write_all(header)?;
        Ok(Self { file, path, name, entries: Vec::new(), bytes: HEADER_BYTES as u64, broken: false })
    }

    /// Takes up the shard of an interrupted writer: whole records are kept, the torn tail is cut off.
    pub(crate) fn resume(folder: &Path, name: ShardName, spec: &Spec, open: OpenShard) -> Result<Self> {
        let path = folder.join(name.part());
        let (store_id, fields) = (spec.id(), spec.schema.fields().len());
        let begin = || {
            let header = shard::header(store_id, name, fields);
            Self::begin(folder, name, &header, open).map_err(|source| Error::Write { records: 0, source })
        };
        if fse::metadata(&path)?.len() < HEADER_BYTES as u64 {
            return begin();
        }
        let scan = {
            let bytes = disk::map(&path)?;
            match shard::check_header(&bytes, store_id, name, fields) {
                Ok(()) => shard::scan(spec, &bytes),
                Err(BadHeader::Torn) => return begin(),
                Err(BadHeader::Foreign(what)) => return Err(Error::Damaged { path, what }),
            }
        };
        let mut file = open(&path)?;
        file.cut(scan.end)?;
        Ok(Self { file, path, name, entries: scan.entries, bytes: scan.end, broken: false })
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Whether a record of `bytes` belongs into the next shard. One that is larger than a shard gets its own.
    pub(crate) fn is_full(&self, bytes: u64, shard_bytes: u64) -> bool {
        !self.entries.is_empty() && self.bytes + bytes > shard_bytes
    }

    /// Appends a record; on failure the file is cut back to the records before it.
    pub(crate) fn append(&mut self, record: &[u8], entry: Entry) -> Result<(), WriteError> {
        self.check()?;
        if let Err(error) = self.file.write_all(record) {
            self.broken = self.file.cut(self.bytes).is_err();
            return Err(error.into());
        }
        self.entries.push(Entry { offset: self.bytes, ..entry });
        self.bytes += entry.bytes;
        Ok(())
    }

    /// Makes the shard durable, writes its index and gives it its final name; `None` when it is empty and so dropped.
    /// Before the rename every step may fail and be repeated.
    pub(crate) fn seal(&mut self, folder: &Path, store_id: u32) -> Result<Option<ShardInfo>, WriteError> {
        self.check()?;
        if self.entries.is_empty() {
            fse::remove_file(&self.path)?;
            return Ok(None);
        }
        if let Err(error) = self.file.sync() {
            // After a failed fsync the kernel may have dropped what it could not write.
            self.broken = true;
            return Err(error.into());
        }
        let index = index::encode(store_id, self.name, self.bytes, &self.entries);
        disk::write_atomic(&folder.join(self.name.idx()), &index)?;
        fse::rename(&self.path, folder.join(self.name.bin()))?;
        Ok(Some(ShardInfo::new(self.name, self.bytes, &self.entries)))
    }

    fn check(&self) -> Result<(), WriteError> {
        if self.broken { Err(WriteError::Broken(self.path.clone())) } else { Ok(()) }
    }
}
