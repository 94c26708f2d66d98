//! Files: names within a store, writing that is atomic, locks, memory maps.
#![expect(unsafe_code, reason = "memory maps")]

use std::{
    fmt, fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use fs_err as fse;
use memmap2::Mmap;

use crate::{Error, Result};

pub(crate) const MANIFEST: &str = "manifest.json";

/// Which shard of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ShardName {
    pub(crate) writer: u32,
    pub(crate) number: u32,
}

impl ShardName {
    /// The finished shard.
    pub(crate) fn bin(self) -> String {
        format!("shard-{:05}-{:05}.bin", self.writer, self.number)
    }

    /// The index of a finished shard.
    pub(crate) fn idx(self) -> String {
        format!("shard-{:05}-{:05}.idx", self.writer, self.number)
    }

    /// The shard while it is written.
    pub(crate) fn part(self) -> String {
        format!("shard-{:05}-{:05}.part", self.writer, self.number)
    }

    /// The shard a file name stands for: only names spelled exactly as above do.
    fn parse(name: &str, extension: &str) -> Option<Self> {
        let (writer, number) = name.strip_prefix("shard-")?.strip_suffix(extension)?.split_once('-')?;
        let parsed = Self { writer: writer.parse().ok()?, number: number.parse().ok()? };
        let spelled = if extension == ".bin" { parsed.bin() } else { parsed.part() };
        (spelled == name).then_some(parsed)
    }
}

/// The manifest of one writer.
pub(crate) fn writer_manifest(writer: u32) -> String {
    format!("manifest-{writer:05}.json")
}

/// The files of a store, each list sorted.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) writers: Vec<u32>,
    pub(crate) bins: Vec<ShardName>,
    pub(crate) parts: Vec<ShardName>,
}

/// Lists what the folder holds; files of other names are none of ours.
pub(crate) fn list(folder: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    for entry in fse::read_dir(folder)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(shard) = ShardName::parse(name, ".bin") {
            listing.bins.push(shard);
        } else if let Some(shard) = ShardName::parse(name, ".part") {
            listing.parts.push(shard);
        } else if let Some(writer) = parse_writer(name) {
            listing.writers.push(writer);
        }
    }
    listing.writers.sort_unstable();
    listing.bins.sort_unstable();
    listing.parts.sort_unstable();
    Ok(listing)
}

fn parse_writer(name: &str) -> Option<u32> {
    let writer = name.strip_prefix("manifest-")?.strip_suffix(".json")?.parse().ok()?;
    (writer_manifest(writer) == name).then_some(writer)
}

/// Writes a whole file so that it is seen complete or not at all, also after a power failure.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let written = (|| {
        let mut file = fse::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    if let Err(error) = written.and_then(|()| fse::rename(&temporary, path)) {
        // Best effort: a left-over is overwritten by the next attempt and read by nobody.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// Makes renames within a folder durable. Only Unix has a way to ask for it, and a need.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { fse::File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Opens (and keeps) a lock file. The lock ends with the returned file, or with the process.
pub(crate) fn lock_file(path: &Path) -> io::Result<fs::File> {
    let options = fse::OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    Ok(options.into_parts().0)
}

/// A memory map of a shard.
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    let file = fse::File::open(path)?;
    // SAFETY: a finished shard is never written again, and a deleted one stays mapped; an unfinished one is
    // mapped by the writer that holds its lock, and unmapped before it is written. A foreign program that writes
    // into a shard changes values under us (the checksum tells on first reading) or, cutting it short, ends the
    // process with SIGBUS: no map can prevent that.
    unsafe { Mmap::map(file.file()) }
        .map_err(|source| Error::Io(io::Error::new(source.kind(), format!("{}: {source}", path.display()))))
}

/// A shard that is being written: a file, or in tests one that runs full.
pub(crate) trait ShardFile: Write + fmt::Debug + Send {
    /// Cuts the file back to `bytes`; writing goes on there.
    fn cut(&mut self, bytes: u64) -> io::Result<()>;
    /// Waits until everything is on the disk.
    fn sync(&mut self) -> io::Result<()>;
}

/// How unfinished shards are opened: for writing, created where absent, positioned at the start.
pub(crate) type OpenShard = fn(&Path) -> io::Result<Box<dyn ShardFile>>;

pub(crate) fn open_shard(path: &Path) -> io::Result<Box<dyn ShardFile>> {
    let file = fse::OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    Ok(Box::new(file))
}

impl ShardFile for fse::File {
    fn cut(&mut self, bytes: u64) -> io::Result<()> {
        self.set_len(bytes)?;
        io::Seek::seek(self, io::SeekFrom::Start(bytes)).map(|_| ())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}
