//! Reading a store: any record in any order, from any number of threads, straight from memory maps.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use half::bf16;
use memmap2::Mmap;
use serde::Serialize;

use crate::{
    DType, Error, Identity, Result, Schema, Spec,
    disk::{self, ShardName},
    fp8, identity,
    index::{self, Entry},
    lossless,
    manifest::{Manifest, ShardInfo, WriterManifest},
    record::{self, FieldSpan, Header, Stored},
    shard::{self, HEADER_BYTES},
};

/// A store opened for reading: the finished shards that were there when it was opened.
#[derive(Debug)]
pub struct Reader {
    folder: PathBuf,
    spec: Spec,
    created_by: String,
    verify: Verify,
    shards: Vec<Shard>,
    rows: Vec<u64>,
    /// In the order of `rows`.
    places: Vec<Place>,
    duplicates: u64,
}

/// When the checksum of a record is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Each time it is read.
    Always,
    /// The first time it is read.
    #[default]
    Once,
    /// Never; headers are still checked.
    Never,
}

/// The features of one row, borrowed from the store.
#[derive(Debug)]
pub struct Record<'a> {
    reader: &'a Reader,
    header: Header,
    /// From the header to the last byte.
    bytes: &'a [u8],
    shard: usize,
    offset: u64,
}

/// What [`Reader::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Records checked.
    pub records: u64,
    /// Bytes checked.
    pub bytes: u64,
    /// The damaged ones, in the order of the shards.
    pub damaged: Vec<Damage>,
}

/// A damaged record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// File of the shard.
    pub shard: PathBuf,
    /// Where the record starts in it.
    pub offset: u64,
    /// The row it holds.
    pub row: u64,
    /// What is wrong.
    pub what: String,
}

/// A store in figures.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Rows that can be read.
    pub rows: u64,
    /// Rows of a finished store.
    pub rows_expected: u64,
    /// Records of rows that another shard has too; not read.
    pub duplicates: u64,
    /// Tokens of the rows.
    pub tokens: u64,
    /// Finished shards.
    pub shards: u64,
    /// Bytes of the shards and their indices.
    pub bytes: u64,
    /// Bytes per token.
    pub bytes_per_token: f64,
    /// Bytes of the shards over the bytes of the plain values.
    pub compression: f64,
    /// The program that made the store.
    pub created_by: String,
    /// Encoding, schema and identity.
    pub spec: Spec,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    entries: Vec<Entry>,
    verified: Vec<AtomicBool>,
}

/// Where a record is: the shard, and which of its entries.
#[derive(Clone, Copy, Debug)]
struct Place {
    shard: u32,
    entry: u32,
}

