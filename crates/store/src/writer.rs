//! Writing a store: one writer per process, shards of its own, resumable after any interruption.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use fs_err as fse;

use crate::{
    Error, Result, Spec, Values,
    disk::{self, OpenShard, ShardName},
    index::{self, Entry},
    manifest::{Manifest, ShardInfo, WriterManifest},
    part::Part,
    record, shard,
};

/// Appends records to a store.
///
/// Records are kept as they are appended: a process that ends without [`Writer::finish`] loses at most
/// the one it was writing, and the next [`Writer::open`] goes on behind the last whole one. Readers see a
/// record once its shard is finished.
#[derive(Debug)]
pub struct Writer {
    folder: PathBuf,
    spec: Spec,
    store_id: u32,
    options: WriterOptions,
    shards: Vec<ShardInfo>,
    rows: BTreeSet<u64>,
    part: Option<Part>,
    next_number: u32,
    record: Vec<u8>,
    open_shard: OpenShard,
    /// Held until the writer goes.
    _lock: fs::File,
}

/// Which writer this is, and how large its files get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriterOptions {
    /// The number of this writer, as the rank: one process each. Default 0.
    pub writer: u32,
    /// Size at which a shard is finished and another one begun, in bytes. Default 1 GiB.
    pub shard_bytes: u64,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self { writer: 0, shard_bytes: 1 << 30 }
    }
}

impl Writer {
    /// Opens the store in `folder` for writing, makes it where there is none, and goes on where this writer stopped.
    ///
    /// A store made for another spec is [`Error::Mismatch`], a second process with the same writer number
    /// is [`Error::InUse`]. A torn last record is cut off.
    pub fn open(folder: impl AsRef<Path>, spec: &Spec, options: &WriterOptions) -> Result<Self> {
        Self::open_with(folder.as_ref(), spec, options, disk::open_shard)
    }

    pub(crate) fn open_with(
        folder: &Path,
        spec: &Spec,
        options: &WriterOptions,
        open_shard: OpenShard,
    ) -> Result<Self> {
        fse::create_dir_all(folder)?;
        ensure_manifest(folder, spec)?;
        let mut writer = Self {
            folder: folder.into(),
            spec: spec.clone(),
            store_id: spec.id(),
            options: *options,
            shards: Vec::new(),
            rows: BTreeSet::new(),
            part: None,
            next_number: 0,
            record: Vec::new(),
            open_shard,
            _lock: lock_writer(folder, options.writer)?,
        };
        writer.recover()?;
        Ok(writer)
    }

    /// The rows that need no capture: of all finished shards when the store was opened, whoever wrote them,
    /// and of this writer's unfinished one.
    pub fn rows(&self) -> &BTreeSet<u64> {
        &self.rows
    }

    /// Whether a row is among [`Writer::rows`].
    pub fn contains(&self, row: u64) -> bool {
        self.rows.contains(&row)
    }

