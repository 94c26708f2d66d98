//! Cache: online in the first pass, which writes the store; the passes after it read the store.

use std::path::PathBuf;

use specforge_methods::Batch;
use specforge_store::{Encoding, Reader, Spec, Writer, WriterOptions};

use super::{FeatureSource, Online, RowFeatures, assemble, online, record_features};
use crate::{Error, Result};

/// A target in memory and the store that saves running it twice on a row.
#[derive(Debug)]
pub struct Cache {
    online: Online,
    folder: PathBuf,
    spec: Spec,
    /// Rows captured so far; open until the first pass ends.
    writer: Option<Writer>,
    /// Rows that can be read: those of earlier passes and runs.
    reader: Option<Reader>,
}

impl Cache {
    /// Opens or makes the store at `folder`; one that was captured from anything else is an error, and so is a lossy
    /// encoding: a row must give the same bits before and after it is stored, or a resumed run would differ.
    pub fn open(online: Online, folder: PathBuf, spec: Spec) -> Result<Self> {
        if spec.encoding == Encoding::Fp8 {
            let reason = "the fp8 encoding changes values between the first pass and the later ones: use \"bf16\" or \"lossless\"";
            return Err(Error::Mode(format!("cache mode, store {}: {reason}", folder.display())));
        }
        let writer = Writer::open(&folder, &spec, &WriterOptions::default())?;
        let mut cache = Self { online, folder, spec, writer: Some(writer), reader: None };
        cache.publish()?;
        Ok(cache)
    }

    /// Makes what is written readable, and goes on writing unless every row is there.
    fn publish(&mut self) -> Result<()> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let complete = writer.rows().len() as u64 >= self.spec.identity.prepared_rows;
        let any = !writer.rows().is_empty();
        writer.finish()?;
        if any {
            let reader = Reader::open(&self.folder)?;
            reader.expect(&self.spec.identity, &self.spec.schema)?;
            self.reader = Some(reader);
        }
        if !complete {
            self.writer = Some(Writer::open(&self.folder, &self.spec, &WriterOptions::default())?);
        }
        Ok(())
    }

    fn features(&mut self, rows: &[usize]) -> Result<Vec<RowFeatures>> {
        let stored = |row: usize| self.reader.as_ref().filter(|r| r.contains(row as u64));
        let missing: Vec<usize> = rows.iter().copied().filter(|&row| stored(row).is_none()).collect();
        let mut computed = self.online.rows(&missing)?.into_iter();
        let features = rows.iter().map(|&row| match stored(row) {
            Some(reader) => record_features(reader, row),
            None => Ok(computed.next().expect("one for each missing row")),
        });
        features.collect()
    }
}

impl FeatureSource for Cache {
    fn fetch(&mut self, rows: &[usize]) -> Result<Batch> {
        let features = self.features(rows)?;
        if let Some(writer) = &mut self.writer {
            for (&row, features) in rows.iter().zip(&features) {
                if !writer.contains(row as u64) {
                    online::append(writer, row, features)?;
                }
            }
        }
        assemble(rows, features)
    }

    fn end_of_epoch(&mut self) -> Result<()> {
        self.publish()
    }
}
