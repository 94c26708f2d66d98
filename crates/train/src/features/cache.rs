//! Cache: online in the first pass, which writes the store; the passes after it read the store. Several ranks write files
//! of their own into one store, and read all of it.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use specforge_methods::Batch;
use specforge_store::{Encoding, Reader, Spec, Writer, WriterOptions, finish_interrupted};
use specforge_tensor::Group;

use super::{FeatureSource, Online, RowFeatures, assemble, online, record_features};
use crate::{Error, Result};

/// Who writes into a store.
#[derive(Debug, Clone)]
pub struct Writers {
    /// All ranks, where there are several.
    pub ranks: Option<Arc<dyn Group>>,
    /// The number that this rank writes under; absent where another one writes the rows that it computes too.
    pub own: Option<u32>,
}

/// A target in memory and the store that saves running it twice on a row.
#[derive(Debug)]
pub struct Cache {
    online: Online,
    folder: PathBuf,
    spec: Spec,
    writers: Writers,
    /// Rows captured so far; open until the first pass ends.
    writer: Option<Writer>,
    /// Rows that can be read: those of earlier passes and runs. The same ones on all ranks.
    reader: Reader,
}

impl Cache {
    /// Opens or makes the store at `folder`; one that was captured from anything else is an error, and so is a lossy
    /// encoding: a row must give the same bits before and after it is stored, or a resumed run would differ. All ranks
    /// call this.
    pub fn open(online: Online, folder: PathBuf, spec: Spec, writers: Writers) -> Result<Self> {
        if spec.encoding == Encoding::Fp8 {
            let reason = "the fp8 encoding changes values between the first pass and the later ones: use \"bf16\" or \"lossless\"";
            return Err(Error::Mode(format!("cache mode, store {}: {reason}", folder.display())));
        }
        // What any number of ranks has left unfinished is finished before anyone reads.
        if writers.ranks.as_ref().is_none_or(|ranks| ranks.rank() == 0) {
            finish_interrupted(&folder, &spec, Some(0))?;
            Writer::open(&folder, &spec, &WriterOptions::default())?.finish()?;
        }
        let reader = writers.read(&folder, &spec)?;
        let mut cache = Self { online, folder, spec, writers, writer: None, reader };
        cache.write_on()?;
        Ok(cache)
    }

    fn is_complete(&self) -> bool {
        self.reader.rows().len() as u64 >= self.spec.identity.prepared_rows
    }

    /// Goes on writing, unless every row is there.
    fn write_on(&mut self) -> Result<()> {
        if let Some(writer) = self.writers.own.filter(|_| !self.is_complete()) {
            let options = WriterOptions { writer, ..WriterOptions::default() };
            self.writer = Some(Writer::open(&self.folder, &self.spec, &options)?);
        }
        Ok(())
    }

    /// Runs the target on those of the rows that cannot be read, and writes them.
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<RowFeatures>> {
        let missing = rows.iter().copied().filter(|&row| !self.reader.contains(row as u64));
        let missing: Vec<usize> = missing.collect();
        let computed = self.online.rows(&missing)?;
        if let Some(writer) = &mut self.writer {
            for (&row, features) in missing.iter().zip(&computed) {
                if !writer.contains(row as u64) {
                    online::append(writer, row, features)?;
                }
            }
        }
        Ok(computed)
    }
}

impl Writers {
    /// The store as all ranks find it: nobody has begun to write again before everyone has opened it.
    fn read(&self, folder: &PathBuf, spec: &Spec) -> Result<Reader> {
        self.barrier()?;
        let reader = Reader::open(folder)?;
        reader.expect(&spec.identity, &spec.schema)?;
        self.barrier()?;
        Ok(reader)
    }

    fn barrier(&self) -> Result<()> {
        Ok(self.ranks.as_ref().map_or(Ok(()), |ranks| ranks.barrier())?)
    }
}

impl FeatureSource for Cache {
    fn fetch(&mut self, rows: &[usize]) -> Result<Batch> {
        let mut computed = self.compute(rows)?.into_iter();
        let features = rows.iter().map(|&row| {
            if self.reader.contains(row as u64) {
                return record_features(&self.reader, row);
            }
            Ok(computed.next().expect("one for each missing row"))
        });
        assemble(rows, features.collect::<Result<_>>()?)
    }

    fn meets(&self) -> Option<Range<usize>> {
        self.online.peers.clone().filter(|_| !self.is_complete())
    }

    fn take_part(&mut self, rows: &[usize]) -> Result<()> {
        self.compute(rows).map(|_| ())
    }

    fn end_of_epoch(&mut self) -> Result<()> {
        if self.is_complete() {
            return Ok(());
        }
        self.writer.take().map_or(Ok(()), Writer::finish)?;
        self.reader = self.writers.read(&self.folder, &self.spec)?;
        self.write_on()
    }
}
