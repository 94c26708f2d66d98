//! A shard: a 64-byte header, then records end to end.

use crate::{
    Spec,
    disk::ShardName,
    index::Entry,
    record::{self, u32_at},
};

/// Version of shards, indices and manifests; one number for all.
pub(crate) const VERSION: u32 = 1;
pub(crate) const HEADER_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"SFSHARD\0";
const INDEX_MAGIC: [u8; 8] = *b"SFINDEX\0";

/// The header of a shard.
pub(crate) fn header(store_id: u32, name: ShardName, fields: usize) -> [u8; HEADER_BYTES] {
    let mut bytes = common(MAGIC, store_id, name);
    bytes[24..28].copy_from_slice(&(fields as u32).to_le_bytes());
    seal(&mut bytes);
    bytes
}

/// What the headers of shards and of indices begin with. [`seal`] comes last.
fn common(magic: [u8; 8], store_id: u32, name: ShardName) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(&magic);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&name.writer.to_le_bytes());
    bytes[16..20].copy_from_slice(&name.number.to_le_bytes());
    bytes[20..24].copy_from_slice(&store_id.to_le_bytes());
    bytes
}

pub(crate) fn index_common(store_id: u32, name: ShardName) -> [u8; HEADER_BYTES] {
    common(INDEX_MAGIC, store_id, name)
}

/// Writes the checksum of a header into its last four bytes.
pub(crate) fn seal(bytes: &mut [u8; HEADER_BYTES]) {
    let crc = crc32fast::hash(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
}

/// Why the header of an unfinished or finished shard is not the one expected.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BadHeader {
    /// Never written completely, or damaged.
    Torn,
    /// Complete, and of another store, shard or version.
    Foreign(String),
}

impl BadHeader {
    pub(crate) fn what(self) -> String {
        match self {
            Self::Torn => "its header is damaged".into(),
            Self::Foreign(what) => what,
        }
    }
}

/// Compares the header at the start of `bytes` with the only one that this shard can have.
pub(crate) fn check_header(
    bytes: &[u8],
    store_id: u32,
    name: ShardName,
    fields: usize,
) -> Result<(), BadHeader> {
    let expected = header(store_id, name, fields);
    let Some(found) = bytes.get(..HEADER_BYTES) else { return Err(BadHeader::Torn) };
    if found == expected {
        return Ok(());
    }
    let crc = crc32fast::hash(&found[..HEADER_BYTES - 4]);
    if found[..8] != MAGIC || u32_at(found, HEADER_BYTES - 4) != crc {
        return Err(BadHeader::Torn);
    }
    if u32_at(found, 8) != VERSION {
        return Err(BadHeader::Foreign(format!("version {}, expected {VERSION}", u32_at(found, 8))));
    }
    let what = |bytes: &[u8]| {
        let (writer, number, id) = (u32_at(bytes, 12), u32_at(bytes, 16), u32_at(bytes, 20));
        format!("shard {number} of writer {writer} of store {id:08x}, {} fields", u32_at(bytes, 24))
    };
    Err(BadHeader::Foreign(format!("expected {}, got {}", what(&expected), what(found))))
}

/// The result of [`scan`].
#[derive(Debug)]
pub(crate) struct Scan {
    /// The valid records from the start on.
    pub(crate) entries: Vec<Entry>,
    /// Where they end.
    pub(crate) end: u64,
    /// Why the scan ended there, unless at the end of the file.
    pub(crate) stopped: Option<String>,
}

/// Walks the records of a shard (whose header is good), checking every byte, up to the first that is damaged or torn.
pub(crate) fn scan(spec: &Spec, bytes: &[u8]) -> Scan {
    let mut found = Scan { entries: Vec::new(), end: HEADER_BYTES as u64, stopped: None };
    while let Some(rest) = bytes.get(found.end as usize..).filter(|rest| !rest.is_empty()) {
        let checked = record::parse(spec, rest)
            .and_then(|header| record::check_payload(spec, &header, rest).map(|()| header));
        match checked {
            Ok(header) => {
                found.entries.push(Entry::new(&header, found.end));
                found.end += header.bytes;
            }
            Err(what) => {
                found.stopped = Some(what);
                break;
            }
        }
    }
    found
}