    /// Appends the record of `row`, a sequence of `len` tokens (at least one), its fields in the order of the schema.
    ///
    /// After an error nothing of the record is in the store; when the cause is gone, it may be appended again.
    pub fn append(&mut self, row: u64, len: u32, fields: &[(&str, Values<'_>)]) -> Result<()> {
        if self.rows.contains(&row) {
            return Err(Error::DuplicateRow { row });
        }
        check_fields(&self.spec, row, len, fields)?;
        let crc = record::encode(&self.spec, row, len, fields, &mut self.record)?;
        let bytes = self.record.len() as u64;
        if self.part.as_ref().is_some_and(|p| p.is_full(bytes, self.options.shard_bytes)) {
            self.seal()?;
        }
        if self.part.is_none() {
            self.part = Some(self.begin()?);
        }
        let records = self.records();
        let part = self.part.as_mut().expect("a shard was begun above");
        part.append(&self.record, Entry { row, offset: 0, bytes, len, crc })
            .map_err(|e| e.into_error(records))?;
        self.rows.insert(row);
        Ok(())
    }

    /// Finishes the last shard: now readers see everything that was appended.
    pub fn finish(mut self) -> Result<()> {
        self.seal()
    }

    /// Records of this writer.
    fn records(&self) -> u64 {
        let part = self.part.as_ref().map_or(0, |p| p.entries().len() as u64);
        self.shards.iter().map(|s| s.records).sum::<u64>() + part
    }

    fn name(&self, number: u32) -> ShardName {
        ShardName { writer: self.options.writer, number }
    }

    fn begin(&mut self) -> Result<Part> {
        let name = self.name(self.next_number);
        let header = shard::header(self.store_id, name, self.spec.schema.fields().len());
        let part = Part::begin(&self.folder, name, &header, self.open_shard)
            .map_err(|source| Error::Write { records: self.records(), source })?;
        self.next_number += 1;
        Ok(part)
    }

    /// Finishes the unfinished shard, if any, and writes the manifest. May be repeated after a failure.
    fn seal(&mut self) -> Result<()> {
        let records = self.records();
        if let Some(part) = &mut self.part {
            if let Some(info) = part.seal(&self.folder, self.store_id).map_err(|e| e.into_error(records))? {
                self.shards.push(info);
            }
            self.part = None;
        }
        disk::sync_folder(&self.folder)
            .and_then(|()| self.write_manifest())
            .map_err(|source| Error::Write { records, source })
    }

    fn write_manifest(&self) -> io::Result<()> {
        WriterManifest::new(self.store_id, self.options.writer, self.shards.clone()).write(&self.folder)
    }

    /// Takes up what is in the folder: other writers' rows, own finished shards, own unfinished one.
    fn recover(&mut self) -> Result<()> {
        let listing = disk::list(&self.folder)?;
        let writer = self.options.writer;
        for other in listing.writers.iter().filter(|w| **w != writer) {
            let manifest = WriterManifest::read(&self.folder, self.store_id, *other)?;
            for info in &manifest.shards {
                let name = ShardName { writer: *other, number: info.number };
                self.know(&info.read_index(&self.folder, self.store_id, name)?);
            }
        }
        let listed = if listing.writers.contains(&writer) {
            WriterManifest::read(&self.folder, self.store_id, writer)?.shards
        } else {
            Vec::new()
        };
        for info in &listed {
            info.check_file(&self.folder, writer)?;
        }
        let own = |names: Vec<ShardName>| names.into_iter().filter(move |n| n.writer == writer);
        for name in own(listing.bins.clone()) {
            let info = listed.iter().find(|info| info.number == name.number);
            self.recover_finished(name, info)?;
        }
        if self.shards != listed {
            let records = self.records();
            self.write_manifest().map_err(|source| Error::Write { records, source })?;
        }
        for name in own(listing.parts) {
            if listing.bins.contains(&name) {
                let what = format!("there is {} too; delete the one that is not wanted", name.bin());
                return Err(Error::Damaged { path: self.folder.join(name.part()), what });
            }
            self.recover_part(name)?;
        }
        Ok(())
    }

    /// Takes up a finished shard; one that the manifest or index does not know (yet) is read through.
    fn recover_finished(&mut self, name: ShardName, listed: Option<&ShardInfo>) -> Result<()> {
        let known = listed.and_then(|info| info.read_index(&self.folder, self.store_id, name).ok());
        let entries = match known {
            Some(entries) => entries,
            None => self.make_index(name)?,
        };
        let bytes = entries.last().map_or(shard::HEADER_BYTES as u64, |e| e.offset + e.bytes);
        self.shards.push(ShardInfo::new(name, bytes, &entries));
        self.next_number = self.next_number.max(name.number + 1);
        self.know(&entries);
        Ok(())
    }

    fn make_index(&self, name: ShardName) -> Result<Vec<Entry>> {
        let path = self.folder.join(name.bin());
        let damaged = |what: String| Error::Damaged {
            path: path.clone(),
            what: format!("{what}; delete it and run the same capture again, which captures its rows again"),
        };
        let bytes = disk::map(&path)?;
        let fields = self.spec.schema.fields().len();
        shard::check_header(&bytes, self.store_id, name, fields).map_err(|e| damaged(e.what()))?;
        let scan = shard::scan(&self.spec, &bytes);
        if let Some(what) = scan.stopped {
            return Err(damaged(format!("at byte {}: {what}", scan.end)));
        }
        let index = index::encode(self.store_id, name, scan.end, &scan.entries);
        disk::write_atomic(&self.folder.join(name.idx()), &index)
            .map_err(|source| Error::Write { records: self.records(), source })?;
        Ok(scan.entries)
    }

    fn recover_part(&mut self, name: ShardName) -> Result<()> {
        if self.part.is_some() {
            self.seal()?;
        }
        let part = Part::resume(&self.folder, name, &self.spec, self.open_shard)?;
        self.know(part.entries());
        self.part = Some(part);
        self.next_number = self.next_number.max(name.number + 1);
        Ok(())
    }

    fn know(&mut self, entries: &[Entry]) {
        self.rows.extend(entries.iter().map(|e| e.row));
    }
}

/// Finishes what writers that are gone have left unfinished, but for the writer `except`: then all others know their
/// rows. For whoever opens the store before a number of writers does; a store that is not there yet needs nothing.
pub fn finish_interrupted(folder: impl AsRef<Path>, spec: &Spec, except: Option<u32>) -> Result<()> {
    let folder = folder.as_ref();
    if !folder.exists() {
        return Ok(());
    }
    let unfinished: BTreeSet<u32> = disk::list(folder)?.parts.iter().map(|part| part.writer).collect();
    for writer in unfinished.into_iter().filter(|writer| Some(*writer) != except) {
        Writer::open(folder, spec, &WriterOptions { writer, ..WriterOptions::default() })?.finish()?;
    }
    Ok(())
}

/// Makes `manifest.json`, or compares it. The lock keeps writers that start together from both making it.
fn ensure_manifest(folder: &Path, spec: &Spec) -> Result<()> {
    let path = folder.join("manifest.lock");
    let lock = disk::lock_file(&path)?;
    lock.lock().map_err(|source| Error::Lock { path, source })?;
    match Manifest::read(folder) {
        Err(Error::NotAStore { .. }) => {
            Manifest::new(spec).write(folder).map_err(|source| Error::Write { records: 0, source })
        }
        Err(error) => Err(error),
        Ok(manifest) => {
            let differences = manifest.spec().differences(spec);
            if differences.is_empty() {
                return Ok(());
            }
            Err(Error::Mismatch { path: folder.into(), differences })
        }
    }
}

fn lock_writer(folder: &Path, writer: u32) -> Result<fs::File> {
    let path = folder.join(format!("writer-{writer:05}.lock"));
    let lock = disk::lock_file(&path)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => Err(Error::InUse { path: folder.into(), writer }),
        Err(fs::TryLockError::Error(source)) => Err(Error::Lock { path, source }),
    }
}

fn check_fields(spec: &Spec, row: u64, len: u32, fields: &[(&str, Values<'_>)]) -> Result<()> {
    let schema = spec.schema.fields();
    for i in 0..schema.len().max(fields.len()) {
        let expected = match schema.get(i) {
            None => "nothing".into(),
            Some(f) => format!("{} {} of {len} tokens ({} values)", f.name, f, len as u64 * f.width as u64),
        };
        let got = match fields.get(i) {
            None => "nothing".into(),
            Some((name, v)) => format!("{name} {} ({} values)", v.dtype(), v.len()),
        };
        let fits = schema.get(i).zip(fields.get(i)).is_some_and(|(f, (name, v))| {
            f.name == *name && f.dtype == v.dtype() && v.len() as u64 == len as u64 * f.width as u64
        });
        if !fits || len == 0 {
            let field = schema.get(i).map_or(format!("number {}", i + 1), |f| f.name.clone());
            let expected = if len == 0 { "at least one token".into() } else { expected };
            return Err(Error::Field { row, field, expected, got });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::{DType, Encoding, Field, Identity, Reader, Schema, disk::ShardFile};

    thread_local! {
        /// Bytes that the pretended disk has left.
        static LEFT: Cell<u64> = const { Cell::new(0) };
        /// Whether the pretended disk fails to cut or to sync.
        static FAILS: Cell<(bool, bool)> = const { Cell::new((false, false)) };
    }

    /// A file on a disk that runs full, in the middle of a write if it so happens.
    #[derive(Debug)]
    struct Limited(Box<dyn ShardFile>);

    impl io::Write for Limited {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = LEFT.get().min(bytes.len() as u64);
            if n == 0 {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "no space left on device"));
            }
            LEFT.set(LEFT.get() - n);
            self.0.write_all(&bytes[..n as usize])?;
            Ok(n as usize)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }

    impl ShardFile for Limited {
        fn cut(&mut self, bytes: u64) -> io::Result<()> {
            if FAILS.get().0 {
                return Err(io::Error::other("cut fails"));
            }
            self.0.cut(bytes)
        }

        fn sync(&mut self) -> io::Result<()> {
            if FAILS.get().1 {
                return Err(io::Error::other("sync fails"));
            }
            self.0.sync()
        }
    }

    fn limited(path: &Path) -> io::Result<Box<dyn ShardFile>> {
        Ok(Box::new(Limited(disk::open_shard(path)?)))
    }

    fn spec() -> Spec {
        let schema = Schema::new(vec![Field::new("input_ids", DType::U32, 1)]).unwrap();
        Spec { schema, encoding: Encoding::Bf16, identity: Identity::default() }
    }

    fn append(writer: &mut Writer, row: u64) -> Result<()> {
        writer.append(row, 2, &[("input_ids", Values::U32(&[row as u32, 7]))])
    }

    fn check_rows(folder: &Path, rows: &[u64]) {
        let reader = Reader::open(folder).unwrap();
        assert_eq!(reader.rows(), rows);
        assert!(reader.verify(&|_, _| ()).unwrap().damaged.is_empty());
    }

    #[test]
    fn disk_that_runs_full_at_any_byte_keeps_the_records_before() {
        let options = WriterOptions { shard_bytes: 500, ..WriterOptions::default() };
        let (records, record_bytes) = (4, 128);
        for space in (0..2 * 64 + records * record_bytes).step_by(3) {
            let folder = tempfile::tempdir().unwrap();
            let mut writer = Writer::open_with(folder.path(), &spec(), &options, limited).unwrap();
            LEFT.set(space);
            let (row, error) =
                (0..=records).find_map(|row| append(&mut writer, row).err().map(|e| (row, e))).unwrap();
            assert!(matches!(&error, Error::Write { records, .. } if *records == row), "{error}");
            assert!(error.to_string().contains("no space left"), "{error}");
            assert!(error.to_string().contains("run the same capture again"), "{error}");
            if space % 2 == 0 {
                // The same process goes on after space was made ...
                LEFT.set(u64::MAX);
            } else {
                // ... or another one does.
                drop(writer);
                writer = Writer::open(folder.path(), &spec(), &options).unwrap();
            }
            assert_eq!(writer.rows().iter().copied().collect::<Vec<_>>(), (0..row).collect::<Vec<_>>());
            (row..4).for_each(|row| append(&mut writer, row).unwrap());
            writer.finish().unwrap();
            check_rows(folder.path(), &[0, 1, 2, 3]);
        }
    }

    #[test]
    fn a_file_in_an_unknown_state_is_not_written_to() {
        let folder = tempfile::tempdir().unwrap();
        LEFT.set(64 + 128 + 10);
        let mut writer =
            Writer::open_with(folder.path(), &spec(), &WriterOptions::default(), limited).unwrap();
        append(&mut writer, 0).unwrap();
        FAILS.set((true, false));
        append(&mut writer, 1).unwrap_err();
        FAILS.set((false, false));
        LEFT.set(u64::MAX);
        assert!(matches!(append(&mut writer, 1), Err(Error::Broken { .. })));
        assert!(matches!(writer.finish(), Err(Error::Broken { .. })));

        let mut writer = Writer::open(folder.path(), &spec(), &WriterOptions::default()).unwrap();
        assert_eq!(writer.rows().len(), 1);
        append(&mut writer, 1).unwrap();
        writer.finish().unwrap();
        check_rows(folder.path(), &[0, 1]);
    }

    #[test]
    fn a_failed_fsync_shows_nothing_to_readers() {
        let folder = tempfile::tempdir().unwrap();
        LEFT.set(u64::MAX);
        FAILS.set((false, true));
        let mut writer =
            Writer::open_with(folder.path(), &spec(), &WriterOptions::default(), limited).unwrap();
        append(&mut writer, 0).unwrap();
        assert!(matches!(writer.finish(), Err(Error::Write { records: 1, .. })));
        FAILS.set((false, false));
        check_rows(folder.path(), &[]);
        Writer::open(folder.path(), &spec(), &WriterOptions::default()).unwrap().finish().unwrap();
        check_rows(folder.path(), &[0]);
    }

    #[test]
    fn index_or_manifest_that_cannot_be_written_leaves_the_store_resumable() {
        for blocked in ["shard-00000-00000.idx.tmp", "manifest-00000.json.tmp"] {
            let folder = tempfile::tempdir().unwrap();
            let mut writer = Writer::open(folder.path(), &spec(), &WriterOptions::default()).unwrap();
            append(&mut writer, 0).unwrap();
            let blocked = folder.path().join(blocked);
            fse::create_dir(&blocked).unwrap(); // a file of this name cannot be made
            let error = writer.finish().unwrap_err();
            assert!(error.to_string().contains(blocked.file_name().unwrap().to_str().unwrap()), "{error}");
            check_rows(folder.path(), &[]);
            fse::remove_dir(&blocked).unwrap();
            let writer = Writer::open(folder.path(), &spec(), &WriterOptions::default()).unwrap();
            assert!(writer.contains(0));
            writer.finish().unwrap();
            check_rows(folder.path(), &[0]);
        }
    }
}
