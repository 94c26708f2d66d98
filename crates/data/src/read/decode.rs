//! What a file is, by its first bytes and not by its name; compressed text is unpacked as it is read.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;
use fs_err::File;

use crate::error::{Error, Result};

/// What a file holds.
pub(super) enum Content {
    Text(Source),
    Parquet(File),
    /// With or without the frame of a file.
    Arrow {
        file: File,
        stream: bool,
    },
}

/// A text, plain or unpacked on the way.
pub(super) struct Source {
    pub(super) reader: Box<dyn BufRead + Send>,
    /// Name of the compression.
    pub(super) compression: Option<&'static str>,
    consumed: Arc<AtomicU64>,
}

const GZIP: &[u8] = b"\x1f\x8b";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
pub(super) const PARQUET: &[u8] = b"PAR1";
const ARROW_FILE: &[u8] = b"ARROW1";
const ARROW_STREAM: &[u8] = b"\xff\xff\xff\xff";
/// What people try that is none of these, and what to do about it.
const REFUSED: [(&[u8], &str); 6] = [
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"BZh", "bzip2; unpack it, or compress it with gzip or zstd"),
    (b"\xfd7zXZ", "xz; unpack it, or compress it with gzip or zstd"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data; fetch it with `git lfs pull`"),
];
const BUFFER: usize = 1 << 16;

/// Opens a file as what its first bytes say that it is.
pub(super) fn open(path: &Path) -> Result<Content> {
    let consumed = Arc::new(AtomicU64::new(0));
    let counted = Counted { file: File::open(path)?, consumed: Arc::clone(&consumed) };
    let mut raw = BufReader::with_capacity(BUFFER, counted);
    let head = raw.fill_buf()?;
    if head.starts_with(PARQUET) {
        return Ok(Content::Parquet(File::open(path)?));
    }
    if head.starts_with(ARROW_FILE) || head.starts_with(ARROW_STREAM) {
        return Ok(Content::Arrow { file: File::open(path)?, stream: head.starts_with(ARROW_STREAM) });
    }
    if let Some((_, what)) = REFUSED.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(Error::Unreadable { path: path.to_path_buf(), message: (*what).to_owned() });
    }
    let (reader, compression): (Box<dyn BufRead + Send>, _) = if head.starts_with(GZIP) {
        (Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(raw))), Some("gzip"))
    } else if head.starts_with(ZSTD) || is_skippable_frame(head) {
        let decoder = zstd::Decoder::with_buffer(raw)?;
        (Box::new(BufReader::with_capacity(BUFFER, decoder)), Some("zstd"))
    } else {
        (Box::new(raw), None)
    };
    Ok(Content::Text(Source { reader, compression, consumed }))
}

/// Some zstd files begin with a frame that holds something else.
fn is_skippable_frame(head: &[u8]) -> bool {
    matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

impl Source {
    /// Bytes read from the file, which is ahead of the text by a buffer.
    pub(super) fn consumed(&self) -> u64 {
        self.consumed.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("compression", &self.compression).finish_non_exhaustive()
    }
}

/// Counts the bytes of a file for the progress display.
pub(super) struct Counted {
    pub(super) file: File,
    pub(super) consumed: Arc<AtomicU64>,
}

impl io::Seek for Counted {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.consumed.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