impl Reader {
    /// Opens a store, to verify each record once.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(folder, Verify::default())
    }

    /// Opens a store. Reads manifests and indices, maps the shards, and reads no record.
    pub fn open_with(folder: impl AsRef<Path>, verify: Verify) -> Result<Self> {
        let folder = folder.as_ref();
        let manifest = Manifest::read(folder)?;
        let (spec, created_by) = (manifest.spec(), manifest.created_by);
        let store_id = spec.id();
        let mut shards = Vec::new();
        for writer in disk::list(folder)?.writers {
            for info in WriterManifest::read(folder, store_id, writer)?.shards {
                let name = ShardName { writer, number: info.number };
                shards.push(Shard::open(folder, &spec, store_id, name, &info)?);
            }
        }
        let (rows, places, duplicates) = sort(&shards);
        Ok(Self { folder: folder.into(), spec, created_by, verify, shards, rows, places, duplicates })
    }

    /// The rows of the store, rising.
    pub fn rows(&self) -> &[u64] {
        &self.rows
    }

    /// Whether the store has a row.
    pub fn contains(&self, row: u64) -> bool {
        self.rows.binary_search(&row).is_ok()
    }

    /// Tokens of a row, without reading the record.
    pub fn row_len(&self, row: u64) -> Result<usize> {
        let place = self.place(row)?;
        Ok(self.shards[place.shard as usize].entries[place.entry as usize].len as usize)
    }

    /// Encoding, schema and identity.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Reads (and, as asked for on opening, verifies) the record of a row.
    pub fn record(&self, row: u64) -> Result<Record<'_>> {
        let Place { shard, entry: at } = self.place(row)?;
        let shard_idx = shard as usize;
        let (shard, at) = (&self.shards[shard_idx], at as usize);
        let entry = shard.entries[at];
        let verify = match self.verify {
            Verify::Always => true,
            Verify::Once => !shard.verified[at].load(Ordering::Relaxed),
            Verify::Never => false,
        };
        let header = shard.check(&self.spec, &entry, verify).map_err(|what| Error::DamagedRecord {
            path: shard.path.clone(),
            offset: entry.offset,
            row,
            what,
        })?;
        shard.verified[at].store(true, Ordering::Relaxed);
        Ok(Record {
            reader: self,
            header,
            bytes: shard.record(&entry),
            shard: shard_idx,
            offset: entry.offset,
        })
    }

    /// Asks the system to read the record of a row ahead, in the background. A hint: no row, no effect.
    pub fn prefetch(&self, row: u64) {
        if let Ok(place) = self.place(row) {
            let shard = &self.shards[place.shard as usize];
            shard.prefetch(&shard.entries[place.entry as usize]);
        }
    }

    /// Fails, naming every difference, when the store was captured from something else than `identity`
    /// or lacks a field of `schema`. The target's path is not compared, and further fields do no harm.
    pub fn expect(&self, identity: &Identity, schema: &Schema) -> Result<()> {
        let mut differences = identity::schema_differences(&self.spec.schema, schema);
        differences.extend(identity::identity_differences(&self.spec.identity, identity));
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::Mismatch { path: self.folder.clone(), differences })
    }

    /// Checks every byte of every shard (manifests and indices were checked on opening) and lists the
    /// damaged records. `progress` gets the bytes done and the bytes in all.
    pub fn verify(&self, progress: &dyn Fn(u64, u64)) -> Result<Report> {
        let total = self.shards.iter().map(|s| s.map.len() as u64).sum();
        let mut report = Report::default();
        for shard in &self.shards {
            report.bytes += HEADER_BYTES as u64;
            for entry in &shard.entries {
                if let Err(what) = shard.check(&self.spec, entry, true) {
                    let (shard, offset, row) = (shard.path.clone(), entry.offset, entry.row);
                    report.damaged.push(Damage { shard, offset, row, what });
                }
                report.records += 1;
                report.bytes += entry.bytes;
                progress(report.bytes, total);
            }
        }
        Ok(report)
    }

    /// The store in figures.
    pub fn summary(&self) -> Summary {
        let tokens =
            self.places.iter().map(|p| self.shards[p.shard as usize].entries[p.entry as usize].len as u64);
        let tokens: u64 = tokens.sum();
        let stored: u64 = self.shards.iter().map(|s| s.map.len() as u64).sum();
        let index = |s: &Shard| (HEADER_BYTES + s.entries.len() * index::ENTRY_BYTES) as u64;
        let bytes = stored + self.shards.iter().map(index).sum::<u64>();
        let all_tokens: u64 = self.shards.iter().map(|s| index::tokens(&s.entries)).sum();
        let plain = all_tokens * self.spec.schema.plain_bytes_per_token();
        Summary {
            rows: self.rows.len() as u64,
            rows_expected: self.spec.identity.prepared_rows,
            duplicates: self.duplicates,
            tokens,
            shards: self.shards.len() as u64,
            bytes,
            bytes_per_token: ratio(bytes, all_tokens),
            compression: ratio(stored, plain),
            created_by: self.created_by.clone(),
            spec: self.spec.clone(),
        }
    }

    fn place(&self, row: u64) -> Result<Place> {
        let at = self.rows.binary_search(&row);
        let at = at.map_err(|_| Error::NoSuchRow { path: self.folder.clone(), row })?;
        Ok(self.places[at])
    }
}

fn ratio(a: u64, b: u64) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}

/// All rows in rising order; of a row that several shards have, the first shard's record.
fn sort(shards: &[Shard]) -> (Vec<u64>, Vec<Place>, u64) {
    let mut all = Vec::with_capacity(shards.iter().map(|s| s.entries.len()).sum());
    for (shard, s) in shards.iter().enumerate() {
        let place = |entry: usize| Place { shard: shard as u32, entry: entry as u32 };
        all.extend(s.entries.iter().enumerate().map(|(i, e)| (e.row, place(i))));
    }
    let found = all.len();
    all.sort_by_key(|(row, _)| *row); // stable: the first shard stays first
    all.dedup_by_key(|(row, _)| *row);
    let duplicates = (found - all.len()) as u64;
    let (rows, places) = all.into_iter().unzip();
    (rows, places, duplicates)
}

impl Shard {
    fn open(folder: &Path, spec: &Spec, store_id: u32, name: ShardName, info: &ShardInfo) -> Result<Self> {
        info.check_file(folder, name.writer)?;
        let entries = info.read_index(folder, store_id, name)?;
        let path = folder.join(name.bin());
        let map = disk::map(&path)?;
        let damaged = |what: String| Error::Damaged { path: path.clone(), what };
        shard::check_header(&map, store_id, name, spec.schema.fields().len())
            .map_err(|e| damaged(e.what()))?;
        if map.len() as u64 != info.bytes {
            return Err(damaged(format!("expected {} bytes, got {}", info.bytes, map.len())));
        }
        let verified = entries.iter().map(|_| AtomicBool::new(false)).collect();
        Ok(Self { path, map, entries, verified })
    }

