//! Writes a set, piece by piece: what is committed survives the end of the process, and writing goes on after it.

use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fs_err::{File, OpenOptions};
use serde::{Deserialize, Serialize};

use super::{
    Entry, FileSum, HEADER, INDEX_FILE, INDEX_MAGIC, MANIFEST_FILE, Manifest, ROWS_FILE, ROWS_MAGIC, padded,
};
use crate::encode::EncodedRow;
use crate::error::Result;
use crate::mask::supervised;

/// How far the files of a set are on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Committed {
    /// Bytes of `rows.bin`.
    bytes: u64,
    /// Rows.
    rows: u64,
}

/// Writes the rows of a set in order into a folder of its own.
#[derive(Debug)]
pub(crate) struct SetWriter {
    folder: PathBuf,
    rows: BufWriter<File>,
    index: BufWriter<File>,
    at: Committed,
}

impl SetWriter {
    /// Creates `folder`, replacing what is there.
    pub(crate) fn create(folder: PathBuf) -> Result<Self> {
        if folder.exists() {
            fs_err::remove_dir_all(&folder)?;
        }
        fs_err::create_dir_all(&folder)?;
        let file = |name: &str, magic: [u8; 8]| -> Result<BufWriter<File>> {
            let mut file = BufWriter::new(File::create(folder.join(name))?);
            // The number of rows is filled in at the end.
            file.write_all(&[magic.as_slice(), &[0; 8]].concat())?;
            Ok(file)
        };
        let (rows, index) = (file(ROWS_FILE, ROWS_MAGIC)?, file(INDEX_FILE, INDEX_MAGIC)?);
        Ok(Self { folder, rows, index, at: Committed { bytes: HEADER as u64, rows: 0 } })
    }

    /// Goes on after what is committed; what was written later is cut off. `None` if less than that is there.
    pub(crate) fn resume(folder: PathBuf, at: Committed) -> Result<Option<Self>> {
        let file = |name: &str, bytes: u64| -> Result<Option<BufWriter<File>>> {
            let mut file = OpenOptions::new().read(true).write(true).open(folder.join(name))?;
            if file.metadata()?.len() < bytes {
                return Ok(None);
            }
            file.set_len(bytes)?;
            file.seek(SeekFrom::End(0))?;
            Ok(Some(BufWriter::new(file)))
        };
        let (rows, index) = (file(ROWS_FILE, at.bytes)?, file(INDEX_FILE, index_bytes(at.rows))?);
        Ok(rows.zip(index).map(|(rows, index)| Self { folder, rows, index, at }))
    }

    pub(crate) fn push(&mut self, row: &EncodedRow) -> Result<()> {
        let (length, bytes) = (row.ids.len(), padded(row.ids.len()));
        let supervised = supervised(&row.loss_mask);
        self.rows.write_all(bytemuck::cast_slice(&row.ids))?;
        self.rows.write_all(&row.loss_mask)?;
        self.rows.write_all(&[0; 4][..bytes - 5 * length])?;
        let entry = Entry { offset: self.at.bytes, length: length as u32, supervised: supervised as u32 };
        self.index.write_all(bytemuck::bytes_of(&entry))?;
        self.at.bytes += bytes as u64;
        self.at.rows += 1;
        Ok(())
    }

    /// Puts everything pushed so far on the disk.
    pub(crate) fn commit(&mut self) -> Result<Committed> {
        for file in [&mut self.rows, &mut self.index] {
            file.flush()?;
            file.get_ref().sync_data()?;
        }
        Ok(self.at)
    }

    /// Completes both files, writes the manifest, and gives the folder its final name.
    pub(crate) fn finish(self, to: &Path, manifest: impl FnOnce(Vec<FileSum>) -> Manifest) -> Result<()> {
        let files = vec![
            close(self.rows, &self.folder.join(ROWS_FILE), self.at.rows)?,
            close(self.index, &self.folder.join(INDEX_FILE), self.at.rows)?,
        ];
        let text = serde_json::to_vec_pretty(&manifest(files)).map_err(std::io::Error::other)?;
        write_synced(&self.folder.join(MANIFEST_FILE), &text)?;
        sync_folder(&self.folder)?;
        fs_err::rename(&self.folder, to)?;
        to.parent().map_or(Ok(()), sync_folder)
    }
}

/// Ids and mask, as bytes, of all rows that are committed in `folder`, in order.
pub(crate) fn committed_rows(folder: &Path, at: Committed, mut each: impl FnMut(&[u8], &[u8])) -> Result<()> {
    let mut rows = BufReader::with_capacity(1 << 20, File::open(folder.join(ROWS_FILE))?);
    let mut index = BufReader::new(File::open(folder.join(INDEX_FILE))?);
    rows.seek(SeekFrom::Start(HEADER as u64))?;
    index.seek(SeekFrom::Start(HEADER as u64))?;
    let (mut entry, mut row) = ([0; size_of::<Entry>()], Vec::new());
    for _ in 0..at.rows {
        index.read_exact(&mut entry)?;
        let length = bytemuck::pod_read_unaligned::<Entry>(&entry).length as usize;
        row.resize(padded(length), 0);
        rows.read_exact(&mut row)?;
        each(&row[..4 * length], &row[4 * length..5 * length]);
    }
    Ok(())
}

/// Writes a file and puts it on the disk.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    Ok(file.sync_all()?)
}

fn index_bytes(rows: u64) -> u64 {
    HEADER as u64 + rows * size_of::<Entry>() as u64
}

fn close(writer: BufWriter<File>, path: &Path, rows: u64) -> Result<FileSum> {
    let mut file = writer.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    file.seek(SeekFrom::Start(8))?;
    file.write_all(&rows.to_le_bytes())?;
    file.sync_all()?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(FileSum { name, bytes: path.metadata()?.len(), blake3: hasher.finalize().to_hex().to_string() })
}

/// A rename is on the disk only when the folder that holds the name is.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}