    /// The bytes of a record. Entries lie within the map: the index was checked against its size.
    fn record(&self, entry: &Entry) -> &[u8] {
        &self.map[entry.offset as usize..(entry.offset + entry.bytes) as usize]
    }

    fn check(&self, spec: &Spec, entry: &Entry, payload: bool) -> Result<Header, String> {
        let bytes = self.record(entry);
        let header = record::parse(spec, bytes)?;
        if !entry.fits(&header) {
            return Err(format!(
                "the index does not fit it: it is of row {}, {} tokens",
                header.row, header.len
            ));
        }
        if payload {
            record::check_payload(spec, &header, bytes)?;
        }
        Ok(header)
    }

    #[cfg(unix)]
    fn prefetch(&self, entry: &Entry) {
        // A hint: without it the record is read when it is touched.
        let _ = self.map.advise_range(memmap2::Advice::WillNeed, entry.offset as usize, entry.bytes as usize);
    }

    #[cfg(not(unix))]
    fn prefetch(&self, _: &Entry) {}
}

impl<'a> Record<'a> {
    /// The row.
    pub fn row(&self) -> u64 {
        self.header.row
    }

    /// Tokens: at least one.
    #[expect(clippy::len_without_is_empty, reason = "a record is never empty")]
    pub fn len(&self) -> usize {
        self.header.len as usize
    }

    /// Values of a u8 field, `[len, width]`.
    pub fn field_u8(&self, name: &str) -> Result<&'a [u8]> {
        self.find(name, DType::U8).map(|(bytes, _, _)| bytes)
    }

    /// Values of a u32 field, `[len, width]`.
    pub fn field_u32(&self, name: &str) -> Result<&'a [u32]> {
        self.find(name, DType::U32).map(|(bytes, _, _)| cast(bytes))
    }

    /// Values of an f32 field, `[len, width]`.
    pub fn field_f32(&self, name: &str) -> Result<&'a [f32]> {
        self.find(name, DType::F32).map(|(bytes, _, _)| cast(bytes))
    }

    /// Values of a bf16 field, `[len, width]`: borrowed where they lie plain, else decoded.
    pub fn field_bf16(&self, name: &str) -> Result<Cow<'a, [bf16]>> {
        let (bytes, span, width) = self.find(name, DType::Bf16)?;
        if span.stored == Stored::Plain {
            return Ok(Cow::Borrowed(cast(bytes)));
        }
        let mut out = vec![bf16::ZERO; self.len() * width];
        self.decode(bytes, span, width, &mut out)?;
        Ok(Cow::Owned(out))
    }

    /// Writes the values of a bf16 field, `[len, width]`, into `out`, which has that many.
    pub fn decode_bf16_into(&self, name: &str, out: &mut [bf16]) -> Result<()> {
        let (bytes, span, width) = self.find(name, DType::Bf16)?;
        if out.len() != self.len() * width {
            let expected = format!("room for {} x {width} values", self.len());
            return Err(self.field_error(name, expected, out.len().to_string()));
        }
        self.decode(bytes, span, width, out)
    }

    fn decode(&self, bytes: &[u8], span: FieldSpan, width: usize, out: &mut [bf16]) -> Result<()> {
        match span.stored {
            Stored::Plain => out.copy_from_slice(cast(bytes)),
            Stored::Fp8 => fp8::decode(bytes, width, out),
            Stored::Lossless => lossless::decode(bytes, out).map_err(|what| Error::DamagedRecord {
                path: self.reader.shards[self.shard].path.clone(),
                offset: self.offset,
                row: self.row(),
                what,
            })?,
        }
        Ok(())
    }

    fn find(&self, name: &str, dtype: DType) -> Result<(&'a [u8], FieldSpan, usize)> {
        let schema = &self.reader.spec.schema;
        let Some(at) = schema.position(name) else {
            let names: Vec<_> = schema.fields().iter().map(|f| f.name.as_str()).collect();
            let expected = format!("one of {}", names.join(", "));
            return Err(self.field_error(name, expected, "a name the store does not have".into()));
        };
        let field = &schema.fields()[at];
        if field.dtype != dtype {
            return Err(self.field_error(name, field.dtype.to_string(), dtype.to_string()));
        }
        let span = self.header.fields[at];
        Ok((&self.bytes[span.offset..span.offset + span.bytes], span, field.width as usize))
    }

    fn field_error(&self, name: &str, expected: String, got: String) -> Error {
        Error::Field { row: self.row(), field: name.into(), expected, got }
    }
}

/// Plain values as they lie in the map.
fn cast<T: bytemuck::Pod>(bytes: &[u8]) -> &[T] {
    bytemuck::try_cast_slice(bytes)
        .expect("fields are 64-byte aligned and of whole values: parsing checked it")
}
